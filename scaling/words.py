"""What the command lines of scaling have in common."""

import math
import os
import sys

from configure import UserError, check, parse

MANY = 10_000  # values of one setting: more is a slip


def words_of(argv, own, doc, axes=None):
    """The words that are for configure. `own` takes the --name=value that it has; `axes`, where there may be
    some, the {name: text} of NAME=VALUES words. --help prints `doc` and exits. Raises UserError."""
    if {"-h", "--help"} & {*argv}:
        sys.exit(print(doc.strip()))
    words = []
    for word in argv:
        name, equals, text = word.lstrip("-").partition("=")
        if equals and word.startswith("--") and name in own:
            if type(own[name]) is int and not (text.isdigit() and int(text)):
                raise UserError(f"{name}: got {text!r}, takes a whole number, 1 or more")
            own[name] = type(own[name])(text)
        elif equals and not word.startswith("-"):
            if axes is None:
                raise UserError(f"{name}: got {word}, takes --{word}")
            if name in axes:
                raise UserError(f"{name}: got {axes[name]} and {text}, takes {axes[name]},{text}")
            axes[name] = text
        else:
            words.append(word)
    return words


def values(name, text):
    """The values that `text` lists for the setting `name`. Raises UserError."""
    found = []
    for item in text.split(","):
        ends, _, density = item.partition(":")
        low, dots, high = (parse(name, end) for end in ends.partition(".."))
        if not dots:
            found.append(check(name, parse(name, item)))
            continue
        density = parse("lr", density or "1")
        if not all(type(x) in (int, float) and x > 0 for x in (low, high, density)) or low > high:
            raise UserError(f"{name}: got {item!r}, takes LOW..HIGH or LOW..HIGH:PER_DOUBLING, all above 0")
        if (last := density * (math.log2(high) - math.log2(low)) + 1e-6) >= MANY:
            raise UserError(f"{name}: got {item}, takes a range of at most {MANY:,} values")
        found += [check(name, low * 2 ** (i / density)) for i in range(math.floor(last) + 1)]
    return found


def make_folder(path):
    """The folder at `path`, made if need be. Raises UserError."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: cannot write {path}: {error.strerror}") from None
    return path
