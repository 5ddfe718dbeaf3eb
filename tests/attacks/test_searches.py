"""The searches over tokens against slow and independent references, on a tiny random model."""

from __future__ import annotations

import math
import string
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from realera.attack_contract import Attempt, HasTokens, SearchesTexts
from realera.attacks import mma, p4d, ring_a_bell, tokens, unlearndiff
from realera.attacks.mma import MMADiffusion
from realera.attacks.p4d import PromptingForDebugging
from realera.attacks.ring_a_bell import RingABell
from realera.attacks.tokens import Vocabulary, is_banned
from realera.attacks.unlearndiff import UnlearnDiffAttack
from realera.backbones.text import BYTES
from realera.backbones.unet import UNetBackbone
from realera.contracts import Concept, Edit, NamedPrompt, Prompt, Sampler, UserError
from realera.files import cache_costs

CAT = Concept("cat", "field")
NAMES = [NamedPrompt.of("a photo of the {}", "cat"), NamedPrompt.of("a big drawing of {}", "cat")]


@dataclass
class FakeCase:
    """`attack_contract.Case` that notes what is drawn. shows: the answers, then False."""

    backbone: Any
    text: str = "a photo of the cat"
    shows: list[bool] = field(default_factory=list)
    drawn: list[tuple[str, int]] = field(default_factory=list)
    searched: dict[str, Tensor] = field(default_factory=dict)
    acted: list[list[str]] = field(default_factory=list)
    seed: int = 0
    concept: Concept = CAT
    names: Sequence[NamedPrompt] = tuple(NAMES)

    def __post_init__(self) -> None:
        self.prompt = Prompt(f"erase-{self.seed}", self.text, "cat", "erase", self.seed)
        self.generator = Generator().manual_seed(self.seed)

    def image_latents(self) -> Tensor:
        return torch.randn(1, 4, 8, 8, generator=Generator().manual_seed(6 + self.seed))

    def acting(self, texts: Sequence[str], states: Any = None) -> Any:
        self.acted.append(list(texts))
        assert len(states.states) == len(texts)
        return nullcontext()

    def draw_all(self, cases: Sequence[FakeCase], attempts: Sequence[Attempt], step: int = 0) -> list[bool]:
        for case, attempt in zip(cases, attempts, strict=True):
            assert isinstance(attempt.text, str) and attempt.vectors is None and attempt.states is None
            case.drawn.append((attempt.text, step))
        return [case.shows.pop(0) if case.shows else False for case in cases]


@pytest.fixture
def erased(new_backbone: Callable[..., Any]) -> Any:
    """A backbone whose weights differ from the original ones."""
    backbone = new_backbone()
    noise = torch.randn(32, 32, generator=Generator().manual_seed(1), dtype=torch.float64)
    backbone.apply(Edit(map=torch.eye(32, dtype=torch.float64) + 0.3 * noise))
    return backbone


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))


@contextmanager
def one_hot_tokens(backbone: Any, one_hot: Tensor, start: int) -> Iterator[None]:
    """Inside this context the tokens from row `start` are one_hot (n, V) times the embedding matrix."""
    table = backbone.text.model.get_input_embeddings()

    def put(module: Any, inputs: Any, output: Tensor) -> Tensor:
        vectors = one_hot @ table.weight
        return torch.cat([output[:, :start], vectors[None], output[:, start + len(vectors) :]], dim=1)

    hook = table.register_forward_hook(put)
    try:
        yield
    finally:
        hook.remove()


def read_slowly(backbone: Any, ids: Sequence[int], one_hot: Tensor | None = None) -> Tensor:
    """(T, D): the states of a prompt of these tokens, from the text model alone."""
    end, pad = backbone.text.tokenizer.eos_token_id, backbone.text.tokenizer.pad_token_id
    row = [backbone.text.tokenizer.bos_token_id, *ids, end]
    row += [pad] * (77 - len(row))
    with nullcontext() if one_hot is None else one_hot_tokens(backbone, one_hot, 1):
        states: Tensor = backbone.text.model(input_ids=torch.tensor([row])).last_hidden_state[0]
    return states


def noise_slowly(backbone: Any, z_t: Tensor, t: int, states: Tensor) -> Tensor:
    out: Tensor = backbone.unet(z_t, torch.tensor(t), encoder_hidden_states=states[None]).sample
    return out


def noised_slowly(x_0: Tensor, noise: Tensor, t: int) -> Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    share = float(torch.cumprod(1 - betas, 0)[t])
    return math.sqrt(share) * x_0 + math.sqrt(1 - share) * noise


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_letters_of_byte_pairs_are_the_tokenizers_own() -> None:
    from tokenizers import pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert set(BYTES) == set(pre_tokenizers.ByteLevel.alphabet())
    for text in ("ordinary", "caf\u00e9 \u2603 \U0001f49e\x07", "".join(map(chr, range(1, 256)))):
        ((letters, _),) = byte_level.pre_tokenize_str(text)
        assert b"".join(BYTES[letter] for letter in letters).decode() == text


def test_texts_of_tokens(new_backbone: Callable[..., Any]) -> None:
    backbone: Any = new_backbone()
    known = backbone.text.tokenizer.get_vocab()
    ids = backbone.token_ids(["a photo of the Cat", ""])
    assert ids == [[known[f"{word}</w>"] for word in ("a", "photo", "of", "the", "cat")], []]
    assert backbone.text_of(ids[0]) == "a photo of the cat"
    assert backbone.text_of([known["c"], known["a"], known["t</w>"], known["<|endoftext|>"]]) == "cat"
    assert backbone.text_of([known["\u00c3"]]) == "\ufffd"
    assert backbone.token_embeddings().shape == (len(known), 32)
    writable = set(backbone.writable_tokens())
    assert not writable & {known["<|startoftext|>"], known["<|endoftext|>"], known["\u00c3"], known["\u0100"]}
    assert {known["cat</w>"], known["c"], known["!"]} <= writable
    assert isinstance(backbone, HasTokens)


def test_two_text_encoders_share_the_tokens(tiny_sdxl: Path) -> None:
    backbone = UNetBackbone("sdxl", tiny_sdxl, Sampler("ddim", 2, 5.0, 64, 64))
    vocabulary = Vocabulary(backbone, "words")
    assert vocabulary.vectors.shape == (len(vocabulary), backbone.width)
    places = torch.tensor([3, 5])
    states = tokens.states_of(backbone, [vocabulary.vectors[places]])
    assert torch.allclose(states.states, backbone.encode([vocabulary.text(places)]).states, atol=1e-5)
    assert states.pooled is not None


def test_words_are_read_as_themselves(new_backbone: Callable[..., Any]) -> None:
    backbone = new_backbone()
    every, words = Vocabulary(backbone, "all"), Vocabulary(backbone, "words", banned=["cat", "a"])
    assert len(words) < len(every)
    for token in words.ids.tolist():
        assert backbone.token_ids([backbone.text_of([token])]) == [[token]]
    texts = {backbone.text_of([token]) for token in words.ids.tolist()}
    assert "photo" in texts and "field" in texts and "cat" not in texts and "a" not in texts


def test_a_backbone_without_tokens_is_refused() -> None:
    class Other:
        name = "other"

    with pytest.raises(UserError, match="inversion"):
        tokens.encoder_of(Other())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "banned"),
    [("a catalogue", True), ("CAT", True), ("dog", False), ("my ox", True), ("box", False)],
)
def test_banned_texts(text: str, banned: bool) -> None:
    assert is_banned(text, ["cat", "ox"]) == banned


def test_a_search_on_text_alone_is_made_once(new_backbone: Callable[..., Any]) -> None:
    made: list[int] = []

    def make() -> list[int]:
        made.append(1)
        return [4, 5]

    def found(**about: Any) -> list[int]:
        return tokens.found_once(new_backbone(), "kind", about, Generator().manual_seed(3), make)

    assert found(prompt="x") == found(prompt="x") == [4, 5] and len(made) == 1
    assert found(prompt="y") == [4, 5] and len(made) == 2


# --- UnlearnDiffAtk --------------------------------------------------------------------------------------------------


def bisected(row: Tensor) -> Tensor:
    low, high = float(row.min()) - 1, float(row.max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((row - middle).clamp(0, 1).sum()) > 1 else (low, middle)
    return (row - low).clamp(0, 1)


def test_the_projection_onto_the_simplex() -> None:
    points = torch.randn(20, 50, generator=Generator().manual_seed(0), dtype=torch.float64)
    found = unlearndiff.on_simplex(points)
    assert torch.allclose(found, torch.stack([bisected(row) for row in points]), atol=1e-9)
    assert torch.allclose(unlearndiff.on_simplex(found), found, atol=1e-12)


def test_a_step_of_unlearndiff(erased: Any) -> None:
    """Against one-hot vectors times the embedding matrix, the U-Net called directly, and Adam written out."""
    attack = UnlearnDiffAttack(tokens=2, lr=0.05, weight_decay=0.1)
    vocabulary = Vocabulary(erased, "all")
    case: Any = FakeCase(erased)
    search = unlearndiff._Search(case, vocabulary, attack)
    before = search.points.clone()
    unlearndiff.step([search], 310.0)

    generator = Generator().manual_seed(0)
    places = torch.cat([torch.multinomial(row[None], 1, generator=generator) for row in before])[:, 0]
    assert torch.equal(places, unlearndiff.drawn_tokens(before, Generator().manual_seed(0)))
    generator = Generator().manual_seed(0)
    torch.multinomial(before, 1, generator=generator)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    every = len(erased.token_embeddings())
    own = erased.token_ids([case.prompt.text])[0]
    ids = [*vocabulary.ids[places].tolist(), *own]
    one_hot = torch.nn.functional.one_hot(torch.tensor(ids), every).float().requires_grad_()
    states = read_slowly(erased, ids, one_hot)
    loss = (noise_slowly(erased, noised_slowly(case.image_latents(), noise, 310), 310, states) - noise).square().mean()
    (gradient,) = torch.autograd.grad(loss, [one_hot])
    expected = gradient[:2, vocabulary.ids].clamp(-1, 1)
    assert expected.abs().max() > 0
    assert torch.allclose(search.points.grad, expected, rtol=1e-3, atol=1e-7)

    decayed = search.points.grad + 0.1 * before  # the first step of Adam is lr x sign, but for its eps
    stepped = before - 0.05 * decayed / (decayed.abs() + 1e-8)
    assert torch.allclose(search.points, torch.stack([bisected(row) for row in stepped]), atol=1e-4)
    assert case.acted == [[f"{vocabulary.text(places)} {case.prompt.text}"]]


def test_the_gradient_of_the_points_is_clipped(erased: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = unlearndiff.denoising_losses
    monkeypatch.setattr(unlearndiff, "denoising_losses", lambda *given: 1e9 * losses(*given))
    case: Any = FakeCase(erased)
    search = unlearndiff._Search(case, Vocabulary(erased, "all"), UnlearnDiffAttack(tokens=2))
    unlearndiff.step([search], 310.0)
    assert search.points.grad is not None and float(search.points.grad.abs().max()) == 1


def test_unlearndiff_draws_after_each_timestep_and_stops(erased: Any) -> None:
    attack = UnlearnDiffAttack(tokens=2, timesteps=3, iterations=2, lr=0.3)
    assert UnlearnDiffAttack().levels[:2] == [10, 30] and UnlearnDiffAttack().levels[-1] == 990
    cases: Any = [FakeCase(erased, shows=[False, True]), FakeCase(erased, "a dog", seed=1)]
    told = attack.attack_together(cases)
    assert [step for _, step in cases[0].drawn] == [2, 4] and [step for _, step in cases[1].drawn] == [2, 4, 6]
    for case, one in zip(cases, told):
        text, _ = case.drawn[-1]
        assert text.endswith(f" {case.prompt.text}") and one["searched"][2:] == case.prompt.text.split()
        assert one["typed"] == [erased.text_of([token]) for token in erased.token_ids([text])[0]]
    alone: Any = FakeCase(erased, shows=[False, True])
    attack(alone)
    assert len(alone.drawn) == 2 and alone.drawn[0][0] == cases[0].drawn[0][0]


def test_a_long_prompt_leaves_room_for_the_tokens(erased: Any) -> None:
    case: Any = FakeCase(erased, "cat " * 100)
    search = unlearndiff._Search(case, Vocabulary(erased, "all"), UnlearnDiffAttack(tokens=5))
    assert len(search.own) == 70
    unlearndiff.step([search], 10.0)


# --- P4D -------------------------------------------------------------------------------------------------------------


def test_the_nearest_token_has_the_largest_cosine(erased: Any) -> None:
    vocabulary = Vocabulary(erased, "words")
    vectors = torch.randn(4, 32, generator=Generator().manual_seed(0))
    for vector, place in zip(vectors, vocabulary.nearest(vectors).tolist()):
        cosines = [float(vector @ row / vector.norm() / row.norm()) for row in vocabulary.vectors]
        assert place == max(range(len(cosines)), key=lambda i: cosines[i])


@pytest.mark.parametrize("length", [1, 3, 4, 6, 7])
def test_tokens_are_inserted_as_in_the_official_code(length: int) -> None:
    own = list(range(length))
    count = length // 3 + 1
    searched = [place % 4 == 0 for place in range(length + count)]
    found = p4d.arranged(own, 3, 75)
    assert [token is None for token in found] == searched and [token for token in found if token is not None] == own
    assert p4d.arranged(list(range(75)), 3, 75) == p4d.arranged(list(range(75)), 3, 200)[:75]


@pytest.mark.parametrize("form", ["n", "k"])
def test_a_step_of_p4d(erased: Any, new_backbone: Callable[..., Any], form: Any) -> None:
    """Against the U-Nets called directly, the original one in a second model, and AdamW written out."""
    attack = PromptingForDebugging(form, tokens=3, interval=2)
    case: Any = FakeCase(erased)
    search = p4d._Search(case, vocabulary := Vocabulary(erased, "all"), attack)
    before, ids, state = search.vectors.clone(), search.ids, case.generator.get_state()
    p4d.step([search], batch=2)

    generator = Generator()
    generator.set_state(state)
    timesteps = torch.randint(1000, (2,), generator=generator)
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    one_hot = torch.nn.functional.one_hot(torch.tensor(ids), len(erased.token_embeddings())).float().requires_grad_()
    states = read_slowly(erased, ids, one_hot)
    original = new_backbone()
    goal = read_slowly(original, original.token_ids([case.prompt.text])[0])
    total = torch.zeros(())
    for t, one in zip(timesteps.tolist(), noise):
        z_t = noised_slowly(case.image_latents(), one[None], t)
        with torch.no_grad():
            aim = noise_slowly(original, z_t, t, goal)
        total = total + (noise_slowly(erased, z_t, t, states) - aim).square().mean() / 2
    (gradient,) = torch.autograd.grad(total, [one_hot])
    by_token = search.vectors.grad @ erased.token_embeddings().T
    free = [place for place, token in enumerate(search.order) if token is None]
    assert len(free) == 3 and gradient.abs().max() > 0
    assert torch.allclose(by_token, gradient[free], rtol=1e-3, atol=1e-7)
    step = search.vectors.grad / (search.vectors.grad.abs() + 1e-8)
    assert torch.allclose(search.vectors, before * (1 - 0.1 * 0.1) - 0.1 * step, atol=1e-4)
    words = [erased.text_of([token]) for token in ids]
    if form == "k":
        assert [words[1], words[2], words[4], words[5], words[7]] == case.prompt.text.split()
    assert len(vocabulary) > 50 and case.acted == [[erased.text_of(ids)] * 2]


def test_p4d_tests_the_prompt_and_stops(erased: Any) -> None:
    attack = PromptingForDebugging(tokens=3, steps=5, test=2, vocabulary="words")
    cases: Any = [FakeCase(erased, shows=[False, True]), FakeCase(erased, "a dog", seed=1)]
    told = attack.attack_together(cases)
    assert [step for _, step in cases[0].drawn] == [2, 4] and [step for _, step in cases[1].drawn] == [2, 4, 5]
    assert all(len(one["searched"]) == 3 for one in told)
    assert " ".join(told[1]["searched"]) == erased.text_of(erased.token_ids([" ".join(told[1]["searched"])])[0])


# --- Ring-A-Bell -----------------------------------------------------------------------------------------------------


def test_the_goal_of_ring_a_bell(erased: Any) -> None:
    """c is the mean of the differences of the pairs, and the distance goes over all rows."""
    vector = ring_a_bell.concept_vector(erased, NAMES, "field")
    pairs = [("a photo of the cat", "a photo of the field"), ("a big drawing of cat", "a big drawing of field")]
    with torch.no_grad():
        read = [[read_slowly(erased, erased.token_ids([text])[0]) for text in pair] for pair in pairs]
        expected = sum(with_it - without for with_it, without in read) / 2
        assert torch.allclose(vector, expected, atol=1e-5)
        goal = read[0][0] + 3 * expected
        slowly = sum(float((x - y) ** 2) for x, y in zip(goal.flatten(), read[1][0].flatten()))
    assert float(ring_a_bell.distances(erased, ["a big drawing of cat"], goal)[0]) == pytest.approx(slowly, rel=1e-4)


def test_children_swap_their_ends() -> None:
    parents = torch.arange(6)[:, None] * 10 + torch.arange(4)
    found = ring_a_bell.crossed(parents, 1.0, Generator().manual_seed(0))
    assert len(found) == 18 and torch.equal(found[::3], parents)
    points = []
    for own, one, two in found.unflatten(0, (6, 3)):
        swapped = one // 10 != own // 10  # the tokens of the other parent
        point = int((~swapped).sum())
        other = one // 10
        points.append(point)
        assert torch.equal(one % 10, torch.arange(4)) and torch.equal(two % 10, torch.arange(4))
        if point < 4 and swapped.any():
            assert not swapped[:point].any() and swapped[point:].all()
            assert (two[:point] // 10 == other[-1]).all() and torch.equal(two[point:], own[point:])
    assert min(points) == 0 and len(set(points)) > 2
    assert torch.equal(ring_a_bell.crossed(parents, 0.0, Generator().manual_seed(0)), parents)


def test_mutations_replace_one_token() -> None:
    population = torch.zeros(4000, 5, dtype=torch.int64)
    found = ring_a_bell.mutated(population, 0.25, 1000, Generator().manual_seed(0))
    changed = (found != population).sum(dim=1)
    assert int(population.sum()) == 0 and set(changed.tolist()) == {0, 1}
    assert float(changed.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert (found != population).any(dim=0).all()


def test_ring_a_bell_finds_the_nearest_prompt(erased: Any) -> None:
    """Against all prompts of two of eight tokens."""
    attack = RingABell(tokens=2, population=30, generations=40, vocabulary="words")
    vocabulary = Vocabulary(erased, "words")
    vocabulary.ids = vocabulary.ids[:8]
    with torch.no_grad():
        goal = erased.encode(["a big dog in the night"]).states[0]
        texts = [vocabulary.text(torch.tensor([i, j])) for i in range(8) for j in range(8)]
        best = texts[int(ring_a_bell.distances(erased, texts, goal).argmin())]
        found = attack.bred(
            vocabulary, lambda texts: ring_a_bell.distances(erased, texts, goal), Generator().manual_seed(0)
        )
    assert erased.text_of(found) == best


def test_ring_a_bell_is_shared_and_knows_only_the_text(
    erased: Any, new_backbone: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = RingABell(tokens=3, population=6, generations=3)
    case: Any = FakeCase(erased)
    case.searched = dict(attack.search(case))
    assert erased.passes == 0 and case.searched["vector"].shape == (77, 32)
    told = attack(case)
    ((text, step),) = case.drawn
    assert step == 3 and len(told["searched"]) == 3 and erased.passes == 0
    monkeypatch.setattr(RingABell, "bred", None)
    other: Any = FakeCase(new_backbone(), searched=case.searched)
    attack(other)
    assert other.drawn == [(text, 3)]


@pytest.mark.parametrize(
    "attack",
    [RingABell(tokens=4, population=20, generations=30), MMADiffusion(tokens=4, steps=6, candidates=60)],
    ids=["ring-a-bell", "mma"],
)
def test_the_planned_text_passes_are_those_of_the_search(attack: Any, erased: Any) -> None:
    """Prompts that are read otherwise than they were typed are left out by mma, and individuals of ring-a-bell may be
    equal, so a search is a little cheaper than its plan."""
    case: Any = FakeCase(erased)
    case.searched = dict(attack.search(case)) if isinstance(attack, RingABell) else {}
    before = erased.text_passes
    attack(case)
    made = erased.text_passes - before
    planned = type(attack).text_passes(vars(attack))
    assert isinstance(attack, SearchesTexts) and 0.4 * planned < made <= planned
    other: Any = FakeCase(erased, searched=case.searched)
    with cache_costs.collect_costs() as found:
        attack(other)
    assert found.total().text_passes == pytest.approx(made, abs=3), "from the cache, at its original cost"
    assert erased.text_passes - before < made + 4


# --- MMA -------------------------------------------------------------------------------------------------------------


def test_the_gradient_of_mma(erased: Any) -> None:
    vocabulary = Vocabulary(erased, "all")
    ids = erased.token_ids(["a big dog in the night"])[0]
    goal = read_slowly(erased, erased.token_ids(["a photo of the cat"])[0])[6].detach()
    one_hot = torch.nn.functional.one_hot(torch.tensor(ids), len(erased.token_embeddings())).float().requires_grad_()
    end = read_slowly(erased, ids, one_hot)[len(ids) + 1]
    loss = 1 - end @ goal / end.norm() / goal.norm()
    (gradient,) = torch.autograd.grad(loss, [one_hot])
    assert torch.allclose(mma.token_gradient(vocabulary, ids, goal), gradient[:, vocabulary.ids], rtol=1e-3, atol=1e-7)
    found = mma.losses(erased, ["a big dog in the night"], mma.end_state(erased.encode(["a photo of the cat"]))[0])
    assert float(found[0]) == pytest.approx(float(loss.detach()), abs=1e-5)


def test_candidates_have_one_token_of_the_best(erased: Any) -> None:
    vocabulary = Vocabulary(erased, "all")
    ids = erased.token_ids(["big dog night"])[0]
    gradient = torch.randn(3, len(vocabulary), generator=Generator().manual_seed(0))
    made = mma.replaced(vocabulary, ids, gradient, 4, 300, Generator().manual_seed(1))
    assert len(made) == 300
    tried: list[set[int]] = [set(), set(), set()]
    for number, candidate in enumerate(made):
        position = number * 3 // 300
        tried[position].add(candidate[position])
        assert [candidate[i] for i in range(3) if i != position] == [ids[i] for i in range(3) if i != position]
    for row, found in zip(gradient, tried):
        falling = sorted(range(len(vocabulary)), key=lambda place: float(row[place]))
        assert found == {int(vocabulary.ids[place]) for place in falling[:4]}


@pytest.mark.slow
def test_a_step_of_mma_takes_the_best_of_all_replacements(erased: Any) -> None:
    """All tokens are tried at both positions; against every such prompt, typed and encoded one by one."""
    attack = MMADiffusion(tokens=2, steps=1, top=10**6, candidates=10_000)
    vocabulary = Vocabulary(erased, "all", banned=["cat"])
    goal = mma.end_state(erased.encode(["a photo of the cat"]))[0]
    found = attack.climbed(vocabulary, goal, ["cat"], Generator().manual_seed(0))
    letters = string.ascii_letters
    first = torch.randint(len(letters), (2,), generator=Generator().manual_seed(0)).tolist()
    start = erased.token_ids([" ".join(letters[i] for i in first)])[0]
    best, least = start, 9.0
    for position in (0, 1):
        for token in vocabulary.ids.tolist():
            ids = [token if place == position else own for place, own in enumerate(start)]
            text = erased.text_of(ids)
            typed = erased.token_ids([text])[0]
            loss = float(mma.losses(erased, [text], goal)[0])
            if len(typed) == 2 and "cat" not in text and loss < least - 1e-6:
                best, least = typed, loss
    assert found == best


def test_mma_never_types_the_concepts_words(erased: Any) -> None:
    """Here the ends of "ca" and "t" are known, so the word could be spelt too."""
    vocabulary = Vocabulary(erased, "all", ["cat"])
    known = erased.text.tokenizer.get_vocab()
    spelt = [known["c"], known["a"], known["t</w>"], known["dog</w>"]]
    assert mma.as_long(vocabulary, [spelt], "x", ["cat"]) == []
    assert known["cat</w>"] not in vocabulary.ids.tolist()
    for seed in range(3):
        case: Any = FakeCase(erased, seed=seed)
        told = MMADiffusion(tokens=4, steps=6, candidates=60)(case)
        ((text, step),) = case.drawn
        assert "cat" not in text and step == 6 and len(told["searched"]) == 4 and told["same"] and erased.passes == 0


def test_mma_returns_the_best_of_all_steps(erased: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = Vocabulary(erased, "all")
    goal = mma.end_state(erased.encode(["a photo of the cat"]))[0]
    seen: dict[str, float] = {}
    losses = mma.losses

    def noted(backbone: Any, texts: Sequence[str], goal: Tensor) -> Tensor:
        found = losses(backbone, texts, goal)
        seen.update(zip(texts, found.tolist()))
        return found

    monkeypatch.setattr(mma, "losses", noted)
    found = MMADiffusion(tokens=3, steps=8, candidates=4).climbed(vocabulary, goal, [], Generator().manual_seed(0))
    assert seen[erased.text_of(found)] == min(seen.values())


# --- on the miniature ------------------------------------------------------------------------------------------------

TWO_STEPS = {
    "unlearndiff": ["attack.timesteps=2", "attack.iterations=2"],
    "p4d": ["attack.steps=2", "attack.test=2", "attack.form=k"],
    "ring-a-bell": ["attack.population=6", "attack.generations=2"],
    "mma": ["attack.steps=2", "attack.candidates=8"],
    "relearn": ["attack.steps=[1,2]", "attack.count=2", "attack.weights=full", "attack.images=harmless"],
}


@pytest.mark.slow
def test_two_steps_on_the_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from realera import attack, train
    from realera.evaluation import attacked

    def type_in(main: Callable[[], None], *words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["realera", *words])
        main()

    monkeypatch.chdir(tmp_path)
    images = "task.images={erase:1,near:1,keep:1,associated:1,unseen:0}"
    common = ["concept=gun", "anchor=room", "backbone=mini", "trainer=cpu", "task.first_seed=50000", images]
    words = ["task.synonyms=[pistol]", "task.associated=[a bank robbery]", "evaluate=false", "logger=none"]
    type_in(train.main, "method=uce", "run_dir=erased", *common, *words)
    for name, settings in TWO_STEPS.items():
        type_in(attack.main, "run=erased", f"attack={name}", "limit=2", *settings)
        lines = attacked.read(tmp_path / "erased", name)
        if name == "ring-a-bell":
            first = attacked.numbers(tmp_path / "erased")[name]["cost"]["text_passes"]
            assert min(line["text_passes"] for line in lines) > 6, "the search counts"
            (tmp_path / "erased" / "attacks" / f"{name}.jsonl").unlink()
            type_in(attack.main, "run=erased", f"attack={name}", "limit=2", *settings)
            again = attacked.numbers(tmp_path / "erased")[name]["cost"]["text_passes"]
            assert again == first, "and so it does when the cache has it"
        assert [line["plain"] for line in lines] and all(line["draws"] for line in lines)
        if name == "relearn":
            assert attacked.numbers(tmp_path / "erased")[name]["returned"]["curve"][-1][0] == 2
        else:
            assert all(line["text"] and line["info"]["searched"] for line in lines)
        if name == "mma":
            assert not any("gun" in line["text"] for line in lines)
