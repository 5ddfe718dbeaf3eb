"""Tables over runs: small cases pooled by hand, and intervals compared to known spreads."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from realera.contracts import Mode, Prompt, UserError, Verdict
from realera.evaluation.bootstrap import Resamples
from realera.evaluation.measures import MEAN_PROB
from realera.evaluation.metrics import h_o
from realera.reporting.pooling import RunVerdicts, pool
from realera.reporting.table import markdown, table

TOP1 = dict.fromkeys(MEAN_PROB, "top1")


def cell(system: str, concept: str, seed: int, shares: dict[str, list[float]]) -> RunVerdicts:
    """A run whose images of each split have these probabilities. Images of `keep` alternate between two concepts."""
    prompts, verdicts = [], []
    for split, values in shares.items():
        for i, value in enumerate(values):
            looked_for = concept if split != "keep" else ("frog", "ship")[i % 2]
            prompts.append(Prompt(f"{split}-{i}", "a photo", looked_for, split, i))
            verdicts.append(Verdict(prompts[-1].id, value, looked_for if value > 0.5 else "sky"))
    return RunVerdicts(system, concept, seed, prompts, verdicts)


def full(system: str, concept: str, seed: int, e: float, g: float, s: float, count: int = 20) -> RunVerdicts:
    shares = {"erase": [e] * count, "near": [g] * count, "keep": [s] * count, "associated": [g], "unseen": [g]}
    return cell(system, concept, seed, shares)


def test_a_row_is_the_mean_over_concepts_of_the_mean_over_seeds():
    cells = [full("a", "cat", 0, 0.1, 0.2, 0.9), full("a", "cat", 1, 0.3, 0.2, 0.9), full("a", "dog", 0, 0.5, 0.4, 0.8)]
    row = pool(cells, MEAN_PROB, Resamples(0, 50))
    assert row["acc_e"].value == pytest.approx((20 + 50) / 2)
    assert row["acc_s"].value == pytest.approx((90 + 80) / 2)
    h_os = [h_o({"acc_e": e, "acc_s": s, "acc_g": g}) for e, s, g in ((10, 90, 20), (30, 90, 20), (50, 80, 40))]
    by_concept = [(h_os[0] + h_os[1]) / 2, h_os[2]]
    assert row["h_o"].value == pytest.approx(sum(by_concept) / 2), "the mean of H_o, not H_o of the means"


def test_an_interval_is_a_point_without_variation_and_widens_with_the_spread_of_seeds():
    alike = pool([full("a", "cat", s, 0.1, 0.2, 0.9) for s in range(3)], MEAN_PROB, Resamples())
    assert alike["acc_e"].low == alike["acc_e"].high == pytest.approx(10)
    apart = pool([full("a", "cat", s, 0.3 * s, 0.2, 0.9) for s in range(3)], MEAN_PROB, Resamples())
    assert apart["acc_e"].low < 15 < apart["acc_e"].value < 45 < apart["acc_e"].high
    assert apart["acc_g"].low == apart["acc_g"].high == pytest.approx(20)


CLASSES = [f"class {i}" for i in range(12)]


def test_concepts_are_resampled_in_the_interval_over_concepts():
    """The spread of the concepts' means widens this interval only. A single concept has none."""
    cells = [full("a", name, 0, 0.05 * i, 0.2, 0.9) for i, name in enumerate(CLASSES)]
    row = pool(cells, MEAN_PROB, Resamples())
    assert row["acc_e"].low == row["acc_e"].high == pytest.approx(27.5), "the concepts are fixed"
    low, high = row["acc_e"].over_concepts
    values = torch.arange(12, dtype=torch.float64) * 5
    assert high - low == pytest.approx(2 * 1.96 * float(values.std()) / math.sqrt(12), rel=0.12)
    assert row["acc_g"].over_concepts == pytest.approx((20, 20))
    assert row["h_o"].over_concepts[0] < row["h_o"].value < row["h_o"].over_concepts[1]
    assert pool(cells[:1], MEAN_PROB, Resamples())["acc_e"].over_concepts is None


@pytest.mark.slow
def test_the_interval_over_concepts_has_its_nominal_coverage():
    """Random concepts from a known distribution, 200 times. With few concepts the coverage may be a little lower."""
    chance, hits = torch.Generator().manual_seed(0), 0
    for trial in range(200):
        shares = torch.rand(12, generator=chance).tolist()
        names = [f"{trial} {name}" for name in CLASSES]  # so that every trial has its own weights
        row = pool([full("a", n, 0, x, 0.2, 0.9, 2) for n, x in zip(names, shares)], MEAN_PROB, Resamples(0, 300))
        low, high = row["acc_e"].over_concepts
        hits += low <= 50 <= high
    assert 178 <= hits <= 199


def test_differences_are_paired_and_have_an_interval_over_concepts():
    """A small difference on every concept is found although the concepts differ much."""
    ours = [full("ours", name, 0, 0.05 * i, 0.2, 0.9) for i, name in enumerate(CLASSES)]
    theirs = [full("theirs", name, 0, 0.05 * i + 0.1 + 0.01 * (i % 2), 0.2, 0.9) for i, name in enumerate(CLASSES[:10])]
    found = table([*ours, *theirs], base="ours")
    assert "differences" not in table([*ours, *theirs]) and "differences" not in table(ours, base="nobody")
    (row,) = found["differences"]["rows"]
    assert (found["differences"]["base"], row["system"], row["pairs"]) == ("ours", "theirs", 10)
    acc_e = row["mean"]["acc_e"]
    assert acc_e["value"] == acc_e["low"] == acc_e["high"] == pytest.approx(10.5)
    low, high = acc_e["over_concepts"]
    assert 10 < low < 10.5 < high < 11, "over the concepts that both have, with the same weights"
    low, high = found["rows"][0]["mean"]["acc_e"]["over_concepts"]
    assert high - low > 15


def test_more_images_narrow_the_interval():
    def width(count: int) -> float:
        shares = {"erase": [0.0, 1.0] * count, "near": [0.2], "keep": [0.9, 0.9]}
        found = pool([cell("a", "cat", 0, shares)], TOP1, Resamples())["acc_e"]
        return found.high - found.low

    assert width(10) == pytest.approx(2 * 196 * 0.5 / math.sqrt(20), rel=0.25), "the width of a binomial share"
    assert width(10) > 2 * width(160)


def test_unscored_images_leave_the_denominator_and_are_counted():
    shares = {"erase": [0.4, math.nan], "near": [0.2], "keep": [0.9, 0.9]}
    row = pool([cell("a", "cat", 0, shares)], MEAN_PROB, Resamples(0, 10))
    assert row["acc_e"].value == pytest.approx(40)
    assert (row["acc_e"].n, row["acc_e"].unscored) == (1, 1)
    assert (row["h_o"].n, row["h_o"].unscored) == (4, 1)


def test_results_have_a_row_per_system_and_a_repeated_run_is_an_error():
    cells = [full("uce", "cat", 0, 0.1, 0.5, 0.9), full("realera", "cat", 0, 0.1, 0.1, 0.9)]
    results = table(cells)
    assert [row["system"] for row in results["rows"]] == ["uce", "realera"]
    assert results["rows"][0]["by_concept"]["cat"]["acc_g"]["value"] == 50
    text = markdown(results)
    assert text.splitlines()[2].startswith("| uce | 10.0 [10.0, 10.0] | 90.0")
    third = table([full("uce", "cat", 0, 1 / 3, 0.35251, 0.9)])["rows"][0]["mean"]
    assert (third["acc_e"]["value"], third["acc_g"]["value"]) == (33.3333, 35.251), "so that it reads 35.3 here too"
    with pytest.raises(UserError, match="two runs of 'cat' with seed 0"):
        table([*cells, full("uce", "cat", 0, 0.1, 0.5, 0.9)])


def test_a_system_that_lacks_runs_is_marked_in_each_table() -> None:
    def row(system: str, concept: str) -> RunVerdicts:
        return replace(
            full(system, concept, 0, 0.1, 0.5, 0.9, count=2),
            costs={"format_version": 1, "stages": {"edit": 2.0}, "passes": {"erase": 3}},
        )

    whole = table([row("uce", "cat"), row("uce", "dog"), row("sa", "cat"), row("sa", "dog")])
    assert not any("of_runs" in of for of in whole["rows"]) and " runs)" not in markdown(whole)
    few = markdown(table([row("uce", "cat"), row("uce", "dog"), row("sa", "cat")]))
    assert few.count("| uce | ") == few.count("| sa (1 of 2 runs) | ") == 2, "the measures, and the costs"
    other = table([row("uce", "cat"), row("sa", "dog")])
    assert [(of["runs"], of["of_runs"]) for of in other["rows"]] == [(1, 2)] * 2, "as many runs, but not the same ones"


def test_a_total_failure_gives_h_o_zero_not_an_error():
    row = pool([full("a", "cat", 0, 1.0, 1.0, 0.9)], MEAN_PROB, Resamples(0, 10))
    assert row["h_o"].value == pytest.approx(0, abs=1e-6)


def test_each_measure_uses_the_metric_of_the_task_and_other_metrics_follow():
    """Styles: scores, then top-1 of the same images; boxes and unscored images are included."""
    score: dict[str, Mode] = dict.fromkeys(MEAN_PROB, "score")

    def styled(system: str, seed: int, lost: bool) -> RunVerdicts:
        of = full(system, "Van Gogh", seed, 0.1, 0.2, 0.9, count=2)
        said = [
            replace(
                v, detail={"boxes": {"belly": seed + 1, "anus": 1}, **({} if lost and i == 0 else {"score": 20.0 + i})}
            )
            for i, v in enumerate(of.verdicts)
        ]
        return replace(of, verdicts=said, headline=score, h_o_terms=("acc_e", "acc_s"))

    results = table([styled("uce", 0, False), styled("uce", 1, True)])
    (row,) = results["rows"]
    assert results["headline"] == score and results["h_o_terms"] == ["acc_e", "acc_s"]
    assert row["mean"]["acc_e"]["value"] == pytest.approx((20.5 + 21) / 2)
    h_os = [h_o({"acc_e": e, "acc_s": 24.5}, ("acc_e", "acc_s")) for e in (20.5, 21)]
    assert row["mean"]["h_o"]["value"] == pytest.approx(sum(h_os) / 2, abs=0.01)
    assert row["by_mode"]["top1"]["acc_s"]["value"] == 100 and set(row["by_mode"]) == {"mean_prob", "top1"}
    assert row["counts"]["erase"] == {"belly": 3.0, "anus": 2.0, "total": 3.0} | dict.fromkeys(
        ("armpits", "buttocks", "feet", "breasts_f", "genitalia_f", "breasts_m", "genitalia_m"), 0.0
    )
    text = markdown(results)
    assert text.startswith("CLIP score.\n\n| system | CLIP_e ↓ | CLIP_s ↑ |") and "scored, % |" in text
    assert "| e 75, s 100, g 100, a 100, u 100 |" in text
    assert "by top-1 (%).\n\n| system | Acc_e ↓ |" in text and "Acc_e" not in text.partition("by top-1")[0]


def test_explicit_content_has_no_h_o_and_runs_of_two_tasks_have_no_common_table():
    found: dict[str, Mode] = {**dict.fromkeys(MEAN_PROB, "detected"), "acc_s": "score"}
    of = full("uce", "nudity", 0, 0.1, 0.2, 0.9, count=2)
    said = [replace(v, detail={"detected": i == 0, "score": 31.0}) for i, v in enumerate(of.verdicts)]
    nude = replace(of, verdicts=said, headline=found, h_o_terms=())
    text = markdown(table([nude]))
    assert text.splitlines()[0] == "Det: images with a detection, %; CLIP: CLIP score."
    assert "| uce | 50.0" in text and "31.0" in text and "H_o" not in text
    with pytest.raises(UserError, match="one task and protocol"):
        table([nude, full("uce", "cat", 0, 0.1, 0.2, 0.9)])
    with pytest.raises(UserError, match="needs runs"):
        table([])
