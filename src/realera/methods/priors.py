"""Captions as preserved states of a closed form: the sum k k^T over all rows of all captions.

A preserved row is its own anchor, so a closed form needs only this one D x D matrix, even for a million captions. It
depends only on the text encoder. It is made once (python -m realera.cache) and stored in a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from realera.contracts import Backbone, Pair, UserError
from realera.files import checksums, finite, plain_data
from realera.files.cache_costs import cached
from realera.setting_types import AnyText, Captions, NonNegative, Sums

FORMAT = "realera-prior/1"
EVERYDAY = "everyday"  # the captions that ship with the package
CAPTIONS = Path(__file__).parent / "data" / "captions.txt"
ARTISTS = Path(__file__).parent / "data" / "artists.txt"  # names from UCE's repository (MIT), 1,734
Preserve = Sequence[AnyText] | Literal["artists"]
"""Texts to preserve, or "artists": the 1,734 that UCE and RECE preserve when they erase one, less the erased ones."""
COCO = 616_767  # captions of COCO-2014, train and val; MACE's scales are for this number
BATCH = 64  # captions encoded at once


@dataclass(frozen=True)
class Made:
    """The origin of a sum. captions: number summed so far; rows: token rows per caption; encoder: content id of the
    text encoder; source: content id of the captions; complete: whether all captions are summed."""

    captions: int
    rows: int
    encoder: str
    source: str
    complete: bool


def accumulate(
    backbone: Backbone,
    captions: Iterable[str],
    out: Path,
    source: str,
    *,
    save_every: int = 6400,
    advance: Callable[[int], None] | None = None,
) -> Made:
    """Sums k k^T (float64) over all rows of all captions into `out`. Every `save_every` captions, the partial sum is
    saved beside it. If the call is killed, the same call continues from there and gives the same sum.

    advance: called with the size of every batch, also of batches that a resumed call skips.

    An unreadable .safetensors file is a torn sum and is made again. Any other file may belong to somebody else.

    Raises:
        UserError: `out` contains something else, or there are no captions.
    """
    encoder, rows = backbone.text_fingerprint, backbone.max_length
    sums = torch.zeros(backbone.width + 1, backbone.width, dtype=torch.float64)
    done = 0
    for file in (out, partial(out)):
        if file.is_file():
            try:
                found, made = read_sums(file)
            except checksums.Torn:
                if file.suffix not in (".safetensors", partial(out).suffix):
                    raise
                checksums.log_torn(file)
                continue
            if (made.encoder, made.source) != (encoder, source):
                raise UserError(
                    f"{file} contains the sum of other captions or another text encoder: choose another out=FILE."
                )
            if made.complete:
                return made
            if len(found) == len(sums):  # a file of an earlier version lacks sum k and cannot be continued
                sums, done = found, made.captions
                break
    left = iter(captions)
    for batch in _batches(islice(left, done)):
        if advance is not None:
            advance(len(batch))
    unsaved = 0
    for batch in _batches(left):
        sums = sums + _sums(backbone, batch)
        done, unsaved = done + len(batch), unsaved + len(batch)
        if advance is not None:
            advance(len(batch))
        if unsaved >= save_every:
            _write(partial(out), sums, Made(done, rows, encoder, source, complete=False))
            unsaved = 0
    if not done:
        raise UserError("There are no captions to sum: give a file with captions.")
    made = Made(done, rows, encoder, source, complete=True)
    _write(out, sums, made)
    partial(out).unlink(missing_ok=True)
    return made


def partial(out: Path) -> Path:
    """The file of an unfinished sum."""
    return out.with_name(f"{out.name}.part")


def read(file: Path) -> tuple[Tensor, Made]:
    """(D, D) float64, and its origin. Raises as `read_sums`."""
    sums, made = read_sums(file)
    return sums[: sums.shape[1]], made


def read_sums(file: Path) -> tuple[Tensor, Made]:
    """(D + 1, D) float64: sum k k^T and, as the last row, sum k (missing in files of an earlier version), and their
    origin. Raises UserError for a missing or different file, Torn for an unreadable one."""
    if not file.exists():
        raise UserError(f"There is no file {file}: make it with python -m realera.cache captions=FILE out={file}.")
    try:
        tensors, metadata = checksums.load(file)
        if metadata.get("format") != FORMAT:
            raise UserError(f"{file} is not a sum of captions: make one with python -m realera.cache captions=FILE.")
        gram, said = tensors["gram"], plain_data.json_of(metadata["made"])
        made = Made(**said)
        if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or type(said["captions"]) is not int:
            raise ValueError("not a sum of captions")
        if (total := tensors.get("total")) is not None:
            gram = torch.cat([gram, total.reshape(1, -1)])
    except (checksums.Torn, KeyError, TypeError, ValueError) as error:
        raise checksums.Torn(f"{file} cannot be read: make it again with python -m realera.cache.") from error
    finite.refuse([("sum", gram)], f"{file} cannot be used: its", "make it again with python -m realera.cache")
    return gram, made


def prior(backbone: Backbone, cache: str | Path) -> tuple[Tensor, int]:
    """(D, D) float64 and its number of captions. cache: a file, or "everyday" = the captions of the package.

    Raises UserError as `read`, for a sum of another text encoder, and for an unfinished sum.
    """
    if str(cache) == EVERYDAY:
        captions = CAPTIONS.read_text(encoding="utf-8").splitlines()
        return gram_of(backbone, captions), len(captions)
    gram, made = read(Path(cache).expanduser())
    if made.encoder != backbone.text_fingerprint:
        raise UserError(
            f"{cache} was made with another text encoder than that of backbone {backbone.name}: make one for it with "
            f"python -m realera.cache captions=FILE backbone={backbone.name}."
        )
    if not made.complete:
        raise UserError(f"{cache} has only part of its captions: run the command that started it again to finish it.")
    return gram, made.captions


@dataclass(frozen=True)
class CaptionRows:
    """Moments of the rows of captions, without the begin rows, which all captions share. gram (D, D) = sum k k^T and
    mean (D,), both float64 on the CPU; count: number of rows. begin (b, D): a caption's begin rows. captions: their
    number."""

    gram: Tensor
    mean: Tensor
    count: int
    begin: Tensor
    captions: int


def caption_rows(backbone: Backbone, cache: str | Path, folder: Path) -> CaptionRows:
    """Moments of a cache's captions (see `prior`). Those of "everyday" are cached in `folder`/captions.

    Raises UserError as `prior`, and for a file of an earlier version, which lacks the mean.
    """
    empty = backbone.encode([""])
    begin = empty.states[0, empty.constant()].double().cpu()
    if str(cache) == EVERYDAY:
        captions = CAPTIONS.read_text(encoding="utf-8").splitlines()
        content = content_id([CAPTIONS], backbone.text_fingerprint)
        file = folder / "captions" / f"everyday-{content}.safetensors"
        both = cached(file, "sums", backbone, lambda: _sums(backbone, captions))
        gram, total, count = both[:-1], both[-1], len(captions)
    else:
        gram, count = prior(backbone, cache)
        both = read_sums(Path(cache).expanduser())[0]
        if len(both) == both.shape[1]:
            raise UserError(f"{cache} is of an earlier version and lacks the mean: make it again with overwrite=true.")
        total = both[-1]
    rows = count * len(empty.varying())
    mean = (total - count * begin.sum(dim=0)) / rows
    return CaptionRows(gram - count * (begin.T @ begin), mean, rows, begin, count)


def _sums(backbone: Backbone, texts: Sequence[str]) -> Tensor:
    """(D + 1, D): sum k k^T over all rows of all texts and, as the last row, sum k."""
    sums = torch.zeros(backbone.width + 1, backbone.width, dtype=torch.float64)
    for batch in _batches(texts):
        keys = backbone.encode(batch).states.flatten(0, 1).double()
        sums += torch.cat([keys.T @ keys, keys.sum(dim=0, keepdim=True)]).cpu()
    return sums


def gram_of(backbone: Backbone, texts: Sequence[str]) -> Tensor:
    """sum k k^T (D, D) over all rows of all texts, float64 on the CPU; only one batch of states is in memory."""
    gram = torch.zeros(backbone.width, backbone.width, dtype=torch.float64)
    for batch in _batches(texts):
        keys = backbone.encode(batch).states.flatten(0, 1).double()
        gram += (keys.T @ keys).cpu()
    return gram


def kept_texts(preserve: Preserve, pairs: Sequence[Pair]) -> list[str]:
    """The texts to preserve; for "artists", all artists that are not erased."""
    if preserve != "artists":
        return list(preserve)
    erased = {pair.concept.target.casefold() for pair in pairs}
    names = ARTISTS.read_text(encoding="utf-8").splitlines()
    return [name for name in names if name.casefold() not in erased]


class Preserved:
    """The preserved captions of MACE's two closed forms: scale (C + domain_weight D), C and D sums k k^T over captions.

    prior_cache: C, a file made by python -m realera.cache, or "everyday". scale: weight of a row. captions: C is scaled
    to count as this number of captions (the official scales are for COCO's 616,767); None = its own number.
    domain_cache, domain_weight: D, a file of captions of the concept's kind (names of people), and its weight.

    Raises UserError for a weight without captions and for captions without a weight.
    """

    def __init__(
        self,
        prior_cache: Sums | None = None,
        scale: NonNegative = 0.0,
        captions: Captions | None = COCO,
        domain_cache: Sums | None = None,
        domain_weight: NonNegative = 0.0,
    ) -> None:
        if scale > 0 and prior_cache is None and domain_cache is None:
            raise UserError(
                f"method.edit.preserved.scale={scale:g} needs captions: set method.edit.preserved.prior_cache=FILE "
                "(made by python -m realera.cache; everyday: a small built-in set), or set the scale to 0."
            )
        for name, cache in (("prior_cache", prior_cache), ("domain_cache", domain_cache)):
            if cache is not None and scale == 0:
                raise UserError(
                    f"method.edit.preserved.{name}={cache} has no effect with method.edit.preserved.scale=0: set the "
                    f"scale too (for example 1e-4), or set {name}=null."
                )
        if (domain_cache is None) != (domain_weight == 0):
            raise UserError(
                f"method.edit.preserved.domain_cache={domain_cache or 'null'} and domain_weight={domain_weight:g} go "
                "together: set the file and a weight above 0, or null and 0."
            )
        self.prior_cache = prior_cache
        self.scale = scale
        self.captions = captions
        self.domain_cache = domain_cache
        self.domain_weight = domain_weight

    def gram(self, backbone: Backbone, squared: bool = False) -> Tensor | None:
        """(D, D) float64, scaled, or None if the scale is 0. squared: apply the square of the scale."""
        if self.scale == 0:
            return None
        total = torch.zeros(backbone.width, backbone.width, dtype=torch.float64)
        if self.prior_cache is not None:
            found, count = prior(backbone, self.prior_cache)
            total += found * (1.0 if self.captions is None else self.captions / count)
        if self.domain_cache is not None:
            total += self.domain_weight * prior(backbone, self.domain_cache)[0]
        return total * (self.scale**2 if squared else self.scale)


def content_id(files: Iterable[Path], column: str = "") -> str:
    """16 hex digits: a hash of the files' contents, in order, and of the column that is read."""
    digest = hashlib.sha256(column.encode())
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _write(file: Path, sums: Tensor, made: Made) -> None:
    finite.refuse([("of the captions", sums)], f"{file.name} is not saved: the sum", "check the text encoder's weights")
    tensors = {"gram": sums[:-1].contiguous(), "total": sums[-1].contiguous()}
    checksums.save(file, tensors, {"format": FORMAT, "made": json.dumps(asdict(made))})


def _batches(captions: Iterable[str]) -> Iterator[list[str]]:
    left = iter(captions)
    while batch := list(islice(left, BATCH)):
        yield batch
