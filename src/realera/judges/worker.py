"""A judge behind a pipe, run by the interpreter that `judge.python` names: a JSON object a line comes in, one goes out.

Standard library alone, apart from what the judge itself imports. The first line in is the judge's config node, answered
with its name and protocol; each further line {"call": method, "arguments": {...}} is answered with {"said": ...}.
What went wrong is answered too: {"refused": a UserError's text} or {"failed": an exception in one line}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from realera.contracts import Prompt, UserError
from realera.settings.instantiate import NotBuilt, build

MARK = "realera"  # a key of every answer: what else a library prints is told apart by it


def answer(judge: Any, call: str, arguments: Mapping[str, Any]) -> Any:
    """The judge's answer to one line, as plain data."""
    if call == "protocol":
        said = {"name": judge.name, "protocol": judge.protocol(), "names": hasattr(judge, "knows")}
        return {**said, "detects": bool(getattr(judge, "detects", False))}
    if call == "knows":
        return bool(judge.knows(arguments["concept"]))
    paths = [Path(path) for path in arguments["images"]]
    if call == "compare":
        return judge.compare(paths, [Path(path) for path in arguments["references"]])
    return [asdict(verdict) for verdict in judge(paths, [prompt_of(row) for row in arguments["prompts"]])]


def prompt_of(row: Mapping[str, Any]) -> Prompt:
    """A prompt back from plain data, whose lists were tuples."""
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return Prompt(**values)


def serve(lines: Sequence[str] | TextIO, say: Callable[[Mapping[str, Any]], None]) -> None:
    """Answers until the lines end, or until no judge could be built."""
    judge: Any = None
    for line in lines:
        if not line.strip():
            continue
        asked = json.loads(line)
        try:
            if judge is None:
                judge, asked = build(asked, classes=True), {"call": "protocol", "arguments": {}}
            say({MARK: 1, "said": answer(judge, asked["call"], asked["arguments"])})
        except UserError as error:
            say({MARK: 1, "refused": str(error)})
        except Exception as error:
            met = error.__cause__ if isinstance(error, NotBuilt) else error
            first = next(iter(str(met).strip().splitlines()), "")
            say({MARK: 1, "failed": f"{type(met).__name__}: {first[:300]}"})
        if judge is None:
            return


def main() -> None:
    """Serves on stdin and stdout. Whatever else would be printed, by C code too, goes to stderr."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(what: Mapping[str, Any]) -> None:
        out.write(json.dumps(what) + "\n")
        out.flush()

    serve(sys.stdin, say)
