"""The content that is tracked, in a form that no tracker owns: settings, final numbers, tables, images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from realera import costs
from realera.evaluation import attacked
from realera.evaluation.measures import ORDER
from realera.evaluation.results import scalars
from realera.files.pictures import read_picture
from realera.reporting.run_page import is_blurred
from realera.reporting.sheets import blurred, image_rows
from realera.runs.folders import Run
from realera.settings.instantiate import locate
from realera.settings.run_settings import Settings
from realera.sweeps import jobs
from realera.tracking.panels import SURFACES

ROWS_PER_SPLIT = 12  # images of each split in the table, unless logger.images says otherwise
SHORT = 100  # entries; a longer list (such as 30,000 captions of a protocol) is logged as its length
TAGGED = 5  # concepts that become tags: the first ones
GAP = 2  # pixels between the images of a grid
IMAGES = ("original", "erased")  # the columns of `sheets` that have images


@dataclass(frozen=True)
class Picture:
    """An image of the run folder. hidden: trackers get it blurred."""

    file: Path
    hidden: bool

    def image(self) -> Image.Image:
        return blurred(self.file) if self.hidden else read_picture(self.file)


@dataclass(frozen=True)
class Table:
    """Rows of texts, numbers, None and `Picture`s."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def words(self) -> Table:
        """The table without its columns of images."""
        kept = [i for i, name in enumerate(self.columns) if name not in IMAGES]
        return Table([self.columns[i] for i in kept], [[row[i] for i in kept] for row in self.rows])


@dataclass(frozen=True)
class Numbers:
    """scalars: {name: value}. curves: {name: [(step, value)]}, of an attack's own steps."""

    scalars: Mapping[str, float]
    curves: Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True)
class Results:
    """The results of a run that was judged.

    scalars: eval/* and cost/*. curves: of its attacks (`Numbers`). tables: `cell`, the run's numbers in one row, for
    charts over runs; and `sheets`, (prompt, seed, split, original, erased, verdict) of the first images of each split,
    unless logger.images is 0.
    """

    scalars: Mapping[str, float]
    settings: Mapping[str, Any]
    protocol: Mapping[str, Any]
    tables: Mapping[str, Table]
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)

    def grids(self) -> Iterator[tuple[str, Image.Image]]:
        """(split, image) for each split: one row with the original's image and the erased model's for each prompt."""
        if (sheets := self.tables.get("sheets")) is None:
            return
        split, *pair = (sheets.columns.index(name) for name in ("split", *IMAGES))
        for name in dict.fromkeys(row[split] for row in sheets.rows):
            yield str(name), grid([[row[i] for i in pair] for row in sheets.rows if row[split] == name])


def results_of(run: Run, metrics: Mapping[str, Any]) -> Results:
    """The results in a run's folder. Images that the page blurs (`blur`) are blurred."""
    spent = costs.scalars(costs.read(run.folder))
    named = {f"eval/{name}": value for name, value in scalars(metrics).items()}
    asked = run.settings.logger.images
    most = ROWS_PER_SPLIT if asked is None else asked
    tables = {"cell": _cell(run, metrics, spent)}
    if most:
        tables["sheets"] = _sheets(run, metrics, most, is_blurred(run.config, metrics))
    numbers = {**named, **{f"cost/{name}": value for name, value in spent.items()}}
    curves = attacks_of(metrics.get("attacks", {})).curves
    return Results(numbers, settings_of(run), loggable(metrics["protocol"]), tables, curves)


def attacks_of(attacks: Mapping[str, Any]) -> Numbers:
    """The numbers of attacks, {name: numbers}: eval/attacks/<name>/asr and so on, also where the run itself was not
    judged."""
    head = "eval/attacks"
    return Numbers(
        {f"{head}/{name}": value for name, value in attacked.scalars(attacks).items()},
        {f"{head}/{name}": curve for name, curve in attacked.curves(attacks).items()},
    )


def settings_of(run: Run) -> dict[str, Any]:
    """A run's settings and its system, as a tracker shows them."""
    return {**loggable(run.config), "system": system(run)}


def system(run: Run) -> str:
    """The run's system in tables of several runs."""
    return jobs.system(run.config)


def job_type(run: Run) -> str:
    return "evaluate" if run.settings.unedited else "train"


def facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The names by which runs are filtered: {"task", "method", "backbone", "concepts": the first ones}."""
    settings = Settings(config)
    parts = {"method": settings.method.name, "backbone": settings.backbone.name}
    concepts = [] if settings.concept is None else settings.concepts
    more = [f"and {len(concepts) - TAGGED} more"] if len(concepts) > TAGGED else []
    task = getattr(locate(str(settings.task.target)), "name", None)
    return {"task": task, **parts, "concepts": [*concepts[:TAGGED], *more]}


def loggable(node: Any) -> Any:
    """Settings in a form that trackers can store and show: without long lists and infinite numbers."""
    if isinstance(node, Mapping):
        short = len(node) <= SHORT
        return {str(key): loggable(value) for key, value in node.items()} if short else f"{len(node)} entries"
    if isinstance(node, (list, tuple)):
        return [loggable(value) for value in node] if len(node) <= SHORT else f"{len(node)} entries"
    return str(node) if isinstance(node, float) and not math.isfinite(node) else node


def grid(rows: Sequence[Sequence[Picture | None]]) -> Image.Image:
    """Images in rows and columns. All have the size of the first one; None leaves a white place."""
    images = [[None if one is None else one.image().convert("RGB") for one in row] for row in rows]
    wide, high = next(one.size for row in images for one in row if one is not None)
    made = Image.new("RGB", ((wide + GAP) * max(map(len, rows)) - GAP, (high + GAP) * len(rows) - GAP), "white")
    for y, row in enumerate(images):
        for x, one in enumerate(row):
            if one is not None:
                made.paste(one.resize((wide, high)), (x * (wide + GAP), y * (high + GAP)))
    return made


def _cell(run: Run, metrics: Mapping[str, Any], spent: Mapping[str, float]) -> Table:
    """One row: run, system, concept, settings, and the main metrics with their intervals (None if not measured)."""
    mining = run.settings.method.neighbours.node
    row: dict[str, Any] = {"run": run.folder.name, "system": system(run), "seed": run.settings.seed}
    row["concept"] = ", ".join(c["target"] for c in metrics["protocol"].get("concepts", [])[:TAGGED])
    row |= {axis: loggable(mining.get(axis)) for pair in SURFACES for axis in pair}
    for name in ORDER:
        estimate = metrics["main"].get(name) or {}
        row |= {f"{name}{end}": estimate.get(key) for end, key in (("", "value"), ("_low", "low"), ("_high", "high"))}
    row |= {name: spent.get(name) for name in ("seconds", "passes")}  # to erase
    return Table(list(row), [list(row.values())])


def _sheets(run: Run, metrics: Mapping[str, Any], most: int, hidden: bool) -> Table:
    """Images before and after erasing with their verdict, the first `most` of each split."""

    def picture(file: Path | None) -> Picture | None:
        return None if file is None else Picture(file, hidden)

    rows: list[list[Any]] = []
    taken: dict[str, int] = {}
    judge, headline = metrics["protocol"]["judge"]["judge"], metrics["headline"]
    for prompt, seed, split, original, erased, verdict in image_rows(run.folder, judge, headline):
        taken[split] = taken.get(split, 0) + 1
        if taken[split] <= most:
            before, after = (erased, None) if run.settings.unedited else (original, erased)
            rows.append([prompt, seed, split, picture(before), picture(after), verdict])
    return Table(["prompt", "seed", "split", *IMAGES, "verdict"], rows)
