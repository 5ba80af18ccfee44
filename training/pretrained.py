"""Trained weights to start from or to use: those of a run of ours, or of a Hugging Face model."""

import functools
import hashlib
import os
from dataclasses import replace
from typing import NamedTuple

from configure import (
    SETTINGS,
    Config,
    UserError,
    is_from_run,
    names_in,
    run_of,
    settings_of_huggingface,
)
from data.loader import TokenDataset
from data.prepare import find_prepared
from data.tokenizer import (
    RUN_META,
    Tokenizer,
    build_encoding,
    check_tokenizer_name,
    load_kept,
    ranks_sha256,
)
from model import GPT
from training.checkpoint import (
    DIGEST_BYTES,
    digest,
    folders_of,
    load_weights,
    read_checkpoint,
    settings_of_checkpoint,
)
from training.exchange import read_huggingface, weight_files


class Pretrained(NamedTuple):
    """The weights of a model, and what they mean."""
    source: str  # the file they are from, or the Hugging Face model
    settings: dict  # {setting: value}: what the weights need to mean the same, at the least
    weights: dict  # {our parameter: tensor}
    checkpoint: dict | None  # of a run


def checkpoint_path(source):
    """The checkpoint that `source` stands for: itself; or of a run directory the one of the lowest validation
    loss, or the newest. Raises UserError."""
    if source.endswith(".pt"):
        if not os.path.exists(source):
            raise UserError(f"{source}: No such file; takes a checkpoint, such as {run_of(source)}/last.pt")
        return source
    for name in ("best.pt", "last.pt"):
        path = os.path.join(source, name)
        if os.path.exists(path):
            return path
    raise UserError(f"{source} holds no best.pt and no last.pt; takes a run that has saved one")


def read_pretrained(source):
    """The Pretrained of a run directory, a checkpoint in one, or a Hugging Face model. Raises UserError."""
    if not is_from_run(source):
        settings, weights = read_huggingface(source)
        return Pretrained(source, settings, weights, None)
    path = checkpoint_path(source)
    checkpoint = read_checkpoint(path)
    return Pretrained(path, settings_of_checkpoint(checkpoint), checkpoint["model"], checkpoint)


def hash_weights(source):
    """The sha256 of the files that read_pretrained(source) takes weights from. Raises UserError."""
    paths = [checkpoint_path(source)] if is_from_run(source) else weight_files(source)
    hashes = []
    for path in paths:
        try:
            status = os.stat(path)
            hashes.append(hash_file(path, status.st_size, status.st_mtime_ns))
        except OSError as error:
            raise UserError(f"init_from: {path}: {error.strerror}") from None
    return hashlib.sha256(b"".join(hashes)).hexdigest()


@functools.cache
def hash_file(path, size, time):
    """The sha256 of a file, read again when its size or time of change are others. A checkpoint ends in the
    sha256 of the rest: only that is read, and stands for all of it. Raises OSError."""
    if not path.endswith(".pt"):
        return digest(path, size)
    with open(path, "rb") as file:
        file.seek(max(0, size - DIGEST_BYTES))
        return file.read()


def check_same_function(config, pretrained):
    """Raises UserError where weights of `pretrained` would compute something else in a model of `config`."""
    for name in names_in("function"):
        wanted, actual = getattr(config, name), pretrained.settings.get(name, getattr(config, name))
        if wanted == actual or name == "vocab_size":  # which may be left to the tokenizer: load() compares
            continue
        if name == "context" and (config.position == "rotary" or wanted < actual):
            continue
        raise UserError(f"{name}: got {wanted}, but {pretrained.source} was trained with {actual}; takes the "
                        "same with init_from")


def check_same_tokenizer(config, dataset, pretrained):
    """Raises UserError where the tokens of `dataset` are not those that the weights were trained on."""
    if pretrained.checkpoint is not None:
        expected, advice = pretrained.checkpoint["tokens"]["tokenizer"], run_of(config.init_from)
    else:
        advice = settings_of_huggingface(config.init_from).get("tokenizer")
        if advice in (None, config.tokenizer):
            return
        expected = ranks_sha256(build_encoding(advice, None))
    if dataset.hashes["tokenizer"] != expected:
        raise UserError(f"tokenizer: got {config.tokenizer}, whose tokens are not those that "
                        f"{pretrained.source} was trained on; takes --tokenizer={advice}")


def load_pretrained(pretrained, config, dataset, model):
    """Copy the weights into `model`, which is to be trained on `dataset`. Raises UserError."""
    check_same_tokenizer(config, dataset, pretrained)
    weights, rows = dict(pretrained.weights), len(pretrained.weights["token_embedding.weight"])
    if model.config.vocab_size != rows:
        raise UserError(f"vocab_size: got {model.config.vocab_size}, takes the {rows} rows that "
                        f"{pretrained.source} has")
    if "position_embedding.weight" in weights:
        weights["position_embedding.weight"] = weights["position_embedding.weight"][:config.context]
    load_weights(pretrained.source, {"model": weights}, model)


def build_pretrained(pretrained, device="cpu"):
    """The model of `pretrained`, for use, on `device`. Raises UserError."""
    rows = len(pretrained.weights["token_embedding.weight"])
    settings = {name: value for name, value in pretrained.settings.items() if name in SETTINGS}
    model = GPT(replace(Config(**settings), vocab_size=rows))
    load_weights(pretrained.source, {"model": pretrained.weights}, model)
    return model.eval().to(device)


def tokenizer_of(source, pretrained):
    """The Tokenizer of what read_pretrained(source) returned. Raises UserError."""
    if pretrained.checkpoint is None:
        name = settings_of_huggingface(source).get("tokenizer")
        if name is None:
            raise UserError(f"tokenizer: {source} holds no tokenizer.json")
        check_tokenizer_name(name)
        encoding = build_encoding(name, None)
        return Tokenizer(encoding, encoding.n_vocab)
    run, checkpoint = run_of(source), pretrained.checkpoint
    if not os.path.exists(os.path.join(run, RUN_META)):  # a run of an older version
        folder = find_prepared(checkpoint["tokens"], folders_of(Config(**pretrained.settings), checkpoint))
        if folder is not None:
            return TokenDataset(folder).tokenizer
    return load_kept(run)


def load(source, device="cpu"):
    """(model, tokenizer) of a run directory (its best weights), a checkpoint in one, or a Hugging Face model:
    for use, not for training. `model.generate` writes, `tokenizer` encodes and decodes. Raises UserError."""
    pretrained = read_pretrained(source)
    return build_pretrained(pretrained, device), tokenizer_of(source, pretrained)
