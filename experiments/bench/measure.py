"""Speed of the closed form against a plain loop: python experiments/bench/measure.py FOLDER RESULTS.json [COUNTS]

FOLDER: a Stable Diffusion 1.4 in full size (experiments/full_size/folder.py makes one with random weights). COUNTS: the
numbers of names erased at once, by default 1,100. The loop works like UCE's official code: it encodes each text
separately at full length, computes two sums and an inverse in float32 for each of the 32 layers, and writes the edited
weights. Ours is method=uce with rows=last, which computes the same map. The two alternate in this process, and the
ratio is of their medians, without loading the model.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from realera.backbones.unet import UNetBackbone
from realera.contracts import Concept, Edit, Pair, Sampler, TextStates
from realera.methods.priors import ARTISTS
from realera.methods.uce import UnifiedConceptEdit
from realera.training.checkpoint import Origin, save_erased

ANCHOR, RIDGE = "art", 0.5


@torch.no_grad()
def plain_loop(backbone: Any, names: list[str], file: Path) -> dict[str, torch.Tensor]:
    """Returns {layer: edited weight} and writes them to the file."""
    tokenizer, encoder = backbone.text.tokenizer, backbone.text.model

    def last_row(text: str) -> torch.Tensor:
        read = tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        row = int(read["attention_mask"].sum()) - 2
        return encoder(read["input_ids"]).last_hidden_state[0, row]

    keys = {name: last_row(name) for name in names}
    anchors = {name: last_row(ANCHOR) for name in names}  # the official code encodes the guide again for every name
    edited = {}
    for layer, linear in backbone.text_projections().items():
        weight = linear.weight
        values, grams = RIDGE * weight, RIDGE * torch.eye(weight.shape[1])
        for name in names:
            values = values + torch.outer(weight @ anchors[name], keys[name])
            grams = grams + torch.outer(keys[name], keys[name])
        edited[f"{layer}.weight"] = values @ torch.inverse(grams)
    save_file(edited, file)
    return edited


def ours(backbone: Any, names: list[str], file: Path) -> dict[str, torch.Tensor]:
    nothing = TextStates(*(torch.zeros(0) for _ in range(4)))
    pairs = [Pair(Concept(name, ANCHOR), nothing, nothing) for name in names]
    edit: Edit = UnifiedConceptEdit(rows="last", ridge=RIDGE)(backbone, pairs, [])
    backbone.apply(edit)
    save_erased(file, backbone, Origin({}, backbone.name, "bench"), None)
    return {f"{name}.weight": linear.weight for name, linear in backbone.text_projections().items()}


def fresh(backbone: Any, file: Path) -> None:
    """Restores the loaded weights, forgets all encoded texts and deletes the file."""
    file.unlink(missing_ok=True)
    backbone.load_erased({})
    backbone.text.forget()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    since = time.perf_counter()
    done = work()
    return time.perf_counter() - since, done


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    counts = [int(count) for count in (sys.argv[3] if len(sys.argv) > 3 else "1,100").split(",")]
    backbone = UNetBackbone("sd14", folder, Sampler())
    names = ARTISTS.read_text(encoding="utf-8").splitlines()
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__, "closed_form": []}
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "weights.safetensors"
        ours(backbone, names[:2], file), fresh(backbone, file)  # the first calls of a process warm up
        for count in counts:
            rounds = []
            for _ in range(3 if count < 1000 else 1):
                slow, wanted = timed(partial(plain_loop, backbone, names[:count], file))
                fresh(backbone, file)
                fast, weights = timed(partial(ours, backbone, names[:count], file))
                apart = max(float((weights[name] - wanted[name]).abs().max()) for name in wanted)
                rounds.append((slow, fast, apart))
                fresh(backbone, file)
            slow, fast = (statistics.median(one[i] for one in rounds) for i in (0, 1))
            row = {"names": count, "loop_s": round(slow, 3), "ours_s": round(fast, 3), "ratio": round(slow / fast, 2)}
            row["largest_difference"] = max(one[2] for one in rounds)
            found["closed_form"].append(row)
            print(row, flush=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
