"""Draws prompts with a run's erased model: python -m realera.generate run=runs/... 'prompts=["a photo of a jet"]'"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from realera import cli, console, paths
from realera.contracts import Prompt, UserError
from realera.runs import folders, preflight, processes, prompt_lengths
from realera.runs.session import Session
from realera.settings import composition
from realera.settings.run_settings import TrainerSettings
from realera.system import devices
from realera.tasks.prompts import slug


def generate(cfg: DictConfig) -> None:
    config = composition.plain(cfg)
    if composition.in_sweep():
        preflight.check_sweep(TrainerSettings({}))
    run = folders.open_run(str(config["run"]))
    plan = processes.plan(None, devices.number())  # the processes of torchrun or srun, otherwise one
    prompts = prompts_of(config["prompts"], config["seeds"])
    content = folders.digest([[prompt.text, prompt.seed] for prompt in prompts])
    out = Path(str(config["out"] or paths.inside(run.folder, f"generated/{content}")))
    folders.check_files(out)
    others = out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir())
    own = (out / paths.MANIFEST).is_file() and not (out / paths.CONFIG).exists()  # a run folder has a manifest too
    if plan.first and others and not own:
        raise UserError(f"out={out} contains other files: give a new or an empty folder.")
    preflight.check_writable(out, "out")
    preflight.check_run(run)
    preflight.check_model(run.settings.backbone)
    cli.say_backbone(run.config, str(run.folder))
    if plan.first:
        prompt_lengths.warn((prompt.text for prompt in prompts), run.settings.backbone)

    from realera.reporting.generated_page import write_page
    from realera.runs import steps  # torch and diffusers: slow, so imported after all checks

    with folders.locked(out, plan.first, "out"), processes.connected(plan, "generate") as ranks:
        steps.draw(Session(run, ranks).into(out), steps.load_run(run), prompts)
        page = write_page(out, prompts, folders.title(run.config), run.config) if ranks.first else None
    if page is not None:
        console.show_path("images", out / paths.IMAGES)
        console.show_path("manifest", out / paths.MANIFEST)
        console.show_path("page to open", page)


def prompts_of(texts: Any, seeds: Any) -> list[Prompt]:
    """One prompt for each pair of a text and a seed, with an id."""
    listed: Sequence[Any] = texts if isinstance(texts, list) else [texts]
    numbers: Sequence[Any] = seeds if isinstance(seeds, list) else [seeds]
    distinct = [(text, seed) for text in dict.fromkeys(listed) for seed in dict.fromkeys(numbers)]
    return [Prompt(f"{slug(text)}-{seed:04d}", text, text, "erase", seed) for text, seed in distinct]


def main() -> None:
    cli.run_command("generate", generate)


if __name__ == "__main__":
    cli.as_process(main)
