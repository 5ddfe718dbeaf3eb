"""How VALERA reads each person's prompts: readings.py writes readings.json beside it and prints it.

The reading of a text is the mean of u^T k over its rows k; u is scaled so that the concept's mean row less its anchor's
reads 1. One closed form a person, no image; RealEra's protocol, the miniature.
"""

from __future__ import annotations

import json
from pathlib import Path

from hydra import compose, initialize_config_dir

from realera import paths
from realera.methods.valera import ValueSpaceErasure
from realera.runs import steps
from realera.settings import composition, resolvers
from realera.training.pairs import encoded_pairs

PEOPLE = ("Tom Cruise", "Elon Musk", "Jennifer Lawrence", "Mariah Carey", "Leonardo DiCaprio")
KINDS = {"erase": "the name", "near": "the paper's phrase", "associated": "further phrases", "keep": "other people"}


def readings(person: str) -> dict[str, dict[str, float]]:
    """{kind of prompt: {"mean", "least", "largest"}} over its texts."""
    with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
        words = ["task=celebrity", "method=valera", "backbone=mini", f"concept={person}"]
        config = composition.plain(compose("train", words))
    backbone, task = steps.load_backbone(config), composition.build_task(config)
    edit = ValueSpaceErasure()(backbone, encoded_pairs(backbone, task), [])
    assert edit.factors is not None
    _, read = edit.factors  # (1, D)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS.values()}
    for split, text in dict.fromkeys((prompt.split, prompt.text) for prompt in task.eval_prompts()):
        if split in KINDS:
            rows = backbone.encode([text]).states[0, 1:].double()
            found[KINDS[split]].append(float((rows @ read.T).mean()))
    return {
        kind: {"mean": sum(all) / len(all), "least": min(all), "largest": max(all)}
        for kind, all in found.items()
        if all
    }


def main() -> None:
    resolvers.register_resolvers()
    table = {person: readings(person) for person in PEOPLE}
    rounded = {p: {k: {n: round(v, 2) for n, v in one.items()} for k, one in row.items()} for p, row in table.items()}
    (Path(__file__).parent / "readings.json").write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")
    for person, row in rounded.items():
        print(
            person, {kind: one["mean"] for kind, one in row.items()}, "largest other:", row["other people"]["largest"]
        )


if __name__ == "__main__":
    main()
