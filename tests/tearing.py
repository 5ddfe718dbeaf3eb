"""Five ways in which a disk or a broken copy damages a file, and folders to try them in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path


def _zeroed(whole: bytes) -> bytes:
    start, block = len(whole) // 3, max(1, len(whole) // 8)
    return whole[:start] + bytes(block) + whole[start + block :]


def _flipped(whole: bytes) -> bytes:
    """One bit of one byte: a digit becomes another digit, and the file can still be read."""
    middle = len(whole) // 2
    at = next((i for i in range(middle, len(whole)) if whole[i : i + 1].isalnum()), middle)
    return whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]


TEARS: Mapping[str, Callable[[bytes], bytes]] = {
    "half": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "zeroed": _zeroed,
    "flipped": _flipped,
    "garbage": lambda whole: b"<html>504 Gateway Time-out \xff</html>\n" * 3,
}


def tear(file: Path, how: str) -> None:
    """In place, as a disk does: whoever else links to the file sees it too."""
    whole = file.read_bytes()
    torn = TEARS[how](whole)
    assert torn != whole
    with file.open("r+b") as stream:
        stream.write(torn)
        stream.truncate()


def copy(source: Path, target: Path) -> None:
    """A folder with the hard links within it, none of them to the outside."""
    linked: dict[int, Path] = {}
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        there = target / file.relative_to(source)
        there.parent.mkdir(parents=True, exist_ok=True)
        inode = file.stat().st_ino
        if inode in linked:
            os.link(linked[inode], there)
        else:
            linked[inode] = there
            shutil.copy2(file, there)


def leftovers(*folders: Path) -> list[Path]:
    """Files that were begun and are nobody's: temporary ones, and a loop's checkpoints."""
    found = [file.relative_to(folder) for folder in folders for file in folder.rglob("*") if file.is_file()]
    ends = (".ckpt", ".part", ".tmp")
    return [file for file in found if file.suffix in ends or any(part.startswith(".") for part in file.parts)]
