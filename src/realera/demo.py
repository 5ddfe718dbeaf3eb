"""Serves a page that draws prompts with the original and the erased model: python -m realera.demo run=runs/..."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from realera import cli, console
from realera.contracts import UserError
from realera.reporting.demo_page import ALL_HOSTS, Server, address_refusals, data_uri, free_port, handler
from realera.runs import folders, preflight, presets, prompt_lengths, spaces, together
from realera.runs.folders import Run
from realera.settings import composition
from realera.system import interrupts


def demo(cfg: DictConfig) -> None:
    config = composition.plain(cfg)
    names = config["run"] if isinstance(config["run"], list) else [config["run"]]
    runs = [folders.open_run(str(name)) for name in names]
    together.check(runs)
    for run in runs:
        preflight.check_run(run)
    if config["to"] == "space":
        write_space(runs, config)
        return
    gallery = config["ui"] == "gradio"
    if config["out"] is not None:
        raise UserError("out= is the folder of a Space: add to=space, or leave it out.")
    if not gallery and len(runs) > 1:
        raise UserError("the built-in page shows one run: add ui=gradio to see several.")
    if not gallery and config["presets"]:
        raise UserError("the built-in page has no gallery of prompts: leave presets= out, or add ui=gradio.")
    prompts = gallery_of(runs, config) if gallery else {}
    preflight.check_model(runs[0].settings.backbone)
    cli.say_backbone(runs[0].config, str(runs[0].folder))
    if config["host"] in ALL_HOSTS:
        cli.log.warning("host=%s: everyone on this network can use the page", config["host"])
    free_port(str(config["host"]), config["port"])  # refused before the models are loaded, which takes a minute
    if gallery:
        serve_gradio(runs, prompts, config)
    else:
        serve_page(runs[0], config)


def serve_page(run: Run, config: Mapping[str, Any]) -> None:
    """The built-in page."""
    host, port = str(config["host"]), config["port"]

    from realera.runs import steps  # imports torch and diffusers, so only after all checks

    pair = steps.pairs_from(steps.load_run(run), run.settings)

    def draw(prompt: str, seed: int) -> dict[str, str]:
        note = prompt_lengths.remark(prompt, run.settings.backbone)
        return {"note": note} | {which: data_uri(pixels.numpy()) for which, pixels in pair(prompt, seed).items()}

    with address_refusals(host, port):
        server = Server((host, port), handler(draw, together.texts([run]), host))
    with server, until_stopped(host, server.server_port):
        server.serve_forever()


def serve_gradio(runs: Sequence[Run], prompts: presets.Presets, config: Mapping[str, Any]) -> None:
    """The page with several runs and a gallery of prompts."""
    from realera.reporting import gradio_page
    from realera.runs.side_by_side import SideBySide

    host, models = str(config["host"]), SideBySide(runs)
    port = free_port(host, config["port"])
    about = gradio_page.About(**models.about(), presets=prompts)
    with gradio_page.served(models.draw, about, host, port), until_stopped(host, port):
        threading.Event().wait()


def write_space(runs: Sequence[Run], config: Mapping[str, Any]) -> None:
    """The folder of a Hugging Face Space with the gradio page."""
    prompts = gallery_of(runs, config)
    out = Path(str(config["out"] or runs[0].folder / "space"))
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"out={out} contains other files: give a new or an empty folder.")
    preflight.check_writable(out, "out")
    preflight.check_model(runs[0].settings.backbone, plan=True)
    spaces.write(out, dict(zip(together.names_of(runs), runs)), prompts, version("gradio"))
    console.show_path("folder of the Space", out)
    console.show_path("to try it here", f"python {out / spaces.APP}")


def gallery_of(runs: Sequence[Run], config: Mapping[str, Any]) -> presets.Presets:
    """The prompts of the gradio page. Raises UserError if gradio is missing or they cannot be read."""
    if find_spec("gradio") is None:
        raise UserError("the gradio page needs gradio: pip install 'realera[demo]' (in a checkout: '.[demo]').")
    return presets.read(Path(str(config["presets"]))) if config["presets"] else presets.presets_of(runs)


@contextmanager
def until_stopped(host: str, port: int) -> Iterator[None]:
    """Shows the page's address. Ctrl-C is the usual way to stop the demo, so it gives no message on how to resume."""
    name = f"[{host}]" if ":" in host else host
    try:
        console.show_path("page to open", f"http://{name}:{port}/   (stop with Ctrl-C)")
        yield
    except KeyboardInterrupt:
        interrupts.exit_status()
        raise


def main() -> None:
    cli.run_command("demo", demo)


if __name__ == "__main__":
    cli.as_process(main)
