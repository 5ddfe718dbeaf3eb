"""Reads a checkpoint's files without torch: settings in JSON, and the headers of safetensors files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from realera.contracts import UserError
from realera.files import plain_data

LONGEST_JSON = 64 << 20  # bytes; the index of a large model has 0.1 million
AXES = 8  # most axes of a tensor
LONGEST = 100_000_000  # bytes of a header; the limit of safetensors itself
SIZES = {  # bytes of a number
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
PEEK = 512  # bytes that `quick_digest` reads at each end of a tensor
POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Stored:
    """The header entry of one tensor. dtype: in safetensors' spelling, "F16"."""

    dtype: str
    shape: tuple[int, ...]


def refuse_torn(file: Path) -> None:
    """Raises UserError unless the file is a safetensors file of the size in its header, without gaps or overlaps."""
    tensors(file)


def tensors(file: Path) -> dict[str, Stored]:
    """{tensor name: dtype and shape} from a file's header. Raises UserError as `refuse_torn`."""
    return {name: stored for name, (stored, _, _) in _placed(file).items()}


def byte_ranges(file: Path) -> dict[str, tuple[int, int]]:
    """{tensor name: (first byte, end) in the file}, in file order. Raises UserError as `refuse_torn`."""
    found = {name: (begin, stop) for name, (_, begin, stop) in _placed(file).items()}
    start = file.stat().st_size - max((stop for _, stop in found.values()), default=0)
    return {name: (start + begin, start + stop) for name, (begin, stop) in sorted(found.items(), key=lambda f: f[1])}


def _placed(file: Path) -> dict[str, tuple[Stored, int, int]]:
    try:
        known = file.stat()
        return _tensors(file, known.st_size, known.st_mtime_ns)
    except OSError as error:
        raise UserError(
            f"The file {str(file)!r} cannot be read ({error.strerror or error}); check its permissions."
        ) from error


def is_pointer(start: bytes) -> bool:
    """Whether a file with these first bytes is a pointer of Git LFS, in place of a file that was not fetched."""
    return start.startswith(POINTER)


def unfetched(file: Path) -> UserError:
    return UserError(
        f"The file {str(file)!r} is a Git LFS pointer and not the file itself; type `git lfs pull` in its folder, or "
        "download it again."
    )


@lru_cache(maxsize=256)
def _tensors(file: Path, size: int, changed: int) -> dict[str, tuple[Stored, int, int]]:
    """{tensor name: (entry, first byte, end)}; bytes count from the end of the header."""
    with plain_data.opened(file) as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if is_pointer(start + stream.read(len(POINTER))):
            raise unfetched(file)
        stream.seek(8)
        if len(start) < 8 or not 2 <= length <= min(size - 8, LONGEST):
            raise _torn(file, size, "its header cannot be read")
        head = stream.read(length)
    try:
        header = json.loads(head)
        found = {name: _entry(entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _torn(file, size, "its header cannot be read") from None
    end = 0
    for name, (stored, begin, stop) in sorted(found.items(), key=lambda item: item[1][1:]):
        itemsize = SIZES.get(stored.dtype)
        if begin != end or (itemsize is not None and stop - begin != itemsize * prod(stored.shape)):
            raise _torn(file, size, f"its header misplaces the tensor {name}")
        end = stop
    if 8 + length + end != size:
        raise _torn(file, size, f"its header says {8 + length + end:,} bytes")
    return found


def _entry(entry: Any) -> tuple[Stored, int, int]:
    dtype, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = (begin, stop, *shape)
    if (
        not isinstance(dtype, str)
        or len(shape) > AXES
        or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers)
    ):
        raise ValueError("no tensor")
    return Stored(dtype, tuple(shape)), begin, stop


def _torn(file: Path, size: int, reason: str) -> UserError:
    return UserError(
        f"The weights file {str(file)!r} is torn or not a safetensors file: it has {size:,} bytes and {reason}; copy "
        "or download it again."
    )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError for a file that cannot be read or does not contain an object."""
    try:
        content = plain_data.content(file, LONGEST_JSON)
        if is_pointer(content):
            raise unfetched(file)
        found = json.loads(content.decode("utf-8-sig"))
    except OSError as error:
        raise UserError(
            f"The file {str(file)!r} cannot be read ({error.strerror or error}); check its permissions."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"The file {str(file)!r} is not valid JSON; copy or download it again.") from error
    if not isinstance(found, dict):
        kind = {list: "a list", str: "a text", type(None): "null"}.get(type(found), f"{str(found)[:20]}")
        raise UserError(f"The file {str(file)!r} contains {kind} and not settings; copy or download it again.")
    return found


def quick_digest(file: Path) -> str:
    """64 hex digits that change with a safetensors file's weights, without reading all of them: they depend on its
    size, its header and both ends of every tensor, which any training changes.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: the file cannot be read or is torn.
    """
    known = file.stat()
    return _quick_digest(file, known.st_size, known.st_mtime_ns)


@lru_cache(maxsize=256)
def _quick_digest(file: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    with plain_data.opened(file) as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size, LONGEST):
            raise ValueError("its header cannot be read")
        head = stream.read(length)
        digest.update(head)
        for name, entry in sorted(json.loads(head).items()):
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                for start in (begin, max(begin, end - PEEK)):
                    stream.seek(8 + len(head) + start)
                    digest.update(stream.read(min(PEEK, end - start)))
    return digest.hexdigest()
