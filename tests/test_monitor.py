"""What is watched at each step: the numbers are those computed by hand, and watching changes nothing."""

import dataclasses
import math

import pytest
import torch
from conftest import column, cuda, read_rows, run

import train
from configure import Config
from data.loader import TokenDataset
from data.prepare import prepare
from model import GPT
from parametrization import role_of
from training.log import COLUMNS
from training.monitor import LossSpikeDetector, Observer, build_observers, divergence_message

QUANTITIES = ("grad_norm", "weight_rms", "update_over_weight")
CONSTANT = {"schedule": "constant", "warmup": 0.0}  # n steps are the first n of any longer run


def by_role(named_tensors):
    """{role: all its numbers in one vector, in float64}."""
    found = {}
    for name, tensor in named_tensors:
        found.setdefault(role_of(name), []).append(tensor.detach().double().flatten())
    return {role: torch.cat(tensors) for role, tensors in found.items()}


def rms(vector):
    return vector.square().mean().sqrt().item()


def expected_of_roles(before, after, batch):
    """The columns of log_roles for a step from the weights of model `before` to those of `after`."""
    before.zero_grad()
    before(*batch).backward()
    gradients = by_role((name, p.grad) for name, p in before.named_parameters())
    old, new = by_role(before.named_parameters()), by_role(after.named_parameters())
    expected = {}
    for role in old:
        expected[f"{role}/grad_norm"] = gradients[role].norm().item()
        expected[f"{role}/weight_rms"] = rms(new[role])
        expected[f"{role}/update_over_weight"] = rms(new[role] - old[role]) / rms(new[role])
    return expected


@pytest.mark.parametrize("settings", [{}, {"tied": True, "bias": True, "micro_batch": 2, "grad_clip": 0.01}],
                         ids=["plain", "hard"])
def test_the_numbers_of_the_roles_are_those_computed_by_hand(corpus, settings):
    settings = corpus | CONSTANT | settings
    config = Config(**settings)
    dataset = TokenDataset(prepare(config))
    result = run(settings, steps=3, log_roles=True)
    untrained = GPT(dataclasses.replace(config, vocab_size=257))
    models = [untrained, *(run(settings, steps=steps).model for steps in (1, 2, 3))]
    for step, row in enumerate(result.history):
        batch = dataset.batch(config.seed, step, config.batch, config.context)
        expected = expected_of_roles(models[step], models[step + 1], batch)
        logged = {name: value for name, value in row.items() if name not in COLUMNS}
        assert logged == pytest.approx(expected, rel=1e-4)
        total = math.hypot(*(value for name, value in logged.items() if name.endswith("/grad_norm")))
        assert total == pytest.approx(row["grad_norm"], rel=1e-5)


def test_every_role_of_the_model_has_its_columns(corpus, tmp_path):
    run(corpus, log_roles=True, bias=True, eval_every=3, out=str(tmp_path / "run"))
    rows = read_rows(tmp_path / "run")
    roles = ("embedding", "hidden", "norm", "bias", "final_norm", "readout")
    expected = [f"{role}/{quantity}" for quantity in QUANTITIES for role in roles]
    assert [*rows[0]] == [*COLUMNS, *expected]
    assert [bool(row["hidden/weight_rms"]) for row in rows] == [False] + [True] * 6, "step 0 is no step"
    assert all(float(row[name]) >= 0 for row in rows[1:] for name in row if "/" in name)


def test_without_log_roles_nothing_is_watched_and_no_column_is_added(corpus, tmp_path):
    config = Config(**corpus, vocab_size=257)
    assert build_observers(GPT(config), None, config) == []
    run(corpus, out=str(tmp_path / "run"))
    assert [*read_rows(tmp_path / "run")[0]] == COLUMNS


@pytest.mark.parametrize("first", [True, False])
def test_a_resumed_run_may_start_or_stop_logging_the_roles(corpus, tmp_path, first):
    settings = corpus | CONSTANT | {"out": str(tmp_path / "run")}
    run(settings, steps=4, log_roles=first)
    result = run(settings, steps=6, log_roles=not first)
    rows = read_rows(tmp_path / "run")
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {name.partition("/")[2] for name in rows[0] if "/" in name} == {*QUANTITIES}
    for row in rows:
        assert None not in row and None not in row.values(), "each row has as many cells as the header"
        is_logged = first == (int(row["step"]) <= 4)
        assert all(bool(row[name]) == is_logged for name in row if "/" in name)
    assert [float(row["train_loss"]) for row in rows] == column(result)
    assert column(result) == column(run(corpus | CONSTANT, steps=6))
    run(settings, steps=6)  # once more: read back from a checkpoint of both kinds of rows
    assert read_rows(tmp_path / "run") == rows


class Probe(Observer):
    """Reads the attention of a block by a hook, in a pass of its own; at step 4 it has one number more."""
    every = 2

    def before_step(self, done, model, batch):
        self.loss_before = model(*batch[:, 0])

    def after_step(self, done, model, batch, grad_norms):
        outputs = []
        hook = model.blocks[1].attention.register_forward_hook(lambda *found: outputs.append(found[2]))
        loss = model(*batch[:, 0])
        hook.remove()
        torch.rand(5)
        extra = {"extra, at last": 4} if done == 4 else {}
        return {"gain": self.loss_before - loss, "attention/1": outputs[0].abs().mean(),
                "largest": max(grad_norms)} | extra


@pytest.mark.parametrize("settings", [{}, {"compile": "blocks"}, {"compile": "model"}], ids=str)
def test_an_observer_logs_any_column_at_any_step_and_changes_no_number(
        corpus, tmp_path, monkeypatch, compiled_eagerly, settings):
    settings = corpus | CONSTANT | {"dropout": 0.1} | settings
    alone = run(settings, steps=6)
    monkeypatch.setattr(train, "build_observers", lambda model, dataset, config: [Probe()])
    run(settings, steps=5, out=str(tmp_path / "run"))
    watched = run(settings, steps=6, out=str(tmp_path / "run"))
    assert column(watched) == column(alone) and watched.val_loss == alone.val_loss
    rows = read_rows(tmp_path / "run")
    assert [*rows[0]] == [*COLUMNS, "gain", "attention/1", "largest", "extra, at last"]
    for row, known in zip(rows, watched.history, strict=True):
        assert bool(row["gain"]) == bool(row["attention/1"]) == (known["step"] % 2 == 0)
        assert bool(row["extra, at last"]) == (known["step"] == 4)
        assert not row["gain"] or 0 < float(row["largest"]) < known["grad_norm"]
    assert {len(row) for row in rows} == {len(COLUMNS) + 4}


@cuda
@pytest.mark.parametrize("graph", [True, False])
def test_on_cuda_the_numbers_of_the_roles_are_those_of_the_cpu(corpus, graph):
    settings = corpus | {"log_roles": True, "precision": "fp32", "compile": False, "steps": 20}
    ours, theirs = run(settings, device="cuda", graph=graph), run(settings)
    names = [name for name in theirs.history[-1] if "/" in name]
    assert len(names) == 3 * 5
    for name in names:
        assert column(ours, name) == pytest.approx(column(theirs, name), rel=1e-2), name


def test_a_spike_of_the_loss_is_reported_with_the_share_of_clipped_steps():
    lines = []
    detector = LossSpikeDetector(grad_clip=1.0, say=lines.append)
    for step in range(1, 302):
        loss = 4.0 + 0.1 * math.sin(step)
        if step == 250:
            loss += 3.0
        detector.update([{"step": step, "train_loss": loss, "grad_norm": 0.5 + (step % 4 == 0)}])
    assert len(lines) == 1 and lines[0].startswith("step 250: the loss jumps to 6.")
    assert "25% were clipped" in lines[0]


@pytest.mark.parametrize("huge", [1e9, 1e200, math.inf])
def test_one_huge_loss_is_reported_once_and_forgotten_with_its_window(huge):
    lines = []
    detector = LossSpikeDetector(grad_clip=1.0, say=lines.append)
    for step in range(1, 2000):
        loss = huge if step == 150 else 4.0 + 0.01 * math.sin(step)
        detector.update([{"step": step, "train_loss": loss + (step == 1500), "grad_norm": 0.5}])
    assert [line.split(":")[0] for line in lines] == ["step 150", "step 1,500"]


def test_many_rows_at_once_are_looked_at_one_by_one():
    rows = [{"step": step, "train_loss": 4.0 + 9.0 * (step == 150), "grad_norm": 2.0} for step in range(200)]
    lines = []
    LossSpikeDetector(grad_clip=0.0, say=lines.append).update(rows)
    assert len(lines) == 1 and lines[0].startswith("step 150: ") and "0% were clipped" in lines[0]


def test_the_line_about_a_divergence_names_the_two_worst_roles_a_broken_one_first():
    row = {"step": 7, "train_loss": math.nan, "lr": 2**-9, "grad_norm": math.nan}
    line = divergence_message(row, ["hidden", "norm", "hidden", "readout"], [3.0, 9.0, 4.0, math.nan], "bf16")
    assert line.startswith("diverged at step 7, in bf16: train_loss nan, lr 0.00195, grad_norm nan, "
                           "gradient of readout nan, gradient of norm 9; try a smaller --lr")
    line = divergence_message(row, ["hidden", "norm", "hidden", "readout"], [3.0, 4.5, 4.0, 1.0], "fp32")
    assert "gradient of hidden 5, gradient of norm 4.5; " in line
    assert "gradient" not in divergence_message({"step": 0, "val_loss": math.inf}, ["hidden"], [], "fp32")
