"""Cleans up the environment variables and the command line of a command."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from realera.contracts import UserError
from realera.paths import printable

LIBRARIES = (
    "WANDB_",
    "REALERA_",
    "HF_",
    "HUGGINGFACE_",
    "TRANSFORMERS_",
    "DIFFUSERS_",
    "TORCH_",
    "OMP_",
    "MKL_",
    "NCCL_",
)
TAKING = ("--cfg", "--package", "--config-path", "--config-name", "--config-dir", "--experimental-rerun", "--info")
FLAGS = (*TAKING, "--help", "--hydra-help", "--version", "--resolve", "--run", "--multirun", "--shell-completion")
SHORT = ("-h", "-c", "-p", "-r", "-m", "-sc", "-cp", "-cn", "-cd", "-i")  # Hydra's, each with its long form above
OTHERS = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "TMPDIR", "NETRC", "MASTER_ADDR", "MASTER_PORT")
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")


def remove_empty_variables(environ: MutableMapping[str, str]) -> None:
    """Removes empty variables, which libraries would take as values: an empty WANDB_MODE is not a mode, and an empty
    HF_HOME is the working directory. An empty CUDA_VISIBLE_DEVICES is kept: it means that there is no device.

    Raises:
        UserError: RANK or a similar variable is not a number, or REALERA_CACHE cannot be a folder.
    """
    for name in [name for name, value in environ.items() if not value.strip()]:
        if name.startswith(LIBRARIES) or name in (*OTHERS, *NUMBERS):
            del environ[name]
    for name in NUMBERS:
        if not re.fullmatch("[0-9]{1,9}", environ.get(name, "0")):
            raise UserError(f"{name}={environ[name]} in the environment is not the number of a process: unset {name}.")
    if given := environ.get("REALERA_CACHE"):
        try:
            right = not Path(given).expanduser().is_file()
        except (RuntimeError, OSError):  # the home of an unknown user, or a name that is too long
            right = False
        if not right:
            raise UserError(
                f"REALERA_CACHE={printable(given)} in the environment is not a folder: set it to one, or unset it."
            )


def check_current_folder() -> None:
    """Raises UserError if the current folder was deleted: relative paths have no meaning there."""
    try:
        os.getcwd()
    except OSError:
        raise UserError("the current folder was deleted: change to another one (cd), and type it again.") from None


def as_text(words: Sequence[str]) -> list[str]:
    """The words of the command line, decoded from UTF-8 if an ASCII locale has left undecoded bytes in them.

    Raises:
        UserError: a word is not UTF-8.
    """
    found = []
    for word in words:
        try:
            found.append(os.fsencode(word).decode() if any("\udc80" <= letter <= "\udcff" for letter in word) else word)
        except UnicodeDecodeError:
            said = word.encode("ascii", "backslashreplace").decode()
            raise UserError(f"'{said}' is not UTF-8: set a UTF-8 locale, such as LC_ALL=C.UTF-8.") from None
    return found


def flags_first(arguments: list[str]) -> list[str]:
    """The command line with its key=value words last, because Hydra's parser needs them to be contiguous.

    Raises:
        UserError: a flag that does not exist, such as --concept.
    """
    for word in arguments:
        name, given, value = word.partition("=")
        known = name.startswith("--") and len(name) > 2 and any(flag.startswith(name) for flag in FLAGS)
        takes = any(flag.startswith(name) for flag in TAKING)
        if word.startswith("-") and not (name in SHORT or (known and (takes or not given))):
            key = name.lstrip("-").replace("-", "_") or "key"
            raise UserError(
                f"there is no flag {name}: settings are typed as {key}={value or '...'}, without dashes; the flags are "
                "--help, -m, --cfg job and --config-dir."
            )
    settings = [word for word in arguments if "=" in word and not word.startswith("-")]
    return [*(word for word in arguments if word not in settings), *settings]


def as_list_setting(arguments: list[str], key: str) -> list[str]:
    """The command line with bare words as one list: ["a", "b", "x=1"] -> ["x=1", "key=['a','b']"]."""
    bare = [word for word in arguments if "=" not in word and not word.startswith("-")]
    rest = [word for word in arguments if word not in bare]
    quoted = ",".join("'" + word.replace("'", "\\'") + "'" for word in bare)
    return [*rest, f"{key}=[{quoted}]"] if bare else rest
