"""The bootstrap: weights of images and runs, and the intervals from them."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from realera.contracts import Mode, Prompt, Split, Verdict
from realera.evaluation import bootstrap as module
from realera.evaluation.bootstrap import Resamples, exact, image_key, interval, run_key
from realera.evaluation.measures import MEAN_PROB
from realera.evaluation.metrics import Sample, estimates, h_o, samples
from realera.reporting.pooling import RunVerdicts, pooled
from realera.reporting.sweep.tables import difference
from realera.reporting.table import markdown, table

TOP1: dict[str, Mode] = dict.fromkeys(MEAN_PROB, "top1")
NAN = math.nan


def images(split: Split, concept: str, scores: list[float]) -> list[tuple[Prompt, Verdict]]:
    """In top-1, images with a score above 0.5 show the concept."""
    prompts = [Prompt(f"{split}-{concept}-{i}", f"a photo of {concept}", concept, split, i) for i in range(len(scores))]
    return [(p, Verdict(p.id, s, concept if s > 0.5 else "sky")) for p, s in zip(prompts, scores)]


def cell(system: str, concept: str, seed: int, *of: list[tuple[Prompt, Verdict]]) -> RunVerdicts:
    pairs = [pair for group in of for pair in group]
    return RunVerdicts(
        system, concept, seed, [p for p, _ in pairs], [v for _, v in pairs], h_o_terms=("acc_e", "acc_s")
    )


def chance(*size: int, seed: int = 0) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed))


def mean(cells: list[RunVerdicts], headline: dict[str, Mode] | None = None, draws: int = 2000) -> dict[str, Sample]:
    return pooled(cells, headline or dict(MEAN_PROB), Resamples(0, draws))


def width(sample: Sample) -> float:
    low, high = sample.interval()
    return high - low


def test_a_weight_depends_only_on_the_image_and_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["a", "b", "c", "a"]
    weights, whole = Resamples(3, 500).weights(keys)
    assert torch.equal(weights[0], weights[3]) and torch.equal(whole, weights.sum(0)) and (weights > 0).all()
    others = Resamples(3, 500)
    others.weights(["x", "b"])
    assert torch.equal(others.weights(["c", "b"])[0], weights[[2, 1]])
    assert not torch.equal(Resamples(4, 500).weights(keys)[0], weights)
    large, _ = Resamples(0, 4000).weights([f"{i}" for i in range(40)])
    assert float(large.mean()) == pytest.approx(1, abs=0.02) and float(large.var()) == pytest.approx(1, abs=0.05)
    assert float(torch.corrcoef(large).fill_diagonal_(0).abs().max()) < 0.08, "two images have nothing in common"
    values = chance(4).double()
    known = Resamples(3, 500).deviations(["a", "b", "c", "d"], values)
    monkeypatch.setattr(module, "PIECE", 3)
    monkeypatch.setattr(module, "KEPT", 3)
    torch.testing.assert_close(Resamples(3, 500).deviations(["a", "b", "c", "d"], values), known)


def test_different_images_have_different_keys() -> None:
    prompt = Prompt("id", "a photo of the cat", "cat", "keep", 7)
    others = [replace(prompt, seed=8), replace(prompt, split="erase"), replace(prompt, text="a cat")]
    assert len({image_key(p) for p in (prompt, *others, replace(prompt, concept="dog"))}) == 5
    assert image_key(replace(prompt, id="of another run")) == image_key(prompt)
    assert run_key("cat", 0) not in (run_key("cat", 1), run_key("dog", 0))


def test_deviations_are_weighted_means_with_the_unbiased_spread() -> None:
    keys, values = [f"{i}" for i in range(5)], torch.tensor([10.0, 20, NAN, 35, 70]).double()
    of = Resamples(1, 20_000)
    found = of.deviations(keys, values)
    weights, _ = of.weights(keys)
    for k in range(3):
        w = [float(weights[i, k]) for i in (0, 1, 3, 4)]
        by_hand = sum(a * b for a, b in zip(w, (10, 20, 35, 70))) / sum(w) - 33.75
        assert float(found[k]) == pytest.approx(by_hand * math.sqrt(5 / 3))
    assert float(found.var()) == pytest.approx(statistics.variance([10, 20, 35, 70]) / 4, rel=0.03)
    assert not of.deviations(["0"], torch.tensor([5.0])).any() and not found.isnan().any()


@pytest.mark.parametrize(("of", "count"), [(9, 20), (9, 5)])
def test_intervals_of_small_groups_have_the_right_width(of: int, count: int) -> None:
    values, widths = [], []
    for trial in range(60):
        scores = chance(of, count, seed=trial).tolist()
        found = mean([cell("a", "x", 0, *(images("keep", f"{c}", s) for c, s in enumerate(scores)))], draws=400)
        values.append(found["acc_s"].value)
        widths.append(width(found["acc_s"]))
    deviation = 100 * math.sqrt(1 / 12 / of / count)  # of the mean of `of * count` uniform numbers
    assert statistics.mean(widths) / 3.92 == pytest.approx(deviation, rel=0.04)
    assert statistics.stdev(values) == pytest.approx(deviation, rel=0.25)


def test_images_shared_by_all_runs_are_resampled_and_counted_once() -> None:
    """The unedited model in several runs: its images give the same information as in one run."""
    kept = images("keep", "dog", chance(40).tolist())
    alone = cell("original", "cat", 0, images("erase", "cat", [0.9] * 3), kept)
    cells = [
        replace(cell("original", c, s, images("erase", c, [0.9] * 3), kept), sources=["unedited"] * 43)
        for c in ("cat", "bird", "frog")
        for s in (0, 1)
    ]
    one, all_six = mean([alone]), mean(cells)
    torch.testing.assert_close(all_six["acc_s"].drawn, one["acc_s"].drawn)
    assert (all_six["acc_s"].n, all_six["acc_e"].n) == (40, 9) and all_six["h_o"].n == 49
    edited = mean([replace(c, sources=[]) for c in cells])
    assert edited["acc_s"].n == 6 * 40, "images of six models"
    torch.testing.assert_close(edited["acc_s"].drawn, one["acc_s"].drawn)


def test_seeds_and_images_are_crossed() -> None:
    """Runs that differ by a shift: the seeds' spread is added to the images' spread, which is the same in all runs."""
    scores = 0.3 + 0.3 * chance(30)
    runs = [cell("a", "cat", s, images("erase", "cat", (scores + 0.1 * s).tolist())) for s in range(3)]
    found, one = mean(runs)["acc_e"], mean([runs[1]])["acc_e"]
    shift = Resamples(0).deviations([run_key("cat", s) for s in range(3)], torch.tensor([0.0, 10, 20]).double())
    torch.testing.assert_close(found.drawn, one.drawn + shift, atol=1e-4, rtol=0)
    assert float(shift.var()) == pytest.approx(100 / 3, rel=0.1), "the unbiased variance of three seeds' mean"


def test_an_unscored_image_leaves_the_others_paired() -> None:
    scores = chance(60).tolist()
    whole = mean([cell("a", "cat", 0, images("erase", "cat", scores))])["acc_e"]
    lost = mean([cell("b", "cat", 0, images("erase", "cat", [NAN, *scores[1:]]))])["acc_e"]
    assert width(whole) > 12 and (lost.n, lost.unscored) == (59, 1)
    apart = difference(whole, lost)
    assert apart.high - apart.low < 0.2 * width(whole), "paired: only the lost image differs"
    same = mean([cell("b", "cat", 0, images("erase", "cat", [NAN, *(s + 0.1 for s in scores[1:])]))])["acc_e"]
    assert difference(lost, same).high - difference(lost, same).low == pytest.approx(0, abs=1e-3)
    few = mean([cell("c", "cat", 0, images("erase", "cat", [NAN] * 58 + [0.2, 0.4]))])["acc_e"]
    assert few.value == pytest.approx(30) and not few.drawn.isnan().any(), "no resample without a scored image"


def test_top_1_is_the_mean_over_all_images_with_a_face() -> None:
    """MACE counts correct images / images with a face; a person with few faces counts less."""
    people = {"a": [0.9, NAN, NAN, NAN, 0.1], "b": [0.9] * 5, "c": [NAN] * 5, "d": [0.1, 0.9, 0.9, NAN, 0.9]}
    pairs = [pair for name, scores in people.items() for pair in images("keep", name, scores)]
    found = samples([p for p, _ in pairs], [v for _, v in pairs], TOP1, Resamples(0, 20_000))["acc_s"]
    assert found.value == pytest.approx(100 * 9 / 11) and (found.n, found.unscored) == (11, 9)
    share = 9 / 11
    variance = 0.0  # of a ratio, to first order, from the residuals (image - ratio) of each person
    for scores in people.values():
        left = [0.0 if math.isnan(s) else (s > 0.5) - share for s in scores]
        variance += len(left) * statistics.variance(left) / 11**2
    assert float(found.drawn.max()) == 100, "within the range of a share"
    inner = samples([p for p, _ in pairs], [v for _, v in pairs], {**TOP1, "acc_s": "mean_prob"}, Resamples())["acc_s"]
    assert inner.value == pytest.approx(100 * (0.5 + 0.9 + 0.7) / 3), "other modes are means over people"
    below = found.value - float(torch.quantile(found.drawn, 0.16))
    assert below == pytest.approx(100 * math.sqrt(variance), rel=0.25)


@pytest.mark.parametrize("read", ["top1", "detected"])
@pytest.mark.parametrize("seen", [False, True])
def test_the_interval_is_exact_if_all_images_have_the_same_value(read: Mode, seen: bool) -> None:
    prompts = [Prompt(f"{i}", "t", "cat", "erase", i) for i in range(200)] + [Prompt("k", "t", "dog", "keep", 0)]
    said = [Verdict(p.id, 0.9 * seen, "cat" if seen else "sky", {"detected": seen}) for p in prompts]
    headline: dict[str, Mode] = dict.fromkeys(MEAN_PROB, read)
    found = estimates(prompts, said, headline, Resamples(), ("acc_e", "acc_s"))
    bound = 100 * (1 - 0.025 ** (1 / 200))  # with more than that, 0 of 200 has a chance of less than 2.5%
    assert bound == pytest.approx(1.83, abs=0.005)
    e = found["acc_e"]
    assert (e.value, e.low, e.high) == pytest.approx((100, 100 - bound, 100) if seen else (0, 0, bound))
    assert found["h_o"].low == found["h_o"].high == found["h_o"].value, "computed from its terms' resamples"
    assert estimates(prompts, said, MEAN_PROB, Resamples())["acc_e"].high == pytest.approx(90 * seen), "no yes or no"


def test_an_exact_interval_of_a_table_counts_prompts_once() -> None:
    def run(concept: str, seed: int, kept: list[float]) -> RunVerdicts:
        return cell("a", concept, seed, images("erase", concept, [0.1] * 30), images("keep", "dog", kept))

    cells = [run(concept, seed, [0.9] * 20) for concept in ("cat", "bird") for seed in (0, 1)]
    found = mean(cells, TOP1)
    assert found["acc_e"].interval() == exact(0, 60), "two concepts of 30 prompts, each drawn after two trainings"
    assert found["acc_s"].interval() == exact(100, 20) and found["acc_s"].n == 80
    mixed = mean([*cells, run("frog", 0, [0.1, *[0.9] * 19])], TOP1)["acc_s"]
    assert mixed.interval() == interval(mixed.drawn) and mixed.trials == 0
    ends = mean([run("cat", 0, [0.9] * 20), run("cat", 1, [0.1] * 20)], TOP1)["acc_s"]
    assert ends.value == 50 and ends.trials == 0, "equal within each run but not over both"


def test_a_run_without_a_scored_image_is_left_out_with_a_note() -> None:
    def run(system: str, seed: int, erased: float) -> RunVerdicts:
        return cell(system, "cat", seed, images("erase", "cat", [erased] * 4), images("keep", "dog", [0.8] * 4))

    results = table([run("a", 0, 0.2), run("a", 1, NAN), run("b", 0, NAN), run("b", 1, NAN)])
    first, second = (row["mean"] for row in results["rows"])
    assert first["acc_e"] == {"value": 20, "low": 20, "high": 20, "n": 4, "unscored": 4, "undefined": 1}
    assert first["h_o"]["value"] == pytest.approx(h_o({"acc_e": 20, "acc_s": 80}, ("acc_e", "acc_s")))
    assert first["acc_s"]["value"] == 80 and "undefined" not in first["acc_s"] and "acc_g" not in first
    assert second["acc_e"] == {"value": None, "low": None, "high": None, "n": 0, "unscored": 8, "undefined": 2}
    text = markdown(results)
    assert "| a | 20.0 [20.0, 20.0] |" in text and "| b | undefined | 80.0" in text and "| e 0, s 100 |" in text
    assert "\nAcc_e, H_o of a: over 1 of 2 runs; in the others no image could be scored.\n" in text
    assert "\nAcc_e, H_o of b: undefined, because no image of any run could be scored.\n" in text


def test_numbers_of_complete_data_are_plain_means() -> None:
    """Values do not depend on the resampling: they are means over classes, over seeds and over concepts."""
    cells, means = [], []
    for k, (concept, seed) in enumerate((c, s) for c in ("cat", "bird") for s in (0, 1)):
        scores = chance(3, 6, seed=k).tolist()
        kept = (images("keep", name, s) for name, s in zip(("dog", "frog"), scores[1:]))
        cells.append(cell("a", concept, seed, images("erase", concept, scores[0]), *kept))
        means.append([[100 * statistics.mean(s), 100 * statistics.mean(x > 0.5 for x in s)] for s in scores])
    for mode, headline in enumerate((dict(MEAN_PROB), TOP1)):
        found = mean(cells, headline, draws=10)
        e = [m[0][mode] for m in means]
        s = [statistics.mean([m[1][mode], m[2][mode]]) for m in means]
        assert found["acc_e"].value == pytest.approx(statistics.mean(e))
        assert found["acc_s"].value == pytest.approx(statistics.mean(s))
        terms = [h_o({"acc_e": a, "acc_s": b}, ("acc_e", "acc_s")) for a, b in zip(e, s)]
        assert found["h_o"].value == pytest.approx(statistics.mean(terms))
