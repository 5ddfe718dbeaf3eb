"""What the commands share: Hydra and its resolvers, one sentence and exit status 2 for bad input, and the log.

Nothing here imports torch: `--help` and the answer to a bad config come before anything heavy is loaded.
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
from realera.sweeps import jobs
from realera.sweeps.jobs import fail
from realera.system import disk, environment, interrupts, terminal
from realera.system.environment import flags_first, gather

log = logging.getLogger("realera")
Step = Callable[[DictConfig], float | None]


def run_command(config_name: str, step: Step, positional: str | None = None) -> None:
    """Runs `step` on the composed conf/<config_name>.yaml. `positional`: the list key that bare words fill.

    Exit status: 0 done, 2 bad input (one sentence on stderr), 128 + a signal's number where one ended it. The
    unforeseen keeps its traceback. Of a sweep: 1 where a job failed, else 2 where one was refused.
    """
    terminal.protect()
    try:
        environment.stand_somewhere()
        environment.tidy(os.environ)
        sys.argv[1:] = flags_first(environment.as_text(sys.argv[1:]))
    except UserError as error:
        fail(str(error))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing: one translation, here
    os.environ.setdefault(jobs.STAMP, jobs.new_stamp())  # a sweep's runs, and processes, agree on it
    jobs.begin_launch()
    with interrupts.answered():
        try:
            status = opened(config_name, step, positional)
        except KeyboardInterrupt:
            status = interrupted()
    if status:
        sys.exit(status)


def opened(config_name: str, step: Step, positional: str | None) -> int:
    """What `run_command` does, where signals are answered; the exit status."""
    processes.adopt_scheduler(os.environ)
    arguments = sys.argv[1:]
    get_ready()
    sys.argv[1:] = gather(arguments, positional) if positional else arguments
    job = jobs.Job(step, partial(composition.prepared, command=config_name), get_ready)
    status = 0
    warnings.filterwarnings("error", message="provider=hydra.searchpath")  # a folder of yamls that is not there
    try:
        hydra.main(version_base="1.3", config_path=str(paths.CONF_DIR), config_name=config_name)(job)()
    except BaseException as error:
        if interrupts.has_come() or isinstance(error, KeyboardInterrupt):  # libraries make other errors of it
            status = interrupted()
        elif isinstance(error, SystemExit) and not error.code and (unread := terminal.status(arguments)):  # of --help
            status = unread
        elif not isinstance(error, Exception) or error in job.met:
            raise
        else:
            status = met_outside(error, config_name, arguments)
    if cells := jobs.own_cells():
        try:
            ended = jobs.close(cells)
        except KeyboardInterrupt:  # a page of many runs takes a while
            print(f"\ninterrupted: python -m realera.report {jobs.folder()} makes the page", file=sys.stderr)
            ended = interrupts.caught()
        status = status or ended
    return status or terminal.status(arguments)


def interrupted() -> int:
    """The exit status after a signal, as it is told."""
    told, status = interrupts.was_caught(), interrupts.caught()
    if not (told or is_helper()):
        print(f"\n{interrupts.GOES_ON}", file=sys.stderr)
    return status


def met_outside(error: Exception, config_name: str, arguments: list[str]) -> int:
    """The exit status after an error that no job met: the config's, which ends the process, or a sweep's launcher's.

    Raises:
        Exception: `error` itself, where it is neither.
    """
    if not jobs.own_cells():
        try:
            sentence = error_sentences.of_config(error, config_name, arguments)
        except Exception:
            if not jobs.folder().is_dir():  # no sweep had begun
                raise
        else:
            fail(sentence)
    return jobs.broke_off(error)


def as_process(main: Callable[[], None]) -> NoReturn:
    """Runs `main` and ends the process with its status once the exit handlers are through.

    The tear-down of interpreter and native libraries is left out: it takes a second or two, and an abort in it would
    make a failure of a run whose files all stand. A crash in native code shows where Python stood.
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
    sys.unraisablehook = lambda lost: None  # exit handlers of libraries whose helpers have ended before
    # as the interpreter does first: a launcher's pool of processes ends by it
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    disk.leave_nothing()  # a thread may be writing still
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def get_ready() -> None:
    """What a process needs before a config is composed in it."""
    resolvers.register_resolvers()
    set_up_log()


def is_helper() -> bool:
    """Whether this process works along with a first one, which writes and speaks."""
    return processes.is_helper(os.environ)


# --- the log ---------------------------------------------------------------------------------------------------------


def set_up_log() -> None:
    """A line per milestone of ours on stderr, warnings and worse of everybody else's."""
    log.setLevel(logging.WARNING if is_helper() else logging.INFO)
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(terminal.OneLine("%(asctime)s  %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
        log.propagate = False
    for noisy in ("lightning.pytorch", "httpx", "diffusers", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def say_backbone(config: Mapping[str, Any], run: str | None = None) -> None:
    """The one log line on which backbone was taken and why; `run`: the existing run whose own it is."""
    name, why = resolvers.default_backbone()
    taken = config["backbone"]["name"]
    asked = taken != name or any(word.startswith("backbone=") for word in sys.argv[1:])
    pretrained = config["backbone"].get("pretrained")
    named = f"{taken} from {pretrained}" if run and pretrained else taken  # a folder may name any checkpoint
    log.info("backbone %s (%s)", named, f"of {run}" if run else "as asked" if asked else why)
