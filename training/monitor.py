"""Watching a run: what is measured while it trains, and what is said when its numbers go wrong.

To measure something new, write an Observer here and add it in build_observers().
"""

import math
from collections import deque

import torch

from parametrization import ROLES, role_of
from training.distributed import full_tensor

WINDOW = 100  # steps that a loss is compared with


class Observer:
    """Looks at the model before and after every `every`-th step; what it returns goes into that step's row of
    metrics.csv and to W&B, in columns that need not be named before.

    done: steps that are done after this one. model: the GPT. batch: (2, micro-batches, B, T), tokens and
    targets on the device. Both methods are called without gradients and in the precision of training. They
    may run the model: such passes are not compiled, so hooks on its modules see them. They must leave the
    weights alone; random numbers that they draw change nothing. With several processes all are called, each
    with its part of the batch, and rank 0's numbers are logged.
    """
    every = 1

    def before_step(self, done, model, batch):
        """Called before the step."""

    def after_step(self, done, model, batch, grad_norms):
        """{column: number, or tensor of one element on any device}. grad_norms: of each parameter's gradient
        in the order of model.parameters(), before clipping."""
        return {}


class Watch:
    """Calls the observers that are due around a step."""

    def __init__(self, observers, model, autocast):
        self.observers, self.model, self.autocast = observers, model, autocast

    @torch.no_grad()
    def before_step(self, done, batch):
        for observer in self.due_after(done):
            with self.autocast:
                observer.before_step(done, self.model, batch)

    @torch.no_grad()
    def after_step(self, done, batch, grad_norms):
        """{column: value} of all observers."""
        observed = {}
        for observer in self.due_after(done):
            with self.autocast:
                observed |= observer.after_step(done, self.model, batch, grad_norms)
        return observed

    def due_after(self, done):
        return [observer for observer in self.observers if done % observer.every == 0]


def build_observers(model, dataset, config):
    """What watches this run: nothing, unless a setting asks for it."""
    observers = []
    if config.log_roles:
        observers.append(RoleStatistics(model))
    return observers


class RoleStatistics(Observer):
    """Per role: gradient norm before clipping, RMS of the weights, RMS of their last update over that.

    Under μP the last of these is what should not depend on width, for hidden matrices. Costs a copy of the
    weights and a few passes over them at each step.
    """

    def __init__(self, model):
        self.parameters = [*model.parameters()]
        found = [role_of(name) for name, _ in model.named_parameters()]
        self.roles = [role for role in ROLES if role in found]
        device = self.parameters[0].device
        self.role_index = torch.tensor([self.roles.index(role) for role in found], device=device)
        sizes = torch.tensor([float(p.numel()) for p in self.parameters], device=device)
        self.sizes = self.sum_by_role(sizes)
        quantities = ("grad_norm", "weight_rms", "update_over_weight")
        self.columns = [f"{role}/{quantity}" for quantity in quantities for role in self.roles]

    def sum_by_role(self, values):
        """(parameters,) -> (roles,)"""
        return values.new_zeros(len(self.roles)).index_add(0, self.role_index, values)

    def rms(self, tensors):
        """The root mean square over each role's tensors, (roles,)."""
        norms = full_tensor(torch.stack(torch._foreach_norm(tensors)))
        return (self.sum_by_role(norms.square()) / self.sizes).sqrt()

    def before_step(self, done, model, batch):
        self.before = [p.detach().clone() for p in self.parameters]

    def after_step(self, done, model, batch, grad_norms):
        after = [p.detach() for p in self.parameters]
        weight_rms = self.rms(after)
        update_rms = self.rms(torch._foreach_sub(after, self.before))
        grad_norm = self.sum_by_role(grad_norms.square()).sqrt()
        # Weights that start at 0, behind others that do, have not moved after the first step
        ratio = torch.where(update_rms == 0, 0.0, update_rms / weight_rms)
        return dict(zip(self.columns, torch.cat((grad_norm, weight_rms, ratio)), strict=True))


def divergence_message(row, roles, grad_norms, precision):
    """The line about a row of metrics.csv that is not finite. `grad_norms`: one for each parameter, `roles`
    their roles; empty when not known."""
    norm_of_role = {}
    for role, norm in zip(roles, grad_norms, strict=False):
        norm_of_role[role] = math.hypot(norm_of_role.get(role, 0.0), norm)
    numbers = {name: row[name] for name in ("train_loss", "val_loss", "lr", "grad_norm") if name in row}
    worst_first = sorted(norm_of_role.items(), key=nan_then_largest)
    numbers |= {f"gradient of {role}": norm for role, norm in worst_first[:2]}
    listed = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
    return (f"diverged at step {row['step']}, in {precision}: {listed}; "
            "try a smaller --lr, a longer --warmup or a smaller --grad_clip")


def nan_then_largest(item):
    _, norm = item
    return (not math.isnan(norm), -norm)


class LossSpikeDetector:
    """Reports a loss far above those of the last WINDOW steps. `say` gets the line; grad_clip is the
    setting."""

    def __init__(self, grad_clip, say):
        self.recent = deque(maxlen=WINDOW)  # (loss, gradient norm)
        self.grad_clip, self.say = grad_clip or math.inf, say

    def update(self, rows):
        """Look at the newest rows of metrics.csv."""
        for row in rows:
            if len(self.recent) == WINDOW:
                self.compare(row["step"], row["train_loss"])
            self.recent.append((row["train_loss"], row["grad_norm"]))

    def compare(self, step, loss):
        # Summed anew each time: sums that are kept and moved along lose the small losses after a huge one
        mean = sum(loss for loss, _ in self.recent) / WINDOW
        deviation = math.hypot(*(loss - mean for loss, _ in self.recent)) / math.sqrt(WINDOW)
        if loss > mean + 8 * deviation:
            clipped = sum(norm > self.grad_clip for _, norm in self.recent)
            self.say(f"step {step:,}: the loss jumps to {loss:.3f}, from a mean of {mean:.3f} over {WINDOW} "
                     f"steps, of which {clipped / WINDOW:.0%} were clipped")
