"""The model: one forward pass, causal, the same however it is called; and what it generates."""

import dataclasses
import math

import pytest
import torch
from conftest import BLOCKS, GPT2_BLOCK, in_double, plain_logits, tiny, tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configure import Config, UserError
from generate import Cache
from model import GPT
from parametrization import hyperparameters, param_groups
from training.model_size import model_size
from training.optimizer import build_optimizer

VARIANTS = BLOCKS | {
    "tied": {"tied": True}, "bias": {"bias": True}, "tied bias": {"tied": True, "bias": True},
    "gpt2 tied bias": GPT2_BLOCK | {"tied": True, "bias": True}, "gpt2 bias": GPT2_BLOCK | {"bias": True},
    "tied rotary bias": GPT2_BLOCK | {"tied": True, "position": "rotary", "bias": True},
    "gelu_tanh": {"mlp": "gelu_tanh"}, "window": {"window": 5}, "gpt2 window": GPT2_BLOCK | {"window": 3},
    "sp": {"parametrization": "sp"}, "multipliers": {"logit_mult": 3.0, "embedding_mult": 5.0,
                                                      "attention_mult": 2.0, "embedding_std": 1.0},
    "kv_heads": {"head_dim": 8, "kv_heads": 2, "bias": True}, "gpt2 kv_heads": GPT2_BLOCK | {"kv_heads": 1},
    "value_embeddings kv_heads": {"head_dim": 8, "kv_heads": 2, "value_embeddings": True, "depth": 4,
                                  "base_depth": 2},
    "kv_heads window": {"head_dim": 8, "kv_heads": 1, "window": 5}}
variants = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)


def lively(**settings):
    """A model in float64 in which every part matters: all weights perturbed, embeddings of size 1."""
    model = in_double(tiny(**{"embedding_std": 1.0, "hidden_std": 2.0, **settings}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@variants
def test_the_forward_pass_is_the_textbook_one(settings):
    model = lively(**settings)
    x_BT, _ = tokens(model.config)
    c = model.config
    branch, logits, attention = 0.5, 0.5, math.sqrt(8) / c.head_dim
    if c.parametrization == "sp":
        branch, logits, attention = 1, 1, 1 / math.sqrt(c.head_dim)
    plain = plain_logits(model, x_BT, branch, logits * c.logit_mult, attention * c.attention_mult)
    # queries and keys are turned in float32
    assert (model(x_BT) - plain).abs().max() < (3e-5 if c.position == "rotary" else 1e-11)


@variants
def test_the_loss_is_the_mean_cross_entropy_of_the_logits_that_generation_uses(settings):
    model = lively(**settings)
    x_BT, y_BT = tokens(model.config)
    right_BT = model(x_BT).log_softmax(-1).gather(-1, y_BT[..., None])
    assert model(x_BT, y_BT).item() == pytest.approx(-right_BT.mean().item(), rel=1e-6)


@variants
@pytest.mark.parametrize("cuts", [[16], [1] * 16, [5, 1, 1, 9], [7, 9], [15, 1]], ids=str)
@torch.no_grad()
def test_logits_read_in_pieces_through_the_cache_are_those_of_one_pass(settings, cuts):
    model = lively(**settings)
    x_BT, _ = tokens(model.config)
    in_one_pass = model(x_BT)
    for static in (False, True):
        cache = Cache(model.config.context, torch.zeros(4, dtype=torch.long), static, model.config.window)
        pieces = [model(piece_BT, cache=cache) for piece_BT in x_BT.split(cuts, dim=1)]
        # rotary angles are computed in float32, but both ways use the same ones
        assert (torch.cat(pieces, 1) - in_one_pass).abs().max() < 1e-11


@variants
@torch.no_grad()
def test_a_later_token_never_changes_an_earlier_logit_and_always_changes_its_own(settings):
    model = lively(**settings)
    x_BT, _ = tokens(model.config, batch=1)
    T = model.config.context
    changed_TT = x_BT.repeat(T, 1)  # in row t the token t is another
    changed_TT.diagonal().add_(1).remainder_(model.config.vocab_size)
    differs_TT = (model(changed_TT) - model(x_BT)).abs().amax(-1) > 1e-9
    for t in range(T):
        assert differs_TT[t].tolist() == [False] * t + [True] * (T - t), t


@pytest.mark.parametrize("settings", [{}, {"width": 256, "depth": 8}, {"tied": True}, GPT2_BLOCK,
                                      {"parametrization": "sp"}])
def test_the_untrained_loss_is_that_of_uniform_guessing_at_the_default_settings(settings):
    config = Config(**{"vocab_size": 300, "context": 32, "depth": 2, **settings})
    # random logits of size s add s^2/2 to ln V; at the base shape the readout starts at s = 1
    model, (x_BT, y_BT) = GPT(config), tokens(config, batch=32)
    loss, logits_BTV = model(x_BT, y_BT), model(x_BT)
    assert loss.item() == pytest.approx(math.log(300) + logits_BTV.var().item() / 2, abs=0.1)
    assert logits_BTV.var() < 1.1


@pytest.mark.parametrize("settings", [
    {}, GPT2_BLOCK, {"mlp": "relu2"}, {"mlp": "gelu"}, {"norm": "layer", "bias": True}, {"tied": True},
    {"parametrization": "sp", "qk_norm": False}, {"optimizer": "muon"}, VARIANTS["multipliers"]])
def test_the_model_can_memorize_one_batch(settings):
    config = tiny(**{"lr": 2**-6, "embedding_lr_mult": 4.0, **settings})
    model, (x_BT, y_BT) = GPT(config), tokens(config, batch=2)
    optimizer = build_optimizer(model)
    for _ in range(40):
        loss = model(x_BT, y_BT)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05


def test_tied_is_one_matrix_with_gradients_from_both_ends_and_the_hyperparameters_of_the_embedding():
    tied, untied = GPT(tiny(tied=True, readout_lr_mult=9.0)), GPT(tiny())
    assert "readout.weight" not in tied.state_dict()
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 64 * 32
    assert torch.equal(tied.token_embedding.weight, untied.token_embedding.weight)
    x_BT, y_BT = tokens(tied.config)
    x_BT, y_BT = x_BT % 8, y_BT % 8 + 40  # ids 40 to 47 are targets only, 0 to 7 inputs only
    tied(x_BT, y_BT).backward()
    gradient = tied.token_embedding.weight.grad.abs().sum(1)
    assert gradient[:8].min() > 0 and gradient[40:48].min() > 2 * gradient[50:].max() > 0
    group = next(g for g in param_groups(tied) if any(p is tied.token_embedding.weight for p in g["params"]))
    expected = hyperparameters(tied.config, "embedding")
    assert (group["role"], group["lr"], group["eps"]) == ("embedding", expected["lr"], expected["eps"])


@pytest.mark.parametrize("read", [17, 40])
def test_more_tokens_than_the_context_are_rejected(read):
    model = lively()
    x_BT, _ = tokens(model.config, length=read)
    with pytest.raises(UserError, match=f"context must hold all tokens .{read}"):
        model(x_BT)
    cache = Cache(16, torch.zeros(4, dtype=torch.long))
    model(x_BT[:, :16], cache=cache)
    with pytest.raises(UserError, match="context must hold"):
        model(x_BT[:, :1], cache=cache)


def test_dropout_is_active_in_training_only():
    model, plain = lively(dropout=0.5), lively()
    x_BT, _ = tokens(model.config)
    torch.manual_seed(0)
    assert not torch.equal(model(x_BT), model(x_BT))
    assert torch.equal(model.eval()(x_BT), plain(x_BT))


@pytest.mark.parametrize("part", ["embeddings", "attention", "attention's branch", "mlp's branch"])
def test_dropout_reaches_the_embeddings_the_attention_and_both_branches(part):
    model = lively(dropout=0.5)
    if part != "embeddings":
        model.dropout.eval()
    for block in model.blocks:
        block.attention.dropout *= part == "attention"
        if "branch" not in part:
            block.dropout.eval()
        other = block.mlp.down if part == "attention's branch" else block.attention.out
        if "branch" in part:
            torch.nn.init.zeros_(other.weight)
    x_BT, _ = tokens(model.config)
    assert not torch.equal(model(x_BT), model(x_BT))


@pytest.mark.parametrize("settings", [{}, {"tied": True}, GPT2_BLOCK, {"mlp": "relu2"},
                                      {"bias": True, "depth": 3}, VARIANTS["kv_heads"]])
def test_flops_per_token_are_those_that_torch_counts(settings):
    model = GPT(tiny(**{"context": 64, **settings}))
    x_BT, y_BT = tokens(model.config, batch=2)
    # MATH, as fused attention is not counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x_BT, y_BT).backward()
    assert model.flops_per_token() * x_BT.numel() == counter.get_total_flops()


@pytest.mark.parametrize("settings", [{}, {"tied": True, "bias": True}, GPT2_BLOCK | {"depth": 1},
                                      {"depth": 7, "parametrization": "sp"}, {"value_embeddings": True},
                                      {"depth": 5, "value_embeddings": True, "smear": True}])
def test_the_size_of_a_model_is_known_without_making_it(settings):
    config = tiny(**settings)
    model, size = GPT(config), model_size(config)
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.flops_per_token == model.flops_per_token()
    assert size.activations_per_token == model.activations_per_token()


def test_the_size_of_a_model_that_no_machine_could_hold_is_known_too():
    size = model_size(tiny(depth=10**9, width=2**20, context=2**20))
    assert size.parameters > 10**9 * 12 * 2**40


@pytest.mark.parametrize("settings", [{"width": 2**40}, {"width": 10**20}, {"vocab_size": 10**20},
                                      {"context": 10**20, "position": "learned"}, {"context": 10**20},
                                      {"mlp_ratio": 1e30}], ids=str)
def test_sizes_that_no_tensor_can_have_are_rejected_in_a_line(settings):
    with pytest.raises(UserError, match=f"^{[*settings][0]} must be"):
        model_size(tiny(**settings))


@pytest.mark.parametrize(("settings", "expected"), [
    # of each block 3 x 32 out of qkv, 32 into out, 4 x 32 out of up and into down; and 64 logits
    (GPT2_BLOCK, 2 * (96 + 32 + 128 + 128) + 64),
    (GPT2_BLOCK | {"vocab_size": 100, "depth": 1}, 384 + 100),
    # gates and units: 2 x 88 out of gate_up, 88 into down
    ({}, 2 * (96 + 32 + 176 + 88) + 64), ({"head_dim": 8, "kv_heads": 1}, 2 * (48 + 32 + 176 + 88) + 64)])
def test_activations_per_token_are_the_wider_side_of_each_matrix_product_and_the_logits(settings, expected):
    assert GPT(tiny(**settings)).activations_per_token() == expected


def test_the_initial_weights_depend_on_the_config_alone():
    torch.manual_seed(1)
    first = GPT(tiny(seed=3)).state_dict()
    torch.manual_seed(2)
    again, other = GPT(tiny(seed=3)).state_dict(), GPT(tiny(seed=4)).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name, weight in first.items() if weight.dim() > 1]  # vectors start at 0 or 1
    assert drawn and not any(torch.equal(first[name], other[name]) for name in drawn)


def write(model, x_BT, n, *arguments, **options):
    """x_BT and what `model` writes after it, (B, T + n)."""
    written = [*model.generate(x_BT, n, *arguments, **options)]
    return torch.cat((x_BT, torch.tensor(written, dtype=torch.long).view(-1, len(x_BT)).T), 1)


@variants
@torch.no_grad()
def test_generation_at_temperature_0_writes_the_likeliest_tokens_of_the_full_forward_pass(settings):
    model = lively(**settings)
    x_BT, _ = tokens(model.config, length=3)
    written = write(model, x_BT, 13, temperature=0)
    assert written.shape == (4, 16) and torch.equal(written[:, :3], x_BT)
    for t in range(3, 16):
        assert torch.equal(written[:, t], model(written[:, :t])[:, -1].argmax(-1))


def test_generation_depends_on_its_seed_and_no_other_random_state():
    model = lively()
    x_BT, _ = tokens(model.config, length=3)
    first = write(model, x_BT, 12, seed=5)
    state = torch.get_rng_state()
    torch.manual_seed(7)
    assert torch.equal(first, write(model, x_BT, 12, seed=5))
    assert not torch.equal(first, write(model, x_BT, 12, seed=6))
    torch.set_rng_state(state)
    write(model, x_BT, 3, seed=9)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (1.0, 3), (2.0, 500)])
def test_tokens_are_drawn_with_the_probabilities_of_temperature_and_top_k(temperature, top_k):
    model = lively(vocab_size=8, logit_mult=0.5)
    x_BT = tokens(model.config, batch=1, length=3)[0].expand(4000, -1)
    drawn = write(model, x_BT, 1, temperature, top_k)[:, -1].bincount(minlength=8) / 4000
    logits_V = model(x_BT[:1])[0, -1] / temperature
    if top_k and top_k < 8:
        logits_V[logits_V < logits_V.sort().values[-top_k]] = -math.inf
    assert (drawn - logits_V.softmax(0)).abs().max() < 0.03
    assert drawn[logits_V == -math.inf].sum() == 0


@pytest.mark.parametrize("context", [1, 2, 5, 16])
@pytest.mark.parametrize("settings", [{"position": "learned"}, {}, {"smear": True}], ids=str)
@torch.no_grad()
def test_generation_continues_past_the_context_from_its_last_half(context, settings):
    model = lively(context=context, **settings)
    x_BT, _ = tokens(model.config, length=1)
    expected, read = x_BT, 1
    for _ in range(40):
        logits_BTV = model(expected[:, -read:])
        expected = torch.cat((expected, logits_BTV[:, -1:].argmax(-1)), 1)
        read = read + 1 if read < context else max(1, context // 2)
    assert torch.equal(write(model, x_BT, 40, temperature=0), expected)


def test_a_prompt_longer_than_the_context_is_kept_and_its_end_is_read():
    model = lively()
    x_BT, _ = tokens(model.config, length=50)
    written = write(model, x_BT, 5, temperature=0)
    assert torch.equal(written[:, :50], x_BT)
    assert torch.equal(written[:, 50:], write(model, x_BT[:, -16:], 5, temperature=0)[:, 16:])


@pytest.mark.parametrize("training", [True, False])
def test_generation_uses_no_dropout_and_leaves_the_training_mode_unchanged(training):
    model = lively(dropout=0.5).train(training)
    x_BT, _ = tokens(model.config, length=3)
    assert torch.equal(write(model, x_BT, 8, temperature=0), write(lively(), x_BT, 8, temperature=0))
    assert model.training is model.blocks[0].dropout.training is training


@pytest.mark.parametrize("settings", [{"position": "learned"}, {}, {"smear": True}], ids=str)
def test_a_prompt_gets_what_it_gets_alone_whatever_the_lengths_of_the_others(settings):
    model = lively(**settings)
    prompts = [[1, 2, 3, 4, 5], [6], [7, 8]]
    together = [*zip(*model.generate(prompts, 11, temperature=0), strict=True)]
    assert together == [tuple(model.generate(prompt, 11, temperature=0)) for prompt in prompts]


def test_a_text_ends_where_the_stop_is_drawn_and_the_others_go_on():
    model = lively()
    prompts = [[1, 2, 3], [6], [7, 8]]
    free = [*zip(*model.generate(prompts, 12, temperature=0), strict=True)]
    stop = free[1][3]
    written = [*zip(*model.generate(prompts, 12, temperature=0, stop=stop), strict=True)]
    for row, unstopped in zip(written, free, strict=True):
        end = unstopped.index(stop) if stop in unstopped else 12
        assert row[:end] == unstopped[:end] and set(row[end:]) <= {stop}
    assert [*model.generate(prompts[1], 12, temperature=0, stop=stop)] == [*free[1][:free[1].index(stop)]]


def test_tokens_are_yielded_as_they_are_drawn(monkeypatch):
    model, read = lively(), []
    monkeypatch.setattr(GPT, "read_out", lambda *arguments, original=GPT.read_out: (
        read.append(1), original(*arguments))[1])
    writing = model.generate([1, 2], 10)
    assert read == [] and isinstance(next(writing), int) and len(read) == 1
    next(writing)
    assert len(read) == 2
    writing.close()
    assert not any("forward" in layer.__dict__ for layer in model.modules()), "weights scaled beforehand"


def test_a_prompt_without_tokens_is_rejected():
    for prompts in ([], [[1], []]):
        with pytest.raises(UserError, match="^prompt must"):
            next(lively().generate(prompts, 1))


def test_generating_no_tokens_returns_the_prompt():
    model = lively()
    x_BT, _ = tokens(model.config)
    assert torch.equal(write(model, x_BT, 0), x_BT)


@pytest.mark.parametrize(("change", "name"), [
    ({"vocab_size": None}, "vocab_size"), ({"position": "rotary", "head_dim": 1}, "head_dim"),
    ({"kv_heads": 3}, "kv_heads")])
def test_a_config_that_makes_no_model_is_rejected(change, name):
    with pytest.raises(UserError, match=f"^{name} must"):
        GPT(dataclasses.replace(tiny(), **change))
