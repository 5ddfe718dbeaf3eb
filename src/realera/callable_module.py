"""Modules that are called like the public function of the same name: `realera.evaluate` is a command's module and a
function, `realera.methods` and `realera.tasks` are packages and functions. Python puts a module in the place of the
function as soon as somebody imports it, so the module itself can be called."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """Called, it calls the function of its name in `realera.api`."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        api = import_module("realera.api")  # which imports these modules
        return getattr(api, self.__name__.rpartition(".")[2])(*given, **named)


def make_callable(name: str) -> None:
    """name: of a module of this package, which calls this when it is imported."""
    sys.modules[name].__class__ = CallableModule
