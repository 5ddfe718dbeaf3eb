"""What the judges share: reading the images that they are handed, in batches, and refusing what is no number."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from realera.contracts import Prompt, UserError
from realera.files.finite import NotFinite
from realera.files.pictures import read_picture

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def read_rgb(path: Path, size: int | None = None) -> np.ndarray:
    """(H, W, 3) uint8; resized to size x size if given. Raises UserError as `read_picture`."""
    import numpy as np
    from PIL import Image

    picture = read_picture(path)
    if size is not None and picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def batches(
    images: Sequence[Path], prompts: Sequence[Prompt], size: int
) -> Iterator[tuple[Sequence[Path], Sequence[Prompt]]]:
    """Both lists, `size` at a time. Raises ValueError where they do not match."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
    for start in range(0, len(images), size):
        yield images[start : start + size], prompts[start : start + size]


def refuse_nan(judge: str, images: Sequence[Path], numbers: Iterable[Iterable[float]], remedy: str) -> None:
    """UserError where one of the numbers that a judge computed of an image is NaN or infinite. numbers: some of each
    image, in order. What a judge leaves unscored on purpose is none of them."""
    for path, each in zip(images, numbers):
        if not all(map(math.isfinite, each)):
            raise NotFinite(f"the judge {judge} answered NaN or infinity for the image {path}: {remedy}")


def bare(name: str) -> str:
    """A name without its article: "a person" -> "person"."""
    return re.sub(r"^(an?|the)\s+", "", name, flags=re.IGNORECASE)


def lengths(states: Tensor) -> Tensor:
    """(B,) 1 for each state of unit length (B, E); NaN for one whose own length was too large for a float, of which
    torch makes zeros."""
    norm = states.norm(dim=-1)
    return norm / norm


def check_batch(batch: int) -> int:
    """The batch size, if it is one. Raises UserError."""
    if batch < 1:
        raise UserError(f"judge.batch={batch} judges nothing: use 1 or more")
    return batch
