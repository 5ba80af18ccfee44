"""Wide and shallow, or narrow and deep? python -m scaling.shapes CONFIG [--name=value ...]

Trains shapes of CONFIG's cost and compares their losses and speeds, as Scale Efficiently (arXiv 2109.10686)
did, which found deep and narrow better. --depths=1,2,4,8,16 gives each depth the width that is nearest in
cost: --equal=parameters (of the whole model, for as many steps) or --equal=flops (of the training: steps
make up for what is left, as widths are multiples of head_dim; a small head_dim leaves less).
--lrs=2**-9..2**-7 tries these at each shape and takes the best; else all have CONFIG's, which μP keeps
right. --seeds=1, --stack=1 as in a sweep. --finetune=DATASET then trains each shape on, from its weights, on
another text, for --finetune_steps. Rows go to --out=DIR, which resumes; so do shapes.json and shapes.png.
"""

import bisect
import os
from dataclasses import asdict, replace

import numpy as np

from configure import UserError, configure
from data.loader import TokenDataset, with_vocab_size
from data.prepare import prepare
from scaling.cli import command, make_folder, parse_options, parse_values, reject_unused, resumable
from scaling.figures import LOSS, line_style, load_pyplot, save
from scaling.rows import group, loss_of, write_report
from scaling.sweep import run_trials, torchrun_rank, trial_configs
from scaling.transfer import UNUSED, finetuned, pretrain, reject_failures
from train import train
from training.model_size import model_size

COSTS = {"parameters": "parameters", "flops": "flops_per_token"}  # of a model_size()
MAX_HEADS = 512  # of the widest shape that is looked at
SPEED_STEPS = 12  # of a run that is only timed


def shapes_of(config, depths, equal):
    """[Config]: of each depth the width (and steps, for equal="flops") of nearest cost, or UserError."""
    if equal not in COSTS:
        raise UserError(f"equal must be {' or '.join(COSTS)}, got {equal}")
    vocab_size = with_vocab_size(config, TokenDataset(prepare(config))).vocab_size

    def cost(shape):
        return getattr(model_size(replace(shape, vocab_size=vocab_size)), COSTS[equal])

    shapes = []
    for depth in depths:
        shape = nearest_width(replace(config, depth=depth), cost, cost(config))
        if equal == "flops":
            shape = replace(shape, steps=max(1, round(config.steps * cost(config) / cost(shape))))
        shapes.append(shape)
    return shapes


def nearest_width(config, cost, wanted):
    """`config` at the width whose cost is nearest to `wanted`, as a ratio; cost grows with the width."""
    def sized(heads):
        return replace(config, width=heads * config.head_dim)

    heads = range(1, MAX_HEADS)
    first = 1 + bisect.bisect_left(heads, wanted, key=lambda n: cost(sized(n)))  # that costs as much
    return min((sized(max(1, first - 1)), sized(first)), key=lambda shape: abs(np.log(cost(shape) / wanted)))


def measure_speed(config):
    """Tokens a second of a training of this shape, alone on the device."""
    timed = replace(config, steps=SPEED_STEPS, eval_every=None, checkpoint_every=None, out=None,
                    sample_tokens=0, eval_tokens=config.context)
    return train(timed, quiet=True).tokens_per_second


def compare(shapes, rows, speeds, tuned):
    """[{width, depth, steps, parameters, flops, loss, lr, seeds, tokens_per_second, finetuned}] of each
    shape; rows: of its trials. tuned: {(width, depth): loss after finetuning}."""
    rows_by_shape, table = group(((row["width"], row["depth"]), row) for row in rows), []
    for shape in shapes:
        key = shape.width, shape.depth
        own = rows_by_shape[key]
        by_lr = group((row["lr"], loss_of(row)) for row in own)
        lr, losses = min(by_lr.items(), key=lambda pair: np.mean(pair[1]))
        table.append({"width": shape.width, "depth": shape.depth, "steps": shape.steps, "lr": lr,
                      "parameters": own[0]["parameters"], "flops": own[0]["flops"],
                      "loss": float(np.mean(losses)), "seeds": len(losses), "seed_losses": losses,
                      "tokens_per_second": speeds[key], "finetuned": tuned.get(key)})
    return table


def format_table(table):
    """The shapes, for people; the best ones named."""
    lines = [f"{'width':>6}{'depth':>6}{'steps':>8}{'parameters':>13}{'FLOPs':>11}{'loss':>9}{'log2 lr':>9}"
             f"{'tokens/s':>11}"]
    lines += [f"{its['width']:>6}{its['depth']:>6}{its['steps']:>8,}{its['parameters']:>13,.0f}"
              f"{its['flops']:>11.2e}{its['loss']:>9.4f}{np.log2(its['lr']):>9.2f}"
              f"{its['tokens_per_second']:>11,.0f}" for its in table]
    lines.append(say_best("best", table, "loss"))
    if table[0]["finetuned"] is not None:
        numbers = ["  finetuned", *(f"{its['finetuned']:>11.4f}" for its in table), ""]
        lines = [*map("".join, zip(lines, numbers, strict=True)),
                 say_best("best after finetuning", table, "finetuned")]
    return "\n".join(lines)


def say_best(what, table, loss):
    best = min(table, key=lambda its: its[loss])
    return f"{what}: width {best['width']}, depth {best['depth']}, loss {best[loss]:.4f}"


def draw_shapes(table, equal, folder):
    """Writes shapes.png: loss, that after finetuning, and speed against depth; returns its path."""
    pyplot = load_pyplot()
    panels = [(f"Equal {equal.replace('flops', 'FLOPs')}", LOSS, [its["loss"] for its in table]),
              ("Finetuned on another text", LOSS, [its["finetuned"] for its in table]),
              ("Speed", "million tokens per second", [its["tokens_per_second"] / 1e6 for its in table])]
    panels = [panel for panel in panels if None not in panel[2]]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.4), layout="constrained")
    depths, style = [its["depth"] for its in table], line_style(0)
    for ax, (title, label, values) in zip(axes, panels, strict=True):
        ax.plot(depths, values, **style)
        ax.set(title=title, ylabel=label, xscale="log", xlabel="depth, blocks (width)")
        ax.set_xticks(depths, [f"{its['depth']}\n({its['width']})" for its in table])
        ax.minorticks_off()
    for its in table:
        axes[0].plot([its["depth"]] * its["seeds"], its["seed_losses"], ".", color=style["color"], alpha=0.6)
    axes[-1].set_ylim(0, None)
    return save(figure, os.path.join(folder, "shapes.png"), pyplot)


def finetune_all(shapes, dataset, steps, folder):
    """{(width, depth): loss after `steps` on `dataset`}, from the weights of a training of the shape."""
    configs = []
    for shape in shapes:
        run = pretrain(shape, os.path.join(folder, "pretrained"))
        configs += trial_configs(replace(finetuned(shape, run, dataset), steps=steps), {})
    rows = run_trials(configs, os.path.join(folder, "finetuned"))
    reject_failures(rows)
    return {(row["width"], row["depth"]): row["val_loss"] for row in rows}


@command
def main(argv):
    defaults = {"depths": "1,2,4,8,16", "equal": "flops", "lrs": "", "seeds": 1, "stack": 1, "finetune": "",
                "finetune_steps": 100, "out": "out/shapes"}
    options, _, words = parse_options(argv, defaults, __doc__)
    reject_unused(words, UNUSED, "these trainings")
    config = configure(words)
    lrs = parse_values("lr", options["lrs"]) if options["lrs"] else [config.lr]
    shapes = shapes_of(config, parse_values("depth", options["depths"]), options["equal"])
    axes = {"lr": lrs, "seed": list(range(config.seed, config.seed + options["seeds"]))}
    configs = [trial for shape in shapes for trial in trial_configs(shape, axes)]
    folder, tuned = options["out"], {}
    make_folder(folder)
    with resumable(folder):
        rows = run_trials(configs, folder, options["stack"])
        reject_failures(rows)
        if torchrun_rank()[0] > 0:
            return
        if options["finetune"]:
            tuned = finetune_all(shapes, options["finetune"], options["finetune_steps"], folder)
        speeds = {(shape.width, shape.depth): measure_speed(shape) for shape in shapes}
    table = compare(shapes, rows, speeds, tuned)
    report = {"equal": options["equal"], "shapes": table, "config": asdict(config)}
    write_report(report, folder, "shapes.json")
    print(format_table(table), draw_shapes(table, options["equal"], folder), sep="\n")
