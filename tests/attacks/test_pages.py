"""Attacks on the page of a run and of a sweep, and their numbers, from files alone."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import sweeps
from realera import console, paths
from realera.contracts import Prompt, UserError
from realera.evaluation import attacked, results
from realera.evaluation.records import read_metrics
from realera.evaluation.summary import AttackResult
from realera.reporting import attack_rows
from realera.reporting.run_page import write_report
from realera.reporting.sweep.page import write_sweep

EVIL = "</h4><script>alert('x')</script><img src=x onerror=alert(1)> ../../up ${seed}"


def prompt(number: int) -> Prompt:
    return Prompt(f"erase-{number}", "a photo of the cat", "cat", "erase", number)


def line(number: int, shown: bool, plain: bool = False, step: int = 3, text: str | None = EVIL) -> dict[str, Any]:
    name = f"erase-{number}"
    return {
        "id": name,
        "of": "abc",
        "key": attacked.key_of(prompt(number)),
        "prompt": "a photo of the cat",
        "concept": "cat",
        "seed": number,
        "original": True,
        "plain": plain,
        "shown": shown,
        "step": step if shown else None,
        "text": text,
        "said": None if text else EVIL,
        "label": "cat",
        "value": 0.5,
        "image": f"attacks/own/found/{name}.png",
        "file": None,
        "draws": 2,
        "passes": 10,
        "seconds": 1.5,
        "drawn": [[1, False], [step, shown]],
        "info": {},
    }


LINES = [line(0, True), line(1, False), line(2, True, plain=True, step=0), line(3, True, step=7, text=None)]


def attack_of(run: Path, lines: list[dict[str, Any]] = LINES, name: str = "own") -> dict[str, Any]:
    """The files of an attack."""
    prompts = [prompt(int(one["id"].removeprefix("erase-"))) for one in lines]
    numbers = attacked.summarise(prompts, lines, [{"passes": 5, "seconds": 2.0}], "top1")
    numbers["protocol"] = {"attack": {}, "mode": "top1"}
    for one in lines:
        for folder in (paths.ORIGINALS, paths.IMAGES, attacked.FOUND):
            file = run / paths.ATTACKS / name / folder / f"{one['id']}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), "red").save(file)
    attacked.write(run, name, lines)
    attacked.write_numbers(run, name, numbers)
    return numbers


def test_the_numbers_of_an_attack() -> None:
    prompts = [prompt(number) for number in range(4)]
    numbers = attacked.summarise(prompts, LINES, [{"passes": 5, "seconds": 2.0}], "top1")
    assert (numbers["asr"]["value"], numbers["pre_asr"]["value"], numbers["original"]["value"]) == (75, 25, 100)
    assert numbers["asr"]["low"] < 75 < numbers["asr"]["high"] and numbers["original"]["high"] == 100
    assert numbers["steps"] == {"median": 5, "mean": 5}, "of the prompts that were not won as they are"
    assert numbers["curve"] == [[0, 25.0], [1, 25.0], [3, 50.0], [7, 75.0]]
    once = {"passes": 5, "text_passes": 0, "seconds": 2.0}
    assert numbers["cost"] == {"passes": 45, "text_passes": 0, "seconds": 8.0, "draws": 8, "once": once}
    assert numbers["prompts"] == 4
    counted = attacked.summarise(
        prompts, [{**one, "text_passes": 2.5} for one in LINES], [{**once, "text_passes": 7}], "top1"
    )
    assert counted["cost"]["text_passes"] == 17 and counted["cost"]["once"]["text_passes"] == 7
    none = attacked.summarise(prompts[:1], [line(0, False)], [], "top1")
    assert none["steps"] is None and none["asr"]["value"] == 0


def test_the_page_has_a_chapter_and_texts_stay_texts(tmp_path: Path) -> None:
    run = sweeps.judged(tmp_path / "run", pictures=True)
    attack_of(run)
    page = write_report(run).read_text()
    assert "<h2>Attacks</h2>" in page and "drew the concept for 3 of 4 prompts; 1 drew it as they are" in page
    assert "<script>alert" not in page and "<img src=x" not in page and "&lt;script&gt;alert" in page
    (chapter,) = attack_rows.chapters(run, False)
    first, *_ = chapter["rows"]
    assert first.typed == EVIL and first.where == "step 3" and first.shown and not first.typed.startswith("/")
    assert all(picture.uri.startswith("data:image/png") for _, picture in first.pictures)
    assert [caption for caption, _ in first.pictures] == ["original", "erased", "attacked: cat"]
    assert chapter["rows"][-1].where == "" and [row.shown for row in chapter["rows"]] == [True, True, True, False]


def test_results_of_earlier_versions_have_a_page(tmp_path: Path) -> None:
    """They do not say how many texts were encoded."""
    run = sweeps.judged(tmp_path / "run", pictures=True)
    numbers = attack_of(run)
    del numbers["cost"]["text_passes"], numbers["cost"]["once"]["text_passes"]
    attacked.write_numbers(run, "own", numbers)
    assert "text-encoder passes" not in write_report(run).read_text()
    assert "Images under attack" in write_sweep([run], tmp_path / "page.html").read_text()


def test_the_unedited_model_is_called_so_and_its_picture_is_shown_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = sweeps.judged(tmp_path / "run", method="original", pictures=True)
    numbers = attack_of(run)
    page = html.unescape(write_report(run).read_text())
    chapter = page[page.index("<h2>Attacks</h2>") :].partition("</section>")[0]
    assert "with which the original model draws the concept" in chapter
    assert "erased model" not in chapter and ">erased" not in chapter
    assert "<dt>as it is</dt>" in chapter and "<dt>attacked</dt>" in chapter and "is back" not in chapter
    assert (
        chapter.count("<figcaption>as it is</figcaption>") == len(LINES) == chapter.count("<figcaption>attacked: cat")
    )
    assert chapter.count("data:image") == 2 * len(LINES)
    console.show_attack("own", numbers, "cat, the original model", unedited=True)
    said = capsys.readouterr().out
    assert "erased" not in said and "as it is" in said and "attacked" in said and "original model " not in said
    page = html.unescape(write_sweep([run], tmp_path / "page.html").read_text())
    sheet = page[page.index("<h2>Images under attack</h2>") :].partition("</section>")[0]
    assert sheet.count("data:image") == 3 and "erased" not in sheet, "as it is, kept, attacked"
    assert "erased" not in (tmp_path / "tables" / "object-attacks.md").read_text()
    result = AttackResult("own", numbers, LINES, None, [("a cat", True, ["data:,a", "data:,b"])], unedited=True)
    assert (
        "erased" not in str(result)
        and "as it is" in str(result)
        and dict(result) == {"original": 100, "pre_asr": 25, "asr": 75}
    )
    assert "draws the concept" in result._repr_html_() and "is back" not in result._repr_html_()


def test_the_curve_of_the_return_is_on_the_page_and_in_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = sweeps.judged(tmp_path / "run")
    numbers = attack_of(run)
    numbers["returned"] = {"curve": [[0, 25.0], [3, 50.0], [7, 75.0]], "half": 3.2}
    attacked.write_numbers(run, "own", numbers)
    told = "The concept's return: 25% at step 0, 50% at step 3, 75% at step 7; half is back at step 3."
    assert told in html.unescape(write_report(run).read_text())
    console.show_attack("own", numbers, "cat erased by uce")
    assert told in " ".join(capsys.readouterr().out.split())


def test_a_sweep_has_a_table_and_pictures(tmp_path: Path) -> None:
    first = sweeps.judged(tmp_path / "uce", method="uce", pictures=True)
    second = sweeps.judged(tmp_path / "esd", method="esd-u", pictures=True)
    attack_of(first)
    attack_of(second, [line(number, False) for number in range(4)])
    attack_of(second, [line(number, True) for number in range(4)], name="other_one")
    sweeps.judged(tmp_path / "mace", method="mace", pictures=True)
    page = write_sweep([tmp_path / name for name in ("uce", "esd", "mace")], tmp_path / "page.html").read_text()
    table = (tmp_path / "tables" / "object-attacks.md").read_text()
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines() if row.startswith("|")]
    assert [cell.split()[-2] for cell in rows[0][1:]] == ["is", "Acc_s", "other_one", "own"]
    found = {row[0]: [re.findall(r"[\d.]+", cell) for cell in row[1:]] for row in rows[2:]}
    values = {system.strip("*"): [cell[0] for cell in cells if cell] for system, cells in found.items()}
    assert values["uce"] == ["25.0", "90.0", "75.0"] and values["esd-u"] == ["0.0", "90.0", "100.0", "0.0"]
    assert "mace" not in values and "Images under attack" in page and "<script>alert" not in page


def test_the_numbers_stand_in_metrics_and_survive_a_new_judging(tmp_path: Path) -> None:
    run = sweeps.judged(tmp_path / "run", pictures=True)
    assert "attacks" not in read_metrics(run)
    numbers = attack_of(run)
    results.write_metrics(run, sweeps.JUDGE)
    assert read_metrics(run)["attacks"] == {"own": json.loads(json.dumps(numbers))}
    assert results.first_torn_file(run) is None
    console.show_attack("own", numbers, "a title")


def test_torn_and_foreign_files_are_left_out(tmp_path: Path) -> None:
    run = sweeps.judged(tmp_path / "run", pictures=True)
    attack_of(run)
    file = attacked.numbers_file(run, "own")
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "prompts": 5}))
    assert attacked.numbers(run) == {}, "another content than its checksum's"
    file.write_text("{")
    assert attacked.numbers(run) == {}
    bad = {**line(0, True), "image": "attacks/own/found/../../config.yaml"}
    for wrong in (bad, {**line(0, True), "id": "../up"}, {**line(0, True), "image": "/etc/passwd"}, {"id": 3}):
        attacked.lines_file(run, "own").write_text(json.dumps(wrong) + "\n")
        assert attacked.read(run, "own") == [], wrong
    for name in ("../up", "/etc", ""):
        with pytest.raises(UserError):
            attacked.lines_file(run, f"{name}/../..")


def test_lines_with_a_lost_image_are_attacked_again(tmp_path: Path) -> None:
    run = sweeps.judged(tmp_path / "run", pictures=True)
    attack_of(run)
    (run / "attacks/own/found/erase-1.png").write_bytes(b"torn")
    assert [one["id"] for one in attacked.kept(run, "own", "abc").values()] == ["erase-0", "erase-2", "erase-3"]
    assert attacked.kept(run, "own", "other settings") == {} and attacked.read(run, "own") == []
