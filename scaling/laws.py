"""What larger models and longer runs will bring, from the rows of sweeps: python -m scaling.laws DIR...

    python -m scaling.sweep CONFIG width,depth=64x2,128x4,256x8 steps=100..1600 seed=0,1 --out=DIR
    python -m scaling.laws DIR --flops=1e18           # the best model for that budget, and its loss
    python -m scaling.laws DIR --target=CONFIG        # the loss of that one; more --name=value apply to it
    python -m scaling.laws DIR --target=CONFIG --seal # the same, kept in forecast.txt before it is trained
    python -m scaling.laws DIR --measured=DIR         # forecasts beside rows that the fit did not see
    python -m scaling.laws DIR --transfer             # what pretraining is worth: scaling/transfer.py

Fits L(N, D), loss by parameters and training tokens, in Chinchilla's form (arXiv 2203.15556), in Kaplan's
(arXiv 2001.08361), and in Kaplan's above a loss that remains, with N counted with the embedding and readout
and without. The one that misses the larger trials by the least, fitted to the smaller ones, is used. From
it: how N and D should grow with the FLOPs. Beside it isoFLOP parabolas, corrected for grids off their center;
through the lowest points of four or more, the loss on the frontier, L = E + A/C^alpha. And whether training
curves of all sizes have one shape, as those of well-tuned runs on the frontier do (arXiv 2507.02119).

Under μP one tuned setting serves every size of the grid. Where other settings vary, a pair (N, D) is taken
at its best one. Intervals: 95%, by a parametric bootstrap with the noise of pairs and of seeds; that of a
forecast beyond the fit also has how far the laws are apart there (their standard deviation, those that miss
less counting more), and what a law fitted to a tenth of the FLOPs misses of the others. --to=DIR is where
laws.json and the figures go. Tokens must not repeat: the laws are of fresh text.
"""

import hashlib
import os
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np

from configure import SETTINGS, UserError, configure
from data.files import write_text
from scaling import law_fits, transfer
from scaling.cli import command, parse_options, reject_unused
from scaling.law_fits import FORMS, misses
from scaling.law_report import draw_laws, format_laws, sizes_of
from scaling.law_trials import COUNTS, best_settings, columns, count_parameters, finished_trials
from scaling.rows import group, write_report

FEWEST_STEPS, MOST_STEPS = 100, 2**31 - 1  # of a model that is recommended
# Settings that a forecast depends on, besides SAME
USED = set("""width depth head_dim window position norm qk_norm mlp mlp_ratio tied bias vocab_size batch
    batch_start batch_ramp_tokens steps""".split())
SAME = ("dataset", "tokenizer", "val_fraction", "context", "init_from")  # of all rows: others change the loss


def read_folders(folders):
    """The Trials of all finished rows. Raises UserError where there are none, or of different data."""
    trials = finished_trials(folders)
    if not trials:
        raise UserError(f"laws: every trial of {', '.join(folders)} diverged or failed: there is no loss")
    check_same([trial.config for trial in trials], "rows")
    return best_settings(trials)


def check_same(configs, what):
    """Raises UserError where `configs` differ in what changes the loss whatever the size."""
    for name in SAME:
        values = list(dict.fromkeys(str(getattr(config, name)) for config in configs))
        if len(values) > 1:
            raise UserError(f"{name} must be the same in all {what} of a law, got {' and '.join(values[:3])}")


def fit_all(trials):
    """{(form, count): {law, laws, constants, backtest}}; laws: of the bootstrap. Raises UserError."""
    N, D, _, _ = columns(trials, "all")
    pairs, needed = len({*zip(N, D, strict=True)}), len(FORMS["chinchilla"].starts) + 2
    if pairs < needed or len(set(N)) < 3 or len(set(D)) < 3:
        raise UserError(f"laws: got {len(set(N))} sizes and {len(set(D))} numbers of tokens, {pairs} pairs; "
                        f"a law needs 3 of each and {needed} pairs at least, such as from a sweep over "
                        "width,depth=64x2,128x4,256x8 steps=100..1600")
    fits = {}
    for form in FORMS:
        for count in COUNTS:
            N, D, flops, loss = columns(trials, count)
            law = law_fits.fit_law(form, N, D, loss)
            laws = law_fits.bootstrap(law, N, D)
            fits[form, count] = {"law": law, "laws": laws,
                                 "constants": law_fits.constants_with_intervals(law, laws),
                                 "backtest": law_fits.backtest(form, N, D, loss, flops)}
    return fits


def choose(fits):
    """The (form, count) that misses() least."""
    return min(misses(fits), key=misses(fits).get)


def analyze(trials):
    """Everything that the rows say, as a dict of JSON's types but for `fits`, of fit_all()."""
    fits = fit_all(trials)
    chosen = choose(fits)
    N, D, flops, loss = columns(trials, chosen[1])
    law = fits[chosen]["law"]
    points = []
    for trial, predicted in zip(trials, law.loss(N, D), strict=True):
        shape = {name: getattr(trial.config, name) for name in ("width", "depth", "steps", "seed")}
        points.append(shape | {"tokens": trial.tokens, "flops": trial.flops, "parameters": trial.parameters,
                               "loss": trial.loss, "residual": trial.loss - float(predicted)})
    isoflop, frontier = law_fits.isoflop(law, N, D, flops, loss)
    return {"trials": len(trials), "flops": [flops.min(), flops.max()], "chosen": chosen, "fits": fits,
            "points": points, "isoflop": isoflop, "frontier": frontier,
            "collapse": law_fits.collapse(law, N, D, loss, [trial.curve for trial in trials])}


def forecast(report, config):
    """The prediction for one training of `config`, whose vocab_size is known: a dict with `loss` and
    `interval` of the chosen law, the losses by the `others`; and `on_frontier`, where isoFLOP minima have a
    law: its loss, the interval, and how far above the frontier the chosen law has this shape."""
    numbers, flops_per_token = count_parameters(config)
    tokens, (form, count) = config.tokens_before(config.steps), report["chosen"]
    flops, fit = flops_per_token * tokens, report["fits"][form, count]
    losses = {key: float(other["law"].loss(numbers[key[1]], tokens)) for key, other in report["fits"].items()}
    missed = 0.0
    if flops > report["flops"][1]:
        # Beyond the fit the noise of the rows says little: two of two such forecasts missed by more
        weights = np.array([*misses(report["fits"]).values()]) ** -2.0
        mean = np.average([*losses.values()], weights=weights)
        apart = np.average((np.array([*losses.values()]) - mean) ** 2, weights=weights)
        missed = np.sqrt(apart + law_fits.missed_by(fit) ** 2)
    loss, interval = law_fits.predict(fit["law"], fit["laws"], numbers[count], tokens, missed)
    on_frontier = None
    if report["frontier"]:
        sizes = sizes_of(report["points"], count) | {(numbers[count], flops_per_token)}
        _, [lowest] = law_fits.law_frontier(fit["law"], sizes, [flops])
        on_frontier = (*law_fits.predict_frontier(report["frontier"], flops), loss - lowest)
    shape = {name: getattr(config, name) for name in ("width", "depth", "steps", "batch", "context")}
    return shape | {"parameters": numbers, "tokens": tokens, "flops": flops, "loss": loss,
                    "beyond": flops / report["flops"][1], "interval": interval, "on_frontier": on_frontier,
                    "others": {", ".join(key): value for key, value in losses.items()}}


def allocate(report, trials, flops):
    """forecast() of the best shape and steps for a budget of training FLOPs. Shapes grow as those of the
    rows do: log depth is a line in log width. Raises UserError where none fits."""
    base = trials[-1].config
    law, count = report["fits"][report["chosen"]]["law"], report["chosen"][1]
    widths, depths = np.log(sorted({(trial.config.width, trial.config.depth) for trial in trials})).T
    slope, offset = np.polyfit(widths, depths, 1) if np.ptp(widths) else (0.0, depths.mean())
    candidates, heads, steps = [], 1, MOST_STEPS
    while steps >= FEWEST_STEPS:
        width = heads * base.head_dim
        config = replace(base, width=width, depth=max(1, round(np.exp(offset + slope * np.log(width)))))
        numbers, flops_per_token = count_parameters(config)
        steps = base.steps_for(flops / flops_per_token)
        if FEWEST_STEPS <= steps <= MOST_STEPS:
            loss = float(law.loss(numbers[count], base.tokens_before(steps)))
            candidates.append((loss, replace(config, steps=steps)))
        heads = max(heads + 1, round(1.1 * heads))
    if not candidates:
        raise UserError(f"flops must be enough for {FEWEST_STEPS} steps of the smallest model, got {flops:g}")
    return forecast(report, min(candidates, key=lambda pair: pair[0])[1])


def target_config(words, trials):
    """The Config that is to be predicted, with the vocabulary of the rows. Raises UserError."""
    reject_unused(words, SETTINGS.keys() - USED - {*SAME}, "a forecast")
    target, known = configure(words), trials[-1].config
    check_same([known, target], "rows and targets")
    return replace(target, vocab_size=target.vocab_size or known.vocab_size)


def measured_rows(report, trials):
    """[forecast() with what was `measured`] for each shape and horizon of rows that the fit did not see."""
    pairs = group((replace(trial.config, seed=0), trial.loss) for trial in trials)
    return [forecast(report, config) | {"measured": float(np.mean(losses)), "seeds": len(losses)}
            for config, losses in pairs.items()]


def sealed_text(argv, folders, text):
    """What forecast.txt holds: `text`, the command that made it, and hashes of the files it read."""
    paths = [path for folder in folders for path in sorted(Path(folder).glob("trials*.csv"))]
    hashes = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path}" for path in paths]
    return "\n".join(["Forecast before the target is trained, from rows with these SHA-256:", *hashes,
                      f"by: python -m scaling laws {shlex.join(argv)}", "", text, ""])


def to_json(report):
    """`report` with the fits by name, without the bootstrap's laws."""
    fits = {f"{form}, {count}": {"constants": fit["constants"], "sigma_cell": fit["law"].sigma_cell,
                                 "sigma_seed": fit["law"].sigma_seed, "backtest": fit["backtest"]}
            for (form, count), fit in report["fits"].items()}
    frontier = report["frontier"] and report["frontier"]["constants"]
    return report | {"fits": fits, "chosen": ", ".join(report["chosen"]), "frontier": frontier}


@command
def main(argv):
    defaults = {"to": "", "flops": 0.0, "target": "", "measured": "", "transfer": False, "seal": False}
    options, _, words = parse_options(argv, defaults, __doc__)
    folders = [word for word in words if not word.startswith("-")]
    settings = [word for word in words if word.startswith("-")]
    if not folders or settings and not options["target"]:
        raise UserError(f"laws: give one or more folders of trials; options are --{', --'.join(defaults)}")
    to = options["to"] or folders[0]
    if options["transfer"]:
        return transfer.report_rows(folders, to)
    trials, targets, unseen = read_folders(folders), [], []
    if options["target"]:
        targets = [target_config([options["target"], *settings], trials)]
    if options["measured"]:
        unseen = read_folders([options["measured"]])
        check_same([trials[0].config, unseen[0].config], "rows")
    path = os.path.join(to, "forecast.txt")
    if options["seal"] and (not targets or os.path.exists(path)):
        raise UserError(f"seal needs --target=CONFIG, and a folder without a forecast.txt, as that is never "
                        f"replaced, got {to}; try another --to=DIR")
    report = analyze(trials)
    report["forecasts"] = [allocate(report, trials, options["flops"])] if options["flops"] else []
    report["forecasts"] += [forecast(report, config) for config in targets]
    report["forecasts"] += measured_rows(report, unseen)
    write_report(to_json(report), to, "laws.json", default=lambda value: np.asarray(value).tolist())
    print(format_laws(report), *draw_laws(report, to), sep="\n")
    if options["seal"]:
        write_text(path, sealed_text(argv, folders, format_laws(report)))
        print(path)
