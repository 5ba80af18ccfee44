"""GPT-3 175B, or GPT-3: 175.0 B parameters (Table 2.1)."""

from config.gpt3_recipe import *

width = 12288
depth = 96
head_dim = 128
batch = 1600  # sequences: 3.2 M tokens
batch_ramp_tokens = 12 * 10**9
lr = 0.6e-4
steps = 107_045  # 300 billion tokens
