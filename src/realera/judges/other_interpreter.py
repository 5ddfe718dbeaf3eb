"""A judge in another interpreter: `judge.python=/path/to/python`, for libraries that cannot live beside this torch.

That interpreter needs Python 3.10 and the judge's own libraries; realera's judges reach it from this package's folder,
without this interpreter's other packages. Lines of JSON go both ways (worker.py).
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
"""  # realera alone becomes importable there: not what lies beside it, built for this interpreter, nor the work folder
_ANSWER = f'{{"{MARK}"'.encode()
_BATCH = 64  # images in one line, where the judge has no batch of its own


def placed(node: Any) -> Any:
    """A judge's config node, ready to be instantiated: `python` is taken out, at any depth, and where it names an
    interpreter the node becomes one of `Elsewhere` that carries the judge's own node along."""
    if isinstance(node, (list, tuple)):
        return [placed(value) for value in node]
    if not isinstance(node, Mapping):
        return node
    rest = {key: placed(value) for key, value in node.items() if key != "python" or "_target_" not in node}
    if "_target_" not in node or node.get("python") is None:
        return rest
    kind = "ElsewhereSet" if hasattr(locate(node["_target_"]), "compare") else "Elsewhere"
    carried = {"node": json.dumps(rest), "python": str(node["python"])}
    return {"_target_": f"{__name__}.{kind}", **carried}


class Elsewhere:
    """A Judge that asks the one described by `node` in the interpreter `python`.

    node: the judge's config, a mapping or its JSON. python: a path, or a command's name. patience: seconds that one
    answer may take; loading, with a download, is one, and a batch of images is one. Raises UserError, in one sentence,
    where the interpreter cannot be started, the judge cannot be built there, or it stops answering.
    """

    def __init__(self, node: Mapping[str, Any] | str, python: str, patience: float = 900.0) -> None:
        self._node = json.loads(node) if isinstance(node, str) else dict(node)
        self._batch = int(self._node.get("batch") or _BATCH)
        self.python, self.patience = python, patience
        found = shutil.which(os.path.expanduser(python))
        if found is None:
            raise UserError(f"judge.python={python} is no program that can be run: give the path of a Python 3.10+")
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the child lives)
        hidden = ("PYTHONPATH", "PYTHONHOME")  # this interpreter's
        self._process = subprocess.Popen(
            [found, "-u", "-c", _BOOT, str(paths.HERE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={key: value for key, value in os.environ.items() if key not in hidden},
        )
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=_listen, args=(self._process, self._answers), daemon=True).start()
        self.close = weakref.finalize(self, _stop, self._process)
        try:
            said = self._tell(self._node)
        except UserError as error:
            place = "" if python in str(error) else f" (judge.python={python})"
            raise UserError(f"{error}{place}") from None
        if not json_shapes.fits(said, _ABOUT) or not _finite(said):
            raise self._nonsense("no name and protocol of a judge")
        self.name: str = said["name"]
        self.detects: bool = said.get("detects", False)
        self._names: bool = said.get("names", False)
        self._protocol: dict[str, Any] = said["protocol"]

    def __call__(self, images: Sequence[Path], prompts: Sequence[Prompt]) -> list[Verdict]:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
        verdicts: list[Verdict] = []
        for start in range(0, len(images), self._batch):
            part = slice(start, start + self._batch)
            rows = [asdict(prompt) for prompt in prompts[part]]
            said = self._ask("judge", images=_absolute(images[part]), prompts=rows)
            if not json_shapes.fits(said, [_VERDICT]):
                raise self._nonsense("what is no list of verdicts")
            if [row["prompt_id"] for row in said] != [prompt.id for prompt in prompts[part]]:
                raise self._nonsense("verdicts that are not of the images it was asked about, each once and in order")
            for image, row in zip(images[part], said):
                if not _finite(row["detail"]):
                    raise self._nonsense(f"NaN or infinity in the detail of the image {image}")
            verdicts += [Verdict(row["prompt_id"], float(row["value"]), row["label"], row["detail"]) for row in said]
        return verdicts

    def knows(self, concept: str) -> bool:
        """As the judge says there; one that names no concepts knows them all."""
        return not self._names or bool(self._ask("knows", concept=concept))

    def protocol(self) -> dict[str, Any]:
        """The judge's own: where it ran changes no number."""
        return self._protocol

    def _ask(self, call: str, **arguments: Any) -> Any:
        return self._tell({"call": call, "arguments": arguments})

    def _tell(self, line: Mapping[str, Any]) -> Any:
        """One line out, one answer back. Raises UserError."""
        assert self._process.stdin is not None
        with suppress(OSError):  # it is gone: the answers have ended too, and stderr says why
            self._process.stdin.write(json.dumps(line).encode() + b"\n")
            self._process.stdin.flush()
        what = self._node["_target_"].rsplit(".", 1)[-1]
        try:
            heard = self._answers.get(timeout=self.patience)
        except queue.Empty:
            self._process.kill()
            self.close()
            raise UserError(
                f"{what} in {self.python} did not answer within {self.patience:g} s and was ended"
            ) from None
        if heard is None:
            self.close()
            raise UserError(f"{what} in {self.python} ended without an answer: {self._last_words()}")
        if "refused" in heard:
            raise UserError(str(heard["refused"]))
        if "failed" in heard:
            raise UserError(f"{what} failed in {self.python} ({heard['failed']}): install there what it needs")
        if "said" not in heard:
            raise self._nonsense("neither a result nor a refusal")
        return heard["said"]

    def _nonsense(self, what: str) -> UserError:
        return UserError(
            f"the judge in {self.python} answered {what}: install its libraries there again, or leave judge.python out"
        )

    def _last_words(self) -> str:
        """The last line that the child wrote to stderr."""
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[:300] if lines else f"it left with exit code {self._process.poll()}"


class ElsewhereSet(Elsewhere):
    """The same for a SetJudge."""

    def compare(self, images: Sequence[Path], references: Sequence[Path]) -> dict[str, float]:
        said = self._ask("compare", images=_absolute(images), references=_absolute(references))
        if not json_shapes.fits(said, {...: json_shapes.number}):
            raise self._nonsense("what are no finite numbers of a comparison")
        return {name: float(value) for name, value in said.items()}


def _value(value: Any) -> bool:
    """Of a verdict: a number, or the NaN of an image that was left unscored."""
    return json_shapes.number(value) or (isinstance(value, float) and math.isnan(value))


def _name(value: Any) -> bool:
    """A part of a file's name; a judge made of none has an empty one."""
    return value == "" or bool(json_shapes.matching(json_shapes.ID)(value))


_ABOUT = {"name": _name, "protocol": dict, "detects?": bool, "names?": bool}
_VERDICT = {**json_shapes.VERDICT, "prompt_id": str, "value": _value}
del _VERDICT["id"]


def _finite(node: Any) -> bool:
    """Whether plain data holds neither NaN nor infinity."""
    if isinstance(node, dict):
        return all(map(_finite, node.values()))
    return all(map(_finite, node)) if isinstance(node, list) else not isinstance(node, float) or math.isfinite(node)


def _absolute(paths: Sequence[Path]) -> list[str]:
    return [str(Path(path).resolve()) for path in paths]


def _listen(process: subprocess.Popen[bytes], answers: queue.Queue[dict[str, Any] | None]) -> None:
    """Puts each answer on the queue, and None when there will be no more; other lines are a library's chatter."""
    from realera.files import plain_data  # which needs more than the standard library

    assert process.stdout is not None
    for line in process.stdout:
        try:
            heard = plain_data.json_of(line.decode("utf-8", "replace"))
        except ValueError:
            heard = {MARK: 1} if line.startswith(_ANSWER) else None  # an answer that cannot be read is none
        if isinstance(heard, dict) and MARK in heard:
            answers.put(heard)
    answers.put(None)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Lets the child end by itself, or ends it."""
    with suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
