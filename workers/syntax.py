"""What the text of a module says as code: its digest, and the modules that it imports. Pure functions.

Two texts with one syntax tree, apart from docstrings, annotations and comments, have one digest, on any version of
Python. A module that says `VERSION = ...` is told by that alone, whatever else it says.
"""

import ast
import re
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from workers.seals import compute_digest

NAMED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # "module:name"
LEFT_OUT = ("ctx", "kind", "type_comment")  # fields of nodes that follow from the rest, or are comments


def digest_code(tree: ast.Module) -> str:
    """16 hex digits of what the module computes, or of its VERSION where it states one."""
    version = find_version(tree)
    content = ["VERSION", version] if version is not None else _flatten(_Bare().visit(deepcopy(tree)))
    return compute_digest(content)


def find_version(tree: ast.Module) -> str | None:
    """The literal that the module assigns to VERSION, as text; None where it assigns none."""
    for node in tree.body:
        match node:
            case (
                ast.Assign(targets=[ast.Name("VERSION")], value=value)
                | ast.AnnAssign(target=ast.Name("VERSION"), value=ast.expr() as value)
            ):
                try:
                    return repr(ast.literal_eval(value))
                except (ValueError, TypeError):
                    return None
    return None


def find_line(tree: ast.Module, name: str) -> int:
    """The line on which the module assigns `name`; 1 where it cannot be seen."""
    lines = (n.lineno for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == name and _is_stored(n))
    return next(lines, 1)


def _is_stored(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)


def is_bound(tree: ast.Module, name: str) -> bool:
    """Whether the module may have an attribute of that name, as its text shows."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=bound) | ast.FunctionDef(name=bound) | ast.ClassDef(name=bound) if bound == name:
                return True
            case ast.alias(name=bound, asname=other) if name == (other or bound) or bound == "*":
                return True
    return False


def list_imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[str]:
    """The dotted names that may be modules which `module` imports, anywhere in its text.

    A string "module:name", as entries name functions by, counts as an import of that module.
    """
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(_Bare().visit(deepcopy(tree))):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names)
            case ast.Constant(value=str(text)) if NAMED.fullmatch(text):
                yield text.partition(":")[0]


class _Bare(ast.NodeTransformer):
    """Takes docstrings, annotations and what only type checkers read out of a tree.

    The annotations of a class's own fields stay: records, such as pydantic's, are made of them.
    """

    def _visit_block(self, node: Any) -> Any:
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = node.body[1:]
        return self.generic_visit(node)

    def _visit_function(self, node: Any) -> Any:
        node.returns = None
        return self._visit_block(node)

    visit_Module = _visit_block
    visit_FunctionDef = visit_AsyncFunctionDef = _visit_function

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        fields = [child for child in node.body if isinstance(child, ast.AnnAssign)]
        for field in fields:
            field.simple = 2  # marks that it stays
        return self._visit_block(node)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        if node.simple == 2:
            return self.generic_visit(node)
        return ast.Assign(targets=[node.target], value=self.visit(node.value), lineno=0) if node.value else None

    def visit_If(self, node: ast.If) -> Any:
        name = node.test.attr if isinstance(node.test, ast.Attribute) else getattr(node.test, "id", "")
        if name != "TYPE_CHECKING":
            return self.generic_visit(node)
        return [self.visit(child) for child in node.orelse]


def _flatten(node: Any) -> Any:
    """A tree as lists and texts, without what differs between versions of Python."""
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if name not in LEFT_OUT]
        return [type(node).__name__, *([name, _flatten(v)] for name, v in fields if v is not None and v != [])]
    if isinstance(node, list):
        return [_flatten(item) for item in node]
    return f"{type(node).__name__} {node!r}"
