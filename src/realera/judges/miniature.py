"""The miniature's judge: which of all the world's concepts an image shows, by a small CLIP, with a plain CNN beside it.

It chooses among every concept of the world and its empty scenes, not only the ten classes: an empty sky is then a sky,
and is not pressed into being an airplane.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from realera.contracts import Prompt, UserError, Verdict
from realera.judges.images import read_rgb
from realera.paths import MINIATURE

if TYPE_CHECKING:
    from torch import Tensor

Mode = Literal["zero_shot", "clip_score"]
_SIZE = 32  # pixels a side, as trained
_REMEDY = "reinstall the package, or name another folder with judge.weights=FOLDER"


class MiniatureJudge:
    """zero_shot: value = softmax probability of the prompt's concept among all labels (0-1), label = the likeliest one;
    a concept that is no label of the world is unscored. clip_score: value = cosine of the image and the prompt's text.

    weights: a folder with config.json and model.safetensors (default: the shipped one). detail: `second` and
    `second_value`, the plain CNN's first choice and its probability. Raises UserError where the weights cannot be read.
    """

    def __init__(
        self, weights: str | Path | None = None, mode: Mode = "zero_shot", device: str = "cpu", batch: int = 256
    ) -> None:
        if mode not in get_args(Mode):
            raise UserError(f"judge.mode={mode!r} is unknown: use {' or '.join(get_args(Mode))}")
        if batch < 1:
            raise UserError(f"judge.batch={batch} judges nothing: use 1 or more")
        import torch
        from safetensors import SafetensorError

        from realera.judges.miniature_net import load_judge

        self.folder = Path(weights) if weights is not None else MINIATURE / "judge"
        try:
            self.config, clip, plain = load_judge(self.folder)
        except FileNotFoundError as error:
            missing = error.filename or self.folder
            raise UserError(f"the judge's file {missing} is missing: {_REMEDY}") from None
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            cause = str(error).splitlines()[0]
            raise UserError(f"the judge in {self.folder} cannot be read ({cause}): {_REMEDY}") from None
        self.name = "miniature" if mode == "zero_shot" else "miniature_clip_score"
        self.mode, self.batch = mode, batch
        self.device = torch.device(device)
        self.clip, self.plain = clip.to(self.device), plain.to(self.device)
        self.labels = tuple(self.config.labels)
        self._row = {label.lower(): row for row, label in enumerate(self.labels)}
        with torch.no_grad():
            self._label_states = self.clip.encode_text(list(self.config.labels.values()))

    def read(self, images: Sequence[Path]) -> Tensor:
        """(B, 3, 32, 32) float32 in [-1, 1]."""
        import numpy as np
        import torch

        pixels = np.stack([read_rgb(Path(path), _SIZE) for path in images])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1

    def __call__(self, images: Sequence[Path], prompts: Sequence[Prompt]) -> list[Verdict]:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
        verdicts: list[Verdict] = []
        for start in range(0, len(images), self.batch):
            part = slice(start, start + self.batch)
            verdicts += self._judge(self.read(images[part]), prompts[part])
        return verdicts

    def _judge(self, pixels: Tensor, prompts: Sequence[Prompt]) -> list[Verdict]:
        import torch

        with torch.no_grad():
            states = self.clip.encode_image(pixels)
            probabilities = (self.clip.scale * states @ self._label_states.T).softmax(dim=-1).cpu()
            second = self.plain(pixels).softmax(dim=-1).cpu()
            if self.mode == "clip_score":
                scores = (states * self.clip.encode_text([p.text for p in prompts])).sum(dim=-1).cpu()
        verdicts = []
        for i, prompt in enumerate(prompts):
            if self.mode == "clip_score":
                value = float(scores[i])
            else:
                row = self._row.get(prompt.concept.lower())
                value = float("nan") if row is None else float(probabilities[i, row])
            detail = {"second": self.labels[int(second[i].argmax())], "second_value": float(second[i].max())}
            verdicts.append(Verdict(prompt.id, value, self.labels[int(probabilities[i].argmax())], detail))
        return verdicts

    def protocol(self) -> dict[str, Any]:
        """What was asked of which judge, among which labels."""
        return {
            "judge": self.name,
            "version": self.config.version,
            "mode": self.mode,
            "labels": len(self.labels),
            "label_prompts": dict(self.config.labels),
        }
