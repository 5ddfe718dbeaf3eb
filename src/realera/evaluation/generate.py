"""Images of a run: drawn in fixed chunks of the prompt list, so that a run that was killed ends with the same pictures.

Noise comes from each prompt's own seed, but a convolution's last bits can depend on how many images run together. So
the chunks are fixed by the list, and one with a picture missing is drawn again whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, is_dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from realera import paths
from realera.contracts import Backbone, Guide, Prompt, Sampler, UserError
from realera.evaluation.records import ORIGINALS, Row, read_manifest, write_manifest

Advance = Callable[[int], None]
"""Told how many more images are done; a door's progress bar."""


def generate_images(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    run_dir: Path,
    sampler: Sampler | None = None,
    guide: Guide | None = None,
    *,
    chunk: int = 16,
    originals: bool = True,
    advance: Advance | None = None,
) -> list[Row]:
    """Writes images/<id>.png for every prompt with the backbone as it stands, and the manifest.

    The manifest comes first and says what drew each image. Pictures that other weights or another sampler drew (the
    manifest that stands there says so) are drawn again; the rest of an unfinished run is kept. `originals`: note beside
    each image where `original_images` puts its counterpart. Raises UserError where an image cannot be written or does
    not fit into memory.
    """
    source = source_of(backbone, sampler, guide)
    rows = [
        Row(p, f"{paths.IMAGES}/{p.id}.png", source, f"{ORIGINALS}/{p.id}.png" if originals else None) for p in prompts
    ]
    _drop_stale(run_dir, rows)
    write_manifest(run_dir, rows)
    files = [run_dir / row.file for row in rows]
    _draw(backbone, prompts, files, sampler, guide, chunk, nullcontext, advance)
    return rows


def original_images(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    run_dir: Path,
    sampler: Sampler | None = None,
    *,
    chunk: int = 16,
    folder: str = ORIGINALS,
    advance: Advance | None = None,
) -> list[Path]:
    """The unedited model's images of the same prompts, run_dir/<folder>/<id>.png, drawn once for all runs.

    They stand in cache_dir()/images/<fingerprint>/<sha of text, seed, sampler, dtype>.png; the run folder holds hard
    links, or copies where the cache is on another disk. folder="images" beside a manifest makes a run of the original
    model. Raises UserError as `generate_images` does.
    """
    cache = paths.cache_dir() / "images" / backbone.fingerprint
    cached = [cache / f"{_content_key(backbone, p, sampler)}.png" for p in prompts]
    _draw(backbone, prompts, cached, sampler, None, chunk, backbone.original, advance)
    files = [run_dir / folder / f"{p.id}.png" for p in prompts]
    for file, drawn in zip(files, cached):
        _link(drawn, file)
    return files


def source_of(backbone: Backbone, sampler: Sampler | None = None, guide: Guide | None = None) -> str:
    """Content id of what draws an image: the original weights, what was changed in them, the sampler, the guide."""
    digest = hashlib.sha256(_settings(backbone, sampler).encode())
    for name, tensor in sorted(backbone.erased_state().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    if guide is not None:
        digest.update((repr(guide) if is_dataclass(type(guide)) else type(guide).__qualname__).encode())
    return digest.hexdigest()[:16]


def _settings(backbone: Backbone, sampler: Sampler | None) -> str:
    """The weights' id, their precision, and the sampler, as one line."""
    dtype = next((str(p.dtype) for p in backbone.unet.parameters()), "")
    return json.dumps([backbone.fingerprint, dtype, asdict(sampler or backbone.sampler)], sort_keys=True)


def _content_key(backbone: Backbone, prompt: Prompt, sampler: Sampler | None) -> str:
    return hashlib.sha256(f"{prompt.text}|{prompt.seed}|{_settings(backbone, sampler)}".encode()).hexdigest()[:32]


def _drop_stale(run_dir: Path, rows: Sequence[Row]) -> None:
    """Deletes images that something else drew, by the manifest that stands there (or all, where there is none)."""
    images = run_dir / paths.IMAGES
    if not images.is_dir():
        return
    try:
        drawn: Mapping[str, Row] = {row.file: row for row in read_manifest(run_dir)}
    except UserError:
        drawn = {}
    wanted = {row.file: (row.prompt, row.source) for row in rows}
    for image in images.glob("*.png"):
        file = f"{paths.IMAGES}/{image.name}"
        row = drawn.get(file)
        if row is None or wanted.get(file) != (row.prompt, row.source):
            image.unlink()


def _draw(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    files: Sequence[Path],
    sampler: Sampler | None,
    guide: Guide | None,
    chunk: int,
    within: Callable[[], AbstractContextManager[None]],
    advance: Advance | None,
) -> None:
    """Draws the chunks that are not whole. Files that stand are replaced only by their own chunk."""
    if chunk < 1:
        raise UserError(f"chunk={chunk} draws nothing: draw 1 or more images at once")
    size = chunk
    for start in range(0, len(prompts), chunk):
        part = slice(start, start + chunk)
        if not all(file.is_file() for file in files[part]):
            with within():
                pixels, size = _generate(backbone, prompts[part], sampler, guide, size)
            for file, picture in zip(files[part], pixels):
                _save(file, picture)
        if advance is not None:
            advance(len(prompts[part]))


def _generate(
    backbone: Backbone, prompts: Sequence[Prompt], sampler: Sampler | None, guide: Guide | None, size: int
) -> tuple[Tensor, int]:
    """uint8 (B, H, W, 3) and how many fitted at once: half as many after each time the memory ran out."""
    while True:
        try:
            parts = [
                backbone.generate([p.text for p in few], [p.seed for p in few], sampler, guide).cpu()
                for few in (prompts[i : i + size] for i in range(0, len(prompts), size))
            ]
            return torch.cat(parts), size
        except RuntimeError as error:  # torch's OutOfMemoryError is one; a CPU's allocator raises a plain one
            if not _out_of_memory(error):
                raise
            if size == 1:
                asked = sampler or backbone.sampler
                raise UserError(
                    f"one image of {asked.width} x {asked.height} pixels does not fit into the memory of the device: "
                    "draw smaller ones, or on another device"
                ) from None
            size = max(1, min(size, len(prompts)) // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # outside the handler: the exception held the tensors


def _out_of_memory(error: RuntimeError) -> bool:
    said = str(error).lower()
    return "out of memory" in said or "can't allocate memory" in said or "not enough memory" in said


def _save(file: Path, picture: Tensor) -> None:
    try:
        with paths.whole(file) as beside:
            Image.fromarray(picture.numpy()).save(beside, format="PNG")
    except OSError as error:
        raise UserError(
            f"the image {file} cannot be written ({error.strerror or error}): free or change the folder"
        ) from None


def _link(drawn: Path, file: Path) -> None:
    """A hard link, or a copy where the file system has none. A file that stands already is replaced."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and file.samefile(drawn):
        return
    file.unlink(missing_ok=True)
    try:
        os.link(drawn, file)
    except OSError:
        with paths.whole(file) as beside:
            shutil.copyfile(drawn, beside)
