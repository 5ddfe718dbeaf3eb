"""In which space a concept's name is near the texts that draw the concept: observe.py RESULTS.json [setting ...]

Settings are those of realera.train (backbone=sd14 backbone.pretrained=FOLDER). For every known concept with synonyms or
phrases, this measures how well the similarity with its name separates them from the names of all other concepts: the
area under the curve (1: perfectly, 0.5: not at all). The spaces are the text states, the keys and the values, with all
layers together and each separately, and with noise=N also the predicted noise, on N images of the concept drawn by the
model.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from realera import paths, value_space
from realera.contracts import KEYS, VALUES, Backbone
from realera.methods.priors import caption_rows
from realera.methods.texts import predict
from realera.runs import steps
from realera.settings import composition, resolvers
from realera.system import disk
from realera.tasks.prompts import fill

TASKS = {
    "object": "a photo of the {}",
    "celebrity": "a portrait of {}",
    "style": "an artwork by {}",
    "nsfw": "a photo of the {}",
}
FIRST = {  # a concept to compose the task with; all concepts that the task knows are measured
    "object": ["concept=airplane"],
    "celebrity": ["concept='Tom Cruise'"],
    "style": ["concept='Van Gogh'"],
    "nsfw": [],
}
LEVELS = (200, 400, 600, 800)  # timesteps of the noise
Similarity = Callable[[Tensor, Tensor], Tensor]
"""(n, D) states and (D,) the name's -> (n,)."""


def auc(near: Tensor, far: Tensor) -> float:
    """The share of (near, far) pairs in which the near text is more similar; ties count half."""
    return float(((near[:, None] > far).double() + 0.5 * (near[:, None] == far).double()).mean())


def state(backbone: Backbone, texts: list[str]) -> Tensor:
    """(n, D) float64: each text's mean row from the first end of text on."""
    read = backbone.encode(texts)
    rows = [states[int(end) :].double().mean(dim=0) for states, end in zip(read.states.cpu(), read.length)]
    return torch.stack(rows)


def in_metric(metric: Tensor, mean: Tensor) -> Similarity:
    """The cosine of states minus the captions' mean, in a metric."""
    values, vectors = torch.linalg.eigh(metric)
    root = vectors * values.clamp(min=0).sqrt()

    def similarity(states: Tensor, name: Tensor) -> Tensor:
        return torch.cosine_similarity((states - mean) @ root, ((name - mean) @ root)[None])

    return similarity


def similarities(backbone: Backbone) -> dict[str, Similarity]:
    rows = caption_rows(backbone, "everyday", paths.cache_dir())
    eye = torch.eye(backbone.width, dtype=torch.float64)
    covariance = value_space.covariance(rows.gram, rows.mean, rows.count)
    layers = {name: layer.weight for name, layer in backbone.text_projections().items()}
    found: dict[str, Similarity] = {
        "text states, cosine": in_metric(eye, torch.zeros(backbone.width, dtype=torch.float64)),
        "text states, centred": in_metric(eye, rows.mean),
        "text states, whitened by captions": in_metric(torch.linalg.inv(covariance + 0.01 * eye), rows.mean),
    }
    for what, ending in (("keys", KEYS), ("values", VALUES)):
        own = {name: weight for name, weight in layers.items() if name.endswith(ending)}
        found[f"{what}, all layers"] = in_metric(value_space.metric(list(own.values())), rows.mean)
        for name, weight in own.items():
            found[f"{what}, {name.removesuffix('.' + ending)}"] = in_metric(value_space.metric([weight]), rows.mean)
    return found


def words(entry: Mapping[str, Any], template: str) -> dict[str, list[str]]:
    """{kind: texts} that draw the concept."""
    named = [fill(template, word).text for word in entry.get("synonyms", ())]
    return {"synonyms": named, "phrases": [*entry.get("near", ()), *entry.get("associated", ())]}


def in_noise(backbone: Backbone, name: str, texts: list[str], images: int) -> Tensor:
    """(texts,): minus the mean square difference of the predicted noise from the one for the name, on noised images of
    the name."""
    latents = backbone.sample(backbone.encode([name] * images), range(images))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)
    apart = torch.zeros(len(texts), dtype=torch.float64)
    states = [backbone.encode([text] * images) for text in (name, *texts)]
    with torch.no_grad():
        for level in LEVELS:
            t = torch.full((images,), level, device=latents.device)
            z = backbone.noisy_latents(latents, noise, t)
            own, *others = (predict(backbone, z, t, each) for each in states)
            apart += torch.tensor([float((other - own).square().mean()) for other in others], dtype=torch.float64)
    return -apart


def observed(backbone: Backbone, config: Mapping[str, Any], task: str, images: int) -> dict[str, Any]:
    """{space: {kind: {"auc": the mean over the concepts, "concepts": {name: auc}}}} of a task's known concepts."""
    known: Any = composition.build_task(config)
    template = TASKS[task]
    names = {name: fill(template, name).text for name in known.labels}
    everyone = list(names)
    states = state(backbone, list(names.values()))
    found: dict[str, dict[str, dict[str, float]]] = {}
    spaces = similarities(backbone)
    for concept, entry in known.known.items():
        near = {kind: texts for kind, texts in words(entry, template).items() if texts}
        if not near:
            continue
        row = everyone.index(concept)
        others = torch.cat([states[:row], states[row + 1 :]])
        for kind, texts in near.items():
            own = state(backbone, texts)
            for space, similarity in spaces.items():
                pair = similarity(own, states[row]), similarity(others, states[row])
                found.setdefault(space, {}).setdefault(kind, {})[concept] = auc(*pair)
        if images:
            texts = [text for own in near.values() for text in own]
            rest = [text for name, text in names.items() if name != concept]
            like = in_noise(backbone, names[concept], [*texts, *rest], images)
            start = 0
            for kind, own in near.items():
                numbers = found.setdefault("predicted noise", {}).setdefault(kind, {})
                numbers[concept] = auc(like[start : start + len(own)], like[len(texts) :])
                start += len(own)
    return {
        space: {
            kind: {
                "auc": round(statistics.mean(each.values()), 4),
                "concepts": {c: round(v, 4) for c, v in each.items()},
            }
            for kind, each in kinds.items()
        }
        for space, kinds in found.items()
    }


def main(results: str, *settings: str) -> None:
    images = int(next((word[6:] for word in settings if word.startswith("noise=")), 0))
    given = [word for word in settings if not word.startswith("noise=")]
    resolvers.register_resolvers()
    found: dict[str, Any] = {}
    backbone: Backbone | None = None
    for task in TASKS:
        with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
            config = composition.plain(
                compose("train", [f"task={task}", "backbone=mini", "logger=none", *FIRST[task], *given])
            )
        backbone = backbone or steps.load_backbone(config)
        if measured := observed(backbone, config, task, images):
            found[task] = measured
            print(
                task, {space: {k: v["auc"] for k, v in kinds.items()} for space, kinds in measured.items()}, flush=True
            )
    assert backbone is not None
    disk.write_text(
        Path(results), json.dumps({"backbone": backbone.name, "images": images, "tasks": found}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
