"""Checks a run's settings before torch is imported, so that an error takes less than a second.

The checks read only the plain config and the headers of files. Some checks have to wait until later: counting the
tokens of a prompt needs the tokenizer, which may not be downloaded yet.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from realera import setting_types
from realera.backbones import folder, hub, vocabulary
from realera.contracts import NamedPrompt, Task, UserError
from realera.files import checksums
from realera.mining import band
from realera.paths import ERASED, dir_of, file_of
from realera.runs import suitability
from realera.runs.folders import Run
from realera.settings.run_settings import ORIGINAL, BackboneSettings, MethodSettings, Settings, TrainerSettings
from realera.settings.source_code import fact
from realera.system import devices

ACTING = ("edit", "align", "guide")  # the parts that erase; a method needs at least one


def check_settings(config: Mapping[str, Any], *, sweep: bool = False, here: bool = True) -> None:
    """The checks that need only the config. here: whether this machine will carry out the run.

    Raises:
        UserError: for the first wrong setting.
    """
    settings = Settings(config)
    for key, given in (("concept", settings.concept), ("anchor", settings.anchor)):
        for text in given if isinstance(given, (list, tuple)) else [given]:
            if isinstance(text, str):
                check_name(text, key)
    if sweep:
        check_sweep(settings.trainer)
    method = settings.method
    if method and method.name != ORIGINAL and not any(_erases(method, part) for part in ACTING):
        raise UserError(
            f"method {method.name} has no part left that erases ({', '.join(ACTING)} are all null or do "
            "nothing): keep one of them, or choose method=original."
        )
    suitability.check(method, settings.backbone)
    check_band(method, settings.backbone)
    check_training(method, settings.backbone)
    check_precision(method, settings.trainer, here and not settings.dry_run)


def _erases(method: MethodSettings, name: str) -> bool:
    """Whether a part of a method erases, according to the facts that its class states (`contracts.Method`)."""
    part = method.part(name)
    if not isinstance(part, Mapping):
        return bool(part)
    target = str(part.get("_target_"))
    if fact(target, "weighs_adapters"):
        return _erases(method, "align")
    idle = {"steps": 0, **fact(target, "idle_where", {})}
    return bool(part) and not any(key in part and part[key] == value for key, value in idle.items())


def check_model(backbone: BackboneSettings, plan: bool = False) -> str | None:
    """Checks the base model: a complete folder, or a model of the hub that is cached or can be downloaded. plan: if its
    weights are elsewhere, return the sentence that says so, because plans are made on machines without them.

    Raises:
        UserError: files are missing or torn, or cannot be downloaded.
    """
    pretrained = backbone.pretrained
    local = pretrained is None or dir_of(pretrained) is not None or file_of(pretrained) is not None
    try:
        if local or not folder.HUB_ID.fullmatch(str(pretrained)):
            folder.locate(pretrained)
        else:
            hub.check(str(pretrained))
    except folder.Absent as error:
        if not plan:
            raise
        return str(error)
    return None


def check_judge(config: Mapping[str, Any]) -> None:
    """Raises UserError if the run has no judge."""
    if not Settings(config).judge:
        raise UserError(
            "no judge was given and the task names none: type judge=NAME (--help lists the judges), or evaluate=false."
        )


def check_run(run: Run) -> None:
    """Checks that a run's weights exist and are not torn.

    Raises:
        UserError: they are missing or torn; only the run's train command can make them again.
    """
    if not run.erased.is_file():
        raise UserError(f"{run.folder} has no {ERASED}: give the command that started the run again; it continues.")
    check_whole(run.erased)


def check_whole(file: Path) -> None:
    """Raises UserError if a file that the run's fit wrote is torn."""
    try:
        checksums.verify(file)
    except checksums.Torn as error:
        raise UserError(f"{error}: give the command that made the run again; it makes the file again.") from None


def check_map(file: Path) -> None:
    """Raises UserError if the map of a closed form is torn or has values that are not finite."""
    import numpy as np
    from safetensors import safe_open

    check_whole(file)
    with safe_open(file, framework="numpy") as opened:
        if "map" not in opened.keys():  # noqa: SIM118 (not a mapping)
            raise UserError(f"{file} contains no map: give the command that made it again.")
        if not np.isfinite(opened.get_tensor("map")).all():
            raise UserError(f"{file} contains NaN or infinity: delete it and give the command that made it again.")


# --- settings --------------------------------------------------------------------------------------------------------


def check_name(text: str, key: str) -> None:
    """Raises UserError for a path and for a text without a word. The task checks the length."""
    if ".." in re.split(r"[/\\]", text) or text.startswith(("/", "~/", "\\")):
        raise UserError(f"{key}={text!r} is a path: give a word or a name, as in {key}=airplane.")
    wordless = bool(text.strip()) and not any(letter.isalnum() for letter in text)
    if wordless or any(not letter.isprintable() for letter in text):
        raise UserError(f"{key}={text!r} has no word, or has a control character: give a word or a name.")


def check_task(task: Task, backbone: BackboneSettings) -> None:
    """`check_prompts` for every concept of a task."""
    for concept in task.concepts:
        check_prompts(task.training_prompts(concept), backbone)


def check_prompts(pairs: Sequence[tuple[NamedPrompt, NamedPrompt]], backbone: BackboneSettings) -> None:
    """Raises UserError if the text encoder would cut a training prompt before the end of the concept's name."""
    tokenizer = tokenizer_of(backbone)
    rows = backbone.text.max_length
    if tokenizer is None or not rows:
        return
    for prompt in (prompt for pair in pairs for prompt in pair):
        offsets = tokenizer.encode(prompt.text).offsets
        tokens = [i for i, (a, b) in enumerate(offsets) if a < b and a < prompt.end]
        if tokens and tokens[-1] + 1 > rows - 1:  # the last row is the end-of-text token
            raise UserError(
                f"the prompt '{_short(prompt.text)}' is cut at {rows} tokens, before {prompt.name!r} ends "
                f"(at token {tokens[-1] + 1}): shorten the template or the concept."
            )


def check_band(method: MethodSettings, backbone: BackboneSettings) -> None:
    """Raises UserError if no draw can reach the band of neighbours (see band.py)."""
    mining, text = method.neighbours, backbone.text
    if not mining or text.row_norm is None or text.width is None:
        return
    known = {f.name for f in fields(band.Band)} & set(mining.band)
    rows = max(1, (text.max_length or 2) - 5)  # from a short template's concept to the last row; for unit=flat
    band.check(
        band.Band(**{name: mining.band[name] for name in known}),
        text.row_norm,
        text.width,
        rows=rows,
        m=1 if mining.m is None else mining.m,
        n=mining.n or 0,
    )


def check_training(method: MethodSettings, backbone: BackboneSettings) -> None:
    """Raises UserError for settings with which training would fail, before any training images are drawn."""
    align = method.align
    if not align.steps:
        return
    if method.without_latents:
        raise UserError(
            f"method {method.name} trains (align), but method.latents is null: leave method.latents out, or set "
            "method.align=null."
        )
    if fact(target := str(align.target), "trains_lora") and not align.lora:
        raise UserError(
            f"method {method.name} trains (align) a LoRA, but method.align.lora is null: leave it out, "
            "or set method.align=null."
        )
    if backbone.gradient_checkpointing:
        if fact(target, "reads_attention"):
            raise UserError(
                f"method {method.name} reads the attention maps, which gradient checkpointing drops: set "
                "backbone.gradient_checkpointing=false."
            )
        if align.detach_bos:
            raise UserError(
                "method.align.detach_bos does not work with backbone.gradient_checkpointing: set one of them to false."
            )
    dtype, name = backbone.dtype, method.name
    if trains_weights(method) and backbone.offload == "sequential":
        raise UserError(
            f"method {name} trains the network's weights, and backbone.offload=sequential keeps them in the CPU's "
            "memory, where they cannot be trained: set backbone.offload=none, or choose a method that trains a LoRA or "
            "nothing."
        )
    if trains_weights(method) and dtype != "float32":
        raise UserError(
            f"method {name} trains the network's weights, and backbone.dtype={dtype} would round its small steps away: "
            "set backbone.dtype=float32, with trainer.precision=bf16-mixed for speed."
        )
    if dtype == "float16":
        raise UserError(
            f"method {name} trains, and backbone.dtype=float16 is only for drawing images: set backbone.dtype=bfloat16 "
            "or, with trainer.precision=bf16-mixed, float32."
        )


def trains_weights(method: MethodSettings) -> bool:
    """Whether a method trains the denoiser's own weights."""
    align = method.align
    own = bool(align.steps) and not align.lora and bool(align.parameters)
    return own and fact(str(align.target), "network") != "text_encoder"


def check_precision(method: MethodSettings, trainer: TrainerSettings, here: bool) -> None:
    """Raises UserError for 16-mixed on a CPU, where Lightning would silently train in bf16-mixed. here: whether this
    machine will carry out the run."""
    on_cpu = trainer.accelerator == "cpu" or (here and not devices.number())
    if trainer.precision == "16-mixed" and on_cpu and method.align.steps:
        raise UserError("trainer.precision=16-mixed is for CUDA devices: on a CPU use bf16-mixed or 32-true.")


def check_sweep(trainer: TrainerSettings) -> None:
    """Raises UserError for a sweep of distributed runs: each of their processes repeats the whole command, with -m."""
    asked = setting_types.typed_devices(trainer.devices)
    several = len(asked) > 1 if isinstance(asked, (list, tuple)) else asked not in (0, 1)
    several = several or trainer.nodes > 1 or int(os.environ.get("WORLD_SIZE") or 1) > 1
    if several or trainer.strategy.startswith("ddp"):
        raise UserError(
            "-m cannot be combined with several devices per run, because each process would start the whole sweep "
            "again: use trainer=default (one erasure fits one GPU) and spread the jobs with hydra/launcher=joblib or "
            "submitit, or run without -m."
        )


def check_writable(place: Path, key: str) -> None:
    """Raises UserError if no file can be made in the nearest existing parent of `place`. It tries, and leaves no
    file."""
    there = next(p for p in (place.absolute(), *place.absolute().parents) if p.exists() or p.is_symlink())
    try:
        if not there.is_dir():
            raise NotADirectoryError(f"{there} is a file")
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(
            f"{key}={place} cannot be written ({error.strerror or error}): choose another folder, {key}=FOLDER."
        ) from error


def model_folder(backbone: BackboneSettings) -> Path | None:
    """The folder of the base model's files; None if they are not on this machine."""
    return folder.on_disk(backbone.pretrained)


def tokenizer_of(backbone: BackboneSettings) -> Any:
    """The backbone's tokenizer; None if it is not on this machine."""
    found = model_folder(backbone)
    return None if found is None else vocabulary.read(folder.place_of(found, "tokenizer"))


def _short(text: str, width: int = 60) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
