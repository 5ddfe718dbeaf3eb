"""Metrics from verdicts: pure functions. Values are percentages (0-100) as in the papers, or scores in their own unit.

The task chooses the mode of each metric (`contracts.Mode`). Accuracy, for example, is either the mean probability of
the concept (MACE and RealEra for objects) or the share of images whose likeliest label is the concept (celebrities).
Unscored images are left out of the mean and counted separately.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from realera.contracts import Mode, Prompt, Split, Verdict
from realera.evaluation.bootstrap import Resamples, described, exact, image_key, interval
from realera.evaluation.box_counts import counts
from realera.evaluation.measures import (
    EXTRA_MODES,
    H_O_TERMS,
    MEAN_PROB,
    METRIC_OF_SPLIT,
    higher_is_better,
    main_entry,
    score,
)

YES_OR_NO: tuple[Mode, ...] = ("top1", "detected", "whole", "anchor")  # modes in which an image is 0 or 100
MOST_PROMPTS = 200  # a split with more texts is not listed by prompt; verdicts/ has every image


@dataclass(frozen=True)
class Estimate:
    """A value with its interval, the number n of scored images and the number of unscored images. NaN if n = 0.
    undefined: for a mean over runs, the number of runs left out because none of their images was scored. over_concepts:
    for a mean over several concepts, the interval that treats the concepts as a sample of all concepts."""

    value: float
    low: float
    high: float
    n: int
    unscored: int
    undefined: int = 0
    over_concepts: tuple[float, float] | None = None


@dataclass(frozen=True)
class Sample:
    """A value and (draws,) bootstrap resamples of it. trials: if each image counts 0 or 100 and all images are equal,
    the number of images; otherwise 0. undefined: as in `Estimate`. wide: resamples that also resample the concepts;
    None for a single concept."""

    value: float
    drawn: Tensor
    n: int
    unscored: int
    trials: int = 0
    undefined: int = 0
    wide: Tensor | None = None

    def interval(self) -> tuple[float, float]:
        """From the resamples, or exact if all images are equal, because then the resamples have no spread."""
        return exact(self.value, self.trials) if self.trials else interval(self.drawn)

    def estimate(self) -> Estimate:
        wide = None if self.wide is None else exact(self.value, self.trials) if self.trials else interval(self.wide)
        return Estimate(self.value, *self.interval(), self.n, self.unscored, self.undefined, wide)


@dataclass(frozen=True)
class Images:
    """The scores of one prompt concept's images (NaN = unscored) and their `bootstrap.image_key`s."""

    keys: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


def h_o(measured: Mapping[str, float], terms: Sequence[str] = H_O_TERMS) -> float:
    """Harmonic mean of efficacy, specificity and generality, 3 / (1/(100-acc_e) + 1/acc_s + 1/(100-acc_g)), in percent
    (RealEra, §4.1), or of the metrics in `terms` (MACE's celebrities: acc_e, acc_s). 0 if one of the three is 0, NaN if
    one is NaN. Styles use CLIP scores instead of accuracies, as the paper does."""
    return float(harmonic_mean({term: torch.tensor(measured[term]).double() for term in terms}))


def harmonic_mean(measured: Mapping[str, Tensor]) -> Tensor:
    """`h_o` for tensors, one for each term."""
    wanted = [value if higher_is_better(term) else 100 - value for term, value in measured.items()]
    return len(wanted) / torch.stack([1 / value for value in wanted]).sum(dim=0)


def estimates(
    prompts: Sequence[Prompt],
    verdicts: Sequence[Verdict],
    headline: Mapping[str, Mode],
    resamples: Resamples,
    terms: Sequence[str] = H_O_TERMS,
) -> dict[str, Estimate]:
    """{acc_e, acc_s, acc_g, acc_a, acc_u, and h_o if it has terms: Estimate}. headline: the mode of each metric."""
    return {name: s.estimate() for name, s in samples(prompts, verdicts, headline, resamples, terms).items()}


def samples(
    prompts: Sequence[Prompt],
    verdicts: Sequence[Verdict],
    headline: Mapping[str, Mode],
    resamples: Resamples,
    terms: Sequence[str] = H_O_TERMS,
    known: Mapping[str, Sample] | None = None,
) -> dict[str, Sample]:
    """As `estimates`, with the resamples. known: metrics that have a sample already; they are not resampled again."""
    return measured(scored(prompts, verdicts, headline), headline, resamples, terms, known)


def scored(
    prompts: Sequence[Prompt], verdicts: Sequence[Verdict], headline: Mapping[str, Mode]
) -> dict[str, dict[str, Images]]:
    """{metric: {prompt concept: its images}}. headline: the mode of each metric."""
    found: dict[str, dict[str, Images]] = {measure: {} for measure in METRIC_OF_SPLIT.values()}
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        measure = METRIC_OF_SPLIT[prompt.split]
        images = found[measure].setdefault(prompt.concept, Images())
        images.keys.append(image_key(prompt))
        images.scores.append(score(prompt, verdict, headline[measure]))
    return found


def measured(
    read: Mapping[str, Mapping[str, Images]],
    headline: Mapping[str, Mode],
    resamples: Resamples,
    terms: Sequence[str] = H_O_TERMS,
    known: Mapping[str, Sample] | None = None,
) -> dict[str, Sample]:
    """As `samples`, from the result of `scored`. H_o's resamples are computed from the splits' resamples, draw by draw,
    and its interval is never exact: a split whose images are all equal adds nothing to it."""
    known = known or {}
    found = {
        name: known[name] if name in known else sample(list(images.values()), resamples, headline[name])
        for name, images in read.items()
    }
    if terms:
        found["h_o"] = Sample(
            h_o({term: found[term].value for term in terms}, terms),
            harmonic_mean({term: found[term].drawn for term in terms}),
            sum(found[term].n for term in terms),
            sum(found[term].unscored for term in terms),
        )
    return found


def sample(groups: Sequence[Images], resamples: Resamples, mode: Mode) -> Sample:
    """A split's value over its prompt concepts, with images resampled within each concept.

    The value is the mean over concepts of the mean over their scored images, so a class with many unscored images has
    the same weight as the others. In top-1 it is the mean over all scored images of the split: MACE's accuracy of
    celebrities, correct images / images with a face. Concepts with fewer than two scored images are resampled together
    as one concept, because alone they have no spread (a caption data set has one image per caption).
    """
    each = [(images.keys, torch.tensor(images.scores, dtype=torch.float64)) for images in groups]
    found = [scores[~scores.isnan()] for _, scores in each]
    n = sum(map(len, found))
    unscored = sum(len(keys) for keys, _ in each) - n
    if not n:
        return Sample(math.nan, torch.full((resamples.draws,), math.nan).double(), 0, unscored)
    every = torch.cat(found)
    concepts = sum(len(group) > 0 for group in found)
    pooled = mode == "top1"
    value = every.mean() if pooled else torch.stack([group.mean() for group in found if len(group)]).mean()
    drawn = value.repeat(resamples.draws)
    lone: tuple[list[str], list[Tensor]] = [], []
    for (keys, scores), group in zip(each, found):
        if len(group) < 2:
            lone[0].extend(keys)
            lone[1].append(scores)
        elif pooled:  # the number of a person's images with a face is random too
            apart = len(scores) / n * (scores - value).nan_to_num(0.0)
            drawn += resamples.deviations(keys, apart)
        else:
            drawn += resamples.deviations(keys, scores) / concepts
    if lone[0]:
        scores = torch.cat(lone[1])
        drawn += resamples.deviations(lone[0], scores) * int((~scores.isnan()).sum()) / (n if pooled else concepts)
    alike = mode in YES_OR_NO and bool((every == every[0]).all())
    least = min(len(group) for group in found if len(group))
    return Sample(float(value), clamp_resamples(drawn, mode), n, unscored, (n if pooled else concepts * least) * alike)


def clamp_resamples(drawn: Tensor, mode: Mode | None) -> Tensor:
    """Clamps resamples to the range of the mode (None: H_o), which few images can exceed. Rounds them to 9 decimals:
    the last digits depend only on the order of summation."""
    return (drawn if mode == "score" else drawn.clamp(0, 100)).round(decimals=9)


def available_modes(verdicts: Sequence[Verdict]) -> list[Mode]:
    """The modes for which at least one verdict has a value."""
    valued = any(not math.isnan(v.value) for v in verdicts)
    by_value: tuple[Mode, ...] = ("mean_prob", "top1")
    in_detail = [mode for mode in get_args(Mode) if mode not in by_value]
    detailed = {key for v in verdicts for key in in_detail if v.detail.get(key) is not None}
    return [mode for mode in get_args(Mode) if (valued if mode in by_value else mode in detailed)]


def by_prompt(
    prompts: Sequence[Prompt], verdicts: Sequence[Verdict], modes: Sequence[Mode], headline: Mapping[str, Mode]
) -> list[dict[str, Any]]:
    """One row per prompt text, for splits of at most MOST_PROMPTS texts: the mean in each mode (None if no image is
    scored). n, unscored: the numbers of images with and without a score in the headline mode of the split."""
    splits: dict[Split, dict[tuple[str, str], list[tuple[Prompt, Verdict]]]] = {}
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        splits.setdefault(prompt.split, {}).setdefault((prompt.text, prompt.concept), []).append((prompt, verdict))
    rows = []
    for split, groups in splits.items():
        for (text, concept), pairs in groups.items() if len(groups) <= MOST_PROMPTS else ():
            row: dict[str, Any] = {"split": split, "prompt": text, "concept": concept}
            count = 0
            for mode in modes:
                values = [x for x in (score(p, v, mode) for p, v in pairs) if not math.isnan(x)]
                row[mode] = sum(values) / len(values) if values else None
                if mode == headline[METRIC_OF_SPLIT[split]]:
                    count = len(values)
            rows.append({**row, "n": count, "unscored": len(pairs) - count})
    return rows


def summarise(
    prompts: Sequence[Prompt],
    verdicts: Sequence[Verdict],
    original: Sequence[Verdict] | None,
    seed: int = 0,
    headline: Mapping[str, Mode] = MEAN_PROB,
    terms: Sequence[str] = H_O_TERMS,
) -> dict[str, Any]:
    """One judge's numbers, JSON-able, for the run and, under "original", for the unedited model.

    main: {metric: estimate, scored, mode}, in the task's headline modes; tables print these. concepts: the same for
    each of several erased concepts, from its own prompts and the shared preserved ones; `main` then has the means over
    the concepts (in top-1: over all their images, see `sample`) and the H_o of these means (as MACE does for one model
    that erased many concepts). There is one further block for each mode of the verdicts. counts: boxes by class, if the
    judge is a detector.
    """
    modes = [m for m in get_args(Mode) if m in {*available_modes([*verdicts, *(original or ())]), *headline.values()}]
    resamples = Resamples(seed)

    def block(verdicts: Sequence[Verdict], read: Mapping[str, Mode]) -> dict[str, Sample]:
        return samples(prompts, verdicts, read, resamples, () if read["acc_e"] in EXTRA_MODES else terms)

    def of_concepts(verdicts: Sequence[Verdict], kept: Sample) -> dict[str, Any]:
        names = dict.fromkeys(p.concept for p in prompts if p.split == "erase")
        found = {}
        for name in names if len(names) > 1 else ():
            rows = [i for i, p in enumerate(prompts) if p.split != "keep" and p.concept == name]
            own = [prompts[i] for i in rows], [verdicts[i] for i in rows]
            drawn = samples(*own, headline, resamples, terms, {"acc_s": kept})
            found[name] = _main(drawn, headline, terms)
        return {"concepts": found} if found else {}

    def numbers(verdicts: Sequence[Verdict]) -> dict[str, Any]:
        main = block(verdicts, headline)
        return {
            "main": _main(main, headline, terms),
            **of_concepts(verdicts, main["acc_s"]),
            **({"counts": boxes} if (boxes := counts(prompts, verdicts)) else {}),
            **{m: {k: _plain(s) for k, s in block(verdicts, dict.fromkeys(headline, m)).items()} for m in modes},
            "by_prompt": by_prompt(prompts, verdicts, modes, headline),
        }

    return {
        "headline": dict(headline),
        "h_o_terms": list(terms),
        **numbers(verdicts),
        "original": None if original is None else numbers(original),
        "interval": described("images", resamples),
    }


def _main(drawn: Mapping[str, Sample], headline: Mapping[str, Mode], terms: Sequence[str]) -> dict[str, Any]:
    of_h_o = " + ".join(dict.fromkeys(headline[term] for term in terms))
    return {name: main_entry(_plain(s), headline.get(name, of_h_o)) for name, s in drawn.items()}


def _plain(drawn: Sample) -> dict[str, Any]:
    """NaN becomes None, because JSON has no NaN. Fields that only means over runs have are removed."""
    record = asdict(drawn.estimate())
    del record["undefined"], record["over_concepts"]
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()}
