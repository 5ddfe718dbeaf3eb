"""The kinds of a setting's value: a single value, a choice, a list, or a mapping with free names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from realera import setting_types
from realera.contracts import UserError
from realera.settings import error_sentences

SHORT = 80  # most characters of a value in an error sentence


class Misfit(UserError):
    """A part has another role than the setting needs."""


@dataclass(frozen=True)
class Look:
    """The strictness of a check. here: files and folders must exist on this machine. whole: no setting may be missing
    or unknown."""

    here: bool = True
    whole: bool = True


class Kind:
    """A kind of value. check: raises UserError for a wrong value; `at` is the setting's dotted name. fits: whether the
    value has the right form, so that errors inside it are worth reporting. say: describes the values of this kind."""

    def say(self) -> str:
        return "something else"

    def check(self, value: Any, at: str, look: Look) -> None:
        if not self.fits(value):
            self.refuse(value, at)

    def fits(self, value: Any) -> bool:
        return True

    def refuse(self, value: Any, at: str, fault: str = "is not valid", known: Sequence[Any] = ()) -> None:
        texts = [word for word in known if isinstance(word, str)]
        meant = error_sentences.did_you_mean(value, texts) if isinstance(value, str) else ""
        quoted = ""
        if fault == "is not valid" and isinstance(value, (bool, int, float)) and self.fits("text"):
            typed = f'"{shown(value)}"'
            quoted = "; as a text it needs quotes: " + (typed if at.endswith("]") else f"{at}='{typed}'")
        raise UserError(f"{at}={shown(value)} {fault}{meant or ':'} give {self.say()}{quoted}.")


class Anything(Kind):
    """Any value: used if there is no annotation, or none that is understood."""


@dataclass(frozen=True)
class Leaf(Kind):
    """A single value, checked by a mark of setting_types.py."""

    kind: Any

    def say(self) -> str:
        return str(self.kind.words)

    def check(self, value: Any, at: str, look: Look) -> None:
        if (fault := self.kind.fault(value, look.here)) is not None:
            self.refuse(value, at, fault)

    def fits(self, value: Any) -> bool:
        return self.kind.fault(value, False) is None


@dataclass(frozen=True)
class Choice(Kind):
    """One of a few given values."""

    values: tuple[Any, ...]

    def say(self) -> str:
        *others, last = [shown(value) for value in self.values]
        return f"{', '.join(others)} or {last}" if others else last

    def check(self, value: Any, at: str, look: Look) -> None:
        if not self.fits(value):
            self.refuse(value, at, known=self.values)

    def fits(self, value: Any) -> bool:
        return any(type(value) is type(one) and value == one for one in self.values)


NULL = Choice((None,))


@dataclass(frozen=True)
class Union(Kind):
    """Any of several kinds. If a value has the form of one of them, that kind's error is raised."""

    options: tuple[Kind, ...]

    def say(self) -> str:
        return " or ".join(dict.fromkeys(option.say() for option in self.options))

    def check(self, value: Any, at: str, look: Look) -> None:
        met: list[UserError] = []
        for option in (option for option in self.options if option.fits(value)):
            try:
                option.check(value, at, look)
                return
            except UserError as error:
                met.append(error)
        if met:
            raise next((error for error in met if not isinstance(error, Misfit)), met[0])
        known = [one for option in self.options if isinstance(option, Choice) for one in option.values]
        faults = [option.kind.fault(value, False) for option in self.options if isinstance(option, Leaf)]
        said = next((fault for fault in faults if fault and fault != "is not valid"), "is not valid")
        self.refuse(value, at, said, known)

    def fits(self, value: Any) -> bool:
        return any(option.fits(value) for option in self.options)


@dataclass(frozen=True)
class ListOf(Kind):
    """A list whose entries are all of one kind. filled: the list must not be empty."""

    one: Kind
    filled: bool = False

    def say(self) -> str:
        return "a list" if isinstance(self.one, Anything) else f"a list in which each entry is {self.one.say()}"

    def check(self, value: Any, at: str, look: Look) -> None:
        super().check(value, at, look)
        if self.filled and not value:
            self.refuse(value, at, "is empty")
        for number, entry in enumerate(value):
            self.one.check(entry, f"{at}[{number}]", look)

    def fits(self, value: Any) -> bool:
        return isinstance(value, (list, tuple))


@dataclass(frozen=True)
class MapOf(Kind):
    """A mapping with names of one kind and values of another."""

    key: Kind
    one: Kind

    def say(self) -> str:
        return "settings, as in {name: value}"

    def check(self, value: Any, at: str, look: Look) -> None:
        super().check(value, at, look)
        for name, entry in value.items():
            if not self.key.fits(name):
                known = self.key.values if isinstance(self.key, Choice) else ()
                raise unknown(f"{at}.{name}", [f"{at}.{one}" for one in known])
            self.one.check(entry, f"{at}.{name}", look)

    def fits(self, value: Any) -> bool:
        return isinstance(value, Mapping)


def unknown(name: str, known: list[str]) -> UserError:
    """The error for a setting that does not exist."""
    same_end = [one for one in known if one.rpartition(".")[2] == name.rpartition(".")[2]]
    meant = error_sentences.did_you_mean(name, same_end) or error_sentences.did_you_mean(name, known)
    return UserError(f"there is no setting '{name}'{meant or '; --help lists them.'}")


def shown(value: Any) -> str:
    """A value as a user types it, shortened if it is long."""
    plain = isinstance(value, str) and value.strip() == value != "" and value.isprintable()
    text = value if plain else json.dumps(value, ensure_ascii=True, default=str)
    text = {"NaN": "nan", "Infinity": ".inf", "-Infinity": "-.inf"}.get(text, text)
    return text if len(text) <= SHORT else f"{text[: SHORT - 3]}..."


BUILTINS: Mapping[str, Kind] = {
    "int": Leaf(setting_types.Number(whole=True)),
    "float": Leaf(setting_types.Number()),
    "str": Leaf(setting_types.Text()),
    "bool": Choice((True, False)),
    "list": ListOf(Anything()),
    "tuple": ListOf(Anything()),
    "dict": MapOf(Anything(), Anything()),
    "Path": Leaf(setting_types.PathText()),
}
