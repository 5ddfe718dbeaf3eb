"""Masks of a concept's area in an image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from realera.contracts import Backbone, TextStates, UserError
from realera.files.cache_costs import cached
from realera.methods.latents import at_level
from realera.methods.texts import predict, repeat
from realera.setting_types import Filled, Label, Share, Timestep

Source = Literal["none", "attention", "grounded-sam"]
AT_ONCE = 8  # images in one pass


class Masks:
    """Masks (images, H, W) bool of images that are given as latents.

    source: "grounded-sam" = boxes of the concept's name by Grounding DINO, filled by SAM, as in MACE (a download);
    "attention" = the pixels where the original model's cross-attention to the concept's tokens is at least `threshold`
    times its maximum in the image, averaged over all layers and heads and over the noise levels `timesteps`; "none" =
    no masks. detector, segmenter: hub ids or folders. box_threshold, text_threshold: of the detector, 0-1. If it finds
    nothing in an image, the mask covers the whole image.
    """

    def __init__(
        self,
        source: Source = "none",
        threshold: Share = 0.4,
        timesteps: Annotated[Sequence[Timestep], Filled()] = (200, 300, 400),
        detector: Label = "IDEA-Research/grounding-dino-base",
        segmenter: Label = "facebook/sam-vit-huge",
        box_threshold: Share = 0.3,
        text_threshold: Share = 0.25,
    ) -> None:
        self.source = source
        self.threshold = threshold
        self.timesteps = list(timesteps)
        self.models = (detector, segmenter)
        self.thresholds = (box_threshold, text_threshold)
        self.sam: GroundedSam | None = None

    def load_for(self, folders: Sequence[Path], names: Sequence[str]) -> None:
        """Calls `load` if one of these masks is not cached yet."""
        if not all(self._file(folder, name).is_file() for folder, name in zip(folders, names, strict=True)):
            self.load()

    def load(self) -> None:
        """Loads the models of the source. Raises UserError if they cannot be loaded."""
        if self.source == "grounded-sam":
            self.sam = GroundedSam(*self.models, *self.thresholds)

    def unload(self) -> None:
        self.sam = None

    def kept(self, backbone: Backbone, states: TextStates, latents: Tensor, name: str, folder: Path) -> Tensor | None:
        """As `__call__`, but cached in a file beside the latents in `folder`: other processes and later runs read the
        same masks and need no models."""
        if self.source == "none":
            return None

        def make() -> Tensor:
            if self.sam is None:
                self.load()
            made = self(backbone, states, latents, name)
            assert made is not None
            return made

        return cached(self._file(folder, name), "masks", backbone, make).to(latents.device)

    def _file(self, folder: Path, name: str) -> Path:
        about = [self.source, self.threshold, self.timesteps, self.models, self.thresholds, name]
        return folder / f"masks-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}.safetensors"

    def __call__(self, backbone: Backbone, states: TextStates, latents: Tensor, name: str) -> Tensor | None:
        """(images, H, W) bool on the latents' device, None = no masks. states: the one prompt (1, T, D) that all
        latents (images, C, h, w) were drawn for, with the positions of the concept `name`."""
        if self.source == "none":
            return None
        if self.sam is None:
            shares = attended(backbone, states, latents, self.timesteps)
            return shares >= self.threshold * shares.amax(dim=(1, 2), keepdim=True)
        found = [self.sam(backbone.decode(part), name) for part in latents.split(AT_ONCE)]
        return torch.cat(found).to(latents.device)


@torch.no_grad()
def attended(backbone: Backbone, states: TextStates, latents: Tensor, timesteps: Sequence[int]) -> Tensor:
    """(images, h, w): the original model's attention to the concept's own tokens, averaged over heads and summed over
    tokens, layers (resized to the latents' size) and noise levels."""
    height, width = latents.shape[-2:]
    noise = torch.randn(latents.shape, generator=Generator().manual_seed(0)).to(latents)
    rows = slice(int(states.first[0]), int(states.last[0]) + 1)
    found = []
    for part, its_noise in zip(latents.split(AT_ONCE), noise.split(AT_ONCE)):
        total = torch.zeros(len(part), height, width, device=latents.device)
        for t in timesteps:
            at = at_level(backbone, torch.full((len(part),), t)).to(latents.device)
            with backbone.original(), backbone.attention() as maps:
                predict(backbone, backbone.noisy_latents(part, its_noise, at), at, repeat(states, 0, len(part)))
            for probabilities in maps.values():
                seen = probabilities[..., rows].float().sum(dim=-1).mean(dim=1)
                seen = seen.unflatten(1, grid(seen.shape[1], height, width))
                total += interpolate(seen[:, None], size=(height, width), mode="bilinear")[:, 0]
        found.append(total)
    return torch.cat(found)


def grid(pixels: int, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of a layer with this number of pixels, in a U-Net that halves latents of this size per level."""
    while height * width > pixels:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != pixels:
        raise ValueError(f"a layer of {pixels} pixels is not a repeated halving of its latents")
    return height, width


class GroundedSam:
    """Grounding DINO (arXiv 2303.05499) finds boxes of a name, SAM (arXiv 2304.02643) fills each box; the mask is their
    union. Both run in transformers' own classes, on the GPU if there is one.

    Raises UserError for models that cannot be loaded.
    """

    def __init__(self, detector: str, segmenter: str, box_threshold: float, text_threshold: float) -> None:
        from transformers import AutoProcessor, GroundingDinoForObjectDetection, SamModel, SamProcessor

        self.thresholds = {"threshold": box_threshold, "text_threshold": text_threshold}
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.detector_processor: Any = AutoProcessor.from_pretrained(detector)
            self.detector: Any = GroundingDinoForObjectDetection.from_pretrained(detector).to(self.device).eval()
            self.segmenter_processor: Any = SamProcessor.from_pretrained(segmenter)
            self.segmenter: Any = SamModel.from_pretrained(segmenter).to(self.device).eval()
        except (OSError, ValueError) as error:
            raise UserError(
                f"Grounded SAM ({detector}, {segmenter}) cannot be loaded: download both models into the Hugging Face "
                "cache (hf download NAME), give folders (method.latents.masks.detector=FOLDER and .segmenter=FOLDER), "
                "or set method.latents.masks.source=attention or none."
            ) from error

    @torch.no_grad()
    def __call__(self, images: Tensor, name: str) -> Tensor:
        """(B, H, W) bool on the CPU of images uint8 (B, H, W, 3)."""
        return torch.stack([self._one(image, name) for image in images.cpu().numpy()])

    def _one(self, image: Any, name: str) -> Tensor:
        size = image.shape[:2]
        query = self.detector_processor(images=image, text=f"{name.lower()}.", return_tensors="pt").to(self.device)
        boxes = self.detector_processor.post_process_grounded_object_detection(
            self.detector(**query), query["input_ids"], target_sizes=[size], **self.thresholds
        )[0]["boxes"]
        if len(boxes) == 0:
            return torch.ones(size, dtype=torch.bool)
        inputs = self.segmenter_processor(images=image, input_boxes=[boxes.tolist()], return_tensors="pt")
        original, reshaped = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
        inputs = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
        inputs = {key: value.to(self.device) for key, value in inputs.items()}
        masks = self.segmenter(**inputs, multimask_output=False).pred_masks.cpu()
        filled: Tensor = self.segmenter_processor.image_processor.post_process_masks(masks, original, reshaped)[0]
        return filled.flatten(0, 1).any(dim=0)
