"""Finds classes and functions in the source code of modules, without running them."""

from __future__ import annotations

import ast
import operator
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TRANSPARENT = (
    "object",
    "Protocol",
    "ABC",
    "Generic",
    "NamedTuple",
    "TypedDict",
)  # bases without a constructor of their own
HARMLESS = ("dataclass", "runtime_checkable", "final", "override", "total_ordering")  # decorators
DEEPEST = 20  # names that refer to further names


@dataclass(frozen=True, eq=False)
class Source:
    """The source of a module. names: {name: definition, or the dotted name of an import} at its top level. open: the
    module may define more names, by __getattr__ or a star import."""

    module: str
    names: Mapping[str, ast.AST | str]
    open: bool


@dataclass(frozen=True)
class Class:
    """A class and its module."""

    node: ast.ClassDef = field(repr=False)
    source: Source = field(repr=False)

    @property
    def name(self) -> str:
        return self.node.name

    def typed_dict(self) -> bool:
        return named(self, "TypedDict") or any(isinstance(base, Class) and base.typed_dict() for base in bases(self))


@dataclass(frozen=True)
class Function:
    """A function and its module."""

    node: ast.FunctionDef = field(repr=False)
    source: Source = field(repr=False)


# --- modules ---------------------------------------------------------------------------------------------------------


@cache
def read(module: str) -> Source | None:
    """A module's source, found as an import finds it; None if it cannot be read."""
    place = _file(module)
    if place is None:
        return None
    try:
        tree = ast.parse(place.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None
    names: dict[str, ast.AST | str] = {}
    stars = False
    package = module if place.name == "__init__.py" else module.rpartition(".")[0]
    for statement in _top_level(tree.body):
        if isinstance(statement, ast.ClassDef | ast.FunctionDef):
            names[statement.name] = statement
            stars |= statement.name == "__getattr__"
        elif isinstance(statement, ast.Assign):
            names.update({name: statement.value for target in statement.targets for name in _assigned_names(target)})
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            names[statement.target.id] = statement.value
        elif isinstance(statement, ast.For):
            names.update(dict.fromkeys(_assigned_names(statement.target), statement.iter))
        elif isinstance(statement, ast.With):
            for item in statement.items:
                names.update(dict.fromkeys(_assigned_names(item.optional_vars), item.context_expr))
        elif isinstance(statement, ast.Import):
            for alias in statement.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(statement, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - statement.level + 1] if statement.level else []
            origin = ".".join([*above, *([statement.module] if statement.module else [])])
            stars |= any(alias.name == "*" for alias in statement.names)
            names.update({alias.asname or alias.name: f"{origin}.{alias.name}" for alias in statement.names})
    return Source(module, names, stars)


def _file(module: str) -> Path | None:
    top, *below = module.split(".")
    try:
        spec = find_spec(top)  # a name without dots, so nothing is imported
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None:
        return None
    if not below and spec.origin and spec.origin.endswith(".py"):
        return Path(spec.origin)
    for root in spec.submodule_search_locations or ():
        place = Path(root).joinpath(*below)
        for file in (place.with_name(f"{place.name}.py"), place / "__init__.py") if below else (place / "__init__.py",):
            if file.is_file():
                return file
    return None


def _top_level(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """A module's statements, including those under if, for, while, with and try."""
    for statement in statements:
        if not isinstance(statement, ast.If | ast.While | ast.Try):
            yield statement
        if isinstance(statement, ast.If | ast.For | ast.While | ast.Try | ast.With):
            yield from _top_level(statement.body)
            yield from _top_level([inner for handler in getattr(statement, "handlers", ()) for inner in handler.body])
            yield from _top_level([*getattr(statement, "orelse", ()), *getattr(statement, "finalbody", ())])


def _assigned_names(target: ast.expr | None) -> list[str]:
    """The names that an assignment's target gives a value."""
    return [] if target is None else [one.id for one in ast.walk(target) if isinstance(one, ast.Name)]


# --- names -----------------------------------------------------------------------------------------------------------


def find(dotted: str) -> Class | Function | str | None:
    """The class or function of a dotted name; imports are followed. None: it can only be found by running the module. A
    text: the reason why there is none."""
    module, _, name = dotted.rpartition(".")
    if not module:
        return f"{dotted} is not a dotted name"
    if (source := read(module)) is None:
        top = module.partition(".")[0]
        try:
            there = find_spec(top) is not None
        except (ImportError, ValueError):
            there = False
        if not there:
            return f"there is no module {top}"
        if _file(module) is not None or not _readable(module) or not isinstance(find(module), str):
            return None  # perhaps an attribute of a class, such as a classmethod
        return f"there is no module {module}"
    if name not in source.names:
        return None if source.open else f"there is no {name} in {module}"
    found = resolve(ast.Name(name), source)
    return found if isinstance(found, Class | Function) else None


def _readable(module: str) -> bool:
    """Whether the package of a module can be read and defines its modules as files only."""
    parent = module.rpartition(".")[0]
    return bool(parent) and (source := read(parent)) is not None and not source.open


def resolve(node: ast.expr, source: Source, depth: int = 0) -> Class | Function | tuple[ast.expr, Source] | str | None:
    """The class or function that a name or a.b refers to, or the expression that was assigned to it, with its module.
    If its module cannot be read: its dotted name. None: the node is not a name."""
    if isinstance(node, ast.Attribute):
        owner = resolve(node.value, source, depth)
        return _resolve_dotted(f"{owner}.{node.attr}", depth) if isinstance(owner, str) else None
    if not isinstance(node, ast.Name):
        return None
    found = source.names.get(node.id)
    if isinstance(found, ast.ClassDef):
        return Class(found, source)
    if isinstance(found, ast.FunctionDef):
        return Function(found, source)
    if isinstance(found, str):
        return _resolve_dotted(found, depth)
    return (found, source) if isinstance(found, ast.expr) else node.id


def _resolve_dotted(dotted: str, depth: int) -> Class | Function | tuple[ast.expr, Source] | str:
    module, _, name = dotted.rpartition(".")
    if dotted.partition(".")[0] in sys.stdlib_module_names:  # schema.py knows them by name
        return dotted
    if depth > DEEPEST or not module or (source := read(module)) is None or name not in source.names:
        return dotted
    return resolve(ast.Name(name), source, depth + 1) or dotted


ARITHMETIC: Mapping[type[ast.operator], Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def value_of(node: ast.expr, source: Source) -> Any:
    """The value of an expression of constants, arithmetic and names of constants: a number, a text or a tuple.

    Raises:
        ValueError: the expression contains anything else.
    """
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        return ARITHMETIC[type(node.op)](value_of(node.left, source), value_of(node.right, source))
    if isinstance(node, ast.Name | ast.Attribute):
        found = resolve(node, source)
        if isinstance(found, tuple):
            return value_of(*found)
    return ast.literal_eval(node)


def bases(cls: Class) -> list[Class | None]:
    """A class's bases; None for a base that cannot be read."""
    found = [resolve(base.value if isinstance(base, ast.Subscript) else base, cls.source) for base in cls.node.bases]
    named = [one.rpartition(".")[2] if isinstance(one, str) else "" for one in found]
    return [one if isinstance(one, Class) else None for one, name in zip(found, named) if name not in TRANSPARENT]


def fact(target: str, name: str, otherwise: Any = None) -> Any:
    """A class attribute made of constants, read from the source of the class or of its bases. `otherwise` if none of
    them defines it, or if it cannot be read."""
    found = find(target)
    for cls in resolution(found) if isinstance(found, Class) else ():
        for line in cls.node.body if cls is not None else ():
            if cls is None or not isinstance(line, ast.Assign | ast.AnnAssign) or line.value is None:
                continue
            targets = line.targets if isinstance(line, ast.Assign) else [line.target]
            if any(name in _assigned_names(target) for target in targets):
                return value_of(line.value, cls.source)
    return otherwise


def mark_of(decorator: ast.expr) -> str:
    """A decorator's name without module and arguments."""
    return ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator).rpartition(".")[2]


def is_altered(node: ast.ClassDef | ast.FunctionDef) -> bool:
    """Whether a decorator may have replaced a class or a function, or changed its parameters."""
    return not all(mark_of(mark) in HARMLESS for mark in node.decorator_list)


def named(cls: Class, name: str) -> bool:
    """Whether a base that cannot be read, such as Protocol, has this name."""
    found = (resolve(base, cls.source) for base in cls.node.bases)
    return any(isinstance(one, str) and one.rpartition(".")[2] == name for one in found)


def lineage(cls: Class) -> list[Class | None]:
    """The class and all its ancestors, nearest first."""
    return [cls, *(one for base in bases(cls) for one in (lineage(base) if base is not None else [None]))]


def resolution(cls: Class) -> Iterator[Class | None]:
    """The class and its bases in the order in which Python looks for a method; None: a base that cannot be read. Bases
    are read only when the iterator reaches them."""
    yield cls
    above = bases(cls)
    if len(above) == 1:
        yield from resolution(above[0]) if above[0] is not None else [None]
    else:
        behind = [one for base in above for one in (lineage(base) if base is not None else [None])]
        yield from (one for place, one in enumerate(behind) if one is None or one not in behind[place + 1 :])


def lacks(cls: Class, role: Class) -> str | None:
    """The first method of a protocol that a class lacks, or "" if the role is a class that it does not inherit from.
    None: the class has the role, or its source does not show whether it has."""
    ancestors = lineage(cls)
    if any(one is None or one.node is role.node or is_altered(one.node) for one in ancestors):
        return None
    if not named(role, "Protocol"):
        return ""
    lines = [line for one in ancestors if one for line in one.node.body]
    has = {line.name for line in lines if isinstance(line, ast.FunctionDef)}
    for line in lines:
        targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
        has |= {name for target in targets for name in _assigned_names(target)}
    asked = [m for m in role.node.body if isinstance(m, ast.FunctionDef) and not m.decorator_list]
    return next((method.name for method in asked if method.name not in has), None)
