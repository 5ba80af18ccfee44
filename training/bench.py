"""Measure how fast a configuration trains: python -m training.bench CONFIG [--name=value ...]

Under torchrun, on all processes together. Prints tokens per second (median over windows of half a second, and
their range), milliseconds a step, the share of the device's peak (MFU), memory, the time to a first step.
"""

# A command on top of train.py: nothing imports it

import signal
import sys
import time
from dataclasses import replace

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while torch is imported; run_cli ends it

from configure import configure, run_cli
from train import train
from training.device import GIB, peak_flops, select_device
from training.distributed import init_distributed, rank

SECONDS = 8  # of steps that are timed
ROUGH_STEPS = 13  # of a first run that says how many steps that is


def bench(config):
    """{name: text}: what a training run measures of its own speed. Losses are not looked at."""
    config = replace(config, eval_every=None, eval_tokens=config.context, checkpoint_every=None, out=None,
                     sample_tokens=0, wandb=False)
    start = time.perf_counter()
    train(replace(config, steps=1), quiet=True)
    first_step_seconds = time.perf_counter() - start
    rough_speed = train(replace(config, steps=ROUGH_STEPS), quiet=True).tokens_per_second
    tokens_per_step = config.batch * config.context
    steps = ROUGH_STEPS + int(SECONDS * rough_speed / tokens_per_step)
    result = train(replace(config, steps=steps), quiet=True)
    return summarize(config, result, first_step_seconds)


def summarize(config, result, first_step_seconds):
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
            "ms/step": f"{1000 * config.batch * config.context / speed:.2f}",
            "MFU": mfu, "GiB": memory, "first step, s": f"{first_step_seconds:.1f}"}


def main(argv):
    if "-h" in argv or "--help" in argv:
        print(__doc__)
        sys.exit()
    config = configure(argv)
    init_distributed()
    numbers = bench(config)
    if rank() == 0:
        print("".join(f"{name:>15}" for name in numbers))
        print("".join(f"{number:>15}" for number in numbers.values()))


if __name__ == "__main__":
    run_cli(main)
