"""Shared by all commands: starting Hydra, one sentence and exit status 2 for bad input, and the log.

This module does not import torch, so that `--help` and errors in the settings are fast.
"""

from __future__ import annotations

import atexit
import faulthandler
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

import hydra
from omegaconf import DictConfig

from realera import paths
from realera.contracts import UserError
from realera.runs import processes
from realera.settings import composition, error_sentences, resolvers
from realera.settings.run_settings import Settings
from realera.sweeps import jobs
from realera.sweeps.jobs import fail
from realera.system import disk, environment, interrupts, terminal
from realera.system.environment import as_list_setting, flags_first

log = logging.getLogger("realera")
Step = Callable[[DictConfig], float | None]


def run_command(config_name: str, step: Step, positional: str | None = None) -> None:
    """Runs `step` on the composed conf/<config_name>.yaml. `positional`: the list setting that words without a key
    fill.

    Exit status: 0 done; 2 bad input (one sentence on stderr); 128 + the number of the signal that ended the command.
    Other errors show their traceback. A sweep: 1 if a job failed, otherwise 2 if a job was refused.
    """
    terminal.protect()
    try:
        environment.check_current_folder()
        environment.remove_empty_variables(os.environ)
        sys.argv[1:] = flags_first(environment.as_text(sys.argv[1:]))
        composition.check_hydra_words(sys.argv[1:])
    except UserError as error:
        fail(str(error))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of print: its errors become sentences here
    os.environ.setdefault(jobs.STAMP, jobs.new_stamp())  # the same for all runs and processes of a sweep
    jobs.begin_launch()
    try:
        with interrupts.handling():
            try:
                status = _run(config_name, step, positional)
            except KeyboardInterrupt:
                status = _status_of_signal()
    except KeyboardInterrupt:  # the signal came before `handling` reached its block
        status = _status_of_signal()
    if status:
        sys.exit(status)


def _run(config_name: str, step: Step, positional: str | None) -> int:
    """The part of `run_command` during which signals are handled. Returns the exit status."""
    processes.adopt_scheduler(os.environ)
    arguments = sys.argv[1:]
    get_ready()
    sys.argv[1:] = as_list_setting(arguments, positional) if positional else arguments
    job = jobs.Job(step, partial(composition.prepared, command=config_name), get_ready)
    status = 0
    warnings.filterwarnings("error", message="provider=hydra.searchpath")  # a config folder that does not exist
    try:
        hydra.main(version_base="1.3", config_path=str(paths.CONF_DIR), config_name=config_name)(job)()
    except BaseException as error:
        if interrupts.was_interrupted() or isinstance(error, KeyboardInterrupt):  # libraries turn it into other errors
            status = _status_of_signal()
        elif isinstance(error, SystemExit) and not error.code and (unread := terminal.status(arguments)):  # --help
            status = unread
        elif not isinstance(error, Exception) or error in job.step_errors:
            raise
        else:
            status = _status_outside_jobs(error, config_name, arguments)
    if cells := jobs.own_cells():
        try:
            ended = jobs.close(cells)
        except KeyboardInterrupt:  # a page of many runs takes a while
            print(f"\ninterrupted: python -m realera.report {jobs.folder()} writes the page", file=sys.stderr)
            ended = interrupts.exit_status()
        status = status or ended
    return status or terminal.status(arguments)


def _status_of_signal() -> int:
    """The exit status after a signal, which the first process reports on stderr."""
    told, status = interrupts.was_caught(), interrupts.exit_status()
    if not (told or is_helper()):
        print(f"\n{interrupts.GOES_ON}", file=sys.stderr)
    return status


def _status_outside_jobs(error: Exception, config_name: str, arguments: list[str]) -> int:
    """The exit status after an error outside of any job. An error in the settings ends the process with its sentence;
    an error of a sweep's launcher is reported.

    Raises:
        Exception: `error` itself, if it is neither.
    """
    if not jobs.own_cells():
        try:
            sentence = error_sentences.of_config(error, config_name, arguments)
        except Exception:
            if not jobs.folder().is_dir():  # no sweep had started
                raise
        else:
            fail(sentence)
    return jobs.report_launcher_error(error)


def as_process(main: Callable[[], None]) -> NoReturn:
    """Runs `main`, then the exit handlers, and ends the process with main's status.

    The tear-down of the interpreter and of native libraries is skipped: it takes a second or two, and an abort in it
    would report a failure although all files of the run are written. A crash in native code prints the Python stack.
    """
    terminal.protect()
    faulthandler.enable()
    status = 0
    try:
        main()
    except SystemExit as error:
        if not isinstance(error.code, int | None):
            raise
        status = error.code or 0
    interrupts.done(status)
    sys.unraisablehook = lambda lost: None  # libraries' exit handlers fail if their helper processes ended earlier
    # the interpreter does this first as well: it ends a launcher's pool of processes
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    disk.clean_up_before_exit()  # a thread may still be writing
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def get_ready() -> None:
    """Prepares a process for composing a config."""
    resolvers.register_resolvers()
    set_up_log()


def is_helper() -> bool:
    """Whether this is not the first process of a run. Only the first one writes files and log lines."""
    return processes.is_helper(os.environ)


# --- the log ---------------------------------------------------------------------------------------------------------


def set_up_log() -> None:
    """Logs our own milestones to stderr, and only warnings and errors of libraries."""
    log.setLevel(logging.WARNING if is_helper() else logging.INFO)
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(terminal.OneLine("%(asctime)s  %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
        log.propagate = False
    for noisy in ("lightning.pytorch", "httpx", "diffusers", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def say_backbone(config: Mapping[str, Any], run: str | None = None) -> None:
    """Logs which backbone is used and why, in one line. run: the existing run that it comes from, if any."""
    name, why = resolvers.default_backbone()
    backbone = Settings(config).backbone
    taken = backbone.name
    asked = taken != name or any(word.startswith("backbone=") for word in sys.argv[1:])
    named = (
        f"{taken} from {backbone.pretrained}" if run and backbone.pretrained else taken
    )  # a run folder may name any checkpoint
    log.info("backbone %s (%s)", named, f"of {run}" if run else "as typed" if asked else why)
