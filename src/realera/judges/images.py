"""Helpers of the judges: read images, split them into batches, refuse NaN and infinity."""

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
    """(H, W, 3) uint8, resized to size x size if `size` is given. Raises UserError as `read_picture` does."""
    import numpy as np
    from PIL import Image

    picture = read_picture(path)
    if size is not None and picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def batches(
    images: Sequence[Path], prompts: Sequence[Prompt], size: int
) -> Iterator[tuple[Sequence[Path], Sequence[Prompt]]]:
    """Both lists in batches of `size`. Raises ValueError if their lengths differ."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
    for start in range(0, len(images), size):
        yield images[start : start + size], prompts[start : start + size]


def refuse_nan(judge: str, images: Sequence[Path], numbers: Iterable[Iterable[float]], remedy: str) -> None:
    """Raises UserError if a number that a judge computed for an image is NaN or infinite. numbers: for each image, in
    order, the numbers to check; not the NaN of an image that the judge leaves unscored on purpose."""
    for path, each in zip(images, numbers):
        if not all(map(math.isfinite, each)):
            raise NotFinite(f"the judge {judge} gave NaN or infinity for the image {path}: {remedy}")


def bare(name: str) -> str:
    """A name without its article: "a person" -> "person"."""
    return re.sub(r"^(an?|the)\s+", "", name, flags=re.IGNORECASE)


def lengths(states: Tensor) -> Tensor:
    """(B,): for normalised states (B, E), 1 for each row; NaN for a row of zeros, which torch's normalisation makes of
    a vector whose norm overflows."""
    norm = states.norm(dim=-1)
    result: Tensor = norm / norm
    return result


def check_batch(batch: int) -> int:
    """Returns the batch size. Raises UserError if it is below 1."""
    if batch < 1:
        raise UserError(f"judge.batch={batch} is not valid: use 1 or more")
    return batch
