"""Numbers from verdicts: pure functions. Percentages (0-100) as the papers print them, or a score in its own unit.

Which reading of a verdict a measure takes is the task's choice (`contracts.Mode`): accuracy, say, is either the mean
probability of the concept (what MACE and RealEra report for objects) or the share of images whose likeliest label is
the concept (celebrities). An image that was not scored leaves the denominator and is counted beside it.
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
from realera.evaluation.measures import BESIDE_MODES, H_O_TERMS, MEAN_PROB, MEASURES, higher, main_entry, score

YES_OR_NO: tuple[Mode, ...] = ("top1", "detected", "whole", "anchor")  # modes in which an image is 0 or 100
MOST_PROMPTS = 200  # texts of a split that are listed one by one; verdicts/ holds every image of a longer one


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, the images it is of, and how many were left out as unscored. NaN where n = 0.
    undefined: of a mean over runs, those that it leaves out because none of their images was scored. over_concepts: of
    a mean over several concepts, the ends of the interval in which they are a sample of all concepts."""

    value: float
    low: float
    high: float
    n: int
    unscored: int
    undefined: int = 0
    over_concepts: tuple[float, float] | None = None


@dataclass(frozen=True)
class Sample:
    """A number and (draws,) bootstrap resamples of it. trials: where it is a share of images that are read as yes or
    no, and all alike, how many images; 0 otherwise. undefined: as in `Estimate`. wide: resamples in which concepts are
    drawn too; None for a single one."""

    value: float
    drawn: Tensor
    n: int
    unscored: int
    trials: int = 0
    undefined: int = 0
    wide: Tensor | None = None

    def interval(self) -> tuple[float, float]:
        """Of the resamples; the exact one where all images were read alike, for then resamples have no spread."""
        return exact(self.value, self.trials) if self.trials else interval(self.drawn)

    def estimate(self) -> Estimate:
        wide = None if self.wide is None else exact(self.value, self.trials) if self.trials else interval(self.wide)
        return Estimate(self.value, *self.interval(), self.n, self.unscored, self.undefined, wide)


@dataclass(frozen=True)
class Images:
    """What a prompt concept's images were scored, NaN: unscored; keys: `resamples.image_key` of each."""

    keys: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


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
    resamples: Resamples,
    terms: Sequence[str] = H_O_TERMS,
) -> dict[str, Estimate]:
    """{acc_e, acc_s, acc_g, acc_a, acc_u, and h_o where it has terms: Estimate}, each read as `headline` says."""
    return {name: s.estimate() for name, s in samples(prompts, verdicts, headline, resamples, terms).items()}


def samples(
    prompts: Sequence[Prompt],
    verdicts: Sequence[Verdict],
    headline: Mapping[str, Mode],
    resamples: Resamples,
    terms: Sequence[str] = H_O_TERMS,
    known: Mapping[str, Sample] | None = None,
) -> dict[str, Sample]:
    """`estimates` with their resamples. known: measures that were sampled before, taken as they are."""
    return measured(scored(prompts, verdicts, headline), headline, resamples, terms, known)


def scored(
    prompts: Sequence[Prompt], verdicts: Sequence[Verdict], headline: Mapping[str, Mode]
) -> dict[str, dict[str, Images]]:
    """{measure: {prompt concept: its images}}, each read as `headline` says."""
    found: dict[str, dict[str, Images]] = {measure: {} for measure in MEASURES.values()}
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        measure = MEASURES[prompt.split]
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
    """`samples` of images that were `scored`. H_o's resamples are made of the splits' own, drawn together, and its
    interval is theirs at the ends too: where all images of a split are read alike, that split adds nothing to it."""
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
    """A split's number over its prompt concepts, images resampled within each.

    It is the mean over concepts of the mean over their scored images, so a class with more unscored images counts as
    much as the others; in top-1 it is of all scored images, whosever they are: MACE's accuracy of celebrities, correct
    images / images with a face. Concepts with one scored image or none are resampled as one concept, else they would
    have no spread (a caption data set has one image a caption).
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
        elif pooled:  # how many of a person's images show a face is chance too
            apart = len(scores) / n * (scores - value).nan_to_num(0.0)
            drawn += resamples.deviations(keys, apart)
        else:
            drawn += resamples.deviations(keys, scores) / concepts
    if lone[0]:
        scores = torch.cat(lone[1])
        drawn += resamples.deviations(lone[0], scores) * int((~scores.isnan()).sum()) / (n if pooled else concepts)
    alike = mode in YES_OR_NO and bool((every == every[0]).all())
    least = min(len(group) for group in found if len(group))
    return Sample(float(value), tidy(drawn, mode), n, unscored, (n if pooled else concepts * least) * alike)


def tidy(drawn: Tensor, mode: Mode | None) -> Tensor:
    """Resamples within what a mode (None: H_o) can be, which those of few images may leave; without the last digits,
    which are the order of a sum and nobody's spread."""
    return (drawn if mode == "score" else drawn.clamp(0, 100)).round(decimals=9)


def readable(verdicts: Sequence[Verdict]) -> list[Mode]:
    """The modes in which at least one verdict can be read."""
    valued = any(not math.isnan(v.value) for v in verdicts)
    by_value: tuple[Mode, ...] = ("mean_prob", "top1")
    in_detail = [mode for mode in get_args(Mode) if mode not in by_value]
    detailed = {key for v in verdicts for key in in_detail if v.detail.get(key) is not None}
    return [mode for mode in get_args(Mode) if (valued if mode in by_value else mode in detailed)]


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
            count = 0
            for mode in modes:
                values = [x for x in (score(p, v, mode) for p, v in pairs) if not math.isnan(x)]
                row[mode] = sum(values) / len(values) if values else None
                if mode == headline[MEASURES[split]]:
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

    main: {measure: estimate, scored, mode}, each measure as the task's headline reads it, which is what tables print.
    concepts: the same for each of several erased concepts, with its own prompts and the shared ones to keep; `main`
    then holds the means over them (in top-1: over all their images, see `sample`) and the H_o of these (MACE's, for one
    model that erased many). One block per mode that the verdicts can be read in. counts: boxes by class, where a
    detector gave any.
    """
    modes = [m for m in get_args(Mode) if m in {*readable([*verdicts, *(original or ())]), *headline.values()}]
    resamples = Resamples(seed)

    def block(said: Sequence[Verdict], read: Mapping[str, Mode]) -> dict[str, Sample]:
        return samples(prompts, said, read, resamples, () if read["acc_e"] in BESIDE_MODES else terms)

    def of_concepts(said: Sequence[Verdict], kept: Sample) -> dict[str, Any]:
        names = dict.fromkeys(p.concept for p in prompts if p.split == "erase")
        found = {}
        for name in names if len(names) > 1 else ():
            rows = [i for i, p in enumerate(prompts) if p.split != "keep" and p.concept == name]
            own = [prompts[i] for i in rows], [said[i] for i in rows]
            drawn = samples(*own, headline, resamples, terms, {"acc_s": kept})
            found[name] = _main(drawn, headline, terms)
        return {"concepts": found} if found else {}

    def numbers(said: Sequence[Verdict]) -> dict[str, Any]:
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
        **numbers(verdicts),
        "original": None if original is None else numbers(original),
        "interval": described("images", resamples),
    }


def _main(drawn: Mapping[str, Sample], headline: Mapping[str, Mode], terms: Sequence[str]) -> dict[str, Any]:
    of_h_o = " + ".join(dict.fromkeys(headline[term] for term in terms))
    return {name: main_entry(_plain(s), headline.get(name, of_h_o)) for name, s in drawn.items()}


def _plain(drawn: Sample) -> dict[str, Any]:
    """JSON has no NaN: null. One run leaves out no run."""
    record = asdict(drawn.estimate())
    del record["undefined"], record["over_concepts"]
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()}
