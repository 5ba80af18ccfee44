"""Tokenizers: made, kept in a prepared folder, and read back; each is a tiktoken.Encoding."""

import base64
import hashlib
import os
import re

import tiktoken

from configure import UserError, hint

FILE = "tokenizer.tiktoken"
END = "<|endoftext|>"
# GPT-4's split into pieces, without possessive quantifiers, which `tokenizers` reads differently
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")
OFFLINE = "--tokenizer=bytes and --tokenizer=bpe:2048 need no download"


def check(name):
    """Raises UserError when `name` is no tokenizer."""
    names = tiktoken.list_encoding_names()
    if size := re.fullmatch(r"bpe:(\d+)", name):
        if not 258 <= int(size[1]) <= 1_000_000:
            raise UserError(f"tokenizer: got {name}, takes bpe:N with N from 258 (256 bytes, 1 merge, "
                            "end of text) to 1000000")
    elif name not in ("bytes", *names):
        raise UserError(f"tokenizer: got {name}, takes bytes, bpe:N or one of {', '.join(names)}"
                        f"{hint(name, ['bytes', 'bpe:2048', *names])}")


def make(name, texts):
    """The tiktoken.Encoding called `name`; only bpe:N asks for `texts()`, a list of str. Raises UserError."""
    if name == "bytes":
        return encoding(name, r"(?s:.)", {bytes([byte]): byte for byte in range(256)}, {END: 256})
    if name.startswith("bpe:"):
        ranks = ranks_of(train(int(name.removeprefix("bpe:")) - 1, texts()))
        return encoding(name, PATTERN, ranks, {END: len(ranks)})
    try:
        made = tiktoken.get_encoding(name)
    except Exception as error:
        raise UserError(f"tokenizer: tiktoken cannot download {name} ({type(error).__name__}); check the "
                        f"network; {OFFLINE}") from None
    if END not in made._special_tokens:
        raise UserError(f"tokenizer: {name} has no {END} token; {OFFLINE}")
    return made


def encoding(name, pattern, ranks, special_tokens):
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)


def train(size, texts):
    """A byte-level BPE of `size` tokens, a tokenizers.Tokenizer. Raises UserError if `texts` are short."""
    try:
        import tokenizers
        from tokenizers import models, pre_tokenizers, trainers
    except ImportError:
        raise UserError("tokenizer: bpe:N needs the package `tokenizers`; pip install tokenizers, or "
                        "use --tokenizer=bytes") from None

    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    # A pair seen once is no pattern: it would be a token that training hardly meets
    learner.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, initial_alphabet=[*spelling()], show_progress=False))
    if learner.get_vocab_size() < size:
        raise UserError(f"tokenizer: got bpe:{size + 1}, but the training text gives at most "
                        f"bpe:{learner.get_vocab_size() + 1}; takes that or less, or more text")
    return learner


def spelling():
    """{character: byte} of byte-level BPE: a printable byte is its own character, the others 256, 257, ..."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def ranks_of(learner):
    """{bytes: rank} of a byte-level tokenizers.Tokenizer, as tiktoken takes them."""
    byte = spelling()
    return {bytes(byte[c] for c in token): rank for token, rank in learner.get_vocab().items()}


def save(made, file):
    """Writes the ranks into the binary `file` in tiktoken's format; the rest of the encoding as a dict."""
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank
                     for token, rank in sorted(made._mergeable_ranks.items(), key=lambda item: item[1]))
    file.write(lines)
    return {"name": made.name, "pattern": made._pat_str, "special_tokens": made._special_tokens,
            "sha256": hashlib.sha256(lines).hexdigest()}


def load(folder, saved):
    """The tiktoken.Encoding that `save` described. Raises OSError, ValueError or KeyError if damaged."""
    with open(os.path.join(folder, FILE), "rb") as file:  # tiktoken's reader would leave a copy in /tmp
        lines = file.read()
    if hashlib.sha256(lines).hexdigest() != saved["sha256"]:
        raise ValueError(f"{FILE} is not what was written")
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines.splitlines())}
    return encoding(saved["name"], saved["pattern"], ranks, saved["special_tokens"])
