"""The settings of a run, with names and types."""

from __future__ import annotations

import ast
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

import realera
from realera.contracts import Sampler
from realera.settings import composition
from realera.settings.run_settings import Group, Settings, TrainerSettings

ROOT = Path(realera.__file__).parent
GROUPS = {"task", "method", "backbone", "judge", "trainer", "logger", "attack"}
CONFIGS = ("config", "stored", "settings", "composed", "own")  # names of variables that hold a config
RAW = {  # modules that read the plain dict: one composes it, the others check the form of data from outside
    "settings/composition.py",
    "settings/schema.py",
    "settings/run_settings.py",
    "files/json_shapes.py",
    "sweeps/planning.py",  # it adds the judge
}


def test_a_resolved_config_is_read_by_name() -> None:
    words = ["concept=[cat,dog]", "method=mace", "backbone=sd14", "logger=none", "trainer=cpu", "seed=3"]
    settings = Settings(composition.settings_of("train", words))
    assert settings.concepts == ["cat", "dog"] and settings.seed == 3 and settings.evaluate and not settings.dry_run
    assert settings.system == settings.method.name == "mace" and not settings.unedited
    assert settings.method.align.per_concept and settings.method.align.steps_for(2) == 100
    assert list(settings.method.align.lora_targets) == ["attn2.to_k", "attn2.to_v"]
    assert (
        settings.method.finish.class_name == "Fusion" and not settings.method.guide and not settings.method.neighbours
    )
    assert settings.backbone.text.width == 768 and settings.backbone.token_rows == 77
    assert settings.backbone.sampler == Sampler("ddim", 50, 7.5, 512, 512) and settings.backbone.sampler_steps == 50
    assert settings.trainer.accelerator == "cpu" and not settings.trainer.allows_gpu
    assert "checkpoint_every" in settings.trainer.node and "checkpoint_every" not in settings.trainer.for_lightning
    assert settings.judge.target and settings.task.target and settings.logger.target is None
    assert "judges" in settings.task.node and "judges" not in settings.task.to_build


def test_missing_and_null_groups_are_empty() -> None:
    for config in ({}, {**dict.fromkeys(GROUPS), "label": None}):
        settings = Settings(config)
        groups: list[Group] = [settings.task, settings.method, settings.backbone, settings.judge, settings.trainer]
        assert not any(groups) and not settings.method.align and not settings.backbone.text
        assert settings.system == "original" and settings.concept is None and settings.run_dir is None
        assert settings.method.align.steps is None and settings.method.align.steps_for(3) == 0
        assert settings.backbone.dtype == "float32" and settings.trainer == TrainerSettings({})
        assert settings.trainer.devices == 1 and settings.trainer.nodes == 1 and settings.trainer.clip == "method"
    assert Settings({"method": {"latents": None}}).method.without_latents
    assert not Settings({"method": {}}).method.without_latents


def test_the_band_may_stand_in_a_group_of_its_own() -> None:
    flat, nested = {"m": 5, "d1": 20}, {"band": {"d1": 20}, "m": 5}
    for node in (flat, nested):
        mining = Settings({"method": {"neighbours": node}}).method.neighbours
        assert mining.m == 5 and mining.n is None and mining.band["d1"] == 20


def test_settings_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings({}).node = {"seed": 1}  # type: ignore[misc]


def test_no_other_module_spells_the_groups_of_a_config() -> None:
    """config["method"]["align"].get("steps") is `Settings(config).method.align.steps`."""
    found = []
    for file in ROOT.rglob("*.py"):
        name = str(file.relative_to(ROOT))
        if name in RAW or name.startswith("miniature/"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            owner, key = None, None
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
                owner, key = node.value, node.slice
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
                owner, key = node.func.value, node.args[0] if node.args else None
            known = isinstance(key, ast.Constant) and key.value in GROUPS
            if known and owner is not None and ast.unparse(owner).rpartition(".")[2] in CONFIGS:
                found.append(f"{name}: {ast.unparse(node)}")
    assert found == []
