"""Reads the parameters of constructors and functions from source code."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from realera.settings.source_code import Class, Function, Source, is_altered, mark_of, named, resolution, resolve


@dataclass(frozen=True)
class Parameter:
    """A parameter of a constructor. annotation: None if it has none."""

    annotation: ast.expr | None
    source: Source = field(repr=False)
    required: bool


@dataclass(frozen=True)
class Signature:
    """All parameters of a constructor. others: its **kwargs, if it takes other names too."""

    parameters: Mapping[str, Parameter]
    others: Parameter | None = None


def signature(found: Class | Function) -> Signature | None:
    """The parameters of a constructor or a function. None if they cannot be read, because a base or a decorator may
    change them, or because of a __new__; then nothing is checked."""
    if isinstance(found, Function):
        return None if is_altered(found.node) else _parameters_of(found.node, found.source, None)
    return _signature(found)


@cache
def _signature(cls: Class) -> Signature | None:
    if cls.typed_dict():
        return _fields(cls)
    return _first_constructor(resolution(cls))


def _first_constructor(order: Iterable[Class | None]) -> Signature | None:
    """The parameters of the first constructor among classes in resolution order."""
    for cls in order:
        if cls is None or is_altered(cls.node):
            return None
        own = {method.name: method for method in cls.node.body if isinstance(method, ast.FunctionDef)}
        if "__new__" in own or any(word.arg == "metaclass" and not _is_abc(word.value) for word in cls.node.keywords):
            return None
        if (method := own.get("__init__")) is not None:
            return None if is_altered(method) else _parameters_of(method, cls.source, cls)
        if named(cls, "NamedTuple") or _has_generated_init(cls):
            return _fields(cls)
    return Signature({})


def _is_abc(metaclass: ast.expr) -> bool:
    return ast.unparse(metaclass).rpartition(".")[2] == "ABCMeta"


def _has_generated_init(cls: Class) -> bool:
    marks = [mark for mark in cls.node.decorator_list if mark_of(mark) == "dataclass"]
    words = [word for mark in marks if isinstance(mark, ast.Call) for word in mark.keywords]
    return bool(marks) and not any(word.arg == "init" and getattr(word.value, "value", True) is False for word in words)


def _fields(cls: Class) -> Signature | None:
    """The fields of the class and of its bases."""
    fields: dict[str, Parameter] = {}
    for one in reversed(list(resolution(cls))):
        if one is None:
            return None
        if cls.typed_dict() or named(one, "NamedTuple") or any(map(_is_dataclass, one.node.decorator_list)):
            fields.update(_own_fields(one))
    return Signature(fields)


def _is_dataclass(mark: ast.expr) -> bool:
    return mark_of(mark) == "dataclass"


def _own_fields(cls: Class) -> dict[str, Parameter]:
    fields: dict[str, Parameter] = {}
    total = not any(word.arg == "total" and getattr(word.value, "value", True) is False for word in cls.node.keywords)
    for line in cls.node.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        annotation = ast.unparse(line.annotation).strip("'\"").removeprefix("typing.")
        if annotation.startswith("ClassVar") or annotation.endswith("KW_ONLY") or _not_in_init(line.value):
            continue
        fields[line.target.id] = Parameter(line.annotation, cls.source, line.value is None and total)
    return fields


def _not_in_init(default: ast.expr | None) -> bool:
    words = default.keywords if isinstance(default, ast.Call) and ast.unparse(default.func).endswith("field") else []
    return any(word.arg == "init" and getattr(word.value, "value", True) is False for word in words)


def _parameters_of(function: ast.FunctionDef, source: Source, cls: Class | None) -> Signature:
    arguments = function.args
    listed = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(listed) - len(arguments.defaults)) + list(arguments.defaults)
    if cls is not None:
        listed, defaults = listed[1:], defaults[1:]  # self
    pairs: list[tuple[ast.arg, Any]] = [*zip(listed, defaults), *zip(arguments.kwonlyargs, arguments.kw_defaults)]
    own = {arg.arg: Parameter(arg.annotation, source, default is None) for arg, default in pairs}
    if (rest := arguments.kwarg) is None:
        return Signature(own)
    passed = _behind_kwargs(function, rest.arg, source, cls)
    if passed is None:
        return Signature(own, Parameter(rest.annotation, source, False))
    return Signature({**passed.parameters, **own}, passed.others)


def _behind_kwargs(function: ast.FunctionDef, rest: str, source: Source, cls: Class | None) -> Signature | None:
    """The parameters of the constructor that a function passes its **rest to, such as super().__init__(**rest). None if
    there is no such call, or if that constructor cannot be read."""
    for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
        if not any(w.arg is None and isinstance(w.value, ast.Name) and w.value.id == rest for w in call.keywords):
            continue
        taken: Signature | None = None
        if cls is not None and ast.unparse(call.func) == "super().__init__":
            above = list(resolution(cls))[1:]
            taken = _first_constructor(above) if above else None
        elif isinstance(to := resolve(call.func, source), Class):
            taken = _signature(to)
        if taken is not None:
            given = [*list(taken.parameters)[: len(call.args)], *(word.arg for word in call.keywords)]
            return Signature({k: v for k, v in taken.parameters.items() if k not in given}, taken.others)
    return None
