"""Code from outside in a storage: the text of its modules, by the digest that names are pinned to."""

from collections.abc import Iterable
from functools import partial

from workers import code
from workers.code import Bundle, CodeError, Module, is_digest
from workers.config import Mistake, Record
from workers.identity import list_outside
from workers.kinds import NAMED_AT
from workers.layout import name_code_file
from workers.seals import open_text, seal_text
from workers.storage import Storage

INDEX = "modules.json"  # written last: {"modules": {name: whether it is a package}}
GONE = "the command that begins with the file of settings writes it again"


def keep_bundle(storage: Storage, bundle: Bundle) -> None:
    """Writes the modules, unless they are there with the same text."""
    there = find_bundle(storage, bundle.digest)
    if there and all(there.modules[name].text == module.text for name, module in bundle.modules.items()):
        return
    for module in bundle.modules.values():
        path = name_code_file(bundle.digest, module.file)
        storage.write(path, seal_text(module.text, path))
    index = {module.name: module.is_package for module in bundle.modules.values()}
    storage.write_sealed(name_code_file(bundle.digest, INDEX), {"modules": index})


def find_bundle(storage: Storage, digest: str) -> Bundle | None:
    """The modules of that digest; None where they are not there, or damaged, which is told. Raises CodeError."""
    index = storage.read_sealed(name_code_file(digest, INDEX), GONE)
    if index is None:
        return None
    modules = {}
    for name, is_package in index["modules"].items():
        module = Module(name, "", "", is_package)
        path = name_code_file(digest, module.file)
        text = storage.read_checked(path, open_text, GONE)
        if text is None:
            return None
        modules[name] = Module(name, storage.find_url(path), text, is_package)
    bundle = Bundle(modules)
    if bundle.digest != digest:
        raise CodeError(f"{storage.find_url(name_code_file(digest, ''))} holds the code {bundle.digest}; {GONE}")
    return bundle


def keep_code(storage: Storage, names: Iterable[str | None]) -> None:
    """Writes the modules that pinned names of kinds need, of those that are not installed. Raises CodeError."""
    for name in names:
        if name and is_digest(digest := name.partition("@")[2]):
            keep_bundle(storage, code.find_bundle(digest))


def collect_bundles(records: Iterable[Record]) -> dict[str, Bundle]:
    """The bundles whose kinds these trials or measurements name, by their digests. Raises CodeError."""
    names = {name for record in records for names in list_outside(record).values() for name in names}
    digests = sorted({digest for name in names if is_digest(digest := name.partition("@")[2])})
    return {digest: code.find_bundle(digest) for digest in digests}


def check_code(records: Iterable[Record]) -> list[Bundle]:
    """The bundles that these name, all functions of whose kinds have been loaded. Raises Mistake."""
    records = list(records)
    try:
        for path, name in {(path, name) for r in records for path, names in list_outside(r).items() for name in names}:
            NAMED_AT[path][name].load()
        return list(collect_bundles(records).values())
    except CodeError as error:
        raise Mistake(str(error)) from error


def look_in(storage: Storage) -> None:
    """Names that are pinned to code which this process does not know are looked for in the storage."""
    code.add_store(storage.root, partial(find_bundle, storage))
