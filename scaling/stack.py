"""Several models of one shape, trained at once: K small models fill a GPU better than one does.

Each keeps its own seed, initialization, learning rates and multipliers; the numbers are those of train(), one
model at a time, but for rounding. What they share is every size: shape, batch, steps and text.
Tensors of all models carry a leading dimension K.
"""

import contextlib
import functools
import math
import warnings

import torch
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from configure import TUNED, UserError
from data.loader import TokenDataset, prefetch_batches, with_vocab_size
from data.prepare import prepare
from model import GPT
from train import Result
from training.compile import CudaGraphed, allow_recompiling, fall_back_or_raise, use_cuda_graph
from training.device import batches_on_device, is_compiled, select_device
from training.evaluate import evaluate
from training.muon import MuonWithAdamW
from training.optimizer import build_optimizer, clip_gradients
from training.schedule import lr_factor

# Settings in which stacked models may differ. All others are sizes, or do not change the numbers.
MAY_DIFFER = frozenset([*TUNED, "seed"])


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
    graph = use_cuda_graph(first, device)
    params, buffers = stack_models(models)
    optimizer = build_optimizer(*models, capturable=graph)
    update = functools.partial(clip_and_step, models, optimizer, StreamPerModel(K, device))
    grads_of = losses_and_grads
    if is_compiled(first, device):
        allow_recompiling()
        grads_of = torch.compile(losses_and_grads, dynamic=False)

    def step(batch):
        with autocast:
            grads, losses_K = grads_of(models[0], params, buffers, batch)
        return torch.stack((losses_K, update(grads)))

    take_step = CudaGraphed(step, graph, lambda error: fall_back_or_raise("graph", first, error, print))
    batches, numbers = stacked_batches(configs, dataset, device), [torch.zeros(0, 2, K, device=device)]
    rates = learning_rates(models, optimizer, device)
    with under_vmap(first, device):
        for _ in range(first.steps):
            next(rates)
            numbers.append(take_step(next(batches))[None])
    return torch.cat(numbers).cpu()


class StreamPerModel:
    """A CUDA stream for each of K models: the kernels that clip or step one small model fill few of a GPU's
    processors, so those of all models run side by side. Elsewhere one model comes after the other."""

    def __init__(self, K, device):
        self.K = K
        self.streams = [torch.cuda.Stream(device) for _ in range(K)] if device.type == "cuda" else []

    def call(self, function):
        """[function(k) for each model], each on its own stream; what follows waits for all."""
        if not self.streams:
            return [function(k) for k in range(self.K)]
        current, results = torch.cuda.current_stream(), []
        for k, stream in enumerate(self.streams):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                results.append(function(k))
        for stream in self.streams:
            current.wait_stream(stream)
        return results


def clip_and_step(models, optimizer, per_model, grads):
    """Clip each model's gradients, {parameter name: (K, ...)}, and step them all. Returns the norms before
    clipping, (K,)."""
    for k, model in enumerate(models):
        for name, p in model.named_parameters():
            p.grad = grads[name][k]
    norms = per_model.call(lambda k: clip_gradients(models[k], models[k].config.grad_clip)[0])
    adamw = optimizer
    if isinstance(optimizer, MuonWithAdamW):
        optimizer.muon.step()  # the matrices of all models at once
        adamw = optimizer.adamw
    groups = adamw.param_groups
    owner = {p: k for k, model in enumerate(models) for p in model.parameters()}

    def step_one(k):
        adamw.param_groups = [group for group in groups if owner[group["params"][0]] == k]
        adamw.step()

    per_model.call(step_one)
    adamw.param_groups = groups
    optimizer.zero_grad()
    return torch.stack(norms)


def stack_models(models):
    """(parameters, buffers) of all models, {name: (K, ...)}. The models' own parameters become views of them,
    so that to step them is to step the stack."""
    params, buffers = stack_module_state(models)
    params = {name: p.detach() for name, p in params.items()}
    for k, model in enumerate(models):
        for name, p in model.named_parameters():
            p.data = params[name][k]
    return params, buffers


def learning_rates(models, optimizer, device):
    """Sets the learning rate of every group for the next step each time that it is asked for the next."""
    owner = {p: model.config for model in models for p in model.parameters()}
    groups = optimizer.param_groups
    configs = [owner[group["params"][0]] for group in groups]
    peaks = [group["lr"] for group in groups]
    lr_G = torch.zeros(len(groups), device=device)  # one tensor for all steps: a CUDA graph reads it
    for group, lr in zip(groups, lr_G, strict=True):
        group["lr"] = lr
    rates = [[peak * lr_factor(config, step) for peak, config in zip(peaks, configs, strict=True)]
             for step in range(configs[0].steps)]
    for rates_G in torch.tensor(rates, device=device):
        lr_G.copy_(rates_G)
        yield


def losses_and_grads(model, params, buffers, batch):
    """({parameter name: gradients of all models}, losses (K,)).

    batch: (2, B, T) of tokens and targets for all models, or (2, K, B, T), a text each. The function closes
    over nothing, so that its compiled code serves every stack of a shape.
    """
    def loss_of(params, buffers, tokens_BT, targets_BT):
        return functional_call(model, (params, buffers), (tokens_BT, targets_BT))

    batch_dim = 0 if batch.dim() == 4 else None
    in_dims = (0, 0, batch_dim, batch_dim)
    grads, losses_K = vmap(grad_and_value(loss_of), in_dims)(params, buffers, *batch)
    # Some come transposed, and AdamW's fused kernels read memory in the order of the parameter
    return {name: grad.contiguous() for name, grad in grads.items()}, losses_K


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
