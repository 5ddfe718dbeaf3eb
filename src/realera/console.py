"""What a person sees in the terminal: progress bars, and the table a run ends with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from realera import paths

console = Console()
MEASURES = {  # in the order they are read, with what is wanted of them
    "acc_e": "Acc_e ↓ concept by name",
    "acc_s": "Acc_s ↑ other concepts",
    "acc_g": "Acc_g ↓ its synonyms",
    "h_o": "H_o   ↑ the three as one",
    "acc_a": "Acc_a ↓ associations",
    "acc_u": "Acc_u ↓ other words",
}


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar that says what is being done; yields the function that is told how many more are done."""
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)


def results(metrics: Mapping[str, Any], title: str, erased: str = "erased") -> Table:
    """Accuracies and H_o in percent with 95% intervals, of the original model where it was judged, and of this one."""
    mode = metrics["headline"]
    before = (metrics.get("original") or {}).get(mode)
    table = Table(title=title, title_justify="left", caption=_caption(metrics), caption_justify="left")
    table.add_column("%", no_wrap=True)
    if before:
        table.add_column("original", justify="right", no_wrap=True)
    table.add_column(erased, justify="right", no_wrap=True)
    table.add_column("images", justify="right")
    for name, label in MEASURES.items():
        now = metrics[mode].get(name)
        if now and now["n"] + now["unscored"]:
            cells = [_cell(before.get(name))] if before else []
            table.add_row(label, *cells, _cell(now), _count(now), end_section=name == "h_o")
    return table


def show_run(folder: Path, metrics: Mapping[str, Any], title: str, erased: str = "erased") -> None:
    """The table a run ends with, and the paths of its weights and of its page."""
    console.print()
    console.print(results(metrics, title, erased))
    if (folder / paths.ERASED).is_file():
        show_path("weights", folder / paths.ERASED)
    if (folder / paths.REPORT).is_file():
        show_path("page to open", folder / paths.REPORT)


def show_path(what: str, path: Path) -> None:
    """A path on a line of its own, never wrapped, so that it can be copied."""
    console.print(f"{what}: {path}", soft_wrap=True, highlight=False, markup=False)


def _cell(estimate: Mapping[str, Any] | None) -> str:
    if not estimate or estimate["value"] is None:
        return "-"
    if estimate["low"] is None:
        return f"{estimate['value']:.1f}"
    return f"{estimate['value']:.1f} \\[{estimate['low']:.1f}, {estimate['high']:.1f}]"


def _count(estimate: Mapping[str, Any]) -> str:
    unscored = f" + {estimate['unscored']} unscored" if estimate["unscored"] else ""
    return f"{estimate['n']}{unscored}"


def _caption(metrics: Mapping[str, Any]) -> str:
    mode = {"mean_prob": "mean probability", "top1": "top-1"}.get(metrics["headline"], metrics["headline"])
    return f"{mode}; 95% intervals by bootstrap over images"
