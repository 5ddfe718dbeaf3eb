"""Forged checkpoints: training starts again if the run itself cannot have written the checkpoint."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from quick import slow_unless
from realera import train
from realera.contracts import UserError
from realera.files import checksums
from realera.training import resuming, saved
from realera.training.fit import fit
from realera.training.schedule import steps_per_concept

STEPS, AT = 6, 4
LATENTS = ("steps=3", "chains=2", "renew=3", "batch=2")
METHOD = (f"align.steps={STEPS}", *(f"latents.{word}" for word in LATENTS))
NAN, INF = float("nan"), float("inf")
Go = Callable[..., Any]


class StopAt(Callback):
    """Ends a run as if it were killed, and records the form of its checkpoint."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == AT + 1:
            self.form = resuming.form_of(trainer, pl_module)
            raise InterruptedError


@pytest.fixture(scope="module")
def go(new_backbone: Go, new_pairs: Go, load_method: Go, tmp_path_factory: pytest.TempPathFactory) -> Go:
    cache = tmp_path_factory.mktemp("cache")

    def run(run_dir: Path, *callbacks: Callback, name: str = "esd-x", words: tuple[str, ...] = METHOD) -> Any:
        backbone = new_backbone()
        given = {"seed": 0, "config": {}, "cache": cache, "trainer": {"accelerator": "cpu"}, "checkpoint_every": AT}
        pairs = new_pairs(backbone, ("cat", "field"), ("ship", "sky"))
        fit(backbone, load_method(name, *words), pairs, run_dir=run_dir, identity="one", callbacks=callbacks, **given)
        return load_file(run_dir / "erased.safetensors")

    return run


@pytest.fixture(scope="module")
def killed(go: Go, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, saved.Form]:
    """The checkpoint of a run that was killed, and its form."""
    folder, stop = tmp_path_factory.mktemp("killed"), StopAt()
    with pytest.raises(InterruptedError):
        go(folder, stop)
    return folder / "fit" / "last.ckpt", stop.form


@pytest.fixture(scope="module")
def uninterrupted(go: Go, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], str]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return go(folder), (folder / "losses.jsonl").read_text()


def change(of: str, value: Any) -> Any:
    """A forgery that replaces the first tensor whose name starts with `of` by value(tensor); None removes it."""

    def forge(tensors: dict[str, Any], said: dict[str, str]) -> None:
        name = next(name for name in sorted(tensors) if name.startswith(of))
        changed = None if value is None else value(tensors.pop(name))
        tensors.pop(name, None)
        if changed is not None:
            tensors[name] = changed

    return forge


def fill(of: str, number: float) -> Any:
    return change(of, lambda tensor: torch.full_like(tensor, number))


def loop(**more: Any) -> Any:
    return lambda tensors, said: said.update(loop=json.dumps({"step": AT, "scale": None, **more}))


def lines(replace: Callable[[list[str]], list[str]]) -> Any:
    def text(tensor: torch.Tensor) -> torch.Tensor:
        found = "\n".join(replace(bytes(tensor.numpy()).decode().split("\n")))
        return torch.frombuffer(bytearray(found.encode("utf-8", "surrogatepass")), dtype=torch.uint8)

    return change("losses", text)


def last(line: str) -> Any:
    return lines(lambda found: [*found[:-1], line])


def no_moments(tensors: dict[str, Any], said: dict[str, str]) -> None:
    for name in [name for name in tensors if name.startswith(("exp_avg", "count"))]:
        del tensors[name]


FORGED: dict[str, Any] = {
    "weight-shape": change("weight.", lambda t: torch.zeros(3, 3)),
    "weight-missing": change("weight.", None),
    "weight-more": lambda tensors, said: tensors.update({"weight.evil": torch.zeros(3)}),
    "weight-int64": change("weight.", lambda t: t.to(torch.int64)),
    "weight-float64": change("weight.", lambda t: t.double()),
    "weight-float8": change("weight.", lambda t: t.to(torch.float8_e4m3fn)),
    "weight-complex": change("weight.", lambda t: t.to(torch.complex64)),
    "weight-nan": fill("weight.", NAN),
    "weight-infinite": fill("weight.", INF),
    "other": lambda tensors, said: tensors.update({"evil": torch.zeros(3)}),
    "moments-missing": no_moments,
    "moment-missing": change("exp_avg_sq.0", None),
    "moment-shape": change("exp_avg.0", lambda t: torch.zeros(3)),
    "moment-nan": fill("exp_avg.0", NAN),
    "moment-negative": fill("exp_avg_sq.0", -1.0),
    "moment-of-nothing": lambda tensors, said: tensors.update({"exp_avg.9999": torch.zeros(3)}),
    "count-negative": fill("count.0", -5.0),
    "count-0": fill("count.0", 0.0),
    "count-half": fill("count.0", 1.5),
    "count-nan": fill("count.0", NAN),
    "count-beyond": fill("count.0", AT + 1.0),
    "count-shape": change("count.0", lambda t: torch.zeros(1)),
    "count-int": change("count.0", lambda t: t.long()),
    **{f"step-{step!r}": loop(step=step) for step in (0, -100, 1000, STEPS, 2**70, 1.5, 4.0, True, "a", None, NAN)},
    "step-1": loop(step=1),
    "step-missing": lambda tensors, said: said.update(loop='{"scale": null}'),
    "step-more": loop(epoch=3),
    "step-deep": lambda tensors, said: said.update(loop="[" * 100_000),
    "step-none": lambda tensors, said: said.pop("loop"),
    "scale": loop(scale=[65536.0, 1]),
    "losses-missing": change("losses", None),
    "losses-floats": change("losses", lambda t: t.float()),
    "losses-large": change("losses", lambda t: torch.zeros((AT << 16) + 1, dtype=torch.uint8)),
    "losses-fewer": lines(lambda found: found[1:]),
    "losses-more": lines(lambda found: [*found, '{"step": 5, "loss": 1.0}']),
    "losses-order": lines(lambda found: found[::-1]),
    "losses-nan": last('{"step": 4, "loss": NaN}'),
    "losses-huge": last('{"step": 4, "loss": 1e999}'),
    "losses-text": last('{"step": 4, "loss": "<script>"}'),
    "losses-nested": last('{"step": 4, "loss": {"a": []}}'),
    "losses-no-loss": last('{"step": 4}'),
    "losses-list": last("[4, 1.0]"),
    "losses-control": last('\x1b[31m{"step": 4, "loss": 1.0}'),
    "losses-other-spelling": last('{"step":4,"loss":1.0}'),
    "losses-true": last('{"step": 4, "loss": true}'),
    "losses-half-letter": last('{"step": 4, "loss": 1.0, "\\ud800": 1.0}'),
    "losses-half-letter-raw": last('{"step": 4, "loss": 1.0, "\ud800": 1.0}'),
    "latents-nan": fill("latents.", NAN),
    "latents-missing": change("latents.", None),
    "latents-shape": change("latents.", lambda t: torch.zeros(2)),
    "latents-size": change("latents.", lambda t: torch.zeros(*t.shape[:-1], 2 * t.shape[-1])),
    "latents-double": change("latents.", lambda t: t.double()),
    "latents-more": lambda tensors, said: tensors.update({"latents.7": torch.zeros(2)}),
    "latents-named": lambda tensors, said: tensors.update({"latents.x": torch.zeros(2)}),
}


def forged(file: Path, forge: Any, to: Path) -> Path:
    """A changed copy of a checkpoint with a correct checksum."""
    tensors, said = checksums.load(file)
    forge(tensors, said)
    to.parent.mkdir(parents=True, exist_ok=True)
    checksums.save(to, tensors, {name: text for name, text in said.items() if name != checksums.KEY})
    return to


@pytest.mark.quick(12)
@pytest.mark.parametrize("name", FORGED)
def test_a_forged_checkpoint_is_refused(name: str, killed: tuple[Path, saved.Form], tmp_path: Path) -> None:
    file, form = killed
    saved.read(file, form, steps_per_concept)
    forged(file, FORGED[name], tmp_path / "last.ckpt")
    with pytest.raises((ValueError, UserError)):
        saved.read(tmp_path / "last.ckpt", form, steps_per_concept)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "name", slow_unless(FORGED, "weight-shape", "weight-nan", "step-1000", "losses-nan", "latents-size", "count-beyond")
)
def test_training_starts_again_if_the_checkpoint_is_forged(
    name: str, go: Go, killed: Any, uninterrupted: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forged(killed[0], FORGED[name], tmp_path / "fit" / "last.ckpt")
    state = go(tmp_path)
    (line,) = [record.getMessage() for record in caplog.records if "starts again" in record.getMessage()]
    assert f"{tmp_path}/fit/last.ckpt cannot be resumed by this run (" in line and "\n" not in line
    assert all(torch.equal(state[key], value) for key, value in uninterrupted[0].items())
    assert (tmp_path / "losses.jsonl").read_text() == uninterrupted[1]


def test_a_valid_checkpoint_is_resumed(
    go: Go, killed: Any, uninterrupted: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forged(killed[0], lambda tensors, said: None, tmp_path / "fit" / "last.ckpt")
    state = go(tmp_path)
    assert "starts again" not in caplog.text
    assert all(torch.equal(state[key], value) for key, value in uninterrupted[0].items())
    assert (tmp_path / "losses.jsonl").read_text() == uninterrupted[1]


def test_a_finished_loop_restores_the_losses(go: Go, tmp_path: Path) -> None:
    """Training does not start again, and the file is restored even if it was changed in the meantime."""

    class Killed(Callback):
        def on_fit_end(self, *_: Any) -> None:
            raise InterruptedError

    words = tuple(word.replace(f"={STEPS}", f"={AT}") for word in METHOD)
    with pytest.raises(InterruptedError):
        go(tmp_path, Killed(), words=words)
    text = (tmp_path / "losses.jsonl").read_text()
    (tmp_path / "losses.jsonl").write_text("x")
    go(tmp_path, words=words)
    assert (tmp_path / "losses.jsonl").read_text() == text and len(text.splitlines()) == AT


@pytest.mark.parametrize("scale", [[65536.0, 3], [1024.0, 0]])
def test_the_loss_scale_is_checked(scale: Any, killed: tuple[Path, saved.Form], tmp_path: Path) -> None:
    file, plain = killed
    form = saved.Form(plain.steps, plain.weights, plain.trained, plain.concepts, plain.latents, (65536.0, 2000))
    assert saved.read(forged(file, loop(scale=scale), tmp_path / "a"), form, steps_per_concept).scale == tuple(scale)
    others: list[Any] = [None, [1e9, 0], [NAN, 0], [0.0, 0], [-1.0, 0], [65536.0, -1], [65536.0, 2000], [65536.0], "x"]
    for other in others:
        with pytest.raises(ValueError, match=r"scale|precision"):
            saved.read(forged(file, loop(scale=other), tmp_path / "a"), form, steps_per_concept)


def linked(file: Path) -> None:
    file.rename(file.parent.parent / "outside")
    file.symlink_to(file.parent.parent / "outside")


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def a_linked_folder(file: Path) -> None:
    file.parent.rename(file.parent.parent / "elsewhere")
    file.parent.symlink_to(file.parent.parent / "elsewhere")


def a_file_for_the_folder(file: Path) -> None:
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("x")


def lightning_checkpoint(file: Path) -> None:
    (file.parent.parent / "hpc_ckpt_1.ckpt").write_text("x")


ODD = [linked, a_folder, a_pipe, a_linked_folder, a_file_for_the_folder, lightning_checkpoint]


@pytest.mark.parametrize("odd", ODD)
def test_odd_checkpoint_files_are_refused_at_the_start(odd: Any, go: Go, killed: Any, tmp_path: Path) -> None:
    odd(forged(killed[0], lambda tensors, said: None, tmp_path / "fit" / "last.ckpt"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"remove it\.$"):
        go(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


# --- as typed --------------------------------------------------------------------------------------------------------

TYPED = ["concept=airplane", "method=esd-x", "evaluate=false", "trainer.checkpoint_every=4", "run_dir=run"]
TYPED += [f"method.{word}" for word in METHOD]


@pytest.fixture
def typed(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Runs the train command in a folder where it was killed after its fourth step; returns its exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["train", *TYPED, *small])

    def command() -> int:
        try:
            train.main()
        except SystemExit as end:
            return int(str(end.code or 0))
        return 0

    with monkeypatch.context() as patch:
        patch.setattr("realera.training.module.ErasureModule.on_train_end", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command()
    return command


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weight-float64", "moments-missing", "step-1000", "losses-control", "latents-shape"])
def test_the_command_trains_again_if_the_checkpoint_is_forged(
    name: str, typed: Callable[[], int], tmp_path: Path
) -> None:
    file = tmp_path / "run" / "fit" / "last.ckpt"
    forged(file, FORGED[name], file)
    assert typed() == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    assert steps == [*range(1, STEPS + 1)] and not file.exists()


@pytest.mark.slow
@pytest.mark.parametrize("odd", ODD)
def test_the_command_refuses_in_one_sentence(
    odd: Any, typed: Callable[[], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd(tmp_path / "run" / "fit" / "last.ckpt")
    capsys.readouterr()
    assert typed() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "remove it." in error
