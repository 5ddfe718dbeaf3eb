"""A prompt of random words: the control of attacks by text. A model draws the concept for it by chance alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from realera.attack_contract import Attempt, Case
from realera.setting_types import Count


class RandomPrompt:
    """As many random words of one token each as the prompt has tokens. Words of the concept's name and of its prompts
    are left out. tries: prompts that are drawn, each anew, until one succeeds."""

    counts_plain = False

    def __init__(self, tries: Count = 1) -> None:
        self.tries = tries

    @staticmethod
    def passes(settings: Mapping[str, Any], per_image: float) -> float:
        return int(settings.get("tries") or 1) * per_image

    def __call__(self, case: Case) -> Mapping[str, Any]:
        named = " ".join([case.concept.target, *(prompt.text for prompt in case.prompts)]).casefold().split()
        words = [word for word in case.backbone.words() if word not in named]
        tokens = int(case.backbone.encode([case.prompt.text]).length[0]) - 1
        for number in range(self.tries):
            chosen = torch.randint(len(words), (tokens,), generator=case.generator).tolist()
            if case.draw([Attempt(" ".join(words[i] for i in chosen))], step=number)[0]:
                break
        return {}
