"""The steps of the commands, from settings to files. This module imports torch, so commands import it late."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realera import costs, paths
from realera.console import bar
from realera.contracts import Backbone, Guide, Judge, Method, Mode, Prompt, SetJudge, Task, UserError
from realera.costs import ORIGINAL_IMAGES, Meter
from realera.evaluation.generate import generate_images, original_images, source_of
from realera.evaluation.judge import judge_run
from realera.evaluation.measures import METRIC_OF_SPLIT
from realera.evaluation.records import ManifestEntry, Which, read_manifest, write_manifest
from realera.evaluation.results import measure, measure_set, numbers_of
from realera.files import checksums
from realera.judges.other_interpreter import with_interpreters
from realera.runs import folders, prompt_lengths
from realera.runs.folders import Run
from realera.runs.session import Session
from realera.settings.instantiate import build
from realera.settings.run_settings import Settings, TrainerSettings
from realera.system import cores
from realera.system.ranks import Ranks
from realera.training.checkpoint import load_erased
from realera.training.fit import fit
from realera.training.pairs import encoded_pairs
from realera.training.schedule import trains

log = logging.getLogger(__name__)

MOST_NAMED = 5  # most concepts in one line of the log


def load_backbone(config: Mapping[str, Any], meter: Meter | None = None) -> Backbone:
    """The unedited backbone of a resolved config, on the device that draws images. meter: measures it from now on."""
    settings, meter = Settings(config), meter or Meter()
    cores.limit_threads()
    with meter.stage("load"):
        built: Backbone = build(settings.backbone.node)
        backbone = built.to(device(settings.trainer))
        meter.watch(backbone, device(settings.trainer))
    return backbone


def device(trainer: TrainerSettings) -> str:
    """ "cuda" if there is a GPU and trainer.accelerator allows it, otherwise "cpu"; "cuda:1" if trainer.devices=[1]."""
    if not trainer.allows_gpu or not torch.cuda.is_available():
        return "cpu"
    devices = trainer.devices
    return f"cuda:{devices[0]}" if isinstance(devices, list | tuple) and len(devices) == 1 else "cuda"


def load_run(run: Run, meter: Meter | None = None) -> Backbone:
    """The backbone of a run with its erased weights.

    Raises:
        UserError: the weights are missing, torn, or were made with other base weights.
    """
    backbone = load_backbone(run.config, meter)
    load_erased(run.erased, backbone)
    return backbone


def erase(session: Session, backbone: Backbone, task: Task, *, lightning: bool = True) -> None:
    """Erases the task's concepts from `backbone` and saves the weights. All processes train together. Without training,
    the first process does the work and the others read the saved weights. lightning: see `fit`."""
    run, settings, ranks, meter = session.run, session.settings, session.ranks, session.meter
    method: Method = build(settings.method.node)
    there = ranks.from_first(lambda: checksums.fit_is_intact(run.erased))
    shared = trains(method.align) and not there
    if shared or ranks.first:
        with nullcontext() if there else meter.stage("text"):
            pairs = encoded_pairs(backbone, task, meter)
        fit(
            backbone,
            method,
            pairs,
            run_dir=run.folder,
            seed=settings.seed or 0,
            config=run.config,
            identity=folders.digest(folders.identity(run.config)),
            checkpoint_every=settings.trainer.checkpoint_every,
            trainer=settings.trainer.for_lightning,
            loggers=session.loggers,
            probes=task.eval_prompts(),
            meter=meter,
            lightning=lightning,
        )
    meter.gather(ranks)
    if not (shared or ranks.first):
        load_erased(run.erased, backbone)
    backbone.to(device(settings.trainer))


def draw(session: Session, backbone: Backbone, prompts: Sequence[Prompt]) -> None:
    """Draws the prompts with the erased model and, from the same seeds, with the original model, into the run's
    folder."""
    folder, ranks, meter = session.folder, session.ranks, session.meter
    chunk, guide = session.settings.images_at_once, guide_of(session.settings)
    meter.note(passes_per_image=costs.passes_per_image(prompts, backbone.sampler, guide))
    with _bar("original model's images", len(prompts), ranks) as advance, meter.stage(ORIGINAL_IMAGES):
        original_images(backbone, prompts, folder, chunk=chunk, advance=advance, ranks=ranks)
    with _bar("erased model's images", len(prompts), ranks) as advance, meter.stage("draw"):
        generate_images(backbone, prompts, folder, guide=guide, chunk=chunk, advance=advance, ranks=ranks)
    meter.gather(ranks)


def draw_original(session: Session, backbone: Backbone, prompts: Sequence[Prompt]) -> None:
    """Draws a run of the unedited model. Its images go to the folder that other runs use for the erased model's."""
    folder, ranks, meter = session.folder, session.ranks, session.meter
    meter.note(passes_per_image=costs.passes_per_image(prompts, backbone.sampler))
    if ranks.first:
        source = source_of(backbone)
        write_manifest(folder, [ManifestEntry(prompt, f"{paths.IMAGES}/{prompt.id}.png", source) for prompt in prompts])
    chunk = session.settings.images_at_once
    with _bar("original model's images", len(prompts), ranks) as advance, meter.stage("draw"):
        original_images(backbone, prompts, folder, chunk=chunk, folder=paths.IMAGES, advance=advance, ranks=ranks)
    meter.gather(ranks)


def draw_missing(session: Session, task: Task, original: bool) -> dict[str, Any]:
    """Draws the missing images of a run, or of the unedited model. Returns `drawn_by`."""
    run = session.run
    if session.ranks.first:
        prompt_lengths.warn_of_task(task, run.settings.backbone)
    backbone = load_backbone(run.config, session.meter) if original else load_run(run, session.meter)
    (draw_original if original else draw)(session, backbone, task.eval_prompts())
    return drawn_by(backbone)


def build_judge(config: Mapping[str, Any], task: Task) -> Judge:
    """The judge of a resolved config, which must judge images one by one.

    Raises:
        UserError: it compares sets of images, or is not available.
    """
    built = any_judge(config, task)
    if isinstance(built, SetJudge):
        raise UserError(
            f"judge={built.name} compares whole sets of images and judges none of them: leave judge= out, and then "
            f"type python -m realera.evaluate run=FOLDER judge={built.name}."
        )
    return built


def any_judge(config: Mapping[str, Any], task: Task) -> Judge | SetJudge:
    """The judge of a resolved config. Its null labels and anchors are replaced by the task's, also in judges inside of
    it."""
    own = {"labels": list(task.labels), "anchors": {concept.target: concept.anchor for concept in task.concepts}}
    node = _with_defaults(Settings(config).judge.to_build, own)
    built: Judge | SetJudge = build(with_interpreters(node))
    return built


def warn_unknown(judge: Judge, task: Task) -> None:
    """Logs one line if the judge cannot score some concepts because it has no label for them."""
    knows, headline = getattr(judge, "knows", None), modes_and_terms(judge, task)[0]
    if knows is None:
        return
    by_label = {p.concept for p in task.eval_prompts() if headline[METRIC_OF_SPLIT[p.split]] in ("mean_prob", "top1")}
    if lost := [repr(concept) for concept in sorted(by_label) if not knows(concept)]:
        named = ", ".join(lost[:MOST_NAMED]) + (f" and {more} more" if (more := len(lost) - MOST_NAMED) > 0 else "")
        them = "it" if len(lost) == 1 else "them"
        log.warning("the judge %s does not know %s: images of %s are not scored.", judge.name, named, them)


def modes_and_terms(judge: Judge, task: Task) -> tuple[Mapping[str, Mode], Sequence[str]]:
    """(mode of each measure, terms of H_o): the task's. If the judge only detects and the task has no such measure, all
    modes are "detected" and there is no H_o."""
    if getattr(judge, "detects", False) and "detected" not in task.headline.values():
        return dict.fromkeys(task.headline, "detected"), ()
    return task.headline, task.h_o_terms


def _with_defaults(node: Any, own: Mapping[str, Any]) -> Any:
    """A judge's node with the task's values in place of null, at any depth."""
    if not isinstance(node, Mapping):
        return node
    return {
        key: own[key] if key in own and value is None else _with_defaults(value, own) for key, value in node.items()
    }


def drawn_by(backbone: Backbone) -> dict[str, Any]:
    """The entries of a protocol that say how the images were drawn."""
    return {
        "backbone": {"name": backbone.name, "fingerprint": backbone.fingerprint},
        "sampler": asdict(backbone.sampler),
    }


def drawn_by_if_complete(task: Task, folder: Path, own: str | None) -> dict[str, Any] | None:
    """`drawn_by` from the metrics of a run whose images all exist, are undamaged and were judged: such a run can be
    judged again without the model. Otherwise None."""
    numbers = None if own is None else numbers_of(folder, own)
    if numbers is None or not {"backbone", "sampler"} <= set(numbers["protocol"]):
        return None
    rows = read_manifest(folder)
    sides: tuple[Which, ...] = ("erased", "original")
    files = [row.path(folder, side) for row in rows for side in sides if side == "erased" or row.original is not None]
    if [row.prompt for row in rows] != task.eval_prompts() or not all(map(checksums.image_is_whole, files)):
        return None
    return {key: numbers["protocol"][key] for key in ("backbone", "sampler")}


def judge(
    session: Session,
    judge: Judge,
    task: Task,
    drawn: Mapping[str, Any],
    *,
    originals: bool = True,
    own: str | None = None,
) -> dict[str, Any]:
    """Judges the run's images and those of the original model, and writes verdicts and metrics.json.

    drawn: `drawn_by`. own: the name of the run's own judge, if this is another one. Processes divide the images; the
    first one returns the metrics, the others {}.
    """
    folder, ranks, meter = session.folder, session.ranks, session.meter
    images = len(task.eval_prompts())
    with _bar(f"judged by {judge.name}", images * (1 + originals), ranks) as advance, meter.stage("judge"):
        if originals:
            judge_run(judge, folder, "original", advance=advance, ranks=ranks)
        judge_run(judge, folder, advance=advance, ranks=ranks)
    if not ranks.first:
        return {}
    protocol = {**task.protocol(), **drawn, "judge": judge.protocol()}
    return measure(folder, judge.name, protocol, *modes_and_terms(judge, task), own)


def compare(session: Session, judge: SetJudge, own: str) -> dict[str, Any]:
    """Compares the run's images as a set and adds the numbers to metrics.json. own: as in `judge`."""
    asked = session.settings.judge
    with bar(f"compared by {judge.name}", 1) as advance:
        metrics = measure_set(session.folder, judge, asked.references, asked.split, own)
        advance(1)
    return metrics


def pairs_from(backbone: Backbone, settings: Settings) -> Callable[[str, int], dict[str, Tensor]]:
    """(prompt, seed) -> {"original": uint8 (H, W, 3), "erased": the same}, drawn from the same noise."""
    guide = guide_of(settings)

    def draw(prompt: str, seed: int) -> dict[str, Tensor]:
        with backbone.original():
            before = backbone.generate([prompt], [seed])[0]
        return {"original": before.cpu(), "erased": backbone.generate([prompt], [seed], guide=guide)[0].cpu()}

    return draw


def guide_of(settings: Settings) -> Guide | None:
    """The method's hook on the guided noise prediction, which acts while images are drawn; None without one."""
    guide = settings.method.guide
    return build(guide.node) if guide else None


def _bar(what: str, total: int, ranks: Ranks) -> AbstractContextManager[Callable[[int], None] | None]:
    """A progress bar for all processes, shown by the first one."""
    return bar(what, total) if ranks.first else nullcontext()
