"""Whole runs: killed, resumed, refused, spread over processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from realera.contracts import Method, Pair, UserError
from realera.training import saved
from realera.training.fit import fit
from realera.training.resuming import Checkpoints
from realera.training.saved import last_good
from tearing import TEARS, tear

MOSTLY_SLOW = ["zeroed", *(pytest.param(how, marks=pytest.mark.slow) for how in TEARS if how != "zeroed")]
SCRIPT = """
import os, signal, sys
from pathlib import Path
from lightning.pytorch.callbacks import Callback
from realera.backbones.unet import UNetBackbone
from realera.contracts import Concept, LoraSpec, Method, NamedPrompt, Pair, Sampler
from realera.methods.latents import AnchorBank
from realera.methods.realera import ClosedForm, Mining, NoiseAlignment
from realera.training.fit import fit

folder, run, cache = map(Path, sys.argv[1:4])
kill_at, devices = map(int, sys.argv[4:])

class Kill(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

class RecordSteps(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        with (run / f"rank{trainer.global_rank}.txt").open("a") as file:
            weights = sum(float(p.double().sum()) for p in module.parameters() if p.requires_grad)
            file.write(f"{float(outputs['loss'])!r} {weights!r}\\n")

backbone = UNetBackbone(name="mini", pretrained=folder, sampler=Sampler("ddim", 2, 7.5, 32, 32))
states = [backbone.encode([NamedPrompt.of("a photo of the {}", word)]) for word in ("cat", "field")]
align = NoiseAlignment(steps=8, lr=1e-2, lora=LoraSpec())
method = Method("realera", Mining(m=1, n=1), ClosedForm(), AnchorBank(4, 2, 2), align)
more = {"strategy": "ddp"} if devices > 1 else {}
fit(backbone, method, [Pair(Concept("cat", "field"), *states)], run_dir=run, seed=0, config={}, cache=cache,
    trainer={"accelerator": "cpu", "devices": devices, **more}, checkpoint_every=3, callbacks=[Kill(), RecordSteps()])
"""


def launch(script: Path, *arguments: Any) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode not in (0, -signal.SIGKILL):
        raise AssertionError(done.stderr[-3000:])
    return done.returncode


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    return file


@pytest.mark.slow
def test_a_killed_process_resumes_bit_for_bit(script: Path, tiny_sd: Path, tmp_path: Path) -> None:
    """kill -9 at step 5, the last checkpoint at step 3; the killed run has cached its latents."""
    straight, killed, cache = tmp_path / "straight", tmp_path / "killed", tmp_path / "cache"
    assert launch(script, tiny_sd, killed, cache, 5, 1) == -signal.SIGKILL
    assert (killed / "fit" / "last.ckpt").is_file() and not (killed / "erased.safetensors").exists()
    assert launch(script, tiny_sd, killed, cache, -1, 1) == 0
    assert launch(script, tiny_sd, straight, tmp_path / "other", -1, 1) == 0
    first, second = (load_file(folder / "erased.safetensors") for folder in (straight, killed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (straight / "losses.jsonl").read_text() == (killed / "losses.jsonl").read_text()
    assert len((killed / "rank0.txt").read_text().splitlines()) == 4 + 5  # steps 1 to 4 and killed in 5; 4 to 8


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(script: Path, tiny_sd: Path, tmp_path: Path) -> None:
    """Each computes half a batch; both are killed in step 5 and resume from the first one's checkpoint."""
    one, two, cache = tmp_path / "one", tmp_path / "two", tmp_path / "cache"
    assert launch(script, tiny_sd, one, cache, -1, 1) == 0
    assert launch(script, tiny_sd, two, cache, 5, 2) == -signal.SIGKILL
    assert launch(script, tiny_sd, two, cache, -1, 2) == 0
    first, second = (load_file(folder / "erased.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    for name, weights in first.items():  # AdamW's first steps are lr * sign(g): where g is nearly 0, rounding shows
        assert torch.allclose(weights, second[name], rtol=1e-3, atol=2e-4), name
    lines = [[json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()] for run in (one, two)]
    assert [line["step"] for line in lines[1]] == [*range(1, 9)]
    for straight, shared in zip(*lines):
        assert shared == pytest.approx(straight, rel=1e-4)
    ranks = [(two / f"rank{rank}.txt").read_text().split() for rank in (0, 1)]
    assert ranks[0][0] != ranks[1][0]  # each saw another half
    assert ranks[0][1::2] == ranks[1][1::2]  # and keeps the same adapter


@pytest.fixture
def go(new_backbone: Callable[..., Any], new_pairs: Callable[..., list[Pair]], tmp_path: Path) -> Callable[..., Any]:
    def run(method: Method, **settings: Any) -> Any:
        backbone = new_backbone()
        fit(
            backbone,
            method,
            new_pairs(backbone, ("cat", "field")),
            run_dir=tmp_path / "run",
            **{"seed": 0, "config": {}, "cache": tmp_path / "cache", "trainer": {"accelerator": "cpu"}, **settings},
        )
        return backbone

    return run


def record_steps(began: list[int]) -> Any:
    """A callback that records the number of the last step before each step."""
    from lightning.pytorch.callbacks import Callback

    class RecordSteps(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            began.append(trainer.global_step)

    return RecordSteps()


def stop_at(step: int, error: BaseException) -> Any:
    from lightning.pytorch.callbacks import Callback

    class StopAt(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == step:
                raise error

    return StopAt()


def test_ctrl_c_raises_keyboard_interrupt(
    go: Callable[..., Any], load_method: Callable[..., Any], tmp_path: Path
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        go(load_method("realera"), callbacks=[stop_at(2, KeyboardInterrupt())])
    signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    assert not (tmp_path / "run" / "erased.safetensors").exists()


@pytest.mark.parametrize("how", TEARS)
@pytest.mark.parametrize("name", ["fit/last.ckpt", "losses.jsonl", "edit.json", "map.safetensors"])
@pytest.mark.slow
def test_files_torn_before_resuming_do_not_change_the_result(
    name: str, how: str, go: Callable[..., Any], load_method: Callable[..., Any], tmp_path: Path
) -> None:
    """With a torn checkpoint training starts again; other files are written again, the losses from the checkpoint."""
    with pytest.raises(RuntimeError, match="stop"):
        go(load_method("realera"), callbacks=[stop_at(3, RuntimeError("stop"))], checkpoint_every=2)
    files = ("losses.jsonl", "edit.json", "map.safetensors", "neighbours.safetensors", "erased.safetensors")
    tear(tmp_path / "run" / name, how)
    began: list[int] = []
    go(load_method("realera"), callbacks=[record_steps(began)])
    assert began[0] == (0 if name == "fit/last.ckpt" else 2)
    found = {file: (tmp_path / "run" / file).read_bytes() for file in files}
    (tmp_path / "run" / "erased.safetensors").unlink()
    go(load_method("realera"))
    assert found == {file: (tmp_path / "run" / file).read_bytes() for file in files}


def test_the_checkpoint_is_deleted_after_the_weights_are_saved(
    go: Callable[..., Any], load_method: Callable[..., Any], tmp_path: Path
) -> None:
    """It is kept if the process is killed before the weights are saved."""
    go(load_method("realera"))
    (tmp_path / "run" / "fit").mkdir()
    (tmp_path / "run" / "fit" / "last.ckpt").write_bytes(b"of the killed one")
    go(load_method("realera"))
    assert not (tmp_path / "run" / "fit").exists()


@pytest.mark.slow
def test_a_checkpoint_with_a_flipped_bit_is_not_used(
    go: Callable[..., Any], load_method: Callable[..., Any], tmp_path: Path
) -> None:
    """For bits in all parts of the file."""
    with pytest.raises(RuntimeError, match="stop"):
        go(load_method("realera"), callbacks=[stop_at(3, RuntimeError("stop"))], checkpoint_every=2, identity="one")
    last = tmp_path / "run" / "fit" / "last.ckpt"
    content, chance, passed = last.read_bytes(), random.Random(0), 0
    whole = load_file(last)
    for _ in range(200):
        at = chance.randrange(len(content))
        last.write_bytes(content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :])
        if last_good(last.parents[1], "one"):
            passed += 1
            found = load_file(last)
            assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert passed < 20


@pytest.mark.slow
def test_files_of_another_run_are_refused(
    go: Callable[..., Any], load_method: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        go(load_method("realera"), callbacks=[stop_at(3, RuntimeError("stop"))], checkpoint_every=1, identity="one")
    with pytest.raises(UserError, match=r"last\.ckpt belongs to a run with other settings"):
        go(load_method("realera"), identity="two")
    go(load_method("realera"), identity="one")
    with pytest.raises(UserError, match=r"erased\.safetensors belongs to a run with other settings"):
        go(load_method("realera"), identity="two")


@pytest.mark.parametrize(
    ("trainer", "says"),
    [
        ({"max_steps": 3}, "use method.align.steps"),
        ({"accumulate_grad_batches": 2}, "use method.latents.batch"),
        ({"fast_dev_run": True}, "use method.align.steps"),
        ({"limit_train_batches": 0}, "use method.align.steps"),
        ({"precision": "bf16-true"}, "choose one of 32-true, bf16-mixed"),
        ({"accelerator": "abacus"}, "try trainer=default"),
        ({"colour": "red"}, "try trainer=default"),
    ],
)
def test_bad_trainer_settings_are_refused(trainer: dict[str, Any], says: str, go: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=says):
        go(Method("original"), trainer=trainer)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["esd-u", "sa", "fmn", "realera"])
def test_a_checkpoint_contains_only_trained_weights(
    name: str, go: Callable[..., Any], load_method: Callable[..., Any], tmp_path: Path
) -> None:
    from lightning.pytorch.callbacks import Callback

    trained: dict[str, int] = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            trained.update({n: p.numel() for n, p in pl_module.named_parameters() if p.requires_grad})
            if trainer.global_step == 3:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        go(load_method(name), callbacks=[Look()], checkpoint_every=2)
    found = load_file(tmp_path / "run" / "fit" / "last.ckpt")
    assert {name.removeprefix("weight.") for name in found if name.startswith("weight.")} == trained.keys()
    numbers = sum(value.numel() for name, value in found.items() if not name.startswith(("latents.", "losses")))
    total = sum(trained.values())
    assert 2 * total < numbers <= 3 * total + len(trained)  # AdamW: two moments each, and a count


@pytest.mark.slow
def test_large_checkpoints_are_saved_less_often(
    go: Callable[..., Any], load_method: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at: list[int] = []
    monkeypatch.setattr(saved, "write", lambda file, identity, state: at.append(state.step))
    monkeypatch.setattr(Checkpoints, "OFTEN", 1)
    monkeypatch.setattr(Checkpoints, "SELDOM", 3)
    for large, steps in ((10**9, [1, 2, 3, 4]), (10, [3])):
        monkeypatch.setattr(Checkpoints, "LARGE", large)
        at.clear()
        go(load_method("realera"))
        assert at == steps
        (tmp_path / "run" / "erased.safetensors").unlink()
    with pytest.raises(UserError, match="checkpoint_every=0"):
        go(load_method("realera"), checkpoint_every=0)


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("clip", "typed", "most"),
    [
        ("1e-3", {}, 1e-3),
        ("null", {}, None),
        ("null", {"gradient_clip_val": "method"}, None),
        ("null", {"gradient_clip_val": 1e-4}, 1e-4),
        ("1e-3", {"gradient_clip_val": None}, None),
    ],
)
def test_gradients_are_clipped_to_the_method_s_norm_or_the_trainer_s(
    clip: str, typed: dict[str, Any], most: float | None, go: Callable[..., Any], load_method: Callable[..., Any]
) -> None:
    from lightning.pytorch.callbacks import Callback

    norms = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]  # as the optimiser saw them
            norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))

    method = load_method("esd-x", "align.steps=2", f"align.clip={clip}")
    go(method, trainer={"accelerator": "cpu", **typed}, callbacks=[Look()])
    assert min(norms) > 3e-3 if most is None else norms == pytest.approx([most, most], rel=1e-2)


def test_an_impossible_norm_is_refused(go: Callable[..., Any], load_method: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"method\.align\.clip=0"):
        go(load_method("esd-x", "align.clip=0"))


def test_training_without_latents_is_refused(go: Callable[..., Any], load_method: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="no `latents` part"):
        go(load_method("realera", "latents=null"))


def test_a_method_without_training_runs_in_one_process(go: Callable[..., Any], tmp_path: Path) -> None:
    """There is no work to share, and DDP refuses a model without gradients."""
    go(Method("original"), trainer={"accelerator": "cpu", "devices": 2, "strategy": "ddp"})
    assert (tmp_path / "run" / "erased.safetensors").is_file()


def test_a_checkpoint_is_read_as_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    file = tmp_path / "fit" / "last.ckpt"
    file.parent.mkdir()
    torch.save({"identity": "x", "evil": Evil()}, file)
    assert not last_good(tmp_path, "x")
    assert "last.ckpt is torn: made again" in caplog.text and not (tmp_path / "made").exists()
