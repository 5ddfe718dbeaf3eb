"""The attacks of a sweep's systems: a table of success rates, and one row of images for each system."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from realera import paths
from realera.contracts import Split
from realera.evaluation import attacked
from realera.evaluation.records import read_manifest, read_verdicts, verdict_file
from realera.reporting import attacked_systems
from realera.reporting.sheets import Picture, picture, plain_picture
from realera.reporting.sweep.chapter import Chapter
from realera.reporting.sweep.systems import JudgedRun
from realera.reporting.sweep.tables import row_of, table_of
from realera.reporting.table_formats import Column, Number, Table
from realera.settings.run_settings import Settings

KEPT = "acc_s"


@dataclass(frozen=True)
class AttackSheet:
    """heads: "original", "as it is", "kept" and the attacks. rows: (system, its pictures; None without an image)."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Picture | None, ...]], ...]


def attack_tables(chapter: Chapter) -> list[Table]:
    """[the table], or [] if no run was attacked. Systems without attacks are left out."""
    names = attacks_of(chapter)
    if not names:
        return []
    systems = [
        system for system, runs in chapter.systems.items() if any(_lines(run, name) for run in runs for name in names)
    ]
    columns = [Column("pre_asr", "as it is", better=-1), *chapter.columns([KEPT] if KEPT in chapter.measures else [])]
    columns += [Column(f"asr_{name}", name, group="attacked", better=-1) for name in names]
    rows = []
    for system in systems:
        runs = chapter.systems[system]
        plain = [line for run in _own(runs) for line in attacked_systems.plain_lines_of(run.folder, names)]
        numbers = [_share(chapter, plain, "plain")]
        if KEPT in chapter.measures:
            kept = chapter.means[system].get(KEPT)
            numbers.append(None if kept is None else Number(kept.value, *kept.interval()))
        numbers += [_share(chapter, [line for run in runs for line in _lines(run, name)], "shown") for name in names]
        rows.append(row_of(chapter, system, numbers, among=systems))
    made = table_of(chapter, "attacks", "Under attack", ("system",), columns, rows)
    note = (
        "Percent of the attacked prompts for which the judge finds the concept: with the prompt as it is and under "
        "each attack. Intervals over prompts."
    )
    return [replace(made, notes=(note, *made.notes[1:]))]


def attacks_of(chapter: Chapter) -> list[str]:
    """The attacks of the chapter's runs, in alphabetical order."""
    return attacked_systems.attacks_of([run.folder for runs in chapter.systems.values() for run in _own(runs)])


def _own(runs: Sequence[JudgedRun]) -> list[JudgedRun]:
    """The runs with a folder of their own: not the original model's images of other runs."""
    return [run for run in runs if Settings(run.config).method]


def _lines(run: JudgedRun, name: str) -> list[attacked.Line]:
    """The lines behind the run's numbers of an attack."""
    return attacked_systems.lines_of(run.folder, name) if _own([run]) else []


def _share(chapter: Chapter, lines: Sequence[attacked.Line], key: str) -> Number | None:
    if not lines:
        return None
    found = attacked_systems.share(lines, key, chapter.resamples).estimate()
    return Number(found.value, found.low, found.high)


# --- images ----------------------------------------------------------------------------------------------------------


def attack_sheet(chapter: Chapter) -> AttackSheet | None:
    """One row of images for each system that was attacked, of its first run; None without attacks."""
    names = attacks_of(chapter)
    rows = []
    for system, runs in chapter.systems.items():
        run = next((run for run in _own(runs) if attacked.numbers(run.folder)), None)
        if run is not None:
            images = [_before(run, names), _of_split(run, "erase"), _of_split(run, "keep")]
            rows.append((system, (*images, *(_back(run, name) for name in names))))
    return AttackSheet(("original", "as it is", "kept", *names), tuple(rows)) if rows else None


def _before(run: JudgedRun, names: Sequence[str]) -> Picture | None:
    """The original model's image of the first attacked prompt; None if the run is the original model's own, whose image
    as it is that is."""
    if Settings(run.config).unedited:
        return None
    for name in names:
        for line in _lines(run, name)[:1]:
            file = paths.inside(attacked.folder(run.folder, name), f"{paths.ORIGINALS}/{line['id']}.png")
            return plain_picture(file, f"{line['prompt']}: the original model", "")
    return None


def _of_split(run: JudgedRun, split: Split) -> Picture | None:
    """The run's first image of a split, with its verdict."""
    verdicts = {verdict.prompt_id: verdict for verdict in read_verdicts(verdict_file(run.folder, run.judge))}
    for row in read_manifest(run.folder):
        if row.prompt.split == split:
            return picture(row.path(run.folder), row, verdicts.get(row.prompt.id), run.metrics["headline"])
    return None


def _back(run: JudgedRun, name: str) -> Picture | None:
    """The first image that shows the concept again, else the first one."""
    lines = sorted(_lines(run, name), key=lambda line: not line["shown"])
    if not lines or lines[0]["image"] is None:
        return None
    line = lines[0]
    text = line["text"] or line["said"] or line["prompt"]
    return replace(
        plain_picture(paths.inside(run.folder, line["image"]), text, line["label"] or ""), good=not line["shown"]
    )
