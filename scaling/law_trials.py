"""Trials as the laws need them: parameters, tokens, FLOPs and loss of each finished row of sweeps."""

import functools
import json
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from configure import Config
from model import GPT
from parametrization import role_of
from scaling.rows import group, read_rows
from scaling.sweep import shape_of
from scaling.trials import settings_of
from training.model_size import model_size

COUNTS = {"all": "N with embedding and readout", "body": "N without embedding and readout"}


@dataclass(frozen=True)
class Trial:
    """What the laws need of a row. `group`: the settings that are not of size, horizon or seed."""
    config: Config
    group: str
    parameters: dict  # {count: number}, one for each of COUNTS
    tokens: int
    flops: float
    loss: float  # nats a token
    curve: tuple = ()  # training loss along the steps


def count_parameters(config):
    """{count: parameters} of a config whose vocab_size is known, and its training FLOPs a token."""
    size = model_size(config)
    depth = config.depth if config.value_embeddings else 1
    body = size.parameters - outer_parameters(shape_of(replace(config, depth=depth)))
    return {"all": size.parameters, "body": body}, size.flops_per_token


@functools.cache
def outer_parameters(config):
    """Parameters in the embedding and the readout, which no depth changes, and in value embeddings."""
    outer = ("embedding", "value_embedding", "readout")
    with torch.device("meta"):
        model = GPT(config)
    return sum(p.numel() for name, p in model.named_parameters() if role_of(name) in outer)


def vocab_size_of(config, parameters):
    """Rows of the embedding of a model with this number of parameters."""
    if config.vocab_size is not None:
        return config.vocab_size
    one, two = (model_size(replace(config, vocab_size=size)).parameters for size in (1, 2))
    return round(1 + (parameters - one) / (two - one))


def read_trial(row):
    config = Config(**settings_of(row["config"]))
    sized = replace(config, vocab_size=vocab_size_of(config, row["parameters"]))
    numbers, _ = count_parameters(sized)
    free = dict.fromkeys(("width", "depth", "steps", "batch", "seed"))
    group = json.dumps(asdict(config) | free, sort_keys=True)
    return Trial(sized, group, numbers, config.tokens_before(config.steps), row["flops"], row["val_loss"],
                 tuple(row["curve"]))


def finished_trials(folders):
    """The Trials of all rows that have a loss."""
    return [read_trial(row) for row in read_rows(folders) if not row["diverged"] and row["flops"] > 0]


def best_settings(trials):
    """Of each pair (model, tokens) the trials of the setting with the lowest mean loss over its seeds."""
    pairs = group(((trial.config.width, trial.config.depth, trial.tokens), trial) for trial in trials)
    found = []
    for _, own in sorted(pairs.items()):
        settings = group((trial.group, trial) for trial in own)
        found += min(settings.values(), key=lambda same: np.mean([trial.loss for trial in same]))
    return found


def columns(trials, count):
    """Arrays (N, D, FLOPs, loss), a number for each trial."""
    numbers = [(trial.parameters[count], trial.tokens, trial.flops, trial.loss) for trial in trials]
    return np.array(numbers, dtype=float).T
