"""What a search draws: the settings that transfer, each with its range or its values. Imports no Optuna.

The classes of Tensor Programs V (arXiv 2203.03466, table 1): optimizer, initialization, multipliers. Decay,
clipping and the schedule are in too: at the few epochs of a proxy they act as part of the optimizer. A number
is drawn evenly in its logarithm; of a beta it is 1 - beta, the reciprocal of the steps that it averages over.
"""

import math
import os
from dataclasses import replace
from typing import NamedTuple

from configure import SETTINGS, TUNED, Config, UserError, check_setting, names_in, read_settings
from scaling.cli import parse_values

EDGE = 0.05  # of a range, on its logarithm: a winner as near as that to an end may lie beyond it
WIDER = 4.0  # the factor by which a range is widened at the end where the winner lies
BELOW_ONE = 0.99  # the highest value that is drawn for a setting that must stay below 1
FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "config")
PRESETS = "config/proxy.py", "config/muon.py", "config/gpt2_proxy.py"  # what this project ships as tuned


class Range(NamedTuple):
    """The numbers from `low` to `high`; with `complement`, of 1 - setting in place of the setting."""
    low: float
    high: float
    complement: bool = False


class Choice(NamedTuple):
    values: tuple


SPACE = {
    "lr": Range(2**-11, 2**-5),
    "embedding_lr_mult": Range(1.0, 32.0),
    "readout_lr_mult": Range(0.25, 8.0),
    "norm_lr_mult": Range(0.03, 3.0),
    "embedding_std": Range(2**-6, 1.5),
    "hidden_std": Range(0.25, 2.0),
    "readout_std": Range(0.125, 2.0),
    "zero_residual_out": Choice((False, True)),
    "zero_query": Choice((False, True)),
    "embedding_mult": Range(0.5, 4.0),
    "logit_mult": Range(0.5, 4.0),
    "attention_mult": Range(0.25, 2.0),
    "beta1": Range(0.05, 0.3, complement=True),
    "beta2": Range(0.005, 0.1, complement=True),
    "warmup": Range(0.015, 0.3),
    "weight_decay": Range(2**-8, 1.0),
    "grad_clip": Range(0.125, 4.0),
    "schedule": Choice(("cosine", "linear")),
    "final_lr": Range(2**-7, 0.3),
}
MUON_LR = Range(2**-9, 2**-3)  # of orthogonal updates: config/muon.py has 2**-5.5

# The best values of these move with the width, by 0.4 to 0.5 octaves a doubling (scaling/results/README.md,
# "Other settings"). A proxy would choose what is best at its own width. They are drawn within an octave of
# the presets' values, which is as far as they move in two doublings.
DRIFTING = "embedding_lr_mult", "embedding_std", "hidden_std"
NEAR = 2.0
DIGITS = 1e-3  # relative: what draws are rounded to, and more

# What each multiplier does as well as another two settings: times `c` it is the same as both of them times
# `c`, but for gradient clipping, decay and eps (see equivalent_in())
SAME_AS = {"embedding_mult": ("embedding_std", "embedding_lr_mult"),
           "logit_mult": ("readout_std", "readout_lr_mult")}


def unused_names(config):
    """Settings of SPACE that do nothing in `config`, or nothing that others do not do as well."""
    unused = {"embedding_mult", "logit_mult"}
    if config.tied:  # one matrix, by the embedding's rules: only logit_mult scales the logits alone
        unused = {"embedding_mult", "readout_std", "readout_lr_mult"}
    if config.warmup_tokens is not None:
        unused.add("warmup")
    return unused


def domain_of(name, config):
    """The Range or Choice from which a search of `config` draws the setting `name`, unless told otherwise."""
    if name == "lr" and config.optimizer == "muon":
        return MUON_LR
    if name in DRIFTING:
        values = [getattr(equivalent_in(config, preset), name) for preset in presets_for(config).values()]
        return Range(min(values) / NEAR, max(values) * NEAR) if values else SPACE[name]
    return SPACE[name]


def default_space(config):
    """{setting: domain} that a search of `config` draws by default."""
    return {name: domain_of(name, config) for name in SPACE if name not in unused_names(config)}


def parse_space(text, config):
    """The part of SPACE that `text` lists: lr,zero_query; a range of one's own as lr:2**-9..2**-6, and values
    as zero_query:true. Of an empty text, default_space(). Raises UserError."""
    if not text:
        return default_space(config)
    space = {}
    for item in text.split(","):
        name, colon, values_text = item.partition(":")
        if name not in SPACE:
            raise UserError(f"space must be some of {', '.join(SPACE)}, got {name}")
        space[name] = parse_domain(name, values_text) if colon else domain_of(name, config)
    return space


def parse_domain(name, text):
    """A Range or Choice from LOW..HIGH or from one value. Raises UserError."""
    low, dots, high = text.partition("..")
    if not dots:
        return Choice(tuple(parse_values(name, text)))
    if isinstance(SPACE[name], Choice):
        raise UserError(f"space must be {name} or {name}:VALUE, got {name}:{text}")
    low, high = parse_values(name, low)[0], parse_values(name, high)[0]
    complement = SPACE[name].complement
    if complement:
        low, high = 1 - high, 1 - low
    if not 0 < low < high:
        raise UserError(f"space must be {name}:LOW..HIGH with 0 < LOW < HIGH, got {name}:{text}")
    return Range(low, high, complement)


def param_name(name, domain):
    """What the study calls the number that is drawn for a setting."""
    return f"1 - {name}" if isinstance(domain, Range) and domain.complement else name


def distributions(space):
    """{name in the study: Optuna distribution}."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution
    found = {}
    for name, domain in space.items():
        if isinstance(domain, Choice):
            found[name] = CategoricalDistribution(domain.values)
        else:
            found[param_name(name, domain)] = FloatDistribution(domain.low, domain.high, log=True)
    return found


def to_params(config, space):
    """The settings of `config` as a point of the space: the nearest one, where they lie outside."""
    params = {}
    for name, domain in space.items():
        value = getattr(config, name)
        if isinstance(domain, Choice):
            params[name] = value if value in domain.values else domain.values[0]
            continue
        number = number_of(value, domain)
        params[param_name(name, domain)] = min(domain.high, max(domain.low, number))
    return params


def number_of(value, domain):
    """What is drawn for the setting."""
    return 1 - value if domain.complement else value


def to_config(config, params, space):
    """`config` with the settings of a point of the space."""
    settings = {}
    for name, domain in space.items():
        value = params[param_name(name, domain)]
        if isinstance(domain, Range):
            value = float(f"{value:.4g}")  # no loss depends on more, and people read and copy it
            if domain.complement:
                value = round(1 - value, 6)
        settings[name] = check_setting(name, value)
    return replace(config, **settings)


def at_edge(config, space):
    """[(setting, "low" or "high")] of the settings of `config` that lie at an end of their range."""
    found = []
    for name, domain in space.items():
        if isinstance(domain, Choice):
            continue
        number = to_params(config, {name: domain})[param_name(name, domain)]
        place = math.log(number / domain.low) / math.log(domain.high / domain.low)
        if place < EDGE or place > 1 - EDGE:
            is_high = (place > 0.5) != domain.complement
            found.append((name, "high" if is_high else "low"))
    return found


def widened(space, config, own=False):
    """{setting: wider Range} where the winner `config` is at an end of a default range, or `own`, of any."""
    found = {}
    for name, _ in at_edge(config, space):
        domain = space[name]
        number = number_of(getattr(config, name), domain)
        if number <= 0 or not own and domain != domain_of(name, config):
            continue
        limit = math.inf if SETTINGS[name].accepts(2.0) else BELOW_ONE
        if number > math.sqrt(domain.low * domain.high):
            wider = domain._replace(high=min(limit, max(number, WIDER * domain.high)))
        else:
            wider = domain._replace(low=min(number, domain.low / WIDER))
        if wider != domain:
            found[name] = wider
    return found


# What is known before the first draw

def presets_for(config):
    """{name: Config} of the presets tuned for the optimizer of `config` and for its block, or the most
    similar one: `config` with all that each has tuned. Empty for an optimizer that has none."""
    compared = [name for name in names_in("function") if name not in TUNED and name not in SHAPE]
    found = {}
    for path in PRESETS:
        preset = Config(**read_settings(os.path.join(FOLDER, os.path.basename(path))))
        if preset.optimizer == config.optimizer:
            differences = sum(getattr(preset, name) != getattr(config, name) for name in compared)
            found[path] = differences, with_tuned(config, preset)
    fewest = min((differences for differences, _ in found.values()), default=0)
    return {path: preset for path, (differences, preset) in found.items() if differences == fewest}


SHAPE = {"width", "depth", "context", "head_dim", "kv_heads", "vocab_size"}
# What tuned values are relative to, and what is a length of the target's own
FRAME = {"base_width", "base_depth", "base_head_dim", "base_tokens", "base_lr", "parametrization",
         "warmup_tokens", "decay_tokens"}


def with_tuned(config, other):
    """`config` with all that `other` has tuned."""
    return replace(config, **{name: getattr(other, name) for name in TUNED if name not in FRAME})


def defaults_for(config):
    """`config` with the default of everything that transfers."""
    return with_tuned(config, Config())


def equivalent_in(config, other):
    """`other` with the multipliers and the base batch of `config`: the same steps, by other settings.

    A matrix times c, its initial weights and its learning rate divided by c: the forward pass is the same,
    and so are Adam's steps, which do not depend on the size of a gradient. What does is the clipping of the
    global norm and eps; and the decay of that matrix, lr * weight_decay, goes with its lr."""
    changes = {}
    for name, others in SAME_AS.items():
        if config.tied and name == "logit_mult":
            continue
        ratio = getattr(other, name) / getattr(config, name)
        changes[name] = getattr(config, name)
        changes |= {setting: getattr(other, setting) * ratio for setting in others}
        if config.tied:
            changes["logit_mult"] = other.logit_mult / ratio
    batches = (config.base_batch or config.batch) / (other.base_batch or config.batch)
    changes |= {"base_batch": config.base_batch, "lr": other.lr * math.sqrt(batches),
                "weight_decay": other.weight_decay * math.sqrt(batches), "beta2": other.beta2 ** batches}
    return replace(other, **changes)


def trains_alike(config, other):
    """Whether two Configs train alike: equal but for what is equivalent, to the digits of a draw."""
    same = equivalent_in(config, other)
    pairs = [(getattr(config, name), getattr(same, name)) for name in TUNED]
    return all(a == b or isinstance(a, float) and math.isclose(a, b, rel_tol=DIGITS) for a, b in pairs)


def lr_ratio(config, other):
    """How many times the lr of `other` that of `config` is, where they train alike but for the lr; else None.
    The rates are compared as equivalent_in() has them, with one base batch."""
    lr = equivalent_in(config, other).lr
    return config.lr / lr if trains_alike(replace(config, lr=lr), other) else None


def nearest_point(config, other, space):
    """`config` with the settings of the point of the space that is nearest to `other`."""
    return to_config(config, to_params(equivalent_in(config, other), space), space)


def starting_points(config, space):
    """The Configs that a search of `config` draws first: its own settings, then the nearest points of the
    space to the presets and to the defaults."""
    others = [*presets_for(config).values(), defaults_for(config)]
    points = dict.fromkeys(nearest_point(config, other, space) for other in others)
    points.pop(nearest_point(config, config, space), None)
    return [config, *points]
