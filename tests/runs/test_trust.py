"""A run folder may come from somebody else: every attack on every command that reads a run. No file outside of the
folder is read or changed, no code in it is run, and the answer is one sentence."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict
from PIL import Image

from quick import slow_unless
from realera import cli, paths
from realera.contracts import UserError
from realera.evaluation.records import read_manifest
from realera.files import checksums, headers, json_shapes, plain_data
from realera.judges import worker
from realera.reporting.sweep import page as sweep_report
from realera.runs import folders, preflight, repairs, trust
from realera.settings import composition, instantiate
from realera.settings.run_settings import BackboneSettings
from realera.sweeps import jobs, planning
from realera.system import locks

SECRET = "hf_thisisasecret"
UCE = ["concept=airplane", "method=uce"]
Attack = Callable[[Path], None]


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory, small: list[str]) -> Path:
    """A complete run, made by the train command."""
    place = tmp_path_factory.mktemp("fine")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("REALERA_CACHE", str(place / "cache"))
        patch.setattr(sys, "argv", ["train", *small, *UCE, "run_dir=received"])
        import_module("realera.train").main()
    return place / "received"


@pytest.fixture
def received(fine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the run for an attack to change, in the current folder. After every attack: no program was started, no
    module of the folder was imported, no file outside was changed, and no secret was written."""
    here, outside = tmp_path / "here", tmp_path / "outside"
    shutil.copytree(fine, here / "received")
    outside.mkdir()
    Image.new("RGB", (8, 8), "red").save(outside / "private.png")
    (outside / "private.csv").write_text(f"prompt\n{SECRET}\n")
    (outside / "canary.txt").write_text("canary")
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in outside.iterdir()}
    for name in ("canary_module.py", "torchy.py"):
        (here / "received" / name).write_text(f"open({str(outside / 'imported')!r}, 'w')\nEvil = object\n")
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(str(here / "received"))  # the worst case: it is the current folder of python -m
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("REALERA_CACHE", str(fine.parent / "cache"))
    monkeypatch.setenv("REALERA_STAMP", "stamp")
    monkeypatch.setattr(os, "system", lambda _: pytest.fail("a program was started"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    yield here / "received"
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in outside.iterdir()} == before
    assert "canary_module" not in sys.modules
    hidden = SECRET.encode()
    for file in here.rglob("*"):
        assert file.is_symlink() or not file.is_file() or hidden not in file.read_bytes(), file


COMMANDS = {
    "evaluate": ["evaluate", "run=received", "logger=none"],
    "evaluate-plan": ["evaluate", "run=received", "logger=none", "dry_run=true"],
    "generate": ["generate", "run=received", "prompts=[a cat]"],
    **{
        f"export-{to}": ["export", "run=received", f"to={to}", "out=out"]
        for to in ("diffusers", "lora", "kohya", "map")
    },
    "demo": ["demo", "run=received", "port=0"],
    "train": ["train", *UCE, "run_dir=received"],
    "report": ["report", "runs=[received]"],
    "report-several": ["report", "runs=[received]", "out=page.html"],
}
READING = [name for name in COMMANDS if not name.startswith("report")]  # commands that use the settings


@pytest.fixture(scope="module")
def give(small: list[str]) -> Callable[[str], None]:
    """Runs a command's step on its settings, which are composed once."""
    known: dict[str, Any] = {}

    def run(name: str) -> None:
        door, *words = COMMANDS[name]
        if name not in known:
            cli.get_ready()
            with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
                known[name] = compose(door, [*words, *(small if door == "train" else [])], return_hydra_config=True)
        cfg = copy.deepcopy(known[name])
        HydraConfig.instance().set_config(cfg)
        OmegaConf.set_readonly(cfg, False)
        with open_dict(cfg):
            del cfg["hydra"]
        getattr(import_module(f"realera.{door}"), door)(cfg)

    return run


@pytest.fixture(autouse=True)
def _no_config_left() -> Iterator[None]:
    yield
    HydraConfig.instance().cfg = None


# --- the settings ----------------------------------------------------------------------------------------------------


def setting(key: str, value: Any) -> Attack:
    """The run's settings with another value."""

    def spoil(run: Path) -> None:
        config = yaml.safe_load((run / paths.CONFIG).read_text())
        *above, last = key.split(".")
        node = config
        for part in above:
            node = node[part]
        node[last] = value
        (run / paths.CONFIG).write_text(yaml.safe_dump(config))

    return spoil


def without(key: str) -> Attack:
    """The run's settings without one."""

    def spoil(run: Path) -> None:
        config = yaml.safe_load((run / paths.CONFIG).read_text())
        *above, last = key.split(".")
        del (config[above[0]] if above else config)[last]
        (run / paths.CONFIG).write_text(yaml.safe_dump(config))

    return spoil


def written(text: str) -> Attack:
    return lambda run: (run / paths.CONFIG).write_text(text) and None


def program(target: str, **more: Any) -> dict[str, Any]:
    return {"_target_": target, **more}


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij")
)
SETTINGS: dict[str, Attack] = {
    "a program as judge": setting("judge", program("os.system", command="touch here")),
    "a program in a judge": setting("judge.unsafe", program("subprocess.Popen", args=["touch", "here"])),
    "a program as one of the judges": setting(
        "judge",
        program("realera.judges.by_split.BySplit", judges={"a": program("os.system", command="x")}, splits={}),
    ),
    "a pickle as task": setting("task", program("torch.load", f="received/evil.pt", weights_only=False)),
    "a file written by a part": setting(
        "method.edit", program("realera.system.disk.write_text", path="../outside/canary.txt", text="gone")
    ),
    "a file opened": setting("task", program("builtins.open", file="../outside/canary.txt", mode="w")),
    "a module of the folder": setting("method.guide", program("canary_module.Evil")),
    "a module of the folder as backbone": setting("backbone._target_", "canary_module.Evil"),
    "a judge as a method": setting("method._target_", "realera.judges.miniature.MiniatureJudge"),
    "a part as a task": setting("task._target_", "realera.methods.uce.UnifiedConceptEdit"),
    "a logger": setting("logger", program("os.system", command="x")),
    "a target that is no text": setting("task._target_", ["os.system"]),
    "a target where none belongs": setting("concept_of", program("os.system", command="x")),
    "arguments": setting("method.edit._args_", ["x"]),
    "a part called later": setting("method.edit._partial_", True),
    "a secret of the environment": setting("concept", "${oc.env:HF_TOKEN}"),
    "a secret in a list": setting("method.edit.prompts", ["${oc.env:HF_TOKEN}"]),
    "a secret in a key": setting("task", {"${oc.env:HF_TOKEN}": 1}),
    "an alias bomb": written(BOMB),
    "aliases of a merge": written("a: &a {x: 1}\nb: {<<: *a}\n"),
    "deep nesting": written("a: " + "[" * 100_000 + "]" * 100_000),
    "deep indentation": written("\n".join(" " * i + "a:" for i in range(1500))),
    "a key twice": written("seed: 0\nseed: 1\n"),
    "an object of Python": written("!!python/object/apply:os.system ['touch here']"),
    "a NUL byte": written("seed: 0\nlabel: a\0b\n"),
    "a number of 5,000 digits": written(f"seed: {'9' * 5000}\n"),
    "itself": written("a: &a [*a]\n"),
    "too much": written("label: " + "x" * (5 << 20)),
    "no UTF-8": lambda run: (run / paths.CONFIG).write_bytes(b"label: \xff\xfe") and None,
    "a list": written("[1, 2]"),
    "a text": written("hello"),
    "a text as method": setting("method", "uce"),
    "a list as judge": setting("judge", [1]),
    "a list as name": setting("backbone.name", ["x"]),
    "a mapping as concept": setting("concept", {"a": 1}),
    "a text as seed": setting("seed", "x"),
    **{
        f"a text as {part}": setting(f"method.{part}", "x")
        for part in ("neighbours", "edit", "latents", "align", "guide", "finish")
    },
    "a list as steps": setting("method.align", program("realera.methods.realera.NoiseAlignment", steps=[1])),
    "a text as LoRA": setting("method.align", program("realera.methods.realera.NoiseAlignment", lora="x")),
}
LACKING: dict[str, Attack] = {  # accepted where a run is shown, or begun again
    **{f"no {key}": without(key) for key in ("concept", "seed", "images_at_once", "task", "method", "backbone")},
    **{f"no {key}": without(key) for key in ("method.name", "backbone.name", "backbone._target_")},
    **{
        f"no target of {key}": setting(key, {"x": 1})
        for key in ("task", "judge", *(f"method.{part}" for part in json_shapes.PARTS))
    },
}
USING = [name for name in COMMANDS if not name.startswith(("report", "train"))]


@pytest.mark.quick(6)
@pytest.mark.parametrize("attack", SETTINGS)
def test_settings_in_a_folder_cannot_start_code(attack: str, received: Path, give: Callable[[str], None]) -> None:
    SETTINGS[attack](received)
    for command in READING:
        with pytest.raises(UserError) as refused:
            give(command)
        said = str(refused.value)
        assert "\n" not in said and len(said) < 500 and SECRET not in said and "received" in said, (command, said)
    assert not (received.parent / "out").exists()


@pytest.mark.parametrize("attack", slow_unless(SETTINGS, *list(SETTINGS)[::6]))
def test_a_page_shows_settings_and_does_nothing_with_them(
    attack: str, received: Path, give: Callable[[str], None]
) -> None:
    SETTINGS[attack](received)
    for command in ("report", "report-several"):
        try:
            give(command)
        except UserError as refused:
            assert "\n" not in str(refused), command


@pytest.mark.parametrize("attack", slow_unless(LACKING, *list(LACKING)[::5]))
def test_settings_that_are_missing_are_named(attack: str, received: Path, give: Callable[[str], None]) -> None:
    LACKING[attack](received)
    for command in USING:
        with pytest.raises(UserError, match=r"is no run's \(it has no [\w.]+\): do not use this folder"):
            give(command)
    for command in ("report", "report-several"):
        give(command)


def test_a_run_of_the_unedited_model_needs_no_class(received: Path) -> None:
    setting("method", {"name": "original"})(received)
    assert folders.open_run("received").config["method"] == {"name": "original"}
    setting("method.guide", program("realera.contracts.LoraSpec"))(received)
    with pytest.raises(UserError, match=r"method\.guide"):
        folders.open_run("received")


# --- links and names -------------------------------------------------------------------------------------------------


def linked(name: str, to: str) -> Attack:
    """A file or folder of the run that is a link to one outside."""

    def spoil(run: Path) -> None:
        place = run / name
        if place.is_dir():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(run.parents[1] / "outside" / to)

    return spoil


LINKS: dict[str, Attack] = {
    **{f"{name} is a link": linked(name, ".") for name in (*folders.FOLDERS,)},
    **{f"{name} is a link": linked(name, "canary.txt") for name in (*folders.FILES, paths.LOCK)},
    "a folder of W&B is a link": linked("wandb/artifacts", "."),
}


@pytest.mark.quick(4)
@pytest.mark.parametrize("attack", LINKS)
def test_a_symbolic_link_in_a_run_is_refused(attack: str, received: Path, give: Callable[[str], None]) -> None:
    LINKS[attack](received)
    for command in COMMANDS:
        with pytest.raises(UserError, match="link"):
            give(command)


@pytest.mark.parametrize("name", ["images", "verdicts", "wandb"])
def test_a_link_is_refused_before_anything_is_cleared(name: str, received: Path) -> None:
    config = {**folders.read_config(received), "run_dir": str(received), "overwrite": True}
    linked(name, ".")(received)
    with pytest.raises(UserError, match="link"):
        folders.claim(config)


def test_a_symbolic_link_as_lock_is_refused(received: Path) -> None:
    for name in (paths.LOCK, paths.IMAGES):
        linked(name, "canary.txt" if name == paths.LOCK else ".")(received)
        with pytest.raises(UserError, match="link"), folders.locked(received):
            pass
    with locks.exclusive(received / "x.png") as mine:
        assert mine
    (received / ".y.png.lock").symlink_to(received.parents[1] / "outside" / "canary.txt")
    with locks.exclusive(received / "y.png"):
        pass  # without a lock, and the file behind the link is as it was


def test_a_run_folder_itself_may_be_a_link(received: Path, give: Callable[[str], None]) -> None:
    received.rename(received.with_name("elsewhere"))
    received.symlink_to("elsewhere")
    give("evaluate-plan")
    give("export-map")
    assert Path("out", paths.MAP).is_file()


def row(**changes: Any) -> Attack:
    """The first line of the manifest with other values."""

    def spoil(run: Path) -> None:
        lines = (run / paths.MANIFEST).read_text().splitlines()
        lines[0] = json.dumps({**json.loads(lines[0]), **changes})
        (run / paths.MANIFEST).write_text("\n".join(lines) + "\n")

    return spoil


def picture_linked(run: Path) -> None:
    image = next((run / paths.IMAGES).glob("*.png"))
    image.unlink()
    image.symlink_to(run.parents[1] / "outside" / "private.png")


def numbers(**changes: Any) -> Attack:
    """metrics.json with other values; "a__b" is b within a."""

    def spoil(run: Path) -> None:
        metrics = json.loads((run / paths.METRICS).read_text())
        for key, value in changes.items():
            *above, last = key.split("__")
            node = metrics
            for part in above:
                node = node[part]
            node[last] = value
        (run / paths.METRICS).write_text(json.dumps(metrics))

    return spoil


NONE = {**dict.fromkeys(("value", "low", "high", "scored")), "n": 0, "unscored": 0, "mode": "top1"}
NAMES: dict[str, Attack] = {
    "a picture above": row(file="../../outside/private.png"),
    "a picture above, within images": row(file="images/../../../outside/private.png"),
    "a picture by its whole path": row(file="/etc/hostname"),
    "an original above": row(original="../../outside/private.png"),
    "a file of the run that is no picture": row(file="config.yaml"),
    "an id above": row(id="../../x"),
    "an id that is no text": row(id=5),
    "a split that is none": row(split="other"),
    "a linked picture": picture_linked,
    "a judge above": numbers(protocol__judge__judge="../../../outside/canary"),
    "a judge that is no text": numbers(protocol__judge__judge=["x"]),
    "a list as protocol": numbers(protocol=[]),
    "a measure of H_o that is none": numbers(h_o_terms=["zz", "acc_s"]),
    "half an interval": numbers(main__acc_e__high=None),
    "concepts without their measure": numbers(concepts={"cat": {}}),
    "concepts of several measures": numbers(concepts={"cat": {"acc_e": NONE, "acc_g": NONE}, "dog": {"acc_e": NONE}}),
    "numbers that are none": numbers(main={"acc_e": "high"}),
    "deep numbers": lambda run: (run / paths.METRICS).write_text("[" * 100_000) and None,
}


@pytest.mark.parametrize("attack", NAMES)
def test_paths_in_files_cannot_leave_the_folder(attack: str, received: Path, give: Callable[[str], None]) -> None:
    NAMES[attack](received)
    page = (received / paths.REPORT).read_text()
    for command in ("report", "report-several"):
        with pytest.raises(UserError) as refused:
            give(command)
        assert "\n" not in str(refused.value), command
    assert (received / paths.REPORT).read_text() == page


@pytest.mark.quick(2)
@pytest.mark.parametrize("attack", ["a picture above", "an id above", "a linked picture", "a judge above"])
def test_judging_again_reads_only_images_of_the_folder(
    attack: str, received: Path, give: Callable[[str], None]
) -> None:
    """Such a file counts as torn and is made again, or it is refused."""
    NAMES[attack](received)
    with suppress(UserError):
        give("evaluate")
    assert set(received.parent.iterdir()) == {received}
    if "above" in attack and "judge" not in attack:
        give("report")
        assert all(row.path(received).is_file() for row in read_manifest(received))


def test_a_run_without_metric_modes_is_still_shown(received: Path, give: Callable[[str], None]) -> None:
    numbers(headline={})(received)
    for command in ("report", "report-several"):
        give(command)


def test_the_task_of_a_run_cannot_name_a_file_outside(received: Path, give: Callable[[str], None]) -> None:
    numbers(protocol__task="../../../outside/x")(received)
    give("report-several")
    written = {path.parent for path in received.parent.rglob("*.csv")}
    assert written == {received.parent / "tables"}


def test_a_sweep_may_list_only_its_own_runs(received: Path, tmp_path: Path) -> None:
    shutil.copytree(received, tmp_path / "mine")
    given = received.parent / "given" / "runs" / "sweeps" / "s"
    given.mkdir(parents=True)
    for line in (str(tmp_path / "mine"), "../../mine"):
        (given / "runs.txt").write_text(f"{line}\n")
        with pytest.raises(UserError, match="outside"):
            folders.runs_in(str(given))
    (given / "runs.txt").write_text("received\n")  # no folder there, but one of that name here
    with pytest.raises(UserError, match="none of the 1 run folders"):
        folders.runs_in(str(given))
    own = received.parent / "runs" / "sweeps" / "s"  # one that was started here may have its runs on another disk
    own.mkdir(parents=True)
    (own / "runs.txt").write_text(f"{tmp_path / 'mine'}\n")
    assert folders.runs_in(str(own)) == [tmp_path / "mine"]


@pytest.fixture
def sweep_given(received: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A sweep in sp that lists the run twice. Returns a function that runs `report sp` and returns its error."""
    (received.parent / "sp").mkdir()
    shutil.copytree(received, received.with_name("again"))
    listed = f"{received.absolute()}\n{received.with_name('again').absolute()}\n"
    (received.parent / "sp" / paths.RUN_LIST).write_text(listed)
    (received.parent / "sp" / paths.CELLS).write_text("".join(f'{{"folder": "{run}"}}\n' for run in listed.split()))

    def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [*(words or ("report", "sp"))])
        with pytest.raises(SystemExit) as ended:
            import_module(f"realera.{sys.argv[0]}").main()
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if line.startswith("error:")]
        assert ended.value.code == 2 and len(lines) == 1 and "Traceback" not in said.err and SECRET not in said.err
        return lines[0]

    return refused


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", paths.SWEEP_FILES)
def test_a_symbolic_link_in_a_sweep_is_refused(
    name: str, received: Path, sweep_given: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    given, page = received.parent / "sp", (received / paths.REPORT).read_text()
    (given / name).unlink(missing_ok=True)
    is_folder = name in (paths.TABLES, paths.FIGURES, paths.FAILED)
    (given / name).symlink_to(received.parents[1] / "outside" / ("." if is_folder else "private.csv"))
    assert f"{name} is a symbolic link" in sweep_given(capsys)
    assert (received / paths.REPORT).read_text() == page


@pytest.mark.parametrize("name", [paths.TABLES, paths.FIGURES])
def test_tables_of_a_page_are_not_written_through_a_link(
    name: str, received: Path, sweep_given: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    place = received.parent / "pages"
    place.mkdir()
    (place / name).symlink_to(received.parents[1] / "outside")
    assert "is a symbolic link" in sweep_given(capsys, "report", "sp", "out=pages/page.html")
    with pytest.raises(UserError, match="is a symbolic link"):
        sweep_report.write_sweep([received], place / "page.html")


@pytest.mark.parametrize("name", [paths.RESULTS, paths.README])
def test_results_are_not_written_through_a_link(
    name: str, received: Path, sweep_given: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    (received.parent / "sp" / name).symlink_to(received.parents[1] / "outside" / "private.csv")
    assert "is a symbolic link" in sweep_given(capsys, "report", "sp", "results=sp")


def test_a_new_sweep_is_not_started_in_a_linked_folder(
    received: Path, sweep_given: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning.sweep, "folder", lambda: received.parent / "runs" / "sweeps" / "s")
    (received.parent / "runs" / "sweeps" / "s").mkdir(parents=True)
    for name in (paths.RUN_LIST, paths.CELLS):
        place = received.parent / "runs" / "sweeps" / "s" / name
        place.symlink_to(received.parents[1] / "outside" / "private.csv")
        said = sweep_given(capsys, "evaluate", "-m", "run=received,again", "logger=none")
        assert "is a symbolic link" in said
        place.unlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")
def test_a_list_of_cells_that_is_a_pipe_or_too_large_is_refused(
    received: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(received.parent / paths.CELLS)
    assert jobs.read_cells(received.parent) == []
    (received.parent / paths.CELLS).unlink()
    (received.parent / paths.CELLS).write_bytes(b'{"folder": null}\n{"folder": "\xff"}\n' + rb'{"reason": "\ud800"}')
    assert len(jobs.read_cells(received.parent)) == 1
    monkeypatch.setattr(plain_data.content, "__defaults__", (10,))
    with pytest.raises(UserError, match="larger than"):
        jobs.read_cells(received.parent)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\0" * 50], ids=["empty", "blank", "NULs"])
def test_a_sweep_that_lists_nothing_is_refused(
    content: bytes, received: Path, sweep_given: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    (received.parent / "sp" / paths.RUN_LIST).write_bytes(content)
    (received.parent / "sp" / paths.CELLS).unlink()
    assert "sp lists no run" in sweep_given(capsys)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["evaluate", "run=received"], ["evaluate", "-m", "run=received,latest"]])
def test_the_command_prints_one_sentence(
    words: list[str], received: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    SETTINGS["a program as judge"](received)
    monkeypatch.setattr(sys, "argv", [*words, "logger=none"])
    with pytest.raises(SystemExit) as ended:
        import_module("realera.evaluate").main()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert ended.value.code == 2 and "os.system" in said[0]


def test_a_page_escapes_the_markup_of_a_run(
    received: Path, give: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'"
    for key in ("label", "concept", "method.name", "backbone.name"):
        setting(key, hostile)(received)
    row(prompt=hostile, concept=hostile)(received)
    shown = {"target": hostile, "anchor": hostile}
    numbers(protocol__task=hostile, protocol__concepts=[shown], protocol__sampler__scheduler=hostile)(received)
    verdicts = next((received / paths.VERDICTS).glob("miniature.jsonl"))
    lines = [{**json.loads(line), "label": hostile} for line in verdicts.read_text().splitlines()]
    verdicts.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    shutil.copytree(received, received.with_name("javascript:alert(1)"))
    setting("seed", 1)(received)
    give("report")
    both = ["report", "runs=[received,'javascript:alert(1)']", "out=page.html"]
    monkeypatch.setitem(COMMANDS, "report-hostile", both)
    give("report-hostile")
    for page in (received / paths.REPORT, Path("page.html")):
        text = page.read_text()
        assert hostile not in text and "<script>alert" not in text and "<img src=x" not in text
        assert 'href="javascript:' not in text


# --- interpreters and tables -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["evaluate", "evaluate-plan"])
def test_a_folder_cannot_choose_an_interpreter(command: str, received: Path, give: Callable[[str], None]) -> None:
    setting("judge.python", "evil/python")(received)
    with pytest.raises(UserError, match=r"judge=NAME judge\.python=evil/python"):
        give(command)
    with pytest.raises(UserError, match=r"judge=NAME judge\.python=evil/python"):
        give(command)
    give("export-map")
    give("report")


@pytest.mark.parametrize("model", ["hf-hub:evil/x", "local-dir:evil"])
def test_a_folder_cannot_choose_a_judge_from_a_hub_or_a_folder(
    model: str, received: Path, give: Callable[[str], None]
) -> None:
    setting("judge", {"_target_": "realera.judges.clip.ClipJudge", "model": model})(received)
    with pytest.raises(UserError, match=r"type it, judge=NAME judge\.model=MODEL"):
        give("evaluate")


def test_a_folder_cannot_name_a_text_file(received: Path, give: Callable[[str], None]) -> None:
    task = program("realera.tasks.nsfw.NsfwTask", prompts_csv="../outside/private.csv")
    setting("task", task)(received)
    for digest in (None, {"prompts_csv": "0" * 64}, []):
        setting("tables", digest)(received)
        with pytest.raises(UserError, match=r"task\.prompts_csv"):
            give("evaluate")
    setting("tables", trust.tables({"task": task}))(received)  # as train writes it down
    setting("concept", "nudity")(received)
    trust.check_tables(folders.read_config(received), received)


@pytest.mark.parametrize("name", ["~nouser-at-all/x.csv", "x" * 300, "a\0b"])
def test_an_impossible_file_name_is_not_a_file(name: str) -> None:
    node = {"prior_cache": name, "domain_cache": None}
    config = {"task": {"prompts_csv": name}, "method": {"edit": node}, "backbone": {"pretrained": name}}
    assert trust.tables(config) == {} and paths.file_of(name) is None and folders.weights_of(config) is None
    assert folders.identity(config)["tables"] == {"prompts_csv": None}
    with pytest.raises(UserError, match=r"method\.prior_cache=.* is missing"):
        repairs.check_sums(node)
    with pytest.raises(UserError, match=r"does not exist|HF_HUB_OFFLINE"):
        preflight.check_model(BackboneSettings(config["backbone"]))
    assert preflight.model_folder(BackboneSettings(config["backbone"])) is None


def test_train_records_the_text_files_that_it_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.csv").write_text("prompt\na cat\n")
    config = {
        "task": {"prompts_csv": "mine.csv"},
        "method": {"name": "uce"},
        "backbone": {"name": "mini"},
        "concept": "nudity",
    }
    run = folders.claim(config)
    kept = folders.read_config(run.folder)
    assert set(kept["tables"]) == {"prompts_csv"} and folders.identity(kept) == folders.identity(config)
    trust.check_tables(kept, run.folder)
    Path("mine.csv").write_text("prompt\na dog\n")
    with pytest.raises(UserError, match="give its train command again"):
        trust.check_tables(kept, run.folder)


# --- what holds it --------------------------------------------------------------------------------------------------


def test_a_part_of_ones_own_config_dir_is_known(
    received: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "conf"
    (own / "task").mkdir(parents=True)
    (own / "task" / "mine.yaml").write_text(
        "defaults: [object]\nx: &x {_target_: mine.Part}\ny: {<<: *x}\nsince: 2024-01-01\n_target_: mine.Task\n"
    )
    (own / "task" / "torn.yaml").write_text("a: [")
    (own / "experiment").mkdir()
    (own / "experiment" / "x.yaml").write_text("# @package _global_\nmethod:\n  edit:\n    _target_: mine.Edit\n")
    setting("task._target_", "mine.Task")(received)
    setting("method.edit._target_", "mine.Edit")(received)
    with pytest.raises(UserError, match="--config-dir"):
        folders.read_config(received)
    monkeypatch.setattr(trust, "config_dirs", lambda: (paths.CONF_DIR, own))
    folders.read_config(received)
    assert {"mine.Part", "mine.Task"} <= trust._named((own,))["task", True] | trust._named((own,))["task", False]


def test_config_dirs_are_those_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "task").mkdir()
    found: list[Any] = []
    step = lambda cfg: found.append(trust.config_dirs())  # noqa: E731
    for words in (["--config-dir", str(tmp_path)], [f"hydra.searchpath=[file://{tmp_path}]"], []):
        monkeypatch.setattr(sys, "argv", ["generate", "run=x", "prompts=[a]", *words])
        cli.run_command("generate", step)
    assert [tmp_path in dirs for dirs in found] == [True, True, False]
    assert all(dirs[0] == paths.CONF_DIR for dirs in found)


def test_every_target_of_the_package_is_known_where_it_is_named() -> None:
    named = trust._named((paths.CONF_DIR,))
    assert {group for group, _ in named} == {"task", "method", "backbone", "judge", "logger"}
    assert (
        "realera.contracts.LoraSpec" in named["method", True] and "realera.contracts.Method" in named["method", False]
    )
    assert not any(
        target.startswith(("os.", "realera.sweeps.planning")) for targets in named.values() for target in targets
    )


def test_nothing_is_interpolated_when_parts_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    text = "${oc.env:HF_TOKEN}"
    made = instantiate.build({"_target_": "types.SimpleNamespace", "a": text, "b": [{"c": text}], "_convert_": "all"})
    assert (made.a, made.b) == (text, [{"c": text}])
    task = composition.build_task(
        {"task": {"_target_": "realera.tasks.objects.ObjectTask", "concepts": text, "anchor": "sky"}}
    )
    assert task.concepts[0].target == text


def test_a_list_of_concepts_is_not_interpolated(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("${oc.env:HF_TOKEN}\n")
    cfg = OmegaConf.create({"concept": None, "anchor": None, "concepts_file": str(file)})
    with pytest.raises(UserError, match="line 1"):
        composition.with_concepts(cfg)


@pytest.mark.parametrize(
    "target",
    ["os.system", "builtins.open", "subprocess.Popen", "realera.system.disk.write_text", "torch.load", "pathlib.Path"],
)
def test_another_interpreter_builds_only_classes(target: str) -> None:
    said: list[Any] = []
    worker.serve([json.dumps({"_target_": target})], said.append)
    assert "is not allowed" in said[0]["refused"]


def test_a_path_stays_inside(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    assert paths.inside(tmp_path, "a/b.png") == tmp_path / "a" / "b.png"
    for name in ("", "/etc/passwd", "../x", "a/../../x", "a\0b", "C:\\x", "\\x", "a\\..\\..\\x", "link/x", "link"):
        with pytest.raises(UserError):
            paths.inside(tmp_path, name)
    with pytest.raises(UserError):
        paths.inside(tmp_path, "x" * 5000)


def test_the_size_of_files_that_are_read_is_limited(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    for text in (
        "[" * 100_000,
        "[" * 60 + "]" * 60,
        '{"a": 1, "a": 2}',
        "9" * 5000,
        "{",
        '{"a": ' * 50 + "1" + "}" * 50,
    ):
        file.write_text(text)
        with pytest.raises(ValueError):
            plain_data.read_json(file)
    config = {"concept": ["a"] * 3, "b": {"x": [1.5, None, True, ".inf", float("inf")]}}
    config["again"] = config["concept"]  # written as an alias
    assert plain_data.yaml_of(yaml.safe_dump(config, sort_keys=False)) == config


LONG = {"hexadecimal": "0x" + "f" * 5000, "base 60": ":".join("1" * 3000), "decimal": "9" * 400}


@pytest.mark.parametrize("number", [*LONG.values(), str(2**63), str(-(2**63) - 1)], ids=lambda text: text[:3])
def test_integers_have_64_bits(number: str) -> None:
    for text in (f"x: {number}", f"? {number}\n: x", f"- - {number}"):
        with pytest.raises(ValueError, match=r"integer of more than 64 bits|number of"):
            plain_data.yaml_of(text)
    if number.lstrip("-").isdecimal():
        for text in (f'{{"step": {number}}}', f"[[{number}]]"):
            with pytest.raises(ValueError, match="integer of more than 64 bits"):
                plain_data.json_of(text)


def test_the_largest_seed_is_read() -> None:
    for seed in (2**63 - 1, -(2**63), 0):
        assert plain_data.yaml_of(f"seed: {seed}") == plain_data.json_of(f'{{"seed": {seed}}}') == {"seed": seed}


def test_long_numbers_and_wrong_kinds_of_a_yaml_are_refused() -> None:
    began = time.process_time()
    for text in ("x: " + "1:" * 500_000 + "1.0", "x: !!int ''", "x: !!float ''", "x: !!bool maybe", "x: !!int one"):
        with pytest.raises(ValueError):
            plain_data.yaml_of(text)
    assert time.process_time() - began < 5  # base 60 takes the square of its length


def test_a_lone_surrogate_is_refused() -> None:
    for text in (r'"\ud800"', r'{"a": ["b\uDFFF"]}', r'{"\udead": 1}', r'"\ud800 \udc00"'):
        with pytest.raises(ValueError, match=r"half a character|escape"):
            plain_data.json_of(text)
        with pytest.raises(ValueError):
            plain_data.yaml_of(text)
    assert plain_data.json_of(r'["\ud83d\ude00", "\\ud800"]') == ["\U0001f600", r"\ud800"]


@pytest.mark.parametrize("loader", [yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader)])
def test_both_readers_of_yaml_refuse_a_lone_surrogate(loader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_data, "_Loader", loader)
    with pytest.raises(ValueError):
        plain_data.yaml_of(r'x: "\ud800"')


def verdict(**changes: Any) -> Attack:
    """The first verdict of the run's own judge with other values."""

    def spoil(run: Path) -> None:
        file = next(file for file in (run / paths.VERDICTS).glob("*.jsonl") if ".original" not in file.name)
        first, *others = file.read_text().splitlines()
        file.write_text("\n".join([json.dumps({**json.loads(first), **changes}), *others]) + "\n")

    return spoil


def in_json(name: str, **changes: Any) -> Attack:
    """A JSON file of the run with other values."""

    def spoil(run: Path) -> None:
        before = json.loads((run / name).read_text()) if (run / name).is_file() else {}
        (run / name).write_text(json.dumps({**before, **changes}))

    return spoil


UNSAYABLE: dict[str, Attack] = {
    "half a letter as prompt": row(prompt="\ud800"),
    "half a letter as concept": row(concept="\udfff"),
    "half a letter as label": verdict(label="\ud800"),
    "half a letter in a detail": verdict(detail={"second": "\ud800"}),
    "half a letter as a probe": in_json(paths.EDIT_INFO, probes=[{"text": "\ud800", "before": 0.1, "after": 0.2}]),
    "half a letter as device": in_json(paths.COSTS, device="\ud800"),
    "a huge number of the edit": in_json(paths.EDIT_INFO, condition=10**400),
    "a huge step": lambda run: (run / paths.LOSSES).write_text(f'{{"step": {10**400}, "loss": 1}}\n') and None,
    **{
        f"a setting of many digits, {name}": lambda run, long=long: (
            (run / paths.CONFIG).write_text(f"{(run / paths.CONFIG).read_text()}extra: {long}\n") and None
        )
        for name, long in LONG.items()
    },
}


@pytest.mark.parametrize("attack", UNSAYABLE)
@pytest.mark.slow
def test_numbers_that_json_cannot_express_are_damage(attack: str, received: Path, give: Callable[[str], None]) -> None:
    UNSAYABLE[attack](received)
    for command in ("report", "report-several", "evaluate-plan", "export-map", "train"):
        with suppress(UserError):
            give(command)


@pytest.mark.parametrize(
    "name", slow_unless(["o.json", ".json", "...json", "a\nb.json", os.fsdecode(b"\xff.json")], "o.json")
)
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_odd_name_beside_the_verdicts_is_left_out(
    name: str, kind: str, received: Path, give: Callable[[str], None]
) -> None:
    odd, before = received / paths.VERDICTS / name, (received / paths.METRICS).read_text()
    of_judge = next(file for file in (received / paths.VERDICTS).glob("*.json"))
    try:
        if kind == "folder":
            (odd / "inner").mkdir(parents=True)
        else:
            shutil.copy(of_judge, odd)
    except OSError:
        pytest.skip("this disk has no such names")
    give("evaluate")
    assert odd.exists()
    if kind == "folder" or not name.isprintable() or name == ".json":
        assert (received / paths.METRICS).read_text() == before
    assert repairs.is_whole(received, True)
    give("report")


def test_keys_and_aliases_of_a_yaml_cost_no_more_than_their_number() -> None:
    chain = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 300))
    with pytest.raises(ValueError, match="nested too deeply"):
        plain_data.yaml_of(chain)
    began = time.process_time()
    with pytest.raises(ValueError, match="'k7999' is given twice"):
        plain_data.yaml_of("".join(f"k{i}: 1\n" for i in range(8000)) + "k7999: 2\n")
    assert time.process_time() - began < 2  # 0.3 s; it was 4.6 s where each key was counted among all


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")
def test_reading_a_pipe_does_not_block(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for read in (
        plain_data.text,
        plain_data.lines,
        plain_data.read_yaml,
        plain_data.read_json,
        plain_data.content,
        checksums.sha256_of,
        headers.refuse_torn,
        headers.read_json,
        checksums.verify,
    ):
        for place in (pipe, tmp_path):
            with pytest.raises((OSError, UserError)):
                read(place)
    assert checksums.digest(pipe) is None and not checksums.image_is_whole(pipe) and not checksums.page_is_whole(pipe)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")
@pytest.mark.parametrize("name", [*folders.FILES, paths.IMAGES, f"{paths.VERDICTS}/miniature.jsonl"])
@pytest.mark.slow
def test_a_run_with_pipes_does_not_block(name: str, received: Path, give: Callable[[str], None]) -> None:
    """No command waits for a writer: it prints a sentence, or continues without the file."""
    shutil.rmtree(received / name, ignore_errors=True)
    (received / name).unlink(missing_ok=True)
    (received / name).parent.mkdir(exist_ok=True)
    os.mkfifo(received / name)
    for command in COMMANDS:
        if command not in ("evaluate", "generate", "demo", "train"):  # which would draw, judge or serve
            with suppress(UserError):
                give(command)


def test_a_class_that_only_the_command_line_names_gives_a_warning(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "own_edit.py").write_text(
        "from realera.methods.uce import UnifiedConceptEdit\n\n\nclass Own(UnifiedConceptEdit):\n    pass\n"
    )
    (tmp_path / "mine" / "method").mkdir(parents=True)
    (tmp_path / "mine" / "method" / "own.yaml").write_text(
        "defaults: [uce]\nname: own\nedit: {_target_: own_edit.Own}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    said = "method.edit._target_=own_edit.Own was typed, but no yaml names it"
    for words, warned in (
        ([*UCE, "method.edit._target_=own_edit.Own"], True),
        (["--config-dir", "mine", "concept=airplane", "method=own"], False),
        (["--config-dir", "mine", *UCE, "method.edit._target_=own_edit.Own"], False),
    ):
        monkeypatch.setattr(sys, "argv", ["train", *words, *small, "dry_run=true"])
        import_module("realera.train").main()
        assert (said in caplog.text) is warned, words
        caplog.clear()
