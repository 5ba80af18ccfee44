"""config/muon.py with smear and value embeddings. Such a run cannot be exported to Hugging Face.

No class of transformers computes either, so interop.export refuses it. Value embeddings add vocab_size x
width parameters for every second block, and next to no computation. The other settings are config/muon.py's,
not tuned again.
"""

from config.muon import *

smear = True
value_embeddings = True
