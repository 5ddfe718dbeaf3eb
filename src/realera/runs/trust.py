"""Checks the settings of a run folder, which somebody else may have written: they are data and must not start code.

They may only name code that the yamls of this command line name. They may name no interpreter, no interpolation, and no
text file whose content has changed since the run was made. docs/trust.md explains this to users.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from realera import paths
from realera.contracts import UserError
from realera.files import checksums, json_shapes, plain_data
from realera.settings import instantiate
from realera.settings.run_settings import Settings

log = logging.getLogger(__name__)

AGAIN = "do not use this folder, or make the run again with python -m realera.train and overwrite=true"

TEXTS = re.compile(r"(_csv|_file|_path|^file|^data|^captions)$")  # settings that name a file of texts
PLAIN_MODEL = re.compile(r"[\w-][\w.+-]*", re.ASCII)  # name of an open_clip model
PACKAGE = re.compile(r"^# *@package +(\S+)", re.MULTILINE)
Named = Mapping[tuple[str, bool], frozenset[str]]
"""{(group, whether the target is a nested part): targets}."""


def check(config: Any, file: Path) -> dict[str, Any]:
    """Returns the settings of a run folder if they are allowed. file: their path, for the error sentence.

    Raises:
        UserError: they are not settings of a run, or contain something that only a command line may set.
    """
    if (fault := json_shapes.config_fault(config)) is not None:
        raise UserError(f"{file} {fault}: {AGAIN}.")
    if found := next((text for text in plain_data.strings(config) if "${" in text), None):
        raise UserError(
            f"{file} contains {found[:60]!r}, but a run folder may not contain interpolations: make the run again with "
            "python -m realera.train."
        )
    named = _named(config_dirs())
    for at, node in _nodes(config):
        _check_node(at, node, named, file)
    result: dict[str, Any] = config
    return result


def warn_of_typed_targets(config: Mapping[str, Any], words: Iterable[str]) -> None:
    """Warns if a command line (`words`) names a class that no yaml names, because later commands refuse such a run."""
    if any("_target_" in word for word in words):
        named = _named(config_dirs())
        for at, node in _nodes(config):
            target = node.get("_target_")
            if target is not None and str(target) not in named.get(_kind(at), ()):
                log.warning(
                    "%s._target_=%s was typed, but no yaml names it: evaluate, generate and export will refuse this "
                    "run. Put it into a yaml of your own and give the yaml's folder as --config-dir (docs/trust.md).",
                    ".".join(at),
                    target,
                )


def interpreter(judge: Any) -> str | None:
    """The Python interpreter that a judge's settings name, at any depth; None without one."""
    for at, value in _leaves(judge):
        if at[-1:] == ("python",) and value is not None:
            return str(value)
    return None


def foreign_model(judge: Any) -> str | None:
    """The model that a judge's settings name and that is not one of the library's: a hub model or a folder, which may
    refer to further models. It is searched at any depth; None without one."""
    for at, value in _leaves(judge):
        if at[-1:] == ("model",) and value is not None and not PLAIN_MODEL.fullmatch(str(value)):
            return str(value)
    return None


def tables(config: Mapping[str, Any]) -> dict[str, str]:
    """{setting: SHA-256 of the table or list of texts that it names}, without missing files."""
    found = {}
    for at, value in _leaves(Settings(config).task.node):
        if at and TEXTS.search(at[-1]) and isinstance(value, str) and (file := paths.file_of(value)) is not None:
            found[".".join(at)] = checksums.sha256_of(file)
    return found


def check_tables(config: Mapping[str, Any], folder: Path) -> None:
    """Checks that a run's text files are those it was made with, because their texts become prompts and appear on the
    page.

    Raises:
        UserError: a file has changed, or the run never read it.
    """
    kept = Settings(config).tables
    for setting, digest in tables(config).items():
        if not isinstance(kept, Mapping) or kept.get(setting) != digest:
            raise UserError(
                f"{folder} names a text file, task.{setting}, that is not the file with which the run was made: give "
                "its train command again, which reads the file that you type."
            )


# --- classes that may be built ---------------------------------------------------------------------------------------


def config_dirs() -> tuple[Path, ...]:
    """The config folders of this command line: the package's, --config-dir and hydra.searchpath."""
    found = [paths.CONF_DIR]
    if HydraConfig.initialized():
        for source in HydraConfig.get().runtime.config_sources:
            if source.schema == "file":
                found.append(Path(source.path))
            elif source.schema == "pkg" and source.provider != "hydra":
                found += _of_package(str(source.path))
    return tuple(dict.fromkeys(found))


def _of_package(name: str) -> list[Path]:
    """A config package's folder."""
    top, *rest = name.replace("/", ".").split(".")
    spec = find_spec(top)
    return [Path(place, *rest) for place in (spec.submodule_search_locations or () if spec else ())]


@cache
def _named(folders: tuple[Path, ...]) -> Named:
    """The targets that the yamls in these folders name."""
    found: dict[tuple[str, bool], set[str]] = {}
    for folder in folders:
        places = [
            folder.glob("*.y*ml"),
            *((folder / group).rglob("*.y*ml") for group in (*json_shapes.GROUPS, "experiment")),
        ]
        for file in sorted(file for place in places for file in place):
            for at, node in _nodes(*_read(file, file.relative_to(folder).parent.parts)):
                if at and at[0] in json_shapes.GROUPS and isinstance(target := node.get("_target_"), str):
                    found.setdefault(_kind(at), set()).add(target)
    return {kind: frozenset(targets) for kind, targets in found.items()}


def _read(file: Path, group: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
    """A yaml's content and its key among all settings; ({}, ()) if Hydra could not read the file.

    The file is the user's own, so it may contain things that a run's settings may not, such as merges (<<) and dates:
    OmegaConf reads those as Hydra does. Nearly all files are plain and are read like a run's, ten times faster.
    """
    try:
        text = plain_data.text(file)
        try:
            content = plain_data.yaml_of(text)
        except ValueError:
            content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        return {}, ()
    package = said[1] if (said := PACKAGE.search(text)) else None
    return content, group if package is None else () if package == "_global_" else tuple(package.split("."))


def _kind(at: tuple[str, ...]) -> tuple[str, bool]:
    """The key of `Named` for a dotted key. A judge inside of another judge counts as a judge, not as a nested part, and
    so does a logger below a name."""
    group, *below = at or ("",)
    alike = (group == "judge" and "judges" in below) or (group == "logger" and len(below) == 1)
    return group, bool(below) and not alike


def _nodes(node: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """(dotted key in parts, mapping) for every mapping that builds an object, at any depth."""
    if isinstance(node, Mapping):
        if any(key in instantiate.WORDS for key in node):
            yield at, node
        for key, value in node.items():
            yield from _nodes(value, (*at, str(key)))
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _nodes(value, at)


def _leaves(node: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, (*at, str(key)))
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _leaves(value, at)
    else:
        yield at, node


def _check_node(at: tuple[str, ...], node: Mapping[str, Any], named: Named, file: Path) -> None:
    place = ".".join(at) or "all of it"
    target = node.get("_target_")
    if target is not None and str(target) not in named.get(_kind(at), ()):
        raise UserError(
            f"{file} names _target_={str(target)[:120]!r} ({place}), which no yaml names for that setting: do not use "
            "this folder or, if the part is your own, add the --config-dir with which the run was made."
        )
    usual = {"_convert_": ("all", "none", "partial", "object"), "_recursive_": (True,), "_partial_": (False,)}
    for word in ("_args_", *usual):
        if word in node and node[word] not in usual.get(word, ()):
            raise UserError(f"{file} sets {word} ({place}), which a run folder may not: do not use this folder.")
