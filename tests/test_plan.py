"""The plan of a search: which proxy it trains for a target, what that costs, and what of it transfers."""

import math
import os
import re
from dataclasses import replace

import pytest
from conftest import snapshot, tiny, tokens

from configure import Config, UserError, configure
from model import GPT
from scaling import plan, search
from training.optimizer import build_optimizer


def options(**given):
    return search.OPTIONS | given


@pytest.fixture
def target(corpus, tmp_path):
    """The path of a target's configuration, twice as wide and deep as its base shape."""
    settings = corpus | {"steps": 12}
    lines = [f"{name} = {value!r}\n" for name, value in settings.items() if name != "sample_tokens"]
    (tmp_path / "target.py").write_text("".join(lines) + "optimizer = 'muon'\nhead_dim = 8\n")
    return str(tmp_path / "target.py")


@pytest.mark.parametrize("path", ["config/target.py", "config/gpt2.py"])
def test_the_proxy_is_the_target_but_for_width_and_depth(path):
    proxy, target = search.proxy_and_target(options(target=path), ["--batch=96"])
    assert target == configure([path, "--batch=96"])
    assert (proxy.width, proxy.depth) == (target.base_width, target.base_depth) == (128, 4)
    assert replace(proxy, width=target.width, depth=target.depth, eval_tokens=target.eval_tokens) == target


def test_a_proxy_may_have_another_shape_and_what_is_asked_for():
    given = options(target="config/gpt2.py", proxy="steps:300,batch:30,context:256", proxy_width=192,
                    proxy_depth=3)
    proxy, target = search.proxy_and_target(given, [])
    assert (proxy.width, proxy.depth, proxy.steps, proxy.batch, proxy.context) == (192, 3, 300, 30, 256)
    assert target.batch == 480 and proxy.micro_batch is None, "32 sequences a pass do not divide 30"


def test_the_proxy_of_a_target_with_few_key_heads_has_as_many_queries_for_each():
    target = Config(width=512, head_dim=64, kv_heads=2, base_width=256)
    assert [plan.resized(target, width, 4).kv_heads for width in (64, 128, 256, 384, 1024)] == [1, 1, 1, 1, 4]
    assert plan.make_proxy(target).kv_heads == 1


@pytest.mark.parametrize(("given", "words", "name"), [
    ({}, ["--head_dim=256"], "proxy_width"), ({"proxy_width": 100}, [], "proxy_width"),
    ({"proxy_depth": 99}, [], "target"), ({}, ["--init_from=gpt2"], "init_from"),
    ({"proxy": "lr:0.1"}, [], "proxy"), ({"proxy": "width:64"}, [], "proxy"),
    ({"proxy": "steps:x"}, [], "proxy"),
    ({"proxy": "steps:9"}, ["config/proxy.py"], "proxy"), ({}, ["config/target.py"], "target"),
    ({"target": "config/proxy.py"}, ["config/target.py"], "target"),
    ({"proxy_width": 64, "target": ""}, [], "proxy_width")])
def test_a_proxy_that_cannot_be_is_rejected_by_name(given, words, name, monkeypatch):
    monkeypatch.setattr("configure.settings_to_start_from", lambda source: {})
    with pytest.raises(UserError, match=f"^{name}\\b"):
        search.proxy_and_target(options(**{"target": "config/target.py"} | given), words)


def test_each_axis_is_named_with_what_is_known_of_it():
    proxy = Config(batch=8, context=256, steps=250, head_dim=32, seed=1, lr=1.0, eval_tokens=9)
    target = replace(Config(), width=256, batch=32, context=1024, steps=1000)
    names, *lines = plan.describe_transfer(proxy, target)
    assert "in width, steps, context, head_dim, batch:" in names
    known = {line.split()[0]: line for line in lines}
    assert "+0.60 here" in known["batch"] and "base_batch" in known["batch"], "two doublings of +0.30"
    assert "-0.22 here" in known["steps"] and "+0.24 here" in known["context"]
    assert "0.2 nats" in known["context"] and "0.2 nats" not in known["batch"]
    assert "not known to transfer" in known["head_dim"] and ": transfers" in known["width"]
    control = replace(target, parametrization="sp")
    assert "does not transfer" in plan.what_is_known("width", proxy, control)
    assert plan.describe_transfer(proxy, proxy) == ["the proxy is the target: nothing has to transfer"]


@pytest.mark.parametrize("settings", [{}, {"optimizer": "muon", "bias": True, "mlp": "gelu", "kv_heads": 1}])
def test_the_memory_of_a_target_is_what_its_tensors_take(corpus, settings):
    config = tiny(**settings, vocab_size=300, data_dir=corpus["data_dir"], dataset=corpus["dataset"],
                  tokenizer="bytes", device="cpu")
    model = GPT(config)
    optimizer = build_optimizer(model)
    model(*tokens(config)).backward()
    optimizer.step()
    tensors = [tensor for of_parameter in optimizer.state.values() for tensor in of_parameter.values()]
    state = [tensor for tensor in tensors if tensor.numel() > 1]
    parts = plan.memory_parts(config)
    assert parts["weights"] == parts["gradients"] == sum(p.nbytes for p in model.parameters())
    assert parts["optimizer"] == sum(tensor.nbytes for tensor in state)


def test_a_plan_times_each_size_and_leaves_no_folder(target, tmp_path, monkeypatch, capsys):
    timed, seconds_of = [], plan.seconds_of
    monkeypatch.setattr(plan, "seconds_of", lambda config: timed.append(config) or seconds_of(config))
    monkeypatch.setattr(search, "run_search", None)
    assert search.main([f"--target={target}", "--plan", f"--out={tmp_path}/out", "--width=64"]) == 0
    output = capsys.readouterr().out
    assert not os.path.exists(tmp_path / "out") and os.listdir(tmp_path) == ["target.py"]
    assert [config.width for config in timed] == [16, 16 // 2, 32], "the target's would take long"
    [count] = re.findall("width 16.*: at most ([0-9]+) trainings, .* times the target's", output)
    [parts] = re.findall(f"{count} = (.* draws .*)", output)
    assert sum(int(part.split()[0]) for part in parts.split(" + ")) == int(count)
    for said in ("width 64, depth 2", "width 16, depth 1", "verify", "% of the target's", "seconds",
                 "at most 2 trainings for the forecast, ",
                 "memory of the target", "from the target in width, depth:"):
        assert said in output


def test_a_plan_for_the_folder_of_another_search_says_which_and_a_search_there_ends_first(
        target, tmp_path, monkeypatch, capsys, unrendered):
    given = options(target=target, trials=1, seeds=1, out=str(tmp_path / "out"), sampler="tpe", verify=False)
    proxy, _ = search.proxy_and_target(given, ["--steps=1"])
    search.run_search(proxy, search.parse_space("lr", proxy), given)
    before = snapshot(tmp_path)
    monkeypatch.setattr(search, "run_search", None)
    monkeypatch.setattr(plan, "seconds_of", lambda config: (1.0, math.nan))
    capsys.readouterr()
    others = {"space: ": ["--steps=1"], "steps: 1, here 2; lr: ": ["--lr=0.25", "--steps=2"]}
    for difference, other in others.items():
        words = [f"--target={target}", f"--out={tmp_path}/out", *other]
        said = f"{tmp_path}/out holds another search, for {target} ({difference}"
        assert search.main([*words, "--plan"]) == 0
        first, *_, last = capsys.readouterr().out.splitlines()
        assert first.startswith("target ") and last.startswith(said) and "--out" in last
        with pytest.raises(UserError, match=f"^out: {re.escape(said)}.*--out"):
            search.main(words)
        assert capsys.readouterr().out == "", "it ends before it prints a plan"
    assert search.main([*words, "--plan", "--study=mine"]) == 0 and "holds" not in capsys.readouterr().out
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("changed", [["--steps=0"], ["--steps=3", "--proxy=steps:0"]])
def test_a_search_of_no_steps_is_rejected(target, tmp_path, changed):
    with pytest.raises(UserError, match="^steps must be 1 or more"):
        search.main([f"--target={target}", f"--out={tmp_path}/out", *changed])
    assert not os.path.exists(tmp_path / "out")


def test_the_plan_counts_at_least_the_trainings_that_a_search_makes(target, tmp_path, unrendered):
    given = options(target=target, trials=5, seeds=2, sampler="tpe", out=str(tmp_path / "out"))
    proxy, large = search.proxy_and_target(given, ["--width=64", "--steps=2"])
    space = search.parse_space("", proxy)
    sizes = search.planned_sizes(proxy, large, space, given)
    found, *_ = search.run_search(proxy, space, given, large)
    draws, others = found.rows()
    for size in sizes:
        trained = [row for row in draws + others if row["width"] == size.config.width]
        assert size.trainings / 2 < len(trained) <= size.trainings, size.name
    assert math.isfinite(found.best[0])
