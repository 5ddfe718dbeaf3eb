"""The model card claims nothing that the run's measurements do not say."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sweeps
from realera import paths
from realera.attacks import closed_form
from realera.contracts import Prompt, UserError, Verdict
from realera.evaluation import attacked, results
from realera.evaluation.records import read_manifest, verdict_file, write_verdicts
from realera.exporting import card
from realera.exporting.description import Description
from realera.exporting.evidence import Evidence

NAMES = {"place": "x", "keywords": "", "file": "map.safetensors", "stem": "map", "pipeline": "StableDiffusionPipeline"}
WHOLE = {"whole": True, "anchor": False}
CLAIMS = ("are drawn as", "the first image shows it, the second does not", "was erased")


def described(evidence: Evidence, *concepts: str, anchors: tuple[str, ...] = ("forest",)) -> Description:
    return Description(
        name="run",
        method="esd-x",
        concepts=concepts or ("deer",),
        anchors=anchors,
        base=None,
        fingerprint="0" * 16,
        identity="12345678",
        kind="v1",
        predicts_v=False,
        side=32,
        evidence=evidence,
        guide=None,
        seed=0,
    )


def written(about: Description) -> str:
    text = card.text(about, "map", NAMES, {})
    assert not any(claim in text for claim in CLAIMS)
    return text


def attack(
    run: Path, name: str, won: int, of: int, target: str = "realera.attacks.mma.MMADiffusion", **more: Any
) -> None:
    """The numbers of an attack that drew the concept for some of the prompts."""
    prompts = [Prompt(f"erase-{i}", "a photo of a deer", "deer", "erase", i) for i in range(of)]
    lines = [
        {"shown": i < won, "plain": False, "original": True, "step": 1 if i < won else None, "drawn": [[1, i < won]]}
        | {"passes": 1, "seconds": 1.0, "draws": 1}
        for i in range(of)
    ]
    numbers = attacked.summarise(prompts, lines, [], "top1")
    attacked.write_numbers(run, name, {**numbers, "protocol": {"attack": {"_target_": target}, "mode": "top1"}, **more})


def unscored(run: Path, *splits: str) -> None:
    """Judges the run again, by a judge that cannot score these splits' images."""
    rows = [row.prompt for row in read_manifest(run)]
    verdicts = [Verdict(p.id, math.nan if p.split in splits else 0.5, "sky", WHOLE) for p in rows]
    for file in (verdict_file(run, sweeps.JUDGE), verdict_file(run, sweeps.JUDGE, "original")):
        write_verdicts(file, verdicts)
    results.measure(run, sweeps.JUDGE, {"task": "object", "judge": {"judge": sweeps.JUDGE}})


def test_attacks_that_succeeded_are_on_the_card_and_in_the_model_index(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    run = sweeps.judged(tmp_path / "run", "deer")
    attack(run, "closed-form", 4, 4, f"{closed_form.__name__}.ClosedForm")
    attack(run, "mma-long", 1, 4, returned={"curve": [[0, 0.0], [5, 100.0]], "half": 2.5})
    text = written(described(Evidence.of(run)))
    assert "| closed-form | 100.0 | 39.8 to 100.0 | 0.0 | 100.0 | 4 |" in text
    assert "| mma-long | 25.0 |" in text and "mma-long: The concept's return: 0% at step 0, 100% at step 5" in text
    left = text.partition("these were not tried: ")[2].partition(".")[0].split(", ")
    assert {"unlearndiff", "relearn", "inversion"} <= {*left} and not {"closed-form", "mma", "random"} & {*left}
    assert "No attack was tried" not in text
    data: Any = ModelCard(text).data
    found = {(one.metric_type, (one.metric_args or {}).get("attack")): one for one in data.eval_results}
    asr = found["asr", "closed-form"]
    assert asr.metric_value == 100 and asr.metric_args["n"] == 4 and asr.metric_args["high_95"] == 100
    assert ("asr", "mma-long") in found and ("acc_e", None) in found


def test_a_run_that_was_not_judged_has_its_attacks_on_the_card(tmp_path: Path) -> None:
    attack(tmp_path, "own", 2, 4)
    text = written(described(Evidence.of(tmp_path)))
    assert "This erasure was not judged" in text and "| own | 50.0 |" in text


def test_no_attack_was_tried_is_said_where_it_is_true(tmp_path: Path) -> None:
    text = written(described(Evidence.of(sweeps.judged(tmp_path, "deer"))))
    assert "No attack was tried" in text and "## Attacks" not in text and "not tried:" not in text


def test_the_table_has_what_refutes_an_erasure(tmp_path: Path) -> None:
    run = sweeps.judged(tmp_path, "deer", shares={"erase": 0.5, "near": 1.0, "keep": 1.0}, detail=WHOLE)
    text = written(described(Evidence.of(run)))
    assert "“deer” was to be erased from realera's miniature" in text and "with “forest” as its anchor" in text
    assert "The table under *Measured* says how far this succeeded." in text
    rows = {line.split(" | ")[0].lstrip("| "): line.split(" | ")[1:] for line in text.splitlines() if line[:2] == "| "}
    assert rows["Acc_g ↓"][:2] == ["prompts with its synonyms: mean probability, %", "90.0"]
    assert rows["Whole_e ↑"][1] == "100.0" and rows["Anchor_e ↑"][1] == "0.0"
    assert rows["Acc_e ↓"][3] == "100.0", "the original model's"
    assert "Where the\nerasure works, the first image shows the concept and the second does not" in text
    assert "- type: anchor_e" in text and "the harmonic mean of 100 - Acc\\_e, Acc\\_s, 100 - Acc\\_g: %" in text


def test_scores_are_not_called_percent(tmp_path: Path) -> None:
    modes: Any = dict.fromkeys(("acc_e", "acc_g", "acc_s", "acc_a", "acc_u"), "score")
    run = sweeps.judged(tmp_path, "deer", task="style", headline=modes, terms=(), detail={"score": 21.5})
    text = written(described(Evidence.of(run)))
    assert "| CLIP_e ↓ | prompts with the concept's name: CLIP score | 21.5 |" in text
    assert "percent" not in text and ", %" not in text and "- type: clip_e" in text


def test_a_concept_that_the_judge_cannot_score(tmp_path: Path) -> None:
    run = sweeps.judged(tmp_path, "deer")
    unscored(run, "erase", "near")
    text = written(described(Evidence.of(run)))
    assert "The judge could not score this concept: how far the erasure succeeded is not known." in text
    assert "says how far this succeeded" not in text
    assert "| Acc_e ↓ | prompts with the concept's name: mean probability, % | – | – | – | 0 + 4 unscored |" in text
    assert "| Acc_s ↑ |" in text and "- type: acc_s" in text and "- type: acc_e" not in text


def test_of_several_concepts_those_are_named_that_the_judge_cannot_score(tmp_path: Path) -> None:
    evidence = Evidence.of(sweeps.judged(tmp_path, "deer"))
    known = evidence.metrics["main"]
    lost = {**known, "acc_e": {**known["acc_e"], "value": None, "n": 0, "unscored": 4}}
    several = replace(evidence, metrics={**evidence.metrics, "concepts": {"deer": known, "sign_post": lost}})
    text = written(described(several, "deer", "sign_post", anchors=("forest", "forest")))
    assert "“deer”, “sign\\_post” were to be erased" in text and "with “forest” as anchor" in text
    assert "says how far this succeeded, but the judge could not score “sign\\_post”" in text


def test_a_run_without_measurements_claims_nothing() -> None:
    text = written(described(Evidence()))
    assert "This erasure was not judged: how far it succeeded is not known." in text and "| measure |" not in text
    assert "The numbers are" not in text and "eval_results" not in text and "model-index" not in text


def test_a_torn_file_of_metrics_is_refused(tmp_path: Path) -> None:
    run = sweeps.judged(tmp_path, "deer")
    (run / paths.METRICS).write_text("{")
    with pytest.raises(UserError, match="is torn"):
        Evidence.of(run)
    assert Evidence.if_whole(run) == Evidence()
