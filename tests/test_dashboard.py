"""python -m realera.dashboard: printed without network or login, refused in one sentence, saved through the library."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import wandb

from realera import dashboard
from realera.tracking import panels

pytest.importorskip("wandb_workspaces")
Type = Callable[..., None]


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch) -> Type:
    """Runs the door. Nobody is logged in, and whoever asks W&B's server for anything fails."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(wandb, "Api", refuse)

    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["dashboard", *words])
        dashboard.main()

    return run


@pytest.mark.parametrize("kind", ["workspace", "report"])
def test_a_dry_run_prints_what_would_be_sent(kind: str, type_in: Type, capsys: pytest.CaptureFixture[str]) -> None:
    own = 'filters="SummaryMetric(\\"eval/h_o\\") >= 50"'  # as the yaml says it is typed
    type_in("dry_run=true", f"kind={kind}", "group=[a,b]", "entity=team", own)
    said = json.loads(capsys.readouterr().out)
    assert said["kind"] == kind and set(said["charts"]) == set(panels.PRESETS)
    assert said["sent"]["displayName"] == "realera, a, b"
    text = json.dumps(said["sent"])
    assert "eval/h_o" in text and "team/realera-surface" in text and '["a", "b"]' in text and '"value": 50' in text


def test_a_dry_run_without_our_charts(type_in: Type, capsys: pytest.CaptureFixture[str]) -> None:
    type_in("dry_run=true", "charts=false", "title=mine")
    said = json.loads(capsys.readouterr().out)
    assert said["charts"] == {} and said["sent"]["displayName"] == "mine" and "Vega2" not in json.dumps(said)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "you are not logged in"),
        (["kind=wrkspace"], "did you mean 'workspace'"),
        (["dry_run=true", "filters=nonsense here"], "filter language"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    words: list[str], sentence: str, type_in: Type, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        type_in(*words)
    said = capsys.readouterr().err
    assert left.value.code == 2 and sentence in said and len(said.strip().splitlines()) == 1


def test_without_the_extra_it_says_what_to_install(
    type_in: Type, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        type_in("dry_run=true")
    assert "realera[dashboard]" in capsys.readouterr().err


class Server:
    """Stands for wandb.Api: knows an entity, keeps chart presets, refuses those it has."""

    default_entity = "me"

    def __init__(self, there: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        self.kept: dict[str, Any] = {}
        self.there = there

    def create_custom_chart(
        self, entity: str, name: str, display_name: str, spec_type: str, access: str, spec: dict[str, Any]
    ) -> str:
        if name in self.there:
            raise wandb.errors.CommError("name is taken")
        self.kept[name] = (entity, spec_type, access, spec)
        return f"{entity}/{name}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, type_in: Type) -> Callable[..., Server]:
    """server(there=...): logged in to one that takes whatever view it is sent (`saved`)."""

    def begin(there: set[str] = frozenset()) -> Server:  # type: ignore[assignment]
        import wandb_workspaces.workspaces as ws

        made = Server(there)
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setattr(wandb, "Api", lambda: made)

        def save(view: ws.Workspace) -> Any:
            made.kept["view"] = view._to_model()
            return type("Saved", (), {"url": f"https://w/{view.entity}/{view.project}"})

        monkeypatch.setattr(ws.Workspace, "save", save)
        return made

    return begin


def test_it_is_saved_under_your_entity_with_its_chart_presets(
    type_in: Type, server: Callable[..., Server], capsys: pytest.CaptureFixture[str]
) -> None:
    there = server()
    type_in()
    assert "https://w/me/realera" in capsys.readouterr().out
    assert there.kept["realera-surface"] == ("me", "vega2", "private", panels.PRESETS["realera-surface"])
    assert (there.kept["view"].entity, there.kept["view"].display_name) == ("me", "realera")


def test_a_preset_that_stands_is_used_and_one_that_is_not_wanted_is_not_made(
    type_in: Type, server: Callable[..., Server]
) -> None:
    there = server({"realera-surface"})
    type_in("entity=team")
    assert set(there.kept) == {"realera-intervals", "view"} and there.kept["view"].entity == "team"
    there = server()
    type_in("charts=false")
    assert set(there.kept) == {"view"}


def test_a_server_that_refuses_is_one_sentence(
    type_in: Type, server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server()

    def refuse() -> None:
        raise wandb.errors.AuthenticationError("the key is not known\nand more")

    monkeypatch.setattr(wandb, "Api", refuse)
    with pytest.raises(SystemExit) as left:
        type_in()
    assert left.value.code == 2 and "the key is not known)" in capsys.readouterr().err
