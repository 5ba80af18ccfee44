"""GPT-3's recipe in two minutes on two CPU cores: the proxy's size, the standard library's text.

The batch is at its full size after a quarter of the tokens, as compressed in time as all else here.
"""

from config.gpt3_recipe import *

context, window = 256, 64  # tokens
vocab_size = subset = None
dataset, tokenizer, val_fraction = "stdlib", "bpe:2048", 0.05
batch, batch_start = 16, 2  # sequences
batch_ramp_tokens = 250_000
warmup_tokens = 25_000
decay_tokens = 900_000
steps = 365  # 1 M tokens
lr = 4e-3
eval_every = checkpoint_every = 100
eval_tokens = 65536
