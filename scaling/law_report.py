"""The laws of scaling.laws as text, ours beside those of the papers, and as figures."""

import os

import numpy as np

from scaling.figures import BESIDE, COLORS, LOSS, load_pyplot, save, shades
from scaling.law_fits import all_tested, cell_means, missed_by
from scaling.law_trials import COUNTS
from scaling.rows import group

PARAMETERS = {"all": "parameters", "body": "parameters without embedding and readout"}

PUBLISHED = {  # of web text and much larger models: a comparison of exponents, not of constants
    "chinchilla": "the replication of Chinchilla, arXiv 2404.10102: alpha 0.35, beta 0.37, N_opt ~ C^0.51",
    "kaplan": "Kaplan, arXiv 2001.08361: alpha_N 0.076, alpha_D 0.103, N_opt ~ C^0.73, D ~ N^0.74"}
EXPONENTS = {"N_opt_exponent": "N_opt ~ C^", "L_opt_exponent": "loss above E ~ C^-",
             "data_exponent": "D ~ N^"}
TINY = 1e-6  # a constant below it is 0: the fit needs no such term


def with_interval(value, ends):
    value, low, high = (0.0 if abs(number) < TINY else number for number in (value, *ends))
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def format_fit(form, count, fit):
    """The lines of one fit."""
    constants, law = fit["constants"], fit["law"]
    missed = "too few small trials to test a forecast"
    if fit["backtest"] is not None:
        missed = (f"fitted up to a tenth of the FLOPs it misses the others by "
                  f"{missed_by(fit):.4f} nats (root mean square)")
    of_its_form = [f"{name} {with_interval(*constants[name])}" for name in constants if name not in EXPONENTS]
    exponents = [text + with_interval(*constants[name]) for name, text in EXPONENTS.items()]
    return [f"{form}, {COUNTS[count]}", f"  {', '.join(of_its_form)}", f"  {', '.join(exponents)}",
            f"  around it: {law.sigma_cell:.2%} of the loss by pair, {law.sigma_seed:.2%} by seed; {missed}"]


def format_residuals(report):
    """Loss and residual, in nats, of each pair: a line for each model, a column for each number of tokens."""
    tokens = sorted({point["tokens"] for point in report["points"]})
    if len(tokens) > 8:  # as with --hold=flops, where no two models have the same
        worst = max(report["points"], key=lambda point: abs(point["residual"]))
        return [f"residuals: {len(report['points'])}, the largest {worst['residual']:+.4f} nats, of width "
                f"{worst['width']}, depth {worst['depth']}, {worst['steps']:,} steps (all are in laws.json)"]
    pairs = group(((point["width"], point["depth"], point["tokens"]), point) for point in report["points"])
    lines = ["loss (and residual), nats a token", f"{'model':>12}" + "".join(f"{d:>18.2e}" for d in tokens)]
    for width, depth in sorted({pair[:2] for pair in pairs}):
        cells = [format_cell(pairs.get((width, depth, d))) for d in tokens]
        lines.append(f"{f'{width}x{depth}':>12}" + "".join(f"{cell:>18}" for cell in cells))
    return lines


def format_cell(points):
    if points is None:
        return "-"
    loss, residual = (np.mean([point[name] for point in points]) for name in ("loss", "residual"))
    return f"{loss:.4f} ({residual:+.4f})"


def format_isoflop(isoflop):
    lines = []
    if np.isfinite(isoflop["exponent"]):
        lines.append("isoFLOP parabolas: N_opt ~ C^"
                     f"{with_interval(isoflop['exponent'], isoflop['interval'])} (Chinchilla: 0.49)")
    for budget in isoflop["budgets"]:
        best, text = budget["best"], "no lowest point between the models"
        if best:
            text = (f"N {best['N']:.3g}, D {best['tokens']:.3g}, {best['tokens'] / best['N']:.1f} tokens a "
                    f"parameter, loss {best['loss']:.4f}")
        lines.append(f"  {budget['flops']:.2e} FLOPs, {len(budget['points'])} models: {text}")
    return lines


def format_data_rule(report):
    """How much more data 8 times the parameters want: by what we fitted, and by Kaplan."""
    value, ends = report["fits"][report["chosen"]]["constants"]["data_exponent"]
    return (f"8 times the parameters want {8**value:.1f} [{8**ends[0]:.1f}, {8**ends[1]:.1f}] times the data "
            "(Kaplan: 8^0.74 = 4.7, of text that is repeated until a model overfits; ours is fresh)")


def format_forecast(forecast):
    low, high = forecast["interval"]
    others = ", ".join(f"{name} {loss:.4f}" for name, loss in forecast["others"].items())
    parameters = forecast["parameters"]
    lines = [f"forecast: width {forecast['width']}, depth {forecast['depth']}, {forecast['steps']:,} steps "
             f"of {forecast['batch']} x {forecast['context']} tokens",
             f"  {parameters['all']:,} parameters ({parameters['body']:,} without embedding and readout), "
             f"{forecast['tokens']:.3g} tokens, {forecast['flops']:.3g} FLOPs",
             f"  {forecast['beyond']:.3g} times the FLOPs of the largest trial in the fit",
             f"  loss {forecast['loss']:.4f} [{low:.4f}, {high:.4f}]; by each law: {others}"]
    if "measured" in forecast:
        hit = "inside" if low <= forecast["measured"] <= high else "OUTSIDE"
        lines.append(f"  measured {forecast['measured']:.4f} ({forecast['seeds']} seeds): "
                     f"{forecast['measured'] - forecast['loss']:+.4f} nats, {hit} the interval")
    return lines


def format_laws(report):
    """The report of scaling.laws, for people."""
    low, high = report["flops"]
    lines = [f"{report['trials']} trials of {low:.2e} to {high:.2e} FLOPs; in brackets: 95%"]
    for (form, count), fit in report["fits"].items():
        lines += format_fit(form, count, fit)
        if count == list(COUNTS)[-1]:
            lines.append(f"  {PUBLISHED[form]}")
    form, count = report["chosen"]
    best = "forecasts best" if all_tested(report["fits"]) else "has the least residuals"
    lines.append(f"the one that {best}, used below: {form}, {COUNTS[count]}")
    lines += [*format_residuals(report), *format_isoflop(report["isoflop"]), format_data_rule(report)]
    return "\n".join(lines + [line for forecast in report["forecasts"] for line in format_forecast(forecast)])


def draw_laws(report, folder):
    """Writes frontier.png and, where a budget has a best size, isoflop.png; returns their paths."""
    pyplot = load_pyplot()
    figures = {"frontier": draw_frontier}
    if any(budget["best"] for budget in report["isoflop"]["budgets"]):
        figures["isoflop"] = draw_isoflop
    return [save(draw(report, pyplot), os.path.join(folder, f"{name}.png"), pyplot)
            for name, draw in figures.items()]


def label_loss(ax):
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:.2f}")
    ax.yaxis.set_minor_formatter("{x:.2f}")


def label_size(axis):
    """Label 1, 2 and 5 of each decade of a logarithmic axis: less says little, more overlaps."""
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(np.inf, np.inf)))
    axis.set_minor_formatter("")


def draw_frontier(report, pyplot):
    """Loss against training FLOPs, a line for each model: its measured losses, and the law through them. The
    dashed line is the law's own frontier; forecasts have their intervals."""
    figure, ax = pyplot.subplots(figsize=(8, 5))
    law, count = report["fits"][report["chosen"]]["law"], report["chosen"][1]
    by_size = sorted(report["points"], key=lambda point: point["parameters"]["all"])
    models, sizes = group((f"{point['width']} x {point['depth']}", point) for point in by_size), []
    for (name, points), color in zip(models.items(), shades(len(models)), strict=True):
        N, per_token = points[0]["parameters"][count], points[0]["flops"] / points[0]["tokens"]
        sizes.append((N, per_token))
        means = cell_means([point["flops"] for point in points], [point["loss"] for point in points])
        flops = np.geomspace(min(means), max(means), 50)
        ax.plot(flops, law.loss(N, flops / per_token), color=color, linewidth=1)
        ax.plot([*means], [*means.values()], "o", color=color, markersize=5, label=name)
    top_flops = max([report["flops"][1], *(float(forecast["flops"]) for forecast in report["forecasts"])])
    budgets = np.geomspace(report["flops"][0], top_flops, 200)
    ax.plot(budgets, law_frontier(law, sizes, budgets), "--", color=COLORS[3], label="frontier of the law")
    for i, forecast in enumerate(report["forecasts"]):
        ends = np.abs(np.array(forecast["interval"])[:, None] - forecast["loss"])
        ax.errorbar(float(forecast["flops"]), forecast["loss"], ends, fmt="D", color=COLORS[1], capsize=4,
                    label="" if i else "forecast, 95%")
        if "measured" in forecast:
            ax.plot(forecast["flops"], forecast["measured"], "*", color=COLORS[3], markersize=13,
                    label="" if i else "measured, not in the fit")
    ax.set(xscale="log", xlabel="training FLOPs", ylabel=LOSS,
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


def draw_isoflop(report, pyplot):
    """Loss against N at equal FLOPs, with parabolas; beside it the best N by FLOPs, if there are three."""
    budgets, label = report["isoflop"]["budgets"], PARAMETERS[report["chosen"][1]]
    beside = sum(its["best"] is not None for its in budgets) > 2
    figure, axes = pyplot.subplots(1, 1 + beside, figsize=(13 if beside else 8, 4.6), squeeze=False,
                                   layout="constrained")
    left, right = axes[0, 0], axes[0, -1]
    for its, color in zip(budgets, shades(len(budgets)), strict=True):
        n, loss, _ = np.array(its["points"]).T
        left.plot(n, loss, "o", color=color, markersize=5, label=f"{its['flops']:.1e} FLOPs")
        if not its["best"]:
            continue
        star, N = {"color": color, "markersize": 13, "mec": "k"}, its["best"]["N"]
        x = N * np.geomspace(1 / 3, 3, 60)  # where the parabola was fitted
        left.plot(x, np.polyval(its["best"]["coefficients"], np.log(x)), color=color, linewidth=1)
        left.plot(N, its["best"]["loss"], "*", **star)
        if beside:
            right.plot(its["flops"], N, "*", **star)
    if beside:
        right.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel=f"best {label}",
                  title=f"N ~ C^{report['isoflop']['exponent']:.2f}")
        label_size(right.xaxis)
        label_size(right.yaxis)
    left.set(xscale="log", xlabel=label, ylabel=LOSS, title="At equal FLOPs (star: lowest)")
    label_size(left.xaxis)
    left.legend(fontsize=9)
    return figure
