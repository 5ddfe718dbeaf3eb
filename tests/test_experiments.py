"""What stands in experiments/ can be read, and its settings be taken."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from options import check_part, method_settings
from realera.paths import CONF_DIR
from realera.runs import preflight
from realera.settings import composition, resolvers

FOLDER = Path(__file__).parents[1] / "experiments"
VARIANTS = [
    line.split("|") for line in (FOLDER / "ambiguities_miniature" / "variants.txt").read_text("utf-8").splitlines()
]


@pytest.mark.parametrize("file", sorted(FOLDER.rglob("*.json")), ids=lambda file: str(file.relative_to(FOLDER)))
def test_results_are_json(file: Path) -> None:
    assert json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def variants() -> dict[str, dict[str, Any]]:
    """The settings of every row of variants.txt, by its label."""
    resolvers.register_resolvers()
    found = {}
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        for label, *said in VARIANTS:
            given = [
                "method=realera-text",
                "backbone=mini",
                "concept=gun",
                "anchor=room",
                *shlex.split(said[-1] if said else ""),
            ]
            found[label] = composition.plain(compose("train", given))
    return found


@pytest.mark.slow
def test_every_decision_that_is_varied_differs_from_the_defaults_and_from_the_others(
    variants: dict[str, dict[str, Any]],
) -> None:
    methods = [config["method"] for config in variants.values()]
    assert len(variants) == len(VARIANTS) and methods[0] == variants["defaults"]["method"]
    assert all(one != other for i, one in enumerate(methods) for other in methods[:i])


@pytest.mark.slow
def test_every_decision_that_is_varied_can_be_taken(
    variants: dict[str, dict[str, Any]], new_backbone: Callable[..., Any]
) -> None:
    """Its band holds points, and there are layers for its LoRA."""
    for label, config in variants.items():
        preflight.check_settings(config)
        if (align := config["method"]["align"]) is not None:
            lora = composition.build(align["lora"])
            assert new_backbone().add_adapter(lora, torch.Generator()), label


def test_every_variant_of_valera_s_ablation_can_be_taken_and_is_another() -> None:
    lines = (FOLDER / "valera_ablation" / "variants.txt").read_text(encoding="utf-8").splitlines()
    own = OmegaConf.to_container(method_settings("valera").edit, resolve=False)
    assert isinstance(own, dict)
    varied = []
    for line in lines:
        label, _, said = line.partition("|")
        given = yaml.safe_load(f"{{{said.replace('TOLD', '[cat]').replace('QUARTER', __file__)}}}")
        check_part({**own, **given}, f"method.edit of {label}")
        varied.append({**own, **given})
    assert varied[0] == own and all(one != other for i, one in enumerate(varied) for other in varied[:i])


def called(script: str, tmp_path: Path, **more: str) -> list[list[str]]:
    """The command lines of Python that a script types, none of which is run."""
    stub, typed = tmp_path / "python", tmp_path / "typed"
    stub.write_text(f"#!/usr/bin/env bash\nprintf '%s\\0' \"$@\" '' >> {shlex.quote(str(typed))}\n")
    stub.chmod(0o755)
    environ = {**os.environ, "PYTHON": str(stub), "RUNS": str(tmp_path / "runs"), **more}
    subprocess.run(["bash", str(FOLDER / script)], env=environ, check=True)
    return [call.split("\0") for call in typed.read_text(encoding="utf-8").split("\0\0") if call]


def test_the_study_s_script_types_what_the_command_line_takes(tmp_path: Path) -> None:
    """Every run of one variant, as the script types it, up to the task that is made of it."""
    calls = called("ambiguities_miniature/run.sh", tmp_path, VARIANTS="defaults")
    trained = [call[2:] for call in calls if call[:2] == ["-m", "realera.train"]]
    assert len(trained) == 6 and any(call[:2] == ["-m", "realera.report"] for call in calls)
    resolvers.register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        made = [composition.plain(composition.with_concepts(compose("train", words))) for words in trained]
    assert {(one["concept"], one["seed"], one["task"]["first_seed"]) for one in made} == {
        (concept, seed, 500 * seed) for concept in ("gun", "knife", "bomb") for seed in (100, 101)
    }
    for config in made:
        preflight.check_settings(config)
        assert len(composition.build_task(config).eval_prompts()) in (48, 52)


TABLES = {
    "table1": "table1",
    "table3": "table3",
    "nsfw": "table2",
    "nsfw_each": "table2_each",
    "celebrity": "celebrity",
    "style": "style",
}


@pytest.mark.parametrize("folder", TABLES)
@pytest.mark.parametrize("methods", [None, "mace,uce", "realera,uce,realera-text"])
def test_a_table_s_script_runs_it_whole_or_a_part(folder: str, methods: str | None, tmp_path: Path) -> None:
    """A part that METHODS names may lack the system that differences are from, and then asks for none."""
    calls = called(f"{folder}_miniature/run.sh", tmp_path, **({"METHODS": methods} if methods else {}))
    train, report = (next(c for c in calls if c[:2] == ["-m", f"realera.{door}"]) for door in ("train", "report"))
    assert f"experiment={TABLES[folder]}" in train and f"results=experiments/{folder}_miniature" in report
    bases = [word.removeprefix("base=") for word in report if word.startswith("base=")]
    assert bases == ([] if methods == "mace,uce" else ["realera-text" if folder == "table3" else "realera"])
    assert [word for word in train if "params.method=" in word] == (
        [] if methods is None else [f"hydra.sweeper.params.method='{methods}'"]
    )


def test_the_transformer_s_script_searches_settings_on_it(tmp_path: Path) -> None:
    """By the script of the U-Net's search, into a folder of its own."""
    calls = called("transformer_miniature/run.sh", tmp_path, PARTS=" ", SEARCH="1")
    trained = [call for call in calls if "realera.train" in call]
    assert trained and all("backbone=mini-dit" in call and "backbone=mini" not in call for call in trained)
    assert {word.partition("=")[2] for call in trained for word in call if word.startswith("task=")} == {
        "object",
        "celebrity",
    }
    here = "experiments/transformer_miniature/search"
    reported = [word for call in calls for word in call if word.startswith("results=")]
    assert f"results={here}/mace-refinement-celebrity" in reported and all(f"={here}/" in word for word in reported)
    assert calls[-1] == ["experiments/tuning_rivals/choose.py", here]


def test_the_transformer_s_script_runs_both_tables_on_it(tmp_path: Path) -> None:
    calls = called("transformer_miniature/run.sh", tmp_path, PARTS="classes people")
    trained = [call for call in calls if "realera.train" in call]
    assert [{"backbone=mini-dit", "hydra.sweeper.params.seed='0,1'"} <= {*call} for call in trained] == [True, True]
    assert [next(word for word in call if word.startswith("experiment=")) for call in trained] == [
        "experiment=table1",
        "experiment=celebrity",
    ]
    methods = next(word for word in trained[0] if "params.method=" in word).partition("=")[2].strip("'").split(",")
    resolvers.register_resolvers()
    for method in methods:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            words = ["experiment=table1", "backbone=mini-dit", f"method={method}", "concept=cat", "seed=0"]
            preflight.check_settings(composition.plain(composition.with_concepts(compose("train", words))))


@pytest.mark.parametrize("table", ["table1", "table2", "table2_each", "celebrity", "style"])
def test_no_table_forgets_a_system(table: str) -> None:
    """All methods but RealEra's ablation and MACE's: of RealEra's two spaces the default's own name stands for one."""
    resolvers.register_resolvers()
    every = {file.stem for file in (CONF_DIR / "method").glob("*.yaml")}
    for backbone, default in (("mini", "realera-value"), ("sd14", "realera-text")):
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            words = [f"experiment={table}", f"backbone={backbone}"]
            made = compose("train", words, return_hydra_config=True).hydra.sweeper.params.method
        parts = {"mace-ablation", "mace-refinement", "realera-closed-form", "realera-no-mining", "realera-no-beyond"}
        left = {*parts, default}
        assert set(str(made).split(",")) == every - left


@pytest.mark.slow
def test_the_measurements_are_rehearsed_on_the_cpu(tmp_path: Path) -> None:
    """What `make bench` and the script for a GPU measure: an alignment step and a drawing, each beside its peer."""
    results = tmp_path / "results.json"
    words = [sys.executable, "experiments/cuda/measure.py", "sd14-float32", str(results), "cpu"]
    done = subprocess.run(words, cwd=FOLDER.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    part = json.loads(results.read_text())["sd14-float32"]
    assert part["draw"]["ratio"] > 0 and part["erase"]["ratio"] > 0 and part["erase"]["adapted_layers"] == 14
    told = subprocess.run(
        [sys.executable, "experiments/bench/table.py", str(results)],
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
    )
    assert "bare passes" in told.stdout and "diffusers" in told.stdout, told.stderr


@pytest.mark.slow
def test_the_benchmark_of_valera_times_both_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    resolvers.register_resolvers()
    spec = importlib.util.spec_from_file_location("bench_of_valera", FOLDER / "bench" / "valera.py")
    assert spec and spec.loader
    bench: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    monkeypatch.setattr(bench, "COUNTS", (1, 2))
    (row,) = bench.measured(["backbone=mini"])
    assert row["names"] == 2 and row["text_s"] > 0 and row["edit_s"] > 0
