"""Several processes run one command together: which of them this is, and `--gpus`, which launches them.

torchrun, accelerate and SLURM each start the same command several times. Each process takes one GPU and its share of
the work. This module is read before torch is, because what CUDA sees is fixed when CUDA starts.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phoque.errors import FAILED, RunError, UsageError

if TYPE_CHECKING:
    from phoque.console import Console

# what accelerate would read: to it, every process is one that works alone
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SLURM = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
AGAIN = "Run the same command again; a training run continues from its newest checkpoint."
GRACE_S = 30.0  # for the other processes to end by themselves, after one has failed
FIRST_PORT, PORTS = 15000, 10000  # of which a SLURM job takes the one that its number gives


@dataclass(frozen=True)
class Launch:
    """One of `size` processes that work together; `address` and `port` are where process 0 is reached."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int


def find_launch() -> Launch | None:
    """What the launcher says about this process; None if it works alone."""
    env = os.environ
    if int(env.get("WORLD_SIZE", 1)) > 1 and "RANK" in env:
        address, port = env.get("MASTER_ADDR", "127.0.0.1"), int(env.get("MASTER_PORT", 29500))
        return Launch(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)), address, port)
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in env:  # set by srun, and not for a batch script
        address = env.get("MASTER_ADDR") or first_node(env.get("SLURM_STEP_NODELIST", "127.0.0.1"))
        port = int(env.get("MASTER_PORT") or FIRST_PORT + int(env.get("SLURM_JOB_ID", 0)) % PORTS)
        local = int(env.get("SLURM_LOCALID", 0))
        return Launch(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), local, address, port)
    return None


def first_node(nodes: str) -> str:
    """The first host of a SLURM list, such as n-01 of `n-[01-03,07],m2`."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    return f"{match[1]}{match[2] or ''}" if match else nodes


def check_sharded(fsdp: bool, processes: int) -> None:
    """Raise UsageError for --fsdp with one process."""
    if fsdp and processes == 1:
        raise UsageError(
            what="--fsdp needs at least two processes.",
            why="It shards the base model over several GPUs, and this run has one.",
            fix="Add --gpus all on a machine with several GPUs, or leave out --fsdp.",
        )


_claimed: Launch | None = None
_visible_before: str | None = None  # CUDA_VISIBLE_DEVICES before this process saw its own GPU alone


def claim_gpu() -> Launch | None:
    """Let this process see its own GPU alone, and no sign of the launcher: it then works like one that is alone.

    Returns what the launcher said, also when it is called again; None if there was no launcher.
    """
    global _claimed, _visible_before
    launch = find_launch()
    if _claimed or launch is None:
        return _claimed
    _visible_before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if _visible_before is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(launch.local_rank)
    # one GPU: the launcher has chosen, as srun --gpus-per-task does; none: all are hidden
    elif len(visible := [name for name in _visible_before.split(",") if name]) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[launch.local_rank : launch.local_rank + 1])
    for name in TORCHRUN:
        os.environ.pop(name, None)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch warns with a page of addresses of each lost process
    _claimed = launch
    return launch


def enter_launch(console: "Console") -> Launch | None:
    """Claim this process's GPU, and mute every process but process 0; what the launcher said, or None."""
    launch = claim_gpu()
    if launch and launch.rank:
        console.mute()
    return launch


def leave_launch(env: dict[str, str]) -> dict[str, str]:
    """The environment for a command that process 0 runs by itself: it sees all GPUs, and no launcher."""
    alone = {name: value for name, value in env.items() if name not in (*TORCHRUN, *SLURM)}
    if _claimed:
        alone.pop("CUDA_VISIBLE_DEVICES", None)
        alone |= {"CUDA_VISIBLE_DEVICES": _visible_before} if _visible_before is not None else {}
    return alone


def count_processes(gpus: str) -> int:
    """The number of processes that --gpus asks for. Raises UsageError if the machine has fewer GPUs."""
    import torch

    present = torch.cuda.device_count()
    count = present if gpus == "all" else int(gpus)
    if count > present or not count:
        raise UsageError(
            what=f"--gpus {gpus} needs {'a GPU' if gpus == 'all' else f'{count} GPUs'}.",
            why=f"PyTorch sees {present} on this machine.",
            fix="Leave --gpus out, or give a number that is there.",
        )
    return count


def run_on_gpus(gpus: str | None) -> None:
    """Run this command once for each GPU that --gpus asks for, and exit; return if that is one, or already done."""
    if gpus and not claim_gpu() and (count := count_processes(gpus)) > 1:
        sys.exit(launch(count, own_command()))


def launch(count: int, command: Sequence[str]) -> int:
    """Run a command in `count` processes on this machine, and return its exit code.

    That of process 0 counts, which says what happened, unless it was killed; then that of the first process that
    failed. Ctrl-C reaches all of them from the terminal; SIGTERM is passed on.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: Any) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on)}
    previous[signal.SIGINT] = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        for rank in range(count):
            env = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(list(command), env=env))
        return _wait(processes)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for process in processes:
            process.kill()


def _wait(processes: Sequence[Any]) -> int:
    """Wait for all processes; when one fails, the others have GRACE_S to end. Those that are frozen are killed."""
    first, end, frozen = 0, float("inf"), set[int]()
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        failed = [process.poll() for process in processes if process.poll()]
        if failed and not first:
            first, end = failed[0], time.monotonic() + GRACE_S
        if first:
            for rank, process in enumerate(processes):
                if process.poll() is None and _is_frozen(process.pid):
                    frozen.add(rank)  # the others have said that it gave no sign of life
                    process.kill()
        time.sleep(0.05)
    codes = [process.poll() for process in processes]
    for rank, killed in enumerate(codes):
        if killed and killed < 0 and killed != -signal.SIGTERM and rank not in frozen:
            _say_killed(rank, len(codes), signal.Signals(-killed).name)
    code = next((code for code in (codes[0], first, *codes) if code and code > 0), 0)
    return code or (FAILED if any(codes) or None in codes else 0)


def _is_frozen(pid: int) -> bool:
    """Whether a process was stopped, by SIGSTOP or a debugger: it cannot end by itself."""
    import psutil

    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.NoSuchProcess:
        return False


def _say_killed(rank: int, count: int, name: str) -> None:
    from phoque.console import console

    console.error(
        RunError(
            what=f"Process {rank} of {count} was killed by {name}.",
            why="It may have been out of memory (RAM), or somebody ended it.",
            fix=AGAIN,
        )
    )


def own_command() -> list[str]:
    """The command line of this process, to be run again."""
    return [sys.executable, "-m", "phoque", *sys.argv[1:]]
