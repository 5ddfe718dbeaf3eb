import csv
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Generator

from realera.contracts import Prompt, Split, UserError, Verdict
from realera.evaluation.metrics import by_prompt, estimates, h_o, measure, scalars, summarise
from realera.evaluation.records import Row, verdict_file, write_manifest, write_verdicts

TABLES = Path(__file__).parents[1] / "data" / "paper_tables"

# Rows whose printed H_o is not the H_o of the printed triple: {(table, method, concept): the right one}.
WRONG = {
    # slips of the paper
    ("object_main", "AC", "airplane"): 7.03,
    ("celebrity", "AC", "Elon Musk"): 95.99,
    ("celebrity", "ESD", "Mariah Carey"): 65.15,
    # nearly right, but not by rounding
    ("object_main", "ReaEra", "automobile"): 96.91,
    ("object_main", "MACE", "airplane"): 92.04,
    ("object_appendix", "UCE", "deer"): 92.33,
    ("ablation", "1", "automobile"): 89.81,
    # the average row prints the mean of the ten H_o, not H_o of the mean accuracies
    ("object_main", "FMN", "average_10"): 7.56,
    ("object_main", "AC", "average_10"): 4.46,
    ("object_main", "SPM", "average_10"): 29.27,
    ("object_main", "UCE", "average_10"): 86.35,
    ("object_main", "SLD-M", "average_10"): 28.89,
    ("object_main", "ESD-x", "average_10"): 77.76,
    ("object_main", "ESD-u", "average_10"): 84.03,
    ("object_main", "MACE", "average_10"): 92.66,
    ("object_main", "ReaEra", "average_10"): 93.91,
}


def _rows() -> list[tuple[str, dict[str, str]]]:
    tables = ("object_main", "object_appendix", "celebrity", "style", "ablation")
    return [
        (table, row)
        for table in tables
        for row in csv.DictReader((TABLES / f"{table}.csv").read_text(encoding="utf-8").splitlines())
        if row["h_o"]
    ]


def _key(table: str, row: dict[str, str]) -> tuple[str, str, str]:
    return table, row.get("method") or row["variant"], row["concept"]


def test_the_tables_hold_every_printed_row() -> None:
    assert len(_rows()) == 163
    assert WRONG.keys() <= {_key(table, row) for table, row in _rows()}


@pytest.mark.parametrize(("table", "row"), _rows(), ids=["-".join(_key(t, r)) for t, r in _rows()])
def test_h_o_is_the_papers(table: str, row: dict[str, str]) -> None:
    """The printed H_o is one that accuracies rounding to the printed ones can have; otherwise the row is listed."""
    acc_e, acc_s, acc_g, printed = (float(row[k]) for k in ("acc_e", "acc_s", "acc_g", "h_o"))
    half = 0.005  # the accuracies are rounded to two places, and so is H_o
    least, most = h_o(acc_e + half, acc_s - half, acc_g + half), h_o(acc_e - half, acc_s + half, acc_g - half)
    by_rounding = least - half <= printed <= most + half
    key = _key(table, row)
    assert by_rounding == (key not in WRONG)
    if not by_rounding:
        assert h_o(acc_e, acc_s, acc_g) == pytest.approx(WRONG[key], abs=0.006)


def test_average_rows_print_the_mean_of_the_classes_h_o() -> None:
    printed = {_key(t, r): float(r["h_o"]) for t, r in _rows() if t.startswith("object")}
    for method in ("FMN", "AC", "SPM", "UCE", "SLD-M", "ESD-x", "ESD-u", "MACE", "ReaEra"):
        names = (method, method.replace("ReaEra", "RealEra"))
        values = [v for (_, m, concept), v in printed.items() if m in names and concept != "average_10"]
        assert len(values) == 10
        assert sum(values) / 10 == pytest.approx(printed["object_main", method, "average_10"], abs=0.011)


def test_h_o_at_its_ends() -> None:
    assert h_o(0, 100, 0) == 100
    assert h_o(100, 90, 10) == 0 and h_o(10, 0, 10) == 0
    assert math.isnan(h_o(10, 90, math.nan))


def _judged(rows: list[tuple[Split, str, float, str]]) -> tuple[list[Prompt], list[Verdict]]:
    prompts = [Prompt(f"{i}", f"a photo of the {c}", c, s, i) for i, (s, c, _, _) in enumerate(rows)]
    return prompts, [Verdict(f"{i}", value, label) for i, (_, _, value, label) in enumerate(rows)]


@pytest.fixture
def judged() -> tuple[list[Prompt], list[Verdict]]:
    return _judged(
        [
            ("erase", "airplane", 0.2, "sky"),
            ("erase", "airplane", 0.6, "Airplane"),
            ("erase", "airplane", math.nan, ""),
            ("near", "airplane", 0.1, "sky"),
            ("near", "airplane", 0.3, "sky"),
            # cat has one scored image and dog three: each counts once
            ("keep", "cat", 0.5, "dog"),
            ("keep", "cat", math.nan, ""),
            ("keep", "dog", 0.9, "dog"),
            ("keep", "dog", 0.9, "dog"),
            ("keep", "dog", 0.9, "dog"),
        ]
    )


def test_accuracies_by_split_and_mode(judged: tuple) -> None:
    found = estimates(*judged, "mean_prob", Generator().manual_seed(0))
    assert found["acc_e"].value == pytest.approx(40)
    assert found["acc_g"].value == pytest.approx(20)
    assert found["acc_s"].value == pytest.approx(70)
    assert found["h_o"].value == pytest.approx(h_o(40, 70, 20))
    top1 = estimates(*judged, "top1", Generator().manual_seed(0))
    assert (top1["acc_e"].value, top1["acc_g"].value, top1["acc_s"].value) == (50, 0, 50)


def test_unscored_images_leave_the_denominator_and_are_counted(judged: tuple) -> None:
    found = estimates(*judged, "mean_prob", Generator().manual_seed(0))
    assert (found["acc_e"].n, found["acc_e"].unscored) == (2, 1)
    assert (found["acc_s"].n, found["acc_s"].unscored) == (4, 1)
    assert (found["h_o"].n, found["h_o"].unscored) == (8, 2)


def test_a_split_without_images_is_no_number(judged: tuple) -> None:
    found = estimates(*judged, "mean_prob", Generator().manual_seed(0))
    assert math.isnan(found["acc_u"].value) and math.isnan(found["acc_u"].low) and found["acc_u"].n == 0
    prompts, verdicts = _judged([("erase", "cat", math.nan, ""), ("keep", "dog", 0.9, "dog")])
    none = estimates(prompts, verdicts, "mean_prob", Generator().manual_seed(0))
    assert math.isnan(none["acc_e"].value) and none["acc_e"].unscored == 1
    assert math.isnan(none["h_o"].value) and math.isnan(none["h_o"].high)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """60 experiments of 80 images with a true rate of 30%: about 95% of the intervals hold it."""
    generator = torch.Generator().manual_seed(1)
    held, widths = 0, []
    for _ in range(60):
        draws = (torch.rand(80, generator=generator) < 0.3).double().tolist()
        prompts, verdicts = _judged([("erase", "cat", v, "") for v in draws])
        e = estimates(prompts, verdicts, "mean_prob", generator, draws=500)["acc_e"]
        held += e.low <= 30 <= e.high
        widths.append(e.high - e.low)
        assert e.low <= e.value <= e.high
    assert 52 <= held <= 60
    # 2 * 1.96 * sqrt(.3 * .7 / 80) = 20.1 points
    assert sum(widths) / 60 == pytest.approx(20.1, abs=1.5)


def test_intervals_shrink_with_images_and_are_repeatable() -> None:
    widths = []
    for n in (20, 80, 320):
        prompts, verdicts = _judged([("erase", "cat", float(i % 2), "") for i in range(n)])
        first = estimates(prompts, verdicts, "mean_prob", Generator().manual_seed(3))["acc_e"]
        assert first == estimates(prompts, verdicts, "mean_prob", Generator().manual_seed(3))["acc_e"]
        widths.append(first.high - first.low)
    assert all(later < 0.7 * earlier for earlier, later in pairwise(widths))


def test_h_os_interval_comes_from_the_splits_resampled_together(judged: tuple) -> None:
    found = estimates(*judged, "mean_prob", Generator().manual_seed(0))
    best = h_o(found["acc_e"].low, found["acc_s"].high, found["acc_g"].low)
    worst = h_o(found["acc_e"].high, found["acc_s"].low, found["acc_g"].high)
    assert worst <= found["h_o"].low <= found["h_o"].value <= found["h_o"].high <= best


def test_each_prompt_is_listed_in_both_modes(judged: tuple) -> None:
    rows = by_prompt(*judged)
    assert [(r["split"], r["prompt"], r["n"], r["unscored"]) for r in rows] == [
        ("erase", "a photo of the airplane", 2, 1),
        ("near", "a photo of the airplane", 2, 0),
        ("keep", "a photo of the cat", 1, 1),
        ("keep", "a photo of the dog", 3, 0),
    ]
    assert rows[0]["mean_prob"] == pytest.approx(40) and rows[0]["top1"] == 50


def _run(folder: Path, judged: tuple, original: bool = True) -> None:
    prompts, verdicts = judged
    write_manifest(folder, [Row(p, f"images/{p.id}.png", "s", f"originals/{p.id}.png") for p in prompts])
    write_verdicts(verdict_file(folder, "eye"), verdicts)
    if original:
        before = [Verdict(p.id, 1.0, p.concept) for p in prompts]
        write_verdicts(verdict_file(folder, "eye", "original"), before)


def test_metrics_json_holds_both_models_and_the_protocol(tmp_path: Path, judged: tuple) -> None:
    _run(tmp_path, judged)
    metrics = measure(tmp_path, "eye", {"task": {"task": "object"}, "judge": {"judge": "eye"}})
    text = (tmp_path / "metrics.json").read_text()
    assert json.loads(text) == metrics and "NaN" not in text
    assert metrics["headline"] == "mean_prob"
    assert metrics["mean_prob"]["acc_e"]["value"] == pytest.approx(40)
    assert metrics["top1"]["acc_e"]["value"] == 50
    assert metrics["mean_prob"]["acc_u"] == {"value": None, "low": None, "high": None, "n": 0, "unscored": 0}
    assert metrics["original"]["mean_prob"]["acc_e"]["value"] == 100
    assert metrics["protocol"]["task"] == {"task": "object"}
    assert metrics["protocol"]["interval"]["level"] == 95


def test_measuring_again_gives_the_same_bytes(tmp_path: Path, judged: tuple) -> None:
    _run(tmp_path, judged)
    measure(tmp_path, "eye", {})
    first = (tmp_path / "metrics.json").read_bytes()
    measure(tmp_path, "eye", {})
    assert (tmp_path / "metrics.json").read_bytes() == first


def test_a_run_of_the_original_alone_has_no_before(tmp_path: Path, judged: tuple) -> None:
    _run(tmp_path, judged, original=False)
    assert measure(tmp_path, "eye", {})["original"] is None


def test_verdicts_of_other_images_are_refused(tmp_path: Path, judged: tuple) -> None:
    _run(tmp_path, judged)
    write_verdicts(verdict_file(tmp_path, "eye", "original"), [Verdict("other", 1.0, "cat")])
    with pytest.raises(UserError, match="judge the run again"):
        measure(tmp_path, "eye", {})
    with pytest.raises(UserError, match="judge the run first"):
        measure(tmp_path, "ear", {})


def test_scalars_are_flat_and_leave_out_what_was_not_measured(judged: tuple) -> None:
    prompts, verdicts = judged
    flat = scalars(summarise(prompts, verdicts, verdicts, {}))
    assert flat["acc_e"] == pytest.approx(40) and flat["acc_e_top1"] == 50
    assert flat["original/acc_s"] == pytest.approx(70)
    assert not [k for k in flat if "acc_u" in k]
    assert not [k for k in scalars(summarise(prompts, verdicts, None, {})) if k.startswith("original")]
