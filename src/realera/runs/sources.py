"""What the command `apply` is given: the maps' files, the checkpoints, and the folder that each is written to. It does
not import torch, so that errors are reported fast."""

from __future__ import annotations

import glob
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from realera import paths
from realera.backbones import folder, kinds, single_file
from realera.contracts import UserError
from realera.runs import folders

log = logging.getLogger("realera")

MINIATURE = "mini"  # instead of a path: the built-in model
WILD = "*?["
SUFFIX = ".safetensors"  # of a single file
FOR_TRAIN = {"backbone.pretrained": "pretrained", "backbone=mini": "pretrained=mini"}  # in sentences about checkpoints


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def map_file(given: str | Path) -> Path:
    """The file of a map: the file itself, or that of a run or of an exported folder, or of the run `latest`.

    Raises:
        UserError: there is none.
    """
    if (file := paths.file_of(given)) is not None:
        return file
    place = paths.dir_of(given)
    if place is None and str(given) == "latest":
        place = folders.open_run("latest").folder
    if place is None:
        raise UserError(f"map={given} does not exist: give a map.safetensors, or a run folder or export with one.")
    file = place / paths.MAP
    if not file.is_file():
        raise UserError(
            f"{place} has no {paths.MAP}: give the folder of a run whose method has a single-matrix closed form, or of "
            "its export (to=map)."
        )
    return file


def weights_of(given: Any, count: int) -> list[float]:
    """One weight for each of `count` maps. Raises UserError for another number of weights."""
    listed = [float(one) for one in as_list(given)]
    if len(listed) == 1:
        return listed * count
    if len(listed) != count:
        raise UserError(f"{count} maps and {len(listed)} weights were given: give one weight, or one for each map.")
    return listed


def expanded(given: Any) -> tuple[list[str], bool]:
    """The checkpoints of `pretrained` without repeats, and whether it is several: a list, or a pattern with * ? [ ].
    A checkpoint is a diffusers folder or one .safetensors file. Whatever else a pattern matches is left out.

    Raises:
        UserError: a pattern matches no checkpoint.
    """
    found: list[str] = []
    several = isinstance(given, (list, tuple))
    for one in map(str, as_list(given)):
        if not any(letter in one for letter in WILD) or paths.dir_of(one) is not None:
            found.append(one)
            continue
        several = True
        matched = [Path(path) for path in sorted(glob.glob(str(Path(one).expanduser()), recursive=True))]
        right = [path for path in matched if _is_checkpoint(path)]
        if not right:
            raise UserError(
                f"pretrained={one} matches {len(matched)} paths, and none of them is a checkpoint (a diffusers folder "
                "with a unet or a transformer, or one .safetensors file in the original layout): give another pattern."
            )
        if left := [path for path in matched if path not in right and (path.is_dir() or path.suffix == SUFFIX)]:
            log.info("%s: %d paths that are no checkpoints are left out, such as %s", one, len(left), left[0])
        found += map(str, right)
    return list(dict.fromkeys(found)), several


def _is_checkpoint(path: Path) -> bool:
    if path.is_file() and path.suffix == SUFFIX:
        try:
            return single_file.kind_of(path) is not None
        except UserError:
            return False
    return any((path / part / "config.json").is_file() for part in kinds.DENOISERS)


def located(pretrained: str) -> Path:
    """The diffusers folder of a checkpoint; a single file is unpacked into the cache, a hub's model is downloaded if it
    is not there. Every source is opened by this function.

    Raises:
        UserError: it does not exist, or is incomplete or damaged.
    """
    here = paths.dir_of(pretrained) or paths.file_of(pretrained)
    if pretrained != MINIATURE or here is not None:
        if here is None and not folder.HUB_ID.fullmatch(pretrained):
            raise UserError(
                f"pretrained={pretrained} does not exist: give a diffusers folder, a .safetensors file, a hub id, a "
                f"list or a pattern of them, or {MINIATURE}, the built-in model."
            )
        try:
            return folder.locate(pretrained)
        except UserError as error:
            said = str(error)
            for word, instead in FOR_TRAIN.items():
                said = said.replace(word, instead)
            raise UserError(said) from error
    return folder.locate(None)


def unpacked(pretrained: str) -> Path | None:
    """The diffusers folder of a checkpoint if it is one on this machine or has been unpacked into one, else None."""
    file = paths.file_of(pretrained)
    return paths.dir_of(pretrained) if file is None else single_file.folder_of(file)


def _parts(source: str) -> tuple[str, ...]:
    if (file := paths.file_of(source)) is not None:
        return file.expanduser().absolute().with_suffix("").parts
    return Path(source).expanduser().absolute().parts if paths.dir_of(source) else (source,)


def places(sources: Sequence[str], several: bool, out: Path) -> list[Path]:
    """The folder that each source is written to: `out` itself, or one folder in it for each of several. Its name is the
    source's last part; where two have the same one, as many further parts are put before it as tell all of them apart.

    Raises:
        UserError: two sources have the same name.
    """
    if not several:
        return [out]
    split = [_parts(source) for source in sources]
    names: list[str] = []
    for depth in range(1, max(map(len, split)) + 1):
        names = [paths.as_file_name("-".join(parts[-depth:])) for parts in split]
        if len(set(names)) == len(names):
            return [out / name for name in names]
    twice = next(name for name in names if names.count(name) > 1)
    raise UserError(f"Two of the checkpoints would be written to {out / twice}: apply the map to them one by one.")
