"""Two processes in one folder, and folders that hold what others wrote: nothing is lost, mixed or deleted."""

import json
import os
import re
import signal

import pytest
from children import hold_folder, run_train, run_train_with
from conftest import column, read_rows, run, snapshot
from processes import Fork, start_ranks, start_train, to_words, wait_for_rows, wait_until

import train
from configure import Config, UserError
from training.checkpoint import read_checkpoint
from training.cli import chosen_run_dir
from training.run_dir import LOCK, locked_folder

ENDLESS = {"steps": 100_000, "checkpoint_every": 20, "sample_tokens": 0}


def read_steps(folder):
    return [int(row["step"]) for row in read_rows(folder)]


def write_documents(folder):
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"document {i} " * 40)


def error_line(errors):
    [line] = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in errors
    return line


def test_a_second_run_in_the_folder_of_a_living_one_is_rejected_with_who_holds_it(corpus, tmp_path):
    out = tmp_path / "run"
    first = start_train(corpus | ENDLESS, out=out)
    wait_for_rows(first, out, 5)
    before = (out / "config.json").stat().st_mtime_ns
    second = start_train(corpus | ENDLESS, out=out, seed=1)
    _, errors = second.communicate()
    assert second.returncode == 2
    assert re.match(rf"error: out: {out} is in use by process {first.pid} on \S+, since ", error_line(errors))
    assert (out / "config.json").stat().st_mtime_ns == before
    wait_for_rows(first, out, len(read_steps(out)) + 5)
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate()
    assert first.returncode == 130, errors
    steps = read_steps(out)
    assert steps == list(range(1, len(steps) + 1)) and len(steps) < ENDLESS["steps"]


def test_runs_that_start_together_without_a_name_get_folders_of_their_own(corpus, tmp_path):
    (tmp_path / "mine.py").write_text("steps = 2")
    words = ["mine.py", *to_words({name: corpus[name] for name in corpus if name != "steps"})]
    processes = [Fork(run_train, [*words, f"--seed={seed}"], folder=str(tmp_path)) for seed in range(3)]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    folders = sorted((tmp_path / "out").iterdir())
    assert [folder.name for folder in folders] == ["mine", "mine-2", "mine-3"]
    seeds = [json.loads((folder / "config.json").read_text())["seed"] for folder in folders]
    checkpoints = [read_checkpoint(str(folder / "last.pt"))["config"]["seed"] for folder in folders]
    assert sorted(seeds) == [0, 1, 2] and checkpoints == seeds


def stop(folder):
    (folder / "sample.txt").unlink()


def kill(folder):
    stop(folder)
    (folder / LOCK).touch()


def diverge(folder):
    stop(folder)
    with open(folder / "metrics.csv", "a") as file:
        file.write("3,384,nan\n")


def damage_metrics(folder):
    stop(folder)
    (folder / "metrics.csv").write_bytes(b"\xff\n")


def hide_metrics(folder):
    stop(folder)
    (folder / "metrics.csv").unlink()
    (folder / "metrics.csv").mkdir()  # open() fails, as for a file of somebody else's


@pytest.mark.parametrize(("change", "is_named"), [
    (stop, True), (kill, True), (damage_metrics, True), (hide_metrics, False), (diverge, False),
    (lambda folder: None, False)])
def test_a_new_run_names_an_unfinished_one_of_its_name(corpus, tmp_path, monkeypatch, capsys, change,
                                                       is_named):
    monkeypatch.chdir(tmp_path)
    run(corpus, steps=2, out="out/mine")
    change(tmp_path / "out/mine")
    with chosen_run_dir(Config(), ["mine.py"]) as config:
        assert config.out == "out/mine-2"
    assert ("train.py out/mine`" in capsys.readouterr().err) == is_named


def test_all_unfinished_runs_of_a_name_are_named_in_one_line(tmp_path, monkeypatch, capsys):
    """And nothing that merely begins with that name."""
    monkeypatch.chdir(tmp_path)
    for name, steps in (("mine", 3), ("mine-2", 4), ("mine-10", 5), ("mine-else", 6)):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "last.pt").touch()
        (tmp_path / "out" / name / "metrics.csv").write_text(f"step,tokens\n{steps},1\n")
    with chosen_run_dir(Config(), ["mine.py"]):
        [line] = capsys.readouterr().err.splitlines()
    named = re.findall(r"(\S+) \(after (\d+)", line)
    assert named == [("out/mine", "3"), ("out/mine-2", "4"), ("out/mine-10", "5")]
    assert "train.py out/mine-10`" in line


def test_a_new_run_says_nothing_of_one_that_still_runs(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(corpus, steps=2, out="out/mine")
    stop(tmp_path / "out/mine")
    with locked_folder("out/mine"), chosen_run_dir(Config(), ["mine.py"]):
        assert not capsys.readouterr().err


def test_the_processes_of_one_run_choose_one_folder_and_hold_it_together(corpus, tmp_path):
    os.makedirs(tmp_path / "out/run")  # rank 0 alone looks, so the others cannot see it otherwise
    ranks = start_ranks(2, corpus | ENDLESS, folder=tmp_path)
    wait_for_rows(ranks[0], tmp_path / "out/run-2", 5)
    second = start_ranks(2, corpus | ENDLESS | {"out": tmp_path / "out/run-2"})
    texts = [rank.communicate()[1] for rank in second]
    assert [rank.returncode for rank in second] == [2, 2] and "Traceback" not in "".join(texts), texts
    assert f"out/run-2 is in use by process {ranks[0].pid} " in texts[0]
    assert "another process died" in texts[1]
    ranks[1].send_signal(signal.SIGINT)
    for rank in ranks:
        _, errors = rank.communicate()
        assert rank.returncode == 130, errors
    assert sorted(os.listdir(tmp_path / "out")) == ["run", "run-2"]
    steps = read_steps(tmp_path / "out/run-2")
    assert steps == list(range(1, len(steps) + 1)) and len(steps) < ENDLESS["steps"]


def test_a_lock_dies_with_its_process_and_leaves_no_file_when_it_is_let_go(corpus, tmp_path):
    process = Fork(hold_folder, str(tmp_path / "run"))
    lock = tmp_path / "run/run.lock"
    wait_until(lambda: lock.exists() and lock.read_text(), process)
    with pytest.raises(UserError, match=f"in use by process {process.pid} "), \
            locked_folder(str(tmp_path / "run")):
        pass
    process.kill()
    process.communicate()
    with locked_folder(str(tmp_path / "run")):
        assert f"process {os.getpid()} " in lock.read_text()
    assert os.listdir(tmp_path / "run") == []


def test_two_threads_of_one_process_do_not_share_a_folder_either(corpus, tmp_path):
    with locked_folder(str(tmp_path / "run")), pytest.raises(UserError, match="is in use by process"):
        run(corpus, out=str(tmp_path / "run"))


def test_a_rejected_run_leaves_no_folder_behind(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        train.main(["--dataset=nope.txt"])
    with pytest.raises(UserError, match="no such file"):
        run(corpus, dataset="nope.txt", out="a/b/c")
    assert os.listdir() == []


@pytest.mark.parametrize("names", [["config.json"], ["sample.txt", "metrics.csv"], ["thesis.tmp"],
                                   ["config.json", "best.pt"]])
def test_a_folder_of_other_files_is_rejected_and_left_alone(corpus, tmp_path, names):
    out = tmp_path / "mine"
    out.mkdir()
    for name in names:
        (out / name).write_text('{"model_type": "bert"}')
    before = snapshot(out)
    with pytest.raises(UserError, match=f"^out .*{out}, which holds {sorted(names)[0]} "):
        run(corpus, out=str(out))
    assert snapshot(out) == before


def test_other_files_beside_a_run_stay_and_what_a_kill_left_of_its_own_goes(corpus, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "last.pt.tmp").write_text("what a kill left")
    run(corpus, out=str(out))
    assert not (out / "last.pt.tmp").exists()
    for name in ("thesis.tmp", "notes.md"):
        (out / name).write_text("mine")
    (out / "config.json.5eed.tmp").write_text("what a kill left")
    run(corpus, out=str(out), steps=8)
    assert (out / "thesis.tmp").read_text() == (out / "notes.md").read_text() == "mine"
    assert not (out / "config.json.5eed.tmp").exists()


def test_a_run_inside_its_own_text_is_rejected(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_documents(tmp_path / "text")
    for dataset in ("text", "text/**/*.txt", "text/*/*", str(tmp_path)):
        with pytest.raises(UserError, match="^out .*text/run: .* would be read as text"):
            run(corpus, dataset=dataset, out="text/run")
    assert "run" not in os.listdir("text")
    run(corpus, dataset="text", out="text-run")
    run(corpus, dataset="text/*.txt", out="text/run")  # of which the glob reads nothing


def test_a_run_that_resumes_while_its_text_is_gone_goes_on_with_its_tokens(corpus, tmp_path, monkeypatch,
                                                                           capsys):
    monkeypatch.chdir(tmp_path)
    write_documents(tmp_path / "text")
    settings = corpus | {"dataset": "text", "data_dir": "prepared", "out": str(tmp_path / "run")}
    run(settings)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # relative paths are those of the run's start
    train.main([str(tmp_path / "run"), "--steps=7"])
    assert "no such file or folder: text" in (output := capsys.readouterr().out)
    assert f"resuming on the tokens in {tmp_path}/prepared/text-bytes-" in output
    monkeypatch.chdir(tmp_path)
    os.rename("text", "moved")
    result = run(settings, steps=8)
    assert len(result.history) == 8 and os.listdir("elsewhere") == []
    assert len(os.listdir("prepared")) == 1


def test_a_prepared_folder_may_stand_for_the_text_that_a_run_began_with(corpus, tmp_path):
    text, out = tmp_path / "text", str(tmp_path / "run")
    write_documents(text)
    settings = corpus | {"dataset": str(text), "out": out}
    run(settings)
    (text / "0.txt").write_text("other text")
    with pytest.raises(UserError, match="^dataset .*--dataset=") as caught:
        run(settings, steps=8)
    folder = re.search("--dataset=(.*), which holds those", str(caught.value))[1]
    assert len(run(settings, steps=8, dataset=folder).history) == 8


def test_a_run_on_the_standard_library_survives_another_python(corpus, tmp_path, monkeypatch):
    settings = corpus | {"dataset": "stdlib", "max_tokens": 600_000, "out": str(tmp_path / "run"),
                         "data_dir": str(tmp_path / "prepared"), "val_fraction": 0.3}
    run(settings)
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    assert len(run(settings, steps=8).history) == 8
    assert len(os.listdir(tmp_path / "prepared")) == 1


@pytest.mark.parametrize("error", ["SIGKILL", "MemoryError"])
def test_an_evaluation_that_fails_at_the_end_costs_no_training(corpus, tmp_path, error):
    settings = corpus | {"steps": 10, "checkpoint_every": 4, "eval_every": 5, "sample_tokens": 0}
    out = tmp_path / "run"
    process = Fork(run_train_with, to_words(settings | {"out": out}), "fail_at_evaluation", 3, error)
    process.communicate()
    assert process.returncode in (-signal.SIGKILL, 2)
    assert read_checkpoint(str(out / "last.pt"))["step"] == 10
    assert read_checkpoint(str(out / "previous.pt"))["step"] == 8
    resumed, expected = run(settings, out=str(out)), run(settings)
    for name in ("train_loss", "val_loss"):
        assert column(resumed, name) == column(expected, name)
    assert float(read_rows(out)[-1]["val_loss"]) == expected.val_loss
    assert resumed.best_step == expected.best_step
