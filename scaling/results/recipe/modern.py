"""An earlier best of 230 trials with the default block, 500 steps of 16: 3.568 nats over 3 seeds, H100."""

batch = 16
depth_alpha = 0.8
lr = 0.005524271728019903
embedding_lr_mult = 21.0
readout_lr_mult = 2.4
norm_lr_mult = 0.13
embedding_std = 0.63
hidden_std = 0.69
readout_std = 0.18
zero_residual_out = True
logit_mult = 1.16
attention_mult = 1.44
weight_decay = 0.03
beta1 = 0.8
beta2 = 0.99
grad_clip = 0.5
steps = 500
