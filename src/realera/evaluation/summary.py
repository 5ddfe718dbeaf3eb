"""The numbers of an evaluation, with a table for notebooks and for print."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, eq=False)
class Evaluation(Mapping[str, float]):
    """The metrics of one evaluation: evaluation["acc_e"] in percent, evaluation["h_o"]. It prints as a table.

    metrics: the content of a run's metrics.json, with intervals, counts and the protocol. folder: the images' folder;
    None if they were temporary.
    """

    metrics: Mapping[str, Any]
    folder: Path | None

    def __getitem__(self, name: str) -> float:
        return float(self.metrics["main"][name]["value"])

    def __iter__(self) -> Iterator[str]:
        return (name for name, one in self.metrics["main"].items() if one.get("value") is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def interval(self, name: str) -> tuple[float, float]:
        """The 95% interval."""
        one = self.metrics["main"][name]
        return float(one["low"]), float(one["high"])

    def _rows(self) -> list[tuple[str, str, str, str]]:
        listed = ((name, self.metrics["main"][name]) for name in self)
        return [
            (name, f"{one['value']:.1f}", f"{one['low']:.1f} to {one['high']:.1f}", str(one.get("n", "")))
            for name, one in listed
        ]

    def __str__(self) -> str:
        rows = [("measure", "value", "95% interval", "images"), *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("measure", "value", "95% interval", "images"))
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self._rows()
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
