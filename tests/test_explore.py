"""The explorer's page: its calculator against the parametrization, its trials against the rows."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import ROOT

from configure import Config, UserError
from parametrization import forward_multipliers, hyperparameters
from scaling import explore
from scaling.trials import read_trials

WIDTH = f"{ROOT}/scaling/results/width"
CONFIGS = [
    Config(width=256, weight_decay=0.1, bias=True, depth_alpha=0.5, embedding_lr_mult=8.0),
    Config(parametrization="sp", depth=8, readout_std=0.5),
    Config(optimizer="muon", base_batch=8, base_tokens=10**6, weight_decay=0.2, batch=64, steps=7),
    Config(batch=32, batch_start=8, batch_ramp_tokens=10**5, base_batch=16, base_tokens=10**7, tied=True)]
# Other inputs than those of any config
TARGET = {"width": 1024, "depth": 12, "batch": 96, "tokens": 96 * 256 * 5000, "lr": 2**-6.5}


def run_script(expression):
    """The value of a JavaScript expression with the functions of explore.js."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    with open(f"{ROOT}/scaling/explore.js", encoding="utf-8") as file:
        script = f"{file.read()}\nconsole.log(JSON.stringify({expression}))"
    done = subprocess.run([node, "-"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def plotly(monkeypatch):
    """Stands in for the library, which only lends its JavaScript."""
    monkeypatch.setitem(sys.modules, "plotly", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "plotly.offline", SimpleNamespace(get_plotlyjs=lambda: "/* plotly */"))


def page_data(folder):
    with open(os.path.join(folder, "explore.html"), encoding="utf-8") as file:
        page = file.read()
    return page, json.loads(re.search(r"const DATA = (.*);</script>", page)[1])


def test_the_calculator_gives_each_role_what_training_gives_it():
    recipes = json.dumps([explore.rules(config) for config in CONFIGS])
    found = run_script(f"{recipes}.map(recipe => calculate(recipe, {json.dumps(TARGET)}))")
    for config, by_role in zip(CONFIGS, found, strict=True):
        target = replace(config, batch_start=None, batch_ramp_tokens=None, steps=5000,
                         **{name: TARGET[name] for name in ("width", "depth", "batch", "lr")})
        forward = by_role.pop("forward")
        assert by_role.keys() == {"embedding", "hidden", "norm", "final_norm"} | (
            {"bias"} if config.bias else set()) | (set() if config.tied else {"readout"})
        for role, values in by_role.items():
            expected = hyperparameters(target, role)
            if config.optimizer == "muon" and role == "hidden":
                expected["eps"] = None
            for name in ("std", "lr", "weight_decay", "eps"):
                assert values.get(name) == pytest.approx(expected[name]), (config, role, name)
        beta2 = hyperparameters(target, "hidden")["betas"][1]
        assert math.exp(-forward.pop("minus_log_beta2")) == pytest.approx(beta2)
        assert forward == pytest.approx(forward_multipliers(target))


def test_the_calculator_names_what_is_outside_the_measured_range():
    recipe = {"measured": {"width": [64, 256], "lr": [0.00390625, 0.00390625]}}
    inputs = [{"width": 128, "lr": 0.003906}, {"width": 512, "lr": 0.01}, {"width": 32, "lr": 0.00390625},
              {"width": None, "lr": 0.00390625}]
    found = run_script(f"{json.dumps(inputs)}.map(given => outsideRange({json.dumps(recipe)}, given))")
    assert found == [[], ["width", "lr"], ["width"], ["width"]]


def test_lines_are_means_over_seeds_and_have_gaps_where_a_trial_diverged():
    losses = [(0, 4, 3.0), (1, 4, 4.0), (0, 1, 5.0), (1, 1, 6.0), (0, 2, 2.0), (1, 2, None)]
    trials = [{"loss": loss, "settings": {"lr": lr, "seed": seed, "depth": depth}}
              for depth in (2, 4) for seed, lr, loss in losses]
    line = [[0, 1, 2, None], [5.5, None, 3.5, None]]
    found = run_script(f"meanLines({json.dumps(trials)}, 'lr')")
    assert [found["x"], found["y"]] == [2 * values for values in line]


def test_the_page_holds_every_trial_and_needs_no_network(plotly, tmp_path, capsys):
    with open(f"{WIDTH}/trials.csv", encoding="utf-8") as file:
        (tmp_path / "trials.csv").write_text(file.read().replace(",False,", ",True,", 3))  # three diverge
    explore.main([str(tmp_path), f"--to={tmp_path / 'page'}"])
    page, data = page_data(tmp_path / "page")
    assert f"{tmp_path / 'page' / 'explore.html'}" in capsys.readouterr().out
    assert not re.search(r"https?:|src=|href=|@import", page)
    rows = read_trials(tmp_path)
    assert [trial["loss"] for trial in data["trials"]].count(None) == 3
    assert [trial["loss"] for trial in data["trials"]] == [None if row["diverged"] else row["val_loss"]
                                                           for row in rows]
    names = ("parametrization", "width", "seed")
    assert [[trial["settings"][name] for name in names] for trial in data["trials"]] == [
        [row[name] for name in names] for row in rows]
    assert len({trial["settings"]["lr"] for trial in data["trials"]}) == 13, "2**-12..2**-6:2"
    assert data["axes"] == ["width"] and [*data["swept"]] == ["lr"] and len(data["recipes"]) == 2
    widths, rates = zip(*[(row["width"], row["lr"]) for row in rows if row["parametrization"] == "mup"],
                        strict=True)
    measured = data["recipes"][data["trials"][0]["recipe"]]["measured"]
    assert measured["width"] == [min(widths), max(widths)] and measured["lr"] == [min(rates), max(rates)]


def test_a_trial_between_two_tables_is_shown_and_has_no_calculator(plotly, tmp_path):
    explore.main([f"{ROOT}/scaling/results/plane", f"--to={tmp_path}"])
    _, data = page_data(tmp_path)
    for trial in data["trials"]:
        between = trial["settings"]["parametrization"] not in ("mup", "sp")
        assert between == (data["recipes"][trial["recipe"]] is None)
    assert None in data["recipes"]


def test_a_name_cannot_end_the_script():
    page = explore.build_page("<b>", {"name": "</script><script>alert(1)"}, "")
    assert page.count("</script>") == 3 and "<h1>&lt;b&gt;</h1>" in page


@pytest.mark.parametrize(("edit", "name"), [
    (lambda text: text, "plotly"), (lambda text: text.replace(",False,", ",True,"), "explore"),
    (lambda text: text.splitlines()[0] + "\n", "")])
def test_what_cannot_be_drawn_is_rejected_in_a_line(edit, name, request, monkeypatch, tmp_path):
    if name == "plotly":
        monkeypatch.setitem(sys.modules, "plotly", None)
    else:
        request.getfixturevalue("plotly")
    with open(f"{WIDTH}/trials.csv", encoding="utf-8") as file:
        (tmp_path / "trials.csv").write_text(edit(file.read()))
    with pytest.raises(UserError, match=f"^{name or tmp_path}"):
        explore.main([str(tmp_path)])
    assert os.listdir(tmp_path) == ["trials.csv"]


def test_a_browser_draws_the_page(tmp_path):
    pytest.importorskip("plotly")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium or google-chrome")
    explore.main([WIDTH, f"--to={tmp_path}"])
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                           "--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'profile'}",
                           f"file://{tmp_path / 'explore.html'}"], text=True, capture_output=True)
    sizes = len({row["width"] for row in read_trials(WIDTH)})
    assert len(re.findall(r'<g class="trace scatter', done.stdout)) == 2 * 2 * sizes, "dots and lines"
    assert "<td>hidden</td>" in done.stdout
