"""What is wrong with `python train.py ...` is reported in one line, exit code 2, and nothing is written."""

import contextlib
import errno
import glob
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from conftest import ROOT
from processes import replaced, to_words

import train
from configure import Config, run_cli, stop, stop_signals
from scaling.cli import resumable
from training.checkpoint import write_checkpoint

# case: (words on the command line, what the line says). CORPUS is the tiny corpus; the files are made below.
FAILURES = {
    # names
    "misspelled setting": ("--widht=64", "widht.*did you mean width"),
    "unknown setting": ("--zzz=1", "zzz"),
    "setting without a name": ("--=1", ": no such setting"),
    "setting without dashes": ("width=64", "width.*--width=64"),
    "file that looks like a setting": ("widht=64", "widht=64"),
    "derived setting": ("--width_mult=4", "width_mult"),
    "misspelled choice": ("--schedule=cosin", "schedule.*did you mean cosine"),
    "no value": ("--lr", "lr"),
    "no value before another": ("--lr --steps=3", "lr"),
    # types
    "text for a number": ("--lr=high", "lr"),
    "fraction for a count": ("--depth=2.5", "depth"),
    "type in a file": ("text_lr.py", r"text_lr\.py: lr"),
    "function in a file": ("function.py", r"function\.py"),
    "huge number in a file": ("huge.py", r"huge\.py"),
    # ranges
    "negative lr": ("--lr -1", "lr"),
    "width that heads do not divide": ("--width=40", "width.*head_dim.*48"),
    "base_width that heads do not divide": ("--base_width=20", "base_width.*base_head_dim"),
    "micro_batch that does not divide": ("--micro_batch=3", "batch.*micro_batch"),
    "odd heads with rotary": ("--position=rotary --head_dim=1", "head_dim"),
    "vocabulary below the tokenizer's": ("--vocab_size=100", "vocab_size"),
    "temperature beyond fp32": ("--temperature=1e300", "temperature"),
    "multiplier beyond fp32": ("--attention_mult=1e300", "attention_mult"),
    "model larger than memory": ("--width=2**20", "micro_batch"),
    "model larger than torch can count": ("--width=2**40", "width"),
    "deeper than memory": ("--depth=10**12", "micro_batch"),
    "batch larger than the text": ("--batch=100000", "batch"),
    "context longer than the text": ("--context=10**7", "batch"),
    "context longer than the validation text": (
        "--context=9000 --batch=1 --val_fraction=0.05 --eval_tokens=9000", "context"),
    "evaluation of less than a window": ("--eval_tokens=5", "eval_tokens"),
    # files
    "missing file": ("nope.py", r"nope\.py"),
    "file that raises": ("raises.py", r"raises\.py"),
    "file that exits": ("exits.py", r"exits\.py"),
    "file that raises what is no error": ("closes.py", r"closes\.py"),
    "file that is no configuration": ("notes.txt", r"notes\.txt"),
    "checkpoint for a configuration": ("run/last.pt", r"run/last\.pt.*try run"),
    "program for a configuration": ("program.pt", r"program\.pt"),
    "program in a file of Python": ("program.py", r"program\.py"),
    "number without end in a file": ("endless.py", r"endless\.py: lr"),
    "path with a zero character": ("zero.py", r"zero\.py: out"),
    "file that is no text": ("binary.py", r"binary\.py"),
    "file with an unknown setting": ("unknown.py", r"unknown\.py: widht.*did you mean width"),
    "file out of range": ("range.py", r"range\.py"),
    "file that imports a missing one": ("imports.py", r"imports\.py"),
    # corpora
    "missing corpus": ("--dataset=no/such/text.txt", "dataset"),
    "corpus of one document": ("--dataset=one.txt", "batch"),
    "text_field that is not there": ("--dataset=rows.jsonl --text_field=b", "text_field"),
    "hub that is unreachable": ("--dataset=owner/name", "dataset"),
    "data_dir in a file": ("--data_dir=notes.txt/in", "data_dir"),
    "prompt that is no UTF-8": ("--prompt=\udcff", "prompt"),
    "line break in a name": ("--dataset=a\nb.txt", "dataset"),
    # run directories
    "folder that is no run": ("empty", r"empty.*config\.json.*--dataset=empty"),
    "config.json that is no JSON": ("broken", r"broken.config\.json"),
    "config.json that is a list": ("list", r"list.config\.json"),
    "config.json with an unknown setting": ("newer", "newer: speed"),
    "config.json with a wrong type": ("wrong", "wrong: lr"),
    "checkpoint that is none": ("garbage", r"garbage.last\.pt"),
    "checkpoint cut short": ("short", r"short.last\.pt"),
    "checkpoint of something else": ("other", r"other.last\.pt"),
    "checkpoint of an edited model": ("edited", r"edited.last\.pt"),
    "other width on resuming": ("run --width=64", "width.*32"),
    "other table on resuming": ("run --parametrization=sp", "parametrization"),
    "fewer steps than done": ("run --steps=1", "steps"),
    # machine
    "no such device": ("--device=tpu", "device"),
    "absent device": ("--device=cuda:98", "device"),
    "device number beyond all": ("--device=cuda:300", "device"),
    "out in a file": ("--out=notes.txt/run", "out"),
    "out that is a file": ("--out=notes.txt", "out"),
    "out without a name": ("--out=", "out"),
}
REAL_PROCESS = "checkpoint that is none"  # by `python train.py`: the case that gets the furthest


@pytest.fixture(scope="module")
def workspace(corpus, tmp_path_factory):
    """A folder with everything that FAILURES names, where nothing may change."""
    folder = tmp_path_factory.mktemp("workspace")
    train.train(Config(**corpus | {"steps": 2, "out": str(folder / "run")}), quiet=True)
    for name in ("garbage", "short", "other", "edited"):
        shutil.copytree(folder / "run", folder / name)
        os.remove(folder / name / "previous.pt")  # nothing to go back to
    checkpoint = folder / "run/last.pt"
    (folder / "garbage/last.pt").write_bytes(b"no checkpoint")
    (folder / "short/last.pt").write_bytes(checkpoint.read_bytes()[:-1000])
    write_checkpoint(folder / "other/last.pt", [1, 2])
    content = torch.load(checkpoint, weights_only=True)
    content["model"]["blocks.0.mlp.gate.weight"] = torch.zeros(2, 2)
    write_checkpoint(folder / "edited/last.pt", content)
    settings = json.loads((folder / "run/config.json").read_text())
    for name, text in {"broken": "{", "list": "[]", "empty": None, "config": None,
                       "newer": json.dumps(settings | {"speed": 1}),
                       "wrong": json.dumps(settings | {"lr": "fast"})}.items():
        (folder / name).mkdir()
        if text is not None:
            (folder / name / "config.json").write_text(text)
    for name, text in {
            "config/proxy.py": "lr = 1.0", "notes.txt": "no settings", "raises.py": "raise OSError('a\\nb')",
            "exits.py": "import sys\nsys.exit('no')",
            "unknown.py": "widht = 64", "range.py": "depth = 0", "imports.py": "from config.nope import *",
            "text_lr.py": "lr = 'big'", "function.py": "lr = max", "huge.py": "lr = 10**400",
            "closes.py": "raise GeneratorExit", "endless.py": "lr = 10**5000", "zero.py": "out = 'a\\0b'",
            "one.txt": "one document",
            "rows.jsonl": "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(20))}.items():
        (folder / name).write_text(text)
    (folder / "binary.py").write_bytes(b"\x00\xff\xfe lr")
    for name in ("program.pt", "program.py"):  # which Python runs, whatever their names say
        with zipfile.ZipFile(folder / name, "w") as file:
            file.writestr("__main__.py", "open('it ran', 'w').close()")
    return folder


def contents(folder):
    """{path: when it was written}; 0 for folders, which a lock file that comes and goes changes."""
    found = {}
    for path, folders, files in os.walk(folder):
        found |= {os.path.join(path, name): 0 for name in folders}
        found |= {os.path.join(path, name): os.stat(os.path.join(path, name)).st_mtime_ns for name in files}
    return found


def arguments(corpus, case):
    return replaced(to_words(corpus), *FAILURES[case][0].split(" "))


@pytest.fixture(scope="module", autouse=True)
def processes(corpus, workspace):
    """{name: Popen} of `python train.py`, started at once: to import torch takes seconds."""
    def start(argv):
        return subprocess.Popen([sys.executable, f"{ROOT}/train.py", *argv], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, cwd=workspace)

    process = start(arguments(corpus, REAL_PROCESS))
    yield {REAL_PROCESS: process}
    process.kill()
    process.wait()


def run_in_this_process(argv, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    with pytest.raises(SystemExit) as caught:
        run_cli(train.main)
    return caught.value.code, *capfd.readouterr()


@pytest.mark.parametrize("case", FAILURES)
def test_a_mistake_is_reported_in_one_line_and_nothing_is_written(corpus, workspace, processes, monkeypatch,
                                                                  capfd, case):
    argv = arguments(corpus, case)
    monkeypatch.chdir(workspace)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # no one answers there
    before, prepared = contents(workspace), set(os.listdir(corpus["data_dir"]))
    if case == REAL_PROCESS:
        output, errors = processes[case].communicate()
        code = processes[case].returncode
    else:
        code, output, errors = run_in_this_process(argv, monkeypatch, capfd)
    assert code == 2 and output == ""
    assert errors.startswith("error: ") and errors.count("\n") == 1 and errors.endswith("\n"), errors
    assert re.match(f"error: ({FAILURES[case][1]})", errors), errors
    assert contents(workspace) == before, "something was written"
    new = set(os.listdir(corpus["data_dir"])) - prepared
    assert all(os.path.exists(f"{corpus['data_dir']}/{name}/meta.json") for name in new)


HEAVY = "import os, time; open(os.environ['READY'], 'w').close(); time.sleep(1000)"


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """{command: Popen} of each that a Ctrl-C reached while it imported the first large library."""
    folder, started = tmp_path_factory.mktemp("heavy"), {}
    for name in ("torch", "numpy", "tqdm"):
        (folder / f"{name}.py").write_text(HEAVY)
    for path in [f"{ROOT}/train.py", *glob.glob(f"{ROOT}/data/*.py"), *glob.glob(f"{ROOT}/training/*.py"),
                 *glob.glob(f"{ROOT}/scaling/*.py")]:
        with open(path, encoding="utf-8") as file:
            source = file.read()
        is_command = "\n    run_cli(main)" in source or "\n@command\n" in source
        if not is_command or path.endswith("__main__.py"):
            continue
        command = os.path.relpath(path, ROOT).removesuffix(".py").replace("/", ".")
        environment = os.environ | {"PYTHONPATH": str(folder), "READY": str(folder / command)}
        started[command] = subprocess.Popen([sys.executable, "-m", command], env=environment, cwd=ROOT,
                                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for command, process in started.items():
        while not (folder / command).exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
    return started


def test_an_interrupt_while_a_command_imports_gives_no_traceback(interrupted):
    assert {"train", "data.prepare", "scaling.bench", "scaling.sweep", "scaling.search", "scaling.report",
            "scaling.coordinate_check"} <= interrupted.keys()
    for command, process in interrupted.items():
        out, error = process.communicate()
        assert (out, error, process.returncode) in [("", "", -signal.SIGINT),  # which a shell calls 130
                                                    ("", "\nstopped\n", 130)], command  # main has begun


def test_a_closed_pipe_gives_no_traceback():
    process = subprocess.Popen([sys.executable, "-m", "scaling"], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 128 + signal.SIGPIPE


class ClosedPipe(io.StringIO):
    def reconfigure(self, **options):
        pass

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_pipe_that_is_closed_while_a_run_trains_is_not_called_a_fault_of_its_folder(
        corpus, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    argv = [*[f"--{name}={value}" for name, value in corpus.items()], f"--out={tmp_path}/run"]
    code, _, errors = run_in_this_process(argv, monkeypatch, capfd)
    assert code == 128 + signal.SIGPIPE and errors == ""


def test_a_closed_output_gives_no_traceback():
    done = subprocess.run(f"{sys.executable} -m scaling >&- 2>&-; echo $?", shell=True, cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stdout == "0\n"


def test_a_deleted_working_directory_is_one_line(tmp_path):
    script = f"mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir ../gone; {sys.executable} {ROOT}/train.py"
    done = subprocess.run(script, shell=True, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: the working directory")
    assert done.stderr.count("\n") == 1


def test_a_terminal_that_shows_ascii_alone_gets_escapes(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    with pytest.raises(SystemExit) as caught:
        run_cli(lambda argv: print("loss 3.0 ± 0.1"))
    assert not caught.value.code and shown.getvalue() == b"loss 3.0 \\xb1 0.1\n"


def interrupted_in_a_library(argv):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise RuntimeError("a callback failed") from None


def interrupted_and_ignored(argv):
    with contextlib.suppress(KeyboardInterrupt):  # as where it reaches a __del__
        signal.raise_signal(signal.SIGINT)


def interrupted_twice(argv):
    raise KeyboardInterrupt  # as a second Ctrl-C does while a run saves its checkpoint


@pytest.mark.parametrize(("main", "said"), [
    (interrupted_twice, ""), (interrupted_in_a_library, ""), (interrupted_and_ignored, ""),
    (resumable("out/x")(interrupted_in_a_library), "out/x: stopped; run the same command again to resume\n")])
def test_whatever_a_library_makes_of_a_signal_is_answered_as_the_signal(main, said, capfd):
    with pytest.raises(SystemExit) as caught:
        run_cli(main)
    assert caught.value.code == 130
    assert capfd.readouterr() == (said, "" if said else "\nstopped\n")


@pytest.mark.parametrize(("error", "line"), [
    (MemoryError(), "micro_batch"), (RuntimeError("CUDA out of memory"), "micro_batch"),
    (OSError(28, "full", "x.pt"), "cannot write x.pt: full"), (PermissionError(13, "no", "a"), "a: no")])
def test_what_the_machine_raises_while_training_is_one_line_too(tmp_path, monkeypatch, capfd, error, line):
    def fail(config):
        raise error

    monkeypatch.setattr(train, "train", fail)
    code, output, errors = run_in_this_process([f"--out={tmp_path}/run"], monkeypatch, capfd)
    assert code == 2 and output == "" and re.fullmatch(f"error: {line}.*\n", errors)


@pytest.fixture
def signals_end_the_command():
    """SIGTERM does what it does in a command of the lab."""
    before = signal.signal(signal.SIGTERM, stop)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_signal_after_the_last_step_of_a_run_ends_the_command(corpus, monkeypatch, signals_end_the_command):
    evaluate = train.evaluate

    def interrupt_and_evaluate(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setattr(train, "evaluate", interrupt_and_evaluate)
    with pytest.raises(KeyboardInterrupt):
        train.train(Config(**corpus), quiet=True)
    assert stop_signals == [signal.SIGTERM]


def test_a_missing_library_is_rejected_before_anything_is_written(corpus, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    argv = [*[f"--{name}={value}" for name, value in corpus.items()], "--wandb=true"]
    code, _, errors = run_in_this_process(argv, monkeypatch, capfd)
    assert code == 2 and os.listdir() == []
    assert re.fullmatch("error: wandb.*pip install wandb.*\n", errors)
