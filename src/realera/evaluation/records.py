"""The lines of a run's files: the manifest (what was drawn) and the verdicts (what a judge said). JSON, one a line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from realera import paths
from realera.contracts import Prompt, UserError, Verdict

Which = Literal["erased", "original"]
ORIGINALS = "originals"  # the unedited model's images of the same prompts, linked from the cache
FOLDERS: Mapping[Which, str] = {"erased": paths.IMAGES, "original": ORIGINALS}


@dataclass(frozen=True)
class Row:
    """One image of the manifest. file, original: relative to the run folder; original is None where none was asked for.
    source: content id of the weights and sampler that drew the image."""

    prompt: Prompt
    file: str
    source: str
    original: str | None = None

    def path(self, run_dir: Path, which: Which = "erased") -> Path:
        """Where the image stands. Raises UserError where the run has no images of the original model."""
        if which == "erased":
            return run_dir / self.file
        if self.original is None:
            raise UserError(f"{run_dir} holds no images of the original model: run it again to draw them")
        return run_dir / self.original


def write_manifest(run_dir: Path, rows: Sequence[Row]) -> None:
    """manifest.jsonl: id, file, prompt, concept, split, seed, source, and original where there is one."""
    lines = []
    for row in rows:
        p = row.prompt
        line = {"id": p.id, "file": row.file, "prompt": p.text, "concept": p.concept, "split": p.split, "seed": p.seed}
        line["source"] = row.source
        if row.original is not None:
            line["original"] = row.original
        lines.append(line)
    _write(run_dir / paths.MANIFEST, lines)


def read_manifest(run_dir: Path) -> list[Row]:
    """The manifest's rows in order. Raises UserError where it is missing or torn."""
    rows = []
    for line in _read(run_dir / paths.MANIFEST, "generate the run's images first"):
        prompt = Prompt(line["id"], line["prompt"], line["concept"], line["split"], line["seed"])
        rows.append(Row(prompt, line["file"], line["source"], line.get("original")))
    return rows


def verdict_file(run_dir: Path, judge: str, which: Which = "erased") -> Path:
    """verdicts/<judge>.jsonl, or verdicts/<judge>.original.jsonl for the unedited model's images."""
    return run_dir / paths.VERDICTS / f"{judge}{'' if which == 'erased' else '.original'}.jsonl"


def write_verdicts(path: Path, verdicts: Iterable[Verdict]) -> None:
    """One verdict a line; an unscored value is null (JSON has no NaN)."""
    _write(
        path,
        [
            {
                "id": v.prompt_id,
                "value": None if math.isnan(v.value) else v.value,
                "label": v.label,
                "detail": dict(v.detail),
            }
            for v in verdicts
        ],
    )


def read_verdicts(path: Path) -> list[Verdict]:
    """The verdicts in order. Raises UserError where the file is missing or torn."""
    return [
        Verdict(r["id"], math.nan if r["value"] is None else float(r["value"]), r["label"], r["detail"])
        for r in _read(path, "judge the run first")
    ]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of an optional file such as losses.jsonl; [] where it is missing. A last line that is torn (the run is
    still writing) is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    paths.write_text(path, text)


def _read(path: Path, remedy: str) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}") from None
    rows: list[dict[str, Any]] = []
    for count, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path} is torn at line {count}: delete it, and {remedy}") from None
    return rows
