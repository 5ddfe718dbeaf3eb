"""Run folders: the folder that belongs to a run's settings, its files, and whether the run is finished."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from realera import __version__, costs, paths
from realera.backbones import folder as checkpoint
from realera.contracts import UserError
from realera.files import checksums, json_shapes, plain_data
from realera.runs import repairs, trust
from realera.settings import schema
from realera.settings.run_settings import Settings
from realera.system import disk, locks
from realera.tasks.prompts import slug

ROOT = Path("runs")  # unless `root` says otherwise
SPELT_OUT = 3  # most concepts that are all named in titles and folder names
FILES = (
    paths.CONFIG,  # first: see `_clear`
    paths.ERASED,
    paths.MAP,
    paths.NEIGHBOURS,
    paths.MANIFEST,
    paths.METRICS,
    paths.REPORT,
    paths.LOSSES,
    paths.EDIT_INFO,
    paths.COSTS,
    paths.WANDB_ID,
    paths.MLFLOW_ID,
)
FOLDERS = (paths.VERDICTS, paths.IMAGES, paths.FIT, paths.ORIGINALS, paths.ATTACKS, *paths.TRACKED)


@dataclass(frozen=True)
class Run:
    """A run folder and its settings. finished: all files that these settings require exist."""

    folder: Path
    config: dict[str, Any]
    finished: bool = False

    @property
    def erased(self) -> Path:
        return self.folder / paths.ERASED

    @property
    def settings(self) -> Settings:
        return Settings(self.config)


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a run's weights and numbers depend on: not those of its hardware and its logger."""
    kept = {key: config.get(key) for key in ("task", "method", "backbone", "concept", "anchor", "seed")}
    settings = Settings(config)
    if settings.trainer.clip != "method":
        kept["gradient_clip_val"] = settings.trainer.clip
    sums = {file: _content(file) for file in sorted(_sums(settings.method.node)) if paths.file_of(file) is not None}
    if sums:  # by content, as for the tables
        kept["sums"] = sums
    if tables := settings.task.tables:  # by content, because a file can change under the same name
        kept["tables"] = {key: _content(file) for key, file in tables.items()}
    if (weights := settings.weights or weights_of(config)) is not None:  # weights can change in the same folder
        kept["weights"] = weights
    return {**kept, "precision": settings.trainer.precision, "version": __version__}


def weights_of(config: Mapping[str, Any]) -> str | None:
    """A text that identifies the weights in a local folder or file. None for a model of the hub, and for the built-in
    model, which the package's version identifies."""
    pretrained = Settings(config).backbone.pretrained
    if pretrained is None or (place := paths.dir_of(pretrained) or paths.file_of(pretrained)) is None:
        return None
    return checkpoint.quick_fingerprint(place)


def _sums(node: Any) -> Iterator[str]:
    """The files of captions, of sums over captions and of texts that a method's settings name, at any depth."""
    for key, value in node.items() if isinstance(node, Mapping) else ():
        if key in ("prior_cache", "domain_cache", "captions") and isinstance(value, str):
            yield value
        elif key == "vocabulary" and isinstance(value, list):
            yield from (str(name) for name in value if name not in ("words", "everyday"))
        yield from _sums(value)


def _content(name: Any) -> str | None:
    """16 hex digits of a file's content; None if there is no such file."""
    file = paths.file_of(name)
    return None if file is None else checksums.sha256_of(file)[:16]


def digest(content: Any) -> str:
    """The first 8 hex digits of the SHA-256 of the content as JSON."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def concept_of(config: Mapping[str, Any]) -> str:
    """A run's concepts as one text."""
    names = Settings(config).concepts
    return ", ".join(names) if len(names) <= SPELT_OUT else f"{names[0]} and {len(names) - 1} more"


def title(config: Mapping[str, Any]) -> str:
    """ "cat erased by uce", "cat, the original model"."""
    settings = Settings(config)
    done = ", the original model" if settings.unedited else f" erased by {settings.method.name}"
    return f"{concept_of(config)}{done}"


def folder_of(config: Mapping[str, Any]) -> Path:
    """run_dir if it was typed, otherwise <root>/<concept>-<method>-<backbone>-<hash>: equal settings share a folder."""
    settings = Settings(config)
    if settings.run_dir is not None:
        return settings.run_dir
    names = [slug(concept_of(config)), slug(str(settings.method.name)), slug(str(settings.backbone.name))]
    return (settings.root or ROOT) / f"{'-'.join(names)}-{digest(identity(config))}"


@contextmanager
def locked(folder: Path, first: bool = True, key: str = "run_dir") -> Iterator[None]:
    """Locks a folder against other commands. first: whether this is the run's first process, which takes the lock. key:
    the setting that chooses another folder.

    Raises:
        UserError: another command is using the folder.
    """
    if not first:
        yield
        return
    check_files(folder)
    with locks.run_lock(folder / paths.LOCK, str(folder), f"wait until it has ended, or choose another {key}"):
        for name in ("", *FOLDERS):
            disk.remove_stale(folder / name)
        yield


def find(config: Mapping[str, Any]) -> tuple[Path, dict[str, Any] | None]:
    """The run's folder, and the settings of the run in it, if that run can be continued. Nothing is changed.

    A finished run with a torn file is continued, so that the file is made again. All files are checked except the
    images, which are checked when they are used (see `evaluation.generate`).

    Raises:
        UserError: the folder contains a run with other settings, or files that do not belong to a run.
    """
    folder = folder_of(config)
    check_files(folder)
    is_run = (folder / paths.CONFIG).is_file()
    if not is_run and folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder} contains files and is not a run folder: choose another run_dir.")
    stored = read_config(folder) if is_run and not Settings(config).overwrite else None
    if stored is not None and (differs := _differs(folder, stored, config)):
        raise UserError(
            f"{folder} contains a run with other settings ({differs}): choose another run_dir, or set overwrite=true."
        )
    return folder, stored


def claim(config: dict[str, Any]) -> Run:
    """Prepares the run's folder. The run in it is new, interrupted or finished.

    Raises:
        UserError: the folder contains a run with other settings or files that do not belong to a run, or cannot be
            written.
    """
    folder, stored = find(config)
    settings = Settings(config)
    if settings.overwrite and (folder / paths.CONFIG).is_file():
        _clear(folder)
    if (weights := weights_of(config)) is not None:
        config = {**config, "weights": weights}
    if read := trust.tables(config):
        config = {**config, "tables": read}
    finished = stored is not None and _has_all_files(folder, stored, config)
    run = Run(folder, config, finished and repairs.is_whole(folder, settings.evaluate))
    if not run.finished:
        start(run)
    elif stored is not None and any(stored.get(key) != config.get(key) for key in ("label", "tables")):
        later = {"tables": config["tables"]} if "tables" in config else {}
        _write_config(folder, {**stored, "label": settings.label, **later})
    return run


def is_finished(config: Mapping[str, Any]) -> bool:
    """Whether the run is finished. Torn files are not detected, and nothing is changed."""
    folder = folder_of(config)
    if Settings(config).overwrite or not (folder / paths.CONFIG).is_file():
        return False
    stored = read_config(folder)
    return not _differs(folder, stored, config) and _has_all_files(folder, stored, config)


def _differs(folder: Path, stored: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """`difference` of two runs' identities. Raises UserError if the folder's config is not valid."""
    try:
        old = identity(stored)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{folder / paths.CONFIG} contains no valid settings: {trust.AGAIN}.") from error
    return difference(old, identity(config))


def _has_all_files(folder: Path, stored: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether the folder has all files that `config` requires, judged by the same judge if `config` evaluates."""
    settings = Settings(config)
    evaluated = settings.evaluate
    wanted = (paths.METRICS, paths.REPORT) if evaluated else (paths.ERASED,)
    same_judge = not evaluated or Settings(stored).judge == settings.judge
    ended = not (folder / paths.FIT).exists()  # training checkpoints are deleted once the weights are saved
    return same_judge and ended and all((folder / name).is_file() for name in wanted)


def start(run: Run) -> None:
    """Writes the settings of a run that starts or continues, and removes earlier metrics and the page.

    Raises:
        UserError: the folder cannot be written.
    """
    if (run.folder / paths.METRICS).is_file():
        costs.forget(run.folder, "judge")  # the run will be judged again
    _remove(run.folder, paths.METRICS, paths.REPORT)  # first: a run that is killed here must not look finished
    _write_config(run.folder, run.config)


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    disk.write_text(folder / paths.CONFIG, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))


def open_run(name: str) -> Run:
    """An existing run, by its folder, or by its name in runs/. "latest": the run whose weights were saved last.

    Raises:
        UserError: the folder does not exist or contains no run.
    """
    known = sorted(ROOT.glob(f"*/{paths.ERASED}"), key=lambda file: file.stat().st_mtime_ns)
    folder = known[-1].parent if name == "latest" and known else _placed(name)
    if not (folder / paths.CONFIG).is_file():
        latest = f"the latest is {known[-1].parent}" if known else "make one with python -m realera.train"
        if name == "latest":
            raise UserError(f"there is no run in {ROOT}/ yet: {latest}.")
        raise UserError(f"{name} is not a run folder (it has no {paths.CONFIG}): {latest}.")
    config = read_config(folder)
    if (fault := json_shapes.config_fault(config, used=True)) is not None:
        raise UserError(f"{folder / paths.CONFIG} {fault}: {trust.AGAIN}.")
    schema.check_stored(config)
    return Run(folder, config)


def _placed(name: str) -> Path:
    """The path itself or, if nothing is there, the run of this name in runs/."""
    here, below = Path(name), ROOT / name
    bare = here.name == name and not here.exists()
    return below if bare and (below / paths.CONFIG).is_file() else here


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved settings in a run folder. They are checked because somebody else may have written them.

    Raises:
        UserError: they cannot be read, or are not allowed in a run folder (`trust.check`).
    """
    check_files(folder)
    file = folder / paths.CONFIG
    try:
        config = plain_data.read_yaml(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): {trust.AGAIN}.") from error
    return trust.check(config, file)


def check_files(folder: Path) -> None:
    """Raises UserError if a file or folder of a run is a symbolic link, or a checkpoint is not a file."""
    paths.refuse_links(folder, (*FILES, *FOLDERS, paths.LOCK))
    paths.refuse_odd(folder)


def check_sweep(folder: Path) -> None:
    """Raises UserError if a file or folder of a sweep is a symbolic link."""
    paths.refuse_links(folder, paths.SWEEP_FILES)


def difference(old: Any, new: Any, at: str = "") -> str:
    """The first difference of two configs, such as "seed: 0 there, 1 here"; "" if they are equal."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            if found := difference(old.get(key), new.get(key), f"{at}.{key}" if at else str(key)):
                return found
        return ""
    same = digest(old) == digest(new)
    return "" if same else f"{at}: {old} there, {new} here"


def runs_in(name: str) -> list[Path]:
    """The run folders that a path refers to: a run, the runs of a sweep, or the runs in a folder.

    Raises:
        UserError: there is no run, none of a sweep's runs is found, or a file of the sweep is a symbolic link.
    """
    folder = _placed(name)
    if (folder / paths.CONFIG).is_file():
        return [folder]
    check_sweep(folder)
    if (folder / paths.RUN_LIST).is_file():
        listed = [listed_by(folder, line) for line in listed_in(folder / paths.RUN_LIST)]
        if listed and not any(run.is_dir() for run in listed):
            raise UserError(
                f"none of the {len(listed)} run folders that {name} lists exists here ({listed[0]} is missing): give "
                "the command in the folder in which the sweep was started."
            )
        return listed
    found = sorted(file.parent for file in folder.glob(f"*/{paths.CONFIG}"))
    return found or [open_run(name).folder]


def listed_in(file: Path) -> list[str]:
    """The distinct lines of a sweep's list of runs; [] if it cannot be read. A torn line names no existing folder, so
    it is treated like a deleted run. Raises UserError for a symbolic link."""
    paths.inside(file.parent, file.name)
    try:
        lines = plain_data.lines(file, errors="replace")
    except (OSError, ValueError):
        return []
    return [line for line in dict.fromkeys(lines) if line.strip() and "\0" not in line]


def listed_by(sweep: Path, line: str) -> Path:
    """The run folder that a line of a sweep's list names. `line` is relative to the folder in which the sweep was
    started, three levels above <started in>/runs/sweeps/<stamp>.

    A sweep in runs/sweeps of the current folder is the user's own and may list runs anywhere, because root=FOLDER puts
    runs on another disk. Any other sweep may only list runs below the folder in which it was started.

    Raises:
        UserError: another sweep lists a run outside of that folder.
    """
    place, here = Path(os.path.abspath(sweep)), Path.cwd()
    started_in = place.parents[:3][-1]
    if place.parent == here / ROOT / paths.SWEEPS:
        return Path(line)
    try:
        return paths.inside(started_in, os.path.relpath(line, started_in) if os.path.isabs(line) else line)
    except UserError:
        raise UserError(
            f"{sweep} lists a run outside of the folder in which it was started ({line[:120]!r}): give the run folders "
            "themselves, python -m realera.report RUN RUN."
        ) from None


def _clear(folder: Path) -> None:
    """Removes a run's files from its folder and leaves all others. The settings stay until `start` replaces them:
    without them, a folder that was cleared only in part would no longer be recognised as a run."""
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    _remove(folder, *(name for name in FILES if name != paths.CONFIG))


def _remove(folder: Path, *names: str) -> None:
    for name in names:
        with disk.explained(folder / name):
            (folder / name).unlink(missing_ok=True)
