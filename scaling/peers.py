"""Train another project's GPT on the batches of a configuration, to compare:

    python -m scaling.peers nanogpt=FOLDER lr=3e-4,6e-4,1.2e-3 CONFIG [--name=value ...]
    python -m scaling.peers nanochat=FOLDER factor=2,4,8 [plain] CONFIG [--name=value ...]

FOLDER is a clone of github.com/karpathy/nanoGPT or github.com/karpathy/nanochat. Model and optimizer are
theirs; the shape, the tokens of each step and the validation windows are CONFIG's; each rate is a training of
its own. nanoGPT (its commit 3adf61e is known to work): heads of head_dim, no biases, AdamW with beta 0.9 and
0.99, decay 0.1, clipping at 1, 5% warmup, cosine to 10%. nanochat (92d63d4): heads of 128, full windows, its
base_train's rates x sqrt(tokens of a step / 2^19) x the factor, decay 0.28 falling by a cosine, 40 steps of
warmup or a quarter of a short run, the last 65% down to 5%, its momentum schedule; plain: without value
embeddings and smear.

Prints the loss, its standard error, the seconds from the first line of set-up to the last step, evaluation
left out, tokens per second and GiB. On a GPU: bf16, compiled, unless --compile=false.
"""

import contextlib
import importlib
import importlib.util
import math
import os
import statistics
import sys
import time

import torch

from configure import SETTINGS, UserError, configure, names_in
from data.loader import TokenDataset, prefetch_batches, with_vocab_size
from data.prepare import prepare
from scaling.cli import command, parse_option, parse_options, reject_unused
from training.device import (
    GIB,
    batches_on_device,
    is_compiled,
    peak_memory,
    select_device,
    use_sensible_threads,
)
from training.evaluate import evaluate

RATES = {"nanogpt": "lr", "nanochat": "factor"}
SPEED_SECONDS = 0.5  # of a window over which tokens per second are counted
USED = {*names_in("data"), "width", "depth", "head_dim", "batch", "context", "vocab_size", "steps", "seed",
        "device", "precision", "compile", "eval_tokens", "data_dir"}
# What the loop here does not have, and its value then
NOT_HERE = {"micro_batch": None, "batch_ramp_tokens": None, "dropout": 0.0, "shard": False, "init_from": None,
            "window": None}


class NanoGPT:
    """nanoGPT's model and recipe: losses, logits, and updates at the peak rate `lr`."""

    def __init__(self, folder, config, device, autocast, lr, plain):
        path = os.path.join(folder, "model.py")
        spec = importlib.util.spec_from_file_location("nanogpt_model", path)  # ours is called model, too
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        shape = module.GPTConfig(block_size=config.context, vocab_size=config.vocab_size,
                                 n_layer=config.depth, n_head=config.width // config.head_dim,
                                 n_embd=config.width, dropout=0.0, bias=False)
        self.model = module.GPT(shape).to(device)
        self.optimizer = self.model.configure_optimizers(0.1, lr, (0.9, 0.99), device.type)
        self.lr, self.steps, self.warmup = lr, config.steps, round(0.05 * config.steps)
        self.autocast = autocast

    def loss_of(self, model, tokens_BT, targets_BT):
        with self.autocast:
            return model(tokens_BT, targets_BT)[1]

    def logits_of(self, tokens_BT):
        with self.autocast:  # without targets it gives the last position's alone
            return self.model(tokens_BT, torch.zeros_like(tokens_BT))[0]

    def update(self, step):
        if step < self.warmup:
            factor = (step + 1) / (self.warmup + 1)
        else:
            progress = (step - self.warmup) / (self.steps - self.warmup)
            factor = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Nanochat:
    """nanochat's model and recipe: losses, logits, and updates at its rates times `factor`."""

    def __init__(self, folder, config, device, autocast, factor, plain):
        # In place of autocast it has a type of its own, which it reads when it is imported
        os.environ["NANOCHAT_DTYPE"] = "bfloat16" if autocast._enabled else "float32"
        if folder not in sys.path:
            sys.path.insert(0, folder)
        module = importlib.import_module("nanochat.gpt")
        if plain:
            module.has_ve = lambda layer, layers: False
        heads = max(1, config.width // 128)
        shape = module.GPTConfig(sequence_len=config.context, vocab_size=config.vocab_size,
                                 n_layer=config.depth, n_head=heads, n_kv_head=heads, n_embd=config.width,
                                 window_pattern="L")
        with torch.device("meta"):
            self.model = module.GPT(shape)
        self.model.to_empty(device=device)
        self.model.init_weights()
        factor *= math.sqrt(config.batch * config.context / 2**19)
        self.weight_decay, self.plain, self.steps = 0.28, plain, config.steps
        self.optimizer = self.model.setup_optimizer(
            unembedding_lr=0.008 * factor, embedding_lr=0.3 * factor, matrix_lr=0.02 * factor,
            scalar_lr=0.5 * factor, weight_decay=self.weight_decay)
        self.warmup, self.decay_steps = min(40, config.steps // 4), round(0.65 * config.steps)

    def loss_of(self, model, tokens_BT, targets_BT):
        return model(tokens_BT, targets_BT)

    def logits_of(self, tokens_BT):
        return self.model(tokens_BT)

    def lr_factor(self, step):
        if step < self.warmup:
            return (step + 1) / self.warmup
        left = min(1.0, (self.steps - step) / self.decay_steps)
        return left + (1 - left) * 0.05

    def momentum(self, step):
        if step < 400:
            return 0.85 + (0.97 - 0.85) * step / 400
        decayed = max(0.0, 1 - (self.steps - step) / self.decay_steps)
        return 0.97 + (0.90 - 0.97) * decayed

    def update(self, step):
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.lr_factor(step)
            if group["kind"] == "muon":
                group["momentum"] = self.momentum(step)
                share = 0.5 * (1 + math.cos(math.pi * step / self.steps))
                group["weight_decay"] = self.weight_decay * share
        self.optimizer.step()
        if self.plain:
            with torch.no_grad():
                self.model.smear_lambda.zero_()  # where it starts: no smear
        self.optimizer.zero_grad(set_to_none=True)


PEERS = {"nanogpt": NanoGPT, "nanochat": Nanochat}


class Logits(torch.nn.Module):
    """A peer's logits, as a module that evaluate() takes."""

    def __init__(self, peer):
        super().__init__()
        self.forward = peer.logits_of


def train_peer(name, folder, config, rate, plain=False):
    """{name: number}: what a training of the peer `name` at the shape of `config` gave. Raises UserError."""
    start = time.perf_counter()
    device, autocast = select_device(config)
    dataset = TokenDataset(prepare(config))
    dataset.check_fills_batch(config.context, config.batch)
    config = with_vocab_size(config, dataset)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")  # as both projects have it
    try:
        peer = PEERS[name](folder, config, device, autocast, rate, plain)
    except (ImportError, OSError, AttributeError) as error:
        project = "nanoGPT" if name == "nanogpt" else name
        raise UserError(f"{name} must be a clone of github.com/karpathy/{project}, got {folder}, where its "
                        f"code does not load: {error}") from None
    model = torch.compile(peer.model, dynamic=False) if is_compiled(config, device) else peer.model
    chunks = prefetch_batches(dataset, config, 0, pin_memory=device.type == "cuda")
    speed = run_steps(peer, model, batches_on_device(chunks, device), config)
    seconds = time.perf_counter() - start
    numbers = evaluate(Logits(peer), dataset, config, device, contextlib.nullcontext())
    return {**numbers, "seconds": seconds, "tokens_per_second": speed, "peak_memory": peak_memory(device),
            "parameters": sum(p.numel() for p in peer.model.parameters())}


def run_steps(peer, model, batches, config):
    """Trains for config.steps; returns tokens per second, the median over windows of SPEED_SECONDS."""
    speeds, window_start, window_steps = [], time.perf_counter(), 0
    for step in range(config.steps):
        [tokens_BT], [targets_BT] = next(batches)
        loss = peer.loss_of(model, tokens_BT, targets_BT)
        loss.backward()
        peer.update(step)
        window_steps += 1
        last = step == config.steps - 1
        if last or step % 4 == 3 and time.perf_counter() - window_start > SPEED_SECONDS:
            loss.item()  # waits for the device
            seconds = time.perf_counter() - window_start
            speeds.append(window_steps * config.batch * config.context / seconds)
            window_start, window_steps = time.perf_counter(), 0
    return statistics.median(speeds)


def read_command(argv):
    """(peer, its folder, [rate], plain, the words left for configure()). Raises UserError."""
    _, given, words = parse_options(argv, {}, __doc__, takes_axes=True)
    asked = [name for name in PEERS if name in given]
    if len(asked) != 1:
        raise UserError(f"peers: give one of nanogpt=FOLDER and nanochat=FOLDER, got {len(asked)} of them")
    [peer] = asked
    folder = os.path.abspath(os.path.expanduser(given.pop(peer)))
    if not os.path.isdir(folder):
        raise UserError(f"{peer} must be the folder of a clone of the project, got {folder}")
    plain = "plain" in words
    if plain and peer != "nanochat":
        raise UserError(f"plain is for nanochat=FOLDER alone, got it with {peer}")
    rate = RATES[peer]
    if [*given] != [rate]:
        raise UserError(f"{rate}: give {rate}=A,B,C with {peer}, got {' '.join(given) or 'nothing'}")
    rates = [parse_option(rate, text, float) for text in given[rate].split(",")]
    return peer, folder, rates, plain, [word for word in words if word != "plain"]


def check_comparable(config):
    """Raises UserError for what the peers' loop here does not have."""
    for name, only in NOT_HERE.items():
        if getattr(config, name) != only:
            raise UserError(f"{name} must be {only} for peers, got {getattr(config, name)}")
    if config.steps < 1:
        raise UserError(f"steps must be 1 or more for peers, got {config.steps}")


@command
def main(argv):
    peer, folder, rates, plain, words = read_command(argv)
    reject_unused(words, SETTINGS.keys() - USED - NOT_HERE.keys(), f"a training of {peer}")
    config = configure(words)
    check_comparable(config)
    use_sensible_threads(config)
    print(f"{RATES[peer]:>12}{'loss':>10}{'error':>9}{'seconds':>10}{'tokens/s':>12}{'GiB':>7}"
          f"{'parameters':>14}")
    for rate in rates:
        its = train_peer(peer, folder, config, rate, plain)
        print(f"{rate:>12g}{its['val_loss']:>10.4f}{its['val_error']:>9.4f}{its['seconds']:>10.1f}"
              f"{its['tokens_per_second']:>12,.0f}{its['peak_memory'] / GIB:>7.1f}{its['parameters']:>14,}")
