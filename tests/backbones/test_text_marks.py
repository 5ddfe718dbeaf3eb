"""One text encoder has the same marks however it is stored, and another encoder has others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import folders
from realera.backbones import pipelines, text_marks

KINDS = ("tiny_sd", "tiny_sd21", "tiny_sdxl")


def marks(pipe: Any) -> dict[str, str]:
    return text_marks.of_parts(pipelines.parts_of(pipe))


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_in_any_dtype_and_layout_is_the_same(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source: Path = request.getfixturevalue(kind)
    original = text_marks.of_folder(source)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        pipe: Any = DiffusionPipeline.from_pretrained(source).to(dtype)
        assert text_marks.same(original, marks(pipe))
        place = tmp_path / str(dtype)
        variant = "fp16" if dtype == torch.float16 else None
        pipe.save_pretrained(place, variant=variant, max_shard_size="20KB" if variant is None else "10GB")
        assert text_marks.of_folder(place) == marks(pipe)
        assert (text_marks.of_folder(place) == original) == (dtype == torch.float32)


def test_names_of_earlier_libraries_do_not_matter(tiny_sd: Path, tmp_path: Path) -> None:
    copy = folders.copied(tiny_sd, tmp_path / "copy")
    file = copy / "text_encoder" / "model.safetensors"
    state = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    file.unlink()
    save_file({**state, "text_model.embeddings.position_ids": torch.arange(77)[None]}, file)
    (copy / "tokenizer" / "tokenizer.json").unlink()
    vocabulary, merges = folders.byte_pairs(folders.WORDS.split())
    (copy / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    (copy / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    assert text_marks.of_folder(copy) == text_marks.of_folder(tiny_sd)


def weight(copy: Path) -> None:
    file = copy / "text_encoder" / "model.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith("layers.0.mlp.fc1.weight"))
    state[name][0, 0] += 0.1
    file.unlink()
    save_file(state, file)


def activation(copy: Path) -> None:
    file = copy / "text_encoder" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_act": "gelu"}))


def padding(copy: Path) -> None:
    file = copy / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": "!"}))


def merges(copy: Path) -> None:
    file = copy / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("change", [weight, activation, padding, merges])
def test_another_text_encoder_has_other_marks(change: Callable[[Path], None], tiny_sd: Path, tmp_path: Path) -> None:
    copy = folders.copied(tiny_sd, tmp_path / "copy")
    change(copy)
    assert not text_marks.same(text_marks.of_folder(tiny_sd), text_marks.of_folder(copy))


def test_both_encoders_of_xl_count_and_nothing_else_does(tiny_sdxl: Path, tmp_path: Path) -> None:
    original = text_marks.of_folder(tiny_sdxl)
    for name, same in (("text_encoder_2", False), ("unet", True), ("vae", True)):
        copy = folders.copied(tiny_sdxl, tmp_path / name)
        file = next((copy / name).glob("*.safetensors"))
        state = {key: tensor * 1.5 for key, tensor in load_file(file).items()}
        file.unlink()
        save_file(state, file)
        assert text_marks.same(original, text_marks.of_folder(copy)) == same
        shutil.rmtree(copy)
