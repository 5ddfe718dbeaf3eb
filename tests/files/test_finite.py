"""NaN and infinity, wherever they come from: refused by name, and never saved."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from realera.contracts import Edit, LoraSpec, Method, Neighbours, UserError
from realera.files import checksums, finite
from realera.files.cache_costs import cached
from realera.training.checkpoint import Origin, read_erased, read_map, save_erased, save_map, save_neighbours
from realera.training.fit import fit

ORIGIN = Origin({}, "mini", "0" * 16)
BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 7, 1000, 40_000])
def test_a_bad_number_is_found_at_any_position(dtype: torch.dtype, size: int) -> None:
    largest = torch.finfo(dtype).max
    fine = torch.full((size,), largest, dtype=dtype)
    fine[::2] = -largest
    assert finite.first_bad({"fine": fine, "whole": torch.tensor([1]), "empty": torch.zeros(0)}) is None
    for place in {0, size // 2, size - 1}:
        for bad in BAD:
            hit = fine.clone()
            hit[place] = bad
            assert finite.first_bad({"fine": fine, "hit": hit, "later": hit}) == "hit"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_bad_number_of_8_bits_is_found(dtype: torch.dtype) -> None:
    fine = torch.ones(4).to(dtype)
    hit = torch.tensor([1.0, math.nan]).to(dtype)
    assert finite.first_bad({"fine": fine, "other": torch.ones(2)}) is None
    assert finite.first_bad({"fine": fine, "hit": hit}) == "hit"


# --- base weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_base_weight_that_is_not_finite_is_named(part: str, tiny_sd: Path, tmp_path: Path) -> None:
    from realera.backbones.unet import UNetBackbone
    from realera.contracts import Sampler

    copy = Path(shutil.copytree(tiny_sd, tmp_path / "copy", copy_function=os.link))
    file = next((copy / part).glob("*.safetensors"))
    state = load_file(file)
    name = next(name for name in state if name.endswith("weight"))
    state[name].view(-1)[1] = math.nan
    file.unlink()
    save_file(state, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"{part}.*weight {name} holds NaN.*again"):
        UNetBackbone("mini", copy, Sampler("ddim", 2, 7.5, 32, 32))


def test_weights_are_checked_in_their_file(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checking memory-mapped weights would load them into memory, even if the run does not use them."""
    from realera.backbones import loading
    from realera.backbones.unet import UNetBackbone
    from realera.contracts import Sampler

    seen: list[int] = []
    plain = finite.refuse

    def noted(tensors: Any, *said: str) -> None:
        seen.extend(tensor.nbytes for _, tensor in (tensors.items() if isinstance(tensors, dict) else tensors))
        plain(tensors, *said)

    monkeypatch.setattr(loading, "BLOCK", 64)
    monkeypatch.setattr(finite, "refuse", noted)
    copy = Path(shutil.copytree(tiny_sd, tmp_path / "copy", copy_function=os.link))
    UNetBackbone("mini", copy, Sampler("ddim", 2, 7.5, 32, 32))
    files = [next((copy / part).glob("*.safetensors")) for part in ("unet", "vae", "text_encoder")]
    assert max(seen) == 64 and sum(seen) == sum(w.nbytes for file in files for w in load_file(file).values())
    state = load_file(files[0])
    name = next(name for name, weight in state.items() if weight.nbytes > 64)
    state[name].view(-1)[-1] = math.inf
    files[0].unlink()
    save_file(state, files[0], {"format": "pt"})
    with pytest.raises(UserError, match=f"weight {name} holds NaN or infinity"):
        UNetBackbone("mini", copy, Sampler("ddim", 2, 7.5, 32, 32))


def test_numbers_too_large_for_float16_are_refused(new_backbone: Callable[..., Any]) -> None:
    backbone = new_backbone(dtype="float16")
    before = {name: layer.weight.clone() for name, layer in backbone.text_projections().items()}
    with pytest.raises(UserError, match=r"attn2\.to_k\.weight is too large for backbone\.dtype=float16.*bfloat16"):
        backbone.apply(Edit(map=torch.eye(32).double() * 1e7))
    assert all(torch.equal(layer.weight, before[name]) for name, layer in backbone.text_projections().items())


@pytest.mark.parametrize("bad", BAD)
def test_an_edit_that_is_not_finite_is_refused(bad: float, new_backbone: Callable[..., Any]) -> None:
    backbone = new_backbone()
    map = torch.eye(32).double()
    map[3, 4] = bad
    with pytest.raises(UserError, match=r"edited weight .*attn2\.to_k\.weight holds NaN or infinity.*ridge"):
        backbone.apply(Edit(map=map))
    assert not backbone.erased_state()
    layer = next(iter(backbone.text_projections()))
    state = {f"edit.{layer}.weight": torch.full_like(backbone.text_projections()[layer].weight, bad)}
    with pytest.raises(UserError, match=rf"erased weight edit\.{layer}\.weight holds NaN"):
        backbone.load_erased(state)
    assert not backbone.erased_state()


def test_states_and_images_that_are_not_finite_are_refused(new_backbone: Callable[..., Any]) -> None:
    backbone = new_backbone()
    states = backbone.encode(["a cat", "a dog"])
    states.states[1] = math.nan
    with pytest.raises(UserError, match=r"image of seed 8 cannot be generated.*guidance_scale"):
        backbone.sample(states, [7, 8])
    with pytest.raises(UserError, match="autoencoder's output"):
        backbone.decode(torch.full((1, 4, 8, 8), math.inf))
    with torch.no_grad():
        backbone.text.model.get_input_embeddings().weight[backbone.text.tokenizer("dog")["input_ids"][1]] = math.inf
    with pytest.raises(UserError, match="text states of 'the dog' hold NaN"):
        backbone.encode(["the cat", "the dog"])


# --- the loop --------------------------------------------------------------------------------------------------------


class Diverging:
    """An aligner that fails in its third step in the given way."""

    steps, lr, weight_decay = 15, 1e-3, 0.0
    lora: LoraSpec | None = LoraSpec()
    parameters: Sequence[str] = ()

    def __init__(self, wrong: str, lr: float = 1e-3) -> None:
        self.wrong, self.lr = wrong, lr

    def loss(self, backbone: Any, *given: Any) -> dict[str, torch.Tensor]:
        step = given[2].step
        up = next(p for name, p in backbone.unet.named_parameters() if "lora_B" in name)
        first = up.square().sum()
        if step == 3 and self.wrong == "term":
            return {"first": first, "second": first + math.inf}
        if self.wrong == "every gradient" or (
            step == 3 and self.wrong == "gradient"
        ):  # its value is 0, its slope is NaN
            return {"first": (up - up.detach()).norm() * 0 + torch.sqrt((up - up.detach()).sum())}
        if self.wrong == "weights":
            return {"first": (up - up.detach()).sum()}
        return {"first": first}


class Noise:
    def prepare(self, *_: Any) -> None: ...

    def __call__(self, backbone: Any, concept: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(1, 4, 8, 8, generator=generator), torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("wrong", "lr", "says"),
    [
        ("term", 1e-3, r"The loss \(second\) is inf at step 3: lower method\.align\.lr"),
        ("gradient", 1e-3, r"At step 3 the gradient of .*lora_B.* holds NaN"),
        ("weights", 3e37, r"After step 12 .*lora_B.* holds NaN or infinity: lower method\.align\.lr"),
    ],
)
def test_diverging_training_stops_and_leaves_no_checkpoint(
    wrong: str, lr: float, says: str, new_backbone: Callable[..., Any], new_pairs: Callable[..., Any], tmp_path: Path
) -> None:
    backbone, run = new_backbone(), tmp_path / "run"
    method = Method("going", latents=Noise(), align=Diverging(wrong, lr))
    with pytest.raises(UserError, match=says):
        fit(
            backbone,
            method,
            new_pairs(backbone, ("cat", "field")),
            run_dir=run,
            seed=0,
            config={},
            trainer={"accelerator": "cpu", "gradient_clip_val": None},
            checkpoint_every=1 if wrong != "weights" else 12,
        )
    assert not (run / "erased.safetensors").exists() and not (run / "fit").exists()
    for line in (run / "losses.jsonl").read_text().splitlines():
        assert all(math.isfinite(value) for value in json.loads(line).values())


def test_16_mixed_training_whose_steps_are_all_skipped(
    new_backbone: Callable[..., Any],
    new_pairs: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The scaler skips each step; after 17 steps the scale is below 1, and the gradient is refused with its name."""
    from lightning.pytorch.plugins import MixedPrecision
    from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))  # Lightning makes one only on CUDA
    monkeypatch.setattr(_AcceleratorConnector, "_check_and_init_precision", lambda self: scaled)
    backbone = new_backbone()
    with pytest.raises(UserError, match="In all 15 steps a gradient was NaN or infinite, so all steps were skipped"):
        fit(
            backbone,
            Method("going", latents=Noise(), align=Diverging("every gradient")),
            new_pairs(backbone, ("cat", "field")),
            run_dir=tmp_path / "run",
            seed=0,
            config={},
            trainer={"accelerator": "cpu", "gradient_clip_val": None},
        )
    assert not (tmp_path / "run" / "erased.safetensors").exists()


# --- files -----------------------------------------------------------------------------------------------------------


def test_files_that_are_not_finite_are_neither_saved_nor_read(new_backbone: Callable[..., Any], tmp_path: Path) -> None:
    backbone, map = new_backbone(), torch.eye(4)
    map[0, 0] = math.nan
    with pytest.raises(UserError, match=r"map\.safetensors is not saved"):
        save_map(tmp_path / "map.safetensors", map, ORIGIN)
    changed = SimpleNamespace(erased_state=lambda: {"edit.x.weight": map})
    with pytest.raises(UserError, match=r"erased\.safetensors is not saved, because edit\.x\.weight holds NaN"):
        save_erased(tmp_path / "erased.safetensors", changed, ORIGIN, None)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    for name, read in (("map", read_map), ("erased", read_erased)):
        file = tmp_path / f"{name}.safetensors"
        save_map(file, torch.eye(4), ORIGIN) if name == "map" else save_erased(file, backbone, ORIGIN, None)
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        del metadata[checksums.KEY]  # as an earlier version wrote it
        save_file({"map": map}, file, metadata)
        with pytest.raises(UserError, match=rf"{name}\.safetensors cannot be used: its map holds NaN"):
            read(file)


def test_mined_points_too_large_for_float16_are_saved_unchanged(tmp_path: Path) -> None:
    large, small, rows = torch.full((1, 2, 3), 1e6), torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)
    save_neighbours(tmp_path / "n.safetensors", [Neighbours(large, small, small, rows, rows)], ORIGIN)
    found = load_file(tmp_path / "n.safetensors")
    assert torch.equal(found["0.near"], large) and found["0.beyond"].dtype == torch.float16


def test_a_cached_tensor_that_is_not_finite_is_made_again(tmp_path: Path) -> None:
    file, meter = tmp_path / "x.safetensors", SimpleNamespace(passes=0)
    with pytest.raises(UserError, match=r"x\.safetensors is not cached, because latents holds NaN"):
        cached(file, "latents", meter, lambda: torch.tensor([math.nan]))  # type: ignore[arg-type]
    assert not file.exists()
    save_file({"latents": torch.tensor([math.inf])}, file)
    made = cached(file, "latents", meter, lambda: torch.ones(1))  # type: ignore[arg-type]
    assert torch.equal(made, torch.ones(1)) and torch.equal(load_file(file)["latents"], torch.ones(1))


def test_a_sum_of_captions_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    from realera.methods import priors

    made = json.dumps({"captions": 3, "rows": 77, "encoder": "e", "source": "s", "complete": True})
    file, gram = tmp_path / "sum.safetensors", torch.eye(4).double()
    said = {"format": priors.FORMAT, "made": made}
    save_file({"gram": gram}, file, said)
    assert priors.read(file)[1].captions == 3
    for tensor, metadata, sentence in (
        (gram * math.nan, said, "cannot be used: its sum holds NaN"),
        (torch.ones(3, 4).double(), said, "cannot be read"),
        (gram, {**said, "made": made.replace("3,", '"many",')}, "cannot be read"),
        (gram, {**said, "made": "[]"}, "cannot be read"),
        (gram, {**said, "format": "realera-prior/0"}, "is not a sum of captions"),
    ):
        save_file({"gram": tensor}, file, metadata)
        with pytest.raises(UserError, match=rf"sum\.safetensors {sentence}"):
            priors.read(file)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match="cannot be read"):
        priors.read(file)


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_erasure_of_a_broken_model_ends_with_one_sentence(
    small: list[str], tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from realera import export, generate, train

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))

    def go(door: Any, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["x", *words])
        with pytest.raises(SystemExit) as left:
            door.main()
        assert left.value.code == 2
        return capsys.readouterr().err

    copy = Path(shutil.copytree(tiny_sd, tmp_path / "copy", copy_function=os.link))
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_in.weight"][0] = math.nan
    file.unlink()
    save_file(state, file)
    words = ["concept=airplane", "method=uce", "evaluate=false"]
    said = go(train, *words, "run_dir=bad", *small, f"backbone.pretrained={copy}")
    assert "weight conv_in.weight holds NaN" in said and not list(tmp_path.rglob("erased.safetensors"))

    monkeypatch.setattr(sys, "argv", ["x", *words, "run_dir=run", *small])
    train.main()
    for name, door, more in (
        ("map", export, ["to=map", "out=out"]),
        ("erased", export, ["to=diffusers", "out=out"]),
        ("erased", generate, ["prompts=[a cat]", "out=out"]),
    ):
        file = tmp_path / "run" / f"{name}.safetensors"
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        del metadata[checksums.KEY]
        whole, state = file.read_bytes(), load_file(file)
        next(iter(state.values())).view(-1)[0] = math.inf
        save_file(state, file, metadata)
        said = go(door, "run=run", *more)
        assert f"{name}.safetensors" in said and "NaN or infinity" in said and not (tmp_path / "out" / "unet").exists()
        file.write_bytes(whole)
    assert "2^63" in go(generate, "run=run", "prompts=[a cat]", "seeds=[18446744073709551616]")
