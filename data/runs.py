"""Run directories: what a run keeps of itself, and how it goes on.

config.json   its settings; RUN_DIR on the command line stands for this file
table.txt     the resolved parametrization
metrics.csv   a row per optimizer step, rewritten from the checkpoint when the run goes on
last.pt       the newest checkpoint; previous.pt the one before it, in case last.pt is damaged
best.pt       the checkpoint of the lowest validation loss
sample.txt    what the trained model writes
"""

import csv
import importlib.util
import json
import os
import platform
from dataclasses import asdict

import numpy as np
import torch

from configure import UserError
from data.checkpoints import fill, newest, whole, write
from data.processes import processes

VERSIONS = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
COLUMNS = "step tokens train_loss val_loss val_error val_bits_per_byte lr grad_norm tokens_per_second".split()

# What a resumed run may change: anything else would make it another run.
MAY_CHANGE = set("steps micro_batch eval_every eval_tokens checkpoint_every out device precision compile "
                 "graph shard wandb data_dir prompt sample_tokens temperature top_k".split())


class Run:
    """The run in config.out, or, without that, one that keeps nothing. Of several processes the first writes.

    `tokens` are the sha256 of what it is trained on. Raises UserError.
    """

    def __init__(self, config, tokens, say=print):
        self.config, self.tokens, self.file, self.log, self.say = config, tokens, None, None, say
        if config.wandb and importlib.util.find_spec("wandb") is None:
            raise UserError("wandb: got true, but it is not installed; pip install wandb, or --wandb=false")
        self.writes = processes()[0] == 0

    def path(self, name):
        return os.path.join(self.config.out or "", name)

    def load(self, model, optimizer):
        """The newest checkpoint that is whole, loaded into model and optimizer, or None. Raises UserError."""
        there = [path for path in map(self.path, ("last.pt", "previous.pt")) if os.path.exists(path)]
        if not there or not self.config.out:
            return None
        path, checkpoint = newest(there, self.say)
        settings, tokens, step = (checkpoint[name] for name in ("config", "tokens", "step"))
        for name, value in asdict(self.config).items():
            if name not in MAY_CHANGE and settings.get(name) != value:
                raise UserError(f"{name}: got {value!r}, but {path} was trained with {settings.get(name)!r}; "
                                "takes the same, or another --out")
        if tokens != self.tokens:
            raise UserError(f"dataset: got {self.config.dataset}, which gives other tokens than {path} was "
                            "trained on; takes those, or another --out")
        if step > self.config.steps:
            raise UserError(f"steps: got {self.config.steps}, takes at least the {step} that {path} has done")
        named = dict(model.named_parameters())
        try:
            if differ := checkpoint["model"].keys() ^ named.keys():
                raise RuntimeError(f"only one of them has {', '.join(sorted(differ))}")
            for name, p in named.items():
                fill(p, checkpoint["model"][name])
                optimizer.state[p] = {
                    key: fill(torch.empty_like(p if value.dim() else value, device=p.device), value)
                    for key, value in checkpoint["optimizer"][name].items()}
        except Exception as error:
            raise UserError(f"{path}: does not fit model.py: {' '.join(str(error).split())[:200]}") from None
        return checkpoint

    def open(self, table, history):
        """Begin, or go on after the rows of `history`."""
        if not self.writes:
            return
        if self.config.out:
            os.makedirs(self.config.out, exist_ok=True)
            for name in os.listdir(self.config.out):
                if name.endswith(".tmp"):  # what a kill left
                    os.remove(self.path(name))
            self.write("config.json", json.dumps(asdict(self.config), indent=1))
            self.write("table.txt", f"{table}\n")
            self.file = open(self.path("metrics.csv"), "w", buffering=1, newline="")
            self.metrics = csv.DictWriter(self.file, COLUMNS, lineterminator="\n")
            self.metrics.writeheader()
            self.metrics.writerows(history)
        if self.config.wandb:
            import wandb
            mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
            self.log = wandb.init(project="mup-gpt", name=self.config.out, dir=self.config.out, mode=mode,
                                  config=asdict(self.config))

    def add(self, rows):
        """Rows of metrics.csv, as dicts."""
        if self.file:
            self.metrics.writerows(rows)
        for row in rows if self.log else ():
            self.log.log(row, step=row["step"])

    def save(self, names, step, past, model, optimizer):
        """A checkpoint: the same for any number of processes, cut over them or not, which must all call."""
        if not names or not self.config.out:
            return
        parameters = dict(model.named_parameters())
        weights = {name: whole(p) for name, p in parameters.items()}
        moments = {name: {key: whole(value) for key, value in optimizer.state[p].items()}
                   for name, p in parameters.items()}
        content = {"step": step, "past": past, "model": weights, "optimizer": moments, "tokens": self.tokens,
                   "config": asdict(self.config), "table": model.table(), "versions": VERSIONS}
        for name in names if self.writes else ():
            write(self.path(name), content, self.path("previous.pt") if name == "last.pt" else None)

    def write(self, name, text):
        if self.writes and self.config.out:
            write(self.path(name), text)

    def close(self):
        if self.file:
            self.file.close()
        if self.log:
            self.log.finish()
