"""The notebooks of lessons/ run in their short form and grade their exercises; the README names commands."""

import copy
import json
import os
import re
import shlex
import sys
import textwrap
from types import SimpleNamespace

import pytest
from children import run_notebook
from conftest import ROOT
from processes import Fork

nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel")
nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
pytest.importorskip("ipykernel", reason="pip install nbclient ipykernel")

FOLDER = os.path.join(ROOT, "lessons")
NAMES = sorted(name for name in os.listdir(FOLDER) if name.endswith(".ipynb"))
LARGEST = 600_000  # bytes of a notebook, outputs included

sys.path.insert(0, FOLDER)
import execute  # noqa: E402


def read(name):
    return nbformat.read(os.path.join(FOLDER, name), as_version=4)


def printed(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.fixture
def form(monkeypatch, tmp_path):
    """Chooses the form of the labs that run; what they write goes to a folder of the test's own."""
    monkeypatch.setenv("LESSON_OUT", str(tmp_path))
    return lambda name: monkeypatch.setenv("LESSON", name)


@pytest.fixture
def run(tmp_path):
    """A function that runs a notebook: {number of a cell: what it printed}. It does so in a fork, where a
    kernel would take seconds to import torch. What the lab writes goes to a folder of the test's own."""
    def run(notebook, form, formats):
        paths = [str(tmp_path / name) for name in ("notebook.ipynb", "printed.json")]
        nbformat.write(notebook, paths[0])
        environment = {"LESSON": form, "LESSON_OUT": str(tmp_path), "IPYTHONDIR": str(tmp_path)}
        process = Fork(run_notebook, *paths, formats, environment=environment, folder=FOLDER)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        with open(paths[1]) as file:
            return {int(number): text for number, text in json.load(file).items()}

    return run


@pytest.mark.parametrize("name", NAMES)
def test_the_short_form_of_a_lab_runs_from_its_first_cell_to_its_last(run, name, tmp_path):
    run(read(name), "short", (".png",))
    trained = [path for path in tmp_path.rglob("*") if path.name in ("trials.csv", "right.json")]
    assert trained, "a lab that trains nothing was not run"


def exercises(notebook):
    """[(index of its cell, the text of the right answer, the texts of wrong ones)]"""
    found = []
    for i, cell in enumerate(notebook.cells):
        if "wrong" in cell.metadata:
            assert "\nanswer = ...\n" in f"\n{cell.source}", "an answer is not given away"
            [right] = re.findall(r"```python\nanswer = (.*?)\n```", notebook.cells[i + 1].source, re.DOTALL)
            found.append((i, right, cell.metadata.wrong))
    return found


def answered(cell, right, wrong):
    """A copy of an exercise's cell that gives each wrong answer, to be rejected, and then the right one."""
    copied = copy.deepcopy(cell)
    lines = []
    for answer in wrong:
        given = cell.source.replace("answer = ...", f"answer = {answer}")
        lines += ["try:", textwrap.indent(given, "    "), "except AssertionError as error:",
                  "    assert 'Hint' in str(error)", "else:",
                  f"    raise RuntimeError({answer!r})"]
    copied.source = "\n".join([*lines, cell.source.replace("answer = ...", f"answer = {right}")])
    return copied


@pytest.mark.parametrize("name", NAMES)
def test_the_exercises_of_a_lab_take_the_right_answers_and_no_wrong_ones(run, name):
    notebook = read(name)
    found = exercises(notebook)
    assert len(found) >= 4
    for i, right, wrong in found:
        assert wrong
        notebook.cells[i] = answered(notebook.cells[i], right, wrong)
    texts = run(notebook, "rows", ())
    for i, _, _ in found:
        assert "is right" in texts[i]


def test_execute_py_runs_a_lab_in_a_kernel_and_stores_what_it_shows(form, tmp_path, capsys):
    form("rows")
    execute.main([NAMES[2], f"--copy={tmp_path}"])
    cells = nbformat.read(tmp_path / NAMES[2], as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert "LESSON=rows" in printed(code[0])
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert "minutes" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_a_lab_is_kept_with_the_outputs_of_a_full_run_and_without_answers(name):
    notebook = read(name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "in order, and all of it"
    assert "LESSON=full" in printed(code[0])
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert os.path.getsize(os.path.join(FOLDER, name)) < LARGEST
    questions = [cell.source for cell in code if "LAB.predict(" in cell.source]
    assert questions and all("= ..." in source for source in questions)


def test_a_prediction_is_stored_once_and_compared_with_what_is_measured(form, monkeypatch, capsys, tmp_path):
    import lab
    form("short")
    monkeypatch.chdir(ROOT)
    learner = lab.Lab("mine")
    learner.predict(drift=...)
    assert learner.predictions() == {}
    learner.predict(drift=-1)
    learner.predict(drift=5)  # after the fact
    assert learner.predictions()["drift"]["guess"] == -1
    learner.compare(drift=-0.9)
    assert "you predicted -1; it is -0.9" in capsys.readouterr().out
    (tmp_path / "mine-short/target").mkdir()
    (tmp_path / "mine-short/target/trials.csv").write_text("")
    with pytest.raises(AssertionError, match="too late"):
        learner.recorded("forecast", "python -m scaling", before="target")


# The table of commands

class Reached(BaseException):
    """A command has read its command line, and would now prepare text or read trials."""


def commands_of_readme():
    with open(os.path.join(FOLDER, "README.md"), encoding="utf-8") as file:
        text = file.read()
    base, settings = (re.search(rf'^{name}="(.*)"$', text, re.MULTILINE)[1] for name in "BS")
    rows = text.partition("## One command each")[2].replace("$S", settings).replace("$B", base)
    return re.findall(r"`(python -m scaling [^`]*)`", rows)


@pytest.mark.parametrize("command", commands_of_readme())
def test_a_command_of_the_readme_of_the_lessons_is_understood(monkeypatch, tmp_path, command):
    from scaling.__main__ import main

    def reached(*arguments, **options):
        raise Reached

    for module in ("scaling.sweep", "scaling.coordinate_check", "scaling.shapes", "scaling.transfer",
                   "scaling.plane"):
        for name in ("prepare", "run_trials"):
            monkeypatch.setattr(f"{module}.{name}", reached, raising=False)
    monkeypatch.setattr("scaling.rows.read_trials", reached)
    plotly = SimpleNamespace(get_plotlyjs=lambda: "")
    monkeypatch.setitem(sys.modules, "plotly", plotly)
    monkeypatch.setitem(sys.modules, "plotly.offline", plotly)
    words = shlex.split(command)[3:]
    with pytest.raises(Reached):
        main([word.replace("out/d", str(tmp_path)).replace("my_texts/", "stdlib") for word in words])
