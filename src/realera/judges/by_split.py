"""One judge made of several, each for some of the splits: bare skin is looked for in the images of the erased concept,
and the text's likeness in those that should stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from realera.contracts import Prompt, Split, UserError, Verdict
from realera.setting_types import Label
from realera.settings.command_settings import PlacedJudge


class BySplit:
    """Each image goes to the judge of its prompt's split; the verdicts are that judge's, in the order of the images.

    judges {name: judge}: each is loaded once, whatever the number of its splits. splits {split: name}: a split that is
    not named is not judged, and a prompt of it is refused. Raises UserError where the two do not fit.
    """

    def __init__(self, judges: Mapping[str, PlacedJudge], splits: Mapping[Split, Label]) -> None:
        self.judges, self.splits = dict(judges), dict(splits)
        if unknown := sorted(set(self.splits.values()) - set(self.judges)):
            raise UserError(f"judge.splits names {', '.join(unknown)}; judge.judges holds {', '.join(self.judges)}")
        if idle := sorted(set(self.judges) - set(self.splits.values())):
            raise UserError(f"judge.judges holds {', '.join(idle)}, which no split of judge.splits is judged by")
        self.name = "_".join(dict.fromkeys(judge.name for judge in self.judges.values()))

    def __call__(self, images: Sequence[Path], prompts: Sequence[Prompt]) -> list[Verdict]:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
        rows: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            if prompt.split not in self.splits:
                raise UserError(f"judge.splits says nothing of the split {prompt.split}: name one of its judges there")
            rows.setdefault(self.splits[prompt.split], []).append(row)
        verdicts: dict[int, Verdict] = {}
        for name, mine in rows.items():
            said = self.judges[name]([images[row] for row in mine], [prompts[row] for row in mine])
            verdicts.update(zip(mine, said, strict=True))
        return [verdicts[row] for row in range(len(prompts))]

    def protocol(self) -> dict[str, Any]:
        """Who judged what, and how."""
        return {
            "judge": self.name,
            "version": 1,
            "splits": dict(self.splits),
            "judges": {name: judge.protocol() for name, judge in self.judges.items()},
        }
