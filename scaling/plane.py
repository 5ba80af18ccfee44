"""The map between SP and μP: python -m scaling.plane DIR...

    python -m scaling.plane CONFIG init=0,0.5,1 updates=0,0.5,1 lr=2**-10..2**-6 --width=512 --out=DIR

trains it first, as a sweep: --stack=K and what was trained before are as in scaling.sweep. `init` and
`updates` say how far the exponents of the initial weights and of their updates are from the standard
parametrization's, at 0, to μP's, at 1 (mup_init and mup_lr in plane.json). The map shows, for each point of
this plane, the loss at the best lr of the sweep, as Tensor Programs V (arXiv 2203.03466) does. At the base
width all points are one model: the plane opens with the width. --to=DIR is where plane.json and plane.png go.
"""

import json
import os
from itertools import product

import numpy as np

import parametrization
from configure import UserError, configure
from parametrization import Exponents, mup, sp
from scaling.cli import command, parse_options, parse_values
from scaling.figures import load_pyplot, save
from scaling.rows import group, loss_of, parse_folders, read_rows, values_of, write_report
from scaling.sweep import run_trials, trial_configs


def mix(start, end, share):
    """The pair of exponents from `start`, at share 0, to `end`, at 1; both are met exactly."""
    if end is None:
        return None
    return tuple((1 - share) * a + share * b for a, b in zip(start, end, strict=True))


def between(start, end, init, updates):
    """The table between two: `init` and `updates`, from 0 to 1, say how far it is from `start` to `end` in
    the initial weights and in their updates: a point of the plane of Tensor Programs V (arXiv 2203.03466).

    That plane is of widths and of weights with their multipliers in them. A forward multiplier acts on
    initial weights and updates alike. So it goes with `updates`, and the readout's std makes up for that at
    initialization. Attention's 1/d, there for queries and keys that have learned to agree, goes with
    `updates`; so does the branch multiplier, which is a rule of depth.
    """
    (start_roles, start_factors), (end_roles, end_factors) = start, end
    if unpaired := start_roles.keys() ^ end_roles.keys():
        raise UserError(f"parametrization.py: role {', '.join(sorted(unpaired))} must have a row in both "
                        "tables, mup() and sp()")
    roles = {}
    for role, its_end in end_roles.items():
        its_start = start_roles[role]._asdict()
        mixed = {name: mix(its_start[name], exponents, init if name == "std" else updates)
                 for name, exponents in its_end._asdict().items()}
        roles[role] = Exponents(**mixed)
    logits = zip(start_factors["logits"], end_factors["logits"], strict=True)
    made_up = [(init - updates) * (b - a) for a, b in logits]
    std = tuple(a + b for a, b in zip(roles["readout"].std, made_up, strict=True))
    roles["readout"] = roles["readout"]._replace(std=std)
    factors = {name: mix(start_factors[name], end_factors[name], updates) for name in ("branch", "logits")}
    [factors["attention"]] = mix([start_factors["attention"]], [end_factors["attention"]], updates)
    return roles, factors


def register(init, updates):
    """Makes the table of a point between sp and mup; returns its name, a value of `parametrization`."""
    if (init, updates) == (1, 1):
        return "mup"
    name = f"plane_{init:g}_{updates:g}"
    parametrization.TABLES[name] = lambda alpha: between(sp(alpha), mup(alpha), init, updates)
    return name


def point_of(config):
    """(init, updates) of a trial's settings."""
    name = config["parametrization"]
    corners = {"sp": (0.0, 0.0), "mup": (1.0, 1.0)}
    return corners[name] if name in corners else tuple(map(float, name.split("_")[1:]))


def analyze(rows):
    """{width, points}: of each point (mup_init, mup_lr) the lowest loss, mean over seeds, its log2 lr,
    whether that lr is at an end of those tried, and the seeds. Raises UserError when rows differ in more
    than these."""
    configs = [json.loads(row["config"]) for row in rows]
    varied = {name for name in configs[0] if len(values_of(configs, name)) > 1}
    if "parametrization" not in varied or varied - {"parametrization", "lr", "seed"}:
        raise UserError("plane: the rows must be of a sweep over init, updates, lr, seed alone; these vary "
                        f"{', '.join(sorted(varied)) or 'nothing'}")
    losses = group(((*point_of(config), config["lr"]), loss_of(row))
                   for row, config in zip(rows, configs, strict=True))
    by_point = group(((init, updates), (lr, float(np.mean(of_seeds)), len(of_seeds)))
                     for (init, updates, lr), of_seeds in losses.items())
    points = []
    for (init, updates), tried in sorted(by_point.items()):
        lr, loss, seeds = min(tried, key=lambda its: its[1])
        rates = [its[0] for its in tried]
        points.append({"mup_init": init, "mup_lr": updates, "loss": loss, "log2_lr": float(np.log2(lr)),
                       "edge": len(rates) > 1 and lr in (min(rates), max(rates)), "seeds": seeds})
    return {"width": configs[0]["width"], "base_width": configs[0]["base_width"], "points": points}


def corner_name(init, lr_share):
    return {(0, 0): "SP", (1, 1): "μP"}.get((init, lr_share), "")


def draw_plane(report, folder):
    """Writes plane.png, the losses as a map; returns its path."""
    pyplot = load_pyplot()
    points = {(point["mup_init"], point["mup_lr"]): point for point in report["points"]}
    inits, lrs = (sorted({point[i] for point in points}) for i in (0, 1))
    loss = np.array([[points[init, lr]["loss"] if (init, lr) in points else np.nan for init in inits]
                     for lr in lrs])
    loss[np.isinf(loss)] = np.nan
    figure, ax = pyplot.subplots(figsize=(1.5 * len(inits) + 3, 1.1 * len(lrs) + 1.6))
    ax.grid(False)
    shown = ax.imshow(loss, origin="lower", cmap="viridis", aspect="auto")  # the lowest is the darkest
    middle = (np.nanmin(loss) + np.nanmax(loss)) / 2
    for (init, lr_share), point in points.items():
        text = "diverged"
        if np.isfinite(point["loss"]):
            text = f"{point['loss']:.3f}\nlr $2^{{{point['log2_lr']:g}}}$"
        ax.text(inits.index(init), lrs.index(lr_share), f"{corner_name(init, lr_share)}\n{text}".strip(),
                ha="center", va="center", fontsize=10, color="white" if point["loss"] < middle else "black")
    ax.set_xticks(range(len(inits)), [f"{value:g}" for value in inits])
    ax.set_yticks(range(len(lrs)), [f"{value:g}" for value in lrs])
    ax.set(xlabel="mup_init: initial weights, from SP (0) to μP (1)",
           ylabel="mup_lr: updates, from SP (0) to μP (1)",
           title=f"Width {report['width']}, {report['width'] / report['base_width']:g} times the base")
    figure.colorbar(shown, label="best validation loss, nats per token")
    return save(figure, os.path.join(folder, "plane.png"), pyplot)


def format_plane(report):
    """The points, for people."""
    lines = [f"width {report['width']}, base_width {report['base_width']}",
             f"{'mup_init':>10}{'mup_lr':>10}{'loss':>10}{'log2 lr':>10}{'seeds':>7}"]
    for point in report["points"]:
        edge = "  lr at the edge of those tried" if point["edge"] else ""
        name = corner_name(point["mup_init"], point["mup_lr"])
        lines.append(f"{point['mup_init']:>10g}{point['mup_lr']:>10g}{point['loss']:>10.4f}"
                     f"{point['log2_lr']:>10.2f}{point['seeds']:>7}  {name}{edge}".rstrip())
    return "\n".join(lines)


def parse_shares(name, text):
    try:
        shares = [float(item) for item in text.split(",")]
    except ValueError:
        shares = []
    if not shares or min(shares) < 0 or max(shares) > 1:
        raise UserError(f"{name} must be numbers from 0 to 1, such as 0,0.5,1, got {text}")
    return shares


def train_plane(config, axes, options):
    """Trains a sweep over the points of `init` and `updates` and over the other axes. Raises UserError."""
    shares = [parse_shares(name, axes.pop(name, "0,1")) for name in ("init", "updates")]
    axes = {name: parse_values(name, text) for name, text in axes.items()}
    points = [register(*point) for point in product(*shares)]
    configs = trial_configs(config, {"parametrization": points} | axes)
    run_trials(configs, options["out"], options["stack"], ("parametrization", *axes))


@command
def main(argv):
    if any("=" in word and not word.startswith("-") for word in argv):
        options, axes, words = parse_options(argv, {"to": "", "out": "out/plane", "stack": 1}, __doc__,
                                             takes_axes=True)
        train_plane(configure(words), axes, options)
        argv = [options["out"], f"--to={options['to'] or options['out']}"]
    _, folders, to = parse_folders(argv, {}, __doc__)
    report = analyze(read_rows(folders))
    if not any(np.isfinite(point["loss"]) for point in report["points"]):
        raise UserError(f"plane: every trial of {', '.join(folders)} diverged or failed: there is no loss")
    write_report(report, to, "plane.json")
    print(format_plane(report), draw_plane(report, to), sep="\n")
