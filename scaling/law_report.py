"""The laws of scaling.laws as text, ours beside those of the papers."""

import numpy as np

from scaling.law_fits import all_tested, missed_by

PUBLISHED = {  # of web text and much larger models: a comparison of exponents, not of constants
    "chinchilla": "the replication of Chinchilla, arXiv 2404.10102: alpha 0.35, beta 0.37, N_opt ~ C^0.51",
    "kaplan": "Kaplan, arXiv 2001.08361: alpha_N 0.076, alpha_D 0.103, N_opt ~ C^0.73, D ~ N^0.74"}
EXPONENTS = {"N_opt_exponent": "N_opt ~ C^", "L_opt_exponent": "loss above E ~ C^-",
             "data_exponent": "D ~ N^"}
TINY = 1e-6  # a constant below it is 0: the fit needs no such term


def with_interval(value, ends):
    value, low, high = (0.0 if abs(number) < TINY else number for number in (value, *ends))
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def format_fit(form, count, fit, counts):
    """The lines of one fit."""
    constants, law = fit["constants"], fit["law"]
    lines = [f"{form}, {counts[count]}"]
    names = [name for name in constants if name not in EXPONENTS]
    lines.append("  " + ", ".join(f"{name} {with_interval(*constants[name])}" for name in names))
    lines.append("  " + ", ".join(text + with_interval(*constants[name]) for name, text in EXPONENTS.items()))
    missed = "too few small trials to test a forecast"
    if fit["backtest"] is not None:
        missed = (f"fitted up to a tenth of the FLOPs it misses the others by "
                  f"{missed_by(fit):.4f} nats (root mean square)")
    lines.append(f"  around it: {law.sigma_cell:.2%} of the loss by pair, {law.sigma_seed:.2%} by seed; "
                 f"{missed}")
    return lines


def format_residuals(report):
    """Loss and residual of each pair, in nats, a line for each model and a column for each number of
    tokens."""
    cells = {}
    for point in report["points"]:
        cells.setdefault((point["width"], point["depth"]), {}).setdefault(point["tokens"], []).append(point)
    tokens = sorted({point["tokens"] for point in report["points"]})
    if len(tokens) > 8:  # as with --hold=flops, where no two models have the same
        worst = max(report["points"], key=lambda point: abs(point["residual"]))
        return [f"residuals: {len(report['points'])}, the largest {worst['residual']:+.4f} nats, of width "
                f"{worst['width']}, depth {worst['depth']}, {worst['steps']:,} steps (all are in laws.json)"]
    lines = ["loss (and residual), nats a token", f"{'model':>12}" + "".join(f"{d:>18.2e}" for d in tokens)]
    for (width, depth), row in sorted(cells.items()):
        texts = [format_cell(row[d]) if d in row else "-" for d in tokens]
        lines.append(f"{f'{width}x{depth}':>12}" + "".join(f"{text:>18}" for text in texts))
    return lines


def format_cell(points):
    loss, residual = (np.mean([point[name] for point in points]) for name in ("loss", "residual"))
    return f"{loss:.4f} ({residual:+.4f})"


def format_slices(report):
    lines = []
    longest, frontier, isoflop = report["longest"], report["frontier"], report["isoflop"]
    if longest:
        lines.append(f"L(N) at {longest['tokens']:.2e} tokens ~ N^"
                     f"{with_interval(longest['exponent'], longest['interval'])} (Kaplan: -0.076)")
    if frontier:
        lines.append(f"L(C) on the frontier ~ C^{with_interval(frontier['exponent'], frontier['interval'])} "
                     "(Kaplan: -0.050)")
    if np.isfinite(isoflop["exponent"]):
        lines.append("isoFLOP parabolas: N_opt ~ C^"
                     f"{with_interval(isoflop['exponent'], isoflop['interval'])} (Chinchilla: 0.49)")
    for budget in isoflop["budgets"]:
        best = budget["best"]
        text = "no lowest point between the models"
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


def format_laws(report, counts):
    """The report of scaling.laws, for people. counts: {count: what it counts}."""
    low, high = report["flops"]
    lines = [f"{report['trials']} trials of {low:.2e} to {high:.2e} FLOPs; in brackets: 95%"]
    for (form, count), fit in report["fits"].items():
        lines += format_fit(form, count, fit, counts)
        if count == list(counts)[-1]:
            lines.append(f"  {PUBLISHED[form]}")
    form, count = report["chosen"]
    best = "forecasts best" if all_tested(report["fits"]) else "has the least residuals"
    lines.append(f"the one that {best}, used below: {form}, {counts[count]}")
    lines += [*format_residuals(report), *format_slices(report), format_data_rule(report)]
    for forecast in report["forecasts"]:
        lines += format_forecast(forecast)
    return "\n".join(lines)
