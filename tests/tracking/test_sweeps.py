"""experiments/wandb: W&B can read each sweep file, and its arguments are settings of our command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from quick import slow_unless
from realera import paths, train
from realera.evaluation.measures import ORDER
from realera.runs import preflight
from realera.settings import composition, resolvers

FILES = sorted((Path(__file__).parents[2] / "experiments" / "wandb").glob("*.yaml"))


def read(file: Path) -> dict[str, Any]:
    sweep = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert isinstance(sweep, dict)
    return sweep


def values(parameter: dict[str, Any]) -> list[Any]:
    """Values that an agent may get for one parameter: all values, or both ends and the middle of its range."""
    if "value" in parameter:
        return [parameter["value"]]
    if "values" in parameter:
        return list(parameter["values"])
    low, high = parameter["min"], parameter["max"]
    middle = {
        "uniform": lambda: (low + high) / 2,
        "int_uniform": lambda: (low + high) // 2,
        "log_uniform_values": lambda: (low * high) ** 0.5,
    }[parameter["distribution"]]()
    return [low, middle, high]


def samples(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """The fewest samples that contain every value of every parameter."""
    every = {name: values(parameter) for name, parameter in sweep["parameters"].items()}
    most = max(map(len, every.values()))
    return [{name: found[min(i, len(found) - 1)] for name, found in every.items()} for i in range(most)]


def typed(sweep: dict[str, Any], sample: dict[str, Any]) -> list[str]:
    """The command that a W&B agent runs for one sample, made by W&B's own code."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    filled = create_sweep_command_args({"args": {name: {"value": value} for name, value in sample.items()}})
    words: list[str] = []
    for word in create_sweep_command(list(sweep["command"])):
        words += {"${env}": ["/usr/bin/env"], "${args_no_hyphens}": filled["args_no_hyphens"]}.get(word, [word])
    assert not [word for word in words if "$" in word]
    return words


def kept_by_wandb(sample: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The config of an agent's W&B run after our logger has logged the settings."""
    from wandb.sdk.wandb_config import Config

    kept = Config()
    kept.merge_locked(sample, user="sweep", _allow_val_change=True)  # as wandb_run.py does at the start of a run
    kept.update(config, allow_val_change=True)  # as Lightning's logger does
    return kept.as_dict()


def test_there_is_a_grid_and_a_search() -> None:
    assert {read(file)["method"] for file in FILES} == {"grid", "bayes"}


@pytest.mark.parametrize("file", slow_unless(FILES, FILES[0]), ids=lambda file: file.stem)
def test_every_parameter_is_a_setting_and_its_values_compose(file: Path) -> None:
    sweep = read(file)
    assert set(sweep) == {"name", "project", "program", "command", "method", "metric", "parameters"}
    assert (Path(__file__).parents[2] / sweep["program"]).is_file()
    assert sweep["metric"] == {"name": "eval/h_o", "goal": "maximize"} and "h_o" in ORDER
    resolvers.register_resolvers()
    with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
        for sample in samples(sweep):
            words = typed(sweep, sample)
            assert words[:4] == ["/usr/bin/env", "python", "-m", "realera.train"]
            cfg = compose("train", words[4:])
            assert {name: OmegaConf.select(cfg, name) for name in sample} == sample
            config = composition.plain(cfg)
            preflight.check_settings(config)
            kept = kept_by_wandb(sample, config)
            assert {key: kept[key] for key in config} == config, "the sweep locks none of them"


def as_an_agent(monkeypatch: pytest.MonkeyPatch, sample: dict[str, Any]) -> None:
    """Sets the environment that an agent gives to its processes."""
    import wandb
    from wandb.sdk.lib.config_util import save_config_file_from_dict

    save_config_file_from_dict(
        "wandb/sweep-trial/parameters.yaml", {name: {"value": value} for name, value in sample.items()}
    )
    for name, value in (
        ("SWEEP_ID", "trial"),
        ("RUN_ID", "a1b2c3d4"),
        ("SWEEP_PARAM_PATH", "wandb/sweep-trial/parameters.yaml"),
    ):
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()  # W&B reads its variables only once


@pytest.fixture
def _no_agent_after() -> Iterator[None]:
    yield
    import wandb

    wandb.teardown()


@pytest.mark.slow
@pytest.mark.usefixtures("_no_agent_after")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_command_of_an_agent_runs_a_cell(
    file: Path, tiny_sd: Path, tiny_judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = read(file)
    last = samples(sweep)[-1]
    small = [
        f"backbone.pretrained={tiny_sd}",
        "backbone.text={width:32,row_norm:5.7,max_length:77}",
        "backbone.sampler.steps=2",
        "task.images={erase:2,near:1,keep:1,associated:0,unseen:0}",
        "judge=miniature",
        f"judge.weights={tiny_judge}",
        "trainer=cpu",
        "method.align.steps=2",
        "method.latents.images=2",
        "method.latents.batch=1",
    ]
    if "method.neighbours.d1" in last:
        last["method.neighbours.d1"] = 4  # the tiny model's rows are short
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["train", *typed(sweep, last)[4:], *small])
    as_an_agent(monkeypatch, last)
    train.main()
    (folder,) = (tmp_path / "runs").glob("*-realera*-mini-*")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["main"]["h_o"]["value"] is not None
    (logged,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert logged.name == "run-a1b2c3d4.wandb" and (folder / paths.WANDB_ID).read_text() == "a1b2c3d4\n"

    # the run exists, and its results are logged again
    logged_again: list[Any] = []
    monkeypatch.setattr(
        "realera.tracking.trackers.log_judged", lambda run, metrics: logged_again.append((run.folder, metrics))
    )
    train.main()
    ((where, what),) = logged_again
    assert where.resolve() == folder.resolve() and what["main"]["h_o"] == metrics["main"]["h_o"]
