"""Go on from trained weights on other text: give --init_from (a run, a Hugging Face model) and --dataset.

Shape, tokenizer and optimizer come with the weights, and so does lr: a tenth of a run's own, or 5e-5.
"""

batch = 16  # sequences
steps = 300  # a few passes over a book
warmup = 0.05
eval_every = 100  # the first time before the first step: what the weights know of the new text
checkpoint_every = 100
