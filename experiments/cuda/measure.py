"""One part of the measurements on a GPU: python experiments/cuda/measure.py PART RESULTS.json [cpu]

run.sh starts every part in a separate process, so that a part that fails does not stop the others. A part adds its
numbers to RESULTS.json. With "cpu" the parts run on the CPU, with the miniature instead of the full-size models.

Parts: environment, sd14-float32, sd14-bfloat16, sd14-float16, options (channels-last, TF32, mixed precision, gradient
checkpointing, running out of memory), compile, sdxl, closed (closed forms of 1 and 100 names), road (the commands of
somebody who erases a name and exports the result), attacks (a step of each attack that searches), flux (FLUX.1 dev,
whole and with one block at a time), profile. The full-size weights are random, which changes neither time nor memory.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import open_dict

from realera import __version__, paths
from realera.backbones.sampling import start_noise
from realera.contracts import Backbone, Prompt, Verdict
from realera.costs import Meter
from realera.files import plain_data
from realera.runs import steps
from realera.settings import composition, resolvers
from realera.system import disk
from realera.training.checkpoint import read_erased
from realera.training.fit import fit
from realera.training.pairs import encoded_pairs

CPU = "cpu" in sys.argv[3:]
DEVICE = "cpu" if CPU else "cuda"
FOLDERS = Path(os.environ.get("FOLDERS", "runs/cuda"))
STEPS, IMAGES, DRAWN = (4, 2, 4) if CPU else (20, 8, 50)  # alignment steps, images at once, sampler's steps
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "lightning", "hydra-core", "safetensors", "tokenizers")
GB = 1e9


def sync() -> None:
    if not CPU:
        torch.cuda.synchronize()


def timed(work: Callable[[], Any], times: int = 1) -> float:
    """Median seconds of `work`, including its work on the device."""
    seconds = []
    for _ in range(times):
        sync()
        since = time.perf_counter()
        work()
        sync()
        seconds.append(time.perf_counter() - since)
    return statistics.median(seconds)


def peak(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and the largest memory of the device's tensors in GB."""
    if CPU:
        return timed(work), 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = timed(work)
    return seconds, torch.cuda.max_memory_allocated() / GB


def config_of(kind: str, *words: str, small: bool = False) -> dict[str, Any]:
    """realera.train's settings on the folder of random weights, or, on the CPU, on the miniature. small: the folder is
    small enough for the CPU."""
    model = ["backbone=mini"] if CPU and not small else [f"backbone={kind}", f"backbone.pretrained={FOLDERS / kind}"]
    accelerator = "cpu" if CPU else "gpu"
    common = ["task=object", "concept=airplane", "logger=none", f"trainer.accelerator={accelerator}", *model]
    resolvers.register_resolvers()
    with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
        return composition.plain(compose("train", [*common, f"backbone.sampler.steps={DRAWN}", *words]))


def erase(config: dict[str, Any], backbone: Backbone) -> dict[str, Any]:
    """Runs a whole fit. Returns the seconds by stage, the peak memory and the number of changed layers."""
    task, meter = composition.build_task(config), Meter()
    meter.watch(backbone, DEVICE)
    with meter.stage("text"):
        pairs = encoded_pairs(backbone, task)
    trainer = {key: value for key, value in config["trainer"].items() if key != "checkpoint_every"}
    with tempfile.TemporaryDirectory() as place:
        run = Path(place)

        def go() -> None:
            fit(
                backbone,
                instantiate(config["method"]),
                pairs,
                run_dir=run / "run",
                seed=0,
                config=config,
                trainer=trainer,
                cache=run / "cache",
                checkpoint_every=10_000,
                meter=meter,
            )

        _, memory = peak(go)
        saved = read_erased(run / "run" / paths.ERASED).state
        losses = run / "run" / paths.LOSSES
        rows = [json.loads(line) for line in losses.read_text().splitlines()] if losses.is_file() else []
    backbone.to(DEVICE)
    return {
        "seconds": {name: round(value, 3) for name, value in meter.seconds.items()},
        "peak_gb": round(memory, 2),
        "edited_weights": sum(name.startswith("edit.") for name in saved),
        "adapted_layers": sum(name.endswith(".up") and bool(value.any()) for name, value in saved.items()),
        "first_loss": rows[0]["loss"] if rows else None,
        "last_loss": rows[-1]["loss"] if rows else None,
    }


def bare_passes(backbone: Any, batch: int, mixed: bool) -> float:
    """Seconds of two steps that only run the passes: the teacher's without gradient, the student's with its backward
    pass. The first step has `batch` latents, the second twice as many, like RealEra's odd and even steps."""
    size = backbone.sampler.height // backbone.pixels_per_latent, backbone.sampler.width // backbone.pixels_per_latent
    trained = [parameter for parameter in backbone.unet.parameters() if parameter.requires_grad]

    def pair() -> None:
        for count in (batch, 2 * batch):
            latents = torch.randn(count, backbone.latent_channels, *size, device=DEVICE)
            states = torch.randn(count, backbone.max_length, backbone.width, device=DEVICE)
            t = torch.full((count,), 500, device=DEVICE)
            with torch.autocast(DEVICE, torch.bfloat16) if mixed else nullcontext():
                with torch.no_grad():
                    target = backbone.predict_noise(latents, t, states)
                loss = torch.nn.functional.mse_loss(backbone.predict_noise(latents, t, states), target)
            loss.backward()
            for parameter in trained:
                parameter.grad = None

    pair()
    return timed(pair, 3)


def step_ratio(config: dict[str, Any], backbone: Backbone, mixed: bool = False) -> dict[str, float]:
    """Seconds of an alignment step, and its ratio to the bare passes of the same networks."""
    marks: list[float] = []
    from realera.training.losses import LossLines

    told = LossLines.on_train_batch_end

    def stamp(self: Any, *given: Any, **more: Any) -> None:
        told(self, *given, **more)
        sync()
        marks.append(time.perf_counter())

    LossLines.on_train_batch_end = stamp  # type: ignore[method-assign]
    try:
        found = erase(config, backbone)
    finally:
        LossLines.on_train_batch_end = told  # type: ignore[method-assign]
    pairs = [late - early for early, late in zip(marks[1::2], marks[3::2])]  # an odd step and an even one
    step = statistics.median(pairs) / 2
    batch = config["method"]["latents"]["batch"]
    bare = bare_passes(backbone, batch, mixed) / 2
    first = found["seconds"]["train"] - (marks[-1] - marks[0])
    return {
        **found,
        "batch": batch,
        "first_step_s": round(first, 3),
        "step_s": round(step, 4),
        "bare_s": round(bare, 4),
        "ratio": round(step / bare, 3),
    }


def drawing(kind: str, dtype: str, backbone: Any, times: int) -> dict[str, Any]:
    """Our sampler and diffusers' pipeline alternate in one process: same weights, DDIM, guidance and size."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    texts, seeds = ["a photo of the airplane"] * IMAGES, list(range(IMAGES))
    folder = paths.MINIATURE if CPU else FOLDERS / kind
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=getattr(torch, dtype), safety_checker=None, requires_safety_checker=False
    ).to(DEVICE)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    sampler = backbone.sampler

    size = backbone.latent_channels, *(side // backbone.pixels_per_latent for side in (sampler.height, sampler.width))
    noise = start_noise(seeds, size).to(DEVICE, getattr(torch, dtype))  # noise drawn in half precision would differ

    def theirs(steps: int) -> Any:
        return pipe(
            texts,
            num_inference_steps=steps,
            guidance_scale=sampler.guidance_scale,
            height=sampler.height,
            width=sampler.width,
            latents=noise,
            output_type="np",
        ).images

    def ours(steps: int) -> Any:
        return backbone.generate(texts, seeds, replace(sampler, steps=steps))

    ours(2), theirs(2)
    rounds = [(peak(lambda: ours(sampler.steps)), peak(lambda: theirs(sampler.steps))) for _ in range(times)]
    own, other = ([one[which][0] for one in rounds] for which in (0, 1))
    apart = (ours(10).cpu().float() - torch.from_numpy(theirs(10)) * 255).abs().mean().item()
    seconds, reference = statistics.median(own), statistics.median(other)
    return {
        "images": IMAGES,
        "steps": sampler.steps,
        "pixels": sampler.height,
        "seconds": round(seconds, 3),
        "diffusers_seconds": round(reference, 3),
        "ratio": round(seconds / reference, 3),
        "peak_gb": round(max(one[0][1] for one in rounds), 2),
        "diffusers_peak_gb": round(max(one[1][1] for one in rounds), 2),
        "grey_levels_apart_after_10_steps": round(apart, 3),
    }


# --- parts -----------------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "none"

    found = {name: installed(name) for name in LIBRARIES}
    machine = {"realera": __version__, "python": platform.python_version(), **found, "cores": os.cpu_count()}
    if CPU:
        return {**machine, "card": "none: a rehearsal on the CPU"}
    card = torch.cuda.get_device_properties(0)
    return {
        **machine,
        "card": card.name,
        "card_gb": round(card.total_memory / GB, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
    }


def sd14(dtype: str) -> dict[str, Any]:
    """Load, closed form, alignment, drawing, in one precision of the U-Net."""
    found: dict[str, Any] = {}
    trains = dtype != "float16"
    words = [f"backbone.dtype={dtype}", "method.latents.images=8", "method.latents.batch=4"]
    words += [f"method.align.steps={STEPS}", "method.latents.chunk=8"] if trains else ["method.align.steps=0"]
    config = config_of("sd14", *words, "backbone.sampler.scheduler=ddim", "backbone.sampler.guidance_scale=7.5")
    meter = Meter()
    since = time.perf_counter()
    backbone = steps.load_backbone(config, meter)
    sync()
    found["load_s"] = round(time.perf_counter() - since, 2)
    found["fingerprint_s"] = round(timed(lambda: backbone.fingerprint), 2)
    found["draw"] = drawing("sd14", dtype, backbone, 1 if dtype == "float32" else 3)
    found["erase"] = step_ratio(config, backbone) if trains else erase(config, backbone)
    return found


def options() -> dict[str, Any]:
    """The effect of each option, compared with the same drawing or step without it in one process."""
    texts, seeds = ["a photo of the airplane"] * IMAGES, list(range(IMAGES))
    found: dict[str, Any] = {}

    def draws(*words: str, times: int = 2) -> float:
        backbone = steps.load_backbone(config_of("sd14", *words, "backbone.sampler.steps=20"))
        backbone.generate(texts, seeds, replace(backbone.sampler, steps=2))
        return timed(lambda: backbone.generate(texts, seeds), times)

    half = "backbone.dtype=bfloat16"
    plain = draws(half)
    found["bfloat16_s"] = round(plain, 3)
    found["channels_last"] = round(draws(half, "backbone.channels_last=true") / plain, 3)
    if not CPU:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, False
        exact = draws(times=1)
        torch.backends.cudnn.allow_tf32 = True
        default = draws(times=1)
        torch.backends.cuda.matmul.allow_tf32 = True
        found["float32"] = {
            "no_tf32_s": round(exact, 3),
            "tf32_convolutions_ratio": round(default / exact, 3),
            "tf32_all_ratio": round(draws(times=1) / exact, 3),
        }
        torch.backends.cuda.matmul.allow_tf32 = False
        found["memory"] = memory_runs_out()
    words = ["method.latents.images=4", "method.latents.batch=4", f"method.align.steps={STEPS}"]
    words += ["trainer.precision=bf16-mixed", "backbone.sampler.steps=4"]
    checkpointing = [] if CPU else [("recomputed", ["backbone.gradient_checkpointing=true"])]
    for name, more in [("kept", []), *checkpointing]:  # whether a block's activations are kept or recomputed
        config = config_of("sd14", *words, *more)
        found[f"bf16_mixed_{name}"] = step_ratio(config, steps.load_backbone(config), mixed=True)
    return found


def compiled() -> dict[str, Any]:
    """torch.compile of the U-Net: the first drawing, which compiles, and those after it."""
    texts, seeds = ["a photo of the airplane"] * IMAGES, list(range(IMAGES))
    words = ["backbone.dtype=bfloat16", "backbone.sampler.steps=20"]

    def drawn(*more: str) -> tuple[float, float]:
        """Seconds of a first drawing of two steps, and of a complete drawing after it."""
        backbone = steps.load_backbone(config_of("sd14", *words, *more))
        first = timed(lambda: backbone.generate(texts, seeds, replace(backbone.sampler, steps=2)))
        return first, timed(lambda: backbone.generate(texts, seeds), 2)

    (_, seconds), (first, after) = drawn(), drawn(*([] if CPU else ["backbone.compile=true"]))
    return {"plain_s": round(seconds, 3), "ratio": round(after / seconds, 3), "first_2_steps_s": round(first, 1)}


def memory_runs_out() -> dict[str, Any]:
    """A chunk of images that does not fit into memory is drawn in halves."""
    from realera.evaluation.generate import generate_images

    backbone = steps.load_backbone(config_of("sd14", "backbone.dtype=bfloat16", "backbone.sampler.steps=2"))
    prompts = [Prompt(f"p{i}", "a photo of the airplane", "airplane", "erase", i) for i in range(16)]
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 4e9) / total)
    with tempfile.TemporaryDirectory() as place:
        generate_images(backbone, prompts, Path(place), chunk=16, originals=False)
        drawn = len(list(Path(place).glob("images/*.png")))
    torch.cuda.set_per_process_memory_fraction(1.0)
    return {"asked_at_once": 16, "limit_gb": 4, "drawn": drawn}


def sdxl() -> dict[str, Any]:
    """Stable Diffusion XL once: closed form, two alignment steps, one image of 1024 pixels."""
    words = ["backbone.dtype=bfloat16", "method.latents.images=2", "method.latents.batch=1", "method.align.steps=4"]
    config = config_of("sdxl", *words)
    since = time.perf_counter()
    backbone = steps.load_backbone(config)
    sync()
    found: dict[str, Any] = {"load_s": round(time.perf_counter() - since, 2)}
    before = backbone.generate(["a photo of the airplane"], [0])
    found["erase"] = erase(config, backbone)
    seconds, memory = peak(lambda: backbone.generate(["a photo of the airplane"], [0]))
    after = backbone.generate(["a photo of the airplane"], [0])
    found["image_s"], found["image_peak_gb"] = round(seconds, 2), round(memory, 2)
    found["mean_grey_levels_changed"] = round((after.float() - before.float()).abs().mean().item(), 2)
    found["image"] = list(after.shape[1:])
    return found


def closed() -> dict[str, Any]:
    """VALERA and UCE over 1 and 100 names. The text states of the prompts are timed apart from the closed form."""
    from realera.methods.priors import ARTISTS
    from realera.tasks.prompts import same_name

    names = list({same_name(name): name for name in ARTISTS.read_text(encoding="utf-8").splitlines()}.values())
    found: dict[str, Any] = {}
    for method in ("valera", "uce"):
        for count in (1, 1, 2 if CPU else 100):  # the first warms up
            concept = f"concept={json.dumps(names[:count])}" if count > 1 else f"concept={names[0]}"
            words = ["task=celebrity", f"method={method}", concept, "anchor=a person", "backbone.dtype=bfloat16"]
            config = config_of("sd14", *words)
            found[f"{method}_{count}"] = erase(config, steps.load_backbone(config))
    return found


def road() -> dict[str, Any]:
    """The commands of a user, each in its own process: erase by the method's defaults, export, draw from the export."""
    from realera import generate  # noqa: F401  loaded once, so that no command pays for a cold disk

    found: dict[str, Any] = {}
    place = Path(tempfile.mkdtemp())
    model = ["backbone=mini"] if CPU else ["backbone=sd14", f"backbone.pretrained={(FOLDERS / 'sd14').resolve()}"]
    model += ["backbone.dtype=bfloat16", f"trainer.accelerator={'cpu' if CPU else 'gpu'}"]
    quick = ["method.align.steps=4", "method.latents.images=4"] if CPU else []

    def call(name: str, *words: str) -> None:
        since = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", *words], cwd=place, capture_output=True, text=True)
        print(name, done.stdout[-3000:], done.stderr[-3000:], flush=True)
        found[name] = {"seconds": round(time.perf_counter() - since, 1), "rc": done.returncode}
        print(name, json.dumps(found[name]), flush=True)  # in the log even if the part's time runs out

    erasing = ["realera.train", "task=celebrity", "concept=Tom Cruise", "evaluate=false", "logger=none", *model]
    call("valera", *erasing, "method=valera", "run_dir=valera")
    call("realera", *erasing, *quick, "run_dir=realera")
    for name in ("valera", "realera"):
        costs = place / name / paths.COSTS
        if costs.is_file():
            found[name]["costs"] = json.loads(costs.read_text(encoding="utf-8"))
        call(f"export_{name}", "realera.export", f"run={name}", "to=diffusers", f"out=exported-{name}")
    call("generate", "realera.generate", "run=valera", "prompts=[a photo of Tom Cruise]", "seeds=[0,1]", "out=images")
    if any(step["rc"] for step in found.values()):
        raise SystemExit(f"a command failed: {json.dumps(found)}")
    shutil.rmtree(place)
    return found


class NothingShown:
    """A judge that sees the concept in no image, so that no attack ends before its step."""

    name = "nothing"

    def __call__(self, images: Sequence[Path], prompts: Sequence[Prompt]) -> list[Verdict]:
        return [Verdict(prompt.id, 0.0, "nothing") for prompt in prompts]

    def protocol(self) -> dict[str, Any]:
        return {"judge": self.name}


ONE_STEP = {  # of each attack that searches
    "closed-form": [],
    "inversion": ["attack.steps=1", "attack.images=1"],
    "unlearndiff": ["attack.timesteps=1", "attack.iterations=1"],
    "p4d": ["attack.steps=1", "attack.test=1"],
    "ring-a-bell": ["attack.generations=1"],
    "mma": ["attack.steps=1"],
    "relearn": ["attack.steps=[1]", "attack.count=1"],
    "relearn-full": ["attack.steps=[1]", "attack.count=1", "attack.weights=full"],
}


def attacks() -> dict[str, Any]:
    """One prompt and one step of each attack on UCE's edit, in float32: seconds of the attack, which contain its
    drawings of 4 steps, and peak memory of the command."""
    from realera.runs import asked_attacks, attacking
    from realera.runs.folders import Run
    from realera.runs.session import Session

    place = Path(tempfile.mkdtemp())
    model = ["backbone=mini"] if CPU else ["backbone=sd14", f"backbone.pretrained={(FOLDERS / 'sd14').resolve()}"]
    words = ["task=object", "concept=airplane", "method=uce", "evaluate=false", "logger=none", *model]
    words += ["backbone.sampler.steps=4", f"trainer.accelerator={'cpu' if CPU else 'gpu'}", f"run_dir={place / 'uce'}"]
    words += [f"task.images.{kind}=1" for kind in ("erase", "near", "keep", "associated", "unseen")]
    done = subprocess.run([sys.executable, "-m", "realera.train", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    run = Run(place / "uce", plain_data.read_yaml(place / "uce" / paths.CONFIG))
    resolvers.register_resolvers()
    task, backbone = composition.build_task(run.config), steps.load_run(run)
    found: dict[str, Any] = {}
    for name, own in ONE_STEP.items():
        typed = ["run=original", "logger=none", f"attack={name.removesuffix('-full')}", "limit=1", *own]
        with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
            cfg = compose("attack", typed)
        with open_dict(cfg):
            cfg.task, cfg.backbone = run.config["task"], run.config["backbone"]
        asked = asked_attacks.Asked.of(composition.checked(cfg, "attack"))
        done_by: dict[str, Any] = {}
        seconds, memory = peak(
            lambda asked=asked, done_by=done_by: done_by.update(
                attacking.carry_out(Session(run), backbone, task, NothingShown(), asked)
            )
        )
        cost = done_by["cost"]
        found[name] = {"command_s": round(seconds, 2), "peak_gb": round(memory, 2)}
        found[name] |= {key: round(float(cost[key]), 2) for key in ("seconds", "passes", "text_passes", "draws")}
        print(name, json.dumps(found[name]), flush=True)  # in the log even if the part's time runs out
    shutil.rmtree(place)
    return found


def flux() -> dict[str, Any]:
    """FLUX.1 dev in bfloat16: closed form, two alignment steps, an image of 4 steps; then the image with one block at a
    time on the GPU and T5 in eight bits."""
    words = ["backbone.sampler.steps=4", "method.latents.images=1", "method.latents.batch=1", "method.latents.chunk=1"]
    words += ["method.align.steps=2", "backbone.vae_tiling=true"]
    words += ["backbone.sampler.height=64", "backbone.sampler.width=64", "backbone.text.width=64"] if CPU else []
    text, found = ["a photo of the airplane"], {}
    for name, more in (("whole", []), ("offloaded", ["backbone.offload=sequential", "backbone.t5=int8"])):
        config = config_of("flux-dev", *words, *([] if CPU else more), small=True)
        since = time.perf_counter()
        backbone = steps.load_backbone(config)
        sync()
        part: dict[str, Any] = {"load_s": round(time.perf_counter() - since, 2)}
        seconds, memory = peak(lambda backbone=backbone: backbone.generate(text, [0]))
        part |= {"image_s": round(seconds, 2), "image_peak_gb": round(memory, 2)}
        if name == "whole":
            before = backbone.generate(text, [0])
            part["erase"] = erase(config, backbone)
            after = backbone.generate(text, [0])
            part["mean_grey_levels_changed"] = round((after.float() - before.float()).abs().mean().item(), 2)
            part["image"] = list(after.shape[1:])
        found[name] = part
        print(name, json.dumps(part), flush=True)
        del backbone
    return found


def profile() -> dict[str, Any]:
    """Profiles the host during alignment; the functions by own and cumulative time go to the part's log."""
    import cProfile
    import pstats

    words = [
        "backbone.dtype=bfloat16",
        "method.latents.images=4",
        "method.latents.batch=4",
        f"method.align.steps={STEPS}",
    ]
    config = config_of("sd14", *words, "backbone.sampler.steps=4")
    backbone = steps.load_backbone(config)
    erase(config, backbone)  # loads libraries and kernels before the profile
    backbone.load_erased({})
    with cProfile.Profile() as found:
        outcome = erase(config, backbone)
    for order in ("tottime", "cumtime"):
        pstats.Stats(found).sort_stats(order).print_stats(45)
    return {"train_s": outcome["seconds"]["train"], "steps": STEPS}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "environment": environment,
    "sd14-float32": lambda: sd14("float32"),
    "sd14-bfloat16": lambda: sd14("bfloat16"),
    "sd14-float16": lambda: sd14("float16"),
    "options": options,
    "compile": compiled,
    "sdxl": sdxl,
    "closed": closed,
    "road": road,
    "attacks": attacks,
    "flux": flux,
    "profile": profile,
}


def main(part: str, results: str) -> None:
    file = Path(results)
    known = json.loads(file.read_text()) if file.is_file() else {}
    since = time.perf_counter()
    card = "CPU" if CPU else torch.cuda.get_device_name()
    found = {"card": card, **PARTS[part]()}
    found["whole_part_s"] = round(time.perf_counter() - since, 1)
    disk.write_text(file, json.dumps({**known, part: found}, indent=1) + "\n")
    print(part, json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
