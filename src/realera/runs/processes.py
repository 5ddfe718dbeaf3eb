"""Several processes for one run: finds this process's rank, starts the others and connects them.

Every process runs the same command. They are started by the first process of each machine (trainer=ddp
trainer.devices=4; on several machines, give the command on each with MASTER_ADDR, MASTER_PORT and NODE_RANK set), by
torchrun or by srun. All machines use the same run folder and the same cache. Lightning's launcher is not used, because
it starts processes for training only; drawing takes far longer, and needs them in runs without training as well.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from realera.contracts import UserError
from realera.runs.folders import Run, difference, identity
from realera.setting_types import typed_devices
from realera.settings.run_settings import TrainerSettings
from realera.system import cores, disk, interrupts
from realera.system.ranks import ONE_PROCESS, Ranks, patient_group

PATIENCE = 20.0  # seconds in which a process may notice on its own that another one has ended
LEAST = 4  # processes on the CPU that are allowed on every machine
FIRST = "REALERA_FIRST"  # id of the process that started this one
WITHOUT_CWD = "import runpy, sys; sys.path.remove(''); runpy.run_module('realera.{command}', None, '__main__', True)"


@dataclass(frozen=True)
class ProcessPlan:
    """The rank and device of this process. started: whether torchrun, srun or the first process started all of them.
    trainer: settings for Lightning, the same in every process. cuda: device number, None = the CPU or any device."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    started: bool = False
    trainer: Mapping[str, Any] = field(default_factory=dict)
    cuda: int | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0


def adopt_scheduler(environ: MutableMapping[str, str]) -> None:
    """Sets torchrun's variables in a process that srun started together with others."""
    if "RANK" in environ or int(environ.get("SLURM_STEP_NUM_TASKS") or 1) < 2 or "SLURM_PROCID" not in environ:
        return
    world, nodes = int(environ["SLURM_STEP_NUM_TASKS"]), int(environ.get("SLURM_STEP_NUM_NODES") or 1)
    host = re.match(r"([^\[,]+)(?:\[(\d+))?", environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    number = int(environ.get("SLURM_JOB_ID") or 0) + int(environ.get("SLURM_STEP_ID") or 0)
    environ.update(
        RANK=environ["SLURM_PROCID"],
        WORLD_SIZE=str(world),
        LOCAL_RANK=environ.get("SLURM_LOCALID", environ["SLURM_PROCID"]),
        LOCAL_WORLD_SIZE=str(world // nodes),
        NODE_RANK=environ.get("SLURM_NODEID", "0"),
        MASTER_ADDR=environ.get("MASTER_ADDR") or ((host[1] + (host[2] or "")) if host else "127.0.0.1"),
        MASTER_PORT=environ.get("MASTER_PORT") or str(15000 + number % 10000),
    )


def is_helper(environ: Mapping[str, str]) -> bool:
    """Whether this is not the first process of a run. Only the first one writes files and log lines."""
    return int(environ.get("RANK") or environ.get("NODE_RANK") or environ.get("LOCAL_RANK") or 0) > 0


def plan(trainer: TrainerSettings | None, gpus: int, environ: Mapping[str, str] = os.environ) -> ProcessPlan:
    """The plan of this process, from the environment of its launcher or, without one, from the settings. trainer: None
    for commands without these settings. gpus: the number of GPUs that this process sees.

    Raises:
        UserError: devices are missing, machines cannot find each other, or the settings contradict the launcher.
    """
    trainer = trainer or TrainerSettings({})
    on_gpu = gpus > 0 and trainer.allows_gpu
    listed, here = _devices(trainer.devices, trainer.accelerator, gpus if on_gpu else 0)
    nodes = trainer.nodes
    if started := "RANK" in environ and "WORLD_SIZE" in environ:
        world = int(environ["WORLD_SIZE"])
        local_world = int(environ.get("LOCAL_WORLD_SIZE") or world)
        if local_world < 1 or world % local_world or (here * nodes not in (1, world) and trainer.devices != -1):
            raise UserError(
                f"{world} processes were started, {local_world} on this machine, but the settings ask for {nodes} x "
                f"{here} (trainer.num_nodes x trainer.devices): leave these two out, or start that number of processes."
            )
        rank, local_rank = int(environ["RANK"]), int(environ.get("LOCAL_RANK") or 0)
        if not (0 <= rank < world and 0 <= local_rank < local_world):
            raise UserError(
                f"RANK={rank} of WORLD_SIZE={world} and LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE={local_world} "
                "are not valid, because ranks start at 0: unset them, or start the processes with torchrun or srun."
            )
    else:
        world, local_world, local_rank = nodes * here, here, 0
        rank = int(environ.get("NODE_RANK") or 0) * here
        lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if not environ.get(name)]
        if nodes > 1 and (lacking or rank >= world):
            raise UserError(
                f"trainer.num_nodes={nodes} machines cannot find each other: give the command on each with "
                f"MASTER_ADDR, MASTER_PORT and NODE_RANK=0 to {nodes - 1} set, or start it with torchrun or srun."
            )
    cuda = (listed[local_rank] if listed and local_rank < len(listed) else local_rank) if on_gpu else None
    if world == 1:
        return ProcessPlan(started=started, trainer=dict(trainer.node), cuda=cuda if listed else None)
    if cuda is not None and cuda >= gpus:
        raise UserError(
            f"Process {local_rank} of this machine sees {gpus} of the {local_world} GPUs: start one process per GPU at "
            "most, and let each process see all GPUs of its machine (srun --gpus-per-node, without --gpus-per-task)."
        )
    strategy = "ddp" if trainer.strategy == "auto" else trainer.strategy
    if not strategy.startswith("ddp") or strategy.startswith(("ddp_spawn", "ddp_fork", "ddp_notebook")):
        raise UserError(f"trainer.strategy={strategy} is not supported: use trainer=ddp for several processes.")
    settled = {"devices": listed or local_world, "num_nodes": world // local_world, "strategy": strategy}
    return ProcessPlan(rank, world, local_rank, local_world, started, {**trainer.node, **settled}, cuda)


def _devices(asked: Any, accelerator: str, gpus: int) -> tuple[list[int] | None, int]:
    """(the listed device numbers, or None; the number of devices)."""
    asked = typed_devices(asked)
    if isinstance(asked, (list, tuple)) and asked and all(isinstance(n, int) and n >= 0 for n in asked):
        if max(asked) >= gpus:
            raise UserError(
                f"trainer.devices={list(asked)} names GPUs by number, but this machine has {gpus or 'none'}: give "
                "numbers of GPUs that exist, or leave trainer.devices out."
            )
        return list(asked), len(asked)
    if asked == "auto":
        return None, max(1, gpus)
    number = asked if isinstance(asked, int) and not isinstance(asked, bool) else 0
    if (number == -1 and gpus == 0) or (number > max(1, gpus) and (gpus > 0 or accelerator in ("gpu", "cuda"))):
        raise UserError(
            f"trainer.devices={asked} asks for GPUs, but this machine has {gpus or 'none'}: trainer=default uses one "
            "device, and trainer=ddp trainer.accelerator=cpu trainer.devices=2 uses two processes on the CPU."
        )
    if number == -1:
        return None, gpus
    if number < 1:
        raise UserError(
            f"trainer.devices={asked} is not valid: give a number from 1 on, a list such as [0,1], or -1 (all)."
        )
    if gpus == 0 and number > (most := max(LEAST, cores.usable())):
        raise UserError(
            f"trainer.devices={asked} asks for {number} processes on the CPU, but at most {most} are allowed on this "
            "machine: give a smaller number."
        )
    return None, number


@contextmanager
def connected(plan: ProcessPlan, command: str, *, needed: bool = True) -> Iterator[Ranks]:
    """Starts this machine's other processes, connects all processes of the run and yields their `Ranks`. `command`: the
    command that they run. needed=False: no process is started, but processes that already run are connected.

    Raises:
        UserError: the processes cannot connect, or one of them has ended.
    """
    if plan.cuda is not None:
        import torch

        torch.cuda.set_device(plan.cuda)
    if plan.world == 1 or not (needed or plan.started):
        yield ONE_PROCESS
        return
    before = dict(os.environ)
    helpers: list[subprocess.Popen[bytes]] = []
    terminate_helpers = partial(_terminate, helpers)
    interrupts.last_resort.append(terminate_helpers)
    done = threading.Event()
    threading.Thread(target=_watch, args=(helpers, done), daemon=True).start()
    try:
        if not plan.started:
            _start(plan, command, helpers)
        ranks = _connect(plan)
        yield ranks
        ranks.wait()
        _disconnect()
        until = time.monotonic() + PATIENCE
        while any(helper.poll() is None for helper in helpers) and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        done.set()
        _stop(helpers)
        interrupts.last_resort.remove(terminate_helpers)
        os.environ.clear()
        os.environ.update(before)


def same_run(ranks: Ranks, run: Run) -> Run:
    """Returns the first process's run in every process.

    Raises:
        UserError: this process was given other settings.
    """
    first = ranks.from_first(lambda: run)
    if differs := difference(identity(first.config), identity(run.config)):
        raise UserError(f"The processes of a run have different settings ({differs}): start all with the same command.")
    return first


def _connect(plan: ProcessPlan) -> Ranks:
    import torch
    from torch import distributed

    if plan.cuda is None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores.usable() // plan.local_world))
    os.environ["NODE_RANK"] = str(plan.rank // plan.local_world)  # Lightning computes ranks from it
    try:
        backend = "gloo" if plan.cuda is None else "nccl"
        distributed.init_process_group(backend, rank=plan.rank, world_size=plan.world)
        group = patient_group()
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"The {plan.world} processes of the run could not connect at {where} "
            f"({str(error).splitlines()[0]}): start all with the same command, on machines that can reach that address."
        ) from error
    return Ranks(plan.rank, plan.world, plan.local_rank, plan.local_world, group)


def _disconnect() -> None:
    from torch import distributed

    distributed.destroy_process_group()


def _start(plan: ProcessPlan, command: str, helpers: list[subprocess.Popen[bytes]]) -> None:
    """Starts this machine's other processes with the same command, adds them to `helpers`, and sets this one's rank."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    os.environ.update(WORLD_SIZE=str(plan.world), LOCAL_WORLD_SIZE=str(plan.local_world))
    os.environ.update(RANK=str(plan.rank), LOCAL_RANK="0", NODE_RANK=str(plan.rank // plan.local_world))
    here = {"", os.getcwd()} & set(sys.path)
    # unlike a console script, -m and -c import modules from the current folder, which may be a run folder
    start = ["-m", f"realera.{command}"] if here else ["-c", WITHOUT_CWD.format(command=command)]
    for n in range(1, plan.local_world):
        helpers.append(
            subprocess.Popen(
                [sys.executable, *start, *sys.argv[1:]],
                env={**os.environ, "RANK": str(plan.rank + n), "LOCAL_RANK": str(n), FIRST: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # the first process prints for all
            )
        )


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _watch(helpers: Sequence[subprocess.Popen[bytes]], done: threading.Event) -> None:
    """Ends this process if a process that it started, or the one that started it, ended with an error."""
    first = int(os.environ.get(FIRST) or 0)
    while not done.wait(0.5):
        if first and os.name == "posix" and os.getppid() != first:
            disk.clean_up_before_exit()
            os._exit(1)
        failed = next((helper for helper in helpers if helper.poll() not in (None, 0)), None)
        if failed is not None and not done.wait(PATIENCE):
            print(f"error: a process of this run ended with status {failed.returncode}", file=sys.stderr, flush=True)
            _stop(helpers)
            disk.clean_up_before_exit()
            os._exit(2)


def _terminate(helpers: Sequence[subprocess.Popen[bytes]]) -> None:
    for helper in helpers:
        if helper.poll() is None:
            helper.terminate()


def _stop(helpers: Sequence[subprocess.Popen[bytes]]) -> None:
    _terminate(helpers)
    until = time.monotonic() + 5
    for helper in helpers:
        try:
            helper.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            helper.kill()
