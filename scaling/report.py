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
    group,
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
    numeric = all(is_number(config[swept]) for config in configs)
    names = [", ".join([row["parametrization"], *(f"{name}={config[name]}" for name in others)])
             for row, config in zip(rows, configs, strict=True)]
    rows_by_ladder = group(zip(names, rows, strict=True))
    ladders = {name: analyze_ladder(axis, swept, own, base, fit_sizes if numeric else order_choices)
               for name, own in sorted(rows_by_ladder.items())}
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


def analyze_ladder(axis, swept, rows, base, compare):
    """The report of one ladder: rows that differ in `axis`, `swept` and seed alone. compare: fit_sizes() or
    order_choices(). Raises UserError."""
    losses = losses_by_size(axis, swept, rows)
    base = choose_base(axis, rows, list(losses), base)
    found, drift, drift_interval = compare(losses, base)
    sizes = []
    for size, of_size in losses.items():
        lowest = lowest_row([row for row in rows if row[axis] == size])
        sizes.append({axis: size, "seeds": len(seeds_of(of_size)), "losses": with_text_keys(of_size)}
                     | {name: lowest[name] for name in ("parameters", "flops", "curve")} | found[size])
    return {"base": base, "drift": drift, "drift_interval": drift_interval, "rungs": sizes}


def fit_sizes(losses, base):
    """({size: its best value by a parabola, the interval, what the best of `base` costs}, drift, its
    interval) of losses_by_size(), where the swept values are numbers. One seed gives no interval."""
    seeds = {size: seeds_of(of_size) for size, of_size in losses.items()}
    means = {size: mean_losses(of_size, seeds[size]) for size, of_size in losses.items()}
    optima = {size: optimum(of_size) for size, of_size in means.items()}
    draws, found = bootstrap(losses, seeds), {}
    for size, best in optima.items():
        drawn = [draw[size][0] for draw in draws if len(seeds[size]) > 1 and draw[size]]
        cost = regret(best, means[size], optima[base][0]) if best and optima[base] else None
        log2_best, fitted_loss, curvature = best or (None, None, None)
        found[size] = {"edge": best is None, "log2_best": log2_best, "fitted_loss": fitted_loss,
                       "curvature": curvature, "loss": min(means[size].values()),
                       "interval": interval(drawn), "regret": cost}
    drifts = [slope(draw) for draw in draws] if min(map(len, seeds.values())) > 1 else []
    return found, slope(optima), interval(drifts)


def order_choices(losses, base):
    """fit_sizes() where the swept values are no numbers but choices: which is the best at each size, in what
    order they are, and what the best of `base` costs."""
    means = {size: {value: np.mean(list(by_seed.values())) for value, by_seed in of_size.items()}
             for size, of_size in losses.items()}
    at_base, found = means[base], {}
    favourite = min(at_base, key=at_base.get)
    for size, of_size in means.items():
        order = sorted(of_size, key=of_size.get)
        shared = [value for value in of_size if value in at_base]
        lowest = of_size[order[0]]
        found[size] = {
            "edge": not np.isfinite(lowest), "log2_best": None, "fitted_loss": None, "curvature": None,
            "loss": lowest, "interval": interval([]), "best": order[0], "order": order,
            "regret": of_size[favourite] - lowest if favourite in of_size else None,
            "rank_correlation": rank_correlation([at_base[value] for value in shared],
                                                 [of_size[value] for value in shared])}
    return found, np.nan, interval([])


def is_number(value):
    return type(value) in (int, float) and value > 0  # 0 has no logarithm


def losses_by_size(axis, swept, rows):
    """{size: {value of the swept setting: {seed: loss}}}, sizes in order; inf for what diverged."""
    losses = {size: {} for size in sorted({row[axis] for row in rows})}
    for row in rows:
        value = json.loads(row["config"])[swept]
        # 2**-8 is 2**-8.5 * 2**0.5 but for rounding
        value = float(f"{value:.9g}") if is_number(value) else str(value)
        losses[row[axis]].setdefault(value, {})[row["seed"]] = loss_of(row)
    return losses


def seeds_of(losses):
    """The seeds in {value: {seed: loss}}."""
    return sorted({seed for by_seed in losses.values() for seed in by_seed})


def bootstrap(losses, seeds):
    """[{size: its optimum()}] of BOOTSTRAP_DRAWS draws of as many seeds as it has, with replacement."""
    random = np.random.default_rng(0)

    @functools.cache  # few seeds make few different draws
    def fit(size, drawn):
        return optimum(mean_losses(losses[size], drawn))

    return [{size: fit(size, tuple(random.choice(own, len(own)))) for size, own in seeds.items()}
            for _ in range(BOOTSTRAP_DRAWS)]


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
    return "[{:+.2f}, {:+.2f}]".format(*ends) if np.isfinite(ends).all() else "-"


def format_rank(correlation):
    """A rank correlation, or - where there is none: of fewer than three."""
    return "-" if np.isnan(correlation) else f"{correlation:+.2f}"


def format_report(report):
    """The report, for people."""
    axis, swept, lines = report["axis"], report["swept"], []
    for name, ladder in report["ladders"].items():
        sizes, base = ladder["rungs"], ladder["base"]
        title = f"{name}: {swept} at each {axis}; regret is that of the best at {base:.0f}"
        best, orders = "best", []
        if report["numeric"]:
            drift = f"{ladder['drift']:+.3f} octaves" if np.isfinite(ladder["drift"]) else "an unknown way"
            title = (f"{name}: best log2 {swept} moves {drift} for each doubling of {axis}, "
                     + format_interval(ladder["drift_interval"]))
            best = "best log2"
        else:
            orders = [f"{axis} {size[axis]:.0f}, from the best: {', '.join(size['order'])} (rank correlation "
                      f"with {base:.0f}: {format_rank(size['rank_correlation'])})" for size in sizes]
        lines += [title, f"{axis:>10}    parameters  seeds{best:>12}          interval     loss   regret",
                  *(format_size(axis, size) for size in sizes), *orders, judge(ladder, report)]
    return "\n".join(lines)


def format_size(axis, size):
    """The line of one size."""
    if size["edge"]:
        best = "at the edge"
    else:
        best = size["best"] if size["log2_best"] is None else f"{size['log2_best']:.2f}"
    cost = "-" if size["regret"] is None else f"{size['regret']:.4f}"
    return (f"{size[axis]:>10.0f}{size['parameters']:>14,.0f}{size['seeds']:>7}{best:>12}"
            f"{format_interval(size['interval']):>18}{size['loss']:>9.4f}{cost:>9}")


def judge(ladder, report):
    """What the ladder says of transfer, in plain words, and what it cannot say."""
    swept, sizes = report["swept"], ladder["rungs"]
    base = f"{report['axis']} {ladder['base']:g}"
    costs = [size["regret"] for size in sizes if size["regret"] is not None]
    few = min(size["seeds"] for size in sizes)
    if report["numeric"]:
        return judge_drift(ladder, report["axis"], swept, few, base, costs)
    said = f"The best {swept} of {base} is the best at every size"
    if max(costs, default=0) > 0:
        said = f"The best {swept} of {base} loses up to {max(costs):.4f} nats at another size"
    if few == 1:
        said += ". With one seed, nothing says whether that is noise; seed=0,1,2 would tell more"
    return f"{said}."


def judge_drift(ladder, axis, swept, few, base, costs):
    """judge() where the swept values are numbers. few: seeds, at the size that has the fewest."""
    text, at_edge = "", [f"{size[axis]:g}" for size in ladder["rungs"] if size["edge"]]
    if at_edge:
        text = (f"The best {swept} of {axis} {', '.join(at_edge)} is at the edge of the values tried, so it "
                "is not in the drift; try values beyond. ")
    if len(ladder["rungs"]) - len(at_edge) < 2:
        return f"{text}No drift can be told: fewer than two sizes have a best {swept} between those tried."
    low, high = ladder["drift_interval"]
    if few == 1:
        text += "With one seed, nothing says whether this drift is noise; seed=0,1,2 in the sweep would tell"
    elif low <= 0 <= high:
        text += f"The drift is within its noise: as far as these rows tell, one {swept} serves every {axis}"
    else:
        text += f"The drift is larger than its noise: the best {swept} moves with {axis}"
    if costs:
        text += f". At the best {swept} of {base} a size loses up to {max(costs):.4f} nats"
    if 1 < few < TRUSTED_SEEDS:
        text += f". The interval, of {few} seeds, is too narrow by about half"
    return f"{text}."


@command
def main(argv):
    options, folders, to = parse_folders(argv, {"swept": "", "base": 0, "axis": ""}, __doc__)
    rows = read_rows(folders)
    if all(row["diverged"] for row in rows):
        reasons = sorted({row["failure"] for row in rows} - {""}) or ["none failed"]
        raise UserError(f"report: every trial of {', '.join(folders)} diverged or failed ({reasons[0]}), so "
                        "there is no loss to report")
    failed = sum(map(has_failed, rows))
    if failed:
        print(f"{failed} of {len(rows)} trials failed, and count as diverged; their sweep tries them again")
    report = analyze(rows, options["swept"], options["base"], options["axis"])
    write_report(report, to, "report.json")
    print(format_report(report), *figures.draw_report(report, to), sep="\n")
