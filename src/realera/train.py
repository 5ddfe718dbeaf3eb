"""Erases a concept, then generates, judges and reports: python -m realera.train concept=airplane"""

from __future__ import annotations

import os
from typing import Any

from omegaconf import DictConfig

from realera import cli, console, costs, paths
from realera.contracts import Task
from realera.evaluation.records import read_metrics
from realera.runs import estimate, folders, preflight, processes, prompt_lengths, repairs, starting
from realera.runs.folders import Run
from realera.settings import composition
from realera.sweeps import jobs
from realera.system import devices
from realera.system.ranks import Ranks


def train(cfg: DictConfig) -> float | None:
    """Makes one run and returns its H_o, which a search maximises."""
    config = composition.plain(cfg)
    preflight.check_settings(config, sweep=composition.in_sweep())
    repairs.check_sums(config["method"])
    jobs.refuse_single_run(config)
    task = composition.build_task(config)
    config = composition.name_concepts(config, task)
    preflight.check_task(task, config["backbone"])
    starting.check(config)
    if config["evaluate"]:
        preflight.check_judge(config)
    plan = processes.plan(config["trainer"], devices.number())
    if config["dry_run"]:
        estimate.show(estimate.summed([estimate.work(config, task)]))
        return None
    config["trainer"] = dict(plan.trainer)
    with folders.locked(folders.folder_of(config), plan.first):
        run, ranks = begin(config, task, plan)
    return show(run) if ranks.first else None


def begin(config: dict[str, Any], task: Task, plan: processes.ProcessPlan) -> tuple[Run, Ranks]:
    """Carries out the run, unless it is finished already."""
    run = folders.claim(config) if plan.first else Run(folders.folder_of(config), config)
    jobs.record_run(run, found=run.finished)
    cli.say_backbone(config)
    with processes.connected(plan, "train", needed=not run.finished) as ranks:
        run = processes.same_run(ranks, run)
        if run.finished:
            cli.log.info("%s is already finished; overwrite=true repeats it", run.folder)
            if ranks.first and config["evaluate"] and os.environ.get("WANDB_SWEEP_ID"):
                from realera.tracking.trackers import (
                    log_judged,  # the W&B agent that started this process waits for the numbers
                )

                log_judged(run, read_metrics(run.folder))
        else:
            with starting.remove_if_refused(run):
                carry_out(run, task, ranks)
    return run, ranks


def carry_out(run: Run, task: Task, ranks: Ranks) -> None:
    """Erases, saves, draws, judges, logs and reports. If it was interrupted, the next call continues."""
    cli.log.info("run %s", run.folder)
    if ranks.first and run.config["evaluate"]:
        prompt_lengths.warn(
            (prompt.text for prompt in task.eval_prompts()), run.config["backbone"], "evaluation prompts"
        )
    from realera.reporting.run_page import write_report
    from realera.runs import steps
    from realera.sweeps import shared_model
    from realera.tracking import trackers  # torch, diffusers, Lightning: slow, so imported after all checks

    judge = steps.build_judge(run.config, task) if run.config["evaluate"] else None  # first: it may not be available
    if judge is not None and ranks.first:
        steps.warn_unknown(judge, task)
    with costs.of_run(run.folder, ranks) as meter, shared_model.shared_backbone(run.config, meter) as backbone:
        tracked = trackers.make(run) if ranks.first else []
        with trackers.closing(tracked):
            steps.erase(backbone, task, run, trackers.loggers(tracked), ranks, meter)
            trackers.log_weights(tracked, run)
            if judge is None:
                return
            steps.draw(backbone, task.eval_prompts(), run.folder, run.config, ranks, meter)
            metrics = steps.judge(judge, steps.drawn_by(backbone), task, run.folder, ranks=ranks, meter=meter)
            if ranks.first:
                write_report(run.folder)
                trackers.log_results(tracked, run, metrics)


def show(run: Run) -> float | None:
    """Prints a finished run's table and the paths of its files. Returns H_o if it was computed."""
    if run.config["evaluate"] and (run.folder / paths.METRICS).is_file():
        metrics = read_metrics(run.folder)
        column = "unchanged" if folders.is_original(run.config) else "erased"
        console.show_run(run.folder, metrics, folders.title(run.config), erased=column)
        result: float | None = metrics["main"].get("h_o", {}).get("value")
        return result
    console.show_path("weights", run.erased)
    return None


def main() -> None:
    cli.run_command("train", train)


if __name__ == "__main__":
    cli.as_process(main)
