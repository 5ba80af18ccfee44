"""The device: which one, how fast it is, how much memory it has, and how batches reach it."""

import ctypes
import math
import os
import platform
import warnings

import torch

from configure import UserError
from training.distributed import read_count, torchrun_variables, world_size
from training.evaluate import piece_rows
from training.model_size import model_size

# Dense bf16 matrix products, FLOP/s, from the makers' data sheets; the first name that matches counts.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12,
         "RTX 4090": 165e12, "RTX 3090": 71e12}
GIB = 2**30
LONG_RUN = 5e12  # FLOPs in blocks: a minute on two cores, where compiling takes half of one the first time

CPU_QUOTAS = "/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us"  # us in each 100,000 us
# FLOPs of a pass in blocks. On two idle cores a second thread made passes of 1e7 to 1e8 1.3 times as fast,
# of 6e8 1.6 times; on busy cores it slows all of these several times over
SMALL_PASS = 3e8
TORCHS_THREADS = torch.get_num_threads()  # before anybody has set them


def reuse_freed_memory():
    """Have glibc keep what freed tensors leave: pages given back cost a fault each at every step."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of their own for large blocks
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep the top of the heap


def usable_cpus():
    """How many CPUs this process may use: of its affinity, and of its cgroup's quota."""
    cpus = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    for path in CPU_QUOTAS:
        try:
            with open(path) as file:
                quota, period = [*file.read().split(), "100000"][:2]
            if 0 < int(quota) < cpus * int(period):
                cpus = math.ceil(int(quota) / int(period))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return cpus


def use_sensible_threads(config):
    """Set how many threads torch computes with, for a process that trains `config` on a CPU; returns that.

    One thread where a pass is so small that a second gains little: threads wait for each other at every
    operation, and where other processes are running each wait can cost a time slice. Otherwise what torch
    chose, but no more than there are CPUs. OMP_NUM_THREADS and torch.set_num_threads() are left as they are.
    """
    chosen = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys()
    if not chosen and torch.get_num_threads() == TORCHS_THREADS:
        tokens = config.pass_batch() * config.context
        flops = 6 * 12 * config.depth * config.width**2 * tokens
        torch.set_num_threads(1 if flops < SMALL_PASS else min(TORCHS_THREADS, usable_cpus()))
    return torch.get_num_threads()


def select_device(config, training=True):
    """(device, autocast): where to run, and the context manager for its precision. training: else for
    sampling, which gains from bf16 on a GPU only. Raises UserError."""
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    available = [name for name, count in counts.items() if count]
    device = torch.device(available[0] if config.device == "auto" else config.device)
    if device.type == "cuda" and device.index is None:
        environment = os.environ | torchrun_variables(os.environ)
        local_rank = read_count(environment, "LOCAL_RANK", default=0)  # one GPU per process
        if counts["cuda"] == 1 and "SLURM_PROCID" in os.environ:
            local_rank = 0  # srun --gpus-per-task=1 shows each process its own only, as cuda:0
        device = torch.device("cuda", local_rank)
    if (device.index or 0) >= counts[device.type]:
        choices = " or ".join(available)
        raise UserError(f"device must be one that this machine has ({choices}), got {device}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    bf16 = config.precision == "bf16"
    if config.precision == "auto":
        bf16 = is_fast_in_bf16(config, device) if training else device.type == "cuda"
    if bf16:  # RMSNorm's gains stay in fp32, as they are meant to
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def is_fast_in_bf16(config, device):
    """Whether compiled bf16 pays: on a GPU, and on a CPU that multiplies bf16 in its hardware (AVX512-BF16,
    AMX) for a run that is long enough to make up for the compiling. Uncompiled bf16 gains nothing there."""
    if device.type != "cpu":
        return device.type == "cuda"
    # Of any block's matrices: the vocabulary, which model_size() needs, is not known before there are tokens
    flops = 6 * 12 * config.depth * config.width**2 * config.tokens_before(config.steps)
    has = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 has none
    return flops >= LONG_RUN and bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def is_compiled(config, device):
    """Whether training goes through torch.compile, unless that fails."""
    if config.compile == "auto":
        return is_fast_in_bf16(config, device) and (device.type == "cuda" or config.precision != "fp32")
    return bool(config.compile)


def precision_name(autocast):
    return "bf16" if autocast._enabled else "fp32"


def peak_flops(config, device):
    """The most FLOP/s that bf16 matrix products can reach on all devices together; None where unknown."""
    if device.type != "cuda" or config.precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    for part, peak in PEAKS.items():
        if part in name:
            return peak * world_size()
    return None


def peak_memory(device):
    """The most bytes that tensors took on a GPU since the last call; nan elsewhere."""
    if device.type != "cuda":
        return math.nan
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def total_memory(device):
    """Bytes of memory of the device, or of the machine for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(config, device, autocast):
    """Raises UserError when a run needs more memory than the device has."""
    size = model_size(config)
    rows_per_rank = (config.batch_start or config.batch) // world_size()
    needed, available = least_memory(config, size, autocast, config.micro_batch), total_memory(device)
    if needed <= available:
        return
    advice, rows = "a smaller model, or --shard=true on several devices", config.pass_batch(world_size())
    for fewer in range(rows, 0, -1):
        if rows_per_rank % fewer == 0 and least_memory(config, size, autocast, fewer) <= available:
            advice = f"--micro_batch={fewer}"
            break
    raise UserError(f"micro_batch: {rows} sequences a pass and {size.parameters:,} weights need at least "
                    f"{needed / GIB:,.0f} GiB, {device} has {available / GIB:,.0f}; try {advice}")


def least_memory(config, size, autocast, micro_batch):
    """The least bytes that training takes, or evaluation if that takes more: weights, gradients and Adam's
    moments in fp32, and for each token the activations that the backward pass reads; in evaluation no
    gradients, and of the activations the logits and their log-probabilities. A window takes a mask of all
    pairs of tokens, if only to find FlexAttention's blocks in it."""
    bytes_per_number = 2 if autocast._enabled else 4
    rows = micro_batch or config.pass_batch(world_size())
    shards = world_size() if config.shard else 1
    training = 16 * size.parameters / shards
    training += rows * config.context * bytes_per_number * size.activations_per_token
    logits = piece_rows(config, micro_batch) * config.context * config.vocab_size
    evaluation = 12 * size.parameters / shards + logits * (bytes_per_number + 4)
    mask = config.context ** 2 if config.window is not None else 0
    return max(training, evaluation) + mask


def batches_on_device(chunks, device):
    """Yields each step's batch, (2, passes, B, T), on `device`; one copy serves a chunk of steps."""
    for chunk in chunks:
        yield from chunk.to(device, non_blocking=True)
