"""The files of a fit: erased.safetensors, map.safetensors and neighbours.safetensors. Each has a checksum and metadata
about its origin."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from realera import __version__
from realera.contracts import KEYS, PROJECTIONS, VALUES, Backbone, LoraSpec, Neighbours, UserError
from realera.files import checksums, finite, plain_data
from realera.paths import FIT_FILES

FORMAT = "realera/1"
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "lightning", "safetensors")


@dataclass(frozen=True)
class Origin:
    """The origin of a file: the resolved config, the backbone's name and the content id of its weights, and `identity`,
    a hash of the settings that decide the result."""

    config: Mapping[str, Any]
    backbone: str
    fingerprint: str
    identity: str = ""


@dataclass(frozen=True)
class Erased:
    """The content of an erased.safetensors. state: for `Backbone.load_erased`."""

    state: dict[str, Tensor]
    origin: Origin
    lora: LoraSpec | None
    version: str
    libraries: dict[str, str]


def save_erased(path: Path, backbone: Backbone, origin: Origin, lora: LoraSpec | None) -> None:
    """Saves the weights that differ from the original ones. lora: the spec of their adapter, if they have one. The
    metadata contains the digests of the fit's other files in the folder."""
    found = {name: checksums.digest(path.parent / name) for name in FIT_FILES}
    beside = json.dumps({name: digest for name, digest in found.items() if digest is not None})
    said = json.dumps(None if lora is None else asdict(lora))
    _save(path, backbone.erased_state(), origin, lora=said, **{checksums.BESIDE: beside})


def read_erased(path: Path) -> Erased:
    """Raises UserError for a file that is missing or was not written by this package, Torn for a torn file."""
    state, metadata = _read(path)
    if "lora" not in metadata:
        raise UserError(f"{path} has no erased weights: give a run's erased.safetensors.")
    try:
        lora = plain_data.json_of(metadata["lora"])
        return Erased(
            state=state,
            origin=_origin(metadata),
            lora=None if lora is None else LoraSpec(**{**lora, "targets": tuple(lora["targets"])}),
            version=metadata["version"],
            libraries=plain_data.json_of(metadata["libraries"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _not_ours(path) from error


def load_erased(path: Path, backbone: Backbone) -> Erased:
    """Applies a file's weights to the backbone they were made with.

    Raises UserError as `read_erased`, and for another backbone.
    """
    erased = read_erased(path)
    if erased.origin.fingerprint != backbone.fingerprint:
        raise UserError(
            f"{path} was made with backbone {erased.origin.backbone} ({erased.origin.fingerprint}), not with "
            f"{backbone.name} ({backbone.fingerprint}): choose that backbone, or transfer the edit with its "
            "map.safetensors."
        )
    backbone.load_erased(erased.state)
    return erased


def save_map(
    path: Path,
    map: Tensor,
    origin: Origin,
    projections: Sequence[str] = (KEYS, VALUES),
    about: Mapping[str, str] | None = None,
) -> None:
    """Saves the map (D, D) of a closed form in float32: W = W0 @ map. projections: suffixes of the layers it is for.
    about: further metadata (see `maps.about`)."""
    word = next((name for name, suffixes in PROJECTIONS.items() if set(suffixes) == set(projections)), None)
    said = {"projections": word or json.dumps(list(projections)), "width": str(len(map)), **(about or {})}
    _save(path, {"map": map.float()}, origin, **said)


def read_map(path: Path) -> tuple[Tensor, Origin]:
    """Raises UserError as `read_erased`."""
    map, origin, _ = read_map_whole(path)
    return map, origin


def read_map_whole(path: Path) -> tuple[Tensor, Origin, dict[str, str]]:
    """The map, its origin and all of its metadata. Raises UserError as `read_erased`."""
    state, metadata = _read(path)
    if "map" not in state:
        raise UserError(f"{path} has no map: give a run's map.safetensors.")
    try:
        return state["map"], _origin(metadata), metadata
    except (KeyError, ValueError) as error:
        raise _not_ours(path) from error


def save_neighbours(path: Path, mined: Sequence[Neighbours], origin: Origin) -> None:
    """Saves the tensors mined around concept i as "i.near", "i.near_targets", ... Points are saved in float16, which is
    enough for inspection, unless they are too large for it."""
    tensors: dict[str, Tensor] = {}
    for i, found in enumerate(mined):
        for name, tensor in tensors_of(found).items():
            small = tensor.to(torch.float16) if name in ("near", "near_targets", "beyond") else tensor
            tensors[f"{i}.{name}"] = tensor if finite.first_bad([(name, small)]) else small
    _save(path, tensors, origin)


def tensors_of(found: Neighbours) -> dict[str, Tensor]:
    """{name: tensor} of everything that was mined around a concept."""
    named = {name: getattr(found, name) for name in ("near", "near_targets", "beyond", "near_rows", "beyond_rows")}
    moments = {} if found.moments is None else vars(found.moments)
    return named | {f"moments.{name}": moment for name, moment in moments.items() if moment is not None}


def _save(path: Path, tensors: Mapping[str, Tensor], origin: Origin, **more: str) -> None:
    finite.refuse(
        tensors,
        f"{path.name} is not saved, because",
        "train with a lower method.align.lr, or edit with a larger ridge",
    )
    metadata = {
        "format": FORMAT,
        "config": yaml.safe_dump(dict(origin.config), sort_keys=False, allow_unicode=True),
        "backbone": origin.backbone,
        "fingerprint": origin.fingerprint,
        "identity": origin.identity,
        "version": __version__,
        "libraries": json.dumps({name: _version(name) for name in LIBRARIES}),
        **more,
    }
    checksums.save(path, {name: _own_memory(tensor) for name, tensor in tensors.items()}, metadata)


def _own_memory(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, in its own memory: safetensors refuses two views of the same memory."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous()
    return tensor.detach().cpu() if whole else tensor.detach().cpu().clone().contiguous()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise UserError(f"There is no {path}: give the folder of a finished run, or run realera.train first.")
    try:
        state, metadata = checksums.load(path)
    except checksums.Torn as error:
        raise checksums.Torn(f"{error}: run the command that made it again.") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} was not written by this version of realera: make it again with realera.train.")
    finite.refuse(state, f"{path} cannot be used: its", "delete it and run the command that made it again")
    return state, metadata


def _not_ours(path: Path) -> UserError:
    return UserError(f"{path} lacks the metadata about its origin: make it again with realera.train.")


def _origin(metadata: Mapping[str, str]) -> Origin:
    config = plain_data.yaml_of(metadata["config"])
    if not isinstance(config, dict):
        raise ValueError("its config is not a mapping")
    return Origin(config, metadata["backbone"], metadata["fingerprint"], metadata["identity"])


@cache
def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"
