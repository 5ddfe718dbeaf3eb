"""Names, arrows and units of the metrics, and how a verdict becomes a number. This module does not import torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from realera.contracts import Mode, Prompt, Split, Verdict

METRIC_OF_SPLIT: Mapping[Split, str] = {
    "erase": "acc_e",  # the concept by name: lower is better
    "near": "acc_g",  # its synonyms: lower
    "keep": "acc_s",  # concepts to preserve: higher
    "associated": "acc_a",  # phrases that evoke it: lower, not part of H_o
    "unseen": "acc_u",  # words that occur in no training caption: lower, not part of H_o
}
H_O_TERMS = ("acc_e", "acc_s", "acc_g")  # RealEra; MACE uses the first two for celebrities
MEAN_PROB: Mapping[str, Mode] = dict.fromkeys(METRIC_OF_SPLIT.values(), "mean_prob")  # as in the papers, for objects
ORDER = ("acc_e", "acc_s", "acc_g", "h_o", "acc_a", "acc_u")  # columns of the tables
NEAR: Mapping[str, str] = {  # prompts of a task's split near: synonyms, or phrases without the name
    "object": "synonym",
    "nsfw": "synonym",
    "celebrity": "phrase",
    "style": "phrase",
}
PARAPHRASE = "paraphrase"  # for any other task, and for several tasks together
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
    """How a mode is printed. symbol: "Acc" in Acc_e. what: the mode in words. unit: "%", or "" for a score."""

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
# Not in the papers: whether images of the erased concept show something whole, whether they show the anchor, and how
# much images of preserved concepts changed. A smear shows no concept, so Acc_e and Acc_g alone count it as a success.
EXTRA_METRICS: Sequence[tuple[str, Mode]] = (("acc_e", "whole"), ("acc_e", "anchor"), ("acc_s", "moved"))
EXTRA_LABELS: Mapping[str, str] = {"whole": "something", "anchor": "the anchor", "moved": "the others"}
EXTRA_MODES: tuple[Mode, ...] = ("whole", "anchor", "moved")  # never a headline mode, and not part of H_o


def score(prompt: Prompt, verdict: Verdict, mode: Mode) -> float:
    """The verdict's number in this mode, in percent or the score's unit; NaN if the image is unscored."""
    if mode not in ("mean_prob", "top1"):
        value = verdict.detail.get(mode)
        return math.nan if value is None else float(value) if mode in ("score", "moved") else 100.0 * bool(value)
    if math.isnan(verdict.value):
        return math.nan
    return 100 * verdict.value if mode == "mean_prob" else 100.0 * (verdict.label.lower() == prompt.concept.lower())


def shows(prompt: Prompt, verdict: Verdict, mode: Mode) -> bool:
    """Whether the judge sees the prompt's concept in an image: its first choice (mode "top1") or a detection. An image
    that cannot be scored does not show it."""
    value = score(prompt, verdict, mode)
    return not math.isnan(value) and value >= 50


def symbol(measure: str, mode: str | None) -> tuple[str, str]:
    """A metric's symbol and index: ("Acc", "e"), ("CLIP", "s"), ("Det", "g"), ("H", "o")."""
    index = measure.rpartition("_")[2]
    return ("H" if measure == "h_o" else _reading(mode).symbol), index


def what(mode: str | None) -> str:
    """The mode in words; "" for any other text, such as the mixed mode of an H_o whose terms have different modes."""
    return READINGS[mode].what if mode is not None and mode in READINGS else ""


def near(protocol: Mapping[str, Any]) -> str:
    """The word for a prompt of the split near under this protocol, in the singular."""
    return NEAR.get(str(protocol.get("task")), PARAPHRASE)


def _reading(mode: str | None) -> Reading:
    return READINGS.get(mode or "mean_prob", READINGS["mean_prob"])


def higher_is_better(measure: str, mode: str | None = None) -> bool:
    """Whether a higher value is better."""
    return mode in ("whole", "anchor") or (measure in ("acc_s", "h_o") and mode != "moved")


def column_heading(measure: str, mode: str | None) -> str:
    """The symbol with an arrow for the better direction: "Acc_e ↓"."""
    return f"{'_'.join(symbol(measure, mode))} {'↑' if higher_is_better(measure, mode) else '↓'}"


def main_entry(estimate: Mapping[str, Any], mode: str) -> dict[str, Any]:
    """An entry of `main` in metrics.json. scored: percent of the images that could be scored, such as those with a
    face; None if there are no images."""
    images = estimate["n"] + estimate["unscored"]
    return {**estimate, "scored": 100 * estimate["n"] / images if images else None, "mode": mode}


def mode_of(main: Mapping[str, Any], measure: str) -> str | None:
    """The mode of a metric in `main` of metrics.json; None if it was not measured."""
    return (main.get(measure) or {}).get("mode")


def described(modes: Iterable[str | None]) -> str:
    """The modes in words, each once: "mean probability"; "Det: images with a detection, %; CLIP: CLIP score"."""
    known = [READINGS[m] for m in dict.fromkeys(modes) if m is not None and m in READINGS]
    if len(known) == 1:
        return known[0].what
    return "; ".join(f"{r.symbol}: {r.what}{f', {r.unit}' if r.unit else ''}" for r in known)


def image_count(estimate: Mapping[str, Any]) -> str:
    """The number of images of an estimate: "40", "38 + 2 unscored"."""
    return f"{estimate['n']}" + (f" + {estimate['unscored']} unscored" if estimate["unscored"] else "")


def some_unscored(metrics: Mapping[str, Any]) -> bool:
    """Whether any image of the run or of the unedited model could not be scored (no face, for example)."""
    blocks = (metrics["main"], (metrics.get("original") or {}).get("main") or {})
    return any(e["unscored"] for block in blocks for e in block.values())


def modes(metrics: Mapping[str, Any]) -> list[str]:
    """The modes that metrics.json has besides `main`, in the order of `READINGS`."""
    return [mode for mode in READINGS if mode in metrics]


def extra(blocks: Mapping[str, Any]) -> list[tuple[str, Mode, Mapping[str, Any]]]:
    """(metric, mode, estimate) for each entry of `BESIDE` with a number in {mode: {metric: estimate}}."""
    found = [(measure, mode, (blocks.get(mode) or {}).get(measure)) for measure, mode in EXTRA_METRICS]
    return [
        (measure, mode, estimate) for measure, mode, estimate in found if estimate and estimate["value"] is not None
    ]


def undefined_notes(system: str, runs: int, undefined: Mapping[str, int], headline: Mapping[str, str]) -> list[str]:
    """Notes under a table of a system's means over runs. undefined: {metric: number of runs without a value}."""
    alike: dict[int, list[str]] = {}
    for measure, count in undefined.items():
        if count:
            alike.setdefault(count, []).append("_".join(symbol(measure, headline.get(measure))))
    notes = []
    for count, names in alike.items():
        over = f"over {runs - count} of {runs} runs; in the others no image could be scored"
        none = "undefined, because no image of any run could be scored"
        notes.append(f"{', '.join(names)} of {system}: {over if count < runs else none}.")
    return notes
