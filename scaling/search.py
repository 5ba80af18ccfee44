"""Find a proxy's settings at random: python -m scaling.search CONFIG [--trials=64] [--seeds=3] [--out=DIR]

Draws the settings that transfer (the classes of Tensor Programs V, arXiv 2203.03466, table 1: optimizer,
initialization, multipliers; regularization does not, and is left out) and trains each draw: half from all
of the space, then variants of the leading few. In the end the leaders are trained on other seeds too, as the
best of many noisy trials looks better than it is. The winner takes the lr at the bottom of its own curve.
Writes DIR/best.py, which is read after any configuration: python train.py config/target.py DIR/best.py. Also
--space=lr,readout_std (only these are drawn), --target=CONFIG (tuning as a share of its FLOPs), --stack=K.
After an interruption, the same command resumes.
"""

import math
import os
import random
from dataclasses import replace

from configure import UserError, check_setting, configure, read_settings, run_cli
from data.files import write_text
from data.loader import TokenDataset, with_vocab_size
from data.prepare import prepare
from model import model_size
from scaling.cli import parse_options
from scaling.fits import optimum
from scaling.stack import MAY_DIFFER
from scaling.sweep import run_trials, say_stopped, torchrun_rank, trial_configs

SPACE = {  # setting: values, all equally likely
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
ROUNDS = 1/2, 3/4, 1  # fraction of the trials that is done after each round; the first is purely random
REDRAWN = 1/4  # of a parent's settings, in later rounds


def loss_of(row):
    """The validation loss of a trial, for comparison: infinite where it diverged."""
    return math.inf if row["diverged"] else row["val_loss"]


def search(config, count, seeds, folder, space=SPACE, stack=1):
    """(the best Config, rows of its seeds, rows of all trials). Raises UserError, KeyboardInterrupt."""
    possible = math.prod(map(len, space.values()))
    if count > possible:
        raise UserError(f"trials: got {count}, takes {possible} or fewer with this space")
    leaders, rows = draw_leaders(config, count, folder, space, stack)
    best, more_rows = choose_leader(leaders, config.seed, seeds, folder, stack)
    rows += more_rows
    if "lr" in space:
        best, more_rows = tune_lr(best, folder, stack)
        rows += more_rows
    finals = run_trials([replace(best, seed=config.seed + k) for k in range(seeds)], folder, stack)
    rows_by_config = {row["config"]: row for row in rows + finals}
    return best, finals, list(rows_by_config.values())


def draw_leaders(config, count, folder, space, stack):
    """(the LEADERS best of `count` draws, the best first; rows of all draws)."""
    chooser, leaders = random.Random(config.seed), []
    drawn = trial_configs(config, {})  # `config` itself is the first: a search should not end above its loss
    for fraction in ROUNDS:
        while len(drawn) < max(1, round(fraction * count)):
            draw = draw_settings(chooser, leaders, drawn[0], space)
            if draw not in drawn:
                drawn.append(draw)
        rows = run_trials(drawn, folder, stack)
        order = sorted(range(len(drawn)), key=lambda i: loss_of(rows[i]))
        leaders = [drawn[i] for i in order[:LEADERS]]
    return leaders, rows


def draw_settings(chooser, leaders, start, space):
    """A draw: every setting of `space` in place of that of `start` or, once there are leaders, some settings
    in place of a leader's."""
    if not leaders:
        return replace(start, **{name: chooser.choice(space[name]) for name in space})
    parent = chooser.choice(leaders)
    changed = [name for name in space if chooser.random() < REDRAWN]
    return replace(parent, **{name: chooser.choice(space[name]) for name in changed})


def choose_leader(leaders, seed, seeds, folder, stack):
    """(the leader with the lowest mean loss over `seeds` seeds, rows of them all)."""
    configs = [replace(leader, seed=seed + k) for leader in leaders for k in range(seeds)]
    rows = run_trials(configs, folder, stack)
    totals = [sum(map(loss_of, rows[i:i + seeds])) for i in range(0, len(rows), seeds)]
    return leaders[totals.index(min(totals))], rows


def tune_lr(best, folder, stack):
    """(`best` with the lr at the bottom of its own curve, rows of the curve). Draws are far apart: one is
    seldom in the middle, where transfer costs least."""
    rows = run_trials([replace(best, lr=best.lr * 2**octave) for octave in OCTAVES], folder, stack)
    losses = {row["lr"]: loss_of(row) for row in rows}
    bottom = optimum(losses)
    lr = 2 ** bottom[0] if bottom else min(losses, key=losses.get)
    return replace(best, lr=float(lr)), rows


def best_file(config, rows, count):
    """The text of best.py: every setting that transfers, drawn or not."""
    losses = [row["val_loss"] for row in rows]
    mean = sum(losses) / len(losses)
    docstring = (f'"""The best of {count} trials at width {config.width}, depth {config.depth}.\n\n'
                 f"Validation loss {mean:.4f}, the mean of {len(losses)} seeds from {min(losses):.4f} to "
                 f'{max(losses):.4f}.\n"""\n\n')
    settings = [f"{name} = {value!r}\n" for name, value in vars(config).items()
                if name in MAY_DIFFER and name != "seed"]
    return docstring + "".join(settings)


def training_flops(config):
    """FLOPs of one training run of `config`."""
    size = model_size(with_vocab_size(config, TokenDataset(prepare(config))))
    return size.flops_per_token * config.batch * config.context * config.steps


def report_search(config, options, target, best, finals, rows):
    """Writes best.py, and prints it and what the search took."""
    path, text = os.path.join(options["out"], "best.py"), best_file(best, finals, len(rows))
    write_text(path, text)
    losses = sorted(row["val_loss"] for row in rows if not row["diverged"])
    print(f"{path}:\n{text}\n{len(rows)} trials: best {losses[0]:.4f}, median {losses[len(losses) // 2]:.4f}")
    spent = sum(row["flops"] for row in rows if not math.isnan(row["flops"]))
    cost = f"tuning took {spent:.2e} FLOPs"
    if options["target"]:
        target_flops = training_flops(replace(config, **target))
        cost += f", {spent / target_flops:.1%} of one training of {options['target']}, {target_flops:.2e}"
    print(cost)


def main(argv):
    defaults = {"trials": 64, "seeds": 3, "out": "out/search", "stack": 1, "space": ",".join(SPACE),
                "target": ""}
    options, _, words = parse_options(argv, defaults, __doc__)
    config, names = configure(words), options["space"].split(",")
    if not set(names) <= set(SPACE):
        raise UserError(f"space: got {options['space']}, takes some of {', '.join(SPACE)}")
    target = {}  # it trains on the proxy's data, for as many steps, unless its file says otherwise
    if options["target"]:
        where = f"{options['target']}: "
        target = {name: check_setting(name, value, where)
                  for name, value in read_settings(options["target"]).items()}
    space = {name: SPACE[name] for name in names}
    try:
        best, finals, rows = search(config, options["trials"], options["seeds"], options["out"], space,
                                    options["stack"])
    except KeyboardInterrupt:
        return say_stopped(options["out"])
    rank, _ = torchrun_rank()
    if rank == 0:
        report_search(config, options, target, best, finals, rows)
    return 0


if __name__ == "__main__":
    run_cli(main)
