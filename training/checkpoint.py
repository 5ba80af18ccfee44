"""Checkpoints that a kill, a full disk or a flipped bit cannot make wrong unnoticed.

A checkpoint is what torch.save writes, then the sha256 of that: 32 bytes that torch.load ignores. It is read
with weights_only, so nothing in one can run. It is the same for any number of processes, sharded or not.
"""

import errno
import hashlib
import os
import platform
from dataclasses import asdict

import numpy as np
import torch

from configure import SETTINGS, UserError, complete_saved
from data.files import atomic_file
from data.prepare import find_prepared, is_prepared, prepared_folders
from parametrization import format_table
from training.distributed import copy_into_shard, full_tensor, local_part

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


def write_checkpoint(path, content, backup_path=None):
    """Make `path` hold the dict `content`, or leave it as it was; what it held before moves to backup_path.
    Raises OSError."""
    try:
        with atomic_file(path, backup_path) as file:
            torch.save(content, file)
            file.flush()
            file.write(digest(file.name, file.tell()))
    except RuntimeError:  # torch.save's way to report a write that failed
        raise OSError(errno.ENOSPC, "the disk is full, or fails", path) from None


def read_checkpoint(path):
    """The checkpoint at `path`. Raises UserError when it is damaged."""
    try:
        with open(path, "rb") as file:
            size = file.seek(-DIGEST_BYTES, os.SEEK_END)
            if file.read() != digest(path, size):
                raise ValueError("its bytes do not match their sha256")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if missing := KEYS - checkpoint.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        return checkpoint
    except Exception as error:
        raise UserError(f"{path}: is damaged: {' '.join(str(error).split())[:120]}") from None


def read_newest(paths, say):
    """(path, checkpoint) of the first of `paths` that is undamaged. Raises UserError when none is."""
    for path in paths:
        try:
            return path, read_checkpoint(path)
        except UserError as error:
            if path == paths[-1]:
                raise
            say(f"{error}; falling back to {paths[-1]}")


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
        raise UserError(f"{name}: got {value!r}, but {path} was trained with {settings[name]!r}; takes the "
                        f"same, or another --out, for a run that may start --init_from={config.out}")
    if checkpoint["step"] > config.steps:
        raise UserError(f"steps: got {config.steps}, takes at least the {checkpoint['step']} that {path} has "
                        "done")


def check_same_tokens(config, dataset, path, checkpoint):
    """Raises UserError when `dataset` is not what the run of `checkpoint` is trained on."""
    if checkpoint["tokens"] == dataset.hashes:
        return
    folder = find_prepared(checkpoint["tokens"], folders_of(config, checkpoint))
    advice = "takes those" if folder is None else f"takes --dataset={folder}, which holds those"
    raise UserError(f"dataset: got {config.dataset}, which gives other tokens than {path} was trained on; "
                    f"{advice}, or another --out")


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
            optimizer.state[p] = {key: optimizer_tensor(p, value)
                                  for key, value in checkpoint["optimizer"][name].items()}
    except Exception as error:
        raise does_not_fit(path, error) from None


def does_not_fit(path, error):
    return UserError(f"{path}: does not fit model.py: {' '.join(str(error).split())[:200]}")


def optimizer_tensor(p, value):
    """`value` on p's device and, unless it is one number such as the step, sharded as p is."""
    like = p if value.dim() else value
    return copy_into_shard(torch.empty_like(like, device=p.device), value)


def gather_to_cpu(tensor):
    """A copy of `tensor` on the CPU; all of it where it is sharded (then a collective)."""
    return full_tensor(tensor).detach().cpu().clone()


def gather_state(model, optimizer):
    """(weights, optimizer state) by parameter name, on the CPU. All ranks must call it."""
    parameters = dict(model.named_parameters())
    weights = {name: gather_to_cpu(p) for name, p in parameters.items()}
    state = {name: {key: gather_to_cpu(value) for key, value in optimizer.state[p].items()}
             for name, p in parameters.items()}
    return weights, state


def checkpoint_content(config, dataset, step, past, model, optimizer):
    """The dict that is written. past: (best step, best validation loss, rows of metrics.csv)."""
    weights, state = gather_state(model, optimizer)
    return {"step": step, "past": past, "model": weights, "optimizer": state, "tokens": dataset.hashes,
            "folder": os.path.abspath(dataset.folder), "config": asdict(config),
            "table": format_table(model), "versions": VERSIONS}


def has_finite_weights(model):
    """Whether every weight that this rank holds is finite."""
    return all(local_part(p).isfinite().all() for p in model.parameters())
