"""Weights in and out: between our parameters and those of transformers' classes, and the proof that both
compute the same.

What our forward pass multiplies by is put into the weights on the way out.
"""

import copy
import errno
import json
import math
import os
from dataclasses import replace

import torch

from configure import UserError
from data.files import write_text
from interop.families import GPT2, family_of, fields_of, import_transformers, parameter_names, their_config
from parametrization import forward_multipliers

WEIGHTS = "model.safetensors"
TOKENS = 32  # in each of the two sequences that logits are compared on
TOLERANCE = 1e-4  # of the largest logit: fp32 sums in another order differ by less


def load_theirs(folder, family, fields):
    """transformers' model of the weights in `folder` and of `fields`, its config.json. Raises UserError."""
    model_class = getattr(import_transformers(), family.model_class)
    try:
        model, loading = model_class.from_pretrained(
            folder, config=their_config(family, fields), dtype=torch.float32, use_safetensors=True,
            ignore_mismatched_sizes=True, local_files_only=True, output_loading_info=True)
    except Exception as error:  # of many types
        raise UserError(f"transformers cannot read it: {' '.join(str(error).split())[:200]}") from None
    for problem, names in loading.items():
        if names:
            raise UserError(f"{problem.replace('_', ' ')}: {min(map(str, names))}")
    return model.eval()


@torch.no_grad()
def check_same_logits(model, theirs):
    """Raises UserError unless both compute the same logits on random tokens."""
    tokens_BT = torch.randint(model.config.vocab_size, (2, min(TOKENS, model.config.context)),
                              generator=torch.Generator().manual_seed(0))
    logits_BTV = model(tokens_BT)
    try:
        off = (theirs(tokens_BT, return_dict=True).logits - logits_BTV).abs().max()
    except Exception as error:  # of many types
        raise UserError(f"transformers cannot compute it: {' '.join(str(error).split())[:200]}") from None
    largest = logits_BTV.abs().max()
    if not off <= TOLERANCE * largest:  # False for NaN, too
        raise UserError(f"{type(theirs).__name__} of transformers computes other logits than model.py: they "
                        f"differ by up to {off:.2g}, where the largest is {largest:.2g}")


@torch.no_grad()
def with_large_weights(model):
    """A copy of `model` with random weights under which every part of its function shows in the logits."""
    model, generator = copy.deepcopy(model).eval(), torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.normal_(std=p.shape[-1] ** -0.5 if p.dim() > 1 else 1.0, generator=generator)
    model.final_norm.weight.mul_(20 / forward_multipliers(model.config)["logits"])
    return model


def fold(config, weights):
    """(config, weights) of the model that computes the same with no multiplier but attention's 1/sqrt(D):
    each is put into the weights that it multiplies."""
    factors = forward_multipliers(config)
    weights = {name: p.detach().to(torch.float64, copy=True) for name, p in weights.items()}
    attention, readout = factors["attention"] * math.sqrt(config.head_dim), factors["logits"]
    if config.tied:  # the matrix takes the embedding's factor; what is left, the gains before it
        readout = factors["logits"] / config.embedding_mult
    for name, value in weights.items():
        if name.startswith(("token_embedding", "position_embedding")):
            value *= config.embedding_mult
        elif ".attention.out." in name or ".mlp.down." in name:
            value *= factors["branch"]
        elif "q_norm" in name:
            value *= attention
        elif ".qkv." in name and not config.qk_norm:
            value[:config.width] *= attention
        elif name.startswith("final_norm" if config.tied else "readout"):
            value *= readout
    kv_heads = None if config.kv_heads == config.width // config.head_dim else config.kv_heads
    folded = replace(config, kv_heads=kv_heads, base_width=config.width, base_depth=config.depth,
                     base_head_dim=config.head_dim, parametrization="mup", embedding_mult=1.0,
                     logit_mult=1.0, attention_mult=1.0,
                     norm_eps=config.norm_eps or (1e-5 if config.norm == "layer" else 1e-6))
    return folded, weights


def with_biases(config, weights):
    """The same model with biases of 0."""
    zeros = {name.removesuffix("weight") + "bias": p.new_zeros(len(p)) for name, p in weights.items()
             if not name.endswith(("embedding.weight", "readout.weight"))}
    return replace(config, bias=True), weights | zeros


def to_transformers(config, weights):
    """(Family, Config, {their name: fp32 tensor}) of a model of `config` with our `weights`. Raises UserError
    that names the setting or parameter for which there is no class."""
    config, weights = fold(config, weights)
    family = family_of(config)
    if family is GPT2 and not config.bias:
        config, weights = with_biases(config, weights)
    tensors = {}
    for name, value in weights.items():
        theirs, transposed = parameter_names(family, name)
        parts = value.float().split(row_counts(config, name, len(theirs), len(value)))
        for other, part in zip(theirs, parts, strict=True):
            tensors[other] = (part.T if transposed else part).contiguous()
    return family, config, tensors


def row_counts(config, name, parts, rows):
    """How many of the `rows` of our parameter `name` belong to each of its parts. Raises UserError."""
    counts = [rows // parts] * parts
    if ".qkv." in name and parts == 3:
        heads = config.width // config.head_dim
        kv_rows = config.head_dim * (config.kv_heads or heads)
        counts = [config.width, kv_rows, kv_rows]
    if sum(counts) != rows:
        raise UserError(f"{name}: has {rows} rows, but its {parts} parts would have {sum(counts)}")
    return counts


def write_model(model, folder, eot):
    """Write config.json and the weights of `model` into `folder`. Returns (Family, the fields of
    config.json). eot: the id of the end of text. Raises UserError, and OSError."""
    import_transformers()
    import safetensors.torch
    weights = {name: p.detach().cpu() for name, p in model.named_parameters()}
    family, config, tensors = to_transformers(model.config, weights)
    fields = fields_of(config, family) | {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": None}
    write_text(os.path.join(folder, "config.json"), json.dumps(fields, indent=1))
    path = os.path.join(folder, WEIGHTS)
    try:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    except safetensors.SafetensorError:  # its way to report a write that failed
        raise OSError(errno.ENOSPC, "the disk is full, or fails", path) from None
    return family, fields


def from_transformers(family, names, tensors):
    """{our parameter: tensor} for these `names`, out of `tensors`, theirs. Raises UserError."""
    tensors, weights = dict(tensors), {}
    for name in names:
        theirs, transposed = parameter_names(family, name)
        parts = [tensors.pop(other).detach() for other in theirs]
        weights[name] = torch.cat([part.T if transposed else part for part in parts]).contiguous()
        if not weights[name].isfinite().all():
            raise UserError(f"{theirs[0]} holds numbers that are not finite")
    if tensors:
        raise UserError(f"holds {min(tensors)}, for which this model has no parameter")
    return weights
