"""Several processes of one run, forked from one that has imported torch: starting them takes no time."""

import os
import signal
import socket
from collections.abc import Callable

import torch

from upweight.core.work import Machine
from upweight.train import parallel


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def together(size: int, machine: Machine, work: Callable[[int], None]) -> bool:
    """`work` in so many processes; whether all came to the end. Where one dies the others are killed."""
    port, children = free_port(), []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
            with parallel.joined(machine):
                work(rank)
                os._exit(0)
        children.append(child)
    whole = True
    for _ in range(size):
        ended, status = os.wait()
        children.remove(ended)
        if status:
            if not os.WIFSIGNALED(status):
                raise SystemExit("a process failed")
            whole = False
            for child in children:
                os.kill(child, signal.SIGKILL)
    return whole
