"""The end of an optimizer step: clip the gradients, move the weights, forget the gradients.

Plain is torch's. Fused, for bf16 on one device with `--compile=model`, is the same with less memory traffic.
"""

import math
from typing import NamedTuple

import torch

from data.processes import processes


def adamw(p, grad, first, second, lr, decay, eps, betas, grown):
    """AdamW (arXiv 1711.05101) in place, as torch has it. grown: 1 - beta ** step, for both betas."""
    first.copy_(betas[0] * first + (1 - betas[0]) * grad)
    second.copy_(betas[1] * second + (1 - betas[1]) * grad.square())
    p.copy_(p - lr * (decay * p + first / grown[0] / ((second / grown[1]).sqrt() + eps)))


class Plain:
    """A call ends a step and returns the gradient norm before clipping, and its parts, one a parameter."""

    def __init__(self, model, optimizer, config):
        self.model, self.optimizer, self.clip = model, optimizer, config.grad_clip or math.inf

    def __call__(self):
        norms = torch.stack(torch._foreach_norm([p.grad for p in self.model.parameters()]))
        norm = torch.linalg.vector_norm(norms)
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if hasattr(norm, "full_tensor"):
            norms, norm = norms.full_tensor(), norm.full_tensor()
        return norm, norms

    def close(self):
        """Leave the model as it was found, but for its weights."""


def norm_of(grad, factor):
    return torch.linalg.vector_norm(grad.float() * factor)


def move(p, grad, factor, scaled, first, second, clip, *settings):
    adamw(p, grad.float() * (factor * clip), first, second, *settings)
    if scaled is not None:
        scaled.copy_(factor * p)


class Row(NamedTuple):
    """What moves one parameter. leaf: what the forward pass reads, and the gradient belongs to."""
    p: torch.Tensor
    leaf: torch.Tensor
    factor: torch.Tensor
    state: dict  # the optimizer's: step, exp_avg, exp_avg_sq
    group: dict
    settings: list


class Fused:
    """The same call. The blocks' Linear layers get `scaled`, factor * weight in bf16, whose gradients stay
    bf16; compiled code reads those, and writes it anew with the weights. It gets what is tuned as tensors."""

    def __init__(self, model, optimizer, config):
        self.groups, self.one = optimizer.param_groups, next(model.parameters()).new_ones(())
        self.betas = self.one.new_tensor(self.groups[0]["betas"])
        self.clip = self.one * (config.grad_clip or math.inf)
        self.norm_of, self.move = (torch.compile(f, dynamic=False) for f in (norm_of, move))
        self.layers = {layer.weight: layer for layer in model.blocks.modules() if hasattr(layer, "scaled")}
        groups = {p: group for group in self.groups for p in group["params"]}
        self.rows, self.kinds = [], {}
        for p in model.parameters():
            leaf, factor, state = p, self.one, optimizer.state[p]
            if layer := self.layers.get(p):
                factor = layer.factor
                leaf = layer.scaled = (factor * p).detach().bfloat16().requires_grad_()
            for name, like in ("step", self.one), ("exp_avg", p.detach()), ("exp_avg_sq", p.detach()):
                state.setdefault(name, torch.zeros_like(like))  # a checkpoint has brought them already
            settings = [self.one * groups[p][name] for name in ("weight_decay", "eps")]
            self.rows.append(Row(p.detach(), leaf, factor, state, groups[p], settings))
            self.kinds.setdefault((leaf.dtype, factor.dim()), []).append(self.rows[-1])

    def norms(self):
        """The norm of each parameter's gradient. One kernel serves a kind, unless its factors are many."""
        norms = {}
        for (_, dim), rows in self.kinds.items():
            grads, factors = [row.leaf.grad for row in rows], [row.factor for row in rows]
            its = map(self.norm_of, grads, factors) if dim else (
                torch.stack(torch._foreach_norm(grads, 2, torch.float32)) * torch.stack(factors))
            norms.update(zip((row.p for row in rows), its, strict=True))
        return torch.stack([norms[row.p] for row in self.rows])

    @torch.no_grad()
    def __call__(self):
        norms = self.norms()
        norm = torch.linalg.vector_norm(norms)
        clip = (self.clip / (norm + 1e-6)).clamp(max=1.0)
        steps = [row.state["step"] for row in self.rows]
        torch._foreach_add_(steps, 1)
        grown = 1 - self.betas ** steps[0]
        rates = {id(group): torch.as_tensor(group["lr"], device=norm.device) for group in self.groups}
        for p, leaf, factor, state, group, settings in self.rows:
            scaled = None if leaf.dtype == p.dtype else leaf.detach()
            self.move(p, leaf.grad, factor, scaled, state["exp_avg"], state["exp_avg_sq"], clip,
                      rates[id(group)], *settings, self.betas, grown)
            leaf.grad = None
        return norm, norms

    def close(self):
        for layer in self.layers.values():
            layer.scaled = None


def pick(model, optimizer, config, autocast):
    """What is to end each step. Fused asks for one pass a step, as bf16 gradients must not be added up, and
    for the optimizer that train() makes: another in its place is torch's to step."""
    alone = processes()[1] == 1 and not config.shard and config.micro_batch in (None, config.batch)
    groups = optimizer.param_groups
    known = type(optimizer) is torch.optim.AdamW and all(
        group["betas"] == groups[0]["betas"] and not group["amsgrad"] and not group["maximize"]
        for group in groups)
    fused = config.compile == "model" and autocast._enabled and alone and known
    return (Fused if fused else Plain)(model, optimizer, config)
