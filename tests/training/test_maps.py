"""Maps of other runs: what their file says, and what their products promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from realera.contracts import KEYS, VALUES, UserError
from realera.files import checksums
from realera.training import maps
from realera.training.checkpoint import Origin, save_map

D = 6
ORIGIN = Origin({"concept": "cat", "method": {"name": "uce"}}, "mini", "f")


def projection(seed: int) -> tuple[Tensor, Tensor]:
    """An oblique projection I - x u^T / (u^T x), and its reading u."""
    generator = torch.Generator().manual_seed(seed)
    x, u = (torch.randn(D, generator=generator, dtype=torch.float64) for _ in range(2))
    return torch.eye(D, dtype=torch.float64) - torch.outer(x, u) / (u @ x), u


def made(matrix: Tensor, projections: tuple[str, ...] = (KEYS, VALUES), **more: Any) -> maps.Map:
    given = {"name": "m", "text": {}, "method": "uce", "concepts": ["cat"], "anchors": [], "left_out": [], "digest": ""}
    return maps.Map(matrix=matrix, projections=projections, **{**given, **more})


def test_a_file_says_what_it_is_for(tmp_path: Path) -> None:
    said = maps.about("valera", ["cat", "dog"], ["sea", "sky"], {"float16": "a", "bfloat16": "b"})
    matrix = projection(0)[0]
    save_map(tmp_path / "m.safetensors", matrix, ORIGIN, (VALUES,), said)
    written = checksums.metadata(tmp_path / "m.safetensors")
    assert (written["projections"], written["width"], written["method"]) == ("values", "6", "valera")
    found = maps.read(tmp_path / "m.safetensors")
    assert torch.equal(found.matrix, matrix.float().double()) and (found.word, found.width) == ("values", 6)
    assert (found.concepts, found.anchors) == (["cat", "dog"], ["sea", "sky"])
    assert found.text == {"float16": "a", "bfloat16": "b"} and str(found) == "cat, dog by valera"


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    save_map(tmp_path / "new.safetensors", projection(0)[0], ORIGIN, (VALUES,))
    tensors, said = checksums.load(tmp_path / "new.safetensors")
    del said["width"]
    checksums.save(tmp_path / "old.safetensors", tensors, {**said, "projections": '["attn2.to_v"]'})
    new, old = (maps.read(tmp_path / f"{name}.safetensors") for name in ("new", "old"))
    assert old.projections == new.projections == (VALUES,) and old.digest == new.digest
    assert (old.method, old.concepts, old.anchors, old.text) == ("uce", ["cat"], [], {})


@pytest.mark.parametrize(
    ("key", "value"),
    [("projections", '["conv_in"]'), ("projections", "[]"), ("concepts", "5"), ("text_encoder", '{"float16": 5}')],
)
def test_a_file_with_odd_metadata_is_refused(key: str, value: str, tmp_path: Path) -> None:
    save_map(tmp_path / "m.safetensors", projection(0)[0], ORIGIN)
    tensors, said = checksums.load(tmp_path / "m.safetensors")
    checksums.save(tmp_path / "m.safetensors", tensors, {**said, key: value})
    with pytest.raises(UserError, match="metadata that no map has"):
        maps.read(tmp_path / "m.safetensors")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="not written by this version"):
        maps.read(tmp_path / "x.safetensors")
    save_map(tmp_path / "flat.safetensors", torch.zeros(3, 4), ORIGIN)
    with pytest.raises(UserError, match="square"):
        maps.read(tmp_path / "flat.safetensors")


def test_maps_are_multiplied_in_the_order_in_which_the_weights_take_them() -> None:
    (a, u), (b, v) = projection(1), projection(2)
    weight = torch.randn(4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    both = maps.composed([made(a), made(b)], [1.0, 1.0])
    assert torch.allclose(weight @ both[VALUES], (weight @ a) @ b) and torch.equal(both[KEYS], both[VALUES])
    assert float((u @ both[VALUES]).norm()) < 1e-12, "the first map's reading is 0 for every text"
    assert float((v @ both[VALUES]).norm()) > 1e-3, "the second one's is disturbed"


def test_each_map_acts_on_its_own_projections() -> None:
    (a, _), (b, _) = projection(1), projection(2)
    both = maps.composed([made(a, (VALUES,)), made(b, (KEYS,))], [1.0, 0.5])
    eye = torch.eye(D, dtype=torch.float64)
    assert torch.equal(both[VALUES], a) and torch.allclose(both[KEYS], (eye + b) / 2)
    assert maps.order_matters([made(a, (VALUES,)), made(b, (KEYS,))], [1.0, 1.0]) == 0


def test_maps_that_commute_are_told_from_those_that_do_not() -> None:
    (a, _), (b, _) = projection(1), projection(2)
    share = maps.order_matters([made(a), made(b)], [1.0, 1.0])
    change = (a @ b - torch.eye(D, dtype=torch.float64)).norm()
    assert share == pytest.approx(float((a @ b - b @ a).norm() / change)) and share > 0.01
    assert maps.order_matters([made(a), made(a)], [1.0, 0.3]) == 0
    assert maps.order_matters([made(a)], [1.0]) == 0
    first, second = (torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ([0, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1]))
    assert maps.order_matters([made(first), made(second)], [1.0, 1.0]) == 0


def test_maps_of_other_widths_do_not_fit_together() -> None:
    with pytest.raises(UserError, match="widths 3 and 6"):
        maps.composed([made(projection(1)[0]), made(torch.eye(3, dtype=torch.float64))], [1.0, 1.0])


def test_a_projection_has_no_inverse_and_a_weighted_one_has() -> None:
    a = made(projection(1)[0])
    with pytest.raises(UserError, match=r"singular .* oblique projection"):
        maps.inverse(maps.composed([a], [1.0]))
    total = maps.composed([a], [0.8])
    back, condition = maps.inverse(total)
    assert torch.allclose(total[KEYS] @ back[KEYS], torch.eye(D, dtype=torch.float64), atol=1e-10)
    values = torch.linalg.svdvals(total[KEYS])
    assert condition == pytest.approx(float(values[0] / values[-1]))
