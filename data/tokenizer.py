"""Tokenizers: built, kept with prepared data and in run directories, loaded; each is a tiktoken.Encoding."""

import base64
import contextlib
import functools
import hashlib
import json
import os
import re

import numpy as np
import tiktoken

from configure import UserError, closest
from data.files import atomic_file, write_text

TOKENIZER_FILE = "tokenizer.tiktoken"
RUN_META = "tokenizer.meta.json"  # beside TOKENIZER_FILE in a run directory: what load_encoding() needs
END_OF_TEXT = "<|endoftext|>"
# GPT-4's split into pieces, without possessive quantifiers, which `tokenizers` reads differently
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")
ANY_CHARACTER = r"(?s:.)"
MIN_BPE_SIZE, MAX_BPE_SIZE = 258, 1_000_000  # tokens; at least 256 bytes, 1 merge and the end of text
OFFLINE = "--tokenizer=bytes and --tokenizer=bpe:2048 need no download"


@contextlib.contextmanager
def panics_as_errors():
    """Turns a panic of tiktoken's Rust code, which derives from BaseException, into a UserError. A pattern
    that makes the regex engine give up does it, and so do ids that do not fit."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"tokenizer: the tokenizer of the prepared folder is damaged ({reason}); takes a "
                        "folder that `python -m data.prepare` wrote") from None


class Tokenizer:
    """Text to token ids and back. `encoding` is a tiktoken.Encoding, `eot` the id of its end of text."""

    def __init__(self, encoding, vocab_size):
        self.encoding, self.vocab_size = encoding, vocab_size
        self.eot = encoding.eot_token

    @functools.cached_property
    def byte_lengths(self):
        """Bytes of each token id, int64 (vocab_size,); special tokens and holes in the vocabulary have 0."""
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, token_id in self.encoding._mergeable_ranks.items():
            lengths[token_id] = len(token)
        return lengths

    @functools.cached_property
    def _bytes_of_id(self):
        """{token id: its bytes}; some tokenizers leave holes below vocab_size."""
        tokens = {token_id: token for token, token_id in self.encoding._mergeable_ranks.items()}
        for text, token_id in self.encoding._special_tokens.items():
            tokens[token_id] = text.encode()
        return tokens

    def encode(self, text):
        """Token ids of `text`, a list of int; what looks like a special token in it is encoded as text.
        Raises UserError where the tokenizer's pattern cannot split it."""
        with panics_as_errors():
            return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """Text of token ids; ids without a token, such as a padded vocabulary's, are skipped."""
        tokens = (self._bytes_of_id.get(int(token_id), b"") for token_id in ids)
        return b"".join(tokens).decode("utf-8", "replace")


def check_tokenizer_name(name):
    """Raises UserError when `name` is not a tokenizer."""
    if os.path.isdir(name):
        load_kept(name)
        return
    tiktoken_names = tiktoken.list_encoding_names()
    bpe = re.fullmatch(r"bpe:(\d+)", name)
    if bpe:
        too_long = len(bpe[1]) > 100  # Python makes no int of thousands of digits
        if too_long or not MIN_BPE_SIZE <= int(bpe[1]) <= MAX_BPE_SIZE:
            raise UserError(f"tokenizer: got {name[:100]}, takes bpe:N with N from {MIN_BPE_SIZE} (256 "
                            f"bytes, 1 merge, end of text) to {MAX_BPE_SIZE}")
    elif name != "bytes" and name not in tiktoken_names:
        advice = closest(name, ["bytes", "bpe:2048", *tiktoken_names])
        raise UserError(f"tokenizer: got {name}, takes bytes, bpe:N, a folder that holds one, or one of "
                        f"{', '.join(tiktoken_names)}{advice}")


def build_encoding(name, load_texts):
    """The tiktoken.Encoding called `name`. Raises UserError.

    name: bytes, bpe:N, what tiktoken knows, or a folder that holds a tokenizer.
    load_texts: called without arguments only for bpe:N; returns the list of str that it is trained on.
    """
    if os.path.isdir(name):
        return load_kept(name).encoding
    if name == "bytes":
        ranks = {bytes([byte]): byte for byte in range(256)}
        return make_encoding(name, ANY_CHARACTER, ranks, {END_OF_TEXT: 256})
    if name.startswith("bpe:"):
        vocab_size = int(name.removeprefix("bpe:"))
        ranks = ranks_of_bpe(train_bpe(vocab_size - 1, load_texts()))  # the last id is the end of text
        return make_encoding(name, PATTERN, ranks, {END_OF_TEXT: len(ranks)})
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:
        raise UserError(f"tokenizer: tiktoken cannot download {name} ({type(error).__name__}); check the "
                        f"network; {OFFLINE}") from None
    if END_OF_TEXT not in encoding._special_tokens:
        raise UserError(f"tokenizer: {name} has no {END_OF_TEXT} token; {OFFLINE}")
    return encoding


def make_encoding(name, pattern, ranks, special_tokens):
    """A tiktoken.Encoding. ranks: {token's bytes: id}; special_tokens: {text: id}."""
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)


def train_bpe(vocab_size, texts):
    """A byte-level BPE of `vocab_size` tokens, a tokenizers.Tokenizer, as tiktoken does not train.

    Raises UserError when `texts` are too short for that many tokens.
    """
    try:
        import tokenizers
        from tokenizers import models, pre_tokenizers, trainers
    except ImportError:
        raise UserError("tokenizer: bpe:N needs the package `tokenizers`; pip install tokenizers, or "
                        "use --tokenizer=bytes") from None

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    # min_frequency: a pair that occurs once would be a token that training hardly sees
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, show_progress=False,
                                  initial_alphabet=list(bytes_to_unicode().values()))
    bpe.train_from_iterator(texts, trainer)
    trained_size = bpe.get_vocab_size()
    if trained_size < vocab_size:
        raise UserError(f"tokenizer: got bpe:{vocab_size + 1}, but the training text gives at most "
                        f"bpe:{trained_size + 1}; takes that or less, or more text")
    return bpe


def bytes_to_unicode():
    """{byte: character} by which byte-level BPE writes bytes as text: a printable byte stands for its own
    character, the others for the characters 256, 257, ... The same table as in GPT-2's encoder.py."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    for i, byte in enumerate(others):
        table[byte] = chr(256 + i)
    return table


def ranks_of_bpe(bpe):
    """{token's bytes: rank} of a byte-level tokenizers.Tokenizer, the form that tiktoken takes."""
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    return {bytes(byte_of[character] for character in token): rank
            for token, rank in bpe.get_vocab().items()}


def save_encoding(encoding, file):
    """Write the ranks into the binary `file` in tiktoken's format. Returns what else load_encoding needs, a
    dict for meta.json."""
    by_rank = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    content = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in by_rank)
    file.write(content)
    return {"name": encoding.name, "pattern": encoding._pat_str, "special_tokens": encoding._special_tokens,
            "sha256": hashlib.sha256(content).hexdigest()}


def load_encoding(folder, saved):
    """The tiktoken.Encoding of a prepared folder. saved: what save_encoding returned.

    Raises OSError, ValueError, KeyError or TypeError when the folder is damaged.
    """
    with open(os.path.join(folder, TOKENIZER_FILE), "rb") as file:
        content = file.read()
    if hashlib.sha256(content).hexdigest() != saved["sha256"]:
        raise ValueError(f"{TOKENIZER_FILE} is not what was written")
    # Parsed here, because tiktoken's own reader would leave a copy in /tmp
    ranks = {}
    for line in content.splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    if not saved["pattern"]:
        raise ValueError("the tokenizer's pattern is empty")
    with panics_as_errors():
        return make_encoding(saved["name"], saved["pattern"], ranks, saved["special_tokens"])


# A tokenizer kept in a folder: in a run directory, or with prepared data


def keep_tokenizer(tokenizer, folder):
    """Write `tokenizer` into a run directory, unless it is there. Raises OSError."""
    if os.path.exists(os.path.join(folder, RUN_META)):
        return
    with atomic_file(os.path.join(folder, TOKENIZER_FILE)) as file:
        saved = save_encoding(tokenizer.encoding, file)
    meta = {"tokenizer": saved, "vocab_size": tokenizer.vocab_size}
    write_text(os.path.join(folder, RUN_META), json.dumps(meta, indent=1))


def load_kept(folder):
    """The Tokenizer that a run directory or a folder of prepared data holds. Raises UserError."""
    for name in (RUN_META, "meta.json"):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return load_described(folder, path)
    raise UserError(f"tokenizer: {folder} holds none; takes a folder of prepared data or a run directory "
                    f"(if an older version wrote that, `python train.py {folder}` adds its tokenizer)")


def load_described(folder, path):
    """The Tokenizer of `folder` that the JSON file at `path` describes. Raises UserError."""
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        return Tokenizer(load_encoding(folder, meta["tokenizer"]), meta["vocab_size"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"tokenizer: {folder} is damaged ({type(error).__name__}: {reason}); takes a folder "
                        "that train.py or data.prepare wrote") from None


def tokenizer_identity(name):
    """What tells the tokenizer `name` from others: its name or, for one in a folder, a hash of what it is, as
    two folders may hold the same. Raises UserError."""
    if not os.path.isdir(name):
        return name
    encoding = load_kept(name).encoding
    sha256 = hashlib.sha256(encoding._pat_str.encode())
    for things in (encoding._mergeable_ranks, encoding._special_tokens):
        sha256.update(repr(sorted(things.items(), key=lambda item: item[1])).encode())
    return f"sha256:{sha256.hexdigest()}"
