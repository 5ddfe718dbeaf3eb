"""Recognises a text encoder, however its files are named, split or rounded.

A closed-form map depends on the text encoder alone, so it may be applied to every checkpoint with the same one. The
same encoder is stored in many ways: with or without "text_model." in its names, in shards, in half precision, with a
tokenizer in one file or in two. Its marks are hashes that do not depend on these:

    float16, bfloat16: of the weights rounded to that type, of the settings and of the tokenizers

Two encoders are the same if one of the marks is equal: a copy in float16 has the float16 mark of the original, a copy
in bfloat16 the bfloat16 mark. Where a model reads the states of several encoders, the marks are of all of them in their
order: of both of Stable Diffusion XL, side by side; of Stable Diffusion 3's two CLIPs, filled up to its width, and T5;
of FLUX's T5 alone, because it reads only the pooled state of its CLIP.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTextConfig, T5Config

from realera.backbones import configs, folder, kinds, vocabulary
from realera.backbones.loading import Parts
from realera.backbones.transformer_parts import TransformerParts
from realera.files.headers import read_json

ROUNDED = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# what text states depend on; a projection is for pooled states
READ = ("embeddings.", "encoder.", "final_layer_norm.", kinds.T5_EMBEDDING)
TIED = "encoder.embed_tokens.weight"  # a second name of T5's embedding, which not every file has
SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "num_hidden_layers")
T5_SETTINGS = (
    "d_kv",
    "feed_forward_proj",
    "layer_norm_epsilon",
    "num_heads",
    "num_layers",
    "relative_attention_max_distance",
    "relative_attention_num_buckets",
)
LAST, SECOND_LAST, T5_ROWS = "last layer", "second-last layer", "last layer of T5"
CLIP_LAYERS = {kinds.SD3: "second-last layer, filled up with zeros"}
ROLES = ("bos_token", "eos_token", "pad_token")
DIGITS = 16  # hex digits of a mark


Encoder = tuple[Any, str, str, Iterable[tuple[str, Tensor]]]  # its settings, what is read of it, its words, its weights


def of_parts(parts: Parts) -> dict[str, str]:
    """The marks of loaded components, in whatever dtype they are."""
    layer = SECOND_LAST if parts.xl else LAST
    return _marks(_loaded(zip(parts.tokenizers, parts.text_models, strict=True), layer))


def of_transformer(parts: TransformerParts) -> dict[str, str]:
    """As `of_parts`, for a diffusion transformer's components."""
    clips = [] if parts.kind == kinds.FLUX else parts.clips
    third = [] if parts.t5 is None else [parts.t5]
    return _marks([*_loaded(clips, CLIP_LAYERS.get(parts.kind, LAST)), *_loaded(third, T5_ROWS)])


def of_folder(place: Path, without: str = "") -> dict[str, str]:
    """The marks of a complete diffusers folder. Only the text encoders' weights are read, one tensor at a time.
    without: a text encoder that is not used."""
    kind = kinds.of(place)
    layer = SECOND_LAST if folder.is_xl(place) else CLIP_LAYERS.get(kind, LAST)
    encoders: list[Encoder] = []
    for tokenizer, part in zip(folder.tokenizers(place), kinds.encoders(kind, place)):
        settings, special = read_json(folder.settings_file(place, part)), folder.place_of(place, tokenizer)
        words = vocabulary.read(special)
        if kinds.form(kind, part) == kinds.T5:
            if part != without:
                own = T5Config(**configs.t5_settings(settings))
                encoders.append((own, T5_ROWS, _words(words, vocabulary.T5_SPECIAL), _stored(place, part)))
        elif kind != kinds.FLUX:
            roles = {role: vocabulary.special(special)[role] for role in ROLES}
            clip = CLIPTextConfig.from_dict(configs.text_settings(settings))
            encoders.append((clip, layer, _words(words, roles), _stored(place, part)))
    return _marks(encoders)


def same(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two marks are of the same text encoder."""
    return any(one[kind] == other.get(kind) for kind in one)


def _loaded(pairs: Iterable[tuple[Any, Any]], read: str) -> list[Encoder]:
    """pairs: tokenizer and model of each encoder."""
    found: list[Encoder] = []
    for tokenizer, model in pairs:
        roles = {role: str(getattr(tokenizer, role)) for role in (vocabulary.T5_SPECIAL if read == T5_ROWS else ROLES)}
        words = _words(tokenizer.backend_tokenizer, roles)
        found.append((model.config, read, words, model.state_dict().items()))
    return found


def _marks(encoders: Sequence[Encoder]) -> dict[str, str]:
    found = {kind: hashlib.sha256() for kind in ROUNDED}
    for settings, read, words, weights in encoders:
        values = {name: getattr(settings, name) for name in (T5_SETTINGS if read == T5_ROWS else SETTINGS)}
        said = json.dumps([values, read, words], sort_keys=True)
        hashes = _weights(weights)
        for kind, digest in found.items():
            digest.update(said.encode() + hashes[kind].encode())
    return {kind: digest.hexdigest()[:DIGITS] for kind, digest in found.items()}


def _weights(weights: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """{dtype: hash of all weights rounded to it}, whatever their order."""
    each: dict[str, list[str]] = {kind: [] for kind in ROUNDED}
    for name, tensor in weights:
        plain = name.removeprefix("text_model.")  # transformers before version 5 put it before every name
        if not plain.startswith(READ) or plain.endswith("position_ids") or plain == TIED:
            continue
        here = tensor.detach().cpu()  # rounded on the CPU, so that a GPU gives the same bits
        for kind, dtype in ROUNDED.items():
            numbers = here.to(dtype).contiguous().view(torch.uint8).numpy()
            each[kind].append(f"{plain} {tuple(here.shape)} {hashlib.sha256(numbers.data).hexdigest()}")
    return {kind: "\n".join(sorted(lines)) for kind, lines in each.items()}


def _stored(place: Path, part: str) -> Iterable[tuple[str, Tensor]]:
    for file in folder.part_files(place, part)[1]:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                yield name, opened.get_tensor(name)


def _words(tokenizer: Any, roles: Mapping[str, str]) -> str:
    """A hash of a tokenizer's vocabulary, merges and special tokens."""
    merges = json.loads(tokenizer.to_str())["model"].get("merges", [])
    pairs = [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in merges]  # both spellings exist
    content = [sorted(tokenizer.get_vocab(with_added_tokens=True).items()), pairs, sorted(roles.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
