"""What the READMEs say in numbers, as functions of the rows in this folder: python -m scaling claims

To claim a number: write a function that yields the text, marked with the document in which it must stand, and
copy what `python -m scaling claims NAME` prints. It may stand anywhere there; line breaks do not matter.
tests/test_claims.py fails where a text is not in its document, or a number with decimals is in no text."""

import csv
import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scaling import law_fits, report, scatter
from scaling.fits import rank_interval
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
DEMONSTRATIONS = "scaling/results/DEMONSTRATIONS.md"


# What is read of the rows

@functools.cache
def rows_of(name):
    """The trials in a folder, or in one file, with their settings in the columns."""
    path = HERE / name
    if path.is_dir():
        rows = read_trials(str(path))
    else:
        rows = [parse_row(row, name) for row in csv.DictReader(path.read_text("utf-8").splitlines())]
    return [row | settings_of(row["config"]) for row in rows]


def select(name, **settings):
    """The rows of rows_of() that have these settings."""
    return [row for row in rows_of(name) if all(row[name] == value for name, value in settings.items())]


@functools.cache
def ladder_of(folder, name="mup", **options):
    """What the report says of a ladder in a folder."""
    return report.analyze(rows_of(folder), **options)["ladders"][name]


def ladder_from(smallest, axis, rows, swept="lr"):
    """(ladder, {size: what is found there}) of the report of `rows`, from the size `smallest` on."""
    rows = [row for row in rows if row[axis] >= smallest]
    return report.fit_sizes(report.losses_by_size(axis, swept, rows), smallest)


def sizes_of(ladder):
    """{size: what the report says of it} of a ladder."""
    axis = next(iter(ladder["sizes"][0]))
    return {size[axis]: size for size in ladder["sizes"]}


def losses(rows):
    return [row["val_loss"] for row in sorted(rows, key=lambda row: row["seed"])]


def mean(rows):
    return float(np.mean(losses(rows)))


@functools.cache
def read_json(name):
    """The contents of a .json file, or the rows of a .jsonl file."""
    text = (HERE / name).read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)


def near(x, y):
    """Whether two numbers are the same but for rounding."""
    return abs(np.log2(x / y)) < 1e-6


def at_rate(rows, lr):
    return [row for row in rows if near(row["lr"], lr)]


# How numbers and tables are written

def table(*rows):
    """A table of Markdown; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def write(values, form=".3f"):
    """Numbers with commas between them; a dash for None."""
    return ", ".join("–" if value is None else format(value, form) for value in values)


def with_interval(value, low, high, form=".3f"):
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def with_error(value, error, digits=3):
    """A difference and two standard errors, or a drift and half its interval."""
    return f"{value:+.{digits}f} ± {error:.{digits}f}"


def drift_of(ladder):
    low, high = ladder["drift_interval"]
    return with_error(ladder["drift"], (high - low) / 2, digits=2)


def windows_of(ladder):
    return write(ladder["drift_by_window"].values(), "+.2f")


def best_of(size):
    """The best log2 lr of a size."""
    if size["edge"]:
        return "at the edge"
    half = (size["interval"][1] - size["interval"][0]) / 2
    return f"{size['log2_best']:.2f}" + (f" ± {half:.2f}" if np.isfinite(half) else "")


def costs_of(size):
    bound = size["most"] if size["most"] is not None else np.nan
    at_most = f" (≤ {bound:.3f})" if np.isfinite(bound) else ""
    return f"{write([size['cost']])}{at_most}; {write([size['regret']])}"


def rows_of_ladder(name, ladder, shipped=""):
    """The rows of a table of sizes: the best rates and the drift; the lowest losses; what the shipped rate
    costs and, in brackets, at most; what the base's refitted best costs."""
    sizes, base = ladder["sizes"], f"best of {ladder['base']:g}"
    costs = [f"{base} costs", *(write([size["regret"]]) for size in sizes), ""]
    if shipped:
        costs = [f"{shipped} costs; {base}", *map(costs_of, sizes), ""]
    return [[f"{name}: best log2 lr", *map(best_of, sizes), drift_of(ladder)],
            ["lowest loss", *(write([size["loss"]]) for size in sizes), ""], costs]


def ladder_table(axis, sizes, *rows):
    return table([axis, *(f"{size:g}" for size in sizes), "drift, octaves a doubling"], *rows)


# How to read the page

@claims_of(RESULTS)
def repeated_tokens():
    """Of the novels' 15.5 M tokens, in the folders that the page names: no others' runs are as long."""
    names = [path.parent.name for path in HERE.glob("*/trials.csv")]
    longest = {name: max(row["batch"] * row["context"] * row["steps"] for row in rows_of(name))
               for name in names}
    assert {name for name, tokens in longest.items() if tokens > 15.5e6} == {
        "batch", "context", "steps", "depth_longer", "batch_tokens_gpu_longer", "batch_tokens_adam"}
    more, most = (longest[name] / 15.5e6 for name in ("depth_longer", "steps"))
    yield f"{more:.1f} times, those of 4,800 steps {most:.1f} times"


@claims_of(RESULTS)
def texts():
    """The preparations of the novels, by the hash of their tokens, which older rows have not."""
    for tokens, names in {"None": ("width", "depth", "batch", "context", "steps", "other"),
                          "d772": ("width_default", "width_muon", "depth_default", "depth_muon", "laws"),
                          "8371": ("laws_cpu",),
                          "e63f": ("journey/novels-adamw", "journey/novels-muon")}.items():
        found = {json.loads(row["config"]).get("tokens") for name in names for row in rows_of(name)}
        assert {str(of_rows)[:4] for of_rows in found} == {tokens}
        yield f"{', '.join(f'`{name}`' for name in names)}: {tokens.lower()}"


@claims_of(RESULTS)
def decay():
    """lr x decay x steps, which says how much the decay can do."""
    for file, folder, lr in (("gpt2_proxy", "width", SHIPPED), ("proxy", "width_default", 2**-7.6)):
        found = max(row["weight_decay"] * row["steps"] for row in at_rate(rows_of(folder), lr)) * lr
        yield f"{found:.2f} with `config/{file}.py`"


# The journey

SHIPPED = 2**-7.5  # the rate of config/gpt2_proxy.py
PRESETS = {"adamw": 2**-7.6, "muon": 0.0217}  # learning rates, which no search drew
TEXTS, OPTIMIZERS = ("manuals", "novels", "code"), {"adamw": "AdamW", "muon": "Muon"}
JOURNEYS = [(text, optimizer) for text in TEXTS for optimizer in OPTIMIZERS]


class Losses(NamedTuple):
    """The learning rate of some settings, and their losses on the seeds that were trained at each size."""
    lr: float
    proxy: list  # 128 x 4; seeds 1 and 2, which no draw used
    middle: list  # 256 x 6
    target: list  # 768 x 12


@functools.cache
def journey_of(text, optimizer):
    """{who: Losses} of the shipped preset, of what was chosen, and of what was best at the proxy where that
    is another and was trained at the target too."""
    rows = rows_of(f"journey/{text}-{optimizer}")
    targets = group((row["lr"], row) for row in select("journey/targets", dataset=text, optimizer=optimizer))
    middle = group((row["lr"], row["val_loss"]) for row in rows if row["width"] == 256)
    proxy = group((row["lr"], row["val_loss"]) for row in rows if (row["width"], row["depth"]) == (128, 4)
                  and row["seed"] in (1, 2))
    preset = next(lr for lr in targets if near(lr, PRESETS[optimizer]))
    searched = sorted(targets.keys() - {preset}, key=lambda lr: np.mean(middle[lr]))
    return {who: Losses(lr, proxy[lr], middle[lr], losses(targets[lr]))
            for who, lr in zip(("preset", "chosen", "favourite"), [preset, *searched], strict=False)}


def difference(text, optimizer, to="preset"):
    """(what was chosen less another at the target, nats; two standard errors). A difference of means of two
    seeds has the noise of one training, pooled over the settings that were trained there."""
    found = journey_of(text, optimizer)
    variances = [np.var(each.target, ddof=1) for each in found.values()]
    return np.mean(found["chosen"].target) - np.mean(found[to].target), 2 * np.sqrt(np.mean(variances))


def forecast_of(text, optimizer):
    """(low, middle, high) for the target, of what was chosen: from 128 x 4, 256 x 6 and 384 x 8."""
    rows, lr = rows_of(f"journey/{text}-{optimizer}"), journey_of(text, optimizer)["chosen"].lr
    noise = pooled_noise([*group((row["lr"], row) for row in rows if row["width"] == 256).values()])
    of_size = group(((row["width"], row["depth"]), row["val_loss"]) for row in rows
                    if near(row["lr"], lr) and (row["width"] > 128 or row["seed"] in (1, 2)))
    points = [(*size, 0, np.mean(of_size[size]), noise[0] / np.sqrt(len(of_size[size])))
              for size in ((128, 4), (256, 6), (384, 8))]
    return forecast(points, (768, 12), *noise)


@functools.cache
def targets_and_forecasts():
    """Arrays (low, middle, high, losses of the two seeds), an entry for each of JOURNEYS."""
    forecasts = np.array([forecast_of(*which) for which in JOURNEYS]).T
    return *forecasts, np.array([journey_of(*which)["chosen"].target for which in JOURNEYS])


def nanochat(text):
    """[loss] at 2, 4 and 8 times its rates."""
    return [line["val_loss"] for line in read_json("journey/nanochat.jsonl") if line["text"] == text]


@claims_of(RESULTS)
def journey():
    rows = [["", "proxy: shipped, searched", "256 x 6: shipped, searched", "target: shipped",
             "target: searched", "difference", "forecast, 95%", "nanochat, lr x 2, 4, 8"]]
    for text, optimizer in JOURNEYS:
        name = f"{text}, {OPTIMIZERS[optimizer]}"
        shipped, chosen, *favourites = journey_of(text, optimizer).values()
        low, middle, high = forecast_of(text, optimizer)
        rows.append([name, write(map(np.mean, (shipped.proxy, chosen.proxy))),
                     write(map(np.mean, (shipped.middle, chosen.middle))), write(shipped.target),
                     write(chosen.target), with_error(*difference(text, optimizer)),
                     with_interval(middle, low, high), write(nanochat(text)) if optimizer == "muon" else ""])
        rows += [[f"{name}: the proxy's favourite", write([np.mean(of.proxy)]), write([np.mean(of.middle)]),
                  "", write(of.target), "", "", ""] for of in favourites]
    yield table(*rows)


@claims_of(RESULTS)
def differences_at_the_target():
    of_six, errors = np.array([difference(*which) for which in JOURNEYS]).T
    yield f"in the mean of the six, {with_error(of_six.mean(), np.linalg.norm(errors) / 6)}"
    overruled = [with_error(*difference(text, "adamw", "favourite")) for text in ("manuals", "novels")]
    yield "by {} and {} on manuals and novels".format(*overruled)
    behind = [np.mean(journey_of(text, "muon")["chosen"].target) - min(nanochat(text)) for text in TEXTS]
    yield "{:.2f}, {:.2f} and {:.2f} nats below Muon's".format(*behind)
    apart = [max(np.ptp(of.target) for text in TEXTS for of in journey_of(text, optimizer).values())
             for optimizer in OPTIMIZERS]
    yield "up to {:.2f} nats with AdamW, {:.2f} with Muon".format(*apart)


@claims_of(RESULTS)
def forecasts_of_targets():
    low, middle, high, targets = targets_and_forecasts()
    held = (low[:, None] < targets) & (targets < high[:, None])
    yield f"held {held.sum()} of {held.size}"
    *sizes, largest = sorted(high - low)
    yield f"{sizes[0]:.2f} to {sizes[-1]:.2f} nats wide, {largest:.2f} for"
    errors = abs(middle - targets.mean(axis=1))
    yield f"missed the mean of the two seeds by {min(errors):.3f} to {max(errors):.3f}"


# Folders of journey/: 24 settings on which text, by which optimizer
SETTINGS_OF = {"settings": "manuals, AdamW", "settings_novels": "novels, AdamW",
               "settings_code": "code, Muon"}


def pairs_of_settings(folder, *sizes):
    """How 24 settings at each of the sizes, folders in journey/FOLDER, agree with the target."""
    return scatter.pair_folders([str(HERE / "journey" / folder / size) for size in sizes],
                                str(HERE / "journey" / folder / "target"))


@claims_of(RESULTS)
def settings_at_four_sizes():
    sizes = {"proxy_half_context": "128 x 4, context 256", "proxy": "128 x 4", "256x6": "256 x 6"}
    rows = []
    for folder, name in SETTINGS_OF.items():
        own = [size for size in sizes if (HERE / "journey" / folder / size).exists()]
        for size, pair in zip(own, pairs_of_settings(folder, *own), strict=True):
            ranks = [with_interval(pair[rank], *rank_interval(pair[rank], count), "+.2f")
                     for rank, count in (("rank", 24), ("rank_of_better_half", 12))]
            rows.append([name, sizes[size], *ranks, write([pair["cost"]])])
    yield table(["24 settings", "size", "rank correlation with the target", "of the better half",
                 "what its favourite costs at the target"], *rows)
    shipped = journey_of("code", "muon")["preset"]
    own = [row["val_loss"] for row in rows_of("journey/settings_code/proxy")
           if near(row["lr"], 2 * shipped.lr)]  # the same, written for four times the batch
    yield "end at {:.2f}, {:.2f} or {:.2f}".format(*sorted([*shipped.proxy, *own]))


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
        rows.append([f"{kind}: {names}", str(len(held)), f"{held.mean():.0%}", write([np.median(size)]),
                     rms(error)])
    yield table(["ladders", "forecasts of a loss", "95% interval held", "its median size", "rms error"],
                *rows)


def rms(numbers):
    return f"{np.sqrt(np.mean(np.square(numbers))):.3f}"


# Recipes of others

def losses_of_ours(file, **settings):
    """The losses, on the novels and on Linux's documentation, of what was trained with these settings."""
    same = {"what": "ours", "files": [file], "settings": settings}
    return [[line["val_loss"] for line in read_json(f"recipe/{text}.jsonl") if same.items() <= line.items()]
            for text in ("novels-h200", "linux")]


def losses_of_peer(what, *numbers, plain=False, texts=("novels", "linux")):
    """The losses of a peer on the texts, at each lr or factor."""
    found = []
    for text in texts:
        lines = [line for line in read_json(f"recipe/{text}.jsonl")
                 if line["what"] == what and ("smear" in line) == plain]
        at = {line.get("lr", line.get("factor")): line["val_loss"] for line in lines}
        found.append([at[number] for number in numbers])
    return found


NANOGPT, NANOCHAT = ("nanogpt", 3e-4, 6e-4, 1.2e-3), ("nanochat", 2, 4, 8)


@claims_of(RESULTS)
def recipe():
    shown = {"nanoGPT, lr 3e-4, 6e-4, 1.2e-3": losses_of_peer(*NANOGPT),
             "nanochat without value embeddings and smear, lr x 2, 4, 8": losses_of_peer(
                 *NANOCHAT, plain=True),
             "nanochat, lr x 2, 4, 8; 20% more parameters": losses_of_peer(*NANOCHAT),
             "`config/gpt2_proxy.py`": losses_of_ours("config/gpt2_proxy.py"),
             "`config/proxy.py` (AdamW)": losses_of_ours("config/proxy.py"),
             "`config/muon.py`": losses_of_ours("config/muon.py"),
             "`config/muon.py`, heads of 128": losses_of_ours("config/muon.py", head_dim=128)}
    yield table(["trained with", "novels", "Linux's documentation"], *(
        [name, *map(write, of_texts)] for name, of_texts in shown.items()))
    yield f"ends at {write(losses_of_ours('config/proxy.py', head_dim=128)[1])} on Linux's documentation"
    [[nanogpt]] = losses_of_peer("nanogpt", 6e-4, texts=["novels-h200"])
    [[plain]] = losses_of_peer("nanochat", 4, plain=True, texts=["novels-h200"])
    yield f"nanoGPT ends at {nanogpt:.3f} and nanochat's plain model at {plain:.3f}"


@claims_of(BENCHMARKS)
def time_to_nanogpts_loss():
    compiled, plain, *ours = read_json("recipe/time.jsonl")
    for line in (compiled, plain):
        yield f"{line['val_loss']:.3f} after {line['seconds']:.1f} s"
    for line in (ours[0], ours[3]):
        yield f"`{line['run']}` is below that after {line['seconds']:.1f} s, at step {line['step']}"
        assert line["val_loss"] < compiled["val_loss"]


# Width

def one_run(width, rate, base=128):
    """Nats by which one run in μP at a rate beats one in the standard parametrization at rate / m, with two
    standard errors."""
    of = {"mup": at_rate(select("width", parametrization="mup", width=width), rate),
          "sp": at_rate(select("width", parametrization="sp", width=width), rate * base / width)}
    errors = [of_width(name)["noise"] / np.sqrt(len(rows)) for name, rows in of.items()]
    return mean(of["sp"]) - mean(of["mup"]), 2 * np.hypot(*errors)


def of_width(name):
    return ladder_of("width", name, shipped=SHIPPED)


def gap_at_64():
    """Nats by which the standard parametrization is better at width 64, each side at its fitted best."""
    ladders = of_width("mup"), of_width("sp")
    mup, sp = (sizes_of(ladder)[64] for ladder in ladders)
    errors = [ladder["noise"] / np.sqrt(ladder["sizes"][0]["seeds"]) for ladder in ladders]
    return mup["fitted_loss"] - sp["fitted_loss"], 2 * np.hypot(*errors)


@claims_of(RESULTS)
def width():
    mup, sp = of_width("mup"), of_width("sp")
    yield ladder_table("width", sizes_of(mup), *rows_of_ladder("μP", mup, "2^-7.5"),
                       *rows_of_ladder("standard", sp))
    yield f"{windows_of(mup)} under μP, {windows_of(sp)} in the standard parametrization"
    yield "is better by {:.3f} ± {:.3f}".format(*gap_at_64())
    widths = 256, 512, 1024, 2048
    yield table(["proxy's rate", *map(str, widths)], *(
        [f"2^{rate:g}", *(with_error(*one_run(width, 2**rate)) for width in widths)] for rate in (-7.5, -7)))


# The default block

def default_ladders(axis):
    """The ladders of config/proxy.py and config/muon.py."""
    return ladder_of(f"{axis}_default", shipped=2**-7.6), ladder_of(f"{axis}_muon", shipped=2**-5.53)


@claims_of(RESULTS)
def default_block():
    of_adamw = []
    for axis in ("width", "depth"):
        adamw, muon = default_ladders(axis)
        yield ladder_table(axis, sizes_of(adamw), *rows_of_ladder("AdamW", adamw, "2^-7.6"),
                           *rows_of_ladder("Muon", muon, "2^-5.53"))
        of_adamw.append(adamw)
    yield "{} over width, {} over depth".format(*map(windows_of, of_adamw))
    yield f"do not exclude up to {max(size['most'] for ladder in of_adamw for size in ladder['sizes']):.3f}"


def costs_of_muon():
    """What the best rate of width 128 costs at width 1024, on 32 and on 128 sequences a step."""
    return [sizes_of(ladder_of(folder))[1024]["regret"] for folder in ("width_muon", "width_muon_batch")]


@claims_of(RESULTS)
def muon_over_width():
    yield f"moves by {drift_of(ladder_from(128, 'width', rows_of('width_muon'))[0])} octaves a doubling"
    of_batch = ladder_of("width_muon_batch"), ladder_of("width_muon_batch_fixed")
    yield "by {} with `base_batch` and {} without".format(*map(drift_of, of_batch))
    yield "costs {1:.3f} nats at width 1024, where it costs {0:.3f} on 32".format(*costs_of_muon())


# Depth

@claims_of(RESULTS)
def depth():
    mup, mup_1 = (ladder_of(folder, shipped=SHIPPED) for folder in ("depth", "depth_alpha_1"))
    sp = ladder_of("depth", "sp", shipped=SHIPPED)
    yield ladder_table("depth", sizes_of(sp), *rows_of_ladder("α = 0.8", mup, "2^-7.5"),
                       *rows_of_ladder("α = 1", mup_1, "2^-7.5"), *rows_of_ladder("standard", sp))


def narrow_depths():
    """ladder_from() depth 4 to 32 at width 128, α = 0.8, from the rows of depth_variants and width."""
    same = {"embedding_lr_mult": 16.0, "beta1": 0.8, "grad_clip": 0.5, "weight_decay": 0.03, "steps": 600}
    at_4 = select("width", parametrization="mup", width=128, **same)
    return ladder_from(4, "depth", [*select("depth_variants", width=128, depth_alpha=0.8), *at_4])


@claims_of(RESULTS)
def depth_elsewhere():
    from_4 = [drift_of(ladder_from(4, "depth", select(folder, parametrization="mup"))[0])
              for folder in ("depth", "depth_alpha_1")]
    longer, cpu = ([drift_of(ladder_of(folder, f"mup, depth_alpha={alpha}")) for alpha in ("0.8", "1.0")]
                   for folder in ("depth_longer", "depth_cpu"))
    narrow, found = narrow_depths()
    yield table(["drift, octaves a doubling", "α = 0.8", "α = 1"], ["depths 4 to 64, as above", *from_4],
                ["2,400 steps: `depth_longer`, 2 seeds, 1 of α = 1 from depth 32 on", *longer],
                ["width 64, context 64, depths 2 to 16, on a CPU: `depth_cpu`", *cpu],
                ["width 128, depths 4 to 32: `depth_variants`, `width`; the best rate of depth 4 costs "
                 f"{found[32]['regret']:.3f} nats at depth 32", drift_of(narrow), "–"])


# Other axes and settings

PROXY_AT = {"batch": 32, "context": 256, "steps": 600}


@claims_of(RESULTS)
def other_axes():
    rows = []
    for axis, base in PROXY_AT.items():
        ladder = ladder_of(axis, base=base)
        sizes = sizes_of(ladder)
        best = ["flat" if size["edge"] else f"{size['log2_best']:.2f}" for size in sizes.values()]
        costs = [size["regret"] for size in sizes.values() if size["regret"] is not None]
        rows.append([axis, write(sizes, "g"), ", ".join(best), drift_of(ladder), write([max(costs)])])
    yield table(["axis", "sizes", "best log2 lr", "drift, octaves a doubling",
                 "the proxy's best costs at most"], *rows)


@claims_of(RESULTS)
def same_tokens():
    names = {"batch_tokens_gpu_longer": "19.7 M tokens, 4 seeds",
             "batch_tokens_longer": "4.9 M, width 64, CPU, 2 seeds"}
    found = {(folder, rule): ladder_of(folder, f"mup, base_batch={base_batch}", base=32)
             for folder in names for base_batch, rule in (("32", "with"), ("None", "without"))}
    yield ladder_table("batch", (8, 16, 32, 64, 128), *(
        [f"{names[folder]}, {rule}", *map(best_of, ladder["sizes"]), drift_of(ladder)]
        for (folder, rule), ladder in found.items()))
    pair = [found["batch_tokens_gpu_longer", rule] for rule in ("with", "without")]
    ends, reference = (sizes_of(ladder)[8]["fitted_loss"] for ladder in pair)
    error = 2 * np.hypot(*(ladder["noise"] / 2 for ladder in pair))  # of four seeds each
    yield f"{ends:.3f} instead of {reference:.3f} at batch 8, {with_error(ends - reference, error)}"
    yield f"{drift_of(ladder_of('batch_tokens_gpu', 'mup, base_batch=32', base=32))} octaves a doubling"


OTHERS = ("logit_mult", "embedding_std", "hidden_std", "embedding_lr_mult", "readout_std")


@claims_of(RESULTS)
def other_settings():
    rows = []
    for name in OTHERS:
        ladder = ladder_of("other", swept=name)
        best = write([2**size["log2_best"] for size in ladder["sizes"]], ".2g")
        rows.append([f"`{name}`", best, drift_of(ladder), write([ladder["sizes"][1]["regret"]])])
    yield table(["setting", "best at 128, at 512", "octaves a doubling",
                 "the proxy's best costs at 512"], *rows)
    small, large = ladder_of("other", swept="schedule")["sizes"]
    assert small["order"] == large["order"]
    yield f"{', '.join(small['order'])}: the same order"


@claims_of(RESULTS)
def size_of_heads():
    ladder, found = ladder_from(16, "head_dim", rows_of("head_dim"), "attention_mult")
    best = write([2**found[size]["log2_best"] for size in (16, 32, 64, 128)], ".2g")
    yield f"is {best} with heads of 16, 32, 64 and 128 channels"
    yield f"{drift_of(ladder)} octaves a doubling"


# Laws

FORMS = {"chinchilla": "Chinchilla's", "kaplan": "Kaplan's", "kaplan_floor": "Kaplan's and a floor"}


@functools.cache
def trials_of(folder):
    return [read_trial(row) for row in read_trials(str(HERE / folder))]


@functools.cache
def law_of(folder, form, count):
    """A law of laws.py, fitted to the rows of a folder."""
    N, D, _, loss = columns(trials_of(folder), count)
    return law_fits.fit_law(form, N, D, loss)


def constant_of(folder, form, name, count="body"):
    """A constant of a law with its interval, as text: refitted here, and the interval of laws.json."""
    value, interval = read_json(f"{folder}/laws.json")["fits"][f"{form}, {count}"]["constants"][name]
    assert np.isclose(value, law_of(folder, form, count).constants()[name], rtol=1e-3), (folder, form, name)
    return with_interval(value, *interval, ".2f")


@claims_of(RESULTS)
def laws():
    constants = {"E": "E", "alpha": "α", "beta": "β", "alpha_N": "α_N", "alpha_D": "α_D"}
    rows = []
    for form, names in (("chinchilla", ("E", "alpha", "beta")), ("kaplan", ("alpha_N", "alpha_D")),
                        ("kaplan_floor", ("E", "alpha_N", "alpha_D"))):
        shown = [f"{constants[name]} {constant_of('laws', form, name)}" for name in names]
        exponents = [constant_of("laws", form, "N_opt_exponent", count) for count in ("body", "all")]
        rows.append([FORMS[form], ", ".join(shown), *(f"C^{exponent}" for exponent in exponents)])
    isoflop = read_json("laws/laws.json")["isoflop"]
    exponent = with_interval(isoflop["exponent"], *isoflop["interval"], ".2f")
    yield table(["form", "constants", "best size", "with embedding and readout"], *rows,
                ["isoFLOP parabolas, corrected, of two budgets", "", "–", f"C^{exponent}"])


def sealed(folder):
    """((forecast, low, high), {law: its own}, measured) of a forecast.txt, written before the target was
    trained."""
    text = (HERE / folder / "forecast.txt").read_text("utf-8")
    pattern = r"^ +loss ([\d.]+) \[([\d.]+), ([\d.]+)\]; by each law: (.*)"
    *forecast, laws = re.search(pattern, text, re.MULTILINE).groups()
    [measured] = losses(rows_of(f"{folder}_target"))
    by_law = {law: float(loss) for law, loss in re.findall(r"(\w+, \w+) ([\d.]+)", laws)}
    return [*map(float, forecast)], by_law, measured


@claims_of(RESULTS)
def forecasts_that_missed():
    rows = []
    for folder in ("laws", "laws_cpu"):
        forecast, by_law, measured = sealed(folder)
        rows.append([f"`{folder}`", with_interval(*forecast), write([measured]),
                     f"{measured - forecast[0]:+.3f}", write([by_law["chinchilla, body"]])])
    yield table(["rows", "forecast, 95%", "measured, one run", "missed by", "Chinchilla's form said"], *rows)


@claims_of(DEMONSTRATIONS)
def forms_after_the_fact():
    """Each form's backtest and its forecast by laws.json, N without and with embedding and readout."""
    rows = [["rows", "form", "misses larger trials by", "says of the target", "measured is off by"]]
    for folder in ("laws", "laws_cpu"):
        report = read_json(f"{folder}/laws.json")
        [target] = report["forecasts"]
        for form, name in FORMS.items():
            keys = [f"{form}, {count}" for count in ("body", "all")]
            missed = [report["fits"][key]["backtest"] for key in keys]
            said = np.array([target["others"][key] for key in keys])
            rows.append([f"`{folder}`", name, ", ".join(rms(one) if one else "–" for one in missed),
                         write(said), write(target["measured"] - said, "+.3f")])
        yield with_interval(target["loss"], *target["interval"])
        yield f"differ by {report['collapse']['apart']:.1%}, seeds by {report['collapse']['seeds']:.1%}"
    yield table(*rows)
    loss, (low, high), above = target["on_frontier"]
    yield with_interval(loss + above, low + above, high + above)


@claims_of(DEMONSTRATIONS)
def backtest_from_a_fifth():
    missed = []
    for form, count in (("kaplan_floor", "all"), ("kaplan", "body")):
        N, D, flops, loss = columns(trials_of("laws_cpu"), count)
        missed.append(rms(law_fits.backtest(form, N, D, loss, flops, share=0.2)))
    yield "{} nats with a floor against {}".format(*missed)


# Demonstrations

@claims_of(DEMONSTRATIONS)
def plane():
    best = {}
    for row in rows_of("plane"):
        name = row["parametrization"]
        found = row["val_loss"], round(float(np.log2(row["lr"])), 1)
        best[name] = min(best.get(name, found), found)
    yield f"within {max(best.values())[0] - min(best.values())[0]:.2f} nats"
    yield f"{best['mup'][0]:.3f} for μP and {best['plane_0_0'][0]:.3f} for SP"
    assert min(best, key=best.get) == "plane_0_1"
    yield f"are lowest, {best['plane_0_1'][0]:.3f}"
    assert best["mup"][1] == best["plane_0_1"][1] == -7.6


@claims_of(DEMONSTRATIONS)
def shapes():
    """Speeds are of shapes.json: no row has them."""
    rows, errors = [], []
    for folder, equal in (("shapes", "FLOPs"), ("shapes_parameters", "parameters")):
        found = dict(sorted(group((row["depth"], row["val_loss"]) for row in rows_of(folder)).items()))
        tuned = {row["depth"]: row["val_loss"] for row in rows_of(f"{folder}/finetuned")}
        rows += [[f"equal {equal}", *(write([np.mean(pair)]) for pair in found.values())],
                 ["after finetuning", *(write([tuned[depth]]) for depth in found)]]
        errors.append(2 * np.sqrt(np.mean([np.var(pair, ddof=1) for pair in found.values()])))
    speeds = [shape["tokens_per_second"] / 1e6 for shape in read_json("shapes/shapes.json")["shapes"]]
    yield table(["depth", *(f"{depth:g}" for depth in found)], *rows,
                ["million tokens/s at equal FLOPs", *(f"{speed:.1f}" for speed in speeds)])
    yield "± {:.3f} at equal FLOPs, ± {:.3f} at equal parameters".format(*errors)


@claims_of(DEMONSTRATIONS)
def transfer():
    exponents = read_json("transfer/transfer.json")["exponents"]
    for value, interval in (exponents["alpha"], exponents["beta"]):
        yield with_interval(value, *interval, ".2f")


# History

@claims_of(RESULTS)
def story():
    """Targets of 2048 x 16 with settings that earlier searches found, against their best control."""
    found = []
    for folder, alpha, rate in (("story", 0.8, -7.33), ("story_defaults_rounds", 1.0, -8.5),
                                ("story_defaults_random", 1.0, -6.5)):
        rows = select(folder, width=2048, steps=600)
        mup = [row for row in rows if row["parametrization"] == "mup" and row["depth_alpha"] == alpha
               and abs(np.log2(row["lr"]) - rate) < 0.01]
        control = group((row["lr"], row) for row in rows if row["parametrization"] == "sp")
        found.append(f"{mean(mup):.3f} against {min(map(mean, control.values())):.3f}")
    yield ", ".join(found)
    spent = sum(row["flops"] for row in select("story", width=128))
    yield f"{spent / max(row['flops'] for row in rows_of('story')):.2f} of the target's cost"


@claims_of(RESULTS)
def retuned():
    """The draw that was best on the seed that all were drawn on, and the same settings on another."""
    rows = rows_of("recipe/trials-muon-stdlib.csv")
    best = min((row for row in rows if row["seed"] == 0), key=lambda row: row["val_loss"])
    [again] = [row for row in rows if row["lr"] == best["lr"] and row["seed"] == 11]
    yield f"{best['val_loss']:.3f} on the seed that it was found with, and {again['val_loss']:.3f}"



# The front page

@functools.cache
def speeds():
    """{what: number} of speed.csv, measured by the command beside it."""
    lines = (HERE / "speed.csv").read_text("utf-8").splitlines()
    return {row["what"]: float(row["value"]) for row in csv.DictReader(lines)}


@claims_of(README)
def front_page():
    mup, sp = of_width("mup"), sizes_of(of_width("sp"))
    best = [size["log2_best"] for size in mup["sizes"]]
    yield f"within {max(best) - min(best):.1f} octaves from width 64 to 2048"
    cost, bound = (max(size[which] for size in mup["sizes"]) for which in ("cost", "most"))
    yield f"costs at most {cost:.3f} nats (by its interval, at most {bound:.3f})"
    octaves = sp[128]["log2_best"] - sp[2048]["log2_best"]
    yield f"at width 2048 it is {2**octaves:.0f} times lower than at width 128"
    yield f"out/proxy: validation loss {speeds()['proxy']:.4f} nats per token"


@claims_of(README)
def front_page_of_targets():
    """The table of targets: each peer at its best rate."""
    found = [losses_of_peer(*NANOGPT), losses_of_ours("config/proxy.py"), losses_of_ours("config/muon.py"),
             losses_of_peer(*NANOCHAT, plain=True), losses_of_peer(*NANOCHAT)]
    for i, name in enumerate(("novels", "Linux's documentation")):
        yield " | ".join([f"| {name}", *(f"{min(of_texts[i]):.2f}" for of_texts in found)]) + " |"


@claims_of(README)
def front_page_of_searches():
    adamw, muon = ([difference(text, optimizer)[0] for text in TEXTS] for optimizer in OPTIMIZERS)
    yield "{:.2f}, {:.2f} and {:.2f} nats lower with AdamW".format(*sorted(-gain for gain in adamw))
    yield f"Muon gained nothing: it ended between {-min(muon):.2f} lower and {max(muon):.2f} higher"
    found = [journey_of(*which) for which in JOURNEYS]
    at_proxy = [np.mean(of["preset"].proxy) - np.mean(of["chosen"].proxy) for of in found]
    yield f"better by {min(at_proxy):.2f} to {max(at_proxy):.2f} nats"
    _, middle, _, targets = targets_and_forecasts()
    yield f"off by at most {max(abs(middle - targets.mean(axis=1))):.2f} nats"
    apart = max(np.ptp(of.target) for text in TEXTS for of in journey_of(text, "adamw").values())
    yield f"two seeds of one target differ by up to {apart:.2f} nats"
    pairs = [pairs_of_settings(folder, "proxy", "256x6") for folder in SETTINGS_OF]
    proxy, larger = ([of_text[i]["rank_of_better_half"] for of_text in pairs] for i in range(2))
    yield "with the target's is {:+.2f}, {:+.2f} and {:+.2f} for the proxy".format(*proxy)
    yield "{:+.2f}, {:+.2f} and {:+.2f} for the larger size".format(*larger)
    costs = [[of_text[i]["cost"] for of_text in pairs] for i in range(2)]
    yield "at the target: {:.3f}, {:.3f} and {:.3f} nats above it".format(*costs[0])
    yield "best at 256 channels and 6 blocks (right) {:.3f}, {:.3f} and {:.3f}".format(*costs[1])


@claims_of(README)
def front_page_of_laws():
    exponents = [constant_of("laws", *which).split()[0] for which in (
        ("chinchilla", "N_opt_exponent", "all"), ("kaplan", "N_opt_exponent"))]
    yield "C^{} to C^{}".format(*exponents)
    missed = [measured - forecast[0] for forecast, _, measured in map(sealed, ("laws", "laws_cpu"))]
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
    drifts = [ladder_of(axis, base=base)["drift"] for axis, base in PROXY_AT.items()]
    yield "{:+.2f}, {:+.2f} and {:+.2f} octaves a doubling".format(*drifts)
    yield f"by {narrow_depths()[0]['drift']:.2f} octaves a doubling"
    yield f"beats μP by {gap_at_64()[0]:.2f} nats"
    yield f"falls by {-default_ladders('width')[1]['drift']:.2f} octaves a doubling"
    yield "costs {:.3f} nats on 32 sequences a step, {:.3f} on 128".format(*costs_of_muon())
    yield "{:.3f} to {:.3f} nats".format(*(one_run(width, SHIPPED)[0] for width in (256, 2048)))
    costs = [size["cost"] for size in ladder_of("depth", shipped=SHIPPED)["sizes"]]
    yield f"{min(costs):.3f} to {max(costs):.3f}"
    costs = [ladder_of("other", swept=name)["sizes"][1]["regret"] for name in OTHERS]
    yield f"up to {max(costs):.3f} nats at width 512"
