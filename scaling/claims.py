"""Recompute each number that the READMEs claim, from the committed rows: python -m scaling.claims [NAME ...]

Prints what the rows say, and whether the document says the same. The claims are the functions of
scaling/results/claims.py; NAMEs are some of them. The exit code is 1 where a document and its rows differ.
"""

import difflib
import importlib.util
import re
from pathlib import Path

from configure import UserError, closest
from scaling.cli import command, parse_options

ROOT = Path(__file__).parent.parent


def load_claims(path=ROOT / "scaling/results/claims.py"):
    """{name: (document, function)} of the module at `path`: each function yields texts that must stand in the
    document, wherever its lines break."""
    spec = importlib.util.spec_from_file_location("claims_of_results", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CLAIMS


def read_document(name):
    return one_line((ROOT / name).read_text("utf-8"))


def one_line(text):
    """`text` with single spaces, so that line breaks do not matter."""
    return " ".join(text.split())


def nearest(text, document):
    """The passage of `document` that is most like `text`, which is not in it."""
    words, size = document.split(), len(text.split())
    passages = [" ".join(words[i:i + size]) for i in range(0, len(words), max(1, size // 4))]
    return max(passages, key=lambda passage: difflib.SequenceMatcher(None, text, passage).quick_ratio())


def uncovered(document, texts, settings):
    """The numbers with decimals in `document` that stand in none of `texts`, each with what is around it.
    Code, the addresses of links and what the patterns `settings` match are left out."""
    prose = re.sub(r"^```.*?^```", "", (ROOT / document).read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    prose = one_line(prose)
    for text in sorted(map(one_line, texts), key=len, reverse=True):
        prose = prose.replace(text, " ")
    for pattern in (r"`[^`]*`", r"\[[^]]*\]\([^)]*\)", *settings):
        prose = re.sub(pattern, " ", prose)
    return [prose[max(0, number.start() - 40):number.end() + 20]
            for number in re.finditer(r"\d+\.\d+", prose)]


@command
def main(argv):
    _, _, names = parse_options(argv, {}, __doc__, takes_settings=False)
    claims, differ = load_claims(), 0
    for name in names:
        if name not in claims:
            raise UserError(f"claims: {name} is no claim{closest(name, claims) or ''}; there are "
                            f"{', '.join(claims)}")
    for name in names or claims:
        document, function = claims[name]
        text = read_document(document)
        for recomputed in map(one_line, function()):
            if recomputed in text:
                print(f"ok       {name}: {recomputed}")
                continue
            differ += 1
            print(f"DIFFERS  {name}: the rows say", f"    {recomputed}",
                  f"{document} says, where it is nearest,", f"    {nearest(recomputed, text)}", sep="\n")
    print(f"{differ} texts differ from the rows" if differ else "Every text agrees with the rows.")
    return 1 if differ else 0
