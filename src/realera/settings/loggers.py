"""The trackers that a run's `logger` settings name, read without importing Lightning or a tracker's library.

`logger` is one tracker (it has a `_target_`), or has named trackers below it, or both:

    {_target_: ...WandbLogger, project: realera, images: 12, csv: {_target_: ...CSVLogger, save_dir: null}}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from realera.contracts import UserError
from realera.settings.constructors import Parameter, signature
from realera.settings.source_code import Class, Function, find, lacks, lineage

LOGGER = "lightning.pytorch.loggers.Logger"
SHARED = ("images", "artifact")  # settings of all trackers of a run, which no constructor takes
NONE = "none"  # conf/logger/none.yaml


@dataclass(frozen=True)
class Kind:
    """A kind of tracker. modules: it needs one of them, which the package's `extra` installs. images, artifacts:
    whether it stores images, and files. behind: the function or class that its constructor passes its **kwargs to."""

    title: str
    modules: tuple[str, ...] = ()
    extra: str = ""
    images: bool = True
    artifacts: bool = False
    behind: str = ""


OTHER = Kind("the logger")
MLFLOW = Kind("MLflow", ("mlflow",), "mlflow", artifacts=True)
WANDB = Kind("W&B", ("wandb",), artifacts=True, behind="wandb.sdk.wandb_init.init")
KINDS = {  # by the name of Lightning's class
    "WandbLogger": WANDB,
    "TensorBoardLogger": Kind(
        "TensorBoard",
        ("tensorboard", "tensorboardX"),
        "tensorboard",
        behind="torch.utils.tensorboard.writer.SummaryWriter",
    ),
    "CSVLogger": Kind("CSV", images=False),
    "MLFlowLogger": MLFLOW,
}


def nodes(logger: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """{name: settings} of every tracker, without the shared settings. The name of `logger` itself is ""."""
    named = {str(name): dict(one) for name, one in (logger or {}).items() if is_named(logger or {}, name)}
    if not (logger or {}).get("_target_"):
        return named
    own = {str(key): one for key, one in (logger or {}).items() if key not in named and key not in SHARED}
    return {"": own, **named}


def is_named(logger: Mapping[str, Any], name: Any) -> bool:
    """Whether an entry of `logger` is a named tracker. Beside a `_target_` it may also be a part that this class takes:
    something that is no Lightning logger, or a parameter if the part's class cannot be read."""
    one = logger[name]
    if not isinstance(one, Mapping) or (target := logger.get("_target_")) is None:
        return isinstance(one, Mapping)
    if not one.get("_target_"):
        return False
    found, role = find(str(one["_target_"])), find(LOGGER)
    if isinstance(found, Class) and isinstance(role, Class) and None not in lineage(found):
        return lacks(found, role) is None
    return name not in parameters(str(target))


def parameters(target: str) -> dict[str, Parameter]:
    """The named parameters of a tracker's class, and of the function behind its **kwargs if it is of a known kind."""
    found: dict[str, Parameter] = {}
    for one in (find(kind(target).behind), find(target)):
        if isinstance(one, Class | Function) and (taken := signature(one)) is not None:
            found |= taken.parameters
    return found


def kind(target: Any) -> Kind:
    """The kind of a tracker's class, or of the nearest of its bases that is of a known kind."""
    found = find(str(target))
    if not isinstance(found, Class):
        return KINDS.get(str(target).rpartition(".")[2], OTHER)
    return next((KINDS[one.name] for one in lineage(found) if one is not None and one.name in KINDS), OTHER)


def dotted(name: str) -> str:
    """A tracker's key among the settings: logger.csv, or logger."""
    return f"logger.{name}" if name else "logger"


def check(logger: Mapping[str, Any] | None) -> None:
    """Checks that the trackers can run here.

    Raises:
        UserError: a tracker's library is not installed, or no tracker has a use for `images` or `artifact`.
    """
    kinds = {name: kind(node.get("_target_")) for name, node in nodes(logger).items()}
    for name, one in kinds.items():
        if one.modules and not any(map(_is_installed, one.modules)):
            said = f"realera[{one.extra}]" if one.extra else one.modules[0]
            raise UserError(
                f"{dotted(name)} needs {one.modules[0]}, which is not installed: pip install '{said}'"
                + (f" (in a checkout: '.[{one.extra}]')." if one.extra else ".")
            )
        uri = str(nodes(logger)[name].get("tracking_uri") or "")
        if one is MLFLOW and uri.startswith("sqlite:") and not _is_installed("sqlalchemy"):
            raise UserError(
                f"{dotted(name)} would write the database {uri}, which mlflow-skinny cannot: pip install "
                f"'realera[{one.extra}]', or name a server, MLFLOW_TRACKING_URI=http://..."
            )
    if (logger or {}).get("artifact") and not any(one.artifacts for one in kinds.values()):
        able = " and ".join(one.title for one in KINDS.values() if one.artifacts)
        raise UserError(
            f"logger.artifact=true does nothing here, because only {able} store files: leave it out, or add one of "
            "them, as in 'logger=[tensorboard,mlflow]'."
        )
    if "images" in (logger or {}) and not any(one.images for one in kinds.values()):
        raise UserError("logger.images does nothing here, because no tracker shows images: leave it out.")


def check_choice(words: Iterable[str], logger: Mapping[str, Any] | None) -> None:
    """Checks that every option of a typed list, as in logger=[wandb,csv], is a tracker of its own. words: of the
    command line. (Hydra does not record which options of a list were chosen.)

    Raises:
        UserError: the list is empty, none is beside others, or two yamls fill the same keys, so that one replaced the
            other.
    """
    lists = [value for key, _, value in (word.partition("=") for word in words) if key == "logger" and value[:1] == "["]
    if not lists:
        return
    chosen = [one.strip(" '\"") for one in lists[-1].strip("[] ").split(",") if one.strip()]
    wanted = [one for one in chosen if one != NONE]
    if not chosen or (wanted and len(wanted) < len(chosen)):
        raise UserError(f"logger=[{','.join(chosen)}] is not a list of trackers: type logger=none to track nothing.")
    if len(wanted) > len(nodes(logger)):
        raise UserError(
            f"logger=[{','.join(chosen)}] names {len(wanted)} trackers whose yamls have the same keys, so that one "
            "replaces another: put the keys of your own yaml below a name, as in conf/logger/csv.yaml."
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
