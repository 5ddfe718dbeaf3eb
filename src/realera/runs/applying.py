"""Applies maps to checkpoints on disk (the command `apply`): reads one, changes its denoiser and writes a new folder.

The new folder has realera_applied.json, which says what was applied in which order, so that the same map is not applied
twice without notice and can be taken off again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realera import __version__, paths
from realera.backbones import folder, kinds, portable, text_marks
from realera.contracts import JOINT, KEYS, VALUES, UserError
from realera.files import headers, json_shapes, plain_data
from realera.runs import sources
from realera.runs.folders import Run
from realera.training import maps
from realera.training.maps import Map

log = logging.getLogger("realera")

FORMAT = "realera-applied/1"
LOSS = 0.1  # largest accepted bound of the rounding error of a map that is taken off, a share of the weights' norm
ENTRY = {  # beside: parts of the erasure that the weights have besides the map, in the export of a run
    "map": str,
    "beside?": [str],
    "method": str,
    "concepts": [str],
    "anchors": [str],
    "projections": str,
    "weight": json_shapes.number,
}
RECORD = {
    "format": json_shapes.one_of(FORMAT),
    "realera": str,
    "source": str,
    "source_weights": json_shapes.maybe(str),
    "applied": [ENTRY],
    "removed": [ENTRY],
}
EVEN_SO = "to apply it even so, give check=false"


@dataclass(frozen=True)
class Application:
    """Maps with their weights, in the order in which they are applied to the weights, or taken off (remove). check:
    whether the text encoder must be the maps' own, and maps must not be applied twice."""

    maps: Sequence[Map]
    weights: Sequence[float]
    remove: bool = False
    check: bool = True

    def __post_init__(self) -> None:
        """Raises UserError for a map that is given twice."""
        seen: set[str] = set()
        for one in () if self.remove or not self.check else self.maps:
            if one.digest in seen:
                raise UserError(f"The map of {one} is given twice ({one.name}): give it once; {EVEN_SO}.")
            seen.add(one.digest)

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [_entry(one, weight) for one, weight in zip(self.maps, self.weights, strict=True)]

    def factors(self, joint: bool = False) -> tuple[dict[str, Tensor], float]:
        """{suffix of layers: the matrix to multiply their weights by}, and its condition number if it is an inverse
        (else 1). joint: for a transformer. Raises UserError if the maps do not fit together or cannot be taken off."""
        total = maps.composed(self.maps, self.weights, joint)
        return maps.inverse(total) if self.remove else (total, 1.0)

    def refuse_known(self, whose: str, known: AbstractSet[str]) -> None:
        """Raises UserError if a map is to be applied again. known: the digests of the maps that are there."""
        for one in self.maps if self.check else ():
            if one.digest in known:
                raise UserError(f"{whose} already has the map of {one}: leave it out; {EVEN_SO}.")

    def warn(self) -> None:
        """Logs what a user may overlook: maps that are not the whole erasure, and maps whose order matters."""
        for one in self.maps:
            if one.left_out:
                parts, verb = " and the ".join(one.left_out), "are" if len(one.left_out) > 1 else "is"
                log.warning("%s: the map is the closed form only; the %s of its run %s not in it", one, parts, verb)
        if share := maps.order_matters(self.maps, self.weights):
            log.warning(
                "these maps do not commute: in the opposite order the result differs by %.1f%% of the change. What "
                "the first one erases stays erased; it may disturb those after it.",
                100 * share,
            )


def _entry(map: Map, weight: float) -> dict[str, Any]:
    return {
        "map": map.digest,
        "method": map.method,
        "concepts": list(map.concepts),
        "anchors": list(map.anchors),
        "projections": map.word,
        "weight": weight,
    }


def refuse_other_text(applied: Application, found: Mapping[str, str], whose: str) -> None:
    """Raises UserError unless `found` are the marks of the text encoder that every map was made for."""
    for one in applied.maps if applied.check else ():
        if not one.text:
            raise UserError(
                f"The map {one.name} does not say which text encoder it was made for, because an earlier version wrote "
                f"it: export it again (python -m realera.export run=... to=map) where its base model is; {EVEN_SO}."
            )
        if not text_marks.same(one.text, found):
            made, there = (marks.get("float16", "unknown") for marks in (one.text, found))
            raise UserError(
                f"The map {one.name} was made for the text encoder {made}, and {whose} has {there}, whose text states "
                f"the map does not know: choose a checkpoint with the map's text encoder; {EVEN_SO}."
            )


def apply_to(pretrained: str, out: Path, applied: Application) -> bool:
    """Writes the checkpoint with its maps applied (or taken off) to the folder `out`. Returns False if that is already
    there.

    Raises:
        UserError: the checkpoint cannot be read, has another text encoder, or `out` contains other files.
    """
    place = sources.located(pretrained)
    before = read_record(place)
    record = recorded(pretrained, place, before, applied)
    if out.is_dir() and any(out.iterdir()):
        if (there := read_record(out)) is not None and {**there, "realera": __version__} == record:
            return False
        raise UserError(f"{out} contains other files: give a new or an empty folder as out.")
    if out.resolve() == Path.cwd():
        raise UserError(f"out={out} is the current folder, which is replaced as a whole: give a new folder as out.")
    if applied.check:
        refuse_other_text(applied, text_marks.of_folder(place), pretrained)
    if (kind := kinds.of(place)) == kinds.ONE_CLIP:
        raise UserError(
            f"{pretrained} is a Stable Diffusion 3 with one text encoder, and diffusers has no pipeline for it: give "
            "one with two text encoders, a FLUX or a U-Net's checkpoint."
        )
    factors, condition = applied.factors(joint=kind != kinds.UNET)
    refuse_other_width(place, applied.maps[0].width)
    bound = refuse_loss(place, condition) if applied.remove else 0.0
    noise, norm = 0.0, 0.0
    changed: list[str] = []

    def change(name: str, weight: Tensor) -> Tensor:
        nonlocal noise, norm
        suffix = next((one for one in factors if name.endswith(f"{one}.weight")), None)
        if suffix is None:
            return weight
        changed.append(name)
        new = weight.double() @ factors[suffix]
        if applied.remove:
            noise += float((rounding(weight) @ factors[suffix].square()).sum() + rounding(new.to(weight.dtype)).sum())
            norm += float(new.square().sum())
        return new

    portable.save_changed(place, change, out, {paths.APPLIED: text_of(record)})
    log.info("%s: %d layers changed", out, len(changed))
    if applied.remove:
        error = (noise / norm) ** 0.5 if norm else 0.0
        said = "the weights are restored up to rounding: they differ by about %.1e of their norm (no more than %.1e)"
        log.info(said, error, bound)
    return True


def refuse_other_width(place: Path, width: int) -> None:
    """Raises UserError if a layer of the denoiser that takes a map reads text states of another width."""
    found = {stored.shape[1] for stored in _readers(place)}
    if found != {width}:
        said = " and ".join(map(str, sorted(found))) or "none"
        word = kinds.DENOISERS[kinds.denoiser(place)]
        raise UserError(
            f"The map is for text states of width {width} and the {word} in {str(place)!r} reads the width {said}: "
            "give a checkpoint with the map's text encoder."
        )


def _readers(place: Path) -> list[headers.Stored]:
    """The weights of the layers that take a map."""
    part = kinds.denoiser(place)
    ends = (f"{KEYS}.weight", f"{VALUES}.weight") if part == "unet" else (f"{JOINT}.weight",)
    files = folder.part_files(place, part)[1]
    return [stored for file in files for name, stored in headers.tensors(file).items() if name.endswith(ends)]


def rounding(weight: Tensor) -> Tensor:
    """The variances of the rounding errors of stored weights, float64: spacing^2 / 12."""
    limits = torch.finfo(weight.dtype)
    _, exponent = torch.frexp(weight.double())
    spacing = (limits.eps * torch.exp2(exponent.double() - 1)).clamp(min=limits.eps * limits.smallest_normal)
    return torch.where(weight == 0, 0.0, spacing.square() / 12)


def refuse_loss(place: Path, condition: float) -> float:
    """The bound of the error, as a share of the weights' norm, if a map is taken off: the rounding of the stored
    weights, multiplied by the condition number. Raises UserError if it is above `LOSS`."""
    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    stored = _readers(place)
    dtype = dtypes.get(stored[0].dtype, torch.float32) if stored else torch.float32
    loss = condition * torch.finfo(dtype).eps / 2
    if loss > LOSS:
        raise UserError(
            f"The map cannot be taken off {str(place)!r}: its weights are rounded to "
            f"{str(dtype).removeprefix('torch.')}, and the inverse could multiply that rounding to {100 * loss:.0f}% "
            "of the weights. Use the checkpoint that the map was applied to."
        )
    return loss


# --- the record ------------------------------------------------------------------------------------------------------


def read_record(place: Path) -> dict[str, Any] | None:
    """The content of a folder's realera_applied.json; None if it has none. Raises UserError if it is damaged."""
    file = place / paths.APPLIED
    if not file.is_file():
        return None
    try:
        found = plain_data.read_json(file)
    except (OSError, ValueError):
        found = None
    if not json_shapes.fits(found, RECORD):
        raise UserError(f"{file} is not as realera wrote it: copy the folder again, or remove that file.")
    assert isinstance(found, dict)
    return found


def refuse_twice(pretrained: str, before: Mapping[str, Any] | None, applied: Application) -> None:
    """Logs the maps that a checkpoint already has. Raises UserError if one of them is to be applied again."""
    there = before["applied"] if before else []
    for entry in there:
        what = maps.described(entry["concepts"], entry["method"])
        log.info("%s already has a map: %s, weight %g", pretrained, what, entry["weight"])
    applied.refuse_known(pretrained, {entry["map"] for entry in there})


def of_export(run: Run, source: Path) -> dict[str, Any] | None:
    """The record of a whole model that is exported from a run: the maps of its base model and its own. None if there
    are none. source: the base model's folder."""
    before, file = read_record(source), run.folder / paths.MAP
    if before is None and not file.is_file():
        return None
    own = []
    if file.is_file():
        found = maps.read(file)
        own = [{**_entry(found, 1.0), **({"beside": list(found.left_out)} if found.left_out else {})}]
    there = before or {"applied": [], "removed": []}
    return _record(source.resolve().name, source, [*there["applied"], *own], there["removed"])


def text_of(record: Mapping[str, Any]) -> str:
    return plain_data.json_text(record, indent=1, ensure_ascii=False) + "\n"


def recorded(pretrained: str, place: Path, before: Mapping[str, Any] | None, applied: Application) -> dict[str, Any]:
    """The record of the new folder. before: the source's own.

    Raises:
        UserError: the source already has one of the maps, or does not have those that are to be taken off as its last.
    """
    there = list(before["applied"]) if before else []
    removed = list(before["removed"]) if before else []
    new = applied.entries
    if applied.remove:
        beside = [part for entry in there[-len(new) :] for part in entry.get("beside", ())]
        if beside and applied.check:
            raise UserError(
                f"{pretrained} is the export of a run and also has its {' and its '.join(beside)}, which stays if the "
                "map is taken off: use the run's base model; to take the map off even so, give check=false."
            )
        if there[len(there) - len(new) :] == new and len(there) >= len(new):
            there = there[: len(there) - len(new)]
        elif applied.check:
            listed = "; ".join(f"{maps.described(e['concepts'], e['method'])}, weight {e['weight']:g}" for e in there)
            raise UserError(
                f"{pretrained} does not have these maps with these weights as the last ones applied (it has: "
                f"{listed or 'none'}): give them in the order in which they were applied; to take them off even so, "
                "give check=false."
            )
        removed += new
    else:
        refuse_twice(pretrained, before, applied)
        there += new
    source = pretrained if paths.dir_of(pretrained) is None else place.resolve().name
    return _record(source, place, there, removed)


def _record(source: str, place: Path, applied: Sequence[Any], removed: Sequence[Any]) -> dict[str, Any]:
    """source: the name of the checkpoint in the folder `place`."""
    return {
        "format": FORMAT,
        "realera": __version__,
        "source": source,
        "source_weights": folder.quick_fingerprint(place),
        "applied": list(applied),
        "removed": list(removed),
    }
