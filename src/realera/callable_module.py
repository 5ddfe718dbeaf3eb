"""Modules that can be called like a function. `realera.apply`, `realera.evaluate`, `realera.methods` and
`realera.tasks` are modules and also public functions. Importing such a module replaces the function of the same name in
the package, so the module itself must be callable."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A call is passed on to the function of the same name in `realera.api`."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        api = import_module("realera.api")  # imported here because it imports these modules
        return getattr(api, self.__name__.rpartition(".")[2])(*given, **named)


def make_callable(name: str) -> None:
    """Called by the module `name` of this package while it is being imported."""
    sys.modules[name].__class__ = CallableModule
