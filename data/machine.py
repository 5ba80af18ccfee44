"""The machine: its devices, the processes that torchrun starts on them, their signals and memory."""

import contextlib
import ctypes
import math
import os
import platform
import signal
import threading
from datetime import timedelta

import torch
import torch.distributed as dist

from configure import UserError

# Dense bf16 matrix products, FLOP/s, from the makers' data sheets; the first name that fits counts.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12,
         "RTX 4090": 165e12, "RTX 3090": 71e12}


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


def keep_freed_memory():
    """Have glibc reuse what freed tensors leave: given back, each 4 kB page costs a fault at every step."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of their own for large blocks
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep the top of the heap


def pick_device(config):
    """(device, autocast): where to run, and the context manager that gives its precision."""
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    there = [name for name in count if count[name]]
    device = torch.device(there[0] if config.device == "auto" else config.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))  # torchrun: a GPU each
    if (device.index or 0) >= count[device.type]:
        raise UserError(f"device: got {device}, which this machine has not; takes {' or '.join(there)}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    bf16 = config.precision == "bf16" or config.precision == "auto" and device.type == "cuda"
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def peak_flops(config, device):
    """The most FLOP/s that bf16 matrix products can reach on all devices together, or None."""
    if device.type != "cuda" or config.precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * processes()[1] for part, peak in PEAKS.items() if part in name), None)


def peak_memory(device):
    """The most bytes that tensors took on a GPU since the last call, or nan."""
    if device.type != "cuda":
        return math.nan
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def check_memory(config, vocab_size, device, size):
    """Raises UserError when a step needs more memory than there is. Counted is what it needs at the least:
    weights, gradients and Adam's moments in fp32, and for each token the activations that the backward pass
    reads, of `size` bytes."""
    there = (torch.cuda.get_device_properties(device).total_memory if device.type == "cuda"
             else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    world, C = processes()[1], config.width
    weights = 12 * config.depth * C**2 + (2 - config.tied) * vocab_size * C
    fixed = 16 * weights / (world if config.shard else 1)
    row = size * config.context * (12 * config.depth * C + vocab_size)
    rows = config.micro_batch or config.batch // world
    if fixed + rows * row > there:
        fits = [n for n in range(1, rows) if config.batch // world % n == 0 and fixed + n * row <= there]
        takes = f"--micro_batch={fits[-1]}" if fits else "a smaller model, or --shard=true on several devices"
        needs, there = (fixed + rows * row) / 2**30, there / 2**30
        raise UserError(f"micro_batch: {rows} sequences a pass and {weights:,} weights need at least "
                        f"{needs:,.0f} GiB, {device} has {there:,.0f}; takes {takes}")


class Replayed:
    """`function`, of one tensor, which returns one. With `graph` its third call captures it as a CUDA graph:
    one launch in the place of hundreds. The first two are plain: they compile and allocate. `fails` gets the
    error of a capture that does not work; the function then stays plain."""

    def __init__(self, function, graph, fails):
        self.function, self.fails, self.calls = function, fails, 0
        self.graph = torch.cuda.CUDAGraph() if graph else None

    def __call__(self, x):
        self.calls += 1
        if self.graph and self.calls == 3:
            self.x = torch.empty_like(x)
            try:
                with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # feed() has a thread
                    self.y = self.function(self.x)
            except RuntimeError as error:
                self.fails(error)
                self.graph = None
        if not self.graph or self.calls < 3:
            return self.function(x)
        self.x.copy_(x)
        self.graph.replay()
        return self.y.clone()
