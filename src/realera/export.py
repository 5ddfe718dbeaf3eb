"""Writes a run's erasure in a format of other programs: python -m realera.export run=runs/... to=diffusers out=DIR"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from realera import cli, console
from realera.runs import folders, preflight
from realera.settings import composition

SHOWN = {"diffusers": "pipeline", "checkpoint": "checkpoint", "map": "map"}  # others: "LoRA"
OPTIONS = ("dtype", "variant", "shard_size", "rank", "error", "verify", "push", "private")


def export(cfg: DictConfig) -> None:
    config = composition.plain(cfg)
    out = Path(str(config["out"]))
    run = folders.open_run(str(config["run"]))
    preflight.check_run(run)
    preflight.check_writable(out, "out")
    from realera.exporting import forms  # torch: slow, so imported after these checks

    made = forms.export(run, config["to"], out, forms.Options(**{key: config[key] for key in OPTIONS}))
    console.show_path(SHOWN.get(config["to"], "LoRA"), made.path)


def main() -> None:
    cli.run_command("export", export)


if __name__ == "__main__":
    cli.as_process(main)
