"""Continue from trained weights on another text, which --dataset names.

Shape, tokenizer and optimizer settings come with the weights, and so does lr: the run's own, or 5e-5 for a
Hugging Face model. Of 1, 0.3, 0.1, 0.03 and 0.01 times that, 1 was best for a small proxy and 100 steps.
"""

import config  # tells who runs this file itself to run train.py with it

init_from = "out/proxy"  # what config/proxy.py trained; or another run, gpt2, a Hugging Face model
batch = 16  # sequences
steps = 300  # a few passes over a book
warmup = 0.05
eval_every = 100  # the first time before the first step: what the weights know of the new text
checkpoint_every = 100
