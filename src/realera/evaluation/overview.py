"""One page for several runs (a sweep, say): what differs between them, their numbers, and a strip of images of each."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from realera import costs, paths
from realera.contracts import UserError
from realera.evaluation import cost
from realera.evaluation.readings import ORDER, described, head
from realera.evaluation.records import read_metrics
from realera.evaluation.report import veiled
from realera.evaluation.sheets import first_pairs, sheets

TEMPLATE = "overview.html.j2"
APART = ("run_dir", "overwrite", "logger", "images_at_once", "evaluate")  # settings that no number depends on
REPEATED = ("task.concepts", "task.anchor")  # the same as concept and anchor


def write_overview(run_dirs: Sequence[Path], out: Path, blur: bool | None = None) -> Path:
    """Writes the page of several finished runs, best H_o first (where a task has none: lowest Acc_e), and returns its
    path. blur: as `report.write_report`.

    Raises:
        UserError: none of them is finished.
    """
    runs = [_read(folder, out.parent, blur) for folder in run_dirs if (folder / paths.METRICS).is_file()]
    if not runs:
        raise UserError("none of these runs was judged yet: finish them, or give evaluate=true.")
    settings = [flat(run.pop("config")) for run in runs]
    names = differing(settings)
    for run, own in zip(runs, settings):
        run["settings"] = [(name, _short(own.get(name))) for name in names]
    runs.sort(key=lambda run: _rank(run["measures"]))
    shared = [(name, _short(settings[0].get(name))) for name in ("concept", "method.name", "backbone.name", "seed")]
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = env.get_template(TEMPLATE).render(
        runs=runs,
        heads=[name for name in ORDER if any(name in run["measures"] for run in runs)],
        faces=any(e["unscored"] for run in runs for e in run["measures"].values()),
        readings=described(e["mode"] for run in runs for name, e in run["measures"].items() if name != "h_o"),
        costs=any(run["cost"] for run in runs),
        names=names,
        shared=[(n, v) for n, v in shared if n not in names],
        unfinished=len(run_dirs) - len(runs),
    )
    paths.write_text(out, page)
    return out


def flat(node: Any, at: str = "") -> dict[str, Any]:
    """A nested config as {"method.neighbours.m": 5, ...}."""
    if not isinstance(node, Mapping):
        return {at: node}
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= flat(value, f"{at}.{key}" if at else str(key))
    return found


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings that are not the same in all runs, in the order of the configs."""
    names = dict.fromkeys(name for own in settings for name in own)
    kinds: dict[Any, list[Mapping[str, Any]]] = {}
    for own in settings:
        kinds.setdefault(own.get("method.name"), []).append(own)
    found = []
    for name in names:
        if name.partition(".")[0] in APART or name.startswith(REPEATED) or name.endswith("_target_"):
            continue
        # Two methods differ in every part: only what differs between runs of one method says more than its name.
        groups = list(kinds.values()) if name.startswith("method.") and name != "method.name" else [settings]
        if any(len({json.dumps(own.get(name), default=str) for own in group}) > 1 for group in groups):
            found.append(name)
    return found


def _read(folder: Path, beside: Path, blur: bool | None) -> dict[str, Any]:
    config = yaml.safe_load((folder / paths.CONFIG).read_text(encoding="utf-8"))
    metrics = read_metrics(folder)
    judge = metrics["protocol"].get("judge", {}).get("judge")
    sheet = sheets(folder, judge, metrics["headline"]) if (folder / paths.MANIFEST).is_file() else {}
    page = folder / paths.REPORT
    return {
        "config": config,
        "name": folder.name,
        "link": Path(os.path.relpath(page, beside)).as_posix() if page.is_file() else "",
        "measures": {name: {**e, "head": head(name, e["mode"])} for name, e in metrics["main"].items()},
        "cost": [f"{number} {what}" for what, number in cost.parts(costs.read(folder))[:2]],
        "pairs": first_pairs(sheet),
        "veiled": veiled(config, metrics, blur),
    }


def _rank(measures: Mapping[str, Any]) -> float:
    if "h_o" in measures:
        return -float(measures["h_o"]["value"] or 0)
    value = measures["acc_e"]["value"]
    return math.inf if value is None else float(value)


def _short(value: Any) -> str:
    text = "–" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
