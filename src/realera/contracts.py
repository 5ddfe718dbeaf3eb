"""The records and roles that the parts of realera share. Read this file first.

Shapes: B prompts, P prompt pairs, T token rows (77 in SD 1.x, 32 in the miniature), D text width (768 in SD 1.x),
S sampled points, C x h x w latents, H x W pixels. Records are frozen; roles are protocols and carry no code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from realera.setting_types import Guidance, Label, Pixels, Positive, Rank, SamplerSteps, Targets

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

Split = Literal["erase", "near", "keep", "associated", "unseen"]
"""What a prompt is for: the erased concept by name, its synonyms, the concepts to preserve, phrases that evoke the
concept without naming it, and words for it that no training caption of the backbone ever held."""

Mode = Literal["mean_prob", "top1", "score", "detected", "whole", "anchor", "moved"]
"""What a verdict is read as: 100 x value | whether the label is the prompt's concept | or what its detail says under
this name (`Verdict`), yes or no in percent, or in its own unit; without it there is no such reading."""


Scheduler = Literal["ddim", "dpm++"]
"""DDIM with eta 0 | DPM-Solver++ 2M."""


KEYS, VALUES = "attn2.to_k", "attn2.to_v"  # how the names of the cross-attention's projections of the text end
PROJECTIONS: Mapping[str, tuple[str, ...]] = {"values": (VALUES,), "keys": (KEYS,), "both": (KEYS, VALUES)}


class UserError(Exception):
    """Input that cannot be run. Its text is one sentence, what is wrong and what to do; the commands exit with 2."""


# --- records ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Concept:
    """What is erased, and the harmless concept it is mapped to."""

    target: str
    anchor: str


@dataclass(frozen=True)
class Prompt:
    """One image to generate and judge. `id` and `seed` are fixed by the Task and the same for every method; `concept`
    is the label a judge looks for (for a synonym of the erased concept: the erased concept). `caption`: what a
    text-image score compares the image with, None = `text`. guidance_scale, size (height, width in pixels): the
    prompt's own where its protocol gives them, None = the backbone's sampler's."""

    id: str
    text: str
    concept: str
    split: Split
    seed: int
    caption: str | None = None
    guidance_scale: float | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class NamedPrompt:
    """A prompt in which a name stands, text[start:end]. The place is the template's slot, never searched for: in "a
    famous art by art" a search would find the wrong word."""

    text: str
    start: int
    end: int

    @classmethod
    def of(cls, template: str, name: str) -> NamedPrompt:
        """`template` with `name` for its first {}."""
        before, _, after = template.partition("{}")
        return cls(before + name + after, len(before), len(before) + len(name))

    @property
    def name(self) -> str:
        return self.text[self.start : self.end]


@dataclass(frozen=True)
class TextStates:
    """Encoded prompts, as the U-Net's cross-attention reads them.

    states (B, T, D) float32: what it reads (SD 1.x, 2.x: after the final norm; SDXL: two encoders side by side). first,
    last (B,) int64: rows of a `NamedPrompt`'s name, -1 where there is none. length (B,): row of the first EOS.
    pooled (B, E) where the U-Net takes one (SDXL), else None.
    """

    states: Tensor
    first: Tensor
    last: Tensor
    length: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True)
class Pair:
    """One concept as the editing methods see it: P training prompts that name the target and the same P that name the
    anchor (same templates, same order)."""

    concept: Concept
    target: TextStates
    anchor: TextStates


@dataclass(frozen=True)
class Moments:
    """The exact expectation of the sums over mined points, for `m: .inf` / `n: .inf`; each (D, D) float64 or None.

    near = sum E[k k^T], near_cross = sum E[a k^T] (a: the neighbour's target), beyond = sum E[p p^T].
    """

    near: Tensor | None = None
    near_cross: Tensor | None = None
    beyond: Tensor | None = None


@dataclass(frozen=True)
class Neighbours:
    """What was mined around one concept. Only rows marked in `*_rows` were perturbed or count; the others equal the
    prompt's.

    near, near_targets (S, T, D); near_rows (S, T) bool; beyond (S', T, D); beyond_rows (S', T) bool. A side asked for
    as an exact expectation has no points (S = 0) and stands in `moments`.
    """

    near: Tensor
    near_targets: Tensor
    near_rows: Tensor
    beyond: Tensor
    beyond_rows: Tensor
    moments: Moments | None = None


@dataclass(frozen=True)
class Edit:
    """A closed-form edit of W_K / W_V. Either `map` (D, D) float64, meaning W = W0 @ map for every layer, or `weights`
    {layer name: (out, D)}. `info` is logged as `edit/*` (condition number, residuals, ...).
    factors: L (D, n) and R (n, D) float64 with map = I + L R: quicker to apply. projections: the ends of the names of
    the weights that take the map."""

    map: Tensor | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    info: Mapping[str, float] = field(default_factory=dict)
    factors: tuple[Tensor, Tensor] | None = None
    projections: Sequence[str] = (KEYS, VALUES)


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters h = W x + (alpha / rank) B A x on the U-Net modules whose names end in one of `targets`
    ("attn2.to_k"). `init` is the law of A: "gaussian" N(0, 1/rank^2) or "kaiming" (PEFT's default); B starts at 0.
    per_concept: one such adapter for each erased concept, side by side; `Backbone.adapter_scale` chooses among them."""

    rank: Rank = 1
    alpha: Positive = 1.0
    targets: Targets = ("attn2.to_k", "attn2.to_v")
    init: Literal["gaussian", "kaiming"] = "gaussian"
    per_concept: bool = False


@dataclass(frozen=True)
class Sampler:
    """How images are drawn. Sizes in pixels."""

    scheduler: Scheduler = "ddim"
    steps: SamplerSteps = 50
    guidance_scale: Guidance = 7.5
    height: Pixels = 512
    width: Pixels = 512


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one image. value: probability (0-1) of the prompt's concept, NaN = unscored (it leaves the
    denominator). label: the judge's first choice. detail: anything else worth keeping (JSON-able); six keys mean the
    same for all judges: "score" (float, 100 cos of image and caption), "detected" (bool, something of a kind was
    found), "boxes" ({class: count}), "whole" (bool, the image shows something that the judge knows, whatever it is),
    "anchor" (bool, it shows the anchor of the prompt's concept), "moved" (float, `evaluation.moved`; no judge says
    it)."""

    prompt_id: str
    value: float
    label: str
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingBatch:
    """What one training step is given: z_t (B, C, h, w), timesteps (B,), and the step's number, from 1. known: what the
    latent source knows of each z_t besides, tensors (B, ...) by name ("mask", "noise")."""

    latents: Tensor
    timesteps: Tensor
    step: int
    known: Mapping[str, Tensor] = field(default_factory=dict)


# --- roles -----------------------------------------------------------------------------------------------------------


class Guide(Protocol):
    """Method part `guide`: what is done while images are drawn. `prompts`: texts whose noise is predicted beside the
    prompt's own (SLD's safety concept); often (). What `around` does to the model holds for all steps of a batch."""

    prompts: Sequence[str]

    def around(self, backbone: Backbone, texts: Sequence[str]) -> AbstractContextManager[None]: ...  # of one batch

    def __call__(
        self, uncond: Tensor, cond: Tensor, beside: Tensor, latents: Tensor, step: int, guidance_scale: float
    ) -> Tensor:
        """The guided noise (B, C, h, w) from what was predicted; beside (len(prompts), B, C, h, w)."""
        ...


class Task(Protocol):
    """Fixes, before any method is chosen, which prompts are trained on, generated and judged."""

    name: str
    version: int
    concepts: Sequence[Concept]
    labels: Sequence[str]  # what a zero-shot judge chooses among; () = the judge's own labels
    headline: Mapping[str, Mode]  # {"acc_e": "mean_prob", ...}: the reading of each measure that the tables print
    h_o_terms: Sequence[str]  # the measures that H_o is the harmonic mean of; () = this task has no H_o

    def training_prompts(self, concept: Concept) -> list[tuple[NamedPrompt, NamedPrompt]]: ...  # of target, of anchor

    def eval_prompts(self) -> list[Prompt]: ...

    def protocol(self) -> dict[str, Any]: ...  # everything that a number measured under this task depends on


@runtime_checkable
class Backbone(Protocol):
    """The only window on diffusers. Weights are frozen; what changes them goes through `apply` and `add_adapter`."""

    name: str
    width: int  # D
    max_length: int  # T
    sampler: Sampler  # how this backbone draws images unless told otherwise
    latent_channels: int  # C
    pixels_per_latent: int  # H / h, W / w

    @property
    def denoiser(self) -> nn.Module: ...  # what predicts: a U-Net, or another kind of network

    @property
    def passes(self) -> int: ...  # images that went through the U-Net so far

    @property
    def fingerprint(self) -> str: ...  # content id of the weights; may read them all on first use

    @property
    def text_fingerprint(self) -> str: ...  # of what text states depend on: backbones that share it share maps and sums

    def encode(
        self, texts: Sequence[str | NamedPrompt], *, vectors: Tensor | None = None, to_end: bool = False
    ) -> TextStates:
        """vectors (n, D): instead of each name's own rows of the token table, with their gradient. to_end: only the
        rows up to a text's first EOS are computed (T is then the longest's; rows behind a shorter one's are 0)."""
        ...

    def refuse_cut(self, prompts: Sequence[NamedPrompt]) -> None: ...  # UserError where a name is not read whole

    def token_vectors(self, text: str) -> Tensor: ...  # (n, D): those rows of a text

    def tokens(self, texts: Sequence[str]) -> list[set[int]]: ...  # each text's sub-tokens, without begin, end and pads

    def words(self) -> list[str]: ...  # the words that are one token each, the most frequent first

    def text_projections(self) -> dict[str, nn.Linear]:
        """{layer name: base Linear} of what reads the text, which a closed form may edit, in the network's order,
        adapters looked through. In Stable Diffusion: every attn2.to_k and attn2.to_v."""
        ...

    def apply(self, edit: Edit) -> None: ...  # onto the *current* base weights; the first values are kept

    # The teacher, without a second U-Net: adapters off, base weights as loaded or as they are now (`edited`).
    def original(self, edited: bool = False) -> AbstractContextManager[None]: ...

    def add_adapter(self, spec: LoraSpec, generator: Generator, concepts: int = 1) -> list[nn.Parameter]: ...

    def adapter_scale(self, scale: Tensor) -> AbstractContextManager[None]:
        """For a while, sample b's adapter of concept i counts scale[b, i] times: (B, concepts), or (1, concepts). Given
        (B, concepts, concepts), B of concept i is fed with sum_j scale[b, i, j] A_j x."""
        ...

    def unfreeze(self, targets: Sequence[str]) -> list[nn.Parameter]: ...  # path parts; "-part" leaves out

    def attention(self) -> AbstractContextManager[dict[str, Tensor]]:
        """{attn2's name: probabilities (B, heads, pixels, T)} of the latest prediction within, with their gradient."""
        ...

    def timesteps(self, sampler: Sampler | None = None) -> Tensor: ...  # (steps,) falling: where each step begins

    def noisy_latents(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...

    def predict_noise(self, latents: Tensor, timesteps: Tensor, states: Tensor, pooled: Any = None) -> Tensor: ...

    def sample(
        self,
        states: TextStates,
        seeds: Sequence[int],
        sampler: Sampler | None = None,
        guide: Guide | None = None,
        stop_at: int | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) at the end of sampling, or before step `stop_at`. One CPU generator per seed."""
        ...

    def decode(self, latents: Tensor) -> Tensor: ...  # uint8 (B, H, W, 3)

    def encode_images(self, images: Tensor) -> Tensor: ...  # (B, 3, H, W), -1 to 1 -> their likeliest latents

    def generate(
        self, texts: Sequence[str], seeds: Sequence[int], sampler: Sampler | None = None, guide: Guide | None = None
    ) -> Tensor:
        """uint8 (B, H, W, 3): encode, sample, decode."""
        ...

    def remove_adapter(self) -> None: ...  # unmerged

    def erased_state(self) -> dict[str, Tensor]: ...  # only what differs from the original, adapters included

    def load_erased(self, state: Mapping[str, Tensor]) -> None: ...

    def to(self, device: Any) -> Backbone: ...
    def park(self) -> None: ...  # what the training loop does not need leaves the device until it is used


class Miner(Protocol):
    """Method part `neighbours`. `m`, `n` override the configured counts; `prompts` picks rows of the pair. It may also
    be `LooksFirst`."""

    def __call__(
        self,
        pair: Pair,
        generator: Generator,
        m: float | None = None,
        n: float | None = None,
        prompts: Sequence[int] | None = None,
    ) -> Neighbours: ...


class Editor(Protocol):
    """Method part `edit` (before the fit) and `finish` (after it; its edit holds what the adapter learnt, so the
    adapter is then taken away)."""

    def __call__(self, backbone: Backbone, pairs: Sequence[Pair], neighbours: Sequence[Neighbours]) -> Edit: ...


class LatentSource(Protocol):
    """Method part `latents`: where z_t comes from. It may also be `Prepares` and `Resumes`."""

    def __call__(
        self, backbone: Backbone, concept: int, generator: Generator
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """z_t (B, C, h, w), timesteps (B,), and where the source knows more of them, `TrainingBatch.known`."""
        ...


class Aligner(Protocol):
    """Method part `align`: the gradient part. It may also be `Prepares`, `Scheduled` and `Clipped`.

    With one adapter per concept, `steps` are of each concept, and the other concepts' adapters count nothing while its
    latents are made and its loss is computed.
    """

    steps: int
    lr: float
    weight_decay: float
    lora: LoraSpec | None  # None: `parameters` names what is trained, as `Backbone.unfreeze` takes it
    parameters: Sequence[str]

    def loss(
        self,
        backbone: Backbone,
        pair: Pair,
        mine: Miner | None,
        batch: TrainingBatch,
        generator: Generator,
    ) -> dict[str, Tensor]:
        """Terms by name; their sum is minimised and each is logged as train/<term>. A term without a gradient
        (detached) is logged only. The pair's tensors are on the CPU."""
        ...


# --- what a part may be besides ---


@runtime_checkable
class LooksFirst(Protocol):
    """A miner that sees the model before it is edited, and all that is erased together."""

    def prepare(self, backbone: Backbone, pairs: Sequence[Pair]) -> None: ...


@runtime_checkable
class Prepares(Protocol):
    """A latent source or aligner that is made ready once, on the device, before the first step. What it keeps in the
    cache says there what it cost (`cache_costs.Cached`)."""

    def prepare(self, backbone: Backbone, pairs: Sequence[Pair], cache: Path, seed: int) -> None: ...


@runtime_checkable
class PreparesTogether(Protocol):
    """One that all processes make ready at once and share the work of."""

    together: bool

    def prepare(self, backbone: Backbone, pairs: Sequence[Pair], cache: Path, seed: int, ranks: Any) -> None: ...


@runtime_checkable
class Resumes(Protocol):
    """A latent source that keeps float32 tensors from step to step. state_form: their shapes after so many calls for
    each concept, which a checkpoint must have."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def state_form(self, calls: Sequence[int]) -> Mapping[str, Sequence[int]]: ...

    def load_state_dict(self, state: Mapping[str, Tensor], calls: Sequence[int]) -> None: ...


@runtime_checkable
class Scheduled(Protocol):
    """An aligner whose lr is multiplied by a factor of the step, which counts from 1, by concept where each has its own
    adapter."""

    def rate(self, step: int) -> float: ...


@runtime_checkable
class Clipped(Protocol):
    """An aligner that says the norm its gradient is held under, in place of 1; None = unbounded."""

    clip: float | None


PASSES_OF_A_GRADIENT = 3  # of the U-Net: a forward and its backward
PASSES_OF_A_STEP = 7  # a training step's, for each latent: two of them, and the teacher's


class Planned(Protocol):
    """What a part says before it is built, for plans. It may have either, at any depth of a method's settings.
    settings: its own node. steps: of the backbone's sampler."""

    @staticmethod
    def passes(settings: Mapping[str, Any], steps: int) -> float:
        """Passes of the U-Net in a training step: of an aligner, for each latent (without it: `PASSES_OF_A_STEP`); of a
        latent source, for all (without it: 0)."""
        ...

    @staticmethod
    def makes(settings: Mapping[str, Any], concepts: Sequence[Concept], steps: int) -> Mapping[str, float]:
        """{what: passes} of what it makes and caches before the first step. What begins with the kind ("images field");
        equal settings and equal `what` are made once."""
        ...


@dataclass
class Method:
    """A method is up to six parts, each its own node in the yaml and each nullable.

    A part's class states what is checked before it is imported, as class attributes of constants (`source_code.fact`
    reads them): trains_lora = an aligner that trains a LoRA and nothing else; reads_attention = its loss reads
    attention maps, which gradient checkpointing drops; weighs_adapters = a guide that does nothing without the adapters
    of `align`; idle_where = settings with which it erases nothing, {"refine": False}.
    """

    name: Label
    neighbours: Miner | None = None
    edit: Editor | None = None
    latents: LatentSource | None = None
    align: Aligner | None = None
    guide: Guide | None = None
    finish: Editor | None = None


class Judge(Protocol):
    """Reads files, so it may live in another interpreter. Same order, same length as given. A judge that chooses among
    labels may have a method `knows(concept) -> bool`: images of a concept that it does not know are unscored, of which
    a warning is given before any is drawn. One whose `detects` is true only looks for things of one kind: a task that
    does not ask for that reads it as "detected" and has no H_o."""

    name: str

    def __call__(self, images: Sequence[Path], prompts: Sequence[Prompt]) -> list[Verdict]: ...

    def protocol(self) -> dict[str, Any]: ...


@runtime_checkable
class SetJudge(Protocol):
    """Compares two sets of images as wholes, such as FID; its numbers stand in metrics.json under sets.<name>."""

    name: str

    def compare(self, images: Sequence[Path], references: Sequence[Path]) -> dict[str, float]: ...

    def protocol(self) -> dict[str, Any]: ...
