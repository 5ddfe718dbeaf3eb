"""Before and after, side by side: pairs of images of the same prompt and seed, as data for the report and for W&B."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from realera.contracts import Split, Verdict
from realera.evaluation.records import Row, Which, read_manifest, read_verdicts, verdict_file

SHOWN = 8  # images per prompt on a sheet
_LARGEST = 192  # pixels a side, in the page: larger images are shrunk and sent as JPEG


@dataclass(frozen=True)
class Picture:
    """An image and what the judge said of it. uri: a data URI, "" where the file is missing. good: whether the verdict
    is what erasing wants; None where nothing was said. small: enlarge it with hard pixels."""

    uri: str
    label: str
    title: str
    good: bool | None
    small: bool


@dataclass(frozen=True)
class Strip:
    """One prompt: pairs (before or None, after) of its first seeds, and how many there are in all."""

    prompt: str
    pairs: list[tuple[Picture | None, Picture]]
    images: int


def image_rows(run_dir: Path, judge: str) -> list[list[Any]]:
    """For a logger's image table: [prompt, seed, split, original path or None, erased path, verdict] for every image of
    the manifest. verdict: the label and what the judge gives the concept ("sky (airplane 0.02)"), "unscored", or ""."""
    verdicts = _verdicts(run_dir, judge, "erased")
    rows: list[list[Any]] = []
    for row in read_manifest(run_dir):
        p, said = row.prompt, verdicts.get(row.prompt.id)
        text = (
            ""
            if said is None
            else "unscored"
            if math.isnan(said.value)
            else f"{said.label} ({p.concept} {said.value:.2f})"
        )
        original = run_dir / row.original if row.original else None
        rows.append([p.text, p.seed, p.split, original, run_dir / row.file, text])
    return rows


def sheets(run_dir: Path, judge: str | None, shown: int = SHOWN) -> dict[Split, list[Strip]]:
    """A strip per prompt, by split, in the manifest's order. The prompt of a split of one shows twice as many."""
    after = _verdicts(run_dir, judge, "erased")
    before = _verdicts(run_dir, judge, "original")
    by_split: dict[Split, dict[str, list[Row]]] = {}
    for row in read_manifest(run_dir):
        by_split.setdefault(row.prompt.split, {}).setdefault(row.prompt.text, []).append(row)
    return {
        split: [
            Strip(
                text,
                [_pair(run_dir, row, before, after) for row in rows[: shown * (2 if len(strips) == 1 else 1)]],
                len(rows),
            )
            for text, rows in strips.items()
        ]
        for split, strips in by_split.items()
    }


def _verdicts(run_dir: Path, judge: str | None, which: Which) -> dict[str, Verdict]:
    file = verdict_file(run_dir, judge or "", which)
    return {v.prompt_id: v for v in read_verdicts(file)} if file.is_file() else {}


def _pair(
    run_dir: Path, row: Row, before: dict[str, Verdict], after: dict[str, Verdict]
) -> tuple[Picture | None, Picture]:
    original = None if row.original is None else _picture(run_dir / row.original, row, before.get(row.prompt.id))
    return original, _picture(run_dir / row.file, row, after.get(row.prompt.id))


def _picture(file: Path, row: Row, said: Verdict | None) -> Picture:
    uri, small = _data_uri(file)
    prompt = row.prompt
    title = f"{prompt.text}, seed {prompt.seed}"
    if said is None:
        return Picture(uri, "", title, None, small)
    if math.isnan(said.value):
        return Picture(uri, "unscored", f"{title}: unscored", None, small)
    seen = said.label.lower() == prompt.concept.lower()
    title = f"{title}: the judge sees {said.label}; {prompt.concept} {100 * said.value:.1f}%"
    if second := said.detail.get("second"):
        title += f"; second opinion {second}"
    return Picture(uri, said.label, title, seen == (prompt.split == "keep"), small)


def _data_uri(file: Path) -> tuple[str, bool]:
    """The image as it is where it is small (and then True), else a JPEG of it at a sheet's size."""
    try:
        with Image.open(file) as image:
            small = max(image.size) <= _LARGEST
            if small:
                return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}", True
            picture = image.convert("RGB")
    except (UnidentifiedImageError, OSError):
        return "", True
    picture.thumbnail((_LARGEST, _LARGEST))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", False


def first_pairs(sheet: dict[Split, list[Strip]], count: int = 6) -> Sequence[tuple[Picture | None, Picture]]:
    """The first pairs of the erased concept, asked for by name: the page's first look."""
    return [pair for strip in sheet.get("erase", []) for pair in strip.pairs][:count]
