"""The numbers of each step, read from the device a few steps late, so that it never waits for them."""

import math
import time
from statistics import median_high

import torch

WARM_STEPS = 3  # the first steps of a process compile, allocate and capture: their speed says nothing


class MetricsBuffer:
    """Keeps what the steps returned on the device until read() waits for it, and measures their speed.

    tokens_before: Config's.
    """

    def __init__(self, tokens_before):
        self.tokens_before = tokens_before
        self.steps = 0  # recorded so far
        self.pending = []
        self.speeds, self.warm_speeds = [], []  # tokens per second, one for each read
        self.grad_norms = []  # of each parameter, at the first step of the last read that is not finite
        self.restart_clock()

    def restart_clock(self):
        """Leave what happened since the last step (evaluation, checkpoints) out of the speed."""
        self.clock = time.perf_counter()

    def is_due(self, seconds):
        """Whether to read: `seconds` after the last time, and when the step has become warm."""
        return self.steps == WARM_STEPS or time.perf_counter() - self.clock > seconds

    def record(self, done, lr, numbers, observed):
        """`numbers`: what train_step() returned for the step after which `done` steps are done. observed:
        {column: number or tensor} of the observers."""
        self.pending.append((done, lr, numbers, observed))
        self.steps += 1

    def read(self):
        """The rows of metrics.csv, as dicts, of all steps since the last call. Waits for the device."""
        values = torch.stack([numbers for _, _, numbers, _ in self.pending]).tolist()
        observed = to_numbers([observed for _, _, _, observed in self.pending])
        first, last = self.pending[0][0] - 1, self.pending[-1][0]
        tokens = self.tokens_before(last) - self.tokens_before(first)
        speed = tokens / (time.perf_counter() - self.clock)
        (self.speeds if self.steps <= WARM_STEPS else self.warm_speeds).append(speed)
        rows = []
        for (done, lr, _, _), numbers, seen in zip(self.pending, values, observed, strict=True):
            rows.append({"step": done, "tokens": self.tokens_before(done), "train_loss": numbers[0],
                         "grad_norm": numbers[1], "lr": lr, "tokens_per_second": round(speed)} | seen)
        first_bad = next((i for i, row in enumerate(rows) if not is_finite(row)), -1)
        self.grad_norms = values[first_bad][2:]
        self.pending = []
        return rows

    def median_speed(self):
        """Tokens per second; of the first steps only where there are no others."""
        return median_high(self.warm_speeds or self.speeds or [math.nan])


def to_numbers(dicts):
    """`dicts`, with numbers in place of tensors of one element: all are copied from the device at once."""
    tensors = [value for observed in dicts for value in observed.values() if torch.is_tensor(value)]
    numbers = iter(torch.stack([tensor.detach().float().reshape(()) for tensor in tensors]).tolist()
                   if tensors else [])
    return [{name: next(numbers) if torch.is_tensor(value) else value for name, value in observed.items()}
            for observed in dicts]


def is_finite(row):
    return math.isfinite(row.get("train_loss", 0.0) + row.get("grad_norm", 0.0))
