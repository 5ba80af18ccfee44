"""Finished trials, one row of trials.csv each, in a folder from which a sweep resumes. Imports no torch."""

import ast
import csv
import functools
import glob
import hashlib
import io
import json
import math
import os
import sys
from itertools import pairwise
from pathlib import Path

from configure import SETTINGS, Config, UserError, check_setting, complete_saved, names_in

SETTING_COLUMNS = ("parametrization", "width", "depth", "batch", "context", "steps", "lr", "seed")
EVALUATION_COLUMNS = ("val_loss", "val_error", "val_bits_per_byte")
OLD_COLUMNS = (*SETTING_COLUMNS, *EVALUATION_COLUMNS, "train_loss", "parameters", "flops", "seconds",
               "diverged", "failure", "curve", "config")
COLUMNS = (*OLD_COLUMNS, "swept", "code")
TEXT_COLUMNS = {"parametrization", "diverged", "failure", "curve", "config", "swept", "code"}
NUMBER_COLUMNS = [name for name in COLUMNS if name not in TEXT_COLUMNS]
CURVE_POINTS = 25  # of a training curve: each is the mean loss of an equal share of the steps
STOPPED_EARLY = "stopped early"  # by a search: how `failure` begins where the trial has not failed

# Settings that do not change what a trial measures. `steps` does, though a resumed run may extend it.
NOT_IDENTITY = frozenset(names_in("run")) - {"steps"}
# What its numbers depend on besides: hashes of the tokens and of the weights that it starts from, if any; and
# settings as the machine understood them
HASHES = ("tokens", "weights")
FACTS = (*HASHES, *(name for name in SETTINGS if SETTINGS[name].fact))
# The code that decides what a trial measures
CODE = ("model.py", "parametrization.py", "train.py", "training/optimizer.py", "training/muon.py",
        "training/schedule.py")


def identity(config, facts=None):
    """What makes a trial this trial and no other, as JSON: its settings, and {name of FACTS: value}. The key
    of its row. Rows of older versions do not say how they were measured: their keys have no facts."""
    settings = {name: getattr(config, name) for name in SETTINGS if name not in NOT_IDENTITY}
    return json.dumps(settings | {name: facts[name] for name in FACTS if name in (facts or {})})


def settings_of(key):
    """{setting: value} of an identity(), without its facts."""
    return {name: value for name, value in json.loads(key).items() if name not in FACTS}


@functools.cache
def code_hash():
    """Tells versions of CODE apart: eight digits, which comments and spaces do not change."""
    root = Path(__file__).parent.parent
    trees = [ast.dump(ast.parse((root / name).read_text("utf-8"))) for name in CODE]
    return hashlib.sha256("".join(trees).encode()).hexdigest()[:8]


def say_present(rows, folder):
    """Says on stderr how many results there are in `folder` before anything is trained, and whether the code
    that made them is this one: a sweep would mix the two."""
    other = sum(row["code"] not in ("", code_hash()) for row in rows)
    if other:
        print(f"{folder}: {len(rows)} trials are there already, {other} of them by other code: model.py, "
              "parametrization.py, train.py or the optimizer has changed since; use another --out to train "
              "them anew", file=sys.stderr)
    elif rows:
        print(f"{folder}: {len(rows)} trials are there already", file=sys.stderr)


def has_failed(row):
    """Whether a trial ended in an error: it is no result, and is tried again. To diverge is a result."""
    return bool(row["failure"]) and not row["failure"].startswith(STOPPED_EARLY)


def complete_rows(rows):
    """{key: row} of those of `rows` that were trained to their end."""
    return {row["config"]: row for row in rows if not row["failure"]}


def swept_axes(rows):
    """The axes of the sweeps that made `rows`, such as ["width,depth", "lr"], in the order in which they were
    typed; empty for the rows of a search, and for those of older versions, which do not say."""
    return list(dict.fromkeys(axis for row in rows for axis in row["swept"].split()))


def trial_row(config, key, result, seconds):
    """The row of the trial `key`, an identity(). result: of train(), or the exception that it raised."""
    row = dict.fromkeys(NUMBER_COLUMNS, math.nan) | {name: getattr(config, name) for name in SETTING_COLUMNS}
    row |= {"seconds": round(seconds, 2), "config": key, "curve": [], "diverged": True, "swept": "",
            "code": code_hash()}
    if isinstance(result, Exception):
        message = " ".join(f"{type(result).__name__}: {result}".split())
        return row | {"failure": message[:300]}
    losses = [entry["train_loss"] for entry in result.history if "train_loss" in entry]
    curve = training_curve(losses, config.steps)
    row |= {name: getattr(result, name) for name in EVALUATION_COLUMNS}
    row["train_loss"] = curve[-1] if curve else math.nan
    row["curve"] = [round(loss, 4) for loss in curve]
    row["parameters"] = sum(p.numel() for p in result.model.parameters())
    row["flops"] = result.model.flops_per_token() * config.tokens_before(len(losses))
    row["diverged"] = result.diverged or result.stopped_early
    row["failure"] = ""
    if result.stopped_early:
        row["failure"] = f"{STOPPED_EARLY}, after {len(losses)} of {config.steps} steps"
    return row


def training_curve(losses, steps):
    """`losses`, one per step of a run of `steps`, averaged to at most CURVE_POINTS numbers: each over an
    equal share of the run, so that a run that ended early has fewer."""
    cuts = [min(len(losses), round(i * steps / CURVE_POINTS)) for i in range(CURVE_POINTS + 1)]
    return [sum(losses[start:end]) / (end - start) for start, end in pairwise(cuts) if end > start]


def append_rows(path, rows):
    """Adds rows to the file at `path`, in the columns that it has, and forces them to the disk. A last line
    that a kill cut short is removed first."""
    with open(path, "a+b") as file:
        file.seek(0)
        complete, newline, _ = file.read().rpartition(b"\n")
        file.truncate(len(complete + newline))
        columns = complete.partition(b"\n")[0].decode("utf-8-sig").strip().split(",") if complete else COLUMNS
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        if not complete:
            writer.writeheader()
        writer.writerows(row | {"curve": " ".join(f"{loss:.4f}" for loss in row["curve"])} for row in rows)
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())


def read_trials(folder):
    """The rows in `folder`, whichever process wrote them: dicts with numbers as float and the curve as a list
    of them. Of a trial that failed, the last row, and none where it has another. Raises UserError when a file
    has no header, or a row is damaged."""
    rows = []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "trials*.csv"))):
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            text = file.read()
        complete = text[:text.rfind("\n") + 1]  # another process may be writing the last line
        reader = csv.DictReader(io.StringIO(complete))
        try:
            if missing := {*OLD_COLUMNS} - {*(reader.fieldnames or OLD_COLUMNS)}:
                columns = COLUMNS if len(reader.fieldnames) == len(COLUMNS) else OLD_COLUMNS
                raise UserError(f"{path}: line 1 is not the header of a table of trials, as it has no column "
                                f"{min(missing)}; put this line before it: {','.join(columns)}")
            rows += [parse_row(row, path) for row in reader]
        except UserError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError, csv.Error):
            raise UserError(f"{path}: line {reader.line_num} is damaged; remove it") from None
    return drop_retried(rows)


@functools.cache
def complete_key(key, where=""):
    """A key as this version writes it, of one that this or an older version wrote; any other text as it is.
    Raises UserError when a setting is unknown or invalid."""
    if not key.startswith("{"):
        return key
    saved = json.loads(key)
    hashes = {name: saved.pop(name) for name in HASHES if name in saved}
    settings = {name: check_setting(name, value, where) for name, value in complete_saved(saved).items()}
    facts = None
    if hashes:
        facts = hashes | {name: settings[name] for name in FACTS if name in saved}
    return identity(Config(**settings), facts)


def parse_row(row, path):
    """A row of text, as read_trials() returns it. Raises UserError when a setting is unknown or invalid."""
    parsed = row | {name: float(row[name] or "nan") for name in NUMBER_COLUMNS}
    parsed["config"] = complete_key(row["config"], f"{path}: ")
    parsed |= {name: row.get(name) or "" for name in ("swept", "code")}  # older versions had neither
    parsed["diverged"] = row["diverged"] == "True" or bool(row["failure"])
    parsed["curve"] = [float(loss) for loss in row["curve"].split()]
    return parsed


def drop_retried(rows):
    """`rows` without the failures of trials that have another row. Where not even the text of a trial could
    be read, its row has no facts, and a row with any is another."""
    complete = {row["config"] for row in rows if not row["failure"]}
    complete |= {without_facts(key) for key in complete}
    last = {row["config"]: row for row in rows if row["failure"]}
    return [row for row in rows if not row["failure"] or (
        row["config"] not in complete and last[row["config"]] is row)]


def without_facts(key):
    return json.dumps(settings_of(key))


def without_weights(key):
    """A key as it was before it held the hash of the weights that its trial starts from."""
    return json.dumps({name: value for name, value in json.loads(key).items() if name != "weights"})


def read_results(folder, stopped_early=False):
    """{identity: row} of the trials in `folder` that have a result: not of those that failed, nor, unless
    they are asked for, of those that a search stopped early."""
    return {row["config"]: row for row in read_trials(folder)
            if not row["failure"] or stopped_early and not has_failed(row)}


def find_row(rows, key):
    """The row of the trial `key` among `rows`, {identity: row}; None where there is none. Rows of older
    versions do not say how they were measured, and are taken for it."""
    return rows.get(key) or rows.get(without_weights(key)) or rows.get(without_facts(key))
