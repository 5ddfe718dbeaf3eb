"""The Python interface to maps: an erasure's map is applied to any pipeline with the same text encoder.

import realera
applied = realera.apply(pipe, "exported/map.safetensors")
applied.pipe("a photo of an airplane").images[0]
applied.undo()
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realera.backbones import stacks
from realera.contracts import JOINT, KEYS, VALUES, UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from realera.backbones.transformer_pipelines import Pipeline
    from realera.training.maps import Map


class Applied:
    """Maps on a pipeline, whose denoiser is edited in place.

    concept: the concepts that the maps erase. weights: one number for each map.
    """

    def __init__(self, backbone: Pipeline, maps: Sequence[Map], weights: Sequence[float]) -> None:
        self.weights = list(weights)
        self._backbone = backbone
        self._maps = list(maps)
        self._undone = False
        self._number = stacks.push(backbone.denoiser, [one.digest for one in maps])

    @property
    def pipe(self) -> DiffusionPipeline:
        return self._backbone.pipe

    @property
    def concept(self) -> list[str]:
        return [concept for one in self._maps for concept in one.concepts]

    def undo(self) -> DiffusionPipeline:
        """Restores the pipeline as it was before, bit for bit. Raises UserError if a later change is still on it."""
        if self._undone:
            raise UserError("these maps were taken off: apply them again.")
        stacks.refuse_under_later(self._backbone.denoiser, self._number)
        with self._backbone.in_use():
            self._backbone.load_erased({})
        stacks.pop(self._backbone.denoiser)
        self._undone = True
        return self._backbone.pipe

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises UserError: a copy would undo the changes of a pipeline that it does not have."""
        raise UserError("applied maps belong to their pipeline: apply them again to another one.")

    def __repr__(self) -> str:
        named = "; ".join(f"{one}, weight {weight:g}" for one, weight in zip(self._maps, self.weights))
        return f"<Applied {named}{', undone' if self._undone else ''}>"


def apply(
    pipe: DiffusionPipeline | str | Path,
    map: Any,
    *,
    weight: float | Sequence[float] = 1.0,
    check: bool = True,
) -> Applied:
    """Applies the map of an erasure to a pipeline, in place: W = W0 (I + weight (M - I)) for the projections that the
    map names, or for the one layer that all text rows pass in a transformer. The result is that of the command `apply`.

    pipe: as in `erase`. map: a map.safetensors, a folder with one (a run or an export), an `Erased`, or a list of
    these. A list is applied in its order: W = W0 M1 M2; the order matters unless the maps commute, which is logged.
    weight: above 0 to 10, or one for each map; 1 is the edit of the run. check: refuse a map that was made for another
    text encoder.

    Raises:
        UserError: one sentence that says what is wrong and what to give instead. The pipeline is unchanged.
    """
    from realera.backbones import pipelines, transformer_pipelines
    from realera.contracts import Edit
    from realera.runs import applying, preflight, sources
    from realera.settings import schema
    from realera.training import maps

    files = [sources.map_file(getattr(one, "folder", one)) for one in sources.as_list(map)]
    weights = sources.weights_of(weight, len(files))
    schema.check({"weight": weights}, "apply", schema.OPEN)
    for file in files:
        preflight.check_map(file)
    applied = applying.Application([maps.read(file) for file in files], weights, check=check)
    applied.factors()  # refuses maps that do not fit together before a pipeline is loaded
    applied.warn()

    pipe = pipelines.opened(pipe) if isinstance(pipe, str | Path) else pipe
    backbone = transformer_pipelines.for_maps(pipe)
    factors, _ = applied.factors(joint=isinstance(backbone, transformer_pipelines.TransformerPipeline))
    source = str(getattr(pipe, "name_or_path", None) or type(pipe).__name__)
    if (place := sources.unpacked(source)) is not None:
        applying.refuse_twice(source, applying.read_record(place), applied)
    applied.refuse_known(source, stacks.maps_on(backbone.denoiser))
    if check:
        applying.refuse_other_text(applied, backbone.text_marks(), source)
    with backbone.in_use():
        try:
            for suffix, matrix in factors.items():
                backbone.apply(Edit(map=matrix, projections=(KEYS, VALUES) if suffix == JOINT else (suffix,)))
        except BaseException:
            backbone.load_erased({})
            raise
    return Applied(backbone, applied.maps, weights)
