"""What the doors share: Hydra and its resolvers, one sentence and exit status 2 for bad input, and the log.

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
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from realera import complaints, disk, interrupts, output, paths, processes, surroundings, sweep
from realera.composed import checked as checked
from realera.composed import name_concepts as name_concepts
from realera.composed import plain as plain
from realera.contracts import Task, UserError
from realera.devices import number as cuda_devices
from realera.parts import build
from realera.sources import find
from realera.surroundings import flags_first, gather
from realera.sweep import fail
from realera.sweep import in_sweep as in_sweep  # the doors ask here
from realera.tasks.files import read_concepts

log = logging.getLogger("realera")
WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # W&B's own, before and after its move
Step = Callable[[DictConfig], float | None]


def door(config_name: str, step: Step, positional: str | None = None) -> None:
    """Runs `step` on the composed conf/<config_name>.yaml. `positional`: the list key that bare words fill.

    Exit status: 0 done, 2 bad input (one sentence on stderr), 128 + a signal's number where one ended it. The
    unforeseen keeps its traceback. Of a sweep: 1 where a job failed, else 2 where one was refused.
    """
    output.protect()
    try:
        surroundings.stand_somewhere()
        surroundings.tidy(os.environ)
        sys.argv[1:] = flags_first(surroundings.as_text(sys.argv[1:]))
    except UserError as error:
        fail(str(error))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing: one translation, here
    os.environ.setdefault(sweep.STAMP, sweep.new_stamp())  # a sweep's runs, and processes, agree on it
    sweep.begin_launch()
    with interrupts.answered():
        try:
            status = opened(config_name, step, positional)
        except KeyboardInterrupt:
            status = interrupted()
    if status:
        sys.exit(status)


def opened(config_name: str, step: Step, positional: str | None) -> int:
    """What `door` does, where signals are answered; the exit status."""
    processes.adopt_scheduler(os.environ)
    arguments = sys.argv[1:]
    get_ready()
    sys.argv[1:] = gather(arguments, positional) if positional else arguments
    job = sweep.Job(step, partial(prepared, door=config_name), get_ready)
    status = 0
    warnings.filterwarnings("error", message="provider=hydra.searchpath")  # a folder of yamls that is not there
    try:
        hydra.main(version_base="1.3", config_path=str(paths.CONF_DIR), config_name=config_name)(job)()
    except BaseException as error:
        if interrupts.has_come() or isinstance(error, KeyboardInterrupt):  # libraries make other errors of it
            status = interrupted()
        elif isinstance(error, SystemExit) and not error.code and (unread := output.status(arguments)):  # of --help
            status = unread
        elif not isinstance(error, Exception) or error in job.met:
            raise
        else:
            status = met_outside(error, config_name, arguments)
    if cells := sweep.own_cells():
        try:
            ended = sweep.close(cells)
        except KeyboardInterrupt:  # a page of many runs takes a while
            print(f"\ninterrupted: python -m realera.report {sweep.folder()} makes the page", file=sys.stderr)
            ended = interrupts.caught()
        status = status or ended
    return status or output.status(arguments)


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
    if not sweep.own_cells():
        try:
            sentence = complaints.of_config(error, config_name, arguments)
        except Exception:
            if not sweep.folder().is_dir():  # no sweep had begun
                raise
        else:
            fail(sentence)
    return sweep.broke_off(error)


def as_process(main: Callable[[], None]) -> NoReturn:
    """Runs `main` and ends the process with its status once the exit handlers are through.

    The tear-down of interpreter and native libraries is left out: it takes a second or two, and an abort in it would
    make a failure of a run whose files all stand. A crash in native code shows where Python stood.
    """
    output.protect()
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


def prepared(cfg: DictConfig, door: str) -> DictConfig:
    """The composed config as a step takes it. Raises UserError for a setting that cannot be."""
    checked(cfg, door)
    judged = with_judge(cfg)
    if judged is not cfg:
        checked(judged, door)
    return with_concepts(judged)


def get_ready() -> None:
    """What a process needs before a config is composed in it."""
    register_resolvers()
    set_up_log()


def is_helper() -> bool:
    """Whether this process works along with a first one, which writes and speaks."""
    return processes.is_helper(os.environ)


def with_judge(cfg: DictConfig) -> DictConfig:
    """The config with the judge that the task names for this backbone (`judges` in its yaml), unless one was typed: it
    is composed once more, from where it came from, which --config-name and hydra.searchpath may have moved."""
    hydra_config = HydraConfig.get()
    typed = sweep.words(hydra_config)
    open_choice = "judge" in hydra_config.runtime.choices and hydra_config.runtime.choices["judge"] is None
    if not open_choice or "judges" not in (cfg.get("task") or {}) or any(w.startswith("judge=") for w in typed):
        return cfg
    found = [word for word in hydra_config.overrides.hydra if word.lstrip("+").startswith("hydra.searchpath=")]
    judge = f"judge={by_backbone(cfg.task.judges, _root_=cfg)}"
    return hydra.compose(hydra_config.job.config_name, [*found, *typed, judge])


def with_concepts(cfg: DictConfig) -> DictConfig:
    """The config with the names and anchors of `concepts_file` in place of the file; names that are numbers become
    texts, as a run's folder keeps them.

    Raises:
        UserError: the file cannot be read, or concepts or anchors are given twice.
    """
    for key in ("concept", "anchor"):
        if has_numbers(given := cfg.get(key)):
            texts = [None if name is None else str(name) for name in (given if OmegaConf.is_list(given) else [given])]
            cfg[key] = texts if OmegaConf.is_list(given) else texts[0]
    file, anchor = cfg.get("concepts_file"), cfg.get("anchor")
    if file is None:
        return cfg
    if cfg.concept is not None:
        raise UserError("concept and concepts_file are both given: leave one of them out.")
    names, anchors = zip(*read_concepts(file))
    if OmegaConf.is_list(anchor) and any(anchors):
        raise UserError(f"anchor is a list and {file} holds anchors too: leave one of them out.")
    if not OmegaConf.is_list(anchor):
        listed = [own or anchor for own in anchors]  # a typed anchor is for the names that have none of their own
        cfg.anchor = listed if any(listed) and len(listed) > 1 else listed[0]
    cfg.concept = list(names) if len(names) > 1 else names[0]
    cfg.concepts_file = None
    return cfg


def has_numbers(names: Any) -> bool:
    """Whether a number is among one or several names, as in concept=1984."""
    return any(isinstance(name, int) for name in ([names] if isinstance(names, str | int | None) else names))


def build_task(config: Mapping[str, Any]) -> Task:
    """The task of a resolved config. Tasks load without torch, so their refusals come early."""
    task: Task = build({key: value for key, value in config["task"].items() if key != "judges"})
    return task


# --- resolvers -------------------------------------------------------------------------------------------------------


def register_resolvers() -> None:
    """Makes ${default_backbone:}, ${by_backbone:...}, ${by_task:...}, ${by_space:...}, ${times:...} and ${wandb_mode:}
    known to every config."""
    OmegaConf.register_new_resolver("default_backbone", lambda: default_backbone()[0], replace=True)
    OmegaConf.register_new_resolver("by_backbone", by_backbone, replace=True)
    OmegaConf.register_new_resolver("by_task", by_task, replace=True)
    OmegaConf.register_new_resolver("by_space", by_space, replace=True)
    OmegaConf.register_new_resolver("times", lambda a, b: a * b, replace=True)  # ${times:1000,${seed}}
    OmegaConf.register_new_resolver("wandb_mode", wandb_mode, replace=True)


@cache
def default_backbone() -> tuple[str, str]:
    """(backbone, why): Stable Diffusion 1.4 where the installed torch can use a CUDA device, else the miniature."""
    if not cuda_devices():
        return "mini", "no CUDA device; backbone=sd14 takes Stable Diffusion 1.4 all the same"
    try:
        build = metadata.version("torch")
    except metadata.PackageNotFoundError:
        build = ""
    if "+cpu" in build:
        return (
            "mini",
            f"torch {build} cannot use the CUDA device; backbone=sd14 takes Stable Diffusion 1.4 all the same",
        )
    return "sd14", "a CUDA device is there; backbone=mini takes the small model that ships with the package"


def by_backbone(table: Mapping[str, Any], *, _root_: DictConfig) -> Any:
    """`${by_backbone:{default:1e-5,mini:1e-3}}`: the entry of the chosen backbone's `name`, else `default`."""
    name = OmegaConf.select(_root_, "backbone.name")
    if not isinstance(name, str):
        raise UserError(f"backbone.name={'null' if name is None else name} cannot be: give a text, such as sd14.")
    if name not in table and "default" not in table:
        raise UserError(f"no value is known for backbone {name} (there are {', '.join(table)}): type one.")
    return table[name] if name in table else table["default"]


def by_task(table: Mapping[str, Any], *, _root_: DictConfig) -> Any:
    """`${by_task:{default:0.1,style:0.001}}`: the entry of the chosen task's `name`, else `default`."""
    target = OmegaConf.select(_root_, "task._target_")
    if target is not None and isinstance(found := find(str(target)), str):
        raise UserError(f"task._target_={target}: {found}; leave it as the yaml has it.")
    task: Any = None if target is None else get_class(target)  # tasks load without torch
    return table.get(str(getattr(task, "name", None)), table["default"])


def by_space(table: Mapping[str, Any], *, _root_: DictConfig) -> Any:
    """`${by_space:{default:25,value:100}}`: the entry of the space in which neighbours are mined, else `default`."""
    return table.get(str(OmegaConf.select(_root_, "method.neighbours.space")), table["default"])


def wandb_mode() -> str:
    """WANDB_MODE where it is set, else "online" for who is logged in and "offline" for everybody else."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        known = netrc.read_text(encoding="utf-8", errors="replace") if netrc.is_file() else ""  # no pipe
    except OSError:
        known = ""
    own = urlsplit(os.environ.get("WANDB_BASE_URL", "")).netloc  # a server of one's own
    logged_in = any(host in known for host in ((own,) if own else WANDB_HOSTS))
    return "online" if logged_in or os.environ.get("WANDB_API_KEY") else "offline"


# --- the log ---------------------------------------------------------------------------------------------------------


def set_up_log() -> None:
    """A line per milestone of ours on stderr, warnings and worse of everybody else's."""
    log.setLevel(logging.WARNING if is_helper() else logging.INFO)
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(output.OneLine("%(asctime)s  %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
        log.propagate = False
    for noisy in ("lightning.pytorch", "httpx", "diffusers", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def say_backbone(config: Mapping[str, Any], run: str | None = None) -> None:
    """The one log line on which backbone was taken and why; `run`: the existing run whose own it is."""
    name, why = default_backbone()
    taken = config["backbone"]["name"]
    asked = taken != name or any(word.startswith("backbone=") for word in sys.argv[1:])
    pretrained = config["backbone"].get("pretrained")
    named = f"{taken} from {pretrained}" if run and pretrained else taken  # a folder may name any checkpoint
    log.info("backbone %s (%s)", named, f"of {run}" if run else "as asked" if asked else why)
