"""The run directory: what a run writes, where it resumes from, and its metrics in a file and on W&B.

config.json   its settings; RUN_DIR on the command line stands for this file
table.txt     the resolved parametrization
tokenizer.*   the tokenizer, so that the folder is all that it takes to use the model
metrics.csv   a row per optimizer step, rewritten from the checkpoint when the run resumes
last.pt       the newest checkpoint; previous.pt the one before it, in case last.pt is damaged
best.pt       the checkpoint of the lowest validation loss
stable.pt     with --schedule=wsd, the checkpoint before the decay: where a run that gets more steps goes on
sample.txt    what the trained model writes
run.lock      while a process writes here: which one
"""

import contextlib
import csv
import importlib.util
import json
import os
from dataclasses import asdict, replace

from configure import UserError
from data.files import write_text
from data.tokenizer import keep_tokenizer
from training.checkpoint import (
    check_same_settings,
    check_same_tokens,
    checkpoint_content,
    load_state,
    load_weights,
    read_checkpoint,
    read_newest,
    settings_of_checkpoint,
    write_checkpoint,
)
from training.distributed import rank
from training.folder import UNFINISHED, check_is_ours, locked_folder
from training.schedule import decay_start

COLUMNS = "step tokens train_loss val_loss val_error val_bits_per_byte lr grad_norm tokens_per_second".split()


@contextlib.contextmanager
def own_run_dir(config):
    """Within, this process alone (with the other ranks) writes to config.out, if that is set. Raises
    UserError where another process does, or where files of something else lie."""
    if config.out is None or rank() > 0:
        yield
        return
    with locked_folder(config.out):
        check_is_ours(config.out)
        yield


def start_wandb(config):
    """The run on Weights & Biases. Raises UserError when that cannot begin."""
    import wandb
    mode = os.environ.get("WANDB_MODE")
    try:
        if not mode:
            mode = "online" if wandb.login(prompt=False) else "offline"
        return wandb.init(project="mup-gpt", name=config.out, dir=config.out, mode=mode,
                          config=asdict(config))
    except (wandb.Error, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"wandb: cannot begin ({type(error).__name__}: {reason}); takes false, a login that "
                        "holds, or the environment's WANDB_MODE=offline") from None


class RunLogger:
    """The run in config.out; without that, nothing is kept. Of several processes rank 0 writes. Raises
    UserError."""

    def __init__(self, config, say=print):
        self.config, self.say = config, say
        self.metrics_file = self.metrics_writer = self.wandb_run = None
        self.last_step = None  # of a last.pt that is known to be sound, and so may become previous.pt
        self.is_writer = rank() == 0
        if config.wandb and importlib.util.find_spec("wandb") is None:
            raise UserError("wandb: got true, but it is not installed; pip install wandb, or --wandb=false")

    def path(self, name):
        return os.path.join(self.config.out or "", name)

    def read_checkpoint(self):
        """The newest undamaged checkpoint, if its settings are config's; None when there is none. Raises
        UserError."""
        if not self.config.out:
            return None
        paths = [path for path in map(self.path, ("last.pt", "previous.pt")) if os.path.exists(path)]
        if not paths:
            return None
        self.checkpoint_path, checkpoint = read_newest(paths, self.say)
        if self.checkpoint_path == self.path("last.pt"):
            self.last_step = checkpoint["step"]
        check_same_settings(self.config, self.checkpoint_path, checkpoint)
        return self.before_decay(checkpoint)

    def before_decay(self, checkpoint):
        """`checkpoint`, or stable.pt where that is where more steps go on as if they had been there from the
        start: in wsd's decay."""
        steps_before = settings_of_checkpoint(checkpoint)["steps"]
        start = decay_start(replace(self.config, steps=steps_before))
        if start is None or steps_before >= self.config.steps or checkpoint["step"] <= start:
            return checkpoint
        try:
            stable = read_checkpoint(self.path("stable.pt"))
            check_same_settings(self.config, self.path("stable.pt"), stable)
        except UserError:  # missing, damaged, or of another run: what goes on is the decayed model
            return checkpoint
        if stable["step"] != start:
            return checkpoint
        self.checkpoint_path = self.path("stable.pt")
        self.say(f"{self.checkpoint_path}: more steps go on from here, step {start:,}, before the decay")
        return stable

    def load(self, checkpoint, dataset, model, optimizer):
        """Bring model and optimizer to where read_checkpoint()'s result says. Raises UserError."""
        if checkpoint is not None:
            check_same_tokens(self.config, dataset, self.checkpoint_path, checkpoint)
            load_state(self.checkpoint_path, checkpoint, model, optimizer)

    def load_best(self, model):
        """Whether there is an undamaged best.pt that fits: its weights are then in `model`."""
        try:
            path = self.path("best.pt")
            load_weights(path, read_checkpoint(path), model)
            return True
        except UserError:
            return False

    def open(self, table, tokenizer, history, columns=()):
        """Begin, or continue after the rows of `history`. columns: those of the observers, after COLUMNS.
        Raises UserError."""
        if not self.is_writer:
            return
        if self.config.out:
            self.open_directory(table, tokenizer, history, columns)
        if self.config.wandb:
            self.wandb_run = start_wandb(self.config)

    def open_directory(self, table, tokenizer, history, columns):
        for name in UNFINISHED:  # left by a kill
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.path(name))
        self.write_text("config.json", json.dumps(asdict(self.config), indent=1))
        self.write_text("table.txt", f"{table}\n")
        keep_tokenizer(tokenizer, self.config.out)
        earlier = [name for row in history for name in row if name not in COLUMNS]
        self.columns = [*COLUMNS, *dict.fromkeys([*earlier, *columns])]
        self.write_history(history)

    def write_history(self, history):
        """Begin metrics.csv anew, with the rows of `history`."""
        if not self.is_writer or not self.config.out:
            return
        if self.metrics_file:
            self.metrics_file.close()
        self.metrics_file = open(self.path("metrics.csv"), "w", buffering=1, newline="")
        self.metrics_writer = csv.DictWriter(self.metrics_file, self.columns, lineterminator="\n")
        self.metrics_writer.writeheader()
        self.metrics_writer.writerows(history)

    def log(self, rows):
        """Rows of metrics.csv, as dicts."""
        if self.metrics_writer:
            self.metrics_writer.writerows(rows)
        if self.wandb_run:
            for row in rows:
                self.wandb_run.log(row, step=row["step"])

    def save_checkpoints(self, names, step, past, dataset, model, optimizer):
        """Write one checkpoint under each of `names`. All ranks must call it, with the same names."""
        if not names or not self.config.out:
            return
        content = checkpoint_content(self.config, dataset, step, past, model, optimizer)
        if not self.is_writer:
            return
        for name in names:
            backup_path = None
            if name == "last.pt" and self.last_step not in (None, step):  # else previous.pt is better
                backup_path = self.path("previous.pt")
            write_checkpoint(self.path(name), content, backup_path)
            if name == "last.pt":
                self.last_step = step

    def take_back_last(self):
        """The newest checkpoint was not sound: the one before it is the last again."""
        if not self.is_writer or not self.config.out:
            return
        if os.path.exists(self.path("previous.pt")):
            os.replace(self.path("previous.pt"), self.path("last.pt"))
        else:
            os.remove(self.path("last.pt"))

    def write_text(self, name, text):
        if self.is_writer and self.config.out:
            write_text(self.path(name), text)

    def close(self):
        if self.metrics_file:
            self.metrics_file.close()
        if self.wandb_run:
            self.wandb_run.finish()
