"""What the tests share: a tiny model, a tiny corpus, and the same model written plainly."""

import math
import os
import random

# At these sizes a second thread gains nothing, and where cores are busy each operation waits for it
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start too

import pytest
import torch
import torch.nn.functional as F

import train
from configure import Config
from model import GPT

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

NOUNS = "the model a teacher some student this layer that river every token one gradient".split()
VERBS = "learns reads follows forgets measures finds keeps turns into moves over".split()


def tiny(**settings):
    """A Config at which no rule is the identity: width_mult 2, depth_mult 2, heads twice the base's."""
    return Config(**{"width": 32, "depth": 2, "head_dim": 16, "base_width": 16, "base_depth": 1,
                     "base_head_dim": 8, "vocab_size": 64, "context": 16, "batch": 4, **settings})


def tokens(config, batch=4, seed=0, length=None):
    """(tokens_BT, targets_BT), drawn evenly from the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    rows_BT = torch.randint(config.vocab_size, (batch, (length or config.context) + 1), generator=generator)
    return rows_BT[:, :-1], rows_BT[:, 1:]


def in_double(config):
    """A model in float64, its factors too."""
    torch.set_default_dtype(torch.float64)
    try:
        return GPT(config)
    finally:
        torch.set_default_dtype(torch.float32)


def plain_logits(model, tokens_BT, branch, logits, attention):
    """Logits of `model`'s weights from the textbook formulas, in float64, with these three factors."""
    config = model.config
    weight = {name: value.double() for name, value in model.state_dict().items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * weight[f"{name}.weight"] + weight.get(f"{name}.bias", 0)

    def linear(x, name):
        return x @ weight[f"{name}.weight"].T + weight.get(f"{name}.bias", 0)

    T, D = tokens_BT.size(1), config.head_dim
    x = weight["token_embedding.weight"][tokens_BT]
    if config.position == "learned":
        x = x + weight["position_embedding.weight"][:T]
    x = config.embedding_mult * x
    turn = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    turn = torch.polar(torch.ones_like(turn), turn)  # complex numbers of length 1
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for i in range(config.depth):
        qkv = linear(norm(x, f"blocks.{i}.attention_norm"), f"blocks.{i}.attention.qkv")
        outputs = []
        for head in range(config.width // D):
            q, k, v = (qkv[..., j * config.width + head * D:][..., :D] for j in range(3))
            if config.position == "rotary":
                q, k = (torch.complex(z[..., :D // 2], z[..., D // 2:]) * turn for z in (q, k))
                q, k = (torch.cat((z.real, z.imag), -1) for z in (q, k))
            scores = (attention * q @ k.transpose(1, 2)).masked_fill(future, -math.inf)
            outputs.append(scores.exp() / scores.exp().sum(-1, keepdim=True) @ v)
        x = x + branch * linear(torch.cat(outputs, -1), f"blocks.{i}.attention.out")
        hidden = F.gelu(linear(norm(x, f"blocks.{i}.mlp_norm"), f"blocks.{i}.mlp.up"))
        x = x + branch * linear(hidden, f"blocks.{i}.mlp.down")
    readout = weight["token_embedding.weight" if config.tied else "readout.weight"]
    return logits * norm(x, "final_norm") @ readout.T


def run(settings, **changes):
    return train.train(Config(**settings | changes), quiet=True)


def column(result, name="train_loss"):
    return [row[name] for row in result.history if name in row]


@pytest.fixture
def compiled(monkeypatch):
    """A list of the graphs that torch.compile compiles from now on, without making machine code of them."""
    graphs, compile = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend=backend, **options))
    return graphs


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Settings of a tiny run: 40 generated documents as bytes, in a folder of their own."""
    folder, choose = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for i in range(40):
        words = [choose.choice(NOUNS if j % 3 else VERBS) for j in range(120)]
        (folder / f"{i:02}.txt").write_text(" ".join(words).capitalize() + ".\n")
    return {"dataset": str(folder), "tokenizer": "bytes", "val_fraction": 0.2, "width": 32, "depth": 2,
            "data_dir": str(tmp_path_factory.mktemp("prepared")), "head_dim": 16, "base_width": 16,
            "base_depth": 1, "base_head_dim": 8, "context": 16, "batch": 4, "steps": 6, "eval_tokens": 512,
            "sample_tokens": 8, "device": "cpu"}


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="kill, damage and draw a thousand times")
