"""Terminal output: progress bars and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from realera import costs, paths
from realera.evaluation.measures import (
    EXTRA_LABELS,
    ORDER,
    READINGS,
    WHAT,
    column_heading,
    described,
    extra,
    mode_of,
    near,
    some_unscored,
    symbol,
)
from realera.evaluation.summary import attack_rows
from realera.paths import printable
from realera.reporting import cost_words, residue_words
from realera.system.terminal import bars_hidden

console = Console()
STATES = {"done": "done", "found": "already finished", "refused": "refused", "failed": "failed"}  # a sweep's cells
MOST_CONCEPTS = 12  # erased concepts in the terminal; metrics.json has all of them
MOST_TEXTS = 24  # texts per concept in the terminal; residue.json has all of them
COUNTED = ("prompts", "passes", "text_passes")  # of an attack in a plan
MOST = 10  # reasons of refused cells in a plan; plan.json has all of them


@contextmanager
def bar(what: str, total: int, rate: str | None = None) -> Iterator[Callable[[int], None]]:
    """A progress bar; yields a function that advances it by a number of items. what: its label, as plain text without
    markup. rate: unit of an additional speed column, such as "captions/s"."""
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *([_Rate(rate)] if rate else []),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=bars_hidden()) as progress:
        task = progress.add_task(_plain(what), total=total)
        yield lambda done: progress.advance(task, done)


@contextmanager
def hidden_bar() -> Iterator[Callable[[int], None]]:
    """Replaces `bar` for work so short that a bar would only flicker."""
    yield lambda done: None


class _Rate(ProgressColumn):
    """Recent items per second."""

    def __init__(self, unit: str) -> None:
        super().__init__(Column(no_wrap=True))
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f} {self.unit}")


def results(metrics: Mapping[str, Any], title: str, erased: str = "erased") -> Table:
    """Each measure by the task's metric with its 95% interval, for the original model (if judged) and for this one. If
    several concepts were erased together, Acc_e of each follows."""
    main = metrics["main"]
    before = (metrics.get("original") or {}).get("main")
    modes = [mode_of(main, name) for name in ORDER if name in main and name != "h_o" and _measured(main[name])]
    table = Table(title=_plain(title), title_justify="left", caption=_caption(modes, metrics), caption_justify="left")
    units = {READINGS[mode].unit for mode in modes if mode}
    table.add_column("%" if units <= {"%"} else "", no_wrap=True)
    if before:
        table.add_column("original", justify="right", no_wrap=True)
    table.add_column(erased, justify="right", no_wrap=True)
    table.add_column("images", justify="right")

    def add(label: str, now: Mapping[str, Any], was: Mapping[str, Any] | None, end: bool = False) -> None:
        cells = [_cell(was)] if before else []
        table.add_row(label, *cells, _cell(now), _images(now), end_section=end)

    width = max((len(column_heading(name, mode_of(main, name))) for name in ORDER if name in main), default=0)
    for name in ORDER:
        if name in main and _measured(main[name]):
            what = f"{near(metrics.get('protocol') or {})}s" if name == "acc_g" else WHAT[name]
            label = f"{column_heading(name, mode_of(main, name)):<{width}} {what}"
            last = name == ("h_o" if "h_o" in main else "acc_g")
            add(label, main[name], (before or {}).get(name), end=last)
    was = {(measure, mode): said for measure, mode, said in extra(metrics.get("original") or {})}
    for measure, mode, said in extra(metrics):
        add(f"{column_heading(measure, mode)} {EXTRA_LABELS[mode]}", said, was.get((measure, mode)))
    concepts = metrics.get("concepts", {})
    originals = (metrics.get("original") or {}).get("concepts", {})
    if table.rows:
        table.rows[-1].end_section = True
    for concept in list(concepts)[:MOST_CONCEPTS]:
        add(_plain(concept), concepts[concept]["acc_e"], originals.get(concept, {}).get("acc_e"))
    if len(concepts) > MOST_CONCEPTS:
        table.add_row(f"and {len(concepts) - MOST_CONCEPTS} more in {paths.METRICS}")
    return table


def show_run(folder: Path, metrics: Mapping[str, Any], title: str, erased: str = "erased") -> None:
    """Shows a run's results and costs, and the paths of its weights and its page."""
    console.print()
    console.print(results(metrics, title, erased))
    for judge, numbers in metrics.get("sets", {}).items():
        values = (f"{name} {value:.4g}" for name, value in numbers.items() if isinstance(value, (int, float)))
        _say(f"{judge}: {', '.join(values)}")
    if spent := cost_words.sentence(costs.read(folder)):
        _say(f"cost: {spent}")
    if (folder / paths.ERASED).is_file():
        show_path("weights", folder / paths.ERASED)
    if (folder / paths.REPORT).is_file():
        show_path("page to open", folder / paths.REPORT)


def show_residue(found: Mapping[str, Any]) -> None:
    """Shows for every concept the texts that drew it before erasing, and the user's own texts. found: residue.json."""
    for concept in found["concepts"]:
        judged = found["judge"] is not None
        table = Table(
            title=_plain(concept["concept"]), title_justify="left", caption=_plain(residue_words.sentence(concept))
        )
        table.caption_justify = "left"
        for column in ("text", "before", "after", *(["judged, %"] if judged else []), ""):
            table.add_column(column, justify="left" if column in ("text", "") else "right")
        name, *others = concept["texts"]
        rows = [row for row in others if row["own"] or row["state"] != "never"]
        for row in (name, *rows[:MOST_TEXTS]):
            said = [row.get(f"judged_{when}") for when in ("before", "after")]
            shares = " → ".join("–" if share is None else f"{share:.0f}" for share in said) if "pictures" in row else ""
            cells = [_plain(row["text"]), f"{row['before']:.2f}", f"{row['after']:.2f}", *([shares] if judged else [])]
            table.add_row(*cells, residue_words.state(row), end_section=row is name)
        if (more := len(rows) - MOST_TEXTS) > 0:
            table.add_row(f"and {more} more in {paths.RESIDUE}")
        console.print()
        console.print(table)
    for line in residue_words.key(found):
        _say(line)


def show_attack_plan(plan: Any, name: str, hindrance: str | None = None) -> None:
    """Shows the planned work of an attack (`attacking.AttackPlan`)."""
    hours = "?" if plan.hours is None else f"{plan.hours:.2f}"
    texts = f"at most {plan.text_passes:,.0f} text-encoder passes, " if plan.text_passes else ""
    _say(
        f"attack {name}: {_count(plan.prompts, 'prompt')}, at most {plan.passes:,.0f} denoiser passes, {texts}"
        f"{hours} hours ({plan.basis})"
    )
    for sentence in plan.needs:
        _say(sentence)
    if hindrance:
        _say(f"this is a plan only; on this machine the attack could not start now: {hindrance}")


def show_attack(name: str, numbers: Mapping[str, Any], title: str, unedited: bool = False) -> None:
    """Shows the numbers of an attack. unedited: on the unedited model."""
    table = Table(title=_plain(f"{title}, attacked by {name}"), title_justify="left")
    table.add_column("% of prompts that draw the concept", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    for key, words in attack_rows(unedited).items():
        table.add_row(words, _cell(numbers[key]))
    console.print()
    console.print(table)
    cost, steps = numbers["cost"], numbers["steps"]
    texts = f"{cost['text_passes']:,.0f} text-encoder passes, " if cost.get("text_passes") else ""
    _say(
        f"{_count(numbers['prompts'], 'prompt')}, {_count(cost['draws'], 'image')}, {cost['passes']:,.0f} denoiser "
        f"passes, {texts}{cost['seconds']:.0f} s" + (f"; won at step {steps['median']:g} (median)" if steps else "")
    )
    if "returned" in numbers:
        from realera.evaluation.attacked import return_sentence  # only here: --help is quick without it

        _say(return_sentence(numbers["returned"]))


def show_plan(plan: Mapping[str, Any]) -> None:
    """Shows the planned amount of work of a run or a sweep."""
    if 0 < plan["cells"] == plan["refused"]:
        _say("planned: nothing, because all jobs are refused" if plan["cells"] > 1 else "planned: nothing")
    else:
        console.print(_attacks_planned(plan) if plan.get("attacks") else _planned(plan))
        _say(f"hours: {plan['basis']}")
    for sentence in plan.get("needs", ()):
        _say(sentence)
    for reason, cells in list(plan["refusals"].items())[:MOST]:
        _say(f"refused ({cells}): {reason}")
    if (more := len(plan["refusals"]) - MOST) > 0:
        console.print(f"and {more} more reasons")
    for reason in plan.get("hindrances", ()):
        _say(f"this is a plan only; on this machine the run could not start now: {reason}")


def _planned(plan: Mapping[str, Any]) -> Table:
    table = Table(title="planned", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    finished = ", ".join(f"{plan[state]} {state}" for state in ("finished", "refused") if plan[state])
    table.add_row("cells", f"{plan['cells']}" + (f" ({finished})" if finished else ""))
    table.add_row("images of erased models", f"{plan['images']:,}")
    table.add_row("images of the original, drawn once", f"{plan['original_images']:,}")
    table.add_row("images to judge", f"{plan['judged']:,}")
    table.add_row("training steps", f"{plan['train_steps']:,}")
    if plan.get("attacked"):
        table.add_row("prompts to attack", f"{plan['attacked']:,}")
        table.add_row("denoiser passes of the attacks, at most", f"{plan['passes_of_attacks']:,}")
    if plan.get("text_passes_of_attacks"):
        table.add_row("text-encoder passes of the attacks, at most", f"{plan['text_passes_of_attacks']:,}")
    table.add_row("hours", _hours(plan["hours"]))
    if plan.get("half_hours") is not None:
        table.add_row("hours with the denoiser in half precision", f"{plan['half_hours']:.2f}")
    return table


def _attacks_planned(plan: Mapping[str, Any]) -> Table:
    """A row for each attack on each run, and the total, in which a search that several jobs share counts once."""
    refused = f" ({plan['refused']} of {plan['cells']} refused)" if plan["refused"] else ""
    table = Table(title=f"planned{refused}", title_justify="left", show_footer=True)
    totals = (plan["attacked"], plan["passes_of_attacks"], plan["text_passes_of_attacks"])
    footers = ["total", "", *(f"{total:,}" for total in totals), _hours(plan["hours"])]
    headings = ("run", "attack", "prompts", "denoiser passes, at most", "text-encoder passes, at most", "hours")
    for heading, footer in zip(headings, footers):
        name = heading in ("run", "attack")
        table.add_column(heading, footer=footer, justify="left" if name else "right", overflow="fold")
    for row in plan["attacks"]:
        numbers = (
            ["finished"] + [""] * 3
            if row["finished"]
            else [f"{row[key]:,}" for key in COUNTED] + [_hours(row["hours"])]
        )
        table.add_row(_plain(row["run"]), _plain(row["attack"]), *numbers)
    return table


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def _hours(hours: float | None) -> str:
    return "?" if hours is None else f"{hours:.{1 if hours >= 10 else 2}f}"


def show_cells(cells: Sequence[Mapping[str, Any]]) -> None:
    """Shows how many cells of a sweep ended in each state, and the reasons of those that did not finish."""
    count = {state: sum(cell["state"] == state for cell in cells) for state in STATES}
    console.print()
    console.print(", ".join(f"{count[state]} {label}" for state, label in STATES.items() if count[state]))
    lost = [cell for cell in cells if cell["reason"]]
    if lost:
        shared = set(cells[0]["overrides"]).intersection(*(cell["overrides"] for cell in cells[1:]))
        table = Table("cell", "reason", title="not finished", title_justify="left")
        for cell in lost:
            own = [word for word in cell["overrides"] if word not in shared or len(cells) == 1]
            table.add_row(_plain(" ".join(own)), _plain(cell["reason"]))
        console.print(table)


def show_applied(rows: Sequence[tuple[str, Path, str, str]], out: Path) -> None:
    """Shows the state of every checkpoint, and below the table why some were not written. rows: (checkpoint, folder
    that is written, state, reason or "")."""
    table = Table("checkpoint", f"folder in {_plain(str(out))}", "", title="maps applied", title_justify="left")
    for source, place, state, _ in rows:
        table.add_row(_plain(source), _plain(place.name), state)
    console.print()
    console.print(table)
    for source, _, state, reason in rows:
        if reason:
            console.print(printable(f"{state}: {source}: {reason}"), soft_wrap=True, highlight=False, markup=False)


def show_path(what: str, path: Path | str) -> None:
    """Prints a path or an address on its own line, unwrapped, so that it can be copied."""
    console.print(printable(f"{what}: {path}"), soft_wrap=True, highlight=False, markup=False)


def _say(line: str) -> None:
    """Prints a line that may contain texts from settings and files."""
    console.print(printable(line), highlight=False, markup=False)


def _plain(text: str) -> str:
    """Escapes a text from settings or files for rich's markup, on one line."""
    return escape(printable(text))


def _cell(estimate: Mapping[str, Any] | None) -> str:
    if not estimate or estimate["value"] is None:
        return "-"
    if estimate["low"] is None:
        return f"{estimate['value']:.1f}"
    return f"{estimate['value']:.1f} \\[{estimate['low']:.1f}, {estimate['high']:.1f}]"


def _images(estimate: Mapping[str, Any]) -> str:
    """ "40", or "38/40" if two could not be scored."""
    return f"{estimate['n']}" + (f"/{estimate['n'] + estimate['unscored']}" if estimate["unscored"] else "")


def _measured(estimate: Mapping[str, Any]) -> bool:
    return bool(estimate["n"] + estimate["unscored"])


def _caption(modes: Sequence[str | None], metrics: Mapping[str, Any]) -> str:
    """The metrics. If some images could not be scored (without a face, for example), also the share that could, by
    measure: "Acc_e 99 → 71"."""
    text = "; ".join(part for part in (described(modes), "95% intervals by bootstrap over images") if part)
    if not some_unscored(metrics):
        return text
    before = (metrics.get("original") or {}).get("main", {})
    shares = []
    for name, now in metrics["main"].items():
        found = [e["scored"] for e in (before.get(name), now) if e and e["scored"] is not None]
        if found and name != "h_o":
            shares.append(
                f"{_plain('_'.join(symbol(name, now['mode'])))} {' → '.join(f'{share:.0f}' for share in found)}"
            )
    return f"{text}\nscored images, % (the rest are left out): {', '.join(shares)}"
