"""Erases a concept, then generates, judges and reports: python -m realera.train concept=airplane"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig

from realera import cli, console, paths
from realera.contracts import Task
from realera.evaluation.records import read_metrics
from realera.runs import estimate, folders, preflight, processes, prompt_lengths, starting
from realera.runs.folders import Run
from realera.runs.session import Session
from realera.settings import composition
from realera.settings.run_settings import Settings
from realera.sweeps import jobs
from realera.system import devices


def train(cfg: DictConfig) -> float | None:
    """Makes one run and returns its H_o, which a search maximises."""
    config, task, plan = ready(composition.plain(cfg))
    hindrance = starting.check(config)
    if Settings(config).dry_run:
        estimate.show(estimate.summed([replace(estimate.work(config, task), hindrance=hindrance)]))
        return None
    with opened(config, plan) as session:
        if session.run.finished:
            say_finished(session)
        else:
            with starting.remove_if_refused(session.run):
                carry_out(session, task)
    return show(session.run) if session.ranks.first else None


def ready(config: dict[str, Any]) -> tuple[dict[str, Any], Task, processes.ProcessPlan]:
    """The checked settings, the task, and the plan of the run's processes. Torch is not imported."""
    jobs.refuse_single_run(config)
    config, task = starting.ready(config, sweep=composition.in_sweep())
    settings = Settings(config)
    preflight.check_task(task, settings.backbone)
    if settings.evaluate:
        preflight.check_judge(config)
    return config, task, processes.plan(settings.trainer, devices.number())


@contextmanager
def opened(config: dict[str, Any], plan: processes.ProcessPlan) -> Iterator[Session]:
    """Locks the run's folder, makes the run or finds it, and connects its processes."""
    config = {**config, "trainer": dict(plan.trainer)}
    with folders.locked(folders.folder_of(config), plan.first):
        run = folders.claim(config) if plan.first else Run(folders.folder_of(config), config)
        jobs.record_run(run, found=run.finished)
        cli.say_backbone(config)
        with processes.connected(plan, "train", needed=not run.finished) as ranks:
            yield Session.of_run(processes.same_run(ranks, run), ranks)


def say_finished(session: Session) -> None:
    """Says that there is nothing to do. A W&B agent that started this process still waits for the numbers."""
    run = session.run
    cli.log.info("%s is already finished; overwrite=true repeats it", run.folder)
    if session.ranks.first and run.settings.evaluate and os.environ.get("WANDB_SWEEP_ID"):
        from realera.tracking.trackers import log_judged

        log_judged(run, read_metrics(run.folder))


def carry_out(session: Session, task: Task) -> None:
    """Erases, saves, draws, judges, logs and reports. If it was interrupted, the next call continues."""
    run, first = session.run, session.ranks.first
    cli.log.info("run %s", run.folder)
    from realera.reporting.run_page import write_report
    from realera.runs import steps
    from realera.sweeps import shared_model
    from realera.tracking import trackers  # torch, diffusers, Lightning: slow, so imported after all checks

    judge = steps.build_judge(run.config, task) if run.settings.evaluate else None  # first: it may not be available
    if judge is not None and first:
        prompt_lengths.warn_of_task(task, run.settings.backbone)
        steps.warn_unknown(judge, task)
    with (
        session.meter,
        shared_model.shared_backbone(run.config, session.meter) as backbone,
        trackers.tracked(session) as (session, tracked),
    ):
        steps.erase(session, backbone, task)
        trackers.log_weights(tracked, run)
        if judge is None:
            return
        steps.draw(session, backbone, task.eval_prompts())
        metrics = steps.judge(session, judge, task, steps.drawn_by(backbone))
        if first:
            write_report(run.folder)
            trackers.log_results(tracked, run, metrics)


def show(run: Run) -> float | None:
    """Prints a finished run's table and the paths of its files. Returns H_o if it was computed."""
    if run.settings.evaluate and (run.folder / paths.METRICS).is_file():
        metrics = read_metrics(run.folder)
        column = "unchanged" if run.settings.unedited else "erased"
        console.show_run(run.folder, metrics, folders.title(run.config), erased=column)
        result: float | None = metrics["main"].get("h_o", {}).get("value")
        return result
    console.show_path("weights", run.erased)
    return None


def main() -> None:
    cli.run_command("train", train)


if __name__ == "__main__":
    cli.as_process(main)
