"""A judge over a run's images. Reads the manifest, never draws: judging again costs no image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from realera.contracts import Judge, UserError, Verdict
from realera.evaluation.generate import Advance
from realera.evaluation.moved import with_moves
from realera.evaluation.records import Row, Which, read_manifest, verdict_file, write_verdicts
from realera.system.ranks import ALONE, Ranks


def judge_run(
    judge: Judge,
    run_dir: Path,
    which: Which = "erased",
    *,
    chunk: int = 256,
    advance: Advance | None = None,
    ranks: Ranks = ALONE,
) -> list[Verdict]:
    """Judges every image of the manifest and writes verdicts/<judge>.jsonl, whole, at the end.

    Processes share fixed chunks of the manifest, and every one of them returns all verdicts; the first one writes.
    which="original" judges the unedited model's images of the same prompts (verdicts/<judge>.original.jsonl); with
    "erased", the verdicts also say how far the images of what should stay moved. Raises UserError for a run without
    images.
    """
    rows = ranks.from_first(lambda: read_manifest(run_dir))
    if not rows:
        raise UserError(f"{run_dir} has no images to judge: generate them first")
    starts = range(0, len(rows), chunk)
    mine: dict[int, list[Verdict]] = {}
    for turn, start in enumerate(ranks.share(starts)):
        part = rows[start : start + chunk]
        mine[start] = judge([row.path(run_dir, which) for row in part], [row.prompt for row in part])
        _check_order(judge.name, part, mine[start])
        if which == "erased":
            mine[start] = with_moves(mine[start], part, run_dir)
        if advance is not None:  # the others are about as far
            advance(len(rows[turn * ranks.world * chunk : (turn + 1) * ranks.world * chunk]))
    by_start = {start: said for share in ranks.gather(mine) for start, said in share.items()}
    verdicts = [verdict for start in starts for verdict in by_start[start]]
    if ranks.first:
        write_verdicts(verdict_file(run_dir, judge.name, which), verdicts)
    return verdicts


def _check_order(judge: str, rows: Sequence[Row], said: Sequence[Verdict]) -> None:
    """A verdict on the wrong image would be a silent wrong number."""
    if [v.prompt_id for v in said] != [row.prompt.id for row in rows]:
        raise UserError(f"the judge {judge!r} must answer each image once and in order: mend it, or take another one")
