"""The plan of a run or a sweep: counted from the settings, with shared work counted once."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from safetensors.numpy import save_file

from realera import console, costs, evaluate, paths, train
from realera.contracts import PASSES_OF_A_STEP, TrainingBatch
from realera.runs import estimate, folders
from realera.runs.estimate import Work
from realera.runs.timing import Rate
from realera.settings import composition, resolvers
from realera.sweeps import planning
from realera.system import devices, disk


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REALERA_STAMP", "stamp")
    monkeypatch.setattr(devices, "number", lambda: 0)


@pytest.fixture
def hydra() -> Iterator[None]:
    """A composing Hydra, as in a job."""
    resolvers.register_resolvers()
    with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
        yield
    HydraConfig.instance().cfg = None


def settings(*words: str) -> dict[str, Any]:
    cfg = compose("train", ["concept=airplane", *words])
    return composition.plain(cfg)


def worked(*words: str) -> Work:
    config = settings(*words)
    return estimate.work(config, composition.build_task(config))


def test_a_cell_is_counted_from_its_settings(hydra: None) -> None:
    small = "task.images={erase:4,near:2,keep:1,associated:1,unseen:1}"
    config = settings("backbone=mini", small)
    images = len(composition.build_task(config).eval_prompts())
    found = worked("backbone=mini", small)
    assert (found.images, len(found.originals), found.steps) == (images, images, 200)
    assert found.passes_per_image == 40 and sum(found.made.values()) == 64 * 20 * 2
    bare = estimate.work(config, composition.build_task(config), unedited=True)
    assert bare.images == 0 and bare.originals == found.originals
    assert worked("backbone=mini", small, "evaluate=false").images == 0
    assert worked("backbone=mini", small, "method=uce").made == {}
    both = worked("backbone=mini", "concept=[airplane,cat]", "method=mace", small)
    assert both.steps == 2 * worked("backbone=mini", "method=mace", small).steps  # one LoRA each


@pytest.mark.parametrize(
    ("method", "passes"),
    [("realera", 2), ("sld", 3), ("spm", 2), ("spm method.guide.transport=none", 2)],  # this spm guide needs no pass
)
def test_an_image_costs_the_passes_of_its_guide(method: str, passes: int, hydra: None) -> None:
    words = ["backbone=mini", *f"method={method}".split()]
    config = settings(*words)
    node = config["method"].get("guide")
    sampler = instantiate(config["backbone"]["sampler"])
    of_the_run = costs.passes_per_image(
        composition.build_task(config).eval_prompts(), sampler, instantiate(node) if node else None
    )
    found = worked(*words)
    assert found.passes_per_image == of_the_run == 20 * passes and found.passes_per_original == 20 * 2
    assert worked(*words, "backbone.sampler.guidance_scale=1").passes_per_original == 20, "nothing is guided"
    drawn = (found.images * found.passes_per_image + len(found.originals) * 40) * 0.005
    rest = (sum(found.made.values()) + found.steps * found.passes_per_step) * 0.005 + estimate.AROUND
    assert estimate.summed([found]).hours == pytest.approx((drawn + rest) / 3600, abs=0.006)


def test_the_guide_does_not_slow_down_images_of_the_original_model() -> None:
    cell = Work(
        images=10, passes_per_image=60, passes_per_original=40, originals=frozenset(range(9)), pace=(90.0, 0.0, 0.0)
    )
    assert estimate.summed([cell]).hours == round((10 * 90 + 9 * 60) / 3600, 2)


def test_work_shared_by_cells_counts_once(hydra: None) -> None:
    words = [("backbone=mini", f"seed={seed}", "method=uce") for seed in (0, 1)]
    both = estimate.summed([worked(*one) for one in words])
    alone = estimate.summed([worked(*words[0])])
    assert both.images == 2 * alone.images and both.original_images == alone.original_images == alone.images
    assert both.hours is not None and alone.hours is not None and both.hours < 2 * alone.hours
    other = estimate.summed([worked(*words[0]), worked(*words[0], "task.first_seed=1000")])
    assert other.original_images == 2 * alone.original_images


def test_inputs_that_a_method_makes_for_every_concept_count_once(hydra: None) -> None:
    cat, ship = (worked("backbone=sd14", "method=sa", f"concept={name}") for name in ("cat", "ship"))
    shared = cat.made.keys() & ship.made.keys()
    assert any(key.startswith("sums") for key in shared) and max(cat.made.values()) == cat.made[max(shared)]
    assert any(key.startswith("images") for key in cat.made.keys() - shared)  # of the anchor


@pytest.mark.parametrize("method, banks", [("realera", 2), ("mace", 3), ("fmn", 3)])  # of the anchors; of the names
def test_each_of_several_concepts_is_prepared(hydra: None, method: str, banks: int) -> None:
    method_of = ["backbone=mini", f"method={method}", *(["method.align.inversion.steps=3"] if method == "fmn" else [])]
    made = worked(*method_of, "concept=[cat,ship,gun]", "anchor=[field,sea,field]").made
    one = worked(*method_of, "concept=cat", "anchor=field").made
    assert len([key for key in made if key.startswith("images")]) == banks
    assert sum(made.values()) == sum(one.values()) * banks
    other = worked(*method_of, "concept=gun", "anchor=field").made
    assert (one == other) == (method == "realera")  # both share the images of the anchor


class Passes:
    """Counts the latents that pass through a U-Net; a pass with its gradient counts three times."""

    def __init__(self, backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        predict = backbone.predict_noise
        self.count = 0

        def counted(latents: Any, *more: Any) -> Any:
            self.count += len(latents) * (3 if torch.is_grad_enabled() else 1)
            return predict(latents, *more)

        monkeypatch.setattr(backbone, "predict_noise", counted)


def test_the_passes_of_a_step_of_spm_are_counted(
    hydra: None, new_backbone: Any, new_pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    backbone = new_backbone()
    (pair,) = new_pairs(backbone, ("cat", "field"))
    z_t, t = torch.randn(2, 4, 8, 8), torch.tensor([250, 900])
    for words in ([], ["method.align.anchors=2"], ["method.align.anchor_weight=0"]):
        config = settings("backbone=mini", "method=spm", *words)
        align = instantiate(config["method"]["align"])
        align.prepare(backbone, [pair], Path(), 0)
        passes = Passes(backbone, monkeypatch)
        align.loss(backbone, pair, None, TrainingBatch(z_t, t, 1), torch.Generator().manual_seed(0))
        rest = {key: value for key, value in config["method"].items() if key != "latents"}
        images = {"batch": 2, "renew": 0}  # z_t as they are
        planned = estimate.work(
            {**config, "method": {**rest, "latents": images}}, composition.build_task(config)
        ).passes_per_step
        assert planned - passes.count == 2 * 2, "OF_A_STEP is of two terms: 7 where SPM's own is 5"


@pytest.mark.slow
def test_the_passes_of_half_drawn_images_are_counted(
    hydra: None, new_backbone: Any, new_pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    backbone = new_backbone()
    (pair,) = new_pairs(backbone, ("cat", "field"))
    for renew, steps in ((1, 12), (5, 10)):
        words = [f"method.latents.renew={renew}", f"method.latents.steps={20 // renew}", "method.latents.chains=3"]
        config = settings("backbone=mini", "method=esd-x", "method.latents.batch=1", *words)
        source = instantiate(config["method"]["latents"])
        source.prepare(backbone, [pair], Path(), 0)
        before = backbone.passes
        for step in range(steps):
            source(backbone, 0, torch.Generator().manual_seed(step))
        planned = estimate.work(config, composition.build_task(config)).passes_per_step - PASSES_OF_A_STEP
        assert (backbone.passes - before) / steps == pytest.approx(planned, rel=0.3 if renew == 1 else 0)


def test_the_passes_of_an_inversion_are_counted(
    hydra: None, new_backbone: Any, new_pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, though it draws from the images that the training takes too."""
    inverted = "method.align.inversion.steps=3"
    config = settings("backbone=mini", "method=fmn", "method.latents.images=4", "method.latents.batch=2", inverted)
    made = estimate.work(config, composition.build_task(config)).made
    backbone = new_backbone()
    pairs = new_pairs(backbone, ("cat", "field"))
    part = instantiate(config["method"]["align"]["inversion"])
    before = backbone.passes
    part.images.prepare(backbone, pairs, tmp_path, 0)
    drawn = backbone.passes - before
    passes = Passes(backbone, monkeypatch)
    part(backbone, pairs, tmp_path, 0)
    kinds = {key.split()[0]: number for key, number in made.items()}
    assert len(made) == 2 and kinds["inversion"] == passes.count == 3 * 3 * 2
    assert kinds["images"] == drawn * 20 / 2, "in 20 steps, not in 2"
    none = settings("backbone=mini", "method=fmn", "method.align.inversion=null")
    assert [key.split()[0] for key in estimate.work(none, composition.build_task(none)).made] == ["images"]


def test_existing_files_are_not_planned_again(hydra: None) -> None:
    words = ("backbone=mini", "method=uce")
    config = settings(*words)
    folder = folders.claim(config).folder
    prompts = composition.build_task(config).eval_prompts()
    for prompt in prompts[:7]:
        disk.write_text(folder / "images" / f"{prompt.id}.png", "")
    assert worked(*words).images == len(prompts) - 7 and not worked(*words).finished
    for name in (paths.METRICS, paths.REPORT, paths.ERASED):
        disk.write_text(folder / name, "{}")
    assert worked(*words).finished and estimate.summed([worked(*words)]).basis == "all cells are finished"
    anew = worked(*words, "overwrite=true")
    assert not anew.finished and anew.images == len(anew.originals) == len(prompts)


@pytest.mark.slow
def test_hours_come_from_finished_runs_if_there_are_any(hydra: None) -> None:
    words = ("backbone=mini", "method=realera")
    guessed = worked(*words)
    assert guessed.pace is None and guessed.rate is not None and "core" in guessed.rate.source
    folder = Path("runs/cat-realera-mini-01234567")
    record = {
        "format_version": 1,
        "device": "cpu, 1 thread",
        "stages": {"load": 2.0, "train": 50.0, "originals": 9.0, "draw": 30.0, "judge": 4.0},
        "passes": {"erase": 5, "draw": 400},
        "passes_per_image": 40,
    }
    disk.write_text(folder / paths.COSTS, json.dumps(record))
    assert worked(*words).pace is None  # not finished
    disk.write_text(folder / paths.METRICS, "{}")
    disk.write_text(folder / paths.CONFIG, yaml.safe_dump({"method": {"align": {"steps": 100}}}))
    assert worked(*words).pace == (3.0, 0.5, 6.0)
    for lora, of_each in (({"per_concept": True}, 0.25), ({"per_concept": False}, 0.5), (None, 0.5)):
        method = {"align": {"steps": 100, "lora": lora}}
        disk.write_text(folder / paths.CONFIG, yaml.safe_dump({"concept": ["cat", "dog"], "method": method}))
        assert worked(*words).pace == (3.0, of_each, 6.0), "an adapter each: 200 steps were taken in 50 s"
    found = worked(*words)
    seconds = found.images * 3.0 + 200 * 0.5 + 6.0 + len(found.originals) * 3.0
    planned = estimate.summed([found])
    assert planned.hours == round(seconds / 3600, 2) and "finished runs" in planned.basis
    assert worked("backbone=mini", "method=uce").pace is None
    disk.write_text(folder / paths.COSTS, json.dumps({**record, "device": "NVIDIA A100"}))
    assert worked(*words).pace is None


@pytest.mark.quick(3)
@pytest.mark.parametrize("backbone", [file.stem for file in sorted((paths.CONF_DIR / "backbone").glob("*.yaml"))])
def test_every_backbone_has_a_time_per_pass(backbone: str, hydra: None) -> None:
    assert worked(f"backbone={backbone}", "trainer=cpu").rate == estimate.PASS[backbone, "cpu"]
    planned = estimate.summed([worked(f"backbone={backbone}")])
    assert planned.hours and planned.basis.startswith("estimated: ")
    assert estimate.TEXT_PASS.keys() == estimate.PASS.keys()
    assert ("gpu" if backbone != "mini" else "cpu", backbone) in {(device, name) for name, device in estimate.PASS}


def test_jobs_are_composed_as_their_launcher_will(hydra: None) -> None:
    master = compose("train", ["concept=airplane"], return_hydra_config=True)
    composed = planning.Composer(master)
    for words in (
        ["concept=cat", "method=uce", "method.edit.ridge=5"],
        ["concept=cat", "method=uce", "method.edit.ridge=0.5"],
        ["concept=[cat,dog]", "backbone=sd14", "seed=3", "task.images.erase=7"],
        ["concept=cat", "+trainer.benchmark=true"],
    ):
        expected = composed.loader.load_sweep_config(master, words)
        found = composed(words)
        assert _job(found) == _job(expected)
        assert list(found.hydra.overrides.task) == list(expected.hydra.overrides.task)
    assert len(composed.bases) == 2  # for the options uce and sd14; a job that adds a key is composed separately


def _job(cfg: DictConfig) -> Any:
    config = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(config, dict)
    return {key: value for key, value in config.items() if key != "hydra"}


def trained(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Runs the command; a sweep must end with status 0."""
    monkeypatch.setattr(sys, "argv", ["train", *words])
    if "-m" not in words:
        return train.main()
    with pytest.raises(SystemExit) as left:
        train.main()
    assert not left.value.code


@pytest.mark.parametrize("flag", ["", "-m"])
def test_a_dry_run_prints_the_plan_and_writes_no_file(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["backbone=sd14", "method=uce,realera" if flag else "method=realera", "concept=airplane", "dry_run=true"]
    trained(monkeypatch, *([flag] if flag else []), *words)
    said = capsys.readouterr().out
    assert "planned" in said and "H100" in said and ("6,000" if flag else "3,000") in said
    assert not list(Path.cwd().iterdir())


def half_drawn() -> tuple[Path, int]:
    """A run folder with its weights and all but seven of its images, and the number of images of the whole run."""
    config = settings("backbone=mini", "method=uce")
    folder = folders.claim({**config, "judge": {"_target_": "realera.judges.clip.ClipJudge"}, "overwrite": True}).folder
    save_file({"edit.x.weight": np.zeros(1, np.float32)}, folder / paths.ERASED)
    prompts = composition.build_task(config).eval_prompts()
    for prompt in prompts[7:]:
        for place in (paths.IMAGES, "originals"):
            disk.write_text(folder / place / f"{prompt.id}.png", "")
    return folder, len(prompts)


def test_the_remaining_work_of_an_existing_run(hydra: None) -> None:
    folder, count = half_drawn()
    run = folders.open_run(str(folder))
    task = composition.build_task(run.config)
    found = estimate.judging(run, task, unedited=False)
    assert (found.images, len(found.originals), found.judged, found.steps, found.made) == (7, 7, 2 * count, 0, {})
    for name in (paths.METRICS, paths.REPORT):
        disk.write_text(folder / name, "{}")
    assert estimate.work(run.config | {"overwrite": False}, task).finished, "and yet:"
    again = estimate.judging(run, task, unedited=False)
    assert not again.finished and again.judged == 2 * count
    keep = sum(prompt.split == "keep" for prompt in task.eval_prompts())
    fid = folders.Run(folder, {**run.config, "judge": {"_target_": "realera.judges.fid.FidJudge", "split": "keep"}})
    compared = estimate.judging(fid, task, unedited=False)
    assert compared == Work(judged=keep), "no image is drawn for a judge of whole sets"
    assert estimate.summed([compared, again]).judged == keep + 2 * count


@pytest.mark.slow
def test_the_hours_of_judging_again_include_only_repeated_stages(hydra: None) -> None:
    folder, _ = half_drawn()
    stages = {"load": 2.0, "edit": 700.0, "draw": 30.0, "judge": 4.0}
    record = {"format_version": 1, "device": "cpu", "stages": stages, "passes": {"draw": 400}, "passes_per_image": 40}
    other = Path("runs/cat-uce-mini-01234567")
    for name, content in ((paths.COSTS, json.dumps(record)), (paths.METRICS, "{}"), (paths.CONFIG, "{}")):
        disk.write_text(other / name, content)
    run = folders.open_run(str(folder))
    assert estimate.judging(run, composition.build_task(run.config), unedited=False).pace == (3.0, 0.0, 6.0)
    assert worked("backbone=mini", "method=uce", "seed=1").pace == (3.0, 0.0, 706.0)


@pytest.mark.parametrize("flag", ["", "-m"])
@pytest.mark.parametrize("of", ["original", "folder"])
@pytest.mark.slow
def test_a_dry_run_of_evaluate_prints_the_remaining_work_and_changes_nothing(
    of: str, flag: str, hydra: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, count = half_drawn()
    GlobalHydra.instance().clear()
    words = ["run=original", "backbone=mini", f"concept=airplane{',cat' if flag else ''}"]
    words = words if of == "original" else [f"run={folder}"]
    before = {path: path.stat().st_mtime_ns for path in Path.cwd().rglob("*")}
    monkeypatch.setattr(sys, "argv", ["evaluate", *([flag] if flag else []), *words, "dry_run=true"])
    try:
        evaluate.main()
    except SystemExit as left:
        assert not left.code
    said = dict(
        re.findall(r"(images to judge|images of erased models|training steps) *│ *([0-9,]+)", capsys.readouterr().out)
    )
    to_judge = 2 * count if of == "folder" or flag else count
    drawn = {"images of erased models": "7" if of == "folder" else "0", "training steps": "0"}
    assert said == {**drawn, "images to judge": f"{to_judge:,}"}
    assert {path: path.stat().st_mtime_ns for path in Path.cwd().rglob("*")} == before


@pytest.mark.parametrize("words", [["dry_run=true"], []])
@pytest.mark.slow
def test_several_devices_do_not_each_judge_the_whole_sweep(
    words: list[str], hydra: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = half_drawn()
    GlobalHydra.instance().clear()
    words = [f"run={folder},latest", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", *words]
    monkeypatch.setattr(sys, "argv", ["evaluate", "-m", *words])
    with pytest.raises(SystemExit) as left:
        evaluate.main()
    said = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 2 and "-m cannot be combined with several devices per run" in said
    assert ("refused (2):" if "dry_run=true" in words else "2 refused") in said


@pytest.mark.parametrize("seeds", ["3", "1,3"])
def test_a_setting_that_refers_to_another_is_resolved_in_each_job(
    seeds: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = ["-m"] if "," in seeds else []
    words = ["concept=airplane", "backbone=mini", f"seed={seeds}", 'task.first_seed="${times:500,${seed}}"']
    images = "task.images={erase:4,near:0,keep:0,associated:0,unseen:0}"
    trained(monkeypatch, *flag, *words, images, "dry_run=true")
    said = " ".join(capsys.readouterr().out.split())
    drawn = 8 if flag else 4  # images of the unedited model: seeds 500 to 503 differ from seeds 1500 to 1503
    assert f"images of the original, drawn once │ {drawn} " in said, said


def test_a_refused_job_is_counted_in_the_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["concept=nothingknown,airplane", "method=uce", "seed=0,1", "dry_run=true"]
    monkeypatch.setattr(sys, "argv", ["train", "-m", *words])
    with pytest.raises(SystemExit) as left:
        train.main()
    said = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 2 and "4 (2 refused)" in said
    assert said.count("refused (2): 'nothingknown' is not one of the classes") == 1, said


def test_a_long_list_of_reasons_is_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    reasons = ["[red] is no class", *(f"reason {i}" for i in range(12)), "[red] is no class"]
    estimate.show(estimate.count(reasons))
    said = capsys.readouterr().out
    assert said.count("refused (") == console.MOST == 10 and "and 3 more reasons" in said
    assert said.index("refused (2): [red] is no class") < said.index("refused (1): reason 0")


@pytest.mark.quick(4)
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["method.neighbours.mm=3,4"],
            "method=realera has no setting 'method.neighbours.mm'; did you mean 'method.neighbours.m'",
        ),
        (
            ["method=realera,uce", "method.align.steps=3"],
            "there is no setting 'method.align.steps', because method.align is null with method=uce",
        ),
        (
            ["method=uce,valera", "method.edit.ridge=1,50"],
            "method=valera has no setting 'method.edit.ridge': leave it out, or choose method=",
        ),
        (["method=uce,ucee"], "there is no method 'ucee'; did you mean 'uce'"),
        (["method=glob(zz*)", "seed=0,1"], "the sweep has no job, because method=glob(zz*) has no value"),
        (["seed=0,1", "task.first_seed=interval(0,9)"], "task.first_seed=interval(0,9) is a range for a search: add "),
        (["logger=none,null"], "there is no logger 'null'; known: csv, mlflow, none, tensorboard, wandb."),
        (
            ["hydra.launcher=abc"],
            "hydra.launcher=abc is not valid: choose a launcher with hydra/launcher=",
        ),
        (["hydra.sweeper=5"], "hydra.sweeper=5 is not valid: choose a sweeper with"),
        (
            ["hydra.sweeper.params.seed=5"],
            "there is no setting 'hydra.sweeper.params.seed', because",
        ),
        (["hydra.sweep.dir=null"], "hydra.sweep.dir=null: "),
        (["hydra.searchpath=[nowhere]"], "hydra.searchpath names nowhere, which does not exist"),
    ],
)
def test_settings_that_give_no_job_are_refused_with_one_sentence(
    words: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "-m", "concept=airplane", *words])
    with pytest.raises(SystemExit) as left:
        train.main()
    (said,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and said.startswith(f"error: {sentence}") and not list(Path.cwd().iterdir())


def test_a_launcher_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "find_spec", lambda name: None)
    cfg = OmegaConf.create(
        {
            "hydra": {
                "launcher": {"_target_": "hydra_plugins.hydra_x_launcher.launcher.X"},
                "sweeper": {"_target_": "a.B"},
            }
        }
    )
    with pytest.raises(planning.UserError, match=r"hydra_x_launcher is not installed: pip install 'realera\[sweeps\]'"):
        planning.refuse_missing(cfg)


def test_the_plan_of_attacks_has_a_row_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    """The rows have the rates of the total, which counts a shared search once."""
    rates = {"rate": Rate(0.5, "said"), "text_rate": Rate(0.25, "said")}
    cells = [
        Work(
            attacked=4, passes_of_attacks=3600.0, texts={"a": 7200.0}, named=(f"a-very-long-run-{run}", "mma"), **rates
        )
        for run in "xy"
    ]
    cells += [Work(finished=True, attacked=4, passes_of_attacks=50.0, named=("z", "[bold]"), **rates)]
    plan = estimate.summed(cells, ["no such split"])
    around = estimate.AROUND / 3600
    assert [row["hours"] for row in plan.attacks[:2]] == [pytest.approx(0.5 + 0.5 + around, abs=0.01)] * 2
    assert plan.hours == pytest.approx(2 * 0.5 + 0.5 + 2 * around, abs=0.01)
    assert (plan.attacked, plan.passes_of_attacks, plan.text_passes_of_attacks) == (8, 7200, 7200)
    unknown = estimate.summed([replace(cells[0], text_rate=None), replace(cells[1], rate=None)])
    assert [row["hours"] for row in unknown.attacks] == [None, None] and unknown.hours is None
    console.show_plan(asdict(plan))
    said = capsys.readouterr().out
    assert "[bold]" in said and "finished" in said and "1 of 4 refused" in said and "refused (1): no such split" in said
    assert "images" not in said and "…" not in said, "run names are whole, on several lines"
