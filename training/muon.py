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


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    groups: as param_groups() makes them, with lr, weight_decay and momentum. matrices_in: {parameter: how
    many matrices it holds, stacked along its outputs}. Matrices of one shape are orthogonalized together.
    """

    def __init__(self, groups, matrices_in):
        super().__init__(groups, {})
        self.matrices_in = matrices_in

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                count = self.matrices_in[p]
                shape = (count, p.size(0) // count, p.size(1))
                by_shape.setdefault(shape[1:], []).append((p, shape))
            for parameters in by_shape.values():
                self.step_matrices(group, parameters)

    def step_matrices(self, group, parameters):
        """Step parameters whose matrices all have one shape: [(parameter, (count, O, I))]."""
        directions = []
        for p, shape in parameters:
            direction = self.nesterov(p, group["momentum"])
            # A sharded matrix is gathered: every rank orthogonalizes all of it and keeps its part
            directions.append(full_tensor(direction).view(shape))
        updates = orthogonal_update(torch.cat(directions))
        counts = [shape[0] for _, shape in parameters]
        for (p, _), update in zip(parameters, updates.split(counts), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(as_sharded(update.reshape(p.shape).to(p.dtype), p) * group["lr"])

    def nesterov(self, p, momentum):
        """The gradient's running average, one step ahead."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer = state["momentum_buffer"]
        buffer.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum)


def as_sharded(tensor, like):
    """`tensor`, sharded as `like` is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    return copy_into_shard(torch.empty_like(like), tensor)


class MuonWithAdamW:
    """Two optimizers that look like one: the groups that have a momentum go to Muon, the others to AdamW.

    Groups and state are shared, so learning rates, checkpoints and resuming see one optimizer.
    """

    def __init__(self, groups, matrices_in, capturable=False):
        self.muon = Muon([group for group in groups if "momentum" in group], matrices_in)
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
