"""A chapter of a sweep's page: runs with the same task, model, judge and metrics, and their results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from realera.contracts import Mode
from realera.evaluation.bootstrap import Resamples
from realera.evaluation.measures import ORDER, described, higher_is_better, symbol
from realera.evaluation.metrics import Sample
from realera.reporting.pooling import RunVerdicts, pooled
from realera.reporting.sweep.systems import JudgedRun
from realera.reporting.table_formats import Column


@dataclass(frozen=True)
class Chapter:
    """Runs with the same task, model, judge and metrics. runs: in the tables' order, each with its system."""

    name: str
    title: str
    runs: Sequence[JudgedRun]
    seed: int = 0
    base: str | None = None  # the system that the others are compared to
    _measured: dict[Any, dict[str, Sample]] = field(default_factory=dict)

    @cached_property
    def resamples(self) -> Resamples:
        return Resamples(self.seed)

    @property
    def headline(self) -> Mapping[str, Mode]:
        found: Mapping[str, Mode] = self.runs[0].metrics["headline"]
        return found

    @cached_property
    def systems(self) -> dict[str, list[JudgedRun]]:
        found: dict[str, list[JudgedRun]] = {}
        for run in self.runs:
            if run.judged is not None:
                found.setdefault(run.system, []).append(run)
        return found

    @cached_property
    def concepts(self) -> list[str]:
        return list(dict.fromkeys(run.concept for runs in self.systems.values() for run in runs))

    @cached_property
    def means(self) -> dict[str, dict[str, Sample]]:
        """{system: {measure: its mean over concepts and seeds}}."""
        return {system: self.measure(runs) for system, runs in self.systems.items()}

    @cached_property
    def by_concept(self) -> dict[str, dict[str, dict[str, Sample]]]:
        return {
            system: {
                concept: self.measure(own)
                for concept in self.concepts
                if (own := [run for run in runs if run.concept == concept])
            }
            for system, runs in self.systems.items()
        }

    def measure(self, runs: Sequence[JudgedRun]) -> dict[str, Sample]:
        """The pooled samples, paired with those of other systems over the same concepts, seeds and images."""
        key = tuple((run.system, run.folder) for run in runs)
        if key not in self._measured:
            self._measured[key] = pooled(verdicts_of(runs), self.headline, self.resamples)
        return self._measured[key]

    @property
    def measures(self) -> list[str]:
        """The measures that any run has, in the tables' order."""
        return [n for n in ORDER if any(n in row and not math.isnan(row[n].value) for row in self.means.values())]

    def columns(self, names: Sequence[str], group: str = "") -> list[Column]:
        found = []
        for name in names:
            mode = self.headline.get(name)
            letter, index = symbol(name, mode)
            digits = 2 if "score" in (mode, *(self.headline.values() if name == "h_o" else ())) else 1
            found.append(Column(name, letter, index, group, 1 if higher_is_better(name) else -1, digits))
        return found

    @property
    def readings(self) -> str:
        metrics = described(self.headline[name] for name in self.measures if name in self.headline)
        return f"{metrics[:1].upper()}{metrics[1:]}, with 95% intervals over seeds and images."


def verdicts_of(runs: Sequence[JudgedRun]) -> list[RunVerdicts]:
    return [run.judged for run in runs if run.judged is not None]
