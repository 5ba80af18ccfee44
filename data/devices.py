"""The devices: which one, how fast, how much memory, and functions replayed on it as CUDA graphs."""

import ctypes
import math
import os
import platform

import torch

from configure import UserError
from data.processes import processes

# Dense bf16 matrix products, FLOP/s, from the makers' data sheets; the first name that fits counts.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12,
         "RTX 4090": 165e12, "RTX 3090": 71e12}


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


def check_memory(config, device, size):
    """Raises UserError when a step needs more memory than there is. Counted is what it needs at the least:
    weights, gradients and Adam's moments in fp32, and for each token the activations that the backward pass
    reads, of `size` bytes."""
    there = (torch.cuda.get_device_properties(device).total_memory if device.type == "cuda"
             else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    world, C = processes()[1], config.width
    weights = 12 * config.depth * C**2 + (2 - config.tied) * config.vocab_size * C
    fixed = 16 * weights / (world if config.shard else 1)
    row = size * config.context * (12 * config.depth * C + config.vocab_size)
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
