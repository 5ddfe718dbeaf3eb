"""Tests whether predicted noise tells which texts draw a concept: draws.py RESULTS.json

For each concept, none of which a table erases: the tokenizer's words that are nearest in values, the distance of their
predicted noise from the name's (`nearness.noise_distances`), and the judge's verdicts on images of each word. Writes
the table in README.md.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from PIL import Image

from realera import paths
from realera.contracts import Prompt
from realera.methods.functional import FunctionalMining, measured
from realera.runs import steps
from realera.settings import composition, resolvers
from realera.system import disk
from realera.training.pairs import encoded_pairs

HERE = Path(__file__).parent
CONCEPTS = {  # concept: the task that has its judge and prompts
    "gun": "object",
    "knife": "object",
    "bomb": "object",
    "chair": "object",
    "bicycle": "object",
    "George Takei": "celebrity",
    "Queen Elizabeth": "celebrity",
}
WORDS, IMAGES, FIRST_SEED = 48, 4, 7000
EDGES = (0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5)
START, END = "<!-- draws -->\n", "<!-- end of draws -->"


def words_of(concept: str, task: str) -> list[dict[str, Any]]:
    """The nearest words: {"word", "value", "apart", "judged": mean probability of the concept, 0-1}."""
    anchor = ["anchor=room"] if task == "object" else []
    with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
        given = [f"task={task}", f"concept='{concept}'", "backbone=mini", "judge=miniature", "logger=none", *anchor]
        config = composition.plain(compose("train", given))
    known = composition.build_task(config)
    backbone, judge = steps.load_backbone(config), steps.build_judge(config, known)
    (pair,) = encoded_pairs(backbone, known)
    miner = FunctionalMining(["words"], looked=WORDS, beside=0)
    near = miner.candidates(backbone, concept)
    texts = [text for text, _ in near]
    far = measured(backbone, miner.drawn(backbone, pair), concept, texts, paths.cache_dir()).tolist()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for (text, value), apart in zip(near, far):
            seeds = range(FIRST_SEED, FIRST_SEED + IMAGES)
            files = [Path(folder) / f"{seed}.png" for seed in seeds]
            for file, image in zip(files, backbone.generate([text] * IMAGES, seeds)):
                Image.fromarray(image.cpu().numpy()).save(file)
            verdicts = judge(files, [Prompt(file.stem, text, concept, "erase", 0) for file in files])
            seen = statistics.mean(verdict.value for verdict in verdicts)
            rows.append({"word": text, "value": round(value, 4), "apart": round(apart, 4), "judged": round(seen, 4)})
    return rows


def table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    rows = [row for own in found.values() for row in own]
    lines = ["| apart | words | draw the concept | mean probability, % |", "|---|---|---|---|"]
    for low, high in zip(EDGES, (*EDGES[1:], float("inf"))):
        here = [row["judged"] for row in rows if low <= row["apart"] < high]
        name = f"{low:g} to {high:g}" if high < float("inf") else f"{low:g} and more"
        seen = f"{100 * statistics.mean(here):.0f}" if here else "–"
        lines.append(f"| {name} | {len(here)} | {sum(one > 0.5 for one in here)} | {seen} |")
    return lines


def main(results: str) -> None:
    resolvers.register_resolvers()
    found = {}
    for concept, task in CONCEPTS.items():
        found[concept] = words_of(concept, task)
        print(concept, len(found[concept]), flush=True)
    disk.write_text(Path(results), json.dumps(found, indent=1) + "\n")
    readme = HERE / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    disk.write_text(readme, f"{before}{START}{chr(10).join(table(found))}\n{END}{after}")


if __name__ == "__main__":
    main(sys.argv[1])
