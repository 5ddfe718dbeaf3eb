"""Times UCE's official function beside ours, in one process: official.py SD14 uce_sd_erase.py official.json

SD14: the folder that run.sh makes. uce_sd_erase.py: trainscripts/uce_sd_erase.py of a checkout of
github.com/rohitgandikota/unified-concept-editing. Both write the edited weights; loading is not timed.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from measure import ANCHOR, RIDGE, fresh, ours, timed

from realera.backbones.unet import UNetBackbone
from realera.contracts import Sampler
from realera.methods.priors import ARTISTS

COUNTS = 1, 10, 100


def official(script: Path) -> Any:
    """The script's function UCE. Its parser of the command line is left out."""
    module: Any = ModuleType("uce_official")
    exec(compile(script.read_text(encoding="utf-8").split("if __name__ ==")[0], script.name, "exec"), vars(module))
    module.device, module.torch_dtype = "cpu", torch.float32
    return module.UCE


@torch.no_grad()
def main() -> None:
    folder, script, out = map(Path, sys.argv[1:4])
    theirs, names = official(script), ARTISTS.read_text(encoding="utf-8").splitlines()
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    backbone = UNetBackbone("sd14", folder, Sampler())
    rows = []
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "ours.safetensors"
        ours(backbone, names[:2], file), fresh(backbone, file)  # the first calls of a process warm up
        for count in COUNTS:
            told = names[:count], [ANCHOR] * count, [], 1, 1, RIDGE, place, "official"
            seconds = []
            for _ in range(3 if count < 100 else 1):
                seconds.append(
                    (timed(partial(theirs, pipeline, *told))[0], timed(partial(ours, backbone, names[:count], file))[0])
                )
                fresh(backbone, file)
            slow, fast = (statistics.median(pair[i] for pair in seconds) for i in (0, 1))
            row = {
                "names": count,
                "official_s": round(slow, 3),
                "ours_s": round(fast, 3),
                "ratio": round(slow / fast, 2),
            }
            rows.append(row)
            print(row, flush=True)
    found = {"threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
