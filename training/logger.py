"""The run directory: what a run writes, where it resumes from, and its metrics in a file and on W&B.

config.json   its settings; RUN_DIR on the command line stands for this file
table.txt     the resolved parametrization
metrics.csv   a row per optimizer step, rewritten from the checkpoint when the run resumes
last.pt       the newest checkpoint; previous.pt the one before it, in case last.pt is damaged
best.pt       the checkpoint of the lowest validation loss
sample.txt    what the trained model writes
"""

import csv
import importlib.util
import json
import os
from dataclasses import asdict

from configure import UserError
from data.files import write_text
from training.checkpoint import check_resumable, checkpoint_content, load_state, read_newest, write_checkpoint
from training.distributed import rank

COLUMNS = "step tokens train_loss val_loss val_error val_bits_per_byte lr grad_norm tokens_per_second".split()


class RunLogger:
    """The run in config.out; without that, nothing is kept. Of several processes rank 0 writes.

    hashes: the sha256 of what the run is trained on. columns: those of the observers, after COLUMNS.
    Raises UserError.
    """

    def __init__(self, config, hashes, say=print):
        self.config, self.hashes, self.say = config, hashes, say
        self.metrics_file = self.metrics_writer = self.wandb_run = None
        self.is_writer = rank() == 0
        if config.wandb and importlib.util.find_spec("wandb") is None:
            raise UserError("wandb: got true, but it is not installed; pip install wandb, or --wandb=false")

    def path(self, name):
        return os.path.join(self.config.out or "", name)

    def load_checkpoint(self, model, optimizer):
        """The newest undamaged checkpoint, loaded into model and optimizer; None when there is none.

        Raises UserError.
        """
        if not self.config.out:
            return None
        paths = [path for path in map(self.path, ("last.pt", "previous.pt")) if os.path.exists(path)]
        if not paths:
            return None
        path, checkpoint = read_newest(paths, self.say)
        check_resumable(self.config, self.hashes, path, checkpoint)
        load_state(path, checkpoint, model, optimizer)
        return checkpoint

    def open(self, table, history, columns=()):
        """Begin, or continue after the rows of `history`."""
        if not self.is_writer:
            return
        if self.config.out:
            self.open_directory(table, history, columns)
        if self.config.wandb:
            import wandb
            mode = os.environ.get("WANDB_MODE")
            if not mode:
                mode = "online" if wandb.login(prompt=False) else "offline"
            self.wandb_run = wandb.init(project="mup-gpt", name=self.config.out, dir=self.config.out,
                                        mode=mode, config=asdict(self.config))

    def open_directory(self, table, history, columns):
        os.makedirs(self.config.out, exist_ok=True)
        for name in os.listdir(self.config.out):
            if name.endswith(".tmp"):  # left by a kill
                os.remove(self.path(name))
        self.write_text("config.json", json.dumps(asdict(self.config), indent=1))
        self.write_text("table.txt", f"{table}\n")
        earlier = [name for row in history for name in row if name not in COLUMNS]
        self.metrics_file = open(self.path("metrics.csv"), "w", buffering=1, newline="")
        all_columns = [*COLUMNS, *dict.fromkeys([*earlier, *columns])]
        self.metrics_writer = csv.DictWriter(self.metrics_file, all_columns, lineterminator="\n")
        self.metrics_writer.writeheader()
        self.metrics_writer.writerows(history)

    def log(self, rows):
        """Rows of metrics.csv, as dicts."""
        if self.metrics_writer:
            self.metrics_writer.writerows(rows)
        if self.wandb_run:
            for row in rows:
                self.wandb_run.log(row, step=row["step"])

    def save_checkpoints(self, names, step, past, model, optimizer):
        """Write one checkpoint under each of `names`. All ranks must call it, with the same names."""
        if not names or not self.config.out:
            return
        content = checkpoint_content(self.config, self.hashes, step, past, model, optimizer)
        if not self.is_writer:
            return
        for name in names:
            backup_path = self.path("previous.pt") if name == "last.pt" else None
            write_checkpoint(self.path(name), content, backup_path)

    def write_text(self, name, text):
        if self.is_writer and self.config.out:
            write_text(self.path(name), text)

    def close(self):
        if self.metrics_file:
            self.metrics_file.close()
        if self.wandb_run:
            self.wandb_run.finish()
