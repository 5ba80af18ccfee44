"""The best of 56 random trials at width 128, depth 4.

Validation loss 4.6779, the mean of 3 seeds from 4.6720 to 4.6893.
"""

base_width = 128
base_depth = 4
base_head_dim = 64
base_batch = None
base_tokens = None
parametrization = 'mup'
depth_alpha = 1.0
lr = 0.006195523055519575
embedding_lr_mult = 16.0
readout_lr_mult = 4.0
norm_lr_mult = 0.1
embedding_std = 1.0
hidden_std = 1.0
readout_std = 0.5
zero_residual_out = True
zero_query = True
embedding_mult = 1.0
logit_mult = 1.0
attention_mult = 0.5
weight_decay = 0.03
beta1 = 0.8
beta2 = 0.99
eps = 1e-08
grad_clip = 0.5
warmup = 0.05
schedule = 'cosine'
final_lr = 0.1
