"""Files that a kill, a full disk or a flipped bit cannot make wrong unnoticed.

A checkpoint is what torch.save writes, then the sha256 of that: 32 bytes that torch.load does not mind.
Nothing in one can run: it is read with weights_only.
"""

import contextlib
import errno
import hashlib
import os

import torch

from configure import UserError
from data.tokens import durable

NAMES = {"step", "past", "model", "optimizer", "tokens", "config", "table", "versions"}  # in a checkpoint


def write(path, content, keep=None):
    """Make `path` hold text, or a checkpoint of anything else: whole, or as it was. `keep` then has that."""
    try:
        with durable(f"{path}.tmp") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                torch.save(content, file)
                file.flush()
                file.write(seal(f"{path}.tmp", file.tell()))
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(f"{path}.tmp")
        if isinstance(error, RuntimeError):  # so torch.save tells of a write that failed
            raise OSError(errno.ENOSPC, "the disk is full, or fails", path) from None
        raise
    if keep and os.path.exists(path):
        os.replace(path, keep)
    os.replace(f"{path}.tmp", path)


def seal(path, size):
    """The sha256 of the first `size` bytes of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(min(2**20, size - file.tell())):
            digest.update(block)
    return digest.digest()


def read(path):
    """The checkpoint at `path`. Raises UserError when it is damaged. Nothing in it can run."""
    try:
        with open(path, "rb") as file:
            size = file.seek(-32, os.SEEK_END)
            if file.read() != seal(path, size):
                raise ValueError("its bytes do not fit their sha256")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if lacks := NAMES - checkpoint.keys():
            raise ValueError(f"it lacks {', '.join(sorted(lacks))}")
        return checkpoint
    except Exception as error:
        raise UserError(f"{path}: is damaged: {' '.join(str(error).split())[:120]}") from None


def newest(paths, say):
    """(path, checkpoint) of the first of `paths` that is whole. Raises UserError when none is."""
    for path in paths:
        try:
            return path, read(path)
        except UserError as error:
            if path == paths[-1]:
                raise
            say(f"{error}; going back to {paths[-1]}")


def whole(tensor):
    """A copy of `tensor` on the CPU; of one that is cut over processes, all of it. All of them must call."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu().clone()


def fill(tensor, value):
    """Copy all of `value` into `tensor`, or this process's part of it. Raises RuntimeError."""
    if value.shape != tensor.shape:
        raise RuntimeError(f"shape {tuple(value.shape)} for {tuple(tensor.shape)}")
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor
        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    with torch.no_grad():
        return tensor.copy_(value)
