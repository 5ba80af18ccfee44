"""python -m scaling COMMAND ... runs a command of the lab; python -m scaling.COMMAND does the same."""

import ast
import importlib
from pathlib import Path

from configure import UserError, closest
from scaling.cli import command

SHORT_NAMES = {"coordinate_check": "check"}


def commands():
    """{name: (its module, the first sentence of the module's docstring)} of the commands in this folder."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        source = path.read_text("utf-8")
        if "\n@command\ndef main(argv):" in source:
            docstring = ast.get_docstring(ast.parse(source)).partition("\n\n")[0]
            sentence = " ".join(docstring.split(" python -m")[0].rstrip(":").split())
            found[SHORT_NAMES.get(path.stem, path.stem)] = path.stem, sentence
    return found


@command
def main(argv):
    found = commands()
    if not argv or argv[0] in ("-h", "--help"):
        for name, (_, sentence) in found.items():
            print(f"python -m scaling {name:12}{sentence}")
        print("Each says more with --help.")
        return 0
    name = SHORT_NAMES.get(argv[0], argv[0])
    if name not in found:
        advice = closest(name, found) or "; `python -m scaling` lists them"
        raise UserError(f"scaling: {argv[0]} is not a command{advice}")
    return importlib.import_module(f"scaling.{found[name][0]}").main(argv[1:])
