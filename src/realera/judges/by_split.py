"""A judge that uses another judge for each split: for example NudeNet for the erased concept, and the CLIP score for
preserved captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from realera.contracts import Prompt, Split, UserError, Verdict
from realera.setting_types import Label
from realera.settings.command_settings import PlacedJudge


class BySplit:
    """Each image is judged by the judge of its prompt's split. The verdicts are in the order of the images.

    judges {name: judge}: each is loaded once. splits {split: name}: a prompt of a split that is not listed is refused.
    Raises UserError if a name in `splits` is not in `judges`, or a judge has no split.
    """

    def __init__(self, judges: Mapping[str, PlacedJudge], splits: Mapping[Split, Label]) -> None:
        self.judges, self.splits = dict(judges), dict(splits)
        if unknown := sorted(set(self.splits.values()) - set(self.judges)):
            raise UserError(f"judge.splits names {', '.join(unknown)}; judge.judges has {', '.join(self.judges)}")
        if idle := sorted(set(self.judges) - set(self.splits.values())):
            raise UserError(f"judge.judges has {', '.join(idle)}, but no split of judge.splits uses it")
        self.name = "_".join(dict.fromkeys(judge.name for judge in self.judges.values()))

    def __call__(self, images: Sequence[Path], prompts: Sequence[Prompt]) -> list[Verdict]:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
        rows: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            if prompt.split not in self.splits:
                raise UserError(f"judge.splits has no judge for the split {prompt.split}: add one of judge.judges")
            rows.setdefault(self.splits[prompt.split], []).append(row)
        verdicts: dict[int, Verdict] = {}
        for name, own in rows.items():
            answers = self.judges[name]([images[row] for row in own], [prompts[row] for row in own])
            verdicts.update(zip(own, answers, strict=True))
        return [verdicts[row] for row in range(len(prompts))]

    def protocol(self) -> dict[str, Any]:
        return {
            "judge": self.name,
            "version": 1,
            "splits": dict(self.splits),
            "judges": {name: judge.protocol() for name, judge in self.judges.items()},
        }
