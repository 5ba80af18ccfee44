"""What a search draws: the settings that transfer, each with its range or its values. Imports no Optuna.

The classes of Tensor Programs V (arXiv 2203.03466, table 1): optimizer, initialization, multipliers. Decay,
clipping and the schedule are in too: at the few epochs of a proxy they act as part of the optimizer. A number
is drawn evenly in its logarithm; of a beta it is 1 - beta, the reciprocal of the steps that it averages over.
"""

import math
from dataclasses import replace
from typing import NamedTuple

from configure import UserError, check_setting
from scaling.cli import parse_values

EDGE = 0.05  # of a range, on its logarithm: a winner as near as that to an end may lie beyond it


class Range(NamedTuple):
    """The numbers from `low` to `high`; with `complement`, of 1 - setting in place of the setting."""
    low: float
    high: float
    complement: bool = False


class Choice(NamedTuple):
    values: tuple


SPACE = {
    "lr": Range(2**-11, 2**-5),
    "embedding_lr_mult": Range(1.0, 32.0),
    "readout_lr_mult": Range(0.25, 8.0),
    "norm_lr_mult": Range(0.03, 3.0),
    "embedding_std": Range(2**-6, 1.5),
    "hidden_std": Range(0.25, 2.0),
    "readout_std": Range(0.125, 2.0),
    "zero_residual_out": Choice((False, True)),
    "zero_query": Choice((False, True)),
    "embedding_mult": Range(0.5, 4.0),
    "logit_mult": Range(0.5, 4.0),
    "attention_mult": Range(0.25, 2.0),
    "beta1": Range(0.05, 0.3, complement=True),
    "beta2": Range(0.005, 0.1, complement=True),
    "warmup": Range(0.015, 0.3),
    "weight_decay": Range(2**-8, 1.0),
    "grad_clip": Range(0.125, 4.0),
    "schedule": Choice(("cosine", "linear")),
    "final_lr": Range(2**-7, 0.3),
}


def parse_space(text):
    """The part of SPACE that `text` lists: lr,zero_query; a range of one's own as lr:2**-9..2**-6, and values
    as zero_query:true. Raises UserError."""
    space = {}
    for item in text.split(","):
        name, colon, values_text = item.partition(":")
        if name not in SPACE:
            raise UserError(f"space must be some of {', '.join(SPACE)}, got {name}")
        space[name] = SPACE[name]
        if colon:
            space[name] = parse_domain(name, values_text)
    return space


def parse_domain(name, text):
    """A Range or Choice from LOW..HIGH or from one value. Raises UserError."""
    low, dots, high = text.partition("..")
    if not dots:
        return Choice(tuple(parse_values(name, text)))
    if isinstance(SPACE[name], Choice):
        raise UserError(f"space must be {name} or {name}:VALUE, got {name}:{text}")
    low, high = parse_values(name, low)[0], parse_values(name, high)[0]
    complement = SPACE[name].complement
    if complement:
        low, high = 1 - high, 1 - low
    if not 0 < low < high:
        raise UserError(f"space must be {name}:LOW..HIGH with 0 < LOW < HIGH, got {name}:{text}")
    return Range(low, high, complement)


def param_name(name, domain):
    """What the study calls the number that is drawn for a setting."""
    return f"1 - {name}" if isinstance(domain, Range) and domain.complement else name


def distributions(space):
    """{name in the study: Optuna distribution}."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution
    found = {}
    for name, domain in space.items():
        if isinstance(domain, Choice):
            found[name] = CategoricalDistribution(domain.values)
        else:
            found[param_name(name, domain)] = FloatDistribution(domain.low, domain.high, log=True)
    return found


def to_params(config, space):
    """The settings of `config` as a point of the space: the nearest one, where they lie outside."""
    params = {}
    for name, domain in space.items():
        value = getattr(config, name)
        if isinstance(domain, Choice):
            params[name] = value if value in domain.values else domain.values[0]
            continue
        number = 1 - value if domain.complement else value
        params[param_name(name, domain)] = min(domain.high, max(domain.low, number))
    return params


def to_config(config, params, space):
    """`config` with the settings of a point of the space."""
    settings = {}
    for name, domain in space.items():
        value = params[param_name(name, domain)]
        if isinstance(domain, Range):
            value = float(f"{value:.4g}")  # no loss depends on more, and people read and copy it
            if domain.complement:
                value = round(1 - value, 6)
        settings[name] = check_setting(name, value)
    return replace(config, **settings)


def at_edge(config, space):
    """[(setting, "low" or "high")] of the settings of `config` that lie at an end of their range."""
    found = []
    for name, domain in space.items():
        if isinstance(domain, Choice):
            continue
        number = to_params(config, {name: domain})[param_name(name, domain)]
        place = math.log(number / domain.low) / math.log(domain.high / domain.low)
        if place < EDGE or place > 1 - EDGE:
            is_high = (place > 0.5) != domain.complement
            found.append((name, "high" if is_high else "low"))
    return found
