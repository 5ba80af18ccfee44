"""Several processes: one loss curve for any number of them, one writer, and an end that loses nothing."""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import train
from configure import Config

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DEEP = {"steps": 20, "micro_batch": 2, "batch": 16, "weight_decay": 0.1, "zero_residual_out": True,
        "eval_every": 10, "checkpoint_every": 10, "embedding_lr_mult": 8.0}
WAYS = {"mup": {}, "sp": {"parametrization": "sp", "tied": True, "position": "rotary", "bias": True}}


def start(processes, settings, **changes):
    """train.py, by torchrun when there are several processes."""
    words = [f"--{name}={value}" for name, value in (settings | changes).items()]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen([sys.executable, *torchrun * (processes > 1), "train.py", *words], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def curve(folder):
    """Training and validation losses, and gradient norms, of a run."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [float(row[name]) for name in ("train_loss", "val_loss", "grad_norm") for row in rows if row[name]]


def finish(process):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


@pytest.mark.parametrize(("way", "processes", "shard"),
                         [("mup", 2, False), ("sp", 2, True), ("mup", 4, True)])
def test_any_number_of_processes_gives_the_numbers_of_one(corpus, tmp_path, way, processes, shard):
    settings, one, many = corpus | DEEP | WAYS[way], tmp_path / "one", tmp_path / "many"
    train.train(Config(**settings, out=str(one)), quiet=True)
    output = finish(start(processes, settings, out=many, shard=shard))
    assert output.count("validation loss") == 4, "one process speaks: steps 0, 10, 20 and the end"
    assert sorted(os.listdir(many)) == sorted(os.listdir(one))
    assert len(curve(one)) == 20 + 3 + 20
    assert curve(many) == pytest.approx(curve(one), abs=1e-5, rel=1e-4)
    ours, theirs = (torch.load(run / "last.pt", weights_only=True) for run in (many, one))
    for name, weight in theirs["model"].items():
        assert torch.allclose(ours["model"][name], weight, atol=1e-3), name
        for key, value in theirs["optimizer"][name].items():
            assert torch.allclose(ours["optimizer"][name][key], value, atol=1e-4), name


def test_a_checkpoint_goes_on_with_any_other_number_of_processes_sharded_or_not(corpus, tmp_path):
    settings = corpus | DEEP | {"warmup": 0.0, "schedule": "constant"}  # as if all steps were known
    train.train(Config(**settings, out=str(tmp_path / "whole")), quiet=True)
    settings["out"] = str(tmp_path / "run")
    train.train(Config(**settings | {"steps": 5}), quiet=True)
    finish(start(2, settings, steps=10, shard=True))
    train.train(Config(**settings | {"steps": 15}), quiet=True)
    finish(start(2, settings))
    assert curve(tmp_path / "run")[:20] == pytest.approx(curve(tmp_path / "whole")[:20], abs=1e-5)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_ends_ends_the_run_with_one_line_and_a_good_checkpoint(corpus, tmp_path, number):
    run = tmp_path / "run"
    process = start(2, corpus, out=run, steps=100_000, checkpoint_every=20)
    while not (run / "metrics.csv").exists() or len(curve(run)) < 60:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    children = found.stdout.split()
    assert len(children) == 2
    os.kill(int(children[1]), number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    said = [line for line in (output + errors).splitlines() if "goes on" in line]
    assert len(said) == 1 and f"train.py {run}" in said[0], output + errors
    done = torch.load(run / "last.pt", weights_only=True)["step"]
    assert 20 <= done < 100_000 and (number == signal.SIGTERM or done % 20 == 0)
