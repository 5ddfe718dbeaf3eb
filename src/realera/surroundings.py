"""What a command finds around it: variables that are set to nothing, and words in another encoding than ours."""

from __future__ import annotations

import os
from collections.abc import MutableMapping, Sequence

from realera.contracts import UserError

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
OTHERS = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "TMPDIR", "NETRC", "MASTER_ADDR", "MASTER_PORT")
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")


def tidy(environ: MutableMapping[str, str]) -> None:
    """Takes out the variables that are set to nothing, which libraries read as a value: an empty WANDB_MODE is no mode,
    and an empty HF_HOME the working directory. An empty CUDA_VISIBLE_DEVICES says that there is no device: it stays.

    Raises:
        UserError: a process's number is none.
    """
    for name in [name for name, value in environ.items() if not value.strip()]:
        if name.startswith(LIBRARIES) or name in (*OTHERS, *NUMBERS):
            del environ[name]
    for name in NUMBERS:
        if not environ.get(name, "0").isdecimal():
            raise UserError(f"{name}={environ[name]} in the environment is no process's number: unset {name}.")


def as_text(words: Sequence[str]) -> list[str]:
    """The command line's words, of which a locale without accents has left bytes.

    Raises:
        UserError: a word is no text.
    """
    found = []
    for word in words:
        try:
            found.append(os.fsencode(word).decode() if any("\udc80" <= letter <= "\udcff" for letter in word) else word)
        except UnicodeDecodeError:
            said = word.encode("ascii", "backslashreplace").decode()
            raise UserError(f"'{said}' is no UTF-8 text: set a UTF-8 locale, as LC_ALL=C.UTF-8 does.") from None
    return found


def flags_first(arguments: list[str]) -> list[str]:
    """The command line with its key=value words last: Hydra's parser takes them in one stretch only."""
    settings = [word for word in arguments if "=" in word and not word.startswith("-")]
    return [*(word for word in arguments if word not in settings), *settings]


def gather(arguments: list[str], key: str) -> list[str]:
    """The command line with bare words as one list: ["a", "b", "x=1"] -> ["x=1", "key=['a','b']"]."""
    bare = [word for word in arguments if "=" not in word and not word.startswith("-")]
    rest = [word for word in arguments if word not in bare]
    quoted = ",".join("'" + word.replace("'", "\\'") + "'" for word in bare)
    return [*rest, f"{key}=[{quoted}]"] if bare else rest
