"""GPT-3 Large: 760 M parameters (Table 2.1)."""

from config.gpt3_recipe import *

width = 1536
depth = 24
head_dim = 96
batch = 256  # sequences: 0.5 M tokens
lr = 2.5e-4
steps = 591_581  # 300 billion tokens
