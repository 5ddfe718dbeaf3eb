"""Trains the miniature's judge: a small CLIP, and a plain CNN as second opinion. It is trained only on drawn pictures,
never on generated images, and shares nothing with the diffusion model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from realera.judges.miniature_net import JudgeConfig, MiniatureCLIP, PlainCNN, split_words
from realera.miniature.training_tools import Log, fit, to_tensor
from realera.miniature.world import Subject, World

PROMPTS = {
    "object": "a photo of the {}",
    "unsafe": "a photo of the {}",
    "everyday": "a photo of the {}",
    "celebrity": "a portrait of {}",
    "style": "an artwork by {}",
    "person": "a portrait of a {}",
    "scene": "a photo of the empty {}",
    "painting": "a {}",
}


def judge_config(world: World) -> JudgeConfig:
    """The judge's labels with their prompts, and its vocabulary: every word of every caption."""
    labels = {label: PROMPTS[kind].format(label) for kind, names in world.labels.items() for label in names}
    captions = [*world.all_captions(), *labels.values()]
    words = sorted({word for text in captions for word in split_words(text)})
    return JudgeConfig(words=tuple(words), labels=labels)


def roughen(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Adds blur, noise, a shift of up to 2 px and a change of contrast, because generated images are less clean than
    drawn pictures. There is no rotation or scaling, so that held-out poses stay unseen."""
    batch = len(pictures)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    shift_y, shift_x = (int(v) for v in torch.randint(-2, 3, (2,), generator=generator))
    pictures = torch.roll(F.pad(pictures, (2, 2, 2, 2), mode="replicate"), (shift_y, shift_x), (2, 3))[..., 2:-2, 2:-2]
    soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    blur = (draw(batch, 1, 1, 1) * 1.4 - 0.4).clamp(0, 1)
    pictures = pictures * (1 - blur) + soft * blur
    pictures = pictures * (0.85 + 0.3 * draw(batch, 1, 1, 1)) + (draw(batch, 3, 1, 1) - 0.5) * 0.12
    noise = torch.randn(pictures.shape, generator=generator) * 0.10 * draw(batch, 1, 1, 1)
    return (pictures + noise).clamp(-1, 1).contiguous(memory_format=torch.channels_last)


def train_judge(
    world: World, pictures: np.ndarray, subjects: Sequence[Subject], workdir: Path, steps: int, seed: int, log: Log
) -> tuple[JudgeConfig, MiniatureCLIP, PlainCNN]:
    """Trains both networks in steps of 64 pictures; returns their averages, in eval mode."""
    torch.manual_seed(seed)
    config = judge_config(world)
    rows = {label: row for row, label in enumerate(config.labels)}
    target = torch.tensor([rows[subject.label] for subject in subjects])
    prompts = list(config.labels.values())
    clip, plain = MiniatureCLIP(config), PlainCNN(config)
    for net in (clip, plain):
        net.to(memory_format=torch.channels_last)

    def batch(rng: np.random.Generator, generator: torch.Generator) -> tuple[np.ndarray, Tensor, Tensor]:
        index = np.sort(rng.integers(len(pictures), size=64))
        return index, roughen(to_tensor(pictures[index]), generator), target[torch.from_numpy(index)]

    def clip_loss(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        index, images, labels = batch(rng, generator)
        said = [draw_caption(world, subjects[i], rng) for i in index]
        with torch.autocast("cpu", torch.bfloat16):
            seen = clip.encode_image(images)
            words = clip.encode_text([*prompts, *said])
        logits = clip.scale * seen @ words.T
        same = (labels[:, None] == labels[None]).float()
        both = logits[:, len(prompts) :]
        contrast = soft_cross_entropy(both, same) + soft_cross_entropy(both.T, same.T)
        return F.cross_entropy(logits[:, : len(prompts)], labels, label_smoothing=0.02) + 0.5 * contrast

    def plain_loss(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        _, images, labels = batch(rng, generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = plain(images)
        return F.cross_entropy(logits, labels, label_smoothing=0.02)

    clip = fit(clip, clip_loss, workdir / "judge_clip.pt", steps, 2e-3, seed, log, decay=0.995)  # type: ignore[assignment]
    plain = fit(plain, plain_loss, workdir / "judge_plain.pt", steps, 3e-3, seed + 1, log, decay=0.995)  # type: ignore[assignment]
    return config, clip.eval(), plain.eval()


def soft_cross_entropy(logits: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy whose target is uniform over all matches of a row."""
    return -(F.log_softmax(logits, -1) * same).sum(-1).div(same.sum(-1)).mean()


def draw_caption(world: World, subject: Subject, rng: np.random.Generator) -> str:
    """A random caption of a subject, drawn by its weight."""
    texts, weights = zip(*world.captions(subject), strict=True)
    return str(texts[int(rng.choice(len(texts), p=np.array(weights) / sum(weights)))])


@torch.no_grad()
def measure_judge(
    config: JudgeConfig, clip: MiniatureCLIP, plain: PlainCNN, pictures: np.ndarray, subjects: Sequence[Subject]
) -> dict[str, Any]:
    """Top-1 accuracy in percent for each kind, among all labels of the world, for both networks; and the CLIP's
    calibration error (ECE, percent)."""
    labels = list(config.labels)
    words = clip.encode_text(list(config.labels.values()))
    probs, second = [], []
    for start in range(0, len(pictures), 256):
        images = to_tensor(pictures[start : start + 256])
        probs.append((clip.scale * clip.encode_image(images) @ words.T).softmax(-1))
        second.append(plain(images).argmax(-1))
    prob, other = torch.cat(probs), torch.cat(second)
    target = torch.tensor([labels.index(subject.label) for subject in subjects])
    sure, choice = prob.max(-1)
    right = (choice == target).float()
    kinds = [subject.kind for subject in subjects]
    table: dict[str, Any] = {"ece": calibration_error(sure, right)}
    for kind in sorted(set(kinds)):
        rows = torch.tensor([k == kind for k in kinds])
        table[kind] = {
            "n": int(rows.sum()),
            "clip": round(100 * float(right[rows].mean()), 2),
            "plain": round(100 * float((other == target)[rows].float().mean()), 2),
        }
    return table


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 10) -> float:
    """Expected calibration error in percent over equal-width bins."""
    place = (confidence * bins).long().clamp(max=bins - 1)
    gaps = [
        (confidence[place == b].mean() - right[place == b].mean()).abs() * (place == b).float().mean()
        for b in range(bins)
        if (place == b).any()
    ]
    return round(100 * float(torch.stack(gaps).sum()), 2)
