"""Reads image files (paths.IMAGE_FORMATS) as 8-bit RGB. An EXIF orientation is not applied, because the official
code, whose numbers ours are compared with, does not apply it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from realera.contracts import UserError
from realera.paths import IMAGE_FORMATS

if TYPE_CHECKING:
    from PIL import Image

MOST = 89_478_485  # pixels; PIL warns of larger images, because a file of a few kilobytes can contain them
STILLS = ("MPO",)  # a JPEG that contains a second image


def read_picture(path: Path) -> Image.Image:
    """The image in RGB. 16-bit grey values are scaled to 8 bits, palettes are resolved, and transparent pixels are
    blended with white. An opaque 8-bit image is converted with PIL's convert("RGB").

    Raises UserError, with its name, for a file that is missing, not an image, torn, animated, or too large.
    """
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():  # opening a pipe would block
        state = "is not a file" if path.exists() else "is missing"
        raise UserError(f"the image {path} {state}: generate the run's images again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_refuse` has a stricter limit
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                _refuse(path, image)
                return _rgb(image)
    except Image.DecompressionBombError as error:
        raise UserError(f"the image {path} is too large to be read ({error}): make it smaller") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the image {path} cannot be read ({reason}): delete it and generate it again") from None


def _refuse(path: Path, image: Image.Image) -> None:
    if image.width * image.height > MOST:
        raise UserError(
            f"the image {path} is too large to be read ({image.width} x {image.height} pixels): make it smaller"
        )
    if getattr(image, "n_frames", 1) > 1 and image.format not in STILLS:
        raise UserError(f"the image {path} is animated ({image.n_frames} frames): save one of them")  # type: ignore[attr-defined]


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):  # only PNG has more than 8 bits among these formats, at most 16
        import numpy as np

        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
