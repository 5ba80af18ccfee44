"""Models of Hugging Face to start from or to sample: found in a folder or on the hub, read, and proven.

Everything here works on a folder; a model of the hub is downloaded into one first.
"""

import contextlib
import functools
import glob
import json
import os
import re
from dataclasses import replace

import torch

from configure import Config, UserError
from interop.families import settings_of
from interop.weights import WEIGHTS, check_same_logits, from_transformers, import_transformers
from model import GPT

# What older versions of transformers saved with the weights that is none
NO_PARAMETER = re.compile(r".*\.attn\.(masked_)?bias|.*rotary_emb\.inv_freq")
# The lr of a run that starts from such a model and gives none: usual for GPT-2's size, low for a small model
LR = 5e-5
# Models without an owner, from the first days of the hub; their tokenizer is tiktoken's gpt2
SHORT_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")


@functools.cache
def download(repository, pattern, commit=None):
    """The local folder of a model of the hub, named after its commit, with those of its files that match.
    Without a network it is what was downloaded before. Raises UserError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
    try:
        return snapshot_download(repository, revision=commit, allow_patterns=pattern)
    except LocalEntryNotFoundError:
        raise UserError(f"got {repository}, but there is no such folder, and the Hugging Face hub cannot be "
                        "reached; give a local folder, or check the network") from None
    except RepositoryNotFoundError:
        raise UserError(f"got {repository}, but there is neither such a folder nor such a public model on "
                        "the Hugging Face hub; check the name, or log in with `hf auth login`") from None
    except Exception as error:  # of many types
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{repository}: the Hugging Face hub says: {reason}") from None


def folder_of(source, with_weights=False):
    """The folder of a model: `source` itself, or where its files of the hub are. Raises UserError."""
    if os.path.isdir(source):
        return source
    owner = os.path.dirname(source)
    if source not in SHORT_NAMES and (source.count("/") != 1 or not owner or os.path.isdir(owner)):
        raise UserError("must be a run directory, a checkpoint in one, the folder of a Hugging Face model, "
                        f"owner/name on the hub, or one of {', '.join(SHORT_NAMES)}; got {source}")
    folder = download(source, "*.json")
    return download(source, "model*.safetensors", os.path.basename(folder)) if with_weights else folder


def read_family(folder):
    """(Family, {our setting: value}, the fields of config.json) of a model. Raises UserError."""
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            fields = dict(json.load(file))
        return *settings_of(fields, import_transformers()), fields
    except FileNotFoundError:
        raise UserError(f"{folder} holds no config.json; give a run or a Hugging Face model") from None
    except UserError as error:
        raise UserError(f"config.json of {folder}: {error}") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:120]}") from None


def tokenizer_of(folder, source):
    """{"tokenizer": what that setting is for a model}: the folder that holds its tokenizer.json, or gpt2.
    Empty where the files do not say it. Raises UserError."""
    if source in SHORT_NAMES:
        return {"tokenizer": "gpt2"}
    if os.path.exists(os.path.join(folder, "tokenizer.json")):
        return {"tokenizer": folder}
    return {}


@contextlib.contextmanager
def naming_init_from():
    """Lets the UserErrors of a function begin with the setting that names its model."""
    try:
        yield
    except UserError as error:
        raise UserError(f"init_from: {error}") from None


@naming_init_from()
def settings_to_start_from(source):
    """{setting: value} that a run takes over from a model unless it is given: what makes it the same
    function, its tokenizer, and an lr. Raises UserError."""
    folder = folder_of(source)
    _, settings, _ = read_family(folder)
    return settings | tokenizer_of(folder, source) | {"lr": LR}


@naming_init_from()
def weight_files(source):
    """The paths of a model's safetensors files. Raises UserError where it has none."""
    return find_weights(folder_of(source, with_weights=True))


def find_weights(folder):
    """The paths of the safetensors files in `folder`. Raises UserError where it has none."""
    paths = glob.glob(os.path.join(glob.escape(folder), WEIGHTS))
    paths = paths or sorted(glob.glob(os.path.join(glob.escape(folder), "model-*.safetensors")))
    if not paths and os.path.exists(os.path.join(folder, "pytorch_model.bin")):
        raise UserError(f"{folder} holds pytorch_model.bin, a pickle, which can run code when it is read; "
                        f"save it as {WEIGHTS} with transformers' save_pretrained()")
    if not paths:
        raise UserError(f"{folder} holds no {WEIGHTS}")
    return paths


def read_tensors(paths, family):
    """{name: tensor} of safetensors files, under the names that the whole model's parameters have: a model
    that was saved without its head lacks their first part. Raises UserError."""
    import safetensors.torch
    tensors = {}
    for path in paths:
        try:
            tensors |= safetensors.torch.load_file(path)
        except Exception as error:  # OSError, SafetensorError, or what an odd type of numbers ends in
            raise UserError(f"{path} is damaged: {' '.join(str(error).split())[:120]}") from None
    prefix = family.modules["token_embedding"].partition(".")[0] + "."
    if not any(name.startswith(prefix) for name in tensors):
        tensors = {name if name.startswith("lm_head") else prefix + name: tensor
                   for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in tensors.items() if not NO_PARAMETER.fullmatch(name)}


@naming_init_from()
def read_huggingface(source):
    """({setting: value}, {our parameter: fp32 tensor}) of a model that computes the same in model.py as in
    transformers: its logits are compared. Raises UserError."""
    folder = folder_of(source, with_weights=True)
    family, settings, fields = read_family(folder)
    config = Config(**settings)
    if config.position == "rotary":  # its tables need not be longer than what is compared
        config = replace(config, context=min(config.context, 64))
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in GPT(config).named_parameters()}
    tensors = read_tensors(find_weights(folder), family)
    try:
        if config.tied:
            check_tied(tensors, family)
        weights = from_transformers(family, config, tensors, shapes)
        model = GPT(config).eval()
        model.load_state_dict(weights, assign=True)
        check_same_logits(model, folder, family, fields)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    return settings | tokenizer_of(folder, source), weights


def check_tied(tensors, family):
    """Removes the readout of a tied model, where it was saved too. Raises UserError unless it is the
    embedding."""
    readout = tensors.pop("lm_head.weight", None)
    embedding = tensors.get(family.modules["token_embedding"] + ".weight")
    if readout is not None and embedding is not None and not torch.equal(readout, embedding):
        raise UserError("tie_word_embeddings is true, but lm_head.weight is not the embedding; remove that "
                        "tensor, or set tie_word_embeddings to false")
