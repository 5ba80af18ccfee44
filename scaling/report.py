"""What a sweep over learning rates says about transfer: python -m scaling.report DIR [--base=SIZE]

From the rows alone: the best lr of each size (by a parabola in log2 lr), its drift for each doubling of the
size, and what training a size at the proxy's best lr costs (regret). The proxy is the size at the base
shape, or --base, or the smallest. Intervals: 95%, by bootstrap over seeds. Where another setting than lr was
swept, its best value; of one that is no number, such as a schedule, the order of its values too.
Rows that differ in other settings form ladders of their own, and so does each value of a second axis in a
grid; --axis=NAME says which axis is the ladder's. --swept=NAME takes only rows that differ in NAME alone from
the most common settings; --to=DIR is where report.json and the figures go. Several DIRs are read as one.

The figures, as .png and .svg: transfer (loss against the swept setting), excess (the same, less each size's
best), size (the best loss against parameters and compute, with a power law where there is one), curves
(training loss along the steps, of each size's best run).
"""

import functools
import json
from statistics import mode

import numpy as np

from configure import UserError
from scaling import figures
from scaling.cli import command
from scaling.fits import interval, mean_losses, optimum, rank_correlation, regret, slope
from scaling.rows import (
    AXES,
    axes_beside,
    choose_base,
    decide,
    loss_of,
    parse_folders,
    read_rows,
    settings_and_facts,
    values_of,
    write_report,
)
from scaling.trials import FACTS, HASHES, has_failed, swept_axes

BOOTSTRAP_DRAWS = 1000
TRUSTED_SEEDS = 5  # of fewer a bootstrap shows too little of their noise
STARS = {True: "lowest point of the fit", False: "the best"}  # what they are in the figures


def analyze(rows, swept="", base=None, axis=""):
    """The report, as a dict: of all `rows`, or of those that differ from the most common settings in `swept`
    alone. `base`: the proxy's size. `axis`: the ladder's. Raises UserError when the rows form no ladder."""
    if swept:
        rows = rows_of_one_setting(rows, swept)
    configs = settings_and_facts(rows)
    axis, swept, others = choose_axes(rows, configs, swept, axis)
    rows_by_ladder = {}
    for row, config in zip(rows, configs, strict=True):
        name = ", ".join([row["parametrization"], *(f"{other}={config[other]}" for other in others)])
        rows_by_ladder.setdefault(name, []).append(row)
    numeric = all(is_number(config[swept]) for config in configs)
    analyze_one = analyze_ladder if numeric else analyze_choices
    ladders = {name: analyze_one(axis, swept, ladder_rows, base)
               for name, ladder_rows in sorted(rows_by_ladder.items())}
    return {"axis": axis, "swept": swept, "numeric": numeric, "star": STARS[numeric], "ladders": ladders}


def rows_of_one_setting(rows, swept):
    """The rows whose settings are the most common ones, but for axes, seed and `swept`. Raises UserError."""
    configs = settings_and_facts(rows)
    fixed = configs[0].keys() - {*AXES, "seed", swept}
    usual = {name: mode(config[name] for config in configs) for name in fixed}
    found = [row for row, config in zip(rows, configs, strict=True) if usual.items() <= config.items()]
    if not found:
        raise UserError(f"swept={swept}: no trial has the most common value of each other setting; give "
                        "folders in which one setting was swept")
    return found


def choose_axes(rows, configs, swept, axis=""):
    """(ladder axis, swept setting, other settings that tell ladders apart) of what `configs` vary. The axis
    is `axis`, or the one with the most values: further axes tell ladders apart. The swept setting is `swept`,
    or lr, or the one that the sweeps say (swept_axes), or infer_swept(). Raises UserError."""
    varied = [name for name in configs[0] if len(values_of(configs, name)) > 1]
    axes = [name for name in AXES if name in varied]
    others = [name for name in varied if name not in (*AXES, "seed", "parametrization")]
    recorded = [name for names in swept_axes(rows) for name in names.split(",")]
    candidates = [name for name in recorded if name in others] or infer_swept(configs, others)
    for preferred in ("lr", swept):
        if preferred in others:
            candidates = [preferred]
    if len(candidates) != 1 or swept not in ("", *candidates):
        raise UserError(f"report: the rows must vary {swept or 'lr or one other setting'}, and any of "
                        f"{', '.join(AXES)}; these vary {', '.join(varied) or 'nothing'}")
    if axis and axis not in axes:
        raise UserError(f"axis must be one that varies ({', '.join(axes) or 'none does'}), got {axis}")
    found = candidates[0]
    axis = axis or max(axes, key=lambda name: len(values_of(configs, name)), default="width")
    others = [name for name in others if name != found]
    for name in HASHES:
        if decide(others, name, configs):
            others.remove(name)  # which is another because the data set is, or init_from
    return axis, found, [*axes_beside(axis, axes, configs), *others]


def infer_swept(configs, varied):
    """What older rows, which do not say, may be a sweep of: the numbers among `varied`, or all settings."""
    settings = [name for name in varied if name not in FACTS]
    numbers = [name for name in settings if all(type(config[name]) in (int, float) for config in configs)]
    return numbers or settings


def analyze_ladder(axis, swept, rows, base):
    """The report of one ladder: rows that differ in `axis`, `swept` and seed alone. Raises UserError."""
    losses = losses_by_size(axis, swept, rows)
    sizes = list(losses)
    seeds = {size: sorted({row["seed"] for row in rows if row[axis] == size}) for size in sizes}
    base = choose_base(axis, rows, sizes, base)
    optima = {size: optimum(mean_losses(losses[size], seeds[size])) for size in sizes}
    several = [size for size in sizes if len(seeds[size]) > 1]  # one seed gives no interval
    draws = bootstrap(losses, seeds) if several else []
    drifts = [slope(draw) for draw in draws] if several == sizes else []
    ladder = {"base": base, "drift": slope(optima), "rungs": [], "drift_interval": interval(drifts)}
    for size in sizes:
        best, means = optima[size], mean_losses(losses[size], seeds[size])
        drawn = [draw[size][0] for draw in draws if size in several and draw[size]]
        cost = None
        if best and optima[base]:
            cost = regret(best, means, optima[base][0])
        log2_best, fitted_loss, curvature = best or (None, None, None)
        ladder["rungs"].append(describe_size(axis, size, rows, losses[size]) | {
            "edge": best is None, "log2_best": log2_best, "fitted_loss": fitted_loss, "curvature": curvature,
            "loss": min(means.values()), "interval": interval(drawn), "regret": cost})
    return ladder


def analyze_choices(axis, swept, rows, base):
    """The same where the values of `swept` are no numbers but choices: which is the best at each size, in
    what order they are, and what the proxy's best costs. Raises UserError."""
    losses = losses_by_size(axis, swept, rows)
    base = choose_base(axis, rows, list(losses), base)
    means = {size: {value: np.mean(list(by_seed.values())) for value, by_seed in of_size.items()}
             for size, of_size in losses.items()}
    at_base = means[base]
    favourite = min(at_base, key=at_base.get)
    ladder = {"base": base, "drift": np.nan, "rungs": [], "drift_interval": interval([])}
    for size, of_size in means.items():
        shared = [value for value in of_size if value in at_base]
        best = min(of_size, key=of_size.get)
        cost = of_size[favourite] - of_size[best] if favourite in of_size else None
        ladder["rungs"].append(describe_size(axis, size, rows, losses[size]) | {
            "edge": not np.isfinite(of_size[best]), "log2_best": None, "fitted_loss": None, "curvature": None,
            "best": best, "loss": of_size[best], "interval": interval([]), "regret": cost,
            "order": sorted(of_size, key=of_size.get),
            "rank_correlation": rank_correlation([at_base[value] for value in shared],
                                                 [of_size[value] for value in shared])})
    return ladder


def describe_size(axis, size, rows, losses):
    """What the report says of a size whatever was swept: its model, its best run's curve, its losses."""
    own = [row for row in rows if row[axis] == size]
    lowest = lowest_row(own)
    return {axis: size, "seeds": len({row["seed"] for row in own}), "parameters": lowest["parameters"],
            "flops": lowest["flops"], "curve": lowest["curve"], "losses": with_text_keys(losses)}


def is_number(value):
    return type(value) in (int, float) and value > 0  # 0 has no logarithm


def losses_by_size(axis, swept, rows):
    """{size: {value of the swept setting: {seed: loss}}}, sizes in order; inf for what diverged."""
    losses = {size: {} for size in sorted({row[axis] for row in rows})}
    for row in rows:
        value = json.loads(row["config"])[swept]
        if is_number(value):
            value = float(f"{value:.9g}")  # 2**-8 is 2**-8.5 * 2**0.5 but for rounding
        else:
            value = str(value)
        losses[row[axis]].setdefault(value, {})[row["seed"]] = loss_of(row)
    return losses


def bootstrap(losses, seeds):
    """[{size: its optimum()}] of BOOTSTRAP_DRAWS draws of as many seeds as it has, with replacement."""
    random = np.random.default_rng(0)

    @functools.cache  # few seeds make few different draws
    def fit(size, drawn):
        return optimum(mean_losses(losses[size], drawn))

    draws = []
    for _ in range(BOOTSTRAP_DRAWS):
        drawn = {size: tuple(random.choice(own, len(own))) for size, own in seeds.items()}
        draws.append({size: fit(size, drawn[size]) for size in seeds})
    return draws


def lowest_row(rows):
    """The row of the lowest loss; if all trials diverged, the first that knows the model's size."""
    finished = [row for row in rows if not row["diverged"]]
    sized = [row for row in rows if np.isfinite(row["parameters"])]
    return min(finished, key=lambda row: row["val_loss"], default=[*sized, *rows][0])


def with_text_keys(losses):
    """{value: {seed: loss}}, sorted by value, with keys that JSON can hold."""
    return {str(value): {str(seed): loss for seed, loss in by_seed.items()}
            for value, by_seed in sorted(losses.items())}


def format_interval(ends):
    """The interval as text; a dash when there is none, as with a single seed."""
    if not np.isfinite(ends).all():
        return "-"
    return "[{:+.2f}, {:+.2f}]".format(*ends)


def format_report(report):
    """The report, for people."""
    axis, lines = report["axis"], []
    for name, ladder in report["ladders"].items():
        if report["numeric"]:
            lines.append(format_drift(name, ladder, report))
        else:
            lines.append(f"{name}: {report['swept']} at each {axis}; regret is that of the best at "
                         f"{ladder['base']:.0f}")
        best = "best log2" if report["numeric"] else "best"
        lines.append(f"{axis:>10}    parameters  seeds{best:>12}          interval     loss   regret")
        lines += [format_size(axis, size) for size in ladder["rungs"]]
        if not report["numeric"]:
            lines += [f"{axis} {size[axis]:.0f}, from the best: {', '.join(size['order'])} (rank correlation "
                      f"with {ladder['base']:.0f}: {format_rank(size['rank_correlation'])})"
                      for size in ladder["rungs"]]
        lines.append(judge_drift(ladder, report) if report["numeric"] else judge_choice(ladder, report))
    return "\n".join(lines)


def judge_drift(ladder, report):
    """What the ladder says of transfer, in plain words, and what it cannot say."""
    axis, swept, sizes = report["axis"], report["swept"], ladder["rungs"]
    text, at_edge = "", [f"{size[axis]:g}" for size in sizes if size["edge"]]
    if at_edge:
        text = (f"The best {swept} of {axis} {', '.join(at_edge)} is at the edge of the values tried, so it "
                "is not in the drift; try values beyond. ")
    if len(sizes) - len(at_edge) < 2:
        return f"{text}No drift can be told: fewer than two sizes have a best {swept} between those tried."
    low, high = ladder["drift_interval"]
    few = min(size["seeds"] for size in sizes)
    if few == 1:
        text += "With one seed, nothing says whether this drift is noise; seed=0,1,2 in the sweep would tell"
    elif low <= 0 <= high:
        text += f"The drift is within its noise: as far as these rows tell, one {swept} serves every {axis}"
    else:
        text += f"The drift is larger than its noise: the best {swept} moves with {axis}"
    costs = [size["regret"] for size in sizes if size["regret"] is not None]
    if costs:
        text += f". At the best {swept} of {axis} {ladder['base']:g} a size loses up to {max(costs):.4f} nats"
    if 1 < few < TRUSTED_SEEDS:
        text += f". The interval, of {few} seeds, is too narrow by about half"
    return f"{text}."


def judge_choice(ladder, report):
    """The same of a setting whose values are no numbers."""
    sizes, base = ladder["rungs"], f"{report['axis']} {ladder['base']:g}"
    costs = [size["regret"] for size in sizes if size["regret"] is not None]
    said = f"The best {report['swept']} of {base} is the best at every size"
    if max(costs, default=0) > 0:
        said = f"The best {report['swept']} of {base} loses up to {max(costs):.4f} nats at another size"
    if min(size["seeds"] for size in sizes) == 1:
        return f"{said}. With one seed, nothing says whether that is noise; seed=0,1,2 would tell more."
    return f"{said}."


def format_rank(correlation):
    """A rank correlation, or - where there is none: of fewer than three."""
    return "-" if np.isnan(correlation) else f"{correlation:+.2f}"


def format_drift(name, ladder, report):
    drift = "an unknown way"
    if np.isfinite(ladder["drift"]):
        drift = f"{ladder['drift']:+.3f} octaves"
    return (f"{name}: best log2 {report['swept']} moves {drift} for each doubling of {report['axis']}, "
            + format_interval(ladder["drift_interval"]))


def format_size(axis, size):
    """The line of one size."""
    if size["edge"]:
        best = "at the edge"
    else:
        best = size["best"] if size["log2_best"] is None else f"{size['log2_best']:.2f}"
    cost = "-" if size["regret"] is None else f"{size['regret']:.4f}"
    return (f"{size[axis]:>10.0f}{size['parameters']:>14,.0f}{size['seeds']:>7}{best:>12}"
            f"{format_interval(size['interval']):>18}{size['loss']:>9.4f}{cost:>9}")


@command
def main(argv):
    options, folders, to = parse_folders(argv, {"swept": "", "base": 0, "axis": ""}, __doc__)
    rows = read_rows(folders)
    if all(row["diverged"] for row in rows):
        reasons = sorted({row["failure"] for row in rows} - {""})
        raise UserError(f"report: every trial of {', '.join(folders)} diverged or failed "
                        f"({reasons[0] if reasons else 'none failed'}), so there is no loss to report")
    failed = sum(map(has_failed, rows))
    if failed:
        print(f"{failed} of {len(rows)} trials failed, and count as diverged; their sweep tries them again")
    report = analyze(rows, options["swept"], options["base"], options["axis"])
    write_report(report, to, "report.json")
    print(format_report(report), *figures.draw_report(report, to), sep="\n")
