"""What the eight sizes of GPT-3 in config/gpt3 share: arXiv 2005.14165, section 2 and appendix B.

Its Adam (0.9, 0.95, 1e-8), clipping at 1 and cosine to a tenth are this project's defaults. The paper does
not give the text, the width of the attention bands, the length of each ramp, or the initial weights.
"""

import config  # tells who runs this file itself to run train.py with it

parametrization = "sp"  # each size has its own lr in Table 2.1
position, norm, qk_norm, mlp = "learned", "layer", False, "gelu"  # GPT-2's block
tied = bias = True
context = 2048  # tokens
window = 256  # tokens: "alternating dense and locally banded"; the paper does not say how wide
vocab_size = 50304  # 50257 rounded up to a multiple of 64: faster matrix products
batch_start = 16  # sequences: 32 k tokens
batch_ramp_tokens = 4 * 10**9  # "over the first 4-12 billion tokens of training, depending on the model size"
warmup_tokens = 375 * 10**6
decay_tokens = 260 * 10**9  # of 300 billion; the rest is trained at a tenth of lr
weight_decay = 0.1
dataset = "HuggingFaceFW/fineweb-edu"  # not GPT-3's text, which is not public
subset = "sample-350BT"
tokenizer = "gpt2"
val_fraction = 0.0001
eval_every = checkpoint_every = 1000
eval_tokens = 2**20
