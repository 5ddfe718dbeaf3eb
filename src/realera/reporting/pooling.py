"""The verdicts of runs, and means over many runs with resampled images and seeds."""

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
from realera.evaluation.measures import EXTRA_MODES, H_O_TERMS, MEAN_PROB, ORDER
from realera.evaluation.metrics import Estimate, Sample, clamp_resamples, measured, scored
from realera.evaluation.records import read_config, read_manifest, read_metrics, read_verdicts, verdict_file
from realera.settings.run_settings import Settings

ORIGINAL = "original"  # the original model as a system


@dataclass(frozen=True)
class RunVerdicts:
    """One run of a table: a system erased one concept (or several together) with one seed. headline, h_o_terms: from
    its task. costs: the content of costs.json, {} without that file. sources: `ManifestEntry.source` of each image, so
    that an image shared by several runs is counted once; () if the run shares no image."""

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
        """{image_key: identity of the image among all runs}."""
        own = [f"{self.system} {self.concept} {self.seed}"] * len(self.prompts)
        keys = map(image_key, self.prompts)
        return {key: (source, key) for key, source in zip(keys, self.sources or own, strict=True)}


def read_verdicts_of(run_dir: Path, judge: str) -> RunVerdicts:
    """Reads a finished run. Its system is its `label`, else its method's name.

    Raises:
        UserError: the run is not finished, or has no complete verdicts of this judge.
    """
    if not (config := read_config(run_dir)):
        raise UserError(f"{run_dir} has no {paths.CONFIG}: give folders that train or evaluate have made")
    settings = Settings(config)
    concept, seed = settings.concept, settings.seed or 0
    manifest = read_manifest(run_dir)
    prompts = [row.prompt for row in manifest]
    verdicts = read_verdicts(verdict_file(run_dir, judge))
    if [v.prompt_id for v in verdicts] != [p.id for p in prompts]:
        raise UserError(f"the verdicts of {judge!r} in {run_dir} are for other images: judge the run again")
    if concept is None:  # the task chooses its concepts
        concept = list(dict.fromkeys(p.concept for p in prompts if p.split == "erase"))
    name = concept if isinstance(concept, str) else ", ".join(map(str, concept))
    metrics = read_metrics(run_dir)
    read = metrics["headline"], metrics["h_o_terms"]
    spent, sources = costs.read(run_dir), [row.source for row in manifest]
    return RunVerdicts(settings.system, name, seed, prompts, verdicts, *read, spent, sources)


def pool(judged: Sequence[RunVerdicts], headline: Mapping[str, Mode], resamples: Resamples) -> dict[str, Estimate]:
    """One system's row: `pooled` with intervals."""
    return {name: found.estimate() for name, found in pooled(judged, headline, resamples).items()}


def pooled(judged: Sequence[RunVerdicts], headline: Mapping[str, Mode], resamples: Resamples) -> dict[str, Sample]:
    """One system's row with its resamples: {measure: Sample}, the mean over concepts of the mean over seeds. This
    includes H_o: the papers print the mean of the per-class H_o, not H_o of the mean accuracies. Runs without any
    scored image are left out and counted (`undefined`). n, unscored: numbers of images. An image shared by several runs
    (the original model's, of the same prompt and seed) is counted once.

    Images and seeds are resampled. They are crossed, because the seeds of a concept have the same prompts and noise. In
    each resample an image has the same weight in all runs, and the deviation of the resampled seeds' values from the
    mean over the runs is added. An effect of one image in one run is counted in both parts, which makes the interval
    conservative. The protocol fixes the concepts, so they are not resampled, except for `Sample.wide`: it treats them
    as a sample of all concepts, as a claim such as "better than" requires, and adds the deviation of the resampled
    concepts' values from the mean. Two systems have equal weights for the images, concepts and seeds that both have,
    even if one of them has unscored images, so the resamples' differences are paired. H_o's interval comes from its
    resamples even if the interval of one of its terms is exact.
    """
    terms = () if set(headline.values()) <= set(EXTRA_MODES) else judged[0].h_o_terms
    names = [name for name in ORDER if name != "h_o" or terms]
    each: dict[str, list[Sample]] = {name: [] for name in names}  # one per concept
    seen: dict[str, dict[tuple[str, str], bool]] = {name: {} for name in names}
    with_images: set[str] = set()  # measures with images in at least one run, scored or not
    concepts: dict[str, list[RunVerdicts]] = {}
    for run in judged:
        concepts.setdefault(run.concept, []).append(run)
    for concept, runs in concepts.items():
        read = [scored(run.prompts, run.verdicts, headline) for run in runs]
        found = [measured(images, headline, resamples, terms) for images in read]
        keys = [run_key(concept, run.seed) for run in runs]
        for name in names:
            if any(all(r[m].n + r[m].unscored for m in _parts(name, terms)) for r in found):
                with_images.add(name)
            mean = _mean([samples[name] for samples in found])
            values = torch.tensor([samples[name].value for samples in found], dtype=torch.float64)
            lost = int(values.isnan().sum())
            each[name].append(replace(mean, drawn=mean.drawn + resamples.deviations(keys, values), undefined=lost))
        for run, images in zip(runs, read):
            known = run.images
            for name, groups in images.items():
                for group in groups.values():
                    seen[name] |= {known[key]: not math.isnan(x) for key, x in zip(group.keys, group.scores)}
    row = {}
    for name in names:
        mean = _mean(each[name])
        images_of = [image for part in _parts(name, terms) for image in seen[part].items()]
        n = sum(is_scored for _, is_scored in images_of)
        trials = mean.trials * sum(not math.isnan(sample.value) for sample in each[name])
        trials = min(trials, len({key for (_, key), is_scored in images_of if is_scored}))
        lost = sum(sample.undefined for sample in each[name]) * (name in with_images)
        mode = headline.get(name)
        values = torch.tensor([sample.value for sample in each[name]], dtype=torch.float64)
        apart = resamples.deviations([concept_key(concept) for concept in concepts], values)
        wide = clamp_resamples(mean.drawn + apart, mode) if int((~values.isnan()).sum()) > 1 else None
        row[name] = Sample(mean.value, clamp_resamples(mean.drawn, mode), n, len(images_of) - n, trials, lost, wide)
    return row


def _parts(name: str, terms: Sequence[str]) -> Sequence[str]:
    return terms if name == "h_o" else (name,)


def _mean(samples: Sequence[Sample]) -> Sample:
    """The mean of the defined samples. trials: their smallest number of trials if all have the same value, else 0."""
    defined = [sample for sample in samples if not math.isnan(sample.value)]
    if not defined:
        return samples[0]
    value = sum(sample.value for sample in defined) / len(defined)
    drawn = torch.stack([sample.drawn for sample in defined]).mean(0)
    alike = all(sample.value == defined[0].value for sample in defined)
    return Sample(value, drawn, 0, 0, alike * min(sample.trials for sample in defined))


def differences(
    systems: Mapping[str, Sequence[RunVerdicts]], base: str, headline: Mapping[str, Mode], resamples: Resamples
) -> dict[str, Any]:
    """Every system's means minus the base's, paired over the concepts, seeds and images that both have. Each measure
    has its interval over seeds and images and, if there are several concepts, an interval over concepts too."""
    rows: list[dict[str, Any]] = []
    known = {(run.concept, run.seed): run for run in systems[base]}
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
    systems: Mapping[str, Sequence[RunVerdicts]], headline: Mapping[str, Mode], resamples: Resamples
) -> dict[str, dict[str, Any]]:
    """{system: {measure: {value, low, high}}}: the mean in percent of the original model's, over the concepts and seeds
    that both have, with the interval of the paired resamples' ratios. A word that draws nothing with the original model
    has nothing to erase, so a small Acc_u alone says little. Measures that are 0 for the original model are left out,
    and so is H_o, which means nothing for it. {} without the original model."""
    known = {(run.concept, run.seed): run for run in systems.get(ORIGINAL, ())}
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
