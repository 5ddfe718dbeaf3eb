"""The tables of a sweep that the papers do not print: whether something stands in the concept's place and how far the
others moved, and each measure in percent of the unedited model's own."""

from __future__ import annotations

import math
from dataclasses import replace

from realera.contracts import Mode
from realera.evaluation.measures import BESIDE, described, higher, symbol
from realera.evaluation.metrics import Estimate, readable
from realera.reporting.cells import pool, relative
from realera.reporting.sweep.chapter import Chapter, cells
from realera.reporting.sweep.tables import row_of, table_of
from realera.reporting.table_formats import Column, Number, Table


def beside_tables(chapter: Chapter) -> list[Table]:
    """Those that the chapter has the verdicts for."""
    return [made for made in (beside(chapter), of_original(chapter)) if made is not None]


def beside(chapter: Chapter) -> Table | None:
    """The readings of `BESIDE`, of the systems whose judge gives them; None without any."""
    found = {mode: _means(chapter, mode) for _, mode in BESIDE}
    pairs = [(name, mode) for name, mode in BESIDE if any(name in each for each in found[mode].values())]
    if not pairs:
        return None
    columns = [
        Column(f"{name}_{mode}", *symbol(name, mode), better=1 if higher(name, mode) else -1) for name, mode in pairs
    ]
    rows = [
        row_of(chapter, system, [_number(found[mode].get(system, {}).get(name)) for name, mode in pairs])
        for system in chapter.systems
    ]
    made = table_of(
        chapter, "beside", "What stands in its place, and how far the others moved", ("system",), columns, rows
    )
    said = described(mode for _, mode in pairs)
    return replace(made, notes=(f"{said[:1].upper()}{said[1:]}.", *made.notes[1:]))


def _means(chapter: Chapter, mode: Mode) -> dict[str, dict[str, Estimate]]:
    """{system: {measure: its mean so read}}, of the systems all of whose runs can be."""
    found = {}
    for system, runs in chapter.systems.items():
        own = cells(runs)
        if all(mode in readable(cell.verdicts) for cell in own):
            means = pool(own, dict.fromkeys(chapter.headline, mode), chapter.resamples)
            found[system] = {name: mean for name, mean in means.items() if not math.isnan(mean.value)}
    return found


def of_original(chapter: Chapter) -> Table | None:
    """Each measure in percent of the unedited model's own; None without its runs."""
    found = relative(
        {system: cells(runs) for system, runs in chapter.systems.items()}, chapter.headline, chapter.resamples
    )
    names = [name for name in chapter.measures if any(name in each for each in found.values())]
    if not names:
        return None
    rows = [
        row_of(chapter, system, [Number(**each[name]) if name in each else None for name in names])
        for system, each in found.items()
    ]
    columns = [replace(column, digits=1) for column in chapter.columns(names)]
    made = table_of(chapter, "relative", "In percent of the original model's own", ("system",), columns, rows)
    said = (
        "Of the same concepts, seeds and images; a word that draws nothing on the original model has nothing to erase."
    )
    return replace(made, notes=(said, *made.notes[1:]))


def _number(estimate: Estimate | None) -> Number | None:
    return None if estimate is None else Number(estimate.value, estimate.low, estimate.high)
