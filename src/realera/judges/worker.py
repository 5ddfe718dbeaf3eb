"""The process in the interpreter `judge.python`: reads one JSON object per line and answers each with one line.

It uses only the standard library, apart from the judge's own imports. The first line is the judge's config node; the
answer has its name and protocol. Each further line {"call": method, "arguments": {...}} is answered with {"said": ...}.
Errors are answered with {"refused": a UserError's text} or {"failed": an exception in one line}.
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

MARK = "realera"  # a key of every answer, which distinguishes answers from the output of libraries


def answer(judge: Any, call: str, arguments: Mapping[str, Any]) -> Any:
    """The judge's answer to one request, as plain data."""
    if call == "protocol":
        about = {"name": judge.name, "protocol": judge.protocol(), "names": hasattr(judge, "knows")}
        return {**about, "detects": bool(getattr(judge, "detects", False))}
    if call == "knows":
        return bool(judge.knows(arguments["concept"]))
    paths = [Path(path) for path in arguments["images"]]
    if call == "compare":
        return judge.compare(paths, [Path(path) for path in arguments["references"]])
    return [asdict(verdict) for verdict in judge(paths, [prompt_of(row) for row in arguments["prompts"]])]


def prompt_of(row: Mapping[str, Any]) -> Prompt:
    """A prompt from plain data, with lists turned back into tuples."""
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return Prompt(**values)


def serve(lines: Sequence[str] | TextIO, say: Callable[[Mapping[str, Any]], None]) -> None:
    """Answers each line until there are no more, or until building the judge fails."""
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
            cause = error.__cause__ if isinstance(error, NotBuilt) else error
            first = next(iter(str(cause).strip().splitlines()), "")
            say({MARK: 1, "failed": f"{type(cause).__name__}: {first[:300]}"})
        if judge is None:
            return


def main() -> None:
    """Serves on stdin and stdout. Any other output, including that of C code, goes to stderr."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(what: Mapping[str, Any]) -> None:
        out.write(json.dumps(what) + "\n")
        out.flush()

    serve(sys.stdin, say)
