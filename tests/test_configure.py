"""Settings: layers of files and flags, each value checked, nothing evaluated."""

import ast
import dataclasses
import glob
import json
import math
import os
import re

import numpy as np
import pytest
from conftest import ROOT

from configure import SETTINGS, Config, UserError, configure, is_assignment
from parametrization import TABLES
from training.schedule import AFTER_WARMUP

FIELDS = {field.name: field.default for field in dataclasses.fields(Config)}
FILES = sorted({os.path.relpath(path, ROOT) for path in glob.glob(f"{ROOT}/config/**/*.py", recursive=True)}
               - {"config/config.py"})  # of which a preset that is run itself makes use


def write(path, text):
    path.write_text(text)
    return str(path)


def test_flags_beat_later_files_which_beat_earlier_ones_which_beat_defaults(tmp_path):
    first = write(tmp_path / "first.py", "lr = 1.0\ndepth = 1\nseed = 1\n")
    second = write(tmp_path / "second.py", "lr = 2.0\ndepth = 2\n")
    for argv in ([first, second, "--lr=3"], ["--lr=3", first, second], [first, "--lr=3", second]):
        config = configure(argv)
        assert (config.lr, config.depth, config.seed, config.steps) == (3.0, 2, 1, FIELDS["steps"])
    assert configure([second, first]).depth == 1
    with pytest.raises(UserError, match="^seed must be given once"):
        configure(["--seed=1", first, "--seed", "2"])
    assert configure([]) == Config()


def test_a_file_can_build_on_another_and_compute(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = write(tmp_path / "mine.py", """
        import math
        from config.proxy import *
        _scale = math.sqrt(4)
        def doubled(x):
            return 2 * x
        width = doubled(256)
        lr = lr * _scale
    """.replace("\n        ", "\n"))
    config, proxy = configure([path]), configure(["config/proxy.py"])
    assert config == dataclasses.replace(proxy, width=512, lr=2 * proxy.lr)


def test_the_best_py_of_an_older_search_is_read(tmp_path):
    written = "parametrization = 'mup'\nmup_init = 1.0\nmup_lr = 1.0\ndepth_alpha = 0.8\nlr = 0.25\n"
    assert configure([write(tmp_path / "best.py", written)]) == Config(depth_alpha=0.8, lr=0.25)
    between = configure([write(tmp_path / "best.py", written.replace("mup_lr = 1.0", "mup_lr = 0.5"))])
    assert between.parametrization == "plane_1_0.5"


def test_a_file_that_another_builds_on_is_read_anew_each_time(tmp_path, monkeypatch):
    (tmp_path / "my_presets").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    path = write(tmp_path / "mine.py", "from my_presets.base import *\n")
    for width in (192, 64):
        write(tmp_path / "my_presets/base.py", f"width = {width}" + width * " ")  # another size: no .pyc fits
        assert configure([path]).width == width


def test_numbers_of_numpy_are_numbers():
    config = Config(lr=np.float64(0.1), width=np.int64(128), tied=np.bool_(True), warmup=np.array(0.5))
    assert config == Config(lr=0.1, width=128, tied=True, warmup=0.5)
    assert {type(getattr(config, name)) for name in ("lr", "width", "tied", "warmup")} == {float, int, bool}
    with pytest.raises(UserError, match="^width must be"):
        Config(width=np.array([64, 128]))


@pytest.mark.parametrize(("words", "name", "value"), [
    (["--lr=2**-9"], "lr", 0.001953125), (["--width=4*64"], "width", 256), (["--lr=1/8+1e-3"], "lr", 0.126),
    (["--steps=1e3"], "steps", 1000), (["--lr=1"], "lr", 1.0), (["--steps=(3+4)*2-1"], "steps", 13),
    (["--steps=1_000"], "steps", 1000), (["--lr= 2 ** -3 "], "lr", 0.125),
    (["--lr=2**(-6/2)"], "lr", 0.125),
    (["--top_k=None"], "top_k", None), (["--top_k=none"], "top_k", None), (["--out=None"], "out", None),
    (["--tied=true"], "tied", True), (["--tied=TRUE"], "tied", True), (["--tied=False"], "tied", False),
    (["--wandb=fAlSe"], "wandb", False), (["--graph=true"], "graph", True),
    (["--compile=auto"], "compile", "auto"), (["--dataset=a b.txt"], "dataset", "a b.txt"),
    (["--prompt='x'"], "prompt", "'x'"), (["--prompt=a=b=c"], "prompt", "a=b=c"),
    (["--prompt="], "prompt", ""), (["--prompt=None"], "prompt", "None"),
    (["--prompt=2**3"], "prompt", "2**3"), (["--prompt= def main(\n"], "prompt", " def main(\n"),
    (["--out=1"], "out", "1"),
    (["--dataset=true"], "dataset", "true"), (["--tokenizer=bpe:300"], "tokenizer", "bpe:300"),
    (["--lr", "2**-9"], "lr", 0.001953125), (["--prompt", "def f(x=1):"], "prompt", "def f(x=1):"),
    (["--tied", "true"], "tied", True), (["--prompt", "-"], "prompt", "-"), (["-lr=0.5"], "lr", 0.5)],
    ids=str)
def test_a_value_on_the_command_line_means_what_it_looks_like(words, name, value):
    got = getattr(configure(words), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("text", [
    "__import__('os').system('touch HERE')", "open('HERE', 'w')", "[open('HERE', 'w') for _ in '1']",
    "(lambda: open('HERE', 'w'))()", "exec('open(\"HERE\", \"w\")')", "f'{open(\"HERE\", \"w\")}'"])
@pytest.mark.parametrize("name", ["lr", "top_k", "position", "compile", "steps"])
def test_a_value_is_never_run(tmp_path, monkeypatch, name, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{name} must be"):
        configure([f"--{name}={text}"])
    assert os.listdir() == []


NO_NUMBERS = ["9**9**9", "9**9**9**9", "1e999", "-1e999", "nan", "inf", "1/0", "1e308*10", "(" * 5000,
              "1" * 400, "1" * 5000, "1j", "'3'", "b'3'", "[3]", "3 4", "", "3\0", "true", "None", "2**.5j",
              "1 if 1 else 2", "x", "--3", "\ud800", "[0]*10**9", "'x'*10**9", "True*2"]


@pytest.mark.parametrize("text", NO_NUMBERS, ids=lambda text: f"{ascii(text[:9])}-{len(text)}")
def test_what_is_not_a_finite_number_is_rejected_as_one(text):
    with pytest.raises(UserError, match="^lr must be a number above 0"):
        configure([f"--lr={text}"])


def test_a_path_may_begin_with_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    file = write(tmp_path / "mine.py", 'data_dir = "~/prepared"\n')
    config = configure([file, "--out=~/run", "--dataset=~/texts", "--tokenizer=~/old", "--prompt=~/x"])
    assert (config.out, config.dataset) == ("/home/someone/run", "/home/someone/texts")
    assert (config.data_dir, config.tokenizer) == ("/home/someone/prepared", "/home/someone/old")
    assert config.prompt == "~/x" and Config(init_from="~/run").init_from == "/home/someone/run"


def test_a_config_survives_json_to_the_last_bit(tmp_path):
    config = Config(lr=0.1 + 0.2, eps=1e-300, weight_decay=1 / 3, warmup=math.nextafter(0.1, 1),
                    prompt="é\n\"'", graph=True, top_k=None, out=str(tmp_path), final_lr=math.pi / 4)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))
    assert configure([str(tmp_path)]) == config
    assert configure([str(tmp_path), "--lr=1"]) == dataclasses.replace(config, lr=1.0)
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert configure([str(moved)]).out == str(moved), "a run directory stays one when it is moved"


def test_help_lists_every_setting_once_with_its_default_and_unit(capsys):
    with pytest.raises(SystemExit) as caught:
        configure(["config/proxy.py", "--help"])
    output = capsys.readouterr().out
    assert not caught.value.code and output.startswith("usage: python train.py")
    first_screen = output[:output.index("--width=")]
    for example in ("train.py out/proxy ", "--prompt=", "--init_from=", "--steps=2000"):
        assert example in first_screen
    listed = re.findall(r"^  --(\w+)=(.*?)  +(\S.+)$", output, re.MULTILINE)
    assert [name for name, _, _ in listed] == [*FIELDS], "some setting is missing or listed twice"
    assert {name: default for name, default, _ in listed} == {n: str(v) for n, v in FIELDS.items()}
    assert all(len(line) < 130 for line in output.splitlines())
    with pytest.raises(SystemExit):
        configure(["-h"])
    assert capsys.readouterr().out == output


def test_help_says_what_each_setting_takes(capsys):
    with pytest.raises(SystemExit):
        configure(["--help"])
    entries = re.split(r"^  --", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    text = {entry.partition("=")[0]: " ".join(entry.split()) for entry in entries}
    assert "[gelu, gelu_tanh, relu2, swiglu]" in text["mlp"]
    assert "[auto, blocks, model, False]" in text["compile"]
    for name, setting in SETTINGS.items():
        allowed = setting.description.replace("a ", "", 1)
        assert f"[{allowed}{', or none' * setting.optional}]" in text[name] or setting.kind is str, name


def test_a_setting_without_a_group_does_not_import():
    with open(os.path.join(ROOT, "configure.py")) as file:
        source = file.read()
    for line in ('    extra: Count = 1', '    extra: Count = setting(1, "something else", "a number")',
                 '    extra: Count = setting(1)'):
        extended = source.replace("    width: Count", f"{line}\n    width: Count", 1)
        with pytest.raises(TypeError, match="group"):
            exec(compile(extended, "configure.py", "exec"), {"__name__": "extended"})


@pytest.mark.parametrize(("name", "implemented"), [("schedule", AFTER_WARMUP), ("parametrization", TABLES)])
def test_the_choices_of_a_setting_are_those_that_are_implemented(name, implemented):
    assert {*SETTINGS[name].description.split(", ")} == {*implemented}
    for choice in implemented:
        assert getattr(configure([f"--{name}={choice}"]), name) == choice


@pytest.mark.parametrize(("name", "values"), {
    "lr": (0, -1, 1e999), "steps": (-1, 2**31, None), "warmup": (1, -0.1), "beta2": (1, -0.1),
    "dropout": (1,),
    "final_lr": (1.5,), "depth_alpha": (2,), "decay_fraction": (-0.1, 1.1), "seed": (2**63, -1),
    "parametrization": ("ntk",), "graph": (1, None), "width": (0, 2**60), "out": ("",)}.items())
def test_a_value_out_of_range_is_rejected_by_the_name_of_its_setting(name, values):
    for value in values:
        with pytest.raises(UserError, match=f"^{name} must be"):
            Config(**{name: value})


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().lr = 1.0


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_rejects_values_of_another_type_from_python_too(name):
    for value in ([], {}, object(), 1j, b"x"):
        with pytest.raises(UserError, match=f"^{name} must be"):
            Config(**{name: value})


def test_a_number_that_equals_a_flag_is_not_a_flag_and_a_flag_is_not_a_number():
    for name in ("graph", "tied", "wandb"):
        for value in (1, 0, 1.0):
            with pytest.raises(UserError, match=f"^{name} must be"):
                Config(**{name: value})
    for name in ("lr", "steps", "depth_alpha"):
        with pytest.raises(UserError, match=f"^{name} must be .*True"):
            Config(**{name: True})


@pytest.mark.parametrize("path", FILES)
def test_a_committed_file_holds_settings_that_differ_from_what_they_build_on(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with open(path) as file:
        source = file.read()
    base = Config()
    for module in re.findall(r"^from (config\.\w+) import \*$", source, re.MULTILINE):
        base = configure([f"{module.replace('.', '/')}.py"])
    stated = {}
    exec(re.sub(r"^from config.*$", "", source, flags=re.MULTILINE), stated)
    stated = {name: value for name, value in stated.items() if is_assignment(name, value)}
    monkeypatch.setattr("configure.settings_to_start_from", lambda source: {})  # no run is committed
    config = configure([path])
    assert stated and all(getattr(config, name) == value for name, value in stated.items())
    same = [name for name, value in stated.items() if getattr(base, name) == value]
    assert not same, f"{path} sets what it already has: {', '.join(same)}"
    assert ast.get_docstring(ast.parse(source))
    assert len(source.splitlines()) <= 25
