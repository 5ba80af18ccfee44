"""The benchmark of a configuration: what it prints is what the training runs measured."""

import math

import pytest
from conftest import run

import train
from configure import Config, UserError
from scaling import bench


def test_the_benchmark_measures_a_run(corpus, monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", 0.1)
    monkeypatch.setattr(train, "READ_SECONDS", math.inf)  # a busy machine would add a window of one step
    numbers = bench.bench(Config(**corpus, micro_batch=2))
    low, speed, high = (float(numbers[name].replace(",", "")) for name in ("from", "tokens/s", "to"))
    assert 0 < low <= speed <= high and numbers["MFU"] == numbers["GiB"] == "-"
    assert float(numbers["ms/step"]) == pytest.approx(1000 * 64 / speed, rel=0.01)
    assert float(numbers["first step, s"]) >= 0


def test_the_benchmark_prints_a_number_under_each_name(monkeypatch, capsys):
    numbers = {"tokens/s": "9,716", "MFU": "-", "first step, s": "1.0"}
    monkeypatch.setattr(bench, "bench", lambda config: numbers)
    bench.main(["--width=64"])
    names, values = capsys.readouterr().out.splitlines()
    assert [names[i:i + 15].strip() for i in (0, 15, 30)] == [*numbers]
    assert [values[i:i + 15].strip() for i in (0, 15, 30)] == [*numbers.values()]


def test_the_cost_of_a_loss_is_what_a_run_spent_until_then(corpus):
    config = Config(**corpus | {"steps": 6, "eval_every": 2, "lr": 2**-6})
    history = train.train(config, quiet=True).history
    by_step = {row["step"]: row for row in history if "val_loss" in row}
    assert by_step[4]["val_loss"] < by_step[2]["val_loss"]
    numbers = bench.cost_of_loss(config, (by_step[2]["val_loss"] + by_step[4]["val_loss"]) / 2)
    assert numbers["step"] == "4" and numbers["tokens"] == f"{by_step[4]['tokens']:,}"
    assert numbers["loss"] == f"{by_step[4]['val_loss']:.4f}" and 0 < float(numbers["seconds"]) < 60
    tokens, flops = by_step[4]["tokens"], float(numbers["FLOPs"])
    assert flops == pytest.approx(tokens * train.train(config, quiet=True).model.flops_per_token(), rel=0.01)


def test_a_loss_that_is_not_reached_is_one_line_with_the_lowest(corpus):
    with pytest.raises(UserError, match=r"^loss: .* lowest was \d\.\d+"):
        bench.cost_of_loss(Config(**corpus | {"steps": 2}), 0.1)
    with pytest.raises(UserError, match="^loss must be"):
        bench.main(["--loss=low"])


def test_sampling_is_measured_in_tokens_of_all_texts(corpus, tmp_path, monkeypatch, capsys):
    run(corpus, out=str(tmp_path / "run"), steps=1)
    monkeypatch.setattr(bench, "time_in_turn", lambda functions, device: [[f() for f in functions], 0.5][1:])
    bench.main([f"--sample={tmp_path}/run", "--samples=3", "--sample_tokens=5", "--device=cpu"])
    assert capsys.readouterr().out.split() == ["this,", "fp32", "30", "tokens/s"]


@pytest.mark.parametrize("words", [["--steps=5"], ["--out=x"], ["--loss=3", "--top_k=5"],
                                   ["--sample=out/run", "--width=64"]])
def test_a_setting_that_a_benchmark_does_not_use_is_rejected(words):
    with pytest.raises(UserError, match="has no effect on"):
        bench.main(words)
