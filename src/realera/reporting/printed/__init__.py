"""The paper's printed numbers, by task, system and concept. README.md in this folder describes them."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Mapping
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
TASKS = ("object", "celebrity", "style", "nsfw")
MEAN = "mean"  # the row over all ten object classes, the only printed mean
OBJECTS = frozenset(["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"])
RIVALS = ("fmn", "ac", "spm", "uce", "sld", "esd-x", "esd-u", "sa", "rece", "mace")  # in the rows' order, by our names
OWN = "realera"  # the paper's method: its last row
NAMES: Mapping[
    str, tuple[str, ...]
] = {  # by our method names; the paper's tables of celebrities and styles have "SLD" and "ESD"
    "original": ("sdv14",),
    "realera-text": ("realera",),
    "sld": ("sld", "sldm"),
    "esd-x": ("esdx", "esd"),  # ESD's authors use this variant for styles; the paper does not name its variant
    "sa": ("sa",),
}


def printed(task: str, method: str, concept: str) -> dict[str, float]:
    """{measure: printed number} for a method (our name or the paper's) and a concept; {} if nothing is printed. nsfw:
    one row per method for any concept, with the boxes by class and acc_s, the CLIP score."""
    rows = _rows(task) if task in TASKS else {}
    names = NAMES.get(method, (_plain(method),))
    key = "" if task == "nsfw" else _plain(concept)
    return dict(next((rows[name, key] for name in names if (name, key) in rows), {}))


def same_name(label: str, method: str) -> bool:
    """Whether a run's label is its method's name or the paper's name for it, such as "SLD-M" for sld."""
    return _plain(label) in (_plain(method), *NAMES.get(method, ()))


def has_all_parts(method: str, parts: frozenset[str]) -> bool:
    """Whether a run has the parts (see `PARTS`) that the paper's own method has. True for another method."""
    return method not in ABLATED or parts == frozenset(PARTS)


def ablation(method: str, parts: frozenset[str], concept: str) -> dict[str, float]:
    """Table 3's row with these parts (see `PARTS`). The paper prints it for the automobile only; {} for other concepts
    and methods."""
    for row in _read("ablation") if method in ABLATED else ():
        has = {name for name in PARTS if row[name] == "1"}
        if has and has == parts and _plain(row["concept"]) == _plain(concept):
            return {name: float(row[name]) for name in ("acc_e", "acc_s", "acc_g", "h_o") if row[name]}
    return {}


ABLATED = ("realera", "realera-text", "realera-closed-form", "realera-no-mining", "realera-no-beyond")  # in Table 3
PARTS = ("closed_form", "noise_alignment", "neighbor_mining", "beyond_concept_reg")


@cache
def _rows(task: str) -> dict[tuple[str, str], dict[str, float]]:
    found = {}
    for row in _read(task):
        numbers = {name: float(value) for name, value in row.items() if name not in ("method", "concept") and value}
        for concept in [_plain(row["concept"])] if "concept" in row else [""]:
            found[_plain(row["method"]), concept] = numbers
    return found


def _read(name: str) -> list[dict[str, str]]:
    with (HERE / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _plain(name: str) -> str:
    """Letters and digits only, without accents: "Salvador Dalí" and "salvador-dali" become equal."""
    letters = unicodedata.normalize("NFKD", name).casefold()
    return "".join(letter for letter in letters if letter.isalnum() and letter.isascii())
