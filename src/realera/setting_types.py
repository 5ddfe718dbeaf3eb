"""Types of settings: a plain type, a check of the value, and words for errors. Standard library only.

A constructor annotates its parameters with these types (`steps: TrainingSteps`). `settings/schema.py` checks the
settings by the annotations before any heavy import. For a type checker they are the plain types. Another range is
written in place: `Annotated[float, Number(0, 5)]`.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

LONGEST = 100_000  # characters of a text
LONGEST_PATH, LONGEST_NAME = 4096, 255  # bytes of a path, and of one part of it
MOST_PIXELS = 4096  # per side; larger images fit on no GPU
MOST_GUIDANCE = 1000


@dataclass(frozen=True)
class Number:
    """A number from `low` to `high`. above, below: exclude the bound itself. whole: only whole numbers. infinite: .inf
    is allowed."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    above: bool = False
    below: bool = False
    infinite: bool = False

    def fault(self, value: Any, here: bool = True) -> str | None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return "is not valid"
        if self.infinite and value == math.inf:
            return None
        if isinstance(value, float) and not math.isfinite(value):
            return "is not valid"
        if self.whole and not (isinstance(value, int) or (self.infinite and value == int(value))):
            return "is not valid"
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        return None if low and high else "is not valid"

    @property
    def words(self) -> str:
        name = "a whole number" if self.whole else "a number"
        if self.low > -math.inf and not (self.above or self.below) and self.high < math.inf:
            text = f"{name} from {_plain(self.low)} to {_plain(self.high)}"
        else:
            low = f"{'above' if self.above else 'from'} {_plain(self.low)}" if self.low > -math.inf else ""
            high = f"{'below' if self.below else 'at most'} {_plain(self.high)}" if self.high < math.inf else ""
            text = " ".join([name, ", ".join(part for part in (low, high) if part)]).strip()
        return f"{text}, or .inf" if self.infinite else text


@dataclass(frozen=True)
class Text:
    """A text. name: the words for it in errors. least: minimum number of characters, not counting blanks at the ends.
    digits: whole numbers are allowed; numbers: all numbers are allowed. template: the text must contain {} once."""

    name: str = "a text"
    least: int = 0
    digits: bool = False
    numbers: bool = False
    template: bool = False

    def fault(self, value: Any, here: bool = True) -> str | None:
        known = (int, float) if self.numbers else (int,) if self.digits else ()
        if isinstance(value, known) and not isinstance(value, bool) and abs(value) < 1e300:
            return None
        if not isinstance(value, str) or len(value.strip()) < self.least or len(value) > LONGEST:
            return "is not valid"
        if any(unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\r\t" for letter in value):
            return "contains a control character or bytes that are not UTF-8"
        if self.template and value.count("{}") != 1:
            return "must contain {} once, where the name goes"
        return None

    @property
    def words(self) -> str:
        return self.name


@dataclass(frozen=True)
class Pattern:
    """A text that the regular expression matches as a whole. name: the words for it in errors."""

    pattern: str
    name: str

    def fault(self, value: Any, here: bool = True) -> str | None:
        fits = isinstance(value, str) and re.fullmatch(self.pattern, value, re.ASCII)
        return None if fits else "is not valid"

    @property
    def words(self) -> str:
        return self.name


def typed_devices(value: Any) -> Any:
    """Parses a text of devices: "2" is 2, "0,1" is [0, 1]. Any other value is returned unchanged."""
    if not isinstance(value, str) or not re.fullmatch(r"-1|\d{1,4}(,\d{1,4})*,?", value, re.ASCII):
        return value
    return [int(number) for number in value.split(",") if number] if "," in value else int(value)


@dataclass(frozen=True)
class DeviceList:
    """The number of devices that a run uses (-1: all), or a list of device numbers."""

    most: int = 4096

    def fault(self, value: Any, here: bool = True) -> str | None:
        value = typed_devices(value)
        if isinstance(value, (list, tuple)):
            number = Number(0, self.most - 1, whole=True)
            right = all(number.fault(one) is None for one in value) and len(set(value)) == len(value) > 0
        else:
            right = value == "auto" or (type(value) is int and (value == -1 or 1 <= value <= self.most))
        return None if right else "is not valid"

    @property
    def words(self) -> str:
        return "a number of 1 or more, a list of numbers such as [0,1], or -1 (all)"


@dataclass(frozen=True)
class PathText:
    """A path. name: the words for it in errors. stands: "file" or "folder" = it must exist; "" = it need not exist.
    besides: allowed words that are not paths. numbers: a whole number other than 0 is allowed, because the code that
    reads the setting converts it to text."""

    name: str = "a path"
    stands: str = ""
    besides: Sequence[str] = ()
    numbers: bool = False

    def fault(self, value: Any, here: bool = True) -> str | None:
        if isinstance(value, bool) or not isinstance(value, (str, int, Path)):
            return "is not valid"
        text = str(value)
        if isinstance(value, int) and not (self.numbers and value):
            return f"is a number (for a path of that name type ./{text[:20]})"
        if Text(least=1).fault(text) is not None or any(letter in text for letter in "\n\r\t"):
            return "is not a path"
        names = text.encode().split(os.sep.encode())
        if len(text.encode()) > LONGEST_PATH or max(map(len, names)) > LONGEST_NAME:
            return "is too long for a path"
        if not here or text in self.besides:
            return None
        try:
            path = Path(text).expanduser()
        except RuntimeError:
            return f"starts with an unknown user name (for a path of that name type ./{text[:40]})"
        if not self.stands:
            return None
        exists = path.is_file() if self.stands == "file" else path.is_dir()
        return None if exists else f"is not a {self.stands}"

    @property
    def words(self) -> str:
        return " or ".join([self.name, *self.besides])


@dataclass(frozen=True)
class Program:
    """A program that can be run: a path, or a name on PATH."""

    name: str = "the path of a Python 3.10+"

    def fault(self, value: Any, here: bool = True) -> str | None:
        if (wrong := PathText().fault(value, here)) is not None:
            return wrong
        found = not here or shutil.which(os.path.expanduser(str(value)))
        return None if found else "is not a program that can be run"

    @property
    def words(self) -> str:
        return self.name


@dataclass(frozen=True)
class Filled:
    """Mark of a list: it must have at least one entry."""


@dataclass(frozen=True)
class WithSettings:
    """Mark of a part: `settings` (a TypedDict) are further settings in its config node, not passed to its
    constructor."""

    settings: Any


@dataclass(frozen=True)
class Tracked:
    """Mark of a TypedDict: it is a Lightning logger, or has some below it (settings/loggers.py). Settings that it does
    not list are parameters of the logger's class."""


@dataclass(frozen=True)
class UseInstead:
    """Mark of a TypedDict: {a name that is not a setting of it: the setting to use instead}."""

    names: Mapping[str, str]


def _plain(bound: float) -> str:
    if bound in (2**62, 2**63 - 1):
        return "2^62" if bound == 2**62 else "2^63 - 1"
    return f"{bound:,.0f}".replace(",", "") if abs(bound) >= 1 and bound == int(bound) else f"{bound:g}"


# --- numbers ---------------------------------------------------------------------------------------------------------

Seed = Annotated[int, Number(0, 2**63 - 1, whole=True)]
FirstSeed = Annotated[int, Number(0, 2**62, whole=True)]
"""The seed of a prompt's first image; the following images have the following seeds."""
Count = Annotated[int, Number(1, 10**6, whole=True)]
"""A number of images, points, captions or rows: at least one."""
Whole = Annotated[int, Number(0, 10**6, whole=True)]
CountOrInf = Annotated[float, Number(1, 10**6, whole=True, infinite=True)]
WholeOrInf = Annotated[float, Number(0, 10**6, whole=True, infinite=True)]
"""A number of sampled points; .inf = the exact expectation instead of samples."""
Captions = Annotated[int, Number(1, 10**9, whole=True)]
"""A number of captions, or of rows of a table."""
TrainingSteps = Annotated[int, Number(0, 10**7, whole=True)]
SamplerSteps = Annotated[int, Number(1, 1000, whole=True)]
Timestep = Annotated[int, Number(0, 999, whole=True)]
"""All supported checkpoints have 1000 training timesteps."""
Rank = Annotated[int, Number(1, 4096, whole=True)]
Pixels = Annotated[int, Number(8, MOST_PIXELS, whole=True)]
Batch = Annotated[int, Number(1, 65536, whole=True)]
Threads = Annotated[int, Number(0, 4096, whole=True)]
Port = Annotated[int, Number(0, 65535, whole=True)]

Percent = Annotated[float, Number(0, 100)]
Finite = Annotated[float, Number(-1e9, 1e9)]
Projections = Literal["values", "keys", "both"]
Positive = Annotated[float, Number(0, 1e9, above=True)]
NonNegative = Annotated[float, Number(0, 1e9)]
Share = Annotated[float, Number(0, 1)]
MapWeight = Annotated[float, Number(0, 10, above=True)]
"""The share of a map's change that is applied: W0 (I + w (M - I))."""
Cosine = Annotated[float, Number(-1, 1)]
LearningRate = Annotated[float, Number(0, 10, above=True)]
Guidance = Annotated[float, Number(0, MOST_GUIDANCE)]
"""The scale of classifier-free guidance; 1 = no guidance."""

# --- texts -----------------------------------------------------------------------------------------------------------

AnyText = Annotated[str, Text()]
Prompt = Annotated[str, Text("a text", least=1)]
Template = Annotated[str, Text("a text with {} where the name goes", template=True)]
Name = Annotated[str | int, Text("a name", digits=True)]
Label = Annotated[str, Text("a text", least=1)]
"""A text that names something."""
Word = Annotated[str, Text("a text", least=1, numbers=True)]
"""A text that may be typed as a number without quotes; the code that reads it converts it to text."""
AttackName = Annotated[str, Pattern(r"[A-Za-z0-9][\w.-]{0,63}", "a name of letters, digits, -, _ and .")]
Targets = Annotated[Sequence[Label], Filled()]
"""Names of layers or weights of the denoiser, in the form of `Backbone.add_adapter` and `unfreeze`."""
TorchDevice = Annotated[str, Pattern(r"auto|cpu|cuda(:\d{1,3})?", "auto, cpu, cuda or cuda:N")]
Devices = Annotated[Any, DeviceList()]
Strategy = Annotated[str, Pattern(r"auto|ddp(_\w+)?", "auto or ddp")]
ClassName = Annotated[str, Pattern(r"[A-Za-z_]\w*(\.\w+)+", "the dotted name of a class")]
Host = Annotated[str, Pattern(r"[\w:-]{1,63}(\.[\w:-]{1,63}){0,9}", "an address, such as 127.0.0.1")]
WandbMode = Annotated[
    str,
    Pattern(
        "online|offline|disabled|shared|run|dryrun", "online, offline, disabled or shared (WANDB_MODE, where it is set)"
    ),
]

# --- paths -----------------------------------------------------------------------------------------------------------

NewPath = Annotated[str | Path, PathText("a path", numbers=True)]
File = Annotated[str | Path, PathText("a file", "file")]
Folder = Annotated[str | Path, PathText("a folder", "folder")]
Checkpoint = Annotated[str | Path, PathText("a hub id or a diffusers folder")]
GivenMap = Annotated[str | Path, PathText("a map.safetensors, a folder with one, or latest", numbers=True)]
Run = Annotated[str, PathText("a run folder or latest", numbers=True)]
RunOrOriginal = Annotated[str, PathText("a run folder, latest or original", numbers=True)]
Sums = Annotated[str, PathText("a file that python -m realera.cache made", "file", ("everyday",))]
Vocabulary = Annotated[str, PathText("a file with one text on each line", "file", ("words", "everyday"))]
Python = Annotated[str, Program()]
