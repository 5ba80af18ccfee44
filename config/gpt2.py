"""GPT-2's smallest shape on web text, with the proxy's settings. It takes GPUs and days, not minutes.

Settings transfer over width and depth. Batch, context and the number of steps are far from the proxy's here,
and nothing is proven over those: for an expensive run, sweep lr around its value first.
"""

from config.gpt2_proxy import *

width, depth = 768, 12  # 12 heads of 64
context = 1024  # tokens
vocab_size = 50304  # 50257 rounded up to a multiple of 64: faster matrix products
dataset = "HuggingFaceFW/fineweb-edu"  # educational web pages, streamed from the hub
subset = "sample-10BT"
tokenizer = "gpt2"
max_tokens = 2_500_000_000  # 5 GB on disk; the download stops there
val_fraction = 0.002  # 5 M tokens are enough to measure on
batch = 480  # 491,520 tokens a step, as GPT-2's successors use
micro_batch = 32  # sequences a pass: what 80 GB hold with room to spare
steps = 5000  # 2.5 B tokens, 20 for each parameter
eval_every = 250
eval_tokens = 2**20
