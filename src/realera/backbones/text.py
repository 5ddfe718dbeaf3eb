"""Prompts to text states, and where in a prompt a concept stands."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

from realera.contracts import NamedPrompt, TextStates, UserError
from realera.files import finite

BATCH = 64  # prompts of full length in one forward of the text encoder; of shorter ones more
KEPT = 64 << 20  # bytes of text states that are kept for when the same prompts are asked again
WORD_END = "</w>"  # of a token of CLIP's after which a word has ended
LETTERS = 3  # of a word that is worth asking for
BATCH_OF_ALL_LAYERS = 16  # where every layer's states are kept: a few hundred MB


class TextEncoder:
    """CLIP's tokenizer and text model, always in float32: closed-form edits are sums over these states.

    Padding is the tokenizer's own: SD 1.x pads with the end-of-text token, SD 2.x and the second encoder of SDXL with
    "!". penultimate: the states of the last layer but one, without the final norm, as SDXL reads them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: CLIPTextModel | CLIPTextModelWithProjection,
        length: int | None = None,
        penultimate: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.penultimate = penultimate
        limit = int(model.config.max_position_embeddings)
        self.length = min(tokenizer.model_max_length, limit) if length is None else length
        self.width = int(model.config.hidden_size)
        projected = isinstance(model, CLIPTextModelWithProjection)
        self.pooled_width = int(model.config.projection_dim) if projected else 0
        self._kept: OrderedDict[tuple[Any, ...], TextStates] = OrderedDict()  # by the whole list, so bit for bit
        probe = tokenizer("a")["input_ids"]
        if tokenizer.eos_token_id is None or tokenizer.eos_token_id not in probe[1:]:
            raise UserError(
                "The tokenizer puts no end-of-text token behind a prompt, as CLIP's does; copy or download the "
                "checkpoint's tokenizer again."
            )
        if not 3 <= self.length <= limit:
            raise UserError(
                f"backbone.text_length={length} cannot be: this text encoder takes 3 to {limit} tokens; choose a "
                "length between them."
            )

    def __call__(self, texts: Sequence[str | NamedPrompt], to_end: bool = False) -> TextStates:
        """States (B, T, D) float32 on the model's device; rows as `contracts.TextStates` says; `pooled` is the
        projected state of the end of the text, where the model has one. to_end: rows behind a text's end are not
        computed, which changes no other: attention looks back only.

        Raises UserError where a name was cut off (see `rows`).
        """
        key = (str(self.model.device), to_end, tuple(texts))
        found = self._kept.pop(key, None) or self._read(texts, to_end)
        if found.states.nbytes > KEPT:  # a data set's captions: nobody waits for all of them again
            return found
        self._kept[key] = found  # the latest last
        while sum(one.states.nbytes for one in self._kept.values()) > KEPT:
            self._kept.popitem(last=False)
        return _copy(found)

    @torch.no_grad()
    def _read(self, texts: Sequence[str | NamedPrompt], to_end: bool) -> TextStates:
        device = self.model.device
        ids = self._tokens(texts)
        length = (ids == self.tokenizer.eos_token_id).int().argmax(dim=1)
        sizes = length + 1 if to_end else torch.full_like(length, self.length)
        rows = [self.rows(text) if isinstance(text, NamedPrompt) else (-1, -1) for text in texts]
        # Under no_grad, not inference_mode: a training forward saves these states for its backward, which inference
        # tensors forbid.
        states = torch.zeros(len(texts), int(sizes.max()) if len(texts) else self.length, self.width, device=device)
        pooled = torch.zeros(len(texts), self.pooled_width, device=device) if self.pooled_width else None
        for here in self._batches(sizes):
            size = int(sizes[here[0]])  # the longest of them
            out = self.model(input_ids=ids[here, :size].to(device), output_hidden_states=self.penultimate)
            states[here, :size] = out.hidden_states[-2] if self.penultimate else out.last_hidden_state
            if pooled is not None:
                pooled[here] = out.text_embeds
        if to_end:
            states *= torch.arange(states.shape[1], device=device)[:, None] < sizes.to(device)[:, None, None]
        self._refuse_not_finite(texts, states, "copy or download the checkpoint's text encoder again")
        first, last = torch.tensor(rows, dtype=torch.int64, device=device).reshape(-1, 2).unbind(1)
        return TextStates(
            states=states,
            first=first,
            last=last,
            length=length.to(device),
            pooled=pooled,
        )

    def _batches(self, sizes: Tensor) -> Iterator[Tensor]:
        """Numbers of texts that go through the model together, the longest ones first; as many as fit into the memory
        that `BATCH` full ones take."""
        rows = (BATCH_OF_ALL_LAYERS if self.penultimate else BATCH) * self.length
        order = sizes.argsort(descending=True, stable=True)
        start = 0
        while start < len(order):
            end = start + max(1, rows // int(sizes[order[start]]))
            yield order[start:end]
            start = end

    def forget(self) -> None:
        """Drops the text states that are kept."""
        self._kept.clear()

    def vectors(self, text: str) -> Tensor:
        """(n, D) float32, a copy: the rows of the token table that the text's n sub-tokens stand for."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.model.get_input_embeddings().weight[ids].detach().clone()

    def with_vectors(self, texts: Sequence[str | NamedPrompt], vectors: Tensor) -> TextStates:
        """As `__call__`, the n rows of `vectors` (n, D) standing in each text where the sub-tokens of its name did; the
        states have their gradient.

        Raises UserError as `__call__` does, for the text as it becomes.
        """
        device, count = self.model.device, len(vectors)
        spans = [self.rows(text) for text in texts if isinstance(text, NamedPrompt)]
        first = torch.tensor([start for start, _ in spans])
        rows = []
        for ids, text, (start, end) in zip(self._tokens(texts), texts, spans, strict=True):
            if start + count > self.length - 1:
                raise UserError(
                    f"The prompt {_short(_text(text))!r} is cut at {self.length} tokens before the end of {count} "
                    "vectors; shorten it, or take fewer."
                )
            # What stands for the vectors is an ordinary token, not the end of the text that `length` looks for.
            kept = torch.cat([ids[:start], torch.zeros(count, dtype=ids.dtype), ids[end + 1 :]])[: self.length]
            pads = kept.new_full((self.length - len(kept),), int(self.tokenizer.pad_token_id or 0))
            kept = torch.cat([kept, pads])
            if not (kept == self.tokenizer.eos_token_id).any():
                kept[-1] = self.tokenizer.eos_token_id
            rows.append(kept)
        ids = torch.stack(rows).to(device)

        def put(module: Any, inputs: Any, output: Tensor) -> Tensor:
            output = output.clone()
            for row, start in enumerate(first.tolist()):
                output[row, start : start + count] = vectors.to(output)
            return output

        hook = self.model.get_input_embeddings().register_forward_hook(put)
        try:
            out = self.model(input_ids=ids, output_hidden_states=self.penultimate)
        finally:
            hook.remove()
        states = out.hidden_states[-2] if self.penultimate else out.last_hidden_state
        self._refuse_not_finite(texts, states, "lower the learning rate of the vectors (method.align.inversion.lr)")
        return TextStates(
            states=states,
            first=first.to(device),
            last=first.to(device) + count - 1,
            length=(ids == self.tokenizer.eos_token_id).int().argmax(dim=1),
            pooled=out.text_embeds if self.pooled_width else None,
        )

    @staticmethod
    def _refuse_not_finite(texts: Sequence[str | NamedPrompt], states: Tensor, remedy: str) -> None:
        if finite.first_bad([("states", states)]) is not None:
            text = texts[int((~states.flatten(1).isfinite().all(dim=1)).int().argmax())]
            raise finite.NotFinite(f"The text states of {_short(_text(text))!r} hold NaN or infinity: {remedy}.")

    def tokens(self, texts: Sequence[str]) -> list[set[int]]:
        """The ids of each text's sub-tokens, without those that begin, end and pad it; as many as are read."""
        found = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        return [set(ids[: self.length - 2]) for ids in found]

    def words(self) -> list[str]:
        """Whole words of at least `LETTERS` letters, a to z, that the tokenizer has a token for: in the order of their
        numbers, which in CLIP's vocabulary is that of how often its captions held them."""
        known = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        ended = (token.removesuffix(WORD_END) for token, _ in known if token.endswith(WORD_END))
        return [word for word in ended if len(word) >= LETTERS and word.isascii() and word.isalpha()]

    def to(self, device: Any) -> None:
        self.model.to(device)

    def rows(self, prompt: NamedPrompt) -> tuple[int, int]:
        """Rows of the first and last sub-token of the prompt's name.

        Raises UserError where the name is empty, or where the token limit cuts it off or through.
        """
        # The whole prompt, not the cut one: only so is it known whether the name's last sub-token was lost.
        offsets = self.tokenizer(prompt.text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        hits = [row for row, (start, end) in enumerate(offsets) if start < prompt.end and end > prompt.start]
        if not hits:
            said = f"no part of {_short(prompt.name)!r}" if prompt.name.strip() else "no name"
            raise UserError(
                f"The tokenizer finds {said} in {_short(prompt.text)!r}; write the concept in other letters."
            )
        if hits[-1] > self.length - 2:  # the last row is the end-of-text token's
            raise UserError(
                f"The prompt {_short(prompt.text)!r} is cut at {self.length} tokens before the end of "
                f"{_short(prompt.name)!r}; shorten it or move the concept forward."
            )
        return hits[0], hits[-1]

    def _tokens(self, texts: Sequence[str | NamedPrompt]) -> Tensor:
        if not texts:
            return torch.zeros(0, self.length, dtype=torch.int64)
        found: Any = self.tokenizer(
            list(map(_text, texts)), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        return torch.as_tensor(found["input_ids"])


class PairedTextEncoder:
    """The two text encoders of SDXL: rows joined along the width, D = D1 + D2, and the second one's pooled state.

    A joined row is one vector everywhere: a closed form maps it as a whole, because that is what W_K and W_V read. The
    parts are not normed and differ in scale; a distance or cosine of joined rows is ruled by the part that is longer.
    """

    def __init__(self, first: TextEncoder, second: TextEncoder) -> None:
        if first.length != second.length:
            raise UserError(
                f"The text encoders take {first.length} and {second.length} tokens; set backbone.text_length to the "
                "smaller number."
            )
        self.first, self.second = first, second
        self.length = first.length
        self.width = first.width + second.width
        self.pooled_width = second.pooled_width

    def __call__(self, texts: Sequence[str | NamedPrompt], to_end: bool = False) -> TextStates:
        """As `TextEncoder`. Raises UserError too where the two tokenizers part a text differently."""
        return self._joined(texts, self.first(texts, to_end), self.second(texts, to_end))

    def forget(self) -> None:
        self.first.forget()
        self.second.forget()

    def vectors(self, text: str) -> Tensor:
        """As `TextEncoder.vectors`, of both tables."""
        return torch.cat([self.first.vectors(text), self.second.vectors(text)], dim=-1)

    def with_vectors(self, texts: Sequence[str | NamedPrompt], vectors: Tensor) -> TextStates:
        """As `TextEncoder.with_vectors`, each encoder with its part of the width."""
        one, two = vectors.split([self.first.width, self.second.width], dim=-1)
        return self._joined(texts, self.first.with_vectors(texts, one), self.second.with_vectors(texts, two))

    def _joined(self, texts: Sequence[str | NamedPrompt], one: TextStates, two: TextStates) -> TextStates:
        for name in ("first", "last", "length"):
            differs = (getattr(one, name) != getattr(two, name)).nonzero()
            if len(differs):
                raise UserError(
                    f"The two tokenizers part the prompt {_short(_text(texts[int(differs[0])]))!r} differently; give a "
                    "checkpoint whose tokenizers share their words."
                )
        return replace(two, states=torch.cat([one.states, two.states], dim=-1))

    def rows(self, prompt: NamedPrompt) -> tuple[int, int]:
        """As `TextEncoder.rows`; the two tokenizers share their words."""
        return self.first.rows(prompt)

    def tokens(self, texts: Sequence[str]) -> list[set[int]]:
        """As `TextEncoder`; the two tokenizers share their words."""
        return self.first.tokens(texts)

    def words(self) -> list[str]:
        """As `TextEncoder`; the two tokenizers share their words."""
        return self.first.words()

    def to(self, device: Any) -> None:
        self.first.to(device)
        self.second.to(device)


def _copy(found: TextStates) -> TextStates:
    """The same values in memory of their own: what a caller does to them stays the caller's."""
    pooled = None if found.pooled is None else found.pooled.clone()
    first, last, length = found.first.clone(), found.last.clone(), found.length.clone()
    return TextStates(found.states.clone(), first, last, length, pooled)


def _text(prompt: str | NamedPrompt) -> str:
    return prompt.text if isinstance(prompt, NamedPrompt) else prompt


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
