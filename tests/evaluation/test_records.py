"""The manifest and verdicts of a run, and metrics.json of earlier versions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from realera import paths
from realera.contracts import Prompt, UserError
from realera.evaluation.records import ManifestEntry, read_manifest, read_metrics, write_manifest


def test_a_prompt_s_own_settings_are_written_and_read_back(tmp_path: Path) -> None:
    plain = Prompt("a", "a cat", "cat", "erase", 1)
    own = Prompt("b", "a still", "Van Gogh", "near", 2, "An artwork by Van Gogh", 7.0, (384, 512))
    rows = [ManifestEntry(plain, "images/a.png", "s"), ManifestEntry(own, "images/b.png", "s", "originals/b.png")]
    write_manifest(tmp_path, rows)
    first, second = (json.loads(line) for line in (tmp_path / paths.MANIFEST).read_text().splitlines())
    assert set(first) == {"id", "file", "prompt", "concept", "split", "seed", "source"}
    assert (second["caption"], second["guidance_scale"], second["size"]) == ("An artwork by Van Gogh", 7.0, [384, 512])
    assert read_manifest(tmp_path) == rows


ESTIMATE = {"value": 12.5, "low": 10.0, "high": 15.0, "n": 8, "unscored": 2}
OLD = {
    "headline": "mean_prob",
    "mean_prob": {"acc_e": ESTIMATE, "h_o": ESTIMATE},
    "top1": {"acc_e": ESTIMATE, "h_o": ESTIMATE},
    "by_prompt": [],
    "original": {"mean_prob": {"acc_e": ESTIMATE}, "top1": {"acc_e": ESTIMATE}, "by_prompt": []},
    "protocol": {"judge": {"judge": "eye"}},
}


def test_the_first_format_of_metrics_is_converted(tmp_path: Path) -> None:
    (tmp_path / paths.METRICS).write_text(json.dumps(OLD))
    found = read_metrics(tmp_path)
    assert set(found["headline"].values()) == {"mean_prob"} and found["h_o_terms"] == ["acc_e", "acc_s", "acc_g"]
    assert found["main"]["acc_e"] == {**ESTIMATE, "scored": 80.0, "mode": "mean_prob"}
    assert found["original"]["main"]["acc_e"]["value"] == 12.5 and found["top1"] == OLD["top1"]


@pytest.mark.parametrize(
    ("content", "said"), [("{", "torn"), ("[]", "torn"), ('{"format_version": 99, "main": {}}', "another version")]
)
def test_metrics_that_cannot_be_read_are_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / paths.METRICS).write_text(content)
    with pytest.raises(UserError, match=said):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match="judge the run first"):
        read_metrics(tmp_path / "nowhere")
