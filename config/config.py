"""Not a preset: what a preset imports when it is run itself, as by `python config/proxy.py`."""

import sys

print(f"error: {sys.argv[0]} only holds settings; try: python train.py {sys.argv[0]}", file=sys.stderr)
sys.exit(2)
