"""Odd values that the checks accept must run: on the tiny model, with two steps each."""

from __future__ import annotations

import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

import walk
from realera.contracts import UserError
from realera.paths import CONF_DIR
from realera.settings import schema

SMALL = {
    "latents.images": 2,
    "latents.chunk": 2,
    "latents.batch": 1,
    "latents.steps": 2,
    "latents.first_stop": 0,
    "latents.chains": 1,
    "latents.renew": 1,
    "latents.replay.images": 2,
    "latents.sampler.steps": 2,
    "align.fisher.samples": 1,
    "align.fisher.timesteps": 1,
    "align.inversion.steps": 1,
    "align.warmup": 1,
    "align.steps": 2,
    "guide.warmup": 0,
}
LEFT_OUT = ("detector", "segmenter", "source", "_target_")  # of a download
METHODS = sorted(file.stem for file in (CONF_DIR / "method").glob("*.yaml") if file.stem != "original")


def accepted(method: str) -> list[str]:
    """key=value of every odd value that a method's settings may have."""
    _, config, places = walk.walked("method", method)
    found = []
    for place in places:
        if place[-1] in LEFT_OUT or not all(isinstance(key, str) for key in place):
            continue
        for value in walk.ODD:
            try:
                schema.check(walk.with_value(config, place, value), "train")
            except UserError:
                continue
            text = str(value) if isinstance(value, list) else {True: "true", None: "null", "": "''"}.get(value, value)
            found.append(f"{'.'.join(map(str, place))}={'.inf' if text == float('inf') else text}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_accepted_values_run(
    method: str, small: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))
    config = walk.walked("method", method)[1]["method"]
    less = [f"method.{key}={value}" for key, value in SMALL.items() if has(config, key.split("."))]
    words = ["concept=airplane", f"method={method}", "evaluate=false", *small, *less]
    failed, refused, ended = [], 0, 0
    for odd in accepted(method):
        key = odd.partition("=")[0]
        own = [word for word in words if not word.startswith((f"{key}=", f"{key}."))]
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["train", *own, odd])
        try:
            import_module("realera.train").main()
            ended += 1
        except SystemExit as left:
            refused += left.code == 2
            if left.code != 2 or any(len(list(run.iterdir())) < 3 for run in Path("runs").glob("*")):  # nothing made
                failed.append(f"{odd}: exit {left.code}, {capsys.readouterr().err.strip()[-200:]}")
        except Exception as error:  # what this test looks for
            failed.append(f"{odd}: {type(error).__name__}: {str(error).splitlines()[:1]}")
        shutil.rmtree("runs", ignore_errors=True)
    with capsys.disabled():
        print(f"\n{method}: {ended} odd settings ran, {refused} were refused later")
    assert not failed, "\n".join(failed)


def has(node: Any, keys: list[str]) -> bool:
    for key in keys:
        if not isinstance(node, dict) or node.get(key) is None:
            return False
        node = node[key]
    return True
