"""Image files of any kind that is read (paths.FORMATS) as 8-bit RGB, or one sentence on why not. An EXIF orientation is
not applied: nor is it by the official code whose numbers ours are compared with."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from realera.contracts import UserError
from realera.paths import FORMATS

if TYPE_CHECKING:
    from PIL import Image

MOST = 89_478_485  # pixels; PIL warns of more, because a file of kilobytes can hold them
STILLS = ("MPO",)  # a JPEG with a second picture beside the first


def read_picture(path: Path) -> Image.Image:
    """The image in RGB. Sixteen-bit greys are scaled to 8 bits, a palette is looked up, and what is transparent is seen
    on white; an opaque 8-bit image is what PIL's own convert("RGB") gives.

    Raises UserError naming a file that is missing, no image, torn, animated, or too large.
    """
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():  # a pipe would be waited for
        state = "is no file" if path.exists() else "is missing"
        raise UserError(f"the image {path} {state}: generate the run's images again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_refuse` asks for less
            with Image.open(path, formats=FORMATS) as image:
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
        raise UserError(f"the image {path} is animated ({image.n_frames} pictures): save one of them")  # type: ignore[attr-defined]


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):  # of these formats only PNG has more than 8 bits, and no more than 16
        import numpy as np

        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert("RGB")
