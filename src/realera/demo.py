"""Serves a page that draws prompts with the original and the erased model: python -m realera.demo run=runs/..."""

from __future__ import annotations

import errno
import socket

from omegaconf import DictConfig

from realera import cli, console
from realera.contracts import UserError
from realera.reporting.demo_page import ALL_HOSTS, Server, data_uri, handler
from realera.runs import folders, preflight, prompt_lengths
from realera.settings import composition
from realera.system import interrupts


def demo(cfg: DictConfig) -> None:
    config = composition.plain(cfg)
    host = str(config["host"])
    run = folders.open_run(str(config["run"]))
    preflight.check_run(run)
    preflight.check_model(run.settings.backbone)
    cli.say_backbone(run.config, str(run.folder))

    from realera.runs import steps  # imports torch and diffusers, so only after all checks

    concept = folders.concept_of(run.config)
    about = {
        "title": f"{concept}, before and after",
        "about": f"{run.settings.method.name} on {run.settings.backbone.name}; both start from the same noise.",
        "prompt": f"a photo of the {concept.partition(', ')[0]}",
    }
    pair = steps.pairs_from(steps.load_run(run), run.settings)

    def draw(prompt: str, seed: int) -> dict[str, str]:
        counted = prompt_lengths.Lengths(run.settings.backbone)
        note = f"only the first {counted.fits} tokens of this prompt are used" if counted.add(prompt) else ""
        return {"note": note} | {which: data_uri(pixels.numpy()) for which, pixels in pair(prompt, seed).items()}

    try:
        server = Server((host, config["port"]), handler(draw, about, host))
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise UserError(
                f"host={host} is not an address of this machine: leave it out, or type host=0.0.0.0 for all addresses."
            ) from error
        raise UserError(
            f"port {config['port']} cannot be opened ({error.strerror}): type port=0 for a free port."
        ) from error
    if host in ALL_HOSTS:
        cli.log.warning("host=%s: everyone on this network can use the page", host)
    with server:
        name = f"[{host}]" if ":" in host else host
        try:
            console.show_path("page to open", f"http://{name}:{server.server_port}/   (stop with Ctrl-C)")
            server.serve_forever()
        except KeyboardInterrupt:  # the usual way to stop the demo, so without a message on how to resume
            interrupts.exit_status()
            raise


def main() -> None:
    cli.run_command("demo", demo)


if __name__ == "__main__":
    cli.as_process(main)
