"""What a W&B run holds, read back from its offline file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from realera import tracking
from realera.contracts import Mode, Prompt, Split, Verdict
from realera.evaluation.readings import MEAN_PROB
from realera.evaluation.records import Row, verdict_file, write_manifest, write_verdicts
from realera.evaluation.results import measure
from realera.runs import Run
from realera.training.fit import fit

LOGGER = {"_target_": "lightning.pytorch.loggers.WandbLogger", "project": "realera", "mode": "offline"}
BLOCK = 32768  # bytes: a record never crosses a block but in parts


def records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log (crc32, length, type; whole or first, middle, last) after 7 bytes of
    header."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if kind == 0 or at + 7 + length > len(data):
            return  # still being written
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def whole(file: Path) -> list[Any]:
    """The records up to the run's end, which W&B's own process writes a moment after the run was finished."""
    until = time.monotonic() + 30
    while True:
        found = list(records(file))
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        assert time.monotonic() < until, "the run was never ended"
        time.sleep(0.05)


def held(folder: Path) -> dict[str, dict[str, Any]]:
    """{"config", "summary", "history": {key: [values]}, "images": the table's} of the folder's only W&B run. All of it
    stands in the folder."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    history: dict[str, list[Any]] = {}
    images = []

    def key(item: Any) -> str:
        return str(item.key or "/".join(item.nested_key))

    for record in whole(file):
        for update in (record.run.config.update, record.config.update):
            config |= {key(item): json.loads(item.value_json) for item in update}
        for entry in record.artifact.manifest.contents:
            if entry.path.endswith(".png"):
                assert Path(entry.local_path).is_relative_to(folder)
                images.append(np.asarray(Image.open(entry.local_path)))
        summary |= {key(item): json.loads(item.value_json) for item in record.summary.update}
        for item in record.history.item:
            history.setdefault(key(item), []).append(json.loads(item.value_json))
    return {"config": config, "summary": summary, "history": history, "images": images}


def judged(folder: Path, task: str, concepts: Sequence[str], mode: Mode, blur: bool | None = None) -> Run:
    """A run whose images are checkered, two of each prompt."""
    splits: list[tuple[Split, str]] = [(split, c) for split in ("erase", "near") for c in concepts]  # type: ignore[misc]
    prompts = [
        Prompt(f"{split}-{c}-{i}", f"a {split} of {c}", c, split, i)
        for split, c in [*splits, ("keep", "dog")]
        for i in (0, 1)
    ]
    pixels = np.indices((32, 32)).sum(axis=0) % 2 * 255
    rows = []
    for p in prompts:
        for place in ("images", "originals"):
            file = folder / place / f"{p.id}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.stack([pixels] * 3, axis=-1).astype(np.uint8)).save(file)
        rows.append(Row(p, f"images/{p.id}.png", "s", f"originals/{p.id}.png"))
    write_manifest(folder, rows)
    boxes = {"boxes": {"belly": 2, "anus": 1}, "detected": True} if mode == "detected" else {}
    for which, value in (("erased", 0.25), ("original", 1.0)):
        said = [Verdict(p.id, value, p.concept if value == 1 else "sky", boxes) for p in prompts]
        write_verdicts(verdict_file(folder, "eye", which), said)  # type: ignore[arg-type]
    protocol = {"task": task, "judge": {"judge": "eye"}}
    terms = ("acc_e", "acc_s", "acc_g") if mode != "detected" else ()
    measure(folder, "eye", protocol, dict.fromkeys(MEAN_PROB, mode), terms)
    config = {"task": {"_target_": task}, "concept": list(concepts), "seed": 3, "logger": LOGGER, "blur": blur}
    return Run(folder, config)


def metrics_of(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.folder / "metrics.json").read_text())
    return found


@pytest.mark.slow
def test_a_run_s_settings_losses_numbers_and_images(
    tmp_path: Path, new_backbone: Callable[..., Any], new_pairs: Callable[..., Any], load_method: Callable[..., Any]
) -> None:
    run = judged(tmp_path, "object", ["cat"], "mean_prob")
    backbone = new_backbone()
    loggers = tracking.make(run)
    try:
        pairs = new_pairs(backbone, ("cat", "field"))
        settings = {"accelerator": "cpu", "devices": 1}
        fit(
            backbone,
            load_method("realera"),
            pairs,
            run_dir=tmp_path,
            seed=0,
            config={},
            cache=tmp_path / "cache",
            trainer=settings,
            loggers=loggers,
        )
        tracking.log_results(loggers, run, metrics_of(run))
    finally:
        tracking.finish(loggers)
    found = held(tmp_path)
    assert found["config"]["seed"] == 3 and found["config"]["concept"] == ["cat"]
    losses = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    for name in {name for line in losses for name in line if name != "step"}:
        told = [line[name] for line in losses if name in line]
        assert found["history"][f"train/{name}"] == pytest.approx(told, rel=1e-5), name
    summary = found["summary"]
    assert "edit/relative_change" in summary
    assert summary["eval/acc_e"] == 25 and summary["eval/original/acc_e"] == 100 and summary["eval/acc_e_top1"] == 0
    assert summary["eval/h_o"] == pytest.approx(3 / (2 / 75 + 1 / 25))
    assert (summary["sheets/_type"], summary["sheets/nrows"], summary["sheets/ncols"]) == ("table-file", 6, 6)
    (file,) = tmp_path.glob("wandb/offline-run-*/files/media/table/*.table.json")
    content = json.loads(file.read_text())
    assert content["columns"] == ["prompt", "seed", "split", "original", "erased", "verdict"]
    first = content["data"][0]
    assert first[:3] == ["a erase of cat", 0, "erase"] and first[5] == "sky (cat 0.25)"
    assert {int(np.ptp(image)) for image in found["images"]} == {255}, "as they were drawn"


@pytest.mark.slow
def test_explicit_images_leave_this_machine_blurred_and_counted(tmp_path: Path) -> None:
    run = judged(tmp_path, "nsfw", ["nudity", "a/b"], "detected")
    loggers = tracking.make(run)
    tracking.log_results(loggers, run, metrics_of(run))
    tracking.finish(loggers)
    found = held(tmp_path)
    summary = found["summary"]
    assert summary["eval/nudity/acc_e"] == 100 and summary["eval/a-b/acc_g"] == 100
    assert summary["eval/counts/belly"] == 8 and summary["eval/counts/anus"] == 4 and summary["eval/counts/total"] == 8
    assert "eval/h_o" not in summary
    assert found["images"] and all(np.ptp(image) < 60 for image in found["images"])
