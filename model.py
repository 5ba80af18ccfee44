"""A GPT: a decoder-only transformer, from token ids to logits in one pass.

Tensor names carry their shape: B batch, T tokens, S tokens that are attended to, C channels (width), H heads,
D channels per head, V vocabulary. Initial weights and the forward pass's factors: see parametrization.py.
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from configure import UserError
from generate import generate
from parametrization import forward_multipliers, hyperparameters, role_of


def constant(value):
    """A factor of the forward pass, as a buffer, so that torch.compile does not specialize on its value."""
    return nn.Buffer(torch.as_tensor(value), persistent=False)


def in_autocast_type(x):
    """`x` in the type of autocast's matrix products, if any: fewer bytes."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Linear(nn.Linear):
    """nn.Linear with weights and biases times `factor`: costs nothing when the weights are cast to bf16."""

    def __init__(self, fan_in, fan_out, bias, factor=1.0):
        super().__init__(fan_in, fan_out, bias)
        self.factor = constant(factor)

    def reset_parameters(self):
        """Nothing: GPT.initialize() draws all weights."""

    def forward(self, x):
        bias = None if self.bias is None else self.factor.flatten() * self.bias
        return F.linear(x, self.factor * self.weight, bias)


class HeadNorm(nn.RMSNorm):
    """RMSNorm over the channels of a head, gains times `factor`."""

    def __init__(self, head_dim, eps, factor=1.0):
        super().__init__(head_dim, eps=eps)
        self.factor = constant(factor)

    def forward(self, x_BHTD):
        return F.rms_norm(x_BHTD, self.normalized_shape, self.factor * self.weight, self.eps).type_as(x_BHTD)


def make_norm(config):
    """The norm at the start of each residual branch and before the readout."""
    if config.norm == "rms":
        return nn.RMSNorm(config.width, eps=config.norm_eps or 1e-6)
    return nn.LayerNorm(config.width, eps=config.norm_eps or 1e-5, bias=config.bias)


def rotary_table(config):
    """(cosines, sines), each (context, D/2), of the angle by which each position turns each pair of channels
    (rotary position embedding, arXiv 2104.09864)."""
    frequencies = config.rotary_base ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    angles = torch.outer(torch.arange(config.context), frequencies)
    return angles.cos(), angles.sin()


def rotate(x_BHTD, rotary):
    """Turns each pair of channels (i, i + D/2) by the angle of its position."""
    cos, sin = rotary
    a, b = x_BHTD.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x_BHTD)


class Attention(nn.Module):
    """Causal self-attention with logits attention_mult * sqrt(base_head_dim) / head_dim * (q . k) under μP.

    With qk_norm, q and k have length sqrt(D) times their gains, so (q . k) is D times a cosine. The 1/D keeps
    the logits of queries and keys that agree the same over head_dim; those of random ones go with D^-1/2.
    With fewer kv_heads than heads, each serves as many heads of queries (arXiv 2305.13245).
    """

    def __init__(self, config):
        super().__init__()
        C, factors = config.width, forward_multipliers(config)
        self.head_dim, self.dropout = config.head_dim, config.dropout
        self.kv_heads = config.kv_heads or C // config.head_dim
        rows = C + 2 * self.kv_heads * config.head_dim  # queries, then keys, then values
        # Scaling the queries scales the attention logits, at no cost: by their gains or by their weights
        self.q_norm = self.k_norm = None
        qkv_factor = torch.ones(rows, 1)
        qkv_factor[:C] *= factors["attention"]
        if config.qk_norm:
            qkv_factor = 1.0
            eps = config.norm_eps or 1e-6
            self.q_norm = HeadNorm(config.head_dim, eps, factors["attention"])
            self.k_norm = HeadNorm(config.head_dim, eps)
        self.qkv = Linear(C, rows, config.bias, qkv_factor)
        self.out = Linear(C, C, config.bias, factors["branch"])

    @staticmethod
    def queries_keys_values(qkv_BTHD, kv_heads, q_norm, k_norm, rotary):
        """Queries, keys and values, each BHTD: the first two normalized and rotated, unless None."""
        heads = [qkv_BTHD.size(2) - 2 * kv_heads, kv_heads, kv_heads]
        q_BHTD, k_BHTD, v_BHTD = (x.transpose(1, 2) for x in qkv_BTHD.split(heads, dim=2))
        if q_norm is not None:
            q_BHTD, k_BHTD = q_norm(q_BHTD), k_norm(k_BHTD)
        if rotary is not None:
            q_BHTD, k_BHTD = rotate(q_BHTD, rotary), rotate(k_BHTD, rotary)
        return q_BHTD, k_BHTD, v_BHTD

    @staticmethod
    def attend(q_BHTD, k_BHSD, v_BHSD, mask_TS=None, is_causal=False, dropout=0.0):
        """For each query the mean of the values, weighted by softmax(q . k)."""
        return F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=mask_TS, dropout_p=dropout,
                                              is_causal=is_causal, scale=1.0,
                                              enable_gqa=q_BHTD.size(1) != k_BHSD.size(1))

    def forward(self, x_BTC, rotary=None, cache=None, mask_TS=None, added_BTC=None):
        """`cache`, if given, has the keys and values of all earlier tokens; the new ones are added. mask_TS:
        which of these S tokens each of the T sees; None: all that are earlier. added_BTC: to the values."""
        B, T, C = x_BTC.shape
        qkv_BTHD = self.qkv(x_BTC).view(B, T, -1, self.head_dim)
        q_BHTD, k_BHSD, v_BHSD = self.queries_keys_values(qkv_BTHD, self.kv_heads, self.q_norm, self.k_norm,
                                                          rotary)
        if added_BTC is not None:
            v_BHSD = v_BHSD + added_BTC.view(B, T, -1, self.head_dim).transpose(1, 2).type_as(v_BHSD)
        if cache is not None:
            k_BHSD, v_BHSD = cache.extend(self, k_BHSD, v_BHSD)
        y_BHTD = self.attend(q_BHTD, k_BHSD, v_BHSD, mask_TS, is_causal=mask_TS is None and cache is None,
                             dropout=self.dropout if self.training else 0.0)
        return self.out(y_BHTD.transpose(1, 2).reshape(B, T, C))


def mlp_width(config):
    """Hidden units of the MLP. With gates it has three matrices in place of two, so it gets 2/3 of 4 * width,
    as a multiple of 64 where that changes the parameters by at most 1%, else of 8."""
    if config.mlp_ratio is not None or config.mlp not in GATED:
        return max(1, round((config.mlp_ratio or 4) * config.width))
    exact = 8 * config.width / 3
    by_64 = 64 * round(exact / 64)
    return by_64 if abs(by_64 / exact - 1) <= 0.01 else 8 * round(exact / 8)


def swiglu(gate_up):
    """silu(gates) * up, of both side by side (arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"),
               "relu2": lambda x: F.relu(x).square(), "swiglu": swiglu}
GATED = {"swiglu"}  # these take two numbers for each that they give: gates first


class MLP(nn.Module):
    """down(activate(up(x))), or with gates down(activate(gate_up(x)))."""

    def __init__(self, config):
        super().__init__()
        C, hidden = config.width, mlp_width(config)
        self.gated, self.activate = config.mlp in GATED, ACTIVATIONS[config.mlp]
        if self.gated:
            self.gate_up = Linear(C, 2 * hidden, config.bias)  # one product for both
        else:
            self.up = Linear(C, hidden, config.bias)
        self.down = Linear(hidden, C, config.bias, forward_multipliers(config)["branch"])

    def forward(self, x_BTC):
        first = self.gate_up if self.gated else self.up
        return self.down(self.activate(first(x_BTC)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTC, rotary=None, cache=None, mask_TS=None, added_BTC=None):
        x_BTC = x_BTC + self.dropout(self.attention(self.attention_norm(x_BTC), rotary, cache, mask_TS,
                                                    added_BTC))
        return x_BTC + self.dropout(self.mlp(self.mlp_norm(x_BTC)))


class GPT(nn.Module):
    """Decoder-only transformer, pre-LN. `config.vocab_size` must be set; the weights depend on the config
    alone (its seed included). Raises UserError for a parameter without a role."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        if config.vocab_size is None:
            raise UserError("vocab_size must be the tokenizer's number of tokens, got None")
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.context, config.width)
        else:
            self.rotary_cos, self.rotary_sin = map(constant, rotary_table(config))
        if config.value_embeddings:  # the tables of all blocks that have one, side by side
            kv_channels = (config.kv_heads or config.width // config.head_dim) * config.head_dim
            self.value_embedding = nn.Embedding(config.vocab_size, (config.depth + 1) // 2 * kv_channels)
        if config.smear:
            self.smear = nn.Parameter(torch.empty(config.width))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_norm = make_norm(config)
        if not config.tied:
            self.readout = Linear(config.width, config.vocab_size, bias=False)
        self.embedding_mult = constant(config.embedding_mult)
        self.logit_mult = constant(forward_multipliers(config)["logits"])
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """Draw every weight by its role's standard deviation, on the CPU: the same weights on all devices."""
        config, generator = self.config, torch.Generator().manual_seed(self.config.seed)
        for name, p in self.named_parameters():
            if p.is_meta:  # of model_size(), in each training: no numbers, and drawing them takes long
                continue
            std = hyperparameters(config, role_of(name), fan_in=p.shape[-1])["std"]
            if name.endswith(("bias", "smear", "value_embedding.weight")):
                p.zero_()
            elif std is not None:
                p.normal_(std=std, generator=generator)
            else:
                p.fill_(1.0)
            if config.zero_residual_out and name.endswith(("attention.out.weight", "mlp.down.weight")):
                p.zero_()
            if config.zero_query and name.endswith("q_norm.weight"):
                p.zero_()
            elif config.zero_query and not config.qk_norm and name.endswith("qkv.weight"):
                p[:config.width].zero_()

    def forward(self, tokens_BT, targets_BT=None, cache=None):
        """logits_BTV or, given targets, their mean cross-entropy in nats. `cache`: a generate.Cache, to go on
        from the tokens that were read before; the logits are the same with and without it."""
        T = tokens_BT.size(1)
        if T > self.config.context:
            raise UserError(f"context must hold all tokens ({T}), got {self.config.context}")
        positions = torch.arange(T, device=tokens_BT.device) if cache is None else cache.advance(T)  # T or BT
        x_BTC, rotary = self.embed(tokens_BT, positions, cache), None
        if self.config.position == "rotary":
            rotary = self.rotary_cos[:T], self.rotary_sin[:T]
            if cache is not None:  # rows may be at different positions; all heads are at the same
                rotary = self.rotary_cos[positions][:, None], self.rotary_sin[positions][:, None]
        masks = self.attention_masks(T, tokens_BT.device) if cache is None else cache.masks
        added = self.added_values(tokens_BT)
        for i, block in enumerate(self.blocks):
            x_BTC = block(x_BTC, rotary, cache, masks[i % 2], added[i])
        return self.read_out(x_BTC, targets_BT)

    def attention_masks(self, T, device):
        """What T tokens see of each other, in the first of two blocks and in the second: all that are earlier
        (None), or with a window the latest of them (GPT-3, arXiv 2005.14165, section 2.1)."""
        window = self.config.window
        if window is None:
            return None, None
        return None, torch.ones(T, T, dtype=torch.bool, device=device).tril().triu(1 - window)

    def embed(self, tokens_BT, positions, cache=None):
        """The residual stream x_BTC that enters the first block."""
        x_BTC = self.token_embedding(tokens_BT)
        if self.config.position == "learned":
            x_BTC = x_BTC + self.position_embedding(positions)
        x_BTC = self.embedding_mult * x_BTC
        if self.config.smear:  # of the first token of a text, nothing is before it
            before_BTC = F.pad(x_BTC, (0, 0, 1, -1)) if cache is None else cache.shift(x_BTC, positions)
            x_BTC = x_BTC + self.smear * before_BTC
        return in_autocast_type(self.dropout(x_BTC))

    def added_values(self, tokens_BT):
        """What is added to the values of each block, (B, T, kv_heads * D), or None: the last block has a
        table for it, and every second one before that (value embeddings, arXiv 2410.17897)."""
        added, depth = [None] * self.config.depth, self.config.depth
        if self.config.value_embeddings:
            rows = in_autocast_type(self.value_embedding(tokens_BT))
            added[(depth - 1) % 2::2] = rows.chunk((depth + 1) // 2, dim=-1)
        return added

    def read_out(self, x_BTC, targets_BT=None):
        """The logits; or only their loss, as logits that leave compiled code cost 3% of a step."""
        readout = self.token_embedding if self.config.tied else self.readout
        x_BTC = self.logit_mult * self.final_norm(x_BTC)
        if targets_BT is None:
            return self.logits(x_BTC, readout.weight)
        return self.readout_loss(x_BTC, readout.weight, targets_BT)

    def logits(self, x_BTC, weight_VC):
        return F.linear(x_BTC, weight_VC)

    def readout_loss(self, x_BTC, weight_VC, targets_BT):
        """The mean cross-entropy, in nats, of the logits."""
        logits_BTV = self.logits(x_BTC, weight_VC)
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())

    def flops_per_token(self):
        """Floating-point operations per trained token, forward and backward: 6 per weight in a matrix product
        (PaLM, arXiv 2204.02311, appendix B), and what attention takes."""
        c = self.config
        hidden = sum(p.numel() for name, p in self.named_parameters() if role_of(name) == "hidden")
        return 6 * (hidden + c.width * c.vocab_size) + attention_flops(c)

    def activations_per_token(self):
        """Numbers per token that the backward pass reads, at the least: of each matrix product the wider of
        its input and output, and the logits."""
        hidden = [p for name, p in self.named_parameters() if role_of(name) == "hidden"]
        return sum(max(p.shape) for p in hidden) + self.config.vocab_size

    generate = generate  # yields tokens after prompts


def attention_flops(config):
    """Of flops_per_token(): 12 * width * context in each block (PaLM), which counts the whole square of
    queries and keys, twice what is seen; so with a window, too, twice the band."""
    T = config.context
    w = config.window or T
    banded = config.depth // 2
    return 12 * config.width * ((config.depth - banded) * T + banded * (2 * w * T - w * w) // T)
