"""A GPT, and the parametrization that lets its settings move from a small proxy to a large target.

Tensor names carry their shape: B batch, T tokens, C channels (width), H heads, D channels per head,
V vocabulary. Sources: μP, Tensor Programs V (arXiv 2203.03466) Table 8; depth, CompleteP (arXiv
2505.01618); Adam's eps on embedding and readout, Complete(d)P (arXiv 2512.22382).
"""

import math
import re
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from configure import UserError


class Cells(NamedTuple):
    """A row of the table. A cell is (exponent of width_mult, exponent of depth_mult); None: no such thing."""
    std: tuple | None  # of the initial values
    lr: tuple
    decay: tuple | None  # coupled, as torch's AdamW applies it: a step multiplies weights by 1 - lr * decay
    eps: tuple  # Adam's


def mup(a):
    """Maximal update parametrization; residual branches shrink with depth to the power a (depth_alpha)."""
    return {  #                 std         lr          decay    eps
        "embedding":  Cells((0, 0),    (0, 0),     (0, 0),  (-1, 0)),
        "hidden":     Cells((-1/2, 0), (-1, a-1),  (1, 0),  (-1, -a)),
        "norm":       Cells(None,      (0, a-1),   None,    (-1, -a)),
        "bias":       Cells(None,      (0, a-1),   None,    (-1, -a)),
        "final_norm": Cells(None,      (0, 0),     None,    (-1, 0)),
        "readout":    Cells((0, 0),    (0, 0),     (0, 0),  (-1, 0)),
    }, {"branch": (0, -a), "logits": (-1, 0), "attention": -1}  # -1: of head_dim / base_head_dim


def sp(a):
    """The standard parametrization of the same model, the control: 1/sqrt(fan_in) init, one lr for all."""
    one = (0, 0)
    return {
        "embedding":  Cells(one,       one, one,  one),
        "hidden":     Cells((-1/2, 0), one, one,  one),
        "norm":       Cells(None,      one, None, one),
        "bias":       Cells(None,      one, None, one),
        "final_norm": Cells(None,      one, None, one),
        "readout":    Cells((-1/2, 0), one, one,  one),
    }, {"branch": one, "logits": one, "attention": -1/2}


TABLES = {"mup": mup, "sp": sp}

ROLES = {  # role: the names of its parameters. Nothing hangs on tensors, so nothing gets lost on the way.
    "embedding": r"(token|position)_embedding\.weight",
    "hidden": r"blocks\.\d+\.(attention|mlp)\.\w+(?<!_norm)\.weight",
    "norm": r"blocks\.\d+\.(\w+\.)?\w+_norm\.weight",
    "bias": r"blocks\.\d+\..+\.bias",
    "final_norm": r"final_norm\.(weight|bias)",
    "readout": r"readout\.weight",
}


def role_of(name):
    """The one role of the parameter `name`; UserError when it has none, or several."""
    roles = [role for role, pattern in ROLES.items() if re.fullmatch(pattern, name)]
    if len(roles) != 1:
        raise UserError(f"model.py: parameter {name} has {' and '.join(roles) or 'no role'}, takes one "
                        f"of {', '.join(ROLES)}")
    return roles[0]


def scale(config, cell):
    return config.width_mult ** cell[0] * config.depth_mult ** cell[1]


def rule(config, role, fan_in=None):
    """dict(std, lr, weight_decay, eps, betas): what holds for `role` at the shape of `config`, lr at the
    schedule's peak. fan_in: inputs of a hidden matrix (default: width). std None: nothing random."""
    cells = TABLES[config.parametrization](config.depth_alpha)[0][role]
    base_fan_in = (fan_in or config.width) / config.width_mult
    base_std = {"embedding": config.embedding_std, "hidden": config.hidden_std / math.sqrt(base_fan_in),
                "readout": config.readout_std / math.sqrt(config.base_width)}.get(role)
    lr_mult = {"embedding": config.embedding_lr_mult, "readout": config.readout_lr_mult,
               "hidden": 1.0}.get(role, config.norm_lr_mult)
    tokens = max(config.steps, 1) * config.batch * config.context
    lr_mult *= (tokens / (config.base_tokens or tokens)) ** -0.32  # arXiv 2409.19913
    batch_mult = config.batch / (config.base_batch or config.batch)
    root = math.sqrt(batch_mult)  # of lr: arXiv 2205.10287; lr * decay per token stays: arXiv 2405.13698
    return {"std": cells.std and base_std * scale(config, cells.std),
            "lr": config.lr * lr_mult * root * scale(config, cells.lr),
            "weight_decay": config.weight_decay * root * scale(config, cells.decay) if cells.decay else 0.0,
            "eps": config.eps * scale(config, cells.eps),
            "betas": (config.beta1, config.beta2 ** batch_mult)}  # its half-life in tokens stays: 2507.07101


def multipliers(config):
    """Factors of the forward pass: residual branches, logits, attention logits."""
    forward = TABLES[config.parametrization](config.depth_alpha)[1]
    heads = (config.head_dim / config.base_head_dim) ** forward["attention"] / math.sqrt(config.base_head_dim)
    return {"branch": scale(config, forward["branch"]),
            "logits": config.logit_mult * scale(config, forward["logits"]),
            "attention": config.attention_mult * heads}


def constant(value):
    """A factor of the forward pass, as a tensor: compiled code reads its value, and so serves every value."""
    return nn.Buffer(torch.tensor(value), persistent=False)


class Linear(nn.Linear):
    """nn.Linear, weights and biases times `factor`: that is free where they are cast to bf16 anyway."""

    def __init__(self, fan_in, fan_out, bias, factor=1.0):
        super().__init__(fan_in, fan_out, bias)
        self.factor = constant(factor)
        self.register_buffer("scaled", None, persistent=False)  # data/updates.py: their product, in bf16

    def reset_parameters(self):
        """Nothing: GPT.initialize() draws all."""

    def forward(self, x):
        bias = None if self.bias is None else self.factor.flatten() * self.bias
        return F.linear(x, self.factor * self.weight if self.scaled is None else self.scaled, bias)


def rotate(x_BHTD, angles_TD):
    """Rotary position embedding (arXiv 2104.09864): turns each pair of channels (i, i + D/2) by its angle."""
    a, b = x_BHTD.float().chunk(2, dim=-1)
    cos, sin = angles_TD.cos(), angles_TD.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x_BHTD)


class Attention(nn.Module):
    """Causal self-attention. `cache`, if given, holds keys and values of all earlier tokens, and grows."""

    def __init__(self, config):
        super().__init__()
        self.head_dim, self.dropout = config.head_dim, config.dropout
        C, factors = config.width, multipliers(config)
        queries = [[factors["attention"]]] * C + [[1.0]] * (2 * C)  # to scale the logits, scale the queries
        self.qkv = Linear(C, 3 * C, config.bias, queries)
        self.out = Linear(C, C, config.bias, factors["branch"])

    def forward(self, x_BTC, angles_TD=None, cache=None):
        B, T, C = x_BTC.shape
        qkv_BTHD = self.qkv(x_BTC).view(B, T, 3, C // self.head_dim, self.head_dim).unbind(2)
        q_BHTD, k_BHTD, v_BHTD = (x.transpose(1, 2) for x in qkv_BTHD)
        if angles_TD is not None:
            q_BHTD, k_BHTD = rotate(q_BHTD, angles_TD), rotate(k_BHTD, angles_TD)
        mask = None
        if cache is not None:
            if cache:
                k_BHTD, v_BHTD = torch.cat((cache[0], k_BHTD), 2), torch.cat((cache[1], v_BHTD), 2)
                mask = x_BTC.new_ones(T, S := k_BHTD.size(2), dtype=torch.bool).tril(S - T)
            cache[:] = k_BHTD, v_BHTD
        y_BHTD = F.scaled_dot_product_attention(
            q_BHTD, k_BHTD, v_BHTD, attn_mask=mask, is_causal=mask is None, scale=1.0,
            dropout_p=self.dropout if self.training else 0.0)
        return self.out(y_BHTD.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = Linear(config.width, 4 * config.width, config.bias)
        self.down = Linear(4 * config.width, config.width, config.bias, multipliers(config)["branch"])

    def forward(self, x_BTC):
        return self.down(F.gelu(self.up(x_BTC)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, bias=config.bias)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTC, angles_TD=None, cache=None):
        x_BTC = x_BTC + self.dropout(self.attention(self.attention_norm(x_BTC), angles_TD, cache))
        return x_BTC + self.dropout(self.mlp(self.mlp_norm(x_BTC)))


class GPT(nn.Module):
    """Decoder-only transformer, pre-LN. `config.vocab_size` must be set; the weights are a function of the
    config alone (its seed included). UserError: a parameter without a role."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        if config.vocab_size is None:
            raise UserError("vocab_size: got None, takes the tokenizer's number of tokens")
        if config.position == "rotary" and config.head_dim % 2:
            raise UserError(f"head_dim: got {config.head_dim}, takes an even number with position=rotary")
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_norm = nn.LayerNorm(config.width, bias=config.bias)
        if not config.tied:
            self.readout = Linear(config.width, config.vocab_size, False)
        factors = config.embedding_mult, multipliers(config)["logits"]
        self.embedding_mult, self.logit_mult = map(constant, factors)
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """Draw every weight by its role's rule, on the CPU, so that all devices start alike."""
        config, generator = self.config, torch.Generator().manual_seed(self.config.seed)
        for name, p in self.named_parameters():
            std = rule(config, role_of(name), p.shape[-1])["std"]
            p.fill_(not name.endswith("bias")) if std is None else p.normal_(std=std, generator=generator)
            if config.zero_residual_out and name.endswith(("attention.out.weight", "mlp.down.weight")):
                p.zero_()
            if config.zero_query and name.endswith("qkv.weight"):
                p[:config.width].zero_()

    def forward(self, tokens_BT, targets_BT=None, cache=None):
        """logits_BTV or, given targets, their mean cross-entropy in nats. `cache`: one list per block, empty
        at first, for going on token by token; logits are the same with and without it."""
        past, T = cache[0][0].size(2) if cache and cache[0] else 0, tokens_BT.size(1)
        if past + T > self.config.context:
            raise UserError(f"context: got {past + T} tokens, takes at most {self.config.context}")
        positions_T = torch.arange(past, past + T, device=tokens_BT.device)
        x_BTC, angles_TD = self.embed(tokens_BT, positions_T), None
        if self.config.position == "rotary":
            D = self.config.head_dim
            angles_TD = torch.outer(positions_T, 1e4 ** (-torch.arange(0, D, 2, device=tokens_BT.device) / D))
        for i, block in enumerate(self.blocks):
            x_BTC = block(x_BTC, angles_TD, None if cache is None else cache[i])
        return self.read_out(x_BTC, targets_BT)

    def embed(self, tokens_BT, positions_T):
        """The residual stream x_BTC that enters the first block; in autocast's type, if any: fewer bytes."""
        x_BTC = self.token_embedding(tokens_BT)
        if self.config.position == "learned":
            x_BTC = x_BTC + self.position_embedding(positions_T)
        x_BTC = self.dropout(self.embedding_mult * x_BTC)
        where = x_BTC.device.type
        return x_BTC.to(torch.get_autocast_dtype(where)) if torch.is_autocast_enabled(where) else x_BTC

    def read_out(self, x_BTC, targets_BT=None):
        """The logits; or only their loss, as logits that leave compiled code cost 3% of a step."""
        readout = self.token_embedding if self.config.tied else self.readout
        logits_BTV = F.linear(self.logit_mult * self.final_norm(x_BTC), readout.weight)
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())

    def param_groups(self):
        """AdamW's groups, one per role: params, role and what rule() says, lr at the schedule's peak."""
        named = [(role_of(name), p) for name, p in self.named_parameters()]
        return [{"role": role, "params": [p for its, p in named if its == role], **rule(self.config, role)}
                for role in ROLES if role in dict(named)]

    def table(self):
        """The resolved parametrization, for people: a line per role, then the factors of the forward pass."""
        lines = ["role         tensors     parameters        init std         lr   lr*decay        eps"]
        for group in self.param_groups():
            role, params, lr = group["role"], group["params"], group["lr"]
            stds = dict.fromkeys(rule(self.config, role, p.shape[-1])["std"] for p in params)
            std = "/".join("-" if s is None else f"{s:.3g}" for s in stds)
            lines.append(f"{role:<12}{len(params):>8}{sum(p.numel() for p in params):>15,}{std:>16}"
                         f"{lr:>11.3g}{lr * group['weight_decay']:>11.3g}{group['eps']:>11.3g}")
        factors = ", ".join(f"{name} x {value:.4g}" for name, value in multipliers(self.config).items())
        return "\n".join([*lines, f"{self.config.parametrization}: width_mult {self.config.width_mult:g}, "
                          f"depth_mult {self.config.depth_mult:g}; {factors}; beta2 {group['betas'][1]:.4g}"])

    def flops_per_token(self):
        """Floating-point operations per trained token, forward and backward: 6 per weight in a matrix product
        and 12 * depth * width * context for attention (PaLM, arXiv 2204.02311, appendix B)."""
        c, hidden = self.config, sum(p.numel() for n, p in self.named_parameters() if role_of(n) == "hidden")
        return 6 * (hidden + c.width * c.vocab_size) + 12 * c.depth * c.width * c.context

    @torch.no_grad()
    def generate(self, tokens_BT, n, temperature=1.0, top_k=None, seed=0):
        """`n` tokens after `tokens_BT`, as (B, T + n). temperature 0 takes the likeliest token; top_k None
        chooses among all. When the context is full, the last half of it is kept and read again."""
        training, generator = self.training, torch.Generator(tokens_BT.device).manual_seed(seed)
        self.eval()
        context, cache, unread_BT = self.config.context, None, tokens_BT[:, -self.config.context:]
        for _ in range(n):
            cache = cache or [[] for _ in self.blocks]
            logits_BV = self(unread_BT, cache=cache)[:, -1].float()
            if temperature:
                if top_k and top_k < logits_BV.size(-1):
                    logits_BV[logits_BV < logits_BV.topk(top_k).values[:, -1:]] = -math.inf
                logits_BV = (logits_BV - logits_BV.amax()) / max(temperature, 1e-6)  # never inf
                unread_BT = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)
            else:
                unread_BT = logits_BV.argmax(-1, keepdim=True)
            tokens_BT = torch.cat((tokens_BT, unread_BT), dim=1)
            if cache[0][0].size(2) == context:
                cache, unread_BT = None, tokens_BT[:, -(context // 2 or 1):]
        self.train(training)
        return tokens_BT
