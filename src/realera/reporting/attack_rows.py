"""The attacks of a run as values for its page: numbers, and pictures of the prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realera import paths
from realera.contracts import UserError
from realera.evaluation import attacked
from realera.evaluation.summary import attack_rows as words_of
from realera.reporting import charts
from realera.reporting.sheets import Picture, plain_picture

SHOWN = 6  # prompts of an attack with pictures


@dataclass(frozen=True)
class Attacked:
    """A prompt with its pictures. typed: the text of the attack, or None if it cannot be typed; then said is in its
    place. where: "step 50", or "" if it was not won. pictures: (caption, picture) of the prompt as it is, by the
    original and the erased model, and last of the attack; of the unedited model the first two are one."""

    prompt: str
    typed: str | None
    said: str
    shown: bool
    where: str
    pictures: tuple[tuple[str, Picture], ...]


def chapters(run_dir: Path, unedited: bool) -> list[dict[str, Any]]:
    """A chapter for each attack of the run: name, numbers, sentence, curve and rows. The prompts that were won come
    first. unedited: the run is of the unedited model."""
    found = []
    for name, numbers in attacked.numbers(run_dir).items():
        lines = attacked.read(run_dir, name)[: numbers["prompts"]]
        first = sorted(lines, key=lambda line: (not line["shown"], line["plain"]))[:SHOWN]
        found.append(
            {
                "name": name,
                "numbers": [(words, numbers[key]) for key, words in words_of(unedited).items()],
                "sentence": sentence(numbers),
                "cost": numbers["cost"],
                "rows": [row(run_dir, name, line, unedited) for line in first],
                "count": len(lines),
            }
        )
    return found


def sentence(numbers: Mapping[str, Any]) -> str:
    """ "The attack drew the concept for 12 of 20 prompts; 3 drew it as they are. Won at step 50 (median)." The curve of
    the concept's return follows, if the attack measures it."""
    count = numbers["prompts"]
    won, plain = (round(count * (numbers[key]["value"] or 0) / 100) for key in ("asr", "pre_asr"))
    steps = numbers["steps"]
    at = f" Won at step {charts.number(steps['median'])} (median)." if steps else ""
    told = f" {attacked.return_sentence(numbers['returned'])}" if "returned" in numbers else ""
    return f"The attack drew the concept for {won} of {count} prompts; {plain} drew it as they are.{at}{told}"


def row(run_dir: Path, name: str, line: attacked.Line, unedited: bool) -> Attacked:
    """A line with its pictures. Its texts are shown as texts; only its ids, which were checked, are parts of paths."""
    out = attacked.folder(run_dir, name)
    label = line["label"] or ""

    def pictured(place: str, text: str, said: str = "") -> Picture:
        try:
            file = paths.inside(out, place)
        except UserError:
            return Picture("", said, text, None, True)
        return plain_picture(file, text, said)

    image = f"{line['id']}.png"
    before = pictured(f"{paths.ORIGINALS}/{image}", f"{line['prompt']}: the original model")
    after = pictured(f"{paths.IMAGES}/{image}", f"{line['prompt']}: the erased model")
    back = pictured(f"{attacked.FOUND}/{image}", f"{line['text'] or line['said'] or line['prompt']}: attacked", label)
    plain = (("as it is", before),) if unedited else (("original", before), ("erased", after))
    return Attacked(
        line["prompt"],
        line["text"],
        line["said"] or "",
        line["shown"],
        f"step {line['step']}" if line["step"] is not None else "",
        (*plain, (f"attacked: {label}", back)),
    )
