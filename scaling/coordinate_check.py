"""Does every layer move alike at each size? python -m scaling.coordinate_check CONFIG [--name=value ...]

Trains a few steps at several widths (--widths=64,128,256,512) or depths (--depths=8,16,32) and fits the power
of the size with which the mean |change| of each layer's output goes (Tensor Programs V, arXiv 2203.03466,
appendix D.1). Under μP it is 0, or what the table says; the standard parametrization, the control in the
figure, fails. Exit code 0 for PASS, 1 for FAIL. Also --steps=5, --seeds=3, --out=DIR.

What shrinks at the start is no failure: logits as width^-1/2 (independent weights, logits x 1/width_mult);
what starts at 0 has no power. The check cannot see what does not act in a few steps (weight decay, horizon)
or is too small to (Adam's eps). A pass does not prove that settings transfer: sweep, then report.
"""

import math
from collections import defaultdict
from dataclasses import replace

import torch
import torch.nn.functional as F

from configure import UserError, configure
from data import Data, prepare
from data.feed import sized
from data.processes import command
from model import GPT, multipliers, rule
from scaling import figures
from scaling.fits import power_law
from scaling.words import make_folder, values, words_of
from train import Step, pick_device

BOUND = 0.15  # of a power. Finite sizes leave up to 0.12 under μP; a wrong exponent leaves 0.4 or more
SLOW = 1 / 8  # x lr: at the tuned rate, without its warmup, 5 steps are already chaotic
LAYERS = ("token_embedding", "attention.qkv", "attention.out", "mlp.up", "mlp.down", "final_norm")
BATCH, CONTEXT = 8, 64  # sequences, tokens: small, so that the check is quick


def outputs(model, tokens_BT):
    """{layer: its output in every block, stacked}; also the residual stream, attention logits and logits."""
    seen, attend, hooks = defaultdict(list), F.scaled_dot_product_attention, []

    def attended(q, k, v, **options):
        seen["attention logits"].append((q @ k.transpose(-1, -2)).tril())  # the queries are scaled already
        return attend(q, k, v, **options)

    for name, module in model.named_modules():
        layer = name.split(".", 2)[-1] if name.startswith("blocks.") else name
        layer = "stream" if name.removeprefix("blocks.").isdigit() else layer
        if layer in (*LAYERS, "stream"):
            hooks.append(module.register_forward_hook(lambda m, i, out, layer=layer: seen[layer].append(out)))
    F.scaled_dot_product_attention = attended
    try:
        with torch.no_grad():
            seen["logits"].append(model(tokens_BT))
    finally:
        F.scaled_dot_product_attention = attend
        for hook in hooks:
            hook.remove()
    return {layer: torch.stack(found) for layer, found in seen.items()}


def sizes(config, data, steps):
    """{(layer, when): mean |output| at initialization, then mean |change| after each step} of one run."""
    device, autocast = pick_device(config)
    model = GPT(sized(config, data)).to(device)
    take_step = Step(model, torch.optim.AdamW(model.param_groups(), fused=True), config, autocast)
    batches = [torch.stack(data.batch(config.seed, step, config.batch, config.context)).to(device)
               for step in range(steps + 1)]
    probe_BT = batches.pop()[0]
    first = outputs(model, probe_BT)
    found = {(layer, 0): out.abs().mean().item() for layer, out in first.items()}
    for step, batch in enumerate(batches):
        take_step(batch[:, None], step)
        for layer, out in outputs(model, probe_BT).items():
            found[layer, step + 1] = (out - first[layer]).abs().mean().item()
    return found


def coordinate_check(config, axis="width", rungs=(64, 128, 256, 512), steps=5, seeds=3):
    """([{layer, start, change, interval, expected, passes}], all powers of `axis`; the sizes they are fitted
    to, {(layer, when): {rung: [one for each seed]}}). Raises UserError."""
    config = replace(config, batch=BATCH, context=min(CONTEXT, config.context), micro_batch=None, dropout=0.0,
                     steps=steps, lr=SLOW * config.lr, schedule="constant", warmup=0.0, base_batch=None,
                     base_tokens=None)
    data, found = Data(prepare(config)), defaultdict(lambda: defaultdict(list))
    for rung in rungs:
        for seed in range(seeds):
            for key, size in sizes(replace(config, seed=seed, **{axis: rung}), data, steps).items():
                found[key][rung].append(size)

    def fit(layer, when):
        pairs = [(rung, size) for rung, of_seeds in found[layer, when].items() for size in of_seeds]
        x, y = zip(*pairs, strict=True)
        return power_law(x, y)[:2] if min(y) > 0 else (math.nan, math.nan)

    one, two = (multipliers(c)["branch"] * (rule(c, "hidden")["lr"] if c.zero_residual_out else 1.0)
                for c in (config, replace(config, depth=2 * config.depth)))  # from 0, all of it is learnt
    rows = []
    for layer in dict.fromkeys(layer for layer, _ in found):
        (start, _), (change, error) = fit(layer, 0), fit(layer, steps)
        expected = math.log2(two / one) if axis == "depth" and layer in ("attention.out", "mlp.down") else 0.0
        rows.append({"layer": layer, "start": start, "change": change, "expected": expected,
                     "interval": 2 * error, "passes": abs(change - expected) <= BOUND and not start > BOUND})
    return rows, found


def main(argv):
    own = {"widths": "", "depths": "", "steps": 5, "seeds": 3, "out": "out/coordinate_check"}
    config = configure(words_of(argv, own, __doc__))
    axis = "depth" if own["depths"] else "width"
    rungs = values(axis, own[f"{axis}s"] or "64,128,256,512")
    if own["widths"] and own["depths"] or own["seeds"] < 2 or len({*rungs}) < 2:
        raise UserError("coordinate_check: takes --widths or --depths, 2 or more, and --seeds from 2")
    for rung in rungs:
        replace(config, **{axis: rung})  # refused before there is a folder
    make_folder(own["out"])
    checked = {name: coordinate_check(replace(config, parametrization=name), axis, rungs, own["steps"],
                                      own["seeds"])
               for name in dict.fromkeys((config.parametrization, "mup", "sp"))}
    rows = checked[config.parametrization][0]
    print(f"{config.parametrization}, powers of {axis}\n{'':<18}  at the start    change      95%   expected")
    for row in rows:
        print("{layer:<18}{start:>+14.2f}{change:>+10.3f}{interval:>9.3f}{expected:>+11.1f}   ".format(**row)
              + ("PASS" if row["passes"] else "FAIL"))
    failed = not all(row["passes"] for row in rows)
    print("FAIL" if failed else "PASS", *__doc__.split("\n\n")[2:], sep="\n", end="")
    print(figures.coordinates(checked, axis, rungs, own["steps"], own["out"]))
    return int(failed)


if __name__ == "__main__":
    command(main)
