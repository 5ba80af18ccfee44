"""What is wrong with `python train.py ...` is said in one line, exit code 2, and leaves nothing behind."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import train
from configure import Config
from data import checkpoints
from data.processes import command

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# case: (words on the command line, what the line says). CORPUS is the tiny corpus; the files are made below.
FAILURES = {
    # names
    "misspelled setting": ("--widht=64", "widht: no such setting; did you mean width"),
    "unknown setting": ("--zzz=1", "zzz: no such setting; --help lists them"),
    "setting without a name": ("--=1", "no such setting"),
    "derived setting": ("--width_mult=4", "width_mult: no such setting"),
    "misspelled choice": ("--schedule=cosin", "schedule: got 'cosin', takes cosine.*did you mean cosine"),
    "unknown parametrization": ("--parametrization=ntk", "parametrization: got 'ntk', takes mup, sp"),
    "no value": ("--lr", "lr: got no value, takes --lr=VALUE"),
    "no value before another": ("--lr --steps=3", "lr: got no value"),
    # types
    "text for a number": ("--lr=high", "lr: got 'high', takes a finite number above 0"),
    "fraction for a count": ("--depth=2.5", "depth: got 2.5, takes a whole number, 1 or more"),
    "number for a flag": ("--tied=1", "tied: got 1, takes true or false"),
    "number for a choice": ("--graph=1", "graph: got 1"),
    "none for a number": ("--steps=None", "steps: got None"),
    "code for a number": ("--lr=__import__('os').getpid()", "lr: got \"__import__"),
    "huge number": (f"--lr={'1' * 400}", "lr: got 11111"),
    "type in a file": ("text_lr.py", r"text_lr\.py: lr: got 'big'"),
    "function in a file": ("function.py", r"function\.py: lr: got <built-in function max>"),
    "huge number in a file": ("huge.py", r"huge\.py: lr: got 10000"),
    # ranges
    "lr of 0": ("--lr=0", "lr: got 0.0, takes"), "negative lr": ("--lr -1", "lr: got -1.0, takes"),
    "infinite lr": ("--lr=1e999", "lr: got inf, takes"), "no width": ("--width=0", "width: got 0, takes"),
    "negative steps": ("--steps=-1", "steps: got -1, takes"),
    "width that heads do not divide": ("--width=40", "width: got 40, takes a multiple of head_dim=16.* 48"),
    "base_width that heads do not divide": ("--base_width=20", "base_width: got 20, .* of base_head_dim=8"),
    "micro_batch that does not divide": ("--micro_batch=3", "batch: got 4, .* multiple of micro_batch=3"),
    "warmup of all steps": ("--warmup=1", "warmup: got 1.0, takes a number from 0 to below 1"),
    "beta of 1": ("--beta2=1", "beta2: got 1.0"), "all dropped": ("--dropout=1", "dropout: got 1.0"),
    "final_lr above the peak": ("--final_lr=1.5", "final_lr: got 1.5"),
    "depth_alpha above 1": ("--depth_alpha=2", "depth_alpha: got 2.0"),
    "odd heads with rotary": ("--position=rotary --head_dim=1", "head_dim: got 1, takes an even number"),
    "vocabulary below the tokenizer's": ("--vocab_size=100", "vocab_size: got 100, takes at least .* 257"),
    "seed that no generator takes": ("--seed=2**70", "seed: got "),
    "seed that no generator takes with dropout": ("--seed=2**63 --dropout=0.1", "seed: got "),
    "model larger than memory": ("--width=2**40", "micro_batch: .* need at least .*takes a smaller model"),
    "batch larger than the text": ("--batch=100000", "batch: got 100000 .*takes --batch="),
    "context longer than the text": ("--context=10**7", "batch: got 4 at context=10000000"),
    "context longer than the validation text": (
        "--context=9000 --batch=1 --val_fraction=0.05 --eval_tokens=9000", "context: got 9000, but"),
    "evaluation of less than a window": ("--eval_tokens=5", "eval_tokens: got 5, takes context=16 or more"),
    # files
    "missing file": ("nope.py", r"nope\.py: No such file"),
    "misspelled file": ("config/proxi.py", r"config/proxi\.py: No such file.*did you mean config/proxy\.py"),
    "file that raises": ("raises.py", r"raises\.py: ZeroDivisionError: division by zero"),
    "file that raises in lines": ("lines.py", r"lines\.py: ValueError: one two"),
    "file that exits": ("exits.py", r"exits\.py: SystemExit"),
    "file that is no Python": ("notes.txt", r"notes\.txt: SyntaxError"),
    "file that is no text": ("binary.py", r"binary\.py: "),
    "file with an unknown setting": ("unknown.py", r"unknown\.py: widht: no such setting; did you mean"),
    "file out of range": ("range.py", r"range\.py: depth: got 0"),
    "file that imports a missing one": ("imports.py", r"imports\.py: ModuleNotFoundError"),
    # corpora
    "missing corpus": ("--dataset=no/such/text.txt", "dataset: no such file or folder: no/such/text.txt"),
    "glob that matches nothing": ("--dataset=*.text", r"dataset: the glob \*\.text matches nothing"),
    "folder without text": ("--dataset=empty", "dataset: got empty, takes files that end in"),
    "blank corpus": ("--dataset=blank.jsonl", "dataset: blank.jsonl holds no text"),
    "corpus of one document": ("--dataset=one.txt", "dataset: one.txt is one document"),
    "broken .jsonl": ("--dataset=broken.jsonl", "dataset: broken.jsonl cannot be read"),
    "text_field that is not there": ("--dataset=rows.jsonl --text_field=b", "text_field: got b, but .* text"),
    "text_field of a .txt": ("--text_field=body", "text_field: got body, but .* has none"),
    "subset of local files": ("--subset=small", "subset: got small, but .* has none"),
    "hub that is unreachable": ("--dataset=owner/name", "dataset: .*hub is unreachable.*--dataset=stdlib"),
    "unknown tokenizer": ("--tokenizer=gtp2", "tokenizer: got gtp2, .*did you mean gpt2"),
    "no merges": ("--tokenizer=bpe:100", "tokenizer: got bpe:100, takes bpe:N with N from 258"),
    "data_dir in a file": ("--data_dir=notes.txt/in", "data_dir: cannot write notes.txt/in"),
    "line break in a name": ("--dataset=a\nb.txt", "dataset: no such file or folder: a"),
    # run directories
    "folder that is no run": ("empty", r"empty.config\.json: No such file or directory"),
    "config.json that is no JSON": ("broken", r"broken.config\.json: JSONDecodeError"),
    "config.json that is a list": ("list", r"list.config\.json: "),
    "config.json that is a number": ("number", r"number.config\.json: "),
    "config.json with an unknown setting": ("newer", "newer: speed: no such setting"),
    "config.json with a wrong type": ("wrong", "wrong: lr: got 'fast'"),
    "checkpoint that is none": ("garbage", r"garbage.last\.pt: is damaged"),
    "checkpoint cut short": ("short", r"short.last\.pt: is damaged"),
    "checkpoint of something else": ("other", r"other.last\.pt: is damaged: .*keys"),
    "checkpoint of an edited model": ("edited", r"edited.last\.pt"),
    "other width on the way": ("run --width=64", "width: got 64, but run.last.pt was trained with 32"),
    "other rules on the way": ("run --parametrization=sp", "parametrization: got 'sp', but .* with 'mup'"),
    "fewer steps than done": ("run --steps=1", "steps: got 1, takes at least the 2"),
    # machine
    "no such device": ("--device=tpu", "device: got 'tpu', takes auto, cpu"),
    "absent device": ("--device=cuda:98", "device: got cuda:98, which this machine has not"),
    "device number beyond all": ("--device=cuda:300", "device: got '?cuda:300"),
    "out in a file": ("--out=notes.txt/run", "out: cannot write notes.txt"),
    "out that is a file": ("--out=notes.txt", "out: cannot write notes.txt"),
    "out without a name": ("--out=", "out: got ''"),
}
SLOW = {"misspelled setting", "missing corpus", "checkpoint that is none"}  # through a process of their own


@pytest.fixture(scope="module")
def place(corpus, tmp_path_factory):
    """A folder with everything that FAILURES names, where nothing may change."""
    folder = tmp_path_factory.mktemp("place")
    train.train(Config(**corpus | {"steps": 2, "out": str(folder / "run")}), quiet=True)
    for name in ("garbage", "short", "other", "edited"):
        shutil.copytree(folder / "run", folder / name)
        os.remove(folder / name / "previous.pt")  # nothing to go back to
    checkpoint = folder / "run/last.pt"
    (folder / "garbage/last.pt").write_bytes(b"no checkpoint")
    (folder / "short/last.pt").write_bytes(checkpoint.read_bytes()[:-1000])
    checkpoints.write(folder / "other/last.pt", [1, 2])
    content = torch.load(checkpoint, weights_only=True)
    content["model"]["blocks.0.mlp.gate.weight"] = torch.zeros(2, 2)
    checkpoints.write(folder / "edited/last.pt", content)
    settings = json.loads((folder / "run/config.json").read_text())
    for name, text in {"broken": "{", "list": "[]", "number": "3", "empty": None, "config": None,
                       "newer": json.dumps(settings | {"speed": 1}),
                       "wrong": json.dumps(settings | {"lr": "fast"})}.items():
        (folder / name).mkdir()
        if text is not None:
            (folder / name / "config.json").write_text(text)
    for name, text in {
            "config/proxy.py": "lr = 1.0", "notes.txt": "these are notes", "raises.py": "lr = 1 / 0",
            "lines.py": "raise ValueError('one\\ntwo')", "exits.py": "import sys\nsys.exit('no')",
            "unknown.py": "widht = 64", "range.py": "depth = 0", "imports.py": "from config.nope import *",
            "text_lr.py": "lr = 'big'", "function.py": "lr = max", "huge.py": "lr = 10**400",
            "blank.jsonl": '{"text": " "}\n', "one.txt": "one document", "broken.jsonl": '{"text": \n',
            "rows.jsonl": "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(20))}.items():
        (folder / name).write_text(text)
    (folder / "binary.py").write_bytes(b"\x00\xff\xfe lr")
    return folder


def contents(folder):
    return {os.path.join(path, name): os.stat(os.path.join(path, name)).st_mtime_ns
            for path, folders, files in os.walk(folder) for name in [*folders, *files]}


@pytest.mark.parametrize("case", FAILURES)
def test_what_is_wrong_is_said_in_one_line_and_leaves_nothing(corpus, place, monkeypatch, capfd, case):
    words, line = FAILURES[case]
    argv = [*[f"--{name}={value}" for name, value in corpus.items()], *words.split(" ")]
    monkeypatch.chdir(place)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    before, prepared = contents(place), set(os.listdir(corpus["data_dir"]))
    if case in SLOW:
        done = subprocess.run([sys.executable, f"{ROOT}/train.py", *argv], capture_output=True, text=True)
        code, output, errors = done.returncode, done.stdout, done.stderr
    else:
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        with pytest.raises(SystemExit) as caught:
            command(train.main)
        code, (output, errors) = caught.value.code, capfd.readouterr()
    assert code == 2 and output == ""
    assert errors.startswith("error: ") and errors.count("\n") == 1 and errors.endswith("\n"), errors
    assert re.search(line, errors), errors
    assert contents(place) == before, "something was written"
    new = set(os.listdir(corpus["data_dir"])) - prepared
    assert all(os.path.exists(f"{corpus['data_dir']}/{name}/meta.json") for name in new)


def test_a_reader_that_leaves_gets_no_traceback():
    process = subprocess.Popen([sys.executable, f"{ROOT}/train.py", "--help"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=60) == 128 + signal.SIGPIPE


def test_there_are_thirty_cases():
    assert len(FAILURES) >= 30 and SLOW <= set(FAILURES)


def test_a_missing_library_is_refused_before_anything_is_written(corpus, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["train.py", *[f"--{k}={v}" for k, v in corpus.items()], "--wandb=true"])
    with pytest.raises(SystemExit) as caught:
        command(train.main)
    assert caught.value.code == 2 and os.listdir() == []
    assert capfd.readouterr().err.endswith("error: wandb: got true, but it is not installed; "
                                           "pip install wandb, or --wandb=false\n")
