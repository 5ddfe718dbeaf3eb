"""Image sheets of a sweep: one row per system, the original model on top, and one column per prompt and seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from realera.contracts import Split
from realera.evaluation.records import ManifestEntry, Which, read_manifest, read_verdicts, verdict_file
from realera.reporting.pooling import ORIGINAL
from realera.reporting.sheets import Picture, picture
from realera.reporting.sweep.chapter import Chapter
from realera.reporting.sweep.systems import JudgedRun
from realera.settings.run_settings import Settings

COLUMNS: Mapping[Split, int] = {"erase": 3, "near": 3, "keep": 3, "associated": 1}  # images of each split in a row
MOST_CONCEPTS, MOST_SYSTEMS = 6, 30  # limits of a page


@dataclass(frozen=True)
class Sheet:
    """heads: (prompt, split) of each column. rows: (system, its pictures; None for a prompt without an image)."""

    concept: str
    seed: int
    heads: tuple[tuple[str, Split], ...]
    rows: tuple[tuple[str, tuple[Picture | None, ...]], ...]

    @property
    def judged(self) -> bool:
        """Whether any picture has a verdict that is as wanted or not as wanted."""
        return any(shown is not None and shown.good is not None for _, images in self.rows for shown in images)


def sheets_of(chapter: Chapter) -> list[Sheet]:
    """One sheet for each of the first concepts, of its first seed."""
    found = []
    for concept in chapter.concepts[:MOST_CONCEPTS]:
        runs = {
            system: own[0]
            for system, all_runs in chapter.systems.items()
            if (own := sorted((run for run in all_runs if run.concept == concept), key=lambda run: run.seed))
        }
        if (sheet := _sheet(chapter, concept, runs)) is not None:
            found.append(sheet)
    return found


def cut(chapter: Chapter) -> str:
    """A sentence on the limits that the sheets reach; "" if they show everything."""
    systems = sum(ORIGINAL not in (name, runs[0].method) for name, runs in chapter.systems.items())
    counts = {"concepts": (len(chapter.concepts), MOST_CONCEPTS), "systems": (systems, MOST_SYSTEMS)}
    limits = [f"the first {most} of {count} {name}" for name, (count, most) in counts.items() if count > most]
    return f"Shown: {', '.join(limits)}." if limits else ""


def _sheet(chapter: Chapter, concept: str, runs: Mapping[str, JudgedRun]) -> Sheet | None:
    drawn = {system: {_key(row): row for row in read_manifest(run.folder)} for system, run in runs.items()}
    seed = min(run.seed for run in runs.values())
    most = max((rows for system, rows in drawn.items() if runs[system].seed == seed), key=len)
    columns: list[ManifestEntry] = []
    for split, count in COLUMNS.items():
        columns += _spread([row for row in most.values() if row.prompt.split == split], count)
    keys = [_key(row) for row in columns]

    def pictures(run: JudgedRun, which: Which) -> tuple[Picture | None, ...]:
        rows = {_key(row): row for row in read_manifest(run.folder)}
        file = verdict_file(run.folder, run.judge, which)
        verdicts = {v.prompt_id: v for v in read_verdicts(file)} if file.is_file() else {}
        shown: list[Picture | None] = []
        for key in keys:
            row = rows.get(key)
            if row is None or (which == "original" and row.original is None):
                shown.append(None)
            else:
                shown.append(picture(row.path(run.folder, which), row, verdicts.get(row.prompt.id), chapter.headline))
        return tuple(shown)

    own = [system for system in runs if system != ORIGINAL and runs[system].method != ORIGINAL]
    before = [system for system in runs if system not in own]
    top: list[tuple[str, tuple[Picture | None, ...]]] = []
    if before and Settings(runs[before[0]].config).method:
        top.append((before[0], pictures(runs[before[0]], "erased")))
    else:
        with_original = (runs[system] for system in runs if any(row.original for row in drawn[system].values()))
        top += [(ORIGINAL, pictures(run, "original")) for run in list(with_original)[:1]]
    rows = [*top, *((system, pictures(runs[system], "erased")) for system in own[:MOST_SYSTEMS])]
    if not own or not any(shown and shown.uri for _, images in rows for shown in images):
        return None
    return Sheet(concept, seed, tuple((row.prompt.text, row.prompt.split) for row in columns), tuple(rows))


def _key(row: ManifestEntry) -> tuple[str, str, int]:
    return row.prompt.split, row.prompt.text, row.prompt.seed


def _spread(rows: list[ManifestEntry], count: int) -> list[ManifestEntry]:
    """The first image of `count` evenly spaced texts; with fewer texts, their next images too."""
    by_text: dict[str, list[ManifestEntry]] = {}
    for row in rows:
        by_text.setdefault(row.prompt.text, []).append(row)
    texts = list(by_text)
    if len(texts) >= count:
        return [by_text[texts[i * len(texts) // count]][0] for i in range(count)]
    interleaved = [images[i] for i in range(count) for images in by_text.values() if i < len(images)]
    chosen = set(map(_key, interleaved[:count]))
    return [row for row in rows if _key(row) in chosen]
