"""What constructors take, by name, as their source code says it."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from realera.sources import Class, Function, Source, bases, named, resolve


@dataclass(frozen=True)
class Parameter:
    """What a constructor takes under one name; annotation: None where it has none."""

    annotation: ast.expr | None
    source: Source = field(repr=False)
    required: bool


@dataclass(frozen=True)
class Signature:
    """All that a constructor takes by name. others: names that are not listed, where it takes any."""

    parameters: Mapping[str, Parameter]
    others: Parameter | None = None


def signature(found: Class | Function) -> Signature | None:
    """What a constructor, or a function, takes by name; None where that cannot be read."""
    if isinstance(found, Function):
        return _taken(found.node, found.source, None)
    return _signature(found)


@cache
def _signature(cls: Class) -> Signature | None:
    if cls.typed_dict() or named(cls, "NamedTuple") or _is_dataclass(cls):
        return _fields(cls)
    for method in cls.node.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            return _taken(method, cls.source, cls)
    for base in bases(cls):
        return None if base is None else _signature(base)
    return Signature({})


def _is_dataclass(cls: Class) -> bool:
    marks = (mark.func if isinstance(mark, ast.Call) else mark for mark in cls.node.decorator_list)
    return any(ast.unparse(mark).rpartition(".")[2] == "dataclass" for mark in marks)


def _fields(cls: Class) -> Signature | None:
    fields: dict[str, Parameter] = {}
    for base in bases(cls):
        inherited = None if base is None else _signature(base)
        if inherited is None:
            return None
        fields.update(inherited.parameters)
    total = not any(word.arg == "total" and getattr(word.value, "value", True) is False for word in cls.node.keywords)
    for line in cls.node.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        if ast.unparse(line.annotation).startswith(("ClassVar", "typing.ClassVar")) or _not_in_init(line.value):
            continue
        fields[line.target.id] = Parameter(line.annotation, cls.source, line.value is None and total)
    return Signature(fields)


def _not_in_init(default: ast.expr | None) -> bool:
    words = default.keywords if isinstance(default, ast.Call) and ast.unparse(default.func).endswith("field") else []
    return any(word.arg == "init" and getattr(word.value, "value", True) is False for word in words)


def _taken(function: ast.FunctionDef, source: Source, cls: Class | None) -> Signature:
    arguments = function.args
    listed = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(listed) - len(arguments.defaults)) + list(arguments.defaults)
    if cls is not None:
        listed, defaults = listed[1:], defaults[1:]  # self
    pairs: list[tuple[ast.arg, Any]] = [*zip(listed, defaults), *zip(arguments.kwonlyargs, arguments.kw_defaults)]
    own = {arg.arg: Parameter(arg.annotation, source, default is None) for arg, default in pairs}
    if (rest := arguments.kwarg) is None:
        return Signature(own)
    passed = _passed_on(function, rest.arg, source, cls)
    if passed is None:
        return Signature(own, Parameter(rest.annotation, source, False))
    return Signature({**passed.parameters, **own}, passed.others)


def _passed_on(function: ast.FunctionDef, rest: str, source: Source, cls: Class | None) -> Signature | None:
    """What a function takes as **rest and hands to one constructor, or to its base's; None where it does neither."""
    for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
        if not any(w.arg is None and isinstance(w.value, ast.Name) and w.value.id == rest for w in call.keywords):
            continue
        taken: Signature | None = None
        if cls is not None and ast.unparse(call.func) == "super().__init__":
            above = bases(cls)
            taken = None if not above or above[0] is None else _signature(above[0])
        elif isinstance(to := resolve(call.func, source), Class):
            taken = _signature(to)
        if taken is not None:
            given = [*list(taken.parameters)[: len(call.args)], *(word.arg for word in call.keywords)]
            return Signature({k: v for k, v in taken.parameters.items() if k not in given}, taken.others)
    return None
