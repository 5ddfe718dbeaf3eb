"""Where a run's prompts lie and how far its closed form takes them: geometry.py RUN_DIR [RUN_DIR ...]

For each split: the cosine of the prompts' first end-of-text row with that of the concept's prompt, and how far the map
moves their last row along the way from the concept's last row to the anchor's, as a share of that way (1 = all of it).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity

from realera import cli, runs, steps


def main(folders: list[Path]) -> None:
    backbone = steps.load_backbone(runs.read_config(folders[0]))
    found: dict[str, list[tuple[float, float]]] = {}

    def rows(text: str) -> tuple[torch.Tensor, torch.Tensor]:
        states = backbone.encode([text])
        return states.states[0, int(states.length[0])].double(), states.states[0, -1].double()

    for folder in folders:
        concept = cli.build_task(runs.read_config(folder)).concepts[0]
        solution = load_file(folder / "map.safetensors")["map"].double()
        lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
        name = next(line["prompt"] for line in lines if line["split"] == "erase")
        (of_name, start), (_, end) = rows(name), rows(name.replace(concept.target, concept.anchor))
        way = end - start
        for split, text in dict.fromkeys((line["split"], line["prompt"]) for line in lines):
            eos, last = rows(text)
            share = (solution @ last - last) @ way / (way @ way)
            found.setdefault(split, []).append((float(cosine_similarity(eos, of_name, 0)), float(share)))
    print(f"{len(folders)} runs     cosine with the name   share of the way to the anchor")
    for split, pairs in found.items():
        (cosine, share), (nearest, furthest) = (map(f, zip(*pairs)) for f in (lambda v: sum(v) / len(v), max))
        print(f"{split:10}  {cosine:5.2f} (most {nearest:4.2f})   {share:10.2f} (most {furthest:4.2f})")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
