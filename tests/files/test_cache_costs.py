"""Cached files record their cost, and a run that reuses a file gets it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from realera.files import cache_costs
from realera.files.cache_costs import Cached, Cost, cached
from tearing import TEARS, tear


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock that costs are measured with, set by hand."""
    time = SimpleNamespace(now=100.0)
    monkeypatch.setattr(cache_costs.time, "perf_counter", lambda: time.now)
    return time


def model() -> Any:
    return SimpleNamespace(passes=7)


def test_a_reused_file_reports_its_cost(clock: SimpleNamespace) -> None:
    backbone = model()
    entry = Cached(Path("a"), backbone)
    clock.now, backbone.passes = 102.5, 47
    note = entry.made()
    assert note == {"seconds": "2.500", "passes": "40"}
    with cache_costs.collect_costs() as found:
        Cached(Path("a"), backbone).read(note)
        Cached(Path("b"), backbone).read({"seconds": "1.25", "passes": "3", "done": "5"})
    assert found.total() == Cost(3.75, 43) and found.unknown() == 0


def test_texts_are_counted_where_the_backbone_counts_them(clock: SimpleNamespace) -> None:
    backbone: Any = SimpleNamespace(passes=7, text_passes=100)
    entry, began = Cached(Path("a"), backbone), Cost.now(backbone)
    clock.now, backbone.text_passes = 102.0, 130
    note = entry.made()
    assert note == {"seconds": "2.000", "passes": "0", "text_passes": "30"}
    assert Cost.now(backbone) - began == Cost(2.0, 0, 30)
    with cache_costs.collect_costs() as found:
        Cached(Path("a"), backbone).read(note)
        Cached(Path("b"), model()).read({"seconds": "1", "passes": "2"})
    assert found.total() == Cost(3.0, 2, 30)


@pytest.mark.parametrize("how", [*TEARS, "other"])
def test_a_torn_file_is_made_again(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Latents, masks and inverted vectors are cached in this way. other: a valid file without the wanted tensor."""
    file, made = tmp_path / "a.safetensors", []

    def make() -> torch.Tensor:
        made.append(1)
        return torch.arange(2000.0)

    for _ in range(2):
        assert torch.equal(cached(file, "latents", model(), make), torch.arange(2000.0))
    assert len(made) == 1 and not caplog.records
    if how == "other":
        cached(tmp_path / "b.safetensors", "masks", model(), make)
        (tmp_path / "b.safetensors").rename(file)
    else:
        tear(file, how)
    made.clear()
    for _ in range(2):
        assert torch.equal(cached(file, "latents", model(), make), torch.arange(2000.0))
    assert len(made) == 1 and [record.getMessage() for record in caplog.records] == [f"{file} is torn: made again"]


def test_a_file_made_by_this_run_does_not_count_as_reused() -> None:
    with cache_costs.collect_costs() as found:
        note = Cached(Path("a"), model()).made()
        Cached(Path("a"), model()).read(note)
        with cache_costs.collect_costs() as inner:
            Cached(Path("a"), model()).read({"seconds": "9", "passes": "9"})
    assert found.total() == Cost() and list(found.files) == [Path("a")]
    assert inner.total() == Cost(9, 9)


def test_costs_of_a_resumed_file_add_up_and_only_the_first_part_is_reused(clock: SimpleNamespace) -> None:
    backbone = model()
    with cache_costs.collect_costs() as found:
        entry = Cached(Path("a"), backbone)
        entry.read({"seconds": "10", "passes": "100"})
        clock.now, backbone.passes = 101.0, 12
        assert entry.made() == {"seconds": "11.000", "passes": "105"}
        clock.now, backbone.passes = 103.0, 17
        assert entry.made() == {"seconds": "13.000", "passes": "110"}
    assert found.total() == Cost(10, 100)


@pytest.mark.parametrize("metadata", [None, {}, {"done": "3"}])
def test_a_file_without_a_record_has_unknown_cost(metadata: dict[str, str] | None) -> None:
    with cache_costs.collect_costs() as found:
        entry = Cached(Path("a"), model())
        entry.read(metadata)
        assert entry.made() == {}, "nor does its unknown beginning become a known end"
    assert found.total() == Cost() and found.unknown() == 1


def test_outside_of_a_ledger_nothing_is_recorded() -> None:
    Cached(Path("a"), model()).read({"seconds": "1", "passes": "1"})
    with cache_costs.collect_costs() as found:
        pass
    assert not found.files


@pytest.mark.parametrize(("seconds", "passes"), [("x", "1"), ("nan", "1"), ("-1", "1"), ("1", "9" * 5000)])
def test_an_invalid_record_counts_as_unknown(seconds: str, passes: str) -> None:
    with cache_costs.collect_costs() as found:
        Cached(Path("a"), model()).read({"seconds": seconds, "passes": passes})
    assert found.total() == Cost() and found.unknown() == 1
