"""Several trackers of one run: what each of them keeps, read back from its own files by its own library."""

from __future__ import annotations

import csv
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from lightning.pytorch.loggers import Logger
from PIL import Image

from realera import evaluate, paths, train
from realera.contracts import UserError
from realera.runs import trust
from realera.runs.folders import Run
from realera.settings import composition, loggers, resolvers
from realera.tracking import content, local_files, mlflow_runs, trackers
from realera.tracking.base import Known, Tracker, as_logger
from realera.tracking.content import Picture, Results, Table

CSV = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": None}
BOARD = {"_target_": "lightning.pytorch.loggers.TensorBoardLogger", "save_dir": None}
WANDB = {"_target_": "lightning.pytorch.loggers.WandbLogger", "project": "realera", "mode": "offline"}
MLFLOW = {"_target_": "lightning.pytorch.loggers.MLFlowLogger", "tracking_uri": "file:x", "experiment_name": "e"}
OBJECT = "realera.tasks.objects.ObjectTask"
FEW = [
    "concept=airplane",
    "backbone=mini",
    "trainer=cpu",
    "task.images={erase:2,near:1,keep:1,associated:1,unseen:1}",
    "backbone.sampler.steps=4",
    "method.align.steps=3",
    "method.latents.images=2",
    "method.latents.batch=1",
]
Type = Callable[..., None]


@pytest.fixture
def type_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Type:
    """Runs train, or evaluate, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))

    def run(*words: str, again: bool = False) -> None:
        monkeypatch.setattr(sys, "argv", ["evaluate" if again else "train", *words])
        (evaluate if again else train).main()  # type: ignore[attr-defined]

    return run


def run_of(folder: Path, **logger: Any) -> Run:
    return Run(folder, {"task": {"_target_": OBJECT}, "concept": "cat", "method": {"name": "uce"}, "logger": logger})


def numbers_in(file: Path) -> dict[str, list[tuple[int, float]]]:
    """{scalar: [(step, value)]} of a CSV logger's file."""
    found: dict[str, list[tuple[int, float]]] = {}
    with file.open(encoding="utf-8", newline="") as opened:
        for row in csv.DictReader(opened):
            for name, text in row.items():
                if text and name != "step":
                    found.setdefault(name, []).append((int(row["step"]), float(text)))
    return found


def values(series: Mapping[str, Sequence[tuple[int, float]]], prefix: str) -> dict[str, list[float]]:
    return {name: [value for _, value in points] for name, points in series.items() if name.startswith(prefix)}


@pytest.mark.slow
def test_one_run_is_tracked_by_three_trackers_at_once(type_in: Type, tmp_path: Path) -> None:
    """A run of the miniature in TensorBoard, CSV and W&B offline: the same numbers in all three."""
    pytest.importorskip("tensorboard", reason="pip install 'realera[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from wandb_files import read_back

    type_in(*FEW, "logger=[wandb,tensorboard,csv]", "logger.artifact=true", "logger.images=1", "run_dir=run")
    folder = tmp_path / "run"
    main = json.loads((folder / "metrics.json").read_text())["main"]
    losses = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]

    in_csv = numbers_in(folder / "csv" / "version_0" / "metrics.csv")
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    in_board = {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    wandb_run = read_back(folder)

    assert [value for _, value in in_csv["train/loss"]] == pytest.approx([line["loss"] for line in losses], rel=1e-5)
    assert [step for step, _ in in_csv["train/loss"]] == [line["step"] for line in losses]
    assert in_csv["eval/h_o"] == [(losses[-1]["step"], pytest.approx(main["h_o"]["value"]))]
    assert (
        in_csv.keys()
        == in_board.keys()
        == {k for k in wandb_run["summary"] if k.startswith(("t", "e", "c"))}
        - {
            "trainer/global_step",
            *(key for key in wandb_run["summary"] if key.startswith("cell")),
        }
    )
    for name, points in in_csv.items():
        assert in_board[name] == [(step, pytest.approx(value, rel=1e-5)) for step, value in points], name
        assert wandb_run["summary"][name] == pytest.approx(points[-1][1], rel=1e-5)

    settings = yaml.safe_load((folder / "csv" / "version_0" / "hparams.yaml").read_text())
    assert settings["method"]["align"]["steps"] == 3 and settings["system"] == "realera"
    assert wandb_run["config"]["method"]["align"]["steps"] == 3
    hparams = board.PluginTagToContent("hparams")
    assert "_hparams_/session_start_info" in hparams

    splits = {"erase", "near", "keep", "associated", "unseen"}
    assert set(board.Tags()["images"]) == {f"sheets/{split}" for split in splits}
    (image,) = board.Images("sheets/erase")
    side = Image.open(folder / "images" / next(iter((folder / "images").iterdir())).name).size[0]
    assert (image.width, image.height) == (2 * side + content.GAP, side), "before and after, one row"
    (text,) = board.Tensors("sheets/text_summary")
    said = text.tensor_proto.string_val[0].decode()
    assert said.startswith("| prompt | seed | split | verdict |") and said.count("\n") == 1 + len(splits)
    assert {row[2] for row in wandb_run["tables"]["sheets"]["data"]} == splits
    assert wandb_run["files"] == {"erased.safetensors", "config.yaml"}

    type_in("run=run", again=True)
    again = numbers_in(folder / "csv" / "version_1" / "metrics.csv")
    assert again["eval/h_o"] == [(0, pytest.approx(main["h_o"]["value"]))]
    assert numbers_in(folder / "csv" / "version_0" / "metrics.csv") == in_csv, "the first file is left as it was"
    assert len(list((folder / "tensorboard").glob("events.*"))) > 1


@pytest.mark.slow
@pytest.mark.parametrize("store", ["file", "sqlite"])
def test_a_run_in_mlflow_is_read_back(store: str, type_in: Type, tmp_path: Path, monkeypatch: Any) -> None:
    tracking = pytest.importorskip("mlflow.tracking", reason="pip install 'realera[mlflow]'")
    if store == "sqlite":
        pytest.importorskip("sqlalchemy", reason="mlflow-skinny has no database: pip install 'realera[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:./kept" if store == "file" else "sqlite:///kept.db")
    words = [*FEW, "logger=mlflow", "logger.artifact=true", "logger.images=1", "logger.mlflow.tags={mine:yes it is}"]
    type_in(*words, "run_dir=run")
    folder = tmp_path / "run"
    main = json.loads((folder / "metrics.json").read_text())["main"]
    losses = [json.loads(line)["loss"] for line in (folder / "losses.jsonl").read_text().splitlines()]

    client = tracking.MlflowClient()
    (experiment,) = [one for one in client.search_experiments() if one.name == "realera"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name, run.info.run_id) == (
        "FINISHED",
        "run",
        (folder / paths.MLFLOW_ID).read_text().strip(),
    )
    history = sorted(client.get_metric_history(run.info.run_id, "train/loss"), key=lambda point: point.step)
    assert [point.value for point in history] == pytest.approx(losses, rel=1e-5)
    assert run.data.metrics["eval/h_o"] == pytest.approx(main["h_o"]["value"])
    tags = {name: run.data.tags[name] for name in ("task", "method", "backbone", "concepts", "job_type", "mine")}
    assert tags == {
        "task": "object",
        "method": "realera",
        "backbone": "mini",
        "concepts": "airplane",
        "job_type": "train",
        "mine": "yes it is",
    }
    assert run.data.params["method/align/steps"] == "3"

    def files(place: str | None = None) -> set[str]:
        return {one.path for one in client.list_artifacts(run.info.run_id, place) if not one.is_dir}

    assert files() == {"cell.json", "sheets.json", "protocol.json"}
    assert files("sheets") == {f"sheets/{split}.png" for split in ("erase", "near", "keep", "associated", "unseen")}
    assert files("weights") == {"weights/erased.safetensors", "weights/config.yaml"}
    grid = Image.open(client.download_artifacts(run.info.run_id, "sheets/erase.png"))
    assert grid.size[0] == 2 * grid.size[1] + content.GAP
    rows = json.loads(Path(client.download_artifacts(run.info.run_id, "sheets.json")).read_text())
    assert rows["columns"] == ["prompt", "seed", "split", "verdict"] and len(rows["data"]) == 5
    kept = client.download_artifacts(run.info.run_id, "weights/erased.safetensors")
    assert Path(kept).read_bytes() == (folder / "erased.safetensors").read_bytes()

    type_in("run=run", again=True)
    (same,) = client.search_runs([experiment.experiment_id])
    assert same.info.status == "FINISHED" and len(client.get_metric_history(run.info.run_id, "eval/h_o")) == 2


OWN = """
import json
from lightning.pytorch.loggers import Logger

class Lines(Logger):
    \"\"\"A user's logger, which writes lines of JSON.\"\"\"
    name = version = "lines"
    def __init__(self, save_dir: str, colour: str = "red"):
        super().__init__()
        self.file, self.colour = f"{save_dir}/lines.jsonl", colour
    def write(self, **line):
        with open(self.file, "a") as opened:
            opened.write(json.dumps({**line, "colour": self.colour}) + "\\n")
    def log_hyperparams(self, params):
        self.write(seed=params["seed"])
    def log_metrics(self, metrics, step=None):
        self.write(step=step, metrics=metrics)
    def log_image(self, key, images):
        self.write(image=key, size=images[0].size)
    def log_table(self, key, columns, data):
        self.write(table=key, columns=columns, rows=len(data))
    def finalize(self, status):
        self.write(status=status)
"""


@pytest.fixture
def own_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words with which a command finds the yaml of a user's logger."""
    (tmp_path / "my_lines.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    place = tmp_path / "mine" / "logger"
    place.mkdir(parents=True)
    (place / "lines.yaml").write_text("lines:\n  _target_: my_lines.Lines\n  colour: blue\n")
    (place / "flat.yaml").write_text("_target_: my_lines.Lines\nimages: 1\n")
    return ["--config-dir", str(tmp_path / "mine")]


@pytest.mark.slow
def test_a_users_own_logger_just_works(
    type_in: Type,
    own_logger: list[str],
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = [word for word in small if word != "logger=none"]
    type_in("concept=airplane", "method=uce", *words, *own_logger, "logger=[lines,csv]", "run_dir=run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "lines.jsonl").read_text().splitlines()]
    assert lines[0] == {"seed": 0, "colour": "blue"} and lines[-1] == {"status": "success", "colour": "blue"}
    logged = {name for line in lines for name in line.get("metrics", ())}
    assert logged == set(numbers_in(tmp_path / "run" / "csv" / "version_0" / "metrics.csv"))
    assert {line["image"] for line in lines if "image" in line} >= {"sheets/erase", "sheets/keep"}
    assert {line["table"] for line in lines if "table" in line} == {"cell", "sheets"}

    from realera import cli

    monkeypatch.setattr(cli.log, "propagate", True)
    type_in("run=run", *own_logger, again=True)
    assert "belong to a logger of your own; type logger=lines" in caplog.text
    assert len((tmp_path / "run" / "lines.jsonl").read_text().splitlines()) == len(lines)
    type_in("run=run", *own_logger, "logger=lines", "logger.lines.colour=green", again=True)
    last = (tmp_path / "run" / "lines.jsonl").read_text().splitlines()[-1]
    assert json.loads(last) == {"status": "success", "colour": "green"}

    type_in("concept=airplane", "method=uce", *words, *own_logger, "logger=flat", "run_dir=flat")
    lines = [json.loads(line) for line in (tmp_path / "flat" / "lines.jsonl").read_text().splitlines()]
    assert lines[0] == {"seed": 0, "colour": "red"} and "eval/acc_e" in {n for x in lines for n in x.get("metrics", ())}


def test_settings_of_a_users_own_logger_are_checked(
    own_logger: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for word, said in (
        ("+logger.lines.shape=round", "no setting 'logger.lines.shape'"),
        ("logger.lines.colour=5", "logger.lines.colour=5"),
    ):
        words = ["concept=airplane", "backbone=mini", "dry_run=true", "logger=lines", word]
        monkeypatch.setattr(sys, "argv", ["train", *words, *own_logger])
        with pytest.raises(SystemExit):
            train.main()
        assert said in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["train", *words[:3], *own_logger, "logger=[wandb,flat]"])
    with pytest.raises(SystemExit):
        train.main()
    assert "the same keys" in capsys.readouterr().err


# --- settings --------------------------------------------------------------------------------------------------------


def composed(*words: str) -> dict[str, Any]:
    resolvers.register_resolvers()
    with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
        found: dict[str, Any] = composition.plain(compose("train", ["backbone=mini", *words]))["logger"]
        return found


def test_a_list_has_the_trackers_of_each_option() -> None:
    assert list(loggers.nodes(composed("logger=[wandb,csv,tensorboard]"))) == ["", "csv", "tensorboard"]
    assert list(loggers.nodes(composed("logger=mlflow"))) == ["mlflow"]
    assert not loggers.nodes(composed("logger=none")) and not loggers.nodes(None)
    alone = composed("logger=wandb")
    assert loggers.nodes(alone) == {"": {k: v for k, v in alone.items() if k not in ("images", "artifact")}}


def test_a_part_of_a_users_logger_is_not_a_tracker() -> None:
    node = {**WANDB, "style": {"_target_": OBJECT}, "settings": {"_target_": "json.JSONDecoder"}, "csv": CSV}
    assert loggers.nodes(node) == {"": {key: one for key, one in node.items() if key != "csv"}, "csv": CSV}


@pytest.mark.parametrize(("option", "extra"), [("tensorboard", "tensorboard"), ("mlflow", "mlflow")])
def test_a_missing_library_is_refused_with_the_pip_line(
    option: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    there = loggers.find_spec
    hidden = ("tensorboard", "tensorboardX", "mlflow")
    monkeypatch.setattr(loggers, "find_spec", lambda name: None if name in hidden else there(name))
    monkeypatch.setattr(sys, "argv", ["train", "concept=airplane", "backbone=mini", f"logger=[wandb,{option}]"])
    with pytest.raises(SystemExit) as left:
        train.main()
    said = capsys.readouterr().err
    assert left.value.code == 2 and f"logger.{option} needs {option}" in said
    assert f"pip install 'realera[{extra}]' (in a checkout: '.[{extra}]')" in said
    assert not list(tmp_path.iterdir())


def test_settings_without_a_tracker_that_uses_them_are_refused() -> None:
    loggers.check({**WANDB, "artifact": True, "csv": CSV})
    loggers.check({"artifact": False, "images": 3, "tensorboard": BOARD, "csv": CSV})
    for node, said in (
        ({"artifact": True, "csv": CSV, "tensorboard": BOARD}, "artifact=true does nothing"),
        ({"images": 3, "csv": CSV}, "images does nothing"),
        ({"_target_": None, "images": 3}, "images does nothing"),
    ):
        with pytest.raises(UserError, match=said):
            loggers.check(node)


def test_keys_that_hydra_does_not_read_are_refused() -> None:
    composition.check_hydra_words(["+hydra.job.env_set.A=b", "hydra.run.dir=x", "+hydra.sweep.dir=y", "+foo=1"])
    composition.check_hydra_words(["+hydra/launcher=joblib", "+hydra.callbacks.mine._target_=x.Y", "-m"])
    for word in ("+hydra.foo=1", "++hydra.run.foo=1", "+hydra.job.config.override_dirname.foo=1"):
        with pytest.raises(UserError, match=r"no setting 'hydra\."):
            composition.check_hydra_words([word])


def test_a_run_folder_may_name_the_trackers_of_the_package(tmp_path: Path) -> None:
    for logger in ({**WANDB, "csv": CSV}, {"tensorboard": BOARD}, {"mlflow": MLFLOW}, {"_target_": None}):
        assert trust.check({"logger": logger}, tmp_path)["logger"] == logger
    for logger in ({"csv": {"_target_": "os.system"}}, {"csv": {**CSV, "deeper": {"_target_": CSV["_target_"]}}}):
        with pytest.raises(UserError, match="no yaml names"):
            trust.check({"logger": logger}, tmp_path)


# --- trackers --------------------------------------------------------------------------------------------------------


class Calls(Logger):
    """Remembers its calls. failing: the call that fails."""

    name = version = "calls"

    def __init__(self, failing: str = "") -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []
        self.failing = failing

    def _call(self, name: str, what: Any) -> None:
        self.calls.append((name, what))
        if name == self.failing:
            raise ConnectionResetError(104, "Connection reset by peer")

    def log_hyperparams(self, params: Any) -> None:  # type: ignore[override]
        self._call("settings", params)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._call("numbers", (dict(metrics), step))

    def save(self) -> None:
        self._call("save", None)

    def finalize(self, status: str) -> None:
        self._call("end", status)


RESULTS = Results({"eval/acc_e": 25.0}, {}, {}, {})


def test_a_logger_is_ended_after_the_results_and_not_after_training() -> None:
    logger = Calls()
    tracker = Tracker(logger)
    logger.log_metrics({"train/loss": 1.0}, step=7)
    logger.finalize("success")  # as Lightning does when the training ends
    with trackers.closing([tracker]):
        tracker.results(RESULTS)
    assert logger.calls == [
        ("numbers", ({"train/loss": 1.0}, 7)),
        ("save", None),
        ("numbers", ({"eval/acc_e": 25.0}, 7)),
        ("end", "success"),
    ]


def test_a_tracker_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("realera"), "propagate", True)
    broken, right = Calls(failing="numbers"), Calls()
    both = [Tracker(broken), Tracker(right)]
    with pytest.raises(ZeroDivisionError), trackers.closing(both):
        for tracker in both:
            tracker.results(RESULTS)
        raise ZeroDivisionError
    assert right.calls[-1] == ("end", "failed") and [name for name, _ in broken.calls] == ["numbers"]
    (record,) = set(caplog.records)
    assert "Connection reset" in record.getMessage()


def test_a_class_that_is_no_logger_is_refused() -> None:
    with pytest.raises(UserError, match="builds a dict, which is no Lightning logger"):
        as_logger({})


def test_files_are_in_the_run_folder_or_in_one_folder_for_all_runs(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run")
    inside = local_files.place_of(run, CSV, "csv")
    assert inside == {"save_dir": str(tmp_path / "run"), "name": "csv"}
    assert local_files.place_of(run, {**CSV, "save_dir": "all"}, "csv") == {"save_dir": "all", "name": "run"}
    assert "name" not in local_files.place_of(run, {**CSV, "name": "mine"}, "csv")


def test_a_folder_of_csv_files_is_continued_in_a_new_version(tmp_path: Path) -> None:
    run = run_of(tmp_path, csv=CSV)
    for value in (1.0, 2.0):
        made = trackers.make(run)
        with trackers.closing(made):
            made[0].results(Results({"eval/acc_e": value}, {}, {}, {}))
    found = [numbers_in(tmp_path / "csv" / f"version_{i}" / "metrics.csv")["eval/acc_e"] for i in (0, 1)]
    assert found == [[(0, 1.0)], [(0, 2.0)]]


def test_a_grid_has_a_row_for_each_prompt(tmp_path: Path) -> None:
    for name, value in (("a", 0), ("b", 200)):
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(tmp_path / f"{name}.png")
    a, b = (Picture(tmp_path / f"{name}.png", hidden=False) for name in "ab")
    table = Table(["prompt", "split", "original", "erased"], [["x", "erase", a, b], ["y", "erase", None, b]])
    ((split, grid),) = Results({}, {}, {}, {"sheets": table}).grids()
    pixels = np.asarray(grid)[..., 0]
    assert split == "erase" and pixels.shape == (16 + content.GAP, 16 + content.GAP)
    assert pixels[0, 0] == 0 and pixels[0, -1] == pixels[-1, -1] == 200 and pixels[-1, 0] == 255
    assert table.words().columns == ["prompt", "split"] and not list(Results({}, {}, {}, {}).grids())
    edge = np.zeros((32, 32), np.uint8)
    edge[:, 16:] = 255
    Image.fromarray(edge).save(tmp_path / "c.png")
    assert np.ptp(np.asarray(Picture(tmp_path / "c.png", hidden=True).image())[:, 15:17].astype(int)) < 100


def test_a_table_in_markdown_has_no_markup_of_its_texts() -> None:
    table = Table(["prompt", "value"], [["a | b\n<b>*c*</b>", 1.23456], ["d", None]])
    lines = local_files.markdown(table).split("\n")
    assert lines == ["| prompt | value |", "| --- | --- |", r"| a \| b \<b\>\*c\*\</b\> | 1.235 |", "| d |  |"]


# --- a run that is judged again --------------------------------------------------------------------------------------


def chosen_for(run: Run, typed: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    made: list[Any] = []
    monkeypatch.setattr(trackers, "make", lambda run, node: made.append(node) or [])
    monkeypatch.setattr(trackers, "log_results", lambda tracked, run, metrics: None)
    trackers.log_judged(run, {}, typed)
    return made[0] if made else {}


def test_a_run_folder_does_not_name_a_server_or_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("realera"), "propagate", True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:mine")
    run = run_of(tmp_path, mlflow={**MLFLOW, "tracking_uri": "http://thief"}, csv={**CSV, "save_dir": "/etc"})
    assert not chosen_for(run, WANDB, monkeypatch)
    assert "names tracking_uri http://thief; type logger=mlflow logger.mlflow.tracking_uri=http://thief" in caplog.text
    assert "names save_dir /etc; type logger=csv logger.csv.save_dir=/etc" in caplog.text
    typed = {"mlflow": {**MLFLOW, "tracking_uri": "http://thief"}}
    assert chosen_for(run, typed, monkeypatch)["mlflow"]["tracking_uri"] == "http://thief"
    run = run_of(tmp_path, mlflow={**MLFLOW, "tracking_uri": "file:mine", "prefix": "x"}, csv={**CSV, "name": "../x"})
    assert chosen_for(run, WANDB, monkeypatch) == {
        "csv": CSV,
        "mlflow": {**MLFLOW, "tracking_uri": "file:mine"},
    }, "its own experiment, and no other setting"
    assert not chosen_for(run, {"_target_": None}, monkeypatch)


def test_only_an_agents_tracker_is_told_of_a_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(trackers, "make", lambda run, node: asked.append(node) or [])
    monkeypatch.setattr(trackers, "log_results", lambda tracked, run, metrics: None)
    trackers.log_judged(run_of(tmp_path, **WANDB, csv=CSV), {})
    assert asked == [WANDB]


def test_every_kind_of_logger_has_an_adapter() -> None:
    for name, kind in loggers.KINDS.items():
        assert issubclass(trackers.ADAPTERS[kind], Known), name
        assert loggers.kind(f"lightning.pytorch.loggers.{name}") is kind
    assert loggers.kind("lightning.pytorch.loggers.CometLogger") is loggers.OTHER


@pytest.mark.parametrize("text", ["../../x", "a b", "", "F" * 32, "0" * 31])
def test_an_invalid_id_of_mlflow_is_not_used(text: str, tmp_path: Path) -> None:
    (tmp_path / paths.MLFLOW_ID).write_text(text)
    assert mlflow_runs._kept(run_of(tmp_path), MLFLOW) is None


def test_jobs_that_start_together_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other job has made the experiment."""
    waited: list[float] = []

    class Racing(Calls):
        def __init__(self) -> None:
            super().__init__()
            self.run_id = "0" * 32

    def build(node: Any, **more: Any) -> Any:
        if not waited:
            raise RuntimeError("RESOURCE_ALREADY_EXISTS")
        return Racing()

    monkeypatch.setattr(mlflow_runs, "build", build)
    monkeypatch.setattr("time.sleep", waited.append)
    (tracker,) = trackers.make(run_of(tmp_path, mlflow=MLFLOW))
    assert waited == [1] and (tmp_path / paths.MLFLOW_ID).read_text() == "0" * 32 + "\n"
    assert tracker.title == "MLflow"


def test_the_database_of_mlflow_needs_more_than_the_skinny_package(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"mlflow"}
    monkeypatch.setattr(loggers, "_is_installed", lambda module: module in installed)
    local = {"mlflow": {**MLFLOW, "tracking_uri": "sqlite:///mlflow.db"}}
    with pytest.raises(UserError, match=r"sqlite:///mlflow.db, which mlflow-skinny cannot.*'realera\[mlflow\]'"):
        loggers.check(local)
    loggers.check({"mlflow": {**MLFLOW, "tracking_uri": "http://server"}})
    installed.add("sqlalchemy")
    loggers.check(local)
