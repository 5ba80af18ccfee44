"""Find a proxy's settings at random: python -m scaling.search CONFIG [--trials=64] [--seeds=3] [--out=DIR]

Draws the settings that transfer (the classes of Tensor Programs V, arXiv 2203.03466, table 1: optimizer,
initialization, multipliers; regularization does not, and is left out) and trains each draw: half from all
of the space, then variants of the leading few, which in the end are trained on other seeds too: the best of
many noisy trials flatters itself. The winner takes the lr at the bottom of its own curve. Writes DIR/best.py,
which stacks on any configuration: python train.py config/target.py DIR/best.py. Also --space=lr,readout_std
(only these are drawn), --target=CONFIG (tuning as a share of its FLOPs), --stack=K. Goes on like a sweep.
"""

import math
import os
import random
from dataclasses import replace

import torch

from configure import UserError, check, configure, read
from data import Data, prepare
from data.checkpoints import write
from data.feed import sized
from data.processes import command
from model import GPT
from scaling.fits import optimum
from scaling.stack import MAY_DIFFER
from scaling.sweep import run, trials, worker
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
LEADERS = 5  # are trained on other seeds too, and are the parents of later rounds
OCTAVES = -1, -1/2, 0, 1/2, 1  # around the lr of the best, for the curve
ROUNDS = 1/2, 3/4, 1  # of the trials, done after each round; the first is purely random
REDRAWN = 1/4  # of a parent's settings, in later rounds


def search(config, count, seeds, folder, space=SPACE, stack=1):
    """(the best Config, rows of its seeds, rows of all trials). Raises UserError, KeyboardInterrupt."""
    if count > (possible := math.prod(map(len, space.values()))):
        raise UserError(f"trials: got {count}, takes {possible} or fewer with this space")

    def loss(row):
        return math.inf if row["diverged"] else row["val_loss"]

    chooser, leaders = random.Random(config.seed), []
    drawn = trials(config, {})  # `config` itself is the first: a search should not end below it
    for share in ROUNDS:
        while len(drawn) < max(1, round(share * count)):
            parent = chooser.choice(leaders) if leaders else drawn[0]
            changed = [name for name in space if not leaders or chooser.random() < REDRAWN]
            draw = replace(parent, **{name: chooser.choice(space[name]) for name in changed})
            drawn += [draw] if draw not in drawn else []
        rows = run(drawn, folder, stack)
        leaders = [drawn[i] for i in sorted(range(len(drawn)), key=lambda i: loss(rows[i]))[:LEADERS]]
    again = [replace(leader, seed=config.seed + k) for leader in leaders for k in range(seeds)]
    found = run(again, folder, stack)
    totals = [sum(map(loss, found[i:i + seeds])) for i in range(0, len(again), seeds)]
    best = leaders[totals.index(min(totals))]
    if "lr" in space:  # draws are far apart: one of them is seldom in the middle, where transfer costs least
        curve = run([replace(best, lr=best.lr * 2**octave) for octave in OCTAVES], folder, stack)
        losses = {row["lr"]: loss(row) for row in curve}
        middle = optimum(losses)
        best = replace(best, lr=float(2 ** middle[0] if middle else min(losses, key=losses.get)))
        found += curve
    finals = run([replace(best, seed=config.seed + k) for k in range(seeds)], folder, stack)
    known = {row["config"]: row for row in rows + found + finals}
    return best, finals, list(known.values())


def best_file(config, rows, count):
    """The text of best.py: everything that transfers, drawn or not."""
    losses = [row["val_loss"] for row in rows]
    return (f'"""The best of {count} trials at width {config.width}, depth {config.depth}.\n\n'
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
    config, names = configure(words_of(argv, own, __doc__)), own["space"].split(",")
    if not {*names} <= {*SPACE}:
        raise UserError(f"space: got {own['space']}, takes some of {', '.join(SPACE)}")
    where = own["target"]  # it trains on the proxy's data, for as long, unless its file says otherwise
    other = {name: check(name, value, f"{where}: ") for name, value in (read(where) if where else {}).items()}
    space = {name: SPACE[name] for name in names}
    try:
        best, finals, rows = search(config, own["trials"], own["seeds"], own["out"], space, own["stack"])
    except KeyboardInterrupt:
        print(f"{own['out']}: stopped; the same command goes on")
        return 130
    if worker()[0] > 0:
        return
    path, text = os.path.join(own["out"], "best.py"), best_file(best, finals, len(rows))
    write(path, text)
    spent = sum(row["flops"] for row in rows if row["flops"] == row["flops"])
    losses = sorted(row["val_loss"] for row in rows if not row["diverged"])
    print(f"{path}:\n{text}\n{len(rows)} trials: best {losses[0]:.4f}, median {losses[len(losses) // 2]:.4f}")
    print(f"tuning took {spent:.2e} FLOPs", end="\n" * (not where))
    if where:
        whole = flops(replace(config, **other))
        print(f", {spent / whole:.1%} of one training of {where}, {whole:.2e}")


if __name__ == "__main__":
    command(main)
