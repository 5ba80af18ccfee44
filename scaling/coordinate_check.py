"""Does every layer move alike at each size? python -m scaling.coordinate_check CONFIG [--name=value ...]

Trains a few steps at several widths (--widths=64,128,256,512) or depths (--depths=8,16,32) and fits the power
of the size to which the mean |change| of each layer's output is proportional (Tensor Programs V, arXiv
2203.03466, appendix D.1). Under μP it is 0, or what the table says; the standard parametrization, the control
in the figure, fails. Exit code 0 for PASS, 1 for FAIL and for UNDECIDED. Also --steps=5, --seeds=3 (from
--seed on), --out=DIR. It trains on 2 sequences of at most 64 tokens at a constant, low rate: a setting of the
batch, the schedule or the evaluation is rejected.

The rows: the logits; what the readout's own learning, apart from its random start, changes in the logits of
the targets; then, in the order of the forward pass, what owns a matrix, by the change of its output; the
logits of attention; the residual stream after each block; and each vector, such as a norm's gain, by the
length of its own steps. Layers of all blocks are one row. A new layer is found by itself; a parameter that
lies in GPT or Block directly, and is no vector, shows in the logits or the residual stream only.

How to read a FAIL: the cause is the first row from the top that is off, logits left out, as what follows it
inherits its error. Above what is expected: it moves more at each larger size, so its lr or its initial size
falls too little with it; below: too much. If the power is near the bound of 0.25, train larger sizes and more
seeds (--widths=256,512,1024 --seeds=5): what only small sizes do fades, a wrong exponent stays. One matrix in
which the shares of several parts change with the width fails too: give each part a matrix of its own.

A layer may be smaller at the start of a wider model without failing: logits start as width^-1/2, as their
weights are independent and they are multiplied by 1/width_mult, and change so where these weights are large
beside what they learn; what starts at 0 has no power. The check cannot see errors in what hardly acts within
a few steps (weight decay, Adam's eps, the length of the run), nor in what is the same at all of these sizes
(the rules for head_dim and for the batch). A pass does not prove that settings transfer: for that, sweep and
report.
"""

import math
from collections import defaultdict
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.func import functional_call

from configure import UserError, configure, names_in
from data.loader import TokenDataset, with_vocab_size
from data.prepare import prepare
from model import GPT
from parametrization import forward_multipliers, hyperparameters, role_of
from scaling import figures
from scaling.cli import command, make_folder, parse_options, parse_values, reject_unused
from scaling.fits import power_law
from scaling.rows import group
from train import train_step
from training.device import select_device, use_sensible_threads
from training.optimizer import build_optimizer
from training.schedule import LearningRate

BOUND = 0.25  # of a power. Finite sizes leave up to 0.20 under μP; a wrong exponent leaves 0.4 or more
SHRINKING = -0.5  # power of the logits' change where the readout's random weights do most of it
SLOW = 1 / 8  # x lr: at the tuned rate, without its warmup, 5 steps are already chaotic
BATCH, CONTEXT = 2, 64  # sequences, tokens: small, so that the check is quick
# Settings that change nothing here: short_run() overrides them, or the check does not do what they are for
UNUSED = {*names_in("training", "run"), "base_batch", "base_tokens", "base_lr", "context", "window"} - {
    "seed", "device", "precision", "data_dir"}
# Of layers whose output is not looked at: the logits and the vectors have rows of their own
OTHERWISE_CHECKED = {"readout", "norm", "bias"}
STREAM = "residual stream"


def checked_layers(model):
    """[(layer, module)]: what owns a parameter of a role not in OTHERWISE_CHECKED, and STREAM for each block,
    whose output is the residual stream. Layers of all blocks go by one name, such as mlp.up."""
    owners = {}
    for name, _ in model.named_parameters():
        if role_of(name) not in OTHERWISE_CHECKED:
            owner = name.rpartition(".")[0]
            owners[owner] = model.get_submodule(owner)
    layers = [(short_name(name), module) for name, module in owners.items()
              if module not in (model, *model.blocks)]
    return [(STREAM, block) for block in model.blocks] + layers


def short_name(name):
    """blocks.3.mlp.up -> mlp.up"""
    return name.split(".", 2)[2] if name.startswith("blocks.") else name


def vectors(model):
    """{name: the vectors among the parameters that go by it, of all blocks, stacked}, such as gains."""
    found = group((short_name(name), parameter.detach().clone())
                  for name, parameter in model.named_parameters() if parameter.dim() == 1)
    return {name: torch.stack(values) for name, values in found.items()}


def layer_outputs(model, tokens_BT):
    """{layer: its outputs in all blocks, stacked}; also the residual stream, attention logits and logits."""
    outputs = {"logits": []}  # the first row of the table; its output comes last
    attention = F.scaled_dot_product_attention

    def record(layer, output):
        outputs.setdefault(layer, []).append(output)

    def recorded_attention(q_BHTD, k_BHTD, v_BHTD, **options):
        keys_BHTD = k_BHTD
        if k_BHTD.size(1) < q_BHTD.size(1):  # grouped-query attention: several heads share their keys
            keys_BHTD = k_BHTD.repeat_interleave(q_BHTD.size(1) // k_BHTD.size(1), dim=1)
        # The model scales the queries beforehand, so these are the logits
        record("attention logits", (q_BHTD @ keys_BHTD.transpose(-1, -2)).tril())
        return attention(q_BHTD, k_BHTD, v_BHTD, **options)

    hooks = [module.register_forward_hook(lambda module, inputs, output, layer=layer: record(layer, output))
             for layer, module in checked_layers(model)]
    F.scaled_dot_product_attention = recorded_attention
    try:
        with torch.no_grad():
            record("logits", model(tokens_BT))
    finally:
        F.scaled_dot_product_attention = attention
        for hook in hooks:
            hook.remove()
    return {layer: torch.stack(found) for layer, found in outputs.items()}


def measure_run(config, dataset, steps):
    """Trains one model: {(layer, 0): mean |output| at initialization, (layer, step): mean |change| since}. Of
    a vector the mean |value|, and the sum of the mean |change| of all steps: to and fro counts as far.

    Each step trains on the tokens that are measured. On others a small model mostly shows the noise of Adam's
    signs, which falls as width^-1/2 and hides what all widths learn alike.
    """
    device, autocast = select_device(config)
    model = GPT(with_vocab_size(config, dataset)).to(device)
    first_readout = (model.token_embedding if config.tied else model.readout).weight.detach().clone()
    optimizer = build_optimizer(model)
    learning_rate = LearningRate(optimizer, config)
    batch = torch.stack(dataset.batch(config.seed, 0, config.batch, config.context)).to(device)
    tokens_BT, targets_BT = batch
    initial = layer_outputs(model, tokens_BT)
    before, moved = vectors(model), defaultdict(float)
    measured = {("logits", 0): 0.0, ("readout", 0): 0.0}  # the first rows of the table
    measured |= {(layer, 0): output.abs().mean().item() for layer, output in (initial | before).items()}
    for step in range(1, steps + 1):
        learning_rate.set(step - 1)
        train_step(model, optimizer, config, autocast, batch[:, None])
        outputs, now = layer_outputs(model, tokens_BT), vectors(model)
        for layer, output in outputs.items():
            measured[layer, step] = (output - initial[layer]).abs().mean().item()
        learned_BTV = outputs["logits"][0] - logits_read_by(first_readout, model, tokens_BT)
        measured["readout", step] = learned_BTV.gather(-1, targets_BT[..., None]).abs().mean().item()
        for name, values in now.items():
            moved[name] += (values - before[name]).abs().mean().item()
            measured[name, step] = moved[name]
        before = now
    return measured


@torch.no_grad()
def logits_read_by(weight_VC, model, tokens_BT):
    """The logits of `model` with `weight_VC` in place of its readout's; a tied embedding stays as it is."""
    if not model.config.tied:
        return functional_call(model, {"readout.weight": weight_VC}, (tokens_BT,))
    embedded = model.token_embedding(tokens_BT)
    hook = model.token_embedding.register_forward_hook(lambda *_: embedded)
    try:
        return functional_call(model, {"token_embedding.weight": weight_VC}, (tokens_BT,))
    finally:
        hook.remove()


def short_run(config, steps):
    """`config` for a few small and slow steps, whose number, batch and context do not scale any setting. No
    window: it would be longer than the context, and scales with no size."""
    return replace(config, batch=BATCH, context=min(CONTEXT, config.context), micro_batch=None, dropout=0.0,
                   steps=steps, lr=SLOW * config.lr, schedule="constant", warmup=0.0, base_lr=None,
                   base_batch=None, base_tokens=None, batch_start=None, batch_ramp_tokens=None,
                   warmup_tokens=None, decay_tokens=None, window=None)


def coordinate_check(config, axis="width", sizes=(64, 128, 256, 512), steps=5, seeds=3):
    """Trains at each of `sizes` of `axis`, with `seeds` seeds from config.seed on. Returns (rows, measured).
    Raises UserError.

    rows: [{layer, start, change, interval, expected, verdict}], where start, change, its 95% interval and
    expected are powers of the size. measured: {(layer, step): {size: [one mean for each seed]}}.
    """
    config = short_run(config, steps)
    dataset = TokenDataset(prepare(config))
    measured = defaultdict(lambda: defaultdict(list))
    for size in sizes:
        for seed in range(config.seed, config.seed + seeds):
            run = measure_run(replace(config, seed=seed, **{axis: size}), dataset, steps)
            for key, mean in run.items():
                measured[key][size].append(mean)
    expected, rows = expected_powers(config, axis), []
    for layer in dict.fromkeys(layer for layer, _ in measured):
        change, error = fit_power(measured[layer, steps])
        rows.append({"layer": layer, "start": fit_power(measured[layer, 0])[0], "change": change,
                     "interval": 2 * error, "expected": expected.get(layer, 0.0)})
    for row in rows:
        row["verdict"] = judge(row, lowest_power(row, rows))
    return rows, measured


def lowest_power(row, rows):
    """The power that the change of a layer must not be below by more than BOUND. That of the logits may fall
    as far as random weights of the readout explain it, while `readout`, which shows what it learns, is right.
    """
    if row["layer"] == "logits":
        [readout] = [other for other in rows if other["layer"] == "readout"]
        if readout["change"] - readout["expected"] >= -BOUND:
            return row["expected"] + SHRINKING
    return row["expected"]


def judge(row, lowest):
    """PASS, FAIL or UNDECIDED, where the interval of the change is wider than the bound and reaches it."""
    if math.isnan(row["change"]) or row["start"] > BOUND:  # it never moved, or is larger in larger models
        return "FAIL"
    off = max(row["change"] - row["expected"], lowest - row["change"])
    if row["interval"] > BOUND > off - row["interval"]:
        return "UNDECIDED"
    return "PASS" if off <= BOUND else "FAIL"


def overall(rows):
    """The verdict on all rows: the worst of theirs."""
    verdicts = {row["verdict"] for row in rows}
    return next(verdict for verdict in ("FAIL", "UNDECIDED", "PASS") if verdict in verdicts)


def fit_power(means):
    """(power of the size, its standard error) of {size: [mean of each seed]}; nan where one of them is 0."""
    points = [(size, mean) for size, of_seeds in means.items() for mean in of_seeds]
    x, y = zip(*points, strict=True)
    if min(y) <= 0:
        return math.nan, math.nan
    power, error, _ = power_law(x, y)
    return power, error


def expected_powers(config, axis):
    """{layer: the power of the size to which its change should be proportional}; 0 for layers not in it.

    Over width all are 0. Over depth a layer goes with the residual branch's multiplier where its output is
    scaled by that, and with the learning rate where it starts at 0, so that all of its output is learned.
    What the vectors, and the value embeddings, of all blocks change together must not depend on the depth.
    """
    if axis != "depth":
        return {}
    configs = config, replace(config, depth=2 * config.depth)
    branch, lr = (math.log2(after / before) for before, after in (
        [forward_multipliers(sized)["branch"] for sized in configs],
        [hyperparameters(sized, "hidden")["lr"] for sized in configs]))
    # A layer whose factor differs between depth 1 and 2 has the branch's multiplier in it
    shallow, deep = (GPT(replace(config, depth=depth, vocab_size=1, context=1)) for depth in (1, 2))
    deep_layers = dict(checked_layers(deep))
    powers = {short_name(name): -1 - branch for name, parameter in shallow.named_parameters()
              if name.startswith("blocks.") and parameter.dim() == 1}
    if config.value_embeddings:
        powers["value_embedding"] = -1 - branch
    for layer, module in checked_layers(shallow):
        if hasattr(module, "factor"):
            powers[layer] = 0.0
            if not torch.equal(module.factor, deep_layers[layer].factor):
                powers[layer] += branch
            if not module.weight.any():
                powers[layer] += lr
    return powers


def check_sizes(config, options):
    """(axis, sizes) that the command line asks for. Raises UserError before anything is trained."""
    axis = "depth" if options["depths"] else "width"
    sizes = parse_values(axis, options[f"{axis}s"] or "64,128,256,512")
    both = options["widths"] and options["depths"]
    if both or options["seeds"] < 2 or len(set(sizes)) < 2:
        raise UserError("coordinate_check: give --widths or --depths, with two sizes or more, and at least "
                        "--seeds=2")
    if config.init_from is not None:
        raise UserError(f"init_from must be none, got {config.init_from}: the check is of the initialization")
    for size in sizes:
        replace(config, **{axis: size})  # rejects a width that is no multiple of head_dim
    return axis, sizes


COLUMNS = ("start", "+.2f", 14), ("change", "+.3f", 10), ("interval", ".3f", 9)  # name, format, characters


def print_table(parametrization, axis, rows):
    """The rows, and the verdict with what it does not say."""
    print(f"{parametrization}, powers of {axis}\n{'':<24}  at the start    change      95%   expected")
    for row in rows:
        numbers = [("-" if math.isnan(row[name]) else format(row[name], form)).rjust(width)
                   for name, form, width in COLUMNS]
        print(f"{row['layer']:<24}{''.join(numbers)}{row['expected']:>+11.1f}   {row['verdict']}")
    verdict = overall(rows)
    of_fail, of_pass = __doc__.split("\n\n")[3:]
    print(f"{verdict}: a row passes where its change is within {BOUND} of what is expected",
          of_fail if verdict == "FAIL" else of_pass, sep="\n")


def say_what_decides(axis, sizes, rows, seeds):
    """What to train where rows are undecided."""
    undecided = [row for row in rows if row["verdict"] == "UNDECIDED"]
    if undecided:
        widest = max(undecided, key=lambda row: row["interval"])
        more_seeds = math.ceil(seeds * (widest["interval"] / BOUND) ** 2)
        larger = ",".join(str(size) for size in (*sizes, 2 * max(sizes)))
        print(f"UNDECIDED: {', '.join(row['layer'] for row in undecided)}. The interval of "
              f"{widest['layer']}, +-{widest['interval']:.2f}, is wider than the bound of {BOUND}. More "
              f"seeds decide it, about --seeds={more_seeds} if seeds are all that differs, or larger sizes, "
              f"--{axis}s={larger}.")


@command
def main(argv):
    defaults = {"widths": "", "depths": "", "steps": 5, "seeds": 3, "out": "out/coordinate_check"}
    options, _, words = parse_options(argv, defaults, __doc__)
    reject_unused(words, UNUSED | {"depth" if options["depths"] else "width"}, "the coordinate check")
    config = configure(words)
    axis, sizes = check_sizes(config, options)
    make_folder(options["out"])
    threads = use_sensible_threads(short_run(replace(config, **{axis: max(sizes)}), options["steps"]))
    print(f"{len(sizes)} sizes x {options['seeds']} seeds, {threads} threads on a CPU")
    checked = {}
    for name in dict.fromkeys((config.parametrization, "mup", "sp")):  # sp: the control
        checked[name] = coordinate_check(replace(config, parametrization=name), axis, sizes, options["steps"],
                                         options["seeds"])
    rows, _ = checked[config.parametrization]
    print_table(config.parametrization, axis, rows)
    say_what_decides(axis, sizes, rows, options["seeds"])
    print(figures.draw_coordinate_check(checked, axis, sizes, options["steps"], options["out"]))
    return 0 if overall(rows) == "PASS" else 1
