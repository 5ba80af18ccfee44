"""What the READMEs say in numbers, as functions of the rows in this folder: python -m scaling claims

To claim a number: write a function that yields the text, marked with the document in which it must stand, and
copy what `python -m scaling claims NAME` prints. It may stand anywhere there; line breaks do not matter.
tests/test_claims.py fails where a text is not in its document, or a number with decimals is in no text."""

import csv
import functools
import json
import re
from pathlib import Path

import numpy as np

from scaling import law_fits, report, scatter
from scaling.forecast import forecast
from scaling.law_trials import columns, read_trial
from scaling.rows import group
from scaling.trials import parse_row, read_trials, settings_of
from scaling.verify import pooled_noise

HERE = Path(__file__).parent
CLAIMS = {}  # {name: (document, function)}


def claims_of(document):
    """Decorates a function whose texts must stand in `document`."""
    def add(function):
        CLAIMS[function.__name__] = document, function
        return function
    return add


README, RESULTS, BENCHMARKS = "README.md", "scaling/results/README.md", "scaling/BENCHMARKS.md"


# What is read of the rows

@functools.cache
def rows_of(folder):
    """The trials in a folder, each with its settings and facts in the columns."""
    rows = read_trials(str(HERE / folder))
    return [row | settings_of(row["config"]) for row in rows]


@functools.cache
def rows_in(name):
    """rows_of() a single file."""
    with open(HERE / name, encoding="utf-8", newline="") as file:
        rows = [parse_row(row, name) for row in csv.DictReader(file)]
    return [row | settings_of(row["config"]) for row in rows]


def select(folder, **settings):
    """The rows of a folder that have these settings."""
    return [row for row in rows_of(folder) if all(row[name] == value for name, value in settings.items())]


@functools.cache
def ladders(folder, swept="", shipped=None, base=None, axis=""):
    return report.analyze(rows_of(folder), swept, base, axis, shipped)["ladders"]


def losses(rows):
    return [row["val_loss"] for row in sorted(rows, key=lambda row: row["seed"])]


def mean(rows):
    return float(np.mean(losses(rows)))


@functools.cache
def lines_of(name):
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in (HERE / name).read_text("utf-8").splitlines()]


def loss_of(name, what, *files, **settings):
    """The loss in a file of recipe/ of what was trained with these files and settings."""
    found = [line["val_loss"] for line in lines_of(f"recipe/{name}.jsonl")
             if line["what"] == what and tuple(line.get("files", ())) == files
             and line.get("settings", {}) == settings]
    assert len(found) == 1, (name, what, files, settings)
    return found[0]


def peers(name, what, *numbers, plain=False):
    """[loss] of a peer in a file of recipe/ at each lr or factor."""
    found = {line.get("lr", line.get("factor")): line["val_loss"] for line in lines_of(f"recipe/{name}.jsonl")
             if line["what"] == what and ("smear" in line) == plain}
    return [found[number] for number in numbers]


def near(x, y):
    """Whether two numbers are the same but for rounding."""
    return abs(np.log2(x / y)) < 1e-6


# How tables are written

def table(*rows):
    """A table of Markdown; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def sizes_of(ladder):
    """{size: what the report says of it} of a ladder."""
    axis = next(iter(ladder["sizes"][0]))
    return {size[axis]: size for size in ladder["sizes"]}


def drift_of(ladder):
    low, high = ladder["drift_interval"]
    return f"{ladder['drift']:+.2f} ± {(high - low) / 2:.2f}"


def slope_from(ladder, smallest):
    """Octaves that the best lr moves for each doubling, from the size `smallest` on."""
    best = {size: found["log2_best"] for size, found in sizes_of(ladder).items() if size >= smallest}
    return np.polyfit(np.log2([*best]), [*best.values()], 1)[0]


def best_of(size):
    """The best log2 lr of a size."""
    if size["edge"]:
        return "at the edge"
    half = (size["interval"][1] - size["interval"][0]) / 2
    return f"{size['log2_best']:.2f}" + (f" ± {half:.2f}" if np.isfinite(half) else "")


def nats(cost):
    return "–" if cost is None else f"{cost:.3f}"


def rows_of_ladder(name, ladder, shipped=""):
    """The rows of a table of sizes: the best rates and the drift; the lowest losses; what the shipped rate
    costs and, in brackets, at most; what the base's refitted best costs."""
    sizes = ladder["sizes"]
    rows = [[f"{name}: best log2 lr", *map(best_of, sizes), drift_of(ladder)],
            ["lowest loss", *(f"{size['loss']:.3f}" for size in sizes), ""],
            [f"{shipped} costs; best of {ladder['base']:g}", *map(costs_of, sizes), ""]]
    if not shipped:
        rows[2] = [f"best of {ladder['base']:g} costs", *(nats(size["regret"]) for size in sizes), ""]
    return rows


def costs_of(size):
    bound = size["most"] if size["most"] is not None else np.nan
    at_most = f" (≤ {bound:.3f})" if np.isfinite(bound) else ""
    return f"{nats(size['cost'])}{at_most}; {nats(size['regret'])}"


def ladder_table(axis, ladder, *rows):
    return table([axis, *(f"{size[axis]:g}" for size in ladder["sizes"]), "drift, octaves a doubling"], *rows)


def windows_of(ladder):
    return ", ".join(f"{drift:+.2f}" for drift in ladder["drift_by_window"].values())


SHIPPED = 2**-7.5  # the rate of config/gpt2_proxy.py


# Width

def one_run(width, rate, base=128):
    """Nats by which one run in μP at a rate beats one in the standard parametrization at rate / m, with two
    standard errors, as text."""
    means, variance = [], 0.0
    for name, lr in (("mup", rate), ("sp", rate * base / width)):
        rows = [row for row in select("width", parametrization=name, width=width) if near(row["lr"], lr)]
        means.append(mean(rows))
        variance += ladders("width", shipped=SHIPPED)[name]["noise"]**2 / len(rows)
    return f"{means[1] - means[0]:+.3f} ± {2 * np.sqrt(variance):.3f}"


@claims_of(RESULTS)
def width():
    mup, sp = (ladders("width", shipped=SHIPPED)[name] for name in ("mup", "sp"))
    yield ladder_table("width", mup, *rows_of_ladder("μP", mup, "2^-7.5"), *rows_of_ladder("standard", sp))
    yield f"{windows_of(mup)} under μP, {windows_of(sp)} in the standard parametrization"
    gap = sizes_of(mup)[64]["fitted_loss"] - sizes_of(sp)[64]["fitted_loss"]
    yield f"the standard parametrization, at its own best rate, is better by {gap:.3f}"
    widths = 256, 512, 1024, 2048
    yield table(["proxy's rate", *map(str, widths)], *(
        [f"2^{rate:g}", *(one_run(width, 2**rate) for width in widths)] for rate in (-7.5, -7.0)))


# Depth

@claims_of(RESULTS)
def depth():
    of = {"α = 0.8": ladders("depth", shipped=SHIPPED)["mup"],
          "α = 1": ladders("depth_alpha_1", shipped=SHIPPED)["mup"]}
    sp = ladders("depth", shipped=SHIPPED)["sp"]
    rows = [row for name, ladder in of.items() for row in rows_of_ladder(name, ladder, "2^-7.5")]
    yield ladder_table("depth", sp, *rows, *rows_of_ladder("standard", sp))
    drifts = [slope_from(ladder, 4) for ladder in of.values()]
    yield "{:+.2f} and {:+.2f} octaves a doubling".format(*drifts)
    at = [[mean([row for row in select(folder, parametrization="mup", depth=depth)
                 if near(row["lr"], SHIPPED)]) for depth in (8, 16, 32, 64)]
          for folder in ("depth", "depth_alpha_1")]
    worse = np.subtract(*at)
    yield f"α = 0.8 is the worse of the two from depth 8 on, by {min(worse):.3f} to {max(worse):.3f}"


@claims_of(RESULTS)
def depth_again():
    for folder in ("depth_longer", "depth_cpu"):
        drifts = [drift_of(ladders(folder)[f"mup, depth_alpha={alpha}"]) for alpha in ("0.8", "1.0")]
        yield "{} octaves a doubling with α = 0.8 and {} with α = 1".format(*drifts)


def narrow_depths():
    """The report of depths 4 to 32 at width 128, α = 0.8, from the rows of depth_variants and width."""
    same = {"embedding_lr_mult": 16.0, "beta1": 0.8, "grad_clip": 0.5, "weight_decay": 0.03, "steps": 600}
    rows = [row for row in rows_of("depth_variants") if row["width"] == 128 and row["depth_alpha"] == 0.8]
    at_4 = [row for row in select("width", parametrization="mup", width=128, **same)]
    return report.fit_sizes(report.losses_by_size("depth", "lr", [*rows, *at_4]), 4)


@claims_of(RESULTS)
def depth_at_another_width():
    ladder, found = narrow_depths()
    yield ", ".join(f"{size['log2_best']:.2f}" for size in found.values())
    yield f"{drift_of(ladder)} octaves a doubling; the best rate of depth 4 costs {nats(found[32]['regret'])}"


# The default block

@claims_of(RESULTS)
def default_block():
    for axis in ("width", "depth"):
        adamw = ladders(f"{axis}_default", shipped=2**-7.6)["mup"]
        muon = ladders(f"{axis}_muon", shipped=2**-5.53)["mup"]
        yield ladder_table(axis, adamw, *rows_of_ladder("AdamW", adamw, "2^-7.6"),
                           *rows_of_ladder("Muon", muon, "2^-5.53"))
    found = [ladders(f"{axis}_default", shipped=2**-7.6)["mup"] for axis in ("width", "depth")]
    yield "{} over width, {} over depth".format(*map(windows_of, found))
    yield f"do not exclude up to {max(size['most'] for ladder in found for size in ladder['sizes']):.3f}"


@claims_of(RESULTS)
def muon_over_width():
    small, large = ladders("width_muon", shipped=2**-5.53)["mup"], ladders("width_muon_batch")["mup"]
    fixed = ladders("width_muon_batch_fixed")["mup"]
    yield f"by {slope_from(small, 128):+.2f} octaves a doubling"
    yield f"by {drift_of(large)} with `base_batch` and {drift_of(fixed)} without"
    costs = [sizes_of(ladder)[1024]["regret"] for ladder in (large, small)]
    yield "costs {:.3f} nats at width 1024, where it costs {:.3f} on 32".format(*costs)


# Other axes and settings

@claims_of(RESULTS)
def other_axes():
    shown = []
    for axis, base in (("batch", 32), ("context", 256), ("steps", 600)):
        ladder = ladders(axis, base=base, shipped=SHIPPED)["mup"]
        sizes = ladder["sizes"]
        costs = [size["regret"] for size in sizes if size["regret"] is not None]
        shown.append([axis, ", ".join(f"{size[axis]:g}" for size in sizes),
                      ", ".join("flat" if size["edge"] else f"{size['log2_best']:.2f}" for size in sizes),
                      drift_of(ladder), nats(max(costs))])
    yield table(["axis", "sizes", "best log2 lr", "drift, octaves a doubling",
                 "the proxy's best costs at most"], *shown)


@claims_of(RESULTS)
def same_tokens():
    names = {"batch_tokens_gpu_longer": "19.7 M tokens, 4 seeds",
             "batch_tokens_longer": "4.9 M, width 64, CPU, 2 seeds"}
    rows, at_8 = [], []
    for folder, name in names.items():
        for base_batch, rule in (("32", "with"), ("None", "without")):
            ladder = ladders(folder, base=32)[f"mup, base_batch={base_batch}"]
            rows.append([f"{name}, {rule}", *map(best_of, ladder["sizes"]), drift_of(ladder)])
            at_8.append(sizes_of(ladder)[8]["fitted_loss"])
    yield ladder_table("batch", ladder, *rows)
    yield "({:.3f} instead of {:.3f} at batch 8)".format(*at_8)
    yield f"{drift_of(ladders('batch_tokens_gpu', base=32)['mup, base_batch=32'])} octaves a doubling"


@claims_of(RESULTS)
def other_settings():
    rows = []
    for name in ("logit_mult", "embedding_std", "hidden_std", "embedding_lr_mult", "readout_std"):
        ladder = ladders("other", swept=name)["mup"]
        rows.append([f"`{name}`", ", ".join(f"{2**size['log2_best']:.2g}" for size in ladder["sizes"]),
                     drift_of(ladder), nats(ladder["sizes"][1]["regret"])])
    yield table(["setting", "best at 128, at 512", "octaves a doubling",
                 "the proxy's best costs at 512"], *rows)
    schedules = ladders("other", swept="schedule")["mup"]["sizes"]
    assert schedules[0]["order"] == schedules[1]["order"]
    yield f"{', '.join(schedules[0]['order'])}: the same order"


# The journey

PRESETS = {"adamw": 2**-7.6, "muon": 0.0217}  # learning rates, which no search drew


def journey_of(text, optimizer):
    """{who: (its lr, losses at 128 x 4 on seeds 1 and 2, at 256 x 6, at the target)} of the shipped preset,
    of what was best at the proxy where that was trained at the target too, and of what was chosen."""
    rows = rows_of(f"journey/{text}-{optimizer}")
    targets = group((row["lr"], row) for row in select("journey/targets", dataset=text, optimizer=optimizer))
    middle = group((row["lr"], row["val_loss"]) for row in rows if row["width"] == 256)
    at_proxy = group((row["lr"], row["val_loss"]) for row in rows if (row["width"], row["depth"]) == (128, 4)
                     and row["seed"] in (1, 2))
    preset = next(lr for lr in targets if near(lr, PRESETS[optimizer]))
    chosen, *others = sorted(targets.keys() - {preset}, key=lambda lr: np.mean(middle[lr]))
    return {who: (lr, at_proxy[lr], middle[lr], losses(targets[lr]))
            for who, lr in (("preset", preset), ("chosen", chosen), *(("best", lr) for lr in others))}


TEXTS, OPTIMIZERS = ("manuals", "novels", "code"), {"adamw": "AdamW", "muon": "Muon"}
JOURNEYS = [(text, optimizer) for text in TEXTS for optimizer in OPTIMIZERS]


def gains(optimizer, who="preset", size=3):
    """[nats by which what was chosen is lower than `who`] on each text; size: 1 the proxy, 3 the target."""
    found = [journey_of(text, optimizer) for text in TEXTS]
    return [np.mean(each[who][size]) - np.mean(each["chosen"][size]) for each in found if who in each]


def forecast_of(text, optimizer):
    """(low, middle, high) for the target, of what was chosen: from 128 x 4, 256 x 6 and 384 x 8."""
    rows, lr = rows_of(f"journey/{text}-{optimizer}"), journey_of(text, optimizer)["chosen"][0]
    noise = pooled_noise([*group((row["lr"], row) for row in rows if row["width"] == 256).values()])
    of_size = group(((row["width"], row["depth"]), row["val_loss"]) for row in rows
                    if near(row["lr"], lr) and (row["width"] > 128 or row["seed"] in (1, 2)))
    points = [(*size, 0, np.mean(of_size[size]), noise[0] / np.sqrt(len(of_size[size])))
              for size in ((128, 4), (256, 6), (384, 8))]
    return forecast(points, (768, 12), *noise)


def nanochat(text):
    """[loss] at 2, 4 and 8 times its rates."""
    return [line["val_loss"] for line in lines_of("journey/nanochat.jsonl") if line["text"] == text]


@claims_of(RESULTS)
def journey():
    names = {"preset": "shipped preset", "chosen": "searched, chosen at 256 x 6",
             "best": "searched, best at the proxy"}
    rows = [["", "proxy 128 x 4", "at 256 x 6", "target, seeds 1 and 2", "forecast, 95%"]]
    for text, optimizer in JOURNEYS:
        low, middle, high = forecast_of(text, optimizer)
        for who, (_, *sizes, target) in journey_of(text, optimizer).items():
            rows.append([f"{text}, {OPTIMIZERS[optimizer]}: {names[who]}",
                         *(f"{np.mean(found):.3f}" for found in sizes),
                         ", ".join(f"{loss:.3f}" for loss in target),
                         f"{middle:.3f}, {low:.3f} to {high:.3f}" if who == "chosen" else ""])
        if optimizer == "muon":
            rows.append([f"{text}: nanochat, lr x 2, 4, 8", "", "",
                         ", ".join(f"{loss:.3f}" for loss in nanochat(text)), ""])
    yield table(*rows)
    adamw, muon = map(gains, OPTIMIZERS)
    yield f"lower by {np.mean(adamw + muon):.3f} nats in the mean over the six"
    for name, found in (("AdamW", adamw), ("Muon", muon)):
        yield "with {} {:+.3f}, {:+.3f} and {:+.3f} on manuals, novels and code".format(
            name, *(-gain for gain in found))
    yield "{:.3f} and {:.3f} nats lower than the proxy's best".format(*gains("adamw", "best"))
    behind = [np.mean(journey_of(text, "muon")["chosen"][3]) - min(nanochat(text)) for text in TEXTS]
    yield "{:.2f}, {:.2f} and {:.2f} nats below Muon's".format(*behind)
    apart = [[np.ptp(sizes[-1]) for which in JOURNEYS if which[1] == optimizer
              for sizes in journey_of(*which).values()] for optimizer in OPTIMIZERS]
    yield f"up to {max(apart[0]):.2f} nats with AdamW, {max(apart[1]):.2f} with Muon"


@claims_of(RESULTS)
def forecasts_of_targets():
    found = [(forecast_of(*which), journey_of(*which)["chosen"][3]) for which in JOURNEYS]
    held = [low < loss < high for (low, _, high), target in found for loss in target]
    widths = sorted(high - low for (low, _, high), _ in found)
    yield f"held {sum(held)} of {len(held)}"
    yield f"{widths[0]:.2f} to {widths[-2]:.2f} nats wide, {widths[-1]:.2f} for"
    errors = [abs(middle - np.mean(target)) for (_, middle, _), target in found]
    yield f"missed the mean of the two seeds by {min(errors):.3f} to {max(errors):.3f}"


@claims_of(RESULTS)
def settings_at_four_sizes():
    folders = [str(HERE / f"journey/settings/{name}") for name in ("proxy_half_context", "proxy", "256x6")]
    pairs = scatter.pair_folders(folders, str(HERE / "journey/settings/target"))
    yield table(["24 settings", "rank correlation with the target", "of the better half",
                 "what its favourite costs at the target"],
                *([name, f"{pair['rank']:+.2f}", f"{pair['rank_of_better_half']:+.2f}", f"{pair['cost']:.3f}"]
                  for name, pair in zip(("128 x 4, context 256", "128 x 4, context 512",
                                         "256 x 6, context 512"), pairs, strict=True)))


@claims_of(RESULTS)
def half_context():
    """Of candidates, which differ in hidden_std, each at the lr of most trainings: not those for lr alone."""
    found = {size: group((row["hidden_std"], row) for row in select("journey/half_context", width=size,
                         context=context) if row["seed"] in (1, 2) and not row["diverged"])
             for size, context in ((128, 256), (256, 512))}
    means = {}
    for which, rows in found[256].items():
        lr = max(group((row["lr"], row) for row in rows).items(), key=lambda item: len(item[1]))[0]
        means[which] = [mean([row for row in found[size][which] if row["lr"] == lr]) for size in (128, 256)]
    favourite, chosen = min(means.values()), min(means.values(), key=lambda pair: pair[1])
    yield f"ends at {favourite[1]:.3f} at 256 x 6, and `config/proxy.py` at {chosen[1]:.3f}"


# Forecasts

LADDERS = {"width, AdamW": ("width", "width_default", "width_embedding"),
           "width, Muon": ("width_muon", "width_muon_batch", "width_muon_batch_fixed"),
           "depth, AdamW": ("depth", "depth_alpha_1", "depth_default", "depth_longer", "depth_cpu"),
           "depth, Muon": ("depth_muon",), "width and depth together": ("laws", "laws_cpu")}


def settings_ladders(folder):
    """[{(width, depth): losses of its seeds}] of a folder's trials in μP, for each setting."""
    found = {}
    for row in rows_of(folder):
        settings = json.loads(row["config"])
        size = settings.pop("width"), settings.pop("depth")
        settings.pop("seed")
        if row["parametrization"] == "mup" and not row["diverged"]:
            found.setdefault(json.dumps(settings), {}).setdefault(size, []).append(row["val_loss"])
    return found.values()


@functools.cache
def forecasts(kind):
    """(held, size of the interval, error) of each forecast: each size of a ladder, from those of at most 0.3
    of its blocks' parameters, three at least, with up to two seeds each."""
    found = []
    for ladder in (ladder for folder in LADDERS[kind] for ladder in settings_ladders(folder)):
        for (width, depth), measured in ladder.items():
            points = [(*size, 0, np.mean(of_size[:2]), 0.01 / np.sqrt(len(of_size[:2])))
                      for size, of_size in ladder.items() if size[1] * size[0]**2 <= 0.3 * depth * width**2]
            if len(points) > 2:
                low, middle, high = forecast(points, (width, depth), 0.01, 5)
                found += [(low < loss < high, high - low, abs(loss - middle)) for loss in measured[:2]]
    return np.array(found).T


@claims_of(RESULTS)
def forecasts_within_the_rows():
    rows = []
    for kind, folders in LADDERS.items():
        held, size, error = forecasts(kind)
        names = ", ".join(f"`{folder}`" for folder in folders)
        rows.append([f"{kind}: {names}", str(len(held)), f"{held.mean():.0%}", f"{np.median(size):.3f}",
                     f"{np.sqrt(np.mean(error**2)):.3f}"])
    yield table(["ladders", "forecasts of a loss", "95% interval held", "its median size", "rms error"],
                *rows)


# Recipes of others

@claims_of(RESULTS)
def recipe():
    rates, factors = (3e-4, 6e-4, 1.2e-3), (2, 4, 8)
    texts = "novels", "linux"
    shown = {"nanoGPT, lr 3e-4, 6e-4, 1.2e-3": [peers(text, "nanogpt", *rates) for text in texts],
             "nanochat without value embeddings and smear, lr x 2, 4, 8": [
                 peers(text, "nanochat", *factors, plain=True) for text in texts],
             "nanochat, lr x 2, 4, 8; 20% more parameters": [
                 peers(text, "nanochat", *factors) for text in texts],
             "`config/gpt2_proxy.py`": of_both("config/gpt2_proxy.py"),
             "`config/proxy.py` (AdamW)": of_both("config/proxy.py"),
             "`config/muon.py`": of_both("config/muon.py"),
             "`config/muon.py`, heads of 128": of_both("config/muon.py", head_dim=128)}
    yield table(["trained with", "novels", "Linux's documentation"], *(
        [name, *(", ".join(f"{loss:.3f}" for loss in losses) for losses in columns)]
        for name, columns in shown.items()))
    yield f"{loss_of('linux', 'ours', 'config/proxy.py', head_dim=128):.3f}"
    yield f"{peers('novels-h200', 'nanogpt', 6e-4)[0]:.3f}"
    yield f"{peers('novels-h200', 'nanochat', 4, plain=True)[0]:.3f}"


def of_both(*files, **settings):
    """[[loss]] on the novels and on Linux's documentation."""
    return [[loss_of(name, "ours", *files, **settings)] for name in ("novels-h200", "linux")]


@claims_of(BENCHMARKS)
def time_to_nanogpts_loss():
    compiled, plain, *ours = lines_of("recipe/time.jsonl")
    for line in (compiled, plain):
        yield f"{line['val_loss']:.3f} after {line['seconds']:.1f} s"
    for line in (ours[0], ours[3]):
        yield f"`{line['run']}` is below that after {line['seconds']:.1f} s, at step {line['step']}"
        assert line["val_loss"] < compiled["val_loss"]


def retuned_losses(optimizer, text, lr, *seeds):
    """The losses of the draw of a search in recipe/ whose lr is nearest, on these seeds."""
    rows = rows_in(f"recipe/trials-{optimizer}-{text}.csv")
    drawn = min((row["lr"] for row in rows), key=lambda other: abs(np.log(other / lr)))
    return losses([row for row in rows if row["lr"] == drawn and row["seed"] in seeds])


@claims_of(RESULTS)
def retuned():
    texts = "stdlib", "docs"
    yield "{:.3f} and {:.3f} (means of four seeds)".format(*(
        np.mean(retuned_losses("adamw", text, PRESETS["adamw"], 0, 1, 11, 12)) for text in texts))
    yield "{:.3f} and {:.3f} on one seed".format(*(
        np.mean(retuned_losses("muon", text, PRESETS["muon"], 11)) for text in texts))
    draws = [row for row in rows_in("recipe/trials-muon-stdlib.csv") if row["seed"] == 0]
    best = min(draws, key=lambda row: row["val_loss"])
    [again] = retuned_losses("muon", "stdlib", best["lr"], 11)
    yield f"{best['val_loss']:.3f} on the seed that it was found with, and {again:.3f}"


# Laws

@functools.cache
def law_of(folder, form, count):
    """A law of laws.py, fitted to the rows of a folder."""
    trials = [read_trial(row) for row in read_trials(str(HERE / folder))]
    columns = np.array([(trial.parameters[count], trial.tokens, trial.loss) for trial in trials]).T
    return law_fits.fit_law(form, *columns)


@functools.cache
def law_json(folder):
    """What python -m scaling laws wrote: it has the intervals, of 30 seconds of bootstrap."""
    return json.loads((HERE / folder / "laws.json").read_text("utf-8"))


def constant_of(folder, form, name, count="body"):
    """A constant of a law with its interval, as text: refitted here, and the interval of laws.json."""
    value, (low, high) = law_json(folder)["fits"][f"{form}, {count}"]["constants"][name]
    assert np.isclose(value, law_of(folder, form, count).constants()[name], rtol=1e-3), (folder, form, name)
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


@claims_of(RESULTS)
def laws():
    for form, names in (("chinchilla", ("E", "alpha", "beta")), ("kaplan", ("alpha_N", "alpha_D")),
                        ("kaplan_floor", ("E", "alpha_N", "alpha_D"))):
        yield ", ".join(constant_of("laws", form, name) for name in names)
        yield f"C^{constant_of('laws', form, 'N_opt_exponent')}"
        yield f"C^{constant_of('laws', form, 'N_opt_exponent', 'all')}"
    isoflop = law_json("laws")["isoflop"]
    yield "C^{:.2f} [{:.2f}, {:.2f}]".format(isoflop["exponent"], *isoflop["interval"])


def sealed(folder):
    """(forecast, low, high, by each law) of a forecast.txt, written before the target was trained."""
    text = (HERE / folder / "forecast.txt").read_text("utf-8")
    pattern = r"^ +loss ([\d.]+) \[([\d.]+), ([\d.]+)\]; by each law: (.*)"
    loss, low, high, others = re.search(pattern, text, re.MULTILINE).groups()
    return float(loss), float(low), float(high), dict(re.findall(r"(\w+, \w+) ([\d.]+)", others))


@claims_of(RESULTS)
def forecasts_that_missed():
    rows = []
    for folder in ("laws", "laws_cpu"):
        loss, low, high, others = sealed(folder)
        [measured] = losses(rows_of(f"{folder}_target"))
        rows.append([f"`{folder}`", f"{loss:.3f} [{low:.3f}, {high:.3f}]", f"{measured:.3f}",
                     f"{measured - loss:+.3f}", f"{float(others['chinchilla, body']):.3f}"])
    yield table(["rows", "forecast, 95%", "measured, one run", "missed by", "Chinchilla's form said"], *rows)


@claims_of(RESULTS)
def forms_after_the_fact():
    """Each form's backtest and its forecast by laws.json, N without and with embedding and readout."""
    names = {"chinchilla": "Chinchilla's", "kaplan": "Kaplan's", "kaplan_floor": "Kaplan's and a floor"}
    rows = [["rows", "form", "misses larger trials by", "says of the target", "measured is off by"]]
    for folder in ("laws", "laws_cpu"):
        report = law_json(folder)
        [target] = report["forecasts"]
        for form, name in names.items():
            keys = [f"{form}, {count}" for count in ("body", "all")]
            missed = [report["fits"][key]["backtest"] for key in keys]
            off = [target["measured"] - target["others"][key] for key in keys]
            rows.append([f"`{folder}`", name, ", ".join(rms(one) if one else "–" for one in missed),
                         ", ".join(f"{target['others'][key]:.3f}" for key in keys),
                         ", ".join(f"{nats:+.3f}" for nats in off)])
        yield f"{target['loss']:.3f} [{target['interval'][0]:.3f}, {target['interval'][1]:.3f}]"
        collapse = report["collapse"]
        yield f"differ by {collapse['apart']:.1%}, seeds by {collapse['seeds']:.1%}"
    yield table(*rows)
    loss, (low, high), above = target["on_frontier"]
    yield f"{loss + above:.3f} [{low + above:.3f}, {high + above:.3f}]"


def rms(numbers):
    return f"{np.sqrt(np.mean(np.square(numbers))):.3f}"


@claims_of(RESULTS)
def backtest_from_a_fifth():
    trials = [read_trial(row) for row in read_trials(str(HERE / "laws_cpu"))]
    missed = []
    for form, count in (("kaplan_floor", "all"), ("kaplan", "body")):
        N, D, flops, loss = columns(trials, count)
        missed.append(rms(law_fits.backtest(form, N, D, loss, flops, share=0.2)))
    yield "{} nats with a floor against {}".format(*missed)


@claims_of(RESULTS)
def plane():
    best = {}
    for row in rows_of("plane"):
        name = row["parametrization"]
        found = row["val_loss"], round(float(np.log2(row["lr"])), 1)
        best[name] = min(best.get(name, found), found)
    yield f"within {max(best.values())[0] - min(best.values())[0]:.2f} nats"
    yield f"{best['mup'][0]:.3f} for μP and {best['plane_0_0'][0]:.3f} for SP"
    assert min(best, key=best.get) == "plane_0_1"
    yield f"are best here, {best['plane_0_1'][0]:.3f}"
    assert best["mup"][1] == best["plane_0_1"][1] == -7.6


@claims_of(RESULTS)
def shapes():
    """Speeds are of shapes.json: no row has them."""
    rows = []
    for folder, equal in (("shapes", "FLOPs"), ("shapes_parameters", "parameters")):
        found = group((row["depth"], row) for row in rows_of(folder))
        tuned = {row["depth"]: row["val_loss"] for row in rows_of(f"{folder}/finetuned")}
        rows += [[f"equal {equal}", *(f"{mean(found[depth]):.3f}" for depth in sorted(found))],
                 ["after finetuning", *(f"{tuned[depth]:.3f}" for depth in sorted(found))]]
    speeds = [shape["tokens_per_second"] / 1e6 for shape in
              json.loads((HERE / "shapes/shapes.json").read_text("utf-8"))["shapes"]]
    yield table(["depth", *(f"{depth:g}" for depth in sorted(found))], *rows,
                ["million tokens/s at equal FLOPs", *(f"{speed:.1f}" for speed in speeds)])


@claims_of(RESULTS)
def transfer():
    found = json.loads((HERE / "transfer/transfer.json").read_text("utf-8"))["exponents"]
    for name in ("alpha", "beta"):
        value, (low, high) = found[name]
        yield f"{value:.2f} [{low:.2f}, {high:.2f}]"


# History

@claims_of(RESULTS)
def story():
    """Targets of 2048 x 16 with settings that earlier searches found, against their best control."""
    found = []
    for folder, alpha, rate in (("story", 0.8, -7.33), ("story_defaults_rounds", 1.0, -8.5),
                                ("story_defaults_random", 1.0, -6.5)):
        rows = [row for row in rows_of(folder) if row["width"] == 2048 and row["steps"] == 600]
        mup = [row for row in rows if row["parametrization"] == "mup" and row["depth_alpha"] == alpha
               and abs(np.log2(row["lr"]) - rate) < 0.01]
        control = group((row["lr"], row) for row in rows if row["parametrization"] == "sp")
        found.append(f"{mean(mup):.3f} against {min(map(mean, control.values())):.3f}")
    yield ", ".join(found)
    rows = rows_of("story")
    spent = sum(row["flops"] for row in rows if row["width"] == 128)
    yield f"{spent / max(row['flops'] for row in rows):.2f} of the target's cost"


@claims_of(RESULTS)
def searches():
    def of(name):
        return sorted(map(mean, group((row["lr"], row) for row in rows_in(f"search/trials-{name}.csv")
                                      if row["seed"] > 7000).values()))
    before, (*fresh, preset) = of("before"), of("fresh")
    yield f"{before[0]:.3f} to {before[-1]:.3f}"
    yield " and ".join(f"{loss:.3f}" for loss in fresh)
    yield f"{preset:.3f}"


@claims_of(RESULTS)
def decay():
    """lr x decay x steps, which says how much the decay can do."""
    yield "{:.2f} with `config/gpt2_proxy.py` and {:.2f} with `config/proxy.py`".format(*(
        max(row["lr"] * row["weight_decay"] * row["steps"] for row in rows_of(folder) if near(row["lr"], lr))
        for folder, lr in (("width", SHIPPED), ("width_default", 2**-7.6))))


# The front page

@functools.cache
def speeds():
    """{what: number} of speed.csv, measured by the command beside it."""
    with open(HERE / "speed.csv", encoding="utf-8", newline="") as file:
        return {row["what"]: float(row["value"]) for row in csv.DictReader(file)}


@claims_of(README)
def front_page():
    mup, sp = (ladders("width", shipped=SHIPPED)[name] for name in ("mup", "sp"))
    best = [size["log2_best"] for size in mup["sizes"]]
    yield f"within {max(best) - min(best):.1f} octaves from width 64 to 2048"
    yield f"costs at most {max(size['cost'] for size in mup['sizes']):.3f} nats"
    best = [sizes_of(sp)[width]["log2_best"] for width in (128, 2048)]
    yield f"at width 2048 it is {2 ** (best[0] - best[1]):.0f} times lower than at width 128"
    yield f"out/proxy: validation loss {speeds()['proxy']:.4f} nats per token"


@claims_of(README)
def front_page_of_targets():
    """The table of targets: each peer at its best rate."""
    best = [[min(peers(text, "nanogpt", 3e-4, 6e-4, 1.2e-3)) for text in ("novels", "linux")],
            *(np.ravel(of_both(f"config/{name}.py")) for name in ("proxy", "muon")),
            *([min(peers(text, "nanochat", 2, 4, 8, plain=plain)) for text in ("novels", "linux")]
              for plain in (True, False))]
    for name, losses in zip(("novels", "Linux's documentation"), np.transpose(best), strict=True):
        yield " | ".join([f"| {name}", *(f"{loss:.2f}" for loss in losses)]) + " |"


@claims_of(README)
def front_page_of_searches():
    adamw, muon = gains("adamw"), gains("muon")
    yield "{:.2f}, {:.2f} and {:.2f} nats lower with AdamW".format(*sorted(adamw))
    yield f"with Muon level ({-max(muon):+.2f} to {-min(muon):+.2f})"
    at_proxy = gains("adamw", size=1) + gains("muon", size=1)
    yield f"{min(at_proxy):.2f} to {max(at_proxy):.2f} nats at the proxy"
    found = [(forecast_of(*which), journey_of(*which)["chosen"][3]) for which in JOURNEYS]
    errors = [abs(middle - np.mean(target)) for (_, middle, _), target in found]
    yield f"off by at most {max(errors):.2f} nats"


@claims_of(README)
def front_page_of_laws():
    exponents = [constant_of("laws", *which) for which in (("kaplan", "N_opt_exponent"),
                                                            ("chinchilla", "N_opt_exponent", "all"))]
    kaplan, chinchilla = (text.split()[0] for text in exponents)
    yield f"C^{chinchilla} to C^{kaplan}"
    missed = [losses(rows_of(f"{folder}_target"))[0] - sealed(folder)[0] for folder in ("laws", "laws_cpu")]
    yield "missed by {:.2f} and {:.2f} nats".format(*missed)


@claims_of(README)
def front_page_of_speeds():
    speed = speeds()
    blocks, whole = (speed[f"default block {how}"] / speed["nanogpt"] for how in ("by blocks", "as one"))
    yield f"{blocks:.2f} times as fast as nanoGPT, {whole:.2f} times with `--compile=model`"
    yield f"Two GPUs train {speed['two GPUs'] / speed['one GPU']:.2f} times as fast as one"
    yield f"{speed['sampling']:,.0f} tokens/s, transformers {speed['sampling by transformers']:.0f}"


@claims_of(README)
def front_page_of_limits():
    axes = {"batch": 32, "context": 256, "steps": 600}
    drifts = [ladders(axis, base=base)["mup"]["drift"] for axis, base in axes.items()]
    yield "{:+.2f}, {:+.2f} and {:+.2f} octaves a doubling".format(*drifts)
    yield f"by {narrow_depths()[0]['drift']:.2f} octaves a doubling"
    gap = sizes_of(ladders("width", shipped=SHIPPED)["mup"])[64]["fitted_loss"] - sizes_of(
        ladders("width", shipped=SHIPPED)["sp"])[64]["fitted_loss"]
    yield f"beats μP by {gap:.2f} nats"
    small, large = ladders("width_muon", shipped=2**-5.53)["mup"], ladders("width_muon_batch")["mup"]
    yield f"falls by {-small['drift']:.2f} octaves a doubling"
    costs = [sizes_of(ladder)[1024]["regret"] for ladder in (small, large)]
    yield "costs {:.3f} nats on 32 sequences a step, {:.3f} on 128".format(*costs)
    gains = [one_run(width, SHIPPED) for width in (256, 2048)]
    yield "{} to {} nats".format(*(gain.split()[0].removeprefix("+") for gain in gains))
    costs = [size["cost"] for size in ladders("depth", shipped=SHIPPED)["mup"]["sizes"]]
    yield f"{min(costs):.3f} to {max(costs):.3f}"
