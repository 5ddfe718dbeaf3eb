"""Judged run folders as a sweep leaves them, made without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from realera import paths
from realera.contracts import Mode, Prompt, Split, Verdict
from realera.evaluation.measures import H_O_TERMS, MEAN_PROB
from realera.evaluation.records import ManifestEntry, verdict_file, write_manifest, write_verdicts
from realera.evaluation.results import measure
from realera.system import disk

JUDGE = "eye"
REALERA: dict[str, Any] = {
    "name": "realera",
    "neighbours": {"m": 5, "n": 25, "d1": 10, "s_lo": 0.5},
    "edit": {"ridge": 0.1},
    "align": {"steps": 200, "lr": 1e-4},
}


def judged(
    folder: Path,
    concept: str = "cat",
    seed: int = 0,
    method: str | Mapping[str, Any] = "realera",
    shares: Mapping[Split, float] | None = None,
    images: int = 4,
    label: str | None = None,
    task: str = "object",
    headline: Mapping[str, Mode] = MEAN_PROB,
    terms: tuple[str, ...] = H_O_TERMS,
    detail: Mapping[str, Any] | None = None,
    cost: float | None = None,
    pictures: bool = False,
    **settings: Any,
) -> Path:
    """A run that leaves a share of each split's images showing what was asked for (before: all); method: its node, or
    a name. settings: more of the config. cost: seconds to erase."""
    node = dict(method) if isinstance(method, Mapping) else {**(REALERA if method == "realera" else {}), "name": method}
    config = {
        "concept": concept,
        "seed": seed,
        "label": label,
        "method": node,
        "backbone": {"name": "mini"},
        **settings,
    }
    disk.write_text(folder / paths.CONFIG, yaml.safe_dump(config, sort_keys=False))
    shares = shares or {"erase": 0.0, "near": 0.25, "keep": 1.0}
    rows, verdicts, before = [], [], []
    for split, share in shares.items():
        for i in range(images):
            looked_for = concept if split != "keep" else ("frog", "ship")[i % 2]
            prompt = Prompt(f"{split}-{i}", f"a photo of {split} {i % 2}", looked_for, split, 1000 * seed + i)
            rows.append(ManifestEntry(prompt, f"images/{prompt.id}.png", "x", f"originals/{prompt.id}.png"))
            seen = (i + 0.5) / images < share
            verdicts.append(Verdict(prompt.id, 0.9 if seen else 0.1, looked_for if seen else "sky", detail or {}))
            before.append(Verdict(prompt.id, 1.0, looked_for, detail or {}))
            for place, colour in (("images", (200, 0, 0)), ("originals", (0, 0, 200))) if pictures else ():
                (folder / place).mkdir(exist_ok=True)
                Image.new("RGB", (4, 4), colour).save(folder / place / f"{prompt.id}.png")
    write_manifest(folder, rows)
    write_verdicts(verdict_file(folder, JUDGE), verdicts)
    write_verdicts(verdict_file(folder, JUDGE, "original"), before)
    measure(folder, JUDGE, {"task": task, "judge": {"judge": JUDGE}}, headline, terms)
    if cost is not None:
        spent = {"format_version": 1, "device": "cpu", "stages": {"edit": cost, "draw": 9}, "passes": {"erase": 10}}
        disk.write_text(folder / paths.COSTS, json.dumps(spent))
    return folder


def grid(place: Path, seeds: int = 2) -> list[Path]:
    """3 x 3 settings of d1 and s_lo, two seeds each: erasing gets better with d1, worse with s_lo."""
    found = []
    for i, d1 in enumerate((5, 10, 20)):
        for j, s_lo in enumerate((0.1, 0.5, 0.9)):
            method = {**REALERA, "neighbours": {**REALERA["neighbours"], "d1": d1, "s_lo": s_lo, "half": d1 / 2}}
            near = 0.5 - 0.2 * i + 0.2 * j
            shares: dict[Split, float] = {"erase": max(0.0, near - 0.2), "near": near, "keep": 1 - 0.2 * i}
            for seed in range(seeds):
                found.append(judged(place / f"{d1}-{s_lo}-{seed}", seed=seed, method=method, shares=shares, images=10))
    return found
