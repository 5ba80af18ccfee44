"""Sampling a trained run: from its folder alone, streamed, and without changing anything in it."""

import io
import os
import shutil
import sys

import pytest
import torch
from conftest import cuda, run, tiny

import train
from configure import UserError
from data.tokenizer import build_tokenizer
from model import GPT
from training import sample as sampling


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """The folder of a finished run, away from its text and its tokens."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    text = str(folder.parent / "text")
    shutil.copytree(corpus["dataset"], text)
    run(corpus, dataset=text, data_dir=str(folder.parent / "data"), out=str(folder), tokenizer="bpe:280",
        sample_tokens=12, prompt="the ", temperature=0.9, steps=30, lr=0.02)
    shutil.rmtree(text)
    shutil.rmtree(folder.parent / "data")
    return folder


@pytest.fixture(autouse=True)
def nothing_changes(finished):
    def snapshot():
        return {name: ((finished / name).read_bytes(), os.stat(finished / name).st_mtime_ns)
                for name in os.listdir(finished)}

    before = snapshot()
    yield
    assert snapshot() == before


def ask(finished, *words, lines=None, monkeypatch=None):
    if lines is not None:
        stream = io.TextIOWrapper(io.BytesIO(lines), encoding="latin-1")
        monkeypatch.setattr(sys, "stdin", stream)
    assert train.main([str(finished), *words]) == 0


def test_a_finished_run_is_sampled_from_its_folder_alone(finished, capsys):
    ask(finished, "--temperature=0.9")
    assert capsys.readouterr().out == (finished / "sample.txt").read_text() + "\n"
    ask(finished, "--prompt=a teacher")
    first = capsys.readouterr().out
    assert first.startswith("a teacher")
    ask(finished, "--prompt", "a teacher", "--seed=1")
    assert capsys.readouterr().out != first
    ask(finished / "last.pt", "--prompt=a teacher", "--sample_tokens=0")
    assert capsys.readouterr().out == "a teacher\n\n"


def test_each_line_of_standard_input_is_a_prompt_and_gets_what_it_gets_alone(finished, capsys, monkeypatch):
    ask(finished, "--prompt=-", "--sample_tokens=5", lines=b"the model\n\nover\r\n\xff",
        monkeypatch=monkeypatch)
    together = capsys.readouterr().out
    alone = ""
    for prompt in ("the model", "over", "\ufffd"):
        ask(finished, f"--prompt={prompt}", "--sample_tokens=5")
        alone += capsys.readouterr().out
    assert together == alone


def test_several_samples_differ_and_are_set_apart(finished, capsys):
    ask(finished, "--samples=3", "--prompt=the")
    texts = capsys.readouterr().out.rstrip("\n").split(sampling.BETWEEN)
    assert len(set(texts)) == 3 and all(text.startswith("the") for text in texts)


def test_text_is_printed_as_it_is_written(finished, monkeypatch):
    printed = []
    monkeypatch.setattr("builtins.print",
                        lambda text, **options: printed.append((text, options.get("flush"))))
    ask(finished, "--prompt=the", "--sample_tokens=9")
    assert len(printed) >= 9 and all(flush for _, flush in printed[:-1])


def test_other_settings_than_those_of_sampling_are_no_sampling(finished):
    assert sampling.sampling_config([str(finished), "--prompt=a", "--steps=99"]) is None
    assert sampling.sampling_config([str(finished)]) is None
    assert sampling.sampling_config([str(finished), "--device=cpu"]) is None, "resumes there"
    assert sampling.sampling_config(["config/proxy.py", "--prompt=a"]) is None
    with pytest.raises(UserError, match="temperature"):
        sampling.sampling_config([str(finished), "--temperature=-1"])


@pytest.mark.parametrize("source", ["empty", "nope", "nope/last.pt", "deep/nope"])
def test_what_is_no_model_is_refused_by_its_path_and_no_setting_is_named_that_nobody_gave(
        tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "deep"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=source.removesuffix("/last.pt")) as caught:
        train.main([source, "--prompt=a"])
    assert "init_from" not in str(caught.value)


def test_a_character_of_several_tokens_is_streamed_when_it_is_complete():
    tokenizer = build_tokenizer("bytes")
    ids = tokenizer.encode("a\u00e9\U0001f600b")
    assert [*tokenizer.stream(ids)] == ["a", "\u00e9", "\U0001f600", "b"]
    assert [*tokenizer.stream(ids[:2])] == ["a", "\ufffd"]
    assert [*tokenizer.stream([300, *ids[:1]])] == ["a"], "an id without a token"


def test_a_sample_ends_at_an_end_of_text(monkeypatch, finished):
    model, tokenizer = train.load(str(finished))
    eot = tokenizer.eot
    monkeypatch.setattr(type(model), "generate",
                        lambda *arguments: iter([[5, 6], [eot, 7], [8, eot], [9, 9]]))
    config = sampling.Config(samples=2, prompt="x")
    assert sampling.write_samples(model, tokenizer, config) == [
        "x" + tokenizer.decode(ids) for ids in ([5], [6, 7])]


@cuda
@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_a_cuda_graph_writes_what_plain_steps_write(position):
    model = GPT(tiny(position=position, embedding_std=1.0, hidden_std=2.0)).cuda()
    graphed = sampling.faster_on_gpu(torch.device("cuda"))
    for prompts in ([[1, 2, 3]], [[1, 2, 3, 4, 5], [6], [7, 8]]):  # past the context, which is read again
        plain = [*model.generate(prompts, 40, temperature=0)]
        assert [*model.generate(prompts, 40, temperature=0, graphed=graphed)] == plain
