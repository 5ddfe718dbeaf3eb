"""Tables over many runs: systems by concepts by seeds, pooled as in the papers, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from realera import paths
from realera.contracts import Mode, UserError
from realera.evaluation.bootstrap import Resamples
from realera.evaluation.bootstrap import described as how
from realera.evaluation.box_counts import counts
from realera.evaluation.measures import (
    EXTRA_METRICS,
    EXTRA_MODES,
    ORDER,
    column_heading,
    described,
    extra,
    undefined_notes,
)
from realera.evaluation.metrics import Estimate, available_modes
from realera.evaluation.records import read_metrics
from realera.files import plain_data
from realera.reporting import attacked_systems, cost_words
from realera.reporting.pooling import RunVerdicts, differences, pool, read_verdicts_of, relative
from realera.reporting.table_formats import markdown as cell_text
from realera.system import disk

MARKS = ("<!-- table -->", "<!-- end of table -->")  # write_results replaces the text between them in a README


def table(judged: Sequence[RunVerdicts], seed: int = 0, base: str | None = None) -> dict[str, Any]:
    """The content of results.json, JSON-able: one row per system in the given order.

    mean, by_concept: each measure by the task's headline metric. by_mode: the mean by the other metrics that all
    verdicts have, and by those of `BESIDE` that the row's own verdicts have. of_runs: the number of (concept, seed)
    pairs of all systems, if this system lacks some. counts: boxes by class, mean over the system's runs. cost: see
    `cost_words.mean`. over_concepts: ends of the interval that also resamples the concepts. relative, differences (of
    every system from `base`): see the functions of these names. A measure that no run has is left out; it is null if no
    image could be scored. undefined: the number of runs that a mean leaves out for that reason.

    Raises:
        UserError: there are no runs, their metrics differ, or a system has two runs of a concept and seed.
    """
    if not judged:
        raise UserError("a table needs runs: give the folders of judged runs")
    headline = dict(judged[0].headline)
    if other := next((c for c in judged if (dict(c.headline), list(c.h_o_terms)) != (headline, _terms(judged))), None):
        raise UserError(
            f"a table needs runs with the same metrics, but {other.system!r} of {other.concept!r} has other metrics "
            "than the first run: give runs of one task and protocol."
        )
    readable_in = {id(run): set(available_modes(run.verdicts)) for run in judged}
    read = set.intersection(*readable_in.values()).difference(EXTRA_MODES)
    systems: dict[str, list[RunVerdicts]] = {}
    for run in judged:
        systems.setdefault(run.system, []).append(run)
    known = {(run.concept, run.seed) for run in judged}
    rows, resamples = [], Resamples(seed)
    for system, runs in systems.items():
        twice = [(c.concept, c.seed) for c in runs]
        if again := next((pair for pair in twice if twice.count(pair) > 1), None):
            raise UserError(f"{system!r} has two runs of {again[0]!r} with seed {again[1]}: give each run once")

        def row(chosen: Sequence[RunVerdicts], read: Mapping[str, Mode]) -> dict[str, Any]:
            return _plain(pool(chosen, read, resamples))

        concepts = dict.fromkeys(run.concept for run in runs)
        own = read | set.intersection(*(readable_in[id(run)] for run in runs)) & set(EXTRA_MODES)
        also = [mode for mode in get_args(Mode) if mode in own and {mode} != set(headline.values())]
        boxes, spent = mean_counts(runs), cost_words.mean([run.costs for run in runs])
        rows.append(
            {
                "system": system,
                "runs": len(runs),
                **({"of_runs": len(known)} if len(runs) < len(known) else {}),
                "seeds": sorted({run.seed for run in runs}),
                "mean": row(runs, headline),
                "by_concept": {name: row([c for c in runs if c.concept == name], headline) for name in concepts},
                "by_mode": {mode: row(runs, dict.fromkeys(headline, mode)) for mode in also},
                **({"counts": boxes} if boxes else {}),
                **({"cost": spent} if spent else {}),
            }
        )
    return {
        "headline": headline,
        "h_o_terms": _terms(judged),
        "interval": how("seeds and images", resamples),
        "rows": rows,
        **({"relative": of_original} if (of_original := relative(systems, headline, resamples)) else {}),
        **({} if base not in systems else {"differences": _differences(systems, str(base), headline, resamples)}),
    }


def _differences(
    systems: Mapping[str, Sequence[RunVerdicts]], base: str, headline: Mapping[str, Mode], resamples: Resamples
) -> dict[str, Any]:
    """`differences` by the headline metrics, and by those of `BESIDE` that all runs of a system have."""
    found = differences(systems, base, headline, resamples)
    readings = {}
    for mode in EXTRA_MODES:
        having = {
            system: runs
            for system, runs in systems.items()
            if all(mode in available_modes(run.verdicts) for run in runs)
        }
        if base in having and len(having) > 1:
            readings[mode] = differences(having, base, dict.fromkeys(headline, mode), resamples)["rows"]
    return {**found, **({"by_mode": readings} if readings else {})}


def _terms(judged: Sequence[RunVerdicts]) -> list[str]:
    return list(judged[0].h_o_terms)


def mean_counts(runs: Sequence[RunVerdicts]) -> dict[str, dict[str, float]]:
    """{split: {class: boxes per run, and "total"}}."""
    found = [counts(run.prompts, run.verdicts) for run in runs]
    means: dict[str, dict[str, float]] = {}
    for split in dict.fromkeys(split for of_run in found for split in of_run):
        boxes: dict[str, float] = {}
        for of_run in (each[split] for each in found if split in each):
            for name, count in {**of_run["classes"], **of_run["apart"], "total": of_run["total"]}.items():
                boxes[name] = boxes.get(name, 0) + count["boxes"] / len(found)
        means[split] = {name: round(value, 2) for name, value in boxes.items()}
    return means


def results_of(
    run_dirs: Sequence[Path], systems: Mapping[Path, str] | None = None, base: str | None = None
) -> dict[str, Any]:
    """The content of results.json over the judged runs and their attacks. systems: the runs to include, in order, and
    the system of each; None: all runs, by label or method. base: the system that the differences are taken from; None:
    no differences.

    Raises:
        UserError: no run was judged, a system has two runs of a concept and seed, or the runs have different judges.
    """
    judges = {run: _judge_of(run) for run in run_dirs if (run / paths.METRICS).is_file()}
    if len(set(judges.values())) != 1:
        raise UserError(f"a table needs runs of one judge, but these have {sorted(set(judges.values())) or 'none'}.")
    judge = next(iter(judges.values()))
    chosen = list(judges) if systems is None else [run for run in systems if run in judges]
    judged = [read_verdicts_of(run, judge) for run in chosen]
    if systems is not None:
        judged = [replace(each, system=systems[run]) for run, each in zip(chosen, judged)]
    results = {"judge": judge, **table(judged, base=base)}
    of_system: dict[str, list[Path]] = {}
    for run, each in zip(chosen, judged):
        of_system.setdefault(each.system, []).append(run)
    if attacks := attacked_systems.attacked_systems(of_system, base):
        results["attacks"] = attacks
    return results


def write_results(
    run_dirs: Sequence[Path], folder: Path, systems: Mapping[Path, str] | None = None, base: str | None = None
) -> Path:
    """Writes `results_of` the runs to folder/results.json and its tables to folder/README.md, see `write_tables`."""
    return write_tables(results_of(run_dirs, systems, base), folder)


def write_tables(results: Mapping[str, Any], folder: Path) -> Path:
    """Writes folder/results.json, and its tables between the MARKS of folder/README.md, if any."""
    out = folder / paths.RESULTS
    disk.write_text(out, plain_data.json_text(results, indent=1, ensure_ascii=False) + "\n")
    readme = folder / paths.README
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    before, start, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if start and end:
        disk.write_text(readme, f"{before}{start}\n{markdown(results)}{end}{after}")
    return out


def _judge_of(run_dir: Path) -> str:
    return str(read_metrics(run_dir)["protocol"]["judge"]["judge"])


def _plain(row: Mapping[str, Estimate]) -> dict[str, Any]:
    found = {}
    for name, estimate in row.items():
        numbers: dict[str, Any] = {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(estimate).items()}
        del numbers["over_concepts"]
        if estimate.over_concepts is not None:
            numbers["over_concepts"] = [round(end, 4) for end in estimate.over_concepts]
        if not estimate.undefined:
            del numbers["undefined"]
        if estimate.undefined or not math.isnan(estimate.value):
            found[name] = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in numbers.items()}
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """The rows as Markdown: value and interval of each measure, systems in order. A name is followed by its number of
    runs if other systems have more. If some images could not be scored, a column has the share that could. A line
    follows for each mean that leaves out a run. If the headline metric is a score, the same rows follow as top-1.
    Attacks, then costs come last."""
    headline = results["headline"]
    named = [{**row, "system": _name(row)} for row in results["rows"]]
    text = _table(named, "mean", headline)
    if len(set(headline.values())) > 1 or "mean_prob" not in headline.values():
        metric = described(headline.values())
        text = f"{metric[:1].upper()}{metric[1:]}.\n\n{text}"
    if headline["acc_e"] == "score" and all("top1" in row["by_mode"] for row in results["rows"]):
        rows = [{**row, "mean": row["by_mode"]["top1"]} for row in named]
        text += f"\nThe same images by top-1 (%).\n\n{_table(rows, 'mean', dict.fromkeys(headline, 'top1'))}"
    text += _beside(named) + _relative(results)
    for row in results["rows"]:
        missing = {name: e["undefined"] for name, e in row["mean"].items() if "undefined" in e}
        text += "".join(
            f"\n{line}\n" for line in undefined_notes(cell_text(str(row["system"])), row["runs"], missing, headline)
        )
    if attacks := attacked_systems.markdown(results.get("attacks", {})):
        text += f"\n{attacks}"
    spent = cost_words.markdown(named)
    return f"{text}\n{spent}" if spent else text


def _beside(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of the metrics of `BESIDE` that any row has; "" if no row has one."""
    found = [{(measure, mode): estimate for measure, mode, estimate in extra(row["by_mode"])} for row in rows]
    columns = [pair for pair in EXTRA_METRICS if any(pair in each for each in found)]
    if not columns:
        return ""
    metrics = described(mode for _, mode in columns)
    lines = [f"| system | {' | '.join(column_heading(*pair) for pair in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row, each in zip(rows, found):
        lines.append(f"| {cell_text(str(row['system']))} | {' | '.join(_cell(each.get(pair)) for pair in columns)} |")
    return f"\n{metrics[:1].upper()}{metrics[1:]}.\n\n" + "\n".join(lines) + "\n"


def _relative(results: Mapping[str, Any]) -> str:
    """A table of the means in percent of the original model's; "" without that model."""
    found = results.get("relative") or {}
    columns = [name for name in ORDER if any(name in each for each in found.values())]
    if not columns:
        return ""
    heads = " | ".join(column_heading(name, results["headline"].get(name)) for name in columns)
    lines = [f"| system | {heads} |", "|---" * (len(columns) + 1) + "|"]
    for system, each in found.items():
        lines.append(f"| {cell_text(system)} | {' | '.join(_cell(each.get(name)) for name in columns)} |")
    return "\nIn percent of the original model's value.\n\n" + "\n".join(lines) + "\n"


def _name(row: Mapping[str, Any]) -> str:
    """ "sa", or "sa (29 of 30 runs)"."""
    return f"{row['system']} ({row['runs']} of {row['of_runs']} runs)" if "of_runs" in row else str(row["system"])


def _table(rows: Sequence[Mapping[str, Any]], part: str, headline: Mapping[str, Mode]) -> str:
    columns = [name for name in ORDER if any(name in row[part] for row in rows)]
    unscored = any(row[part][name]["unscored"] for row in rows for name in row[part])
    heads = [column_heading(name, headline.get(name)) for name in columns] + ["scored, %"] * unscored
    lines = [f"| system | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for row in rows:
        cells = [_cell(row[part].get(column)) for column in columns]
        lines.append(
            f"| {cell_text(str(row['system']))} | {' | '.join([*cells, *([_scored(row[part])] * unscored)])} |"
        )
    return "\n".join(lines) + "\n"


def _scored(row: Mapping[str, Any]) -> str:
    """ "e 71, s 98": the share of the images that could be scored (with a face, for example), by measure."""
    shares = [(name, row[name]) for name in ORDER if name != "h_o" and name in row]
    return ", ".join(f"{name[-1]} {100 * e['n'] / (e['n'] + e['unscored']):.0f}" for name, e in shares)


def _cell(estimate: Mapping[str, float | None] | None) -> str:
    if estimate and estimate["value"] is None:
        return "undefined"
    return f"{estimate['value']:.1f} [{estimate['low']:.1f}, {estimate['high']:.1f}]" if estimate else "–"
