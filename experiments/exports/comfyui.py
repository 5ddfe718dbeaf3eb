"""ComfyUI's own reader on our LoRA files: python experiments/exports/comfyui.py FORGE RESULTS.json

FORGE is a checkout of github.com/lllyasviel/stable-diffusion-webui-forge, which contains ComfyUI's code for LoRA files
(packages_3rdparty/comfyui_lora_collection) and its own for merging them. That code runs here without the rest: it lists
the names that it knows for a model, takes the tensors of a file by these names, and adds them to the model's weights in
the original layout. The result is compared with the weights of the run, written in the same layout.

Models are small and have random weights: Stable Diffusion 1.x (file: kohya), Stable Diffusion 3 and FLUX (file: lora).
Forge leaves Stable Diffusion 3's names out; ComfyUI builds them from the same list as FLUX's.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor

import realera
from realera.backbones import pipelines

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2] / "tests")]
from table import FEW, METHODS, opened, random_folder

from folders import TRANSFORMERS

Weights = dict[str, Tensor]
SMALL = {"overrides": ("backbone.sampler.height=64", "backbone.sampler.width=64", "backbone.t5_length=24")}
# two steps change a LoRA little, so that the rate is high; the closed form is the larger part
TRAINED = {"method.latents.images": 2, "method.latents.chunk": 2, "align.steps": 2, "align.lr": 1e-2}
ON_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "uce": {},
    "valera": {},
    "realera": {**TRAINED, "method.neighbours": None},
}
WIDE = {"num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 12, "caption_projection_dim": 192}
UNET = {  # as ComfyUI describes Stable Diffusion 1.x
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 9 + [0] * 3,
}


class Client:
    """ComfyUI's reader and Forge's merge."""

    def __init__(self, forge: Path) -> None:
        sys.path.insert(0, str(forge))
        package = ModuleType("backend")
        package.__path__ = [str(forge / "backend")]
        sys.modules["backend"] = package
        for name in (
            "memory_management",
            "utils",
            "operations",
        ):  # one call of all the rest
            sys.modules[f"backend.{name}"] = part = ModuleType(name)
            part.__dict__["cast_to_device"] = lambda tensor, device, dtype: tensor.to(device=device, dtype=dtype)
            setattr(package, name, part)
        self.names: Any = importlib.import_module("packages_3rdparty.comfyui_lora_collection.utils")
        self.files: Any = importlib.import_module("packages_3rdparty.comfyui_lora_collection.lora")
        self.merge = importlib.import_module("backend.patcher.lora").merge_lora_to_weight

    def layout(self, kind: str, config: Any) -> dict[str, Any]:
        """{diffusers' name: its place in the original layout} of a transformer."""
        if kind == "flux":
            width = config.num_attention_heads * config.attention_head_dim
            numbers = {
                "depth": config.num_layers,
                "depth_single_blocks": config.num_single_layers,
                "hidden_size": width,
            }
            found: dict[str, Any] = self.names.flux_to_diffusers(numbers, output_prefix="diffusion_model.")
        else:
            found = self.names.mmdit_to_diffusers({"depth": config.num_layers}, output_prefix="diffusion_model.")
        return found

    def merged(self, base: Weights, file: Weights, known: Mapping[str, Any]) -> tuple[Weights, list[str]]:
        """The weights with the file added at strength 1, and the file's keys that were not read."""
        patches, left = self.files.load_lora(file, known)
        merged = dict(base)
        for place, patch in patches.items():
            name, offset, function = (*([place] if isinstance(place, str) else place), None, None)[:3]
            merged[name] = self.merge([(1.0, patch, 1.0, offset, function)], merged[name].clone(), key=name)
        return merged, sorted(left)


def in_layout(weights: Weights, layout: Mapping[str, Any]) -> Weights:
    """A transformer's weights in the original layout: q, k and v of a layer are one matrix there."""
    found: Weights = {}
    for name, place in layout.items():
        if name not in weights:
            continue
        to, offset, function = (*([place] if isinstance(place, str) else place), None, None)[:3]
        value = weights[name] if function is None else function(weights[name])
        if offset is None:
            found[to] = value.clone()
            continue
        rows = max(part[1][1] + part[1][2] for part in layout.values() if isinstance(part, tuple) and part[0] == to)
        whole = found.setdefault(to, torch.zeros(rows, *value.shape[1:]))
        whole.narrow(*offset).copy_(value)
    return found


def compared(client: Client, base: Weights, run: Weights, file: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    tensors = load_file(file)
    merged, unread = client.merged(base, tensors, known)
    moved = {name for name in run if not torch.equal(run[name], base[name])}
    far = sum(float((merged[name] - run[name]).square().sum()) for name in run) ** 0.5
    whole = sum(float((base[name] - run[name]).square().sum()) for name in moved) ** 0.5
    return {
        "tensors in the file": len(tensors),
        "not read": unread,
        "weights that the erasure changed": len(moved),
        "changed by the client alone": sorted(
            n for n in merged if n not in moved and not torch.equal(merged[n], base[n])
        ),
        "distance to the run, of the erasure's size": far / whole,
    }


def transformer(client: Client, kind: str, method: str, place: Path) -> dict[str, Any]:
    folder = TRANSFORMERS[kind](place / "base")
    if kind == "sd3":  # ComfyUI takes the width for 64 times the number of blocks, as in all published sizes
        plan = {**SD3Transformer2DModel.load_config(folder / "transformer"), **WIDE}
        SD3Transformer2DModel.from_config(plan).save_pretrained(folder / "transformer")
    pipe: Any = pipelines.opened(folder)
    layout = client.layout(kind, pipe.transformer.config)
    base = in_layout(pipe.transformer.state_dict(), layout)
    settings: Any = {**SMALL, **ON_TRANSFORMERS[method]}
    erased = realera.erase(pipe, "cat", anchor="field", method=method, progress=False, **settings)
    run = in_layout(erased.pipe.transformer.state_dict(), layout)
    file = Path(erased.export("lora", place / "lora", error=1e-6, verify=0).path)
    known = {f"transformer.{n.removesuffix('.weight')}": to for n, to in layout.items() if n.endswith(".weight")}
    return compared(client, base, run, file, known)


def unet(client: Client, method: str, place: Path) -> dict[str, Any]:
    folder = random_folder(place / "base", small=True)
    settings: Any = {f"method.{key}": value for key, value in FEW.get(method, {}).items()}
    settings |= {"task": "object", "anchor": "sky", "backbone.sampler.steps": 2, "progress": False}
    pipe = opened(folder)
    layout = {n: f"diffusion_model.{to}" for n, to in client.names.unet_to_diffusers(UNET).items()}
    base = in_layout(pipe.unet.state_dict(), layout)
    erased = realera.erase(pipe, "airplane", method=method, **settings)
    run = in_layout(erased.pipe.unet.state_dict(), layout)
    file = Path(erased.export("kohya", place / "kohya", error=1e-6, verify=0).path)
    model = SimpleNamespace(
        state_dict=lambda: base,
        diffusion_model=SimpleNamespace(config=UNET),
        config=SimpleNamespace(huggingface_repo="stable-diffusion-v1-5"),
    )
    return compared(client, base, run, file, client.files.model_lora_keys_unet(model, {})[1])


def main(forge: str, results: str) -> None:
    for quiet in (diffusers.utils.logging, transformers.utils.logging):
        quiet.disable_progress_bar()
    client = Client(Path(forge))
    told = subprocess.run(["git", "-C", forge, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    found: dict[str, Any] = {"forge": told.stdout.strip() or None}
    for kind, methods in {"sd3": ON_TRANSFORMERS, "flux": ON_TRANSFORMERS, "sd1": METHODS}.items():
        for method in methods:
            if method == "sld":  # no weights
                continue
            with tempfile.TemporaryDirectory() as folder:
                place = Path(folder)
                cell = unet(client, method, place) if kind == "sd1" else transformer(client, kind, method, place)
            found.setdefault(kind, {})[method] = cell
            print(kind, method, {name: len(v) if isinstance(v, list) else v for name, v in cell.items()}, flush=True)
    Path(results).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
