"""Reading the images that a judge is handed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from realera.contracts import UserError


def read_rgb(path: Path, size: int | None = None) -> np.ndarray:
    """(H, W, 3) uint8; resized to size x size if given. Raises UserError naming a missing or torn file."""
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"the image {path} is missing: generate the run's images again") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"the image {path} cannot be read ({error}): delete it and generate it again") from None
    if size is not None and picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture)
