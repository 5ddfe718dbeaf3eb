"""Writes a run's erasure in a format of other programs: python -m realera.export run=runs/... to=diffusers out=DIR"""

from __future__ import annotations

import shutil
from pathlib import Path

from omegaconf import DictConfig

from realera import cli, console, paths
from realera.contracts import UserError
from realera.runs import folders, preflight
from realera.runs.folders import Run
from realera.settings import composition
from realera.system import disk


def export(cfg: DictConfig) -> None:
    config = composition.plain(cfg)
    to, rank, out = str(config["to"]), config["rank"], Path(str(config["out"]))
    run = folders.open_run(str(config["run"]))
    preflight.check_run(run)
    preflight.check_writable(out, "out")
    if to == "map":
        export_map(run, out)
        return
    if to == "diffusers" and out.is_dir() and any(out.iterdir()):
        raise UserError(f"out={out} contains other files: give a new or an empty folder.")
    preflight.check_model(run.settings.backbone)
    convert(run, to, out, rank)


def export_map(run: Run, out: Path) -> None:
    """Copies the run's closed form: W = W0 @ map."""
    if not (run.folder / paths.MAP).is_file():
        raise UserError(
            f"{run.folder} has no {paths.MAP}, because its method has no single-matrix closed form: give to=diffusers."
        )
    preflight.check_map(run.folder / paths.MAP)
    with disk.atomic(out / paths.MAP) as beside:
        shutil.copyfile(run.folder / paths.MAP, beside)
    if left := _beyond_map(run):
        what, verb = " and the ".join(left), "are" if len(left) > 1 else "is"
        cli.log.warning("the map contains the closed form only: the %s of this run %s not in it", what, verb)
    console.show_path("map", out / paths.MAP)


def convert(run: Run, to: str, out: Path, rank: int | None) -> None:
    """Writes a pipeline folder, or a LoRA file; logs the LoRA's approximation error."""
    from realera.backbones import portable  # torch: slow, so imported after all checks
    from realera.backbones.folder import locate
    from realera.training.checkpoint import read_erased

    source = locate(run.settings.backbone.pretrained)
    erased = read_erased(run.erased).state
    if (guide := _guide(run)) and not erased:
        raise UserError(
            f"{run.folder} changed no weights: its {guide} acts while images are drawn and cannot be exported. Draw "
            f"images with python -m realera.generate run={run.folder}."
        )
    if guide:
        cli.log.warning("the %s of this run acts while images are drawn: only the weights are exported, not it", guide)
    if to == "diffusers":
        portable.save_pipeline(source, erased, out)
        console.show_path("pipeline", out)
        return
    lora, error = portable.lora_of(portable.base_unet(source), erased, rank)
    file = out / (f"{run.folder.resolve().name}.safetensors" if to == "kohya" else "pytorch_lora_weights.safetensors")
    portable.save_lora(lora, file, to)
    ranks = {down.shape[0] for down, _ in lora.values()}
    cli.log.info("LoRA of rank %s on %d layers misses %.2f%% of the change", max(ranks), len(lora), 100 * error)
    console.show_path("LoRA", file)


def _beyond_map(run: Run) -> list[str]:
    """The parts of a run's method that changed its weights after the first closed form."""
    align, finish = run.settings.method.align, run.settings.method.finish
    if align and align.steps == 0:  # nothing was trained, so there is nothing to finish
        return []
    trained = [] if not align else ["LoRA" if align.lora else "training"]
    return [*trained, *([finish.class_name.lower()] if finish else [])]


def _guide(run: Run) -> str | None:
    """The class name of the method's guide, which changes the noise prediction while images are drawn; None without
    one."""
    guide = run.settings.method.guide
    return guide.class_name if guide else None


def main() -> None:
    cli.run_command("export", export)


if __name__ == "__main__":
    cli.as_process(main)
