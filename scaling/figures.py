"""The pictures of a report: loss against the swept setting, loss against size, training curves."""

import os
import re

import numpy as np

from scaling import fits

OKABE_ITO = "#000000 #e69f00 #56b4e9 #009e73 #0072b2 #d55e00 #cc79a7 #999999 #882255".split()
BESIDE = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}  # a legend that covers nothing
STYLES = ("o", "#0072b2"), ("s", "#d55e00"), ("^", "#009e73")  # Okabe and Ito's blue, vermilion, green


def plotter():
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False,
                            "axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 110})
    return pyplot


def draw(report, folder):
    """Writes the figures of `report` to `folder`; returns their paths."""
    pyplot = plotter()
    return [keep(picture(report, pyplot), os.path.join(folder, f"{picture.__name__}.png"), pyplot)
            for picture in (transfer, size, curves)]


def title(name):
    return re.sub("^mup", "μP", re.sub("^sp", "standard parametrization", name))


def keep(figure, path, pyplot):
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)
    return path


def panels(report, pyplot, **shared):
    """(figure, [(name, ladder, axes)]): a panel for each parametrization, side by side."""
    ladders = sorted(report["ladders"].items(), key=lambda item: not item[0].startswith("mup"))
    size = {"figsize": (5.5 * len(ladders) + 1, 4.4)}  # inches
    figure, axes = pyplot.subplots(1, len(ladders), squeeze=False, **size, **shared)
    return figure, [(name, ladder, ax) for (name, ladder), ax in zip(ladders, axes[0], strict=True)]


def shades(report):
    """{rung: colour}, the same in every panel; ordered in lightness, so readable without colour."""
    from matplotlib import colormaps
    rungs = sorted({rung[report["axis"]] for each in report["ladders"].values() for rung in each["rungs"]})
    return dict(zip(rungs, colormaps["viridis"](np.linspace(0.0, 0.88, len(rungs))), strict=True))


def legend(report, ax, more=""):
    """Of all rungs, beside the last panel: it covers nothing."""
    from matplotlib.lines import Line2D
    lines = [Line2D([], [], color=c, marker="o", label=f"{rung:.0f}") for rung, c in shades(report).items()]
    ax.legend(handles=lines, title=report["axis"] + more, fontsize=10, **BESIDE)


def transfer(report, pyplot):
    """Loss against log2 of the swept setting, a line for each rung, its seeds' range, its optimum."""
    figure, parts = panels(report, pyplot, sharex=True, sharey=True)
    best = [rung["loss"] for ladder in report["ladders"].values() for rung in ladder["rungs"]]
    low, top = min(best), 1.5 * max(best) - 0.5 * min(best) + 0.1
    for name, ladder, ax in parts:
        for rung in ladder["rungs"]:
            colour = shades(report)[rung[report["axis"]]]
            x = np.log2([float(value) for value in rung["losses"]])
            seeds = [[y if np.isfinite(y) else np.nan for y in by.values()] for by in rung["losses"].values()]
            ax.plot(x, [np.mean(losses) for losses in seeds], "o-", color=colour, markersize=4)
            ax.fill_between(x, [min(s) for s in seeds], [max(s) for s in seeds], color=colour, alpha=0.2)
            if not rung["edge"]:
                ax.plot(rung["log2_best"], rung["loss"], "*", color=colour, markersize=13, mec="k")
        ax.set(title=title(name), xlabel=f"log2 {report['swept']}", ylim=(low - 0.03, top))
    parts[0][2].set_ylabel("validation loss, nats per token")
    legend(report, parts[-1][2], "\n(star: optimum)")
    return figure


def size(report, pyplot):
    """The best loss of each rung against parameters and against compute."""
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.4), sharey=True)
    for (name, ladder), (marker, colour) in zip(sorted(report["ladders"].items()), STYLES, strict=False):
        for ax, unit in zip(axes, ("parameters", "flops"), strict=True):
            x, y = ([rung[key] for rung in ladder["rungs"]] for key in (unit, "loss"))
            label = title(name)
            if len(set(x)) > 2:
                exponent, error, factor = fits.power_law(x, y)
                label += f": {factor:.3g} x^({exponent:.3f} ± {error:.3f})"
                ax.plot(x, factor * np.array(x) ** exponent, "--", color=colour, linewidth=1)
            ax.plot(x, y, marker, color=colour, label=label, fillstyle="none", markersize=8, mew=2)
            ax.set(xscale="log", yscale="log", xlabel={"flops": "training FLOPs"}.get(unit, unit))
            ax.yaxis.set_major_formatter("{x:.2f}")
            ax.yaxis.set_minor_formatter("{x:.2f}")
            ax.xaxis.set_minor_formatter("")  # these overlap
            ax.legend(fontsize=10, loc="upper center", bbox_to_anchor=(0.5, 1.2))
    axes[0].set_ylabel("best validation loss, nats per token")
    return figure


def curves(report, pyplot):
    """Training loss along the steps, at each rung's best setting; the first fall is cut off."""
    figure, parts = panels(report, pyplot, sharey=True)
    for name, ladder, ax in parts:
        for rung in ladder["rungs"]:
            curve = rung["curve"][len(rung["curve"]) // 10:]
            ax.plot(np.linspace(0.1, 1, len(curve)), curve, color=shades(report)[rung[report["axis"]]])
        ax.set(title=title(name), xlabel="share of the steps")
    parts[0][2].set_ylabel("training loss, nats per token")
    legend(report, parts[-1][2])
    return figure


def coordinates(checked, axis, rungs, steps, folder):
    """Mean |change| of each layer against the size, a panel for each parametrization; returns the path."""
    pyplot = plotter()
    figure, axes = pyplot.subplots(1, len(checked), figsize=(5.5 * len(checked) + 1, 4.4), sharey=True)
    for ax, (name, (rows, found)) in zip(axes, checked.items(), strict=True):
        for i, row in enumerate(rows):
            means = [np.mean(found[row["layer"], steps][rung]) for rung in rungs]
            ax.plot(rungs, means, marker="osv^D*Pxh"[i % 9], label=row["layer"], color=OKABE_ITO[i % 9])
        ax.set(title=title(name), xlabel=axis, xscale="log", yscale="log")
        ax.set_xticks(rungs, [str(rung) for rung in rungs])
        ax.minorticks_off()
    axes[0].set_ylabel(f"mean |change| of a layer's output, {steps} steps")
    axes[-1].legend(fontsize=10, **BESIDE)
    return keep(figure, os.path.join(folder, f"{axis}.png"), pyplot)
