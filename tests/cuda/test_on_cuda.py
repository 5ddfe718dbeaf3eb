"""The miniature on a CUDA device against the CPU. Skipped without one; `experiments/cuda/run.sh` runs these there.

REALERA_TEST_DEVICE=cpu rehearses them without a GPU. Where REALERA_CUDA_RECORD names a file, each test adds its
measured differences to it, one JSON object a line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from realera.paths import CONF_DIR, HERE
from realera.settings import composition, resolvers

DEVICE = os.environ.get("REALERA_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
METHODS = sorted(path.stem for path in (CONF_DIR / "method").glob("*.yaml"))
PROMPTS, SEEDS = ["a photo of the airplane", "a photo of the dog"], [0, 1]
# Two steps and few images, set where a method has such a setting.
SMALL: dict[str, Any] = {
    "latents.images": 8,
    "latents.batch": 4,
    "latents.chains": 2,
    "latents.renew": 2,
    "latents.replay.images": 8,
    "align.fisher.samples": 2,
    "align.fisher.timesteps": 3,
    "align.steps": 2,
}


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Without TensorFloat-32, which convolutions use unless told: its products have 10 bits."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """record(noise=1e-6): the measured differences of this test."""

    def write(**numbers: float) -> None:
        if place := os.environ.get("REALERA_CUDA_RECORD"):
            with Path(place).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"test": request.node.name, **numbers}) + "\n")

    return write


def settings(*words: str, device: str = "cpu") -> dict[str, Any]:
    """The resolved config of realera.train on the miniature."""
    from hydra import compose, initialize_config_dir

    resolvers.register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        accelerator = "gpu" if device == "cuda" else "cpu"
        words = ("concept=airplane", "backbone=mini", "logger=none", f"trainer.accelerator={accelerator}", *words)
        return composition.plain(compose("train", list(words)))


def small(name: str) -> list[str]:
    """SMALL as words, as far as the method has such settings."""
    method = settings(f"method={name}")["method"]

    def has(key: str) -> bool:
        node: Any = method
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node is not None

    return [f"method={name}", *(f"method.{key}={value}" for key, value in SMALL.items() if has(key))]


def erased(name: str, device: str, folder: Path, *words: str) -> tuple[Any, list[dict[str, float]]]:
    """The backbone after a run of the method, and the losses of its steps."""
    from hydra.utils import instantiate

    from realera import paths
    from realera.runs import steps
    from realera.training.fit import fit
    from realera.training.pairs import encoded_pairs

    config = settings(*small(name), *words, device=device)
    backbone = steps.load_backbone(config)
    task = composition.build_task(config)
    pairs = encoded_pairs(backbone, task)
    trainer = {key: value for key, value in config["trainer"].items() if key != "checkpoint_every"}
    fit(
        backbone,
        instantiate(config["method"]),
        pairs,
        run_dir=folder / "run",
        seed=0,
        config=config,
        trainer=trainer,
        cache=folder / "cache",
        checkpoint_every=1,
    )
    losses = folder / "run" / paths.LOSSES
    rows = [json.loads(line) for line in losses.read_text().splitlines()] if losses.is_file() else []
    return backbone.to(device), rows


@cache
def first_weights() -> dict[str, Tensor]:
    from realera.runs import steps

    return {name: value.detach().clone() for name, value in steps.load_backbone(settings()).denoiser.named_parameters()}


def change(state: dict[str, Tensor]) -> Tensor:
    """What a run changed, as one vector: edited weights less the first ones, and adapters' B, which start at 0."""
    first = first_weights()
    parts = [value - first[key[5:]] for key, value in sorted(state.items()) if key.startswith("edit.")]
    parts += [value for key, value in sorted(state.items()) if key.endswith(".up")]
    return torch.cat([part.double().reshape(-1) for part in parts]) if parts else torch.zeros(1, dtype=torch.float64)


def relative(found: Tensor, reference: Tensor) -> float:
    return float((found.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-12))


def test_states_and_noise_are_the_cpu_s(record: Callable[..., None]) -> None:
    from realera.runs import steps

    here, there = (steps.load_backbone(settings(device=device)) for device in ("cpu", DEVICE))
    states = [backbone.encode(PROMPTS).states for backbone in (here, there)]
    latents = torch.randn(2, here.latent_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        noises = [b.predict_noise(latents, torch.tensor([100, 900]), s) for b, s in zip((here, there), states)]
    text, noise = relative(states[1].cpu(), states[0]), relative(noises[1].cpu(), noises[0])
    record(text=text, noise=noise)
    assert states[1].device.type == DEVICE and text < 1e-5 and noise < 1e-4


def test_images_are_the_cpu_s(record: Callable[..., None]) -> None:
    from realera.runs import steps

    images = [steps.load_backbone(settings(device=d)).generate(PROMPTS, SEEDS).cpu().float() for d in ("cpu", DEVICE)]
    grey = (images[1] - images[0]).abs()
    record(mean_grey=float(grey.mean()), worst_grey=float(grey.max()))
    assert float(grey.mean()) < 0.5


@pytest.mark.parametrize("name", METHODS)
def test_two_steps_of_a_method_are_the_cpu_s(name: str, tmp_path: Path, record: Callable[..., None]) -> None:
    here, expected = erased(name, "cpu", tmp_path / "cpu")
    there, losses = erased(name, DEVICE, tmp_path / "device")
    found, reference = change(there.erased_state()), change(here.erased_state())
    weights = relative(found, reference) if reference.norm() > 0 else float(found.norm())
    pairs = [(one[key], two[key]) for one, two in zip(expected, losses) for key in one if key != "step"]
    loss = max((abs(b - a) / max(abs(a), 1e-8) for a, b in pairs), default=0.0)
    images = [backbone.generate(PROMPTS, SEEDS).cpu().float() for backbone in (here, there)]
    grey = float((images[1] - images[0]).abs().mean())
    record(weights=weights, loss=loss, mean_grey=grey)
    assert len(losses) == len(expected)
    # Adam's first step has the size of the rate and the sign of the gradient, which rounding turns where it is small.
    assert weights < 0.05 and loss < 5e-3 and grey < 1.0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_run_that_is_gone_on_with_ends_alike(precision: str, tmp_path: Path, record: Callable[..., None]) -> None:
    from realera.contracts import UserError

    if precision == "16-mixed" and DEVICE == "cpu":
        pytest.skip("its loss scaler needs a GPU")
    words = ("method.align.steps=4", f"trainer.precision={precision}")
    whole, steps = erased("realera", DEVICE, tmp_path / "whole", *words)
    folder = tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patch:
        from realera.training.losses import LossLines

        told = LossLines.on_train_batch_end

        def stop(self: Any, trainer: Any, *more: Any) -> None:
            told(self, trainer, *more)
            if trainer.global_step == 3:
                raise UserError("cut")

        patch.setattr(LossLines, "on_train_batch_end", stop)
        with pytest.raises(UserError, match="cut"):
            erased("realera", DEVICE, folder, *words)
    resumed, losses = erased("realera", DEVICE, folder, *words)
    weights = relative(change(resumed.erased_state()), change(whole.erased_state()))
    record(weights=weights)
    assert [row["step"] for row in losses] == [row["step"] for row in steps] == [1, 2, 3, 4] and weights < 0.05


def test_what_was_erased_here_is_erased_on_a_cpu(tmp_path: Path, record: Callable[..., None]) -> None:
    from realera.runs import steps
    from realera.training.checkpoint import load_erased

    there, _ = erased("realera", DEVICE, tmp_path)
    here = steps.load_backbone(settings())
    load_erased(tmp_path / "run" / "erased.safetensors", here)
    grey = (there.generate(PROMPTS, SEEDS).cpu().float() - here.generate(PROMPTS, SEEDS).float()).abs()
    record(mean_grey=float(grey.mean()))
    assert float(grey.mean()) < 0.5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_draws_the_same_picture(dtype: str, record: Callable[..., None]) -> None:
    from realera.runs import steps

    words = ("", f"backbone.dtype={dtype}")
    full, half = (
        steps.load_backbone(settings(*filter(None, [word]), device=DEVICE)).generate(PROMPTS, SEEDS).cpu().float()
        for word in words
    )
    grey = float((half - full).abs().mean())
    record(mean_grey=grey)
    assert grey < 12  # of 255: another precision, the same picture


def test_mixed_precision_trains(tmp_path: Path, record: Callable[..., None]) -> None:
    _, full = erased("realera", DEVICE, tmp_path / "full")
    _, mixed = erased("realera", DEVICE, tmp_path / "mixed", "trainer.precision=bf16-mixed")
    apart = max(abs(b["loss"] - a["loss"]) / a["loss"] for a, b in zip(full, mixed))
    record(loss=apart)
    assert 0 < apart < 0.1


def test_the_python_interface_leaves_a_pipeline_on_its_device(record: Callable[..., None]) -> None:
    import realera

    pipe = realera.miniature_pipeline().to(DEVICE)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    erased = realera.erase(pipe, "airplane", method="valera", progress=False)
    changed = {name for name, value in pipe.unet.state_dict().items() if not torch.equal(value, before[name])}
    image = erased.pipe("a photo of the airplane", generator=torch.Generator().manual_seed(0), output_type="np").images[
        0
    ]
    assert erased.pipe.unet.device.type == DEVICE and changed and image.std() > 0
    erased.undo()
    record(undone=float(max((pipe.unet.state_dict()[name] - value).abs().max() for name, value in before.items())))
    assert all(torch.equal(pipe.unet.state_dict()[name], value) for name, value in before.items())


def test_the_judge_says_the_same(tmp_path: Path, record: Callable[..., None]) -> None:
    from PIL import Image

    from realera.contracts import Prompt
    from realera.judges.miniature import MiniatureJudge
    from realera.runs import steps

    files = []
    for name, picture in zip("ab", steps.load_backbone(settings()).generate(PROMPTS, SEEDS)):
        Image.fromarray(picture.numpy()).save(tmp_path / f"{name}.png")
        files.append(tmp_path / f"{name}.png")
    prompts = [Prompt(str(i), text, text.split()[-1], "erase", 0) for i, text in enumerate(PROMPTS)]
    here, there = (MiniatureJudge(device=device)(files, prompts) for device in ("cpu", DEVICE))
    apart = max(abs(one.value - two.value) for one, two in zip(here, there))
    record(probability=apart)
    assert [v.label for v in here] == [v.label for v in there] and apart < 1e-3


def test_one_process_of_ddp_is_the_run_itself(tmp_path: Path, record: Callable[..., None]) -> None:
    """The real commands: NCCL where there is a GPU."""
    from safetensors.torch import load_file

    accelerator = "gpu" if DEVICE == "cuda" else "cpu"
    words = [*small("realera"), "concept=airplane", "backbone=mini", "logger=none"]
    words += ["task.images={erase:2,near:1,keep:1,associated:1,unseen:1}"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    files = []
    for name, start in (("alone", ["-m"]), ("ddp", ["-m", "torch.distributed.run", "--nproc-per-node=1", "-m"])):
        many = ["trainer=ddp", "trainer.devices=1"] if name == "ddp" else []
        done = subprocess.run(
            [
                sys.executable,
                *start,
                "realera.train",
                *words,
                *many,
                f"trainer.accelerator={accelerator}",
                f"run_dir={name}",
            ],
            cwd=tmp_path,
            env={**env, "REALERA_CACHE": str(tmp_path / f"cache-{name}")},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        files.append(load_file(tmp_path / name / "erased.safetensors"))
    weights = relative(change(files[1]), change(files[0]))
    record(weights=weights)
    assert (tmp_path / "ddp" / "report.html").is_file() and weights < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_nan_is_found_on_the_device(dtype: torch.dtype) -> None:
    from realera.files import finite

    fine = torch.linspace(-1, 1, 300_001, device=DEVICE).to(dtype)
    assert finite.first_bad({"fine": fine, "rows": torch.ones(3, device=DEVICE)}) is None
    for place in (0, 150_000, 300_000):
        for bad in (float("nan"), float("inf"), float("-inf")):
            hit = fine.clone()
            hit[place] = bad
            assert finite.first_bad({"fine": fine, "hit": hit}) == "hit"
