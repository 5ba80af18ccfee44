"""train.py in processes of its own, which tests can kill, stop and join.

A new Python needs seconds for `import torch`. Most of these processes are therefore forks of a server that
imports it once, while the first tests run; such a process starts in milliseconds. The server never uses a
tensor, so its forks lack no thread of torch's. What is about the command itself, `python train.py` or
torchrun, is tested with real ones: start_command().
"""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

from children import enter, run_train, run_train_with
from conftest import ROOT

# Seconds after which a process that hangs is killed, and its test fails. Far more than any needs: on a busy
# machine they are ten times slower
TIMEOUT = 900

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["train", "torch._dynamo", "torch.distributed.fsdp",
                              "scaling.search", "matplotlib.pyplot",  # and what a search imports late
                              "optuna.storages", "sqlalchemy", "alembic.context"])
multiprocessing.forkserver.ensure_running()


class Fork:
    """A process that runs function(*arguments), with the interface of a subprocess.Popen of text output."""

    def __init__(self, function, *arguments, environment=None, folder=ROOT):
        self.outputs = [tempfile.NamedTemporaryFile("r") for _ in range(2)]
        paths = [output.name for output in self.outputs]
        arguments = (function, arguments, paths, environment or {}, folder)
        self.process = forks.Process(target=enter, args=arguments)
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def output(self):
        """What it has written to stdout so far."""
        with open(self.outputs[0].name) as file:
            return file.read()

    def communicate(self, timeout=TIMEOUT):
        """(stdout, stderr), when the process has ended. Raises TimeoutError."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError("".join(output.read() for output in self.outputs))
        texts = [output.read() for output in self.outputs]
        for output in self.outputs:
            output.close()
        return texts


def to_words(settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def lab_words(settings):
    """The same for a command of the lab, which uses no setting of a sample."""
    return to_words({name: value for name, value in settings.items() if name != "sample_tokens"})


def replaced(words, *more):
    """The --name=value `words`, with those of `more` in place of theirs of the same names."""
    names = {word.partition("=")[0] for word in more}
    return [*(word for word in words if word.partition("=")[0] not in names), *more]


def start_train(settings, **changes):
    """A fork that does what `python train.py` does with these settings."""
    return Fork(run_train, to_words(settings | changes))


def start_ranks(world_size, settings, folder=ROOT, function=None, **changes):
    """Forks that do what the processes of torchrun do: a list, rank 0 first. function: of children.py, called
    in each before it trains."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = to_words(settings | changes)
    what = (run_train, words) if function is None else (run_train_with, words, function)
    return [Fork(*what,
                 environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, folder=str(folder))
            for rank in range(world_size)]


def finish(ranks):
    """What rank 0 printed, when all ranks have ended well and the others have printed nothing."""
    texts = [rank.communicate() for rank in ranks]
    for rank, (_, errors) in zip(ranks, texts, strict=True):
        assert rank.returncode == 0, errors
    assert not any(output for output, _ in texts[1:])
    return texts[0][0]


def start_command(settings, processes=1, **changes):
    """A real `python train.py`, by torchrun when there are several processes."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen([*command, "train.py", *to_words(settings | changes)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition, process):
    """Wait until condition() is true. Fails where the process ends, or hangs, without that."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            assert condition(), process.communicate()
        time.sleep(0.01)


def wait_for_rows(process, folder, count):
    """Wait until the metrics.csv in `folder` has `count` rows."""
    def has_rows():
        with contextlib.suppress(FileNotFoundError), open(os.path.join(folder, "metrics.csv")) as file:
            return sum(1 for _ in file) > count

    wait_until(has_rows, process)
