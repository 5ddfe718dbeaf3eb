"""Prompts to try on a run: those of its task, and the texts that its residue searches found. No torch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from realera import paths
from realera.contracts import Split, UserError
from realera.files import plain_data
from realera.files.json_shapes import fits
from realera.runs import trust
from realera.runs.folders import Run
from realera.settings import composition

log = logging.getLogger("realera")
MOST = 60  # texts under one heading
LONGEST = 300  # characters of a text: longer ones are left out
HEADINGS: Mapping[Split, str] = {
    "erase": "Its name",
    "near": "Other names",
    "associated": "Without a name",
    "unseen": "Unseen words",
    "keep": "To be kept",
}
LEFT, GONE = "Residue that is left", "Residue that is gone"
SHAPE = "a JSON object of headings, each with a list of texts"
Presets = dict[str, list[str]]
"""{heading: texts}"""


def presets_of(runs: Sequence[Run]) -> Presets:
    """The evaluation prompts of the runs' tasks by split, and the texts of their residue searches: those that still
    draw the concept, if only in some pictures, after at least one of the runs, and those that no longer do. A text
    stands under one heading only.

    Raises:
        UserError: a text file that a run's settings name has changed.
    """
    found: dict[str, dict[str, None]] = {}
    seen: set[str] = set()

    def add(heading: str, texts: Iterator[str]) -> None:
        for text in texts:
            if text not in seen and text.strip() and len(text) <= LONGEST:
                seen.add(text)
                found.setdefault(heading, {})[text] = None

    prompts = [prompt for run in runs for prompt in _prompts(run)]
    rows = [row for run in runs for row in _residue(run)]
    add(LEFT, (row["text"] for row in rows if row["state"] in ("left", "partly")))
    add(GONE, (row["text"] for row in rows if row["state"] == "gone"))
    for split, heading in HEADINGS.items():
        add(heading, (prompt.text for prompt in prompts if prompt.split == split))
    order = [*HEADINGS.values(), LEFT, GONE]
    return {heading: list(found[heading])[:MOST] for heading in order if heading in found}


def read(file: Path) -> Presets:
    """Raises UserError for a file that is not `SHAPE`."""
    try:
        found = plain_data.read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"presets={file} cannot be read ({error}): give {SHAPE}.") from error
    if not fits(found, {...: [str]}):
        raise UserError(f"presets={file} has another form: give {SHAPE}.")
    kept = {heading: [text for text in texts if text.strip()] for heading, texts in found.items() if heading.strip()}
    return {heading: texts[:MOST] for heading, texts in kept.items() if texts}


def text_of(presets: Presets) -> str:
    """The content of a file for `read`."""
    return plain_data.json_text(presets, indent=1, ensure_ascii=False) + "\n"


def _prompts(run: Run) -> Sequence[Any]:
    trust.check_tables(run.config, run.folder)
    try:
        return composition.build_task(run.config).eval_prompts()
    except UserError as error:  # a table of prompts that is not on this machine
        log.warning("%s: the prompts of its task are not shown, because %s", run.folder, error)
        return ()


def _residue(run: Run) -> Iterator[Mapping[str, Any]]:
    """The rows of all residue searches in a run's folder. Files that cannot be read are skipped with a warning."""
    for file in sorted(run.folder.glob(f"residue/*/{paths.RESIDUE}")):
        try:
            content = plain_data.read_json(paths.inside(run.folder, file.relative_to(run.folder)))
            rows = [row for concept in content["concepts"] for row in concept["texts"]]
            if not all(isinstance(row["text"], str) and isinstance(row["state"], str) for row in rows):
                raise ValueError("a row has no text")
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read (%s): its texts are not shown", file, error)
            continue
        yield from rows
