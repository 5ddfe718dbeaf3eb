"""Several judges of one run, and set judges: no number is lost, and every number belongs to the current images."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from realera import paths
from realera.contracts import Prompt, SetJudge, Split, UserError, Verdict
from realera.evaluation.bootstrap import Resamples
from realera.evaluation.measures import MEAN_PROB
from realera.evaluation.metrics import samples
from realera.evaluation.records import ManifestEntry, read_metrics, verdict_file, write_manifest, write_verdicts
from realera.evaluation.results import first_torn_file, measure, measure_set, own_judge, write_metrics
from realera.files import checksums

SPLITS: tuple[Split, ...] = ("erase", "near", "keep")


def draw(folder: Path, source: str = "s") -> None:
    rows = []
    for i, split in enumerate(SPLITS):
        for place in ("images", "originals"):
            (folder / place).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(folder / place / f"{split}.png")
        concept = "dog" if split == "keep" else "cat"
        rows.append(
            ManifestEntry(
                Prompt(split, "t", concept, split, i), f"images/{split}.png", source, f"originals/{split}.png"
            )
        )
    write_manifest(folder, rows)


def judge(folder: Path, name: str, value: float, own: str | None = None) -> dict[str, Any]:
    write_verdicts(verdict_file(folder, name), [Verdict(split, value, "dog") for split in SPLITS])
    write_verdicts(verdict_file(folder, name, "original"), [Verdict(split, 1.0, "dog") for split in SPLITS])
    return measure(folder, name, {"judge": {"judge": name, "version": 1}}, own=own)


class Counter:
    """A SetJudge that counts the files."""

    name = "count"

    def __init__(self, extra: float = 0.0) -> None:
        self.extra = extra
        self.seen: list[list[str]] = []

    def compare(self, images: Sequence[Path], references: Sequence[Path]) -> dict[str, float]:
        self.seen = [[path.name for path in part] for part in (images, references)]
        return {"images": len(images), "references": len(references), "extra": self.extra}

    def protocol(self) -> dict[str, Any]:
        return {"judge": self.name}


def test_another_judge_does_not_replace_the_run_s_own(tmp_path: Path) -> None:
    draw(tmp_path)
    first = judge(tmp_path, "eye", 0.2)
    both = judge(tmp_path, "ear", 0.6, own="eye")
    assert both == json.loads((tmp_path / paths.METRICS).read_text())
    assert both["main"] == first["main"] and both["protocol"]["judge"]["judge"] == "eye"
    ear = both["judges"]["ear"]
    assert ear["main"]["acc_e"]["value"] == pytest.approx(60) and ear["original"]["main"]["acc_e"]["value"] == 100
    assert ear["protocol"] == {"judge": "ear", "version": 1} and ear["headline"] == dict(MEAN_PROB)
    again = judge(tmp_path, "eye", 0.3)
    assert again["main"]["acc_e"]["value"] == pytest.approx(30) and again["judges"] == both["judges"]


def test_numbers_of_images_that_were_drawn_again_are_left_out(tmp_path: Path) -> None:
    draw(tmp_path)
    judge(tmp_path, "eye", 0.2)
    judge(tmp_path, "ear", 0.6, own="eye")
    draw(tmp_path, source="other weights")
    with pytest.raises(UserError, match="was not judged by 'eye'"):
        write_metrics(tmp_path, "eye")
    assert judge(tmp_path, "eye", 0.2)["judges"] == {}


def test_a_judge_of_sets_adds_its_numbers(tmp_path: Path) -> None:
    draw(tmp_path)
    first = judge(tmp_path, "eye", 0.2)
    counter = Counter(math.nan)
    assert isinstance(counter, SetJudge)
    found = measure_set(tmp_path, counter, None, "keep", "eye")
    assert counter.seen == [["keep.png"], ["keep.png"]]
    assert {k: v for k, v in found.items() if k != "sets"} == {k: v for k, v in first.items() if k != "sets"}
    numbers = found["sets"]["count"]
    assert (numbers["images"], numbers["references"], numbers["extra"]) == (1, 1, None)
    assert numbers["protocol"] == {
        "judge": "count",
        "split": "keep",
        "references": "originals",
        "images": 1,
        "reference_images": 1,
    }
    assert judge(tmp_path, "eye", 0.4)["sets"] == found["sets"], "judged again, the numbers of sets stay"


def test_a_set_is_compared_with_a_folder_s_images_or_refused(tmp_path: Path) -> None:
    run, others = tmp_path / "run", tmp_path / "coco"
    draw(run)
    judge(run, "eye", 0.2)
    (others / "deep").mkdir(parents=True)
    for name in ("b.jpg", "deep/a.PNG", "notes.txt"):
        (others / name).write_bytes(b"")
    counter = Counter()
    measure_set(run, counter, others, "erase", "eye")
    assert counter.seen == [["erase.png"], ["b.jpg", "a.PNG"]]
    for references, split, said in (
        (tmp_path / "nowhere", "keep", "judge.references=FOLDER"),
        (others, "associated", "no images of the split 'associated'"),
    ):
        with pytest.raises(UserError, match=said):
            measure_set(run, counter, references, split, "eye")
    (run / "originals" / "keep.png").unlink()
    with pytest.raises(UserError, match=r"keep\.png is missing"):
        measure_set(run, counter, None, "keep", "eye")


def test_a_run_of_an_earlier_version_is_measured_again_from_its_verdicts(tmp_path: Path) -> None:
    draw(tmp_path)
    now = judge(tmp_path, "eye", 0.2)
    assert own_judge(tmp_path / "nowhere", "eye", True) is None
    old = {"headline": "mean_prob", "protocol": now["protocol"], "original": None, "by_prompt": []}
    old |= {mode: now[mode] for mode in ("mean_prob", "top1")}
    (tmp_path / paths.METRICS).write_text(json.dumps(old))
    (tmp_path / paths.VERDICTS / "eye.json").unlink()
    assert own_judge(tmp_path, "eye", True) == "eye"
    assert read_metrics(tmp_path) == now


def test_only_the_own_judge_can_restore_its_lost_numbers(tmp_path: Path) -> None:
    draw(tmp_path)
    judge(tmp_path, "eye", 0.2)
    verdict_file(tmp_path, "eye").unlink()
    (tmp_path / paths.VERDICTS / "eye.json").write_text("torn {")
    assert own_judge(tmp_path, "eye", True) == "eye"
    with pytest.raises(UserError, match=r"judge the run with its own judge first \(python -m realera.evaluate run="):
        own_judge(tmp_path, "other", False)
    (tmp_path / paths.METRICS).write_text("torn {")
    assert own_judge(tmp_path, "eye", True) is None
    with pytest.raises(UserError, match=r"metrics\.json is missing or torn: judge the run with its own judge first"):
        own_judge(tmp_path, "other", False)


def test_a_torn_file_of_another_judge_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw(tmp_path)
    judge(tmp_path, "eye", 0.2)
    both = judge(tmp_path, "other", 0.3, own="eye")
    file = tmp_path / paths.VERDICTS / "other.json"
    content = file.read_text()
    file.write_text(content.replace("30.0", "31.0", 1))
    assert first_torn_file(tmp_path) == file
    now = judge(tmp_path, "eye", 0.2)
    assert set(both["judges"]) == {"other"} and now["judges"] == {} and not file.exists()
    assert (
        "other.json is torn or has invalid content and is left out: judge again with python -m realera.evaluate run="
        in caplog.text
    )
    assert first_torn_file(tmp_path) is None


def test_files_of_an_earlier_version_are_not_torn(tmp_path: Path) -> None:
    """They have no checksum and no digests of the verdicts; a page is whole if it has its last line."""
    draw(tmp_path)
    metrics = judge(tmp_path, "eye", 0.2)
    file = tmp_path / paths.VERDICTS / "eye.json"
    numbers = json.loads(file.read_text())
    del numbers["checksum"], numbers["of_verdicts"]
    file.write_text(json.dumps(numbers, indent=1) + "\n")
    assert first_torn_file(tmp_path) is None and write_metrics(tmp_path, "eye") == metrics
    (tmp_path / "report.html").write_text("<!doctype html></html>\n")
    assert checksums.page_is_whole(tmp_path / "report.html")


def test_the_samples_of_a_measure_can_be_shared() -> None:
    """A hundred concepts with the same hundred preserved ones resample the preserved ones once."""
    prompts = [Prompt("a", "t", "cat", "erase", 0), Prompt("b", "t", "dog", "keep", 0)]
    said = [Verdict("a", 0.1, "x"), Verdict("b", 0.9, "dog")]
    first = samples(prompts, said, MEAN_PROB, Resamples(0, 4))
    again = samples(prompts[:1], said[:1], MEAN_PROB, Resamples(0, 4), known={"acc_s": first["acc_s"]})
    assert again["acc_s"] is first["acc_s"] and again["acc_e"].value == pytest.approx(10)
