"""What the numbers are called and how they are read: the one place for names, arrows and units. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from realera.contracts import Mode, Prompt, Split, Verdict

MEASURES: Mapping[Split, str] = {
    "erase": "acc_e",  # the concept by name: lower is better
    "near": "acc_g",  # its synonyms: lower
    "keep": "acc_s",  # concepts to preserve: higher
    "associated": "acc_a",  # phrases that evoke it: lower, not part of H_o
    "unseen": "acc_u",  # words no training caption held: lower, not part of H_o
}
H_O_TERMS = ("acc_e", "acc_s", "acc_g")  # RealEra's; MACE's celebrities have the first two
MEAN_PROB: Mapping[str, Mode] = dict.fromkeys(MEASURES.values(), "mean_prob")  # as the papers print objects
ORDER = ("acc_e", "acc_s", "acc_g", "h_o", "acc_a", "acc_u")  # of the tables
NEAR: Mapping[str, str] = {  # what a task's split near is made of: other names, or whole phrases that give none
    "object": "synonym",
    "nsfw": "synonym",
    "celebrity": "phrase",
    "style": "phrase",
}
PARAPHRASE = "paraphrase"  # of any other task, and of several together
WHAT = {
    "acc_e": "by name",
    "acc_s": "the others",
    "acc_g": f"{PARAPHRASE}s",
    "h_o": "harmonic mean",
    "acc_a": "associations",
    "acc_u": "other words",
}


@dataclass(frozen=True)
class Reading:
    """symbol: of the measures so read ("Acc" in Acc_e). what: the reading in words. unit: "%" or the score's own."""

    symbol: str
    what: str
    unit: str


READINGS: Mapping[str, Reading] = {  # by contracts.Mode
    "mean_prob": Reading("Acc", "mean probability", "%"),
    "top1": Reading("Acc", "top-1", "%"),
    "score": Reading("CLIP", "CLIP score", ""),  # 100 cos of image and text
    "detected": Reading("Det", "images with a detection", "%"),
    "whole": Reading("Whole", "images that show something whole", "%"),
    "anchor": Reading("Anchor", "images that show the anchor", "%"),
    "moved": Reading("Moved", "root mean square change of an image, of the range of a pixel", "%"),
}
# What the papers do not print: whether something stands in the concept's place, and how far the others moved. A smear
# is no concept either, so Acc_e and Acc_g alone count it as a success.
BESIDE: Sequence[tuple[str, Mode]] = (("acc_e", "whole"), ("acc_e", "anchor"), ("acc_s", "moved"))
BESIDE_WHAT: Mapping[str, str] = {"whole": "something", "anchor": "the anchor", "moved": "the others"}
BESIDE_MODES: tuple[Mode, ...] = ("whole", "anchor", "moved")  # of no headline, and no H_o is made of them


def score(prompt: Prompt, verdict: Verdict, mode: Mode) -> float:
    """A verdict as `mode` reads it, in percent or the score's unit; NaN where the image was not scored."""
    if mode not in ("mean_prob", "top1"):
        said = verdict.detail.get(mode)
        return math.nan if said is None else float(said) if mode in ("score", "moved") else 100.0 * bool(said)
    if math.isnan(verdict.value):
        return math.nan
    return 100 * verdict.value if mode == "mean_prob" else 100.0 * (verdict.label.lower() == prompt.concept.lower())


def symbol(measure: str, mode: str | None) -> tuple[str, str]:
    """A measure's letter and its index: ("Acc", "e"), ("CLIP", "s"), ("Det", "g"), ("H", "o")."""
    index = measure.rpartition("_")[2]
    return ("H" if measure == "h_o" else _reading(mode).symbol), index


def what(mode: str | None) -> str:
    """A reading in words; "" for what is none (H_o of measures that are read in different ways)."""
    return READINGS[mode].what if mode is not None and mode in READINGS else ""


def near(protocol: Mapping[str, Any]) -> str:
    """What the prompts of the split near are called under this protocol, in the singular."""
    return NEAR.get(str(protocol.get("task")), PARAPHRASE)


def _reading(mode: str | None) -> Reading:
    return READINGS.get(mode or "mean_prob", READINGS["mean_prob"])


def higher(measure: str, mode: str | None = None) -> bool:
    """Whether more of it is better."""
    return mode in ("whole", "anchor") or (measure in ("acc_s", "h_o") and mode != "moved")


def head(measure: str, mode: str | None) -> str:
    """The symbol with what is wanted of it: "Acc_e ↓"."""
    return f"{'_'.join(symbol(measure, mode))} {'↑' if higher(measure, mode) else '↓'}"


def main_entry(estimate: Mapping[str, Any], mode: str) -> dict[str, Any]:
    """An estimate as `main` of metrics.json holds it. scored: percent of the images that could be scored, such as those
    with a face; None where there are none."""
    images = estimate["n"] + estimate["unscored"]
    return {**estimate, "scored": 100 * estimate["n"] / images if images else None, "mode": mode}


def mode_of(main: Mapping[str, Any], measure: str) -> str | None:
    """How `main` of metrics.json reads a measure; None where it was not measured."""
    return (main.get(measure) or {}).get("mode")


def described(modes: Iterable[str | None]) -> str:
    """The readings in words, each once: "mean probability"; "Det: images with a detection, %; CLIP: CLIP score"."""
    known = [READINGS[m] for m in dict.fromkeys(modes) if m is not None and m in READINGS]
    if len(known) == 1:
        return known[0].what
    return "; ".join(f"{r.symbol}: {r.what}{f', {r.unit}' if r.unit else ''}" for r in known)


def counted(estimate: Mapping[str, Any]) -> str:
    """How many images an estimate is of: "40", "38 + 2 unscored"."""
    return f"{estimate['n']}" + (f" + {estimate['unscored']} unscored" if estimate["unscored"] else "")


def some_unscored(metrics: Mapping[str, Any]) -> bool:
    """Whether an image could not be scored (no face, say) in the run or in the unedited model's images."""
    blocks = (metrics["main"], (metrics.get("original") or {}).get("main") or {})
    return any(e["unscored"] for block in blocks for e in block.values())


def modes(metrics: Mapping[str, Any]) -> list[str]:
    """The readings that metrics.json holds beside `main`, in their order."""
    return [mode for mode in READINGS if mode in metrics]


def extra(blocks: Mapping[str, Any]) -> list[tuple[str, Mode, Mapping[str, Any]]]:
    """(measure, mode, estimate) of `BESIDE` that {mode: {measure: estimate}} holds a number for."""
    found = [(measure, mode, (blocks.get(mode) or {}).get(measure)) for measure, mode in BESIDE]
    return [(measure, mode, said) for measure, mode, said in found if said and said["value"] is not None]


def left_out(system: str, runs: int, undefined: Mapping[str, int], headline: Mapping[str, str]) -> list[str]:
    """What is to be said under a table of a system's means over runs, of which {measure: so many} are undefined."""
    alike: dict[int, list[str]] = {}
    for measure, count in undefined.items():
        if count:
            alike.setdefault(count, []).append("_".join(symbol(measure, headline.get(measure))))
    said = []
    for count, names in alike.items():
        over = f"over {runs - count} of {runs} runs, for in the others no image could be scored"
        none = "undefined, for no image of any run could be scored"
        said.append(f"{', '.join(names)} of {system}: {over if count < runs else none}.")
    return said
