"""GPT-3 Small: 125 M parameters (Table 2.1)."""

from config.gpt3_recipe import *

width = 768
depth = 12
batch = 256  # sequences: 0.5 M tokens
lr = 6e-4
steps = 591_581  # 300 billion tokens
