"""Validation loss on fixed windows."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

from training.distributed import rank, world_size

PIECE_TOKENS = 8192  # evaluated at once: not config.batch, so that every run adds up the same way


def piece_rows(config, micro_batch):
    """How many windows are evaluated at once: no more than a pass of training has, where that is limited."""
    return max(1, min(PIECE_TOKENS // config.context, micro_batch or PIECE_TOKENS))


@torch.no_grad()
def evaluate(model, dataset, config, device, autocast):
    """{val_loss, val_error, val_bits_per_byte} on the fixed validation windows. A collective: every rank
    evaluates its share, and all get the same numbers."""
    windows = dataset.validation_windows(config.context, config.eval_tokens)
    windows_NT = torch.from_numpy(windows.astype("int64"))
    pieces = windows_NT.split(piece_rows(config, config.micro_batch))
    losses = [torch.zeros(len(piece)) for piece in pieces]
    model.eval()
    rounds = math.ceil(len(pieces) / world_size())
    for i in range(rounds):
        index = i * world_size() + rank()
        # Sharded models need every rank in each forward pass: one without a piece repeats the first
        piece_BT = pieces[index] if index < len(pieces) else pieces[0]
        loss_B = window_losses(model, piece_BT.to(device), autocast)
        if index < len(pieces):
            losses[index] = loss_B.cpu()
    model.train()
    losses_N = torch.cat(losses).double()
    if world_size() > 1:
        dist.all_reduce(losses_N)
    return summarize(losses_N, config.context, dataset.target_bytes(windows))


def summarize(losses_N, context, target_bytes):
    """{val_loss, val_error, val_bits_per_byte} of the mean losses of N windows of `context` targets each,
    which stand for `target_bytes` bytes of text in all."""
    nats = losses_N.sum().item() * context
    error = math.nan
    if len(losses_N) > 1:
        error = losses_N.std().item() / math.sqrt(len(losses_N))
    # Windows of nothing but ends of text have no bytes
    return {"val_loss": losses_N.mean().item(), "val_error": error,
            "val_bits_per_byte": nats / math.log(2) / (target_bytes or math.nan)}


def window_losses(model, windows_BT, autocast):
    """The mean cross-entropy of each window, (B,), in nats."""
    with autocast:
        logits_BVT = model(windows_BT[:, :-1]).float().transpose(1, 2)
    return F.cross_entropy(logits_BVT, windows_BT[:, 1:], reduction="none").mean(1)
