"""The emoji art of the miniature's world: downloaded once from the npm registry, rasterised by resvg, saved as RGBA
sprites."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from realera.contracts import UserError
from realera.paths import TASK_DATA
from realera.system.disk import atomic

SIDE = 64  # px; pictures are composed at twice their final size and then averaged
WORLD = Path(__file__).with_name("world.yaml")

Sprites = dict[str, np.ndarray]  # "vendor/emoji" -> (SIDE, SIDE, 4) uint8, not premultiplied by alpha


def load_world() -> dict[str, Any]:
    """world.yaml, with the synonyms and phrases of the ten objects from tasks/data/objects.yaml."""
    world: dict[str, Any] = yaml.safe_load(WORLD.read_text(encoding="utf-8"))
    classes = yaml.safe_load((TASK_DATA / "objects.yaml").read_text(encoding="utf-8"))["classes"]
    for name, entry in world["objects"].items():
        entry.update({key: classes[name][key] for key in ("synonyms", "associated", "unseen")})
    return world


def need_extra(*modules: str) -> None:
    """Raises UserError if one of these modules, which come with the extra `build`, is not installed."""
    if missing := [module for module in modules if find_spec(module) is None]:
        raise UserError(
            f"{' and '.join(missing)} must be installed to draw the miniature's world: pip install -e '.[build]', or "
            "make setup EXTRAS=dev,build."
        )


def emoji_needed(world: Mapping[str, Any]) -> list[str]:
    """The names of all emoji in the world, sorted."""
    kinds = (world["objects"], world["celebrities"], world["unsafe"])
    names = {emoji for kind in kinds for entry in kind.values() for emoji in entry["art"]}
    names |= set(world["everyday"].values())
    names |= {emoji for emojis in world["persons"].values() for emoji in emojis}
    return sorted(names)


def fetch(vendor: str, version: str, folder: Path) -> Path:
    """The icon set's tarball, from `npm pack` (needs npm; nothing is run or installed). Raises UserError if the
    download fails."""
    tarball = folder / f"iconify-json-{vendor}-{version}.tgz"
    if tarball.is_file():
        return tarball
    folder.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", "--silent", f"@iconify-json/{vendor}@{version}"]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"the emoji art @iconify-json/{vendor}@{version} could not be downloaded ({error}): install npm and check "
            f"its registry, or put the tarball at {tarball}"
        ) from error
    return tarball


def sprites(world: Mapping[str, Any], folder: Path) -> Sprites:
    """All sprites of the world's vendors, which must have every emoji, and of the strangers, as far as they have
    them."""
    store = folder / f"sprites-{SIDE}.npz"
    if store.is_file():
        with np.load(store) as held:
            return dict(held)
    drawn: Sprites = {}
    for group in ("vendors", "strangers"):
        for vendor, entry in world[group].items():
            icons = _icons(fetch(vendor, entry["version"], folder))
            for emoji in emoji_needed(world):
                body = _body(icons, emoji)
                if body is not None:
                    drawn[f"{vendor}/{emoji}"] = _rasterise(body, icons)
                elif group == "vendors":
                    raise UserError(
                        f"{vendor} {entry['version']} has no emoji '{emoji}': name another one in world.yaml"
                    )
    with atomic(store) as beside, beside.open("wb") as file:
        np.savez_compressed(file, **drawn)  # type: ignore[arg-type]
    return drawn


def _icons(tarball: Path) -> dict[str, Any]:
    with tarfile.open(tarball) as tar:
        member = tar.extractfile("package/icons.json")
        if member is None:
            raise UserError(f"{tarball} contains no icons.json: delete it and run again")
        icons: dict[str, Any] = json.load(member)
    return icons


def _body(icons: Mapping[str, Any], emoji: str) -> str | None:
    alias = icons.get("aliases", {}).get(emoji)
    entry = icons["icons"].get(alias["parent"] if alias else emoji)
    return entry["body"] if entry else None


def _rasterise(body: str, icons: Mapping[str, Any]) -> np.ndarray:
    import resvg_py  # only needed for building (extra `build`)

    width, height = icons.get("width", 16), icons.get("height", 16)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{SIDE}" height="{SIDE}">{body}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, skip_system_fonts=True))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    return np.asarray(_fill_frame(image))


def _fill_frame(image: Image.Image) -> Image.Image:
    """Crops the transparent border and scales the longer side to the frame, so that all emoji have the same size."""
    box = image.getbbox()
    if box is None:
        raise UserError("a rasterised emoji is empty: its icon set is damaged, delete it and run again")
    image = image.crop(box)
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    frame = Image.new("RGBA", (SIDE, SIDE))
    frame.paste(image.resize(size, Image.Resampling.LANCZOS), ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return frame
