"""A backbone of another kind: a rectified flow with continuous noise levels, no U-Net, and a text encoder that can be
what is trained. Methods that know only the contract train on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from realera.contracts import (
    Adapter,
    Backbone,
    Concept,
    Edit,
    Guide,
    LoraSpec,
    Method,
    NamedPrompt,
    Neighbours,
    Network,
    Pair,
    Prepares,
    Read,
    Sampler,
    TextStates,
    TrainingBatch,
)
from realera.methods import nearness
from realera.methods.latents import at_level, noised
from realera.training.module import ErasureModule

WIDTH, ROWS, CHANNELS, SIDE = 8, 12, 2, 4
SCALE = 0.2  # of the adapter's first factor


class Velocity(nn.Module):
    """v(z_t, sigma, text) from the mean of the projected text rows."""

    def __init__(self) -> None:
        super().__init__()
        self.to_k, self.to_v = nn.Linear(WIDTH, CHANNELS, bias=False), nn.Linear(WIDTH, CHANNELS, bias=False)
        self.mix = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.adapter: nn.ParameterList | None = None
        self.adapted = True
        self.seen: list[Tensor] = []  # the timesteps of each pass

    def forward(self, latents: Tensor, sigmas: Tensor, states: Tensor) -> Tensor:
        self.seen.append(sigmas)
        text = self.to_k(states).tanh().mean(1) + self.to_v(states).mean(1)
        if self.adapter is not None and self.adapted:
            text = text + (states @ self.adapter[0].T @ self.adapter[1].T).mean(1)
        mixed: Tensor = self.mix(latents) * sigmas.to(latents).view(-1, 1, 1, 1) + text[:, :, None, None]
        return mixed


class Flow:
    """`contracts.Backbone`: z_t = (1 - sigma) x + sigma eps, and the network predicts v = eps - x."""

    name, width, max_length, latent_channels, pixels_per_latent = "flow", WIDTH, ROWS, CHANNELS, 8
    sampler = Sampler("ddim", 4, 2.0, 8 * SIDE, 8 * SIDE)
    fingerprint = text_fingerprint = "flow"
    passes = 0

    def __init__(self, train_text: bool = False) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network, self.embedding = Velocity(), nn.Embedding(128, WIDTH)
        for module in (self.network, self.embedding):
            module.requires_grad_(False)
        self.train_text = train_text
        self.first: dict[str, Tensor] = {}

    @property
    def denoiser(self) -> nn.Module:
        return self.network

    @property
    def trained(self) -> nn.Module:
        return self.embedding if self.train_text else self.network

    def choose(self, network: Network) -> None:
        self.train_text = network == "text_encoder"

    def eraser_outputs(self) -> Any:
        raise NotImplementedError

    def encode(
        self, texts: Sequence[str | NamedPrompt], *, vectors: Tensor | None = None, to_end: bool = False
    ) -> TextStates:
        read = [text.text if isinstance(text, NamedPrompt) else text for text in texts]
        ids = torch.zeros(len(read), ROWS, dtype=torch.long)
        for row, text in enumerate(read):
            codes = [ord(letter) % 127 + 1 for letter in text[: ROWS - 2]]
            ids[row, 1 : 1 + len(codes)] = torch.tensor(codes, dtype=torch.long)
        length = torch.tensor([min(len(text), ROWS - 2) + 1 for text in read])
        first = torch.ones(len(read), dtype=torch.long)
        return TextStates(self.embedding(ids), first, (length - 1).clamp(min=1), length)

    def check_not_truncated(self, prompts: Sequence[NamedPrompt]) -> None: ...

    def token_vectors(self, text: str) -> Tensor:
        return torch.zeros(1, WIDTH)

    def tokens(self, texts: Sequence[str]) -> list[set[int]]:
        return [set(map(ord, text)) for text in texts]

    def words(self) -> list[str]:
        return ["cat", "dog"]

    def text_projections(self, read: Read = "both") -> dict[str, nn.Linear]:
        return {"to_k": self.network.to_k, "to_v": self.network.to_v}

    def text_readers(self, read: Read = "values") -> list[Tensor]:
        return [self.network.to_v.weight]

    def apply(self, edit: Edit) -> None:
        raise NotImplementedError

    @contextmanager
    def original(self, edited: bool = False) -> Iterator[None]:
        now = {name: value.detach().clone() for name, value in self.trained.named_parameters()}
        self.network.adapted = False
        try:
            with torch.no_grad():
                self._put(self.first)
                yield
        finally:
            self.network.adapted = True
            self._put(now)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self.trained.named_parameters():
            if name in values:
                value.data = values[name]

    def add_adapter(self, spec: Adapter, generator: Generator, concepts: int = 1) -> list[nn.Parameter]:
        assert isinstance(spec, LoraSpec)
        down = nn.Parameter(SCALE * torch.randn(spec.rank, WIDTH, generator=generator))
        self.network.adapter = nn.ParameterList([down, nn.Parameter(torch.zeros(CHANNELS, spec.rank))])
        return list(self.network.adapter)

    def adapter_scale(self, scale: Tensor) -> Any:
        return nullcontext()

    def unfreeze(self, targets: Sequence[str]) -> list[nn.Parameter]:
        self.first = {name: value.detach().clone() for name, value in self.trained.named_parameters()}
        return [value.requires_grad_(True) for value in self.trained.parameters()]  # type: ignore[misc]

    def attention(self) -> Any:
        raise NotImplementedError

    def timesteps(self, sampler: Sampler | None = None) -> Tensor:
        steps = (sampler or self.sampler).steps
        return 1 - torch.arange(steps) / steps

    def draw_timesteps(self, count: int, generator: Generator) -> Tensor:
        return torch.randn(count, generator=generator).sigmoid()  # logit-normal, as Stable Diffusion 3

    def timesteps_at(self, levels: Tensor) -> Tensor:
        return levels.float()

    def noisy_latents(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigma = timesteps.to(latents).view(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise

    def predict_noise(self, latents: Tensor, timesteps: Tensor, states: Tensor, pooled: Any = None) -> Tensor:
        velocity: Tensor = self.network(latents, timesteps, states)
        return velocity

    def target_of(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    def sample(
        self,
        states: TextStates,
        seeds: Sequence[int],
        sampler: Sampler | None = None,
        guide: Guide | None = None,
        stop_at: int | None = None,
    ) -> Tensor:
        levels = [*self.timesteps(sampler).tolist(), 0.0]
        noises = [torch.randn(CHANNELS, SIDE, SIDE, generator=Generator().manual_seed(seed)) for seed in seeds]
        z = torch.stack(noises)
        with torch.no_grad():
            for step, (now, after) in enumerate(zip(levels[:-1][:stop_at], levels[1:])):
                sigmas = torch.full((len(z),), now)
                if guide is not None:
                    noise = self.predict_noise(z, sigmas, states.states)
                    guide(noise, noise, noise[None][:0], z, step, 1.0)
                z = z + (after - now) * self.network(z, sigmas, states.states)
        return z

    def decode(self, latents: Tensor) -> Tensor:
        return torch.zeros(len(latents), 8 * SIDE, 8 * SIDE, 3, dtype=torch.uint8)

    def encode_images(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), CHANNELS, SIDE, SIDE)

    def generate(
        self, texts: Sequence[str], seeds: Sequence[int], sampler: Sampler | None = None, guide: Guide | None = None
    ) -> Tensor:
        return self.decode(self.sample(self.encode(texts), seeds, sampler, guide))

    def remove_adapter(self) -> None:
        self.network.adapter = None

    def erased_state(self) -> dict[str, Tensor]:
        return {}

    def load_erased(self, state: Mapping[str, Tensor]) -> None: ...

    def to(self, device: Any) -> Flow:
        return self

    def park(self) -> None: ...


def pair_of(backbone: Flow) -> Pair:
    target, anchor = (backbone.encode([f"a {word}", f"the {word}"]) for word in ("cat", "sky"))
    return Pair(Concept("cat", "sky"), target, anchor)


def mined(
    pair: Pair,
    generator: Generator,
    m: float | None = None,
    n: float | None = None,
    prompts: Sequence[int] | None = None,
) -> Neighbours:
    """`contracts.Miner`: one point near the first prompt, and one beyond it."""
    first, anchor = pair.target.states[:1], pair.anchor.states[:1]
    rows = torch.ones(1, ROWS, dtype=torch.bool)
    return Neighbours(first + 0.1, anchor, rows, first + 1, rows)


def trained_losses(backbone: Flow, method: Method, cache: Path, steps: int = 2) -> list[float]:
    """The method's loop without Lightning: prepare, then AdamW on the aligner's loss."""
    align, latents = method.align, method.latents
    assert align is not None and latents is not None
    pair = pair_of(backbone)
    for part in (latents, align):
        if isinstance(part, Prepares):
            part.prepare(backbone, [pair], cache, 0)
    generator = Generator().manual_seed(0)
    weights = backbone.unfreeze(align.parameters) if align.lora is None else backbone.add_adapter(align.lora, generator)
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    found = []
    for step in range(1, steps + 1):
        z_t, t, *more = latents(backbone, 0, generator)
        assert t.is_floating_point() and bool(((t >= 0) & (t <= 1)).all()) and t.shape == z_t.shape[:1]
        known = more[0] if more else {}
        terms = align.loss(backbone, pair, mined, TrainingBatch(z_t, t, step, known), generator)
        optimizer.zero_grad()
        total = torch.stack([term for term in terms.values() if term.requires_grad]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in weights)
        optimizer.step()
        found.append(float(total.detach()))
    assert all(sigmas.is_floating_point() for sigmas in backbone.network.seen)
    return found


FEW = ["latents.batch=2"]
BANK = ["latents.images=2", "latents.chunk=2"]
METHODS = {
    "realera": [*FEW, *BANK],
    "ac": [*FEW, *BANK],
    "esd-x": [*FEW, "latents.steps=4"],
    "spm": [*FEW, "latents.steps=4"],
}


def test_it_plays_the_role() -> None:
    assert isinstance(Flow(), Backbone)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_on_continuous_timesteps(name: str, tmp_path: Path, load_method: Callable[..., Method]) -> None:
    backbone = Flow()
    before = {key: value.detach().clone() for key, value in backbone.network.named_parameters()}
    losses = trained_losses(backbone, load_method(name, *METHODS[name]), tmp_path)
    assert len(losses) == 2 and all(loss == loss for loss in losses) and any(losses)
    after = dict(backbone.network.named_parameters())
    moved = [key for key in after if key not in before or not torch.equal(before[key], after[key])]
    assert moved and (name in ("ac", "esd-x")) == ("to_k.weight" in moved), "a LoRA leaves the weights alone"


@pytest.mark.parametrize("law", ["bin", "level", "list"])
def test_every_law_of_a_rollout_gives_the_backbones_timesteps(
    law: str, tmp_path: Path, load_method: Callable[..., Method]
) -> None:
    words = ["latents.steps=4", f"latents.timestep={law}", "latents.batch=8"]
    latents = load_method("esd-x", *words).latents
    backbone = Flow()
    assert latents is not None and isinstance(latents, Prepares)
    latents.prepare(backbone, [pair_of(backbone)], tmp_path, 0)
    _, t, *_ = latents(backbone, 0, Generator().manual_seed(0))
    assert t.is_floating_point() and len(set(t.tolist())) > 1 and 0 <= float(t.min()) < float(t.max()) <= 1


def test_texts_are_compared_on_its_noise_levels() -> None:
    backbone = Flow()
    images = torch.randn(2, CHANNELS, SIDE, SIDE, generator=Generator().manual_seed(0))
    near, far = nearness.noise_distances(backbone, images, "cat", ["cat", "truck"]).tolist()
    assert near == 0 < far
    levels = {round(float(sigma), 3) for sigmas in backbone.network.seen for sigma in sigmas}
    assert levels == {level / 1000 for level in nearness.LEVELS}


def test_the_trained_network_may_be_the_text_encoder(load_method: Callable[..., Method]) -> None:
    """A loss on fresh text states trains it; the teacher encodes as the model that was loaded."""
    backbone = Flow()
    method = load_method("esd-x")
    vars(method.align)["network"] = "text_encoder"
    module = ErasureModule(backbone, method, [pair_of(backbone)], 0)
    assert {id(p) for p in module.parameters()} == {id(p) for p in backbone.embedding.parameters()}
    assert method.align is not None
    weights = backbone.unfreeze(method.align.parameters)
    optimizer = torch.optim.SGD(weights, lr=1.0)
    z_t, t = torch.randn(2, CHANNELS, SIDE, SIDE, generator=Generator().manual_seed(0)), torch.tensor([0.3, 0.8])

    def noise(text: str) -> Tensor:
        states = backbone.encode([text]).states.expand(2, -1, -1)
        return backbone.predict_noise(z_t, t, states)

    with backbone.original():
        taught = noise("sky")
    first = (noise("cat") - taught).square().mean()
    first.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert (noise("cat") - taught).square().mean() < first
    with backbone.original():
        assert torch.equal(noise("sky"), taught)


def test_the_noise_of_a_bank_is_what_the_model_should_predict() -> None:
    """For a flow the velocity; AC's and SA's losses compare the prediction with it."""
    backbone = Flow()
    bank = torch.randn(3, CHANNELS, SIDE, SIDE, generator=Generator().manual_seed(0))
    z_t, t, target = noised(backbone, bank, torch.tensor([0, 2]), Generator().manual_seed(1))
    sigma = t.view(-1, 1, 1, 1)
    torch.testing.assert_close(z_t, bank[[0, 2]] + sigma * target)


def test_whole_timesteps_of_stable_diffusion_come_back_exactly(new_backbone: Callable[..., Backbone]) -> None:
    mini = new_backbone()
    levels = torch.arange(1000)
    assert torch.equal(at_level(mini, levels), levels)
    drawn = mini.draw_timesteps(64, Generator().manual_seed(3))
    assert torch.equal(drawn, torch.randint(1000, (64,), generator=Generator().manual_seed(3)))
