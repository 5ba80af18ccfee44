"""The journey from a proxy to its target: where the two differ, and what it costs before it is paid for."""

import math
import os
from dataclasses import replace
from typing import NamedTuple

import torch

from configure import SETTINGS, TUNED, UserError, check_setting, names_in, parse_value
from model import Block
from scaling.sweep import vocab_size_of
from scaling.verify import resized
from train import train
from training.device import peak_memory, select_device
from training.model_size import model_size

# Where a proxy may differ from its target besides width and depth, if it is asked to
PROXY_AXES = ("steps", "context", "batch", "batch_start", "batch_ramp_tokens", "head_dim", "vocab_size",
              "max_tokens")
# Octaves by which the best lr moves when the axis doubles (results/README.md, "Batch, context and steps")
DRIFT = {"batch": 0.30, "context": 0.12, "steps": -0.11}
SP_DRIFT = {"width": -0.90, "depth": -0.44}  # in the standard parametrization
TIMED_STEPS = 8  # of each size, for the minutes; the first of them warm up
GIB = 2**30


class Size(NamedTuple):
    """A model's shape, and how often it is trained."""
    name: str
    config: object  # a Config
    counts: dict  # {what for: the most trainings}

    @property
    def trainings(self):
        return sum(self.counts.values())


# The proxy

def parse_changes(text):
    """{setting: value} of steps:300,context:256, in which the proxy is to differ from its target. Raises
    UserError."""
    changes = {}
    for item in text.split(",") if text else ():
        name, _, value = item.partition(":")
        if name in ("width", "depth"):
            raise UserError(f"proxy: {name} is given by --proxy_{name}, got {item}")
        if name not in PROXY_AXES:
            raise UserError(f"proxy must be NAME:VALUE of some of {', '.join(PROXY_AXES)}, got {item}")
        changes[name] = check_setting(name, parse_value(name, value), "proxy: ")
    return changes


def make_proxy(target, width=0, depth=0, changes=None):
    """The Config of the proxy of `target`: of the base shape, or of this width and depth; everything else,
    but for `changes`, is the target's. Raises UserError."""
    if target.init_from is not None:
        raise UserError("init_from must be none for the target of a search, as no proxy can start from "
                        f"weights of the target's shape, got {target.init_from}")
    changes = changes or {}
    own = replace(target, shard=False, **{name: value for name, value in changes.items() if name != "batch"})
    if "batch" in changes:
        own = replace(own, batch=changes["batch"], micro_batch=None)
    width, depth = width or target.base_width, depth or target.base_depth
    if width % own.head_dim:
        fits = own.head_dim * math.ceil(width / own.head_dim)
        raise UserError(f"proxy_width must be a multiple of the target's head_dim ({own.head_dim}), got "
                        f"{width}; try --proxy_width={fits}, or another --head_dim for both")
    if width > target.width or depth > target.depth:
        raise UserError(f"target must not be smaller than the proxy ({width} x {depth}), got "
                        f"{target.width} x {target.depth}; try --proxy_width and --proxy_depth")
    return resized(own, width, depth)


# What transfers from it, and what does not

def differences(proxy, target):
    """The settings that decide a loss and that are not searched, in which the two differ; first the widths
    and depths."""
    measured = ("width", "depth", "steps")
    others = [name for name in SETTINGS if name not in TUNED and name not in measured and name != "seed"
              and SETTINGS[name].group != "run"]
    return [name for name in (*measured, *others) if getattr(proxy, name) != getattr(target, name)]


def what_is_known(name, proxy, target):
    """Whether settings transfer over the axis `name`, in a few words, and from where that is known."""
    ours, theirs = getattr(proxy, name), getattr(target, name)
    if name in ("width", "depth"):
        return known_of_shape(name, target)
    if name not in DRIFT:
        return "not known to transfer"
    doublings = math.log2(theirs / max(ours, 1))
    text = (f"the best lr moves by about {DRIFT[name]:+.2f} octaves (factors of 2) each time the {name} "
            f"doubles, so by {DRIFT[name] * doublings:+.2f} here; how other settings move is not known")
    if name == "context" and ours < theirs:
        text += ("; a narrow proxy of a shorter context cannot rank settings by what the target learns from "
                 "the longer one, which once cost 0.2 nats at a target")
    if name == "batch" and target.base_batch is None:
        text += "; --base_batch scales lr, decay and beta2 with it"
    return text


def known_of_shape(name, target):
    if target.parametrization == "sp":
        return ("does not transfer in the standard parametrization: the best lr moves by "
                f"{SP_DRIFT[name]:+.2f} octaves (factors of 2) each time the {name} doubles")
    if target.parametrization != "mup":
        return "not known to transfer"
    if name == "width" and target.optimizer == "muon":
        return ("transfers, but for the lr, whose best value moves by -0.19 octaves (factors of 2) each time "
                "the width doubles, with 32 sequences a step; it matters less with more")
    most = {"width": 0.05, "depth": 0.12}[name]
    return ("transfers: in longer runs of widths 64 to 2048 and depths 2 to 64 the best lr moved by at most "
            f"{most} octaves (factors of 2) each time the {name} doubled")


def describe_transfer(proxy, target):
    """A line with the axes on which the two differ, and a line about each."""
    names = differences(proxy, target)
    if not names:
        return ["the proxy is the target: nothing has to transfer"]
    lines = [f"the proxy differs from the target in {', '.join(names)}:"]
    return lines + [f"  {name} {getattr(proxy, name)} -> {getattr(target, name)}: "
                    f"{what_is_known(name, proxy, target)}" for name in names]


# What it costs

def sized(config):
    """`config` with the vocabulary of its tokenizer."""
    data = {name: getattr(config, name) for name in (*names_in("data"), "data_dir", "vocab_size")}
    return replace(config, vocab_size=vocab_size_of(**data))


def training_flops(config):
    """Of one training."""
    return model_size(sized(config)).flops_per_token * config.tokens_before(config.steps)


def describe_shape(config):
    return (f"width {config.width}, depth {config.depth}, {config.steps:,} steps of "
            f"{config.batch} x {config.context} tokens")


def memory_parts(config):
    """{what: bytes} that training `config` takes: all but the activations exactly."""
    config = sized(config)
    size, (_, autocast) = model_size(config), select_device(config)
    moments = 2 * size.parameters
    if config.optimizer == "muon":  # one for a hidden matrix
        moments -= hidden_parameters(config)
    activations = config.pass_batch() * config.context * size.activations_per_token
    return {"weights": 4 * size.parameters, "gradients": 4 * size.parameters, "optimizer": 4 * moments,
            f"activations of {config.pass_batch()} sequences, at the least":
                activations * (2 if autocast._enabled else 4)}


def hidden_parameters(config):
    """Parameters of the hidden matrices."""
    with torch.device("meta"):
        block = Block(config)
    return config.depth * sum(p.numel() for p in block.parameters() if p.dim() == 2)


def format_share(ratio):
    """A ratio for people, before the name of what it is of: 52.1% of, 12.3 times."""
    return f"{ratio:.1%} of" if ratio < 1 else f"{ratio:.3g} times"


def format_bytes(number):
    return f"{number / GIB:.3g} GiB" if number >= GIB / 10 else f"{number / 2**20:.3g} MiB"


def format_seconds(seconds):
    if seconds < 90:
        return f"{seconds:.2g} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def seconds_of(config):
    """(seconds that one training of `config` takes here, without its evaluation; peak memory on a GPU, else
    nan), from a few steps."""
    few = replace(config, steps=TIMED_STEPS, eval_tokens=config.context, eval_every=None,
                  checkpoint_every=None, out=None, sample_tokens=0, wandb=False, log_roles=False,
                  warmup_tokens=None, decay_tokens=None)
    peak_memory(select_device(config)[0])
    result = train(few, quiet=True)
    return config.tokens_before(config.steps) / result.tokens_per_second, result.peak_memory


def describe_plan(sizes, target, name):
    """The lines that say, before anything is trained, what a search trains and what of it reaches the target.
    sizes: [Size], the proxy first. target: a Config, or None. name: the target's, for people."""
    lines, total = [], 0
    for size in sizes:
        flops = size.trainings * training_flops(size.config)
        total += flops
        share = f", {format_share(flops / training_flops(target))} the target's" if target else ""
        purposes = {what: count for what, count in size.counts.items() if count}
        purpose = f" {[*purposes][0]}" if len(purposes) == 1 else ""
        lines.append(f"{size.name:8}{describe_shape(size.config)}: at most {size.trainings} "
                     f"training{'s' * (size.trainings > 1)}{purpose}, {flops:.2e} FLOPs{share}")
        if len(purposes) > 1:
            parts = " + ".join(f"{count} {what}" for what, count in purposes.items())
            lines.append(f"{'':8}{size.trainings} = {parts}")
    if target is None:
        return [*lines, "no --target is named: nothing is verified at a larger size"]
    flops = training_flops(target)
    parameters = model_size(sized(target)).parameters
    lines.insert(0, f"target  {describe_shape(target)}: {name}, {parameters:,} parameters, {flops:.2e} FLOPs")
    trainings = sum(size.trainings for size in sizes)
    lines.append(f"together at most {trainings} trainings, {format_share(total / flops)} the target's FLOPs")
    if total > flops:
        lines[-1] += (": more than the target itself takes; fewer --trials, a smaller --proxy_width or fewer "
                      "steps (--proxy=steps:N) cost less")
    memory = memory_parts(target)
    parts = ", ".join(f"{name} {format_bytes(number)}" for name, number in memory.items())
    lines.append(f"memory of the target: {format_bytes(sum(memory.values()))}: {parts}")
    return lines + describe_transfer(sizes[0].config, target)


def describe_time(sizes, target):
    """The lines about minutes on this machine: a few steps of each size are trained for it, and of the target
    on a GPU."""
    lines, total, last = [], 0.0, None
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # processes, in the last minute
    first = "on this machine:"
    if select_device(sizes[0].config)[0].type == "cpu" and busy > os.cpu_count():
        first = f"on this machine, which is busy ({busy:.1f} processes), so the times may be much too long:"
    for size in sizes:
        seconds, _ = seconds_of(size.config)
        total += seconds * size.trainings
        last = seconds / training_flops(size.config)
        lines.append(f"  {size.name}: {format_seconds(seconds)} each, "
                     f"{format_seconds(seconds * size.trainings)} for {size.trainings}")
    lines.append(f"  together at most {format_seconds(total)}, one after the other and without evaluations")
    if target is None:
        return [first, *lines]
    if select_device(target)[0].type != "cuda":
        seconds = last * training_flops(target)
        lines.append(f"  target: about {format_seconds(seconds)}, if it makes as many FLOPs a second")
        return [first, *lines]
    try:
        seconds, memory = seconds_of(target)
        lines.append(f"  target: {format_seconds(seconds)}, {format_bytes(memory)} of memory, measured")
    except UserError as error:
        lines.append(f"  target: {error}")
    return [first, *lines]
