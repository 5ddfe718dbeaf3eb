"""The tables of a sweep: rows and columns, the paper's numbers, paired differences."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from realera.contracts import Mode, UserError
from realera.evaluation.bootstrap import Resamples, interval
from realera.evaluation.measures import MEAN_PROB
from realera.evaluation.metrics import Sample
from realera.evaluation.records import read_verdicts, verdict_file, write_verdicts
from realera.reporting import printed
from realera.reporting.pooling import pool
from realera.reporting.sweep.chapter import Chapter
from realera.reporting.sweep.page import write_sweep
from realera.reporting.sweep.systems import JudgedRun, name_systems, original_of, read_run
from realera.reporting.sweep.tables import (
    ablation,
    boxes,
    by_concept,
    cost_table,
    difference,
    differences,
    means,
    parts_of,
    tables,
)
from realera.reporting.table import write_results
from realera.reporting.table_formats import Number, Table
from sweeps import JUDGE, REALERA, judged

FULL = frozenset(["closed_form", "noise_alignment", "neighbor_mining", "beyond_concept_reg"])


def chapter(folders: list[Path]) -> Chapter:
    runs: list[JudgedRun] = [run for run in map(read_run, folders) if run is not None]
    return Chapter("object", "object", name_systems(runs)[0])


def number(table: Table, system: str, key: str, group: str = "") -> Number:
    column = next(i for i, c in enumerate(table.columns) if (c.key, c.group) == (key, group))
    found = next(row for row in table.rows if row.texts[0] == system).numbers[column]
    assert found is not None
    return found


def test_means_equal_those_of_results_json_and_missing_runs_are_noted(tmp_path: Path) -> None:
    folders = [
        judged(tmp_path / f"{method}-{concept}-{seed}", concept, seed, method, {"erase": share, "near": 0.5, "keep": 1})
        for method, share in (("realera", 0.0), ("uce", 0.5))
        for concept in ("cat", "dog")
        for seed in (0, 1)
        if (method, concept, seed) != ("uce", "dog", 1)
    ]
    of = chapter([*folders, judged(tmp_path / "o", "cat", 0, "original")])
    table = means(of)
    assert [row.texts[0] for row in table.rows] == ["uce", "realera", "original"], "the papers' order"
    assert [row.note for row in table.rows] == ["3 of 4 runs", "", "1 of 4 runs"] and table.rows[-1].reference
    expected = pool([run.judged for run in of.systems["uce"] if run.judged], MEAN_PROB, Resamples())
    for key in ("acc_e", "acc_g", "h_o"):
        found, wanted = number(table, "uce", key), expected[key]
        assert (found.value, found.low, found.high) == (wanted.value, wanted.low, wanted.high)
    each = by_concept(of)
    assert each is not None and [name for name, _ in each.groups] == ["cat", "dog", "mean"]
    assert [c.key for c in each.columns[:4]] == ["acc_e", "acc_s", "acc_g", "h_o"]
    assert number(each, "uce", "acc_e", "dog").value == pytest.approx(50)
    assert number(each, "realera", "acc_e", "mean") == replace(number(table, "realera", "acc_e"))
    assert (
        number(each, "uce", "acc_e", "cat").printed == 2.35 and number(each, "realera", "h_o", "dog").printed == 91.39
    )
    assert number(each, "realera", "acc_e", "mean").printed is None, "two classes are not the paper's ten"
    assert any("cannot be compared" in note for note in each.notes) and "paper" not in "".join(table.notes)


def test_a_system_that_lacks_runs_is_noted_in_every_format_and_not_ranked(tmp_path: Path) -> None:
    shares = {"uce": 0.75, "sa": 0.5, "realera": 0.0}
    folders = [
        judged(tmp_path / f"{method}-{concept}", concept, 0, method, {"erase": share, "near": share, "keep": 1})
        for method, share in shares.items()
        for concept in ("cat", "dog")
        if (method, concept) != ("realera", "dog")
    ]
    of = chapter(folders)
    table, each = means(of), by_concept(of)
    assert [number(table, system, "acc_e").mark for system in shares] == ["second", "best", ""]
    assert each is not None and number(each, "realera", "acc_e", "mean").mark == ""
    assert number(each, "realera", "acc_e", "cat").mark == "best", "it has all runs of this concept"
    assert sum("not ranked" in note for note in table.notes) == 1
    page, readme = tmp_path / "report.html", tmp_path / "README.md"
    readme.write_text("before\n<!-- table -->\n<!-- end of table -->\n")
    write_results(folders, tmp_path)
    written = write_sweep(folders, page, base="uce").read_text()
    for name in ("mean", "concepts", "differences", "relative"):
        said = "over 1 of 2 runs" if name == "differences" else "1 of 2 runs"
        for kind in ("csv", "md", "tex"):
            assert (tmp_path / "tables" / f"object-{name}.{kind}").read_text().count(said) == 1, (name, kind)
    assert written.count("<small>1 of 2 runs</small>") == 3 and "<small>over 1 of 2 runs</small>" in written
    assert "| realera (1 of 2 runs) |" in readme.read_text()
    whole = means(chapter(folders[:4]))
    assert not any(row.note for row in whole.rows) and not any("ranked" in note for note in whole.notes)


def test_equally_many_runs_of_other_concepts_are_not_the_same_runs(tmp_path: Path) -> None:
    table = means(
        chapter([judged(tmp_path / "a", "cat", 0, "uce"), judged(tmp_path / "b", "dog", 0, "sa", {"erase": 1})])
    )
    assert [row.note for row in table.rows] == ["1 of 2 runs"] * 2
    assert not any(n and n.mark for row in table.rows for n in row.numbers)
    folders = [judged(tmp_path / m, "cat", 0, m, {"erase": e}) for m, e in (("uce", 0.0), ("sa", 1.0))]
    alone = means(chapter([*folders, judged(tmp_path / "o", "dog", 0, "original")]))
    assert number(alone, "uce", "acc_e").mark == "best", "the original model is not ranked"


def test_the_papers_mean_of_ten_classes_is_only_shown_next_to_a_mean_of_ten(tmp_path: Path) -> None:
    asked = {"uce": sorted(printed.OBJECTS), "realera": ["cat"]}
    of = chapter([judged(tmp_path / f"{m}-{c}", c, 0, m, images=2) for m, own in asked.items() for c in own])
    table, each = means(of), by_concept(of)
    assert number(table, "uce", "acc_e").printed == 13.54 and each is not None
    assert number(table, "realera", "acc_e").printed is None
    assert number(each, "uce", "h_o", "mean").printed == 85.48
    assert number(each, "realera", "h_o", "mean").printed is None
    assert number(each, "realera", "acc_e", "cat").printed is not None


def test_the_papers_numbers_are_not_shown_for_varied_settings(tmp_path: Path) -> None:
    varied = {**REALERA, "edit": {"ridge": 7}}
    of = chapter([judged(tmp_path / "a"), judged(tmp_path / "b", method=varied), judged(tmp_path / "c", method="uce")])
    table = means(of)
    assert number(table, "realera, ridge 7", "acc_e").printed is None
    assert number(table, "uce", "acc_e").printed == 2.35
    alone = means(chapter([judged(tmp_path / "d", method={**REALERA, "align": None})]))
    assert number(alone, "realera", "acc_e").printed is None, "without the LoRA this is not the paper's row"


def test_the_ablation_has_the_papers_order_and_paired_differences(tmp_path: Path) -> None:
    nodes = {
        "realera": REALERA,
        "realera-no-beyond": {**REALERA, "neighbours": {"m": 5, "n": 0}},
        "realera-closed-form": {**REALERA, "neighbours": None, "align": None},
        "realera-no-mining": {**REALERA, "neighbours": None},
    }
    folders = [
        judged(
            tmp_path / f"{name}-{seed}",
            "automobile",
            seed,
            {**node, "name": name},
            {"erase": 0.0, "near": near, "keep": 1.0},
        )
        for (name, node), near in zip(nodes.items(), (0.25, 0.0, 0.75, 0.75))
        for seed in (0, 1)
    ]
    of = chapter(folders)
    assert parts_of(of.systems["realera"][0]).keys() == FULL
    table = ablation(of)
    assert table is not None
    assert [row.texts[0] for row in table.rows] == [
        "realera-closed-form",
        "+ alignment",
        "realera-no-mining",
        "+ neighbours",
        "realera-no-beyond",
        "+ beyond the concept",
        "realera",
    ]
    assert table.rows[2].texts[1:] == ("✓", "✓", "", "") and table.rows[1].signed
    column = [c.key for c in table.columns].index("acc_g")
    same, mined = table.rows[1].numbers[column], table.rows[3].numbers[column]
    assert same and (same.value, same.low, same.high) == (0, 0, 0), (
        "the images are the same, so the difference has no spread"
    )
    assert mined and mined.value == pytest.approx(-60) and mined.low < -60 < mined.high < 0
    assert number(table, "realera", "acc_g").printed == 4.82
    assert number(table, "realera-closed-form", "acc_s").printed == 98.85
    more = judged(tmp_path / "more", "automobile", 0, {**REALERA, "edit": {"ridge": 9}})
    assert ablation(chapter([*folders, more])) is None, "two systems with the same parts: something else was varied"


def test_any_method_has_an_ablation(tmp_path: Path) -> None:
    """The parts and their classes are those of the settings; a method with another class is not among its systems."""
    first, last = {"_target_": "mine.Edit"}, {"_target_": "mine.Finish"}
    nodes = [
        {"name": "mine", "edit": first, "finish": last},
        {"name": "mine-bare", "edit": first, "finish": None},
        {"name": "theirs", "edit": {"_target_": "theirs.Edit"}},
        {"name": "theirs-guided", "edit": {"_target_": "theirs.Other"}, "guide": {"_target_": "theirs.Guide"}},
        {"name": "mined", "neighbours": {"_target_": "mine.Miner"}},
        "original",
    ]
    folders = [judged(tmp_path / str(i), "automobile", 0, node) for i, node in enumerate(nodes)]
    table = ablation(chapter(folders))
    assert table is not None and table.title == "Effect of each part of mine"
    assert table.heads == ("system", "closed form", "edit after training")
    assert [row.texts for row in table.rows] == [
        ("mine-bare", "✓", ""),
        ("+ edit after training", "", ""),
        ("mine", "✓", "✓"),
    ]
    assert all(n is None or n.printed is None for row in table.rows for n in row.numbers)
    assert ablation(chapter(folders[1:])) is None


def test_an_ablation_step_is_over_the_runs_that_both_systems_have(tmp_path: Path) -> None:
    nodes = {"realera": (REALERA, 0.0), "realera-no-mining": ({**REALERA, "neighbours": None}, 0.5)}
    folders = [
        judged(tmp_path / f"{name}-{c}", c, 0, {**node, "name": name}, {"erase": share if c == "cat" else 1.0})
        for name, (node, share) in nodes.items()
        for c in ("cat", "dog")
        if (name, c) != ("realera", "dog")
    ]
    table = ablation(chapter([*folders, *(judged(tmp_path / f"u{s}", "cat", s, "uce") for s in (0, 1))]))
    assert table is not None and [row.note for row in table.rows] == ["", "over 1 of 2 runs", "1 of 2 runs"]
    step = table.rows[1].numbers[0]
    assert step and step.value == pytest.approx(-40), "over the cat only; the means differ by 80 - 10"
    assert not any(n and n.mark for row in table.rows for n in row.numbers)


def test_differences_from_the_base_are_over_the_runs_that_both_have(tmp_path: Path) -> None:
    shares = {"base": 0.75, "same": 0.75, "other": 0.0}
    folders = [
        judged(tmp_path / f"{label}-{seed}", "cat", seed, "uce", {"erase": share, "keep": 1}, label=label)
        for label, share in shares.items()
        for seed in (0, 1)
        if (label, seed) != ("other", 0)
    ]
    of = chapter(folders)
    assert differences(of) is None, "there are no differences without a base"
    table = differences(replace(of, base="base"))
    assert table is not None and [row.texts[0] for row in table.rows] == ["same", "other"]
    assert all(row.signed for row in table.rows) and [row.note for row in table.rows] == ["", "over 1 of 2 runs"]
    same, other = number(table, "same", "acc_e"), number(table, "other", "acc_e")
    assert (same.value, same.low, same.high) == (0, 0, 0), (
        "both have the same resamples, so the difference is exactly 0"
    )
    assert other.low < other.value < other.high <= 0 and other.value == pytest.approx(-60)
    page = write_sweep(folders, tmp_path / "report.html", base="base")
    assert "Differences from base" in page.read_text() and (tmp_path / "tables" / "object-differences.csv").is_file()
    with pytest.raises(UserError, match=r"called .bsae.: choose one of .*base"):
        write_sweep(folders, tmp_path / "report.html", base="bsae")


def test_a_paired_difference_has_a_narrower_interval_than_an_unpaired_one() -> None:
    chance = torch.Generator().manual_seed(0)
    shared, own = torch.randn(2, 500, generator=chance).double()
    was, now = Sample(1.0, 1 + shared, 9, 0), Sample(3.0, 3 + shared, 9, 0)
    found = difference(was, now)
    assert (found.value, found.low, found.high) == pytest.approx((2, 2, 2))
    stranger = difference(was, Sample(3.0, 3 + own, 9, 0))
    slow = sorted(float(b - a) for a, b in zip(1 + shared, 3 + own))
    assert (stranger.low, stranger.high) == interval(torch.tensor(slow, dtype=torch.float64))
    assert stranger.high - stranger.low > 4


def test_boxes_are_shown_as_in_the_papers_second_table(tmp_path: Path) -> None:
    headline: dict[str, Mode] = {**dict.fromkeys(MEAN_PROB, "detected"), "acc_s": "score"}
    detail = {"detected": True, "score": 31.25, "boxes": {"belly": 2, "feet": 1}}
    of = chapter(
        [
            judged(tmp_path / m, "nudity", 0, m, task="nsfw", headline=headline, terms=(), detail=detail)
            for m in ("uce", "realera")
        ]
    )
    table = boxes(of)
    assert table is not None and [c.key for c in table.columns][-2:] == ["total", "acc_s"]
    assert number(table, "uce", "belly") == Number(8, printed=62) and number(table, "uce", "total").value == 12
    assert number(table, "realera", "acc_s").printed == 29.46 and table.columns[-1].digits == 2
    assert table.notes[0].startswith("Boxes in the images prompted by name") and "leaves out" not in table.notes[0]
    assert boxes(chapter([judged(tmp_path / "c")])) is None
    assert [t.name for t in tables(of)] == ["object-mean", "object-boxes"]


def test_classes_that_no_paper_counts_follow_the_total_and_are_noted(tmp_path: Path) -> None:
    headline: dict[str, Mode] = {**dict.fromkeys(MEAN_PROB, "detected"), "acc_s": "score"}
    detail = {"detected": True, "score": 31.25, "boxes": {"belly": 2, "anus": 1}}
    table = boxes(chapter([judged(tmp_path / "a", "nudity", headline=headline, terms=(), detail=detail)]))
    assert table is not None and [c.key for c in table.columns][-3:] == ["total", "anus", "acc_s"]
    assert "The total leaves out anus" in table.notes[0] and number(table, "realera", "total").value == 8


def test_the_papers_boxes_are_only_shown_for_nudity_with_a_clip_score(tmp_path: Path) -> None:
    def found(name: str, kept: Mode, *concepts: str) -> Chapter:
        headline: dict[str, Mode] = {**dict.fromkeys(MEAN_PROB, "detected"), "acc_s": kept}
        more = {"task": "nsfw", "terms": (), "detail": {"detected": True, "score": 31.0, "boxes": {"belly": 2}}}
        return chapter([judged(tmp_path / f"{name}-{c}", c, 0, "uce", headline=headline, **more) for c in concepts])

    for of in (
        found("a", "score", "violence"),
        found("b", "mean_prob", "gun", "knife"),
        found("c", "mean_prob", "nudity"),
    ):
        assert boxes(of) is not None and not any(table.has_printed for table in tables(of))
    both = found("d", "score", "nudity", "violence")
    table, each = boxes(both), by_concept(both)
    assert table is not None and not table.has_printed, "the paper prints no mean over two concepts"
    assert each is not None and number(each, "uce", "acc_s", "nudity").printed == 30.85
    assert number(each, "uce", "acc_s", "violence").printed is None


def test_costs_are_means_over_the_runs_with_costs(tmp_path: Path) -> None:
    folders = [judged(tmp_path / f"{s}", seed=s, cost=cost) for s, cost in enumerate((2.0, 4.0, None))]
    table = cost_table(chapter([*folders, judged(tmp_path / "old", method="uce")]))
    assert table is not None and [row.texts for row in table.rows] == [("realera",)]
    assert number(table, "realera", "seconds").value == 3 and "cpu" in table.notes[0]
    assert cost_table(chapter([folders[2]])) is None
    shared = {"latents": {"seconds": 0, "passes": 0, "unknown": 3}}
    (folders[1] / "costs.json").write_text(json.dumps({"format_version": 1, "passes": {"erase": 9}, "shared": shared}))
    least = cost_table(chapter([*folders, judged(tmp_path / "all", method="uce", cost=1.0)]))
    assert least is not None and [row.note for row in least.rows] == ["1 of 3 runs", "at least"]


def test_a_partly_known_cost_is_not_ranked(tmp_path: Path) -> None:
    spent = {"uce": 1.0, "mace": 2.0, "realera": 0.5}
    folders = {method: judged(tmp_path / method, method=method, cost=cost) for method, cost in spent.items()}
    whole = cost_table(chapter(folders.values()))
    assert whole is not None and number(whole, "realera", "seconds").mark == "best"
    file = folders["realera"] / "costs.json"
    shared = {"latents": {"seconds": 0, "passes": 0, "unknown": 3}}
    file.write_text(json.dumps({**json.loads(file.read_text()), "shared": shared}))
    table = cost_table(chapter(folders.values()))
    assert table is not None and number(table, "realera", "seconds").value == 0.5
    assert [number(table, method, "seconds").mark for method in spent] == ["best", "second", ""]


def test_unmeasured_numbers_are_left_empty(tmp_path: Path) -> None:
    folders = [judged(tmp_path / "a"), judged(tmp_path / "b", method="uce", shares={"erase": 0.5, "keep": 1.0})]
    table = means(chapter(folders))
    assert math.isnan(number(table, "uce", "acc_g").value) and not number(table, "uce", "h_o").known
    assert "–" in write_sweep(folders, tmp_path / "report.html").read_text(encoding="utf-8")


def test_runs_without_a_scored_image_are_left_out_of_means_and_pairs(tmp_path: Path) -> None:
    """One of two runs has no image with a face: mean and difference are over the other run, with a note."""
    folders = []
    for label, shares in {"base": (0.75, 0.25), "other": (0.5, 0.0)}.items():
        for seed, share in enumerate(shares):
            folder = judged(tmp_path / f"{label}-{seed}", "cat", seed, "uce", {"erase": share, "keep": 1}, label=label)
            if (label, seed) == ("other", 1):
                said = [
                    replace(v, value=math.nan) if v.prompt_id.startswith("erase") else v
                    for v in read_verdicts(verdict_file(folder, JUDGE))
                ]
                write_verdicts(verdict_file(folder, JUDGE), said)
            folders.append(folder)
    of = replace(chapter(folders), base="base")
    table, less = means(of), differences(of)
    assert number(table, "other", "acc_e").value == pytest.approx(50) and number(table, "other", "acc_s").value == 90
    assert "Acc_e of other: over 1 of 2 runs; in the others no image could be scored." in table.notes
    assert less is not None and number(less, "other", "acc_e").value == pytest.approx(-20), (
        "50 minus the 70 of its pair"
    )
    assert not any("base" in note for note in table.notes)


def test_images_of_the_original_model_shared_by_several_runs_count_once(tmp_path: Path) -> None:
    runs = [read_run(judged(tmp_path / f"{m}-{s}", "cat", 0, m, images=6)) for s, m in enumerate(("uce", "realera"))]
    originals = [replace(found, folder=run.folder) for run in runs if run and (found := original_of(run))]
    row = Chapter("object", "object", originals).means["original"]
    assert (row["acc_e"].n, row["acc_s"].n, row["acc_e"].value) == (6, 6, 100)
