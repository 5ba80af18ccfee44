"""Train a GPT: `python train.py CONFIG.py [--name=value ...]`; `python train.py RUN_DIR` goes on with a run.
`train(config)` is the same for scripts and notebooks; `--help` lists every setting."""

import contextlib
import functools
import math
import os
import re
import time
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from configure import UserError, configure
from data import Data, alarms, devices, prepare, updates
from data.devices import pick_device
from data.feed import feed, sized
from data.processes import agree, command, first_here, join, processes, signals_caught
from data.runs import Run
from model import GPT, role_of


@dataclass
class Result:
    """What train() returns. Losses are mean cross-entropies in nats a token, errors standard errors."""
    model: torch.nn.Module
    val_loss: float = math.nan
    val_error: float = math.nan  # over the evaluation windows
    val_bits_per_byte: float = math.nan
    best_val_loss: float = math.inf
    best_step: int = 0
    tokens_per_second: float = math.nan  # median; start, evaluations and checkpoints left out
    peak_memory: float = math.nan  # bytes that tensors took on the GPU
    diverged: bool = False  # and so ended early
    stopped: bool = False  # by a signal
    history: list = field(default_factory=list)  # the rows of metrics.csv, as dicts
    sample: str = ""


def schedule(config, step):
    """The learning rate at `step`, counted from 0, as a fraction of each group's peak. The first is not 0."""
    warmup, low = round(config.warmup * config.steps), config.final_lr
    if step < warmup:
        return (step + 1) / warmup
    done = (step + 1 - warmup) / (config.steps - warmup)  # 1 at the last step
    return {"cosine": low + (1 - low) * (1 + math.cos(math.pi * done)) / 2,
            "linear": 1 - (1 - low) * done,
            "constant": 1.0,
            "inverse_sqrt": max(low, math.sqrt((warmup + 1) / (step + 1))),
            "step": 1.0 if done <= 0.5 else math.sqrt(low) if done <= 0.75 else low}[config.schedule]


def due(every, step):
    return every is not None and step % every == 0


def pick_graph(config, device):
    """Whether the optimizer step is to be one CUDA graph."""
    possible = device.type == "cuda" and processes()[1] == 1 and not config.shard
    if config.graph is True and not possible:
        raise UserError("graph: got True, takes false, or one GPU and --shard=false")
    return possible and config.graph is not False


def finite(model):
    """Whether every weight that this process holds is a number."""
    return all(getattr(p, "to_local", lambda p=p: p)().isfinite().all() for p in model.parameters())


@torch.no_grad()
def evaluate(model, data, config, device, autocast):
    """{val_loss, val_error, val_bits_per_byte} on the fixed validation windows."""
    windows_BT = torch.from_numpy(data.windows(config.context, config.eval_tokens).astype("int64"))
    pieces = windows_BT.split(max(1, 8192 // config.context))  # not by batch: every run adds up alike
    losses, (rank, world) = [torch.zeros(len(piece)) for piece in pieces], processes()
    model.eval()
    for i in range(rank, rank + math.ceil(len(pieces) / world) * world, world):  # each process as often
        rows_BT = pieces[i % len(pieces)].to(device)
        with autocast:
            logits_BVT = model(rows_BT[:, :-1]).float().transpose(1, 2)
        loss_B = F.cross_entropy(logits_BVT, rows_BT[:, 1:], reduction="none").mean(1)
        if i < len(pieces):
            losses[i] = loss_B.cpu()
    model.train()
    losses = torch.cat(losses).double()
    if world > 1:
        dist.all_reduce(losses)
    nats = losses.sum().item() * config.context
    error = losses.std().item() / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    return {"val_loss": losses.mean().item(), "val_error": error,
            "val_bits_per_byte": nats / math.log(2) / data.target_bytes(windows_BT.numpy())}


def sample(model, data, config, device):
    """The prompt and what the model writes after it."""
    tokens = data.encode(config.prompt) or [data.eot]
    tokens_BT = model.generate(torch.tensor([tokens], device=device), config.sample_tokens,
                               config.temperature, config.top_k, config.seed)
    return config.prompt + data.decode(tokens_BT[0, len(tokens):].tolist())


def parallel(model, config, device):
    """The model for several processes: a copy each (DDP) or, with config.shard, a part each (FSDP2)."""
    world = processes()[1]
    if config.shard and not dist.is_initialized():
        raise UserError("shard: got True, which cuts the model over processes; takes false, or torchrun")
    if config.shard:
        from torch.distributed.fsdp import fully_shard
        mesh = dist.init_device_mesh(device.type, (world,))
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)  # else evaluation leaves parts whole
    elif world > 1:
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    return model


def without(name, config, error, say):
    """Say that the setting `name` fails here. Raises UserError when it was asked for, not only tried."""
    reason = f"{name}: fails here ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    if getattr(config, name) != "auto":
        raise UserError(f"{reason}; takes false") from None
    say(f"{reason}; running without")


@contextlib.contextmanager
def compiled(model, whole, config, device, autocast, say):
    """Within, training of `model`, not its evaluation, goes through torch.compile, where config.compile asks
    for it and it works. All blocks share one code; "model" compiles all as one: longer, for a faster step
    (and an update of fewer passes over memory, data/updates.py)."""
    parts = [(block, "forward") for block in model.blocks] + [(model, "embed"), (model, "read_out")]
    parts = [(model, "forward")] if config.compile == "model" else parts
    if not config.compile or config.compile == "auto" and device.type != "cuda":
        parts = []
    torch._dynamo.config.recompile_limit = 1000  # code is kept for every shape that a sweep trains
    torch._dynamo.config.accumulated_recompile_limit = 10_000
    for part, name in parts:
        plain = getattr(part, name)
        fast = torch.compile(plain, dynamic=False)
        setattr(part, name, lambda *args, fast=fast, plain=plain, **options: (
            fast if torch.is_grad_enabled() else plain)(*args, **options))
    if parts:
        rows = config.micro_batch or config.batch // processes()[1]
        tokens_BT = torch.zeros(rows, config.context, dtype=torch.long).to(device)
        try:
            with autocast:
                whole(tokens_BT, tokens_BT).backward()
        except Exception as error:
            while parts:
                delattr(*parts.pop())
            without("compile", config, error, say)
        for leaf in (*model.parameters(), *model.buffers()):
            leaf.grad = None
    yield
    for part, name in parts:
        delattr(part, name)


class Step:
    """The optimizer step. A call takes a batch, (2, passes, B, T), and its number, and returns one tensor:
    mean loss, gradient norm before clipping, its parts. `graph`: replayed as a CUDA graph, AdamW included.
    `update`: what ends a step (data/updates.py); None: torch's."""

    def __init__(self, model, optimizer, config, autocast, graph=False, say=print, update=None):
        self.optimizer, self.config = optimizer, config
        update = update or updates.Plain(model, optimizer, config)
        self.run = devices.Replayed(functools.partial(plain_step, model, update, config, autocast), graph,
                                    lambda error: without("graph", config, error, say))
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        if graph:  # tensors, which a replay reads
            self.peaks = torch.tensor(self.peaks, device="cuda")
            self.rates = self.peaks.clone()
            for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate

    def __call__(self, batch, step):
        factor, seed = schedule(self.config, step), self.config.seed * 1_000_003 + step
        if self.config.dropout:  # no random state to save; 32 bits of the seed count
            torch.manual_seed(seed + 7919 * processes()[0])
        if torch.is_tensor(self.peaks):
            torch.mul(self.peaks, factor, out=self.rates)
        else:
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * factor  # the groups keep their ratio
        return self.run(batch)


def plain_step(model, update, config, autocast, batch):
    passes, world, losses = batch.size(1), processes()[1], []
    share = torch.full((), 1 / passes, device=batch.device)
    for i, (tokens_BT, targets_BT) in enumerate(zip(*batch, strict=True)):
        with contextlib.ExitStack() as stack:
            if world > 1 and config.shard:
                model.set_requires_gradient_sync(i == passes - 1)
            elif world > 1 and i < passes - 1:
                stack.enter_context(model.no_sync())
            with autocast:
                losses.append(model(tokens_BT, targets_BT))
            losses[-1].backward(share)
    loss = torch.stack(losses).detach().mean()
    if world > 1:
        dist.all_reduce(loss)
        loss = loss / world
    norm, norms = update()
    return torch.cat((torch.stack((loss, norm)), norms))


def train(config, quiet=False):
    """Train what `config` describes and return its Result. With config.out the run is kept there, and goes on
    from its last checkpoint when there is one. Raises UserError."""
    quiet = quiet or processes()[0] > 0
    say = (lambda text: None) if quiet else tqdm.write
    device, autocast = pick_device(config)
    graph = pick_graph(config, device)
    with first_here():
        data = Data(prepare(config))
    data.check(config.context, config.batch)
    data.windows(config.context, config.eval_tokens)  # refused now, rather than at the first evaluation
    shape = sized(config, data)
    devices.check_memory(shape, device, 2 if autocast._enabled else 4)
    keep = Run(config, {name: data.meta[name]["sha256"] for name in ("train", "val", "tokenizer")}, say)
    devices.keep_freed_memory()
    model = GPT(shape).to(device)
    result, start, whole = Result(model), 0, parallel(model, config, device)
    optimizer = torch.optim.AdamW(model.param_groups(), fused=True, capturable=graph)
    if checkpoint := keep.load(model, optimizer):
        start = checkpoint["step"]
        result.best_step, result.best_val_loss, result.history = checkpoint["past"]
        say(f"{config.out}: going on from step {start:,}")
    batches = feed(data, config, device, start)
    keep.open(model.table(), result.history)
    per_step, flops = config.batch * config.context, model.flops_per_token()
    peak, parts = devices.peak_flops(config, device), []
    say(f"{data.folder}: {len(data.train):,} training tokens, vocabulary {data.vocab_size:,}\n"
        f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}{', bf16' * autocast._enabled}"
        f"{', one CUDA graph a step' * graph}; {config.steps:,} steps of "
        f"{per_step:,} tokens: {config.steps * per_step / len(data.train):.2f} epochs, "
        f"{flops * per_step * config.steps:.2e} FLOPs\n{model.table()}")
    update = updates.pick(whole, optimizer, config, autocast)  # before compiled(): its copies are compiled in
    with (contextlib.closing(keep), compiled(model, whole, config, device, autocast, say),
          signals_caught() as caught,
          tqdm(total=config.steps, initial=start, disable=quiet) as bar):
        take_step = Step(whole, optimizer, config, autocast, graph, say, update)
        pending, speeds, leaps, clock = [], [], alarms.Leaps(config.grad_clip, say), time.perf_counter()
        for step in range(start, config.steps + 1):  # `step` steps are done
            last, warm = step == config.steps, step == start + 3
            signalled, slow = agree(bool(caught), time.perf_counter() - clock > 0.5)
            result.stopped = signalled and not last
            again = checkpoint and step == start  # what is done here was done before
            evaluating = last or due(config.eval_every, step) and not again
            saving = last or result.stopped or due(config.checkpoint_every, step)
            rows, bad = [{"step": 0, "tokens": 0}] if evaluating and step == 0 and not again else [], []
            if pending and (evaluating or saving or slow or warm):
                numbers = torch.stack(pending).tolist()  # waits for the device
                speeds.append(len(pending) * per_step / (time.perf_counter() - clock))
                rows = [{"step": done, "tokens": done * per_step, "train_loss": loss, "grad_norm": norm,
                         "lr": config.lr * schedule(config, done - 1), "tokens_per_second": round(speeds[-1])}
                        for done, (loss, norm, *_) in enumerate(numbers, step + 1 - len(pending))]
                mfu = f", MFU {speeds[-1] * flops / peak:.1%}" if peak else ""
                bar.set_postfix_str(f"loss {numbers[-1][0]:.3f}, lr {rows[-1]['lr']:.1e}, "
                                    f"{speeds[-1]:,.0f} tokens/s{mfu}")
                bar.update(len(pending))
                bad = [row for row in rows if not math.isfinite(row["train_loss"] + row["grad_norm"])]
                parts = numbers[bad[0]["step"] - rows[0]["step"] if bad else -1][2:]
            speeds = speeds if last or not warm else []  # what came before compiled, allocated and captured
            if evaluating and not bad:
                numbers = evaluate(model, data, config, device, autocast)
                result.__dict__.update(numbers)
                (rows or [{}])[-1].update(numbers)
                say(f"step {step:,}: validation loss {result.val_loss:.4f} ± {result.val_error:.4f}, "
                    f"{result.val_bits_per_byte:.4f} bits per byte")
            broken = evaluating and not math.isfinite(result.val_loss)
            if evaluating or saving:  # a step of sound loss can break the weights
                [broken] = agree(broken or not finite(model))
            bad = bad or rows[-1:] * broken
            result.history += rows
            keep.add(rows)
            for row in (row for row in rows if "train_loss" in row):
                leaps.look(row)
            if bad:
                result.diverged = True
                roles = [role_of(name) for name, _ in model.named_parameters()]
                say(alarms.divergence(bad[0], roles, parts, autocast._enabled))
                break
            best = evaluating and result.val_loss < result.best_val_loss
            if best:
                result.best_step, result.best_val_loss = step, result.val_loss
            keep.save(["best.pt"] * best + ["last.pt"] * saving, step,
                      (result.best_step, result.best_val_loss, result.history), model, optimizer)
            if last or result.stopped:
                break
            if rows or step == start:
                pending, clock = [], time.perf_counter()
            pending.append(take_step(next(batches), step))
        update.close()
        result.tokens_per_second = sorted(speeds)[len(speeds) // 2] if speeds else math.nan
        result.peak_memory = devices.peak_memory(device)
        if not (result.stopped or result.diverged):
            result.sample = sample(model, data, config, device)
            keep.write("sample.txt", result.sample + "\n")
    return result


def main(argv):
    config = configure(argv)
    if config.out is None:  # out/NAME, or the first of out/NAME-2, out/NAME-3, ... that is not there
        stem = [os.path.basename(word)[:-3] for word in ["run.py", *argv] if word.endswith(".py")][-1]
        config = replace(config, out=next(name for i in range(1, 10**6) if not os.path.exists(
            name := f"out/{stem}" + f"-{i}" * (i > 1))))
    join()  # after all have chosen the same name
    say = print if processes()[0] == 0 else (lambda text: None)
    try:
        result = train(config)
    except (RuntimeError, MemoryError) as error:
        if processes()[1] > 1 and re.search("gloo|NCCL|onnection", str(error)):
            raise UserError(f"{config.out}: another process died; `train.py {config.out}` goes on") from None
        if "memory" not in str(error):
            raise
        raise UserError(f"micro_batch: got {config.micro_batch}, which does not fit in the device's memory; "
                        f"takes a smaller divisor of batch={config.batch}, or a smaller model") from None
    except OSError as error:
        raise UserError(f"out: cannot write {error.filename or config.out}: {error.strerror}") from None
    if result.diverged:
        return 1
    if result.stopped:
        say(f"{config.out}: stopped; `python train.py {config.out}` goes on")
        return 130
    say(f"\n{result.sample}\n\n{config.out}: validation loss {result.val_loss:.4f} nats per token, "
        f"{result.val_bits_per_byte:.4f} bits per byte")


if __name__ == "__main__":
    command(main)
