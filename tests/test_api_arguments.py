"""Odd arguments of the Python interface: one sentence each, and the pipeline stays as it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import realera
from realera.contracts import UserError


def open_pipe(folder: Path) -> Any:
    loaded = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def weights(pipe: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in pipe.unet.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def pipe(tiny_sd: Path) -> Any:
    return open_pipe(tiny_sd)


@pytest.fixture(scope="module")
def erased(tiny_sd: Path) -> Iterator[realera.Erased]:
    yield erase(open_pipe(tiny_sd))


def erase(pipe: Any, concept: Any = "cat", **given: Any) -> realera.Erased:
    return realera.erase(pipe, concept, **{"anchor": "dog", "method": "uce", "progress": False, **given})


@pytest.mark.quick(8)
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"concept": b"cat"}, "concept=b'cat' is not a name"),
        ({"concept": True}, "concept=True is not a name"),
        ({"concept": {"cat": 1}}, "is not a name"),
        ({"concept": ["cat", {"a": 1}]}, "is not a name"),
        ({"concept": ["cat", "Cat"]}, "more than once"),
        ({"concept": "\x00"}, "control character"),
        ({"anchor": ["dog", b"x"]}, r"anchor=b'x' is not a name"),
        ({"method": 3}, "there is no method '3'"),
        ({"task": [1]}, r"there is no task '\[1\]'"),
        ({"overrides": "seed=1"}, "overrides=.* is not a list"),
        ({"overrides": None}, "is not a list"),
        ({"overrides": [3]}, "overrides has 3"),
        ({"": 1}, "empty name"),
        ({"cache": 3}, "cache=3 is a number"),
        ({"cache": None}, "cache=None"),
        ({"run_dir": "x"}, r"leave it out here, and call erased.save\(folder\)"),
        ({"evaluate": True}, r"realera.evaluate\(erased\)"),
        ({"overrides": ["logger=wandb"]}, "logger is a setting of the command"),
        ({"overrides": ["+dry_run=true"]}, "dry_run is a setting of the command"),
        ({"overrides": ["backbone=sd14"]}, "backbone is fixed by the pipeline"),
        ({"backbone.pretrained": "x"}, "backbone.pretrained is fixed by the pipeline"),
        ({"logger.project": "x"}, "logger.project is a setting of the command"),
    ],
)
def test_odd_arguments_of_erase(given: dict[str, Any], said: str, pipe: Any) -> None:
    before = weights(pipe)
    with pytest.raises(UserError, match=said):
        erase(pipe, **given)
    assert same(weights(pipe), before)


@pytest.mark.slow
def test_numbers_of_numpy_and_torch_are_numbers(pipe: Any) -> None:
    changed = []
    for ridge, seed in ((2.0, 3), (np.float32(2), np.int64(3)), (torch.tensor(2.0), torch.tensor(3))):
        one = erase(pipe, seed=seed, **{"edit.ridge": ridge})
        changed.append(weights(pipe))
        assert one.settings.seed == 3
        one.undo()
    assert same(changed[0], changed[1]) and same(changed[0], changed[2])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompts": 3}, "prompts=3"),
        ({"prompts": ["a", None]}, "prompts=None"),
        ({"seeds": -1}, "seeds=-1"),
        ({"seeds": 2**70}, "seeds=.*from 0 to"),
        ({"seeds": "a"}, "seeds='a'"),
        ({"seeds": 1.5}, "seeds=1.5"),
        ({"seeds": True}, "seeds=True"),
        ({"seeds": [0, 1, 2], "prompts": ["a", "b"]}, "2 prompts and 3 seeds"),
        ({"steps": 0}, "from 1 to 1000"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"guidance_scale": "7"}, "guidance_scale='7'"),
        ({"guidance_scale": -1}, "guidance_scale=-1"),
    ],
)
def test_odd_arguments_of_draw(given: dict[str, Any], said: str, erased: realera.Erased) -> None:
    with pytest.raises(UserError, match=said):
        erased.draw(**{"prompts": "a cat", "steps": 1, **given})


def test_seeds_of_numpy_and_torch(erased: realera.Erased) -> None:
    wanted = [np.asarray(image) for image in erased.draw("a cat", [3, 4], steps=1)]
    for seeds in (np.array([3, 4]), torch.tensor([3, 4]), (np.int64(3), 4)):
        found = [np.asarray(image) for image in erased.draw("a cat", seeds, steps=1)]
        assert len(found) == 2 and all(np.array_equal(one, two) for one, two in zip(found, wanted))
    (one,) = erased.draw("a cat", np.int64(3), steps=1)
    assert np.array_equal(np.asarray(one), wanted[0])
    assert erased.draw([]) == []


def test_a_file_is_not_called_a_folder_with_files(erased: realera.Erased, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    for call in (
        lambda: erased.save(file),
        lambda: erased.export("map", file),
        lambda: realera.evaluate(erased, folder=file),
        lambda: realera.attack(erased, "closed-form", folder=file),
    ):
        with pytest.raises(UserError, match=r"notes\.txt is a file: give a folder as (folder|out)\."):
            call()
    assert file.read_text() == "mine"


def test_odd_paths_and_options(erased: realera.Erased, tmp_path: Path) -> None:
    for folder, said in ((None, "folder=None"), (3, "is a number"), ("a\0b", "not a path"), ("a" * 300, "too long")):
        with pytest.raises(UserError, match=said):
            erased.save(folder)
        with pytest.raises(UserError, match=said.replace("folder", "out")):
            erased.export("map", folder)
    with pytest.raises(UserError, match="export has no option 'rnak': its options are dtype"):
        erased.export("map", tmp_path / "x", rnak=3)
    with pytest.raises(UserError, match=r"evaluate takes what realera.erase .* not a StableDiffusionPipeline"):
        realera.evaluate(erased.pipe)
    with pytest.raises(UserError, match="attack takes what"):
        realera.attack(erased.pipe, "random")
    assert not list(tmp_path.iterdir())


def test_an_erasure_cannot_be_copied(erased: realera.Erased) -> None:
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(UserError, match=r"belongs to its pipeline.*erased.save\(folder\)"):
            copied(erased)


def test_a_copied_pipeline_is_a_pipeline_of_its_own(tiny_sd: Path) -> None:
    pipe = open_pipe(tiny_sd)
    first = erase(pipe)
    other = copy.deepcopy(pipe)
    edited = weights(other)
    erase(other, "dog", anchor="cat").undo()
    assert same(weights(other), edited)
    first.undo()


def test_pipelines_that_cannot_be_edited(tiny_sd: Path) -> None:
    with torch.inference_mode():
        locked = open_pipe(tiny_sd)
        with pytest.raises(UserError, match=r"loaded in torch.inference_mode"):
            erase(locked)
    empty = open_pipe(tiny_sd)
    empty.unet.to("meta")
    with pytest.raises(UserError, match="meta device"):
        erase(empty)


def test_a_pipeline_loaded_outside_can_be_erased_in_inference_mode(tiny_sd: Path) -> None:
    pipe = open_pipe(tiny_sd)
    before = weights(pipe)
    with torch.inference_mode():
        erased = erase(pipe)
    assert not same(weights(pipe), before)
    erased.undo()
    assert same(weights(pipe), before)
