"""Measure how fast a configuration trains: python -m scaling.bench CONFIG [--name=value ...]
what it costs to reach a validation loss: python -m scaling.bench CONFIG --loss=NATS [--name=value ...]
or how fast a trained model writes: python -m scaling.bench --sample=RUN_DIR [--name=value ...]

The first, under torchrun on all processes together, prints tokens per second (median over windows of half a
second, and their range), milliseconds a step, the share of the device's peak (MFU), memory, the time to a
first step. The second trains CONFIG and prints the seconds, tokens and FLOPs until an evaluation (each
--eval_every steps, by default 20 in a run) finds that loss or less: seconds from the start of set-up,
compiling included, evaluations left out. The third takes a run or a Hugging Face model: --sample_tokens
tokens, the likeliest each time, after each of --samples prompts of 8 tokens.
"""

import functools
import math
import time
from dataclasses import replace

import torch

from configure import SETTINGS, UserError, configure
from scaling.cli import command, parse_options, reject_unused
from train import train
from training.device import GIB, peak_flops, precision_name, select_device, use_sensible_threads
from training.distributed import init_distributed, rank, world_size
from training.pretrained import load
from training.sample import faster_on_gpu

SECONDS = 8  # of steps that are timed
EVALUATIONS = 20  # in a run to a loss
PROMPT_TOKENS = 8
ROUGH_STEPS = 13  # of a first run that says how many steps that is
# Settings that change nothing: of the first command, and of a run to a loss
UNUSED_FOR_LOSS = {"checkpoint_every", "out", "prompt", "samples", "sample_tokens", "temperature", "top_k",
                   "wandb"}
UNUSED_FOR_SPEED = UNUSED_FOR_LOSS | {"steps", "eval_every", "eval_tokens"}
USED_BY_SAMPLING = {"samples", "sample_tokens", "seed", "device", "precision"}


def bench(config):
    """{name: text}: what a training run measures of its own speed. Losses are not looked at."""
    config = replace(config, eval_every=None, eval_tokens=config.context, checkpoint_every=None, out=None,
                     sample_tokens=0, wandb=False)
    if config.batch_start is not None:  # the whole batch, in the passes that it is ramped up in
        config = replace(config, micro_batch=config.pass_batch(world_size()), batch_start=None,
                         batch_ramp_tokens=None)
    start = time.perf_counter()
    train(replace(config, steps=1), quiet=True)
    first_step_seconds = time.perf_counter() - start
    rough_speed = train(replace(config, steps=ROUGH_STEPS), quiet=True).tokens_per_second
    tokens_per_step = config.batch * config.context
    steps = ROUGH_STEPS + int(SECONDS * rough_speed / tokens_per_step)
    result = train(replace(config, steps=steps), quiet=True)

    device, _ = select_device(config)
    peak, speed = peak_flops(config, device), result.tokens_per_second
    # The first rows are from before the step was compiled, the last is from a short window
    speeds = sorted({row["tokens_per_second"] for row in result.history[3:-1]})
    mfu, memory = "-", "-"
    if peak is not None:
        mfu = f"{speed * result.model.flops_per_token() / peak:.1%}"
    if device.type == "cuda":
        memory = f"{result.peak_memory / GIB:.1f}"
    return {"tokens/s": f"{speed:,.0f}", "from": f"{speeds[0]:,}", "to": f"{speeds[-1]:,}",
            "ms/step": f"{1000 * tokens_per_step / speed:.2f}", "MFU": mfu, "GiB": memory,
            "first step, s": f"{first_step_seconds:.1f}"}


def cost_of_loss(config, loss):
    """{name: text}: what a run of `config` spent until an evaluation found `loss`, in nats, or less. Raises
    UserError where none did, with the lowest."""
    config = replace(config, eval_every=config.eval_every or max(1, config.steps // EVALUATIONS),
                     checkpoint_every=None, out=None, sample_tokens=0, wandb=False)
    start, clock = time.perf_counter(), []

    def read_clock(losses):
        clock.append(time.perf_counter() - start)

    result = train(config, quiet=True, stop_early={1: read_clock})
    seconds, before = clock[0], None
    for row in result.history:
        if before is not None and before["step"]:  # the first step is in the clock
            seconds += (row["tokens"] - before["tokens"]) / row["tokens_per_second"]
        before = row
        if row.get("val_loss", math.inf) <= loss:
            flops = row["tokens"] * result.model.flops_per_token()
            return {"seconds": f"{seconds:.4g}", "step": f"{row['step']:,}", "tokens": f"{row['tokens']:,}",
                    "FLOPs": f"{flops:.2e}", "loss": f"{row['val_loss']:.4f}"}
    raise UserError(f"loss: no evaluation in {config.steps} steps found {loss:g} or less; the lowest was "
                    f"{result.best_val_loss:.4f}. Give more steps, or a higher loss")


def bench_sampling(source, config):
    """{what writes: tokens per second in all texts together} for the model `source`."""
    device, autocast = select_device(config, training=False)
    model, tokenizer = load(source, device)
    n = min(config.sample_tokens, model.config.context - PROMPT_TOKENS)
    generator = torch.Generator().manual_seed(config.seed)
    prompts = torch.randint(tokenizer.eot, (config.samples, PROMPT_TOKENS), generator=generator).tolist()

    def write(graphed):
        with autocast:
            for _ in model.generate(prompts, n, temperature=0, graphed=graphed):
                pass

    writers = {f"this, {precision_name(autocast)}": functools.partial(write, None)}
    if graphed := faster_on_gpu(device):
        writers["this, a CUDA graph"] = functools.partial(write, graphed)
    seconds = time_in_turn(writers.values(), device)
    return {name: config.samples * n / s for name, s in zip(writers, seconds, strict=True)}


def time_in_turn(functions, device):
    """The seconds each of `functions` takes: the fastest of 3 rounds in turn, after one to warm up."""
    functions, rounds = [*functions], []
    for _ in range(4):
        rounds.append([])
        for function in functions:
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            rounds[-1].append(time.perf_counter() - start)
    return [min(seconds) for seconds in zip(*rounds[1:], strict=True)]


@command
def main(argv):
    options, _, words = parse_options(argv, {"loss": 0.0, "sample": ""}, __doc__)
    if options["sample"]:
        reject_unused(words, SETTINGS.keys() - USED_BY_SAMPLING, "a benchmark of sampling")
        for name, speed in bench_sampling(options["sample"], configure(words)).items():
            print(f"{name:32}{speed:>12,.0f} tokens/s")
        return
    reject_unused(words, UNUSED_FOR_LOSS if options["loss"] else UNUSED_FOR_SPEED, "this benchmark")
    config = configure(words)
    use_sensible_threads(config)
    init_distributed()
    numbers = cost_of_loss(config, options["loss"]) if options["loss"] else bench(config)
    if rank() == 0:
        print("".join(f"{name:>15}" for name in numbers))
        print("".join(f"{number:>15}" for number in numbers.values()))
