"""The bank of anchor images: drawn once, by the original model, and continued after an interruption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from options import built
from realera.contracts import Edit, Pair, Sampler, UserError
from realera.methods.latents import AnchorBank


class Counted:
    """A backbone that counts the images it draws, and can fail at a given image."""

    def __init__(self, backbone: Any, fail_at: int | None = None) -> None:
        self.backbone = backbone
        self.drawn: list[int] = []
        self.fail_at = fail_at

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backbone, name)

    def sample(self, states: Any, seeds: list[int], sampler: Sampler | None) -> Any:
        if self.fail_at is not None and len(self.drawn) >= self.fail_at:
            raise KeyboardInterrupt
        self.drawn += seeds
        return self.backbone.sample(states, seeds, sampler)


@pytest.fixture
def backbone(new_backbone: Callable[..., Any]) -> Counted:
    return Counted(new_backbone())


@pytest.fixture
def pairs(backbone: Counted, new_pairs: Callable[..., list[Pair]]) -> list[Pair]:
    return new_pairs(backbone, ("cat", "field"))


def bank(backbone: Any, pairs: list[Pair], cache: Path, seed: int = 0, **settings: Any) -> torch.Tensor:
    source = AnchorBank(**{"images": 5, "chunk": 2, **settings})
    source.prepare(backbone, pairs, cache, seed)
    return source.banks[0]


def test_it_is_drawn_once(backbone: Counted, pairs: list[Pair], tmp_path: Path) -> None:
    first = bank(backbone, pairs, tmp_path)
    assert len(set(backbone.drawn)) == 5
    assert torch.equal(first, bank(backbone, pairs, tmp_path))
    assert len(backbone.drawn) == 5
    assert first.shape == (5, 4, 8, 8)


def test_the_bank_has_images_of_the_anchor(backbone: Counted, pairs: list[Pair], tmp_path: Path) -> None:
    """Image i is of the anchor's training prompt i mod P, whether it is drawn alone or in a batch."""
    made = bank(backbone, pairs, tmp_path)
    prompts = ["a photo of the field", "a field", "a big drawing of field", "a photo of the field", "a field"]
    by_hand = backbone.backbone.sample(backbone.encode(prompts), backbone.drawn)
    assert torch.allclose(made, by_hand, atol=1e-5)


def test_the_original_model_draws_it(backbone: Counted, pairs: list[Pair], tmp_path: Path) -> None:
    before = bank(backbone, pairs, tmp_path / "before")
    backbone.apply(Edit(map=2 * torch.eye(32, dtype=torch.float64)))
    assert torch.equal(before, bank(backbone, pairs, tmp_path / "after"))


def test_an_interrupted_bank_is_continued(
    new_backbone: Callable[..., Any], backbone: Counted, pairs: list[Pair], tmp_path: Path
) -> None:
    whole = bank(backbone, pairs, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        bank(Counted(new_backbone(), fail_at=4), pairs, tmp_path / "cut")
    again = Counted(new_backbone())
    assert torch.equal(whole, bank(again, pairs, tmp_path / "cut"))
    assert len(again.drawn) == 1


def test_a_torn_chunk_is_drawn_again(backbone: Counted, pairs: list[Pair], tmp_path: Path) -> None:
    first = bank(backbone, pairs, tmp_path)
    file = sorted(tmp_path.rglob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(first, bank(backbone, pairs, tmp_path))
    assert len(backbone.drawn) == 7


def test_every_seed_works(backbone: Counted, pairs: list[Pair], tmp_path: Path) -> None:
    """Also the largest seed, whose multiples are too large for a generator."""
    bank(backbone, pairs, tmp_path)
    assert backbone.drawn == [1_000_000 + number for number in range(5)], "the seeds of seed 0 stay"
    bank(backbone, pairs, tmp_path, seed=2**63 - 1)
    assert all(0 <= seed < 2**63 for seed in backbone.drawn)


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"sampler": Sampler("ddim", 3, 7.5, 32, 32)}, {"images": 4}, {"chunk": 5}]
)
def test_other_inputs_make_another_bank(
    other: dict[str, Any], backbone: Counted, pairs: list[Pair], tmp_path: Path
) -> None:
    bank(backbone, pairs, tmp_path)
    bank(backbone, pairs, tmp_path, **other)
    assert len(list((tmp_path / "latents").iterdir())) == 2


def test_a_shared_anchor_is_one_bank(backbone: Counted, new_pairs: Callable[..., list[Pair]], tmp_path: Path) -> None:
    bank(backbone, new_pairs(backbone, ("cat", "field"), ("dog", "field")), tmp_path)
    assert len(backbone.drawn) == 5


def test_noised_latents(backbone: Counted, new_pairs: Callable[..., list[Pair]], tmp_path: Path) -> None:
    """z_t = sqrt(abar) x0 + sqrt(1 - abar) noise of images of the given concept, t uniform in 0 ... 999."""
    source = AnchorBank(images=3, batch=400)
    source.prepare(backbone, new_pairs(backbone, ("cat", "field"), ("ship", "sky")), tmp_path, 0)
    source.banks[1] += 3  # a random model draws much the same for either
    z_t, t = source(backbone, 1, torch.Generator().manual_seed(0))
    assert z_t.shape == (400, 4, 8, 8)
    assert 0 <= int(t.min()) < 20 and 980 < int(t.max()) <= 999
    assert abs(float(t.float().mean()) - 499.5) < 60
    early = z_t[t < 20]
    nearest = torch.stack([(early - image).flatten(1).norm(dim=1) for image in source.banks[1]]).min(dim=0).values
    other = torch.stack([(early - image).flatten(1).norm(dim=1) for image in source.banks[0]])
    assert float(nearest.max()) < 10 < float(other.min())
    again = source(backbone, 1, torch.Generator().manual_seed(0))
    assert torch.equal(z_t, again[0]) and torch.equal(t, again[1])


@pytest.mark.parametrize(
    "settings", [{"images": 0}, {"batch": 0}, {"chunk": -1}, {"of": "neighbours"}, {"give": ["image"]}]
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        built(AnchorBank, **settings)


def test_noise_and_prompts_can_be_given(backbone: Counted, pairs: list[Pair], tmp_path: Path) -> None:
    """z_t without the given noise is an image of the given prompt of the concept."""
    source = AnchorBank(images=4, batch=6, of="target", give=["noise", "prompts"])
    source.prepare(backbone, pairs, tmp_path, 0)
    z_t, t, known = source(backbone, 0, torch.Generator().manual_seed(0))
    clean = backbone.backbone.sample(pairs[0].target, backbone.drawn[:3])  # image 3 is drawn from prompt 0 again
    for b, prompt in enumerate(known["prompts"].tolist()):
        images = (clean[prompt], source.banks[0][3]) if prompt == 0 else (clean[prompt],)
        back = [backbone.noisy_latents(image[None], known["noise"][b : b + 1], t[b : b + 1])[0] for image in images]
        assert min(float((z_t[b] - made).abs().max()) for made in back) < 1e-4
    plain = AnchorBank(images=4, batch=6, of="target")
    plain.prepare(backbone, pairs, tmp_path, 0)
    assert torch.equal(z_t, plain(backbone, 0, torch.Generator().manual_seed(0))[0])


def test_half_of_the_images_are_mirrored(backbone: Counted, pairs: list[Pair], tmp_path: Path) -> None:
    """By hand: pixels are flipped, not latents. A mirrored image keeps its prompt and is not cached. Without `flip` the
    result is unchanged."""
    plain = AnchorBank(images=5, batch=300, chunk=2, give=["noise", "prompts"])
    flipped = AnchorBank(images=5, batch=300, chunk=2, give=["noise", "prompts"], flip=True)
    for source in (flipped, plain):
        source.prepare(backbone, pairs, tmp_path, 0)
    assert len(backbone.drawn) == 5
    bank, mirrors = flipped.banks[0].split(5)
    assert torch.equal(bank, plain.banks[0])
    images = backbone.decode(bank).float() / 127.5 - 1
    with torch.no_grad():
        exchanged = torch.stack([images[:, :, column] for column in reversed(range(images.shape[2]))], dim=2)
        by_hand = backbone.vae.encode(exchanged.permute(0, 3, 1, 2)).latent_dist.mode()
    torch.testing.assert_close(mirrors, by_hand * backbone.vae.config.scaling_factor, atol=1e-5, rtol=1e-4)
    assert (mirrors - bank.flip(-1)).abs().max() > 0.01
    z_t, t, known = flipped(backbone, 0, torch.Generator().manual_seed(0))
    turns = torch.randint(10, (300,), generator=torch.Generator().manual_seed(0))
    assert 120 < int((turns > 4).sum()) < 180
    assert torch.equal(known["prompts"], turns % 5 % 3)
    assert torch.equal(z_t, backbone.noisy_latents(flipped.banks[0][turns], known["noise"], t))
