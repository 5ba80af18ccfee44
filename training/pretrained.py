"""Trained weights to start from or to sample: those of a run of ours, or of a Hugging Face model.

interop/ reads the latter; it is imported only where one is asked for.
"""

import functools
import hashlib
import os
import sys
from dataclasses import replace
from typing import NamedTuple

import configure
from configure import SETTINGS, Config, UserError, describe_os_error, is_from_run, names_in, run_of
from data.datasets import parse_mixture
from data.tokenizer import build_tokenizer, check_tokenizer_name, load_tokenizer
from model import GPT
from training.checkpoint import DIGEST_BYTES, digest, load_weights, read_newest, settings_of_checkpoint


def read_foreign_settings(source):
    """{setting: value} that a run takes over from a Hugging Face model. Raises UserError."""
    from interop.huggingface import settings_to_start_from
    return settings_to_start_from(source)


configure.read_foreign_settings = read_foreign_settings


class Pretrained(NamedTuple):
    """The weights of a model, and what they mean."""
    source: str  # the file they are from, or the Hugging Face model
    settings: dict  # {setting: value}: what the weights need to mean the same, at the least
    weights: dict  # {our parameter: tensor}
    checkpoint: dict | None  # of a run


def checkpoint_paths(source):
    """The checkpoints that `source` may stand for, in order of preference. Raises UserError."""
    names = [os.path.basename(source)] if source.endswith(".pt") else ["best.pt", "last.pt", "previous.pt"]
    paths = [os.path.join(run_of(source), name) for name in names]
    paths = [path for path in paths if os.path.exists(path)]
    if not paths:
        raise UserError(f"{source} must be a run that has saved {' or '.join(names)}")
    return paths


def warn(text):
    print(text, file=sys.stderr)


def read_pretrained(source, say=warn):
    """The Pretrained of a run directory, a checkpoint in one, or a Hugging Face model. Raises UserError.

    say: prints a line where a run's checkpoint is damaged, and another of its checkpoints is read.
    """
    if not is_from_run(source):
        from interop.huggingface import read_huggingface
        settings, weights = read_huggingface(source)
        return Pretrained(source, settings, weights, None)
    path, checkpoint = read_newest(checkpoint_paths(source), say)
    return Pretrained(path, settings_of_checkpoint(checkpoint), checkpoint["model"], checkpoint)


def hash_weights(source):
    """The sha256 of the files that read_pretrained(source) takes weights from. Raises UserError."""
    if is_from_run(source):
        paths = checkpoint_paths(source)[:1]
    else:
        from interop.huggingface import weight_files
        paths = weight_files(source)
    hashes = []
    try:
        for path in paths:
            status = os.stat(path)
            hashes.append(hash_file(path, status.st_size, status.st_mtime_ns))
    except OSError as error:
        raise UserError(f"init_from: {describe_os_error(error, source)}") from None
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
    """Raises UserError where weights of `pretrained` would compute something else in a model of `config`, or
    where its tokens cannot be those that they were trained on."""
    for name in names_in("function"):
        wanted, actual = getattr(config, name), pretrained.settings.get(name, getattr(config, name))
        if wanted == actual or name == "vocab_size":  # which may be left to the tokenizer: load() compares
            continue
        if name == "context" and (config.position == "rotary" or wanted < actual):
            continue
        raise UserError(f"{name} must be {actual}, as {pretrained.source} was trained, got {wanted}")
    is_known = pretrained.checkpoint is not None or "tokenizer" in pretrained.settings
    if not is_known and config.tokenizer.startswith("bpe:"):
        raise UserError(f"tokenizer must be the one that {pretrained.source} was trained with, got "
                        f"{config.tokenizer}; it has no tokenizer.json: give a folder that holds one, or a "
                        "tiktoken name such as --tokenizer=gpt2")


def check_same_tokenizer(config, dataset, pretrained):
    """Raises UserError where the tokens of `dataset` are not those that the weights were trained on."""
    if pretrained.checkpoint is not None:
        expected, advice = pretrained.checkpoint["tokens"]["tokenizer"], run_of(config.init_from)
    else:
        advice = pretrained.settings.get("tokenizer")
        if advice in (None, config.tokenizer):
            return
        expected = build_tokenizer(advice).sha256
    if dataset.hashes["tokenizer"] != expected:
        raise UserError(f"tokenizer must be the one that {pretrained.source} was trained with, got "
                        f"{config.tokenizer}; try --tokenizer={advice}")


def check_held_out(config, dataset, pretrained):
    """Raises UserError where the weights were trained on text that `dataset` validates on: documents are held
    out by a hash below val_fraction, so those of a larger fraction are not all held out by a smaller one."""
    if pretrained.checkpoint is None:
        return
    now, before = dataset.meta["settings"], pretrained.settings["dataset"]
    names = [name for name, _ in parse_mixture(before)] or [before]
    parts = [part["dataset"] for part in dataset.meta.get("parts", [])]
    is_same_text = any(name in (config.dataset, now["dataset"], *parts) for name in names)
    largest = pretrained.settings["val_fraction"]
    # Of few documents the ends are held out, which a larger fraction may not have done
    is_other_rule = dataset.meta.get("held_out") == "ends" and now["val_fraction"] != largest
    if is_same_text and (now["val_fraction"] > largest or is_other_rule):
        raise UserError(f"val_fraction must be at most {largest} on the text that {pretrained.source} was "
                        f"trained on, got {now['val_fraction']}: the weights have seen the rest of the text")


def load_pretrained(pretrained, config, dataset, model):
    """Copy the weights into `model`, which is to be trained on `dataset`. Raises UserError."""
    check_same_tokenizer(config, dataset, pretrained)
    check_held_out(config, dataset, pretrained)
    weights, rows = dict(pretrained.weights), len(pretrained.weights["token_embedding.weight"])
    if model.config.vocab_size != rows:
        raise UserError(f"vocab_size must be {rows}, as {pretrained.source} has that many rows, got "
                        f"{model.config.vocab_size}")
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
        name = pretrained.settings.get("tokenizer")
        if name is None:
            raise UserError(f"tokenizer: {source} holds no tokenizer.json; save it there with transformers' "
                            "AutoTokenizer.save_pretrained()")
        check_tokenizer_name(name)
        return build_tokenizer(name)
    return load_tokenizer(run_of(source))


def load(source, device="cpu"):
    """(model, tokenizer) of a run directory (its best weights), a checkpoint in one, or a Hugging Face model:
    for use, not for training. `model.generate` writes, `tokenizer` encodes and decodes. Raises UserError."""
    pretrained = read_pretrained(source)
    return build_pretrained(pretrained, device), tokenizer_of(source, pretrained)
