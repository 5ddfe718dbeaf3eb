"""UCE against its official code and against sums written out row by row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from official_model import OFFICIAL
from options import built
from realera.contracts import Concept, Pair, Sampler, TextStates, UserError
from realera.methods import priors
from realera.methods.uce import UnifiedConceptEdit


def test_the_edit_equals_the_official_code(load_method: Callable[..., Any], official_sd: Path) -> None:
    """uce_airplane_sky: official code at commit 28c81ed in float32, the bare words "airplane" and "sky"."""
    from realera.backbones.unet import UNetBackbone

    backbone = UNetBackbone(name="mini", pretrained=official_sd, sampler=Sampler("ddim", 2, 7.5, 32, 32))
    method = load_method("uce", "edit.rows=last")
    backbone.apply(method.edit(backbone, [named("airplane", "sky")], []))
    reference = load_file(OFFICIAL / "uce_airplane_sky.safetensors")
    edited = {f"{name}.weight": layer.weight for name, layer in backbone.text_projections().items()}
    assert reference.keys() == edited.keys()
    for name, weight in reference.items():
        assert (edited[name] - weight).abs().max() < 1e-5


def named(target: str, anchor: str) -> Pair:
    """UCE reads the names only."""
    nothing = TextStates(*(torch.zeros(0) for _ in range(4)))
    return Pair(Concept(target, anchor), nothing, nothing)


def slow_edit(weight: Tensor, terms: list[tuple[Tensor, Tensor, float]], ridge: float) -> Tensor:
    """Equation 7 of UCE with one term at a time: (key, value's state, weight)."""
    left, right = ridge * weight.double(), ridge * torch.eye(weight.shape[1], dtype=torch.float64)
    for key, anchor, scale in terms:
        k, v = key.double(), weight.double() @ anchor.double()
        left = left + scale * torch.outer(v, k)
        right = right + scale * torch.outer(k, k)
    return left @ torch.linalg.inv(right)


def check(
    backbone: Any, edit: UnifiedConceptEdit, pairs: list[Pair], terms: list[tuple[Tensor, Tensor, float]]
) -> None:
    solution = edit(backbone, pairs, []).map
    assert solution is not None
    for layer in backbone.text_projections().values():
        wanted = slow_edit(layer.weight, terms, edit.ridge)
        # The rows of a text do not depend on its batch, except for rounding (1e-6).
        assert torch.allclose(layer.weight.double() @ solution, wanted, atol=3e-6)


def test_last_row_rule(new_backbone: Any) -> None:
    """One row per name, that of its last sub-token, also for names of several; preserved names have weight 1."""
    backbone = new_backbone()
    edit = UnifiedConceptEdit(preserve=["bird", "tom cruise"], erase_scale=2.0)
    read = backbone.encode(["mona lisa", "person", "cat", "dog", "bird", "tom cruise"])
    last = [read.states[i, int(read.length[i]) - 1] for i in range(6)]
    assert int(read.length[0]) > 3  # "mona lisa" has several sub-tokens
    terms = [(last[0], last[1], 2.0), (last[2], last[3], 2.0), (last[4], last[4], 1.0), (last[5], last[5], 1.0)]
    check(backbone, edit, [named("mona lisa", "person"), named("cat", "dog")], terms)


@pytest.mark.parametrize(("target", "anchor"), [("tom cruise", "person"), ("cat", "mona lisa"), ("cat", "sky")])
def test_suffix_rule_of_2023(target: str, anchor: str, new_backbone: Any) -> None:
    """From the last sub-token on, shifted and cut; all rows of preserved names; scale max(0.1, 1 / number)."""
    backbone = new_backbone()
    read = backbone.encode([target, anchor, "", "bird"])
    c, a = int(read.length[0]) - 1, int(read.length[1]) - 1
    rows = range(77 - max(c, a))
    terms = [(read.states[0, c + i], read.states[1, a + i], 1.0) for i in rows]
    terms += [(read.states[2, i], read.states[2, i], 0.5) for i in range(77)]
    terms += [(read.states[3, i], read.states[3, i], 0.5) for i in range(77)]
    check(backbone, UnifiedConceptEdit("suffix_2023", preserve=["bird"]), [named(target, anchor)], terms)


def test_a_name_in_further_texts(new_backbone: Any) -> None:
    """The official expand_prompts: each text of the name is mapped to that of its guide; it counts as one name."""
    backbone = new_backbone()
    templates = ["{}", "painting by {}", "style of {}"]
    read = backbone.encode([t.replace("{}", name) for name in ("mona lisa", "art") for t in templates])
    last = [read.states[i, int(read.length[i]) - 1] for i in range(6)]
    edit = UnifiedConceptEdit(expand=templates[1:])
    check(backbone, edit, [named("mona lisa", "art")], [(last[i], last[3 + i], 1.0) for i in range(3)])
    assert edit(backbone, [named("mona lisa", "art")], []).info["names_erased"] == 1


@pytest.mark.parametrize("rows", ["last", "suffix_2023"])
def test_the_artists_of_the_official_code_are_kept(
    rows: Any, new_backbone: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    """All but the erased one."""
    assert len(priors.kept_texts("artists", [])) == 1734
    monkeypatch.setattr(priors, "ARTISTS", tmp_path / "artists.txt")
    priors.ARTISTS.write_text("Tom Cruise\nMona Lisa\nbird\n")
    backbone = new_backbone()
    kept = UnifiedConceptEdit(rows, preserve="artists")(backbone, [named("mona lisa", "art")], [])
    same = UnifiedConceptEdit(rows, preserve=["Tom Cruise", "bird"])(backbone, [named("mona lisa", "art")], [])
    assert kept.map is not None and torch.equal(kept.map, same.map)


def test_preserved_captions(new_backbone: Callable[..., Any], tmp_path: Path) -> None:
    from realera.methods.priors import accumulate

    backbone = new_backbone()
    accumulate(backbone, ["a bird"], tmp_path / "sum", "captions")
    read = backbone.encode(["cat", "dog", "a bird"])
    terms = [(read.states[0, 1], read.states[1, 1], 1.0), *((row, row, 0.25) for row in read.states[2])]
    edit = UnifiedConceptEdit(prior_cache=str(tmp_path / "sum"), prior_weight=0.25)
    check(backbone, edit, [named("cat", "dog")], terms)


def test_a_blank_guide_is_the_row_of_bos(new_backbone: Any) -> None:
    backbone = new_backbone()
    read = backbone.encode(["cat"])
    terms = [(read.states[0, 1], read.states[0, 0], 1.0)]
    check(backbone, UnifiedConceptEdit(guide=" "), [named("cat", "sky")], terms)


@pytest.mark.parametrize("settings", [{"rows": "all"}, {"ridge": -1.0}, {"erase_scale": -1.0}, {"erase_scale": 0}])
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        built(UnifiedConceptEdit, **settings)
