"""A plan times a pass of the denoiser where this machine can run it."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from realera.backbones import probe
from realera.backbones.unet import UNetBackbone
from realera.contracts import Sampler
from realera.runs import estimate, timing
from realera.runs.timing import Rate
from realera.system import cores, devices

pytestmark = pytest.mark.timed


def config(folder: Path, name: str = "mini", dtype: str = "float32") -> dict[str, Any]:
    backbone = {"name": name, "pretrained": str(folder), "dtype": dtype, "text": {"max_length": 77}}
    return {"backbone": backbone, "images_at_once": 2}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str]]:
    """(dtype, device) of each timing; a pass takes a second, in half precision a quarter."""
    found: list[tuple[str, str]] = []

    def timed(unet: Any, rows: int, images: int, dtype: str, device: str) -> float:
        found.append((dtype, device))
        return 1.0 if dtype == "float32" else 0.25

    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cores, "busy", lambda: 0.0)
    monkeypatch.setattr(probe, "seconds_per_pass", timed)
    return found


def test_a_pass_of_constant_weights_is_a_pass_of_the_model(tiny_sd: Path, tiny_sdxl: Path) -> None:
    """Same modules, same shapes: what is timed is the backbone's U-Net."""
    for folder in (tiny_sd, tiny_sdxl):
        found = probe.unet_config(str(folder))
        assert found is not None
        shapes: list[list[tuple[int, ...]]] = []

        def watch(module: torch.nn.Module, args: Any, output: Any, shapes: Any = shapes) -> None:
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                shapes[-1].append((*module.weight.shape, *output.shape[1:]))

        handle = torch.nn.modules.module.register_module_forward_hook(watch)
        try:
            shapes.append([])
            seconds = probe.seconds_per_pass(found, 77, 1, "float32", "cpu")
            shapes[0] = shapes[0][: len(shapes[0]) // shapes[0].count(shapes[0][0])]  # of one pass: conv_in runs once
            backbone = UNetBackbone("mini", folder, Sampler("ddim", 1, 7.5, 32, 32))
            shapes.append([])
            states = backbone.encode(["a cat"])
            shapes[1].clear()
            with torch.no_grad():
                backbone.predict_noise(torch.zeros(1, 4, 8, 8), torch.tensor([500]), states.states, states.pooled)
        finally:
            handle.remove()
        assert 0 < seconds < 60 and sorted(shapes[0]) == sorted(shapes[1])


def test_a_text_of_constant_weights_is_a_text_of_the_encoder(tiny_sd: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    """Same layers, same shapes; several encoders one after the other; T5 is not known."""
    shutil.copytree(tiny_sd, tmp_path / "sd")
    (tmp_path / "sd" / "text_encoder_3").mkdir()
    (tmp_path / "sd" / "text_encoder_3" / "config.json").write_text('{"model_type": "t5"}')
    assert probe.text_configs(str(tmp_path / "sd")) == []
    for folder, number in ((tiny_sd, 1), (tiny_sdxl, 2)):
        found = probe.text_configs(str(folder))
        backbone = UNetBackbone("mini", folder, Sampler("ddim", 1, 7.5, 32, 32))
        encoders = [backbone.text] if number == 1 else [backbone.text.first, backbone.text.second]  # type: ignore[union-attr]
        assert len(found) == number
        for one, encoder in zip(found, encoders):
            shapes: list[tuple[int, ...]] = []

            def watch(module: torch.nn.Module, args: Any, output: Any, shapes: Any = shapes) -> None:
                if isinstance(module, torch.nn.Linear):
                    shapes.append((*module.weight.shape, *output.shape[1:]))

            handle = torch.nn.modules.module.register_module_forward_hook(watch)
            try:
                assert 0 < probe.seconds_per_text(one, 77, "cpu") < 1
                timed = set(shapes)
                shapes.clear()
                encoder(["a cat"])  # type: ignore[operator]
            finally:
                handle.remove()
            assert {shape for shape in shapes if len(shape) == 4} == timed


def test_a_text_is_timed_once_a_day_and_enters_the_hours(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[tuple[str, str]]
) -> None:
    found: list[tuple[int, str]] = []
    monkeypatch.setattr(probe, "seconds_per_text", lambda one, rows, place: found.append((rows, place)) or 0.5)
    rates = [timing.text_rate_of(config(tiny_sd), "cpu") for _ in range(2)]
    assert rates[0] == rates[1] and rates[0] is not None and rates[0].seconds == 0.5 and found == [(77, "cpu")]
    assert timing.text_rate_of(config(tiny_sd, "sd14"), "cpu") is None, "minutes"
    assert timing.text_rate_of(config(tiny_sd / "no such folder"), "cpu") is None
    machine = {**config(tiny_sd), "device": "cpu"}
    published = {"rate": estimate.PASS["mini", "cpu"], "text_rate": estimate.TEXT_PASS["mini", "cpu"]}
    cell = estimate.Work(passes_of_attacks=1e6, passes_per_image=1.0, texts={"a": 7200.0}, machine=machine, **published)
    plan = estimate.summed([cell, cell])
    assert plan.text_passes_of_attacks == 7200, "two cells share the search"
    assert plan.hours == pytest.approx((2 * (1e6 + estimate.AROUND) + 3600) / 3600, abs=0.01)
    assert "0.5 s a pass of the text encoder (timed on this machine" in plan.basis


def test_it_is_timed_once_a_day(passes: list[tuple[str, str]], tiny_sd: Path, tmp_path: Path) -> None:
    first, again = (timing.rate_of(config(tiny_sd), "cpu") for _ in range(2))
    assert first == again and first is not None and first.seconds == 1.0 and first.half is None
    assert passes == [("float32", "cpu")] and "timed on this machine" in first.source
    (file,) = (tmp_path / "cache" / timing.FOLDER).iterdir()
    os.utime(file, (0, 0))
    assert timing.rate_of(config(tiny_sd), "cpu") == first and len(passes) == 2, "machines change"


def test_a_time_taken_beside_other_work_is_taken_again(
    passes: list[tuple[str, str]], tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "busy", lambda: 0.5)
    beside = timing.rate_of(config(tiny_sd), "cpu")
    assert beside is not None and beside.source.endswith("while other work ran")
    monkeypatch.setattr(cores, "busy", lambda: 0.1)
    alone = [timing.rate_of(config(tiny_sd), "cpu") for _ in range(2)]
    assert len(passes) == 2 and alone[0] == alone[1] and alone[0] is not None
    assert "other work" not in alone[0].source


def test_on_a_gpu_half_precision_is_timed_too(
    passes: list[tuple[str, str]], tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "number", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    rate = timing.rate_of(config(tiny_sd, "sd14"), "gpu")
    assert rate == Rate(1.0, "timed on this machine: a GPU, 2 images at once", 0.25)
    assert passes == [("float32", "cuda"), ("bfloat16", "cuda")]
    machine = {**config(tiny_sd, "sd14", "bfloat16"), "device": "gpu"}
    long = estimate.Work(images=100, passes_per_image=100.0, rate=estimate.PASS["sd14", "gpu"], machine=machine)
    plan = estimate.summed([long] * 20)
    assert plan.hours == pytest.approx((20 * (10_000 * 0.25 + estimate.AROUND)) / 3600, abs=0.01)
    assert "timed on this machine: a GPU, 2 images at once, bfloat16" in plan.basis and plan.half_hours is None
    short = estimate.Work(images=1, passes_per_image=100.0, rate=estimate.PASS["sd14", "gpu"], machine=machine)
    assert "H100" in estimate.summed([short]).basis, "seconds are not worth a timing"


def test_what_this_machine_cannot_run_is_not_timed(passes: list[tuple[str, str]], tiny_sd: Path) -> None:
    assert timing.rate_of(config(tiny_sd, "sd14"), "gpu") is None, "no GPU is here"
    assert timing.rate_of(config(tiny_sd, "sd14"), "cpu") is None, "minutes"
    assert timing.rate_of(config(tiny_sd / "no such folder"), "cpu") is None
    assert not passes
    machine = {**config(tiny_sd, "sd14"), "device": "gpu"}
    work = estimate.Work(images=10_000, passes_per_image=100.0, rate=estimate.PASS["sd14", "gpu"], machine=machine)
    assert "H100" in estimate.summed([work]).basis


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"seconds": -1.0, "source": "", "half": None}), "{}"])
def test_a_spoilt_file_of_the_cache_is_timed_again(
    passes: list[tuple[str, str]], tiny_sd: Path, tmp_path: Path, content: str
) -> None:
    first = timing.rate_of(config(tiny_sd), "cpu")
    (file,) = (tmp_path / "cache" / timing.FOLDER).iterdir()
    file.write_text(content)
    assert timing.rate_of(config(tiny_sd), "cpu") == first and len(passes) == 2


def test_a_plan_says_what_half_precision_saves() -> None:
    cells = [estimate.Work(images=100, passes_per_image=100.0, rate=Rate(1.0, "said", 0.25)) for _ in range(2)]
    plan = estimate.summed(cells)
    around = 2 * estimate.AROUND
    assert plan.hours is not None and math.isclose(plan.hours, (20_000 + around) / 3600, abs_tol=0.01)
    assert plan.half_hours is not None and math.isclose(plan.half_hours, (5_000 + around) / 3600, abs_tol=0.01)
    assert estimate.summed([estimate.Work(images=1, passes_per_image=1.0, rate=Rate(1.0, "said"))]).half_hours is None
