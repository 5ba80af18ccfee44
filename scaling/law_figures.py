"""The figures of scaling.laws."""

import os

import numpy as np

from scaling.figures import BESIDE, COLORS, line_style, load_pyplot, save
from scaling.law_slices import cell_means


def draw_laws(report, folder):
    """Writes frontier.png, sizes.png and, where budgets have a best size, isoflop.png to `folder`; returns
    their paths."""
    pyplot = load_pyplot()
    figures = {"frontier": draw_frontier, "sizes": draw_sizes}
    if any(budget["best"] for budget in report["isoflop"]["budgets"]):
        figures["isoflop"] = draw_isoflop
    return [save(draw(report, pyplot), os.path.join(folder, f"{name}.png"), pyplot)
            for name, draw in figures.items()]


def shades(count):
    """Colors of `count` lines in an order, told apart without color."""
    from matplotlib import colormaps
    return colormaps["viridis"](np.linspace(0.0, 0.88, count))


def models_of(report):
    """{"width x depth": its points}, by size."""
    models = {}
    for point in sorted(report["points"], key=lambda point: point["parameters"]["all"]):
        models.setdefault(f"{point['width']} x {point['depth']}", []).append(point)
    return models


def label_loss(ax):
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:.2f}")
    ax.yaxis.set_minor_formatter("{x:.2f}")


def draw_frontier(report, pyplot):
    """Loss against training FLOPs, a line for each model: its measured losses, and the law through them. The
    dashed line is the law's own frontier; forecasts have their intervals."""
    figure, ax = pyplot.subplots(figsize=(8, 5))
    law, count = report["fits"][report["chosen"]]["law"], report["chosen"][1]
    models, lowest = models_of(report), []
    top_flops = max([report["flops"][1], *(float(forecast["flops"]) for forecast in report["forecasts"])])
    budgets = np.geomspace(report["flops"][0], top_flops, 200)
    for (name, points), color in zip(models.items(), shades(len(models)), strict=True):
        N, per_token = points[0]["parameters"][count], points[0]["flops"] / points[0]["tokens"]
        means = cell_means([point["flops"] for point in points], [point["loss"] for point in points])
        x = np.geomspace(min(means), max(means), 50)
        ax.plot(x, law.loss(N, x / per_token), color=color, linewidth=1)
        ax.plot([*means], [*means.values()], "o", color=color, markersize=5, label=name)
        lowest.append((N, per_token))
    ax.plot(budgets, law_frontier(law, lowest, budgets), "--", color=COLORS[3], label="frontier of the law")
    for i, forecast in enumerate(report["forecasts"]):
        ends = np.abs(np.array(forecast["interval"])[:, None] - forecast["loss"])
        ax.errorbar(float(forecast["flops"]), forecast["loss"], ends, fmt="D", color=COLORS[1], capsize=4,
                    label="" if i else "forecast, 95%")
        if "measured" in forecast:
            ax.plot(forecast["flops"], forecast["measured"], "*", color=COLORS[3], markersize=13,
                    label="" if i else "measured, not in the fit")
    ax.set(xscale="log", xlabel="training FLOPs", ylabel="validation loss, nats per token",
           title="Loss against compute; lines: the fitted law")
    label_loss(ax)
    ax.legend(title="width x depth", fontsize=10, **BESIDE)
    return figure


def law_frontier(law, models, budgets):
    """The lowest loss of the law at each budget, over models between and beyond those measured. models: (N,
    FLOPs a token) of each; these go as powers of each other."""
    n, per_token = np.log(np.array(models)).T
    slope, offset = np.polyfit(n, per_token, 1)
    sizes = np.linspace(n.min() - 3, n.max() + 8, 400)
    tokens = budgets[None] / np.exp(offset + slope * sizes)[:, None]
    return law.loss(np.exp(sizes)[:, None], tokens).min(axis=0)


def label_size(axis):
    """Label 1, 2 and 5 of each decade of a logarithmic axis: less says little, more overlaps."""
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(np.inf, np.inf)))
    axis.set_minor_formatter("")


def draw_isoflop(report, pyplot):
    """Loss against N at equal FLOPs, with the parabola of each budget; beside it, where three budgets or more
    have a best N, that against the FLOPs."""
    budgets, count = report["isoflop"]["budgets"], report["chosen"][1]
    found = [its for its in budgets if its["best"]]
    beside = len(found) > 2
    figure, axes = pyplot.subplots(1, 1 + beside, figsize=(13 if beside else 8, 4.6), squeeze=False,
                                   layout="constrained")
    left = axes[0, 0]
    parameters = {"all": "parameters", "body": "parameters without embedding and readout"}[count]
    for its, color in zip(budgets, shades(len(budgets)), strict=True):
        n, loss, _ = np.array(its["points"]).T
        left.plot(n, loss, "o", color=color, markersize=5, label=f"{its['flops']:.1e} FLOPs")
        if its["best"]:
            x = its["best"]["N"] * np.geomspace(1 / 3, 3, 60)  # where the parabola was fitted
            left.plot(x, np.polyval(its["best"]["coefficients"], np.log(x)), color=color, linewidth=1)
            left.plot(its["best"]["N"], its["best"]["loss"], "*", color=color, markersize=13, mec="k")
    left.set(xscale="log", xlabel=parameters, ylabel="validation loss, nats per token",
             title="At equal FLOPs (star: lowest)")
    label_size(left.xaxis)
    left.legend(fontsize=9)
    if beside:
        draw_best_sizes(axes[0, 1], budgets, report["isoflop"]["exponent"], parameters)
    return figure


def draw_best_sizes(ax, budgets, exponent, parameters):
    """The best N of each budget that has one against its FLOPs."""
    for its, color in zip(budgets, shades(len(budgets)), strict=True):
        if its["best"]:
            ax.plot(its["flops"], its["best"]["N"], "*", color=color, markersize=13, mec="k")
    ax.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel=f"best {parameters}",
           title=f"N ~ C^{exponent:.2f}")
    label_size(ax.xaxis)
    label_size(ax.yaxis)


def draw_sizes(report, pyplot):
    """Loss against N, a line for each number of tokens (where many models share it), and the law's lines."""
    figure, ax = pyplot.subplots(figsize=(8, 5))
    law, count = report["fits"][report["chosen"]]["law"], report["chosen"][1]
    by_tokens = {}
    for point in report["points"]:
        by_tokens.setdefault(point["tokens"], []).append(point)
    shared = {tokens: points for tokens, points in sorted(by_tokens.items())
              if len({point["parameters"][count] for point in points}) > 1}
    for i, ((tokens, points), color) in enumerate(zip(shared.items(), shades(len(shared)), strict=True)):
        sizes = [point["parameters"][count] for point in points]
        means = cell_means(sizes, [point["loss"] for point in points])
        x = np.geomspace(min(means), max(means), 50)
        ax.plot(x, law.loss(x, tokens), color=color, linewidth=1)
        style = line_style(i) | {"color": color}
        ax.plot([*means], [*means.values()], linestyle="none", markersize=5, label=f"{tokens:.1e}", **style)
    parameters = {"all": "parameters", "body": "parameters without embedding and readout"}[count]
    ax.set(xscale="log", xlabel=parameters, ylabel="validation loss, nats per token",
           title="Loss against size; lines: the fitted law")
    label_size(ax.xaxis)
    label_loss(ax)
    if shared:
        ax.legend(title="training tokens", fontsize=10, **BESIDE)
    return figure
