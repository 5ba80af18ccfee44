"""One optimizer step: set the learning rate, gradients of all passes, update; as a CUDA graph where asked."""

import contextlib
import functools

import torch
import torch.distributed as dist

from training.compile import CudaGraphed, fall_back_or_raise
from training.distributed import rank, world_size
from training.optimizer import ClipAndStep
from training.schedule import lr_factor


class TrainStep:
    """The optimizer step: set_learning_rate(step), then a call with a batch, (2, passes, B, T) of tokens and
    targets, and the step's number from 0. The call returns one tensor, not yet waited for: the mean loss, the
    gradient norm before clipping, the norm of each parameter's gradient, then the numbers of `observers`
    (training/monitor.py).

    graph: replay the step as a CUDA graph, optimizer included. update: what ends a step; None: torch's.
    """

    def __init__(self, model, optimizer, config, autocast, graph=False, say=print, update=None, observers=()):
        self.optimizer, self.config = optimizer, config
        update = update or ClipAndStep(model, optimizer, config)
        step = functools.partial(run_step, model, update, observers, config, autocast)
        self.run = CudaGraphed(step, graph, lambda error: fall_back_or_raise("graph", config, error, say))
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.lr_tensors = None
        if graph:
            # A replay runs the captured kernels on the captured memory: the rates must be tensors there
            self.peaks = torch.tensor(self.peaks, device="cuda")
            self.lr_tensors = self.peaks.clone()
            for group, lr in zip(optimizer.param_groups, self.lr_tensors, strict=True):
                group["lr"] = lr

    def set_learning_rate(self, step):
        """Set the rates of `step`, counted from 0; returns the hidden matrices' at the base shape."""
        factor = lr_factor(self.config, step)
        if self.lr_tensors is None:
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * factor  # the groups keep their ratio
        else:
            torch.mul(self.peaks, factor, out=self.lr_tensors)
        return self.config.lr * factor

    def __call__(self, batch, step):
        if self.config.dropout:
            # Dropout depends on seed, step and rank alone, so that resuming needs no saved random state
            torch.manual_seed(self.config.seed * 1_000_003 + step + 7919 * rank())
        return self.run(batch)


def run_step(model, update, observers, config, autocast, batch):
    """Gradients, then the update. The observers look at the weights before and after it."""
    loss = forward_backward(model, config, autocast, batch)
    for observer in observers:
        observer.before_update()
    norm, norms = update()
    observed = [observer.after_update(norms) for observer in observers]
    return torch.cat((torch.stack((loss, norm)), norms, *observed))


def forward_backward(model, config, autocast, batch):
    """Leaves the gradients of the mean loss over all passes and ranks; returns that loss."""
    passes, losses = batch.size(1), []
    share = torch.full((), 1 / passes, device=batch.device)
    for i, (tokens_BT, targets_BT) in enumerate(zip(*batch, strict=True)):
        with synchronize_gradients(model, config, i == passes - 1):
            with autocast:
                losses.append(model(tokens_BT, targets_BT))
            losses[-1].backward(share)
    loss = torch.stack(losses).detach().mean()
    if world_size() > 1:
        dist.all_reduce(loss)
        loss = loss / world_size()
    return loss


def synchronize_gradients(model, config, last_pass):
    """A context in which the backward pass averages gradients over ranks after the last pass only: once a
    step, however many passes there are."""
    if world_size() > 1 and config.shard:
        model.set_requires_gradient_sync(last_pass)
    elif world_size() > 1 and not last_pass:
        return model.no_sync()
    return contextlib.nullcontext()
