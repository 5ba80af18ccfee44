"""Prepare a data set by hand: python -m data.prepare --dataset=... --tokenizer=... [CONFIG.py ...]

train.py does the same when its data set is not prepared yet. A prepared folder is complete or does not exist:

train.bin, val.bin      token ids, little endian, an end-of-text token after each document
tokenizer.json          the tokenizer; tokenizer_config.json, which goes with it, names the end of text
meta.json               settings, source, tokenizer, counts, sha256
checked.json            size and time stamp of the token files when they last matched their sha256

The folder of a mixture, --dataset=stdlib:0.7,texts/:0.3, has no tokens: its meta.json names what it mixes.
--verify compares every byte of an existing folder with its sha256; else that happens where a stamp differs.
"""

import contextlib
import glob
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import time
from dataclasses import replace

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while torch is imported; run_cli ends it

import numpy as np
from tqdm import tqdm

from configure import Config, UserError, configure, names_in, run_cli
from data.datasets import SOURCE_SETTINGS, describe, documents, parse_mixture, supported_settings
from data.files import durable_file, write_text
from data.loader import CHECKED, MIXED, TokenDataset, apportion, read_meta, stamp
from data.tokenizer import (
    ENCODED_CHARS,
    END_OF_TEXT,
    OLD_TOKENIZER_FILE,
    TOKENIZER_FILE,
    build_tokenizer,
    check_tokenizer_name,
    cut,
    keep_tokenizer,
    tokenizer_identity,
)

FORMAT = 1  # version of a folder's content; increase it when old folders must not be used any longer
# The settings that decide what the tokens are: their hash is in the folder's name
IDENTITY_SETTINGS = names_in("data")
STALE_AFTER = 24 * 60 * 60  # seconds
FEW_DOCUMENTS = 1000  # where the hash holds out none of at most so many, the end of each is held out
TOKENIZER_TRAINING_CHARS = 50_000_000  # characters that a bpe:N is trained on, at most
BATCH_CHARS = 2**20  # characters that are encoded together, by several threads


def prepare(config):
    """The path of config's prepared folder, which is written first if it does not exist. Raises UserError.

    A prepared folder is itself accepted as a data set, for machines without the text or the libraries.
    """
    if is_prepared(config.dataset):
        check_prepared_settings(config)
        return config.dataset
    check_tokenizer_name(config.tokenizer)
    parts = mixture_parts(config)
    source, changed = describe_mixture(parts) if parts else describe(config)
    settings = {name: getattr(config, name) for name in IDENTITY_SETTINGS}
    settings["tokenizer"] = tokenizer_identity(config.tokenizer)
    folder = os.path.join(config.data_dir, folder_name(settings, source))
    meta = os.path.join(folder, "meta.json")
    if os.path.exists(meta) and os.stat(meta).st_mtime_ns < changed:
        # The same names, sizes and times of modification, but written to since then: maybe another text
        source["changed"] = changed
        folder = os.path.join(config.data_dir, folder_name(settings, source))
    if not os.path.isdir(folder):
        write_folder(config, folder, parts, {"format": FORMAT, "settings": settings, "source": source})
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
    names = os.listdir(folder)
    return {"train.bin", "val.bin"} < {*names} and not {TOKENIZER_FILE, OLD_TOKENIZER_FILE}.isdisjoint(names)


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
    """Raises UserError when another setting is asked for than the folder config.dataset was prepared with."""
    prepared = TokenDataset(config.dataset).meta["settings"]
    for name in IDENTITY_SETTINGS:
        wanted, actual = getattr(config, name), prepared.get(name)
        # Of the data set, there is the path of the text, here of the folder. A default is not asked for
        if name == "dataset" or wanted in (actual, getattr(Config, name)):
            continue
        if name == "tokenizer" and os.path.isdir(wanted):
            if tokenizer_identity(wanted) == tokenizer_identity(config.dataset):
                continue
        if name == "tokenizer" and str(actual).startswith("sha256:"):
            actual = config.dataset  # a folder that holds it
        raise UserError(f"{name} must be {actual}, with which {config.dataset} was prepared, got {wanted}; "
                        f"try without --{name}")


def folder_name(settings, source):
    """A readable name that ends in a hash of everything that decides the folder's content."""
    identity = hashlib.sha256(json.dumps([FORMAT, settings, source], sort_keys=True).encode()).hexdigest()
    dataset = os.path.basename(settings["dataset"].rstrip("/"))
    readable = re.sub(r"\W+", "-", f"{dataset}-{settings['tokenizer'][:15]}").strip("-")
    return f"{readable[:60]}-{identity[:12]}"


def write_folder(config, folder, parts, meta):
    """Write a prepared folder, of a mixture if there are `parts`, under a temporary name, and rename it when
    it is complete. Raises UserError."""
    temporary = os.path.join(config.data_dir, f".{os.path.basename(folder)}.{secrets.token_hex(4)}")
    try:
        os.makedirs(temporary)
        remove_stale_folders(config.data_dir)
        meta |= write_mixture(config, temporary, parts) if parts else write_tokens(config, temporary)
        with durable_file(os.path.join(temporary, "meta.json")) as file:
            file.write(json.dumps(meta, indent=1).encode())
        os.rename(temporary, folder)
    except OSError as error:  # of writing: where text or a tokenizer cannot be read, that is a UserError
        # If the folder exists now, another process was faster and wrote the same tokens
        if not os.path.isdir(folder):
            raise UserError(f"data_dir: cannot write {config.data_dir} ({error.strerror}); try a folder that "
                            "can be written, with room for the tokens") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_stale_folders(data_dir):
    """Delete what killed preparations left: temporary folders that nothing was written to for a day."""
    for folder in glob.glob(os.path.join(glob.escape(data_dir), f".*-{12 * '[0-9a-f]'}.{8 * '[0-9a-f]'}")):
        with contextlib.suppress(OSError):  # another process may delete it too
            paths = [folder, *(entry.path for entry in os.scandir(folder))]
            if time.time() - max(map(os.path.getmtime, paths)) > STALE_AFTER:
                shutil.rmtree(folder)


# Mixtures


def mixture_parts(config):
    """[(Config, weight)] of the data sets that config.dataset mixes; [] where it is one data set. A setting
    that only some of them have is theirs. Raises UserError."""
    parts = parse_mixture(config.dataset)
    if not parts:
        return []
    if 0 in apportion(MIXED, [weight for _, weight in parts]):
        raise UserError(f"dataset: each weight must be at least 1/{MIXED} of their sum, got {config.dataset}")
    supported = {name: () if is_prepared(name) else supported_settings(name) for name, _ in parts}
    configs = []
    for name, weight in parts:
        others = {setting: getattr(Config, setting) for setting in SOURCE_SETTINGS
                  if setting not in supported[name] and any(setting in found for found in supported.values())}
        configs.append((replace(config, dataset=os.path.expanduser(name), **others), weight))
    return configs


def describe_mixture(parts):
    """The same as describe() for a mixture."""
    sources, changed = [], 0
    for config, weight in parts:
        if is_prepared(config.dataset):
            source = TokenDataset(config.dataset).hashes
        else:
            source, last = describe(config)
            changed = max(changed, last)
        sources.append([source, weight])
    return {"kind": "mixture", "parts": sources}, changed


def write_mixture(config, folder, parts):
    """Write what a mixture needs into `folder`, after its parts were prepared with the tokenizer that they
    share; returns what meta.json says about it. A bpe:N is trained on text of all parts, by their weights.

    Raises UserError, and OSError when the disk is full or fails.
    """
    for part, _ in parts:
        if is_prepared(part.dataset):  # then its tokenizer is the one to share
            check_prepared_settings(part)
            config = replace(config, tokenizer=part.dataset)
    total = sum(weight for _, weight in parts)
    tokenizer = build_tokenizer(config.tokenizer, lambda: [
        text for part, weight in parts
        for text in tokenizer_training_texts(part, int(TOKENIZER_TRAINING_CHARS * weight / total))])
    saved = save_tokenizer(tokenizer, folder, config.tokenizer)
    name = folder if config.tokenizer.startswith("bpe:") else config.tokenizer
    datasets = [TokenDataset(prepare(replace(part, tokenizer=name))) for part, _ in parts]
    described = [{"dataset": part.dataset, "weight": weight, "hashes": dataset.hashes,
                  "folder": os.path.relpath(dataset.folder, folder)}
                 for (part, weight), dataset in zip(parts, datasets, strict=True)]
    counts = {split: mixed_counts(split, described, datasets) for split in ("train", "val")}
    return {"tokenizer": saved, "vocab_size": tokenizer.vocab_size, "parts": described, **counts}


def mixed_counts(split, parts, datasets):
    """What meta.json says about a split of a mixture; its sha256 is of the parts' and their weights."""
    counts = {name: sum(dataset.meta[split][name] for dataset in datasets)
              for name in ("documents", "tokens", "bytes")}
    identity = [[part["hashes"][split], part["weight"]] for part in parts]
    return counts | {"sha256": hashlib.sha256(json.dumps(identity).encode()).hexdigest()}


# Documents to token files, in bounded memory


def write_tokens(config, folder):
    """Write tokenizer and tokens into `folder`; returns what meta.json says about them.

    Raises UserError, and OSError when the disk is full or fails.
    """
    tokenizer = build_tokenizer(config.tokenizer, lambda: tokenizer_training_texts(
        config, TOKENIZER_TRAINING_CHARS))
    saved = save_tokenizer(tokenizer, folder, config.tokenizer)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    texts, ends = open_documents(config)
    splits = write_splits(config, folder, tokenizer, dtype, split_documents(config, texts, ends))
    stamps = {name: stamp(os.path.join(folder, name)) for name in ("train.bin", "val.bin")}
    write_text(os.path.join(folder, CHECKED), json.dumps(stamps))
    return {"tokenizer": saved, "vocab_size": tokenizer.vocab_size, "dtype": dtype.str[1:],
            "held_out": "ends" if ends else "documents", **splits}


def save_tokenizer(tokenizer, folder, name):
    """Write the tokenizer into `folder`; returns what meta.json says about it. Raises OSError."""
    keep_tokenizer(tokenizer, folder)
    with open(os.path.join(folder, TOKENIZER_FILE), "rb") as file:
        file_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": name, "special_tokens": {END_OF_TEXT: tokenizer.eot}, "sha256": tokenizer.sha256,
            "file_sha256": file_sha256}


def write_splits(config, folder, tokenizer, dtype, documents):
    """Write train.bin and val.bin; returns {"train", "val": {"documents", "tokens", "bytes", "sha256"}}.
    documents: (text, split).

    The document that reaches max_tokens (training and validation together) is written completely and is the
    last. Raises UserError when a split got no document.
    """
    counts = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in ("train", "val")}
    hashes = {split: hashlib.sha256() for split in counts}
    total = 0
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(durable_file(os.path.join(folder, f"{split}.bin")))
                 for split in counts}
        progress = stack.enter_context(
            tqdm(total=config.max_tokens, unit=" tokens", unit_scale=True, disable=None))
        for split, text, ids, is_last in encoded_parts(config, tokenizer, documents):
            if is_last:
                ids = [*ids, tokenizer.eot]
            raw = np.array(ids, dtype).tobytes()
            files[split].write(raw)
            hashes[split].update(raw)
            for name, count in ("documents", is_last), ("tokens", len(ids)), ("bytes", len(text.encode())):
                counts[split][name] += count
            progress.update(len(ids))
            total += len(ids)
            if is_last and config.max_tokens and total >= config.max_tokens:
                break
    for split in counts:
        if counts[split]["documents"] == 0:
            raise UserError(f"max_tokens must be more, got {config.max_tokens}, which is reached before the "
                            f"first {split} document; try {10 * total}, or another --val_fraction")
    return {split: counts[split] | {"sha256": hashes[split].hexdigest()} for split in counts}


def encoded_parts(config, tokenizer, documents):
    """Yields (split, text, token ids, whether it is the document's last) of the parts of each document."""
    for batch in batches_of_parts(config, documents):
        texts = [text for _, text, _ in batch]
        for (split, text, is_last), ids in zip(batch, tokenizer.encode_batch(texts), strict=True):
            yield split, text, ids, is_last


def batches_of_parts(config, documents):
    """Yields lists of (split, part of a document, is it the last), each of about BATCH_CHARS characters."""
    batch, size = [], 0
    for text, split in documents:
        parts = parts_of(text, config)
        for i, part in enumerate(parts, start=1):
            batch.append((split, part, i == len(parts)))
            size += len(part)
            if size >= BATCH_CHARS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def parts_of(text, config):
    """A document in parts that are encoded one by one, and have the tokens of the whole. Only the long
    modules of the standard library are cut in the midst of a word: so they were when the losses in README.md
    were measured."""
    if config.dataset == "stdlib":
        return [text[start:start + ENCODED_CHARS] for start in range(0, len(text), ENCODED_CHARS)]
    return cut(text, ENCODED_CHARS)


def hash_fraction(text):
    """A number in [0, 1) that depends on a document's text alone; below val_fraction it is validation.

    So more or other documents never move one from training to validation, and copies stay together.
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


def open_documents(config):
    """(the documents of config's data set, whether the end of each is held out), as is done where there are
    few and their hashes would leave a split without any. Raises UserError."""
    stream = documents(config)
    first, splits = [], set()
    for text in itertools.islice(stream, FEW_DOCUMENTS):
        first.append(text)
        splits.add(split_of(text, config))
        if len(splits) == 2:
            break
    return itertools.chain(first, stream), len(splits) < 2 and len(first) < FEW_DOCUMENTS


def split_documents(config, texts, ends):
    """Yields (document, "train" or "val"). texts, ends: what open_documents() returns. Raises UserError, at
    the end, when a split got nothing."""
    count, found = 0, set()
    for text in texts:
        count += 1
        parts = cut_end(text, config.val_fraction) if ends else [(text, split_of(text, config))]
        found |= {split for _, split in parts}
        yield from parts
    if count == 0:
        raise UserError(f"dataset {config.dataset} must hold text, but there is none")
    for split, change in ("train", "smaller"), ("val", "larger"):
        if split not in found:
            raise UserError(f"val_fraction leaves no text for {split} of {count} documents, got "
                            f"{config.val_fraction}; try a {change} one, or more text")


def split_of(text, config):
    return "val" if hash_fraction(text) < config.val_fraction else "train"


def cut_end(text, val_fraction):
    """[(part, split)] of a document whose last val_fraction, from a white space on, is held out. Copies are
    cut at the same place, so that none is trained on where another is validated."""
    place = len(text) - int(val_fraction * len(text))
    space = re.search(r"\s", text[place:])
    end = place + space.start() if space else place
    parts = [(text[:end], "train"), (text[end:], "val")]
    return [(part, split) for part, split in parts if part and not part.isspace()]


def tokenizer_training_texts(config, room):
    """The first `room` characters of the training split, as a list of str."""
    texts = []
    for text, split in split_documents(config, *open_documents(config)):
        if split == "train":
            texts.append(text[:room])
            room -= len(texts[-1])
        if room == 0:
            break
    return texts


def main(argv):
    words = [word for word in argv if word != "--verify"]
    config = configure(words, usage=__doc__, names=(*IDENTITY_SETTINGS, "data_dir"))
    dataset = TokenDataset(prepare(config), verify=words != argv)
    print(dataset.folder)
    both = [dataset.meta[split] for split in ("train", "val")]
    for split, counts in zip(("train", "val"), both, strict=True):
        print(f"{split:5}  {counts['documents']:>10,} documents  {counts['tokens']:>13,} tokens  "
              f"{counts['bytes']:>13,} bytes")
    ratio = sum(counts["bytes"] for counts in both) / sum(counts["tokens"] for counts in both)
    print(f"{ratio:.2f} bytes per token, {dataset.vocab_size:,} tokens in the vocabulary")


if __name__ == "__main__":
    run_cli(main)
