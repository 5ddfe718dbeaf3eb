"""Whether a file is still as it was written. A disk, a copy that was broken off or a power cut may tear it, and a torn
file is made again rather than believed.

A safetensors file carries a SHA-256 of all its bytes in its metadata, a PNG image a CRC-32 of each of its parts. Torch
comes only where tensors are read or written: the commands check files before it is loaded.
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
from realera.paths import OF_THE_FIT
from realera.system.disk import whole

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

KEY = "checksum"  # in a safetensors file's metadata
BESIDE = "beside"  # likewise: {name: digest} of the files that belong to it, in its folder
BLANK = b"0" * 32  # in its place while the checksum is computed: half of a SHA-256, in hex digits
_MARK = f'"{KEY}":"'.encode()  # in a value of the metadata its quotes would be escaped
_PNG = b"\x89PNG\r\n\x1a\n"


class Torn(UserError):
    """A file that is not as it was written, or none of its kind."""


def save(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, whole or not at all, with its checksum in the metadata."""
    from safetensors.torch import save_file

    with whole(file) as beside:
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
    """The tensors of a safetensors file whose checksum was compared already. Raises Torn."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise Torn(f"{file} is torn or no safetensors file") from error


def metadata(file: Path) -> dict[str, str]:
    """Likewise what a safetensors file says of itself. Raises Torn."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise Torn(f"{file} is torn or no safetensors file") from error


def verify(file: Path) -> None:
    """Raises Torn if a safetensors file does not have the bytes of its checksum. Files of earlier versions have no
    checksum: they must have the size that their header gives."""
    try:
        headers.refuse_torn(file)  # first: a file of another size need not be read
        place, checksum = _seal(file)
        if place is not None and _checksum(file, place) != checksum:
            raise ValueError("it has another checksum")
    except (OSError, ValueError, UserError):
        raise Torn(f"{file} is torn or no safetensors file") from None


def fit_stands(erased: Path) -> bool:
    """Whether a fit left its erased weights, and neither they nor the files beside them are torn.

    If a file is torn, the log names it, and the erased weights are deleted: the fit is then done again, all of it.
    """
    torn = _torn_of(erased) if erased.is_file() else None
    if torn is not None:
        made_again(torn)
        erased.unlink(missing_ok=True)
    return erased.is_file()


def _torn_of(erased: Path) -> Path | None:
    """The first torn file of a fit, or None: the erased weights, or one of `paths.OF_THE_FIT`, whose digests stand in
    the erased weights' metadata.

    A missing file is not torn: its owner may have deleted it. Weights of earlier versions name no digests.
    """
    try:
        verify(erased)
        with plain_data.opened(erased) as stream:
            header = plain_data.json_of(stream.read(int.from_bytes(stream.read(8), "little")).decode())
        said = plain_data.json_of(header.get("__metadata__", {}).get(BESIDE, "{}"))
        beside = {erased.parent / name: said.get(name) for name in OF_THE_FIT}
    except (Torn, OSError, ValueError, AttributeError, TypeError):  # of a header that nobody's save has written
        return erased
    return next(
        (file for file, known in beside.items() if known is not None and digest(file) not in (known, None)), None
    )


def sha256_of(file: Path) -> str:
    """64 hex digits of a file's content, which may be larger than the memory. Raises OSError if it cannot be read."""
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
    """Whether a PNG image is there and as it was written: the CRC-32 of every part, an end, and nothing after it."""
    try:
        data = memoryview(plain_data.content(file))
    except (OSError, ValueError):
        return False
    start = len(_PNG)
    if bytes(data[:start]) != _PNG:
        return False
    while start + 12 <= len(data):  # length of the content, name, content, CRC-32 of the latter two
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if end > len(data) or zlib.crc32(data[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return False
        if bytes(data[start + 4 : start + 8]) == b"IEND":
            return end == len(data)
        start = end
    return False


def sealed_page(html: str) -> str:
    """A page with a last line that says what it must hold."""
    return f"{html.rstrip()}\n<!-- {KEY} {digest_of(html.rstrip().encode())} -->\n"


def page_is_whole(file: Path) -> bool:
    """Whether a page is as it was written; one of an earlier version must have its beginning and its end."""
    try:
        html, mark, checksum = plain_data.content(file).rstrip().rpartition(f"\n<!-- {KEY} ".encode())
    except (OSError, ValueError):
        return False
    if mark:
        return checksum == f"{digest_of(html)} -->".encode()
    return checksum.lstrip()[:15].lower() == b"<!doctype html>" and checksum.endswith(b"</html>")


def made_again(*torn: Path) -> None:
    """One log line that names what is torn and is going to be replaced."""
    if torn:
        more = f" and {len(torn) - 1} more are" if len(torn) > 1 else " is"
        log.warning("%s%s torn: made again", torn[0], more)


def _seal(file: Path) -> tuple[int | None, bytes]:
    """Where in a safetensors file its checksum stands, and the checksum; None where it has none."""
    with plain_data.opened(file) as stream:
        length, size = int.from_bytes(stream.read(8), "little"), os.fstat(stream.fileno()).st_size
        header = stream.read(length) if length <= min(size - 8, headers.LONGEST) else b""
    found = header.find(_MARK)
    if found < 0:
        return None, b""
    start = found + len(_MARK)
    return 8 + start, header[start : start + len(BLANK)]


def _order(file: Path) -> None:
    """Sorts the metadata, which safetensors writes in any order: the same content is the same bytes."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json_text(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(ordered) <= length:
            stream.seek(8)
            stream.write(ordered.ljust(length))


def _checksum(file: Path, place: int) -> bytes:
    """Of all bytes, with `BLANK` where the checksum itself stands."""
    sha = hashlib.sha256()
    with plain_data.opened(file) as stream:
        sha.update(stream.read(place) + BLANK)
        stream.seek(place + len(BLANK))
        while block := stream.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()[: len(BLANK)].encode()
