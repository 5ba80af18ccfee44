"""Train a GPT: `python train.py CONFIG.py [--name=value ...]`; `python train.py RUN_DIR` goes on with a run.
`train(config)` is the same for scripts and notebooks; `--help` lists every setting."""

import contextlib
import csv
import ctypes
import functools
import importlib.util
import json
import math
import os
import platform
import signal
import threading
import time
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.nn.functional as F
from tqdm import tqdm

from configure import UserError, command, configure
from data import Data, prepare
from model import GPT

# Dense bf16 matrix products, FLOP/s, from the makers' data sheets; the first name that fits counts.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12,
         "RTX 4090": 165e12, "RTX 3090": 71e12}

# What a resumed run may change: anything else would make it another run.
MAY_CHANGE = {"steps", "micro_batch", "eval_every", "eval_tokens", "checkpoint_every", "out", "device",
              "precision", "compile", "wandb", "data_dir", "prompt", "sample_tokens", "temperature", "top_k"}

COLUMNS = "step tokens train_loss val_loss val_error val_bits_per_byte lr grad_norm tokens_per_second".split()


@dataclass
class Result:
    """What train() returns. Losses are mean cross-entropies in nats a token, errors standard errors."""
    model: torch.nn.Module
    val_loss: float = math.nan
    val_error: float = math.nan  # over the evaluation windows
    val_bits_per_byte: float = math.nan
    best_val_loss: float = math.inf
    best_step: int = 0
    tokens_per_second: float = math.nan  # median; evaluations and checkpoints left out
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


def pick_device(config):
    """(device, autocast): where to run, and the context manager that gives its precision."""
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    there = [name for name in count if count[name]]
    device = torch.device(there[0] if config.device == "auto" else config.device)
    if (device.index or 0) >= count[device.type]:
        raise UserError(f"device: got {device}, which this machine has not; takes {' or '.join(there)}")
    bf16 = config.precision == "bf16" or config.precision == "auto" and device.type == "cuda"
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def keep_freed_memory():
    """Have glibc reuse what freed tensors leave: given back, each 4 kB page costs a fault at every step."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of their own for large blocks
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep the top of the heap


@torch.no_grad()
def evaluate(model, data, config, device, autocast):
    """{val_loss, val_error, val_bits_per_byte} on the fixed validation windows."""
    windows_BT = torch.from_numpy(data.windows(config.context, config.eval_tokens).astype("int64"))
    losses = []
    model.eval()
    for rows_BT in windows_BT.split(max(1, 8192 // config.context)):  # not by batch: every run adds up alike
        rows_BT = rows_BT.to(device)
        with autocast:
            logits_BVT = model(rows_BT[:, :-1])[0].float().transpose(1, 2)
        losses.append(F.cross_entropy(logits_BVT, rows_BT[:, 1:], reduction="none").mean(1).cpu())
    model.train()
    losses = torch.cat(losses).double()
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


def write(path, content):
    """Make `path` hold text, or what torch.save makes of anything else: whole, or as it was before."""
    with open(f"{path}.tmp", "wb") as file:
        file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def load_checkpoint(path, config, tokens, model, optimizer):
    """The checkpoint at `path`, loaded into model and optimizer, or None. Raises UserError."""
    if not os.path.exists(path):
        return None
    try:
        checkpoint = torch.load(path, map_location=next(model.parameters()).device, weights_only=True)
        settings, trained_on, step = (checkpoint[name] for name in ("config", "tokens", "step"))
    except Exception as error:
        raise UserError(f"{path}: not a checkpoint: {' '.join(str(error).split())[:120]}") from None
    for name, value in asdict(config).items():
        if name not in MAY_CHANGE and settings.get(name) != value:
            raise UserError(f"{name}: got {value!r}, but {path} was trained with {settings.get(name)!r}; "
                            "takes the same, or another --out")
    if trained_on != tokens:
        raise UserError(f"dataset: {path} was trained on other tokens than {config.dataset} now gives")
    if step > config.steps:
        raise UserError(f"steps: got {config.steps}, takes at least the {step} that {path} has done")
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    except Exception as error:
        raise UserError(f"{path}: does not fit model.py: {' '.join(str(error).split())[:200]}") from None
    return checkpoint


@contextlib.contextmanager
def signals_caught():
    """Yields a list that gets the first SIGINT or SIGTERM, for the loop to end on; a second ends at once."""
    caught, before = [], {}

    def catch(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def compiled(model, config, device, autocast, say):
    """The model through torch.compile, where config.compile asks for it and it works; it says where not."""
    if not config.compile or config.compile == "auto" and device.type != "cuda":
        return model
    fast = torch.compile(model)
    tokens_BT = torch.zeros(config.micro_batch or config.batch, config.context, dtype=torch.long).to(device)
    try:
        with autocast:
            fast(tokens_BT, tokens_BT)[1].backward()
        model.zero_grad()
        return fast
    except Exception as error:
        reason = f"compile: fails here ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        if config.compile is True:
            raise UserError(f"{reason}; takes false") from None
        say(f"{reason}; running without")
        return model


def take_step(model, optimizer, data, config, step, device, autocast):
    """One optimizer step. Returns (mean loss, gradient norm before clipping), one tensor on the device."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * schedule(config, step)  # the groups keep their ratio
    if config.dropout:
        torch.manual_seed(config.seed * 1_000_003 + step)  # no random state to save; 32 bits of it count
    size, total = config.micro_batch or config.batch, torch.zeros((), device=device)
    for first in range(0, config.batch, size):
        batch = data.batch(config.seed, step, config.batch, config.context, slice(first, first + size))
        if device.type == "cuda":
            batch = [x.pin_memory() for x in batch]
        with autocast:
            loss = model(*(x.to(device, non_blocking=True) for x in batch))[1] * (size / config.batch)
        loss.backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad()
    return torch.stack((total, norm))


def train(config, quiet=False):
    """Train what `config` describes and return its Result. With config.out the run is kept there, and goes on
    from its last checkpoint when there is one. Raises UserError."""
    say = (lambda text: None) if quiet else tqdm.write
    data = Data(prepare(config))
    data.check(config.context, config.batch)
    data.windows(config.context, config.eval_tokens)  # refused now, rather than at the first evaluation
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("wandb: got true, but it is not installed; pip install wandb, or --wandb=false")
    device, autocast = pick_device(config)
    keep_freed_memory()
    vocab_size = config.vocab_size or data.vocab_size
    if vocab_size < data.vocab_size:
        raise UserError(f"vocab_size: got {vocab_size}, takes at least the tokenizer's {data.vocab_size}")
    model = GPT(replace(config, vocab_size=vocab_size)).to(device)
    optimizer = torch.optim.AdamW(model.param_groups(), betas=(config.beta1, config.beta2), fused=True)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    result, start, path = Result(model), 0, functools.partial(os.path.join, config.out or "")
    tokens = {name: data.meta[name]["sha256"] for name in ("train", "val", "tokenizer")}
    if config.out:
        if checkpoint := load_checkpoint(path("last.pt"), config, tokens, model, optimizer):
            start = checkpoint["step"]
            result.best_step, result.best_val_loss, result.history = checkpoint["past"]
            say(f"{config.out}: going on from step {start:,}")
        os.makedirs(config.out, exist_ok=True)
        write(path("config.json"), json.dumps(asdict(config), indent=1))
        write(path("table.txt"), f"{model.table()}\n")
    log = None
    if config.wandb:
        import wandb
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        log = wandb.init(project="mup-gpt", name=config.out, dir=config.out, mode=mode, config=asdict(config))
    per_step, flops, peak = config.batch * config.context, model.flops_per_token(), None
    if device.type == "cuda" and config.precision != "fp32":
        peak = next((p for name, p in PEAKS.items() if name in torch.cuda.get_device_name(device)), None)
    say(f"{data.folder}: {len(data.train):,} training tokens, vocabulary {data.vocab_size:,}\n"
        f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}; {config.steps:,} steps of "
        f"{per_step:,} tokens: {config.steps * per_step / len(data.train):.2f} epochs, "
        f"{flops * per_step * config.steps:.2e} FLOPs\n{model.table()}")

    def save(name, step):
        if config.out:
            write(path(name), {
                "step": step, "past": (result.best_step, result.best_val_loss, result.history),
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "tokens": tokens,
                "config": asdict(config), "table": model.table()})

    with (open(path("metrics.csv") if config.out else os.devnull, "w", buffering=1, newline="") as file,
          signals_caught() as caught, tqdm(total=config.steps, initial=start, disable=quiet) as bar):
        metrics = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        metrics.writeheader()
        metrics.writerows(result.history)
        fast = compiled(model, config, device, autocast, say)
        pending, speeds, clock = [], [], time.perf_counter()
        for step in range(start, config.steps + 1):  # `step` steps are done
            last = step == config.steps
            result.stopped = bool(caught) and not last
            evaluating = last or config.eval_every and step % config.eval_every == 0 and not 0 < step == start
            saving = last or result.stopped or config.checkpoint_every and step % config.checkpoint_every == 0
            rows, bad = [{"step": 0, "tokens": 0}] if evaluating and step == 0 else [], []
            if pending and (evaluating or saving or time.perf_counter() - clock > 0.5):
                numbers = torch.stack(pending).tolist()  # waits for the device
                speeds.append(len(pending) * per_step / (time.perf_counter() - clock))
                rows = [{"step": done, "tokens": done * per_step, "train_loss": loss, "grad_norm": norm,
                         "lr": config.lr * schedule(config, done - 1), "tokens_per_second": round(speeds[-1])}
                        for done, (loss, norm) in enumerate(numbers, step + 1 - len(pending))]
                mfu = f", MFU {speeds[-1] * flops / peak:.1%}" if peak else ""
                bar.set_postfix_str(f"loss {numbers[-1][0]:.3f}, lr {rows[-1]['lr']:.1e}, "
                                    f"{speeds[-1]:,.0f} tokens/s{mfu}")
                bar.update(len(pending))
                bad = [row for row in rows if not math.isfinite(row["train_loss"] + row["grad_norm"])]
            if evaluating and not bad:
                numbers = evaluate(model, data, config, device, autocast)
                result.__dict__.update(numbers)
                (rows or [{}])[-1].update(numbers)
                say(f"step {step:,}: validation loss {result.val_loss:.4f} ± {result.val_error:.4f}, "
                    f"{result.val_bits_per_byte:.4f} bits per byte")
            broken = evaluating and not math.isfinite(result.val_loss) or (  # by a step of sound loss
                (evaluating or saving) and not all(p.isfinite().all() for p in model.parameters()))
            bad = bad or rows[-1:] * bool(broken)
            result.history += rows
            metrics.writerows(rows)
            for row in rows if log else ():
                log.log(row, step=row["step"])
            if bad:
                result.diverged = True
                seen = ", ".join(f"{name} {bad[0][name]:.3g}" for name in COLUMNS[2:8] if name in bad[0])
                say(f"diverged at step {bad[0]['step']}: {seen}; try a smaller --lr")
                break
            if evaluating and result.val_loss < result.best_val_loss:
                result.best_step, result.best_val_loss = step, result.val_loss
                save("best.pt", step)
            if saving:
                save("last.pt", step)
            if last or result.stopped:
                break
            if rows or step == start:
                pending, clock = [], time.perf_counter()
            pending.append(take_step(fast, optimizer, data, config, step, device, autocast))
    result.tokens_per_second = sorted(speeds)[len(speeds) // 2] if speeds else math.nan
    if log:
        log.finish()
    if not (result.stopped or result.diverged):
        result.sample = sample(model, data, config, device)
        if config.out:
            write(path("sample.txt"), result.sample + "\n")
    return result


def main(argv):
    config = configure(argv)
    if config.out is None:  # out/NAME, or the first of out/NAME-2, out/NAME-3, ... that is not there
        stem = [os.path.basename(word)[:-3] for word in ["run.py", *argv] if word.endswith(".py")][-1]
        config = replace(config, out=next(name for i in range(1, 10**6) if not os.path.exists(
            name := f"out/{stem}" + f"-{i}" * (i > 1))))
    try:
        result = train(config)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error):
            raise
        raise UserError(f"micro_batch: got {config.micro_batch}, which does not fit in the device's memory; "
                        f"takes a smaller divisor of batch={config.batch}, or a smaller model") from None
    except OSError as error:
        raise UserError(f"out: cannot write {error.filename or config.out}: {error.strerror}") from None
    if result.diverged:
        return 1
    if result.stopped:
        print(f"{config.out}: stopped; `python train.py {config.out}` goes on")
        return 130
    print(f"\n{result.sample}\n\n{config.out}: validation loss {result.val_loss:.4f} nats per token, "
          f"{result.val_bits_per_byte:.4f} bits per byte")


if __name__ == "__main__":
    command(main)
