"""A run on a machine that fails: kills, full disks, damaged files, settings that nobody thought of.

`pytest --long` does each a hundred or a thousand times.
"""

import contextlib
import math
import os
import pickle
import random
import re
import shutil
import signal
import time

import pytest
import torch
from children import run_train_on_a_small_disk, run_train_until_killed, run_train_with
from conftest import numbers, run, snapshot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from processes import Fork, start_train, to_words

import train
from configure import SETTINGS, Config, UserError, help_text, names_in
from data.loader import TokenDataset
from data.prepare import prepare
from model import GPT
from scaling.sweep import run_trials, trial_configs
from scaling.trials import read_trials
from training.checkpoint import read_checkpoint, read_newest
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


def test_a_damaged_trials_csv_is_read_or_rejected_in_a_line(corpus, tmp_path, request):
    configs = trial_configs(Config(**corpus | {"steps": 1}), {"seed": [0, 1, 2]})
    rows = run_trials(configs, str(tmp_path))
    content = (tmp_path / "trials.csv").read_bytes()
    for _, damaged in damages(content, 700 if request.config.getoption("--long") else 70):
        (tmp_path / "trials.csv").write_bytes(damaged)
        with contextlib.suppress(UserError):  # any other error fails
            assert len(read_trials(str(tmp_path))) <= len(rows)
