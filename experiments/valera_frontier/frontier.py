"""Residue of erased people against preservation of the others, by number erased: frontier.py RUNS RESULTS.json

VALERA erases the miniature's first 1, 5, 10 and 24 people together. Other people are not kept by name, kept exactly or
kept at a price, with three pairs of price and gain. It continues where it was stopped: every cell has a folder of
images in RUNS, and a finished cell has its numbers there.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from realera import cli, paths
from realera.contracts import Judge, Prompt, Split
from realera.evaluation.generate import generate_images, original_images
from realera.evaluation.moved import moved
from realera.methods.valera import ValueSpaceErasure
from realera.runs import steps
from realera.settings import composition, resolvers
from realera.system import disk
from realera.tasks.base import load
from realera.tasks.prompts import Wording, number
from realera.training.pairs import encoded_pairs

SIZES = (1, 5, 10, 24)  # people erased at once, of 24
KEEPS: Mapping[str, float | None] = {"none": None, "exactly": float("inf"), "price 10": 10.0, "price 1": 1.0}
READ = ((10.0, 1.0), (10.0, 1.1), (1.0, 1.05))  # price of reading, gain; several settings of many people at once
BY_NAME = {1: 4, 5: 2, 10: 1, 24: 1}  # images of each erased person, by name
BY_PHRASE = {1: 3, 5: 1, 10: 1, 24: 1}  # of each phrase
OF_FAR = {1: 1, 5: 1, 10: 1, 24: 2}  # of each far thing
FIRST_SEED = 60_000  # used by no table and no search


@dataclass(frozen=True)
class Cell:
    """One model: the number of erased people, the way names are kept, the price of reading and the gain."""

    erased: int
    keep: str
    price: float
    gain: float

    @property
    def folder(self) -> str:
        return f"{self.erased}-{self.keep.replace(' ', '')}-{self.price:g}-{self.gain:g}"


@dataclass(frozen=True)
class World:
    """people, far: names; phrases: those that evoke one of the tables' five people."""

    people: Sequence[str]
    far: Sequence[str]
    phrases: Mapping[str, Sequence[str]]

    def others(self, erased: int) -> Sequence[str]:
        return self.people[erased:]

    def told(self, erased: int) -> Sequence[str]:
        """Every second of the other people, or of the far things if no other person is left."""
        return (self.others(erased) or self.far)[::2]


def world() -> World:
    people, things = load("celebrities.yaml"), load("nsfw.yaml")
    phrases = {name: [*entry["near"], *entry["associated"]] for name, entry in people["concepts"].items()}
    everyday = things["worlds"]["miniature"]["preserved"]
    far = [*list(load("objects.yaml")["classes"])[::2], *everyday[::9]]
    return World(people["worlds"]["miniature"]["preserved"], far, phrases)


def prompts(world: World, erased: int) -> dict[str, list[Prompt]]:
    """{"names", "phrases", "told", "untold", "far": prompts}."""
    told = set(world.told(erased))

    def drawn(split: Split, texts: list[tuple[str, str]], images: int) -> list[Prompt]:
        return number([Wording(text, text, concept) for text, concept in texts], split, images, FIRST_SEED)

    gone = world.people[:erased]
    others = [(f"A portrait of {name}", name) for name in world.others(erased)]
    far = [(f"a photo of the {name}", name) for name in world.far]
    groups = {
        "names": drawn("erase", [(f"A portrait of {name}", name) for name in gone], BY_NAME[erased]),
        "phrases": drawn(
            "associated",
            [(text, name) for name in gone for text in world.phrases.get(name, ())],
            BY_PHRASE[erased],
        ),
        "told": drawn("keep", [pair for pair in others if pair[1] in told], 1),
        "untold": drawn("keep", [pair for pair in others if pair[1] not in told], 1),
        "far": drawn("keep", [pair for pair in far if pair[1] not in told], OF_FAR[erased]),
        "far, told": drawn("keep", [pair for pair in far if pair[1] in told], OF_FAR[erased]),
    }
    return {name: group for name, group in groups.items() if group}


def measured(groups: Mapping[str, list[Prompt]], judge: Judge, folder: Path) -> dict[str, Any]:
    """{group: {"mean": mean probability of the prompt's concept, "top1": share of images with it as the first choice,
    both in percent, "moved", "images"}}."""
    said = {}
    for name, group in groups.items():
        files = [folder / paths.IMAGES / f"{prompt.id}.png" for prompt in group]
        verdicts = judge(files, group)
        values = [100 * verdict.value for verdict in verdicts]
        first = [100.0 * (verdict.label == prompt.concept) for verdict, prompt in zip(verdicts, group)]
        away = [moved(folder / "originals" / file.name, file) for file in files]
        numbers = (("mean", values), ("top1", first), ("moved", away))
        said[name] = {**{key: round(statistics.mean(each), 2) for key, each in numbers}, "images": len(group)}
    return said


def main(runs: str, results: str) -> None:
    resolvers.register_resolvers()
    cli.set_up_log()
    known, cells = world(), [Cell(size, keep, *read) for size in SIZES for keep in KEEPS for read in READ]
    found: dict[Cell, Any] = {}
    judge: Judge | None = None
    for place, cell in enumerate(cells):
        folder = Path(runs) / cell.folder
        file = folder / "numbers.json"
        if not file.is_file():
            given = ["task=celebrity", "backbone=mini", "judge=miniature", "logger=none"]
            with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
                config = composition.plain(compose("train", given))
            config["task"]["concepts"] = list(known.people[: cell.erased])
            task, backbone = composition.build_task(config), steps.load_backbone(config)
            judge = judge or steps.build_judge(config, task)
            keep_price = KEEPS[cell.keep]
            kept = () if keep_price is None else tuple(known.told(cell.erased))
            edit = ValueSpaceErasure(price=cell.price, gain=cell.gain, keep=kept, keep_price=keep_price or 0.0)
            backbone.apply(edit(backbone, encoded_pairs(backbone, task), []))
            groups = prompts(known, cell.erased)
            drawn = [prompt for group in groups.values() for prompt in group]
            folder.mkdir(parents=True, exist_ok=True)
            original_images(backbone, drawn, folder, chunk=32)
            generate_images(backbone, drawn, folder, chunk=32)
            disk.write_text(file, json.dumps(measured(groups, judge, folder)))
        found[cell] = json.loads(file.read_text(encoding="utf-8"))
        print(f"{place + 1}/{len(cells)}", cell.folder, found[cell], flush=True)
    rows = [{**asdict(cell), "groups": said} for cell, said in found.items()]
    phrased = {size: [name for name in known.people[:size] if name in known.phrases] for size in SIZES}
    told = {size: list(known.told(size)) for size in SIZES}
    content = {"first_seed": FIRST_SEED, "people": known.people, "phrases_of": phrased, "told": told, "rows": rows}
    disk.write_text(Path(results), json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
