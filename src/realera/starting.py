"""Before train makes anything, and where it ends before it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from realera import matching, paths, preflight, runs
from realera.parts import build
from realera.runs import Run


def check(config: Mapping[str, Any], planned: set[str] | None = None) -> None:
    """What train looks at before it makes anything: the folder, the model, and in a plan the method's parts, which a
    run builds anyway (that takes torch). planned: what was looked at for other jobs of the same plan.

    Raises:
        UserError: what cannot be used, and the remedies.
    """
    place, _ = runs.look(config)
    preflight.check_writable(place, "run_dir" if config.get("run_dir") else "root")
    plan = planned is not None or bool(config.get("dry_run"))
    seen = planned if planned is not None else set()
    if not runs.is_finished(config):
        if (model := f"model {config['backbone'].get('pretrained')}") not in seen:
            preflight.check_model(config["backbone"], plan=plan)
            seen.add(model)
        if (model_folder := preflight.model_folder(config["backbone"])) is not None:
            matching.check(model_folder, config)
    if config.get("dry_run") and (parts := f"parts {runs.digest(config['method'])}") not in seen:
        build(config["method"])
        seen.add(parts)


@contextmanager
def let_go(run: Run) -> Iterator[None]:
    """Takes the run's folder away again where the run ends before anything was made in it."""
    try:
        yield
    except Exception:  # Hydra wraps what a part's constructor refuses
        if {path.name for path in run.folder.glob("*")} <= {paths.CONFIG, paths.COSTS}:
            for name in (paths.CONFIG, paths.COSTS):
                (run.folder / name).unlink(missing_ok=True)
            with suppress(OSError):  # of the root: other runs stand there
                run.folder.rmdir()
                run.folder.parent.rmdir()
        raise
