"""Start several processes of one command, as a launcher does."""

import socket


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_together(start, *arguments, count=2, env=None, preludes=(), launcher="torchrun"):
    """Start `count` processes; `start` is the fixture, `preludes` has a text for each."""
    port, started = free_port(), []
    for rank in range(count):
        names = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank}
        if launcher == "slurm":
            names = {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": count, "SLURM_LOCALID": rank}
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        prelude = preludes[rank] if preludes else ""
        given = {name: str(value) for name, value in names.items()} | (env or {})
        started.append(start(*arguments, env=given, prelude=prelude))
    return started
