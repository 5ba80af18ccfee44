"""Finished trials, one row of trials.csv each, in a folder from which a sweep resumes. Imports no torch."""

import csv
import glob
import io
import json
import math
import os
from dataclasses import asdict
from itertools import pairwise

from configure import MAY_CHANGE_ON_RESUME, Config, UserError, check_setting, complete_saved, no_command

SETTING_COLUMNS = ("parametrization", "width", "depth", "batch", "context", "steps", "lr", "seed")
EVALUATION_COLUMNS = ("val_loss", "val_error", "val_bits_per_byte")
COLUMNS = (*SETTING_COLUMNS, *EVALUATION_COLUMNS, "train_loss", "parameters", "flops", "seconds", "diverged",
           "failure", "curve", "config")
TEXT_COLUMNS = {"parametrization", "diverged", "failure", "curve", "config"}
NUMBER_COLUMNS = [name for name in COLUMNS if name not in TEXT_COLUMNS]
CURVE_POINTS = 25  # of a training curve: each is the mean loss of an equal share of the steps

# Settings that do not change what a trial measures. `steps` does, though a resumed run may extend it.
NOT_IDENTITY = MAY_CHANGE_ON_RESUME - {"steps"}


def identity(config):
    """The settings that make a trial this trial and no other, as JSON: the key of its row."""
    return json.dumps({name: value for name, value in asdict(config).items() if name not in NOT_IDENTITY})


def trial_row(config, result, seconds):
    """The row of a trial, {column: value}. result: the Result of train(), or the exception it raised."""
    row = {name: getattr(config, name) for name in SETTING_COLUMNS}
    row |= {"seconds": round(seconds, 2), "config": identity(config), "diverged": False, "failure": ""}
    if isinstance(result, Exception):
        message = " ".join(f"{type(result).__name__}: {result}".split())
        return row | {"failure": message[:300]}
    losses = [entry["train_loss"] for entry in result.history if "train_loss" in entry]
    curve = training_curve(losses, config.steps)
    row |= {name: getattr(result, name) for name in EVALUATION_COLUMNS}
    row["train_loss"] = curve[-1] if curve else math.nan
    row["curve"] = " ".join(f"{loss:.4f}" for loss in curve)
    row["parameters"] = sum(p.numel() for p in result.model.parameters())
    row["flops"] = result.model.flops_per_token() * config.tokens_before(len(losses))
    row["diverged"] = result.diverged
    if result.stopped_early:
        row["failure"] = f"stopped early, after {len(losses)} of {config.steps} steps"
    return row


def training_curve(losses, steps):
    """`losses`, one per step of a run of `steps`, averaged to at most CURVE_POINTS numbers: each over an
    equal share of the run, so that a run that ended early has fewer."""
    cuts = [min(len(losses), round(i * steps / CURVE_POINTS)) for i in range(CURVE_POINTS + 1)]
    return [sum(losses[start:end]) / (end - start) for start, end in pairwise(cuts) if end > start]


def append_rows(path, rows):
    """Adds rows to the file at `path` and forces them to the disk. A last line that a kill cut short is
    removed first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    with open(path, "a+b") as file:
        file.seek(0)
        complete = file.read().rfind(b"\n") + 1  # bytes of complete lines
        file.truncate(complete)
        if complete == 0:
            writer.writeheader()
        writer.writerows(rows)
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())


def read_trials(folder):
    """The rows in `folder`, whichever process wrote them: dicts with numbers as float and the curve as a list
    of them. Raises UserError when a row is damaged."""
    rows = []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "trials*.csv"))):
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            text = file.read()
        complete = text[:text.rfind("\n") + 1]  # another process may be writing the last line
        reader = csv.DictReader(io.StringIO(complete))
        try:
            rows += [parse_row(row, path) for row in reader]
        except UserError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError, csv.Error):
            raise UserError(f"{path}: line {reader.line_num} is damaged; remove it") from None
    return rows


def parse_row(row, path):
    """A row of text, as read_trials() returns it. Raises UserError when a setting is unknown or invalid."""
    saved = complete_saved(json.loads(row["config"]))
    settings = {name: check_setting(name, value, f"{path}: ") for name, value in saved.items()}
    parsed = row | {name: float(row[name] or "nan") for name in NUMBER_COLUMNS}
    parsed["config"] = identity(Config(**settings))
    parsed["diverged"] = row["diverged"] == "True" or bool(row["failure"])
    parsed["curve"] = [float(loss) for loss in row["curve"].split()]
    return parsed


if __name__ == "__main__":
    no_command("scaling.trials")
