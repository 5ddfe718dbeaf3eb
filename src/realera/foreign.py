"""Reads YAML and JSON that somebody else may have written: a run, a sweep, a cache. What comes out is plain data of
bounded size, or a ValueError that says what is wrong in a few words.

Standard library and yaml only. docs/trust.md says what is trusted and what is not.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

SETTINGS = 4 << 20  # bytes of a YAML file: ten thousand concepts take a quarter of it
LARGEST = 512 << 20  # bytes of a JSON file: 30,000 prompts take a tenth of it
DEEPEST = 40  # levels of nesting
MOST = 400_000  # nodes of a YAML file, aliases counted as often as they are used

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


def text(file: Path, largest: int = LARGEST) -> str:
    """A text file's content (UTF-8). Raises OSError where it is missing, else ValueError."""
    with file.open("rb") as stream:
        if not stat.S_ISREG(file.stat().st_mode):
            raise ValueError("it is no file")
        content = stream.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it is larger than {largest >> 20} MB")
    return content.decode("utf-8")


def lines(file: Path) -> list[str]:
    """A text file's lines, parted by line feeds alone: JSON texts may hold other separators. Raises as `text`."""
    content = text(file)
    return content.removesuffix("\n").split("\n") if content else []


def read_yaml(file: Path) -> Any:
    """A YAML file's content. Raises OSError, ValueError."""
    return yaml_of(text(file, SETTINGS))


def read_json(file: Path) -> Any:
    """A JSON file's content. Raises OSError, ValueError."""
    return json_of(text(file))


def json_of(content: str) -> Any:
    """A JSON text's content. Raises ValueError, also for a key that is given twice and for extreme nesting."""
    try:
        found = json.loads(content, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if content.count("{") + content.count("[") > DEEPEST:
        _refuse_depth(found)
    return found


def yaml_of(content: str) -> Any:
    """A YAML text's content, of the kinds that JSON has too. Raises ValueError, also for a key that is given twice, for
    extreme nesting, and for aliases that grow beyond `MOST` nodes."""
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


def _weight(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes a node stands for. Raises ValueError for what no run writes."""
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("a part of it holds itself")
        return known[id(node)]
    known[id(node)] = 0
    if node.tag not in _PLAIN:
        raise ValueError(f"it holds a {str(node.tag).rpartition(':')[2]!r}, which is no plain value")
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        keys = [(key.tag, str(key.value)) for key, _ in node.value]
        if len(set(keys)) < len(keys):
            twice = next(key for _, key in keys if [k for _, k in keys].count(key) > 1)
            raise ValueError(f"the key {twice[:60]!r} is given twice")
        if any(not isinstance(key, yaml.ScalarNode) for key, _ in node.value):
            raise ValueError("a key of it is no text")
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    weight = 1
    for part in parts:
        weight += _weight(part, known)
        if weight > MOST:
            raise ValueError("its aliases stand for too much")
    known[id(node)] = weight
    return weight


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


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key of it is given twice")
    return found


def _refuse_depth(found: Any) -> None:
    level = [found]
    for _ in range(DEEPEST):
        nodes = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, (dict, list)))
        level = [part for parts in nodes for part in parts if isinstance(part, (dict, list))]
        if not level:
            return
    raise ValueError("it is nested too deeply")
