"""Runs a judge in another Python interpreter, `judge.python=/path/to/python`, for libraries that cannot be installed in
this environment.

The other interpreter needs Python 3.10 or newer and the judge's own libraries. It imports realera from this package's
folder, and no other package of this environment. The processes exchange lines of JSON (worker.py).
"""

from __future__ import annotations

import json
import math
import os
import queue
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from realera import paths
from realera.contracts import Prompt, UserError, Verdict
from realera.files import json_shapes
from realera.judges.worker import MARK
from realera.settings.instantiate import locate

_BOOT = """
import sys
sys.path[:] = [place for place in sys.path if place]
import importlib.util
root = sys.argv[1]
spec = importlib.util.spec_from_file_location("realera", root + "/__init__.py", submodule_search_locations=[root])
module = sys.modules["realera"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from realera.judges import worker
worker.main()
"""  # only realera becomes importable: not the packages beside it, built for this interpreter, nor the current folder
_ANSWER = f'{{"{MARK}"'.encode()
_BATCH = 64  # images per request, if the judge has no `batch`


def with_interpreters(node: Any) -> Any:
    """A judge's config node without the keys `python`, at any depth. A node whose `python` names an interpreter becomes
    a node of `RemoteJudge` that contains the judge's own node."""
    if isinstance(node, (list, tuple)):
        return [with_interpreters(value) for value in node]
    if not isinstance(node, Mapping):
        return node
    rest = {key: with_interpreters(value) for key, value in node.items() if key != "python" or "_target_" not in node}
    if "_target_" not in node or node.get("python") is None:
        return rest
    kind = "RemoteSetJudge" if hasattr(locate(node["_target_"]), "compare") else "RemoteJudge"
    carried = {"node": json.dumps(rest), "python": str(node["python"])}
    return {"_target_": f"{__name__}.{kind}", **carried}


class RemoteJudge:
    """A Judge that sends its images to the judge described by `node` in the interpreter `python`.

    node: the judge's config, a mapping or its JSON. python: a path, or the name of a command. patience: seconds until
    an answer must arrive; loading (with any download) is one request, and each batch of images is one. Raises UserError
    if the interpreter cannot be started, the judge cannot be built there, or it does not answer in time.
    """

    def __init__(self, node: Mapping[str, Any] | str, python: str, patience: float = 900.0) -> None:
        self._node = json.loads(node) if isinstance(node, str) else dict(node)
        self._batch = int(self._node.get("batch") or _BATCH)
        self.python, self.patience = python, patience
        found = shutil.which(os.path.expanduser(python))
        if found is None:
            raise UserError(f"judge.python={python} is not a program that can be run: give the path of a Python 3.10+")
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the child runs)
        hidden = ("PYTHONPATH", "PYTHONHOME")  # these belong to this interpreter
        self._process = subprocess.Popen(
            [found, "-u", "-c", _BOOT, str(paths.HERE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={key: value for key, value in os.environ.items() if key not in hidden},
        )
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=_read_answers, args=(self._process, self._answers), daemon=True).start()
        self.close = weakref.finalize(self, _stop, self._process)
        try:
            about = self._send(self._node)
        except UserError as error:
            place = "" if python in str(error) else f" (judge.python={python})"
            raise UserError(f"{error}{place}") from None
        if not json_shapes.fits(about, _FIRST_ANSWER) or not _is_finite(about):
            raise self._invalid_answer("without a valid name and protocol")
        self.name: str = about["name"]
        self.detects: bool = about.get("detects", False)
        self._has_knows: bool = about.get("names", False)
        self._protocol: dict[str, Any] = about["protocol"]

    def __call__(self, images: Sequence[Path], prompts: Sequence[Prompt]) -> list[Verdict]:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
        verdicts: list[Verdict] = []
        for start in range(0, len(images), self._batch):
            part = slice(start, start + self._batch)
            rows = [asdict(prompt) for prompt in prompts[part]]
            answer = self._ask("judge", images=_absolute(images[part]), prompts=rows)
            if not json_shapes.fits(answer, [_VERDICT]):
                raise self._invalid_answer("with something else than a list of verdicts")
            if [row["prompt_id"] for row in answer] != [prompt.id for prompt in prompts[part]]:
                raise self._invalid_answer("with verdicts that do not match the images one by one, in order")
            for image, row in zip(images[part], answer):
                if not _is_finite(row["detail"]):
                    raise self._invalid_answer(f"with NaN or infinity in the detail of the image {image}")
            verdicts += [Verdict(row["prompt_id"], float(row["value"]), row["label"], row["detail"]) for row in answer]
        return verdicts

    def knows(self, concept: str) -> bool:
        """The other judge's `knows`; True if it has no such method."""
        return not self._has_knows or bool(self._ask("knows", concept=concept))

    def protocol(self) -> dict[str, Any]:
        """The judge's own protocol. The interpreter is not part of it, because it does not change the numbers."""
        return self._protocol

    def _ask(self, call: str, **arguments: Any) -> Any:
        return self._send({"call": call, "arguments": arguments})

    def _send(self, line: Mapping[str, Any]) -> Any:
        """Sends one line and returns the answer. Raises UserError."""
        assert self._process.stdin is not None
        with suppress(OSError):  # the child has ended: reading the answer reports it, with stderr
            self._process.stdin.write(json.dumps(line).encode() + b"\n")
            self._process.stdin.flush()
        what = self._node["_target_"].rsplit(".", 1)[-1]
        try:
            answer = self._answers.get(timeout=self.patience)
        except queue.Empty:
            self._process.kill()
            self.close()
            raise UserError(
                f"{what} in {self.python} did not answer within {self.patience:g} s and was stopped"
            ) from None
        if answer is None:
            self.close()
            raise UserError(f"{what} in {self.python} ended without an answer: {self._last_error_line()}")
        if "refused" in answer:
            raise UserError(str(answer["refused"]))
        if "failed" in answer:
            raise UserError(f"{what} failed in {self.python} ({answer['failed']}): install its libraries there")
        if "said" not in answer:
            raise self._invalid_answer("with neither a result nor an error")
        return answer["said"]

    def _invalid_answer(self, what: str) -> UserError:
        return UserError(
            f"the judge in {self.python} answered {what}: install its libraries there again, or leave judge.python out"
        )

    def _last_error_line(self) -> str:
        """The last line of the child's stderr."""
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[:300] if lines else f"exit code {self._process.poll()}"


class RemoteSetJudge(RemoteJudge):
    """As `RemoteJudge`, for a SetJudge."""

    def compare(self, images: Sequence[Path], references: Sequence[Path]) -> dict[str, float]:
        numbers = self._ask("compare", images=_absolute(images), references=_absolute(references))
        if not json_shapes.fits(numbers, {...: json_shapes.number}):
            raise self._invalid_answer("with something else than finite numbers")
        return {name: float(value) for name, value in numbers.items()}


def _is_value(value: Any) -> bool:
    """Whether it is a verdict's value: a number, or the NaN of an unscored image."""
    return json_shapes.number(value) or (isinstance(value, float) and math.isnan(value))


def _is_name(value: Any) -> bool:
    """Whether it can be a part of a file name. A `BySplit` without judges has the empty name."""
    return value == "" or bool(json_shapes.matching(json_shapes.ID)(value))


_FIRST_ANSWER = {"name": _is_name, "protocol": dict, "detects?": bool, "names?": bool}
_VERDICT = {**json_shapes.VERDICT, "prompt_id": str, "value": _is_value}
del _VERDICT["id"]


def _is_finite(node: Any) -> bool:
    """Whether plain data contains neither NaN nor infinity."""
    if isinstance(node, dict):
        return all(map(_is_finite, node.values()))
    return all(map(_is_finite, node)) if isinstance(node, list) else not isinstance(node, float) or math.isfinite(node)


def _absolute(paths: Sequence[Path]) -> list[str]:
    return [str(Path(path).resolve()) for path in paths]


def _read_answers(process: subprocess.Popen[bytes], answers: queue.Queue[dict[str, Any] | None]) -> None:
    """Puts each answer on the queue, and None at the end. Other lines are the output of libraries and are ignored."""
    from realera.files import plain_data  # needs packages outside of the standard library

    assert process.stdout is not None
    for line in process.stdout:
        try:
            answer = plain_data.json_of(line.decode("utf-8", "replace"))
        except ValueError:
            answer = {MARK: 1} if line.startswith(_ANSWER) else None  # an invalid answer
        if isinstance(answer, dict) and MARK in answer:
            answers.put(answer)
    answers.put(None)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Closes the child's stdin, so that it ends; kills it after 2 seconds."""
    with suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
