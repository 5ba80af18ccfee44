"""What builds on the trainer: many models at once, and speed measured."""

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import model
from configure import Config, UserError, configure
from scaling import sweep, words
from scaling.bench import bench
from scaling.coordinate_check import coordinate_check
from scaling.report import analyse, text
from scaling.report import main as report_main
from scaling.search import best_file, search
from scaling.search import main as search_main
from scaling.stack import train_stacked
from scaling.trials import identity, read
from train import train

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MIXED = [{"lr": 2**-6, "seed": 0},
         {"lr": 2**-8, "seed": 1, "logit_mult": 2.0, "zero_query": True, "beta1": 0.8, "base_batch": 2},
         {"lr": 2**-7, "seed": 2, "parametrization": "sp", "weight_decay": 0.5, "grad_clip": 0.1, "eps": 1e-3,
          "warmup": 0.5, "schedule": "linear", "attention_mult": 3.0, "norm_lr_mult": 4.0}]


def losses(result):
    return [row["train_loss"] for row in result.history if "train_loss" in row]


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs CUDA"))])
@pytest.mark.parametrize("seeds", [None, 3], ids=["own texts", "one text"])
def test_stacked_models_are_those_trained_alone(corpus, seeds, where):
    shared = corpus | {"steps": 20, "position": "rotary", "bias": True, "device": where, "precision": "fp32",
                       "compile": False}  # in bf16 rounding grows to 0.05 in 20 steps
    configs = [Config(**shared | settings | ({"seed": seeds} if seeds else {})) for settings in MIXED]
    noise = 1e-4 if where == "cpu" else 5e-3
    for config, together in zip(configs, train_stacked(configs), strict=True):
        alone = train(config, quiet=True)
        assert losses(together) == pytest.approx(losses(alone), abs=noise)
        assert together.val_loss == pytest.approx(alone.val_loss, abs=noise)
        for a, b in zip(together.model.parameters(), alone.model.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-3 if where == "cpu" else 0.1)


def test_another_stack_of_a_shape_compiles_nothing(corpus, compiled):
    for k in range(3):
        train_stacked([Config(**corpus | settings | {"compile": "model", "seed": k + i, "eps": 10.0**-k})
                       for i, settings in enumerate(MIXED[:2])])
    assert len(compiled) == 1


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


def test_values_are_lists_ranges_and_settings(capsys):
    assert words.values("lr", "2**-3..1:2") == pytest.approx([2 ** (-3 + i / 2) for i in range(7)])
    assert words.values("width", "64..512") == [64, 128, 256, 512]
    assert words.values("seed", "0,3,1") == [0, 3, 1] and words.values("batch", "8..20") == [8, 16]
    assert words.values("tied", "true,false") == [True, False]
    wrong = {"lr": "1..0.5", "width": "64,x", "widht": "3", "eps": "0..1", "batch": "8..9:x"}
    for name, bad in wrong.items():
        with pytest.raises(UserError, match=f"^{name}: "):
            words.values(name, bad)


def test_a_sweep_holds_what_it_is_told_to_hold():
    config = Config(batch=32, context=64, steps=600)

    def shapes(hold, **axes):
        return [(trial.batch, trial.context, trial.steps) for trial in sweep.trials(config, axes, hold)]

    assert shapes("steps", batch=[8, 64]) == [(8, 64, 600), (64, 64, 600)]
    assert shapes("tokens", batch=[8, 64]) == [(8, 64, 2400), (64, 64, 300)]
    assert shapes("step_tokens", context=[32, 256]) == [(64, 32, 600), (8, 256, 600)]
    for hold, axis in {"tokens": "steps", "step_tokens": "batch", "width": "lr"}.items():
        with pytest.raises(UserError, match=f"^hold: got {hold}, takes"):
            sweep.trials(config, {axis: [1]}, hold)


AXES = {"lr": [2**-8, 2**-6], "width": [32, 64], "seed": [0, 1]}


def test_processes_share_all_trials_whenever_they_start(corpus, tmp_path):
    line = [f"--{name}={value}" for name, value in corpus.items()]
    line += ["lr=2**-8,2**-6", "width=32,64", "seed=0,1", f"--out={tmp_path}"]

    def start(rank):
        return subprocess.Popen([sys.executable, "-m", "scaling.sweep", *line], cwd=ROOT, text=True,
                                stdout=subprocess.PIPE, env=os.environ | {"RANK": rank, "WORLD_SIZE": "2"})

    late = start("1")
    while len(read(tmp_path)) < 4:
        assert late.poll() is None
        time.sleep(0.01)
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in (start("0"), late)]
    assert list(map(len, outputs)) == [9, 0], "the first prints the table of all"
    rows = read(tmp_path)
    assert len(rows) == len({row["config"] for row in rows}) == 8


def test_a_sweep_goes_on_when_config_has_gained_a_setting(corpus, tmp_path, monkeypatch):
    configs = sweep.trials(Config(**corpus), {"seed": [0]})
    rows = sweep.run(configs, str(tmp_path))
    text = (tmp_path / "trials.csv").read_text()
    assert '""base_batch"": null, ' in text
    (tmp_path / "trials.csv").write_text(text.replace('""base_batch"": null, ', ""))
    monkeypatch.setattr(sweep, "train", None)
    assert sweep.run(configs, str(tmp_path)) == rows
    (tmp_path / "trials.csv").write_text(text.replace('""base_batch""', '""base_bach""'))
    with pytest.raises(UserError, match="base_bach: no such setting; did you mean base_batch"):
        read(tmp_path)


@pytest.mark.parametrize("damage", ["header", "loss", "settings", "missing"])
def test_a_damaged_row_of_a_sweep_is_named(corpus, tmp_path, damage):
    sweep.run(sweep.trials(Config(**corpus | {"steps": 1}), {"seed": [0]}), str(tmp_path))
    header, row = (path := tmp_path / "trials.csv").read_text().splitlines()
    bad = {"header": header, "loss": row.replace(row.split(",")[8], "3.l4"),
           "settings": row.replace('""width"": ', '""width"" '), "missing": row.split(",")[0]}[damage]
    path.write_text(f"{header}\n{row}\n{bad}\n")
    with pytest.raises(UserError, match="trials.csv: line 3 is damaged; remove it"):
        read(tmp_path)


def test_a_sweep_keeps_every_trial_as_train_gives_it_and_trains_none_twice(corpus, tmp_path, monkeypatch):
    configs = sweep.trials(Config(**corpus), AXES)
    rows = sweep.run(configs, str(tmp_path))
    assert len(rows) == len(read(tmp_path)) == 8
    for config, row in zip(configs[::3], rows[::3], strict=True):
        alone = train(config, quiet=True)
        assert (row["lr"], row["width"], row["seed"]) == (config.lr, config.width, config.seed)
        assert row["val_loss"] == alone.val_loss and row["train_loss"] == losses(alone)[-1]
        assert row["curve"] == pytest.approx(losses(alone), abs=1e-4) and not row["diverged"]
        assert row["flops"] == alone.model.flops_per_token() * 4 * 16 * 6
    monkeypatch.setattr(sweep, "train", None)
    assert sweep.run(configs, str(tmp_path)) == rows
    monkeypatch.undo()
    stacked = sweep.run(configs, str(tmp_path / "stacked"), stack=3)
    assert [row["val_loss"] for row in stacked] == pytest.approx([row["val_loss"] for row in rows], abs=1e-4)


def test_a_trial_that_fails_or_diverges_is_a_row_and_the_others_go_on(corpus, tmp_path, monkeypatch):
    configs = sweep.trials(Config(**corpus), {"readout_std": [1.0, 1e38], "context": [16, 10**6]})
    rows = sweep.run(configs, str(tmp_path))
    assert [row["diverged"] for row in rows] == [False, True, True, True]
    assert rows[1]["failure"].startswith("UserError: batch: got 4 at context=1000000")
    assert not rows[2]["failure"]


def test_a_killed_sweep_loses_at_most_the_trial_in_flight(corpus, tmp_path):
    line = [f"--{name}={value}" for name, value in (corpus | {"steps": 40}).items()]
    line += ["lr=2**-9..2**-6", "seed=0,1,2", f"--out={tmp_path}"]
    command = [sys.executable, "-m", "scaling.sweep", *line]
    kept = 0
    for number in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        while len(read(tmp_path)) < kept + 3:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(number)
        output, errors = process.communicate()
        assert len(read(tmp_path)) >= kept + 3
        kept = len(read(tmp_path))
    assert process.returncode == 130 and "the same command goes on" in output and "Traceback" not in errors
    with open(tmp_path / "trials.csv", "a") as file:
        file.write('mup,32,2,4,16,40,0.1,0,3.3,"{')  # as a kill within a write leaves it
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 13, done.stderr
    rows = read(tmp_path)
    assert len(rows) == len({row["config"] for row in rows}) == 12


def ladder(optima, losses=(4.0, 3.9, 3.8), seeds=3, swept="lr", **more):
    """Rows whose loss is a parabola in log2 of the swept setting: of each rung, at optima[i]."""
    rows = []
    for width, best, low in zip((64, 128, 256), optima, losses, strict=True):
        for k in range(-20, -9):
            for seed in range(seeds):
                config = Config(width=width, seed=seed, **more, **{swept: 2 ** (k / 2)})
                loss = low + 0.1 * (k / 2 - best - 0.02 * (seed - 1)) ** 2
                rows.append({"parametrization": config.parametrization, "width": width, "seed": seed,
                             "val_loss": loss, "diverged": k == -10, "config": identity(config),
                             "curve": [loss], "parameters": width**2, "flops": width**3})
    return rows


def test_the_report_finds_the_optimum_its_drift_and_what_the_proxys_rate_costs():
    rows = ladder([-7.7, -7.5, -7.3]) + ladder([-7, -8, -9.3], parametrization="sp")
    report = analyse(rows)
    mup, sp = (report["ladders"][name] for name in ("mup", "sp"))
    assert [rung["log2_best"] for rung in mup["rungs"]] == pytest.approx([-7.7, -7.5, -7.3], abs=1e-3)
    assert mup["drift"] == pytest.approx(0.2, abs=1e-3) and sp["drift"] == pytest.approx(-1.15, abs=1e-3)
    low, high = mup["drift_interval"]
    assert low <= mup["drift"] <= high and high - low < 0.1
    assert [rung["regret"] for rung in mup["rungs"]] == pytest.approx([0.004, 0, 0.004], abs=1e-4)
    from_256 = analyse(rows, base=256)["ladders"]["mup"]["rungs"]
    assert [rung["regret"] for rung in from_256] == pytest.approx([0.016, 0.004, 0], abs=1e-4)
    assert mup["rungs"][0]["interval"] == pytest.approx([-7.72, -7.68], abs=0.005)
    assert "moves +0.200 octaves for each doubling of width" in text(report)


def test_what_follows_the_axis_is_no_second_axis():
    rows = ladder([-7.5, -7.5, -7.5])
    for row in rows:
        batch = row.pop("width")
        config = json.loads(row["config"]) | {"width": 128, "batch": batch, "steps": 2**20 // batch}
        row |= {"batch": batch, "config": json.dumps(config)}
    assert analyse(rows)["axis"] == "batch"


def test_ladders_that_another_setting_tells_apart_are_not_mixed():
    ladders = analyse(ladder([-7, -7.5, -8]) + ladder([-7, -7, -7], base_batch=8))["ladders"]
    assert ladders.keys() == {"mup, base_batch=None", "mup, base_batch=8"}
    assert ladders["mup, base_batch=None"]["drift"] == pytest.approx(-0.5, abs=1e-3)
    assert ladders["mup, base_batch=8"]["drift"] == pytest.approx(0, abs=1e-3)


def test_the_report_picks_the_rows_of_one_setting_among_those_of_several():
    rows = ladder([-7, -7.5, -8], swept="readout_std") + ladder([-7, -7, -7], swept="embedding_lr_mult")
    for swept, drift in {"readout_std": -0.5, "embedding_lr_mult": 0.0}.items():
        report = analyse(rows, swept)
        assert report["swept"] == swept
        assert report["ladders"]["mup"]["drift"] == pytest.approx(drift, abs=1e-3)
    with pytest.raises(UserError, match="^report: got rows that vary"):
        analyse(rows)


def test_a_regret_beyond_the_grid_is_not_made_up():
    rows = ladder([-9, -6, -6])
    rows = [row for row in rows if row["width"] > 64 or json.loads(row["config"])["lr"] < 2**-7]
    assert analyse(rows)["ladders"]["mup"]["rungs"][0]["regret"] is None


def test_an_optimum_at_the_edge_is_said_and_not_fitted():
    report = analyse(ladder([-7.5, -11.0, -3.0]))
    assert [rung["edge"] for rung in report["ladders"]["mup"]["rungs"]] == [False, True, True]
    assert text(report).count("at the edge") == 2


def test_the_report_refuses_rows_that_are_no_ladder(tmp_path):
    for rows in (ladder([-7, -7, -7]) + ladder([-7, -7, -7], depth=8), ladder([-7, -7, -7])[:1]):
        with pytest.raises(UserError, match="^report: got rows that vary"):
            analyse(rows)
    with pytest.raises(UserError, match="^report: .* has no trials"):
        report_main([str(tmp_path)])


def test_a_search_ends_at_its_best_draw_and_writes_it_as_a_configuration(corpus, tmp_path):
    config = Config(**corpus | {"weight_decay": 0.01})
    space = {"lr": [2**-6, 2**-14], "readout_std": [1.0, 1e38], "zero_query": [False, True]}
    best, finals, rows = search(config, 8, 2, str(tmp_path), space)  # `config` and 7 of the 8 possible
    assert 2**-7 <= best.lr <= 2**-5 and best.readout_std == 1.0, "near the only draws that learn"
    assert [(row["seed"], row["lr"]) for row in finals] == [(0, best.lr), (1, best.lr)]
    (tmp_path / "best.py").write_text(best_file(best, finals, 8))
    other = configure([str(tmp_path / "best.py"), "--width=64", "--seed=5", "--steps=3"])
    assert (other.lr, other.weight_decay, other.width, other.seed) == (best.lr, 0.01, 64, 5)
    with pytest.raises(UserError, match="^trials: got 9, takes 8"):
        search(config, 9, 1, str(tmp_path / "more"), space)


def test_a_search_ends_at_the_bottom_of_the_curve_not_at_the_rate_it_drew(corpus, tmp_path):
    too_low = Config(**corpus | {"lr": 2**-12})
    best, finals, rows = search(too_low, 2, 1, str(tmp_path), {"lr": [2**-12, 2**-13]})
    losses = {row["lr"]: row["val_loss"] for row in rows}
    assert len(losses) == 5 and min(losses, key=losses.get) == best.lr == 2**-11, "an octave up is the end"
    assert finals[0]["val_loss"] == losses[2**-11]


def test_a_search_says_what_it_cost_beside_a_target_that_trains_longer(corpus, tmp_path, capsys):
    (tmp_path / "target.py").write_text("steps = 24\n")
    line = ["--trials=3", "--seeds=1", "--space=readout_std", f"--out={tmp_path}",
            f"--target={tmp_path}/target.py"]
    search_main([*line, *(f"--{name}={value}" for name, value in corpus.items())])
    assert ", 75.0% of one training of" in capsys.readouterr().out, "3 of 6 steps, beside 24"
    (tmp_path / "target.py").write_text("widht = 24\n")
    with pytest.raises(UserError, match="target.py: widht: no such setting; did you mean width"):
        search_main([f"--target={tmp_path}/target.py"])


SLIPS = {
    "sweep": {"lr=2**-8 lr=2**-9": "lr: got 2**-8 and 2**-9, takes 2**-8,2**-9",
              "out=a,b": "out: does not tell trials apart, takes --out=VALUE",
              "lr=1..2:100000000": "lr: got 1..2:100000000, takes a range of at most 10,000 values",
              "lr=1,2 --stack=2 --dropout=0.1": "stack: got dropout=0.1, takes dropout=0.0"},
    "search": {"width=64": "width: got width=64, takes --width=64",
               "--space=lr,width": "space: got lr,width, takes some of lr,",
               "--stack=2 --dropout=0.1": "stack: got dropout=0.1"},
    "report": {"FOLDER --base=3": "base: got 3, takes one of 32",
               "FOLDER --to=FILE": "out: cannot write FILE: "},
    "coordinate_check": {"--widths=64,99": "width: got 99, takes a multiple of head_dim",
                         "--widths=64,64": "coordinate_check: takes --widths or --depths, 2 or more",
                         "--widths=64,128 --depths=2,4": "coordinate_check: takes --widths or --depths"},
    "bench": {"width=64": "width: got width=64, takes --width=64"}}


@pytest.mark.parametrize(("command", "line"), [(name, line) for name in SLIPS for line in SLIPS[name]])
def test_a_slip_is_one_line_and_nothing_is_trained(corpus, tmp_path, monkeypatch, command, line):
    (file := tmp_path / "file").write_text("")
    kept = sweep.trials(Config(**corpus | {"steps": 1}), {"lr": [1.0, 2.0]})
    sweep.run(kept, str(tmp_path / "kept"))
    monkeypatch.setattr(sweep, "train", None)
    monkeypatch.chdir(tmp_path)
    settings = [] if command == "report" else [f"--{name}={value}" for name, value in corpus.items()]

    def place(text):
        return text.replace("FOLDER", str(tmp_path / "kept")).replace("FILE", str(file))

    with pytest.raises(UserError) as caught:
        importlib.import_module(f"scaling.{command}").main([*settings, *place(line).split()])
    assert str(caught.value).startswith(place(SLIPS[command][line]))
    assert sorted(os.listdir(tmp_path)) == ["file", "kept"] and len(kept) == len(read(tmp_path / "kept"))


CHECKED = {"zero_residual_out": True, "readout_std": 0.5, "embedding_std": 1.0, "embedding_lr_mult": 8.0,
           "readout_lr_mult": 4.0, "lr": 2**-7, "width": 64, "depth": 2, "base_width": 64, "base_depth": 2,
           "base_head_dim": 16, "context": 64}


@pytest.mark.parametrize(("axis", "rungs", "alpha"), [
    ("width", (64, 128, 256), 1.0), ("depth", (8, 16, 32), 1.0), ("depth", (8, 16, 32), 0.8)])
def test_the_coordinate_check_passes_mup_and_fails_sp(corpus, axis, rungs, alpha):
    config = Config(**corpus | CHECKED | {"depth_alpha": alpha})
    rows, _ = coordinate_check(config, axis, rungs, seeds=2)
    assert all(row["passes"] for row in rows), [row for row in rows if not row["passes"]]
    rows, _ = coordinate_check(dataclasses.replace(config, parametrization="sp"), axis, rungs, seeds=2)
    assert sum(not row["passes"] for row in rows) >= 4


MUTANTS = {  # role and its wrong exponents, and the axis on which they show
    "hidden lr": ("hidden", {"lr": (0, 0)}, "width"), "embedding lr": ("embedding", {"lr": (-1, 0)}, "width"),
    "readout lr": ("readout", {"lr": (-1, 0)}, "width"), "hidden init": ("hidden", {"std": (0, 0)}, "width"),
    "readout init": ("readout", {"std": (1, 0)}, "width"), "logits": ("logits", (0, 0), "width"),
    "branch": ("branch", (0, 0), "depth"), "hidden lr over depth": ("hidden", {"lr": (-1, -1)}, "depth")}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_coordinate_check_fails_a_wrong_table(corpus, monkeypatch, name):
    key, wrong, axis = MUTANTS[name]
    original = model.TABLES["mup"]

    def mutant(alpha):
        rows, forward = original(alpha)
        if key in rows:
            return rows | {key: rows[key]._replace(**wrong)}, forward
        return rows, forward | {key: wrong}

    monkeypatch.setitem(model.TABLES, "mup", mutant)
    rungs = {"width": (64, 256), "depth": (4, 16)}[axis]
    rows, _ = coordinate_check(Config(**corpus | CHECKED), axis, rungs, seeds=1)
    assert not all(row["passes"] for row in rows)
