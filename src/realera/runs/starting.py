"""Readies and checks a run's settings before any file is made, and removes a run folder that was refused before
anything was made in it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from realera import paths
from realera.contracts import Task, UserError
from realera.runs import asked_attacks, compatibility, folders, preflight, processes, repairs, trust
from realera.runs.asked_attacks import Asked
from realera.runs.folders import Run
from realera.settings import composition, error_sentences
from realera.settings.instantiate import build
from realera.settings.run_settings import Settings
from realera.system import devices


def ready(config: dict[str, Any], *, sweep: bool = False) -> tuple[dict[str, Any], Task]:
    """The checked settings of an erasure, with the task's names filled in, and the task. The commands and the Python
    interface begin with it.

    Raises:
        UserError: for the first wrong setting.
    """
    preflight.check_settings(config, sweep=sweep)
    repairs.check_sums(Settings(config).method.node)
    return named(config)


@dataclass(frozen=True)
class Training:
    """A checked run of train. config: without `attacks`, which are not part of a run. plan: of its processes."""

    config: dict[str, Any]
    task: Task
    plan: processes.ProcessPlan
    attacks: Sequence[Asked]


def training(config: dict[str, Any], *, sweep: bool) -> Training:
    """`ready`, with the checks of the commands alone. Torch is not imported. Raises UserError."""
    config, task = ready(config, sweep=sweep)
    settings = Settings(config)
    preflight.check_task(task, settings.backbone)
    if settings.evaluate:
        preflight.check_judge(config)
    attacks = asked_attacks.of_training(config)
    plan = processes.plan(settings.trainer, devices.number())
    if attacks and plan.world > 1:
        raise UserError(
            "attacks work in one process: set trainer.devices=1, or leave attacks out and then type "
            "python -m realera.attack run=FOLDER attack=NAME."
        )
    return Training({key: value for key, value in config.items() if key != "attacks"}, task, plan, attacks)


def named(config: dict[str, Any]) -> tuple[dict[str, Any], Task]:
    """The settings with the task's names filled in, and the task. Raises UserError for settings that the task
    refuses."""
    task = composition.build_task(config)
    return composition.name_concepts(config, task), task


def check(config: Mapping[str, Any], planned: set[str] | None = None) -> str | None:
    """Checks the folder and the model. A dry run also builds the method's parts, which imports torch; a real run builds
    them later. planned: names of the models and parts that were checked for other jobs of the same plan. Returns the
    reason why a planned run could not start on this machine now, if there is one.

    Raises:
        UserError: one of them cannot be used.
    """
    settings = Settings(config)
    place, _ = folders.find(config)
    preflight.check_writable(place, "root" if settings.run_dir is None else "run_dir")
    plan = planned is not None or settings.dry_run
    seen = planned if planned is not None else set()
    hindrance = None
    if not folders.is_finished(config):
        if (model := f"model {settings.backbone.pretrained}") not in seen:
            hindrance = preflight.check_model(settings.backbone, plan=plan)
            seen.add(model)
        compatibility.check(preflight.model_folder(settings.backbone), config)
    if planned is None:
        trust.warn_of_typed_targets(config, sys.argv[1:])
    if settings.dry_run and (parts := f"parts {folders.digest(settings.method.node)}") not in seen:
        build(settings.method.node)
        seen.add(parts)
    return hindrance


@contextmanager
def remove_if_refused(run: Run) -> Iterator[None]:
    """Removes the run's settings if the run is refused before anything was made with them. Releasing the lock then
    removes the folder, if this command made it. After an unexpected error the settings stay: they show which run
    failed."""
    try:
        yield
    except Exception as error:  # Hydra wraps what a part's constructor refuses
        made = {path.name for path in run.folder.iterdir() if not path.name.startswith(".")}
        if made <= {paths.CONFIG, paths.COSTS} and error_sentences.of_step(error) is not None:
            for name in made:
                (run.folder / name).unlink(missing_ok=True)
        raise
