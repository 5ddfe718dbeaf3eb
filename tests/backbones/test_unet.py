from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from realera.backbones.unet import UNetBackbone
from realera.contracts import Backbone, Edit, LoraSpec, Sampler, UserError

SAMPLER = Sampler("ddim", steps=2, guidance_scale=3.0, height=32, width=32)
LORA = LoraSpec(rank=2, alpha=3.0)


@pytest.fixture
def backbone(tiny_sd: Path) -> UNetBackbone:
    return UNetBackbone("tiny", tiny_sd, SAMPLER)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 32, generator=generator)
    return x, torch.tensor([10, 700]), states


def some_map(seed: int = 0) -> Tensor:
    noise = torch.randn(32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.eye(32, dtype=torch.float64) + 0.3 * noise


def trained_adapter(backbone: UNetBackbone, spec: LoraSpec = LORA) -> list[torch.nn.Parameter]:
    """An adapter whose B is no longer zero."""
    generator = torch.Generator().manual_seed(5)
    parameters = backbone.add_adapter(spec, generator)
    for parameter in parameters[1::2]:
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return parameters


def weights(backbone: UNetBackbone) -> dict[str, Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in backbone.text_projections().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- loading ---------------------------------------------------------------------------------------------------------


def test_a_new_backbone_is_frozen(backbone: UNetBackbone) -> None:
    role: Backbone = backbone
    assert isinstance(role, Backbone)
    assert (backbone.width, backbone.max_length, backbone.sampler) == (32, 77, SAMPLER)
    modules = (backbone.unet, backbone.vae, backbone.text.model)
    assert not any(module.training or p.requires_grad for module in modules for p in module.parameters())


def test_float16_files_become_float32(tiny_sd: Path, tmp_path: Path) -> None:
    """The miniature ships in float16; a float16 text encoder would fail on a CPU."""
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "sd"))
    for file in folder.rglob("*.safetensors"):
        save_file({key: value.half() for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float16", "torch_dtype": "float16"}))
    backbone = UNetBackbone("tiny", folder, SAMPLER)
    kinds = {p.dtype for module in (backbone.unet, backbone.vae, backbone.text.model) for p in module.parameters()}
    assert kinds == {torch.float32}
    assert backbone.generate(["a cat"], [0]).shape == (1, 32, 32, 3)


def test_missing_weights_are_refused(tiny_sd: Path, tmp_path: Path) -> None:
    parts = (("unet", "diffusion_pytorch_model", ""), ("text_encoder", "model", ""))
    for part, name, of in (*parts, ("vae", "diffusion_pytorch_model", "encoder.")):  # images are encoded by it
        folder = Path(shutil.copytree(tiny_sd, tmp_path / part))
        file = folder / part / f"{name}.safetensors"
        state = load_file(file)
        lost = next(key for key in state if key.startswith(of) and key.endswith("weight"))
        save_file({key: value for key, value in state.items() if key != lost}, file, metadata={"format": "pt"})
        with pytest.raises(
            UserError, match=rf"{part}.* lacks? (1 weights|conv_in|\w*\.?token_embedding|position_embedding)"
        ):
            UNetBackbone("tiny", folder, SAMPLER)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float8"}, "float32, bfloat16, float16"),
        ({"attention": "flash"}, "auto, sdpa, plain, sliced"),
        ({"compile": "gcc"}, r"compile='gcc' is not known; give false, true, or one of .*eager"),
        ({"text": {"width": 768}}, r"backbone\.text\.width is 768 but the checkpoint has 32"),
        ({"text": {"max_length": 32}}, "max_length=77"),
        ({"sampler": Sampler("ddim", 2, 3.0, 30, 32)}, "multiples of 4"),
    ],
)
def test_bad_settings(tiny_sd: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        UNetBackbone(**{"name": "tiny", "pretrained": tiny_sd, "sampler": SAMPLER, **settings})  # type: ignore[arg-type]


def test_parts_that_do_not_fit_together_are_refused(tiny_sd: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "sd"))
    shutil.rmtree(folder / "unet")
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel(
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=16,
        attention_head_dim=2,
    ).save_pretrained(folder / "unet")
    with pytest.raises(UserError, match="width 32 and its U-Net reads 16"):
        UNetBackbone("tiny", folder, SAMPLER)


def test_no_pooled_state(backbone: UNetBackbone, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="no pooled"):
        backbone.predict_noise(*inputs, pooled=torch.zeros(2, 4))


# --- edits -----------------------------------------------------------------------------------------------------------


def test_cross_attention_is_every_key_and_value_in_order(backbone: UNetBackbone) -> None:
    layers = backbone.text_projections()
    wanted = [n for n, _ in backbone.unet.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))]
    assert list(layers) == wanted and len(wanted) == 14
    trained_adapter(backbone)
    assert all(backbone.text_projections()[name] is layer for name, layer in layers.items())
    assert all(type(layer) is torch.nn.Linear for layer in layers.values())


def test_a_map_is_applied_in_float64_and_maps_compose(backbone: UNetBackbone) -> None:
    before, first, second = weights(backbone), some_map(0), some_map(1)
    untouched = {n: p.clone() for n, p in backbone.unet.named_parameters() if ".attn2.to_" not in n or ".to_q" in n}
    backbone.apply(Edit(map=first))
    once = weights(backbone)
    backbone.apply(Edit(map=second))
    for name, weight in weights(backbone).items():
        assert torch.equal(once[name], (before[name].double() @ first).float())
        assert torch.equal(weight, (once[name].double() @ second).float())
    assert all(torch.equal(p, untouched[n]) for n, p in backbone.unet.named_parameters() if n in untouched)
    with backbone.original():
        assert same(weights(backbone), before)


def test_a_map_on_weights_equals_a_map_on_states(backbone: UNetBackbone, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, states = inputs
    expected = backbone.predict_noise(x, t, (states.double() @ some_map().T).float())
    backbone.apply(Edit(map=some_map()))
    torch.testing.assert_close(backbone.predict_noise(x, t, states), expected, atol=1e-4, rtol=1e-4)


def test_an_edit_with_given_weights(backbone: UNetBackbone) -> None:
    before = weights(backbone)
    name = list(before)[3]
    backbone.apply(Edit(weights={name: torch.zeros_like(before[name])}))
    after = weights(backbone)
    assert not after.pop(name).any()
    before.pop(name)
    assert same(after, before)
    backbone.apply(Edit())  # an edit of nothing
    assert list(backbone.erased_state()) == [f"edit.{name}.weight"]


def test_edits_that_do_not_fit_change_nothing(backbone: UNetBackbone) -> None:
    before = weights(backbone)
    good = next(iter(before))
    with pytest.raises(UserError, match=r"'mid.*does not have; it has: down_blocks.*14 in all"):
        backbone.apply(Edit(weights={good: torch.zeros_like(before[good]), "mid": torch.zeros(1)}))
    with pytest.raises(UserError, match="backbone it was made with"):
        backbone.apply(Edit(weights={good: torch.zeros(2, 2)}))
    with pytest.raises(UserError, match="width 32"):
        backbone.apply(Edit(map=torch.eye(16, dtype=torch.float64)))
    with pytest.raises(ValueError, match="not both"):
        backbone.apply(Edit(map=some_map(), weights={good: before[good]}))
    assert same(weights(backbone), before) and backbone.erased_state() == {}


# --- the original model ----------------------------------------------------------------------------------------------


@pytest.fixture
def changed(backbone: UNetBackbone) -> Iterator[UNetBackbone]:
    """A backbone with an edit, an adapter and changed weights."""
    backbone.apply(Edit(map=some_map()))
    trained_adapter(backbone)
    for parameter in backbone.unfreeze(["conv_out", "attn1.to_q"]):
        parameter.data = parameter.data + 0.1
    yield backbone


def test_original_is_the_model_as_loaded(
    tiny_sd: Path, changed: UNetBackbone, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    fresh = UNetBackbone("tiny", tiny_sd, SAMPLER).predict_noise(*inputs)
    now = changed.predict_noise(*inputs)
    flags = [p.requires_grad for p in changed.unet.parameters()]
    with changed.original():
        assert torch.equal(changed.predict_noise(*inputs), fresh)
        with changed.original():
            assert torch.equal(changed.predict_noise(*inputs), fresh)
        assert torch.equal(changed.predict_noise(*inputs), fresh)  # the inner context restored nothing too early
    assert torch.equal(changed.predict_noise(*inputs), now) and (now - fresh).abs().max() > 0.01
    assert [p.requires_grad for p in changed.unet.parameters()] == flags


def test_original_restores_the_weights_after_an_exception(
    changed: UNetBackbone, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    now = changed.predict_noise(*inputs)
    with pytest.raises(KeyboardInterrupt), changed.original():
        raise KeyboardInterrupt
    assert torch.equal(changed.predict_noise(*inputs), now)
    changed.apply(Edit(map=some_map()))  # the context counts as left


def test_teacher_between_forward_and_backward(changed: UNetBackbone, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    trained = [p for p in changed.unet.parameters() if p.requires_grad]

    def gradients(teach: bool) -> list[Tensor]:
        student = changed.predict_noise(*inputs)
        if teach:
            with changed.original():
                assert not changed.predict_noise(*inputs).requires_grad
        return list(torch.autograd.grad(student.square().mean(), trained))

    assert all(map(torch.equal, gradients(False), gradients(True)))
    assert all(gradient.any() for gradient in gradients(True))


def test_teacher_under_a_trainers_autocast(
    tiny_sd: Path, changed: UNetBackbone, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Student and teacher in one autocast region, as in a trainer: they must not share half-precision copies."""
    fresh = UNetBackbone("tiny", tiny_sd, SAMPLER)
    trained = [p for p in changed.unet.parameters() if p.requires_grad]
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            changed.predict_noise(*inputs)
        student = changed.predict_noise(*inputs)
        with changed.original():
            teacher = changed.predict_noise(*inputs)
        assert torch.equal(teacher, fresh.predict_noise(*inputs).detach())
    assert student.dtype == teacher.dtype == torch.float32
    gradients = torch.autograd.grad((student - teacher).square().mean(), trained)
    assert all(gradient.any() for gradient in gradients)


def test_text_and_images_stay_float32_under_autocast(backbone: UNetBackbone) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    states, image = backbone.encode(["a cat"]).states, backbone.decode(latents)
    back = backbone.encode_images(image.permute(0, 3, 1, 2) / 255)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(backbone.encode_images(image.permute(0, 3, 1, 2) / 255), back)
        assert torch.equal(backbone.encode(["a cat"]).states, states)
        assert torch.equal(backbone.decode(latents), image)


def test_weights_cannot_be_changed_inside_original(changed: UNetBackbone) -> None:
    for act in (
        lambda: changed.apply(Edit(map=some_map())),
        lambda: changed.load_erased({}),
        lambda: changed.add_adapter(LORA, torch.Generator()),
        lambda: changed.unfreeze(["attn2"]),
        changed.merge_adapter,
        changed.remove_adapter,
        changed.erased_state,
    ):
        with changed.original(), pytest.raises(RuntimeError, match="inside original"):
            act()


# --- adapters --------------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_changes_nothing(backbone: UNetBackbone, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    before = backbone.predict_noise(*inputs)
    parameters = backbone.add_adapter(LORA, torch.Generator().manual_seed(0))
    assert torch.equal(backbone.predict_noise(*inputs), before)
    assert len(parameters) == 28
    assert parameters == [p for p in backbone.unet.parameters() if p.requires_grad]
    downs, ups = parameters[::2], parameters[1::2]
    assert all(p.shape == (2, 32) for p in downs) and not any(p.any() for p in ups)


def test_adapter_adds_alpha_over_rank_b_a(backbone: UNetBackbone) -> None:
    trained_adapter(backbone)
    state = backbone.erased_state()
    states = torch.randn(3, 32)
    for name, base in backbone.text_projections().items():
        down, up = state[f"lora.{name}.down"], state[f"lora.{name}.up"]
        expected = states @ base.weight.T + 3.0 / 2 * states @ down.T @ up.T
        torch.testing.assert_close(backbone.unet.get_submodule(name)(states), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("init", "std"), [("gaussian", 1 / 4), ("kaiming", (1 / 32 / 3) ** 0.5)])
def test_distribution_of_a(backbone: UNetBackbone, init: str, std: float) -> None:
    """gaussian: N(0, 1 / rank^2); kaiming: U(-1/sqrt(in), 1/sqrt(in)), PEFT's default. Only the generator is used."""
    torch.manual_seed(0)
    world = torch.random.get_rng_state()
    spec = LoraSpec(rank=4, init=init)  # type: ignore[arg-type]
    draws = []
    for seed in (0, 0, 1):
        found = backbone.add_adapter(spec, torch.Generator().manual_seed(seed))
        draws.append(torch.cat([p.detach().flatten() for p in found[::2]]))
        backbone.remove_adapter()
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert draws[0].std().item() == pytest.approx(std, rel=0.1) and abs(draws[0].mean()) < std / 5
    assert (draws[0].abs().max() > 2 * std) == (init == "gaussian")
    assert torch.equal(torch.random.get_rng_state(), world)


def test_targets_match_by_suffix(backbone: UNetBackbone) -> None:
    backbone.add_adapter(LoraSpec(targets=("attn2.to_out.0", "conv_in")), torch.Generator())
    names = {key.split(".")[-3] + "." + key.split(".")[-2] for key in backbone.erased_state() if key.endswith("up")}
    assert names == {"to_out.0", "lora.conv_in"}
    backbone.remove_adapter()
    with pytest.raises(UserError, match=r"'attn3\.to_k' matched 0 layers of backbone tiny; it has: attn1\.to_k.*attn2"):
        backbone.add_adapter(LoraSpec(targets=("attn2.to_k", "attn3.to_k")), torch.Generator())
    with pytest.raises(UserError, match="matched 0 layers"):
        backbone.add_adapter(LoraSpec(targets=("o_k",)), torch.Generator())  # whole parts only
    with pytest.raises(UserError, match="no targets"):
        backbone.add_adapter(LoraSpec(targets=()), torch.Generator())
    with pytest.raises(UserError, match="rank 0"):
        backbone.add_adapter(LoraSpec(rank=0), torch.Generator())
    with pytest.raises(UserError, match="gaussian or kaiming"):
        backbone.add_adapter(LoraSpec(init="xavier"), torch.Generator())  # type: ignore[arg-type]
    assert not any(key.startswith("lora") for key in backbone.erased_state())


def test_one_adapter_at_a_time(backbone: UNetBackbone) -> None:
    backbone.add_adapter(LORA, torch.Generator())
    with pytest.raises(RuntimeError, match="merge_adapter"):
        backbone.add_adapter(LORA, torch.Generator())


def test_bfloat16_base_keeps_float32_adapters(tiny_sd: Path, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    backbone = UNetBackbone("tiny", tiny_sd, SAMPLER, dtype="bfloat16")
    exact = UNetBackbone("tiny", tiny_sd, SAMPLER)
    parameters = trained_adapter(backbone)
    trained_adapter(exact)
    for model in (backbone, exact):
        model.apply(Edit(map=some_map()))
    assert {p.dtype for p in parameters} == {torch.float32}
    assert {
        p.dtype
        for p in backbone.text_projections()["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"].parameters()
    } == {torch.bfloat16}
    out, wanted = backbone.predict_noise(*inputs), exact.predict_noise(*inputs)
    assert out.dtype == torch.float32
    assert (out - wanted).norm() < 0.03 * wanted.norm()
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0)
    before = [p.detach().clone() for p in parameters]
    out.square().mean().backward()
    optimizer.step()
    moved = [(p - old).abs() for p, old in zip(parameters, before, strict=True)]
    assert all((m > 0.5e-5).float().mean() > 0.9 for m in moved)  # steps too small for bfloat16 are not lost
    assert backbone.generate(["a cat"], [0]).dtype == torch.uint8


def test_merging_changes_images_only_by_rounding(
    changed: UNetBackbone, tiny_sd: Path, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    before, plain = changed.predict_noise(*inputs), weights(UNetBackbone("tiny", tiny_sd, SAMPLER))
    changed.merge_adapter()
    torch.testing.assert_close(changed.predict_noise(*inputs), before, atol=1e-5, rtol=1e-4)
    state = changed.erased_state()
    assert state and all(key.startswith("edit.") for key in state)
    assert not any("lora" in name or "base_layer" in name for name, _ in changed.unet.named_modules())
    with changed.original():
        assert same(weights(changed), plain)
    fresh = UNetBackbone("tiny", tiny_sd, SAMPLER)
    fresh.load_erased(state)
    assert torch.equal(fresh.predict_noise(*inputs), changed.predict_noise(*inputs))
    trained_adapter(changed)  # another adapter can be added


def test_merging_a_convolution(backbone: UNetBackbone, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    trained_adapter(backbone, LoraSpec(rank=2, targets=("conv_in", "conv1")))
    before = backbone.predict_noise(*inputs)
    backbone.merge_adapter()
    torch.testing.assert_close(backbone.predict_noise(*inputs), before, atol=1e-5, rtol=1e-4)


def test_unfreeze(backbone: UNetBackbone) -> None:
    found = backbone.unfreeze(["attn2.to_k", "conv_out", "attn2.to_k"])
    assert found == [p for p in backbone.unet.parameters() if p.requires_grad] and len(found) == 7 + 2
    assert backbone.erased_state() == {}  # nothing has moved yet
    found[0].data += 1
    assert len(backbone.erased_state()) == 1
    with pytest.raises(UserError, match=r"'attn3' matched 0 weights.*mid_block"):
        backbone.unfreeze(["attn2", "attn3"])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, nullcontext])
def test_a_backbone_made_in_inference_mode_can_be_trained(
    backbone: UNetBackbone, inputs: tuple[Tensor, Tensor, Tensor], mode: type
) -> None:
    with mode():
        backbone.apply(Edit(map=some_map()))
        parameters = backbone.add_adapter(LORA, torch.Generator()) + backbone.unfreeze(["attn2.to_v"])
    backbone.predict_noise(*inputs).square().mean().backward()
    torch.optim.SGD(parameters, lr=0.1).step()
    assert all(p.grad is not None for p in parameters)
    with backbone.original():
        backbone.predict_noise(*inputs)


# --- saving ----------------------------------------------------------------------------------------------------------


def test_saving_and_loading_is_exact_bit_for_bit(changed: UNetBackbone, tiny_sd: Path, tmp_path: Path) -> None:
    state = changed.erased_state()
    layer = next(iter(changed.text_projections()))
    for key in (
        f"edit.{layer}.weight",
        f"lora.{layer}.down",
        f"lora.{layer}.up",
        f"lora.{layer}.alpha",
        "edit.conv_out.bias",
    ):
        assert key in state
    assert len(state) == 14 + 14 * 3 + 2 + 7
    assert not any("base_layer" in key for key in state)
    save_file(state, tmp_path / "erased.safetensors")
    fresh = UNetBackbone("tiny", tiny_sd, SAMPLER)
    plain = fresh.generate(["a cat"], [0])
    fresh.load_erased(load_file(tmp_path / "erased.safetensors"))
    assert same(fresh.erased_state(), state)
    images = fresh.generate(["a cat", "a dog"], [0, 1])
    assert torch.equal(images, changed.generate(["a cat", "a dog"], [0, 1]))
    assert not torch.equal(images[:1], plain)
    with fresh.original():
        assert torch.equal(fresh.generate(["a cat"], [0]), plain)
    assert not any(p.requires_grad for p in fresh.unet.parameters())  # peft would switch it on with the adapters


def test_loading_replaces_an_earlier_erasure(changed: UNetBackbone, backbone: UNetBackbone, tiny_sd: Path) -> None:
    fresh = UNetBackbone("tiny", tiny_sd, SAMPLER)
    plain = fresh.generate(["a cat"], [0])
    fresh.apply(Edit(map=some_map(3)))
    state = fresh.erased_state()
    changed.load_erased(state)
    assert same(changed.erased_state(), state)
    changed.load_erased({})
    assert changed.erased_state() == {} and torch.equal(changed.generate(["a cat"], [0]), plain)


def test_erased_state_is_a_copy(changed: UNetBackbone) -> None:
    state = changed.erased_state()
    kept = {key: value.clone() for key, value in state.items()}
    changed.apply(Edit(map=some_map(7)))
    for parameter in changed.unet.parameters():
        parameter.data += 1
    assert same(state, kept)


def test_states_of_another_model_are_refused(changed: UNetBackbone) -> None:
    state = changed.erased_state()
    layer = next(iter(changed.text_projections()))
    down = state[f"lora.{layer}.down"]
    bad: list[tuple[dict[str, Tensor], str]] = [
        (state | {"weights": down}, "neither an edit nor an adapter"),
        (state | {"edit.nothing.weight": down}, "has no weight"),
        (state | {f"edit.{layer}.weight": down}, "backbone it was made with"),
        (state | {"lora.nothing.down": down, "lora.nothing.up": down}, "does not have"),
        (state | {f"lora.{layer}.down": torch.zeros(2, 5)}, "backbone it was trained on"),
        (state | {f"lora.{layer}.down": torch.zeros(3, 32)}, "mix LoRA ranks"),
        ({key: value for key, value in state.items() if key != f"lora.{layer}.up"}, "lack"),
    ]
    for other, message in bad:
        with pytest.raises(UserError, match=message):
            changed.load_erased(other)
        assert changed.erased_state() == {}  # the original, and nothing in between
        changed.load_erased(state)
        assert same(changed.erased_state(), state)


def test_a_file_without_alpha_has_scale_one(backbone: UNetBackbone, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    trained_adapter(backbone, LoraSpec(rank=2, alpha=2.0))
    out = backbone.predict_noise(*inputs)
    backbone.load_erased({key: v for key, v in backbone.erased_state().items() if not key.endswith("alpha")})
    assert torch.equal(backbone.predict_noise(*inputs), out)


# --- devices ---------------------------------------------------------------------------------------------------------


def test_parked_parts_come_back(backbone: UNetBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU nothing moves, so the calls of `to` are checked."""
    asked: list[str] = []
    monkeypatch.setattr(backbone.vae, "to", lambda device: asked.append(f"vae {device}"))
    monkeypatch.setattr(backbone.text.model, "to", lambda device: asked.append(f"text {device}"))
    assert backbone.to("cpu") is backbone
    backbone.park()
    assert sorted(asked) == ["text cpu", "vae cpu"]
    del asked[:]
    backbone.encode(["a cat"])
    backbone.decode(torch.zeros(1, 4, 8, 8))
    backbone.encode_images(torch.zeros(1, 3, 32, 32))
    assert asked == ["text cpu", "vae cpu", "vae cpu"]


# --- negative prompts and progress -----------------------------------------------------------------------------------


def test_a_negative_prompt_takes_the_place_of_the_empty_one(backbone: UNetBackbone) -> None:
    texts, seeds = ["a cat", "a dog"], [1, 2]
    plain = backbone.generate(texts, seeds)
    assert torch.equal(plain, backbone.generate(texts, seeds, negative=""))
    away = backbone.generate(texts, seeds, negative="a truck")
    assert not torch.equal(plain, away)
    backbone._empty = {"loaded": backbone.encode(["a truck"])}  # as if the model's empty prompt were this text
    assert torch.equal(away, backbone.generate(texts, seeds))


def test_each_step_is_told_before_it_begins_and_can_end_the_sampling(backbone: UNetBackbone) -> None:
    told: list[tuple[int, int]] = []
    backbone.generate(["a cat"], [1], each_step=lambda step: told.append((step, backbone.passes)))
    assert told == [(0, 0), (1, 2)], "two passes a step: with guidance"

    def stop(step: int) -> None:
        raise KeyError(step)

    with pytest.raises(KeyError):
        backbone.generate(["a cat"], [1], each_step=stop)
    assert backbone.passes == 4
