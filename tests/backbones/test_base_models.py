"""The commands, from training to the report, on a small model of every kind of Stable Diffusion in conf/backbone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from realera.backbones.sampling import start_noise
from realera.paths import MINIATURE

KINDS = {  # backbone: the folder's fixture, text width, image size, cross-attention weights
    "sd14": ("tiny_sd", 32, 32, 14),
    "sd21": ("tiny_sd21", 32, 64, 32),
    "sdxl": ("tiny_sdxl", 80, 64, 56),
}
FEW = "task.images={erase:2,near:1,keep:1,associated:1,unseen:1}"
METHODS = {
    "uce": (),
    "realera": ("method.align.steps=2", "method.latents.images=2", "method.latents.chunk=2", "method.align.lr=1e-2"),
}
needs_judge = pytest.mark.skipif(not (MINIATURE / "judge").is_dir(), reason="the miniature's judge is not there")


@pytest.fixture
def type_in(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """type_in("train", "sdxl", ...) runs a command on the small model of that kind; returns the folder of the runs."""
    place = tmp_path_factory.mktemp("work")
    monkeypatch.chdir(place)
    monkeypatch.setenv("REALERA_CACHE", str(place / "cache"))
    monkeypatch.setenv("REALERA_STAMP", "stamp")

    def run(door: str, kind: str, *words: str) -> Path:
        fixture, width, size, _ = KINDS[kind]
        model = [
            f"backbone={kind}",
            f"backbone.pretrained={request.getfixturevalue(fixture)}",
            f"backbone.text={{width:{width},row_norm:{width**0.5:.1f},max_length:77}}",
            f"backbone.sampler.height={size}",
            f"backbone.sampler.width={size}",
            "backbone.sampler.steps=2",
            "trainer=cpu",
        ]
        monkeypatch.setattr(sys, "argv", [door, *words, *(model if door != "export" else [])])
        import_module(f"realera.{door}").main()
        return place

    return run


def only(folder: Path, name: str) -> Path:
    found = list(folder.glob(f"runs/*/{name}"))
    assert len(found) == 1
    return found[0]


@pytest.mark.slow
def test_an_xl_is_erased_and_exported(type_in: Callable[..., Path], tiny_sdxl: Path) -> None:
    """The saved weights contain the edit of every layer, and a diffusers pipeline generates the same image with it."""
    place = type_in("train", "sdxl", "concept=airplane", "method=uce", "evaluate=false", "logger=none")
    state = load_file(erased := only(place, "erased.safetensors"))
    assert len(state) == 56
    before = load_file(tiny_sdxl / "unet" / "diffusion_pytorch_model.safetensors")
    for key, value in state.items():
        assert (value - before[key.removeprefix("edit.")]).norm() > 1e-3 * value.norm(), key
    assert load_file(only(place, "map.safetensors"))["map"].shape == (80, 80)

    from realera.backbones.unet import UNetBackbone
    from realera.contracts import Sampler

    ours = UNetBackbone("sdxl", tiny_sdxl, Sampler("ddim", 2, 5.0, 64, 64))
    plain = ours.generate(["airplane"], [0]).numpy()
    ours.load_erased(state)
    expected = ours.generate(["airplane"], [0]).numpy()
    assert np.abs(expected.astype(int) - plain.astype(int)).max() > 2
    type_in("export", "sdxl", f"run={erased.parent}", "to=diffusers", "out=pipeline")
    pipeline = StableDiffusionXLPipeline.from_pretrained(place / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    found = pipeline(
        ["airplane"],
        latents=start_noise([0], (4, 8, 8)),
        output_type="np",
        num_inference_steps=2,
        guidance_scale=5.0,
        height=64,
        width=64,
    ).images
    assert np.abs(found - expected / 255).max() < 1.01 / 255


@needs_judge
@pytest.mark.slow
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("kind", list(KINDS))
def test_train_evaluate_and_report(kind: str, method: str, type_in: Callable[..., Path]) -> None:
    place = type_in(
        "train", kind, "concept=airplane", f"method={method}", *METHODS[method], FEW, "judge=miniature", "logger=none"
    )
    metrics = json.loads(only(place, "metrics.json").read_text())
    assert metrics["mean_prob"]["acc_e"]["n"] == 2 and metrics["original"] is not None
    assert metrics["protocol"]["backbone"]["name"] == kind
    state = load_file(only(place, "erased.safetensors"))
    layers = KINDS[kind][3]
    assert sum(key.startswith("edit.") for key in state) == layers
    ups = [value for key, value in state.items() if key.endswith(".up")]
    assert len(ups) == (layers if method == "realera" else 0)
    assert all(bool(up.any()) and bool(up.isfinite().all()) for up in ups)  # trained, each of them
    assert only(place, "report.html").stat().st_size > 1000
    images = sorted(only(place, "images").iterdir())
    originals = sorted(only(place, "originals").iterdir())
    assert [file.name for file in images] == [file.name for file in originals]
    assert any(a.read_bytes() != b.read_bytes() for a, b in zip(images, originals, strict=True))


@needs_judge
@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_unedited_model(kind: str, type_in: Callable[..., Path]) -> None:
    place = type_in("evaluate", kind, "run=original", "concept=cat", FEW, "judge=miniature", "logger=none")
    metrics = json.loads(only(place, "metrics.json").read_text())
    assert metrics["original"] is None and metrics["mean_prob"]["acc_e"]["n"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd21", "sdxl"])
@pytest.mark.parametrize("to", ["lora", "diffusers"])
def test_a_trained_run_is_exported_in_other_formats(
    kind: str, to: str, type_in: Callable[..., Path], request: pytest.FixtureRequest
) -> None:
    words = ("concept=airplane", "method=realera", *METHODS["realera"], "evaluate=false", "logger=none")
    run = only(type_in("train", kind, *words), "erased.safetensors").parent
    place = type_in("export", kind, f"run={run}", f"to={to}", "out=out", *(["rank=80"] if to == "lora" else []))
    source: Path = request.getfixturevalue(KINDS[kind][0])
    pipeline_class: Any = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    pipeline = pipeline_class.from_pretrained(source if to == "lora" else place / "out")
    if to == "lora":  # of full rank, so nothing is lost
        pipeline.load_lora_weights(place / "out", weight_name="pytorch_lora_weights.safetensors")

    from realera.backbones.unet import UNetBackbone
    from realera.contracts import Sampler

    ours = UNetBackbone(kind, source, Sampler("ddim", 2, 5.0, 64, 64))
    ours.load_erased(load_file(run / "erased.safetensors"))
    latents, states = start_noise([0], (4, 8, 8)), ours.encode(["airplane"])
    added = (
        {} if kind == "sd21" else {"text_embeds": states.pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    )
    with torch.no_grad():
        found = pipeline.unet(latents, torch.tensor(500), states.states, added_cond_kwargs=added).sample
    expected = ours._denoise(latents, torch.tensor(500), states.states, states.pooled)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
