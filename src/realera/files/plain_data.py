"""Reads YAML and JSON files that may come from somebody else: a run, a sweep, a cache. The result is plain data of
bounded size; otherwise a ValueError says in a few words what is wrong.

Standard library and yaml only. docs/trust.md describes which files are trusted.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import yaml

SETTINGS = 4 << 20  # most bytes of a YAML file: ten thousand concepts take a quarter of it
LARGEST = 512 << 20  # most bytes of a JSON file: 30,000 prompts take a tenth of it
DEEPEST = 40  # most levels of nesting
MOST = 400_000  # most nodes of a YAML file; an alias counts every time it is used
DIGITS = 100  # most characters of a number: the time to parse it grows with the square of its length
WHOLE = range(-(2**63), 2**63)  # integers that can be converted to floats and tensors
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # JSON's escape of a surrogate, half of a character beyond U+FFFF

_COUNTING = 0, 0  # marks a node whose parts are being counted
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


def opened(file: Path) -> BinaryIO:
    """A file, open for reading. Raises OSError if it cannot be opened, or is a folder, a pipe or a device.

    The kind is checked on the open file, because the path could be replaced in between. Without O_NONBLOCK, opening a
    pipe would wait for a writer; for a file the flag has no effect.
    """
    handle = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError("it is not a file")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def content(file: Path, largest: int = LARGEST) -> bytes:
    """A file's bytes. Raises OSError if it cannot be opened; ValueError if it is too large."""
    with opened(file) as stream:
        found = stream.read(largest + 1)
    if len(found) > largest:
        raise ValueError(f"it is larger than {largest >> 20} MB")
    return found


def text(file: Path, largest: int = LARGEST, errors: str = "strict") -> str:
    """A text file's content. errors: of `bytes.decode`. Raises OSError if it cannot be opened; ValueError if it is too
    large or not UTF-8."""
    return content(file, largest).decode("utf-8", errors)


def lines(file: Path, errors: str = "strict") -> list[str]:
    """A text file's lines, split only at line feeds, because JSON strings may contain other separators. Raises as
    `text`."""
    found = text(file, errors=errors)
    return found.removesuffix("\n").split("\n") if found else []


def read_yaml(file: Path) -> Any:
    """A YAML file's content. Raises OSError, ValueError."""
    return yaml_of(text(file, SETTINGS))


def read_json(file: Path) -> Any:
    """A JSON file's content. Raises OSError, ValueError."""
    return json_of(text(file))


def json_of(content: str) -> Any:
    """A JSON text's content. Raises ValueError, also for duplicate keys, extreme nesting, integers of more than 64
    bits, and lone surrogates, which cannot be written to a file or a page."""
    try:
        found = _decoder.decode(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if content.count("{") + content.count("[") > DEEPEST:
        _refuse_depth(found)
    if SURROGATE.search(content):  # the decoder has already joined surrogate pairs
        for each in strings(found):
            _refuse_surrogate(each)
    return found


def yaml_of(content: str) -> Any:
    """A YAML text's content, limited to the types of JSON. Raises ValueError, also for duplicate keys, extreme nesting,
    aliases that expand to more than `MOST` nodes, integers of more than 64 bits, and lone surrogates."""
    if len(content) > SETTINGS:
        raise ValueError(f"it is larger than {SETTINGS >> 20} MB")
    try:
        _refuse_size(content)
        loader = _Loader(content)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (IndexError, KeyError):
        raise ValueError("one of its values does not have the type in its tag") from None  # "!!int ''"
    except (yaml.YAMLError, RecursionError, OverflowError) as error:
        raise ValueError(next(iter(str(error).splitlines()), "it cannot be read")) from None


def _refuse_size(content: str) -> None:
    """Counts levels and nodes from the parser's events, without recursion."""
    depth = 0
    for count, event in enumerate(yaml.parse(content, Loader=_Loader)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST:
            raise ValueError("it is nested too deeply")
        if count > MOST:
            raise ValueError("it is too large")


def _count(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(nodes, levels of nesting) of a node with its aliases expanded. Raises ValueError for a node that is not plain
    data."""
    if id(node) in known:
        if known[id(node)] == _COUNTING:
            raise ValueError("a part of it contains itself")
        return known[id(node)]
    known[id(node)] = _COUNTING
    if node.tag not in _PLAIN:
        raise ValueError(f"it contains a {str(node.tag).rpartition(':')[2]!r}, which is not plain data")
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.ScalarNode):
        _refuse_surrogate(node.value)
        _refuse_number(node)
    if isinstance(node, yaml.MappingNode):
        keys: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError("one of its keys is not a text")
            if (key.tag, key.value) in keys:
                raise ValueError(f"the key {key.value[:60]!r} is given twice")
            keys.add((key.tag, key.value))
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    nodes, levels = 1, 0
    for part in parts:
        more, below = _count(part, known)
        nodes, levels = nodes + more, max(levels, below)
        if nodes > MOST:
            raise ValueError("its aliases expand to too many values")
    if isinstance(node, yaml.CollectionNode):
        levels += 1
        if levels > DEEPEST:
            raise ValueError("it is nested too deeply")
    known[id(node)] = nodes, levels
    return nodes, levels


def strings(node: Any) -> Iterator[str]:
    """Every text in plain data, including the keys."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from strings(key)
            yield from strings(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from strings(value)


def _integer(digits: str) -> int:
    """An integer of a JSON text, of at most 64 bits: a larger one cannot become a float, and one of thousands of digits
    cannot become a text."""
    if len(digits) > DIGITS or int(digits) not in WHOLE:
        raise ValueError("it contains an integer of more than 64 bits")
    return int(digits)


def _refuse_number(node: yaml.ScalarNode) -> None:
    """Raises ValueError for a number with too many characters, and for an integer of more than 64 bits."""
    kind = node.tag.rpartition(":")[2]
    if kind in ("int", "float") and len(node.value) > DIGITS:
        raise ValueError(f"it contains a number of {len(node.value)} characters")
    if kind == "int" and yaml.constructor.SafeConstructor().construct_yaml_int(node) not in WHOLE:
        raise ValueError("it contains an integer of more than 64 bits")


def _refuse_surrogate(text: str) -> None:
    """Raises ValueError for a text that UTF-8 cannot encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("it contains half a character (a lone surrogate)") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("one of its keys is given twice")
    return found


_decoder = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_int=_integer)


def _refuse_depth(found: Any) -> None:
    level = [found]
    for _ in range(DEEPEST):
        nodes = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, (dict, list)))
        level = [part for parts in nodes for part in parts if isinstance(part, (dict, list))]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def json_text(content: Any, **style: Any) -> str:
    """Content as standard JSON. NaN and infinity, which do not exist in JSON, become null. style: arguments of
    json.dumps."""
    return json.dumps(_without_nan(content), allow_nan=False, **style)


def _without_nan(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {_without_nan(key): _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
