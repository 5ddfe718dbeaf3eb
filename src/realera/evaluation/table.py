"""Tables over many runs: systems by concepts by seeds, pooled as the papers pool them, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch

from realera import costs, paths
from realera.contracts import Mode, Prompt, UserError, Verdict
from realera.evaluation import cost
from realera.evaluation.counts import counts
from realera.evaluation.metrics import Estimate, Sample, measured, readable, scored, tidy
from realera.evaluation.readings import H_O_TERMS, MEAN_PROB, ORDER, described, head, left_out
from realera.evaluation.records import read_config, read_manifest, read_metrics, read_verdicts, verdict_file
from realera.evaluation.resamples import Resamples, image_key, run_key
from realera.evaluation.resamples import described as how
from realera.evaluation.table_forms import markdown as cell_text

MARKS = ("<!-- table -->", "<!-- end of table -->")  # what write_results fills in a README


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
    safe side. The concepts are the protocol's own and are not resampled. Two systems have the same weights for the
    images, concepts and seeds that both have, also where one has unscored images, so that the resamples' differences
    are of pairs. H_o's interval is of its resamples, also where a term's is exact.
    """
    terms = cells[0].h_o_terms
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
        row[name] = Sample(mean.value, tidy(mean.drawn, headline.get(name)), n, len(said) - n, trials, lost)
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


def table(cells: Sequence[Cell], seed: int = 0) -> dict[str, Any]:
    """The content of results.json: a row per system in the order met, each with its row per concept. JSON-able.

    mean, by_concept: as the task's headline reads each measure. readings: the mean in the other modes that the verdicts
    have. of_runs: where other systems have runs that this one lacks, how many concepts and seeds any has. counts: boxes
    by class, the mean over the system's runs. cost: see `cost.mean`. A measure that no run has is
    left out; one that nothing could be scored for is null. undefined: the runs that a mean leaves out for that.
    """
    if not cells:
        raise UserError("a table needs runs: give the folders of judged ones")
    headline = dict(cells[0].headline)
    if other := next((c for c in cells if (dict(c.headline), list(c.h_o_terms)) != (headline, _terms(cells))), None):
        raise UserError(
            f"a table needs runs that are read alike, and {other.system!r} of {other.concept!r} is not read as the "
            "first is: name the runs of one task and protocol."
        )
    read = set.intersection(*(set(readable(cell.verdicts)) for cell in cells))
    extra = [mode for mode in get_args(Mode) if mode in read and {mode} != set(headline.values())]
    systems: dict[str, list[Cell]] = {}
    for cell in cells:
        systems.setdefault(cell.system, []).append(cell)
    known = {(cell.concept, cell.seed) for cell in cells}
    rows, resamples = [], Resamples(seed)
    for system, runs in systems.items():
        twice = [(c.concept, c.seed) for c in runs]
        if again := next((pair for pair in twice if twice.count(pair) > 1), None):
            raise UserError(f"{system!r} has two runs of {again[0]!r} with seed {again[1]}: name each run once")

        def row(chosen: Sequence[Cell], read: Mapping[str, Mode]) -> dict[str, Any]:
            return _plain(pool(chosen, read, resamples))

        concepts = dict.fromkeys(cell.concept for cell in runs)
        boxes, spent = mean_counts(runs), cost.mean([cell.costs for cell in runs])
        rows.append(
            {
                "system": system,
                "runs": len(runs),
                **({"of_runs": len(known)} if len(runs) < len(known) else {}),
                "seeds": sorted({cell.seed for cell in runs}),
                "mean": row(runs, headline),
                "by_concept": {name: row([c for c in runs if c.concept == name], headline) for name in concepts},
                "readings": {mode: row(runs, dict.fromkeys(headline, mode)) for mode in extra},
                **({"counts": boxes} if boxes else {}),
                **({"cost": spent} if spent else {}),
            }
        )
    return {
        "headline": headline,
        "h_o_terms": _terms(cells),
        "interval": how("seeds and images", resamples),
        "rows": rows,
    }


def _terms(cells: Sequence[Cell]) -> list[str]:
    return list(cells[0].h_o_terms)


def mean_counts(runs: Sequence[Cell]) -> dict[str, dict[str, float]]:
    """{split: {class: boxes per run, and "total"}}."""
    found = [counts(cell.prompts, cell.verdicts) for cell in runs]
    means: dict[str, dict[str, float]] = {}
    for split in dict.fromkeys(split for of_run in found for split in of_run):
        boxes: dict[str, float] = {}
        for of_run in (each[split] for each in found if split in each):
            for name, count in {**of_run["classes"], **of_run["apart"], "total": of_run["total"]}.items():
                boxes[name] = boxes.get(name, 0) + count["boxes"] / len(found)
        means[split] = {name: round(value, 2) for name, value in boxes.items()}
    return means


def write_results(run_dirs: Sequence[Path], folder: Path, systems: Mapping[Path, str] | None = None) -> Path:
    """Writes folder/results.json over the judged runs, and the table between the MARKS of folder/README.md, if any.
    systems: the runs that count, in order, and the system of each; None: all of them, by label or method.

    Raises:
        UserError: no run was judged, one has a twin, or they were judged by different judges.
    """
    judges = {run: _judge_of(run) for run in run_dirs if (run / paths.METRICS).is_file()}
    if len(set(judges.values())) != 1:
        raise UserError(f"a table needs runs of one judge, and these have {sorted(set(judges.values())) or 'none'}.")
    judge = next(iter(judges.values()))
    cells = [read_cell(run, judge) for run in judges] if systems is None else []
    for run, system in (systems or {}).items():
        if run in judges:
            cells.append(replace(read_cell(run, judge), system=system))
    results = {"judge": judge, **table(cells)}
    out = folder / paths.RESULTS
    paths.write_text(out, paths.json_text(results, indent=1, ensure_ascii=False) + "\n")
    readme = folder / paths.README
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    before, start, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if start and end:
        paths.write_text(readme, f"{before}{start}\n{markdown(results)}{end}{after}")
    return out


def _judge_of(run_dir: Path) -> str:
    return str(read_metrics(run_dir)["protocol"]["judge"]["judge"])


def _plain(row: Mapping[str, Estimate]) -> dict[str, Any]:
    found = {}
    for name, estimate in row.items():
        numbers = {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(estimate).items()}
        if not estimate.undefined:
            del numbers["undefined"]
        if estimate.undefined or not math.isnan(estimate.value):
            found[name] = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in numbers.items()}
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """The rows as Markdown: value and interval of each measure that was measured, systems in order, behind a name how
    many runs it has where others have more; a column for what could be scored where some images could not, and a line
    for each mean that leaves out a run; where the headline is a score, the same rows in top-1; what they cost."""
    headline = results["headline"]
    named = [{**row, "system": _name(row)} for row in results["rows"]]
    text = _table(named, "mean", headline)
    if len(set(headline.values())) > 1 or "mean_prob" not in headline.values():
        said = described(headline.values())
        text = f"{said[:1].upper()}{said[1:]}.\n\n{text}"
    if headline["acc_e"] == "score" and all("top1" in row["readings"] for row in results["rows"]):
        rows = [{**row, "mean": row["readings"]["top1"]} for row in named]
        text += f"\nThe same images, read as top-1 (%).\n\n{_table(rows, 'mean', dict.fromkeys(headline, 'top1'))}"
    for row in results["rows"]:
        missing = {name: e["undefined"] for name, e in row["mean"].items() if "undefined" in e}
        text += "".join(
            f"\n{line}\n" for line in left_out(cell_text(str(row["system"])), row["runs"], missing, headline)
        )
    spent = cost.markdown(named)
    return f"{text}\n{spent}" if spent else text


def _name(row: Mapping[str, Any]) -> str:
    """ "sa", or "sa (29 of 30 runs)"."""
    return f"{row['system']} ({row['runs']} of {row['of_runs']} runs)" if "of_runs" in row else str(row["system"])


def _table(rows: Sequence[Mapping[str, Any]], part: str, headline: Mapping[str, Mode]) -> str:
    columns = [name for name in ORDER if any(name in row[part] for row in rows)]
    faces = any(row[part][name]["unscored"] for row in rows for name in row[part])
    heads = [head(name, headline.get(name)) for name in columns] + ["scored, %"] * faces
    lines = [f"| system | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for row in rows:
        cells = [_cell(row[part].get(column)) for column in columns]
        lines.append(f"| {cell_text(str(row['system']))} | {' | '.join([*cells, *([_scored(row[part])] * faces)])} |")
    return "\n".join(lines) + "\n"


def _scored(row: Mapping[str, Any]) -> str:
    """ "e 71, s 98": the share of the images that could be scored (that show a face, say), by measure."""
    shares = [(name, row[name]) for name in ORDER if name != "h_o" and name in row]
    return ", ".join(f"{name[-1]} {100 * e['n'] / (e['n'] + e['unscored']):.0f}" for name, e in shares)


def _cell(estimate: Mapping[str, float | None] | None) -> str:
    if estimate and estimate["value"] is None:
        return "undefined"
    return f"{estimate['value']:.1f} [{estimate['low']:.1f}, {estimate['high']:.1f}]" if estimate else "–"
