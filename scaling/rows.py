"""The rows of finished trials, read for all commands that compare them, and what differs among them."""

import json
import os

import numpy as np

from configure import UserError
from data.files import write_text
from scaling.cli import make_folder, parse_options
from scaling.trials import FACTS, HASHES, read_trials

AXES = ("width", "depth", "context", "batch", "steps")
SAME_LOSS = 0.02  # nats: two trainings of one trial differ by less on two machines


def parse_folders(argv, defaults, doc):
    """(options, folders of trials, folder to write to) of the command line of a command that reads trials."""
    options, _, folders = parse_options(argv, defaults | {"to": ""}, doc, takes_settings=False)
    if not folders:
        raise UserError(f"give one or more folders of trials; options are --{', --'.join(options)}")
    return options, folders, options["to"] or folders[0]


def write_report(report, folder, name, default=float):
    """Writes `report` to folder/name as JSON, and makes the folder. default: of json.dumps()."""
    make_folder(folder)
    write_text(os.path.join(folder, name), json.dumps(report, indent=1, default=default))


def read_rows(folders):
    """The trials in `folders`, as read_trials() gives them. Raises UserError where a folder has none, or
    another loss of a trial that an earlier one has, too."""
    rows, losses = [], {}
    for folder in folders:
        found = read_trials(folder)
        if not found:
            raise UserError(f"{folder} has no trials: give a folder that a sweep wrote, with its trials.csv")
        for row in found:
            loss = losses.get(row["config"], row["val_loss"])
            if abs(loss - row["val_loss"]) > SAME_LOSS:
                raise UserError(f"{folder} has a loss of {row['val_loss']:.4f} for a trial that has "
                                f"{loss:.4f} before it: trained by other code, or on another machine; give "
                                "the folders one by one")
        losses |= {row["config"]: row["val_loss"] for row in found}
        rows += found
    return rows


def group(pairs):
    """{key: [its values]} of (key, value) pairs, in the order of the keys' first."""
    groups = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def loss_of(row):
    """Nats a token; infinite where the trial diverged."""
    return np.inf if row["diverged"] else row["val_loss"]


def settings_and_facts(rows):
    """{name: value} of each row: its settings, and how it was measured (FACTS). A row that does not say, as
    those of older versions, is taken for what the others say, where these agree."""
    configs = [json.loads(row["config"]) for row in rows]
    for name in FACTS:
        known = [config[name] for config in configs if name in config]
        agreed = known[0] if known and known.count(known[0]) == len(known) else None
        for config in configs if known else ():
            config.setdefault(name, agreed)
    for config in configs:
        for name in HASHES:
            if name in config:
                config[name] = str(config[name])[:8]  # so much of a hash tells few texts apart
    return configs


def axes_beside(axis, axes, configs):
    """Those of `axes` that tell trials of one size of `axis` apart. One that follows from the others, as the
    steps of a sweep with --hold, does not."""
    told_apart = [axis]
    for name in axes:
        if len(values_of(configs, *told_apart, name)) > len(values_of(configs, *told_apart)):
            told_apart.append(name)
    return told_apart[1:]


def values_of(configs, *names):
    """The different values, or combinations of values, of these settings."""
    return {json.dumps([config[name] for name in names]) for config in configs}


def decide(names, name, configs):
    """Whether `name` is one of the settings `names`, and the others among them decide its value."""
    rest = [other for other in names if other != name]
    return name in names and len(values_of(configs, *names)) == len(values_of(configs, *rest))


def choose_base(axis, rows, sizes, base):
    """The proxy's size: `base` if given, or the size at the base shape, or the smallest. Raises UserError."""
    if not base:
        base_shape = json.loads(rows[0]["config"]).get(f"base_{axis}")
        return base_shape if base_shape in sizes else sizes[0]
    if base not in sizes:
        raise UserError(f"base must be one of {', '.join(f'{size:g}' for size in sizes)}, got {base}")
    return base
