"""Judges a run again, or the unedited model: python -m realera.evaluate run=original"""

from __future__ import annotations

from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from realera import cli, console, paths, preflight, runs
from realera.contracts import UserError
from realera.runs import Run

OF_THE_RUN = ("task", "backbone", "concept", "anchor", "seed", "root", "run_dir", "images_at_once")


def evaluate(cfg: DictConfig) -> None:
    config = cli.plain(cfg)
    original = config.pop("run") == "original"
    run = unedited(config) if original else existing(str(cfg.run), config.get("judge"))
    task = cli.build_task(run.config)
    preflight.check_judge(run.config)
    preflight.check_model(run.config["backbone"])
    if not original:
        preflight.check_run(run)
    runs.begin(run)
    cli.say_backbone(run.config, None if original else str(run.folder))

    from realera import steps  # torch and diffusers: loaded when nothing is left to refuse
    from realera.evaluation.report import write_report

    judge = steps.build_judge(run.config, task)
    backbone = steps.load_backbone(run.config) if original else steps.load_run(run)
    draw = steps.draw_original if original else steps.draw
    draw(backbone, task.eval_prompts(), run.folder, run.config)
    metrics = steps.judge(judge, backbone, task, run.folder, originals=not original)
    if not original:
        write_report(run.folder)
    title = f"{runs.concept_of(run.config)}, {'the unedited model' if original else 'judged again'}"
    console.show_run(run.folder, metrics, title, erased="original" if original else "erased")
    console.show_path("metrics", run.folder / paths.METRICS)


def unedited(config: dict[str, Any]) -> Run:
    """The folder of the unedited model under this task and backbone."""
    preflight.check_settings(config)
    return runs.claim({**config, "method": {"name": "original"}, "evaluate": True})


def existing(name: str, judge: Any) -> Run:
    """A run that stands, to be judged by the typed judge or by its own."""
    typed = {word.partition("=")[0].lstrip("+") for word in HydraConfig.get().overrides.task}
    if clash := sorted(typed & set(OF_THE_RUN)):
        raise UserError(f"{clash[0]} is fixed by the run {name}: leave it out, or give run=original.")
    run = runs.open_run(name)
    by_another = judge is not None and "judge" in typed
    return Run(run.folder, {**run.config, "judge": judge}) if by_another or not run.config.get("judge") else run


def main() -> None:
    cli.door("evaluate", evaluate)


if __name__ == "__main__":
    main()
