import csv
import json
import math
import statistics
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from realera.contracts import Mode, Prompt, Split, UserError, Verdict
from realera.evaluation.bootstrap import Resamples
from realera.evaluation.box_counts import CLASSES, counts
from realera.evaluation.measures import MEAN_PROB, score
from realera.evaluation.metrics import available_modes, by_prompt, estimates, h_o, summarise
from realera.evaluation.records import ManifestEntry, verdict_file, write_manifest, write_verdicts
from realera.evaluation.results import measure, scalars

Judged = tuple[list[Prompt], list[Verdict]]

TABLES = Path(str(files("realera.reporting") / "printed"))

WITH_H_O = ("object", "celebrity", "style", "ablation")

# Rows whose printed H_o is not the H_o of the printed triple: {(table, method, concept): the right one}.
WRONG = {
    # errors in the paper
    ("object", "AC", "airplane"): 7.03,
    ("celebrity", "AC", "Elon Musk"): 95.99,
    ("celebrity", "ESD", "Mariah Carey"): 65.15,
    # nearly correct, but not explained by rounding
    ("object", "RealEra", "automobile"): 96.91,
    ("object", "MACE", "airplane"): 92.04,
    ("object", "UCE", "deer"): 92.33,
    ("ablation", "1", "automobile"): 89.81,
    # the average row prints the mean of the ten H_o, not H_o of the mean accuracies
    ("object", "FMN", "mean"): 7.56,
    ("object", "AC", "mean"): 4.46,
    ("object", "SPM", "mean"): 29.27,
    ("object", "UCE", "mean"): 86.35,
    ("object", "SLD-M", "mean"): 28.89,
    ("object", "ESD-x", "mean"): 77.76,
    ("object", "ESD-u", "mean"): 84.03,
    ("object", "MACE", "mean"): 92.66,
    ("object", "RealEra", "mean"): 93.91,
}


def _read(table: str) -> list[dict[str, str]]:
    return list(csv.DictReader((TABLES / f"{table}.csv").read_text(encoding="utf-8").splitlines()))


def _rows() -> list[tuple[str, dict[str, str]]]:
    return [(table, row) for table in WITH_H_O for row in _read(table) if row["h_o"]]


def _key(table: str, row: dict[str, str]) -> tuple[str, str, str]:
    return table, row.get("method") or row["variant"], row["concept"]


def _number(table: str, row: dict[str, str], shift: float = 0.0) -> float:
    """The H_o in metrics.json of a run with the row's metrics, each improved by `shift`. One image per split; styles
    use the mode score, as their task does."""
    mode: Mode = "score" if table == "style" else "mean_prob"
    splits: tuple[tuple[Split, str, int], ...] = (("erase", "acc_e", -1), ("keep", "acc_s", 1), ("near", "acc_g", -1))
    prompts = [Prompt(split, "a photo", "x", split, 0) for split, _, _ in splits]
    values = [float(row[name]) + sign * shift for _, name, sign in splits]
    said = [Verdict(p.id, v / 100, "x", {"score": v}) for p, v in zip(prompts, values)]
    headline: dict[str, Mode] = dict.fromkeys(MEAN_PROB, mode)
    return estimates(prompts, said, headline, Resamples(0, 2))["h_o"].value


def test_the_tables_have_every_printed_row() -> None:
    assert len(_rows()) == 163
    assert WRONG.keys() <= {_key(table, row) for table, row in _rows()}
    rest = [row for table in WITH_H_O for row in _read(table)]
    assert {row.get("method") or row["variant"] for row in rest if not row["h_o"]} == {"SD v1.4"}


@pytest.mark.parametrize(("table", "row"), _rows(), ids=["-".join(_key(t, r)) for t, r in _rows()])
def test_h_o_is_the_papers(table: str, row: dict[str, str]) -> None:
    """The printed H_o is consistent with the rounding of the printed accuracies; otherwise the row is listed in
    WRONG."""
    printed = float(row["h_o"])
    half = 0.005  # the accuracies are rounded to two places, and so is H_o
    least, most = _number(table, row, -half), _number(table, row, half)
    by_rounding = least - half <= printed <= most + half
    key = _key(table, row)
    assert by_rounding == (key not in WRONG)
    if not by_rounding:
        assert _number(table, row) == pytest.approx(WRONG[key], abs=0.006)


@pytest.mark.parametrize("row", _read("nsfw"), ids=lambda row: row["method"])
def test_totals_of_explicit_content_are_the_papers(row: dict[str, str]) -> None:
    """Boxes spread over images, several on one image. A class without a column is counted separately."""
    assert [*row][1:9] == list(CLASSES)
    each: list[dict[str, int]] = [{"anus": 1}, {}]
    for name in CLASSES:
        left = int(row[name])
        while left:
            boxes = min(left, 1 + left % 3)
            each.append({name: boxes, "anus": 0})
            left -= boxes
    prompts = [Prompt(str(i), "text", "nudity", "erase", i) for i in range(len(each))]
    found = counts(prompts, [Verdict(p.id, 0.9, "unsafe", {"boxes": boxes}) for p, boxes in zip(prompts, each)])
    assert found["erase"]["total"] == {"boxes": int(row["total"]), "images": len(each) - 2}
    assert {name: count["boxes"] for name, count in found["erase"]["classes"].items()} == {
        name: int(row[name]) for name in CLASSES
    }
    assert found["erase"]["apart"] == {"anus": {"boxes": 1, "images": 1}} and found["erase"]["n"] == len(each)


def test_celebrities_of_mace_have_two_terms() -> None:
    """Top-1 given a face: 6 of 199 faces, 9,736 of 10,000; H_o is the harmonic mean of efficacy and specificity."""
    rows = [("erase", "a", 0.9, "a" if i < 6 else "b") for i in range(199)] + [("erase", "a", math.nan, "")]
    rows += [("keep", "c", 0.9, "c" if i < 9736 else "b") for i in range(10_000)]
    top1: dict[str, Mode] = dict.fromkeys(MEAN_PROB, "top1")
    found = estimates(*_judged(rows), top1, Resamples(0, 2), ("acc_e", "acc_s"))  # type: ignore[arg-type]
    assert found["acc_e"].value == pytest.approx(6 / 1.99) and found["acc_e"].unscored == 1
    assert found["h_o"].value == pytest.approx(statistics.harmonic_mean([100 - 6 / 1.99, 97.36]))
    assert found["h_o"].n == 199 + 10_000 and math.isnan(found["acc_g"].value)
    assert "h_o" not in estimates(*_judged(rows[:3]), top1, Resamples(0, 2), ())  # type: ignore[arg-type]


def test_average_rows_print_the_mean_of_the_classes_h_o() -> None:
    printed = {_key(t, r): float(r["h_o"]) for t, r in _rows() if t == "object"}
    for method in ("FMN", "AC", "SPM", "UCE", "SLD-M", "ESD-x", "ESD-u", "MACE", "RealEra"):
        values = [v for (_, m, concept), v in printed.items() if m == method and concept != "mean"]
        assert len(values) == 10
        assert sum(values) / 10 == pytest.approx(printed["object", method, "mean"], abs=0.011)


def test_h_o_at_its_limits() -> None:
    assert _three(0, 100, 0) == 100
    assert _three(100, 90, 10) == 0 and _three(10, 0, 10) == 0
    assert math.isnan(_three(10, 90, math.nan))


def _three(acc_e: float, acc_s: float, acc_g: float) -> float:
    return h_o({"acc_e": acc_e, "acc_s": acc_s, "acc_g": acc_g})


def _judged(rows: list[tuple[Split, str, float, str]]) -> Judged:
    prompts = [Prompt(f"{i}", f"a photo of the {c}", c, s, i) for i, (s, c, _, _) in enumerate(rows)]
    return prompts, [Verdict(f"{i}", value, label) for i, (_, _, value, label) in enumerate(rows)]


@pytest.fixture
def judged() -> Judged:
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


def test_accuracies_by_split_and_mode(judged: Judged) -> None:
    found = estimates(*judged, MEAN_PROB, Resamples())
    assert found["acc_e"].value == pytest.approx(40)
    assert found["acc_g"].value == pytest.approx(20)
    assert found["acc_s"].value == pytest.approx(70)
    assert found["h_o"].value == pytest.approx(_three(40, 70, 20))
    top1 = estimates(*judged, dict.fromkeys(MEAN_PROB, "top1"), Resamples())
    assert (top1["acc_e"].value, top1["acc_g"].value) == (50, 0)
    assert top1["acc_s"].value == 75, "three of four images, as MACE counts; the mean over classes would be 50"


def test_unscored_images_are_left_out_and_counted(judged: Judged) -> None:
    found = estimates(*judged, MEAN_PROB, Resamples())
    assert (found["acc_e"].n, found["acc_e"].unscored) == (2, 1)
    assert (found["acc_s"].n, found["acc_s"].unscored) == (4, 1)
    assert (found["h_o"].n, found["h_o"].unscored) == (8, 2)


def test_a_split_without_images_has_no_value(judged: Judged) -> None:
    found = estimates(*judged, MEAN_PROB, Resamples())
    assert math.isnan(found["acc_u"].value) and math.isnan(found["acc_u"].low) and found["acc_u"].n == 0
    prompts, verdicts = _judged([("erase", "cat", math.nan, ""), ("keep", "dog", 0.9, "dog")])
    none = estimates(prompts, verdicts, MEAN_PROB, Resamples())
    assert math.isnan(none["acc_e"].value) and none["acc_e"].unscored == 1
    assert math.isnan(none["h_o"].value) and math.isnan(none["h_o"].high)


def test_intervals_have_their_nominal_coverage() -> None:
    """60 experiments of 80 images with a true rate of 30%: about 95% of the intervals contain it."""
    generator = torch.Generator().manual_seed(1)
    held, widths = 0, []
    for trial in range(60):
        draws = (torch.rand(80, generator=generator) < 0.3).double().tolist()
        prompts, verdicts = _judged([("erase", "cat", v, "") for v in draws])
        e = estimates(prompts, verdicts, MEAN_PROB, Resamples(trial, 500))["acc_e"]
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
        first = estimates(prompts, verdicts, MEAN_PROB, Resamples(3))["acc_e"]
        assert first == estimates(prompts, verdicts, MEAN_PROB, Resamples(3))["acc_e"]
        widths.append(first.high - first.low)
    assert all(later < 0.7 * earlier for earlier, later in pairwise(widths))


def test_h_os_interval_comes_from_the_splits_resampled_together(judged: Judged) -> None:
    found = estimates(*judged, MEAN_PROB, Resamples())
    best = _three(found["acc_e"].low, found["acc_s"].high, found["acc_g"].low)
    worst = _three(found["acc_e"].high, found["acc_s"].low, found["acc_g"].high)
    assert worst <= found["h_o"].low <= found["h_o"].value <= found["h_o"].high <= best


def test_each_prompt_is_listed_in_both_modes(judged: Judged) -> None:
    rows = by_prompt(*judged, ["mean_prob", "top1"], MEAN_PROB)
    assert [(r["split"], r["prompt"], r["n"], r["unscored"]) for r in rows] == [
        ("erase", "a photo of the airplane", 2, 1),
        ("near", "a photo of the airplane", 2, 0),
        ("keep", "a photo of the cat", 1, 1),
        ("keep", "a photo of the dog", 3, 0),
    ]
    assert rows[0]["mean_prob"] == pytest.approx(40) and rows[0]["top1"] == 50


PROTOCOL = {"judge": {"judge": "eye"}}


def _run(folder: Path, judged: Judged, original: bool = True) -> None:
    prompts, verdicts = judged
    write_manifest(folder, [ManifestEntry(p, f"images/{p.id}.png", "s", f"originals/{p.id}.png") for p in prompts])
    write_verdicts(verdict_file(folder, "eye"), verdicts)
    if original:
        before = [Verdict(p.id, 1.0, p.concept) for p in prompts]
        write_verdicts(verdict_file(folder, "eye", "original"), before)


def test_metrics_json_has_both_models_and_the_protocol(tmp_path: Path, judged: Judged) -> None:
    _run(tmp_path, judged)
    metrics = measure(tmp_path, "eye", {"task": "object", **PROTOCOL})
    text = (tmp_path / "metrics.json").read_text()
    assert json.loads(text) == metrics and "NaN" not in text
    assert metrics["headline"] == MEAN_PROB and metrics["h_o_terms"] == ["acc_e", "acc_s", "acc_g"]
    assert metrics["main"]["acc_e"] == {
        **metrics["mean_prob"]["acc_e"],
        "scored": pytest.approx(200 / 3),
        "mode": "mean_prob",
    }
    assert metrics["main"]["h_o"]["mode"] == "mean_prob" and "score" not in metrics and "concepts" not in metrics
    assert metrics["mean_prob"]["acc_e"]["value"] == pytest.approx(40)
    assert metrics["top1"]["acc_e"]["value"] == 50
    assert metrics["mean_prob"]["acc_u"] == {"value": None, "low": None, "high": None, "n": 0, "unscored": 0}
    assert metrics["original"]["mean_prob"]["acc_e"]["value"] == 100
    assert metrics["protocol"]["task"] == "object"
    assert metrics["protocol"]["interval"]["level"] == 95


def test_measuring_again_gives_the_same_bytes(tmp_path: Path, judged: Judged) -> None:
    _run(tmp_path, judged)
    measure(tmp_path, "eye", PROTOCOL)
    first = (tmp_path / "metrics.json").read_bytes()
    measure(tmp_path, "eye", PROTOCOL)
    assert (tmp_path / "metrics.json").read_bytes() == first


def test_a_run_of_the_original_model_has_no_original_block(tmp_path: Path, judged: Judged) -> None:
    _run(tmp_path, judged, original=False)
    assert measure(tmp_path, "eye", PROTOCOL)["original"] is None


def test_verdicts_of_other_images_are_refused(tmp_path: Path, judged: Judged) -> None:
    _run(tmp_path, judged)
    write_verdicts(verdict_file(tmp_path, "eye", "original"), [Verdict("other", 1.0, "cat")])
    with pytest.raises(UserError, match="judge the run again"):
        measure(tmp_path, "eye", {})
    with pytest.raises(UserError, match="judge the run first"):
        measure(tmp_path, "ear", {})


def test_scalars_are_flat_and_leave_out_unmeasured_values(judged: Judged) -> None:
    prompts, verdicts = judged
    flat = scalars(summarise(prompts, verdicts, verdicts))
    assert flat["acc_e"] == pytest.approx(40) and flat["acc_e_top1"] == 50
    assert flat["acc_e_low"] <= 40 <= flat["acc_e_high"] and flat["h_o_low"] <= flat["h_o"] <= flat["h_o_high"]
    assert flat["original/acc_s"] == pytest.approx(70)
    assert not [k for k in flat if "acc_u" in k]
    assert not [k for k in scalars(summarise(prompts, verdicts, None)) if k.startswith("original")]


def _scores(detail: dict[str, object], value: float = math.nan, label: str = "") -> list[float]:
    prompt = Prompt("a", "a cat", "cat", "erase", 0)
    modes: tuple[Mode, ...] = ("mean_prob", "top1", "score", "detected")
    return [score(prompt, Verdict("a", value, label, detail), mode) for mode in modes]


def test_a_verdict_has_a_value_in_each_mode_or_is_unscored() -> None:
    assert _scores({"score": 28.5, "detected": True}, 0.25, "CAT") == [25, 100, 28.5, 100]
    assert _scores({"detected": False}, 0.25, "dog")[3] == 0
    assert all(math.isnan(x) for x in _scores({}))
    assert all(math.isnan(x) for x in _scores({"score": None, "detected": None}))
    assert available_modes([Verdict("a", math.nan, "", {"score": 1.0}), Verdict("b", math.nan, "")]) == ["score"]
    assert available_modes([Verdict("a", 0.5, "x", {"detected": None})]) == ["mean_prob", "top1"]


def test_each_metric_uses_its_headline_mode_and_h_o_needs_terms() -> None:
    """Explicit content: detections for the erased concept, a score for preserved captions, and no H_o."""
    rows = [("erase", "nudity"), ("erase", "nudity"), ("erase", "nudity"), ("keep", "a"), ("keep", "b")]
    prompts = [Prompt(str(i), f"text {i}", concept, split, i) for i, (split, concept) in enumerate(rows)]  # type: ignore[arg-type]
    details = [{"detected": True}, {"detected": False}, {}, {"score": 30.0}, {"score": 32.0}]
    said = [Verdict(p.id, math.nan, "", detail) for p, detail in zip(prompts, details)]
    headline: dict[str, Mode] = {**dict.fromkeys(MEAN_PROB, "detected"), "acc_s": "score"}
    found = summarise(prompts, said, None, headline=headline, terms=())
    assert found["main"]["acc_e"]["value"] == 50 and found["main"]["acc_e"]["scored"] == pytest.approx(200 / 3)
    assert (found["main"]["acc_s"]["value"], found["main"]["acc_s"]["mode"]) == (31, "score")
    assert "h_o" not in found["main"] and "h_o" not in found["detected"]
    assert "mean_prob" not in found and "top1" not in found, "no verdict has such a reading"
    assert found["by_prompt"][0]["detected"] == 100 and found["by_prompt"][0]["score"] is None
    assert [(row["n"], row["unscored"]) for row in found["by_prompt"]] == [(1, 0), (1, 0), (0, 1), (1, 0), (1, 0)]


def test_no_scored_image_gives_no_value_and_no_error() -> None:
    prompts, said = _judged([("erase", "cat", math.nan, ""), ("keep", "dog", math.nan, "")])
    found = summarise(prompts, said, said)
    assert found["mean_prob"]["acc_e"] == {"value": None, "low": None, "high": None, "n": 0, "unscored": 1}
    assert found["main"]["h_o"]["value"] is None and "top1" not in found and "counts" not in found


def test_several_concepts_have_a_block_each_and_main_is_their_mean() -> None:
    rows: list[tuple[Split, str, float, str]] = [("keep", "dog", 0.9, "dog"), ("keep", "dog", 0.7, "dog")]
    for concept, by_name, near in (("cat", 0.1, 0.2), ("bird", 0.3, 0.6)):
        rows += [("erase", concept, by_name, "x")] * 3 + [("near", concept, near, "x")] * 2
    found = summarise(*_judged(rows), None)
    cat, bird = found["concepts"]["cat"], found["concepts"]["bird"]
    assert [round(cat[m]["value"], 6) for m in ("acc_e", "acc_s", "acc_g")] == [10, 80, 20]
    assert [round(bird[m]["value"], 6) for m in ("acc_e", "acc_s", "acc_g")] == [30, 80, 60]
    assert cat["acc_s"] == found["main"]["acc_s"] and cat["acc_e"]["n"] == 3
    assert found["main"]["acc_e"]["value"] == pytest.approx(20) and found["main"]["acc_g"]["value"] == pytest.approx(40)
    assert cat["h_o"]["value"] == pytest.approx(_three(10, 80, 20))
    assert found["main"]["h_o"]["value"] == pytest.approx(_three(20, 80, 40)), "one model, one H_o: of its means"
    assert "concepts" not in summarise(*_judged(rows[:7]), None), "a single one is `main` itself"
    other = {"ear": {"main": {"acc_e": {"value": 5.0}, "acc_s": {"value": None}}}}
    flat = scalars({**found, "judges": other, "sets": {"fid": {"fid": 3.0, "gone": None, "protocol": {}}}})
    assert flat["judges/ear/acc_e"] == 5 and "judges/ear/acc_s" not in flat
    assert flat["cat/acc_e"] == pytest.approx(10) and flat["bird/h_o"] == pytest.approx(_three(30, 80, 60))
    assert flat["sets/fid/fid"] == 3 and "sets/fid/gone" not in flat


def test_concepts_of_one_image_each_are_resampled_together() -> None:
    """A caption data set: each caption is a concept with one image, which has no spread."""
    values = [float(i % 2) for i in range(100)]
    apart = estimates(*_judged([("keep", f"c{i}", v, "") for i, v in enumerate(values)]), MEAN_PROB, Resamples())
    alike = estimates(*_judged([("keep", "c", v, "") for v in values]), MEAN_PROB, Resamples())
    assert apart["acc_s"].value == alike["acc_s"].value == 50
    widths = [found["acc_s"].high - found["acc_s"].low for found in (apart, alike)]
    assert widths[0] == pytest.approx(widths[1], rel=0.15) and widths[0] == pytest.approx(19.6, rel=0.15)


def test_the_unedited_model_s_boxes_are_counted_separately_and_empty_ones_are_zero() -> None:
    prompts = [Prompt(str(i), "t", "nudity", "erase", i) for i in range(3)]
    before = [Verdict(p.id, 1.0, "unsafe", {"boxes": {"belly": 2, "tail": 1}}) for p in prompts]
    after = [Verdict(p.id, 0.0, "safe", {"boxes": {}}) for p in prompts[:2]] + [Verdict("2", math.nan, "")]
    found = summarise(prompts, after, before)
    assert found["counts"]["erase"] == {"classes": {}, "apart": {}, "total": {"boxes": 0, "images": 0}, "n": 2}
    was = found["original"]["counts"]["erase"]
    assert list(was["classes"]) == [*CLASSES, "tail"] and was["total"] == {"boxes": 9, "images": 3}
