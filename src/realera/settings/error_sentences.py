"""Turns errors of Hydra, OmegaConf and the disk into one sentence each: the fault, and the words to type instead."""

from __future__ import annotations

import difflib
import re
import shlex
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from realera import paths
from realera.contracts import UserError
from realera.settings.instantiate import NotBuilt
from realera.system import disk

LISTS = ("prompts",)  # settings that take several texts in one job
OF_DATABASE = ("full", "readonly", "unable to open", "I/O error", "locked")  # in SQLite's messages about the disk

OPTION = re.compile(r"(?!(null|true|false)$)[A-Za-z_@][\w.@/ -]*", re.IGNORECASE)  # a file of a config group

PLUGINS = {  # of the extra `sweeps`
    "hydra/launcher": ("joblib", "ray", "ray_aws", "submitit_local", "submitit_slurm"),
    "hydra/sweeper": ("optuna",),
}


def of_config(
    error: Exception, config_name: str, arguments: list[str], spelt: Callable[[str], str] = "'{}'".format
) -> str:
    """The sentence for an error that occurred while the config was composed from the command line's `arguments`. spelt:
    how a suggested setting is written; by default as on the command line.

    Raises:
        Exception: `error` itself, if it is not an error of Hydra, OmegaConf or realera.
    """
    if sentence := _of_known(error):
        return sentence
    if isinstance(error, AssertionError) and (sentence := _below_null(config_name, arguments)):
        return sentence
    if isinstance(error, UserWarning) and (
        found := re.search(r"provider=hydra.searchpath.*path=(.*) is not", str(error))
    ):
        return f"hydra.searchpath names {found[1]}, which does not exist: correct the path, or leave it out."
    if sentence := of_option(error, arguments):
        return sentence
    if not isinstance(error, (HydraException, OmegaConfBaseException, ValueError)):
        raise error
    text = str(error)
    if found := re.search(r"Error merging override (.*)", text):  # for settings of Hydra itself
        return f"{found[1]}: {first_line(error.__cause__ or error)}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _unknown_option(error.missing_cfg_file, error.options or ())
    if isinstance(error, OverrideParseException):
        return _unreadable(str(error.override))
    if found := re.search(r"Ambiguous value for argument '(.*)'", text):
        if (key := found[1].partition("=")[0]) in LISTS:
            return f'{key} contains commas: quote a text, {_quoted(found[1])}, or give a list, \'{key}=["...","..."]\''
        return f"{found[1]} has several values: {_ways_to_mean(found[1], config_name, arguments)}"
    if found := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(found[1].split("@")[0], config_name, arguments, spelt)
    return first_line(error)


def of_option(error: Exception, arguments: Iterable[str]) -> str | None:
    """The sentence for a choice that cannot be a file of its group, such as method=3 or task=[1]; None if the error is
    not Hydra's for that."""
    text = str(error)
    wrong = "group override must be a string" in text or (isinstance(error, TypeError) and "not iterable" in text)
    if not wrong and not (found := re.search(r"Could not override '([^']+)'", text)):
        return None
    for key, given, value in (word.partition("=") for word in arguments):
        asked = given and key and (wrong or (found and found[1] == key))
        if asked and not OPTION.fullmatch(value) and (paths.CONF_DIR / key).is_dir():
            return _unknown_option(f"{key}/{value.replace('/', ' ')}", ())
    return None


def of_step(error: Exception) -> str | None:
    """The sentence for an error of a run. None if the code is at fault and not the settings."""
    sentence = _of_step(error)
    return None if sentence is None else paths.printable(sentence)


def _of_step(error: Exception) -> str | None:
    if sentence := _of_known(error):
        return sentence
    if not isinstance(error, NotBuilt):
        return None
    place = f"{error.place}: " if error.place else ""
    for cause in _chain(error):
        if isinstance(cause, TypeError) and (found := re.search(r"unexpected keyword argument '(\w+)'", str(cause))):
            return f"{place}there is no setting '{found[1]}': remove it from the command line or from the yaml."
        if isinstance(cause, ImportError):
            return f"{place}{first_line(cause)}: check the yaml's _target_, and that its library is installed."
    return None


def of_value(error: OmegaConfBaseException) -> str:
    """The sentence for a value that could not be resolved."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is missing: type {error.full_key}=... (--help explains it)"
    place = f" (at {error.full_key})" if getattr(error, "full_key", None) else ""
    return _of_known(error) or first_line(error) + place


def did_you_mean(word: str, known: Iterable[str], spelt: Callable[[str], str] = "'{}'".format) -> str:
    """ "; did you mean 'x'?", or "" if no known word is similar."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {spelt(close[0])}?" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return paths.printable(lines[0]) if lines else type(error).__name__


def _of_known(error: BaseException) -> str | None:
    """The message of a UserError in the chain of `error`, otherwise the sentence for a disk error in it."""
    said = (str(cause) for cause in _chain(error) if isinstance(cause, UserError))
    return next(said, None) or next(filter(None, map(_of_disk, _chain(error, suppressed=False))), None)


def _of_disk(error: BaseException) -> str | None:
    if isinstance(error, sqlite3.OperationalError) and any(sign in str(error) for sign in OF_DATABASE):
        return (
            f"the search's trials cannot be saved ({error}): free space for hydra.sweeper.storage or change it, then "
            "give the same command again; it continues."
        )
    if isinstance(error, UnicodeEncodeError) and error.encoding == sys.getfilesystemencoding() != "utf-8":
        named = error.object.encode("ascii", "backslashreplace").decode()
        return f"{named} cannot be a file name in this locale: set LC_ALL=C.UTF-8, or give another name."
    return disk.error_sentence(error)


def _chain(error: BaseException | None, suppressed: bool = True) -> Iterator[BaseException]:
    """The error, its cause, the cause of that, and so on. suppressed: also errors hidden by `from None`, which
    OmegaConf uses."""
    while error is not None:
        yield error
        hidden = error.__suppress_context__ and not suppressed
        error = error.__cause__ or (None if hidden else error.__context__)


def _unknown_option(missing: str, options: Iterable[str]) -> str:
    group, _, option = missing.rpartition("/")
    known = sorted(options) or sorted(path.stem for path in (paths.CONF_DIR / group).glob("*.yaml"))
    if option == "null" and "/" in group:
        return f"{group} has no option null: type {group.replace('/', '.')}=null."
    if not group or not known:
        return f"there is no config '{missing}' in {paths.CONF_DIR} or in a --config-dir: check the spelling."
    if group in PLUGINS and option in PLUGINS[group]:
        return f"{group}={option} is not installed: pip install 'realera[sweeps]' (in a checkout: '.[sweeps]')."
    near = did_you_mean(option, known)
    own = "" if near else " One of your own needs --config-dir FOLDER (from Python: see docs/commands.md)."
    return f"there is no {group} '{option}'{near or ';'} known: {', '.join(known)}.{own}"


def _unreadable(override: str) -> str:
    key, given, value = override.partition("=")
    if not given:
        return f"'{override}' is not a setting: type key=value, or a flag such as --help or -m."
    bare = value.strip("'\"")
    if key == "attacks" and bare.startswith("["):
        return (
            f"{key}={bare} cannot be read: put an attack with settings into quotes, as in "
            "'attacks=[random,\"inversion attack.steps=200 limit=4\"]'."
        )
    return (
        f"{key}={bare} cannot be read without quotes: a text with commas, parentheses, apostrophes, brackets, accents "
        f"or colons needs quotes inside the shell's quotes: {_quoted(override)}"
    )


def _quoted(override: str) -> str:
    """An override with quotes, so that both the shell and Hydra read its value as one text."""
    key, _, value = override.partition("=")
    bare = value.strip("'\"")
    return f'"{key}=\\"{bare}\\""' if "'" in bare else f"{key}='\"{bare}\"'"


def _ways_to_mean(override: str, config_name: str, arguments: list[str]) -> str:
    """The words to type for a setting with several values: jobs of a sweep, a list if the setting takes one, a text."""
    key, _, values = override.partition("=")
    ways = ["add -m to run one job for each"]
    if _takes_list(key, config_name, arguments):
        listed = shlex.quote(f"{key}=[{values}]")
        ways.append(f"type {listed} to erase all of them together" if key == "concept" else f"type the list {listed}")
    return f"{', '.join(ways)}, or quote it if it is one text: {_quoted(override)}"


def _takes_list(key: str, config_name: str, arguments: list[str]) -> bool:
    if key in ("concept", "anchor"):
        return True
    node: Any = _composed(config_name, arguments)[0]
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return isinstance(node, list)


def _composed(config_name: str, arguments: list[str]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """(the command's config with the options that the arguments choose, {group: its option}); both are empty if it
    cannot be composed: then there is a second fault, and no suggestion for the first."""
    groups = _groups(config_name)
    chosen = [word for word in arguments if word.partition("=")[0] in groups]
    try:
        with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
            cfg = compose(config_name, chosen, return_hydra_config=True)
        choices = {str(group): str(option) for group, option in cfg.hydra.runtime.choices.items() if option}
        composed = OmegaConf.to_container(cfg, resolve=False)
    except (HydraException, OmegaConfBaseException, ValueError, TypeError, AssertionError):  # Hydra raises all of these
        return {}, {}
    own = {str(key): value for key, value in composed.items() if key != "hydra"} if isinstance(composed, dict) else {}
    return own, choices


def _unknown_key(key: str, config_name: str, arguments: list[str], spelt: Callable[[str], str]) -> str:
    groups = _groups(config_name)
    if (paths.CONF_DIR / key).is_dir() and key not in groups:
        return f"python -m realera.{config_name} has no setting '{key}': leave it out; --help lists its settings."
    group, _, below = key.partition(".")
    for word in arguments:  # of several options, the first one that lacks the setting
        typed, _, options = word.partition("=")
        for option in options.split(",") if typed == group and "," in options else ():
            alone = [f"{typed}={option}" if other == word else other for other in arguments]
            if below not in set(_keys(_composed(config_name, alone)[0].get(group))):
                return _unknown_key(key, config_name, alone, spelt)
    own, choices = _composed(config_name, arguments)
    composed = {**dict.fromkeys(groups), **own}
    option = choices.get(group, "") if below else ""
    if parent := _null_above(key, composed):
        where = f"with {group}={option}" if option else "here"
        return f"there is no setting '{key}', because {parent} is null {where}: choose an option that has it."
    if option:
        return f"{group}={option} has no setting '{key}'{_of_option(key, option, composed[group], spelt)}"
    known = {*_keys(composed), *groups}
    same_end = {k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]}
    if "." not in key and same_end:
        meant = f"; did you mean {spelt(_nearest(same_end))}?"
    else:
        meant = did_you_mean(key, same_end, spelt) or did_you_mean(key, known, spelt)
    return f"there is no setting '{key}'{meant or '; --help lists them.'}"


def _of_option(key: str, option: str, settings: Any, spelt: Callable[[str], str]) -> str:
    """The end of the sentence for a setting that an option of a group lacks: other options that have it, otherwise the
    nearest setting of this option. The group's own name counts nothing for nearness."""
    group, _, below = key.partition(".")
    if others := [other for other in _with_key(group, below) if other != option]:
        listed = " or ".join([*([", ".join(others[:-1])] if others[1:] else []), others[-1]])
        return f": leave it out, or choose {group}={listed}, which {'have' if others[1:] else 'has'} it."
    known = list(_keys(settings))
    same_end = [name for name in known if name.rpartition(".")[2] == below.rpartition(".")[2]]

    def full(name: str) -> str:
        return spelt(f"{group}.{name}")

    meant = did_you_mean(below, same_end, full) or did_you_mean(below, known, full)
    return meant or f"; {paths.CONF_DIR / group / option}.yaml lists its settings."


def _with_key(group: str, below: str) -> list[str]:
    """The options of a group whose own yaml has the setting. Variants of another option are left out."""
    found = []
    for file in sorted((paths.CONF_DIR / group).glob("*.yaml")):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        bases = content.get("defaults", ()) if isinstance(content, dict) else ()
        if not any(isinstance(base, str) and base != "_self_" for base in bases) and below in set(_keys(content)):
            found.append(file.stem)
    return found


def _nearest(keys: Iterable[str]) -> str:
    """The setting that a bare name most likely means: one of the method, and of its least nested part."""
    return min(keys, key=lambda key: (not key.startswith("method."), key.count("."), key))


def _groups(config_name: str) -> list[str]:
    """The groups from which a command's yaml chooses an option."""
    defaults = yaml.safe_load((paths.CONF_DIR / f"{config_name}.yaml").read_text(encoding="utf-8"))["defaults"]
    named = [str(name).split()[-1] for one in defaults if isinstance(one, dict) for name in one]
    return [name for name in named if (paths.CONF_DIR / name).is_dir()]


def _below_null(config_name: str, arguments: list[str]) -> str | None:
    """The sentence for a setting of Hydra itself below one that is null, which makes Hydra fail an assertion."""
    for word in arguments:
        key = word.partition("=")[0].lstrip("+")
        if key.startswith("hydra."):
            groups = [other for other in arguments if other.startswith("hydra/")]
            with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
                composed = compose(config_name, groups, return_hydra_config=True)
            if parent := _null_above(key, OmegaConf.to_container(composed, resolve=False)):
                return f"there is no setting '{key}', because {parent} is null here: leave it out."
    return None


def _null_above(key: str, config: Any) -> str:
    """The part of a dotted key that is null in the config; "" if no part is."""
    parts = key.split(".")
    for depth, part in enumerate(parts[:-1], 1):
        if not isinstance(config, Mapping) or part not in config:
            return ""
        config = config[part]
        if config is None:
            return ".".join(parts[:depth])
    return ""


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from _keys(value, f"{prefix}{key}.")
