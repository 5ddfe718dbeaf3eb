"""Reads YAML and JSON that somebody else may have written: a run, a sweep, a cache. What comes out is plain data of
bounded size, or a ValueError that says what is wrong in a few words.

Standard library and yaml only. docs/trust.md says what is trusted and what is not.
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

SETTINGS = 4 << 20  # bytes of a YAML file: ten thousand concepts take a quarter of it
LARGEST = 512 << 20  # bytes of a JSON file: 30,000 prompts take a tenth of it
DEEPEST = 40  # levels of nesting
MOST = 400_000  # nodes of a YAML file, aliases counted as often as they are used
DIGITS = 100  # letters of a number: Python needs ever longer for each one more
WHOLE = range(-(2**63), 2**63)  # integers that floats and tensors can be made of
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half of a letter beyond 65,535, as JSON spells it

_BEGUN = 0, 0  # the weight of a node whose parts are being weighed
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


def opened(file: Path) -> BinaryIO:
    """A file, open for reading. Raises OSError if it cannot be opened, or is a folder, a pipe or a device.

    The open file is asked for its kind, not the path: the path may be another file by then. Opening a pipe would wait
    for somebody to write to it without O_NONBLOCK, which changes nothing for a file.
    """
    handle = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError("it is no file")
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
    """A text file's lines, parted by line feeds alone: JSON texts may hold other separators. Raises as `text`."""
    found = text(file, errors=errors)
    return found.removesuffix("\n").split("\n") if found else []


def read_yaml(file: Path) -> Any:
    """A YAML file's content. Raises OSError, ValueError."""
    return yaml_of(text(file, SETTINGS))


def read_json(file: Path) -> Any:
    """A JSON file's content. Raises OSError, ValueError."""
    return json_of(text(file))


def json_of(content: str) -> Any:
    """A JSON text's content. Raises ValueError, also for a key that is given twice, for extreme nesting, for integers
    of more than 64 bits, and for half a letter, which no file or page takes."""
    try:
        found = _decoder.decode(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if content.count("{") + content.count("[") > DEEPEST:
        _refuse_depth(found)
    if SURROGATE.search(content):  # two halves that belong together are one letter by now
        for each in strings(found):
            _refuse_half(each)
    return found


def yaml_of(content: str) -> Any:
    """A YAML text's content, of the kinds that JSON has too. Raises ValueError, also for a key that is given twice, for
    extreme nesting, for aliases that grow beyond `MOST` nodes, for integers of more than 64 bits, and for half a
    letter."""
    if len(content) > SETTINGS:
        raise ValueError(f"it is larger than {SETTINGS >> 20} MB")
    try:
        _refuse_size(content)
        loader = _Loader(content)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _weight(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (IndexError, KeyError):
        raise ValueError("a value of it is not of the kind that it is said to be") from None  # "!!int ''"
    except (yaml.YAMLError, RecursionError, OverflowError) as error:
        raise ValueError(next(iter(str(error).splitlines()), "it cannot be read")) from None


def _refuse_size(content: str) -> None:
    """Counts levels and nodes from the text's events, which takes no recursion."""
    depth = 0
    for count, event in enumerate(yaml.parse(content, Loader=_Loader)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST:
            raise ValueError("it is nested too deeply")
        if count > MOST:
            raise ValueError("it holds too much")


def _weight(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(nodes, levels of nesting) that a node stands for, its aliases written out. Raises ValueError for a node that is
    no plain data."""
    if id(node) in known:
        if known[id(node)] == _BEGUN:
            raise ValueError("a part of it holds itself")
        return known[id(node)]
    known[id(node)] = _BEGUN
    if node.tag not in _PLAIN:
        raise ValueError(f"it holds a {str(node.tag).rpartition(':')[2]!r}, which is no plain value")
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.ScalarNode):
        _refuse_half(node.value)
        _refuse_number(node)
    if isinstance(node, yaml.MappingNode):
        keys: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError("a key of it is no text")
            if (key.tag, key.value) in keys:
                raise ValueError(f"the key {key.value[:60]!r} is given twice")
            keys.add((key.tag, key.value))
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    weight, levels = 1, 0
    for part in parts:
        more, below = _weight(part, known)
        weight, levels = weight + more, max(levels, below)
        if weight > MOST:
            raise ValueError("its aliases stand for too much")
    if isinstance(node, yaml.CollectionNode):
        levels += 1
        if levels > DEEPEST:
            raise ValueError("it is nested too deeply")
    known[id(node)] = weight, levels
    return weight, levels


def strings(node: Any) -> Iterator[str]:
    """Every text in plain data, the keys too."""
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
    """An integer of a JSON text, of at most 64 bits: a larger one makes no float, and one of thousands of digits no
    text."""
    if len(digits) > DIGITS or int(digits) not in WHOLE:
        raise ValueError("it holds an integer of more than 64 bits")
    return int(digits)


def _refuse_number(node: yaml.ScalarNode) -> None:
    """Raises ValueError for a number that is too long to be read, or an integer of more than 64 bits."""
    kind = node.tag.rpartition(":")[2]
    if kind in ("int", "float") and len(node.value) > DIGITS:
        raise ValueError(f"it holds a number of {len(node.value)} letters")
    if kind == "int" and yaml.constructor.SafeConstructor().construct_yaml_int(node) not in WHOLE:
        raise ValueError("it holds an integer of more than 64 bits")


def _refuse_half(text: str) -> None:
    """Raises ValueError for a text that UTF-8 cannot spell."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("it holds half a letter (a lone surrogate)") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key of it is given twice")
    return found


_decoder = json.JSONDecoder(object_pairs_hook=_once, parse_int=_integer)  # one for all lines of a file


def _refuse_depth(found: Any) -> None:
    level = [found]
    for _ in range(DEEPEST):
        nodes = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, (dict, list)))
        level = [part for parts in nodes for part in parts if isinstance(part, (dict, list))]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def json_text(content: Any, **style: Any) -> str:
    """Content as JSON that every reader takes: NaN and infinity, which JSON has no words for, are null. style: of
    json.dumps."""
    return json.dumps(_sayable(content), allow_nan=False, **style)


def _sayable(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {_sayable(key): _sayable(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_sayable(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
