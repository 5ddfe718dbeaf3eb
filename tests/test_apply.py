"""The map of one erasure on other checkpoints: by the command, and in Python."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

import folders
import realera
from realera import paths
from realera.backbones import text_marks
from realera.contracts import UserError
from realera.files import checksums

Type = Callable[..., int]
CLOSED_FORM: dict[str, Any] = {"backbone.sampler.steps": 2}


def fine_tuned(source: Path, to: Path, seed: int, dtype: torch.dtype | None = None, share: float = 0.05) -> Path:
    """A copy with another U-Net: noise of a share of each weight's own size."""
    folders.copied(source, to)
    file = next((to / "unet").glob("*.safetensors"))
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in load_file(file).items():
        noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() if tensor.numel() > 1 else 0
        state[name] = (tensor.float() + share * noise).to(dtype or tensor.dtype)
    file.unlink()
    save_file(state, file, {"format": "pt"})
    return to


def unet(place: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in (place / "unet").glob("*.safetensors"):
        state |= load_file(file)
    return state


def layers(state: dict[str, Tensor], *suffixes: str) -> dict[str, Tensor]:
    suffixes = suffixes or ("attn2.to_k.weight", "attn2.to_v.weight")
    return {name: tensor for name, tensor in state.items() if name.endswith(suffixes)}


def matrix(file: Path) -> Tensor:
    return load_file(file / paths.MAP if file.is_dir() else file)["map"].double()


@pytest.fixture(scope="session")
def made(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{method: run folder} of three erasures on `tiny_sd`: of keys and values, of values, and singular."""
    place = tmp_path_factory.mktemp("maps")
    pipe = DiffusionPipeline.from_pretrained(tiny_sd)
    runs = {}
    for name, concept, method, more in (
        ("both", "cat", "uce", {}),
        ("values", "airplane", "valera", {}),
        ("singular", "horse", "valera", {"edit.gain": 1}),
    ):
        erased = realera.erase(pipe, concept, anchor="field", method=method, progress=False, **{**CLOSED_FORM, **more})
        runs[name] = erased.save(place / name)
        erased.undo()
    return runs


@pytest.fixture
def type_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Type:
    """Runs the command in this process and in an empty folder; returns its exit status."""

    def run(*words: str, command: str = "apply") -> int:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [command, *words])
        try:
            import_module(f"realera.{command}").main()
        except SystemExit as left:
            return int(left.code or 0)
        return 0

    return run


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logging.getLogger("realera").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("realera").removeHandler(caplog.handler)


@pytest.mark.slow
def test_one_command_applies_a_map_to_every_fine_tune(
    made: dict[str, Path], tiny_sd: Path, type_in: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16)):
        fine_tuned(tiny_sd, tmp_path / "models" / f"m{seed}", seed, dtype)
    (tmp_path / "models" / "notes").mkdir()
    assert type_in(f"map={made['both']}", "pretrained=models/*", "out=erased") == 0
    assert sorted(file.name for file in (tmp_path / "erased").iterdir()) == ["m0", "m1", "m2"]
    map = matrix(made["both"])
    for seed, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16)):
        source, out = tmp_path / "models" / f"m{seed}", tmp_path / "erased" / f"m{seed}"
        before, after = unet(source), unet(out)
        assert before.keys() == after.keys() and len(layers(before)) == 14
        for name, weight in before.items():
            wanted = (weight.double() @ map).to(dtype) if name in layers(before) else weight
            assert after[name].dtype == dtype and torch.equal(after[name], wanted), name
        for part in ("vae", "text_encoder"):
            (file,) = (source / part).glob("*.safetensors")
            assert (out / part / file.name).read_bytes() == file.read_bytes()
        record = json.loads((out / paths.APPLIED).read_text())
        assert record["source"] == f"m{seed}" and record["applied"][0]["concepts"] == ["cat"]
        pipe = StableDiffusionPipeline.from_pretrained(out)
        pipe.set_progress_bar_config(disable=True)
        image = pipe("a cat", num_inference_steps=1, height=32, width=32, output_type="np").images
        assert np.isfinite(image).all()
    capsys.readouterr()
    shutil.rmtree(tmp_path / "erased" / "m1")
    assert type_in(f"map={made['both']}", "pretrained=models/*", "out=erased") == 0
    shown = capsys.readouterr().out
    assert shown.count("already there") == 2 and shown.count("written") == 1


def test_one_checkpoint_that_fails_does_not_stop_the_others(
    made: dict[str, Path], tiny_sd: Path, type_in: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = fine_tuned(tiny_sd, tmp_path / "torn", 0)
    file = torn / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    assert type_in(f"map={made['both']}", f"pretrained=[nowhere,{torn},{tiny_sd}]", "out=erased") == 2
    shown = capsys.readouterr()
    table = " ".join(shown.out.split())
    assert "does not exist" in table and "torn" in table and "written" in table
    assert "2 of 3 checkpoints were not written" in shown.err
    assert [place.name for place in (tmp_path / "erased").iterdir()] == [tiny_sd.name]


def test_an_unforeseen_failure_is_status_1(
    made: dict[str, Path], tiny_sd: Path, type_in: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    from realera.runs import applying

    def broken(*given: Any) -> bool:
        raise ZeroDivisionError

    monkeypatch.setattr(applying, "apply_to", broken)
    assert type_in(f"map={made['both']}", f"pretrained=[{tiny_sd}]", "out=erased") == 1


def test_values_alone_and_by_weight(made: dict[str, Path], tiny_sd: Path, type_in: Type, tmp_path: Path) -> None:
    assert type_in(f"map={made['values'] / paths.MAP}", f"pretrained={tiny_sd}", "out=new", "weight=0.5") == 0
    before, after = unet(tiny_sd), unet(tmp_path / "new")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(layers(before, "attn2.to_v.weight"))
    map = matrix(made["values"])
    for name in changed:
        half = before[name].double() + 0.5 * (before[name].double() @ map - before[name].double())
        assert torch.allclose(after[name].double(), half, atol=1e-6)


def test_two_maps_are_applied_in_their_order(
    made: dict[str, Path], tiny_sd: Path, type_in: Type, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    both, values = made["both"], made["values"]
    assert type_in(f"map=[{both},{values}]", "weight=[1,0.5]", f"pretrained={tiny_sd}", "out=new") == 0
    assert "these maps do not commute" in said.text
    name, before = next(iter(layers(unet(tiny_sd), "attn2.to_v.weight").items()))
    eye = torch.eye(32, dtype=torch.float64)
    wanted = before.double() @ matrix(both) @ (eye + 0.5 * (matrix(values) - eye))
    assert torch.allclose(unet(tmp_path / "new")[name].double(), wanted, atol=1e-6)
    # one after the other is the same, and the second application says what is there
    assert type_in(f"map={both}", f"pretrained={tiny_sd}", "out=one") == 0
    said.clear()
    assert type_in(f"map={values}", "weight=0.5", "pretrained=one", "out=two") == 0
    assert "one already has a map: cat by uce, weight 1" in said.text
    assert torch.allclose(unet(tmp_path / "two")[name], unet(tmp_path / "new")[name], atol=1e-6)
    one, two = (json.loads((tmp_path / place / paths.APPLIED).read_text()) for place in ("new", "two"))
    assert one["applied"] == two["applied"] and [entry["weight"] for entry in two["applied"]] == [1, 0.5]


def test_a_map_is_taken_off_again(
    made: dict[str, Path], tiny_sd: Path, type_in: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both, values = made["both"], made["values"]
    assert type_in(f"map=[{both},{values}]", f"pretrained={tiny_sd}", "out=new") == 0
    assert type_in(f"map={both}", "remove=true", "pretrained=new", "out=back") == 2
    assert "does not have these maps with these weights as the last ones" in capsys.readouterr().err
    assert type_in(f"map={values}", "weight=0.5", "remove=true", "pretrained=new", "out=back") == 2
    assert type_in(f"map=[{both},{values}]", "remove=true", "pretrained=new", "out=back") == 0
    before, after = unet(tiny_sd), unet(tmp_path / "back")
    for name, weight in layers(before).items():
        assert torch.allclose(after[name], weight, atol=1e-4), name
    record = json.loads((tmp_path / "back" / paths.APPLIED).read_text())
    assert record["applied"] == [] and len(record["removed"]) == 2
    assert type_in(f"map={made['singular']}", f"pretrained={tiny_sd}", "out=single") == 0
    capsys.readouterr()
    assert type_in(f"map={made['singular']}", "remove=true", "pretrained=single", "out=x") == 2
    assert "singular" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_rounded_checkpoint_is_not_restored_from_noise(
    made: dict[str, Path], tiny_sd: Path, type_in: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fine_tuned(tiny_sd, tmp_path / "half", 0, torch.bfloat16)
    words = (f"map={made['singular']}", "weight=0.99")  # a condition number of at least 100
    assert type_in(*words, "pretrained=half", "out=new") == 0
    assert type_in(*words, "remove=true", "pretrained=new", "out=back") == 2
    assert "rounded to bfloat16" in capsys.readouterr().err
    assert type_in(*words, f"pretrained={tiny_sd}", "out=single") == 0
    assert type_in(*words, "remove=true", "pretrained=single", "out=back") == 0


def test_another_text_encoder_is_refused_unless_it_is_asked_for(
    made: dict[str, Path],
    tiny_sd: Path,
    tiny_sd21: Path,
    tiny_sdxl: Path,
    type_in: Type,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    map = f"map={made['both']}"
    assert type_in(map, f"pretrained={tiny_sd21}", "out=new") == 2
    error = capsys.readouterr().err
    marks = [text_marks.of_folder(place)["float16"] for place in (tiny_sd, tiny_sd21)]
    assert all(mark in error for mark in marks) and "check=false" in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert type_in(map, f"pretrained={tiny_sd21}", "out=new", "check=false") == 0
    assert type_in(map, f"pretrained={tiny_sdxl}", "out=xl", "check=false") == 2, "another width never fits"
    assert "width 32" in capsys.readouterr().err
    assert type_in(map, f"pretrained={tiny_sd}", "out=once") == 0
    capsys.readouterr()
    assert type_in(map, "pretrained=once", "out=twice") == 2
    assert "already has the map of cat by uce" in capsys.readouterr().err
    assert type_in(map, "pretrained=once", "out=twice", "check=false") == 0


def test_a_map_without_a_text_encoder_gets_it_from_the_run_s_base_model(
    made: dict[str, Path],
    tiny_sd: Path,
    type_in: Type,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    said: pytest.LogCaptureFixture,
) -> None:
    run = folders.copied(made["values"], tmp_path / "run")
    tensors, metadata = checksums.load(run / paths.MAP)
    for key in ("text_encoder", "width", "concepts", "anchors", "method"):
        del metadata[key]  # as an earlier version wrote it
    metadata["projections"] = '["attn2.to_v"]'
    checksums.save(run / paths.MAP, tensors, metadata)
    assert type_in("map=run", f"pretrained={tiny_sd}", "out=new") == 2
    assert "does not say which text encoder" in capsys.readouterr().err
    assert type_in("run=run", "to=map", "out=exported", command="export") == 0
    whole = checksums.metadata(tmp_path / "exported" / paths.MAP)
    assert json.loads(whole["text_encoder"]) == text_marks.of_folder(tiny_sd)
    assert (whole["concepts"], whole["anchors"], whole["method"]) == ('["airplane"]', '["field"]', "valera")
    assert type_in("map=exported", f"pretrained={tiny_sd}", "out=new") == 0
    assert torch.equal(matrix(tmp_path / "exported"), matrix(made["values"]))
    # its base model is elsewhere
    config = (run / paths.CONFIG).read_text()
    assert str(tiny_sd) in config
    (run / paths.CONFIG).write_text(config.replace(str(tiny_sd), "nobody/nothing"))
    assert type_in("run=run", "to=map", "out=unknown", command="export") == 0
    assert "check=false" in said.text
    assert "text_encoder" not in checksums.metadata(tmp_path / "unknown" / paths.MAP)
    assert type_in("map=unknown", f"pretrained={tiny_sd}", "out=x", "check=false") == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["map=nowhere", "pretrained=mini"], "map=nowhere does not exist"),
        (["map=.", "pretrained=mini"], "has no map.safetensors"),
        (["map={both}", "pretrained=nowhere"], "pretrained=nowhere does not exist"),
        (["map={both}", "pretrained='no/*/where'"], "matches 0 paths"),
        (["map={both}", "pretrained=mini", "weight=[1,2]"], "1 maps and 2 weights"),
        (["map={both}", "pretrained=mini", "weight=0"], "weight=0"),
        (["map=[]", "pretrained=mini"], "map=[] is empty"),
        (["map=torn.safetensors", "pretrained=mini"], "torn"),
        (["map={both}", "pretrained=bare"], "lacks"),
        (["map=whole.safetensors", "pretrained=mini"], "in int32, and a map is a square matrix of floating-point"),
    ],
)
def test_what_is_refused(
    words: list[str],
    sentence: str,
    made: dict[str, Path],
    type_in: Type,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensors, metadata = checksums.load(made["both"] / paths.MAP)
    checksums.save(tmp_path / "whole.safetensors", {"map": tensors["map"].int()}, metadata)
    (tmp_path / "torn.safetensors").write_bytes((made["both"] / paths.MAP).read_bytes()[:-9])
    (tmp_path / "bare" / "unet").mkdir(parents=True)
    assert type_in(*(word.replace("{both}", str(made["both"])) for word in words), "out=new") == 2
    error = capsys.readouterr().err
    assert sentence in error and "backbone" not in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_the_current_folder_and_long_names_of_a_foreign_map(
    made: dict[str, Path], tiny_sd: Path, type_in: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, metadata = checksums.load(made["both"] / paths.MAP)
    long = {**metadata, "concepts": json.dumps(["x" * 100_000, "\x1b[31mred"])}
    checksums.save(tmp_path.parent / "long.safetensors", tensors, long)
    words = (f"map={tmp_path.parent / 'long.safetensors'}", f"pretrained={tiny_sd}")
    assert type_in(*words, "out=.") == 2
    assert "out=. is the current folder" in capsys.readouterr().err
    assert type_in(*words, "out=new") == 0 and type_in(words[0], "pretrained=new", "out=again") == 2
    said = capsys.readouterr().err.splitlines()[-1]  # the error
    assert "already has the map of xxx" in said and "\x1b" not in said and len(said) < 1000


def test_a_map_that_is_given_twice_is_refused(
    made: dict[str, Path], tiny_sd: Path, type_in: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = folders.copied(made["both"], tmp_path / "copied")
    words = (f"map=[{made['both']},{made['values']},{copied}]", f"pretrained={tiny_sd}", "out=new")
    assert type_in(*words) == 2 and not (tmp_path / "new").exists()
    assert "The map of cat by uce is given twice" in capsys.readouterr().err
    assert type_in(*words, "check=false") == 0
    record = json.loads((tmp_path / "new" / paths.APPLIED).read_text())
    assert [entry["concepts"] for entry in record["applied"]] == [["cat"], ["airplane"], ["cat"]]
    assert type_in(*words[:1], "remove=true", "pretrained=new", "out=back") == 0, "it is there twice"


@pytest.mark.slow
def test_an_exported_pipeline_has_a_record_of_its_map(
    made: dict[str, Path], tiny_sd: Path, type_in: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert type_in(f"run={made['both']}", "to=diffusers", "out=exported", "verify=0", command="export") == 0
    record = json.loads((tmp_path / "exported" / paths.APPLIED).read_text())
    (entry,) = record["applied"]
    assert entry["concepts"] == ["cat"] and entry["weight"] == 1 and "beside" not in entry
    capsys.readouterr()
    assert type_in(f"map={made['both']}", "pretrained=exported", "out=twice") == 2
    assert "exported already has the map of cat by uce" in capsys.readouterr().err
    assert type_in(f"map={made['both']}", "remove=true", "pretrained=exported", "out=back") == 0
    for name, weight in layers(unet(tiny_sd)).items():
        assert torch.allclose(unet(tmp_path / "back")[name], weight, atol=1e-4), name
    # a run on a checkpoint with a map: the export has both
    erased = realera.erase(tmp_path / "exported", "ship", anchor="sea", method="valera", progress=False, **CLOSED_FORM)
    erased.export("diffusers", tmp_path / "second", verify=0)
    record = json.loads((tmp_path / "second" / paths.APPLIED).read_text())
    assert [entry["concepts"] for entry in record["applied"]] == [["cat"], ["ship"]]


def test_the_map_of_a_run_with_more_than_its_map_is_not_taken_off(
    made: dict[str, Path], type_in: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert type_in(f"run={made['both']}", "to=diffusers", "out=exported", "verify=0", command="export") == 0
    file = tmp_path / "exported" / paths.APPLIED
    record = json.loads(file.read_text())
    record["applied"][0]["beside"] = ["LoRA"]
    file.write_text(json.dumps(record))
    capsys.readouterr()
    assert type_in(f"map={made['both']}", "remove=true", "pretrained=exported", "out=back") == 2
    assert "also has its LoRA, which stays if the map is taken off" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_error_of_a_removal_is_told_as_it_is(
    dtype: torch.dtype,
    made: dict[str, Path],
    tiny_sd: Path,
    type_in: Type,
    tmp_path: Path,
    said: pytest.LogCaptureFixture,
) -> None:
    source = fine_tuned(tiny_sd, tmp_path / "tuned", 0, dtype)
    words = (f"map={made['both']}", "weight=0.9")
    assert type_in(*words, "pretrained=tuned", "out=new") == 0
    said.clear()
    assert type_in(*words, "remove=true", "pretrained=new", "out=back") == 0
    found = re.search(r"differ by about (\S+) of their norm \(no more than (\S+)\)", said.text)
    assert found
    before, after = layers(unet(source)), layers(unet(tmp_path / "back"))
    apart = sum(float((after[name].double() - before[name].double()).square().sum()) for name in before)
    share = (apart / sum(float(weight.double().square().sum()) for weight in before.values())) ** 0.5
    assert float(found[1]) == pytest.approx(share, rel=0.3) and share < float(found[2])


def test_folders_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    from realera.runs import sources

    for name in ("a/one/pipe", "a/two/pipe", "b/one/pipe"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet" / "config.json").write_text("{}")
    listed, several = sources.expanded(str(tmp_path / "a" / "*" / "pipe"))
    assert several and [place.name for place in sources.places(listed, several, Path("o"))] == ["one-pipe", "two-pipe"]
    listed, _ = sources.expanded([str(tmp_path / "a" / "*" / "pipe"), str(tmp_path / "b/one/pipe"), "x/y"])
    names = [place.name for place in sources.places(listed, True, Path("o"))]
    assert names == ["a-one-pipe", "a-two-pipe", "b-one-pipe", "x-y"]
    assert sources.expanded("x/y") == (["x/y"], False)


def test_shards_variants_and_a_safety_checker_stay(
    made: dict[str, Path], tiny_sd: Path, type_in: Type, tmp_path: Path
) -> None:
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    pipe: Any = StableDiffusionPipeline.from_pretrained(tiny_sd).to(torch.float16)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 16, "projection_dim": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=8))
    whole = StableDiffusionPipeline(
        **{**pipe.components, "safety_checker": checker, "feature_extractor": CLIPImageProcessor(size=32, crop_size=32)}
    )
    whole.save_pretrained(tmp_path / "half", variant="fp16")
    whole.unet.save_pretrained(tmp_path / "half" / "unet", max_shard_size="100KB")
    (tmp_path / "half" / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert len(list((tmp_path / "half" / "unet").glob("*.safetensors"))) > 1
    assert type_in(f"map={made['both']}", "pretrained=half", "out=new") == 0
    back: Any = StableDiffusionPipeline.from_pretrained(tmp_path / "new", torch_dtype=torch.float16)
    assert isinstance(back.safety_checker, StableDiffusionSafetyChecker) and back.feature_extractor is not None
    map, first = matrix(made["both"]), whole.unet.state_dict()
    for name, weight in back.unet.state_dict().items():
        wanted = (first[name].double() @ map).half() if name in layers(first) else first[name]
        assert torch.equal(weight, wanted)
    assert {file.name for file in (tmp_path / "new" / "unet").iterdir()} == {
        file.name for file in (tmp_path / "half" / "unet").iterdir()
    }


@pytest.mark.slow
def test_a_map_of_xl_reads_both_text_encoders(tiny_sdxl: Path, type_in: Type, tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny_sdxl)
    erased = realera.erase(pipe, "cat", anchor="field", method="uce", progress=False, **CLOSED_FORM)
    run = erased.save(tmp_path / "run")
    wanted = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    erased.undo()
    assert type_in("map=run", f"pretrained={tiny_sdxl}", "out=new") == 0
    assert matrix(run).shape == (80, 80)
    back: Any = StableDiffusionXLPipeline.from_pretrained(tmp_path / "new")
    for name, weight in back.unet.state_dict().items():
        assert torch.allclose(weight, wanted[name], atol=1e-5), name
    applied = realera.apply(pipe, run)
    assert all(torch.allclose(w, wanted[n], atol=1e-5) for n, w in pipe.unet.state_dict().items())
    applied.undo()
    other = folders.copied(tiny_sdxl, tmp_path / "other")
    file = other / "text_encoder_2" / "model.safetensors"
    state = {name: tensor + 0.01 for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(state, file, {"format": "pt"})
    assert type_in("map=run", "pretrained=other", "out=refused") == 2


# --- in Python -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe(tiny_sd: Path, tmp_path: Path) -> Any:
    loaded = DiffusionPipeline.from_pretrained(fine_tuned(tiny_sd, tmp_path / "tuned", 5))
    loaded.set_progress_bar_config(disable=True)
    return loaded


def weights(pipe: Any) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": tensor.clone()
        for part in ("unet", "text_encoder", "vae")
        for name, tensor in getattr(pipe, part).state_dict().items()
    }


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) and one[n].dtype == two[n].dtype for n in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_python_applies_what_the_command_writes_and_undoes_it_bit_for_bit(
    dtype: torch.dtype, pipe: Any, made: dict[str, Path], type_in: Type, tmp_path: Path
) -> None:
    pipe.to(dtype)
    pipe.save_pretrained(tmp_path / "saved")
    before = weights(pipe)
    applied = realera.apply(pipe, [made["both"], made["values"] / paths.MAP], weight=[1, 0.5])
    assert applied.pipe is pipe and applied.concept == ["cat", "airplane"] and "weight 0.5" in repr(applied)
    given = f"map=[{made['both']},{made['values']}]"
    assert type_in(given, "weight=[1,0.5]", "pretrained=saved", "out=new") == 0
    written = unet(tmp_path / "new")
    assert all(torch.equal(tensor, written[name]) for name, tensor in pipe.unet.state_dict().items())
    assert {name for name, tensor in weights(pipe).items() if not torch.equal(tensor, before[name])} == {
        f"unet.{name}" for name in layers(written)
    }
    assert applied.undo() is pipe and same(weights(pipe), before) and "undone" in repr(applied)
    with pytest.raises(UserError, match="apply them again"):
        applied.undo()


def test_maps_and_erasures_are_undone_in_their_order(pipe: Any, made: dict[str, Path]) -> None:
    before = weights(pipe)
    applied = realera.apply(pipe, made["both"])
    between = weights(pipe)
    erased = realera.erase(pipe, "ship", anchor="sea", method="uce", progress=False, **CLOSED_FORM)
    with pytest.raises(UserError, match="later erasure"):
        applied.undo()
    second = realera.apply(pipe, made["values"])
    with pytest.raises(UserError, match="later erasure"):
        erased.undo()
    second.undo()
    erased.undo()
    assert same(weights(pipe), between)
    applied.undo()
    assert same(weights(pipe), before)


def test_a_map_that_is_on_the_pipeline_is_refused_in_memory(pipe: Any, made: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="map of cat by uce is given twice"):
        realera.apply(pipe, [made["both"], made["both"]])
    applied = realera.apply(pipe, made["both"], weight=0.5)
    with pytest.raises(UserError, match="already has the map of cat by uce"):
        realera.apply(pipe, made["both"])
    realera.apply(pipe, made["both"], check=False).undo()
    applied.undo()
    realera.apply(pipe, made["both"]).undo()
    erased = realera.erase(pipe, "cat", anchor="field", method="uce", progress=False, **CLOSED_FORM)
    with pytest.raises(UserError, match="already has the map of cat by uce"):
        realera.apply(pipe, erased)


def test_an_erasure_is_given_as_it_is(pipe: Any, tiny_sd: Path) -> None:
    erased = realera.erase(tiny_sd, "cat", anchor="field", method="uce", progress=False, **CLOSED_FORM)
    before = weights(pipe)
    applied = realera.apply(pipe, erased)
    name = next(iter(layers(pipe.unet.state_dict())))
    wanted = (before[f"unet.{name}"].double() @ matrix(erased.folder)).float()
    assert torch.equal(pipe.unet.state_dict()[name], wanted)
    applied.undo()


@pytest.mark.slow
def test_python_refuses_what_the_command_refuses(
    pipe: Any, made: dict[str, Path], tiny_sd21: Path, tiny_sdxl: Path, type_in: Type, tmp_path: Path
) -> None:
    before = weights(pipe)
    for map, more, sentence in (
        ("nowhere", {}, "does not exist"),
        (made["both"], {"weight": -1}, "weight"),
        (made["both"], {"weight": [1, 2]}, "1 maps and 2 weights"),
    ):
        with pytest.raises(UserError, match=sentence):
            realera.apply(pipe, map, **more)
    other: Any = DiffusionPipeline.from_pretrained(tiny_sd21)
    with pytest.raises(UserError, match="text encoder"):
        realera.apply(other, made["both"])
    realera.apply(other, made["both"], check=False).undo()
    with pytest.raises(UserError, match="width"):
        realera.apply(DiffusionPipeline.from_pretrained(tiny_sdxl), made["both"], check=False)
    assert type_in(f"map={made['both']}", "pretrained=tuned", "out=new") == 0
    with pytest.raises(UserError, match="already has the map of cat by uce"):
        realera.apply(tmp_path / "new", made["both"])
    assert same(weights(pipe), before)


# --- on the miniature ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_concept_is_gone_from_three_fine_tunes_and_others_are_not(type_in: Type, tmp_path: Path) -> None:
    from realera.backbones.unet import UNetBackbone
    from realera.contracts import Prompt, Sampler
    from realera.judges.miniature import MiniatureJudge

    words = ("concept=airplane", "method=valera", "backbone=mini", "evaluate=false", "logger=none", "run_dir=run")
    assert type_in(*words, command="train") == 0
    words = ("concept=ship", "method=uce", "backbone=mini", "evaluate=false", "logger=none", "run_dir=second")
    assert type_in(*words, command="train") == 0
    assert type_in("run=run", "to=map", "out=exported", command="export") == 0
    names = [fine_tuned(paths.MINIATURE, tmp_path / "models" / f"m{i}", i).name for i in range(3)]
    assert type_in("map=exported", "pretrained=models/*", "out=erased") == 0
    assert type_in("map=[exported,second]", "pretrained=models/*", "out=composed") == 0
    judge, sampler, seeds = MiniatureJudge(), Sampler("dpm++", 20, 5.0, 32, 32), list(range(8))

    def shown(place: Path, concept: str) -> float:
        """The share of images in which the judge sees the concept."""
        from PIL import Image

        backbone = UNetBackbone("mini", place, sampler)
        pixels = backbone.generate([f"a photo of the {concept}"] * len(seeds), seeds)
        files = [tmp_path / f"{seed}.png" for seed in seeds]
        for file, image in zip(files, pixels.cpu().numpy()):
            Image.fromarray(image).save(file)
        prompts = [Prompt(str(seed), f"a photo of the {concept}", concept, "erase", seed) for seed in seeds]
        return sum(verdict.label == concept for verdict in judge(files, prompts)) / len(seeds)

    for name in names:
        source = tmp_path / "models" / name
        found = {
            (at, concept): shown(tmp_path / at / name if at else source, concept)
            for at in ("", "erased", "composed")
            for concept in ("airplane", "ship", "cat")
        }
        print(name, found)
        assert min(found["", concept] for concept in ("airplane", "ship", "cat")) >= 0.75
        assert found["erased", "airplane"] <= 0.15 and found["composed", "airplane"] <= 0.15
        assert found["erased", "ship"] >= 0.75 and found["composed", "ship"] <= 0.15
        assert min(found["erased", "cat"], found["composed", "cat"]) >= 0.75

    pipe = DiffusionPipeline.from_pretrained(tmp_path / "models" / names[0], safety_checker=None)
    before = weights(pipe)
    realera.apply(pipe, tmp_path / "exported").undo()
    assert same(weights(pipe), before)
