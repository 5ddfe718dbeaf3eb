import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from realera import paths
from realera.contracts import UserError
from realera.evaluation.overview import differing, flat, write_overview


def run(folder: Path, h_o: float | None, **settings: Any) -> Path:
    config = {"concept": "airplane", "backbone": {"name": "mini"}, "seed": 0, "logger": {"id": folder.name}, **settings}
    paths.write_text(folder / paths.CONFIG, yaml.safe_dump(config))
    if h_o is not None:
        estimate = {"value": h_o, "low": h_o - 1, "high": h_o + 1, "n": 9, "unscored": 0}
        names = ("acc_e", "acc_s", "acc_g", "h_o", "acc_a", "acc_u")
        metrics = {"headline": "mean_prob", "mean_prob": dict.fromkeys(names, estimate), "protocol": {}}
        paths.write_text(folder / paths.METRICS, json.dumps(metrics))
    return folder


def test_settings_that_differ_within_a_method_are_named() -> None:
    settings = [
        {"method": {"name": "uce", "edit": {"ridge": 0.5}}, "seed": 0, "logger": {"id": 1}},
        {"method": {"name": "uce", "edit": {"ridge": 5}}, "seed": 0, "logger": {"id": 2}},
        {"method": {"name": "realera", "edit": {"ridge": 0.5, "lambda_preserve": 0.1}}, "seed": 0},
    ]
    flattened = [flat(one) for one in settings]
    assert flattened[0]["method.edit.ridge"] == 0.5
    assert differing(flattened) == ["method.name", "method.edit.ridge"]
    assert differing(flattened[::2]) == ["method.name"]
    assert differing(flattened[:1]) == []


def test_the_page_lists_finished_runs_best_first_and_escapes(tmp_path: Path) -> None:
    folders = [
        run(tmp_path / "worse", 40.0, method={"name": "<uce>"}),
        run(tmp_path / "better", 90.0, method={"name": "realera"}),
        run(tmp_path / "unfinished", None, method={"name": "realera"}),
    ]
    page = write_overview(folders, tmp_path / paths.REPORT).read_text(encoding="utf-8")
    assert page.index("better") < page.index("worse") and "&lt;uce&gt;" in page and "<uce>" not in page
    assert "2 runs" in page and "1 more" in page and "89.0 – 91.0" in page
    with pytest.raises(UserError, match="none of these runs"):
        write_overview(folders[2:], tmp_path / paths.REPORT)
