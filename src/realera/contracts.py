"""The records and roles that the parts of realera share. Read this file first.

Shapes: B prompts, P prompt pairs, T token rows (77 in SD 1.x, 32 in the miniature), D text width (768 in SD 1.x),
S sampled points, C x h x w latents, H x W pixels.

Records are frozen dataclasses that the parts pass to each other; `records` and `text_states` define them. Roles are
protocols without code: a class that has these members plays the role and need not inherit from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from realera.records import KEYS as KEYS
from realera.records import VALUES as VALUES
from realera.records import Adapter as Adapter
from realera.records import Concept as Concept
from realera.records import Course as Course
from realera.records import Edit as Edit
from realera.records import EraserSpec as EraserSpec
from realera.records import LoraSpec as LoraSpec
from realera.records import Moments as Moments
from realera.records import Neighbours as Neighbours
from realera.records import Pair as Pair
from realera.records import Prompt as Prompt
from realera.records import Sampler as Sampler
from realera.records import Scheduler as Scheduler
from realera.records import Split as Split
from realera.records import TrainingBatch as TrainingBatch
from realera.records import Verdict as Verdict
from realera.setting_types import Label
from realera.text_states import EncoderRows as EncoderRows
from realera.text_states import NamedPrompt as NamedPrompt
from realera.text_states import TextStates as TextStates

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

Mode = Literal["mean_prob", "top1", "score", "detected", "whole", "anchor", "moved"]
"""How a verdict becomes a number. mean_prob: 100 x value. top1: 100 if the label is the prompt's concept, else 0. Any
other mode is a key of `Verdict.detail`: a bool counts 100 or 0, a number keeps its unit. Without the key the image is
unscored."""

Read = Literal["values", "keys", "both"]
"""The projections of text states that an edit or a metric is about."""

Network = Literal["denoiser", "text_encoder"]  # what a method trains; text_encoder: all text encoders of the backbone

JOINT = "context_embedder"  # the layer of a transformer that all text rows pass; it takes every map
PROJECTIONS: Mapping[str, tuple[str, ...]] = {"values": (VALUES,), "keys": (KEYS,), "both": (KEYS, VALUES)}


class UserError(Exception):
    """Input that cannot be run. The message says in one sentence what is wrong and what to type instead. The commands
    print it and exit with 2."""


# --- roles -----------------------------------------------------------------------------------------------------------


class Guide(Protocol):
    """Method part `guide`: acts while images are generated. prompts: further texts whose noise is predicted at each
    step (SLD's safety concept); often ()."""

    prompts: Sequence[str]

    def around(self, backbone: Backbone, texts: Sequence[str]) -> AbstractContextManager[None]:
        """Changes the model during all steps of one batch; `texts` are the batch's prompts."""
        ...

    def __call__(
        self, uncond: Tensor, cond: Tensor, beside: Tensor, latents: Tensor, step: int, guidance_scale: float
    ) -> Tensor:
        """The guided noise (B, C, h, w) from the noise predictions: for the empty (or negative) prompt, for the
        prompts, and beside (len(prompts), B, C, h, w) for the texts in `prompts`."""
        ...


class Task(Protocol):
    """The prompts for training and evaluation. They are fixed before a method is chosen."""

    name: str
    version: int  # raised by every change that moves a number
    concepts: Sequence[Concept]
    labels: Sequence[str]  # the classes of a zero-shot judge; () = the judge's own
    headline: Mapping[str, Mode]  # {"acc_e": "mean_prob", ...}: how the tables read each metric
    h_o_terms: Sequence[str]  # H_o is the harmonic mean of these metrics; () = this task has no H_o

    def training_prompts(self, concept: Concept) -> list[tuple[NamedPrompt, NamedPrompt]]: ...  # (target's, anchor's)

    def eval_prompts(self) -> list[Prompt]: ...

    def protocol(self) -> dict[str, Any]: ...  # every setting of the task that a measured number depends on


@runtime_checkable
class Backbone(Protocol):
    """A text-to-image model: a U-Net or a diffusion transformer. Only backbones use diffusers. The weights are frozen
    and change only through `apply`, `add_adapter`, `unfreeze` and `load_erased`. If they are those of a text encoder,
    `encode` passes gradients to them and never repeats states of other weights, and inside `original` it encodes as the
    model that was loaded."""

    name: str
    width: int  # D
    max_length: int  # T
    sampler: Sampler  # this backbone's default
    latent_channels: int  # C
    pixels_per_latent: int  # H / h, W / w

    @property
    def denoiser(self) -> nn.Module: ...  # the network that predicts the noise: a U-Net, or another kind

    @property
    def trained(self) -> nn.Module:
        """The network whose weights `add_adapter` and `unfreeze` train: the denoiser, until `choose` says otherwise."""
        ...

    def choose(self, network: Network) -> None: ...

    @property
    def passes(self) -> int: ...  # images that went through the denoiser so far

    @property
    def fingerprint(self) -> str: ...  # content id of the weights; may read them all on first use

    @property
    def text_fingerprint(self) -> str: ...  # of the text encoder as it is now: equal ids share maps and cached sums

    def encode(
        self, texts: Sequence[str | NamedPrompt], *, vectors: Tensor | None = None, to_end: bool = False
    ) -> TextStates:
        """vectors (n, D): embeddings that replace the token embeddings of each prompt's name; gradients flow back to
        them. to_end: only the rows up to each text's first EOS are needed. If the text encoder allows it, T is then the
        length of the longest text, and the rows after a shorter text's EOS are 0."""
        ...

    def check_not_truncated(self, prompts: Sequence[NamedPrompt]) -> None:
        """UserError if the token limit cuts a name."""
        ...

    def token_vectors(self, text: str) -> Tensor: ...  # (n, D): token embeddings of the text's n sub-tokens

    def tokens(self, texts: Sequence[str]) -> list[set[int]]: ...  # sub-token ids, without BOS, EOS and padding

    def words(self) -> list[str]: ...  # the words that are one token each, the most frequent first

    def text_projections(self, read: Read = "both") -> dict[str, nn.Linear]:
        """{layer name: base Linear} of the layers that project text states, in the network's order. A closed form may
        edit these layers. In U-Nets: every attn2.to_k ("keys") and attn2.to_v ("values"). In transformers: the one
        layer context_embedder, whatever `read` is, because keys and values are made of its output."""
        ...

    def text_readers(self, read: Read = "values") -> list[Tensor]:
        """Matrices (n, D): the linear maps by which the layers read text states now, for the metric of `value_space`.
        In U-Nets: the weights of `text_projections(read)`. In transformers: as the setting `backbone.reading` says."""
        ...

    def apply(self, edit: Edit) -> None: ...  # to the current base weights; the original values are kept

    # The teacher, without a second denoiser: no adapters, the base weights as loaded (edited=True: as they are now).
    def original(self, edited: bool = False) -> AbstractContextManager[None]: ...

    def add_adapter(self, spec: Adapter, generator: Generator, concepts: int = 1) -> list[nn.Parameter]: ...

    def eraser_outputs(self) -> AbstractContextManager[dict[str, Tensor]]:
        """As `attention`, {name of an attn2 module: what its eraser adds (B, pixels, channels)}."""
        ...

    def adapter_scale(self, scale: Tensor) -> AbstractContextManager[None]:
        """Inside this context the adapter of concept i is multiplied by scale[b, i] for sample b; scale is
        (B, concepts) or (1, concepts). With (B, concepts, concepts), B_i is applied to sum_j scale[b, i, j] A_j x."""
        ...

    def unfreeze(self, targets: Sequence[str]) -> list[nn.Parameter]: ...  # by parts of their path; "-part" excludes

    def attention(self) -> AbstractContextManager[dict[str, Tensor]]:
        """{name of an attn2 module: probabilities (B, heads, pixels, T)} of the latest noise prediction inside this
        context, with gradients. UserError if the network has no cross-attention, with the reason."""
        ...

    # Timesteps are the backbone's own: whole numbers below 1000, or continuous noise levels. Methods get them from the
    # next three members and only pass them on; a larger one is noisier.

    def timesteps(self, sampler: Sampler | None = None) -> Tensor: ...  # (steps,) falling: one for each sampler step

    def draw_timesteps(self, count: int, generator: Generator) -> Tensor:
        """(count,) on the CPU, from the distribution that the model was trained with."""
        ...

    def timesteps_at(self, levels: Tensor) -> Tensor:
        """Timesteps of the same shape. levels: shares of the noise schedule in [0, 1), 0 is the least noise."""
        ...

    def noisy_latents(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...

    # "Noise" in the losses and guides of methods is the model's own prediction: for flow matching, the velocity.

    def predict_noise(self, latents: Tensor, timesteps: Tensor, states: Tensor, pooled: Any = None) -> Tensor:
        """What the model predicts for z_t (B, C, h, w): the noise in it, also if a U-Net itself predicts v; with flow
        matching, the velocity noise - x."""
        ...

    def target_of(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What `predict_noise` should give for z_t = noisy_latents(latents, noise, timesteps): the noise; with flow
        matching, noise - latents."""
        ...

    def sample(
        self,
        states: TextStates,
        seeds: Sequence[int],
        sampler: Sampler | None = None,
        guide: Guide | None = None,
        stop_at: int | None = None,
        negative: str = "",
        each_step: Callable[[int], None] | None = None,
        course: Course | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) after the last step, or before step `stop_at`. One CPU generator per seed. negative: the
        text that guidance leads away from, in place of the empty prompt. each_step: called with the number of every
        step before it begins; an exception in it ends the sampling. course: None = the usual one. Raises UserError for
        a course that this backbone or sampler cannot take."""
        ...

    def decode(self, latents: Tensor) -> Tensor: ...  # uint8 (B, H, W, 3)

    def encode_images(self, images: Tensor) -> Tensor: ...  # (B, 3, H, W) in [-1, 1] -> the mode of their latents

    def generate(
        self,
        texts: Sequence[str],
        seeds: Sequence[int],
        sampler: Sampler | None = None,
        guide: Guide | None = None,
        negative: str = "",
        each_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """uint8 (B, H, W, 3): encode, sample, decode. negative, each_step: see `sample`."""
        ...

    def remove_adapter(self) -> None: ...  # without merging it

    def erased_state(self) -> dict[str, Tensor]: ...  # changed base weights and adapters: as in erased.safetensors

    def load_erased(self, state: Mapping[str, Tensor]) -> None: ...  # original weights first, then `state`

    def to(self, device: Any) -> Backbone: ...
    def park(self) -> None: ...  # moves text encoder and autoencoder to the CPU until their next use, if not trained


class Miner(Protocol):
    """Method part `neighbours`: mines points around a concept. m, n: override the configured counts. prompts: indices
    of the pair's prompts to mine around; None = all. A miner may also be `LooksFirst`."""

    def __call__(
        self,
        pair: Pair,
        generator: Generator,
        m: float | None = None,
        n: float | None = None,
        prompts: Sequence[int] | None = None,
    ) -> Neighbours: ...


class Editor(Protocol):
    """Method parts `edit` (closed form, before the fit) and `finish` (after the fit). The edit of `finish` includes the
    change that the adapter learnt, so the adapter is then removed without merging it."""

    def __call__(self, backbone: Backbone, pairs: Sequence[Pair], neighbours: Sequence[Neighbours]) -> Edit: ...


class LatentSource(Protocol):
    """Method part `latents`: supplies z_t for training. It may also be `Prepares` and `Resumes`."""

    def __call__(
        self, backbone: Backbone, concept: int, generator: Generator
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """z_t (B, C, h, w), timesteps (B,) and optionally `TrainingBatch.known`. concept: index of the concept."""
        ...


class Aligner(Protocol):
    """Method part `align`: trained by gradient descent. It may also be `Prepares`, `Scheduled` and `Clipped`.

    With one adapter per concept, every concept gets `steps` steps; during them the other concepts' adapters are off.
    """

    steps: int
    lr: float
    weight_decay: float
    lora: LoraSpec | None  # None: the weights named by `parameters` are trained
    parameters: Sequence[str]  # see `Backbone.unfreeze`

    def loss(
        self,
        backbone: Backbone,
        pair: Pair,
        mine: Miner | None,
        batch: TrainingBatch,
        generator: Generator,
    ) -> dict[str, Tensor]:
        """{term: scalar}. The sum of the terms is minimised, and each is logged as train/<term>. A detached term is
        only logged. The pair's tensors are on the CPU. mine: the method's miner, if it has one."""
        ...


# --- an optional role of a backbone ---


@runtime_checkable
class MarksText(Protocol):
    """A backbone whose text encoder can be recognised in other checkpoints, so that its maps can be applied to them."""

    def text_marks(self) -> dict[str, str]: ...  # see backbones.text_marks


# --- optional roles of a method's parts ---


@runtime_checkable
class GuidesStates(Protocol):
    """A guide that looks at the text states of a batch, and not only at its texts. It is asked this way if the states
    are not those of the texts, as in an attack."""

    def around_states(
        self, backbone: Backbone, states: TextStates, texts: Sequence[str]
    ) -> AbstractContextManager[None]: ...


@runtime_checkable
class ReadsModelFirst(Protocol):
    """A miner that first reads the unedited model and the pairs of all concepts that are erased together."""

    def prepare(self, backbone: Backbone, pairs: Sequence[Pair]) -> None: ...


@runtime_checkable
class Prepares(Protocol):
    """A latent source or aligner with work to do once before the first step, such as generating training images. The
    model is already on the device. Files that it caches also record their cost (`cache_costs.Cached`)."""

    def prepare(self, backbone: Backbone, pairs: Sequence[Pair], cache: Path, seed: int) -> None: ...


@runtime_checkable
class PreparesTogether(Protocol):
    """As `Prepares`, with the work shared between the processes of a multi-GPU run."""

    together: bool  # only declares the role: its value is not read

    def prepare(self, backbone: Backbone, pairs: Sequence[Pair], cache: Path, seed: int, ranks: Any) -> None: ...


@runtime_checkable
class Resumes(Protocol):
    """A latent source whose float32 tensors carry over from step to step, and are saved in checkpoints. calls: the
    number of calls so far, for each concept. state_form: the shapes that a checkpoint must have after these calls."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def state_form(self, calls: Sequence[int]) -> Mapping[str, Sequence[int]]: ...

    def load_state_dict(self, state: Mapping[str, Tensor], calls: Sequence[int]) -> None: ...


@runtime_checkable
class Scheduled(Protocol):
    """An aligner with a learning-rate schedule: the lr of a step is lr x rate(step). Steps count from 1, and separately
    for each concept if each has its own adapter."""

    def rate(self, step: int) -> float: ...


@runtime_checkable
class Clipped(Protocol):
    """An aligner that sets the norm its gradient is clipped to, which is 1 for the others; None = no clipping."""

    clip: float | None


PASSES_OF_A_GRADIENT = 3  # a forward and a backward pass cost as much as 3 forward passes of the denoiser
PASSES_OF_A_STEP = 7  # of a training step, for each latent: two gradients, and the teacher's forward pass


@dataclass
class Method:
    """A method has up to six parts. Each is a node in the yaml and may be null.

    Some facts about a part are checked before its class is imported. The class states them as constant class attributes
    (`source_code.fact` reads them from the source): trains_lora = the aligner trains only a LoRA; network = see
    `method_roles`; reads_attention = its loss reads cross-attention maps, which gradient checkpointing drops and
    transformers do not have; weighs_adapters = the guide does nothing without the adapters of `align`; idle_where =
    settings that erase nothing; learns_vectors = the part, at any depth, puts learned vectors in place of a name's
    tokens, so the text encoders must split a name alike.
    """

    name: Label
    neighbours: Miner | None = None
    edit: Editor | None = None
    latents: LatentSource | None = None
    align: Aligner | None = None
    guide: Guide | None = None
    finish: Editor | None = None


class Judge(Protocol):
    """Judges image files, so it may run in another interpreter.

    Two members are optional. `knows(concept) -> bool`: images of a concept that the judge does not know are unscored,
    and a warning says so before any image is generated. `detects = True`: the judge only detects things of one kind;
    its verdicts are then read as "detected", and a task that was not made for this has no H_o.
    """

    name: str

    def __call__(self, images: Sequence[Path], prompts: Sequence[Prompt]) -> list[Verdict]: ...  # one for each image

    def protocol(self) -> dict[str, Any]: ...  # every setting of the judge that a verdict depends on


@runtime_checkable
class SetJudge(Protocol):
    """Compares two sets of images, as FID does. metrics.json has its numbers under sets.<name>."""

    name: str

    def compare(self, images: Sequence[Path], references: Sequence[Path]) -> dict[str, float]: ...

    def protocol(self) -> dict[str, Any]: ...
