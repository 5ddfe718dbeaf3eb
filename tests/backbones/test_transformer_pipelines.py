"""Stable Diffusion 3 and FLUX pipelines in memory: erased in place, drawn by diffusers, undone bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import realera
from quick import slow_unless
from realera.backbones import transformer_pipelines
from realera.contracts import UserError

WORDS = ("backbone.sampler.height=64", "backbone.sampler.width=64", "backbone.sampler.steps=2", "backbone.t5_length=24")
Folders = Callable[[str], Path]


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    given = {"num_inference_steps": 2, "height": 64, "width": 64, "max_sequence_length": 24, "output_type": "np"}
    return pipe("a photo of a cat", generator=generator, **given).images


@pytest.mark.parametrize("kind", slow_unless(["sd3", "flux"], "flux"))
def test_an_erasure_in_memory(kind: str, tiny_transformers: Folders, tmp_path: Path) -> None:
    pipe = opened(tiny_transformers(kind))
    before, first = drawn(pipe), {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    erased = realera.erase(pipe, "cat", anchor="field", method="uce", overrides=WORDS, progress=False)
    assert erased.settings.backbone.name == {"sd3": "sd35-medium", "flux": "flux-dev"}[kind]
    changed = [key for key, value in pipe.transformer.state_dict().items() if not torch.equal(value, first[key])]
    assert changed == ["context_embedder.weight"]
    assert (drawn(erased.pipe) != before).any()
    image, original = (erased.draw("a photo of a cat", 3, original=side)[0] for side in (False, True))
    assert image.size == (64, 64) and image.tobytes() != original.tobytes()
    folder = erased.save(tmp_path / "run")
    with pytest.raises(UserError, match=r"to=kohya is for U-Nets.*give to=lora, which diffusers and ComfyUI"):
        erased.export("kohya", tmp_path / "kohya")
    assert erased.undo() is pipe
    assert all(torch.equal(value, first[key]) for key, value in pipe.transformer.state_dict().items())
    assert (drawn(pipe) == before).all()
    again = realera.load(opened(tiny_transformers(kind)), folder)
    assert again.draw("a photo of a cat", 3)[0].tobytes() == image.tobytes()


@pytest.mark.slow
def test_a_lora_is_merged_into_the_text_layers(tiny_transformers: Folders) -> None:
    pipe = opened(tiny_transformers("flux"))
    first = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    small = {"method.latents.images": 2, "method.latents.chunk": 2, "align.steps": 2, "align.lr": 1e-2}
    erased = realera.erase(
        pipe,
        "cat",
        anchor="field",
        method="realera",
        overrides=[*WORDS, "method.neighbours=null"],
        progress=False,
        **small,
    )
    state = pipe.transformer.state_dict()
    changed = {key for key, value in state.items() if not torch.equal(value, first[key])}
    text = {key for key in changed if key.endswith(("add_k_proj.weight", "add_v_proj.weight"))}
    assert text and changed == {*text, "context_embedder.weight"}
    erased.undo()
    assert all(torch.equal(value, first[key]) for key, value in pipe.transformer.state_dict().items())


def test_the_pipeline_keeps_its_precision(tiny_transformers: Folders) -> None:
    pipe = opened(tiny_transformers("sd3"), torch.bfloat16)
    first = {k: v.clone() for part in ("vae", "text_encoder") for k, v in getattr(pipe, part).state_dict().items()}
    realera.erase(pipe, "cat", anchor="field", method="uce", overrides=WORDS, progress=False)
    now = {k: v for part in ("vae", "text_encoder") for k, v in getattr(pipe, part).state_dict().items()}
    assert all(torch.equal(value, first[key]) and value.dtype == first[key].dtype for key, value in now.items())
    assert next(pipe.transformer.parameters()).dtype == next(pipe.text_encoder_3.parameters()).dtype == torch.bfloat16


def test_settings_of_a_pipeline(tiny_transformers: Folders) -> None:
    name, found = transformer_pipelines.described(opened(tiny_transformers("flux")))
    assert (name, found["t5"], found["text"]) == ("flux-dev", "float32", {"width": 64})
    assert transformer_pipelines.described(opened(tiny_transformers("schnell")))[0] == "flux-schnell"
    assert found["sampler"] == {"height": 1024, "width": 1024}


def test_pipelines_that_cannot_be_used(tiny_transformers: Folders) -> None:
    pipe = opened(tiny_transformers("flux"))
    pipe.text_encoder_2 = None
    with pytest.raises(UserError, match="lacks a text encoder"):
        realera.erase(pipe, "cat", anchor="field", method="uce")
