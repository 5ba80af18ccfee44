"""The best of 96 trials at width 128, depth 4, 500 steps of 16x256 tokens.

Validation loss 3.2607 ± 0.0106, the mean of 3 seeds that no draw used.
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
lr = 0.07696
embedding_lr_mult = 6.0
readout_lr_mult = 1.385
norm_lr_mult = 0.3
embedding_std = 0.1814
hidden_std = 0.08141
readout_std = 0.1872
zero_residual_out = True
zero_query = False
embedding_mult = 1.0
logit_mult = 0.211
attention_mult = 1.119
weight_decay = 0.04216
beta1 = 0.90257
beta2 = 0.995
eps = 1e-08
momentum = 0.95
grad_clip = 0.137
warmup = 0.05852
schedule = 'linear'
final_lr = 0.1
decay_fraction = 0.2
