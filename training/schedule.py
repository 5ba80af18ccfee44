"""The learning-rate schedule: a pure function of the step.

Its clock counts tokens, so that a batch that ramps up does not bend it; with a fixed batch that is the same
as counting steps, to the last bit. Fractions of the steps are turned into the tokens of these steps.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch

from parametrization import batch_and_horizon


class Clock(NamedTuple):
    """Where a step stands in its run, all in tokens."""
    before: int  # of all earlier steps
    done: int  # with its own
    warmup: int  # length of the warmup
    decay_start: int  # where the decay of a schedule with a stable phase begins
    end: int  # where the schedule has come to final_lr


def read_clock(config, step):
    """The Clock of `step`, counted from 0."""
    warmup_steps = round(config.warmup * config.steps)
    stable_steps = config.steps - round(config.decay_fraction * config.steps)
    warmup, end = config.tokens_before(warmup_steps), config.tokens_before(config.steps)
    decay_start = config.tokens_before(stable_steps)
    if config.warmup_tokens is not None:
        warmup = config.warmup_tokens
    if config.decay_tokens is not None:
        end = config.decay_tokens
        decay_start = end - round(config.decay_fraction * end)
    return Clock(config.tokens_before(step), config.tokens_before(step + 1), warmup,
                 max(warmup, decay_start), end)


def lr_factor(config, step):
    """The learning rate at `step`, counted from 0, as a fraction of each group's peak. It is never 0 at the
    first step; warmup is linear, and what follows is config.schedule."""
    clock = read_clock(config, step)
    if clock.before < clock.warmup:
        return min(1.0, clock.done / clock.warmup)
    return AFTER_WARMUP[config.schedule](config, clock)


class LearningRate:
    """Sets the learning rate of every parameter group at each step; the groups keep their ratio.

    in_graph: for an optimizer step that a CUDA graph replays, which runs the captured kernels on the captured
    memory: the rates must be tensors there.
    """

    def __init__(self, optimizer, config, in_graph=False):
        self.groups, self.config = optimizer.param_groups, config
        self.peaks = [group["lr"] for group in self.groups]
        self.tensors = None
        if in_graph:
            self.peaks = torch.tensor(self.peaks, device="cuda")
            self.tensors = self.peaks.clone()
            for group, lr in zip(self.groups, self.tensors, strict=True):
                group["lr"] = lr

    def set(self, step):
        """Set the rates of `step`, counted from 0; returns the hidden matrices' at the base shape."""
        factor = lr_factor(self.config, step)
        if self.tensors is not None:
            torch.mul(self.peaks, factor, out=self.tensors)
            return self.config.lr * factor
        for group, peak in zip(self.groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        return self.config.lr * factor


def decay_start(config):
    """The number of steps after which the decay begins, for a schedule that is stable until then; None for
    the other schedules, which change from their first step to their last."""
    if config.schedule not in STABLE_THEN_DECAY:
        return None
    tokens = read_clock(config, 0).decay_start
    steps = config.steps_for(tokens)
    if config.tokens_before(steps) > tokens:
        steps -= 1
    return min(steps, config.steps)


def describe_more_steps(config, steps_before, done):
    """What `config.steps` in place of `steps_before` does to lr after `done` steps, for people."""
    before = replace(config, steps=steps_before)
    text = f"steps: {config.steps:,} after {steps_before:,}; "

    def lr(sized, step):
        return sized.lr * batch_and_horizon(sized).lr * lr_factor(sized, step)

    is_past_the_same = all(lr(before, step) == lr(config, step) for step in range(done))
    if is_past_the_same or abs(lr(config, done) / lr(before, done - 1) - 1) < 0.01:
        return f"{text}the {config.schedule} schedule goes on, with the lr at {lr(config, done):.3g}"
    advice = "" if config.schedule in STABLE_THEN_DECAY else "; --schedule=wsd from the start avoids that"
    return (f"{text}the {config.schedule} schedule is stretched, so the lr goes from "
            f"{lr(before, done - 1):.3g} at step {done:,} to {lr(config, done):.3g} at step {done + 1:,}"
            f"{advice}")


def progress(clock):
    """The share of the way from the warmup to the end: 1 at the last step, and after the end."""
    if clock.done >= clock.end:
        return 1.0
    return (clock.done - clock.warmup) / (clock.end - clock.warmup)


def constant(config, clock):
    return 1.0


def linear(config, clock):
    return 1 - (1 - config.final_lr) * progress(clock)


def cosine(config, clock):
    """Half a cosine, from 1 to final_lr."""
    return config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * progress(clock))) / 2


def decay_left(clock):
    """(steps of the decay that follow this one, all of its steps), once a stable phase has ended."""
    if clock.done >= clock.end:
        return 0, 1
    step = clock.done - clock.before  # the unit: with a fixed batch both are whole, and no bit is lost
    return (clock.end - clock.done) / step, (clock.end - clock.decay_start) / step


def wsd(config, clock):
    """Warmup, stable, decay (arXiv 2404.06395): constant, then linear to final_lr over the last
    decay_fraction of all steps, or of decay_tokens. Between warmup and decay it is 1 for any number of steps:
    the checkpoint stable.pt, from there, can be resumed with more steps."""
    if clock.done <= clock.decay_start:
        return 1.0
    left, length = decay_left(clock)
    return config.final_lr + (1 - config.final_lr) * left / length


def wsd_sqrt(config, clock):
    """wsd with a decay that goes with 1 - sqrt(t), t being the part of it that is done (arXiv 2405.18392)."""
    if clock.done <= clock.decay_start:
        return 1.0
    left, length = decay_left(clock)
    return config.final_lr + (1 - config.final_lr) * (1 - math.sqrt(1 - left / length))


def inverse_sqrt(config, clock):
    """The square-root decay of arXiv 1706.03762, not below final_lr."""
    first = config.steps_for(clock.warmup)  # step that is not of the warmup
    if config.tokens_before(first) < clock.warmup:
        first += 1
    return max(config.final_lr, math.sqrt(config.tokens_before(first + 1) / clock.done))


def step_decay(config, clock):
    """Two equal drops, after half and three quarters of the steps."""
    if progress(clock) <= 0.5:
        return 1.0
    if progress(clock) <= 0.75:
        return math.sqrt(config.final_lr)
    return config.final_lr


AFTER_WARMUP = {"cosine": cosine, "linear": linear, "constant": constant, "wsd": wsd, "wsd_sqrt": wsd_sqrt,
                "inverse_sqrt": inverse_sqrt, "step": step_decay}
STABLE_THEN_DECAY = ("wsd", "wsd_sqrt")
