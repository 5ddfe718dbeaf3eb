"""The callbacks of the training loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from realera.backbones.text import TextEncoder
from realera.contracts import Edit, Method, Neighbours, Pair, Prompt
from realera.training import editing
from realera.training.checkpoint import read_map
from realera.training.fit import fit
from realera.training.losses import LossLines
from realera.training.seeding import stream

HALF = 0.5 * torch.eye(32, dtype=torch.float64)
PROBES = [
    Prompt("a", "a photo of a cat", "cat", "erase", 0),
    Prompt("b", "a photo of a cat", "cat", "erase", 1),
    Prompt("c", "a photo of the field", "dog", "keep", 0),
]


class Halve:
    """An edit of known size that counts its calls."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, backbone: Any, pairs: list[Pair], neighbours: list[Neighbours]) -> Edit:
        self.calls.append(len(neighbours))
        return Edit(map=HALF, info={"condition": 3})


class Logger:
    """The part of a Lightning logger that the edit uses."""

    def __init__(self) -> None:
        self.logged: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged |= metrics

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


@pytest.fixture
def go(new_backbone: Callable[..., Any], new_pairs: Callable[..., list[Pair]], tmp_path: Path) -> Callable[..., Any]:
    def run(method: Method, *, to: str = "run", **settings: Any) -> Any:
        backbone = new_backbone()
        fit(
            backbone,
            method,
            new_pairs(backbone, ("cat", "field")),
            run_dir=tmp_path / to,
            seed=0,
            config={"x": 1},
            cache=tmp_path / "cache",
            **{"trainer": {"accelerator": "cpu"}, **settings},
        )
        return backbone

    return run


def test_the_edit_s_measurements_are_written(go: Callable[..., Any], tmp_path: Path) -> None:
    logger = Logger()
    backbone = go(Method("halve", edit=Halve()), probes=PROBES, loggers=[logger])
    report = json.loads((tmp_path / "run" / "edit.json").read_text())
    assert report["info"] == pytest.approx({"condition": 3.0, "relative_change": 0.5})
    assert logger.logged == {f"edit/{name}": value for name, value in report["info"].items()}
    assert list(report["layers"]) == list(backbone.text_projections())
    assert all(change == pytest.approx(0.5) for change in report["layers"].values())
    assert report["spectrum"] == pytest.approx([0.5] * 32)
    assert torch.equal(read_map(tmp_path / "run" / "map.safetensors")[0], HALF.float())
    cat, field = report["probes"]
    assert (cat["text"], cat["split"], field["text"], field["split"]) == (
        PROBES[0].text,
        "erase",
        PROBES[2].text,
        "keep",
    )
    assert cat["shift"] == field["shift"] == pytest.approx(0.5)
    assert field["to_anchor_before"] == field["to_anchor_after"] == pytest.approx(1.0)  # the anchor's own prompt
    assert cat["to_anchor_after"] == pytest.approx(cat["to_anchor_before"]) and cat["to_anchor_before"] < 0.99


def test_only_some_of_many_prompts_are_probed(
    go: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probes are spread evenly over each split and encoded in small batches; batches do not change the results."""
    places = ["sky", "field", "sea", "road", "room", "beach", "forest"]
    many = [Prompt(place, f"a cat in the {place}", "cat", "keep", 0) for place in places]
    go(Method("halve", edit=Halve()), to="alone", probes=[PROBES[0], many[3]])
    monkeypatch.setattr(editing, "PROBED", 3)
    monkeypatch.setattr(editing, "AT_ONCE", 2)
    asked: list[int] = []
    plain = TextEncoder.__call__

    def counted(self: TextEncoder, texts: list[str], *more: Any) -> Any:
        asked.append(len(texts))
        return plain(self, texts, *more)

    monkeypatch.setattr(TextEncoder, "__call__", counted)
    go(Method("halve", edit=Halve()), probes=[*many, PROBES[0]])
    found, alone = (json.loads((tmp_path / to / "edit.json").read_text())["probes"] for to in ("run", "alone"))
    assert [probe["text"] for probe in found] == [many[i].text for i in (0, 3, 6)] + [PROBES[0].text]
    assert asked[-2:] == [2, 2]
    for one, other in ((found[1], alone[1]), (found[3], alone[0])):
        assert {**one, "text": ""} == pytest.approx({**other, "text": ""}, abs=1e-5)


def test_a_method_without_an_edit_writes_no_edit_file(go: Callable[..., Any], tmp_path: Path) -> None:
    go(Method("original"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["erased.safetensors"]


def test_the_finish_edit_follows_the_training(
    go: Callable[..., Any], new_backbone: Callable[..., Any], tmp_path: Path
) -> None:
    backbone = go(Method("twice", edit=Halve(), finish=Halve()))
    plain = new_backbone().text_projections()
    for name, layer in backbone.text_projections().items():
        assert torch.allclose(layer.weight, plain[name].weight / 4)
    report = json.loads((tmp_path / "run" / "edit.json").read_text())
    assert report["info"]["relative_change"] == report["finish"]["info"]["relative_change"] == pytest.approx(0.5)


def test_a_resumed_run_applies_the_edit_once(go: Callable[..., Any], load_method: Callable[..., Any]) -> None:
    """The edit gets the mined points; a resumed run starts with the original weights and edits them once."""
    from lightning.pytorch.callbacks import Callback

    class Stop(Exception): ...

    class StopAt(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                raise Stop

    method = load_method("realera")
    method.edit = Halve()
    with pytest.raises(Stop):
        go(method, callbacks=[StopAt()], checkpoint_every=1)
    backbone = go(method, checkpoint_every=1)
    assert method.edit.calls == [1, 1]
    with backbone.original():
        first = {name: layer.weight.clone() for name, layer in backbone.text_projections().items()}
    for name, layer in backbone.text_projections().items():
        assert torch.allclose(layer.weight, first[name] / 2)


def test_mined_points_are_saved(go: Callable[..., Any], load_method: Callable[..., Any], tmp_path: Path) -> None:
    method = load_method("realera-text", "neighbours.m=1", "neighbours.n=2", "align=null")
    pairs: list[Pair] = []

    class Note(Halve):
        def __call__(self, backbone: Any, given: list[Pair], neighbours: list[Neighbours]) -> Edit:
            pairs.extend(given)
            return super().__call__(backbone, given, neighbours)

    method.edit = Note()
    go(method)
    again = method.neighbours(pairs[0], stream(0, "neighbours", 0))
    found = load_file(tmp_path / "run" / "neighbours.safetensors")
    assert torch.equal(found["0.near"], again.near.half())
    assert torch.equal(found["0.beyond_rows"], again.beyond_rows)
    go(method, to="lean", keep_neighbours=False)
    assert not (tmp_path / "lean" / "neighbours.safetensors").exists()


def test_mined_points_of_many_concepts_do_not_stay_in_memory(
    new_backbone: Callable[..., Any],
    new_pairs: Callable[..., list[Pair]],
    load_method: Callable[..., Any],
    monkeypatch: Any,
) -> None:
    """The points are mined one concept at a time and are the same in every reading, so the edit is the same."""
    method = load_method("realera-text", "neighbours.m=1", "neighbours.n=2", "align=null")
    backbone = new_backbone()
    pairs = new_pairs(backbone, ("cat", "field"), ("ship", "sky"), ("dog", "road"))
    whole = editing.Mined(method.neighbours, pairs, 0)
    assert method.edit is not None
    wanted = method.edit(backbone, pairs, list(whole)).map
    assert len(whole.kept) == 3
    monkeypatch.setattr(editing, "KEPT", 1)
    lean = editing.Mined(method.neighbours, pairs, 0)
    found = method.edit(backbone, pairs, lean).map
    assert len(lean) == 3 and len(lean.kept) == 1 and lean[2] is not lean[2]
    assert wanted is not None and found is not None and torch.equal(wanted, found)
    assert torch.equal(lean[1].beyond, whole[1].beyond)


@pytest.mark.parametrize("left", ['{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n{"step": 3, "a": 3.0}\n{"ste', "torn"])
def test_losses_are_restored_from_the_checkpoint(tmp_path: Path, left: str) -> None:
    """A checkpoint contains the lines, so the file may be torn."""

    class Trainer:
        is_global_zero, global_step = True, 0

    def step(lines: LossLines, loss: float) -> None:
        trainer.global_step += 1
        lines.on_train_batch_end(trainer, module, {"terms": {"a": torch.tensor(loss)}}, None, 0)

    def losses() -> list[float]:
        return [json.loads(line)["a"] for line in (tmp_path / "losses.jsonl").read_text().splitlines()]

    trainer, module = Trainer(), None
    lines: Any = LossLines(tmp_path)
    lines.on_train_start(trainer, module)
    step(lines, 1.0)
    step(lines, 2.0)
    kept = list(lines.lines)
    step(lines, 3.0)
    assert losses() == [1, 2, 3]
    (tmp_path / "losses.jsonl").write_text(left)
    lines, trainer.global_step = LossLines(tmp_path), 2
    lines.go_on(trainer, kept)
    step(lines, 4.0)
    assert losses() == [1, 2, 4]


@pytest.mark.parametrize("finish", [False, True])
def test_without_lightning_the_files_are_the_same(
    finish: bool, go: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a `finish` edit, which reads the model after the first one."""
    method = Method("uce", edit=Halve(), finish=Halve() if finish else None)
    probes = [Prompt("a", "a photo of a cat", "cat", "erase", 0)]
    go(method, to="trainer", probes=probes)
    with monkeypatch.context() as patch:
        patch.setattr("realera.training.loop.run", None)
        go(method, to="direct", probes=probes, lightning=False)
    one, two = tmp_path / "trainer", tmp_path / "direct"
    assert sorted(file.name for file in one.iterdir()) == sorted(file.name for file in two.iterdir())
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes(), file.name
    assert "finish" in json.loads((two / "edit.json").read_text()) or not finish


@pytest.mark.parametrize("trainer", [{"deterministic": True}, {"accelerator": "gpu"}])
def test_a_setting_that_also_matters_without_training_needs_lightning(
    trainer: dict[str, Any], go: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("realera.training.loop.run", lambda *_, **__: 1 / 0)
    go(Method("uce", edit=Halve()), lightning=False)
    with pytest.raises(ZeroDivisionError):
        go(Method("uce", edit=Halve()), to="other", lightning=False, trainer={"accelerator": "cpu", **trainer})
