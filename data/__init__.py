"""Text to tokens to batches.

sources and documents read text, encodings are the tokenizers, tokens writes token files, folders keeps
them whole, batches reads them; prepare is the command line.
"""

from data.batches import Data
from data.folders import prepare

__all__ = ["Data", "prepare"]
