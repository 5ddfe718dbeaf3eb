"""Replay images of captions that do not name a concept, and the Fisher information of the weights on them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from torch import Generator, Tensor

from realera.contracts import PASSES_OF_A_GRADIENT, Backbone, Concept, Sampler, TextStates, UserError
from realera.files import checksums, finite, plain_data
from realera.files.cache_costs import Cached
from realera.methods.latents import SEEDS, TIMESTEPS, at_level, drawn, images_of
from realera.methods.texts import predict, repeat, take
from realera.setting_types import AnyText, Batch, Count, File, Number
from realera.system.locks import exclusive
from realera.system.ranks import ONE_PROCESS, Ranks
from realera.system.terminal import bars_hidden

CAPTIONS = Path(__file__).with_name("captions.txt")


Timesteps = Annotated[int, Number(1, TIMESTEPS, whole=True)]


def named(caption: str, names: Sequence[str]) -> bool:
    """Whether a caption contains one of the names as a whole word."""
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", caption, re.IGNORECASE) for name in names if name)


def read_captions(captions: Sequence[str] | str | Path | None, setting: str) -> list[str]:
    """The captions of a list or of a text file with one on each line; None = those of the package. setting: its name in
    errors.

    Raises UserError for a file that cannot be read and for an empty list.
    """
    if captions is None or isinstance(captions, str | Path):
        file = CAPTIONS if captions is None else Path(captions).expanduser()
        try:
            if file.exists() and not file.is_file():  # reading a pipe would block
                raise OSError(f"{file} is not a file")
            captions = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: give {setting} a text file with one caption per line.") from error
    found = [caption.strip() for caption in captions if caption.strip()]
    if not found:
        raise UserError(f"{setting} is empty: give captions, or null for those of the package.")
    return found


class Replay:
    """Images of captions, drawn once by the original model and cached.

    captions: a list, or a text file with one caption per line; None = the captions of the package. images: how many;
    image i uses caption i mod their number. chunk, sampler: as in `AnchorBank`.

    Raises UserError for a file that cannot be read and for an empty list.
    """

    def __init__(
        self,
        captions: Sequence[AnyText] | File | None = None,
        images: Count = 5000,
        chunk: Batch = 8,
        sampler: Sampler | None = None,
    ) -> None:
        self.captions = read_captions(captions, "replay.captions")
        self.images = images
        self.chunk = chunk
        self.sampler = sampler
        self.bank = torch.zeros(0)  # (images, C, h, w)
        self.texts: TextStates | None = None  # of the captions

    @staticmethod
    def makes(settings: Mapping[str, Any], concepts: Sequence[Concept], steps: int) -> dict[str, float]:
        """Does not depend on the concepts."""
        return images_of(settings, [""], steps)

    def prepare(self, backbone: Backbone, cache: Path, seed: int) -> None:
        with torch.no_grad():
            self.texts = backbone.encode(self.captions)
        title = "Replay images"
        self.bank = drawn(backbone, self.texts, self.images, self.chunk, self.sampler, cache, seed, title)

    def without(self, names: Sequence[str]) -> Tensor:
        """(n,) int64: indices of the images whose captions contain none of the names as a whole word. Raises UserError
        if there is no such image."""
        clean = [not named(caption, names) for caption in self.captions]
        kept = [image for image in range(self.images) if clean[image % len(clean)]]
        if not kept:
            raise UserError(f"Every caption of replay.captions names {', '.join(names)}: add captions that do not.")
        return torch.tensor(kept)

    def read(self, chosen: Tensor) -> TextStates:
        """The captions of the images `chosen` (B,)."""
        assert self.texts is not None
        return take(self.texts, chosen % len(self.captions))

    def drop(self) -> None:
        """Frees the memory of the images and texts."""
        self.bank, self.texts = torch.zeros(0), None


class Fisher:
    """The diagonal of the Fisher information of the trained weights on replay images, as in SA's official code: the
    mean over images of (sum over timesteps of the gradient of the noise loss)^2. The noise loss is a mean over pixels.

    replay: the images. samples: number of images, the first ones. timesteps: how many of the 1000, evenly spread; the
    sum is scaled to 1000. at_once: timesteps per pass. chunk: images between two saves of a process; a killed run
    continues from the last save, with any number of processes. The result is cached in <cache>/fisher/, named by a hash
    of all inputs.

    Raises UserError if there are fewer images than samples.
    """

    def __init__(
        self,
        replay: Replay,
        samples: Count = 5000,
        timesteps: Timesteps = TIMESTEPS,
        at_once: Batch = 50,
        chunk: Batch = 10,
    ) -> None:
        if samples > replay.images:
            raise UserError(
                f"method.align.fisher.samples={samples} is more than replay.images={replay.images}: raise "
                "replay.images or lower the samples."
            )
        self.replay = replay
        self.samples = samples
        self.timesteps = (torch.arange(timesteps) + 0.5).mul(TIMESTEPS / timesteps).long()
        self.at_once = at_once
        self.chunk = chunk

    @staticmethod
    def makes(settings: Mapping[str, Any], concepts: Sequence[Concept], steps: int) -> dict[str, float]:
        """Does not depend on the concepts."""
        samples, timesteps = (int(settings.get(key) or 0) for key in ("samples", "timesteps"))
        return {"sums": float(PASSES_OF_A_GRADIENT * samples * timesteps)}

    def __call__(self, backbone: Backbone, cache: Path, seed: int, ranks: Ranks = ONE_PROCESS) -> dict[str, Tensor]:
        """{name: (shape of the weight) float32 on its device} of every trained weight, at its initial value. All
        processes call this together; each computes its share of the images."""
        trained = {name: weight for name, weight in backbone.trained.named_parameters() if weight.requires_grad}
        for first in (True, False):  # the first process draws the images; the others then load them
            if ranks.first == first:
                self.replay.prepare(backbone, cache, seed)
            ranks.wait()
        parts = _Parts(cache / "fisher", self._key(backbone, list(trained), seed), self.samples, backbone)
        with exclusive(parts.whole) if ranks.first else nullcontext():  # so that no other run writes the same parts
            if not ranks.from_first(parts.is_whole):
                done = ranks.from_first(parts.done)
                taken = {image for images in done.values() for image in images}
                remaining = [image for image in range(self.samples) if image not in taken]
                self._add(backbone, trained, ranks.share(remaining), parts, done, seed, ranks)
                ranks.wait()
                if ranks.first:
                    parts.merge(sorted({*done, *range(min(ranks.world, len(remaining)))}))
                ranks.wait()
        self.replay.drop()
        sums = parts.sums()
        remedy = f"delete {parts.whole} and run the command again; if it happens again, set backbone.dtype=float32"
        finite.refuse(sums, "The Fisher information of", remedy)
        return {name: value.to(trained[name].device) / self.samples for name, value in sums.items()}

    def _add(
        self,
        backbone: Backbone,
        trained: Mapping[str, Tensor],
        share: Sequence[int],
        parts: _Parts,
        done: Mapping[int, Sequence[int]],
        seed: int,
        ranks: Ranks,
    ) -> None:
        """Adds images to this process's part, which may already exist."""
        if not share:
            return
        entry = Cached(parts.file(ranks.rank), backbone)
        images = list(done.get(ranks.rank, ()))
        sums = {name: torch.zeros_like(weight, dtype=torch.float32).detach() for name, weight in trained.items()}
        if images:
            with safe_open(entry.file, framework="pt") as opened:
                entry.read(opened.metadata())
                sums = {name: opened.get_tensor(name).to(value.device) for name, value in sums.items()}
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("images"),
        )
        with (
            Progress(*columns, TimeRemainingColumn(), disable=not ranks.first or bars_hidden()) as bar,
            backbone.original(),
        ):
            task = bar.add_task("Fisher information", total=len(images) + len(share), completed=len(images))
            for start in range(0, len(share), self.chunk):
                for image in share[start : start + self.chunk]:
                    for name, gradient in zip(trained, self.gradients(backbone, image, list(trained.values()), seed)):
                        sums[name] += gradient.square_()
                    images.append(image)
                    bar.advance(task)
                finite.refuse(
                    sums, "The Fisher information of", "set backbone.dtype=float32, or trainer.precision=32-true"
                )
                metadata = {"images": json.dumps(images), **entry.made()}
                checksums.save(entry.file, {name: value.cpu() for name, value in sums.items()}, metadata)

    def gradients(self, backbone: Backbone, image: int, weights: Sequence[Tensor], seed: int) -> list[Tensor]:
        """The gradient of each weight for one image: the noise loss summed over all timesteps, each with its own
        noise."""
        bank = self.replay.bank
        generator = Generator().manual_seed(((seed + 1) * 1_000_003 + image) % SEEDS)
        total = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        text = self.replay.read(torch.tensor([image]))
        for part in self.timesteps.split(self.at_once):
            noise = torch.randn(len(part), *bank.shape[1:], generator=generator).to(bank.device)
            timesteps = at_level(backbone, part).to(bank.device)
            clean = bank[image].expand_as(noise)
            z_t, target = (made(clean, noise, timesteps) for made in (backbone.noisy_latents, backbone.target_of))
            with torch.enable_grad():
                out = predict(backbone, z_t, timesteps, repeat(text, 0, len(part)))
                loss = (out - target).square().mean(dim=(1, 2, 3)).sum() * (TIMESTEPS / len(self.timesteps))
                found = torch.autograd.grad(loss, list(weights))
            for own, gradient in zip(total, found):
                own += gradient
        return total

    def _key(self, backbone: Backbone, trained: list[str], seed: int) -> str:
        bank, texts = self.replay.bank, self.replay.texts
        assert texts is not None
        numbers = [self.samples, len(self.timesteps), self.at_once, seed]
        about = [backbone.fingerprint, bank.device.type, trained, numbers]
        digest = hashlib.sha256(json.dumps(about).encode())
        for tensor in (bank[: self.samples], texts.states):
            digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class _Parts:
    """The files of one Fisher information: <key>.part<process>.safetensors, each a sum over the images that it lists,
    which no other part lists. When all `samples` are summed, <key>.safetensors replaces the parts."""

    def __init__(self, folder: Path, key: str, samples: int, backbone: Backbone) -> None:
        self.folder, self.key, self.samples, self.backbone = folder, key, samples, backbone
        self.whole = folder / f"{key}.safetensors"

    def file(self, number: int) -> Path:
        return self.folder / f"{self.key}.part{number}.safetensors"

    def is_whole(self) -> bool:
        metadata = self._metadata(self.whole)
        if metadata.get("done") != str(self.samples):
            return False
        Cached(self.whole, self.backbone).read(metadata)
        return True

    def done(self) -> dict[int, list[int]]:
        """{number: its images} of each part."""
        found = {}
        for file in self.folder.glob(f"{self.key}.part*.safetensors"):
            number, metadata = file.name.split(".")[-2].removeprefix("part"), self._metadata(file)
            try:
                images = plain_data.json_of(metadata["images"])
            except (KeyError, ValueError):
                continue
            if number.isdecimal() and isinstance(images, list) and set(images) <= set(range(self.samples)):
                Cached(file, self.backbone).read(metadata)
                found[int(number)] = images
        return found

    def merge(self, numbers: Sequence[int]) -> None:
        sums: dict[str, Tensor] = {}
        notes = []
        for number in numbers:
            with safe_open(self.file(number), framework="pt") as opened:
                notes.append(opened.metadata())
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    part = opened.get_tensor(name)
                    sums[name] = sums[name].add_(part) if name in sums else part
        metadata = {"done": str(self.samples)}
        if all("seconds" in note and "passes" in note for note in notes):
            metadata["seconds"] = f"{sum(float(note['seconds']) for note in notes):.3f}"
            metadata["passes"] = str(sum(int(note["passes"]) for note in notes))
        checksums.save(self.whole, sums, metadata)
        for file in self.folder.glob(f"{self.key}.part*.safetensors"):
            file.unlink()

    def sums(self) -> dict[str, Tensor]:
        with safe_open(self.whole, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)

    @staticmethod
    def _metadata(file: Path) -> dict[str, str]:
        """A file's metadata; {} if the file is missing or torn: a bad cache file is made again, it is not an error."""
        if not file.is_file():
            return {}
        try:
            checksums.verify(file)
            with safe_open(file, framework="pt") as opened:
                return dict(opened.metadata() or {})
        except (checksums.Torn, SafetensorError, OSError, ValueError):
            checksums.log_torn(file)
            return {}
