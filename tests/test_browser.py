"""All pages in a headless Chromium: what they do, that the keyboard reaches everything, and that axe-core finds no
serious fault. Needs the extras `demo` and `browser`, and a Chromium of the system."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import realera
from realera.contracts import UserError
from realera.reporting import demo_page, gradio_page
from realera.reporting.gradio_page import About, EachStep, Wish
from realera.reporting.sweep import plots
from realera.reporting.sweep.page import write_sweep
from sweeps import grid, judged

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZES = [(1280, 900), (390, 844)]  # of a desk and of a phone
PATIENCE = 60_000  # milliseconds


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium: Any) -> Iterator[Any]:
    """A new tab, in which an error of a script fails the test."""
    context = chromium.new_context(accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    yield page
    context.close()
    assert not errors


def check(page: Any) -> None:
    """Opens what is folded, and fails for serious and critical findings of axe-core, and if the page is wider than the
    window, in both sizes and colour schemes."""
    for width, height in SIZES:
        page.set_viewport_size({"width": width, "height": height})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
            page.wait_for_timeout(300)
            found = axe.Axe().run(page).response["violations"]
            serious = [
                (one["id"], [node["html"][:200] for node in one["nodes"]])
                for one in found
                if one["impact"] in ("serious", "critical")
            ]
            assert not serious, (page.url, width, scheme, serious)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (page.url, width)


# --- the gradio page -------------------------------------------------------------------------------------------------

ABOUT = About(
    title="cat, before and after",
    about="uce, rece on mini; all start from the same noise.",
    prompt="a photo of the cat",
    models=["original", "uce", "rece"],
    steps=3,
    guidance=5.0,
    presets={
        "Its name": ["a photo of the cat"],
        "Residue that is left": ["a kitten & <b>bold</b>", "whiskers"],
        "Without a name": ["it sleeps on the keyboard"],  # more headings than fit on a phone
        "To be kept": ["a photo of the dog"],
    },
    note=lambda prompt: "only the first 30 tokens of this prompt are used" if "long" in prompt else "",
)


class Painter:
    """Draws greys. The prompt says how it goes: "slow" takes until it is stopped, "full" and "broken" fail."""

    def __init__(self) -> None:
        self.wishes: list[Wish] = []
        self.running = 0

    def __call__(self, wish: Wish, each_step: EachStep) -> Iterator[tuple[str, list[Any]]]:
        self.wishes.append(wish)
        self.running += 1
        try:
            models = ("original", *wish.methods)
            for number, name in enumerate(models):
                for step in range(100_000 if wish.prompt == "slow" else wish.steps):
                    each_step(number * wish.steps + step, wish.steps * len(models))
                    time.sleep(0.02)
                if name == "uce" and wish.prompt == "full":
                    raise UserError("the memory of the device is full: draw fewer images at once.")
                if name == "uce" and wish.prompt == "broken":
                    raise ZeroDivisionError("inside")
                yield name, [np.full((32, 32, 3), 60 * number + seed % 50, np.uint8) for seed in wish.seeds]
        finally:
            self.running -= 1


@pytest.fixture(scope="module")
def painter() -> Painter:
    return Painter()


@pytest.fixture(scope="module")
def address(painter: Painter) -> Iterator[str]:
    pytest.importorskip("gradio")
    port = demo_page.free_port("127.0.0.1", 0)
    with gradio_page.served(painter, ABOUT, "127.0.0.1", port):
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture
def demo(address: str, tab: Any, capfd: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """The page, opened. Nothing may be printed: neither a traceback nor a warning."""
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(address)
    tab.get_by_role("button", name="Draw").wait_for()
    yield tab
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))], "another server was asked"
    assert "Traceback" not in "".join(capfd.readouterr())


def drawn(page: Any) -> None:
    page.wait_for_selector("#told .told.done")


def write(page: Any, text: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(text)


def test_all_models_are_drawn_side_by_side_with_the_settings_of_the_page(demo: Any, painter: Painter) -> None:
    write(demo, "a dog")
    demo.get_by_label("Negative prompt").fill("a cat")
    demo.get_by_label("Seed").fill("7")
    for label, value in (("Images", "3"), ("Steps", "4"), ("Guidance", "2.5")):
        field = demo.get_by_label(re.compile(f"number input for {label}"))
        field.fill(value)
        field.press("Tab")
    demo.get_by_label("rece").uncheck()
    demo.get_by_role("button", name="Draw").click()
    drawn(demo)
    assert painter.wishes[-1] == Wish("a dog", "a cat", ["uce"], 7, 3, 4, 2.5)
    assert demo.locator("#models h2:visible").all_inner_texts() == ["original", "uce"]
    pictures = demo.locator("#models img:visible")
    assert [one.get_attribute("alt") for one in pictures.all()] == [
        f"{model}: a dog, seed {seed}" for model in ("original", "uce") for seed in (7, 8, 9)
    ]
    assert all(one.evaluate("image => image.naturalWidth") == 32 for one in pictures.all())
    tops = [one.bounding_box()["y"] for one in pictures.all()]
    assert tops[:3] == tops[3:], "the same seed stands side by side"


def test_images_are_saved_one_by_one_and_as_a_zip(demo: Any, tmp_path: Path) -> None:
    demo.get_by_role("button", name="Draw").click()
    drawn(demo)
    with demo.expect_download() as started:
        demo.get_by_role("button", name="Save the image of rece: a photo of the cat, seed 1").click()
    assert started.value.suggested_filename == "a-photo-of-the-cat-1-rece.png"
    started.value.save_as(tmp_path / "one.png")
    assert (np.asarray(Image.open(tmp_path / "one.png")) == 121).all()
    with demo.expect_download() as started:
        demo.get_by_role("button", name="Save all as a zip").click()
    started.value.save_as(tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        assert len(archive.namelist()) == 1 + 3 * 2


def test_a_prompt_of_the_gallery_is_taken_as_it_is(demo: Any, painter: Painter) -> None:
    demo.get_by_role("tab", name="Residue that is left").click()
    demo.get_by_role("button", name="a kitten & <b>bold</b>").click()
    playwright.expect(demo.get_by_label("Prompt", exact=True)).to_have_value("a kitten & <b>bold</b>")
    demo.get_by_role("button", name="Draw").click()
    drawn(demo)
    assert painter.wishes[-1].prompt == "a kitten & <b>bold</b>"


def test_steps_are_shown_and_a_drawing_can_be_stopped(demo: Any, painter: Painter) -> None:
    write(demo, "slow")
    demo.get_by_role("button", name="Draw").click()
    demo.wait_for_selector("#told progress")
    first = demo.locator("#told .told").inner_text()
    assert re.fullmatch(r"Step \d+ of 9", first) and demo.get_by_role("button", name="Draw").is_disabled()
    demo.get_by_role("button", name="Stop").click()
    demo.get_by_text("Stopped.").wait_for()
    assert painter.running == 0 and demo.get_by_role("button", name="Stop").is_disabled()
    write(demo, "a cat")
    demo.get_by_role("button", name="Draw").click()
    drawn(demo)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "Error: the prompt is empty: write one, or choose one from the gallery."),
        ("full", "Error: the memory of the device is full: draw fewer images at once."),
    ],
)
def test_an_error_reaches_the_page_as_a_sentence(prompt: str, says: str, demo: Any) -> None:
    write(demo, prompt)
    demo.get_by_role("button", name="Draw").click()
    demo.get_by_text(says).wait_for()
    assert demo.get_by_role("status").get_by_text(says).is_visible(), "a screen reader reads it out"
    demo.get_by_role("button", name="Draw").and_(demo.locator(":enabled")).wait_for()
    write(demo, "a long cat")
    demo.get_by_role("button", name="Draw").click()
    drawn(demo)
    assert "only the first 30 tokens" in demo.locator("#told").inner_text()


def test_an_unexpected_error_is_told_on_the_page_and_in_the_log(
    address: str, tab: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("realera"), "propagate", True)
    tab.goto(address)
    write(tab, "broken")
    tab.get_by_role("button", name="Draw").click()
    tab.get_by_text("Error: the images could not be drawn: see the terminal of the demo.").wait_for()
    assert "ZeroDivisionError: inside" in caplog.text


def test_a_closed_tab_stops_its_drawing_without_a_traceback(
    address: str, chromium: Any, painter: Painter, capfd: pytest.CaptureFixture[str]
) -> None:
    page = chromium.new_page()
    page.goto(address)
    write(page, "slow")
    page.get_by_role("button", name="Draw").click()
    page.wait_for_selector("#told progress")
    assert painter.running == 1
    page.close()
    until = time.monotonic() + 30
    while painter.running and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(1)  # for what the server prints afterwards
    assert painter.running == 0 and "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("host", ["::1", "0.0.0.0"])
def test_the_gradio_page_is_served_on_other_addresses(host: str, painter: Painter, tab: Any) -> None:
    pytest.importorskip("gradio")
    try:
        port = demo_page.free_port(host, 0)
    except OSError:
        pytest.skip(f"{host} is no address of this machine")
    with gradio_page.served(painter, ABOUT, host, port):
        tab.goto(f"http://[{host}]:{port}/" if ":" in host else f"http://127.0.0.1:{port}/")
        playwright.expect(tab).to_have_title("cat, before and after")
        tab.wait_for_load_state("load")
        tab.goto("about:blank")  # before the server ends: the page goes on asking it


def focused(page: Any) -> str:
    """The accessible name of the focused element, as far as a test needs it; "" for the page itself."""
    name = """() => { const one = document.activeElement;
        if (!one || one === document.body) return "";
        const label = one.labels && one.labels[0] ? one.labels[0].innerText : "";
        return one.getAttribute("aria-label") || label || one.innerText || one.placeholder || one.tagName; }"""
    return " ".join(str(page.evaluate(name)).split())


def reached(page: Any, most: int = 80) -> list[str]:
    """The names of everything that Tab reaches from the top of the page on."""
    page.evaluate("document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute('tabindex')")
    found: list[str] = []
    for _ in range(most):
        page.keyboard.press("Tab")
        if not (name := focused(page)):
            break
        found.append(name)
    return found


def test_the_keyboard_reaches_everything_of_the_gradio_page(demo: Any, painter: Painter) -> None:
    demo.get_by_label("Prompt", exact=True).focus()
    demo.keyboard.press("Control+A")
    demo.keyboard.type("a horse")
    while focused(demo) != "Draw":
        demo.keyboard.press("Tab")
    demo.keyboard.press("Enter")
    drawn(demo)
    assert painter.wishes[-1].prompt == "a horse"
    names = reached(demo)
    wanted = ["Prompt", "Negative prompt", "Draw", "Save the image of original", "Save all as a zip", "uce", "rece"]
    wanted += [
        "number input for Images",
        "Seed of the first image",
        "number input for Steps",
        "range slider for Guidance",
    ]
    for name in [*wanted, "Its name", "To be kept", "a photo of the cat"]:
        assert any(name in one for one in names), (name, names)
    demo.get_by_role("tab", name="Residue that is left").press("Enter")
    playwright.expect(demo.get_by_role("tab", name="Residue that is left")).to_have_attribute("aria-selected", "true")
    while focused(demo) != "whiskers":
        demo.keyboard.press("Tab")
    demo.keyboard.press("Enter")
    playwright.expect(demo.get_by_label("Prompt", exact=True)).to_have_value("whiskers")


def test_axe_finds_nothing_serious_on_the_gradio_page(demo: Any) -> None:
    check(demo)
    demo.get_by_role("button", name="Draw").click()
    drawn(demo)
    check(demo)
    write(demo, "")
    demo.get_by_role("button", name="Draw").click()
    demo.get_by_text("Error:").wait_for()
    check(demo)


# --- the other pages -------------------------------------------------------------------------------------------------


@contextmanager
def built_in(draw: Callable[[str, int], dict[str, str]]) -> Iterator[str]:
    about = {"title": "cat, before and after", "about": "uce on mini", "prompt": "a photo of the cat"}
    with demo_page.Server(("127.0.0.1", 0), demo_page.handler(draw, about)) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_the_built_in_page_draws_by_keyboard_and_axe_finds_nothing_serious(tab: Any) -> None:
    picture = demo_page.data_uri(np.full((32, 32, 3), 90, np.uint8))

    def draw(prompt: str, seed: int) -> dict[str, str]:
        return {"original": picture, "erased": picture, "note": f"seed {seed} of {prompt}"}

    with built_in(draw) as address:
        tab.goto(address)
        playwright.expect(tab).to_have_title("cat, before and after")
        assert reached(tab)[:3] == ["prompt", "seed", "Draw"]
        tab.get_by_label("seed").fill("5")
        tab.get_by_label("seed").press("Enter")
        tab.get_by_role("status").get_by_text("seed 5 of a photo of the cat").wait_for()
        assert tab.locator(".pair img").count() == 2
        check(tab)


@pytest.fixture(scope="module")
def run(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judged run with its page, the page of its residue, and one of its `generate`."""
    place = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("REALERA_CACHE", str(place / "cache"))
        for door, *words in (
            ["train", "concept=airplane", "method=uce", "run_dir=uce", *small],
            ["residue", "run=uce", "looked=4", "pictured=2", "out=residue", "texts=[a jet]"],
            ["generate", "run=uce", "prompts=[a jet]", "seeds=[0,1]", "out=drawn"],
        ):
            patch.setattr(sys, "argv", [door, *words])
            import_module(f"realera.{door}").main()
    return place / "uce"


def opened(tab: Any, page: Path) -> None:
    tab.goto(page.as_uri())
    check(tab)


def test_axe_finds_nothing_serious_on_the_page_of_a_run(run: Path, tab: Any) -> None:
    opened(tab, run / "report.html")
    assert any("Measures" in name for name in reached(tab)), "a table that scrolls has the focus"


def test_axe_finds_nothing_serious_on_the_page_of_a_residue(run: Path, tab: Any) -> None:
    opened(tab, run.parent / "residue/residue.html")


def test_axe_finds_nothing_serious_on_the_page_of_drawn_prompts(run: Path, tab: Any) -> None:
    opened(tab, run.parent / "drawn/generated.html")


def test_axe_finds_nothing_serious_on_the_page_of_a_sweep(
    tab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Surfaces, tables and trends of a grid; then image sheets and a scatter of costs."""
    monkeypatch.setattr(plots, "available", lambda: False)
    opened(tab, write_sweep(grid(tmp_path / "grid"), tmp_path / "grid/report.html"))
    systems = (("uce", 1.0), ("realera", 3.0))
    runs = [judged(tmp_path / "two" / name, method=name, cost=cost, pictures=True) for name, cost in systems]
    opened(tab, write_sweep(runs, tmp_path / "two/report.html"))
    assert tab.locator(".sheet").count() and tab.locator(".scatter").count()


def test_the_command_serves_two_runs_and_ends_with_its_tab_open(
    small: list[str], run: Path, tab: Any, tmp_path: Path
) -> None:
    """As typed. The second run is of another method."""
    pytest.importorskip("gradio")
    environ = {
        **os.environ,
        "PYTHONPATH": str(Path(realera.__file__).parents[1]),
        "REALERA_CACHE": str(tmp_path / "cache"),
        "TMPDIR": str(tmp_path),
    }
    train = [sys.executable, "-m", "realera.train", "concept=airplane", "method=rece", "evaluate=false"]
    subprocess.run([*train, "run_dir=rece", *small], cwd=tmp_path, env=environ, check=True, capture_output=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "realera.demo", "ui=gradio", f"run=[{run},rece]", "port=0"],
        cwd=tmp_path,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        address = next(found[0] for line in process.stdout if (found := re.search(r"http://\S+/", line)))
        tab.goto(address)
        tab.get_by_role("tab", name="Without a name").click()
        tab.get_by_role("button", name="Draw").click()
        drawn(tab)
        sources = [one.get_attribute("src") for one in tab.locator("#models img").all()]
        assert len(sources) == len(set(sources)) == 6
    finally:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said and "Warning" not in said, said
    assert not list(tmp_path.glob("realera-demo-*")), "the zip files are removed"
