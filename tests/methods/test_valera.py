"""VALERA on a small backbone: the weights have the properties that its algebra promises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from options import built
from realera import value_space
from realera.contracts import KEYS, VALUES, UserError
from realera.methods import priors
from realera.methods.valera import ValueSpaceErasure
from realera.mining.sampling import align_rows

CAT, DOG = ("cat", "field"), ("dog", "sky")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))


def suffix_mean(states: Any) -> Tensor:
    rows = [states.states[i, int(first) :].double() for i, first in enumerate(states.first)]
    return torch.cat(rows).mean(dim=0)


def test_only_values_change_and_read_the_concept_as_its_anchor(new_backbone: Any, new_pairs: Any) -> None:
    backbone = new_backbone()
    before = {name: layer.weight.clone() for name, layer in backbone.text_projections().items()}
    pairs = new_pairs(backbone, CAT, DOG)
    edit = ValueSpaceErasure(gain=1)(backbone, pairs, [])
    assert edit.projections == (VALUES,) and edit.map is not None
    backbone.apply(edit)
    for name, layer in backbone.text_projections().items():
        assert torch.equal(layer.weight, before[name]) == name.endswith(KEYS)
        expected = before[name].double() @ edit.map
        if name.endswith(VALUES):
            assert torch.allclose(layer.weight.double(), expected, atol=1e-6)
            for pair in pairs:
                old, new = (layer.weight.double() @ suffix_mean(side) for side in (pair.target, pair.anchor))
                assert torch.allclose(old, new, atol=1e-5), "the concept's mean row is read as its anchor's"


def test_the_begin_row_and_the_empty_prompt_are_preserved(new_backbone: Any, new_pairs: Any) -> None:
    """The begin row, the empty prompt's mean row, and preserved names."""
    backbone = new_backbone()
    edit = ValueSpaceErasure(keep=["a bird", "a tree"])(backbone, new_pairs(backbone, CAT), [])
    empty = backbone.encode([""]).states[0].double()
    kept = [backbone.encode([name]).states[0, 1:].double().mean(dim=0) for name in ("a bird", "a tree")]
    for row in (empty[0], empty[1:].mean(dim=0), *kept):
        assert float((edit.map @ row - row).norm() / row.norm()) < 1e-9
    plain = ValueSpaceErasure()(backbone, new_pairs(backbone, CAT), []).map
    assert float((plain @ kept[0] - kept[0]).norm() / kept[0].norm()) > 1e-6
    softly = ValueSpaceErasure(keep=["a bird", "a tree"], keep_price=1.0)(backbone, new_pairs(backbone, CAT), []).map
    moved = [float((map @ kept[0] - kept[0]).norm()) for map in (plain, softly, edit.map)]
    assert moved == sorted(moved, reverse=True)
    assert float((softly @ empty[0] - empty[0]).norm() / empty[0].norm()) < 1e-9
    nearly = ValueSpaceErasure(keep=["a bird", "a tree"], keep_price=1e9)(backbone, new_pairs(backbone, CAT), []).map
    assert torch.allclose(nearly, edit.map, atol=1e-5), "a high price is exactly"


def test_one_concept_and_several_have_different_defaults(new_backbone: Any, new_pairs: Any) -> None:
    backbone = new_backbone()
    for concepts, price, gain in (([CAT], 10.0, 1.2), ([CAT, DOG], 10.0, 1.05)):
        pairs = new_pairs(backbone, *concepts)
        plain = ValueSpaceErasure()(backbone, pairs, [])
        assert torch.equal(plain.map, ValueSpaceErasure(price=price, gain=gain)(backbone, pairs, []).map)
        assert (plain.info["price"], plain.info["gain"]) == (price, gain)
        assert not torch.allclose(plain.map, ValueSpaceErasure(price=3)(backbone, pairs, []).map, atol=1e-6)


def test_further_directions_are_erased_and_preserved_rows_are_unchanged(new_backbone: Any, new_pairs: Any) -> None:
    backbone = new_backbone()
    pairs = new_pairs(backbone, CAT, DOG)
    edits = [ValueSpaceErasure(directions=n, gain=1)(backbone, pairs, []) for n in (1, 2, 3)]
    metric = value_space.metric(backbone.text_readers("values"))
    for pair in pairs:
        target, anchor, mask = align_rows(pair, "suffix")
        shift = suffix_mean(pair.target) - suffix_mean(pair.anchor)
        more = value_space.further_directions((target[mask] - anchor[mask]).double(), shift, metric, 2)
        assert float((edits[0].map @ more).norm()) > 0.1 * float(more.norm())
        assert float((edits[1].map @ more[:, 0]).norm()) < 1e-7 * float(more.norm())
        assert float((edits[2].map @ more).norm()) < 1e-7 * float(more.norm())
    empty = backbone.encode([""]).states[0].double()
    for edit, count in zip(edits, (2, 4, 6)):
        assert edit.map is not None and torch.allclose(edit.map @ edit.map, edit.map, atol=1e-8)
        assert int(torch.linalg.matrix_rank(edit.map)) == backbone.width - count
        for row in (empty[0], empty[1:].mean(dim=0)):
            assert float((edit.map @ row - row).norm() / row.norm()) < 1e-9
    same = ValueSpaceErasure(directions=3)(backbone, new_pairs(backbone, ("cat", "cat")), [])
    assert torch.equal(same.map, torch.eye(backbone.width, dtype=torch.float64)), "its own anchor"
    with pytest.raises(UserError, match=r"method\.edit\.directions=900 is more than"):
        ValueSpaceErasure(directions=900)(backbone, pairs, [])


def test_the_saved_map_names_its_weights(new_backbone: Any, new_pairs: Any, load_method: Any, tmp_path: Path) -> None:
    from realera.training.fit import fit

    for projections in ("values", "both"):
        folder, backbone = tmp_path / projections, new_backbone()
        method = load_method("valera", f"edit.projections={projections}")
        config = {"method": {"name": "valera"}}
        fit(
            backbone,
            method,
            new_pairs(backbone, CAT),
            run_dir=folder,
            seed=0,
            config=config,
            trainer={"accelerator": "cpu"},
        )
        with safe_open(folder / "map.safetensors", framework="pt") as opened:
            assert opened.metadata()["projections"] == projections


def test_captions_come_from_a_file_or_from_the_cache(
    new_backbone: Callable[..., Any], new_pairs: Any, tmp_path: Path
) -> None:
    backbone = new_backbone()
    captions = ["a bird", "two trees in the wind", "the sea"]
    priors.accumulate(backbone, captions, tmp_path / "sum.safetensors", "captions")
    rows = priors.caption_rows(backbone, tmp_path / "sum.safetensors", tmp_path)
    read = backbone.encode(captions).states[:, 1:].flatten(0, 1).double()
    assert rows.count == len(read) and torch.allclose(rows.mean, read.mean(dim=0), atol=1e-6)
    assert torch.allclose(rows.gram, read.T @ read, atol=1e-4)
    first = priors.caption_rows(backbone, "everyday", tmp_path)
    (kept,) = (tmp_path / "captions").glob("everyday-*.safetensors")
    written = kept.stat().st_mtime_ns
    again = priors.caption_rows(backbone, "everyday", tmp_path)
    assert torch.equal(first.gram, again.gram) and kept.stat().st_mtime_ns == written
    whole = priors.gram_of(backbone, priors.CAPTIONS.read_text(encoding="utf-8").splitlines())
    begin = backbone.encode([""]).states[0, 0].double()
    assert torch.allclose(first.gram, whole - (first.count // 76) * torch.outer(begin, begin), atol=1e-3)


def test_a_sum_of_an_earlier_version_is_refused(new_backbone: Any, tmp_path: Path) -> None:
    from realera.files import checksums

    backbone = new_backbone()
    priors.accumulate(backbone, ["a bird"], tmp_path / "sum.safetensors", "captions")
    tensors, metadata = checksums.load(tmp_path / "sum.safetensors")
    checksums.save(
        tmp_path / "old.safetensors", {"gram": tensors["gram"]}, {k: metadata[k] for k in ("format", "made")}
    )
    assert priors.prior(backbone, tmp_path / "old.safetensors")[1] == 1, "the other closed forms need no mean"
    with pytest.raises(UserError, match="overwrite=true"):
        priors.caption_rows(backbone, tmp_path / "old.safetensors", tmp_path)


def test_readings_of_plain_text_states_use_no_weights(new_backbone: Any, new_pairs: Any) -> None:
    backbone = new_backbone()
    pairs = new_pairs(backbone, CAT)
    first, values = (ValueSpaceErasure(read=read)(backbone, pairs, []).map for read in ("text", "values"))
    assert not torch.allclose(first, values, atol=1e-3)
    for layer in backbone.text_projections().values():
        layer.weight.data.normal_()
    assert torch.equal(ValueSpaceErasure(read="text")(backbone, pairs, []).map, first)


def test_scaled_weights_get_the_same_map(new_backbone: Any, new_pairs: Any) -> None:
    backbone = new_backbone()
    pairs = new_pairs(backbone, CAT)
    first = ValueSpaceErasure()(backbone, pairs, []).map
    for layer in backbone.text_projections().values():
        layer.weight.data.mul_(8)
    assert torch.allclose(ValueSpaceErasure()(backbone, pairs, []).map, first, atol=1e-9)


def test_the_tasks_names_are_filled_in_before_the_method_is_built() -> None:
    with pytest.raises(UserError, match=r"method\.edit\.keep=task"):
        built(ValueSpaceErasure, keep="task")


@pytest.mark.parametrize(
    "settings",
    [
        {"projections": "all"},
        {"price": 0},
        {"gain": -1},
        {"keep_price": -1},
        {"rows": "x"},
        {"directions": 0},
        {"keep": "half"},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        built(ValueSpaceErasure, **settings)
