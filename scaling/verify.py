"""The settings that a search found, tried between the proxy and the target, before the target is paid for.

Candidates are trained at a larger size too, with the target's own context, batch and steps, by racing: all on
one seed, the better half on a second, the best two on the rest. Their order there chooses. The winner alone
is trained at up to two more sizes, for a forecast of the target's loss (scaling/forecast.py).
"""

import math
import os
from dataclasses import replace
from itertools import permutations
from typing import NamedTuple

import numpy as np

from configure import UserError
from data.loader import with_vocab_size
from scaling.fits import optimum, rank_correlation
from scaling.forecast import forecast
from scaling.rows import loss_of
from training.model_size import model_size

OWN_SETTINGS = "own settings"  # the end of a name of the candidate that no search made

LEAST, MOST = 2, 4  # times the proxy's width: where all candidates are trained
SECOND = 1.25  # times that width, at the least, for a second size,
SECOND_COST = 0.2  # and at most this share of a training of the target
AS_TARGET = ("context", "batch", "batch_start", "batch_ramp_tokens", "steps", "head_dim", "kv_heads")
OCTAVES = -1/2, 0, 1/2  # from the winner's lr, for its shift
PRIOR_NOISE, PRIOR_DEGREES = 0.015, 3  # nats between seeds, before any are seen, worth so many degrees
BELOW = {"fontsize": 10, "loc": "upper center", "bbox_to_anchor": (0.5, -0.14)}  # a legend under its panel
CLEAR = 0.02  # nats: less is no difference, whatever the seeds say


# Sizes

def sizes_between(proxy, target, verify_width=None):
    """[(width, depth)] strictly between two Configs, the smaller first: where all candidates are trained, of
    verify_width or about a third of the way in the logarithm, and where there is room a larger one, for the
    winner alone. Empty where the target is at most twice as wide. Raises UserError for a verify_width that
    does not lie between, or holds no whole number of heads."""
    head = target.head_dim
    if verify_width and (verify_width % head or not proxy.width < verify_width < target.width):
        raise UserError(f"verify_width must be a multiple of head_dim ({head}) above the proxy's width "
                        f"({proxy.width}) and below the target's ({target.width}), got {verify_width}")
    ratio = target.width / proxy.width
    if ratio <= LEAST and not verify_width:
        return []
    first = verify_width or head * round(proxy.width * min(max(ratio ** (1/3), LEAST), MOST) / head)
    first = max(first, head * (proxy.width // head + 1))
    if first >= target.width:
        return []
    sizes = [(first, depth_at(first, proxy, target))]
    cost = target.depth * target.width**2
    for width in range(target.width - head, math.ceil(SECOND * first) - 1, -head):
        depth = depth_at(width, proxy, target)
        if depth * width**2 <= SECOND_COST * cost:
            return [*sizes, (width, depth)]
    return sizes


def depth_at(width, proxy, target):
    """The depth that lies as far between the two as the width, in the logarithm."""
    share = math.log(width / proxy.width) / math.log(target.width / proxy.width)
    return max(1, round(proxy.depth * (target.depth / proxy.depth) ** share))


def size_below(proxy, target):
    """(width, depth) of half the proxy's width: it costs little, and shows how the loss bends. None where
    that holds no whole heads: half the depth in its place lies far off the law where a text has much to
    copy, and once made a forecast 0.2 nats too high (Muon, manual pages: 2.450, measured 2.233)."""
    half = proxy.width // 2
    return (half, proxy.depth) if half % target.head_dim == 0 else None


def race_counts(candidates, seeds):
    """How many of the candidates are trained on the first seed, on the second, ..."""
    half = max(2, math.ceil(candidates / 2))
    counts = [candidates, half] + [2] * (max(2, seeds) - 2)
    return [min(count, candidates) for count in counts]


def count_trainings(sizes, candidates, seeds):
    """How many trainings verify() makes at most at each of `sizes`, of so many candidates."""
    first = sum(race_counts(candidates, seeds)) + len(OCTAVES)  # one is in the race, one may lie beyond
    return [first, 1][:len(sizes)]


def count_at_proxy(candidates):
    """The same at the proxy: two of each, fewer where the search has made them, and those for the lr."""
    return 2 * candidates + 2 * len(OCTAVES)


def as_target(config, target, width, depth):
    """A candidate at another shape, with whatever else the target has of its own that the proxy may not."""
    own = replace(config, width=target.width, depth=target.depth, micro_batch=None,
                  **{name: getattr(target, name) for name in AS_TARGET})
    return resized(own, width, depth)


def resized(config, width, depth):
    """`config` at another width and depth, with as many heads of queries to each of keys and values, or the
    nearest there can be."""
    if config.kv_heads is None:
        return replace(config, width=width, depth=depth)
    per_kv_head = config.width // config.head_dim // config.kv_heads
    heads = width // config.head_dim
    kv_heads = max(1, heads // per_kv_head)
    while heads % kv_heads:
        kv_heads -= 1
    return replace(config, width=width, depth=depth, kv_heads=kv_heads)


# Trainings

class Candidate(NamedTuple):
    """What one candidate reached: its rows at the proxy and at the larger size, one a seed."""
    name: str
    config: object  # a Config at the proxy's shape
    proxy_rows: list
    rows: list


def mean_loss(rows):
    """Infinite where one diverged, or there is none."""
    return float(np.mean([loss_of(row) for row in rows])) if rows else math.inf


def on_shared_seeds(candidates):
    """These Candidates with the rows of the seeds alone that all of them have, wherever they have any."""
    columns = [rows for each in candidates for rows in (each.proxy_rows, each.rows) if rows]
    seeds = [{row["seed"] for row in rows} for rows in columns]
    def shared(rows):
        return [row for row in rows if all(row["seed"] in others for others in seeds)]
    return [each._replace(proxy_rows=shared(each.proxy_rows), rows=shared(each.rows)) for each in candidates]


def rows_over_seeds(search, configs, seeds, what):
    """[rows] of each Config on these fresh seeds (1, 2, ...); of a training that failed there is no row."""
    asked = [replace(config, seed=config.seed + seed) for config in configs for seed in seeds]
    rows = search.rows_of(asked, what)
    size = len(seeds)
    return [[row for row in rows[i:i + size] if row] for i in range(0, len(rows), size)]


def race(search, configs, seeds, what):
    """[rows] of each Config: those that look worse get fewer seeds."""
    rows, ahead = [[] for _ in configs], list(range(len(configs)))
    for seed, count in enumerate(race_counts(len(configs), seeds), start=1):
        ahead = sorted(ahead, key=lambda i: mean_loss(rows[i]))[:count] if seed > 1 else ahead
        found = rows_over_seeds(search, [configs[i] for i in ahead], [seed], what)
        for i, new in zip(ahead, found, strict=True):
            rows[i] += new
    return rows


def pooled_noise(groups):
    """(standard deviation of one training over seeds, its degrees of freedom) of groups of rows, each of one
    Config: pooled, with PRIOR_NOISE, as two seeds alone may agree by chance."""
    losses = [[loss_of(row) for row in rows] for rows in groups if np.isfinite(mean_loss(rows))]
    degrees = PRIOR_DEGREES + sum(len(group) - 1 for group in losses)
    squares = PRIOR_DEGREES * PRIOR_NOISE**2 + sum(np.var(group) * len(group) for group in losses)
    return math.sqrt(squares / degrees), degrees


def lr_at(search, config, what):
    """(log2 of the best lr, or None where it is not between those tried; {lr: loss}) of a Config, on one
    seed. Where the lowest loss is at an end, one lr beyond it is tried, an octave from that of the Config."""
    losses, octaves = {}, OCTAVES
    while True:
        around = [replace(config, lr=config.lr * 2**octave) for octave in octaves]
        rows = rows_over_seeds(search, around, [1], what)
        losses |= {each.lr: mean_loss(of_lr) for each, of_lr in zip(around, rows, strict=True)}
        best = optimum(losses)
        if best or len(losses) > len(OCTAVES):
            return best and float(best[0]), losses
        octaves = [math.copysign(1, min(losses, key=losses.get) - config.lr)]


def verify(search, candidates, target, sizes):
    """The Verification of candidates, [(name, Config at the proxy's shape)], at `sizes` of sizes_between()
    for a target, a Config. search: trains by its rows_of(), on options["seeds"] seeds, two at least."""
    names, configs = zip(*candidates, strict=True)
    seeds = max(2, search.options["seeds"])
    larger = [as_target(config, target, *sizes[0]) for config in configs]
    proxy_rows = rows_over_seeds(search, configs, [1, 2], "candidates at the proxy")
    rows = race(search, larger, seeds, "candidates at a larger size")
    found = [Candidate(*each) for each in zip(names, configs, proxy_rows, rows, strict=True)]
    winner = min(found, key=lambda each: (-len(each.rows), mean_loss(each.rows)))
    shift = [lr_at(search, winner.config, "lr at the proxy"),
             lr_at(search, as_target(winner.config, target, *sizes[0]), "lr at a larger size")]
    noise = pooled_noise([candidate.rows for candidate in found])
    points = forecast_points(search, winner, target, sizes, noise[0])
    return Verification(found, winner, target, sizes, noise, shift, points, search)


def forecast_points(search, winner, target, sizes, noise):
    """[(width, depth, parameters, loss, standard error)] of the winner from below the proxy to the last of
    `sizes`, all trained with the target's context, batch and steps; without those that diverged."""
    shape, below = (winner.config.width, winner.config.depth), size_below(winner.config, target)
    by_shape = {sizes[0]: winner.rows}
    for size, seeds in ((below, [1, 2]), (shape, [1, 2]), *((size, [1]) for size in sizes[1:])):
        if size:
            config = as_target(winner.config, target, *size)
            by_shape[size], = rows_over_seeds(search, [config], seeds, "the best at other sizes")
    points = [(*size, rows[0]["parameters"], mean_loss(rows), noise / math.sqrt(len(rows)))
              for size, rows in by_shape.items() if np.isfinite(mean_loss(rows))]
    return sorted(points, key=lambda point: point[2])


# What it says

class Verification:
    """The outcome of verify(): `best` (a Config at the proxy's shape), its `loss` and standard `error` at the
    larger size, `holds` (whether the proxy ranked as the larger size does), `forecast` of the target's loss,
    (low, middle, high) or None, and `text`, for people."""

    def __init__(self, found, winner, target, sizes, noise, shift, points, search):
        self.found, self.winner, self.target, self.sizes = found, winner, target, sizes
        self.shift, self.points = shift, points
        at_proxy = pooled_noise([each.proxy_rows for each in found])
        self.noises = {winner.config.width: at_proxy[0], sizes[0][0]: noise[0]}  # by width
        self.best, self.loss, self.error = winner.config, mean_loss(winner.rows), self.error_of(winner.rows)
        proxy, larger = ([mean_loss(getattr(each, column)) for each in on_shared_seeds(found)]
                         for column in ("proxy_rows", "rows"))
        self.rank = rank_correlation(np.array(proxy), np.array(larger))
        self.favourite = min(found, key=lambda each: mean_loss(each.proxy_rows))
        self.misordered = self.find_misordered()
        self.holds = not self.misordered and math.isfinite(self.loss)
        self.parameters = model_size(with_vocab_size(target, search.dataset)).parameters
        self.forecast = None
        if len(points) > 1 and math.isfinite(self.loss):
            self.forecast = forecast(points, (target.width, target.depth), *noise)
        self.text = "\n".join([*self.format_table(), *self.format_judgement(), *self.format_lr(),
                               *self.format_forecast()])

    def error_of(self, rows):
        """Standard error of the mean of these rows, by the noise of all of their width."""
        return self.noises[rows[0]["width"]] / math.sqrt(len(rows)) if rows else math.nan

    def find_misordered(self):
        """[(a, b)]: a is clearly better than b at the proxy, and clearly worse at the larger size; by more
        than CLEAR and two standard errors, on the seeds that both have. For the proxy's favourite a tie there
        is enough: a search would have chosen it."""
        def clearly_worse(rows, others):
            error = math.hypot(self.error_of(rows), self.error_of(others))
            return mean_loss(rows) - mean_loss(others) > max(CLEAR, 2 * error)
        return [(a, b) for a, b in map(on_shared_seeds, permutations(self.found, 2))
                if clearly_worse(a.rows, b.rows)
                and (a.name == self.favourite.name or clearly_worse(b.proxy_rows, a.proxy_rows))]

    def format_table(self):
        (width, depth), proxy = self.sizes[0], self.best
        length = max(len(each.name) for each in self.found)
        lines = [f"verified at width {width}, depth {depth}, {self.target.steps:,} steps of "
                 f"{self.target.batch} x {self.target.context} tokens; what looked worse, on fewer seeds;",
                 "mean validation loss ± standard error, by the noise of all candidates of a size together "
                 "(pooled), and",
                 "the number of seeds; compare rows with equal numbers of seeds:",
                 f"  {'':{length}}  {f'proxy {proxy.width} x {proxy.depth}':>22}"
                 f"  {f'{width} x {depth}':>22}"]
        for each in sorted(self.found, key=lambda each: (-len(each.rows), mean_loss(each.rows))):
            mark = "  <- chosen" if each is self.winner else ""
            at_proxy, at_larger = (f"{mean_loss(rows):.4f} ± {self.error_of(rows):.4f} ({len(rows)})"
                                   for rows in (each.proxy_rows, each.rows))
            lines.append(f"  {each.name:{length}}  {at_proxy:>22}  {at_larger:>22}{mark}")
        return lines

    def format_judgement(self):
        rank = "" if math.isnan(self.rank) else f" (rank correlation {self.rank:+.2f}, on shared seeds)"
        lines = [f"the proxy's order holds at the larger size, to within seed noise{rank}"]
        if self.holds and self.winner is not self.favourite:
            lines.append(f"chosen: {self.winner.name}, though {self.favourite.name} was best at the proxy; "
                         "at the larger size the two differ by no more than seed noise")
        if self.holds:
            return lines + self.format_gain()
        if not math.isfinite(self.loss):
            return ["NO CANDIDATE WAS TRAINED TO ITS END at the larger size; before you pay for the target: "
                    "search again with smaller learning rates, for example --space=lr:2**-12..2**-8"]
        lines = [f"THE PROXY'S ORDER DOES NOT HOLD at the larger size{rank}:"]
        for a, b in self.misordered[:3]:
            difference = mean_loss(a.rows) - mean_loss(b.rows)
            outcome = f"is {difference:.3f} worse" if math.isfinite(difference) else "diverges"
            lines.append(f"  {a.name} looked no worse than {b.name} at the proxy, and {outcome} at the "
                         "larger size, on the seeds they share")
        return [*lines, f"before you pay for the target: {self.advice()}"]

    def format_gain(self):
        """The line that compares what was chosen with the settings that the target has without a search."""
        # Not a leader that is "= your target's own settings at lr x 1.4"
        own = [each for each in self.found
               if any(name.endswith(OWN_SETTINGS) for name in each.name.split(" = "))]
        if not own or own[0] is self.winner:
            return []
        ours, theirs = on_shared_seeds([self.winner, own[0]])
        gain = mean_loss(theirs.rows) - mean_loss(ours.rows)
        if not math.isfinite(gain):
            return []
        error = math.hypot(self.error_of(ours.rows), self.error_of(theirs.rows))
        where = "at {} x {}".format(*self.sizes[0])
        return [f"{where} {self.winner.name} ends {abs(gain):.3f} ± {error:.3f} nats "
                f"{'below' if gain > 0 else 'above'} {own[0].name} (on the seeds that both have)"]

    def advice(self):
        """What to change in the proxy."""
        differing = [name for name in AS_TARGET
                     if name != "kv_heads" and getattr(self.best, name) != getattr(self.target, name)]
        if differing:
            values = ", ".join(f"{name} {getattr(self.target, name)}" for name in differing)
            return f"search again with a proxy that has the target's own {values}"
        return (f"search again with a wider proxy (--proxy_width={self.sizes[0][0]}) or more tokens a step "
                f"(--batch={2 * self.target.batch}, for the target too)")

    def format_lr(self):
        (at_proxy, _), (at_larger, losses) = self.shift
        if not math.isfinite(self.loss):
            return []
        where, octaves = "at {} x {}".format(*self.sizes[0]), "octaves (factors of 2)"
        if at_larger is None:
            lowest = math.log2(min(losses, key=losses.get) / self.best.lr)
            return [f"the best lr {where} was not found: of the {len(losses)} tried, on one seed, the lowest "
                    f"loss is at the one {lowest:+.1f} {octaves} from the chosen lr"]
        start, which = at_proxy, "the proxy's best"
        if at_proxy is None:
            start, which = math.log2(self.best.lr), "the chosen one"
        return [f"the best lr {where} lies {at_larger - start:+.2f} {octaves} from {which} (on one seed)"]

    def format_forecast(self):
        name = f"the target's loss ({self.target.width} x {self.target.depth})"
        if self.forecast is None:
            return [f"no forecast of {name}: too few sizes were trained to their end"]
        low, middle, high = self.forecast
        return [f"forecast of {name}: {middle:.3f}, 95% interval {low:.3f} to {high:.3f}, from the chosen "
                f"settings at {len(self.points)} smaller sizes"]

    def draw(self, folder):
        """Writes verify.png to `folder`; returns its path."""
        from scaling import figures
        pyplot = figures.load_pyplot()
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 6), layout="constrained")
        self.draw_candidates(left, figures)
        self.draw_forecast(right, figures)
        return figures.save(figure, os.path.join(folder, "verify.png"), pyplot)

    def draw_candidates(self, ax, figures):
        """The loss at the larger size against the proxy's, a point for each candidate; one that is far worse
        than the others lies on the edge, so that it does not press them together."""
        finite = [each for each in self.found if mean_loss(each.proxy_rows) + mean_loss(each.rows) < math.inf]
        x = np.array([mean_loss(each.proxy_rows) for each in finite])
        y = np.array([mean_loss(each.rows) for each in finite])
        for i, each in enumerate(finite):
            style, at = figures.line_style(i), [min(losses[i], figures.edge_of(losses)) for losses in (x, y)]
            if each is self.winner:
                ax.plot(*at, "o", markersize=18, mfc="none", mec="k")
            name = each.name if at == [x[i], y[i]] else f"{each.name}, beyond the axes"
            ax.errorbar(*at, xerr=self.error_of(each.proxy_rows), yerr=self.error_of(each.rows),
                        linestyle="none", label=name, **style)
        (width, depth), proxy = self.sizes[0], self.best
        rank = "" if math.isnan(self.rank) else f", rank correlation {self.rank:+.2f}"
        ax.set(title=f"{len(finite)} candidates{rank}", ylabel=f"loss at {width} x {depth}, nats per token",
               xlabel=f"loss at the proxy, {proxy.width} x {proxy.depth}, nats per token")
        if finite:
            ax.legend(title="circled: chosen", title_fontsize=10, **BELOW)

    def draw_forecast(self, ax, figures):
        """The loss of the winner against the parameters, and the forecast at the target."""
        if self.points:
            parameters, losses, errors = zip(*(point[2:] for point in self.points), strict=True)
            ax.errorbar(parameters, losses, yerr=errors, marker="o", color=figures.COLORS[0],
                        label=f"{self.winner.name}, trained")
            for width, depth, x, y, _ in self.points:
                ax.annotate(f"{width} x {depth}", (x, y), (6, 6), textcoords="offset points", fontsize=10)
        if self.forecast:
            low, middle, high = self.forecast
            ax.errorbar([self.parameters], [middle], yerr=[[middle - low], [high - middle]], marker="D",
                        color=figures.COLORS[1], capsize=5, linestyle="none", label="forecast, 95% interval")
            ax.plot([parameters[-1], self.parameters], [losses[-1], middle], ":", color=figures.COLORS[1])
            ax.annotate(f"{self.target.width} x {self.target.depth}", (self.parameters, middle), (-8, -14),
                        textcoords="offset points", fontsize=10, ha="right")
        ax.set(title="the chosen settings, width x depth", xscale="log", xlabel="parameters",
               ylabel="validation loss, nats per token")
        ax.set_xticks([point[2] for point in self.points] + [self.parameters] * bool(self.forecast))
        ax.xaxis.set_major_formatter(figures.large_numbers())
        ax.minorticks_off()
        if self.points:
            ax.legend(**BELOW)
