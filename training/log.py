"""The numbers of a run: metrics.csv and loss.png in its directory; with --wandb=true, Weights & Biases."""

import csv
import importlib.util
import io
import os
import secrets
import time
from dataclasses import asdict

from configure import UserError
from training.distributed import rank
from training.loss_plot import FEWEST_STEPS, draw_loss, steps_to_draw

COLUMNS = "step tokens train_loss val_loss val_error val_bits_per_byte lr grad_norm tokens_per_second".split()
DRAWING_SHARE = 0.02  # of a run's time, at most, before its end


def check_wandb(config):
    """Raises UserError if W&B is asked for but not installed."""
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("wandb: got true, but it is not installed; pip install wandb, or --wandb=false")


def start_wandb(run_dir, config):
    """The run on Weights & Biases: a new one, or the one that this run directory began. Raises UserError."""
    import wandb
    mode, run_id = os.environ.get("WANDB_MODE"), None
    if config.out and os.path.exists(run_dir.path("wandb_id.txt")):
        with open(run_dir.path("wandb_id.txt"), encoding="utf-8", errors="replace") as file:
            run_id = file.read().strip()
    run_id = run_id or secrets.token_hex(4)
    try:
        if not mode:
            mode = "online" if wandb.login(prompt=False) else "offline"
        wandb_run = wandb.init(project="mup-gpt", name=config.out, dir=config.out, mode=mode, id=run_id,
                               resume="allow", config=asdict(config))
    except (wandb.Error, OSError, ValueError) as error:
        raise UserError(f"wandb: cannot begin ({one_line(error)}); use --wandb=false, a valid login, or "
                        "WANDB_MODE=offline in the environment") from None
    run_dir.write_text("wandb_id.txt", f"{run_id}\n")
    return wandb_run


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class RunLog:
    """Writes rows of metrics.csv, dicts, as they come; `history` is the list of all of them, which the caller
    extends. A row may have columns that none before it had. Of several processes rank 0 writes."""

    def __init__(self, run_dir, config, history):
        self.run_dir, self.history = run_dir, history
        self.columns, self.file, self.wandb_run = [*COLUMNS], None, None
        self.rows_drawn, self.said_why_not = 0, False
        self.next_drawing = 0.0  # not before this time.perf_counter()
        self.rewrite()
        if config.wandb and rank() == 0:
            self.wandb_run = start_wandb(run_dir, config)

    def rewrite(self):
        """Begin metrics.csv anew, with all rows of the history and all their columns."""
        if self.run_dir.check_held is None:
            return
        self.close_file()
        named = [name for row in self.history for name in row]
        self.columns = [*dict.fromkeys([*self.columns, *named])]
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        self.run_dir.write_text("metrics.csv", text.getvalue())
        self.file = open(self.run_dir.path("metrics.csv"), "a", buffering=1, newline="")

    def write(self, rows):
        """Log the newest rows of the history. Of an evaluation the run is drawn, too."""
        if any(name not in self.columns for row in rows for name in row):
            self.rewrite()
        elif self.file is not None:
            csv.DictWriter(self.file, self.columns, lineterminator="\n").writerows(rows)
        if self.wandb_run is not None:
            for row in rows:
                self.wandb_run.log(row, step=row["step"])
        if any("val_loss" in row for row in rows) and time.perf_counter() >= self.next_drawing:
            self.draw()

    def draw(self):
        """Make loss.png the picture of the history. A run does not end for want of one: what is wrong is
        said once."""
        if self.run_dir.check_held is None or len(steps_to_draw(self.history)) < FEWEST_STEPS:
            return
        if self.rows_drawn == len(self.history):
            return
        start = time.perf_counter()
        try:
            self.run_dir.write_bytes("loss.png", draw_loss(self.history, self.run_dir.config.out))
        except Exception as error:  # whatever a library of figures, its fonts or a disk may raise
            if not self.said_why_not:
                reason = "; pip install matplotlib" if isinstance(error, ImportError) else ""
                self.run_dir.say(f"{self.run_dir.path('loss.png')} was not drawn: {one_line(error)}{reason}")
            self.said_why_not = True
        self.rows_drawn, end = len(self.history), time.perf_counter()
        self.next_drawing = end + (end - start) / DRAWING_SHARE

    def close_file(self):
        if self.file is not None:
            self.file.close()

    def close(self):
        self.close_file()
        if self.wandb_run is not None:
            self.wandb_run.finish()
