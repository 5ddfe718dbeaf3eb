"""The model of tests/official as a diffusers folder."""

from __future__ import annotations

import gzip
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

OFFICIAL = Path(__file__).parent / "official"
ROWS = "rows"  # of the embedding: the tokens that the file has
EMBEDDING = "embeddings.token_embedding.weight"
PREFIX = "text_model."  # of the text encoder's weights in some releases of transformers


def save(folder: Path) -> Path:
    """Writes the folder; a weight that the file lacks is zero."""
    saved, configs = load_file(OFFICIAL / "model.safetensors"), json.loads((OFFICIAL / "model.json").read_text())
    for name in ("model_index", "scheduler/scheduler_config", "tokenizer/tokenizer_config"):
        _write(folder / f"{name}.json", configs[name])
    _write(folder / "tokenizer" / "tokenizer.json", _tokenizer(configs["tokenizer/tokenizer"]))
    with torch.device("meta"):
        models = {
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(configs["text_encoder/config"])),
            "unet": UNet2DConditionModel.from_config(configs["unet/config"]),
            "vae": AutoencoderKL.from_config(configs["vae/config"]),
        }
    for part, model in models.items():
        _write(folder / part / "config.json", configs[f"{part}/config"])
        weights = {
            name: saved.get(f"{part}.{name.removeprefix(PREFIX)}", torch.zeros(value.shape))
            for name, value in model.state_dict().items()
        }
        if part == "text_encoder":
            name = next(name for name in weights if name.endswith(EMBEDDING))
            weights[name] = torch.zeros(model.state_dict()[name].shape)
            weights[name][saved[ROWS]] = saved[f"{part}.{EMBEDDING}"]
        file = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        save_file(weights, folder / part / f"{file}.safetensors", {"format": "pt"})
    return folder


def _tokenizer(settings: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json, with CLIP's merges as open_clip ships them."""
    spec = find_spec("open_clip")
    assert spec is not None and spec.origin is not None
    text = gzip.decompress((Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges = [line.split() for line in text.split("\n")[1:48895]]
    letters = _bytes()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return {**settings, "model": {**settings["model"], "vocab": vocabulary, "merges": merges}}


def _bytes() -> list[str]:
    """GPT-2's letter for each byte, in CLIP's order: printable bytes are themselves, the others follow from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")
