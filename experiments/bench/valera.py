"""Seconds of VALERA for 1, 10 and 100 names at once: python experiments/bench/valera.py FOLDER RESULTS.json

On the miniature and on FOLDER, a Stable Diffusion 1.4 in full size. The captions' sum is in the cache; loading is left
out. The text states of the training prompts and the closed form are timed separately: the first grow with every name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from realera import paths
from realera.costs import Meter
from realera.methods.priors import ARTISTS
from realera.methods.valera import ValueSpaceErasure
from realera.runs import steps
from realera.settings import composition, resolvers
from realera.tasks.prompts import same_name
from realera.training.pairs import encoded_pairs

COUNTS = (1, 1, 10, 100)  # the first call of a process warms up


def settings(count: int, words: list[str]) -> dict[str, Any]:
    """Of a run that erases the first names of UCE's list of artists."""
    names = list({same_name(name): name for name in ARTISTS.read_text(encoding="utf-8").splitlines()}.values())[:count]
    concept = f"concept={names[0]}" if count == 1 else f"concept={json.dumps(names)}"
    with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
        cfg = compose("train", ["task=celebrity", "method=valera", concept, "anchor=a person", *words])
    return composition.plain(cfg)


def measured(words: list[str]) -> list[dict[str, float]]:
    backbone: Any = steps.load_backbone(settings(1, words))
    rows = []
    for count in COUNTS:
        task = composition.build_task(settings(count, words))
        backbone.load_erased({})
        backbone.text.forget()
        meter = Meter()
        pairs = encoded_pairs(backbone, task, meter)
        for pair in pairs:  # the states are made when they are read, and some of a hundred names' twice
            _ = pair.target, pair.anchor
        with meter.stage("edit"):
            backbone.apply(ValueSpaceErasure()(backbone, pairs, []))
        seconds = {f"{stage}_s": round(meter.seconds[stage], 3) for stage in ("text", "edit")}
        rows.append({"names": count, **seconds})
        print(words[0], rows[-1], flush=True)
    return rows[1:]


def main() -> None:
    resolvers.register_resolvers()
    folder, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    found = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    found["valera"] = {
        "miniature": measured(["backbone=mini"]),
        "sd14": measured(["backbone=sd14", f"backbone.pretrained={folder}"]),
    }
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
