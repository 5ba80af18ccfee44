"""GPT-3 6.7B: 6.7 B parameters (Table 2.1)."""

from config.gpt3_recipe import *

width = 4096
depth = 32
head_dim = 128
batch = 1024  # sequences: 2 M tokens
batch_ramp_tokens = 8 * 10**9
lr = 1.2e-4
steps = 157_562  # 300 billion tokens
