"""Text to tokens to batches.

sources and documents read text, encodings are the tokenizers, tokens writes token files, folders keeps
them whole, vocabulary and batches read them, feed brings them to the device; prepare is the command line.
What a run needs of the machine and keeps on it: processes, devices, updates, runs, checkpoints, alarms.
"""

from data.batches import Data
from data.folders import prepare

__all__ = ["Data", "prepare"]
