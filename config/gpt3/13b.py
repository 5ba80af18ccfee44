"""GPT-3 13B: 13.0 B parameters (Table 2.1)."""

from config.gpt3_recipe import *

width = 5120  # 5140 in the table, which 40 heads of 128 do not make
depth = 40
head_dim = 128
batch = 1024  # sequences: 2 M tokens
batch_ramp_tokens = 8 * 10**9
lr = 1e-4
steps = 157_562  # 300 billion tokens
