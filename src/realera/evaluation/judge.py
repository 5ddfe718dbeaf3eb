"""Runs a judge on a run's images. It reads the manifest and draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from realera.contracts import Judge, UserError, Verdict
from realera.evaluation.generate import Advance
from realera.evaluation.moved import add_moved
from realera.evaluation.records import ManifestEntry, Which, read_manifest, verdict_file, write_verdicts
from realera.system.ranks import ONE_PROCESS, Ranks


def judge_run(
    judge: Judge,
    run_dir: Path,
    which: Which = "erased",
    *,
    chunk: int = 256,
    advance: Advance | None = None,
    ranks: Ranks = ONE_PROCESS,
) -> list[Verdict]:
    """Judges every image of the manifest and writes verdicts/<judge>.jsonl at the end.

    Processes share fixed chunks of the manifest. Each process returns all verdicts; the first process writes the file.
    which="original" judges the unedited model's images of the same prompts (verdicts/<judge>.original.jsonl). With
    "erased", verdicts on preserved concepts also have detail["moved"]. Raises UserError for a run without images.
    """
    rows = ranks.from_first(lambda: read_manifest(run_dir))
    if not rows:
        raise UserError(f"{run_dir} has no images to judge: generate them first")
    starts = range(0, len(rows), chunk)
    own: dict[int, list[Verdict]] = {}
    for turn, start in enumerate(ranks.share(starts)):
        part = rows[start : start + chunk]
        own[start] = judge([row.path(run_dir, which) for row in part], [row.prompt for row in part])
        _check_order(judge.name, part, own[start])
        if which == "erased":
            own[start] = add_moved(own[start], part, run_dir)
        if advance is not None:  # assumes that the other processes are equally far
            advance(len(rows[turn * ranks.world * chunk : (turn + 1) * ranks.world * chunk]))
    by_start = {start: part for share in ranks.gather(own) for start, part in share.items()}
    verdicts = [verdict for start in starts for verdict in by_start[start]]
    if ranks.first:
        write_verdicts(verdict_file(run_dir, judge.name, which), verdicts)
    return verdicts


def _check_order(judge: str, rows: Sequence[ManifestEntry], verdicts: Sequence[Verdict]) -> None:
    """A verdict for the wrong image would silently give a wrong number."""
    if [v.prompt_id for v in verdicts] != [row.prompt.id for row in rows]:
        raise UserError(f"the judge {judge!r} must return one verdict per image, in order: fix it or use another judge")
