"""The content of a W&B run, read back from its offline file."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from hydra import compose, initialize_config_dir
from lightning.pytorch.loggers import Logger
from PIL import Image

from realera import cli, paths
from realera.contracts import Mode, Prompt, Split, Verdict
from realera.evaluation.measures import MEAN_PROB
from realera.evaluation.records import ManifestEntry, verdict_file, write_manifest, write_verdicts
from realera.evaluation.results import measure
from realera.runs.folders import FILES, Run, digest, identity
from realera.settings import composition, resolvers
from realera.tracking import trackers, wandb_runs
from realera.tracking.base import Tracker
from realera.training.fit import fit
from wandb_files import read_back, whole

LOGGER = {"_target_": "lightning.pytorch.loggers.WandbLogger", "project": "realera", "mode": "offline"}
OBJECT, NSFW = "realera.tasks.objects.ObjectTask", "realera.tasks.nsfw.NsfwTask"


def judged(folder: Path, task: str, concepts: Sequence[str], mode: Mode, blur: bool | None = None) -> Run:
    """A run with checkerboard images, two per prompt."""
    splits: list[tuple[Split, str]] = [(split, c) for split in ("erase", "near") for c in concepts]  # type: ignore[misc]
    prompts = [
        Prompt(f"{split}-{c.replace('/', '-')}-{i}", f"a {split} of {c}", c, split, i)
        for split, c in [*splits, ("keep", "dog")]
        for i in (0, 1)
    ]
    pixels = np.indices((32, 32)).sum(axis=0) % 2 * 255
    rows = []
    for p in prompts:
        for place in ("images", "originals"):
            file = folder / place / f"{p.id}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.stack([pixels] * 3, axis=-1).astype(np.uint8)).save(file)
        rows.append(ManifestEntry(p, f"images/{p.id}.png", "s", f"originals/{p.id}.png"))
    write_manifest(folder, rows)
    boxes = {"boxes": {"belly": 2, "anus": 1}, "detected": True} if mode == "detected" else {}
    for which, value in (("erased", 0.25), ("original", 1.0)):
        said = [Verdict(p.id, value, p.concept if value == 1 else "sky", boxes) for p in prompts]
        write_verdicts(verdict_file(folder, "eye", which), said)  # type: ignore[arg-type]
    named = [{"target": concept, "anchor": "sky"} for concept in concepts]
    protocol = {"task": task, "concepts": named, "judge": {"judge": "eye"}, "captions": ["a"] * 30_000}
    terms = ("acc_e", "acc_s", "acc_g") if mode != "detected" else ()
    measure(folder, "eye", protocol, dict.fromkeys(MEAN_PROB, mode), terms)
    method = {"name": "realera", "neighbours": {"m": math.inf, "n": 25, "d1": 20.0, "s_lo": 0.7}}
    config = {"task": {"_target_": task}, "concept": list(concepts), "seed": 3, "logger": LOGGER, "blur": blur}
    return Run(folder, {**config, "method": method, "backbone": {"name": "mini"}})


def with_logger(run: Run, **settings: Any) -> Run:
    return Run(run.folder, {**run.config, "logger": {**LOGGER, **settings}})


def metrics_of(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.folder / "metrics.json").read_text())
    return found


@pytest.mark.slow
def test_settings_losses_metrics_and_images_are_logged(
    tmp_path: Path, new_backbone: Callable[..., Any], new_pairs: Callable[..., Any], load_method: Callable[..., Any]
) -> None:
    run = judged(tmp_path, OBJECT, ["cat"], "mean_prob")
    backbone = new_backbone()
    tracked = trackers.make(run)
    with trackers.closing(tracked):
        pairs = new_pairs(backbone, ("cat", "field"))
        settings = {"accelerator": "cpu", "devices": 1}
        fit(
            backbone,
            load_method("realera"),
            pairs,
            run_dir=tmp_path,
            seed=0,
            config={},
            cache=tmp_path / "cache",
            trainer=settings,
            loggers=trackers.loggers(tracked),
        )
        trackers.log_results(tracked, run, metrics_of(run))
    found = read_back(tmp_path)
    assert found["config"]["seed"] == 3 and found["config"]["concept"] == ["cat"]
    losses = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    for name in {name for line in losses for name in line if name != "step"}:
        expected = [line[name] for line in losses if name in line]
        assert found["history"][f"train/{name}"] == pytest.approx(expected, rel=1e-5), name
    summary = found["summary"]
    assert "edit/relative_change" in summary
    assert summary["eval/acc_e"] == 25 and summary["eval/original/acc_e"] == 100 and summary["eval/acc_e_top1"] == 0
    assert summary["eval/h_o"] == pytest.approx(3 / (2 / 75 + 1 / 25))
    assert (summary["sheets/_type"], summary["sheets/nrows"], summary["sheets/ncols"]) == ("table-file", 6, 6)
    content = found["tables"]["sheets"]
    assert content["columns"] == ["prompt", "seed", "split", "original", "erased", "verdict"]
    first = content["data"][0]
    assert first[:3] == ["a erase of cat", 0, "erase"] and first[5] == "sky (cat 0.25)"
    assert {int(np.ptp(image)) for image in found["images"]} == {255}, "not blurred"


def test_every_folder_has_its_own_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def made(node: Any, **settings: Any) -> Any:
        asked.append(settings["id"])
        return FailingLogger("offline")

    monkeypatch.setattr(wandb_runs, "build", made)
    monkeypatch.setattr("wandb.setup", lambda settings: None)
    config = {"task": {"_target_": OBJECT}, "concept": "cat", "method": {"name": "uce"}, "logger": LOGGER}
    first, other = (Run(tmp_path / root / "cat-uce-mini-01234567", config) for root in ("runs", "elsewhere"))
    for run in (first, other, first, other):
        trackers.make(run)
    assert asked[:2] == asked[2:] and len(set(asked)) == 2, "one id per folder, the same when the run is resumed"
    first.folder.rename(tmp_path / "moved")
    trackers.make(Run(tmp_path / "moved", config))
    assert asked[-1] == asked[0]
    assert paths.WANDB_ID in FILES, "a run that is overwritten gets a new id"


def test_a_run_stays_in_its_first_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def made(node: Any, **settings: Any) -> Any:
        asked.append(node["group"])
        return FailingLogger("offline")

    monkeypatch.setattr(wandb_runs, "build", made)
    monkeypatch.setattr("wandb.setup", lambda settings: None)
    monkeypatch.setattr(composition, "in_sweep", lambda: True)
    config = {"task": {"_target_": OBJECT}, "concept": "cat", "method": {"name": "uce"}, "logger": LOGGER}
    run = Run(tmp_path, config)
    for stamp in ("train", "evaluate"):
        monkeypatch.setenv("REALERA_STAMP", stamp)
        trackers.make(run)
    trackers.make(with_logger(run, group="typed"))
    assert asked == ["train", None, "typed"]


def test_wandb_project_applies_to_runs_and_dashboards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    resolvers.register_resolvers()
    with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
        for project in ("realera", "mine"):
            train, board = compose("train", ["backbone=mini"]), compose("dashboard")
            assert (train.logger.project, board.project) == (project, project)
            monkeypatch.setenv("WANDB_PROJECT", "mine")
        typed = compose("train", ["backbone=mini", "logger.project=typed"])
    assert typed.logger.project == "typed"


def test_a_run_that_was_logged_before_ids_were_saved_keeps_its_id(tmp_path: Path) -> None:
    run = Run(tmp_path / "cat-uce-mini-01234567", {"concept": "cat", "method": {"name": "uce"}})
    (run.folder / "wandb").mkdir(parents=True)
    assert wandb_runs.run_id(run) == digest([run.folder.name, identity(run.config)])
    assert wandb_runs.run_id(Run(run.folder, {**run.config, "seed": 3})) == wandb_runs.run_id(run)


def test_a_run_of_an_agent_has_the_id_from_the_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"concept": "cat", "method": {"name": "uce"}}
    monkeypatch.setenv("WANDB_RUN_ID", "a1b2c3d4")
    alone = Run(tmp_path / "alone", config)
    assert wandb_runs.run_id(alone) != "a1b2c3d4", "without an agent, several runs may follow in this process"
    monkeypatch.setenv("WANDB_SWEEP_ID", "trial")
    run = Run(tmp_path / "run", config)
    assert wandb_runs.run_id(run) == "a1b2c3d4"
    known = wandb_runs.run_id(alone)
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_ID"):  # judged again without the agent
        monkeypatch.delenv(name)
    assert wandb_runs.run_id(run) == "a1b2c3d4" and wandb_runs.run_id(alone) == known != "a1b2c3d4"


@pytest.mark.slow
def test_group_tags_config_and_summary_describe_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composition, "in_sweep", lambda: True)
    monkeypatch.setenv("REALERA_STAMP", "20260101-101010")
    run = with_logger(judged(tmp_path, OBJECT, ["cat", "C" * 70, *"abcdef"], "mean_prob"), images=1, tags=["mine"])
    costs = {
        "format_version": 1,
        "device": "cpu, 1 thread",
        "stages": {"load": 9.0, "edit": 1.5, "train": 2.0, "draw": 30.0},
        "passes": {"erase": 400, "draw": 20},
        "shared": {"latents": {"seconds": 4.0, "passes": 100}},
        "peak_memory_erasing_mb": {"host": 700.5, "device": None},
    }
    (tmp_path / "costs.json").write_text(json.dumps(costs))
    metrics = metrics_of(run)
    tracked = trackers.make(run)
    with trackers.closing(tracked):
        trackers.log_results(tracked, run, metrics)
    found = read_back(tmp_path)
    record, config, summary = found["run"], found["config"], found["summary"]
    assert (record.run_group, record.job_type, record.display_name) == ("20260101-101010", "train", tmp_path.name)
    assert list(record.tags) == ["object", "realera", "mini", "cat", "C" * 64, "a", "b", "c", "and 3 more", "mine"]
    assert config["method"]["neighbours"] == {"m": "inf", "n": 25, "d1": 20.0, "s_lo": 0.7}, "nested, and finite"
    assert config["system"] == "realera"
    assert config["protocol"]["judge"] == {"judge": "eye"} and config["protocol"]["captions"] == "30000 entries"
    main = metrics["main"]
    for name in ("acc_e", "acc_s", "acc_g", "h_o"):
        ends = [main[name][key] for key in ("value", "low", "high")]
        assert [summary[f"eval/{name}{end}"] for end in ("", "_low", "_high")] == pytest.approx(ends)
    assert summary["cost/stage/train"] == 2 and summary["cost/memory_mb"] == 700.5
    assert summary["cost/seconds"] == 7.5 and summary["cost/passes"] == 500, "to erase, with cached inputs"
    splits = [row[2] for row in found["tables"]["sheets"]["data"]]
    assert sorted(splits) == ["erase", "keep", "near"], "images=1: one row per split"
    cell = dict(zip(found["tables"]["cell"]["columns"], found["tables"]["cell"]["data"][0], strict=True))
    assert (cell["system"], cell["m"], cell["d1"], cell["seconds"]) == ("realera", "inf", 20.0, 7.5)
    assert (cell["acc_s"], cell["acc_s_low"]) == (main["acc_s"]["value"], main["acc_s"]["low"])


@pytest.mark.slow
def test_the_original_model_is_a_separate_row(tmp_path: Path) -> None:
    run = judged(tmp_path, OBJECT, ["cat"], "mean_prob")
    run = Run(tmp_path, {**run.config, "method": {"name": "original"}})
    typed = {**LOGGER, "group": None, "images": 2}
    trackers.log_judged(with_logger(run, group="mine", images=2), metrics_of(run), typed)
    found = read_back(tmp_path)
    assert (found["run"].run_group, found["run"].job_type, found["config"]["system"]) == (
        "mine",
        "evaluate",
        "original",
    )
    before, after = (found["tables"]["sheets"]["data"][0][i] for i in (3, 4))
    assert before is not None and after is None, "its images are the original model's"


def test_a_run_judged_again_is_logged_with_its_own_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(trackers, "make", lambda run, node: made.append(node) or [])
    run = with_logger(Run(tmp_path, {}), group="mine", mode="online")
    trackers.log_judged(run, {"main": {}, "original": None}, {**LOGGER, "mode": "offline", "group": None})
    assert made.pop() == {**LOGGER, "group": "mine", "mode": "offline"}, "its own settings with the command's mode"
    trackers.log_judged(run, {"main": {}, "original": None}, {"_target_": None})
    assert not made, "logger=none was typed"
    trackers.log_judged(Run(tmp_path, {"logger": {"_target_": None}}), {"main": {}, "original": None}, LOGGER)
    assert not made, "the run itself was not logged"


@pytest.mark.slow
@pytest.mark.parametrize(("error", "status"), [(None, 0), (ZeroDivisionError, 1), (KeyboardInterrupt, 255)])
def test_a_failed_run_is_not_marked_as_finished(error: type[BaseException] | None, status: int, tmp_path: Path) -> None:
    tracked = trackers.make(judged(tmp_path, OBJECT, ["cat"], "mean_prob"))
    with pytest.raises(error) if error else nullcontext(), trackers.closing(tracked):
        if error:
            raise error
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    (ending,) = [record.exit for record in whole(file) if record.WhichOneof("record_type") == "exit"]
    assert ending.exit_code == status


class FailingLogger(Logger):
    """A logger that fails in some modes, and from its `fails_at`-th other call on."""

    def __init__(self, mode: str, fails_in: Sequence[str] = (), fails_at: int = 9) -> None:
        self.mode, self.fails_in, self.fails_at = mode, fails_in, fails_at
        self.calls: list[str] = []
        super().__init__()

    name = version = "failing"

    def log_hyperparams(self, settings: Any) -> None:
        if self.mode in self.fails_in:
            raise wandb.errors.CommError("Failed to get resume status: context deadline exceeded")

    def log_metrics(self, numbers: Any, step: int | None = None) -> None:
        self.calls.append("log_metrics")
        if len(self.calls) >= self.fails_at:
            raise ConnectionResetError(104, "Connection reset by peer")

    save = finalize = log_hyperparams


@pytest.mark.parametrize(
    ("fails_in", "begun", "says"),
    [
        ((), "online", ""),
        (
            ("online",),
            "offline",
            r"W&B is offline .*deadline exceeded\): send the run later with wandb sync .*wandb/\*",
        ),
        (("online", "offline"), None, r"deadline exceeded\): the run continues without W&B"),
    ],
)
def test_an_unreachable_server_does_not_end_a_run(
    fails_in: Sequence[str],
    begun: str | None,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(wandb_runs, "build", lambda node, **more: FailingLogger(node["mode"], fails_in))
    monkeypatch.setattr("wandb.setup", lambda settings: None)
    monkeypatch.setattr("wandb.teardown", lambda: None)
    run = judged(tmp_path, OBJECT, ["cat"], "mean_prob")
    run.config["logger"] = {**LOGGER, "mode": "online"}
    with caplog.at_level("WARNING"), propagating(monkeypatch):
        tracked = trackers.make(run)
    assert [one.logger.mode for one in tracked] == ([begun] if begun else [])  # type: ignore[attr-defined]
    assert len(set(caplog.records)) == bool(says) and re.search(says, caplog.text)


def test_a_logger_that_fails_during_a_run_warns_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = Tracker(FailingLogger("online", fails_at=2)).logger
    with caplog.at_level("WARNING"), propagating(monkeypatch):
        for step in range(4):
            logger.log_metrics({"loss": 1.0}, step=step)
        logger.finalize("success")
    assert logger.calls == ["log_metrics"] * 2, "the second fails, and is the last"  # type: ignore[attr-defined]
    (record,) = set(caplog.records)
    assert "ConnectionResetError" in record.getMessage() and "continues without it" in record.getMessage()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_exit_of_the_process_is_not_a_failure_of_its_logger(error: type[BaseException]) -> None:
    def ends(numbers: Any, step: int | None = None) -> None:
        raise error

    failing = FailingLogger("online")
    failing.log_metrics = ends  # type: ignore[method-assign]
    with pytest.raises(error):
        Tracker(failing).logger.log_metrics({})


@contextmanager
def propagating(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes log records reach pytest in the block, even if a command has set up logging before."""
    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger("realera"), "propagate", True)
        yield


@pytest.mark.slow
def test_there_is_no_image_table_if_none_is_wanted(tmp_path: Path) -> None:
    run = with_logger(judged(tmp_path, OBJECT, ["cat"], "mean_prob"), images=0)
    trackers.log_judged(run, metrics_of(run))
    found = read_back(tmp_path)
    assert set(found["tables"]) == {"cell"} and not found["images"]


@pytest.mark.slow
def test_explicit_images_are_uploaded_blurred_and_counted(tmp_path: Path) -> None:
    run = judged(tmp_path, NSFW, ["nudity", "a/b"], "detected")
    tracked = trackers.make(run)
    with trackers.closing(tracked):
        trackers.log_results(tracked, run, metrics_of(run))
    found = read_back(tmp_path)
    summary = found["summary"]
    assert summary["eval/nudity/acc_e"] == 100 and summary["eval/a-b/acc_g"] == 100
    assert summary["eval/counts/belly"] == 8 and summary["eval/counts/anus"] == 4 and summary["eval/counts/total"] == 8
    assert "eval/h_o" not in summary
    assert found["images"] and all(np.ptp(image) < 60 for image in found["images"])


def test_a_run_folder_does_not_decide_where_its_results_are_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(trackers, "make", lambda run, node: asked.append(node) or [])
    monkeypatch.setattr(trackers, "log_results", lambda tracked, run, metrics: None)
    monkeypatch.setattr(cli.log, "propagate", True)
    own = {**LOGGER, "mode": "offline", "entity": "thief", "project": "p", "settings": {"base_url": "x"}}
    run = Run(tmp_path, {"task": {"_target_": OBJECT}, "concept": "cat", "method": {"name": "uce"}, "logger": own})
    typed = {"_target_": LOGGER["_target_"], "mode": "online", "entity": None, "project": "realera"}
    trackers.log_judged(run, {}, typed)
    assert not asked and "names entity thief" in caplog.text
    trackers.log_judged(run, {}, {**typed, "entity": "thief"})
    trackers.log_judged(run, {}, {**typed, "mode": "offline"})
    assert [node["mode"] for node in asked] == ["online", "offline"] and not any("settings" in node for node in asked)


@pytest.mark.parametrize("text", ["../../x", "a b", "", "x" * 200])
def test_an_invalid_id_is_replaced(text: str, tmp_path: Path) -> None:
    (tmp_path / paths.WANDB_ID).write_text(text)
    assert re.fullmatch(r"[0-9a-f]{12}", wandb_runs.run_id(Run(tmp_path, {})))


def test_names_and_tags_of_the_environment_are_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def made(node: Any, **settings: Any) -> Any:
        asked.append({**node, **settings})
        return FailingLogger("offline")

    monkeypatch.setattr(wandb_runs, "build", made)
    monkeypatch.setattr("wandb.setup", lambda settings: None)
    config = {"task": {"_target_": OBJECT}, "concept": "cat", "method": {"name": "uce"}, "logger": LOGGER}
    run = Run(tmp_path / "run", config)
    trackers.make(run)
    monkeypatch.setenv("WANDB_NAME", "my name")
    monkeypatch.setenv("WANDB_TAGS", "a, b,,uce")
    monkeypatch.setenv("WANDB_RUN_GROUP", "my group")
    trackers.make(with_logger(run, tags=["typed"]))
    trackers.make(with_logger(run, group="typed"))
    assert [one["name"] for one in asked] == ["run", "my name", "my name"]
    assert [one["group"] for one in asked] == [None, "my group", "typed"]
    assert [one["tags"] for one in asked[:2]] == [["object", "uce", "cat"], ["object", "uce", "cat", "typed", "a", "b"]]


def test_an_empty_mode_is_no_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "")
    assert resolvers.wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert resolvers.wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolvers.wandb_mode() == "disabled"
