"""Muon for the hidden matrices, AdamW for everything else, as one optimizer.

Muon (K. Jordan et al., 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by the
nearest orthogonal one. Its update has a fixed spectral norm: scaled by sqrt(fan_out / fan_in), it changes
every layer's output alike at any width (arXiv 2512.05620, 2603.00541), so parametrization.py gives its
learning rate no power of the width.
"""

import math

import torch

from training.distributed import copy_into_shard, full_tensor

# Polar Express (arXiv 2505.16932): coefficients of five odd quintics whose composition takes singular values
# in [1e-3, 1] to about 1, in bf16; computed with a safety factor of 1.02
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))
SAFETY = 1.02


def orthogonalize(matrices_NOI, coefficients=POLAR_EXPRESS, safety=SAFETY):
    """For each of N matrices (O outputs, I inputs) U V^T of its singular value decomposition, approximately:
    all singular values become about 1. All N at once; in bf16, but in fp32 on a CPU, where that is faster."""
    x = matrices_NOI.float() if matrices_NOI.device.type == "cpu" else matrices_NOI.bfloat16()
    tall = x.size(-2) > x.size(-1)
    if tall:  # the smaller Gram matrix
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * safety + 1e-7)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def orthogonal_update(directions_NOI):
    """The update of N matrices from their momentum: orthogonal, times sqrt(fan_out / fan_in)."""
    fan_out, fan_in = directions_NOI.shape[1:]
    return orthogonalize(directions_NOI) * math.sqrt(fan_out / fan_in)


def nesterov(momentum_buffer, grad, momentum):
    """Moves the running average of the gradients on, in place; returns it one step ahead."""
    momentum_buffer.lerp_(grad, 1 - momentum)
    return grad.lerp(momentum_buffer, momentum)


def decay_and_move(p, update, lr, weight_decay):
    p.mul_(1 - lr * weight_decay)
    p.sub_(update * lr)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    groups: as param_groups() makes them, with lr, weight_decay and momentum. matrix_rows: {parameter: the
    rows of each matrix that it stacks along its outputs}. Matrices of one shape are orthogonalized together.
    """

    def __init__(self, groups, matrix_rows):
        super().__init__(groups, {})
        self.matrix_rows = matrix_rows

    @torch.no_grad()
    def step(self, closure=None):
        matrices, by_shape = [], {}
        for group in self.param_groups:
            for p in group["params"]:
                direction = self.direction(p, group["momentum"])
                # A sharded matrix is gathered: every rank orthogonalizes all of it and keeps its part
                for matrix in full_tensor(direction).split(self.matrix_rows[p]):
                    by_shape.setdefault(matrix.shape, []).append(len(matrices))
                    matrices.append(matrix)
        for indices in by_shape.values():
            updates = orthogonal_update(torch.stack([matrices[i] for i in indices]))
            for i, update in zip(indices, updates, strict=True):
                matrices[i] = update
        updates = iter(matrices)
        for group in self.param_groups:
            stacked = [[next(updates) for _ in self.matrix_rows[p]] for p in group["params"]]
            for p, its in zip(group["params"], stacked, strict=True):
                update = torch.cat(its) if len(its) > 1 else its[0]
                update = as_sharded(update.to(p.dtype), p)
                decay_and_move(p, update, group["lr"], group["weight_decay"])

    def direction(self, p, momentum):
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return nesterov(self.state[p]["momentum_buffer"], p.grad, momentum)


def as_sharded(tensor, like):
    """`tensor`, sharded as `like` is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    return copy_into_shard(torch.empty_like(like), tensor)


class MuonWithAdamW:
    """Two optimizers that look like one: the groups that have a momentum go to Muon, the others to AdamW.

    Groups and state are shared, so learning rates, checkpoints and resuming see one optimizer.
    """

    def __init__(self, groups, matrix_rows, capturable=False):
        self.muon = Muon([group for group in groups if "momentum" in group], matrix_rows)
        others = [group for group in groups if "momentum" not in group]
        self.adamw = torch.optim.AdamW(others, fused=True, capturable=capturable)
        self.muon.state = self.adamw.state

    @property
    def param_groups(self):
        return [*self.muon.param_groups, *self.adamw.param_groups]

    @property
    def state(self):
        return self.adamw.state

    def step(self):
        self.muon.step()
        self.adamw.step()

    def zero_grad(self):
        self.muon.zero_grad()
        self.adamw.zero_grad()
