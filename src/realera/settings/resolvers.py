"""OmegaConf resolvers, the `${name:...}` of a yaml: values by backbone, task or space, and defaults for this machine.

This module does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hydra.utils import get_class
from omegaconf import DictConfig, ListConfig, OmegaConf

from realera.contracts import UserError
from realera.settings import help_text
from realera.settings.source_code import find
from realera.system.devices import number as cuda_devices

WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # W&B's servers, before and after its move


def register_resolvers() -> None:
    """Registers ${default_backbone:}, ${by_backbone:...}, ${by_task:...}, ${by_space:...}, ${times:...},
    ${wandb_mode:} and, for the text of --help, ${own_settings:...} for every config."""
    OmegaConf.register_new_resolver("default_backbone", lambda: default_backbone()[0], replace=True)
    OmegaConf.register_new_resolver("by_backbone", by_backbone, replace=True)
    OmegaConf.register_new_resolver("by_task", by_task, replace=True)
    OmegaConf.register_new_resolver("by_space", by_space, replace=True)
    OmegaConf.register_new_resolver("times", lambda a, b: a * b, replace=True)  # ${times:1000,${seed}}
    OmegaConf.register_new_resolver("wandb_mode", wandb_mode, replace=True)
    OmegaConf.register_new_resolver("own_settings", help_text.own_settings, replace=True)


@cache
def default_backbone() -> tuple[str, str]:
    """(backbone, reason): Stable Diffusion 1.4 if the installed torch can use a CUDA device, otherwise mini."""
    if not cuda_devices():
        return "mini", "because there is no CUDA device; type backbone=sd14 for Stable Diffusion 1.4"
    try:
        build = metadata.version("torch")
    except metadata.PackageNotFoundError:
        build = ""
    if "+cpu" in build:
        return (
            "mini",
            f"because torch {build} cannot use the CUDA device; type backbone=sd14 for Stable Diffusion 1.4",
        )
    return "sd14", "a CUDA device was found; backbone=mini uses the small model in the package"


def by_backbone(table: Mapping[str, Any], *, _root_: DictConfig) -> Any:
    """`${by_backbone:{default:1e-5,mini:1e-3}}`: the entry of the chosen backbone's `name`, otherwise of the first name
    in its `like` that has one, otherwise `default`."""
    name = OmegaConf.select(_root_, "backbone.name")
    if not isinstance(name, str):
        raise UserError(f"backbone.name={'null' if name is None else name} is not valid: give a text, such as sd14.")
    like = OmegaConf.select(_root_, "backbone.like")
    kinds = list(like) if isinstance(like, ListConfig) else []
    if (found := next((kind for kind in (name, *kinds, "default") if kind in table), None)) is None:
        raise UserError(f"this setting has no default for backbone {name} (only for {', '.join(table)}): type a value.")
    return table[found]


def by_task(table: Mapping[str, Any], *, _root_: DictConfig) -> Any:
    """`${by_task:{default:0.1,style:0.001}}`: the entry of the chosen task's `name`, otherwise `default`."""
    target = OmegaConf.select(_root_, "task._target_")
    if target is not None and isinstance(found := find(str(target)), str):
        raise UserError(f"task._target_={target}: {found}; leave it out, so that the yaml's value is used.")
    task: Any = None if target is None else get_class(target)  # a task's module does not import torch
    return table.get(str(getattr(task, "name", None)), table["default"])


def by_space(table: Mapping[str, Any], *, _root_: DictConfig) -> Any:
    """`${by_space:{default:25,value:100}}`: the entry of the space in which neighbours are mined, or of the closed
    form's space if none are mined; otherwise `default`."""
    spaces = (OmegaConf.select(_root_, f"method.{part}.space") for part in ("neighbours", "edit"))
    return table.get(str(next((space for space in spaces if space), None)), table["default"])


def wandb_mode() -> str:
    """WANDB_MODE if it is set, otherwise "online" if the user is logged in and "offline" if not."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        known = netrc.read_text(encoding="utf-8", errors="replace") if netrc.is_file() else ""  # a pipe would block
    except OSError:
        known = ""
    own = urlsplit(os.environ.get("WANDB_BASE_URL", "")).netloc  # a self-hosted server
    logged_in = any(host in known for host in ((own,) if own else WANDB_HOSTS))
    return "online" if logged_in or os.environ.get("WANDB_API_KEY") else "offline"
