"""What the tests share: a tiny model, a tiny corpus, and the same model written plainly."""

import csv
import functools
import math
import os
import pathlib
import random

# At these sizes a second thread gains nothing, and where cores are busy each operation waits for it
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start too

import pytest
import torch
from children import save_only

import configure
import parametrization
import train
import training.log
from configure import Config
from model import GPT

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NOUNS = "the model a teacher some student this layer that river every token one gradient".split()
VERBS = "learns reads follows forgets measures finds keeps turns into moves over".split()


# Blocks: GPT-2's, the default, and what lies one setting away from either
GPT2_BLOCK = {"position": "learned", "norm": "layer", "qk_norm": False, "mlp": "gelu"}
BLOCKS = {"default": {}, "gpt2": GPT2_BLOCK, "learned": {"position": "learned"}, "layer": {"norm": "layer"},
          "no qk_norm": {"qk_norm": False}, "relu2": {"mlp": "relu2"}, "gelu": {"mlp": "gelu"},
          "gpt2 rotary": GPT2_BLOCK | {"position": "rotary"}, "gpt2 rms": GPT2_BLOCK | {"norm": "rms"},
          "gpt2 qk_norm": GPT2_BLOCK | {"qk_norm": True}, "gpt2 swiglu": GPT2_BLOCK | {"mlp": "swiglu"},
          "smear": {"smear": True}, "value_embeddings": {"value_embeddings": True}}


# At these settings the coordinate check sees every rule: no random start hides what is learned
CHECKED = {"zero_residual_out": True, "readout_std": 0.5, "embedding_std": 1.0, "embedding_lr_mult": 8.0,
           "readout_lr_mult": 4.0, "lr": 2**-7, "width": 64, "depth": 2, "base_width": 64, "base_depth": 2,
           "base_head_dim": 16, "context": 32}


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


# The reference: each layer from its textbook formula, in float64. weight: {parameter name: its value}. A new
# kind of layer is a function here, and a line in the dict of its setting's choices.

def plain_linear(weight, name, x):
    return x @ weight[f"{name}.weight"].T + weight.get(f"{name}.bias", 0)


def plain_rms_norm(weight, name, x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight[f"{name}.weight"]


def plain_layer_norm(weight, name, x):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return x * weight[f"{name}.weight"] + weight.get(f"{name}.bias", 0)


def plain_mlp(activation):
    def mlp(weight, name, x):
        hidden = activation(plain_linear(weight, f"{name}.up", x))
        return plain_linear(weight, f"{name}.down", hidden)
    return mlp


def plain_swiglu(weight, name, x):
    both = plain_linear(weight, f"{name}.gate_up", x)
    size = both.size(-1) // 2
    gate, up = both[..., :size], both[..., size:]
    return plain_linear(weight, f"{name}.down", gate / (1 + (-gate).exp()) * up)


def plain_gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def plain_gelu_tanh(x):
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))) / 2


def plain_relu2(x):
    return torch.where(x > 0, x * x, 0)


def plain_rotary(x_BTD):
    """Each pair of channels (i, i + D/2), as a complex number, turned by position * 10000^(-2i/D)."""
    T, D = x_BTD.shape[-2:]
    turn = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    turn = torch.polar(torch.ones_like(turn), turn)  # complex numbers of length 1
    turned = torch.complex(x_BTD[..., :D // 2], x_BTD[..., D // 2:]) * turn
    return torch.cat((turned.real, turned.imag), -1)


PLAIN_NORMS = {"rms": plain_rms_norm, "layer": plain_layer_norm}
PLAIN_MLPS = {"swiglu": plain_swiglu, "relu2": plain_mlp(plain_relu2), "gelu": plain_mlp(plain_gelu),
              "gelu_tanh": plain_mlp(plain_gelu_tanh)}


def plain_attention(weight, name, x, config, factor, window, added=None):
    """Causal self-attention, one head after the other; attention logits are q . k times `factor`. A token
    sees the latest `window` tokens, itself included. `added`: to the values of all heads."""
    T, C, D = x.size(1), config.width, config.head_dim
    unseen = torch.tensor([[not 0 <= t - s < window for s in range(T)] for t in range(T)])
    qkv, outputs = plain_linear(weight, f"{name}.qkv", x), []
    heads = C // D
    kv_heads = config.kv_heads or heads
    for head in range(heads):
        shared = heads + head // (heads // kv_heads)  # of keys and values, which follow the queries
        q, k, v = (qkv[..., i * D:][..., :D] for i in (head, shared, shared + kv_heads))
        if added is not None:
            v = v + added[..., (shared - heads) * D:][..., :D]
        if config.qk_norm:
            q, k = plain_rms_norm(weight, f"{name}.q_norm", q), plain_rms_norm(weight, f"{name}.k_norm", k)
        if config.position == "rotary":
            q, k = plain_rotary(q), plain_rotary(k)
        scores = (factor * q @ k.transpose(1, 2)).masked_fill(unseen, -math.inf)
        outputs.append(scores.exp() / scores.exp().sum(-1, keepdim=True) @ v)
    return plain_linear(weight, f"{name}.out", torch.cat(outputs, -1))


def plain_logits(model, tokens_BT, branch, logits, attention):
    """Logits of `model`'s weights from the textbook formulas, in float64, with these three factors."""
    config = model.config
    weight = {name: value.double() for name, value in model.state_dict().items()}
    norm, mlp = PLAIN_NORMS[config.norm], PLAIN_MLPS[config.mlp]
    x = weight["token_embedding.weight"][tokens_BT]
    if config.position == "learned":
        x = x + weight["position_embedding.weight"][:tokens_BT.size(1)]
    x = config.embedding_mult * x
    if config.smear:
        x = torch.cat([x[:, :1], x[:, 1:] + weight["smear"] * x[:, :-1]], 1)
    for i in range(config.depth):
        block = f"blocks.{i}"
        normed = norm(weight, f"{block}.attention_norm", x)
        window = config.window if config.window and i % 2 else config.context
        added = None
        if config.value_embeddings and (config.depth - 1 - i) % 2 == 0:  # the last block, and every second
            channels = (config.kv_heads or config.width // config.head_dim) * config.head_dim
            added = weight["value_embedding.weight"][tokens_BT][..., i // 2 * channels:][..., :channels]
        x = x + branch * plain_attention(weight, f"{block}.attention", normed, config, attention, window,
                                         added)
        x = x + branch * mlp(weight, f"{block}.mlp", norm(weight, f"{block}.mlp_norm", x))
    readout = weight["token_embedding.weight" if config.tied else "readout.weight"]
    return logits * norm(weight, "final_norm", x) @ readout.T


def change_table(monkeypatch, name, exponents):
    """Give the role `name` of the mup table these exponents, or the forward factor of that name."""
    original = parametrization.TABLES["mup"]

    def changed(alpha):
        rows, forward = original(alpha)
        if name in rows:
            return rows | {name: rows[name]._replace(**exponents)}, forward
        return rows, forward | {name: exponents}

    monkeypatch.setitem(parametrization.TABLES, "mup", changed)


def run(settings, **changes):
    return train.train(Config(**settings | changes), quiet=True)


def column(result, name="train_loss"):
    return [row[name] for row in result.history if name in row]


def numbers(result):
    """Everything that two equal runs have in common, but for the weights."""
    rows = [{**row, "tokens_per_second": None} for row in result.history]
    return rows, result.val_loss, result.best_step, result.best_val_loss, result.sample


def read_rows(folder):
    """The rows of a run's metrics.csv, each {column: text}."""
    with open(os.path.join(folder, "metrics.csv"), newline="") as file:
        return list(csv.DictReader(file))


def snapshot(folder):
    """{path in `folder`: its bytes} of all files."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in pathlib.Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def compiled(monkeypatch):
    """A list of the graphs that torch.compile compiles from now on, without making machine code of them."""
    graphs, compile = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend=backend, **options))
    return graphs


@pytest.fixture
def compiled_eagerly(monkeypatch):
    """torch.compile makes no machine code, and nothing anew that an earlier test has had it compile."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.fixture(scope="session", autouse=True)
def unsynced():
    """No test cuts the power, and to wait for a disk takes longer than these runs. Processes that are killed
    in os.fsync are forks of one that has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def undrawn():
    """The picture of a run takes longer than these runs: tests/test_loss_plot.py alone draws it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.log, "draw_loss", lambda rows, name: b"")
        yield


@pytest.fixture
def unrendered():
    """The figures of scaling/ are made, but not rendered: their files are empty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", save_only(()))
        yield patch


@pytest.fixture
def rendered(unrendered):
    """Figures are rendered, where other tests of the module use `unrendered`."""
    unrendered.undo()


@pytest.fixture(autouse=True)
def no_signal_left():
    """A signal that a test raised ends the command that it is for, and no later one in this process."""
    yield
    configure.stop_signals.clear()


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
