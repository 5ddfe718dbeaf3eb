"""Stable Diffusion 3 and FLUX on small folders with random weights, beside diffusers' own pipelines."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from torch import Tensor

from folders import copied
from quick import slow_unless
from realera.backbones import mmdit, reading
from realera.backbones.sampling import start_noise
from realera.backbones.transformer import TransformerBackbone
from realera.backbones.unet import UNetBackbone
from realera.contracts import KEYS, VALUES, Backbone, Course, Edit, LoraSpec, NamedPrompt, Read, Sampler, UserError
from realera.methods.sld import SafetyGuidance

KINDS = ("sd3", "sd3-without-t5", "flux", "schnell")
TEXTS, SEEDS = ["a photo of a cat", "an airplane in the sky"], [3, 8]
STEPS, LENGTH = 3, 24
Make = Callable[..., TransformerBackbone]


def drawn_by_diffusers(folder: Path, backbone: TransformerBackbone, dtype: torch.dtype) -> Tensor:
    """Latents (2, 16, 8, 8) of diffusers' pipeline. In bfloat16 only the transformer is, as in this package."""
    flux = backbone.flux
    without = {} if (folder / "text_encoder_3").is_dir() or flux else {"text_encoder_3": None, "tokenizer_3": None}
    kind = FluxPipeline if flux else StableDiffusion3Pipeline
    pipe: Any = kind.from_pretrained(folder, torch_dtype=torch.float32, **without)
    noise = start_noise(SEEDS, (16, 8, 8))
    scale = backbone.sampler.guidance_scale
    kept = {"num_inference_steps": STEPS, "height": 64, "width": 64, "guidance_scale": scale, "output_type": "latent"}
    device: Any = "cpu"
    with torch.no_grad():
        if flux:
            states, pooled, _ = pipe.encode_prompt(TEXTS, None, device, max_sequence_length=LENGTH)
            given = {"prompt_embeds": states, "pooled_prompt_embeds": pooled}
            noise = mmdit.packed(noise)
        else:
            found = pipe.encode_prompt(TEXTS, TEXTS, TEXTS, device, max_sequence_length=LENGTH)
            names = [f"{sign}{kind}prompt_embeds" for kind in ("", "pooled_") for sign in ("", "negative_")]
            given = dict(zip(names, found))
    given = {name: value.to(dtype) for name, value in given.items() if value is not None}
    pipe.transformer.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    latents: Tensor = pipe(**given, latents=noise.to(dtype), max_sequence_length=LENGTH, **kept).images.float()
    return mmdit.unpacked(latents, 4, 4) if flux else latents


@pytest.mark.quick(2)
@pytest.mark.parametrize("kind", KINDS)
def test_images_are_those_of_diffusers(kind: str, new_transformer: Make, tiny_transformers: Any) -> None:
    backbone = new_transformer(kind)
    sampler = Sampler("euler", STEPS, backbone.sampler.guidance_scale, 64, 64)
    own = backbone.sample(backbone.encode(TEXTS), SEEDS, sampler)
    theirs = drawn_by_diffusers(tiny_transformers(kind), backbone, torch.float32)
    torch.testing.assert_close(own, theirs, atol=2e-4, rtol=1e-4)
    images = backbone.decode(own)
    assert images.shape == (2, 64, 64, 3) and torch.equal(images, backbone.generate(TEXTS, SEEDS, sampler))


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["sd3", "flux", "schnell"])
def test_images_in_bfloat16(kind: str, new_transformer: Make, tiny_transformers: Any) -> None:
    """diffusers also rounds the latents between the steps, so they agree to bfloat16's eight bits."""
    backbone = new_transformer(kind, dtype="bfloat16")
    sampler = Sampler("euler", STEPS, backbone.sampler.guidance_scale, 64, 64)
    own = backbone.sample(backbone.encode(TEXTS), SEEDS, sampler)
    theirs = drawn_by_diffusers(tiny_transformers(kind), backbone, torch.bfloat16)
    exact = new_transformer(kind).sample(backbone.encode(TEXTS), SEEDS, sampler)
    apart = (own - theirs).norm() / theirs.norm()
    assert apart < 0.02 and apart < 2 * (theirs - exact).norm() / exact.norm() + 1e-3


def test_a_negative_prompt_leads_away(new_transformer: Make) -> None:
    backbone = new_transformer("sd3")
    plain = backbone.generate(TEXTS, SEEDS)
    assert not torch.equal(plain, backbone.generate(TEXTS, SEEDS, negative="a dog"))
    with pytest.raises(UserError, match="negative prompt has no effect"):
        new_transformer("flux").generate(TEXTS, SEEDS, negative="a dog")


def test_another_course(new_transformer: Make) -> None:
    """Half of the way again, from the latents there, gives the same image; DDIM's eta is refused."""
    backbone = new_transformer("sd3")
    texts = backbone.encode(TEXTS)
    seen: list[int] = []

    def change(step: int, latents: Tensor) -> Tensor:
        seen.append(step)
        return latents

    whole = backbone.sample(texts, SEEDS, course=Course(change=change))
    assert seen == [0, 1, 2]
    half = backbone.sample(texts, SEEDS, stop_at=1)
    torch.testing.assert_close(backbone.sample(texts, SEEDS, course=Course(latents=half, first=1)), whole)
    with pytest.raises(UserError, match="eta=1 is a setting of DDIM"):
        backbone.sample(texts, SEEDS, course=Course(eta=1.0))


def test_tokens_for_attacks(new_transformer: Make) -> None:
    one = new_transformer("one-clip")
    assert one.token_embeddings().shape[1] == 32 and one.text_of(one.token_ids(["a cat"])[0]) == "a cat"
    assert new_transformer("flux").token_ids(["a cat"]) and new_transformer("flux").writable_tokens()
    with pytest.raises(UserError, match="no single embedding"):
        new_transformer("flux").token_embeddings()


@pytest.mark.parametrize("kind", slow_unless(["sd3", "flux"], "flux"))
def test_a_guide_gets_velocities(kind: str, new_transformer: Make) -> None:
    """SLD step by step, with one pass for each text."""
    backbone = new_transformer(kind)
    sampler = backbone.sampler
    guide = SafetyGuidance("cat", strength="max", steps=sampler.steps)
    found = backbone.sample(backbone.encode(TEXTS), SEEDS, guide=guide)
    again = SafetyGuidance("cat", strength="max", steps=sampler.steps)
    texts = [backbone.encode(read) for read in (["", ""], TEXTS, ["cat", "cat"])]
    z = start_noise(SEEDS, (16, 8, 8))
    sigmas = [*backbone.timesteps().tolist(), 0.0]
    scale = 1.0 if kind == "flux" else sampler.guidance_scale
    for step, (now, after) in enumerate(pairwise(sigmas)):
        with torch.no_grad():
            u, p, s = (backbone.predict_noise(z, torch.full((2,), now), t.states, t.pooled) for t in texts)
        z = z + (after - now) * again(u, p, s[None], z, step, scale)
    torch.testing.assert_close(found, z, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(found, backbone.sample(backbone.encode(TEXTS), SEEDS), atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_levels_and_targets(kind: str, new_transformer: Make) -> None:
    backbone = new_transformer(kind)
    sigmas = backbone.timesteps()
    assert sigmas[0] == 1 and bool((sigmas.diff() < 0).all()) and bool((sigmas > 0).all())
    drawn = backbone.draw_timesteps(4000, torch.Generator().manual_seed(0))
    assert 0 < float(drawn.min()) < float(drawn.max()) <= 1
    shift = {"sd3": 3.0, "sd3-without-t5": 3.0, "schnell": 1.0}.get(kind, backbone._schedule.shift(backbone.sampler))
    assert abs(float(drawn.median()) - shift / (1 + shift)) < 0.02  # sigma(1/2)
    levels = backbone.timesteps_at(torch.tensor([0.0, 0.5, 0.999]))
    assert 0 < levels[0] < 0.01 and levels[1] == pytest.approx(shift / (1 + shift)) and levels[2] > 0.99
    x, noise = torch.randn(2, 2, 16, 8, 8, generator=torch.Generator().manual_seed(1)).unbind(0)
    z = backbone.noisy_latents(x, noise, torch.tensor([0.25, 1.0]))
    torch.testing.assert_close(z[0], 0.75 * x[0] + 0.25 * noise[0])
    assert torch.equal(z[1], noise[1]) and torch.equal(backbone.target_of(x, noise, levels[:2]), noise - x)


def test_the_shift_grows_with_the_image(new_transformer: Make) -> None:
    """FLUX dev at 1024 pixels: 4096 tokens, mu = 1.15; at 256 pixels: 256 tokens, mu = 0.5."""
    schedule = new_transformer("flux")._schedule
    shifts = [schedule.shift(Sampler("euler", 4, 3.5, side, side)) for side in (256, 1024)]
    assert shifts == pytest.approx([2.718281828**0.5, 2.718281828**1.15], rel=1e-6)


# --- text ------------------------------------------------------------------------------------------------------------


def test_rows_of_two_encoders_are_marked(new_transformer: Make) -> None:
    backbone = new_transformer("sd3")
    texts = backbone.encode([NamedPrompt.of("a photo of the {}", "fire truck"), "a cat"])
    clip, t5 = texts.encoders()
    assert (clip.start, clip.stop, clip.begins, t5.start, t5.stop, t5.begins) == (0, 77, 1, 77, 77 + LENGTH, 0)
    named = NamedPrompt.of("a photo of the {}", "fire truck")
    tokenizer = backbone.text.t5.tokenizer  # type: ignore[attr-defined]
    ids = tokenizer(named.text)["input_ids"]
    read = tokenizer.decode(ids[int(t5.first[0]) - 77 : int(t5.last[0]) - 77 + 1])
    assert read.strip() == "fire truck" and int(t5.end[0]) == 77 + len(ids) - 1
    assert [int(t5.first[1]), int(clip.first[1])] == [-1, -1]
    assert texts.constant() == [0] and texts.varying() == [*range(1, 77 + LENGTH)]
    without = new_transformer("sd3-without-t5").encode(["a cat"])
    assert without.varying() == [*range(1, 77)] and not without.states[0, 77:].any()
    assert new_transformer("flux").encode(["a cat"]).constant() == []


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_name_that_t5_cuts_is_refused(kind: str, new_transformer: Make) -> None:
    backbone = new_transformer(kind, t5_length=6)
    with pytest.raises(UserError, match="cut at 6 tokens of T5"):
        backbone.check_not_truncated([NamedPrompt.of("a photo of a big red {}", "cat")])
    backbone.check_not_truncated([NamedPrompt.of("a {}", "cat")])


def test_t5_in_eight_bits(new_transformer: Make) -> None:
    exact, small = (new_transformer("flux", t5=precision).encode(TEXTS).states for precision in ("float32", "int8"))
    apart = (small - exact).norm() / exact.norm()
    assert 0 < apart < 0.05
    backbone = new_transformer("flux", t5="int8")
    model = backbone.text.t5.model  # type: ignore[attr-defined]
    assert {name.rpartition(".")[2] for name, value in model.named_buffers() if value.dtype == torch.int8} == {"weight"}


def test_the_fingerprint_knows_the_text(new_transformer: Make) -> None:
    marks = {
        new_transformer("flux", t5=t5, t5_length=rows).fingerprint
        for t5, rows in (("float32", LENGTH), ("bfloat16", LENGTH), ("int8", LENGTH), ("float32", LENGTH + 1))
    }
    assert len(marks) == 4
    assert new_transformer("sd3").fingerprint != new_transformer("sd3", t5=False).fingerprint


def test_one_clip_is_read_as_the_miniatures(new_transformer: Make) -> None:
    """Its last states, and the end-of-text row as the pooled state; vectors can replace a name."""
    backbone = new_transformer("one-clip")
    prompt = NamedPrompt.of("a photo of the {}", "cat")
    texts = backbone.encode([prompt])
    assert texts.parts is None and texts.constant() == [0]
    assert texts.pooled is not None and torch.equal(texts.pooled[0], texts.states[0, int(texts.length[0])])
    again = backbone.encode([prompt], vectors=backbone.token_vectors("cat"))
    torch.testing.assert_close(again.states, texts.states)
    assert backbone.generate(TEXTS, SEEDS).shape == (2, 64, 64, 3)
    with pytest.raises(UserError, match="different numbers of tokens"):
        new_transformer("sd3").encode([prompt], vectors=torch.zeros(1, 96))


def test_t5_that_is_left_out_is_zeros(new_transformer: Make) -> None:
    left_out = new_transformer("sd3", t5=False)
    assert left_out.text.t5 is None and not left_out.encode(TEXTS).states[:, 77:].any()  # type: ignore[attr-defined]


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_map_edits_the_one_layer_and_is_undone(kind: str, new_transformer: Make) -> None:
    backbone = new_transformer(kind)
    assert isinstance(backbone, Backbone)
    reads: list[Read] = ["keys", "values", "both"]
    assert [list(backbone.text_projections(read)) for read in reads] == [["context_embedder"]] * 3
    first = {key: value.clone() for key, value in backbone.network.state_dict().items()}
    map = torch.eye(backbone.width, dtype=torch.float64) * 0.5
    for suffixes in ((KEYS,), (VALUES,), (KEYS, VALUES)):
        backbone.apply(Edit(map=map, projections=suffixes))
        now = backbone.network.state_dict()
        changed = {key for key in first if not torch.equal(first[key], now[key])}
        assert changed == {"context_embedder.weight"}
        assert torch.equal(now["context_embedder.weight"], first["context_embedder.weight"] * 0.5)
        with backbone.original():
            assert torch.equal(
                backbone.network.state_dict()["context_embedder.weight"], first["context_embedder.weight"]
            )
        backbone.load_erased({})
        assert all(torch.equal(first[key], value) for key, value in backbone.network.state_dict().items())


def test_targets_may_have_wildcards(new_transformer: Make) -> None:
    backbone = new_transformer("flux")
    spec = LoraSpec(targets=("add_k_proj", "single_transformer_blocks.*.attn.to_k"))
    assert len(backbone.add_adapter(spec, torch.Generator())) == 2 * 4
    backbone.remove_adapter()
    names = {id(p): name for name, p in backbone.network.named_parameters()}
    trained = {names[id(p)] for p in backbone.unfreeze(["add_*"])}
    assert trained and all(".add_" in name for name in trained)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", slow_unless(["sd3", "flux"], "flux"))
def test_the_first_blocks_reading_is_its_jacobian(kind: str, new_transformer: Make) -> None:
    """Beside autograd through the block's norm and projection, row by row."""
    backbone = new_transformer(kind)
    network: Any = backbone.network
    (found,) = backbone.text_readers("values")
    gram = torch.zeros(backbone.width, backbone.width, dtype=torch.float64)
    texts = backbone.encode(list(reading.CAPTIONS))
    network.double()
    block, rows = network.transformer_blocks[0], texts.varying()
    count = 0
    for level in reading.LEVELS:
        sigma = 1000 * backbone.timesteps_at(torch.tensor([level])).double()
        for caption in range(len(reading.CAPTIONS)):
            given = [sigma, texts.pooled[caption : caption + 1].double()]  # type: ignore[index]
            if kind == "flux":
                given.insert(1, torch.tensor([3500.0]).double())
            emb = network.time_text_embed(*given).detach()

            def values(row: Tensor, emb: Tensor = emb) -> Tensor:
                normed = block.norm1_context(network.context_embedder(row)[None, None], emb=emb)[0]
                out: Tensor = block.attn.add_v_proj(normed)[0, 0]
                return out

            for row in rows[:: len(rows) // 3]:
                jacobian = torch.autograd.functional.jacobian(values, texts.states[caption, row].double())
                gram += jacobian.T @ jacobian
                count += 1
    whole, sampled = found.T @ found, gram / count
    similar = (whole * sampled).sum() / whole.norm() / sampled.norm()
    assert similar > 0.95 and 0.7 < whole.trace() / sampled.trace() < 1.4  # a third of the rows


def test_a_single_rows_reading_is_exact() -> None:
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(3, 12, generator=draw, dtype=torch.float64) * 2 + 1
    projection = torch.randn(5, 12, generator=draw, dtype=torch.float64)
    total = torch.zeros(12, 12, dtype=torch.float64)
    for row in h:
        jacobian = torch.autograd.functional.jacobian(
            lambda x: projection @ torch.nn.functional.layer_norm(x, (12,), eps=1e-6), row
        )
        total += jacobian.T @ jacobian / len(h)
    centred = h - h.mean(dim=1, keepdim=True)
    variance = centred.square().mean(dim=1, keepdim=True) + 1e-6
    found = reading._gram_through_norm(projection.T @ projection, centred / variance.sqrt(), variance)
    torch.testing.assert_close(found, total, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", slow_unless(["sd3", "flux"], "flux"))
def test_other_readings(kind: str, new_transformer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    (embedder,) = new_transformer(kind, reading="embedder").text_readers()
    assert torch.equal(embedder, new_transformer(kind).network.state_dict()["context_embedder.weight"])
    monkeypatch.setattr(reading, "CAPTIONS", reading.CAPTIONS[:2])  # each takes passes of the network
    every = new_transformer(kind, reading="all").text_readers()
    assert len(every) == {"sd3": 3, "flux": 4}[kind]
    assert all(
        reader.shape == (embedder.shape[1],) * 2 and reader.isfinite().all() and reader.any() for reader in every
    )
    assert len(new_transformer(kind, reading="all").text_readers("both")) == 2 * len(every)


# --- offloading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", slow_unless(["sd3", "flux"], "flux"))
def test_offloaded_blocks_give_the_same_images_and_gradients(
    kind: str, new_transformer: Make, tiny_transformers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of a block's weights stands for those on a GPU: one block's at a time, and none after the pass."""
    away: list[set[int]] = []

    def load(self: mmdit.BlockOffload, number: int, *call: Any) -> None:
        for parameter, home in zip(self.parameters[number], self.homes[number]):
            parameter.data = home.clone()
        away.append(gone(self))

    def gone(offload: mmdit.BlockOffload) -> set[int]:
        both = zip(offload.parameters, offload.homes)
        return {i for i, (own, home) in enumerate(both) if own[0].data_ptr() != home[0].data_ptr()}

    monkeypatch.setattr(mmdit.BlockOffload, "_load", load)
    plain, like = new_transformer(kind), [kind]
    given: dict[str, Any] = {"t5": "float32", "t5_length": LENGTH, "offload": "sequential"}
    offloaded = TransformerBackbone(kind, tiny_transformers(kind), plain.sampler, like, **given)
    one, other = (backbone.generate(TEXTS, SEEDS).int() for backbone in (plain, offloaded))
    assert int((one - other).abs().max()) <= 1, "on some CPUs the copies' place in memory changes how they round"
    assert offloaded._offload is not None
    assert away and all(len(blocks) == 1 for blocks in away) and not gone(offloaded._offload)
    gradients = []
    for backbone in (plain, offloaded):
        spec = LoraSpec(targets=("add_v_proj",))
        weights = backbone.add_adapter(spec, torch.Generator().manual_seed(0))
        texts = backbone.encode(TEXTS)
        z = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(2))
        backbone.predict_noise(z, torch.tensor([0.3, 0.8]), texts.states, texts.pooled).square().mean().backward()
        gradients.append([weight.grad for weight in weights])
    for one, other in zip(*gradients):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other)
    with pytest.raises(UserError, match="offload=sequential"):
        offloaded.unfreeze(["add_v_proj"])


def test_an_offloaded_network_moves_without_its_blocks(new_transformer: Make) -> None:
    """A move to another dtype goes the same way as one to another device."""
    backbone = new_transformer("flux", offload="sequential")
    backbone.add_adapter(LoraSpec(targets=("add_v_proj",)), torch.Generator().manual_seed(0))
    torch.nn.Module.to(backbone.network, torch.float64)
    dtypes = {name: p.dtype for name, p in backbone.network.named_parameters()}
    kept = {name for name in dtypes if "transformer_blocks" in name and "lora_" not in name}
    assert kept and {dtypes[name] for name in kept} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if name not in kept} == {torch.float64}


# --- refusals --------------------------------------------------------------------------------------------------------

EULER = Sampler("euler", 2, 3.5, 64, 64)


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        ("flux", {"t5": False}, "reads its text through T5 alone"),
        ("sd3-without-t5", {"t5": "int8"}, "t5=int8 has no effect"),
        ("flux", {"like": ["sd3"]}, "choose backbone=flux-dev"),
        ("sd3", {"like": ["flux"]}, "choose backbone=sd35-medium"),
        ("sd3", {"sampler": Sampler("ddim", 2, 3.5, 64, 64)}, "choose euler"),
        ("flux", {"sampler": Sampler("euler", 2, 3.5, 72, 64)}, "multiples of 16"),
        ("flux", {"text": {"width": 4096}}, "backbone.text.width is 4096 but the checkpoint has 64"),
    ],
)
def test_settings_that_cannot_be(kind: str, settings: dict[str, Any], says: str, tiny_transformers: Any) -> None:
    given = {"sampler": EULER, "like": [kind.partition("-")[0]], **settings}
    with pytest.raises(UserError, match=says):
        TransformerBackbone("x", tiny_transformers(kind), **given)


def test_each_class_names_the_other(tiny_transformers: Any, tiny_sd: Path) -> None:
    with pytest.raises(UserError, match="backbone=sd35-medium or backbone=flux-dev"):
        UNetBackbone("sd14", tiny_transformers("flux"), Sampler())
    with pytest.raises(UserError, match="U-Net's: choose a backbone"):
        TransformerBackbone("flux", tiny_sd, EULER, ["flux"])


def test_incomplete_folders(tiny_transformers: Any, tmp_path: Path) -> None:
    folder = copied(tiny_transformers("flux"), tmp_path / "flux")
    (folder / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks text_encoder_2/model.safetensors"):
        TransformerBackbone("flux", folder, EULER, ["flux"])
    folder = copied(tiny_transformers("sd3"), tmp_path / "sd3")
    (folder / "transformer" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"context_embedder|_class_name|cannot be loaded"):
        TransformerBackbone("sd3", folder, EULER, ["sd3"])


def test_the_built_in_transformer_names_its_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("realera.backbones.folder.MINIATURE_DIT", tmp_path / "none")
    with pytest.raises(UserError, match=r"python -m realera.miniature.build denoiser=dit out=package"):
        TransformerBackbone("mini-dit", "mini-dit", Sampler("euler", 2, 3.0, 32, 32), ["sd3"])
