"""What builds on the trainer: many models at once, and speed measured."""

import dataclasses

import pytest
import torch

from configure import Config, UserError
from scaling.bench import bench
from scaling.stack import train_stacked
from train import train

MIXED = [{"lr": 2**-6, "seed": 0},
         {"lr": 2**-8, "seed": 1, "logit_mult": 2.0, "zero_query": True, "beta1": 0.8},
         {"lr": 2**-7, "seed": 2, "parametrization": "sp", "weight_decay": 0.5, "grad_clip": 0.1, "eps": 1e-3,
          "warmup": 0.5, "schedule": "linear", "attention_mult": 3.0, "norm_lr_mult": 4.0}]


def losses(result):
    return [row["train_loss"] for row in result.history if "train_loss" in row]


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs CUDA"))])
@pytest.mark.parametrize("seeds", [None, 3], ids=["own texts", "one text"])
def test_stacked_models_are_those_trained_alone(corpus, seeds, where):
    shared = corpus | {"steps": 20, "position": "rotary", "bias": True, "device": where}
    configs = [Config(**shared | settings | ({"seed": seeds} if seeds else {})) for settings in MIXED]
    noise = 1e-4 if where == "cpu" else 2e-2
    for config, together in zip(configs, train_stacked(configs), strict=True):
        alone = train(config, quiet=True)
        assert losses(together) == pytest.approx(losses(alone), abs=noise)
        assert together.val_loss == pytest.approx(alone.val_loss, abs=noise)
        for a, b in zip(together.model.parameters(), alone.model.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-3 if where == "cpu" else 0.1)


@pytest.mark.parametrize("change", [{"width": 64}, {"steps": 3}, {"dropout": 0.1}, {"micro_batch": 2}])
def test_what_cannot_be_stacked_is_refused(corpus, change):
    both = [Config(**corpus), dataclasses.replace(Config(**corpus), **change)]
    with pytest.raises(UserError, match="^stack: got"):
        train_stacked(both[::-1])


def test_a_stacked_model_that_diverges_leaves_the_others_alone(corpus):
    config = Config(**corpus)
    bad = dataclasses.replace(config, readout_std=1e38)
    first, second = train_stacked([config, bad])
    assert losses(first) == pytest.approx(losses(train(config, quiet=True)), abs=1e-4)
    assert second.diverged and not first.diverged


def test_the_benchmark_measures_a_run(corpus, monkeypatch):
    monkeypatch.setattr("scaling.bench.SECONDS", 0.1)
    numbers = bench(Config(**corpus, micro_batch=2))
    low, speed, high = (float(numbers[name].replace(",", "")) for name in ("from", "tokens/s", "to"))
    assert 0 < low <= speed <= high and numbers["MFU"] == numbers["GiB"] == "-"
    assert float(numbers["ms/step"]) == pytest.approx(1000 * 64 / speed, rel=0.01)
