"""Prompts as tokens that an attack searches, and as the text that it then types."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial, reduce
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from realera import paths
from realera.attack_contract import HasTokens
from realera.contracts import Backbone, NamedPrompt, TextStates, UserError
from realera.files import plain_data
from realera.files.cache_costs import cached
from realera.methods.texts import join

PLACE = NamedPrompt("a", 0, 1)  # a prompt whose only token is replaced by vectors
Searched = Literal["words", "all"]
"""words: the tokens that are read as themselves when they are typed alone, so a searched prompt is the one that is
typed, almost always. all: the parts of words too (official), some of which are read otherwise."""


class Vocabulary:
    """The tokens among which an attack searches. ids (V',): of the text encoder. vectors (V', D): their embeddings, on
    the model's device. Positions in these two are called places. banned: tokens with one of these words in them are
    left out (`is_banned`)."""

    def __init__(self, backbone: Backbone, searched: Searched, banned: Sequence[str] = ()) -> None:
        self.backbone, self.reads = backbone, encoder_of(backbone)
        ids = self.reads.writable_tokens()
        if searched == "words":
            texts = [self.reads.text_of([token]) for token in ids]
            ids = [token for token, read in zip(ids, self.reads.token_ids(texts)) if read == [token]]
        if banned:
            ids = [token for token in ids if not is_banned(self.reads.text_of([token]), banned)]
        self.ids = torch.tensor(ids)

    @cached_property
    def vectors(self) -> Tensor:
        table = self.reads.token_embeddings()
        return table[self.ids.to(table.device)].detach().clone()

    def __len__(self) -> int:
        return len(self.ids)

    def ids_of(self, places: Tensor) -> list[int]:
        found: list[int] = self.ids[places.cpu()].tolist()
        return found

    def text(self, places: Tensor) -> str:
        """The text of the tokens at these places (n,)."""
        return self.reads.text_of(self.ids_of(places))

    def nearest(self, vectors: Tensor) -> Tensor:
        """(n,) places: for each of the vectors (n, D) the token of the largest cosine."""
        return (self._directions @ torch.nn.functional.normalize(vectors, dim=-1).T).argmax(dim=0)

    @cached_property
    def _directions(self) -> Tensor:
        return torch.nn.functional.normalize(self.vectors, dim=-1)


class Vocabularies:
    """The vocabularies that an attack uses: each is made once for a backbone."""

    def __init__(self, searched: Searched) -> None:
        self.searched: Searched = searched
        self.known: dict[tuple[str, ...], Vocabulary] = {}

    def of(self, backbone: Backbone, banned: Sequence[str] = ()) -> Vocabulary:
        found = self.known.get(tuple(banned))
        if found is None or found.backbone is not backbone:
            found = self.known[tuple(banned)] = Vocabulary(backbone, self.searched, banned)
        return found


def encoder_of(backbone: Backbone) -> HasTokens:
    """The backbone as one whose tokens can be searched. Raises UserError if they cannot."""
    if isinstance(backbone, HasTokens):
        return backbone
    raise UserError(
        f"The backbone {backbone.name} does not tell its tokens, so an attack cannot search them: choose another one, "
        "such as attack=inversion."
    )


def states_of(backbone: Backbone, prompts: Sequence[Tensor]) -> TextStates:
    """The text states of B prompts, each given as the embeddings (n, D) of its tokens, with gradients."""
    return joined([backbone.encode([PLACE], vectors=vectors) for vectors in prompts])


def joined(parts: Sequence[TextStates]) -> TextStates:
    """Several batches of prompts as one."""
    device = parts[0].states.device
    return reduce(lambda one, two: join(one, two, device), parts)


def both_ways(backbone: Backbone, ids: Sequence[int], text: str) -> dict[str, Any]:
    """For an attack's information on a prompt: the tokens that were searched, and those that are read from the text
    that was typed."""
    reads = encoder_of(backbone)
    typed = reads.token_ids([text])[0]
    return {
        "searched": [reads.text_of([token]) for token in ids],
        "typed": [reads.text_of([token]) for token in typed],
        "same": list(ids) == typed,
    }


def words_of(name: str) -> list[str]:
    """The words of a concept's name that an attack must not type."""
    return sorted(set(name.casefold().split()))


def is_banned(text: str, banned: Sequence[str]) -> bool:
    """Whether a text has one of these words in it: anywhere, or for words of one or two letters as a whole word."""
    text = text.casefold()
    return any(word in text if len(word) > 2 else word in text.split() for word in banned)


def found_once(
    backbone: Backbone, kind: str, about: Mapping[str, Any], generator: Generator, make: Callable[[], Sequence[int]]
) -> list[int]:
    """The ids of the tokens that `make` finds with the original text encoder alone. They are kept in the cache, so that
    attacks on other erased models find them there. about: everything else that the result depends on."""
    about = {**about, "counted": "texts"}  # files of earlier versions do not say how many texts were encoded
    content = {"kind": kind, "text": backbone.text_fingerprint, "seed": generator.initial_seed(), **about}
    name = hashlib.sha256(plain_data.json_text(content).encode()).hexdigest()[:16]
    file = paths.cache_dir() / "attacks" / f"{name}.safetensors"
    found: list[int] = cached(file, "ids", backbone, partial(_as_tensor, make)).tolist()
    return found


def _as_tensor(make: Callable[[], Sequence[int]]) -> Tensor:
    return torch.tensor(list(make()), dtype=torch.int64)
