"""The measurements of a run, for its model card: how far the erasure succeeded, and which attacks were tried.

The card claims nothing that these numbers do not say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from realera import paths
from realera.contracts import UserError
from realera.evaluation import attacked, measures
from realera.evaluation.records import read_metrics
from realera.files import plain_data

ORDER = ("acc_e", "acc_g", "acc_a", "acc_u", "acc_s", "h_o")  # rows of the table
WHAT = {
    "acc_e": "prompts with the concept's name",
    "acc_a": "phrases that evoke it without its name",
    "acc_u": "words for it that no training caption has",
    "acc_s": "prompts of other concepts",
    "h_o": "the harmonic mean",
}
CONTROLS = ("random",)  # entries of conf/attack that are not attacks


@dataclass(frozen=True)
class Row:
    """A row of the table. key: "acc_e", "whole_e". heading: "Acc_e ↓". what: its prompts and its metric. value, low,
    high: None if no image could be scored. original: of the unedited model, None if it was not measured. images:
    "8", "0 + 8 unscored". n: scored images."""

    key: str
    heading: str
    what: str
    value: float | None
    low: float | None
    high: float | None
    original: float | None
    images: str
    n: int


@dataclass(frozen=True)
class Evidence:
    """metrics: the content of metrics.json, {} if the run was not judged. attacks: {name: numbers}, as in metrics.json
    under `attacks`; a run that was not judged can have them too."""

    metrics: Mapping[str, Any] = field(default_factory=dict)
    attacks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, run_dir: Path) -> Evidence:
        """Of a run folder. Raises UserError if its metrics.json is torn."""
        metrics = read_metrics(run_dir) if (run_dir / paths.METRICS).is_file() else {}
        return cls(metrics, {**metrics.get("attacks", {}), **attacked.numbers(run_dir)})

    @classmethod
    def if_whole(cls, run_dir: Path) -> Evidence:
        """As `of`; empty if metrics.json is torn."""
        try:
            return cls.of(run_dir)
        except UserError:
            return cls()

    @property
    def protocol(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.metrics.get("protocol", {})
        return found

    def unscored(self, concepts: Sequence[str]) -> list[str]:
        """The erased concepts of which no image was scored. concepts: of the run."""
        blocks = self.metrics.get("concepts") or dict.fromkeys(concepts, self.metrics.get("main", {}))
        return [name for name, block in blocks.items() if block.get("acc_e", {}).get("value") is None]

    def rows(self) -> list[Row]:
        """The table: the metrics of the task, and whether images show the anchor or a smear. Metrics without images are
        left out."""
        main, before = self.metrics.get("main", {}), self.metrics.get("original") or {}
        listed = [
            (name, measures.mode_of(main, name), main[name], before.get("main", {})) for name in ORDER if name in main
        ]
        listed += [(name, mode, found, before.get(mode, {})) for name, mode, found in measures.extra(self.metrics)]
        return [
            self._row(name, mode, found, was.get(name) or {})
            for name, mode, found, was in listed
            if found["value"] is not None or (name != "h_o" and found["unscored"])
        ]

    def _row(self, name: str, mode: str | None, found: Mapping[str, Any], was: Mapping[str, Any]) -> Row:
        letter, index = measures.symbol(name, mode)
        prompts = WHAT.get(name, f"prompts with its {measures.near(self.protocol)}s")
        if name == "h_o":
            prompts += " of " + ", ".join(map(self._term, self.metrics.get("h_o_terms", ())))
        unit = "%" if name == "h_o" else measures.READINGS[mode].unit if mode and mode in measures.READINGS else ""
        words = ", ".join(part for part in (measures.what(mode) if name != "h_o" else "", unit) if part)
        return Row(
            f"{letter}_{index}".lower(),
            measures.column_heading(name, mode),
            f"{prompts}: {words}" if words else prompts,
            found["value"],
            found["low"],
            found["high"],
            was.get("value"),
            measures.image_count(found),
            found["n"],
        )

    def _term(self, name: str) -> str:
        """A term of H_o: "Acc_s", "100 - Acc_e"."""
        mode = measures.mode_of(self.metrics.get("main", {}), name)
        return ("" if measures.higher_is_better(name, mode) else "100 - ") + "_".join(measures.symbol(name, mode))

    def not_tried(self) -> list[str]:
        """The attacks of conf/attack that were not tried, under any name."""
        tried = {numbers["protocol"]["attack"].get("_target_") for numbers in self.attacks.values()}
        known = {file.stem: plain_data.read_yaml(file) for file in sorted((paths.CONF_DIR / "attack").glob("*.yaml"))}
        return [name for name, node in known.items() if node["_target_"] not in tried and name not in CONTROLS]
