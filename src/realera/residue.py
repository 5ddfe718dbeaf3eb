"""Finds the texts that draw a concept before and after a run erased it: python -m realera.residue run=latest"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from realera import cli, console, paths
from realera.contracts import UserError
from realera.files import checksums
from realera.runs import folders, preflight, processes, prompt_lengths, trust
from realera.runs.session import Session
from realera.settings import composition
from realera.settings.run_settings import Settings, TrainerSettings
from realera.system import devices


def residue(cfg: DictConfig) -> None:
    config = composition.plain(cfg)
    if composition.in_sweep():
        preflight.check_sweep(TrainerSettings({}))
    if processes.plan(None, devices.number()).world > 1:
        raise UserError("realera.residue works in one process: start it without torchrun or srun.")
    run = folders.open_run(str(config["run"])) if config["run"] != "original" else None
    if run is None or run.settings.unedited:
        raise UserError(f"run={config['run']} erased nothing: give the run of a method.")
    asked = search_settings(config)
    out = folder_of(config, run, asked)
    task = composition.build_task(run.config)
    trust.check_tables(run.config, run.folder)
    judging = judges(run.config)
    if judging:
        preflight.check_judge(run.config)
    preflight.check_run(run)
    preflight.check_model(run.settings.backbone)
    cli.say_backbone(run.config, str(run.folder))
    prompt_lengths.warn(asked["texts"], run.settings.backbone, "texts")

    from realera.reporting.residue_page import write_page
    from realera.runs import remaining_texts  # imports torch and diffusers, so only after all checks

    with folders.locked(out, key="out"):
        found = remaining_texts.measure(Session(run), task, asked, out, judging)
        page = write_page(out, found, run.config, config["blur"])
    console.show_residue(found)
    console.show_path("numbers", out / paths.RESIDUE)
    console.show_path("page to open", page)


def search_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The search settings. Lists have no repeats, texts no surplus spaces."""
    asked = {key: config[key] for key in ("texts", "vocabulary", "looked", "within", "images", "pictured", "seeds")}
    for key in ("texts", "vocabulary", "seeds"):
        listed = asked[key] if isinstance(asked[key], list) else [asked[key]]
        asked[key] = list(dict.fromkeys(" ".join(str(one).split()) if key == "texts" else one for one in listed))
    return asked


def judges(config: dict[str, Any]) -> bool:
    """Whether the run's own judge can judge the pictures. It must not be a program or model that the run folder
    names."""
    judge = Settings(config).judge
    if not judge:
        return False
    if trust.interpreter(judge.node) or trust.foreign_model(judge.node):
        cli.log.warning(
            "the pictures are not judged, because the run folder itself names the program or the model of its judge."
        )
        return False
    return True


def folder_of(config: dict[str, Any], run: folders.Run, asked: dict[str, Any]) -> Path:
    """The folder of the page. It must be new, empty or contain an earlier page."""
    files = [checksums.sha256_of(file) for name in asked["vocabulary"] if (file := paths.file_of(name)) is not None]
    out = Path(str(config["out"] or paths.inside(run.folder, f"residue/{folders.digest([asked, files])}")))
    folders.check_files(out)
    others = out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir())
    if others and ((out / paths.CONFIG).exists() or not (out / paths.MANIFEST).is_file()):
        raise UserError(f"out={out} contains other files: give a new or an empty folder.")
    preflight.check_writable(out, "out")
    return out


def main() -> None:
    cli.run_command("residue", residue)


if __name__ == "__main__":
    cli.as_process(main)
