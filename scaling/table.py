"""What μP does to each size, without training: python -m scaling.table CONFIG width=64,512 [--name=value]

Prints, for each combination of the values, what every role of parameters gets under mup and, beside it, under
sp: the standard deviation at the start, the learning rate, lr x weight decay, Adam's eps; then the factors of
the forward pass. Any setting may have several values; --width=64,512 is the same as width=64,512.
"""

from dataclasses import replace
from itertools import product

import torch

from configure import SETTINGS, configure, names_in
from model import GPT
from parametrization import forward_multipliers, hyperparameters, param_groups
from scaling.cli import command, parse_options, parse_values, reject_unused

TYPICAL_VOCAB_SIZE = 2**12  # where none is set: the tokenizer's is known only when there is text
SHOWN = "mup", "sp"
COLUMNS = ("init std", "lr", "lr*decay", "eps")
# Settings that change nothing in these tables, or, as the parametrization, are shown with all their values
UNUSED = {*names_in("training", "data", "run"), "parametrization", "window", "rotary_base", "norm_eps",
          "vocab_size", "embedding_mult", "zero_residual_out", "zero_query", "init_from", "beta1", "beta2",
          "momentum", "grad_clip"} - {"batch", "batch_start", "batch_ramp_tokens", "steps"}


def describe_role(config, group):
    """{column: text} of COLUMNS for a group of param_groups(), at the shape of `config`."""
    stds = dict.fromkeys(hyperparameters(config, group["role"], p.shape[-1])["std"] for p in group["params"])
    return {"init std": "/".join("-" if std is None else f"{std:.3g}" for std in stds),
            "lr": f"{group['lr']:.3g}", "lr*decay": f"{group['lr'] * group['weight_decay']:.3g}",
            "eps": f"{group['eps']:.3g}"}


def groups_of(config):
    """param_groups() of the model of `config`, which is not made. Raises UserError."""
    with torch.device("meta"):
        return param_groups(GPT(replace(config, vocab_size=config.vocab_size or TYPICAL_VOCAB_SIZE)))


def format_size(config):
    """The tables of all parametrizations at the shape of `config`, side by side."""
    configs = {name: replace(config, parametrization=name) for name in SHOWN}
    by_name = {name: groups_of(sized) for name, sized in configs.items()}
    shape = {"width": config.base_width, "depth": config.base_depth, "head_dim": config.base_head_dim}
    lines = [", ".join(f"{name} {getattr(config, name)} (base: {base})" for name, base in shape.items())]
    lines.append(f"{'role':<12}{'tensors':>8}" + "".join(
        f"{f'{column}, {name}':>14}" for column in COLUMNS for name in SHOWN))
    for groups in zip(*by_name.values(), strict=True):
        cells = [describe_role(sized, group) for sized, group in zip(configs.values(), groups, strict=True)]
        lines.append(f"{groups[0]['role']:<12}{len(groups[0]['params']):>8}" + "".join(
            f"{cell[column]:>14}" for column in COLUMNS for cell in cells))
    for factor in forward_multipliers(config):
        values = (f"{name} x {forward_multipliers(sized)[factor]:.4g}" for name, sized in configs.items())
        lines.append(f"{factor:<12}{', '.join(values)}")
    return "\n".join(lines)


def split_axes(words):
    """(axes, other words) of a command line in which --width=64,512 stands for width=64,512."""
    axes, others = {}, []
    for word in words:
        name, equals, text = word.lstrip("-").partition("=")
        if equals and name in SETTINGS and ("," in text or ".." in text):
            axes[name] = text
        else:
            others.append(word)
    return axes, others


@command
def main(argv):
    axes, words = split_axes(argv)
    _, more, words = parse_options(words, {}, __doc__, takes_axes=True)
    axes = {name: parse_values(name, text) for name, text in (axes | more).items()}
    reject_unused([*words, *(f"--{name}" for name in axes)], UNUSED, "the tables")
    config = configure(words)
    sizes = [replace(config, **dict(zip(axes, values, strict=True))) for values in product(*axes.values())]
    print("\n\n".join(map(format_size, sizes)))
