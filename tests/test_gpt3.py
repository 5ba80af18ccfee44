"""GPT-3's recipe: a batch that ramps up, schedules in tokens, windows of attention, and its eight sizes."""

import dataclasses
import math
import os
import warnings
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from conftest import ROOT, column, cuda, run, tiny

import training.compile
from configure import Config, UserError, configure
from data.loader import TokenDataset, prefetch_batches
from data.prepare import prepare
from model import GPT, attention_flops
from scaling import lr_table
from scaling.bench import bench
from scaling.coordinate_check import short_run
from scaling.stack import check_stackable
from scaling.sweep import trial_configs
from scaling.trials import identity, trial_row
from training.compile import CudaGraphed, band_mask
from training.device import check_memory, least_memory
from training.model_size import model_size
from training.schedule import lr_factor

# From 4 to 16 sequences of 10 tokens over 1,000 tokens. It rises by 4 where a third and two thirds of them
# are done, at the first step that finds them done: after 9 steps of 40 (360 tokens), 4 of 80 (680), 3 of 120
RAMP = {"batch": 16, "batch_start": 4, "batch_ramp_tokens": 1000, "context": 10}
BATCHES = [4] * 9 + [8] * 4 + [12] * 3 + [16] * 4
DONE = [0, 40, 80, 120, 160, 200, 240, 280, 320, 360, 440, 520, 600, 680, 800, 920, 1040, 1200, 1360, 1520,
        1680]

# The same for a run of the tests' corpus; with what else the recipe has
TINY_RAMP = {"batch": 16, "batch_start": 4, "batch_ramp_tokens": 1500, "steps": 16}
RECIPE = TINY_RAMP | {"window": 5, "warmup_tokens": 300, "decay_tokens": 2000}


# The batch


def test_a_batch_ramps_up_as_computed_by_hand():
    config = Config(**RAMP)
    assert [config.stage(step).batch for step in range(20)] == BATCHES
    assert [config.tokens_before(step) for step in range(21)] == DONE


@pytest.mark.parametrize(("batch", "start", "ramp", "context"), [
    (16, 4, 1000, 10), (24, 1, 3000, 7), (1600, 16, 10**6, 16), (6, 3, 1, 5), (8, 1, 8, 1), (50, 2, 777, 3)])
def test_each_step_has_the_linear_batch_of_the_tokens_before_it_in_multiples_of_the_start(batch, start, ramp,
                                                                                         context):
    config = Config(batch=batch, batch_start=start, batch_ramp_tokens=ramp, context=context)
    done = 0
    for step in range(300):
        linear = start + (batch - start) * min(1, done / ramp)
        assert config.tokens_before(step) == done and config.steps_for(done) == step
        found = config.stage(step).batch
        assert found <= linear + 1e-9 and linear - found < start and found % start == 0
        done += found * context


@pytest.fixture(scope="module")
def dataset(corpus):
    return TokenDataset(prepare(Config(**corpus)))


def sequences(dataset, config, start=0, world_size=1):
    """The tokens of each step from `start` on, of all processes in order: a list of (sequences, T)."""
    ranks = []
    for rank in range(world_size):
        chunks = prefetch_batches(dataset, config, start, rank, world_size)
        ranks.append([batch for chunk in chunks for batch in chunk])
    return [torch.cat([batch[0].flatten(0, 1) for batch in batches]) for batches in zip(*ranks, strict=True)]


def test_an_epoch_under_a_ramp_has_every_window_once(dataset, monkeypatch):
    monkeypatch.setattr("data.loader.PREFETCH_TOKENS", 500)  # chunks end within a stage, and at its end
    numbered = TokenDataset(dataset.folder)
    numbered.train, numbered.vocab_size = np.arange(1000), 1000  # a token is its own place
    config = Config(**RAMP, steps=20)
    steps = sequences(numbered, config)
    assert [len(step) for step in steps] == BATCHES
    starts, windows = torch.cat(steps)[:, 0], 98  # as one fewer than fit is an epoch, so 1.7 epochs
    assert (starts[:windows].sort().values.diff() == 10).all()
    second = starts[windows:].tolist()
    assert len(second) == len(set(second)) == 70


@pytest.mark.parametrize(("world_size", "micro_batch", "start"), [
    (1, None, 0), (2, 1, 11), (4, None, 3), (2, 2, 0)])
def test_any_number_of_processes_reads_the_stream_of_a_ramp_from_any_step(dataset, monkeypatch, world_size,
                                                                         micro_batch, start):
    monkeypatch.setattr("data.loader.PREFETCH_TOKENS", 300)
    config = Config(**RAMP, steps=20, micro_batch=micro_batch)
    stream = dataset.batch(0, 0, sum(BATCHES), 10)[0]
    ends = [0, *accumulate(BATCHES)]
    expected = [stream[a:b] for a, b in pairwise(ends)][start:]
    found = sequences(dataset, config, start, world_size)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    shapes = {chunk.shape[3:] for chunk in prefetch_batches(dataset, config, 0, 0, world_size)}
    assert shapes == {(micro_batch or 4 // world_size, 10)}, "the passes become more, and not larger"


def test_metrics_count_the_tokens_that_were_seen(corpus, capsys):
    result = run(corpus, **RECIPE, eval_every=4)
    config = Config(**corpus | RECIPE)
    assert column(result, "tokens") == [config.tokens_before(row["step"]) for row in result.history]
    assert column(result, "tokens")[-1] < 16 * 16 * 16, "all at the full batch"
    assert all(row["tokens_per_second"] > 0 for row in result.history[1:])
    row = trial_row(config, identity(config), result, seconds=1.0)
    assert row["flops"] == result.model.flops_per_token() * config.tokens_before(16)


def test_what_is_printed_knows_the_ramp_and_which_lengths_the_run_does_not_reach(corpus, capsys):
    import train
    train.train(Config(**corpus | RECIPE | {"steps": 9, "sample_tokens": 0}))
    output = capsys.readouterr().out
    assert ("9 steps of 64 to 128 tokens (they end at 640 tokens, before batch_ramp_tokens=1,500, "
            "decay_tokens=2,000)") in output


def test_a_sweep_that_holds_tokens_holds_them_under_a_ramp():
    config = Config(**RAMP, steps=20)
    trials = trial_configs(config, {"batch": [8, 16], "context": [10, 20]}, "tokens")
    # 8 x 10: 1,000 tokens after 25 steps, and 8.5 of 80. 8 x 20: 1,040 after 13, and 4 of 160. 16 x 20: 400
    # after 5 of 80, 720 after 2 of 160, 1,200 after 2 of 240, and 1.5 of 320
    assert [trial.steps for trial in trials] == [33, 17, 20, 11]


# The schedule


def factors(steps=20, **settings):
    """lr_factor of each step of RAMP, in tokens or not."""
    config = Config(**RAMP, steps=steps, **settings)
    return [lr_factor(config, step) for step in range(steps)]


# 40 to 200 tokens of 200; then 0.9 of the way is lost over 840 tokens; at 1,040 it is done
LINEAR = [done / 200 for done in DONE[1:6]] + [1 - 0.9 * (done - 200) / 840 for done in DONE[6:17]]
LINEAR += [0.1] * 4
COSINE = LINEAR[:5] + [0.1 + 0.45 * (1 + math.cos(math.pi * (1 - f) / 0.9)) for f in LINEAR[5:]]
WSD = [1 if done <= 600 else max(0, (1000 - done) / 400) for done in DONE[1:]]
TOKENS = {"warmup_tokens": 200, "decay_tokens": 1040}
BY_HAND = {
    "linear": (TOKENS | {"schedule": "linear", "final_lr": 0.1}, LINEAR),
    "cosine": (TOKENS | {"schedule": "cosine", "final_lr": 0.1}, COSINE),
    "wsd": ({"schedule": "wsd", "warmup": 0.0, "decay_tokens": 1000, "decay_fraction": 0.4, "final_lr": 0.0},
            WSD),
    "warmup that ends within a step": ({"warmup_tokens": 100, "schedule": "constant"}, [0.4, 0.8] + [1] * 18),
    "warmup of less than a step": ({"warmup_tokens": 1, "schedule": "constant"}, [1] * 20),
    "warmup longer than the run": ({"warmup_tokens": 16800}, [done / 16800 for done in DONE[1:]])}


@pytest.mark.parametrize("case", BY_HAND)
def test_a_schedule_in_tokens_is_the_one_computed_by_hand(case):
    settings, expected = BY_HAND[case]
    assert factors(**settings) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "step"])
def test_more_steps_change_nothing_before_where_the_schedule_counts_tokens(schedule):
    settings = {"schedule": schedule, "warmup_tokens": 150, "decay_tokens": 900}
    assert factors(40, **settings)[:20] == factors(20, **settings)
    assert factors(40, **settings)[20:] == pytest.approx([0.1] * 20)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "step", "inverse_sqrt", "constant"])
@pytest.mark.parametrize("settings", [{}, {"warmup_tokens": 130}, {"warmup": 0.7}])
def test_under_a_ramp_a_schedule_rises_to_the_peak_and_then_never_again(schedule, settings):
    found = factors(schedule=schedule, **settings)
    peak = found.index(1.0)
    assert found[:peak] == sorted(found[:peak]) and found[peak:] == sorted(found[peak:], reverse=True)
    assert 0 < min(found) and max(found) == 1.0
    if schedule in ("cosine", "linear", "wsd"):
        assert found[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("warmup", [0.5, 0.9])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "step"])
def test_a_warmup_in_steps_beyond_the_end_of_the_decay_is_followed_by_final_lr(schedule, warmup):
    found = factors(schedule=schedule, warmup=warmup, decay_tokens=500)
    assert found[-1] == pytest.approx(0.1) and max(found) == 1


# The window


def sees(model, x_BTC, block):
    """(T, S) bool: whether the output of this block at each position depends on each input."""
    rotary = model.rotary_cos[:x_BTC.size(1)], model.rotary_sin[:x_BTC.size(1)]
    mask_TS = model.attention_masks(x_BTC.size(1), "cpu")[block % 2]

    def outputs_TC(x_TC):
        return model.blocks[block](x_TC[None], rotary, mask_TS=mask_TS)[0].sum(-1)

    return torch.autograd.functional.jacobian(outputs_TC, x_BTC[0]).abs().amax(-1) > 0


@pytest.mark.parametrize("window", [1, 5])
def test_every_other_block_sees_the_latest_tokens_only(window):
    model, T = GPT(tiny(depth=4, window=window, embedding_std=1.0)), 12
    x_BTC = torch.randn(1, T, 32, generator=torch.Generator().manual_seed(0))
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    banded = torch.tensor([[0 <= t - s < window for s in range(T)] for t in range(T)])
    for block, expected in enumerate([causal, banded, causal, banded]):
        assert torch.equal(sees(model, x_BTC, block), expected), block


@pytest.mark.parametrize("window", [1, 5, 15])
def test_the_mask_that_flex_attention_gets_is_the_band(window):
    model = GPT(tiny(window=window))
    x_BTC = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    rotary = model.rotary_cos, model.rotary_sin
    model.requires_grad_(False)
    attention, masks = model.blocks[1].attention, model.attention_masks(16, "cpu")
    plain = model.blocks[1](x_BTC, rotary, mask_TS=masks[1])
    attention.attend = training.compile.attend_by_flex(band_mask(window, 16, "cpu"), 16, attention.attend)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        flex = model.blocks[1](x_BTC, rotary)
    del attention.attend
    assert (plain - flex).abs().max() < 1e-5 < (plain - model.blocks[1](x_BTC, rotary)).abs().max()


def test_two_compiled_codes_serve_the_dense_and_the_banded_blocks(corpus, compiled):
    settings = corpus | {"steps": 2, "window": 5, "depth": 4}
    plain = run(settings)
    assert column(run(settings, compile="blocks")) == pytest.approx(column(plain), abs=1e-5)
    assert len(compiled) == 3, "two blocks, read_out; on a CPU, embed is not"
    run(settings, compile="blocks", depth=5, lr=2**-8)
    assert len(compiled) == 3


def test_flex_attention_is_used_in_compiled_training_on_cuda_and_nowhere_else(monkeypatch):
    settings = {"window": 5, "head_dim": 16, "width": 32, "context": 16}
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert training.compile.can_use_flex(Config(**settings), gpu)
    others = [(cpu, {}), (gpu, {"window": None}), (gpu, {"dropout": 0.1}), (gpu, {"head_dim": 8})]
    for device, change in others:
        assert not training.compile.can_use_flex(Config(**settings | change), device)
    monkeypatch.setattr(training.compile, "flex_attention", lambda *inputs, **options: "flex")
    attend = training.compile.attend_by_flex("mask", 16, lambda *inputs, **options: "plain")
    q_BHTD = torch.zeros(1, 2, 16, 4)
    assert attend(q_BHTD, q_BHTD, q_BHTD) == "flex"
    assert attend(*[q_BHTD[:, :, :8]] * 3) == "plain", "fewer tokens than the mask is for"
    with torch.no_grad():
        assert attend(q_BHTD, q_BHTD, q_BHTD) == "plain"


@pytest.mark.parametrize(("settings", "blocks"), [  # context 64: a dense block counts 64, a band 2w - w^2/64
    ({"depth": 1}, 64), ({"depth": 2, "window": 16}, 64 + 28), ({"depth": 5, "window": 16}, 3 * 64 + 2 * 28),
    ({"depth": 4, "window": 63}, 4 * 64 - 1), ({"depth": 2, "window": 1}, 64 + 1)])
def test_the_flops_of_a_window_are_those_of_its_band(settings, blocks):
    config = tiny(context=64, **settings)
    assert attention_flops(config) == 12 * 32 * blocks
    model, size = GPT(config), model_size(config)
    dense = GPT(dataclasses.replace(config, window=None))
    assert dense.flops_per_token() - model.flops_per_token() == 12 * 32 * (64 * config.depth - blocks)
    assert size.flops_per_token == model.flops_per_token()
    assert size.parameters == sum(p.numel() for p in model.parameters())


def test_the_least_memory_of_a_run_knows_the_passes_of_a_ramp_and_the_mask_of_a_window(monkeypatch):
    config, autocast = Config(batch=4080, vocab_size=5000), torch.autocast("cpu", enabled=False)
    ramp = dataclasses.replace(config, batch_start=60, batch_ramp_tokens=10**6)
    by_hand = dataclasses.replace(config, micro_batch=60)
    least = [least_memory(c, model_size(c), autocast, c.micro_batch) for c in (config, ramp, by_hand)]
    assert least[1] == least[2] < least[0] / 10
    window = dataclasses.replace(ramp, window=8)
    assert least_memory(window, model_size(window), autocast, None) - least[1] == 256 * 256
    monkeypatch.setattr("training.device.total_memory", lambda device: least[1] * 0.92)
    with pytest.raises(UserError, match="^micro_batch: 60 sequences .* --micro_batch=30$"):
        check_memory(ramp, torch.device("cpu"), autocast)


# What would do nothing, or cannot be done, is rejected


@pytest.mark.parametrize(("name", "settings"), [
    ("batch_start", {"batch_start": 8}), ("batch_start", {"batch_ramp_tokens": 9}),
    ("batch_start", {"batch_ramp_tokens": 9, "batch_start": 32}),
    ("batch", {"batch_ramp_tokens": 9, "batch_start": 5}),
    ("batch_start", {"batch_ramp_tokens": 9, "batch_start": 4, "micro_batch": 8}),
    ("window", {"window": 256}), ("window", {"window": 8, "depth": 1}), ("window", {"window": 0}),
    ("decay_tokens", {"decay_tokens": 5, "schedule": "constant"}),
    ("decay_tokens", {"decay_tokens": 5, "schedule": "inverse_sqrt"}),
    ("decay_tokens", {"decay_tokens": 5, "warmup_tokens": 5})])
def test_a_setting_that_would_do_nothing_is_rejected(name, settings):
    with pytest.raises(UserError, match=rf"^{name}\b"):
        Config(**settings)


def test_a_stack_rejects_a_ramp_and_takes_schedules_in_tokens():
    with pytest.raises(UserError, match="batch_ramp_tokens"):
        check_stackable([Config(batch_start=4, batch_ramp_tokens=100)])
    check_stackable([Config(warmup_tokens=5), Config(decay_tokens=10)])


def test_the_coordinate_check_takes_a_configuration_of_the_recipe():
    config = short_run(Config(**RAMP | RECIPE), steps=5)
    assert config.window is None and lr_factor(config, 0) == 1 and config.tokens_before(5) == 5 * 2 * 10


def test_the_benchmark_measures_the_full_batch_in_the_passes_of_the_ramp(corpus, monkeypatch):
    seen = []
    monkeypatch.setattr("scaling.bench.train", lambda config, quiet: seen.append(config) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench(Config(**corpus | RECIPE))
    assert (seen[0].batch, seen[0].micro_batch, seen[0].batch_ramp_tokens) == (16, 4, None)


# The sizes

TABLE = {  # arXiv 2005.14165, Table 2.1: parameters, layers, channels, channels of a head, tokens a step, lr
    "small": (125e6, 12, 768, 64, 0.5e6, 6e-4), "medium": (350e6, 24, 1024, 64, 0.5e6, 3e-4),
    "large": (760e6, 24, 1536, 96, 0.5e6, 2.5e-4), "xl": (1.3e9, 24, 2048, 128, 1e6, 2e-4),
    "2.7b": (2.7e9, 32, 2560, 80, 1e6, 1.6e-4), "6.7b": (6.7e9, 32, 4096, 128, 2e6, 1.2e-4),
    "13b": (13e9, 40, 5120, 128, 2e6, 1e-4), "175b": (175e9, 96, 12288, 128, 3.2e6, 0.6e-4)}


@pytest.mark.parametrize("name", TABLE)
def test_each_size_of_gpt3_is_that_of_its_table(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = configure([f"config/gpt3/{name}.py"])
    parameters, depth, width, head_dim, step_tokens, lr = TABLE[name]
    assert (config.depth, config.width, config.head_dim, config.lr) == (depth, width, head_dim, lr)
    assert model_size(config).parameters == pytest.approx(parameters, rel=0.025)
    assert config.batch * config.context == pytest.approx(step_tokens, rel=0.05)
    assert config.stage(0).batch * config.context == pytest.approx(32e3, rel=0.03)
    assert config.tokens_before(config.steps) == pytest.approx(300e9, rel=1e-5)
    assert 4e9 <= config.batch_ramp_tokens <= 12e9 and lr_factor(config, config.steps - 1) == 0.1
    assert lr_factor(config, config.steps_for(375e6 / 2)) == pytest.approx(0.5, abs=1e-3)
    assert {*os.listdir("config/gpt3")} >= {f"{size}.py" for size in [*TABLE, "mini"]}


def test_the_table_of_rates_shows_what_mup_takes_from_the_proxy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (tmp_path / "proxy.py").write_text("width, depth, batch, context, steps = 256, 8, 8, 128, 1000\n"
                                       "lr, depth_alpha, base_width = 2**-8, 0.5, 64\n")
    lr_table.main(["config/gpt3/xl.py", "config/gpt3/small.py", f"--proxy={tmp_path / 'proxy.py'}"])
    header, small, xl = (line.split() for line in capsys.readouterr().out.splitlines())
    assert [small[0], xl[0]] == ["gpt3/small.py", "gpt3/xl.py"], "by size"
    by_mup = 2**-8 / (2048 / 256) * (24 / 8) ** -0.5
    rules = math.sqrt(512 * 2048 / (8 * 128)) * (300e9 / (8 * 128 * 1000)) ** -0.32
    assert [float(x) for x in xl[-3:]] == pytest.approx([2e-4, by_mup, by_mup * rules], rel=0.005)


# On a GPU


class FakeGraph:
    """Of a CUDA graph: what a replay does."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1
        self.owner.output.copy_(2 * self.owner.input)


def test_a_graph_is_captured_anew_for_each_shape_of_the_batch(monkeypatch):
    graphs, calls = [], []

    def make_graph():
        graphs.append(FakeGraph())
        graphs[-1].owner = step
        return graphs[-1]

    def double(x):
        calls.append(tuple(x.shape))
        return 2 * x

    step = CudaGraphed(double, True, None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", make_graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: warnings.catch_warnings())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for i, size in enumerate([2] * 5 + [3] * 2 + [4] * 4):
        x = torch.full((size,), float(i))
        assert torch.equal(step(x), 2 * x)
    # two plain calls and a capture; 3 is over before its capture
    assert calls == [(2,)] * 3 + [(3,)] * 2 + [(4,)] * 3
    assert [graph.replays for graph in graphs] == [3, 2]


@cuda
@pytest.mark.parametrize("compile", [False, "blocks"])
def test_on_cuda_a_ramp_by_graphs_is_the_ramp_step_by_step(corpus, compile):
    settings = corpus | RECIPE | {"device": "cuda", "compile": compile, "precision": "fp32", "steps": 30,
                                  "batch_ramp_tokens": 3000, "decay_tokens": None}
    replayed, plain = (run(settings, graph=graph) for graph in (True, False))
    assert column(replayed) == pytest.approx(column(plain), abs=1e-3)
    assert column(replayed, "tokens") == column(plain, "tokens")
    on_cpu = run(settings | {"device": "cpu", "compile": False})
    assert column(replayed) == pytest.approx(column(on_cpu), abs=5e-3)


@cuda
@pytest.mark.parametrize(("compile", "precision", "noise", "head_dim"), [
    ("blocks", "fp32", 1e-3, 32), ("model", "bf16", 3e-2, 32), ("blocks", "bf16", 3e-2, 48)])
def test_on_cuda_flex_attention_trains_as_a_mask_does(corpus, monkeypatch, compile, precision, noise,
                                                      head_dim):
    settings = corpus | {"device": "cuda", "steps": 20, "context": 200, "window": 30, "batch": 8, "depth": 4,
                         "head_dim": head_dim, "width": 2 * head_dim, "precision": precision,
                         "eval_tokens": 800, "compile": compile}
    made, original = [], training.compile.band_mask
    monkeypatch.setattr(training.compile, "band_mask", lambda *of: made.append(of) or original(*of))
    flex = run(settings)
    assert made == [(30, 200, torch.device("cuda", 0))]
    mask = run(settings, compile=False)
    assert column(flex) == pytest.approx(column(mask), abs=noise)
    assert flex.val_loss == pytest.approx(mask.val_loss, abs=noise)
    assert made == [(30, 200, torch.device("cuda", 0))], "without compilation there is none"


@cuda
def test_on_cuda_another_trial_with_a_window_compiles_nothing(corpus):
    settings = corpus | {"device": "cuda", "steps": 3, "window": 5, "depth": 4, "compile": "blocks"}
    counts = []
    for changes in {}, {"lr": 2**-8, "logit_mult": 2.0}, {"depth": 6}:
        torch._dynamo.utils.counters.clear()
        run(settings, **changes)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] > 0 and counts[1:] == [0, 0]
