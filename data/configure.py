"""No settings: what `python data/prepare.py` finds in place of the project's configure.py, as
Python then looks for modules in this folder. It says how the commands here start."""

import os
import sys

name = os.path.basename(sys.argv[0]).removesuffix(".py")
print(f"{sys.argv[0]}: got a path, takes python -m data.{name}, in the project's folder", file=sys.stderr)
sys.exit(2)
