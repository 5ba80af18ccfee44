"""loss.png of a run: what it shows, when it is drawn, and that no run depends on it."""

import os

import matplotlib.figure
import pytest
import torch
from conftest import column, numbers, run
from processes import to_words

import train
import training.log
from configure import UserError
from training.loss_plot import draw_loss

STEPS = 12


@pytest.fixture(autouse=True)
def drawing(monkeypatch):
    """conftest.py's runs are not drawn; these are."""
    monkeypatch.setattr(training.log, "draw_loss", draw_loss)


@pytest.fixture
def drawn(monkeypatch):
    """A list of the figures that are drawn from now on."""
    figures, savefig = [], matplotlib.figure.Figure.savefig

    def save(figure, *args, **options):
        figures.append(figure)
        savefig(figure, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", save)
    return figures


def points(line):
    return [tuple(map(float, point)) for point in zip(*line.get_data(), strict=True)]


def test_the_picture_shows_the_losses_and_the_learning_rate_of_each_step(corpus, tmp_path, drawn):
    settings = corpus | {"steps": STEPS, "eval_every": 4}
    result = run(settings, out=str(tmp_path / "run"))
    assert numbers(result) == numbers(run(settings)), "which is not drawn"
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")
    above, below = drawn[-1].axes
    training, validation = above.get_lines()[:2]
    rows = result.history[1:]
    assert points(training) == [(row["step"], pytest.approx(row["train_loss"])) for row in rows]
    assert points(validation) == [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    assert points(below.get_lines()[0]) == [(row["step"], row["lr"]) for row in rows]
    assert f"{result.val_loss:.3f}" in above.get_title()
    assert "nats" in above.get_ylabel() and "steps" in below.get_xlabel() and "rate" in below.get_ylabel()


def test_of_many_steps_the_training_loss_is_a_mean_and_nothing_of_its_scale_is_lost(drawn):
    rows = [{"step": i, "train_loss": 9.0 if i < 5 else 2.0 + i % 2, "lr": 0.1} for i in range(1, 10_001)]
    rows += [{"step": 10_001, "train_loss": float("nan"), "lr": 0.1}]  # it diverged
    draw_loss(rows, "run")
    line = drawn[0].axes[0].get_lines()[0]
    assert len(points(line)) <= 500
    assert all(loss == pytest.approx(2.5) for _, loss in points(line)[1:])
    low, high = drawn[0].axes[0].get_ylim()
    assert 1.5 < low < 2 and 3 < high < 4, "the first steps set no limit"


@pytest.mark.parametrize(("share", "at"), [(1e9, [4, 8, 12, 16]), (1e-9, [4, 16])])
def test_it_is_drawn_at_evaluations_unless_that_takes_too_long_and_at_the_end(corpus, tmp_path, monkeypatch,
                                                                            share, at):
    steps = []
    monkeypatch.setattr(training.log, "DRAWING_SHARE", share)
    monkeypatch.setattr(training.log, "FEWEST_STEPS", 1)
    monkeypatch.setattr(training.log, "draw_loss", lambda rows, name: steps.append(rows[-1]["step"]) or b"")
    run(corpus, out=str(tmp_path / "run"), steps=16, eval_every=4)
    assert steps == at


def test_a_resumed_run_is_drawn_again_from_its_first_step(corpus, tmp_path, drawn):
    settings = corpus | {"out": str(tmp_path / "run")}
    run(settings, steps=STEPS)
    os.remove(tmp_path / "run/loss.png")
    run(settings, steps=STEPS + 2)
    steps = [step for step, _ in points(drawn[-1].axes[0].get_lines()[0])]
    assert steps == list(range(1, STEPS + 3)) and (tmp_path / "run/loss.png").exists()


@pytest.mark.parametrize(("error", "said"), [
    (ImportError("No module named 'matplotlib'"), "pip install matplotlib"),
    (OSError(28, "No space left on device"), "No space left"),
    (UserError("out: in use"), "in use"), (MemoryError(), "MemoryError")])
def test_a_run_that_cannot_be_drawn_says_so_once_and_has_the_same_numbers(corpus, tmp_path, monkeypatch,
                                                                         capsys, error, said):
    settings = {"steps": STEPS, "eval_every": 3}
    expected = run(corpus, **settings)

    def fail(*arguments):
        raise error

    monkeypatch.setattr(training.log, "DRAWING_SHARE", 1e9)
    monkeypatch.setattr(training.log, "draw_loss", fail)
    result = train.train(train.Config(**corpus | settings | {"out": str(tmp_path / "run")}))
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss.png" in line]
    assert len(lines) == 1 and said in lines[0]
    assert numbers(result) == numbers(expected)
    assert all(map(torch.equal, result.model.parameters(), expected.model.parameters()))
    assert not (tmp_path / "run/loss.png").exists() and len(column(result)) == STEPS


@pytest.mark.parametrize("steps", [STEPS, 3])
def test_the_last_lines_of_a_run_name_its_sample_and_its_picture_where_there_is_one(corpus, tmp_path, capsys,
                                                                                   steps):
    out = str(tmp_path / "run")
    assert train.main(to_words(corpus | {"steps": steps, "out": out})) == 0
    files, last = capsys.readouterr().out.splitlines()[-2:]
    assert os.path.join(out, "sample.txt") in files and last.startswith(f"{out}: validation loss")
    assert (os.path.join(out, "loss.png") in files) == (steps == STEPS) == os.path.exists(f"{out}/loss.png")
