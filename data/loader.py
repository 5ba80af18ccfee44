"""Token files to batches: a prepared folder, opened for training and evaluation; batches are prefetched.

Dimensions: B sequences in a batch or a pass, T tokens in a sequence.
"""

import contextlib
import functools
import hashlib
import json
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from configure import UserError
from data.files import write_text
from data.tokenizer import END_OF_TEXT, TOKENIZER_FILE, read_tokenizer

DTYPES = {"u2": np.dtype("<u2"), "u4": np.dtype("<u4")}
CHECKED = "checked.json"  # {token file: [bytes, time stamp in ns]} at which its sha256 was right
PREFETCH_TOKENS = 2**19  # about as many of a rank's tokens are gathered at once, and held ahead
MIXED = 1000  # sequences of a mixture in which each data set has exactly its share


def read_meta(folder):
    """meta.json of a prepared folder, or what else that file holds. Raises OSError and ValueError."""
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as file:
            return json.load(file)
    except RecursionError:
        raise ValueError("meta.json is nested too deeply") from None


@functools.lru_cache(maxsize=8)  # a chunk of steps can reach into the next epoch; mixtures have several
def epoch_order(seed, epoch, windows, phases):
    """(phase, order) of an epoch: its first token, from 0 to phases - 1, and a permutation of its windows."""
    generator = np.random.default_rng((seed, epoch))
    order = np.arange(windows, dtype=np.uint32 if windows < 2**32 else np.uint64)
    generator.shuffle(order)  # in place: a file may hold 10**10 tokens
    return int(generator.integers(phases)), order


def apportion(total, weights):
    """Whole numbers that sum to `total` and are as near to the proportions of `weights` as can be."""
    exact = np.array(weights) * (total / sum(weights))
    counts = np.floor(exact).astype(int)
    largest_remainders = np.argsort(counts - exact, kind="stable")[:total - counts.sum()]
    counts[largest_remainders] += 1
    return counts


def stamp(path):
    """What tells without reading a file whether it was changed: [bytes, time stamp in ns]."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def check_sha256(folder, hashes, everything=False):
    """Compare token files with their sha256, {file name: sha256}: those that have changed since the last
    time, by their stamp, or `everything`. Raises ValueError where one differs, and OSError."""
    path = os.path.join(folder, CHECKED)
    try:
        with open(path, encoding="utf-8") as file:
            checked = dict(json.load(file))
    except (OSError, ValueError, TypeError, RecursionError):
        checked = {}  # a folder of an earlier version, or a copy
    stamps = {name: stamp(os.path.join(folder, name)) for name in hashes}
    for name, sha256 in hashes.items():
        if everything or checked.get(name) != stamps[name]:
            with open(os.path.join(folder, name), "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise ValueError(f"{name} does not match its sha256")
    if checked != stamps:
        with contextlib.suppress(OSError):  # a folder that cannot be written is checked each time
            write_text(path, json.dumps(stamps))


class TokenDataset:
    """A prepared folder. `train` and `val` are memory-mapped token arrays; `meta` is its meta.json; `eot` the
    id of the end of text; `hashes` the sha256 of what is trained on, {"train", "val", "tokenizer"}.

    A mixture has no arrays, but `parts`, the TokenDatasets that it mixes, and their `shares` of MIXED
    sequences. Raises UserError when the folder is damaged or cannot be read. verify: look at every byte, not
    only where a file's size or time stamp has changed since the last look.
    """

    def __init__(self, folder, verify=False):
        self.folder, self.parts = folder, []
        with self._errors_reported():
            self.meta = read_meta(folder)
            self.vocab_size = self.meta["vocab_size"]
            if type(self.vocab_size) is not int or not 0 < self.vocab_size <= 2**32:
                raise ValueError(f"vocab_size is {self.vocab_size!r}")
            self.eot = self.meta["tokenizer"]["special_tokens"][END_OF_TEXT]
            if type(self.eot) is not int or not 0 <= self.eot < self.vocab_size:
                raise ValueError(f"end of text: token {self.eot!r} in a vocabulary of {self.vocab_size}")
            self.hashes = {name: self.meta[name]["sha256"] for name in ("train", "val", "tokenizer")}
            dict(self.meta["settings"])  # prepare reads it
            if "parts" in self.meta:
                self._open_parts(verify)
            else:
                self._open_splits(verify)
        if verify:
            self.tokenizer  # noqa: B018  it compares its file's sha256 when it is loaded

    @contextlib.contextmanager
    def _errors_reported(self):
        """Raises UserError for a folder that cannot be read, or is not what prepare wrote."""
        try:
            yield
        except UserError:
            raise
        except OSError as error:
            path = error.filename or self.folder
            if os.path.exists(self.folder) and not os.path.exists(path):
                raise self._damaged(f"{os.path.basename(path)} is missing") from None
            raise UserError(f"data_dir: cannot read {path} ({error.strerror})") from None
        except Exception as error:  # of `tokenizers` too
            reason = " ".join(str(error).split()) or "no reason given"
            raise self._damaged(f"{type(error).__name__}: {reason}") from None

    def _damaged(self, reason):
        return UserError(f"data_dir: {self.folder} is damaged ({reason}); move that folder away, and it will "
                         "be prepared again")

    def _open_splits(self, verify):
        dtype = DTYPES[self.meta["dtype"]]
        if self.vocab_size > 2 ** (8 * dtype.itemsize):
            raise ValueError(f"vocab_size is {self.vocab_size!r}")
        self.train, self.val = self._open_split("train", dtype), self._open_split("val", dtype)
        check_sha256(self.folder, {f"{split}.bin": self.hashes[split] for split in ("train", "val")}, verify)

    def _open_split(self, split, dtype):
        path = os.path.join(self.folder, f"{split}.bin")
        size, expected_size = os.path.getsize(path), self.meta[split]["tokens"] * dtype.itemsize  # bytes
        if size != expected_size:
            raise ValueError(f"{split}.bin has {size} bytes, not {expected_size}")
        return np.memmap(path, dtype, mode="r")

    def _open_parts(self, verify):
        for part in self.meta["parts"]:
            dataset = TokenDataset(os.path.normpath(os.path.join(self.folder, part["folder"])), verify)
            if dataset.hashes != part["hashes"] or dataset.parts:
                raise ValueError(f"{dataset.folder} is not what was mixed")
            self.parts.append(dataset)
        self.shares = apportion(MIXED, [part["weight"] for part in self.meta["parts"]])

    def _check_tokens(self, tokens):
        """`tokens` as a plain array. Raises UserError when one is outside the vocabulary."""
        if tokens.max() >= self.vocab_size:
            raise self._damaged(f"ValueError: token {tokens.max()} in a vocabulary of {self.vocab_size}")
        return np.asarray(tokens)

    @functools.cached_property
    def tokenizer(self):
        """The folder's Tokenizer, loaded when it is first used. Raises UserError when it is damaged."""
        with self._errors_reported():
            saved = self.meta["tokenizer"]
            if "pattern" not in saved:  # which older versions kept, beside another file
                with open(os.path.join(self.folder, TOKENIZER_FILE), "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != saved["file_sha256"]:
                        raise ValueError(f"{TOKENIZER_FILE} does not match its sha256")
            tokenizer = read_tokenizer(self.folder)
            if tokenizer.vocab_size != self.vocab_size:
                raise ValueError(f"a tokenizer of {tokenizer.vocab_size} tokens for {self.vocab_size}")
            return tokenizer

    @property
    def train_tokens(self):
        """Training tokens, of all parts of a mixture together."""
        return sum(part.train_tokens for part in self.parts) if self.parts else len(self.train)

    def describe(self):
        """What there is to train on, for people."""
        text = f"{self.folder}: {self.train_tokens:,} training tokens, vocabulary {self.vocab_size:,}"
        max_tokens = self.meta["settings"].get("max_tokens")
        if max_tokens is not None:
            text += (f"\nmax_tokens={max_tokens:,}: the validation windows are spread over that text, so "
                     "compare losses of the same max_tokens")
        return text

    def describe_epochs(self, tokens):
        """How often training on this many tokens goes through the text, for people."""
        if not self.parts:
            return f"{tokens / len(self.train):.2f} epochs"
        names = [part["dataset"] for part in self.meta["parts"]]
        return ", ".join(f"{share / MIXED * tokens / part.train_tokens:.2f} epochs of {name}"
                         for name, share, part in zip(names, self.shares, self.parts, strict=True))

    def check_fills_batch(self, context, batch):
        """Raises UserError when the training tokens do not fill one batch; of a mixture, when those of a part
        do not fill one sequence."""
        for part in self.parts:
            part.check_fills_batch(context, 1)
        needed, available = batch * context + 1, self.train_tokens
        if available < needed:
            fitting_batch = max(1, (available - 1) // context)
            fitting_context = min(context, available - 1)
            raise UserError(f"batch x context + 1 must be at most {available}, the training tokens of "
                            f"{self.folder}, got {needed}; try --batch={fitting_batch} "
                            f"--context={fitting_context}, or more text")

    def batch(self, seed, step, batch, context, rows=slice(None), first=0):
        """(tokens_BT, targets_BT), int64, of optimizer step `step`: a pure function of the arguments.

        The training stream is a list of sequences; step s has `batch` of them, from number first + s * batch
        on, and `rows`, a slice, selects some of these. An epoch of the stream is every window of `context`
        tokens once, in an order and from a first token that are drawn from (seed, epoch). A range of steps in
        place of `step` adds a leading dimension. Raises UserError for tokens outside the vocabulary.

        The stream of a mixture takes its sequences from the streams of its parts, each in its own order: of
        every MIXED sequences each part has exactly its share, at places that are drawn from the seed.
        """
        numbers = first + np.expand_dims(step, -1) * batch + np.arange(batch)[rows]  # in the stream
        windows = self._windows(seed, numbers, context)
        return torch.from_numpy(windows[..., :-1].copy()), torch.from_numpy(windows[..., 1:].copy())

    def _windows(self, seed, numbers, context):
        """Sequences of the stream by their `numbers`, (..., context + 1) int64: inputs and targets in one."""
        if self.parts:
            return self._mixed_windows(seed, numbers, context)
        starts = self._window_starts(seed, numbers, context)
        windows = self._check_tokens(self.train[starts[..., None] + np.arange(context + 1)]).astype(np.int64)
        if isinstance(self.train.base, mmap.mmap):  # else the process comes to hold the whole file in memory
            self.train.base.madvise(mmap.MADV_DONTNEED)
        return windows

    def _mixed_windows(self, seed, numbers, context):
        windows = np.empty((*numbers.shape, context + 1), np.int64)
        rounds, places = np.divmod(numbers, MIXED)
        for number in np.unique(rounds):
            # Each place of a round draws a card; the first shares[0] cards are part 0's, and so on
            cards = epoch_order(seed, int(number), MIXED, 1)[1].astype(np.int64)[places]
            end = 0
            for part, share in zip(self.parts, self.shares, strict=True):
                start, end = end, end + share
                mine = (rounds == number) & (start <= cards) & (cards < end)
                if mine.any():
                    windows[mine] = part._windows(seed, number * share + cards[mine] - start, context)
        return windows

    def _window_starts(self, seed, numbers, context):
        """The first token's place of each of these sequences, int64, in the shape of `numbers`."""
        length = len(self.train)
        windows = max(1, (length - 1) // context - 1)  # one fewer than fit, so that the first token can vary
        phases = min(context, length - windows * context)
        epochs, positions = np.divmod(numbers, windows)
        starts = np.empty_like(positions)
        for epoch in np.unique(epochs):
            phase, order = epoch_order(seed, int(epoch), windows, phases)
            in_epoch = epochs == epoch
            starts[in_epoch] = phase + order[positions[in_epoch]].astype(np.int64) * context
        return starts

    def validation_windows(self, context, eval_tokens):
        """Validation windows, tokens of shape (n, context + 1), spread evenly; no token is a target twice.

        n is as many whole windows as eval_tokens and the split hold. Of a mixture each part has its share of
        the windows, so that their mean loss is that of the mixture. Raises UserError when there are none.
        """
        wanted = eval_tokens // context
        if wanted < max(1, len(self.parts)):
            raise UserError(f"eval_tokens must be at least context ({context}), of a mixture for each of its "
                            f"data sets, got {eval_tokens}")
        if not self.parts:
            return self._spread_windows(context, min(wanted, self._available_windows(context)))
        available = np.array([part._available_windows(context) for part in self.parts])
        wanted = min(wanted, *(available * MIXED // self.shares))
        counts = apportion(wanted, self.shares).clip(1, available)
        return np.concatenate([part._spread_windows(context, n)
                               for part, n in zip(self.parts, counts, strict=True)])

    def _available_windows(self, context):
        """Validation windows that there are. Raises UserError when that is none."""
        available = (len(self.val) - 1) // context
        if available < 1:
            raise UserError(f"context must be at most {len(self.val) - 1}, as {self.folder} has "
                            f"{len(self.val)} validation tokens, got {context}; try more text, or a larger "
                            "--val_fraction")
        return available

    def _spread_windows(self, context, n):
        starts = np.arange(n) * self._available_windows(context) // n * context
        return self._check_tokens(self.val[starts[:, None] + np.arange(context + 1)])

    def target_bytes(self, windows):
        """UTF-8 bytes of the windows' targets, by which bits per byte divide; the end of text has 0."""
        return int(self.tokenizer.byte_lengths[windows[:, 1:]].sum())


def with_vocab_size(config, dataset):
    """`config` with the number of rows that its model's embedding and readout have. Raises UserError."""
    vocab_size = config.vocab_size or dataset.vocab_size
    if vocab_size < dataset.vocab_size:
        raise UserError(f"vocab_size must be at least the tokenizer's {dataset.vocab_size}, got {vocab_size}")
    return replace(config, vocab_size=vocab_size)


def prefetch_batches(dataset, config, start, rank=0, world_size=1, pin_memory=False):
    """Yields the batches of the steps from `start` on, in chunks of steps: int64 (steps, 2, passes, B, T) on
    the CPU, tokens and targets in passes of B sequences. A thread gathers the next chunk meanwhile. While
    config's batch ramps up, the passes become more; all steps of a chunk have the same.

    rank, world_size: which part of each batch to return. pin_memory: put chunks in page-locked memory, from
    which copies to a GPU are asynchronous. Raises UserError, at the call, when the batch cannot be divided.
    """
    pass_batch = config.pass_batch(world_size)
    check_divides(config, pass_batch, world_size)

    def chunk_of(first_step):
        """The steps from first_step on that are gathered at once."""
        stage = config.stage(first_step)
        steps = max(1, PREFETCH_TOKENS // (stage.batch // world_size * config.context))
        return range(first_step, min(first_step + steps, stage.end_step, config.steps))

    def gather(steps):
        stage = config.stage(steps.start)
        rank_batch = stage.batch // world_size  # sequences of this rank in a step
        rows = slice(rank * rank_batch, (rank + 1) * rank_batch)
        in_stage = range(steps.start - stage.first_step, steps.stop - stage.first_step)
        tokens, targets = dataset.batch(config.seed, in_stage, stage.batch, config.context, rows,
                                        stage.first_sequence)
        chunk = torch.stack((tokens, targets), 1).view(len(steps), 2, -1, pass_batch, config.context)
        return chunk.pin_memory() if pin_memory else chunk

    def chunks():
        with ThreadPoolExecutor(1) as thread:
            steps = chunk_of(start)
            future = thread.submit(gather, steps) if steps else None
            while steps:
                chunk = future.result()
                steps = chunk_of(steps.stop)
                if steps:
                    future = thread.submit(gather, steps)
                yield chunk

    return chunks()


def check_divides(config, pass_batch, world_size):
    """Raises UserError when a step of `config` is not whole passes on each of `world_size` processes."""
    name = "batch" if config.batch_start is None else "batch_start"
    sequences, divisor = getattr(config, name), world_size * pass_batch
    if sequences % divisor != 0:
        raise UserError(f"{name} must be a multiple of {divisor} ({pass_batch} sequences in a pass, "
                        f"{world_size} processes), got {sequences}; try "
                        f"{sequences + divisor - sequences % divisor}")
