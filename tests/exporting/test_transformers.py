"""Exports and maps of erasures in Stable Diffusion 3 and FLUX: diffusers reads them, and draws what the run draws."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import realera
from folders import copied
from quick import slow_unless
from realera import apply as command
from realera import paths
from realera.backbones import folder, kinds, pipelines, portable, text_marks
from realera.backbones.transformer_pipelines import for_maps
from realera.contracts import JOINT, KEYS, VALUES, UserError
from realera.exporting import forms
from realera.runs import applying
from realera.settings import composition
from realera.training import maps

WORDS = ("backbone.sampler.height=64", "backbone.sampler.width=64", "backbone.sampler.steps=2", "backbone.t5_length=24")
KINDS = ("sd3", "flux")
READER = f"{JOINT}.weight"
Folders = Callable[[str], Path]
Weights = dict[str, Tensor]
COMFYUI: dict[str, Any] = json.loads(Path(__file__).with_name("client_keys.json").read_text(encoding="utf-8"))


def opened(place: Path) -> Any:
    pipe: Any = pipelines.opened(place)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def weights(pipe: Any) -> Weights:
    return {name: value.clone() for name, value in pipe.transformer.state_dict().items()}


def close(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[n], other[n], atol=1e-5) for n in one)


def erased_by(place: Path, method: str, **settings: Any) -> realera.Erased:
    given: Any = {"overrides": WORDS, "progress": False, **settings}
    return realera.erase(opened(place), "cat", anchor="field", method=method, **given)


@pytest.fixture(scope="module")
def runs(tiny_transformers: Folders, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Weights]]:
    """runs("flux"): the folder of a run by uce, and the erased transformer's weights; made once."""
    made: dict[str, tuple[Path, Weights]] = {}

    def run(kind: str) -> tuple[Path, Weights]:
        if kind not in made:
            erased = erased_by(tiny_transformers(kind), "uce")
            made[kind] = erased.save(tmp_path_factory.mktemp("runs") / kind), weights(erased.pipe)
        return made[kind]

    return run


def trained(kind: str, place: Path) -> realera.Erased:
    small = {"method.latents.images": 2, "method.latents.chunk": 2, "align.steps": 2, "align.lr": 1e-2}
    return erased_by(place, "realera", **{"overrides": [*WORDS, "method.neighbours=null"], **small})


# --- files for other programs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", slow_unless(KINDS, "flux"))
def test_a_lora_is_read_by_diffusers_and_has_names_that_comfyui_knows(
    kind: str, tiny_transformers: Folders, tmp_path: Path
) -> None:
    """Of an edit and a trained adapter together; the file holds all of their change."""
    place = tiny_transformers(kind)
    erased = trained(kind, place)
    found = erased.export("lora", tmp_path / "lora", error=1e-6)
    assert found.error < 1e-5 and found.left_out == {} and found.distance is not None and found.distance < 0.5
    pipe = opened(place)
    pipe.load_lora_weights(str(tmp_path / "lora"), weight_name=found.path.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert close(weights(pipe), weights(erased.pipe))
    rule = COMFYUI["transformer_lora"]
    with safe_open(found.path, "pt") as reader:
        keys, head = list(reader.keys()), reader.metadata()
    layers = {key.removesuffix(end) for key in keys for end in rule["tensors"] if key.endswith(end)}
    assert all(any(key.endswith(end) for end in rule["tensors"]) for key in keys)
    names = {layer.removeprefix(rule["prefix"]) for layer in layers if layer.startswith(rule["prefix"])}
    known = {*rule["ends"], *(f"{block}.{own}" for block, own in _block_layers(rule[kind], pipe.transformer.config))}
    assert len(names) == len(layers) == 1 + 2 * (2 if kind == "flux" else 3) and names <= known
    assert head["modelspec.architecture"] == {"sd3": "stable-diffusion-3", "flux": "flux-1-dev"}[kind] + "/lora"
    assert "modelspec.prediction_type" not in head and not any(key.startswith("ss_") for key in head)
    assert "ComfyUI" in (tmp_path / "lora" / "README.md").read_text()


def _block_layers(rule: dict[str, Any], config: Any) -> list[tuple[str, str]]:
    counts = {"transformer_blocks": config.num_layers, "single_transformer_blocks": config.get("num_single_layers")}
    return [(f"{name}.{i}", own) for name, layers in rule.items() for i in range(counts[name]) for own in layers]


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_unless([*KINDS, "sd3-without-t5"], "sd3-without-t5"))
def test_a_pipeline_folder_is_read_by_diffusers(
    kind: str, tiny_transformers: Folders, runs: Callable[[str], tuple[Path, Weights]], tmp_path: Path
) -> None:
    run, wanted = runs(kind)
    found = forms.export(folders_run(run), "diffusers", tmp_path / "pipeline", source=tiny_transformers(kind))
    assert found.distance is not None and found.distance < 0.1
    lacks = kinds.left_out(found.path)
    called = (found.path / "README.md").read_text().partition("from_pretrained(")[2].partition("\n")[0]
    assert called == f'"pipeline"{"".join(f", {part}=None" for part in lacks)})' and bool(lacks) == ("t5" in kind)
    pipe = opened(found.path)
    assert close(weights(pipe), wanted) and not torch.equal(weights(pipe)[READER], base(tiny_transformers(kind)))
    given = {"num_inference_steps": 1, "height": 64, "width": 64, "max_sequence_length": 24, "output_type": "np"}
    assert pipe("a cat", **given).images.shape == (1, 64, 64, 3)
    (found.path / "model_index.json").unlink()  # of a folder without one: the classes are known
    again = portable._index(found.path)
    stored = json.loads((tiny_transformers(kind) / "model_index.json").read_text())
    mine = {key: value for key, value in stored.items() if not key.startswith("tokenizer")}
    assert {key: again[key] for key in mine} == mine


def folders_run(place: Path) -> Any:
    from realera.runs import folders

    return folders.open_run(str(place))


def base(place: Path) -> Tensor:
    return portable.base_denoiser(place, [READER])[READER]


def test_one_text_encoder_has_no_pipeline() -> None:
    with pytest.raises(UserError, match=r"diffusers has no pipeline for backbone mini-dit.*give to=lora"):
        forms._refuse_form("diffusers", "one-clip", "mini-dit")
    forms._refuse_form("lora", "one-clip", "mini-dit")


# --- maps ------------------------------------------------------------------------------------------------------------


def fine_tuned(source: Path, to: Path) -> Path:
    """A copy whose transformer is another one."""
    place = copied(source, to)
    file = folder.part_files(place, "transformer")[1][0]
    draw = torch.Generator().manual_seed(5)
    state = {n: t + 0.05 * torch.randn(t.shape, generator=draw) for n, t in load_file(file).items()}
    file.unlink()
    save_file(state, file, {"format": "pt"})
    return place


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_unless(KINDS, "sd3"))
def test_a_map_goes_onto_a_fine_tune_and_is_taken_off(
    kind: str, tiny_transformers: Folders, runs: Callable[[str], tuple[Path, Weights]], tmp_path: Path
) -> None:
    run, _ = runs(kind)
    exported = forms.export(folders_run(run), "map", tmp_path / "map")
    source = fine_tuned(tiny_transformers(kind), tmp_path / "tuned")
    command.apply(settings(map=str(exported.path), pretrained=str(source), out=str(tmp_path / "new")))
    before, after = (portable.part_state(place, "transformer") for place in (source, tmp_path / "new"))
    matrix = load_file(exported.path)["map"].double()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {READER}
    torch.testing.assert_close(after[READER], (before[READER].double() @ matrix).float())
    pipe = opened(source)
    first = weights(pipe)
    applied = realera.apply(pipe, exported.path)
    assert close(weights(pipe), weights(opened(tmp_path / "new")))
    applied.undo()
    assert all(torch.equal(value, first[name]) for name, value in weights(pipe).items())
    words = {"map": str(exported.path), "pretrained": str(tmp_path / "new"), "remove": True}
    command.apply(settings(**words, out=str(tmp_path / "back")))
    torch.testing.assert_close(portable.part_state(tmp_path / "back", "transformer")[READER], before[READER])


def settings(**given: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.create(composition.settings_of("apply", [composition.word(k, v) for k, v in given.items()]))


def test_a_maps_projections_are_the_one_layer() -> None:
    """Maps of keys alone and of values alone are both applied to it, in their order."""
    draw = torch.Generator().manual_seed(0)
    one, two = (torch.randn(4, 4, generator=draw, dtype=torch.float64) for _ in range(2))

    def made(matrix: Tensor, projections: tuple[str, ...]) -> maps.Map:
        return maps.Map("m", matrix, projections, {}, "uce", ["cat"], ["field"], [], "0")

    both = [made(one, (KEYS,)), made(two, (VALUES,))]
    torch.testing.assert_close(maps.composed(both, [1.0, 1.0], joint=True), {JOINT: one @ two})
    assert set(maps.composed(both, [1.0, 1.0])) == {KEYS, VALUES}


def test_marks_know_the_text_encoders(tiny_transformers: Folders, new_transformer: Any, tmp_path: Path) -> None:
    """In memory as in a folder and in half precision; FLUX dev and schnell share them, and so does another CLIP."""
    found = {kind: text_marks.of_folder(tiny_transformers(kind)) for kind in ("sd3", "sd3-without-t5", "flux")}
    assert len({marks["float16"] for marks in found.values()}) == 3
    for kind, marks in found.items():
        pipe = opened(tiny_transformers(kind))
        assert for_maps(pipe).text_marks() == marks
        assert text_marks.same(for_maps(pipe.to(torch.bfloat16)).text_marks(), marks)
    assert new_transformer("sd3", t5=False).text_marks() == found["sd3-without-t5"]
    assert new_transformer("flux").text_marks() == text_marks.of_folder(tiny_transformers("schnell")) == found["flux"]
    for part, same in (("text_encoder", True), ("text_encoder_2", False)):
        place = copied(tiny_transformers("flux"), tmp_path / part)
        file = place / part / "model.safetensors"
        state = {name: value + 0.01 for name, value in load_file(file).items()}
        file.unlink()
        save_file(state, file, {"format": "pt"})
        assert text_marks.same(text_marks.of_folder(place), found["flux"]) == same


def test_maps_that_do_not_belong_to_a_transformer(
    tiny_transformers: Folders, runs: Callable[[str], tuple[Path, Weights]], tmp_path: Path
) -> None:
    run, _ = runs("flux")
    read = [maps.read(run / paths.MAP)]
    with pytest.raises(UserError, match="was made for the text encoder"):
        applying.apply_to(str(tiny_transformers("sd3")), tmp_path / "new", applying.Application(read, [1.0]))
    with pytest.raises(UserError, match=r"width 64 and the transformer in .* reads the width 96"):
        unchecked = applying.Application(read, [1.0], check=False)
        applying.apply_to(str(tiny_transformers("sd3")), tmp_path / "new", unchecked)
    with pytest.raises(UserError, match="with one text encoder, and diffusers has no pipeline for it"):
        applying.apply_to(str(tiny_transformers("one-clip")), tmp_path / "new", unchecked)
    assert not (tmp_path / "new").exists()
