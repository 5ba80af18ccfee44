"""The figures of a report (loss against the swept setting, loss against size, training curves) and of a
coordinate check."""

import os

import numpy as np

from scaling import fits

# Okabe and Ito's colors, told apart by everyone, and two of Tol's. The number of markers shares no factor
# with theirs, so that 90 lines in a row differ in color or marker.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#000000", "#e69f00", "#56b4e9", "#cc79a7", "#999999", "#882255",
          "#332288")
MARKERS = ("o", "s", "^", "v", "D", "*", "P", "x", "h")
# Of parametrizations; any other goes by its name
TITLES = {"mup": "μP", "sp": "standard parametrization", "sp_scaled": "standard parametrization, lr / m",
          "sp_per_layer": "standard parametrization, lr per layer"}
LABELS = {"lr": "the learning rate"}  # of settings in figures; any other goes by its name
LOSS = "validation loss, nats per token"
MOST_COLUMNS = 4  # of panels; more are in rows
NARROWEST = 0.5  # a panel, of the widest
SMALLEST_SHARE = 0.4  # of the height that the lines of a panel must fill for it to share its scale
BESIDE = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}  # a legend that covers nothing


def load_pyplot():
    """matplotlib.pyplot, which draws to files and in the style of all figures."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False,
                            "axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 110,
                            "svg.hashsalt": "scaling"})  # the same figure is the same file
    return pyplot


def draw_report(report, folder):
    """Writes the figures of FIGURES to `folder`, each as .png and .svg; returns the paths of the .png."""
    pyplot = load_pyplot()
    return [save(draw(report, pyplot), os.path.join(folder, f"{name}.png"), pyplot)
            for name, draw in FIGURES.items()]


def save(figure, path, pyplot):
    """Writes `figure` to `path`, a .png, and beside it as .svg, which stays sharp at any size."""
    figure.savefig(path, bbox_inches="tight")
    figure.savefig(f"{path.removesuffix('.png')}.svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return path


def title(ladder):
    """The title of a ladder, such as "mup, depth_alpha=1": its parametrization spelled out."""
    parametrization, comma, settings = ladder.partition(",")
    return TITLES.get(parametrization, parametrization) + comma + settings


def line_style(i):
    """Marker and color of the i-th line of a figure."""
    return {"marker": MARKERS[i % len(MARKERS)], "color": COLORS[i % len(COLORS)]}


def shades(count):
    """Colors of `count` lines in an order; it is in their lightness too, so readable without color."""
    from matplotlib import colormaps
    return colormaps["viridis"](np.linspace(0.0, 0.88, count))


def make_panels(report, pyplot, widths=None):
    """(figure, [(name, ladder, axes)]): a panel for each ladder, μP first, side by side or in rows.
    widths: how wide each of them is, in any unit, {name: width}; alike by default."""
    ladders = sorted(report["ladders"].items(), key=lambda item: not item[0].startswith("mup"))
    ratios = None
    if widths and max(widths.values()) and len(ladders) <= MOST_COLUMNS:
        ratios = [max(widths[name] / max(widths.values()), NARROWEST) for name, _ in ladders]
    figure, axes = panel_grid(pyplot, len(ladders), ratios)
    return figure, [(name, ladder, ax) for (name, ladder), ax in zip(ladders, axes, strict=True)]


def panel_grid(pyplot, count, ratios=None):
    """(figure, [axes]) of `count` panels in rows of MOST_COLUMNS at most, with room for a legend beside."""
    columns = min(count, MOST_COLUMNS)
    rows = -(-count // columns)
    figure, axes = pyplot.subplots(rows, columns, squeeze=False, figsize=(5.5 * columns + 1, 4.4 * rows),
                                   width_ratios=ratios, layout="constrained")
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    return figure, list(axes.flat[:count])


def share_scale(limits):
    """{name: (bottom, top)} of panels that want `limits`, {name: (bottom, top)}: one scale for all where each
    panel then still fills a good part of its height, else each its own."""
    bottom, top = min(low for low, _ in limits.values()), max(high for _, high in limits.values())
    if all(high - low >= SMALLEST_SHARE * (top - bottom) for low, high in limits.values()):
        return dict.fromkeys(limits, (bottom, top))
    return limits


def size_colors(report):
    """{size: color}, the same in every panel."""
    axis = report["axis"]
    sizes = sorted({size[axis] for ladder in report["ladders"].values() for size in ladder["sizes"]})
    return dict(zip(sizes, shades(len(sizes)), strict=True))


def add_size_legend(report, figure, marker="o", more=()):
    """A legend of all sizes beside the panels; `more`: handles of what else there is to explain."""
    from matplotlib.lines import Line2D
    lines = [Line2D([], [], color=color, marker=marker, label=f"{size:.0f}")
             for size, color in size_colors(report).items()]
    figure.legend(handles=[*lines, *more], title=report["axis"], fontsize=10, loc="outside right center")


def curve_of(size, numeric):
    """(x, [the losses of all seeds, at each x]) of a size: log2 of the swept setting, or its values' text."""
    x = [np.log2(float(value)) if numeric else value for value in size["losses"]]
    losses = [[loss if np.isfinite(loss) else np.nan for loss in by_seed.values()]
              for by_seed in size["losses"].values()]
    return x, losses


def draw_transfer(report, pyplot, above_best=False):
    """Loss against log2 of the swept setting: of each size the mean of its seeds, their range, the parabola
    that was fitted and its lowest point. above_best: the loss minus that of the size's lowest point, which
    shows where flat curves have theirs."""
    numeric, colors, ranges, limits = report["numeric"], size_colors(report), {}, {}
    for name, ladder in report["ladders"].items():
        x = {x for size in ladder["sizes"] for x in curve_of(size, numeric)[0]}
        ranges[name] = max(x) - min(x) if numeric else len(x)
        limits[name] = excess_limits(ladder) if above_best else loss_limits(ladder)
    figure, panels = make_panels(report, pyplot, ranges)
    label = LABELS.get(report["swept"], report["swept"])
    for name, ladder, ax in panels:
        for size in ladder["sizes"]:
            shift = lowest_loss(size) if above_best else 0.0
            if np.isfinite(shift):
                draw_size_curve(ax, size, numeric, colors[size[report["axis"]]], shift)
        ax.set(title=title(name), xlabel=f"log2 of {label}" if numeric else label,
               ylim=share_scale(limits)[name])
    figure.supylabel("validation loss above the size's best, nats" if above_best else LOSS, fontsize=12)
    add_size_legend(report, figure, more=explain_marks(report, above_best))
    return figure


def explain_marks(report, above_best):
    """Handles of a legend for the stars and, where there are several seeds, their ranges."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    star = Line2D([], [], marker="*", color="w", mec="k", markersize=13, label=report["star"])
    seeds = Patch(color="0.5", alpha=0.3, label="range of the seeds")
    several = any(len(losses) > 1 for ladder in report["ladders"].values() for size in ladder["sizes"]
                  for losses in curve_of(size, report["numeric"])[1])
    return [star, seeds] if several and not above_best else [star]


def draw_size_curve(ax, size, numeric, color, shift):
    """The losses of one size minus `shift`, the parabola as far as it was fitted, and a star where they are
    lowest."""
    x, losses = curve_of(size, numeric)
    means = np.array([np.mean(seeds) for seeds in losses]) - shift
    fitted, line = size["fitted_loss"] is not None, "-" if numeric else ":"
    if shift and fitted:
        line = ""  # lines that nearly coincide would hide each other
    ax.plot(x, means, f"o{line}", color=color, markersize=4, linewidth=1)
    if not shift:
        low, high = ([pick(seeds) for seeds in losses] for pick in (min, max))
        ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    star = {"color": color, "markersize": 13, "mec": "k"}
    if fitted:
        best, lowest = size["log2_best"], size["fitted_loss"] - shift
        near = np.linspace(*np.clip((best - 1, best + 1), min(x), max(x)), 50)
        ax.plot(near, lowest + size["curvature"] * (near - best) ** 2, color=color, linewidth=2.2, alpha=0.6)
        ax.plot(best, lowest, "*", **star, zorder=4)
    elif not size["edge"]:
        ax.plot(size["best"], np.nanmin(means), "*", **star)


def lowest_loss(size):
    """What a size's star has, or its lowest mean where there is none."""
    return size["loss"] if size["fitted_loss"] is None else size["fitted_loss"]


def loss_limits(ladder):
    """(bottom, top) of the losses of a ladder worth seeing: the best of each size, and some above."""
    lowest = [lowest_loss(size) for size in ladder["sizes"]]
    lowest = [loss for loss in lowest if np.isfinite(loss)] or [0.0]
    spread = max(lowest) - min(lowest)
    pad = 0.05 * spread + 0.02
    return min(lowest) - pad, max(lowest) + 0.35 * spread + 2 * pad


def excess_limits(ladder):
    """(bottom, top) of losses above each size's best: as far as an octave and a half from it costs."""
    curvatures = [size["curvature"] for size in ladder["sizes"] if size["curvature"] is not None]
    top = 2.25 * np.median(curvatures) if curvatures else 0.1
    return -0.12 * top, top


def draw_excess(report, pyplot):
    """draw_transfer() with each size's best loss taken off."""
    return draw_transfer(report, pyplot, above_best=True)


def draw_size(report, pyplot):
    """The best loss of each size against parameters and against compute, or against the axis where these are
    the same for all; with its power law, where it follows one."""
    sizes = {name: [size for size in ladder["sizes"] if np.isfinite(size["loss"])]
             for name, ladder in sorted(report["ladders"].items())}
    units = {"parameters": "parameters", "flops": "training FLOPs"}
    everything = [size for ladder in sizes.values() for size in ladder]
    units = {unit: label for unit, label in units.items() if len({size[unit] for size in everything}) > 1}
    units = units or {report["axis"]: report["axis"]}
    figure, axes = pyplot.subplots(1, len(units), figsize=(6 * len(units), 4.4), sharey=True, squeeze=False)
    for (unit, label), ax in zip(units.items(), axes[0], strict=True):
        for i, (name, ladder) in enumerate(sizes.items()):
            x, y = ([size[key] for size in ladder] for key in (unit, "loss"))
            plot_power_law(ax, title(name), x, y, line_style(i))
        ax.set(xscale="log", yscale="log", xlabel=label)
        ax.yaxis.set_major_formatter("{x:.2f}")
        ax.yaxis.set_minor_formatter("{x:.2f}")
        ax.xaxis.set_minor_formatter("")  # these overlap
        ax.legend(fontsize=10, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes[0, 0].set_ylabel("best validation loss, nats per token")
    return figure


def plot_power_law(ax, label, x, y, style):
    """The points and, where they follow one, the power law through them."""
    if fits.follows_power_law(x, y):
        exponent, error, factor = fits.power_law(x, y)
        label += f": {factor:.3g} x^({exponent:.3f} ± {error:.3f})"
        ax.plot(x, factor * np.array(x) ** exponent, "--", color=style["color"], linewidth=1)
    elif len(set(x)) > 2:
        label += ": no power law"
    ax.plot(x, y, linestyle="none", label=label, fillstyle="none", markersize=8, mew=2, **style)


def draw_curves(report, pyplot):
    """Training loss along the steps, at each size's best setting; the first tenth is cut off."""
    figure, panels = make_panels(report, pyplot)
    colors, limits = size_colors(report), {}
    for name, ladder, ax in panels:
        for size in ladder["sizes"]:
            curve = size["curve"][len(size["curve"]) // 10:]
            ax.plot(np.linspace(0.1, 1, len(curve)), curve, color=colors[size[report["axis"]]])
        ax.set(title=title(name), xlabel="fraction of the steps")
        limits[name] = ax.get_ylim()
    for name, _, ax in panels:
        ax.set_ylim(share_scale(limits)[name])
    figure.supylabel("training loss, nats per token", fontsize=12)
    add_size_legend(report, figure, marker="")
    return figure


FIGURES = {"transfer": draw_transfer, "excess": draw_excess, "size": draw_size, "curves": draw_curves}


def draw_coordinate_check(checked, axis, sizes, steps, folder):
    """Mean |change| of each layer's output and of each vector against the size, a panel for each
    parametrization of `checked`, {parametrization: (rows, measured) of coordinate_check()}; returns the path.
    """
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
    axes[0, 0].set_ylabel(f"mean |change| in {steps} steps")
    axes[0, -1].legend(fontsize=10, title="output of a layer, or a gain\n(names of model.py)", **BESIDE)
    return save(figure, os.path.join(folder, f"{axis}.png"), pyplot)


def draw_scatter(axis, pairs, folder):
    """Writes scatter.png to `folder`: the target's loss against the proxy's for the same settings, a panel
    for each of `pairs` (scaling/scatter.py); what diverged lies on the upper or right edge. Returns its path.
    """
    pyplot = load_pyplot()
    figure, axes = panel_grid(pyplot, len(pairs))
    several = len({pair["cloud"] for pair in pairs}) > 1
    for pair, ax in zip(pairs, axes, strict=True):
        edges = [edge_of(pair[which]) for which in ("proxy", "target")]
        x, y = (np.minimum(pair[which], edge) for which, edge in
                zip(("proxy", "target"), edges, strict=True))
        beyond = (pair["proxy"] > edges[0]) | (pair["target"] > edges[1])
        ax.plot(x[~beyond], y[~beyond], "o", color=COLORS[0], markersize=5, label="one choice of settings")
        ax.plot(x[beyond], y[beyond], "^", color=COLORS[1], fillstyle="none",
                label="beyond the axes,\nor diverged")
        best = np.argmin(pair["proxy"])
        ax.plot(x[best], y[best], "*", color=COLORS[4], markersize=14, mec="k", label="the proxy's best")
        name = f"{title(pair['cloud'])}\n" if several else ""
        proxy, target = (f"{axis} {pair[which]}".strip().replace("_", " ") for which in ("base", "size"))
        ax.set(title=f"{name}{len(x)} pairs, rank correlation {pair['rank']:+.2f}",
               xlabel=f"loss at {proxy}, nats per token", ylabel=f"loss at {target}, nats per token")
    figure.legend(handles=axes[0].lines, fontsize=10, loc="outside right center")
    return save(figure, os.path.join(folder, "scatter.png"), pyplot)


def large_numbers():
    """The formatter of an axis of numbers such as 41.8 k and 1.2 M."""
    from matplotlib.ticker import EngFormatter
    return EngFormatter(places=1)


def edge_of(losses):
    """Where a scale ends: far above the median, so that a few bad losses do not press the others together."""
    finite = losses[np.isfinite(losses)]
    return min(finite.max(), np.median(finite) + 3 * (np.median(finite) - finite.min()) + 0.01)


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
    axes[0].set(xlabel="draws", ylabel=LOSS)
    axes[1].set(xlabel=f"training FLOPs of the draws, in {unit:.0e} (with seeds and lr: {total / unit:.2f})")
    axes[1].legend(fontsize=10, **BESIDE)
    return save(figure, os.path.join(folder, "search.png"), pyplot)
