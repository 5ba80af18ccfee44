"""The text side of a prepared folder: its tokenizer, and how many bytes tokens stand for."""

import functools

import numpy as np

from configure import UserError
from data import encodings


class Vocabulary:
    """What Data knows of text. It has `folder`, `meta` and `vocab_size`."""

    def _damaged(self, error):
        said = " ".join(str(error).split()) or type(error).__name__
        return UserError(f"data_dir: {self.folder} is damaged ({type(error).__name__}: {said}); "
                         "delete that folder, and it will be prepared again")

    @functools.cached_property
    def encoding(self):
        """The tokenizer, a tiktoken.Encoding."""
        try:
            return encodings.load(self.folder, self.meta["tokenizer"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise self._damaged(error) from None

    @functools.cached_property
    def sizes(self):
        """Bytes of each token id, int64 (vocab_size,); special tokens and holes in the vocabulary have 0."""
        sizes = np.zeros(self.vocab_size, np.int64)
        for piece, id in self.encoding._mergeable_ranks.items():
            sizes[id] = len(piece)
        return sizes

    @functools.cached_property
    def pieces(self):
        """{token id: its bytes}; some tokenizers leave holes below vocab_size."""
        special = {id: text.encode() for text, id in self.encoding._special_tokens.items()}
        return {id: piece for piece, id in self.encoding._mergeable_ranks.items()} | special

    def encode(self, text):
        """Token ids of `text`; what looks like a special token in it is text."""
        return self.encoding.encode_ordinary(text)

    def decode(self, tokens):
        """Text of token ids; ids without a token, such as a padded vocabulary's, are skipped."""
        return b"".join(self.pieces.get(int(id), b"") for id in tokens).decode("utf-8", "replace")

    def target_bytes(self, windows):
        """UTF-8 bytes of the windows' target tokens, end of text being 0: what bits per byte divides by."""
        return int(self.sizes[windows[:, 1:]].sum())
