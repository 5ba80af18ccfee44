"""Train every combination of some settings, in one process, and keep a row for each in DIR/trials.csv:

    python -m scaling.sweep CONFIG width=64,128 lr=2**-10..2**-5 [--out=DIR] [--stack=K] [--name=value]

Lists are separated by commas; A..B goes from A to B by doubling, A..B:2 with two values per doubling.
All settings that are not named are held, and so is the number of steps; --hold=tokens gives every trial the
tokens of CONFIG, by its steps; --hold=flops its training FLOPs, by the steps too; --hold=step_tokens gives
every step as many tokens, by its batch. width,depth=64x2,128x4 moves two settings together. A trial that
diverges or fails is a row too. After an interruption, the same command resumes, and tries again what failed.
A row counts for a trial of the same settings that is measured in the same way: from the same weights, on the
same tokens, device, precision and evaluation. Processes with the same folder, started by torchrun or by hand,
on one machine or on many, share the trials: each takes the next one when it is free. --stack=K trains K
trials of one shape at once (scaling/stack.py).
"""

import functools
import hashlib
import json
import os
import time
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from tqdm import tqdm

from configure import Config, UserError, configure, names_in, stop_signals
from data.loader import TokenDataset, with_vocab_size
from data.prepare import prepare
from scaling.cli import command, format_value, parse_options, parse_values, reject_unused, resumable
from scaling.stack import MAY_DIFFER, check_stackable, train_stacked
from scaling.trials import (
    FACTS,
    NOT_IDENTITY,
    append_rows,
    code_hash,
    find_row,
    has_failed,
    identity,
    read_results,
    say_present,
    trial_row,
)
from scaling.worker import PARENT, Worker, pause
from train import Result, train
from training.device import (
    is_compiled,
    precision_name,
    reuse_freed_memory,
    select_device,
    use_sensible_threads,
)
from training.distributed import read_count, torchrun_variables
from training.model_size import model_size
from training.pretrained import hash_weights

code_hash()  # now: what is edited while a trial runs is not what it ran

# What is held: the setting that adapts
HOLDS = {"steps": None, "tokens": "steps", "flops": "steps", "step_tokens": "batch"}
# What a trial does not use, as it leaves a row and nothing else
UNUSED = {"eval_every", "checkpoint_every", "log_roles", "wandb", "prompt", "samples", "sample_tokens",
          "temperature", "top_k"}
TYPICAL_VOCAB_SIZE = 2**12  # for an estimate, where the tokenizer has not been read yet


def trial_configs(config, axes, hold="steps"):
    """The Configs of all combinations of `axes`, {setting: values}; of settings that move together,
    {"width,depth": [(64, 2), ...]}. hold: one of HOLDS. Raises UserError."""
    if hold not in HOLDS or HOLDS[hold] in ",".join(axes).split(","):
        raise UserError(f"hold must be one of {', '.join(HOLDS)}, and not change an axis, got {hold}")
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
    data = {name: getattr(config, name) for name in (*names_in("data"), "data_dir", "vocab_size")}
    return model_size(replace(config, vocab_size=vocab_size_of(**data))).flops_per_token


def shape_of(config):
    """`config` with the default of all that trials of one stack may differ in, or that changes no number."""
    fixed = {name: value for name, value in vars(config).items()
             if name not in MAY_DIFFER and name not in names_in("run")}
    return Config(**fixed)


@functools.cache
def flops_per_token(shape):
    """Of a trial of this shape_of(); 0 where model.py rejects it, as its row will say."""
    try:
        return model_size(replace(shape, vocab_size=shape.vocab_size or TYPICAL_VOCAB_SIZE)).flops_per_token
    except UserError:
        return 0


def estimate_flops(config):
    """Training FLOPs of a trial, for the order of the trials and the time left."""
    return flops_per_token(shape_of(config)) * config.tokens_before(config.steps)


def facts_of(config, dataset):
    """{name of FACTS: value}: what the numbers of `config`, trained on a TokenDataset, depend on besides its
    settings. Raises UserError where there is no such device, or no such weights to start from."""
    device, autocast = select_device(config)
    compiled = is_compiled(config, device)
    facts = {"tokens": hashlib.sha256(json.dumps(dataset.hashes).encode()).hexdigest(),
             "eval_tokens": config.eval_tokens, "device": device.type, "precision": precision_name(autocast),
             "compile": compiled and ("blocks" if config.compile == "auto" else config.compile)}
    if config.init_from is not None:
        facts["weights"] = hash_weights(config.init_from)
    return facts


class Trial(NamedTuple):
    """A configuration as it is trained."""
    key: str  # identity()
    config: Config  # on its prepared tokens, which stay what they are while its text changes


def as_trials(configs):
    """{config: its Trial}. One whose text or device cannot be had will fail, and its row say why. Raises
    UserError where that is so of all."""
    trials, datasets, errors = {}, {}, []
    for config in dict.fromkeys(configs):
        source = tuple(getattr(config, name) for name in (*names_in("data"), "data_dir"))
        try:
            if source not in datasets:
                datasets[source] = TokenDataset(prepare(config))
            key = identity(config, facts_of(config, datasets[source]))
            trials[config] = Trial(key, replace(config, dataset=datasets[source].folder))
        except UserError as error:
            errors.append(error)
            trials[config] = Trial(identity(config), config)
    if len(errors) == len(trials) > 0:
        raise errors[0]
    return trials


def group_flops(trials):
    return sum(estimate_flops(trial.config) for trial in trials)


def group_trials(trials, size):
    """Lists of at most `size` Trials that may be stacked, the most expensive first."""
    groups = {}
    for trial in trials:
        unstackable = {name: value for name, value in vars(trial.config).items() if name not in MAY_DIFFER}
        groups.setdefault(json.dumps(unstackable), []).append(trial)
    lists = [group[i:i + size] for group in groups.values() for i in range(0, len(group), size)]
    return sorted(lists, key=group_flops, reverse=True)


def torchrun_rank():
    """(rank, world size), by torchrun or srun; sweeping processes train apart. Raises UserError."""
    if PARENT in os.environ:  # a worker of a search
        return 1, 2
    environment = os.environ | torchrun_variables(os.environ)
    rank, size = read_count(environment, "RANK", default=0), read_count(environment, "WORLD_SIZE", default=1)
    if rank >= size:
        raise UserError(f"RANK must be below WORLD_SIZE ({size}), got {rank} in the environment; start with "
                        "torchrun, or unset RANK")
    return rank, size


def run_trials(configs, folder, stack=1, swept=()):
    """Train those of `configs` that have no result in `folder`; return the rows of all, in order. Other
    workers on the same folder train some of them meanwhile, or take over what this one leaves. swept: the
    axes that the configurations were made of, for the rows.

    Raises UserError, and KeyboardInterrupt when a signal stops it."""
    if stack > 1:
        for config in configs:
            check_stackable([config])
    trials = as_trials(configs)
    different = {trial.key: trial for trial in trials.values()}
    with Worker(folder) as worker:
        rows = share_trials(list(different.values()), worker, stack, " ".join(swept))
    return [rows[trials[config].key] for config in configs]


def share_trials(trials, worker, stack, swept):
    """{key: row} of `trials`: run_trials() for a Worker."""
    failed = {}  # {key: row}: what failed here is not tried again by this process
    results = read_results(worker.folder)
    present = {trial.key: row for trial in trials if (row := find_row(results, trial.key))}
    unfinished = [trial for trial in trials if trial.key not in present]
    if torchrun_rank()[0] == 0:
        say_present(present.values(), worker.folder)
    with tqdm(total=group_flops(unfinished), disable=torchrun_rank()[0] > 0,
              bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
        while unfinished:
            group = claim_group(unfinished, worker, stack)
            if group:
                rows = train_group(group, pad_to=stack)
                append_rows(worker.path, [row | {"swept": swept} for row in rows])
                failed |= {row["config"]: row for row in rows if has_failed(row)}
                for trial in group:
                    worker.release(trial.key)
            else:
                pause()  # all are being trained by others
            unfinished = [trial for trial in without_result(unfinished, worker.folder)
                          if trial.key not in failed]
            bar.update(max(0, bar.total - group_flops(unfinished) - bar.n))
            bar.set_postfix_str(f" {len(trials) - len(unfinished)} of {len(trials)}"
                                + (f", {len(failed)} failed" if failed else ""))
    results = read_results(worker.folder)
    return {trial.key: find_row(results, trial.key) or failed[trial.key] for trial in trials}


def without_result(trials, folder):
    """Those of `trials` that have no result in `folder`."""
    results = read_results(folder)
    return [trial for trial in trials if not find_row(results, trial.key)]


def claim_group(unfinished, worker, stack):
    """The most expensive of `unfinished` that no other worker is training, at most `stack` of one shape."""
    for group in group_trials(unfinished, stack):
        claimed = [trial for trial in group if worker.claim(trial.key)]
        if not claimed:
            continue
        left = without_result(claimed, worker.folder)  # another may have finished some before the claim
        for trial in claimed:
            if trial not in left:
                worker.release(trial.key)
        if left:
            return left
    return []


def train_group(trials, pad_to=1, stop_early=None):
    """The rows of `trials`, trained together if they are several. Raises KeyboardInterrupt.

    pad_to: the size of the sweep's stacks, to which a smaller one is filled up where it is compiled, as that
    takes longer than the training. stop_early: as for train(); a stack is always trained to its end."""
    start = time.perf_counter()
    configs = [trial.config for trial in trials]
    try:
        if pad_to > 1:
            results = train_stacked(configs, pad_to)
        else:
            results = [train(configs[0], quiet=True, stop_early=stop_early)]
    except Exception as error:  # of these trials: each gets a row that says so, and the sweep continues
        results = [error] * len(configs)
    if stop_signals or isinstance(results[0], Result) and results[0].stopped:
        raise KeyboardInterrupt  # again, where a library has caught it
    seconds = (time.perf_counter() - start) / len(configs)
    return [trial_row(trial.config, trial.key, result, seconds)
            for trial, result in zip(trials, results, strict=True)]


def say_failed(folder, failed, count):
    """Prints how many of `count` trials failed, and why; returns the exit code, 0 where none did."""
    if not failed:
        return 0
    print(f"{folder}: {len(failed)} of {count} trials failed ({failed[0]['failure']}); the same command "
          "tries them again")
    return 1


def print_table(axes, rows):
    """The settings that were swept and the loss of each trial."""
    columns = {name: max(14, len(name) + 2) for name in ",".join(axes).split(",")}
    print("".join(f"{name:>{width}}" for name, width in columns.items()) + f"{'val_loss':>14}")
    for row in rows:
        config = json.loads(row["config"])
        values = "".join(f"{format_value(config[name]):>{width}.12}" for name, width in columns.items())
        print(values, f"{row['val_loss']:13.4f}  {row['failure']}")


@command
def main(argv):
    defaults = {"out": "out/sweep", "stack": 1, "hold": "steps"}
    options, axes, words = parse_options(argv, defaults, __doc__, takes_axes=True)
    if not axes:
        raise UserError("sweep needs settings and their values, such as lr=2**-10..2**-5")
    names = ",".join(axes).split(",")
    for name in sorted(names):
        if name in NOT_IDENTITY and name not in FACTS:
            raise UserError(f"{name} cannot be an axis, as it changes no result; try --{name}=VALUE")
        if names.count(name) > 1:
            raise UserError(f"{name} must be on one axis, got it on two")
    axes = {names: parse_values(names, text) for names, text in axes.items()}
    reject_unused(words, UNUSED, "a sweep")
    configs, (rank, _) = trial_configs(configure(words), axes, options["hold"]), torchrun_rank()
    reuse_freed_memory()
    use_sensible_threads(configs[0])
    with resumable(options["out"]):
        rows = run_trials(configs, options["out"], options["stack"], axes)
    if rank > 0:
        return 0
    print_table(axes, rows)
    return say_failed(options["out"], [row for row in rows if has_failed(row)], len(rows))
