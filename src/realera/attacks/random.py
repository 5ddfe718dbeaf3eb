"""A prompt of random words: the control of attacks by text. A model draws the concept for it by chance alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from realera.attack_contract import Attempt, Case
from realera.setting_types import Batch, Count


class RandomPrompt:
    """As many random words of one token each as the prompt has tokens. Words of the concept's name and of its prompts
    are left out. tries: prompts that are drawn, each anew, until one succeeds. together: prompts attacked at once."""

    counts_plain = False

    def __init__(self, tries: Count = 1, together: Batch = 1) -> None:
        self.tries = tries
        self.together = together

    @staticmethod
    def passes(settings: Mapping[str, Any], per_image: float) -> float:
        return int(settings.get("tries") or 1) * per_image

    def __call__(self, case: Case) -> Mapping[str, Any]:
        return self.attack_together([case])[0]

    def attack_together(self, cases: Sequence[Case]) -> Sequence[Mapping[str, Any]]:
        left = list(cases)
        for number in range(self.tries):
            shown = left[0].draw_all(left, [self._attempt(case) for case in left], step=number)
            left = [case for case, found in zip(left, shown) if not found]
            if not left:
                break
        return [{} for _ in cases]

    def _attempt(self, case: Case) -> Attempt:
        named = " ".join([case.concept.target, *(prompt.text for prompt in case.prompts)]).casefold().split()
        words = [word for word in case.backbone.words() if word not in named]
        tokens = int(case.backbone.encode([case.prompt.text]).length[0]) - 1
        chosen = torch.randint(len(words), (tokens,), generator=case.generator).tolist()
        return Attempt(" ".join(words[i] for i in chosen))
