"""Generates a run's images in fixed chunks of the prompt list, so that an interrupted run and a run of any number of
processes end with the same images.

The noise comes from each prompt's seed, but the last bits of a convolution can depend on the batch size. So the prompt
list alone determines the chunks, a chunk with a missing or torn image is drawn again as a whole, and the processes
share whole chunks. Images are checked for damage whenever a run's images are drawn, judged or compared.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from realera import paths
from realera.contracts import Backbone, Guide, Prompt, Sampler, UserError
from realera.evaluation.records import ORIGINALS, ManifestEntry, read_manifest, write_manifest
from realera.files import checksums
from realera.system import disk, locks
from realera.system.ranks import ONE_PROCESS, Ranks

log = logging.getLogger(__name__)

Advance = Callable[[int], None]
"""Receives the number of further finished images; updates a command's progress bar."""


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
    ranks: Ranks = ONE_PROCESS,
) -> list[ManifestEntry]:
    """Writes the manifest, then images/<id>.png for every prompt with the backbone's current weights.

    The manifest records the source of each image (`source_of`). If the run has an older manifest, images of another
    source are drawn again and all others are kept. originals: record in the manifest the path at which
    `original_images` writes the original image. ranks: the processes that share the work. Raises UserError if an image
    cannot be written or does not fit into memory, or if another process has ended.
    """

    def begin() -> list[ManifestEntry]:
        drawn_with = [sampler_of(prompt, sampler or backbone.sampler) for prompt in prompts]
        sources = source_ids(backbone, list(dict.fromkeys(drawn_with)), guide)
        rows = [
            ManifestEntry(
                p, f"{paths.IMAGES}/{p.id}.png", sources[own], f"{ORIGINALS}/{p.id}.png" if originals else None
            )
            for p, own in zip(prompts, drawn_with)
        ]
        _drop_stale(run_dir, rows)
        write_manifest(run_dir, rows)
        return rows

    rows = ranks.from_first(begin)
    files = [run_dir / row.file for row in rows]
    _draw(backbone, prompts, files, sampler, guide, chunk, nullcontext, advance, ranks)
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
    ranks: Ranks = ONE_PROCESS,
) -> list[Path]:
    """The unedited model's images of the same prompts, run_dir/<folder>/<id>.png, drawn once for all runs.

    The files are in cache_dir()/images/<fingerprint>/<sha of text, seed, sampler, dtype>.png; the run folder has hard
    links, or copies if the cache is on another disk. folder="images" and a manifest make a run of the original model.
    Raises UserError as `generate_images` does.
    """

    def places() -> list[Path]:
        cache = paths.cache_dir() / "images" / backbone.fingerprint
        return [cache / f"{_content_key(backbone, p, sampler)}.png" for p in prompts]

    cached = ranks.from_first(places)
    _draw(backbone, prompts, cached, sampler, None, chunk, backbone.original, advance, ranks)
    files = [run_dir / folder / f"{p.id}.png" for p in prompts]
    if ranks.first:
        for file, drawn in zip(files, cached):
            link_or_copy(drawn, file)
    ranks.wait()
    _wait_until_visible(files)
    return files


def source_of(backbone: Backbone, sampler: Sampler | None = None, guide: Guide | None = None) -> str:
    """Content id of everything that draws an image: original weights, changed weights, sampler and guide."""
    digest = hashlib.sha256(_settings(backbone, sampler).encode())
    _add_changes(digest, backbone)
    return _with_guide(digest, guide)


def source_ids(backbone: Backbone, samplers: Sequence[Sampler], guide: Guide | None = None) -> dict[Sampler, str]:
    """A content id for each sampler. For one sampler it equals `source_of`, as in existing run folders. For several,
    the changed weights (possibly gigabytes) are read only once."""
    if len(samplers) == 1:
        return {samplers[0]: source_of(backbone, samplers[0], guide)}
    changes = hashlib.sha256()
    _add_changes(changes, backbone)
    settings = {sampler: f"{_settings(backbone, sampler)}|{changes.hexdigest()}" for sampler in samplers}
    return {sampler: _with_guide(hashlib.sha256(text.encode()), guide) for sampler, text in settings.items()}


def _add_changes(digest: hashlib._Hash, backbone: Backbone) -> None:
    for name, tensor in sorted(backbone.erased_state().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _with_guide(digest: hashlib._Hash, guide: Guide | None) -> str:
    if guide is not None:
        digest.update((repr(guide) if is_dataclass(type(guide)) else type(guide).__qualname__).encode())
    return digest.hexdigest()[:16]


def sampler_of(prompt: Prompt, base: Sampler) -> Sampler:
    """`base` with the prompt's own guidance and size, if it has any."""
    height, width = prompt.size or (base.height, base.width)
    guidance = base.guidance_scale if prompt.guidance_scale is None else prompt.guidance_scale
    return replace(base, guidance_scale=guidance, height=height, width=width)


@dataclass(frozen=True)
class Chunk:
    """Images drawn together. places: their indices in the prompt list."""

    places: tuple[int, ...]
    sampler: Sampler


def chunks_of(prompts: Sequence[Prompt], base: Sampler, size: int) -> list[Chunk]:
    """The prompt list in chunks of at most `size`, in order; all prompts of a chunk have one guidance and image
    size."""
    groups: dict[Sampler, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(sampler_of(prompt, base), []).append(place)
    return [
        Chunk(tuple(places[start : start + size]), sampler)
        for sampler, places in groups.items()
        for start in range(0, len(places), size)
    ]


def _settings(backbone: Backbone, sampler: Sampler | None) -> str:
    """The original weights' fingerprint, the precision and the sampler, as one line."""
    dtype = next((str(p.dtype) for p in backbone.denoiser.parameters()), "")
    return json.dumps([backbone.fingerprint, dtype, asdict(sampler or backbone.sampler)], sort_keys=True)


def _content_key(backbone: Backbone, prompt: Prompt, sampler: Sampler | None) -> str:
    own = sampler_of(prompt, sampler or backbone.sampler)
    return hashlib.sha256(f"{prompt.text}|{prompt.seed}|{_settings(backbone, own)}".encode()).hexdigest()[:32]


def _drop_stale(run_dir: Path, rows: Sequence[ManifestEntry]) -> None:
    """Deletes images whose source differs from the one in the existing manifest; all of them if there is no
    manifest."""
    images = run_dir / paths.IMAGES
    if not images.is_dir():
        return
    try:
        drawn: Mapping[str, ManifestEntry] = {row.file: row for row in read_manifest(run_dir)}
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
    ranks: Ranks,
) -> None:
    """Draws this process's share of the chunks that are not whole, and returns when all have drawn theirs.

    Files that stand are replaced only by their own chunk; a file that several prompts share is the first one's chunk's.
    A chunk that another run is drawing (of the unedited model's images, which all share) is left to it.
    """
    if chunk < 1:
        raise UserError(f"chunk={chunk} is not valid: use 1 or more images at once")
    chunks = chunks_of(prompts, sampler or backbone.sampler, chunk)
    owner: dict[Path, int] = {}
    for number, part in enumerate(chunks):
        for place in part.places:
            owner.setdefault(files[place], number)

    def undone() -> list[int]:
        missing = [file for file in owner if not checksums.image_is_whole(file)]
        torn = [file for file in missing if file.exists()]
        checksums.log_torn(*torn)
        for file in torn:  # deleted, not overwritten: a cached file has hard links in several runs
            with disk.explained(file):
                file.unlink(missing_ok=True)
        return sorted({owner[file] for file in missing})

    missing = ranks.from_first(undone)
    if advance is not None and (finished := len(prompts) - sum(len(chunks[n].places) for n in missing)):
        advance(finished)
    size = chunk

    def draw(number: int, wait: bool) -> bool:
        """Draws a chunk, unless another run has drawn it in the meantime. False if another run is drawing it now."""
        nonlocal size
        part = chunks[number]
        own = [place for place in part.places if owner[files[place]] == number]
        with locks.exclusive(files[own[0]], wait) as locked:
            if locked and not all(files[place].is_file() for place in own):
                with within():
                    texts = [prompts[place] for place in part.places]
                    pixels, size = _generate(backbone, texts, part.sampler, guide, size)
                for place, picture in zip(part.places, pixels):
                    if place in own:
                        _save(files[place], picture)
        return locked

    later = []
    for turn, number in enumerate(ranks.share(missing)):
        if not draw(number, wait=False):
            later.append(number)
        if advance is not None:  # assumes that the other processes are equally far
            advance(sum(len(chunks[n].places) for n in missing[turn * ranks.world : (turn + 1) * ranks.world]))
    for number in later:
        draw(number, wait=True)
    ranks.wait()
    _wait_until_visible(list(owner))


def _wait_until_visible(files: Sequence[Path], patience: float = 60.0) -> None:
    """Waits until the files that other machines wrote are visible on the shared file system."""
    until = time.monotonic() + patience
    for file in files:
        while not file.is_file():
            if time.monotonic() > until:
                raise UserError(
                    f"{file} was drawn by another process, but this process cannot find it: all machines of a run must "
                    "share its folder (root, run_dir) and the cache (REALERA_CACHE)."
                )
            time.sleep(0.5)


def _generate(
    backbone: Backbone, prompts: Sequence[Prompt], sampler: Sampler, guide: Guide | None, size: int
) -> tuple[Tensor, int]:
    """uint8 (B, H, W, 3) and the batch size, which is halved each time the memory runs out."""
    fitted = size
    while True:
        try:
            parts = [
                backbone.generate([p.text for p in few], [p.seed for p in few], sampler, guide).cpu()
                for few in (prompts[i : i + size] for i in range(0, len(prompts), size))
            ]
        except RuntimeError as error:  # OutOfMemoryError is a subclass; the CPU allocator raises a plain one
            if not out_of_memory(error):
                raise
            if size == 1:
                raise UserError(
                    f"one image of {sampler.width} x {sampler.height} pixels does not fit into the memory of the "
                    "device: draw smaller images (backbone.sampler.height=..., width=...), use half precision "
                    "(backbone.dtype=bfloat16), or use another device (trainer=cpu)"
                ) from None
            size = max(1, min(size, len(prompts)) // 2)
        else:
            if size < fitted:
                log.warning("out of memory: drawing %d images at once from now on", size)
            return torch.cat(parts), size
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # outside the except block: the exception keeps references to the tensors


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that the memory of the device is full."""
    message = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "not enough memory", "status_alloc_failed")
    return any(sign in message for sign in signs)


def _save(file: Path, picture: Tensor) -> None:
    with disk.atomic(file) as beside:
        Image.fromarray(picture.numpy()).save(beside, format="PNG")


def link_or_copy(drawn: Path, file: Path) -> None:
    """Makes `file` a hard link to `drawn`, or a copy if the file system has no links. An existing file is replaced."""
    with disk.explained(file):
        if file.exists() and file.samefile(drawn):
            return
        file.unlink(missing_ok=True)
        try:
            os.link(drawn, file)
        except OSError:
            with disk.atomic(file) as beside:
                shutil.copyfile(drawn, beside)
