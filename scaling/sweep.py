"""Train every combination of some settings, in one process, and keep a row of each in DIR/trials.csv:

    python -m scaling.sweep CONFIG width=64,128 lr=2**-10..2**-5 [--out=DIR] [--stack=K] [--name=value]

Lists are separated by commas; A..B goes from A to B by doubling, A..B:2 with two values to each doubling.
Held are all settings not named, and so the number of steps; --hold=tokens gives every trial the tokens of
CONFIG, by its steps; --hold=step_tokens gives every step as many, by its batch. A trial that diverges or
fails is a row too. Interrupted, the same command goes on. Under torchrun the processes share the trials.
--stack=K trains K trials of one shape at once (scaling/stack.py).
"""

import json
import os
import time
from dataclasses import asdict, replace
from itertools import product

from tqdm import tqdm

from configure import UserError, configure
from data.processes import command
from data.runs import MAY_CHANGE
from scaling.stack import MAY_DIFFER, train_stacked
from scaling.stack import check as check_stack
from scaling.trials import append, identity, read, row_of
from scaling.words import make_folder, values, words_of
from train import train

HOLDS = {"steps": None, "tokens": "steps", "step_tokens": "batch"}  # what is held: the setting that gives way


def trials(config, axes, hold="steps"):
    """The Configs of all combinations of `axes`, {setting: values}; `hold`, of HOLDS. Raises UserError."""
    config = replace(config, eval_every=None, checkpoint_every=None, out=None, sample_tokens=0, wandb=False)
    if hold not in HOLDS or HOLDS[hold] in axes:
        raise UserError(f"hold: got {hold}, takes {', '.join(HOLDS)}, and an axis that it does not change")
    found = []
    for chosen in product(*axes.values()):
        trial = replace(config, **dict(zip(axes, chosen, strict=True)))
        if given := HOLDS[hold]:
            share = config.batch * config.context / (trial.batch * trial.context)
            trial = replace(trial, **{given: round(getattr(config, given) * share)})
        found.append(trial)
    return found


def work(config):
    """Roughly the FLOPs of a trial, for the order and the time left."""
    per_token = 12 * config.depth * config.width * (6 * config.width + config.context) + 2**14 * config.width
    return per_token * config.batch * config.context * config.steps


def grouped(configs, size):
    """Lists of at most `size` configurations that may be stacked, the dearest first."""
    groups = {}
    for config in configs:
        shape = json.dumps({k: v for k, v in asdict(config).items() if k not in MAY_DIFFER})
        groups.setdefault(shape, []).append(config)
    lists = [group[i:i + size] for group in groups.values() for i in range(0, len(group), size)]
    return sorted(lists, key=lambda group: -sum(map(work, group)))


def worker():
    """(number of this process, how many there are) under torchrun, where they train apart: none joins."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def run(configs, folder, stack=1):
    """Train those of `configs` that have no row in `folder`; return the rows of all, in order. Under torchrun
    a process trains its share and waits for the others'. Raises KeyboardInterrupt when a signal stops it."""
    rank, world = worker()
    for config in configs if stack > 1 else ():
        check_stack([config])
    done = {row["config"] for row in read(make_folder(folder))}
    mine = grouped(configs, stack)[rank::world]  # the same on every process, whatever the others have done
    left = [[config for config in group if identity(config) not in done] for group in mine]
    left, share = [group for group in left if group], sum(map(len, mine))
    ended = share - sum(map(len, left))
    with tqdm(total=sum(work(config) for group in left for config in group), disable=rank > 0,
              bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
        for group in left:
            begun = time.perf_counter()
            try:
                results = train_stacked(group) if len(group) > 1 else [train(group[0], quiet=True)]
            except Exception as error:  # of these trials; the sweep goes on
                results = [error] * len(group)
            if getattr(results[0], "stopped", False):
                raise KeyboardInterrupt
            seconds = (time.perf_counter() - begun) / len(group)
            rows = [row_of(config, result, seconds) for config, result in zip(group, results, strict=True)]
            append(os.path.join(folder, f"trials-{rank}.csv" if rank else "trials.csv"), rows)
            bar.update(sum(map(work, group)))
            ended += len(group)
            bar.set_postfix_str(f" {ended} of {share}")
    while True:
        rows = {row["config"]: row for row in read(folder)}
        if all(identity(config) in rows for config in configs):
            return [rows[identity(config)] for config in configs]
        time.sleep(1)


def main(argv):
    own = {"out": "out/sweep", "stack": 1, "hold": "steps"}
    axes = {}
    words = words_of(argv, own, __doc__, axes)
    if not axes:
        raise UserError("sweep: takes settings and their values, such as lr=2**-10..2**-5")
    if apart := {*axes} & (MAY_CHANGE - {"steps"}):
        raise UserError(f"{min(apart)}: does not tell trials apart, takes --{min(apart)}=VALUE")
    axes = {name: values(name, text) for name, text in axes.items()}
    try:
        rows = run(trials(configure(words), axes, own["hold"]), own["out"], own["stack"])
    except KeyboardInterrupt:
        print(f"{own['out']}: stopped; the same command goes on")
        return 130
    if worker()[0] > 0:
        return
    print("".join(f"{name:>14}" for name in [*axes, "val_loss"]))
    for row in rows:
        config = json.loads(row["config"])
        print("".join(f"{config[name]!s:>14.12}" for name in axes),
              f"{row['val_loss']:13.4f}  {row['failure']}")


if __name__ == "__main__":
    command(main)
