"""One job, one GPU: workers spread over the devices, evenly where there are more of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from realera.system import devices


def workers(count: int, known: list[str], place: Path, **environ: str) -> list[str | None]:
    """The devices that `count` processes at the same time would take; each has its own environment and lock."""
    held: list[list[IO[bytes]]] = [[] for _ in range(count)]
    return [devices.take(known, None, dict(environ), place, own) for own in held]


def test_workers_spread_over_the_devices(tmp_path: Path) -> None:
    assert workers(3, ["0", "1", "2"], tmp_path / "a") == ["0", "1", "2"]
    assert sorted(map(str, workers(5, ["4", "GPU-b/1"], tmp_path / "b"))) == ["4", "4", "4", "GPU-b/1", "GPU-b/1"]


def test_a_device_is_free_again_when_its_worker_has_ended(tmp_path: Path) -> None:
    held: list[IO[bytes]] = []
    environ: dict[str, str] = {}
    assert devices.take(["0", "1"], None, environ, tmp_path, held) == "0" and environ == {devices.VISIBLE: "0"}
    assert devices.take(["0", "1"], None, environ, tmp_path, held) is None  # the next job of the same worker
    held.pop().close()
    assert devices.take(["0", "1"], None, {}, tmp_path, []) == "0"


@pytest.mark.parametrize(
    ("seen", "assigned", "taken"),
    [
        (None, None, "0"),  # not assigned
        ("0,1", "0,1", "0"),  # the same as when the sweep was started
        (None, "", "0"),  # ray hides devices that were not requested
        (None, "1", None),  # a scheduler has chosen
        ("0,1", "3", None),
    ],
)
def test_a_scheduler_s_device_is_kept(
    seen: str | None, assigned: str | None, taken: str | None, tmp_path: Path
) -> None:
    environ = {} if assigned is None else {devices.VISIBLE: assigned}
    assert devices.take(["0", "1"], seen, environ, tmp_path, []) == taken
    assert environ.get(devices.VISIBLE) == (taken or assigned)


@pytest.mark.parametrize("hidden", ["", " ", "-1", "-1,0", " -1 "])
def test_hidden_devices_do_not_count(hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def driver(name: str) -> SimpleNamespace:
        def count(found: Any) -> int:
            found._obj.value = 4
            return 0

        return SimpleNamespace(cuInit=lambda flags: 0, cuDeviceGetCount=count)

    monkeypatch.setattr(devices.ctypes, "CDLL", driver)
    monkeypatch.delenv(devices.VISIBLE, raising=False)
    assert devices.number() == 4 and devices.visible() == ["0", "1", "2", "3"]
    monkeypatch.setenv(devices.VISIBLE, hidden)
    assert devices.number() == 0 and devices.visible() == []
    monkeypatch.setenv(devices.VISIBLE, "2,-1,3")
    assert devices.visible() == ["2"], "as CUDA reads it"


def test_without_devices_none_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.take([], None, {}, tmp_path / "x", []) is None and not (tmp_path / "x").exists()
    monkeypatch.setenv(devices.VISIBLE, "2, 3")
    assert devices.visible() == ["2", "3"]
    monkeypatch.delenv(devices.VISIBLE)
    monkeypatch.setattr(devices, "number", lambda: 2)
    assert devices.visible() == ["0", "1"]
