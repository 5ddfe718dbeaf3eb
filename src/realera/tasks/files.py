"""Reads a user's files: tables of prompts (I2P, COCO-30K, MACE's, or others) and lists of concepts."""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from realera.contracts import UserError
from realera.setting_types import MOST_GUIDANCE, MOST_PIXELS
from realera.tasks.prompts import slug

COLUMN_NAMES: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "text", "caption"),
    "id": ("case_number", "case", "id", "coco_id", "image_id"),
    "seed": ("evaluation_seed", "sd_seed", "seed"),
    "guidance": ("evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance"),
    "width": ("sd_image_width", "image_width", "width"),
    "height": ("sd_image_height", "image_height", "height"),
    "nudity": ("nudity_percentage", "nudity"),
    "concept": ("concept",),
}
"""{meaning of a column: its possible names, in order of preference}. Names are compared without regard to capitals, and
blanks and hyphens count as underscores."""
_DELIMITERS = (",", ";", "\t")
_LARGEST = 256 << 20  # bytes of a file; COCO's 600,000 captions have a tenth of that
_MULTIPLE = 8  # pixels; the autoencoder's latents are smaller by this factor


@dataclass(frozen=True)
class CsvPrompt:
    """One prompt of a table. id: unique within the file, and a plain file name. size: (height, width). plain: the
    prompt that an adversarial one stands for. None: not in the file."""

    id: str
    prompt: str
    seed: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    concept: str | None = None
    plain: str | None = None


def read_prompts(
    file: str | Path,
    key: str,
    min_nudity: float | None = None,
    names: Mapping[str, tuple[str, ...]] = COLUMN_NAMES,
    group: str = "task",
) -> list[CsvPrompt]:
    """The rows of a CSV (comma, semicolon or tab; UTF-8, with or without a BOM; texts with line breaks in quotes).

    Columns are found by `SPELLINGS`; others are ignored. The id of a row without one is its position. Repeated ids get
    "-2", "-3", ... min_nudity: only rows with a higher nudity percentage. key, group: the setting that errors
    name. names: of the columns.

    Raises:
        UserError: the file cannot be read, lacks a column, or has a malformed row.
    """
    path, text = _read(file, f"{group}.{key}")
    lines = text.splitlines()
    header_line = next(number for number, line in enumerate(lines) if line.strip())
    delimiter = _delimiter(lines[header_line], names["prompt"])
    records = _records(path, text, delimiter)
    header = [re.sub(r"[\s-]+", "_", name.strip().casefold()) for name in next(records)[1]]
    columns = {
        meaning: next((header.index(name) for name in known if name in header), None)
        for meaning, known in names.items()
    }
    for meaning in ("prompt", *(["nudity"] if min_nudity is not None else [])):
        if columns[meaning] is None:
            raise UserError(
                f"{path} has no column for the {meaning} ({' or '.join(names[meaning])}): "
                f"line {header_line + 1} must be the header, and it has {', '.join(header)[:120]}"
            )
    rows: list[CsvPrompt] = []
    used: Counter[str] = Counter()
    for place, (line, fields) in enumerate(records, 1):
        if len(fields) != len(header):
            raise UserError(
                f"{path} line {line} has {len(fields)} columns, but the header has {len(header)}: put quotes around a "
                "text that contains the delimiter or a line break"
            )
        cell = _CsvRecord(path, line, header, fields, columns)
        if min_nudity is not None and not (cell.number("nudity") or 0) > min_nudity:
            continue
        rows.append(cell.row(_unique_id(cell.text("id") or str(place), used)))
    if not rows:
        raise UserError(f"{path} has no prompts{'' if min_nudity is None else f' above min_nudity={min_nudity}'}")
    return rows


def read_concepts(file: str | Path) -> list[tuple[str, str | None]]:
    """(name, anchor or None) for every line "name" or "name,anchor". Names with commas are in double quotes; lines that
    start with # are comments. A first line "name", "concept" or "artist" is a header. Raises UserError for a file or
    line that cannot be read.
    """
    path, text = _read(file, "concepts_file")
    found: list[tuple[str, str | None]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            fields = [field.strip() for field in next(csv.reader([line], skipinitialspace=True, strict=True))]
        except csv.Error as error:
            raise UserError(f"{path} line {number} cannot be read ({error}): write name or name,anchor") from error
        if (
            len(fields) > 2
            or not fields[0]
            or "${" in line
            or any(not letter.isprintable() for letter in "".join(fields))
        ):
            raise UserError(
                f"{path} line {number} ({line.strip()[:60]!r}) is not a concept: write name or name,anchor, and put "
                "double quotes around a name that contains a comma"
            )
        if not found and [field.casefold() for field in fields] in _HEADERS:
            continue
        found.append((fields[0], fields[1] if len(fields) == 2 and fields[1] else None))
    if not found:
        raise UserError(f"concepts_file={path} has no concepts: write one name on each line")
    return found


_HEADERS = [[name, *more] for name in ("name", "concept", "artist") for more in ([], ["anchor"])]


@dataclass(frozen=True)
class _CsvRecord:
    """One record of a table, read by the columns' meaning. Errors name the file, line and column."""

    path: Path
    line: int
    header: list[str]
    fields: list[str]
    columns: Mapping[str, int | None]

    def row(self, name: str) -> CsvPrompt:
        prompt = self.text("prompt")
        if not prompt:
            raise self.fault("prompt", "is empty")
        height, width = self.pixels("height"), self.pixels("width")
        if (height is None) != (width is None):
            raise self.fault("height" if height is None else "width", "is empty, but the other side is not")
        size = (height, width) if height is not None and width is not None else None
        guidance = self.number("guidance", most=MOST_GUIDANCE)
        concept, plain = self.text("concept") or None, self.text("plain") or None
        return CsvPrompt(name, prompt, self.whole("seed"), guidance, size, concept, plain)

    def text(self, meaning: str) -> str:
        at = self.columns.get(meaning)
        return "" if at is None else self.fields[at].strip()

    def number(self, meaning: str, most: float = math.inf) -> float | None:
        """A number from 0 to `most`; None if the cell is empty."""
        if not (text := self.text(meaning)):
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < 0:
            raise self.fault(meaning, f"contains {text[:40]!r}, which is not a number of 0 or more")
        if value > most:
            raise self.fault(meaning, f"contains {text[:40]!r}, which is not a number from 0 to {most:g}")
        return value

    def whole(self, meaning: str) -> int | None:
        """A whole number from 0 to 2^63 - 1, which may be written 12.0; None if the cell is empty."""
        if not (text := self.text(meaning)):
            return None
        if not (found := re.fullmatch(r"\+?(\d{1,19})(?:\.0*)?", text, re.ASCII)) or int(found[1]) >= 2**63:
            raise self.fault(meaning, f"contains {text[:40]!r}, which is not a whole number from 0 to 2^63 - 1")
        return int(found[1])

    def pixels(self, meaning: str) -> int | None:
        value = self.whole(meaning)
        if value is not None and (value % _MULTIPLE or not value):
            raise self.fault(meaning, f"contains {value}: width and height must be multiples of {_MULTIPLE} pixels")
        if value is not None and value > MOST_PIXELS:
            raise self.fault(meaning, f"contains {value}: width and height must be at most {MOST_PIXELS} pixels")
        return value

    def fault(self, meaning: str, what: str) -> UserError:
        at = self.columns.get(meaning)
        column = COLUMN_NAMES[meaning][0] if at is None else self.header[at]
        return UserError(f"{self.path} line {self.line}: column {column} {what}")


def _read(file: str | Path, key: str) -> tuple[Path, str]:
    """The path and content of a text file. Raises UserError if it cannot be read or is blank."""
    path = Path(str(file)).expanduser()
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block, and a device never ends
            raise UserError(f"{key}={path} cannot be read (it is a folder, a pipe or a device): give a file")
        if path.stat().st_size > _LARGEST:
            raise UserError(f"{key}={path} is larger than {_LARGEST >> 20} MB: give a file of prompts or names")
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{key}={path} cannot be read ({reason}): give a file") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{key}={path} is not UTF-8 text (line {line}): save it as UTF-8") from error
    if not text.strip():
        raise UserError(f"{key}={path} is empty: give another file")
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(f"{key}={path} contains a NUL byte (line {line}), so it is not a text file: save it as UTF-8")
    return path, text


def _delimiter(header: str, known: Collection[str]) -> str:
    """The delimiter with which the header has a prompt column, one of `known`; of several, the one that gives the most
    columns."""

    def found(delimiter: str) -> tuple[bool, int]:
        names = [re.sub(r"[\s-]+", "_", name.strip().strip('"').casefold()) for name in header.split(delimiter)]
        return any(name in known for name in names), len(names)

    return max(_DELIMITERS, key=found)


def _records(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(first line of the record, its cells) for every record that is not blank, the header first."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        begun = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{path} line {begun} is malformed ({error}): quote a text that has quotes, and double these quotes"
            ) from error
        if any(field.strip() for field in fields):
            yield begun, fields


def _unique_id(given: str, used: Counter[str]) -> str:
    """A plain file name for `given`; name-2, name-3, ... if it is in `used`. Adds the result to `used`."""
    name = unique = given.zfill(5) if re.fullmatch(r"[0-9]+", given) else slug(given)
    while used[unique]:
        used[name] += 1
        unique = f"{name}-{used[name]}"
    used[unique] += 1
    return unique
