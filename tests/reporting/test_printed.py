"""The paper's numbers in the package: complete, and found by our method names."""

from __future__ import annotations

import csv

import pytest

from realera.evaluation.metrics import h_o
from realera.reporting.printed import HERE, MEAN, OBJECTS, PARTS, TASKS, ablation, printed, same_name


def test_rows_are_found_by_our_names() -> None:
    assert printed("object", "realera", "airplane") == {"acc_e": 3.38, "acc_s": 96.18, "acc_g": 8.87, "h_o": 94.58}
    assert printed("object", "original", "cat") == {"acc_e": 98.93, "acc_s": 98.60, "acc_g": 99.05}
    assert printed("object", "sld", "truck")["acc_e"] == 91.06 and printed("celebrity", "sld", "Tom Cruise")
    assert printed("style", "esd-x", "Salvador Dali") == printed("style", "esd-x", "salvador dalí") != {}
    assert printed("celebrity", "uce", "Leonardo DiCaprio")["acc_s"] == 80.16
    assert printed("nsfw", "sa", "anything") == {**printed("nsfw", "sa", ""), "total": 292} and "acc_s" in printed(
        "nsfw", "mace", ""
    )
    assert printed("object", "rece", "cat") == printed("object", "uce", "gun") == printed("mine", "uce", "cat") == {}


def test_labels_are_recognised_as_names_of_the_method() -> None:
    assert same_name("RealEra", "realera") and same_name("SD v1.4", "original") and same_name("SLD-M", "sld")
    assert not same_name("UCE one row", "uce") and not same_name("+ mining", "realera")


def test_the_ablation_is_found_by_its_parts() -> None:
    assert ablation("realera-text", frozenset(PARTS), "automobile")["acc_g"] == 4.82
    assert ablation("realera-text", frozenset(["closed_form"]), "Automobile")["acc_g"] == 22.68
    assert ablation("realera-text", frozenset(["closed_form", "neighbor_mining"]), "automobile") == {}
    assert ablation("realera-text", frozenset(PARTS), "cat") == {}
    assert ablation("mine", frozenset(PARTS), "automobile") == {}


@pytest.mark.parametrize("task", TASKS)
def test_every_row_is_complete_and_its_h_o_follows_from_the_formula(task: str) -> None:
    with (HERE / f"{task}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    misprints = 0
    for row in rows:
        assert None not in row and None not in row.values()
        if row.get("h_o") and row["concept"] != MEAN:
            computed = h_o({name: float(row[name]) for name in ("acc_e", "acc_s", "acc_g")})
            misprints += abs(computed - float(row["h_o"])) > 0.051
    assert misprints == {"object": 1, "celebrity": 2}.get(task, 0), "the misprints that README.md lists"
    if task == "object":
        by_method = {m: {r["concept"] for r in rows if r["method"] == m} for m in {r["method"] for r in rows}}
        assert all(concepts == OBJECTS | {MEAN} for concepts in by_method.values()) and len(by_method) == 10
