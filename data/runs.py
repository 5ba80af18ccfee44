"""Run directories: what a run keeps of itself, and how it goes on.

config.json   its settings; RUN_DIR on the command line stands for this file
table.txt     the resolved parametrization
metrics.csv   a row per optimizer step, rewritten from the checkpoint when the run goes on
last.pt       the newest checkpoint; best.pt the one of the lowest validation loss
sample.txt    what the trained model writes
"""

import csv
import importlib.util
import json
import os
from dataclasses import asdict

import torch

from configure import UserError
from data.machine import processes
from data.tokens import durable

COLUMNS = "step tokens train_loss val_loss val_error val_bits_per_byte lr grad_norm tokens_per_second".split()

# What a resumed run may change: anything else would make it another run.
MAY_CHANGE = set("steps micro_batch eval_every eval_tokens checkpoint_every out device precision compile "
                 "graph shard wandb data_dir prompt sample_tokens temperature top_k".split())


def write(path, content):
    """Make `path` hold text, or what torch.save makes of anything else: whole, or as it was before."""
    with durable(f"{path}.tmp") as file:
        file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
    os.replace(f"{path}.tmp", path)


def whole(tensor):
    """A copy of `tensor` on the CPU; of one that is cut over processes, all of it. All of them must call."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu().clone()


def fill(tensor, value):
    """Copy all of `value` into `tensor`, or this process's part of it. Raises RuntimeError."""
    if value.shape != tensor.shape:
        raise RuntimeError(f"shape {tuple(value.shape)} for {tuple(tensor.shape)}")
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor
        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    with torch.no_grad():
        return tensor.copy_(value)


class Run:
    """The run in config.out, or, without that, one that keeps nothing. Of several processes the first writes.

    `tokens` are the sha256 of what it is trained on. Raises UserError.
    """

    def __init__(self, config, tokens):
        self.config, self.tokens, self.file, self.log = config, tokens, None, None
        if config.wandb and importlib.util.find_spec("wandb") is None:
            raise UserError("wandb: got true, but it is not installed; pip install wandb, or --wandb=false")
        self.writes = processes()[0] == 0

    def path(self, name):
        return os.path.join(self.config.out, name)

    def load(self, model, optimizer):
        """The last checkpoint, loaded into model and optimizer, or None. Raises UserError."""
        if not self.config.out or not os.path.exists(path := self.path("last.pt")):
            return None
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            settings, tokens, step, _ = (checkpoint[name] for name in ("config", "tokens", "step", "past"))
        except Exception as error:
            raise UserError(f"{path}: not a checkpoint: {' '.join(str(error).split())[:120]}") from None
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
        for name in names if self.writes else ():
            write(self.path(name), {"step": step, "past": past, "model": weights, "optimizer": moments,
                                    "tokens": self.tokens, "config": asdict(self.config),
                                    "table": model.table()})

    def write(self, name, text):
        if self.writes and self.config.out:
            write(self.path(name), text)

    def close(self):
        if self.file:
            self.file.close()
        if self.log:
            self.log.finish()
