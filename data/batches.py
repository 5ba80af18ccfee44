"""Tokens to batches: a prepared folder, opened for training and evaluation."""

import functools
import json
import mmap
import os

import numpy as np
import torch

from configure import UserError
from data import encodings
from data.vocabulary import Vocabulary

DTYPES = {"u2": np.dtype("<u2"), "u4": np.dtype("<u4")}


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, windows, phases):
    """(phase, permutation of the windows) of one epoch; phase is the first window's first token."""
    random = np.random.default_rng((seed, epoch))
    order = np.arange(windows, dtype=np.uint32 if windows < 2**32 else np.uint64)
    random.shuffle(order)  # in place, for files of 10**10 tokens
    return int(random.integers(phases)), order


class Data(Vocabulary):
    """A prepared folder. `train` and `val` are memory-mapped token arrays; `meta` is its meta.json.

    Raises UserError when the folder is damaged.
    """

    def __init__(self, folder):
        self.folder = folder
        try:
            with open(os.path.join(folder, "meta.json"), encoding="utf-8") as file:
                self.meta = json.load(file)
            self.vocab_size = self.meta["vocab_size"]
            if not 0 < self.vocab_size <= 2 ** (8 * DTYPES[self.meta["dtype"]].itemsize):
                raise ValueError(f"vocab_size is {self.vocab_size}")
            self.train, self.val = self._open("train"), self._open("val")
            self.eot = self.meta["tokenizer"]["special_tokens"][encodings.END]
            dict(self.meta["settings"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._damaged(error) from None

    def _open(self, split):
        path, tokens = os.path.join(self.folder, f"{split}.bin"), self.meta[split]["tokens"]
        dtype = DTYPES[self.meta["dtype"]]
        if os.path.getsize(path) != tokens * dtype.itemsize:
            raise ValueError(f"{split}.bin has {os.path.getsize(path)} bytes, not {tokens * dtype.itemsize}")
        return np.memmap(path, dtype, mode="r")

    def _known(self, tokens):
        if tokens.max() >= self.vocab_size:
            raise self._damaged(ValueError(f"token {tokens.max()} in a vocabulary of {self.vocab_size}"))
        return np.asarray(tokens)

    def check(self, context, batch):
        """Raises UserError when the training tokens do not fill one batch."""
        needed, there = batch * context + 1, len(self.train)
        if there < needed:
            rows, length = max(1, (there - 1) // context), min(context, there - 1)
            raise UserError(f"batch: got {batch} at context={context}, which needs {needed} training tokens; "
                            f"there are {there}: takes --batch={rows} --context={length}, or more text")

    def batch(self, seed, step, batch, context, rows=slice(None)):
        """(tokens_BT, targets_BT), int64, of optimizer step `step`: a pure function of the arguments. A range
        of steps gives a leading dimension.

        The training stream is a list of sequences; a step has numbers step * batch to (step + 1) * batch - 1
        of them, and `rows` takes some of these. An epoch of the stream is every window of `context` tokens
        once, in an order and from a first token that are drawn from (seed, epoch).
        """
        length = len(self.train)
        windows = max(1, (length - 1) // context - 1)  # one fewer than fit, so that the first token can move
        epochs, places = np.divmod(np.expand_dims(step, -1) * batch + np.arange(batch)[rows], windows)
        starts = np.empty_like(places)
        for epoch in np.unique(epochs):
            phase, order = epoch_order(seed, int(epoch), windows, min(context, length - windows * context))
            here = epochs == epoch
            starts[here] = phase + order[places[here]].astype(np.int64) * context
        window = self._known(self.train[starts[..., None] + np.arange(context + 1)]).astype(np.int64)
        if isinstance(self.train.base, mmap.mmap):  # else a long run comes to hold the whole file
            self.train.base.madvise(mmap.MADV_DONTNEED)
        return torch.from_numpy(window[..., :-1].copy()), torch.from_numpy(window[..., 1:].copy())

    def windows(self, context, eval_tokens):
        """Validation windows, tokens of shape (n, context + 1), spread evenly; no token is a target twice.

        n is as many whole windows as eval_tokens and the split hold. Raises UserError when that is none.
        """
        there, room = (len(self.val) - 1) // context, eval_tokens // context
        if not room:
            raise UserError(f"eval_tokens: got {eval_tokens}, takes context={context} or more")
        if there < 1:
            raise UserError(f"context: got {context}, but {self.folder} has {len(self.val)} validation "
                            f"tokens; takes {len(self.val) - 1}, more text or a larger --val_fraction")
        n = min(there, room)
        starts = np.arange(n) * there // n * context
        return self._known(self.val[starts[:, None] + np.arange(context + 1)])
