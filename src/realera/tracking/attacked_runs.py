"""Attacks with a training: their numbers reach the run's trackers after each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from realera.contracts import Backbone, Judge, Task
from realera.runs import attacking
from realera.runs.asked_attacks import Asked
from realera.runs.session import Session
from realera.tracking import trackers


def carry_out(
    session: Session,
    backbone: Backbone,
    task: Task,
    judge: Judge,
    attacks: Sequence[Asked],
    write_page: Callable[[Path], object],
    logger: Mapping[str, Any],
) -> None:
    """As `attacking.carry_out_each`. logger: the command's settings.

    The trackers are opened again, as by evaluate: the run's own results were logged before and its trackers closed, so
    a failed attack does not make it a failed run.
    """
    if attacks:
        with trackers.reopened(session.run, logger) as opened:
            told = partial(trackers.log_attacks, opened)
            attacking.carry_out_each(session, backbone, task, judge, attacks, write_page, told)
