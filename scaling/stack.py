"""Several models of one shape, trained at once: K small models fill a GPU better than one does.

Each keeps its own seed, initialization, learning rates and multipliers; the numbers are those of train(), one
model at a time, but for rounding. What they share is every size: shape, batch, steps and text.
Tensors of all models carry a leading dimension K.
"""

import contextlib
import math
import warnings

import torch
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from configure import TUNED, UserError
from data.loader import TokenDataset, prefetch_batches, with_vocab_size
from data.prepare import prepare
from model import GPT
from parametrization import rows_of_matrices
from train import Result
from training.compile import CudaGraphed, allow_recompiling, fall_back_or_raise, use_cuda_graph
from training.device import batches_on_device, is_compiled, select_device
from training.evaluate import evaluate
from training.muon import MuonWithAdamW, decay_and_move, nesterov, orthogonal_update
from training.optimizer import adamw_update, build_optimizer
from training.schedule import lr_factor

# Settings in which stacked models may differ. All others are sizes, or do not change the numbers.
MAY_DIFFER = frozenset([*TUNED, "seed"])
LEAST = 1e-300  # in place of a beta of 0, whose logarithm is infinite


def check_stackable(configs):
    """Raises UserError when `configs` cannot be trained as one stack."""
    first = configs[0]
    for name, value in vars(first).items():
        if name not in MAY_DIFFER and any(getattr(config, name) != value for config in configs):
            raise UserError(f"stack: the {name} of all trials must be the same")
    alone = {"dropout": 0.0, "micro_batch": None, "batch_ramp_tokens": None, "shard": False,
             "init_from": None}
    for name, only in alone.items():
        if getattr(first, name) != only:
            raise UserError(f"stack: {name} must be {only}, got {getattr(first, name)}; try --stack=1")


def train_stacked(configs, pad_to=1):
    """The Results of train(config) for each of `configs`, trained together. Raises UserError.

    pad_to: fill a smaller stack up to this many models where it is compiled, by repeating the last one: code
    is compiled for one size, and that takes longer than to train a few models in vain."""
    check_stackable(configs)
    first = configs[0]
    device, autocast = select_device(first)
    dataset = TokenDataset(prepare(first))
    dataset.check_fills_batch(first.context, first.batch)
    padded = list(configs)
    if is_compiled(first, device):
        padded += [configs[-1]] * (pad_to - len(configs))
    models = [GPT(with_vocab_size(config, dataset)).to(device) for config in padded]
    numbers = run_steps(models, dataset, device, autocast)
    results = []
    for k, config in enumerate(configs):
        result = Result(models[k], **evaluate(models[k], dataset, config, device, autocast))
        result.history = [{"step": step, "train_loss": loss, "grad_norm": norm}
                          for step, (loss, norm) in enumerate(numbers[:, :, k].tolist(), start=1)]
        finite = math.isfinite(result.val_loss) and bool(numbers[:, :, k].isfinite().all())
        result.diverged = not finite
        results.append(result)
    return results


def run_steps(models, dataset, device, autocast):
    """Train `models`. Returns losses and gradient norms before clipping, on the CPU, (steps, 2, K)."""
    configs = [model.config for model in models]
    first, K = configs[0], len(models)
    params, buffers = stack_models(models)
    compiled = is_compiled(first, device)
    optimizer = StackedOptimizer(models, params, compiled)
    grads_of = losses_and_grads
    if compiled:
        allow_recompiling()
        grads_of = torch.compile(losses_and_grads, dynamic=False)
    lr_factor_K = torch.zeros(K, device=device)  # one tensor for all steps: a CUDA graph reads it

    def step(batch):
        with autocast:
            grads, losses_K = grads_of(models[0], params, buffers, batch)
        return torch.stack((losses_K, optimizer.step(grads, lr_factor_K)))

    take_step = CudaGraphed(step, use_cuda_graph(first, device),
                            lambda error: fall_back_or_raise("graph", first, error, print))
    batches, numbers = stacked_batches(configs, dataset, device), [torch.zeros(0, 2, K, device=device)]
    factors = [[lr_factor(config, step) for config in configs] for step in range(first.steps)]
    with under_vmap(first, device):
        for factors_K in torch.tensor(factors, device=device):
            lr_factor_K.copy_(factors_K)
            numbers.append(take_step(next(batches))[None])
    return torch.cat(numbers).cpu()


class StackedOptimizer:
    """Clips and steps the stacked parameters, {name: (K, ...)}, of K models: AdamW or Muon, with the settings
    that build_optimizer() gives each. One kernel steps a parameter of all models; torch's own AdamW launches
    one for each role of each model, too small to fill a GPU. Raises UserError for any other optimizer."""

    def __init__(self, models, params, compiled):
        optimizers = [build_optimizer(model) for model in models]
        if type(optimizers[0]) not in (torch.optim.AdamW, MuonWithAdamW):
            raise UserError("stack: only AdamW and Muon can be stacked, got "
                            f"{type(optimizers[0]).__name__}; try --stack=1")
        self.config, self.params = models[0].config, params
        self.device = next(iter(params.values())).device
        self.settings = self.stack_settings(models[0], optimizers)
        self.max_norm_K = self.tensor([model.config.grad_clip or math.inf for model in models])
        self.step_count = self.tensor(0.0)
        self.moments = {name: [torch.zeros_like(p)] if "momentum" in self.settings[name] else
                        [torch.zeros_like(p), torch.zeros_like(p)] for name, p in params.items()}
        self.adamw, self.muon = stacked_adamw, stacked_muon
        if compiled:  # for each shape by itself: all parameters as one piece take the compiler twice as long
            self.adamw, self.muon = (torch.compile(step, dynamic=False) for step in (self.adamw, self.muon))

    def tensor(self, numbers):
        return torch.tensor(numbers, device=self.device)

    def stack_settings(self, model, optimizers):
        """{parameter name: {setting: its value for each model, (K, 1, ...)}}; of Muon's, with a momentum."""
        names, settings = {p: name for name, p in model.named_parameters()}, {}
        for groups in zip(*(optimizer.param_groups for optimizer in optimizers), strict=True):
            numbers = {key: [group[key] for group in groups]
                       for key in ("lr", "weight_decay", "eps", "momentum") if key in groups[0]}
            for i, name in enumerate(("beta1", "beta2")):
                numbers[f"1 - {name}"] = [1 - group["betas"][i] for group in groups]  # fp32 would lose digits
                numbers[f"log {name}"] = [math.log(group["betas"][i] or LEAST) for group in groups]
            for p in groups[0]["params"]:
                settings[names[p]] = {key: self.tensor(values).view(-1, *[1] * p.dim())
                                      for key, values in numbers.items()}
        return settings

    @torch.no_grad()
    def step(self, grads, lr_factor_K):
        """Clips the gradients of each model by their global norm and steps it at its lr times lr_factor_K.
        Returns the norms before clipping, (K,)."""
        self.step_count += 1
        norm_K = torch.stack([grad.square().flatten(1).sum(1) for grad in grads.values()]).sum(0).sqrt()
        clip_K = (self.max_norm_K / (norm_K + 1e-6)).clamp(max=1.0)
        for name, p in self.params.items():
            settings, moments, shape = self.settings[name], self.moments[name], (-1, *[1] * (p.dim() - 1))
            clip, factor = clip_K.view(shape), lr_factor_K.view(shape)
            if "momentum" in settings:
                rows = rows_of_matrices(self.config, name, p.size(1))
                self.muon(p, grads[name], clip, factor, *moments, settings, rows)
            else:
                self.adamw(p, grads[name], clip, factor, *moments, settings, self.step_count)
        return norm_K


def stacked_adamw(p, grad, clip, lr_factor, exp_avg, exp_avg_sq, settings, step_count):
    """AdamW, in place, of one parameter of K models, (K, ...)."""
    bias_corrections = [-torch.expm1(step_count * settings[f"log {beta}"]) for beta in ("beta1", "beta2")]
    weights = settings["1 - beta1"], settings["1 - beta2"]
    adamw_update(p, clip * grad, exp_avg, exp_avg_sq, lr_factor * settings["lr"], settings["weight_decay"],
                 settings["eps"], weights, bias_corrections)


def stacked_muon(p, grad, clip, lr_factor, momentum_buffer, settings, rows):
    """Muon, in place, of one parameter of K models, (K, outputs, inputs), of matrices of so many `rows`."""
    direction = nesterov(momentum_buffer, clip * grad, settings["momentum"])
    updates = [orthogonal_update(matrices_KOI) for matrices_KOI in direction.split(rows, dim=1)]
    decay_and_move(p, torch.cat(updates, 1).to(p.dtype), lr_factor * settings["lr"], settings["weight_decay"])


def stack_models(models):
    """(parameters, buffers) of all models, {name: (K, ...)}. The models' own parameters become views of them,
    so that to step the stack is to step the models."""
    params, buffers = stack_module_state(models)
    params = {name: p.detach() for name, p in params.items()}
    for k, model in enumerate(models):
        for name, p in model.named_parameters():
            p.data = params[name][k]
    return params, buffers


def losses_and_grads(model, params, buffers, batch):
    """({parameter name: gradients of all models}, losses (K,)).

    batch: (2, B, T) of tokens and targets for all models, or (2, K, B, T), a text each. The function closes
    over nothing, so that its compiled code serves every stack of a shape.
    """
    def loss_of(params, buffers, tokens_BT, targets_BT):
        return functional_call(model, (params, buffers), (tokens_BT, targets_BT))

    batch_dim = 0 if batch.dim() == 4 else None
    in_dims = (0, 0, batch_dim, batch_dim)
    return vmap(grad_and_value(loss_of), in_dims)(params, buffers, *batch)


def stacked_batches(configs, dataset, device):
    """Yields the batch of each step: (2, B, T) where all seeds are equal, as then all models read the same
    text; else (2, K, B, T)."""
    same_text = len({config.seed for config in configs}) == 1
    streams = []
    for config in configs[:1] if same_text else configs:
        chunks = prefetch_batches(dataset, config, 0, pin_memory=device.type == "cuda")
        streams.append(batches_on_device(chunks, device))
    for batches in zip(*streams, strict=True):
        whole = [batch[:, 0] for batch in batches]  # a step has one pass
        yield whole[0] if same_text else torch.stack(whole, 1)


@contextlib.contextmanager
def under_vmap(config, device):
    """Without the warning that vmap is slow on a CPU: its numbers are right. And with plain attention where
    there is a window, as the fused kernels of CUDA take no mask under vmap."""
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.filterwarnings("ignore", "There is a performance drop")
        if config.window is not None and device.type == "cuda":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield
