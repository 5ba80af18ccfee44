"""The data package: training reads the text that was asked for, all of it, however it is divided."""

import base64
import contextlib
import dataclasses
import errno
import glob
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
import types
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
import tiktoken
import tiktoken_ext.openai_public
import torch
from children import prepare_endless_text, run_command
from conftest import column, run
from huggingface_hub import errors
from processes import Fork, wait_until

import data.prepare
from configure import Config, UserError
from data.datasets import MAX_CHARS, describe, documents, find_matches, stdlib_documents
from data.files import atomic_file, is_unfinished, write_text
from data.loader import TokenDataset, prefetch_batches
from data.prepare import hash_fraction, prepare, remove_stale_folders, tokenizer_training_texts
from data.tokenizer import PATTERN, SAMPLE, build_tokenizer, cut, keep_tokenizer, load_tokenizer, train_bpe

ODD_TEXT = "naïve 数 🙂 <|endoftext|> don't\r\n\t x=1234567\n\n\u2028e\u0301 \x00"
WORDS = "the of model width depth loss token batch step lr attention rotary café 数据 🙂 == != 12 345".split()
ZSTD_MODULE = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"


def make_text(seed, words=60):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def write_corpus(folder, texts, form="jsonl"):
    """Write these documents into `folder`, in one file but for .txt; returns the path to give as dataset."""
    folder.mkdir(exist_ok=True)
    if form == "txt":
        for i, text in enumerate(texts):
            (folder / f"{i:03}.txt").write_bytes(text.encode())
        return str(folder)
    path = folder / f"all.{form}"
    table = pyarrow.table({"text": texts})
    if form == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif form == "csv":
        pyarrow.csv.write_csv(table, path)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def open_corpus(tmp_path, n=120, first=0, **settings):
    """An opened TokenDataset of n small documents."""
    path = write_corpus(tmp_path / "text", [make_text(i) for i in range(first, first + n)])
    return TokenDataset(prepare(Config(**{"dataset": path, "tokenizer": "bytes", "val_fraction": 0.2,
                                          "data_dir": str(tmp_path / "prepared"), **settings})))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return TokenDataset(prepare(mixture(tmp_path_factory.mktemp("mixed"))))


@pytest.fixture(params=["dataset", "mixed"])
def any_dataset(request):
    return request.getfixturevalue(request.param)


def decoded_documents(dataset, split):
    """The documents of a split, read back from its tokens."""
    ids = np.asarray(getattr(dataset, split))
    assert ids[-1] == dataset.eot
    ends = np.flatnonzero(ids == dataset.eot)
    starts = [0, *ends[:-1] + 1]
    return [dataset.tokenizer.decode(ids[start:end]) for start, end in zip(starts, ends, strict=True)]


# Batches


def test_batches_are_the_same_stream_however_it_is_divided(any_dataset):
    def stream(batch, parts):
        return torch.cat([any_dataset.batch(7, step, batch, 16, rows=slice(*part))[0]
                          for step in range(24 // batch * 40) for part in parts(batch)])

    undivided = stream(24, lambda batch: [(None,)])
    assert torch.equal(undivided, stream(24, lambda batch: [(0, 5), (5, 24)]))
    assert torch.equal(undivided, stream(8, lambda batch: [(i, i + 2) for i in range(0, batch, 2)]))
    strided = torch.cat([any_dataset.batch(7, 3, 24, 16, rows=slice(rank, None, 4))[0] for rank in range(4)])
    assert sorted(strided.tolist()) == sorted(any_dataset.batch(7, 3, 24, 16)[0].tolist())


def test_targets_are_the_tokens_shifted_by_one(dataset):
    tokens, targets = dataset.batch(0, 5, 8, 32)
    assert tokens.dtype == targets.dtype == torch.int64 and tokens.shape == targets.shape == (8, 32)
    stream = np.asarray(dataset.train, np.int64)
    for row, target in zip(tokens.numpy(), targets.numpy(), strict=True):
        starts = np.flatnonzero((np.lib.stride_tricks.sliding_window_view(stream, 32) == row).all(1))
        assert any((stream[start + 1:start + 33] == target).all() for start in starts)


def test_an_epoch_has_every_window_once_and_the_next_another_order_and_offset(tmp_path):
    dataset = open_corpus(tmp_path, n=20)
    dataset.train, dataset.vocab_size = np.arange(1003), 1003  # so that a token is its own position
    context, windows = 10, 99
    epochs = [dataset.batch(1, epoch, windows, context)[0].numpy() for epoch in range(3)]
    for tokens in epochs:
        starts = np.sort(tokens[:, 0])
        assert (np.diff(starts) == context).all() and 0 <= starts[0] < context
        assert (np.diff(tokens) == 1).all()
    assert len({tokens[:, 0].min() for tokens in epochs}) > 1, "every epoch starts at the same token"
    assert len({tuple(np.argsort(tokens[:, 0])) for tokens in epochs}) == 3


@pytest.mark.parametrize("length", [11, 12, 20, 21, 31])
def test_a_text_of_one_or_two_windows_can_be_trained_on(dataset, length):
    tiny = TokenDataset(dataset.folder)
    tiny.train = np.arange(length)
    assert tiny.batch(0, 3, 4, 10)[1].max() < length


def test_validation_windows_are_fixed_evenly_spread_parts_of_the_validation_text(dataset):
    windows = dataset.validation_windows(16, 400)
    assert windows.shape == (25, 17)
    assert np.array_equal(windows, TokenDataset(dataset.folder).validation_windows(16, 415))
    grid = {dataset.val[i:i + 17].tobytes() for i in range(0, len(dataset.val) - 16, 16)}
    assert all(window.tobytes() in grid for window in windows)
    targets = dataset.validation_windows(16, 10**9)[:, 1:].reshape(-1)
    assert np.array_equal(targets, dataset.val[1:len(targets) + 1])
    assert len(dataset.val) - 1 - len(targets) < 16
    numbered = TokenDataset(dataset.folder)
    numbered.val, numbered.vocab_size = np.arange(1001), 1001  # so that a token is its own position
    starts = numbered.validation_windows(10, 209)[:, 0].tolist()
    assert starts == [50 * i for i in range(20)], "not spread evenly"
    assert numbered.validation_windows(10, 300)[:, 0].tolist() == [100 * i // 30 * 10 for i in range(30)]


def test_text_cut_at_max_tokens_says_that_its_validation_windows_are_others(tmp_path):
    every, cut_short = open_corpus(tmp_path), open_corpus(tmp_path, max_tokens=30_000)
    windows = {part.validation_windows(16, 400).tobytes() for part in (every, cut_short)}
    assert len(windows) == 2
    assert "max_tokens=30,000: " in cut_short.describe() and "max_tokens=" not in every.describe()


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, None), (1, 3), (2, 2), (3, None)])
def test_prefetched_chunks_are_the_batches_of_each_step_for_every_rank(dataset, monkeypatch, world_size,
                                                                       micro_batch):
    monkeypatch.setattr("data.loader.PREFETCH_TOKENS", 500)  # several steps a chunk, and several chunks
    config = Config(batch=12, context=16, steps=20, micro_batch=micro_batch, seed=5)
    for rank in range(world_size):
        chunks = list(prefetch_batches(dataset, config, 3, rank, world_size))
        assert len(chunks) > 1 and all(chunk.device.type == "cpu" for chunk in chunks)
        steps = torch.cat(chunks)
        rank_batch = 12 // world_size
        pass_batch = micro_batch or rank_batch
        assert steps.dtype == torch.int64
        assert steps.shape == (17, 2, rank_batch // pass_batch, pass_batch, 16)
        for step, batch in enumerate(steps, start=3):
            rows = slice(rank * rank_batch, (rank + 1) * rank_batch)
            for half, expected in zip(batch, dataset.batch(5, step, 12, 16, rows), strict=True):
                assert torch.equal(half.reshape(-1, 16), expected)


def test_the_next_chunk_is_gathered_while_this_one_is_used(dataset, monkeypatch):
    monkeypatch.setattr("data.loader.PREFETCH_TOKENS", 4 * 16)  # a chunk is one step
    gathered = {step: threading.Event() for step in range(3)}
    original = TokenDataset.batch

    def batch(self, seed, steps, *args):
        result = original(self, seed, steps, *args)
        gathered[steps[0]].set()
        return result

    monkeypatch.setattr(TokenDataset, "batch", batch)
    chunks = prefetch_batches(dataset, Config(batch=4, context=16, steps=3), 0)
    for step, _ in enumerate(chunks):
        if step < 2:
            assert gathered[step + 1].wait(20), "the next chunk is gathered only when it is asked for"


def test_an_error_of_the_prefetching_thread_reaches_the_caller(dataset):
    broken = TokenDataset(dataset.folder)
    broken.train = np.full(1000, 65535, np.uint16)
    with pytest.raises(UserError, match="is damaged .*token 65535 in a vocabulary of 257"):
        next(prefetch_batches(broken, Config(batch=4, context=16, steps=3), 0))


@pytest.mark.parametrize(("settings", "world_size", "line"), [
    ({"batch": 12, "micro_batch": 4}, 2, "batch must be a multiple of 8 "),
    ({"batch": 6}, 4, "batch must be a multiple of 4 "), ({"batch": 1}, 2, "batch must be a multiple of 2 "),
    ({"batch": 16, "batch_start": 4, "batch_ramp_tokens": 1000}, 8, "batch_start must be a multiple of 8 ")])
def test_a_batch_that_cannot_be_divided_is_rejected_at_once(dataset, settings, world_size, line):
    with pytest.raises(UserError, match=f"^{line}.*processes"):
        prefetch_batches(dataset, Config(**settings), 0, 0, world_size)


# Splits and tokenizers


def test_more_data_never_moves_a_document_between_train_and_validation(tmp_path):
    few, many = open_corpus(tmp_path, 60, first=33), open_corpus(tmp_path, 120)
    assert few.folder != many.folder
    assert set(decoded_documents(few, "val")) < set(decoded_documents(many, "val"))
    assert set(decoded_documents(few, "train")) < set(decoded_documents(many, "train"))
    assert 120 * 0.05 < many.meta["val"]["documents"] < 120 * 0.4
    assert hash_fraction("text") == int(hashlib.sha256(b"text").hexdigest()[:8], 16) / 2**32


@pytest.mark.parametrize("name", ["bytes", "bpe:300"])
def test_text_is_restored_from_its_tokens_and_never_contains_a_special_one(tmp_path, name):
    texts = [make_text(i) for i in range(40)] + [ODD_TEXT, ODD_TEXT + "b"]
    config = Config(dataset=write_corpus(tmp_path / "odd", texts), tokenizer=name, val_fraction=0.3,
                    data_dir=str(tmp_path))
    dataset = TokenDataset(prepare(config))
    tokenizer = dataset.tokenizer
    assert tokenizer.eot == dataset.eot and tokenizer.vocab_size == dataset.vocab_size
    assert tokenizer.decode(tokenizer.encode(ODD_TEXT)) == ODD_TEXT
    assert dataset.eot not in tokenizer.encode(ODD_TEXT)
    assert sorted(decoded_documents(dataset, "train") + decoded_documents(dataset, "val")) == sorted(texts)
    counts = [dataset.meta[split] for split in ("train", "val")]
    assert sum(c["bytes"] for c in counts) == sum(len(text.encode()) for text in texts)
    for split in ("train", "val"):  # bits per byte counts each byte of the text, and none for the end of text
        window = np.concatenate([[0], np.asarray(getattr(dataset, split))])[None]
        assert dataset.target_bytes(window) == dataset.meta[split]["bytes"]
    assert tokenizer.byte_lengths.shape == (dataset.vocab_size,) and tokenizer.byte_lengths.dtype == np.int64
    assert tokenizer.decode([dataset.vocab_size + 5, *tokenizer.encode("né"), 10**6]) == "né"


ODD_TEXTS = [ODD_TEXT, SAMPLE, "", " \n \n\n", "I'VE 1000000", "\t\tnew = 'x'  # no\x1c\x85\xa0\n\n",
             "a//b\n/*\n*/  ", "HTTPServer's camelCase", "<|fim_prefix|><|endoftext|", "\U0001f468\u200d",
             *[character * 5000 for character in " \n\ta\xe9!1"], "\r\n" * 5000]


def test_bpe_has_exactly_the_requested_size_and_splits_text_as_its_trainer_does():
    texts = [*itertools.islice(stdlib_documents(), 4), *[make_text(i) + ODD_TEXT for i in range(50)]]
    bpe = train_bpe(699, texts)
    tokenizer = build_tokenizer("bpe:700", lambda: texts)
    assert tokenizer.vocab_size == 700 == len(tokenizer.ranks) + 1 and tokenizer.eot == 699
    for text in [*texts, *ODD_TEXTS]:
        assert tokenizer.encode(text) == bpe.encode(text).ids


def train_ranks(vocab_size):
    texts = [*itertools.islice(stdlib_documents(), 4), *[make_text(i) + SAMPLE for i in range(50)]]
    return build_tokenizer(f"bpe:{vocab_size}", lambda: texts).ranks


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_a_name_of_tiktokens_gives_tiktokens_tokens(monkeypatch, name):
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(tiktoken_ext.openai_public, loader, lambda *args, **kwargs: train_ranks(450))
    description = getattr(tiktoken_ext.openai_public, name)()
    description.pop("explicit_n_vocab", None)  # of the vocabulary that would be downloaded
    encoding = tiktoken.Encoding(**description)
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: encoding)
    tokenizer = build_tokenizer(name)
    assert tokenizer.vocab_size == encoding.n_vocab and tokenizer.eot == encoding.eot_token
    assert tokenizer.encoding is not None
    for text in ODD_TEXTS:
        assert tokenizer.encode(text) == encoding.encode_ordinary(text)
        assert tokenizer.encode_batch([text, "a"]) == [encoding.encode_ordinary(text), tokenizer.encode("a")]


@pytest.mark.parametrize("name", ["bytes", "bpe:450"])
def test_a_tokenizer_comes_back_as_it_went_and_encodes_much_text_by_tiktoken_to_the_same_tokens(
        tmp_path, name):
    built = build_tokenizer(name, lambda: [make_text(i) + SAMPLE for i in range(50)])
    keep_tokenizer(built, tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.ranks == built.ranks and loaded.eot == built.eot
    for tokenizer in built, loaded:
        assert tokenizer.encoding is not None, "encodes slowly"
        assert tokenizer.encode_batch(ODD_TEXTS) == [tokenizer.encode(text) for text in ODD_TEXTS]


def test_a_long_text_is_encoded_in_parts_that_give_the_tokens_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("data.tokenizer.ENCODED_CHARS", 200)
    monkeypatch.setattr("data.prepare.ENCODED_CHARS", 200)
    choose = random.Random(0)
    pieces = [*WORDS, *8 * [" "], *"\n\t\x85\u3000_", "  ", "\r\n", "'s", "!?", "<|", "e\u0301"]
    texts = ["".join(choose.choices(pieces, k=500)) for _ in range(40)]
    config = Config(dataset=write_corpus(tmp_path / "text", texts), tokenizer="bpe:300", val_fraction=0.3,
                    data_dir=str(tmp_path))
    dataset = TokenDataset(prepare(config))
    documents = {split: decoded_documents(dataset, split) for split in ("train", "val")}
    assert sorted(documents["train"] + documents["val"]) == sorted(texts)
    for split in ("train", "val"):
        expected = []
        for text in documents[split]:
            whole = dataset.tokenizer.bpe.encode(text).ids
            assert dataset.tokenizer.encode(text) == whole and len(cut(text, 200)) > 5
            expected += [*whole, dataset.eot]
        assert getattr(dataset, split).tolist() == expected


def test_a_line_of_letters_without_a_space_takes_time_in_proportion_to_its_length():
    letters = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=160_000))
    seconds = {}
    for length in (20_000, 160_000):
        start = time.process_time()
        tokenizer = build_tokenizer("bpe:500", lambda length=length: [letters[:length]])
        assert tokenizer.decode(tokenizer.encode(letters[:length])) == letters[:length]
        seconds[length] = time.process_time() - start
    assert seconds[160_000] < 30 * seconds[20_000], "8 times as long"


def test_a_tokenizer_is_trained_on_the_start_of_the_training_split_alone(tmp_path):
    path = write_corpus(tmp_path / "text", [make_text(i) for i in range(40)])
    config = Config(dataset=path, tokenizer="bytes", val_fraction=0.5, data_dir=str(tmp_path))
    train = decoded_documents(TokenDataset(prepare(config)), "train")
    assert tokenizer_training_texts(config, 10**6) == train and len(train) < 40
    assert tokenizer_training_texts(config, len(train[0]) + 5) == [train[0], train[1][:5]]


# Where text comes from


@pytest.mark.parametrize("form", ["txt", "jsonl", "parquet", "csv"])
def test_files_folders_and_globs_of_each_format_give_the_same_documents(tmp_path, form):
    texts = [make_text(i) for i in range(30)] + ["", " \n", ODD_TEXT + "end"]
    path = write_corpus(tmp_path / "text", texts, form)
    folder, pattern = tmp_path / "text", f"**/*.{form}"
    expected = sorted(text.replace("\r\n", "\n") if form == "txt" else text for text in texts if text.strip())
    for name in [path, str(folder), str(folder / "*"), str(tmp_path / pattern)]:
        # A text file is read with its line ends made \n
        assert sorted(documents(Config(dataset=name))) == expected


def link_corpus(tmp_path, n=30):
    """A folder of n documents; the test adds links."""
    root = tmp_path / "text"
    (root / "a").mkdir(parents=True)
    (root / "b").mkdir()
    for i in range(n):
        (root / ("a", "b")[i % 2] / f"{i:02}.txt").write_text(make_text(i))
    return root


@pytest.mark.parametrize("name", ["text", "text/**/*.txt", "text/**", "**/*.txt"])
def test_links_that_lead_in_circles_end_and_no_document_is_read_twice(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    root = link_corpus(tmp_path)
    expected = list(documents(Config(dataset=name)))
    assert len(expected) == 30
    for link, target in (("a/up", ".."), ("b/up", ".."), ("a/over", "../b"), ("b/over", "../a"),
                         ("a/itself", "itself"), ("0", "a"), ("b/nowhere.txt", "nowhere")):
        (root / link).symlink_to(target)
    assert list(documents(Config(dataset=name))) == expected
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/more.txt").write_text("more")
    (root / "linked").symlink_to(tmp_path / "outside")
    assert sorted(documents(Config(dataset="text"))) == sorted([*expected, "more"])


def test_globs_match_what_the_standard_library_matches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("a.txt", "b/a.txt", "b/c/a.txt", "b/c/d.txt", ".h/a.txt", "b/.h/a.txt", "b/.a.txt",
                 "x/b/c.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    for pattern in ("**/*.txt", "**/a.txt", "b/**/*.txt", "b/**", "**/c/*", "**/.h/*.txt", "*/**/c/*.txt",
                    "**/[ad].txt", f"{tmp_path}/**/?.txt", "./b/**/d.txt", "**/b/**/a.txt"):
        expected = filter(os.path.isfile, glob.glob(pattern, recursive=True))
        assert {*map(os.path.normpath, find_matches(pattern))} == {*map(os.path.normpath, expected)}, pattern


def compress(path, suffix):
    """Replace the file by a compressed one, in two parts one after the other; returns its path."""
    with open(path, "rb") as file:
        content = file.read()
    codec = gzip
    if suffix == ".zst":
        codec = pytest.importorskip(ZSTD_MODULE)
    middle = len(content) // 2
    os.remove(path)
    with open(path + suffix, "wb") as file:
        file.write(codec.compress(content[:middle]) + codec.compress(content[middle:]))
    return path + suffix


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("form", ["txt", "jsonl", "csv"])
def test_compressed_files_give_the_documents_of_the_files_in_them(tmp_path, form, suffix):
    texts = [make_text(i) for i in range(20)] + ['a, "b"\nNA', "007"]
    path = write_corpus(tmp_path / "text", texts, form)
    assert list(documents(Config(dataset=path))) == texts
    folder = tmp_path / "text"
    for name in os.listdir(folder):
        compress(str(folder / name), suffix)
    assert all(name.endswith(f".{form}{suffix}") for name in os.listdir(folder))
    assert list(documents(Config(dataset=str(folder)))) == texts
    assert list(documents(Config(dataset=str(folder / f"*.{form}{suffix}")))) == texts
    config = Config(dataset=str(folder), text_field="body")
    if form == "txt":
        with pytest.raises(UserError, match="text_field must be text"):
            describe(config)
    else:
        assert describe(config)[0]["files"] == 1
        with pytest.raises(UserError, match="text_field must be one of text, .*got body"):
            list(documents(config))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_compressed_file_is_rejected_rather_than_read_half(tmp_path, suffix):
    text = "".join(f"{random.Random(i).random()}\n" for i in range(20_000))
    (tmp_path / "a.txt").write_text(text)
    path = compress(str(tmp_path / "a.txt"), suffix)
    os.truncate(path, os.path.getsize(path) * 3 // 4)
    with pytest.raises(UserError, match="dataset: cannot read .*ended before"):
        list(documents(Config(dataset=path)))


def test_without_a_zstd_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, ZSTD_MODULE, None)  # what makes `import` fail
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    line = rejection(tmp_path, dataset=str(tmp_path / "a.jsonl.zst"))
    assert re.search(r"dataset: \.zst files need .*pip install backports\.zstd", line)


def test_a_csv_column_is_text_whatever_it_looks_like(tmp_path):
    texts = ["NA", "null", "007", "1e5", "True", "", 'say "a, b"', "two\nlines", " spaces ", "naïve 🙂"]
    (tmp_path / "a.csv").write_text("id,body,n\n" + "".join(
        f'{i},"{text.replace(chr(34), 2 * chr(34))}",{i}\n' for i, text in enumerate(texts)))
    config = Config(dataset=str(tmp_path / "a.csv"), text_field="body")
    assert list(documents(config)) == [text for text in texts if text]
    # More rows than pandas reads at once
    (tmp_path / "a.csv").write_text("body\n" + "\n".join(map(str, range(25_000))))
    assert list(documents(config)) == [str(i) for i in range(25_000)]


def test_formats_are_mixed_in_a_fixed_order_and_a_file_never_continues_another(tmp_path):
    for form in ("csv", "jsonl", "parquet"):
        write_corpus(tmp_path / form, [f"{form} {i}" for i in range(3)], form)
    write_corpus(tmp_path / "txt", ["txt 0", "txt 1", "txt 2"], "txt")
    compress(str(tmp_path / "txt" / "001.txt"), ".gz")
    assert list(documents(Config(dataset=str(tmp_path)))) == [
        f"{form} {i}" for form in ("txt", "jsonl", "parquet", "csv") for i in range(3)]


def test_a_long_text_file_becomes_documents_divided_at_blank_lines_and_loses_nothing(tmp_path):
    paragraphs = [make_text(i, 300) + "\n" * (1 + i % 3) for i in range(200)]
    book, line = "".join(paragraphs), "x" * 300_000
    for name, content in (("a", book), ("b", line), ("c", "end")):
        (tmp_path / f"{name}.txt").write_text(content)
    parts = list(documents(Config(dataset=str(tmp_path))))
    first_of_line = next(i for i, part in enumerate(parts) if part.startswith("xxx"))
    assert "".join(parts[:first_of_line]) == book
    assert "".join(parts[first_of_line:-1]) == line and parts[-1] == "end"
    assert first_of_line > 5 and all(part.endswith("\n\n") for part in parts[:first_of_line - 1])
    assert max(map(len, parts)) <= 2 * MAX_CHARS


READ = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]  # as a program writes them, with a byte order mark
MARKED = ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]  # where that mark stands before them
REJECTED = [*MARKED, "latin-1", "cp1252"]  # without


def test_text_is_decoded_by_its_byte_order_mark_or_rejected_in_every_format(tmp_path, monkeypatch, request):
    choose = random.Random(0)
    cases = [(name, "") for name in READ] + [(name, "\ufeff") for name in MARKED]
    cases += [(name, None) for name in REJECTED]
    for encoding, mark in cases * (100 if request.config.getoption("--long") else 1):
        text = "caf\xe9 \xfc! " + "".join(choose.choices("abc \xe9\xfc\xdf!", k=choose.randrange(200)))
        damaged = mark is not None and choose.random() < 0.2
        contents = {"txt": text, "csv": f'text\n"{text}"\n', "jsonl": f'{{"text": "{text}"}}\n'}
        for form, content in contents.items():
            raw = ((mark or "") + content).encode(encoding)
            if damaged:  # half a character at the end
                raw += b"\xc3" if encoding.startswith("utf-8") else b"\0"
            (tmp_path / f"a.{form}").write_bytes(raw)
            config = Config(dataset=str(tmp_path / f"a.{form}"))
            if mark is not None and not damaged:
                assert list(documents(config)) == [text], (form, encoding)
            else:
                with pytest.raises(UserError, match="^dataset: .*a\\."):
                    list(documents(config))
    monkeypatch.setattr("data.datasets.stdlib_documents", lambda: ["half \ud800 pair"])
    assert list(documents(Config())) == ["half ? pair"]


OTHER_COLUMNS = ["null", '"a"', "1", "2.5", "[1]", '{"b": 1}', "true", "9" * 5000]


def test_columns_beside_the_text_may_change_their_type_and_come_and_go(tmp_path, request):
    choose, texts = random.Random(0), [make_text(i, 5) for i in range(40)]
    (tmp_path / "text").mkdir()
    for _ in range(300 if request.config.getoption("--long") else 5):
        rows = []
        for text in texts:
            fields = [f'"text": {json.dumps(text)}']
            fields += [f'"{name}": {choose.choice(OTHER_COLUMNS)}' for name in choose.sample("xyz", k=2)]
            rows.append("{" + ", ".join(choose.sample(fields, k=len(fields))) + "}\n")
        rows.insert(choose.randrange(5), '{"x": 1}\n')
        (tmp_path / "text/a.jsonl").write_text("".join(rows[:20]))
        (tmp_path / "text/b.jsonl").write_text("".join(rows[20:]))
        for part, x in ("c", pyarrow.nulls(40)), ("d", 40 * [choose.choice([1, "a", [2.5], None])]):
            table = pyarrow.table({"x": x, "text": texts})
            pyarrow.parquet.write_table(table, tmp_path / f"text/{part}.parquet")
        pyarrow.parquet.write_table(table.slice(0, 0), tmp_path / "text/bare.parquet")  # a shard of no rows
        assert list(documents(Config(dataset=str(tmp_path / "text")))) == 3 * texts


def test_folders_of_documentation_and_code_are_read_and_files_of_any_name_that_are_named(tmp_path):
    for name in ("a.md", "b.rst", "c.py", "d.html", "e.png", "f.log", "README", "g.json"):
        (tmp_path / name).write_text(name)
    assert list(documents(Config(dataset=str(tmp_path)))) == ["a.md", "b.rst", "c.py", "d.html"]
    for name, file in ("f.log", "f.log"), ("README", "README"), ("*.log", "f.log"), ("**/README", "README"):
        assert list(documents(Config(dataset=str(tmp_path / name)))) == [file]
    for name in ("g.json", "*.j*"):  # one large row, not text
        with pytest.raises(UserError, match="^dataset .*g.json"):
            list(documents(Config(dataset=str(tmp_path / name))))


def test_the_end_of_each_document_is_held_out_where_there_are_few(tmp_path):
    texts = [make_text(i, 2000) for i in (3, 3, 5)]  # copies too
    config = Config(dataset=write_corpus(tmp_path / "text", texts), tokenizer="bpe:300", val_fraction=0.01,
                    data_dir=str(tmp_path))
    dataset = TokenDataset(prepare(config))
    train, val = (decoded_documents(dataset, split) for split in ("train", "val"))
    assert [a + b for a, b in zip(train, val, strict=True)] == texts
    assert all(0.008 < len(b) / len(a + b) < 0.012 and b[0] == " " for a, b in zip(train, val, strict=True))
    assert val[0] == val[1] and val[0] not in train[0] and tokenizer_training_texts(config, 10**6) == train


def test_one_endless_line_takes_bounded_memory(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 500_000)
    tracemalloc.start()
    dataset = TokenDataset(prepare(Config(dataset=str(tmp_path / "a.txt"), tokenizer="bytes",
                                          data_dir=str(tmp_path / "p"), val_fraction=0.1)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert dataset.train_tokens > 2 * 10**6 and peak < 20e6, "bytes"
    ends = np.flatnonzero(np.asarray(dataset.train) == dataset.eot)
    last = [dataset.tokenizer.decode(dataset.train[end - 5:end]) for end in ends]
    assert len(last) > 10 and all(text.endswith(("word", "word ")) for text in last)


def test_a_hub_data_set_is_streamed_no_further_than_max_tokens(tmp_path, monkeypatch):
    requested, read = [], []

    def load_dataset(*args, **kwargs):
        requested.append((args, kwargs))
        for i in itertools.count():
            read.append(i)
            yield {"text": make_text(i), "id": i}

    info = types.SimpleNamespace(sha="abc")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, timeout: info)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("data.prepare.BATCH_CHARS", 1000)
    config = Config(dataset="owner/name", subset="small", split="half", tokenizer="bytes", max_tokens=10_000,
                    val_fraction=0.3, data_dir=str(tmp_path))
    dataset = TokenDataset(prepare(config))
    assert requested == [(("owner/name", "small"), {"split": "half", "revision": "abc", "streaming": True})]
    assert 10_000 <= len(dataset.train) + len(dataset.val) and len(read) < 60


# Mixtures


def mixture(tmp_path, weights=(0.7, 0.3), **settings):
    """A Config of a mixture of capitals and of small letters, in these weights."""
    small = [" ".join(random.Random(i).choices("the of model layer token".split(), k=60)) for i in range(60)]
    capitals = [text.upper() for text in small]
    names = [write_corpus(tmp_path / "small", small), write_corpus(tmp_path / "capitals", capitals)]
    dataset = ",".join(f"{name}:{weight}" for name, weight in zip(names, weights, strict=True))
    return Config(**{"dataset": dataset, "tokenizer": "bytes", "val_fraction": 0.2,
                     "data_dir": str(tmp_path / "prepared"), "context": 16, "batch": 40, **settings})


def test_a_mixture_takes_its_share_of_each_data_set_in_that_ones_own_order(mixed):
    dataset, (small, capitals) = mixed, mixed.parts
    tokens = torch.cat([dataset.batch(3, step, 40, 16)[0] for step in range(75)])  # 3 rounds of 1000
    is_small = (tokens >= ord("a")).logical_and(tokens <= ord("z")).any(1)
    assert [rows.sum().item() for rows in is_small.split(1000)] == [700, 700, 700]
    assert 15 < min(rows.sum().item() for rows in is_small.split(40)), "not mixed within a batch"
    for part, rows in (small, is_small), (capitals, ~is_small):
        ours = tokens[rows]
        theirs = part.batch(3, 0, len(ours), 16)[0]
        assert sorted(ours.tolist()) == sorted(theirs.tolist()), "not every window once an epoch"
    with pytest.raises(UserError, match="eval_tokens"):
        dataset.validation_windows(16, 31)
    for eval_tokens in (16 * 20, 10**9):
        windows = dataset.validation_windows(16, eval_tokens)
        share = ((windows >= ord("a")) & (windows <= ord("z"))).any(1).mean()
        assert share == pytest.approx(0.7, abs=0.01) and len(windows) >= 20
        assert dataset.target_bytes(windows) > len(windows) * 15


def test_the_parts_of_a_mixture_share_a_tokenizer_and_are_prepared_once(tmp_path):
    config = mixture(tmp_path, tokenizer="bpe:290")
    folder = prepare(config)
    dataset = TokenDataset(folder, verify=True)
    assert len({part.hashes["tokenizer"] for part in [dataset, *dataset.parts]}) == 1
    tokens = [dataset.tokenizer.decode([i]) for i in range(256, 289)]
    assert any(token.isupper() for token in tokens) and any(token.islower() for token in tokens)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "prepared").rglob("*.bin")}
    assert prepare(config) == prepare(dataclasses.replace(config, dataset=folder)) == folder
    other = dataclasses.replace(config, tokenizer=folder, dataset=config.dataset.replace("0.7", "1.5"))
    assert TokenDataset(prepare(other)).hashes["train"] != dataset.hashes["train"]
    parts = ",".join(f"{part.folder}:1" for part in dataset.parts)  # which bring their tokenizer
    assert TokenDataset(prepare(Config(dataset=parts, data_dir=config.data_dir))).tokenizer.vocab_size == 290
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "prepared").rglob("*.bin")} == before
    with pytest.raises(UserError, match="^tokenizer must be"):
        prepare(Config(dataset=parts, data_dir=config.data_dir, tokenizer="bytes"))
    shutil.rmtree(dataset.parts[1].folder)
    with pytest.raises(UserError, match="data_dir: "):
        TokenDataset(folder)


def test_a_run_on_a_mixture_resumes_to_the_same_bits(tmp_path, corpus):
    texts = {name: getattr(mixture(tmp_path), name) for name in ("dataset", "tokenizer", "val_fraction")}
    settings = corpus | texts | {"steps": 8, "checkpoint_every": 4, "sample_tokens": 0}
    whole = run(settings)
    run(settings, out=str(tmp_path / "run"))
    os.replace(tmp_path / "run/previous.pt", tmp_path / "run/last.pt")  # as if killed after step 4
    resumed = run(settings, out=str(tmp_path / "run"))
    assert column(resumed) == column(whole) and resumed.val_loss == whole.val_loss
    assert re.search(r"epochs of .*small.*, .*epochs of", TokenDataset(
        prepare(Config(**settings))).describe_epochs(1000))


# Prepared folders


def test_changed_files_and_settings_prepare_again_and_unchanged_ones_do_not(tmp_path):
    path = write_corpus(tmp_path / "text", [make_text(i) for i in range(30)])
    config = Config(dataset=path, tokenizer="bytes", val_fraction=0.3, data_dir=str(tmp_path / "p"))
    first = prepare(config)
    stamp = os.stat(os.path.join(first, "train.bin")).st_mtime_ns
    assert prepare(config) == first and os.stat(os.path.join(first, "train.bin")).st_mtime_ns == stamp
    others = [prepare(dataclasses.replace(config, **change)) for change in
              ({"tokenizer": "bpe:260"}, {"max_tokens": 3000}, {"val_fraction": 0.4})]
    write_corpus(tmp_path / "text", [make_text(i) for i in range(29)] + [make_text(31)])
    assert len({first, prepare(config), *others}) == 5
    total = sum(TokenDataset(others[1]).meta[split]["tokens"] for split in ("train", "val"))
    assert 3000 <= total < 4000, "max_tokens must end after the document that reaches it"
    assert prepare(dataclasses.replace(config, dataset=first)) == first, "a prepared folder is a data set"
    assert prepare(Config(dataset=first)) == first, "a default is not asked for"
    for change in ({"tokenizer": "bpe:300"}, {"val_fraction": 0.4}, {"max_tokens": 3000}):
        with pytest.raises(UserError, match=f"^{[*change][0]} must be "):
            prepare(dataclasses.replace(config, dataset=first, **change))


def test_other_text_of_the_same_size_and_time_stamp_is_prepared_again(tmp_path):
    path = write_corpus(tmp_path / "text", [make_text(i) for i in range(30)])
    config = Config(dataset=path, tokenizer="bytes", val_fraction=0.3, data_dir=str(tmp_path / "p"))
    first, content, status = prepare(config), (tmp_path / "text/all.jsonl").read_text(), os.stat(path)
    time.sleep(0.05)  # more than the time stamps' resolution
    (tmp_path / "text/all.jsonl").write_text(content.replace("model", "MODEL"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = prepare(config)
    assert first != second == prepare(config)
    assert "MODEL" in "".join(decoded_documents(TokenDataset(second), "train"))


def as_an_older_version(folder, pattern):
    """Turn a prepared folder into what older versions wrote, with tiktoken's format of tokenizers."""
    meta = json.loads((folder / "meta.json").read_text())
    ranks = build_tokenizer(str(folder)).ranks
    tokens = sorted(ranks, key=ranks.get)
    lines = [base64.b64encode(token) + b" %d\n" % ranks[token] for token in tokens]
    (folder / "tokenizer.tiktoken").write_bytes(b"".join(lines))
    meta["tokenizer"] |= {"pattern": pattern}
    del meta["tokenizer"]["file_sha256"]
    (folder / "meta.json").write_text(json.dumps(meta))
    for name in ("tokenizer.json", "tokenizer_config.json", "checked.json"):
        (folder / name).unlink()


@pytest.mark.parametrize(("name", "pattern"), [("bytes", "(?s:.)"), ("bpe:262", PATTERN)])
def test_a_folder_of_an_earlier_version_is_found_and_read(tmp_path, monkeypatch, name, pattern):
    monkeypatch.chdir(tmp_path)
    os.mkdir("text")
    with open("text/all.jsonl", "w") as file:
        file.writelines(json.dumps({"text": f"document {i}"}) + "\n" for i in range(30))
    os.utime("text/all.jsonl", ns=(10**18, 10**18))
    config = Config(dataset="text", tokenizer=name, val_fraction=0.3, data_dir="prepared")
    folder = tmp_path / prepare(config)
    new = TokenDataset(str(folder))
    encoded, identity = new.tokenizer.encode(SAMPLE), new.tokenizer.identity()
    as_an_older_version(folder, pattern)
    assert prepare(config) == os.path.relpath(folder), "prepared again"
    old = TokenDataset(str(folder))
    assert old.hashes == new.hashes and old.eot == new.eot
    for split in ("train", "val"):
        assert old.hashes[split] == hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest()
    assert old.tokenizer.encode(SAMPLE) == encoded and old.tokenizer.identity() == identity
    if name == "bytes":  # written down from a run of commit cdd884c
        assert folder.name == "text-bytes-3377697d07fa" and list(old.hashes.values()) == [
            "8c633503817a2e568440ed53fe226d553e208f70d9a5dc64120b0010463da599",
            "69bdbc9119d85388ef936b828d00eca7ba8c7e4d975008782b93da2ff53613ca",
            "e66088df4cdb28fbad3c55ac5a7ae741bc402e732ed948eb096a8ed6f852768f"]
    (tmp_path / "run").mkdir()
    shutil.copy(folder / "tokenizer.tiktoken", tmp_path / "run")
    shutil.copy(folder / "meta.json", tmp_path / "run/tokenizer.meta.json")
    assert build_tokenizer("run").encode(SAMPLE) == encoded
    damage(folder, "tokenizer.tiktoken", lambda content: content[5:])
    with pytest.raises(UserError, match="is damaged .*tokenizer.tiktoken"):
        TokenDataset(str(folder)).tokenizer  # noqa: B018


def rejection(tmp_path, **settings):
    """The line that prepare rejects these settings with, after which data_dir holds nothing."""
    data_dir = str(tmp_path / "prepared")
    with pytest.raises(UserError) as caught:
        prepare(Config(**{"tokenizer": "bytes", "data_dir": data_dir, **settings}))
    assert not os.path.isdir(data_dir) or not os.listdir(data_dir), "something was left behind"
    assert "\n" not in str(caught.value)
    return str(caught.value)


REJECTIONS = {
    "misspelled": ({"dataset": "stdlb"}, "dataset: .*stdlb.*did you mean stdlib"),
    "missing file": ({"dataset": "T/nope.txt"}, "dataset: no such file or folder: .*nope.txt"),
    "missing csv, not a hub name": ({"dataset": "nope/nope.csv.gz"}, "dataset: no such file or folder"),
    "empty glob": ({"dataset": "T/*.rst"}, "dataset .* there are none"),
    "empty folder": ({"dataset": "T/empty"}, r"dataset .*must hold text files such as \.txt.*are none"),
    "pipe": ({"dataset": "T/pipe"}, "dataset must be a file or a folder, but .*pipe"),
    "file beneath a file": ({"dataset": "T/one.txt/a.txt"}, "dataset: no such file or folder"),
    "json": ({"dataset": "T/rows.json"}, "dataset .*only others, such as .*rows.json"),
    "binary": ({"dataset": "T/a.png"}, "dataset: .*a.png must be text in UTF-8"),
    "compressed parquet": ({"dataset": "T/a.parquet.gz"}, "dataset .*only others"),
    "no text": ({"dataset": "T/blank.txt"}, "dataset .* must hold text"),
    "broken json": ({"dataset": "T/broken.jsonl"}, "dataset: cannot read .*line 1"),
    "a row of null": ({"dataset": "T/null.jsonl"}, "dataset: cannot read .*line 1 is"),
    "a row of text": ({"dataset": "T/row.jsonl"}, "dataset: cannot read .*line 3 is"),
    "broken parquet": ({"dataset": "T/broken.parquet"}, "dataset: cannot read "),
    "not gzip": ({"dataset": "T/broken.jsonl.gz"}, "dataset: cannot read "),
    "empty csv": ({"dataset": "T/empty.csv"}, "dataset .* must hold text"),
    "csv with an open quote": ({"dataset": "T/quote.csv"}, "dataset: cannot read "),
    "csv with unquoted commas": ({"dataset": "T/commas.csv"}, "dataset: line 2 .*more fields.*double quotes"),
    "a column of numbers": ({"dataset": "T/rows.jsonl", "text_field": "n"}, "text_field must be .*holds 0"),
    "no validation": ({"dataset": "T/rows.jsonl", "text_field": "body", "val_fraction": 1e-6},
                      "val_fraction leaves no text for val of 5 documents"),
    "few tokens": ({"dataset": "T/rows.jsonl", "text_field": "body", "val_fraction": 0.5, "max_tokens": 1},
                   "max_tokens must be more, got 1"),
    "subset of a file": ({"dataset": "T/one.txt", "subset": "x"}, "subset must be None"),
    "split of stdlib": ({"split": "test"}, "split must be train"),
    "hub unreachable": ({"dataset": "owner/name"}, "dataset: .*hub is unreachable.*network.*stdlib"),
    "misspelled tokenizer": ({"tokenizer": "gtp2"}, "tokenizer must be .*got gtp2; did you mean gpt2"),
    "tokenizer unreachable": ({"tokenizer": "gpt2"}, "tokenizer: .*download gpt2.*bytes and --tok.*bpe"),
    "bpe of more digits than Python reads": ({"tokenizer": "bpe:" + 5000 * "9"}, "tokenizer must be bpe:N"),
    "small bpe": ({"tokenizer": "bpe:257"}, "tokenizer must be bpe:N .* 258 "),
    "large bpe for little text": ({"dataset": "T/rows.jsonl", "text_field": "body", "val_fraction": 0.5,
                                   "tokenizer": "bpe:5000"}, r"tokenizer: got bpe:5000.*at most bpe:2\d\d"),
    "data_dir is a file": ({"dataset": "T/rows.jsonl", "text_field": "body", "data_dir": "T/a.md"},
                           "data_dir: cannot write "),
    "mixture with no weight for one": ({"dataset": "stdlib:0.5,T/one.txt"}, "dataset must be .* weight"),
    "mixture of one": ({"dataset": "stdlib:1"}, "dataset must be .* several different"),
    "mixture of the same": ({"dataset": "stdlib:1,stdlib:2"}, "dataset must be .* several different"),
    "mixture with a weight of 0": ({"dataset": "stdlib:1,T/one.txt:0"}, "dataset must be .* above 0"),
    "mixture with a tiny weight": ({"dataset": "stdlib:1,T/one.txt:0.0001"}, "dataset: each weight must be"),
    "mixture with a missing file": ({"dataset": "stdlib:1,T/nope.txt:1"}, "dataset: no such file .*nope"),
    "setting of no part": ({"dataset": "stdlib:1,T/one.txt:1", "text_field": "x"}, "text_field must be text"),
}


@pytest.mark.parametrize("name", REJECTIONS)
def test_what_cannot_be_prepared_is_rejected_in_one_line_that_helps(tmp_path, monkeypatch, name):
    def offline(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr("requests.get", offline)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    (tmp_path / "empty").mkdir()
    rows = "".join(json.dumps({"body": f"text {i}", "n": i}) + "\n" for i in range(5))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n")
    for file, content in {"a.md": "# a", "rows.json": "[{}]", "blank.txt": " \n\n", "one.txt": "just one",
                          "rows.jsonl": rows,
                          "broken.jsonl": '{"text": \n', "broken.parquet": "PAR1", "broken.jsonl.gz": "{}",
                          "a.parquet.gz": "", "empty.csv": "", "quote.csv": 'text\n"open\nb\n',
                          "commas.csv": "text\na, b\nc, d\n", "null.jsonl": 'null\n{"text": "a"}\n',
                          "row.jsonl": '{"text": "a"}\n\n"text"\n'}.items():
        (tmp_path / file).write_text(content)
    settings, line = REJECTIONS[name]
    settings = {key: value.replace("T/", f"{tmp_path}/") if isinstance(value, str) else value
                for key, value in settings.items()}
    assert re.search(line, rejection(tmp_path, **settings))


def test_a_gated_and_an_unknown_hub_data_set_are_told_apart(tmp_path, monkeypatch):
    for error, line in ((errors.GatedRepoError, "is gated.*hf auth login"),
                        (errors.RepositoryNotFoundError, "neither a path nor a public data set")):
        def reject(*args, error=error, **kwargs):
            raise error("401", response=httpx.Response(401, request=httpx.Request("GET", "http://hub")))
        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", reject)
        assert re.search(line, rejection(tmp_path, dataset="owner/name"))


def test_an_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch):
    def some_documents(config):
        yield from (make_text(i) for i in range(50))
        raise KeyboardInterrupt

    monkeypatch.setattr("data.prepare.BATCH_CHARS", 1000)
    monkeypatch.setattr("data.prepare.documents", some_documents)
    with pytest.raises(KeyboardInterrupt):
        prepare(Config(tokenizer="bytes", data_dir=str(tmp_path)))
    assert os.listdir(tmp_path) == []


def test_a_killed_preparation_leaves_nothing_that_looks_complete_and_is_deleted_a_day_later(tmp_path):
    process = Fork(prepare_endless_text, str(tmp_path))
    wait_until(lambda: process.output().endswith("midway\n"), process)
    process.kill()
    process.communicate()
    [left] = os.listdir(tmp_path)
    assert left.startswith(".") and "meta.json" not in os.listdir(tmp_path / left)
    remove_stale_folders(str(tmp_path))
    assert os.listdir(tmp_path) == [left], "it could belong to another process that is still running"
    for path in (tmp_path / left, *(tmp_path / left).iterdir()):
        os.utime(path, (0, time.time() - 2 * data.prepare.STALE_AFTER))
    remove_stale_folders(str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_two_simultaneous_preparations_end_with_one_folder(tmp_path, monkeypatch):
    path = write_corpus(tmp_path / "text", [make_text(i) for i in range(30)])
    config = Config(dataset=path, tokenizer="bytes", val_fraction=0.3, data_dir=str(tmp_path / "p"))
    barrier = threading.Barrier(2)
    original = data.prepare.write_tokens

    def write_tokens(*args):
        meta = original(*args)
        barrier.wait()
        return meta

    monkeypatch.setattr("data.prepare.write_tokens", write_tokens)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(prepare, [config, config])
    assert first == second and os.listdir(tmp_path / "p") == [os.path.basename(first)]
    TokenDataset(first).check_fills_batch(16, 4)


def damage(folder, name, change):
    path = os.path.join(folder, name)
    with open(path, "rb") as file:
        content = file.read()
    os.remove(path)
    if change is not None:
        with open(path, "wb") as file:
            file.write(change(content))


def crafted(change):
    """What `change` makes of a meta.json, as a function of its bytes."""
    def apply(content):
        meta = json.loads(content)
        change(meta)
        return json.dumps(meta).encode()
    return apply


DAMAGES = [
    ("train.bin", lambda b: b[:-1]), ("val.bin", lambda b: b + b"\0\0"), ("val.bin", None),
    ("tokenizer.json", lambda b: b[5:]), ("tokenizer.json", lambda b: b.replace(b'"BPE"', b'"BPX"')),
    ("tokenizer.json", None), ("meta.json", lambda b: b[:-20]), ("meta.json", lambda b: b"[]"),
    ("meta.json", lambda b: b"[" * 100_000), ("meta.json", lambda b: b.replace(b'"u2"', b'"f8"')),
    *(("meta.json", crafted(change)) for change in (
        lambda meta: meta["train"].pop("tokens"), lambda meta: meta["train"].pop("sha256"),
        lambda meta: meta.update(vocab_size="257"), lambda meta: meta.update(vocab_size=257.0),
        lambda meta: meta.update(vocab_size=200), lambda meta: meta.update(vocab_size=300),
        lambda meta: meta.update(tokenizer=3),
        lambda meta: meta["tokenizer"].update(special_tokens={"<|endoftext|>": 300}),
        lambda meta: meta["tokenizer"].update(special_tokens={"<|endoftext|>": -1})))]


@pytest.mark.parametrize(("name", "change"), DAMAGES)
def test_a_damaged_folder_is_rejected_with_what_to_do(dataset, tmp_path, name, change):
    folder = str(tmp_path / "copy")
    shutil.copytree(dataset.folder, folder)
    assert TokenDataset(folder).tokenizer.encode("a") == [97]
    damage(folder, name, change)
    with pytest.raises(UserError, match=f"data_dir: {folder} is damaged .*; move that folder away"):
        TokenDataset(prepare(Config(dataset=folder))).tokenizer.decode([1])


def test_a_folder_that_cannot_be_read_is_not_called_damaged_nor_what_cannot_be_read_unwritable(
        dataset, tmp_path, monkeypatch):
    def fail(path, *args, **kwargs):
        if str(path) == f"{dataset.folder}/train.bin" or str(path).endswith(".jsonl"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        return original(path, *args, **kwargs)

    original = open
    text = write_corpus(tmp_path / "text", ["a", "b"])
    os.makedirs(tmp_path / "folder/closed")
    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(UserError, match=r"^data_dir: cannot read .*train.bin \(Too many open files\)"):
        TokenDataset(dataset.folder, verify=True)
    assert re.search("^dataset: cannot read .*jsonl .Too many open files", rejection(tmp_path, dataset=text))
    listdir = os.listdir

    def deny(path="."):
        if path.endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", deny)  # root, who runs tests in containers, may read anything
    line = rejection(tmp_path, dataset=str(tmp_path / "folder"))
    assert re.search(r"^dataset: cannot read .*closed \(Permission denied\)", line)


def test_text_beside_a_meta_json_of_something_else_is_text_and_never_to_be_deleted(tmp_path):
    write_corpus(tmp_path / "text", [make_text(i) for i in range(30)], "txt")
    config = Config(dataset=str(tmp_path / "text"), tokenizer="bytes", val_fraction=0.3,
                    data_dir=str(tmp_path / "prepared"))
    expected = prepare(config)
    for content in ('{"name": "my thesis"}', "[]", "{", '{"format": "zip"}', "[" * 100_000):
        (tmp_path / "text/meta.json").write_text(content)
        assert prepare(config) == expected
    (tmp_path / "text/train.bin").write_text("a file of mine")
    assert prepare(config) == expected


def rewrite(path, content, later=0):
    """Other bytes under the same size and, but for these nanoseconds, the same time stamp."""
    status = os.stat(path)
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + later))


def test_tokens_are_compared_with_their_sha256_where_the_stamp_of_their_file_is_new_or_on_request(
        dataset, tmp_path, monkeypatch):
    folder, digests = tmp_path / "copy", []
    assert "checked.json" in os.listdir(dataset.folder)
    shutil.copytree(dataset.folder, folder)  # keeps the time stamps
    monkeypatch.setattr("data.loader.hashlib.file_digest",
                        lambda file, name: digests.append(file.name) or hashlib.sha256(file.read()))
    TokenDataset(str(folder))
    assert digests == []
    os.remove(folder / "checked.json")  # as an earlier version left it
    for _ in range(2):
        TokenDataset(str(folder))
    assert len(digests) == 2, "train.bin and val.bin, once"
    for name in ("train.bin", "val.bin"):
        before = (folder / name).read_bytes()
        shuffled = np.random.default_rng(0).permutation(np.frombuffer(before, "<u2")).tobytes()
        rewrite(folder / name, shuffled, later=1000)
        with pytest.raises(UserError, match=f"is damaged .*{name} does not match its sha256.*move that"):
            TokenDataset(str(folder))
        rewrite(folder / name, before, later=1000)
        TokenDataset(str(folder))
        rewrite(folder / name, shuffled)
        TokenDataset(str(folder))
        with pytest.raises(UserError, match=f"{name} does not match its sha256"):
            data.prepare.main([f"--dataset={folder}", "--tokenizer=bytes", "--val_fraction=0.2", "--verify"])
        rewrite(folder / name, before)


def test_too_little_text_for_a_batch_or_a_window_is_rejected_with_what_fits(dataset):
    tokens = len(dataset.train)
    largest = (tokens - 1) // 16
    dataset.check_fills_batch(16, largest)
    with pytest.raises(UserError, match=f"batch x context .* at most {tokens},.*try --batch={largest} "):
        dataset.check_fills_batch(16, tokens // 16 + 1)
    with pytest.raises(UserError, match=f"--batch=1 --context={tokens - 1}"):
        dataset.check_fills_batch(tokens + 5, 8)
    dataset.check_fills_batch(tokens - 1, 1)
    with pytest.raises(UserError, match=f"context must be at most {len(dataset.val) - 1}"):
        dataset.validation_windows(len(dataset.val), 10**9)
    with pytest.raises(UserError, match="eval_tokens must be .*16"):
        dataset.validation_windows(16, 15)


def test_the_command_prepares_the_standard_library_in_one_line(tmp_path):
    words = [f"--data_dir={tmp_path}", "--tokenizer=bytes", "--val_fraction=0.3"]
    right = Fork(run_command, "data.prepare", [*words, "--max_tokens=300000"])
    wrong = Fork(run_command, "data.prepare", [*words, "--dataset=stdlb"])
    output, error_output = right.communicate()
    assert right.returncode == 0 and error_output == "", error_output
    dataset = TokenDataset(output.splitlines()[0])
    assert dataset.vocab_size == 257 and "import " in dataset.tokenizer.decode(dataset.train[:50_000])
    output, error_output = wrong.communicate()
    assert wrong.returncode == 2 and error_output.count("\n") == 1
    assert error_output.startswith("error: dataset: ")


# Files


def test_a_file_is_replaced_completely_or_stays_what_it_was(tmp_path):
    path, backup = tmp_path / "file", tmp_path / "backup"
    write_text(path, "naïve 1")
    with atomic_file(path, backup) as file:
        file.write(b"2")
        assert path.read_text("utf-8") == "naïve 1" and not backup.exists()
    assert path.read_text() == "2" and backup.read_text("utf-8") == "naïve 1"
    for error in (OSError, KeyboardInterrupt):
        with pytest.raises(error), atomic_file(path, backup) as file:
            file.write(b"3")
            raise error
    assert path.read_text() == "2" and backup.read_text("utf-8") == "naïve 1"
    assert sorted(os.listdir(tmp_path)) == ["backup", "file"]


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(os.fstat(descriptor).st_size))
    original = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append(paths) or original(*paths))
    path = str(tmp_path / "file")
    write_text(path, "text")
    size, (temporary, target) = calls
    assert size == 4 and target == path and is_unfinished(os.path.basename(temporary), ["file"])


def test_a_writer_that_fails_takes_nothing_from_another_of_the_same_file(tmp_path):
    path = tmp_path / "file"
    with atomic_file(path) as file:
        file.write(b"mine")
        with contextlib.suppress(RuntimeError), atomic_file(path) as other:
            other.write(b"theirs")
            raise RuntimeError
    assert path.read_text() == "mine" and os.listdir(tmp_path) == ["file"]


IMPORTS = """
import sys
import data.datasets
assert not {"numpy", "torch"} & set(sys.modules), "data.datasets imports more than it needs"
sys.modules["torch"] = type(sys)("torch")  # which imports none of these, in two seconds
import data.loader, data.prepare
late = {"datasets", "huggingface_hub", "pandas", "pyarrow"} & set(sys.modules)
assert not late, f"{late} must be imported only by what uses them"
"""


def test_importing_data_loads_only_the_libraries_that_are_needed():
    run = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
