"""Several models of one shape, trained at once: K small models fill a GPU better than one does.

Each keeps its own seed, initialization, learning rates and multipliers; the numbers are those of train(), one
model at a time, but for rounding. What they share is every size: shape, batch, steps and text.
Tensors of all models carry a leading dimension K.
"""

import contextlib
import math
import warnings

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from configure import TUNED, UserError
from data.loader import TokenDataset, prefetch_batches, with_vocab_size
from data.prepare import prepare
from model import GPT
from parametrization import matrices_in
from train import Result
from training.compile import CudaGraphed, allow_recompiling, fall_back_or_raise, use_cuda_graph
from training.device import batches_on_device, is_compiled, select_device
from training.evaluate import PIECE_TOKENS, summarize
from training.muon import MuonWithAdamW, orthogonal_update
from training.optimizer import adamw_update, build_optimizer
from training.schedule import lr_factor

# Settings in which stacked models may differ. All others are sizes, or do not change the numbers.
MAY_DIFFER = frozenset([*TUNED, "seed"])

LARGEST_BETA = 0.9999  # 1 - beta is computed in fp32 here, which then has 3 digits left; torch has fp64


def check_stackable(configs):
    """Raises UserError when `configs` cannot be trained as one stack."""
    first = configs[0]
    for name, value in vars(first).items():
        if name not in MAY_DIFFER and any(getattr(config, name) != value for config in configs):
            raise UserError(f"stack: got configurations that differ in {name}; takes one {name} for all")
    for config in configs:
        for name in ("beta1", "beta2"):
            if getattr(config, name) > LARGEST_BETA:
                raise UserError(f"stack: got {name}={getattr(config, name)}, takes at most {LARGEST_BETA}: "
                                "beyond it fp32 has no 1 - beta")
    alone = {"dropout": 0.0, "micro_batch": None, "batch_ramp_tokens": None, "shard": False,
             "init_from": None}
    for name, only in alone.items():
        if getattr(first, name) != only:
            raise UserError(f"stack: got {name}={getattr(first, name)}, takes {name}={only}")


class StackedOptimizer:
    """Clipping, then AdamW (arXiv 1711.05101) or Muon, for stacked parameters, {name: (K, ...)}: K models
    with K sets of settings, read from the groups of build_optimizer(). Raises UserError when that builds
    an optimizer that cannot be stacked.
    """

    def __init__(self, models, params):
        optimizers = [build_optimizer(model) for model in models]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        if type(optimizers[0]) not in (torch.optim.AdamW, MuonWithAdamW):
            raise UserError(f"stack: got {type(optimizers[0]).__name__}, takes AdamW or Muon, or --stack=1")
        if any(len({group["betas"] for group in optimizer.param_groups}) > 1 for optimizer in optimizers):
            raise UserError("stack: got groups of different betas, takes one pair for all, or --stack=1")
        self.device = groups[0]["params"][0].device
        self.settings = self.stack_settings(models[0], optimizers)
        self.betas = self.tensor([optimizer.param_groups[0]["betas"] for optimizer in optimizers]).T  # (2, K)
        self.max_norm_K = self.tensor([model.config.grad_clip or math.inf for model in models])
        self.exp_avg = {name: torch.zeros_like(p) for name, p in params.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p) for name, p in params.items()
                           if self.settings[name]["momentum"] is None}
        self.steps = self.tensor(0.0)
        self.adamw, self.muon = adamw_step, muon_step

    def compile(self):
        """Steps through compiled code from now on. Each shape of a parameter is compiled once, by itself:
        as one piece with all parameters and the model it would take the compiler twice as long."""
        self.adamw = torch.compile(adamw_step, dynamic=False)
        self.muon = torch.compile(muon_step, dynamic=False)

    def tensor(self, numbers):
        return torch.tensor(numbers, device=self.device)

    def stack_settings(self, model, optimizers):
        """{parameter name: {setting: its value for each model, (K, 1, ...) to multiply it}}; momentum is None
        where AdamW steps the parameter."""
        settings = {}
        names = {p: name for name, p in model.named_parameters()}
        for groups in zip(*(optimizer.param_groups for optimizer in optimizers), strict=True):
            for p in groups[0]["params"]:
                shape = len(optimizers), *[1] * p.dim()
                its = {key: self.tensor([group[key] for group in groups]).view(shape)
                       for key in ("lr", "weight_decay", "eps")}
                its["momentum"] = None
                if "momentum" in groups[0]:
                    its["momentum"] = self.tensor([group["momentum"] for group in groups]).view(shape)
                settings[names[p]] = its
        return settings

    def step(self, params, grads, lr_factor_K):
        """Clips the gradients of each model by their global norm and updates `params` in place. Returns the
        norms before clipping, (K,)."""
        self.steps += 1
        norm_K = torch.stack([g.square().flatten(1).sum(1) for g in grads.values()]).sum(0).sqrt()
        clip_K = (self.max_norm_K / (norm_K + 1e-6)).clamp(max=1.0)
        bias_corrections = 1 - self.betas ** self.steps
        for name, p in params.items():
            its = self.settings[name]
            shape = its["lr"].shape
            clip, lr = clip_K.view(shape), lr_factor_K.view(shape) * its["lr"]
            if its["momentum"] is None:
                self.adamw(p, grads[name], clip, self.exp_avg[name], self.exp_avg_sq[name], lr,
                           its["weight_decay"], its["eps"], [beta_K.view(shape) for beta_K in self.betas],
                           [correction_K.view(shape) for correction_K in bias_corrections])
            else:
                self.muon(p, grads[name], clip, self.exp_avg[name], lr, its["weight_decay"], its["momentum"],
                          matrices_in(name))
        return norm_K


def adamw_step(p, grad, clip, *state_and_settings):
    """AdamW, in place, of one stacked parameter (K, ...), whose gradient is multiplied by `clip`."""
    adamw_update(p, clip * grad, *state_and_settings)


def muon_step(p, grad, clip, average, lr, weight_decay, momentum, count):
    """Muon, in place, of one stacked parameter (K, count x O, I)."""
    grad = clip * grad
    average.copy_(average + (1 - momentum) * (grad - average))
    direction = grad + momentum * (average - grad)  # Nesterov
    matrices = direction.view(-1, p.size(1) // count, p.size(2))
    update = orthogonal_update(matrices).view(p.shape).to(p.dtype)
    p.copy_(p - lr * (weight_decay * p + update))


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
    params, buffers, numbers = run_steps(padded, models, dataset, device, autocast)
    evaluations = evaluate_stacked(models[0], params, buffers, dataset, first, device, autocast)
    results = []
    for k in range(len(configs)):
        with torch.no_grad():
            for name, p in models[k].named_parameters():
                p.copy_(params[name][k])
        result = Result(models[k], **evaluations[k])
        result.history = [{"step": step, "train_loss": loss, "grad_norm": norm}
                          for step, (loss, norm) in enumerate(numbers[:, :, k].tolist(), start=1)]
        finite = math.isfinite(result.val_loss) and bool(numbers[:, :, k].isfinite().all())
        result.diverged = not finite
        results.append(result)
    return results


@torch.no_grad()
def evaluate_stacked(model, params, buffers, dataset, config, device, autocast):
    """evaluate() of each model of a stack, but for rounding: a list of its dicts."""
    windows = dataset.validation_windows(config.context, config.eval_tokens)
    windows_NT = torch.from_numpy(windows.astype("int64"))
    K = len(next(iter(params.values())))

    def losses_of(params, buffers, windows_BT):
        logits_BTV = functional_call(model, (params, buffers), (windows_BT[:, :-1],)).float()
        targets_BT = windows_BT[:, 1:]
        loss_N = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none")
        return loss_N.view_as(targets_BT).mean(1)

    losses = []
    with under_vmap(config, device), autocast:
        for piece_BT in windows_NT.split(max(1, PIECE_TOKENS // config.context // K)):
            losses.append(vmap(losses_of, (0, 0, None))(params, buffers, piece_BT.to(device)))
    losses_KN = torch.cat(losses, dim=1).double().cpu()
    target_bytes = dataset.target_bytes(windows)
    return [summarize(losses_N, config.context, target_bytes) for losses_N in losses_KN]


def run_steps(configs, models, dataset, device, autocast):
    """Train `models`: (their stacked parameters and buffers, losses and gradient norms on the CPU,
    (steps, 2, K))."""
    first, K = configs[0], len(configs)
    params, buffers = stack_module_state(models)
    params = {name: p.detach() for name, p in params.items()}
    optimizer = StackedOptimizer(models, params)
    lr_factors = [[lr_factor(config, step) for config in configs] for step in range(first.steps)]
    lr_factors = torch.tensor(lr_factors).to(device)
    lr_factor_K = torch.zeros(K, device=device)  # one tensor for all steps: a CUDA graph reads it
    grads_of = losses_and_grads
    if is_compiled(first, device):
        allow_recompiling()
        grads_of = torch.compile(losses_and_grads, dynamic=False)
        optimizer.compile()

    def step(batch):
        with autocast:
            grads, losses_K = grads_of(models[0], params, buffers, batch)
        return torch.stack((losses_K, optimizer.step(params, grads, lr_factor_K)))

    take_step = CudaGraphed(step, use_cuda_graph(first, device),
                            lambda error: fall_back_or_raise("graph", first, error, print))
    batches, numbers = stacked_batches(configs, dataset, device), []
    with under_vmap(first, device):
        for factors_K in lr_factors:
            lr_factor_K.copy_(factors_K)
            numbers.append(take_step(next(batches)))
    if not numbers:
        return params, buffers, torch.zeros(0, 2, K)
    return params, buffers, torch.stack(numbers).cpu()


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
