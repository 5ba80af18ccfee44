"""Small-to-large transfer: sweeps, stacked trials, the report, the search, the coordinate check."""

import dataclasses
import errno
import functools
import importlib
import json
import os
import re
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from children import run_command
from conftest import BLOCKS, CHECKED, GPT2_BLOCK, ROOT, change_table
from processes import Fork, lab_words, replaced, wait_until

import model
import parametrization
from configure import SETTINGS, Config, UserError, run_cli
from data.loader import TokenDataset
from data.prepare import prepare
from parametrization import param_groups
from scaling import figures, fits, scatter, stack, sweep
from scaling import report as report_module
from scaling import trials as trials_module
from scaling.cli import parse_values
from scaling.coordinate_check import (
    checked_layers,
    coordinate_check,
    expected_powers,
    judge,
    lowest_power,
    short_run,
)
from scaling.report import analyze, format_report
from scaling.report import main as report_main
from scaling.rows import read_rows
from scaling.stack import train_stacked
from scaling.sweep import run_trials, trial_configs
from scaling.trials import append_rows, identity, read_trials, settings_of, swept_axes
from train import train

coordinate_check_module = importlib.import_module("scaling.coordinate_check")
MIXED = [{"lr": 2**-6, "seed": 0},
         {"lr": 2**-8, "seed": 1, "logit_mult": 2.0, "zero_query": True, "beta1": 0.8, "base_batch": 2},
         {"lr": 2**-7, "seed": 2, "parametrization": "sp", "weight_decay": 0.5, "grad_clip": 0.1, "eps": 1e-3,
          "warmup": 0.5, "schedule": "linear", "attention_mult": 3.0, "norm_lr_mult": 4.0, "momentum": 0.8}]


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A folder with the rows of two trials of one step, which tests copy."""
    folder = tmp_path_factory.mktemp("finished")
    run_trials(trial_configs(Config(**corpus | {"steps": 1}), {"lr": [2**-7, 2**-6]}), str(folder))
    return folder


@pytest.fixture
def trials(finished, tmp_path):
    """A copy of the file of `finished`, which lies alone in tmp_path/trials."""
    return shutil.copytree(finished, tmp_path / "trials") / "trials.csv"


def losses(result):
    return [row["train_loss"] for row in result.history if "train_loss" in row]


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs CUDA"))])
@pytest.mark.parametrize(("block", "seeds"), [
    ({}, None), ({"window": 5}, 3),
    (GPT2_BLOCK | {"position": "rotary", "smear": True, "value_embeddings": True}, None),
    ({"optimizer": "muon", "head_dim": 8, "kv_heads": 2}, 3)],
    ids=["own texts", "one text, a window", "gpt2 rotary", "muon, kv_heads"])
def test_stacked_models_are_those_trained_alone(corpus, block, seeds, where):
    shared = corpus | block | {"steps": 10, "bias": True, "device": where, "precision": "fp32",
                               "compile": False}  # in bf16 rounding grows to 0.05 in 20 steps
    configs = [Config(**shared | settings | ({"seed": seeds} if seeds else {})) for settings in MIXED]
    noise = 1e-3 if where == "cpu" else 5e-3  # rounding differs between processors, too, and grows to 1e-4
    for config, together in zip(configs, train_stacked(configs), strict=True):
        alone = train(config, quiet=True)
        assert losses(together) == pytest.approx(losses(alone), abs=noise)
        assert together.val_loss == pytest.approx(alone.val_loss, abs=noise)
        for a, b in zip(together.model.parameters(), alone.model.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-3 if where == "cpu" else 0.1)


def test_an_optimizer_that_cannot_be_stacked_is_rejected(corpus, monkeypatch):
    monkeypatch.setattr(stack, "build_optimizer", lambda model: torch.optim.Adagrad(param_groups(model)))
    with pytest.raises(UserError, match=r"^stack: .*Adagrad"):
        train_stacked([Config(**corpus)])


def test_another_stack_of_a_shape_compiles_nothing(corpus, compiled):
    counts = []
    for k in range(2):
        shared = corpus | {"compile": "model", "eps": 10.0**-k, "depth": 1, "steps": 2}
        train_stacked([Config(**shared | settings | {"seed": k + i}) for i, settings in enumerate(MIXED[:2])])
        counts.append(len(compiled))
    shapes = {p.shape for p in model.GPT(Config(**shared, vocab_size=257)).parameters()}
    assert counts == [1 + len(shapes)] * 2  # the passes, and the update of each shape of a parameter


@pytest.mark.parametrize("change", [{"width": 64}, {"steps": 3}, {"dropout": 0.1}, {"micro_batch": 2}])
def test_what_cannot_be_stacked_is_rejected(corpus, change):
    config = Config(**corpus)
    with pytest.raises(UserError, match=f"^stack: .*{[*change][0]}"):
        train_stacked([dataclasses.replace(config, **change), config])


def test_a_stacked_model_that_diverges_leaves_the_others_alone(corpus):
    config = Config(**corpus)
    bad = dataclasses.replace(config, hidden_std=1e30)
    first, second = train_stacked([config, bad])
    assert losses(first) == pytest.approx(losses(train(config, quiet=True)), abs=1e-4)
    assert second.diverged and not first.diverged


def test_values_are_lists_ranges_and_settings():
    assert parse_values("lr", "2**-3..1:2") == pytest.approx([2 ** (-3 + i / 2) for i in range(7)])
    assert parse_values("width", "64..512") == [64, 128, 256, 512]
    assert parse_values("seed", "0,3,1") == [0, 3, 1] and parse_values("batch", "8..20") == [8, 16]
    assert parse_values("tied", "true,false") == [True, False]
    wrong = {"lr": "1..0.5", "width": "64,x", "widht": "3", "eps": "0..1", "batch": "8..9:x"}
    for name, bad in wrong.items():
        with pytest.raises(UserError, match=f"^{name}"):
            parse_values(name, bad)


def test_a_sweep_holds_what_it_is_told_to_hold():
    config = Config(batch=32, context=64, steps=600)

    def shapes(hold, **axes):
        return [(trial.batch, trial.context, trial.steps) for trial in trial_configs(config, axes, hold)]

    assert shapes("steps", batch=[8, 64]) == [(8, 64, 600), (64, 64, 600)]
    assert shapes("tokens", batch=[8, 64]) == [(8, 64, 2400), (64, 64, 300)]
    assert shapes("step_tokens", context=[32, 256]) == [(64, 32, 600), (8, 256, 600)]
    for hold, axis in {"tokens": "steps", "step_tokens": "batch", "width": "lr"}.items():
        with pytest.raises(UserError, match="^hold"):
            trial_configs(config, {axis: [1]}, hold)


AXES = {"lr": [2**-8, 2**-6], "width": [32, 64], "seed": [0, 1]}


def test_processes_share_all_trials_whenever_they_start(corpus, tmp_path):
    words = lab_words(corpus) + ["lr=2**-8,2**-6", "width=32,64", "seed=0,1", f"--out={tmp_path}"]

    def start(rank):
        return Fork(run_command, "scaling.sweep", words, environment={"RANK": rank, "WORLD_SIZE": "2"})

    second = start("1")
    wait_until(lambda: len(read_trials(tmp_path)) >= 4, second)
    outputs = [process.communicate()[0].splitlines() for process in (start("0"), second)]
    assert list(map(len, outputs)) == [9, 0], "rank 0 prints the table of all"
    rows = read_trials(tmp_path)
    assert len(rows) == len({row["config"] for row in rows}) == 8


@pytest.mark.parametrize("newer", [r' ""base_batch"": null,', r', ""tokens"": [^}]*'])
def test_a_sweep_resumes_from_rows_that_are_older_than_a_setting_or_than_how_it_was_measured(
        corpus, tmp_path, monkeypatch, newer):
    configs = trial_configs(Config(**corpus), {"seed": [0, 1]})
    rows = run_trials(configs, str(tmp_path))
    path = tmp_path / "trials.csv"
    text = path.read_text()
    older = re.sub(newer, "", text)
    assert older != text
    path.write_text(older)
    monkeypatch.setattr(sweep, "train", None)
    found = run_trials(configs, str(tmp_path))
    assert [row["val_loss"] for row in found] == [row["val_loss"] for row in rows]
    path.write_text(text.replace('""base_batch""', '""base_bach""'))
    with pytest.raises(UserError, match="base_bach: no such setting; did you mean base_batch"):
        read_trials(tmp_path)


def test_rows_that_are_older_than_settings_are_read_with_their_defaults(corpus, tmp_path):
    """scaling/results/width/trials.csv was written before base_tokens and decay_fraction."""
    folder = os.path.join(ROOT, "scaling", "results", "width")
    with open(os.path.join(folder, "trials.csv"), newline="") as file:
        header, *lines = file.read().splitlines()
    assert header == ("parametrization,width,depth,batch,context,steps,lr,seed,val_loss,val_error,"
                      "val_bits_per_byte,train_loss,parameters,flops,seconds,diverged,failure,curve,config")
    assert '""decay_fraction""' not in lines[0]
    rows = read_trials(folder)
    assert len(rows) == len(lines)
    settings = json.loads(rows[0]["config"])
    assert settings["decay_fraction"] == Config.decay_fraction and settings["base_tokens"] is None
    block = {name: settings[name] for name in GPT2_BLOCK}
    assert '""norm""' not in lines[0] and '""position"": ""learned""' in lines[0] and block == GPT2_BLOCK
    assert (settings["optimizer"], settings["momentum"]) == ("adamw", Config.momentum)
    drifts = {name: ladder["drift"] for name, ladder in analyze(rows)["ladders"].items()}
    assert drifts == pytest.approx({"mup": 0.031, "sp": -0.905}, abs=5e-4)


@pytest.mark.parametrize("damage", ["header", "loss", "settings", "missing"])
def test_a_damaged_row_of_a_sweep_is_reported_with_its_line(trials, damage):
    header, row, _ = trials.read_text().splitlines()
    bad = {"header": header, "loss": row.replace(row.split(",")[8], "3.l4"),
           "settings": row.replace('""width"": ', '""width"" '), "missing": row.split(",")[0]}[damage]
    trials.write_text(f"{header}\n{row}\n{bad}\n")
    with pytest.raises(UserError, match="trials.csv: line 3 is damaged; remove it"):
        read_trials(trials.parent)


def test_a_table_of_trials_without_its_header_says_so_and_one_that_excel_saved_is_read(trials):
    rows, (header, *lines) = read_trials(trials.parent), trials.read_text().splitlines()
    trials.write_bytes("\r\n".join([f"\ufeff{header}", *lines, ""]).encode())
    assert read_trials(trials.parent) == rows
    trials.write_text("\n".join([*lines, ""]))
    with pytest.raises(UserError, match="trials.csv: line 1 is not the header") as caught:
        read_trials(trials.parent)
    assert str(caught.value).endswith(f": {header}")


def test_rows_say_what_was_swept_and_a_table_of_an_older_version_keeps_its_columns(corpus, tmp_path):
    axes = {"width,depth": [(32, 1)], "lr": [2**-7, 2**-6]}
    run_trials(trial_configs(Config(**corpus | {"steps": 1}), axes), str(tmp_path), swept=axes)
    rows = read_trials(tmp_path)
    assert [row["swept"] for row in rows] == ["width,depth lr"] * 2
    assert swept_axes([*rows, rows[0] | {"swept": "lr seed"}]) == ["width,depth", "lr", "seed"]
    path = tmp_path / "trials.csv"
    path.write_text(path.read_text().replace(",swept", "").replace(',"width,depth lr"', ""))
    run_trials(trial_configs(Config(**corpus | {"steps": 1}), {"lr": [2**-5]}), str(tmp_path), swept=["lr"])
    assert [row["swept"] for row in read_trials(tmp_path)] == [""] * 3


def test_a_sweep_prints_its_rates_as_figures_show_them(corpus, tmp_path, capsys):
    words = [*lab_words(corpus | {"steps": 1}), "lr=2**-11,2**-7.5,0.003", "width=32", f"--out={tmp_path}"]
    assert sweep.main(words) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "lr", "2**-11", "2**-7.5", "0.003"]


def test_a_sweep_keeps_every_trial_as_train_gives_it_and_trains_none_twice(corpus, tmp_path, monkeypatch):
    configs = trial_configs(Config(**corpus), AXES)
    rows = run_trials(configs, str(tmp_path))
    assert len(rows) == len(read_trials(tmp_path)) == 8
    for config, row in zip(configs[::3], rows[::3], strict=True):
        alone = train(config, quiet=True)
        assert (row["lr"], row["width"], row["seed"]) == (config.lr, config.width, config.seed)
        assert row["val_loss"] == alone.val_loss and row["train_loss"] == losses(alone)[-1]
        assert row["curve"] == pytest.approx(losses(alone), abs=1e-4) and not row["diverged"]
        assert row["flops"] == alone.model.flops_per_token() * 4 * 16 * 6
    monkeypatch.setattr(sweep, "train", None)
    assert run_trials(configs, str(tmp_path)) == rows
    monkeypatch.undo()
    stacked = run_trials(configs, str(tmp_path / "stacked"), stack=3)
    assert [row["val_loss"] for row in stacked] == pytest.approx([row["val_loss"] for row in rows], abs=1e-4)


def test_a_trial_that_fails_or_diverges_is_a_row_and_only_what_failed_is_tried_again(corpus, tmp_path,
                                                                                     monkeypatch):
    configs = trial_configs(Config(**corpus), {"hidden_std": [1.0, 1e30], "context": [16, 10**6]})
    configs += trial_configs(Config(**corpus), {"vocab_size": [2]})
    rows = run_trials(configs, str(tmp_path))
    assert [row["diverged"] for row in rows] == [False, True, True, True, True]
    assert re.match("UserError: batch.*context", rows[1]["failure"])
    assert not rows[2]["failure"] and rows[4]["failure"].startswith("UserError: vocab_size ")
    monkeypatch.setattr(sweep, "train", None)
    [again] = run_trials([configs[2]], str(tmp_path))
    assert str(again) == str(rows[2]), "to diverge is a result"


def test_a_sweep_says_what_is_there_already_and_which_of_it_other_code_made(corpus, tmp_path, monkeypatch,
                                                                            capsys):
    folder, code = str(tmp_path / "sweep"), tmp_path / "code"
    for name in trials_module.CODE:
        (code / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(os.path.join(ROOT, name), code / name)
    monkeypatch.setattr(trials_module, "__file__", str(code / "scaling/trials.py"))
    config = Config(**corpus | {"steps": 1})
    said = []
    for edit, seeds in (("", 1), ("\n# a comment\n", 2), ("\nx = 1\n", 3)):
        with open(code / "model.py", "a") as file:
            file.write(edit)
        trials_module.code_hash.cache_clear()
        run_trials(trial_configs(config, {"seed": [*range(seeds)]}), folder)
        said.append(capsys.readouterr().err)
    trials_module.code_hash.cache_clear()
    assert "already" not in said[0]
    assert "1 trials are there already" in said[1] and "other code" not in said[1]
    assert "2 trials are there already, 2 of them by other code" in said[2]


def test_folders_that_contradict_each_other_are_not_read_as_one(trials, tmp_path):
    other = shutil.copytree(trials.parent, tmp_path / "other") / "trials.csv"
    folders = [str(trials.parent), str(other.parent)]
    loss = read_rows(folders)[-1]["val_loss"]
    other.write_text(trials.read_text().replace(str(loss), str(loss + 0.1)))
    with pytest.raises(UserError, match=f"^{re.escape(folders[1])} has a loss of {loss + 0.1:.4f} for"):
        read_rows(folders)


def test_trials_are_trained_in_the_order_of_the_models_own_flops(corpus):
    configs = trial_configs(Config(**corpus), {"depth": [1, 3, 2], "width": [32, 64], "lr": [0.1, 0.2]})
    groups = sweep.group_trials(sweep.as_trials(configs).values(), 2)
    assert [len(group) for group in groups] == [2] * 6
    sizes = [sweep.estimate_flops(group[0].config) for group in groups]
    assert sizes == sorted(sizes, reverse=True)
    sized = dataclasses.replace(groups[0][0].config, vocab_size=sweep.TYPICAL_VOCAB_SIZE)
    assert sizes[0] == model.GPT(sized).flops_per_token() * sized.batch * sized.context * sized.steps


def loss_in(folder, config, **changes):
    [row] = run_trials(trial_configs(dataclasses.replace(config, **changes), {"seed": [0]}), str(folder))
    return row["val_loss"]


def test_a_trial_that_is_measured_otherwise_is_another_trial(corpus, tmp_path):
    text, folder = tmp_path / "text", tmp_path / "sweep"
    shutil.copytree(corpus["dataset"], text)
    config = Config(**corpus | {"dataset": str(text)})
    first = loss_in(folder, config)
    assert loss_in(folder, config) == first and len(read_trials(folder)) == 1
    others = [{"eval_tokens": 64}, {"precision": "bf16"}, {"precision": "fp32"}, {"device": "auto"}]
    losses = [loss_in(folder, config, **change) for change in others]
    assert losses[:2] != [first, first]
    assert len(set(losses)) == 3 + torch.cuda.is_available()  # elsewhere auto is the CPU
    (text / "00.txt").write_text("quite another text, which is long enough to matter here. " * 40)
    changed = loss_in(folder, config)
    assert changed != first and changed == train(trial_configs(config, {})[0], quiet=True).val_loss
    compiled = [sweep.facts_of(dataclasses.replace(config, compile=how), TokenDataset(prepare(config)))
                for how in (False, "blocks", "model")]
    assert [facts["compile"] for facts in compiled] == [False, "blocks", "model"]
    rows = read_trials(folder)
    assert len(rows) == (4 if torch.cuda.is_available() is False else 5)
    assert {json.loads(row["config"])["eval_tokens"] for row in rows} == {512, 64}


def test_a_trial_that_starts_from_other_weights_under_the_same_path_is_another_trial(corpus, tmp_path,
                                                                                     monkeypatch):
    source, folder = str(tmp_path / "source"), str(tmp_path / "sweep")
    scratch = trial_configs(Config(**corpus, eval_every=None), {"seed": [0]})
    tuned = [dataclasses.replace(config, init_from=source) for config in scratch]
    found = []
    for seed in (0, 1):
        shutil.rmtree(source, ignore_errors=True)
        train(Config(**corpus, out=source, seed=seed), quiet=True)
        train(Config(**corpus, out=source, seed=seed), quiet=True)  # of a finished run changes no weights
        found.append([row["val_loss"] for row in run_trials(scratch + tuned, folder)])
        with monkeypatch.context() as patch:
            patch.setattr(sweep, "train", None)
            assert [row["val_loss"] for row in run_trials(scratch + tuned, folder)] == found[-1]
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]
    assert found[1][1] == train(tuned[0], quiet=True).val_loss
    assert ["weights" in json.loads(row["config"]) for row in read_trials(folder)] == [False, True, True]

    path = tmp_path / "sweep/trials.csv"  # rows of versions that did not say so are taken for it
    path.write_text(re.sub(r' ""weights"": ""[0-9a-f]*"",', "", path.read_text()))
    monkeypatch.setattr(sweep, "train", None)
    assert [row["val_loss"] for row in run_trials(scratch + tuned, folder)][0] == found[0][0]


def test_a_report_keeps_trials_apart_that_were_measured_otherwise(corpus, tmp_path):
    """But takes rows that do not say how, of older versions, for what the others are."""
    facts = {"tokens": "a" * 64, "eval_tokens": 512, "device": "cpu", "precision": "fp32", "compile": False}

    def measured(rows, **changes):
        for row in rows:
            row["config"] = identity(Config(**settings_of(row["config"])), facts | changes)
        return rows

    some, more = measured(ladder([-7, -7.5, -8])), ladder([-7, -7, -7])
    assert analyze(some[:50] + ladder([-7, -7.5, -8])[50:])["ladders"].keys() == {"mup"}
    for changes, names in [({"eval_tokens": 64}, {"mup, eval_tokens=512", "mup, eval_tokens=64"}),
                           ({"tokens": "b" * 64}, {"mup, tokens=aaaaaaaa", "mup, tokens=bbbbbbbb"})]:
        ladders = analyze(some + measured(more, **changes))["ladders"]
        assert ladders.keys() == names
        assert {round(ladder["drift"], 3) for ladder in ladders.values()} == {-0.5, 0}
    tokenizers = measured(ladder([-7, -7, -7], tokenizer="bytes"), tokens="b" * 64)
    assert analyze(some + tokenizers)["ladders"].keys() == {"mup, tokenizer=bpe:2048", "mup, tokenizer=bytes"}


def test_a_sweep_trains_on_the_tokens_that_it_began_with(corpus, tmp_path, monkeypatch):
    text = tmp_path / "text"
    shutil.copytree(corpus["dataset"], text)
    configs = trial_configs(Config(**corpus | {"dataset": str(text)}), {"seed": [0, 1]})
    expected = [train(config, quiet=True).val_loss for config in configs]

    def train_and_edit(config, **options):
        result = train(config, **options)
        (text / "00.txt").write_text("quite another text, which is long enough to matter here. " * 40)
        return result

    monkeypatch.setattr(sweep, "train", train_and_edit)
    assert [row["val_loss"] for row in run_trials(configs, str(tmp_path / "sweep"))] == expected


def test_a_failed_trial_is_shown_and_tried_again_and_makes_the_exit_code_1(corpus, tmp_path, monkeypatch,
                                                                           capsys):
    words = [*lab_words(corpus), "lr=2**-8,2**-7,2**-6", f"--out={tmp_path}"]

    def fail(config, **options):
        if config.lr == 2**-8:
            return train(config, **options)
        raise OSError(28, "No space left on device")

    for _ in range(2):  # what failed is tried again, but only once a start; what did not is not
        monkeypatch.setattr(sweep, "train", fail)
        assert sweep.main(words) == 1
        output = capsys.readouterr().out
        assert output.count("nan  OSError: [Errno 28] No space left") == 2
        assert output.splitlines()[-1] == (
            f"{tmp_path}: 2 of 3 trials failed (OSError: [Errno 28] No space left on device); the same "
            "command tries them again")
        assert [bool(row["failure"]) for row in read_trials(tmp_path)] == [False, True, True]
    assert len((tmp_path / "trials.csv").read_text().splitlines()) == 1 + 3 + 2
    with pytest.raises(UserError, match="^report: the rows must vary"):
        report_main([str(tmp_path), "--swept=eps"])
    assert "2 of 3 trials failed, and count as diverged" in capsys.readouterr().out
    monkeypatch.undo()
    assert sweep.main(words) == 0
    assert [row["failure"] for row in read_trials(tmp_path)] == ["", "", ""]
    monkeypatch.setattr(sweep, "train", None)
    assert sweep.main(words) == 0


@pytest.mark.parametrize("command", ["sweep", "search", "report"])
def test_a_full_disk_is_one_line_in_the_lab_too(corpus, trials, tmp_path, monkeypatch, capsys, command):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    words = {"sweep": [*lab_words(corpus), "lr=2**-6,2**-7", f"--out={tmp_path}/new"],
             "search": [*lab_words(corpus), "--trials=1", f"--out={tmp_path}/new"],
             "report": [str(trials.parent)]}[command]
    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(sys, "argv", [command, *words])
    with pytest.raises(SystemExit) as caught:
        run_cli(importlib.import_module(f"scaling.{command}").main)
    assert caught.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert re.match("error: cannot write .*: No space left on device", line)


def test_a_trial_without_its_text_fails_until_the_text_is_there(corpus, tmp_path):
    shutil.copytree(corpus["dataset"], tmp_path / "a")
    datasets = {"dataset": [str(tmp_path / "a"), str(tmp_path / "b")]}
    configs = trial_configs(Config(**corpus), datasets)
    rows = run_trials(configs, str(tmp_path / "sweep"))
    assert [row["failure"][:35] for row in rows] == ["", "UserError: dataset: no such file or"]
    shutil.copytree(corpus["dataset"], tmp_path / "b")
    rows = run_trials(configs, str(tmp_path / "sweep"))
    assert rows[0]["val_loss"] == rows[1]["val_loss"]
    assert len(read_trials(tmp_path / "sweep")) == 2, "of the failed try no row is left"


def test_a_value_that_is_listed_twice_is_trained_once(corpus, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(sweep, "train",
                        lambda config, **options: trained.append(config) or train(config, **options))
    axes = {"lr": [0.01, 0.01], "precision": ["auto", "fp32"]}
    rows = run_trials(trial_configs(Config(**corpus), axes), str(tmp_path))
    assert len(trained) == len(read_trials(tmp_path)) == 1 and rows == rows[:1] * 4


def test_a_trial_that_a_search_stopped_early_is_trained_to_its_end_by_a_sweep(corpus, tmp_path):
    configs = trial_configs(Config(**corpus), {"seed": [0]})
    [trial] = sweep.as_trials(configs).values()
    stopped = sweep.train_group([trial], stop_early={2: lambda losses: True})
    append_rows(str(tmp_path / "trials.csv"), stopped)
    assert str(read_trials(tmp_path)[0]["curve"]) == str(stopped[0]["curve"])
    assert read_trials(tmp_path)[0]["failure"] == "stopped early, after 2 of 6 steps"
    [row] = run_trials(configs, str(tmp_path))
    assert row["val_loss"] == train(configs[0], quiet=True).val_loss and read_trials(tmp_path) == [row]


def test_a_killed_sweep_loses_at_most_the_trial_in_flight(corpus, tmp_path):
    words = lab_words(corpus | {"steps": 20}) + ["lr=2**-9..2**-6", "seed=0,1,2", f"--out={tmp_path}"]
    kept = 0
    for number in (signal.SIGKILL, signal.SIGINT):
        process = Fork(run_command, "scaling.sweep", words)
        wait_until(lambda kept=kept: len(read_trials(tmp_path)) > kept, process)
        process.send_signal(number)
        output, errors = process.communicate()
        assert len(read_trials(tmp_path)) > kept
        kept = len(read_trials(tmp_path))
    assert process.returncode == 130 and "run the same command again to resume" in output
    assert "Traceback" not in errors
    with open(tmp_path / "trials.csv", "a") as file:
        file.write('mup,32,2,4,16,40,0.1,0,3.3,"{')  # as a kill during a write leaves it
    process = Fork(run_command, "scaling.sweep", words)
    output, errors = process.communicate()
    assert process.returncode == 0 and len(output.splitlines()) == 13, errors
    rows = read_trials(tmp_path)
    assert len(rows) == len({row["config"] for row in rows}) == 12


def ladder(optima, losses=(4.0, 3.9, 3.8), seeds=3, swept="lr", **more):
    """Rows whose loss is a parabola in log2 of the swept setting, of the i-th size around optima[i]."""
    rows = []
    for width, best, low in zip((64, 128, 256), optima, losses, strict=True):
        for k in range(-20, -9):
            for seed in range(seeds):
                config = Config(width=width, seed=seed, **more, **{swept: 2 ** (k / 2)})
                loss = low + 0.1 * (k / 2 - best - 0.02 * (seed - 1)) ** 2
                rows.append({"parametrization": config.parametrization, "width": width, "seed": seed,
                             "val_loss": loss, "diverged": k == -10, "config": identity(config), "swept": "",
                             "curve": [loss], "parameters": width**2, "flops": width**3})
    return rows


def test_the_report_finds_the_optimum_its_drift_and_what_the_proxys_rate_costs():
    rows = ladder([-7.7, -7.5, -7.3]) + ladder([-7, -8, -9.3], parametrization="sp")
    report = analyze(rows)
    mup, sp = (report["ladders"][name] for name in ("mup", "sp"))
    assert [size["log2_best"] for size in mup["sizes"]] == pytest.approx([-7.7, -7.5, -7.3], abs=1e-3)
    assert mup["drift"] == pytest.approx(0.2, abs=1e-3) and sp["drift"] == pytest.approx(-1.15, abs=1e-3)
    low, high = mup["drift_interval"]
    assert low <= mup["drift"] <= high and high - low < 0.1
    assert [size["regret"] for size in mup["sizes"]] == pytest.approx([0.004, 0, 0.004], abs=1e-4)
    from_256 = analyze(rows, base=256)["ladders"]["mup"]["sizes"]
    assert [size["regret"] for size in from_256] == pytest.approx([0.016, 0.004, 0], abs=1e-4)
    assert [size["cost"] for size in mup["sizes"]] == pytest.approx([0.004, 0, 0.004], abs=1e-4)
    shipped = analyze(rows, shipped=2**-8)["ladders"]["mup"]["sizes"]
    assert [size["cost"] for size in shipped] == pytest.approx([0.009, 0.025, 0.049], abs=1e-4)
    assert all(size["cost"] < size["most"] < 1.1 * size["cost"] for size in shipped)
    assert mup["drift_by_window"] == pytest.approx(dict.fromkeys((0.75, 1.0, 1.5), 0.2), abs=1e-3)
    text = format_report(report)
    assert "moves +0.200 octaves for each doubling of width" in text
    assert text.splitlines()[6].endswith("costs up to 0.0040 nats; it is outside the interval of the best lr "
                                         "at width 64, 256.")


def test_a_report_names_each_control_and_says_how_many_trainings_either_side_had():
    rows = ladder([-8, -8, -8]) + ladder([-8, -8, -8], parametrization="sp_scaled", base_lr=2**-8)
    for row in rows[len(rows) // 2:]:
        row["val_loss"] += row["width"] / 1000
    trainings = len(rows) // 2
    lines = format_report(analyze(rows, shipped=2**-7)).splitlines()[-3:]
    assert lines[0].startswith(f"control sp_scaled, base_lr=0.00390625: {trainings} trainings against "
                               f"{trainings} of mup, base_lr=None")
    assert "each at its best lr" in lines[1] and "both at 2**-7" in lines[2]
    for line in lines[1:]:
        assert all(f"{width}: +0.{width:03}0 ± 0." in line for width in (64, 128, 256)), line
    assert "control" not in format_report(analyze(rows[:trainings]))


def test_the_intervals_of_a_report_hold_the_truth_95_times_in_100():
    """Simulated: five sizes, nine rates, two seeds, each with a share of its own in all losses; two trials
    are missing, which shifts no mean."""
    random, found = np.random.default_rng(0), []
    truth = {64: -7.4, 128: -7.3, 256: -7.45, 512: -7.5, 1024: -7.35}
    drift = np.polyfit(np.log2([*truth]), [*truth.values()], 1)[0]
    for _ in range(300):
        losses = {}
        for size, best in truth.items():
            shares = random.normal(0, 0.02, 2)
            losses[size] = {2 ** (k / 2): {seed: 0.06 * (k / 2 - best)**2 + share + random.normal(0, 0.004)
                                           for seed, share in enumerate(shares)} for k in range(-19, -10)}
        del losses[64][2**-7.5][1], losses[512][2**-8][0]
        ladder, sizes = report_module.fit_sizes(losses, 128)
        of_best = [(sizes[size]["interval"], best) for size, best in truth.items()]
        held = [low < best < high for (low, high), best in of_best]
        low, high = ladder["drift_interval"]
        found.append((low < drift < high, np.mean(held), ladder["noise"]))
    of_drift, of_sizes, noise = np.mean(found, axis=0)
    assert 0.92 < of_drift < 0.98 and 0.93 < of_sizes < 0.97
    assert noise == pytest.approx(0.004, rel=0.05)


def test_a_setting_that_depends_on_the_axis_is_no_second_axis():
    rows = ladder([-7.5, -7.5, -7.5])
    for row in rows:
        batch = row.pop("width")
        config = json.loads(row["config"]) | {"width": 128, "batch": batch, "steps": 2**20 // batch}
        row |= {"batch": batch, "config": json.dumps(config)}
    assert analyze(rows)["axis"] == "batch"


def test_the_report_picks_the_rows_of_one_setting_among_those_of_several():
    rows = ladder([-7, -7.5, -8], swept="readout_std") + ladder([-7, -7, -7], swept="embedding_lr_mult")
    for swept, drift in {"readout_std": -0.5, "embedding_lr_mult": 0.0}.items():
        report = analyze(rows, swept)
        assert report["swept"] == swept
        assert report["ladders"]["mup"]["drift"] == pytest.approx(drift, abs=1e-3)
    with pytest.raises(UserError, match="^report: the rows must vary"):
        analyze(rows)


def test_the_report_takes_what_the_sweep_says_was_swept_and_asks_where_rows_do_not_say():
    """Of two numbers that vary beside each other, only the sweep knows which one is the ladder's."""
    rows = ladder([-7, -7.5, -8], swept="readout_std")
    for row in rows:
        config = json.loads(row["config"])
        row["config"] = json.dumps(config | {"embedding_std": 0.1 * config["width"]})
    with pytest.raises(UserError, match="^report: the rows must vary"):
        analyze(rows)
    report = analyze([row | {"swept": "width readout_std seed"} for row in rows])
    assert report["swept"] == "readout_std" and len(report["ladders"]) == 3


def test_a_regret_beyond_the_grid_is_not_made_up():
    rows = ladder([-9, -6, -6])
    rows = [row for row in rows if row["width"] > 64 or json.loads(row["config"])["lr"] < 2**-7]
    assert analyze(rows)["ladders"]["mup"]["sizes"][0]["regret"] is None


def test_an_optimum_at_the_edge_is_reported_and_not_fitted():
    report = analyze(ladder([-7.5, -11.0, -3.0]))
    assert [size["edge"] for size in report["ladders"]["mup"]["sizes"]] == [False, True, True]
    text = format_report(report)
    assert text.count("at the edge") == 3 and "No drift can be told" in text.splitlines()[-1]


def test_the_report_rejects_rows_that_are_no_ladder(tmp_path):
    with pytest.raises(UserError, match="^report: the rows must vary .* nothing$"):
        analyze(ladder([-7, -7, -7])[:1])
    with pytest.raises(UserError, match="^axis must be one that varies .width., got batch$"):
        analyze(ladder([-7, -7, -7]), axis="batch")
    with pytest.raises(UserError, match="has no trials"):
        report_main([str(tmp_path)])


def test_a_grid_of_two_axes_has_a_ladder_for_each_value_of_the_one_with_fewer():
    rows = ladder([-7, -7.5, -8]) + ladder([-7, -7, -7], depth=8)
    for row in rows:
        row["depth"] = json.loads(row["config"])["depth"]
    report = analyze(rows)
    assert report["axis"] == "width" and report["ladders"].keys() == {"mup, depth=4", "mup, depth=8"}
    assert report["ladders"]["mup, depth=4"]["drift"] == pytest.approx(-0.5, abs=1e-3)
    turned = analyze(rows, axis="depth")["ladders"]
    assert turned["mup, width=256"]["drift"] == pytest.approx(1.0, abs=1e-3)


def test_choices_are_ordered_at_each_size_and_what_the_proxys_favourite_costs_is_said():
    losses = {"cosine": (4.0, 3.9, 3.8), "linear": (4.1, 3.8, 3.75), "constant": (4.3, 4.2, np.inf)}
    rows = []
    for schedule, by_width in losses.items():
        for width, loss in zip((64, 128, 256), by_width, strict=True):
            for seed in range(2):
                config = Config(width=width, seed=seed, base_width=64, schedule=schedule)
                rows.append({"parametrization": "mup", "width": width, "seed": seed, "curve": [4.0],
                             "val_loss": loss + 0.01 * seed, "diverged": not np.isfinite(loss),
                             "config": identity(config), "parameters": width**2, "flops": width**3,
                             "swept": "width schedule seed"})
    report = analyze(rows)
    sizes = report["ladders"]["mup"]["sizes"]
    assert (report["swept"], report["numeric"]) == ("schedule", False)
    assert [size["best"] for size in sizes] == ["cosine", "linear", "linear"]
    assert [size["regret"] for size in sizes] == pytest.approx([0, 0.1, 0.05])
    assert [size["rank_correlation"] for size in sizes] == pytest.approx([1, 0.5, 0.5])
    text = format_report(report)
    assert "width 256, from the best: linear, cosine, constant (rank correlation with 64: +0.50)" in text
    assert "loses up to 0.1000 nats at another size, more than two standard errors" in text
    noisy = [row | {"val_loss": row["val_loss"] + 0.2 * (i % 4 == 0)} for i, row in enumerate(rows)]
    assert "no more than two standard errors" in format_report(analyze(noisy))
    with pytest.raises(UserError, match="^shipped needs a setting that is a number"):
        analyze(rows, shipped=2**-7)
    [ax] = figures.draw_transfer(report, pyplot := figures.load_pyplot()).axes
    stars = [line.get_xydata()[0].tolist() for line in ax.lines if line.get_marker() == "*"]
    expected = [[1, 4.005], [2, 3.805], [2, 3.755]]  # of constant, cosine, linear
    assert np.array(stars) == pytest.approx(np.array(expected))
    pyplot.close("all")


def test_stars_lie_on_the_drawn_parabola_and_dots_on_the_measured_means():
    report, pyplot = analyze(ladder([-7.7, -7.5, -7.3])), figures.load_pyplot()
    for draw in (figures.draw_transfer, figures.draw_excess):
        [ax] = draw(report, pyplot).axes
        stars = [line for line in ax.lines if line.get_marker() == "*"]
        parabolas = [line for line in ax.lines if len(line.get_xdata()) == 50]
        assert len(stars) == len(parabolas) == 3
        for star, parabola in zip(stars, parabolas, strict=True):
            assert star.get_ydata()[0] == pytest.approx(min(parabola.get_ydata()), abs=1e-4)
            assert parabola.get_xdata()[0] < star.get_xdata()[0] < parabola.get_xdata()[-1]
        low, high = ax.get_ylim()
        assert all(low < star.get_ydata()[0] < high for star in stars)
    assert [star.get_ydata()[0] for star in stars] == [0, 0, 0], "above the best there is nothing below 0"
    pyplot.close("all")


def test_panels_share_a_scale_only_where_each_fills_a_good_part_of_it():
    alike = {"mup": (4.0, 4.6), "sp": (4.1, 4.7)}
    assert figures.share_scale(alike) == {"mup": (4.0, 4.7), "sp": (4.0, 4.7)}
    far = {"mup": (4.0, 4.1), "sp": (4.0, 5.0)}
    assert figures.share_scale(far) == far


def test_a_power_law_is_drawn_only_where_the_losses_follow_one():
    pyplot = figures.load_pyplot()
    sizes = np.array([1e6, 1e7, 1e8, 1e9])
    for losses, holds in ((5 * sizes**-0.05, True), (2 + 5 * sizes**-0.3, False)):
        ax = pyplot.figure().add_subplot()
        figures.plot_power_law(ax, "mup", sizes, losses, figures.line_style(0))
        assert len(ax.lines) == 1 + holds
        assert ("x^(-0.050" if holds else "no power law") in ax.lines[-1].get_label()
    pyplot.close("all")


def test_a_scatter_pairs_the_same_settings_of_two_sizes(tmp_path):
    rows = ladder([-7.7, -7.5, -5.3], seeds=2)
    losses = scatter.losses_at("width", rows)
    assert {size: len(found) for size, found in losses.items()} == {64: 11, 128: 11, 256: 11}
    near, far = scatter.pair_losses(losses, 64)
    assert (near["size"], far["size"]) == (128, 256) and near["rank"] > 0.95 > 0.5 > far["rank"]
    assert near["cost"] == 0 and far["cost"] == pytest.approx(0.1 * (2.2**2 - 0.2**2), rel=0.1)
    pairs = scatter.pair_clouds("width", rows, 64)
    path = figures.draw_scatter("width", pairs, str(tmp_path))
    assert {*os.listdir(tmp_path)} == {"scatter.png", "scatter.svg"} and path.endswith(".png")
    assert scatter.format_pairs("width", pairs).splitlines()[1].split()[:2] == ["128", "11"]
    few = scatter.format_pairs("width", [pairs[0] | {"rank_of_better_half": np.nan}])
    assert few.splitlines()[1].split()[3] == "-", "fewer than three have no order"
    with pytest.raises(UserError, match="^scatter: no two sizes have 3 trials of the same settings"):
        scatter.pair_clouds("width", ladder([-7, -7, -7])[:5], 64)


def test_a_scatter_draws_trials_whose_losses_do_not_compare_apart(tmp_path):
    """A proxy that ranks rates as its target does, and one that does not: in one cloud neither could be
    seen."""
    rows = ladder([-7, -7, -7], seeds=1) + ladder([-7, -9, -11], seeds=1, parametrization="sp")
    pairs = scatter.pair_clouds("width", rows, 64)
    assert [(pair["cloud"], pair["size"]) for pair in pairs] == [
        ("mup", 128), ("mup", 256), ("sp", 128), ("sp", 256)]
    assert [len({*pair["proxy"]}) for pair in pairs] == [len(pair["proxy"]) for pair in pairs] == [11] * 4
    assert pairs[1]["rank"] > 0.9 > pairs[3]["rank"]
    text = scatter.format_pairs("width", pairs)
    assert text.splitlines()[0] == "mup" and text.splitlines()[4] == "sp"
    other_text = ladder([-7, -7, -7], seeds=1, dataset="other")
    assert {pair["cloud"] for pair in scatter.pair_clouds("width", rows[:33] + other_text, 64)} == {
        "dataset=other", "dataset=stdlib"}


def test_a_scatter_pairs_each_folder_with_that_of_the_target_whatever_their_sizes(tmp_path):
    """A proxy of another width and context that ranks as the target does, and one that ranks otherwise."""
    for name, width, context, sign in (("near", 64, 32, 1), ("far", 128, 256, -1), ("target", 256, 256, 1)):
        rows = [row | {"config": json.dumps(json.loads(row["config"]) | {"context": context}),
                       "val_loss": sign * row["val_loss"]}
                for row in ladder([-7, -7, -7], seeds=1) if row["width"] == width and not row["diverged"]]
        (tmp_path / name).mkdir()
        append_rows(str(tmp_path / name / "trials.csv"), rows)
    folders, target = [str(tmp_path / "near"), str(tmp_path / "far")], str(tmp_path / "target")
    near, far = scatter.pair_folders(folders, target)
    assert (near["cloud"], far["cloud"]) == ("near", "far") and near["rank"] > 0.95 > -0.95 > far["rank"]
    assert near["cost"] == 0 < far["cost"]
    scatter.main([*folders, f"--target={target}", f"--to={tmp_path}"])
    assert (tmp_path / "scatter.png").exists()
    append_rows(str(tmp_path / "near" / "trials.csv"), ladder([-7, -7, -7], seeds=1))
    with pytest.raises(UserError, match="^target: .*near must hold trials of one size, got [45]"):
        scatter.pair_folders(folders, target)


@pytest.mark.parametrize(("optima", "seeds", "intervals", "sentence"), [
    ([-7, -7.02, -7], 3, 3, "The drift is within its noise"),
    ([-7, -7.5, -8], 3, 3, "The drift is larger than its noise"),
    ([-7, -7.5, -8], 1, 0, "With one seed, nothing says whether this drift is noise"),
    ([-7, -3, -3], 3, 1, "No drift can be told"),
    ([-3, -7, -7.5], 3, 2, "The drift is larger than its noise")])
def test_a_report_ends_in_a_sentence_that_says_what_its_drift_is_worth(optima, seeds, intervals, sentence):
    report = analyze(ladder(optima, seeds=seeds), base=64)
    lines = format_report(report).splitlines()
    assert sentence in lines[-1] and sum("[" in line for line in lines[2:5]) == intervals
    if optima[0] == -3:  # the proxy's own best is not known, and so not what it costs elsewhere
        assert [size["regret"] for size in report["ladders"]["mup"]["sizes"]] == [None] * 3


def test_a_scatter_of_a_grid_pairs_equal_sizes_of_the_other_axis_and_averages_over_seeds_alone():
    rows = [row for depth in (2, 4) for row in ladder([-7.7, -7.5, -7.3], seeds=2, depth=depth)]
    assert {len(found) for found in scatter.losses_at("width", rows).values()} == {22}
    held = [row | {"config": json.dumps(json.loads(row["config"]) | {"steps": 64000 // row["width"]})}
            for row in rows]
    near, far = scatter.pair_losses(scatter.losses_at("width", held), 64)
    assert len(near["proxy"]) == len(far["proxy"]) == 22, "steps that follow from the size are no setting"


def test_a_scatter_of_a_sweep_of_width_and_depth_together_pairs_its_three_sizes():
    rows = [row | {"config": json.dumps(json.loads(row["config"]) | {"depth": round(row["width"]**0.5)})}
            for row in ladder([-7.7, -7.5, -5.3])]
    near, far = scatter.pair_clouds("width", rows, 64)
    assert (near["size"], far["size"], len(near["proxy"]), len(far["proxy"])) == (128, 256, 11, 11)


def test_the_interval_of_a_rank_correlation_holds_it_and_shrinks_with_more_pairs():
    rng, slope = np.random.default_rng(0), 1.2
    drawn = [rng.standard_normal((2, 24)) for _ in range(400)]
    ranks = [fits.rank_correlation(x, slope * x + noise) for x, noise in drawn]
    x, noise = rng.standard_normal((2, 20_000))
    true = fits.rank_correlation(x, slope * x + noise)
    held = [low < true < high for low, high in (fits.rank_interval(rank, 24) for rank in ranks)]
    assert 0.92 < np.mean(held) < 0.98
    assert np.ptp(fits.rank_interval(0.8, 100)) < np.ptp(fits.rank_interval(0.8, 10))
    assert np.isnan(fits.rank_interval(0.8, 3)).all()


def test_figures_show_every_ladder_each_in_a_style_of_its_own(tmp_path):
    rows = []
    for name in ("mup", "sp", "spectral", "unit", "fourth"):
        for row in ladder([-7, -7.5, -8], seeds=1):
            rows.append(row | {"parametrization": name})
    pyplot = figures.load_pyplot()
    figure = figures.draw_size(analyze(rows), pyplot)
    lines = [line for line in figure.axes[0].lines if line.get_linestyle() == "None"]
    titles = [line.get_label().partition(":")[0] for line in lines]
    assert titles == ["fourth", "μP", "standard parametrization", "spectral", "unit"]
    assert len({line.get_marker() for line in lines}) == len({line.get_color() for line in lines}) == 5
    pyplot.close(figure)
    figure = figures.draw_transfer(analyze(rows), pyplot)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["μP", "fourth", "standard parametrization", "spectral", "unit", "", "", ""], "two rows"
    pyplot.close(figure)
    styles = {tuple(figures.line_style(i).values()) for i in range(90)}
    assert len(styles) == 90


def test_a_size_at_which_every_trial_diverged_is_in_the_report():
    rows = ladder([-7, -7.5, -8])
    for row in rows:
        row["diverged"] = row["diverged"] or row["width"] == 256
    report = analyze(rows)
    sizes = report["ladders"]["mup"]["sizes"]
    assert [size["edge"] for size in sizes] == [False, False, True]
    own = {row["parameters"] for row in rows if row["width"] == 256}
    assert own == {sizes[2]["parameters"]} != {sizes[1]["parameters"]}
    assert format_report(report).splitlines()[4].split()[-5:] == ["-", "inf", "-", "-", "-"]
    for row in rows:
        if row["width"] == 256:  # failed: it has no numbers at all
            row |= {"val_loss": np.nan, "parameters": np.nan, "flops": np.nan, "curve": []}
    report, pyplot = analyze(rows), figures.load_pyplot()
    assert all(draw(report, pyplot).axes for draw in figures.FIGURES.values())
    pyplot.close("all")


TYPING_ERRORS = {
    "sweep": {"lr=2**-8 lr=2**-9": "lr", "out=a,b": "out", "lr=1e-300..1e300": "lr",
              "lr=1..2:100000000": "lr",
              "lr=1,2 --dataset=nope.txt": "dataset", "lr=1,2 --stack=2 --dropout=0.1": "stack: dropout",
              "lr=1,2 --eval_every=5": "eval_every", "lr=1,2 --wandb=true": "wandb",
              "lr=1,2 --temperature=0.5": "temperature",
              "width,lr=1,2": "width,lr", "lr=1,2 width,lr=16x1": "lr"},
    "search": {"width=64": "width", "--space=lr,width": "space", "--space=lr:2**-6..2**-8": "space",
               "--space=warmup:0.1..2": "warmup", "--sampler=sobol": "sampler",
               "--storage=postgresql+nothing://": "storage", "--trials=²": "trials",
               "--trials=1000000000": "trials", "--workers=100000": "workers",
               "--space=zero_query,schedule": "space", "--dataset=nope.txt": "dataset",
               "--stack=2 --dropout=0.1": "stack: dropout", "--log_roles=true": "log_roles",
               "--space=warmup --warmup_tokens=9": "space",
               "--target=nope.py": "nope.py"},
    "report": {"FOLDER nofolder": "nofolder has no trials",
               "FOLDER --base=3": "base must be one of 32",
               "FOLDER --to=FILE": "out: cannot write FILE: "},
    "coordinate_check": {"--widths=64,99": "width",
                         "--widths=64,64": "coordinate_check: give --widths or --depths",
                         "--widths=64,128 --depths=2,4": "coordinate_check: give --widths or --depths"}}


@pytest.mark.parametrize(("command", "line"), [
    (name, line) for name, lines in TYPING_ERRORS.items() for line in lines])
def test_a_typing_error_is_one_line_and_nothing_is_trained(corpus, trials, tmp_path, monkeypatch, command,
                                                           line):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setattr(sweep, "train", None)
    monkeypatch.chdir(tmp_path)
    settings = [] if command in ("report", "coordinate_check") else lab_words(corpus)

    def place(text):
        return text.replace("FOLDER", str(trials.parent)).replace("FILE", str(file))

    with pytest.raises(UserError) as caught:
        importlib.import_module(f"scaling.{command}").main(replaced(settings, *place(line).split()))
    assert str(caught.value).startswith(place(TYPING_ERRORS[command][line]))
    assert sorted(os.listdir(tmp_path)) == ["file", "trials"]
    assert len(read_trials(trials.parent)) == 2


OPTIMIZERS = {"adamw": {}, "muon": {"optimizer": "muon", "lr": 2**-3, "embedding_lr_mult": 0.25,
                                    "readout_lr_mult": 1.0}}
# Sizes that suffice to tell mup from sp, and a right table from a wrong one. Muon's widths are smaller: its
# products cost most there. Three steps tell as much as the command's five
DEPTHS, WIDTHS, STEPS = (4, 16), {"adamw": (64, 192), "muon": (32, 128)}, 3
VARIANTS = [(name, "adamw") for name in BLOCKS if "gpt2 " not in name]
VARIANTS += [("default", "muon"), ("gpt2", "muon"), ("smear", "muon"), ("value_embeddings", "muon")]


def failing(config, axis="width"):
    """{layer: power of its change} where the coordinate check fails."""
    sizes = DEPTHS if axis == "depth" else WIDTHS[config.optimizer]
    rows, _ = coordinate_check(config, axis, sizes, STEPS, seeds=1)
    return {row["layer"]: row["change"] for row in rows if row["verdict"] != "PASS"}


@pytest.mark.parametrize(("optimizer", "alpha"), [("adamw", 1.0), ("adamw", 0.8), ("muon", 1.0)])
def test_the_coordinate_check_tells_mup_from_sp_over_depth_whatever_alpha(corpus, optimizer, alpha):
    config = Config(**corpus | CHECKED | OPTIMIZERS[optimizer], depth_alpha=alpha, value_embeddings=True)
    assert not failing(config, "depth")
    if alpha == 1.0:  # which sp does not have
        assert len(failing(dataclasses.replace(config, parametrization="sp"), "depth")) >= 4


@pytest.mark.parametrize(("name", "optimizer"), VARIANTS)
def test_the_coordinate_check_tells_mup_from_sp_over_width_with_every_block(corpus, name, optimizer):
    config = Config(**corpus | CHECKED | BLOCKS[name] | OPTIMIZERS[optimizer])
    assert not failing(config)
    found = failing(dataclasses.replace(config, parametrization="sp"))
    assert found["logits"] > 0.5 and len(found) >= {"adamw": 4, "muon": 1}[optimizer]


@pytest.mark.parametrize("settings", [{}, {"embedding_std": 0.5, "embedding_lr_mult": 24.0}])
def test_the_coordinate_check_passes_mup_with_tied_embeddings_however_large_they_start(corpus, settings):
    config = Config(**corpus | CHECKED | {"tied": True} | settings)
    rows, _ = coordinate_check(config, "width", (64, 256), STEPS, seeds=1)
    assert {row["verdict"] for row in rows} == {"PASS"}
    readout = next(row for row in rows if row["layer"] == "readout")
    assert abs(readout["change"]) < 0.1


@pytest.mark.parametrize(("change", "interval", "start", "verdict"), [
    (0.1, 0.2, 0.0, "PASS"), (0.3, 0.1, 0.0, "FAIL"), (-0.087, 0.317, 0.0, "UNDECIDED"),
    (0.4, 0.3, 0.0, "UNDECIDED"), (0.9, 0.3, 0.0, "FAIL"), (0.0, 0.1, 0.5, "FAIL"),
    (np.nan, np.nan, np.nan, "FAIL"), (0.0, 0.1, np.nan, "PASS")])
def test_a_row_whose_interval_is_wider_than_the_bound_is_undecided(change, interval, start, verdict):
    row = {"layer": "mlp.up", "change": change, "interval": interval, "start": start, "expected": 0.0}
    assert judge(row, lowest_power(row, [row])) == verdict


def test_an_undecided_check_says_what_would_decide_it_and_does_not_succeed(corpus, tmp_path, monkeypatch,
                                                                           capsys):
    rows = [{"layer": "mlp.up", "change": -0.087, "interval": 0.317, "start": 0.0, "expected": 0.0,
             "verdict": "UNDECIDED"}]
    monkeypatch.setattr(coordinate_check_module, "coordinate_check", lambda *of: (rows, {}))
    monkeypatch.setattr(figures, "draw_coordinate_check", lambda *of: "")
    words = ["--head_dim=16", "--widths=64,128", "--seeds=3", f"--out={tmp_path}"]
    assert coordinate_check_module.main(words) == 1
    output = capsys.readouterr().out
    assert "UNDECIDED: mlp.up" in output and "--seeds=5" in output and "--widths=64,128,256" in output
    rows[0] |= {"verdict": "PASS", "start": np.nan}
    assert coordinate_check_module.main(words) == 0
    output = capsys.readouterr().out
    assert f"within {coordinate_check_module.BOUND} " in output
    assert " - " in output and "nan" not in output, "it starts at 0, and so has no power there"
    assert "head_dim" in output, "what it cannot see"


def test_the_seeds_of_the_coordinate_check_go_on_from_the_configured_one(corpus):
    config = Config(**corpus | CHECKED)
    first, second = (coordinate_check(dataclasses.replace(config, seed=seed), "width", (64, 128), 1, 2)[1]
                     for seed in (0, 1))
    assert first["mlp.down", 1][64][1] == second["mlp.down", 1][64][0] != first["mlp.down", 1][64][0]


# A changed value of each setting; some act beside another one only. On the other settings what says that they
# do nothing here is right
CHANGED = {"seed": 1, "head_dim": 32, "position": "learned", "norm": "layer", "qk_norm": False, "mlp": "gelu",
           "mlp_ratio": 2.0, "rotary_base": 10.0, "norm_eps": 0.1, "tied": True, "bias": True, "depth": 3,
           "vocab_size": 300, "kv_heads": 1, "smear": True, "value_embeddings": True, "base_width": 32,
           "base_depth": 2, "base_head_dim": 8, "parametrization": "sp",
           "depth_alpha": 0.5, "embedding_mult": 2.0, "logit_mult": 2.0, "attention_mult": 9.0,
           "embedding_std": 0.5, "hidden_std": 0.5, "readout_std": 0.3, "zero_residual_out": False,
           "zero_query": True, "optimizer": "muon", "lr": 2**-6, "embedding_lr_mult": 2.0,
           "readout_lr_mult": 2.0, "norm_lr_mult": 2.0, "weight_decay": 0.9, "beta1": 0.5, "beta2": 0.5,
           "eps": 0.1, "momentum": 0.5, "grad_clip": 1e-4, "max_tokens": 2000, "val_fraction": 0.5,
           "precision": "bf16"}
# These name a text, a machine or a folder: what they change is tested with train()
NAMES = {"dataset", "tokenizer", "subset", "split", "text_field", "data_dir", "device", "out", "steps",
         "init_from", "width"}


def test_every_setting_changes_the_coordinate_check_or_is_rejected_by_it(corpus):
    plain = Config(**corpus | CHECKED | {"width": 32, "base_depth": 1})  # not the base, where mup is sp

    @functools.cache
    def measured(**changes):
        run = dataclasses.replace(plain, **changes)
        return str(coordinate_check_module.measure_run(short_run(run, 2), TokenDataset(prepare(run)), 2))

    for name, value in CHANGED.items():
        beside = {"optimizer": "muon"} if name == "momentum" else {}
        assert measured(**beside) != measured(**beside, **{name: value}), name
    missing = {*SETTINGS} - {*CHANGED, *NAMES, *coordinate_check_module.UNUSED}
    assert not missing, "add another value of a new setting to CHANGED"
    for name in coordinate_check_module.UNUSED - {"out", "steps"}:
        with pytest.raises(UserError, match=f"^{name} has no effect on the coordinate check"):
            coordinate_check_module.main([f"--{name}=1"])


@pytest.mark.parametrize(("command", "words"), [
    ("table", ["width=64,128", "--steps=5", "--seed=1"]), ("table", ["seed=0,1"]),
    ("lr_table", ["config/target.py", "--parametrization=sp"]),
    ("shapes", ["--eval_every=5"]), ("transfer", ["--finetune=x", "--temperature=0.5"]),
    ("coordinate_check", ["--width=64"])])
def test_a_setting_that_a_command_does_not_use_is_rejected(command, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="has no effect on"):
        importlib.import_module(f"scaling.{command}").main(words)


MUTANTS = {  # role and its wrong exponents, and the axis on which they show
    "Muon's lr": ("hidden", {"muon_lr": (-1, 0)}, "width"),
    "Muon's lr over depth": ("hidden", {"muon_lr": (0, -1)}, "depth"),
    "hidden lr": ("hidden", {"lr": (0, 0)}, "width"), "embedding lr": ("embedding", {"lr": (-1, 0)}, "width"),
    "readout lr": ("readout", {"lr": (-1, 0)}, "width"), "hidden init": ("hidden", {"std": (0, 0)}, "width"),
    "readout init": ("readout", {"std": (1, 0)}, "width"), "logits": ("logits", (0, 0), "width"),
    "norm lr": ("norm", {"lr": (-1, 0)}, "width"), "final norm lr": ("final_norm", {"lr": (1, 0)}, "width"),
    "norm lr over depth": ("norm", {"lr": (0, -1)}, "depth"),
    "value embedding lr": ("value_embedding", {"lr": (-1, 0)}, "width"),
    "value embedding lr over depth": ("value_embedding", {"lr": (0, -1)}, "depth"),
    "branch": ("branch", (0, 0), "depth"), "hidden lr over depth": ("hidden", {"lr": (-1, -1)}, "depth")}


def test_a_large_random_readout_hides_neither_a_right_table_nor_a_wrong_one(corpus, monkeypatch):
    config = Config(**corpus | {"width": 64, "base_width": 64, "context": 32})  # small embeddings by default
    rows, _ = coordinate_check(config, "width", (64, 256), STEPS, seeds=1)
    powers = {row["layer"]: row["change"] for row in rows}
    assert powers["logits"] < -0.3 and abs(powers["readout"]) < 0.2
    assert {row["verdict"] for row in rows} == {"PASS"}
    change_table(monkeypatch, "readout", {"lr": (-1, 0)})
    assert failing(config).keys() >= {"logits", "readout"}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_coordinate_check_fails_a_wrong_table(corpus, monkeypatch, name):
    key, wrong, axis = MUTANTS[name]
    change_table(monkeypatch, key, wrong)
    optimizer = "muon" if "Muon" in name else "adamw"
    assert failing(Config(**corpus | CHECKED | OPTIMIZERS[optimizer], value_embeddings="value" in name), axis)


def test_the_coordinate_check_sees_a_wrong_eps_where_eps_outweighs_the_gradients(corpus, monkeypatch):
    config = Config(**corpus | CHECKED | GPT2_BLOCK | {"eps": 0.1, "zero_residual_out": False})

    def power():
        rows, _ = coordinate_check(config, "width", (64, 256), STEPS, seeds=1)
        return next(row["change"] for row in rows if row["layer"] == "attention.qkv")

    assert abs(power()) < 0.3
    change_table(monkeypatch, "hidden", {"eps": (0, -1)})
    assert power() < -0.4


class GatedMLP(model.MLP):
    def __init__(self, config):
        super().__init__(config)
        self.gate = model.Linear(config.width, 4 * config.width, config.bias)

    def forward(self, x_BTC):
        return self.down(F.silu(self.gate(x_BTC)) * self.up(x_BTC))


@pytest.mark.parametrize(("mlp", "block", "embeddings", "of_mlp"), [
    (GatedMLP, GPT2_BLOCK, ["token_embedding", "position_embedding"], ["mlp.gate", "mlp.up"]),
    (model.MLP, {}, ["token_embedding"], ["mlp.gate_up"])])
def test_the_coordinate_check_looks_at_layers_that_are_new(corpus, monkeypatch, mlp, block, embeddings,
                                                           of_mlp):
    monkeypatch.setattr(model, "MLP", mlp)
    config = Config(**corpus | CHECKED | block)
    rows, _ = coordinate_check(config, "width", (64, 128), steps=1, seeds=2)
    gains = ["attention_norm.weight", "mlp_norm.weight", "final_norm.weight"]
    if config.qk_norm:
        gains[1:1] = ["attention.q_norm.weight", "attention.k_norm.weight"]
    assert [row["layer"] for row in rows] == [
        "logits", "readout", *embeddings, "attention.qkv", "attention logits", "attention.out", *of_mlp,
        "mlp.down", "residual stream", "final_norm", *gains]


def test_the_coordinate_check_looks_at_a_layer_whose_role_is_new(corpus, monkeypatch):
    gpt = model.GPT(Config(**corpus | CHECKED | {"vocab_size": 5}))
    known = checked_layers(gpt)
    hidden = parametrization.ROLES["hidden"]
    monkeypatch.setitem(parametrization.ROLES, "hidden", rf"(?!.*attention\.out){hidden}")
    monkeypatch.setitem(parametrization.ROLES, "attention_out", r"blocks\.\d+\.attention\.out\.weight")
    assert checked_layers(gpt) == known and "attention.out" in dict(known)


def test_the_coordinate_check_computes_attention_logits_of_grouped_queries(corpus):
    config = Config(**corpus | CHECKED | {"head_dim": 16, "qk_norm": False, "kv_heads": 2})
    _, measured = coordinate_check(config, "width", (64, 128), steps=1, seeds=2)
    assert min(measured["attention logits", 0][64]) > 0


def test_depth_moves_only_the_layers_that_residual_branches_end_in():
    config = Config(**{**CHECKED, "depth_alpha": 0.8, "zero_residual_out": False})
    powers = expected_powers(config, "depth")
    gains = {layer for layer in powers if layer.endswith("norm.weight")}
    assert gains == {"attention_norm.weight", "attention.q_norm.weight", "attention.k_norm.weight",
                     "mlp_norm.weight"}
    assert [powers[gain] for gain in gains] == pytest.approx([-0.2] * 4), "of depth blocks x depth^-0.8"
    branch = {layer for layer, power in powers.items() if power} - gains
    assert branch == {"attention.out", "mlp.down"}
    assert expected_powers(config, "depth")["mlp.down"] == pytest.approx(-0.8)
    learned = dataclasses.replace(config, zero_residual_out=True)
    assert expected_powers(learned, "depth")["mlp.down"] == pytest.approx(-1.0), "lr x depth_mult^-0.2"
    of_sp = expected_powers(dataclasses.replace(learned, parametrization="sp"), "depth")
    assert {layer for layer, power in of_sp.items() if power} == gains
    assert not any(expected_powers(learned, "width").values())
