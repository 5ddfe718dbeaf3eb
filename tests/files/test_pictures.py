"""Images from other sources are read as they look, or refused by name."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from realera.contracts import UserError
from realera.files import pictures
from realera.judges.images import read_rgb

GREY = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
COLOURS = np.stack([GREY, GREY.T, 255 - GREY], axis=-1)
WHITE = np.full((16, 16, 3), 255, np.uint8)


def as_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


def see_through() -> Image.Image:
    picture = Image.fromarray(COLOURS).convert("RGBA")
    picture.putalpha(Image.fromarray(np.where(GREY > 127, 255, 0).astype(np.uint8)))
    return picture


def keyed() -> Image.Image:
    """A palette image with one transparent colour."""
    picture = Image.fromarray(np.where(GREY > 127, 1, 0).astype(np.uint8))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.info["transparency"] = 1
    return picture


KEYED = np.where((GREY > 127)[..., None], np.uint8(255), np.array([10, 20, 30], np.uint8))
SEEN: dict[str, tuple[Callable[[], Image.Image], np.ndarray]] = {
    "colours": (lambda: Image.fromarray(COLOURS), COLOURS),
    "grey": (lambda: Image.fromarray(GREY), as_rgb(GREY)),
    "16 bits": (lambda: Image.fromarray(GREY.astype(np.uint16) * 257), as_rgb(GREY)),
    "1 bit": (lambda: Image.fromarray(GREY > 127), as_rgb(np.where(GREY > 127, 255, 0).astype(np.uint8))),
    "palette": (lambda: Image.fromarray(as_rgb(GREY)).convert("P", palette=Image.Palette.ADAPTIVE), as_rgb(GREY)),
    "palette, keyed": (keyed, KEYED),
    "opaque": (lambda: Image.fromarray(COLOURS).convert("RGBA"), COLOURS),
    "transparent": (see_through, np.where((GREY > 127)[..., None], COLOURS, WHITE)),
    "grey, transparent": (
        lambda: Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (16, 16), 0)]),
        WHITE,
    ),
}


@pytest.mark.parametrize("kind", SEEN)
def test_every_kind_of_png_is_read_as_it_looks(kind: str, tmp_path: Path) -> None:
    make, expected = SEEN[kind]
    picture = make()
    picture.save(tmp_path / "x.png", **({"transparency": 1} if kind == "palette, keyed" else {}))
    assert np.array_equal(read_rgb(tmp_path / "x.png"), expected)


@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_other_formats_and_colour_modes(ending: str, tmp_path: Path) -> None:
    flat = Image.new("RGB", (16, 16), (200, 40, 90))
    flat.save(tmp_path / f"x.{ending}")
    assert np.abs(read_rgb(tmp_path / f"x.{ending}").astype(int) - np.asarray(flat)).max() <= 4
    Image.new("CMYK", (16, 16), (0, 0, 0, 0)).save(tmp_path / "ink.jpg")
    assert read_rgb(tmp_path / "ink.jpg").min() >= 254


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header gives this size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


REFUSED: dict[str, tuple[bytes, str]] = {
    "1e9 pixels": (bomb(40_000, 25_000), "too large"),
    "1e8 pixels": (bomb(10_000, 10_000), "too large"),
    "2^31 wide": (bomb(2**31 - 1, 1), "too large|cannot be read"),
    "zero bytes": (b"", "cannot be read"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "cannot be read"),
    "torn": (bomb(64, 64), "cannot be read"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("error")
def test_files_that_are_not_images_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    content, said = REFUSED[kind]
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.png.*({said})"):
        read_rgb(tmp_path / "x.png")


def test_animations_and_other_formats_are_refused(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(UserError, match=rf"{name} is animated \(2 frames\)"):
            read_rgb(tmp_path / name)
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "f.tif")
    frames[0].save(tmp_path / "a.gif")
    for name in ("f.tif", "a.gif"):
        with pytest.raises(UserError, match=rf"{name} cannot be read"):
            read_rgb(tmp_path / name)


def test_pipes_do_not_block(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("folder", "pipe", "zero"):
        with pytest.raises(UserError, match=rf"{name}\.png is not a file"):
            pictures.read_picture(tmp_path / f"{name}.png")
    with pytest.raises(UserError, match=r"none\.png is missing"):
        pictures.read_picture(tmp_path / "none.png")


def test_a_page_leaves_out_unreadable_images(tmp_path: Path) -> None:
    from realera.reporting.sheets import _data_uri, blurred

    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "bomb.png").write_bytes(bomb(40_000, 25_000))
    for name in ("pipe", "bomb", "none"):
        assert _data_uri(tmp_path / f"{name}.png") == ("", True)
    Image.fromarray(GREY.astype(np.uint16) * 257).resize((400, 400)).save(tmp_path / "x.png")
    assert _data_uri(tmp_path / "x.png")[0].startswith("data:image/jpeg")
    assert np.asarray(blurred(tmp_path / "x.png")).mean() < 200, "grey, not white"
