"""Torn files of a finished run or of the cache are found and made again, and the numbers are the same."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quick import slow_unless
from realera.files import checksums
from tearing import TEARS, copy, leftovers, tear

METHOD = ["concept=airplane", "method.align.steps=3", "method.latents.images=2", "method.latents.batch=1"]
Type = Callable[..., int]
FIT = ("erased.safetensors", "map.safetensors", "neighbours.safetensors", "edit.json", "losses.jsonl")
JUDGED = ("manifest.jsonl", "verdicts/miniature.jsonl", "verdicts/miniature.original.jsonl", "verdicts/miniature.json")
SAME = ("edit.json", "losses.jsonl", "metrics.json", *JUDGED)  # byte for byte; the page and costs.json hold times


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small: list[str]) -> Path:
    """A folder with one finished run under runs/ and the cache it was made with."""
    place = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        _go_to(place, patch)
        assert _type(patch, "train", *METHOD, *small) == 0
    return place


@pytest.fixture
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `finished` that a test may damage."""
    copy(finished, tmp_path / "copy")
    _go_to(tmp_path / "copy", monkeypatch)
    return tmp_path / "copy"


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch, small: list[str]) -> Type:
    """Runs a command in this process; returns its exit status."""
    return lambda door, *words: _type(monkeypatch, door, *words, *(small if door == "train" else []))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The log lines of the commands, which do not reach pytest's handler."""
    logging.getLogger("realera").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("realera").removeHandler(caplog.handler)


def _go_to(place: Path, patch: pytest.MonkeyPatch) -> None:
    patch.chdir(place)
    patch.setenv("REALERA_CACHE", str(place / "cache"))
    patch.setenv("REALERA_STAMP", "stamp")


def _type(patch: pytest.MonkeyPatch, door: str, *words: str) -> int:
    patch.setattr(sys, "argv", [door, *words])
    try:
        import_module(f"realera.{door}").main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def run_in(place: Path) -> Path:
    (run,) = (place / "runs").glob("airplane-*")
    return run


def check_same(place: Path, finished: Path) -> None:
    """Asserts that a run and its cache are the same as before the damage."""
    ours, theirs = run_in(place), run_in(finished)
    for name in SAME:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    for name in ("erased.safetensors", "map.safetensors", "neighbours.safetensors"):
        one, other = load_file(ours / name), load_file(theirs / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    for folder in (Path("images"), Path("originals"), Path("../../cache/images")):
        pictures = sorted(file.relative_to(theirs) for file in (theirs / folder).rglob("*.png"))
        assert pictures == sorted(file.relative_to(ours) for file in (ours / folder).rglob("*.png"))
        assert all((ours / file).read_bytes() == (theirs / file).read_bytes() for file in pictures)
    assert json.loads((ours / "costs.json").read_text())["format_version"] == 1
    assert checksums.page_is_whole(ours / "report.html")
    assert leftovers(place / "runs", place / "cache") == []


def lines(said: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in said.records]


def named(said: pytest.LogCaptureFixture, file: Path) -> list[str]:
    """The log lines that say that a file is torn."""
    return [line for line in lines(said) if f"{file.name} is torn" in line]


# --- everything at once, and each kind alone -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flipped", pytest.param("half", marks=pytest.mark.slow)])
def test_one_command_repairs_everything(
    how: str, place: Path, finished: Path, type_in: Type, said: pytest.LogCaptureFixture
) -> None:
    run = run_in(place)
    torn = [run / name for name in (*FIT, *JUDGED, "metrics.json", "report.html", "costs.json")]
    torn += [next((run / folder).glob("*.png")) for folder in ("images", "originals")]
    torn += list((place / "cache" / "latents").rglob("*.safetensors"))
    for file in torn:
        tear(file, how)
    assert type_in("train", *METHOD) == 0
    check_same(place, finished)
    assert named(said, run / "erased.safetensors")
    for file in torn[-3:]:
        assert len(named(said, file)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("how", TEARS)
@pytest.mark.parametrize("name", [*FIT, *JUDGED, "metrics.json", "report.html"])
def test_the_same_command_repairs(
    name: str, how: str, place: Path, finished: Path, type_in: Type, said: pytest.LogCaptureFixture
) -> None:
    tear(run_in(place) / name, how)
    assert type_in("train", *METHOD) == 0
    check_same(place, finished)
    assert len(named(said, Path(name))) == 1
    said.clear()
    assert type_in("train", *METHOD) == 0
    assert any("is already finished" in line for line in lines(said)), "it is mended once"


@pytest.mark.slow
@pytest.mark.parametrize("how", TEARS)
@pytest.mark.parametrize("name", ["images/*.png", "originals/*.png", *JUDGED, "metrics.json", "report.html"])
def test_evaluate_repairs(name: str, how: str, place: Path, finished: Path, type_in: Type) -> None:
    tear(next(run_in(place).glob(name)), how)
    assert type_in("evaluate", f"run={run_in(place)}") == 0
    check_same(place, finished)


@pytest.mark.slow
@pytest.mark.parametrize("how", TEARS)
def test_torn_costs_start_again(
    how: str, place: Path, finished: Path, type_in: Type, said: pytest.LogCaptureFixture
) -> None:
    """Costs are measured and cannot be recovered; a changed digit cannot be found."""
    tear(run_in(place) / "costs.json", how)
    assert type_in("evaluate", f"run={run_in(place)}") == 0
    check_same(place, finished)
    assert named(said, Path("costs.json")) or how == "flipped"


@pytest.mark.slow
@pytest.mark.parametrize("how", TEARS)
def test_torn_latents_are_generated_again(
    how: str, place: Path, finished: Path, type_in: Type, said: pytest.LogCaptureFixture
) -> None:
    (bank,) = (place / "cache" / "latents").rglob("*.safetensors")
    tear(bank, how)
    (run_in(place) / "erased.safetensors").unlink()
    (run_in(place) / "metrics.json").unlink()
    assert type_in("train", *METHOD) == 0
    check_same(place, finished)
    assert len(named(said, bank)) == 1
    (made,) = (finished / "cache" / "latents").rglob("*.safetensors")
    assert torch.equal(load_file(bank)["latents"], load_file(made)["latents"])


@pytest.mark.slow
@pytest.mark.parametrize("how", [how for how in TEARS if how != "flipped"])
def test_a_torn_config_is_refused_unless_overwritten(
    how: str, place: Path, finished: Path, type_in: Type, capsys: pytest.CaptureFixture[str]
) -> None:
    tear(run_in(place) / "config.yaml", how)
    assert type_in("train", *METHOD) == 2
    assert "overwrite=true" in capsys.readouterr().err
    assert type_in("train", *METHOD, "overwrite=true") == 0
    check_same(place, finished)


# --- images that several runs share ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_torn_image_of_the_cache_is_generated_again_for_every_run(
    place: Path, finished: Path, type_in: Type, said: pytest.LogCaptureFixture
) -> None:
    """The files of the cache and of the runs are hard links to one file."""
    run, other = run_in(place), place / "runs" / "other"
    copy(run, other)
    for file in (other / "originals").iterdir():
        file.unlink()
        file.hardlink_to(run / "originals" / file.name)
    image = next((run / "originals").iterdir())
    assert image.stat().st_nlink == 3
    tear(image, "zeroed")
    content = (run_in(finished) / "originals" / image.name).read_bytes()
    for one in (run, other):
        assert (one / "originals" / image.name).read_bytes() != content
        assert type_in("evaluate", f"run={one}") == 0
        assert (one / "originals" / image.name).read_bytes() == content
    assert image.samefile(other / "originals" / image.name) and image.stat().st_nlink == 3
    assert len({(one / "metrics.json").read_bytes() for one in (run, other, run_in(finished))}) == 1
    assert len([line for line in lines(said) if "is torn" in line]) == 1, "the second run finds it mended"


# --- files that only the run's own command can repair ----------------------------------------------------------------


@pytest.mark.parametrize("how", slow_unless(TEARS, *list(TEARS)[:2]))
def test_torn_weights_are_refused_by_the_commands_that_use_them(
    how: str, place: Path, type_in: Type, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_in(place)
    tear(run / "erased.safetensors", how)
    tear(run / "map.safetensors", how)
    before = sorted(place.rglob("*"))
    for door, *words in (["evaluate"], ["generate", "prompts=[x]"], ["export", "to=lora", "out=out"], ["demo"]):
        assert type_in(door, f"run={run}", *words) == 2
        error = capsys.readouterr().err
        assert "erased.safetensors is torn" in error and "give the command that made the run again" in error
        assert error.count("\n") == 1
    assert sorted(place.rglob("*")) == before


def test_a_torn_map_is_not_exported(place: Path, type_in: Type, capsys: pytest.CaptureFixture[str]) -> None:
    tear(run_in(place) / "map.safetensors", "flipped")
    assert type_in("export", f"run={run_in(place)}", "to=map", "out=out") == 2
    assert "map.safetensors is torn" in capsys.readouterr().err
    assert not Path("out").exists()


# --- deleted files ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "verdicts/*",
        pytest.param("images/*", marks=pytest.mark.slow),
        pytest.param("originals/*", marks=pytest.mark.slow),
        pytest.param("metrics.json", marks=pytest.mark.slow),
        pytest.param("report.html", marks=pytest.mark.slow),
        "manifest.jsonl",
    ],
)
def test_evaluate_makes_deleted_files_again(name: str, place: Path, finished: Path, type_in: Type) -> None:
    for file in run_in(place).glob(name):
        file.unlink()
    if "/" in name:
        (run_in(place) / name.split("/")[0]).rmdir()
    assert type_in("evaluate", f"run={run_in(place)}") == 0
    check_same(place, finished)


@pytest.mark.slow
@pytest.mark.parametrize("how", TEARS)
def test_generate_repairs_its_own_folder(how: str, place: Path, type_in: Type) -> None:
    words = (f"run={run_in(place)}", 'prompts=["a photo of a jet"]', "seeds=[0,1]")
    assert type_in("generate", *words) == 0
    (drawn,) = (run_in(place) / "generated").iterdir()
    before = {file: file.read_bytes() for file in drawn.rglob("*") if file.is_file()}
    tear(drawn / "manifest.jsonl", how)
    for folder in ("images", "originals"):
        tear(next((drawn / folder).iterdir()), how)
    assert type_in("generate", *words) == 0
    assert {file: file.read_bytes() for file in drawn.rglob("*") if file.is_file()} == before
