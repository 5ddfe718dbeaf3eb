"""Reads a W&B run back from its offline file."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BLOCK = 32768  # bytes; a record that crosses a block is split


def records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log (crc32, length, type; whole or first, middle, last) after 7 bytes of
    header."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if kind == 0 or at + 7 + length > len(data):
            return  # still being written
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def whole(file: Path) -> list[Any]:
    """The records up to the run's end. W&B's own process writes the end shortly after the run has finished."""
    until = time.monotonic() + 30
    while True:
        found = list(records(file))
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        assert time.monotonic() < until, "the run did not end"
        time.sleep(0.05)


def read_back(folder: Path) -> dict[str, Any]:
    """{"config", "summary", "history": {key: [values]}, "images": of the table, "run": its record, "tables", "files":
    of its artifact of weights}, of the folder's only W&B run. All files are in the folder."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    history: dict[str, list[Any]] = {}
    images = []
    files: set[str] = set()
    run = None

    def key(item: Any) -> str:
        return str(item.key or "/".join(item.nested_key))

    for record in whole(file):
        run = record.run if record.WhichOneof("record_type") == "run" else run
        for update in (record.run.config.update, record.config.update):
            config |= {key(item): json.loads(item.value_json) for item in update}
        if record.artifact.type == "model":
            files |= {entry.path for entry in record.artifact.manifest.contents}
        for entry in record.artifact.manifest.contents:
            if entry.path.endswith(".png"):
                assert Path(entry.local_path).is_relative_to(folder)
                images.append(np.asarray(Image.open(entry.local_path)))
        summary |= {key(item): json.loads(item.value_json) for item in record.summary.update}
        for item in record.history.item:
            history.setdefault(key(item), []).append(json.loads(item.value_json))
    tables = {
        f.name.split("_")[0]: json.loads(f.read_text()) for f in file.parent.glob("files/media/table/*.table.json")
    }
    return {
        "config": config,
        "summary": summary,
        "history": history,
        "images": images,
        "run": run,
        "tables": tables,
        "files": files,
    }
