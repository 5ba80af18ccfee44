"""A target for two CPU cores, to try the way from a search to its target in 15 minutes, not a day. It is so
small that its search costs more than it does; a large one costs more than its search.

    python -m scaling search --target=config/small_target.py --trials=24 --workers=2
    python train.py config/small_target.py out/search/best.py
"""

from config.proxy import *

width, base_width = 256, 64  # the search tries settings at the base shape
base_depth = 2  # half of its own 4 blocks
context = 128  # tokens: copying from further back takes longer runs to learn
steps = 200
eval_every = checkpoint_every = 50
