"""Texts and tables for the cost of erasing (costs.json). Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from realera import costs
from realera.reporting.table_formats import markdown as cell_text

COLUMNS: Mapping[str, str] = {  # of costs.totals
    "seconds": "seconds to erase",
    "passes": "passes to erase",
    "passes_per_image": "passes per image",
    "trained_parameters": "trained parameters",
    "memory_mb": "peak memory, MB",
}
LABELS: Mapping[str, str] = {
    "seconds": "to erase",
    "passes": "denoiser passes to erase",
    "passes_per_image": "denoiser passes per image",
    "trained_parameters": "trained parameters",
    "edited_parameters": "parameters edited in closed form",
    "memory_mb": "MB peak memory while erasing",
}
STAGES: Mapping[str, str] = {
    "load": "loading the model",
    "text": "encoding the training prompts",
    "edit": "mining and closed form",
    "latents": "preparing training latents",
    "train": "training",
    "finish": "final edit and saving",
    "draw": "drawing",
    "judge": "judging",
}
ERASING = ("seconds", "passes")  # totals that include cached inputs
# The mean over the cells of a sweep includes this extra cost.
WARM_UP_NOTE = "The first cell of each process also includes encoding and warm-up."


def mean(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over runs of each of costs.totals, over the runs that have it. runs: number of runs with any total;
    at_least: whether a run used a cached input of unknown cost; devices. {} if no run has a total."""
    known = [record for record in records if costs.totals(record)]
    if not known:
        return {}
    totals = [costs.totals(record) for record in known]
    found: dict[str, Any] = {"runs": len(known)}
    for name in dict.fromkeys(name for of_run in totals for name in of_run):
        values = [of_run[name] for of_run in totals if name in of_run]
        found[name] = round(sum(values) / len(values), 2)
    devices = list(dict.fromkeys(str(record["device"]) for record in known if record.get("device")))
    return {**found, "at_least": any(map(costs.at_least, known)), "devices": devices}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of the rows of results.json (`system`, and `cost` as returned by `mean`) below a line that explains it;
    "" if no row has costs."""
    known = [row.get("cost") or {} for row in rows]
    names = [name for name in COLUMNS if any(name in cost for cost in known)]
    if not names:
        return ""
    devices = dict.fromkeys(device for cost in known for device in cost.get("devices", ()))
    on = f" on {' and '.join(devices)}" if devices else ""
    lines = [f"| system | {' | '.join(COLUMNS[name] for name in names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {cell_text(str(row['system']))} | {' | '.join(text(cost, name) for name in names)} |"
        for row, cost in zip(rows, known)
    ]
    return (
        f"Cost: mean over runs{on}. Loading, drawing and judging are excluded. Cached inputs are charged at their "
        f"original cost. {WARM_UP_NOTE}\n\n" + "\n".join(lines) + "\n"
    )


def text(cost: Mapping[str, Any], name: str) -> str:
    """ "8.3", "1,240"; "≥ 1,240" if a part of the cost is unknown; "–" if all of it is."""
    if name not in cost:
        return "–"
    bound = "≥ " if name in ERASING and cost.get("at_least") else ""
    return f"{bound}{_number(cost[name])}"


def parts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, number) for each total of a run."""
    cost = mean([record])
    units = {"seconds": " s"}
    return [(label, text(cost, name) + units.get(name, "")) for name, label in LABELS.items() if name in cost]


def sentence(record: Mapping[str, Any]) -> str:
    """ "8.3 s to erase, 1,240 denoiser passes to erase, ... (cpu, 1 thread)"; "" if nothing is known."""
    costs_text = ", ".join(f"{number} {label}" for label, number in parts(record))
    return f"{costs_text} ({record['device']})" if costs_text and record.get("device") else costs_text


def stages(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(stage, seconds) for each stage, then the original cost of cached inputs."""
    took = record.get("stages", {})
    found = [(label, f"{_number(took[name])} s") for name, label in STAGES.items() if name in took]
    cached = [part["seconds"] for part in record.get("shared", {}).values() if part["passes"] or part["seconds"]]
    return [*found, ("original cost of cached inputs", f"{_number(sum(cached))} s")] if cached else found


def _number(value: float) -> str:
    if value == int(value) or value >= 10:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"
