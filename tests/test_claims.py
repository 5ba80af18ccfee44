"""The numbers of the READMEs against the committed rows, and the README's commands."""

import importlib.util
import os
import re
import shlex
import shutil

import numpy as np
import pytest
from children import save_only
from conftest import ROOT

import train
from configure import SETTINGS, UserError, check_setting, parse_value
from scaling import claims, law_fits
from scaling.__main__ import commands
from scaling.__main__ import main as scaling_main

# Numbers with decimals that are settings of an experiment, or another's result, and so no claim of the rows
NO_CLAIM = (r"2\^-[\d.]+", r"\^-0\.32", r"α = 0\.[58]", r"ELTeC-eng 1\.0\.1", r"Linux 6\.12",
            r"Python [\d.]+( and [\d.]+)?", r"torch [\d.]+", r"ln 2048 = 7\.6", r"[\d.]+ M tokens",
            r"0\.75, 1 and 1\.5 octaves",
            r"rates 0\.7 octaves apart", r"at most 0\.3 of its blocks", r"Depth-μP \(0\.5\)",
            r"has 0\.18 and 0\.38 for text")


@pytest.fixture(scope="module")
def functions():
    """{claim: (document, function)}, which read each folder of rows once."""
    return claims.load_claims()


@pytest.fixture(scope="module")
def recomputed(functions):
    """{document: {claim: its texts}}. Laws are fitted from fewer starts: they end at the same constants."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(law_fits, "BEST_STARTS", 4)
        for name, (document, function) in functions.items():
            found.setdefault(document, {})[name] = [*map(claims.one_line, function())]
    return found


def test_each_number_that_is_claimed_is_what_its_rows_give(recomputed):
    differ = [f"{document}, {name}: the rows say {text}" for document, texts in recomputed.items()
              for name, of_claim in texts.items() for text in of_claim
              if text not in claims.read_document(document)]
    assert not differ, "\n".join(differ)


@pytest.mark.parametrize("document", ["README.md", "scaling/results/README.md",
                                      "scaling/results/DEMONSTRATIONS.md"])
def test_each_number_with_decimals_is_claimed_or_a_setting(recomputed, document):
    texts = [text for of_claim in recomputed[document].values() for text in of_claim]
    assert claims.uncovered(document, texts, NO_CLAIM) == []


def test_a_claim_whose_rows_change_is_reported_and_fails_the_command(monkeypatch, tmp_path, capsys):
    assert claims.main(["plane"]) == 0
    claim = claims.load_claims()["plane"]
    monkeypatch.setattr(claims, "load_claims", lambda: {"plane": claim})
    shutil.copytree(f"{ROOT}/scaling/results/plane", tmp_path / "plane")
    rows = tmp_path / "plane/trials.csv"
    rows.write_text(rows.read_text().replace("4.908600020222366", "4.918600020222366"))
    monkeypatch.setitem(claim[1].__globals__, "HERE", tmp_path)
    assert claims.main(["plane"]) == 1
    text = capsys.readouterr().out
    assert "the rows say\n    4.884 for μP and 4.919 for SP\n" in text
    assert "4.884 for μP and 4.909 for SP" in text.partition("the rows say")[2]
    with pytest.raises(UserError, match="^claims: plain is no claim"):
        claims.main(["plain"])


def test_a_forecasts_interval_holds_what_was_measured(functions):
    """Each size of each committed ladder, forecast from sizes of at most 0.3 of its blocks' parameters."""
    module = functions["forecasts_within_the_rows"][1].__globals__
    for kind in module["LADDERS"]:
        held, size, _ = module["forecasts"](kind)
        assert len(held) >= 4, kind
        assert held.mean() >= 0.9, kind
        assert np.median(size) < 0.15, kind


def commands_in(document):
    """The words of each Python command in the code of a document."""
    text = "".join(re.findall(r"^```\n(.*?)^```", read(document), re.MULTILINE | re.DOTALL))
    lines = re.sub(r"\\\n", " ", text).splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words[words.index(program):] for words in found for program in ("train.py", "scaling")
            if program in words]


def read(document):
    with open(f"{ROOT}/{document}", encoding="utf-8") as file:
        return file.read()


def test_each_command_of_the_readme_can_be_typed():
    typed = commands_in("README.md")
    assert len(typed) > 15
    for program, *words in typed:
        files = [word for word in words if word.startswith("config/")]
        assert all(os.path.exists(f"{ROOT}/{file}") for file in files), words
        help_text = ", --help"
        if program == "scaling":
            assert words[0] in commands(), words
            help_text += read(f"scaling/{commands()[words[0]][0]}.py")
        for flag in (word for word in words if word.startswith("--")):
            name, _, value = flag[2:].partition("=")
            if name in SETTINGS:
                check_setting(name, parse_value(name, value))
            else:
                assert f"--{name}" in help_text, flag


SMALLER = {"width=64,128,256": "width=32,64", "lr=2**-10..2**-6": "lr=2**-8..2**-6",
           "--workers=2": "--workers=1", "--trials=24": "--trials=1", "--steps=2000": "--steps=8",
           "--steps=200": "--steps=2"}


def shrunk(words, corpus):
    """The words of a command of the README, with a tiny model and text in place of its own."""
    text = {name: corpus[name] for name in ("data_dir", "device", "eval_tokens")}
    model = corpus | {"steps": 2}
    trials = {name: value for name, value in model.items() if name != "sample_tokens"}
    of_command = {
        "config/proxy.py": model, "config/small_target.py": model, "sweep": trials,
        "search": trials | {"seeds": 1},
        "config/finetune.py": text | {"steps": 2, "batch": 4, "sample_tokens": 8},
        "check": {"dataset": corpus["dataset"], "tokenizer": "bytes", "data_dir": corpus["data_dir"],
                  "widths": "64,128", "seeds": 2, "steps": 1}}
    words = [SMALLER.get(word, word) for word in words]
    own = {word[2:].partition("=")[0] for word in words}
    more = of_command.get(words[0], {})
    return [*words, *(f"--{name}={value}" for name, value in more.items() if name not in own)]


def test_the_commands_of_the_readme_run_in_their_order(corpus, tmp_path, monkeypatch):
    (tmp_path / "config").symlink_to(f"{ROOT}/config")
    shutil.copytree(corpus["dataset"], tmp_path / "my_texts")
    monkeypatch.chdir(tmp_path)
    # The figure of the coordinate check: others are rendered by tests of their commands
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save_only(("width.png",)))
    for program, *words in commands_in("README.md"):
        if "config/gpt2.py" in words or words[0] == "explore" and not importlib.util.find_spec("plotly"):
            continue  # several GPUs; an optional package
        main = train.main if program == "train.py" else scaling_main
        try:
            code = main(shrunk(words, corpus))
        except SystemExit as end:  # --help
            code = end.code
        assert code in (0, None) or words[0] == "check" and code == 1, words  # too few seeds to decide
    assert {"proxy", "mine", "finetune", "wide", "search", "small_target", "first"} <= {*os.listdir("out")}
