"""Peak memory of many concepts at once: python experiments/bench/memory.py FOLDER RESULTS.json COUNTS

FOLDER: a Stable Diffusion 1.4 in full size (experiments/full_size/folder.py makes one with random weights). COUNTS: the
numbers of concepts to erase, such as 1000 or 200,1000. Each number is a separate run of the command line: RealEra's
closed form with its neighbours, no alignment, no images. The peak is the process's, from the run's costs.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from realera import costs
from realera.methods.priors import ARTISTS
from realera.tasks.prompts import same_name

ANCHORS = "a person", "a man", "a woman", "an artist"
WORDS = ("backbone=sd14", "method=realera", "method.align=null", "task=celebrity", "evaluate=false", "logger=none")


def concepts(count: int) -> str:
    """The lines of a concepts_file with `count` artists, each with an anchor."""
    names = list({same_name(name): name for name in ARTISTS.read_text(encoding="utf-8").splitlines()}.values())
    return "".join(f'"{name}",{ANCHORS[i % len(ANCHORS)]}\n' for i, name in enumerate(names[:count]))


def measured(folder: Path, count: int, place: Path) -> dict[str, object]:
    """Seconds by stage and the peak in GB of one run."""
    file, run = place / f"{count}.csv", place / f"{count}"
    file.write_text(concepts(count), encoding="utf-8")
    words = [*WORDS, f"backbone.pretrained={folder.resolve()}", f"concepts_file={file}", f"run_dir={run}"]
    subprocess.run([sys.executable, "-m", "realera.train", *words], check=True)
    record = costs.read(run)
    seconds = costs.totals(record)["seconds"]
    peak = record["peak_memory_mb"]["host"] / 1000
    return {
        "concepts": count,
        "device": record["device"],
        "seconds": round(seconds, 1),
        "stages": record["stages"],
        "peak_gb": round(peak, 2),
    }


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    found = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    found["memory"] = []
    with tempfile.TemporaryDirectory() as place:
        for count in map(int, sys.argv[3].split(",")):
            found["memory"].append(measured(folder, count, Path(place)))
            print(found["memory"][-1], flush=True)
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
