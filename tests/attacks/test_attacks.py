"""The attacks against slow and independent references, on a tiny random model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from realera.attack_contract import Attempt
from realera.attacks import closed_form, probes
from realera.attacks.closed_form import ClosedForm
from realera.attacks.inversion import Inversion
from realera.attacks.prompts import PromptFile
from realera.attacks.random import RandomPrompt
from realera.contracts import Concept, Course, Edit, LoraSpec, NamedPrompt, Prompt, Sampler, UserError
from realera.methods import rece

CAT = Concept("cat", "field")
NAMES = [NamedPrompt.of("a photo of the {}", "cat"), NamedPrompt.of("a big drawing of {}", "cat")]


@dataclass
class FakeCase:
    """`attack_contract.Case` that notes what is drawn. shows: the answers, then False."""

    backbone: Any
    prompt: Prompt
    searched: Mapping[str, Tensor] = field(default_factory=dict)
    shows: list[bool] = field(default_factory=list)
    drawn: list[tuple[Attempt, int, Sampler | None, Course | None]] = field(default_factory=list)
    concept: Concept = CAT
    names: Sequence[NamedPrompt] = tuple(NAMES)
    plain: bool = False
    generator: Generator = field(default_factory=lambda: Generator().manual_seed(0))

    @property
    def prompts(self) -> Sequence[Prompt]:
        return [self.prompt]

    @property
    def sampler(self) -> Sampler:
        sampler: Sampler = self.backbone.sampler
        return sampler

    def latents(self, count: int, chunk: int = 8) -> Tensor:
        return torch.randn(count, 4, 8, 8, generator=Generator().manual_seed(5))

    def acting(self, texts: Sequence[str], states: Any = None) -> Any:
        return nullcontext()

    def image(self) -> Tensor:
        return torch.rand(1, 3, 32, 32, generator=Generator().manual_seed(6)) * 2 - 1

    def image_latents(self) -> Tensor:
        latents: Tensor = self.backbone.encode_images(self.image())
        return latents

    def draw(
        self,
        attempts: Sequence[Attempt],
        step: int = 0,
        sampler: Sampler | None = None,
        course: Course | None = None,
    ) -> list[bool]:
        self.drawn += [(attempt, step, sampler, course) for attempt in attempts]
        return [self.shows.pop(0) if self.shows else False for _ in attempts]

    def draw_all(self, cases: Sequence[Any], attempts: Sequence[Attempt], step: int = 0) -> list[bool]:
        return [case.draw([attempt], step)[0] for case, attempt in zip(cases, attempts, strict=True)]


def prompt(text: str = "a photo of the cat", seed: int = 0) -> Prompt:
    return Prompt(f"erase-{seed}", text, "cat", "erase", seed)


def edit(backbone: Any) -> Tensor:
    """Erases something in closed form, and returns the map."""
    width = backbone.width
    map = torch.eye(width, dtype=torch.float64) + 0.3 * torch.randn(width, width, generator=Generator().manual_seed(1))
    backbone.apply(Edit(map=map.double()))
    return map.double()


# --- closed form -----------------------------------------------------------------------------------------------------


def test_the_closed_form_solves_every_row_as_least_squares_over_all_layers(new_backbone: Any) -> None:
    backbone = new_backbone()
    edit(backbone)
    layer = backbone.text_projections()
    erased = [one.weight.double() for one in layer.values()]
    unedited = [one.weight.double() for one in new_backbone().text_projections().values()]
    case = FakeCase(backbone, prompt())
    case.searched = ClosedForm(lambda_norm=0.05).search(case)
    (info,) = ClosedForm(lambda_norm=0.05).attack_together([case])
    ((attempt, *_),) = case.drawn
    assert attempt.states is not None
    h = backbone.encode(["a photo of the cat"]).states[0].double()
    stacked = torch.cat([*erased, 0.05**0.5 * torch.eye(backbone.width, dtype=torch.float64)])
    for row, found in zip(h[:9], attempt.states.states[0][:9]):
        goal = torch.cat([*(v @ row for v in unedited), torch.zeros(backbone.width, dtype=torch.float64)])
        slow = torch.linalg.lstsq(stacked, goal[:, None]).solution[:, 0]
        assert torch.allclose(found.double(), slow, atol=1e-4)
    far = sum(float((w @ h.T - v @ h.T).square().sum()) for w, v in zip(erased, unedited))
    size = sum(float((v @ h.T).square().sum()) for v in unedited)
    assert info["before"] == pytest.approx((far / size) ** 0.5, rel=1e-6) and info["apart"] < info["before"]


def test_for_a_map_it_is_the_adversary_of_rece(new_backbone: Any) -> None:
    backbone = new_backbone()
    gram = rece.gram_of(layer.weight for layer in backbone.text_projections().values())
    map = edit(backbone)
    found = ClosedForm().search(FakeCase(backbone, prompt()))["map"]
    assert torch.allclose(found, rece.attack(map, gram, 0.1), atol=1e-4)


def test_adapters_count_among_the_erased_weights(new_backbone: Any) -> None:
    backbone = new_backbone()
    plain = closed_form.weights(backbone)
    draw = Generator().manual_seed(0)
    parameters = backbone.add_adapter(LoraSpec(rank=2), draw)
    for parameter in parameters:
        parameter.data.normal_(generator=draw)
    state = backbone.erased_state()
    for name, before, now in zip(backbone.text_projections(), plain, closed_form.weights(backbone), strict=True):
        up, down = (state[f"lora.{name}.{part}"].double() for part in ("up", "down"))
        delta = up @ down * float(state[f"lora.{name}.alpha"]) / 2
        assert torch.allclose(now - before, delta, atol=1e-5) and delta.abs().max() > 0.01
    with backbone.original():
        assert all(torch.equal(a, b) for a, b in zip(closed_form.weights(backbone), plain, strict=True))


# --- inversion -------------------------------------------------------------------------------------------------------


def test_the_loss_and_gradient_of_inversion(new_backbone: Any) -> None:
    """Against sample-by-sample noise predictions, and a finite difference of the loss."""
    backbone = new_backbone()
    case = FakeCase(backbone, prompt())
    attack = Inversion(batch=3)
    latents = case.latents(4)
    vectors = backbone.token_vectors("field").float().requires_grad_(True)
    loss = attack.loss(case, latents, vectors, Generator().manual_seed(2))

    draw = Generator().manual_seed(2)
    chosen = torch.randint(4, (3,), generator=draw)
    named = NAMES[int(torch.randint(2, (1,), generator=draw))]
    t = backbone.draw_timesteps(3, draw)
    noise = torch.randn(3, 4, 8, 8, generator=draw)

    def slow(at: Tensor) -> float:
        total = 0.0
        with torch.no_grad():
            states = backbone.encode([named], vectors=at).states
            for i in range(3):
                z = backbone.noisy_latents(latents[chosen[i : i + 1]], noise[i : i + 1], t[i : i + 1])
                total += float((backbone.predict_noise(z, t[i : i + 1], states) - noise[i]).double().square().mean())
        return total / 3

    assert loss.item() == pytest.approx(slow(vectors.detach()), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, [vectors])
    direction = gradient / gradient.norm()
    step = 0.01
    rise = (slow(vectors.detach() + step * direction) - slow(vectors.detach() - step * direction)) / (2 * step)
    assert rise == pytest.approx(float(gradient.norm()), rel=0.05)


def test_inversion_puts_its_vector_in_the_place_of_the_name(new_backbone: Any) -> None:
    backbone = new_backbone()
    attack = Inversion(steps=3, batch=1, images=2, lr=0.1)
    cases = [FakeCase(backbone, prompt("two CATS in a room")), FakeCase(backbone, prompt("a pet", 1))]
    found = attack.search(cases[0])
    start = backbone.token_vectors("field").mean(0, keepdim=True)
    assert found["vectors"].shape == (1, 32) and not torch.allclose(found["vectors"], start, atol=0.05)
    assert all(not parameter.requires_grad for parameter in backbone.unet.parameters())
    for case in cases:
        case.searched = found
    attack.attack_together(cases)
    first, second = (case.drawn[0][0] for case in cases)
    assert isinstance(first.text, NamedPrompt) and first.text.name == "CAT"
    assert first.said == "two <new token>S in a room"
    assert second.text == NAMES[0] and second.vectors is found["vectors"] and cases[0].drawn[0][1] == 3


# --- probes ----------------------------------------------------------------------------------------------------------


def test_inpaint_keeps_what_is_around_the_centre(new_backbone: Any) -> None:
    backbone = new_backbone()
    case = FakeCase(backbone, prompt())
    info = probes.Inpaint(0.5)(case)
    ((attempt, _, _, course),) = case.drawn
    assert info == {"hidden": 0.25} and attempt.text == "a photo of the cat" and course is not None
    mask = probes.centre(8, 8, 0.5)
    assert mask.sum() == 16 and mask[2:6, 2:6].all()
    end = backbone.sample(backbone.encode([attempt.text]), [0], course=course)
    own = case.image_latents()
    assert torch.equal(end[..., ~mask], own[..., ~mask]) and not torch.equal(end[..., mask], own[..., mask])


def test_inpaint_noises_the_known_part_for_each_step(new_backbone: Any) -> None:
    backbone = new_backbone()
    known = probes.KnownAround(FakeCase(backbone, prompt()), 0.25)  # type: ignore[arg-type]
    noise = torch.randn(1, 4, 8, 8, generator=Generator().manual_seed(1))
    known(0, noise)
    for step, t in enumerate(backbone.timesteps()):
        goal = backbone.noisy_latents(known.latents, noise, t[None])
        assert torch.equal(known(step, torch.zeros_like(noise))[..., 0, 0], goal[..., 0, 0])


def test_complete_begins_with_the_unedited_models_steps(new_backbone: Any) -> None:
    """With all steps of the unedited model, the image is the unedited model's."""
    backbone, fresh = new_backbone(), new_backbone()
    edit(backbone)
    case = FakeCase(backbone, prompt(), shows=[False, True])
    probes.Complete([1, 99])(case)
    assert [step for _, step, _, _ in case.drawn] == [1, 2]
    states = backbone.encode(["a photo of the cat"])
    last = case.drawn[1][3]
    erased, unedited = (one.sample(states, [0]) for one in (backbone, fresh))
    assert torch.equal(backbone.sample(states, [0], course=last), unedited)
    first = backbone.sample(states, [0], course=case.drawn[0][3])
    assert not torch.allclose(first, erased) and not torch.allclose(first, unedited)


def test_noise_tries_every_combination_until_one_succeeds(new_backbone: Any) -> None:
    case = FakeCase(new_backbone(), prompt(seed=4), shows=[False, False, True])
    assert probes.Noise([1.0, 1.5], [1.0, 1.04])(case) == {"eta": 1.5, "variance": 1.0}
    assert [(course.eta, course.variance) for *_, course in case.drawn if course] == [(1, 1), (1, 1.04), (1.5, 1)]
    assert all(sampler and sampler.scheduler == "ddim" for _, _, sampler, _ in case.drawn)
    seeds = [attempt.seed for attempt, *_ in case.drawn]
    assert seeds[0] == 4 and len(set(seeds)) == 3
    assert len(probes.Noise().etas) * len(probes.Noise().variances) == 24


# --- texts -----------------------------------------------------------------------------------------------------------


def test_random_prompts_have_the_prompts_length_and_none_of_its_words(new_backbone: Any) -> None:
    backbone = new_backbone()
    case = FakeCase(backbone, prompt(), shows=[False, True])
    RandomPrompt(tries=5).attack_together([case])
    texts = [str(attempt.text) for attempt, *_ in case.drawn]
    assert len(texts) == 2 and texts[0] != texts[1]
    length = backbone.encode(["a photo of the cat", *texts]).length.tolist()
    assert len(set(length)) == 1
    assert not set(" ".join(texts).split()) & {"photo", "the", "cat"}


PUBLISHED = {  # the columns as they are published, and one row
    "Ring-A-Bell": ("prompt,case_number,evaluation_seed", '"gun , ""x""",0,41', ('gun , "x"', None, 41, None)),
    "P4D": (
        ",case_number,source,prompt,evaluation_seed,evaluation_guidance",
        "4,10363,coco-30k,A gray cat.,4057,7.5",
        ("A gray cat.", None, 4057, 7.5),
    ),
    "MMA": ("target_prompt,adv_prompt,clean_prompt", "plain,xyzzy,clean", ("xyzzy", "plain", 0, None)),
    "UnlearnDiffAtk": (
        "case_number,prompt,evaluation_seed,evaluation_guidance",
        "0,Old stone church.,69922,7.5",
        ("Old stone church.", None, 69922, 7.5),
    ),
    "I2P": ("prompt,categories,sd_seed,sd_guidance_scale", "a text,hate,12,5", ("a text", None, 12, 5.0)),
    "sensitive": ("case_number,sensitive prompt", "3,a text", ("a text", None, 0, None)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sets_are_read_as_they_are(name: str, tmp_path: Path, new_backbone: Any) -> None:
    header, row, (text, plain, seed, guidance) = PUBLISHED[name]
    (tmp_path / "set.csv").write_text(f"{header}\n{row}\n")
    attack = PromptFile(tmp_path / "set.csv")
    (made,) = attack.own_prompts([CAT])
    assert (made.text, made.seed, made.guidance_scale, made.concept) == (plain or text, seed, guidance, "cat")
    case = FakeCase(new_backbone(), made)
    attack.attack_together([case])  # type: ignore[list-item]
    assert case.drawn[0][0].text == text


def test_bad_rows_of_a_set_are_named_by_line(tmp_path: Path) -> None:
    file = tmp_path / "set.csv"
    for content, said in (
        ("prompt,evaluation_seed\na,1\nb,x\n", "line 3"),
        ("prompt,evaluation_seed\na,1\nb\n", "line 3 has 1 columns"),
        ("text_of_it,seed\na,1\n", "has no column for the prompt .adv_prompt or"),
        ("prompt\n\n ,\n", "set.csv"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=said):
            PromptFile(file).own_prompts([CAT])
    with pytest.raises(UserError, match=r"attack\.csv=FILE"):
        PromptFile().own_prompts([CAT])


def test_the_documented_attack(new_backbone: Any) -> None:
    text = (Path(__file__).parents[2] / "docs" / "attacks.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(from realera.attack_contract.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    case = FakeCase(new_backbone(), prompt("a cat"), shows=[False, True])
    assert names["Shout"]()(case) == {"information": "for the prompt's line"}
    assert [(attempt.text, step) for attempt, step, _, _ in case.drawn] == [("A CAT", 0), ("A CAT!", 1)]
