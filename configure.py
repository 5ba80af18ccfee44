"""Every setting, its unit and its default. Defaults < config files, in order < --name=value.
A config file is plain Python assignments; a run directory stands for the `config.json` in it."""

import ast
import difflib
import inspect
import json
import math
import os
import re
import runpy
import sys
from dataclasses import dataclass
from operator import add, mul, sub, truediv
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

Count = Annotated[int, lambda x: x >= 1, "a whole number, 1 or more"]
Whole = Annotated[int, lambda x: 0 <= x < 2**31, "a whole number from 0 to below 2**31"]
Positive = Annotated[float, lambda x: 0 < x < math.inf, "a finite number above 0"]
NotNegative = Annotated[float, lambda x: 0 <= x < math.inf, "a finite number, 0 or more"]
Fraction = Annotated[float, lambda x: 0 <= x < 1, "a number from 0 to below 1"]
Share = Annotated[float, lambda x: 0 <= x <= 1, "a number from 0 to 1"]
Flag = Annotated[bool, lambda x: True, "true or false"]
Text = Annotated[str, bool, "text"]
Device = Annotated[str, re.compile(r"auto|cpu|mps|cuda(:\d\d?)?").fullmatch, "auto, cpu, mps, cuda, cuda:N"]


def one_of(*choices):
    return Annotated[object, lambda x: repr(x) in map(repr, choices), ", ".join(map(str, choices))]


class UserError(ValueError):
    """Something the user can put right; its text is the one line they read."""


@dataclass(frozen=True)
class Config:
    """All settings of a run. Building one checks it: UserError names the setting and what it takes."""
    # Shape (the ladder axes are width, depth, batch and context)
    width: Count = 128  # residual channels, d_model; a multiple of head_dim
    depth: Count = 4  # transformer blocks
    batch: Count = 32  # sequences per optimizer step, over all devices and accumulation
    context: Count = 256  # tokens per sequence
    head_dim: Count = 64  # channels per attention head
    position: one_of("learned", "rotary") = "learned"  # how a token knows its place
    tied: Flag = False  # one matrix for embedding and readout; it takes the embedding's rules
    bias: Flag = False  # biases in the blocks' linear layers and in every norm
    dropout: Fraction = 0.0  # probability, on embeddings, attention and residual branches
    vocab_size: Count | None = None  # rows of embedding and readout; None: the tokenizer's count, never fewer
    # Parametrization (at the base shape every rule is the identity)
    base_width: Count = 128  # residual channels of the tuned proxy
    base_depth: Count = 4  # blocks of the tuned proxy
    base_head_dim: Count = 64  # channels per head of the tuned proxy
    base_batch: Count | None = None  # sequences a step there: lr, decay, beta2 go with batch; None: they stay
    base_tokens: Count | None = None  # tokens of its run: lr x (tokens / base_tokens)^-0.32; None: it stays
    parametrization: one_of("mup", "sp") = "mup"  # mup transfers; sp, the control, is the standard one
    depth_alpha: Share = 1.0  # mup: residual branches x depth_mult^-alpha; 1 CompleteP, 1/2 Depth-muP
    # Tuned settings (found on the proxy, moved unchanged to the target)
    lr: Positive = 2**-9  # peak learning rate of the hidden matrices at the base shape
    embedding_lr_mult: Positive = 1.0  # x lr, embedding
    readout_lr_mult: Positive = 1.0  # x lr, readout
    norm_lr_mult: Positive = 1.0  # x lr, norms and biases
    embedding_std: Positive = 0.02  # init standard deviation of token and position embeddings
    hidden_std: Positive = 1.0  # init of the hidden matrices, in units of 1/sqrt(fan_in)
    readout_std: NotNegative = 1.0  # init of the readout, in units of 1/sqrt(base_width)
    zero_residual_out: Flag = False  # start every block's two output projections at 0
    zero_query: Flag = False  # start the query projections at 0, so attention starts uniform
    embedding_mult: Positive = 1.0  # x what the embeddings put into the residual stream
    logit_mult: Positive = 1.0  # x logits
    attention_mult: Positive = 1.0  # x attention logits
    weight_decay: NotNegative = 0.0  # coupled decay per step, lr * weight_decay, at the base shape
    beta1: Fraction = 0.9  # Adam's decay of the gradient average
    beta2: Fraction = 0.95  # Adam's decay of the squared-gradient average
    eps: Positive = 1e-8  # Adam's epsilon at the base shape
    grad_clip: NotNegative = 1.0  # largest global gradient norm; 0: no clipping
    warmup: Fraction = 0.1  # fraction of the steps, linear
    schedule: one_of("cosine", "linear", "constant", "inverse_sqrt", "step") = "cosine"  # after the warmup
    final_lr: Share = 0.1  # fraction of the peak that the schedule ends at, or never goes under
    # Data
    dataset: Text = "stdlib"  # stdlib; a path, glob or folder of .txt .jsonl .parquet; a hub name owner/name
    tokenizer: Text = "bpe:2048"  # bpe:N, trained on the data set; bytes; a tiktoken name (gpt2, o200k_base)
    subset: Text | None = None  # configuration of a hub data set
    split: Text = "train"  # split of a hub data set
    text_field: Text = "text"  # column that holds the text of .jsonl, .parquet and hub rows
    max_tokens: Count | None = None  # tokens to prepare; None: all
    val_fraction: Fraction = 0.05  # fraction of the documents held out, chosen by a fixed hash of their text
    seed: Whole = 0  # of initialization, batches and dropout
    # Run (what a run that goes on may change; nothing above)
    steps: Whole = 1000  # optimizer steps
    micro_batch: Count | None = None  # sequences per pass, a divisor of batch; None: the whole batch
    eval_every: Count | None = None  # steps between evaluations; None: at the end only
    eval_tokens: Count = 65536  # validation tokens per evaluation, as many whole windows as fit
    checkpoint_every: Count | None = 500  # steps between checkpoints; None: at the end only
    data_dir: Text = "data/prepared"  # folder of prepared data sets
    out: Text | None = None  # run directory; None: out/NAME on the command line, none from Python
    device: Device = "auto"  # cpu, cuda, cuda:N or mps; auto: the fastest there is
    precision: one_of("auto", "bf16", "fp32") = "auto"  # matrix products; auto: bf16 on cuda
    compile: one_of("auto", "blocks", "model", False) = "auto"  # torch.compile; auto: blocks, on cuda
    graph: one_of("auto", True, False) = "auto"  # the optimizer step as one CUDA graph; auto: on one GPU
    shard: Flag = False  # cut model and optimizer over torchrun's processes (FSDP2), not a copy each (DDP)
    wandb: Flag = False  # log to Weights & Biases too, offline without a login
    prompt: Annotated[str, lambda x: True, "text"] = ""  # what the sample at the end goes on from
    sample_tokens: Whole = 200  # tokens in the sample
    temperature: NotNegative = 0.8  # x 1/temperature on the logits; 0: always the likeliest token
    top_k: Count | None = 50  # tokens to choose among; None: all

    def __post_init__(self):
        self.__dict__.update({name: check(name, getattr(self, name)) for name in KINDS})
        for name, unit in ("width", "head_dim"), ("base_width", "base_head_dim"), ("batch", "micro_batch"):
            n, d = getattr(self, name), getattr(self, unit) or 1
            if n % d:
                raise UserError(f"{name}: got {n}, takes a multiple of {unit}={d}, such as {n + d - n % d}")
    width_mult = property(lambda self: self.width / self.base_width)
    depth_mult = property(lambda self: self.depth / self.base_depth)


KINDS = {name: get_args(kind) for name, kind in get_type_hints(Config, include_extras=True).items()}
KINDS = {name: (*get_args(a[0]), True) if type(None) in a else (*a, False) for name, a in KINDS.items()}


def hint(word, words):
    """The end of an error line about a mistyped word: the nearest there are."""
    near = [w for w in difflib.get_close_matches(word, words) if w != word]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def check(name, value, where=""):
    """`value` as setting `name` keeps it; UserError when there is no such setting or it does not fit."""
    if name not in KINDS:
        raise UserError(f"{where}{name}: no such setting{hint(name, KINDS) or '; --help lists them'}")
    kind, fits, words, optional = KINDS[name]
    if type(value) in (int, float) and abs(value) < 1e99 and (kind is float or kind is int and not value % 1):
        value = kind(value)
    if not (value is None and optional) and (kind not in (type(value), object) or not fits(value)):
        raise UserError(f"{where}{name}: got {value!r}, takes {words}{hint(str(value), words.split(', '))}")
    return value


def parse(name, text):
    """What `text`, from the command line, means for setting `name`: a literal, arithmetic, or just text."""
    def calculate(node):
        operation = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.Pow: math.pow}.get(
            type(getattr(node, "op", None)))
        return operation(calculate(node.left), calculate(node.right)) if operation else ast.literal_eval(node)
    kind, _, _, optional = KINDS.get(name, (str, None, None, False))
    try:
        if kind is str and not (optional and text.lower() == "none"):
            return text
        return calculate(ast.parse(text.capitalize() if text.isalpha() else text.strip(), mode="eval").body)
    except (ValueError, SyntaxError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return text


def read(source):
    """{setting: value} of a config file or a run directory. Raises UserError."""
    path = os.path.join(source, "config.json") if os.path.isdir(source) else source
    try:
        if path != source:
            return {**json.loads(Path(path).read_text("utf-8")), "out": source}
        return {name: value for name, value in runpy.run_path(path).items()
                if name in KINDS or not (name[0] == "_" or inspect.ismodule(value) or callable(value))}
    except (Exception, SystemExit) as error:
        what = getattr(error, "strerror", None) or f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{path}: {what}{hint(path, map(str, Path('config').glob('*.py')))}") from None


def configure(argv):
    """The Config that the command-line words `argv` describe. Raises UserError; --help prints and exits."""
    words, layers, flags = iter(argv), [], {}
    for word in words:
        name, equals, text = word.lstrip("-").partition("=")
        if word in ("-h", "--help"):
            sys.exit(print(help_text()))
        if not word.startswith("-"):
            layers.append((f"{word}: ", read(word)))
            continue
        if name in KINDS and not equals and (text := next(words, "--")).startswith("--"):
            raise UserError(f"{name}: got no value, takes --{name}=VALUE")
        flags[name] = parse(name, text)
    return Config(**{name: check(name, value, where) for where, values in [*layers, ("", flags)]
                     for name, value in values.items()})


def help_text():
    """Every setting with its default, unit and group, read off the source of Config."""
    found = re.findall(r"^    (?:# (.+)|(\w+): .*?  # (.+))$", inspect.getsource(Config), re.MULTILINE)
    return "\n".join(["usage: python train.py [CONFIG.py | RUN_DIR ...] [--name=value ...]", __doc__] + [
        f"\n{group}" if group else f"  {f'--{name}={getattr(Config, name)}':32}{text}"
        for group, name, text in found])
