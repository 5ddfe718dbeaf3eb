"""Checks before train makes any file, and removes a run folder that was refused before anything was made in it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from realera import paths
from realera.runs import compatibility, folders, preflight, trust
from realera.runs.folders import Run
from realera.settings import error_sentences
from realera.settings.instantiate import build


def check(config: Mapping[str, Any], planned: set[str] | None = None) -> None:
    """Checks the folder and the model. A dry run also builds the method's parts, which imports torch; a real run builds
    them later. planned: names of the models and parts that were checked for other jobs of the same plan.

    Raises:
        UserError: one of them cannot be used.
    """
    place, _ = folders.find(config)
    preflight.check_writable(place, "run_dir" if config.get("run_dir") else "root")
    plan = planned is not None or bool(config.get("dry_run"))
    seen = planned if planned is not None else set()
    if not folders.is_finished(config):
        if (model := f"model {config['backbone'].get('pretrained')}") not in seen:
            preflight.check_model(config["backbone"], plan=plan)
            seen.add(model)
        if (model_folder := preflight.model_folder(config["backbone"])) is not None:
            compatibility.check(model_folder, config)
    if planned is None:
        trust.warn_of_typed_targets(config, sys.argv[1:])
    if config.get("dry_run") and (parts := f"parts {folders.digest(config['method'])}") not in seen:
        build(config["method"])
        seen.add(parts)


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
