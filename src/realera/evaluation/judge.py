"""A judge over a run's images. Reads the manifest, never draws: judging again costs no image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from realera.contracts import Judge, UserError, Verdict
from realera.evaluation.generate import Advance
from realera.evaluation.records import Row, Which, read_manifest, verdict_file, write_verdicts


def judge_run(
    judge: Judge,
    run_dir: Path,
    which: Which = "erased",
    *,
    chunk: int = 256,
    advance: Advance | None = None,
) -> list[Verdict]:
    """Judges every image of the manifest and writes verdicts/<judge>.jsonl, whole, at the end.

    which="original" judges the unedited model's images of the same prompts (verdicts/<judge>.original.jsonl). Raises
    UserError for a run without images.
    """
    rows = read_manifest(run_dir)
    if not rows:
        raise UserError(f"{run_dir} has no images to judge: generate them first")
    verdicts: list[Verdict] = []
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        said = judge([row.path(run_dir, which) for row in part], [row.prompt for row in part])
        _check_order(judge.name, part, said)
        verdicts += said
        if advance is not None:
            advance(len(part))
    write_verdicts(verdict_file(run_dir, judge.name, which), verdicts)
    return verdicts


def _check_order(judge: str, rows: Sequence[Row], said: Sequence[Verdict]) -> None:
    """A verdict on the wrong image would be a silent wrong number."""
    if [v.prompt_id for v in said] != [row.prompt.id for row in rows]:
        raise ValueError(f"judge {judge!r} must answer each image once and in order")
