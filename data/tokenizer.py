"""Tokenizers: built by name, kept in a folder as tokenizer.json, and loaded again.

All are byte-level BPEs: text -> pieces (by a pattern) -> tokens of bytes. The library `tokenizers` trains
them, and reads and writes their files; tiktoken gives the vocabularies of the names that it knows, and
encodes large texts in a fraction of the time. Older versions kept tiktoken's format; that is read too.
"""

import base64
import codecs
import functools
import hashlib
import json
import math
import os
import re
import unicodedata
from itertools import pairwise

import numpy as np
import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from configure import UserError, closest
from data.files import write_text

TOKENIZER_FILE = "tokenizer.json"
OLD_TOKENIZER_FILE = "tokenizer.tiktoken"  # ranks, of older versions; the rest of what they kept is in:
OLD_RUN_META = "tokenizer.meta.json"  # beside it in a run directory; in a prepared folder, meta.json
END_OF_TEXT = "<|endoftext|>"
# GPT-4's split into pieces, without possessive quantifiers, which `tokenizers` reads differently
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")
EVERYTHING = r"[\s\S]+"  # the pattern by which all of a text is one piece
MIN_BPE_SIZE, MAX_BPE_SIZE = 258, 1_000_000  # tokens; at least 256 bytes, 1 merge and the end of text
ENCODED_CHARS = 2**16  # characters encoded at once, which bounds memory
TRAINING_CHARS = 2**10  # characters trained on at once: the time of BPE training grows with their square
# The longest start of a text that ends between two pieces, by every pattern in use: after a letter or number
# that white space follows, or any character that a blank follows
ENDS_BETWEEN_PIECES = re.compile(r"(?s:.*)(?:[^\W_](?=[ \t\n])|\S(?=[ \t]))")
OFFLINE = "--tokenizer=bytes and --tokenizer=bpe:2048 need no download"
# Text that is encoded and decoded to see whether a tokenizer keeps all of it
SAMPLE = ("The 12th of May, 1,234,567.89 dollars; it's DON'T we'll I'D they've\u2019s.\n\n\tdef f(x_1):  "
          "return x**2  # \u00e9t\u00e9 Stra\u00dfe \u041c\u043e\u0441\u043a\u0432\u0430 \u6771\u4eac\u90fd "
          "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \U0001f600\U0001f44d\U0001f3fd e\u0301 \u00b2\u2167 "
          "\x00\x7f\u00a0\u3000  \r\n \r \n   \n  a   b\t\t https://a.b/c?d=e&f=%20 ")


def cut(text, size):
    """`text` in parts of at most `size` characters, cut where a tokenizer cuts it too, if it does within that
    length. So the tokens of the parts are those of the text."""
    start, parts = 0, []
    while len(text) - start > size:
        found = ENDS_BETWEEN_PIECES.match(text, start, start + size + 1)
        end = found.end() if found else start + size
        parts.append(text[start:end])
        start = end
    parts.append(text[start:])
    return parts


def byte_characters():
    """{character: byte} by which byte-level BPE writes bytes as text, as GPT-2's encoder.py did first: most
    bytes that can be printed stand for themselves, the others for the characters from 256 on."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = {character: ord(character) for character in characters if ord(character) < 256}
    others = [byte for byte in range(256) if byte not in table.values()]
    return table | dict(zip(characters[len(table):], others, strict=True))


BYTE_OF = byte_characters()
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


def spell(token):
    """A token of bytes as it is written in a tokenizer.json."""
    return "".join(CHARACTER_OF[byte] for byte in token)


def unspell(token):
    return bytes(BYTE_OF[character] for character in token)


class Tokenizer:
    """Text to token ids and back. bpe: a tokenizers.Tokenizer; eot: the id of its end of text."""

    def __init__(self, bpe, eot):
        self.bpe, self.eot = bpe, eot
        bpe.encode_special_tokens = True  # what looks like a special token in a text is text
        bpe.no_truncation()  # files of other programs may ask for both
        bpe.no_padding()
        self.vocab_size = 1 + max(bpe.get_vocab().values())  # there may be holes below it

    @functools.cached_property
    def added_tokens(self):
        """{id: tokenizers.AddedToken} of special tokens, and of others that were added to the vocabulary."""
        return self.bpe.get_added_tokens_decoder()

    @functools.cached_property
    def ranks(self):
        """{token's bytes: id}, without the added tokens."""
        vocab = self.bpe.get_vocab(with_added_tokens=False)
        return {unspell(token): token_id for token, token_id in vocab.items()
                if token_id not in self.added_tokens}

    @functools.cached_property
    def sha256(self):
        """What tells these tokens from those of another tokenizer, with hex digits."""
        by_rank = sorted(self.ranks.items(), key=lambda item: item[1])
        lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in by_rank]
        return hashlib.sha256(b"".join(lines)).hexdigest()

    @functools.cached_property
    def byte_lengths(self):
        """Bytes of each token id, int64 (vocab_size,); special tokens and holes in the vocabulary have 0."""
        lengths = np.zeros(self.vocab_size, np.int64)
        for token_id, token in self._bytes_of_id.items():
            lengths[token_id] = len(token)
        for token_id, token in self.added_tokens.items():
            if token.special:
                lengths[token_id] = 0
        return lengths

    @functools.cached_property
    def _bytes_of_id(self):
        """{token id: its bytes}."""
        tokens = {token_id: token for token, token_id in self.ranks.items()}
        for token_id, token in self.added_tokens.items():
            tokens[token_id] = token.content.encode()
        return tokens

    @functools.cached_property
    def encoding(self):
        """A tiktoken.Encoding of the same tokens; None where tiktoken could give others."""
        written = self.bpe.to_str()
        match json.loads(written)["pre_tokenizer"]:
            case {"pretokenizers": [{"pattern": {"Regex": pattern}}, _]}:
                pass
            case _:
                pattern = EVERYTHING
        special_tokens = {token.content: token_id for token_id, token in self.added_tokens.items()}
        if merge_by_rank(self.ranks, pattern, special_tokens).to_str() != written:
            return None
        encoding = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=self.ranks, special_tokens={})
        return encoding if encoding.encode_ordinary(SAMPLE) == self.encode(SAMPLE) else None

    def encode(self, text):
        """Token ids of `text`, a list of int; what looks like a special token in it is encoded as text."""
        parts = self.bpe.encode_batch_fast(cut(text, ENCODED_CHARS), add_special_tokens=False)
        return [token_id for part in parts for token_id in part.ids]

    def encode_batch(self, parts):
        """[token ids] of each of `parts`, str, by several threads: the fast way to encode much text."""
        if self.encoding is not None:
            return self.encoding.encode_ordinary_batch(parts)
        return [found.ids for found in self.bpe.encode_batch_fast(parts, add_special_tokens=False)]

    def decode(self, ids):
        """Text of token ids; ids without a token, such as a padded vocabulary's, are skipped."""
        tokens = (self._bytes_of_id.get(int(token_id), b"") for token_id in ids)
        return b"".join(tokens).decode("utf-8", "replace")

    def stream(self, ids):
        """Yields the text of token ids as they come: a character when all of its bytes are there."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in ids:
            if text := decoder.decode(self._bytes_of_id.get(int(token_id), b"")):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def identity(self):
        """What tells this tokenizer from others, wherever it is kept: a hash of all that it does to text."""
        spec = json.loads(self.bpe.to_str())
        facts = [self.sha256, self.eot, spec["normalizer"], spec["pre_tokenizer"]]
        return f"sha256:{hashlib.sha256(json.dumps(facts).encode()).hexdigest()}"


# Building one


def check_tokenizer_name(name):
    """Raises UserError when `name` is not a tokenizer."""
    if os.path.isdir(name):
        load_tokenizer(name)
        return
    tiktoken_names = tiktoken.list_encoding_names()
    bpe = re.fullmatch(r"bpe:(\d+)", name)
    if bpe:
        too_long = len(bpe[1]) > 100  # Python makes no int of thousands of digits
        if too_long or not MIN_BPE_SIZE <= int(bpe[1]) <= MAX_BPE_SIZE:
            raise UserError(f"tokenizer must be bpe:N with N from {MIN_BPE_SIZE} (256 bytes, 1 merge, end of "
                            f"text) to {MAX_BPE_SIZE}, got {name[:100]}")
    elif name != "bytes" and name not in tiktoken_names:
        advice = closest(name, ["bytes", "bpe:2048", *tiktoken_names])
        raise UserError("tokenizer must be bytes, bpe:N, a folder that holds one, or one of "
                        f"{', '.join(tiktoken_names)}, got {name}{advice}")


def build_tokenizer(name, load_texts=None):
    """The Tokenizer called `name`. Raises UserError.

    name: bytes, bpe:N, what tiktoken knows, or a folder that holds a tokenizer.
    load_texts: called without arguments only for bpe:N; returns the list of str that it is trained on.
    """
    if os.path.isdir(name):
        return load_tokenizer(name)
    if name == "bytes":
        return from_ranks({bytes([byte]): byte for byte in range(256)}, EVERYTHING, {END_OF_TEXT: 256})
    if name.startswith("bpe:"):
        vocab_size = int(name.removeprefix("bpe:"))
        trained = train_bpe(vocab_size - 1, load_texts())  # the last id is the end of text
        ranks = {unspell(token): rank for token, rank in trained.get_vocab().items()}
        return from_ranks(ranks, PATTERN, {END_OF_TEXT: len(ranks)})
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:
        raise UserError(f"tokenizer: tiktoken cannot download {name} ({type(error).__name__}); check the "
                        f"network; {OFFLINE}") from None
    if END_OF_TEXT not in encoding._special_tokens:
        raise UserError(f"tokenizer: {name} has no {END_OF_TEXT} token; {OFFLINE}")
    tokenizer = from_ranks(encoding._mergeable_ranks, encoding._pat_str, encoding._special_tokens)
    if tokenizer.encode(SAMPLE) != encoding.encode_ordinary(SAMPLE):
        raise UserError(f"tokenizer: `tokenizers` splits text in another way than {name}; {OFFLINE}")
    return tokenizer


def train_bpe(vocab_size, texts):
    """A byte-level BPE of `vocab_size` tokens, a tokenizers.Tokenizer.

    Raises UserError when `texts` are too short for that many tokens.
    """
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = split_by(PATTERN)
    # min_frequency: a pair that occurs once would be a token that training hardly sees
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, show_progress=False,
                                  initial_alphabet=list(BYTE_OF))
    bpe.train_from_iterator((part for text in texts for part in cut(text, TRAINING_CHARS)), trainer)
    trained_size = bpe.get_vocab_size()
    if trained_size < vocab_size:
        raise UserError(f"tokenizer: got bpe:{vocab_size + 1}, but the training text gives at most "
                        f"bpe:{trained_size + 1}; try that or less, or more text")
    return bpe


def split_by(pattern):
    """The pre-tokenizer that splits text into the matches of `pattern`, and writes those as bytes."""
    # `tokenizers` reads {1,3}+ as a repetition; at the end of an alternative + changes nothing
    regex = tokenizers.Regex(re.sub(r"(?<=\d})\+", "", pattern))
    return pre_tokenizers.Sequence([pre_tokenizers.Split(regex, behavior="isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def from_ranks(ranks, pattern, special_tokens):
    """The Tokenizer of {token's bytes: id} and {special token: id}, which merges as tiktoken does."""
    tokenizer = Tokenizer(merge_by_rank(ranks, pattern, special_tokens), special_tokens[END_OF_TEXT])
    tokenizer.encoding = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return tokenizer


def merge_by_rank(ranks, pattern, special_tokens):
    """The tokenizers.Tokenizer that merges as tiktoken does: first the pair that makes the lowest rank."""
    halves = [halves_of(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    merges = [tuple(map(spell, pair)) for pair in halves if pair]  # the others are whole pieces only
    vocab = {spell(token): rank for token, rank in ranks.items()} | special_tokens
    bpe = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=None in halves))
    if merges:
        bpe.pre_tokenizer = split_by(pattern)
    else:  # each byte is a token, however the text is split
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in special_tokens])
    return bpe


def halves_of(token, ranks):
    """The two tokens that are merged last into `token` when the pair of the lowest rank is always the next to
    be merged; None where that does not lead to it."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, math.inf) for left, right in pairwise(parts)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[best] >= ranks[token]:
            return None
        parts[best:best + 2] = [parts[best] + parts[best + 1]]
    return tuple(parts)


# A tokenizer in a folder: a run directory, prepared data, a Hugging Face model


def keep_tokenizer(tokenizer, folder, context=None):
    """Write `tokenizer` into `folder`, unless one is there, in two files that transformers' AutoTokenizer
    reads too. context: the most tokens that the model beside it takes. Raises OSError."""
    if any(os.path.exists(os.path.join(folder, name)) for name in (TOKENIZER_FILE, OLD_RUN_META)):
        return
    name = tokenizer.bpe.id_to_token(tokenizer.eot)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": name, "bos_token": name,
                "add_prefix_space": False, "clean_up_tokenization_spaces": False}
    if context is not None:
        settings["model_max_length"] = context
    write_text(os.path.join(folder, "tokenizer_config.json"), json.dumps(settings, indent=1))
    write_text(os.path.join(folder, TOKENIZER_FILE), tokenizer.bpe.to_str(pretty=True))


def load_tokenizer(folder):
    """The Tokenizer of a run directory, of prepared data or of a Hugging Face model. Raises UserError."""
    try:
        return read_tokenizer(folder)
    except OSError as error:
        raise UserError(f"tokenizer: cannot read {error.filename} ({error.strerror})") from None
    except BaseException as error:  # of `tokenizers`: panics too, which are no Exception
        if isinstance(error, UserError | KeyboardInterrupt | SystemExit | MemoryError):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"tokenizer: the one of {folder} cannot be used exactly ({reason}); it must be a "
                        "byte-level BPE that changes no text") from None


def read_tokenizer(folder):
    """The same. Raises OSError and UserError, ValueError where it is none that keeps all of a text, and
    whatever `tokenizers` raises."""
    path = os.path.join(folder, TOKENIZER_FILE)
    if not os.path.exists(path):
        return read_old_tokenizer(folder)
    with open(path, encoding="utf-8") as file:
        bpe = tokenizers.Tokenizer.from_str(file.read())
    tokenizer = Tokenizer(bpe, end_of_text(folder, bpe))
    if missing := BYTE_OF.keys() - bpe.get_vocab().keys():
        raise ValueError(f"it has no token for byte {BYTE_OF[min(missing)]}")
    if getattr(bpe.model, "dropout", None):
        raise ValueError("it drops merges at random")
    # Qwen's tokenizers compose characters first, by Unicode's form NFC, which changes nothing one sees
    if tokenizer.decode(tokenizer.encode(SAMPLE)) not in (SAMPLE, unicodedata.normalize("NFC", SAMPLE)):
        raise ValueError("it changes text")
    return tokenizer


def end_of_text(folder, bpe):
    """The id of the end of text, whatever that is called. Raises ValueError if there is none."""
    added = {token.content: token_id for token_id, token in bpe.get_added_tokens_decoder().items()}
    if END_OF_TEXT in added:
        return added[END_OF_TEXT]
    with open(os.path.join(folder, "tokenizer_config.json"), encoding="utf-8") as file:
        token = json.load(file).get("eos_token")
    if isinstance(token, dict):
        token = token["content"]
    if token not in added:
        raise ValueError(f"its end of text is {token!r}, which is no token")
    return added[token]


def read_old_tokenizer(folder):
    """The same for what an older version wrote: ranks in tiktoken's format, the rest in a JSON file."""
    paths = [os.path.join(folder, name) for name in (OLD_RUN_META, "meta.json")]
    paths = [path for path in paths if os.path.exists(path)]
    if not paths:
        raise UserError(f"tokenizer: {folder} holds none; try a folder of prepared data or a run directory "
                        f"(if an older version wrote that, `python train.py {folder}` adds its tokenizer)")
    with open(paths[0], encoding="utf-8") as file:
        saved = json.load(file)["tokenizer"]
    with open(os.path.join(folder, OLD_TOKENIZER_FILE), "rb") as file:
        content = file.read()
    if hashlib.sha256(content).hexdigest() != saved["sha256"]:
        raise ValueError(f"{OLD_TOKENIZER_FILE} is not what was written")
    if not saved["pattern"]:
        raise ValueError("the tokenizer's pattern is empty")
    ranks = {}
    for line in content.splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    return from_ranks(ranks, saved["pattern"], saved["special_tokens"])


def tokenizer_identity(name):
    """The name of a tokenizer or, for one in a folder, what tells it from others. Raises UserError."""
    return load_tokenizer(name).identity() if os.path.isdir(name) else name
