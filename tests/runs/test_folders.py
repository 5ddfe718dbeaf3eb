"""Run folders: equal settings share a folder, and no files but the run's are touched."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from realera import costs, paths, report
from realera.contracts import UserError
from realera.runs import folders
from realera.sweeps import jobs
from realera.system import disk
from sweeps import judged

CONFIG: dict[str, Any] = {
    "task": {"name": "object", "images": {"erase": 2}},
    "method": {"name": "realera", "neighbours": {"m": 5}},
    "backbone": {"name": "mini"},
    "judge": {"template": "a {}"},
    "trainer": {"precision": "32-true", "accelerator": "auto"},
    "logger": {"project": "x"},
    "concept": "airplane",
    "anchor": None,
    "seed": 0,
    "evaluate": True,
    "run_dir": None,
    "overwrite": False,
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def changed(**settings: Any) -> dict[str, Any]:
    return {**CONFIG, **settings}


WHOLE = {
    paths.ERASED: "\x10" + 7 * "\0" + "{}".ljust(16),
    paths.METRICS: '{"format_version": 2, "headline": {}, "h_o_terms": [], "main": {}, "original": null, '
    '"protocol": {"judge": {"judge": "eye"}}}',
    paths.REPORT: "<!doctype html><html></html>",
}


def finish(run: folders.Run, *names: str) -> None:
    for name in names or WHOLE:
        disk.write_text(run.folder / name, WHOLE[name])


def test_the_settings_that_change_the_numbers_name_the_folder() -> None:
    folder = folders.folder_of(CONFIG)
    assert folder.parent == Path("runs") and folder.name.startswith("airplane-realera-mini-")
    for same in (
        changed(logger={}, overwrite=True, evaluate=False, judge=None),
        changed(trainer={"precision": "32-true", "accelerator": "gpu"}),
    ):
        assert folders.folder_of(same) == folder
    others = [
        changed(seed=1),
        changed(anchor="sky"),
        changed(method={"name": "realera", "neighbours": {"m": math.inf}}),
        changed(trainer={"precision": "bf16-mixed"}),
        changed(task={"name": "object", "images": {"erase": 3}}),
    ]
    assert len({folders.folder_of(other) for other in others} | {folder}) == len(others) + 1


def test_a_sum_of_captions_is_identified_by_its_content() -> None:
    def places(*edits: dict[str, Any]) -> list[Path]:
        return [folders.folder_of(changed(method={"name": "realera", "edit": edit})) for edit in edits]

    kept = ({"preserved": {"prior_cache": "sum"}}, {"prior_cache": "sum"}, {"prior_cache": "everyday"})
    Path("sum").write_text("one")
    first = places(*kept)
    Path("sum").write_text("two")
    assert [a == b for a, b in zip(first, places(*kept))] == [False, False, True]


def test_a_file_of_captions_is_identified_by_its_content() -> None:
    def places(*captions: Any) -> list[Path]:
        methods = [{"name": "sa", "latents": {"replay": {"captions": one}}} for one in captions]
        return [folders.folder_of(changed(method=method)) for method in methods]

    others = (None, ["own.txt"], 616767)  # those that ship; a list; as how many a sum counts
    for name in ("own.txt", "616767"):
        Path(name).write_text("a tower")
    first, same = places("own.txt"), places(*others)
    for name in ("own.txt", "616767"):
        Path(name).write_text("a bridge")
    assert places("own.txt") != first and places(*others) == same


def test_the_gradient_clipping_norm_names_the_folder() -> None:
    def name(align: dict[str, Any], **trainer: Any) -> str:
        method = {"name": "esd-u", "align": {"steps": 2, **align}}
        return folders.folder_of(changed(method=method, trainer={"precision": "32-true", **trainer})).name

    assert name({}, gradient_clip_val="method") == name({})
    assert len({name({}), name({"clip": None}), name({"clip": 2.0}), name({}, gradient_clip_val=2.0)}) == 4


@pytest.mark.parametrize(
    "concept", ["../../x", "/etc/passwd", "..", "a/b\\c", "Beyoncé (singer)", "x" * 300, ["cat", "../dog"]]
)
def test_a_concept_never_becomes_a_path(concept: Any) -> None:
    folder = folders.folder_of(changed(concept=concept))
    assert folder.parent == Path("runs")
    assert set(folder.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") and len(folder.name) < 120


def test_a_run_is_started_then_continued_then_finished() -> None:
    first = folders.claim(dict(CONFIG))
    assert not first.finished and yaml.safe_load((first.folder / paths.CONFIG).read_text()) == CONFIG
    finish(first, paths.ERASED)
    assert not folders.claim(dict(CONFIG)).finished
    assert folders.claim(changed(evaluate=False)).finished  # without evaluation only the weights are required
    finish(first)
    assert folders.claim(dict(CONFIG)).finished
    assert (first.folder / paths.METRICS).is_file()


@pytest.mark.parametrize("torn", [b"", b"{", b"\xff\x00garbage"])
@pytest.mark.parametrize("name", list(WHOLE))
def test_a_finished_run_with_a_torn_file_is_continued(name: str, torn: bytes, caplog: pytest.LogCaptureFixture) -> None:
    run = folders.claim(dict(CONFIG))
    finish(run)
    assert folders.claim(dict(CONFIG)).finished
    (run.folder / name).write_bytes(torn)
    assert not folders.claim(dict(CONFIG)).finished
    assert [record.message for record in caplog.records] == [f"{run.folder / name} is torn: made again"]
    assert not (run.folder / paths.METRICS).exists(), "its numbers are made again"


@pytest.mark.parametrize("evaluate", [True, False])
def test_a_run_with_a_leftover_checkpoint_is_continued(evaluate: bool) -> None:
    """It was killed right after its weights were saved; the next call deletes the checkpoint."""
    run = folders.claim(changed(evaluate=evaluate))
    finish(run)
    assert folders.claim(changed(evaluate=evaluate)).finished
    (run.folder / paths.FIT).mkdir()
    assert not folders.claim(changed(evaluate=evaluate)).finished


def test_a_folder_that_was_cleared_in_part_is_still_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its settings the folder would not be recognised as a run, and would always be refused."""
    run = folders.claim(dict(CONFIG))
    finish(run)
    real, gone = Path.unlink, []

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if len(gone) == 3:
            raise KeyboardInterrupt
        gone.append(self)
        real(self, missing_ok=missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", unlink)
        folders.claim(changed(overwrite=True))
    assert len(gone) == 3
    assert not folders.claim(changed(overwrite=True)).finished and not run.erased.exists()


def test_a_run_that_is_killed_at_its_start_does_not_look_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another judge, the old numbers must not remain beside the new settings."""
    finish(folders.claim(dict(CONFIG)))
    other = changed(judge={"template": "the {}"})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(costs, "forget", killed)
        folders.claim(other)
    assert not folders.claim(other).finished


def test_another_judge_keeps_the_weights_and_removes_the_numbers() -> None:
    run = folders.claim(dict(CONFIG))
    finish(run)
    again = folders.claim(changed(judge={"template": "the {}"}))
    assert again.folder == run.folder and not again.finished
    assert (
        run.erased.is_file() and not (run.folder / paths.METRICS).exists() and not (run.folder / paths.REPORT).exists()
    )


def test_a_finished_run_takes_a_new_label_and_keeps_its_numbers() -> None:
    run = folders.claim(changed(label="first"))
    finish(run)
    assert folders.claim(changed(label="second")).finished
    assert yaml.safe_load((run.folder / paths.CONFIG).read_text()) == changed(label="second")
    assert (run.folder / paths.METRICS).is_file()


def test_a_root_moves_the_folders() -> None:
    assert folders.folder_of(changed(root="elsewhere/x")) == Path("elsewhere/x") / folders.folder_of(CONFIG).name


def test_overwrite_removes_a_runs_own_files_and_no_others() -> None:
    run = folders.claim(dict(CONFIG))
    finish(run)
    disk.write_text(run.folder / "images" / "a.png", "")
    disk.write_text(run.folder / "notes.txt", "mine")
    assert not folders.claim(changed(overwrite=True)).finished
    assert sorted(path.name for path in run.folder.iterdir()) == [paths.CONFIG, "notes.txt"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_left_alone(overwrite: bool) -> None:
    disk.write_text(Path("photos") / "images" / "me.png", "me")
    with pytest.raises(UserError, match="not a run folder"):
        folders.claim(changed(run_dir="photos", overwrite=overwrite))
    assert [path.name for path in Path("photos").rglob("*")] == ["images", "me.png"]


def test_a_folder_with_other_settings_is_refused_with_the_difference() -> None:
    folders.claim(changed(run_dir="mine"))
    with pytest.raises(UserError, match=r"method\.neighbours\.m: 5 there, 6 here"):
        folders.claim(changed(run_dir="mine", method={"name": "realera", "neighbours": {"m": 6}}))


@pytest.mark.parametrize("torn", [b"", b"\0" * 40, b"\xff\xfe\xfd", b"date: 2024-99-99", b"method: erased\n", b"- 1"])
def test_overwrite_replaces_torn_settings(torn: bytes) -> None:
    run = folders.claim(dict(CONFIG))
    finish(run)
    (run.folder / paths.CONFIG).write_bytes(torn)
    with pytest.raises(UserError, match="overwrite=true"):
        folders.claim(dict(CONFIG))
    assert not folders.claim(changed(overwrite=True)).finished
    assert folders.read_config(run.folder) == changed(overwrite=True)


def test_a_torn_config_names_the_remedy() -> None:
    run = folders.claim(dict(CONFIG))
    (run.folder / paths.CONFIG).write_text("a: [")
    with pytest.raises(UserError, match="overwrite=true"):
        folders.claim(dict(CONFIG))


def test_runs_are_found_by_name_by_sweep_and_as_the_latest() -> None:
    with pytest.raises(UserError, match=r"python -m realera\.train"):
        folders.open_run("latest")
    sampler = {"scheduler": "ddim", "steps": 2, "guidance_scale": 7.5, "height": 64, "width": 64}
    whole = {
        "task": {"_target_": "realera.tasks.objects.ObjectTask", "concepts": "airplane"},
        "method": {"name": "uce"},
        "backbone": {
            "_target_": "realera.backbones.unet.UNetBackbone",
            "name": "mini",
            "pretrained": None,
            "sampler": {"_target_": "realera.contracts.Sampler", **sampler},
        },
        "judge": None,
        "images_at_once": 8,
    }
    both = [folders.claim(changed(**whole, seed=seed)) for seed in (0, 1)]
    disk.write_text(Path("runs/sweeps/now/runs.txt"), "".join(f"{run.folder}\n" for run in both) * 2)
    assert folders.runs_in("runs/sweeps/now") == [run.folder for run in both]
    assert folders.runs_in("runs") == sorted(run.folder for run in both)
    assert folders.runs_in(str(both[0].folder)) == [both[0].folder]
    for run in both:
        finish(run)
    assert folders.open_run("latest").folder == both[1].folder
    name = both[0].folder.name
    assert folders.open_run(name).folder == both[0].folder == Path("runs", name)
    assert folders.runs_in(name) == [both[0].folder]
    Path(name).mkdir()  # a folder of this name in the current one comes first
    with pytest.raises(UserError, match=f"{name} is not a run folder"):
        folders.open_run(name)
    Path(name).rmdir()
    with pytest.raises(UserError, match="the latest is"):
        folders.open_run("elsewhere")


def test_a_sweep_is_read_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    names = ["runs/cat-0", "runs/cat-1"]
    for seed, name in enumerate(names):
        judged(project / name, seed=seed)
    sweep_folder = project / "runs/sweeps/now"
    disk.write_text(sweep_folder / jobs.LISTED, "".join(f"{name}\n" for name in names))
    cells = [{"folder": name, "system": f"called {name}"} for name in names] + [{"folder": None, "state": "refused"}]
    disk.write_text(sweep_folder / jobs.CELLS, "".join(f"{json.dumps(cell)}\n" for cell in cells))
    judged(elsewhere / names[0], seed=7)  # another project's run of the same name
    monkeypatch.chdir(project)
    assert folders.runs_in("runs/sweeps/now") == [Path(name) for name in names]
    there = [project / name for name in names]
    for place, typed in (
        (elsewhere, str(sweep_folder)),
        (elsewhere, "../project/runs/sweeps/now"),
        (sweep_folder, "."),
    ):
        monkeypatch.chdir(place)
        assert folders.runs_in(typed) == there
        assert [cell.folder for cell in jobs.read_cells(Path(typed))] == [*map(str, there), None]
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "argv", ["report", str(sweep_folder), "out=page.html", "results=."])
    report.main()
    assert "called runs/cat-1" in Path("results.json").read_text() and Path("page.html").is_file()

    for run in [*there, elsewhere / names[0]]:
        shutil.rmtree(run)
    with pytest.raises(UserError, match=r"none of the 2 .* exists here \(.*project/runs/cat-0"):
        folders.runs_in(str(sweep_folder))


def test_other_weights_in_the_same_folder_make_another_run(tiny_sd: Path) -> None:
    shutil.copytree(tiny_sd, "model")
    local = changed(backbone={"name": "mini", "pretrained": "model"})
    shipped = changed(backbone={"name": "mini", "pretrained": None})
    assert "weights" not in folders.identity(shipped) and "weights" not in folders.claim(dict(shipped)).config
    first = folders.claim(dict(local))
    finish(first)
    assert first.folder == folders.folder_of(local) == folders.folder_of(first.config) and folders.is_finished(local)
    fixed = folders.claim({**local, "run_dir": "runs/here"})
    weights = Path("model/unet/diffusion_pytorch_model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-4] ^= 1  # a bit of the last tensor
    weights.write_bytes(content)
    assert folders.folder_of(local) != first.folder and not folders.is_finished(local)
    assert folders.folder_of(folders.read_config(first.folder)) == first.folder  # an existing folder keeps its name
    with pytest.raises(UserError, match="other settings \\(weights: "):
        folders.claim({**local, "run_dir": str(fixed.folder)})
    assert folders.is_finished(folders.read_config(first.folder)) and not folders.is_finished(
        {**local, "overwrite": True}
    )
