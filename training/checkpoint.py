"""Checkpoints that a kill, a full disk or a flipped bit cannot make wrong unnoticed.

A checkpoint is what torch.save writes, then the sha256 of that: 32 bytes that torch.load ignores. It is read
with weights_only, so nothing in one can run. It is the same for any number of processes, sharded or not.
"""

import errno
import hashlib
import os
import platform
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
from torch.utils._pytree import tree_map

from configure import SETTINGS, UserError, complete_saved
from data.files import atomic_file
from data.prepare import find_prepared, is_prepared, prepared_folders
from parametrization import format_table
from training.distributed import any_rank, copy_into_shard, from_rank0, full_tensor, local_part

KEYS = {"step", "past", "model", "optimizer", "tokens", "config", "table", "versions"}
VERSIONS = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
DIGEST_BYTES = 32


def digest(path, size):
    """The sha256 of the first `size` bytes of a file."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(min(2**20, size - file.tell())):
            sha256.update(block)
    return sha256.digest()


class DamagedCheckpoint(UserError):
    """The file is there and can be read, but it is not what was written."""


def write_checkpoint(path, content, backup_path=None, check_held=None):
    """Make `path` hold the dict `content`, or leave it as it was; what it held before moves to backup_path.
    check_held: called before the new file takes its name, to raise if it may not. Raises OSError."""
    try:
        with atomic_file(path, backup_path) as file:
            torch.save(content, file)
            file.flush()
            file.write(digest(file.name, file.tell()))
            if check_held is not None:
                check_held()
    except RuntimeError:  # torch.save's way to report a write that failed
        raise OSError(errno.ENOSPC, "the disk is full, or fails", path) from None


def read_checkpoint(path):
    """The checkpoint at `path`. Raises DamagedCheckpoint, or UserError when it cannot be read at all."""
    try:
        with open(path, "rb") as file:
            size = os.path.getsize(path) - DIGEST_BYTES
            if size < 0:
                raise ValueError("it is too short")
            file.seek(size)
            if file.read() != digest(path, size):
                raise ValueError("its bytes do not match their sha256")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if missing := KEYS - checkpoint.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        return checkpoint
    except (OSError, MemoryError) as error:  # no fault of the file: an older one would only hide the reason
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"{path}: cannot be read: {reason}") from None
    except Exception as error:
        raise DamagedCheckpoint(f"{path}: is damaged: {' '.join(str(error).split())[:120]}") from None


def read_newest(paths, say):
    """(path, checkpoint) of the first of `paths` that exists and is undamaged; a line for each that is
    passed over. Raises UserError when there is none, or when one cannot be read."""
    found = [path for path in paths if os.path.exists(path)]
    if not found:
        names = [os.path.basename(path) for path in paths]
        raise UserError(f"{os.path.dirname(paths[0])} holds no {', '.join(names[:-1])} or {names[-1]}")
    for path, following in zip(found, [*found[1:], None], strict=True):
        try:
            return path, read_checkpoint(path)
        except DamagedCheckpoint as error:
            if following is None:
                raise
            say(f"{error}; falling back to {following}")


def settings_of_checkpoint(checkpoint):
    """{setting: value} of the run, completed where the checkpoint is older than a setting."""
    return complete_saved(checkpoint["config"])


def check_same_settings(config, path, checkpoint):
    """Raises UserError when `config` would not continue the run of `checkpoint`. A prepared folder may stand
    for the text that it was made of: check_same_tokens() compares what is in it."""
    settings = settings_of_checkpoint(checkpoint)
    for name, value in asdict(config).items():
        if SETTINGS[name].group == "run" or settings[name] == value:
            continue
        if name == "dataset" and is_prepared(value):
            continue
        raise UserError(f"{name} must be {settings[name]!r}, with which {path} was trained, got {value!r}; "
                        f"try another --out, for a run that may start --init_from={config.out}")


def check_same_tokens(config, dataset, path, checkpoint):
    """Raises UserError when `dataset` is not what the run of `checkpoint` is trained on."""
    if checkpoint["tokens"] == dataset.hashes:
        return
    folder = find_prepared(checkpoint["tokens"], folders_of(config, checkpoint))
    advice = "" if folder is None else f"--dataset={folder}, which holds those, or "
    raise UserError(f"dataset must give the tokens that {path} was trained on, got {config.dataset} with "
                    f"other tokens; try {advice}another --out")


def folders_of(config, checkpoint):
    """Where the tokens of a checkpoint may lie: in the folder that it was trained from, or in data_dir."""
    recorded = checkpoint.get("folder")  # absent in older checkpoints
    return [*([recorded] if recorded else []), *prepared_folders(config.data_dir)]


def load_weights(path, checkpoint, model):
    """Copy the weights into `model`. Raises UserError when they differ."""
    parameters = dict(model.named_parameters())
    try:
        if differing := checkpoint["model"].keys() ^ parameters.keys():
            raise RuntimeError(f"only one of them has {', '.join(sorted(differing))}")
        for name, p in parameters.items():
            copy_into_shard(p, checkpoint["model"][name])
    except Exception as error:
        raise does_not_fit(path, error) from None


def load_state(path, checkpoint, model, optimizer):
    """Copy weights and optimizer state into `model` and `optimizer`. Raises UserError when they differ."""
    load_weights(path, checkpoint, model)
    try:
        for name, p in model.named_parameters():
            optimizer.state[p] = {key: restore(p, value)
                                  for key, value in checkpoint["optimizer"][name].items()}
    except Exception as error:
        raise does_not_fit(path, error) from None


def does_not_fit(path, error):
    return UserError(f"{path}: does not match this model or optimizer: {' '.join(str(error).split())[:200]}")


def restore(p, value):
    """`value`, from the optimizer's state of parameter p, on p's device. A tensor of p's shape is sharded as
    p is; all others (a number, the factors of a preconditioner) are whole on every rank."""
    if torch.is_tensor(value) and value.dim() and value.shape == p.shape:
        return copy_into_shard(torch.empty_like(p, dtype=value.dtype), value)
    return tree_map(lambda leaf: leaf.to(p.device, copy=True) if torch.is_tensor(leaf) else leaf, value)


def gather_to_cpu(tensor):
    """A copy of `tensor` on the CPU; all of it where it is sharded (then a collective)."""
    return full_tensor(tensor).detach().cpu().clone()


def gather_state(model, optimizer):
    """(weights, optimizer state) by parameter name, on the CPU. All ranks must call it. Raises UserError."""
    parameters = dict(model.named_parameters())
    weights = {name: gather_to_cpu(p) for name, p in parameters.items()}
    state = {name: tree_map(partial(gather_optimizer_state, name, p), dict(optimizer.state[p]))
             for name, p in parameters.items()}
    return weights, state


def gather_optimizer_state(name, p, value):
    """One value of the optimizer's state of parameter p, on the CPU. Raises UserError where p is sharded but
    each rank has a value of its own that does not say how it is."""
    if not torch.is_tensor(value):
        return value
    whole = gather_to_cpu(value)
    is_sharded = hasattr(p, "full_tensor") and not hasattr(value, "full_tensor")
    if is_sharded and any_rank(not torch.equal(whole, from_rank0(whole)))[0]:
        raise UserError(f"shard: the optimizer's state of {name} differs between processes and is no "
                        "DTensor, so no checkpoint can hold it; use --shard=false")
    return whole


def checkpoint_content(config, dataset, step, past, model, optimizer):
    """The dict that is written. past: (best step, best validation loss, rows of metrics.csv)."""
    weights, state = gather_state(model, optimizer)
    return {"step": step, "past": past, "model": weights, "optimizer": state, "tokens": dataset.hashes,
            "folder": os.path.abspath(dataset.folder), "config": asdict(config),
            "table": format_table(model), "versions": VERSIONS}


def has_finite_weights(model):
    """Whether every weight that this rank holds is finite."""
    return all(local_part(p).isfinite().all() for p in model.parameters())
