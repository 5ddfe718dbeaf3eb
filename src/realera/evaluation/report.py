"""report.html: one run on one page, made from the run folder alone and complete in itself (styles, charts, images)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from realera import paths
from realera.contracts import Split, UserError
from realera.evaluation import charts
from realera.evaluation.records import read_lines
from realera.evaluation.sheets import first_pairs, sheets

TEMPLATE = "report.html.j2"
SPLITS: Mapping[Split, tuple[str, str]] = {
    "erase": ("Asked for by name", "The concept itself. It should be gone."),
    "near": ("Asked for by synonym", "Other names of the concept. It should be gone here too."),
    "keep": ("Other concepts", "What should stay as it was."),
    "associated": ("Asked for by association", "Phrases that evoke the concept without naming it."),
    "unseen": (
        "Asked for by other words",
        "Words outside the list of synonyms; the miniature's captions held none of them.",
    ),
}
MEASURES = (
    # name in metrics.json, letter, what it is of, whether higher is better
    ("acc_e", "e", "the concept by name", False),
    ("acc_g", "g", "its synonyms", False),
    ("acc_s", "s", "other concepts", True),
    ("h_o", "", "the three as one", True),
    ("acc_a", "a", "phrases that evoke it", False),
    ("acc_u", "u", "other words for it", False),
)
FILES = {
    paths.ERASED: "what was changed in the model",
    paths.MAP: "the closed form as one matrix",
    paths.NEIGHBOURS: "what was mined around the concept",
    paths.CONFIG: "the settings",
    paths.METRICS: "the numbers and their protocol",
    paths.MANIFEST: "one image a line",
    paths.VERDICTS: "one verdict a line, by judge",
    paths.IMAGES: "what was generated",
}


@dataclass(frozen=True)
class Measure:
    """A line of the table. Estimates are metrics.json's: {value, low, high, n, unscored}, values in percent or None."""

    name: str
    letter: str
    what: str
    higher: bool
    after: Mapping[str, Any]
    before: Mapping[str, Any] | None
    top1: Mapping[str, Any]
    top1_before: Mapping[str, Any] | None


def write_report(run_dir: Path) -> Path:
    """Writes report.html and returns its path. What the folder does not hold (no images yet, nothing trained) is left
    out. Raises UserError where it holds no run, or a torn file."""
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = env.get_template(TEMPLATE).render(collect(run_dir))
    out = run_dir / paths.REPORT
    paths.write_text(out, page)
    return out


def collect(run_dir: Path) -> dict[str, Any]:
    """Everything the page shows, as values for the template."""
    config = _yaml(run_dir / paths.CONFIG)
    metrics = _json(run_dir / paths.METRICS)
    edit = _json(run_dir / paths.EDIT_INFO)
    if not (config or metrics):
        raise UserError(f"{run_dir} holds neither {paths.CONFIG} nor {paths.METRICS}: name the folder of a run")
    protocol = metrics.get("protocol", {})
    judge = protocol.get("judge", {}).get("judge")
    sheet = sheets(run_dir, judge) if (run_dir / paths.MANIFEST).is_file() else {}
    return {
        "concepts": _concepts(config, protocol),
        "facts": _facts(config, protocol),
        "measures": _measures(metrics),
        "has_before": bool(metrics.get("original")),
        "unit": {"mean_prob": "mean probability", "top1": "top-1"}.get(metrics.get("headline", ""), ""),
        "images": sum(strip.images for strips in sheet.values() for strip in strips),
        "first": first_pairs(sheet),
        "splits": [(split, *SPLITS[split], sheet[split]) for split in SPLITS if split in sheet],
        "seen": _seen(metrics),
        "edit": _edit(edit),
        "curves": charts.curves(read_lines(run_dir / paths.LOSSES)),
        "split_names": {split: title for split, (title, _) in SPLITS.items()},
        "settings": yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "",
        "protocol": yaml.safe_dump(protocol, sort_keys=False, allow_unicode=True) if protocol else "",
        "files": [(name, what) for name, what in FILES.items() if (run_dir / name).exists()],
    }


def _concepts(config: Mapping[str, Any], protocol: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(target, anchor), by the protocol; before judging, by the settings."""
    if known := protocol.get("concepts"):
        return [(str(c["target"]), str(c["anchor"])) for c in known]
    given = config.get("concept")
    return [(str(c), str(config.get("anchor") or "")) for c in (given if isinstance(given, list) else [given])]


def _facts(config: Mapping[str, Any], protocol: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the number is a number of: method, model, seed, judge, sampler."""

    def name(part: str) -> Any:
        node = config.get(part) or protocol.get(part) or {}
        return node.get("name") if isinstance(node, dict) else node

    sampler = protocol.get("sampler", {})
    drawn = (
        f"{sampler['scheduler']}, {sampler['steps']} steps, guidance {sampler['guidance_scale']:g}" if sampler else None
    )
    facts = {
        "method": name("method"),
        "model": name("backbone"),
        "seed": config.get("seed"),
        "judge": protocol.get("judge", {}).get("judge"),
        "drawn by": drawn,
    }
    return [(label, str(value)) for label, value in facts.items() if value is not None]


def _measures(metrics: Mapping[str, Any]) -> list[Measure]:
    """The table's lines, for what was measured."""
    if not metrics:
        return []
    mode, original = metrics["headline"], metrics["original"]
    rows = []
    for name, letter, what, higher in MEASURES:
        after = metrics[mode][name]
        if after["n"] + after["unscored"] and not (name == "h_o" and after["value"] is None):
            before = original[mode][name] if original else None
            top1_before = original["top1"][name] if original else None
            rows.append(Measure(name, letter, what, higher, after, before, metrics["top1"][name], top1_before))
    return rows


def _seen(metrics: Mapping[str, Any]) -> dict[tuple[str, str], tuple[float | None, float | None]]:
    """{(split, prompt): top-1 percent (before, after)}."""
    if not metrics:
        return {}
    original = (metrics["original"] or {}).get("by_prompt", [])
    before = {(row["split"], row["prompt"]): row["top1"] for row in original}
    after = {(row["split"], row["prompt"]): row["top1"] for row in metrics["by_prompt"]}
    return {key: (before.get(key), value) for key, value in after.items()}


def _edit(edit: Mapping[str, Any]) -> dict[str, Any] | None:
    """The closed form's charts and numbers; None where the run has no closed form."""
    if not edit:
        return None
    return {
        "info": [(name.replace("_", " "), charts.number(value)) for name, value in edit.get("info", {}).items()],
        "layers": charts.layer_bars(edit["layers"]) if edit.get("layers") else None,
        "spectrum": charts.spectrum(edit["spectrum"]) if edit.get("spectrum") else None,
        "shifts": charts.shifts(edit.get("probes", [])),
    }


def _yaml(file: Path) -> dict[str, Any]:
    return _mapping(file, yaml.safe_load, yaml.YAMLError)


def _json(file: Path) -> dict[str, Any]:
    return _mapping(file, json.loads, ValueError)


def _mapping(file: Path, read: Any, torn: type[Exception]) -> dict[str, Any]:
    """The file's content, {} where it is missing. Raises UserError where it is torn."""
    if not file.is_file():
        return {}
    try:
        content = read(file.read_text(encoding="utf-8"))
    except (torn, UnicodeDecodeError):
        raise UserError(f"{file} is torn: delete it, and start the run again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is not what a run writes: delete it, and start the run again")
    return content
