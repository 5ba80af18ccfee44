"""The data package: what training reads is what was asked for, whole, and the same however it is cut."""

import dataclasses
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
import types
from concurrent.futures import ThreadPoolExecutor

import datasets
import httpx
import numpy as np
import pytest
import torch
from huggingface_hub import errors

from configure import Config, UserError
from data import Data, documents, encodings, folders, prepare, tokens

ODD = "naïve 数 🙂 <|endoftext|> don't\r\n\t x=1234567\n\n\u2028e\u0301 \x00"
WORDS = "the of model width depth loss token batch step lr attention rotary café 数据 🙂 == != 12 345".split()


def text(seed, words=60):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def write(folder, texts, form="jsonl"):
    """A corpus with these documents at `folder`; the path to give as dataset."""
    folder.mkdir(exist_ok=True)
    if form == "txt":
        for i, one in enumerate(texts):
            (folder / f"{i:03}.txt").write_bytes(one.encode())
        return str(folder)
    path = str(folder / f"all.{form}")
    if form == "parquet":
        datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
    else:
        with open(path, "w") as file:
            file.writelines(json.dumps({"text": one}) + "\n" for one in texts)
    return path


def corpus(tmp_path, n=120, first=0, **settings):
    """An opened Data of n small documents."""
    dataset = write(tmp_path / "text", [text(i) for i in range(first, first + n)])
    return Data(prepare(Config(**{"dataset": dataset, "tokenizer": "bytes", "val_fraction": 0.2,
                                  "data_dir": str(tmp_path / "prepared"), **settings})))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("data"))


def split_documents(data, split):
    """The documents of a split, read back from its tokens."""
    ids = np.asarray(getattr(data, split))
    assert ids[-1] == data.eot
    ends = np.flatnonzero(ids == data.eot)
    return [data.decode(ids[start:end]) for start, end in zip([0, *ends[:-1] + 1], ends, strict=True)]


def test_batches_are_the_same_stream_however_it_is_cut(data):
    def stream(batch, cuts):
        return torch.cat([data.batch(7, step, batch, 16, rows=slice(*cut))[0]
                          for step in range(24 // batch * 40) for cut in cuts(batch)])

    whole = stream(24, lambda batch: [(None,)])
    assert torch.equal(whole, stream(24, lambda batch: [(0, 5), (5, 24)]))
    assert torch.equal(whole, stream(8, lambda batch: [(i, i + 2) for i in range(0, batch, 2)]))
    first = torch.cat([data.batch(7, 3, 24, 16, rows=slice(rank, None, 4))[0] for rank in range(4)])
    assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, data.batch(7, 3, 24, 16)[0].tolist()))


def test_batches_hang_on_seed_and_step_alone(data):
    again = Data(data.folder)
    later = {step: data.batch(3, step, 4, 16)[0] for step in (900, 2, 0)}  # across epochs, in any order
    assert all(torch.equal(later[step], again.batch(3, step, 4, 16)[0]) for step in (0, 2, 900))
    assert not torch.equal(data.batch(3, 0, 4, 16)[0], data.batch(4, 0, 4, 16)[0])
    assert not torch.equal(data.batch(3, 0, 4, 16)[0], data.batch(3, 1, 4, 16)[0])


def test_targets_are_the_tokens_shifted_by_one(data):
    x, y = data.batch(0, 5, 8, 32)
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (8, 32)
    stream = np.asarray(data.train, np.int64)
    for row, target in zip(x.numpy(), y.numpy(), strict=True):
        starts = np.flatnonzero((np.lib.stride_tricks.sliding_window_view(stream, 32) == row).all(1))
        assert any((stream[s + 1:s + 33] == target).all() for s in starts)


def test_an_epoch_has_every_window_once_and_the_next_another_order_and_grid(tmp_path):
    data = corpus(tmp_path, n=20)
    data.train, data.vocab_size = np.arange(1003), 1003  # so that a token tells its place
    context, windows = 10, 99
    epochs = [data.batch(1, epoch, windows, context)[0].numpy() for epoch in range(3)]
    for x in epochs:
        starts = np.sort(x[:, 0])
        assert (np.diff(starts) == context).all() and 0 <= starts[0] < context and (np.diff(x) == 1).all()
    assert len({x[:, 0].min() for x in epochs}) > 1, "every epoch cuts the text at the same places"
    assert len({tuple(np.argsort(x[:, 0])) for x in epochs}) == 3


@pytest.mark.parametrize("length", [11, 12, 20, 21, 31])
def test_a_text_of_one_or_two_windows_still_trains(data, length):
    tiny = Data(data.folder)
    tiny.train = np.arange(length)
    assert tiny.batch(0, 3, 4, 10)[1].max() < length


def test_evaluation_windows_are_fixed_places_of_the_validation_text(data):
    windows = data.windows(16, 400)
    assert windows.shape == (25, 17) and np.array_equal(windows, Data(data.folder).windows(16, 415))
    grid = {data.val[i:i + 17].tobytes() for i in range(0, len(data.val) - 16, 16)}
    assert all(window.tobytes() in grid for window in windows)
    whole = data.windows(16, 10**9)[:, 1:].reshape(-1)
    assert np.array_equal(whole, data.val[1:len(whole) + 1]) and len(data.val) - 1 - len(whole) < 16
    numbered = Data(data.folder)
    numbered.val, numbered.vocab_size = np.arange(1001), 1001  # so that a token tells its place
    assert numbered.windows(10, 209)[:, 0].tolist() == [50 * i for i in range(20)], "not spread evenly"
    assert numbered.windows(10, 300)[:, 0].tolist() == [100 * i // 30 * 10 for i in range(30)]


def test_more_data_never_moves_a_document_between_train_and_validation(tmp_path):
    few, many = corpus(tmp_path, 60, first=33), corpus(tmp_path, 120)
    assert few.folder != many.folder
    assert set(split_documents(few, "val")) < set(split_documents(many, "val"))
    assert set(split_documents(few, "train")) < set(split_documents(many, "train"))
    assert 120 * 0.05 < many.meta["val"]["documents"] < 120 * 0.4
    assert tokens.place("text") == int(hashlib.sha256(b"text").hexdigest()[:8], 16) / 2**32


@pytest.mark.parametrize("name", ["bytes", "bpe:300"])
def test_text_comes_back_from_its_tokens_and_never_holds_a_special_one(tmp_path, name):
    texts = [text(i) for i in range(40)] + [ODD, ODD + "b"]
    config = Config(dataset=write(tmp_path / "odd", texts), tokenizer=name, val_fraction=0.3,
                    data_dir=str(tmp_path))
    data = Data(prepare(config))
    assert data.decode(data.encode(ODD)) == ODD and data.eot not in data.encode(ODD)
    assert sorted(split_documents(data, "train") + split_documents(data, "val")) == sorted(texts)
    counts = [data.meta[split] for split in ("train", "val")]
    assert sum(c["bytes"] for c in counts) == sum(len(one.encode()) for one in texts)
    for split in ("train", "val"):  # bits per byte counts each byte of the text, and no end of text
        whole = np.concatenate([[0], np.asarray(getattr(data, split))])[None]
        assert data.target_bytes(whole) == data.meta[split]["bytes"]
    assert data.decode([data.vocab_size + 5, *data.encode("né"), 10**6]) == "né"


def test_bpe_has_exactly_the_asked_size_and_splits_text_as_its_trainer_does():
    texts = [*itertools.islice(documents.from_stdlib(None), 40), *[text(i) + ODD for i in range(50)]]
    learner = encodings.train(1999, texts)
    made = encodings.make("bpe:2000", lambda: texts)
    assert made.n_vocab == 2000 == len(made._mergeable_ranks) + 1 and made.eot_token == 1999
    for one in [*texts, ODD, " \n \n\n", "I'VE 1000000", "a" * 50, "\t\tnew = 'x'  # no\x1c\x85\xa0\n\n"]:
        assert made.encode_ordinary(one) == learner.encode(one).ids


@pytest.mark.parametrize("form", ["txt", "jsonl", "parquet"])
def test_files_folders_and_globs_of_each_kind_give_the_same_documents(tmp_path, form):
    texts = [text(i) for i in range(30)] + ["", " \n", ODD + "end"]
    path = write(tmp_path / "text", texts, form)
    folder, ending = tmp_path / "text", f"**/*.{form}"
    ways = [path, str(folder), str(folder / "*"), str(tmp_path / ending)]
    expected = sorted(one.replace("\r\n", "\n") if form == "txt" else one for one in texts if one.strip())
    for way in ways:  # a text file is read with its line ends made \n
        assert sorted(documents.documents(Config(dataset=way))) == expected


def test_a_long_text_file_becomes_documents_cut_at_blank_lines_and_loses_nothing(tmp_path):
    paragraphs = [text(i, 300) + "\n" * (1 + i % 3) for i in range(200)]
    book, line = "".join(paragraphs), "x" * 300_000
    for name, content in (("a", book), ("b", line), ("c", "end")):
        (tmp_path / f"{name}.txt").write_text(content)
    parts = list(documents.documents(Config(dataset=str(tmp_path))))
    cut = next(i for i, part in enumerate(parts) if part.startswith("xxx"))
    assert "".join(parts[:cut]) == book and "".join(parts[cut:-1]) == line and parts[-1] == "end"
    assert cut > 5 and all(part.endswith("\n\n") for part in parts[:cut - 1])
    assert max(map(len, parts)) <= 2 * documents.LONGEST


def test_bytes_and_escapes_that_are_no_text_are_replaced(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 \xff\n")
    assert list(documents.documents(Config(dataset=str(tmp_path)))) == ["caf\ufffd \ufffd\n"]
    monkeypatch.setattr(documents, "from_stdlib", lambda config: ["half \ud800 pair"])
    assert list(documents.documents(Config())) == ["half ? pair"]


def test_changed_files_and_settings_prepare_anew_and_unchanged_ones_do_not(tmp_path):
    dataset = write(tmp_path / "text", [text(i) for i in range(30)])
    config = Config(dataset=dataset, tokenizer="bytes", val_fraction=0.3, data_dir=str(tmp_path / "p"))
    first = prepare(config)
    stamp = os.stat(os.path.join(first, "train.bin")).st_mtime_ns
    assert prepare(config) == first and os.stat(os.path.join(first, "train.bin")).st_mtime_ns == stamp
    others = [prepare(dataclasses.replace(config, **change)) for change in
              ({"tokenizer": "bpe:260"}, {"max_tokens": 3000}, {"val_fraction": 0.4})]
    write(tmp_path / "text", [text(i) for i in range(29)] + [text(31)])
    assert len({first, prepare(config), *others}) == 5
    total = sum(Data(others[1]).meta[split]["tokens"] for split in ("train", "val"))
    assert 3000 <= total < 4000, "max_tokens stops after the document that reaches it"
    assert prepare(dataclasses.replace(config, dataset=first)) == first, "a prepared folder is a data set"
    with pytest.raises(UserError, match="tokenizer: got bpe:300.*--tokenizer=bytes"):
        prepare(dataclasses.replace(config, dataset=first, tokenizer="bpe:300"))


def test_a_hub_data_set_is_streamed_no_further_than_max_tokens(tmp_path, monkeypatch):
    asked, read = [], []
    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return (read.append(i) or {"text": text(i), "id": i} for i in itertools.count())
    info = types.SimpleNamespace(sha="abc")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, timeout: info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(tokens, "BATCH", 1000)
    config = Config(dataset="owner/name", subset="small", split="half", tokenizer="bytes", max_tokens=10_000,
                    val_fraction=0.3, data_dir=str(tmp_path))
    data = Data(prepare(config))
    assert asked == [(("owner/name", "small"), {"split": "half", "revision": "abc", "streaming": True})]
    assert 10_000 <= len(data.train) + len(data.val) and len(read) < 60


def refusal(tmp_path, **settings):
    """The line that preparing refuses with, after which data_dir holds nothing."""
    data_dir = str(tmp_path / "prepared")
    with pytest.raises(UserError) as caught:
        prepare(Config(**{"tokenizer": "bytes", "data_dir": data_dir, **settings}))
    assert not os.path.isdir(data_dir) or not os.listdir(data_dir), "something was left behind"
    assert "\n" not in str(caught.value)
    return str(caught.value)


REFUSALS = {
    "misspelled": ({"dataset": "stdlb"}, "dataset: .*stdlb.*did you mean stdlib"),
    "missing file": ({"dataset": "T/nope.txt"}, "dataset: no such file or folder: .*nope.txt; takes"),
    "empty glob": ({"dataset": "T/*.csv"}, "dataset: the glob .* matches nothing"),
    "empty folder": ({"dataset": "T/empty"}, r"dataset: .*takes files that end in \.txt.*are none"),
    "other ending": ({"dataset": "T/a.md"}, r"dataset: .*a.md, takes files that end in \.txt"),
    "no text": ({"dataset": "T/blank.txt"}, "dataset: .* holds no text"),
    "one document": ({"dataset": "T/one.txt"}, "dataset: .* is one document.*takes two or more"),
    "broken json": ({"dataset": "T/broken.jsonl"}, "dataset: .* cannot be read"),
    "broken parquet": ({"dataset": "T/broken.parquet"}, "dataset: .* cannot be read"),
    "no such column": ({"dataset": "T/rows.jsonl"}, "text_field: got text.*columns body, n"),
    "a column of numbers": ({"dataset": "T/rows.jsonl", "text_field": "n"}, "text_field: got n.*not text"),
    "no validation": ({"dataset": "T/rows.jsonl", "text_field": "body", "val_fraction": 1e-6},
                      r"val_fraction: got 1e-06.*no validation text among 5.*takes 0\.\d"),
    "no training": ({"dataset": "T/rows.jsonl", "text_field": "body", "val_fraction": 0.999999},
                    r"val_fraction: got 0.999999.*no training text among 5.*takes 0\.\d"),
    "few tokens": ({"dataset": "T/rows.jsonl", "text_field": "body", "val_fraction": 0.5, "max_tokens": 1},
                   "max_tokens: got 1, .*takes more"),
    "subset of a file": ({"dataset": "T/one.txt", "subset": "x"}, "subset: got x, .*takes --subset=None"),
    "split of stdlib": ({"split": "test"}, "split: got test, .*takes --split=train"),
    "hub unreachable": ({"dataset": "owner/name"}, "dataset: .*hub is unreachable.*network.*stdlib"),
    "misspelled tokenizer": ({"tokenizer": "gtp2"}, "tokenizer: got gtp2.*did you mean gpt2"),
    "tokenizer unreachable": ({"tokenizer": "gpt2"}, "tokenizer: .*download gpt2.*bytes and --tok.*bpe"),
    "small bpe": ({"tokenizer": "bpe:257"}, "tokenizer: got bpe:257, takes bpe:N with N from 258"),
    "much bpe for little text": ({"dataset": "T/rows.jsonl", "text_field": "body", "val_fraction": 0.5,
                                  "tokenizer": "bpe:5000"}, r"tokenizer: got bpe:5000.*at most bpe:2\d\d"),
    "data_dir is a file": ({"dataset": "T/rows.jsonl", "text_field": "body", "data_dir": "T/a.md"},
                           "data_dir: cannot write .*takes a folder"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_prepared_is_refused_in_one_line_that_helps(tmp_path, monkeypatch, name):
    def offline(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr("requests.get", offline)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    (tmp_path / "empty").mkdir()
    rows = "".join(json.dumps({"body": f"text {i}", "n": i}) + "\n" for i in range(5))
    for file, content in {"a.md": "# a", "blank.txt": " \n\n", "one.txt": "just one", "rows.jsonl": rows,
                          "broken.jsonl": '{"text": \n', "broken.parquet": "PAR1"}.items():
        (tmp_path / file).write_text(content)
    settings, line = REFUSALS[name]
    settings = {key: value.replace("T/", f"{tmp_path}/") if isinstance(value, str) else value
                for key, value in settings.items()}
    assert re.search(line, refusal(tmp_path, **settings))


def test_a_gated_and_an_unknown_hub_data_set_are_told_apart(tmp_path, monkeypatch):
    for kind, words in ((errors.GatedRepoError, "is gated.*hf auth login"),
                        (errors.RepositoryNotFoundError, "neither a path nor a public data set")):
        def refuse(*args, kind=kind, **kwargs):
            raise kind("401", response=httpx.Response(401, request=httpx.Request("GET", "http://hub")))
        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
        assert re.search(words, refusal(tmp_path, dataset="owner/name"))


def test_a_failure_midway_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "BATCH", 1000)
    def some(config):
        yield from (text(i) for i in range(50))
        raise KeyboardInterrupt
    monkeypatch.setattr(tokens, "documents", some)
    with pytest.raises(KeyboardInterrupt):
        prepare(Config(tokenizer="bytes", data_dir=str(tmp_path)))
    assert os.listdir(tmp_path) == []


KILLED = """
import sys, time
from configure import Config
from data import prepare, tokens
tokens.BATCH = 100
def forever(config):
    for i in range(10**9):
        if i == 1000:
            print("midway", flush=True)
            time.sleep(60)
        yield f"text {i}"
tokens.documents = forever
prepare(Config(tokenizer="bytes", data_dir=sys.argv[1]))
"""


def test_a_killed_preparation_leaves_nothing_that_looks_complete_and_is_cleared_a_day_later(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"midway\n"
    process.kill()
    process.wait()
    [left] = os.listdir(tmp_path)
    assert left.startswith(".") and "meta.json" not in os.listdir(tmp_path / left)
    folders.remove_stale(str(tmp_path))
    assert os.listdir(tmp_path) == [left], "it could be another process's, still at work"
    for path in (tmp_path / left, *(tmp_path / left).iterdir()):
        os.utime(path, (0, time.time() - 2 * folders.DAY))
    folders.remove_stale(str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_two_preparations_at_once_end_with_one_folder(tmp_path, monkeypatch):
    dataset = write(tmp_path / "text", [text(i) for i in range(30)])
    config = Config(dataset=dataset, tokenizer="bytes", val_fraction=0.3, data_dir=str(tmp_path / "p"))
    barrier = threading.Barrier(2)
    original = folders.write
    monkeypatch.setattr(folders, "write", lambda *args: (original(*args), barrier.wait())[0])
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(prepare, [config, config])
    assert first == second and os.listdir(tmp_path / "p") == [os.path.basename(first)]
    Data(first).check(16, 4)


def damage(folder, name, change):
    path = os.path.join(folder, name)
    with open(path, "rb") as file:
        content = file.read()
    with open(path, "wb") as file:
        file.write(change(content))


@pytest.mark.parametrize(("name", "change"), [
    ("train.bin", lambda b: b[:-1]), ("val.bin", lambda b: b + b"\0\0"), ("meta.json", lambda b: b[:-20]),
    ("meta.json", lambda b: b"[]"), ("meta.json", lambda b: b.replace(b'"u2"', b'"f8"')),
    ("meta.json", lambda b: b.replace(b'"tokens"', b'"token"')), ("tokenizer.tiktoken", lambda b: b[5:]),
    ("meta.json", lambda b: b.replace(b'"vocab_size": 257', b'"vocab_size": "257"'))])
def test_a_damaged_folder_is_refused_with_what_to_do(data, tmp_path, name, change):
    folder = str(tmp_path / "copy")
    shutil.copytree(data.folder, folder)
    assert Data(folder).encode("a") == [97]
    damage(folder, name, change)
    with pytest.raises(UserError, match=f"data_dir: {folder} is damaged .*; delete that folder"):
        Data(folder).decode([1])


def test_too_little_text_for_a_batch_or_a_window_is_refused_with_what_fits(data):
    tokens = len(data.train)
    data.check(16, (tokens - 1) // 16)
    with pytest.raises(UserError, match=f"batch: .* there are {tokens}: takes --batch={(tokens - 1) // 16} "):
        data.check(16, tokens // 16 + 1)
    with pytest.raises(UserError, match=f"--batch=1 --context={tokens - 1}"):
        data.check(tokens + 5, 8)
    data.check(tokens - 1, 1)
    with pytest.raises(UserError, match=f"context: .* takes {len(data.val) - 1}"):
        data.windows(len(data.val), 10**9)
    with pytest.raises(UserError, match="eval_tokens: got 15, takes context=16 or more"):
        data.windows(16, 15)


def test_the_command_prepares_the_standard_library_in_one_line(tmp_path):
    command = [sys.executable, "-m", "data.prepare", f"--data_dir={tmp_path}", "--tokenizer=bpe:500"]
    run = subprocess.run([*command, "--max_tokens=300000"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == "", run.stderr
    data = Data(run.stdout.splitlines()[0])
    assert data.vocab_size == 500 and "def " in data.decode(data.train[:2000])
    run = subprocess.run([*command, "--dataset=stdlb"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: dataset: ") and run.stderr.count("\n") == 1
