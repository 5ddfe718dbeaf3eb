"""Attacks an erased model: python -m realera.attack run=latest attack=random"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from realera import cli, console, paths
from realera.callable_module import make_callable
from realera.contracts import UserError
from realera.runs import folders, preflight, processes, rejudging, trust
from realera.runs.folders import Run
from realera.runs.session import Session
from realera.settings import composition
from realera.settings.run_settings import Settings
from realera.sweeps import jobs
from realera.system import devices

if __name__ != "__main__":
    make_callable(__name__)

OF_ATTACK = ("attack", "limit", "split", "attack_seed")  # settings that are not the run's


def attack(cfg: DictConfig) -> None:
    config = composition.plain(with_settings_of_run(cfg))
    if composition.in_sweep():
        preflight.check_sweep(Settings(config).trainer)
    if processes.plan(None, devices.number()).world > 1:
        raise UserError("realera.attack works in one process: start it without torchrun or srun.")
    run, original = rejudging.run_of({key: value for key, value in config.items() if key not in OF_ATTACK})
    if not original and run.settings.unedited:
        original = True
    jobs.record_run(run)
    task = composition.build_task(run.config)
    preflight.check_judge(run.config)
    if not original:
        preflight.check_run(run)
    hindrance = preflight.check_model(run.settings.backbone, plan=config["dry_run"])

    from realera.runs import asked_attacks, attacking  # torch and diffusers: slow, so imported after all checks

    asked = asked_attacks.Asked.of(config)
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


def with_settings_of_run(cfg: DictConfig) -> DictConfig:
    """The config with the task and the backbone of the run, on which the attack's own defaults depend. Raises UserError
    if there is no such run."""
    if cfg.run == rejudging.NO_RUN:
        return cfg
    run = folders.open_run(str(cfg.run))
    with open_dict(cfg):
        for group in ("task", "backbone"):
            cfg[group] = OmegaConf.create(dict(getattr(run.settings, group).node))
    return cfg


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
