"""Tables over many runs: systems by concepts by seeds, pooled as the papers pool them, with intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Generator, Tensor

from realera import paths
from realera.contracts import Prompt, UserError, Verdict
from realera.evaluation.metrics import (
    DRAWS,
    LEVEL,
    MEASURES,
    Estimate,
    Mode,
    h_o,
    harmonic_mean,
    interval,
    resample,
    score,
)
from realera.evaluation.records import read_manifest, read_verdicts, verdict_file

MARKS = ("<!-- table -->", "<!-- end of table -->")  # what write_results fills in a README
COLUMNS = ("acc_e", "acc_s", "acc_g", "h_o", "acc_a", "acc_u")


@dataclass(frozen=True)
class Cell:
    """One run of a table: a system erased one concept from one seed."""

    system: str
    concept: str
    seed: int
    prompts: Sequence[Prompt]
    verdicts: Sequence[Verdict]


def read_cell(run_dir: Path, judge: str) -> Cell:
    """A finished run. Its system is the `label` it was started with, else its method's name.

    Raises:
        UserError: the run is not finished, or was judged by another judge.
    """
    try:
        config = yaml.safe_load((run_dir / paths.CONFIG).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{run_dir} holds no {paths.CONFIG}: name folders that train or evaluate have made") from None
    prompts = [row.prompt for row in read_manifest(run_dir)]
    verdicts = read_verdicts(verdict_file(run_dir, judge))
    if [v.prompt_id for v in verdicts] != [p.id for p in prompts]:
        raise UserError(f"the verdicts of {judge!r} in {run_dir} are of other images: judge the run again")
    concept = config["concept"]
    name = concept if isinstance(concept, str) else ", ".join(map(str, concept))
    system = config.get("label") or (config.get("method") or {}).get("name") or "original"
    return Cell(str(system), name, int(config.get("seed") or 0), prompts, verdicts)


def pool(cells: Sequence[Cell], mode: Mode, generator: Generator, draws: int = DRAWS) -> dict[str, Estimate]:
    """One system's row: {measure: Estimate}, the mean over concepts of the mean over seeds, H_o included (the papers
    print the mean of the per-class H_o, not H_o of the mean accuracies).

    Intervals: percentile bootstrap over what was drawn at random. Within each concept the seeds are drawn with
    replacement, and within each run so drawn the images of every prompt concept; the concepts are the protocol's own
    and are not resampled.
    """
    values: dict[str, list[float]] = {name: [] for name in COLUMNS}
    drawn: dict[str, list[Tensor]] = {name: [] for name in COLUMNS}
    counts = dict.fromkeys(COLUMNS, 0)
    lost = dict.fromkeys(COLUMNS, 0)
    concepts: dict[str, list[Cell]] = {}
    for cell in cells:
        concepts.setdefault(cell.concept, []).append(cell)
    for runs in concepts.values():
        points, samples = zip(*(_measures(cell, mode, generator, draws) for cell in runs))
        chosen = torch.randint(len(runs), (draws, len(runs)), generator=generator)
        for name in COLUMNS:
            values[name].append(sum(point[name] for point in points) / len(runs))
            stacked = torch.stack([sample[name] for sample in samples])  # (seeds, draws)
            drawn[name].append(stacked.gather(0, chosen.T).mean(0))
        for cell in runs:
            for name, (kept, unscored) in _counts(cell).items():
                counts[name] += kept
                lost[name] += unscored
    return {
        name: Estimate(
            sum(values[name]) / len(values[name]),
            *interval(torch.stack(drawn[name]).mean(0)),
            counts[name],
            lost[name],
        )
        for name in COLUMNS
    }


def _measures(cell: Cell, mode: Mode, generator: Generator, draws: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """A run's measures and (draws,) resamples of each."""
    point: dict[str, float] = {}
    sample: dict[str, Tensor] = {}
    for split, name in MEASURES.items():
        by_concept: dict[str, list[float]] = {}
        for prompt, verdict in zip(cell.prompts, cell.verdicts):
            value = score(prompt, verdict, mode)
            if prompt.split == split and not math.isnan(value):
                by_concept.setdefault(prompt.concept, []).append(value)
        groups = [torch.tensor(group, dtype=torch.float64) for group in by_concept.values()]
        point[name] = float(torch.stack([group.mean() for group in groups]).mean()) if groups else math.nan
        drawn = [resample(group, generator, draws) for group in groups]
        sample[name] = torch.stack(drawn).mean(0) if drawn else torch.full((draws,), math.nan, dtype=torch.float64)
    sample["h_o"] = harmonic_mean(sample["acc_e"], sample["acc_s"], sample["acc_g"])
    point["h_o"] = h_o(point["acc_e"], point["acc_s"], point["acc_g"])
    return point, sample


def _counts(cell: Cell) -> dict[str, tuple[int, int]]:
    """{measure: (scored, unscored)}."""
    found = {}
    for split, name in MEASURES.items():
        of_split = [v for p, v in zip(cell.prompts, cell.verdicts) if p.split == split]
        unscored = sum(math.isnan(v.value) for v in of_split)
        found[name] = (len(of_split) - unscored, unscored)
    parts = [found[name] for name in ("acc_e", "acc_s", "acc_g")]
    return {**found, "h_o": (sum(p[0] for p in parts), sum(p[1] for p in parts))}


def table(cells: Sequence[Cell], mode: Mode = "mean_prob", seed: int = 0) -> dict[str, Any]:
    """The content of results.json: a row per system in the order met, each with its row per concept. JSON-able."""
    systems: dict[str, list[Cell]] = {}
    for cell in cells:
        systems.setdefault(cell.system, []).append(cell)
    rows = []
    for system, runs in systems.items():
        twice = [(c.concept, c.seed) for c in runs]
        if again := next((pair for pair in twice if twice.count(pair) > 1), None):
            raise UserError(f"{system!r} has two runs of {again[0]!r} with seed {again[1]}: name each run once")
        concepts = list(dict.fromkeys(cell.concept for cell in runs))
        rows.append(
            {
                "system": system,
                "runs": len(runs),
                "seeds": sorted({cell.seed for cell in runs}),
                "mean": _plain(pool(runs, mode, Generator().manual_seed(seed))),
                "by_concept": {
                    name: _plain(pool([c for c in runs if c.concept == name], mode, Generator().manual_seed(seed)))
                    for name in concepts
                },
            }
        )
    return {
        "mode": mode,
        "interval": {
            "kind": "percentile bootstrap over seeds and images",
            "level": LEVEL,
            "draws": DRAWS,
            "seed": seed,
        },
        "rows": rows,
    }


def write_results(run_dirs: Sequence[Path], folder: Path) -> Path:
    """Writes folder/results.json over the judged runs, and the table between the MARKS of folder/README.md, if any.

    Raises:
        UserError: no run was judged, one has a twin, or they were judged by different judges.
    """
    judges = {run: _judge_of(run) for run in run_dirs if (run / paths.METRICS).is_file()}
    if len(set(judges.values())) != 1:
        raise UserError(f"a table needs runs of one judge, and these have {sorted(set(judges.values())) or 'none'}.")
    results = {"judge": next(iter(judges.values())), **table([read_cell(run, judge) for run, judge in judges.items()])}
    out = folder / "results.json"
    paths.write_text(out, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    before, start, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if start and end:
        paths.write_text(readme, f"{before}{start}\n{markdown(results)}{end}{after}")
    return out


def _judge_of(run_dir: Path) -> str:
    return str(json.loads((run_dir / paths.METRICS).read_text(encoding="utf-8"))["protocol"]["judge"]["judge"])


def _plain(row: Mapping[str, Estimate]) -> dict[str, Any]:
    found = {name: asdict(estimate) for name, estimate in row.items() if not math.isnan(estimate.value)}
    return {name: {k: round(v, 2) if isinstance(v, float) else v for k, v in e.items()} for name, e in found.items()}


def markdown(results: Mapping[str, Any], columns: Sequence[str] = COLUMNS) -> str:
    """The rows as a Markdown table: value and interval of each measure, systems in order."""
    heads = {
        "acc_e": "Acc_e ↓",
        "acc_s": "Acc_s ↑",
        "acc_g": "Acc_g ↓",
        "h_o": "H_o ↑",
        "acc_a": "Acc_a ↓",
        "acc_u": "Acc_u ↓",
    }
    lines = [f"| system | {' | '.join(heads[c] for c in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in results["rows"]:
        cells = [_cell(row["mean"].get(column)) for column in columns]
        lines.append(f"| {row['system']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(estimate: Mapping[str, float] | None) -> str:
    return f"{estimate['value']:.1f} [{estimate['low']:.1f}, {estimate['high']:.1f}]" if estimate else "–"
