"""Edit, two alignment steps and one image on a full-size folder, with the time and the peak memory of every stage:

python experiments/full_size/measure.py FOLDER RESULTS.json [setting ...]

The results are written to the file and not to standard output, which has the progress bars. Settings are those of
realera.train, such as backbone.gradient_checkpointing=true.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback

from realera import __version__, paths
from realera.runs import steps
from realera.settings import composition, resolvers
from realera.system import disk
from realera.training.checkpoint import read_erased
from realera.training.fit import fit
from realera.training.pairs import encoded_pairs

SETTINGS = [
    "task=object",
    "concept=airplane",
    "method=realera",
    "backbone=sd14",
    "backbone.sampler.steps=2",
    "method.latents.images=1",
    "method.latents.batch=1",
    "method.align.steps=2",
    "trainer=cpu",
    "logger=none",
]
stages: dict[str, dict[str, float]] = {}


class Clock(Callback):
    """Closes a stage of the fit where the next one begins."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self.since = time.perf_counter()

    def close(self, name: str) -> None:
        stages[name] = {"seconds": round(time.perf_counter() - self.since, 1), "peak_gb": peak()}
        print(f"{name}: {stages[name]}", file=sys.stderr, flush=True)
        self.start()

    def setup(self, *_: Any, **__: Any) -> None:
        self.close("mining, closed form, adapter")

    def on_train_start(self, *_: Any) -> None:
        self.close("anchor's latents, one image")

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.close(f"alignment step {trainer.global_step}")


def peak() -> float:
    """Largest resident memory since the clock started, GB (10^9 bytes)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return round(kilobytes * 1024 / 1e9, 2)


@contextmanager
def stage(clock: Clock, name: str) -> Iterator[None]:
    clock.start()
    yield
    clock.close(name)


def main(folder: str, results: str, *settings: str) -> None:
    resolvers.register_resolvers()
    with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
        config = composition.plain(compose("train", [*SETTINGS, f"backbone.pretrained={folder}", *settings]))
    clock = Clock()
    with stage(clock, "load"):
        backbone: Any = steps.load_backbone(config)  # its parts are counted below
    with stage(clock, "fingerprint"):
        print(backbone.fingerprint, file=sys.stderr)
    task = composition.build_task(config)
    with stage(clock, "encode"):
        pairs = encoded_pairs(backbone, task)
        for pair in pairs:  # the states are computed when they are read
            _ = pair.target, pair.anchor
    text = f"a photo of the {task.concepts[0].target}"
    with stage(clock, "image, original"):
        before = backbone.generate([text], [0])
    with tempfile.TemporaryDirectory() as place:
        run = Path(place)
        clock.start()
        fit(
            backbone,
            instantiate(config["method"]),
            pairs,
            run_dir=run / "run",
            seed=0,
            config=config,
            trainer=config["trainer"],
            cache=run / "cache",
            callbacks=[clock],
        )
        clock.close("save")
        saved = read_erased(run / "run" / paths.ERASED).state
        losses = [json.loads(line) for line in (run / "run" / paths.LOSSES).read_text().splitlines()]
    with stage(clock, "image, erased"):
        after = backbone.generate([text], [0])
    rows = pairs[0].target.states
    result = {
        "parameters": {
            "unet": sum(p.numel() for n, p in backbone.unet.named_parameters() if "lora" not in n),
            "text_encoder": sum(p.numel() for p in backbone.text.model.parameters()),
            "vae": sum(p.numel() for p in backbone.vae.parameters()),
        },
        "settings": list(settings),
        "stages": stages,
        "peak_gb": max(stage["peak_gb"] for stage in stages.values()),
        "changed": {
            "edited weights": sum(name.startswith("edit.") for name in saved),
            "adapted layers": sum(name.endswith(".up") and bool(value.any()) for name, value in saved.items()),
            "mean change of a pixel (0-255)": round((after.float() - before.float()).abs().mean().item(), 2),
        },
        "image": list(after.shape[1:]),
        "row_norm": round(torch.linalg.vector_norm(rows[:, 5:], dim=-1).mean().item(), 2),
        "losses": losses,
        "realera": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    disk.write_text(Path(results), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
