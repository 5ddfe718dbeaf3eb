"""Encodes prompts as text states, and finds the token rows of a concept's name in a prompt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

from realera.contracts import NamedPrompt, TextStates, UserError
from realera.files import finite

BATCH = 64  # prompts of full length in one forward pass of the text encoder; more if they are shorter
KEPT = 64 << 20  # bytes of text states in the memory cache
WORD_END = "</w>"  # suffix of a CLIP token that ends a word
LETTERS = 3  # minimum length of the words in `words`
NO_CHARACTER = "\ufffd"  # in place of bytes that are no character
BATCH_OF_ALL_LAYERS = 16  # as BATCH, when the states of every layer are in memory: a few hundred MB


def _bytes() -> dict[str, bytes]:
    """{letter: byte} of byte-level BPE, whose tokens spell bytes as letters: printable bytes as themselves, the others
    as the letters from U+0100."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {
        **{chr(byte): bytes([byte]) for byte in plain},
        **{chr(256 + number): bytes([byte]) for number, byte in enumerate(others)},
    }


BYTES = _bytes()


class TextEncoder:
    """CLIP's tokenizer and text model, always in float32 because closed-form edits are sums over these states.

    Padding is the tokenizer's own: SD 1.x pads with the end-of-text token, SD 2.x and the second encoder of SDXL with
    "!". penultimate: return the states of the second-last layer, without the final norm, as SDXL reads them. pooled:
    also return the end-of-text state of a model without a projection, as FLUX reads it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: CLIPTextModel | CLIPTextModelWithProjection,
        length: int | None = None,
        penultimate: bool = False,
        pooled: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.penultimate = penultimate
        limit = int(model.config.max_position_embeddings)
        self.length = min(tokenizer.model_max_length, limit) if length is None else length
        self.width = int(model.config.hidden_size)
        self.projected = isinstance(model, CLIPTextModelWithProjection)
        self.pooled_width = int(model.config.projection_dim) if self.projected else self.width if pooled else 0
        self._latest = LatestStates()
        probe = tokenizer("a")["input_ids"]
        if tokenizer.eos_token_id is None or tokenizer.eos_token_id not in probe[1:]:
            raise UserError(
                "The tokenizer adds no end-of-text token to a prompt, as CLIP's does; copy or download the "
                "checkpoint's tokenizer again."
            )
        if not 3 <= self.length <= limit:
            raise UserError(
                f"backbone.text_length={length} is not possible: this text encoder takes 3 to {limit} tokens; choose a "
                "length in this range."
            )

    def __call__(
        self, texts: Sequence[str | NamedPrompt], to_end: bool = False, weights: str | None = "loaded"
    ) -> TextStates:
        """States (B, T, D) float32 on the model's device; see `contracts.TextStates`. `pooled` is the projected state
        of the text's end, if the model has one. to_end: do not compute the rows after a text's end. This does not
        change the other rows, because attention is causal. weights: a name of the model's weights as they are now,
        under which the states are kept; None = they are trained: the states are not kept and have gradients.

        Raises UserError if a name is cut off (see `rows`).
        """
        if weights is None:
            return self._encode(texts, to_end, "lower method.align.lr")
        key = (weights, str(self.model.device), to_end, tuple(texts))
        remedy = "copy or download the checkpoint's text encoder again"
        return self._latest.get(key, lambda: self._encode(texts, to_end, remedy))

    def _encode(self, texts: Sequence[str | NamedPrompt], to_end: bool, remedy: str) -> TextStates:
        device = self.model.device
        ids = padded_ids(self.tokenizer, texts, self.length)
        length = (ids == self.tokenizer.eos_token_id).int().argmax(dim=1)
        sizes = length + 1 if to_end else torch.full_like(length, self.length)
        first, last = named_rows(texts, self.rows, device)
        states = torch.zeros(len(texts), int(sizes.max()) if len(texts) else self.length, self.width, device=device)
        pooled = torch.zeros(len(texts), self.pooled_width, device=device) if self.pooled_width else None
        for here in self._batches(sizes):
            size = int(sizes[here[0]])  # of the batch's longest text
            out = self.model(input_ids=ids[here, :size].to(device), output_hidden_states=self.penultimate)
            states[here, :size] = out.hidden_states[-2] if self.penultimate else out.last_hidden_state
            if pooled is not None:
                pooled[here] = self._pooled(out)
        if to_end:
            states = states * (torch.arange(states.shape[1], device=device)[:, None] < sizes.to(device)[:, None, None])
        refuse_not_finite(texts, states, remedy)
        return TextStates(
            states=states,
            first=first,
            last=last,
            length=length.to(device),
            pooled=pooled,
        )

    def _batches(self, sizes: Tensor) -> Iterator[Tensor]:
        """Batches of text indices, the longest texts first. A batch takes at most the memory of `BATCH` full-length
        texts."""
        rows = (BATCH_OF_ALL_LAYERS if self.penultimate else BATCH) * self.length
        order = sizes.argsort(descending=True, stable=True)
        start = 0
        while start < len(order):
            end = start + max(1, rows // int(sizes[order[start]]))
            yield order[start:end]
            start = end

    def forget(self) -> None:
        """Empties the memory cache."""
        self._latest.clear()

    def vectors(self, text: str) -> Tensor:
        """(n, D) float32, a copy: the token embeddings of the text's n sub-tokens."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        result: Tensor = self.model.get_input_embeddings().weight[ids].detach().clone()
        return result

    def with_vectors(self, texts: Sequence[str | NamedPrompt], vectors: Tensor) -> TextStates:
        """As `__call__`, with the n rows of `vectors` (n, D) in place of the token embeddings of each text's name. The
        states have gradients with respect to `vectors`.

        Raises UserError if a text is then cut off before the last vector.
        """
        device, count = self.model.device, len(vectors)
        spans = [self.rows(text) for text in texts if isinstance(text, NamedPrompt)]
        first = torch.tensor([start for start, _ in spans])
        rows = []
        for ids, text, (start, end) in zip(padded_ids(self.tokenizer, texts, self.length), texts, spans, strict=True):
            if start + count > self.length - 1:
                raise UserError(
                    f"The prompt {shortened(plain_text(text))!r} is cut at {self.length} tokens before the end of "
                    f"{count} vectors; shorten it, or use fewer vectors."
                )
            # Token 0 is the placeholder of the vectors. It must not be the end-of-text token that `length` is found by.
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
        refuse_not_finite(texts, states, "lower the learning rate of the vectors (method.align.inversion.lr)")
        return TextStates(
            states=states,
            first=first.to(device),
            last=first.to(device) + count - 1,
            length=(ids == self.tokenizer.eos_token_id).int().argmax(dim=1),
            pooled=self._pooled(out) if self.pooled_width else None,
        )

    def _pooled(self, out: Any) -> Tensor:
        pooled: Tensor = out.text_embeds if self.projected else out.pooler_output
        return pooled

    def tokens(self, texts: Sequence[str]) -> list[set[int]]:
        """The ids of each text's sub-tokens, up to the token limit, without BOS, EOS and padding."""
        found = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        return [set(ids[: self.length - 2]) for ids in found]

    def words(self) -> list[str]:
        """The whole words of at least `LETTERS` letters, a to z, that are one token. Their order is that of the token
        ids, which in CLIP's vocabulary is the order of their frequency in its captions."""
        known = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        ended = (token.removesuffix(WORD_END) for token, _ in known if token.endswith(WORD_END))
        return [word for word in ended if len(word) >= LETTERS and word.isascii() and word.isalpha()]

    def token_embeddings(self) -> Tensor:
        """(V, D) float32: the embedding of every token id; not a copy."""
        table: Tensor = self.model.get_input_embeddings().weight
        return table.detach()

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """As `tokens`, in the text's order and with repeats."""
        found = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        return [list(ids[: self.length - 2]) for ids in found]

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of these tokens, without special tokens. Read again, it may give other tokens: two parts of words
        can be one word. Bytes that are no character give U+FFFD."""
        special = set(self.tokenizer.all_special_ids)
        pieces = self.tokenizer.convert_ids_to_tokens([int(token) for token in ids if int(token) not in special])
        letters = "".join(f"{piece.removesuffix(WORD_END)} " if piece.endswith(WORD_END) else piece for piece in pieces)
        return b"".join(BYTES.get(letter, letter.encode()) for letter in letters).decode(errors="replace").strip()

    def writable_tokens(self) -> list[int]:
        """The ids of the tokens that can be typed, in order: no special tokens, and no parts of characters."""
        ids = sorted(set(self.tokenizer.get_vocab().values()) - set(self.tokenizer.all_special_ids))
        texts = ((token, self.text_of([token])) for token in ids)
        return [token for token, text in texts if text and text.isprintable() and NO_CHARACTER not in text]

    def to(self, device: Any) -> None:
        self.model.to(device)

    def rows(self, prompt: NamedPrompt) -> tuple[int, int]:
        """Rows of the first and last sub-token of the prompt's name.

        Raises UserError if the name is empty, and if the token limit cuts off the name or a part of it.
        """
        hits = rows_of_name(self.tokenizer, prompt)
        if not hits:
            lacking = f"no part of {shortened(prompt.name)!r}" if prompt.name.strip() else "no name"
            raise UserError(
                f"The tokenizer finds {lacking} in {shortened(prompt.text)!r}; write the concept in other letters."
            )
        if hits[-1] > self.length - 2:  # the last row is for the end-of-text token
            raise UserError(
                f"The prompt {shortened(prompt.text)!r} is cut at {self.length} tokens before the end of "
                f"{shortened(prompt.name)!r}; shorten it or move the concept forward."
            )
        return hits[0], hits[-1]


class PairedTextEncoder:
    """The two text encoders of SDXL: their states are joined along the width, D = D1 + D2. The pooled state is that of
    the second encoder.

    A joined row is treated as one vector: a closed form maps the whole row, because W_K and W_V read the whole row. The
    two parts are not normalised and differ in scale, so the larger part dominates distances and cosines.
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

    def __call__(
        self, texts: Sequence[str | NamedPrompt], to_end: bool = False, weights: str | None = "loaded"
    ) -> TextStates:
        """As `TextEncoder`. Also raises UserError if the two tokenizers split a text differently."""
        return side_by_side(texts, self.first(texts, to_end, weights), self.second(texts, to_end, weights))

    def forget(self) -> None:
        self.first.forget()
        self.second.forget()

    def vectors(self, text: str) -> Tensor:
        """As `TextEncoder.vectors`, joined for both encoders."""
        return torch.cat([self.first.vectors(text), self.second.vectors(text)], dim=-1)

    def with_vectors(self, texts: Sequence[str | NamedPrompt], vectors: Tensor) -> TextStates:
        """As `TextEncoder.with_vectors`; each encoder takes its part of the width."""
        one, two = vectors.split([self.first.width, self.second.width], dim=-1)
        return side_by_side(texts, self.first.with_vectors(texts, one), self.second.with_vectors(texts, two))

    def rows(self, prompt: NamedPrompt) -> tuple[int, int]:
        """As `TextEncoder.rows`; the two tokenizers have the same vocabulary."""
        return self.first.rows(prompt)

    def tokens(self, texts: Sequence[str]) -> list[set[int]]:
        """As `TextEncoder`; the two tokenizers have the same vocabulary."""
        return self.first.tokens(texts)

    def words(self) -> list[str]:
        """As `TextEncoder`; the two tokenizers have the same vocabulary."""
        return self.first.words()

    def token_embeddings(self) -> Tensor:
        """As `TextEncoder.token_embeddings`, joined for both encoders: (V, D1 + D2)."""
        rows = [encoder.token_embeddings() for encoder in (self.first, self.second)]
        shared = min(map(len, rows))  # the smaller table has all ids of the shared vocabulary
        return torch.cat([row[:shared] for row in rows], dim=-1)

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """As `TextEncoder`; the two tokenizers have the same vocabulary."""
        return self.first.token_ids(texts)

    def text_of(self, ids: Sequence[int]) -> str:
        """As `TextEncoder`; the two tokenizers have the same vocabulary."""
        return self.first.text_of(ids)

    def writable_tokens(self) -> list[int]:
        """The tokens that both tokenizers can type: their padding tokens differ."""
        both = set(self.second.writable_tokens())
        return [token for token in self.first.writable_tokens() if token in both]

    def to(self, device: Any) -> None:
        self.first.to(device)
        self.second.to(device)


class LatestStates:
    """Text states that were encoded, the latest in at most `KEPT` bytes, by whole batches: results are then equal."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Any, ...], TextStates] = OrderedDict()

    def get(self, key: tuple[Any, ...], encode: Callable[[], TextStates]) -> TextStates:
        """A copy of the states of this key, or what `encode` returns."""
        found = self._kept.pop(key, None)
        if found is None:
            # no_grad and not inference_mode: a training step saves these states for its backward pass, which inference
            # tensors do not allow.
            with torch.no_grad():
                found = encode()
        if found.states.nbytes > KEPT:  # a data set's captions: they are not encoded twice
            return found
        self._kept[key] = found  # the latest last
        while sum(one.states.nbytes for one in self._kept.values()) > KEPT:
            self._kept.popitem(last=False)
        return copied(found)

    def clear(self) -> None:
        self._kept.clear()


def padded_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str | NamedPrompt], length: int) -> Tensor:
    """(B, length) int64: the texts' token ids, cut and padded."""
    if not texts:
        return torch.zeros(0, length, dtype=torch.int64)
    found: Any = tokenizer(
        list(map(plain_text, texts)), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    return torch.as_tensor(found["input_ids"])


def rows_of_name(tokenizer: PreTrainedTokenizerBase, prompt: NamedPrompt) -> list[int]:
    """The rows of the name's sub-tokens, those beyond the token limit too; [] if it has none."""
    # The whole prompt is tokenized, not the truncated one: only then a lost last sub-token of the name is noticed.
    offsets = tokenizer(prompt.text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return [row for row, (start, end) in enumerate(offsets) if start < prompt.end and end > prompt.start]


def named_rows(
    texts: Sequence[str | NamedPrompt], rows: Callable[[NamedPrompt], tuple[int, int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """first, last (B,) of `TextStates`; rows: the first and last row of a prompt's name."""
    found = [rows(text) if isinstance(text, NamedPrompt) else (-1, -1) for text in texts]
    first, last = torch.tensor(found, dtype=torch.int64, device=device).reshape(-1, 2).unbind(1)
    return first, last


def side_by_side(texts: Sequence[str | NamedPrompt], one: TextStates, two: TextStates) -> TextStates:
    """The states of two encoders joined along the width; the other fields are the second's. Raises UserError if their
    tokenizers split a text differently."""
    for name in ("first", "last", "length"):
        differs = (getattr(one, name) != getattr(two, name)).nonzero()
        if len(differs):
            raise UserError(
                f"The two tokenizers split the prompt {shortened(plain_text(texts[int(differs[0])]))!r} differently; "
                "give a checkpoint whose tokenizers have the same vocabulary."
            )
    return replace(two, states=torch.cat([one.states, two.states], dim=-1))


def refuse_not_finite(texts: Sequence[str | NamedPrompt], states: Tensor, remedy: str) -> None:
    """Raises UserError, with the text and the remedy, for states (B, T, D) that are not finite."""
    if finite.first_bad([("states", states)]) is not None:
        text = texts[int((~states.flatten(1).isfinite().all(dim=1)).int().argmax())]
        raise finite.NotFinite(f"The text states of {shortened(plain_text(text))!r} hold NaN or infinity: {remedy}.")


def copied(found: TextStates) -> TextStates:
    """A copy, so that a caller may change it without changing the cache."""
    pooled = None if found.pooled is None else found.pooled.clone()
    first, last, length = found.first.clone(), found.last.clone(), found.length.clone()
    parts = None if found.parts is None else found.parts.clone()
    return TextStates(found.states.clone(), first, last, length, pooled, parts)


def plain_text(prompt: str | NamedPrompt) -> str:
    return prompt.text if isinstance(prompt, NamedPrompt) else prompt


def shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
