"""Concept erasure for text-to-image diffusion models, from Python (`erase`) and as commands (python -m realera)."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from realera.api import Erased as Erased
    from realera.api import erase as erase
    from realera.api import load as load
    from realera.api import methods as methods
    from realera.api import miniature_pipeline as miniature_pipeline
    from realera.api import tasks as tasks
    from realera.applied import Applied as Applied
    from realera.contracts import UserError as UserError
    from realera.evaluation.summary import AttackResult as AttackResult
    from realera.evaluation.summary import Evaluation as Evaluation

__version__ = "0.1.0"
COMMANDS = (
    "train",
    "evaluate",
    "generate",
    "export",
    "apply",
    "report",
    "demo",
    "cache",
    "dashboard",
    "residue",
    "attack",
)
CALLED = ("apply", "attack", "attacks", "evaluate", "methods", "tasks")
PUBLIC = ("Applied", "AttackResult", "Erased", "Evaluation", "erase", "load", "miniature_pipeline")
__all__ = [
    "Applied",
    "AttackResult",
    "Erased",
    "Evaluation",
    "UserError",
    "apply",
    "attack",
    "attacks",
    "erase",
    "evaluate",
    "load",
    "methods",
    "miniature_pipeline",
    "tasks",
]

# `python -m realera.train` imports this package first, while sys.argv is still ["-m"]; realera-train is a script.
_by_module = sys.argv[:1] == ["-m"] and any(f"realera.{name}" in sys.orig_argv[1:] for name in COMMANDS)
if _by_module or any(sys.argv[:1] and sys.argv[0].endswith(f"realera-{name}") for name in COMMANDS):
    from realera.system import interrupts

    interrupts.begin()


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `import realera` is fast."""
    if name in CALLED:  # a callable module, imported already or not
        return import_module(f"realera.{name}")
    if name in PUBLIC:
        from realera import api

        return getattr(api, name)
    if name == "UserError":
        from realera.contracts import UserError

        return UserError
    raise AttributeError(f"module 'realera' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
