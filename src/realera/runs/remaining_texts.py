"""Measures which texts drew a concept before a run erased it, and which still do (the command `residue`)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from realera import console, paths
from realera.contracts import Backbone, Guide, Judge, Pair, Prompt, Task
from realera.evaluation.records import Which, read_manifest
from realera.files import plain_data
from realera.methods import nearness
from realera.methods.functional import FunctionalMining, measured
from realera.runs import steps
from realera.runs.session import Session
from realera.system import disk
from realera.tasks.prompts import slug
from realera.training.pairs import encoded_pairs

CHUNK = 4  # images of the concept drawn at once, as in mining, so that both share the cached images
MOST = 50  # percent: from this mean probability of the judge on, a text counts as drawing the concept


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
        _judge(judge, out, concepts)
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
    """Sets the state of every text: "never" if it never drew the concept, "left" if it still does, "gone" if it no
    longer does. A text draws the concept according to its noise prediction or to the judge of its pictures. Also counts
    the texts without the name; unseen: those that are classified by their noise prediction alone."""

    def draws(row: Mapping[str, Any], when: str) -> bool:
        return row[when] <= within or (row.get(f"judged_{when}") or 0) >= MOST

    for row in concept["texts"]:
        row["state"] = ("left" if draws(row, "after") else "gone") if draws(row, "before") else "never"
    drew = [row for row in concept["texts"][1:] if row["state"] != "never"]
    concept |= {
        "drew": len(drew),
        "left": sum(row["state"] == "left" for row in drew),
        "unseen": sum(row.get("judged_after") is None for row in drew),
        "name_left": concept["texts"][0]["state"] == "left",
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


def _judge(judge: Judge, out: Path, concepts: Sequence[dict[str, Any]]) -> None:
    """Adds the judge's results to the rows that were drawn, for both models: the mean probability of the concept in
    percent (None if no image could be judged), and the label of each image."""
    drawn = read_manifest(out)
    rows = {id: row for concept in concepts for row in concept["texts"] for id in row.get("pictures", ())}
    sides: tuple[tuple[Which, str], ...] = (("original", "before"), ("erased", "after"))
    with console.bar(f"judged by {judge.name}", 2 * len(drawn)) as advance:
        for side, when in sides:
            verdicts = judge([row.path(out, side) for row in drawn], [row.prompt for row in drawn])
            advance(len(drawn))
            values: dict[int, list[float]] = {}
            for verdict in verdicts:
                row = rows[verdict.prompt_id]
                row.setdefault(f"labels_{when}", []).append(verdict.label)
                if verdict.value == verdict.value:
                    values.setdefault(id(row), []).append(100 * verdict.value)
            for row in rows.values():
                scored = values.get(id(row))
                row[f"judged_{when}"] = statistics.mean(scored) if scored else None
