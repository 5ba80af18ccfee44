"""Byte-level BPEs as `tokenizers` and `transformers` keep them, in a tokenizer.json: read and written.

A tiktoken.Encoding says less: ids are the order of merges, text is split by one pattern, and nothing happens
to the text before that. What says more than that is rejected, not approximated.
"""

import json
import math
import os
import re
from itertools import pairwise

import tiktoken

from configure import UserError
from data.files import write_text

END_OF_TEXT = "<|endoftext|>"
# How text is split where a tokenizer.json names no pattern: GPT-2's, from its encoder.py
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
UNSPLIT = r"(?s:.+)"
# Text that is encoded both ways to see whether a copy is exact
SAMPLE = ("The 12th of May, 1,234,567.89 dollars; it's DON'T we'll I'D they've\u2019s.\n\n\tdef f(x_1):  "
          "return x**2  # \u00e9t\u00e9 Stra\u00dfe \u041c\u043e\u0441\u043a\u0432\u0430 \u6771\u4eac\u90fd "
          "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \U0001f600\U0001f44d\U0001f3fd e\u0301 \u00b2\u2167 "
          "\x00\x7f\u00a0\u3000  \r\n \r \n   \n  a   b\t\t https://a.b/c?d=e&f=%20 ")


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


def import_tokenizers():
    try:
        import tokenizers
    except ImportError:
        raise UserError("tokenizer: a tokenizer.json needs the package `tokenizers`; pip install tokenizers"
                        ) from None
    return tokenizers


def read_tokenizer_json(folder):
    """The tiktoken.Encoding that does with text what tokenizer.json in `folder` does, but for special tokens,
    which are text like any other when they stand in it. Its end of text, whatever that is called there, is
    <|endoftext|>. Raises UserError where no encoding does exactly that."""
    path = os.path.join(folder, "tokenizer.json")
    tokenizers = import_tokenizers()
    try:
        with open(path, encoding="utf-8") as file:
            spec = json.load(file)
        bpe = tokenizers.Tokenizer.from_file(path)
        special = {token["content"]: token["id"] for token in spec["added_tokens"]}
        ranks = exact_ranks(spec["model"], special)
        encoding = tiktoken.Encoding(os.path.basename(os.path.abspath(folder)), pat_str=pattern_of(spec),
                                     mergeable_ranks=ranks, special_tokens=name_end_of_text(folder, special))
        check_same_ids(encoding, bpe)
        return encoding
    except BaseException as error:  # of `tokenizers` and tiktoken, panics too, which are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"tokenizer: {path} cannot be used exactly ({reason}); takes a byte-level BPE that "
                        "changes no text") from None


def check_same_ids(encoding, bpe):
    """Raises ValueError where an encoding and a tokenizers.Tokenizer read the sample in different ways."""
    if encoding.encode_ordinary(SAMPLE) != bpe.encode(SAMPLE, add_special_tokens=False).ids:
        raise ValueError("tiktoken and tokenizers split a sample in different ways")


def pattern_of(spec):
    """The pattern by which text is split into pieces. Raises ValueError where it is more than one."""
    model, normalizer, splitter = spec["model"], spec.get("normalizer"), spec.get("pre_tokenizer") or {}
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise ValueError(f"its model is {model.get('type')}, byte_fallback {model.get('byte_fallback')}")
    if normalizer is not None:
        raise ValueError(f"it normalizes text: {normalizer.get('type')}")
    steps = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    *splits, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise ValueError(f"its pre_tokenizer ends in {last.get('type')}, or adds spaces")
    patterns = [GPT2_PATTERN] if last.get("use_regex", True) else []
    for step in splits:
        regex = step.get("pattern", {}).get("Regex")
        if step.get("behavior") != "Isolated" or step.get("invert") or regex is None:
            raise ValueError(f"its pre_tokenizer has a step {step.get('type')}")
        patterns.append(regex)
    if len(patterns) > 1:
        raise ValueError("its pre_tokenizer splits text twice")
    return patterns[0] if patterns else UNSPLIT


def exact_ranks(model, special):
    """{token's bytes: rank}. tiktoken merges the pair that makes the token of the lowest id, and looks for
    whole pieces first: that must be the order of the model's merges, and what they lead to. Raises
    ValueError."""
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    vocab = {token: token_id for token, token_id in model["vocab"].items() if token not in special}
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    listed, made = {*merges}, [vocab[left + right] for left, right in merges]
    if made != sorted(made):
        raise ValueError("its ids are not in the order of its merges")
    if missing := byte_of.keys() - vocab.keys():
        raise ValueError(f"it has no token for byte {byte_of[min(missing)]}")
    # A token that stands alone in a piece of text is made by the merge that makes it there, and by no other
    for token in vocab.keys() - byte_of.keys():
        if halves_of(token, vocab) not in listed and not model.get("ignore_merges"):
            raise ValueError(f"its merges do not lead to its token {token!r} as its ids say")
    return {bytes(byte_of[character] for character in token): rank for token, rank in vocab.items()}


def name_end_of_text(folder, special):
    """`special`, {token: id}, with the end of text as <|endoftext|>. Raises ValueError if there is none."""
    if END_OF_TEXT in special:
        return special
    with open(os.path.join(folder, "tokenizer_config.json"), encoding="utf-8") as file:
        token = json.load(file).get("eos_token")
    if isinstance(token, dict):
        token = token["content"]
    if token not in special:
        raise ValueError(f"its end of text is {token!r}, which is no token")
    return {END_OF_TEXT if name == token else name: token_id for name, token_id in special.items()}


def write_tokenizer_json(encoding, folder, context):
    """Write tokenizer.json and tokenizer_config.json, with which transformers' AutoTokenizer does what
    `encoding` does. Raises UserError where it does not, and OSError."""
    tokenizers = import_tokenizers()
    from tokenizers import decoders, models, pre_tokenizers
    table, ranks = bytes_to_unicode(), encoding._mergeable_ranks

    def spell(token):
        return "".join(table[byte] for byte in token)

    try:
        halves = [halves_of(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
        merges = [tuple(map(spell, pair)) for pair in halves if pair]  # the others are whole pieces only
        bpe = tokenizers.Tokenizer(models.BPE(
            {spell(token): rank for token, rank in ranks.items()}, merges, ignore_merges=None in halves))
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        if merges:  # else each byte is a token, however text is split
            # `tokenizers` reads {1,3}+ as a repetition; at the end of an alternative + changes nothing
            pattern = tokenizers.Regex(re.sub(r"(?<=\d})\+", "", encoding._pat_str))
            steps.insert(0, pre_tokenizers.Split(pattern, behavior="isolated"))
        bpe.pre_tokenizer = pre_tokenizers.Sequence(steps)
        bpe.decoder = decoders.ByteLevel()
        special = sorted(encoding._special_tokens.items(), key=lambda item: item[1])
        bpe.add_special_tokens([tokenizers.AddedToken(text, special=True) for text, _ in special])
        if any(bpe.token_to_id(text) != token_id for text, token_id in special):
            raise ValueError("its special tokens are not its last ids")
        check_same_ids(encoding, bpe)
    except Exception as error:  # of `tokenizers`
        raise UserError(f"tokenizer: {encoding.name} cannot be written exactly ({error})") from None
    bpe.save(os.path.join(folder, "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT,
                "bos_token": END_OF_TEXT, "model_max_length": context, "add_prefix_space": False,
                "clean_up_tokenization_spaces": False}
    write_text(os.path.join(folder, "tokenizer_config.json"), json.dumps(settings, indent=1))


def halves_of(token, ranks):
    """The two tokens that are merged last into `token`, bytes or str, when the pair of the lowest rank is
    always the next to be merged; None where that does not lead to it."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, math.inf) for left, right in pairwise(parts)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[best] >= ranks[token]:
            return None
        parts[best:best + 2] = [parts[best] + parts[best + 1]]
    return tuple(parts)
