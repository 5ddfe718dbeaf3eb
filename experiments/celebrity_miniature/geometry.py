"""Where a run's prompts lie and how far its closed form takes them: geometry.py FOLDER [FOLDER ...], of runs with a
closed form. Writes geometry.json beside this file, and its table into README.md.

For each system and split: the cosine of the prompts' first end-of-text row with that of the concept's prompt, and how
far the map moves their last row along the way from the concept's last row to the anchor's, as a share of that way
(1 = all of it).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity

from realera import paths
from realera.runs import folders as runs
from realera.runs import steps
from realera.settings import composition
from realera.system import disk

HERE = Path(__file__).parent
MARKS = "<!-- geometry -->\n", "<!-- end of geometry -->"
SPLITS = {
    "erase": "the name",
    "near": "the paper's phrase",
    "associated": "further phrases",
    "keep": "other people",
}


def measured(folders: list[Path]) -> dict[str, dict[str, dict[str, float]]]:
    """{system: {split: {cosine, cosine_most, share, share_most}}}, means and maxima over the runs' prompts."""
    backbone = steps.load_backbone(runs.read_config(folders[0]))
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}

    def rows(text: str) -> tuple[torch.Tensor, torch.Tensor]:
        states = backbone.encode([text])
        return states.states[0, int(states.length[0])].double(), states.states[0, -1].double()

    for folder in folders:
        config = runs.read_config(folder)
        task = composition.build_task(config)
        concept = task.concepts[0]
        solution = load_file(folder / paths.MAP)["map"].double()
        name = next(prompt.text for prompt in task.eval_prompts() if prompt.split == "erase")
        (of_name, start), (_, end) = rows(name), rows(name.replace(concept.target, concept.anchor))
        way = end - start
        mine = found.setdefault(str(config["label"]), {})
        for split, text in dict.fromkeys((prompt.split, prompt.text) for prompt in task.eval_prompts()):
            eos, last = rows(text)
            share = (solution @ last - last) @ way / (way @ way)
            mine.setdefault(split, []).append((float(cosine_similarity(eos, of_name, 0)), float(share)))
    return {system: {split: _summed(pairs) for split, pairs in each.items()} for system, each in found.items()}


def _summed(pairs: list[tuple[float, float]]) -> dict[str, float]:
    cosines, shares = zip(*pairs)
    numbers = {"cosine": sum(cosines) / len(pairs), "cosine_most": max(cosines)}
    numbers |= {"share": sum(shares) / len(pairs), "share_most": max(shares)}
    return {key: round(value, 4) for key, value in numbers.items()}


def table(found: dict[str, Any]) -> str:
    systems = list(found)
    heads = " | ".join(f"share of the way to the anchor: {system}" for system in systems)
    lines = [f"| | cosine with the name | {heads} |", "|---" * (len(systems) + 2) + "|"]
    for split, what in SPLITS.items():
        first = found[systems[0]][split]
        shares = [f"{found[s][split]['share']:.2f}, at most {found[s][split]['share_most']:.2f}" for s in systems]
        lines.append(f"| {what} | {first['cosine']:.2f}, at most {first['cosine_most']:.2f} | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


def main(folders: list[Path]) -> None:
    found = measured(folders)
    disk.write_text(HERE / "geometry.json", json.dumps(found, indent=1) + "\n")
    before, _, rest = (HERE / paths.README).read_text(encoding="utf-8").partition(MARKS[0])
    disk.write_text(HERE / paths.README, f"{before}{MARKS[0]}{table(found)}{MARKS[1]}{rest.partition(MARKS[1])[2]}")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
