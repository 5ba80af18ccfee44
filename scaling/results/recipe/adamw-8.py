"""The best of 96 trials at width 128, depth 4, 1000 steps of 8x256 tokens.

Validation loss 3.5271 ± 0.0035, the mean of 3 seeds that no draw used.
Found by scaling.search: sampler gp, seed 0, 96 draws and 26 trials for seeds and lr, 1.97e+15 FLOPs;
data set the standard library, tokenizer 'bpe:2048'.
"""

base_width = 128
base_depth = 4
base_head_dim = 64
base_batch = None
base_tokens = None
parametrization = 'mup'
depth_alpha = 0.8
lr = 0.005083
embedding_lr_mult = 24.44
readout_lr_mult = 2.748
norm_lr_mult = 0.1498
embedding_std = 0.5067
hidden_std = 0.4883
readout_std = 0.1706
zero_residual_out = True
zero_query = False
embedding_mult = 1.0
logit_mult = 1.148
attention_mult = 1.494
weight_decay = 0.009658
beta1 = 0.7645
beta2 = 0.98697
eps = 1e-08
momentum = 0.95
grad_clip = 0.7437
warmup = 0.08982
schedule = 'linear'
final_lr = 0.02986
decay_fraction = 0.2
