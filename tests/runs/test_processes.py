"""The rank of a process, from its settings and from the launcher that started it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from realera.contracts import UserError
from realera.runs.folders import Run
from realera.runs.processes import adopt_scheduler, connected, is_helper, plan, same_run
from realera.settings.run_settings import TrainerSettings
from realera.system.ranks import ONE_PROCESS, Ranks

DDP = {"accelerator": "gpu", "devices": -1, "num_nodes": 1, "strategy": "ddp"}
CPU = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "4000"}


def torchrun(rank: int, world: int, here: int) -> dict[str, str]:
    values = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % here, "LOCAL_WORLD_SIZE": here}
    return {name: str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("trainer", "gpus", "environ", "expected"),
    [  # expected: rank, world, local rank, local world, started, CUDA device
        ({}, 0, {}, (0, 1, 0, 1, False, None)),
        ({"accelerator": "auto", "devices": 1}, 4, {}, (0, 1, 0, 1, False, None)),
        ({"accelerator": "cpu", "devices": "auto"}, 4, {}, (0, 1, 0, 1, False, None)),
        ({"devices": [2]}, 4, {}, (0, 1, 0, 1, False, 2)),
        (DDP, 1, {}, (0, 1, 0, 1, False, None)),
        (DDP, 4, {}, (0, 4, 0, 4, False, 0)),
        ({**DDP, "devices": [1, 3]}, 4, {}, (0, 2, 0, 2, False, 1)),
        ({**DDP, "devices": "1,3"}, 4, {}, (0, 2, 0, 2, False, 1)),
        ({**DDP, "devices": "2"}, 4, {}, (0, 2, 0, 2, False, 0)),
        (CPU, 0, {}, (0, 2, 0, 2, False, None)),
        (CPU, 8, {}, (0, 2, 0, 2, False, None)),
        ({**DDP, "devices": 4, "num_nodes": 2}, 4, {**MASTER, "NODE_RANK": "0"}, (0, 8, 0, 4, False, 0)),
        ({**DDP, "devices": 4, "num_nodes": 2}, 4, {**MASTER, "NODE_RANK": "1"}, (4, 8, 0, 4, False, 0)),
        ({**DDP, "devices": 4, "num_nodes": 2}, 4, torchrun(6, 8, 4), (6, 8, 2, 4, True, 2)),
        ({"devices": 1}, 4, torchrun(3, 4, 4), (3, 4, 3, 4, True, 3)),
        (DDP, 4, torchrun(1, 2, 2), (1, 2, 1, 2, True, 1)),
        ({**DDP, "devices": [1, 3]}, 4, torchrun(1, 2, 2), (1, 2, 1, 2, True, 3)),
        (None, 0, torchrun(1, 3, 3), (1, 3, 1, 3, True, None)),
    ],
)
def test_a_process_knows_its_rank_and_device(
    trainer: Any, gpus: int, environ: Mapping[str, str], expected: tuple[Any, ...]
) -> None:
    found = plan(TrainerSettings(trainer), gpus, environ)
    assert (found.rank, found.world, found.local_rank, found.local_world, found.started, found.cuda) == expected
    if found.world > 1:
        assert found.trainer["strategy"] == "ddp" and found.trainer["num_nodes"] == found.world // found.local_world
        devices = found.trainer["devices"]
        assert (len(devices) if isinstance(devices, list) else devices) == found.local_world
    else:
        assert found.trainer == (trainer or {})


@pytest.mark.parametrize(
    ("trainer", "gpus", "environ", "says"),
    [
        (DDP, 0, {}, "trainer.accelerator=cpu trainer.devices=2"),
        ({**DDP, "devices": 4}, 2, {}, "asks for GPUs, but this machine has 2"),
        ({**DDP, "devices": 2}, 0, {}, "asks for GPUs, but this machine has none"),
        ({**CPU, "devices": -1}, 2, {}, "asks for GPUs, but this machine has none"),
        ({**CPU, "devices": [0, 1]}, 2, {}, "names GPUs by number, but this machine has none"),
        ({"devices": [2]}, 2, {}, "names GPUs by number, but this machine has 2"),
        ({**CPU, "devices": 0}, 0, {}, "devices=0 is not valid"),
        ({**CPU, "devices": "two"}, 0, {}, "devices=two is not valid"),
        ({**CPU, "devices": True}, 0, {}, "devices=True is not valid"),
        ({**CPU, "strategy": "ddp_spawn"}, 0, {}, "strategy=ddp_spawn is not supported"),
        ({**CPU, "strategy": "fsdp"}, 0, {}, "strategy=fsdp is not supported"),
        ({**CPU, "num_nodes": 2}, 0, {}, "NODE_RANK=0 to 1"),
        ({**CPU, "num_nodes": 2}, 0, {**MASTER, "NODE_RANK": "2"}, "NODE_RANK=0 to 1"),
        (CPU, 0, torchrun(0, 4, 4), "4 processes were started, 4 on this machine, but the settings ask for 1 x 2"),
        ({"accelerator": "gpu"}, 1, torchrun(1, 2, 2), "without --gpus-per-task"),
        (CPU, 0, {**torchrun(0, 2, 2), "WORLD_SIZE": "0", "LOCAL_WORLD_SIZE": "0"}, "0 processes were started"),
        (CPU, 0, torchrun(5, 2, 2), "RANK=5 of WORLD_SIZE=2"),
        (CPU, 0, {**torchrun(0, 2, 2), "LOCAL_RANK": "2"}, "LOCAL_RANK=2 of LOCAL_WORLD_SIZE=2 are not valid"),
    ],
)
def test_contradictory_process_settings_are_refused(
    trainer: Any, gpus: int, environ: Mapping[str, str], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        plan(TrainerSettings(trainer), gpus, environ)


def test_processes_of_a_cluster_are_numbered_as_torchrun_does() -> None:
    srun = {
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_STEP_NODELIST": "gpu[07-08,12]",
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_ID": "0",
    }
    environ = dict(srun)
    adopt_scheduler(environ)
    assert environ["MASTER_ADDR"] == "gpu07" and 15000 <= int(environ["MASTER_PORT"]) < 25000
    found = plan(TrainerSettings(DDP), 4, environ)
    assert (found.rank, found.world, found.local_rank, found.local_world, found.cuda) == (5, 8, 1, 4, 1)
    assert is_helper(environ)
    for nodes, first in (("tux-a,tux-b", "tux-a"), ("alone", "alone"), ("n[3]", "n3")):
        environ = {**srun, "SLURM_STEP_NODELIST": nodes}
        adopt_scheduler(environ)
        assert environ["MASTER_ADDR"] == first
    for others in ({"SLURM_STEP_NUM_TASKS": "1"}, torchrun(0, 4, 4)):  # a shell of its own, or torchrun inside
        environ = {**srun, **others}
        adopt_scheduler(environ)
        assert environ == {**srun, **others}


def test_only_the_first_process_logs() -> None:
    assert not is_helper({}) and not is_helper(torchrun(0, 2, 2))
    assert is_helper(torchrun(1, 2, 2)) and is_helper({"NODE_RANK": "1"})


def test_one_process_starts_nothing() -> None:
    with connected(plan(None, 0, {}), "train") as ranks:
        assert ranks == ONE_PROCESS
    with connected(plan(TrainerSettings(CPU), 0, {}), "train", needed=False) as ranks:  # a finished run
        assert ranks == ONE_PROCESS


def test_processes_with_other_settings_are_refused() -> None:
    class Second(Ranks):
        def from_first(self, value: Any) -> Any:
            return Run(Path("runs/a"), {"seed": 0}, finished=True)

    assert same_run(Second(1, 2), Run(Path("runs/a"), {"seed": 0})).finished
    with pytest.raises(UserError, match=r"different settings \(seed: 0 there, 1 here\)"):
        same_run(Second(1, 2), Run(Path("runs/a"), {"seed": 1}))
