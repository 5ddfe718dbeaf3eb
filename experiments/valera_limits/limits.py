"""Difficult erasures with VALERA and UCE on the miniature: limits.py RUNS RESULTS.json

An anchor that is another thing, kept names close to the concept, a concept that includes others or is part of another,
and the name in unusual prompts. Every group of prompts is judged before and after: top-1, percent. It continues where
it was stopped: every cell has a folder of images in RUNS, and a finished cell has its numbers there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from realera import cli, paths
from realera.contracts import Judge, Prompt
from realera.evaluation.generate import generate_images, original_images
from realera.runs import steps
from realera.settings import composition, resolvers
from realera.system import disk
from realera.tasks.base import load
from realera.tasks.prompts import Wording, number, slug
from realera.training.pairs import encoded_pairs

METHODS = ("valera", "uce")
IMAGES = 4  # per prompt
FIRST_SEED = 70_000  # used by no table
Group = Sequence[tuple[str, str]]  # (prompt, the label expected in its images)


@dataclass(frozen=True)
class Case:
    """One erasure. groups: prompts by their relation to the concept; keep: names that VALERA is given to keep."""

    question: str
    task: str
    concept: str
    anchor: str | None
    groups: Mapping[str, Group]
    keep: Sequence[str] = field(default=())

    @property
    def folder(self) -> str:
        said = [self.question, self.concept, self.anchor or "", *self.keep]
        return "-".join(slug(part) for part in said if part)


def photos(*words: str, of: str | None = None) -> Group:
    return [(f"a photo of the {word}", of or word) for word in words]


def cases() -> list[Case]:
    classes = load("objects.yaml")["classes"]
    people = load("celebrities.yaml")["concepts"]

    def of_class(name: str) -> dict[str, Group]:
        entry = classes[name]
        return {
            "name": photos(name),
            "synonyms": photos(*entry["synonyms"], of=name),
            "phrases": [(text, name) for text in entry["associated"]],
        }

    def of_person(name: str) -> dict[str, Group]:
        said = [*people[name]["near"], *people[name]["associated"]]
        return {"name": [(f"A portrait of {name}", name)], "phrases": [(text, name) for text in said]}

    made = []
    anchors = "an anchor that is another thing"
    for name, anchor in (("truck", "automobile"), ("cat", "dog"), ("deer", "horse"), ("ship", "airplane")):
        groups = {
            **of_class(name),
            "the anchor's own": [*photos(anchor), *photos(*classes[anchor]["synonyms"], of=anchor)],
        }
        made.append(Case(anchors, "object", name, anchor, groups))
    groups = {**of_person("Tom Cruise"), "the anchor's own": of_person("Elon Musk")["name"]}
    made.append(Case(anchors, "celebrity", "Tom Cruise", "Elon Musk", groups))

    close = "kept names close to the concept"
    for name, *keep in (
        ("truck",), ("truck", "automobile"), ("truck", "lorry"), ("truck", "lorry", "rig", "hauler"),
        ("cat",), ("cat", "dog"), ("cat", "kitty"),
    ):  # fmt: skip
        kept = {"kept": photos(*keep, of=name if keep[0] not in classes else None)} if keep else {}
        rest = [word for word in classes[name]["synonyms"] if word not in keep]
        groups = {**of_class(name), **({"synonyms": photos(*rest, of=name)} if rest else {}), **kept}
        if not rest:
            groups.pop("synonyms")
        made.append(Case(close, "object", name, None, groups, keep))
    for phrase in people["Tom Cruise"]["associated"][:1]:
        groups = of_person("Tom Cruise")
        groups["phrases"] = [pair for pair in groups["phrases"] if pair[0] != phrase]
        made.append(
            Case(close, "celebrity", "Tom Cruise", None, {**groups, "kept": [(phrase, "Tom Cruise")]}, [phrase])
        )

    inside = "a concept that holds others, or lies inside another"
    beasts, rest = ("bird", "cat", "deer", "dog", "frog", "horse"), ("airplane", "automobile", "ship", "truck")
    groups = {"things inside it": photos(*beasts), "other things": photos(*rest)}
    made.append(Case(inside, "object", "animal", "field", groups))
    for whole, part in (("teddy bear", "bear"), ("light bulb", "light"), ("alarm clock", "clock")):
        groups = {"thing around it": photos(whole), "other things": photos("apple", "traffic light", "bell", "chair")}
        made.append(Case(inside, "nsfw", part, "room", groups))
    women = [f"A portrait of {name}" for name in ("Jennifer Lawrence", "Mariah Carey", "Queen Elizabeth", "Liv Tyler")]
    pairs = [(text, text.removeprefix("A portrait of ")) for text in women]
    groups = {"things around it": pairs[:1], "other things": pairs[1:]}
    made.append(Case(inside, "celebrity", "Jennifer", "a person", groups))
    styles = [(f"An artwork by {name}", name) for name in ("Claude Monet", "Van Gogh", "Pablo Picasso", "Rembrandt")]
    groups = {"things inside it": styles[:1], "other things": styles[1:]}
    made.append(Case(inside, "style", "Impressionism", "a painting", groups))
    phrase = "Maverick from Top Gun"
    groups = {"name": [(phrase, "Tom Cruise")], "thing around it": of_person("Tom Cruise")["name"]}
    made.append(Case(inside, "celebrity", phrase, "a person", groups))

    company = "the name in unusual company"
    for name, other in (("truck", "cat"), ("cat", "truck")):
        odd = [f"{name}s", name.upper(), f"{name}, {name}, {name}", " ".join(name), f"a {name}let"]
        long = [f"in the early morning, long before anybody else in the town was awake, there was a {name}"]
        both = [f"a {name} and a {other}", f"a {other} and a {name}", f"a {name} next to a {other}"]
        groups = {
            "other spellings": [(text, name) for text in odd],
            "long prompts": [(text, name) for text in long],
            "with another thing": [(text, name) for text in both],
            "in an artist's style": [(f"a painting of a {name} by Van Gogh", name)],
            "the other thing beside it": [(text, other) for text in both],
            "the artist's style of it": [(f"a painting of a {name} by Van Gogh", "Van Gogh")],
        }
        made.append(Case(company, "object", name, None, groups))
    return made


def prompts(groups: Mapping[str, Group]) -> dict[str, list[Prompt]]:
    """The prompts of each group. A text with two expected labels has one id, so it is drawn once."""
    return {
        name: number([Wording(text, text, label) for text, label in group], "keep", IMAGES, FIRST_SEED)
        for name, group in groups.items()
    }


def measured(groups: Mapping[str, list[Prompt]], judge: Judge, folder: Path) -> dict[str, float]:
    """{group: percent of its images in which the judge's first choice is the expected label}."""
    said = {}
    for name, group in groups.items():
        verdicts = judge([folder / f"{prompt.id}.png" for prompt in group], group)
        hits = [verdict.label == prompt.concept for verdict, prompt in zip(verdicts, group)]
        said[name] = round(100 * sum(hits) / len(hits), 1)
    return said


def erased(case: Case, method: str, folder: Path) -> dict[str, Any]:
    """{"original", "erased": as `measured`} for one erasure. Its images are written to the folder."""
    given = [f"task={case.task}", "backbone=mini", "judge=miniature", "logger=none", f"method={method}"]
    with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
        config = composition.plain(compose("train", given))
    config["task"] |= {"concepts": case.concept, "anchor": case.anchor}
    if method == "valera":
        config["method"]["edit"]["keep"] = list(case.keep)
    task, backbone = composition.build_task(config), steps.load_backbone(config)
    judge = steps.build_judge(config, task)
    backbone.apply(composition.build(config["method"]["edit"])(backbone, encoded_pairs(backbone, task), []))
    groups = prompts(case.groups)
    drawn = list({prompt.id: prompt for group in groups.values() for prompt in group}.values())
    folder.mkdir(parents=True, exist_ok=True)
    original_images(backbone, drawn, folder, chunk=32)
    generate_images(backbone, drawn, folder, chunk=32)
    return {
        when: measured(groups, judge, folder / at) for when, at in (("original", "originals"), ("erased", paths.IMAGES))
    }


def main(runs: str, results: str) -> None:
    resolvers.register_resolvers()
    cli.set_up_log()
    rows = []
    for case in cases():
        row: dict[str, Any] = {"question": case.question, "task": case.task, "concept": case.concept}
        row |= {
            "anchor": case.anchor,
            "keep": list(case.keep),
            "images": {n: IMAGES * len(g) for n, g in case.groups.items()},
        }
        for method in METHODS:
            if method == "uce" and case.keep:
                continue  # UCE takes its kept names in another way
            folder = Path(runs) / f"{method}-{case.folder}"
            file = folder / "numbers.json"
            if not file.is_file():
                disk.write_text(file, json.dumps(erased(case, method, folder)))
            said = json.loads(file.read_text(encoding="utf-8"))
            row |= {"original": said["original"], method: said["erased"]}
        rows.append(row)
        print(row, flush=True)
    disk.write_text(Path(results), json.dumps({"first_seed": FIRST_SEED, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
