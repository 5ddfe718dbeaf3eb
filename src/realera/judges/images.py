"""Reading the images that a judge is handed, and cutting long lists of them into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from realera.contracts import Prompt, UserError
from realera.paths import FORMATS

if TYPE_CHECKING:
    import numpy as np


def read_rgb(path: Path, size: int | None = None) -> np.ndarray:
    """(H, W, 3) uint8; resized to size x size if given. Raises UserError naming a missing, torn or bomb-sized file."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=FORMATS) as image:
            picture = image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"the image {path} is missing: generate the run's images again") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"the image {path} is too large to be judged ({error}): make it smaller") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"the image {path} cannot be read ({error}): delete it and generate it again") from None
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


def check_batch(batch: int) -> int:
    """The batch size, if it is one. Raises UserError."""
    if batch < 1:
        raise UserError(f"judge.batch={batch} judges nothing: use 1 or more")
    return batch
