"""The tables of a sweep as in the papers: systems by concepts, boxes by class, the ablation, costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from realera.evaluation.bootstrap import interval
from realera.evaluation.box_counts import APART
from realera.evaluation.measures import ORDER, undefined_notes
from realera.evaluation.metrics import Sample
from realera.reporting import cost_words, printed
from realera.reporting.pooling import ORIGINAL
from realera.reporting.sweep.chapter import Chapter, verdicts_of
from realera.reporting.sweep.systems import JudgedRun
from realera.reporting.table import mean_counts
from realera.reporting.table_formats import Column, Number, Table, TableRow, ranked
from realera.settings.run_settings import Settings

MEAN = "mean"
NUDITY = "nudity"  # the concept of the paper's Table 2
PARTS: Mapping[str, str] = {  # of a method; the first four in the paper's order and by its table's names
    "closed_form": "closed form",
    "noise_alignment": "alignment",
    "neighbor_mining": "neighbours",
    "beyond_concept_reg": "beyond the concept",
    "guide": "guide",
    "finish": "edit after training",
}


def tables(chapter: Chapter) -> list[Table]:
    """The tables for which the chapter has runs: means, by concept, boxes, ablation, differences from the base,
    costs."""
    found = [
        means(chapter),
        by_concept(chapter),
        boxes(chapter),
        ablation(chapter),
        differences(chapter),
        cost_table(chapter),
    ]
    return [table for table in found if table is not None]


def means(chapter: Chapter) -> Table:
    names = chapter.measures
    rows = []
    for system, measured in chapter.means.items():
        run = chapter.systems[system][0]
        paper: Mapping[str, float] = {}
        if _concepts(chapter, system) == printed.OBJECTS:
            paper = _printed(chapter, run, printed.MEAN)
        elif len(chapter.concepts) == 1 and run.task != "nsfw":
            paper = _printed(chapter, run, chapter.concepts[0])
        rows.append(row_of(chapter, system, [_number(measured.get(name), paper.get(name)) for name in names]))
    columns = chapter.columns(names)
    several = len(chapter.concepts) > 1
    title = "Mean over concepts and seeds" if several else f"{chapter.concepts[0] if chapter.concepts else ''}"
    return table_of(chapter, "mean", title, ("system",), columns, rows)


def by_concept(chapter: Chapter) -> Table | None:
    """As in the paper's Table 1: each concept's Acc_e, Acc_s, Acc_g and H_o side by side, and their means."""
    if len(chapter.concepts) < 2:
        return None
    names = [name for name in chapter.measures if name not in ("acc_a", "acc_u")]
    columns = [c for concept in [*chapter.concepts, MEAN] for c in chapter.columns(names, concept)]
    rows = []
    for system, measured in chapter.by_concept.items():
        run = chapter.systems[system][0]
        numbers = []
        for concept in chapter.concepts:
            paper = _printed(chapter, run, concept)
            numbers += [_number(measured.get(concept, {}).get(name), paper.get(name)) for name in names]
        all_ten = _concepts(chapter, system) == printed.OBJECTS
        paper = _printed(chapter, run, printed.MEAN) if all_ten else {}
        numbers += [_number(chapter.means[system].get(name), paper.get(name)) for name in names]
        rows.append(row_of(chapter, system, numbers, [concept for concept in chapter.concepts for _ in names]))
    return table_of(chapter, "concepts", "By concept", ("system",), columns, rows)


def boxes(chapter: Chapter) -> Table | None:
    """As in the paper's Table 2: the boxes that a detector found in the images prompted by name, by class, as means
    over the runs of a system; and Acc_s, the CLIP score of unrelated images."""
    found = {system: mean_counts(verdicts_of(runs)).get("erase") for system, runs in chapter.systems.items()}
    if not any(found.values()):
        return None
    classes = list(dict.fromkeys(name for counted in found.values() for name in counted or ()))
    classes = [n for n in classes if n not in ("total", *APART)] + ["total"] + [n for n in classes if n in APART]
    columns = [Column(name, name.replace("_", " "), better=-1) for name in classes]
    rows = []
    for system, counted in found.items():
        paper = _printed(chapter, chapter.systems[system][0], ", ".join(_concepts(chapter, system)))
        numbers = [Number((counted or {}).get(name, math.nan), printed=paper.get(name)) for name in classes]
        preserved = _number(chapter.means[system].get("acc_s"), paper.get("acc_s"))
        rows.append(row_of(chapter, system, [*numbers, preserved]))
    table = table_of(chapter, "boxes", "Boxes by class", ("system",), [*columns, *chapter.columns(["acc_s"])], rows)
    note = "Boxes in the images prompted by name, mean over runs. The last column has the preserved images."
    apart = f" The total leaves out {', '.join(n for n in classes if n in APART)}, as in the papers."
    return replace(table, notes=(note + apart * (classes[-1] in APART), *table.notes[1:]))


def parts_of(run: JudgedRun) -> dict[str, Any]:
    """{part: its class} of the parts of `PARTS` that the settings of a run's method have."""
    method = Settings(run.config).method
    miner = method.neighbours
    counted = {"m", "n"} & set(miner.node)  # the numbers of points; a miner without them finds both kinds
    has = {
        "closed_form": (method.edit, True),
        "noise_alignment": (method.align, method.align.steps),
        "neighbor_mining": (miner, miner.m if counted else True),
        "beyond_concept_reg": (miner, miner.n if counted else True),
        "guide": (method.guide, True),
        "finish": (method.finish, True),
    }
    return {name: part.node.get("_target_") for name, (part, there) in has.items() if part and there}


def _ablated(chapter: Chapter) -> dict[frozenset[str], str]:
    """{parts: system} of the systems that are one method with more or fewer of its parts: each part has the class that
    it has in the most complete system. If there are several such methods, the one with the most systems; {} if two of
    its systems have the same parts, because something else was varied."""
    parts = {system: parts_of(runs[0]) for system, runs in chapter.systems.items()}
    best: list[str] = []
    for whole in sorted(parts, key=lambda system: -len(parts[system])):
        own = [system for system, has in parts.items() if has and has.items() <= parts[whole].items()]
        best = max(best, own, key=len)  # the first of equally many
    known = {frozenset(parts[system]): system for system in best}
    return known if len(known) == len(best) else {}


def ablation(chapter: Chapter) -> Table | None:
    """As in the paper's Table 3: a method with more and more of its parts, with each row's difference from the previous
    one. None if no method has systems with different parts."""
    known = _ablated(chapter)
    if len(known) < 2:
        return None
    order, own = [part for part in PARTS if any(part in parts for parts in known)], list(known.values())
    names = [name for name in chapter.measures if name not in ("acc_a", "acc_u")]
    rows: list[TableRow] = []
    before: frozenset[str] | None = None
    for parts in sorted(known, key=lambda parts: (len(parts), [order.index(p) for p in order if p in parts])):
        system = known[parts]
        now = chapter.means[system]
        if before is not None:
            pairs = _both(chapter.systems[known[before]], chapter.systems[system])
            step = [f"+ {PARTS[p]}" for p in order if p in parts - before]
            step += [f"− {PARTS[p]}" for p in order if p in before - parts]
            ends = [chapter.measure(runs) for runs in zip(*pairs)]
            numbers = [difference(*(end[name] for end in ends)) if ends else None for name in names]
            texts = (", ".join(step), *("" for _ in order))
            rows.append(TableRow(texts, tuple(numbers), note=_over(chapter, pairs, own), signed=True))
        paper = {}
        if len(chapter.concepts) == 1 and chapter.runs[0].task == "object":
            paper = printed.ablation(chapter.systems[system][0].method, parts, chapter.concepts[0])
        ticks = ("✓" if part in parts else "" for part in order)
        row = row_of(chapter, system, [_number(now.get(name), paper.get(name)) for name in names], among=own)
        rows.append(replace(row, texts=(system, *ticks)))
        before = parts
    heads = ("system", *(PARTS[part] for part in order))
    title = f"Effect of each part of {known[max(known, key=len)]}"
    return table_of(chapter, "ablation", title, heads, chapter.columns(names), rows)


def differences(chapter: Chapter) -> Table | None:
    """Every system's means minus the base's, over the concepts and seeds that both have."""
    if chapter.base not in chapter.systems:
        return None
    names, rows = chapter.measures, []
    for system, runs in chapter.systems.items():
        pairs = _both(chapter.systems[chapter.base], runs)
        if system == chapter.base or not pairs:
            continue
        numbers = tuple(_paired(chapter, name, pairs) for name in names)
        rows.append(TableRow((system,), numbers, note=_over(chapter, pairs), signed=True))
    if not rows:
        return None
    found = table_of(
        chapter, "differences", f"Differences from {chapter.base}", ("system",), chapter.columns(names), rows
    )
    note = (
        "Paired differences (same concepts, seeds and images) with 95% intervals. Several concepts are resampled too. "
        "Even without any true difference, one interval in twenty excludes 0."
    )
    return replace(found, notes=(note,))


def _both(was: Sequence[JudgedRun], now: Sequence[JudgedRun]) -> list[tuple[JudgedRun, JudgedRun]]:
    """Pairs of runs of the same concept and seed."""
    known = {(run.concept, run.seed): run for run in was}
    return [(known[run.concept, run.seed], run) for run in now if (run.concept, run.seed) in known]


def _over(chapter: Chapter, pairs: Sequence[tuple[JudgedRun, JudgedRun]], among: Iterable[str] | None = None) -> str:
    """The note of a difference over fewer runs than the systems `among` have (None: all systems)."""
    known = _runs(chapter, chapter.systems if among is None else among)
    return "" if len(pairs) == len(known) else f"over {len(pairs)} of {len(known)} runs"


def _paired(chapter: Chapter, name: str, pairs: Sequence[tuple[JudgedRun, JudgedRun]]) -> Number:
    """`difference` over the pairs in which both runs have the measure."""
    was, now = (chapter.measure(runs)[name] for runs in zip(*pairs))
    if was.undefined or now.undefined:
        there = [p for p in pairs if not any(math.isnan(chapter.measure([run])[name].value) for run in p)]
        was, now = (chapter.measure(runs)[name] for runs in zip(*(there or pairs)))
    return difference(was, now)


def difference(was: Sample, now: Sample) -> Number:
    """now - was, with the interval of the resamples' paired differences (`pooling.pooled`), even if the interval of one
    of them is exact. Several concepts are resampled too, because "better" is a claim about all concepts."""
    if was.wide is not None and now.wide is not None:
        return Number(now.value - was.value, *interval(now.wide - was.wide))
    return Number(now.value - was.value, *interval(now.drawn - was.drawn))


def cost_of(runs: Sequence[JudgedRun]) -> dict[str, Any]:
    """`cost_words.mean` over a system's runs; {} for the original model, whose images may be in other runs' folders."""
    return cost_words.mean([one.costs for one in verdicts_of([run for run in runs if run.method != ORIGINAL])])


def cost_table(chapter: Chapter) -> Table | None:
    found = {system: spent for system, runs in chapter.systems.items() if (spent := cost_of(runs))}
    names = [name for name in cost_words.COLUMNS if any(name in spent for spent in found.values())]
    if "seconds" not in names:
        return None
    columns = [
        # the peak includes earlier work of the same process, so it does not rank systems
        Column(
            name, cost_words.COLUMNS[name], better=0 if "memory" in name else -1, digits=2 if name == "seconds" else 0
        )
        for name in names
    ]
    rows = []
    for system, spent in found.items():
        bounds = [spent["at_least"] and name in cost_words.ERASING for name in names]
        numbers = [Number(spent[name], least=least) if name in spent else None for name, least in zip(names, bounds)]
        row = row_of(chapter, system, numbers)
        least = "at least" * spent["at_least"]
        rows.append(replace(row, note=", ".join(filter(None, [row.note, least]))))
    devices = dict.fromkeys(device for spent in found.values() for device in spent["devices"])
    notes = [
        f"Means over runs{' on ' if devices else ''}{' and '.join(devices)}. Loading, drawing and judging are "
        f"excluded. Cached inputs are charged at their original cost. {cost_words.WARM_UP_NOTE}"
    ]
    if any(spent["at_least"] for spent in found.values()):
        notes.append("At least: a part of the cost is unknown, so seconds and passes are lower bounds and not ranked.")
    table = table_of(chapter, "costs", "Cost of erasing", ("system",), columns, rows)
    return replace(table, notes=(*notes, *_unranked(rows)))


def table_of(
    chapter: Chapter, name: str, title: str, heads: tuple[str, ...], columns: Sequence[Column], rows: Sequence[TableRow]
) -> Table:
    """A chapter's table, ranked, with its notes. The first note names the metrics."""
    notes = [chapter.readings]
    for system, row in chapter.means.items():
        missing = {measure: row[measure].undefined for measure in ORDER if measure in row}
        notes += undefined_notes(system, len(chapter.systems[system]), missing, chapter.headline)
    notes += _unranked(rows)
    table = Table(f"{chapter.name}-{name}", title, heads, tuple(columns), ranked(columns, rows), tuple(notes))
    return replace(table, notes=(*table.notes, _comparable(chapter))) if table.has_printed else table


def _unranked(rows: Sequence[TableRow]) -> list[str]:
    if not any(number and number.partial for row in rows for number in row.numbers):
        return []
    return ["Numbers over fewer runs than other systems have are not ranked."]


def _comparable(chapter: Chapter) -> str:
    if chapter.runs[0].backbone in ("mini", "mini-dit"):
        return (
            "The paper's numbers are for Stable Diffusion 1.4 and cannot be compared to those of the miniature, a "
            "different model of different images; only the order of the systems can be compared."
        )
    return (
        "The paper's numbers (arXiv 2410.09140) are for Stable Diffusion 1.4; they are comparable only if model, "
        "images and judge are the same."
    )


def _printed(chapter: Chapter, run: JudgedRun, concept: str) -> Mapping[str, float]:
    """The paper's numbers for a run's system; {} if its settings were varied, or if the unsafe content is not the
    paper's or Acc_s is not a CLIP score."""
    if run.task == "nsfw" and (concept.lower(), chapter.headline.get("acc_s")) != (NUDITY, "score"):
        return {}
    protocol = (run.metrics.get("protocol") or {}).get("protocol", "realera")
    whole = printed.has_all_parts(run.method, frozenset(parts_of(run)))
    known = run.system == run.base and printed.same_name(run.base, run.method) and whole and protocol == "realera"
    return printed.printed(run.task, run.method, concept) if known else {}


def _runs(chapter: Chapter, systems: Iterable[str], concept: str | None = None) -> set[tuple[str, int]]:
    """The (concept, seed) pairs that any of these systems has, of one concept or of all."""
    every = {(run.concept, run.seed) for system in systems for run in chapter.systems[system]}
    return {pair for pair in every if concept in (None, pair[0])}


def _concepts(chapter: Chapter, system: str) -> frozenset[str]:
    return frozenset(run.concept for run in chapter.systems[system])


def row_of(
    chapter: Chapter,
    system: str,
    numbers: Sequence[Number | None],
    of: Sequence[str] = (),
    among: Iterable[str] | None = None,
) -> TableRow:
    """A system's row, with a note if it lacks runs that another system has. Numbers without all runs of the ranked
    systems are not ranked. of: the concepts of the first numbers; the rest are over all concepts. among: the table's
    systems, None for all."""
    among = list(chapter.systems if among is None else among)
    references = {name for name in among if ORIGINAL in (name, chapter.systems[name][0].method)}
    ranked_systems = [name for name in among if name not in references]

    def lacks(concept: str | None) -> bool:
        missing = _runs(chapter, ranked_systems, concept) - _runs(chapter, [system], concept)
        return system not in references and bool(missing)

    partial = {concept: lacks(concept) for concept in (None, *of)}
    marked = tuple(n and replace(n, partial=partial[concept]) for n, concept in zip_longest(numbers, of))
    has, known = (len(_runs(chapter, names)) for names in ([system], among))
    return TableRow((system,), marked, system in references, note="" if has == known else f"{has} of {known} runs")


def _number(sample: Sample | None, printed_value: float | None = None) -> Number | None:
    return None if sample is None else Number(sample.value, *sample.interval(), printed=printed_value)
