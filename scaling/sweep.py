"""Train every combination of some settings, in one process, and keep a row for each in DIR/trials.csv:

    python -m scaling.sweep CONFIG width=64,128 lr=2**-10..2**-5 [--out=DIR] [--stack=K] [--name=value]

Lists are separated by commas; A..B goes from A to B by doubling, A..B:2 with two values per doubling.
All settings that are not named are held, and so is the number of steps; --hold=tokens gives every trial the
tokens of CONFIG, by its steps; --hold=flops its training FLOPs, by the steps too; --hold=step_tokens gives
every step as many tokens, by its batch. width,depth=64x2,128x4 moves two settings together. A trial that
diverges or fails is a row too. After an interruption, the same command resumes. Processes with the same
folder, started by torchrun or by hand, on one machine or on many, share the trials: each takes the next one
when it is free. --stack=K trains K trials of one shape at once (scaling/stack.py).
"""

import functools
import json
import os
import time
from dataclasses import replace
from itertools import product

from tqdm import tqdm

from configure import MAY_CHANGE_ON_RESUME, Config, UserError, configure, run_cli
from data.loader import TokenDataset, with_vocab_size
from data.prepare import IDENTITY_SETTINGS, prepare
from model import model_size
from scaling.cli import parse_options, parse_values
from scaling.stack import MAY_DIFFER, check_stackable, train_stacked
from scaling.trials import NOT_IDENTITY, append_rows, identity, read_trials, trial_row
from scaling.worker import Worker, pause
from train import Result, train
from training.distributed import torchrun_variables

# What is held: the setting that adapts
HOLDS = {"steps": None, "tokens": "steps", "flops": "steps", "step_tokens": "batch"}
TYPICAL_VOCAB_SIZE = 2**12  # for an estimate, where the tokenizer has not been read yet


def trial_configs(config, axes, hold="steps"):
    """The Configs of all combinations of `axes`, {setting: values}; of settings that move together,
    {"width,depth": [(64, 2), ...]}. hold: one of HOLDS. Raises UserError."""
    if hold not in HOLDS or HOLDS[hold] in ",".join(axes).split(","):
        raise UserError(f"hold: got {hold}, takes {', '.join(HOLDS)}, and an axis that it does not change")
    # A trial leaves a row, and nothing else
    config = replace(config, eval_every=None, checkpoint_every=None, out=None, sample_tokens=0, wandb=False,
                     log_roles=False)
    configs = []
    for values in product(*axes.values()):
        settings = {}
        for names, value in zip(axes, values, strict=True):
            together = value if "," in names else (value,)
            settings |= zip(names.split(","), together, strict=True)
        trial = replace(config, **settings)
        tokens = config.tokens_before(config.steps)
        if hold == "tokens":
            trial = replace(trial, steps=trial.steps_for(tokens))
        elif hold == "flops":
            share = exact_flops_per_token(config) / exact_flops_per_token(trial)
            trial = replace(trial, steps=trial.steps_for(tokens * share))
        elif hold == "step_tokens":
            trial = replace(trial, batch=round(config.batch * config.context / trial.context))
        configs.append(trial)
    return configs


@functools.cache
def vocab_size_of(**data):
    """Rows of the embedding for these settings of the data, which are prepared first. Raises UserError."""
    config = Config(**data)
    return with_vocab_size(config, TokenDataset(prepare(config))).vocab_size


def exact_flops_per_token(config):
    """Of a trial of this shape, with the vocabulary that its tokenizer has. Raises UserError."""
    data = {name: getattr(config, name) for name in (*IDENTITY_SETTINGS, "data_dir", "vocab_size")}
    return model_size(replace(config, vocab_size=vocab_size_of(**data))).flops_per_token


def shape_of(config):
    """The Config that all trials have in common which may be stacked with `config`: what they may differ in,
    and what changes no number, is at its default."""
    fixed = {name: value for name, value in vars(config).items()
             if name not in MAY_DIFFER and name not in MAY_CHANGE_ON_RESUME}
    return Config(**fixed)


@functools.cache
def flops_per_token(shape):
    """Of a trial of this shape_of(), from the model. 0 for a shape that model.py rejects: its trial will fail
    at once, and its row say why."""
    try:
        return model_size(replace(shape, vocab_size=shape.vocab_size or TYPICAL_VOCAB_SIZE)).flops_per_token
    except UserError:
        return 0


def estimate_flops(config):
    """Training FLOPs of a trial, for the order of the trials and the time left."""
    return flops_per_token(shape_of(config)) * config.tokens_before(config.steps)


def group_flops(configs):
    return sum(map(estimate_flops, configs))


def group_trials(configs, size):
    """Lists of at most `size` configurations that may be stacked, the most expensive first."""
    groups = {}
    for config in configs:
        unstackable = {name: value for name, value in vars(config).items() if name not in MAY_DIFFER}
        groups.setdefault(json.dumps(unstackable), []).append(config)
    lists = [group[i:i + size] for group in groups.values() for i in range(0, len(group), size)]
    return sorted(lists, key=group_flops, reverse=True)


def torchrun_rank():
    """(rank, world size), by torchrun or srun. Sweeping processes train apart, so none joins a group."""
    environment = os.environ | torchrun_variables(os.environ)
    return int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))


def run_trials(configs, folder, stack=1):
    """Train those of `configs` that have no row in `folder`; return the rows of all, in order. Other workers
    on the same folder train some of them meanwhile, or take over what this one leaves.

    Raises UserError, and KeyboardInterrupt when a signal stops it."""
    if stack > 1:
        for config in configs:
            check_stackable([config])
    with Worker(folder) as worker:
        return share_trials(configs, worker, stack)


def share_trials(configs, worker, stack):
    """run_trials() for a Worker."""
    rows = read_rows(worker.folder)
    unfinished = [config for config in dict.fromkeys(configs) if identity(config) not in rows]
    with tqdm(total=group_flops(unfinished), disable=torchrun_rank()[0] > 0,
              bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
        while unfinished:
            group = claim_group(unfinished, worker, stack)
            if group:
                append_rows(worker.path, train_group(group, pad_to=stack))
                for config in group:
                    worker.release(identity(config))
            else:
                pause()  # all are being trained by others
            rows = read_rows(worker.folder)
            unfinished = [config for config in unfinished if identity(config) not in rows]
            bar.update(max(0, bar.total - group_flops(unfinished) - bar.n))
            bar.set_postfix_str(f" {len(configs) - len(unfinished)} of {len(configs)}")
    return [rows[identity(config)] for config in configs]


def read_rows(folder):
    """{identity: row} of the trials in `folder`."""
    return {row["config"]: row for row in read_trials(folder)}


def claim_group(unfinished, worker, stack):
    """The most expensive of `unfinished` that no other worker is training, at most `stack` of one shape."""
    for group in group_trials(unfinished, stack):
        claimed = [config for config in group if worker.claim(identity(config))]
        if not claimed:
            continue
        rows = read_rows(worker.folder)  # another may have finished some before the claim
        left = [config for config in claimed if identity(config) not in rows]
        for config in claimed:
            if config not in left:
                worker.release(identity(config))
        if left:
            return left
    return []


def train_group(configs, pad_to=1, stop_early=None):
    """The rows of `configs`, trained together if they are several. Raises KeyboardInterrupt.

    pad_to: the size of the sweep's stacks, to which a smaller one is filled up where it is compiled, as that
    takes longer than the training. stop_early: as for train(); a stack is always trained to its end."""
    start = time.perf_counter()
    try:
        if pad_to > 1:
            results = train_stacked(configs, pad_to)
        else:
            results = [train(configs[0], quiet=True, stop_early=stop_early)]
    except Exception as error:  # of these trials: each gets a row that says so, and the sweep continues
        results = [error] * len(configs)
    if isinstance(results[0], Result) and results[0].stopped:
        raise KeyboardInterrupt
    seconds = (time.perf_counter() - start) / len(configs)
    return [trial_row(config, result, seconds) for config, result in zip(configs, results, strict=True)]


def say_stopped(folder):
    """What a command prints when a signal stopped it; returns its exit code."""
    print(f"{folder}: stopped; run the same command again to resume")
    return 130


def print_table(axes, rows):
    """The settings that were swept and the loss of each trial."""
    swept = ",".join(axes).split(",")
    print("".join(f"{name:>14}" for name in [*swept, "val_loss"]))
    for row in rows:
        config = json.loads(row["config"])
        values = "".join(f"{config[name]!s:>14.12}" for name in swept)
        print(values, f"{row['val_loss']:13.4f}  {row['failure']}")


def main(argv):
    defaults = {"out": "out/sweep", "stack": 1, "hold": "steps"}
    options, axes, words = parse_options(argv, defaults, __doc__, takes_axes=True)
    if not axes:
        raise UserError("sweep: takes settings and their values, such as lr=2**-10..2**-5")
    names = ",".join(axes).split(",")
    for name in sorted(names):
        if name in NOT_IDENTITY:
            raise UserError(f"{name}: does not tell trials apart, takes --{name}=VALUE")
        if names.count(name) > 1:
            raise UserError(f"{name}: got it on two axes, takes one")
    axes = {names: parse_values(names, text) for names, text in axes.items()}
    configs = trial_configs(configure(words), axes, options["hold"])
    try:
        rows = run_trials(configs, options["out"], options["stack"])
    except KeyboardInterrupt:
        return say_stopped(options["out"])
    rank, _ = torchrun_rank()
    if rank == 0:
        print_table(axes, rows)
    return 0


if __name__ == "__main__":
    run_cli(main)
