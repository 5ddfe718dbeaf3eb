"""Tables that the papers do not print: what replaces the concept, how far preserved images change, and each measure in
percent of the original model's."""

from __future__ import annotations

import math
from dataclasses import replace

from realera.contracts import Mode
from realera.evaluation.measures import EXTRA_METRICS, described, higher_is_better, symbol
from realera.evaluation.metrics import Estimate, available_modes
from realera.reporting.pooling import pool, relative
from realera.reporting.sweep.chapter import Chapter, verdicts_of
from realera.reporting.sweep.tables import row_of, table_of
from realera.reporting.table_formats import Column, Number, Table


def beside_tables(chapter: Chapter) -> list[Table]:
    """The tables for which the chapter has verdicts."""
    return [made for made in (beside(chapter), of_original(chapter)) if made is not None]


def beside(chapter: Chapter) -> Table | None:
    """The metrics of `BESIDE`, for systems whose judge supports them; None if no system's does."""
    found = {mode: _means(chapter, mode) for _, mode in EXTRA_METRICS}
    pairs = [(name, mode) for name, mode in EXTRA_METRICS if any(name in each for each in found[mode].values())]
    if not pairs:
        return None
    columns = [
        Column(f"{name}_{mode}", *symbol(name, mode), better=1 if higher_is_better(name, mode) else -1)
        for name, mode in pairs
    ]
    rows = [
        row_of(chapter, system, [_number(found[mode].get(system, {}).get(name)) for name, mode in pairs])
        for system in chapter.systems
    ]
    made = table_of(
        chapter, "beside", "Replacement of the concept, and change of preserved images", ("system",), columns, rows
    )
    metrics = described(mode for _, mode in pairs)
    return replace(made, notes=(f"{metrics[:1].upper()}{metrics[1:]}.", *made.notes[1:]))


def _means(chapter: Chapter, mode: Mode) -> dict[str, dict[str, Estimate]]:
    """{system: {measure: its mean by this metric}}, for the systems all of whose runs support it."""
    found = {}
    for system, runs in chapter.systems.items():
        own = verdicts_of(runs)
        if all(mode in available_modes(cell.verdicts) for cell in own):
            means = pool(own, dict.fromkeys(chapter.headline, mode), chapter.resamples)
            found[system] = {name: mean for name, mean in means.items() if not math.isnan(mean.value)}
    return found


def of_original(chapter: Chapter) -> Table | None:
    """Each measure in percent of the original model's; None without its runs."""
    found = relative(
        {system: verdicts_of(runs) for system, runs in chapter.systems.items()}, chapter.headline, chapter.resamples
    )
    names = [name for name in chapter.measures if any(name in each for each in found.values())]
    if not names:
        return None
    rows = [
        row_of(chapter, system, [Number(**each[name]) if name in each else None for name in names])
        for system, each in found.items()
    ]
    columns = [replace(column, digits=1) for column in chapter.columns(names)]
    made = table_of(chapter, "relative", "In percent of the original model", ("system",), columns, rows)
    note = (
        "Over the same concepts, seeds and images. A word that draws nothing with the original model cannot be erased."
    )
    return replace(made, notes=(note, *made.notes[1:]))


def _number(estimate: Estimate | None) -> Number | None:
    return None if estimate is None else Number(estimate.value, estimate.low, estimate.high)
