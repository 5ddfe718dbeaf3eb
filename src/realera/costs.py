"""What a run costs, in costs.json: wall time by stage, passes of the U-Net, parameters, peak memory. Torch is asked
only where somebody else has loaded it."""

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
from realera.files.cache_costs import Ledger
from realera.system import disk
from realera.system.disk import Tolerance
from realera.system.ranks import Ranks

if TYPE_CHECKING:
    from realera.contracts import Backbone, Guide, Prompt, Sampler

log = logging.getLogger(__name__)

FORM = 1  # of costs.json
ERASING = ("text", "edit", "latents", "train", "finish")  # what a method costs; the others are the same for all
STAGES = ("load", *ERASING, "draw", "judge")
ORIGINALS = "originals"  # the unedited model's images: of all runs together, so they stand apart in the file
MB = 1e6  # bytes


class Meter:
    """Measures a sitting of a run and adds it to what `file` holds of earlier ones; None: measures and keeps nothing.

    A stage within a stage stops the outer one's clock. The file is written whole after every stage and, within `with
    meter:`, every `every` seconds, so that of a sitting that is killed little is lost.
    """

    def __init__(self, file: Path | None = None, every: float = 30.0, processes: int = 1) -> None:
        self.file = file
        self.every = every
        self.processes = processes
        self.before = {} if file is None else _read(file)
        self.seconds: dict[str, float] = {}  # by stage
        self.passes: dict[str, int] = {}
        self.helpers: dict[str, int] = {}  # passes of the other processes
        self.known: dict[str, Any] = {}  # what is written as it is: device, parameters, ...
        self.shared: dict[str, Any] = {}
        self.peaks: dict[str, dict[str, float | None]] = {}
        self._stages: list[str] = []
        self._backbone: Backbone | None = None
        self._since, self._passed = time.perf_counter(), 0
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._writer: threading.Thread | None = None
        self._tolerance = Tolerance()
        self._resets = False  # whether the host's peak is of this sitting and not of the process

    def __enter__(self) -> Meter:
        self._resets = _reset_peaks()
        if self.file is not None:
            self._writer = threading.Thread(target=self._write_now_and_then, daemon=True)
            self._writer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._writer is not None:
            self._writer.join()
        if self._stages:
            self.end(self._stages[0])

    def watch(self, backbone: Backbone, device: str) -> None:
        """From here on, what goes through this U-Net is counted. device: "cpu" or "cuda"."""
        with self._lock:
            self._backbone, self._passed = backbone, backbone.passes
            self.known["device"] = _described(device, self.processes)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time and passes in here are `name`'s."""
        self.begin(name)
        try:
            yield
        finally:
            self.end(name)

    def begin(self, name: str) -> None:
        assert name in (*STAGES, ORIGINALS), name
        with self._lock:
            self._lap(wait=True)
            self._stages.append(name)
            self.seconds.setdefault(name, 0.0)
            self.passes.setdefault(name, 0)

    def end(self, name: str) -> None:
        """The latest stage of that name is over, and what began in it. Nothing, where there is none."""
        with self._lock:
            if name in self._stages:
                self._lap(wait=True)
                last = len(self._stages) - 1 - self._stages[::-1].index(name)
                del self._stages[last:]
                self.write()

    def note(self, **numbers: float) -> None:
        """trained_parameters, edited_parameters, passes_per_image."""
        with self._lock:
            self.known |= numbers

    def spared(self, what: str, entries: Ledger) -> None:
        """What `what` read from the cache. A run that goes on finds there what it has made itself: that was counted."""
        if what in self.before.get("shared", {}):
            return
        found = entries.total()
        own = self.before.get("stages", {}).get(what, 0.0), self.before.get("passes", {}).get("erase", 0)
        self.shared[what] = {
            "seconds": round(max(0.0, found.seconds - own[0]), 3),
            "passes": max(0, found.passes - own[1]),
            **({"unknown": entries.unknown()} if entries.unknown() else {}),
        }

    def gather(self, ranks: Ranks) -> None:
        """Adds the passes of the run's other processes; all of them call it."""
        own = dict(self.passes)
        self.helpers = {}
        for rank, passes in enumerate(ranks.gather(own)):
            for stage, count in passes.items() if rank != ranks.rank else ():
                self.helpers[stage] = self.helpers.get(stage, 0) + count
        self.write()

    def record(self) -> dict[str, Any]:
        """The content of costs.json: the sittings before and this one as far as it has come."""
        with self._lock:
            self._lap()
            before = self.before
            stages = _sums(before.get("stages", {}), self.seconds)
            known = {**{key: before[key] for key in before if key not in ("form", "sittings")}, **self.known}
            if before.get("device") not in (None, known.get("device")):
                known["device"] = f"{before['device']}; {known['device']}"
            peaks = {
                name: {place: _largest(before.get(name, {}).get(place), now) for place, now in own.items()}
                for name, own in self.peaks.items()
            }
            return {
                "form": FORM,
                **known,
                "stages": {name: round(stages[name], 3) for name in STAGES if name in stages},
                "passes": _sums(before.get("passes", {}), _grouped(self.passes), _grouped(self.helpers)),
                "shared": {**before.get("shared", {}), **self.shared},
                **self._originals(),
                **peaks,
                "sittings": before.get("sittings", 0) + 1,
            }

    def _originals(self) -> dict[str, Any]:
        if ORIGINALS not in self.seconds:
            return {}
        passes = self.passes[ORIGINALS] + self.helpers.get(ORIGINALS, 0)
        own = {"seconds": self.seconds[ORIGINALS], "passes": passes}
        found = _sums(self.before.get(ORIGINALS, {}), own)
        return {ORIGINALS: {**found, "seconds": round(found["seconds"], 3)}}

    def write(self) -> None:
        if self.file is not None:
            with self._lock, self._tolerance:
                disk.write_text(self.file, plain_data.json_text(self.record(), indent=1) + "\n")

    def _lap(self, wait: bool = False) -> None:
        """What was spent since the last lap is the current stage's. wait: for what the GPU still has to do of it."""
        torch = sys.modules.get("torch")
        if wait and torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now, passed = time.perf_counter(), 0 if self._backbone is None else self._backbone.passes
        if self._stages:
            stage = self._stages[-1]
            self.seconds[stage] += now - self._since
            self.passes[stage] += passed - self._passed
            self.peaks["peak_memory_mb"] = peak = {"host": _host_peak() if self._resets else None, "device": _on_gpu()}
            if stage in ERASING:  # the first part of a sitting, so the peak so far is its own
                self.peaks["peak_memory_erasing_mb"] = peak
        self._since, self._passed = now, passed

    def _write_now_and_then(self) -> None:
        while not self._over.wait(self.every):
            if self.seconds:
                self.write()


def of_run(folder: Path, ranks: Ranks) -> Meter:
    """What all processes of a run measure with; the first one writes."""
    return Meter(folder / paths.COSTS if ranks.first else None, processes=ranks.world)


def passes_per_image(prompts: Sequence[Prompt], base: Sampler, guide: Guide | None = None) -> float:
    """How often the U-Net is asked for one image, the mean over the prompts: at each step for the prompt, for the empty
    one where the noise is guided, and for what the guide wants to know beside. Every sampler here asks once a step."""

    def of(prompt: Prompt) -> int:
        own = base.guidance_scale if prompt.guidance_scale is None else prompt.guidance_scale
        return base.steps * (1 + (guide is not None or own > 1) + (len(guide.prompts) if guide is not None else 0))

    mean = sum(map(of, prompts)) / max(1, len(prompts))
    return int(mean) if mean == int(mean) else round(mean, 2)


def forget(folder: Path, stage: str) -> None:
    """Takes a stage out of a run's costs: it is to be done again, and only the last time counts."""
    record = _read(folder / paths.COSTS)
    if stage in record.get("stages", {}):
        del record["stages"][stage]
        disk.write_text(folder / paths.COSTS, plain_data.json_text(record, indent=1) + "\n")


# --- what is said of it ----------------------------------------------------------------------------------------------


def read(folder: Path) -> dict[str, Any]:
    """A run folder's costs.json; {} where there is none that this version can read: runs of earlier ones have none."""
    return _read(paths.inside(folder, paths.COSTS))


def totals(record: Mapping[str, Any]) -> dict[str, float]:
    """What tables print, of what is known. seconds, passes: to erase, with what was read from the cache as it cost when
    it was made; passes_per_image: of an erased model; trained_parameters, edited_parameters; memory_mb: the peak while
    erasing, of the GPU where there is one, else of the process."""
    found: dict[str, float] = {}
    stages, passes = record.get("stages", {}), record.get("passes", {})
    if "erase" in passes:  # else the weights stood already, or nothing was erased
        spared = record.get("shared", {}).values()
        found["seconds"] = sum(stages.get(name, 0.0) for name in ERASING) + sum(s["seconds"] for s in spared)
        found["passes"] = passes["erase"] + sum(s["passes"] for s in spared)
    for name in ("passes_per_image", "trained_parameters", "edited_parameters"):
        if name in record:
            found[name] = record[name]
    peak = record.get("peak_memory_erasing_mb") or {}
    if (most := peak.get("host") if peak.get("device") is None else peak["device"]) is not None:
        found["memory_mb"] = most
    return found


def at_least(record: Mapping[str, Any]) -> bool:
    """Whether something read from the cache does not say what it cost: seconds and passes to erase were more."""
    return any("unknown" in spared for spared in record.get("shared", {}).values())


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """For a logger: the totals, and stage/<name> in seconds."""
    return {**totals(record), **{f"stage/{name}": seconds for name, seconds in record.get("stages", {}).items()}}


def _read(file: Path) -> dict[str, Any]:
    """{} for a file that is missing, torn or of another version: costs are measured, and cannot be had again."""
    try:
        record = plain_data.read_json(file)
    except OSError:
        return {}
    except ValueError:
        log.warning("%s is torn: what the run has cost so far is not known", file)
        return {}
    return record if json_shapes.fits(record, json_shapes.COSTS) and record.get("form") == FORM else {}


def _sums(*parts: Mapping[str, Any]) -> dict[str, Any]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0) for part in parts) for name in names}


def _grouped(passes: Mapping[str, int]) -> dict[str, int]:
    """By what they were for, the unedited model's images left out."""
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
    """Lets peaks of memory count from here on; whether the process's own does. Several jobs of a sweep share one
    process: without this the second would be told the first one's. Linux lets it be reset, others do not."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _host_peak() is not None


def _host_peak() -> float | None:
    """Largest resident memory of this process alone (not of judges in other interpreters), MB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    kilobytes = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
    return None if kilobytes is None else round(kilobytes * 1024 / MB, 1)


def _on_gpu() -> float | None:
    """Largest memory that torch's tensors took on the GPU, MB; None without one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return round(torch.cuda.max_memory_allocated() / MB, 1)
