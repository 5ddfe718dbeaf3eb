"""Maps of closed forms (map.safetensors), to be applied to other checkpoints: W = W0 M for the projections it names.

A weight w scales the change: W = W0 (I + w (M - I)). Several maps are applied to the weights in the order of their
list, W = W0 M1 M2 ..., so a text state k is mapped by the last one first: M1 (M2 k). In general maps do not commute.
What the first one erases stays erased, because it acts last on a text state (a projection's readings are then 0 for
every text), but it may disturb those after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realera.closed_form import compose, interpolate
from realera.contracts import JOINT, KEYS, PROJECTIONS, VALUES, UserError
from realera.files import checksums, json_shapes, plain_data
from realera.settings.run_settings import MethodSettings, Settings
from realera.training.checkpoint import read_map_whole

MOST_NAMED = 3  # concepts that are named in one line
LONGEST = 80  # letters of a name in a sentence
SINGULAR = 1e6  # condition number; maps are stored in float32, so a larger one says nothing about the inverse
COMMUTE = 1e-5  # share of the change; float32 rounding stays below
TEXTS = [str]
MARKS = {...: str}


@dataclass(frozen=True)
class Map:
    """A map of a file. matrix: M (D, D) float64. projections: suffixes of its layers. text: the marks of its text
    encoder (backbones.text_marks), {} if the file does not say it. concepts, anchors: as in the run. left_out: parts of
    the run's method that changed weights and are not in the map. digest: of the matrix and the projections."""

    name: str
    matrix: Tensor
    projections: tuple[str, ...]
    text: Mapping[str, str]
    method: str
    concepts: Sequence[str]
    anchors: Sequence[str]
    left_out: Sequence[str]
    digest: str

    @property
    def width(self) -> int:
        return len(self.matrix)

    @property
    def word(self) -> str:
        """values, keys or both."""
        return next(word for word, suffixes in PROJECTIONS.items() if set(suffixes) == set(self.projections))

    def __str__(self) -> str:
        return described(self.concepts, self.method)


def about(
    method: str, concepts: Sequence[str], anchors: Sequence[str], text: Mapping[str, str] | None
) -> dict[str, str]:
    """The metadata of a map that `read` reads, besides those that every file of a fit has. text: marks of the text
    encoder; None if they are not known."""
    said = {"method": method, "concepts": json_of(concepts), "anchors": json_of(anchors)}
    return said if text is None else {**said, "text_encoder": json_of(text)}


def json_of(content: Any) -> str:
    return plain_data.json_text(content, ensure_ascii=False, sort_keys=True)


def read(file: Path) -> Map:
    """Raises UserError if the file is missing, torn or not a map, or has values that are not finite."""
    matrix, origin, said = read_map_whole(file)
    settings = Settings(origin.config)
    named = [] if settings.concept is None else settings.concepts
    try:
        projections = _suffixes(said["projections"])
        concepts, anchors = (_json(said.get(key, ""), TEXTS, []) for key in ("concepts", "anchors"))
        text = _json(said.get("text_encoder", ""), MARKS, {})
    except (KeyError, ValueError) as error:
        raise UserError(f"{file} has metadata that no map has ({error}): export it again from its run.") from None
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.is_floating_point():
        kind = str(matrix.dtype).removeprefix("torch.")
        raise UserError(
            f"{file} holds a tensor of shape {tuple(matrix.shape)} in {kind}, and a map is a square matrix of "
            "floating-point numbers: export it again from its run."
        )
    return Map(
        name=str(file),
        matrix=matrix.double(),
        projections=projections,
        text=text,
        method=str(said.get("method") or settings.method.name or "unknown method"),
        concepts=concepts or named,
        anchors=anchors,
        left_out=left_out(settings.method),
        digest=checksums.digest_of(matrix.float().contiguous().numpy().tobytes() + repr(projections).encode()),
    )


def left_out(method: MethodSettings) -> list[str]:
    """The parts of a run's method that changed weights after the first closed form, so that its map lacks them."""
    align, finish = method.align, method.finish
    if align and align.steps == 0:  # nothing was trained, so there is nothing to finish
        return []
    trained = [] if not align else ["LoRA" if align.lora else "training"]
    return [*trained, *([finish.class_name.lower()] if finish else [])]


def described(concepts: Sequence[str], method: str) -> str:
    """ "airplane by uce"."""
    named = ", ".join(_shortened(one) for one in concepts[:MOST_NAMED]) or "an unnamed concept"
    more = f" and {len(concepts) - MOST_NAMED} more" if len(concepts) > MOST_NAMED else ""
    return f"{named}{more} by {_shortened(method)}"


def _shortened(name: str) -> str:
    """A file from elsewhere may say anything."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."


# --- what is applied -------------------------------------------------------------------------------------------------


def composed(maps: Sequence[Map], weights: Sequence[float], joint: bool = False) -> dict[str, Tensor]:
    """{suffix of layers: M1 M2 ... (D, D) float64} of the weighted maps, each on its own projections. joint: for a
    transformer, whose one layer `JOINT` takes every map. Raises UserError if they have different widths."""
    if len(widths := {one.width for one in maps}) > 1:
        raise UserError(
            f"The maps are of text states of the widths {' and '.join(map(str, sorted(widths)))}, so they belong to "
            "different text encoders: apply them to different checkpoints."
        )
    total: dict[str, Tensor] = {}
    for one, weight in zip(maps, weights, strict=True):
        matrix = interpolate(one.matrix, weight)
        for suffix in (JOINT,) if joint else one.projections:
            total[suffix] = compose(matrix, total[suffix]) if suffix in total else matrix
    return total


def order_matters(maps: Sequence[Map], weights: Sequence[float]) -> float:
    """How far the product of the maps in the opposite order is from theirs, ||difference|| / ||change||; the largest of
    all projections, and 0 if the maps commute."""
    there, back = composed(maps, weights), composed(maps[::-1], weights[::-1])
    shares = [0.0]
    for suffix, matrix in there.items():
        change = float(torch.linalg.norm(matrix - torch.eye(len(matrix), dtype=torch.float64)))
        shares.append(float(torch.linalg.norm(matrix - back[suffix])) / change if change else 0.0)
    return max(shares) if max(shares) > COMMUTE else 0.0


def inverse(total: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """{suffix: inverse of its map}, and their largest condition number.

    Raises:
        UserError: a map is singular.
    """
    numbers = {suffix: float(torch.linalg.cond(matrix)) for suffix, matrix in total.items()}
    worst = max(numbers.values(), default=1.0)
    if not worst < SINGULAR:
        raise UserError(
            f"The map cannot be taken off, because it is singular (condition number {worst:.0e}): as an oblique "
            "projection it maps many text states to one, and the weights no longer say which one they came from. Use "
            "the checkpoint that the map was applied to, or apply it with a weight below 1, which can be taken off."
        )
    return {suffix: torch.linalg.inv(matrix) for suffix, matrix in total.items()}, worst


def _suffixes(said: str) -> tuple[str, ...]:
    """The projections of a file: values, keys or both; in files of earlier versions a JSON list of suffixes."""
    if said in PROJECTIONS:
        return PROJECTIONS[said]
    listed = plain_data.json_of(said)
    if not json_shapes.fits(listed, [json_shapes.one_of(KEYS, VALUES)]) or not listed:
        raise ValueError("its projections are not values, keys or both")
    return tuple(suffix for suffix in (KEYS, VALUES) if suffix in listed)


def _json(said: str, shape: Any, absent: Any) -> Any:
    if not said:
        return absent
    found = plain_data.json_of(said)
    if not json_shapes.fits(found, shape):
        raise ValueError("it has another structure")
    return found
