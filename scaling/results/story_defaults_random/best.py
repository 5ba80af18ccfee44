"""The best of 58 random trials at width 128, depth 4.

Validation loss 4.7183, the mean of 3 seeds from 4.7088 to 4.7278.
"""

base_width = 128
base_depth = 4
base_head_dim = 64
base_batch = None
base_tokens = None
parametrization = 'mup'
depth_alpha = 1.0
lr = 0.011048543456039806
embedding_lr_mult = 32.0
readout_lr_mult = 4.0
norm_lr_mult = 1.0
embedding_std = 1.0
hidden_std = 1.0
readout_std = 2.0
zero_residual_out = True
zero_query = False
embedding_mult = 1.0
logit_mult = 1.0
attention_mult = 1.0
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.95
eps = 1e-08
grad_clip = 1.0
warmup = 0.1
schedule = 'cosine'
final_lr = 0.1
