"""ComfyUI and A1111 know every tensor of an export, and miss none: against their own rules.

Neither installs from a package registry, so `client_keys.json` states their rules, each with its source. The names that
follow from them are spelled out here without realera's own tables, for the whole standard models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from realera.backbones import original_layout, portable, standard
from realera.contracts import UserError

RULES: dict[str, Any] = json.loads(Path(__file__).with_name("client_keys.json").read_text(encoding="utf-8"))
KINDS: tuple[original_layout.Kind, ...] = ("v1", "v2", "xl")
BOTH = ("weight", "bias")


def unet_of(model: Mapping[str, Any]) -> dict[str, str]:
    """{name in the original layout: name in diffusers} of all tensors of a U-Net."""
    rules, made = RULES["unet"], {}

    def both(there: str, here: str) -> None:
        made.update({f"{there}.{end}": f"{here}.{end}" for end in BOTH})

    def residual(there: str, here: str, shortcut: bool) -> None:
        for own, other in {**rules["residual"], **(rules["shortcut"] if shortcut else {})}.items():
            both(f"{there}.{own}", f"{here}.{other}")

    def attention(there: str, here: str, depth: int) -> None:
        for own in rules["attention"]:
            both(f"{there}.{own}", f"{here}.{own}")
        for at in (f"transformer_blocks.{number}" for number in range(depth)):
            for own in rules["block"]:
                both(f"{there}.{at}.{own}", f"{here}.{at}.{own}")
            made.update({f"{there}.{at}.{n}.weight": f"{here}.{at}.{n}.weight" for n in rules["block_without_bias"]})

    for there, here in {**rules["ends"], **(rules["added"] if model["added"] else {})}.items():
        both(there, here)
    widths, blocks, depths = model["multipliers"], model["res_blocks"], model["depth"]
    block, before = 1, 1
    for level, (width, depth) in enumerate(zip(widths, depths)):
        for number in range(blocks):
            residual(f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{number}", width != before)
            if depth:
                attention(f"input_blocks.{block}.1", f"down_blocks.{level}.attentions.{number}", depth)
            block, before = block + 1, width
        if level < len(widths) - 1:
            both(f"input_blocks.{block}.0.op", f"down_blocks.{level}.downsamplers.0.conv")
            block += 1
    residual("middle_block.0", "mid_block.resnets.0", False)
    attention("middle_block.1", "mid_block.attentions.0", model["middle_depth"])
    residual("middle_block.2", "mid_block.resnets.1", False)
    block = 0
    for level, depth in enumerate(reversed(depths)):
        for number in range(blocks + 1):
            residual(f"output_blocks.{block}.0", f"up_blocks.{level}.resnets.{number}", True)
            if depth:
                attention(f"output_blocks.{block}.1", f"up_blocks.{level}.attentions.{number}", depth)
            if number == blocks and level < len(depths) - 1:
                both(f"output_blocks.{block}.{2 if depth else 1}.conv", f"up_blocks.{level}.upsamplers.0.conv")
            block += 1
    return made


def vae_names() -> Iterator[str]:
    rules = RULES["vae"]
    widths = rules["multipliers"]
    modules = list(rules["between"])
    for half, name, sampler, blocks in (
        ("encoder", "down", "downsample", rules["res_blocks"]),
        ("decoder", "up", "upsample", rules["res_blocks"] + 1),
    ):
        modules += [f"{half}.{own}" for own in rules["ends"]]
        modules += [f"{half}.mid.block_{number}.{own}" for number in (1, 2) for own in rules["residual"]]
        modules += [f"{half}.mid.attn_1.{own}" for own in rules["attention"]]
        inputs = [1, *widths[:-1]] if half == "encoder" else [*widths[1:], widths[-1]]
        for level, width in enumerate(widths):
            at = f"{half}.{name}.{level}"
            modules += [f"{at}.block.{number}.{own}" for number in range(blocks) for own in rules["residual"]]
            modules += [f"{at}.block.0.{rules['shortcut']}"] if inputs[level] != width else []
            last = len(widths) - 1 if half == "encoder" else 0  # of the levels, as they are run
            modules += [f"{at}.{sampler}.conv"] if level != last else []
    return (f"{module}.{end}" for module in modules for end in BOTH)


def text_names(text: Mapping[str, Any]) -> Iterator[str]:
    rules = RULES[text["code"]]
    yield from rules["once"]
    for layer in (f"{rules['layer']}{number}." for number in range(text["layers"])):
        yield from (f"{layer}{own}.{end}" for own in rules["of_a_layer"] for end in BOTH)
        if "joined" in rules:
            yield from (f"{layer}{rules['joined']}{end}" for end in BOTH)
    if text.get("projected"):
        yield rules["projection"]


def expected(kind: str) -> set[str]:
    """All tensor names of a checkpoint that a client reads."""
    model, prefixes = RULES["models"][kind], RULES["prefixes"]
    names = {prefixes["unet"] + name for name in unet_of(model)} | {prefixes["vae"] + name for name in vae_names()}
    return names.union(*({text["prefix"] + name for name in text_names(text)} for text in model["text"]))


def whole(kind: str) -> dict[str, dict[str, Tensor]]:
    """The standard model in full size, without memory: {part: state} with diffusers' names."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    found: dict[str, dict[str, Tensor]] = {}
    with torch.device("meta"):
        for part, config in standard.MODELS[kind].items():
            model: Any = None
            if part == "unet":
                model = UNet2DConditionModel.from_config(config)
            elif part == "vae":
                model = AutoencoderKL.from_config(config)
            elif part != "scheduler":
                of = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
                model = of(CLIPTextConfig(**{key: value for key, value in config.items() if key != "model_type"}))
            if model is not None:
                found[part] = dict(model.named_parameters())
    return found


@pytest.fixture(scope="module", params=KINDS)
def standard_model(request: pytest.FixtureRequest) -> tuple[original_layout.Kind, dict[str, dict[str, Tensor]]]:
    return request.param, whole(request.param)


Standard = tuple[original_layout.Kind, dict[str, dict[str, Tensor]]]


def test_every_rule_names_its_source() -> None:
    for source in RULES["sources"].values():
        assert set(source) == {"repository", "file", "commit", "rule"} and all(source.values())
        assert re.fullmatch(r"[0-9a-f]{40}", source["commit"])


def test_a_checkpoint_has_the_names_that_clients_read_and_no_others(standard_model: Standard) -> None:
    kind, parts = standard_model
    made = original_layout.from_diffusers(parts, kind)
    assert set(made) == expected(kind)
    table = unet_of(RULES["models"][kind])
    ours = original_layout.unet_names(parts["unet"])
    assert ours == {here: RULES["prefixes"]["unet"] + there for there, here in table.items()}


def test_comfyui_and_a1111_find_out_which_model_a_checkpoint_is(standard_model: Standard) -> None:
    """By the shapes that they look at; all other marks are names, which the test above compares."""
    kind, parts = standard_model
    model, made = RULES["models"][kind], original_layout.from_diffusers(parts, kind)
    unet = {name.removeprefix("model.diffusion_model."): value.shape for name, value in made.items()}
    assert unet["input_blocks.0.0.weight"][:2] == (model["channels"], 4) and unet["out.2.weight"][0] == 4
    widths = [unet[name][0] for name in unet if re.fullmatch(r"input_blocks\.\d+\.0\.out_layers\.3\.weight", name)]
    blocks = model["res_blocks"]
    assert widths == [model["channels"] * width for width in model["multipliers"] for _ in range(blocks)]
    attends = [name for name in unet if name.startswith("input_blocks.") and name.endswith("0.attn2.to_k.weight")]
    assert {unet[name][1] for name in attends} == {model["context"]}
    projections = {len(unet[name]) for name in unet if name.endswith("1.proj_in.weight")}
    assert projections == {2 if model["linear"] else 4}
    assert (unet["label_emb.0.0.weight"][1] if model["added"] else None) == model["added"]
    for text in model["text"]:
        joined = made.get(f"{text['prefix']}transformer.resblocks.0.attn.in_proj_weight")
        assert (joined is not None) == (text["code"] == "open_clip")
        if joined is not None:
            assert joined.shape == (3 * text["width"], text["width"])
    # what A1111 looks for first decides, so a mark of another kind must not be there
    assert ("conditioner.embedders.1.model.ln_final.weight" in made) == (kind == "xl")
    assert ("cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight" in made) == (kind == "v2")
    assert "conditioner.embedders.0.model.ln_final.weight" not in made  # the refiner


# --- LoRA ------------------------------------------------------------------------------------------------------------


def a1111(key: str) -> str:
    """The module's name that A1111 looks for, by its first rule that fits."""
    name = key.removeprefix("lora_unet_")
    residual = {here: there.replace(".", "_") for there, here in RULES["unet"]["residual"].items()}
    residual |= {here: there for there, here in RULES["unet"]["shortcut"].items()}
    for rule in RULES["a1111_lora"]:
        if found := re.fullmatch(rule["key"], name):
            groups = found.groups()
            first, *factors = rule.get("n", [0])
            number = first + sum(int(group) * factor for group, factor in zip(groups, factors))
            rest = groups[-1] if groups else ""
            return str(rule["is"]).format(n=number, rest=rest, residual=residual.get(rest, rest))
    return name


def comfyui(model: Mapping[str, Any]) -> dict[str, str]:
    """{the name of a layer in a LoRA file: its tensor}."""
    made = {}
    for there, here in unet_of(model).items():
        if there.endswith(".weight"):
            for name in (there, here):
                made[f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"] = there
    return made


def layers_of(unet: Mapping[str, Tensor]) -> list[str]:
    """The layers that a LoRA can change: all but norms."""
    return [
        name.removesuffix(".weight") for name, value in unet.items() if name.endswith(".weight") and value.dim() > 1
    ]


def test_both_find_every_layer_of_a_kohya_file(standard_model: Standard) -> None:
    kind, parts = standard_model
    model = RULES["models"][kind]
    tensors = {here: there for there, here in unet_of(model).items()}
    modules = {there.rpartition(".")[0].replace(".", "_") for there in tensors.values()}
    known, names = comfyui(model), portable.lora_names(parts["unet"], "kohya", kind)
    layers = layers_of(parts["unet"])
    assert len(layers) == len({names[layer] for layer in layers}) > 250
    for layer in layers:
        there = tensors[f"{layer}.weight"]
        assert known[names[layer]] == there
        assert a1111(names[layer]) in modules, layer
        assert a1111(names[layer]) == there.removesuffix(".weight").replace(".", "_")


def test_a1111_would_leave_layers_of_xl_out_under_diffusers_names() -> None:
    """The reason why a kohya file of XL has the original layout's names."""
    unet = whole("xl")["unet"]
    modules = {name.rpartition(".")[0].replace(".", "_") for name in unet_of(RULES["models"]["xl"])}
    left = {layer for layer in layers_of(unet) if a1111(layer.replace(".", "_")) not in modules}
    assert left == {"add_embedding.linear_1", "add_embedding.linear_2", "up_blocks.0.upsamplers.0.conv"}


def change_of(unet: Mapping[str, Tensor]) -> portable.Lora:
    """A LoRA of rank 1 of every layer that one can have."""
    generator = torch.Generator().manual_seed(0)
    made: portable.Lora = {}
    for layer in layers_of(unet):
        shape = unet[f"{layer}.weight"].shape
        down, up = torch.randn(1, *shape[1:], generator=generator), torch.randn(shape[0], 1, generator=generator)
        made[layer] = (down, 0.01 * (up[:, :, None, None] if len(shape) == 4 else up))
    return made


@pytest.mark.parametrize("style", ["kohya", "lora"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_files_have_the_tensors_that_clients_read_and_diffusers_takes_them_all(
    kind: original_layout.Kind, style: str, tmp_path: Path, tiny_sd: Path, tiny_sd21: Path, tiny_sdxl: Path
) -> None:
    from diffusers import DiffusionPipeline

    place = {"v1": tiny_sd, "v2": tiny_sd21, "xl": tiny_sdxl}[kind]
    assert portable.kind_of(place) == kind
    base = portable.base_denoiser(place)
    lora, names = change_of(base), portable.lora_names(base, style, kind)
    portable.save_lora(lora, tmp_path / "file.safetensors", style, None, {}, names)
    with safe_open(tmp_path / "file.safetensors", "pt") as reader:
        keys = set(reader.keys())
    ends = ("lora_up.weight", "lora_down.weight", "alpha") if style == "kohya" else ("lora_A.weight", "lora_B.weight")
    assert keys == {f"{names[layer]}.{end}" for layer in lora for end in ends}
    pipe: Any = DiffusionPipeline.from_pretrained(place, torch_dtype=torch.float32)
    pipe.load_lora_weights(str(tmp_path), weight_name="file.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = dict(pipe.unet.named_parameters())
    changes = portable.read_lora(tmp_path / "file.safetensors", style, names)
    assert set(changes) == {f"{layer}.weight" for layer in lora}
    for name, change in changes.items():
        assert torch.allclose(fused[name], (base[name].double() + change).float(), atol=1e-5), name


def test_a_u_net_that_the_original_layout_lacks_is_refused_as_a_kohya_file_of_xl() -> None:
    with pytest.raises(UserError, match="the original layout"):
        portable.lora_names(["strange.0.weight"], "kohya", "xl")
    assert portable.lora_names(["strange.0.weight"], "lora", "xl") == {"strange.0": "unet.strange.0"}
