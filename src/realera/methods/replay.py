"""What must be remembered: images of captions that have nothing to do with a concept, and how much each weight matters
to them."""

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
from realera.methods.latents import SEEDS, TIMESTEPS, drawn, images_of
from realera.methods.texts import predict, repeat, take
from realera.setting_types import AnyText, Batch, Count, File, Number
from realera.system.locks import turn
from realera.system.ranks import ALONE, Ranks
from realera.system.terminal import bars_hidden

CAPTIONS = Path(__file__).with_name("captions.txt")


Timesteps = Annotated[int, Number(1, TIMESTEPS, whole=True)]


class Replay:
    """Images of captions, drawn once by the original model and cached.

    captions: a list, or a file of them, one a line; None = the ones that ship. images: how many; image i takes caption
    i mod their number. chunk, sampler: as in `AnchorBank`.

    Raises UserError for a file that cannot be read and for a list without captions.
    """

    def __init__(
        self,
        captions: Sequence[AnyText] | File | None = None,
        images: Count = 5000,
        chunk: Batch = 8,
        sampler: Sampler | None = None,
    ) -> None:
        if captions is None or isinstance(captions, str | Path):
            file = CAPTIONS if captions is None else Path(captions).expanduser()
            try:
                if file.exists() and not file.is_file():  # a pipe would be waited for
                    raise OSError(f"{file} is no file")
                captions = file.read_text(encoding="utf-8-sig").splitlines()
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{file} cannot be read: give replay.captions a text file, one caption a line."
                ) from error
        self.captions = [caption.strip() for caption in captions if caption.strip()]
        if not self.captions:
            raise UserError("replay.captions is empty: give some, or null for those that ship.")
        self.images = images
        self.chunk = chunk
        self.sampler = sampler
        self.bank = torch.zeros(0)  # (images, C, h, w)
        self.texts: TextStates | None = None  # of the captions

    @staticmethod
    def makes(settings: Mapping[str, Any], concepts: Sequence[Concept], steps: int) -> dict[str, float]:
        """The same whatever is erased."""
        return images_of(settings, [""], steps)

    def prepare(self, backbone: Backbone, cache: Path, seed: int) -> None:
        with torch.no_grad():
            self.texts = backbone.encode(self.captions)
        title = "Images of other captions"
        self.bank = drawn(backbone, self.texts, self.images, self.chunk, self.sampler, cache, seed, title)

    def without(self, names: Sequence[str]) -> Tensor:
        """(n,) int64: the images whose captions hold none of the names as a word of theirs. Raises UserError where none
        is left."""
        words = [re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE) for name in names]
        clean = [not any(word.search(caption) for word in words) for caption in self.captions]
        kept = [image for image in range(self.images) if clean[image % len(clean)]]
        if not kept:
            raise UserError(f"Every caption of replay.captions names {', '.join(names)}: give others too.")
        return torch.tensor(kept)

    def read(self, chosen: Tensor) -> TextStates:
        """The captions of the images `chosen` (B,)."""
        assert self.texts is not None
        return take(self.texts, chosen % len(self.captions))

    def drop(self) -> None:
        """Lets the images go."""
        self.bank, self.texts = torch.zeros(0), None


class Fisher:
    """The diagonal of the Fisher information of the trained weights on replayed images, as SA's official code has it:
    the mean over images of (sum over timesteps of the gradient of the noise loss)^2, that loss a mean over pixels.

    replay: the images. samples: how many, the first ones. timesteps: how many of the 1000, evenly spread; the sum is
    scaled to all of them. at_once: timesteps in one pass. chunk: images between two saves of a process, from which a
    killed run goes on with any number of them. The result is kept under <cache>/fisher/, named by a hash of all it
    depends on.

    Raises UserError for more samples than there are images.
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
                f"method.align.fisher.samples={samples} are more than the {replay.images} images that are replayed: "
                "raise replay.images."
            )
        self.replay = replay
        self.samples = samples
        self.timesteps = (torch.arange(timesteps) + 0.5).mul(TIMESTEPS / timesteps).long()
        self.at_once = at_once
        self.chunk = chunk

    @staticmethod
    def makes(settings: Mapping[str, Any], concepts: Sequence[Concept], steps: int) -> dict[str, float]:
        """The same whatever is erased."""
        samples, timesteps = (int(settings.get(key) or 0) for key in ("samples", "timesteps"))
        return {"sums": float(PASSES_OF_A_GRADIENT * samples * timesteps)}

    def __call__(self, backbone: Backbone, cache: Path, seed: int, ranks: Ranks = ALONE) -> dict[str, Tensor]:
        """{name: (shape of the weight) float32 on its device} of every weight that is trained, at its first value. All
        processes call it, and each takes its share of the images."""
        trained = {name: weight for name, weight in backbone.denoiser.named_parameters() if weight.requires_grad}
        for first in (True, False):  # which draws the images; the others find them
            if ranks.first == first:
                self.replay.prepare(backbone, cache, seed)
            ranks.wait()
        parts = _Parts(cache / "fisher", self._key(backbone, list(trained), seed), self.samples, backbone)
        with turn(parts.whole) if ranks.first else nullcontext():  # another run would write into the same parts
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
        remedy = f"delete {parts.whole} and give the command again; if it is there again, set backbone.dtype=float32"
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
        """Adds images to this process's part, which it may have begun before."""
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
                said = {"images": json.dumps(images), **entry.made()}
                checksums.save(entry.file, {name: value.cpu() for name, value in sums.items()}, said)

    def gradients(self, backbone: Backbone, image: int, weights: Sequence[Tensor], seed: int) -> list[Tensor]:
        """Of each weight, of the noise loss of one image summed over all timesteps, each with a noise of its own."""
        bank = self.replay.bank
        generator = Generator().manual_seed(((seed + 1) * 1_000_003 + image) % SEEDS)
        total = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        text = self.replay.read(torch.tensor([image]))
        for part in self.timesteps.split(self.at_once):
            noise = torch.randn(len(part), *bank.shape[1:], generator=generator).to(bank.device)
            timesteps = part.to(bank.device)
            z_t = backbone.noisy_latents(bank[image].expand_as(noise), noise, timesteps)
            with torch.enable_grad():
                out = predict(backbone, z_t, timesteps, repeat(text, 0, len(part)))
                loss = (out - noise).square().mean(dim=(1, 2, 3)).sum() * (TIMESTEPS / len(self.timesteps))
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
    """The files of one Fisher information: <key>.part<process>.safetensors, each a sum over the images it names, which
    no other names; and when all `samples` are summed <key>.safetensors in their place."""

    def __init__(self, folder: Path, key: str, samples: int, backbone: Backbone) -> None:
        self.folder, self.key, self.samples, self.backbone = folder, key, samples, backbone
        self.whole = folder / f"{key}.safetensors"

    def file(self, number: int) -> Path:
        return self.folder / f"{self.key}.part{number}.safetensors"

    def is_whole(self) -> bool:
        said = self._said(self.whole)
        if said.get("done") != str(self.samples):
            return False
        Cached(self.whole, self.backbone).read(said)
        return True

    def done(self) -> dict[int, list[int]]:
        """The images of each part that was begun."""
        found = {}
        for file in self.folder.glob(f"{self.key}.part*.safetensors"):
            number, said = file.name.split(".")[-2].removeprefix("part"), self._said(file)
            try:
                images = plain_data.json_of(said["images"])
            except (KeyError, ValueError):
                continue
            if number.isdecimal() and isinstance(images, list) and set(images) <= set(range(self.samples)):
                Cached(file, self.backbone).read(said)
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
        said = {"done": str(self.samples)}
        if all("seconds" in note and "passes" in note for note in notes):
            said["seconds"] = f"{sum(float(note['seconds']) for note in notes):.3f}"
            said["passes"] = str(sum(int(note["passes"]) for note in notes))
        checksums.save(self.whole, sums, said)
        for file in self.folder.glob(f"{self.key}.part*.safetensors"):
            file.unlink()

    def sums(self) -> dict[str, Tensor]:
        with safe_open(self.whole, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)

    @staticmethod
    def _said(file: Path) -> dict[str, str]:
        """A file's metadata; none where there is no whole file: a cache is never worth an error."""
        if not file.is_file():
            return {}
        try:
            checksums.verify(file)
            with safe_open(file, framework="pt") as opened:
                return dict(opened.metadata() or {})
        except (checksums.Torn, SafetensorError, OSError, ValueError):
            checksums.made_again(file)
            return {}
