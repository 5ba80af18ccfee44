"""The optimizer step in fewer passes over memory: 2% faster at GPT-2's shape, 8% at width 2048.

For `--compile=model` with AdamW in bf16, on one device and with one micro-batch. Nothing else depends on this
file: without it, and its two lines in train.py, every run goes through train.py's train_step().

Each Linear of a block reads a bf16 copy of factor * weight in place of computing it. The copy's gradient
stays bf16 (the weight's own is factor * that), and one compiled function per parameter clips, moves the fp32
weight and writes the copy anew. What is tuned is passed as tensors, so that one compiled code serves all
trials. The moments stay in torch's optimizer: checkpoints are the same either way.
"""

import contextlib
import math
import types
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import Linear
from training.distributed import world_size
from training.optimizer import adamw_update, check_gradients


@contextlib.contextmanager
def fused_step(model, optimizer, config, autocast):
    """Yields a function of a batch that does what train.py's train_step() does, and returns the same; or None
    where there is none. Training must be compiled within. On leaving, the model's layers are as they were."""
    if not can_fuse(optimizer, config, autocast):
        yield None
        return
    step = FusedStep(model, optimizer, config, autocast)
    try:
        yield step
    finally:
        for layer in step.layers.values():
            del layer.forward, layer.scaled


def can_fuse(optimizer, config, autocast):
    """bf16 gradients must not be summed up, and the update is that of torch's AdamW as build_optimizer()
    makes it: any other optimizer does its own."""
    one_pass = world_size() == 1 and not config.shard and config.pass_batch() == config.batch
    groups = optimizer.param_groups
    plain_adamw = type(optimizer) is torch.optim.AdamW and all(
        group["betas"] == groups[0]["betas"] and not group["amsgrad"] and not group["maximize"]
        for group in groups)
    return config.compile == "model" and autocast._enabled and one_pass and plain_adamw


def scaled_grad_norm(grad, factor):
    return torch.linalg.vector_norm(grad.float() * factor)


def clip_and_update(p, grad, factor, scaled, exp_avg, exp_avg_sq, clip, lr, weight_decay, eps, weights,
                    bias_corrections):
    """One parameter's clipping, AdamW update and bf16 copy, in place: compiled, one pass over memory."""
    adamw_update(p, grad.float() * (factor * clip), exp_avg, exp_avg_sq, lr, weight_decay, eps, weights,
                 bias_corrections)
    if scaled is not None:
        scaled.copy_(factor * p)


class FusedParameter(NamedTuple):
    """What the update of one parameter reads and writes."""
    p: torch.Tensor  # fp32: what the optimizer moves and a checkpoint holds
    leaf: torch.Tensor  # what the forward pass reads, and the gradient belongs to: bf16(factor * p), or p
    factor: torch.Tensor  # of the layer's weight in the forward pass
    state: dict  # torch's: step, exp_avg, exp_avg_sq
    group: dict
    settings: list  # weight decay and eps, as tensors


def forward_scaled(layer, x):
    """The forward pass of a Linear whose factor * weight is in `scaled`."""
    bias = None if layer.bias is None else layer.factor.flatten() * layer.bias
    return F.linear(x, layer.scaled, bias)


class FusedStep:
    """train_step() for one micro-batch, with a fused update. Changes the forward of the model's layers."""

    def __init__(self, model, optimizer, config, autocast):
        self.model, self.autocast = model, autocast
        self.groups = optimizer.param_groups
        self.names = [name for name, _ in model.named_parameters()]
        self.one = next(model.parameters()).new_ones(())
        self.betas = self.one.new_tensor(self.groups[0]["betas"])
        self.max_norm = self.one * (config.grad_clip or math.inf)
        self.scaled_grad_norm = torch.compile(scaled_grad_norm, dynamic=False)
        self.clip_and_update = torch.compile(clip_and_update, dynamic=False)
        self.layers = {layer.weight: layer for layer in model.blocks.modules() if isinstance(layer, Linear)}
        group_of = {p: group for group in self.groups for p in group["params"]}
        self.parameters = [self.prepare(p, optimizer.state[p], group_of[p]) for p in model.parameters()]
        self.kinds = {}  # parameters whose norms one kernel takes
        for parameter in self.parameters:
            kind = parameter.leaf.dtype, parameter.factor.dim()
            self.kinds.setdefault(kind, []).append(parameter)

    def prepare(self, p, state, group):
        leaf, factor = p, self.one
        if p in self.layers:
            layer = self.layers[p]
            factor, leaf = layer.factor, (layer.factor * p).detach().bfloat16().requires_grad_()
            layer.register_buffer("scaled", leaf, persistent=False)
            layer.forward = types.MethodType(forward_scaled, layer)
        for name, like in ("step", self.one), ("exp_avg", p.detach()), ("exp_avg_sq", p.detach()):
            state.setdefault(name, torch.zeros_like(like))  # a checkpoint has already filled them
        settings = [self.one * group[name] for name in ("weight_decay", "eps")]
        return FusedParameter(p.detach(), leaf, factor, state, group, settings)

    def grad_norms(self):
        """The norm of each parameter's gradient, (parameters,). Raises UserError where one has none."""
        check_gradients(self.names, [parameter.leaf.grad for parameter in self.parameters])
        norms = {}
        for (_, factor_dim), parameters in self.kinds.items():
            grads = [parameter.leaf.grad for parameter in parameters]
            factors = [parameter.factor for parameter in parameters]
            if factor_dim:  # a factor for each row: the norm needs a kernel of its own
                found = map(self.scaled_grad_norm, grads, factors)
            else:
                found = torch.stack(torch._foreach_norm(grads, 2, torch.float32)) * torch.stack(factors)
            norms.update(zip((parameter.p for parameter in parameters), found, strict=True))
        return torch.stack([norms[parameter.p] for parameter in self.parameters])

    def __call__(self, batch):
        [tokens_BT], [targets_BT] = batch
        with self.autocast:
            loss = self.model(tokens_BT, targets_BT)
        loss.backward()
        norms = self.grad_norms()
        norm = torch.linalg.vector_norm(norms)
        self.update((self.max_norm / (norm + 1e-6)).clamp(max=1.0))
        return torch.cat((torch.stack((loss.detach(), norm)), norms))

    @torch.no_grad()
    def update(self, clip):
        """Move all weights by their gradients times `clip`, and forget these."""
        steps = [parameter.state["step"] for parameter in self.parameters]
        torch._foreach_add_(steps, 1)
        bias_corrections = 1 - self.betas ** steps[0]
        rates = {id(group): torch.as_tensor(group["lr"], device=clip.device) for group in self.groups}
        for p, leaf, factor, state, group, settings in self.parameters:
            scaled = None if leaf.dtype == p.dtype else leaf.detach()
            self.clip_and_update(p, leaf.grad, factor, scaled, state["exp_avg"], state["exp_avg_sq"], clip,
                                 rates[id(group)], *settings, 1 - self.betas, bias_corrections)
            leaf.grad = None
