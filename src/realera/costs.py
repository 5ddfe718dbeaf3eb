"""Measures the cost of a run for costs.json: wall time by stage, denoiser passes, parameters, peak memory. This module
uses torch only if another module has imported it."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realera import paths
from realera.files import json_shapes, plain_data
from realera.files.cache_costs import ReusedCosts
from realera.system import disk
from realera.system.disk import Tolerance
from realera.system.ranks import Ranks

if TYPE_CHECKING:
    from realera.contracts import Backbone, Guide, Prompt, Sampler

log = logging.getLogger(__name__)

FORMAT_VERSION = 1  # of costs.json
ERASING = ("text", "edit", "latents", "train", "finish")  # the method's own stages; the others are the same for all
STAGES = ("load", *ERASING, "draw", "judge")
ORIGINAL_IMAGES = (
    "originals"  # the original model's images; all runs share them, so they have a separate entry in the file
)
MB = 1e6  # bytes


class Meter:
    """Measures a run from its start and adds the costs of its earlier starts, which `file` contains (`starts`).

    A nested stage stops the clock of the outer one. The file is written after every stage and, within `with meter:`,
    every `every` seconds, so that a killed run loses little. Without a file, the meter only measures.
    """

    def __init__(self, file: Path | None = None, every: float = 30.0, processes: int = 1) -> None:
        self.file = file
        self.every = every
        self.processes = processes
        self.before = {} if file is None else _read(file)
        self.seconds: dict[str, float] = {}  # by stage
        self.passes: dict[str, int] = {}
        self.helpers: dict[str, int] = {}  # passes of the other processes
        self.known: dict[str, Any] = {}  # values that are written unchanged: device, parameters, ...
        self.shared: dict[str, Any] = {}
        self.peaks: dict[str, dict[str, float | None]] = {}
        self._stages: list[str] = []
        self._backbone: Backbone | None = None
        self._since, self._passed = time.perf_counter(), 0
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._writer: threading.Thread | None = None
        self._tolerance = Tolerance()
        self._resets = False  # whether the host's peak is of this run and not of the whole process

    def __enter__(self) -> Meter:
        self._resets = _reset_peaks()
        if self.file is not None:
            self._writer = threading.Thread(target=self._write_regularly, daemon=True)
            self._writer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._writer is not None:
            self._writer.join()
        if self._stages:
            self.end(self._stages[0])

    def watch(self, backbone: Backbone, device: str) -> None:
        """Starts to count the passes of this backbone's denoiser. device: "cpu" or "cuda"."""
        with self._lock:
            self._backbone, self._passed = backbone, backbone.passes
            self.known["device"] = _described(device, self.processes)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts the time and passes of the block for the stage `name`."""
        self.begin(name)
        try:
            yield
        finally:
            self.end(name)

    def begin(self, name: str) -> None:
        assert name in (*STAGES, ORIGINAL_IMAGES), name
        with self._lock:
            self._lap(wait=True)
            self._stages.append(name)
            self.seconds.setdefault(name, 0.0)
            self.passes.setdefault(name, 0)

    def end(self, name: str) -> None:
        """Ends the latest stage of this name and all stages inside it. Does nothing if there is no such stage."""
        with self._lock:
            if name in self._stages:
                self._lap(wait=True)
                last = len(self._stages) - 1 - self._stages[::-1].index(name)
                del self._stages[last:]
                self.write()

    def note(self, **numbers: float) -> None:
        """Records trained_parameters, edited_parameters or passes_per_image."""
        with self._lock:
            self.known |= numbers

    def reused(self, stage: str, entries: ReusedCosts) -> None:
        """Records the original cost of the cached inputs that `stage` read. A resumed run also finds its own cached
        files; their cost is already counted and is subtracted."""
        if stage in self.before.get("shared", {}):
            return
        found = entries.total()
        own = self.before.get("stages", {}).get(stage, 0.0), self.before.get("passes", {}).get("erase", 0)
        self.shared[stage] = {
            "seconds": round(max(0.0, found.seconds - own[0]), 3),
            "passes": max(0, found.passes - own[1]),
            **({"unknown": entries.unknown()} if entries.unknown() else {}),
        }

    def gather(self, ranks: Ranks) -> None:
        """Adds the passes of the run's other processes. Every process must call it."""
        own = dict(self.passes)
        self.helpers = {}
        for rank, passes in enumerate(ranks.gather(own)):
            for stage, count in passes.items() if rank != ranks.rank else ():
                self.helpers[stage] = self.helpers.get(stage, 0) + count
        self.write()

    def record(self) -> dict[str, Any]:
        """The content of costs.json: the earlier starts of the run and this one so far."""
        with self._lock:
            self._lap()
            before = self.before
            stages = _sums(before.get("stages", {}), self.seconds)
            known = {**{key: before[key] for key in before if key not in ("format_version", "starts")}, **self.known}
            if before.get("device") not in (None, known.get("device")):
                known["device"] = f"{before['device']}; {known['device']}"
            peaks = {
                name: {place: _largest(before.get(name, {}).get(place), now) for place, now in own.items()}
                for name, own in self.peaks.items()
            }
            return {
                "format_version": FORMAT_VERSION,
                **known,
                "stages": {name: round(stages[name], 3) for name in STAGES if name in stages},
                "passes": _sums(before.get("passes", {}), _grouped(self.passes), _grouped(self.helpers)),
                "shared": {**before.get("shared", {}), **self.shared},
                **self._originals(),
                **peaks,
                "starts": before.get("starts", 0) + 1,
            }

    def _originals(self) -> dict[str, Any]:
        if ORIGINAL_IMAGES not in self.seconds:
            return {}
        passes = self.passes[ORIGINAL_IMAGES] + self.helpers.get(ORIGINAL_IMAGES, 0)
        own = {"seconds": self.seconds[ORIGINAL_IMAGES], "passes": passes}
        found = _sums(self.before.get(ORIGINAL_IMAGES, {}), own)
        return {ORIGINAL_IMAGES: {**found, "seconds": round(found["seconds"], 3)}}

    def write(self) -> None:
        if self.file is not None:
            with self._lock, self._tolerance:
                disk.write_text(self.file, plain_data.json_text(self.record(), indent=1) + "\n")

    def _lap(self, wait: bool = False) -> None:
        """Adds the cost since the last lap to the current stage. wait: first wait until the GPU has finished its
        work."""
        torch = sys.modules.get("torch")
        if wait and torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now, passed = time.perf_counter(), 0 if self._backbone is None else self._backbone.passes
        if self._stages:
            stage = self._stages[-1]
            self.seconds[stage] += now - self._since
            self.passes[stage] += passed - self._passed
            self.peaks["peak_memory_mb"] = peak = {"host": _host_peak() if self._resets else None, "device": _on_gpu()}
            if stage in ERASING:  # erasing comes first in a run, so this is its own peak
                self.peaks["peak_memory_erasing_mb"] = peak
        self._since, self._passed = now, passed

    def _write_regularly(self) -> None:
        while not self._ended.wait(self.every):
            if self.seconds:
                self.write()


def of_run(folder: Path, ranks: Ranks) -> Meter:
    """A meter for each process of a run. Only the first process writes the file."""
    return Meter(folder / paths.COSTS if ranks.first else None, processes=ranks.world)


def passes_per_image(prompts: Sequence[Prompt], base: Sampler, guide: Guide | None = None) -> float:
    """Denoiser passes per image, mean over the prompts: at each step one for the prompt, one for the empty prompt under
    guidance, and one for each prompt of the guide. Every sampler here evaluates the denoiser once per step."""

    def passes(prompt: Prompt) -> int:
        scale = base.guidance_scale if prompt.guidance_scale is None else prompt.guidance_scale
        return base.steps * (1 + (guide is not None or scale > 1) + (len(guide.prompts) if guide is not None else 0))

    mean = sum(map(passes, prompts)) / max(1, len(prompts))
    return int(mean) if mean == int(mean) else round(mean, 2)


def forget(folder: Path, stage: str) -> None:
    """Removes a stage from a run's costs before it is repeated, so that only the repetition is counted."""
    record = _read(folder / paths.COSTS)
    if stage in record.get("stages", {}):
        del record["stages"][stage]
        disk.write_text(folder / paths.COSTS, plain_data.json_text(record, indent=1) + "\n")


# --- reading costs.json ----------------------------------------------------------------------------------------------


def read(folder: Path) -> dict[str, Any]:
    """A run folder's costs.json; {} if it is missing or of another version."""
    return _read(paths.inside(folder, paths.COSTS))


def totals(record: Mapping[str, Any]) -> dict[str, float]:
    """The known numbers for tables. seconds, passes: cost to erase, with cached inputs at their original cost.
    passes_per_image: denoiser passes per image of the erased model. trained_parameters, edited_parameters. memory_mb:
    peak while erasing, of the GPU if there is one, else of the process."""
    found: dict[str, float] = {}
    stages, passes = record.get("stages", {}), record.get("passes", {})
    if "erase" in passes:  # missing if the weights existed already or nothing was erased
        cached = record.get("shared", {}).values()
        found["seconds"] = sum(stages.get(name, 0.0) for name in ERASING) + sum(c["seconds"] for c in cached)
        found["passes"] = passes["erase"] + sum(c["passes"] for c in cached)
    for name in ("passes_per_image", "trained_parameters", "edited_parameters"):
        if name in record:
            found[name] = record[name]
    peak = record.get("peak_memory_erasing_mb") or {}
    if (most := peak.get("host") if peak.get("device") is None else peak["device"]) is not None:
        found["memory_mb"] = most
    return found


def at_least(record: Mapping[str, Any]) -> bool:
    """Whether the original cost of a cached input is unknown, so that seconds and passes to erase are lower bounds."""
    return any("unknown" in cached for cached in record.get("shared", {}).values())


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """For a logger: the totals, and stage/<name> in seconds."""
    return {**totals(record), **{f"stage/{name}": seconds for name, seconds in record.get("stages", {}).items()}}


def _read(file: Path) -> dict[str, Any]:
    """{} for a file that is missing, torn or of another version: no error, because costs cannot be measured again."""
    try:
        record = plain_data.read_json(file)
    except OSError:
        return {}
    except ValueError:
        log.warning("%s is torn: the run's cost so far is unknown", file)
        return {}
    return (
        record if json_shapes.fits(record, json_shapes.COSTS) and record.get("format_version") == FORMAT_VERSION else {}
    )


def _sums(*parts: Mapping[str, Any]) -> dict[str, Any]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0) for part in parts) for name in names}


def _grouped(passes: Mapping[str, int]) -> dict[str, int]:
    """Passes to erase and to draw, without those for the original model's images."""
    groups: Iterable[tuple[str, tuple[str, ...]]] = (("erase", ERASING), ("draw", ("draw",)))
    found = {group: [passes[name] for name in names if name in passes] for group, names in groups}
    return {group: sum(counts) for group, counts in found.items() if counts}


def _largest(*values: float | None) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _described(device: str, processes: int) -> str:
    """ "cpu, 1 thread", "NVIDIA H100 80GB HBM3, 4 processes"."""
    import torch

    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        threads = torch.get_num_threads()
        name = f"{device}, {threads} thread{'s' * (threads > 1)}"
    return name if processes == 1 else f"{name}, {processes} processes"


def _reset_peaks() -> bool:
    """Resets the memory peaks; returns whether the process's own peak could be reset. Several jobs of a sweep share one
    process: without a reset the second job would report the peak of the first. Only Linux supports it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _host_peak() is not None


def _host_peak() -> float | None:
    """Peak resident memory of this process in MB, without judges in other interpreters."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    kilobytes = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
    return None if kilobytes is None else round(kilobytes * 1024 / MB, 1)


def _on_gpu() -> float | None:
    """Peak GPU memory of torch's tensors in MB; None without a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    result: float | None = round(torch.cuda.max_memory_allocated() / MB, 1)
    return result
