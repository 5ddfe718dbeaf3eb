"""The text encoders of diffusion transformers: Stable Diffusion 3 (two CLIPs and T5), FLUX (T5, and CLIP's pooled
state), as one encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from realera.backbones.text import (
    LatestStates,
    TextEncoder,
    named_rows,
    padded_ids,
    plain_text,
    refuse_not_finite,
    rows_of_name,
    shortened,
    side_by_side,
)
from realera.contracts import NamedPrompt, TextStates, UserError

ROWS = 8192  # token rows in one pass of T5


class T5Encoder:
    """T5's tokenizer and encoder. It has no begin row; a text ends with </s>, and the pads after it are read as well,
    without a mask, as diffusers does. States are float32, whatever the model's dtype is. length: token rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: T5EncoderModel, length: int) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.length = length
        self.width = int(model.config.d_model)

    def __call__(self, texts: Sequence[str | NamedPrompt]) -> TextStates:
        """States (B, length, D) on the model's device. Raises UserError if a name is cut off (see `rows`)."""
        device = self.model.device
        ids = padded_ids(self.tokenizer, texts, self.length).to(device)
        states = [self.model(input_ids=part)[0].float() for part in ids.split(max(1, ROWS // self.length))]
        found = torch.cat(states) if states else torch.zeros(0, self.length, self.width, device=device)
        refuse_not_finite(texts, found, "copy the checkpoint's T5 again, or set backbone.t5=bfloat16")
        first, last = named_rows(texts, self.rows, device)
        return TextStates(found, first, last, (ids == self.tokenizer.eos_token_id).int().argmax(dim=1))

    def rows(self, prompt: NamedPrompt) -> tuple[int, int]:
        """Rows of the first and last sub-token of the prompt's name. Raises UserError if the name has no token, or if
        the limit cuts off a part of it."""
        hits = rows_of_name(self.tokenizer, prompt)
        if not hits:
            raise UserError(
                f"T5's tokenizer finds no part of {shortened(prompt.name)!r} in {shortened(prompt.text)!r}; write the "
                "concept in other letters."
            )
        if hits[-1] > self.length - 2:  # the last row is for the end-of-text token
            raise UserError(
                f"The prompt {shortened(prompt.text)!r} is cut at {self.length} tokens of T5 before the end of "
                f"{shortened(prompt.name)!r}; shorten it, or set backbone.t5_length higher."
            )
        return hits[0], hits[-1]


class JointText:
    """The text encoders of a transformer as one: `common.Text`. The latest states are kept in memory, because T5 is
    large and methods encode the same texts again."""

    length: int
    width: int
    pooled_width: int

    def __init__(self, clips: Sequence[TextEncoder], t5: T5Encoder | None) -> None:
        self.clips, self.t5 = list(clips), t5
        self._latest = LatestStates()

    def __call__(
        self, texts: Sequence[str | NamedPrompt], to_end: bool = False, weights: str | None = "loaded"
    ) -> TextStates:
        """All rows, whatever `to_end` says: T5's rows read those after them too. weights: as in `TextEncoder`."""
        if weights is None:
            return self._encode(texts, weights)
        key = (weights, str(self.clips[0].model.device), tuple(texts))
        return self._latest.get(key, lambda: self._encode(texts, weights))

    def _encode(self, texts: Sequence[str | NamedPrompt], weights: str | None) -> TextStates:
        raise NotImplementedError

    def with_vectors(self, texts: Sequence[str | NamedPrompt], vectors: Tensor) -> TextStates:
        raise UserError(
            "Vectors cannot replace a name's tokens in this model: its text encoders split the name into different "
            "numbers of tokens. Use text that can be typed, or a backbone with one text encoder."
        )

    def vectors(self, text: str) -> Tensor:
        raise UserError(
            "A name has no single row of token vectors in this model, which has several text encoders: use a backbone "
            "with one text encoder."
        )

    def tokens(self, texts: Sequence[str]) -> list[set[int]]:
        """As `TextEncoder.tokens`, of the first CLIP."""
        return self.clips[0].tokens(texts)

    def words(self) -> list[str]:
        """As `TextEncoder.words`, of the first CLIP."""
        return self.clips[0].words()

    def token_embeddings(self) -> Tensor:
        raise UserError(
            "A token has no single embedding in this model, which has several text encoders: attack it with text that "
            "can be typed, or use a backbone with one text encoder."
        )

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """As `TextEncoder.token_ids`, of the first CLIP; also the next two."""
        return self.clips[0].token_ids(texts)

    def text_of(self, ids: Sequence[int]) -> str:
        return self.clips[0].text_of(ids)

    def writable_tokens(self) -> list[int]:
        return self.clips[0].writable_tokens()

    def rows(self, prompt: NamedPrompt) -> tuple[int, int]:
        raise NotImplementedError

    def forget(self) -> None:
        self._latest.clear()
        for clip in self.clips:
            clip.forget()

    def to(self, device: Any) -> None:
        for clip in self.clips:
            clip.to(device)
        if self.t5 is not None:
            self.t5.model.to(device)


class SD3Text(JointText):
    """Stable Diffusion 3: the rows of two CLIPs side by side, filled up with zeros to `width`, and below them T5's
    rows.

    t5 None: `t5_length` rows of zeros, as in diffusers. The pooled states of both CLIPs are joined.
    """

    def __init__(self, one: TextEncoder, two: TextEncoder, t5: T5Encoder | None, width: int, t5_length: int) -> None:
        super().__init__([one, two], t5)
        self.width = width
        self.length = one.length + t5_length
        self.t5_length = t5_length
        self.pooled_width = one.pooled_width + two.pooled_width

    def _encode(self, texts: Sequence[str | NamedPrompt], weights: str | None) -> TextStates:
        one, two = (clip(texts, weights=weights) for clip in self.clips)
        both = side_by_side(texts, one, two)
        assert one.pooled is not None and two.pooled is not None
        count, above = len(both.states), both.states.shape[1]
        states = F.pad(both.states, (0, self.width - both.states.shape[2]))
        if self.t5 is None:
            below = states.new_zeros(count, self.t5_length, self.width)
            end = torch.full_like(both.length, above)
            missing = torch.full_like(both.length, -1)
            marks = _marks(above, missing, missing, end, self.t5_length)
        else:
            read = self.t5(texts)
            below = read.states
            named = read.first >= 0
            first, last = (torch.where(named, row + above, row) for row in (read.first, read.last))
            marks = _marks(above, first, last, read.length + above, 0)
        return replace(
            both,
            states=torch.cat([states, below.to(states.device)], dim=1),
            pooled=torch.cat([one.pooled, two.pooled], dim=1),
            parts=torch.stack([_marks(0, both.first, both.last, both.length, 1), marks], dim=1),
        )

    def rows(self, prompt: NamedPrompt) -> tuple[int, int]:
        """As `TextEncoder.rows`, of CLIP; T5 must not cut the name either."""
        if self.t5 is not None:
            self.t5.rows(prompt)
        return self.clips[0].rows(prompt)


class FluxText(JointText):
    """FLUX: T5's rows, and the pooled state of CLIP, which may cut a long prompt."""

    def __init__(self, clip: TextEncoder, t5: T5Encoder) -> None:
        super().__init__([clip], t5)
        self.width, self.length = t5.width, t5.length
        self.pooled_width = clip.pooled_width
        self._t5 = t5

    def _encode(self, texts: Sequence[str | NamedPrompt], weights: str | None) -> TextStates:
        read = self._t5(texts)
        pooled = self.clips[0](list(map(plain_text, texts)), weights=weights).pooled
        parts = _marks(0, read.first, read.last, read.length, 0)[:, None]
        return replace(read, pooled=pooled, parts=parts)

    def rows(self, prompt: NamedPrompt) -> tuple[int, int]:
        return self._t5.rows(prompt)


def _marks(start: int, first: Tensor, last: Tensor, end: Tensor, begins: int) -> Tensor:
    """(B, 5) int64: one encoder's entry of `TextStates.parts`."""
    fixed = [torch.full_like(first, number) for number in (start, begins)]
    return torch.stack([fixed[0], first, last, end, fixed[1]], dim=1)


# --- T5 in eight bits ------------------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """A linear layer without a bias, its weight int8 (out, in) with one scale for each output, max |w| / 127."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight.float() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.to(weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


def quantise(model: nn.Module) -> None:
    """Replaces all linear layers of a T5 encoder by `Int8Linear`. Half of bfloat16's memory; the states change by about
    one percent."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
