"""The proxy: a small model that trains in minutes on two CPU cores. Its settings carry over to larger ones.

It has the default block. The settings are the best of 96 trials of scaling.search, which began at the best of
230 earlier ones, at this shape and 1,000 steps: 3.527 nats, the mean of 3 seeds on a GPU.
"""

import config  # tells who runs this file itself to run train.py with it

batch = base_batch = 8  # sequences of 256 tokens; a larger batch gets a larger lr, by the square root
steps = 1400  # 2.9 M tokens: the standard library once
eval_every = checkpoint_every = 280  # steps: five looks at the falling loss, 30 s of work lost at most

lr = 2**-7.6
embedding_lr_mult = 24.4  # rows of rare tokens see few gradients
readout_lr_mult = 2.75
norm_lr_mult = 0.15
embedding_std, hidden_std, readout_std = 0.5, 0.49, 0.17
zero_residual_out = True  # every block starts as the identity
logit_mult = 1.15
attention_mult = 1.5  # sharper than 1/sqrt(head_dim): normalized queries and keys have a fixed length
weight_decay = 0.01
beta1, beta2 = 0.765, 0.987  # a run this short must react fast
warmup = 0.09
schedule, final_lr = "linear", 0.03
grad_clip = 0.75
