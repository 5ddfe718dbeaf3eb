"""What stands in a loop's checkpoint, and whether this very run could have written it.

A checkpoint is numbers alone, in a safetensors file: the trained weights, the optimiser's moments of them, what the
latent source keeps, the lines of losses so far, and how many steps were done. All else follows from the run's settings
and from the steps, and is never read: rates, hyperparameters, Lightning's own counts. Somebody else may have written
the file, so nothing of it is used before all of it has the form that the run itself would give it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realera.files import checksums, finite, headers, json_shapes, plain_data
from realera.files.plain_data import json_text

FORMAT = "realera-loop/1"
LONGEST_LINE = 1 << 16  # bytes of a step's losses: a term has thirty
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
WEIGHT, LATENTS, COUNT, LOSSES = "weight.", "latents.", "count.", "losses"


@dataclass(frozen=True)
class Saved:
    """A loop after `step` steps.

    moments: {index of a parameter in the optimiser: its state}, of those that had a gradient. losses: the lines so far.
    scale: the loss's scale in 16-mixed and the steps since it grew; None in other precisions.
    """

    step: int
    weights: Mapping[str, Tensor]
    moments: Mapping[int, Mapping[str, Tensor]]
    latents: Mapping[str, Tensor]
    losses: Sequence[str]
    scale: tuple[float, int] | None = None


@dataclass(frozen=True)
class Form:
    """What a run's checkpoint looks like.

    weights: what is trained, by name. trained: the optimiser's parameters; parameter i is changed in the steps of
    concept i % concepts. latents: the shapes of what the latent source keeps after so many steps. scale: the scaler's
    first scale and the steps in which it may double; None where there is none.
    """

    steps: int
    weights: Mapping[str, Tensor]
    trained: Sequence[Tensor]
    concepts: int
    latents: Callable[[int], Mapping[str, tuple[int, ...]]]
    scale: tuple[float, int] | None = None


def write(file: Path, identity: str, saved: Saved) -> None:
    """Whole or not at all, with a checksum."""
    tensors = {WEIGHT + name: value for name, value in saved.weights.items()}
    for i, state in saved.moments.items():
        tensors |= {f"{name}.{i}": state[name] for name in MOMENTS} | {f"{COUNT}{i}": state["step"]}
    tensors |= {LATENTS + name: value for name, value in saved.latents.items()}
    tensors[LOSSES] = torch.frombuffer(bytearray("\n".join(saved.losses).encode()), dtype=torch.uint8)
    loop = json_text({"step": saved.step, "scale": saved.scale})
    numbers = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksums.save(file, numbers, {"format": FORMAT, "identity": identity, "loop": loop})


def stamp(file: Path) -> str:
    """The identity of the run that a checkpoint belongs to. Raises Torn for one that is not as it was written, or none
    of this version's."""
    checksums.verify(file)
    said = checksums.metadata(file)
    if said.get("format") != FORMAT or checksums.KEY not in said or "identity" not in said:
        raise checksums.Torn(f"{file} is torn or no checkpoint")
    return said["identity"]


def read(file: Path, form: Form, turns: Callable[[int, int], list[int]]) -> Saved:
    """A checkpoint's content, on the CPU. turns: of a number of steps, how many are each concept's.

    Raises ValueError for what this run would not have written; the text says what, as in "the weight a is another".
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
            raise ValueError(f"{COUNT}{i} is no count of its steps")
        if state["exp_avg_sq"].numel() and float(state["exp_avg_sq"].min()) < 0:
            raise ValueError(f"exp_avg_sq.{i} is below 0, and is a mean of squares")
    if form.scale is None and sum(float(state["step"]) for state in moments.values()) < step:
        raise ValueError("the optimiser knows less than was trained")  # every step changes something
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
        raise ValueError("its steps are not counted")
    step, scale = said["step"], said["scale"]
    if not 0 < step <= form.steps:
        raise ValueError(f"it is of step {step}, of {form.steps}")
    if form.scale is None or scale is None:
        if form.scale is not None or scale is not None:
            raise ValueError("it was trained in another precision")
        return step, None
    first, growing = form.scale
    fits = isinstance(scale, list) and [type(value) for value in scale] == [float, int] and 0 <= scale[1] < growing
    if not fits or not 0 < scale[0] <= math.ldexp(first, min(step // growing, 100)):
        raise ValueError("the loss's scale is none of 16-mixed")
    return step, (scale[0], scale[1])


def _check_names(stored: Mapping[str, headers.Stored], form: Form, step: int, own: Sequence[int]) -> None:
    """By the file's header alone: nothing that is larger than the run's own is read."""
    wanted = {WEIGHT + name: _stored(value) for name, value in form.weights.items()}
    for i, parameter in enumerate(form.trained):
        if own[i % form.concepts] and f"{COUNT}{i}" in stored:
            wanted |= {f"{COUNT}{i}": headers.Stored("F32", ())}
            wanted |= {f"{name}.{i}": _stored(parameter) for name in MOMENTS}
    wanted |= {LATENTS + name: headers.Stored("F32", tuple(shape)) for name, shape in form.latents(step).items()}
    found = dict(stored)
    losses = found.pop(LOSSES, None)
    if losses is None or losses.dtype != "U8" or math.prod(losses.shape) > step * LONGEST_LINE:
        raise ValueError("its losses are no text")
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            what = "missing" if name not in found else "no part of it" if name not in wanted else "of another form"
            raise ValueError(f"{name} is {what}")


def _stored(tensor: Tensor) -> headers.Stored:
    return headers.Stored(DTYPES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))


def _lines(content: bytes, step: int) -> list[str]:
    """The lines of losses.jsonl up to a step: as this package writes them, to the letter."""
    lines = content.decode().split("\n")
    if len(lines) != step:
        raise ValueError(f"it holds the losses of {len(lines)} steps, of {step}")
    for number, line in enumerate(lines, 1):
        said = plain_data.json_of(line)
        terms = dict(said) if isinstance(said, dict) else {}
        whose = terms.pop("step", None)
        fits = type(whose) is int and whose == number and "loss" in terms and all(map(_is_loss, terms.values()))
        if not fits or json_text(said) != line:
            raise ValueError(f"the losses of step {number} are none")
    return lines


def _is_loss(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)
