"""Run folders: which one a run's settings name, what stands in it, and whether it is finished."""

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
from realera.system import disk, locks
from realera.tasks.prompts import slug

ROOT = Path("runs")  # unless `root` says otherwise
SPELT_OUT = 3  # more concepts than this are not all named in titles and folders
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
)
FOLDERS = (paths.VERDICTS, paths.IMAGES, paths.FIT, paths.ORIGINALS, "wandb")


@dataclass(frozen=True)
class Run:
    """A run folder and the settings it was made from. `finished`: everything those settings ask for stands in it."""

    folder: Path
    config: dict[str, Any]
    finished: bool = False

    @property
    def erased(self) -> Path:
        return self.folder / paths.ERASED


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that an erasure's weights and numbers depend on; its hardware and its logger do not count."""
    kept = {key: config.get(key) for key in ("task", "method", "backbone", "concept", "anchor", "seed")}
    method = config.get("method") or {}
    trainer = config.get("trainer") or {}
    if (clip := trainer.get("gradient_clip_val", "method")) != "method":
        kept["gradient_clip_val"] = clip
    sums = {file: _content(file) for file in sorted(_sums(method)) if paths.file_of(file) is not None}
    if sums:  # their content, as of the tables
        kept["sums"] = sums
    tables = {key: file for key, file in (config.get("task") or {}).items() if key.endswith("_csv") and file}
    if tables:  # what they hold, not only what they are called
        kept["tables"] = {key: _content(file) for key, file in tables.items()}
    if (weights := config.get("weights") or weights_of(config)) is not None:  # other weights may come into a folder
        kept["weights"] = weights
    return {**kept, "precision": trainer.get("precision"), "version": __version__}


def weights_of(config: Mapping[str, Any]) -> str | None:
    """What the weights in a local folder are known by; None for the built-in model, which has the package's version,
    and for a hub's."""
    pretrained = (config.get("backbone") or {}).get("pretrained")
    place = None if pretrained is None else paths.dir_of(pretrained)
    return None if place is None else checkpoint.marks(place)


def _sums(node: Any) -> Iterator[str]:
    """The files of captions, of sums over them and of texts that a method's settings name, at any depth."""
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
    """8 hex digits that equal content shares."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def concept_of(config: Mapping[str, Any]) -> str:
    """What a run erases, as one text."""
    concept = config["concept"]
    names = list(map(str, concept)) if isinstance(concept, (list, tuple)) else [str(concept)]
    return ", ".join(names) if len(names) <= SPELT_OUT else f"{names[0]} and {len(names) - 1} more"


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether nothing is erased: a run of the base model as it is."""
    return (config.get("method") or {}).get("name") == "original"


def title(config: Mapping[str, Any]) -> str:
    """ "cat erased by uce", "cat, the original model"."""
    erased = f" erased by {(config.get('method') or {}).get('name')}"
    return f"{concept_of(config)}{', the original model' if is_original(config) else erased}"


def folder_of(config: Mapping[str, Any]) -> Path:
    """run_dir where it was typed, else <root>/<concept>-<method>-<backbone>-<hash>: equal settings, equal folder."""
    if config.get("run_dir"):
        return Path(str(config["run_dir"]))
    names = [slug(concept_of(config)), *(slug(str(config[part]["name"])) for part in ("method", "backbone"))]
    return Path(str(config.get("root") or ROOT)) / f"{'-'.join(names)}-{digest(identity(config))}"


@contextmanager
def alone(folder: Path, first: bool = True, key: str = "run_dir") -> Iterator[None]:
    """While a run is made, no other command makes it. first: whether this is the run's first process, which sees to it.
    key: the setting that names another folder.

    Raises:
        UserError: another command is making what is in the folder.
    """
    if not first:
        yield
        return
    check_files(folder)
    with locks.held(folder / paths.LOCK, str(folder), f"wait until it has ended, or choose another {key}"):
        for name in ("", *FOLDERS):
            disk.clear_left(folder / name)
        yield


def look(config: Mapping[str, Any]) -> tuple[Path, dict[str, Any] | None]:
    """The run's folder, and the settings of the run that stands in it, if one is to be gone on with; changes nothing.

    A finished run of which a file is torn is to be gone on with: it makes that file again. All files are looked at but
    the images, which are looked at when they are used (see `evaluation.generate`).

    Raises:
        UserError: the folder holds a run of other settings, or something that is no run.
    """
    folder = folder_of(config)
    check_files(folder)
    is_run = (folder / paths.CONFIG).is_file()
    if not is_run and folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder} holds files and is no run folder: choose another run_dir.")
    there = read_config(folder) if is_run and not config.get("overwrite") else None
    if there is not None and (differs := _differs(folder, there, config)):
        raise UserError(
            f"{folder} holds a run of other settings ({differs}): choose another run_dir, or set overwrite=true."
        )
    return folder, there


def claim(config: dict[str, Any]) -> Run:
    """The run's folder, made ready: begun anew, to be gone on with, or finished.

    Raises:
        UserError: the folder holds a run of other settings, or something that is no run, or cannot be written.
    """
    folder, there = look(config)
    if config.get("overwrite") and (folder / paths.CONFIG).is_file():
        _clear(folder)
    if (weights := weights_of(config)) is not None:
        config = {**config, "weights": weights}
    if read := trust.tables(config):
        config = {**config, "tables": read}
    finished = there is not None and _stands(folder, there, config)
    run = Run(folder, config, finished and repairs.is_whole(folder, bool(config.get("evaluate", True))))
    if not run.finished:
        begin(run)
    elif there is not None and any(there.get(key) != config.get(key) for key in ("label", "tables")):
        later = {"tables": config["tables"]} if "tables" in config else {}
        _write_config(folder, {**there, "label": config.get("label"), **later})
    return run


def is_finished(config: Mapping[str, Any]) -> bool:
    """Whether `claim` would find everything done, but for what is torn; looks and changes nothing."""
    folder = folder_of(config)
    if config.get("overwrite") or not (folder / paths.CONFIG).is_file():
        return False
    there = read_config(folder)
    return not _differs(folder, there, config) and _stands(folder, there, config)


def _differs(folder: Path, there: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """As `difference` of two runs' settings. Raises UserError where those in the folder are no settings."""
    try:
        old = identity(there)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{folder / paths.CONFIG} holds no settings: {trust.AGAIN}.") from error
    return difference(old, identity(config))


def _stands(folder: Path, there: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a run of these settings left everything that is asked for; judged by the same judge, if at all."""
    evaluated = config.get("evaluate", True)
    wanted = (paths.METRICS, paths.REPORT) if evaluated else (paths.ERASED,)
    same_judge = not evaluated or there.get("judge") == config.get("judge")
    ended = not (folder / paths.FIT).exists()  # the loop's checkpoints go when the weights are saved
    return same_judge and ended and all((folder / name).is_file() for name in wanted)


def begin(run: Run) -> None:
    """Writes the settings of a run that is to be carried out, and takes away the numbers of earlier ones.

    Raises:
        UserError: the folder cannot be written.
    """
    if (run.folder / paths.METRICS).is_file():
        costs.forget(run.folder, "judge")  # it is judged anew
    _remove(run.folder, paths.METRICS, paths.REPORT)  # first: a run that is killed here must not seem finished
    _write_config(run.folder, run.config)


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    disk.write_text(folder / paths.CONFIG, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))


def open_run(name: str) -> Run:
    """An existing run, by its folder; "latest" is the one whose weights were saved last.

    Raises:
        UserError: there is no such folder, or it holds no run.
    """
    known = sorted(ROOT.glob(f"*/{paths.ERASED}"), key=lambda file: file.stat().st_mtime_ns)
    folder = known[-1].parent if name == "latest" and known else Path(name)
    if not (folder / paths.CONFIG).is_file():
        latest = f"the latest is {known[-1].parent}" if known else "make one with python -m realera.train"
        if name == "latest":
            raise UserError(f"there is no run in {ROOT}/ yet: {latest}.")
        raise UserError(f"{name} is no run folder (it has no {paths.CONFIG}); {latest}.")
    config = read_config(folder)
    if (fault := json_shapes.config_fault(config, used=True)) is not None:
        raise UserError(f"{folder / paths.CONFIG} {fault}: {trust.AGAIN}.")
    schema.check_stored(config)
    return Run(folder, config)


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved settings a run folder keeps, checked as what somebody else may have written (`trust.check`).

    Raises:
        UserError: they cannot be read, or ask for what a run folder may not.
    """
    check_files(folder)
    file = folder / paths.CONFIG
    try:
        config = plain_data.read_yaml(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): {trust.AGAIN}.") from error
    return trust.check(config, file)


def check_files(folder: Path) -> None:
    """Raises UserError where one of a run's own files and folders is a symbolic link, or a checkpoint is no file."""
    paths.no_links(folder, (*FILES, *FOLDERS, paths.LOCK))
    paths.refuse_odd(folder)


def check_sweep(folder: Path) -> None:
    """Raises UserError where one of a sweep's own files and folders is a symbolic link."""
    paths.no_links(folder, paths.OF_A_SWEEP)


def difference(old: Any, new: Any, at: str = "") -> str:
    """The first place where two configs differ, as "seed: 0 there, 1 here"; empty where they are equal."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            if found := difference(old.get(key), new.get(key), f"{at}.{key}" if at else str(key)):
                return found
        return ""
    same = digest(old) == digest(new)
    return "" if same else f"{at}: {old} there, {new} here"


def runs_in(name: str) -> list[Path]:
    """The run folders that a name stands for: a run, a sweep, or a folder of runs.

    Raises:
        UserError: there is no run, or none of those that a sweep lists stands where it is looked for, or a file of the
            sweep is a symbolic link.
    """
    folder = Path(name)
    if (folder / paths.CONFIG).is_file():
        return [folder]
    check_sweep(folder)
    if (folder / paths.LISTED).is_file():
        listed = [listed_by(folder, line) for line in listed_in(folder / paths.LISTED)]
        if listed and not any(run.is_dir() for run in listed):
            raise UserError(
                f"none of the {len(listed)} run folders that {name} lists is found from here ({listed[0]} is not "
                "there): give the command in the folder that the sweep was started in."
            )
        return listed
    found = sorted(file.parent for file in folder.glob(f"*/{paths.CONFIG}"))
    return found or [open_run(name).folder]


def listed_in(file: Path) -> list[str]:
    """The lines of a sweep's list of runs, each once; none if it cannot be read. A torn line names no folder, and is
    passed over like that of a run that was deleted. Raises UserError for a symbolic link."""
    paths.inside(file.parent, file.name)
    try:
        lines = plain_data.lines(file, errors="replace")
    except (OSError, ValueError):
        return []
    return [line for line in dict.fromkeys(lines) if line.strip() and "\0" not in line]


def listed_by(sweep: Path, line: str) -> Path:
    """The run folder that a sweep's file names. `line` is relative to the folder that the sweep was started in, which
    is three above <started in>/runs/sweeps/<stamp>.

    A sweep in runs/sweeps of the current folder is one's own, and may name a run anywhere: root=FOLDER puts runs on
    another disk. Any other sweep names runs below the folder that it was started in, and no run here.

    Raises:
        UserError: another sweep names a run elsewhere.
    """
    place, here = Path(os.path.abspath(sweep)), Path.cwd()
    started_in = place.parents[:3][-1]
    if place.parent == here / ROOT / paths.SWEEPS:
        return Path(line)
    try:
        return paths.inside(started_in, os.path.relpath(line, started_in) if os.path.isabs(line) else line)
    except UserError:
        raise UserError(
            f"{sweep} lists a run outside of the folder that it was started in ({line[:120]!r}): name the runs "
            "themselves, python -m realera.report RUN RUN."
        ) from None


def _clear(folder: Path) -> None:
    """Removes a run's own files from its folder and leaves what else was put there. The settings stay until `begin`
    replaces them: without them a folder that was half cleared would be taken for somebody else's."""
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    _remove(folder, *(name for name in FILES if name != paths.CONFIG))


def _remove(folder: Path, *names: str) -> None:
    for name in names:
        with disk.explained(folder / name):
            (folder / name).unlink(missing_ok=True)
