"""Does the proxy rank settings as the target does? python -m scaling.scatter DIR [DIR ...] [--base=SIZE]

Pairs the trials of the same settings at two sizes, proxy and target: rows of trials.csv, mean over seeds. The
proxy is the size at the base shape, or --base, or the smallest; each other size is a panel. --axis=NAME says
which axis the sizes are of, where several vary: in a grid the others are settings like any. Prints Spearman's
rank correlation with its 95% interval, over all pairs and over the better half by the proxy, and what the
proxy's favourite costs on the target. Trials whose losses do not compare, as those of two texts, are pairs of
their own. Draws scatter.png and .svg into DIR, or --to=DIR. The trials may be a sweep over width, or width
and depth together, and other settings, or searches at several widths.

With --target=DIR each folder is a proxy of its own and that one the target, so that proxies that differ in
more than one thing, as in depth and context, stand side by side: a panel for each.
"""

import json
import os

import numpy as np

from configure import UserError, names_in
from scaling import figures
from scaling.cli import command, make_folder
from scaling.fits import rank_correlation, rank_interval
from scaling.report import format_rank
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
)
from scaling.trials import FACTS, HASHES

FEWEST = 3  # pairs: of fewer there is no order to speak of


def split_clouds(rows):
    """{name: rows}: what differs in parametrization, in the text or in how it was measured is kept apart."""
    configs = settings_and_facts(rows)
    apart = [name for name in ("parametrization", *names_in("data"), *FACTS)
             if name in configs[0] and len(values_of(configs, name)) > 1]
    apart = [name for name in apart if name not in HASHES or not decide(apart, name, configs)]
    named = [", ".join(str(config[name]) if name == "parametrization" else f"{name}={config[name]}"
                       for name in apart) for config in configs]
    return dict(sorted(group(zip(named, rows, strict=True)).items()))


def losses_at(axis, rows):
    """{size: {other settings, as JSON: mean loss over the seeds}}; infinite where a trial diverged. What
    changes with the size by itself, as the steps of a sweep with --hold, is no other setting."""
    configs = settings_and_facts(rows)
    left_out = {*AXES, "seed"} - {*axes_beside(axis, AXES, configs)}
    by_size = {size: {} for size in sorted({config[axis] for config in configs})}
    losses = group(((config[axis], json.dumps({name: value for name, value in config.items()
                                               if name not in left_out})), loss_of(row))
                   for row, config in zip(rows, configs, strict=True))
    for (size, settings), found in losses.items():
        by_size[size][settings] = float(np.mean(found))
    return by_size


def pair_losses(losses, base):
    """[{base, size, proxy, target, rank, rank_of_better_half, cost}] for each size but `base`, where `proxy`
    and `target` are lists of losses of the same settings, FEWEST at least."""
    pairs = []
    for size, found in losses.items():
        shared = [key for key in losses[base] if key in found]
        if size == base or len(shared) < FEWEST:
            continue
        proxy, target = (np.array([of_size[key] for key in shared]) for of_size in (losses[base], found))
        if not np.isfinite(proxy).any() or not np.isfinite(target).any():
            continue
        better = proxy <= np.median(proxy)
        pairs.append({"base": base, "size": size, "proxy": proxy, "target": target,
                      "rank": rank_correlation(proxy, target),
                      "better_half": better.sum(),
                      "rank_of_better_half": rank_correlation(proxy[better], target[better]),
                      "cost": target[np.argmin(proxy)] - target.min()})
    return pairs


def pair_clouds(axis, rows, base):
    """pair_losses() of each of split_clouds(), each pair with the name of its `cloud`; the proxy is chosen in
    each. Raises UserError where no two sizes have trials of the same settings."""
    pairs = []
    for name, of_cloud in split_clouds(rows).items():
        losses = losses_at(axis, of_cloud)
        own_base = choose_base(axis, of_cloud, list(losses), base)
        pairs += [pair | {"cloud": name} for pair in pair_losses(losses, own_base)]
    if not pairs:
        raise UserError(f"scatter: no two sizes have {FEWEST} trials of the same settings; give a sweep such "
                        "as `width=64,256 lr=2**-9..2**-6`, or --base")
    return pairs


def pair_folders(folders, target):
    """[pair_losses() of a folder with the folder `target`], each with its `cloud`, the folder's name; seeds
    apart, any size is compared with any. Raises UserError where one has trials of several sizes."""
    losses = {}
    for folder in (*folders, target):
        rows = read_rows([folder])
        sizes = values_of(settings_and_facts(rows), *AXES)
        if len(sizes) > 1:
            raise UserError(f"target: {folder} must hold trials of one size, got {len(sizes)}; without "
                            "--target the sizes of a sweep are compared")
        losses[folder], = losses_at("width", rows).values()
    pairs = []
    for folder in folders:
        of_two = {os.path.basename(os.path.normpath(each)): losses[each] for each in (folder, target)}
        base = [*of_two][0]
        pairs += [pair | {"cloud": base.replace("_", " ")} for pair in pair_losses(of_two, base)]
    if len(pairs) < len(folders):
        raise UserError(f"target: {FEWEST} trials of each folder must have the same settings as trials in "
                        f"{target}")
    return pairs


def choose_axis(rows, axis):
    """The axis whose sizes are compared: `axis`, or the one that varies. Raises UserError."""
    configs = [json.loads(row["config"]) for row in rows]
    varied = [name for name in AXES if len(values_of(configs, name)) > 1]
    if axis in varied:
        return axis
    if axis or not varied:
        raise UserError(f"axis must be one that varies ({', '.join(varied) or 'none does'}), got "
                        f"{axis or 'none'}")
    return varied[0]


def format_interval(rank, count):
    """A rank correlation of so many pairs and, where there are enough of them, its interval."""
    low, high = rank_interval(rank, count)
    return format_rank(rank) if np.isnan(low) else f"{format_rank(rank)}[{low:+.2f},{high:+.2f}]"


def format_pairs(axis, pairs):
    """A table for each cloud, under its name where there are several."""
    clouds, lines = group((pair["cloud"], pair) for pair in pairs), []
    for cloud, own in clouds.items():
        if len(clouds) > 1:
            lines.append(cloud)
        lines.append(f"{axis} {own[0]['base']} and   pairs      rank correlation    of the better half   "
                     "cost of its favourite")
        lines += [f"{pair['size']:>10}{len(pair['proxy']):>10}"
                  f"{format_interval(pair['rank'], len(pair['proxy'])):>22}"
                  f"{format_interval(pair['rank_of_better_half'], pair['better_half']):>22}"
                  f"{pair['cost']:>24.4f}" for pair in own]
    return "\n".join(lines)


@command
def main(argv):
    options, folders, to = parse_folders(argv, {"axis": "", "base": 0, "target": ""}, __doc__)
    if options["target"]:
        axis, pairs = "", pair_folders(folders, options["target"])
    else:
        rows = read_rows(folders)
        axis = choose_axis(rows, options["axis"])
        pairs = pair_clouds(axis, rows, options["base"])
    make_folder(to)
    print(format_pairs(axis, pairs), figures.draw_scatter(axis, pairs, to), sep="\n")
