"""The miniature judge's networks: a small CLIP (CNN image tower, word-level text tower) and a plain CNN.

They share no layer, tokenizer or text encoder with the diffusion model that they judge. Images are (B, 3, H, W) in [-1,
1]; E is the joint width. They use BatchNorm, which is several times faster than GroupNorm on a CPU; in eval mode an
image's verdict does not depend on the rest of the batch (an EMA of the weights must also copy the buffers).
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from realera.files import json_shapes, plain_data
from realera.system.disk import atomic, write_text

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_START, _PAD = 0, 1  # rows of the word table before the first word
_MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's own bound


@dataclass(frozen=True)
class JudgeConfig:
    """The sizes of the two networks, stored as `config.json` in the folder of the weights.

    words: the text tower's vocabulary, in the form that `split_words` returns. labels {label: its prompt}: every
    concept of the world, in the order of the plain CNN's classes. channels: widths at full, half and quarter
    resolution.
    """

    words: tuple[str, ...]
    labels: Mapping[str, str]
    channels: tuple[int, int, int] = (48, 96, 160)
    plain_channels: tuple[int, int, int] = (32, 64, 128)
    width: int = 128  # E
    text_layers: int = 2
    text_heads: int = 4
    max_words: int = 32
    version: int = 1


def _count(most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and 0 < value <= most


_WIDTH = _count(8192)
_WIDTHS = lambda value: json_shapes.fits(value, [_WIDTH]) and len(value) == 3  # noqa: E731
CONFIG_SHAPE: Mapping[str, Any] = {  # of config.json; the bounds refuse networks that are too large to build
    "words": [str],
    "labels": lambda value: bool(value) and json_shapes.fits(value, {...: str}),
    "channels?": _WIDTHS,
    "plain_channels?": _WIDTHS,
    "width?": _WIDTH,
    "text_layers?": _count(100),
    "text_heads?": _WIDTH,
    "max_words?": _WIDTH,
    "version?": _count(2**31),
}


def config_fault(raw: Any) -> str | None:
    """The error in the content of a config.json, such as "has no valid text_layers"; None if there is none."""
    if not isinstance(raw, dict):
        return "has no settings"
    known = {key.removesuffix("?"): key for key in CONFIG_SHAPE}
    if strange := next((key for key in raw if key not in known), None):
        return f"has the unknown setting {strange!r:.60}"
    wrong = (name for name, key in known.items() if not json_shapes.fits(raw, {key: CONFIG_SHAPE[key]}))
    if (found := next(wrong, None)) is not None:
        return f"has no valid {found}"
    width, heads = (raw.get(name, getattr(JudgeConfig, name)) for name in ("width", "text_heads"))
    return f"has text_heads={heads}, which does not divide width={width}" if width % heads else None


def split_words(text: str) -> list[str]:
    """Lower-case words without accents or punctuation: "An-225, Dalí's" -> ["an", "225", "dali's"]."""
    plain = unicodedata.normalize("NFKD", text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", "".join(c for c in plain if not unicodedata.combining(c)))


class _Residual(nn.Module):
    """x + two 3 x 3 convolutions. The second BatchNorm starts at zero, so a new block adds nothing to x."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv(channels, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(x + self.norm(self.second(self.first(x))))


def _conv(inside: int, outside: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(inside, outside, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.SiLU())


class _Pool(nn.Module):
    """Global average: (B, C, h, w) -> (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


class TextTower(nn.Module):
    """Words -> (B, E): word embeddings, learned positions, a small transformer, and the mean over the words.

    Words that are not in the table are skipped. A text with no known word gets the embedding of the start row.
    """

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.index = {word: row + 2 for row, word in enumerate(config.words)}
        self.max_words = config.max_words
        self.words = nn.Embedding(len(config.words) + 2, config.width, padding_idx=_PAD)
        self.positions = nn.Parameter(torch.randn(config.max_words, config.width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            config.width, config.text_heads, 2 * config.width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, config.text_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, config.width)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """(B, L) int64 on the CPU: start row, known words, padding. L is the length of the longest text, at most
        max_words."""
        rows = [[_START, *(self.index[w] for w in split_words(t) if w in self.index)][: self.max_words] for t in texts]
        longest = max((len(row) for row in rows), default=1)
        return torch.tensor([row + [_PAD] * (longest - len(row)) for row in rows], dtype=torch.long).reshape(
            -1, longest
        )

    def known(self, text: str) -> bool:
        """Whether every word of the text is in the table."""
        return all(word in self.index for word in split_words(text))

    def forward(self, tokens: Tensor) -> Tensor:
        padded = tokens == _PAD
        x = self.words(tokens) + self.positions[: tokens.shape[1]]
        x = self.norm(self.layers(x, src_key_padding_mask=padded))
        weight = (~padded).to(x.dtype).unsqueeze(-1)
        pooled: Tensor = self.out((x * weight).sum(dim=1) / weight.sum(dim=1))
        return pooled


class MiniatureCLIP(nn.Module):
    """Two towers and a temperature. Embeddings are L2-normalised; logits = exp(logit_scale) * cosine."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        full, half, quarter = config.channels
        self.image = nn.Sequential(
            _conv(3, full),
            _Residual(full),
            _conv(full, half, stride=2),
            _Residual(half),
            _conv(half, quarter, stride=2),
            _Residual(quarter),
            _Residual(quarter),
            _Pool(),
            nn.Linear(quarter, config.width),
        )
        self.text = TextTower(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def scale(self) -> Tensor:
        """exp(logit_scale), at most 100."""
        return self.logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp()

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, E), unit length."""
        return functional.normalize(self.image(images).float(), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(B, E), unit length."""
        tokens = self.text.tokenize(texts).to(self.logit_scale.device)
        return functional.normalize(self.text(tokens).float(), dim=-1)

    def forward(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Logits (images, texts)."""
        return self.scale * self.encode_image(images) @ self.encode_text(texts).T


class PlainCNN(nn.Module):
    """A separate CNN (5 x 5 stem, no residuals) with a linear classifier over the world's labels: (B, labels)."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        full, half, quarter = config.plain_channels
        self.layers = nn.Sequential(
            _conv(3, full, size=5),
            _conv(full, half, stride=2),
            _conv(half, half),
            _conv(half, quarter, stride=2),
            _conv(quarter, quarter),
            _Pool(),
            nn.Linear(quarter, len(config.labels)),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits.float()


def save_judge(folder: Path, config: JudgeConfig, clip: MiniatureCLIP, plain: PlainCNN) -> None:
    """Writes `config.json` and `model.safetensors` (float16; integer tensors keep their type)."""
    parts = {"clip": clip, "plain": plain}
    state = {f"{part}.{key}": value for part, net in parts.items() for key, value in net.state_dict().items()}
    half = {k: (v.half() if v.is_floating_point() else v).contiguous().cpu() for k, v in state.items()}
    with atomic(folder / WEIGHTS_FILE) as beside:
        save_file(half, beside, metadata={"version": str(config.version)})
    write_text(folder / CONFIG_FILE, json.dumps(asdict(config), indent=1, ensure_ascii=False) + "\n")


def load_judge(folder: Path) -> tuple[JudgeConfig, MiniatureCLIP, PlainCNN]:
    """Both networks in eval mode, float32, on the CPU.

    Raises OSError, ValueError, KeyError, TypeError, RuntimeError or SafetensorError if the folder has no complete
    judge.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if (folder / name).exists() and not (folder / name).is_file():  # reading a pipe would block
            raise OSError(f"{name} is not a file")
    raw = plain_data.read_json(folder / CONFIG_FILE)
    if (fault := config_fault(raw)) is not None:
        raise ValueError(f"{CONFIG_FILE} {fault}")
    raw.update({key: tuple(raw[key]) for key in ("words", "channels", "plain_channels") if key in raw})
    config = JudgeConfig(**raw)
    state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / WEIGHTS_FILE).items()}
    clip, plain = MiniatureCLIP(config), PlainCNN(config)
    for part, net in (("clip", clip), ("plain", plain)):
        net.load_state_dict({k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.")})
        net.eval().requires_grad_(False)
    return config, clip, plain
