"""The run that a command carries out, with everything that its steps share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from realera import costs
from realera.costs import Meter
from realera.runs.folders import Run
from realera.settings.run_settings import Settings
from realera.system.ranks import ONE_PROCESS, Ranks


@dataclass(frozen=True)
class Session:
    """A run while it is carried out. The steps (`runs.steps`) take it together with the models that they use.

    run: its folder takes the files, its settings decide. ranks: the processes that share the work. meter: measures it.
    loggers: of Lightning; they record the training and the results.
    """

    run: Run
    ranks: Ranks = ONE_PROCESS
    meter: Meter = field(default_factory=Meter)
    loggers: Sequence[Any] = ()

    @classmethod
    def of_run(cls, run: Run, ranks: Ranks = ONE_PROCESS) -> Session:
        """A session whose costs are recorded in the run folder, once its meter is entered."""
        return cls(run, ranks, costs.of_run(run.folder, ranks))

    def into(self, folder: Path) -> Session:
        """The same session with another folder for its files."""
        return replace(self, run=replace(self.run, folder=folder))

    @property
    def folder(self) -> Path:
        return self.run.folder

    @property
    def settings(self) -> Settings:
        return self.run.settings
