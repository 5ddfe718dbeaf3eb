"""Checks settings against the constructors that take them, without importing them.

A node with a `_target_` is checked against the annotations of that class's constructor or fields. The module's source
is read and not run, because importing torch takes seconds and an error should not. The commands' own settings are
declared in command_settings.py. Values with an unknown annotation are not checked.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from realera import setting_types
from realera.contracts import UserError
from realera.settings import loggers
from realera.settings.constructors import Parameter, signature
from realera.settings.source_code import Class, Function, Source, find, lacks, lineage, resolve, value_of
from realera.settings.values import (
    BUILTINS,
    NULL,
    Anything,
    Choice,
    Kind,
    Leaf,
    ListOf,
    Look,
    MapOf,
    Misfit,
    Union,
    shown,
    unknown,
)

SETTINGS = "realera.settings.command_settings"
METHOD = "realera.contracts.Method"
LISTS = ("Sequence", "list", "List", "tuple", "Tuple", "Iterable", "Collection", "set", "Set", "frozenset")
MAPS = ("Mapping", "dict", "Dict", "MutableMapping")
WRAPPERS = ("Final", "Required", "NotRequired", "InitVar")
SPELLING = "; check the spelling, and that its library is installed (your own code: that PYTHONPATH has its folder)."
WHOLE, OPEN = Look(), Look(whole=False)


def check(config: Mapping[str, Any], command: str, look: Look = WHOLE) -> None:
    """Checks the types and ranges of a command's resolved settings.

    Raises:
        UserError: for the first wrong setting, with the words to type instead.
    """
    own = {name: value for name, value in config.items() if not isinstance(value, Mapping)}  # checked first
    _record(f"{SETTINGS}.{command.capitalize()}").check({**own, **config}, "", look)


def check_unresolved(config: Any, command: str) -> None:
    """`check` of those settings of the command itself that contain no interpolation."""
    plain = {k: v for k, v in config.items() if not isinstance(v, Mapping) and v != "???" and "${" not in str(v)}
    check(plain, command, OPEN)


def check_stored(config: Mapping[str, Any]) -> None:
    """Checks the types and ranges of a run folder's settings. Unknown and missing settings are allowed.

    Raises:
        UserError: for the first wrong setting.
    """
    if isinstance(method := config.get("method"), Mapping):  # evaluate run=original saves one without _target_
        config = {**config, "method": {"_target_": METHOD, **method}}
    bare = {name for name, value in config.items() if isinstance(value, Mapping) and not value.get("_target_")}
    named = {name: value for name, value in config.items() if name in ("trainer", "logger") or name not in bare}
    _record(f"{SETTINGS}.Train").check(named, "", Look(here=False, whole=False))


def check_search(sweeper: Mapping[str, Any]) -> None:
    """Checks the types and ranges of the settings of hydra/sweeper=search."""
    _record(f"{SETTINGS}.Search").check(sweeper, "hydra.sweeper", OPEN)


# --- groups of settings ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record(Kind):
    """Settings declared by a TypedDict, not by a constructor. instead: see `setting_types.UseInstead`."""

    parameters: Mapping[str, Parameter]
    instead: Mapping[str, str] = field(default_factory=dict)

    def say(self) -> str:
        return "its settings, as in {name: value}"

    def check(self, value: Any, at: str, look: Look) -> None:
        super().check(value, at, look)
        if look.whole and (wrong := next((name for name in value if name in self.instead), None)):
            raise UserError(f"{at}.{wrong} is not a setting: use {self.instead[wrong]}.")
        needed = [name for name, parameter in self.parameters.items() if parameter.required]
        _check_all(_kinds(self.parameters), needed, value, at, look)

    def fits(self, value: Any) -> bool:
        return isinstance(value, Mapping)


@dataclass(frozen=True)
class Trackers(Record):
    """The trackers of a run (see loggers.py): a Lightning logger with settings of ours beside it, and named ones."""

    def check(self, value: Any, at: str, look: Look) -> None:
        Kind.check(self, value, at, look)
        named = [name for name in value if loggers.is_named(value, name)]
        own = {name: one for name, one in value.items() if name not in named}
        known = _kinds(self.parameters)
        if (target := value.get("_target_")) is None or loggers.kind(target) is not loggers.WANDB:
            known = {name: known[name] for name in ("_target_", *loggers.SHARED)}
        if target is not None:
            known = {**self._constructor(own, at), **known}
        _check_all(known, (), own, at, look)
        for name in named:
            _check_all(self._constructor(value[name], f"{at}.{name}"), (), value[name], f"{at}.{name}", look)

    def _constructor(self, node: Mapping[str, Any], at: str) -> dict[str, Kind]:
        """The settings that a tracker's class takes. It needs none: the code that builds it adds the missing ones."""
        role = find(loggers.LOGGER)
        found = Part(role if isinstance(role, Class) else None).target(node, at)
        taken = None if found is None else signature(found)
        if taken is None:
            return {**dict.fromkeys(node, Anything()), **HYDRAS}
        target = str(node["_target_"])
        free = taken.others is not None and not loggers.kind(target).behind
        own = {**(dict.fromkeys(node, Anything()) if free else {}), **_kinds(loggers.parameters(target))}
        if "save_dir" in own:  # null: the run folder
            own["save_dir"] = _any_of([own["save_dir"], NULL])
        return {**own, **HYDRAS}


@dataclass(frozen=True)
class Part(Kind):
    """A node with a _target_, whose other settings are its constructor's parameters. role: the class or protocol that
    the target must have. beside: settings of the node that the constructor does not take."""

    role: Class | None = None
    beside: Record | None = None

    def say(self) -> str:
        return "settings with a _target_"

    def check(self, value: Any, at: str, look: Look) -> None:
        super().check(value, at, look)
        for name, kind in HYDRAS.items():
            if name in value:
                kind.check(value[name], f"{at}.{name}", look)
        found = self.target(value, at)
        rest = {name: one for name, one in value.items() if name not in HYDRAS}
        known = {} if self.beside is None else _kinds(self.beside.parameters)
        taken = None if found is None else signature(found)
        if taken is None:
            return _check_all(known, (), rest, at, Look(look.here, whole=False))
        any_name = {} if taken.others is None else dict.fromkeys(rest, kind_of(taken.others))
        known = {**any_name, **known, **_kinds(taken.parameters)}
        lenient = value.get("_partial_") or value.get("_args_")
        needed = [] if lenient else [name for name, one in taken.parameters.items() if one.required]
        _check_all(known, needed, rest, at, Look(look.here))

    def fits(self, value: Any) -> bool:
        return isinstance(value, Mapping)

    def target(self, node: Mapping[str, Any], at: str) -> Class | Function | None:
        """The class or function that a node names. Raises UserError."""
        target = node.get("_target_")
        if not isinstance(target, str) or not all(name.isidentifier() for name in target.split(".")):
            said = f"{at}._target_={shown(target)} is not valid" if "_target_" in node else f"{at} has no _target_"
            raise UserError(f"{said}: give the dotted name of a class, or leave the yaml's value unchanged.")
        found = find(target)
        if isinstance(found, str):
            raise UserError(f"{at}._target_={target}: {found}{SPELLING}")
        if self.role is not None and isinstance(found, Class) and (lacking := lacks(found, self.role)) is not None:
            why = f", because it has no method {lacking}" if lacking else ""
            raise Misfit(f"{at}._target_={target} cannot be used as {self.role.name}{why}: give another class.")
        return found


HYDRAS: Mapping[str, Kind] = {
    "_target_": Anything(),
    "_convert_": Choice(("none", "partial", "object", "all")),
    "_recursive_": Choice((True, False)),
    "_partial_": Choice((True, False)),
    "_args_": ListOf(Anything()),
}


def _check_all(known: Mapping[str, Kind], needed: Iterable[str], given: Mapping[str, Any], at: str, look: Look) -> None:
    """Checks that every given setting is known and valid, and that no needed one is missing."""
    dotted = {name: f"{at}.{name}" if at else str(name) for name in [*known, *given]}
    for name, value in given.items():
        if name in known:
            known[name].check(value, dotted[name], look)
        elif look.whole:
            raise unknown(dotted[name], [dotted[one] for one in known])
    for name in needed:
        if look.whole and name not in given:
            raise UserError(f"{dotted[name]} is missing: give {known[name].say()}, or leave ~{dotted[name]} out.")


def _kinds(parameters: Mapping[str, Parameter]) -> dict[str, Kind]:
    return {name: kind_of(parameter) for name, parameter in parameters.items()}


@cache
def _record(dotted: str) -> Record:
    found = find(dotted)
    taken = signature(found) if isinstance(found, Class) else None
    assert taken is not None, dotted
    return Record(taken.parameters)


# --- from annotations ------------------------------------------------------------------------------------------------


@cache
def kind_of(parameter: Parameter) -> Kind:
    """The kind of value that a parameter's annotation allows."""
    return Anything() if parameter.annotation is None else _kind(parameter.annotation, parameter.source)


def _kind(node: ast.expr, source: Source) -> Kind:
    if isinstance(node, ast.Constant):
        if node.value is None:
            return NULL
        return _kind(ast.parse(node.value, mode="eval").body, source) if isinstance(node.value, str) else Anything()
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _any_of([_kind(node.left, source), _kind(node.right, source)])
    if isinstance(node, ast.Subscript):
        return _subscripted(node, source)
    found = resolve(node, source)
    if isinstance(found, tuple):
        return _kind(*found)
    if isinstance(found, Class):
        if found.typed_dict():
            return _record_of(found)
        return Anything() if None in lineage(found) else Part(found)  # None: an unreadable base, such as Enum
    return BUILTINS.get(str(found).rpartition(".")[2], Anything())


def _subscripted(node: ast.Subscript, source: Source) -> Kind:
    found = resolve(node.value, source)
    name = str(found).rpartition(".")[2]
    inner = list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]
    if name == "Literal":
        return Choice(tuple(one.value for one in inner if isinstance(one, ast.Constant)))
    if name == "Optional":
        return _any_of([_kind(inner[0], source), NULL])
    if name == "Union":
        return _any_of([_kind(one, source) for one in inner])
    if name == "Annotated":
        return _annotated(inner[0], inner[1:], source)
    if name in LISTS:
        kept = [one for one in inner if not (isinstance(one, ast.Constant) and one.value is ...)]
        return ListOf(_any_of([_kind(one, source) for one in kept]))
    if name in MAPS and len(inner) == 2:
        return MapOf(_kind(inner[0], source), _kind(inner[1], source))
    return _kind(inner[0], source) if name in WRAPPERS else Anything()


def _annotated(plain: ast.expr, notes: list[ast.expr], source: Source) -> Kind:
    """The kind of Annotated[float, Number(0, 1)] or Annotated[Judge, WithSettings(Settings)], with marks of
    setting_types."""
    kind = _kind(plain, source)
    for note in notes:
        if not isinstance(note, ast.Call):
            continue
        called = resolve(note.func, source)
        name = called.name if isinstance(called, Class) and called.source.module == setting_types.__name__ else ""
        if name == "WithSettings":
            settings = resolve(note.args[0], source)
            beside = _record_of(settings) if isinstance(settings, Class) else None
            kind = _with_beside(kind, beside)
        elif name == "Filled":
            kind = _filled(kind)
        elif name == "Tracked" and isinstance(kind, Record):
            kind = Trackers(kind.parameters)
        elif name == "UseInstead" and isinstance(kind, Record):
            kind = replace(kind, instead=value_of(note.args[0], source))
        elif name:
            words = {word.arg: value_of(word.value, source) for word in note.keywords if word.arg}
            kind = Leaf(getattr(setting_types, name)(*(value_of(one, source) for one in note.args), **words))
    return kind


def _with_beside(kind: Kind, beside: Record | None) -> Kind:
    if isinstance(kind, Union):
        return Union(tuple(_with_beside(option, beside) for option in kind.options))
    return Part(kind.role, beside) if isinstance(kind, Part) else kind


def _filled(kind: Kind) -> Kind:
    if isinstance(kind, Union):
        return Union(tuple(_filled(option) for option in kind.options))
    return ListOf(kind.one, filled=True) if isinstance(kind, ListOf) else kind


def _record_of(found: Class) -> Record:
    taken = signature(found)
    return Record({} if taken is None else taken.parameters)


def _any_of(options: list[Kind]) -> Kind:
    flat = [one for option in options for one in (option.options if isinstance(option, Union) else [option])]
    if any(isinstance(one, Anything) for one in flat):
        return Anything()
    choices = tuple(value for one in flat if isinstance(one, Choice) and one != NULL for value in one.values)
    rest = [one for one in flat if not isinstance(one, Choice)]
    whole = [*rest, *([Choice(choices)] if choices else []), *([NULL] if NULL in flat else [])]
    return whole[0] if len(whole) == 1 else Union(tuple(whole))
