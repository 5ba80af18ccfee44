"""What is pretraining worth? python -m scaling.transfer CONFIG width,depth=64x2,128x4 --finetune=DATASET

Trains each model on CONFIG's text; then on another one, DATASET, from those weights and from scratch, for
each number of --finetune_steps=8..2048, every token fresh. --finetune_lrs=2**-9..2**-7 tries these rates on
from the weights and takes the best; else 0.1, 0.3 and 1 times CONFIG's. --finetune_batch=N: sequences a step
there. Rows go to --out=DIR, which resumes; scaling.laws --transfer DIR reads them again.

Effective data transferred (Scaling Laws for Transfer, arXiv 2102.01293): D_T is how many more tokens of
DATASET a model from scratch needs to be as good as the pretrained one after D_F. It is fitted as k D_F^alpha
N^beta, N without embedding and readout; and the loss as Kaplan's law of N and D_F + D_T. Models from scratch
are looked up between their own runs: a pretrained model that is better than the longest of these has no D_T.
"""

import os
from dataclasses import replace

import numpy as np

from configure import UserError, configure
from data.prepare import prepare
from scaling import law_fits
from scaling.cli import command, make_folder, parse_options, parse_values, reject_unused, resumable
from scaling.figures import BESIDE, LOSS, load_pyplot, save, shades
from scaling.fits import interval
from scaling.law_report import label_loss
from scaling.law_trials import best_settings, finished_trials
from scaling.rows import write_report
from scaling.sweep import run_trials, torchrun_rank, trial_configs
from train import train

PAPER = "text to Python in arXiv 2102.01293: k 1.9e4, alpha 0.18, beta 0.38"
LR_MULTS = (0.1, 0.3, 1.0)
SEED_NOISE = 0.003  # of a loss, where no two seeds show it: what it is for small models of text
UNUSED = {"eval_every", "prompt", "samples", "sample_tokens", "temperature", "top_k"}


def pretrain(config, folder):
    """The run directory of a training of `config`, which is trained unless that was done before."""
    run = os.path.join(folder, f"{config.width}x{config.depth}")
    train(replace(config, out=run, eval_every=None, sample_tokens=0), quiet=True)
    return run


def finetuned(config, run, dataset):
    """`config` on the text `dataset`, in its own tokens, from the weights in `run` or, if None, scratch."""
    return replace(config, tokenizer=prepare(config), dataset=dataset, init_from=run)


def train_all(models, options, steps, lrs):
    """Rows of every model from scratch and from its pretrained weights, for each of `steps`, in the folder
    that `options` of the command line name. Raises UserError."""
    folder, batch = options["out"], options["finetune_batch"] or models[0].batch
    scratch, tuned = [], []
    for model in models:
        its = replace(finetuned(model, None, options["finetune"]), batch=batch)
        scratch += trial_configs(its, {"steps": steps})
    reject_failures(run_trials(scratch, folder, options["stack"]))
    for model in models:
        run = pretrain(model, os.path.join(folder, "pretrained"))
        its = replace(finetuned(model, run, options["finetune"]), batch=batch)
        tuned += trial_configs(its, {"steps": steps, "lr": lrs})
    reject_failures(run_trials(tuned, folder))


def reject_failures(rows):
    """Raises UserError with the reason where a trial failed: there is nothing to compare then."""
    for row in rows:
        if row["failure"]:
            raise UserError(f"out: the trial of width {row['width']:.0f}, depth {row['depth']:.0f} failed: "
                            f"{row['failure']}; the rows of others are kept")


def data_equivalent(tokens, losses, loss):
    """Tokens after which a model from scratch, whose losses after `tokens` are given, has this loss: between
    its runs in logs, nan beyond them."""
    log_losses = np.log(np.minimum.accumulate(losses))  # noise may let a longer run end higher
    if not log_losses[-1] <= np.log(loss) <= log_losses[0]:
        return np.nan
    return float(np.exp(np.interp(np.log(loss), log_losses[::-1], np.log(tokens)[::-1])))


def effective_data(scratch, tuned):
    """[{N, D_F, loss, scratch_loss, D_T}] of the trials; D_T is nan where it cannot be told."""
    curves = {}
    for (N, tokens), loss in cell_means(scratch).items():
        curves.setdefault(N, {})[tokens] = loss
    points = []
    for (N, D_F), loss in cell_means(tuned).items():
        curve, D_T = curves.get(N, {}), np.nan
        if curve:
            D_T = data_equivalent(np.array([*curve]), np.array([*curve.values()]), loss) - D_F
        points.append({"N": N, "D_F": D_F, "loss": loss, "D_T": D_T, "scratch_loss": curve.get(D_F, np.nan)})
    return points


def cell_means(trials):
    """{(N, tokens): mean loss} of Trials, sorted."""
    return law_fits.cell_means([(trial.parameters["body"], trial.tokens) for trial in trials],
                               [trial.loss for trial in trials])


def fit_transfer(points):
    """(k, alpha, beta) of D_T = k D_F^alpha N^beta by least squares in logs; nan for beta with one N. None
    where fewer than 4 points have a positive D_T."""
    usable = [point for point in points if point["D_T"] > 0]
    if len(usable) < 4 or len({point["D_F"] for point in usable}) < 2:
        return None
    N, D_F, D_T = np.array([[point[name] for name in ("N", "D_F", "D_T")] for point in usable]).T
    parts = [np.ones(len(N)), np.log(D_F)]
    several = len(set(N)) > 1
    if several:
        parts.append(np.log(N))
    found = np.linalg.lstsq(np.stack(parts, 1), np.log(D_T), rcond=None)[0]
    return np.exp(found[0]), found[1], found[2] if several else np.nan


def analyze(scratch, tuned):
    """{points, exponents, law, unified_error}. Raises UserError where rows of one kind are missing."""
    if not scratch or not tuned:
        raise UserError("laws: --transfer needs rows with init_from and rows without, such as those that "
                        "scaling.transfer leaves")
    known = [(trial.parameters["body"], trial.tokens, trial.loss) for trial in scratch]
    law = law_fits.fit_law("kaplan", *np.array(known, dtype=float).T)
    points = effective_data(scratch, tuned)
    fitted = fit_transfer(points)
    report = {"points": points, "scratch": known, "law": law.constants(), "exponents": None,
              "scratch_error": float(law.sigma_cell), "unified_error": None}
    if fitted is None:
        return report
    report["noise"] = float(law.sigma_seed or SEED_NOISE)
    drawn = bootstrap(scratch, tuned, report["noise"])
    report["exponents"] = {name: (float(value), interval(values)) for name, value, values
                           in zip(("k", "alpha", "beta"), fitted, drawn.T, strict=True)}
    k, alpha, beta = fitted
    N, D_F, loss = np.array([[point[name] for name in ("N", "D_F", "loss")] for point in points]).T
    predicted = law.loss(N, D_F + k * D_F**alpha * N ** np.nan_to_num(beta))
    report["unified_error"] = float(np.sqrt(np.mean((predicted - loss) ** 2)))
    return report


def bootstrap(scratch, tuned, noise):
    """Rows of (k, alpha, beta), as other seeds might have given them, with losses of this relative noise."""
    trials, fits = [*scratch, *tuned], []
    random, loss = np.random.default_rng(0), np.array([trial.loss for trial in trials])
    for _ in range(law_fits.DRAWS):
        losses = loss * np.exp(random.normal(0, noise, len(loss)))
        again = [replace(trial, loss=loss) for trial, loss in zip(trials, losses, strict=True)]
        fits.append(fit_transfer(effective_data(again[:len(scratch)], again[len(scratch):])))
    return np.array([fit for fit in fits if fit is not None])


def format_transfer(report):
    """The report, for people."""
    lines = [f"{'N':>12}{'D_F':>12}{'from scratch':>14}{'pretrained':>12}{'D_T':>12}"]
    for its in report["points"]:
        D_T = f"{its['D_T']:.3g}" if np.isfinite(its["D_T"]) else "-"
        lines.append(f"{its['N']:>12,}{its['D_F']:>12,}{its['scratch_loss']:>14.4f}{its['loss']:>12.4f}"
                     f"{D_T:>12}")
    usable = sum(its["D_T"] > 0 for its in report["points"])
    lines.append(f"D_T is known for {usable} of {len(report['points'])}: the others are better than the "
                 "longest run from scratch, or gain nothing")
    if report["exponents"] is None:
        lines.append("too few for a fit: train longer from scratch, by more --finetune_steps")
        return "\n".join(lines)
    text = ", ".join(f"{name} {value:.3g} [{low:.3g}, {high:.3g}]"
                     for name, (value, (low, high)) in report["exponents"].items())
    lines += [f"D_T = k D_F^alpha N^beta: {text}", f"  {PAPER}",
              "L = Kaplan's law of N and D_F + D_T misses the pretrained models by "
              f"{report['unified_error']:.4f} nats (root mean square), those from scratch by "
              f"{report['scratch_error']:.2%}"]
    return "\n".join(lines)


def draw_transfer_law(report, folder):
    """Writes transfer_law.png: losses against tokens, and D_T against D_F; returns its path."""
    pyplot = load_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.6))
    sizes = sorted({its["N"] for its in report["points"]})
    for N, color in zip(sizes, shades(len(sizes)), strict=True):
        own = [its for its in report["points"] if its["N"] == N]
        D_F = np.array([its["D_F"] for its in own])
        scratch = sorted((tokens, loss) for n, tokens, loss in report["scratch"] if n == N)
        left.plot(*zip(*scratch, strict=True), "o--", color=color, markersize=4, fillstyle="none")
        left.plot(D_F, [its["loss"] for its in own], "o-", color=color, markersize=4)
        D_T = np.array([its["D_T"] if its["D_T"] > 0 else np.nan for its in own])
        right.plot(D_F, D_T, "o", color=color, markersize=5, label=f"{N:,}")
        if report["exponents"]:
            k, alpha, beta = (report["exponents"][name][0] for name in ("k", "alpha", "beta"))
            right.plot(D_F, k * D_F**alpha * float(N) ** np.nan_to_num(beta), color=color, linewidth=1)
    left.set(xscale="log", xlabel="tokens of the second text", ylabel=LOSS,
             title="Pretrained (lines) and from scratch (dashed)")
    label_loss(left)
    for ax in (left, right):
        ax.xaxis.set_minor_formatter("")  # these overlap
    if any(its["D_T"] > 0 for its in report["points"]):
        right.set_yscale("log")
    right.set(xscale="log", xlabel="fine-tuning tokens D_F",
              ylabel="effective data transferred D_T, tokens",
              title="What pretraining is worth; lines: the fit")
    right.legend(title="parameters without\nembedding and readout", fontsize=10, **BESIDE)
    return save(figure, os.path.join(folder, "transfer_law.png"), pyplot)


def report_rows(folders, to):
    """Prints and writes the transfer law of the rows in `folders`. Raises UserError."""
    trials = finished_trials(folders)
    scratch = best_settings([trial for trial in trials if trial.config.init_from is None])
    tuned = best_settings([trial for trial in trials if trial.config.init_from is not None])
    report = analyze(scratch, tuned)
    write_report(report, to, "transfer.json")
    print(format_transfer(report), draw_transfer_law(report, to), sep="\n")


@command
def main(argv):
    defaults = {"out": "out/transfer", "finetune": "", "finetune_steps": "8..512", "finetune_lrs": "",
                "finetune_batch": 0, "stack": 1}
    options, axes, words = parse_options(argv, defaults, __doc__, takes_axes=True)
    reject_unused(words, UNUSED, "these trainings")
    config = configure(words)
    if not options["finetune"]:
        raise UserError("finetune must be the text that follows CONFIG's, got none; try --finetune=DATASET")
    if config.init_from is not None:
        raise UserError(f"init_from must be none, got {config.init_from}: this command pretrains")
    shapes = trial_configs(config, {names: parse_values(names, text) for names, text in axes.items()})
    lrs = [mult * config.lr for mult in LR_MULTS]
    if options["finetune_lrs"]:
        lrs = parse_values("lr", options["finetune_lrs"])
    steps = parse_values("steps", options["finetune_steps"])
    make_folder(options["out"])
    with resumable(options["out"]):
        train_all(shapes, options, steps, lrs)
    if torchrun_rank()[0] == 0:
        report_rows([options["out"]], options["out"])
