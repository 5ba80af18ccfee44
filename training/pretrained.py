"""Weights to start from, which another run has trained: `init_from`."""

import os
from typing import NamedTuple

from configure import FUNCTION_SETTINGS, UserError, run_of
from training.checkpoint import load_weights, read_checkpoint, settings_of_checkpoint


class Pretrained(NamedTuple):
    """The weights of a model, and what they mean."""
    path: str  # of the file they are from
    settings: dict  # {setting: value}: FUNCTION_SETTINGS, at the least
    weights: dict  # {parameter name: tensor}
    tokenizer: str  # the sha256 of its ranks


def checkpoint_path(source):
    """The checkpoint that `source` stands for: itself; or of a run directory the one of the lowest validation
    loss, or the newest. Raises UserError."""
    if source.endswith(".pt"):
        return source
    for name in ("best.pt", "last.pt"):
        path = os.path.join(source, name)
        if os.path.exists(path):
            return path
    raise UserError(f"init_from: {source} holds no best.pt and no last.pt; takes a run that has saved one")


def read_pretrained(source):
    """The Pretrained of a run directory, or of a checkpoint in one. Raises UserError."""
    path = checkpoint_path(source)
    if not os.path.exists(path):
        raise UserError(f"init_from: got {source}, takes a checkpoint, such as {run_of(source)}/last.pt")
    checkpoint = read_checkpoint(path)
    return Pretrained(path, settings_of_checkpoint(checkpoint), checkpoint["model"],
                      checkpoint["tokens"]["tokenizer"])


def check_same_function(config, pretrained):
    """Raises UserError where weights of `pretrained` would compute something else in a model of `config`."""
    for name in FUNCTION_SETTINGS:
        wanted, actual = getattr(config, name), pretrained.settings[name]
        if wanted == actual or name == "vocab_size":  # which may be left to the tokenizer: load() compares
            continue
        if name == "context" and (config.position == "rotary" or wanted < actual):
            continue
        raise UserError(f"{name}: got {wanted}, but {pretrained.path} was trained with {actual}; "
                        "takes the same with init_from")


def load_pretrained(pretrained, config, dataset, model):
    """Copy the weights into `model`, which is to be trained on `dataset`. Raises UserError."""
    path, weights = pretrained.path, dict(pretrained.weights)
    if dataset.hashes["tokenizer"] != pretrained.tokenizer:
        raise UserError(f"tokenizer: got {config.tokenizer}, whose tokens are not those that {path} was "
                        f"trained on; takes --tokenizer={run_of(config.init_from)}")
    rows = len(weights["token_embedding.weight"])
    if model.config.vocab_size != rows:
        raise UserError(f"vocab_size: got {model.config.vocab_size}, but {path} has {rows} rows; takes those")
    if "position_embedding.weight" in weights:
        weights["position_embedding.weight"] = weights["position_embedding.weight"][:config.context]
    load_weights(path, {"model": weights}, model)
