"""The target: 8 times wider and 4 times deeper than the proxy, with the same settings. For a GPU."""

from config.proxy import *

width = 1024  # 8 x base_width
depth = 16  # 4 x base_depth
sample_tokens = 400  # it has more to say
