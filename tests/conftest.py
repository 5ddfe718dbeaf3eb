"""A tiny Stable Diffusion folder with random weights and real component classes: what most tests run on."""

from __future__ import annotations

import copy
import gc
import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest

import folders
import quick

# One thread for each of pytest's workers, and for what they start. Torch reads these when it is imported: later.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
# A shell may have said to ignore these (nohup, a job in the background): what the tests start must not.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)
# Torch, diffusers and the tests are a million objects that stay: the collector went through them a fifth of the time.
gc.set_threshold(50_000, 50, 50)
# A first call of LAPACK on a busy machine takes longer than any deadline of Hypothesis, and the next one a millisecond.
hypothesis.settings.register_profile("realera", deadline=None)
hypothesis.settings.load_profile("realera")
MOST_WORKERS = 4  # each imports torch for itself: half a gigabyte and ten seconds


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What `-n auto` in pyproject.toml means: a worker a core for the whole suite; none, in this process, for files or
    tests that are named, which are read sooner than a worker is started."""
    if any(Path(word.partition("::")[0]).is_file() for word in config.args):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    quick.take_a_few(items)


def pytest_collection_finish() -> None:
    gc.freeze()


@pytest.fixture(autouse=True)
def published_rates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans use published rates and time nothing, except in tests that are marked `timed`."""
    if request.node.get_closest_marker("timed") is None:
        for name in ("rate_of", "text_rate_of"):
            monkeypatch.setattr(f"realera.runs.timing.{name}", lambda config, device: None)


@pytest.fixture(scope="session")
def official_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The diffusers folder that the results in tests/official were computed from."""
    import official_model

    return official_model.save(tmp_path_factory.mktemp("official") / "sd")


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder: D = 32, T = 77, latents 4 x 8 x 8 for 32 px images, 14 attn2 K/V layers; about 1 MB."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("tiny") / "sd"
    vocab = folders.save_tokenizer(folder / "tokenizer")
    end = vocab["<|endoftext|>"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=32,
            bos_token_id=vocab["<|startoftext|>"],
            eos_token_id=end,
            pad_token_id=end,
        )
        CLIPTextModel(text).save_pretrained(folder / "text_encoder")
        UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
        ).save_pretrained(folder / "unet")
        AutoencoderKL(
            sample_size=32,
            block_out_channels=(8, 8, 8),
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
        ).save_pretrained(folder / "vae")
    folders.save_scheduler(folder, "DDIMScheduler")
    return folders.save_index(folder, "StableDiffusionPipeline", requires_safety_checker=False)


@pytest.fixture(scope="session")
def tiny_judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature judge with random weights that knows the ten classes and the unsafe stand-ins."""
    import torch

    from realera.judges.miniature_net import JudgeConfig, MiniatureCLIP, PlainCNN, save_judge
    from realera.tasks.objects import ObjectTask

    labels = [*ObjectTask("airplane").labels, "gun", "knife", "bomb", "cigarette", "syringe"]
    config = JudgeConfig(
        words=tuple(sorted({"a", "of", "photo", "the", *labels})),
        labels={name: f"a photo of the {name}" for name in labels},
        channels=(8, 8, 12),
        plain_channels=(8, 8, 8),
        width=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("judge")
        save_judge(folder, config, MiniatureCLIP(config), PlainCNN(config))
    return folder


@pytest.fixture(scope="session")
def small(tiny_sd: Path, tiny_judge: Path) -> list[str]:
    """What a door is told to work on the tiny model with few images."""
    return [
        "backbone=mini",
        "backbone.text={width:32,row_norm:5.7,max_length:77}",
        "backbone.sampler.steps=2",
        f"backbone.pretrained={tiny_sd}",
        "task.images={erase:2,near:1,keep:1,associated:1,unseen:1}",
        "judge=miniature",
        f"judge.weights={tiny_judge}",
        "trainer=cpu",
        "logger=none",
    ]


@pytest.fixture(scope="session")
def tiny_sd21(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 2.1 folder (see `folders.build_sd21`)."""
    return folders.build_sd21(tmp_path_factory.mktemp("tiny") / "sd21")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion XL folder (see `folders.build_sdxl`)."""
    return folders.build_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


@pytest.fixture(scope="session")
def tiny_transformers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_transformers("sd3"): a folder (see `folders.TRANSFORMERS`), made once."""
    place = tmp_path_factory.mktemp("transformers")
    return cache(lambda kind: folders.TRANSFORMERS[kind](place / kind))


@pytest.fixture(scope="session")
def new_transformer(tiny_transformers: Callable[[str], Path]) -> Callable[..., Any]:
    """new_transformer("flux"): the backbone of such a folder, with a sampler of two steps; keywords are those of
    `TransformerBackbone`. Each is a copy."""

    @cache
    def loaded(kind: str, settings: tuple[tuple[str, Any], ...]) -> Any:
        from realera.backbones.transformer import TransformerBackbone
        from realera.contracts import Sampler

        given = {"t5": None if kind == "sd3-without-t5" else "float32", "t5_length": 24, **dict(settings)}
        given = dict(settings) if kind == "one-clip" else given
        family = "flux" if kind in ("flux", "schnell") else "sd3"
        scale = {"flux": 3.5, "schnell": 1.0}.get(kind, 5.0)
        sampler = Sampler("euler", 2, scale, 64, 64)
        return TransformerBackbone(kind, tiny_transformers(kind), sampler, [family], **given)

    return lambda kind, **settings: copy.deepcopy(loaded(kind, tuple(settings.items())))


@pytest.fixture(scope="session")
def new_backbone(tiny_sd: Path) -> Callable[..., Any]:
    """new_backbone() is `tiny_sd` as loaded, with a sampler of two steps; keywords are those of `UNetBackbone`. Each is
    a copy: of what was read once, in a third of the time."""

    @cache
    def loaded(settings: tuple[tuple[str, Any], ...]) -> Any:
        from realera.backbones.unet import UNetBackbone
        from realera.contracts import Sampler

        return UNetBackbone(name="mini", pretrained=tiny_sd, sampler=Sampler("ddim", 2, 7.5, 32, 32), **dict(settings))

    return lambda **settings: copy.deepcopy(loaded(tuple(settings.items())))


TRAINING_TEMPLATES = ("a photo of the {}", "a {}", "a big drawing of {}")


@pytest.fixture(scope="session")
def new_pairs() -> Callable[..., list[Any]]:
    """new_pairs(backbone, ("cat", "field"), ...): each concept's training prompts, encoded."""

    def encode(backbone: Any, *concepts: tuple[str, str]) -> list[Any]:
        from realera.contracts import Concept, NamedPrompt, Pair

        def states(word: str) -> Any:
            return backbone.encode([NamedPrompt.of(template, word) for template in TRAINING_TEMPLATES])

        return [Pair(Concept(target, anchor), states(target), states(anchor)) for target, anchor in concepts]

    return encode


# Small enough for a test: settings of conf/method/*.yaml, set where a method has them.
SMALL = {
    "latents.images": 5,
    "latents.chunk": 2,
    "latents.batch": 2,
    "latents.steps": 3,
    "latents.chains": 2,
    "latents.renew": 2,
    "latents.replay.images": 6,
    "latents.attacks": 2,
    "latents.warmup": 1,
    "latents.retained": 2,
    "latents.search.erase_steps": 2,
    "latents.search.invert_steps": 2,
    "latents.search.images.images": 4,
    "latents.search.images.chunk": 2,
    "edit.search.steps": 2,
    "edit.search.images.images": 4,
    "edit.search.images.batch": 2,
    "edit.search.images.chunk": 2,
    "align.eraser.rank": 4,
    "align.fisher.samples": 2,
    "align.fisher.timesteps": 3,
    "align.steps": 4,
    "align.lr": 1e-2,
}


@pytest.fixture(scope="session")
def load_method() -> Callable[..., Any]:
    """load_method("realera", "align.steps=2", ...): conf/method/<name>.yaml, made small, then overridden. backbone: its
    settings that defaults depend on; None = those of the miniature."""

    def load(name: str, *overrides: str, backbone: dict[str, Any] | None = None) -> Any:
        from hydra.utils import instantiate
        from omegaconf import OmegaConf

        from options import check_method, method_settings
        from realera.settings.resolvers import register_resolvers

        register_resolvers()
        method = method_settings(name)
        backbone = backbone or {
            "name": "mini",
            "sampler": {"steps": 2, "guidance_scale": 7.5, "height": 32, "width": 32},
        }
        config = OmegaConf.create({"backbone": backbone, "concept": "cat", "method": method})
        for key, value in SMALL.items():
            if OmegaConf.select(config, f"method.{key}") is not None:
                OmegaConf.update(config, f"method.{key}", value)
        config.merge_with_dotlist([f"method.{override}" for override in overrides])
        settings = OmegaConf.to_container(config.method, resolve=True)
        check_method(settings)
        return instantiate(settings)

    return load
