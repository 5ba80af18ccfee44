"""Trials as a page for the browser, with a settings calculator: python -m scaling.explore DIR [DIR ...]

Writes explore.html into DIR, or --to=FOLDER: one file that needs no network. It draws loss against lr, or
another setting that was swept, for each size, and computes what each role gets at any width, depth, batch,
number of tokens and lr. Needs the package plotly. The page itself is explore.html and explore.js beside this
file.
"""

import html
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from string import Template

from configure import SETTINGS, Config, UserError, names_in
from data.files import write_text
from parametrization import ROLES, TABLES, forward_multipliers, hyperparameters
from scaling.cli import command, make_folder
from scaling.figures import LOSS, TITLES, shades
from scaling.report import is_number
from scaling.rows import AXES, parse_folders, read_rows, settings_and_facts, values_of
from scaling.trials import settings_of

# The settings that the rules read, but for those that they are functions of
IN_RECIPE = [name for name in names_in("function", "init", "optimizer") if name not in (*AXES, "lr")]


def numbers(config):
    """{role: {quantity: its value}} at the shape of `config`: what hyperparameters() says, without what a
    role does not have; as the role "forward", the factors of the forward pass."""
    found = {}
    absent = {"bias": not config.bias, "readout": config.tied, "value_embedding": not config.value_embeddings}
    for role in ROLES:
        if absent.get(role):
            continue
        of_role = hyperparameters(config, role)
        found[role] = {name: of_role[name] for name in ("std", "lr", "weight_decay", "eps")
                       if of_role[name] is not None}
        if "momentum" in of_role:
            del found[role]["eps"]  # Muon has none
    found["forward"] = forward_multipliers(config)
    if beta2 := hyperparameters(config, "hidden")["betas"][1]:
        found["forward"]["minus_log_beta2"] = -math.log(beta2)  # a power of batch, as beta2 is not
    return found


def rules(config):
    """{"at": {input: value}, "roles": {role: {quantity: {"value": there, "powers": {input: exponent}}}}}.

    All rules are powers of the inputs, so doubling each tells its exponent. It is read from numbers(), and so
    no rule is written here again.
    """
    start = replace(config, batch_start=None, batch_ramp_tokens=None, steps=2)
    doubled = {"width": replace(start, width=2 * start.width), "depth": replace(start, depth=2 * start.depth),
               "batch": replace(start, batch=2 * start.batch, steps=1),  # of the same tokens
               "tokens": replace(start, steps=4), "lr": replace(start, lr=2 * start.lr)}
    doubled = {name: numbers(other) for name, other in doubled.items()}
    roles = {}
    for role, quantities in numbers(start).items():
        roles[role] = {}
        for quantity, value in quantities.items():
            powers = {name: math.log2(other[role][quantity] / value) if value else 0.0
                      for name, other in doubled.items()}
            roles[role][quantity] = {"value": value, "powers": powers}
    return {"at": inputs_of(start), "roles": roles}


def inputs_of(config):
    """{what the rules are functions of: value}."""
    return {"width": config.width, "depth": config.depth, "batch": config.batch,
            "tokens": config.tokens_before(max(config.steps, 1)), "lr": config.lr}


def find_recipes(configs, varied):
    """({key: recipe}, [the key of each of `configs`]). A recipe is its rules(), a label, and the range of
    each input that was measured with it; None for points between the tables, which have no rules."""
    recipes, keys = {}, []
    for config in configs:
        settings = {name: getattr(config, name) for name in IN_RECIPE}
        key = json.dumps(settings)
        keys.append(key)
        if key not in recipes:
            label = ", ".join(f"{name}={value}" for name, value in settings.items() if name in varied)
            known = config.parametrization in TABLES
            recipes[key] = rules(config) | {"label": label, "measured": {}} if known else None
        if recipes[key]:
            for name, value in inputs_of(config).items():
                low, high = recipes[key]["measured"].get(name, (value, value))
                recipes[key]["measured"][name] = min(low, value), max(high, value)
    return recipes, keys


def rounded(value):
    """`value`, without what rounding adds: 2**-8.5 * 2**0.5 is 2**-8, too."""
    return float(f"{value:.9g}") if type(value) is float else value


def explore(rows):
    """What the page shows of `rows`, for JSON."""
    from matplotlib.colors import to_hex
    named = settings_and_facts(rows)
    varied = [name for name in named[0] if len(values_of(named, name)) > 1]
    axes = sorted((name for name in AXES if name in varied), key=lambda name: -len(values_of(named, name)))
    axes = axes or ["width"]
    swept = [name for name in varied if name not in (*AXES, "seed", "lr") and name in SETTINGS
             and all(is_number(settings[name]) for settings in named)]
    configs = [Config(**settings_of(row["config"])) for row in rows]
    recipes, keys = find_recipes(configs, varied)
    shown = dict.fromkeys([*axes, "parametrization", "lr", "seed", *varied])
    numbered = {key: i for i, key in enumerate(recipes)}
    trials = [{"loss": None if row["diverged"] else row["val_loss"], "failure": row["failure"],
               "settings": {name: rounded(settings[name]) for name in shown},
               "inputs": inputs_of(config), "recipe": numbered[key]}
              for row, settings, config, key in zip(rows, named, configs, keys, strict=True)]
    return {"trials": trials, "recipes": [*recipes.values()], "axes": axes,
            "swept": {name: SETTINGS[name].help for name in ("lr", *swept)}, "titles": TITLES, "loss": LOSS,
            "colors": {name: [to_hex(color) for color in shades(len(values_of(named, name)))]
                       for name in axes}}


def build_page(title, data, plotly):
    """The HTML of explore()'s `data`. plotly: the JavaScript of that library."""
    in_script = json.dumps(data).replace("<", "\\u003c")  # a name cannot end the <script>
    template, script = (Path(__file__).with_suffix(end).read_text("utf-8") for end in (".html", ".js"))
    return Template(template).substitute(title=html.escape(title), data=in_script, plotly=plotly,
                                         script=script)


@command
def main(argv):
    _, folders, to = parse_folders(argv, {}, __doc__)
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("plotly: scaling.explore needs the package `plotly`; pip install plotly") from None
    rows = read_rows(folders)
    if all(row["diverged"] for row in rows):
        raise UserError(f"explore: every trial of {', '.join(folders)} diverged or failed; there is no loss "
                        "to draw")
    page = build_page(f"Trials of {', '.join(folders)}", explore(rows), get_plotlyjs())
    make_folder(to)
    path = os.path.join(to, "explore.html")
    write_text(path, page)
    print(f"{len(rows)} trials: open {path} in a browser")
