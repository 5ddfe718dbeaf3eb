"""A diffusers pipeline in memory as a backbone. Its U-Net is edited in place; nothing is read from disk."""

from __future__ import annotations

import copy
import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, T5EncoderModel

from realera import paths
from realera.backbones import adapters, erasers, folder, kinds, text_marks
from realera.backbones.common import DiffusersBackbone
from realera.backbones.denoiser import DTYPES, Denoiser
from realera.backbones.loading import Parts, TextFigures, quiet
from realera.backbones.unet import UNetBackbone
from realera.contracts import Sampler, UserError
from realera.files import plain_data
from realera.files.headers import read_json
from realera.system import disk

log = logging.getLogger(__name__)
IN_MEMORY = "in-memory/pipeline"  # replaces the hub id if the weights are not those of a checkpoint on disk
# The settings of a scheduler that belong to the weights. A sampler with fewer steps does not change them.
SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
FLOW_SCHEDULE = ("shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
PEEK = 16  # numbers read at each end of a tensor for the fingerprint


class InMemory(DiffusersBackbone):
    """The part of a backbone of a pipeline's own components that does not depend on its kind. A subclass sets `pipe`,
    `networks` = {part: network} as in a checkpoint's folder, `network_part` = the denoiser's part, and calls
    `_describe`.

    The denoiser and T5 keep their dtype. All work is done inside `in_use`, where CLIP and the autoencoder are float32;
    afterwards they are in their own dtype again, bit for bit.
    """

    pipe: DiffusionPipeline
    networks: Mapping[str, nn.Module]
    network_part: str
    max_length: int
    also: str = ""  # of `folder.fingerprint`
    without: str = ""

    def _describe(self, tokenizers: Sequence[PreTrainedTokenizerBase], schedule: Mapping[str, Any]) -> None:
        self._marks = {
            only: _marks_of(self.networks, tokenizers, schedule, self.max_length, only) for only in (False, True)
        }

    @property
    def fingerprint(self) -> str:
        """A hash of both ends of every tensor of the pipeline's original weights; any training changes them."""
        return self._marks[False]

    @property
    def _text_as_loaded(self) -> str:
        return self._marks[True]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """All work on the pipeline is done inside this context. At the end every module has its device, dtype, training
        mode and attention processors again, and every parameter its requires_grad."""
        modules = list(self.networks.values())
        kept = [(m, next(m.parameters()).device, {n: c.training for n, c in m.named_modules()}) for m in modules]
        graded = {id(p): (p, p.requires_grad) for m in modules for p in m.parameters()}
        rounded = [m for m in modules if m is not self.denoiser and not isinstance(m, T5EncoderModel)]
        dtypes = [{n: t.dtype for n, t in _tensors(m)} for m in rounded]
        network: Any = self.denoiser
        processors = dict(network.attn_processors)
        for module in modules:
            module.eval().requires_grad_(False)
        for module in rounded:
            module.float()
        if isinstance(self._denoise, Denoiser):
            self._denoise.forget_attention()
        self._forget_text()
        try:
            yield
        finally:
            for module, own in zip(rounded, dtypes):
                for name, tensor in _tensors(module):
                    tensor.data = tensor.data.to(own.get(name, tensor.dtype))
            for module, device, modes in kept:
                module.to(device)
                for name, child in module.named_modules():
                    child.training = modes.get(name, False)
            for module in modules:  # what was added, such as erasers, is not to be trained by the caller
                for parameter in module.parameters():
                    parameter.requires_grad_(graded.get(id(parameter), (parameter, False))[1])
            if set(network.attn_processors) == set(processors):
                network.set_attn_processor(processors)
            self._forget_text()

    def checkpoint(self) -> tuple[str, str] | None:
        """(hub id or folder, its fingerprint) of the files with the pipeline's original weights; None if these files
        are not on this disk or have other weights."""
        place = files_of(self.pipe, self.network_part)
        if place is None or not self._weights_equal(place[1]):
            return None
        return place[0], folder.fingerprint(place[1], self.max_length, also=self.also, without=self.without)

    def with_own_scheduler(self, source: Path, place: Path) -> Path:
        """A folder like `source`, the files of this pipeline, with the pipeline's scheduler as it is now. It is
        `source` itself if that has the same one, else the new folder `place` with links to the other parts."""
        scheduler = self.pipe.scheduler
        stored = read_json(source / "scheduler" / "scheduler_config.json")
        if not type(scheduler).__module__.startswith("diffusers."):
            log.warning(
                "%s is no scheduler of diffusers: the export has the checkpoint's own", type(scheduler).__name__
            )
            return source
        if stored.get("_class_name") == type(scheduler).__name__:
            as_stored = type(scheduler).from_config(stored).config
            if all(as_stored.get(key) == value for key, value in scheduler.config.items() if not key.startswith("_")):
                return source
        place.mkdir()
        for part in source.iterdir():
            if part.name not in ("scheduler", "model_index.json"):
                (place / part.name).symlink_to(part.resolve(), target_is_directory=part.is_dir())
        scheduler.save_pretrained(place / "scheduler")
        index = source / "model_index.json"
        settings = plain_data.read_json(index) if index.is_file() else {}
        settings = {**settings, "scheduler": ["diffusers", type(scheduler).__name__]}
        disk.write_text(place / "model_index.json", plain_data.json_text(settings))
        return place

    def _weights_equal(self, place: Path) -> bool:
        first = {**self._base.first, **self._changed_text.base.first}
        for part, module in self.networks.items():
            head = f"{part}." if part.startswith("text_encoder") else ""
            named = {_plain(n): p for n, p in module.state_dict().items() if f".{erasers.CHILD}." not in n}
            held = named if part == "vae" else {n: first.get(head + n, p) for n, p in named.items()}
            seen = set()
            for file in folder.part_files(place, part)[1]:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (not a mapping)
                        mine = held.get(_plain(name))
                        seen.add(_plain(name))
                        if mine is not None and not torch.equal(opened.get_tensor(name).to(mine.dtype), mine.cpu()):
                            return False
            if {name for name in held if not name.endswith(("position_ids", "embed_tokens.weight"))} - seen:
                return False
        return True


class PipelineBackbone(InMemory, UNetBackbone):
    """`contracts.Backbone` for the components of a Stable Diffusion 1.x, 2.x or XL pipeline. Raises UserError for
    another pipeline, and for one that lacks components."""

    network_part = "unet"

    def __init__(self, pipe: DiffusionPipeline, name: str, sampler: Sampler, text: TextFigures | None = None) -> None:
        self.pipe = pipe
        self.vae_slicing = False
        self.parts = parts_of(pipe)
        self.networks = _modules(self.parts)
        self._init_from_parts(self.parts, name, sampler, text)
        self._describe(self.parts.tokenizers, self.parts.scheduler_config)

    def text_marks(self) -> dict[str, str]:
        return text_marks.of_parts(self.parts)


def miniature() -> StableDiffusionPipeline:
    """The model that ships with the package, as a diffusers pipeline: 32 x 32 pixels, float32, on the CPU."""
    bare = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return _loaded(StableDiffusionPipeline, paths.MINIATURE, **bare)


def opened(pretrained: str | Path) -> DiffusionPipeline:
    """Loads the pipeline of a folder, single file or hub id, in float32 on the CPU. Raises UserError as
    `folder.locate`."""
    place = folder.locate(str(pretrained))
    pipe = _loaded(DiffusionPipeline, place, **kinds.left_out(place))
    if (file := paths.file_of(pretrained)) is not None:  # the cache may be cleared, so the run names the file
        pipe.register_to_config(_name_or_path=str(file))
    return pipe


def _loaded(kind: type[DiffusionPipeline], place: Path, **more: Any) -> Any:
    shown = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers 0.42 renames the keyword
            return kind.from_pretrained(place, torch_dtype=torch.float32, local_files_only=True, **more)
    finally:
        if shown:
            diffusers_logging.enable_progress_bar()


def kind_of(parts: Parts) -> str:
    """The name of the conf/backbone yaml to use for a pipeline: mini, sd14, sd21 or sdxl."""
    if parts.xl:
        return "sdxl"
    width = int(parts.unet.config.cross_attention_dim)
    if width == _width(paths.MINIATURE) and _same_text(parts.text_models[0]):
        return "mini"
    return "sd21" if width == 1024 else "sd14"


def settings_of(pipe: DiffusionPipeline, parts: Parts) -> dict[str, Any]:
    """The backbone settings that come from the pipeline: pretrained, dtype, text width and length, image size."""
    place = files_of(pipe)
    width = int(parts.unet.config.cross_attention_dim)
    length = min(tokenizer.model_max_length for tokenizer in parts.tokenizers)
    length = min(length, *(int(model.config.max_position_embeddings) for model in parts.text_models))
    side = parts.unet.config.sample_size or 64
    height, width_of_image = side if isinstance(side, list | tuple) else (side, side)
    scale = 2 ** (len(parts.vae.config.block_out_channels) - 1)
    return {
        "pretrained": place[0] if place else IN_MEMORY,
        "dtype": str(next(parts.unet.parameters()).dtype).removeprefix("torch."),
        "text": {"width": width, "max_length": length},
        "sampler": {"height": height * scale, "width": width_of_image * scale},
    }


def parts_of(pipe: Any) -> Parts:
    """A pipeline's components, in the form that `loading.load` returns. Raises UserError if they cannot be used."""
    names = ("unet", "text_encoder", "tokenizer", "vae", "scheduler")
    found: dict[str, Any] = {name: getattr(pipe, name, None) for name in names}
    found["unet"] = getattr(found["unet"], "_orig_mod", found["unet"])  # of torch.compile
    if lacking := [name for name, part in found.items() if part is None]:
        raise UserError(
            f"The pipeline {type(pipe).__name__} has no {lacking[0]}: give a Stable Diffusion 1.x, 2.x or XL with all "
            "of its components."
        )
    unet, vae = found["unet"], found["vae"]
    if not isinstance(unet, UNet2DConditionModel) or not isinstance(vae, AutoencoderKL):
        raise UserError(f"The pipeline {type(pipe).__name__} is not supported: give a Stable Diffusion 1.x, 2.x or XL.")
    if unet.config.in_channels != vae.config.latent_channels:
        raise UserError(
            f"The pipeline's U-Net takes {unet.config.in_channels} channels, as in models for inpainting or image "
            "editing: give a text-to-image pipeline."
        )
    refuse_changed(unet, "U-Net", [found["text_encoder"], vae])
    if erasers.found(unet):
        raise UserError("The pipeline's U-Net has erasers of an earlier erasure: call its undo() first.")
    second = getattr(pipe, "text_encoder_2", None)
    xl = second is not None
    tokenizers = [found["tokenizer"], *([pipe.tokenizer_2] if xl else [])]
    return Parts(
        tokenizers=[own_tokenizer(one) for one in tokenizers],
        text_models=[found["text_encoder"], *([second] if xl else [])],
        unet=unet,
        vae=vae,
        scheduler_config=dict(found["scheduler"].config),
        xl=xl,
        zeros_for_no_prompt=bool(pipe.config.get("force_zeros_for_empty_prompt", True)),
    )


def refuse_changed(network: Any, word: str, others: Sequence[Any]) -> None:
    """Raises UserError for a pipeline that is offloaded, and for a denoiser that is quantised or has LoRA layers."""
    if any(hasattr(part, "_hf_hook") for part in (network, *others)):
        raise UserError("The pipeline is offloaded: erase first, and call enable_model_cpu_offload() afterwards.")
    if getattr(network, "hf_quantizer", None) is not None or next(network.parameters()).dtype not in DTYPES.values():
        raise UserError(f"The pipeline's {word} is quantised: give one in float32, bfloat16 or float16.")
    given = [tensor for part in (network, *others) for _, tensor in _tensors(part)]
    if any(tensor.is_meta for tensor in given):
        raise UserError("The pipeline has weights on the meta device, without values: load them first.")
    if any(tensor.is_inference() for tensor in given):
        raise UserError("The pipeline was loaded in torch.inference_mode, so it cannot be edited: load it outside.")
    if adapters.layers(network):
        raise UserError(
            f"The pipeline's {word} has LoRA layers: call pipe.fuse_lora() and pipe.unload_lora_weights() first."
        )


def own_tokenizer(given: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy: a tokenizer remembers its last truncation and padding, and those of the pipeline must not change."""
    if given.is_fast:
        own = copy.deepcopy(given.backend_tokenizer)
    else:  # before transformers 5
        from transformers.convert_slow_tokenizer import convert_slow_tokenizer

        own = convert_slow_tokenizer(given)
    own.no_truncation()
    own.no_padding()
    special = {role: str(token) for role, token in given.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=own,
        model_max_length=given.model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _modules(parts: Parts) -> dict[str, nn.Module]:
    texts = dict(zip(("text_encoder", "text_encoder_2"), parts.text_models))
    return {**texts, "unet": parts.unet, "vae": parts.vae}


def _marks_of(
    networks: Mapping[str, nn.Module],
    tokenizers: Sequence[PreTrainedTokenizerBase],
    schedule: Mapping[str, Any],
    length: int,
    only_text: bool,
) -> str:
    """16 hex digits from names, shapes and both ends of all tensors, the tokenizers, and the noise schedule."""
    digest = hashlib.sha256(f"{length}".encode())
    for part, module in networks.items():
        if only_text and not part.startswith("text_encoder"):
            continue
        for name, tensor in module.state_dict().items():
            digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            ends = torch.cat([tensor.flatten()[:PEEK], tensor.flatten()[-PEEK:]]).detach().cpu()
            digest.update(ends.contiguous().view(torch.uint8).numpy().tobytes())
    for tokenizer in tokenizers:
        digest.update(hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).digest())
    if not only_text:
        names = FLOW_SCHEDULE if "shift" in schedule else SCHEDULE
        digest.update(repr([(key, schedule.get(key)) for key in names]).encode())
    return digest.hexdigest()[:16]


def files_of(pipe: DiffusionPipeline, part: str = "unet") -> tuple[str, Path] | None:
    """(hub id or folder, folder on this disk) that the pipeline was loaded from, without asking a server."""
    said = str(getattr(pipe, "name_or_path", "") or "")
    if not said or said == IN_MEMORY:
        return None
    local = paths.dir_of(said) or paths.file_of(said)
    place = folder.on_disk(said)
    if place is None or not (place / part).is_dir():
        return None
    return (str(local.resolve()) if local else said), place


def _width(place: Path) -> int:
    return int(read_json(place / "unet" / "config.json")["cross_attention_dim"])


def _same_text(model: nn.Module) -> bool:
    """Whether the model is the miniature's text encoder."""
    weights: Mapping[str, Tensor] = {_plain(n): tensor for n, tensor in model.state_dict().items()}
    with safe_open(folder.part_files(paths.MINIATURE, "text_encoder")[1][0], framework="pt") as file:
        names = {_plain(name): name for name in file.keys()}  # noqa: SIM118 (not a mapping)
        table = next(name for name in names if name.endswith("token_embedding.weight"))
        mine = weights.get(table)
        found = file.get_tensor(names[table])
    return mine is not None and mine.shape == found.shape and torch.equal(found.to(mine.dtype), mine.cpu())


def _plain(name: str) -> str:
    """A weight's name in transformers 5. Earlier versions put "text_model." before the names of a text encoder."""
    return name.removeprefix("text_model.")
