"""The self-contained page of several runs, such as a sweep, with its tables and figures as files in the same folder."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from realera import paths
from realera.contracts import UserError
from realera.evaluation.bootstrap import DRAWS
from realera.evaluation.measures import ORDER, column_heading, near
from realera.reporting import cost_words, table_formats
from realera.reporting.pooling import ORIGINAL
from realera.reporting.run_page import is_blurred, render
from realera.reporting.sheets import first_pairs, sheets
from realera.reporting.sweep import plots
from realera.reporting.sweep.attacked import attack_sheet, attack_tables
from realera.reporting.sweep.beside import beside_tables
from realera.reporting.sweep.chapter import Chapter
from realera.reporting.sweep.figures import Line, Scatter, Surface, corrected, families, scatter
from realera.reporting.sweep.sheets import cut, sheets_of
from realera.reporting.sweep.systems import (
    JudgedRun,
    differing,
    name_systems,
    original_of,
    read_run,
    text_of,
)
from realera.reporting.sweep.tables import tables
from realera.reporting.sweep.trends import too_many
from realera.settings.run_settings import Settings
from realera.system import disk

TEMPLATE = "sweep_page.html.j2"
WITHOUT_RESULTS = ("failed", "refused")  # states of a cell without results


def write_sweep(
    folders: Sequence[Path],
    out: Path,
    cells: Sequence[Mapping[str, Any]] = (),
    blur: bool | None = None,
    base: str | None = None,
) -> Path:
    """Writes the page of several runs and returns its path. tables/<name>.{csv,tex,md} and, if matplotlib is installed,
    figures/<name>.{png,svg} go into the same folder.

    cells: lines of a sweep's cells.jsonl; they have the failed cells and the settings that the user typed. blur: as in
    `run_page.write_report`. base: the system that an additional table compares the others to. Missing folders and runs
    that have not been judged are counted on the page.

    Raises:
        UserError: no run has been judged, a file of a run is torn, no system is called `base`, or the folder of the
            tables or figures is a symbolic link.
    """
    paths.refuse_links(out.parent, (paths.TABLES, paths.FIGURES))
    read = _read(folders, cells)
    known = [run for run in read if run is not None]
    if not known:
        ended = [f"{_name_of(cell)}: {cell['state']}, {cell.get('reason')}" for cell in _lost(cells, ())]
        first = f" {len(ended)} ended without results, the first: {ended[0]}" if ended else ""
        raise UserError(f"none of these runs has been judged: finish them, or type evaluate=true.{first}")
    lost = _lost(cells, {os.path.abspath(run.folder) for run in known})
    listed = {os.path.abspath(cell["folder"]) for cell in lost if cell.get("folder")}
    waiting = {os.path.abspath(folder) for folder, run in zip(dict.fromkeys(folders), read) if run is None}
    typed = _typed(cells)
    twins: list[JudgedRun] = []
    chapters = []
    for name, title, runs in _chapters(known):
        runs, again = name_systems(runs, typed)
        twins += again
        chapters.append(Chapter(name, title, [*runs, *_originals(runs)], base=base))
    there = list(dict.fromkeys(system for chapter in chapters for system in chapter.systems))
    if base is not None and base not in there:
        raise UserError(f"these runs have no system called {base!r}: choose one of {', '.join(there)}.")
    written: list[Path] = []
    with_plots = plots.available()
    parts = [_content(chapter, typed, out.parent, blur) for chapter in chapters]
    figured, trends = corrected([part["families"] for part in parts])
    for part, found in zip(parts, figured):
        part["families"] = found
        for table in part["tables"]:
            written += table_formats.write(table, out.parent / paths.TABLES)
        figures: Iterable[Surface | Line | Scatter] = [figure for f in part["families"] for figure in f.figures]
        for figure in [*figures, *([part["scatter"]] if part["scatter"] else [])] if with_plots else ():
            written += plots.write(figure, out.parent / paths.FIGURES)
    content = {
        "count": len(known),
        "chapters": parts,
        "trends": trends,
        "too_many": too_many(trends, DRAWS),
        "shared": _shared(known),
        "lost": [(_name_of(cell), str(cell["state"]), str(cell.get("reason") or "no reason given")) for cell in lost],
        "unfinished": len(waiting - listed),
        "twins": [run.folder.name for run in twins],
        "veiled": any(run["veiled"] for part in parts for run in part["runs"]),
        "files": [Path(os.path.relpath(path, out.parent)).as_posix() for path in written],
        "with_plots": with_plots,
        "has_figures": any(path.parent.name == paths.FIGURES for path in written),
    }
    disk.write_text(out, render(TEMPLATE, content))
    return out


def systems(folders: Sequence[Path], cells: Sequence[Mapping[str, Any]] = ()) -> dict[Path, str]:
    """{run folder: its system in the tables of the page}, in their order."""
    read = [run for run in _read(folders, cells) if run is not None]
    return {
        run.folder: run.system
        for _, _, runs in _chapters(read)
        for run in name_systems(runs, _typed(cells))[0]
        if run.judged
    }


def _read(folders: Sequence[Path], cells: Sequence[Mapping[str, Any]]) -> list[JudgedRun | None]:
    """The runs, named as in the sweep's cells.jsonl: the same run may have another name in another sweep."""
    names = {
        os.path.abspath(cell["folder"]): cell["system"] for cell in cells if cell.get("system") and cell.get("folder")
    }
    return [read_run(folder, names.get(os.path.abspath(folder))) for folder in dict.fromkeys(folders)]


def _typed(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the settings that the user typed in the sweep's command."""
    words = (str(word) for cell in cells for word in cell.get("overrides") or ())
    return list(dict.fromkeys(word.partition("=")[0].lstrip("+~") for word in words))


def _chapters(runs: Sequence[JudgedRun]) -> list[tuple[str, str, list[JudgedRun]]]:
    """(stem of file names, title, runs) for each combination of task, model, judge and metrics."""
    parted: dict[tuple[Any, ...], list[JudgedRun]] = {}
    for run in runs:
        read = tuple(sorted(run.metrics["headline"].items())), tuple(run.metrics["h_o_terms"])
        parted.setdefault((run.task or "runs", run.backbone, run.judge, *read), []).append(run)
    found: list[tuple[str, str, list[JudgedRun]]] = []
    for (task, backbone, judge, *_), own in parted.items():
        name = paths.as_file_name("-".join([task, *([backbone] if len({key[1] for key in parted}) > 1 else [])]))
        taken = [other for other, _, _ in found]
        unique = name if name not in taken else f"{name}-{len(taken) + 1}"
        title = [f"on {backbone}" if backbone else "", f"judged by {judge}" if judge else ""]
        found.append((unique, ", ".join([task, *filter(None, title)]), own))
    return found


def _originals(runs: Sequence[JudgedRun]) -> list[JudgedRun]:
    """The original model as a system, from the images that the runs were compared to. Only if it has no runs of its own
    and these images exist for every concept and seed; else []."""
    if any(run.method == ORIGINAL for run in runs):
        return []
    found: dict[tuple[str, int], JudgedRun] = {}
    for run in runs:
        key = run.concept, run.seed
        if key not in found and (original := original_of(run)) is not None:
            found[key] = original
    wanted = {(run.concept, run.seed): None for run in runs if run.judged is not None}
    return [found[key] for key in wanted] if all(key in found for key in wanted) else []


def _content(chapter: Chapter, typed: Sequence[str], beside: Path, blur: bool | None) -> dict[str, Any]:
    """The template's values for a chapter. `runs` lists the runs that have a folder of their own."""
    runs = [run for run in chapter.runs if Settings(run.config).method or run.base != ORIGINAL]
    names = differing([run.settings for run in runs])
    shown = [_run(run, names, beside, blur) for run in runs]
    measured = bool(chapter.systems)
    return {
        "title": chapter.title,
        "tables": [*tables(chapter), *beside_tables(chapter), *attack_tables(chapter)] if measured else [],
        "attacks": attack_sheet(chapter) if measured else None,
        "families": families(chapter, typed) if measured else [],
        "scatter": scatter(chapter) if measured else None,
        "sheets": sheets_of(chapter) if measured else [],
        "cut": cut(chapter),
        "names": names,
        "near": near(chapter.runs[0].metrics.get("protocol") or {}),
        "heads": [
            (name, column_heading(name, run.metrics["main"][name]["mode"]))
            for name in ORDER
            for run in [next((r for r in runs if (r.metrics["main"].get(name) or {}).get("value") is not None), None)]
            if run is not None
        ],
        "faces": any(e["unscored"] for run in runs for e in run.metrics["main"].values()),
        "runs": shown,
        "costs": any(run["cost"] for run in shown),
        "veiled": any(is_blurred(run.config, run.metrics, blur) for run in runs),
    }


def _run(run: JudgedRun, names: Sequence[str], beside: Path, blur: bool | None) -> dict[str, Any]:
    page = run.folder / paths.REPORT
    sheet = sheets(run.folder, run.judge, run.metrics["headline"], only="erase") if run.judged is not None else {}
    return {
        "name": run.folder.name,
        "system": run.system,
        "link": quote(Path(os.path.relpath(page, beside)).as_posix()) if page.is_file() else "",
        "settings": [text_of(run.settings.get(name)) for name in names],
        "measures": run.metrics["main"],
        "cost": [f"{number} {what}" for what, number in cost_words.parts(run.judged.costs)[:2]] if run.judged else [],
        "pairs": first_pairs(sheet),
        "veiled": is_blurred(run.config, run.metrics, blur),
    }


def _shared(runs: Sequence[JudgedRun]) -> list[tuple[str, str]]:
    """(label, value) of facts that all runs share."""
    facts = {
        "task": {run.task for run in runs},
        "model": {run.backbone for run in runs},
        "judge": {run.judge for run in runs},
        "concept": {run.concept for run in runs},
        "method": {run.method for run in runs},
    }
    found = [(name, values.pop()) for name, values in facts.items() if len(values) == 1]
    seeds = sorted({run.seed for run in runs})
    return [*((name, value) for name, value in found if value), ("seeds", ", ".join(map(str, seeds)))]


def _lost(cells: Sequence[Mapping[str, Any]], known: Container[str | None]) -> list[Mapping[str, Any]]:
    """The cells without results. A later cell with the same overrides or the same folder replaces an earlier one.
    known: folders that have results, from any command."""
    lost: list[Mapping[str, Any]] = []
    for cell in cells:
        name, folder = _name_of(cell), _folder(cell)
        lost = [old for old in lost if _name_of(old) != name and (not _folder(old) or _folder(old) != folder)]
        if cell.get("state") in WITHOUT_RESULTS:
            lost.append(cell)
    return [cell for cell in lost if _folder(cell) not in known]


def _name_of(cell: Mapping[str, Any]) -> str:
    return " ".join(map(str, cell.get("overrides") or ())) or Path(str(cell.get("folder") or "?")).name


def _folder(cell: Mapping[str, Any]) -> str | None:
    """The cell's folder. None for a cell that judges a run again: its results come from before."""
    again = any(str(word).startswith("run=") for word in cell.get("overrides") or ())
    return None if again or not cell.get("folder") else os.path.abspath(cell["folder"])
