"""Objects: erase CIFAR-10 classes, by MACE's protocol (arXiv 2403.06135) as RealEra uses it (arXiv 2410.09140).

Acc_e: "a photo of the {class}"; Acc_g: the same with each of MACE's three synonyms; Acc_s: the nine other classes.
Further splits: phrases that evoke the class without naming it, and words that occur in no caption of the miniature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from realera.contracts import Mode, Split
from realera.setting_types import FirstSeed, Label, Template, Whole, Word
from realera.tasks.base import Anchor, NamedTask, Names, ToldNames, load

DATA = {"version": int, "template": str, "training_templates": list, "classes": {...: dict}}
PROTOCOL_IMAGES: Mapping[Split, int] = {"erase": 200, "near": 200, "keep": 200, "associated": 50, "unseen": 50}


class ObjectTask(NamedTask):
    """Erases any concept. The data file has an anchor and words for the ten classes; any other concept needs an anchor.

    concepts: one name or several, erased together. anchor: one for all, or one per concept; None = the class's own.
    images: images per prompt in each split (the paper gives 200 per class, and no number for synonyms). first_seed:
    every prompt is drawn with seeds first_seed, first_seed + 1, ..., for every method. templates: replace the training
    templates. synonyms, associated, unseen: replace the data file's words of a single concept. told: other classes that
    a method may be told to preserve; they are not judged (`base.ToldNames`).

    Raises UserError for an invalid concept or anchor.
    """

    name = "object"
    headline: Mapping[str, Mode] = dict.fromkeys(("acc_e", "acc_s", "acc_g", "acc_a", "acc_u"), "mean_prob")
    known_as = "classes"

    def __init__(
        self,
        concepts: Names,
        anchor: Anchor = None,
        images: Mapping[Split, Whole] = PROTOCOL_IMAGES,
        first_seed: FirstSeed = 0,
        templates: Sequence[Template] = (),
        synonyms: Sequence[Word] | None = None,
        associated: Sequence[Word] | None = None,
        unseen: Sequence[Word] | None = None,
        told: ToldNames = (),
        data: Label = "objects.yaml",
    ) -> None:
        raw = load(data, DATA)
        super().__init__(
            concepts,
            anchor,
            version=raw["version"],
            known=raw["classes"],
            preserved=list(raw["classes"]),
            templates=[raw["template"]],
            training_templates=list(templates) or raw["training_templates"],
            images=images,
            first_seed=first_seed,
            words={"synonyms": synonyms, "associated": associated, "unseen": unseen},
            told=told,
        )
