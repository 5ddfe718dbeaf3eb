"""The demo's page in gradio: one prompt drawn by the original model and by several erased models, side by side.

A drawing runs in a thread of its own, so that the page shows the steps and can stop it. It also stops if its tab is
closed. The pictures are data URIs inside the page, so no file of this machine is served but the zip of a drawing.
"""

from __future__ import annotations

import html
import logging
import os
import queue
import re
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from realera.contracts import UserError
from realera.files.plain_data import json_text
from realera.reporting.demo_page import LONGEST, data_uri, png
from realera.system import disk

log = logging.getLogger("realera")
HERE = Path(__file__).parent
CSS, SCRIPT = HERE / "gradio_page.css", HERE / "gradio_page.js"
MOST_IMAGES = 8  # of one drawing, for each model
MOST_STEPS, MOST_GUIDANCE = 150, 20.0  # ends of the sliders, unless the model's own settings are higher
MOST_WAITING = 32  # drawings in the queue
LARGEST_SEED = 2**53 - MOST_IMAGES  # a browser's numbers are exact up to 2^53
UNDRAWN = "the images could not be drawn: see the terminal of the demo."
READY = "Nothing is drawn yet. Write a prompt, or choose one from the gallery, and press Draw."


@dataclass(frozen=True)
class Wish:
    """The settings of one drawing. methods: names of the erased models. images: for each model, from the seeds seed,
    seed + 1, ..."""

    prompt: str
    negative: str
    methods: Sequence[str]
    seed: int
    images: int
    steps: int
    guidance: float

    @property
    def seeds(self) -> list[int]:
        return list(range(self.seed, self.seed + self.images))


EachStep = Callable[[int, int], None]
Draw = Callable[[Wish, EachStep], Iterator[tuple[str, list[Any]]]]
"""Yields (model's name, one uint8 (H, W, 3) array for each seed): the original model, then the wish's methods. It calls
the second argument with (finished steps, all steps) before each step; an exception in it ends the drawing."""


@dataclass(frozen=True)
class About:
    """The texts and first values of the page. models: the original model's name, then those of the erased models.
    presets: {heading: prompts}. note: an optional remark about a prompt, "" for none."""

    title: str
    about: str
    prompt: str
    models: Sequence[str]
    steps: int
    guidance: float
    presets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    note: Callable[[str], str] = lambda prompt: ""


class Stopped(Exception):
    """Raised in a drawing that was stopped or whose tab was closed."""


def wish_of(fields: Sequence[Any], known: Sequence[str]) -> Wish:
    """The wish of a page's fields, in the order of `Wish`. known: names of the erased models.

    Raises:
        UserError: a field is empty or out of range.
    """
    prompt, negative, methods, seed, images, steps, guidance = fields
    texts = [" ".join(str(text or "").split()) for text in (prompt, negative)]
    if not texts[0]:
        raise UserError("the prompt is empty: write one, or choose one from the gallery.")
    if any(len(text) > LONGEST or not text.isprintable() for text in texts):
        raise UserError(f"a prompt has at most {LONGEST} characters and no control characters: shorten it.")
    chosen = [name for name in known if name in (methods or ())]
    if not chosen:
        raise UserError("no erased model is chosen: tick at least one.")
    ranges = {"seed": (seed, 0, LARGEST_SEED), "images": (images, 1, MOST_IMAGES), "steps": (steps, 1, 1000)}
    whole = {name: _whole(name, *given) for name, given in ranges.items()}
    if not isinstance(guidance, int | float) or not 0 <= guidance <= 1000:
        raise UserError("guidance is a number from 0 to 1000: change it.")
    return Wish(texts[0], texts[1], chosen, whole["seed"], whole["images"], whole["steps"], float(guidance))


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if not isinstance(value, int | float) or value != value or not least <= value <= most or int(value) != value:
        raise UserError(f"{name} is a whole number from {least} to {most}: change it.")
    return int(value)


# --- a drawing -------------------------------------------------------------------------------------------------------


class Drawings:
    """Starts the drawings of all open tabs, and stops them. folder: for the zip files, of which each tab keeps one."""

    def __init__(self, draw: Draw, folder: Path) -> None:
        self._draw = draw
        self._folder = folder
        self._stops: dict[str, threading.Event] = {}  # by tab

    def stop(self, tab: str) -> None:
        if (event := self._stops.get(tab)) is not None:
            event.set()

    def start(self, wish: Wish, tab: str) -> Iterator[tuple[str, Any]]:
        """Yields ("step", (done, total)), ("pictures", (name, arrays)), and at the end one of ("zip", path),
        ("stopped", None) and ("error", sentence). Closing the generator stops the drawing."""
        self.stop(tab)
        event = self._stops[tab] = threading.Event()
        said: queue.Queue[tuple[str, Any]] = queue.Queue()
        worker = threading.Thread(target=self._work, args=(wish, tab, event, said), daemon=True)
        worker.start()
        try:
            while True:
                kind, content = said.get()
                while kind == "step" and not said.empty():  # only the newest is worth sending
                    kind, content = said.get()
                yield kind, content
                if kind in ("zip", "stopped", "error"):
                    return
        finally:
            event.set()
            if self._stops.get(tab) is event:
                del self._stops[tab]

    def _work(self, wish: Wish, tab: str, event: threading.Event, said: queue.Queue[tuple[str, Any]]) -> None:
        def each_step(done: int, total: int) -> None:
            if event.is_set():
                raise Stopped
            said.put(("step", (done, total)))

        drawn: dict[str, list[Any]] = {}
        try:
            for name, pictures in self._draw(wish, each_step):
                drawn[name] = pictures
                said.put(("pictures", (name, pictures)))
            said.put(("zip", self._zip(wish, drawn, tab)))
        except Stopped:
            said.put(("stopped", None))
        except UserError as error:
            said.put(("error", str(error)))
        except Exception:
            log.exception("the images of %r could not be drawn", wish.prompt)
            said.put(("error", UNDRAWN))

    def _zip(self, wish: Wish, drawn: Mapping[str, Sequence[Any]], tab: str) -> Path:
        """A zip of all images of a drawing, and of its settings."""
        file = self._folder / plain(tab) / f"{plain(wish.prompt)}-{wish.seed}.zip"
        for old in file.parent.glob("*.zip"):
            old.unlink(missing_ok=True)
        with disk.atomic(file) as beside, zipfile.ZipFile(beside, "w") as archive:
            archive.writestr("settings.json", json_text(asdict(wish), indent=1))
            for number, (name, pictures) in enumerate(drawn.items()):
                for seed, picture in zip(wish.seeds, pictures):
                    archive.writestr(f"{number}-{plain(name)}/{file_name(wish, name, seed)}", png(picture))
        return file


def file_name(wish: Wish, model: str, seed: int) -> str:
    return f"{plain(wish.prompt)}-{seed}-{plain(model)}.png"


def plain(text: str) -> str:
    """A text as a part of a file name: at most 60 of the characters [a-z0-9-]."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "x"


# --- html ------------------------------------------------------------------------------------------------------------


def column(model: str, wish: Wish, pictures: Sequence[Any] | None) -> str:
    """The pictures of a model, one below the other. None: they are not drawn yet."""
    head = f"<h2>{html.escape(model)}</h2>"
    if pictures is None:
        return head + '<div class="blank" aria-hidden="true"></div>' * wish.images
    return head + "".join(_figure(model, wish, seed, picture) for seed, picture in zip(wish.seeds, pictures))


def _figure(model: str, wish: Wish, seed: int, picture: Any) -> str:
    alt = html.escape(f"{model}: {wish.prompt}, seed {seed}")
    name = html.escape(file_name(wish, model, seed))
    save = f'<button type="button" class="save" data-name="{name}" aria-label="Save the image of {alt}">Save</button>'
    small = " small" if picture.shape[0] < 256 else ""
    return (
        f'<figure><img class="drawn{small}" src="{data_uri(picture)}" alt="{alt}">'
        f"<figcaption>seed {seed} {save}</figcaption></figure>"
    )


def status(text: str, kind: str = "", done: int = 0, total: int = 0) -> str:
    """The line that tells how far a drawing is. kind: "", "done" or "bad"."""
    bar = f'<progress max="{total}" value="{done}" aria-label="steps"></progress>' if total else ""
    return f'<p class="told {kind}">{html.escape(text)}</p>{bar}'


def heading(about: About) -> str:
    return f"<h1>{html.escape(about.title)}</h1><p>{html.escape(about.about)}</p>"


# --- the page --------------------------------------------------------------------------------------------------------


def page(draw: Draw, about: About, folder: Path) -> Any:
    """The page as gradio's Blocks, not served yet. folder: a temporary folder for zip files."""
    import gradio as gr

    drawings = Drawings(draw, folder)
    original, *erased = about.models

    with gr.Blocks(title=about.title, analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(heading(about), elem_id="head")
        with gr.Row(elem_id="table"):
            with gr.Column(elem_id="wish"):
                prompt = gr.Textbox(about.prompt, label="Prompt", lines=2, max_length=LONGEST, elem_id="prompt")
                negative = gr.Textbox(label="Negative prompt", max_length=LONGEST, elem_id="negative")
                with gr.Row():
                    go = gr.Button("Draw", variant="primary", min_width=100, elem_id="go")
                    halt = gr.Button("Stop", interactive=False, min_width=100, elem_id="halt")
            with gr.Column(elem_id="drawn"):
                told = gr.HTML(status(READY), elem_id="told")
                with gr.Row(elem_id="models"):
                    places = [gr.HTML(visible=False, apply_default_css=False) for _ in about.models]
                keep = gr.DownloadButton("Save all as a zip", visible=False, elem_id="zip")
            with gr.Column(elem_id="settings"):
                several = len(erased) > 1
                methods = gr.CheckboxGroup(list(erased), value=list(erased), label="Erased by", visible=several)
                images = gr.Slider(1, MOST_IMAGES, 2, step=1, label="Images of each model", elem_id="images")
                seed = gr.Number(0, label="Seed of the first image", precision=0, minimum=0, elem_id="seed")
                most_steps, most_guidance = max(MOST_STEPS, about.steps), max(MOST_GUIDANCE, about.guidance)
                steps = gr.Slider(1, most_steps, about.steps, step=1, label="Steps", elem_id="steps")
                guidance = gr.Slider(0, most_guidance, about.guidance, step=0.1, label="Guidance", elem_id="guidance")
        if about.presets:
            _gallery(gr, about.presets, prompt)

        fields = [prompt, negative, methods, seed, images, steps, guidance]
        shown = [told, go, halt, keep, *places]

        def run(request: Any, *given: Any) -> Iterator[list[Any]]:
            idle: list[Any] = [gr.Button(interactive=True), gr.Button(interactive=False)]
            busy: list[Any] = [gr.Button(interactive=False), gr.Button(interactive=True)]
            same: list[Any] = [gr.skip() for _ in places]
            try:
                wish = wish_of(given, erased)
            except UserError as error:
                yield [status(f"Error: {error}", "bad"), *idle, gr.skip(), *same]
                return
            drawn = {name: column(name, wish, None) for name in (original, *wish.methods)}
            news: list[Any] = [gr.HTML(drawn.get(name, ""), visible=name in drawn) for name in about.models]
            yield [status("Waiting for the model …"), *busy, gr.DownloadButton(visible=False), *news]
            for kind, content in drawings.start(wish, str(request.session_hash)):
                line, buttons, archive, news = gr.skip(), busy, gr.skip(), list(same)
                if kind == "step":
                    done, total = content
                    line = status(f"Step {done + 1} of {total}", done=done, total=total)
                elif kind == "pictures":
                    news[about.models.index(content[0])] = column(content[0], wish, content[1])
                elif kind == "zip":
                    note = about.note(wish.prompt)
                    line = status(f"Drawn. {note}".strip(), "done")
                    buttons, archive = idle, gr.DownloadButton(value=str(content), visible=True)
                else:
                    line = status(f"Error: {content}", "bad") if kind == "error" else status("Stopped.")
                    buttons = idle
                yield [line, *buttons, archive, *news]

        def stop(request: Any = None) -> None:
            drawings.stop(str(request.session_hash))

        for function in (run, stop):  # gradio reads the annotation, which is a text in this file and names no global
            function.__annotations__["request"] = gr.Request

        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        gr.on(
            [go.click, prompt.submit, negative.submit],
            run,
            fields,
            shown,
            concurrency_limit=1,
            trigger_mode="once",
            **hidden,
        )
        halt.click(stop, queue=False, **hidden)
        blocks.unload(stop)
    blocks.queue(max_size=MOST_WAITING)
    return blocks


def _gallery(gr: Any, presets: Mapping[str, Sequence[str]], prompt: Any) -> None:
    """The prompts to choose from, a tab for each heading."""
    with gr.Column(elem_id="gallery"):
        gr.HTML("<h2>Prompts to try</h2>")
        with gr.Tabs():
            for title, texts in presets.items():
                with gr.Tab(title):
                    samples = gr.Dataset(
                        components=[gr.Textbox(visible=False)],
                        samples=[[text] for text in texts],
                        samples_per_page=30,
                        show_label=False,
                        layout="gallery",
                    )
                    samples.click(
                        lambda sample: sample[0],
                        samples,
                        prompt,
                        queue=False,
                        show_progress="hidden",
                        api_visibility="private",
                    )


def theme() -> Any:
    """Colours and fonts of our other pages; no font is loaded from another server."""
    import gradio as gr

    shades = (
        "e9f5f3",
        "cfe9e5",
        "a3d5cd",
        "6fbdb1",
        "4fc3b2",
        "0b7268",
        "0b7268",
        "095c54",
        "07473f",
        "05332e",
        "031f1c",
    )
    teal = gr.themes.Color(*(f"#{shade}" for shade in shades), name="teal")
    fonts = ("system-ui", "sans-serif")
    made = gr.themes.Base(primary_hue=teal, neutral_hue="stone", font=fonts, font_mono=("ui-monospace", "monospace"))
    return made.set(
        body_background_fill="#fcfcfa",
        body_background_fill_dark="#15171a",
        body_text_color_subdued="#5d5953",
        body_text_color_subdued_dark="#b8b2ac",
        block_label_text_color="#44403c",
        block_title_text_color="#44403c",
        button_primary_background_fill="#0b7268",
        button_primary_background_fill_hover="#095c54",
        button_primary_background_fill_dark="#4fc3b2",
        button_primary_background_fill_hover_dark="#6fd2c3",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#10211f",
        slider_color="#0b7268",
        slider_color_dark="#4fc3b2",
    )


@contextmanager
def served(draw: Draw, about: About, host: str, port: int) -> Iterator[None]:
    """Serves the page inside this context, from another thread."""
    os.environ["NO_PROXY"] = ",".join(filter(None, (os.environ.get("NO_PROXY"), "localhost,127.0.0.1,::1")))
    with tempfile.TemporaryDirectory(prefix="realera-demo-") as folder:
        blocks = page(draw, about, Path(folder))
        blocks.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            footer_links=[],
            theme=theme(),
            css=CSS.read_text(encoding="utf-8"),
            js=SCRIPT.read_text(encoding="utf-8"),
        )
        try:
            yield
        finally:
            blocks.close(verbose=False)
