"""The original layout: names both ways, against diffusers' own reader, and single files as a base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from realera import paths
from realera.backbones import folder, original_layout, portable, single_file, standard
from realera.contracts import UserError
from realera.files import plain_data

TEXT = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2}
# diffusers knows the second encoder of XL by its width, and splits its query, key and value by that of the projection.
SMALL: dict[str, dict[str, dict[str, Any]]] = {  # the standard models with few channels: the same blocks and layers
    "v1": {"text_encoder": TEXT, "unet": {"cross_attention_dim": 32}},
    "v2": {"text_encoder": TEXT, "unet": {"cross_attention_dim": 32, "attention_head_dim": [1, 2, 2, 2]}},
    "xl": {
        "text_encoder": TEXT,
        "text_encoder_2": {**TEXT, "hidden_size": 48, "projection_dim": 48},
        "unet": {
            "cross_attention_dim": 32 + 48,
            "attention_head_dim": [1, 2, 2],
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 48 + 6 * 8,
            "transformer_layers_per_block": [1, 2, 3],
        },
    },
}
CHANNELS = {"unet": {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4, "sample_size": 8}}
CHANNELS["vae"] = {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "sample_size": 64}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Makes the standard models small, and the cache empty."""
    models = {}
    for kind, parts in standard.MODELS.items():
        models[kind] = {
            part: {**config, **CHANNELS.get(part, {}), **SMALL[kind].get(part, {})} for part, config in parts.items()
        }
    models["xl"]["unet"]["block_out_channels"] = [8, 16, 16]
    monkeypatch.setattr(standard, "MODELS", models)
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))
    return tmp_path


def random_parts(kind: str) -> dict[str, dict[str, torch.Tensor]]:
    """Random weights of the (small) standard model, half precision, with the names of a folder."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    parts: dict[str, Any] = {}
    for part, config in standard.MODELS[kind].items():
        if part == "unet":
            parts[part] = UNet2DConditionModel.from_config(config)
        elif part == "vae":
            parts[part] = AutoencoderKL.from_config(config)
        elif part != "scheduler":
            of = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
            parts[part] = of(CLIPTextConfig(**{k: v for k, v in config.items() if k != "model_type"}))
    for model in parts.values():  # biases and norms start as constants, which would hide a wrong name
        for value in model.parameters():
            torch.nn.init.normal_(value)
    return {part: {k: v.half() for k, v in model.state_dict().items()} for part, model in parts.items()}


def written(kind: str, file: Path, **metadata: str) -> dict[str, dict[str, torch.Tensor]]:
    parts = random_parts(kind)
    state = original_layout.from_diffusers(parts, kind)  # type: ignore[arg-type]
    save_file({name: value.contiguous() for name, value in state.items()}, file, metadata)
    return parts


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["v1", "v2", "xl"])
def test_a_single_file_is_unpacked_to_the_weights_it_was_made_of(kind: str, small: Path) -> None:
    parts = written(kind, small / "model.safetensors")
    place = folder.locate(small / "model.safetensors")
    for part, state in parts.items():
        again = portable.part_state(place, part)
        assert again.keys() == {k for k in state if not k.endswith("position_ids")}
        assert all(torch.equal(again[name], state[name]) for name in again)
    assert folder.is_xl(place) == (kind == "xl") and portable.kind_of(place) == kind
    assert portable.is_v_prediction(place) == (kind == "v2")
    before = (place / "unet" / "config.json").stat().st_mtime_ns
    assert folder.locate(small / "model.safetensors") == place  # made once
    assert (place / "unet" / "config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("kind", ["v1", "v2", "xl"])
@pytest.mark.slow
def test_diffusers_reads_the_same_weights_from_the_file(kind: str, small: Path) -> None:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    written(kind, small / "model.safetensors")
    place = folder.locate(small / "model.safetensors")
    of = StableDiffusionXLPipeline if kind == "xl" else StableDiffusionPipeline
    pipe = of.from_single_file(
        str(small / "model.safetensors"), config=str(place), local_files_only=True, torch_dtype=torch.float16
    )
    own = of.from_pretrained(place, local_files_only=True, torch_dtype=torch.float16)
    for part in portable.checkpoint.models(place):
        theirs, ours = getattr(pipe, part).state_dict(), getattr(own, part).state_dict()
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.slow
def test_a_single_file_can_be_erased_and_the_run_names_it(small: Path) -> None:
    import realera

    written("v1", small / "model.safetensors")
    erased = realera.erase(str(small / "model.safetensors"), "Van Gogh", anchor="art", method="uce", task="style")
    assert erased.save(small / "run").joinpath("config.yaml").read_text().count("model.safetensors") >= 1
    made = erased.export("checkpoint", small / "out", verify=0)
    before, after = load_file(small / "model.safetensors"), load_file(made.path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed
    assert all(".attn2.to_k." in name or ".attn2.to_v." in name for name in changed)
    with pytest.raises(UserError, match="already has the map of Van Gogh by uce"):
        realera.apply(str(made.path), erased)


def test_the_record_of_applied_maps_is_in_the_metadata(small: Path) -> None:
    from realera.runs import applying

    record = {"format": applying.FORMAT, "realera": "1", "source": "x", "source_weights": None}
    record |= {"applied": [], "removed": []}
    written("v1", small / "model.safetensors", **{single_file.APPLIED: json.dumps(record)})
    assert applying.read_record(folder.locate(small / "model.safetensors")) == record


@pytest.mark.slow
def test_the_tokenizer_is_clip_s(small: Path) -> None:
    from transformers import CLIPTokenizer

    written("v1", small / "one.safetensors")
    written("xl", small / "xl.safetensors")
    tokenizer = CLIPTokenizer.from_pretrained(folder.locate(small / "one.safetensors") / "tokenizer")
    ids = tokenizer("a photo of an astronaut riding a horse", padding="max_length").input_ids  # known from OpenAI's
    assert ids[:11] == [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 49407, 49407]
    assert tokenizer.pad_token == "<|endoftext|>"
    second = json.loads((folder.locate(small / "xl.safetensors") / "tokenizer_2" / "tokenizer_config.json").read_text())
    assert second["pad_token"] == "!"


@pytest.mark.parametrize(
    ("metadata", "prediction"),
    [({"modelspec.prediction_type": "epsilon"}, "epsilon"), ({"modelspec.prediction_type": "v"}, "v_prediction")],
)
def test_metadata_say_what_the_unet_predicts(metadata: dict[str, str], prediction: str, small: Path) -> None:
    written("v2", small / "model.safetensors", **metadata)
    config = plain_data.read_json(folder.locate(small / "model.safetensors") / "scheduler" / "scheduler_config.json")
    assert config["prediction_type"] == prediction


@pytest.mark.parametrize(
    ("name", "tensors", "sentence"),
    [
        ("model.ckpt", {}, "is a pickle, which can run any code"),
        ("model.txt", {}, "is not a checkpoint"),
        ("lora.safetensors", {"lora_unet_x.lora_down.weight": (2, 2)}, "is a LoRA, not a whole model"),
        ("flux.safetensors", {"double_blocks.0.img_attn.qkv.weight": (2, 2)}, "is a diffusion transformer"),
        ("unet.safetensors", {"model.diffusion_model.input_blocks.0.0.weight": (2, 4, 1, 1)}, "lacks the U-Net, the"),
        (
            "inpainting.safetensors",
            {
                "model.diffusion_model.input_blocks.0.0.weight": (2, 9, 1, 1),
                "first_stage_model.x": (1,),
                "cond_stage_model.transformer.x": (1,),
            },
            "is a model for inpainting",
        ),
    ],
)
def test_other_files_are_refused(name: str, tensors: dict[str, tuple[int, ...]], sentence: str, small: Path) -> None:
    save_file({key: torch.zeros(shape) for key, shape in tensors.items()}, small / name)
    with pytest.raises(UserError, match=sentence):
        folder.locate(small / name)
    assert single_file.folder_of(small / name) is None


def test_a_file_that_lacks_a_weight_is_refused_and_leaves_nothing(small: Path) -> None:
    written("v1", small / "model.safetensors")
    state = load_file(small / "model.safetensors")
    del state["model.diffusion_model.middle_block.1.norm.weight"]
    save_file(state, small / "torn.safetensors")
    with pytest.raises(UserError, match=r"lacks the weight 'model.diffusion_model.middle_block.1.norm.weight'"):
        folder.locate(small / "torn.safetensors")
    assert not list((small / "cache" / single_file.FOLDERS).glob("torn-*"))


LAYER = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda value: value.to(torch.float8_e4m3fn), r"attn2.to_k.weight of its unet as float8_e4m3fn.*not quantised"),
        (lambda value: value.to(torch.int32), r"as int32.*not quantised"),
        (lambda value: value[:, :3], r"in the shape \(8, 3\), and Stable Diffusion 1 has it in \(8, 32\)"),
    ],
)
def test_quantised_and_misshapen_weights_are_refused_before_anything_is_written(
    change: Any, sentence: str, small: Path
) -> None:
    written("v1", small / "model.safetensors")
    state = load_file(small / "model.safetensors")
    state[LAYER] = change(state[LAYER]).contiguous()
    save_file(state, small / "other.safetensors")
    with pytest.raises(UserError, match=sentence):
        folder.locate(small / "other.safetensors")
    assert not list((small / "cache" / single_file.FOLDERS).glob("other-*"))


def test_tensors_of_a_training_run_are_left_out(small: Path) -> None:
    parts = written("v1", small / "model.safetensors")
    more = {"model_ema.decay": torch.zeros(1), "alphas_cumprod": torch.zeros(9), "global_step": torch.zeros(1).int()}
    save_file({**load_file(small / "model.safetensors"), **more}, small / "more.safetensors")
    again = portable.part_state(folder.locate(small / "more.safetensors"), "unet")
    assert again.keys() == parts["unet"].keys()


def test_old_names_of_the_autoencoder_s_attention_are_known() -> None:
    parts = {part: portable.part_state(paths.MINIATURE, part) for part in ("unet", "vae", "text_encoder")}
    today = original_layout.from_diffusers(parts, "v1")
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    vae: dict[str, torch.Tensor] = {}
    for name, value in parts["vae"].items():
        for new, before in old.items() if ".attentions.0." in name else ():
            name = name.replace(new, before)
        vae[name] = value
    again = original_layout.from_diffusers({**parts, "vae": vae}, "v1")
    assert again.keys() == today.keys() and all(torch.equal(again[name], today[name]) for name in today)


def test_a_weight_without_a_place_is_refused() -> None:
    parts = {part: portable.part_state(paths.MINIATURE, part) for part in ("unet", "vae", "text_encoder")}
    parts["unet"]["encoder_hid_proj.weight"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"encoder_hid_proj.*to=diffusers"):
        original_layout.from_diffusers(parts, "v1")
