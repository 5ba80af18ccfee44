"""Models of Hugging Face to start from or to sample: found in a folder or on the hub, read, and proven.

Everything here works on a folder; a model of the hub is downloaded into one first.
"""

import contextlib
import functools
import glob
import json
import os
from dataclasses import replace

import torch

from configure import Config, UserError
from interop.families import settings_of
from interop.weights import check_same_logits, from_transformers, load_theirs
from model import GPT

# The lr of a run that starts from such a model and gives none: usual for GPT-2's size, low for a small model
LR = 5e-5
HUB_TIMEOUT = 10  # seconds
# Models without an owner, from the first days of the hub; their tokenizer is tiktoken's gpt2
SHORT_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")


@functools.cache
def hub_commit(repository):
    """The commit that a model of the hub is at; None where the hub does not answer. Asked first, and once, as
    a download would be tried for minutes. Raises HfHubHTTPError where it answers that there is none."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    try:
        return HfApi().model_info(repository, timeout=HUB_TIMEOUT).sha
    except HfHubHTTPError:
        raise
    except Exception:  # of the network, of many types
        return None


@functools.cache
def download(repository, pattern):
    """The local folder of a hub model, with the files that match `pattern`. Raises UserError."""
    from huggingface_hub import snapshot_download
    try:
        commit = hub_commit(repository)
        return snapshot_download(repository, revision=commit, allow_patterns=pattern,
                                 local_files_only=commit is None)
    except Exception as error:  # of many types
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"there is no folder {repository}, and it cannot be downloaded from the Hugging Face "
                        f"hub ({type(error).__name__}: {reason})") from None


def folder_of(source, with_weights=False):
    """The folder of a model: `source` itself, or where its files of the hub are. Raises UserError."""
    if os.path.isdir(source):
        return source
    owner = os.path.dirname(source)
    if source not in SHORT_NAMES and (source.count("/") != 1 or not owner or os.path.isdir(owner)):
        raise UserError("must be a run directory, a checkpoint in one, the folder of a Hugging Face model, "
                        f"owner/name on the hub, or one of {', '.join(SHORT_NAMES)}; got {source}")
    folder = download(source, "*.json")
    return download(source, "model*.safetensors") if with_weights else folder


def read_family(folder):
    """(Family, {our setting: value}, the fields of config.json) of a model. Raises UserError."""
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            fields = dict(json.load(file))
        return *settings_of(fields), fields
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
    folder = folder_of(source, with_weights=True)
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors")))
    if not paths:
        raise UserError(f"{folder} holds no .safetensors, in which transformers' save_pretrained() writes "
                        "weights; pickles, such as pytorch_model.bin, can run code and are never read")
    return paths


@naming_init_from()
def read_huggingface(source):
    """({setting: value}, {our parameter: fp32 tensor}) of a model that computes the same in model.py as in
    transformers: its logits are compared. Raises UserError."""
    paths, folder = weight_files.__wrapped__(source), folder_of(source, with_weights=True)
    family, settings, fields = read_family(folder)
    config = Config(**settings)
    try:
        check_files(paths, config)
        theirs = load_theirs(folder, family, fields)
        if config.position == "rotary":  # its tables need not be longer than what is compared
            config = replace(config, context=min(config.context, 64))
        model = GPT(config).eval()
        names = [name for name, _ in model.named_parameters()]
        weights = from_transformers(family, names, theirs.named_parameters())
        model.load_state_dict(weights, assign=True)
        check_same_logits(model, theirs)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    return settings | tokenizer_of(folder, source), weights


def check_files(paths, config):
    """Raises UserError where the files cannot hold the parameters of a model of `config`, which are not made
    then, or hold others than floating-point numbers."""
    from safetensors import safe_open
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(config).parameters())
    if parameters > sum(map(os.path.getsize, paths)):
        raise UserError(f"config.json describes {parameters:,} parameters, more than its files have bytes")
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}
        except Exception as error:  # OSError, or SafetensorError
            raise UserError(f"{path} is damaged: {' '.join(str(error).split())[:120]}") from None
        for name, kind in kinds.items():
            if not kind.startswith(("F", "BF")) and not name.endswith((".attn.bias", ".masked_bias")):
                raise UserError(f"{name} holds {kind}, must hold floating-point numbers")
