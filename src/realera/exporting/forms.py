"""Writes a run's erasure in one of the forms that other programs read, with a model card beside it."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from realera import paths
from realera.backbones import folder, kinds, portable, single_file
from realera.backbones.folder import locate, models
from realera.contracts import UserError
from realera.exporting import card, description, occupied, verification
from realera.exporting.evidence import Evidence
from realera.exporting.occupied import CARD
from realera.runs import applying, map_files, preflight
from realera.runs.folders import Run
from realera.system import disk
from realera.training import maps
from realera.training.checkpoint import read_erased

log = logging.getLogger(__name__)
Form = Literal["diffusers", "checkpoint", "lora", "kohya", "map"]
FORMS: tuple[Form, ...] = ("diffusers", "checkpoint", "lora", "kohya", "map")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WHOLE: tuple[Form, ...] = ("diffusers", "checkpoint")
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' own name
SMALL = 0.05  # share of the change whose loss is only logged, not warned of


@dataclass(frozen=True)
class Options:
    """dtype: "float32", "float16" or "bfloat16"; None = each weight keeps that of the base model, and a LoRA is
    float32. variant, shard_size: of a pipeline folder. rank, error: of a LoRA (`portable.lora_of`). verify: images to
    draw with the run and with the file; None = 4 where that takes seconds (on a GPU, and on the miniature), else 0.
    push: USER/NAME of a model repository on the hub; private: make it a private one."""

    dtype: str | None = None
    variant: str | None = None
    shard_size: str = "10GB"
    rank: int | Literal["auto"] | None = "auto"
    error: float = 0.01
    verify: int | None = None
    push: str | None = None
    private: bool = True

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype} is none of {', '.join(DTYPES)}.")
        if self.variant is not None and not _is_text(self.variant, r"[A-Za-z0-9_-]{1,40}"):
            raise UserError(f"variant={self.variant} is not a name such as fp16.")
        if not _is_text(self.shard_size, r"[1-9][0-9]*(MB|GB)"):
            raise UserError(f"shard_size={self.shard_size} is not a size such as 5GB.")
        if not (self.rank in ("auto", None) or (type(self.rank) is int and self.rank > 0)):
            raise UserError(f"rank={self.rank} is not auto, null or a whole number above 0.")
        if type(self.error) not in (int, float) or not 0 < self.error < 1:
            raise UserError(f"error={self.error} is not between 0 and 1.")
        if self.verify is not None and not (type(self.verify) is int and 0 <= self.verify <= 1000):
            raise UserError(f"verify={self.verify} is not a whole number from 0 to 1000, or null.")
        if self.push is not None and not _is_text(self.push, r"[\w.-]+/[\w.-]+"):
            raise UserError(f"push={self.push} is not USER/NAME.")


def options_of(given: Mapping[str, Any]) -> Options:
    """Raises UserError for an option that there is not."""
    known = [one.name for one in fields(Options)]
    if unknown := [name for name in given if name not in known]:
        raise UserError(f"export has no option {unknown[0]!r}: its options are {', '.join(known)}.")
    return Options(**given)


def _is_text(value: Any, pattern: str) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


@dataclass(frozen=True)
class Exported:
    """path: the written folder or file. error: of a LoRA, relative to the change; 0 for exact forms. distance: mean
    difference of images, in grey levels of 255, between the run and the file; None = not drawn. left_out: {part of the
    erasure that is not in the file: why}."""

    path: Path
    error: float = 0.0
    distance: float | None = None
    left_out: dict[str, str] = field(default_factory=dict)


def export(
    run: Run,
    to: Form,
    out: Path,
    options: Options = Options(),
    source: Path | None = None,
    evidence: Evidence | None = None,
) -> Exported:
    """Writes the run's erasure to the folder `out`, with a model card. source: the base model's folder; None = the one
    that the run names. evidence: the measurements for the card; None = those in the run's folder.

    Raises:
        UserError: the run has nothing that this form can hold, `out` has other files (`diffusers`, `checkpoint`) or an
            export of another run in it, or the hub cannot be reached for `push`.
    """
    if to not in FORMS:
        raise UserError(f"to={to} is none of {', '.join(FORMS)}.")
    if to in WHOLE and out.is_dir() and any(out.iterdir()):
        raise UserError(f"out={out} contains other files: give a new or an empty folder.")
    if to == "diffusers" and out.resolve() == Path.cwd():
        raise UserError(f"out={out} is the current folder, which is replaced as a whole: give a new folder.")
    if options.push is not None:
        refuse_push(options.push)
    erased = read_erased(run.erased)
    state = erased.state
    if source is None and to != "map":  # a map is exported without its base model
        preflight.check_model(run.settings.backbone)
        source = locate(run.settings.backbone.pretrained)
    if source is not None:
        _refuse_form(to, kinds.of(source), run.settings.backbone.name)
    about = description.describe(run, source, erased.origin, evidence)
    if to not in WHOLE:
        occupied.refuse_another(out, _file(to, out, about), about.identity)
    if source is None or to == "map":
        made = _map(run, out, about)
    else:
        if about.guide and not state:
            raise UserError(
                f"{run.folder} changed no weights: its {about.guide} acts while images are drawn and cannot be "
                f"exported. Draw images with python -m realera.generate run={run.folder}."
            )
        with _removed_if_stopped(to, out):
            made = _weights(run, to, out, options, source, state, about)
    for part, why in made.left_out.items():
        log.warning("not in the export: the %s (%s)", part, why)
    if (out / CARD).is_file() and not occupied.is_card(out / CARD):
        log.warning("%s has a %s of its own, which stays: no model card is written", out, CARD)
    else:
        names = _names(to, out, made.path, about, options, {} if source is None else kinds.left_out(source))
        disk.write_text(out / CARD, card.text(about, to, names, _notes(made)))
    if options.push is not None:
        _push(options.push, options.private, out)
    return made


def _refuse_form(to: Form, kind: kinds.Kind, name: Any) -> None:
    """Raises UserError for a form that programs do not read of a base model of this kind."""
    if kind != kinds.UNET and to in ("checkpoint", "kohya"):
        raise UserError(
            f"to={to} is for U-Nets, and backbone {name} is a transformer: give to=lora, which diffusers and ComfyUI "
            "read, to=diffusers or to=map."
        )
    if kind == kinds.ONE_CLIP and to == "diffusers":
        raise UserError(
            f"diffusers has no pipeline for backbone {name}, a Stable Diffusion 3 with one text encoder: give to=lora "
            "or to=map."
        )


@contextmanager
def _removed_if_stopped(to: Form, out: Path) -> Iterator[None]:
    """Removes a whole model whose check by drawing was interrupted, so that the same command can be typed again: it
    refuses a folder with files in it."""
    was_there = out.is_dir()
    try:
        yield
    except BaseException:
        if to in WHOLE and out.is_dir():  # it was empty before
            for one in out.iterdir():
                shutil.rmtree(one) if one.is_dir() else one.unlink()
            if not was_there:
                out.rmdir()
        raise


def _weights(
    run: Run,
    to: Form,
    out: Path,
    options: Options,
    source: Path,
    state: Mapping[str, torch.Tensor],
    about: description.Description,
) -> Exported:
    dtype = DTYPES.get(options.dtype or "")
    left_out = {}
    portable.refuse_erasers(state)
    if about.guide:
        left_out[about.guide] = "it acts while images are drawn; only realera's own commands can apply it"
    error, path = 0.0, out
    record = applying.of_export(run, source) if to in WHOLE else None
    if to == "diffusers":
        texts = {} if record is None else {paths.APPLIED: applying.text_of(record)}
        portable.save_pipeline(source, state, out, dtype, options.variant, options.shard_size, texts)
    elif to == "checkpoint":
        path = _file(to, out, about)
        said = {} if record is None else {single_file.APPLIED: applying.text_of(record)}
        portable.save_checkpoint(source, state, path, dtype, {**description.metadata_of(about, left_out), **said})
    else:
        part = kinds.denoiser(source)
        word, own = kinds.DENOISERS[part], portable.of_part(state, part)
        share_of_texts = _change_of_texts(source, state)
        if share_of_texts and not own:
            raise UserError(
                f"this run changed the text encoder and not the {word}, and to={to} holds only the {word}'s change: "
                "give to=diffusers."
            )
        base = portable.base_denoiser(source, portable.touched(own))
        found = portable.lora_of(base, own, options.rank, options.error)
        error = found.error
        if share_of_texts:
            left_out["change of the text encoder"] = (
                f"to={to} holds only the {word}'s change; it is {share_of_texts:.1%} of the text encoder's weights "
                "(Frobenius)"
            )
        if found.left_out:
            share = sum(found.left_out.values()) ** 0.5
            left_out[f"change of {len(found.left_out)} biases and norms"] = (
                f"a LoRA cannot hold them; their size is {share:.1%} of the whole change"
            )
        path = _file(to, out, about)
        metadata = description.metadata_of(about, left_out, found.ranks)
        names = portable.lora_names(folder.weights(source, part), to, portable.kind_of(source))
        portable.save_lora(found.lora, path, to, dtype, metadata, names)
        ranks = sorted(found.ranks.values())
        spread = f"rank {ranks[-1]}" if ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"
        words = "LoRA of %s on %d layers; it misses %.2f%% of the change"
        (log.warning if error > SMALL else log.info)(words, spread, len(ranks), 100 * error)
    distance = verification.distance(run, source, state, to, path, options.verify, about.name)
    return Exported(path, error, distance, left_out)


def _file(to: Form, out: Path, about: description.Description) -> Path:
    """The file of weights that a form of one file has."""
    return out / {"map": paths.MAP, "lora": LORA_FILE}.get(to, f"{about.name}.safetensors")


def _change_of_texts(source: Path, state: Mapping[str, torch.Tensor]) -> float:
    """||change|| / ||weights|| over the changed weights of the text encoders; 0 if none was changed."""
    change, whole = 0.0, 0.0
    for part in (part for part in models(source) if part.startswith(portable.TEXT)):
        if own := portable.of_part(state, part):
            base = {n.removeprefix("text_model."): value for n, value in portable.part_state(source, part).items()}
            for name, moved in portable.changes(base, own):
                change += float(moved.square().sum())
                whole += float(base[name].double().square().sum())
    return (change / whole) ** 0.5 if whole else 0.0


def _map(run: Run, out: Path, about: description.Description) -> Exported:
    """Writes the run's closed form: W = W0 @ map."""
    if not (run.folder / paths.MAP).is_file():
        raise UserError(
            f"{run.folder} has no {paths.MAP}, because its method has no single-matrix closed form: give to=diffusers."
        )
    preflight.check_map(run.folder / paths.MAP)
    map_files.write(run, out / paths.MAP)
    left_out = dict.fromkeys(maps.left_out(run.settings.method), "the map is the closed form only")
    if about.guide:
        left_out[about.guide] = "it acts while images are drawn; only realera's own commands can apply it"
    return Exported(out / paths.MAP, left_out=left_out)


def _notes(made: Exported) -> dict[str, str]:
    notes = {f"Without the {part}": why for part, why in made.left_out.items()}
    if made.error > 1e-5:
        notes["Approximated"] = f"the file misses {made.error:.2%} of the change of the weights (Frobenius)"
    if made.distance is not None:
        notes["Drawn"] = (
            f"images of the same seeds differ from the run's own by {made.distance:.2f} of 255 grey levels on average"
        )
    return notes


def _names(
    to: Form, out: Path, path: Path, about: description.Description, options: Options, lacks: Iterable[str]
) -> dict[str, str]:
    """lacks: parts that from_pretrained must be told to leave out."""
    name = out.resolve().name
    place = name if re.fullmatch(r"[\w .()+-]+", name) else paths.as_file_name(name)
    pipeline = "StableDiffusionXLPipeline" if about.kind == "xl" else "StableDiffusionPipeline"
    return {
        "place": options.push or place,
        "keywords": (f', variant="{options.variant}"' if options.variant else "")
        + "".join(f", {part}=None" for part in lacks),
        "file": path.name,
        "stem": path.stem,
        "pipeline": pipeline,
    }


def refuse_push(repository: str) -> None:
    """Raises UserError where nothing can be uploaded: offline, or not logged in."""
    from huggingface_hub import get_token

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(f"push={repository} needs the hub, and HF_HUB_OFFLINE is set: unset it, or leave push= out.")
    if get_token() is None:
        raise UserError(f"push={repository} needs you to be logged in: type `hf auth login`, or set HF_TOKEN.")


def _push(repository: str, private: bool, out: Path) -> None:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        place: Any = api.upload_folder(repo_id=repository, folder_path=out, commit_message="Add an erased model")
    except Exception as error:  # errors of the hub client's HTTP library
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{repository} could not be written on the hub ({reason}): the files are in {out}.") from error
    log.info("uploaded to %s", place)
