"""experiments/wandb: each sweep file is read as W&B reads it, and its arguments are our command line's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from realera import cli, paths, preflight, train
from realera.evaluation.readings import ORDER

FILES = sorted((Path(__file__).parents[1] / "experiments" / "wandb").glob("*.yaml"))
FIRST = ("experiment", "task", "method", "backbone", "judge", "trainer", "logger")  # groups: options, not values


def read(file: Path) -> dict[str, Any]:
    sweep = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert isinstance(sweep, dict)
    return sweep


def values(parameter: dict[str, Any]) -> list[Any]:
    """What an agent may be handed of one parameter: all of its values, or the ends of its range and a middle."""
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
    """Every value of every parameter at least once, in as few samples as that takes."""
    every = {name: values(parameter) for name, parameter in sweep["parameters"].items()}
    most = max(map(len, every.values()))
    return [{name: found[min(i, len(found) - 1)] for name, found in every.items()} for i in range(most)]


def typed(sweep: dict[str, Any], sample: dict[str, Any]) -> list[str]:
    """The command an agent of W&B runs for one sample, by W&B's own code."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    filled = create_sweep_command_args({"args": {name: {"value": value} for name, value in sample.items()}})
    words: list[str] = []
    for word in create_sweep_command(list(sweep["command"])):
        words += {"${env}": ["/usr/bin/env"], "${args_no_hyphens}": filled["args_no_hyphens"]}.get(word, [word])
    assert not [word for word in words if "$" in word]
    return words


def test_there_is_a_grid_and_a_search() -> None:
    assert {read(file)["method"] for file in FILES} == {"grid", "bayes"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_parameter_is_a_setting_and_its_values_compose(file: Path) -> None:
    sweep = read(file)
    assert set(sweep) == {"name", "project", "program", "command", "method", "metric", "parameters"}
    assert (Path(__file__).parents[1] / sweep["program"]).is_file()
    assert sweep["metric"] == {"name": "eval/h_o", "goal": "maximize"} and "h_o" in ORDER
    cli.register_resolvers()
    with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
        for sample in samples(sweep):
            words = typed(sweep, sample)
            assert words[:4] == ["/usr/bin/env", "python", "-m", "realera.train"]
            cfg = compose("train", words[4:])
            for name, value in sample.items():
                if name not in FIRST:
                    found = OmegaConf.select(cfg, name)
                    assert found == value or (isinstance(value, str) and found is not None), name
            preflight.check_settings(cli.plain(cfg))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_agent_s_command_runs_a_cell(
    file: Path, tiny_sd: Path, tiny_judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = read(file)
    last = samples(sweep)[-1]
    small = {
        "backbone.pretrained": str(tiny_sd),
        "backbone.text": "{width:32,row_norm:5.7,max_length:77}",
        "backbone.sampler.steps": 2,
        "task.images": "{erase:2,near:1,keep:1,associated:0,unseen:0}",
        "judge": "miniature",
        "judge.weights": str(tiny_judge),
        "trainer": "cpu",
        "method.align.steps": 2,
        "method.latents.images": 2,
        "method.latents.batch": 1,
    }
    if "method.neighbours.d1" in last:
        last["method.neighbours.d1"] = 4  # the tiny model's rows are short
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["train", *typed(sweep, {**last, **small})[4:]])
    train.main()
    (folder,) = (tmp_path / "runs").glob("*-realera-mini-*")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["main"]["h_o"]["value"] is not None
    assert len(list(folder.glob("wandb/offline-run-*/*.wandb"))) == 1

    monkeypatch.setenv("WANDB_SWEEP_ID", "trial")  # an agent's process: the run stands, and its numbers are told again
    told: list[Any] = []
    monkeypatch.setattr("realera.tracking.log_judged", lambda run, metrics: told.append((run.folder, metrics)))
    train.main()
    ((where, what),) = told
    assert where.resolve() == folder.resolve() and what["main"]["h_o"] == metrics["main"]["h_o"]
