"""Pairs of images of the same prompt and seed, before and after erasing, as data for the report and for W&B."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageFilter

from realera.contracts import Mode, Split, UserError, Verdict
from realera.evaluation.measures import MEAN_PROB, METRIC_OF_SPLIT, score
from realera.evaluation.records import ManifestEntry, Which, read_manifest, read_verdicts, verdict_file
from realera.files import checksums
from realera.files.pictures import read_picture

SHOWN = 8  # images per prompt on a sheet
MOST_PROMPTS = 24  # strips of a split; a split with more prompts has one strip of some of them
_MOSAIC = 32  # images on that one strip
_LARGEST = 192  # pixels per side on the page; larger images are shrunk and embedded as JPEG


@dataclass(frozen=True)
class Picture:
    """An image and its verdict. uri: a data URI, "" if the file is missing. good: whether the verdict is as wanted;
    None without a verdict. small: whether the page enlarges the image without smoothing."""

    uri: str
    label: str
    title: str
    good: bool | None
    small: bool


@dataclass(frozen=True)
class Strip:
    """One prompt: pairs (before or None, after) of its first seeds. images: its total number of images. mixed: the
    pairs are of several prompts, whose texts are in the pictures' titles."""

    prompt: str
    pairs: list[tuple[Picture | None, Picture]]
    images: int
    mixed: bool = False


def image_rows(run_dir: Path, judge: str, headline: Mapping[str, Mode] = MEAN_PROB) -> list[list[Any]]:
    """For a logger's image table: [prompt, seed, split, original path or None, erased path, verdict] for every image of
    the manifest. verdict: by the split's metric ("sky (airplane 0.02)", "score 22.8", "found: belly"), "unscored", or
    "" without a verdict."""
    verdicts = _verdicts(run_dir, judge, "erased")
    rows: list[list[Any]] = []
    for row in read_manifest(run_dir):
        p, verdict = row.prompt, verdicts.get(row.prompt.id)
        text = "" if verdict is None else _words(row, verdict, headline)[1]
        original = row.path(run_dir, "original") if row.original else None
        rows.append([p.text, p.seed, p.split, original, row.path(run_dir), text])
    return rows


def sheets(
    run_dir: Path,
    judge: str | None,
    headline: Mapping[str, Mode] = MEAN_PROB,
    shown: int = SHOWN,
    only: Split | None = None,
) -> dict[Split, list[Strip]]:
    """One strip per prompt, by split, in the manifest's order. If a split has only one prompt, its strip has twice as
    many images. If it has more than MOST_PROMPTS, one strip shows evenly spaced ones. only: return this split alone."""
    after = _verdicts(run_dir, judge, "erased")
    before = _verdicts(run_dir, judge, "original")
    by_split: dict[Split, dict[str, list[ManifestEntry]]] = {}
    for row in read_manifest(run_dir):
        if only is not None and row.prompt.split != only:
            continue
        by_split.setdefault(row.prompt.split, {}).setdefault(row.prompt.text, []).append(row)

    def strip(text: str, rows: Sequence[ManifestEntry], images: int, mixed: bool = False) -> Strip:
        return Strip(text, [_pair(run_dir, row, before, after, headline) for row in rows], images, mixed)

    found: dict[Split, list[Strip]] = {}
    for split, prompts in by_split.items():
        if len(prompts) > MOST_PROMPTS:
            firsts = [rows[0] for rows in prompts.values()]
            some = [firsts[i * len(firsts) // _MOSAIC] for i in range(_MOSAIC)]
            count = sum(map(len, prompts.values()))
            found[split] = [strip(f"{len(prompts)} prompts", list(dict.fromkeys(some)), count, mixed=True)]
        else:
            most = shown * (2 if len(prompts) == 1 else 1)
            found[split] = [strip(text, rows[:most], len(rows)) for text, rows in prompts.items()]
    return found


def _verdicts(run_dir: Path, judge: str | None, which: Which) -> dict[str, Verdict]:
    file = verdict_file(run_dir, judge or "", which)
    return {v.prompt_id: v for v in read_verdicts(file)} if file.is_file() else {}


def _pair(
    run_dir: Path,
    row: ManifestEntry,
    before: dict[str, Verdict],
    after: dict[str, Verdict],
    headline: Mapping[str, Mode],
) -> tuple[Picture | None, Picture]:
    erased = picture(row.path(run_dir), row, after.get(row.prompt.id), headline)
    if row.original is None:
        return None, erased
    return picture(row.path(run_dir, "original"), row, before.get(row.prompt.id), headline), erased


def picture(file: Path, row: ManifestEntry, verdict: Verdict | None, headline: Mapping[str, Mode]) -> Picture:
    """An image of the manifest's row, with its verdict by the split's metric."""
    uri, small = _data_uri(file)
    title = f"{row.prompt.text}, seed {row.prompt.seed}"
    if verdict is None:
        return Picture(uri, "", title, None, small)
    label, words, good = _words(row, verdict, headline)
    if second := verdict.detail.get("second"):
        words += f"; second opinion {second}"
    return Picture(uri, label, f"{title}: {words}", good, small)


def plain_picture(file: Path, text: str, label: str) -> Picture:
    """An image of a text, with the judge's label."""
    uri, small = _data_uri(file)
    return Picture(uri, label, f"{text}: {label}" if label else text, None, small)


def _words(row: ManifestEntry, verdict: Verdict, headline: Mapping[str, Mode]) -> tuple[str, str, bool | None]:
    """A verdict by the split's metric: in short, in full, and whether it is as wanted (None for a score)."""
    p = row.prompt
    mode = headline[METRIC_OF_SPLIT[p.split]]
    value = score(p, verdict, mode)
    if math.isnan(value):
        return "unscored", "unscored", None
    if mode == "score":
        seen = f", sees {verdict.label}" if verdict.label else ""
        return f"{value:.1f}", f"score {value:.1f}{seen}", None
    if mode == "detected":
        boxes = {name: count for name, count in (verdict.detail.get("boxes") or {}).items() if count}
        found = ", ".join(f"{name} {count}" if count > 1 else name for name, count in boxes.items())
        if not value:
            return "nothing", f"nothing found{f' that counts ({found})' if found else ''}", True
        return found or verdict.label, f"found: {found or verdict.label}", False
    is_concept = verdict.label.lower() == p.concept.lower()
    return verdict.label, f"{verdict.label} ({p.concept} {verdict.value:.2f})", is_concept == (p.split == "keep")


def blurred(file: Path) -> Image.Image:
    """The image, blurred beyond recognition, for viewers that cannot hide images until a click."""
    picture = read_picture(file)
    return picture.filter(ImageFilter.GaussianBlur(max(picture.size) / 10))


def _data_uri(file: Path) -> tuple[str, bool]:
    """(data URI, whether the image is small). A small image is embedded unchanged, a larger one as a shrunk JPEG. A
    missing or torn one gives ""."""
    if not checksums.image_is_whole(file):
        return "", True
    try:
        picture = read_picture(file)
        if max(picture.size) <= _LARGEST:
            return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}", True
    except (UserError, OSError):
        return "", True
    picture.thumbnail((_LARGEST, _LARGEST))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", False


def first_pairs(sheet: dict[Split, list[Strip]], count: int = 6) -> Sequence[tuple[Picture | None, Picture]]:
    """The first pairs of the split `erase`, for the top of the page."""
    return [pair for strip in sheet.get("erase", []) for pair in strip.pairs][:count]
