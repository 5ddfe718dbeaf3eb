"""Numbers from verdicts: pure functions. Percentages (0-100) as the papers print them, or a score in its own unit.

Which reading of a verdict a measure takes is the task's choice (`contracts.Mode`): accuracy, say, is either the mean
probability of the concept (what MACE and RealEra report for objects) or the share of images whose likeliest label is
the concept (celebrities). An image that was not scored leaves the denominator and is counted beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from torch import Generator, Tensor

from realera.contracts import Mode, Prompt, Split, Verdict
from realera.evaluation.counts import counts
from realera.evaluation.readings import H_O_TERMS, MEAN_PROB, MEASURES, higher, main_entry, score

DRAWS, LEVEL = 2000, 95.0  # bootstrap resamples; percent of them that an interval holds
MOST_PROMPTS = 200  # texts of a split that are listed one by one; verdicts/ holds every image of a longer one


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, the images it is of, and how many were left out as unscored. NaN where n = 0."""

    value: float
    low: float
    high: float
    n: int
    unscored: int


@dataclass(frozen=True)
class Sample:
    """A number and (draws,) bootstrap resamples of it."""

    value: float
    drawn: Tensor
    n: int
    unscored: int

    def estimate(self) -> Estimate:
        return Estimate(self.value, *interval(self.drawn), self.n, self.unscored)


def h_o(measured: Mapping[str, float], terms: Sequence[str] = H_O_TERMS) -> float:
    """Harmonic mean of efficacy, specificity and generality, 3 / (1/(100-acc_e) + 1/acc_s + 1/(100-acc_g)), in percent
    (RealEra, §4.1), or of those of them that `terms` names (MACE's celebrities: acc_e, acc_s). 0 where one of them is
    0, NaN where one is. Styles put CLIP scores in place of accuracies, as the paper does."""
    return float(harmonic_mean({term: torch.tensor(measured[term]).double() for term in terms}))


def harmonic_mean(measured: Mapping[str, Tensor]) -> Tensor:
    """`h_o` of whole tensors, one of each term."""
    wanted = [value if higher(term) else 100 - value for term, value in measured.items()]
    return len(wanted) / torch.stack([1 / value for value in wanted]).sum(dim=0)


def estimates(
    prompts: Sequence[Prompt],
    verdicts: Sequence[Verdict],
    headline: Mapping[str, Mode],
    generator: Generator,
    terms: Sequence[str] = H_O_TERMS,
    draws: int = DRAWS,
) -> dict[str, Estimate]:
    """{acc_e, acc_s, acc_g, acc_a, acc_u, and h_o where it has terms: Estimate}, each read as `headline` says."""
    return {
        name: s.estimate() for name, s in samples(prompts, verdicts, headline, generator, terms, draws=draws).items()
    }


def samples(
    prompts: Sequence[Prompt],
    verdicts: Sequence[Verdict],
    headline: Mapping[str, Mode],
    generator: Generator,
    terms: Sequence[str] = H_O_TERMS,
    known: Mapping[str, Sample] | None = None,
    draws: int = DRAWS,
) -> dict[str, Sample]:
    """`estimates` with their resamples.

    A split's number is the mean over its concepts of the mean over their images, so a class with more unscored images
    counts as much as the others. Intervals: percentile bootstrap over images within each concept; H_o's resamples are
    made of the splits' own, drawn together. known: measures that were sampled before, taken as they are.
    """
    scores: dict[str, dict[str, list[float]]] = {measure: {} for measure in MEASURES.values()}
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        measure = MEASURES[prompt.split]
        scores[measure].setdefault(prompt.concept, []).append(score(prompt, verdict, headline[measure]))
    known = known or {}
    found = {
        name: known[name] if name in known else sample(list(groups.values()), generator, draws)
        for name, groups in scores.items()
    }
    if terms:
        found["h_o"] = Sample(
            h_o({term: found[term].value for term in terms}, terms),
            harmonic_mean({term: found[term].drawn for term in terms}),
            sum(found[term].n for term in terms),
            sum(found[term].unscored for term in terms),
        )
    return found


def sample(groups: Sequence[Sequence[float]], generator: Generator, draws: int) -> Sample:
    """The mean over groups of the mean over their scores (NaN: unscored), images resampled within each group.

    Groups of one image are resampled as one group, else they would have no spread (a caption data set has one image a
    caption).
    """
    scored = [group[~group.isnan()] for group in (torch.tensor(scores, dtype=torch.float64) for scores in groups)]
    n = sum(map(len, scored))
    unscored = sum(map(len, groups)) - n
    several = [group for group in scored if len(group) > 1]
    single = torch.cat([group for group in scored if len(group) == 1] or [torch.zeros(0, dtype=torch.float64)])
    if not n:
        return Sample(math.nan, torch.full((draws,), math.nan).double(), 0, unscored)
    value = torch.stack([*(group.mean() for group in several), *single]).mean()
    drawn = [resample(group, generator, draws) for group in several]
    if len(single):
        drawn.append(len(single) * resample(single, generator, draws))
    return Sample(float(value), torch.stack(drawn).sum(dim=0) / (len(several) + len(single)), n, unscored)


def readable(verdicts: Sequence[Verdict]) -> list[Mode]:
    """The modes in which at least one verdict can be read."""
    valued = any(not math.isnan(v.value) for v in verdicts)
    detailed = {key for v in verdicts for key in ("score", "detected") if v.detail.get(key) is not None}
    return [mode for mode in get_args(Mode) if (mode in detailed if mode in ("score", "detected") else valued)]


def resample(scores: Tensor, generator: Generator, draws: int) -> Tensor:
    """(draws,) means of as many images drawn with replacement."""
    means = torch.empty(draws, dtype=scores.dtype)
    at_once = max(1, 4_000_000 // len(scores))  # a data set of 30,000 images fits into memory
    for start in range(0, draws, at_once):
        few = means[start : start + at_once]
        few[:] = scores[torch.randint(len(scores), (len(few), len(scores)), generator=generator)].mean(dim=1)
    return means


def interval(values: Tensor) -> tuple[float, float]:
    """The ends that hold LEVEL percent of the resampled values; NaN where one of them is."""
    if values.isnan().any():
        return math.nan, math.nan
    tail = (1 - LEVEL / 100) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()
    return low, high


def by_prompt(
    prompts: Sequence[Prompt], verdicts: Sequence[Verdict], modes: Sequence[Mode], headline: Mapping[str, Mode]
) -> list[dict[str, Any]]:
    """For each prompt text of a split with at most MOST_PROMPTS: each reading as drawn, None where nothing was scored;
    n, unscored: the images that could be read as the headline reads the split, and the others."""
    splits: dict[Split, dict[tuple[str, str], list[tuple[Prompt, Verdict]]]] = {}
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        splits.setdefault(prompt.split, {}).setdefault((prompt.text, prompt.concept), []).append((prompt, verdict))
    rows = []
    for split, groups in splits.items():
        for (text, concept), pairs in groups.items() if len(groups) <= MOST_PROMPTS else ():
            row: dict[str, Any] = {"split": split, "prompt": text, "concept": concept}
            scored = 0
            for mode in modes:
                values = [x for x in (score(p, v, mode) for p, v in pairs) if not math.isnan(x)]
                row[mode] = sum(values) / len(values) if values else None
                if mode == headline[MEASURES[split]]:
                    scored = len(values)
            rows.append({**row, "n": scored, "unscored": len(pairs) - scored})
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

    main: {measure: estimate, scored, mode}, each measure as the task's headline reads it, which is what tables print.
    concepts: the same for each of several erased concepts, with its own prompts and the shared ones to keep; `main`
    then holds the means over them and the H_o of these means (MACE's, for one model that erased many). One block per
    mode that the verdicts can be read in. counts: boxes by class, where a detector gave any.
    """
    modes = [m for m in get_args(Mode) if m in {*readable([*verdicts, *(original or ())]), *headline.values()}]

    def block(said: Sequence[Verdict], read: Mapping[str, Mode]) -> dict[str, Sample]:
        return samples(prompts, said, read, Generator().manual_seed(seed), terms)

    def of_concepts(said: Sequence[Verdict], kept: Sample) -> dict[str, Any]:
        names = dict.fromkeys(p.concept for p in prompts if p.split == "erase")
        found = {}
        for name in names if len(names) > 1 else ():
            rows = [i for i, p in enumerate(prompts) if p.split != "keep" and p.concept == name]
            own = [prompts[i] for i in rows], [said[i] for i in rows]
            drawn = samples(*own, headline, Generator().manual_seed(seed), terms, {"acc_s": kept})
            found[name] = _main(drawn, headline, terms)
        return {"concepts": found} if found else {}

    def measured(said: Sequence[Verdict]) -> dict[str, Any]:
        main = block(said, headline)
        return {
            "main": _main(main, headline, terms),
            **of_concepts(said, main["acc_s"]),
            **({"counts": boxes} if (boxes := counts(prompts, said)) else {}),
            **{m: {k: _plain(s) for k, s in block(said, dict.fromkeys(headline, m)).items()} for m in modes},
            "by_prompt": by_prompt(prompts, said, modes, headline),
        }

    return {
        "headline": dict(headline),
        "h_o_terms": list(terms),
        **measured(verdicts),
        "original": None if original is None else measured(original),
        "interval": {"kind": "percentile bootstrap over images", "level": LEVEL, "draws": DRAWS, "seed": seed},
    }


def _main(drawn: Mapping[str, Sample], headline: Mapping[str, Mode], terms: Sequence[str]) -> dict[str, Any]:
    of_h_o = " + ".join(dict.fromkeys(headline[term] for term in terms))
    return {name: main_entry(_plain(s), headline.get(name, of_h_o)) for name, s in drawn.items()}


def _plain(drawn: Sample) -> dict[str, Any]:
    """JSON has no NaN: null."""
    record = asdict(drawn.estimate())
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()}
