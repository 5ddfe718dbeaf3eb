"""The table of an experiment over runs that were made at different times or on different machines.

    python experiments/pool.py EXPERIMENT FOLDER BASE [RUN...]

Adds the text files of the RUN folders (settings, verdicts, metrics, attacks; neither images nor weights) to
records.tar.xz in experiments/FOLDER, then writes results.json and the table of the README in FOLDER over all its runs.
A run of the same name replaces the one in it. The systems are in the order of conf/experiment/EXPERIMENT.yaml;
differences are taken from the system BASE. A system of an earlier results.json without any run in the table keeps its
rows. METHODS="mace,ac" and SEEDS=0 leave the other runs out of the table, for sweeps that are not finished. OUT=DIR
writes the table there, over these runs alone, and leaves FOLDER's as it is.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from realera.contracts import UserError
from realera.evaluation.records import read_config
from realera.paths import ATTACKS, CONF_DIR, CONFIG, COSTS, LOCK, MANIFEST, METRICS, RESULTS, VERDICTS
from realera.reporting.table import results_of, write_tables
from realera.settings import resolvers
from realera.settings.run_settings import Settings
from realera.system import disk

HERE = Path(__file__).parent
RECORDS = "records.tar.xz"
READ = (CONFIG, MANIFEST, METRICS, COSTS, f"{VERDICTS}/*.json*", f"{ATTACKS}/*.json*")  # all files that a table reads


def pool(experiment: str, folder: Path, base: str, runs: Sequence[Path], out: Path | None = None) -> Path:
    """Returns the path of results.json, which is in `out` (None: folder). Raises UserError if a run is not finished or
    its system not in the sweep, or if there is no run, folder or experiment of this name."""
    order = systems(experiment)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    if unfinished := [run for run in runs if (run / LOCK).exists() or not (run / METRICS).is_file()]:
        raise UserError(f"{unfinished[0]} is not a finished run: it has no {METRICS}, or it is being made")
    if other := [run for run in runs if system(run) not in order]:
        raise UserError(f"{other[0]} is of {system(other[0])!r}, which experiment={experiment} does not have")
    with TemporaryDirectory() as temporary:
        root = Path(temporary)
        if (folder / RECORDS).is_file():
            with tarfile.open(folder / RECORDS) as archive:
                archive.extractall(root, filter="data")
        for run in runs:
            copy(run, root / run.name)
        if runs:
            pack(root, folder / RECORDS)
        known = sorted(filter(wanted, root.iterdir()), key=lambda run: (order.index(system(run)), run.name))
        results = results_of(known, base=base)
    out = out or folder
    if (out / RESULTS).is_file():
        results = with_rows(results, json.loads((out / RESULTS).read_text(encoding="utf-8")), order)
    return write_tables(results, out)


def with_rows(results: dict[str, Any], earlier: Mapping[str, Any], order: Sequence[str]) -> dict[str, Any]:
    """The results with the earlier rows of all systems that they lack. Differences are paired, so those from the base's
    earlier runs are left out once the base has runs here. Raises UserError if the runs were judged differently."""
    if wrong := [key for key in ("judge", "headline", "h_o_terms") if results[key] != earlier.get(key)]:
        raise UserError(f"{RESULTS} has another {wrong[0]} than these runs")
    own = {row["system"] for row in results["rows"]}

    def rest(rows: Sequence[Any]) -> list[Any]:
        return [row for row in rows if row["system"] not in own]

    def block(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
        rows = sorted([*now.get("rows", ()), *rest(before.get("rows", ()))], key=lambda row: order.index(row["system"]))
        less = dict(before.get("differences", {}))
        if "differences" in now or less.get("base") in own:
            less = now.get("differences", {})
        elif less:
            less["rows"] = rest(less["rows"])
            if "by_mode" in less:
                less["by_mode"] = {mode: rest(each) for mode, each in less["by_mode"].items()}
        kept = {key: value for key, value in {**before, **now}.items() if key != "differences"}
        return {**kept, "rows": rows, **({"differences": less} if less else {})}

    found = block(results, earlier)
    attacks = block(found.pop("attacks", {}), earlier.get("attacks", {}))
    relative = {**earlier.get("relative", {}), **results.get("relative", {})}
    if relative:
        found["relative"] = {system: relative[system] for system in order if system in relative}
    return {**found, **({"attacks": attacks} if attacks["rows"] else {})}


def copy(run: Path, to: Path) -> None:
    """The files of a run that a table reads. Its root becomes `runs`, wherever this machine keeps it."""
    for path in (path for name in READ for path in run.glob(name)):
        copied = to / path.relative_to(run)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(path.read_bytes())
    settings = OmegaConf.load(run / CONFIG)
    settings["root"] = "runs"
    OmegaConf.save(settings, to / CONFIG)


def pack(root: Path, archive: Path) -> None:
    """The same files give the same archive: names in order, no times, no owners."""
    with disk.atomic(archive) as beside, tarfile.open(beside, mode="w:xz", preset=9) as packed:
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            entry = tarfile.TarInfo(path.relative_to(root).as_posix())
            entry.size, entry.mode = path.stat().st_size, 0o644
            packed.addfile(entry, io.BytesIO(path.read_bytes()))


def systems(experiment: str) -> list[str]:
    """The methods of the sweep, in its order."""
    if not (CONF_DIR / "experiment" / f"{experiment}.yaml").is_file():
        raise UserError(f"there is no experiment={experiment}")
    resolvers.register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        words = [f"experiment={experiment}", "backbone=mini"]
        return str(compose("train", words, return_hydra_config=True).hydra.sweeper.params.method).split(",")


def system(run: Path) -> str:
    return Settings(read_config(run)).system


def wanted(run: Path) -> bool:
    methods, seeds = (os.environ.get(name, "").split(",") for name in ("METHODS", "SEEDS"))
    seed = str(Settings(read_config(run)).seed or 0)
    return (methods == [""] or system(run) in methods) and (seeds == [""] or seed in seeds)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    try:
        to = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
        print(pool(sys.argv[1], HERE / sys.argv[2], sys.argv[3], [Path(run) for run in sys.argv[4:]], to))
    except UserError as error:
        raise SystemExit(str(error)) from None
