"""The map between SP and μP: python -m scaling.plane DIR...

    python -m scaling.sweep CONFIG mup_init=0,0.5,1 mup_lr=0,0.5,1 lr=2**-10..2**-6 --width=512 --out=DIR

mup_init and mup_lr say how far the exponents of the initial weights and of their updates are from the
standard parametrization's, at 0, to μP's, at 1 (parametrization.py: between()). The map shows, for each
point of this plane, the loss at the best lr of the sweep, as Tensor Programs V (arXiv 2203.03466) does. At
the base width all points are one model: the plane opens with the width. --to=DIR is where plane.json and
plane.png go.
"""

import json
import os

import numpy as np

from configure import UserError
from scaling.cli import command
from scaling.figures import load_pyplot, save
from scaling.rows import loss_of, parse_folders, read_rows, write_report


def analyze(rows):
    """{width, points}: of each point (mup_init, mup_lr) the lowest loss, mean over seeds, its log2 lr,
    whether that lr is at an end of those tried, and the seeds. Raises UserError when rows differ in more
    than these."""
    configs = [json.loads(row["config"]) for row in rows]
    varied = {name for name in configs[0] if len({json.dumps(config[name]) for config in configs}) > 1}
    other = sorted(varied - {"mup_init", "mup_lr", "lr", "seed"})
    if other or not {"mup_init", "mup_lr"} & varied or configs[0]["parametrization"] != "mup":
        raise UserError(f"plane: got rows that vary {', '.join(sorted(varied)) or 'nothing'}; takes those of "
                        "a sweep over mup_init, mup_lr, lr and seed alone")
    losses = {}
    for row, config in zip(rows, configs, strict=True):
        by_lr = losses.setdefault((config["mup_init"], config["mup_lr"]), {})
        by_lr.setdefault(config["lr"], []).append(loss_of(row))
    return {"width": configs[0]["width"], "base_width": configs[0]["base_width"],
            "points": [best_point(*point, by_lr) for point, by_lr in sorted(losses.items())]}


def best_point(init, lr_share, by_lr):
    means = {lr: float(np.mean(of_seeds)) for lr, of_seeds in by_lr.items()}
    best = min(means, key=means.get)
    return {"mup_init": init, "mup_lr": lr_share, "loss": means[best], "log2_lr": float(np.log2(best)),
            "edge": len(means) > 1 and best in (min(means), max(means)), "seeds": len(by_lr[best])}


def grid_of(report, key):
    """(values of mup_init, values of mup_lr, array of `key`, nan where there is no point)."""
    inits = sorted({point["mup_init"] for point in report["points"]})
    lrs = sorted({point["mup_lr"] for point in report["points"]})
    grid = np.full((len(lrs), len(inits)), np.nan)
    for point in report["points"]:
        grid[lrs.index(point["mup_lr"]), inits.index(point["mup_init"])] = point[key]
    return inits, lrs, np.where(np.isfinite(grid), grid, np.nan)


def corner_name(init, lr_share):
    return {(0, 0): "SP", (1, 1): "μP"}.get((init, lr_share), "")


def draw_plane(report, folder):
    """Writes plane.png, the losses as a map; returns its path."""
    pyplot = load_pyplot()
    inits, lrs, loss = grid_of(report, "loss")
    _, _, log2_lr = grid_of(report, "log2_lr")
    figure, ax = pyplot.subplots(figsize=(1.5 * len(inits) + 3, 1.1 * len(lrs) + 1.6))
    ax.grid(False)
    shown = ax.imshow(loss, origin="lower", cmap="viridis", aspect="auto")  # the lowest is the darkest
    middle = (np.nanmin(loss) + np.nanmax(loss)) / 2
    for i, lr_share in enumerate(lrs):
        for j, init in enumerate(inits):
            text = "diverged" if np.isnan(loss[i, j]) else f"{loss[i, j]:.3f}\nlr $2^{{{log2_lr[i, j]:g}}}$"
            text = f"{corner_name(init, lr_share)}\n{text}".strip()
            color = "white" if loss[i, j] < middle else "black"
            ax.text(j, i, text, ha="center", va="center", fontsize=10, color=color)
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


@command
def main(argv):
    _, folders, to = parse_folders(argv, {}, __doc__)
    report = analyze(read_rows(folders))
    if not any(np.isfinite(point["loss"]) for point in report["points"]):
        raise UserError(f"plane: every trial of {', '.join(folders)} diverged or failed: there is no loss")
    write_report(report, to, "plane.json")
    print(format_plane(report), draw_plane(report, to), sep="\n")
    return 0
