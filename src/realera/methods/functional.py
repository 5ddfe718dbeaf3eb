"""Mining by predicted noise: which texts of a vocabulary draw the concept, and which are only near its name.

The first are erased with the concept, the second are preserved. `nearness` has the measure.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Generator, Tensor

from realera import paths
from realera.contracts import Backbone, Concept, NamedPrompt, Neighbours, Pair, UserError
from realera.files import plain_data
from realera.files.cache_costs import cached
from realera.methods import nearness
from realera.methods.latents import drawn, images_of
from realera.methods.nearness import Seen
from realera.methods.priors import CAPTIONS, EVERYDAY
from realera.methods.texts import on_cpu
from realera.mining.band import Rows
from realera.mining.sampling import align_rows
from realera.setting_types import Batch, Count, Filled, NonNegative, Vocabulary, Whole
from realera.system.terminal import bars_hidden
from realera.value_space import metric, roots

log = logging.getLogger(__name__)

WORDS = "words"
KEPT = 256 << 20  # bytes: limit of the encoded texts in memory
Vocabularies = Annotated[Sequence[Vocabulary], Filled()]


@dataclass(frozen=True)
class FoundTexts:
    """The texts found around a concept's name. erased: texts that draw the concept, the nearest in predicted noise
    first. kept: texts near its name that do not draw it, the nearest in values first. Texts between the two limits
    are in neither."""

    concept: str
    erased: Sequence[Seen]
    kept: Sequence[Seen]


class FunctionalMining:
    """`contracts.Miner`: near points are texts that draw the concept, each with the anchor as its target. Points beyond
    are texts near the concept's name that do not draw it.

    vocabulary: sources of candidate texts: "words" = the words (and endings of words) that are one token each,
    "everyday" = the 393 captions of the package, or a UTF-8 file with one text per line. looked, beside: the noise is
    measured for the `looked` texts that are nearest in values and the `beside` texts that are nearest in text states.
    within, outside: distances in noise (`nearness.noise_distances`). A text at most `within` away draws the concept. A
    text more than `outside` away does not; it is preserved unless it contains the name of an erased concept or draws
    another concept that is erased in the same run. most: maximum number of texts of each kind, the nearest first. rows:
    the rows of each text that count, as in `Band.rows`. images, chunk: images of the concept that the original model
    draws, and how many at once. passes: images per denoiser pass when noise is measured.
    """

    def __init__(
        self,
        vocabulary: Vocabularies = (WORDS, EVERYDAY),
        looked: Count = 64,
        beside: Whole = 32,
        within: NonNegative = 0.5,
        outside: NonNegative = 1.0,
        most: Count = 32,
        rows: Rows = "suffix",
        images: Count = 4,
        chunk: Batch = 4,
        passes: Batch = 64,
    ) -> None:
        if outside < within:
            raise UserError(
                f"method.neighbours.outside={outside:g} is less than method.neighbours.within={within:g}, so a text "
                f"could be both erased and preserved: raise outside to {within:g} or more."
            )
        self.vocabulary = list(vocabulary)
        self.looked = looked
        self.beside = beside
        self.within = within
        self.outside = outside
        self.most = most
        self.rows = rows
        self.images = images
        self.chunk = chunk
        self.passes = passes
        self.backbone: Backbone | None = None
        self.pairs: Sequence[Pair] = ()
        self.seen: dict[Concept, FoundTexts] = {}
        self.encoded: dict[Concept, tuple[Pair, Pair]] = {}  # (near, beyond), until `KEPT` bytes are used
        self.free_bytes = KEPT

    @staticmethod
    def makes(settings: Mapping[str, Any], concepts: Sequence[Concept], steps: int) -> dict[str, float]:
        texts = int(settings.get("looked") or 0) + int(settings.get("beside") or 0)
        compared = float(texts * int(settings.get("images") or 0) * len(nearness.LEVELS))
        names = [concept.target for concept in concepts]
        return {**images_of(settings, names, steps), **{f"comparisons {name}": compared for name in names}}

    def prepare(self, backbone: Backbone, pairs: Sequence[Pair] = ()) -> None:
        """backbone: all measurements use its original weights, also after an edit. pairs: all concepts that are erased
        together; a text that draws one of them is not preserved for another."""
        self.backbone = backbone
        self.pairs = pairs

    def found_texts(self) -> list[FoundTexts]:
        """The texts found around each concept, as `__call__` uses them."""
        return [self._without_erased(found) for found in self.seen.values()]

    def _without_erased(self, found: FoundTexts) -> FoundTexts:
        """Drops preserved texts that contain the name of an erased concept or draw an erased concept."""
        names = [other.concept.casefold() for other in self.seen.values()]
        erased = {one.text.casefold() for other in self.seen.values() for one in other.erased}

        def preserved(text: str) -> bool:
            return text not in erased and not any(name in text for name in names)

        return replace(found, kept=[one for one in found.kept if preserved(one.text.casefold())][: self.most])

    def __call__(
        self,
        pair: Pair,
        generator: Generator,
        m: float | None = None,
        n: float | None = None,
        prompts: Sequence[int] | None = None,
    ) -> Neighbours:
        """All texts found, or m and n of them drawn at random with replacement. If no text draws the concept and m is
        given, the near points are the concept's own prompts."""
        near, beyond = self._texts(pair)
        if len(near.target.states) == 0 and m is not None:
            near = pair
        e, e_star, mask = align_rows(near, self.rows)
        _, _, beyond_mask = align_rows(beyond, self.rows)
        first = _choose(len(e), m, generator)
        second = _choose(len(beyond_mask), n, generator)
        return Neighbours(e[first], e_star[first], mask[first], beyond.target.states[second], beyond_mask[second])

    def _texts(self, pair: Pair) -> tuple[Pair, Pair]:
        """(near, beyond), encoded: the texts that draw the concept, paired with the anchor, and the preserved texts,
        paired with themselves."""
        if (found := self.encoded.get(pair.concept)) is not None:
            return found
        if (backbone := self.backbone) is None:
            raise RuntimeError("functional mining needs prepare(backbone) first")
        for each in (*self.pairs, pair):
            if each.concept not in self.seen:
                self.seen[each.concept] = self.look(backbone, each)
        texts = self._without_erased(self.seen[pair.concept])
        near, anchors, beyond = (
            on_cpu(backbone.encode([NamedPrompt.of("{}", text) for text in texts]))
            for texts in (
                [seen.text for seen in texts.erased],
                [pair.concept.anchor] * len(texts.erased),
                [seen.text for seen in texts.kept],
            )
        )
        both = Pair(pair.concept, near, anchors), Pair(pair.concept, beyond, beyond)
        self.free_bytes -= sum(states.states.nbytes for states in (near, anchors, beyond))
        if self.free_bytes >= 0:
            self.encoded[pair.concept] = both
        return both

    def look(self, backbone: Backbone, pair: Pair) -> FoundTexts:
        """Finds texts around a concept and measures them with the original model."""
        name = pair.concept.target
        candidates = self.candidates(backbone, name)
        texts = [text for text, _ in candidates]
        far = measured(backbone, self.drawn(backbone, pair), name, texts, paths.cache_dir(), self.passes)
        seen = [Seen(text, value, apart) for (text, value), apart in zip(candidates, far.tolist())]
        drawing = sorted((one for one in seen if one.noise_distance <= self.within), key=lambda one: one.noise_distance)
        others = sorted((one for one in seen if one.noise_distance > self.outside), key=lambda one: -one.value)
        if not drawing:
            log.warning("no other text of the vocabulary draws %r: only preserved texts are mined.", name)
        return FoundTexts(name, drawing[: self.most], others)

    def drawn(self, backbone: Backbone, pair: Pair) -> Tensor:
        """Latents (images, C, h, w) of the concept by the original model."""
        title = f"Images of '{pair.concept.target}' for mining"
        return drawn(backbone, pair.target, self.images, self.chunk, None, paths.cache_dir(), 0, title)

    def candidates(self, backbone: Backbone, name: str, also: Sequence[str] = ()) -> list[tuple[str, float]]:
        """(text, closeness in values) of the texts whose noise is to be measured: the texts of `also`, then the nearest
        texts of the vocabulary that fit into a prompt. The name itself is left out."""
        found = [text for text in texts_of(backbone, self.vocabulary) if _fits_prompt(backbone, text)]
        cache = paths.cache_dir()
        rows = torch.cat([nearness.ends(backbone, also), ends_of(backbone, found, cache)])
        texts = [*also, *found]
        own = nearness.ends(backbone, [name])[0]
        mean = ends_of(backbone, texts_of(backbone, [EVERYDAY]), cache).double().mean(dim=0)
        values = nearness.closeness(rows, own, mean, roots(metric(backbone.text_readers("values")))[0])
        given = {name.casefold(), *(text.casefold() for text in also)}
        others = [i for i, text in enumerate(texts) if text.casefold() not in given]
        chosen = [i for i, text in enumerate(also) if text.casefold() != name.casefold()]
        for cosines, most in ((values, self.looked), (nearness.closeness(rows, own, mean), self.beside)):
            chosen += [others[i] for i in nearness.nearest(cosines[others], most)]
        return [(texts[i], float(values[i])) for i in dict.fromkeys(chosen)]


def texts_of(backbone: Backbone, vocabulary: Sequence[str]) -> list[str]:
    """The distinct texts of a vocabulary (see `FunctionalMining`). Raises UserError for a file that cannot be read and
    for a vocabulary without texts."""
    found: list[str] = []
    for name in vocabulary:
        if name == WORDS:
            found += backbone.words()
        else:
            file = CAPTIONS if name == EVERYDAY else Path(name).expanduser()
            try:
                lines = plain_data.text(file).splitlines()
            except (OSError, ValueError) as error:
                raise UserError(
                    f"vocabulary={name} cannot be read ({error}): give a UTF-8 file with one text per line."
                ) from error
            found += [" ".join(line.split()) for line in lines if line.strip()]
    if not found:
        raise UserError(f"vocabulary={', '.join(vocabulary)} contains no text: give a file with one text per line.")
    return list(dict.fromkeys(found))


def ends_of(backbone: Backbone, texts: Sequence[str], cache: Path) -> Tensor:
    """`nearness.ends`, cached by text encoder and texts, with a progress bar."""

    def encode() -> Tensor:
        with _bar("Encoding texts", len(texts)) as advance:
            return nearness.ends(backbone, texts, advance)

    content = _digest(backbone.text_fingerprint, list(texts))
    return cached(cache / "texts" / f"{content}.safetensors", "ends", backbone, encode)


def measured(
    backbone: Backbone, images: Tensor, name: str, texts: Sequence[str], cache: Path, at_once: int = nearness.PASSES
) -> Tensor:
    """`nearness.noise_distances` of the original model, cached by all its inputs, with a progress bar."""

    def measure() -> Tensor:
        with _bar(f"Measuring texts near '{name}'", len(texts)) as advance, backbone.original():
            return nearness.noise_distances(backbone, images, name, texts, advance=advance, at_once=at_once)

    pixels = hashlib.sha256(images.float().cpu().contiguous().numpy().tobytes()).hexdigest()
    dtype = str(next(backbone.denoiser.parameters()).dtype)
    content = _digest(backbone.fingerprint, dtype, pixels, nearness.LEVELS, name, list(texts))
    return cached(cache / "apart" / f"{content}.safetensors", "apart", backbone, measure)


def _fits_prompt(backbone: Backbone, text: str) -> bool:
    try:
        backbone.check_not_truncated([NamedPrompt.of("{}", text)])
    except UserError:
        return False
    return True


def _choose(count: int, size: float | None, generator: Generator) -> Tensor:
    """Indices below `count`: all of them, or `size` random ones."""
    if size is None or count == 0:
        return torch.arange(count)
    return torch.randint(count, (int(size),), generator=generator)


def _digest(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=bars_hidden()) as progress:
        task = progress.add_task(paths.printable(title), total=total)
        yield lambda done: progress.advance(task, done)
