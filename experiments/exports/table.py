"""Method x form x client: python experiments/exports/table.py RESULTS.json [miniature | small | full ...] [method ...]

Each method erases a concept with few steps; each form of the run is written by the export command's own code, and each
client loads the file by its own code and draws. A cell is the mean difference in grey levels (0 to 255) between the
client's images and those of the run: same prompts, same noise, same sampler. Models:

    miniature  realera's built-in model
    small      Stable Diffusion 1.x's blocks and layers with few channels and random weights
    full       Stable Diffusion 1.4 in full size with random weights; stable-diffusion.cpp knows no other size

Random weights are scaled so that text and latents move the image (`lively`): the first row of each model says how far
the erasure moves it, and a cell far below that is the same image.

Rows of other models and methods that RESULTS.json holds already are kept. Full size takes 9 GB of disk and 12 GB of
memory.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

import realera
from realera import paths
from realera.backbones import standard
from realera.contracts import UserError

METHODS = ("uce", "valera", "realera", "esd-u", "mace", "spm", "sld")
IN_FULL_SIZE = METHODS[:4]  # a cell takes a minute there
FEW: dict[str, dict[str, Any]] = {  # few steps, where a method has such a setting: the table is about files
    "realera": {"align.steps": 2, "latents.images": 2, "latents.batch": 1},
    "esd-u": {"align.steps": 2},
    "mace": {"align.steps": 2, "latents.images": 2, "latents.masks.source": "attention"},
    "spm": {"align.steps": 60, "align.lr": 1e-2},  # its adapters start at zero
}
# AdamW of the whole U-Net takes 20 GB; half of it still has linear layers, convolutions, norms and biases to train
HALF: dict[str, dict[str, Any]] = {
    "esd-u": {
        "align.parameters": ["-attn2", "-time_embedding", "-up_blocks", "-conv_norm_out", "-conv_out"],
        "align.lr": 5e-4,  # in two steps, 1e-5 moves an image less than stable-diffusion.cpp's arithmetic
    }
}
PROMPTS, SEEDS = ["a photo of the airplane", "a photo of the dog"], [1, 2]
STEPS, GUIDANCE = 4, 7.5


def lively(model: torch.nn.Module, part: str) -> torch.nn.Module:
    """Scales random weights: fresh ones give a grey image that no text changes."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if part == "unet" and ("attn2.to_out" in name or "attn2.to_v" in name) and name.endswith("weight"):
                value.mul_(6)
            if part == "vae" and name == "decoder.conv_out.weight":
                value.mul_(3)
    return model


def random_folder(place: Path, small: bool) -> Path:
    """Stable Diffusion 1.x with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    settings = {part: dict(config) for part, config in standard.MODELS["v1"].items()}
    if small:
        text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        settings["text_encoder"] |= text
        settings["unet"] |= {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 64, "sample_size": 8}
        settings["vae"] |= {"block_out_channels": [32, 32, 64, 64], "sample_size": 64}
    else:
        settings["unet"]["sample_size"] = 8  # images of 64 pixels
    words, merges = standard.tokenizer()
    pipe = StableDiffusionPipeline(
        vae=lively(AutoencoderKL.from_config(settings["vae"]), "vae"),
        text_encoder=CLIPTextModel(CLIPTextConfig(**settings["text_encoder"])),
        tokenizer=CLIPTokenizer(vocab=words, merges=[tuple(merge.split()) for merge in merges], model_max_length=77),
        unet=lively(UNet2DConditionModel.from_config(settings["unet"]), "unet"),
        scheduler=PNDMScheduler.from_config(settings["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(place)
    return place


def philox(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Normal numbers as CUDA's generator gives them, which stable-diffusion.cpp draws its noise from: Philox 4x32 with
    10 rounds (Salmon et al. 2011), then the Box-Muller transform."""
    count = int(np.prod(shape))
    counter = np.zeros((4, count), dtype=np.uint64)
    counter[2] = np.arange(count)
    key = np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint64)
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        first, second = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        counter = np.stack(
            [
                (second >> np.uint64(32)) ^ counter[1] ^ key[0],
                second & low,
                (first >> np.uint64(32)) ^ counter[3] ^ key[1],
                first & low,
            ]
        )
        key = (key + np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)) & low
    u = counter[0] * 2.0**-32 + 2.0**-33
    v = (counter[1] * 2.0**-32 + 2.0**-33) * 2 * np.pi
    return torch.from_numpy((np.sqrt(-2 * np.log(u)) * np.sin(v)).astype(np.float32).reshape(shape))


def drawn(pipe: StableDiffusionPipeline) -> Tensor:
    """Images (n, H, W, 3) in grey levels by diffusers, with k-diffusion's Euler steps, which every client has."""
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    pipe.set_progress_bar_config(disable=True)
    pipe = pipe.to(torch.float32)
    side = pipe.unet.config.sample_size
    images = []
    for text, seed in zip(PROMPTS, SEEDS):
        noise = philox(seed, (1, pipe.unet.config.in_channels, side, side))
        made = pipe(
            text, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=noise, output_type="np",
            height=side * pipe.vae_scale_factor, width=side * pipe.vae_scale_factor,
        )  # fmt: skip
        images.append(torch.from_numpy(made.images[0]))
    return torch.stack(images) * 255


def by_stable_diffusion_cpp(file: Path, lora: Path | None = None) -> Tensor:
    from stable_diffusion_cpp import StableDiffusion

    more: dict[str, Any] = {"lora_model_dir": str(lora.parent)} if lora else {}
    client = StableDiffusion(model_path=str(file), n_threads=2, verbose=False, rng_type="cuda", **more)
    images = []
    for text, seed in zip(PROMPTS, SEEDS):
        words = f"{text}<lora:{lora.stem}:1>" if lora else text
        (image,) = client.generate_image(
            prompt=words, width=64, height=64, sample_steps=STEPS, cfg_scale=GUIDANCE, seed=seed, sample_method="euler"
        )
        images.append(torch.from_numpy(np.asarray(image.convert("RGB")).astype(np.float32)))
    return torch.stack(images)


def opened(place: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(place, local_files_only=True, safety_checker=None)


def cells(model: str, folder: Path, method: str, place: Path) -> dict[str, float | str]:
    """{"form, client": distance in grey levels, or the reason why there is none}."""
    task: Any = {"task": "object", "anchor": "sky"}
    pipe = opened(folder)
    before = drawn(opened(folder))
    few = FEW.get(method, {}) | (HALF.get(method, {}) if model == "full" else {})
    settings: Any = {f"method.{key}": value for key, value in few.items()}
    if model != "miniature":
        settings |= {"backbone.sampler.steps": 2}
    erased = realera.erase(pipe, "airplane", method=method, progress=False, **task, **settings)
    found: dict[str, float | str] = {}

    def cell(name: str, work: Callable[[], Tensor]) -> None:
        since = time.perf_counter()
        try:
            found[name] = round(float((work() - run).abs().mean()), 3)
        except UserError as error:
            found[name] = str(error).replace(str(place), "")
        print(model, method, name, found[name], f"{time.perf_counter() - since:.0f} s", flush=True)

    try:
        run = drawn(erased.pipe)
    except UserError as error:
        return {"all": str(error)}
    found["moved by the erasure"] = round(float((run - before).abs().mean()), 3)

    def exported(to: Any) -> Path:
        made = erased.export(to, place / to, verify=0)
        if made.left_out:
            found[f"{to}, left out"] = "; ".join(f"{part}: {why}" for part, why in made.left_out.items())
        return Path(made.path)

    def with_lora(to: Any) -> Tensor:
        file = exported(to)
        plain = opened(folder)
        plain.load_lora_weights(str(file.parent), weight_name=file.name)
        return drawn(plain)

    cell("diffusers, diffusers", lambda: drawn(opened(exported("diffusers"))))
    shutil.rmtree(place / "diffusers", ignore_errors=True)  # in full size each of the two whole models is 4 GB
    cell("checkpoint, diffusers", lambda: drawn(single(exported("checkpoint"), folder)))
    cell("lora, diffusers", lambda: with_lora("lora"))
    cell("kohya, diffusers", lambda: with_lora("kohya"))
    if model != "full":
        found["checkpoint, stable-diffusion.cpp"] = "it knows Stable Diffusion's own sizes only"
    elif importlib.util.find_spec("stable_diffusion_cpp") is None:
        found["checkpoint, stable-diffusion.cpp"] = "stable-diffusion-cpp-python is not installed"
    else:
        file = next((place / "checkpoint").glob("*.safetensors"), None)
        if file is not None:
            cell("checkpoint, stable-diffusion.cpp", lambda: by_stable_diffusion_cpp(file))
    return found


def single(file: Path, folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_single_file(
        str(file), config=str(folder), local_files_only=True, safety_checker=None, torch_dtype=torch.float32
    )


def markdown(results: dict[str, dict[str, dict[str, float | str]]]) -> str:
    """The table of each model: a row for each method, a column for each form and client."""
    blocks = []
    for model, methods in results.items():
        columns = list(dict.fromkeys(name for found in methods.values() for name in found if "left out" not in name))
        columns = [name for name in columns if name != "all"]
        lines = [f"**{model}**", "", f"| method | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        notes = []
        for method, found in methods.items():
            row = []
            for name in columns:
                value = found.get(name, found.get("all", ""))
                if isinstance(value, str) and value:
                    if (note := value) not in notes:
                        notes.append(note)
                    value = f"({notes.index(note) + 1})"
                row.append(str(value))
            lines.append(f"| {method} | {' | '.join(row)} |")
        lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def main() -> None:
    out, chosen = Path(sys.argv[1]), sys.argv[2:]
    models = [name for name in ("miniature", "small", "full") if name in chosen or not set(chosen) - set(METHODS)]
    only = [name for name in METHODS if name in chosen]
    known = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            place = paths.MINIATURE if model == "miniature" else random_folder(Path(folder) / "base", model == "small")
            for method in only or (IN_FULL_SIZE if model == "full" else METHODS):
                with tempfile.TemporaryDirectory() as files:
                    known.setdefault(model, {})[method] = cells(model, place, method, Path(files))
                out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    print(markdown(known))


if __name__ == "__main__":
    main()
