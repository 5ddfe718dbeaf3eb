"""The numbers of a page, as lines that a template prints: places on the axis in percent, words made ready."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from realera.evaluation.measures import (
    BESIDE_MODES,
    BESIDE_WHAT,
    MEASURES,
    counted,
    extra,
    higher,
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
    "acc_s": "other concepts",
    "h_o": "the harmonic mean",
    "acc_a": "phrases that evoke it",
    "acc_u": "other words for it",
}
Estimate = Mapping[str, Any]  # as metrics.json holds it: {value, low, high, n, unscored, scored, mode}, values or None


@dataclass(frozen=True)
class Line:
    """A line of the table. name: such as acc_e. symbol, index: "Acc", "e". after, before: estimates; beside: the same
    number in another reading. at: percent of the axis of before, after, and the interval's ends, None where unknown."""

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
    """The table: its lines, its axis, the readings they mix, the reading that stands beside them, and what its columns
    need to be there."""

    lines: list[Line]
    axis: list[charts.Tick]
    reading: str  # one for all lines; "" where they differ
    beside: str
    scored: bool  # whether some image could not be scored
    before: bool


def measures(metrics: Mapping[str, Any]) -> Lines:
    """What was measured, line by line."""
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
        own = "" if mode in BESIDE_MODES else name
        at = {"after": after["value"], "low": after["low"], "high": after["high"], "before": was and was["value"]}
        letter, index = symbol(name, mode)
        return Line(
            own or f"{name}_{mode}",
            letter,
            index,
            f"{near(protocol)}s" if own == "acc_g" else WHAT[own] if own else BESIDE_WHAT[str(mode)],
            what(mode),
            higher(name, mode),
            after,
            was,
            metrics[beside].get(name) if beside and own else None,
            counted(after),
            {key: None if value is None else 100 * value / high for key, value in at.items()},
        )

    lines = [line(name, mode_of(main, name), main[name], (before or {}).get(name)) for name in shown]
    was_extra = {(name, mode): main_entry(said, mode) for name, mode, said in extra(metrics.get("original") or {})}
    lines += [
        line(name, mode, main_entry(said, mode), was_extra.get((name, mode))) for name, mode, said in extra(metrics)
    ]
    lost = any(e["unscored"] for block in (main, before or {}) for e in block.values())
    reading = next((each.reading for each in lines if each.name != "h_o"), "") if len(read) == 1 else ""
    axis = [charts.Tick(100 * mark / high, charts.number(mark)) for mark in (0, high / 2, high)]
    return Lines(lines, axis, reading, what("top1") if beside else "", lost, before is not None)


def _axis_end(
    main: Mapping[str, Estimate], before: Mapping[str, Estimate] | None, shown: Iterable[str], mixed: bool
) -> float:
    """100 for percentages (mixed: there are others than main's); where all lines are scores (about 30 of 100 possible),
    a round number above them."""
    if mixed or any(mode_of(main, name) != "score" for name in shown):
        return 100.0
    ends = [e[key] or 0.0 for block in (main, before or {}) for e in block.values() for key in ("value", "high")]
    return charts.ticks(0, max([1.0, *ends]), 4)[-1]


def _images(estimate: Estimate) -> int:
    return int(estimate["n"] + estimate["unscored"])


def sentences(metrics: Mapping[str, Any]) -> list[str]:
    """The numbers that matter, in words: by name, by synonym or phrase, what stands in its place, and the others."""
    if not metrics:
        return []
    said = {name: _said(metrics, name) for name in ("acc_e", "acc_g", "acc_s")}
    first = [f"asked for by name, {said['acc_e']}" if said["acc_e"] else ""]
    first += [f"asked for by {near(metrics.get('protocol') or {})}, {said['acc_g']}" if said["acc_g"] else ""]
    text = "; ".join(part for part in first if part)
    kept = f"of other concepts, {said['acc_s']}" if said["acc_s"] else ""
    parts = (text, _in_its_place(metrics), kept, _judgeable(metrics))
    return [f"{part[0].upper()}{part[1:]}." for part in parts if part]


def _said(metrics: Mapping[str, Any], name: str) -> str:
    """ "the concept is seen in 3% of the images (98% before)"; "" where it was not measured."""
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
        return f"image and text score {now:.1f}" + ("" if was is None else f" ({was:.1f} before)")
    seen = "something is detected" if mode == "detected" else "the concept is seen"
    if name == "acc_s" and mode != "detected":
        return f"{now:.0f}% are still recognised" + ("" if was is None else f" ({was:.0f}% before)")
    return f"{seen} in {now:.0f}% of the images" + ("" if was is None else f" ({was:.0f}% before)")


def _in_its_place(metrics: Mapping[str, Any]) -> str:
    """A smear is no concept either."""
    shares = (
        (block.get("whole") or {}).get("acc_e", {}).get("value") for block in (metrics, metrics.get("original") or {})
    )
    now, was = shares
    if now is None:
        return ""
    before = "" if was is None else f" ({was:.0f}% before)"
    return f"of the images of the concept by name, {now:.0f}% show something whole, whatever it is{before}"


def _judgeable(metrics: Mapping[str, Any]) -> str:
    """Where images left the denominator: how many of the concept's own did not."""
    after, before = (((m or {}).get("main") or {}).get("acc_e") or {} for m in (metrics, metrics.get("original")))
    if not (after.get("unscored") or before.get("unscored")):
        return ""
    was = "" if before.get("scored") is None else f" ({before['scored']:.0f}% before)"
    return (
        f"of the images of the concept by name, {after['scored'] or 0:.0f}% could be scored{was}, and only these count"
    )


def concepts(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """Several erased concepts, a row each: {"heads": [...], "rows": [(name, [(before, after), ...])]}; else None."""
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
    """What a detector counted: {"splits": [split], "rows": [(class, kind, {split: (before, after)})]}, before and after
    {boxes, images} or None. kind: "", "total", or "apart" for what no total holds. None where nothing was counted."""
    now = metrics.get("counts") if metrics else None
    if not now:
        return None
    was = (metrics.get("original") or {}).get("counts", {})
    splits = [split for split in MEASURES if split in now]
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
    """The other judges of the same images: {"judge", "lines": [(symbol, index, reading, before, after)]}, as the task
    reads them, or where such a judge cannot be read so, in the first reading that it has."""
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
    """Numbers of whole sets of images: (judge, [(name, value)], what was compared)."""
    found = []
    for judge, numbers in (metrics.get("sets") or {}).items() if metrics else ():
        protocol = numbers.get("protocol", {})
        references = protocol.get("references", "")
        against = "the unedited model's of the same prompts" if references == "originals" else f"those in {references}"
        compared = f"{protocol.get('images', '?')} images of the split {protocol.get('split', '?')} against {against}"
        values = [(k, "–" if v is None else charts.number(v)) for k, v in numbers.items() if k != "protocol"]
        found.append((judge, values, compared))
    return found
