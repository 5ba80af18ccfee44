"""Other projects' models on our batches: what they are given, and what is said of what cannot be."""

import textwrap

import pytest
import torch
from conftest import run

from configure import Config, UserError
from data.loader import TokenDataset
from data.prepare import prepare
from scaling import peers

# What is used of either project, written anew as a bigram model that notes which tokens it is shown
HEAD = """
    import torch, torch.nn.functional as F

    class GPTConfig:
        def __init__(self, **settings):
            self.__dict__ = settings
"""
NANOGPT = HEAD + """
    seen = []

    class GPT(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config, self.table = config, torch.nn.Embedding(config.vocab_size, config.vocab_size)
            torch.nn.init.zeros_(self.table.weight)

        def configure_optimizers(self, decay, lr, betas, device_type):
            return torch.optim.AdamW(self.parameters(), lr, betas, weight_decay=decay)

        def forward(self, tokens, targets):
            if self.training and torch.is_grad_enabled():
                seen.append((tokens.clone(), targets.clone()))
            logits = self.table(tokens)
            return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""
NANOCHAT = HEAD + """
    groups = []

    def has_ve(layer, layers):
        return True

    class GPT(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
            self.smear_lambda = torch.nn.Parameter(torch.zeros(1))
            self.value_embeds = has_ve(0, config.n_layer)

        def init_weights(self):
            torch.nn.init.zeros_(self.table.weight)
            torch.nn.init.zeros_(self.smear_lambda)

        def setup_optimizer(self, unembedding_lr, embedding_lr, matrix_lr, scalar_lr, weight_decay):
            groups[:] = [
                dict(params=[self.table.weight], initial_lr=matrix_lr, lr=0.0, kind="muon", momentum=0.0),
                dict(params=[self.smear_lambda], initial_lr=1.0, lr=0.0, kind="adamw")]
            return torch.optim.SGD(groups)

        def forward(self, tokens, targets=None):
            logits = self.table(tokens) * (1 + self.smear_lambda)
            if targets is None:
                return logits
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A function that writes a folder with this source at this path in it, and returns the folder."""
    def write(source, *path):
        file = tmp_path.joinpath("clone", *path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(source))
        return str(tmp_path / "clone")

    for name in ("nanochat", "nanochat.gpt"):
        monkeypatch.delitem(peers.sys.modules, name, raising=False)
    monkeypatch.setattr(peers.sys, "path", [*peers.sys.path])
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    return write


def test_a_peer_trains_on_our_batches_and_is_measured_on_our_windows(corpus, clone, monkeypatch):
    config = Config(**corpus | {"steps": 3, "vocab_size": 300})
    made, init = [], peers.NanoGPT.__init__
    monkeypatch.setattr(peers.NanoGPT, "__init__",
                        lambda self, *arguments: made.append(self) or init(self, *arguments))
    its = peers.train_peer("nanogpt", clone(NANOGPT, "model.py"), config, 0.1)
    seen = made[0].model.forward.__func__.__globals__["seen"]
    dataset = TokenDataset(prepare(config))
    assert len(seen) == 3
    for step, (tokens_BT, targets_BT) in enumerate(seen):
        ours_BT, our_targets_BT = dataset.batch(config.seed, step, config.batch, config.context)
        assert tokens_BT.equal(ours_BT) and targets_BT.equal(our_targets_BT)
    assert 0 < its["val_loss"] < torch.tensor(dataset.vocab_size).log()  # what it had before the first step
    assert its["seconds"] > 0 and its["tokens_per_second"] > 0
    assert its["parameters"] == 300 * 300, "the stand-in's one table"
    ours = run(corpus, steps=1)  # bytes per token tell which windows these are
    assert its["val_loss"] / its["val_bits_per_byte"] == pytest.approx(ours.val_loss / ours.val_bits_per_byte)


def test_nanochats_rates_follow_its_schedule_and_the_factor(corpus, clone):
    config = Config(**corpus | {"steps": 20, "vocab_size": 64})
    folder = clone(NANOCHAT, "nanochat", "gpt.py")
    device, autocast = torch.device("cpu"), torch.autocast("cpu", enabled=False)
    peer = peers.Nanochat(folder, config, device, autocast, 4.0, plain=True)
    matrices, smear = peer.optimizer.param_groups
    peak = 4 * 0.02 * (config.batch * config.context / 2**19) ** 0.5
    rates = {0: 1 / 5, 4: 1, 7: 1, 19: 1 / 13 + 12 / 13 * 0.05}  # 5 steps up, 13 down
    momenta = {0: 0.85, 4: 0.85 + 0.12 * 4 / 400}
    tokens_BT = torch.zeros(1, 4, dtype=torch.long)
    for step, share in rates.items():
        peer.loss_of(peer.model, tokens_BT, tokens_BT + 1).backward()
        peer.update(step)
        assert matrices["lr"] == pytest.approx(peak * share)
        assert matrices["momentum"] == pytest.approx(momenta.get(step, matrices["momentum"]))
        assert peer.model.smear_lambda.item() == 0
    assert not peer.model.value_embeds
    peer.update(10)
    assert matrices["weight_decay"] == pytest.approx(0.28 / 2)


@pytest.mark.parametrize(("words", "message"), [
    (["lr=1e-3"], "peers"), (["nanogpt=nowhere", "lr=1e-3"], "nanogpt"), (["nanogpt=.", "factor=2"], "lr"),
    (["nanogpt=.", "lr=fast"], "lr"), (["nanogpt=.", "lr=1e-3", "plain"], "plain"),
    (["nanogpt=.", "lr=1e-3", "--dropout=0.1"], "dropout"),
    (["nanogpt=.", "lr=1e-3", "--weight_decay=0.1"], "weight_decay has no effect")])
def test_what_a_comparison_does_not_take_is_one_line(words, message):
    with pytest.raises(UserError, match=f"^{message}"):
        peers.main(words)


def test_a_folder_of_something_else_is_one_line(corpus, clone):
    for peer, path in (("nanogpt", ["model.py"]), ("nanochat", ["nanochat", "gpt.py"])):
        with pytest.raises(UserError, match=f"^{peer} must be a clone of .*, got .* code does not load"):
            peers.train_peer(peer, clone("x = 1", *path), Config(**corpus), 4.0)
