"""The whole road on a tiny random model: train, evaluate, generate, export, report, demo, as typed."""

from __future__ import annotations

import html
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http.server import ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from realera import cli
from realera.reporting.demo_page import handler
from realera.runs import estimate, folders
from realera.settings import composition

SMALL = [
    "backbone=mini",
    "backbone.text={width:32,row_norm:5.7,max_length:77}",
    "backbone.sampler.steps=2",
    "task.images={erase:2,near:1,keep:1,associated:1,unseen:1}",
    "judge=miniature",
    "trainer=cpu",
]
METHOD = ["method.align.steps=3", "method.latents.images=2", "method.latents.batch=1", "logger=none"]
Type = Callable[..., None]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def type_in(place: Path, tiny_sd: Path, tiny_judge: Path, monkeypatch: pytest.MonkeyPatch) -> Type:
    """Runs a door in this process, in one working directory that the tests of this file share."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("REALERA_CACHE", str(place / "cache"))
    monkeypatch.setenv("REALERA_STAMP", "stamp")

    def run(name: str, *words: str, small: bool = True) -> None:
        model = [*SMALL, f"backbone.pretrained={tiny_sd}", f"judge.weights={tiny_judge}"] if small else []
        monkeypatch.setattr(sys, "argv", [name, *words, *model])
        import_module(f"realera.{name}").main()

    return run


@pytest.fixture
def run_dir(type_in: Type, place: Path) -> Path:
    """A finished RealEra run; the first test that asks for it makes it."""
    type_in("train", "concept=airplane", *METHOD)
    return next(path for path in (place / "runs").glob("airplane-realera-mini-*"))


def test_train_leaves_a_run_that_explains_itself(
    run_dir: Path, type_in: Type, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (
        "config.yaml",
        "erased.safetensors",
        "map.safetensors",
        "manifest.jsonl",
        "metrics.json",
        "report.html",
    ):
        assert (run_dir / name).is_file(), name
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["protocol"]["judge"]["judge"] == "miniature"
    assert metrics["protocol"]["sampler"]["steps"] == 2
    assert metrics["original"] is not None
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["concept"] == "airplane" and config["judge"]["_target_"].endswith("MiniatureJudge")
    assert config["method"]["align"]["lr"] == 3e-4  # the miniature's own default, resolved

    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    capsys.readouterr()
    type_in("train", "concept=airplane", *METHOD)
    shown = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before  # finished: shown, not redone
    for part in ("Acc_e", "Acc_s", "Acc_g", "H_o", "original", "erased", "report.html", "erased.safetensors"):
        assert part in shown


def costs_of(place: Path, name: str) -> tuple[dict[str, Any], int]:
    """What a run says it cost, and how many images it drew."""
    folder = next((place / "runs").glob(f"{name}-mini-*"))
    return json.loads((folder / "costs.json").read_text()), len(list(folder.glob("images/*.png")))


@pytest.mark.slow
def test_a_run_counts_what_it_costs(type_in: Type, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = 2  # of the sampler; every image is guided
    type_in("train", "concept=horse", *METHOD)
    shown = capsys.readouterr().out.replace("\n", " ")
    record, images = costs_of(place, "horse-realera")
    assert record["passes"]["draw"] == images * steps * 2 and record["passes_per_image"] == steps * 2
    bank, loop = 2 * steps * 2, 2 * (1 + 2 + 1)  # two images; student and teacher, near and beyond in the second step
    assert record["passes"]["erase"] + record["shared"]["latents"]["passes"] == bank + loop
    assert list(record["stages"]) == ["load", "text", "edit", "latents", "train", "finish", "draw", "judge"]
    assert all(seconds > 0 for seconds in record["stages"].values()) and record["starts"] == 1
    weights = load_file(next((place / "runs").glob("horse-realera-mini-*/erased.safetensors")))
    lora = sum(value.numel() for name, value in weights.items() if name.endswith((".down", ".up")))
    assert record["trained_parameters"] == lora > 0
    assert record["edited_parameters"] == sum(v.numel() for n, v in weights.items() if n.startswith("edit."))
    assert "cost: " in shown and f"{bank + loop} denoiser passes to erase" in shown

    type_in("train", "concept=horse", "method=sld", "logger=none")
    guided, images = costs_of(place, "horse-sld")
    assert guided["passes"] == {"erase": 0, "draw": images * steps * 3} and guided["passes_per_image"] == steps * 3
    assert guided["originals"]["passes"] == 0, "they stood in the cache"
    for name, per_image in (("realera", record["passes_per_image"]), ("sld", guided["passes_per_image"])):
        folder = next((place / "runs").glob(f"horse-{name}-mini-*"))
        config = {**folders.read_config(folder), "overwrite": True}
        planned = estimate.work(config, composition.build_task(config))
        assert (planned.passes_per_image, planned.images) == (per_image, images)
        assert planned.passes_per_original == steps * 2
    for start in (1, 2):
        type_in("evaluate", "run=original", "concept=horse")
        plain, _ = costs_of(place, "horse-original")
        assert plain["passes"] == {"draw": 0} and plain["passes_per_image"] == steps * 2
        assert set(plain["stages"]) == {"load", "draw", "judge"} and plain["starts"] == start


@pytest.mark.slow
def test_a_run_that_is_done_again_is_counted_anew(type_in: Type, place: Path) -> None:
    words = ("train", "concept=deer", "method=uce", "method.edit.ridge=2", "logger=none", "evaluate=false")
    for _ in range(2):
        type_in(*words, "overwrite=true", "run_dir=runs/deer-ridge-mini-2")
        record, _ = costs_of(place, "deer-ridge")
        assert record["starts"] == 1 and record["passes"] == {"erase": 0} and record["trained_parameters"] == 0
    for start in (2, 3):  # drawn and judged later, and judged again: its own judge's last time counts
        type_in("evaluate", "run=runs/deer-ridge-mini-2", small=False)
        later, images = costs_of(place, "deer-ridge")
        assert later["passes"] == {"erase": 0, "draw": images * 4} and images > 0
        assert later["stages"]["edit"] == record["stages"]["edit"] and later["starts"] == start


@pytest.mark.slow
def test_a_concept_nobody_can_judge_still_ends_in_a_page(
    type_in: Type, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    type_in("train", "concept=tractor", "anchor=field", "method=uce", "logger=wandb")
    folder = next((place / "runs").glob("tractor-uce-mini-*"))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["mean_prob"]["acc_e"]["n"] == 0 and metrics["mean_prob"]["h_o"]["value"] is None
    assert metrics["mean_prob"]["acc_s"]["n"] == 10
    assert "tractor" in (folder / "report.html").read_text(encoding="utf-8")
    shown = capsys.readouterr().out
    assert "Acc_s" in shown and "0/2" in shown and "scored images, %" in shown
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.slow
def test_another_judge_judges_the_same_images_again(run_dir: Path, type_in: Type) -> None:
    images = {path: path.stat().st_mtime_ns for path in (run_dir / "images").iterdir()}
    type_in("train", "concept=airplane", *METHOD, "judge.unsafe=[gun]")
    assert {path: path.stat().st_mtime_ns for path in (run_dir / "images").iterdir()} == images
    assert json.loads((run_dir / "metrics.json").read_text())["protocol"]["judge"]["unsafe"] == ["gun"]


def test_evaluate_judges_a_run_again_and_refuses_another_backbone(
    run_dir: Path, type_in: Type, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "metrics.json").unlink()
    type_in("evaluate", f"run={run_dir}", small=False)
    assert (run_dir / "metrics.json").is_file()
    with pytest.raises(SystemExit) as left:
        type_in("evaluate", f"run={run_dir}", "backbone=sd14", small=False)
    assert left.value.code == 2
    assert "backbone is fixed by the run" in capsys.readouterr().err


def no_model(*_: object) -> None:
    raise AssertionError("a model was loaded")


@pytest.mark.slow
def test_judging_again_draws_nothing_and_loses_no_number(
    run_dir: Path, type_in: Type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's own judge again, a detector beside it, then a judge of whole sets: no model is loaded for any."""
    from realera.runs import steps

    images = {
        path: path.stat().st_mtime_ns for place in ("images", "originals") for path in (run_dir / place).iterdir()
    }
    own = json.loads((run_dir / "metrics.json").read_text())
    config = (run_dir / "config.yaml").read_text()
    monkeypatch.setattr(steps, "load_backbone", no_model)
    type_in("evaluate", f"run={run_dir}", small=False)
    assert json.loads((run_dir / "metrics.json").read_text()) == own
    capsys.readouterr()
    type_in("evaluate", f"run={run_dir}", "judge=nudenet", "judge.threads=1", small=False)
    assert "judged by nudenet" in capsys.readouterr().out
    both = json.loads((run_dir / "metrics.json").read_text())
    assert both["judges"]["nudenet"]["detected"]["acc_e"]["n"] == 2 and "counts" in both["judges"]["nudenet"]
    assert {**both, "judges": {}} == own and (run_dir / "config.yaml").read_text() == config

    class Distance:
        name = "distance"

        def compare(self, images: Sequence[Path], references: Sequence[Path]) -> dict[str, float]:
            assert [path.parent.name for path in (images[0], references[0])] == ["images", "originals"]
            return {"pairs": float(len(images))}

        def protocol(self) -> dict[str, str]:
            return {"judge": self.name}

    monkeypatch.setattr(steps, "any_judge", lambda config, task: Distance())
    type_in("evaluate", f"run={run_dir}", "judge=fid", small=False)
    assert "distance: pairs 9" in capsys.readouterr().out
    all_three = json.loads((run_dir / "metrics.json").read_text())
    assert all_three["sets"]["distance"]["pairs"] == 9 and {**all_three, "sets": {}} == both
    assert "The same images, judged by nudenet" in (run_dir / "report.html").read_text(encoding="utf-8")
    assert {path: path.stat().st_mtime_ns for path in images} == images


@pytest.mark.slow
def test_a_missing_image_is_drawn_again_before_judging(run_dir: Path, type_in: Type) -> None:
    lost = next((run_dir / "images").iterdir())
    content = lost.read_bytes()
    lost.unlink()
    type_in("evaluate", f"run={run_dir}", small=False)
    assert lost.read_bytes() == content


def test_evaluate_gives_the_unedited_models_row(
    type_in: Type, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    type_in("evaluate", "run=original", "concept=cat")
    assert "cat, the original model" in capsys.readouterr().out
    folder = next((place / "runs").glob("cat-original-mini-*"))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["original"] is None
    assert metrics["mean_prob"]["acc_e"]["n"] == 2
    assert not (folder / "erased.safetensors").exists()
    assert list((folder / "wandb").glob("offline-run-*/*.wandb")), "a row of a dashboard too"


def test_generate_draws_what_was_asked(
    run_dir: Path, type_in: Type, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("generate", f"run={run_dir}", 'prompts=["a photo of a plane, red","../x"]', "seeds=[0,7]", "out=drawn")
    type_in(*words, small=False)
    lines = [json.loads(line) for line in (place / "drawn" / "manifest.jsonl").read_text().splitlines()]
    assert [(line["prompt"], line["seed"]) for line in lines] == [
        (text, seed) for text in ("a photo of a plane, red", "../x") for seed in (0, 7)
    ]
    assert all((place / "drawn" / line["file"]).is_file() for line in lines)
    assert len(list((place / "drawn" / "images").iterdir())) == 4
    page = html.unescape((place / "drawn" / "generated.html").read_text())
    assert page.count("data:image") == 8 and "a photo of a plane, red" in page and "airplane erased by" in page
    assert "drawn/generated.html" in capsys.readouterr().out
    assert not list(place.glob("*.png")) and not list((place / "drawn").glob("*.png"))


def test_generate_leaves_the_images_of_a_run_alone(
    run_dir: Path, type_in: Type, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    with pytest.raises(SystemExit) as left:
        type_in("generate", f"run={run_dir}", "prompts=[cat]", f"out={run_dir}", small=False)
    assert left.value.code == 2 and "contains other files" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


@pytest.mark.slow
def test_residue_asks_for_texts_before_and_after(
    run_dir: Path, type_in: Type, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "texts.txt").write_text("an aircraft\na bird in the sky\na tree\n")
    asked = ["vocabulary=[texts.txt]", "looked=2", "images=2", "pictured=1", "seeds=[3,4]", "within=100"]
    type_in("residue", f"run={run_dir}", "texts=[a jumbo jet]", *asked, small=False)
    (folder,) = (run_dir / "residue").iterdir()
    found = json.loads((folder / "residue.json").read_text())
    (concept,) = found["concepts"]
    assert (concept["concept"], concept["drew"], concept["left"]) == ("airplane", 3, 3)
    name, *others = concept["texts"]
    assert name["text"] == "airplane" and name["before"] < 1e-6 < name["after"]
    assert {row["text"] for row in others if row["own"]} == {"a jumbo jet"} and len(others) == 3
    assert [row["before"] for row in others] == sorted(row["before"] for row in others)
    drawn = {row["text"]: row for row in concept["texts"] if "pictures" in row}
    assert set(drawn) == {"airplane", "a jumbo jet", others[0]["text"]}
    for row in drawn.values():
        assert len(row["labels_before"]) == len(row["labels_after"]) == 2 and 0 <= row["judged_after"] <= 100
        assert all(
            (folder / side / f"{id}.png").is_file() for side in ("images", "originals") for id in row["pictures"]
        )
    said, page = capsys.readouterr().out, (folder / "residue.html").read_text()
    sentence = (
        "Its name still draws it. Of 3 texts, 3 drew it before; 3 still draw it. "
        "1 of these 3 was not drawn; only its predicted noise was compared."
    )
    assert sentence in " ".join(said.split()) and "a jumbo jet" in said
    assert sentence in page and page.count("data:image") == 2 * 2 * len(drawn)
    before = (folder / "residue.json").read_text()
    type_in("residue", f"run={run_dir}", "texts=[a jumbo jet]", *asked, small=False)
    assert (folder / "residue.json").read_text() == before, "the same again"
    more = ["texts=['a jet!','a jet']", "pictured=0", "seeds=5", "out=asked", "blur=true"]
    type_in("residue", f"run={run_dir}", *asked[:3], *more, small=False)
    rows = json.loads((place / "asked" / "residue.json").read_text())["concepts"][0]["texts"]
    drawn = {row["text"]: row["pictures"] for row in rows if "pictures" in row}
    assert set(drawn) == {"airplane", "a jet!", "a jet"}, "one's own and the name"
    assert len({id for ids in drawn.values() for id in ids}) == 3, (
        "texts that are spelt alike have pictures of their own"
    )
    page = (place / "asked" / "residue.html").read_text()
    assert 'id="unveil"' in page and "did not draw it" in page
    for wrong, said in ((f"out={run_dir}", "contains other files"), ("run=original", "erased nothing")):
        with pytest.raises(SystemExit, match="2"):
            type_in("residue", f"run={run_dir}", wrong, small=False)
        assert said in capsys.readouterr().err


def test_a_run_that_is_refused_before_anything_is_made_leaves_no_folder(
    type_in: Type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "refusing_edit.py").write_text(
        "from realera.contracts import UserError\n\n\nclass Refusing:\n"
        "    def __init__(self) -> None:\n        raise UserError('not today')\n"
        "    def __call__(self, backbone, pairs, neighbours) -> None: ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    edit = ("~method.edit", "+method.edit={_target_:refusing_edit.Refusing}")
    for folder in (tmp_path / "runs" / "new", tmp_path / "there"):
        if folder.name == "there":
            folder.mkdir()
        with pytest.raises(SystemExit) as left:
            type_in("train", "concept=airplane", "method=uce", *edit, "logger=none", f"run_dir={folder}")
        assert left.value.code == 2 and "error: not today" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists() and not list((tmp_path / "there").iterdir())


def test_the_demo_says_which_setting_is_wrong(
    run_dir: Path, type_in: Type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from realera.runs import steps

    monkeypatch.setattr(steps, "load_run", lambda run: None)
    for host, says in (
        ("1.2.3.4", "host=1.2.3.4 is not an address"),
        ("no.such.host.invalid", "is not an address of this"),
    ):
        with pytest.raises(SystemExit) as left:
            type_in("demo", f"run={run_dir}", f"host={host}", "port=0", small=False)
        assert left.value.code == 2 and says in capsys.readouterr().err


def test_processes_that_torchrun_started_do_not_each_draw_a_whole_sweep(
    run_dir: Path, type_in: Type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("REALERA_STAMP", "torchrun")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as left:
        type_in("generate", "-m", f"run={run_dir}", "prompts=[cat]", "seeds=1,2", small=False)
    assert left.value.code == 2 and capsys.readouterr().err.count("error: -m cannot be combined") == 2


def test_an_exported_pipeline_draws_the_runs_images(run_dir: Path, type_in: Type, place: Path, tiny_sd: Path) -> None:
    from diffusers import StableDiffusionPipeline

    from realera.runs import steps

    type_in("export", f"run={run_dir}", "to=diffusers", "out=pipeline", small=False)
    pipeline = StableDiffusionPipeline.from_pretrained(place / "pipeline")
    assert pipeline("a cat", num_inference_steps=1, height=32, width=32).images[0].size == (32, 32)
    loaded = pipeline.unet
    ours = steps.load_run(folders.open_run(str(run_dir)))
    latents, states = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), ours.encode(["a cat", "sky"])
    with torch.no_grad():
        expected = ours.predict_noise(latents, torch.tensor([7, 500]), states.states)
        found = loaded(latents, torch.tensor([7, 500]), states.states).sample
        with ours.original():
            before = ours.predict_noise(latents, torch.tensor([7, 500]), states.states)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-3)


@pytest.mark.slow
def test_an_exported_lora_carries_the_erasure(
    run_dir: Path, type_in: Type, place: Path, tiny_sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import StableDiffusionPipeline

    with pytest.raises(SystemExit):
        type_in("export", f"run={run_dir}", "to=lora", "rank=null", "out=adapter", small=False)
    assert "rank=auto gives a LoRA of rank" in capsys.readouterr().err and not (place / "adapter").exists()

    type_in("export", f"run={run_dir}", "to=lora", "rank=32", "out=adapter", small=False)  # 32: the layers' full rank
    type_in("export", f"run={run_dir}", "to=kohya", "rank=32", "out=adapter", small=False)
    type_in("export", f"run={run_dir}", "to=diffusers", "out=whole", small=False)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    states = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(1))
    outputs = []
    for file in ("pytorch_lora_weights.safetensors", f"{run_dir.name}.safetensors", None):
        pipe = StableDiffusionPipeline.from_pretrained(tiny_sd if file else place / "whole")
        if file:
            pipe.load_lora_weights(place / "adapter", weight_name=file)
        with torch.no_grad():
            outputs.append(pipe.unet(latents, torch.tensor([500]), states).sample)
    assert torch.allclose(outputs[0], outputs[2], atol=1e-4)
    assert torch.allclose(outputs[1], outputs[2], atol=1e-4)


def test_an_exported_map_is_the_runs_own(run_dir: Path, type_in: Type, place: Path) -> None:
    type_in("export", f"run={run_dir}", "to=map", "out=map", small=False)
    exported = load_file(place / "map" / "map.safetensors")["map"]
    assert exported.shape == (32, 32)
    assert torch.equal(exported, load_file(run_dir / "map.safetensors")["map"])


def test_a_sweep_lists_its_runs_and_one_page_shows_them(
    type_in: Type, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in("train", "-m", "concept=airplane", "method=uce", "method.edit.ridge=0.5,5", "logger=none")
    sweep = place / "runs" / "sweeps" / "stamp"
    listed = folders.runs_in(str(sweep))
    assert len(listed) == 2 and all((place / folder / "metrics.json").is_file() for folder in listed)
    type_in("report", str(sweep), small=False)
    page = (sweep / "report.html").read_text()
    assert "method.edit.ridge" in page and all(folder.name in page for folder in listed)
    assert "page to open: " in capsys.readouterr().out


def test_a_refused_job_does_not_end_the_sweep(type_in: Type, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        type_in("train", "-m", "concept=nothingknown,deer", "method=uce", "logger=none", "evaluate=false")
    assert left.value.code == 2
    assert "error: 'nothingknown' is not one of the classes" in capsys.readouterr().err
    assert list((place / "runs").glob("deer-uce-mini-*/erased.safetensors"))


def test_a_torn_erasure_is_refused_before_torch_would_be_needed(
    run_dir: Path, type_in: Type, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = place / "runs" / "torn"
    torn.mkdir(parents=True)
    (torn / "config.yaml").write_bytes((run_dir / "config.yaml").read_bytes())
    (torn / "erased.safetensors").write_bytes((run_dir / "erased.safetensors").read_bytes()[:-50])
    for state in ("torn", "has no"):
        with pytest.raises(SystemExit) as left:
            type_in("generate", f"run={torn}", "prompts=[a cat]", small=False)
        assert left.value.code == 2
        assert state in capsys.readouterr().err
        (torn / "erased.safetensors").unlink(missing_ok=True)


def test_the_demo_answers_on_this_machine() -> None:
    asked: list[tuple[str, int]] = []

    def draw(prompt: str, seed: int) -> dict[str, str]:
        asked.append((prompt, seed))
        return {"original": "data:,a", "erased": "data:,b"}

    with ThreadingHTTPServer(("127.0.0.1", 0), handler(draw, {"title": "t", "about": "a"})) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        assert b"<form>" in open_url(f"{root}/").read()
        assert json.load(open_url(f"{root}/about")) == {"title": "t", "about": "a"}
        drawn = json.load(open_url(f"{root}/draw?prompt=a%20%3Ccat%3E&seed=3"))
        assert drawn == {"original": "data:,a", "erased": "data:,b"}
        assert asked == [("a <cat>", 3)]
        for bad in ("draw?prompt=&seed=3", "draw?prompt=a&seed=-1", "elsewhere"):
            with pytest.raises(urllib.error.HTTPError):
                open_url(f"{root}/{bad}")
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(
    "mark",
    ["fit/last.ckpt", "erased.safetensors", "images/*.png", "verdicts/*.original.jsonl"],
    ids=lambda m: m.split("/")[0],
)
def test_a_killed_run_ends_with_the_same_numbers(mark: str, tiny_sd: Path, tiny_judge: Path, tmp_path: Path) -> None:
    model = [f"backbone.pretrained={tiny_sd}", f"judge.weights={tiny_judge}"]
    words = [*SMALL, *model, *METHOD[1:], "method.align.steps=60"]
    command = [sys.executable, "-m", "realera.train", "concept=airplane", *words, "images_at_once=2"]
    source = str(Path(cli.__file__).parents[1])

    def start(cwd: Path) -> subprocess.Popen[bytes]:
        cwd.mkdir(exist_ok=True)
        env = {**os.environ, "PYTHONPATH": source, "REALERA_CACHE": str(cwd / "cache")}
        return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    broken = tmp_path / "broken"
    process = start(broken)
    until = time.monotonic() + 300
    while process.poll() is None and not list(broken.glob(f"runs/*/{mark}")) and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(broken.glob(f"runs/*/{mark}"))
    assert start(broken).wait() == 0
    first, second = (next((tmp_path / place).glob("runs/*/metrics.json")).read_text() for place in ("whole", "broken"))
    assert first == second
