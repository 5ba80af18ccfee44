"""What a sweep over learning rates says about transfer: python -m scaling.report DIR [--base=RUNG]

From the rows alone: the best lr of each rung (by a parabola in log2 lr), its drift for each doubling
of the axis, and what the proxy's rate costs at a rung (regret). The proxy is the rung at the base shape, or
--base, or the first. Intervals: 95%, by bootstrap over seeds. Other settings that differ make their own
ladders; --swept=NAME takes only rows that differ in NAME alone from the most common settings; --to=DIR.
"""

import json
import os
from statistics import mode

import numpy as np

from configure import UserError
from data.checkpoints import write
from data.processes import command
from scaling import figures
from scaling.fits import interval, mean_losses, optimum, regret, slope
from scaling.trials import read
from scaling.words import make_folder, words_of

AXES = ("width", "depth", "context", "batch", "steps")
DRAWS = 1000


def choose(configs, swept):
    """(ladder axis, swept setting, other settings that tell ladders apart) of what `configs` vary; the swept
    setting is lr, or else the one other number, unless given. Raises UserError."""
    varied = [name for name in configs[0] if len({json.dumps(c[name]) for c in configs}) > 1]
    axes = [name for name in AXES if name in varied]
    if axes and len({tuple(map(c.get, axes)) for c in configs}) == len({c[axes[0]] for c in configs}):
        axes = axes[:1]  # the others follow it, as --hold has them
    others = [name for name in varied if name not in (*AXES, "seed", "parametrization")]
    numbers = [name for name in others if all(type(c[name]) in (int, float) for c in configs)]
    found = [name for name in (swept, "lr") if name in numbers][:1] or numbers
    if len(axes) > 1 or len(found) != 1 or swept not in ("", *found):
        raise UserError(f"report: got rows that vary {', '.join(varied) or 'nothing'}; takes one of "
                        f"{', '.join(AXES)}, and {swept or 'lr or one other number'}")
    return axes[0] if axes else "width", found[0], [name for name in others if name != found[0]]


def climb(axis, swept, rows, base):
    """The report of one ladder."""
    rungs, random = sorted({row[axis] for row in rows}), np.random.default_rng(0)
    seeds = {rung: sorted({row["seed"] for row in rows if row[axis] == rung}) for rung in rungs}
    losses = {rung: {} for rung in rungs}
    for row in rows:
        loss = np.inf if row["diverged"] else row["val_loss"]
        x = float(f"{json.loads(row['config'])[swept]:.9g}")  # 2**-8 is 2**-8.5 * 2**0.5 but for rounding
        losses[row[axis]].setdefault(x, {})[row["seed"]] = loss

    def fit(seeds):
        return {rung: optimum(mean_losses(losses[rung], seeds[rung])) for rung in rungs}

    best = fit(seeds)
    several = [rung for rung, its in seeds.items() if len(its) > 1]  # one seed has no interval
    draws = [fit({rung: random.choice(its, len(its)) for rung, its in seeds.items()})
             for _ in range(DRAWS if several else 0)]
    proxy = json.loads(rows[0]["config"]).get(f"base_{axis}")
    base = base or (proxy if proxy in rungs else rungs[0])
    if base not in rungs:
        raise UserError(f"base: got {base}, takes one of {', '.join(f'{rung:g}' for rung in rungs)}")
    ladder = {"base": base, "drift": slope(best), "rungs": [],
              "drift_interval": interval([slope(draw) for draw in draws] if several == rungs else [])}
    for rung in rungs:
        found, mean = best[rung], mean_losses(losses[rung], seeds[rung])
        top = min((row for row in rows if row[axis] == rung and not row["diverged"]),
                  key=lambda row: row["val_loss"], default=rows[0])
        ladder["rungs"].append({
            axis: rung, "edge": found is None, "log2_best": found and found[0], "loss": min(mean.values()),
            "interval": interval([draw[rung][0] for draw in draws if rung in several and draw[rung]]),
            "regret": regret(found, mean, best[base][0]) if found and best[base] else None,
            "seeds": len(seeds[rung]), **{name: top[name] for name in ("parameters", "flops", "curve")},
            "losses": {str(x): {str(seed): loss for seed, loss in by_seed.items()}
                       for x, by_seed in sorted(losses[rung].items())}})
    return ladder


def analyse(rows, swept="", base=None):
    """The report, as a dict: of all `rows`, or of those that differ from the most common settings in `swept`
    alone. `base`: the proxy's rung. Raises UserError when the rows are no ladder."""
    configs = [json.loads(row["config"]) for row in rows]
    if swept:
        usual = {name: mode(c[name] for c in configs) for name in configs[0].keys() - {*AXES, "seed", swept}}
        rows = [row for row, c in zip(rows, configs, strict=True) if usual.items() <= c.items()]
        configs = [json.loads(row["config"]) for row in rows]
    axis, swept, others = choose(configs, swept)
    ladders = {}
    for row, config in zip(rows, configs, strict=True):
        name = ", ".join([row["parametrization"], *(f"{name}={config[name]}" for name in others)])
        ladders.setdefault(name, []).append(row)
    return {"axis": axis, "swept": swept,
            "ladders": {name: climb(axis, swept, its, base) for name, its in sorted(ladders.items())}}


def span(interval):
    return "[{:+.2f}, {:+.2f}]".format(*interval) if np.isfinite(interval).all() else "-"  # one seed has none


def text(report):
    """The report, for people."""
    axis, lines = report["axis"], []
    for name, ladder in report["ladders"].items():
        drift = f"{ladder['drift']:+.3f} octaves" if np.isfinite(ladder["drift"]) else "an unknown way"
        drift += f" for each doubling of {axis}, {span(ladder['drift_interval'])}"
        lines += [f"{name}: best log2 {report['swept']} moves {drift}",
                  f"{axis:>10}    parameters  seeds   best log2          interval     loss   regret"]
        for rung in ladder["rungs"]:
            at = "at the edge" if rung["edge"] else f"{rung['log2_best']:.2f}"
            cost = "-" if rung["regret"] is None else f"{rung['regret']:.4f}"
            lines.append(f"{rung[axis]:>10.0f}{rung['parameters']:>14,.0f}{rung['seeds']:>7}{at:>12}"
                         f"{span(rung['interval']):>18}{rung['loss']:>9.4f}{cost:>9}")
    return "\n".join(lines)


def main(argv):
    own = {"to": "", "swept": "", "base": 0}
    folders = words_of(argv, own, __doc__)
    if not folders or any(word.startswith("-") for word in folders):
        raise UserError("report: takes folders of trials.csv, --to, --swept, --base")
    if not (rows := [row for folder in folders for row in read(folder)]):
        raise UserError(f"report: {folders[0]} has no trials; takes a folder that scaling.sweep wrote")
    report, to = analyse(rows, own["swept"], own["base"]), make_folder(own["to"] or folders[0])
    write(os.path.join(to, "report.json"), json.dumps(report, indent=1, default=float))
    print(text(report), *figures.draw(report, to), sep="\n")


if __name__ == "__main__":
    command(main)
