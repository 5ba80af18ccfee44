"""The processes that torchrun starts to train one model together, the signals they get, and how they end."""

import contextlib
import os
import signal
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from configure import UserError


def command(main):
    """Run main(argv) as a program: a UserError is one line on stderr and exit code 2."""
    sys.stdout.reconfigure(line_buffering=True)  # `| tee log` shows a line when it is said
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        time.sleep(3 * (os.environ.get("RANK", "0") > "0"))  # the first says it, torchrun ends the rest
        sys.exit(print("error:", *str(error).split(), file=sys.stderr) or 2)
    except BrokenPipeError:  # of `| head`: nobody reads on, which is no error of ours
        os._exit(128 + signal.SIGPIPE)  # at once: Python's own end would write what is left


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
