"""Reads captions from a user's files as a stream. Only a .json file is read into memory as a whole."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from realera.contracts import UserError
from realera.tasks.files import COLUMN_NAMES

COLUMNS = COLUMN_NAMES["prompt"]  # names of a column of captions


def captions_in(files: Iterable[Path], column: str | None = None) -> Iterator[str]:
    """Every caption of the files, in order, without blank ones.

    .csv, .tsv: the column `column` (None: caption, prompt or text). .jsonl: a text or an object on each line. .json: a
    list of texts or objects, or COCO's {"annotations": [...]}. Any other file: one caption on each line.

    Raises UserError if a file cannot be read, or has no such column.
    """
    for file in files:
        try:
            if file.exists() and not file.is_file():  # reading a pipe would block, and a device never ends
                raise ValueError("it is a folder, a pipe or a device")
            with file.open(encoding="utf-8-sig", newline="") as stream:
                for number, record in enumerate(_records(file, stream), 1):
                    text = record if isinstance(record, str) else _cell(file, number, record, column)
                    if "\0" in text:
                        raise ValueError(f"record {number} contains a NUL byte")
                    if text.strip():
                        yield " ".join(text.split())
        except (OSError, UnicodeDecodeError, csv.Error, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"captions={file} cannot be read ({reason}): give a UTF-8 file with one caption on each line, or "
                "a CSV or JSON file."
            ) from error


def _records(file: Path, stream: Any) -> Iterator[Any]:
    kind = file.suffix.lower()
    if kind in (".csv", ".tsv"):
        yield from csv.DictReader(stream, delimiter="\t" if kind == ".tsv" else ",")
    elif kind == ".jsonl":
        yield from (json.loads(line) for line in stream if line.strip())
    elif kind == ".json":
        found = json.load(stream)
        listed = found["annotations"] if isinstance(found, dict) and "annotations" in found else found
        if not isinstance(listed, list):
            raise ValueError("it contains no list of captions")
        yield from listed
    else:
        yield from stream


def _cell(file: Path, number: int, record: Any, column: str | None) -> str:
    if isinstance(record, Mapping):
        names = [column] if column is not None else COLUMNS
        for name in names:
            if isinstance(record.get(name), str):
                return str(record[name])
        raise UserError(
            f"captions={file}: record {number} has no {' or '.join(names)} (it has "
            f"{', '.join(map(str, list(record)[:8]))}): give the column of the captions with column=NAME."
        )
    raise UserError(f"captions={file}: record {number} is neither a text nor an object: give a list of captions.")
