"""The steps the doors are made of, from settings to files. Torch comes with this module: the doors load it late."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor

from realera import paths, preflight, runs
from realera.console import bar
from realera.contracts import Backbone, Concept, Guide, Judge, Method, Pair, Prompt, Task
from realera.evaluation.generate import generate_images, original_images, source_of
from realera.evaluation.judge import judge_run
from realera.evaluation.metrics import measure
from realera.evaluation.records import Row, write_manifest
from realera.judges.elsewhere import placed
from realera.runs import Run
from realera.training.checkpoint import load_erased
from realera.training.fit import fit


def load_backbone(config: Mapping[str, Any]) -> Backbone:
    """The backbone of a resolved config, unedited, where images are to be drawn."""
    backbone: Backbone = instantiate(config["backbone"])
    return backbone.to(device(config))


def device(config: Mapping[str, Any]) -> str:
    """ "cuda" where there is one and trainer.accelerator allows it, else "cpu"."""
    asked = str((config.get("trainer") or {}).get("accelerator", "auto"))
    return "cuda" if asked in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"


def load_run(run: Run) -> Backbone:
    """The backbone of a run with its erased weights.

    Raises:
        UserError: the weights are missing, torn, or were made with other base weights.
    """
    preflight.check_run(run)
    backbone = load_backbone(run.config)
    load_erased(run.erased, backbone)
    return backbone


def encode_pair(backbone: Backbone, task: Task, concept: Concept) -> Pair:
    """A concept's training prompts as the text encoder sees them, with the rows of the concept and of its anchor."""
    named, anchored = (list(side) for side in zip(*task.training_prompts(concept)))
    return Pair(
        concept,
        backbone.encode(named, [concept.target] * len(named)),
        backbone.encode(anchored, [concept.anchor] * len(anchored)),
    )


def erase(backbone: Backbone, task: Task, run: Run, loggers: Sequence[Any] = ()) -> None:
    """Erases the task's concepts from `backbone` and saves the weights."""
    method: Method = instantiate(run.config["method"])
    fit(
        backbone,
        method,
        [encode_pair(backbone, task, concept) for concept in task.concepts],
        run_dir=run.folder,
        seed=run.config["seed"],
        config=run.config,
        identity=runs.digest(runs.identity(run.config)),
        trainer=run.config["trainer"],
        loggers=loggers,
        probes=list({prompt.text: prompt for prompt in task.eval_prompts()}.values()),
    )
    backbone.to(device(run.config))


def draw(backbone: Backbone, prompts: Sequence[Prompt], folder: Path, config: Mapping[str, Any]) -> None:
    """Draws the prompts with the model as it stands and, from the same seeds, with the original one."""
    chunk = config["images_at_once"]
    guide = _guide(config)
    with bar("original model's images", len(prompts)) as advance:
        original_images(backbone, prompts, folder, chunk=chunk, advance=advance)
    with bar("erased model's images", len(prompts)) as advance:
        generate_images(backbone, prompts, folder, guide=guide, chunk=chunk, advance=advance)


def draw_original(backbone: Backbone, prompts: Sequence[Prompt], folder: Path, config: Mapping[str, Any]) -> None:
    """A run of the unedited model: its images stand where an erased model's would."""
    source = source_of(backbone)
    write_manifest(folder, [Row(prompt, f"{paths.IMAGES}/{prompt.id}.png", source) for prompt in prompts])
    chunk = config["images_at_once"]
    with bar("original model's images", len(prompts)) as advance:
        original_images(backbone, prompts, folder, chunk=chunk, folder=paths.IMAGES, advance=advance)


def build_judge(config: Mapping[str, Any], task: Task) -> Judge:
    """The judge of a resolved config; one that chooses among labels and was given none gets the task's."""
    node = config["judge"]
    if "labels" in node and node["labels"] is None:
        node = {**node, "labels": list(task.labels)}
    built: Judge = instantiate(placed(node))
    return built


def judge(judge: Judge, backbone: Backbone, task: Task, folder: Path, *, originals: bool = True) -> dict[str, Any]:
    """Judges a folder's images, the original model's beside them, and writes verdicts and metrics.json."""
    images = len(task.eval_prompts())
    with bar(f"judged by {judge.name}", images * (1 + originals)) as advance:
        if originals:
            judge_run(judge, folder, "original", advance=advance)
        judge_run(judge, folder, advance=advance)
    protocol = {
        **task.protocol(),
        "backbone": {"name": backbone.name, "fingerprint": backbone.fingerprint},
        "sampler": asdict(backbone.sampler),
        "judge": judge.protocol(),
    }
    return measure(folder, judge.name, protocol)


def pairs_from(backbone: Backbone, config: Mapping[str, Any]) -> Callable[[str, int], dict[str, Tensor]]:
    """(prompt, seed) -> {"original": uint8 (H, W, 3), "erased": the same}, drawn from the same noise."""
    guide = _guide(config)

    def draw(prompt: str, seed: int) -> dict[str, Tensor]:
        with backbone.original():
            before = backbone.generate([prompt], [seed])[0]
        return {"original": before.cpu(), "erased": backbone.generate([prompt], [seed], guide=guide)[0].cpu()}

    return draw


def _guide(config: Mapping[str, Any]) -> Guide | None:
    """The method's hook on the guided noise, which belongs to how its images are drawn."""
    node = (config.get("method") or {}).get("guide")
    return instantiate(node) if node else None
