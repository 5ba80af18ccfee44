"""Muon: orthogonal updates, matrix by matrix, and the same numbers however a run is made."""

import dataclasses
import functools
import math

import pytest
import torch
from conftest import GPT2_BLOCK, column, run, tiny
from processes import finish, start_ranks

from configure import Config
from model import GPT
from parametrization import param_groups, role_of, rows_of_matrices
from training import muon
from training.device import select_device
from training.fused_step import fused_step
from training.muon import POLAR_EXPRESS, SAFETY, Muon, orthogonal_update, orthogonalize
from training.optimizer import build_optimizer

MUON = {"optimizer": "muon", "lr": 2**-6, "weight_decay": 0.1}
TORCHS = (3.4445, -4.775, 2.0315)  # coefficients of torch.optim.Muon, each of 5 times


def random_matrices(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("outputs", "inputs"), [(32, 128), (128, 32), (64, 64), (1, 16), (16, 1)], ids=str)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_orthogonalizing_makes_singular_values_1_and_leaves_the_directions(outputs, inputs, size):
    matrices_NOI = size * random_matrices(3, outputs, inputs)
    found = orthogonalize(matrices_NOI).double()
    u, s, vt = torch.linalg.svd(matrices_NOI.double(), full_matrices=False)
    along = u.mT @ found @ vt.mT  # diagonal, where the directions are those of the SVD
    values = along.diagonal(dim1=-2, dim2=-1)
    well_conditioned = s > 1e-3 * s.square().sum(-1, keepdim=True).sqrt()
    assert well_conditioned.float().mean() > 0.97
    assert values[well_conditioned].min() > 0.7 and values[well_conditioned].max() < 1.2
    assert (along - torch.diag_embed(values)).abs().max() < 0.02


def test_orthogonalizing_in_bf16_as_on_a_gpu_is_the_same_but_for_rounding(monkeypatch):
    matrices_NOI = random_matrices(3, 64, 96)
    exact = orthogonalize(matrices_NOI)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.bfloat16)
    rounded = orthogonalize(matrices_NOI)
    monkeypatch.undo()
    assert rounded.dtype == torch.bfloat16 and exact.dtype == torch.float32
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()
    values = torch.linalg.svdvals(rounded.float())
    assert 0.7 < values.min() and values.max() < 1.2


def test_a_matrix_without_a_gradient_is_not_moved():
    assert torch.equal(orthogonalize(torch.zeros(1, 8, 4)), torch.zeros(1, 8, 4))


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 16), (16, 64), (32, 32)], ids=str)
def test_an_update_is_scaled_by_the_root_of_outputs_over_inputs(outputs, inputs):
    """So it changes the RMS of an output by about 1 where the input's RMS is 1 and aligned with it."""
    [update] = orthogonal_update(random_matrices(1, outputs, inputs)).float()
    mean = torch.linalg.svdvals(update).mean().item()
    assert mean == pytest.approx(math.sqrt(outputs / inputs), rel=0.1)


def settings_of(group):
    return {key: value for key, value in group.items() if key != "params"}


@pytest.mark.parametrize(("outputs", "inputs"), [(48, 16), (16, 48), (32, 32)], ids=str)
def test_a_few_steps_equal_those_of_torchs_muon(monkeypatch, outputs, inputs):
    like_torchs = functools.partial(orthogonalize, coefficients=[TORCHS] * 5, safety=1.0)
    monkeypatch.setattr(muon, "orthogonalize", like_torchs)
    ours, theirs = (torch.nn.Parameter(random_matrices(outputs, inputs)) for _ in range(2))
    group = {"params": [ours], "lr": 0.1, "weight_decay": 0.5, "momentum": 0.9}
    optimizer = Muon([group], {ours: [outputs]})
    # "original" is sqrt(max(1, outputs / inputs)): ours shrinks wide matrices' updates, too
    shrunk = min(1.0, math.sqrt(outputs / inputs))
    reference = torch.optim.Muon([theirs], lr=0.1 * shrunk, weight_decay=0.5 / shrunk, momentum=0.9,
                                 nesterov=True, ns_coefficients=TORCHS, ns_steps=5, adjust_lr_fn="original")
    for step in range(3):
        before = theirs.detach().clone()
        ours.grad, theirs.grad = (random_matrices(outputs, inputs, seed=step + 1) for _ in range(2))
        optimizer.step()
        reference.step()
        moved = (theirs - before).norm()
        assert (ours - theirs).norm() < 0.02 * (step + 1) * moved and moved > 0.1
    buffers = optimizer.state[ours]["momentum_buffer"], reference.state[theirs]["momentum_buffer"]
    assert torch.allclose(*buffers)


def step_once(model, gradients, lr=0.1):
    """{name: how a step of the optimizer of `model` moves it} from these gradients, of hidden matrices."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = gradients.get(name, torch.zeros_like(p)).clone()
    build_optimizer(model).step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def random_gradients(model):
    return {name: random_matrices(*p.shape, seed=i) for i, (name, p) in enumerate(model.named_parameters())
            if role_of(name) == "hidden"}


@pytest.mark.parametrize(("name", "rows", "settings"), [
    ("attention.qkv", [32, 32, 32], {}), ("mlp.gate_up", [88, 88], {}),
    ("attention.qkv", [32, 8, 8], {"head_dim": 8, "kv_heads": 1})])
def test_matrices_that_share_a_parameter_are_orthogonalized_apart(name, rows, settings):
    name, settings = f"blocks.1.{name}.weight", MUON | settings
    plain = random_gradients(GPT(tiny(**settings)))
    moved = step_once(GPT(tiny(**settings)), plain)
    for part in range(len(rows)):
        changed = plain | {name: plain[name].clone()}
        matrix = changed[name].split(rows)[part]
        matrix.copy_(random_matrices(*matrix.shape, seed=99))
        moved_now = step_once(GPT(tiny(**settings)), changed)
        for i, (a, b) in enumerate(zip(moved[name].split(rows), moved_now[name].split(rows), strict=True)):
            assert torch.allclose(a, b, rtol=0, atol=1e-7) == (i != part)
        assert all(torch.allclose(moved[key], moved_now[key], rtol=0, atol=1e-7)
                   for key in moved if key != name)


@pytest.mark.parametrize("settings", [{}, {"head_dim": 8, "kv_heads": 2}], ids=["default", "kv_heads"])
def test_matrices_of_one_shape_in_one_batch_get_what_each_gets_alone(settings):
    """Of the reference too: momentum (first step, Nesterov), orthogonal update, decay."""
    model = GPT(tiny(**MUON, **settings))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    group = next(group for group in param_groups(model) if group["role"] == "hidden")
    gradients = random_gradients(model)
    for name, moved in step_once(model, gradients).items():
        if name not in gradients:
            continue
        averaged = (1 - 0.95) * gradients[name]
        direction = 0.05 * gradients[name] + 0.95 * averaged
        rows = rows_of_matrices(model.config, name, len(direction))
        parts = [orthogonal_update(part[None])[0] for part in direction.split(rows)]
        expected = -group["lr"] * (0.1 * weights[name] + torch.cat(parts))
        assert torch.allclose(moved, expected, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("settings", [{}, GPT2_BLOCK | {"bias": True, "tied": True}], ids=["default", "gpt2"])
def test_only_hidden_matrices_are_muons_and_all_else_is_torchs_adamw(settings):
    model = GPT(tiny(**MUON, **settings))
    optimizer = build_optimizer(model)
    names = {p: name for name, p in model.named_parameters()}
    by_muon = {names[p] for group in optimizer.muon.param_groups for p in group["params"]}
    by_adamw = {names[p] for group in optimizer.adamw.param_groups for p in group["params"]}
    assert by_muon == {name for name in names.values() if role_of(name) == "hidden"}
    assert by_muon | by_adamw == {*names.values()} and not by_muon & by_adamw
    assert type(optimizer.adamw) is torch.optim.AdamW
    adamw_only = {group["role"]: settings_of(group) for group in param_groups(
        GPT(dataclasses.replace(model.config, optimizer="adamw")))}
    for group in param_groups(model):
        if group["role"] != "hidden":
            assert settings_of(group) == adamw_only[group["role"]]


def test_the_coefficients_are_those_of_the_paper():
    """Polar Express, arXiv 2505.16932: (a, b, c) of the first five polynomials for l = 1e-3, cushion 0.02."""
    x = torch.logspace(-3, 0, 200, dtype=torch.float64) / SAFETY
    for a, b, c in POLAR_EXPRESS:
        x = a * x + b * x**3 + c * x**5
    assert 0.7 < x.min() and x.max() < 1.2


def close_runs(first, second, noise=1e-4):
    assert column(first) == pytest.approx(column(second), abs=noise)
    assert first.val_loss == pytest.approx(second.val_loss, abs=noise)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=20 * noise)


@pytest.fixture(scope="module")
def at_once(corpus):
    return run(corpus | MUON)


def test_training_with_muon_learns_and_differs_from_adamw(corpus, at_once):
    result = run(corpus | MUON, steps=60, batch=8, embedding_lr_mult=8.0)
    assert result.val_loss < 3.2 < 5 < column(result)[0]
    assert column(at_once)[0] == column(run(corpus | MUON, optimizer="adamw"))[0]
    assert column(at_once)[2] != column(run(corpus | MUON, optimizer="adamw"))[2]


def test_a_compiled_bf16_run_ends_its_steps_as_torch_has_it(corpus, compiled_eagerly):
    settings = corpus | MUON | {"compile": "model", "precision": "bf16"}
    config = Config(**settings | {"vocab_size": 257})
    model = GPT(config)
    _, autocast = select_device(config)
    with fused_step(model, build_optimizer(model), config, autocast) as step:
        assert step is None
    close_runs(run(settings), run(settings, compile=False), 2e-2)


@pytest.mark.parametrize("shard", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_give_the_numbers_of_one(corpus, tmp_path, shard):
    settings = corpus | MUON | {"log_roles": True, "schedule": "constant", "warmup": 0.0}
    ranks = start_ranks(2, settings, out=tmp_path / "run", steps=4, shard=shard)
    one = run(settings, out=str(tmp_path / "one"))
    finish(ranks)
    found, expected = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("run", "one"))
    rows = found["past"][2]
    assert [row["train_loss"] for row in rows] == pytest.approx(column(one)[:4], abs=1e-5)
    for key in ("hidden/grad_norm", "hidden/update_over_weight"):
        assert [row[key] for row in rows] == pytest.approx(column(one, key)[:4], rel=1e-3)
    for name, its in expected["optimizer"].items():
        assert {key: value.shape for key, value in found["optimizer"][name].items()} == {
            key: value.shape for key, value in its.items()}
    continued = run(settings, out=str(tmp_path / "run"))  # by one process
    close_runs(continued, one)


def test_settings_of_the_groups_reach_the_step(corpus, at_once):
    for change in ({"momentum": 0.5}, {"lr": 2**-7}, {"weight_decay": 0.5}):
        assert column(run(corpus | MUON, **change))[3] != column(at_once)[3], change
    for group in build_optimizer(GPT(tiny(**MUON, momentum=0.8))).muon.param_groups:
        assert group["momentum"] == 0.8
