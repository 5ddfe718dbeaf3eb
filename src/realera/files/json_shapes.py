"""Checks that data from a run folder's files has the structure that this package writes, as far as its readers rely on
it. The files may come from somebody else.

A shape is a type (str, dict), a test function, [shape] for a list of items of this shape, {"key": shape, "key?": shape}
for a mapping with these keys ("?": the key is optional), or {...: shape} for a mapping whose values all have the shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

from realera import paths
from realera.contracts import Mode, Split

ID = re.compile(r"[^/\\\x00-\x1f.][^/\\\x00-\x1f]{0,199}")  # of a prompt: a file name without a path
IMAGE = re.compile(rf"(?:{paths.IMAGES}|{paths.ORIGINALS})/[^/\\\0]{{1,250}}")
PARTS = ("neighbours", "edit", "latents", "align", "guide", "finish")  # of a method
GROUPS = ("task", "method", "backbone", "judge", "trainer", "logger")  # of config.yaml: each builds an object


def fits(value: Any, shape: Any) -> bool:
    """Whether plain data has the given shape."""
    if isinstance(shape, type):
        return isinstance(value, shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(one, shape[0]) for one in value)
    if not isinstance(shape, dict):
        return bool(shape(value))
    if not isinstance(value, dict):
        return False
    if ... in shape:
        return all(fits(one, shape[...]) for one in value.values())
    for key, own in shape.items():
        name = key.removesuffix("?")
        if name in value:
            if not fits(value[name], own):
                return False
        elif name == key:
            return False
    return True


def number(value: Any) -> bool:
    return isinstance(value, (int, float)) and -1e300 < value < 1e300  # False for NaN too


def whole(value: Any) -> bool:
    return isinstance(value, int) and abs(value) < 2**63


def maybe(shape: Any) -> Any:
    """A value of this shape, or null."""
    return lambda value: value is None or fits(value, shape)


def one_of(*known: str) -> Any:
    return lambda value: isinstance(value, str) and value in known


def matching(pattern: re.Pattern[str]) -> Any:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


MODES, SPLITS = get_args(Mode), get_args(Split)
SIZE = lambda value: isinstance(value, list) and len(value) == 2 and all(map(whole, value))  # noqa: E731
ROW = {
    "id": matching(ID),
    "file": matching(IMAGE),
    "original?": maybe(matching(IMAGE)),
    **dict.fromkeys(("prompt", "concept", "source"), str),
    "split": one_of(*SPLITS),
    "seed": whole,
    "caption?": maybe(str),
    "guidance_scale?": maybe(number),
    "size?": maybe(SIZE),
}
VERDICT = {
    "id": str,
    "label": str,
    "value": maybe(number),
    "detail": {
        **dict.fromkeys(("score?", "detected?", "whole?", "anchor?", "moved?"), maybe(number)),
        "boxes?": maybe({...: whole}),
    },
}


def estimate(**more: Any) -> Any:
    """An estimate with its interval. `low` and `high` are both given or both null."""
    numbers = dict.fromkeys(("value", "low", "high"), maybe(number))
    shape = {**numbers, "n": whole, "unscored": whole, **more}
    return lambda value: fits(value, shape) and (value["low"] is None) == (value["high"] is None)


ESTIMATE = estimate()
MAIN = {...: estimate(scored=maybe(number), mode=str)}
BOXES = {"boxes": whole, "images": whole}
SEEN = {"split": one_of(*SPLITS), "prompt": str, **{f"{mode}?": maybe(number) for mode in MODES}}
NUMBERS = {
    "main": MAIN,
    **{f"{mode}?": {...: ESTIMATE} for mode in MODES},
    "concepts?": lambda blocks: fits(blocks, {...: {"acc_e": dict}}) and fits(blocks, {...: MAIN}) and _alike(blocks),
    "counts?": {...: {"classes": {...: BOXES}, "apart": {...: BOXES}, "total": BOXES, "n": whole}},
    "by_prompt?": [SEEN],
}
PROTOCOL = {
    "task?": str,
    "concepts?": [{"target": str, "anchor": str}],
    "judge": {"judge": str},
    "sampler?": {"scheduler": str, "steps": whole, "guidance_scale": number},
    "backbone?": dict,
}
ATTACK_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
SHARE = {**dict.fromkeys(("value", "low", "high"), maybe(number)), "n": whole}
CURVE = [lambda point: fits(point, [number]) and len(point) == 2]
SPENT = {"passes": number, "text_passes?": number, "seconds": number}
ATTACK = {  # an attack's numbers: attacks/<name>.json, and metrics.json under attacks.<name>
    **dict.fromkeys(("asr", "pre_asr", "original"), SHARE),
    "prompts": whole,
    "steps": maybe({"median": number, "mean": number}),
    "curve": CURVE,
    "returned?": {"curve": CURVE, "half": maybe(number)},
    "cost": {**SPENT, "draws": whole, "once": SPENT},
    "interval": dict,
    "protocol": {"attack": dict, "mode": one_of(*MODES)},
}
ATTACKED = {  # a line of attacks/<name>.jsonl
    "id": matching(ID),
    "of": str,
    "key": str,
    **dict.fromkeys(("prompt", "concept"), str),
    "seed": whole,
    **dict.fromkeys(("plain", "original", "shown"), bool),
    "step": maybe(whole),
    **dict.fromkeys(("text", "said", "label"), maybe(str)),
    "image": maybe(matching(re.compile(rf"{paths.ATTACKS}/[\w.-]{{1,64}}/found/[^/\\\0]{{1,250}}", re.ASCII))),
    "file": maybe(matching(re.compile(rf"{paths.ATTACKS}/[\w.-]{{1,64}}/[^/\\\0]{{1,250}}", re.ASCII))),
    "value": maybe(number),
    "draws": whole,
    **SPENT,
    "drawn": [lambda one: isinstance(one, list) and len(one) == 2 and whole(one[0]) and isinstance(one[1], bool)],
    "info": dict,
}
METRICS = {
    **NUMBERS,
    "headline": {...: one_of(*MODES)},
    "h_o_terms": [str],
    "original": maybe(NUMBERS),
    "judges?": {...: {**NUMBERS, "original?": maybe(NUMBERS), "protocol?": dict}},
    "sets?": {...: lambda numbers: fits(numbers, {"protocol?": dict}) and _all_numbers(numbers)},
    "attacks?": {...: ATTACK},
    "protocol": PROTOCOL,
}
JUDGED = {  # verdicts/<judge>.json of a judge of single images
    **{key: METRICS[key] for key in (*NUMBERS, "headline", "h_o_terms", "original", "protocol")},
    "of_images?": str,
    "of_verdicts?": {...: str},
}
COMPARED = {  # the same for a judge of sets of images
    "set": {...: maybe(number)},
    "protocol": dict,
    "of_images?": str,
}
CELL = {
    **dict.fromkeys(("folder?", "reason?", "system?", "launch?"), maybe(str)),
    "state?": str,
    "overrides?": [str],
    "seconds?": number,
}
PEAK = maybe({...: maybe(number)})
COSTS = {
    **{name: {...: number} for name in ("stages?", "passes?", "originals?")},
    "shared?": {...: {"seconds": number, "passes": number}},
    **{f"{name}?": number for name in ("trained_parameters", "edited_parameters", "passes_per_image", "starts")},
    "peak_memory_mb?": PEAK,
    "peak_memory_erasing_mb?": PEAK,
    "device?": str,
}
CHANGE = {
    "info?": {...: number},
    "layers?": {...: maybe(number)},
    "spectrum?": [maybe(number)],
    "probes?": [{"text": str, "split?": str}],
}
MINED = [{"text": str, "value": number, "noise_distance": number}]
EDIT = {**CHANGE, "finish?": maybe(CHANGE), "found_texts?": [{"concept": str, "erased": MINED, "kept": MINED}]}
ALIGN = maybe({"steps?": maybe(number), "lora?": maybe(dict)})


def _alike(blocks: Mapping[str, Any]) -> bool:
    """Whether all concepts have the same metrics, which are the columns of a table."""
    return len({frozenset(block) for block in blocks.values()}) <= 1


def _all_numbers(numbers: Mapping[str, Any]) -> bool:
    return all(value is None or number(value) for name, value in numbers.items() if name != "protocol")


def config_fault(config: Any, used: bool = False) -> str | None:
    """The fault of a config.yaml's content, as in "holds no settings"; None if it is the config of a run.

    Settings of the wrong type are a fault. Missing settings are a fault only with used=True, for a run whose weights
    are loaded: the pages also show runs of earlier versions and runs that have just started.
    """
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        return "holds no settings"
    for group in GROUPS:
        if not isinstance(config.get(group), (dict, type(None))):
            return f"is no run's ({group} is a group of settings, not {config[group]!r:.60})"
    for group in ("method", "backbone"):
        if not isinstance((config.get(group) or {}).get("name", ""), str):
            return f"is no run's ({group}.name is a text)"
    for name in ("seed", "images_at_once"):
        if not whole(config.get(name, 0)) or isinstance(config.get(name), bool):
            return f"is no run's ({name} is a whole number)"
    for name in ("concept", "anchor"):
        given = config.get(name)
        if not fits(given if isinstance(given, list) else [given], [maybe(str)]):
            return f"is no run's ({name} is a name or a list of names)"
    method = config.get("method") or {}
    for part in PARTS:
        if not isinstance(method.get(part), (dict, type(None))):
            return f"is no run's (method.{part} is a group of settings or null, not {method[part]!r:.60})"
    if not fits(method.get("align"), ALIGN):
        return "is no run's (method.align.steps is a number, and method.align.lora a group of settings)"
    return _lack(config) if used else None


def _lack(config: Mapping[str, Any]) -> str | None:
    """The first required setting that is missing, as in "is no run's (it has no seed)"; None if all are there."""
    method, judge = config.get("method") or {}, config.get("judge")
    made = [("task", config.get("task") or {}), ("backbone", config.get("backbone") or {})]
    made += [(f"method.{part}", method[part]) for part in PARTS if method.get(part)]
    made += [("judge", judge)] if judge else []
    needed = [(name, config.get(name)) for name in ("concept", "seed", "images_at_once")]
    needed += [(f"{group}.name", (config.get(group) or {}).get("name")) for group in ("method", "backbone")]
    needed += [(f"{at}._target_", node.get("_target_")) for at, node in made]
    lacking = next((name for name, value in needed if value is None), None)
    return None if lacking is None else f"is no run's (it has no {lacking})"
