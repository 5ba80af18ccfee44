"""Starting from trained weights: what comes along, and what cannot fit."""

import json
import os
import shutil
from dataclasses import asdict

import pytest
import torch
from conftest import column, run
from processes import replaced

import train
from configure import Config, UserError, configure, names_in


def words(settings, *names):
    return [f"--{name}={settings[name]}" for name in names or settings]


@pytest.fixture(scope="module")
def pretrained(corpus, tmp_path_factory):
    """The folder of a finished run with a BPE, whose best.pt is not its last.pt; and its Result."""
    folder = str(tmp_path_factory.mktemp("run") / "run")
    result = run(corpus, out=folder, steps=20, eval_every=10, tokenizer="bpe:280", logit_mult=1.5,
                 depth_alpha=0.5, lr=0.03, schedule="constant", embedding_lr_mult=3.0)
    shutil.copy(f"{folder}/previous.pt", f"{folder}/best.pt")
    return folder, result


@pytest.fixture(scope="module")
def other_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"Numbers such as {i} and {i * i} are no words. " * 20)
    return str(folder)


def start_words(corpus, source, text, *more):
    """The command line of a run that starts from `source` and names no shape."""
    names = "val_fraction data_dir context batch steps eval_tokens sample_tokens device".split()
    return replaced(words(corpus, *names), f"--init_from={source}", f"--dataset={text}", *more)


@pytest.mark.parametrize("name", ["", "best.pt", "last.pt"])
def test_a_run_starts_from_the_best_or_the_named_weights_of_another_on_other_text(
        corpus, pretrained, other_text, name):
    source = os.path.join(pretrained[0], name) if name else pretrained[0]
    config = configure(start_words(corpus, source, other_text, "--steps=0"))
    weights = torch.load(f"{pretrained[0]}/{name or 'best.pt'}", weights_only=True)["model"]
    started = train.train(config, quiet=True).model.state_dict()
    assert all(torch.equal(started[key], weights[key]) for key in weights)
    trained = train.train(configure(start_words(corpus, source, other_text, "--eval_every=5")), quiet=True)
    losses = [row["val_loss"] for row in trained.history if "val_loss" in row]
    assert losses[-1] < losses[0]


def test_what_starts_from_a_run_takes_its_function_its_tokenizer_and_its_optimizer(corpus, pretrained):
    run_config = configure([pretrained[0]])
    config = configure([f"--init_from={pretrained[0]}"])
    assert all(getattr(config, name) == getattr(run_config, name) for name in names_in("function"))
    assert config.tokenizer == pretrained[0] and config.embedding_lr_mult == 3.0
    assert config.lr == 0.03 and config.out is None and config.steps != run_config.steps
    given = configure([f"--init_from={pretrained[0]}", "--lr=1", "--tokenizer=bytes"])
    assert given.lr == 1 and given.tokenizer == "bytes", "what is given comes first"


def test_what_starts_from_a_run_computes_what_the_run_computed(corpus, tmp_path):
    """All that changes the function at once: with any of it lost, the first loss would be another."""
    out = str(tmp_path / "out")
    changed = {"window": 3, "norm_eps": 0.1, "rotary_base": 50.0, "mlp_ratio": 3.0, "attention_mult": 2.0,
               "logit_mult": 1.5, "embedding_mult": 2.0, "depth_alpha": 0.5, "qk_norm": False, "bias": True,
               "smear": True, "value_embeddings": True}
    before = run(corpus, out=out, base_batch=2, base_tokens=100, lr=0.03, **changed)
    words = start_words(corpus, out, corpus["dataset"], "--tokenizer=bytes", "--steps=0")
    config = configure(words)
    assert train.train(config, quiet=True).val_loss == pytest.approx(before.val_loss, abs=1e-6)
    assert {name: getattr(config, name) for name in changed} == changed
    assert (config.lr, config.base_batch, config.base_tokens) == (0.03, 2, 100), "steps are of the same size"


@pytest.mark.parametrize("change", ["width=64", "depth=1", "mlp=gelu", "logit_mult=1", "base_width=32",
                                    "smear=true", "window=4", "vocab_size=512", "tokenizer=bytes",
                                    "tokenizer=bpe:280"])
def test_what_does_not_fit_the_weights_is_rejected_by_name(corpus, pretrained, other_text, change):
    with pytest.raises(UserError, match=f"^{change.partition('=')[0]} must be .*best.pt"):
        train.train(configure(start_words(corpus, pretrained[0], other_text, f"--{change}")), quiet=True)


@pytest.mark.parametrize(("damaged", "expected"), [
    (["best.pt"], "last.pt"), (["best.pt", "last.pt"], "previous.pt"),
    (["best.pt", "last.pt", "previous.pt"], None)])
@pytest.mark.parametrize("is_gone", [False, True])
def test_a_damaged_checkpoint_of_the_source_is_named_and_the_next_one_is_used(
        pretrained, tmp_path, capsys, damaged, expected, is_gone):
    source = str(tmp_path / "run")
    shutil.copytree(pretrained[0], source)
    for name in damaged:
        os.truncate(f"{source}/{name}", 1000)
        if is_gone:
            os.remove(f"{source}/{name}")
    if expected is None:
        with pytest.raises(UserError, match="previous.pt"):
            train.load(source)
        return
    weights = torch.load(f"{source}/{expected}", weights_only=True)["model"]
    loaded = train.load(source)[0].state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    said = capsys.readouterr().err
    assert all((name in said) != is_gone for name in damaged)


def test_weights_are_not_validated_on_text_that_they_were_trained_on(corpus, pretrained, other_text):
    more = "--steps=0", "--val_fraction=0.4"
    for dataset in (corpus["dataset"], f"{other_text}:0.5,{corpus['dataset']}:0.5"):
        with pytest.raises(UserError, match="^val_fraction must be at most 0.2 .*best.pt"):
            train.train(configure(start_words(corpus, pretrained[0], dataset, *more)), quiet=True)
    few = "--steps=0", "--val_fraction=0.01"  # so few that the end of each document is held out
    with pytest.raises(UserError, match="^val_fraction must be .*best.pt"):
        train.train(configure(start_words(corpus, pretrained[0], corpus["dataset"], *few)), quiet=True)
    train.train(configure(start_words(corpus, pretrained[0], other_text, *more)), quiet=True)


def test_a_longer_context_is_taken_where_positions_are_rotary_and_a_shorter_one_always(corpus, tmp_path):
    for position, context, fits in (("rotary", 32, True), ("learned", 8, True), ("learned", 32, False)):
        source = str(tmp_path / position)
        if not os.path.exists(source):
            run(corpus, out=source, steps=1, position=position)
        config = configure(start_words(corpus, source, corpus["dataset"], f"--context={context}"))
        if fits:
            assert train.train(config, quiet=True).model.config.context == context
        else:
            with pytest.raises(UserError, match="^context must be 16"):
                train.train(config, quiet=True)


@pytest.mark.parametrize(("make", "line"), [
    (lambda folder: None, "^init_from: must be a run directory"),
    (lambda folder: folder.mkdir() or (folder / "config.json").write_text("{}"), "model_type must be"),
    (lambda folder: folder.mkdir() or (folder / "config.json").write_text(json.dumps(asdict(Config()))),
     "must be a run that has saved")])
def test_what_holds_no_run_is_rejected(corpus, tmp_path, make, line):
    make(tmp_path / "source")
    with pytest.raises(UserError, match=line):
        train.train(configure(start_words(corpus, tmp_path / "source", corpus["dataset"])), quiet=True)


def test_a_run_that_started_from_another_resumes_without_it(corpus, pretrained, other_text, tmp_path):
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    shutil.copytree(pretrained[0], source)
    steady = start_words(corpus, source, other_text, "--schedule=constant", "--warmup=0")
    uninterrupted = train.train(configure(steady), quiet=True)
    train.train(configure(replaced(steady, f"--out={out}", "--steps=3")), quiet=True)
    shutil.rmtree(source)
    resumed = train.train(configure([out, "--steps=6"]), quiet=True)
    assert column(resumed) == column(uninterrupted) and len(column(resumed)) == 6


def test_a_run_of_an_older_version_gets_its_tokenizer_when_it_is_started_again(pretrained, tmp_path):
    run_dir = str(tmp_path / "run")
    shutil.copytree(pretrained[0], run_dir)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        os.remove(f"{run_dir}/{name}")
    with pytest.raises(UserError, match=f"^tokenizer: .*python train.py {run_dir}"):
        train.load(run_dir)
    train.train(configure([run_dir]), quiet=True)
    assert train.load(run_dir)[1].vocab_size == 280
