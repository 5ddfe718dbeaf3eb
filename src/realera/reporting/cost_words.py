"""What erasing costs (costs.json), as people read it. No torch here."""

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
SAID: Mapping[str, str] = {
    "seconds": "to erase",
    "passes": "passes of the U-Net to erase",
    "passes_per_image": "passes per image",
    "trained_parameters": "parameters trained",
    "edited_parameters": "parameters edited in closed form",
    "memory_mb": "MB at most while erasing",
}
STAGES: Mapping[str, str] = {
    "load": "loading the model",
    "text": "encoding the training prompts",
    "edit": "mining and closed form",
    "latents": "making ready to train",
    "train": "training",
    "finish": "finishing edit and saving",
    "draw": "drawing",
    "judge": "judging",
}
ERASING = ("seconds", "passes")  # what of the totals a cache may have had a part in
# What a mean over the cells of a sweep cannot undo.
WARM = "The first cell of a process pays for encoding and for warming up."


def mean(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over runs: each of costs.totals over those that say it; runs: how many say anything; at_least: whether one found
    something in the cache that does not say what it cost; devices. {} where none says anything."""
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
    """A table of the rows of results.json (`system`, and `cost` as `mean` gives it) under a line that says what it
    holds; "" where none has costs."""
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
        f"Cost, the mean over runs{on}; loading, drawing and judging are left out, what the cache held counts as it "
        f"cost when it was made. {WARM}\n\n" + "\n".join(lines) + "\n"
    )


def text(cost: Mapping[str, Any], name: str) -> str:
    """ "8.3", "1,240", "≥ 1,240" where more was spent than is known, "–" where nothing is."""
    if name not in cost:
        return "–"
    bound = "≥ " if name in ERASING and cost.get("at_least") else ""
    return f"{bound}{_number(cost[name])}"


def parts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, number) of each of a run's totals."""
    cost = mean([record])
    units = {"seconds": " s"}
    return [(said, text(cost, name) + units.get(name, "")) for name, said in SAID.items() if name in cost]


def sentence(record: Mapping[str, Any]) -> str:
    """ "8.3 s to erase, 1,240 passes of the U-Net to erase, ... (cpu, 1 thread)"; "" where nothing is known."""
    said = ", ".join(f"{number} {label}" for label, number in parts(record))
    return f"{said} ({record['device']})" if said and record.get("device") else said


def stages(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what was done, how long it took), and what was found done."""
    took = record.get("stages", {})
    found = [(said, f"{_number(took[name])} s") for name, said in STAGES.items() if name in took]
    spared = [part["seconds"] for part in record.get("shared", {}).values() if part["passes"] or part["seconds"]]
    return [*found, ("found in the cache, when it was made", f"{_number(sum(spared))} s")] if spared else found


def _number(value: float) -> str:
    if value == int(value) or value >= 10:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"
