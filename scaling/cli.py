"""What the commands of scaling/ have in common: their start, options, lists of values, the output folder."""

import contextlib
import math
import os
import signal
import sys

from configure import (
    SETTINGS,
    UserError,
    advice_for,
    asks_for_help,
    check_setting,
    closest,
    parse_value,
    reject_second,
    run_cli,
    stop,
    stop_signals,
)

SETTINGS_HELP = "Settings, as --name=value, are those of train.py: `python train.py --help` lists them."
MAX_VALUES = 10_000  # of one range: more is a typing error
ROUNDING = 1e-6  # of a doubling: so that the logarithms of a range's ends do not lose its last value


def command(main):
    """Decorates the main(argv) of a command, the last function of its module: runs it when the module is
    run as a program. main returns the exit code. SIGTERM, which Slurm and `kill` send, ends a command as
    Ctrl-C does."""
    if main.__module__ == "__main__":
        signal.signal(signal.SIGTERM, stop)
        run_cli(main)
    return main


@contextlib.contextmanager
def resumable(folder):
    """Within, what a signal stops ends with exit code 130 and a line that says how to go on."""
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if not stop_signals and not isinstance(error, KeyboardInterrupt):
            raise
        print(f"{folder}: stopped; run the same command again to resume")
        sys.exit(130)


def parse_options(argv, defaults, doc, takes_axes=False, takes_settings=True):
    """Splits the command line into (options, axes, words).

    options: `defaults`, {name: text, number or bool}, updated by the --name=value words that name one,
    once at most; --name alone sets a bool.
    axes: {setting: text} of the NAME=VALUES words, which are rejected unless the command takes_axes.
    words: all other words, in order: for configure(), unless the command takes no settings. --help prints
    `doc` and exits. Raises UserError.
    """
    if asks_for_help(argv):
        print(doc.strip(), *[SETTINGS_HELP] * takes_settings, sep="\n\n")
        sys.exit()
    given, axes, words, remaining = {}, {}, [], iter(argv)
    for word in remaining:
        name, equals, text = word.lstrip("-").partition("=")
        is_flag = word.startswith("-")
        if is_flag and name in defaults:
            if not equals and type(defaults[name]) is bool:  # --name
                text = "true"
            elif not equals:  # --name value
                text = next(remaining, "--")
                if text.startswith("--"):
                    raise UserError(f"{name} needs a value: --{name}=VALUE")
            reject_second(name, given)
            given[name] = parse_option(name, text, type(defaults[name]))
        elif is_flag and not takes_settings:
            advice = closest(name, defaults) or f"; there are --{', --'.join(defaults)}"
            raise UserError(f"{name}: no such option{advice}")
        elif is_flag and name not in SETTINGS:
            raise UserError(f"{name}: no such setting or option{advice_for(name, defaults)}")
        elif equals and not word.startswith("-"):
            if not takes_axes:
                raise UserError(f"{name} needs two dashes: --{word}")
            if name in axes:
                raise UserError(f"{name} must be listed once: {name}={axes[name]},{text}")
            axes[name] = text
        else:
            words.append(word)
    return defaults | given, axes, words


def parse_option(name, text, kind):
    """`text` as a command's own option: str (~ expanded), bool, int >= 1, float > 0. Raises UserError."""
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise UserError(f"{name} must be true or false, got {text!r}")
        return text.lower() in ("true", "1")
    if kind is str:
        return os.path.expanduser(text)
    if kind is int and not (text.isdecimal() and len(text) <= 100 and int(text)):
        raise UserError(f"{name} must be a whole number, 1 or more, got {text!r}")
    if kind is float:
        number = parse_value("lr", text)  # with arithmetic, as lr takes it
        if type(number) not in (int, float) or not 0 < number < math.inf:
            raise UserError(f"{name} must be a number above 0, got {text or 'nothing'}")
        return float(number)
    return kind(text)


def parse_values(name, text):
    """The values that `text` lists for the setting `name`: 1,2,5 or 2**-10..2**-6:2. Of settings that move
    together, "width,depth" and 64x2,128x4: a tuple for each item. Raises UserError."""
    if "," in name:
        return parse_tuples(name.split(","), text)
    values = []
    for item in text.split(","):
        if ".." in item.partition(":")[0]:
            values += parse_range(name, item)
        else:
            values.append(check_setting(name, parse_value(name, item)))
    return values


def parse_tuples(names, text):
    """[(value of each of `names`)] of 64x2,128x4. Raises UserError."""
    tuples = []
    for item in text.split(","):
        parts = item.split("x")
        if len(parts) != len(names):
            raise UserError(f"{','.join(names)} must be {'x'.join(map(str.upper, names))}, such as 64x2 for "
                            f"width,depth, got {item}")
        values = zip(names, parts, strict=True)
        tuples.append(tuple(check_setting(name, parse_value(name, part)) for name, part in values))
    return tuples


def parse_range(name, item):
    """The values of LOW..HIGH or LOW..HIGH:PER_DOUBLING, evenly spaced in log2. Raises UserError."""
    ends, _, density = item.partition(":")
    low_text, _, high_text = ends.partition("..")
    low, high = parse_value(name, low_text), parse_value(name, high_text)
    per_doubling = parse_value("lr", density or "1")  # a number, as lr is
    positive = all(type(x) in (int, float) and x > 0 for x in (low, high, per_doubling))
    if not positive or low > high:
        raise UserError(f"{name} must be LOW..HIGH or LOW..HIGH:PER_DOUBLING, all above 0, got {item!r}")
    last = per_doubling * (math.log2(high) - math.log2(low)) + ROUNDING
    if last >= MAX_VALUES:
        raise UserError(f"{name} must be a range of at most {MAX_VALUES:,} values, got {item}")
    try:
        values = [low * 2 ** (i / per_doubling) for i in range(math.floor(last) + 1)]
    except OverflowError:
        raise UserError(f"{name} must be a range of at most 1,000 doublings, got {item}") from None
    return [check_setting(name, value) for value in values]


def reject_unused(words, unused, command):
    """Raises UserError where a --name=value word names a setting in `unused`, which changes nothing there."""
    for word in words:
        name = word.lstrip("-").partition("=")[0]
        if word.startswith("-") and name in unused:
            raise UserError(f"{name} has no effect on {command}; remove --{name}")


def format_value(value):
    """A setting's value as the command line takes it; a power of two, such as most learning rates, as one."""
    if isinstance(value, float) and 0 < value < math.inf:
        eighths = 8 * math.log2(value)
        if abs(eighths - round(eighths)) < ROUNDING and not value.is_integer():
            return f"2**{round(eighths) / 8:g}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def make_folder(path):
    """Makes the folder `path` unless it exists. Raises UserError when it cannot be written."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: cannot write {path}: {error.strerror}") from None
