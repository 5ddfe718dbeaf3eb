"""Mining by predicted noise, on a small backbone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator

from options import built
from realera import paths
from realera.contracts import Edit, Moments, NamedPrompt, Pair, UserError
from realera.methods.functional import FunctionalMining, measured, texts_of
from realera.methods.nearness import Seen
from realera.methods.priors import caption_rows
from realera.methods.realera import ClosedForm
from realera.methods.valera import ValueSpaceErasure
from realera.mining.sampling import counted_rows

CAT = ("cat", "field")
TEXTS = ("a kitten", "a dog", "Cat", "two trees", "the sea at night", "a red house", " ", "a kitten")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    return str(tmp_path / "texts.txt")


def miner(file: str, backbone: Any, **settings: Any) -> FunctionalMining:
    found = FunctionalMining([file], **{"looked": 3, "beside": 2, "images": 2, **settings})
    found.prepare(backbone)
    return found


def encoded(backbone: Any, name: str) -> Any:
    return backbone.encode([NamedPrompt.of("{}", name)])


def seeded() -> Generator:
    return Generator().manual_seed(0)


def test_texts_are_sorted_by_their_noise(new_backbone: Any, new_pairs: Any, file: str) -> None:
    backbone = new_backbone()
    (pair,) = new_pairs(backbone, CAT)
    every = miner(file, backbone, looked=5, beside=0, within=1e9, outside=1e9)
    mined = every(pair, seeded())
    (sight,) = every.found_texts()
    seen = {one.text: one for one in sight.erased}
    assert set(seen) == {"a kitten", "a dog", "two trees", "the sea at night", "a red house"}, "without the name"
    assert [one.noise_distance for one in sight.erased] == sorted(
        one.noise_distance for one in sight.erased
    ) and not sight.kept
    far = measured(backbone, every.drawn(backbone, pair), "cat", list(seen), paths.cache_dir())
    assert [one.noise_distance for one in seen.values()] == pytest.approx(far.tolist(), rel=1e-5)
    assert mined.near.shape == mined.near_targets.shape == (5, 77, backbone.width) and len(mined.beyond) == 0

    middle = sight.erased[2].noise_distance
    some = miner(file, backbone, looked=5, beside=0, within=sight.erased[1].noise_distance, outside=middle)
    both = some(pair, seeded())
    (parted,) = some.found_texts()
    assert [one.text for one in parted.erased] == [one.text for one in sight.erased[:2]]
    assert {one.text for one in parted.kept} == {one.text for one in sight.erased[3:]}
    assert [one.value for one in parted.kept] == sorted((one.value for one in parted.kept), reverse=True)
    assert len(both.near) == 2 and len(both.beyond) == 2
    one = miner(file, backbone, looked=5, beside=0, within=0.0, outside=middle, most=1)
    one(pair, seeded())
    assert len(one.found_texts()[0].erased) == 0 and len(one.found_texts()[0].kept) == 1

    states = backbone.encode(["a kitten"]).states[0]
    place = list(seen).index("a kitten")
    rows = mined.near_rows[place]
    assert torch.allclose(mined.near[place], states) and not bool(rows[0]) and bool(rows[1])
    anchor = backbone.encode(["field"]).states[0]
    last = int(backbone.encode(["a kitten"]).length[0])
    assert torch.allclose(mined.near_targets[place][last - 1], anchor[1]), "last sub-token on last sub-token"


def test_m_and_n_set_the_number_of_points(new_backbone: Any, new_pairs: Any, file: str) -> None:
    backbone = new_backbone()
    (pair,) = new_pairs(backbone, CAT)
    some = miner(file, backbone, within=1e9, outside=1e9)
    mined = some(pair, seeded(), m=2, n=1, prompts=[0])
    assert len(mined.near) == len(mined.near_rows) == 2 and len(mined.beyond) == 0
    none = miner(file, backbone, within=0.0, outside=1e9)(pair, seeded(), m=1, n=1)
    assert any(torch.equal(none.near[0], state) for state in pair.target.states), "one of its own prompts"
    kept = miner(file, backbone, within=0.0, outside=0.0)
    assert len(kept(pair, seeded(), m=1, n=3).beyond) == 3


def test_the_original_model_measures_and_the_result_is_cached(new_backbone: Any, new_pairs: Any, file: str) -> None:
    backbone = new_backbone()
    (pair,) = new_pairs(backbone, CAT)
    first = miner(file, backbone)
    first(pair, seeded())
    spent = backbone.passes
    assert spent > 0
    backbone.apply(Edit(map=torch.eye(backbone.width, dtype=torch.float64) * 0.5))
    again = miner(file, backbone)
    again(pair, seeded())
    assert again.found_texts() == first.found_texts() and backbone.passes == spent
    with pytest.raises(RuntimeError, match="prepare"):
        FunctionalMining([file])(pair, seeded())


def test_vocabularies(new_backbone: Any, file: str, tmp_path: Path) -> None:
    backbone = new_backbone()
    assert texts_of(backbone, [file]) == ["a kitten", "a dog", "Cat", "two trees", "the sea at night", "a red house"]
    words = texts_of(backbone, ["words"])
    assert words == [word for word in words if word.isalpha() and word.isascii() and len(word) > 2]
    assert len(set(words)) == len(words)
    for word in words[:20]:
        assert len(backbone.tokens([word])[0]) == 1
    assert len(texts_of(backbone, ["everyday"])) == 393
    (tmp_path / "long.txt").write_text("a kitten\n" + "very " * 100 + "long\n")
    assert [text for text, _ in FunctionalMining([str(tmp_path / "long.txt")]).candidates(backbone, "cat")] == [
        "a kitten"
    ]
    (tmp_path / "torn.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"torn\.txt cannot be read"):
        texts_of(backbone, [str(tmp_path / "torn.txt")])
    with pytest.raises(UserError, match="outside"):
        built(FunctionalMining, within=0.5, outside=0.4)
    with pytest.raises(UserError, match="vocabulary"):
        built(FunctionalMining, vocabulary=["nowhere.txt"])


def test_closed_forms_use_mined_texts(new_backbone: Any, new_pairs: Any, file: str) -> None:
    backbone = new_backbone()
    (pair,) = new_pairs(backbone, CAT)
    every = miner(file, backbone, looked=2, beside=0, within=1e9, outside=1e9)
    mined = every(pair, seeded())
    plain = ClosedForm()(backbone, [pair], [])
    with_texts = ClosedForm()(backbone, [pair], [mined])
    assert with_texts.info["rows_near"] == int(mined.near_rows.sum()) and plain.map is not None

    def distance(map: Any) -> float:
        rows, to = mined.near[mined.near_rows].double(), mined.near_targets[mined.near_rows].double()
        return float((rows @ map.T - to).norm())

    assert distance(with_texts.map) < distance(plain.map)

    edits = {
        price: ValueSpaceErasure(mined_price=price, gain=1)(backbone, [pair], [mined]) for price in (0.0, 1.0, 1e8)
    }
    without = ValueSpaceErasure(gain=1)(backbone, [pair], [])
    assert torch.equal(edits[0.0].map, without.map)
    for edit in edits.values():
        assert torch.allclose(edit.map @ edit.map, edit.map, atol=1e-7)
    _, right = edits[1e8].factors
    own = pair.target.states[counted_rows(pair.target, "suffix")]
    means = [rows.double().mean(dim=0) for rows in (own, *(s[r] for s, r in zip(mined.near, mined.near_rows)))]
    shares = [float(right[0] @ mean) for mean in means]
    assert shares[1:] == pytest.approx([shares[0]] * 2, rel=1e-3), "texts that draw the concept are read like it"
    far = [float(without.factors[1][0] @ mean) for mean in means]
    assert max(abs(share - far[0]) for share in far[1:]) > 0.01 * abs(far[0])


def test_texts_erased_for_one_concept_are_not_preserved_for_another(
    new_backbone: Any, new_pairs: Any, tmp_path: Path
) -> None:
    backbone = new_backbone()
    pairs = new_pairs(backbone, CAT, ("dog", "sky"))
    (tmp_path / "texts.txt").write_text("a kitten\na puppy\na big Dog\nthe sea at night\na red house\ncatalogue\n")
    file = str(tmp_path / "texts.txt")
    alone = miner(file, backbone, looked=6, beside=0, within=0.0, outside=0.0)
    alone(pairs[0], seeded())
    kept = {one.text for one in alone.found_texts()[0].kept}
    assert kept == {"a kitten", "a puppy", "a big Dog", "the sea at night", "a red house"}, "without its own name"

    both = FunctionalMining([file], looked=6, beside=0, within=1e9, outside=1e9, most=1, images=2)
    both.prepare(backbone, pairs)
    both(pairs[0], seeded())
    erased = {sight.concept: sight.erased[0].text for sight in both.found_texts()}
    together = FunctionalMining([file], looked=6, beside=0, within=0.0, outside=0.0, images=2)
    together.prepare(backbone, pairs)
    together(pairs[0], seeded())
    assert len(together.found_texts()) == 2, "all concepts that are erased together are measured"
    for sight in together.found_texts():
        assert {one.text for one in sight.kept} == {"a kitten", "a puppy", "the sea at night", "a red house"}
    together.seen = {
        concept: replace(sight, erased=[Seen(erased[sight.concept], 0.5, 0.1)])
        for concept, sight in together.seen.items()
    }
    for sight in together.found_texts():
        assert not set(erased.values()) & {one.text for one in sight.kept}


def test_both_closed_forms_preserve_texts_beyond(new_backbone: Any, new_pairs: Any, file: str) -> None:
    backbone = new_backbone()
    (pair,) = new_pairs(backbone, CAT)
    kept = miner(file, backbone, looked=3, beside=0, within=0.0, outside=0.0)
    mined = kept(pair, seeded())
    assert len(mined.near) == 0 and len(mined.beyond) == 3
    rows = mined.beyond[mined.beyond_rows].double()

    def moved(map: Any) -> float:
        return float((rows @ map.T - rows).norm())

    plain, held = (ClosedForm()(backbone, [pair], each) for each in ([], [mined]))
    assert held.info["rows_beyond"] == len(rows) and moved(held.map) < moved(plain.map)
    reads = [ValueSpaceErasure(mined_price=price, gain=1)(backbone, [pair], [mined]) for price in (0.0, 1e8)]
    rest = [
        abs(float(edit.factors[1][0] @ (state[r].double().mean(dim=0) - mean)))
        for edit, mean in ((edit, caption_rows(backbone, "everyday", paths.cache_dir()).mean) for edit in reads)
        for state, r in zip(mined.beyond, mined.beyond_rows)
    ]
    assert max(rest[3:]) < 1e-3 * max(rest[:3]), "they are not read at a high price"


def test_impossible_mining_is_refused(new_backbone: Any, new_pairs: Any, tmp_path: Path, file: str) -> None:
    backbone = new_backbone()
    (pair,) = new_pairs(backbone, CAT)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="contains no text"):
        texts_of(backbone, [str(tmp_path / "empty.txt")])
    every = miner(file, backbone, looked=3, beside=0, within=1e9, outside=1e9)
    one = new_pairs(backbone, ("a cat", "field"))[0]
    with pytest.raises(UserError, match="cannot be told"):  # the concept itself is preserved
        ValueSpaceErasure(keep=["a cat"], rows="all_but_bos")(
            backbone,
            [Pair(one.concept, *(encoded(backbone, name) for name in ("a cat", "field")))],
            [every(pair, seeded())],
        )
    expectation = replace(every(pair, seeded()), moments=Moments())
    with pytest.raises(UserError, match=r"m=\.inf"):
        ValueSpaceErasure()(backbone, [pair], [expectation])
