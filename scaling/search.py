"""Find a proxy's settings at random: python -m scaling.search CONFIG [--trials=64] [--seeds=3] [--out=DIR]

Draws the settings that transfer (the classes of Tensor Programs V, arXiv 2203.03466, table 1: optimizer,
initialization, multipliers; regularization does not, and is left out), trains each draw, then the leading few
on other seeds too: the best of many noisy trials flatters itself. Writes DIR/best.py, which stacks on any
configuration: python train.py config/target.py DIR/best.py. Also --space=lr,readout_std (only these are
drawn), --target=CONFIG (tuning as a share of its FLOPs), --stack=K. Interrupted, the same command goes on.
"""

import math
import os
import random
from dataclasses import replace

import torch

from configure import UserError, command, configure
from data import Data, prepare
from data.checkpoints import write
from data.feed import sized
from model import GPT
from scaling.stack import MAY_DIFFER
from scaling.sweep import processes, run, trials
from scaling.words import words_of

SPACE = {  # setting: values, all as likely
    "lr": [2 ** (-i / 2) for i in range(12, 21)],
    "embedding_lr_mult": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
    "readout_lr_mult": [0.25, 0.5, 1.0, 2.0, 4.0, 8.0],
    "norm_lr_mult": [0.03, 0.1, 0.3, 1.0, 3.0],
    "embedding_std": [0.02, 0.1, 0.3, 1.0],
    "hidden_std": [0.25, 0.5, 1.0, 2.0],
    "readout_std": [0.125, 0.25, 0.5, 1.0, 2.0],
    "zero_residual_out": [False, True],
    "zero_query": [False, True],
    "embedding_mult": [0.5, 1.0, 2.0, 4.0],
    "logit_mult": [0.5, 1.0, 2.0, 4.0],
    "attention_mult": [0.25, 0.5, 1.0, 2.0],
    "beta1": [0.8, 0.9, 0.95],
    "beta2": [0.9, 0.95, 0.98, 0.99],
    "warmup": [0.02, 0.05, 0.1, 0.2],
}
LEADERS = 5


def draws(config, space, count):
    """`count` different configurations, the first being `config` itself: a search should not end below it."""
    chooser, found = random.Random(config.seed), [config]
    while len(found) < count:
        drawn = replace(config, **{name: chooser.choice(values) for name, values in space.items()})
        found += [drawn] if drawn not in found else []
    return found


def search(config, count, seeds, folder, space=SPACE, stack=1):
    """(the best Config, rows of its seeds, rows of all trials). Raises UserError, KeyboardInterrupt."""
    if count > (possible := math.prod(map(len, space.values()))):
        raise UserError(f"trials: got {count}, takes {possible} or fewer with this space")
    drawn = draws(trials(config, {})[0], space, count)

    def loss(row):
        return math.inf if row["diverged"] else row["val_loss"]

    rows = run(drawn, folder, stack)
    order = sorted(range(count), key=lambda i: loss(rows[i]))[:LEADERS]
    again = [replace(drawn[i], seed=config.seed + k) for i in order for k in range(seeds)]
    found = run(again, folder, stack)
    finals = [found[i * seeds:(i + 1) * seeds] for i in range(len(order))]
    means = [sum(map(loss, final)) / seeds for final in finals]
    best = min(range(len(order)), key=means.__getitem__)
    known = {row["config"]: row for row in rows + found}
    return drawn[order[best]], finals[best], list(known.values())


def best_file(config, rows, count):
    """The text of best.py: everything that transfers, drawn or not."""
    losses = [row["val_loss"] for row in rows]
    return (f'"""The best of {count} random trials at width {config.width}, depth {config.depth}.\n\n'
            f"Validation loss {sum(losses) / len(losses):.4f}, the mean of {len(losses)} seeds from "
            f'{min(losses):.4f} to {max(losses):.4f}.\n"""\n\n'
            + "".join(f"{name} = {value!r}\n" for name, value in vars(config).items()
                      if name in MAY_DIFFER - {"seed"}))


def flops(config):
    """Training FLOPs of a configuration, of a model without weights."""
    shape = sized(config, Data(prepare(config)))
    with torch.device("meta"):
        per_token = GPT(shape).flops_per_token()
    return per_token * config.batch * config.context * config.steps


def main(argv):
    own = {"trials": 64, "seeds": 3, "out": "out/search", "stack": 1, "space": ",".join(SPACE), "target": ""}
    words, axes = words_of(argv, own, __doc__)
    config, names = configure(words), own["space"].split(",")
    if axes or not {*names} <= {*SPACE}:
        raise UserError(f"space: got {', '.join([*axes, *names])}, takes some of {', '.join(SPACE)}")
    # the target trains on the proxy's data, for as long, unless its file says otherwise
    target = configure([*words, own["target"]]) if own["target"] else None
    space = {name: SPACE[name] for name in names}
    try:
        best, finals, rows = search(config, own["trials"], own["seeds"], own["out"], space, own["stack"])
    except KeyboardInterrupt:
        print(f"{own['out']}: stopped; the same command goes on")
        return 130
    if processes()[0] > 0:
        return
    path, text = os.path.join(own["out"], "best.py"), best_file(best, finals, own["trials"])
    write(path, text)
    spent = sum(row["flops"] for row in rows if row["flops"] == row["flops"])
    losses = sorted(row["val_loss"] for row in rows if not row["diverged"])
    print(f"{path}:\n{text}\n{len(rows)} trials: best {losses[0]:.4f}, median {losses[len(losses) // 2]:.4f}")
    print(f"tuning took {spent:.2e} FLOPs", end="\n" * (not target))
    if target:
        print(f", {spent / flops(target):.1%} of one training of {own['target']}, {flops(target):.2e}")


if __name__ == "__main__":
    command(main)
