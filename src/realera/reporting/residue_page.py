"""residue.html: a self-contained page of the texts that drew a concept before a run and after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from realera import paths
from realera.files import checksums
from realera.reporting.residue_words import key, sentence, state
from realera.reporting.run_page import is_blurred, render
from realera.reporting.sheets import Picture, plain_picture
from realera.system import disk

TEMPLATE = "residue_page.html.j2"
FARTHEST = 2.0  # noise distance at the end of the page's scale


def write_page(out: Path, found: Mapping[str, Any], config: Mapping[str, Any], blur: bool | None) -> Path:
    """Writes the page into `out`, which contains the pictures, and returns its path. found: the content of
    residue.json."""
    page = out / paths.RESIDUE_PAGE
    content = {
        **{key: found[key] for key in ("method", "backbone", "judge", "within")},
        "veiled": is_blurred(config, {}, blur),
        "concepts": [_concept(out, concept) for concept in found["concepts"]],
        "key": " ".join(key(found)),
        "line": _at(found["within"]),
        "farthest": FARTHEST,
    }
    disk.write_text(page, checksums.sealed_page(render(TEMPLATE, content)))
    return page


def _concept(out: Path, concept: Mapping[str, Any]) -> dict[str, Any]:
    name, *others = concept["texts"]
    drew = [row for row in others if row["state"] != "never"]
    never = [row for row in others if row["state"] == "never"]
    shown = [row for row in never if row["own"] or "pictures" in row]
    return {
        "name": concept["concept"],
        "anchor": concept["anchor"],
        "sentence": sentence(concept),
        "rows": [_row(out, row) for row in (name, *drew, *shown)],
        "rest": [row["text"] for row in never if row not in shown],
    }


def _row(out: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **row,
        "words": state(row),
        "at": {when: _at(row[when]) for when in ("before", "after")},
        "judged": [row.get(f"judged_{when}") for when in ("before", "after")],
        "pairs": list(zip(_pictures(out, row, paths.ORIGINALS, "before"), _pictures(out, row, paths.IMAGES, "after"))),
    }


def _pictures(out: Path, row: Mapping[str, Any], folder: str, when: str) -> Sequence[Picture]:
    ids = row.get("pictures", [])
    labels = row.get(f"labels_{when}") or [""] * len(ids)
    return [plain_picture(out / folder / f"{id}.png", row["text"], label) for id, label in zip(ids, labels)]


def _at(apart: float) -> float:
    """A noise distance in percent of the scale."""
    return 100 * min(apart, FARTHEST) / FARTHEST
