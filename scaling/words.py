"""What the command lines of scaling have in common."""

import math
import sys

from configure import UserError, check, parse


def words_of(argv, own, doc):
    """(words for configure, {name: text} of NAME=VALUES words); `own` takes the --name=value it has. --help
    prints `doc` and exits. Raises UserError."""
    if {"-h", "--help"} & {*argv}:
        sys.exit(print(doc.strip()))
    words, axes = [], {}
    for word in argv:
        name, equals, text = word.lstrip("-").partition("=")
        if equals and word.startswith("--") and name in own:
            if type(own[name]) is int and not (text.isdigit() and int(text)):
                raise UserError(f"{name}: got {text!r}, takes a whole number, 1 or more")
            own[name] = type(own[name])(text)
        elif equals and not word.startswith("-"):
            axes[name] = text
        else:
            words.append(word)
    return words, axes


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
        count = math.floor(density * math.log2(high / low) + 1e-6)
        found += [check(name, low * 2 ** (i / density)) for i in range(count + 1)]
    return found
