"""Systems under attack: shares of the attacked prompts, pooled over a system's runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from realera.contracts import Prompt
from realera.evaluation import attacked
from realera.evaluation.attacked import Line
from realera.evaluation.bootstrap import Resamples, concept_key, described, image_key, interval
from realera.evaluation.metrics import Estimate, Images, Sample, clamp_resamples, sample
from realera.reporting.table_formats import markdown as cell_text


def attacks_of(run_dirs: Sequence[Path]) -> list[str]:
    """The attacks of the runs, in alphabetical order."""
    return sorted({name for run in run_dirs for name in attacked.numbers(run)})


def lines_of(run_dir: Path, name: str) -> list[Line]:
    """The lines behind a run's numbers of an attack; [] without the attack."""
    numbers = attacked.numbers(run_dir).get(name)
    return [] if numbers is None else attacked.read(run_dir, name)[: numbers["prompts"]]


def plain_lines_of(run_dir: Path, names: Sequence[str]) -> list[Line]:
    """A line for each prompt of the run under any of the attacks."""
    found = {line["key"]: line for name in names for line in lines_of(run_dir, name)}
    return list(found.values())


def share(lines: Sequence[Line], key: str, resamples: Resamples) -> Sample:
    """Percent of the lines for which `key` is true: "shown" under the attack, "plain" with the prompt as it is. Prompts
    are resampled, for `Sample.wide` the concepts too."""
    scores = [100.0 * line[key] for line in lines]
    keys = [image_key(Prompt(line["id"], line["prompt"], line["concept"], "erase", line["seed"])) for line in lines]
    found = sample([Images(keys, scores)], resamples, "top1")
    of_concept: dict[str, list[float]] = {}
    for line, score in zip(lines, scores):
        of_concept.setdefault(line["concept"], []).append(score)
    means = torch.tensor([sum(each) / len(each) for each in of_concept.values()], dtype=torch.float64)
    apart = resamples.deviations([concept_key(concept) for concept in of_concept], means)
    wide = clamp_resamples(found.drawn + apart, "top1") if len(of_concept) > 1 else None
    return replace(found, wide=wide)


def attacked_systems(systems: Mapping[str, Sequence[Path]], base: str | None = None, seed: int = 0) -> dict[str, Any]:
    """The block `attacks` of results.json, JSON-able; {} if no run was attacked.

    systems: the run folders of each system. rows: in the given order, without systems that were not attacked. Of each,
    plain: percent of the attacked prompts that show the concept as they are; asr: {attack: percent that do under it};
    returned: {attack: the concept's return over its steps}, see `attacked.returned`. over_concepts: the interval that
    also resamples the concepts. differences: asr of each system minus that of `base`, over the prompts that both have.
    """
    resamples = Resamples(seed)
    names = attacks_of([run for runs in systems.values() for run in runs])
    found = {
        system: {name: lines for name in names if (lines := [line for run in runs for line in lines_of(run, name)])}
        for system, runs in systems.items()
    }
    found = {system: each for system, each in found.items() if each}
    if not found:
        return {}
    rows = []
    for system, each in found.items():
        plain = [line for run in systems[system] for line in plain_lines_of(run, names)]
        returned = {
            name: attacked.returned(lines)
            for name, lines in each.items()
            if any("returned" in attacked.numbers(run).get(name, {}) for run in systems[system])
        }
        rows.append(
            {
                "system": system,
                "plain": _plain(share(plain, "plain", resamples).estimate()),
                "asr": {name: _plain(share(lines, "shown", resamples).estimate()) for name, lines in each.items()},
                **({"returned": returned} if returned else {}),
            }
        )
    less = (
        {"differences": {"base": base, "rows": _differences(found, base, resamples)}}
        if base in found and len(found) > 1
        else {}
    )
    return {"interval": described("prompts", resamples), "rows": rows, **less}


def _differences(
    found: Mapping[str, Mapping[str, Sequence[Line]]], base: str, resamples: Resamples
) -> list[dict[str, Any]]:
    rows = []
    for system, each in found.items():
        asr = {}
        for name in each if system != base else ():
            known = {line["key"]: line for line in found[base].get(name, ())}
            own = [line for line in each[name] if line["key"] in known]
            if not own:
                continue
            now, was = (share(lines, "shown", resamples) for lines in (own, [known[line["key"]] for line in own]))
            ends = interval(now.drawn - was.drawn)
            numbers: dict[str, Any] = {"value": now.value - was.value, "low": ends[0], "high": ends[1]}
            asr[name] = {key: round(value, 4) for key, value in numbers.items()} | {"n": now.n}
            if now.wide is not None and was.wide is not None:
                asr[name]["over_concepts"] = [round(end, 4) for end in interval(now.wide - was.wide)]
        if asr:
            rows.append({"system": system, "asr": asr})
    return rows


def _plain(estimate: Estimate) -> dict[str, Any]:
    numbers: dict[str, Any] = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    numbers = {key: None if math.isnan(value) else round(value, 4) for key, value in numbers.items()}
    if estimate.over_concepts is not None:
        numbers["over_concepts"] = [round(end, 4) for end in estimate.over_concepts]
    return {**numbers, "n": estimate.n}


def markdown(attacks: Mapping[str, Any]) -> str:
    """The block as Markdown: shares with their intervals, then the steps at which half of the concept is back."""
    rows = attacks.get("rows", [])
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row["asr"]))
    lines = [f"| system | as it is | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        cells = [_cell(numbers) for numbers in (row["plain"], *(row["asr"].get(name) for name in names))]
        lines.append(f"| {cell_text(str(row['system']))} | {' | '.join(cells)} |")
    text = "Under attack: percent of the attacked prompts that show the concept.\n\n" + "\n".join(lines) + "\n"
    back = list(dict.fromkeys(name for row in rows for name in row.get("returned", {})))
    if back:
        lines = [f"| system | {' | '.join(back)} |", "|---" * (len(back) + 1) + "|"]
        for row in rows:
            halves = [row.get("returned", {}).get(name, {}).get("half") for name in back]
            cells = ["–" if half is None else f"{half:.0f}" for half in halves]
            lines.append(f"| {cell_text(str(row['system']))} | {' | '.join(cells)} |")
        text += "\nThe step at which half of the concept is back (–: never).\n\n" + "\n".join(lines) + "\n"
    return text


def _cell(numbers: Mapping[str, Any] | None) -> str:
    if not numbers or numbers["value"] is None:
        return "–"
    return f"{numbers['value']:.0f} [{numbers['low']:.0f}, {numbers['high']:.0f}]"
