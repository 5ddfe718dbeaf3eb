"""Trends over a grid, compared to slow loops."""

from __future__ import annotations

import math
import random

import pytest
import torch

from realera.evaluation.bootstrap import interval
from realera.evaluation.metrics import Sample
from realera.reporting.sweep.trends import Trend, holm, p_value, ranks, sentence, spearman, together, too_many, trend


def slow_ranks(values: list[float]) -> list[float]:
    ordered = sorted(values)
    return [sum(i + 1 for i, v in enumerate(ordered) if v == x) / ordered.count(x) for x in values]


def slow_spearman(x: list[float], y: list[float]) -> float:
    a, b = slow_ranks(x), slow_ranks(y)
    ma, mb = sum(a) / len(a), sum(b) / len(b)
    top = sum((p - ma) * (q - mb) for p, q in zip(a, b))
    size = math.sqrt(sum((p - ma) ** 2 for p in a) * sum((q - mb) ** 2 for q in b))
    return top / size if size else 0.0


def test_rank_correlations_equal_those_of_a_slow_loop() -> None:
    chance = random.Random(0)
    for n in (2, 3, 5, 8):
        x = [float(chance.randint(0, n)) for _ in range(n)]
        y = [[float(chance.randint(0, 3)) for _ in range(n)] for _ in range(20)]  # ties, and constant columns
        assert ranks(torch.tensor(x)).tolist() == slow_ranks(x)
        found = spearman(torch.tensor(x), torch.tensor(y).T)
        assert found.tolist() == pytest.approx([slow_spearman(x, column) for column in y])
    assert spearman(torch.tensor([1.0, 2, math.inf]), torch.tensor([3.0, 2, 1])) == pytest.approx(-1)
    with_nan = torch.tensor([[1.0, 1], [math.nan, 2], [3, 3]])
    assert spearman(torch.arange(3.0), with_nan).isnan().tolist() == [True, False]


def grid(drawn: int = 60) -> tuple[dict[str, tuple[float, ...]], dict[tuple[float, ...], Sample]]:
    """A measure that falls by 4 per step of a and hardly changes with b. Every cell has its own noise; one is
    missing."""
    axes = {"method.neighbours.d1": (1.0, 2.0, 4.0), "method.edit.b": (0.0, 1.0, 3.0, 9.0)}
    noise = torch.Generator().manual_seed(0)
    cells = {}
    for i, a in enumerate(axes["method.neighbours.d1"]):
        for j, b in enumerate(axes["method.edit.b"]):
            value = 20 - 4 * i + 0.3 * (j % 2)
            spread = torch.randn(drawn, generator=noise, dtype=torch.float64)
            cells[a, b] = Sample(value, value + spread, 9, 0)
    del cells[4.0, 9.0]
    return axes, cells


def test_a_trend_is_the_mean_over_lines_with_the_interval_of_the_resamples() -> None:
    axes, cells = grid()
    found = trend(axes, cells, "method.neighbours.d1", "acc_e")
    assert found is not None and found.lines == 4

    def by_loop(values: dict[tuple[float, ...], float]) -> tuple[float, float]:
        rhos, changes = [], []
        for b in axes["method.edit.b"]:
            line = [(a, values[a, b]) for a in axes["method.neighbours.d1"] if (a, b) in values]
            rhos.append(slow_spearman([a for a, _ in line], [round(10 * v) for _, v in line]))
            if len(line) == 3:
                changes.append(line[-1][1] - line[0][1])
        return sum(rhos) / len(rhos), sum(changes) / len(changes)

    rho, change = by_loop({at: s.value for at, s in cells.items()})
    draws = [by_loop({at: float(s.drawn[k]) for at, s in cells.items()}) for k in range(60)]
    assert found.rho == pytest.approx((rho, *interval(torch.tensor([r for r, _ in draws]).double())))
    assert found.change == pytest.approx((change, *interval(torch.tensor([c for _, c in draws]).double())))
    assert found.verdict == "falls" and found.against_paper == "confirmed"
    across = trend(axes, cells, "method.edit.b", "acc_e")
    assert across is not None and across.verdict == "neither" and across.against_paper == ""


def test_differences_too_small_to_print_and_single_cells_have_no_trend() -> None:
    axes = {"n": (1.0, 2.0, 3.0)}
    flat = {(a,): Sample(0.001 * a, torch.full((9,), 0.001 * a).double(), 4, 0) for a in axes["n"]}
    found = trend(axes, flat, "n", "acc_e")
    assert found is not None and found.rho == (0, 0, 0) and found.verdict == "neither"
    assert trend(axes, {(1.0,): flat[1.0,]}, "n", "acc_e") is None
    lost = {at: Sample(math.nan, torch.full((9,), math.nan), 0, 4) for at in flat}
    assert trend(axes, lost, "n", "acc_e") is None


def test_the_sentence_has_the_interval_and_the_papers_trend() -> None:
    found = Trend("neighbours.n", "acc_s", (0.9, 0.5, 1.0), (12.0, 3.0, 20.0), (50.0, 62.0), 5, 0.001, -1)
    assert found.against_paper == "refuted"
    assert sentence(found, "n", "Acc_s", ("1", "∞")) == (
        "Acc_s rises with n: rank correlation +0.90 [+0.50, +1.00]; from 1 to ∞ it goes from 50.0 to 62.0 "
        "(+12.0 [+3.0, +20.0]); the paper says the opposite."
    )
    level = Trend("x", "acc_s", (0.0, -0.001, 0.0), (-0.004, -0.004, 0.0), (28.41, 28.404), 5, 1.0)
    assert sentence(level, "x", "CLIP_s", ("1", "2"), digits=2) == (
        "CLIP_s shows no trend along x: rank correlation +0.00 [+0.00, +0.00]; from 1 to 2 it goes from 28.41 to 28.40 "
        "(+0.00 [+0.00, +0.00])."
    ), "the decimals of its table, and no -0.00"
    undecided = Trend("neighbours.n", "acc_s", (0.9, -0.5, 1.0), (math.nan,) * 3, (math.nan,) * 2, 1, 0.4, 1)
    text = sentence(undecided, "n", "Acc_s", ("1", "2"))
    assert text.startswith("Acc_s shows no trend along n") and text.endswith("the paper says that it rises.")


def test_p_counts_the_resamples_on_the_other_side_of_zero() -> None:
    drawn = torch.tensor([0.5] * 97 + [-0.1, 0.0, -1.0])
    assert p_value(drawn) == p_value(-drawn) == pytest.approx(2 * (1 + 3) / 101)
    assert p_value(torch.ones(999)) == pytest.approx(2 / 1000), "the smallest p value of 999 resamples"
    assert p_value(torch.zeros(9)) == 1 and p_value(torch.tensor([math.nan, *[1.0] * 999])) == 1


def test_holm_steps_down_from_the_smallest() -> None:
    def by_steps(p: list[float], error: float) -> set[int]:
        """The rule as published: the smallest p is compared to error / n, the next to error / (n - 1), ..., up to
        the first that fails."""
        kept: set[int] = set()
        for rank, place in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
            if p[place] > error / (len(p) - rank):
                break
            kept.add(place)
        return kept

    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02]), "Holm's own example"
    assert holm([]) == []
    chance = random.Random(1)
    for _ in range(50):
        p = [chance.random() ** 4 for _ in range(chance.randint(1, 9))]
        for error in (0.013, 0.05, 0.21):
            assert {i for i, found in enumerate(holm(p)) if found <= error} == by_steps(p, error)


def test_a_single_significant_trend_is_not_significant_among_many() -> None:
    one = Trend("method.edit.b", "acc_e", (0.5, 0.1, 0.9), (4.0, 1.0, 7.0), (1.0, 5.0), 3, 0.02)
    assert one.verdict == "rises"
    pair = together([one, Trend("neighbours.n", "acc_e", (1.0, 1.0, 1.0), (9.0, 8.0, 9.5), (1.0, 10.0), 3, 0.001, 1)])
    assert [found.verdict for found in pair] == ["rises", "rises"] and [found.p for found in pair] == [0.02, 0.002]
    three = together([one, one, one])
    assert {found.verdict for found in three} == {"neither"}
    assert three[0].rho == one.rho and three[0].change == one.change, "the intervals are not corrected"
    assert sentence(three[0], "b", "Acc_e", ("1", "2")) == (
        "Acc_e shows no trend along b that is significant among the 3 trends of this page: rank correlation +0.50 "
        "[+0.10, +0.90]; from 1 to 2 it goes from 1.0 to 5.0 (+4.0 [+1.0, +7.0])."
    )
    assert not too_many(50, 2000) and too_many(51, 2000)
    sure = Trend("x", "acc_e", (1.0, 1.0, 1.0), (9.0, 8.0, 9.5), (1.0, 10.0), 3, p_value(torch.ones(2000)))
    assert {found.verdict for found in together([sure] * 50)} == {"rises"}
    assert {found.verdict for found in together([sure] * 51)} == {"neither"}
