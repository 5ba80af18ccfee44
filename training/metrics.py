"""The numbers of each step, read from the device a few steps late, so that it never waits for them."""

import math
import time

import torch


class MetricsBuffer:
    """Keeps what the steps returned on the device until read() waits for it, and measures their speed.

    tokens_before: Config's. columns: names of the observers' numbers. model_parameters: how many gradient
    norms a step returns.
    """

    def __init__(self, tokens_before, model_parameters, columns):
        self.tokens_before, self.columns = tokens_before, columns
        self.norms = slice(2, 2 + model_parameters)  # after loss and global gradient norm
        self.pending = []
        self.speeds = []  # tokens per second, one for each read
        self.grad_norms = []  # of each parameter, at the first step of the last read that is not finite
        self.restart_clock()

    def restart_clock(self):
        """Leave what happened since the last step (evaluation, checkpoints) out of the speed."""
        self.clock = time.perf_counter()

    def seconds_since_read(self):
        return time.perf_counter() - self.clock

    def record(self, step, lr, numbers):
        """`numbers`: the tensor that TrainStep returned for the step that made `step` steps done."""
        self.pending.append((step, lr, numbers))

    def read(self):
        """The rows of metrics.csv since the last read, as dicts. Waits for the device."""
        values = torch.stack([numbers for _, _, numbers in self.pending]).tolist()
        first, last = self.pending[0][0] - 1, self.pending[-1][0]
        tokens = self.tokens_before(last) - self.tokens_before(first)
        self.speeds.append(tokens / self.seconds_since_read())
        rows = []
        for (step, lr, _), numbers in zip(self.pending, values, strict=True):
            loss, grad_norm = numbers[:2]
            row = {"step": step, "tokens": self.tokens_before(step), "train_loss": loss,
                   "grad_norm": grad_norm, "lr": lr, "tokens_per_second": round(self.speeds[-1])}
            row |= zip(self.columns, numbers[self.norms.stop:], strict=True)
            rows.append(row)
        first_bad = next((i for i, row in enumerate(rows) if not is_finite(row)), -1)
        self.grad_norms = values[first_bad][self.norms]
        self.pending = []
        return rows

    def forget_speeds(self):
        """The first steps compile, allocate and capture: their speed says nothing."""
        self.speeds = []

    def median_speed(self):
        if not self.speeds:
            return math.nan
        return sorted(self.speeds)[len(self.speeds) // 2]


def is_finite(row):
    return math.isfinite(row.get("train_loss", 0.0) + row.get("grad_norm", 0.0))
