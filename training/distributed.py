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
    """Whether torchrun's variables name this process as one of several, or of one. Raises UserError where
    they are set in part, or do not agree."""
    if not {"RANK", "WORLD_SIZE"} & environment.keys():
        return False
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
               if not environment.get(name)]
    if missing:
        given = "RANK" if "RANK" in environment else "WORLD_SIZE"
        raise UserError(f"{missing[0]}: is not set in the environment, though {given} is; start with "
                        f"torchrun, or unset {given}")
    process, processes = (read_count(environment, name) for name in ("RANK", "WORLD_SIZE"))
    read_count(environment, "LOCAL_RANK", default=0)
    if process >= processes:
        raise UserError(f"RANK: got {process} in the environment, but WORLD_SIZE is {processes}; ranks count "
                        "from 0")
    if not 0 < read_count(environment, "MASTER_PORT") < 2**16:
        raise UserError(f"MASTER_PORT: got {environment['MASTER_PORT']} in the environment; a port is 1 to "
                        "65535")
    return True


def read_count(environment, name, default=None):
    """The whole number that the environment variable `name` holds. Raises UserError."""
    text = environment.get(name, default)
    if text is None:
        raise UserError(f"{name}: is not set in the environment, though srun's other variables are; unset "
                        "SLURM_STEP_NUM_TASKS to train in one process")
    try:
        count = int(text)
        if count < 0:
            raise ValueError
    except ValueError:
        raise UserError(f"{name}: got {text!r} in the environment; it must be a whole number") from None
    return count


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
    if "MASTER_ADDR" not in environment and not found:
        raise UserError(f"SLURM_STEP_NODELIST: got {hosts!r} in the environment; it must list hosts, unless "
                        "MASTER_ADDR names one")
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
    """Copy all of `value` into `destination`, or this rank's part of it. Raises RuntimeError when their
    shapes differ."""
    if value.shape != destination.shape:
        raise RuntimeError(f"shape {tuple(value.shape)} for {tuple(destination.shape)}")
    if hasattr(destination, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor
        value = value.to(destination.device)
        value = distribute_tensor(value, destination.device_mesh, destination.placements)
    with torch.no_grad():
        return destination.copy_(value)
