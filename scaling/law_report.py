"""The laws of scaling.laws as text, ours beside those of the papers, and as figures."""

import os

import numpy as np

from scaling.figures import BESIDE, COLORS, LOSS, load_pyplot, save, shades
from scaling.law_fits import all_tested, cell_means, law_frontier, missed_by
from scaling.law_trials import COUNTS
from scaling.rows import group

PARAMETERS = {"all": "parameters", "body": "parameters without embedding and readout"}

PUBLISHED = {  # of web text and much larger models: a comparison of exponents, not of constants
    "chinchilla": "the replication of Chinchilla, arXiv 2404.10102: alpha 0.35, beta 0.37, N_opt ~ C^0.51",
    "kaplan": "Kaplan, arXiv 2001.08361: alpha_N 0.076, alpha_D 0.103, N_opt ~ C^0.73, D ~ N^0.74",
    "kaplan_floor": "L = E + ((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D"}
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
    lines = ["loss (less the law's), nats a token", f"{'model':>12}" + "".join(f"{d:>18.2e}" for d in tokens)]
    for width, depth in sorted({pair[:2] for pair in pairs}):
        cells = [format_cell(pairs.get((width, depth, d))) for d in tokens]
        lines.append(f"{f'{width}x{depth}':>12}" + "".join(f"{cell:>18}" for cell in cells))
    return lines


def format_cell(points):
    if points is None:
        return "-"
    loss, residual = (np.mean([point[name] for point in points]) for name in ("loss", "residual"))
    return f"{loss:.4f} ({residual:+.4f})"


def format_isoflop(isoflop, frontier):
    lines = []
    if frontier:
        constants = [f"{name} {with_interval(*value)}" for name, value in frontier["constants"].items()]
        lines.append(f"L = E + A/C^alpha through the isoFLOP minima: {', '.join(constants)}")
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


def format_collapse(collapse):
    """How alike training curves are; those of the models that differ most from the others first."""
    if collapse is None:
        return ["too few training curves to compare their shapes"]
    models = sorted(collapse["models"], key=lambda model: -model["off"])
    off = ", ".join(f"{model['off']:.1%} of {model['N']:.3g}" for model in models)
    return [f"normalized training curves of each size nearest the frontier: models differ by "
            f"{collapse['apart']:.1%}, seeds by {collapse['seeds']:.1%} (well tuned, no more than "
            "seeds: arXiv 2507.02119)", f"  off the median, by parameters: {off}"]


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
    if forecast["on_frontier"]:
        lowest, ends, above = forecast["on_frontier"]
        lines.append(f"  by the isoFLOP minima {lowest + above:.4f} [{ends[0] + above:.4f}, "
                     f"{ends[1] + above:.4f}], of which {above:.4f} as this shape is off the frontier")
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
    lines += [*format_residuals(report), *format_isoflop(report["isoflop"], report["frontier"]),
              *format_collapse(report["collapse"])]
    return "\n".join(lines + [line for forecast in report["forecasts"] for line in format_forecast(forecast)])


def draw_laws(report, folder):
    """Writes frontier.png and, where rows have what they show, isoflop.png and collapse.png; returns their
    paths."""
    pyplot = load_pyplot()
    figures = {"frontier": draw_frontier}
    if any(budget["best"] for budget in report["isoflop"]["budgets"]):
        figures["isoflop"] = draw_isoflop
    if report["collapse"]:
        figures["collapse"] = draw_collapse
    return [save(draw(report, pyplot), os.path.join(folder, f"{name}.png"), pyplot)
            for name, draw in figures.items()]


def label_loss(ax):
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:.2f}")
    ax.yaxis.set_minor_formatter("{x:.2f}")


def sizes_of(points, count):
    """{(N, training FLOPs a token)} of the models of a report's points."""
    return {(point["parameters"][count], point["flops"] / point["tokens"]) for point in points}


def draw_frontier(report, pyplot):
    """Loss against training FLOPs, a line for each model: its measured losses, and the law through them. The
    dashed line is the law's own frontier; forecasts have their intervals."""
    figure, ax = pyplot.subplots(figsize=(8, 5))
    law, count = report["fits"][report["chosen"]]["law"], report["chosen"][1]
    by_size = sorted(report["points"], key=lambda point: point["parameters"]["all"])
    models = group((f"{point['width']} x {point['depth']}", point) for point in by_size)
    for (name, points), color in zip(models.items(), shades(len(models)), strict=True):
        N, per_token = points[0]["parameters"][count], points[0]["flops"] / points[0]["tokens"]
        means = cell_means([point["flops"] for point in points], [point["loss"] for point in points])
        flops = np.geomspace(min(means), max(means), 50)
        ax.plot(flops, law.loss(N, flops / per_token), color=color, linewidth=1)
        ax.plot([*means], [*means.values()], "o", color=color, markersize=5, label=name)
    top_flops = max([report["flops"][1], *(float(forecast["flops"]) for forecast in report["forecasts"])])
    budgets = np.geomspace(report["flops"][0], top_flops, 40)
    _, lowest = law_frontier(law, sizes_of(by_size, count), budgets)
    ax.plot(budgets, lowest, "--", color=COLORS[3], label="frontier of the law")
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


def draw_isoflop(report, pyplot):
    """Loss against N at equal FLOPs, with parabolas, and stars at the corrected minima."""
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator
    budgets, label = report["isoflop"]["budgets"], PARAMETERS[report["chosen"][1]]
    figure, ax = pyplot.subplots(figsize=(8, 4.6))
    for its, color in zip(budgets, shades(len(budgets)), strict=True):
        n, loss, _ = np.array(its["points"]).T
        ax.plot(n, loss, "o", color=color, markersize=5, label=f"{its['flops']:.1e} FLOPs")
        if its["best"]:
            a, b, _ = its["best"]["coefficients"]
            x = np.exp(-b / (2 * a)) * np.geomspace(1 / 3, 3, 60)  # where the parabola was fitted
            ax.plot(x, np.polyval(its["best"]["coefficients"], np.log(x)), color=color, linewidth=1)
            ax.plot(its["best"]["N"], its["best"]["loss"], "*", color=color, markersize=13, mec="k")
    ax.set(xscale="log", xlabel=label, ylabel=LOSS, title="At equal FLOPs (star: corrected minimum)")
    # 1, 2 and 5 of each decade: fewer labels say little, more overlap
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(np.inf, np.inf)))
    ax.xaxis.set_minor_formatter("")
    ax.legend(fontsize=9)
    return figure


def draw_collapse(report, pyplot):
    """Training loss above E over the final loss above E, along the steps: a line for each model."""
    figure, ax = pyplot.subplots(figsize=(8, 5))
    models = report["collapse"]["models"]
    for model, color in zip(models, shades(len(models)), strict=True):
        curve = model["curve"]
        shares = (np.arange(len(curve)) + 0.5) / len(curve)
        ax.plot(shares, curve, color=color, label=f"{model['N']:.2g}, {model['D'] / model['N']:.2g}")
    ax.set(yscale="log", xlabel="fraction of the steps", ylabel="loss above E, over the final one",
           title="Normalized training curves nearest the frontier")
    ax.legend(title="parameters, tokens a parameter", fontsize=10, **BESIDE)
    return figure
