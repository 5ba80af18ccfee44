"""GPT-3 2.7B: 2.7 B parameters (Table 2.1)."""

from config.gpt3_recipe import *

width = 2560
depth = 32
head_dim = 80
batch = 512  # sequences: 1 M tokens
batch_ramp_tokens = 6 * 10**9
lr = 1.6e-4
steps = 304_169  # 300 billion tokens
