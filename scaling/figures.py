"""The figures of a report (loss against the swept setting, loss against size, training curves) and of a
coordinate check."""

import os

import numpy as np

from configure import no_command
from scaling import fits

# Okabe and Ito's colors, told apart by everyone, and two of Tol's. The number of markers shares no factor
# with theirs, so that 90 lines in a row differ in color or marker.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#000000", "#e69f00", "#56b4e9", "#cc79a7", "#999999", "#882255",
          "#332288")
MARKERS = ("o", "s", "^", "v", "D", "*", "P", "x", "h")
TITLES = {"mup": "μP", "sp": "standard parametrization"}  # of parametrizations; any other goes by its name
BESIDE = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}  # a legend that covers nothing


def load_pyplot():
    """matplotlib.pyplot, which draws to files and in the style of all figures."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False,
                            "axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 110})
    return pyplot


def draw_report(report, folder):
    """Writes transfer.png, size.png and curves.png to `folder`; returns their paths."""
    pyplot, paths = load_pyplot(), []
    for name, draw in {"transfer": draw_transfer, "size": draw_size, "curves": draw_curves}.items():
        paths.append(save(draw(report, pyplot), os.path.join(folder, f"{name}.png"), pyplot))
    return paths


def save(figure, path, pyplot):
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)
    return path


def title(ladder):
    """The title of a ladder, such as "mup, depth_alpha=1": its parametrization spelled out."""
    parametrization, comma, settings = ladder.partition(",")
    return TITLES.get(parametrization, parametrization) + comma + settings


def line_style(i):
    """Marker and color of the i-th line of a figure."""
    return {"marker": MARKERS[i % len(MARKERS)], "color": COLORS[i % len(COLORS)]}


def make_panels(report, pyplot, **shared):
    """(figure, [(name, ladder, axes)]): a panel for each ladder, side by side, μP first."""
    ladders = sorted(report["ladders"].items(), key=lambda item: not item[0].startswith("mup"))
    inches = (5.5 * len(ladders) + 1, 4.4)
    figure, axes = pyplot.subplots(1, len(ladders), squeeze=False, figsize=inches, **shared)
    return figure, [(name, ladder, ax) for (name, ladder), ax in zip(ladders, axes[0], strict=True)]


def size_colors(report):
    """{size: color}, the same in every panel; ordered in lightness, so readable without color."""
    from matplotlib import colormaps
    axis = report["axis"]
    sizes = sorted({size[axis] for ladder in report["ladders"].values() for size in ladder["rungs"]})
    return dict(zip(sizes, colormaps["viridis"](np.linspace(0.0, 0.88, len(sizes))), strict=True))


def add_size_legend(report, ax, more=""):
    """A legend of all sizes beside the panel `ax`."""
    from matplotlib.lines import Line2D
    lines = [Line2D([], [], color=color, marker="o", label=f"{size:.0f}")
             for size, color in size_colors(report).items()]
    ax.legend(handles=lines, title=report["axis"] + more, fontsize=10, **BESIDE)


def draw_transfer(report, pyplot):
    """Loss against log2 of the swept setting, a line for each size, its seeds' range, its optimum."""
    figure, panels = make_panels(report, pyplot, sharex=True, sharey=True)
    colors = size_colors(report)
    lowest = [size["loss"] for ladder in report["ladders"].values() for size in ladder["rungs"]]
    lowest = [loss for loss in lowest if np.isfinite(loss)] or [0.0]
    bottom, top = min(lowest) - 0.03, 1.5 * max(lowest) - 0.5 * min(lowest) + 0.1
    for name, ladder, ax in panels:
        for size in ladder["rungs"]:
            color = colors[size[report["axis"]]]
            x = np.log2([float(value) for value in size["losses"]])
            losses = [[loss if np.isfinite(loss) else np.nan for loss in by_seed.values()]
                      for by_seed in size["losses"].values()]
            ax.plot(x, [np.mean(seeds) for seeds in losses], "o-", color=color, markersize=4)
            ax.fill_between(x, [min(seeds) for seeds in losses], [max(seeds) for seeds in losses],
                            color=color, alpha=0.2)
            if not size["edge"]:
                ax.plot(size["log2_best"], size["loss"], "*", color=color, markersize=13, mec="k")
        ax.set(title=title(name), xlabel=f"log2 {report['swept']}", ylim=(bottom, top))
    panels[0][2].set_ylabel("validation loss, nats per token")
    add_size_legend(report, panels[-1][2], "\n(star: optimum)")
    return figure


def draw_size(report, pyplot):
    """The best loss of each size against parameters and against compute, with its power law."""
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.4), sharey=True)
    for i, name in enumerate(sorted(report["ladders"])):
        sizes = [size for size in report["ladders"][name]["rungs"] if np.isfinite(size["loss"])]
        for ax, unit in zip(axes, ("parameters", "flops"), strict=True):
            plot_power_law(ax, title(name), [size[unit] for size in sizes], [size["loss"] for size in sizes],
                           line_style(i))
    for ax, label in zip(axes, ("parameters", "training FLOPs"), strict=True):
        ax.set(xscale="log", yscale="log", xlabel=label)
        ax.yaxis.set_major_formatter("{x:.2f}")
        ax.yaxis.set_minor_formatter("{x:.2f}")
        ax.xaxis.set_minor_formatter("")  # these overlap
        ax.legend(fontsize=10, loc="upper center", bbox_to_anchor=(0.5, 1.2))
    axes[0].set_ylabel("best validation loss, nats per token")
    return figure


def plot_power_law(ax, label, x, y, style):
    """The points and, where there are three sizes or more, the power law through them."""
    if len(set(x)) > 2:
        exponent, error, factor = fits.power_law(x, y)
        label += f": {factor:.3g} x^({exponent:.3f} ± {error:.3f})"
        ax.plot(x, factor * np.array(x) ** exponent, "--", color=style["color"], linewidth=1)
    ax.plot(x, y, linestyle="none", label=label, fillstyle="none", markersize=8, mew=2, **style)


def draw_curves(report, pyplot):
    """Training loss along the steps, at each size's best setting; the first tenth is cut off."""
    figure, panels = make_panels(report, pyplot, sharey=True)
    colors = size_colors(report)
    for name, ladder, ax in panels:
        for size in ladder["rungs"]:
            curve = size["curve"][len(size["curve"]) // 10:]
            ax.plot(np.linspace(0.1, 1, len(curve)), curve, color=colors[size[report["axis"]]])
        ax.set(title=title(name), xlabel="fraction of the steps")
    panels[0][2].set_ylabel("training loss, nats per token")
    add_size_legend(report, panels[-1][2])
    return figure


def draw_coordinate_check(checked, axis, sizes, steps, folder):
    """Mean |change| of each layer's output against the size, a panel for each parametrization of `checked`,
    {parametrization: (rows, measured) of coordinate_check()}; returns the path."""
    pyplot = load_pyplot()
    inches = (5.5 * len(checked) + 1, 4.4)
    figure, axes = pyplot.subplots(1, len(checked), figsize=inches, sharey=True, squeeze=False)
    for ax, (name, (rows, measured)) in zip(axes[0], checked.items(), strict=True):
        for i, row in enumerate(rows):
            means = [np.mean(measured[row["layer"], steps][size]) for size in sizes]
            ax.plot(sizes, means, label=row["layer"], **line_style(i))
        ax.set(title=title(name), xlabel=axis, xscale="log", yscale="log")
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.minorticks_off()
    axes[0, 0].set_ylabel(f"mean |change| of a layer's output, {steps} steps")
    axes[0, -1].legend(fontsize=10, **BESIDE)
    return save(figure, os.path.join(folder, f"{axis}.png"), pyplot)


def draw_search(draws, others, best, folder):
    """Writes search.png to `folder`: the loss of each draw and the best so far, against the number of draws
    and against the FLOPs. draws, others: rows, in order. best: the loss of the settings that were chosen."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.4), sharey=True)
    losses = np.array([np.nan if row["diverged"] else row["val_loss"] for row in draws])
    flops = np.cumsum([np.nan_to_num(row["flops"]) for row in draws])
    lowest = np.fmin.accumulate(losses)
    stopped = np.isnan(losses)
    top = np.nanmin(losses) + 1.2 * (np.nanmedian(losses) - np.nanmin(losses)) + 0.05
    above = losses > top
    total = flops[-1] + sum(np.nan_to_num(row["flops"]) for row in others)
    unit = 10.0 ** np.floor(np.log10(max(total, 1.0)))
    for ax, x in zip(axes, (np.arange(1, len(draws) + 1), flops / unit), strict=True):
        ax.plot(x, np.where(above, np.nan, losses), "o", color=COLORS[0], markersize=4, label="a draw")
        ax.plot(x[above], np.full(above.sum(), top), "^", color=COLORS[0], fillstyle="none", markersize=5,
                label="a draw above this range")
        ax.plot(x[stopped], np.full(stopped.sum(), top), "x", color=COLORS[1], markersize=5,
                label="stopped early, or diverged")
        ax.step(x, lowest, where="post", color=COLORS[3], label="the best so far")
        ax.axhline(best, linestyle="--", linewidth=1, color=COLORS[2], label="chosen, mean of its seeds")
        ax.set_ylim(min(best, np.nanmin(losses)) - 0.03 * (top - np.nanmin(losses)), top + 0.02)
    axes[0].set(xlabel="draws", ylabel="validation loss, nats per token")
    axes[1].set(xlabel=f"training FLOPs of the draws, in {unit:.0e} (with seeds and lr: {total / unit:.2f})")
    axes[1].legend(fontsize=10, **BESIDE)
    return save(figure, os.path.join(folder, "search.png"), pyplot)


if __name__ == "__main__":
    no_command("scaling.figures")
