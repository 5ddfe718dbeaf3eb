"""A search continues its own study, whose name contains a digest of all settings that change the numbers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from realera import paths
from realera.settings import resolvers
from realera.sweeps import planning, study
from realera.system import devices

SEARCH = ["experiment=search", "backbone=mini"]


@pytest.fixture(autouse=True)
def _composing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REALERA_STAMP", "stamp")
    monkeypatch.setattr(devices, "number", lambda: 0)
    resolvers.register_resolvers()
    with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
        yield
    HydraConfig.instance().cfg = None


def swept(*words: str) -> DictConfig:
    """A sweep's config as Hydra hands it to its callbacks and to the sweeper."""
    cfg = GlobalHydra.instance().config_loader().load_configuration("train", list(words), RunMode.MULTIRUN)
    HydraConfig.instance().set_config(cfg)
    return cfg


def name(*words: str) -> str:
    return study.name_of(swept(*SEARCH, *words))


@pytest.mark.slow
def test_only_an_equal_search_shares_a_study() -> None:
    gun = ["concept=gun", "anchor=room"]
    first = name(*gun)
    assert re.fullmatch(r"gun-realera-mini-[0-9a-f]{8}", first)
    assert {name(*reversed(gun), "hydra.sweeper.n_trials=30", "hydra.sweeper.n_jobs=4", "logger=none")} == {first}
    others = [
        ["concept=knife", "anchor=room"],
        ["concept=[gun,knife]", "anchor=room"],
        [*gun, "task.images.erase=8"],
        [*gun, "judge=clip"],
        [*gun, "method=uce"],
        [*gun, "backbone=sd14"],
        [*gun, "method.neighbours.m=5"],  # no longer searched, though 5 is what it is anyway
        [*gun, "method.neighbours.s_lo=interval(0.2, 0.4)"],
    ]
    names = {name(*words) for words in others}
    assert len(names | {first}) == len(others) + 1
    assert all(re.fullmatch("[a-z0-9-]+", one) for one in names), "a file's name, and a part of an address"
    Path("names.txt").write_text("gun\n")
    of_file = name("concepts_file=names.txt", "anchor=room")
    assert of_file.startswith("gun-")


@pytest.mark.slow
def test_the_readme_s_search_of_another_concept_is_another_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        planning, "refuse_missing", lambda config: None
    )  # the extra may be absent: composing needs none
    readme = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^python -m realera\.train -m (experiment=search .*)$", readme, re.MULTILINE)
    words = [*shlex.split(line), "backbone=mini"]
    stores = []
    for other in ("gun", "knife", "gun"):
        config = swept(*[word.replace("concept=gun", f"concept={other}") for word in words])
        planning.Beginning().on_multirun_start(config=config, config_name="train")
        assert config.hydra.sweeper.study_name.startswith(f"{other}-realera-mini-")
        assert config.hydra.sweeper.storage == f"sqlite:///runs/studies/{config.hydra.sweeper.study_name}.db"
        stores.append(config.hydra.sweeper.storage)
    assert stores[0] == stores[2] != stores[1] and Path("runs/studies").is_dir()


def test_a_typed_name_stays_and_a_plain_sweep_has_none() -> None:
    typed, plain = swept(*SEARCH, "concept=gun", "hydra.sweeper.study_name=mine"), swept("concept=cat,dog")
    for config in (typed, plain):
        study.set_study_name(config)
    assert typed.hydra.sweeper.study_name == "mine" and "study_name" not in plain.hydra.sweeper
