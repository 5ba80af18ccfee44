"""Several processes: one loss curve for any number of them, one writer, and an end that loses nothing."""

import contextlib
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from children import run_train_with
from conftest import read_rows, run
from processes import TIMEOUT, Fork, finish, start_command, start_ranks, to_words, wait_for_rows

from configure import UserError
from training.cli import catch_signals
from training.distributed import check_torchrun, init_distributed, torchrun_variables

DEEP = {"steps": 8, "micro_batch": 2, "batch": 16, "weight_decay": 0.1, "zero_residual_out": True,
        "eval_every": 4, "checkpoint_every": 4, "embedding_lr_mult": 8.0}
GPT3 = {"batch_start": 8, "batch_ramp_tokens": 500, "warmup_tokens": 300, "decay_tokens": 1100, "window": 5}
SETTINGS = {"gpt3": GPT3, "sp": {"parametrization": "sp", "tied": True, "position": "rotary", "bias": True,
                                 "smear": True, "value_embeddings": True}}
FLOAT_COLUMNS = ("train_loss", "val_loss", "grad_norm")


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500"}
SLURM = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7",
         "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node1"}


def joins(environment):
    return check_torchrun(environment | torchrun_variables(environment))


@pytest.mark.parametrize(("environment", "name"), [
    *[({key: text for key, text in TORCHRUN.items() if key != name}, name)
      for name in TORCHRUN if name != "LOCAL_RANK"],
    ({"RANK": "0"}, "WORLD_SIZE"), ({"WORLD_SIZE": "2"}, "RANK"),
    (TORCHRUN | {"RANK": "1", "WORLD_SIZE": "1"}, "RANK"),  # would wait for a rank 0 that never starts
    *[(TORCHRUN | {name: text}, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
      for text in ("two", "-1")],
    (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT"),
    *[({key: text for key, text in SLURM.items() if key != name}, name)
      for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST")],
    *[(SLURM | {name: "x"}, name) for name in SLURM if name != "SLURM_STEP_NODELIST"]])
def test_variables_that_are_set_in_part_or_wrongly_are_rejected_by_name(environment, name):
    with pytest.raises(UserError, match=f"^{name}"):
        joins(environment)


def test_a_process_alone_of_several_does_not_wait_a_day(monkeypatch):
    for name, text in (TORCHRUN | {"RANK": "2"}).items():
        monkeypatch.setenv(name, text)
    with pytest.raises(UserError, match="^RANK"):
        init_distributed()


def test_a_process_that_fails_as_another_died_is_not_ended_before_it_has_said_so(monkeypatch):
    monkeypatch.setattr("training.cli.world_size", lambda: 2)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.suppress(RuntimeError), catch_signals():
            raise RuntimeError("gloo: connection closed by peer")
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun does; by default it would end the tests
    finally:
        signal.signal(signal.SIGTERM, before)


def interrupt_torchrun(settings, folder):
    """(exit code, output) of an endless run by torchrun, one of whose two processes is killed midway."""
    process = start_command(settings, processes=2, out=folder, steps=100_000, checkpoint_every=20)
    wait_for_rows(process, folder, 30)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    children = found.stdout.split()
    if len(children) == 2:
        os.kill(int(children[1]), signal.SIGKILL)
    output, errors = process.communicate(timeout=TIMEOUT)
    return process.returncode, output + errors


@pytest.fixture(scope="module", autouse=True)
def interrupted(corpus, tmp_path_factory):
    """(run directory, future of interrupt_torchrun), which starts while the other tests run: unlike forks,
    its processes import torch anew."""
    with ThreadPoolExecutor() as threads:
        folder = tmp_path_factory.mktemp("torchrun") / "run"
        yield folder, threads.submit(interrupt_torchrun, corpus, folder)


def read_columns(folder, names=FLOAT_COLUMNS):
    """All numbers of these columns of a run's metrics.csv, one column after the other."""
    rows = read_rows(folder)
    return [float(row[name]) for name in names for row in rows if row[name]]


@pytest.mark.parametrize(("name", "world_size", "shard"),
                         [("gpt3", 2, False), ("sp", 2, True), ("gpt3", 4, True)])
def test_any_number_of_processes_gives_the_numbers_of_one(corpus, tmp_path, name, world_size, shard):
    settings, one, many = corpus | DEEP | SETTINGS[name], tmp_path / "one", tmp_path / "many"
    ranks = start_ranks(world_size, settings, out=many, shard=shard, log_roles=True)
    of_roles = [name for name in run(settings, out=str(one), log_roles=True).history[-1] if "/" in name]
    output = finish(ranks)
    assert output.count("validation loss") == 4, "one process speaks: steps 0, 4, 8 and the end"
    assert sorted(os.listdir(many)) == sorted(os.listdir(one))
    assert len(read_columns(one)) == 8 + 3 + 8
    assert read_columns(many) == pytest.approx(read_columns(one), abs=1e-5, rel=1e-4)
    assert len(of_roles) == {"gpt3": 5, "sp": 6}[name] * 3
    assert read_columns(many, of_roles) == pytest.approx(read_columns(one, of_roles), rel=1e-3)
    ours, theirs = (torch.load(folder / "last.pt", weights_only=True) for folder in (many, one))
    for name, weight in theirs["model"].items():
        assert torch.allclose(ours["model"][name], weight, atol=1e-3), name
        for key, value in theirs["optimizer"][name].items():
            assert torch.allclose(ours["optimizer"][name][key], value, atol=1e-4), name


def test_a_checkpoint_resumes_with_any_other_number_of_processes_sharded_or_not(corpus, tmp_path):
    settings = corpus | DEEP | {"warmup": 0.0, "schedule": "constant"}  # as if all steps were known
    run(settings, out=str(tmp_path / "uninterrupted"))
    settings["out"] = str(tmp_path / "run")
    run(settings, steps=2)
    finish(start_ranks(2, settings, steps=4, shard=True))
    run(settings, steps=6)
    finish(start_ranks(2, settings))
    expected = read_columns(tmp_path / "uninterrupted")
    assert read_columns(tmp_path / "run")[:8] == pytest.approx(expected[:8], abs=1e-5)


def test_state_that_is_not_shaped_like_its_parameter_resumes_sharded_or_not(corpus, tmp_path):
    settings = corpus | {"warmup": 0.0, "schedule": "constant", "tied": True, "checkpoint_every": 4}
    one, many = settings | {"out": tmp_path / "one"}, settings | {"out": tmp_path / "many"}

    def start(settings):
        return Fork(run_train_with, to_words(settings), "step_by_factors")

    straight = start(one | {"steps": 12})
    finish(start_ranks(2, many, function="step_by_factors", shard=True, steps=4))
    finish([start(many | {"steps": 8})])
    finish(start_ranks(2, many, function="step_by_factors", shard=True, steps=12))
    finish([straight])
    for column in ("train_loss", "grad_norm"):
        ours, theirs = (read_columns(tmp_path / name, [column]) for name in ("many", "one"))
        assert len(ours) == 12 and ours == pytest.approx(theirs, rel=1e-4)
    saved = torch.load(tmp_path / "many/last.pt", weights_only=True)["optimizer"]["blocks.0.mlp.down.weight"]
    assert saved["count"] == 12 and saved["factors"][0].shape != (32, 32) and saved["factors"][1] is None


def check_interrupted(folder, output, number):
    """A run that lost a process to a signal has said so in one line, and its checkpoint is sound."""
    lines = [line for line in output.splitlines() if "resumes" in line]
    assert len(lines) == 1 and f"train.py {folder}" in lines[0], output
    done = torch.load(folder / "last.pt", weights_only=True)["step"]
    assert 20 <= done < 100_000 and (number == signal.SIGTERM or done % 20 == 0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_ends_ends_the_run_with_one_line_and_a_good_checkpoint(corpus, tmp_path, number):
    folder = tmp_path / "run"
    ranks = start_ranks(2, corpus, out=folder, steps=100_000, checkpoint_every=20)
    wait_for_rows(ranks[0], folder, 30)
    ranks[1].send_signal(number)
    output = "".join(text for rank in ranks for text in rank.communicate())
    expected = {signal.SIGKILL: [2, -signal.SIGKILL], signal.SIGTERM: [130, 130]}
    assert [rank.returncode for rank in ranks] == expected[number], output
    check_interrupted(folder, output, number)


def test_torchrun_ends_a_run_that_lost_a_process(interrupted):
    folder, future = interrupted
    code, output = future.result()
    assert code != 0
    check_interrupted(folder, output, signal.SIGKILL)
