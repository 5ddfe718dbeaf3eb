"""Reads and writes training checkpoints, and checks that this run could have written the checkpoint.

A checkpoint is a safetensors file with numbers only: the trained weights, the optimiser's moments, the state of the
latent source, the lines of losses.jsonl, and the number of steps. Learning rates, hyperparameters and Lightning's
counters follow from the settings and the number of steps, and are never read. The file may come from somebody else, so
nothing is used before the whole file has passed the checks.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realera import paths
from realera.contracts import UserError
from realera.files import checksums, finite, headers, json_shapes, plain_data
from realera.files.plain_data import json_text

FORMAT = "realera-loop/1"
LONGEST_LINE = 1 << 16  # bytes of a step's losses; one term takes thirty
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
WEIGHT, LATENTS, COUNT, LOSSES = "weight.", "latents.", "count.", "losses"


@dataclass(frozen=True)
class Saved:
    """The state of training after `step` steps.

    moments: {index of a parameter in the optimiser: its state}, for parameters that had a gradient. losses: the lines
    of losses.jsonl. scale: the loss scale in 16-mixed and the steps since it grew; None in other precisions.
    """

    step: int
    weights: Mapping[str, Tensor]
    moments: Mapping[int, Mapping[str, Tensor]]
    latents: Mapping[str, Tensor]
    losses: Sequence[str]
    scale: tuple[float, int] | None = None


@dataclass(frozen=True)
class Form:
    """The form that a run's checkpoint must have.

    weights: the trained parameters by name. trained: the optimiser's parameters; parameter i is changed in the steps of
    concept i % concepts. latents: the shapes of the latent source's state after a number of steps. scale: the scaler's
    initial scale and its growth interval in steps; None without a scaler.
    """

    steps: int
    weights: Mapping[str, Tensor]
    trained: Sequence[Tensor]
    concepts: int
    latents: Callable[[int], Mapping[str, tuple[int, ...]]]
    scale: tuple[float, int] | None = None


def write(file: Path, identity: str, saved: Saved) -> None:
    """Writes the file completely or not at all, with a checksum."""
    tensors = {WEIGHT + name: value for name, value in saved.weights.items()}
    for i, state in saved.moments.items():
        tensors |= {f"{name}.{i}": state[name] for name in MOMENTS} | {f"{COUNT}{i}": state["step"]}
    tensors |= {LATENTS + name: value for name, value in saved.latents.items()}
    tensors[LOSSES] = torch.frombuffer(bytearray("\n".join(saved.losses).encode()), dtype=torch.uint8)
    loop = json_text({"step": saved.step, "scale": saved.scale})
    numbers = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksums.save(file, numbers, {"format": FORMAT, "identity": identity, "loop": loop})


def identity_of(file: Path) -> str:
    """The identity of the run that a checkpoint belongs to. Raises Torn for a torn file and for a file that is not a
    checkpoint of this version."""
    checksums.verify(file)
    said = checksums.metadata(file)
    if said.get("format") != FORMAT or checksums.KEY not in said or "identity" not in said:
        raise checksums.Torn(f"{file} is torn or not a checkpoint")
    return said["identity"]


def last_good(run_dir: Path, identity: str) -> bool:
    """Whether there is a checkpoint to resume from. If it is torn, a log line says so, and training starts again.

    Raises UserError for a checkpoint of another run, and for one that is not a regular file of the run."""
    file = run_dir / paths.LAST_CHECKPOINT
    paths.refuse_odd(run_dir)
    if not file.is_file():
        return False
    try:
        found = identity_of(file)
    except checksums.Torn:
        checksums.log_torn(file)
        return False
    same_run(found, identity, file)
    return True


def same_run(found: str, identity: str, file: Path) -> None:
    """Raises UserError for a file of another run."""
    if found != identity:
        raise UserError(f"{file} belongs to a run with other settings: set overwrite=true, or another run_dir.")


@contextmanager
def without_checkpoint(run_dir: Path, first: bool = True) -> Iterator[None]:
    """Deletes the checkpoint if training ends in NaN: resuming from it would lead to NaN again. first: whether this
    process may delete it."""
    try:
        yield
    except finite.NotFinite:
        if first:
            shutil.rmtree(run_dir / paths.FIT, ignore_errors=True)
        raise


def read(file: Path, form: Form, turns: Callable[[int, int], list[int]]) -> Saved:
    """A checkpoint's content, on the CPU. turns: see `schedule.steps_per_concept`.

    Raises ValueError, with the reason, for a file that this run cannot have written.
    """
    step, scale = _loop(checksums.metadata(file).get("loop", ""), form)
    own = turns(step, form.concepts)
    _check_names(headers.tensors(file), form, step, own)
    tensors = checksums.content(file)
    if (bad := finite.first_bad(tensors)) is not None:
        raise ValueError(f"{bad} holds NaN or infinity")
    moments = {
        i: {"step": tensors[f"{COUNT}{i}"], **{name: tensors[f"{name}.{i}"] for name in MOMENTS}}
        for i in range(len(form.trained))
        if f"{COUNT}{i}" in tensors
    }
    for i, state in moments.items():
        count = float(state["step"])
        if not 1 <= count <= own[i % form.concepts] or count != int(count):
            raise ValueError(f"{COUNT}{i} is not a possible number of steps")
        if state["exp_avg_sq"].numel() and float(state["exp_avg_sq"].min()) < 0:
            raise ValueError(f"exp_avg_sq.{i} is below 0, but it is a mean of squares")
    if form.scale is None and sum(float(state["step"]) for state in moments.values()) < step:
        raise ValueError("the optimiser has counted fewer steps than were trained")  # every step changes something
    return Saved(
        step,
        weights={name: tensors[WEIGHT + name] for name in form.weights},
        moments=moments,
        latents={name.removeprefix(LATENTS): tensors[name] for name in tensors if name.startswith(LATENTS)},
        losses=_lines(bytes(tensors[LOSSES].numpy()), step),
        scale=scale,
    )


def _loop(text: str, form: Form) -> tuple[int, tuple[float, int] | None]:
    """The step and the scale."""
    said = plain_data.json_of(text)
    if not json_shapes.fits(said, {"step": lambda step: type(step) is int, "scale": object}) or len(said) != 2:
        raise ValueError("it has no number of steps")
    step, scale = said["step"], said["scale"]
    if not 0 < step <= form.steps:
        raise ValueError(f"its step is {step}, and the run has {form.steps} steps")
    if form.scale is None or scale is None:
        if form.scale is not None or scale is not None:
            raise ValueError("it was trained in another precision")
        return step, None
    first, growing = form.scale
    fits = isinstance(scale, list) and [type(value) for value in scale] == [float, int] and 0 <= scale[1] < growing
    if not fits or not 0 < scale[0] <= math.ldexp(first, min(step // growing, 100)):
        raise ValueError("its loss scale is not possible in 16-mixed")
    return step, (scale[0], scale[1])


def _check_names(stored: Mapping[str, headers.Stored], form: Form, step: int, own: Sequence[int]) -> None:
    """Checks only the file's header, so that tensors larger than the run's own are never read."""
    wanted = {WEIGHT + name: _stored(value) for name, value in form.weights.items()}
    for i, parameter in enumerate(form.trained):
        if own[i % form.concepts] and f"{COUNT}{i}" in stored:
            wanted |= {f"{COUNT}{i}": headers.Stored("F32", ())}
            wanted |= {f"{name}.{i}": _stored(parameter) for name in MOMENTS}
    wanted |= {LATENTS + name: headers.Stored("F32", tuple(shape)) for name, shape in form.latents(step).items()}
    found = dict(stored)
    losses = found.pop(LOSSES, None)
    if losses is None or losses.dtype != "U8" or math.prod(losses.shape) > step * LONGEST_LINE:
        raise ValueError("its losses are not a text")
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            fault = "missing" if name not in found else "unexpected" if name not in wanted else "of another form"
            raise ValueError(f"{name} is {fault}")


def _stored(tensor: Tensor) -> headers.Stored:
    return headers.Stored(DTYPES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))


def _lines(content: bytes, step: int) -> list[str]:
    """The lines of losses.jsonl up to a step. They must be exactly as this package writes them."""
    lines = content.decode().split("\n")
    if len(lines) != step:
        raise ValueError(f"it has the losses of {len(lines)} steps, and {step} are expected")
    for number, line in enumerate(lines, 1):
        said = plain_data.json_of(line)
        terms = dict(said) if isinstance(said, dict) else {}
        stated = terms.pop("step", None)
        fits = type(stated) is int and stated == number and "loss" in terms and all(map(_is_loss, terms.values()))
        if not fits or json_text(said) != line:
            raise ValueError(f"the losses of step {number} are not valid")
    return lines


def _is_loss(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)
