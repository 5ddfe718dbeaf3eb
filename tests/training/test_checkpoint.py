"""The files of a fit, and foreign files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from realera import __version__
from realera.contracts import Edit, LoraSpec, Moments, Neighbours, UserError
from realera.files import checksums
from realera.training.checkpoint import (
    Origin,
    load_erased,
    read_erased,
    read_map,
    save_erased,
    save_map,
    save_neighbours,
)

CONFIG = {"concept": "Beyoncé (singer)", "method": {"name": "realera", "neighbours": {"m": float("inf"), "d1": None}}}
LORA = LoraSpec(rank=2, alpha=1.0)


@pytest.fixture
def erased(new_backbone: Callable[..., Any], tmp_path: Path) -> tuple[Any, Path]:
    backbone = new_backbone()
    backbone.apply(Edit(map=1.1 * torch.eye(32, dtype=torch.float64)))
    for parameter in backbone.add_adapter(LORA, torch.Generator().manual_seed(0)):
        torch.nn.init.normal_(parameter)
    path = tmp_path / "erased.safetensors"
    save_erased(path, backbone, Origin(CONFIG, "mini", backbone.fingerprint, "abc"), LORA)
    return backbone, path


def test_erased_weights_are_saved_and_loaded(erased: tuple[Any, Path], new_backbone: Callable[..., Any]) -> None:
    backbone, path = erased
    other = new_backbone()
    found = load_erased(path, other)
    assert found.origin == Origin(CONFIG, "mini", backbone.fingerprint, "abc")
    assert (found.lora, found.version) == (LORA, __version__)
    assert found.libraries["torch"].split("+")[0] == torch.__version__.split("+")[0]
    state, again = backbone.erased_state(), other.erased_state()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_foreign_files_are_refused(erased: tuple[Any, Path], tmp_path: Path) -> None:
    whole = erased[1].read_bytes()
    torn, foreign = tmp_path / "torn.safetensors", tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, foreign)
    with pytest.raises(UserError, match="There is no"):
        read_erased(tmp_path / "missing.safetensors")
    with pytest.raises(UserError, match="not written by this version"):
        read_erased(foreign)
    for length in (0, 7, 500, len(whole) - 1):
        torn.write_bytes(whole[:length])
        with pytest.raises(UserError, match="torn"):
            read_erased(torn)


def test_a_file_of_another_kind_is_refused(erased: tuple[Any, Path], tmp_path: Path) -> None:
    origin = Origin({}, "mini", "f")
    save_map(tmp_path / "map.safetensors", torch.eye(3), origin)
    with pytest.raises(UserError, match="no erased weights"):
        read_erased(tmp_path / "map.safetensors")
    with pytest.raises(UserError, match="has no map"):
        read_map(erased[1])


def test_another_backbone_is_refused(erased: tuple[Any, Path], new_backbone: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"was made with backbone mini .* choose that backbone"):
        load_erased(erased[1], new_backbone(text_length=32))


def test_a_map_is_saved_and_loaded(tmp_path: Path) -> None:
    solution = torch.rand(4, 4, dtype=torch.float64)
    save_map(tmp_path / "map.safetensors", solution, Origin(CONFIG, "mini", "f"))
    found, origin = read_map(tmp_path / "map.safetensors")
    assert torch.equal(found, solution.float())
    assert origin.config == CONFIG


def test_neighbours_are_saved_and_loaded(tmp_path: Path) -> None:
    near, rows = torch.rand(2, 5, 4), torch.tensor([[True] * 5, [False] * 5])
    points = Neighbours(near, near + 1, rows, near[:1], rows[:1])
    limits = Neighbours(near[:0], near[:0], rows[:0], near[:0], rows[:0], Moments(torch.eye(4), None, torch.ones(4, 4)))
    save_neighbours(tmp_path / "neighbours.safetensors", [points, limits], Origin({}, "mini", "f"))
    found = load_file(tmp_path / "neighbours.safetensors")
    assert torch.allclose(found["0.near_targets"].float(), near + 1, atol=1e-2)
    assert torch.equal(found["0.near_rows"], rows)
    assert found["1.near"].shape == (0, 5, 4)
    assert set(found) >= {"1.moments.near", "1.moments.beyond"} and "1.moments.near_cross" not in found


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config", BOMB),
        ("config", "!!python/object/apply:os.system [x]"),
        ("config", "[" * 50_000),
        ("config", "hello"),
        ("lora", "[" * 50_000),
        ("lora", '{"rank": 1}'),
        ("lora", '{"targets": [], "evil": 1}'),
        ("libraries", "{"),
        ("version", None),
        ("fingerprint", None),
    ],
)
def test_metadata_is_read_as_plain_data(key: str, value: str | None, erased: tuple[Any, Path], tmp_path: Path) -> None:
    with safe_open(erased[1], "pt") as opened:
        metadata = dict(opened.metadata())
    metadata.pop(key)
    metadata.pop(checksums.KEY)  # somebody who forges a file can omit its checksum
    spoilt = tmp_path / "spoilt.safetensors"
    save_file(load_file(erased[1]), spoilt, metadata if value is None else {**metadata, key: value})
    with pytest.raises(UserError, match="make it again"):
        read_erased(spoilt)
