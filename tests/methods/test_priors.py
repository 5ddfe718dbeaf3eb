"""Sums over captions: equal to a direct sum, continued after a stop, refused if they are unsuitable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from realera.contracts import UserError
from realera.methods import priors
from realera.methods.priors import CAPTIONS, Preserved, accumulate, partial, prior, read
from tearing import TEARS, tear

WORDS = ["a cat", "a dog on the sea", "tom cruise", "sky", "a big photo of a ship"]
CAPTION_LIST = [f"{word} and a {other}" for word in WORDS for other in WORDS]


class Stop(Exception):
    """A process that was killed."""


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(priors, "BATCH", 4)
    return tmp_path / "sum.safetensors"


def test_the_sum_is_over_all_rows_of_all_captions(out: Path, new_backbone: Callable[..., Any]) -> None:
    backbone = new_backbone()
    told: list[int] = []
    made = accumulate(backbone, iter(CAPTION_LIST), out, "words", advance=told.append)
    rows = backbone.encode(CAPTION_LIST).states.flatten(0, 1).double()
    direct = sum(torch.outer(row, row) for row in rows)
    gram, found = read(out)
    assert gram.dtype == torch.float64
    torch.testing.assert_close(gram, direct, rtol=1e-6, atol=1e-4)
    assert found == made and (made.captions, made.rows, made.complete) == (25, 77, True)
    assert sum(told) == 25 and max(told) == 4
    assert prior(backbone, out)[1] == 25 and torch.equal(prior(backbone, out)[0], gram)


def test_a_continued_sum_equals_an_uninterrupted_one(
    out: Path, new_backbone: Callable[..., Any], tmp_path: Path
) -> None:
    backbone = new_backbone()
    accumulate(backbone, CAPTION_LIST, tmp_path / "whole", "words")
    encoded: list[str] = []

    def until(last: int) -> Iterator[str]:
        for i, caption in enumerate(CAPTION_LIST):
            if i == last:
                raise Stop
            yield caption

    def noting(texts: list[str]) -> Any:
        encoded.extend(texts)
        return type(backbone).encode(backbone, texts)

    for last in (5, 13, 19):
        with pytest.raises(Stop):
            accumulate(backbone, until(last), out, "words", save_every=4)
    assert not out.exists() and read(partial(out))[1].captions == 16
    with pytest.raises(UserError, match="part of its captions"):
        prior(backbone, partial(out))
    told: list[int] = []
    backbone.encode = noting
    accumulate(backbone, CAPTION_LIST, out, "words", save_every=4, advance=told.append)
    assert encoded == CAPTION_LIST[16:] and sum(told) == 25
    assert torch.equal(read(out)[0], read(tmp_path / "whole")[0])
    assert not partial(out).exists()
    encoded.clear()
    assert accumulate(backbone, CAPTION_LIST, out, "words").captions == 25 and not encoded  # done already


@pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
def test_a_torn_sum_is_made_again(
    part: bool, out: Path, new_backbone: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    def until(last: int) -> Iterator[str]:
        yield from CAPTION_LIST[:last]
        raise Stop

    backbone = new_backbone()
    accumulate(backbone, CAPTION_LIST, out, "words")
    whole = out.read_bytes()
    for how in TEARS:
        if part:
            out.unlink()
            with pytest.raises(Stop):
                accumulate(backbone, until(9), out, "words", save_every=4)
        torn = partial(out) if part else out
        tear(torn, how)
        with pytest.raises(UserError, match=r"make it again with python -m realera\.cache"):
            prior(backbone, torn)
        caplog.clear()
        accumulate(backbone, CAPTION_LIST, out, "words")
        assert out.read_bytes() == whole and not partial(out).exists()
        assert [record.getMessage() for record in caplog.records] == [f"{torn} is torn: made again"]


def test_a_file_of_somebody_else_is_not_overwritten(out: Path, new_backbone: Callable[..., Any]) -> None:
    notes = out.with_name("notes.txt")
    notes.write_text("mine")
    with pytest.raises(UserError, match="cannot be read"):
        accumulate(new_backbone(), CAPTION_LIST, notes, "words")
    assert notes.read_text() == "mine"


def test_unsuitable_files_are_refused(
    out: Path, new_backbone: Callable[..., Any], tmp_path: Path, tiny_sd21: Path
) -> None:
    backbone = new_backbone()
    accumulate(backbone, WORDS, out, "words")
    with pytest.raises(UserError, match="another out"):
        accumulate(backbone, WORDS, out, "other words")
    with pytest.raises(UserError, match="no captions"):
        accumulate(backbone, [], tmp_path / "none", "nothing")
    with pytest.raises(UserError, match="another text encoder"):
        prior(new_backbone(text_length=20), out)
    with pytest.raises(UserError, match="no file"):
        prior(backbone, tmp_path / "missing")
    with pytest.raises(UserError, match="not a sum of captions"):
        read(next(tiny_sd21.glob("unet/*.safetensors")))
    out.write_bytes(out.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read"):
        prior(backbone, out)


def test_a_sum_depends_on_the_tokenizer_but_not_on_the_unet(new_backbone: Any, tiny_sd: Path, tmp_path: Path) -> None:
    import shutil

    ours = new_backbone().text_fingerprint
    for name, same in (("unet/config.json", True), ("tokenizer/tokenizer.json", False)):
        copy = tmp_path / name.split("/")[0]
        shutil.copytree(tiny_sd, copy)
        (copy / name).write_text((copy / name).read_text() + "\n ")
        if same:
            (copy / name).write_text((copy / name).read_text().replace('"sample_size": 8', '"sample_size": 16'))
        assert (folder_id(copy) == ours) == same


def folder_id(folder: Path) -> str:
    from realera.backbones.folder import fingerprint

    return fingerprint(folder, text_length=77, only_text=True)


def test_a_prior_can_be_scaled_to_a_number_of_captions(out: Path, new_backbone: Callable[..., Any]) -> None:
    backbone = new_backbone()
    accumulate(backbone, WORDS, out, "words")
    gram = read(out)[0]

    def weighed(**settings: Any) -> Any:
        return Preserved(str(out), **settings).gram(backbone)

    torch.testing.assert_close(weighed(scale=0.5, captions=None), 0.5 * gram)
    torch.testing.assert_close(weighed(scale=0.5, captions=50), 5 * gram)
    assert Preserved().gram(backbone) is None
    kept = Preserved(None, scale=0.5, domain_cache=str(out), domain_weight=4.0).gram(backbone, squared=True)
    torch.testing.assert_close(kept, gram)


def test_the_built_in_captions(new_backbone: Callable[..., Any]) -> None:
    captions = CAPTIONS.read_text(encoding="utf-8").splitlines()
    assert len(captions) == len(set(captions)) > 300
    gram, count = prior(new_backbone(), "everyday")
    assert count == len(captions)
    assert torch.linalg.matrix_rank(gram) >= 31  # all but the direction that a layer norm takes away
