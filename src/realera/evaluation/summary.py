"""The numbers of an evaluation, with a table for notebooks and for print."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
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


@dataclass(frozen=True, eq=False)
class AttackResult(Mapping[str, float]):
    """The outcome of an attack: result["asr"], result["pre_asr"] and result["original"] in percent of the prompts. It
    prints as a table, with pictures in a notebook.

    name: of the attack. numbers: as in a run's metrics.json under attacks.<name>, with intervals, cost and protocol.
    lines: one for each prompt, as in attacks/<name>.jsonl. folder: of the files; None if they were temporary. shown:
    for pictures, (text, whether it was won, data URIs of the images: original, erased, attacked; of the unedited model
    as it is, attacked). unedited: the attacked model is the unedited one.
    """

    name: str
    numbers: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    folder: Path | None
    shown: Sequence[tuple[str, bool, Sequence[str]]] = ()
    unedited: bool = False

    def __getitem__(self, name: str) -> float:
        if name not in ATTACK_ROWS:
            raise KeyError(name)
        return float(self.numbers[name]["value"])

    def __iter__(self) -> Iterator[str]:
        return iter(ATTACK_ROWS)

    def __len__(self) -> int:
        return len(ATTACK_ROWS)

    def interval(self, name: str) -> tuple[float, float]:
        """The 95% interval over prompts."""
        return float(self.numbers[name]["low"]), float(self.numbers[name]["high"])

    def _rows(self) -> list[tuple[str, str, str]]:
        return [
            (words, f"{self[name]:.1f}", "{:.1f} to {:.1f}".format(*self.interval(name)))
            for name, words in attack_rows(self.unedited).items()
        ]

    @property
    def _won(self) -> str:
        return " (draws the concept)" if self.unedited else " (the concept is back)"

    def _head(self) -> tuple[str, str, str]:
        return f"{self.name}, {self.numbers['prompts']} prompts", "% draw it", "95% interval"

    def __str__(self) -> str:
        rows = [self._head(), *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self._head())
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self._rows()
        )
        pictures = "".join(
            "<tr>"
            + "".join(f'<td><img src="{html.escape(uri)}" width="96"></td>' for uri in uris)
            + f"<td>{html.escape(text)}{self._won if won else ''}</td></tr>"
            for text, won, uris in self.shown
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><table>{pictures}</table>"


ATTACK_ROWS: Mapping[str, str] = {
    "original": "original model",
    "pre_asr": "erased",
    "asr": "erased and attacked",
}


def attack_rows(unedited: bool) -> Mapping[str, str]:
    """{key of an attack's numbers: its words}. Of the unedited model, the first two are the same number."""
    return {"pre_asr": "as it is", "asr": "attacked"} if unedited else ATTACK_ROWS
