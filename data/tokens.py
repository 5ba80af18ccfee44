"""Documents to token files, in bounded memory."""

import contextlib
import hashlib
import itertools
import math
import os

import numpy as np
from tqdm import tqdm

from configure import UserError
from data import encodings
from data.documents import documents

TRAINING_TEXT = 50_000_000  # characters that a bpe:N is trained on, at most
PIECE = 2**16  # characters encoded at once: tiktoken's regex overflows on a blank run of 10**6
BATCH = 2**22  # characters handed to tiktoken's threads together


@contextlib.contextmanager
def durable(path):
    """A new binary file that is on the disk when the block ends."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def place(text):
    """A number in [0, 1) that hangs on a document's text alone; below val_fraction it is validation."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


def divided(config):
    """Yields (document, "train" or "val"). Raises UserError at the end when one of the two got none."""
    count, lowest, highest = 0, 1.0, 0.0
    for text in documents(config):
        here = place(text)
        count, lowest, highest = count + 1, min(lowest, here), max(highest, here)
        yield text, "val" if here < config.val_fraction else "train"
    if count == 0:
        raise UserError(f"dataset: {config.dataset} holds no text; takes at least two documents")
    if lowest == highest:
        raise UserError(f"dataset: {config.dataset} is one document, or copies of one; takes two or "
                        "more, as whole documents are held out for validation")
    if not lowest < config.val_fraction <= highest:
        short = [math.floor(lowest * 10**digits + 1) / 10**digits for digits in range(1, 11)]
        missing = "training" if highest < config.val_fraction else "validation"
        raise UserError(f"val_fraction: got {config.val_fraction}, which leaves no {missing} text among "
                        f"{count} documents; takes {next(s for s in short if s <= highest)}, for one")


def training_text(config):
    """The first TRAINING_TEXT characters of the training split, as a list of str."""
    texts, room = [], TRAINING_TEXT
    for text, split in divided(config):
        if split == "train":
            texts.append(text[:room])
            room -= len(texts[-1])
        if not room:
            break
    return texts


def batched(documents):
    """Lists of (text, split), each of about BATCH characters."""
    batch, size = [], 0
    for text, split in documents:
        batch.append((text, split))
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def encoded(documents, encoding):
    """Yields (text, split, token ids with the end of text)."""
    for batch in batched(documents):
        cuts = [[text[i:i + PIECE] for i in range(0, len(text), PIECE)] for text, _ in batch]
        pieces = iter(encoding.encode_ordinary_batch([*itertools.chain(*cuts)]))
        for (text, split), cut in zip(batch, cuts, strict=True):
            yield text, split, [*itertools.chain(*itertools.islice(pieces, len(cut))), encoding.eot_token]


def write(config, folder):
    """Writes tokenizer and tokens into `folder`; returns what meta.json says about them.

    The document that reaches max_tokens (training and validation together) is kept whole, and is the last.
    Raises UserError, and OSError where the disk refuses.
    """
    encoding = encodings.make(config.tokenizer, lambda: training_text(config))
    dtype = np.dtype("<u2" if encoding.n_vocab <= 2**16 else "<u4")
    meta = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in ("train", "val")}
    hashes = {split: hashlib.sha256() for split in meta}
    total = 0
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(durable(os.path.join(folder, f"{split}.bin"))) for split in meta}
        bar = tqdm(total=config.max_tokens, unit=" tokens", unit_scale=True, disable=None)
        stack.enter_context(bar)
        for text, split, ids in encoded(divided(config), encoding):
            raw = np.array(ids, dtype).tobytes()
            files[split].write(raw)
            hashes[split].update(raw)
            for key, more in (("documents", 1), ("tokens", len(ids)), ("bytes", len(text.encode()))):
                meta[split][key] += more
            total += len(ids)
            bar.update(len(ids))
            if config.max_tokens and total >= config.max_tokens:
                break
    for split, counts in meta.items():
        if not counts["documents"]:
            raise UserError(f"max_tokens: got {config.max_tokens}, reached before the first {split} "
                            f"document; takes more, such as {10 * total}, or another --val_fraction")
        counts["sha256"] = hashes[split].hexdigest()
    with durable(os.path.join(folder, encodings.FILE)) as file:
        saved = encodings.save(encoding, file)
    size = sum(counts["bytes"] for counts in meta.values())
    return {"tokenizer": saved, "vocab_size": encoding.n_vocab, "dtype": dtype.str[1:],
            "bytes_per_token": round(size / total, 4), **meta}
