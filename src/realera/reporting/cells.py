"""Runs of a table, and what many of them measured together: means over concepts and seeds, with what was drawn at
random in them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from realera import costs, paths
from realera.contracts import Mode, Prompt, UserError, Verdict
from realera.evaluation.bootstrap import Resamples, concept_key, image_key, interval, run_key
from realera.evaluation.measures import BESIDE_MODES, H_O_TERMS, MEAN_PROB, ORDER
from realera.evaluation.metrics import Estimate, Sample, measured, scored, tidy
from realera.evaluation.records import read_config, read_manifest, read_metrics, read_verdicts, verdict_file

ORIGINAL = "original"  # the system of the unedited model


@dataclass(frozen=True)
class Cell:
    """One run of a table: a system erased one concept (or several together) from one seed. headline, h_o_terms: as
    its task has them. costs: what costs.json holds, {} where there is none. sources: what drew each image (`Row`), so
    that one that stands in several runs counts once; () of images that are this run's alone."""

    system: str
    concept: str
    seed: int
    prompts: Sequence[Prompt]
    verdicts: Sequence[Verdict]
    headline: Mapping[str, Mode] = field(default_factory=lambda: MEAN_PROB)
    h_o_terms: Sequence[str] = H_O_TERMS
    costs: Mapping[str, Any] = field(default_factory=dict)
    sources: Sequence[str] = ()

    @property
    def images(self) -> dict[str, tuple[str, str]]:
        """{image_key: what one image is, among those of all runs}."""
        own = [f"{self.system} {self.concept} {self.seed}"] * len(self.prompts)
        keys = map(image_key, self.prompts)
        return {key: (source, key) for key, source in zip(keys, self.sources or own, strict=True)}


def read_cell(run_dir: Path, judge: str) -> Cell:
    """A finished run. Its system is the `label` it was started with, else its method's name.

    Raises:
        UserError: the run is not finished, or was judged by another judge.
    """
    if not (config := read_config(run_dir)):
        raise UserError(f"{run_dir} holds no {paths.CONFIG}: name folders that train or evaluate have made")
    concept, seed = config.get("concept"), config.get("seed") or 0
    system = config.get("label") or (config.get("method") or {}).get("name") or "original"
    manifest = read_manifest(run_dir)
    prompts = [row.prompt for row in manifest]
    verdicts = read_verdicts(verdict_file(run_dir, judge))
    if [v.prompt_id for v in verdicts] != [p.id for p in prompts]:
        raise UserError(f"the verdicts of {judge!r} in {run_dir} are of other images: judge the run again")
    if concept is None:  # the task's choice
        concept = list(dict.fromkeys(p.concept for p in prompts if p.split == "erase"))
    name = concept if isinstance(concept, str) else ", ".join(map(str, concept))
    metrics = read_metrics(run_dir)
    read = metrics["headline"], metrics["h_o_terms"]
    spent, sources = costs.read(run_dir), [row.source for row in manifest]
    return Cell(str(system), name, seed, prompts, verdicts, *read, spent, sources)


def pool(cells: Sequence[Cell], headline: Mapping[str, Mode], resamples: Resamples) -> dict[str, Estimate]:
    """`pooled` with intervals: one system's row."""
    return {name: found.estimate() for name, found in pooled(cells, headline, resamples).items()}


def pooled(cells: Sequence[Cell], headline: Mapping[str, Mode], resamples: Resamples) -> dict[str, Sample]:
    """One system's row with its resamples: {measure: Sample}, the mean over concepts of the mean over seeds, H_o
    included (the papers print the mean of the per-class H_o, not H_o of the mean accuracies). Runs in which nothing
    could be scored are left out and counted (`undefined`). n, unscored: images; one that is in several runs (the
    unedited model's, of the same prompt and seed) counts once.

    Resampled is what was drawn at random: images and seeds, which are crossed, for the seeds of a concept have the same
    prompts and noise. In each resample an image has one weight in all runs, and to the mean over the runs is added how
    far the resampled seeds' values are from it. What only one image of one run shows counts in both, which is on the
    safe side. The concepts are the protocol's own and are not resampled, but for `Sample.wide`: there they are a sample
    of all concepts, which a sentence such as "better than" speaks of, and how far the resampled concepts' values are
    from the mean is added. Two systems have the same weights for the images, concepts and seeds that both have, also
    where one has unscored images, so that the resamples' differences are of pairs. H_o's interval is of its resamples,
    also where a term's is exact.
    """
    terms = () if set(headline.values()) <= set(BESIDE_MODES) else cells[0].h_o_terms
    names = [name for name in ORDER if name != "h_o" or terms]
    each: dict[str, list[Sample]] = {name: [] for name in names}  # one a concept
    seen: dict[str, dict[tuple[str, str], bool]] = {name: {} for name in names}
    asked: set[str] = set()  # what has images in a run at least, scored or not
    concepts: dict[str, list[Cell]] = {}
    for cell in cells:
        concepts.setdefault(cell.concept, []).append(cell)
    for concept, runs in concepts.items():
        read = [scored(cell.prompts, cell.verdicts, headline) for cell in runs]
        found = [measured(images, headline, resamples, terms) for images in read]
        keys = [run_key(concept, cell.seed) for cell in runs]
        for name in names:
            asked |= {name} if any(all(r[m].n + r[m].unscored for m in _parts(name, terms)) for r in found) else set()
            mean = _mean([run[name] for run in found])
            values = torch.tensor([run[name].value for run in found], dtype=torch.float64)
            lost = int(values.isnan().sum())
            each[name].append(replace(mean, drawn=mean.drawn + resamples.deviations(keys, values), undefined=lost))
        for cell, images in zip(runs, read):
            known = cell.images
            for name, groups in images.items():
                for group in groups.values():
                    seen[name] |= {known[key]: not math.isnan(x) for key, x in zip(group.keys, group.scores)}
    row = {}
    for name in names:
        mean = _mean(each[name])
        said = [image for part in _parts(name, terms) for image in seen[part].items()]
        n = sum(there for _, there in said)
        trials = mean.trials * sum(not math.isnan(sample.value) for sample in each[name])
        trials = min(trials, len({key for (_, key), there in said if there}))
        lost = sum(sample.undefined for sample in each[name]) * (name in asked)
        mode = headline.get(name)
        values = torch.tensor([sample.value for sample in each[name]], dtype=torch.float64)
        apart = resamples.deviations([concept_key(concept) for concept in concepts], values)
        wide = tidy(mean.drawn + apart, mode) if int((~values.isnan()).sum()) > 1 else None
        row[name] = Sample(mean.value, tidy(mean.drawn, mode), n, len(said) - n, trials, lost, wide)
    return row


def _parts(name: str, terms: Sequence[str]) -> Sequence[str]:
    return terms if name == "h_o" else (name,)


def _mean(samples: Sequence[Sample]) -> Sample:
    """Of those that are defined; trials: the fewest of one, where all are the same share."""
    there = [sample for sample in samples if not math.isnan(sample.value)]
    if not there:
        return samples[0]
    value = sum(sample.value for sample in there) / len(there)
    drawn = torch.stack([sample.drawn for sample in there]).mean(0)
    alike = all(sample.value == there[0].value for sample in there)
    return Sample(value, drawn, 0, 0, alike * min(sample.trials for sample in there))


def differences(
    systems: Mapping[str, Sequence[Cell]], base: str, headline: Mapping[str, Mode], resamples: Resamples
) -> dict[str, Any]:
    """Every system's means less the base's, over the concepts and seeds that both have: pairs of the same images. Each
    measure with its interval over seeds and images and, of several concepts, with the one over concepts too."""
    rows: list[dict[str, Any]] = []
    known = {(cell.concept, cell.seed): cell for cell in systems[base]}
    for system, runs in systems.items():
        both = [(known[c.concept, c.seed], c) for c in runs if (c.concept, c.seed) in known and system != base]
        if not both:
            continue
        was, now = (pooled(side, headline, resamples) for side in zip(*both))
        found: dict[str, dict[str, Any]] = {}
        for name in was:
            if not (math.isnan(was[name].value) or math.isnan(now[name].value)):
                less = {"value": now[name].value - was[name].value}
                less |= dict(zip(("low", "high"), interval(now[name].drawn - was[name].drawn)))
                found[name] = {key: round(value, 4) for key, value in less.items()}
                if (one := was[name].wide) is not None and (other := now[name].wide) is not None:
                    found[name]["over_concepts"] = [round(end, 4) for end in interval(other - one)]
        rows.append({"system": system, "pairs": len(both), "mean": found})
    return {"base": base, "rows": rows}


def relative(
    systems: Mapping[str, Sequence[Cell]], headline: Mapping[str, Mode], resamples: Resamples
) -> dict[str, dict[str, Any]]:
    """{system: {measure: {value, low, high}}}: its mean in percent of the unedited model's, over the concepts and seeds
    that both have, with the interval of the resamples' ratios, which are of pairs. A word that draws nothing on the
    unedited model is not erased, so a small Acc_u alone says little. What the unedited model has none of is left out,
    and H_o, which erasing alone can give. {} without the unedited model."""
    known = {(cell.concept, cell.seed): cell for cell in systems.get(ORIGINAL, ())}
    found: dict[str, dict[str, Any]] = {}
    for system, runs in systems.items():
        both = [(known[c.concept, c.seed], c) for c in runs if (c.concept, c.seed) in known and system != ORIGINAL]
        if not both:
            continue
        was, now = (pooled(side, headline, resamples) for side in zip(*both))
        found[system] = {}
        for name in was:
            ratio = now[name].drawn / was[name].drawn
            if (
                name != "h_o"
                and was[name].value > 0
                and not math.isnan(now[name].value)
                and bool(ratio.isfinite().all())
            ):
                ends = interval(100 * ratio)
                whole = {"value": 100 * now[name].value / was[name].value, "low": ends[0], "high": ends[1]}
                found[system][name] = {key: round(value, 4) for key, value in whole.items()}
    return found
