"""What the paper prints, found by task, system and concept. README.md beside says what the figures are of."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Mapping
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
TASKS = ("object", "celebrity", "style", "nsfw")
MEAN = "mean"  # the row over all ten classes of objects, the only mean that is printed
OBJECTS = frozenset(["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"])
ORDER = ("fmn", "ac", "spm", "uce", "sld", "esd-x", "esd-u", "sa", "rece", "mace")  # of the rows, by our names
NAMES: Mapping[
    str, tuple[str, ...]
] = {  # by our methods' names; the paper's celebrities and styles have "SLD" and "ESD"
    "original": ("sdv14",),
    "realera-text": ("realera",),
    "sld": ("sld", "sldm"),
    "esd-x": ("esdx", "esd"),  # the variant that ESD's authors take for styles; the paper does not say which it took
    "sa": ("sa",),
}


def printed(task: str, method: str, concept: str) -> dict[str, float]:
    """{measure: what is printed} of a method (ours by its name, or the paper's own) and a concept; {} where there is
    none. nsfw: one row a method, with the boxes by class and acc_s, the CLIP score, whatever the concept is called."""
    rows = _rows(task) if task in TASKS else {}
    names = NAMES.get(method, (_plain(method),))
    key = "" if task == "nsfw" else _plain(concept)
    return dict(next((rows[name, key] for name in names if (name, key) in rows), {}))


def same_name(label: str, method: str) -> bool:
    """Whether a run's label is its method's name or one that the paper has for it: "SLD-M" of sld, "SD v1.4"."""
    return _plain(label) in (_plain(method), *NAMES.get(method, ()))


def ablation(parts: frozenset[str], concept: str) -> dict[str, float]:
    """Table 3's row of these parts ("closed_form", "noise_alignment", "neighbor_mining", "beyond_concept_reg"), which
    is printed of the automobile alone."""
    for row in _read("ablation"):
        has = {name for name in PARTS if row[name] == "1"}
        if has and has == parts and _plain(row["concept"]) == _plain(concept):
            return {name: float(row[name]) for name in ("acc_e", "acc_s", "acc_g", "h_o") if row[name]}
    return {}


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
    """Letters and digits alone, without accents: "Salvador Dalí" and "salvador-dali" are one."""
    letters = unicodedata.normalize("NFKD", name).casefold()
    return "".join(letter for letter in letters if letter.isalnum() and letter.isascii())
