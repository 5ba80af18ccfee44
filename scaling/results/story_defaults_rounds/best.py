"""The best of 63 random trials at width 128, depth 4.

Validation loss 4.7235, the mean of 3 seeds from 4.7170 to 4.7285.
"""

base_width = 128
base_depth = 4
base_head_dim = 64
base_batch = None
base_tokens = None
parametrization = 'mup'
depth_alpha = 1.0
lr = 0.0027621358640099515
embedding_lr_mult = 32.0
readout_lr_mult = 8.0
norm_lr_mult = 0.1
embedding_std = 1.0
hidden_std = 1.0
readout_std = 0.25
zero_residual_out = True
zero_query = False
embedding_mult = 1.0
logit_mult = 0.5
attention_mult = 0.5
weight_decay = 0.0
beta1 = 0.8
beta2 = 0.98
eps = 1e-08
grad_clip = 1.0
warmup = 0.1
schedule = 'cosine'
final_lr = 0.1
