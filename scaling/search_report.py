"""What a search leaves for people: best.py, search.txt and the lines at its end."""

import math
import shlex
from dataclasses import replace

from configure import FOR_TARGET, FOUND_BY_SEARCH, TUNED, UNFINISHED, names_in, split_words
from scaling.fits import lowest_end, mean_and_error
from scaling.plan import format_share, training_flops
from scaling.rows import loss_of
from scaling.space import Range, at_edge, widened
from scaling.study import importances
from scaling.trials import complete_rows, find_row

# What best.py leaves to the target: its size, its batches, and how much of the text it reads
TARGETS_OWN = {"width", "depth", "head_dim", "kv_heads", "context", "vocab_size", "batch", "batch_start",
               "batch_ramp_tokens", "max_tokens", "init_from", "seed"}
COMMENTS = {"base_width": "  # base_*: the shape at which all rules are the identity; leave it as it is"}


def format_losses(search, rows, config):
    """The mean loss of a Config and its standard error, over the fresh seeds of which `rows` has one. The
    error is that of the verification, where there is one, so that a mean has one error wherever it stands."""
    done = complete_rows(rows)
    fresh = [replace(config, seed=config.seed + k) for k in range(1, search.options["seeds"] + 1)]
    found = [row for each in fresh if (row := find_row(done, search.key_of(each)))]
    mean, error = mean_and_error([loss_of(row) for row in found])
    if search.verification:
        error = search.verification.error_of(found)
    return format_mean(mean, error, len(found))


def format_mean(mean, error, seeds):
    noise = f" ± {error:.4f}" if math.isfinite(mean) and math.isfinite(error) else ""
    return f"{mean:.4f}{noise} (seeds: {seeds})"


def format_best(search, draws, others):
    """The text of best.py: how it was found, and all that the target takes from the proxy. What came from
    outside, as the name of a data set, stands there as a literal and nowhere else."""
    mean, _, config = search.best or search.lowest_draw(draws)
    loss = f"{mean:.4f} on one seed"
    if search.best:
        loss = f"{format_losses(search, draws + others, config)}, on seeds that no draw used"
    if search.failed() or not search.best:
        loss += f": {UNFINISHED}"
    lines = [f"# The best of {len(draws)} trials at width {config.width}, depth {config.depth}, "
             f"{config.steps} steps of {config.batch}x{config.context} tokens.",
             f"# Validation loss {loss}.",
             f"{FOUND_BY_SEARCH}: sampler {search.options['sampler']}, seed {config.seed}, "
             f"{len(draws)} draws and {len(others)} trials for seeds, lr and verification, "
             f"{spent_flops(draws + others):.2e} FLOPs."]
    if search.target is not None:
        lines.append(f"{FOR_TARGET}{search.options['target']}")
    if search.verification:
        (width, depth), found = search.sizes[0], search.verification
        loss = format_mean(found.loss, found.error, len(found.winner.rows))
        lines += [f"# Chosen by its loss at width {width}, depth {depth}, {loss}: {found.winner.name}.",
                  "# ± is a standard error by the noise of all candidates of that size together (pooled)."]
    for group in ("data", "function", "init", "optimizer", "training"):
        lines += ["", f"# {group.capitalize()}"]
        names = [name for name in names_in(group) if name not in TARGETS_OWN]
        lines += [f"{name} = {getattr(config, name)!r}{COMMENTS.get(name, '')}" for name in names]
    return "\n".join(lines) + "\n"


def format_report(search, draws, others):
    """What the search found, for people."""
    losses = [loss_of(row) for row in draws]
    finite = sorted(loss for loss in losses if math.isfinite(loss))
    stopped = sum(row["failure"].startswith("stopped early") for row in draws)
    lines = [f"{len(draws)} draws: best {finite[0]:.4f}, median {finite[len(finite) // 2]:.4f} of the "
             f"{len(finite)} that were trained to the end; {stopped} stopped early, "
             f"{len(draws) - len(finite) - stopped} diverged; {len(others)} more trials for seeds, lr and "
             "verification"]
    if search.failed():
        lines.append(f"{len(search.failed())} trials failed, and are tried again by the same command")
    counts = [n for n in (1, 8, 16, 32, 64, 128, 256, 512) if n < len(draws)] + [len(draws)]
    reached = [f"{n}: {min(losses[:n]):.4f}" for n in counts]
    lines.append(f"best after so many draws: {', '.join(reached)}")
    if search.leaders:
        error = "pooled standard error" if search.verification else "standard error"
        lines += [f"leaders, before the lr of the first is tuned; mean ± {error} so far, on seeds that",
                  "no draw used; compare rows with equal numbers of seeds:"]
        lines += [f"  {i}. {format_losses(search, draws + others, config)}  {describe(config, search.space)}"
                  for i, (_, _, config) in enumerate(search.leaders, start=1)]
    lines += describe_lr(search) + describe_edges(search, draws) + describe_importances(search)
    if search.verification:
        lines.append(search.verification.text)
    return "\n".join(lines) + "\n"


def describe_lr(search):
    """A line where the lr of the first leader was still getting better at the last lr that was tried."""
    end = lowest_end(search.lr_curve) if search.lr_curve else None
    if end is None:
        return []
    low, high = math.log2(min(search.lr_curve)), math.log2(max(search.lr_curve))
    return [f"the lr of the first was tuned from 2**{low:.2f} to 2**{high:.2f}; its loss is lowest at "
            f"2**{math.log2(end):.2f}, an end of that, so a better lr may lie beyond"]


def describe_edges(search, draws):
    """Lines about the ends of ranges: what was widened, and where the best lies now."""
    _, _, best = search.best or search.lowest_draw(draws)
    lines = [f"widened, as the best draw lay at an end: {format_domain(name, search.space[name])}"
             for name in search.widened]
    wider = widened(search.space, best, own=True)
    edges = [f"{name} ({end})" for name, end in at_edge(best, search.space) if name in wider]
    if edges:
        items = ",".join(format_domain(*item) for item in (search.space | wider).items())
        lines.append(f"at an end of its range, so that better may lie beyond: {', '.join(edges)}\n"
                     f"  to look there, search again with another --out and --space={items}")
    return lines


def format_domain(name, domain):
    if not isinstance(domain, Range):
        return name if len(domain.values) > 1 else f"{name}:{str(domain.values[0]).lower()}"
    low, high = (1 - domain.high, 1 - domain.low) if domain.complement else (domain.low, domain.high)
    return f"{name}:{low:.5g}..{high:.5g}"


def describe_importances(search):
    shares = importances(search.draws, search.domains)
    if not shares:
        return []
    return ["importance (PED-ANOVA: how much each decides whether a draw is among the best tenth;\nwhat was "
            "settled early was hardly varied after, and looks less important than it is):",
            *(f"  {name:22}{share:6.1%}" for name, share in shares.items())]


def describe(config, space):
    """The settings that were drawn, on one line."""
    values = []
    for name in space:
        value = getattr(config, name)
        text = f"{value:.3g}" if isinstance(value, float) else value
        values.append(f"lr=2**{math.log2(value):.2f}" if name == "lr" else f"{name}={text}")
    return " ".join(values)


def spent_flops(rows):
    """Training FLOPs of all rows, of those that were stopped too."""
    return sum(row["flops"] for row in rows if math.isfinite(row["flops"]))


def format_cost(search, rows):
    """What the search took, and as a share of the target's training."""
    spent = spent_flops(rows)
    if search.target is None:
        return f"tuning took {spent:.2e} FLOPs"
    flops = training_flops(search.target)
    return (f"tuning took {spent:.2e} FLOPs, {format_share(spent / flops)} one training of "
            f"{search.options['target']}, {flops:.2e}")


def next_command(options, words):
    """The command that trains the target with what was found. words: those of the search's command line."""
    sources, flags = split_words(words)
    own = [] if sources else [f"--{name}={value}" for name, value in flags.items() if name not in TUNED]
    return shlex.join(["python", "train.py", options["target"], f"{options['out']}/best.py", *own])
