"""Everything that knows of μP: the roles of parameters, the tables of exponents, and what follows from them.

The parametrization lets settings move from a small proxy to a large target. It is data: a table says with
which power of width_mult and depth_mult each quantity of a role scales. Initialization and optimizer read it
through hyperparameters(), the forward pass through forward_multipliers(); nothing else branches on it.

Sources: width, Tensor Programs V (arXiv 2203.03466), Table 8; depth, CompleteP (arXiv 2505.01618); Adam's eps
on embedding and readout, Complete(d)P (arXiv 2512.22382); Muon, arXiv 2512.05620 and 2603.00541.
"""

import math
import re
from typing import NamedTuple

from configure import UserError


class Exponents(NamedTuple):
    """A row of the table: each entry is (exponent of width_mult, exponent of depth_mult).

    None: the quantity does not exist for this role.
    """
    std: tuple | None  # standard deviation of the initial weights
    lr: tuple  # learning rate of AdamW
    weight_decay: tuple | None  # coupled, as in torch's AdamW: a step multiplies weights by 1 - lr * decay
    eps: tuple  # epsilon of AdamW
    muon_lr: tuple | None = None  # learning rate of Muon, whose updates are scaled by sqrt(fan_out / fan_in)
    muon_weight_decay: tuple | None = None  # coupled, too


def mup(a):
    """Maximal update parametrization; residual branches shrink with depth to the power a (depth_alpha)."""
    roles = {  #                   std         lr          decay    eps       Muon: lr  decay
        "embedding":    Exponents((0, 0),    (0, 0),     (0, 0),  (-1, 0)),
        "value_embedding": Exponents(None,   (0, a-1),   (0, 0),  (-1, -a)),  # inside residual branches
        "hidden":       Exponents((-1/2, 0), (-1, a-1),  (1, 0),  (-1, -a), (0, a-1), (0, 0)),
        "norm":         Exponents(None,      (0, a-1),   None,    (-1, -a)),
        "bias":         Exponents(None,      (0, a-1),   None,    (-1, -a)),
        "final_norm":   Exponents(None,      (0, 0),     None,    (-1, 0)),
        "readout":      Exponents((0, 0),    (0, 0),     (0, 0),  (-1, 0)),
    }
    # `attention` is an exponent of head_dim / base_head_dim
    return roles, {"branch": (0, -a), "logits": (-1, 0), "attention": -1}


def sp(a):
    """The standard parametrization of the same model, the control: 1/sqrt(fan_in) init, one lr for all."""
    same = (0, 0)
    roles = {  #                   std         lr    decay eps   Muon: lr, decay
        "embedding":    Exponents(same,      same, same, same),
        "value_embedding": Exponents(None,   same, same, same),
        "hidden":       Exponents((-1/2, 0), same, same, same, same, same),
        "norm":         Exponents(None,      same, None, same),
        "bias":         Exponents(None,      same, None, same),
        "final_norm":   Exponents(None,      same, None, same),
        "readout":      Exponents((-1/2, 0), same, same, same),
    }
    return roles, {"branch": same, "logits": same, "attention": -1/2}


def sp_scaled(a):
    """sp with every learning rate divided by width_mult, as a larger model is often trained in practice."""
    roles, factors = sp(a)
    roles = {role: row._replace(lr=(-1, 0), muon_lr=row.muon_lr and (-1, 0)) for role, row in roles.items()}
    return roles, factors


def sp_per_layer(a):
    """sp with the learning rates that make every layer's step as large at each width (arXiv 2407.05872, under
    full alignment): 1 / width_mult where the fan-in grows, which here includes the readout. Decays per step
    stay."""
    roles, factors = sp(a)
    roles |= {role: roles[role]._replace(lr=(-1, 0), weight_decay=(1, 0)) for role in ("hidden", "readout")}
    return roles, factors


TABLES = {"mup": mup, "sp": sp, "sp_scaled": sp_scaled, "sp_per_layer": sp_per_layer}


def table_of(config):
    """(roles, exponents of the forward pass's factors) of `config`'s parametrization."""
    if config.parametrization not in TABLES:
        raise UserError(f"parametrization must be one of {', '.join(TABLES)} here, got "
                        f"{config.parametrization}; `python -m scaling.plane` trains points between these")
    return TABLES[config.parametrization](config.depth_alpha)


# Role: the names of its parameters. Nothing is attached to tensors, where DDP or compile could lose it.
ROLES = {
    "embedding": r"(token|position)_embedding\.weight|smear",  # smear: as what it is a share of
    "value_embedding": r"value_embedding\.weight",
    "hidden": r"blocks\.\d+\.(attention|mlp)\.\w+(?<!_norm)\.weight",
    "norm": r"blocks\.\d+\.(\w+\.)?\w+_norm\.weight",
    "bias": r"blocks\.\d+\..+\.bias",
    "final_norm": r"final_norm\.(weight|bias)",
    "readout": r"readout\.weight",
}


def rows_of_matrices(config, name, rows):
    """How the `rows` of the parameter `name` divide among the matrices that it stacks along their outputs:
    Muon orthogonalizes each by itself."""
    if name.endswith("attention.qkv.weight"):
        of_keys = (rows - config.width) // 2  # fewer than queries where there are fewer kv_heads
        return [config.width, of_keys, of_keys]
    if name.endswith("mlp.gate_up.weight"):
        return [rows // 2, rows // 2]
    return [rows]


def role_of(name):
    """The one role of the parameter `name`. Raises UserError when it has none, or several."""
    roles = [role for role, pattern in ROLES.items() if re.fullmatch(pattern, name)]
    if len(roles) != 1:
        found = " and ".join(roles) or "no role"
        raise UserError(f"model.py: parameter {name} must have one role in ROLES of parametrization.py, has "
                        f"{found}")
    return roles[0]


def scale(config, exponents):
    """width_mult and depth_mult to these powers."""
    width_exponent, depth_exponent = exponents
    return config.width_mult ** width_exponent * config.depth_mult ** depth_exponent


def hyperparameters(config, role, fan_in=None):
    """dict(std, lr, weight_decay, eps, betas) of `role` at the shape of `config`; where Muon steps the role,
    its `momentum` too.

    lr is the peak of the schedule. fan_in: inputs of a hidden matrix (default: width). std is None where
    nothing is drawn at random, as for norms and biases.
    """
    roles, _ = table_of(config)
    if role not in roles:
        raise UserError(f"parametrization.py: role {role} is in ROLES, but has no row in the table "
                        f"{config.parametrization}")
    exponents = roles[role]
    muon = config.optimizer == "muon" and exponents.muon_lr is not None
    lr_exponents = exponents.muon_lr if muon else exponents.lr
    decay_exponents = exponents.muon_weight_decay if muon else exponents.weight_decay
    mults = batch_and_horizon(config)
    peak = config.lr if role == "hidden" else config.base_lr or config.lr
    std = None
    if exponents.std is not None:
        std = base_std(config, role, fan_in or config.width) * scale(config, exponents.std)
    weight_decay = 0.0
    if decay_exponents is not None:
        weight_decay = config.weight_decay * mults.weight_decay * scale(config, decay_exponents)
    found = {"std": std,
             "lr": peak * base_lr_mult(config, role) * mults.lr * scale(config, lr_exponents),
             "weight_decay": weight_decay,
             "eps": config.eps * mults.eps * scale(config, exponents.eps),
             "betas": (config.beta1, config.beta2 ** mults.beta2_power)}
    if muon:
        found["momentum"] = config.momentum
    return found


def base_std(config, role, fan_in):
    """Initial standard deviation at the base shape."""
    if role == "embedding":
        return config.embedding_std
    if role == "readout":
        return config.readout_std / math.sqrt(config.base_width)
    return config.hidden_std / math.sqrt(fan_in / config.width_mult)


def base_lr_mult(config, role):
    """The tuned factor on lr. Raises UserError for a role that is not told which it has."""
    if role == "hidden":
        return 1.0
    if role in ("embedding", "value_embedding"):
        return config.embedding_lr_mult
    if role == "readout":
        return config.readout_lr_mult
    if role in ("norm", "bias", "final_norm"):
        return config.norm_lr_mult
    raise UserError(f"parametrization.py: role {role} has no factor on lr; add it to base_lr_mult(), with "
                    "1.0 for none")


class BatchAndHorizon(NamedTuple):
    """Factors on lr, weight decay and eps, and the power to which beta2 is raised."""
    lr: float
    weight_decay: float
    eps: float
    beta2_power: float


def batch_and_horizon(config):
    """The rule for kappa = batch / base_batch and tau = tokens / base_tokens, each 1 where its base is None.

    lr x sqrt(kappa) (arXiv 2205.10287) x tau^-a (arXiv 2409.19913); the decay so that lr * decay * steps
    stays (arXiv 2405.13698); beta2 so that its half-life in tokens stays (arXiv 2507.07101); eps x
    sqrt(tau / kappa) (arXiv 2512.22382). beta1 and Muon's momentum stay.
    """
    kappa, tau = batch_and_horizon_mults(config)
    root = math.sqrt(kappa)
    return BatchAndHorizon(lr=root * tau ** -HORIZON_POWER, weight_decay=root * tau ** (HORIZON_POWER - 1),
                           eps=math.sqrt(tau / kappa), beta2_power=kappa)


HORIZON_POWER = 0.32  # a, arXiv 2409.19913
MEASURED_BATCHES = 1/4, 4  # batch / base_batch (scaling/results/README.md, "Batch, context and steps")
MEASURED_STEPS = 600, 9600  # of the same ladder


def batch_and_horizon_mults(config):
    """(kappa, tau) of batch_and_horizon()."""
    tokens = config.tokens_before(max(config.steps, 1))
    return config.batch / (config.base_batch or config.batch), tokens / (config.base_tokens or tokens)


def lines_beyond_measured(config):
    """A line for people for each way in which batch_and_horizon() is used beyond where it was measured."""
    (kappa, tau), lines = batch_and_horizon_mults(config), []
    least, most = MEASURED_BATCHES
    if not least <= kappa <= most:
        lines.append(f"batch / base_batch is {kappa:g}; its rule was measured from {least:g} to {most:g}")
    least, most = MEASURED_STEPS
    if kappa != 1 and not least <= config.steps <= most:
        lines.append(f"steps: {config.steps:,}; the rule of base_batch was measured from {least:,} to "
                     f"{most:,} steps")
    if tau != 1:
        lines.append(f"tokens / base_tokens is {tau:g}; its rule is from the literature, not measured here")
    return lines


def forward_multipliers(config):
    """Factors of the forward pass: residual branches, logits, attention logits."""
    _, exponents = table_of(config)
    head_scale = (config.head_dim / config.base_head_dim) ** exponents["attention"]
    return {"branch": scale(config, exponents["branch"]),
            "logits": config.logit_mult * scale(config, exponents["logits"]),
            "attention": config.attention_mult * (head_scale / math.sqrt(config.base_head_dim))}


def param_groups(model):
    """The optimizer's groups, one per role: params, role and what hyperparameters() says."""
    by_role = {}
    for name, parameter in model.named_parameters():
        by_role.setdefault(role_of(name), []).append(parameter)
    return [{"role": role, "params": by_role[role], **hyperparameters(model.config, role)}
            for role in ROLES if role in by_role]


def format_table(model):
    """The resolved parametrization, for people: a line per role, then the factors of the forward pass."""
    config = model.config
    lines = ["role             tensors     parameters        init std         lr   lr*decay        eps"]
    groups = param_groups(model)
    for group in groups:
        role, params, lr = group["role"], group["params"], group["lr"]
        stds = dict.fromkeys(hyperparameters(config, role, p.shape[-1])["std"] for p in params)
        std = "/".join("-" if value is None else f"{value:.3g}" for value in stds)
        parameters = sum(p.numel() for p in params)
        lines.append(f"{role:<16}{len(params):>8}{parameters:>15,}{std:>16}"
                     f"{lr:>11.3g}{lr * group['weight_decay']:>11.3g}{group['eps']:>11.3g}")
    factors = ", ".join(f"{name} x {value:.4g}" for name, value in forward_multipliers(config).items())
    lines.append(f"{config.parametrization}: width_mult {config.width_mult:g}, depth_mult "
                 f"{config.depth_mult:g}; {factors}; beta2 {groups[0]['betas'][1]:.4g}")
    return "\n".join(lines + lines_beyond_measured(config))
