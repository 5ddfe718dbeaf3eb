"""Erases a concept, then generates, judges and reports: python -m realera.train concept=airplane"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from omegaconf import DictConfig

from realera import cli, console, paths
from realera.evaluation.records import read_metrics
from realera.runs import asked_attacks, estimate, folders, processes, prompt_lengths, starting
from realera.runs.asked_attacks import Asked
from realera.runs.folders import Run
from realera.runs.session import Session
from realera.settings import composition
from realera.settings.run_settings import Settings
from realera.sweeps import jobs


def train(cfg: DictConfig) -> float | None:
    """Makes one run and returns its H_o, which a search maximises."""
    config = composition.plain(cfg)
    jobs.refuse_single_run(config)
    asked = starting.training(config, sweep=composition.in_sweep())
    hindrance = starting.check(asked.config)
    if Settings(asked.config).dry_run:
        work = estimate.work(asked.config, asked.task, attacks=asked.attacks)
        estimate.show(estimate.summed([replace(work, hindrance=hindrance)]))
        return None
    with opened(asked) as (session, attacks):
        if session.run.finished and not attacks:
            say_finished(session)
        else:
            with starting.remove_if_refused(session.run):
                carry_out(session, asked, attacks)
    return show(session.run, asked.attacks) if session.ranks.first else None


@contextmanager
def opened(asked: starting.Training) -> Iterator[tuple[Session, Sequence[Asked]]]:
    """Locks the run's folder, makes the run or finds it, and connects its processes. Yields its missing attacks
    too. The costs of a finished run are not measured again."""
    plan, config = asked.plan, {**asked.config, "trainer": dict(asked.plan.trainer)}
    with folders.locked(folders.folder_of(config), plan.first):
        run = folders.claim(config) if plan.first else Run(folders.folder_of(config), config)
        attacks = asked.attacks
        if run.finished:
            attacks = asked_attacks.missing(run.folder, attacks, asked.task.concepts)
        jobs.record_run(run, found=run.finished and not attacks)
        cli.say_backbone(config)
        with processes.connected(plan, "train", needed=not run.finished) as ranks:
            same = processes.same_run(ranks, run)
            yield Session(same, ranks) if run.finished else Session.of_run(same, ranks), attacks


def say_finished(session: Session) -> None:
    """Says that there is nothing to do. A W&B agent that started this process still waits for the numbers."""
    run = session.run
    cli.log.info("%s is already finished; overwrite=true repeats it", run.folder)
    if session.ranks.first and run.settings.evaluate and os.environ.get("WANDB_SWEEP_ID"):
        from realera.tracking.trackers import log_judged

        log_judged(run, read_metrics(run.folder))


def carry_out(session: Session, asked: starting.Training, attacks: Sequence[Asked]) -> None:
    """Erases, saves, draws, judges, logs, reports and attacks. If it was interrupted, the next call continues."""
    run, task, first = session.run, asked.task, session.ranks.first
    cli.log.info("run %s", run.folder)
    from realera.reporting.run_page import write_report
    from realera.runs import steps
    from realera.sweeps import shared_model
    from realera.tracking import attacked_runs, trackers  # slow, so imported after all checks

    judge = steps.build_judge(run.config, task) if run.settings.evaluate else None  # first: it may not be available
    for one in attacks:
        asked_attacks.work_of(run.settings, task, one)  # refuses one without prompts before any work
    if judge is not None and first:
        prompt_lengths.warn_of_task(task, run.settings.backbone)
        steps.warn_unknown(judge, task)
    with session.meter, shared_model.shared_backbone(run.config, session.meter) as backbone:
        if not run.finished:
            with trackers.tracked(session) as (tracked_session, tracked):
                steps.erase(tracked_session, backbone, task)
                trackers.log_weights(tracked, run)
                if judge is None:
                    return
                steps.draw(tracked_session, backbone, task.eval_prompts())
                metrics = steps.judge(tracked_session, judge, task, steps.drawn_by(backbone))
                if first:
                    write_report(run.folder)
                    trackers.log_results(tracked, run, metrics)
        if judge is not None:
            logger = Settings(asked.config).logger.node
            attacked_runs.carry_out(session, backbone, task, judge, attacks, write_report, logger)


def show(run: Run, attacks: Sequence[Asked] = ()) -> float | None:
    """Prints a finished run's tables and the paths of its files. Returns H_o if it was computed."""
    if run.settings.evaluate and (run.folder / paths.METRICS).is_file():
        metrics = read_metrics(run.folder)
        column = "unchanged" if run.settings.unedited else "erased"
        for name in (one.settings.name for one in attacks):
            console.show_attack(name, metrics["attacks"][name], folders.title(run.config), run.settings.unedited)
        console.show_run(run.folder, metrics, folders.title(run.config), erased=column)
        result: float | None = metrics["main"].get("h_o", {}).get("value")
        return result
    console.show_path("weights", run.erased)
    return None


def main() -> None:
    cli.run_command("train", train)


if __name__ == "__main__":
    cli.as_process(main)
