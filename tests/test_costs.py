"""The recorder of what a run costs: its stages, its starts, its file; and true counts of whole runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from realera import costs, paths
from realera.costs import Meter
from realera.files.cache_costs import Cost, ReusedCosts
from realera.system.ranks import Ranks


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The recorder's time, set by hand."""
    hands = SimpleNamespace(now=100.0)
    monkeypatch.setattr(costs.time, "perf_counter", lambda: hands.now)
    return hands


def model() -> Any:
    return SimpleNamespace(passes=0)


def held(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_a_stage_within_a_stage_stops_the_outer_ones_clock(tmp_path: Path, clock: SimpleNamespace) -> None:
    backbone = model()
    meter = Meter(tmp_path / "costs.json")
    meter.watch(backbone, "cpu")
    with meter.stage("train"):
        clock.now, backbone.passes = 102.0, 5
        with meter.stage("latents"):
            clock.now, backbone.passes = 112.0, 405
        clock.now, backbone.passes = 113.0, 406
    clock.now, backbone.passes = 200.0, 1000  # between stages: nobody's
    with meter.stage("draw"):
        clock.now, backbone.passes = 204.0, 1080
    record = held(tmp_path / "costs.json")
    assert record["stages"] == {"latents": 10.0, "train": 3.0, "draw": 4.0}
    assert record["passes"] == {"erase": 406, "draw": 80}
    assert record["format_version"] == 1 and record["starts"] == 1 and record["device"].startswith("cpu, ")


def test_originals_stand_apart_from_what_a_method_costs(tmp_path: Path, clock: SimpleNamespace) -> None:
    for now in (110.0, 115.0):
        backbone = model()
        meter = Meter(tmp_path / "costs.json")
        meter.watch(backbone, "cpu")
        with meter.stage(costs.ORIGINAL_IMAGES):
            clock.now, backbone.passes = now, 40
    record = held(tmp_path / "costs.json")
    assert record["originals"] == {"seconds": 15.0, "passes": 80}
    assert record["stages"] == {} and record["passes"] == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_a_sitting_that_is_interrupted_is_kept_and_the_next_one_added(
    tmp_path: Path, clock: SimpleNamespace, error: type[BaseException]
) -> None:
    file = tmp_path / "costs.json"
    backbone = model()
    with pytest.raises(error), Meter(file) as meter:
        meter.watch(backbone, "cpu")
        with meter.stage("text"):
            clock.now = 101.0
        meter.note(edited_parameters=6)
        meter.begin("train")
        clock.now, backbone.passes = 103.0, 30
        raise error
    assert held(file)["stages"] == {"text": 1.0, "train": 2.0} and held(file)["passes"] == {"erase": 30}
    with Meter(file) as meter:
        meter.watch(backbone, "cpu")
        meter.note(trained_parameters=8)
        with meter.stage("train"):
            clock.now, backbone.passes = 107.0, 70
    record = held(file)
    assert record["stages"] == {"text": 1.0, "train": 6.0} and record["passes"] == {"erase": 70}
    assert record["starts"] == 2 and (record["edited_parameters"], record["trained_parameters"]) == (6, 8)
    assert [name.name for name in tmp_path.iterdir()] == ["costs.json"], "written beside and put in place"


def test_what_is_killed_within_a_stage_has_lost_little(tmp_path: Path) -> None:
    """The file is there, whole, while the stage goes on."""
    file = tmp_path / "costs.json"
    with Meter(file, every=0.01) as meter, meter.stage("train"):
        until = time.monotonic() + 20
        while not (file.is_file() and held(file)["stages"]["train"] > 0.05) and time.monotonic() < until:
            time.sleep(0.005)
        so_far = held(file)
    assert 0.05 < so_far["stages"]["train"] <= held(file)["stages"]["train"]
    assert so_far["starts"] == held(file)["starts"] == 1


@pytest.mark.slow
def test_peaks_are_those_of_each_start_and_the_largest_is_kept(tmp_path: Path) -> None:
    import torch

    file = tmp_path / "costs.json"
    for size in (60_000_000, 1_000):  # bytes; the second sitting is the smaller one
        with Meter(file) as meter:
            if not meter._resets:
                pytest.skip("this system does not let the peak be reset")
            start = costs._host_peak()
            with meter.stage("edit"):
                torch.ones(size, dtype=torch.uint8).sum()
            erasing = held(file)["peak_memory_erasing_mb"]["host"]
            with meter.stage("draw"):
                torch.ones(150_000_000, dtype=torch.uint8).sum()
        record = held(file)
        assert record["peak_memory_mb"]["host"] > start + 140 and record["peak_memory_mb"]["device"] is None
        assert start <= erasing < record["peak_memory_mb"]["host"] - 50
    with Meter(tmp_path / "other.json") as meter:
        with meter.stage("edit"):
            pass
        assert held(tmp_path / "other.json")["peak_memory_mb"]["host"] < record["peak_memory_mb"]["host"] - 100


def test_without_a_file_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Meter() as meter, meter.stage("edit"):
        meter.gather(Ranks())
    assert meter.record()["passes"] == {"erase": 0} and not list(tmp_path.iterdir())


def test_the_passes_of_all_processes_are_summed(tmp_path: Path) -> None:
    class Two(Ranks):
        def gather(self, value: Any) -> list[Any]:
            return [value, {"train": 10, "draw": 4, "originals": 3}]

    backbone = model()
    meter = Meter(tmp_path / "costs.json", processes=2)
    meter.watch(backbone, "cpu")
    for stage in ("train", "draw", "originals"):
        with meter.stage(stage):
            backbone.passes += 100
        meter.gather(Two())
    record = held(tmp_path / "costs.json")
    assert record["passes"] == {"erase": 110, "draw": 104} and record["originals"]["passes"] == 103
    assert record["device"].endswith(", 2 processes")


def entries(*spent: Cost | None) -> ReusedCosts:
    return ReusedCosts({Path(str(i)): one for i, one in enumerate(spent)})


def test_what_was_read_from_the_cache_counts_as_it_cost() -> None:
    meter = Meter()
    meter.reused("latents", entries(Cost(5, 100), Cost(7.5, 200)))
    record = meter.record()
    assert record["shared"] == {"latents": {"seconds": 12.5, "passes": 300}}
    assert not costs.at_least(record)
    meter.reused("latents", entries(Cost(5, 100), None))
    assert meter.record()["shared"] == {"latents": {"seconds": 5, "passes": 100, "unknown": 1}}
    assert costs.at_least(meter.record())


def test_a_run_that_goes_on_is_not_charged_twice_for_its_own_bank(tmp_path: Path, clock: SimpleNamespace) -> None:
    """Killed half-way through its bank of 400 passes, then in its loop: in the end it was 400 and the loop."""
    file, backbone = tmp_path / "costs.json", model()

    def sit(made: int, read: Cost, looped: int) -> None:
        meter = Meter(file)
        meter.watch(backbone, "cpu")
        with meter.stage("latents"):
            clock.now += made / 10
            backbone.passes += made
            if looped:
                meter.reused("latents", entries(read))
        if looped:
            with meter.stage("train"):
                backbone.passes += looped

    sit(made=150, read=Cost(), looped=0)
    sit(made=250, read=Cost(15, 150), looped=20)
    sit(made=0, read=Cost(40, 400), looped=30)
    record = held(file)
    assert record["shared"]["latents"] == {"seconds": 0.0, "passes": 0} and record["passes"]["erase"] == 450
    assert (costs.totals(record)["seconds"], costs.totals(record)["passes"]) == (40.0, 450)


def test_totals_are_of_what_is_known() -> None:
    record = {
        "stages": {"load": 50.0, "text": 1.0, "edit": 2.0, "latents": 3.0, "train": 4.0, "finish": 5.0, "draw": 90.0},
        "passes": {"erase": 10, "draw": 999},
        "passes_per_image": 40,
        "shared": {"latents": {"seconds": 100.0, "passes": 1000}},
        "peak_memory_erasing_mb": {"host": 700.0, "device": None},
    }
    found = costs.totals(record)
    assert found == {"seconds": 115.0, "passes": 1010, "passes_per_image": 40, "memory_mb": 700.0}
    assert costs.totals({**record, "peak_memory_erasing_mb": {"host": 1.0, "device": 2.0}})["memory_mb"] == 2.0
    assert costs.scalars(record)["stage/draw"] == 90.0
    judged_only = {"stages": {"draw": 4.0}, "passes": {"draw": 80}, "passes_per_image": 4}
    assert costs.totals(judged_only) == {"passes_per_image": 4} and costs.totals({}) == {}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 99}'])
def test_a_file_of_another_version_is_no_costs(tmp_path: Path, content: str) -> None:
    (tmp_path / paths.COSTS).write_text(content)
    assert costs.read(tmp_path) == {} and costs.read(tmp_path / "nowhere") == {}
    with Meter(tmp_path / paths.COSTS) as meter, meter.stage("edit"):
        pass
    assert costs.read(tmp_path)["starts"] == 1


def test_another_device_is_named_beside_the_first(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({"format_version": 1, "device": "a slow one", "starts": 1}))
    meter = Meter(file)
    meter.watch(model(), "cpu")
    assert meter.record()["device"].startswith("a slow one; cpu, ")


def test_judging_anew_is_counted_once(tmp_path: Path) -> None:
    (tmp_path / paths.COSTS).write_text(
        json.dumps({"format_version": 1, "stages": {"edit": 1.0, "judge": 9.0}, "starts": 1})
    )
    costs.forget(tmp_path, "judge")
    assert costs.read(tmp_path)["stages"] == {"edit": 1.0}
    costs.forget(tmp_path / "nowhere", "judge")
    assert not (tmp_path / "nowhere").exists()


# --- whole fits on the tiny model ------------------------------------------------------------------------------------


@pytest.fixture
def erase(
    new_backbone: Callable[..., Any], new_pairs: Callable[..., Any], load_method: Callable[..., Any], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """erase("uce") fits the method on a fresh backbone of two sampler steps and returns the record; `to` names the run
    folder."""
    from realera.training.fit import fit

    def go(name: str, *overrides: str, to: str = "run", **more: Any) -> dict[str, Any]:
        backbone = new_backbone()
        pairs = new_pairs(backbone, ("cat", "field"))
        with Meter(tmp_path / to / paths.COSTS) as meter:
            meter.watch(backbone, "cpu")
            settings = {"run_dir": tmp_path / to, "seed": 0, "config": {}, "trainer": {"accelerator": "cpu"}}
            cache = tmp_path / "cache"
            fit(backbone, load_method(name, *overrides), pairs, cache=cache, meter=meter, **settings, **more)
        return costs.read(tmp_path / to)

    return go


IMAGES, STEPS, BATCH = 5, 2, 2  # of the bank, of the sampler, of a step (see conftest.SMALL)
BANK = IMAGES * STEPS * 2  # guided: each step with the prompt and without
LOOP = 2 * BATCH * (1 + 2 + 1 + 2)  # four steps, the even ones on near and beyond at once; student and teacher


@pytest.mark.slow
def test_realera_costs_its_bank_its_loop_and_the_size_of_its_lora(erase: Any, new_backbone: Any) -> None:
    first = erase("realera-text")
    layers = list(new_backbone().text_projections().values())
    assert first["trained_parameters"] == sum(layer.in_features + layer.out_features for layer in layers)  # rank 1
    assert first["edited_parameters"] == sum(layer.weight.numel() for layer in layers)
    assert first["passes"] == {"erase": BANK + LOOP}
    assert first["shared"] == {"latents": {"seconds": 0.0, "passes": 0}}
    assert set(first["stages"]) == {"edit", "latents", "train", "finish"}
    again = erase("realera-text", to="again")
    assert again["passes"] == {"erase": LOOP} and again["shared"]["latents"]["passes"] == BANK
    assert again["shared"]["latents"]["seconds"] > 0
    assert costs.totals(again)["passes"] == costs.totals(first)["passes"]


def test_a_closed_form_costs_no_pass_and_trains_nothing(erase: Any, new_backbone: Any) -> None:
    record = erase("uce")
    assert record["passes"] == {"erase": 0} and record["trained_parameters"] == 0
    assert record["edited_parameters"] > 0 and set(record["stages"]) == {"edit", "finish"}
    nothing = erase("original", to="nothing")
    assert (nothing["edited_parameters"], nothing["trained_parameters"]) == (0, 0)


def test_a_fusion_is_an_edit_too_and_counts_each_weight_once(erase: Any, new_backbone: Any) -> None:
    record = erase("mace-ablation")
    edited = sum(layer.weight.numel() for layer in new_backbone().text_projections().values())
    assert record["edited_parameters"] == edited and record["trained_parameters"] > 0
    assert "finish" in record["stages"]


@pytest.mark.quick(1)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_fit_that_is_stopped_and_resumed_sums_both_starts(
    erase: Any, tmp_path: Path, error: type[BaseException]
) -> None:
    import signal

    from lightning.pytorch.callbacks import Callback

    class StopAt(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                raise error

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(error):
        erase("realera", callbacks=[StopAt()], checkpoint_every=1)
    signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    stopped = costs.read(tmp_path / "run")
    assert stopped["passes"] == {"erase": BANK + LOOP // 2} and stopped["stages"]["train"] > 0
    record = erase("realera")
    assert record["passes"] == {"erase": BANK + LOOP} and record["starts"] == 2
    assert record["shared"]["latents"]["passes"] == 0, "the bank that it finds is its own"
    assert record["stages"]["train"] > stopped["stages"]["train"]


@pytest.mark.slow
def test_a_bank_that_two_parts_ask_for_is_counted_once(erase: Any) -> None:
    """SA's replayed images serve its latents and its Fisher information, which is kept too."""
    first = erase("sa")
    assert first["shared"]["latents"] == {"seconds": 0.0, "passes": 0}
    again = erase("sa", to="again")
    assert costs.totals(again)["passes"] == costs.totals(first)["passes"]
    drawn = (IMAGES + 6) * STEPS * 2  # surrogate and replay
    assert again["shared"]["latents"]["passes"] == drawn + 2 * 3  # and two images at three timesteps
    assert first["passes"]["erase"] - again["passes"]["erase"] == drawn + 2 * 3
