"""The parametrization: each rule is the one of the papers, and takes effect.

The checks are functions, so that the same ones can be seen to fail when the code does not follow the table. A
coordinate check sees no error in weight decay; comparing with the table retyped here does.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import BLOCKS, GPT2_BLOCK, in_double, plain_logits, tiny, tokens

import model as model_module
import parametrization
import train
from configure import Config, UserError, complete_saved
from data.loader import TokenDataset, prefetch_batches
from data.prepare import prepare
from model import GPT, mlp_width
from parametrization import (
    ROLES,
    format_table,
    forward_multipliers,
    hyperparameters,
    param_groups,
    role_of,
)
from scaling.plane import register
from training import optimizer as optimizer_module
from training.device import batches_on_device, select_device
from training.optimizer import build_optimizer
from training.schedule import LearningRate, lr_factor


@pytest.fixture
def own_tables(monkeypatch):
    """Points of the plane between sp and mup that a test registers are forgotten after it."""
    monkeypatch.setattr(parametrization, "TABLES", dict(parametrization.TABLES))


# Width x 4 and depth x 8 from a base of width 16, 4 channels a head and 1 block; heads x 4.
SHAPE = {"width": 64, "depth": 8, "head_dim": 16, "base_width": 16, "base_depth": 1, "base_head_dim": 4}
UNITS = {"lr": 1.0, "weight_decay": 1.0, "eps": 1.0, "embedding_std": 1.0}
# role: (std, lr, lr x weight decay, eps), retyped: arXiv 2203.03466 Table 8 for 1/4 and 4, arXiv 2505.01618
# Table 1 for 8, arXiv 2512.22382 for the eps of embedding and readout. 0.35355 is 8^-1/2.
PAPERS = {
    ("mup", 1.0): {
        "embedding": (1, 1, 1, 0.25), "hidden": (0.125, 0.25, 1, 0.03125), "norm": (None, 1, 0, 0.03125),
        "bias": (None, 1, 0, 0.03125), "final_norm": (None, 1, 0, 0.25), "readout": (0.25, 1, 1, 0.25),
        "factors": (0.125, 0.25, 0.125)},
    ("mup", 0.5): {
        "embedding": (1, 1, 1, 0.25), "hidden": (0.125, 0.0883883, 0.353553, 0.0883883),
        "norm": (None, 0.353553, 0, 0.0883883), "bias": (None, 0.353553, 0, 0.0883883),
        "final_norm": (None, 1, 0, 0.25), "readout": (0.25, 1, 1, 0.25), "factors": (0.353553, 0.25, 0.125)},
    ("mup", 0.0): {
        "embedding": (1, 1, 1, 0.25), "hidden": (0.125, 0.03125, 0.125, 0.25), "norm": (None, 0.125, 0, 0.25),
        "bias": (None, 0.125, 0, 0.25), "final_norm": (None, 1, 0, 0.25), "readout": (0.25, 1, 1, 0.25),
        "factors": (1, 0.25, 0.125)},
    ("sp", 1.0): {
        "embedding": (1, 1, 1, 1), "hidden": (0.125, 1, 1, 1), "norm": (None, 1, 0, 1),
        "bias": (None, 1, 0, 1), "final_norm": (None, 1, 0, 1), "readout": (0.125, 1, 1, 1),
        "factors": (1, 1, 0.25)},
    ("sp_scaled", 1.0): {  # sp, every rate / 4, as is usual for a larger model
        "embedding": (1, 0.25, 0.25, 1), "hidden": (0.125, 0.25, 0.25, 1), "norm": (None, 0.25, 0, 1),
        "bias": (None, 0.25, 0, 1), "final_norm": (None, 0.25, 0, 1), "readout": (0.125, 0.25, 0.25, 1),
        "factors": (1, 1, 0.25)},
    ("sp_per_layer", 1.0): {  # sp, with the rates of 2407.05872 for full alignment
        "embedding": (1, 1, 1, 1), "hidden": (0.125, 0.25, 1, 1), "norm": (None, 1, 0, 1),
        "bias": (None, 1, 0, 1), "final_norm": (None, 1, 0, 1), "readout": (0.125, 0.25, 1, 1),
        "factors": (1, 1, 0.25)},
}
# (lr, lr x weight decay) of the hidden matrices under Muon: no power of 4, as their updates are scaled by
# sqrt(fan_out / fan_in) (arXiv 2512.05620), and AdamW's of 8. Everything else is as above.
MUON = {("mup", 1.0): (1, 1), ("mup", 0.5): (0.353553, 0.353553), ("mup", 0.0): (0.125, 0.125),
        ("sp", 1.0): (1, 1), ("sp_scaled", 1.0): (0.25, 0.25),
        ("sp_per_layer", 1.0): (1, 1)}
# As embedding, with the powers of 8 that the branches bring in: hidden's
VALUE_EMBEDDING = {("mup", 1.0): (None, 1, 1, 0.03125), ("mup", 0.5): (None, 0.353553, 0.353553, 0.0883883),
                   ("mup", 0.0): (None, 0.125, 0.125, 0.25), ("sp", 1.0): (None, 1, 1, 1),
                   ("sp_scaled", 1.0): (None, 0.25, 0.25, 1), ("sp_per_layer", 1.0): (None, 1, 1, 1)}
VARIANTS = [*BLOCKS.values(), {"tied": True}, {"bias": True}, {"parametrization": "sp"},
            {"tied": True, "bias": True, "dropout": 0.1, "depth_alpha": 0.5},
            GPT2_BLOCK | {"tied": True, "bias": True, "position": "rotary", "depth_alpha": 0.5}]
VARIANTS += [settings | {"optimizer": "muon"} for settings in VARIANTS]


def check_table():
    """The optimizer's groups and the forward factors are PAPERS', with Muon MUON's where it steps."""
    for (name, alpha), rows in PAPERS.items():
        rows = rows | {"value_embedding": VALUE_EMBEDDING[name, alpha]}
        for optimizer in ("adamw", "muon"):
            config = tiny(**SHAPE, **UNITS, bias=True, parametrization=name, depth_alpha=alpha,
                          optimizer=optimizer, value_embeddings=True)
            check_rows(config, rows, MUON[name, alpha] if optimizer == "muon" else rows["hidden"][1:3])


def check_rows(config, rows, hidden_rates):
    """The groups of `config` have the numbers of `rows`, but for the rates of the hidden matrices."""
    groups = {group["role"]: group for group in build_optimizer(GPT(config)).param_groups}
    assert {*groups} == {*rows} - {"factors"}
    for role, group in groups.items():
        std, *rates, eps = rows[role]
        if role == "hidden":
            rates = hidden_rates
        got = group["lr"], group["lr"] * group["weight_decay"], group["eps"]
        assert got == pytest.approx((*rates, eps), rel=1e-5), (config, role)
        assert hyperparameters(config, role)["std"] == pytest.approx(std)
        assert ("momentum" in group) == (config.optimizer == "muon" and role == "hidden")
    assert tuple(forward_multipliers(config).values()) == pytest.approx(rows["factors"], rel=1e-5)


def check_init():
    """The spread of each drawn matrix is its row's: 1/sqrt(fan_in) for a hidden one, of any fan-in."""
    expected = {"token_embedding": 1, "position_embedding": 1, "readout": 0.25, "attention.qkv": 0.125,
                "attention.out": 0.125, "mlp.up": 0.125, "mlp.gate_up": 0.125}
    for block, down in ((GPT2_BLOCK, 0.0625), ({}, 0.0771517)):  # 256^-1/2, 168^-1/2
        expected["mlp.down"] = down
        model = GPT(tiny(**SHAPE, **block, embedding_std=1.0, vocab_size=256, context=128))
        for name, weight in model.named_parameters():
            if weight.dim() > 1:  # vectors start at 0 or 1
                std = expected[name.removesuffix(".weight").split(".", 2 * name.startswith("blocks"))[-1]]
                assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel()), name
                noise = 5 / math.sqrt(2 * weight.numel())
                assert weight.std().item() == pytest.approx(std, rel=noise), name


def check_forward():
    """The factors of the table are where the formulas have them."""
    for block, noise in ((GPT2_BLOCK, 1e-9), ({}, 1e-5)):  # queries and keys are turned in float32
        model = in_double(tiny(**SHAPE, **block, depth_alpha=0.5))
        x_BT, _ = tokens(model.config)
        expected = plain_logits(model, x_BT, 0.353553390593, 0.25, 0.125)
        assert torch.allclose(model(x_BT), expected, rtol=1e-6, atol=noise)


CHECKS = [check_table, check_init, check_forward]


@pytest.mark.parametrize("check", CHECKS)
def test_the_parametrization_follows_the_papers(check):
    check()


def unscaled(self, x):
    return F.linear(x, self.weight, self.bias)


def wrapped(module, name, change):
    return lambda patch: patch.setattr(module, name, change(getattr(module, name)))


def same_for_all_groups(key, value):
    return wrapped(optimizer_module, "param_groups", lambda original: lambda model: [
        group | {key: value} for group in original(model)])


WRONG_CODE = {  # the table is right, and the code does not do what it says
    "width_mult typed by hand": (wrapped(parametrization, "scale",
                                         lambda f: lambda c, exponents: c.depth_mult ** exponents[1]),
                                 [check_table, check_init, check_forward]),
    "depth_mult typed by hand": (wrapped(parametrization, "scale",
                                         lambda f: lambda c, exponents: c.width_mult ** exponents[0]),
                                 [check_table, check_forward]),
    "fan-in of mlp.down is the width": (wrapped(model_module, "hyperparameters",
                                                lambda f: lambda c, role, fan_in=None: f(c, role)),
                                        [check_init]),
    "one lr for all groups": (same_for_all_groups("lr", 2**-7), [check_table]),
    "one decay for all groups": (same_for_all_groups("weight_decay", 1.0), [check_table]),
    "one eps for all groups": (same_for_all_groups("eps", 0.1), [check_table]),
    "layers forget their factor": (lambda patch: patch.setattr(model_module.Linear, "forward", unscaled),
                                   [check_forward]),
}


@pytest.mark.parametrize(("name", "check"), [(n, check) for n, (_, c) in WRONG_CODE.items() for check in c])
def test_code_that_does_not_follow_the_table_is_noticed(monkeypatch, name, check):
    WRONG_CODE[name][0](monkeypatch)
    with pytest.raises(AssertionError):
        check()


def observe_steps(config, steps=3):
    """(groups, forward factors, losses, weights) of `steps` optimizer steps."""
    torch.manual_seed(0)
    model = GPT(config)
    optimizer, losses = build_optimizer(model), []
    groups = [{k: v for k, v in group.items() if k != "params"} for group in param_groups(model)]
    for step in range(steps):
        losses.append(model(*tokens(config, seed=step)))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return groups, forward_multipliers(config), torch.stack(losses).tolist(), weights


@pytest.mark.parametrize("settings", [
    *(settings for settings in VARIANTS if "parametrization" not in settings),
    {"depth_alpha": 0.5, "weight_decay": 0.1, "lr": 2**-6, "readout_lr_mult": 4.0, "attention_mult": 0.5},
    {"optimizer": "muon", "depth_alpha": 0.5, "weight_decay": 0.1, "lr": 2**-6, "zero_query": True}])
def test_at_the_base_shape_mup_and_its_controls_are_the_same_run_to_the_last_bit(settings):
    config = tiny(**{"base_width": 32, "base_depth": 2, "base_head_dim": 16, **settings})
    controls = (*({"parametrization": name} for name in ("sp", "sp_scaled", "sp_per_layer")),
                {"parametrization": "sp", "base_lr": config.lr})
    mup, sp, *others = (observe_steps(dataclasses.replace(config, **control), steps=steps)
                        for control, steps in zip(({}, *controls), (3, 3, 1, 1, 1), strict=True))
    assert len(set(mup[2])) == 3
    assert mup[:3] == sp[:3] and torch.equal(mup[3], sp[3])
    for control in others:  # equal rates, factors and first losses make the rest equal
        assert mup[:2] == control[:2] and mup[2][:1] == control[2]


@pytest.mark.parametrize("settings", [{}, {"tied": True, "bias": True, "weight_decay": 0.1},
                                      {"optimizer": "muon"}, GPT2_BLOCK | {"depth_alpha": 0.3}])
def test_the_corners_of_the_plane_between_sp_and_mup_are_sp_and_mup_to_the_last_bit(settings, own_tables):
    corner = observe_steps(tiny(**settings, parametrization=register(0, 0)))
    control = observe_steps(tiny(**settings, parametrization="sp"))
    other = observe_steps(tiny(**settings))
    assert corner[:3] == control[:3] and torch.equal(corner[3], control[3])
    assert other[2] != control[2] and not torch.equal(other[3], control[3])


def test_between_sp_and_mup_init_and_updates_have_exponents_of_their_own(own_tables):
    """Typed by hand from Tensor Programs V, Table 3 (no multipliers: those of the logits are in the numbers
    here): over width the readout starts as m^-1/2 in SP and m^-1 in μP, and takes steps of 1 and of m^-1."""
    m = 4
    expected = {  # (init, updates): powers of m: readout at the start, its steps, steps of hidden matrices
        (0, 0): (-0.5, 0, 0), (1, 1): (-1, -1, -1), (1, 0): (-1, 0, 0),
        (0, 1): (-0.5, -1, -1), (0.5, 0.25): (-0.75, -0.25, -0.25)}
    for (init, lr), powers in expected.items():
        config = tiny(width=m * 16, base_width=16, base_depth=2, depth=2, lr=1.0,
                      parametrization=register(init, lr), readout_std=4.0, hidden_std=1.0)
        logits = forward_multipliers(config)["logits"]
        readout, hidden = hyperparameters(config, "readout"), hyperparameters(config, "hidden")
        got = logits * readout["std"], logits * readout["lr"], hidden["lr"]
        assert got == pytest.approx([m ** power for power in powers]), (init, lr)
        assert hidden["std"] == pytest.approx(1 / 8) and hyperparameters(config, "embedding")["lr"] == 1


def test_a_point_of_the_plane_has_a_table_once_it_is_registered_and_is_read_from_older_settings(own_tables):
    older = {"parametrization": "mup", "mup_init": 0.25, "mup_lr": 1.0}
    assert complete_saved(older)["parametrization"] == "plane_0.25_1"
    config = tiny(parametrization="plane_0.25_1")
    with pytest.raises(UserError, match="^parametrization must be .* scaling.plane"):
        hyperparameters(config, "hidden")
    assert register(0.25, 1.0) == "plane_0.25_1" and hyperparameters(config, "hidden")
    assert complete_saved(older | {"mup_init": 1})["parametrization"] == register(1, 1) == "mup"


@pytest.mark.parametrize("settings", VARIANTS)
def test_every_parameter_is_in_exactly_one_group_and_that_is_the_group_of_its_role(settings):
    model = GPT(tiny(**settings))
    roles = {}
    for group in param_groups(model):
        for parameter in group["params"]:
            roles.setdefault(id(parameter), []).append(group["role"])
    assert {id(p): [role_of(name)] for name, p in model.named_parameters()} == roles


ROLE_OF_NAME = {  # as a reader of the table would say it
    "token_embedding.weight": "embedding", "position_embedding.weight": "embedding", "smear": "embedding",
    "value_embedding.weight": "value_embedding",
    "blocks.1.mlp.up.weight": "hidden", "blocks.10.mlp.down.weight": "hidden",
    "blocks.0.mlp.gate_up.weight": "hidden", "blocks.1.mlp.gate_up.bias": "bias",
    "blocks.0.attention.q_norm.weight": "norm", "blocks.12.attention.k_norm.weight": "norm",
    "blocks.0.attention.qkv.weight": "hidden", "blocks.11.attention.out.weight": "hidden",
    "blocks.0.attention_norm.weight": "norm", "blocks.0.mlp_norm.weight": "norm",
    "blocks.0.mlp_norm.bias": "bias", "blocks.0.mlp.up.bias": "bias",
    "final_norm.weight": "final_norm", "final_norm.bias": "final_norm", "readout.weight": "readout"}


@pytest.mark.parametrize("name", ROLE_OF_NAME)
def test_each_kind_of_parameter_has_its_role(name):
    assert role_of(name) == ROLE_OF_NAME[name]


def edited(part, name, made):
    """model.py's module class `part` with the attribute `name` more, as a researcher would add it."""
    class Edited(getattr(model_module, part)):
        def __init__(self, config):
            super().__init__(config)
            setattr(self, name, made(config))
    return Edited


@pytest.mark.parametrize(("part", "attribute", "made", "name"), [
    ("MLP", "gain", lambda c: torch.nn.Parameter(torch.ones(c.width)), "blocks.0.mlp.gain"),
    ("Block", "skip", lambda c: torch.nn.Parameter(torch.ones(1)), "blocks.0.skip"),
    ("Block", "low", lambda c: torch.nn.Linear(c.width, 8, bias=False), "blocks.0.low.weight")])
def test_a_new_parameter_without_a_role_is_rejected_by_name(monkeypatch, part, attribute, made, name):
    monkeypatch.setattr(model_module, part, edited(part, attribute, made))
    with pytest.raises(UserError, match=f"parameter {name} must have one role"):
        GPT(tiny())


def test_a_parameter_with_two_roles_is_rejected_by_name(monkeypatch):
    monkeypatch.setitem(ROLES, "norm", r".*norm\.weight")
    with pytest.raises(UserError, match="parameter final_norm.weight must .* norm and final_norm"):
        GPT(tiny())


def test_a_role_that_a_table_lacks_is_named():
    with pytest.raises(UserError, match="^parametrization.py: role gate .* no row .*mup"):
        hyperparameters(tiny(), "gate")


def test_a_role_with_a_row_but_without_a_factor_on_lr_is_rejected(own_tables):
    def with_gate(a):
        roles, factors = parametrization.mup(a)
        return roles | {"gate": roles["hidden"]}, factors

    parametrization.TABLES["mup"] = with_gate
    with pytest.raises(UserError, match="^parametrization.py: role gate .*base_lr_mult"):
        hyperparameters(tiny(), "gate")


def test_a_norm_added_inside_attention_is_not_treated_as_a_hidden_matrix(monkeypatch):
    monkeypatch.setattr(model_module, "Attention", edited(
        "Attention", "v_norm", lambda c: torch.nn.LayerNorm(c.head_dim, bias=False)))
    try:
        model = GPT(tiny())
    except UserError as error:
        assert "blocks.0.attention.v_norm.weight" in str(error)
    else:
        assert torch.equal(model.blocks[0].attention.v_norm.weight, torch.ones(16))


def test_a_matrix_added_to_the_mlp_is_initialized_by_its_own_fan_in(monkeypatch):
    monkeypatch.setattr(model_module, "MLP", edited(
        "MLP", "gate", lambda c: torch.nn.Linear(2 * c.width, 4 * c.width, bias=False)))
    gate = GPT(tiny(width=64)).blocks[0].mlp.gate.weight
    assert gate.std().item() == pytest.approx(1 / math.sqrt(2 * 64), rel=0.03)


@pytest.mark.parametrize(("setting", "column", "roles"), [
    ("lr", "lr", set(ROLES)), ("embedding_lr_mult", "lr", {"embedding", "value_embedding"}),
    ("readout_lr_mult", "lr", {"readout"}), ("norm_lr_mult", "lr", {"norm", "bias", "final_norm"}),
    ("eps", "eps", set(ROLES)), ("weight_decay", "weight_decay", set(ROLES) - {"norm", "bias", "final_norm"}),
    ("embedding_std", "std", {"embedding"}), ("hidden_std", "std", {"hidden"}),
    ("readout_std", "std", {"readout"})])
@pytest.mark.parametrize("name", ["mup", "sp"])
def test_a_tuned_setting_scales_the_quantities_of_its_own_roles_and_no_others(name, setting, column, roles):
    config = tiny(bias=True, parametrization=name, weight_decay=0.5)
    changed = dataclasses.replace(config, **{setting: 3 * getattr(config, setting)})
    for role in ROLES:
        before, after = hyperparameters(config, role), hyperparameters(changed, role)
        expected = before | ({column: pytest.approx(3 * before[column])} if role in roles else {})
        assert after == expected, role


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_with_base_lr_the_lr_moves_hidden_matrices_alone(optimizer):
    config = tiny(bias=True, parametrization="sp", optimizer=optimizer, lr=0.01, base_lr=0.02)
    as_the_proxy, lower = dataclasses.replace(config, lr=0.02), dataclasses.replace(config, lr=0.001)
    for role in ROLES:
        held = hyperparameters(as_the_proxy, role)
        expected = held | ({"lr": pytest.approx(0.001)} if role == "hidden" else {})
        assert hyperparameters(lower, role) == expected, role


# Batch x 16 and tokens x 32: (lr, weight decay, eps, beta2), retyped: square roots of the batch (arXiv
# 2205.10287, 2405.13698, 2512.22382), 0.32988 = 32^-0.32 (2409.19913) and 0.0947323 = 32^-0.68, so that lr x
# decay x steps stays; 0.851458 = 0.99^16, one half-life in tokens (2507.07101)
BATCH_AND_HORIZON = [({}, (1, 1, 1, 0.99)), ({"base_batch": 4}, (4, 4, 0.25, 0.851458)),
                     ({"base_tokens": 3200}, (0.32988, 0.0947323, 5.65685, 0.99)),
                     ({"base_batch": 4, "base_tokens": 3200}, (1.31951, 0.378929, 1.41421, 0.851458))]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("bases", "expected"), BATCH_AND_HORIZON, ids=["none", "batch", "tokens", "both"])
def test_the_rule_for_batch_and_horizon_is_that_of_the_literature_for_every_role(bases, expected, optimizer):
    shape = {"batch": 64, "context": 16, "steps": 100, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.99}
    plain, scaled = (tiny(**shape, **base, bias=True, optimizer=optimizer) for base in ({}, bases))
    for role in ROLES:
        before, after = hyperparameters(plain, role), hyperparameters(scaled, role)
        lr, decay, eps, beta2 = expected
        assert after == before | {
            "lr": pytest.approx(lr * before["lr"], rel=1e-5),
            "eps": pytest.approx(eps * before["eps"], rel=1e-5),
            "weight_decay": pytest.approx(decay * before["weight_decay"], rel=1e-5),
            "betas": (0.8, pytest.approx(beta2, rel=1e-5))}, role


@pytest.mark.parametrize(("settings", "named"), [
    ({"steps": 1}, []), ({"base_batch": 8}, []), ({"batch": 32, "base_batch": 8}, []),
    ({"batch": 2, "base_batch": 8}, []), ({"batch": 64, "base_batch": 8}, ["base_batch is 8"]),
    ({"batch": 1, "base_batch": 8}, ["base_batch is 0.125"]), ({"steps": 100, "base_batch": 8}, []),
    ({"steps": 100, "base_tokens": 100 * 8 * 16}, []),
    ({"steps": 100, "base_tokens": 50 * 8 * 16}, ["base_tokens is 2"]),
    ({"steps": 9601, "base_batch": 4}, ["steps: 9,601"]), ({"steps": 9600, "base_batch": 4}, []),
    ({"steps": 599, "batch": 1024, "base_batch": 8}, ["base_batch is 128", "steps: 599"])], ids=str)
def test_the_printed_table_says_where_batch_or_steps_lie_beyond_what_was_measured(settings, named):
    table = format_table(GPT(tiny(**{"batch": 8, "steps": 1000, **settings}))).splitlines()
    beyond = table[2 + [line.startswith("mup:") for line in table[1:]].index(True):]
    assert len(beyond) == len(named)
    assert all(name in line for name, line in zip(named, beyond, strict=True))


def test_a_run_by_the_batch_rule_equals_the_run_with_its_numbers_set_by_hand(corpus):
    settings = corpus | {"batch": 8, "lr": 2**-8, "weight_decay": 0.5, "beta2": 0.9, "eps": 2**-24}
    rule = train.train(Config(**settings, base_batch=2), quiet=True)
    by_hand = settings | {"lr": 2**-7, "weight_decay": 1.0, "beta2": 0.9**4, "eps": 2**-25}
    assert rule.val_loss == train.train(Config(**by_hand), quiet=True).val_loss
    assert rule.val_loss != train.train(Config(**by_hand | {"beta2": 0.9}), quiet=True).val_loss


@pytest.mark.parametrize(("setting", "qk_norm", "zeroed"), [
    ("zero_residual_out", True, {"attention.out.weight": slice(None), "mlp.down.weight": slice(None)}),
    ("zero_query", False, {"attention.qkv.weight": slice(0, 32)}),
    ("zero_query", True, {"attention.q_norm.weight": slice(None)})])
def test_what_is_set_to_start_at_zero_does_and_all_other_weights_stay_the_same(setting, qk_norm, zeroed):
    plain = dict(GPT(tiny(bias=True, qk_norm=qk_norm)).named_parameters())
    for name, weight in GPT(tiny(bias=True, qk_norm=qk_norm, **{setting: True})).named_parameters():
        expected = plain[name].detach().clone()
        rows = next((rows for end, rows in zeroed.items() if name.endswith(end)), slice(0))
        assert expected[rows].abs().sum() > 0 or rows == slice(0)
        expected[rows] = 0
        assert torch.equal(weight, expected), name


@pytest.mark.parametrize("qk_norm", [True, False])
def test_with_zero_query_attention_starts_uniform_and_queries_learn(monkeypatch, qk_norm):
    model, attend, weights = GPT(tiny(zero_query=True, qk_norm=qk_norm)), F.scaled_dot_product_attention, []

    def recorded(q_BHTD, k_BHTD, v_BHTD, scale, **options):
        future_TT = torch.ones(q_BHTD.size(2), q_BHTD.size(2), dtype=torch.bool).triu(1)
        logits_BHTT = scale * q_BHTD @ k_BHTD.transpose(-1, -2)
        weights.append(logits_BHTT.masked_fill(future_TT, -math.inf).softmax(-1))
        return attend(q_BHTD, k_BHTD, v_BHTD, scale=scale, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    optimizer, batch = build_optimizer(model), tokens(model.config)
    for _ in range(2):
        model(*batch).backward()
        optimizer.step()
    uniform_TT = torch.ones(16, 16).tril() / torch.arange(1, 17)[:, None]
    assert torch.allclose(weights[0], uniform_TT.expand_as(weights[0]), rtol=1e-6)
    assert (weights[2] - uniform_TT).abs().max() > 1e-6, "the first block, one step later"


@pytest.mark.parametrize("mlp", ["swiglu", "relu2", "gelu"])
def test_each_kind_of_mlp_has_8_times_width_squared_parameters_within_1_percent(mlp):
    for width in (96, 128, 192, 320, 512, 768, 1024, 1600, 2048, 4096, 6144, *range(136, 1024, 8)):
        hidden = mlp_width(Config(width=width, head_dim=8, base_width=8, base_head_dim=8, mlp=mlp))
        matrices = 3 if mlp == "swiglu" else 2
        assert matrices * hidden / (8 * width) == pytest.approx(1, abs=0.01), width
        rounded = 64 * round(8 * width / 3 / 64)
        if mlp == "swiglu" and abs(rounded / (8 * width / 3) - 1) <= 0.01:
            assert hidden == rounded
        assert hidden % 8 == 0
    parameters = dict(GPT(tiny(width=64, mlp=mlp)).blocks[0].mlp.named_parameters())
    expected = {"gate_up.weight": (336, 64), "down.weight": (64, 168)}
    if mlp != "swiglu":
        expected = {"up.weight": (256, 64), "down.weight": (64, 256)}
    assert {name: tuple(p.shape) for name, p in parameters.items()} == expected


def test_below_width_96_swiglu_is_off_by_at_most_half_of_8_units():
    for width in range(8, 96, 8):
        hidden = mlp_width(Config(width=width, head_dim=8, base_width=8, base_head_dim=8))
        assert abs(hidden - 8 * width / 3) <= 4 and hidden % 8 == 0


@pytest.mark.parametrize("schedule", ["cosine", "inverse_sqrt", "wsd"])
def test_groups_keep_their_ratio_while_the_schedule_moves_them(corpus, schedule):
    config = tiny(**corpus | {"vocab_size": 257, "schedule": schedule, "warmup": 0.3, "steps": 8,
                              "embedding_lr_mult": 16.0})
    model, dataset = GPT(config), TokenDataset(prepare(config))
    peaks, optimizer = [group["lr"] for group in param_groups(model)], build_optimizer(model)
    device, autocast = select_device(config)
    learning_rate = LearningRate(optimizer, config)
    for step, batch in enumerate(batches_on_device(prefetch_batches(dataset, config, 0), device)):
        assert learning_rate.set(step) == config.lr * lr_factor(config, step)
        train.train_step(model, optimizer, config, autocast, batch)
        expected = [peak * lr_factor(config, step) for peak in peaks]
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected, rel=1e-12)
    assert step == 7 and len(set(peaks)) >= 3 and 0 < lr_factor(config, 7) < 1


@pytest.mark.parametrize(("settings", "hidden", "norm"), [
    # tensors, parameters, std, lr, lr x decay, eps; hidden matrices have fan-in 64 and 256, or 168
    (GPT2_BLOCK, ["32", "393,216", "0.125/0.0625", "0.25", "1", "0.0312"],
     ["16", "1,024", "-", "1", "0", "0.0312"]),
    ({}, ["32", "389,120", "0.125/0.0772", "0.25", "1", "0.0312"], ["32", "1,280", "-", "1", "0", "0.0312"]),
    ({"optimizer": "muon"}, ["32", "389,120", "0.125/0.0772", "1", "1", "0.0312"],
     ["32", "1,280", "-", "1", "0", "0.0312"])], ids=["gpt2", "default", "muon"])
def test_the_printed_table_has_a_line_for_each_role_with_its_numbers(settings, hidden, norm):
    config = tiny(**SHAPE, **UNITS, **settings, bias=True, value_embeddings=True)
    lines = format_table(GPT(config)).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:-1]}
    assert rows["hidden"] == hidden and rows["norm"] == norm
    assert rows["readout"] == ["1", "4,096", "0.25", "1", "1", "0.25"]
    assert [*rows] == [*ROLES]
    assert lines[-1] == ("mup: width_mult 4, depth_mult 8; branch x 0.125, logits x 0.25, attention x 0.125; "
                         "beta2 0.95")
