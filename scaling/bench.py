"""Measure how fast a configuration trains: python -m scaling.bench CONFIG [--name=value ...]

Under torchrun, on all processes together. Prints tokens per second (median over windows of half a second, and
their range), milliseconds a step, the share of the device's peak (MFU), memory, the time to a first step.
"""

import time
from dataclasses import replace

from configure import configure
from data.devices import peak_flops, pick_device
from data.processes import command, join, processes
from scaling.words import words_of
from train import train

SECONDS = 8  # of steps that are timed


def bench(config):
    """{name: number}: what one training run measures of its own speed. Losses are not looked at."""
    config = replace(config, eval_every=None, eval_tokens=config.context, checkpoint_every=None, out=None,
                     sample_tokens=0, wandb=False)
    begun = time.perf_counter()
    train(replace(config, steps=1), quiet=True)
    first = time.perf_counter() - begun
    per_step = config.batch * config.context
    rough = train(replace(config, steps=13), quiet=True).tokens_per_second
    result = train(replace(config, steps=13 + int(SECONDS * rough / per_step)), quiet=True)
    device = pick_device(config)[0]
    peak, speed = peak_flops(config, device), result.tokens_per_second
    windows = sorted({row["tokens_per_second"] for row in result.history[3:-1]})
    return {"tokens/s": f"{speed:,.0f}", "from": f"{windows[0]:,}", "to": f"{windows[-1]:,}",
            "ms/step": f"{1000 * per_step / speed:.2f}",
            "MFU": f"{speed * result.model.flops_per_token() / peak:.1%}" if peak else "-",
            "GiB": f"{result.peak_memory / 2**30:.1f}" if device.type == "cuda" else "-",
            "first step, s": f"{first:.1f}"}


def main(argv):
    config = configure(words_of(argv, {}, __doc__))
    join()
    numbers = bench(config)
    if processes()[0] == 0:
        print("".join(f"{name:>15}" for name in numbers))
        print("".join(f"{number:>15}" for number in numbers.values()))


if __name__ == "__main__":
    command(main)
