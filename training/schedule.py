"""The learning-rate schedule: a pure function of the step."""

import math
from dataclasses import replace

from parametrization import horizon_rule


def lr_factor(config, step):
    """The learning rate at `step`, counted from 0, as a fraction of each group's peak. It is never 0 at the
    first step; warmup is linear, and what follows is config.schedule."""
    warmup_steps = round(config.warmup * config.steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step + 1 - warmup_steps) / (config.steps - warmup_steps)  # 1 at the last step
    return AFTER_WARMUP[config.schedule](config, progress, step, warmup_steps)


def decay_start(config):
    """The number of steps after which wsd's decay begins; None for the other schedules, which change from
    their first step to their last."""
    if config.schedule != "wsd":
        return None
    warmup_steps = round(config.warmup * config.steps)
    return config.steps - wsd_decay_steps(config, warmup_steps)


def describe_more_steps(config, steps_before, done):
    """What giving a run `config.steps` in place of `steps_before` does to its learning rate, after `done`
    steps, for people."""
    before = replace(config, steps=steps_before)
    text = f"steps: {config.steps:,} after {steps_before:,}; "
    rates = []
    for sized, step in ((before, done - 1), (config, done)):
        rates.append(sized.lr * horizon_rule(sized) * lr_factor(sized, step))
    if abs(rates[1] / rates[0] - 1) < 0.01:
        return f"{text}the {config.schedule} schedule goes on, with the lr at {rates[1]:.3g}"
    advice = "" if config.schedule == "wsd" else "; --schedule=wsd from the start avoids that"
    return (f"{text}the {config.schedule} schedule is stretched, so the lr goes from {rates[0]:.3g} at step "
            f"{done:,} to {rates[1]:.3g} at step {done + 1:,}{advice}")


def constant(config, progress, step, warmup_steps):
    return 1.0


def linear(config, progress, step, warmup_steps):
    return 1 - (1 - config.final_lr) * progress


def cosine(config, progress, step, warmup_steps):
    """Half a cosine, from 1 to final_lr."""
    return config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2


def wsd(config, progress, step, warmup_steps):
    """Warmup, stable, decay (arXiv 2404.06395): constant, then linear to final_lr over the last
    decay_fraction of all steps. Between warmup and decay it is 1 for any number of steps: the checkpoint
    stable.pt, from there, can be resumed with more steps."""
    decay_steps = wsd_decay_steps(config, warmup_steps)
    left = config.steps - (step + 1)  # 0 at the last step
    if left >= decay_steps:
        return 1.0
    return config.final_lr + (1 - config.final_lr) * left / decay_steps


def wsd_decay_steps(config, warmup_steps):
    return min(round(config.decay_fraction * config.steps), config.steps - warmup_steps)


def inverse_sqrt(config, progress, step, warmup_steps):
    """The square-root decay of arXiv 1706.03762, not below final_lr."""
    return max(config.final_lr, math.sqrt((warmup_steps + 1) / (step + 1)))


def step_decay(config, progress, step, warmup_steps):
    """Two equal drops, after half and three quarters of the steps."""
    if progress <= 0.5:
        return 1.0
    if progress <= 0.75:
        return math.sqrt(config.final_lr)
    return config.final_lr


AFTER_WARMUP = {"cosine": cosine, "linear": linear, "constant": constant, "wsd": wsd,
                "inverse_sqrt": inverse_sqrt, "step": step_decay}

