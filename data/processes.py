"""The processes that torchrun starts to train one model together, and the signals they get."""

import contextlib
import os
import signal
import threading
from datetime import timedelta

import torch
import torch.distributed as dist


def join():
    """Meet the other processes, if torchrun started this one. A process that waits is ended by torchrun when
    another dies, so the time limit only has to outlast the longest preparation of data."""
    if "RANK" in os.environ:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))


def processes():
    """(number of this process, from 0; how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def agree(*flags):
    """Which flags are true on any process, so that all go the same way."""
    if dist.is_initialized():
        flags = torch.tensor(flags, dtype=torch.int32)  # on the CPU: waits for no GPU
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags]


@contextlib.contextmanager
def first_here():
    """The block is run by the first process of each machine, then by the others."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if dist.is_initialized() and not first:
        dist.barrier()
    yield
    if dist.is_initialized() and first:
        dist.barrier()


@contextlib.contextmanager
def signals_caught():
    """Yields a list that gets the first SIGINT or SIGTERM, for the loop to end on; a second ends at once."""
    caught, before = [], {}

    def catch(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, action in before.items():
            signal.signal(number, action)
