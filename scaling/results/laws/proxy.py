"""The settings of the rows in this folder: those of config/proxy.py when they were measured, at twice its
batch."""

batch, base_batch = 16, 8  # sequences of 256 tokens: lr is that of the proxy times the square root of 2
head_dim = base_head_dim = 32  # so that models of width 32 are of the family

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
