"""What larger models and longer runs will bring, from the rows of sweeps: python -m scaling.laws DIR...

    python -m scaling.sweep CONFIG width,depth=64x2,128x4,256x8 steps=100..1600 seed=0,1 --out=DIR
    python -m scaling.laws DIR --flops=1e18           # the best model for that budget, and its loss
    python -m scaling.laws DIR --target=CONFIG        # the loss of that one; more --name=value apply to it
    python -m scaling.laws DIR --measured=DIR         # forecasts beside rows that the fit did not see
    python -m scaling.laws DIR --transfer             # what pretraining is worth: scaling/transfer.py

Fits L(N, D), loss by parameters and training tokens, in Chinchilla's form (arXiv 2203.15556) and in Kaplan's
(arXiv 2001.08361), with N counted with the embedding and readout and without. From it: how N and D should
grow with the FLOPs; beside it isoFLOP parabolas, and power laws on the longest runs and on the frontier.
Under μP one tuned setting serves every size of the grid. Where other settings vary, a pair (N, D) is taken
at its best one. Intervals: 95%, by a parametric bootstrap with the noise of pairs and of seeds; that of a
forecast beyond the fit also has how far the laws are apart there (their standard deviation), and what a law
fitted to a tenth of the FLOPs misses of the others. --to=DIR is where laws.json and the figures go. Tokens
must not repeat: the laws are of fresh text.
"""

import functools
import json
import os
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from configure import SETTINGS, Config, UserError, configure
from data.files import write_text
from model import GPT
from parametrization import role_of
from scaling import law_figures
from scaling.cli import command, make_folder, parse_options, reject_unused
from scaling.law_fits import (
    FORMS,
    all_tested,
    backtest,
    bootstrap,
    constants_with_intervals,
    fit_law,
    missed_by,
    predict,
)
from scaling.law_report import format_laws
from scaling.law_slices import frontier_law, isoflop, largest_horizon_law
from scaling.report import rows_of
from scaling.sweep import shape_of
from scaling.trials import settings_of
from training.model_size import model_size

COUNTS = {"all": "N with embedding and readout", "body": "N without embedding and readout"}
FEWEST_STEPS = 100  # of a model that is recommended
# Settings that a forecast depends on, besides SAME
USED = set("""width depth head_dim window position norm qk_norm mlp mlp_ratio tied bias vocab_size batch
    batch_start batch_ramp_tokens steps""".split())
SAME = ("dataset", "tokenizer", "val_fraction", "context", "init_from")  # of all rows: others change the loss


@dataclass(frozen=True)
class Trial:
    """What the laws need of a row. `group`: the settings that are not of size, horizon or seed."""
    config: Config
    group: str
    parameters: dict  # {count: number}, one for each of COUNTS
    tokens: int
    flops: float
    loss: float  # nats a token


def count_parameters(config):
    """{count: parameters} of a config whose vocab_size is known, and its training FLOPs a token."""
    size = size_of_shape(shape_of(config))
    body = size.parameters - outer_parameters(shape_of(replace(config, depth=1)))
    return {"all": size.parameters, "body": body}, size.flops_per_token


size_of_shape = functools.cache(model_size)


@functools.cache
def outer_parameters(config):
    """Parameters in the embedding and the readout, which no depth changes."""
    with torch.device("meta"):
        model = GPT(config)
    return sum(p.numel() for name, p in model.named_parameters() if role_of(name) in ("embedding", "readout"))


def vocab_size_of(config, parameters):
    """Rows of the embedding of a model with this number of parameters."""
    if config.vocab_size is not None:
        return config.vocab_size
    one, two = (size_of_shape(shape_of(replace(config, vocab_size=size))).parameters for size in (1, 2))
    return round(1 + (parameters - one) / (two - one))


def read_trial(row):
    config = Config(**settings_of(row["config"]))
    sized = replace(config, vocab_size=vocab_size_of(config, row["parameters"]))
    numbers, _ = count_parameters(sized)
    free = dict.fromkeys(("width", "depth", "steps", "batch", "seed"))
    group = json.dumps(asdict(config) | free, sort_keys=True)
    return Trial(sized, group, numbers, config.tokens_before(config.steps), row["flops"], row["val_loss"])


def finished_trials(folders):
    """The Trials of all rows that have a loss."""
    rows = [row for folder in folders for row in rows_of(folder)]
    return [read_trial(row) for row in rows if not row["diverged"] and row["flops"] > 0]


def read_folders(folders):
    """The Trials of all finished rows. Raises UserError where there are none, or they are of different
    data."""
    trials = finished_trials(folders)
    if not trials:
        raise UserError(f"laws: every trial of {', '.join(folders)} diverged or failed; takes finished ones")
    for name in SAME:
        values = sorted({str(getattr(trial.config, name)) for trial in trials})
        if len(values) > 1:
            raise UserError(f"laws: got rows with {name} {' and '.join(values[:3])}; takes one for all")
    return best_settings(trials)


def best_settings(trials):
    """Of each pair of model and tokens, the trials of the setting with the lowest mean loss over its
    seeds."""
    pairs = {}
    for trial in trials:
        pairs.setdefault((trial.config.width, trial.config.depth, trial.tokens), {}).setdefault(
            trial.group, []).append(trial)
    found = []
    for _, groups in sorted(pairs.items()):
        found += min(groups.values(), key=lambda group: np.mean([trial.loss for trial in group]))
    return found


def columns(trials, count):
    """Arrays (N, D, FLOPs, loss), a number for each trial."""
    numbers = [(trial.parameters[count], trial.tokens, trial.flops, trial.loss) for trial in trials]
    return np.array(numbers, dtype=float).T


def fit_all(trials):
    """{(form, count): {law, laws, constants, backtest}}; laws: of the bootstrap. Raises UserError."""
    N, D, _, _ = columns(trials, "all")
    pairs, needed = len({*zip(N, D, strict=True)}), len(FORMS["chinchilla"].starts) + 2
    if pairs < needed or len(set(N)) < 3 or len(set(D)) < 3:
        raise UserError(f"laws: got {len(set(N))} sizes and {len(set(D))} numbers of tokens, {pairs} pairs; "
                        f"takes 3 of each and {needed} pairs at least, such as a sweep over "
                        "width,depth=64x2,128x4,256x8 steps=100..1600")
    fits = {}
    for form in FORMS:
        for count in COUNTS:
            N, D, flops, loss = columns(trials, count)
            law = fit_law(form, N, D, loss)
            laws = bootstrap(law, N, D)
            fits[form, count] = {"law": law, "laws": laws, "constants": constants_with_intervals(law, laws),
                                 "backtest": backtest(form, N, D, loss, flops)}
    return fits


def choose(fits):
    """The (form, count) that missed the larger trials by the least when fitted to the smaller ones; where too
    few are smaller for one of the forms, the one with the least residuals."""
    def residuals(fit):
        return fit["law"].sigma_cell + fit["law"].sigma_seed

    error = missed_by if all_tested(fits) else residuals
    return min(fits, key=lambda key: error(fits[key]))


def analyze(trials):
    """Everything that the rows say, as a dict of JSON's types but for `fits`, of fit_all()."""
    fits = fit_all(trials)
    chosen = choose(fits)
    N, D, flops, loss = columns(trials, chosen[1])
    law = fits[chosen]["law"]
    sigma = float(np.hypot(law.sigma_cell, law.sigma_seed))
    return {"trials": len(trials), "flops": [flops.min(), flops.max()], "chosen": chosen, "fits": fits,
            "points": [{"width": trial.config.width, "depth": trial.config.depth, "steps": trial.config.steps,
                        "seed": trial.config.seed, "tokens": trial.tokens, "flops": trial.flops,
                        "parameters": trial.parameters, "loss": trial.loss,
                        "residual": trial.loss - float(law.loss(trial.parameters[chosen[1]], trial.tokens))}
                       for trial in trials],
            "isoflop": isoflop(N, D, flops, loss, sigma),
            "frontier": frontier_law(flops, loss, sigma), "longest": largest_horizon_law(N, D, loss, sigma)}


def forecast(report, config):
    """The prediction for one training of `config`, whose vocab_size is known: a dict with `loss` and
    `interval` of the chosen law, and the losses by the `others`."""
    numbers, flops_per_token = count_parameters(config)
    tokens = config.tokens_before(config.steps)
    beyond = flops_per_token * tokens / report["flops"][1]
    apart = np.std([fit["law"].loss(numbers[count], tokens) for (_, count), fit in report["fits"].items()])
    predicted = {}
    for (form, count), fit in report["fits"].items():
        # Beyond the fit the noise of the rows says little: two of two such forecasts missed by more
        missed = np.hypot(apart, missed_by(fit)) if beyond > 1 else 0.0
        predicted[form, count] = predict(fit["law"], fit["laws"], numbers[count], tokens, missed)
    loss, interval = predicted[report["chosen"]]
    return {"width": config.width, "depth": config.depth, "steps": config.steps, "batch": config.batch,
            "context": config.context, "parameters": numbers, "tokens": tokens,
            "flops": flops_per_token * tokens, "beyond": beyond,
            "loss": loss, "interval": interval,
            "others": {f"{form}, {count}": value for (form, count), (value, _) in predicted.items()}}


def allocate(report, trials, flops):
    """forecast() of the best shape and steps for a budget of training FLOPs. Shapes grow as those of the
    rows do: log depth is a line in log width. Raises UserError where none fits."""
    base = trials[-1].config
    slope, offset = depth_line(trials)
    law, count = report["fits"][report["chosen"]]["law"], report["chosen"][1]
    candidates, heads = [], 1
    while True:
        width = heads * base.head_dim
        config = replace(base, width=width, depth=max(1, round(np.exp(offset + slope * np.log(width)))))
        numbers, flops_per_token = count_parameters(config)
        steps = base.steps_for(flops / flops_per_token)
        if steps < FEWEST_STEPS:
            break
        loss = float(law.loss(numbers[count], base.tokens_before(steps)))
        candidates.append((loss, replace(config, steps=steps)))
        heads = max(heads + 1, round(1.1 * heads))
    if not candidates:
        raise UserError(f"flops: got {flops:g}, takes enough for {FEWEST_STEPS} steps of the smallest model")
    return forecast(report, min(candidates, key=lambda pair: pair[0])[1])


def depth_line(trials):
    """(slope, offset) of log depth over log width."""
    widths, depths = np.log(sorted({(trial.config.width, trial.config.depth) for trial in trials})).T
    if np.ptp(widths) == 0:
        return 0.0, depths.mean()
    return np.polyfit(widths, depths, 1)


def target_config(words, trials):
    """The Config that is to be predicted, with the vocabulary of the rows. Raises UserError."""
    reject_unused(words, SETTINGS.keys() - USED - {*SAME}, "a forecast")
    target, known = configure(words), trials[-1].config
    for name in SAME:
        wanted, actual = getattr(target, name), getattr(known, name)
        if wanted != actual:
            raise UserError(f"{name}: got {wanted}, but the laws are of rows with {actual}; "
                            f"takes --{name}={actual}")
    return replace(target, vocab_size=target.vocab_size or known.vocab_size)


def measured_rows(report, trials):
    """[forecast() with what was `measured`] for each shape and horizon of rows that the fit did not see."""
    pairs = {}
    for trial in trials:
        pairs.setdefault(replace(trial.config, seed=0), []).append(trial.loss)
    return [forecast(report, config) | {"measured": float(np.mean(losses)), "seeds": len(losses)}
            for config, losses in pairs.items()]


def parse_flops(text):
    """Raises UserError."""
    try:
        flops = float(text)
    except ValueError:
        flops = -1.0
    if not 0 < flops < np.inf:
        raise UserError(f"flops: got {text}, takes a number above 0, such as 1e18")
    return flops


def read_questions(options, words, trials):
    """What the command line asks for: a list of functions of the report that return a list of forecasts. Read
    before the fit, which takes a while. Raises UserError."""
    questions = []
    if options["flops"]:
        flops = parse_flops(options["flops"])
        questions.append(lambda report: [allocate(report, trials, flops)])
    if options["target"]:
        target = target_config([options["target"], *words], trials)
        questions.append(lambda report: [forecast(report, target)])
    if options["measured"]:
        unseen = read_folders([options["measured"]])
        for name in SAME:
            wanted, actual = getattr(unseen[0].config, name), getattr(trials[0].config, name)
            if wanted != actual:
                raise UserError(f"measured: got rows with {name}={wanted}, takes {name}={actual}")
        questions.append(lambda report: measured_rows(report, unseen))
    return questions


def to_json(report):
    """`report` as text: the fits by name, without the bootstrap's laws."""
    fits = {f"{form}, {count}": {"constants": fit["constants"], "sigma_cell": fit["law"].sigma_cell,
                                 "sigma_seed": fit["law"].sigma_seed, "backtest": fit["backtest"]}
            for (form, count), fit in report["fits"].items()}
    return json.dumps(report | {"fits": fits, "chosen": ", ".join(report["chosen"])}, indent=1,
                      default=lambda value: np.asarray(value).tolist())


@command
def main(argv):
    words_of_transfer = [word for word in argv if word != "--transfer"]
    if words_of_transfer != argv:
        from scaling.transfer import main_of_rows
        return main_of_rows(words_of_transfer)
    options, _, words = parse_options(argv, {"to": "", "flops": "", "target": "", "measured": ""}, __doc__)
    folders = [word for word in words if not word.startswith("-")]
    settings = [word for word in words if word.startswith("-")]
    if not folders or settings and not options["target"]:
        raise UserError("laws: takes folders of trials.csv, --flops, --target, --measured, --to, --transfer")
    trials = read_folders(folders)
    questions = read_questions(options, settings, trials)
    report = analyze(trials)
    report["forecasts"] = [its for ask in questions for its in ask(report)]
    folder = options["to"] or folders[0]
    make_folder(folder)
    write_text(os.path.join(folder, "laws.json"), to_json(report))
    print(format_laws(report, COUNTS), *law_figures.draw_laws(report, folder), sep="\n")
    return 0
