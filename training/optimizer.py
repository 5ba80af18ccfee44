"""The optimizer, and the end of each step: clip the gradients, move the weights, forget the gradients.

ClipAndStep leaves all of it to torch. FusedClipAndStep, for bf16 on one device with `--compile=model`, gives
the same numbers with less memory traffic.
"""

import math
from typing import NamedTuple

import torch

from configure import UserError
from parametrization import matrices_in, param_groups
from training.distributed import full_tensor, world_size
from training.muon import MuonWithAdamW


def build_optimizer(model, capturable=False):
    """The optimizer of `model`, a group for each role: torch's AdamW, or with Muon for the hidden matrices.
    capturable: for use in a CUDA graph."""
    groups = param_groups(model)
    if model.config.optimizer == "muon":
        counts = {p: matrices_in(name) for name, p in model.named_parameters()}
        return MuonWithAdamW(groups, counts, capturable)
    return torch.optim.AdamW(groups, fused=True, capturable=capturable)


def adamw_update(p, grad, exp_avg, exp_avg_sq, lr, weight_decay, eps, betas, bias_corrections):
    """AdamW (arXiv 1711.05101) in place, as torch has it, for code that is compiled or stacked.

    bias_corrections: 1 - beta ** step, for both betas.
    """
    exp_avg.copy_(betas[0] * exp_avg + (1 - betas[0]) * grad)
    exp_avg_sq.copy_(betas[1] * exp_avg_sq + (1 - betas[1]) * grad.square())
    denominator = (exp_avg_sq / bias_corrections[1]).sqrt() + eps
    p.copy_(p - lr * (weight_decay * p + exp_avg / bias_corrections[0] / denominator))


def clip_gradients(model, max_norm):
    """Clip the gradients of all parameters together, in place, to max_norm (0: not at all). Returns the
    global gradient norm before that, and the norm of each parameter's gradient, (parameters,), in the order
    of model.parameters(). Raises UserError where a parameter has no gradient."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = [p.grad for p in parameters]
    check_gradients(names, grads)
    grad_norms = torch.stack(torch._foreach_norm(grads))
    grad_norm = torch.linalg.vector_norm(grad_norms)
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm or math.inf, grad_norm)
    return full_tensor(grad_norm), full_tensor(grad_norms)


class ClipAndStep:
    """A call ends a step. It returns the global gradient norm before clipping, and its parts, (parameters,),
    in the order of model.parameters()."""

    def __init__(self, model, optimizer, config):
        self.model, self.optimizer = model, optimizer
        self.names = [name for name, _ in model.named_parameters()]
        self.max_norm = config.grad_clip or math.inf

    def __call__(self):
        grads = [p.grad for p in self.model.parameters()]
        check_gradients(self.names, grads)
        norms = torch.stack(torch._foreach_norm(grads))
        norm = torch.linalg.vector_norm(norms)
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.max_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return full_tensor(norm), full_tensor(norms)

    def close(self):
        """Leave the model as it was found, but for its weights."""


def check_gradients(names, grads):
    """Raises UserError where the parameter of one of `names` got no gradient."""
    missing = [name for name, grad in zip(names, grads, strict=True) if grad is None]
    if missing:
        raise UserError(f"{missing[0]}: got no gradient, as the loss does not depend on it ({len(missing)} "
                        "such parameters); takes a forward pass that uses it, or a model without it")


def scaled_grad_norm(grad, factor):
    return torch.linalg.vector_norm(grad.float() * factor)


def clip_and_update(p, grad, factor, scaled, exp_avg, exp_avg_sq, clip, *settings):
    """One parameter's clipping, AdamW update and bf16 copy: compiled, they are one pass over memory."""
    adamw_update(p, grad.float() * (factor * clip), exp_avg, exp_avg_sq, *settings)
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


class FusedClipAndStep:
    """ClipAndStep in fewer passes over memory.

    Each Linear of a block gets `scaled`, a bf16 copy of factor * weight. The forward pass reads the copy, its
    gradient stays bf16 (so the weight's own is factor * that), and one compiled function per parameter clips,
    moves the fp32 weight and writes the copy anew. What is tuned is passed as tensors, so that one compiled
    code serves all trials. The moments stay in torch's optimizer: checkpoints are the same either way.
    """

    def __init__(self, model, optimizer, config):
        self.groups = optimizer.param_groups
        self.names = [name for name, _ in model.named_parameters()]
        self.one = next(model.parameters()).new_ones(())
        self.betas = self.one.new_tensor(self.groups[0]["betas"])
        self.max_norm = self.one * (config.grad_clip or math.inf)
        self.scaled_grad_norm = torch.compile(scaled_grad_norm, dynamic=False)
        self.clip_and_update = torch.compile(clip_and_update, dynamic=False)
        self.layers = {layer.weight: layer for layer in model.blocks.modules() if hasattr(layer, "scaled")}
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
            factor = layer.factor
            layer.scaled = (factor * p).detach().bfloat16().requires_grad_()
            leaf = layer.scaled
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

    @torch.no_grad()
    def __call__(self):
        norms = self.grad_norms()
        norm = torch.linalg.vector_norm(norms)
        clip = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        steps = [parameter.state["step"] for parameter in self.parameters]
        torch._foreach_add_(steps, 1)
        bias_corrections = 1 - self.betas ** steps[0]
        rates = {id(group): torch.as_tensor(group["lr"], device=norm.device) for group in self.groups}
        for p, leaf, factor, state, group, settings in self.parameters:
            scaled = None if leaf.dtype == p.dtype else leaf.detach()
            self.clip_and_update(p, leaf.grad, factor, scaled, state["exp_avg"], state["exp_avg_sq"], clip,
                                 rates[id(group)], *settings, self.betas, bias_corrections)
            leaf.grad = None
        return norm, norms

    def close(self):
        for layer in self.layers.values():
            layer.scaled = None


def choose_update(model, optimizer, config, autocast):
    """What ends each step. FusedClipAndStep needs one pass a step, as bf16 gradients must not be summed up,
    and the optimizer that build_optimizer() makes: any other is torch's to step."""
    one_pass = world_size() == 1 and not config.shard and config.pass_batch() == config.batch
    groups = optimizer.param_groups
    plain_adamw = type(optimizer) is torch.optim.AdamW and all(
        group["betas"] == groups[0]["betas"] and not group["amsgrad"] and not group["maximize"]
        for group in groups)
    if config.compile == "model" and autocast._enabled and one_pass and plain_adamw:
        return FusedClipAndStep(model, optimizer, config)
    return ClipAndStep(model, optimizer, config)
