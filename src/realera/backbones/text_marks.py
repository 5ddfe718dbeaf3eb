"""Recognises a text encoder, however its files are named, split or rounded.

A closed-form map depends on the text encoder alone, so it may be applied to every checkpoint with the same one. The
same encoder is stored in many ways: with or without "text_model." in its names, in shards, in half precision, with a
tokenizer in one file or in two. Its marks are hashes that do not depend on these:

    float16, bfloat16: of the weights rounded to that type, of the settings and of the tokenizers

Two encoders are the same if one of the marks is equal: a copy in float16 has the float16 mark of the original, a copy
in bfloat16 the bfloat16 mark. For Stable Diffusion XL the marks are of both encoders in their order, because the U-Net
reads their states side by side.
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
from transformers import CLIPTextConfig

from realera.backbones import configs, folder, vocabulary
from realera.backbones.loading import Parts
from realera.files.headers import read_json

ROUNDED = {"float16": torch.float16, "bfloat16": torch.bfloat16}
READ = ("embeddings.", "encoder.", "final_layer_norm.")  # what text states depend on; a projection is for pooled states
SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "num_hidden_layers")
ROLES = ("bos_token", "eos_token", "pad_token")
DIGITS = 16  # hex digits of a mark


def of_parts(parts: Parts) -> dict[str, str]:
    """The marks of loaded components, in whatever dtype they are."""
    encoders = []
    for tokenizer, model in zip(parts.tokenizers, parts.text_models, strict=True):
        roles = {role: str(getattr(tokenizer, role)) for role in ROLES}
        encoders.append((model.config, _words(tokenizer.backend_tokenizer, roles), model.state_dict().items()))
    return _marks(encoders, parts.xl)


def of_folder(place: Path) -> dict[str, str]:
    """The marks of a complete diffusers folder. Only the text encoders' weights are read, one tensor at a time."""
    encoders = []
    for tokenizer, part in zip(folder.tokenizers(place), ("text_encoder", "text_encoder_2")):
        settings = CLIPTextConfig.from_dict(configs.text_settings(read_json(place / part / "config.json")))
        special = vocabulary.special(place / tokenizer)
        words = _words(vocabulary.read(place / tokenizer), {role: special[role] for role in ROLES})
        encoders.append((settings, words, _stored(place, part)))
    return _marks(encoders, folder.is_xl(place))


def same(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two marks are of the same text encoder."""
    return any(one[kind] == other.get(kind) for kind in one)


def _marks(encoders: Sequence[tuple[Any, str, Iterable[tuple[str, Tensor]]]], xl: bool) -> dict[str, str]:
    found = {kind: hashlib.sha256() for kind in ROUNDED}
    for settings, words, weights in encoders:
        values = {name: getattr(settings, name) for name in SETTINGS}
        said = json.dumps([values, "second-last layer" if xl else "last layer", words], sort_keys=True)
        hashes = _weights(weights)
        for kind, digest in found.items():
            digest.update(said.encode() + hashes[kind].encode())
    return {kind: digest.hexdigest()[:DIGITS] for kind, digest in found.items()}


def _weights(weights: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """{dtype: hash of all weights rounded to it}, whatever their order."""
    each: dict[str, list[str]] = {kind: [] for kind in ROUNDED}
    for name, tensor in weights:
        plain = name.removeprefix("text_model.")  # transformers before version 5 put it before every name
        if not plain.startswith(READ) or plain.endswith("position_ids"):
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
