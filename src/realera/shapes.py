"""Whether plain data from a run folder's files has the shape that this package writes, as deep as its readers rely on
it. Somebody else may have written the files, so nothing else is taken for granted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

from realera import paths
from realera.contracts import Split

ID = re.compile(r"[\w+-][\w.+-]{0,199}", re.ASCII)  # of a prompt: a plain file name
IMAGE = re.compile(rf"(?:{paths.IMAGES}|{paths.ORIGINALS})/[^/\\\0]{{1,250}}")
WANDB_ID = re.compile(r"[\w-]{1,64}", re.ASCII)
GROUPS = ("task", "method", "backbone", "judge", "trainer", "logger")  # of config.yaml, whose settings make objects
SPLITS = get_args(Split)
NUMBER = (int, float)
MAYBE = (int, float, type(None))


def config_fault(config: Any) -> str | None:
    """What is wrong with the content of config.yaml, "holds no settings"; None where its parts are what its readers
    take them for."""
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        return "holds no settings"
    for group in GROUPS:
        if not isinstance(config.get(group), (dict, type(None))):
            return f"is no run's ({group} is a group of settings, not {config[group]!r:.60})"
    for group in ("method", "backbone"):
        if not isinstance((config.get(group) or {}).get("name", ""), str):
            return f"is no run's ({group}.name is a text)"
    for name in ("seed", "images_at_once"):
        if not isinstance(config.get(name, 0), int) or isinstance(config.get(name), bool):
            return f"is no run's ({name} is a whole number)"
    for name in ("concept", "anchor"):
        given = config.get(name)
        if not all(isinstance(one, (str, type(None))) for one in (given if isinstance(given, list) else [given])):
            return f"is no run's ({name} is a name or a list of names)"
    return None


def is_row(line: Mapping[str, Any]) -> bool:
    """A line of manifest.jsonl. Its files are images of the folder itself, its id a plain file name."""
    size = line.get("size")
    return (
        all(isinstance(line.get(key), str) for key in ("id", "file", "prompt", "concept", "source"))
        and bool(ID.fullmatch(line["id"]))
        and all(IMAGE.fullmatch(str(name)) for name in (line["file"], line.get("original")) if name is not None)
        and line.get("split") in SPLITS
        and isinstance(line.get("seed"), int)
        and isinstance(line.get("caption"), (str, type(None)))
        and isinstance(line.get("guidance_scale"), MAYBE)
        and (size is None or (isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) for n in size)))
    )


def is_verdict(line: Mapping[str, Any]) -> bool:
    """A line of verdicts/<judge>.jsonl."""
    detail = line.get("detail")
    if not isinstance(line.get("id"), str) or not isinstance(line.get("label"), str) or not isinstance(detail, dict):
        return False
    boxes = detail.get("boxes") or {}
    counted = isinstance(boxes, dict) and all(isinstance(count, int) for count in boxes.values())
    return counted and all(
        isinstance(v, MAYBE) for v in (line.get("value"), detail.get("score"), detail.get("detected"))
    )


def is_metrics(metrics: Mapping[str, Any]) -> bool:
    """metrics.json, in today's form."""
    protocol, original = metrics.get("protocol", {}), metrics.get("original")
    judges, sets = metrics.get("judges", {}), metrics.get("sets", {})
    if not all(isinstance(part, dict) for part in (protocol, judges, sets, metrics.get("headline", {}))):
        return False
    if not all(isinstance(part, dict) for part in (*judges.values(), *sets.values(), original or {})):
        return False
    judge, concepts, sampler = (protocol.get(key) or {} for key in ("judge", "concepts", "sampler"))
    if not (isinstance(judge, dict) and isinstance(judge.get("judge", ""), str) and isinstance(sampler, dict)):
        return False
    if not all(isinstance(one, dict) and {"target", "anchor"} <= set(one) for one in concepts):
        return False
    parts = [metrics, *judges.values(), *([original] if original else [])]
    return isinstance(metrics.get("h_o_terms", []), list) and all(map(_is_measured, parts))


def _is_measured(part: Mapping[str, Any]) -> bool:
    """The numbers of one judge: `main`, and a line of each prompt."""
    main, rows = part.get("main", {}), part.get("by_prompt", [])
    estimates = main.values() if isinstance(main, dict) else [None]
    return (
        all(isinstance(e, dict) and isinstance(e.get("value"), MAYBE) for e in estimates)
        and isinstance(rows, list)
        and all(isinstance(row, dict) and {"split", "prompt"} <= set(row) for row in rows)
    )


def is_cell(cell: Mapping[str, Any]) -> bool:
    """A line of a sweep's cells.jsonl."""
    words, texts = cell.get("overrides"), [cell.get(key) for key in ("folder", "reason", "system", "launch")]
    known = [cell.get("state"), *(text for text in texts if text is not None)]
    return isinstance(words, list) and all(isinstance(text, str) for text in (*words, *known))


def is_costs(record: Any) -> bool:
    """costs.json: numbers where it has numbers."""
    if not isinstance(record, dict):
        return False
    stages, passes, shared, originals = (record.get(name, {}) for name in ("stages", "passes", "shared", "originals"))
    peaks = [record.get(name) or {} for name in ("peak_memory_mb", "peak_memory_erasing_mb")]
    if not all(isinstance(part, dict) for part in (stages, passes, shared, originals, *peaks)):
        return False
    if not all(isinstance(spared, dict) for spared in shared.values()):
        return False
    spared = [one.get(name) for one in shared.values() for name in ("seconds", "passes")]
    names = ("trained_parameters", "edited_parameters", "passes_per_image", "sittings")
    peak = [value for part in peaks for value in part.values() if value is not None]
    known = [record.get(name, 0) for name in names]
    numbers = [*stages.values(), *passes.values(), *originals.values(), *spared, *known, *peak]
    return all(isinstance(value, NUMBER) for value in numbers)
