"""Judges a run again, or the unedited model: python -m realera.evaluate run=original"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig

from realera import cli, console, paths
from realera.callable_module import make_callable
from realera.contracts import Judge, SetJudge, Task, UserError
from realera.runs import compatibility, estimate, folders, preflight, processes, rejudging
from realera.runs.folders import Run
from realera.runs.session import Session
from realera.settings import composition
from realera.settings.run_settings import Settings
from realera.sweeps import jobs
from realera.system import devices

if __name__ != "__main__":
    make_callable(__name__)


def evaluate(cfg: DictConfig) -> None:
    config = composition.plain(cfg)
    if composition.in_sweep():
        preflight.check_sweep(Settings(config).trainer)
    plan = processes.plan(Settings(config).trainer, devices.number())
    run, original = rejudging.run_of(config)
    if not original:
        jobs.record_run(run)
    task = composition.build_task(run.config)
    preflight.check_judge(run.config)
    if not original:
        preflight.check_run(run)
    hindrance = preflight.check_model(run.settings.backbone, plan=config["dry_run"])
    compatibility.check(preflight.model_folder(run.settings.backbone), run.config)
    if config["dry_run"]:
        work = replace(estimate.judging(run, task, original), hindrance=hindrance)
        estimate.show(estimate.summed([work]))
        return
    cli.say_backbone(run.config, None if original else str(run.folder))
    with folders.locked(run.folder, plan.first):
        if original:
            run = folders.claim(run.config) if plan.first else run
            jobs.record_run(run)
        with processes.connected(plan, "evaluate") as ranks:
            session = Session(processes.same_run(ranks, run), ranks)
            judge, metrics = judge_again(session, task, original)
        if ranks.first:
            log(session.run, metrics, Settings(config).logger.node)
    if ranks.first:
        title = folders.title(run.config) if original else f"{folders.concept_of(run.config)}, judged by {judge.name}"
        console.show_run(run.folder, shown(metrics, judge), title, erased="original" if original else "erased")
        console.show_path("metrics", run.folder / paths.METRICS)


def judge_again(session: Session, task: Task, original: bool) -> tuple[Judge | SetJudge, dict[str, Any]]:
    """Draws the missing images, judges and reports. Returns the judge and, in the first process, the metrics."""
    from realera.evaluation.results import own_judge
    from realera.reporting.run_page import write_report
    from realera.runs import steps  # torch and diffusers: slow, so imported after all checks

    run, ranks = session.run, session.ranks
    judge = (steps.build_judge if original else steps.any_judge)(run.config, task)
    own = ranks.from_first(lambda: None if original else own_judge(run.folder, judge.name, rejudging.by_its_own(run)))
    if isinstance(judge, SetJudge):
        if own is None:
            raise UserError(
                f"{run.folder} has not been judged yet: run python -m realera.evaluate run={run.folder} first."
            )
        metrics = steps.compare(session, judge, own) if ranks.first else {}
    else:
        if ranks.first:
            steps.warn_unknown(judge, task)
        drawn = ranks.from_first(lambda: steps.drawn_by_if_complete(task, run.folder, own))
        of_run = own in (None, judge.name)  # another judge's numbers are added beside, and not counted in the costs
        if ranks.first and of_run:
            folders.start(run)
        session = Session.of_run(run, ranks) if of_run else session
        with session.meter:
            drawn = drawn or steps.draw_missing(session, task, original)
            metrics = steps.judge(session, judge, task, drawn, originals=not original, own=own)
    if ranks.first and not original:
        write_report(run.folder)
    return judge, metrics


def log(run: Run, metrics: dict[str, Any], typed: Mapping[str, Any]) -> None:
    from realera.tracking import trackers

    trackers.log_judged(run, metrics, typed)


def shown(metrics: dict[str, Any], judge: Judge | SetJudge) -> dict[str, Any]:
    """The metrics of this judge. metrics.json may also contain those of the run's own judge."""
    numbers = metrics["judges"].get(judge.name)
    return metrics if numbers is None else {**numbers, "protocol": metrics["protocol"]}


def main() -> None:
    cli.run_command("evaluate", evaluate)


if __name__ == "__main__":
    cli.as_process(main)
