"""Several models of one shape, trained at once: K small models fill a GPU better than one does.

Each keeps its own seed, initialization, learning rates and multipliers; the numbers are those of train(), one
model at a time, but for rounding. What they share is every size: shape, batch, steps and text.
"""

import math
import warnings

import torch
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from configure import UserError
from data import Data, prepare
from data.devices import Replayed
from data.feed import feed, sized
from data.updates import adamw
from model import GPT
from train import Result, evaluate, pick_device, pick_graph, schedule, without

# What stacked configurations may differ in; the others are sizes, or do not change the numbers.
MAY_DIFFER = set("""parametrization depth_alpha lr embedding_lr_mult readout_lr_mult norm_lr_mult
    embedding_std hidden_std readout_std zero_residual_out zero_query embedding_mult logit_mult attention_mult
    weight_decay beta1 beta2 eps grad_clip warmup schedule final_lr seed base_width base_depth
    base_head_dim base_batch base_tokens""".split())


def check(configs):
    """Raises UserError when `configs` cannot be stacked."""
    first = configs[0]
    for name, value in vars(first).items():
        if name not in MAY_DIFFER and any(getattr(config, name) != value for config in configs):
            raise UserError(f"stack: got configurations that differ in {name}; takes one {name} for all")
    for name, only in {"dropout": 0.0, "micro_batch": None, "shard": False}.items():
        if getattr(first, name) != only:
            raise UserError(f"stack: got {name}={getattr(first, name)}, takes {name}={only}")


class Adam:
    """AdamW (arXiv 1711.05101) for stacked parameters, {name: (K, ...)}: K models with K sets of settings."""

    def __init__(self, models, params):
        self.settings, K = {}, len(models)
        device = next(iter(params.values())).device
        names = {id(p): name for name, p in models[0].named_parameters()}
        for groups in zip(*(model.param_groups() for model in models), strict=True):
            rows = torch.tensor([[group[key] for group in groups] for key in ("lr", "weight_decay", "eps")],
                                device=device)
            for p in groups[0]["params"]:
                self.settings[names[id(p)]] = rows.view(3, K, *[1] * p.dim())
        self.betas = torch.tensor([group["betas"] for group in groups], device=device).T  # as all groups have
        self.clip = torch.tensor([model.config.grad_clip or math.inf for model in models], device=device)
        self.first, self.second = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in "12")
        self.steps = torch.zeros((), device=device)

    def step(self, params, grads, factor_K):
        """Updates params in place; returns the gradient norms before clipping, (K,)."""
        self.steps += 1
        norm_K = torch.stack([g.square().flatten(1).sum(1) for g in grads.values()]).sum(0).sqrt()
        clip_K = (self.clip / (norm_K + 1e-6)).clamp(max=1.0)
        grown = 1 - self.betas ** self.steps
        for name, p in params.items():
            lr, decay, eps = self.settings[name]
            factor, clip, *pairs = (x.view(lr.shape) for x in (factor_K, clip_K, *self.betas, *grown))
            adamw(p, clip * grads[name], self.first[name], self.second[name], factor * lr, decay, eps,
                  pairs[:2], pairs[2:])
        return norm_K


def stacked_step(model, adam, params, buffers, batch, factor_K):
    """One optimizer step of all models, in place: (losses, gradient norms), both (K,). batch: (2, B, T) for
    all, or (2, K, B, T). It closes over nothing, so that its compiled code serves every stack of a shape."""
    def loss_of(params, buffers, tokens_BT, targets_BT):
        return functional_call(model, (params, buffers), (tokens_BT, targets_BT))

    text = 0 if batch.dim() == 4 else None
    grads, losses_K = vmap(grad_and_value(loss_of), (0, 0, text, text))(params, buffers, *batch)
    return torch.stack((losses_K, adam.step(params, grads, factor_K)))


def train_stacked(configs):
    """The Results of train(config) for each of `configs`, trained together. Raises UserError."""
    check(configs)
    warnings.filterwarnings("ignore", "There is a performance drop")  # vmap on a CPU; the numbers are right
    config = configs[0]
    device, autocast = pick_device(config)
    data = Data(prepare(config))
    data.check(config.context, config.batch)
    models = [GPT(sized(config, data)).to(device) for config in configs]
    params, buffers = stack_module_state(models)
    params = {name: p.detach() for name, p in params.items()}
    adam, one_text = Adam(models, params), len({config.seed for config in configs}) == 1
    compiled = config.compile and (config.compile != "auto" or device.type == "cuda")
    fast = torch.compile(stacked_step, dynamic=False) if compiled else stacked_step
    factors = torch.tensor([[schedule(config, step) for config in configs] for step in range(config.steps)])
    factors, factor_K = factors.to(device), torch.zeros(len(configs), device=device)

    def step(batch):
        with autocast:
            return fast(models[0], adam, params, buffers, batch, factor_K)

    graph = pick_graph(config, device)
    take_step = Replayed(step, graph, lambda error: without("graph", config, error, print))
    feeds = [feed(data, config, device, 0) for config in configs[:1 if one_text else None]]
    numbers = []
    for factors_K in factors:
        factor_K.copy_(factors_K)
        batch = [next(each)[:, 0] for each in feeds]
        numbers.append(take_step(batch[0] if one_text else torch.stack(batch, 1)))
    numbers = torch.stack(numbers).cpu() if numbers else torch.zeros(0, 2, len(configs))
    results = []
    for k, model in enumerate(models):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(params[name][k])
        result = Result(model, **evaluate(model, data, config, device, autocast))
        result.history = [{"step": i, "train_loss": loss, "grad_norm": norm}
                          for i, (loss, norm) in enumerate(numbers[:, :, k].tolist(), 1)]
        result.diverged = not (math.isfinite(result.val_loss) and numbers[:, :, k].isfinite().all())
        results.append(result)
    return results
