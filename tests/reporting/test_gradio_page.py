"""The gradio page without gradio: its fields, its drawings and the HTML that it shows."""

from __future__ import annotations

import io
import json
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from realera.contracts import UserError
from realera.reporting import gradio_page
from realera.reporting.gradio_page import Drawings, EachStep, Wish, column, status, wish_of

KNOWN = ["uce", "rece"]
FIELDS = ("a cat", "", ["rece"], 0, 2, 20, 7.5)
WISH = Wish("a cat", "", ("uce",), 5, 2, 3, 7.5)


def painted(wish: Wish, each_step: EachStep) -> Iterator[tuple[str, list[Any]]]:
    """A grey of its own for each model and seed."""
    models = ("original", *wish.methods)
    for number, name in enumerate(models):
        for step in range(wish.steps):
            each_step(number * wish.steps + step, wish.steps * len(models))
            time.sleep(0.02)  # until the step is read: of several unread steps only the newest is told
        yield name, [np.full((8, 8, 3), 50 * number + seed, np.uint8) for seed in wish.seeds]


def test_fields_become_a_wish() -> None:
    wish = wish_of(("  a \n cat ", None, ["rece", "uce", "nobody"], 3.0, 2, 20, 7), KNOWN)
    assert wish == Wish("a cat", "", ["uce", "rece"], 3, 2, 20, 7.0) and wish.seeds == [3, 4]


@pytest.mark.parametrize(
    ("number", "value", "says"),
    [
        (0, "  ", "the prompt is empty"),
        (0, "a" * 501, "at most 500 characters"),
        (0, "a\0b", "no control characters"),
        (1, "a" * 501, "at most 500 characters"),
        (2, [], "no erased model is chosen"),
        (2, None, "no erased model is chosen"),
        (2, ["nobody"], "no erased model is chosen"),
        (3, None, "seed is a whole number"),
        (3, -1, "seed is a whole number"),
        (3, 2**60, "seed is a whole number"),
        (3, 0.5, "seed is a whole number"),
        (4, 9, "images is a whole number from 1 to 8"),
        (4, 0, "images is a whole number"),
        (5, float("nan"), "steps is a whole number"),
        (5, 1001, "steps is a whole number"),
        (6, float("nan"), "guidance is a number"),
        (6, "7", "guidance is a number"),
        (6, -1, "guidance is a number"),
    ],
)
def test_a_field_out_of_range_is_a_sentence(number: int, value: Any, says: str) -> None:
    fields = [*FIELDS[:number], value, *FIELDS[number + 1 :]]
    with pytest.raises(UserError, match=says):
        wish_of(fields, KNOWN)


def test_a_drawing_tells_its_steps_and_ends_with_a_zip_of_all_images(tmp_path: Path) -> None:
    told = list(Drawings(painted, tmp_path).start(WISH, "tab"))
    assert [content[0] for kind, content in told if kind == "pictures"] == ["original", "uce"]
    steps = [content for kind, content in told if kind == "step"]
    assert steps and all(total == 6 for _, total in steps) and steps == sorted(steps)
    kind, file = told[-1]
    assert kind == "zip"
    with zipfile.ZipFile(file) as archive:
        assert archive.namelist() == [
            "settings.json",
            *(f"0-original/a-cat-{seed}-original.png" for seed in (5, 6)),
            *(f"1-uce/a-cat-{seed}-uce.png" for seed in (5, 6)),
        ]
        assert json.loads(archive.read("settings.json"))["prompt"] == "a cat"
        picture = np.asarray(Image.open(io.BytesIO(archive.read("1-uce/a-cat-6-uce.png"))))
        assert picture.shape == (8, 8, 3) and (picture == 56).all()


def test_a_tab_keeps_one_zip_and_its_name_is_no_path(tmp_path: Path) -> None:
    drawings = Drawings(painted, tmp_path / "zips")
    for prompt in ("../../a", "b"):
        *_, (_, file) = drawings.start(Wish(prompt, "", ("uce",), 0, 1, 1, 1.0), "../../etc")
    assert list((tmp_path / "zips").rglob("*.zip")) == [file]
    assert [path.name for path in tmp_path.iterdir()] == ["zips"]


def waiting(go_on: threading.Event, ended: list[BaseException | None]) -> Any:
    """A drawing that takes steps until it is stopped, and says how it ended."""

    def draw(wish: Wish, each_step: EachStep) -> Iterator[tuple[str, list[Any]]]:
        try:
            for step in range(100_000):
                each_step(step, 100_000)
                go_on.wait(0.005)
            yield "original", []
        except BaseException as error:
            ended.append(error)
            raise

    return draw


def test_a_stopped_drawing_says_so(tmp_path: Path) -> None:
    ended: list[Any] = []
    drawings = Drawings(waiting(threading.Event(), ended), tmp_path)
    told = drawings.start(WISH, "tab")
    assert next(told)[0] == "step"
    drawings.stop("another tab")
    assert next(told)[0] == "step" and not ended
    drawings.stop("tab")
    assert list(told)[-1] == ("stopped", None)
    assert [type(error) for error in ended] == [gradio_page.Stopped] and not drawings._stops


def test_a_closed_tab_stops_its_drawing(tmp_path: Path) -> None:
    ended: list[Any] = []
    drawings = Drawings(waiting(threading.Event(), ended), tmp_path)
    told = drawings.start(WISH, "tab")
    next(told)
    told.close()  # type: ignore[attr-defined]
    for thread in threading.enumerate():
        if thread.name.startswith("Thread-") and "_work" in thread.name:
            thread.join(5)
    assert [type(error) for error in ended] == [gradio_page.Stopped] and not drawings._stops


@pytest.mark.parametrize(
    ("error", "says", "logged"),
    [
        (UserError("too large: draw less."), "too large: draw less.", False),
        (ZeroDivisionError(), "see the terminal", True),
    ],
)
def test_an_error_is_a_sentence(
    error: Exception,
    says: str,
    logged: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gradio_page.log, "propagate", True)

    def draw(wish: Wish, each_step: EachStep) -> Iterator[tuple[str, list[Any]]]:
        yield "original", []
        raise error

    kind, sentence = list(Drawings(draw, tmp_path).start(WISH, "tab"))[-1]
    assert kind == "error" and says in sentence and ("ZeroDivisionError" in caplog.text) == logged


def test_prompts_and_names_are_escaped() -> None:
    wish = Wish('<b>"x"</b>', "", ("<i>",), 0, 1, 1, 1.0)
    shown = column("<i>", wish, [np.zeros((8, 8, 3), np.uint8)])
    assert "<b>" not in shown and "<i>" not in shown and 'alt="&lt;i&gt;: &lt;b&gt;&quot;x&quot;' in shown
    assert "<b>" not in status("<b>") and "<progress" not in status("x") and 'value="3"' in status("x", done=3, total=9)


def test_a_column_has_a_place_for_every_image() -> None:
    assert column("uce", WISH, None).count('class="blank"') == 2
    shown = column("uce", WISH, [np.zeros((512, 512, 3), np.uint8)] * 2)
    assert shown.count("<img") == shown.count('class="save"') == 2 and "seed 6" in shown and "small" not in shown
