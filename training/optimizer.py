"""The optimizer, a group for each role; and clipping, which comes before it in each step."""

import math

import torch

from configure import UserError
from parametrization import param_groups, rows_of_matrices
from training.distributed import full_tensor
from training.muon import MuonWithAdamW


def build_optimizer(*models, capturable=False):
    """The optimizer of a model, or of several at once (scaling/stack.py): torch's AdamW, or with Muon for the
    hidden matrices. A group for each role of each model, in this order. capturable: for use in a CUDA graph.
    """
    groups = [group for model in models for group in param_groups(model)]
    if models[0].config.optimizer != "muon":
        return torch.optim.AdamW(groups, fused=True, capturable=capturable)
    matrix_rows = {p: rows_of_matrices(model.config, name, len(p))
                   for model in models for name, p in model.named_parameters()}
    return MuonWithAdamW(groups, matrix_rows, capturable)


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
