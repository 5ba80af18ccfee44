"""A run on a machine that fails: kills, full disks, damaged files, settings that nobody thought of.

`pytest --long` does each a hundred or a thousand times.
"""

import contextlib
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import time

import pyarrow.parquet
import pytest
import torch
from children import run_train_on_a_small_disk, run_train_until_killed, run_train_with
from conftest import numbers, run, snapshot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from processes import Fork, lab_words, start_train, to_words, wait_for_rows

import train
from configure import SETTINGS, Config, UserError, help_text, names_in
from data.datasets import documents
from data.loader import TokenDataset
from data.prepare import prepare
from model import GPT
from scaling import search
from scaling.sweep import run_trials, trial_configs
from scaling.trials import read_trials
from training.checkpoint import read_checkpoint, read_newest, write_checkpoint
from training.device import select_device
from training.evaluate import evaluate
from training.run_dir import locked_folder

HARD = {"dropout": 0.2, "micro_batch": 2, "position": "rotary", "tied": True, "bias": True, "steps": 40,
        "weight_decay": 0.1, "checkpoint_every": 3, "eval_every": 7, "sample_tokens": 0}


@pytest.fixture(scope="module")
def uninterrupted(corpus):
    return run(corpus | HARD)


def start_run_to_kill(config, how, choose):
    """A process that trains, and is to be killed from without, or kills itself in a call of os.fsync or
    os.replace: a checkpoint is written but not on the disk yet, or not renamed yet."""
    if how == "any moment":
        return start_train(config)
    return Fork(run_train_until_killed, to_words(config), how, choose.randrange(1, 25))


def steps_saved(out):
    """The steps of the newest sound checkpoint in a run directory; 0 where there is no checkpoint."""
    paths = [os.path.join(out, name) for name in ("last.pt", "previous.pt")]
    paths = [path for path in paths if os.path.exists(path)]
    return read_newest(paths, print)[1]["step"] if paths else 0


@pytest.mark.parametrize("how", ["any moment", "fsync", "replace"])
def test_a_run_killed_again_and_again_ends_with_the_bits_of_the_uninterrupted_one(
        corpus, tmp_path, uninterrupted, how, request):
    choose, kills = random.Random(how), 0
    groups, runs, rounds = (12, 3, 4) if request.config.getoption("--long") else (1, 1, 3)
    for group in range(groups):
        configs = [corpus | HARD | {"out": str(tmp_path / f"{group}-{i}")} for i in range(runs)]
        saved = [0] * len(configs)
        for _ in range(rounds):
            processes = [start_run_to_kill(config, how, choose) for config in configs]
            choose.shuffle(processes)
            for process in processes:
                if how == "any moment":
                    time.sleep(choose.uniform(0.0, 0.4))
                    process.kill()
                process.communicate()
                kills += process.returncode == -signal.SIGKILL
            saved_before, saved = saved, [steps_saved(config["out"]) for config in configs]
            assert all(after >= before for before, after in zip(saved_before, saved, strict=True))
        for config in configs:
            check_resumes_to(uninterrupted, config)
    assert kills >= runs * groups


def check_resumes_to(uninterrupted, config):
    """The run in config's folder, resumed, ends as one that nothing interrupted."""
    result, out = run(config), config["out"]
    assert numbers(result) == numbers(uninterrupted)
    for ours, theirs in zip(result.model.parameters(), uninterrupted.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not [name for name in os.listdir(out) if name.endswith(".tmp")]
    with open(os.path.join(out, "metrics.csv")) as file:
        steps = [int(line.split(",")[0]) for line in file.read().splitlines()[1:]]
    assert steps == list(range(41))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def damage(content, kind, choose, bit):
    """`content` damaged: in one bit, cut, or replaced by something else."""
    place = choose.randrange(len(content))
    if kind == "cut":
        return content[:place]
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1:]
    if kind == "noise":
        return choose.randbytes(choose.randrange(1, 5000))
    if kind == "longer":
        return content + b"\0"
    return {"pickle": pickle.dumps(Evil()), "empty": b"", "text": b'{"a": [1, 2]}'}[kind]


def damages(content, count):
    """(kind, bytes) of `count` ways to damage `content`."""
    choose = random.Random(0)
    for i in range(count):
        kind = ("cut", "flip", "noise", "pickle", "empty", "text", "longer")[i % 7]
        yield kind, damage(content, kind, choose, i % 8)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """The directory of a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(corpus | HARD, out=str(folder))
    return folder


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_resumes(
        corpus, finished, uninterrupted, tmp_path, monkeypatch, capsys, request):
    monkeypatch.chdir(tmp_path)
    content, out = (finished / "last.pt").read_bytes(), tmp_path / "run"
    for i, (kind, damaged) in enumerate(damages(content, 350 if request.config.getoption("--long") else 14)):
        shutil.copytree(finished, out)
        (out / "last.pt").write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            read_checkpoint(str(out / "last.pt"))
        if i < 7:
            result = train.train(Config(**corpus | HARD, out=str(out)))
            output = capsys.readouterr().out
            assert "is damaged" in output and "falling back to" in output, kind
            assert numbers(result) == numbers(uninterrupted)
        (out / "last.pt").write_bytes(damaged)
        (out / "previous.pt").write_bytes(damaged)
        before = {name: (out / name).read_bytes() for name in os.listdir(out)}
        with pytest.raises(UserError, match="previous.pt: is damaged"):
            run(corpus | HARD, out=str(out))
        assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before
        shutil.rmtree(out)
    assert os.listdir() == [], "something in a file was executed"


def test_a_good_previous_checkpoint_is_never_replaced_by_a_damaged_last_one(corpus, tmp_path):
    settings = corpus | {"checkpoint_every": 3, "steps": 9, "out": str(tmp_path / "run")}
    run(settings)
    last, previous = (tmp_path / "run" / name for name in ("last.pt", "previous.pt"))
    assert read_checkpoint(str(previous))["step"] == 6
    last.write_bytes(last.read_bytes()[:-100])
    process = Fork(run_train_with, to_words(settings | {"steps": 12}), "die_after_saves", 1)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [read_checkpoint(str(path))["step"] for path in (last, previous)] == [9, 6]
    run(settings, steps=12)
    assert [read_checkpoint(str(path))["step"] for path in (last, previous)] == [12, 9]


@pytest.mark.parametrize("name", ["best.pt", "stable.pt"])
def test_a_run_that_lost_its_newest_checkpoints_is_not_begun_anew_over_what_is_left(corpus, tmp_path, name):
    out = tmp_path / "run"
    run(corpus, schedule="wsd", eval_every=2, out=str(out))
    for other in {"last.pt", "previous.pt", "best.pt", "stable.pt"} - {name}:
        (out / other).unlink()
    before = snapshot(out)
    with pytest.raises(UserError, match=f"^out.* {name}, but"):
        run(corpus, schedule="wsd", eval_every=2, out=str(out))
    assert snapshot(out) == before


def test_a_new_run_killed_between_its_first_two_checkpoints_begins_anew(corpus, tmp_path):
    settings = corpus | {"eval_every": 3, "out": str(tmp_path / "run")}
    run(settings, steps=0)
    (tmp_path / "run/last.pt").unlink()  # best.pt is written first
    assert len(run(settings).history) == 7


@pytest.mark.parametrize("how", ["the folder was made anew", "the lock was deleted"])
def test_a_run_whose_folder_became_another_run_s_writes_nothing_more_there(corpus, tmp_path, how):
    out, found = tmp_path / "run", []
    settings = corpus | {"checkpoint_every": 1, "steps": 9, "out": str(out)}

    def intrude(losses):
        if how == "the folder was made anew":
            shutil.rmtree(out)
        else:
            (out / "run.lock").unlink()
        run(settings, steps=5)
        found.append(snapshot(out))

    with pytest.raises(UserError, match="^out.* run.lock"):
        train.train(Config(**settings), quiet=True, stop_early={3: intrude})
    assert snapshot(out) == found[0] and read_checkpoint(str(out / "last.pt"))["step"] == 5


def test_a_process_that_slept_while_its_folder_became_another_s_harms_nothing(corpus, tmp_path, request):
    settings = corpus | {"steps": 60, "checkpoint_every": 5, "eval_every": 20, "sample_tokens": 0}
    choose, expected = random.Random(0), [numbers(run(settings, seed=seed)) for seed in (0, 1)]
    ended = []
    for i in range(40 if request.config.getoption("--long") else 2):
        out = tmp_path / str(i)
        old = start_train(settings, out=out)
        wait_for_rows(old, out, choose.randrange(40))
        old.send_signal(signal.SIGSTOP)
        removed = choose.random() < 0.6
        if removed:
            shutil.rmtree(out)
        else:
            (out / "run.lock").unlink(missing_ok=True)
        new = start_train(settings, out=out, seed=int(removed))
        wait_for_rows(new, out, choose.randrange(60))
        old.send_signal(signal.SIGCONT)
        for process in (old, new):
            _, errors = process.communicate()
            assert "Traceback" not in errors
            ended.append(process.returncode)
        assert ended[-1] == 0 and ended[-2] in (0, 2), errors
        assert numbers(run(settings, out=str(out), seed=int(removed))) == expected[removed]
        assert not list(out.glob("*.tmp"))
    print(f"{ended[::2].count(2)} of {len(ended[::2])} old processes were rejected")
    assert 2 in ended[::2]


def test_a_lock_that_another_process_holds_now_is_not_removed(tmp_path):
    lock = tmp_path / "run/run.lock"
    with locked_folder(str(tmp_path / "run")):
        lock.unlink()
        with locked_folder(str(tmp_path / "run")) as check_held:
            check_held()
        lock.write_text("a third process's")
    assert lock.read_text() == "a third process's"


def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged_nor_left_out(corpus, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/last.pt").unlink()
    (tmp_path / "run/last.pt").symlink_to(tmp_path / "run")  # a folder: for root every file is readable
    with pytest.raises(UserError, match="last.pt: cannot be read: Is a directory"):
        run(corpus | HARD, out=str(tmp_path / "run"))


def test_what_the_end_of_a_run_needs_is_looked_at_before_it_begins(corpus, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(prepare(Config(**corpus)), folder)
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(UserError, match="is damaged .*tokenizer.json"):
        run(corpus, dataset=str(folder), out=str(tmp_path / "run"), sample_tokens=0)
    assert not (tmp_path / "run").exists()


def test_evaluation_takes_no_more_rows_than_a_pass_of_training_and_counts_as_memory(corpus, monkeypatch):
    shapes, forward = set(), GPT.forward

    def watched_forward(model, tokens_BT, *rest, **options):
        shapes.add(len(tokens_BT))
        return forward(model, tokens_BT, *rest, **options)

    monkeypatch.setattr(GPT, "forward", watched_forward)
    run(corpus, micro_batch=2, sample_tokens=0)
    assert shapes == {1, 2} or shapes == {2}
    big = {"vocab_size": 2**16, "width": 16, "head_dim": 16}
    monkeypatch.setattr("training.device.total_memory", lambda device: 2**30)
    with pytest.raises(UserError, match="^micro_batch: 4 sequences .* --micro_batch=4$"):
        run(corpus, **big)  # 512 windows at once would be 4 GiB of logits
    assert run(corpus, **big, micro_batch=4, steps=0).val_loss > 0


def test_best_pt_is_measured_again_where_the_validation_windows_are_others(corpus, tmp_path, capsys):
    settings = corpus | {"eval_every": 2, "out": str(tmp_path / "run")}
    run(settings, eval_tokens=16)
    best = read_checkpoint(str(tmp_path / "run/best.pt"))
    result = train.train(Config(**settings | {"eval_tokens": 512, "steps": 7, "eval_every": None}))
    again = re.search(r"best.pt has a loss of (\d\.\d+) there", capsys.readouterr().out)[1]
    model = GPT(Config(**best["config"] | {"vocab_size": 257}))
    model.load_state_dict(best["model"])
    config, dataset = Config(**corpus), TokenDataset(prepare(Config(**corpus)))
    expected = evaluate(model, dataset, config, *select_device(config))["val_loss"]
    assert float(again) == pytest.approx(expected, abs=1e-4)
    assert result.best_val_loss == min(expected, result.val_loss)


def test_a_run_of_an_earlier_version_resumes(corpus, tmp_path):
    """Its checkpoint does not name the folder of its tokens; its prepared folder has no checked.json."""
    settings = corpus | {"out": str(tmp_path / "run"), "data_dir": str(tmp_path / "prepared")}
    run(settings)
    path = str(tmp_path / "run/last.pt")
    checkpoint = read_checkpoint(path)
    del checkpoint["folder"]
    write_checkpoint(path, checkpoint)
    [folder] = (tmp_path / "prepared").iterdir()
    (folder / "checked.json").unlink()
    assert len(run(settings, steps=8).history) == 8


def test_a_damaged_prepared_folder_is_rejected_or_harmless(corpus, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    source, config = prepare(Config(**corpus)), corpus | {"steps": 2, "sample_tokens": 3, "eval_tokens": 2000}
    for name in ("meta.json", "train.bin", "val.bin", "tokenizer.json"):
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


def test_a_token_beyond_the_vocabulary_is_reported(corpus, tmp_path):
    shutil.copytree(prepare(Config(**corpus)), tmp_path / "folder")
    path = tmp_path / "folder/meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 100}))
    with pytest.raises(UserError, match="^data_dir: .* is damaged .*token 256 in a vocabulary of 100"):
        run(corpus, dataset=str(tmp_path / "folder"))


def test_a_full_disk_is_one_line_and_leaves_the_older_checkpoint(corpus, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = (out / "last.pt").read_bytes()
    words = to_words(corpus | HARD | {"out": out, "steps": 60})
    process = Fork(run_train_on_a_small_disk, words, 30_000)
    _, errors = process.communicate()
    assert process.returncode == 2
    [line] = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert f"cannot write {out}" in line and "Traceback" not in errors
    assert (out / "last.pt").read_bytes() == before and not list(out.glob("*.tmp"))
    assert run(corpus | HARD, out=str(out)).val_loss == read_checkpoint(str(finished / "last.pt"))["past"][1]


def test_a_run_killed_after_its_first_checkpoint_begins_once(corpus, tmp_path):
    config = corpus | HARD | {"out": str(tmp_path / "run")}
    run(config, steps=0)
    assert [row["step"] for row in run(config, steps=0).history] == [0]


def test_a_loss_that_is_not_finite_ends_the_run_at_its_step(corpus, tmp_path, monkeypatch, capsys):
    config = corpus | {"steps": 30, "checkpoint_every": 4, "out": str(tmp_path / "run")}
    forward, training_passes = GPT.forward, 0

    def broken_forward(model, tokens_BT, targets_BT=None, cache=None):
        nonlocal training_passes
        out = forward(model, tokens_BT, targets_BT, cache)
        if targets_BT is None:
            return out
        training_passes += 1
        return out * math.nan if training_passes == 11 else out

    monkeypatch.setattr(GPT, "forward", broken_forward)
    result = train.train(Config(**config))
    output = capsys.readouterr().out
    assert result.diverged and "diverged at step 11, in fp32: train_loss nan, " in output
    assert "gradient of " in output and "try a smaller --lr" in output
    assert read_checkpoint(str(tmp_path / "run/last.pt"))["step"] == 8
    monkeypatch.undo()
    assert not run(config).diverged


@pytest.mark.parametrize(("change", "takes"), [
    ({"width": 2**18, "depth": 100}, "a smaller model"), ({"vocab_size": 2**33}, "a smaller model"),
    ({"vocab_size": 2**20, "batch": 1500}, r"--micro_batch=\d+$")])
def test_what_cannot_fit_in_memory_is_rejected_with_what_would(corpus, monkeypatch, change, takes):
    monkeypatch.setattr("training.device.total_memory", lambda device: 2**36)  # of whatever machine this is
    with pytest.raises(UserError, match=f"^micro_batch: .* need at least .* GiB, .*{takes}"):
        run(corpus, **change)


def any_value(name):
    """A strategy for values of the setting `name`, good ones and others."""
    declared = SETTINGS[name]
    kind, description, optional = declared.kind, declared.description, declared.optional
    if kind in (object, bool):
        words = ["true", "false"] if kind is bool else description.split(", ")
        flags = {"true": True, "True": True, "false": False, "False": False}
        values = some.sampled_from([flags.get(word, word) for word in words])
    elif kind is int:
        values = some.integers(0, 40) | some.sampled_from([8, 16, 32, 64, 96, 128, 512])
    elif kind is float:
        values = some.floats(0, 2) | some.sampled_from([1e-9, 1e-3, 0.5, 1.0, 100.0, 1e30])
    else:
        values = some.text(max_size=5)
    return values | some.none() if optional else values


NOT_DRAWN = {"dataset", "tokenizer", "data_dir", "out", "wandb", "steps", "device", "compile"}
DRAWN = sorted(set(SETTINGS) - NOT_DRAWN)


@pytest.fixture(scope="module")
def examples(request):
    return 1000 if request.config.getoption("--long") else 25


def test_any_settings_are_rejected_in_a_line_or_train(corpus, examples):
    @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(some.lists(some.sampled_from(DRAWN), max_size=6, unique=True).flatmap(
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
    assert len(trained) > len(seen) / 10, "most were rejected: this tests little"


def test_a_checkpoint_says_what_made_it(finished):
    checkpoint = read_checkpoint(str(finished / "last.pt"))
    assert checkpoint["versions"]["torch"] == torch.__version__ and "hidden" in checkpoint["table"]
    assert checkpoint["tokens"].keys() == {"train", "val", "tokenizer"}
    by_torch_alone = torch.load(finished / "last.pt", weights_only=True)
    assert by_torch_alone.keys() == checkpoint.keys()


def test_help_groups_what_a_resumed_run_may_change():
    group = help_text().split("\nRun (what a resumed run may change")[1]
    names = {word[2:].split("=")[0] for word in group.split() if word.startswith("--")}
    assert names == {*names_in("run")} >= {"steps", "device", "log_roles", "wandb", "top_k"}
    assert not names & {"schedule", "decay_fraction", "seed", "width"}, "which change its numbers"


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.txt"])
def test_damaged_text_is_rejected_or_read_and_never_half_prepared(tmp_path, monkeypatch, name, request):
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


def grow_folder(root, choose):
    """Fill `root` with files of every format, some empty or odd, and links that lead anywhere in it."""
    folders = [root]
    for i in range(choose.randrange(1, 6)):
        folders.append(choose.choice(folders) / f"d{i}")
        folders[-1].mkdir()
    odd = [None, "", " ", "a", "\x00", "\ud800", "text " * 200, "naïve 数"]
    for i in range(choose.randrange(1, 8)):
        texts = [f"document {i} {j} " * 9 for j in range(choose.choice([0, 0, 1, 20]))]
        texts += choose.choices(odd, k=choose.randrange(3))
        path, form = choose.choice(folders), choose.choice(["parquet", "jsonl", "txt", "csv"])
        if form == "parquet":
            clean = [text and text.encode("utf-8", "replace").decode() for text in texts]
            table = pyarrow.table({"text": pyarrow.array(clean, pyarrow.string())})
            pyarrow.parquet.write_table(table, path / f"{i}.parquet")
        elif form == "jsonl":
            (path / f"{i}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        else:
            content = "text\n" * (form == "csv") + "\n".join(text or "" for text in texts)
            (path / f"{i}.{form}").write_bytes(content.encode("utf-8", "replace"))
    for i in range(choose.randrange(5)):
        target = choose.choice([*folders, *root.rglob("*.*"), "nowhere", f"link{i}"])
        (choose.choice(folders) / f"link{i}").symlink_to(target)


def test_any_data_folder_is_read_once_or_rejected_in_a_line(tmp_path, request):
    choose, read = random.Random(0), 0
    for i in range(200 if request.config.getoption("--long") else 2):
        root = tmp_path / str(i)
        root.mkdir()
        grow_folder(root, choose)
        config = Config(dataset=str(root), tokenizer="bytes", data_dir=str(tmp_path / "prepared"))
        with contextlib.suppress(UserError):  # any other error fails
            texts = list(documents(config))
            numbered = [text for text in texts if text.count("document ") == 9]
            assert len(numbered) == len(set(numbered)), "a document was read twice"
            read += 1
        with contextlib.suppress(UserError):
            prepare(config)
    assert read > i / 3, "most were rejected: this tests little"


def test_a_damaged_trials_csv_is_read_or_rejected_in_a_line(corpus, tmp_path, request):
    configs = trial_configs(Config(**corpus | {"steps": 1}), {"seed": [0, 1, 2]})
    rows = run_trials(configs, str(tmp_path))
    content = (tmp_path / "trials.csv").read_bytes()
    for _, damaged in damages(content, 700 if request.config.getoption("--long") else 70):
        (tmp_path / "trials.csv").write_bytes(damaged)
        with contextlib.suppress(UserError):  # any other error fails
            assert len(read_trials(str(tmp_path))) <= len(rows)


def test_a_damaged_study_is_read_or_rejected_in_a_line(corpus, tmp_path, request, monkeypatch):
    if not request.config.getoption("--long"):
        pytest.skip("takes --long")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search, "RACE", ((1, math.inf),))
    monkeypatch.setattr(search, "OCTAVES", ())
    words = [*lab_words(corpus | {"steps": 1}), "--trials=2", "--seeds=1", "--sampler=tpe", "--space=lr"]
    assert search.main([*words, "--out=search"]) == 0
    content = (tmp_path / "search/study.log").read_bytes()
    shutil.copytree("search", "kept")
    for _, damaged in damages(content, 70):
        (tmp_path / "search/study.log").write_bytes(damaged)
        with contextlib.suppress(UserError):  # any other error fails
            assert search.main([*words, "--out=search"]) == 0
            assert len(read_trials("search")) >= 2
        shutil.rmtree("search")
        shutil.copytree("kept", "search")
    assert sorted(os.listdir()) == ["kept", "search"], "something in a file was executed"
