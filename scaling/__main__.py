"""The commands of scaling/: python -m scaling lists them."""

import ast
from pathlib import Path

from configure import run_cli


def commands():
    """{name: the first sentence of its docstring} of the modules here that are commands."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        source = path.read_text("utf-8")
        if "\n    run_cli(main)" in source:
            docstring = ast.get_docstring(ast.parse(source)).partition("\n\n")[0]
            found[path.stem] = " ".join(docstring.split(" python -m")[0].rstrip(":").split())
    return found


def main(argv):
    for name, sentence in commands().items():
        print(f"python -m scaling.{name:20}{sentence}")
    print("Each says more with --help.")


if __name__ == "__main__":
    run_cli(main)
