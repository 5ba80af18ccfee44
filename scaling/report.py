"""What a sweep over learning rates says about transfer: python -m scaling.report DIR [--base=SIZE]

From the rows alone: the best lr of each size (by a parabola in log2 lr), its drift for each doubling of the
size, and two costs at each size: of the lr that is shipped (--shipped=2**-7.5; by default the best that was
trained at the proxy), and of the proxy's fitted best. The proxy is the size at the base shape, or --base, or
the smallest. Intervals: 95%, by Student's t, with the noise of seeds pooled over the sizes of a ladder; the
drift is also fitted in narrower and wider windows around each size's lowest loss.

--swept=NAME takes only rows that differ in NAME alone from the most common settings, and is needed for rows
of older versions in which another setting than lr was swept; rows say it since. Of a setting that is no
number, such as a schedule, the best value and the order of all. Rows that differ in other settings form
ladders of their own, and so does each value of a second axis in a grid; --axis=NAME says which axis is the
ladder's. Where one ladder is in μP, each other is a control: its losses are compared, size by size. --to=DIR
is where report.json and the figures go. Several DIRs are read as one.

The figures, as .png and .svg: transfer (loss against the swept setting), excess (the same, less each size's
best), size (the best loss against parameters and compute, with a power law where there is one), curves
(training loss along the steps, of each size's best run).
"""

import json
from statistics import mode

import numpy as np

from configure import UserError
from scaling import figures
from scaling.cli import command, format_value
from scaling.fits import average_seeds, optimum, rank_correlation, regret, slope, t_quantile
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
from scaling.trials import HASHES, has_failed, swept_axes

WINDOWS = (0.75, 1.0, 1.5)  # octaves around the lowest loss to which parabolas are fitted
WINDOW = 1.0  # the one whose fit is reported and drawn
NO_INTERVAL = [np.nan, np.nan]
STARS = {True: "lowest point of the fit", False: "the best"}  # what they are in the figures


def analyze(rows, swept="", base=None, axis="", shipped=None):
    """The report, as a dict: of all `rows`, or of those that differ from the most common settings in `swept`
    alone. `base`: the proxy's size. `axis`: the ladder's. `shipped`: the value of the swept setting whose
    cost is told. Raises UserError when the rows form no ladder."""
    recorded = swept_axes(rows)
    if swept:
        rows = rows_of_one_setting(rows, swept)
    configs = settings_and_facts(rows)
    axis, swept, others = choose_axes(rows, configs, swept, axis)
    numeric = all(is_number(config[swept]) for config in configs)
    if shipped and not numeric:
        raise UserError(f"shipped needs a setting that is a number, and {swept} was swept; remove --shipped")
    names = [", ".join([row["parametrization"], *(f"{name}={config[name]}" for name in others)])
             for row, config in zip(rows, configs, strict=True)]
    rows_by_ladder = group(zip(names, rows, strict=True))
    ladders = {name: analyze_ladder(axis, swept, own, base, shipped, numeric)
               for name, own in sorted(rows_by_ladder.items())}
    return {"axis": axis, "swept": swept, "recorded": recorded, "numeric": numeric, "star": STARS[numeric],
            "ladders": ladders}


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
    or lr where it varies, or the one that the sweeps say (swept_axes). Raises UserError."""
    varied = [name for name in configs[0] if len(values_of(configs, name)) > 1]
    axes = [name for name in AXES if name in varied]
    others = [name for name in varied if name not in (*AXES, "seed", "parametrization")]
    recorded = [name for names in swept_axes(rows) for name in names.split(",")]
    candidates = [name for name in recorded if name in others]
    for preferred in ("lr", swept):
        if preferred in others:
            candidates = [preferred]
    if len(candidates) != 1 or swept not in ("", *candidates):
        raise UserError(f"report: the rows must vary {swept or 'lr'}, or say which other setting was swept "
                        f"(else give --swept=NAME), and any of {', '.join(AXES)}; these vary "
                        f"{', '.join(varied) or 'nothing'}")
    if axis and axis not in axes:
        raise UserError(f"axis must be one that varies ({', '.join(axes) or 'none does'}), got {axis}")
    found = candidates[0]
    axis = axis or max(axes, key=lambda name: len(values_of(configs, name)), default="width")
    others = [name for name in others if name != found]
    for name in HASHES:
        if decide(others, name, configs):
            others.remove(name)  # which is another because the data set is, or init_from
    return axis, found, [*axes_beside(axis, axes, configs), *others]


def analyze_ladder(axis, swept, rows, base, shipped, numeric):
    """The report of one ladder: rows that differ in `axis`, `swept` and seed alone. Raises UserError."""
    losses = losses_by_size(axis, swept, rows)
    base = choose_base(axis, rows, list(losses), base)
    ladder, found = fit_sizes(losses, base, shipped) if numeric else order_choices(losses, base)
    sizes = []
    for size, of_size in losses.items():
        lowest = lowest_row([row for row in rows if row[axis] == size])
        sizes.append({axis: size, "seeds": len(seeds_of(of_size)), "losses": with_text_keys(of_size),
                      "trainings": sum(map(len, of_size.values()))}
                     | {name: lowest[name] for name in ("parameters", "flops", "curve")} | found[size])
    return {"base": base} | ladder | {"sizes": sizes}


def fit_sizes(losses, base, shipped=None):
    """({of the ladder: its drift, the interval, the shipped value}, {size: its best value by a parabola, the
    interval, costs}) of losses_by_size(), where the swept values are numbers. There are intervals where a
    size has a second seed. shipped: by default the best that was trained at `base`."""
    means, noise, freedom = pool_noise(losses)
    reach = t_quantile(freedom) * noise  # times the error for each nat of noise: half an interval
    optima = fit_optima(losses, means, WINDOW)
    drift, error = slope(optima)
    shipped = shipped or min(means[base], key=means[base].get)
    ladder = {"drift": drift, "drift_interval": [drift - reach * error, drift + reach * error],
              "drift_by_window": {window: slope(fit_optima(losses, means, window))[0] for window in WINDOWS},
              "noise": noise, "shipped": shipped}
    found = {}
    for size, best in optima.items():
        found[size] = {"edge": best is None, "loss": min(means[size].values()), "interval": NO_INTERVAL}
        found[size] |= dict.fromkeys(("log2_best", "fitted_loss", "curvature", "cost", "most", "regret"))
        if best:
            log2_best, fitted_loss, curvature, error = best
            away = abs(log2_best - np.log2(shipped))
            found[size] |= {"log2_best": log2_best, "fitted_loss": fitted_loss, "curvature": curvature,
                            "interval": [log2_best - reach * error, log2_best + reach * error],
                            "cost": regret(best, means[size], np.log2(shipped)),
                            "most": curvature * (away + reach * error) ** 2 if away <= 1 else None}
        if best and optima[base]:
            found[size]["regret"] = regret(best, means[size], optima[base][0])
    return ladder, found


def fit_optima(losses, means, octaves):
    """{size: its optimum() or None}"""
    seeds = {size: {value: len(by_seed) for value, by_seed in of_size.items()}
             for size, of_size in losses.items()}
    return {size: optimum(of_size, octaves, seeds[size]) for size, of_size in means.items()}


def pool_noise(losses):
    """({size: {value: mean loss}}, standard deviation of the noise of a single loss, its degrees of freedom)
    of losses_by_size(). The noise is that near each size's lowest loss: further off it is larger."""
    means, squares, freedom = {}, 0.0, 0
    for size, of_size in losses.items():
        means[size] = {value: np.mean(list(by_seed.values())) for value, by_seed in of_size.items()}
        lowest = min(means[size], key=means[size].get)
        near = {value: by_seed for value, by_seed in of_size.items() if np.isfinite(means[size][value])
                and not (is_number(value) and abs(np.log2(value / lowest)) > WINDOW + 0.01)}
        if near:
            of_near, more_squares, more_freedom = average_seeds(near)
            means[size] |= of_near
            squares, freedom = squares + more_squares, freedom + more_freedom
    return means, np.sqrt(squares / freedom) if freedom else np.nan, freedom


def order_choices(losses, base):
    """fit_sizes() where the swept values are no numbers but choices: which is the best at each size, in what
    order they are, and what the best of `base` costs, with its standard error."""
    means, noise, _ = pool_noise(losses)
    at_base, found = means[base], {}
    favourite = min(at_base, key=at_base.get)
    for size, of_size in means.items():
        order = sorted(of_size, key=of_size.get)
        shared = [value for value in of_size if value in at_base]
        lowest = of_size[order[0]]
        seeds = [len(losses[size][value]) for value in (favourite, order[0]) if value in of_size]
        found[size] = {
            "edge": not np.isfinite(lowest), "log2_best": None, "fitted_loss": None, "curvature": None,
            "loss": lowest, "interval": NO_INTERVAL, "best": order[0], "order": order,
            "regret": of_size[favourite] - lowest if favourite in of_size else None,
            "error": noise * np.sqrt(sum(1 / number for number in seeds)),
            "rank_correlation": rank_correlation([at_base[value] for value in shared],
                                                 [of_size[value] for value in shared])}
    return {"drift": np.nan, "drift_interval": NO_INTERVAL, "noise": noise}, found


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


def lowest_row(rows):
    """The row of the lowest loss; if all trials diverged, the first that knows the model's size."""
    finished = [row for row in rows if not row["diverged"]]
    sized = [row for row in rows if np.isfinite(row["parameters"])]
    return min(finished, key=lambda row: row["val_loss"], default=[*sized, *rows][0])


def with_text_keys(losses):
    """{value: {seed: loss}}, sorted by value, with keys that JSON can hold."""
    return {str(value): {str(seed): loss for seed, loss in by_seed.items()}
            for value, by_seed in sorted(losses.items())}


def format_interval(ends, none="-"):
    """The interval as text, or `none` when there is none, as with a single seed."""
    return "[{:+.2f}, {:+.2f}]".format(*ends) if np.isfinite(ends).all() else none


def format_rank(correlation):
    """A rank correlation, or - where there is none: of fewer than three."""
    return "-" if np.isnan(correlation) else f"{correlation:+.2f}"


def format_report(report):
    """The report, for people."""
    axis, swept = report["axis"], report["swept"]
    lines = [f"swept, as the rows say: {', '.join(report['recorded'])}"] if report["recorded"] else []
    format_ladder = format_numbers if report["numeric"] else format_choices
    for name, ladder in report["ladders"].items():
        title, *more = format_ladder(ladder, axis, swept)
        lines += [f"{name}: {title}", *more]
    return "\n".join(lines + compare_controls(report))


def at_value(size, value=None):
    """(mean loss, seeds) of a size at a value of the swept setting; by default at the best of those tried."""
    means = {float(tried): np.mean(list(by_seed.values())) for tried, by_seed in size["losses"].items()}
    seeds = {float(tried): len(by_seed) for tried, by_seed in size["losses"].items()}
    value = min(means, key=means.get) if value is None else float(f"{value:.9g}")
    return means.get(value, np.nan), seeds.get(value, 0)


def compare_controls(report):
    """The lines that compare each control with the ladder in μP, if there is one: at the best value of each
    side, then at the shipped one on both, which for a control is a rate that was not tuned for it."""
    axis, swept, ladders, lines = report["axis"], report["swept"], dict(report["ladders"]), []
    in_mup = [name for name in ladders if name.startswith("mup")]
    if not report["numeric"] or len(in_mup) != 1:
        return lines
    mup = ladders.pop(in_mup[0])
    for name, control in ladders.items():
        tried, of_mup = (sum(size["trainings"] for size in each["sizes"]) for each in (control, mup))
        lines.append(f"control {name}: {tried} trainings against {of_mup} of {in_mup[0]}; its loss less "
                     f"that of {in_mup[0]}, in nats, ± two standard errors")
        for value, where in ((None, f"each at its best {swept}"),
                             (mup["shipped"], f"both at {format_value(mup['shipped'])}")):
            found = []
            for size in control["sizes"]:
                same = [at_value(other, value) for other in mup["sizes"] if other[axis] == size[axis]]
                loss, seeds = at_value(size, value)
                for reference, its_seeds in same:
                    if np.isfinite(loss - reference):
                        error = np.hypot(control["noise"] / seeds**0.5, mup["noise"] / its_seeds**0.5)
                        noise = f" ± {2 * error:.4f}" if np.isfinite(error) else " (one seed)"
                        found.append(f"{size[axis]:g}: {loss - reference:+.4f}{noise}")
            if found:
                lines.append(f"  {where}, {axis} {', '.join(found)}")
    return lines


def format_numbers(ladder, axis, swept):
    """The lines of a ladder whose swept values are numbers."""
    drift = f"{ladder['drift']:+.3f} octaves" if np.isfinite(ladder["drift"]) else "an unknown way"
    windows = [f"{moved:+.2f} ({octaves:g})" for octaves, moved in ladder["drift_by_window"].items()
               if np.isfinite(moved)]
    costs = {"cost": f"{format_value(ladder['shipped'])} costs", "most": "at most",
             "regret": f"best of {ladder['base']:g} costs"}
    return [f"best log2 {swept} moves {drift} for each doubling of {axis}, "
            + format_interval(ladder["drift_interval"], "no interval"),
            *format_sizes(ladder["sizes"], axis, costs),
            f"Drift if parabolas are fitted within so many octaves of the lowest loss: "
            f"{', '.join(windows) or 'unknown'}",
            judge_drift(ladder, axis, swept)]


def format_choices(ladder, axis, swept):
    """The lines of a ladder whose swept values are choices."""
    base = f"{ladder['base']:g}"
    orders = [f"{axis} {size[axis]:g}, from the best: {', '.join(size['order'])} (rank correlation with "
              f"{base}: {format_rank(size['rank_correlation'])})" for size in ladder["sizes"]]
    return [f"{swept} at each {axis}",
            *format_sizes(ladder["sizes"], axis, {"regret": f"best of {base} costs", "error": "error"}),
            *orders, judge_choices(ladder, axis, swept)]


def format_sizes(sizes, axis, costs):
    """The table of a ladder. costs: {key of a size: title of its column}, nats each."""
    table = [(axis, "parameters", "seeds", "best log2", "interval", "loss", *costs.values())]
    for size in sizes:
        best = size.get("best") if size["log2_best"] is None else f"{size['log2_best']:.2f}"
        table.append((f"{size[axis]:g}", f"{size['parameters']:,.0f}", str(size["seeds"]),
                      "at the edge" if size["edge"] else best, format_interval(size["interval"]),
                      f"{size['loss']:.4f}", *(format_cost(size[name]) for name in costs)))
    widths = [max(map(len, column)) + 3 for column in zip(*table, strict=True)]
    return ["".join(map(str.rjust, row, widths)) for row in table]


def format_cost(cost):
    """Nats; a dash where they are not known."""
    return "-" if cost is None or np.isnan(cost) else f"{cost:.4f}"


def judge_choices(ladder, axis, swept):
    """What the ladder says of transfer, in plain words, and what it cannot say."""
    costs = [(size["regret"], 2 * size["error"]) for size in ladder["sizes"] if size["regret"] is not None]
    worst, noise = max(costs, default=(0.0, 0.0))
    best = f"The best {swept} of {axis} {ladder['base']:g}"
    if worst == 0:
        return f"{best} is the best at every size."
    said = f"{best} loses up to {worst:.4f} nats at another size"
    if np.isnan(noise):
        return f"{said}. With one seed, nothing says whether that is noise; seed=0,1,2 would tell more."
    return f"{said}, {'more' if worst > noise else 'no more'} than two standard errors ({noise:.4f})."


def judge_drift(ladder, axis, swept):
    """judge_choices() where the swept values are numbers."""
    sizes, text = ladder["sizes"], ""
    fitted = [size for size in sizes if not size["edge"]]
    if at_edge := ", ".join(f"{size[axis]:g}" for size in sizes if size["edge"]):
        text = (f"The best {swept} of {axis} {at_edge} is at the edge of the values tried, so it is not in "
                "the drift; try values beyond. ")
    if len(fitted) < 2:
        return f"{text}No drift can be told: fewer than two sizes have a best {swept} between those tried."
    low, high = ladder["drift_interval"]
    if np.isnan(low):
        text += "With one seed, nothing says whether this drift is noise; seed=0,1,2 in the sweep would tell"
    elif low <= 0 <= high:
        text += f"The drift is within its noise: as far as these rows tell, one {swept} serves every {axis}"
    else:
        text += f"The drift is larger than its noise: the best {swept} moves with {axis}"
    shipped = np.log2(ladder["shipped"])
    if costs := [size["cost"] for size in fitted if size["cost"] is not None]:
        text += f". {format_value(ladder['shipped'])} costs up to {max(costs):.4f} nats"
    outside = [f"{size[axis]:g}" for size in fitted if size["interval"][0] > shipped
               or size["interval"][1] < shipped]
    if outside:
        text += f"; it is outside the interval of the best {swept} at {axis} {', '.join(outside)}"
    return f"{text}."


@command
def main(argv):
    options, folders, to = parse_folders(argv, {"swept": "", "base": 0, "axis": "", "shipped": 0.0}, __doc__)
    rows = read_rows(folders)
    if all(row["diverged"] for row in rows):
        reasons = sorted({row["failure"] for row in rows} - {""}) or ["none failed"]
        raise UserError(f"report: every trial of {', '.join(folders)} diverged or failed ({reasons[0]}), so "
                        "there is no loss to report")
    failed = sum(map(has_failed, rows))
    if failed:
        print(f"{failed} of {len(rows)} trials failed, and count as diverged; their sweep tries them again")
    report = analyze(rows, **{name: options[name] for name in ("swept", "base", "axis", "shipped")})
    write_report(report, to, "report.json")
    print(format_report(report), *figures.draw_report(report, to), sep="\n")
