import math

import pytest

from realera.reporting import charts


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [
        (0, 1, [0, 0.5, 1]),
        (0, 0.57, [0, 0.2, 0.4, 0.6]),
        (0, 100, [0, 50, 100]),
        (-0.3, 0.9, [-0.5, 0, 0.5, 1]),
        (0, 3e-5, [0, 1e-5, 2e-5, 3e-5]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, marks: list[float]) -> None:
    assert charts.ticks(low, high) == pytest.approx(marks)


@pytest.mark.parametrize("value", [0.0, 5.0, -2.0, 1e-12])
def test_ticks_of_a_single_value_still_make_an_axis(value: float) -> None:
    marks = charts.ticks(min(0.0, value), max(0.0, value))
    assert len(marks) >= 2 and marks[0] <= value <= marks[-1]


def test_numbers_are_short() -> None:
    assert [charts.number(v) for v in (0, 0.25, 1 / 3, 12345.6, 3.14159e-5, 2e6)] == [
        "0",
        "0.25",
        "0.333",
        "12346",
        "3.1e-05",
        "2.0e+06",
    ]


def _points(text: str) -> list[tuple[float, float]]:
    return [tuple(map(float, p.split(","))) for p in text.split()]  # type: ignore[misc]


def test_each_term_has_a_curve_even_if_it_skips_steps() -> None:
    rows = [{"step": s, "near": 10.0 - s, **({"beyond": 1.0} if s % 2 else {})} for s in range(11)]
    near, beyond = charts.curves(rows)
    assert (near.title, beyond.title) == ("near", "beyond")
    drawn = _points(near.raw)
    assert drawn[0] == (0, 0) and drawn[-1] == (100, 100), "largest at the top left, zero at the bottom right"
    assert len(_points(beyond.raw)) == 5
    assert [t.label for t in near.x] == ["0", "step 10"]


def test_smoothing_keeps_a_straight_line_and_calms_noise() -> None:
    straight = charts.curves([{"step": s, "loss": float(s)} for s in range(101)])[0]
    assert _points(straight.smooth)[50] == pytest.approx((50, 50))
    noisy = charts.curves([{"step": s, "loss": 1.0 + (-1) ** s} for s in range(101)])[0]
    assert max(abs(y - 50) for _, y in _points(noisy.smooth)) < 20 < max(abs(y - 50) for _, y in _points(noisy.raw))


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    curve = charts.curves([{"step": s, "loss": 1.0} for s in range(5000)])[0]
    drawn = _points(curve.raw)
    assert len(drawn) < 300 and drawn[0][0] == 0 and drawn[-1][0] == 100


def test_values_that_are_not_finite_numbers_are_not_drawn() -> None:
    rows = [{"step": 1, "a": math.nan, "b": 1.0}, {"step": 2, "a": math.inf, "b": 2.0}, {"step": 3, "a": "x", "b": 3.0}]
    assert [c.title for c in charts.curves(rows)] == ["b"]
    assert charts.curves([]) == [] and charts.curves([{"step": 1, "a": 1.0}]) == []


def test_layers_are_in_order_and_grouped_by_block() -> None:
    layers = {
        f"{block}.attentions.0.transformer_blocks.0.attn2.{kind}": value
        for block, value in (("down_blocks.1", 0.1), ("mid_block", 0.2), ("up_blocks.0", 0.4))
        for kind in ("to_k", "to_v")
    }
    drawn = charts.layer_bars(layers)
    assert [b.kind for b in drawn.bars] == ["key", "value"] * 3
    assert [b.height for b in drawn.bars] == pytest.approx([25, 25, 50, 50, 100, 100])
    assert [g.label for g in drawn.groups] == ["down 1", "mid", "up 0"]
    assert drawn.y[0] == charts.Tick(100, "0%") and drawn.y[-1] == charts.Tick(0, "40%")
    assert all(b.x >= 0 and b.x + b.width <= 100 for b in drawn.bars)
    assert all(a.x + a.width <= b.x + 1e-9 for a, b in zip(drawn.bars, drawn.bars[1:]))


def test_layers_of_another_model_or_unchanged_ones_are_drawn_too() -> None:
    drawn = charts.layer_bars({"first.to_k": 0.0, "second": math.nan})
    assert [b.height for b in drawn.bars] == [0, 0]
    assert "second: ?" in drawn.bars[1].title


def test_the_spectrum_counts_unchanged_directions() -> None:
    drawn = charts.spectrum([0.5, 1.0, 1.005, 2.0])
    assert drawn.near_unchanged == 2
    assert drawn.points[0] == (0, 0) and drawn.points[-1] == (100, 75)
    assert drawn.unchanged == 50


def test_shifts_are_grouped_and_share_an_axis() -> None:
    probes = [{"text": t, "split": s, "shift": v} for t, s, v in (("a", "erase", 1.0), ("b", "keep", 0.04))]
    drawn = charts.shifts(probes)
    assert list(drawn.groups) == ["erase", "keep"] and not drawn.cosines
    assert (drawn.groups["erase"][0].at, drawn.groups["keep"][0].at) == (100, 4)
    assert drawn.groups["keep"][0].label == "4%"


def test_shifts_with_cosines_are_shown_on_the_cosine_axis() -> None:
    probe = {"text": "a", "split": "erase", "shift": 0.5, "to_anchor_before": 0.25, "to_anchor_after": 1.0}
    drawn = charts.shifts([probe])
    word = drawn.groups["erase"][0]
    assert drawn.cosines and (word.before, word.at) == (25, 100)
    assert not charts.shifts([probe, {"text": "b", "split": "keep", "shift": 0.1}]).cosines
    negative = charts.shifts([{**probe, "to_anchor_before": -0.2}]).groups["erase"][0]
    assert negative.before is not None and 0 <= negative.before < negative.at == 100
