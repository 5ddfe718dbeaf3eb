"""report.html: a self-contained page of one run (styles, charts, images), made from the run folder alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from realera import costs, paths
from realera.contracts import Split, UserError
from realera.evaluation.measures import MEAN_PROB, METRIC_OF_SPLIT, mode_of, near
from realera.evaluation.records import read_config, read_lines, read_metrics
from realera.files import checksums, json_shapes, plain_data
from realera.reporting import attack_rows, charts, cost_words, page_rows
from realera.reporting.sheets import first_pairs, sheets
from realera.settings.run_settings import Settings
from realera.system import disk

log = logging.getLogger(__name__)

TEMPLATE = "run_page.html.j2"
MOST_LISTED = 12  # concepts whose mined texts are listed; edit.json lists all of them
SPLITS: Mapping[Split, tuple[str, str]] = {
    "erase": ("Prompted by name", "The concept's name. The concept should be gone."),
    "near": ("Prompted by paraphrase", "Other words for the concept. The concept should be gone too."),
    "keep": ("Preserved concepts", "Other concepts. They should not change."),
    "associated": ("Prompted by association", "Phrases that evoke the concept without naming it."),
    "unseen": ("Prompted by unseen words", "Words for the concept that are in no training caption of the miniature."),
}
NEAR: Mapping[str, tuple[str, str]] = {  # by the kind of prompt that the task has in this split
    "synonym": ("Prompted by synonym", "Other names of the concept. The concept should be gone too."),
    "phrase": ("Prompted by phrase", "Phrases that mean the concept without naming it. It should be gone too."),
}
FILES = {
    paths.ERASED: "the changed weights",
    paths.MAP: "the closed form as one matrix",
    paths.NEIGHBOURS: "the mined neighbours of the concept",
    paths.CONFIG: "the settings",
    paths.METRICS: "the metrics and their protocol",
    paths.COSTS: "time, passes, parameters and memory",
    paths.MANIFEST: "one image per line",
    paths.VERDICTS: "one file per judge, one verdict per line",
    paths.IMAGES: "the generated images",
    paths.ATTACKS: "for each attack: numbers, one prompt per line, images",
}


def write_report(run_dir: Path, blur: bool | None = None) -> Path:
    """Writes report.html and returns its path. blur: whether images are blurred until clicked (see `veiled`).

    The page leaves out missing files (no images yet, nothing trained), a torn edit.json and torn images. Raises
    UserError if the folder is not a run or another file is torn.
    """
    out = paths.inside(run_dir, paths.REPORT)
    disk.write_text(out, checksums.sealed_page(render(TEMPLATE, collect(run_dir, blur))))
    return out


def render(template: str, content: Mapping[str, Any]) -> str:
    """Renders a template of this package. A name in the template that is missing in `content` is an error."""
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.policies["json.dumps_function"] = plain_data.json_text
    return env.get_template(template).render(content)


def collect(run_dir: Path, blur: bool | None = None) -> dict[str, Any]:
    """The values for the template."""
    config = read_config(run_dir)
    metrics = read_metrics(run_dir) if (run_dir / paths.METRICS).is_file() else {}
    edit = _edit_info(run_dir)
    if not (config or metrics):
        raise UserError(f"{run_dir} has neither {paths.CONFIG} nor {paths.METRICS}: give the folder of a run")
    protocol = metrics.get("protocol", {})
    judge = protocol.get("judge", {}).get("judge")
    headline = metrics.get("headline", MEAN_PROB)
    sheet = sheets(run_dir, judge, headline) if (run_dir / paths.MANIFEST).is_file() else {}
    finish = edit.pop("finish", None)
    spent = costs.read(run_dir)
    splits = {**SPLITS, "near": NEAR.get(near(protocol), SPLITS["near"])}
    return {
        "concepts": _concepts(config, protocol),
        "original": Settings(config).unedited,
        "facts": _facts(config, protocol),
        "veiled": is_blurred(config, metrics, blur),
        "measured": page_rows.measures(metrics),
        "sentences": page_rows.sentences(metrics),
        "h_o_terms": metrics.get("h_o_terms", []),
        "by_concept": page_rows.concepts(metrics),
        "boxes": page_rows.boxes(metrics),
        "others": page_rows.others(metrics),
        "sets": page_rows.sets(metrics),
        "images": sum(strip.images for strips in sheet.values() for strip in strips),
        "first": first_pairs(sheet),
        "splits": [(split, *titles, sheet[split]) for split, titles in splits.items() if split in sheet],
        "seen": _seen(metrics),
        "attacks": attack_rows.chapters(run_dir, Settings(config).unedited),
        "edits": [(title, block) for title, block in (("", _edit(edit)), ("after training", _edit(finish))) if block],
        "curves": charts.curves(read_lines(paths.inside(run_dir, paths.LOSSES))),
        "cost": {
            "totals": cost_words.parts(spent),
            "stages": cost_words.stages(spent),
            "device": spent.get("device", ""),
        },
        "split_names": {split: title for split, (title, _) in splits.items()},
        "settings": yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "",
        "protocol": yaml.safe_dump(protocol, sort_keys=False, allow_unicode=True) if protocol else "",
        "files": [(name, what) for name, what in FILES.items() if (run_dir / name).exists()],
    }


def _concepts(config: Mapping[str, Any], protocol: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(target, anchor) from the protocol, or from the settings if the run has not been judged."""
    if known := protocol.get("concepts"):
        return [(str(c["target"]), str(c["anchor"])) for c in known]
    settings = Settings(config)
    return [(concept, str(settings.anchor or "")) for concept in settings.concepts]


def _facts(config: Mapping[str, Any], protocol: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, value): method, model, seed, judge, sampler."""

    settings = Settings(config)
    model = settings.backbone or Settings(protocol).backbone  # a folder that was only judged has no settings
    sampler = protocol.get("sampler", {})
    sampling = (
        f"{sampler['scheduler']}, {sampler['steps']} steps, guidance {sampler['guidance_scale']:g}" if sampler else None
    )
    facts = {
        "method": settings.method.name,
        "model": model.name,
        "seed": settings.seed,
        "judge": protocol.get("judge", {}).get("judge"),
        "sampler": sampling,
    }
    return [(label, str(value)) for label, value in facts.items() if value is not None]


def _seen(metrics: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """{(split, prompt): "seen in 98 → 3%"} by the split's metric; top-1 instead of a mean probability."""
    if not metrics:
        return {}
    patterns = {"top1": "seen in {}%", "detected": "detected in {}%", "score": "score {}"}

    def found(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], tuple[str, Any]]:
        read = {split: mode_of(metrics["main"], measure) or "" for split, measure in METRIC_OF_SPLIT.items()}
        mode = {split: "top1" if m == "mean_prob" else m for split, m in read.items()}
        return {(r["split"], r["prompt"]): (mode[r["split"]], r.get(mode[r["split"]])) for r in rows}

    before = found((metrics.get("original") or {}).get("by_prompt", []))
    after = found(metrics.get("by_prompt", []))
    texts = {}
    for key, (mode, now) in after.items():
        if now is not None and mode in patterns:
            values = [value for value in (before.get(key, ("", None))[1], now) if value is not None]
            texts[key] = patterns[mode].format(
                " → ".join(f"{v:.1f}" if mode == "score" else f"{v:.0f}" for v in values)
            )
    return texts


def is_blurred(config: Mapping[str, Any], metrics: Mapping[str, Any], asked: bool | None = None) -> bool:
    """Whether images are blurred until clicked: `asked` if given, else the run's `blur` setting, else True for explicit
    content."""
    settings = Settings(config)
    for setting in (asked, settings.blur):
        if setting is not None:
            return bool(setting)
    task = (metrics.get("protocol") or {}).get("task") or settings.task.target or ""
    return "nsfw" in str(task).lower()


def _edit(edit: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Charts and numbers of the closed form; None if the run has no closed form."""
    if not edit:
        return None
    return {
        "info": [(name.replace("_", " "), charts.number(value)) for name, value in edit.get("info", {}).items()],
        "layers": charts.layer_bars(edit["layers"]) if edit.get("layers") else None,
        "spectrum": charts.spectrum(edit["spectrum"]) if edit.get("spectrum") else None,
        "shifts": charts.shifts(edit.get("probes", [])),
        "found_texts": edit.get("found_texts", [])[:MOST_LISTED],
        "more_found_texts": len(edit.get("found_texts", [])[MOST_LISTED:]),
    }


def _edit_info(run_dir: Path) -> dict[str, Any]:
    """edit.json; {} if it is missing or torn, because only the command that made the run can write it again and the
    metrics do not need it. Raises UserError if it has another form than a run's."""
    file = paths.inside(run_dir, paths.EDIT_INFO)
    if not file.is_file():
        return {}
    try:
        content = plain_data.read_json(file)
    except (OSError, ValueError):
        log.warning("%s is torn: repeat the command that made the run to write it again", file)
        return {}
    if not json_shapes.fits(content, json_shapes.EDIT):
        raise UserError(f"{file} was not written by a run: repeat the command that made the run")
    return dict(content)
