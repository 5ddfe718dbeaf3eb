"""Exports: which forms a run can have, their files, and what they say of themselves."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from realera import paths
from realera.backbones import original_layout, portable, single_file
from realera.contracts import UserError
from realera.exporting import forms
from realera.files import json_shapes
from realera.runs import applying
from realera.runs import folders as run_folders
from realera.runs.folders import Run
from realera.settings import composition
from realera.training import checkpoint, maps
from realera.training.checkpoint import Origin

VALUE = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v.weight"
BIAS = "conv_out.bias"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("realera"), "propagate", True)
    caplog.set_level(logging.INFO, "realera")
    return caplog


def made(monkeypatch: pytest.MonkeyPatch, folder: Path, state: dict[str, torch.Tensor], *words: str) -> Run:
    """A run on the miniature whose erased weights are `state`."""
    given = ["concept=airplane", "backbone=mini", "method=valera", *words]
    config = composition.settings_of("train", given)
    config = composition.name_concepts(config, composition.build_task(config))
    origin = Origin(config, "mini", "0" * 16, run_folders.digest(run_folders.identity(config)))
    monkeypatch.setattr(forms, "read_erased", lambda _: SimpleNamespace(state=state, origin=origin))
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, config)


@pytest.fixture(scope="module")
def base() -> dict[str, torch.Tensor]:
    return portable.base_denoiser(paths.MINIATURE)


def rank_one(base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An edit of rank 1 of one value layer."""
    weight = base[VALUE].float()
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, generator=generator) for size in weight.shape)
    return {f"edit.{VALUE}": weight + 0.1 * torch.outer(left, right) / right.norm()}


NOT_DRAWN = forms.Options(verify=0)
TEXT = "text_encoder.encoder.layers.1.mlp.fc1.weight"


@pytest.fixture(scope="module")
def text_change() -> dict[str, torch.Tensor]:
    """A change of one weight of the text encoder, far enough to be seen."""
    base = {n.removeprefix("text_model."): w for n, w in portable.part_state(paths.MINIATURE, "text_encoder").items()}
    weight = base[TEXT.removeprefix("text_encoder.")].float()
    return {f"edit.{TEXT}": weight + 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("to", ["checkpoint", "diffusers"])
@pytest.mark.slow
def test_a_changed_text_encoder_is_exported(
    to: forms.Form, text_change: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableDiffusionPipeline

    run = made(monkeypatch, tmp_path / "run", text_change)
    found = forms.export(run, to, tmp_path / "out", forms.Options(dtype="float32", verify=2))
    assert found.distance is not None and found.distance < 0.1 and found.left_out == {}
    if to == "diffusers":
        model = StableDiffusionPipeline.from_pretrained(found.path, safety_checker=None).text_encoder
        own = {n.removeprefix("text_model."): w for n, w in model.state_dict().items()}
        assert torch.equal(own[TEXT.removeprefix("text_encoder.")], text_change[f"edit.{TEXT}"])
    back = forms.verification.exported_weights(paths.MINIATURE, to, found.path)
    assert back.keys() == text_change.keys() and all(torch.equal(back[key], text_change[key]) for key in back)


@pytest.mark.parametrize("to", ["lora", "kohya"])
def test_a_lora_says_how_much_of_the_text_encoder_it_leaves_out(
    to: forms.Form,
    text_change: dict[str, torch.Tensor],
    base: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = made(monkeypatch, tmp_path / "run", text_change)
    with pytest.raises(UserError, match=f"changed the text encoder and not the U-Net, and to={to} holds only"):
        forms.export(run, to, tmp_path / "none", NOT_DRAWN)
    run = made(monkeypatch, tmp_path / "run", rank_one(base) | text_change)
    found = forms.export(run, to, tmp_path / "out", NOT_DRAWN)
    original = portable.part_state(paths.MINIATURE, "text_encoder")
    weight = {n.removeprefix("text_model."): w for n, w in original.items()}[
        TEXT.removeprefix("text_encoder.")
    ].double()
    share = float((text_change[f"edit.{TEXT}"].double() - weight).norm() / weight.norm())
    assert found.error < 0.01 and f"it is {share:.1%} of" in found.left_out["change of the text encoder"]


def test_a_map_without_a_closed_form_is_refused(
    text_change: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(monkeypatch, tmp_path / "run", text_change, "method=advunlearn")
    with pytest.raises(UserError, match=r"has no map\.safetensors"):
        forms.export(run, "map", tmp_path / "out", NOT_DRAWN)


def test_a_checkpoint_has_the_original_layout_and_says_where_it_comes_from(
    base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(monkeypatch, tmp_path / "a-run", state := rank_one(base))
    found = forms.export(run, "checkpoint", tmp_path / "out", NOT_DRAWN)
    assert found.path == tmp_path / "out" / "a-run.safetensors"
    with safe_open(found.path, "pt") as reader:
        head, names = reader.metadata(), set(reader.keys())
        there = reader.get_tensor(original_layout.unet_names(base)[VALUE])
    assert torch.equal(there, state[f"edit.{VALUE}"].to(base[VALUE].dtype))  # the base model's own precision
    assert original_layout.kind_of(names) == "v1" and head["modelspec.architecture"] == "stable-diffusion-v1"
    assert json.loads(head["realera.concept"]) == ["airplane"] and head["realera.method"] == "valera"
    assert head["realera.base_model"] == "realera's miniature" and json.loads(head["realera.left_out"]) == {}


@pytest.mark.quick(3)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("to", ["checkpoint", "diffusers", "lora", "kohya"])
def test_every_form_has_the_asked_precision_and_a_card(
    to: forms.Form, dtype: str, base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import ModelCard

    run = made(monkeypatch, tmp_path / "run", rank_one(base))
    found = forms.export(run, to, tmp_path / "out", forms.Options(verify=0, dtype=dtype))
    files = [found.path] if found.path.is_file() else sorted(found.path.glob("*/*.safetensors"))
    assert {value.dtype for file in files for value in load_file(file).values() if value.is_floating_point()} == {
        forms.DTYPES[dtype]
    }
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "apache-2.0" and "valera" in card.data.tags
    assert "was not judged" in card.text and "airplane" in card.text


def test_without_a_precision_a_pipeline_keeps_that_of_its_base(
    base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(monkeypatch, tmp_path / "run", rank_one(base))
    forms.export(run, "diffusers", tmp_path / "out", forms.Options(verify=0, variant="fp16", shard_size="2MB"))
    files = sorted(file.name for file in (tmp_path / "out" / "unet").iterdir())
    shards = [file for file in files if file.startswith("diffusion_pytorch_model.fp16-00001-of-0000")]
    assert len(shards) == 1
    assert "diffusion_pytorch_model.safetensors.index.fp16.json" in files
    again = portable.part_state(tmp_path / "out", "unet")
    assert {name: value.dtype for name, value in again.items()} == {name: value.dtype for name, value in base.items()}

    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out", variant="fp16", local_files_only=True)
    own = dict(pipe.unet.named_parameters())[VALUE]
    assert torch.equal(own.half(), again[VALUE].half())


def test_auto_takes_the_smallest_rank_and_a_given_rank_is_judged(
    base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    state = rank_one(base)
    run = made(monkeypatch, tmp_path / "run", state)
    found = forms.export(run, "kohya", tmp_path / "one", NOT_DRAWN)
    flat = f"lora_unet_{VALUE.removesuffix('.weight').replace('.', '_')}"
    lora = load_file(found.path)
    assert found.error < 1e-6 and lora[f"{flat}.lora_down.weight"].shape[0] == 1 and lora[f"{flat}.alpha"] == 1
    change = portable.read_lora(found.path, "kohya", {VALUE.removesuffix(".weight"): flat})[VALUE]
    assert torch.allclose(change, state[f"edit.{VALUE}"].double() - base[VALUE].double(), atol=1e-6)

    generator = torch.Generator().manual_seed(1)
    state[f"edit.{VALUE}"] = base[VALUE].float() + torch.randn(base[VALUE].shape, generator=generator)
    found = forms.export(run, "lora", tmp_path / "two", forms.Options(verify=0, rank=2))
    assert found.error > 0.5 and f"misses {100 * found.error:.2f}% of the change" in said.text
    assert "misses" in (tmp_path / "two" / "README.md").read_text()
    with pytest.raises(UserError, match=r"rank=auto gives a LoRA of rank \d+ with an error of at most 1.0%"):
        forms.export(run, "lora", tmp_path / "three", forms.Options(verify=0, rank=None))


def test_weights_that_a_lora_cannot_hold_are_named_with_their_share(
    base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    state = {**rank_one(base), f"edit.{BIAS}": base[BIAS].float() + 1}
    run = made(monkeypatch, tmp_path / "run", state)
    found = forms.export(run, "lora", tmp_path / "out", NOT_DRAWN)
    (part,) = found.left_out
    assert part == "change of 1 biases and norms" and "a LoRA cannot hold them" in said.text
    whole = sum(float((value.double() - base[name[5:]].double()).square().sum()) for name, value in state.items())
    assert found.error == pytest.approx((base[BIAS].numel() / whole) ** 0.5, rel=1e-3)
    with safe_open(found.path, "pt") as reader:
        assert part in json.loads(reader.metadata()["realera.left_out"])


def test_a_change_of_high_rank_is_refused_with_its_rank(
    base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portable, "MOST", 4)
    state = {f"edit.{VALUE}": torch.randn(base[VALUE].shape, generator=torch.Generator().manual_seed(1))}
    run = made(monkeypatch, tmp_path / "run", state)
    with pytest.raises(UserError, match=r"needs rank \d\d+ .*attn2.to_v.*to=diffusers"):
        forms.export(run, "kohya", tmp_path / "out", NOT_DRAWN)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["checkpoint", "kohya"])
@pytest.mark.slow
def test_the_file_draws_what_the_run_draws(
    to: forms.Form, base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(monkeypatch, tmp_path / "run", rank_one(base), "backbone.sampler.steps=3")
    found = forms.export(run, to, tmp_path / "out", forms.Options(verify=2))
    assert found.distance is not None and found.distance < 0.1
    assert "of 255 grey levels" in (tmp_path / "out" / "README.md").read_text()


def test_a_file_that_draws_something_else_is_a_warning(
    base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    state = {f"edit.{BIAS}": base[BIAS].float() + 0.5, **rank_one(base)}
    run = made(monkeypatch, tmp_path / "run", state, "backbone.sampler.steps=3")
    found = forms.export(run, "lora", tmp_path / "out", forms.Options(verify=2))
    assert found.distance is not None and found.distance > 2
    assert any(record.levelname == "WARNING" and "grey levels" in record.getMessage() for record in said.records)


def test_a_run_that_only_guides_is_refused_and_a_guide_beside_weights_is_said(
    base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    run = made(monkeypatch, tmp_path / "run", {}, "method=sld")
    with pytest.raises(UserError, match=r"SafetyGuidance acts while images are drawn.*generate run=.*run"):
        forms.export(run, "diffusers", tmp_path / "out", NOT_DRAWN)
    run = made(monkeypatch, tmp_path / "run", rank_one(base), "method=sld")
    found = forms.export(run, "checkpoint", tmp_path / "out", NOT_DRAWN)
    assert list(found.left_out) == ["SafetyGuidance"] and "not in the export: the SafetyGuidance" in said.text
    assert "Without the SafetyGuidance" in (tmp_path / "out" / "README.md").read_text()


LORA = {"steps": 2, "lora": {"rank": 1}}
FUSION = {"_target_": "realera.methods.mace.Fusion"}


@pytest.mark.parametrize(
    ("parts", "left"),
    [
        ({"align": None, "finish": None}, []),
        ({"align": {**LORA, "steps": 0}, "finish": FUSION}, []),
        ({"align": LORA, "finish": None}, ["LoRA"]),
        ({"align": LORA, "finish": FUSION}, ["LoRA", "fusion"]),
        ({"align": {"steps": 2, "lora": None}, "finish": None}, ["training"]),
    ],
)
def test_a_map_that_is_a_part_of_the_erasure_says_so(
    parts: dict[str, Any], left: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(monkeypatch, tmp_path / "run", {})
    run.config["method"] |= parts
    save_file({"map": torch.eye(2)}, run.folder / paths.MAP, {"text_encoder": "{}"})
    found = forms.export(run, "map", tmp_path / "out", NOT_DRAWN)
    assert (tmp_path / "out" / paths.MAP).read_bytes() == (run.folder / paths.MAP).read_bytes()
    assert list(found.left_out) == left


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dtype": "int8"}, "dtype=int8 is none of"),
        ({"variant": "../x"}, "is not a name such as fp16"),
        ({"shard_size": "big"}, "is not a size such as 5GB"),
        ({"rank": 0}, "is not auto, null or a whole number"),
        ({"error": 1.5}, "is not between 0 and 1"),
        ({"verify": -1}, "is not a whole number from 0"),
        ({"push": "me"}, "is not USER/NAME"),
        ({"push": 1}, "is not USER/NAME"),
        ({"variant": 16}, "is not a name such as fp16"),
        ({"shard_size": 5}, "is not a size such as 5GB"),
        ({"error": "small"}, "is not between 0 and 1"),
        ({"error": float("nan")}, "is not between 0 and 1"),
        ({"ranks": 4}, "export has no option 'ranks': its options are dtype, variant"),
    ],
)
def test_an_option_that_cannot_be_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        forms.options_of(options)


def test_push_is_refused_before_anything_is_written(
    base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(monkeypatch, tmp_path / "run", rank_one(base))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        forms.export(run, "lora", tmp_path / "out", forms.Options(verify=0, push="me/it"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="hf auth login"):
        forms.export(run, "lora", tmp_path / "out", forms.Options(verify=0, push="me/it"))
    assert not (tmp_path / "out").exists()


def test_push_uploads_the_folder(
    base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []

    class Hub:
        def create_repo(self, name: str, **more: Any) -> None:
            calls.append((name, more["private"]))

        def upload_folder(self, **more: Any) -> str:
            calls.append((more["repo_id"], sorted(file.name for file in Path(more["folder_path"]).iterdir())))
            return "there"

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    run = made(monkeypatch, tmp_path / "run", rank_one(base))
    forms.export(run, "kohya", tmp_path / "out", forms.Options(verify=0, push="me/it"))
    assert calls == [("me/it", True), ("me/it", ["README.md", "run.safetensors"])]


def test_a_pipeline_names_classes_of_diffusers_and_transformers_alone(tmp_path: Path) -> None:
    index = {
        "_class_name": ["pipeline", "Evil"],
        "scheduler": ["subprocess", "Popen"],
        "unet": ["evil_module", "Net"],
        "vae": ["diffusers", "AutoencoderKL"],
        "extra": ["os", "system"],
        "force_zeros_for_empty_prompt": True,
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    written = portable._index(tmp_path)
    assert written["_class_name"] == "StableDiffusionPipeline" and written["force_zeros_for_empty_prompt"] is True
    assert {value[0] for value in written.values() if isinstance(value, list)} == {"diffusers", "transformers", None}


@pytest.mark.parametrize("to", ["lora", "kohya"])
def test_diffusers_reads_a_lora_whose_layers_need_different_ranks(
    to: forms.Form, base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableDiffusionPipeline

    key, generator = VALUE.replace("to_v", "to_k"), torch.Generator().manual_seed(0)
    rows, columns = base[key].shape
    change = torch.randn(rows, 3, generator=generator) @ torch.randn(3, columns, generator=generator)
    state = {**rank_one(base), f"edit.{key}": base[key].float() + 0.01 * change}
    found = forms.export(made(monkeypatch, tmp_path / "run", state), to, tmp_path / "out", NOT_DRAWN)
    pipe = StableDiffusionPipeline.from_pretrained(paths.MINIATURE, local_files_only=True, safety_checker=None)
    pipe.load_lora_weights(str(found.path.parent), weight_name=found.path.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = dict(pipe.unet.named_parameters())
    for name in (VALUE, key):
        assert torch.allclose(fused[name], state[f"edit.{name}"], atol=1e-5)


def test_a_readme_of_somebody_else_stays(
    base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    run = made(monkeypatch, tmp_path / "run", rank_one(base))
    (tmp_path / "README.md").write_text("# My project\n")
    forms.export(run, "kohya", tmp_path, NOT_DRAWN)
    assert (tmp_path / "README.md").read_text() == "# My project\n" and "no model card is written" in said.text
    forms.export(run, "kohya", tmp_path / "out", NOT_DRAWN)
    forms.export(run, "lora", tmp_path / "out", NOT_DRAWN)  # a card of an earlier export is replaced
    assert "load_lora_weights" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.quick(1)
@pytest.mark.parametrize("to", ["map", "lora", "kohya"])
def test_the_export_of_another_run_is_not_replaced(
    to: forms.Form, base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {}
    for name, seed in (("a", 0), ("b", 1)):
        runs[name] = made(monkeypatch, tmp_path / name / "run", rank_one(base), f"seed={seed}")
        about = maps.about("valera", ["airplane"], ["sky"], {"float16": "0"})
        origin = forms.read_erased(runs[name].erased).origin
        checkpoint.save_map(runs[name].folder / paths.MAP, torch.eye(2), origin, about=about)
    erased = {run.erased: checkpoint.read_map(run.folder / paths.MAP)[1] for run in runs.values()}
    monkeypatch.setattr(forms, "read_erased", lambda file: SimpleNamespace(state=rank_one(base), origin=erased[file]))

    def content() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    forms.export(runs["a"], to, tmp_path / "out", NOT_DRAWN)
    before = content()
    for other in ("map", "lora", "kohya"):  # of another run: no form, also where no file has the same name
        with pytest.raises(UserError, match=r"out contains .* no export of this run: give a new or an empty folder"):
            forms.export(runs["b"], other, tmp_path / "out", NOT_DRAWN)
    assert content() == before
    forms.export(runs["a"], to, tmp_path / "out", NOT_DRAWN)
    assert content().keys() == before.keys()
    (tmp_path / "out" / "README.md").write_text("# My project\n")
    with pytest.raises(UserError, match="no export of this run"):  # by the file alone
        forms.export(runs["b"], to, tmp_path / "out", NOT_DRAWN)


def test_a_file_of_somebody_else_is_not_replaced(
    base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(monkeypatch, tmp_path / "run", rank_one(base))
    save_file({"lora": torch.eye(2)}, tmp_path / "other.safetensors")
    save_file({"lora": torch.eye(2)}, tmp_path / forms.LORA_FILE)
    before = (tmp_path / forms.LORA_FILE).read_bytes()
    with pytest.raises(UserError, match=f"contains {forms.LORA_FILE}, which is no export of this run"):
        forms.export(run, "lora", tmp_path, NOT_DRAWN)
    assert (tmp_path / forms.LORA_FILE).read_bytes() == before
    forms.export(run, "kohya", tmp_path, NOT_DRAWN)  # replaces nothing
    assert (tmp_path / "other.safetensors").is_file()


def test_an_export_is_not_written_beside_the_pipeline_of_another_run(
    base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms.export(made(monkeypatch, tmp_path / "run", rank_one(base)), "diffusers", tmp_path / "out", NOT_DRAWN)
    with pytest.raises(UserError, match=r"contains README.md, which is no export of this run"):
        forms.export(
            made(monkeypatch, tmp_path / "run", rank_one(base), "seed=1"), "kohya", tmp_path / "out", NOT_DRAWN
        )


@pytest.mark.parametrize("rank", ["auto", 2, None])
def test_a_run_that_changed_biases_alone_has_no_lora(
    rank: Any, base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(monkeypatch, tmp_path / "run", {f"edit.{BIAS}": base[BIAS].float() + 1})
    with pytest.raises(UserError, match=r"biases and norms alone.*to=diffusers"):
        forms.export(run, "lora", tmp_path / "out", forms.Options(verify=0, rank=rank))
    assert not (tmp_path / "out").exists()


def test_changes_are_made_one_at_a_time(base: dict[str, torch.Tensor]) -> None:
    """All of them in double precision are twice the size of the model: 20 GB were needed to export ESD-u of SD 1.4."""
    read: list[str] = []

    class Watched(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            read.append(name)
            return super().__getitem__(name)

    state = {f"edit.{name}": base[name].float() + 1 for name in (BIAS, VALUE)}
    found = portable.changes(Watched(base), state)
    assert next(found)[0] == BIAS and read == [BIAS]
    assert next(found)[0] == VALUE and next(found, None) is None


HOSTILE = "<img src=x onerror=alert(1)> [link](http://evil) **bold** `code`"


def test_a_concept_s_name_is_words_on_the_card_and_nothing_else(
    base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import ModelCard

    run = made(monkeypatch, tmp_path / "run", rank_one(base))
    described = forms.description.describe
    monkeypatch.setattr(
        forms.description,
        "describe",
        lambda *given: replace(described(*given), concepts=(HOSTILE,), anchors=("a\n---\nb",), method="x: [y]\n- z"),
    )
    forms.export(run, "kohya", tmp_path / "out", NOT_DRAWN)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "x: [y]\n- z" in card.data.tags and card.data.license == "apache-2.0"
    assert not re.search(r"(?<!\\)<img|(?<!\\)\[link|(?<!\\)\*\*bold|(?<!\\)`code", card.text)
    assert "\n---\n" not in card.text and "onerror" in card.text


def test_the_card_names_the_folder(
    base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(monkeypatch, tmp_path / "run", rank_one(base))
    for name, shown in (("My model", "My model"), ('a"b`c', "a-b-c")):
        forms.export(run, "diffusers", tmp_path / name, NOT_DRAWN)
        assert f'from_pretrained("{shown}")' in (tmp_path / name / "README.md").read_text()


def test_the_current_folder_is_not_replaced(
    base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(monkeypatch, tmp_path / "run", rank_one(base))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"out=\. is the current folder"):
        forms.export(run, "diffusers", Path("."), NOT_DRAWN)
    forms.export(run, "kohya", Path("."), NOT_DRAWN)  # writes single files
    assert sorted(file.name for file in Path(".").iterdir()) == ["README.md", "run.safetensors"]


@pytest.mark.parametrize("to", ["diffusers", "checkpoint"])
def test_a_whole_model_has_a_record_of_its_map_and_of_those_of_its_base(
    to: forms.Form, base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(monkeypatch, tmp_path / "run", rank_one(base), "method=realera")
    forms.export(run, to, tmp_path / "none", NOT_DRAWN)
    origin = forms.read_erased(run.erased).origin
    checkpoint.save_map(run.folder / paths.MAP, torch.eye(2), origin, about=maps.about("x", ["airplane"], ["sky"], {}))
    found = forms.export(run, to, tmp_path / "out", NOT_DRAWN)
    if to == "diffusers":
        assert not (tmp_path / "none" / paths.APPLIED).exists()
        record = json.loads((tmp_path / "out" / paths.APPLIED).read_text())
    else:
        with safe_open(found.path, "pt") as reader:
            record = json.loads(reader.metadata()[single_file.APPLIED])
    assert json_shapes.fits(record, applying.RECORD)
    (entry,) = record["applied"]
    assert entry["map"] == maps.read(run.folder / paths.MAP).digest and entry["beside"] == ["LoRA"]


@pytest.mark.slow
def test_a_pipeline_s_changed_scheduler_is_exported(tmp_path: Path) -> None:
    import realera

    pipe = realera.miniature_pipeline()
    erased = realera.erase(pipe, "airplane", method="uce", progress=False)
    erased.export("diffusers", tmp_path / "same", verify=0)
    stored = (paths.MINIATURE / "scheduler" / "scheduler_config.json").read_bytes()
    assert (tmp_path / "same" / "scheduler" / "scheduler_config.json").read_bytes() == stored
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    erased.export("diffusers", tmp_path / "other", verify=1)
    again = DiffusionPipeline.from_pretrained(tmp_path / "other", local_files_only=True)
    assert type(again.scheduler) is EulerDiscreteScheduler and again.scheduler.config.timestep_spacing == "trailing"
    assert not any(file.is_symlink() for file in (tmp_path / "other").rglob("*"))
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    made_file = erased.export("checkpoint", tmp_path / "v", verify=0).path
    with safe_open(made_file, "pt") as reader:
        assert reader.metadata()["modelspec.prediction_type"] == "v"


@pytest.mark.slow
@pytest.mark.parametrize("to", ["checkpoint", "diffusers"])
def test_an_export_that_is_interrupted_while_it_draws_can_be_typed_again(
    to: forms.Form, base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(monkeypatch, tmp_path / "run", rank_one(base))
    written: list[str] = []

    def interrupted(*_: Any) -> None:
        written.extend(file.name for file in (tmp_path / "out").iterdir())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(forms.verification, "distance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            forms.export(run, to, tmp_path / "out", NOT_DRAWN)
        assert written and not (tmp_path / "out").exists()
        (tmp_path / "out").mkdir()
        with pytest.raises(KeyboardInterrupt):
            forms.export(run, to, tmp_path / "out", NOT_DRAWN)
    assert not list((tmp_path / "out").iterdir())
    forms.export(run, to, tmp_path / "out", NOT_DRAWN)
