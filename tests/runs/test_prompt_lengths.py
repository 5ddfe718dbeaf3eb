"""Every command that draws or encodes prompts counts those that are cut, and warns once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from folders import save_tokenizer
from realera.runs import prompt_lengths
from realera.settings.run_settings import BackboneSettings

LONG = "a cat" + " and a dog" * 30  # 92 tokens where 75 fit


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings about cut prompts."""
    lines: list[str] = []
    monkeypatch.setattr(prompt_lengths.log, "warning", lambda text, *given: lines.append(text % given))
    return lines


@pytest.mark.parametrize("files", [(), ("vocab.json", "merges.txt")])
def test_cut_prompts_are_counted_with_either_tokenizer_layout(
    files: tuple[str, ...], tmp_path: Path, said: list[str]
) -> None:
    save_tokenizer(tmp_path / "tokenizer", files=files)
    backbone = {"pretrained": str(tmp_path), "text": {"max_length": 77}}
    just = "a cat " * 37 + "a"
    prompt_lengths.warn([just, "", "a cat"], BackboneSettings(backbone))
    assert not said
    prompt_lengths.warn([LONG, LONG, f"{just} cat", just, "猫" * 40], BackboneSettings(backbone), "captions")
    assert said == [
        "3 of 4 captions are longer than the 75 tokens that the text encoder reads, so their ends are cut off, "
        f"such as '{LONG[:57]}...'"
    ]
    prompt_lengths.warn(["a cat on a road"], BackboneSettings({**backbone, "text_length": 5}), "prompts")
    assert said[1].startswith("1 of 1 prompts are longer than the 3 tokens")


def test_a_model_that_is_not_downloaded_yet_gives_no_warning(said: list[str]) -> None:
    prompt_lengths.warn([LONG], BackboneSettings({"pretrained": "nobody/nothing", "text": {"max_length": 77}}))
    assert not said


def test_no_torch_is_needed(tiny_sd: Path) -> None:
    script = (
        "import sys; from realera.runs import prompt_lengths\n"
        "from realera.settings.run_settings import BackboneSettings\n"
        f"node = {{'pretrained': {str(tiny_sd)!r}, 'text': {{'max_length': 77}}}}\n"
        "counted = prompt_lengths.Lengths(BackboneSettings(node))\n"
        f"assert counted.add({LONG!r}) and 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@pytest.mark.slow
def test_every_command_warns(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))

    def go(name: str, *words: str) -> list[str]:
        said.clear()
        monkeypatch.setattr(sys, "argv", [name, *words])
        import_module(f"realera.{name}").main()
        return list(said)

    long = f"task.associated=['{'q' * 90} by the airport']"
    (line,) = go("train", "concept=airplane", "method=uce", "run_dir=run", long, *small)
    assert line.startswith("1 of ") and "evaluation prompts are longer than the 75 tokens" in line
    assert not go("evaluate", "run=run"), "nothing is drawn"
    shutil.rmtree(tmp_path / "run" / "images")
    assert go("evaluate", "run=run") == [line]
    (line,) = go("generate", "run=run", f"prompts=['{LONG}','a cat']", "seeds=[0,1]")
    assert line.startswith("1 of 2 prompts are longer than the 75 tokens")
    (tmp_path / "words.txt").write_text(f"a cat\n{LONG}\n{LONG}\n")
    model = [word for word in small if word.startswith(("backbone", "trainer"))]
    (line,) = go("cache", "captions=words.txt", *model)
    assert line.startswith("2 of 3 captions are longer than the 75 tokens")


def test_the_demo_page_shows_the_warning(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from realera import demo
    from realera.runs import folders, preflight, steps

    class Served:
        server_port = 1

        def __init__(self, address: Any, kind: Any) -> None:
            drawn.append(kind)

        def __enter__(self) -> Served:
            return self

        def __exit__(self, *_: Any) -> None: ...
        def serve_forever(self) -> None: ...

    import numpy as np
    import torch

    drawn: list[Any] = []
    place = next(word.partition("=")[2] for word in small if word.startswith("backbone.pretrained="))
    backbone = {"name": "mini", "pretrained": place, "text": {"max_length": 77}}
    run = folders.Run(tmp_path, {"backbone": backbone, "method": {"name": "uce"}, "concept": "cat"})
    black = torch.from_numpy(np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setattr(folders, "open_run", lambda _: run)
    monkeypatch.setattr(preflight, "check_run", lambda _: None)
    monkeypatch.setattr(steps, "load_run", lambda _: None)
    monkeypatch.setattr(steps, "pairs_from", lambda *_: lambda prompt, seed: {"original": black, "erased": black})
    monkeypatch.setattr(demo, "handler", lambda draw, *_: draw)
    monkeypatch.setattr(demo, "Server", Served)
    monkeypatch.setattr(sys, "argv", ["demo", "run=x"])
    demo.main()
    (draw,) = drawn
    assert draw("a cat", 0)["note"] == ""
    assert draw(LONG, 0)["note"] == "only the first 75 tokens of this prompt are used"
