"""Measures which texts drew a concept before a run erased it, and which still do (the command `residue`)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from realera import console, paths
from realera.contracts import Backbone, Guide, Judge, Mode, Pair, Prompt, Task
from realera.evaluation.measures import score, shows
from realera.evaluation.records import Which, read_manifest
from realera.files import plain_data
from realera.methods import nearness
from realera.methods.functional import FunctionalMining, measured
from realera.runs import attacking, steps
from realera.runs.session import Session
from realera.system import disk
from realera.tasks.prompts import slug
from realera.training.pairs import encoded_pairs

CHUNK = 4  # images of the concept drawn at once, as in mining, so that both share the cached images


def measure(session: Session, task: Task, asked: Mapping[str, Any], out: Path, judging: bool) -> dict[str, Any]:
    """Tests texts near every concept of a run, draws the nearest ones into `out`, and writes residue.json there.

    asked: the settings of conf/residue.yaml. judging: whether the run's judge scores the pictures.
    """
    run, settings = session.run, session.settings
    backbone = steps.load_run(run)
    guide = steps.guide_of(settings)
    own = list({text.casefold(): text for text in asked["texts"]}.values())
    at_once = settings.images_at_once
    concepts = [_measure_concept(backbone, pair, guide, own, asked, at_once) for pair in encoded_pairs(backbone, task)]
    prompts = [
        prompt
        for number, concept in enumerate(concepts)
        for prompt in _prompts(number, concept, asked["pictured"], asked["seeds"])
    ]
    steps.draw(session.into(out), backbone, prompts)
    judge = steps.build_judge(run.config, task) if judging and prompts else None
    if judge is not None:
        _judge(judge, attacking.mode_of(judge, task), out, concepts)
    for concept in concepts:
        classify(concept, asked["within"])
    found = {
        "run": str(run.folder),
        "method": str(settings.method.name),
        "backbone": backbone.name,
        "judge": None if judge is None else judge.name,
        "within": asked["within"],
        "vocabulary": asked["vocabulary"],
        "guided": guide is not None,
        "concepts": concepts,
    }
    disk.write_text(out / paths.RESIDUE, plain_data.json_text(found, indent=1) + "\n")
    return found


def _measure_concept(
    backbone: Backbone, pair: Pair, guide: Guide | None, own: Sequence[str], asked: Mapping[str, Any], at_once: int
) -> dict[str, Any]:
    """A concept's texts, sorted by how nearly the original model draws the concept from them.

    value: `nearness.closeness`. before, after: `nearness.noise_distances` with the original model and with the erased
    model.
    """
    name, anchor = pair.concept.target, pair.concept.anchor
    miner = FunctionalMining(asked["vocabulary"], asked["looked"], 0, images=asked["images"], chunk=min(at_once, CHUNK))
    with backbone.original():
        near = miner.candidates(backbone, name, own)
        images: Tensor = miner.drawn(backbone, pair)
    texts = [name, *(text for text, _ in near)]
    before = measured(backbone, images, name, texts, paths.cache_dir(), at_once).tolist()
    with console.bar(f"texts near '{name}', erased model", len(texts)) as advance:
        after = nearness.noise_distances(backbone, images, name, texts, guide, advance, at_once).tolist()
    values = [1.0, *(value for _, value in near)]
    rows = [
        {"text": text, "own": text in own, "value": value, "before": was, "after": now}
        for text, value, was, now in zip(texts, values, before, after)
    ]
    rows[1:] = sorted(rows[1:], key=lambda row: row["before"])
    return {"concept": name, "anchor": anchor, "texts": rows}


def classify(concept: dict[str, Any], within: float) -> None:
    """Sets the state of every text, and counts the texts other than the name.

    A text drew the concept if its noise prediction was close or the judge sees the concept in one of its pictures;
    "never": it did not. After the erasure it is "left" if its noise prediction is close or most of its judged pictures
    show the concept, "partly" if fewer do, and "gone" if none does. unseen: texts that were not drawn; unjudged: texts
    whose pictures after the erasure no judge could judge. Both are classified by their noise predictions alone.
    """

    def seen(row: Mapping[str, Any], when: str) -> tuple[int, int]:
        return row.get(f"shown_{when}") or 0, row.get(f"scored_{when}") or 0

    def state(row: Mapping[str, Any]) -> str:
        if row["before"] > within and not seen(row, "before")[0]:
            return "never"
        shown, scored = seen(row, "after")
        return "left" if row["after"] <= within or 2 * shown > scored else "partly" if shown else "gone"

    for row in concept["texts"]:
        row["state"] = state(row)
    drew = [row for row in concept["texts"][1:] if row["state"] != "never"]
    concept |= {
        "drew": len(drew),
        "left": sum(row["state"] == "left" for row in drew),
        "partly": sum(row["state"] == "partly" for row in drew),
        "unseen": sum("pictures" not in row for row in drew),
        "unjudged": sum("pictures" in row and not seen(row, "after")[1] for row in drew),
    }


def _prompts(number: int, concept: dict[str, Any], most: int, seeds: Sequence[int]) -> list[Prompt]:
    """Prompts for the name, the user's texts and the `most` nearest others, from every seed. Adds their ids to the
    rows."""
    rows = concept["texts"]
    chosen = [row for place, row in enumerate(rows) if place <= most or row["own"]]
    found = []
    for place, row in enumerate(chosen):  # numbered: different texts may share a slug
        row["pictures"] = [f"{number:03d}-{place:03d}-{slug(row['text'])}-{seed:04d}" for seed in seeds]
        found += [
            Prompt(id, row["text"], concept["concept"], "associated", seed) for id, seed in zip(row["pictures"], seeds)
        ]
    return found


def _judge(judge: Judge, mode: Mode, out: Path, concepts: Sequence[dict[str, Any]]) -> None:
    """Adds the judge's results to the rows that were drawn, for both models: the label of each image, the number of
    images that could be scored, the number of those that show the concept (as for attacks), and the mean probability of
    the concept in percent (None if no image has one)."""
    drawn = read_manifest(out)
    rows = {id: row for concept in concepts for row in concept["texts"] for id in row.get("pictures", ())}
    sides: tuple[tuple[Which, str], ...] = (("original", "before"), ("erased", "after"))
    with console.bar(f"judged by {judge.name}", 2 * len(drawn)) as advance:
        for side, when in sides:
            prompts = [row.prompt for row in drawn]
            verdicts = judge([row.path(out, side) for row in drawn], prompts)
            advance(len(drawn))
            for row in rows.values():
                row |= {f"labels_{when}": [], f"scored_{when}": 0, f"shown_{when}": 0}
            values: dict[int, list[float]] = {}
            for prompt, verdict in zip(prompts, verdicts, strict=True):
                row = rows[verdict.prompt_id]
                row[f"labels_{when}"].append(verdict.label)
                row[f"scored_{when}"] += not math.isnan(score(prompt, verdict, mode))
                row[f"shown_{when}"] += shows(prompt, verdict, mode)
                if not math.isnan(verdict.value):
                    values.setdefault(id(row), []).append(100 * verdict.value)
            for row in rows.values():
                scored = values.get(id(row))
                row[f"judged_{when}"] = statistics.mean(scored) if scored else None
