"""The memory that a plan names: counted from headers, from published settings, and from loaded models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from realera import console
from realera.backbones import standard
from realera.paths import CONF_DIR
from realera.runs import estimate, weights_memory
from realera.runs.weights_memory import PUBLISHED, Precision, Sizes
from realera.settings.run_settings import BackboneSettings

KINDS = {"sd3": 96, "sd3-without-t5": 96, "flux": 64, "one-clip": 32}
SD3 = {  # transformer/config.json of Stable Diffusion 3 medium
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
SD35 = {**SD3, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))


def backbone_of(name: str, **own: Any) -> BackboneSettings:
    node: Any = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "backbone" / f"{name}.yaml"))
    return BackboneSettings({**node, **own})


def said(name: str, trains_weights: bool = False, **own: Any) -> str:
    return " ".join(weights_memory.sentences(backbone_of(name, **own), trains_weights))


def test_flux_does_not_fit_on_24_gb_and_the_plan_says_which_settings_make_it_fit() -> None:
    words = "backbone.offload=sequential backbone.t5=int8"
    assert "34.2 GB of the GPU" in said("flux-dev") and f"With {words}: 6.5 GB." in said("flux-dev")
    assert "about 34 GB, once" in said("flux-dev")
    small = said("flux-dev", offload="sequential", t5="int8")
    assert "6.5 GB of the GPU" in small and "one block at a time 0.8" in small and "With" not in small
    assert "With backbone.t5=int8: 6.5 GB." in said("flux-dev", offload="sequential")


def test_trained_weights_stay_in_float32_on_the_gpu() -> None:
    assert "With backbone.dtype=bfloat16 backbone.offload=sequential backbone.t5=int8:" in said("sd35-medium")
    assert "With backbone.t5=int8:" in said("sd35-medium", trains_weights=True)


def test_a_model_without_t5_and_a_small_model() -> None:
    assert "text encoders 3.3" in said("sd35-medium", t5=False) and "t5=" not in said("sd35-medium", t5=False)
    assert "U-Net in float32 10.3" in said("sdxl") and "With backbone.dtype=bfloat16: 8.7 GB." in said("sdxl")
    assert "With" not in said("sd14") and said("mini") == said("mini-dit") == ""
    own = BackboneSettings({**backbone_of("flux-dev").node, "name": "of-my-own"})
    assert weights_memory.sentences(own, False) == [], "its size is not known"


def test_a_damaged_folder_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "own" / "unet").mkdir(parents=True)
    assert said("sd14", pretrained=str(tmp_path / "own")) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_headers_say_what_the_loaded_model_has(
    kind: str, tiny_transformers: Callable[[str], Path], new_transformer: Callable[..., Any]
) -> None:
    sizes = weights_memory.of_folder(tiny_transformers(kind))
    backbone = new_transformer(kind)
    network = {**dict(backbone.network.named_parameters()), **backbone.network.state_dict()}
    assert sizes.denoiser == sum(one.numel() for one in network.values())
    assert sizes.vae == sum(one.numel() for one in backbone.vae.parameters())
    texts = [model for name, model in backbone._changed_text.network.named_children()]
    assert sizes.clip + sizes.t5 == sum(one.numel() for model in texts for one in model.parameters())
    assert (sizes.t5 > 0) == (kind in ("sd3", "flux"))


def test_a_block_on_the_gpu_is_what_offloading_loads(tiny_transformers: Callable[[str], Path]) -> None:
    sizes = weights_memory.of_folder(tiny_transformers("flux"))
    whole, part = (Precision("float32", "bfloat16", one).gigabytes(sizes)[0] for one in (False, True))
    assert 0 < part < whole


def test_int8_takes_the_bytes_that_quantising_leaves(new_transformer: Callable[..., Any]) -> None:
    backbone = new_transformer("flux", t5="int8")
    model = backbone.text.t5.model
    stored = [*model.parameters(), *model.buffers()]
    weights = sum(one.numel() * one.element_size() for one in stored if one.ndim == 2 and one.shape[-1] > 1)
    tokens = model.get_input_embeddings().weight.numel()
    linear = sum(one.numel() for one in model.buffers() if str(one.dtype) == "torch.int8")
    own = Sizes(0, 0, 0, t5=linear + tokens, t5_tokens=tokens)
    assert Precision("bfloat16", "int8", False).gigabytes(own)[1] * 1e9 == pytest.approx(weights, rel=0.02)


def test_the_plan_prints_the_sentences_once_and_does_not_save_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = estimate.Work(images=1, passes_per_image=1.0, needs=("memory: 34 GB", "download: 34 GB"))
    plan = estimate.summed([cell, cell])
    estimate.show(plan, tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("memory: 34 GB") == printed.count("download: 34 GB") == 1
    assert "needs" not in json.loads((tmp_path / "plan.json").read_text())
    console.show_plan(asdict(estimate.summed([estimate.Work()])))
    assert "memory" not in capsys.readouterr().out


def test_a_rate_names_the_offloading_that_it_does_not_contain() -> None:
    rate = estimate._published(backbone_of("flux-dev", offload="sequential"), "gpu")
    assert rate is not None and "without offloading" in rate.source and "bfloat16" in rate.source
    usual = estimate._published(backbone_of("flux-dev"), "gpu")
    assert usual is not None and usual.seconds == rate.seconds and "offloading" not in usual.source


@pytest.mark.slow
def test_published_sizes_are_those_of_the_published_settings() -> None:
    """The classes are built without memory."""
    import torch
    from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    def count(model: Any) -> int:
        return sum(one.numel() for one in model.state_dict().values())

    def resident(model: Any) -> int:
        blocks = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]
        return count(model) - sum(map(count, blocks)) + max(map(count, blocks))

    def clip(part: str, kind: str, projected: bool = False) -> int:
        config = CLIPTextConfig(**{**standard.MODELS[kind][part], "projection_dim": 1280 if "2" in part else 768})
        model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
        return sum(one.numel() for one in model.parameters())

    with torch.device("meta"):
        for name, kind in (("sd14", "v1"), ("sd21", "v2"), ("sdxl", "xl")):
            config = standard.MODELS[kind]
            assert PUBLISHED[name].denoiser == count(UNet2DConditionModel.from_config(config["unet"])), name
            assert PUBLISHED[name].vae == count(AutoencoderKL.from_config(config["vae"])), name
        large, small = clip("text_encoder_2", "xl", True), clip("text_encoder", "xl")
        assert PUBLISHED["sd14"].clip == small and PUBLISHED["sdxl"].clip == small + large
        assert PUBLISHED["sd21"].clip == clip("text_encoder", "v2")
        assert PUBLISHED["sd3-medium"].clip == clip("text_encoder", "xl", True) + large
        for name, made in (
            ("sd3-medium", SD3Transformer2DModel(**SD3)),
            ("sd35-medium", SD3Transformer2DModel(**SD35)),
            ("flux-dev", FluxTransformer2DModel(guidance_embeds=True)),
        ):
            assert (PUBLISHED[name].denoiser, PUBLISHED[name].resident) == (count(made), resident(made)), name
        vae = {**standard.MODELS["v1"]["vae"], "latent_channels": 16, "use_quant_conv": False}
        flow = AutoencoderKL.from_config({**vae, "use_post_quant_conv": False})
        assert PUBLISHED["flux-dev"].vae == PUBLISHED["sd3-medium"].vae == count(flow)
        config = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
        t5 = T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **config))
        assert PUBLISHED["flux-dev"].t5 == sum(one.numel() for one in t5.parameters())
        assert PUBLISHED["flux-dev"].t5_tokens == t5.get_input_embeddings().weight.numel()
