"""Objects: erase CIFAR-10 classes, by MACE's protocol (arXiv 2403.06135) as RealEra uses it (arXiv 2410.09140).

Acc_e: "a photo of the {class}"; Acc_g: the same with each of MACE's three synonyms; Acc_s: the nine other classes.
Beside them stand phrases that evoke the class without naming it, and words that no caption of the miniature held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

import yaml

from realera.contracts import Concept, Mode, Prompt, Split, UserError
from realera.paths import TASK_DATA
from realera.tasks.prompts import check_template, clean_name, fill, number

PROTOCOL_IMAGES: Mapping[str, int] = {"erase": 200, "near": 200, "keep": 200, "associated": 50, "unseen": 50}


class ObjectTask:
    """Any concept can be erased: the ten classes know their anchor and their words, another one is told them.

    concepts: one name or several, erased together. anchor: null = each class's own; one for all, or one per concept.
    images: how many images per prompt in each split (the paper gives 200 per class and no count for synonyms).
    first_seed: every prompt is drawn with seeds first_seed, first_seed + 1, ...: the same for every method.
    templates: more training templates. synonyms, associated, unseen: a single concept's words, not the file's.

    Raises UserError for a concept or anchor that cannot be used.
    """

    name = "object"
    headline: Mapping[str, Mode] = dict.fromkeys(("acc_e", "acc_s", "acc_g", "acc_a", "acc_u"), "mean_prob")
    h_o_terms = ("acc_e", "acc_s", "acc_g")

    def __init__(
        self,
        concepts: str | int | Sequence[str] | None,
        anchor: str | Sequence[str] | None = None,
        images: Mapping[str, int] = PROTOCOL_IMAGES,
        first_seed: int = 0,
        templates: Sequence[str] = (),
        synonyms: Sequence[str] | None = None,
        associated: Sequence[str] | None = None,
        unseen: Sequence[str] | None = None,
        data: str = "objects.yaml",
    ) -> None:
        raw = yaml.safe_load((TASK_DATA / data).read_text(encoding="utf-8"))
        self.version: int = raw["version"]
        self.template: str = raw["template"]
        self.classes: dict[str, dict[str, Any]] = raw["classes"]
        self.images = _check_images(images)
        self.first_seed = int(first_seed)
        if self.first_seed < 0:
            raise UserError(f"first_seed={first_seed} is negative: seeds start at 0")
        self.templates = [check_template(str(t)) for t in (*raw["training_templates"], *templates)]

        given = [concepts] if concepts is None or isinstance(concepts, (str, int)) else list(concepts)
        names = [self._class_or_name(c) for c in given] or [clean_name(None)]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise UserError(f"{twice[0]!r} is asked for more than once: name each concept once")
        self.words = {name: self._words_of(name) for name in names}
        typed = {"synonyms": synonyms, "associated": associated, "unseen": unseen}
        if changed := {key: [clean_name(w, key) for w in value] for key, value in typed.items() if value is not None}:
            if len(names) > 1:
                raise UserError(f"task.{next(iter(changed))} is for a single concept: erase {names} one at a time")
            self.words[names[0]].update(changed, **({"unseen_names": []} if unseen is not None else {}))
        self.concepts = [Concept(n, a) for n, a in zip(names, self._anchors(names, anchor))]
        self.labels = tuple(dict.fromkeys([*self.classes, *names]))

    # --- what was typed --------------------------------------------------------------------------------------------

    def _class_or_name(self, typed: object) -> str:
        """The class where one is meant ("Airplane"), else the name as typed."""
        name = clean_name(typed)
        if name.lower() in self.classes:
            return name.lower()
        for label, words in self.classes.items():
            if name.lower() in words["synonyms"]:
                raise UserError(f"{name!r} is judged as a synonym of the class {label!r}: type concept={label}")
        return name

    def _words_of(self, name: str) -> dict[str, list[str]]:
        """The concept's words by split; a phrase (a whole prompt) is told from a name by its place in the file."""
        own = self.classes.get(name, {})
        unseen = own.get("unseen", {"names": [], "phrases": []})
        return {
            "synonyms": list(own.get("synonyms", [])),
            "associated": list(own.get("associated", [])),
            "unseen_names": list(unseen["names"]),
            "unseen": list(unseen["phrases"]),
        }

    def _anchors(self, names: Sequence[str], typed: str | Sequence[str] | None) -> list[str]:
        given: list[Any] = [typed] * len(names) if typed is None or isinstance(typed, (str, int)) else list(typed)
        if len(given) != len(names):
            raise UserError(f"{len(given)} anchors for {len(names)} concepts: give one for all, or one for each")
        anchors = []
        for name, anchor in zip(names, given):
            if anchor is None and name not in self.classes:
                close = get_close_matches(name.lower(), self.classes, n=1)
                meant = f"did you mean {close[0]!r}? If not, " if close else ""
                raise UserError(
                    f"{name!r} is not one of the classes {', '.join(self.classes)}: {meant}say what it should become, "
                    "such as anchor=sky"
                )
            anchor = clean_name(self.classes[name]["anchor"] if anchor is None else anchor, "anchor")
            if anchor.lower() in (name.lower(), *(s.lower() for s in self.words[name]["synonyms"])):
                other = "field" if anchor.lower() == "sky" else "sky"
                raise UserError(f"the anchor {anchor!r} means {name!r} itself: take another, such as anchor={other}")
            anchors.append(anchor)
        return anchors

    # --- what is run -----------------------------------------------------------------------------------------------

    def training_prompts(self, concept: Concept) -> list[tuple[str, str]]:
        """Each training template with the target, and with the anchor."""
        return [(fill(t, concept.target), fill(t, concept.anchor)) for t in self.templates]

    def _named(self, split: Split) -> Iterator[tuple[str, str, str]]:
        """(name, prompt text, the concept a judge looks for), in the order they are drawn."""
        erased = [c.target for c in self.concepts]
        if split == "keep":
            yield from ((label, fill(self.template, label), label) for label in self.classes if label not in erased)
            return
        for concept in erased:
            own = self.words[concept]
            names = {"erase": [concept], "near": own["synonyms"], "unseen": own["unseen_names"]}.get(split, [])
            phrases = {"associated": own["associated"], "unseen": own["unseen"]}.get(split, [])
            yield from ((name, fill(self.template, name), concept) for name in names)
            yield from ((phrase, phrase, concept) for phrase in phrases)

    def eval_prompts(self) -> list[Prompt]:
        """All splits in the order erase, near, keep, associated, unseen; each prompt `images[split]` times."""
        return [
            prompt
            for split in get_args(Split)
            for prompt in number(self._named(split), split, self.images[split], self.first_seed)
        ]

    def protocol(self) -> dict[str, Any]:
        """What the numbers depend on: the words, how many images of each, and their seeds."""
        return {
            "task": self.name,
            "version": self.version,
            "concepts": [{"target": c.target, "anchor": c.anchor} for c in self.concepts],
            "labels": list(self.labels),
            "images_per_prompt": dict(self.images),
            "first_seed": self.first_seed,
            "prompts": {split: [text for _, text, _ in self._named(split)] for split in get_args(Split)},
        }


def _check_images(images: Mapping[str, int]) -> dict[str, int]:
    splits = get_args(Split)
    if unknown := sorted(set(images) - set(splits)):
        raise UserError(f"task.images names {unknown[0]!r}, which is no split: use {', '.join(splits)}")
    counts = {split: int(images.get(split, 0)) for split in splits}
    if min(counts.values()) < 0 or not counts["erase"]:
        raise UserError(f"task.images={counts} cannot be judged: ask for one image or more in erase, none below 0")
    return counts
