"""The size of a model that is not made: parameters, FLOPs, activations. For checks and forecasts."""

import functools
from dataclasses import replace
from typing import NamedTuple

import torch

from configure import Config, UserError, names_in
from model import GPT, attention_flops


class ModelSize(NamedTuple):
    parameters: int
    flops_per_token: int
    activations_per_token: int


def model_size(config):
    """The ModelSize of the GPT of `config`, without making it. Raises UserError for a shape that no tensor
    can have."""
    return size_of_function(Config(**{name: getattr(config, name) for name in names_in("function")}))


@functools.lru_cache(maxsize=1000)  # a fifth of the time of a small trial; many trials are of one shape
def size_of_function(config):
    """model_size() of a Config with no other settings than those of its function. Each two blocks are alike,
    so they add what two more add to a small model without weights."""
    depth = 2 - config.depth % 2
    try:
        with torch.device("meta"):
            small, larger = (GPT(replace(config, depth=blocks, window=None)) for blocks in (depth, depth + 2))
    except (RuntimeError, TypeError, OverflowError):  # more elements than torch can count
        sizes = {name: getattr(config, name) for name in ("width", "vocab_size", "context", "mlp_ratio")}
        largest = max(sizes, key=lambda name: sizes[name] or 0)
        raise UserError(f"{largest} must be smaller, got {sizes[largest]:.6g}: no tensor can have so many "
                        "elements") from None
    sizes = [(sum(p.numel() for p in model.parameters()), model.flops_per_token(),
              model.activations_per_token()) for model in (small, larger)]
    size = ModelSize(*(first + (config.depth - depth) // 2 * (second - first)
                       for first, second in zip(*sizes, strict=True)))
    saved = attention_flops(replace(config, window=None)) - attention_flops(config)
    return size._replace(flops_per_token=size.flops_per_token - saved)
