"""What a run says when its numbers go wrong."""

import math
from collections import deque

SPAN = 100  # steps that a loss is held against


def divergence(row, roles, parts, bf16):
    """The line about the row of metrics.csv that is no number. `parts`: the norms of the gradients of
    parameters whose roles are `roles`."""
    sizes = {}
    for role, part in zip(roles, parts, strict=False):
        sizes[role] = math.hypot(sizes.get(role, 0.0), part)
    numbers = {name: row[name] for name in ("train_loss", "val_loss", "lr", "grad_norm") if name in row}
    numbers |= {f"gradient of {role}": size for role, size in sorted(sizes.items(), key=rank)[:2]}
    return (f"diverged at step {row['step']}, in {'bf16' if bf16 else 'fp32'}: "
            + ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
            + "; try a smaller --lr, a longer --warmup or a smaller --grad_clip")


def rank(item):
    """The largest first, and what is no number before that."""
    return (not math.isnan(item[1]), -item[1])


class Leaps:
    """Tells of losses far above those before them. `say` gets the line, `clip` is the setting grad_clip."""

    def __init__(self, clip, say):
        self.recent, self.clip, self.say = deque(), clip or math.inf, say
        self.sum = self.squares = 0.0  # of the recent losses: kept, as every step looks

    def look(self, row):
        loss, norm = row["train_loss"], row["grad_norm"]
        if len(self.recent) == SPAN:
            mean = self.sum / SPAN
            deviation = math.sqrt(max(0.0, self.squares / SPAN - mean**2))
            if loss > mean + 8 * deviation:
                clipped = sum(old > self.clip for _, old in self.recent)
                self.say(f"step {row['step']:,}: the loss leaps to {loss:.3f}, from {mean:.3f} over {SPAN} "
                         f"steps, of which {clipped / SPAN:.0%} were clipped")
            old, _ = self.recent.popleft()
            self.sum, self.squares = self.sum - old, self.squares - old**2
        self.recent.append((loss, norm))
        self.sum, self.squares = self.sum + loss, self.squares + loss**2
