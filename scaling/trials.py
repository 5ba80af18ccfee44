"""Trials that are kept: a row of trials.csv each, in a folder that a later start goes on with."""

import csv
import glob
import io
import json
import math
import os
from dataclasses import asdict
from itertools import pairwise

from configure import Config, UserError, check
from data.runs import MAY_CHANGE

COLUMNS = ("parametrization width depth batch context steps lr seed val_loss val_error val_bits_per_byte "
           "train_loss parameters flops seconds diverged failure curve config").split()
POINTS = 25  # of a training curve


def identity(config):
    """What makes a trial the same trial as another: its settings, as JSON."""
    return json.dumps({k: v for k, v in asdict(config).items() if k not in MAY_CHANGE - {"steps"}})


def row_of(config, result, seconds):
    """A row, as a dict, from what train() returned, or from the exception that took its place."""
    row = {name: getattr(config, name) for name in COLUMNS[:8]} | {
        "seconds": round(seconds, 2), "config": identity(config), "diverged": False, "failure": ""}
    if isinstance(result, Exception):
        return row | {"failure": " ".join(f"{type(result).__name__}: {result}".split())[:300]}
    losses = [entry["train_loss"] for entry in result.history if "train_loss" in entry]
    cuts = [round(i * len(losses) / POINTS) for i in range(POINTS + 1)]
    means = [sum(losses[a:b]) / (b - a) for a, b in pairwise(cuts) if b > a]
    return row | {name: getattr(result, name) for name in COLUMNS[8:11]} | {
        "train_loss": means[-1] if means else math.nan, "curve": " ".join(f"{mean:.4f}" for mean in means),
        "parameters": sum(p.numel() for p in result.model.parameters()), "diverged": result.diverged,
        "flops": result.model.flops_per_token() * config.batch * config.context * len(losses)}


def append(path, rows):
    """Add rows to the file at `path`, on the disk at once, in the place of a row that a kill cut short."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    with open(path, "a+b") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        if not whole:
            writer.writeheader()
        writer.writerows(rows)
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())


def read(folder):
    """The rows kept in `folder`, by whichever process: dicts with numbers as float, a curve as their list.
    Raises UserError when one of them is damaged."""
    rows = []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "trials*.csv"))):
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            text = file.read()
        reader = csv.DictReader(io.StringIO(text[:text.rfind("\n") + 1]))
        try:
            rows += [numbers_of(row, f"{path}: ") for row in reader]
        except UserError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError, csv.Error):
            raise UserError(f"{path}: line {reader.line_num} is damaged; remove it") from None
    return rows


def numbers_of(row, where):
    """A row of text, as read() returns it. Raises UserError when a setting is unknown or does not fit."""
    settings = {name: check(name, x, where) for name, x in json.loads(row["config"]).items()}
    return row | {name: float(row[name] or "nan") for name in COLUMNS[1:15]} | {
        "config": identity(Config(**settings)),  # with what Config has gained since
        "diverged": row["diverged"] == "True" or bool(row["failure"]),
        "curve": [float(loss) for loss in row["curve"].split()]}
