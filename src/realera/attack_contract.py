"""The records and roles of attacks on an erased model; contracts.py has all others.

An attack is one file in attacks/ and one yaml in conf/attack/. It sees the erased backbone (and, inside
`backbone.original()`, the unedited one), the concept, its prompts and images of it, but never the judge: it asks the
system for images (`Case.draw`) and is told whether the concept is in them. The command keeps the rest: images,
verdicts, costs, the first success, and what is needed to go on after a stop.

Shapes as in contracts.py: D text width, T token rows, C x h x w latents, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from realera.contracts import Backbone, Concept, Course, NamedPrompt, Prompt, Sampler, TextStates

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True)
class Attempt:
    """One input of the system, for one image.

    text: as a user types it. vectors (n, D): token embeddings in place of those of the text's name; the text is then a
    `NamedPrompt`, and its name only holds their place. states: text states of one prompt, in place of the text's own.
    said: words for an input that cannot be typed (with vectors or states), for people who read the results. seed: None
    = the prompt's.
    """

    text: str | NamedPrompt
    vectors: Tensor | None = None
    states: TextStates | None = None
    said: str | None = None
    seed: int | None = None


class Attacked(Protocol):
    """An erased concept and what an attacker has.

    backbone: with the erased weights; an attack leaves it as it found it. concept. prompts: all prompts of the concept
    that are under attack, as the task has them. names: the task's training prompts of the concept. generator: on the
    CPU, seeded for this concept or this prompt alone; take all random numbers from it.
    """

    @property
    def backbone(self) -> Backbone: ...

    @property
    def concept(self) -> Concept: ...

    @property
    def prompts(self) -> Sequence[Prompt]: ...

    @property
    def names(self) -> Sequence[NamedPrompt]: ...

    @property
    def generator(self) -> Generator: ...

    def latents(self, count: int, chunk: int = 8, texts: Sequence[str] | None = None) -> Tensor:
        """(count, C, h, w) on the model's device: images of the concept, drawn by the original model from `names` with
        the backbone's sampler. They are shared through the cache, with all attacks and methods that ask for as many.
        chunk: images drawn at once. texts: prompts in place of `names`. Image i has prompt i mod P."""
        ...

    def acting(self, texts: Sequence[str], states: TextStates | None = None) -> AbstractContextManager[None]:
        """Inside this context the weights are as they are while the system draws these prompts: a method's guide may
        weight its adapters by the prompt (SPM). For gradients and for noise predictions. states: of the prompts; None =
        those of the texts. For other methods it changes nothing."""
        ...


class Case(Attacked, Protocol):
    """One prompt under attack.

    prompt: its text, seed, guidance and size. plain: whether the erased model draws the concept for the prompt as it
    is. searched: the result of `SearchesFirst.search` for its concept; {} for an attack without one. sampler: the
    system's, with the prompt's guidance and size.
    """

    @property
    def prompt(self) -> Prompt: ...

    @property
    def plain(self) -> bool: ...

    @property
    def searched(self) -> Mapping[str, Tensor]: ...

    @property
    def sampler(self) -> Sampler: ...

    def image(self) -> Tensor:
        """(1, 3, H, W) in [-1, 1] on the model's device: the original model's image of the prompt, from its seed."""
        ...

    def image_latents(self) -> Tensor:
        """(1, C, h, w): `image`, encoded."""
        ...

    def draw(
        self,
        attempts: Sequence[Attempt],
        step: int = 0,
        sampler: Sampler | None = None,
        course: Course | None = None,
    ) -> list[bool]:
        """Draws the attempts with the system as it is deployed, the method's guide included. Returns for each whether
        the task's judge finds the concept.

        step: of the search, at which the attempts were found. sampler: None = `sampler`. course: None = the usual one;
        with another one all attempts are drawn in one batch. The first attempt that shows the concept is the result of
        the attack; without one it is the last attempt.
        """
        ...

    def draw_all(self, cases: Sequence[Case], attempts: Sequence[Attempt], step: int = 0) -> list[bool]:
        """As `draw`, for several cases of one concept at once: attempt i belongs to case i. For `AttacksTogether`."""
        ...


class Attack(Protocol):
    """counts_plain: True = a prompt that draws the concept as it is counts as won and is not attacked, because the
    attack only adds to the prompt.

    Four facts are constants of the class, which says them only if they are so: learns_vectors = True: it puts vectors
    in place of tokens, so the text encoders must split a text alike; needs_ddim = True: it is about the noise that DDIM
    adds, which flow matching does not have; trains_adapters = True: it trains adapters on the denoiser, which float16
    cannot; trains_weights_where = {setting: value}: with such a setting it trains the denoiser's own weights, which
    must be float32. They are checked before a model is loaded.

    `passes` and `passes_of_search` serve the plan that is printed first; they know only the settings.
    """

    counts_plain: bool

    def __call__(self, case: Case) -> Mapping[str, Any]:
        """Attacks one prompt: searches, calls `case.draw`, and may stop at the first success. Returns information for
        the prompt's line of the results: numbers, texts, and lists of them. The same case gives the same result."""
        ...

    @staticmethod
    def passes(settings: Mapping[str, Any], per_image: float) -> float:
        """Denoiser passes for a prompt, at most; a gradient counts `PASSES_OF_A_GRADIENT`. settings: the attack's node.
        per_image: passes of one image of the system."""
        ...


@runtime_checkable
class SearchesFirst(Protocol):
    """An attack that searches something once for a concept, before its prompts."""

    def search(self, attacked: Attacked) -> Mapping[str, Tensor]:
        """Tensors, which are saved in the run folder and given to every prompt as `Case.searched`."""
        ...

    @staticmethod
    def passes_of_search(settings: Mapping[str, Any], per_image: float) -> float:
        """Denoiser passes for a concept."""
        ...


@runtime_checkable
class SearchesTexts(Protocol):
    """An attack that reads many texts with the text encoder alone. Such a search can take longer than the images."""

    @staticmethod
    def text_passes(settings: Mapping[str, Any]) -> float:
        """Passes of the text encoder for a prompt, about: one for each text. A gradient counts
        `PASSES_OF_A_GRADIENT`."""
        ...


@runtime_checkable
class AttacksTogether(Protocol):
    """An attack on several prompts of a concept in one batch, which a small model needs to be quick. together: the most
    prompts at once, a setting. Prompts with equal guidance and size are put together, always the same ones; after a
    stop they are attacked again together."""

    together: int

    def attack_together(self, cases: Sequence[Case]) -> Sequence[Mapping[str, Any]]:
        """As `Attack.__call__` for each case. Random numbers of a case come from its own generator."""
        ...


@runtime_checkable
class BringsPrompts(Protocol):
    """An attack with prompts of its own, in place of the task's."""

    def own_prompts(self, concepts: Sequence[Concept]) -> Sequence[Prompt]:
        """In a fixed order. Ids are unique, and plain file names. Raises UserError for a file that cannot be read."""
        ...


@runtime_checkable
class MeasuresReturn(Protocol):
    """An attack that draws every prompt at the same steps, whether it was won before or not. Its numbers have the share
    of the prompts that show the concept at each step, and the step at which half of the original model's is back."""

    draws_all: bool  # only declares the role: its value is not read


# --- optional roles of a backbone ---


@runtime_checkable
class HasTokens(Protocol):
    """A backbone whose prompts can be searched token by token. V: rows of the token embeddings."""

    def token_embeddings(self) -> Tensor:
        """(V, D) float32 on the model's device, not a copy; of several text encoders side by side."""
        ...

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text's tokens in order, up to the token limit, without BOS, EOS and padding."""
        ...

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of these tokens, without special ones. Read again, it may give other tokens."""
        ...

    def writable_tokens(self) -> list[int]:
        """The ids of all tokens that can be typed: no special tokens, and no parts of characters."""
        ...


@runtime_checkable
class CountsTexts(Protocol):
    """A backbone that counts the texts it reads."""

    @property
    def text_passes(self) -> int: ...  # texts that were encoded so far
