"""A run on a machine that fails: kills, full disks, damaged files, settings that nobody thought of.

`pytest --long` does each a hundred or a thousand times.
"""

import contextlib
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import time

import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

import train
from configure import KINDS, Config, UserError, help_text
from data import alarms, checkpoints, prepare, runs
from model import GPT

HARD = {"dropout": 0.2, "micro_batch": 2, "position": "rotary", "tied": True, "bias": True, "steps": 40,
        "weight_decay": 0.1, "checkpoint_every": 3, "eval_every": 7, "sample_tokens": 0}


def run(config, **changes):
    return train.train(Config(**config | changes), quiet=True)


def numbers(result):
    return [{**row, "tokens_per_second": 0} for row in result.history], result.val_loss, result.best_step


def in_child(action):
    """The number of a forked process that does `action`, and exits with 0 or, after a UserError, with 2."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        action()
        code = 0
    except UserError:
        code = 2
    finally:
        os._exit(code)


@pytest.fixture(scope="module")
def whole(corpus):
    return run(corpus | HARD)


def killed_within(name, calls):
    """Kills this process with SIGKILL at one of its next calls of os.NAME, before or after it."""
    original, count = getattr(os, name), [0]

    def call(*args):
        count[0] += 1
        if count[0] == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    setattr(os, name, call)


@pytest.mark.parametrize("how", ["any moment", "fsync", "replace"])
def test_a_run_killed_again_and_again_ends_with_the_bits_of_the_uninterrupted_one(
        corpus, tmp_path, whole, how, request):
    choose, kills = random.Random(how), 0
    for trial in range(34 if request.config.getoption("--long") else 3):
        out = tmp_path / str(trial)
        for _ in range(4):
            calls = choose.randrange(1, 25)

            def action(out=out, calls=calls):
                if how != "any moment":  # of a checkpoint: written but not on the disk, or not yet renamed
                    killed_within(how, calls)
                run(corpus | HARD, out=str(out))

            child = in_child(action)
            if how == "any moment":
                time.sleep(choose.uniform(0.0, 0.6))
                os.kill(child, signal.SIGKILL)
            kills += os.waitpid(child, 0)[1] == signal.SIGKILL
        result = run(corpus | HARD, out=str(out))
        assert numbers(result) == numbers(whole)
        assert all(map(torch.equal, result.model.state_dict().values(), whole.model.state_dict().values()))
        assert not [name for name in os.listdir(out) if name.endswith(".tmp")]
        with open(out / "metrics.csv") as file:
            steps = [int(line.split(",")[0]) for line in file.read().splitlines()[1:]]
        assert steps == list(range(41))
    assert kills > trial


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def damages(content, count):
    """(name, bytes) of `count` ways to damage `content`."""
    choose = random.Random(0)
    for i in range(count):
        kind = ("cut", "flip", "noise", "pickle", "empty", "text", "longer")[i % 7]
        place = choose.randrange(len(content))
        yield kind, {"cut": content[:place],
                     "flip": content[:place] + bytes([content[place] ^ 1 << i % 8]) + content[place + 1:],
                     "noise": choose.randbytes(choose.randrange(1, 5000)), "pickle": pickle.dumps(Evil()),
                     "empty": b"", "text": b'{"a": [1, 2]}', "longer": content + b"\0"}[kind]


@pytest.fixture(scope="module")
def kept(corpus, whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept") / "run"
    run(corpus | HARD, out=str(folder))
    return folder


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_goes_on(
        corpus, kept, whole, tmp_path, monkeypatch, capsys, request):
    monkeypatch.chdir(tmp_path)
    content = (kept / "last.pt").read_bytes()
    for i, (kind, damaged) in enumerate(damages(content, 350 if request.config.getoption("--long") else 14)):
        out = tmp_path / "run"
        shutil.copytree(kept, out)
        (out / "last.pt").write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            checkpoints.read(str(out / "last.pt"))
        if i < 7:
            result = train.train(Config(**corpus | HARD, out=str(out)))
            assert "is damaged" in (said := capsys.readouterr().out) and "going back to" in said, kind
            assert numbers(result) == numbers(whole)
        shutil.copy(out / "last.pt", out / "previous.pt")
        (out / "last.pt").write_bytes(damaged)
        (out / "previous.pt").write_bytes(damaged)
        before = {name: (out / name).read_bytes() for name in os.listdir(out)}
        with pytest.raises(UserError, match="previous.pt: is damaged"):
            run(corpus | HARD, out=str(out))
        assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before
        shutil.rmtree(out)
    assert os.listdir() == [], "something in a file was executed"


def test_a_damaged_prepared_folder_is_refused_or_harmless(corpus, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    source, config = prepare(Config(**corpus)), corpus | {"steps": 2, "sample_tokens": 3, "eval_tokens": 2000}
    for name in ("meta.json", "train.bin", "val.bin", "tokenizer.tiktoken"):
        with open(os.path.join(source, name), "rb") as file:
            content = file.read()
        for _, damaged in damages(content, 160 if request.config.getoption("--long") else 14):
            shutil.copytree(source, "folder")
            with open(os.path.join("folder", name), "wb") as file:
                file.write(damaged)
            with contextlib.suppress(UserError):  # any other error fails
                run(config, dataset="folder")
            shutil.rmtree("folder")
    assert os.listdir() == []


def test_a_token_beyond_the_vocabulary_is_said(corpus, tmp_path):
    shutil.copytree(prepare(Config(**corpus)), tmp_path / "folder")
    path = tmp_path / "folder/meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 100}))
    with pytest.raises(UserError, match="^data_dir: .* is damaged .*token 256 in a vocabulary of 100"):
        run(corpus, dataset=str(tmp_path / "folder"))


def test_a_full_disk_is_one_line_and_leaves_the_older_checkpoint(corpus, kept, tmp_path, capfd):
    out = tmp_path / "run"
    shutil.copytree(kept, out)
    before = (out / "last.pt").read_bytes()

    def action():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        words = [f"--{name}={value}" for name, value in (corpus | HARD | {"out": out, "steps": 60}).items()]
        train.main(words)

    status = os.waitpid(in_child(action), 0)[1]
    assert os.waitstatus_to_exitcode(status) == 2
    assert (out / "last.pt").read_bytes() == before and not list(out.glob("*.tmp"))
    assert run(corpus | HARD, out=str(out)).val_loss == checkpoints.read(str(kept / "last.pt"))["past"][1]


def test_a_run_killed_after_its_first_checkpoint_begins_once(corpus, tmp_path):
    config = corpus | HARD | {"out": str(tmp_path / "run")}
    run(config, steps=0)
    assert [row["step"] for row in run(config, steps=0).history] == [0]


def test_a_loss_that_is_no_number_ends_the_run_at_its_step(corpus, tmp_path, monkeypatch, capsys):
    config = corpus | {"steps": 30, "checkpoint_every": 4, "out": str(tmp_path / "run")}
    forward, calls = GPT.forward, []

    def broken(model, tokens_BT, targets_BT=None, cache=None):
        out = forward(model, tokens_BT, targets_BT, cache)
        calls.extend([1] * (targets_BT is not None))
        return out * math.nan if targets_BT is not None and len(calls) == 11 else out

    monkeypatch.setattr(GPT, "forward", broken)
    result = train.train(Config(**config))
    said = capsys.readouterr().out
    assert result.diverged and "diverged at step 11, in fp32: train_loss nan, " in said
    assert "gradient of " in said and "try a smaller --lr" in said
    assert checkpoints.read(str(tmp_path / "run/last.pt"))["step"] == 8
    monkeypatch.undo()
    assert not run(config).diverged


def test_a_leap_of_the_loss_is_told_with_the_share_of_clipped_steps():
    said = []
    leaps = alarms.Leaps(clip=1.0, say=said.append)
    for step in range(1, 302):
        leaps.look({"step": step, "train_loss": 4.0 + 0.1 * math.sin(step) + 3.0 * (step == 250),
                    "grad_norm": 0.5 + (step % 4 == 0)})
    assert len(said) == 1 and said[0].startswith("step 250: the loss leaps to 6.")
    assert "25% were clipped" in said[0]


@pytest.mark.parametrize(("change", "takes"), [
    ({"width": 2**18, "depth": 100}, "a smaller model"), ({"vocab_size": 2**33}, "a smaller model"),
    ({"vocab_size": 2**20, "batch": 1500}, r"--micro_batch=\d+$")])
def test_what_cannot_fit_in_memory_is_refused_with_what_would(corpus, change, takes):
    with pytest.raises(UserError, match=f"^micro_batch: .* need at least .* GiB, .*takes {takes}"):
        run(corpus, **change)


def any_value(name):
    kind, _, words, optional = KINDS[name]
    if kind in (object, bool):
        words = "true, false" if kind is bool else words
        flags = {"true": True, "True": True, "false": False, "False": False}
        values = some.sampled_from([flags.get(word, word) for word in words.split(", ")])
    elif kind is int:
        values = some.integers(0, 40) | some.sampled_from([8, 16, 32, 64, 96, 128, 512])
    elif kind is float:
        values = some.floats(0, 2) | some.sampled_from([1e-9, 1e-3, 0.5, 1.0, 100.0, 1e30])
    else:
        values = some.text(max_size=5)
    return values | some.none() if optional else values


FREE = sorted(set(KINDS) - {"dataset", "tokenizer", "data_dir", "out", "wandb", "steps", "device", "compile"})


@pytest.fixture(scope="module")
def examples(request):
    return 1000 if request.config.getoption("--long") else 40


def test_any_settings_are_refused_in_a_line_or_train(corpus, examples):
    @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(some.lists(some.sampled_from(FREE), max_size=6, unique=True).flatmap(
        lambda names: some.fixed_dictionaries({name: any_value(name) for name in names})))
    def attempt(drawn):
        seen.append(drawn)
        try:
            result = run(corpus, **drawn, steps=2)
        except UserError:
            return
        except (RuntimeError, MemoryError) as error:
            assert "memory" in str(error)
            return
        assert result.diverged or math.isfinite(result.val_loss)
        trained.append(drawn)

    seen, trained = [], []
    attempt()
    assert len(trained) > len(seen) / 10, "most were refused: this tests little"


def test_a_checkpoint_says_what_made_it(kept):
    checkpoint = checkpoints.read(str(kept / "last.pt"))
    assert checkpoint["versions"]["torch"] == torch.__version__ and "hidden" in checkpoint["table"]
    assert checkpoint["tokens"].keys() == {"train", "val", "tokenizer"}
    assert torch.load(kept / "last.pt", weights_only=True).keys() == checkpoint.keys(), "torch alone reads it"


def test_help_groups_what_a_run_that_goes_on_may_change():
    group = help_text().split("\nRun (what a run that goes on may change")[1]
    assert {word[2:].split("=")[0] for word in group.split() if word.startswith("--")} == runs.MAY_CHANGE


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.txt"])
def test_damaged_text_is_refused_or_read_and_never_half_prepared(tmp_path, monkeypatch, name, request):
    monkeypatch.chdir(tmp_path)
    texts = [f"row {i} " + "word " * 50 for i in range(100)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    content = (tmp_path / name).read_bytes()
    for _, damaged in damages(content, 49 if request.config.getoption("--long") else 7):
        (tmp_path / name).write_bytes(damaged)
        with contextlib.suppress(UserError):
            prepare(Config(dataset=name, tokenizer="bytes", data_dir="prepared", val_fraction=0.2))
        assert not [name for name in os.listdir("prepared") if name[0] == "."]
    assert set(os.listdir()) == {"a.parquet", "a.jsonl", "a.txt", "prepared"}
