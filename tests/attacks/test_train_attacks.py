"""train attacks=[...]: attacks on a run that has just been judged, or that was finished before."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from realera import paths
from realera.contracts import UserError
from realera.evaluation import attacked
from realera.evaluation.records import read_metrics
from realera.runs import asked_attacks, attacking, folders, steps

TWO = '[random,"closed-form limit=1 attack.together=1"]'
Type = Callable[..., int]


@pytest.fixture
def type_in(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Type:
    """Runs a command in this process and returns its exit status. train gets the tiny model's words."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("REALERA_STAMP", "stamp")

    def run(name: str, *words: str) -> int:
        monkeypatch.setattr(sys, "argv", [name, *words, *(small if name == "train" else [])])
        try:
            import_module(f"realera.{name}").main()
        except SystemExit as left:
            return int(left.code or 0)
        return 0

    return run


def without_times(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: without_times(value) for key, value in node.items() if key != "seconds"}
    return node


def results(run: Path, name: str) -> tuple[Any, Any, dict[str, bytes]]:
    """Numbers, lines and images of an attack, without times."""
    images = sorted((run / "attacks" / name).rglob("*.png"))
    return (
        without_times(attacked.numbers(run)[name]),
        [without_times(line) for line in attacked.read(run, name)],
        {str(file.relative_to(run)): file.read_bytes() for file in images},
    )


@pytest.mark.parametrize("method", ["uce", "original", "esd-u", "mace"])
@pytest.mark.slow
def test_train_and_the_attack_command_have_equal_results(method: str, type_in: Type, tmp_path: Path) -> None:
    words = ["train", "concept=airplane", f"method={method}"]
    few = [] if method in ("uce", "original") else ["method.align.steps=1"]
    few += ["method.latents.images=2"] if method == "mace" else []
    assert type_in(*words, *few, "run_dir=one", f"attacks={TWO}") == 0
    assert type_in(*words, *few, "run_dir=two") == 0
    assert type_in("attack", "run=two", "attack=random") == 0
    assert type_in("attack", "run=two", "attack=closed-form", "limit=1", "attack.together=1") == 0
    one, two = tmp_path / "one", tmp_path / "two"
    for name in ("random", "closed-form"):
        assert results(one, name) == results(two, name)
    metrics = read_metrics(one)
    assert metrics["attacks"] == attacked.numbers(one) and metrics["attacks"].keys() == {"random", "closed-form"}
    assert without_times(metrics["attacks"]) == without_times(read_metrics(two)["attacks"])
    assert "<h2>Attacks</h2>" in (one / paths.REPORT).read_text()
    assert "attacks" not in folders.read_config(one), "they are no part of the run"
    spent = [json.loads((run / paths.COSTS).read_text())["passes"] for run in (one, two)]
    if method == "mace":  # the second run takes its training images from the first one's cache
        assert spent[0].pop("erase") > spent[1].pop("erase")
    assert spent[0] == spent[1], "the attacks' passes are not the erasure's"


@pytest.mark.slow
def test_a_later_command_adds_the_missing_attacks_and_repeats_none(
    type_in: Type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "concept=airplane", "method=uce"]
    assert type_in(*words) == 0
    (run,) = (tmp_path / "runs").glob("airplane-uce-mini-*")
    weights, costs = (run / paths.ERASED).read_bytes(), (run / paths.COSTS).read_text()

    carry_out = attacking.carry_out

    def interrupted(*given: Any) -> Any:
        if given[-1].settings.name == "closed-form":
            raise KeyboardInterrupt
        return carry_out(*given)

    with monkeypatch.context() as changed:
        changed.setattr(attacking, "carry_out", interrupted)
        assert type_in(*words, f"attacks={TWO}") != 0
    assert read_metrics(run)["attacks"].keys() == {"random"}

    done: list[str] = []

    def noted(*given: Any) -> Any:
        done.append(given[-1].settings.name)
        return carry_out(*given)

    capsys.readouterr()
    assert type_in(*words, f"attacks={TWO}", "dry_run=true") == 0
    planned = capsys.readouterr().out
    assert "1 finished" not in planned and "prompts to attack" in planned
    monkeypatch.setattr(attacking, "carry_out", noted)
    assert type_in(*words, f"attacks={TWO}") == 0
    assert done == ["closed-form"] and read_metrics(run)["attacks"].keys() == {"random", "closed-form"}
    assert list((tmp_path / "runs").glob("airplane-*")) == [run]
    assert (run / paths.ERASED).read_bytes() == weights and (run / paths.COSTS).read_text() == costs

    with monkeypatch.context() as changed:
        changed.setattr(steps, "load_backbone", None)
        assert type_in(*words, f"attacks={TWO}") == 0, "all are there: no model is loaded"
        assert type_in(*words) == 0, "and the run keeps them"
    assert done == ["closed-form"]
    capsys.readouterr()
    assert type_in(*words, f"attacks={TWO}", "dry_run=true") == 0
    planned = capsys.readouterr().out
    assert "1 (1 finished)" in planned and "to attack" not in planned
    assert type_in(*words, 'attacks=["random attack_seed=1"]') == 0
    assert done == ["closed-form", "random"], "another seed is another attack"


@pytest.mark.slow
def test_a_sweep_counts_and_carries_out_attacks(
    type_in: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "-m", "concept=airplane", "method=original,uce", "attacks=[random]"]
    assert type_in(*words) == 0
    plan = json.loads((tmp_path / "runs/sweeps/stamp/plan.json").read_text())
    images = 2 * 2  # prompts of two cells; each is drawn by the original, by the system, and under attack
    assert plan["attacked"] == images and plan["passes_of_attacks"] == images * 3 * 4 and plan["finished"] == 0
    table = (tmp_path / "runs/sweeps/stamp/tables/object-attacks.md").read_text()
    assert "random" in table and "uce" in table and "original" in table
    assert type_in(*words, "dry_run=true") == 0
    assert "2 finished" in capsys.readouterr().out
    assert type_in("train", "-m", "concept=airplane", "method=original,uce", f"attacks={TWO}", "dry_run=true") == 0
    assert "2 finished" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_sweep_of_attacks_has_one_plan(type_in: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run in ("one", "two"):
        assert type_in("train", "concept=airplane", "method=uce", f"run_dir={run}") == 0
    texts = ["attack.population=4", "attack.generations=2"]
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert type_in("attack", "-m", "run=one,two", "attack=ring-a-bell", "limit=1", *texts, "dry_run=true") == 0
    said = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in said.splitlines() if "│" in line]
    assert [row[:5] for row in rows if row[0] in ("one", "two")] == [
        [run, "ring-a-bell", "1", str(3 * 4), "6"] for run in ("one", "two")
    ]
    (total,) = (row for row in rows if row[0] == "total")
    assert total[2:5] == ["2", str(2 * 3 * 4), "6"], "the search on texts is made once"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    words = ["attack", "-m", "run=one,two", "attack=random,closed-form", "limit=1"]
    assert type_in(*words) == 0
    printed = capsys.readouterr().out
    assert printed.count("planned") == 1 and "attack random: 1 prompt" not in printed, "no other plans"
    assert printed.count("1 prompt, ") == 4, "the results of each job"
    plan = json.loads((tmp_path / "runs/sweeps/stamp/plan.json").read_text())
    assert [(row["run"], row["attack"], row["prompts"]) for row in plan["attacks"]] == [
        (run, attack, 1) for run in ("one", "two") for attack in ("random", "closed-form")
    ]
    assert plan["passes_of_attacks"] == sum(row["passes"] for row in plan["attacks"]) and plan["hours"] > 0
    assert type_in("attack", "-m", "run=one", "attack=random,closed-form,mma", "limit=1", "dry_run=true") == 0
    printed = capsys.readouterr().out
    assert printed.count("finished") == 2 and "mma" in printed
    assert type_in("attack", "-m", "run=one", "attack=mma,mma", "limit=1", "dry_run=true") == 0
    (sum_of_both,) = (line for line in capsys.readouterr().out.splitlines() if "total" in line)
    assert sum_of_both.split("│")[3].strip() == "1", "an attack that is typed twice is carried out once"
    assert type_in("attack", "run=one", "attack=random", "limit=1", "dry_run=true") == 0
    assert "attack random: 1 prompt, at most" in " ".join(capsys.readouterr().out.split()), "a single one"

    for more, sentence in (
        (["attack=random", "attack_seed=0,1"], "several jobs would attack one with different settings under the name"),
        (["attack=random", "split=keep,unseen"], "refused (1): the task has no prompts of the split keep"),
    ):
        assert type_in("attack", "-m", "run=one", *more, "limit=1", "dry_run=true") == 2
        told = capsys.readouterr()
        assert sentence in " ".join((told.out + told.err).split())


@pytest.mark.quick(4)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["attacks=[nothing]"], "in attacks, 'nothing': .*nothing"),
        (['attacks=["random limit=0"]'], "in attacks, 'random limit=0': limit=0 is not valid"),
        (['attacks=["inversion attack.step=3"]'], "in attacks, .*attack=inversion has no setting 'attack.step'"),
        (['attacks=["random concept=cat"]'], "concept is not a setting of an attack"),
        (['attacks=["limit=3 random"]'], "does not begin with an attack's name"),
        (['attacks=["random \'"]'], "cannot be read"),
        (['attacks=[random,"random limit=3"]'], "two of the attacks are named random"),
        (["attacks=[random]", "evaluate=false"], "attacks need the run's judge"),
        (["attacks=[5]"], "attacks"),
        (["attacks=[random limit=3]"], "put an attack with settings into quotes"),
        (['attacks=["random split=keep"]'], "no prompts of the split keep"),
        (["attacks=[prompts]"], "csv"),
    ],
)
def test_wrong_attacks_are_one_sentence_before_any_work(
    words: list[str], said: str, type_in: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert type_in("train", "concept=airplane", "method=uce", "run_dir=run", *words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(said, errors[0]), errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_attacks_of_a_folder_of_one_s_own_are_found(type_in: Type, tmp_path: Path) -> None:
    own = tmp_path / "mine" / "attack" / "shout.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("_target_: realera.attacks.random.RandomPrompt\nname: shout\ntries: 1\ntogether: 2\n")
    words = ["concept=airplane", "method=uce", "run_dir=run", 'attacks=["shout limit=1"]']
    assert type_in("train", "--config-dir", "mine", *words) == 0
    assert attacked.numbers(tmp_path / "run").keys() == {"shout"}


def test_the_python_interface_refuses_the_list() -> None:
    from realera import api

    with pytest.raises(UserError, match=r"realera\.attack"):
        api._composed(["concept=airplane", "backbone=mini", "attacks=[random]"])
    assert "attacks" not in api._composed(["concept=airplane", "backbone=mini"])


def test_settings_follow_the_run_s_backbone() -> None:
    from hydra import compose, initialize_config_dir

    from realera.settings import composition, resolvers

    resolvers.register_resolvers()
    with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
        found = {}
        for backbone in ("mini", "sd14"):
            words = ["concept=airplane", f"backbone={backbone}", "attacks=[inversion]"]
            (found[backbone],) = asked_attacks.of_training(composition.plain(compose("train", words)))
    assert (found["mini"].limit, found["sd14"].limit) == (20, 50)
    assert (found["mini"].settings.node["steps"], found["sd14"].settings.node["steps"]) == (250, 1000)


def test_searches_on_texts_are_planned_once_for_all_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from hydra import compose, initialize_config_dir

    from realera import console
    from realera.runs import estimate
    from realera.runs.folders import Run
    from realera.runs.session import Session
    from realera.settings import composition, resolvers

    resolvers.register_resolvers()
    cells = []
    with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
        for method in ("uce", "esd-x"):
            words = ["concept=airplane", f"method={method}", "backbone=mini", "attacks=[ring-a-bell,mma,random]"]
            config = composition.plain(compose("train", words))
            task, attacks = composition.build_task(config), asked_attacks.of_training(config)
            cells.append(estimate.work(config, task, attacks=attacks))
        another = {**config, "attacks": ["mma attack_seed=1"]}
        cells.append(estimate.work(another, task, attacks=asked_attacks.of_training(another)))
    bell, mma = 20 * (100 + 99 * 50 * (0.25 + 2 * 0.5)), 20 * 60 * (3 + 100)
    assert sum(cells[0].texts.values()) == bell + mma and cells[0].texts == cells[1].texts
    plans = [estimate.summed(cells[:count]) for count in (1, 2, 3)]
    assert [plan.text_passes_of_attacks for plan in plans] == [bell + mma, bell + mma, bell + 2 * mma]
    assert all(plan.hours for plan in plans) and "a pass of the text encoder" in plans[0].basis
    without = estimate.summed([replace(cells[0], texts={})])
    seconds = (bell + mma) * estimate.TEXT_PASS["mini", "cpu"].seconds
    assert plans[0].hours - without.hours == pytest.approx(seconds / 3600, abs=0.011)
    unknown = estimate.summed([replace(cells[0], text_rate=None)])
    assert unknown.hours is None and unknown.text_passes_of_attacks == bell + mma
    console.show_plan(asdict(plans[0]))
    assert f"{bell + mma:,.0f}" in capsys.readouterr().out

    session = Session(Run(Path("run"), config))
    plan, control = (attacking.plan(session, task, one) for one in (attacks[0], attacks[2]))
    assert (plan.prompts, plan.text_passes, control.text_passes) == (20, bell, 0)
    assert plan.hours is not None and control.hours is not None
    seconds = bell * estimate.TEXT_PASS["mini", "cpu"].seconds
    assert plan.hours - control.hours == pytest.approx(seconds / 3600, abs=0.011)
    for one in (plan, control):
        console.show_attack_plan(one, "named")
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("text-encoder passes") == 1 and f"at most {bell:,.0f} text-encoder passes" in said


def test_a_plan_for_a_large_model_names_its_memory_and_download(
    type_in: Type, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run=original", "concept=airplane", "backbone=flux-dev", "trainer.accelerator=gpu", "limit=1"]
    assert type_in("attack", *words, "logger=none", "dry_run=true") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "memory, computed and not measured: " in said and "download: about 34 GB" in said
