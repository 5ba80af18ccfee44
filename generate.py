"""How a GPT writes: the cache of what it has read, the choice of the next token, and the loop.

Names of dimensions as in model.py; S is the number of tokens that a cache has room for.
"""

import contextlib
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from configure import UserError


class Cache:
    """Keys and values of the tokens that a model has read, so that it can go on from there.

    size: how many tokens there is room for. pad_B: how many at the start of each row stand for nothing, where
    rows differ in length. window: the model's. static: the same memory and shapes at every step, as a CUDA
    graph needs them.
    """

    def __init__(self, size, pad_B, static=False, window=None):
        self.size, self.window, self.static = size, window, static
        self.kept = {}  # {attention layer: (keys_BHSD, values_BHSD)}
        self.last_B1C = None  # embedding of the last token, for a model with smear
        self.slot_S = torch.arange(size, device=pad_B.device)
        self.next = torch.zeros((), dtype=torch.long, device=pad_B.device)  # the next token's slot
        self.pad_B1 = pad_B[:, None].clone()
        self.restart(pad_B)

    def restart(self, pad_B):
        """Forget what was read."""
        self.read = 0  # tokens, as the CPU knows it; when a CUDA graph runs, only `next` counts on
        self.is_padded = bool(pad_B.any())
        self.next.zero_()
        self.pad_B1.copy_(pad_B[:, None])

    def advance(self, T):
        """Make room for the next T tokens. Returns their positions in the text, (B, T)."""
        self.read += T
        if self.read > self.size:
            raise UserError(f"context must hold all tokens ({self.read}), got {self.size}")
        self.slot_T = self.next + self.slot_S[:T]
        self.next += T
        self.end = self.size if self.static else self.read
        self.masks = self.see(T)
        return (self.slot_T - self.pad_B1).clamp(min=0)

    def see(self, T):
        """What each of the new T tokens sees of all S, (B, 1, T, S): in a block that sees all that are
        earlier, and in one with a window. None: all S."""
        sees_all = T == 1 and not self.static and not self.is_padded
        if sees_all and self.window is None:
            return None, None
        slot_S, slot_T1 = self.slot_S[:self.end], self.slot_T[:, None]
        earlier_BTS = (slot_S <= slot_T1) & (slot_S >= self.pad_B1[:, None])
        seen_B1TS = (earlier_BTS | (slot_S == slot_T1))[:, None]  # padding sees itself, lest it be NaN
        if self.window is None:
            return seen_B1TS, seen_B1TS
        return None if sees_all else seen_B1TS, seen_B1TS & (slot_S > slot_T1 - self.window)

    def extend(self, layer, k_BHTD, v_BHTD):
        """Add the keys and values of the new tokens. Returns those of all."""
        if layer not in self.kept:
            B, H, _, D = k_BHTD.shape
            self.kept[layer] = k_BHTD.new_zeros(B, H, self.size, D), v_BHTD.new_zeros(B, H, self.size, D)
        keys, values = self.kept[layer]
        keys.index_copy_(2, self.slot_T, k_BHTD)
        values.index_copy_(2, self.slot_T, v_BHTD)
        return keys[:, :, :self.end], values[:, :, :self.end]

    def shift(self, x_BTC, positions_BT):
        """The embedding before each of the new tokens' x_BTC; 0 before the first of a text."""
        if self.last_B1C is None:
            self.last_B1C = torch.zeros_like(x_BTC[:, :1])
        before_BTC = torch.cat((self.last_B1C, x_BTC[:, :-1]), dim=1)
        self.last_B1C.copy_(x_BTC[:, -1:])
        return torch.where(positions_BT[..., None] > 0, before_BTC, 0.0)


def choose_token(logits_BV, temperature, top_k, generator):
    """The next token of each row, (B, 1): the likeliest at temperature 0, else drawn."""
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    if top_k is not None and top_k < logits_BV.size(-1):
        smallest_B1 = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -math.inf)
    logits_BV = (logits_BV - logits_BV.amax()) / max(temperature, 1e-6)  # never overflows
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)


@contextlib.contextmanager
def ready_to_write(model):
    """Within, the model is in evaluation mode, and its linear layers have scaled their weights beforehand."""
    training, layers = model.training, []
    model.eval()
    for layer in model.modules():
        if is_scalable(layer):
            layer.forward = with_scaled_weight(layer)
            layers.append(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
        model.train(training)


def is_scalable(layer):
    """Whether `layer` is a model.Linear that scales its weight in each pass, and holds all of it."""
    is_linear = isinstance(layer, nn.Linear) and hasattr(layer, "factor")
    return is_linear and "forward" not in layer.__dict__ and not hasattr(layer.weight, "full_tensor")


def with_scaled_weight(layer):
    """The forward pass of a layer of model.Linear, without a product of weight and factor for each token."""
    weight = layer.factor * layer.weight
    bias = None if layer.bias is None else layer.factor.flatten() * layer.bias
    if torch.is_autocast_enabled(weight.device.type):
        weight = weight.to(torch.get_autocast_dtype(weight.device.type))
    return functools.partial(F.linear, weight=weight, bias=bias)


def pad_rows(rows, device):
    """(tokens_BT, pad_B) of lists of ids: shorter rows get padding in front."""
    longest = max(map(len, rows))
    pads = [longest - len(row) for row in rows]
    tokens = [[0] * pad + row for pad, row in zip(pads, rows, strict=True)]
    return torch.tensor(tokens, device=device), torch.tensor(pads, device=device)


def as_rows(prompts):
    """(the prompts as lists of ids, whether it is one prompt). Raises UserError for one without tokens."""
    is_single = len(prompts) == 0 or not hasattr(prompts[0], "__getitem__") or getattr(prompts, "ndim", 2) < 2
    rows = [[int(token) for token in row] for row in ([prompts] if is_single else prompts)]
    if not all(rows):
        raise UserError("prompt must have at least one token; the end of text begins a new one")
    return rows, is_single


@torch.no_grad()
def generate(model, prompts, n, temperature=1.0, top_k=None, seed=0, stop=None, graphed=None):
    """Yields what `model` writes after `prompts`, token by token, up to `n`: each time a list of ids, one for
    each prompt; after a single prompt, which is a list of ids, just the id.

    prompts: lists of token ids, of any lengths. temperature 0 takes the likeliest token; top_k None chooses
    among all. stop: the id that ends a text; a text that has ended goes on with it until all have. When the
    longest text fills the context, the last half of that is kept and read again. graphed: makes a function of
    one tensor faster that is called again and again (training/compile.py: CudaGraphed). Raises UserError for
    a prompt without tokens.
    """
    rows, is_single = as_rows(prompts)
    context, device = model.config.context, model.token_embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    unread_BT, pad_B = pad_rows([row[-context:] for row in rows], device)
    cache = Cache(min(context, unread_BT.size(1) + n), pad_B, graphed is not None,
                  model.config.window)

    def read(tokens_BT):
        return model(tokens_BT, cache=cache)[:, -1]

    read_next, used, ended = graphed(read) if graphed else read, 0, [False] * len(rows)
    with ready_to_write(model):
        for _ in range(n):
            if used == context:
                unread_BT, pad_B = pad_rows([row[-max(1, context // 2):] for row in rows], device)
                cache.restart(pad_B)
                used = 0
            is_first = used == 0
            used += unread_BT.size(1)
            logits_BV = read(unread_BT) if is_first else read_next(unread_BT)
            unread_BT = choose_token(logits_BV.float(), temperature, top_k, generator)
            tokens = unread_BT.flatten().tolist()
            ended = [was or token == stop for was, token in zip(ended, tokens, strict=True)]
            if all(ended):
                return
            tokens = [stop if has else token for has, token in zip(ended, tokens, strict=True)]
            for row, token in zip(rows, tokens, strict=True):
                row.append(token)
            yield tokens[0] if is_single else tokens
