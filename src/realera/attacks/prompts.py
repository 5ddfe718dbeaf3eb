"""Prompts from a file: the published sets of Ring-A-Bell, P4D, MMA-Diffusion, UnlearnDiffAtk and I2P, or any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from realera.attack_contract import Attempt, Case
from realera.contracts import Concept, Prompt, UserError
from realera.setting_types import Batch, File, FirstSeed
from realera.tasks import files

COLUMNS: Mapping[str, tuple[str, ...]] = {
    **files.COLUMN_NAMES,
    "prompt": ("adv_prompt", "adversarial_prompt", "attack_prompt", "p4d_prompt", "prompt", "sensitive_prompt", "text"),
    "plain": ("target_prompt", "original_prompt"),
}
"""As `files.COLUMN_NAMES`. plain: the prompt that an adversarial prompt stands for (MMA-Diffusion's target_prompt)."""


class PromptFile:
    """csv: the table. Every row is a prompt with its seed, guidance and image size, where the table has them. The image
    of the prompt as it is, for the rate before the attack, is that of the row's plain prompt, or of the same prompt if
    the table has none. A row that names no erased concept belongs to the first one. sizes: whether images have the
    row's width and height. first_seed: of rows without a seed, plus the row's index. together: prompts drawn at once.
    """

    counts_plain = False

    def __init__(
        self, csv: File | None = None, sizes: bool = True, first_seed: FirstSeed = 0, together: Batch = 1
    ) -> None:
        self.csv = csv
        self.sizes = sizes
        self.first_seed = first_seed
        self.together = together
        self.texts: dict[str, str] = {}  # {id: the adversarial prompt}

    @staticmethod
    def passes(settings: Mapping[str, Any], per_image: float) -> float:
        return per_image

    def own_prompts(self, concepts: Sequence[Concept]) -> list[Prompt]:
        if self.csv is None:
            raise UserError("attack=prompts has no prompts: give a table of them, attack.csv=FILE.")
        named = {concept.target.casefold(): concept.target for concept in concepts}
        first = concepts[0].target
        made = []
        for place, row in enumerate(files.read_prompts(self.csv, "csv", names=COLUMNS, group="attack")):
            prompt = Prompt(
                f"csv-{row.id}",
                row.prompt if row.plain is None else row.plain,
                named.get((row.concept or first).casefold(), first),
                "erase",
                self.first_seed + place if row.seed is None else row.seed,
                guidance_scale=row.guidance,
                size=row.size if self.sizes else None,
            )
            self.texts[prompt.id] = row.prompt
            made.append(prompt)
        return made

    def __call__(self, case: Case) -> Mapping[str, Any]:
        return self.attack_together([case])[0]

    def attack_together(self, cases: Sequence[Case]) -> Sequence[Mapping[str, Any]]:
        cases[0].draw_all(cases, [Attempt(self.texts[case.prompt.id]) for case in cases])
        return [{} for _ in cases]
