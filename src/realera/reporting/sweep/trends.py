"""The effect of a setting on a measure over a grid of settings: rank correlation and change, with intervals. Pure
functions. The cells' resamples come from `pooling.pooled`, over seeds and images, and are the same in every cell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from realera.evaluation.bootstrap import interval
from realera.evaluation.metrics import Sample

Verdict = Literal["rises", "falls", "neither"]
ERROR = 0.05  # largest probability that a page names a trend that does not exist

# RealEra, figure 5: a larger D, a smaller S and a larger M erase better and preserve worse; a larger N does the
# reverse. Values: the sign of each measure's change when the setting increases.
PAPER: Mapping[str, Mapping[str, int]] = {
    "neighbours.d1": {"acc_e": -1, "acc_g": -1, "acc_s": -1},
    "neighbours.s_lo": {"acc_e": 1, "acc_g": 1, "acc_s": 1},
    "neighbours.m": {"acc_e": -1, "acc_g": -1, "acc_s": -1},
    "neighbours.n": {"acc_e": 1, "acc_g": 1, "acc_s": 1},
}


@dataclass(frozen=True)
class Trend:
    """The trend of one measure along one axis, with the other axes fixed. rho: mean over the lines of Spearman's rank
    correlation. change: the measure at the axis' last value minus that at its first, mean over the lines that have
    both. Both are (value, low, high). ends: the measure at the first and last value. p: two-sided, for rho = 0, from
    the same resamples, corrected for `among` trends in total. expected: the paper's sign, 0 if the paper says
    nothing."""

    axis: str
    measure: str
    rho: tuple[float, float, float]
    change: tuple[float, float, float]
    ends: tuple[float, float]
    lines: int
    p: float
    expected: int = 0
    among: int = 1

    @property
    def verdict(self) -> Verdict:
        """A direction only if p is at most ERROR and the interval of rho excludes 0."""
        if self.p > ERROR:
            return "neither"
        return "rises" if self.rho[1] > 0 else "falls" if self.rho[2] < 0 else "neither"

    @property
    def against_paper(self) -> str:
        """ "confirmed" | "refuted" | "undecided", or "" if the paper says nothing."""
        if not self.expected:
            return ""
        sign = {"rises": 1, "falls": -1, "neither": 0}[self.verdict]
        return "undecided" if not sign else "confirmed" if sign == self.expected else "refuted"


def ranks(values: Tensor) -> Tensor:
    """Ranks along the first axis, 1 = smallest; ties get their mean rank. (n, ...) -> (n, ...) float64."""
    above = (values.unsqueeze(0) < values.unsqueeze(1)).sum(dim=1)
    alike = (values.unsqueeze(0) == values.unsqueeze(1)).sum(dim=1)
    return above.double() + (alike.double() + 1) / 2


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Rank correlation of x (n,) with each column of y (n, ...). It is 0 if x or the column is constant, and NaN if the
    column contains NaN (a resample without any scored image)."""
    a = ranks(x).reshape(-1, *(1 for _ in y.shape[1:]))
    b = ranks(y)
    a, b = a - a.mean(dim=0), b - b.mean(dim=0)
    size = (a.square().sum(dim=0) * b.square().sum(dim=0)).sqrt()
    found = torch.where(size > 0, (a * b).sum(dim=0) / size.clamp_min(1e-300), torch.zeros_like(size))
    return found.masked_fill(y.isnan().any(dim=0), math.nan)


def trend(
    axes: Mapping[str, Sequence[float]],
    cells: Mapping[tuple[float, ...], Sample],
    axis: str,
    measure: str,
    step: float = 0.1,
) -> Trend | None:
    """The trend of a measure along `axis`; None if no line has two measured cells. cells: {one value per axis: the
    measure there}. step: the printed precision of the measure. Values are rounded to it first, so that differences too
    small to print do not affect the ranks."""
    place = list(axes).index(axis)
    lines: dict[tuple[float, ...], list[tuple[float, Sample]]] = {}
    for at, sample in sorted(cells.items(), key=lambda cell: cell[0]):
        if not math.isnan(sample.value):
            lines.setdefault((*at[:place], *at[place + 1 :]), []).append((at[place], sample))
    long = [line for line in lines.values() if len(line) > 1]
    if not long:
        return None
    rhos, changes, firsts, lasts = [], [], [], []
    first, last = min(axes[axis]), max(axes[axis])
    for line in long:
        x = torch.tensor([value for value, _ in line], dtype=torch.float64)
        y = torch.stack([torch.cat([torch.tensor([s.value]).double(), s.drawn.double()]) for _, s in line])
        rhos.append(spearman(x, (y / step).round()))
        if line[0][0] == first and line[-1][0] == last:
            changes.append(y[-1] - y[0])
            firsts.append(float(y[0, 0]))
            lasts.append(float(y[-1, 0]))
    unknown = torch.full_like(rhos[0], math.nan)
    rho = torch.stack(rhos).mean(dim=0)
    return Trend(
        axis,
        measure,
        _with_interval(rho),
        _with_interval(torch.stack(changes).mean(dim=0) if changes else unknown),
        (_mean(firsts), _mean(lasts)),
        len(long),
        p_value(rho[1:]),
        next((signs.get(measure, 0) for end, signs in PAPER.items() if f".{axis}".endswith(f".{end}")), 0),
    )


def p_value(drawn: Tensor) -> float:
    """Two-sided p value for the resampled number being 0: twice the smaller share of resamples on one side of 0, with 1
    added to both counts, so that p is never smaller than the number of resamples supports. 1 if a resample is NaN."""
    if drawn.isnan().any():
        return 1.0
    beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return min(1.0, 2 * (1 + beyond) / (1 + len(drawn)))


def holm(p: Sequence[float]) -> list[float]:
    """The p values corrected for their number, in their order (Holm, 1979): the k-th smallest of n is multiplied by
    n - k + 1, and the results are made monotone. The probability that any p value of at most ERROR is a false positive
    is at most ERROR."""
    found = [1.0] * len(p)
    worst = 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        worst = max(worst, min(1.0, (len(p) - rank) * p[place]))
        found[place] = worst
    return found


def too_many(trends: int, draws: int) -> bool:
    """Whether no trend can be significant: the smallest p value of `draws` resamples, corrected for `trends`, is too
    large."""
    return trends * 2 > ERROR * (1 + draws)


def together(trends: Sequence[Trend]) -> list[Trend]:
    """The same trends, with p values corrected for their number."""
    return [replace(one, p=p, among=len(trends)) for one, p in zip(trends, holm([one.p for one in trends]))]


def _with_interval(values: Tensor) -> tuple[float, float, float]:
    """(value, low, high): the first value, and the interval of the resamples after it."""
    return (float(values[0]), *interval(values[1:]))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def sentence(found: Trend, short: str, symbol: str, ends: tuple[str, str], digits: int = 1) -> str:
    """ "Acc_e falls as d1 increases: ..." in plain text. short: the axis' name; symbol: the measure's; ends: texts of
    the axis' first and last value; digits: decimals of the measure."""

    def text_of(value: float, sign: str = "+", places: int = digits) -> str:
        return f"{round(value, places) + 0.0:{sign}.{places}f}"  # no "-0.0"

    rho, low, high = found.rho
    text = {
        "rises": f"{symbol} rises with {short}",
        "falls": f"{symbol} falls as {short} increases",
        "neither": f"{symbol} shows no trend along {short}",
    }[found.verdict]
    if found.verdict == "neither" and (found.rho[1] > 0 or found.rho[2] < 0):
        text += f" that is significant among the {found.among} trends of this page"
    text += f": rank correlation {text_of(rho, places=2)} [{text_of(low, places=2)}, {text_of(high, places=2)}]"
    if not math.isnan(found.change[0]):
        change, least, most = found.change
        text += (
            f"; from {ends[0]} to {ends[1]} it goes from {text_of(found.ends[0], '-')} to "
            f"{text_of(found.ends[1], '-')} ({text_of(change)} [{text_of(least)}, {text_of(most)}])"
        )
    paper = {
        "confirmed": "; the paper says the same",
        "refuted": "; the paper says the opposite",
        "undecided": f"; the paper says that it {'rises' if found.expected > 0 else 'falls'}",
    }
    return f"{text}{paper.get(found.against_paper, '')}."
