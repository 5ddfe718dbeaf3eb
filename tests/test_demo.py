"""python -m realera.demo: which settings go together, and the sentences for those that do not."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from realera import demo
from realera.runs import preflight

Type = Callable[..., str]


def add_run(folder: Path, method: str = "uce", **backbone: Any) -> None:
    """A run folder that the checks before loading a model accept."""
    config = {
        "concept": "airplane",
        "seed": 0,
        "images_at_once": 4,
        "task": {"_target_": "realera.tasks.objects.ObjectTask", "_convert_": "all", "concepts": "airplane"},
        "method": {"_target_": "realera.contracts.Method", "name": method},
        "backbone": {
            "_target_": "realera.backbones.unet.UNetBackbone",
            "name": "mini",
            "pretrained": None,
            "sampler": {"_target_": "realera.contracts.Sampler"},
            **backbone,
        },
    }
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Type:
    """Types a command that is refused; returns its sentence. No model is loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "check_run", lambda run: None)
    for name in ("serve_page", "serve_gradio"):
        monkeypatch.setattr(demo, name, lambda *_: pytest.fail("served"))
    monkeypatch.setattr(demo.spaces, "write", lambda *_: pytest.fail("written"))
    for name, method in (("a", "uce"), ("b", "rece"), ("none", "original")):
        add_run(tmp_path / name, method)
    add_run(tmp_path / "other", pretrained="some/model")

    def typed(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["demo", *words])
        with pytest.raises(SystemExit) as left:
            demo.main()
        assert left.value.code == 2
        return capsys.readouterr().err

    return typed


@pytest.mark.quick(4)
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run=[a,b]"], "the built-in page shows one run: add ui=gradio"),
        (["run=[]"], "run"),
        (["run=[a,a]", "ui=gradio"], "run=a is given twice"),
        (["run=[a,none]", "ui=gradio"], "run=none erased nothing"),
        (["run=none"], "run=none erased nothing"),
        (["run=[a,other]", "ui=gradio"], "run=other was made with another base model than a"),
        (["run=a", "presets=a/config.yaml"], "the built-in page has no gallery of prompts"),
        (["run=a", "out=x"], "out= is the folder of a Space: add to=space"),
        (["run=a", "ui=grado"], "did you mean 'gradio'"),
        (["run=a", "to=hub"], "to=hub"),
        (["run=a", "presets=none.json", "ui=gradio"], "presets"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(words: list[str], says: str, refusal: Type) -> None:
    assert says in refusal(*words)


@pytest.mark.parametrize("words", [["ui=gradio"], ["to=space"]])
def test_a_missing_gradio_is_named_with_the_line_that_installs_it(
    words: list[str], refusal: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    said = refusal("run=a", *words)
    assert "the gradio page needs gradio: pip install 'realera[demo]'" in said


def test_a_space_is_not_written_into_a_folder_with_files(refusal: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: object())
    assert "out=a contains other files" in refusal("run=a", "to=space", "out=a")
    Path("p.json").write_text("[]")
    assert "give a JSON object of headings" in refusal("run=a", "ui=gradio", "presets=p.json")


@pytest.mark.parametrize("page", ["page", "gradio"])
def test_a_port_that_is_taken_is_refused_before_the_model_is_loaded(
    page: str, refusal: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "gallery_of", lambda *_: {})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refusal("run=a", f"port={port}", f"ui={page}")
    assert f"port {port} cannot be opened" in said and "port=0" in said
