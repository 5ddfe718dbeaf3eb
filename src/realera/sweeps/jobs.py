"""The jobs of a sweep (-m): each leaves a line in the sweep's ledger, none stops the others, the end says how it went.

runs/sweeps/<stamp>/cells.jsonl is appended to by whichever process ran the job, whatever launched it:
{"folder", "state": done | found (was finished before) | refused (bad input) | failed, "reason", "overrides", "seconds",
"system", "launch"}

Several processes may be at one sweep, side by side or one after the other: each speaks for the jobs of its own launch,
and the page shows the cells of all.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from realera import paths
from realera.contracts import UserError
from realera.files import json_shapes, plain_data
from realera.runs import folders
from realera.settings import composition, error_sentences
from realera.system import devices, disk

CELLS, LISTED, FAILED = paths.CELLS, paths.LISTED, paths.FAILED
STAMP = "REALERA_STAMP"
LAUNCH = "REALERA_LAUNCH"  # which call of a command began a job, wherever the job runs
DONE, FOUND, REFUSED, BROKEN = "done", "found", "refused", "failed"


def axes(config: Any) -> set[str]:
    """What settings vary by themselves: an experiment's hydra.sweeper.params."""
    return {str(key) for key in config.sweeper.get("params") or ()}


def refuse_lone(settings: Mapping[str, Any]) -> None:
    """A single run needs a concept, where a sweep's settings have several."""
    if settings.get("concept") is None and not composition.in_sweep() and "concept" in axes(HydraConfig.get()):
        raise UserError("these settings are a sweep's, one job for each concept: add -m, or type one, concept=NAME.")


def fail(sentence: str) -> NoReturn:
    """Says what is wrong and leaves with exit status 2."""
    print(f"error: {paths.printable(sentence)}", file=sys.stderr)
    sys.exit(2)


def new_stamp() -> str:
    """The name of a sweep that begins now: sorted by time, and another one for each process that begins one."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def begin_launch() -> None:
    """Gives the jobs that this process is going to start a name of their own."""
    os.environ[LAUNCH] = uuid.uuid4().hex[:8]


def folder() -> Path:
    """Where this sweep's own files stand."""
    return folders.ROOT / paths.SWEEPS / os.environ[STAMP]


# --- the ledger ------------------------------------------------------------------------------------------------------


@dataclass
class Cell:
    """One line of the ledger. folder: the run's, None if it was refused before it had one. system: its row's name in
    this sweep's tables, if known. launch: None in the ledgers of earlier versions."""

    folder: str | None = None
    state: str = DONE
    reason: str | None = None
    overrides: list[str] = field(default_factory=list)
    seconds: float = 0.0
    system: str | None = None
    launch: str | None = None


_running: ContextVar[Cell | None] = ContextVar("cell", default=None)  # of the job that runs here


def belongs(run: folders.Run, found: bool = False) -> None:
    """Said by a job of its run, once it is known; `found`: it was finished before. Outside a sweep nothing is noted."""
    cell = _running.get()
    if cell is not None:
        cell.folder, cell.state, cell.system = str(run.folder), FOUND if found else DONE, system(run.config)
        disk.append(folder() / LISTED, f"{run.folder}\n")


def system(config: Mapping[str, Any]) -> str:
    """What tables of several runs call one of these settings."""
    return str(config.get("label") or (config.get("method") or {}).get("name") or "original")


def read_cells(place: Path, launch: str | None = None) -> list[Cell]:
    """The ledger's cells, or those of one launch, their folders as they are found from here; no torn lines.

    Raises:
        UserError: a file of the sweep is a symbolic link, or the ledger cannot be read.
    """
    folders.check_sweep(place)
    file = place / CELLS
    try:
        lines = plain_data.content(file).splitlines() if file.is_file() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): remove it, and the page does without it.") from error
    found = []
    for line in lines:
        try:
            cell = Cell(**plain_data.json_of(line.decode("utf-8")))
        except (ValueError, TypeError):
            continue
        if not json_shapes.fits(asdict(cell), json_shapes.CELL):
            continue
        cell.folder = None if cell.folder is None else str(folders.listed_by(place, cell.folder))
        found.append(cell)
    return [cell for cell in found if launch is None or cell.launch == launch]


def own_cells() -> list[Cell]:
    """The cells that this process, or its workers, have come to the end of; none of a folder that was refused before
    the first job."""
    try:
        return read_cells(folder(), os.environ[LAUNCH])
    except UserError:
        return []


def status(cells: Iterable[Cell]) -> int:
    """A sweep's exit status: 1 where a job failed, 2 where one was refused and none failed, else 0."""
    states = {cell.state for cell in cells}
    return 1 if BROKEN in states else 2 if REFUSED in states else 0


# --- a job -----------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """What Hydra runs: `step` on the config that `prepare` makes ready. In a sweep it is called once a job, maybe in
    another process or on another machine, and then nothing it meets stops the other jobs; it returns the step's number
    (what a search maximises) or None. Outside a sweep bad input ends the process with exit status 2.

    arrive: makes another process as ready as the command has made this one. met: errors of the step, which are not the
    config's, whatever their class.
    """

    step: Callable[[DictConfig], float | None]
    prepare: Callable[[DictConfig], DictConfig]
    arrive: Callable[[], None]
    met: list[Exception] = field(default_factory=list)

    def __call__(self, cfg: DictConfig) -> float | None:
        if not composition.in_sweep():
            return self._alone(cfg)
        cell = Cell(overrides=composition.typed_words(HydraConfig.get()), launch=os.environ.get(LAUNCH))
        token, began = _running.set(cell), time.monotonic()
        value = None
        try:
            value = self.step(self.prepare(cfg))
            if value is None and cell.state == DONE and "direction" in HydraConfig.get().sweeper:
                raise UserError("the run ended without an H_o to search by: search a task that has it.")
        except KeyboardInterrupt:
            raise
        except (Exception, SystemExit) as error:
            _explain(cell, error)
        finally:
            _running.reset(token)
        cell.seconds = round(time.monotonic() - began, 2)
        disk.append(folder() / CELLS, plain_data.json_text(asdict(cell), ensure_ascii=False) + "\n")
        return value

    def _alone(self, cfg: DictConfig) -> float | None:
        try:
            ready = self.prepare(cfg)
        except UserError as error:
            fail(str(error))
        try:
            return self.step(ready)
        except Exception as error:
            self.met.append(error)
            if (sentence := error_sentences.of_step(error)) is None:
                raise
            fail(sentence)  # SystemExit passes Hydra, which would add a line of its own to any other exception

    def __getstate__(self) -> dict[str, Any]:
        own = {name: os.environ[name] for name in (STAMP, LAUNCH, "HYDRA_FULL_ERROR") if name in os.environ}
        away = {"environ": own, "cwd": os.getcwd(), "gpus": devices.visible(), "seen": os.environ.get(devices.VISIBLE)}
        return {**self.__dict__, "met": [], "_away": away}

    def __setstate__(self, state: dict[str, Any]) -> None:
        away = state.pop("_away")
        self.__dict__.update(state)
        os.environ.update(away["environ"])
        if Path(away["cwd"]).is_dir():
            os.chdir(away["cwd"])
        devices.take(away["gpus"], away["seen"])  # before anything asks the driver: it looks at the variable once
        self.arrive()


def _explain(cell: Cell, error: BaseException) -> None:
    """Writes the reason why a job ended into its cell and onto stderr; an unforeseen error's traceback is kept too."""
    sentence = error_sentences.of_step(error) if isinstance(error, Exception) else None
    if sentence is not None:
        cell.state, cell.reason = REFUSED, sentence
    else:
        number = HydraConfig.get().job.num  # counted from 0 by each launch
        cell.state, cell.reason = BROKEN, f"{_kept(error, f'{cell.launch}-{number}')}."
    print(f"error: {cell.reason}", file=sys.stderr, flush=True)


def _kept(error: BaseException, name: str) -> str:
    """An unforeseen error's message, and the file in which its traceback is kept."""
    file, whole = folder() / FAILED / f"{name}.txt", "".join(traceback.format_exception(error))
    said = f"{type(error).__name__}: {error_sentences.first_line(error)}".removesuffix(".")
    try:
        disk.write_text(file, whole)
    except OSError:  # of a full disk, say, which is what there is to tell
        print(whole, file=sys.stderr)
        return said
    return f"{said} (traceback in {file})"


# --- the end ---------------------------------------------------------------------------------------------------------


def broke_off(error: Exception) -> int:
    """Says why a launcher gave up before all jobs had run, and returns the exit status. A worker that is killed (out of
    memory, out of a scheduler's time) ends a launcher so; the same command goes on with the rest."""
    if (sentence := error_sentences.of_step(error)) is not None:
        print(f"error: the sweep ended early: {sentence}", file=sys.stderr)
        return status([Cell(state=REFUSED)])
    met = _kept(error, os.environ[LAUNCH])
    print(f"error: the sweep ended early, by {met}: the same command goes on with the rest.", file=sys.stderr)
    return status([Cell(state=BROKEN)])


def close(cells: list[Cell]) -> int:
    """Ends a launch: shows how many cells were done, found or failed, and why; writes the page of the whole sweep.
    Returns the exit status."""
    from realera import console

    console.show_cells([asdict(cell) for cell in cells])
    whole = [Path(line) for line in folders.listed_in(folder() / LISTED)]
    if any((run / paths.METRICS).is_file() for run in whole):
        from realera.reporting.sweep.page import write_sweep

        try:
            page = write_sweep(whole, folder() / paths.REPORT, [asdict(cell) for cell in read_cells(folder())])
            console.show_path("page to open", page)
        except UserError as error:
            print(f"error: {paths.printable(str(error))}", file=sys.stderr)
            return status(cells) or 2
    return status(cells)
