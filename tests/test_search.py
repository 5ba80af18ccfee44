"""The search: what it finds, how workers share it, and how it survives kills and databases that are down."""

import math
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from children import claim_draws, hold_trial, run_command
from conftest import snapshot
from processes import TIMEOUT, Fork, lab_words, wait_until

from configure import FOR_TARGET, FOUND_BY_SEARCH, UNFINISHED, Config, UserError, configure
from scaling import search, space, study, sweep
from scaling.space import SPACE, Choice, Range, parse_space
from scaling.trials import read_trials, settings_of
from scaling.verify import as_target
from scaling.worker import Worker
from train import train
from training.cli import describe_search, reject_missing_target, run_name

OPTIONS = {"trials": 8, "seeds": 1, "stack": 1, "sampler": "tpe", "storage": "", "study": "search", "seed": 0}
LR_ONLY = {"lr": Range(2**-14, 2**-5)}


@pytest.fixture(autouse=True)
def short_ending(monkeypatch, unrendered):
    """Fewer trials after the draws: they take most of the time of such small searches; no figure's pixels."""
    monkeypatch.setattr(search, "RACE", ((2, math.inf),))
    monkeypatch.setattr(search, "OCTAVES", (-1, 1))
    monkeypatch.setattr(search, "FURTHER", 0)


def run(corpus, folder, space=SPACE, **options):
    config = Config(**corpus | {name: options.pop(name) for name in [*options] if name not in OPTIONS})
    options = OPTIONS | {"out": str(folder), "seed": config.seed} | options
    return search.run_search(config, space, options)


def start_search(corpus, folder, *words):
    """A process that does what `python -m scaling.search` does."""
    words = [*lab_words(corpus), f"--out={folder}", "--seeds=1", "--sampler=tpe", *words]
    return Fork(run_command, "scaling.search", words)


def draws_of(folder, storage=""):
    """{key: finished trial} of the draws in a folder's study."""
    with Worker(str(folder)) as worker:
        shared = study.SharedStudy(study.open_storage(storage or f"{folder}/study.log"), "search", worker)
        return shared.finished()


def test_a_search_finds_the_rate_that_learns_and_writes_best_py(corpus, tmp_path, rendered):
    found, text, report = run(corpus, tmp_path, LR_ONLY, trials=10, seeds=2, weight_decay=0.01, steps=20)
    mean, error, best = found.best
    draws, others = found.rows()
    assert best.lr > 2**-8, "the default, 2**-9, is too low for 20 steps"
    assert found.key_of(found.config) == draws[0]["config"], "the config's own settings are the first draw"
    finals = [row for row in others if row["lr"] == best.lr]
    assert [row["seed"] for row in finals] == [1, 2], "no seed that chose"
    assert mean == pytest.approx(sum(row["val_loss"] for row in finals) / 2) and error > 0
    other = configure([str(tmp_path / "best.py"), "--width=64", "--seed=5", "--steps=3"])
    assert (other.lr, other.weight_decay, other.width, other.seed) == (best.lr, 0.01, 64, 5)
    assert f"\n{FOUND_BY_SEARCH}: sampler tpe, seed 0, 10 draws and" in text
    assert "(seeds: 2), on seeds that no draw used" in text
    assert report == (tmp_path / "search.txt").read_text() and "best after so many draws: 1: " in report
    assert (tmp_path / "search.png").stat().st_size > 10_000


def test_a_target_is_trained_as_the_search_was_whatever_the_defaults_are(corpus, tmp_path):
    """On its text, by its optimizer, with its block; the target keeps its own size, batches and steps."""
    searched = {"optimizer": "muon", "norm": "layer", "qk_norm": False, "window": 8, "dropout": 0.1,
                "tied": True}
    own = {"width": 64, "depth": 3, "head_dim": 32, "context": 24, "batch": 6, "steps": 9, "seed": 5}
    run(corpus | searched, tmp_path, LR_ONLY, trials=2, steps=2)
    (tmp_path / "target.py").write_text("".join(f"{name} = {value}\n" for name, value in own.items()))
    target = vars(configure([str(tmp_path / "target.py"), str(tmp_path / "best.py")]))
    expected = corpus | searched | own
    assert {name: target[name] for name in expected} == expected | {
        name: getattr(Config, name) for name in ("data_dir", "eval_tokens", "sample_tokens", "device")}


@pytest.mark.parametrize(("own", "rejected"), [
    ({"dataset": "other.txt"}, "dataset"), ({"norm": "layer"}, "norm"),
    ({"width": 64, "lr": 0.5, "norm": "rms"}, "")])
def test_a_target_of_another_text_or_block_than_was_searched_is_rejected_unless_a_flag_decides(tmp_path, own,
                                                                                            rejected):
    files = {"target.py": own, "found.py": {"dataset": "mine.txt", "norm": "rms", "lr": 0.25}}
    for name, settings in files.items():
        (tmp_path / name).write_text("".join(f"{key} = {value!r}\n" for key, value in settings.items()))
    with open(tmp_path / "found.py", "a") as file:
        file.write(FOUND_BY_SEARCH)
    words = [str(tmp_path / name) for name in files]
    if rejected:
        with pytest.raises(UserError, match=f"^{rejected} is .* before .*found.py"):
            configure(words)
        words.append(f"--{rejected}={own[rejected]}")
        assert getattr(configure(words), rejected) == own[rejected]
    assert configure(words).lr == 0.25


def test_a_target_after_best_py_that_would_undo_what_was_found_is_rejected(tmp_path):
    """By whatever name it is kept."""
    (tmp_path / "found.py").write_text(f"{FOUND_BY_SEARCH}\nlr = 0.25\nsteps = 9")
    for own, rejected in (("width = 64\nsteps = 8", ""), ("lr = 0.25", ""), ("lr = 0.5", "lr")):
        (tmp_path / "target.py").write_text(own)
        words = [str(tmp_path / "found.py"), str(tmp_path / "target.py")]
        if rejected:
            with pytest.raises(UserError, match=f"^{rejected} is 0.25 in .*found.py.* last"):
                configure(words)
            words.append(f"--{rejected}=0.125")
        assert configure(words).lr == (0.125 if rejected else 0.25)


@pytest.mark.parametrize(("line", "target"), [(f"{FOR_TARGET}big.py", "big.py"), ("", "TARGET.py")])
def test_best_py_is_not_trained_at_the_default_size_for_want_of_its_target(tmp_path, line, target):
    """An older one does not name it."""
    found = str(tmp_path / "found.py")
    (tmp_path / "found.py").write_text(f"{FOUND_BY_SEARCH}\n{line}\nlr = 0.25")
    with pytest.raises(UserError, match=f"train.py {target} {found}`"):
        reject_missing_target([found, "--lr=0.5"])
    reject_missing_target(["config/target.py", found])
    notes = describe_search(["config/small.py", found])
    assert [note.endswith("for big.py") for note in notes] == [True] * bool(line)
    with open(found, "a") as file:
        file.write(f"\n# Validation loss 4.2 on one seed: {UNFINISHED}.\n")
    assert "not finished" in describe_search(["big.py", found])[0]
    assert run_name(["config/target.py", found]) == "target"
    for shape in ("--width=64", "--depth=2", "--init_from=out/run"):
        reject_missing_target([found, shape])


@pytest.mark.parametrize(("words", "name"), [
    (["config/target.py", "out/search/best.py"], "target"),
    (["out/mine/best.py", "--width=512"], "mine-best"),
    (["config/proxy.py", "config/muon.py"], "muon"), (["--width=64"], "run")])
def test_a_run_is_named_after_its_target_and_not_after_best_py(words, name):
    assert run_name(words) == name


HOSTILE = 'x""";open("executed","w");""" \\ #\n\rwidth = 3'


def test_the_name_of_a_data_set_does_not_run_as_code_in_best_py(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(corpus["dataset"], HOSTILE)
    monkeypatch.setattr(search, "OCTAVES", ())
    run(corpus | {"dataset": HOSTILE}, tmp_path / "a", LR_ONLY, trials=1, steps=2)
    config = configure([str(tmp_path / "a/best.py")])
    assert (config.dataset, config.width) == (HOSTILE, Config.width) and not os.path.exists("executed")


def test_every_setting_of_the_space_makes_the_trip_through_the_study_and_back():
    config = replace(Config(), **{name: 2.0**-5 for name in ("weight_decay", "final_lr", "warmup")})
    for name, domain in SPACE.items():
        [(key, value)] = space.to_params(config, {name: domain}).items()
        trip = getattr(space.to_config(config, {key: value}, {name: domain}), name)
        expected = getattr(config, name)
        assert trip == (pytest.approx(expected, rel=1e-4) if isinstance(expected, float) else expected)
    outside = replace(config, grad_clip=0.0, lr=1.0)
    assert space.to_params(outside, SPACE)["grad_clip"] == SPACE["grad_clip"].low
    assert space.to_params(outside, SPACE)["lr"] == SPACE["lr"].high
    assert space.at_edge(outside, {"lr": SPACE["lr"], "zero_query": SPACE["zero_query"]}) == [("lr", "high")]
    assert space.at_edge(replace(config, beta2=0.995), {"beta2": SPACE["beta2"]}) == [("beta2", "high")]
    assert parse_space("lr:2**-9..2**-6,beta1:0.8..0.9,zero_query:true,schedule", Config()) == {
        "lr": Range(2**-9, 2**-6), "beta1": Range(pytest.approx(0.1), pytest.approx(0.2), True),
        "zero_query": Choice((True,)), "schedule": SPACE["schedule"]}


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
def test_a_sampler_proposes_the_same_again_and_keeps_away_from_what_is_running(corpus, tmp_path, sampler):
    """That is what makes a resumed search the same search, and several draws at once different ones.

    The seed shows in the first draws, which are random. Afterwards a Gaussian process proposes the place
    where it expects the most, which every seed may find, on some processors to the last bit."""
    domains = space.distributions(LR_ONLY)
    with Worker(str(tmp_path)) as worker:
        shared = study.SharedStudy(study.open_storage(str(tmp_path / "study.log")), "search", worker)

        def suggest(seed, number):
            return math.log2(study.suggest(shared, sampler, seed, domains, number)["lr"])

        assert suggest(0, 3) == suggest(0, 3) and len({suggest(0, 3), suggest(1, 3), suggest(0, 4)}) == 3
        for number in range(study.STARTUP + 2):
            rate = 2.0 ** (-14 + number / 2)
            claim = shared.claim([str(number)], lambda key, rate=rate: ({"lr": rate}, domains, "{}"))
            row = {"val_loss": abs(number - 12.0), "diverged": number == 3, "failure": "", "config": "{}"}
            shared.finish(claim, row, {9: 5.0})
        first = suggest(0, 18)
        assert suggest(0, 18) == first == pytest.approx(-8, abs=0.5), "the best so far is 2**-8"
        shared.claim(["99"], lambda key: ({"lr": 2**first}, domains, "{}"))
        assert suggest(0, 19) != pytest.approx(first, abs=1e-4)
        losses = study.capped_losses(shared.finished())
        assert losses["12"] == 0 and losses["3"] == max(losses.values()) < 9, "bad draws are all alike"


def test_a_hopeless_draw_is_stopped_early_and_its_flops_are_counted(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "suggest", None)
    rates = [2**-6] * 8 + [2**-20]
    seeds = iter(range(100))
    monkeypatch.setattr(search, "starting_points", lambda config, space: [config])
    monkeypatch.setattr(search, "suggest", lambda *arguments: {"lr": rates.pop(0) * (1 + next(seeds) / 100)})
    monkeypatch.setattr(search, "RACE", ((1, math.inf),))  # what follows the draws is not looked at
    monkeypatch.setattr(search, "OCTAVES", ())
    found, *_ = run(corpus, tmp_path, {"lr": Range(2**-20, 2**-5)}, trials=10, steps=25)
    draws, _ = found.rows()
    assert [bool(row["failure"]) for row in draws] == [False] * 9 + [True]
    assert draws[9]["failure"] == "stopped early, after 9 of 25 steps" and len(draws[9]["curve"]) == 9
    assert draws[9]["flops"] == pytest.approx(draws[0]["flops"] * 9 / 25)
    trial = draws_of(tmp_path)["9"]
    assert trial.state.name == "PRUNED" and [*trial.intermediate_values] == [9]


def test_a_search_in_which_every_draw_diverges_ends_in_a_line(corpus, tmp_path):
    with pytest.raises(UserError, match="^search: all 3 trials diverged"):
        run(corpus, tmp_path, {"readout_lr_mult": Range(1e20, 1e25)}, trials=3, lr=1e30, readout_lr_mult=1e22)
    assert len(read_trials(tmp_path)) == 3


def test_a_small_trial_is_measured_on_half_of_what_it_trains_on_unless_one_says_otherwise():
    small = Config(steps=60, batch=8, context=64)
    assert search.with_brief_evaluation(small).eval_tokens == 60 * 8 * 64 // 2
    assert search.with_brief_evaluation(Config(steps=1, batch=1, context=64)).eval_tokens == 64
    for own in replace(small, eval_tokens=2**17), Config():
        assert search.with_brief_evaluation(own).eval_tokens == own.eval_tokens


def test_a_study_of_other_settings_or_another_measure_is_rejected(corpus, tmp_path):
    run(corpus, tmp_path, LR_ONLY, trials=1, steps=2)
    for change in "steps: 2, here 3", "eval_tokens: 512, here 64", "precision: fp32, here bf16":
        name, value = change.split(":")[0], change.split(" ")[-1]
        value = value if name == "precision" else int(value)
        with pytest.raises(UserError, match=f"^out: the study 'search' is of another search .{change}."):
            run(corpus | {"steps": 2, name: value}, tmp_path, LR_ONLY, trials=1)


def test_a_search_over_another_space_in_the_same_folder_is_rejected(corpus, tmp_path):
    run(corpus, tmp_path, LR_ONLY, trials=1, steps=2)
    log = (tmp_path / "study.log").read_text()
    assert '"space"' in log
    for other in ({"lr": Range(2**-13, 2**-5)}, LR_ONLY | {"zero_query": Choice((False, True))},
                  {"beta1": SPACE["beta1"]}):
        with pytest.raises(UserError, match="^out: the study 'search' is of another search .space: "):
            run(corpus, tmp_path, other, trials=1, steps=2)
    # An older version did not keep the space: its draws tell
    lines = [line for line in log.splitlines(keepends=True) if '"space"' not in line]
    (tmp_path / "study.log").write_text("".join(lines))
    with pytest.raises(UserError, match="^out: the study 'search' is of another search .space: "):
        run(corpus, tmp_path, {"lr": Range(2**-13, 2**-5)}, trials=1, steps=2)
    assert len(run(corpus, tmp_path, LR_ONLY, trials=2, steps=2)[0].rows()[0]) == 2


def test_a_study_of_an_older_version_goes_on(corpus, tmp_path, monkeypatch):
    """It does not say how it was measured, and lacks settings that are younger."""
    settings = corpus | {"steps": 2}
    before = run(settings, tmp_path, LR_ONLY, trials=2)[0].rows()
    for name in ("study.log", "trials.csv"):
        text = (tmp_path / name).read_text()
        old = re.sub(r', (\\*"+)tokens\1: .*?false(?=\\*"*\}|\})', "", text)
        old = re.sub(r'(\\*"+)momentum\1: 0.95, ', "", old)
        assert old.count("momentum") == old.count("eval_tokens") == 0 < text.count("momentum")
        (tmp_path / name).write_text(old)
    monkeypatch.setattr(sweep, "train", None)
    after = run(settings, tmp_path, LR_ONLY, trials=2)[0].rows()
    assert [row["val_loss"] for row in after[0]] == [row["val_loss"] for row in before[0]]


def fail_on(keys):
    """A train() that runs out of memory on the trials of these numbers, counted from 0."""
    count = iter(range(10**6))

    def fail_or_train(config, **options):
        if next(count) in keys:
            raise MemoryError("of this test")
        return train(config, **options)

    return fail_or_train


def test_a_failed_trial_of_a_search_is_shown_and_is_tried_again_as_it_was(corpus, tmp_path, monkeypatch,
                                                                        capsys):
    words = ["--trials=4", "--seeds=1", "--space=lr", f"--out={tmp_path}/a", "--sampler=tpe",
             *lab_words(corpus | {"steps": 2})]
    monkeypatch.setattr(sweep, "train", fail_on({1, 4}))  # a draw, and a leader's other seed
    assert search.main(words) == 1
    output = capsys.readouterr().out
    assert "3 draws: best" in output and "2 trials failed, and are tried again by the same command" in output
    assert output.splitlines()[-1].endswith(
        "2 of 8 trials failed (MemoryError: of this test); the same command tries them again")
    assert "the search is not finished" in (tmp_path / "a/best.py").read_text()
    assert sum(row["failure"] != "" for row in read_trials(tmp_path / "a")) == 2
    monkeypatch.undo()
    monkeypatch.setattr(search, "RACE", ((2, math.inf),))
    monkeypatch.setattr(search, "OCTAVES", (-1, 1))
    monkeypatch.setattr(search, "FURTHER", 0)
    assert search.main(words) == 0
    assert "is not finished" not in (tmp_path / "a/best.py").read_text() + capsys.readouterr().out
    assert not any(row["failure"] for row in read_trials(tmp_path / "a"))
    assert search.main([word.replace("/a", "/b") for word in words]) == 0
    draws = [[trial.user_attrs["config"] for _, trial in sorted(draws_of(tmp_path / folder).items())]
             for folder in "ab"]
    assert draws[0] == draws[1], "the search that nothing interrupted draws the same"


def test_a_search_in_which_all_trials_fail_ends_in_a_line_and_writes_no_best_py(corpus, tmp_path, monkeypatch,
                                                                             capsys):
    words = ["--trials=3", f"--out={tmp_path}/a", "--sampler=tpe", *lab_words(corpus)]
    monkeypatch.setattr(sweep, "train", fail_on(range(10)))
    for _ in range(2):
        assert search.main(words) == 1
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == (f"{tmp_path}/a: 3 of 3 trials failed (MemoryError: of this test); the same command "
                        "tries them again")
        assert not {"best.py", "search.txt", "search.png"} & {*os.listdir(tmp_path / "a")}
    monkeypatch.setattr(sweep, "train", train)
    assert search.main(words) == 0 and (tmp_path / "a/best.py").exists()
    assert len(draws_of(tmp_path / "a")) == 3


def test_workers_share_a_search_and_one_that_is_killed_loses_nothing(corpus, tmp_path, request):
    """SIGKILL at random, twice (10 times with --long), each time while another worker starts or works."""
    kills = 10 if request.config.getoption("--long") else 2
    tiny, trials = corpus | {"steps": 10}, 8 * kills
    choose = random.Random(0)
    survivor = start_search(tiny, tmp_path, f"--trials={trials}")
    for _ in range(kills):
        process = start_search(tiny, tmp_path, f"--trials={trials}")
        count = len(read_trials(tmp_path))
        while len(read_trials(tmp_path)) < count + 3 and process.poll() is None:
            time.sleep(0.01)
        time.sleep(choose.random() * 0.1)
        survivor.kill()
        survivor.communicate()
        survivor = process
    output, errors = survivor.communicate()
    assert survivor.returncode == 0, errors
    draws = draws_of(tmp_path)
    assert sorted(map(int, draws)) == [*range(len(draws))], "no draw is lost or doubled"
    assert len(draws) in (trials, trials + trials // 4), "more where a range was widened"
    rows = read_trials(tmp_path)
    assert len(rows) == len({row["config"] for row in rows})
    assert {trial.user_attrs["config"] for trial in draws.values()} <= {row["config"] for row in rows}
    assert f"The best of {len(draws)} trials" in output


def test_a_half_written_line_of_the_journal_is_cut_off(corpus, tmp_path):
    run(corpus, tmp_path, LR_ONLY, trials=2, steps=2)
    with open(tmp_path / "study.log", "ab") as file:
        file.write(b'{"op_code":5,"work')
    run(corpus, tmp_path, LR_ONLY, trials=3, steps=2)
    assert len(draws_of(tmp_path)) == 3


def test_a_damaged_line_of_the_journal_is_named_by_its_file_and_number(corpus, tmp_path):
    run(corpus, tmp_path, LR_ONLY, trials=2, steps=2)
    lines = (tmp_path / "study.log").read_bytes().splitlines()
    number = next(i for i, line in enumerate(lines) if b'"row":' in line)
    for damaged in (b"nonsense", lines[number][:-9], b"\xff" + lines[number], b"[1, 2]",
                    lines[number].replace(b"op_code", b"op_cod"),
                    lines[number].replace(b"trial_id", b"trail_id"),
                    lines[number].replace(b'\\"width\\": ', b'\\"width ')):
        text = b"\n".join([*lines[:number], damaged, *lines[number + 1:], b""])
        (tmp_path / "study.log").write_bytes(text)
        with pytest.raises(UserError, match=f"{tmp_path}/study.log: line {number + 1} is damaged"):
            run(corpus, tmp_path, LR_ONLY, trials=3, steps=2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_workers_of_a_search_that_is_ended_end_too(corpus, tmp_path, request, number):
    if number == signal.SIGKILL and not request.config.getoption("--long"):
        pytest.skip("takes --long")
    process = start_search(corpus | {"steps": 40}, tmp_path, "--trials=500", "--workers=2")
    wait_until(lambda: {"trials.csv", "trials-1.csv"} <= {*os.listdir(tmp_path)}, process)
    process.send_signal(number)
    output, _ = process.communicate()
    if number == signal.SIGTERM:
        assert process.returncode == 130 and "run the same command again to resume" in output
        assert {"best.py", "search.png", "search.txt", "study.log"} <= {*os.listdir(tmp_path)}
        assert "the search is not finished" in (tmp_path / "best.py").read_text()
    start = time.monotonic()
    with Worker(str(tmp_path)) as worker:
        while not worker._lock(1):  # the other worker has ended when its lock is free
            assert time.monotonic() < start + TIMEOUT, "an orphan trains on"
            time.sleep(0.05)


def test_a_worker_that_loses_the_first_signal_gets_another():
    ignores_one = ("import signal, sys, time; seen = [];"
                   "signal.signal(signal.SIGTERM, lambda *_: sys.exit() if seen else seen.append(1));"
                   "print('ready', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", ignores_one], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    search.end_workers([process], patience=0.2)
    assert process.returncode == 0
    process.stdout.close()


def check_database(corpus, tmp_path, url):
    """Two folders, as on two machines, share a search through a database."""
    run(corpus, tmp_path / "a", LR_ONLY, trials=3, steps=2, storage=url)
    found, *_ = run(corpus, tmp_path / "b", LR_ONLY, trials=4, steps=2, storage=url)
    assert len(found.rows()[0]) == 4
    rows = read_trials(tmp_path / "b")
    assert len(rows) == len({row["config"] for row in rows})
    assert {row["config"] for row in read_trials(tmp_path / "a")} <= {row["config"] for row in rows}


def test_a_search_is_kept_in_a_sqlite_file(corpus, tmp_path):
    check_database(corpus, tmp_path, f"sqlite:///{tmp_path}/study.db")
    with pytest.raises(UserError, match="^storage: sqlite:////nowhere/study.db does not answer"):
        run(corpus, tmp_path / "c", LR_ONLY, storage="sqlite:////nowhere/study.db")


def test_processes_that_start_at_once_on_a_fresh_sqlite_file_all_live(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    processes = [Fork(claim_draws, str(tmp_path / str(i)), url, 5) for i in range(6)]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    with Worker(str(tmp_path / "a")) as worker:
        shared = study.SharedStudy(study.open_storage(url), "search", worker)
        assert len(shared.trials()) == 5, "each draw is claimed once"


def test_a_sqlite_file_that_is_locked_for_a_while_is_waited_for(tmp_path, monkeypatch, request):
    url, seconds = f"sqlite:///{tmp_path}/study.db", 15 if request.config.getoption("--long") else 1
    for patience in (study.LOCKED_SECONDS, 0.1):
        monkeypatch.setattr(study, "LOCKED_SECONDS", patience)
        with Worker(str(tmp_path)) as worker:
            storage = study.open_storage(url)
            shared = study.SharedStudy(storage, "search", worker)
            other = sqlite3.connect(tmp_path / "study.db", check_same_thread=False)
            other.execute("BEGIN EXCLUSIVE")
            timer = threading.Timer(seconds, other.rollback)
            timer.start()
            if patience > seconds:
                assert shared.claim(["0"], lambda key: ({}, {}, "{}")).key == "0"
            else:
                with pytest.raises(UserError, match="^storage: .*study.db does not answer .*locked"), \
                        study.storage_errors_in_one_line(storage, url):
                    shared.claim(["1"], lambda key: ({}, {}, "{}"))
            timer.join()


def find_postgres():
    """The folder with PostgreSQL's initdb and pg_ctl, or None."""
    versions = "/usr/lib/postgresql"
    folders = [os.path.join(versions, version, "bin") for version in
               (sorted(os.listdir(versions)) if os.path.isdir(versions) else [])]
    found = shutil.which("initdb", path=os.pathsep.join([*folders, os.environ["PATH"]]))
    return os.path.dirname(found) if found else None


def test_a_search_is_kept_in_postgresql_and_ends_in_a_line_when_that_stops(corpus, tmp_path):
    pytest.importorskip("psycopg2", reason="needs pip install psycopg2-binary")
    bin_folder = find_postgres()
    if bin_folder is None:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    cluster = tempfile.mkdtemp()  # not in tmp_path, which only its owner may enter
    as_user = {}
    if os.getuid() == 0:  # which PostgreSQL refuses to run as
        as_user = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        shutil.chown(cluster, "nobody")

    def call(*words):
        subprocess.run([os.path.join(bin_folder, words[0]), *words[1:]], check=True, cwd=cluster,
                       stdout=subprocess.DEVNULL, **as_user)

    data = os.path.join(cluster, "data")
    call("initdb", "-D", data, "-U", "search", "-A", "trust", "--no-sync")
    options = f"-k {cluster} -c listen_addresses='' -c fsync=off"
    call("pg_ctl", "-D", data, "-o", options, "-l", os.path.join(cluster, "log"), "-w", "start")
    url = f"postgresql+psycopg2://search@/postgres?host={cluster}"
    try:
        check_database(corpus, tmp_path, url)
    finally:
        call("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
        shutil.rmtree(cluster)
    with pytest.raises(UserError, match="^storage: postgresql.* does not answer .Operational"):
        run(corpus, tmp_path / "d", LR_ONLY, storage=url)


# Where a search starts, and how it goes on

@pytest.mark.parametrize("settings", [
    {}, {"optimizer": "muon", "position": "learned", "embedding_mult": 0.5},
    {"tied": True, "logit_mult": 0.7}, {"tied": True, "embedding_mult": 3.0, "base_batch": 1}])
def test_multipliers_that_others_replace_give_the_same_losses(corpus, settings):
    """But for clipping and decay, which are off, and eps."""
    other = Config(**corpus | {"embedding_mult": 2.0, "logit_mult": 3.0, "base_batch": 16, "grad_clip": 0.0,
                               "lr": 2**-8, "eps": 1e-20, "beta2": 0.9, "embedding_std": 0.5,
                               "optimizer": settings.get("optimizer", "adamw")} | {
        name: settings[name] for name in ("tied", "position") if name in settings})
    config = replace(Config(**corpus), **settings)
    same = space.equivalent_in(config, other)
    assert (same.embedding_mult, same.base_batch) == (config.embedding_mult, config.base_batch)
    assert config.tied or same.logit_mult == config.logit_mult
    losses = [[row["train_loss"] for row in train(c, quiet=True).history] for c in (other, same)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] < losses[0][0] - 0.05, "it learns"


def test_no_two_settings_of_the_space_do_the_same():
    drawn = set(space.default_space(Config()))
    assert set(SPACE) - drawn == {"embedding_mult", "logit_mult"}
    assert set(SPACE) - set(space.default_space(Config(tied=True))) == {
        "embedding_mult", "readout_std", "readout_lr_mult"}
    assert "warmup" not in space.default_space(Config(warmup_tokens=5))
    assert parse_space("logit_mult", Config()) == {"logit_mult": SPACE["logit_mult"]}


@pytest.mark.parametrize(("path", "preset"), [
    ("config/target.py", "config/proxy.py"), ("config/muon.py", "config/muon.py"),
    ("config/gpt2.py", "config/gpt2_proxy.py")])
def test_a_search_starts_at_the_preset_of_its_optimizer_and_block(path, preset):
    config = configure([path])
    assert [*space.presets_for(config)] == [preset]
    shipped = configure([preset])
    assert len(space.starting_points(shipped, space.default_space(shipped))) == 2, "itself and the defaults"
    domains = space.default_space(config)
    for name in space.DRIFTING:
        value = getattr(space.equivalent_in(config, shipped), name)
        assert domains[name] == Range(value / space.NEAR, value * space.NEAR)
    assert space.at_edge(space.to_config(config, space.to_params(shipped, domains), domains),
                         {"lr": domains["lr"]}) == []


def test_a_search_for_an_optimizer_without_a_preset_starts_at_the_defaults(monkeypatch):
    monkeypatch.setattr(space, "PRESETS", ("config/muon.py",))
    config = Config(lr=0.5)
    drawn = space.default_space(config)
    assert space.starting_points(config, drawn) == [config, space.nearest_point(config, Config(), drawn)]


def test_the_first_draws_are_the_given_settings_the_preset_and_the_defaults(corpus, tmp_path):
    given = {"lr": 2**-6.5, "grad_clip": 0.0}
    domains = {"lr": Range(2**-11, 2**-5), "zero_residual_out": Choice((False, True))}
    found, *_ = run(corpus | given, tmp_path, domains, trials=4, steps=2)
    draws, _ = found.rows()
    drawn = [(row["lr"], settings_of(row["config"])["zero_residual_out"]) for row in draws]
    preset = 2**-7.6 * math.sqrt(4 / 8)  # its base batch is 8
    assert drawn[:3] == [(2**-6.5, False), (pytest.approx(preset, rel=1e-3), True),
                         (pytest.approx(2**-9, rel=1e-3), False)]
    assert {settings_of(row["config"])["grad_clip"] for row in draws} == {0.0}, "not in the space"


def at_the_low_end(shared, kind, seed, domains, number):
    """A sampler for test: the lowest lr there is."""
    return {"lr": domains["lr"].low * (1 + number / 1000)}


def test_a_winner_at_the_end_of_a_range_widens_it_once(corpus, tmp_path, monkeypatch):
    narrow = {"lr": Range(2**-7, 2**-6.5)}
    monkeypatch.setitem(SPACE, "lr", narrow["lr"])
    monkeypatch.setattr(search, "suggest", at_the_low_end)
    monkeypatch.setattr(search, "loss_of", lambda row: row["lr"])
    monkeypatch.setattr(search.search_report, "loss_of", lambda row: row["lr"])
    found, _, report = run(corpus | {"lr": 2**-6.8}, tmp_path, narrow, trials=8, steps=2)
    draws, _ = found.rows()
    assert len(draws) == 10 and min(row["lr"] for row in draws[:8]) >= 2**-7.01
    assert max(row["lr"] for row in draws[8:]) < 2**-8.9 and found.space["lr"] == Range(2**-9, 2**-6.5)
    assert "widened, as the best draw lay at an end: lr:0.0019531.." in report
    monkeypatch.setattr(sweep, "train", None)
    again, *_ = run(corpus | {"lr": 2**-6.8}, tmp_path, narrow, trials=8, steps=2)
    assert [row["config"] for row in again.rows()[0]] == [row["config"] for row in draws], "once"
    again.open_studies(again.storage)  # as a search does that is stopped: it is still the same


@pytest.mark.parametrize(("name", "value", "wider"), [
    ("hidden_std", 2.0, Range(0.25, 8.0)), ("beta1", 0.949, Range(0.0125, 0.3, True)),
    ("beta1", 0.7, Range(0.05, 0.99, True)), ("final_lr", 0.0001, Range(0.0001, 0.3)),
    ("weight_decay", 0.0, None),
    ("warmup", 0.3, Range(0.015, 0.99)), ("readout_std", 0.5, None), ("zero_query", True, None)])
def test_a_range_is_widened_at_the_end_where_the_winner_lies(monkeypatch, name, value, wider):
    monkeypatch.setattr(space, "DRIFTING", ())
    found = space.widened({name: SPACE[name]}, Config(**{name: value}))
    assert found == ({name: pytest.approx(wider)} if wider else {})
    if isinstance(SPACE[name], Range):
        own = SPACE[name]._replace(low=1.01 * SPACE[name].low)
        assert space.widened({name: own}, Config(**{name: value})) == {}, "one's own range is not left"


def test_a_best_at_the_end_of_a_range_comes_with_a_space_that_reaches_further():
    config = Config(lr=2**-5, beta1=0.949, zero_query=True, weight_decay=0.0)
    drawn = parse_space("lr,beta1,zero_query:true,schedule,warmup:0.01..0.4,weight_decay", config)
    found = SimpleNamespace(space=drawn, widened={}, best=(3.0, 0.1, config))
    [text] = search.search_report.describe_edges(found, [])
    wider = parse_space(text.partition("--space=")[2], config)
    further = {"lr": Range(2**-11, 2**-3), "beta1": Range(0.0125, 0.3, complement=True)}
    assert wider == {name: pytest.approx(domain, rel=1e-3) if isinstance(domain, Range) else domain
                     for name, domain in (drawn | further).items()}
    assert "weight_decay (" not in text, "there is nothing below 0"


def test_leaders_race_so_that_the_worse_get_fewer_seeds(corpus, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(search, "OCTAVES", ())
    found, _, report = run(corpus, tmp_path, LR_ONLY, trials=7, seeds=4, steps=2)
    _, others = found.rows()
    seeds = [sum(row["lr"] == config.lr for row in others) for _, _, config in found.leaders]
    assert seeds == [4, 4, 2, 1, 1]
    assert found.leaders[0][0] <= found.leaders[1][0]
    assert re.findall(r"\(seeds: (.)\)  lr", report) == ["4", "4", "2", "1", "1"]
    with Worker(str(tmp_path)) as found.worker:  # the third is chosen after all, and trained on all seeds
        found.open_studies(found.storage)
        found.best, = found.over_seeds([found.leaders[2][2]], "the best")
        best_text, report = found.report()
    mean, error, _ = found.best
    for text in best_text, report:
        assert f"{mean:.4f} ± {error:.4f} (seeds: 4)" in text


@pytest.mark.parametrize(("octaves", "diverges_at", "found", "says"), [
    (0.25, 9, 0.25, False), (-1.75, 9, -1.75, False), (3.25, 9, 3.25, False),  # from the lr of the best
    (8, 9, 4, True), (-8, 9, -4, True), (8, 3, 2, False)])
def test_the_lr_of_the_best_is_looked_for_beyond_the_ends_of_its_curve(monkeypatch, octaves, diverges_at,
                                                                    found, says):
    monkeypatch.undo()
    def over_seeds(configs, what, seeds=None):
        losses = {config: math.log2(config.lr / 2**-8) for config in configs}
        losses = {config: math.inf if x >= diverges_at else (x - octaves)**2 for config, x in losses.items()}
        return sorted([(loss, 0.1, config) for config, loss in losses.items()], key=lambda item: item[0])
    fake = SimpleNamespace(best=over_seeds([Config(lr=2**-8)], "")[0], options={"seeds": 3},
                           over_seeds=over_seeds)
    search.Search.tune_lr(fake)
    assert math.log2(fake.best[2].lr / 2**-8) == pytest.approx(found, abs=1e-6)
    said = search.search_report.describe_lr(fake)
    assert bool(said) == says and (not says or f"lowest at 2**{found - 8:.2f}," in said[0])


def test_a_preset_that_was_drawn_and_led_is_the_same_candidate():
    config = configure(["config/target.py", "--base_batch=4"])
    preset = space.presets_for(config)["config/proxy.py"]
    drawn = space.nearest_point(config, preset, space.default_space(config))
    assert preset.base_batch == 8 and drawn.base_batch == 4 and drawn.lr != preset.lr
    assert space.trains_alike(drawn, preset)
    assert space.lr_ratio(replace(drawn, lr=1.4 * drawn.lr), preset) == pytest.approx(1.4, rel=1e-3)
    assert space.lr_ratio(replace(drawn, zero_query=True), preset) is None
    for change in {"lr": drawn.lr * 1.01}, {"zero_query": True}, {"readout_std": 0.18}:
        assert not space.trains_alike(replace(drawn, **change), preset)


# The journey to a target

class Chooses:
    """A stand-in for scaling.verify: of the candidates, the first whose name begins so is the best."""
    best = loss = error = winner = None
    text, forecast, holds = "what was verified", None, True

    def __init__(self, name):
        self.name, self.calls = name, []

    def __call__(self, found, candidates, target, sizes):
        self.calls.append([name for name, _ in candidates])
        self.winner = SimpleNamespace(rows=[{}, {}], name=self.name)
        self.best, self.loss, self.error = self.choose(candidates), 4.25, 0.01
        return self

    def choose(self, candidates):
        return next(config for name, config in candidates if name.startswith(self.name))

    def error_of(self, rows):
        return self.error

    def draw(self, folder):
        with open(os.path.join(folder, "verify.png"), "w"):
            pass


@pytest.mark.parametrize("chosen", ["defaults", "config/muon.py"])
def test_best_py_is_what_the_verification_chooses_among_leaders_presets_and_defaults(corpus, tmp_path, chosen,
                                                                                   monkeypatch, capsys):
    verify = Chooses(chosen)
    monkeypatch.setattr(search, "verify", verify)
    settings = corpus | {"optimizer": "muon", "lr": 2**-15, "width": 64, "norm": "layer"}
    (tmp_path / "target.py").write_text("steps = 2\nnorm = 'layer'\n")
    words = lab_words({name: value for name, value in settings.items() if name not in ("steps", "norm")})
    assert search.main([*words, f"--target={tmp_path}/target.py", "--trials=4", "--seeds=2", "--sampler=tpe",
                        "--space=lr", f"--out={tmp_path}/out"]) == 0
    own = "your target's own settings"
    [names] = verify.calls
    assert names[2:] == ["config/muon.py", own, "defaults"]
    assert re.match(f"leader 1 = {own} at lr x [1-9]", names[0]), "another lr is all that a draw has here"
    assert re.match(f"leader 2 = {own} at lr x [1-9]", names[1])
    text = (tmp_path / "out/best.py").read_text()
    assert "# Chosen by its loss at width 32, depth" in text and f"{FOR_TARGET}{tmp_path}/target.py\n" in text
    assert f", 4.2500 ± 0.0100 (seeds: 2): {chosen}." in text and "(pooled)" in text
    report = (tmp_path / "out/search.txt").read_text()
    assert "what was verified" in report
    assert {*re.findall("± ([0-9.]+)", text + report)} == {"0.0100"}, "that of the verification, everywhere"
    assert (tmp_path / "out/verify.png").exists()
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train the target: ")]
    target = configure(line.split()[5:])
    expected = Config() if chosen == "defaults" else configure([chosen])
    assert (target.lr, target.beta1) == (expected.lr, expected.beta1)
    assert target.base_batch == expected.base_batch
    kept = settings | {"steps": 2, "base_width": 16, "base_depth": 1, "base_head_dim": 8}
    del kept["lr"], kept["sample_tokens"]
    assert {name: getattr(target, name) for name in kept} == kept


class TrainsWhatItChooses(Chooses):
    def __call__(self, found, candidates, target, sizes):
        found.rows_of([as_target(self.choose(candidates), target, *sizes[0])], "the one")
        return super().__call__(found, candidates, target, sizes)


def test_what_a_verification_chose_stays_chosen_by_a_search_that_is_not_to_verify(corpus, tmp_path, capsys,
                                                                               monkeypatch):
    verify = TrainsWhatItChooses("defaults")
    monkeypatch.setattr(search, "verify", verify)
    (tmp_path / "target.py").write_text("")
    words = [*lab_words(corpus | {"width": 64, "steps": 2, "lr": 2**-6}), f"--target={tmp_path}/target.py",
             f"--out={tmp_path}/out", "--trials=2", "--seeds=1", "--space=lr", "--sampler=tpe"]
    assert search.main(words) == 0
    chosen = snapshot(tmp_path / "out")["best.py"]
    monkeypatch.setattr(sweep, "train", None)
    assert search.main([*words, "--verify=false"]) == 0 and snapshot(tmp_path / "out")["best.py"] == chosen
    capsys.readouterr()
    verify.name = "leader 1"  # which has no row at the larger size
    assert search.main([*words, "--verify=false"]) == 0 and "--verify=false: " in capsys.readouterr().out
    assert "Chosen by its loss" not in (tmp_path / "out/best.py").read_text()


def test_verification_is_left_out_if_not_wanted_or_not_possible(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search, "verify", None)
    (tmp_path / "target.py").write_text("")
    words = ["--trials=2", "--seeds=1", "--space=lr", "--sampler=tpe", f"--target={tmp_path}/target.py"]
    large = lab_words(corpus | {"width": 64})
    assert search.main([*words, *large, "--verify=false", f"--out={tmp_path}/a"]) == 0
    assert "\nverify " not in capsys.readouterr().out
    assert search.main([*words, *lab_words(corpus | {"width": 16}), f"--out={tmp_path}/b"]) == 0
    assert "nothing is verified" in capsys.readouterr().out


def test_trials_of_several_sizes_are_not_put_into_one_stack(corpus, tmp_path):
    found, *_ = run(corpus, tmp_path, LR_ONLY, trials=2, steps=2, stack=4)
    configs = [replace(found.config, width=width, lr=lr) for width in (16, 48) for lr in (2**-8, 2**-7)]
    with Worker(str(tmp_path)) as found.worker:
        found.open_studies(found.storage)
        rows = found.rows_of(configs, "sizes")
    assert [(row["width"], row["lr"]) for row in rows] == [(config.width, config.lr) for config in configs]
    assert not any(row["failure"] for row in rows)


def test_a_search_prints_its_cost_as_a_share_of_a_target_that_trains_longer(corpus, tmp_path, capsys):
    (tmp_path / "target.py").write_text("steps = 24\n")
    (tmp_path / "proxy.py").write_text("")
    words = ["--trials=3", "--seeds=1", "--space=readout_std:0.5..2", f"--out={tmp_path}", "--sampler=tpe",
             f"{tmp_path}/proxy.py", f"--target={tmp_path}/target.py"]
    search.main([*words, *lab_words(corpus)])
    output = capsys.readouterr().out
    assert ", 1.25 times one training of" in output, "5 trials of 6 steps, beside 24"
    assert "the proxy differs from the target in steps:" in output
    (tmp_path / "target.py").write_text("widht = 24\n")
    with pytest.raises(UserError, match="target.py: widht: no such setting; did you mean width"):
        search.main([f"--target={tmp_path}/target.py"])


def test_a_sweep_hands_each_trial_to_the_worker_that_is_free(corpus, tmp_path):
    """A worker that holds a trial keeps it; what a dead one held is free."""
    configs = sweep.trial_configs(Config(**corpus | {"steps": 1}), {"seed": [0, 1, 2]})
    trials = list(sweep.as_trials(configs).values())
    keys = [trial.key for trial in trials]
    holder = Fork(hold_trial, str(tmp_path), keys[0])
    wait_until((tmp_path / "held").exists, holder)
    with Worker(str(tmp_path)) as worker:
        assert worker.path == str(tmp_path / "trials-1.csv"), "no two workers write one file"
        assert sweep.claim_group(trials[:1], worker, 1) == []
        assert sweep.claim_group(trials, worker, 3) == trials[1:]
        assert worker.is_held(keys[0]) and worker.is_held(keys[1])
        holder.kill()
        holder.communicate()
        assert not worker.is_held(keys[0]) and sweep.claim_group(trials[:1], worker, 1) == trials[:1]
    rows = sweep.run_trials(configs, str(tmp_path))
    assert [row["seed"] for row in rows] == [0, 1, 2]
