"""The learning rate of some configurations beside what μP takes to their shape from a tuned proxy:

    python -m scaling.lr_table config/gpt3/*.py [--proxy=config/proxy.py] [--name=value]

muP: that of the hidden matrices, by width and depth alone (parametrization.py). "with rules": times both
rules that are off by default, for the tokens of a batch, by the square root, and for those of the run, by the
power of -0.32. These reach far beyond what was measured here. Settings apply to the proxy. Trains nothing.
"""

from dataclasses import replace

from configure import SETTINGS, UserError, configure
from parametrization import batch_and_horizon, hyperparameters
from scaling.cli import command, parse_options, reject_unused
from scaling.sweep import TYPICAL_VOCAB_SIZE
from training.model_size import model_size

COLUMNS = ("config", "parameters", "width", "depth", "tokens a step", "tokens", "lr", "muP", "with rules")
USED = {"width", "depth", "head_dim", "context", "optimizer", "lr", "depth_alpha", "batch", "batch_start",
        "batch_ramp_tokens", "steps"}


def transferred(config, proxy):
    """`proxy` at the width and depth of `config`, with its own shape as the base."""
    return replace(proxy, width=config.width, depth=config.depth, head_dim=config.head_dim, window=None,
                   parametrization="mup", base_width=proxy.width, base_depth=proxy.depth,
                   base_head_dim=proxy.head_dim, base_batch=None, base_tokens=None)


def both_rules(config, proxy):
    """What the rules for a batch and for a run of other tokens than the proxy's multiply lr by."""
    sequences = max(1, config.batch * config.context // proxy.context)  # base_batch counts the proxy's
    by_batch = batch_and_horizon(replace(proxy, batch=sequences, base_batch=proxy.batch, base_tokens=None,
                                         micro_batch=None, batch_start=None, batch_ramp_tokens=None))
    by_tokens = batch_and_horizon(replace(config, base_batch=None,
                                          base_tokens=proxy.tokens_before(max(1, proxy.steps))))
    return by_batch.lr * by_tokens.lr


def row_of(name, config, proxy):
    """(parameters, the texts of COLUMNS)"""
    parameters = model_size(replace(config, vocab_size=config.vocab_size or TYPICAL_VOCAB_SIZE)).parameters
    lr, by_mup = (hyperparameters(its, "hidden")["lr"] for its in (config, transferred(config, proxy)))
    return parameters, (name.removeprefix("config/"), f"{parameters:,}", f"{config.width}", f"{config.depth}",
                        f"{config.batch * config.context:,}", f"{config.tokens_before(config.steps):.2e}",
                        f"{lr:.2e}", f"{by_mup:.2e}", f"{by_mup * both_rules(config, proxy):.2e}")


@command
def main(argv):
    options, _, words = parse_options(argv, {"proxy": "config/proxy.py"}, __doc__)
    files = [word for word in words if not word.startswith("-")]
    proxy = configure([options["proxy"], *(word for word in words if word.startswith("-"))])
    if not files:
        raise UserError("lr_table: give one or more configurations, such as config/gpt3/*.py")
    reject_unused(words, SETTINGS.keys() - USED, "the rates")
    by_size = sorted(row_of(name, configure([name]), proxy) for name in files)
    rows = [COLUMNS, *(texts for _, texts in by_size)]
    name_width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    for name, *numbers in rows:
        print(f"{name:<{name_width}}", *map(str.rjust, numbers, widths), sep="  ")
