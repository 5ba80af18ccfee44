"""The fused end of a step: the numbers of torch's clipping and AdamW, and only where it can give them."""

import functools

import pytest
import torch
from conftest import GPT2_BLOCK, column, cuda, run

from configure import Config, UserError
from model import GPT
from parametrization import param_groups
from training import fused_step
from training.device import select_device
from training.optimizer import build_optimizer, clip_gradients

FUSED = {"compile": "model", "precision": "bf16", "steps": 4}  # of more the weights are rounded apart
HARD = {"tied": True, "bias": True, **GPT2_BLOCK, "position": "rotary", "weight_decay": 3.0, "grad_clip": 0.1,
        "beta2": 0.99, "width": 64, "base_width": 32, "base_depth": 1, "attention_mult": 0.3, "base_batch": 2}


@pytest.fixture(scope="module")
def fused_run(corpus):
    """The Result of a run with fused updates that logs its roles, compiled to no machine code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        return run(corpus | FUSED, log_roles=True)


def check_equal(first, second, noise):
    assert column(first, "train_loss") == pytest.approx(column(second, "train_loss"), rel=noise)
    assert column(first, "grad_norm") == pytest.approx(column(second, "grad_norm"), rel=10 * noise)
    assert first.val_loss == pytest.approx(second.val_loss, rel=noise)


def role_columns(result):
    return {name: column(result, name) for name in result.history[-1] if "/" in name}


def check_roles_equal(first, second, noise):
    """Whether two runs with log_roles agree in what they log of each role."""
    first, second = role_columns(first), role_columns(second)
    assert first.keys() == second.keys() and len(first) >= 3 * 4
    for name in first:
        assert first[name] == pytest.approx(second[name], rel=noise), name


@pytest.mark.parametrize(("settings", "noise"), [
    (HARD | {"steps": 2}, 2e-3),
    ({}, 1e-4)], ids=["hard", "plain"])  # the code of the second serves the tests below
def test_fused_updates_are_those_of_torch(corpus, compiled_eagerly, settings, noise):
    settings = corpus | FUSED | settings | {"log_roles": True}
    fused, plain = run(settings), run(settings, compile=False)
    check_equal(fused, plain, 1e-4)
    check_roles_equal(fused, plain, noise)


@cuda
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("settings", [{}, HARD], ids=["plain", "hard"])
def test_fused_updates_are_those_of_torch_on_cuda(corpus, monkeypatch, settings, graph):
    settings = corpus | FUSED | settings | {"device": "cuda", "graph": graph, "log_roles": True}
    fused = run(settings)
    monkeypatch.setattr(fused_step, "can_fuse", lambda *arguments: False)
    plain = run(settings)
    check_equal(fused, plain, 1e-2)
    check_roles_equal(fused, plain, 1e-1)


def test_a_run_with_fused_updates_resumes_from_its_checkpoint(corpus, compiled_eagerly, tmp_path):
    settings = corpus | FUSED | {"schedule": "constant", "warmup": 0.0}
    run(settings, steps=2, out=str(tmp_path / "run"))
    check_equal(run(settings, out=str(tmp_path / "run")), run(settings), 1e-6)


def test_logging_the_roles_leaves_fused_training_alone(corpus, compiled_eagerly, fused_run):
    on, off = fused_run, run(corpus | FUSED)
    assert column(on) == column(off) and len(role_columns(on)) == 3 * 5 and not role_columns(off)
    assert all(map(torch.equal, on.model.state_dict().values(), off.model.state_dict().values()))


def test_another_trial_with_fused_updates_compiles_nothing(corpus, compiled):
    run(corpus | FUSED)
    count = len(compiled)
    run(corpus | FUSED, lr=2**-8, embedding_lr_mult=3.0, weight_decay=0.5, beta1=0.8, eps=1e-6, grad_clip=0.2,
        attention_mult=0.5, parametrization="sp", seed=3)
    assert count > 3 and len(compiled) == count


def test_the_model_is_left_without_copies_that_another_optimizer_would_not_update(fused_run):
    assert not any("forward" in layer.__dict__ for layer in fused_run.model.blocks.modules())


def is_fused(corpus, optimizer_class=torch.optim.AdamW, changes=None, group=None, **options):
    """Whether steps with these settings and this optimizer are fused."""
    config = Config(**corpus | FUSED | {"vocab_size": 257} | (changes or {}))
    model = GPT(config)
    optimizer = optimizer_class(param_groups(model), **options)
    optimizer.param_groups[0].update(group or {})
    _, autocast = select_device(config)
    with fused_step.fused_step(model, optimizer, config, autocast) as step:
        return step is not None


def test_gradients_that_would_add_up_in_bf16_and_other_optimizers_keep_torchs_update(corpus):
    assert is_fused(corpus) and is_fused(corpus, changes=GPT2_BLOCK)
    for changes in ({"micro_batch": 1}, {"precision": "fp32"}, {"compile": "blocks"}, {"compile": False}):
        assert not is_fused(corpus, changes=changes), changes
    for options in ({"optimizer_class": torch.optim.NAdam}, {"group": {"betas": (0.9, 0.99)}},
                    {"amsgrad": True}, {"maximize": True}):
        assert not is_fused(corpus, **options), options


@pytest.mark.parametrize("fused", [True, False])
def test_a_parameter_that_the_loss_does_not_depend_on_is_named(corpus, compiled_eagerly, fused):
    config = Config(**corpus | FUSED, vocab_size=257)
    model = GPT(config)
    model.blocks[1].forward = lambda x_BTC, *rest: x_BTC
    batch, autocast = torch.zeros(2, 1, 2, 16, dtype=torch.long), torch.autocast("cpu", torch.bfloat16)
    with pytest.raises(UserError, match=r"^blocks\.1\.attention_norm\.weight got no gradient, .* \(8 such"):
        if fused:
            fused_step.FusedStep(model, build_optimizer(model), config, autocast)(batch)
        model(*batch.flatten(1, 2)).backward()
        clip_gradients(model, 1.0)
