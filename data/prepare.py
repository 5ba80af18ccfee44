"""Prepare a data set by hand: python -m data.prepare --dataset=... --tokenizer=... [CONFIG.py ...]

train.py does the same when its data set is not prepared yet. A prepared folder is complete or does not exist:

train.bin, val.bin      token ids, little endian, an end-of-text token after each document
tokenizer.tiktoken      the tokenizer's ranks; its pattern and special tokens are in meta.json
meta.json               settings, source, tokenizer, counts, sha256
checked.json            size and time stamp of the token files when they last matched their sha256

--verify compares every byte of an existing folder with its sha256; else that happens where a stamp differs.
"""

import contextlib
import glob
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import signal
import time

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while torch is imported; run_cli ends it

import numpy as np
from tqdm import tqdm

from configure import UserError, configure, names_in, run_cli
from data.datasets import describe, documents
from data.files import durable_file, write_text
from data.loader import CHECKED, TokenDataset, read_meta, stamp
from data.tokenizer import (
    TOKENIZER_FILE,
    build_encoding,
    check_tokenizer_name,
    save_encoding,
    tokenizer_identity,
)

FORMAT = 1  # version of a folder's content; increase it when old folders must not be used any longer
# The settings that decide what the tokens are: their hash is in the folder's name
IDENTITY_SETTINGS = names_in("data")
STALE_AFTER = 24 * 60 * 60  # seconds
TOKENIZER_TRAINING_CHARS = 50_000_000  # characters that a bpe:N is trained on, at most
PIECE_CHARS = 2**16  # characters encoded at once: tiktoken's regex overflows on a blank run of 10**6
BATCH_CHARS = 2**22  # characters given to tiktoken's threads together


def prepare(config):
    """The path of config's prepared folder, which is written first if it does not exist. Raises UserError.

    A prepared folder is itself accepted as a data set, for machines without the text or the libraries.
    """
    if is_prepared(config.dataset):
        check_prepared_settings(config)
        return config.dataset
    check_tokenizer_name(config.tokenizer)
    source = describe(config)
    settings = {name: getattr(config, name) for name in IDENTITY_SETTINGS}
    settings["tokenizer"] = tokenizer_identity(config.tokenizer)
    folder = os.path.join(config.data_dir, folder_name(settings, source))
    if not os.path.isdir(folder):
        write_folder(config, folder, settings, source)
    return folder


def is_prepared(folder):
    """Whether `folder` was written by write_folder(): its meta.json has a format, and the settings that it
    was made with. Where that file is damaged, the names of the others tell."""
    try:
        meta = read_meta(folder)
    except OSError:
        return False
    except ValueError:
        meta = None
    if isinstance(meta, dict) and "format" in meta and isinstance(meta.get("settings"), dict):
        return True
    others = ("train.bin", "val.bin", TOKENIZER_FILE)
    return all(os.path.isfile(os.path.join(folder, name)) for name in others)


def prepared_folders(data_dir):
    """The folders in data_dir that look like prepared ones."""
    return sorted(map(os.path.dirname, glob.glob(os.path.join(glob.escape(data_dir), "*", "meta.json"))))


def find_prepared(hashes, folders):
    """The first of `folders` whose tokens and tokenizer have these sha256; None where none has."""
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            meta = read_meta(folder)
            if {name: meta[name]["sha256"] for name in hashes} == hashes:
                TokenDataset(folder)
                return folder
    return None


def check_prepared_settings(config):
    """Raises UserError when the prepared folder config.dataset was prepared with other settings."""
    prepared = TokenDataset(config.dataset).meta["settings"]
    for name in IDENTITY_SETTINGS:
        wanted, actual = getattr(config, name), prepared.get(name)
        if name == "dataset" or actual == wanted:  # there the path of the text, here of the folder
            continue
        if name == "tokenizer" and os.path.isdir(wanted):
            if tokenizer_identity(wanted) == tokenizer_identity(config.dataset):
                continue
        if name == "tokenizer" and str(actual).startswith("sha256:"):
            actual = config.dataset  # a folder that holds it
        raise UserError(f"{name}: got {wanted}, but {config.dataset} was prepared with {actual}; "
                        f"takes --{name}={actual}")


def folder_name(settings, source):
    """A readable name that ends in a hash of everything that decides the folder's content."""
    identity = hashlib.sha256(json.dumps([FORMAT, settings, source], sort_keys=True).encode()).hexdigest()
    dataset = os.path.basename(settings["dataset"].rstrip("/"))
    readable = re.sub(r"\W+", "-", f"{dataset}-{settings['tokenizer'][:15]}").strip("-")
    return f"{readable[:60]}-{identity[:12]}"


def write_folder(config, folder, settings, source):
    """Write a prepared folder under a temporary name, and rename it when it is complete. Raises UserError."""
    temporary = os.path.join(config.data_dir, f".{os.path.basename(folder)}.{secrets.token_hex(4)}")
    try:
        os.makedirs(temporary)
        remove_stale_folders(config.data_dir)
        meta = {"format": FORMAT, "settings": settings, "source": source, **write_tokens(config, temporary)}
        with durable_file(os.path.join(temporary, "meta.json")) as file:
            file.write(json.dumps(meta, indent=1).encode())
        stamps = {name: stamp(os.path.join(temporary, name)) for name in ("train.bin", "val.bin")}
        write_text(os.path.join(temporary, CHECKED), json.dumps(stamps))
        os.rename(temporary, folder)
    except OSError as error:
        # If the folder exists now, another process was faster and wrote the same tokens
        if not os.path.isdir(folder):
            raise UserError(f"data_dir: cannot write {config.data_dir} ({error.strerror}); takes a folder "
                            "that can be written, with room for the tokens") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_stale_folders(data_dir):
    """Delete what killed preparations left: temporary folders that nothing was written to for a day."""
    for name in os.listdir(data_dir):
        if not re.fullmatch(r"\..+-[0-9a-f]{12}\.[0-9a-f]{8}", name):
            continue
        folder = os.path.join(data_dir, name)
        with contextlib.suppress(OSError):  # another process may delete it too
            paths = [folder, *glob.glob(os.path.join(glob.escape(folder), "*"))]
            last_written = max(os.path.getmtime(path) for path in paths)
            if time.time() - last_written > STALE_AFTER:
                shutil.rmtree(folder)


# Documents to token files, in bounded memory


def write_tokens(config, folder):
    """Write tokenizer and tokens into `folder`; returns what meta.json says about them.

    Raises UserError, and OSError when the disk is full or fails.
    """
    encoding = build_encoding(config.tokenizer, lambda: tokenizer_training_texts(config))
    dtype = np.dtype("<u2" if encoding.n_vocab <= 2**16 else "<u4")
    splits = write_splits(config, folder, encoding, dtype)
    with durable_file(os.path.join(folder, TOKENIZER_FILE)) as file:
        saved = save_encoding(encoding, file)
    byte_count = sum(counts["bytes"] for counts in splits.values())
    token_count = sum(counts["tokens"] for counts in splits.values())
    return {"tokenizer": saved, "vocab_size": encoding.n_vocab, "dtype": dtype.str[1:],
            "bytes_per_token": round(byte_count / token_count, 4), **splits}


def write_splits(config, folder, encoding, dtype):
    """Write train.bin and val.bin; returns {"train", "val": {"documents", "tokens", "bytes", "sha256"}}.

    The document that reaches max_tokens (training and validation together) is written completely and is the
    last. Raises UserError when a split got no document.
    """
    total = 0
    with contextlib.ExitStack() as stack:
        writers = {}
        for split in ("train", "val"):
            file = stack.enter_context(durable_file(os.path.join(folder, f"{split}.bin")))
            writers[split] = SplitWriter(file, dtype)
        progress = stack.enter_context(
            tqdm(total=config.max_tokens, unit=" tokens", unit_scale=True, disable=None))
        for text, split, ids in encode_documents(split_documents(config), encoding):
            writers[split].add(text, ids)
            progress.update(len(ids))
            total += len(ids)
            if config.max_tokens and total >= config.max_tokens:
                break
    for split, writer in writers.items():
        if writer.documents == 0:
            raise UserError(f"max_tokens: got {config.max_tokens}, reached before the first {split} "
                            f"document; takes more, such as {10 * total}, or another --val_fraction")
    return {split: writer.summary() for split, writer in writers.items()}


class SplitWriter:
    """Appends documents to the token file of a split; counts and hashes them."""

    def __init__(self, file, dtype):
        self.file, self.dtype = file, dtype
        self.documents = self.tokens = self.bytes = 0
        self.sha256 = hashlib.sha256()

    def add(self, text, ids):
        raw = np.array(ids, self.dtype).tobytes()
        self.file.write(raw)
        self.sha256.update(raw)
        self.documents += 1
        self.tokens += len(ids)
        self.bytes += len(text.encode())

    def summary(self):
        return {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes,
                "sha256": self.sha256.hexdigest()}


def hash_fraction(text):
    """A number in [0, 1) that depends on a document's text alone; below val_fraction it is validation.

    So more or other documents never move one from training to validation, and copies stay together.
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


def split_documents(config):
    """Yields (document, "train" or "val"). Raises UserError at the end when a split got no document."""
    count, lowest, highest = 0, 1.0, 0.0
    for text in documents(config):
        fraction = hash_fraction(text)
        count += 1
        lowest, highest = min(lowest, fraction), max(highest, fraction)
        yield text, "val" if fraction < config.val_fraction else "train"
    if count == 0:
        raise UserError(f"dataset: {config.dataset} holds no text; takes at least two documents")
    if lowest == highest:
        raise UserError(f"dataset: {config.dataset} is one document, or copies of one; takes two or "
                        "more, as whole documents are held out for validation")
    if not lowest < config.val_fraction <= highest:
        missing = "training" if highest < config.val_fraction else "validation"
        raise UserError(f"val_fraction: got {config.val_fraction}, which leaves no {missing} text among "
                        f"{count} documents; takes {shortest_decimal(lowest, highest)}, for one")


def shortest_decimal(lowest, highest):
    """The number with the fewest decimals that is above `lowest` and at most `highest`."""
    for digits in itertools.count(1):
        decimal = math.floor(lowest * 10**digits + 1) / 10**digits
        if decimal <= highest:
            return decimal


def tokenizer_training_texts(config):
    """The first TOKENIZER_TRAINING_CHARS characters of the training split, as a list of str."""
    texts, room = [], TOKENIZER_TRAINING_CHARS
    for text, split in split_documents(config):
        if split == "train":
            texts.append(text[:room])
            room -= len(texts[-1])
        if room == 0:
            break
    return texts


def batch_documents(documents):
    """Yields lists of (text, split), each of about BATCH_CHARS characters."""
    batch, size = [], 0
    for text, split in documents:
        batch.append((text, split))
        size += len(text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_documents(documents, encoding):
    """(text, split) to (text, split, token ids with the end of text), in the same order."""
    for batch in batch_documents(documents):
        pieces = []  # of all texts of the batch; a text has piece_counts of them
        piece_counts = []
        for text, _ in batch:
            text_pieces = [text[start:start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS)]
            pieces.extend(text_pieces)
            piece_counts.append(len(text_pieces))
        encoded_pieces = iter(encoding.encode_ordinary_batch(pieces))  # by several threads
        for (text, split), count in zip(batch, piece_counts, strict=True):
            ids = []
            for _ in range(count):
                ids.extend(next(encoded_pieces))
            ids.append(encoding.eot_token)
            yield text, split, ids


def main(argv):
    words = [word for word in argv if word != "--verify"]
    config = configure(words, usage=__doc__, names=(*IDENTITY_SETTINGS, "data_dir"))
    dataset = TokenDataset(prepare(config), verify=words != argv)
    print(dataset.folder)
    for split in ("train", "val"):
        counts = dataset.meta[split]
        print(f"{split:5}  {counts['documents']:>10,} documents  {counts['tokens']:>13,} tokens  "
              f"{counts['bytes']:>13,} bytes")
    print(f"{dataset.meta['bytes_per_token']:.2f} bytes per token, "
          f"{dataset.vocab_size:,} tokens in the vocabulary")


if __name__ == "__main__":
    run_cli(main)
