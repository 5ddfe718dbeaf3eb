"""Applies the map of an erasure to checkpoints: python -m realera.apply map=exported pretrained=DIR out=NEW"""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig

from realera import cli, console
from realera.callable_module import make_callable
from realera.contracts import UserError
from realera.runs import preflight, processes, sources
from realera.settings import composition, error_sentences
from realera.settings.run_settings import TrainerSettings
from realera.sweeps import jobs
from realera.system import devices

if __name__ != "__main__":
    make_callable(__name__)

log = logging.getLogger("realera")


def apply(cfg: DictConfig) -> None:
    config = composition.plain(cfg)
    if composition.in_sweep():
        preflight.check_sweep(TrainerSettings({}))
    if processes.plan(None, devices.number()).world > 1:
        raise UserError("realera.apply works in one process: start it without torchrun or srun.")
    files = [sources.map_file(one) for one in sources.as_list(config["map"])]
    weights = sources.weights_of(config["weight"], len(files))
    listed, several = sources.expanded(config["pretrained"])
    out = Path(str(config["out"]))
    places = sources.places(listed, several, out)
    preflight.check_writable(out, "out")
    if not several:
        sources.located(listed[0])
    for file in files:
        preflight.check_map(file)

    from realera.runs import applying  # torch: slow, so imported after all checks
    from realera.training import maps

    read = [maps.read(file) for file in files]
    applied = applying.Application(read, weights, bool(config["remove"]), bool(config["check"]))
    applied.factors()  # refuses maps that do not fit together before any checkpoint is read
    applied.warn()
    if not several:
        applying.apply_to(listed[0], places[0], applied)
        console.show_path("pipeline", places[0])
        return
    rows: list[tuple[str, Path, str, str]] = []
    for source, place in zip(listed, places, strict=True):
        try:
            state, reason = "written" if applying.apply_to(source, place, applied) else "already there", ""
        except Exception as error:  # one checkpoint that fails does not stop the others
            sentence = error_sentences.of_step(error)
            state, reason = "failed" if sentence is None else "refused", sentence or f"{type(error).__name__}: {error}"
            if sentence is None:
                log.exception("%s failed", source)
        rows.append((source, place, state, reason))
    console.show_applied(rows, out)
    states = [state for _, _, state, _ in rows]
    if wrong := sum(state in ("refused", "failed") for state in states):
        sentence = f"{wrong} of {len(rows)} checkpoints were not written: see the lines below the table."
        jobs.fail(sentence, 1 if "failed" in states else 2)


def main() -> None:
    cli.run_command("apply", apply)


if __name__ == "__main__":
    cli.as_process(main)
