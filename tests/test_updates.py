"""The fused end of a step: the numbers of torch's clipping and AdamW, and only where it can give them."""

import pytest
import torch
from conftest import column, cuda, run

import train
from configure import Config
from data import Data, prepare, updates
from model import GPT
from scaling.coordinate_check import sizes

FUSED = {"compile": "model", "precision": "bf16", "steps": 8}


def check_equal(first, second, noise):
    assert column(first, "train_loss") == pytest.approx(column(second, "train_loss"), rel=noise)
    assert column(first, "grad_norm") == pytest.approx(column(second, "grad_norm"), rel=10 * noise)
    assert first.val_loss == pytest.approx(second.val_loss, rel=noise)


SEVERAL = [{}, {"tied": True, "bias": True, "position": "rotary", "weight_decay": 3.0, "grad_clip": 0.1,
                "beta2": 0.99, "width": 64, "base_width": 32, "base_depth": 1, "attention_mult": 0.3,
                "base_batch": 2}]


@pytest.mark.parametrize("settings", SEVERAL, ids=["plain", "hard"])
def test_fused_updates_are_those_of_torch(corpus, compiled, monkeypatch, settings):
    fused = run(corpus | FUSED, **settings)
    monkeypatch.setattr(updates, "Fused", updates.Plain)
    check_equal(fused, run(corpus | FUSED, **settings), 1e-4)


@cuda
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("settings", SEVERAL, ids=["plain", "hard"])
def test_fused_updates_are_those_of_torch_on_cuda(corpus, monkeypatch, settings, graph):
    fused = run(corpus | FUSED, device="cuda", graph=graph, **settings)
    monkeypatch.setattr(updates, "Fused", updates.Plain)
    check_equal(fused, run(corpus | FUSED, device="cuda", graph=graph, **settings), 1e-2)


def test_a_run_with_fused_updates_goes_on_from_its_checkpoint(corpus, compiled, tmp_path):
    settings = corpus | FUSED | {"schedule": "constant", "warmup": 0.0}
    run(settings, steps=4, out=str(tmp_path / "run"))
    check_equal(run(settings, out=str(tmp_path / "run")), run(settings), 1e-6)


def test_another_trial_with_fused_updates_compiles_nothing(corpus, compiled):
    run(corpus | FUSED)
    made = len(compiled)
    run(corpus | FUSED, lr=2**-8, embedding_lr_mult=3.0, weight_decay=0.5, beta1=0.8, eps=1e-6, grad_clip=0.2,
        attention_mult=0.5, parametrization="sp", seed=3)
    assert made > 3 and len(compiled) == made


def test_the_model_is_left_without_copies_that_another_optimizer_would_not_renew(corpus, compiled):
    model = run(corpus | FUSED).model
    assert all(layer.scaled is None for layer in model.modules() if hasattr(layer, "scaled"))


def test_a_coordinate_check_reads_the_weights_and_no_copies(corpus):
    found = []
    for compile in ("model", False):
        config = Config(**corpus | FUSED | {"compile": compile})
        found.append(sizes(config, Data(prepare(config)), 2))
    assert found[0] == found[1]


def chosen(corpus, optimizer=torch.optim.AdamW, changes=None, group=None, **options):
    config = Config(**corpus | FUSED | {"vocab_size": 257} | (changes or {}))
    model = GPT(config)
    optimizer = optimizer(model.param_groups(), **options)
    optimizer.param_groups[0].update(group or {})
    return type(updates.pick(model, optimizer, config, train.pick_device(config)[1]))


def test_gradients_that_would_add_up_in_bf16_and_other_optimizers_keep_torchs_update(corpus):
    assert chosen(corpus) is updates.Fused
    for changes in ({"micro_batch": 1}, {"precision": "fp32"}, {"compile": "blocks"}, {"compile": False}):
        assert chosen(corpus, changes=changes) is updates.Plain, changes
    for options in ({"optimizer": torch.optim.NAdam}, {"group": {"betas": (0.9, 0.99)}}, {"amsgrad": True},
                    {"maximize": True}):
        assert chosen(corpus, **options) is updates.Plain, options
