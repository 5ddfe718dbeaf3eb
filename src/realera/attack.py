"""Attacks an erased model: python -m realera.attack run=latest attack=random"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from realera import cli, console, paths
from realera.callable_module import make_callable
from realera.contracts import UserError
from realera.runs import compatibility, folders, preflight, processes, rejudging, trust
from realera.runs.folders import Run
from realera.runs.session import Session
from realera.settings import composition
from realera.settings.run_settings import Settings
from realera.sweeps import jobs
from realera.system import devices

if __name__ != "__main__":
    make_callable(__name__)


def attack(cfg: DictConfig) -> None:
    config, run, original = rejudging.to_attack(cfg)
    if composition.in_sweep():
        preflight.check_sweep(Settings(config).trainer)
    if processes.plan(None, devices.number()).world > 1:
        raise UserError("realera.attack works in one process: start it without torchrun or srun.")
    jobs.record_run(run)
    task = composition.build_task(run.config)
    preflight.check_judge(run.config)
    if not original:
        preflight.check_run(run)
    hindrance = preflight.check_model(run.settings.backbone, plan=config["dry_run"])
    compatibility.check(preflight.model_folder(run.settings.backbone), run.config)

    from realera.runs import asked_attacks, attacking  # torch and diffusers: slow, so imported after all checks

    asked = asked_attacks.Asked.of(config)
    if composition.in_sweep():  # whose plan was printed before
        asked_attacks.work_of(run.settings, task, asked)  # refuses one without prompts before any work
    else:
        console.show_attack_plan(attacking.plan(Session(run), task, asked), asked.settings.name, hindrance)
        if config["dry_run"]:
            return
    cli.say_backbone(run.config, None if original else str(run.folder))
    run = claimed(run) if original else run
    name = asked.settings.name
    with attacking.lock(run.folder, asked):
        numbers = carried_out(run, task, asked, original)
        log(run, {name: numbers}, Settings(config).logger.node)
    console.show_attack(name, numbers, folders.title(run.config), original)
    console.show_path("page to open", run.folder / paths.REPORT)


def claimed(run: Run) -> Run:
    """The folder of the unedited model's run. Attacks of several commands may share it."""
    if (run.folder / paths.CONFIG).is_file():
        folder, stored = folders.find(run.config)  # refuses one with other settings
        return run if stored is None else Run(folder, {**stored, "judge": dict(run.settings.judge.node) or None})
    with folders.locked(run.folder):
        return folders.claim(run.config)


def carried_out(run: Run, task: Any, asked: Any, original: bool) -> dict[str, Any]:
    """Attacks, and brings metrics.json and the page up to date. Returns the attack's numbers."""
    from realera.reporting.run_page import write_report
    from realera.runs import attacking, steps

    trust.check_tables(run.config, run.folder)
    judge = steps.build_judge(run.config, task)
    steps.warn_unknown(judge, task)
    backbone = steps.load_backbone(run.config) if original else steps.load_run(run)
    numbers = attacking.carry_out(Session(run), backbone, task, judge, asked)
    attacking.add_to_run(run.folder, write_report)
    return numbers


def log(run: Run, attacks: Mapping[str, Any], typed: Mapping[str, Any]) -> None:
    from realera.tracking import trackers

    with trackers.reopened(run, typed) as opened:
        trackers.log_attacks(opened, attacks)


def main() -> None:
    cli.run_command("attack", attack)


if __name__ == "__main__":
    cli.as_process(main)
