"""Checkpoint files on disk: finds them, checks that they are complete, reads their headers. It does not import torch,
so errors are reported fast.

A checkpoint is a diffusers folder (unet/, vae/, text_encoder/, tokenizer/, scheduler/; Stable Diffusion XL also
text_encoder_2/ and tokenizer_2/) with safetensors weights, local or in the Hugging Face cache. Weights may be sharded.
If a part has only the half-precision copy (`.fp16.`), that copy is read. A diffusion transformer has transformer/ in
place of unet/ (`kinds`).
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from realera.backbones import configs, kinds, vocabulary
from realera.backbones.vocabulary import SPECIAL
from realera.contracts import UserError
from realera.files import checksums
from realera.files.headers import Stored, quick_digest, read_json, tensors
from realera.files.headers import refuse_torn as refuse_torn
from realera.paths import MINIATURE, MINIATURE_DIT, dir_of, file_of

MODELS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
SECOND = {"text_encoder_2": "model"}  # the additional model of Stable Diffusion XL
VARIANTS = ("", ".fp16")  # in names of weights files, in order of preference
EMBEDDING = "token_embedding.weight"  # of a text encoder: one row for each token
SHARD = re.compile(r"\w[\w.-]*\.safetensors")  # a file name without a path
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
HUB_FILES = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/*",
    "tokenizer_2/*",
    "tokenizer_3/*",
    *(f"{part}/config.json" for part in (*MODELS, *SECOND, *kinds.MODELS)),
    # Only the weights that are read: not the fp16, EMA or pickle copies in the same folder.
    *(f"{part}/{stem}.safetensors" for part, stem in (MODELS | SECOND | kinds.MODELS).items()),
    *(f"{part}/{stem}.safetensors.index.json" for part, stem in (MODELS | SECOND | kinds.MODELS).items()),
    *(f"{part}/{stem}-*-of-*.safetensors" for part, stem in (MODELS | SECOND | kinds.MODELS).items()),
]


class Absent(UserError):
    """The checkpoint is a known one, but its weights are not on this machine."""


def locate(pretrained: str | Path | None) -> Path:
    """The local folder of a complete checkpoint: the built-in miniature (None), the built-in transformer ("mini-dit"),
    a diffusers folder, a single file, or a hub id.

    A single file is unpacked into a folder in the cache (`single_file`). A hub id is taken from the local cache if that
    is complete, else it is downloaded. Raises UserError if files are missing or torn, and if the hub does not have the
    model or cannot be reached.
    """
    if pretrained is None:
        try:
            return check(MINIATURE)
        except UserError as error:
            raise UserError(f"The built-in model is damaged, so reinstall realera: {error}") from error
    if str(pretrained) == kinds.MINI_DIT:
        if not (MINIATURE_DIT / "transformer" / "config.json").is_file():
            raise Absent(
                "The built-in transformer has no weights in this installation: make them with python -m "
                "realera.miniature.build denoiser=dit out=package (about two hours), or give another backbone."
            )
        return check(MINIATURE_DIT)
    if (path := dir_of(pretrained)) is not None:
        return check(path)
    if (file := file_of(pretrained)) is not None:
        from realera.backbones import single_file  # torch and diffusers, for a file that is not unpacked yet

        return check(single_file.unpacked(file))
    if not HUB_ID.fullmatch(str(pretrained)):
        raise UserError(
            f"The checkpoint {str(pretrained)!r} does not exist; give an existing diffusers folder, a .safetensors "
            "file or a hub id such as CompVis/stable-diffusion-v1-4 as backbone.pretrained, or use backbone=mini."
        )
    return _from_hub(str(pretrained))


def on_disk(pretrained: str | Path | None) -> Path | None:
    """The folder of a checkpoint if it is on this machine, without checks, unpacking or a network: None stands for the
    built-in model; a single file must have been unpacked before, a hub's model must be in the cache as a whole."""
    if pretrained is None:
        return MINIATURE
    if str(pretrained) == kinds.MINI_DIT:
        return MINIATURE_DIT if MINIATURE_DIT.is_dir() else None
    if (place := dir_of(pretrained)) is not None:
        return place
    if (file := file_of(pretrained)) is not None:
        from realera.backbones import single_file

        return single_file.folder_of(file)
    if not HUB_ID.fullmatch(str(pretrained)):
        return None
    from realera.backbones import hub

    return hub.cached(str(pretrained))


def check(folder: Path) -> Path:
    """Returns `folder` if all needed files exist, none is torn, and their settings fit together; raises UserError
    otherwise. The values of the weights are checked when they are loaded."""
    if gone := missing(folder):
        hint = " (weights are read as safetensors only, not .bin)" if any(folder.glob("*/*.bin")) else ""
        if "unet/config.json" not in gone and is_xl(folder):
            hint = f" (a Stable Diffusion XL has two text encoders and two tokenizers){hint}"
        raise UserError(
            f"The checkpoint folder {str(folder)!r} lacks {', '.join(gone)}{hint}; copy or download it again, or give "
            "another folder as backbone.pretrained."
        )
    if beside := next(folder.glob("*/adapter_config.json"), None):
        raise UserError(
            f"The checkpoint folder {str(folder)!r} contains an adapter, {beside.parent.name}/{beside.name}, which its "
            "fingerprint does not cover: merge it into the weights, or remove it."
        )
    settings: dict[str, dict[str, Any]] = {}
    kind = kinds.of(folder)
    for part in (*models(folder), "scheduler"):
        file = settings_file(folder, part)
        settings[part] = read_json(file)
        configs.check_settings(file, kinds.form(kind, part), settings[part])
    if kind == kinds.UNET:
        configs.check_unet(folder, settings["unet"], settings["vae"])
    else:
        configs.check_transformer(folder, settings["transformer"], settings["vae"])
    for part in models(folder):
        configs.check_weights(folder, kinds.form(kind, part), settings[part], _stored(folder, part), part)
    for tokenizer, encoder in zip(tokenizers(folder), kinds.encoders(kind, folder)):
        t5 = kinds.form(kind, encoder) == kinds.T5
        ending = kinds.T5_EMBEDDING if t5 else EMBEDDING
        rows = [own.shape[0] for name, own in _stored(folder, encoder).items() if name.endswith(ending)]
        vocabulary.check(place_of(folder, tokenizer), rows[0] if rows else None, t5)
    return folder


def place_of(folder: Path, part: str) -> Path:
    """The folder of a part. The built-in transformer has the text encoder, the tokenizer and the autoencoder of the
    built-in U-Net, which are not stored twice."""
    shared = folder == MINIATURE_DIT and part in kinds.SHARED
    return (MINIATURE if shared else folder) / part


def settings_file(folder: Path, part: str) -> Path:
    return place_of(folder, part) / ("scheduler_config.json" if part == "scheduler" else "config.json")


def _stored(folder: Path, part: str) -> dict[str, Stored]:
    """{tensor name: dtype and shape} of one part, from the file headers. Raises UserError for a torn file, and for a
    shard without a tensor that the index lists."""
    found: dict[str, Stored] = {}
    for file in part_files(folder, part)[1]:
        own = tensors(file)
        for name in _listed(folder, part, file.name):
            if name not in own:
                raise UserError(
                    f"The weights file {str(file)!r} lacks {name}, which its index lists; download it again."
                )
        found |= own
    return found


def _listed(folder: Path, part: str, shard: str) -> list[str]:
    """The tensors that the index lists for a shard; [] for a part that is one file."""
    index = place_of(folder, part) / re.sub(
        r"^(.*?)(\.fp16)?-\d+-of-\d+\.safetensors$", r"\1.safetensors.index\2.json", shard
    )
    if index.suffix != ".json" or not index.is_file():
        return []
    return [name for name, file in read_json(index)["weight_map"].items() if file == shard]


def is_xl(folder: Path) -> bool:
    """Whether the folder is a Stable Diffusion XL, by its index or by the U-Net's settings."""
    if kinds.of(folder) != kinds.UNET:
        return False
    index, unet = folder / "model_index.json", folder / "unet" / "config.json"
    named = read_json(index).get("text_encoder_2") if index.is_file() else None
    if isinstance(named, list) and any(named):
        return True
    return unet.is_file() and read_json(unet).get("addition_embed_type") == "text_time"


def models(folder: Path) -> dict[str, str]:
    """{part: stem of its weights files} of the networks in this kind of checkpoint."""
    if (kind := kinds.of(folder)) != kinds.UNET:
        return {part: kinds.MODELS.get(part) or MODELS[part] for part in kinds.parts(kind, folder)}
    return MODELS | SECOND if is_xl(folder) else dict(MODELS)


def tokenizers(folder: Path) -> list[str]:
    """The tokenizer parts, in the order of their text encoders."""
    if (kind := kinds.of(folder)) != kinds.UNET:
        return [part.replace("text_encoder", "tokenizer") for part in kinds.encoders(kind, folder)]
    return ["tokenizer", "tokenizer_2"] if is_xl(folder) else ["tokenizer"]


def missing(folder: Path) -> list[str]:
    """Names of the needed files that `folder` lacks."""
    needed = [*models(folder), "scheduler"]
    gone = [f"{part}/{file.name}" for part in needed if not (file := settings_file(folder, part)).is_file()]
    for part in tokenizers(folder):
        place = place_of(folder, part)
        split = [place / "vocab.json", place / "merges.txt"]
        if not (place / "tokenizer.json").is_file() and not all(file.is_file() for file in split):
            gone.append(f"{part}/tokenizer.json")
    return gone + [f"{file.parent.name}/{file.name}" for file in weight_files(folder) if not file.is_file()]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that loading reads, in a fixed order; they need not exist."""
    return [file for part in models(folder) for file in part_files(folder, part)[1]]


def part_files(folder: Path, part: str) -> tuple[str, list[Path]]:
    """The variant of one part ("", or "fp16" if there is no other) and the files to read."""
    stem, place = models(folder)[part], place_of(folder, part)
    for mark in VARIANTS:
        whole = place / f"{stem}{mark}.safetensors"
        index = place / f"{stem}.safetensors.index{mark}.json"
        if whole.is_file():
            return mark[1:], [whole]
        if index.is_file():
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict) or not listed:
                raise UserError(f"The index file {str(index)!r} lists no weights; copy or download it again.")
            if outside := [
                name for name in listed.values() if not SHARD.fullmatch(str(name)) or not isinstance(name, str)
            ]:
                raise UserError(
                    f"The file {str(index)!r} names the shard {outside[0]!r}, which is not a file name in its own "
                    "folder; copy or download it again."
                )
            return mark[1:], [place / name for name in sorted(set(listed.values()))]
    return "", [place / f"{stem}.safetensors"]


def weights(folder: Path, part: str) -> dict[str, int]:
    """{name: number of axes} of all weights of one part, from the file headers. Raises UserError for a torn file."""
    files = part_files(folder, part)[1]
    return {name: len(stored.shape) for file in files for name, stored in tensors(file).items()}


def fingerprint(folder: Path, text_length: int, only_text: bool = False, also: str = "", without: str = "") -> str:
    """16 hex digits of a sha256 over everything an image depends on besides prompt, seed and sampler.

    That is: the contents of the weights, the components' configuration, the tokenizer's files, and the number of text
    rows. Not included: the folder's path, the library versions it was saved with, and the precision it runs in.
    only_text: only the files that the text states depend on. also: further content. without: a part that is not used.
    """
    digest = hashlib.sha256()
    parts = [part for part in models(folder) if not only_text or part.startswith("text_encoder")]
    parts = [part for part in parts if part != without]
    for file in (file for part in parts for file in part_files(folder, part)[1]):
        digest.update(f"{file.parent.name}/{file.name} {_sha256(file)}\n".encode())
    for part in tokenizers(folder):
        for name in ("tokenizer.json", "vocab.json", "merges.txt"):
            if (file := place_of(folder, part) / name).is_file():
                digest.update(f"{part}/{name} {_sha256(file)}\n".encode())
        # CLIP's usual tokens are left out, so that fingerprints from before this check are unchanged.
        special = vocabulary.special(place_of(folder, part))
        if other := {role: word for role, word in special.items() if word != SPECIAL[role]}:
            digest.update(json.dumps([part, other], sort_keys=True).encode())
    for part in (*parts, *(() if only_text else ("scheduler",))):
        config = read_json(settings_file(folder, part))
        kept = {
            k: v
            for k, v in config.items()
            if not k.startswith("_") and k not in ("transformers_version", "torch_dtype", "dtype")
        }
        digest.update(json.dumps([part, kept], sort_keys=True).encode())
    digest.update(f"text_length {text_length}{also}".encode())
    if is_xl(folder) and not only_text:
        digest.update(f"zeros {zeros_for_no_prompt(folder)}".encode())
    return digest.hexdigest()[:16]


def quick_fingerprint(folder: Path) -> str | None:
    """16 hex digits that change with the weights in a folder or single file, without reading all of them. They depend
    on each file's size and header and on both ends of every tensor, which any training changes. None if a file is
    missing or torn."""
    digest = hashlib.sha256()
    try:
        if folder.is_file():
            return quick_digest(folder)[:16]
        for file in weight_files(folder):
            digest.update(f"{file.parent.name}/{file.name} {quick_digest(file)}\n".encode())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return None
    return digest.hexdigest()[:16]


def zeros_for_no_prompt(folder: Path) -> bool:
    """Whether guidance of a Stable Diffusion XL uses zeros in place of the encoded empty prompt."""
    index = folder / "model_index.json"
    return bool(read_json(index).get("force_zeros_for_empty_prompt", True)) if index.is_file() else True


def _from_hub(name: str) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    lacks = "all files"
    try:
        cached = Path(snapshot_download(name, local_files_only=True))
        if not (gone := missing(cached)):
            return check(cached)
        lacks = ", ".join(gone)
    except LocalEntryNotFoundError:
        pass
    try:
        # A quick request first: without a network the download itself would retry for a minute.
        HfApi().model_info(name, timeout=2.0)
        return check(Path(snapshot_download(name, allow_patterns=HUB_FILES)))
    except GatedRepoError as error:
        raise UserError(
            f"{name!r} can only be downloaded after you accept its terms: do so at https://huggingface.co/{name} and "
            "log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"There is no folder and no model on the hub called {name!r}; check the spelling of backbone.pretrained (a "
            "private model needs `hf auth login`)."
        ) from error
    except UserError:
        raise
    except OfflineModeIsEnabled as error:
        raise UserError(_offline(name, lacks, constants.HF_HUB_CACHE, "HF_HUB_OFFLINE is set")) from error
    except Exception as error:  # errors of the hub client's HTTP library, and a full disk
        reason = (str(error).strip().splitlines() or [""])[0][:120] or type(error).__name__
        raise UserError(_offline(name, lacks, constants.HF_HUB_CACHE, reason)) from error


def _offline(name: str, lacks: str, cache: str, reason: str) -> str:
    return (
        f"There is no folder {name!r}, the Hugging Face cache {cache} lacks {lacks} of the model with this name, and "
        f"it cannot be downloaded ({reason}); give a local diffusers folder with backbone.pretrained=DIR, set HF_HOME "
        "to a folder with a cached snapshot of it, or use the built-in backbone=mini."
    )


def _sha256(file: Path) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    real = file.resolve()
    # In the Hugging Face cache the name of a large file is its sha256, so gigabytes need not be read again. In other
    # folders a name proves nothing.
    within = real.is_relative_to(Path(HF_HUB_CACHE).resolve())
    if within and real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name
    return checksums.sha256_of(real)
