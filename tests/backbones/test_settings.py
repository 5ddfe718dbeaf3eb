"""Precision, attention, memory layout, compilation and decoding: these settings may change results only by rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from torch import Tensor, nn

from quick import slow_unless
from realera.backbones import denoiser
from realera.backbones.unet import UNetBackbone
from realera.contracts import Edit, LoraSpec, Sampler, UserError

SAMPLERS = {"sd": 32, "sd21": 64, "sdxl": 64}
Load = Callable[..., UNetBackbone]


@pytest.fixture(params=slow_unless(SAMPLERS, "sd", "sdxl"))
def load(request: pytest.FixtureRequest) -> Load:
    """load(**settings): the backbone of one kind with these settings."""
    folder = request.getfixturevalue(f"tiny_{request.param}")
    size = SAMPLERS[request.param]

    def make(**settings: Any) -> UNetBackbone:
        return UNetBackbone(request.param, folder, Sampler("ddim", 2, 5.0, size, size), **settings)

    return make


def noise(backbone: UNetBackbone, count: int = 2) -> Tensor:
    states = backbone.encode(["a photo of a cat", "an airplane"][:count])
    latents = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return backbone.predict_noise(latents, torch.tensor([10, 700])[:count], states.states, states.pooled)


def plain_map(backbone: UNetBackbone) -> Edit:
    drawn = torch.randn(backbone.width, backbone.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Edit(map=torch.eye(backbone.width, dtype=torch.float64) + 0.1 * drawn)


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("attention", "kind"), [("auto", AttnProcessor), ("plain", AttnProcessor), ("sliced", SlicedAttnProcessor)]
)
def test_attention_changes_results_only_by_rounding(load: Load, attention: str, kind: type) -> None:
    expected = noise(reference := load(attention="sdpa"))
    assert {type(p) for p in reference.unet.attn_processors.values()} == {AttnProcessor2_0}
    backbone = load(attention=attention, channels_last=attention == "plain")
    torch.testing.assert_close(noise(backbone), expected, atol=1e-5, rtol=1e-4)
    assert {type(p) for p in backbone.unet.attn_processors.values()} == {kind}
    assert backbone.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last) == (attention == "plain")


def test_large_maps_use_sdpa(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoiser, "SMALL_MAP", 7 * 7)
    noise(backbone := load())
    assert {type(p) for p in backbone.unet.attn_processors.values()} == {AttnProcessor2_0}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", slow_unless(["bfloat16", "float16"], "bfloat16"))
def test_half_precision_gives_nearly_the_same_images(load: Load, dtype: str) -> None:
    exact, half = load(), load(dtype=dtype)
    assert {p.dtype for p in half.unet.parameters()} == {getattr(torch, dtype)}
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32}  # SDXL's is black in float16
    states = half.encode(["a cat"])
    assert states.states.dtype == torch.float32
    expected, found = noise(exact), noise(half)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < (0.05 if dtype == "bfloat16" else 0.005) * expected.norm()
    exact.apply(plain_map(exact))
    half.apply(plain_map(half))
    first, second = (b.generate(["a cat"], [0]).float() for b in (exact, half))
    assert (first - second).abs().mean() < 8


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_only_an_adapter_on_bfloat16_can_be_trained_in_half_precision(load: Load, dtype: str) -> None:
    backbone = load(dtype=dtype)
    with pytest.raises(UserError, match=rf"dtype={dtype} cannot hold the small steps.*dtype=float32"):
        backbone.unfreeze(["attn2.to_k"])
    assert not any(parameter.requires_grad for parameter in backbone.unet.parameters())
    if dtype == "bfloat16":
        assert {p.dtype for p in backbone.add_adapter(LoraSpec(), torch.Generator())} == {torch.float32}
        backbone.remove_adapter()
    else:
        with pytest.raises(UserError, match=r"cannot be trained.*dtype=bfloat16"):
            backbone.add_adapter(LoraSpec(), torch.Generator())
    backbone.apply(plain_map(backbone))  # a closed form needs no gradient
    assert backbone.erased_state()


@pytest.mark.quick(1)
def test_checkpointed_gradients_are_the_same(load: Load) -> None:
    """The teacher runs between forward and backward; recomputed activations must be those of the student."""
    gradients = []
    for backbone in (load(), load(gradient_checkpointing=True)):
        backbone.apply(plain_map(backbone))
        parameters = backbone.add_adapter(LoraSpec(rank=2), torch.Generator().manual_seed(0))
        for parameter in parameters[1::2]:
            parameter.data += 0.1
        calls: list[int] = []
        layer = next(module for name, module in backbone.unet.named_modules() if name.endswith("attn2.to_q"))
        hook = layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        student = noise(backbone)
        with backbone.original():
            teacher = noise(backbone)
        before = len(calls)
        (student - teacher).square().mean().backward()
        gradients.append([p.grad for p in parameters])
        hook.remove()
    assert before == 2 and len(calls) > 2  # the second block was computed again
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)
        assert one is not None and one.any()


# --- compiled --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiling_does_not_change_the_model(tiny_sd: Path) -> None:
    """Edits, adapters, the teacher, gradients and other batch sizes, compiled without code generation."""

    def make(**settings: Any) -> UNetBackbone:
        return UNetBackbone("sd", tiny_sd, Sampler("ddim", 2, 5.0, 32, 32), **settings)

    calls = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward

    torch._dynamo.register_backend(backend, name="counted")
    plain, compiled = make(), make(compile="counted")
    assert not calls
    names = [name for name, _ in plain.unet.named_modules()]
    assert [name for name, _ in compiled.unet.named_modules()] == names

    def agree(count: int = 2) -> None:
        torch.testing.assert_close(noise(compiled, count), noise(plain, count), atol=1e-5, rtol=1e-4)

    agree()
    assert calls
    agree(1)
    before = noise(compiled)
    for backbone in (plain, compiled):
        backbone.apply(plain_map(backbone))
    agree()
    assert not torch.equal(noise(compiled), before)
    gradients = []
    for backbone in (plain, compiled):
        parameters = backbone.add_adapter(LoraSpec(rank=2), torch.Generator().manual_seed(0))
        for parameter in parameters[1::2]:
            parameter.data += 0.1
        noise(backbone).square().mean().backward()
        gradients.append([p.grad for p in parameters])
    agree()
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-3)
    with compiled.original():
        torch.testing.assert_close(noise(compiled), before, atol=1e-5, rtol=1e-4)
    agree()
    assert compiled.erased_state().keys() == plain.erased_state().keys()


def compile_without_hooks(unet: nn.Module, **_: Any) -> Callable[..., Any]:
    """Like torch.compile of a module without hooks: hooks that are added later have no effect."""

    def forward(*args: Any, **more: Any) -> Any:
        kept = [(module._forward_hooks, dict(module._forward_hooks)) for module in unet.modules()]
        for hooks, _ in kept:
            hooks.clear()
        try:
            return unet(*args, **more)
        finally:
            for hooks, before in kept:
                hooks.update(before)

    return forward


def hooked(backbone: UNetBackbone) -> Iterator[Tensor]:
    """Noise predictions with an adapter at 1, 0 and 1, then with a hook on a layer, then without it."""
    trained = backbone.add_adapter(LoraSpec(rank=2), torch.Generator().manual_seed(0))
    for parameter in trained[1::2]:
        parameter.data += 0.1
    yield noise(backbone)
    with backbone.adapter_scale(torch.zeros(1, 1)):
        yield noise(backbone)
    yield noise(backbone)
    layer = next(iter(backbone.text_projections().values()))  # behind an adapter's wrapper, as AC's hooks are on it
    hook = layer.register_forward_hook(lambda layer, inputs, out: 2 * out)
    yield noise(backbone)
    hook.remove()
    yield noise(backbone)


def test_hooks_act_with_a_compiler_that_ignores_them(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", compile_without_hooks)
    sampler = Sampler("ddim", 2, 5.0, 32, 32)
    plain, compiled = (UNetBackbone("sd", tiny_sd, sampler, compile=compile) for compile in (False, "eager"))
    pairs = list(zip(hooked(plain), hooked(compiled), strict=True))
    for wanted, found in pairs:
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(pairs[0][0], pairs[1][0], atol=1e-3)
    assert not torch.allclose(pairs[3][0], pairs[4][0], atol=1e-3)


def test_without_hooks_the_compiled_code_runs(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def compiler(unet: nn.Module, **_: Any) -> Callable[..., Any]:
        return lambda *args, **more: calls.append(1) or unet(*args, **more)

    monkeypatch.setattr(torch, "compile", compiler)
    counts = [len(calls) for _ in hooked(UNetBackbone("sd", tiny_sd, Sampler("ddim", 2, 5.0, 32, 32), compile=True))]
    assert counts == [1, 1, 2, 2, 3]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_hooks_act_when_compiled(tiny_sd: Path) -> None:
    """After a pass without hooks, whose compiled graph would otherwise be reused."""
    sampler = Sampler("ddim", 2, 5.0, 32, 32)
    plain, compiled = (UNetBackbone("sd", tiny_sd, sampler, compile=compile) for compile in (False, "eager"))
    for wanted, found in zip(hooked(plain), hooked(compiled), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_with_generated_code(tiny_sd: Path) -> None:
    sampler = Sampler("ddim", 2, 5.0, 32, 32)
    plain, compiled = (UNetBackbone("sd", tiny_sd, sampler, compile=compile) for compile in (False, True))
    torch.testing.assert_close(noise(compiled), noise(plain), atol=1e-4, rtol=1e-3)


# --- decoding --------------------------------------------------------------------------------------------------------


def test_decoding_one_at_a_time(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    together, single = load(), load(vae_slicing=True)
    sizes: list[int] = []
    for backbone in (together, single):
        decode = backbone.vae.decode

        def spy(part: Tensor, decode: Any = decode, **rest: Any) -> Any:
            sizes.append(len(part))
            return decode(part, **rest)

        monkeypatch.setattr(backbone.vae, "decode", spy)
    images = [backbone.decode(latents).int() for backbone in (together, single)]
    assert sizes == [3, 1, 1, 1]
    assert (images[0] - images[1]).abs().max() <= 1


def test_large_images_are_decoded_fewer_at_once(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load()
    factor, sizes = backbone.pixels_per_latent, []

    def spy(part: Tensor, **_: Any) -> Any:
        sizes.append(len(part))
        return (torch.zeros(len(part), 3, 8, 8),)

    monkeypatch.setattr(backbone.vae, "decode", spy)
    for side, count in ((512, 9), (1024, 5), (4096, 2)):
        backbone.decode(torch.zeros(count, 4, side // factor, side // factor))
    assert sizes == [8, 1, 2, 2, 1, 1, 1]


@pytest.mark.parametrize(("scale", "shift"), slow_unless([(0.18215, None), (0.5, 0.3)], (0.5, 0.3)))
def test_encoding_equals_the_autoencoder_s_mode(load: Load, scale: float, shift: float | None) -> None:
    """The mode of diffusers' distribution, shifted and scaled by its config: the inverse of decoding."""
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    backbones = load(), load(vae_slicing=True)
    for backbone in backbones:
        backbone.vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    found = [backbone.encode_images(images) for backbone in backbones]
    with torch.no_grad():
        mode = backbones[0].vae.encode(images).latent_dist.mode()
    assert torch.equal(found[0], (mode - (shift or 0)) * scale) and not found[0].requires_grad
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(found[0], backbones[0].encode_images(images.double()))
    decoded = backbones[0].vae.decode(mode, return_dict=False)[0]
    eighths = (decoded / 2 + 0.5).clamp(0, 1) * 255
    difference = backbones[0].decode(found[0]).permute(0, 3, 1, 2) - eighths
    assert difference.abs().max() <= 0.51


def test_large_images_are_encoded_one_at_a_time(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, single = load(), load(vae_slicing=True)
    sizes: list[int] = []

    def spy(part: Tensor) -> Any:
        sizes.append(len(part))
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: torch.zeros(len(part), 4, 8, 8)))

    for one in (backbone, single):
        monkeypatch.setattr(one.vae, "encode", spy)
    for side, count in ((512, 9), (1024, 3)):
        backbone.encode_images(torch.zeros(count, 3, side, side))
    single.encode_images(torch.zeros(2, 3, 32, 32))
    assert sizes == [8, 1, 2, 1, 1, 1]


def test_decoding_in_tiles(tiny_sdxl: Path) -> None:
    sampler = Sampler("ddim", 1, 1.0, 128, 128)
    whole = UNetBackbone("sdxl", tiny_sdxl, sampler)
    tiled = UNetBackbone("sdxl", tiny_sdxl, sampler, vae_tiling=True)
    images = [backbone.generate(["a cat"], [0]) for backbone in (whole, tiled)]
    assert images[1].shape == (1, 128, 128, 3) and not torch.equal(*images)
    assert (images[0].float() - images[1].float()).abs().mean() < 16
