"""The target: 8 times wider and 4 times deeper than the proxy, with the same settings.

For a GPU: on two CPU cores the search of its settings alone takes a day (`search --plan` says how long).
"""

from config.proxy import *

width = 1024  # 8 x base_width
depth = 16  # 4 x base_depth
head_dim = 128  # at width 768 better than 64 in each of five pairs of runs, by 0.01 to 0.10 nats
sample_tokens = 400  # it has more to say
