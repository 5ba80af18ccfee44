"""GPT-3 Medium: 350 M parameters (Table 2.1)."""

from config.gpt3_recipe import *

width = 1024
depth = 24
batch = 256  # sequences: 0.5 M tokens
lr = 3e-4
steps = 591_581  # 300 billion tokens
