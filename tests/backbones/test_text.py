from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, CLIPTextModel

from realera.backbones import text as room
from realera.backbones.text import TextEncoder, padded_ids
from realera.contracts import NamedPrompt, UserError
from realera.tasks.prompts import fill


@pytest.fixture(scope="module")
def encoder(tiny_sd: Path) -> TextEncoder:
    model = CLIPTextModel.from_pretrained(tiny_sd / "text_encoder").eval()
    return TextEncoder(AutoTokenizer.from_pretrained(tiny_sd / "tokenizer"), model)


def test_states_equal_those_of_stable_diffusion(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a photo of a cat", "", "an airplane in the sky by a field", "a DOG", "tom cruise"]
    monkeypatch.setattr(room, "BATCH", 2)
    states = encoder(texts)
    ids = encoder.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = torch.cat([encoder.model(row[None])[0] for row in ids])
    assert states.states.shape == (5, 77, 32) and states.states.dtype == torch.float32
    torch.testing.assert_close(states.states, expected, atol=1e-5, rtol=1e-5)
    assert states.first.tolist() == states.last.tolist() == [-1] * 5
    assert states.length.tolist() == [6, 1, 9, 3, 3]
    assert states.pooled is None


def test_tokens_are_a_texts_own(encoder: TextEncoder) -> None:
    cat, both, nothing = encoder.tokens(["cat", "a photo of the CAT", ""])
    assert len(cat) == 1 and cat < both and len(both) == 5 and nothing == set()
    assert not set(encoder.tokenizer.all_special_ids) & both
    assert encoder.tokens([]) == []


def test_no_texts(encoder: TextEncoder) -> None:
    states = encoder([])
    assert states.states.shape == (0, 77, 32) and states.first.shape == states.length.shape == (0,)


def named(template: str, name: str) -> NamedPrompt:
    return NamedPrompt.of(template, name)


@pytest.mark.parametrize(
    ("template", "name", "first", "last"),
    [
        ("a photo of a {}", "cat", 5, 5),
        ("A Photo of  {} by the sea", "TOM   Cruise", 4, 5),
        ("a famous art by {}", "art", None, None),  # the slot, not the first such word
        ("a painting of {}", "a painting", 4, 5),
        ("the {} beside a cat", "cat", 2, 2),
        ("{}'s airplane", "Tom Cruise", 1, 2),
        ("a {}", "jetliner", 2, None),
        ("a photo of {}", "İstanbul", 4, None),  # lower-cased it is one character longer
        ("İİİ of {}", "cat", None, None),
        ("a {} by the sea", "Café", 2, None),
        ("a cafe\u0301 by the {}", "sea", None, None),  # two characters that the tokenizer reads as one
        ("a photo of ({})", "sky", None, None),
        ("{} in the sky", "飞机", 1, None),
        ("🌊 and\n\t{}", "ship", None, None),
    ],
)
def test_rows_of_a_name(encoder: TextEncoder, template: str, name: str, first: int | None, last: int | None) -> None:
    prompt = named(template, name)
    assert prompt.name == name
    start, end = encoder.rows(prompt)
    assert first in (start, None) and last in (end, None)
    assert start == len(encoder.tokenizer(template.partition("{}")[0])["input_ids"]) - 1
    ids = encoder.tokenizer(prompt.text)["input_ids"]
    assert ids[start : end + 1] == encoder.tokenizer(name, add_special_tokens=False)["input_ids"]
    states = encoder([prompt])
    assert (states.first.item(), states.last.item()) == (start, end)


def test_the_article_does_not_change_the_rows(encoder: TextEncoder) -> None:
    """ "a {}" becomes "an {}" before a vowel: the name begins one character later, but in the same row."""
    states = encoder([fill("a photo of a {}", name) for name in ("cat", "airplane", "a painting", "Tom Cruise")])
    assert states.first.tolist() == [5, 5, 5, 5]


def test_later_prompts_keep_their_own_rows(encoder: TextEncoder) -> None:
    states = encoder([named("a {}", "cat"), "a photo of a dog", named("a photo of a {}", "dog")])
    assert states.first.tolist() == [2, -1, 5] and states.length.tolist() == [3, 6, 6]


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_refused(encoder: TextEncoder, name: str) -> None:
    with pytest.raises(UserError, match="finds no name"):
        encoder([named("a photo of a {} cat", name)])


def test_a_cut_name_is_refused(encoder: TextEncoder) -> None:
    for before, name in ((80, "cat"), (74, "tom cruise")):
        with pytest.raises(UserError, match="cut at 77 tokens"):
            encoder([named("a " * before + "{}", name)])
    states = encoder([named("a " * 73 + "{}", "tom cruise")])  # the last place that fits
    assert (states.first.item(), states.last.item(), states.length.item()) == (74, 75, 76)


def test_a_cut_after_the_name_is_accepted(encoder: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        states = encoder([named("a {}" + " and a dog" * 50, "cat")])
    assert (states.first.item(), states.length.item()) == (2, 76)
    assert not caplog.records


def test_padding_is_the_tokenizers_own(tiny_sd: Path, tmp_path: Path) -> None:
    """SD 2.x pads with "!", so a prompt has only one end-of-text token."""
    shutil.copytree(tiny_sd / "tokenizer", tmp_path / "tokenizer")
    config = tmp_path / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token": "!"}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    padded = TextEncoder(tokenizer, CLIPTextModel.from_pretrained(tiny_sd / "text_encoder").eval())
    ids = padded_ids(padded.tokenizer, ["a cat"], padded.length)
    assert (ids == tokenizer.eos_token_id).sum() == 1 and (ids[0, 4:] == tokenizer.convert_tokens_to_ids("!")).all()
    assert padded(["a cat"]).length.tolist() == [3]


def test_shorter_rows(encoder: TextEncoder) -> None:
    short = TextEncoder(encoder.tokenizer, encoder.model, length=16)
    states = short([named("a photo of a {}", "cat")])
    assert states.states.shape == (1, 16, 32)
    torch.testing.assert_close(states.states, encoder(["a photo of a cat"]).states[:, :16])  # attention is causal
    with pytest.raises(UserError, match="cut at 16 tokens"):
        short([named("a " * 15 + "{}", "cat")])


def test_to_end_computes_equal_rows(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of different lengths, in several batches: each computed row equals that of the full-length encoding."""
    texts = ["a cat", "", named("an airplane in the sky by a {}", "field"), "a DOG", "tom cruise", "a " * 90, "a ship"]
    whole = encoder(texts)
    monkeypatch.setattr(room, "BATCH", 2)
    read: list[int] = []
    hook = encoder.model.register_forward_pre_hook(
        lambda module, args, given: read.append(given["input_ids"].numel()), with_kwargs=True
    )
    short = encoder([*texts[:5], texts[6]], to_end=True)
    hook.remove()
    assert len(read) == 1 and read[0] < 2 * 77 and short.states.shape[1] == int(short.length.max()) + 1 < 20
    both = encoder(texts, to_end=True)
    assert both.states.shape[1] == 77
    for name in ("first", "last", "length"):
        assert torch.equal(getattr(both, name), getattr(whole, name))
    for row, end in enumerate(whole.length.tolist()):
        torch.testing.assert_close(both.states[row, : end + 1], whole.states[row, : end + 1], atol=1e-5, rtol=1e-5)
        assert not both.states[row, end + 1 :].any()


@pytest.mark.parametrize("length", [2, 78])
def test_impossible_lengths_are_refused(encoder: TextEncoder, length: int) -> None:
    with pytest.raises(UserError, match="3 to 77"):
        TextEncoder(encoder.tokenizer, encoder.model, length=length)


def test_states_can_be_used_in_training(encoder: TextEncoder) -> None:
    weight = torch.ones(32, requires_grad=True)
    (encoder(["a cat"]).states * weight).sum().backward()  # inference tensors would refuse
    assert weight.grad is not None


def test_a_word_s_own_vectors_give_its_states(encoder: TextEncoder) -> None:
    texts = [named("a photo of {} by the sea", "tom cruise"), named("{}", "Tom Cruise")]
    plain = encoder(texts)
    own = encoder.with_vectors(texts, encoder.vectors("Tom Cruise"))
    for name in ("first", "last", "length"):
        assert torch.equal(getattr(plain, name), getattr(own, name))
    torch.testing.assert_close(own.states, plain.states, atol=1e-6, rtol=1e-5)
    assert torch.equal(encoder(texts).states, plain.states)  # the hook is removed


def test_more_vectors_than_sub_tokens(encoder: TextEncoder) -> None:
    """Four vectors replace one word: the following tokens move, and the states are those of the vectors' words."""
    long = "a red and blue old jet"  # six words, each a token
    vectors = encoder.vectors(long)
    found = encoder.with_vectors([named("photo of {} in the sky", "cat")], vectors)
    plain = encoder([named("photo of {} in the sky", long)])
    assert (int(found.first[0]), int(found.last[0]), int(found.length[0])) == (3, 8, 12)
    torch.testing.assert_close(found.states, plain.states, atol=1e-6, rtol=1e-5)


def test_vectors_get_a_gradient(encoder: TextEncoder) -> None:
    vectors = encoder.vectors("cat dog").requires_grad_(True)

    def size(given: torch.Tensor) -> torch.Tensor:
        return encoder.with_vectors([named("a photo of a {}", "cat")], given).states[0, 6:].pow(3).sum()

    (gradient,) = torch.autograd.grad(size(vectors), vectors)
    step = torch.zeros_like(vectors)
    step[1, 3] = 1e-2
    with torch.no_grad():
        slope = (size(vectors + step) - size(vectors - step)) / 2e-2
    assert float(gradient[1, 3]) == pytest.approx(float(slope), rel=2e-2)


def test_vectors_at_the_end_of_a_full_prompt(encoder: TextEncoder) -> None:
    full = named("{} " + "a " * 74, "cat")  # 75 words and both special tokens fill the 77 rows
    found = encoder.with_vectors([full], encoder.vectors("dog bird"))
    assert int(found.length[0]) == 76
    with pytest.raises(UserError, match="vectors"):
        encoder.with_vectors([named("a " * 70 + "{}", "cat")], encoder.vectors("dog bird cat ship truck sky"))


def test_states_are_cached_and_copied(new_backbone: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = new_backbone().text
    texts = [named("a {}", "cat"), named("a {}", "dog")]
    first = encoder(texts)
    untouched = first.states.clone()
    first.states.zero_()
    monkeypatch.setattr(encoder, "_encode", None)  # encoding again would fail
    again = encoder(texts)
    assert torch.equal(again.states, untouched) and again.first.tolist() == first.first.tolist()
    with pytest.raises(TypeError):
        encoder(texts[::-1])


def test_the_cache_has_a_limit(new_backbone: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = new_backbone().text
    one = encoder(["a cat"]).states.nbytes
    monkeypatch.setattr(room, "KEPT", 2 * one)
    for word in ("dog", "ship", "sky"):
        encoder([f"a {word}"])
    assert [key[-1] for key in encoder._latest._kept] == [("a ship",), ("a sky",)]
    encoder(["a cat", "a dog", "a ship"])  # larger than the cache: it does not replace other entries
    assert [key[-1] for key in encoder._latest._kept] == [("a ship",), ("a sky",)]
