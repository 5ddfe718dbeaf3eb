"""Checks that a hub's model is available: it is in the cache, or the hub answers."""

from __future__ import annotations

import os
from pathlib import Path

from realera.backbones import folder
from realera.system import network

HUB_PATIENCE = 1.2  # seconds to wait for the hub's answer


class OutOfReach(folder.Absent):
    """A hub's model is not in the cache and cannot be downloaded."""


def check(repository: str) -> None:
    """Raises OutOfReach if a hub's model is not in the cache and the hub does not answer."""
    if (snapshot := cached(repository)) is not None:
        folder.check(snapshot)
        return
    remedies = (
        "use the built-in model (backbone=mini), give a diffusers folder (backbone.pretrained=DIR), or fill the cache "
        f"on a machine with a network (hf download {repository}) and set HF_HOME to it."
    )
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise OutOfReach(f"{repository} is not in the cache {_hub_cache()} and HF_HUB_OFFLINE is set: {remedies}")
    if not network.answers(os.environ.get("HF_ENDPOINT") or "https://huggingface.co", HUB_PATIENCE):
        raise OutOfReach(f"{repository} is not in the cache {_hub_cache()} and the hub does not answer: {remedies}")


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


def cached(repository: str) -> Path | None:
    """The snapshot folder of a hub's model in the cache; None if no snapshot is complete."""
    root = _hub_cache() / f"models--{repository.replace('/', '--')}"
    main = root / "refs" / "main"
    named = [root / "snapshots" / main.read_text().strip()] if main.is_file() else []
    found = [*named, *sorted((root / "snapshots").glob("*"))]
    return next((path for path in found if not folder.missing(path)), None)
