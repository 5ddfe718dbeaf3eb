"""Checks that files are still as they were written. A disk error, an interrupted copy or a power cut may tear a file. A
torn file is made again and never used.

A safetensors file has a SHA-256 of all its bytes in its metadata; a PNG image has a CRC-32 for each of its chunks.
Torch is imported only to read or write tensors, because the commands check files before they load torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from realera.contracts import UserError
from realera.files import headers, plain_data
from realera.files.plain_data import json_text
from realera.paths import FIT_FILES
from realera.system.disk import atomic

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

KEY = "checksum"  # in a safetensors file's metadata
BESIDE = "beside"  # also in the metadata: {name: digest} of the other files of the fit, in the same folder
BLANK = b"0" * 32  # placeholder while the checksum is computed: half of a SHA-256, in hex digits
_MARK = f'"{KEY}":"'.encode()  # cannot occur inside a metadata value, where quotes are escaped
_PNG = b"\x89PNG\r\n\x1a\n"


class Torn(UserError):
    """A file that is not as it was written, or not of the expected kind."""


def save(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, completely or not at all, with its checksum in the metadata."""
    from safetensors.torch import save_file

    with atomic(file) as beside:
        save_file(dict(tensors), beside, {**metadata, KEY: BLANK.decode()})
        _order(beside)
        place, _ = _seal(beside)
        assert place is not None
        checksum = _checksum(beside, place)
        with beside.open("r+b") as stream:
            stream.seek(place)
            stream.write(checksum)


def load(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the metadata of a safetensors file. Raises Torn."""
    verify(file)
    return content(file), metadata(file)


def content(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, without comparing the checksum (see `verify`). Raises Torn."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise Torn(f"{file} is torn or not a safetensors file") from error


def metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file, without comparing the checksum. Raises Torn."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise Torn(f"{file} is torn or not a safetensors file") from error


def verify(file: Path) -> None:
    """Raises Torn if a safetensors file does not match its checksum. Files of earlier versions have no checksum: only
    their size is compared with their header."""
    try:
        headers.refuse_torn(file)  # first, so that a file with a wrong size is not read
        place, checksum = _seal(file)
        if place is not None and _checksum(file, place) != checksum:
            raise ValueError("it has another checksum")
    except (OSError, ValueError, UserError):
        raise Torn(f"{file} is torn or not a safetensors file") from None


def fit_is_intact(erased: Path) -> bool:
    """Whether a fit's erased weights exist, and neither they nor the fit's other files are torn.

    If a file is torn, the log names it, and the erased weights are deleted, so that the whole fit is done again.
    """
    torn = _torn_of(erased) if erased.is_file() else None
    if torn is not None:
        log_torn(torn)
        erased.unlink(missing_ok=True)
    return erased.is_file()


def _torn_of(erased: Path) -> Path | None:
    """The first torn file of a fit, or None: the erased weights, or one of `paths.FIT_FILES`, whose digests are in the
    erased weights' metadata.

    A missing file is not torn: the user may have deleted it. Weights of earlier versions have no digests.
    """
    try:
        verify(erased)
        with plain_data.opened(erased) as stream:
            header = plain_data.json_of(stream.read(int.from_bytes(stream.read(8), "little")).decode())
        digests = plain_data.json_of(header.get("__metadata__", {}).get(BESIDE, "{}"))
        beside = {erased.parent / name: digests.get(name) for name in FIT_FILES}
    except (Torn, OSError, ValueError, AttributeError, TypeError):  # a header that `save` did not write
        return erased
    return next(
        (file for file, known in beside.items() if known is not None and digest(file) not in (known, None)), None
    )


def sha256_of(file: Path) -> str:
    """64 hex digits of a file's content, read block by block. Raises OSError if the file cannot be read."""
    sha = hashlib.sha256()
    with plain_data.opened(file) as stream:
        while block := stream.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def digest(file: Path) -> str | None:
    """32 hex digits of a file's content; None if it cannot be read."""
    try:
        return sha256_of(file)[:32]
    except OSError:
        return None


def digest_of(content: bytes) -> str:
    """32 hex digits, half of a SHA-256."""
    return hashlib.sha256(content).hexdigest()[:32]


def image_is_whole(file: Path) -> bool:
    """Whether a PNG image exists and is complete: every chunk has its CRC-32, and the last chunk is IEND."""
    try:
        data = memoryview(plain_data.content(file))
    except (OSError, ValueError):
        return False
    start = len(_PNG)
    if bytes(data[:start]) != _PNG:
        return False
    while start + 12 <= len(data):  # a chunk: length of the content, name, content, CRC-32 of name and content
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if end > len(data) or zlib.crc32(data[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return False
        if bytes(data[start + 4 : start + 8]) == b"IEND":
            return end == len(data)
        start = end
    return False


def sealed_page(html: str) -> str:
    """The page with its checksum in a last line."""
    return f"{html.rstrip()}\n<!-- {KEY} {digest_of(html.rstrip().encode())} -->\n"


def page_is_whole(file: Path) -> bool:
    """Whether a page matches its checksum. A page of an earlier version must have its first and last tag."""
    try:
        html, mark, checksum = plain_data.content(file).rstrip().rpartition(f"\n<!-- {KEY} ".encode())
    except (OSError, ValueError):
        return False
    if mark:
        return checksum == f"{digest_of(html)} -->".encode()
    return checksum.lstrip()[:15].lower() == b"<!doctype html>" and checksum.endswith(b"</html>")


def log_torn(*torn: Path) -> None:
    """Logs in one line that torn files are made again, with the name of the first."""
    if torn:
        more = f" and {len(torn) - 1} more are" if len(torn) > 1 else " is"
        log.warning("%s%s torn: made again", torn[0], more)


def _seal(file: Path) -> tuple[int | None, bytes]:
    """The position of the checksum in a safetensors file, and the checksum; None if the file has none."""
    with plain_data.opened(file) as stream:
        length, size = int.from_bytes(stream.read(8), "little"), os.fstat(stream.fileno()).st_size
        header = stream.read(length) if length <= min(size - 8, headers.LONGEST) else b""
    found = header.find(_MARK)
    if found < 0:
        return None, b""
    start = found + len(_MARK)
    return 8 + start, header[start : start + len(BLANK)]


def _order(file: Path) -> None:
    """Sorts the metadata, which safetensors writes in any order, so that equal content gives equal bytes."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json_text(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(ordered) <= length:
            stream.seek(8)
            stream.write(ordered.ljust(length))


def _checksum(file: Path, place: int) -> bytes:
    """The checksum of all bytes, with `BLANK` in the place of the checksum itself."""
    sha = hashlib.sha256()
    with plain_data.opened(file) as stream:
        sha.update(stream.read(place) + BLANK)
        stream.seek(place + len(BLANK))
        while block := stream.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()[: len(BLANK)].encode()
