"""Numbers from verdicts: pure functions, percentages (0-100) as the papers print them.

Accuracy has two meanings, and both are kept apart: `mean_prob`, the mean probability of the concept (what MACE and
RealEra report for objects), and `top1`, the share of images whose likeliest label is the concept. An image that was not
scored leaves the denominator and is counted beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor

from realera import paths
from realera.contracts import Prompt, Split, UserError, Verdict
from realera.evaluation.records import read_manifest, read_verdicts, verdict_file

Mode = Literal["mean_prob", "top1"]
MEASURES: Mapping[Split, str] = {
    "erase": "acc_e",  # the concept by name: lower is better
    "near": "acc_g",  # its synonyms: lower
    "keep": "acc_s",  # concepts to preserve: higher
    "associated": "acc_a",  # phrases that evoke it: lower, not part of H_o
    "unseen": "acc_u",  # words no training caption held: lower, not part of H_o
}
DRAWS, LEVEL = 2000, 95.0  # bootstrap resamples; percent of them that an interval holds


@dataclass(frozen=True)
class Estimate:
    """A percentage with its interval, the images it is of, and how many were left out as unscored. NaN where n = 0."""

    value: float
    low: float
    high: float
    n: int
    unscored: int


def h_o(acc_e: float, acc_s: float, acc_g: float) -> float:
    """Harmonic mean of efficacy, specificity and generality, 3 / (1/(100-acc_e) + 1/acc_s + 1/(100-acc_g)), in percent
    (RealEra, §4.1); 0 where one of the three is 0, NaN where one is."""
    return float(harmonic_mean(*(torch.tensor(x, dtype=torch.float64) for x in (acc_e, acc_s, acc_g))))


def harmonic_mean(acc_e: Tensor, acc_s: Tensor, acc_g: Tensor) -> Tensor:
    """`h_o` of whole tensors of percentages."""
    return 3 / (1 / (100 - acc_e) + 1 / acc_s + 1 / (100 - acc_g))


def estimates(
    prompts: Sequence[Prompt], verdicts: Sequence[Verdict], mode: Mode, generator: Generator, draws: int = DRAWS
) -> dict[str, Estimate]:
    """{acc_e, acc_s, acc_g, acc_a, acc_u, h_o: Estimate}.

    A split's accuracy is the mean over its concepts of the mean over their images, so a class with more unscored images
    counts as much as the others. Intervals: percentile bootstrap over images within each concept; H_o's resamples are
    made of the splits' own, drawn together.
    """
    found: dict[str, Estimate] = {}
    resampled: dict[str, Tensor] = {}
    for split, measure in MEASURES.items():
        by_concept: dict[str, list[float]] = {}
        for prompt, verdict in zip(prompts, verdicts):
            if prompt.split == split:
                by_concept.setdefault(prompt.concept, []).append(score(prompt, verdict, mode))
        groups = [torch.tensor(scores, dtype=torch.float64) for scores in by_concept.values()]
        scored = [g[~g.isnan()] for g in groups]
        n = sum(len(g) for g in scored)
        scored = [g for g in scored if len(g)]
        means = [resample(g, generator, draws) for g in scored]
        resampled[measure] = torch.stack(means).mean(dim=0) if means else torch.full((draws,), math.nan).double()
        value = float(torch.stack([g.mean() for g in scored]).mean()) if scored else math.nan
        found[measure] = Estimate(value, *interval(resampled[measure]), n, sum(map(len, groups)) - n)
    parts = [found[m] for m in ("acc_e", "acc_s", "acc_g")]
    found["h_o"] = Estimate(
        h_o(*(part.value for part in parts)),
        *interval(harmonic_mean(resampled["acc_e"], resampled["acc_s"], resampled["acc_g"])),
        sum(part.n for part in parts),
        sum(part.unscored for part in parts),
    )
    return found


def score(prompt: Prompt, verdict: Verdict, mode: Mode) -> float:
    """Percent; NaN where the image was not scored."""
    if math.isnan(verdict.value):
        return math.nan
    if mode == "mean_prob":
        return 100 * verdict.value
    return 100.0 * (verdict.label.lower() == prompt.concept.lower())


def resample(scores: Tensor, generator: Generator, draws: int) -> Tensor:
    """(draws,) means of as many images drawn with replacement."""
    rows = torch.randint(len(scores), (draws, len(scores)), generator=generator)
    return scores[rows].mean(dim=1)


def interval(values: Tensor) -> tuple[float, float]:
    """The ends that hold LEVEL percent of the resampled values; NaN where one of them is."""
    if values.isnan().any():
        return math.nan, math.nan
    tail = (1 - LEVEL / 100) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()
    return low, high


def by_prompt(prompts: Sequence[Prompt], verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """For each prompt text of a split: its accuracy in both modes, as drawn; None where nothing was scored."""
    groups: dict[tuple[str, str, str], list[tuple[Prompt, Verdict]]] = {}
    for prompt, verdict in zip(prompts, verdicts):
        groups.setdefault((prompt.split, prompt.text, prompt.concept), []).append((prompt, verdict))
    rows = []
    for (split, text, concept), pairs in groups.items():
        row: dict[str, Any] = {"split": split, "prompt": text, "concept": concept}
        scored = [(p, v) for p, v in pairs if not math.isnan(v.value)]
        for mode in get_args(Mode):
            row[mode] = sum(score(p, v, mode) for p, v in scored) / len(scored) if scored else None
        rows.append({**row, "n": len(scored), "unscored": len(pairs) - len(scored)})
    return rows


def summarise(
    prompts: Sequence[Prompt],
    verdicts: Sequence[Verdict],
    original: Sequence[Verdict] | None,
    protocol: Mapping[str, Any],
    seed: int = 0,
    headline: Mode = "mean_prob",
) -> dict[str, Any]:
    """The content of metrics.json: both modes for the run and for the unedited model, and the protocol. JSON-able."""

    def measured(said: Sequence[Verdict]) -> dict[str, Any]:
        modes = {mode: estimates(prompts, said, mode, Generator().manual_seed(seed)) for mode in get_args(Mode)}
        return {
            **{mode: {name: _no_nan(asdict(e)) for name, e in found.items()} for mode, found in modes.items()},
            "by_prompt": by_prompt(prompts, said),
        }

    spread = {"kind": "percentile bootstrap over images", "level": LEVEL, "draws": DRAWS, "seed": seed}
    return {
        "headline": headline,
        **measured(verdicts),
        "original": None if original is None else measured(original),
        "protocol": {**protocol, "interval": spread},
    }


def measure(run_dir: Path, judge: str, protocol: Mapping[str, Any], headline: Mode = "mean_prob") -> dict[str, Any]:
    """Reads the manifest and the judge's verdicts, writes metrics.json, returns its content.

    The unedited model's verdicts are taken along where they stand. Raises UserError where the verdicts are missing or
    are of other images than the manifest's.
    """
    prompts = [row.prompt for row in read_manifest(run_dir)]
    before = verdict_file(run_dir, judge, "original")
    said = read_verdicts(verdict_file(run_dir, judge))
    original = read_verdicts(before) if before.is_file() else None
    for verdicts in (said, original or said):
        if [v.prompt_id for v in verdicts] != [p.id for p in prompts]:
            raise UserError(f"the verdicts of {judge!r} in {run_dir} are of other images: judge the run again")
    metrics = summarise(prompts, said, original, protocol, headline=headline)
    paths.write_text(run_dir / paths.METRICS, json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return metrics


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """{"acc_e": ..., "acc_e_top1": ..., "original/acc_e": ...}: the values alone, for a logger; no unmeasured ones."""
    found: dict[str, float] = {}
    for prefix, part in (("", metrics), ("original/", metrics["original"])):
        for mode in get_args(Mode) if part else ():
            suffix = "" if mode == metrics["headline"] else f"_{mode}"
            found |= {f"{prefix}{k}{suffix}": e["value"] for k, e in part[mode].items() if e["value"] is not None}
    return found


def _no_nan(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: null."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()}
