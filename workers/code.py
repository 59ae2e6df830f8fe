"""Code from outside of the packages: where it lies, what of it a name means, and its import.

    my_losses:ROOT_SNR                      as a file of settings names it
    my_losses:ROOT_SNR@0f3a9c5d2b7e4816     as ids, storages and nodes have it: with the digest of its code
    their.losses:ROOT_SNR@theirs-2.1        of an installed package: with its name and version

A bundle is a module that lies under the declared roots, with all modules under them that it imports, directly or not.
It is imported from the very text that its digest is made of, in the command as on the nodes, where the text comes from
the storage (`workers.bundles`). What an import by a text that is made while running would load is not seen, and so is
not found.
"""

import ast
import difflib
import importlib.abc
import importlib.util
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from workers.seals import compute_digest
from workers.syntax import digest_code, find_line, is_bound, list_imports


class CodeError(ValueError):
    """What is wrong with code from outside, or where it lies; with its file and line where it has them."""


@dataclass(frozen=True)
class Module:
    name: str
    path: str  # for messages and tracebacks
    text: str
    is_package: bool = False

    @cached_property
    def tree(self) -> ast.Module:
        """Raises CodeError."""
        try:
            return ast.parse(self.text)
        except (SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None) or 1
            raise CodeError(f"{self.path}:{line}: SyntaxError: {getattr(error, 'msg', error)}") from None

    @cached_property
    def digest(self) -> str:
        return digest_code(self.tree)

    @property
    def file(self) -> str:
        """Its place under a root."""
        return self.name.replace(".", "/") + ("/__init__.py" if self.is_package else ".py")


@dataclass(frozen=True, eq=False)
class Bundle:
    modules: Mapping[str, Module]  # by name

    @cached_property
    def digests(self) -> dict[str, str]:
        """The digest of each file."""
        return {module.file: module.digest for module in self.modules.values()}

    @cached_property
    def digest(self) -> str:
        return compute_digest(self.digests)


OURS = ("orchestrator", "workers")  # what is of this program is never taken for somebody's own

# ---- Where code lies -------------------------------------------------------------------------------------------

_roots: tuple[Path, ...] = ()
_found: dict[str, Bundle] = {}  # what lies under the roots, by the module that it begins at
_bundles: dict[str, Bundle] = {}  # all that this process knows, by digest
_stores: dict[str, Callable[[str], Bundle | None]] = {}  # where else there may be some, by what tells them apart


def open_roots(roots: Sequence[Path]) -> None:
    """Modules are looked for under these folders from now on, and read anew."""
    global _roots
    _roots = tuple(roots)
    _found.clear()
    _failed.clear()


def add_store(name: str, find: Callable[[str], Bundle | None]) -> None:
    """Bundles that this process does not know are asked for there too."""
    _stores[name] = find


def find_bundle(digest: str) -> Bundle:
    """The bundle of that digest. Raises CodeError where nothing known has it."""
    if digest in _bundles:
        return _bundles[digest]
    for find in _stores.values():
        if bundle := find(digest):
            return _bundles.setdefault(digest, bundle)
    raise CodeError(f"its code {digest} is neither under the folders of `code` as they are now nor in the storage")


def collect_bundle(name: str) -> Bundle | None:
    """The bundle that begins at a module under the roots; None where there is no such module. Raises CodeError."""
    if name not in _found:
        modules: dict[str, Module] = {}
        waiting = [name]
        while waiting:
            parts = waiting.pop().split(".")
            for end in range(1, len(parts) + 1):  # a package is imported before what is in it
                other = ".".join(parts[:end])
                if other not in modules and (module := _find_module(other)):
                    modules[other] = module
                    waiting += list_imports(module.tree, module.name, module.is_package)
        if name not in modules:
            return None
        bundle = Bundle(dict(sorted(modules.items())))
        if (known := _bundles.get(bundle.digest)) and known.modules == bundle.modules:
            bundle = known
        _found[name] = _bundles[bundle.digest] = bundle
    return _found[name]


def _find_module(name: str) -> Module | None:
    """The module under the roots. Raises CodeError where two have it, or where it hides another one."""
    places: list[Path] = []
    for root in _roots if name.partition(".")[0] not in OURS else ():
        place = root.joinpath(*name.split("."))
        if (file := place / "__init__.py").is_file() or (file := place.with_suffix(".py")).is_file():
            places.append(file)
        elif place.is_dir() and any(place.glob("*.py")) and not _find_elsewhere(name):
            places.append(place)
    if not places:
        return None
    if len(places) > 1:
        raise CodeError(f"{' and '.join(map(str, places))} are both the module {name}; rename one of them")
    [place] = places
    if "." not in name and (other := _find_elsewhere(name)):
        raise CodeError(f"{place} hides {other}; rename it")
    is_package = place.is_dir() or place.name == "__init__.py"
    try:
        text = "" if place.is_dir() else place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CodeError(f"{place} cannot be read: {error}") from None
    return Module(name, str(place), text, is_package)


def _find_elsewhere(name: str) -> str:
    """What Python itself has under a name, apart from what lies under the roots; empty where there is nothing."""
    if name in sys.stdlib_module_names:
        return f"the module {name} of Python's standard library"
    top = name.partition(".")[0]
    if isinstance(getattr(sys.modules.get(top), "__loader__", None), _TextLoader):
        return ""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return ""
    if spec is None or spec.origin is None or isinstance(spec.loader, _TextLoader):
        return ""
    if any(Path(spec.origin).is_relative_to(root) for root in _roots):  # which is on Python's path as well
        return ""
    return f"the installed module {top} ({spec.origin})"


# ---- Names -----------------------------------------------------------------------------------------------------


def pin(name: str) -> str:
    """ "module:name" with what tells its code apart from any other. Raises CodeError where there is no such module."""
    bare, _, pinned = name.partition("@")
    module = bare.partition(":")[0]
    if pinned:
        return name
    if bundle := collect_bundle(module):
        return f"{bare}@{bundle.digest}"
    if distribution := find_distribution(module):
        return f"{bare}@{distribution}"
    where = f"under {', '.join(map(str, _roots))} (`code`)" if _roots else "as the file names no folders of `code`"
    raise CodeError(
        f"{bare!r}: there is no module {module} {where}, nor one of an installed package; "
        "`code: [FOLDER]` names where modules of one's own lie, relative to the file"
    )


def drop_pin(name: str) -> str:
    """The name as a person writes it."""
    return name.partition("@")[0]


def drop_digests(text: str) -> str:
    """A message with names as a person writes them."""
    return re.sub(r"(?<=\w)@[0-9a-f]{16}\b", "", text)


def is_digest(pinned: str) -> bool:
    """Whether a name is pinned to a bundle, and not to an installed package."""
    return len(pinned) == 16 and "-" not in pinned


@lru_cache
def find_distribution(module: str) -> str:
    """The installed package that has a module, as NAME-VERSION; empty where none has."""
    top = module.partition(".")[0]
    for name in [top, *metadata.packages_distributions().get(top, ())]:
        try:
            return f"{name}-{metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return ""


def find_object(name: str) -> tuple[Any, Bundle | None]:
    """What a pinned "module:name" names, and the bundle that it is of. Raises CodeError."""
    bare, _, pinned = name.partition("@")
    module, _, attribute = bare.partition(":")
    bundle = find_bundle(pinned) if is_digest(pinned) else None
    if bundle and module not in bundle.modules:
        raise CodeError(f"{bare!r}: the code {pinned} has no module {module}")
    found = import_from(bundle, module)
    if not hasattr(found, attribute):
        place = bundle.modules[module].path if bundle else module
        close = [f"; did you mean {other!r}?" for other in difflib.get_close_matches(attribute, vars(found), n=1)]
        entries = [other for other, value in vars(found).items() if type(value).__name__.endswith("Entry")]
        there = f"; its entries are {', '.join(entries)}" if entries and not close else ""
        raise CodeError(f"{bare!r}: {place} has no {attribute}{''.join(close)}{there}")
    return getattr(found, attribute), bundle


def check_there(bundle: Bundle, function: str, where: str) -> None:
    """Raises CodeError where "module:name" of an entry at `where` cannot be there; nothing is imported for it."""
    module, _, name = function.partition(":")
    if found := bundle.modules.get(module):
        if not is_bound(found.tree, name):
            raise CodeError(f"{where} names {function!r}, and {found.path} has no {name}")
    elif not find_distribution(module) and module.partition(".")[0] not in (*OURS, *sys.stdlib_module_names):
        raise CodeError(f"{where} names {function!r}, and there is no module {module}")


def locate(name: str) -> str:
    """File and line of a pinned "module:name", for messages."""
    bare, _, pinned = name.partition("@")
    module, _, attribute = bare.partition(":")
    if not is_digest(pinned):
        return module
    found = find_bundle(pinned).modules[module]
    return f"{found.path}:{find_line(found.tree, attribute)}"


# ---- Import ----------------------------------------------------------------------------------------------------

_lock = threading.RLock()
_active: Bundle | None = None
_failed: dict[tuple[Bundle | None, str], str] = {}  # imports that raised something, and what
_loaded: dict[int, tuple[Bundle, dict[str, ModuleType]]] = {}  # of each bundle that is imported, its modules


def import_from(bundle: Bundle | None, name: str) -> ModuleType:
    """The module of that name, of the bundle or an installed one. Raises CodeError with what its import raised."""
    with _lock:
        if bundle:
            _activate(bundle)
        if failed := _failed.get((bundle, name)):
            raise CodeError(failed)
        try:
            return importlib.import_module(name)
        except CodeError:
            raise
        except (Exception, SystemExit) as error:
            _failed[bundle, name] = describe_error(error, name)
            raise CodeError(_failed[bundle, name]) from error


def locate_error(error: BaseException) -> str:
    """The file and line where it was raised, in brackets: the last ones that are of no library, below the caller's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename][1:]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def describe_error(error: BaseException, otherwise: str) -> str:
    """What code from outside raised, with its file and line, or `otherwise` where none of it is in the traceback."""
    files = {module.path for bundle in _bundles.values() for module in bundle.modules.values()}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else otherwise
    return f"{where}: {' '.join(f'{type(error).__name__}: {error}'.split())}"


def _activate(bundle: Bundle) -> None:
    """Modules by the names of this bundle's are this bundle's from now on."""
    global _active
    if _active is bundle:
        return
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _put_aside(_active)
    _active = bundle
    _, modules = _loaded.setdefault(id(bundle), (bundle, {}))
    sys.modules.update(modules)


def _put_aside(bundle: Bundle | None) -> None:
    if bundle:
        _, modules = _loaded[id(bundle)]
        for name in bundle.modules:
            if isinstance(getattr(sys.modules.get(name), "__loader__", None), _TextLoader):
                modules[name] = sys.modules.pop(name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of the active bundle; of others what is imported only when a function of them is called."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        others = (bundle for bundle, _ in reversed(_loaded.values()))
        for bundle in [*([_active] if _active else []), *others]:
            if module := bundle.modules.get(name):
                spec = ModuleSpec(name, _TextLoader(module), origin=module.path, is_package=module.is_package)
                spec.has_location = True
                return spec
        return None


class _TextLoader(importlib.abc.SourceLoader):
    def __init__(self, module: Module) -> None:
        self.module = module

    def get_filename(self, fullname: str) -> str:
        return self.module.path

    def get_data(self, path: str | os.PathLike[str]) -> bytes:
        if str(path) != self.module.path:
            raise OSError(f"{path} is no file of code from outside")
        return self.module.text.encode()
