"""Reads and writes a run's files: the manifest and the verdicts (JSON lines), the settings and metrics.json."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from realera import paths
from realera.contracts import Prompt, UserError, Verdict
from realera.evaluation.measures import H_O_TERMS, MEAN_PROB, METRIC_OF_SPLIT, main_entry
from realera.files import json_shapes, plain_data
from realera.system import disk

Which = Literal["erased", "original"]
FORMAT_VERSION = 2  # version of the format of metrics.json
ORIGINALS = paths.ORIGINALS
FOLDERS: Mapping[Which, str] = {"erased": paths.IMAGES, "original": ORIGINALS}


@dataclass(frozen=True)
class ManifestEntry:
    """One image of the manifest. file, original: paths relative to the run folder; original is None if the run has no
    image of the unedited model. source: content id of the weights, sampler and guide that drew the image."""

    prompt: Prompt
    file: str
    source: str
    original: str | None = None

    def path(self, run_dir: Path, which: Which = "erased") -> Path:
        """The image file. Raises UserError if the run has no images of the original model."""
        if which == "erased":
            return paths.inside(run_dir, self.file)
        if self.original is None:
            raise UserError(f"{run_dir} has no images of the original model: run it again to draw them")
        return paths.inside(run_dir, self.original)


def write_manifest(run_dir: Path, rows: Sequence[ManifestEntry]) -> None:
    """manifest.jsonl: id, file, prompt, concept, split, seed, source; if they are not None, also original and the
    prompt's caption, guidance_scale and size [height, width]."""
    lines = []
    for row in rows:
        p = row.prompt
        line = {"id": p.id, "file": row.file, "prompt": p.text, "concept": p.concept, "split": p.split, "seed": p.seed}
        own = {"caption": p.caption, "guidance_scale": p.guidance_scale, "size": p.size, "original": row.original}
        lines.append({**line, "source": row.source, **{k: v for k, v in own.items() if v is not None}})
    _write(run_dir / paths.MANIFEST, lines)


def read_manifest(run_dir: Path) -> list[ManifestEntry]:
    """The manifest's rows in order. Raises UserError if the file is missing, torn or has an invalid row."""
    rows = []
    path, remedy = paths.inside(run_dir, paths.MANIFEST), "generate the run's images first"
    for count, line in enumerate(_read(path, remedy), 1):
        if not json_shapes.fits(line, json_shapes.ROW):
            raise UserError(f"{path} line {count} is not an image of a manifest: delete the file and {remedy}")
        height_width = line.get("size")
        prompt = Prompt(
            line["id"],
            line["prompt"],
            line["concept"],
            line["split"],
            line["seed"],
            line.get("caption"),
            line.get("guidance_scale"),
            None if height_width is None else (height_width[0], height_width[1]),
        )
        rows.append(ManifestEntry(prompt, line["file"], line["source"], line.get("original")))
    return rows


def verdict_file(run_dir: Path, judge: str, which: Which = "erased") -> Path:
    """verdicts/<judge>.jsonl, or verdicts/<judge>.original.jsonl for the unedited model's images."""
    return paths.inside(run_dir, f"{paths.VERDICTS}/{judge}{'' if which == 'erased' else '.original'}.jsonl")


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
    """The verdicts in order. Raises UserError if the file is missing, torn or has an invalid line."""
    lines = _read(path, remedy := "judge the run first")
    if wrong := next(
        (count for count, line in enumerate(lines, 1) if not json_shapes.fits(line, json_shapes.VERDICT)), None
    ):
        raise UserError(f"{path} line {wrong} is not a verdict: delete the file and {remedy}")
    return [
        Verdict(r["id"], math.nan if r["value"] is None else float(r["value"]), r["label"], r["detail"]) for r in lines
    ]


def read_config(run_dir: Path) -> dict[str, Any]:
    """The settings in a run folder, for display only; {} if the file is missing. Raises UserError if the file is
    torn."""
    file = paths.inside(run_dir, paths.CONFIG)
    if not file.is_file():
        return {}
    try:
        config = plain_data.read_yaml(file)
        fault = json_shapes.config_fault(config)
    except (OSError, ValueError) as error:
        fault = f"is torn ({error})"
    if fault is not None:
        raise UserError(f"{file} {fault}: remove the run folder and run it again")
    return dict(config)


def read_metrics(run_dir: Path) -> dict[str, Any]:
    """metrics.json in the current format; the first format is converted.

    Raises UserError if the file is missing or torn, or has a format that this version does not know.
    """
    path = paths.inside(run_dir, paths.METRICS)
    try:
        metrics = plain_data.read_json(path)
        if isinstance(metrics.get("headline"), str):
            metrics = _upgraded(metrics)
        known = metrics.get("format_version") == FORMAT_VERSION and "main" in metrics
    except FileNotFoundError:
        raise UserError(f"{path} is missing: judge the run first") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is torn: delete it and judge the run again") from None
    if not known:
        raise UserError(f"{path} is from another version of realera: judge the run again (evaluate run={run_dir})")
    if not json_shapes.fits(metrics, json_shapes.METRICS) or not set(metrics["h_o_terms"]) <= {
        *METRIC_OF_SPLIT.values()
    }:
        raise UserError(f"{path} has invalid content: delete it and judge the run again (evaluate run={run_dir})")
    metrics["headline"] = {**MEAN_PROB, **metrics["headline"]}  # a run without images of a split lacks its metric
    result: dict[str, Any] = metrics
    return result


def _upgraded(old: dict[str, Any]) -> dict[str, Any]:
    """Converts the first format, in which `headline` is one mode for all metrics and `main` is missing."""
    mode = old["headline"]

    def with_main(part: dict[str, Any]) -> dict[str, Any]:
        return {"main": {name: main_entry(e, mode) for name, e in part[mode].items()}, **part}

    measures = [name for name in METRIC_OF_SPLIT.values() if name in old[mode]]
    new = {
        "format_version": FORMAT_VERSION,
        "h_o_terms": list(H_O_TERMS),
        **with_main(old),
        "headline": dict.fromkeys(measures, mode),
    }
    return {**new, "original": with_main(old["original"]) if old.get("original") else None}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of an optional file such as losses.jsonl; [] if it is missing. A torn last line (the run is still
    writing) is left out."""
    if not path.is_file():
        return []
    rows = []
    try:
        lines = plain_data.lines(path)
    except ValueError:
        return []
    for line in lines:
        try:
            rows.append(plain_data.json_of(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(plain_data.json_text(row, ensure_ascii=False) + "\n" for row in rows)
    disk.write_text(path, text)


def _read(path: Path, remedy: str) -> list[dict[str, Any]]:
    try:
        lines = plain_data.lines(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it and {remedy}") from None
    rows: list[dict[str, Any]] = []
    for count, line in enumerate(lines, 1):
        try:
            rows.append(plain_data.json_of(line))
        except ValueError:
            raise UserError(f"{path} is torn at line {count}: delete it and {remedy}") from None
        if not isinstance(rows[-1], dict):
            raise UserError(f"{path} line {count} is not a JSON object: delete the file and {remedy}")
    return rows
