"""Exports an erasure for other programs: a pipeline folder, a single checkpoint, a LoRA file. Uses only tensors and
files, no models.

Layer names are the module paths of the denoiser, a U-Net or a transformer
("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "context_embedder"); those of a text encoder begin with
its folder ("text_encoder.encoder.layers.0.mlp.fc1").
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from realera.backbones import folder as checkpoint
from realera.backbones import kinds, original_layout
from realera.contracts import UserError
from realera.files import finite, plain_data
from realera.files.headers import read_json
from realera.system import disk

EDIT, LORA, ERASER = "edit.", "lora.", "eraser."
TEXT = "text_encoder"  # how the folder of a text encoder begins
SAFETY_CHECKER = ["stable_diffusion", "StableDiffusionSafetyChecker"]  # a class of diffusers, in model_index.json
MOST = 256  # the largest rank that "auto" writes: the file would approach the size of the model
Lora = dict[str, tuple[Tensor, Tensor]]  # {layer: (down (r, in, ...), up (out, r, ...))}, W + up @ down


def refuse_erasers(erased: Mapping[str, Tensor]) -> None:
    """Raises UserError for erasers, which are no weights of a layer that other programs know."""
    if count := sum(key.endswith(".down.bias") for key in erased if key.startswith(ERASER)):
        raise UserError(
            f"this run's erasure is {count} erasers behind the U-Net's cross-attention. They are not linear, so no "
            "file for other programs can hold them: draw with realera (python -m realera.generate, realera.load)."
        )


def of_part(erased: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The entries of one part of a checkpoint, named as the part names its weights, without "text_model."."""
    if part not in kinds.DENOISERS and not part.startswith(TEXT):
        return {}
    head = f"{part}." if part.startswith(TEXT) else ""
    found = {}
    for key, value in erased.items():
        kind, _, name = key.partition(".")
        if (f"{name.partition('.')[0]}." if name.startswith(TEXT) else "") == head:
            found[f"{kind}.{name.removeprefix(head)}"] = value
    return found


def adapters(erased: Mapping[str, Tensor]) -> Lora:
    """The trained adapters of an erased.safetensors, alpha / rank folded into `up`."""
    names = dict.fromkeys(key[len(LORA) :].rpartition(".")[0] for key in erased if key.startswith(LORA))
    found: Lora = {}
    for name in names:
        down, up = erased[f"{LORA}{name}.down"], erased[f"{LORA}{name}.up"]
        alpha = erased.get(f"{LORA}{name}.alpha")
        scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
        found[name] = (down, up * scale)
    return found


def touched(erased: Mapping[str, Tensor]) -> list[str]:
    """The names of all weights that an erasure of one part changes."""
    edited = [key[len(EDIT) :] for key in erased if key.startswith(EDIT)]
    return list(dict.fromkeys([*edited, *(f"{layer}.weight" for layer in adapters(erased))]))


def changes(base: Mapping[str, Tensor], erased: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(weight name, erased - original) of every changed weight, float64, adapters included, biases too. One at a time:
    all of them together would be twice the size of the model."""
    lora = adapters(erased)
    for name in touched(erased):
        original = base[name].double()
        edit = erased.get(EDIT + name)
        change = torch.zeros_like(original) if edit is None else edit.double() - original
        if (layer := name.removesuffix(".weight")) in lora and name != layer:
            down, up = lora[layer]
            change += (up.double().flatten(1) @ down.double().flatten(1)).reshape(original.shape)
        yield name, change


def merged(
    base: Mapping[str, Tensor], erased: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The whole state of a part with edits and adapters merged. erased: of this part. dtype: of all floating-point
    weights; None = each weight keeps its own. Raises UserError for a weight that is not finite in that dtype."""
    state = dict(base)
    for name, change in changes(base, erased):
        state[name] = (base[name].double() + change).to(base[name].dtype if dtype is None else dtype)
    return cast(state, dtype)


def cast(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The state in another dtype; None = as it is. Tensors of whole numbers stay. Raises UserError for an overflow."""
    made = {
        name: value.to(dtype) if dtype is not None and value.is_floating_point() else value
        for name, value in state.items()
    }
    finite.refuse(made, "The erased model cannot be exported in this precision: its weight", "give dtype=bfloat16")
    return made


def singular(change: Tensor) -> tuple[Tensor, Tensor]:
    """(singular values descending, left singular vectors as columns) of a weight's change, flattened to (out, -1).

    They come from the smaller of the two Gram matrices, in float64, which is much faster than a decomposition of a
    convolution's weight; values below 1e-7 of the largest are noise and become 0."""
    matrix = change.flatten(1).double()
    wide = matrix.shape[0] <= matrix.shape[1]
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    values, vectors = squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    values = torch.where(values > 1e-7 * values[:1], values, 0)
    if not wide:
        known = values > 0
        vectors = (matrix @ vectors[:, known]) / values[known]
        values = values[known]
    return values, vectors


def needed_rank(values: Tensor, error: float) -> int:
    """The smallest rank whose relative error (Frobenius) is at most `error`, at least 1."""
    tails = values.square().flip(0).cumsum(0).flip(0)  # tails[r]: the squares from rank r on
    return max(1, int((tails > error**2 * values.square().sum()).sum()))


@dataclass(frozen=True)
class Approximated:
    """A LoRA and its distance to the whole change. lora: without layers that did not change. error: ||change - lora||
    / ||change|| over all weights (Frobenius), left_out among them. left_out: {name: share of the squared change} of the
    changed biases and norms, which a LoRA cannot hold. ranks: {layer: rank}."""

    lora: Lora
    error: float
    left_out: dict[str, float]

    @property
    def ranks(self) -> dict[str, int]:
        return {name: down.shape[0] for name, (down, _) in self.lora.items()}


def low_rank(changed: Iterable[tuple[str, Tensor]], rank: int | None, error: float = 0.01) -> Approximated:
    """Each change truncated to its largest singular values. changed: (weight name, change). rank: of all layers; None =
    for each layer the smallest whose relative error is at most `error`. Singular values are split evenly between `up`
    and `down`."""
    lora: Lora = {}
    lost, whole = 0.0, 0.0
    outside: dict[str, float] = {}
    for name, change in changed:
        square = float(change.square().sum())
        whole += square
        if square == 0:
            continue
        if change.dim() < 2 or not name.endswith(".weight"):
            outside[name] = square
            lost += square
            continue
        values, left = singular(change)
        kept = min(needed_rank(values, error) if rank is None else rank, int((values > 0).sum()))
        root = values[:kept].sqrt()
        up = left[:, :kept] * root
        down = (left[:, :kept].T @ change.flatten(1)) / root[:, None]
        lost += float((change.flatten(1) - up @ down).square().sum())
        if change.dim() > 2:  # a convolution: the kernel goes to `down`, `up` is 1 x 1
            down, up = down.reshape(-1, *change.shape[1:]), up[:, :, None, None]
        lora[name.removesuffix(".weight")] = (down.float().contiguous(), up.float().contiguous())
    shares = {name: square / whole for name, square in outside.items()}
    return Approximated(lora, (lost / whole) ** 0.5 if whole else 0.0, shares)


def lora_of(
    base: Mapping[str, Tensor], erased: Mapping[str, Tensor], rank: int | Literal["auto"] | None, error: float = 0.01
) -> Approximated:
    """The change as a LoRA. rank: "auto" = the adapters as trained if nothing else was changed, else for each layer the
    smallest rank whose error is at most `error`; a number = the whole change truncated to it; None = the adapters as
    trained.

    Raises:
        UserError: nothing was changed, or biases and norms alone; weights were changed and rank is None, or "auto"
            needs more than `MOST`.
    """
    changed = {name: change.dim() for name, change in changes(base, erased) if bool(change.any())}
    if not changed:
        raise UserError("this run changed nothing, so there is no LoRA to export.")
    if max(changed.values()) < 2:
        raise UserError("this run changed biases and norms alone, which a LoRA cannot hold: give to=diffusers.")
    if not any(key.startswith(EDIT) for key in erased) and rank in (None, "auto"):
        return Approximated(adapters(erased), 0.0, {})
    if isinstance(rank, int):
        return low_rank(changes(base, erased), rank)
    ranks = {
        name: needed_rank(singular(change)[0], error)
        for name, change in changes(base, erased)
        if change.dim() > 1 and name in changed
    }
    most, where = max((own, name) for name, own in ranks.items())
    if rank is None:
        raise UserError(
            f"this run changed the weights themselves, not by a LoRA alone: rank=auto gives a LoRA of rank {most} with "
            f"an error of at most {error:.1%} in each layer, to=diffusers the exact weights."
        )
    if most > MOST:
        raise UserError(
            f"a LoRA with an error of at most {error:.1%} in each layer needs rank {most} ({where}): give "
            "to=diffusers, which is exact, a larger error=, or a rank= whose error you accept (it is "
            "printed)."
        )
    return low_rank(changes(base, erased), None, error)


def padded(lora: Lora) -> Lora:
    """The LoRA with one rank in all layers, by zeros: diffusers 0.42 takes one alpha for all, even from a kohya file in
    which each layer has its own."""
    rank = max(down.shape[0] for down, _ in lora.values())
    made: Lora = {}
    for name, (down, up) in lora.items():
        lacking = rank - down.shape[0]
        rows = torch.cat([down, down.new_zeros(lacking, *down.shape[1:])])
        made[name] = (rows, torch.cat([up, up.new_zeros(up.shape[0], lacking, *up.shape[2:])], dim=1))
    return made


def lora_names(weights: Iterable[str], style: str, kind: original_layout.Kind | None) -> dict[str, str]:
    """{layer: its name in a LoRA file} of a denoiser with these weights. style: "lora" = diffusers' names, "kohya" =
    those of A1111 and ComfyUI. kind: as `kind_of` says.

    Of a transformer ComfyUI reads diffusers' names, so there is no other style. Stable Diffusion XL has the original
    layout's names in a kohya file, as sd-scripts writes it: A1111 reads diffusers' names there too, but not of all
    layers.
    """
    weights = list(weights)
    layers = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    if kind is None or style == "lora":
        return {layer: f"{'transformer' if kind is None else 'unet'}.{layer}" for layer in layers}
    own = {layer: layer for layer in layers}
    if kind == "xl":
        original = original_layout.unet_names(weights)
        own = {layer: original[f"{layer}.weight"].removeprefix(original_layout.UNET) for layer in layers}
        own = {layer: name.removesuffix(".weight") for layer, name in own.items()}
    return {layer: f"lora_unet_{name.replace('.', '_')}" for layer, name in own.items()}


def save_lora(
    lora: Lora,
    file: Path,
    style: str,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    names: Mapping[str, str],
) -> None:
    """Writes a LoRA file. style: "lora" = diffusers' keys (load_lora_weights), "kohya" = the keys of A1111, ComfyUI.
    names: of `lora_names`."""
    state: dict[str, Tensor] = {}
    for layer, (down, up) in padded(lora).items():
        name = names[layer]
        if style == "lora":
            state |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        else:
            state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            state[f"{name}.alpha"] = torch.tensor(float(down.shape[0]))  # alpha = rank: a scale of 1
    with disk.atomic(file) as beside:
        save_file(
            {key: value.contiguous() for key, value in cast(state, dtype).items()},
            beside,
            {"format": "pt", **metadata},
        )


def read_lora(file: Path, style: str, names: Mapping[str, str]) -> dict[str, Tensor]:
    """{weight name: change} of a file that `save_lora` wrote, float64. names: of `lora_names`."""
    state = load_file(file)
    below, above = ("lora_A", "lora_B") if style == "lora" else ("lora_down", "lora_up")
    found: dict[str, Tensor] = {}
    for layer, name in names.items():
        if (down := state.get(f"{name}.{below}.weight")) is not None:
            product = state[f"{name}.{above}.weight"].double().flatten(1) @ down.double().flatten(1)
            found[f"{layer}.weight"] = product.reshape(-1, *down.shape[1:])
    return found


def base_denoiser(source: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The original denoiser's state, from a diffusers folder. names: only these weights. Raises UserError if a weight
    is not finite."""
    part = kinds.denoiser(source)
    state = part_state(source, part, names)
    what = f"The {kinds.DENOISERS[part]} in {str(source)!r}"
    finite.refuse(state, f"{what} cannot be exported: its weight", "copy or download it again")
    return state


def erased_part(source: Path, part: str, erased: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The state of a part, erased if it is a part that was changed, by the names of the part's files."""
    own = of_part(erased, part)
    if part in kinds.DENOISERS:
        return merged(base_denoiser(source), own, dtype)
    base = part_state(source, part)
    if not own:
        return cast(base, dtype)
    files = {name.removeprefix("text_model."): name for name in base}
    whole = merged({plain: base[name] for plain, name in files.items()}, own, dtype)
    return {name: whole[plain] for plain, name in files.items()}


def part_state(source: Path, part: str, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The weights of one part of a diffusers folder. names: only these, because a transformer may have 24 GB."""
    state: dict[str, Tensor] = {}
    for file in checkpoint.part_files(source, part)[1]:
        if names is None:
            state |= load_file(file)
            continue
        with safe_open(file, "pt") as reader:
            state |= {name: reader.get_tensor(name) for name in reader.keys() if name in names}  # noqa: SIM118
    return state


def save_checkpoint(
    source: Path, erased: Mapping[str, Tensor], file: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]
) -> None:
    """Writes one file in the original layout, with U-Net, autoencoder and text encoders. dtype: None = each weight
    keeps its own. Raises UserError for a U-Net that the layout has no names for."""
    parts = {part: erased_part(source, part, erased, dtype) for part in checkpoint.models(source)}
    kind = kind_of(source)
    assert kind is not None, "a transformer has no such layout"
    state = original_layout.from_diffusers(parts, kind)
    if is_v_prediction(source) and kind == "xl":
        state["v_pred"] = torch.zeros(0)  # the mark by which ComfyUI knows such a model
    with disk.atomic(file) as beside:
        made = {name: value.contiguous() for name, value in cast(state, dtype).items()}
        save_file(made, beside, {"format": "pt", **metadata})


def kind_of(source: Path) -> original_layout.Kind | None:
    """The original code that the folder of a U-Net belongs to; None = a transformer's. Stable Diffusion 2 has
    OpenCLIP's text encoder, whose activation is an exact GELU."""
    if kinds.of(source) != kinds.UNET:
        return None
    if checkpoint.is_xl(source):
        return "xl"
    return "v2" if read_json(source / "text_encoder" / "config.json").get("hidden_act") == "gelu" else "v1"


def is_v_prediction(source: Path) -> bool:
    settings = read_json(source / "scheduler" / "scheduler_config.json")
    return settings.get("prediction_type") == "v_prediction"


def save_pipeline(
    source: Path,
    erased: Mapping[str, Tensor],
    out: Path,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    shard_size: str = "10GB",
    texts: Mapping[str, str] | None = None,
) -> None:
    """Writes a diffusers folder like `source` with the erased denoiser and text encoders, completely or not at all.

    dtype: of all networks; None = each weight keeps its own. variant: as in from_pretrained(variant="fp16"); None = the
    names without one. texts: {name: content} of further files. A safety checker and other extras are not copied.
    """
    models = checkpoint.models(source)
    with disk.atomic(out) as beside:
        beside.mkdir()
        for part in (*models, *checkpoint.tokenizers(source), "scheduler"):
            (beside / part).mkdir()
            for file in _settings_of(source, part):
                shutil.copyfile(file, beside / part / file.name)
            if part.startswith("text_encoder"):
                _promise_float32(beside / part / "config.json")
            if part in models:
                state = erased_part(source, part, erased, dtype)
                _write_weights(state, beside / part, models[part], variant, shard_size)
        written = {"model_index.json": plain_data.json_text(_index(source), indent=2), **(texts or {})}
        for name, text in written.items():
            (beside / name).write_text(text, encoding="utf-8")


def save_changed(
    source: Path, change: Callable[[str, Tensor], Tensor], out: Path, texts: Mapping[str, str] | None = None
) -> None:
    """Writes a diffusers folder like `source`, completely or not at all, whose denoiser has the weights change(name,
    W).

    Every weight keeps its dtype, and the denoiser its shards, of which one is in memory at a time. The other parts are
    copied, also a safety checker that is stored as safetensors, under the names that from_pretrained looks for without
    a variant. texts: {name: content} of further files. Raises UserError if an original or a changed weight is not
    finite.
    """
    extras = _extras(source)
    denoiser = kinds.denoiser(source)
    variant, shards = checkpoint.part_files(source, denoiser)
    stem, mark = checkpoint.models(source)[denoiser], f".{variant}" if variant else ""
    whole = shards[0].name == f"{stem}{mark}.safetensors"
    with disk.atomic(out) as beside:
        beside.mkdir()
        for part in (*checkpoint.models(source), *checkpoint.tokenizers(source), "scheduler", *extras):
            (beside / part).mkdir()
            for file in extras[part] if part in extras else _files_to_copy(source, part):
                shutil.copyfile(file, beside / part / file.name.replace(".fp16.", "."))
            if part.startswith("text_encoder"):
                _promise_float32(beside / part / "config.json")
        for shard in shards:
            state = _changed(source, load_file(shard), change)
            save_file(state, beside / denoiser / (f"{stem}.safetensors" if whole else shard.name), {"format": "pt"})
        if not whole:
            index = f"{stem}.safetensors.index"
            shutil.copyfile(source / denoiser / f"{index}{mark}.json", beside / denoiser / f"{index}.json")
        written = {"model_index.json": plain_data.json_text(_index(source, extras), indent=2), **(texts or {})}
        for name, text in written.items():
            (beside / name).write_text(text, encoding="utf-8")


def _changed(source: Path, state: Mapping[str, Tensor], change: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    word = kinds.DENOISERS[kinds.denoiser(source)]
    finite.refuse(state, f"The {word} in {str(source)!r} cannot be changed: its weight", "copy or download it again")
    changed = {name: change(name, weight).to(weight.dtype) for name, weight in state.items()}
    remedy = "use a smaller weight, or a copy of the checkpoint in float32 or bfloat16"
    finite.refuse(changed, f"The changed {word} of {str(source)!r} cannot be saved: its weight", remedy)
    return {name: weight.contiguous() for name, weight in changed.items()}


def _extras(source: Path) -> dict[str, list[Path]]:
    """{part: its files} of diffusers' own safety checker and the image processor that it needs, if the folder has both
    in formats that run no code."""
    checker = [source / "safety_checker" / "config.json", source / "safety_checker" / "model.safetensors"]
    half = source / "safety_checker" / "model.fp16.safetensors"
    checker[1] = checker[1] if checker[1].is_file() or not half.is_file() else half
    processor = [source / "feature_extractor" / "preprocessor_config.json"]
    index = source / "model_index.json"
    named = read_json(index).get("safety_checker") if index.is_file() else None
    if named != SAFETY_CHECKER or not all(file.is_file() for file in (*checker, *processor)):
        return {}
    return {"safety_checker": checker, "feature_extractor": processor}


def _write_weights(state: Mapping[str, Tensor], place: Path, stem: str, variant: str | None, shard_size: str) -> None:
    """One file, or shards with an index, by the names that from_pretrained looks for."""
    mark = f".{variant}" if variant else ""
    plan = split_torch_state_dict_into_shards(
        dict(state), filename_pattern=f"{stem}{mark}{{suffix}}.safetensors", max_shard_size=shard_size
    )
    for name, keys in plan.filename_to_tensors.items():
        save_file({key: state[key].contiguous() for key in keys}, place / name, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        file = place / f"{stem}.safetensors.index{mark}.json"
        file.write_text(plain_data.json_text(index, indent=2), encoding="utf-8")


def _promise_float32(file: Path) -> None:
    """transformers loads a text encoder in its config's dtype, and diffusers loads the U-Net in float32: without
    torch_dtype both must agree."""
    settings = plain_data.read_json(file)
    settings.pop("torch_dtype", None)
    file.write_text(plain_data.json_text({**settings, "dtype": "float32"}, indent=2), encoding="utf-8")


def _settings_of(source: Path, part: str) -> list[Path]:
    """The files of one part that are not weights."""
    settings = [file for file in (source / part).iterdir() if file.suffix in (".json", ".txt", ".model")]
    return [file for file in settings if ".safetensors.index." not in file.name]


def _files_to_copy(source: Path, part: str) -> list[Path]:
    """The files of one part that a pipeline needs: its settings, and its weights except the denoiser's, which are
    written anew. Shards keep their names, because the index lists them."""
    kept = _settings_of(source, part)
    stem = checkpoint.models(source).get(part)
    if stem is None or part in kinds.DENOISERS:
        return kept
    variant, weights = checkpoint.part_files(source, part)
    mark = f".{variant}" if variant else ""
    if weights[0].name != f"{stem}{mark}.safetensors":
        kept.append(source / part / f"{stem}.safetensors.index{mark}.json")
    return [*kept, *weights]


def _index(source: Path, extras: Collection[str] = ()) -> dict[str, object]:
    """The folder's index, with only the copied parts. extras: copied parts besides the usual ones."""
    networks, tokenizers = checkpoint.models(source), checkpoint.tokenizers(source)
    parts = {*networks, *tokenizers, "scheduler", *extras}
    file = source / "model_index.json"
    index = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    # a class of another library is left out: loading the exported folder would run its code
    known = {
        key: value
        for key, value in index.items()
        if not isinstance(value, list)
        or value[:1] in (["diffusers"], ["transformers"], [None])
        or (key in extras and value == SAFETY_CHECKER)
    }
    if not isinstance(index.get("_class_name", ""), str):
        known.pop("_class_name", None)
    kept = {
        key: [None, None] if isinstance(value, list) and key not in parts else value for key, value in known.items()
    }
    if (kind := kinds.of(source)) != kinds.UNET:
        return {**_transformer_index(kind, networks, tokenizers), **kept}
    standard: dict[str, object] = {
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        **{name: ["transformers", "CLIPTokenizer"] for name in tokenizers},
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if "text_encoder_2" in networks:
        standard["_class_name"] = "StableDiffusionXLPipeline"
        standard["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        return {**standard, **kept}
    checked = {} if extras else {"requires_safety_checker": False}
    return {**standard, "safety_checker": [None, None], **kept, **checked}


def _transformer_index(kind: kinds.Kind, networks: Collection[str], tokenizers: Collection[str]) -> dict[str, object]:
    """The index of a Stable Diffusion 3 or FLUX with these parts."""
    flux = kind == kinds.FLUX
    clip = "CLIPTextModel" if flux else "CLIPTextModelWithProjection"
    forms = {part: kinds.form(kind, part) for part in networks}
    made: dict[str, object] = {"_class_name": "FluxPipeline" if flux else "StableDiffusion3Pipeline"}
    for part in ("text_encoder_3", "tokenizer_3") if not flux else ():
        made[part] = [None, None]  # T5 may be left out
    for part in networks:
        if part.startswith(TEXT):
            made[part] = ["transformers", "T5EncoderModel" if forms[part] == kinds.T5 else clip]
    for part in tokenizers:
        t5 = forms[part.replace("tokenizer", TEXT)] == kinds.T5
        made[part] = ["transformers", "T5TokenizerFast" if t5 else "CLIPTokenizer"]
    return {
        **made,
        "transformer": ["diffusers", "FluxTransformer2DModel" if flux else "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
