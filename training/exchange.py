"""Weights in and out: between our parameters and the safetensors files of Hugging Face's families.

Which parameter is which is a table in huggingface.py. Here the tensors are read and written, and what our
forward pass multiplies by is put into them.
"""

import json
import math
import os
import re
from dataclasses import replace

import torch

import huggingface
from configure import Config, UserError
from data.files import write_text
from model import GPT, mlp_width
from parametrization import forward_multipliers

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of weights in several files: which is where
# Constants that older versions of transformers kept with the weights
NO_PARAMETER = re.compile(r".*\.attn\.(masked_)?bias|.*rotary_emb\.inv_freq")


def import_safetensors():
    """Raises UserError where it is not installed: only those need it who exchange weights."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("safetensors: weights of Hugging Face models need the package `safetensors`; "
                        "pip install safetensors") from None
    return safetensors


def shapes_of(config):
    """{parameter name: shape} of the GPT of `config`."""
    with torch.device("meta"):
        model = GPT(config)
    return {name: p.shape for name, p in model.named_parameters()}


def weight_files(source):
    """The paths of a model's safetensors files. Raises UserError where it has none."""
    try:
        path = huggingface.find_file(source, WEIGHTS)
        if path is not None:
            return [path]
        index = huggingface.find_file(source, INDEX)
        if index is not None:
            with open(index, encoding="utf-8") as file:
                names = sorted(set(json.load(file)["weight_map"].values()))
            paths = [huggingface.find_file(source, name) for name in names]
            if None in paths:
                raise ValueError(f"{source} lacks {names[paths.index(None)]}, which {INDEX} names")
            return paths
        pickled = huggingface.find_file(source, "pytorch_model.bin")
    except ValueError as error:
        raise UserError(f"init_from: {error}") from None
    except (LookupError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"init_from: {source}: {INDEX} is damaged ({type(error).__name__})") from None
    if pickled is not None:
        raise UserError(f"init_from: {source} holds pytorch_model.bin, a pickle, which can run code when it "
                        f"is read; takes {WEIGHTS}, as transformers' save_pretrained() writes it")
    raise UserError(f"init_from: {source} holds no {WEIGHTS}")


def read_tensors(paths, family):
    """{name: tensor} of safetensors files, with the names that the whole model's parameters have: a model
    without its head was saved without their first part. Raises UserError."""
    safetensors, tensors = import_safetensors(), {}
    for path in paths:
        try:
            tensors |= safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"init_from: {path} is damaged: {' '.join(str(error).split())[:120]}") from None
    prefix = family.modules["token_embedding"].partition(".")[0] + "."
    if not any(name.startswith(prefix) for name in tensors):
        tensors = {name if name.startswith("lm_head") else prefix + name: tensor
                   for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in tensors.items() if not NO_PARAMETER.fullmatch(name)}


def read_huggingface(source):
    """({setting: value}, {our parameter: fp32 tensor}) of a Hugging Face model. Raises UserError."""
    try:
        family, _ = huggingface.read_config(source)
        settings = huggingface.settings_of(source)
        config = Config(**settings)
    except UserError as error:
        raise UserError(f"init_from: config.json of {source}: {error}") from None
    except ValueError as error:
        raise UserError(f"init_from: {error}") from None
    tensors, weights = read_tensors(weight_files(source), family), {}
    if config.tied:
        tensors.pop("lm_head.weight", None)
    for name, shape in shapes_of(config).items():
        weights[name] = from_theirs(source, tensors, family, name, shape)
    if tensors:
        raise UserError(f"init_from: {source} holds {min(tensors)}, for which model.py has no parameter")
    return settings, weights


def from_theirs(source, tensors, family, name, shape):
    """Our parameter `name`, taken out of `tensors`, which are theirs. Raises UserError."""
    theirs, transposed = huggingface.parameter_names(family, name)
    if missing := [other for other in theirs if other not in tensors]:
        raise UserError(f"init_from: {source} lacks {missing[0]}")
    parts = [tensors.pop(other).float() for other in theirs]
    value = torch.cat([part.T if transposed else part for part in parts])
    if value.shape != shape:
        raise UserError(f"init_from: {source}: {theirs[0]} has the shape {tuple(parts[0].shape)}, which "
                        f"makes {tuple(value.shape)} of {name}; takes {tuple(shape)}")
    return value.contiguous()


def to_theirs(family, weights):
    """{their name: tensor} of our `weights`."""
    tensors = {}
    for name, value in weights.items():
        theirs, transposed = huggingface.parameter_names(family, name)
        for other, part in zip(theirs, value.chunk(len(theirs)), strict=True):
            tensors[other] = (part.T if transposed else part).contiguous()
    return tensors


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
    folded = replace(config, base_width=config.width, base_depth=config.depth, base_head_dim=config.head_dim,
                     parametrization="mup", embedding_mult=1.0, logit_mult=1.0, attention_mult=1.0,
                     norm_eps=config.norm_eps or (1e-5 if config.norm == "layer" else 1e-6))
    return folded, weights


def without_centering(config, weights, eps):
    """The same model with RMSNorm for LayerNorm, where that has no bias: what is written into the residual
    stream has mean 0, so that there is nothing to center (SliceGPT, arXiv 2401.15024, section 3.1).

    eps: of the new norms, which is that of queries' and keys' norms too. The stream is scaled so that it
    means what config.norm_eps meant before.
    """
    scale, weights = math.sqrt(eps / config.norm_eps), dict(weights)
    if config.tied:  # the readout reads rows whose mean matters
        weights["readout.weight"] = weights["token_embedding.weight"].clone()
    for name, value in weights.items():
        if name.startswith(("token_embedding", "position_embedding")):
            weights[name] = scale * (value - value.mean(1, keepdim=True))
        elif name.endswith((".attention.out.weight", ".mlp.down.weight")):
            weights[name] = scale * (value - value.mean(0, keepdim=True))
    return replace(config, norm="rms", norm_eps=eps, tied=False), weights


def with_biases(config, weights):
    """The same model with biases of 0."""
    zeros = {name.removesuffix("weight") + "bias": p.new_zeros(len(p)) for name, p in weights.items()
             if not name.endswith(("embedding.weight", "readout.weight"))}
    return replace(config, bias=True), weights | zeros


def to_huggingface(config, weights):
    """(Family, Config, {their name: fp32 tensor}) of a model of `config` with our `weights`. Raises UserError
    that names the setting for which there is no class."""
    head_eps = config.norm_eps or 1e-6
    config, weights = fold(config, weights)
    if (config.norm, config.position, config.bias) == ("layer", "rotary", False):
        eps = head_eps if config.qk_norm else config.norm_eps
        config, weights = without_centering(config, weights, eps)
    try:
        family = huggingface.family_of(config)
    except ValueError as error:
        raise UserError(str(error)) from None
    if family is huggingface.GPT2 and not config.bias:
        config, weights = with_biases(config, weights)
    return family, config, to_theirs(family, {name: p.float() for name, p in weights.items()})


def write_model(model, folder, eot):
    """Write config.json and the weights of `model` into `folder`. Returns (Family, the Config of what is
    written). eot: the id of the end of text. Raises UserError, and OSError."""
    safetensors = import_safetensors()
    weights = {name: p.detach().cpu() for name, p in model.named_parameters()}
    family, config, tensors = to_huggingface(model.config, weights)
    fields = huggingface.config_fields(config, family, mlp_width(config), eot)
    write_text(os.path.join(folder, "config.json"), json.dumps(fields, indent=1))
    safetensors.torch.save_file(tensors, os.path.join(folder, WEIGHTS), metadata={"format": "pt"})
    return family, config
