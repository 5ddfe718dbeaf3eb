"""The files of attacks in a run folder, and their numbers.

attacks/<name>.jsonl has a line for each prompt (`Line`), attacks/<name>.json the numbers with a checksum, and
attacks/<name>/ the images: originals/ (the unedited model's), images/ (the erased model's, of the prompts as they are),
found/ (those of the attack), with a manifest and verdicts as in a run folder, and <id>.safetensors for inputs that
cannot be typed. metrics.json has the numbers of all attacks under `attacks`.

Every line has the digest of the protocol that made it. Lines of another protocol are left out and made again.
"""

from __future__ import annotations

import itertools
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from realera import paths
from realera.contracts import Mode, Prompt, UserError
from realera.evaluation.records import read_lines
from realera.files import checksums, json_shapes, plain_data
from realera.system import disk

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
FOUND = "found"  # folder of the attack's images, in attacks/<name>/
Line = dict[str, Any]
"""A prompt's line: see `json_shapes.ATTACKED`."""


def lines_file(run_dir: Path, name: str) -> Path:
    return paths.inside(run_dir, f"{paths.ATTACKS}/{name}.jsonl")


def numbers_file(run_dir: Path, name: str) -> Path:
    return paths.inside(run_dir, f"{paths.ATTACKS}/{name}.json")


def folder(run_dir: Path, name: str) -> Path:
    return paths.inside(run_dir, f"{paths.ATTACKS}/{name}")


def names(run_dir: Path) -> list[str]:
    """The attacks of a run with numbers, in alphabetical order."""
    found = sorted(file.name.removesuffix(".json") for file in (run_dir / paths.ATTACKS).glob("?*.json"))
    return [name for name in found if json_shapes.ATTACK_NAME.fullmatch(name) and numbers_file(run_dir, name).is_file()]


def key_of(prompt: Prompt) -> str:
    """Identifies the prompt with everything that its image depends on."""
    content = [prompt.id, prompt.text, prompt.concept, prompt.seed, prompt.caption, prompt.guidance_scale, prompt.size]
    return checksums.digest_of(plain_data.json_text(content).encode())[:16]


def read(run_dir: Path, name: str) -> list[Line]:
    """All valid lines of an attack, of any protocol; [] without a file. A torn line is left out."""
    file = lines_file(run_dir, name)
    return [line for line in read_lines(file) if json_shapes.fits(line, json_shapes.ATTACKED)]


def kept(run_dir: Path, name: str, of: str) -> dict[str, Line]:
    """{key of the prompt: its line} of the lines that need not be made again: those of the protocol `of` whose files
    are whole. The others are removed from the file."""
    lines = read(run_dir, name)
    found = {line["key"]: line for line in lines if line["of"] == of and _is_whole(run_dir, line)}
    if lines and (other := sum(line["of"] != of for line in lines)):
        log.info("%d prompts were attacked with other settings by %s: attacked again", other, name)
    file = lines_file(run_dir, name)
    if file.is_file():
        write(run_dir, name, list(found.values()))
    return found


def _is_whole(run_dir: Path, line: Line) -> bool:
    image, found = line["image"], line["file"]
    try:
        if image is not None and not checksums.image_is_whole(paths.inside(run_dir, image)):
            return False
        if found is not None:
            checksums.verify(paths.inside(run_dir, found))
    except UserError:
        return False
    return True


def write(run_dir: Path, name: str, lines: Sequence[Line]) -> None:
    """Writes all lines."""
    text = "".join(_text(line) for line in lines)
    disk.write_text(lines_file(run_dir, name), text)


def append(run_dir: Path, name: str, line: Line) -> None:
    disk.append(lines_file(run_dir, name), _text(line))


def _text(line: Line) -> str:
    return plain_data.json_text(line, ensure_ascii=False) + "\n"


# --- numbers ---------------------------------------------------------------------------------------------------------


def summarise(
    prompts: Sequence[Prompt],
    lines: Sequence[Line],
    searches: Sequence[Mapping[str, float]],
    mode: Mode,
    draws_all: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """The block of metrics.json without its protocol, from the line of each prompt.

    asr: percent of the prompts for which the attack's image shows the concept; pre_asr: the same for the erased model's
    images of the prompts as they are; original: for the unedited model's. Each has a bootstrap interval over prompts.
    steps: median and mean of the step at which the prompts were won that do not draw the concept as they are. curve:
    [step, percent won until then]. cost: of the attack alone, inputs from the cache at their original cost; once: the
    part that was searched for a concept. text_passes: texts that went through the text encoder; lines of earlier
    versions do not have them.
    draws_all: every prompt was drawn at every step (`attack_contract.MeasuresReturn`). The block then has `returned`:
    see `returned`.
    """
    from realera.evaluation.bootstrap import Resamples, described, image_key
    from realera.evaluation.metrics import Images, sample

    resamples = Resamples(seed)
    keys = [image_key(prompt) for prompt in prompts]

    def share(shown: Sequence[bool]) -> dict[str, Any]:
        found = sample([Images(keys, [100.0 * one for one in shown])], resamples, mode).estimate()
        numbers = {"value": found.value, "low": found.low, "high": found.high}
        return {**{key: None if math.isnan(n) else n for key, n in numbers.items()}, "n": found.n}

    won = [line["step"] for line in lines if line["shown"] and not line["plain"]]
    steps = sorted({step for line in lines for step, _ in line["drawn"]})
    texts_once = sum(int(one.get("text_passes", 0)) for one in searches)
    first = [line["step"] if line["shown"] else math.inf for line in lines]
    return {
        "asr": share([line["shown"] for line in lines]),
        "pre_asr": share([line["plain"] for line in lines]),
        "original": share([line["original"] for line in lines]),
        "prompts": len(lines),
        "steps": {"median": statistics.median(won), "mean": statistics.mean(won)} if won else None,
        "curve": [[step, 100 * sum(one <= step for one in first) / len(first)] for step in steps],
        "cost": {
            "passes": round(sum(line["passes"] for line in lines) + sum(one["passes"] for one in searches)),
            "text_passes": round(sum(line.get("text_passes", 0) for line in lines)) + texts_once,
            "seconds": round(sum(line["seconds"] for line in lines) + sum(one["seconds"] for one in searches), 3),
            "draws": sum(line["draws"] for line in lines),
            "once": {
                "passes": sum(int(one["passes"]) for one in searches),
                "text_passes": texts_once,
                "seconds": round(sum(one["seconds"] for one in searches), 3),
            },
        },
        **({"returned": returned(lines)} if draws_all else {}),
        "interval": described("prompts", resamples),
    }


def returned(lines: Sequence[Line]) -> dict[str, Any]:
    """How the concept comes back, from lines that were drawn at the same steps.

    curve: [step, percent of the prompts whose image of this step shows the concept], step 0 without the attack. half:
    the first step at which the percentage is half of the original model's, on straight lines between the steps; None if
    it is never reached, or if the original model does not draw the concept.
    """
    shown: dict[int, list[bool]] = {0: [line["plain"] for line in lines]}
    for line in lines:
        for step, found in line["drawn"]:
            shown.setdefault(step, []).append(found)
    curve = [[step, 100 * sum(found) / len(found)] for step, found in sorted(shown.items())]
    goal = 50 * sum(line["original"] for line in lines) / len(lines)
    half = float(curve[0][0]) if curve[0][1] >= goal else None
    for (before, low), (after, high) in itertools.pairwise(curve):
        if half is None and high >= goal:
            half = before + (after - before) * (goal - low) / (high - low)
    return {"curve": curve, "half": half if goal > 0 else None}


def return_sentence(returned: Mapping[str, Any]) -> str:
    """ "The concept's return: 0% at step 0, 25% at step 10, 100% at step 50; half is back at step 23." """
    curve = ", ".join(f"{value:.0f}% at step {step:g}" for step, value in returned["curve"])
    half = "half is not back" if returned["half"] is None else f"half is back at step {returned['half']:.0f}"
    return f"The concept's return: {curve}; {half}."


def scalars(attacks: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of attacks, for a logger: <name>/asr, asr_low, asr_high, the same for pre_asr and original,
    steps_median and steps_mean, half (of `returned`), and the cost: passes, text_passes, seconds. attacks: {name:
    numbers}. Numbers that were not measured are left out."""
    found: dict[str, float | None] = {}
    for name, numbers in attacks.items():
        for key in ("asr", "pre_asr", "original"):
            ends = (("", "value"), ("_low", "low"), ("_high", "high"))
            found |= {f"{name}/{key}{end}": numbers[key][which] for end, which in ends}
        found |= {f"{name}/steps_{key}": value for key, value in (numbers["steps"] or {}).items()}
        found[f"{name}/half"] = numbers.get("returned", {}).get("half")
        found |= {f"{name}/{key}": numbers["cost"].get(key) for key in ("passes", "text_passes", "seconds")}
    return {name: float(value) for name, value in found.items() if value is not None}


def curves(attacks: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """The numbers of attacks over their steps, for a logger: <name>/won (percent won until then) for attacks with
    several steps, and <name>/returned (see `returned`)."""
    found = {}
    for name, numbers in attacks.items():
        if len(numbers["curve"]) > 1:
            found[f"{name}/won"] = numbers["curve"]
        if "returned" in numbers:
            found[f"{name}/returned"] = numbers["returned"]["curve"]
    return {name: [(int(step), float(value)) for step, value in curve] for name, curve in found.items()}


def write_numbers(run_dir: Path, name: str, numbers: Mapping[str, Any]) -> None:
    """Writes attacks/<name>.json, with a checksum."""
    content = {"format_version": FORMAT_VERSION, **numbers}
    text = plain_data.json_text({**content, checksums.KEY: _checksum(content)}, indent=1, ensure_ascii=False)
    disk.write_text(numbers_file(run_dir, name), text + "\n")


def numbers(run_dir: Path) -> dict[str, Any]:
    """{name: the numbers of an attack}; torn and foreign files are left out."""
    found = {name: _read(numbers_file(run_dir, name)) for name in names(run_dir)}
    return {name: content for name, content in found.items() if content}


def _read(file: Path) -> dict[str, Any]:
    try:
        content = plain_data.read_json(file)
        whole = isinstance(content, dict) and content.pop(checksums.KEY, None) == _checksum(content)
    except (OSError, ValueError):
        return {}
    if (
        not whole
        or content.pop("format_version", None) != FORMAT_VERSION
        or not json_shapes.fits(content, json_shapes.ATTACK)
    ):
        return {}
    return dict(content)


def _checksum(content: Mapping[str, Any]) -> str:
    return checksums.digest_of(plain_data.json_text(content, indent=1, ensure_ascii=False).encode())
