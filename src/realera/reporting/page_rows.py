"""The metrics of a page as rows for its template: positions on the axis in percent, and the texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from realera.evaluation.measures import (
    EXTRA_LABELS,
    EXTRA_MODES,
    METRIC_OF_SPLIT,
    extra,
    higher_is_better,
    image_count,
    main_entry,
    mode_of,
    modes,
    near,
    symbol,
    what,
)
from realera.reporting import charts

ORDER = ("acc_e", "acc_g", "acc_s", "h_o", "acc_a", "acc_u")
WHAT = {
    "acc_e": "the concept by name",
    "acc_s": "preserved concepts",
    "h_o": "the harmonic mean",
    "acc_a": "phrases that evoke it",
    "acc_u": "unseen words for it",
}
Estimate = Mapping[str, Any]  # as in metrics.json: {value, low, high, n, unscored, scored, mode}; numbers may be None


@dataclass(frozen=True)
class Line:
    """A row of the table. name: such as acc_e. symbol, index: "Acc", "e". after, before: estimates; beside: the same
    measure as another metric. at: positions of before, after and the interval's ends in percent of the axis, None if
    unknown."""

    name: str
    symbol: str
    index: str
    what: str
    reading: str
    higher: bool
    after: Estimate
    before: Estimate | None
    beside: Estimate | None
    images: str
    at: Mapping[str, float | None]


@dataclass(frozen=True)
class Lines:
    """The table: its rows, its axis, its metrics, and the optional columns."""

    lines: list[Line]
    axis: list[charts.Tick]
    reading: str  # the metric of all rows; "" if they differ
    beside: str  # the metric of an additional column; "" if there is none
    scored: bool  # whether an image could not be scored
    before: bool  # whether the original model was measured


def measures(metrics: Mapping[str, Any]) -> Lines:
    """The table of a run's metrics.json."""
    main = metrics["main"] if metrics else {}
    before = (metrics.get("original") or {}).get("main")
    shown = [
        name
        for name in ORDER
        if name in main and (_images(main[name]) if name != "h_o" else main[name]["value"] is not None)
    ]
    read = {mode_of(main, name) for name in shown if name != "h_o"}
    beside = "top1" if "top1" in metrics and read != {"top1"} and "detected" not in read else ""
    high = _axis_end(main, before, shown, bool(metrics) and bool(extra(metrics)))
    protocol = metrics.get("protocol") or {}

    def line(name: str, mode: str | None, after: Estimate, was: Estimate | None) -> Line:
        own = "" if mode in EXTRA_MODES else name
        at = {"after": after["value"], "low": after["low"], "high": after["high"], "before": was and was["value"]}
        letter, index = symbol(name, mode)
        return Line(
            own or f"{name}_{mode}",
            letter,
            index,
            f"{near(protocol)}s" if own == "acc_g" else WHAT[own] if own else EXTRA_LABELS[str(mode)],
            what(mode),
            higher_is_better(name, mode),
            after,
            was,
            metrics[beside].get(name) if beside and own else None,
            image_count(after),
            {key: None if value is None else 100 * value / high for key, value in at.items()},
        )

    lines = [line(name, mode_of(main, name), main[name], (before or {}).get(name)) for name in shown]
    was_extra = {(name, mode): main_entry(e, mode) for name, mode, e in extra(metrics.get("original") or {})}
    lines += [line(name, mode, main_entry(e, mode), was_extra.get((name, mode))) for name, mode, e in extra(metrics)]
    lost = any(e["unscored"] for block in (main, before or {}) for e in block.values())
    reading = next((each.reading for each in lines if each.name != "h_o"), "") if len(read) == 1 else ""
    axis = [charts.Tick(100 * mark / high, charts.number(mark)) for mark in (0, high / 2, high)]
    return Lines(lines, axis, reading, what("top1") if beside else "", lost, before is not None)


def _axis_end(
    main: Mapping[str, Estimate], before: Mapping[str, Estimate] | None, shown: Iterable[str], mixed: bool
) -> float:
    """100 for percentages (mixed: rows beyond those of main); if all rows are scores (about 30 of a possible 100), a
    round number above them."""
    if mixed or any(mode_of(main, name) != "score" for name in shown):
        return 100.0
    ends = [e[key] or 0.0 for block in (main, before or {}) for e in block.values() for key in ("value", "high")]
    return charts.ticks(0, max([1.0, *ends]), 4)[-1]


def _images(estimate: Estimate) -> int:
    return int(estimate["n"] + estimate["unscored"])


def sentences(metrics: Mapping[str, Any]) -> list[str]:
    """The main results in words: by name, by synonym or phrase, its replacement, and the preserved concepts."""
    if not metrics:
        return []
    result = {name: _result(metrics, name) for name in ("acc_e", "acc_g", "acc_s")}
    first = [f"prompted by name, {result['acc_e']}" if result["acc_e"] else ""]
    first += [f"prompted by {near(metrics.get('protocol') or {})}, {result['acc_g']}" if result["acc_g"] else ""]
    text = "; ".join(part for part in first if part)
    preserved = f"for preserved concepts, {result['acc_s']}" if result["acc_s"] else ""
    parts = (text, _replacement(metrics), preserved, _scored(metrics))
    return [f"{part[0].upper()}{part[1:]}." for part in parts if part]


def _result(metrics: Mapping[str, Any], name: str) -> str:
    """ "the concept is seen in 3% of the images (98% before)"; "" if it was not measured."""
    main = metrics["main"]
    mode = mode_of(main, name)
    if mode is None or not _images(main[name]):
        return ""
    read = "top1" if mode == "mean_prob" and "top1" in metrics else mode  # a share of images is easier to say
    now = (metrics.get(read) or main)[name]["value"]
    original = metrics.get("original") or {}
    was = (original.get(read) or original.get("main") or {}).get(name, {}).get("value")
    if now is None:
        return "no image could be scored"
    if mode == "score":
        return f"the CLIP score is {now:.1f}" + ("" if was is None else f" ({was:.1f} before)")
    seen = "something is detected" if mode == "detected" else "the concept is seen"
    if name == "acc_s" and mode != "detected":
        return f"{now:.0f}% of the images are still recognised" + ("" if was is None else f" ({was:.0f}% before)")
    return f"{seen} in {now:.0f}% of the images" + ("" if was is None else f" ({was:.0f}% before)")


def _replacement(metrics: Mapping[str, Any]) -> str:
    """Tells a replacement of the concept from a smear, which does not show the concept either."""
    shares = (
        (block.get("whole") or {}).get("acc_e", {}).get("value") for block in (metrics, metrics.get("original") or {})
    )
    now, was = shares
    if now is None:
        return ""
    before = "" if was is None else f" ({was:.0f}% before)"
    return f"of the images prompted by name, {now:.0f}% show something whole, the concept or not{before}"


def _scored(metrics: Mapping[str, Any]) -> str:
    """The share of the concept's own images that could be scored; "" if all could."""
    after, before = (((m or {}).get("main") or {}).get("acc_e") or {} for m in (metrics, metrics.get("original")))
    if not (after.get("unscored") or before.get("unscored")):
        return ""
    was = "" if before.get("scored") is None else f" ({before['scored']:.0f}% before)"
    return f"of the images prompted by name, {after['scored'] or 0:.0f}% could be scored{was}; the others are left out"


def concepts(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """One row per erased concept: {"heads": [...], "rows": [(name, [(before, after), ...])]}; None for one concept."""
    blocks = metrics.get("concepts") if metrics else None
    if not blocks:
        return None
    before = (metrics.get("original") or {}).get("concepts", {})
    first = next(iter(blocks.values()))
    names = [
        n for n in ORDER if n != "acc_s" and n in first and any(b[n]["value"] is not None for b in blocks.values())
    ]
    rows = [
        (concept, [(before.get(concept, {}).get(n, {}).get("value"), block[n]["value"]) for n in names])
        for concept, block in blocks.items()
    ]
    return {"heads": [symbol(name, mode_of(first, name)) for name in names], "rows": rows}


def boxes(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """A detector's counts: {"splits": [split], "rows": [(class, kind, {split: (before, after)})]}, before and after
    {boxes, images} or None. kind: "", "total", or "apart" for classes outside the total. None without counts."""
    now = metrics.get("counts") if metrics else None
    if not now:
        return None
    was = (metrics.get("original") or {}).get("counts", {})
    splits = [split for split in METRIC_OF_SPLIT if split in now]
    blocks = [block[split] for block in (now, was) for split in splits if split in block]

    def row(name: str, part: str) -> dict[str, tuple[Any, Any]]:
        def count(block: Mapping[str, Any], split: str) -> Any:
            if split not in block:
                return None
            found = block[split][part]
            return found if part == "total" else found.get(name, {"boxes": 0, "images": 0})

        return {split: (count(was, split), count(now, split)) for split in splits}

    classes = dict.fromkeys(name for block in blocks for name in block["classes"])
    apart = dict.fromkeys(name for block in blocks for name in block["apart"])
    rows = [(name, "", row(name, "classes")) for name in classes]
    rows += [("total", "total", row("", "total")), *((name, "apart", row(name, "apart")) for name in apart)]
    return {"splits": splits, "rows": rows, "images": {split: now[split]["n"] for split in splits}}


def others(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The other judges of the same images: {"judge", "lines": [(symbol, index, metric, before, after)]}. The metrics
    are the task's, or the first one that the judge supports."""
    found = []
    for judge, numbers in (metrics.get("judges") or {}).items() if metrics else ():
        part, read = "main", ""
        if all(e["value"] is None for e in numbers["main"].values()):
            part = read = next(
                (m for m in modes(numbers) if (numbers[m].get("acc_e") or {}).get("value") is not None), "main"
            )
        now, before = numbers[part], (numbers.get("original") or {}).get(part, {})
        rows = []
        for name in ORDER:
            if name in now and now[name]["value"] is not None:
                mode = read or mode_of(now, name)
                was = before.get(name, {}).get("value")
                rows.append((*symbol(name, mode), what(mode), was, now[name]["value"]))
        found.append({"judge": judge, "lines": rows})
    return found


def sets(metrics: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]], str]]:
    """Metrics of whole sets of images: (judge, [(name, value)], description of the two sets)."""
    found = []
    for judge, numbers in (metrics.get("sets") or {}).items() if metrics else ():
        protocol = numbers.get("protocol", {})
        references = protocol.get("references", "")
        originals = "the original model's images of the same prompts"
        against = originals if references == "originals" else f"the images in {references}"
        compared = f"{protocol.get('images', '?')} images of the split {protocol.get('split', '?')} against {against}"
        values = [(k, "–" if v is None else charts.number(v)) for k, v in numbers.items() if k != "protocol"]
        found.append((judge, values, compared))
    return found
