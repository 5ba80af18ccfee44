"""Several processes that train one model: ranks, collective decisions, the model sharded or replicated."""

import contextlib
import os
import re
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configure import UserError

FIRST_PORT, PORTS = 20_000, 10_000  # where processes of srun meet
MEETING_TIME = timedelta(minutes=10)  # in which all processes must have started


def init_distributed():
    """Join the other processes, if torchrun or Slurm's srun started this one. When one dies, torchrun (and
    srun with --kill-on-bad-exit=1) ends those that wait, so the time limit of later waits only has to outlast
    the longest preparation of data. Raises UserError."""
    os.environ.update(torchrun_variables(os.environ))
    if not check_torchrun(os.environ):
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, process, processes = next(dist.rendezvous("env://", timeout=MEETING_TIME))
        dist.init_process_group(backend, store=store, rank=process, world_size=processes,
                                timeout=timedelta(days=1))
    except (dist.DistError, OSError, ValueError) as error:  # one that met a mistake at once may be gone
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"torchrun: another process died or never started: the {os.environ['WORLD_SIZE']} "
                        f"processes did not all meet at {os.environ['MASTER_ADDR']} ({reason})") from None


def check_torchrun(environment):
    """Whether torchrun's variables say that this is one of several processes. Raises UserError."""
    if not {"RANK", "WORLD_SIZE"} & environment.keys():
        return False
    read_count(environment, "RANK", below=read_count(environment, "WORLD_SIZE"))
    read_count(environment, "LOCAL_RANK", default=0)
    read_count(environment, "MASTER_PORT", below=2**16)
    if not environment.get("MASTER_ADDR"):
        raise UserError("MASTER_ADDR must be set in the environment, as RANK is; start with torchrun, or "
                        "unset RANK and WORLD_SIZE")
    return True


def read_count(environment, name, default=None, below=2**31):
    """The whole number that the environment variable `name` holds. Raises UserError."""
    text = str(environment.get(name, default))
    if not text.isdecimal() or int(text) >= below:
        raise UserError(f"{name} in the environment must be a whole number below {below}, got {text}; start "
                        "with torchrun or srun, or unset the variables of both")
    return int(text)


def torchrun_variables(environment):
    """What torchrun would have set, {name: text}, of a task among several that srun started; else nothing: a
    batch script by itself, torchrun within one, a single task. Raises UserError.

    The meeting point is a port of the first host, chosen by the job's number, or MASTER_ADDR and MASTER_PORT.
    """
    if "RANK" in environment or read_count(environment, "SLURM_STEP_NUM_TASKS", default=1) == 1:
        return {}
    hosts = environment.get("SLURM_STEP_NODELIST", "")
    # The first of such a list: gpu[07-09,12],login1 -> gpu07
    found = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", hosts)
    if not environment.get("MASTER_ADDR") and not found:
        raise UserError(f"SLURM_STEP_NODELIST in the environment must be a list of hosts, got {hosts!r}; try "
                        "MASTER_ADDR")
    job = sum(read_count(environment, name, default=0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    counts = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    ours = {name: str(read_count(environment, slurms)) for name, slurms in counts.items()}
    return ours | {
        "MASTER_ADDR": environment.get("MASTER_ADDR") or "".join(part or "" for part in found.groups()),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(FIRST_PORT + job % PORTS)}


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def any_rank(*flags):
    """Which of `flags` are true on at least one rank: every rank gets the same answer, and so takes the same
    branch. A collective: all ranks must call it, with as many flags."""
    if dist.is_initialized():
        flags = torch.tensor(flags, dtype=torch.int32)  # on the CPU, so that no rank waits for its GPU
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags]


def from_rank0(value):
    """Rank 0's `value`, on every rank. A collective."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


@contextlib.contextmanager
def local_rank0_first():
    """The block runs on the first process of each machine, then on the others."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if dist.is_initialized() and not is_first:
        dist.barrier()
    yield
    if dist.is_initialized() and is_first:
        dist.barrier()


def parallelize(model, config, device):
    """The model for several processes: a copy on each (DDP) or, with config.shard, a part on each (FSDP2).

    Raises UserError for shard with one process.
    """
    if config.shard and not dist.is_initialized():
        raise UserError("shard must be false for one process, got True; try torchrun or srun")
    if config.shard:
        from torch.distributed.fsdp import fully_shard
        mesh = dist.init_device_mesh(device.type, (world_size(),))
        for part in (*model.blocks, model):
            # Resharding after the forward pass, else evaluation would leave the parameters gathered
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
        return model
    if world_size() > 1:
        with warnings.catch_warnings():  # of the name that the setting has since torch 2.13
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    return model


def synchronize_gradients(model, config, is_last):
    """A context in which the backward pass averages gradients over ranks after a step's last micro-batch
    only: once a step, however many there are."""
    if world_size() > 1 and config.shard:
        model.set_requires_gradient_sync(is_last)
    elif world_size() > 1 and not is_last:
        return model.no_sync()
    return contextlib.nullcontext()


def mean_over_ranks(value):
    """The mean of a tensor over all ranks. A collective."""
    if world_size() > 1:
        dist.all_reduce(value)
        value = value / world_size()
    return value


def full_tensor(tensor):
    """`tensor`, or all of it where it is sharded over ranks (then a collective: all ranks must call)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_part(tensor):
    """`tensor`, or this rank's part of it where it is sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def copy_into_shard(destination, value):
    """Copy `value`, or this rank's part of it, into `destination`, of the same shape, or RuntimeError."""
    if value.shape != destination.shape:
        raise RuntimeError(f"shape {tuple(value.shape)} for {tuple(destination.shape)}")
    if hasattr(destination, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor
        value = value.to(destination.device)
        value = distribute_tensor(value, destination.device_mesh, destination.placements)
    with torch.no_grad():
        return destination.copy_(value)
