"""The optimizer, a group for each role; and clipping, which comes before it in each step."""

import math

import torch

from configure import UserError
from parametrization import param_groups, rows_of_matrices
from training.distributed import full_tensor
from training.muon import MuonWithAdamW


def build_optimizer(model, capturable=False):
    """The optimizer of a model: torch's AdamW, or with Muon for the hidden matrices. A group for each role.
    capturable: for use in a CUDA graph."""
    groups = param_groups(model)
    if model.config.optimizer != "muon":
        return torch.optim.AdamW(groups, fused=True, capturable=capturable)
    matrix_rows = {p: rows_of_matrices(model.config, name, len(p)) for name, p in model.named_parameters()}
    return MuonWithAdamW(groups, matrix_rows, capturable)


def adamw_update(p, grad, exp_avg, exp_avg_sq, lr, weight_decay, eps, weights, bias_corrections):
    """AdamW (arXiv 1711.05101), in place, for where torch's is slow: compiled, it is one pass over memory
    with what stands around it. The others may be tensors too. weights: 1 - beta, and bias_corrections:
    1 - beta ** step, for both betas."""
    exp_avg.lerp_(grad, weights[0])
    exp_avg_sq.lerp_(grad.square(), weights[1])
    denominator = (exp_avg_sq / bias_corrections[1]).sqrt() + eps
    p.sub_(lr * (weight_decay * p + exp_avg / bias_corrections[0] / denominator))


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


def check_gradients(names, grads):
    """Raises UserError where the parameter of one of `names` got no gradient."""
    missing = [name for name, grad in zip(names, grads, strict=True) if grad is None]
    if missing:
        raise UserError(f"{missing[0]} got no gradient, as the loss does not depend on it ({len(missing)} "
                        "such parameters); use it in the forward pass, or remove it")
