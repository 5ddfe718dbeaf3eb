"""The jobs of a sweep (-m). Each job writes a line to cells.jsonl, no job stops the others, and a summary ends the
sweep.

The process that ran a job appends its line to runs/sweeps/<stamp>/cells.jsonl:
{"folder", "state": done | found (was finished before) | refused (bad input) | failed, "reason", "overrides", "seconds",
"system", "launch"}

Several commands may work on one sweep, at the same time or one after the other. Each reports the jobs of its own
launch; the page shows the cells of all launches.
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
from realera.settings.run_settings import Settings
from realera.system import devices, disk

CELLS, LISTED, FAILED = paths.CELLS, paths.RUN_LIST, paths.FAILED
STAMP = "REALERA_STAMP"
LAUNCH = "REALERA_LAUNCH"  # names the call of a command that started a job, in every process and on every machine
DONE, FOUND, REFUSED, BROKEN = "done", "found", "refused", "failed"


def axes(config: Any) -> set[str]:
    """The settings that an experiment varies (its hydra.sweeper.params)."""
    return {str(key) for key in config.sweeper.get("params") or ()}


def refuse_single_run(config: Mapping[str, Any]) -> None:
    """Refuses a single run of an experiment that is a sweep over concepts. Raises UserError."""
    if Settings(config).concept is None and not composition.in_sweep() and "concept" in axes(HydraConfig.get()):
        raise UserError("this experiment is a sweep with one job for each concept: add -m, or type concept=NAME.")


def fail(sentence: str, status: int = 2) -> NoReturn:
    """Prints the error sentence and exits."""
    print(f"error: {paths.printable(sentence)}", file=sys.stderr)
    sys.exit(status)


def new_stamp() -> str:
    """The name of a sweep that starts now. Names sort by time and differ between processes."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def begin_launch() -> None:
    """Sets the launch name of the jobs that this process starts."""
    os.environ[LAUNCH] = uuid.uuid4().hex[:8]


def folder() -> Path:
    """The sweep's folder."""
    return folders.ROOT / paths.SWEEPS / os.environ[STAMP]


# --- the list of cells -----------------------------------------------------------------------------------------------


@dataclass
class Cell:
    """One line of cells.jsonl. folder: the run folder, None if the job was refused before it had one. system: the run's
    row name in this sweep's tables, if known. launch: None in files of earlier versions."""

    folder: str | None = None
    state: str = DONE
    reason: str | None = None
    overrides: list[str] = field(default_factory=list)
    seconds: float = 0.0
    system: str | None = None
    launch: str | None = None


_running: ContextVar[Cell | None] = ContextVar("cell", default=None)  # the cell of the job that this process runs


def record_run(run: folders.Run, found: bool = False) -> None:
    """Records the run of the current job. found: the run was finished before. Outside a sweep this does nothing."""
    cell = _running.get()
    if cell is not None:
        cell.folder, cell.state, cell.system = str(run.folder), FOUND if found else DONE, system(run.config)
        disk.append(folder() / LISTED, f"{run.folder}\n")


def system(config: Mapping[str, Any]) -> str:
    """The name that tables of several runs give to a run of these settings."""
    return Settings(config).system


def read_cells(place: Path, launch: str | None = None) -> list[Cell]:
    """The cells of a sweep, or those of one launch; torn lines are skipped. Folders are relative to the current one.

    Raises:
        UserError: a file of the sweep is a symbolic link, or cells.jsonl cannot be read.
    """
    folders.check_sweep(place)
    file = place / CELLS
    try:
        lines = plain_data.content(file).splitlines() if file.is_file() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): remove it, and the page is written without it.") from error
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
    """The cells that this process and its workers have finished. Empty if the sweep's folder was refused before the
    first job."""
    try:
        return read_cells(folder(), os.environ[LAUNCH])
    except UserError:
        return []


def status(cells: Iterable[Cell]) -> int:
    """A sweep's exit status: 1 if a job failed, otherwise 2 if a job was refused, otherwise 0."""
    states = {cell.state for cell in cells}
    return 1 if BROKEN in states else 2 if REFUSED in states else 0


# --- a job -----------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """The function that Hydra runs: `step` on the config that `prepare` returns. It returns the step's number (the
    objective of a search) or None. A sweep calls it once for each job, perhaps in another process or on another
    machine, and an error of one job does not stop the others. Outside a sweep, bad input ends the process with exit
    status 2.

    arrive: prepares another process as the command prepared this one. step_errors: the errors of the step, so that
    they are not mistaken for errors in the settings.
    """

    step: Callable[[DictConfig], float | None]
    prepare: Callable[[DictConfig], DictConfig]
    arrive: Callable[[], None]
    step_errors: list[Exception] = field(default_factory=list)

    def __call__(self, cfg: DictConfig) -> float | None:
        if not composition.in_sweep():
            return self._run_single(cfg)
        cell = Cell(overrides=composition.typed_words(HydraConfig.get()), launch=os.environ.get(LAUNCH))
        token, began = _running.set(cell), time.monotonic()
        value = None
        try:
            value = self.step(self.prepare(cfg))
            if value is None and cell.state == DONE and "direction" in HydraConfig.get().sweeper:
                raise UserError("the run has no H_o, which a search maximises: choose a task that has it.")
        except KeyboardInterrupt:
            raise
        except (Exception, SystemExit) as error:
            _explain(cell, error)
        finally:
            _running.reset(token)
        cell.seconds = round(time.monotonic() - began, 2)
        disk.append(folder() / CELLS, plain_data.json_text(asdict(cell), ensure_ascii=False) + "\n")
        return value

    def _run_single(self, cfg: DictConfig) -> float | None:
        try:
            ready = self.prepare(cfg)
        except UserError as error:
            fail(str(error))
        try:
            return self.step(ready)
        except Exception as error:
            self.step_errors.append(error)
            if (sentence := error_sentences.of_step(error)) is None:
                raise
            fail(sentence)  # raises SystemExit: Hydra would add a line of its own to any other exception

    def __getstate__(self) -> dict[str, Any]:
        own = {name: os.environ[name] for name in (STAMP, LAUNCH, "HYDRA_FULL_ERROR") if name in os.environ}
        seen = os.environ.get(devices.VISIBLE)
        origin = {"environ": own, "cwd": os.getcwd(), "gpus": devices.visible(), "seen": seen}
        return {**self.__dict__, "step_errors": [], "_origin": origin}

    def __setstate__(self, state: dict[str, Any]) -> None:
        origin = state.pop("_origin")
        self.__dict__.update(state)
        os.environ.update(origin["environ"])
        if Path(origin["cwd"]).is_dir():
            os.chdir(origin["cwd"])
        devices.take(origin["gpus"], origin["seen"])  # before anything asks the driver: it looks at the variable once
        self.arrive()


def _explain(cell: Cell, error: BaseException) -> None:
    """Writes the reason why a job ended to its cell and to stderr. Saves the traceback of an unexpected error."""
    sentence = error_sentences.of_step(error) if isinstance(error, Exception) else None
    if sentence is not None:
        cell.state, cell.reason = REFUSED, sentence
    else:
        number = HydraConfig.get().job.num  # each launch counts from 0
        cell.state, cell.reason = BROKEN, f"{_save_traceback(error, f'{cell.launch}-{number}')}."
    print(f"error: {cell.reason}", file=sys.stderr, flush=True)


def _save_traceback(error: BaseException, name: str) -> str:
    """Saves the traceback of an unexpected error. Returns the error's message with the file's path."""
    file, whole = folder() / FAILED / f"{name}.txt", "".join(traceback.format_exception(error))
    said = f"{type(error).__name__}: {error_sentences.first_line(error)}".removesuffix(".")
    try:
        disk.write_text(file, whole)
    except OSError:  # perhaps a full disk
        print(whole, file=sys.stderr)
        return said
    return f"{said} (traceback in {file})"


# --- the end ---------------------------------------------------------------------------------------------------------


def report_launcher_error(error: Exception) -> int:
    """Reports why a launcher gave up before all jobs had run, and returns the exit status. A worker that is killed (out
    of memory, time limit) ends its launcher in this way; the same command then runs the remaining jobs."""
    if (sentence := error_sentences.of_step(error)) is not None:
        print(f"error: the sweep ended early: {sentence}", file=sys.stderr)
        return status([Cell(state=REFUSED)])
    met = _save_traceback(error, os.environ[LAUNCH])
    print(f"error: the sweep ended early, by {met}: the same command runs the remaining jobs.", file=sys.stderr)
    return status([Cell(state=BROKEN)])


def close(cells: list[Cell]) -> int:
    """Ends a launch: prints the number of cells by state and the reasons, writes the page of the whole sweep, and
    returns the exit status."""
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
