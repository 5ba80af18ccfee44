"""GPT-3 XL: 1.3 B parameters (Table 2.1)."""

from config.gpt3_recipe import *

width = 2048
depth = 24
head_dim = 128  # 24 heads in the table do not make 2048 channels; 16 do
batch = 512  # sequences: 1 M tokens
batch_ramp_tokens = 6 * 10**9
lr = 2e-4
steps = 304_169  # 300 billion tokens
