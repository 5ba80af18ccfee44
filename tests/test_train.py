"""Training: the same numbers however a run is cut, each setting acts, and an early end loses nothing."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import GPT2_BLOCK, column, cuda, numbers, read_rows, run, snapshot
from processes import start_train, to_words, wait_for_rows

import train
from configure import Config, UserError, configure
from data.loader import TokenDataset
from data.prepare import prepare
from model import GPT
from parametrization import format_table
from training import device, run_dir
from training.checkpoint import write_checkpoint
from training.device import is_compiled, select_device
from training.evaluate import evaluate
from training.sample import write_samples
from training.schedule import lr_factor

HARD = GPT2_BLOCK | {"dropout": 0.2, "micro_batch": 2, "position": "rotary", "tied": True, "bias": True,
                     "weight_decay": 0.1}
# GPT-3's recipe: 4 sequences a step, after 9 steps (576 tokens) 8, after 13 (1,088 tokens) 12
GPT3 = {"batch": 16, "batch_start": 4, "batch_ramp_tokens": 1600, "warmup_tokens": 300, "decay_tokens": 900,
        "window": 5}
MUON = {"optimizer": "muon", "micro_batch": 2, "weight_decay": 0.1, "zero_query": True, "smear": True,
        "value_embeddings": True}


def weights(result):
    return result.model.state_dict()


def same_weights(first, second):
    return all(map(torch.equal, weights(first).values(), weights(second).values()))


def same(first, second):
    """Whether two runs are the same to the last bit."""
    assert numbers(first) == numbers(second)
    return same_weights(first, second)


def load(path):
    return torch.load(path, weights_only=True)


def copy_at_step(monkeypatch, step, folder, copy):
    """Copy the run directory `folder` when the checkpoint of this step is written: a run killed there."""
    def write_and_copy(path, content, *rest):
        write_checkpoint(path, content, *rest)
        if path.endswith("last.pt") and content["step"] == step:
            shutil.copytree(folder, copy)

    monkeypatch.setattr(run_dir, "write_checkpoint", write_and_copy)


@pytest.mark.parametrize("settings", [
    {}, HARD, MUON, GPT3, {"parametrization": "sp", "schedule": "inverse_sqrt"}],
    ids=["plain", "hard", "muon", "gpt3", "sp"])
def test_a_run_twice_or_resumed_from_a_checkpoint_is_the_uninterrupted_one(corpus, tmp_path, monkeypatch,
                                                                           settings):
    settings = corpus | settings | {"steps": 13, "checkpoint_every": 4, "eval_every": 3}
    torch.manual_seed(1)
    uninterrupted = run(settings)
    assert len(set(column(uninterrupted))) == 13
    torch.manual_seed(2)  # of which a run is independent
    copy_at_step(monkeypatch, 8, tmp_path / "run", tmp_path / "killed")
    assert same(uninterrupted, run(settings, out=str(tmp_path / "run")))
    monkeypatch.undo()
    assert same(uninterrupted, run(settings, out=str(tmp_path / "killed")))
    assert [int(row["step"]) for row in read_rows(tmp_path / "killed")] == list(range(14))
    for name in ("last.pt", "best.pt"):
        a, b = (load(tmp_path / folder / name) for folder in ("run", "killed"))
        assert a["step"] == b["step"] and all(map(torch.equal, a["model"].values(), b["model"].values()))


YOUNGER_SETTINGS = ("decay_fraction", "log_roles", "norm", "qk_norm", "mlp", "optimizer", "momentum",
                    "window", "smear", "value_embeddings", "batch_start", "batch_ramp_tokens",
                    "warmup_tokens", "decay_tokens")


def test_a_checkpoint_from_before_a_setting_was_added_resumes_to_the_same_bits(corpus, tmp_path, monkeypatch):
    settings = corpus | HARD | {"steps": 9, "checkpoint_every": 4, "eval_every": 3}  # of the old block
    copy_at_step(monkeypatch, 4, tmp_path / "run", tmp_path / "old")
    uninterrupted = run(settings, out=str(tmp_path / "run"))
    monkeypatch.undo()
    path = str(tmp_path / "old/last.pt")
    checkpoint = load(path)
    settings_file = tmp_path / "old/config.json"
    saved = json.loads(settings_file.read_text())
    for name in YOUNGER_SETTINGS:
        del checkpoint["config"][name], saved[name]
    del checkpoint["folder"]  # of its tokens, which is younger too
    write_checkpoint(path, checkpoint)
    settings_file.write_text(json.dumps(saved))
    for name, new, old in (("decay_fraction", 0.5, 0.2), ("norm", "rms", "'layer'"), ("qk_norm", True, False),
                           ("mlp", "swiglu", "'gelu'"), ("optimizer", "muon", "'adamw'")):
        with pytest.raises(UserError, match=f"^{name} must be {old}.* got {new!r}"):
            run(settings | {"out": str(tmp_path / "old"), name: new})
    assert configure([str(tmp_path / "old")]) == Config(**settings, out=str(tmp_path / "old"))
    assert same(uninterrupted, train.train(configure([str(tmp_path / "old")]), quiet=True))


@pytest.fixture(scope="module")
def long(corpus):
    """(settings of a run of a second or more, its result when nothing interrupts it)."""
    settings = corpus | HARD | {"steps": 100, "checkpoint_every": None, "eval_every": 25}
    return settings, run(settings)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_says_how_to_resume_and_resumes_to_the_same_bits(long, tmp_path, number):
    settings, uninterrupted = long
    process = start_train(settings, out=tmp_path / "run")
    wait_for_rows(process, tmp_path / "run", 20)
    process.send_signal(number)
    output, errors = process.communicate()
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert output.endswith(f"{tmp_path}/run: stopped; `python train.py {tmp_path}/run` resumes it\n")
    done = load(tmp_path / "run/last.pt")["step"]
    assert 0 < done < 100, "it should have been interrupted midway"
    assert same(uninterrupted, run(settings, out=str(tmp_path / "run")))
    rows = read_rows(tmp_path / "run")
    assert [int(row["step"]) for row in rows] == list(range(101))
    assert [float(row["train_loss"]) for row in rows[1:]] == column(uninterrupted)


@pytest.mark.parametrize(("optimizer", "micro_batch"), [("adamw", 1), ("adamw", 2), ("muon", 1)])
def test_accumulation_gives_the_whole_batchs_numbers(corpus, optimizer, micro_batch):
    settings = corpus | {"optimizer": optimizer}
    at_once, accumulated = run(settings), run(settings, micro_batch=micro_batch)
    assert column(accumulated) == pytest.approx(column(at_once), abs=1e-5)
    assert column(accumulated, "grad_norm") == pytest.approx(column(at_once, "grad_norm"), rel=1e-4)
    for a, b in zip(weights(accumulated).values(), weights(at_once).values(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-4)


def test_smear_starts_as_no_change_and_lowers_the_loss(corpus):
    settings = corpus | {"steps": 60, "embedding_lr_mult": 8.0, "embedding_std": 1.0, "lr": 2**-7}
    plain, smeared = run(settings), run(settings, smear=True)
    assert column(smeared)[0] == column(plain)[0] and smeared.val_loss < plain.val_loss - 0.02


H = math.sqrt(0.5)
SCHEDULES = {  # 10 steps, 2 of them warmup, to 0.04
    "cosine": [0.5, 1, 0.9635, 0.8594, 0.7037, 0.52, 0.3363, 0.1806, 0.0765, 0.04],
    "linear": [0.5, 1, 0.88, 0.76, 0.64, 0.52, 0.40, 0.28, 0.16, 0.04],
    "constant": [0.5] + [1] * 9,
    "inverse_sqrt": [0.5, 1, 1, 0.8660, 0.7746, 0.7071, 0.6547, 0.6124, 0.5774, 0.5477],
    "step": [0.5, 1, 1, 1, 1, 1, 0.2, 0.2, 0.04, 0.04],
    "wsd": [0.5, 1, 1, 1, 1, 1, 1, 1, 0.52, 0.04],  # the last fifth decays
    "wsd_sqrt": [0.5, 1, 1, 1, 1, 1, 1, 1, 0.3212, 0.04]}


@pytest.mark.parametrize(("settings", "expected"), [
    *(({"schedule": name}, expected) for name, expected in SCHEDULES.items()),
    ({"decay_fraction": 0.0}, [0.5] + [1] * 9), ({"decay_fraction": 0.1}, [0.5] + [1] * 8 + [0.04]),
    ({"decay_fraction": 0.5}, [0.5, 1, 1, 1, 1, 0.808, 0.616, 0.424, 0.232, 0.04]),
    ({"decay_fraction": 0.8}, SCHEDULES["linear"]), ({"decay_fraction": 1.0}, SCHEDULES["linear"]),
    # after 1, 2, 3, 4 quarters of the decay 1 - 0.96 times the square root of that
    ({"schedule": "wsd_sqrt", "decay_fraction": 0.4}, [0.5] + [1] * 5 + [0.52, 0.3212, 0.1686, 0.04])])
def test_a_schedule_has_its_shape(settings, expected):
    config = Config(**{"schedule": "wsd", "steps": 10, "warmup": 0.2, "final_lr": 0.04, **settings})
    assert [lr_factor(config, step) for step in range(10)] == pytest.approx(expected, abs=5e-5)


def test_more_steps_that_end_worse_leave_best_pt_as_it_is(corpus, tmp_path, monkeypatch):
    settings = corpus | {"schedule": "wsd", "warmup": 0.0, "out": str(tmp_path / "run")}
    numbers = {"val_error": 0.1, "val_bits_per_byte": 1.0}
    monkeypatch.setattr(train, "evaluate", lambda *_: numbers | {"val_loss": 2.9})
    run(settings, steps=10)
    before = (tmp_path / "run/best.pt").read_bytes()
    monkeypatch.setattr(train, "evaluate", lambda *_: numbers | {"val_loss": 3.1})
    result = run(settings, steps=20)
    assert (tmp_path / "run/best.pt").read_bytes() == before
    assert (result.val_loss, result.best_val_loss, result.best_step) == (3.1, 2.9, 10)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_a_schedule_never_stands_still_at_0_and_never_exceeds_the_peak(name, warmup, steps):
    config = Config(schedule=name, steps=steps, warmup=warmup, final_lr=0.1)
    lrs = [lr_factor(config, step) for step in range(steps)]
    assert 0 < min(lrs) and max(lrs) <= 1
    if warmup <= 0.5 and name in ("cosine", "linear", "wsd") and steps > 2:
        assert lrs[-1] == pytest.approx(0.1)


def test_metrics_show_the_lr_that_each_step_used(corpus):
    config = Config(**corpus, schedule="linear")
    expected = [2**-9 * lr_factor(config, step) for step in range(6)]
    assert column(run(corpus, schedule="linear"), "lr") == pytest.approx(expected)


@pytest.fixture(scope="module")
def other_files(corpus, tmp_path_factory):
    """Paths by name: a .jsonl with two text columns, made of the corpus, and a folder of other text."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "other").mkdir()
    for i in range(20):
        (folder / f"other/{i}.txt").write_text(f"{i} is not {i + 1} " * 50)
    with open(folder / "rows.jsonl", "w") as file:
        for name in sorted(os.listdir(corpus["dataset"])):
            with open(f"{corpus['dataset']}/{name}") as document:
                text = document.read()
            file.write(json.dumps({"text": text, "body": text.upper()}) + "\n")
    return {"ROWS": str(folder / "rows.jsonl"), "OTHER": str(folder / "other")}


# setting: (a changed value, what must then differ, settings of both); ROWS, OTHER and TMP stand for paths.
SETTINGS = {
    "width": (64, "shapes"), "depth": (3, "shapes"), "batch": (8, "losses"), "context": (8, "losses"),
    "batch_start": (2, "losses", {"batch_start": 1, "batch_ramp_tokens": 100}),
    "batch_ramp_tokens": (200, "losses", {"batch_start": 1, "batch_ramp_tokens": 100}),
    "window": (3, "losses"), "warmup_tokens": (99, "lrs"), "decay_tokens": (200, "lrs"),
    "head_dim": (8, "first loss"), "kv_heads": (1, "shapes"), "smear": (True, "shapes"),
    "value_embeddings": (True, "shapes"),
    "position": ("learned", "shapes"),
    "norm": ("layer", "first loss"),
    "qk_norm": (False, "shapes"), "mlp": ("relu2", "shapes"), "tied": (True, "shapes"),
    "mlp_ratio": (2.0, "shapes"), "rotary_base": (10.0, "first loss", {"embedding_std": 1.0}),
    "norm_eps": (0.1, "first loss"),
    "optimizer": ("muon", "losses"), "momentum": (0.5, "losses", {"optimizer": "muon"}),
    "bias": (True, "shapes"), "dropout": (0.5, "first loss"), "vocab_size": (300, "shapes"),
    "base_width": (32, "first loss"), "base_depth": (2, "first loss"), "base_head_dim": (16, "first loss"),
    "base_batch": (2, "losses"), "base_tokens": (99, "losses"),
    "parametrization": ("sp", "first loss"), "depth_alpha": (0.5, "first loss"),
    "lr": (2**-8, "losses"), "base_lr": (2**-8, "losses"),
    "embedding_lr_mult": (2.0, "losses"), "readout_lr_mult": (2.0, "losses"),
    "norm_lr_mult": (2.0, "losses"), "embedding_std": (0.5, "first loss"), "hidden_std": (0.5, "first loss"),
    "readout_std": (0.5, "first loss"), "zero_residual_out": (True, "first loss"),
    "zero_query": (True, "first loss", {"attention_mult": 20.0, "embedding_std": 1.0}),
    "embedding_mult": (2.0, "first loss"), "logit_mult": (2.0, "first loss"),
    "attention_mult": (9.0, "first loss", {"embedding_std": 1.0}), "weight_decay": (0.5, "losses"),
    "beta1": (0.5, "losses"), "beta2": (0.5, "losses"), "eps": (1e-2, "losses"),
    "grad_clip": (1e-3, "losses"), "warmup": (0.5, "lrs"), "schedule": ("linear", "lrs"),
    "final_lr": (0.5, "lrs"), "decay_fraction": (0.5, "lrs", {"schedule": "wsd"}),
    "dataset": ("OTHER", "losses"), "tokenizer": ("bpe:260", "shapes"),
    "subset": ("some", "error"), "split": ("test", "error"),  # only the hub has them
    "text_field": ("body", "losses", {"dataset": "ROWS"}), "max_tokens": (5000, "losses"),
    "val_fraction": (0.5, "losses"), "data_dir": ("TMP", "folders"), "steps": (5, "steps"),
    "init_from": ("nowhere", "error"), "seed": (1, "first loss"), "micro_batch": (2, "pass"),
    "eval_every": (2, "validations"),
    "eval_tokens": (256, "validations"), "checkpoint_every": (2, "checkpoints", {"out": "TMP/run"}),
    "out": ("TMP/run", "files"), "device": ("cuda:99", "error"), "precision": ("bf16", "losses"),
    "compile": ("model", "compiled"), "graph": (True, "error"), "shard": (True, "error"),
    "log_roles": (True, "columns"), "wandb": (True, "logged"), "prompt": ("of the", "sample"),
    "samples": (2, "sample"), "sample_tokens": (9, "sample"),
    "temperature": (2.0, "sample", {"seed": 3, "sample_tokens": 50}),
    "top_k": (2, "sample", {"sample_tokens": 50})}


def observe(settings, folder):
    """Everything that a run shows, by name."""
    seen, checkpoints, forward = {}, [], GPT.forward
    settings = {name: value.replace("TMP", str(folder)) if isinstance(value, str) else value
                for name, value in settings.items()}

    def watched_forward(model, tokens_BT, *rest, **options):
        if torch.is_grad_enabled():
            seen["pass"] = tuple(tokens_BT.shape)
        return forward(model, tokens_BT, *rest, **options)

    def watched_write(path, content, *rest):
        write_checkpoint(path, content, *rest)
        if path.endswith("last.pt"):
            checkpoints.append(content["step"])

    compile = torch.compile

    def watched_compile(function, **options):
        seen["compiled"] = True
        return compile(function, backend="eager")  # no machine code: that takes long, and a compiler

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "forward", watched_forward)
        patch.setattr(run_dir, "write_checkpoint", watched_write)
        patch.setattr(torch, "compile", watched_compile)
        if settings.get("wandb"):
            patch.setattr("wandb.init", lambda **options: seen.__setitem__("logged", True))
        try:
            result = run(settings)
        except UserError as error:
            return {"error": str(error)}
    losses, run_folder = column(result), folder / "run"
    return seen | {
        "losses": losses, "first loss": losses[0], "lrs": column(result, "lr"), "steps": len(losses),
        "shapes": {name: value.shape for name, value in weights(result).items()},
        "validations": column(result, "val_loss"), "sample": result.sample, "checkpoints": checkpoints,
        "columns": [*result.history[-1]], "folders": os.listdir(folder),
        "files": sorted(os.listdir(run_folder)) if run_folder.is_dir() else None}


@pytest.fixture(scope="module")
def observe_once(tmp_path_factory):
    """observe(settings), remembered: most settings are compared with the same run."""
    remembered = {}

    def observe_or_remember(settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in remembered:
            remembered[key] = observe(settings, tmp_path_factory.mktemp("observed"))
        return remembered[key]

    return observe_or_remember


def test_every_setting_has_a_case_here():
    declared = {field.name for field in dataclasses.fields(Config)}
    assert declared == set(SETTINGS), "add what a new setting changes to SETTINGS of this file"


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_changes_what_it_promises(corpus, tmp_path, other_files, observe_once, name):
    if name == "wandb":
        pytest.importorskip("wandb")
    value, what, *common = SETTINGS[name]
    settings = corpus | {"vocab_size": None if name in ("vocab_size", "tokenizer") else 257} | dict(*common)
    settings, change = ({key: other_files.get(value, value) for key, value in given.items()}
                        for given in (settings, {name: value}))
    before, after = observe_once(settings), observe(settings | change, tmp_path)
    assert before.get(what) != after.get(what)
    if what == "error":
        assert "error" not in before and after["error"].startswith(name)
    else:
        assert "error" not in before | after, after


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.2, "micro_batch": 2, "tied": True, "bias": True}],
                         ids=["plain", "hard"])
def test_settings_that_only_watch_leave_the_training_alone(corpus, tmp_path, settings):
    settings = corpus | settings | {"steps": 8}
    watched = run(settings, eval_every=1, eval_tokens=300, checkpoint_every=3, out=str(tmp_path / "run"),
                  prompt="a", sample_tokens=3, log_roles=True)
    alone = run(settings)
    assert column(watched) == column(alone) and column(watched, "grad_norm") == column(alone, "grad_norm")
    assert same_weights(watched, alone)


def test_where_there_is_no_terminal_lines_say_how_far_a_run_is(corpus, monkeypatch):
    monkeypatch.setattr(train, "LINE_SECONDS", 0)
    monkeypatch.setattr(train, "READ_SECONDS", 0)
    said = []
    monkeypatch.setattr(train.tqdm, "write", said.append)
    train.train(Config(**corpus | {"steps": 3, "sample_tokens": 0}))
    assert [line.partition(": loss ")[0] for line in said if ": loss " in line] == [
        f"step {step} of 3" for step in (1, 2, 3)]


def test_the_model_of_a_result_has_no_dropout(corpus):
    assert not run(corpus | {"dropout": 0.5}, steps=1).model.training


def test_the_seed_draws_weights_batches_dropout_and_sample_and_each_step_draws_anew(corpus, monkeypatch):
    drawn, forward = {}, GPT.forward

    def watched_forward(model, tokens_BT, *rest, **options):
        hook = model.dropout.register_forward_hook(
            lambda module, inputs, output: drawn[seed].append((output == 0).flatten().tolist()))
        value = forward(model, tokens_BT, *rest, **options)
        hook.remove()
        if torch.is_grad_enabled():
            drawn[seed].append(tokens_BT.flatten().tolist())
        return value

    for seed in (0, 1):
        drawn[seed] = []
        with monkeypatch.context() as patch:
            patch.setattr(GPT, "forward", watched_forward)
            result = run(corpus, dropout=0.5, steps=2, micro_batch=2, seed=seed, sample_tokens=0)
    drawn = [things[:8] for things in drawn.values()]  # 2 steps of 2 passes: a mask, then tokens
    for kind in (0, 1):
        every = [thing for things in drawn for thing in things[kind::2]]
        assert len(every) == 8 and all(every.count(thing) == 1 for thing in every)
    config = Config(**corpus | {"sample_tokens": 50})
    dataset = TokenDataset(prepare(config))
    samples = [write_samples(result.model, dataset.tokenizer, dataclasses.replace(config, seed=seed))
               for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]


def test_a_run_directory_holds_what_was_asked_what_was_done_and_nothing_unfinished(corpus, tmp_path):
    settings = corpus | {"out": str(tmp_path / "run"), "eval_every": 2, "steps": 5}
    result = run(settings)
    assert {*os.listdir(tmp_path / "run")} == {
        "config.json", "table.txt", "metrics.csv", "last.pt", "previous.pt", "best.pt", "sample.txt",
        "tokenizer.json", "tokenizer_config.json"}
    with open(tmp_path / "run/config.json") as file:
        assert Config(**json.load(file)) == Config(**settings)
    assert (tmp_path / "run/table.txt").read_text() == format_table(result.model) + "\n"
    assert (tmp_path / "run/sample.txt").read_text() == result.sample + "\n"
    rows = read_rows(tmp_path / "run")
    assert [(int(row["step"]), int(row["tokens"]), bool(row["val_loss"])) for row in rows] == [
        (0, 0, True), (1, 64, False), (2, 128, True), (3, 192, False), (4, 256, True), (5, 320, True)]
    best = load(tmp_path / "run/best.pt")
    assert (best["step"], min(column(result, "val_loss"))) == (result.best_step, result.best_val_loss)
    model = GPT(Config(**best["config"] | {"vocab_size": 257}))
    model.load_state_dict(best["model"])
    config, dataset = Config(**corpus), TokenDataset(prepare(Config(**corpus)))
    assert evaluate(model, dataset, config, *select_device(config))["val_loss"] == result.best_val_loss


def test_a_run_of_no_steps_is_the_untrained_model(corpus, tmp_path):
    result = run(corpus, steps=0, out=str(tmp_path / "run"))
    untrained = GPT(Config(**corpus, vocab_size=257)).state_dict()
    assert all(torch.equal(value, untrained[name]) for name, value in weights(result).items())
    assert result.val_loss == pytest.approx(math.log(257), abs=1) and len(read_rows(tmp_path / "run")) == 1


def test_evaluation_gives_one_number_however_the_run_is_cut_or_seeded(corpus):
    config = Config(**corpus)
    dataset, model = TokenDataset(prepare(config)), GPT(dataclasses.replace(config, vocab_size=257))
    expected = evaluate(model, dataset, config, *select_device(config))
    for change in {"batch": 8}, {"micro_batch": 1}, {"seed": 5}, {"steps": 99}, {"dropout": 0.5}:
        torch.manual_seed(3)
        changed = dataclasses.replace(config, **change)
        state = torch.get_rng_state()
        assert evaluate(model, dataset, changed, *select_device(config)) == expected
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:280"])
def test_validation_numbers_are_those_counted_plainly(corpus, tokenizer):
    config = Config(**corpus | {"tokenizer": tokenizer})
    dataset = TokenDataset(prepare(config))
    model = GPT(dataclasses.replace(config, vocab_size=dataset.vocab_size, dropout=0.5))
    found = evaluate(model, dataset, config, *select_device(config))
    assert model.training, "evaluation left the model in another mode"
    windows = dataset.validation_windows(16, 512)
    losses, model = [], model.eval()
    for row in torch.from_numpy(windows.astype(np.int64)):
        log_p_TV = model(row[None, :-1])[0].double().log_softmax(-1)
        losses.append(-log_p_TV[torch.arange(16), row[1:]].mean().item())
    targets = [id for id in windows[:, 1:].flat if id != dataset.eot]
    text = dataset.tokenizer.decode(targets).encode()
    assert len(losses) == len(windows) > 10
    assert found["val_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert found["val_error"] == pytest.approx(np.std(losses, ddof=1) / math.sqrt(len(losses)), rel=1e-4)
    assert found["val_bits_per_byte"] == pytest.approx(sum(losses) * 16 / math.log(2) / len(text), rel=1e-6)


def test_training_learns(corpus):
    result = run(corpus, steps=150, lr=2**-6, embedding_lr_mult=8.0, batch=16, eval_every=50)
    assert result.val_loss < 2.6 < 5 < column(result)[0]
    assert result.best_val_loss == min(column(result, "val_loss")) and not result.diverged


def test_divergence_is_reported_and_leaves_the_last_good_checkpoint(corpus, tmp_path, capsys):
    settings = corpus | {"steps": 40, "checkpoint_every": 3, "grad_clip": 0.0, "lr": 1e-3}
    good = run(settings, steps=6, out=str(tmp_path / "run"))
    checkpoint = load(tmp_path / "run/last.pt")
    checkpoint["model"]["readout.weight"] *= 1e38  # the next logits overflow
    write_checkpoint(tmp_path / "run/last.pt", checkpoint)
    result = train.train(Config(**settings, out=str(tmp_path / "run")))
    assert result.diverged and not result.stopped and result.sample == ""
    assert re.search(r"diverged at step 7, .*try a smaller --lr", capsys.readouterr().out)
    assert load(tmp_path / "run/last.pt")["step"] == 6
    assert result.best_val_loss == good.best_val_loss


@pytest.mark.parametrize("steps", [0, 4])
def test_a_start_that_is_not_finite_is_reported_too(corpus, steps, capsys):
    result = train.train(Config(**corpus | {"steps": steps, "eval_every": 2, "hidden_std": 1e30}))
    assert result.diverged and result.sample == "" and "diverged at step 0" in capsys.readouterr().out


def test_a_broken_weight_that_validation_never_meets_is_not_saved_either(corpus, tmp_path):
    settings = corpus | {"vocab_size": 300, "steps": 2, "out": str(tmp_path / "run")}  # 257 to 299: padding
    run(settings)
    checkpoint = load(tmp_path / "run/last.pt")
    checkpoint["model"]["token_embedding.weight"][299] = math.inf
    write_checkpoint(tmp_path / "run/last.pt", checkpoint)
    assert run(settings, steps=4).diverged
    assert load(tmp_path / "run/last.pt")["step"] == 2


@pytest.mark.parametrize("steps", [1, 4])
def test_a_model_that_a_step_broke_is_not_called_trained_and_never_saved(corpus, tmp_path, steps):
    result = run(corpus, steps=steps, checkpoint_every=1, warmup=0.0, lr=1e30, grad_clip=0.0,
                 out=str(tmp_path / "run"))
    assert result.diverged and result.sample == ""
    if os.path.exists(tmp_path / "run/last.pt"):
        checkpoint = load(tmp_path / "run/last.pt")
        assert all(value.isfinite().all() for value in checkpoint["model"].values())


REJECTED = {"lr": 2**-8, "width": 64, "depth": 3, "parametrization": "sp", "seed": 1, "schedule": "linear",
           "batch": 8, "context": 8, "tied": True, "dropout": 0.1, "base_width": 32, "tokenizer": "bpe:260",
           "weight_decay": 0.1, "steps": 5, "position": "learned", "norm": "layer", "qk_norm": False,
           "mlp": "gelu", "optimizer": "muon", "momentum": 0.9, "window": 9, "warmup_tokens": 99,
           "decay_tokens": 200}


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("finished") / "run")
    return folder, run(corpus, out=folder)


@pytest.mark.parametrize("name", REJECTED)
def test_a_run_is_not_resumed_under_another_setting(corpus, finished, name):
    before = snapshot(finished[0])
    with pytest.raises(UserError, match=f"^{name} .*got {REJECTED[name]!r}"):
        run(corpus, out=finished[0], **{name: REJECTED[name]})
    assert snapshot(finished[0]) == before


def test_a_run_is_not_resumed_on_other_text(corpus, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.copytree(corpus["dataset"], tmp_path / "text")
    settings = corpus | {"dataset": str(tmp_path / "text"), "out": str(tmp_path / "run2")}
    run(settings)
    with pytest.raises(UserError, match="^dataset "):
        run(settings, out=str(tmp_path / "run"))
    (tmp_path / "text/00.txt").write_text("another text under the same name")
    with pytest.raises(UserError, match="^dataset "):
        run(settings)


def test_a_finished_run_given_again_says_so_and_is_evaluated_and_sampled_and_not_trained(corpus, finished,
                                                                                         capsys):
    folder, first = finished
    before = snapshot(folder)
    again = train.train(Config(**corpus | {"out": folder, "prompt": "the "}))
    first_line = capsys.readouterr().out.splitlines()[0]
    assert first_line.startswith(f"{folder}: finished, after 6 steps; ")
    assert f"train.py {folder} --prompt=" in first_line and "--steps=12" in first_line
    assert (again.val_loss, again.history) == (first.val_loss, first.history)
    assert again.sample.startswith("the ") and again.sample != first.sample
    assert same_weights(again, first)
    assert snapshot(folder)["metrics.csv"] == before["metrics.csv"]


def test_a_run_directory_alone_is_enough_to_resume(corpus, finished, tmp_path, capsys, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert train.main(["moved", "--steps=8"]) == 0
    output = capsys.readouterr().out
    assert "moved: resuming at step 6" in output and "moved: validation loss" in output
    rows = read_rows("moved")
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    assert [float(row["train_loss"]) for row in rows][:6] == column(finished[1])


def test_what_is_about_to_happen_is_printed(corpus, capsys):
    train.train(Config(**corpus, eval_every=3))
    output = capsys.readouterr().out
    for words in (corpus["data_dir"], "training tokens", "parameters on cpu, ", "; 6 steps of 64 tokens",
                  "epochs", "role             tensors", "mup: width_mult 2, depth_mult 2",
                  "step 3: validation loss", "bits per byte"):
        assert words in output
    assert "compile" not in output, "auto says nothing where it does nothing"
    train.train(Config(**corpus), quiet=True)
    assert capsys.readouterr() == ("", "")


def test_the_fastest_device_is_chosen_and_fp32_asks_for_no_autocast(corpus):
    fastest = "cpu"
    if torch.cuda.is_available():
        fastest = "cuda"
    elif torch.backends.mps.is_available():
        fastest = "mps"
    chosen, autocast = select_device(Config(**corpus | {"device": "auto"}))
    assert chosen.type == fastest and autocast._enabled == (fastest == "cuda")
    assert not select_device(Config(device="auto", precision="fp32"))[1]._enabled


@pytest.mark.parametrize(("settings", "cpus", "environment", "set_before", "expected"), [
    ({}, 8, {}, None, 8), ({}, 4, {}, None, 4),  # not more than this process may use
    ({"width": 64, "depth": 2, "batch": 4, "context": 32}, 8, {}, None, 1),
    ({"width": 64, "depth": 2, "batch": 4, "context": 32}, 8, {"OMP_NUM_THREADS": "8"}, None, 8),
    ({}, 4, {"OMP_NUM_THREADS": "8"}, None, 8), ({}, 4, {}, 7, 7)])
def test_a_tiny_model_gets_one_thread_and_others_no_more_than_there_are_cpus(
        monkeypatch, settings, cpus, environment, set_before, expected):
    threads = [set_before or 8]
    monkeypatch.setattr(device, "TORCHS_THREADS", 8)
    monkeypatch.setattr(device, "usable_cpus", lambda: cpus)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    assert device.use_sensible_threads(Config(**settings)) == expected


@pytest.mark.parametrize(("text", "cpus"), [("200000 100000", 2), ("150000 100000", 2), ("max 100000", 6),
                                            ("-1", 6), ("100000", 1), ("", 6), ("900000 100000", 6)])
def test_the_quota_of_a_container_counts_as_its_cpus(tmp_path, monkeypatch, text, cpus):
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(device, "CPU_QUOTAS", ["/nowhere", str(tmp_path / "cpu.max")])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(6), raising=False)
    assert device.usable_cpus() == cpus


@pytest.mark.parametrize(("capabilities", "settings", "bf16", "compiled"), [
    ({"avx512_bf16": True}, {}, True, True),
    ({"amx_bf16": True}, {}, True, True),
    ({"avx512_bf16": False}, {}, False, False),
    ({"avx512_bf16": True}, {"steps": 100}, False, False),  # compiling would take longer than it saves
    ({"avx512_bf16": True}, {"steps": 100, "width": 512}, True, True),
    ({"avx512_bf16": True}, {"precision": "fp32"}, False, False),
    ({"avx512_bf16": True}, {"compile": False}, True, False),
    ({}, {"precision": "bf16", "compile": "blocks"}, True, True)])
def test_a_long_run_is_compiled_in_bf16_on_a_cpu_that_multiplies_it(monkeypatch, capabilities, settings, bf16,
                                                                    compiled):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    config = Config(**{"device": "cpu", "steps": 1400, "batch": 8, "context": 256} | settings)
    chosen, autocast = select_device(config)
    assert (autocast._enabled, is_compiled(config, chosen)) == (bf16, compiled)
    _, autocast = select_device(config, training=False)  # one token at a time is slower in bf16 there
    assert autocast._enabled == (config.precision == "bf16")


def test_weights_and_biases_gets_the_numbers_of_metrics_csv(corpus, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    result = run(corpus, wandb=True, out=str(tmp_path / "run"), eval_every=3)
    [path] = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    content = path.read_bytes()
    assert b"mup-gpt" in content and b"embedding_lr_mult" in content
    for loss in column(result):
        assert repr(loss).encode() in content
    assert repr(result.val_loss).encode() in content


def test_a_resumed_run_continues_its_run_on_weights_and_biases(corpus, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    started = []

    class Run:
        log = finish = staticmethod(lambda *_, **__: None)

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("wandb.init", lambda **options: started.append(options) or Run())
    for name, steps in (("run", 4), ("run", 6), ("other", 4)):
        run(corpus, wandb=True, out=str(tmp_path / name), steps=steps)
    first, resumed, other = (options["id"] for options in started)
    assert first == resumed != other and {options["resume"] for options in started} == {"allow"}


def test_weights_and_biases_that_cannot_begin_are_one_line_before_the_training(corpus, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    for error in (wandb.errors.CommError("no answer"), wandb.errors.AuthenticationError("bad key"),
                  ValueError("API key must be 40 characters long"), ConnectionError("no network")):
        def fail(error=error, **options):
            raise error
        monkeypatch.setattr("wandb.init", fail)
        monkeypatch.setattr("train.loop", None)
        with pytest.raises(UserError, match=f"^wandb: cannot begin .*: {error}"):
            run(corpus, wandb=True, out=str(tmp_path / "run"))


def test_documents_of_one_character_are_trained_on(corpus, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "{chr(97 + i % 26)}"}}\n' for i in range(90)))
    text = {"dataset": str(tmp_path / "rows.jsonl"), "data_dir": str(tmp_path)}
    assert run(corpus, **text).val_bits_per_byte > 0
    shortest = run(corpus, **text, context=1, eval_tokens=1)  # the end of a text: no bytes to divide by
    assert math.isfinite(shortest.val_loss) and math.isnan(shortest.val_bits_per_byte)


def test_the_first_interrupt_while_a_finished_run_samples_ends_it(corpus, monkeypatch):
    monkeypatch.setattr(train, "write_samples", lambda *arguments: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(corpus)


def test_the_script_alone_changes_how_the_process_frees_memory(corpus, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(train, "reuse_freed_memory", lambda: calls.append("script"))
    run(corpus)
    assert calls == []
    train.main([*to_words(corpus), f"--out={tmp_path}/run"])
    assert calls == ["script"]


@cuda
@pytest.mark.parametrize("compile", ["blocks", "model", False])
def test_on_cuda_bf16_trains_and_the_loss_falls(corpus, compile):
    result = run(corpus, device="cuda", compile=compile, steps=100, lr=2**-6, batch=16, head_dim=32, width=64)
    assert next(result.model.parameters()).is_cuda and result.val_loss < column(result)[0] - 1.5


@cuda
def test_cuda_in_fp32_gives_the_numbers_of_the_cpu(corpus):
    on_cuda, on_cpu = (run(corpus, device=name, precision="fp32", compile=False) for name in ("cuda", "cpu"))
    assert column(on_cuda) == pytest.approx(column(on_cpu), abs=1e-3)
    assert on_cuda.val_loss == pytest.approx(on_cpu.val_loss, abs=1e-3)


@cuda
@pytest.mark.parametrize("settings", [{}, HARD, MUON, GPT3], ids=["plain", "hard", "muon", "gpt3"])
def test_on_cuda_a_run_resumes_from_its_checkpoint(corpus, tmp_path, settings):
    settings = corpus | settings | {"device": "cuda", "compile": False, "precision": "fp32", "steps": 8}
    uninterrupted = run(settings)
    run(settings, steps=8, checkpoint_every=4, out=str(tmp_path / "run"))
    resumed = run(settings, out=str(tmp_path / "run"), steps=8)
    assert column(resumed) == pytest.approx(column(uninterrupted), abs=1e-4)


@cuda
@pytest.mark.parametrize("settings", [{}, HARD, MUON, {"precision": "bf16", "compile": "blocks"}],
                         ids=["plain", "hard", "muon", "compiled bf16"])
def test_a_step_replayed_as_a_graph_is_the_plain_step(corpus, settings):
    settings = corpus | {"device": "cuda", "compile": False, "precision": "fp32", "steps": 30} | settings
    replayed, plain = (run(settings, graph=graph) for graph in (True, False))
    noise = 1e-2 if settings["precision"] == "bf16" else 1e-4
    assert column(replayed) == pytest.approx(column(plain), abs=noise)
    assert column(replayed, "grad_norm") == pytest.approx(column(plain, "grad_norm"), rel=10 * noise)
    assert replayed.val_loss == pytest.approx(plain.val_loss, abs=noise)


@cuda
def test_a_capture_that_fails_is_reported_and_the_run_continues_without(corpus, monkeypatch, capsys):
    settings = corpus | {"device": "cuda", "compile": False, "precision": "fp32"}
    plain = run(settings, graph=False)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("not here")))
    result = train.train(Config(**settings))
    assert column(result) == pytest.approx(column(plain), abs=1e-4)
    assert "graph: fails here (RuntimeError: not here); running without" in capsys.readouterr().out
    with pytest.raises(UserError, match="^graph: fails here "):
        run(settings, graph=True)


def test_another_trial_of_a_shape_compiles_nothing_whatever_its_tuned_settings(corpus, compiled):
    settings = corpus | {"compile": "blocks", "steps": 2}
    run(settings)
    assert len(compiled) == 2, "one block for all, read_out; on a CPU, embed is not"
    for changes in ({"depth": 5}, {"parametrization": "sp"}, {"depth_alpha": 0.5}, {"base_width": 32},
                    {"lr": 2**-8, "embedding_mult": 2.0, "logit_mult": 3.0, "attention_mult": 0.5}):
        run(settings, **changes)
    assert len(compiled) == 2
    run(settings, width=64)
    assert len(compiled) == 4
    run(settings, compile="model")
    assert len(compiled) == 5, "the pass of every step, by one that changes nothing"


@cuda
def test_many_trials_over_several_shapes_leave_no_memory_behind(corpus):
    settings = corpus | {"device": "cuda", "steps": 4, "compile": False, "sample_tokens": 0}
    used = []
    for trial in range(60):
        run(settings, width=32 * (1 + trial % 3), depth=1 + trial % 2, lr=2**-(5 + trial % 7))
        used.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert used[-1][0] <= used[11][0] and used[-1][1] <= 1.1 * used[11][1]
