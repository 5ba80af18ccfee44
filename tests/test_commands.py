"""The commands as they are typed: help, slips, more steps, Slurm; and the change of docs/hacking.md."""

import ast
import importlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import CHECKED, ROOT, change_table, column, run, tokens
from processes import Fork, finish, start_ranks

import model
import parametrization
import train
from configure import SETTINGS, Config, UserError, configure
from generate import Cache
from scaling import __main__ as scaling_commands
from scaling import coordinate_check, table
from scaling.cli import parse_options
from scaling.sweep import torchrun_rank
from training.distributed import torchrun_variables
from training.sample import sampling_config
from training.schedule import decay_start, describe_more_steps, lr_factor

# Help and slips

COMMANDS = ["data.prepare", "interop.export",
            *(f"scaling.{module}" for module, _ in scaling_commands.commands().values())]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_prints_its_own_help(command, capsys):
    module = importlib.import_module(command)
    with pytest.raises(SystemExit) as caught:
        module.main(["--help"])
    output = capsys.readouterr().out
    assert not caught.value.code and output.startswith(module.__doc__.strip())
    package, _, name = command.partition(".")
    name = scaling_commands.SHORT_NAMES.get(name, name)
    assert any(f"python -m {words}" in output for words in (command, f"{package} {name}"))
    assert "usage: python train.py" not in output


def test_the_help_of_data_prepare_lists_the_settings_of_data_alone(capsys):
    with pytest.raises(SystemExit):
        importlib.import_module("data.prepare").main(["--help"])
    listed = re.findall(r"^  --(\w+)=", capsys.readouterr().out, re.MULTILINE)
    assert listed[:2] == ["dataset", "tokenizer"] and listed[-1] == "data_dir" and "width" not in listed
    with pytest.raises(UserError, match="^width"):
        importlib.import_module("data.prepare").main(["--width=64"])


@pytest.mark.parametrize("words", [["-m", "scaling.report"], ["-m", "scaling", "report"]])
def test_a_command_of_the_lab_is_run_by_its_module_or_by_its_name(words):
    done = subprocess.run([sys.executable, *words, "--widht=64"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: widht") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("word", "advice"), [("swep", "sweep"), ("study", "`python -m scaling` lists them")])
def test_a_word_that_is_no_command_of_the_lab_is_answered_with_those_that_are(word, advice):
    with pytest.raises(UserError, match=f"^scaling: {word} is not a command; .*{advice}"):
        scaling_commands.main([word])


@pytest.mark.parametrize("words", [
    ["configure.py"], ["parametrization.py"], ["-m", "scaling.trials"],
    ["config/proxy.py"], ["config/finetune.py"]], ids=" ".join)
def test_what_is_run_without_being_a_command_says_in_a_line_what_to_run(words):
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and "python train.py" in done.stderr
    assert done.stderr.count("\n") == 1


def test_train_without_words_prints_a_short_usage(capsys):
    assert train.main([]) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.startswith("usage: python train.py") and errors.count("\n") < 15


def test_a_script_beside_the_project_may_use_it(tmp_path):
    script = tmp_path / "generate.py"
    script.write_text("from configure import Config\nprint(Config().width)\n")
    environment = os.environ | {"PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "128\n", "")


def test_python_m_scaling_lists_every_command_with_a_sentence(capsys):
    scaling_commands.main([])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(scaling_commands.commands()) + 1 >= 7
    assert all(re.fullmatch(r"python -m scaling \w+ +[A-Z].{20,100}", line) for line in lines[:-1])


def test_python_may_give_a_path_and_a_line_in_place_of_words_is_answered():
    assert Config(out=Path("a/b")).out == os.path.join("a", "b")
    with pytest.raises(UserError, match="list of words"):
        configure("config/proxy.py")


@pytest.mark.parametrize(("words", "advice"), [
    (["--learning_rate=1"], "learning_rate: no such setting; did you mean lr?"),
    (["--n-layer=1"], "n-layer: no such setting; did you mean depth?"),
    (["--Width=64"], "Width: no such setting; did you mean width?"),
    (["--batch_size", "8"], "batch_size: no such setting; did you mean batch?"),
    (["--xyz=1"], "xyz: no such setting; --help lists them"),
    (["proxy"], "proxy: No such file or directory; did you mean config/proxy.py?"),
    (["config/prxy.py"], "config/prxy.py: No such file or directory; did you mean config/proxy.py?"),
    (["out/mine2"], "out/mine2: No such file or directory; did you mean out/mine?"),
    (["out/mine2", "--prompt=hi"], "out/mine2: No such file or directory; did you mean out/mine?"),
    (["../texts/mien.py"], "../texts/mien.py: No such file or directory; did you mean ../texts/mine.py?"),
    (["out/found"], "out/found is the folder of a search; its settings are out/found/best.py"),
    (["named.py"], "named.py: line 2: NameError: name 'novels' is not defined"),
    (["nothing-like-it"], "nothing-like-it: No such file or directory")])
def test_a_slip_is_answered_with_what_was_meant(words, advice, tmp_path, monkeypatch):
    for path, text in {"out/mine/config.json": "{}", "out/found/best.py": "lr = 0.5", "../texts/mine.py": "",
                       "named.py": "lr = 0.5\ndataset = novels"}.items():
        (tmp_path / "here" / path).parent.resolve().mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / path).resolve().write_text(text)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError) as caught:
        sampling_config(words) or configure(words)
    advice = advice.replace("config/proxy.py?", os.path.relpath(os.path.join(ROOT, "config/proxy.py")) + "?")
    assert str(caught.value) == advice


def test_no_name_of_another_program_stands_for_two_settings_or_is_one():
    from configure import OTHER_NAMES
    names = [name for others in OTHER_NAMES.values() for name in others.split()]
    assert len(names) == len({*names}) and not {*names} & {*SETTINGS} and {*OTHER_NAMES} <= {*SETTINGS}


def test_an_option_may_be_followed_by_its_value_and_a_slip_in_one_is_noticed():
    assert parse_options(["--out=~/x"], {"out": ""}, "")[0] == {"out": os.path.expanduser("~/x")}
    options, axes, words = parse_options(["--out", "x", "lr=1,2", "--width", "64"], {"out": "", "stack": 1},
                                         "", takes_axes=True)
    assert (options, axes, words) == ({"out": "x", "stack": 1}, {"lr": "1,2"}, ["--width", "64"])
    for words, line in {"--stak=8": "stak: no such setting or option; did you mean stack?",
                        "--out": "out needs a value: --out=VALUE",
                        "--out=x --out y": "out must be given once; remove all but one --out"}.items():
        with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
            parse_options(words.split(), {"out": "", "stack": 1}, "")


# More steps

def test_more_steps_say_that_the_schedule_is_stretched_and_what_the_lr_becomes(corpus, tmp_path, monkeypatch):
    settings = corpus | {"out": str(tmp_path / "run"), "lr": 0.01, "sample_tokens": 0, "warmup": 0.0}
    run(settings, steps=6)
    said = []
    monkeypatch.setattr(train.tqdm, "write", said.append)
    result = train.train(Config(**settings | {"steps": 12}))
    [line] = [line for line in said if line.startswith("steps: ")]
    assert line.startswith("steps: 12 after 6; the cosine schedule is stretched, so the lr goes from 0.001 "
                           "at step 6 to ")
    assert float(re.search(r"to ([\d.]+) at step 7", line)[1]) == pytest.approx(column(result, "lr")[6], 1e-2)


@pytest.mark.parametrize("schedule", ["wsd", "wsd_sqrt"])
def test_more_steps_after_a_decay_continue_as_if_they_had_been_there_from_the_start(corpus, tmp_path,
                                                                                    monkeypatch, schedule):
    settings = corpus | {"schedule": schedule, "decay_fraction": 0.5, "warmup": 0.0, "sample_tokens": 0}
    run(settings, steps=6, out=str(tmp_path / "run"))
    said = []
    monkeypatch.setattr(train.tqdm, "write", said.append)
    more = train.train(Config(**settings | {"steps": 12, "out": str(tmp_path / "run")}))
    straight = run(settings, steps=12)
    assert column(more) == column(straight) and more.val_loss == straight.val_loss
    assert f"steps: 12 after 6; the {schedule} schedule goes on, with the lr at 0.00195" in said
    os.remove(tmp_path / "run" / "stable.pt")  # then the decayed model goes on, and that is said
    train.train(Config(**settings | {"steps": 30, "out": str(tmp_path / "run")}))
    assert any("stretched, so the lr goes from 0.000195 at step 12 to 0.00195" in line for line in said)


@pytest.mark.parametrize(("settings", "goes_on"), [
    ({"schedule": "inverse_sqrt", "warmup": 0.0}, True), ({"schedule": "inverse_sqrt", "warmup": 0.5}, False),
    ({"schedule": "constant"}, True), ({"schedule": "linear"}, False),
    ({"schedule": "linear", "decay_tokens": 8192 * 90, "warmup": 0.0}, True)])
def test_more_steps_stretch_a_schedule_only_where_one_long_run_would_have_had_another_past(settings, goes_on):
    line = describe_more_steps(Config(**settings, steps=60), 30, 30)
    assert ("goes on" in line, "is stretched" in line) == (goes_on, not goes_on)


@pytest.mark.parametrize("settings", [{}, {"decay_fraction": 0.0}, {"decay_fraction": 1.0, "warmup": 0.25}])
def test_the_decay_of_wsd_starts_after_the_last_step_at_the_peak(settings):
    config = Config(**{"schedule": "wsd", "steps": 20, "decay_fraction": 0.3, **settings})
    factors = [lr_factor(config, step) for step in range(config.steps)]
    peaks = [step for step, factor in enumerate(factors) if factor == 1.0]
    assert decay_start(config) == peaks[-1] + 1
    assert decay_start(Config(schedule="cosine")) is None


# Slurm

STEP = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456",
        "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "gpu[07-09,12],login1"}


@pytest.mark.parametrize(("hosts", "first"), [
    ("gpu[07-09,12],login1", "gpu07"), ("node3", "node3"), ("a,b", "a"), ("r[1,3]n", "r1n"),
    ("cn-0[12-13].site", "cn-012.site")])
def test_tasks_of_srun_are_ranks_that_meet_on_the_first_host(hosts, first):
    found = torchrun_variables(STEP | {"SLURM_STEP_NODELIST": hosts})
    assert found == {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": first,
                     "MASTER_PORT": "23458"}


def test_what_is_no_task_among_several_of_srun_is_left_alone():
    batch_script = {"SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"}
    for environment in ({}, batch_script, STEP | {"SLURM_STEP_NUM_TASKS": "1"}, STEP | {"RANK": "0"}):
        assert torchrun_variables(environment) == {}
    own = torchrun_variables(STEP | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert (own["MASTER_ADDR"], own["MASTER_PORT"]) == ("head", "1234")
    with pytest.raises(UserError, match="SLURM_STEP_NODELIST"):
        torchrun_variables(STEP | {"SLURM_STEP_NODELIST": ""})


def test_a_sweep_that_srun_starts_has_one_process_that_prints(monkeypatch):
    for name, text in STEP.items():
        monkeypatch.setenv(name, text)
    assert torchrun_rank() == (9, 16)


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "1"}, {"RANK": "x"}])
def test_a_sweep_rejects_torchrun_variables_that_do_not_agree(monkeypatch, variables):
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(UserError, match="^RANK"):
        torchrun_rank()


def test_tasks_of_srun_train_one_model_together(corpus, tmp_path, monkeypatch):
    settings = corpus | {"out": str(tmp_path / "run")}
    by_torchrun = start_ranks(2, settings | {"out": str(tmp_path / "other")})
    monkeypatch.setattr("processes.Fork", as_srun_starts_it)
    by_srun = start_ranks(2, settings)
    lines = [finish(ranks).splitlines()[-1].partition(": ")[2] for ranks in (by_srun, by_torchrun)]
    assert lines[0] == lines[1] and lines[0].startswith("validation loss")
    assert len(os.listdir(tmp_path)) == 2


def as_srun_starts_it(function, *arguments, environment, folder):
    """A fork with Slurm's variables in place of torchrun's."""
    return Fork(function, *arguments, folder=folder, environment={
        "SLURM_STEP_NUM_TASKS": environment["WORLD_SIZE"], "SLURM_PROCID": environment["RANK"],
        "SLURM_LOCALID": environment["LOCAL_RANK"], "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_JOB_ID": environment["MASTER_PORT"], "SLURM_STEP_ID": "0"})


# Print the words and what Slurm's variables are, in place of running Python
STUB = "#!/bin/bash\necho $SLURM_PROCID $SLURM_LOCALID $OMP_NUM_THREADS :\"$@\"\n"
# Start as many tasks as the script asks for, by the number of nodes and of tasks on each
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for i in $(seq 0 15); do SLURM_PROCID=$i SLURM_LOCALID=$((i % 8)) "$@"; done
"""


@pytest.mark.parametrize(("script", "words", "tasks", "command"), [
    ("train", ["config/gpt2.py", "--out=out/my gpt2"], 16, ["train.py"]),
    ("search", ["config/proxy.py", "--trials=256", "--out=out/search"], 1, ["-m", "scaling.search"])])
def test_a_script_for_sbatch_asks_for_what_its_command_uses(tmp_path, script, words, tasks, command):
    path = os.path.join(ROOT, "slurm", f"{script}.sh")
    for place, text in {".venv/bin/python": STUB, "bin/srun": SRUN}.items():
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text(text)
        (tmp_path / place).chmod(0o755)
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "8"}
    done = subprocess.run(["bash", path, *words], cwd=tmp_path, env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == tasks and len({*lines}) == tasks
    assert all(line.endswith(f"8 :{' '.join([*command, *words])}") for line in lines)
    with open(path) as file:
        asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", file.read(), re.MULTILINE))
    by_node = int(asked.get("ntasks-per-node", 1))
    assert by_node * int(asked.get("nodes", 1)) == tasks and int(asked["gpus-per-node"]) == by_node
    assert ("signal" in asked) == (script == "train")


# The table

def test_the_table_shows_mup_beside_sp_at_each_size(capsys):
    table.main(["--width=16,64", "--base_width=16", "--head_dim=16", "--base_head_dim=16", "--lr=1"])
    blocks = capsys.readouterr().out.split("\n\n")
    assert [block.splitlines()[0].split(",")[0] for block in blocks] == ["width 16 (base: 16)",
                                                                        "width 64 (base: 16)"]
    rows = [{line.split()[0]: line.split()[1:] for line in block.splitlines()[1:]} for block in blocks]
    assert rows[0]["readout"][1::2] == rows[0]["readout"][2::2], "at the base shape they are the same"
    assert rows[1]["hidden"][3:5] == ["0.25", "1"] and rows[1]["readout"][1:3] == ["0.25", "0.125"]
    assert rows[1]["logits"] == ["mup", "x", "0.25,", "sp", "x", "1"]


# docs/hacking.md's example

def changed_source(name, diff):
    """The source of the project's file `name` after the change that `diff` describes: each hunk's lines with
    " " or "-" are found in it, and become those with " " or "+"."""
    with open(os.path.join(ROOT, name)) as file:
        source = file.read()
    hunks = re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]
    for hunk in hunks:
        lines = hunk.splitlines()
        old, new = ("".join(f"{line[1:]}\n" for line in lines if line[:1] in kept) for kept in (" -", " +"))
        assert source.count(old) == 1, f"{name} has {source.count(old)} times\n{old}"
        source = source.replace(old, new)
    return source


def hacking_example():
    """{file name: its source after docs/hacking.md's change}."""
    with open(os.path.join(ROOT, "docs", "hacking.md"), encoding="utf-8") as file:
        [diff] = re.findall(r"^```diff\n(.*?)^```", file.read(), re.MULTILINE | re.DOTALL)
    parts = re.split(r"^\+\+\+ (\S+)\n", diff, flags=re.MULTILINE)[1:]
    return {name: changed_source(name, part) for name, part in zip(parts[::2], parts[1::2], strict=True)}


@pytest.fixture
def skipped(monkeypatch):
    """The GPT of docs/hacking.md's example, as what is trained and checked."""
    sources = hacking_example()
    assert {*sources} == {"model.py", "parametrization.py"}
    roles = next(node.value for node in ast.parse(sources["parametrization.py"]).body
                 if isinstance(node, ast.Assign) and node.targets[0].id == "ROLES")
    monkeypatch.setattr(parametrization, "ROLES", ast.literal_eval(roles))
    module = types.ModuleType("changed_model")
    exec(compile(sources["model.py"], "changed model.py", "exec"), module.__dict__)
    for user in (train, coordinate_check):
        monkeypatch.setattr(user, "GPT", module.GPT)
    return module.GPT


def test_the_coordinate_check_passes_the_hacking_example_and_fails_its_wrong_exponent(corpus, skipped,
                                                                                      monkeypatch):
    config = Config(**corpus | CHECKED, smear=True)

    def check():
        rows, _ = coordinate_check.coordinate_check(config, "width", (64, 256), seeds=1)
        return {row["layer"]: row["verdict"] for row in rows}

    verdicts = check()
    assert {"skip", "smear"} <= {*verdicts} and {*verdicts.values()} == {"PASS"}
    change_table(monkeypatch, "embedding", {"lr": (-1, 0)})
    wrong = check()
    assert (wrong["skip"], wrong["smear"]) == ("FAIL", "FAIL")


def test_the_hacking_example_learns_and_reads_the_same_by_the_cache(corpus, skipped, monkeypatch):
    settings = corpus | {"steps": 60, "embedding_lr_mult": 8.0, "embedding_std": 1.0, "lr": 2**-7}
    changed = run(settings)
    monkeypatch.setattr(train, "GPT", model.GPT)
    assert changed.val_loss != run(settings).val_loss
    x_BT, _ = tokens(changed.model.config)
    gpt, cache = changed.model.eval(), Cache(16, torch.zeros(len(x_BT), dtype=torch.long))
    with torch.no_grad():
        pieces = [gpt(piece_BT, cache=cache) for piece_BT in x_BT.split([1, 1, 5, 9], dim=1)]
        assert torch.allclose(torch.cat(pieces, 1), gpt(x_BT), atol=1e-4)
