"""CLIP as a zero-shot judge, as MACE and RealEra use it for objects: a class's probability among the task's labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from realera.contracts import Prompt, UserError, Verdict
from realera.judges.images import read_rgb


class ClipJudge:
    """value = softmax over `labels` of 100 cos(image, text) at the prompt's concept (0-1); label = the likeliest one.
    A concept that is no label is unscored. The protocol's model is OpenAI's ViT-B/32 with one text per label and no
    ensembling (MACE: "a photo of the {class}").

    labels: what is chosen among. model, pretrained: open_clip's names, `pretrained` also a weights file. batch:
    images at once. Raises UserError where the weights cannot be had.
    """

    name = "clip"

    def __init__(
        self,
        labels: Sequence[str],
        template: str = "a photo of the {}",
        model: str = "ViT-B-32-quickgelu",
        pretrained: str = "openai",
        device: str = "cpu",
        batch: int = 64,
    ) -> None:
        if not labels:
            raise UserError("judge=clip chooses among labels and this task has none: give judge.labels='[cat,dog]'.")
        if template.count("{}") != 1:
            raise UserError(f"judge.template={template!r} must hold {{}} once, where the label goes.")
        import open_clip
        import torch

        try:
            clip, _, self.transform = open_clip.create_model_and_transforms(model, pretrained, device=device)
        except (RuntimeError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"CLIP's weights {model}/{pretrained} cannot be had ({reason[:160]}): connect once to download them, "
                "point HF_HOME at a cache that holds them, or give judge.pretrained=FILE."
            ) from error
        self.labels = tuple(labels)
        self.template, self.model, self.pretrained = template, model, pretrained
        self.device, self.batch = torch.device(device), batch
        self.clip = clip.eval()
        with torch.no_grad():
            tokens = open_clip.get_tokenizer(model)([template.format(label) for label in self.labels])
            self._texts = self.clip.encode_text(tokens.to(self.device), normalize=True)

    def __call__(self, images: Sequence[Path], prompts: Sequence[Prompt]) -> list[Verdict]:
        import torch
        from PIL import Image

        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
        row = {label.lower(): i for i, label in enumerate(self.labels)}
        verdicts: list[Verdict] = []
        for start in range(0, len(images), self.batch):
            part = slice(start, start + self.batch)
            pixels = torch.stack([self.transform(Image.fromarray(read_rgb(path))) for path in images[part]])
            with torch.no_grad():
                seen = self.clip.encode_image(pixels.to(self.device), normalize=True)
                chances = (100 * seen @ self._texts.T).softmax(dim=-1).cpu()
            for prompt, chance in zip(prompts[part], chances):
                at = row.get(prompt.concept.lower())
                value = math.nan if at is None else float(chance[at])
                verdicts.append(Verdict(prompt.id, value, self.labels[int(chance.argmax())]))
        return verdicts

    def protocol(self) -> dict[str, Any]:
        """What was asked of which judge, among which labels."""
        return {
            "judge": self.name,
            "version": 1,
            "model": self.model,
            "pretrained": self.pretrained,
            "template": self.template,
            "labels": list(self.labels),
        }
