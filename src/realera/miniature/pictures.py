"""The training pictures: drawn once from a seed, and saved as one array with their subjects."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from realera.miniature.world import PIXELS, Subject, World
from realera.system.disk import atomic, write_text


def draw_pictures(
    world: World,
    folder: Path,
    count: int,
    seed: int,
    held_out: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[np.ndarray, list[Subject]]:
    """(count, 32, 32, 3) uint8 and their subjects. They are drawn in shards into `folder`, so a stopped run resumes.

    Every picture has its own generator, seeded with (seed, index), so the result does not depend on interruptions.
    """
    pictures_file, subjects_file = folder / "pictures.npy", folder / "subjects.json"
    if pictures_file.is_file() and subjects_file.is_file():
        return np.load(pictures_file, mmap_mode="r"), [Subject(**s) for s in json.loads(subjects_file.read_text())]
    shard = 4000
    parts, subjects = [], []
    for start in range(0, count, shard):
        file = folder / f"shard-{start:06d}.npz"
        if not file.is_file():
            drawn, said = np.empty((min(shard, count - start), PIXELS, PIXELS, 3), np.uint8), []
            for i in range(len(drawn)):
                rng = np.random.default_rng((seed, start + i))
                subject = world.draw_subject(rng)
                drawn[i] = world.draw(subject, rng, held_out)
                said.append(asdict(subject))
            with atomic(file) as beside, beside.open("wb") as handle:
                np.savez(handle, pictures=drawn, subjects=json.dumps(said))
        with np.load(file) as held:
            parts.append(held["pictures"])
            subjects += json.loads(str(held["subjects"]))
        progress(min(start + shard, count), count)
    with atomic(pictures_file) as beside, beside.open("wb") as handle:
        np.save(handle, np.concatenate(parts))
    write_text(subjects_file, json.dumps(subjects))
    for file in folder.glob("shard-*.npz"):
        file.unlink()
    return np.load(pictures_file, mmap_mode="r"), [Subject(**s) for s in subjects]
