"""What a model writes: at the end of a run, and whenever a trained one is asked.

`python train.py RUN_DIR --prompt=TEXT` streams it, and changes nothing in the run directory.
"""

import os
import sys
from dataclasses import replace

from configure import (
    Config,
    UserError,
    asks_for_help,
    check_setting,
    is_from_run,
    read_settings,
    run_of,
    split_words,
)
from training.compile import CudaGraphed
from training.device import select_device
from training.pretrained import load

# A run directory and nothing but these: it is asked, not trained
SAMPLING = frozenset("prompt samples sample_tokens temperature top_k seed device precision".split())
BETWEEN = "\n\n-----\n\n"  # two samples


def faster_on_gpu(device):
    """What model.generate() takes as `graphed`: on a GPU a step is one launch in place of hundreds."""
    if device.type != "cuda":
        return None
    return lambda function: CudaGraphed(function, enabled=True, on_failure=lambda error: None)


def write_samples(model, tokenizer, config, stop=None, graphed=None):
    """config.samples texts of config.prompt and what the model writes after it, up to an end of text. stop:
    the end of text, where generation may end before config.sample_tokens."""
    prompt_ids = tokenizer.encode(config.prompt) or [tokenizer.eot]
    written = [[] for _ in range(config.samples)]
    for tokens in model.generate([prompt_ids] * config.samples, config.sample_tokens, config.temperature,
                                 config.top_k, config.seed, stop, graphed):
        for ids, token in zip(written, tokens, strict=True):
            ids.append(token)
    ends = [ids.index(tokenizer.eot) if tokenizer.eot in ids else len(ids) for ids in written]
    return [config.prompt + tokenizer.decode(ids[:end]) for ids, end in zip(written, ends, strict=True)]


def sampling_config(argv):
    """(what to sample from, Config) where the command line asks a trained model: a run directory, a
    checkpoint in one or a folder of a Hugging Face model, and settings of SAMPLING alone, one of which says
    what to write. Else None. Raises UserError."""
    if asks_for_help(argv):
        return None
    sources, flags = split_words(argv)
    asks = flags.keys() <= SAMPLING and flags.keys() - {"device", "precision"}  # these alone resume a run
    if len(sources) != 1 or not asks or sources[0].endswith(".py"):
        return None
    [source] = sources
    is_mistyped = not os.path.exists(source) and os.path.isdir(os.path.dirname(source))
    if is_mistyped or os.path.exists(os.path.join(source, "best.py")) and not is_from_run(source):
        read_settings(source)  # raises the UserError
    settings = {"sample_tokens": Config.sample_tokens}
    if is_from_run(source):
        settings = {name: value for name, value in read_settings(run_of(source)).items() if name in SAMPLING}
    for name, value in flags.items():
        settings[name] = check_setting(name, value)
    return source, Config(**settings)


def sample(source, config):
    """Print what the model writes after config.prompt or, for -, after each line of standard input."""
    device, autocast = select_device(config, training=False)
    try:
        model, tokenizer = load(source, device)
    except UserError as error:
        raise UserError(str(error).replace("init_from", source, 1)) from None
    graphed = faster_on_gpu(device)
    with autocast:
        if config.prompt != "-":
            print_samples(model, tokenizer, config, graphed)
            return
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        for line in iter(sys.stdin.readline, ""):  # each when it is there, not when a block of them is
            if prompt := line.rstrip("\r\n"):
                print_samples(model, tokenizer, replace(config, prompt=prompt), graphed)


def print_samples(model, tokenizer, config, graphed):
    """Print one sample as it is written, or several when they are."""
    if config.samples > 1:
        print(BETWEEN.join(write_samples(model, tokenizer, config, tokenizer.eot, graphed)), end="\n\n")
        return
    print(config.prompt, end="", flush=True)
    prompt_ids = tokenizer.encode(config.prompt) or [tokenizer.eot]
    ids = model.generate(prompt_ids, config.sample_tokens, config.temperature, config.top_k, config.seed,
                         tokenizer.eot, graphed)
    for text in tokenizer.stream(ids):
        print(text, end="", flush=True)
    print("\n")
