"""Every setting, its unit and its default; and how files and flags make a Config of them.

Defaults < config files, in order < --name=value. Imports no torch, so that a command which only reads tables
starts at once.
"""

import ast
import contextlib
import difflib
import errno
import functools
import inspect
import json
import math
import operator
import os
import re
import signal
import sys
import textwrap
import time
import traceback
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, NamedTuple, get_args, get_type_hints

A_PATH = "a name or a path"
# Each type of setting: (Python type, whether a value is accepted, what is accepted, for people)
Count = Annotated[int, lambda x: 1 <= x <= 2**53, "a whole number from 1 to 2**53"]
Whole = Annotated[int, lambda x: 0 <= x < 2**31, "a whole number from 0 to below 2**31"]
Positive = Annotated[float, lambda x: 0 < x <= 1e30, "a number above 0, at most 1e30"]
NotNegative = Annotated[float, lambda x: 0 <= x <= 1e30, "a number from 0 to 1e30"]
Fraction = Annotated[float, lambda x: 0 <= x < 1, "a number from 0 to below 1"]
Share = Annotated[float, lambda x: 0 <= x <= 1, "a number from 0 to 1"]
Flag = Annotated[bool, lambda x: True, "true or false"]
Text = Annotated[str, lambda x: x != "" and "\0" not in x, A_PATH]
AnyText = Annotated[str, lambda x: x.encode("utf-8", "replace").decode() == x, "text in UTF-8"]
Device = Annotated[str, re.compile(r"auto|cpu|mps|cuda(:\d\d?)?").fullmatch, "auto, cpu, mps, cuda or cuda:N"]


def one_of(*choices):
    """The type of a setting that takes one of a few values. Compared by repr, so that 1 is not True."""
    spelled = [repr(choice) for choice in choices]
    return Annotated[object, lambda x: repr(x) in spelled, ", ".join(map(str, choices))]


# A table of parametrization.py, or a point of scaling/plane.py between mup and sp, as plane_0.5_1
TABLE = r"mup|sp|sp_scaled|sp_per_layer|plane(_[01]|_0\.\d+){2}"
Table = Annotated[object, lambda x: re.fullmatch(TABLE, str(x)), "mup, sp, sp_scaled, sp_per_layer"]


class UserError(ValueError):
    """Something the user can put right; its text is the one line they read."""


# The group of a setting says what it belongs to; every list of settings in the project is derived from it
GROUPS = {
    "function": "Function (what the weights compute; whatever takes over the weights takes over these)",
    "init": "Initialization (the weights before the first step)",
    "optimizer": "Optimizer (how a gradient changes the weights)",
    "training": "Training (batches, and the learning rate over the steps)",
    "data": "Data (which text, and how it becomes tokens)",
    "run": "Run (what a resumed run may change; nothing above)",
}


def setting(default, group, help, tuned=False, before=None, fact=False):
    """Declares a setting of Config.

    group: one of GROUPS. help: its unit and meaning, for --help. tuned: a setting that transfers from a proxy
    to its target: a search may draw it, best.py carries it, and trials of one stack may differ in it. before:
    what versions without the setting did, where that is not `default`. fact: of the group "run", but the
    numbers of a trial depend on it.
    """
    if group not in GROUPS:
        raise TypeError(f"the group of a setting must be one of {', '.join(GROUPS)}, got {group!r}")
    metadata = {"group": group, "help": help, "tuned": tuned, "before": before, "fact": fact}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """All settings of a run. Building one checks it: UserError names the setting and what is allowed."""
    width: Count = setting(128, "function", "residual channels, d_model; a multiple of head_dim")
    depth: Count = setting(4, "function", "transformer blocks")
    context: Count = setting(256, "function", "tokens per sequence")
    head_dim: Count = setting(64, "function", "channels per attention head")
    kv_heads: Count | None = setting(None, "function",
        help="heads of keys and values (grouped-query attention), a divisor of width / head_dim; None: all")
    window: Count | None = setting(None, "function", "latest tokens that every other block sees; None: all")
    position: one_of("learned", "rotary") = setting("rotary", "function", "how a token knows its position")
    norm: one_of("layer", "rms") = setting("rms", "function", "LayerNorm, or RMSNorm", before="layer")
    qk_norm: Flag = setting(True, "function", "RMS-normalize queries and keys, with gains", before=False)
    mlp: one_of("gelu", "gelu_tanh", "relu2", "swiglu") = setting("swiglu", "function", before="gelu",
        help="of nearly equal numbers of parameters")
    mlp_ratio: Positive | None = setting(None, "function", "MLP units / width; None: 4, near 8/3 for swiglu")
    rotary_base: Positive = setting(10000.0, "function", "tokens / 2 pi in a turn of the slowest channels")
    norm_eps: Positive | None = setting(None, "function", "added to variances; None: 1e-5, for rms 1e-6")
    tied: Flag = setting(False, "function", "one matrix for embedding and readout, by the embedding's rules")
    bias: Flag = setting(False, "function", "biases in the blocks' linear layers and in every LayerNorm")
    smear: Flag = setting(False, "function", "add a learned share of the previous token's embedding")
    value_embeddings: Flag = setting(False, "function",
        help="add to the values of every second block what a table, of all tokens, has for the token")
    vocab_size: Count | None = setting(None, "function",
        help="rows of embedding and readout; None: the tokenizer's count, never fewer")
    base_width: Count = setting(128, "function", "residual channels of the tuned proxy", tuned=True)
    base_depth: Count = setting(4, "function", "blocks of the tuned proxy", tuned=True)
    base_head_dim: Count = setting(64, "function", "channels per head of the tuned proxy", tuned=True)
    parametrization: Table = setting("mup", "function", tuned=True,
        help="mup transfers; controls (docs/mup.md): sp, the standard one; sp_scaled, sp_per_layer")
    depth_alpha: Share = setting(1.0, "function", tuned=True,
        help="mup: residual branches x depth_mult^-alpha; 1 CompleteP, 1/2 Depth-muP")
    embedding_mult: Positive = setting(1.0, "function", "x the embeddings", tuned=True)
    logit_mult: Positive = setting(1.0, "function", "x logits", tuned=True)
    attention_mult: Positive = setting(1.0, "function", "x attention logits", tuned=True)

    embedding_std: Positive = setting(0.02, "init", "standard deviation of all embeddings", tuned=True)
    hidden_std: Positive = setting(1.0, "init", "hidden matrices, in units of 1/sqrt(fan_in)", tuned=True)
    readout_std: NotNegative = setting(1.0, "init", "readout, in units of 1/sqrt(base_width)", tuned=True)
    zero_residual_out: Flag = setting(False, "init", "start each block's output projections at 0", tuned=True)
    zero_query: Flag = setting(False, "init", tuned=True,
        help="start queries (with qk_norm: their gains) at 0, so attention starts uniform")
    init_from: Text | None = setting(None, "init",
        help="weights to start from: a run, its checkpoint, or a Hugging Face model")

    optimizer: one_of("adamw", "muon") = setting("adamw", "optimizer", "of hidden matrices; AdamW elsewhere")
    lr: Positive = setting(2**-9, "optimizer", "peak rate of hidden matrices at the base shape", tuned=True)
    base_lr: Positive | None = setting(None, "optimizer", tuned=True,
        help="in place of lr for all but hidden matrices: held while lr is swept; None: lr")
    embedding_lr_mult: Positive = setting(1.0, "optimizer", "x lr, embedding", tuned=True)
    readout_lr_mult: Positive = setting(1.0, "optimizer", "x lr, readout", tuned=True)
    norm_lr_mult: Positive = setting(1.0, "optimizer", "x lr, norms and biases", tuned=True)
    base_batch: Count | None = setting(None, "optimizer", tuned=True,
        help="sequences per step of the tuned proxy: lr, decay, beta2, eps scale with batch; None: fixed")
    base_tokens: Count | None = setting(None, "optimizer", tuned=True,
        help="tokens of the tuned proxy's run: lr x (tokens / base_tokens)^-0.32, decay, eps; None: fixed")
    weight_decay: NotNegative = setting(0.0, "optimizer", tuned=True,
        help="coupled decay per step, lr * weight_decay, at the base shape")
    beta1: Fraction = setting(0.9, "optimizer", "Adam's decay of the gradient average", tuned=True)
    beta2: Fraction = setting(0.95, "optimizer", "Adam's decay of the squared-gradient average", tuned=True)
    eps: Positive = setting(1e-8, "optimizer", "Adam's epsilon at the base shape", tuned=True)
    momentum: Fraction = setting(0.95, "optimizer", "Muon's, with Nesterov's correction", tuned=True)
    grad_clip: NotNegative = setting(1.0, "optimizer", "largest gradient norm; 0: no clipping", tuned=True)

    batch: Count = setting(32, "training", "sequences per optimizer step, over all devices and accumulation")
    batch_start: Count | None = setting(None, "training",
        help="sequences of the first step, and of each rise; a divisor of batch")
    batch_ramp_tokens: Count | None = setting(None, "training",
        help="tokens over which batch_start rises to batch; None: fixed")
    dropout: Fraction = setting(0.0, "training", "probability; draws depend on devices, passes and threads")
    warmup: Fraction = setting(0.1, "training", "fraction of the steps, linear rise", tuned=True)
    warmup_tokens: Count | None = setting(None, "training", "tokens of warmup; None: by warmup", tuned=True)
    schedule: one_of("cosine", "linear", "constant", "wsd", "wsd_sqrt", "inverse_sqrt", "step") = setting(
        "cosine", "training", tuned=True,
        help="of the learning rate, after warmup; wsd: stable, then a linear decay, of wsd_sqrt by 1 - sqrt")
    final_lr: Share = setting(0.1, "training", tuned=True,
        help="fraction of the peak that the schedule ends at, or never goes under")
    decay_fraction: Share = setting(0.2, "training", tuned=True,
        help="wsd (warmup, stable, decay): last fraction of the steps, linear decay")
    decay_tokens: Count | None = setting(None, "training", tuned=True,
        help="tokens until the schedule is at final_lr; None: all of the run's")
    seed: Whole = setting(0, "training", "of initialization, batches and dropout")

    dataset: Text = setting("stdlib", "data",
        help="stdlib; path, glob, folder of text, .jsonl, .csv, .parquet; owner/name; a:0.7,b:0.3 mixes")
    tokenizer: Text = setting("bpe:2048", "data",
        help="bpe:N, trained on the data; bytes; a tiktoken name; a folder that holds one")
    subset: Text | None = setting(None, "data", "configuration of a hub data set")
    split: Text = setting("train", "data", "split of a hub data set")
    text_field: Text = setting("text", "data", "column of .csv, .jsonl, .parquet and hub rows with the text")
    max_tokens: Count | None = setting(None, "data", "tokens to prepare, validation text too; None: all")
    val_fraction: Fraction = setting(0.05, "data", "fraction of documents held out, by a hash of their text")

    steps: Whole = setting(1000, "run", "optimizer steps")
    micro_batch: Count | None = setting(None, "run", "sequences per pass, a divisor of batch; None: all")
    eval_every: Count | None = setting(None, "run", "steps between evaluations; None: at the end only")
    eval_tokens: Count = setting(65536, "run", fact=True,
        help="validation tokens per evaluation, as many whole windows as fit")
    checkpoint_every: Count | None = setting(500, "run", "steps between checkpoints; None: at the end only")
    data_dir: Text = setting("data/prepared", "run", "folder of prepared data sets")
    out: Text | None = setting(None, "run", "run directory; None: out/NAME for train.py, none from Python")
    device: Device = setting("auto", "run", "cpu, cuda, cuda:N or mps; auto: the fastest there is", fact=True)
    precision: one_of("auto", "bf16", "fp32") = setting("auto", "run", fact=True,
        help="of matrix products; auto: bf16 where it is fast")
    compile: one_of("auto", "blocks", "model", False) = setting("auto", "run", fact=True,
        help="torch.compile; auto: blocks, for bf16")
    graph: one_of("auto", True, False) = setting("auto", "run", "a step as one CUDA graph; auto: on one GPU")
    shard: Flag = setting(False, "run", "split model and optimizer over processes (FSDP2); else copies (DDP)")
    log_roles: Flag = setting(False, "run", "each role's gradient norm, weight RMS and relative update")
    wandb: Flag = setting(False, "run", "log to Weights & Biases too, offline without a login")
    prompt: AnyText = setting("", "run", "what samples continue; of a RUN_DIR, -: lines of standard input")
    samples: Count = setting(1, "run", "how many texts to sample")
    sample_tokens: Whole = setting(200, "run", "tokens in a sample, at most: it ends at an end of text")
    temperature: NotNegative = setting(0.8, "run", "x 1/temperature on the logits; 0: the likeliest token")
    top_k: Count | None = setting(50, "run", "tokens to choose among; None: all")

    def __post_init__(self):
        for name in SETTINGS:
            object.__setattr__(self, name, check_setting(name, getattr(self, name)))
        for name, unit in MULTIPLES:
            value, divisor = getattr(self, name), getattr(self, unit)
            if None not in (value, divisor) and value % divisor:
                raise UserError(f"{name} must be a multiple of {unit} ({divisor}), got {value}; "
                                f"try {value + divisor - value % divisor}")
        self.check_combinations()

    def check_combinations(self):
        """Raises UserError for a setting that contradicts another, or would do nothing beside it."""
        if self.batch_ramp_tokens is None and self.batch_start is not None:
            raise UserError("batch_start also needs --batch_ramp_tokens")
        if self.batch_ramp_tokens is not None and self.batch_start in (None, self.batch):
            raise UserError(f"batch_start must be a divisor of batch ({self.batch}) and below it, got "
                            f"{self.batch_start}, where batch_ramp_tokens is set")
        if self.position == "rotary" and self.head_dim % 2:
            raise UserError(f"head_dim must be even with position=rotary, got {self.head_dim}")
        heads = self.width // self.head_dim
        if self.kv_heads is not None and heads % self.kv_heads:
            raise UserError(f"kv_heads must divide the number of heads (width / head_dim = {heads}), got "
                            f"{self.kv_heads}; try {math.gcd(heads, self.kv_heads)}")
        if self.window is not None and self.depth == 1:
            raise UserError(f"window must be none where depth is 1, got {self.window}: the first block "
                            "attends to all tokens")
        if self.window is not None and self.window >= self.context:
            raise UserError(f"window must be less than context ({self.context}), got {self.window}; "
                            "try --window=none")
        if self.decay_tokens is not None and self.schedule in ("constant", "inverse_sqrt"):
            raise UserError(f"decay_tokens must be none with schedule={self.schedule}, which never ends, got "
                            f"{self.decay_tokens}")
        if self.decay_tokens is not None and self.decay_tokens <= (self.warmup_tokens or 0):
            raise UserError(f"decay_tokens must be more than warmup_tokens ({self.warmup_tokens}), got "
                            f"{self.decay_tokens}: both count from the first token")

    @property
    def width_mult(self):
        return self.width / self.base_width

    @property
    def depth_mult(self):
        return self.depth / self.base_depth

    def stages(self):
        """The Stages of the batch ramp; one, where there is none."""
        return batch_stages(self.batch, self.batch_start, self.batch_ramp_tokens, self.context)

    def stage(self, step):
        """The Stage that `step`, counted from 0, belongs to."""
        return next(stage for stage in reversed(self.stages()) if stage.first_step <= step)

    def tokens_before(self, step):
        """Tokens that all steps before `step` train on together."""
        stage = self.stage(step)
        return (stage.first_sequence + (step - stage.first_step) * stage.batch) * self.context

    def steps_for(self, tokens):
        """How many steps train on this many tokens, to the nearest."""
        sequences = tokens / self.context
        stage = next(stage for stage in reversed(self.stages()) if stage.first_sequence <= sequences)
        return stage.first_step + round((sequences - stage.first_sequence) / stage.batch)

    def pass_batch(self, world_size=1):
        """Sequences in a forward pass of one of `world_size` processes, the same in every step."""
        return self.micro_batch or max(1, (self.batch_start or self.batch) // world_size)


# (a setting, what it is a multiple of)
MULTIPLES = (("width", "head_dim"), ("base_width", "base_head_dim"), ("batch", "micro_batch"),
             ("batch", "batch_start"), ("batch_start", "micro_batch"))


class Stage(NamedTuple):
    """Steps that follow each other with one batch."""
    first_step: int
    end_step: int | float  # of the next stage; infinite for the last
    first_sequence: int  # sequences in all steps before it
    batch: int  # sequences in each of its steps


@functools.lru_cache(maxsize=256)
def batch_stages(batch, start, ramp_tokens, context):
    """[Stage] of a batch that rises from `start` to `batch`, in multiples of `start`, over the first
    `ramp_tokens` tokens (arXiv 2005.14165, appendix B): after n tokens it is start + (batch - start) * n /
    ramp_tokens, rounded down. In integers, so that each step's batch is the same on every machine."""
    if start is None:
        return [Stage(0, math.inf, 0, batch)]
    stages, rises = [], batch // start - 1
    step = sequence = done = 0
    while done < rises:  # rises that are done
        size = (1 + done) * start
        next_rise = -(-(1 + done) * ramp_tokens // (rises * context))  # sequences before it, rounded up
        steps = -((sequence - next_rise) // size)  # rounded up
        stages.append(Stage(step, step + steps, sequence, size))
        step, sequence = step + steps, sequence + steps * size
        done = min(rises, rises * sequence * context // ramp_tokens)
    return [*stages, Stage(step, math.inf, sequence, batch)]


def settings_of(config_class):
    """{name: what setting() declared, and the parts of the type}. kind: a Python type; object where only a
    few values are allowed. accepts: a predicate. description: what is allowed, for people. optional: whether
    None is. Raises TypeError for a setting that has no group."""
    hints, settings = get_type_hints(config_class, include_extras=True), {}
    for item in fields(config_class):
        if "group" not in item.metadata:
            raise TypeError(f"{item.name} has no group: declare it by setting(default, group, help)")
        parts = get_args(hints[item.name])
        optional = type(None) in parts
        kind, accepts, description = get_args(parts[0]) if optional else parts
        settings[item.name] = SimpleNamespace(kind=kind, accepts=accepts, description=description,
                                              optional=optional, default=item.default, **item.metadata)
    return settings


SETTINGS = settings_of(Config)


def names_in(*groups):
    """The settings of these groups, in the order of Config."""
    return tuple(name for name in SETTINGS if SETTINGS[name].group in groups)


TUNED = tuple(name for name in SETTINGS if SETTINGS[name].tuned)


def replace_old(settings):
    """`settings` in today's names: a point between SP and μP is a name of `parametrization` now."""
    settings = {**settings}
    point = settings.pop("mup_init", 1), settings.pop("mup_lr", 1)
    if point != (1, 1):
        settings["parametrization"] = "plane_{:g}_{:g}".format(*point)
    return settings


def complete_saved(settings):
    """All settings, from those that an older version saved; one that is younger as it was before it."""
    before = {name: declared.default if declared.before is None else declared.before
              for name, declared in SETTINGS.items()}
    return before | replace_old(settings)


# What other programs call a setting, for the answer to one that does not exist
OTHER_NAMES = {
    "width": "d_model n_embd n_embed hidden_size hidden_dim model_dim embedding_dim dim channels",
    "depth": "n_layer n_layers num_layers num_hidden_layers layers blocks",
    "batch": "batch_size train_batch_size global_batch_size total_batch_size",
    "context": "block_size seq_len seq_length sequence_length max_seq_len context_length n_ctx",
    "head_dim": "n_head n_heads num_heads num_attention_heads heads head_size",
    "kv_heads": "n_kv_head n_kv_heads num_kv_heads num_key_value_heads num_query_groups gqa",
    "position": "rope rotary pos_emb",
    "mlp": "activation act hidden_act swiglu gelu",
    "tied": "tie_embeddings tie_word_embeddings weight_tying",
    "parametrization": "mup use_mup sp mup_init mup_lr",
    "optimizer": "optim muon adamw",
    "lr": "learning_rate max_lr peak_lr",
    "embedding_std": "init_std initializer_range",
    "weight_decay": "wd decay",
    "grad_clip": "clip clip_grad max_grad_norm gradient_clipping",
    "warmup": "warmup_iters warmup_steps warmup_ratio",
    "schedule": "scheduler lr_schedule lr_scheduler lr_decay",
    "final_lr": "min_lr min_lr_ratio",
    "decay_fraction": "cooldown warmdown_ratio",
    "dataset": "data data_path input corpus text",
    "steps": "max_iters max_steps num_steps num_iterations iterations epochs num_train_epochs",
    "micro_batch": "gradient_accumulation_steps grad_accum micro_batch_size device_batch_size",
    "eval_every": "eval_interval val_every eval_steps",
    "checkpoint_every": "save_every save_interval save_steps ckpt_every",
    "out": "out_dir output_dir output run_dir save_dir",
    "precision": "dtype amp bf16 fp16 mixed_precision",
    "wandb": "wandb_log use_wandb report_to",
    "sample_tokens": "max_new_tokens",
    "shard": "fsdp",
}


def closest(word, words):
    """The end of an error line about a mistyped word: the nearest valid ones, or nothing."""
    near = [candidate for candidate in difflib.get_close_matches(word, words) if candidate != word]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def advice_for(name, more=()):
    """The end of an error line about the unknown setting `name`: what may have been meant, or nothing."""
    plain = name.lower().replace("-", "_")
    for setting, others in OTHER_NAMES.items():
        if plain in others.split():
            return f"; did you mean {setting}?"
    if plain in SETTINGS:
        return f"; did you mean {plain}?"
    return closest(plain, [*SETTINGS, *more])


def check_setting(name, value, where=""):
    """`value` in the type of setting `name`: whole floats become int, ints become float where a float is
    expected, a leading ~ of a path the home directory. Raises UserError when there is no such setting or the
    value is not accepted. where: the source of the value, which begins the message."""
    if name not in SETTINGS:
        raise UserError(f"{where}{name}: no such setting{advice_for(name) or '; --help lists them'}")
    declared = SETTINGS[name]
    kind = declared.kind
    if value is None and declared.optional:
        return None
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if type(value).__module__ == "numpy" and hasattr(value, "item"):
        value = value.item() if value.ndim == 0 else value  # numpy's numbers are Python's to us
    if type(value) in (int, float) and abs(value) < 1e99:
        if kind is float or kind is int and value % 1 == 0:
            value = kind(value)
    if kind is not object and type(value) is not kind or not declared.accepts(value):
        allowed = f"{'one of ' * (kind is object)}{declared.description}{', or none' * declared.optional}"
        raise UserError(f"{where}{name} must be {allowed}, got {shown(value)}"
                        f"{closest(shown(value)[1:-1], declared.description.split(', '))}")
    return os.path.expanduser(value) if declared.description == A_PATH else value


def shown(value):
    """`value` in an error message, cut to 80 characters."""
    try:
        return f"{value!r:.80}"
    except Exception:  # an int of more digits than Python prints, or an object of a config file
        return f"a {type(value).__name__}"


OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.Pow: math.pow}


def evaluate_arithmetic(node):
    """The value of a parsed literal or arithmetic expression such as 2**-8; never runs code. Raises TypeError
    for arithmetic with anything but numbers: [0] * 10**9 is a list of that many."""
    operation = OPERATIONS.get(type(getattr(node, "op", None)))
    if operation is None or not isinstance(node, ast.BinOp):
        return ast.literal_eval(node)
    left, right = evaluate_arithmetic(node.left), evaluate_arithmetic(node.right)
    if not {type(left), type(right)} <= {int, float}:
        raise TypeError(left, right)
    return operation(left, right)


def parse_value(name, text):
    """What `text`, from the command line, means for setting `name`: a literal, arithmetic, or just text."""
    declared = SETTINGS.get(name)
    is_none = declared and declared.optional and text.lower() == "none"
    if not is_none and (declared is None or declared.kind is str):
        return text
    literal = text.capitalize() if text.isalpha() else text.strip()  # true, none -> True, None
    try:
        return evaluate_arithmetic(ast.parse(literal, mode="eval").body)
    except (ValueError, SyntaxError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return text


def run_of(source):
    """The run directory of `source`, which may be a checkpoint in it: out/proxy/last.pt."""
    return os.path.dirname(source) or "." if source.endswith(".pt") else source


def is_from_run(source):
    """Whether weights of `source` are those of a run; else they are of a Hugging Face model."""
    if source.endswith(".pt"):
        return True
    try:
        return "base_width" in json.loads(Path(source, "config.json").read_text("utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


# A function from a model of another program to {setting: value}; training/pretrained.py puts it here
read_foreign_settings = None


def settings_to_start_from(source):
    """{setting: value} that a run takes over with the weights of `source`, unless told otherwise: what is in
    groups "function" and "optimizer", and the tokenizer. Raises UserError."""
    if not is_from_run(source):
        if read_foreign_settings is None:
            raise UserError(f"init_from: {source} is not a run; to start from a Hugging Face model, import "
                            "train before you call configure()")
        return read_foreign_settings(source)
    settings, run = read_settings(run_of(source)), run_of(source)
    taken = {name: settings[name] for name in (*names_in("function", "optimizer"), "tokenizer")}
    if re.match(r"bpe:|.*[/\\]", settings["tokenizer"]) or os.path.isdir(settings["tokenizer"]):
        taken["tokenizer"] = run  # which keeps it: another text would make another
    return taken


OWN_MODULES = {"configure", "parametrization", "generate", "model", "train", "data", "training", "interop",
               "scaling"}


def read_settings(source):
    """{setting: value} of a config file, *.py, or a run directory. Runs no other file. Raises UserError."""
    path = os.path.join(source, "config.json") if os.path.isdir(source) else source
    try:
        if os.path.exists(os.path.join(source, "best.py")) and not os.path.exists(path):
            raise UserError(f"{source} is the folder of a search; its settings are {source}/best.py")
        if path != source:
            if not os.path.exists(path):
                raise UserError(f"{source} is no run: it has no config.json; to train on the texts in it, "
                                f"give a configuration and --dataset={source}")
            saved = json.loads(Path(path).read_text("utf-8"))
            return complete_saved(saved) | {"out": source}
        if not source.endswith(".py") and os.path.exists(source):
            run = run_of(source)
            advice = f"; try {run}" if os.path.exists(os.path.join(run, "config.json")) else ""
            raise UserError(f"{source} must be a configuration, a .py file or a run directory{advice}; a "
                            f"text is given as --dataset={source}")
        with forget_imports():
            assigned = {"__name__": "config", "__file__": path}
            exec(compile(Path(path).read_bytes(), path, "exec"), assigned)
        return replace_old({name: value for name, value in assigned.items() if is_assignment(name, value)})
    except (KeyboardInterrupt, UserError):
        raise
    except BaseException as error:  # a config file may raise anything
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {' '.join(str(error).split())}"
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        where = f" line {lines[-1]}:" if lines else ""
        raise UserError(f"{path}:{where} {reason}{closest_source(source)}") from None


FOUND_BY_SEARCH = "# Found by scaling.search"  # so begins a line of the best.py of each search
FOR_TARGET = "# For the target "  # and one, with its file, where a target was named
UNFINISHED = "the search is not finished"  # the end of another, until it is


def is_from_search(source):
    """Whether a config file is the best.py of a search, by whatever name it is kept."""
    if not os.path.isfile(source):
        return False
    lines = Path(source).read_text("utf-8", "replace").splitlines()
    return any(line.startswith(FOUND_BY_SEARCH) for line in lines)


def closest_source(source):
    """The end of an error line about a missing config file or run directory: the most similar one."""
    if os.path.exists(source):
        return ""
    if os.path.basename(source) == "best.py":
        return "; a search writes it at its end: python -m scaling search --target=TARGET.py"
    folder = "config" if os.path.isdir("config") else os.path.relpath(Path(__file__).parent / "config")
    files = [str(path) for path in Path(folder).rglob("*.py") if path.name != "config.py"]
    files += map(str, Path(source).parent.glob("*.py"))
    runs = [str(path.parent) for path in Path("out").glob("*/config.json")]
    by_name = {Path(path).stem: path for path in files + runs}
    by_name |= {path: path for path in files + runs if path != source}
    near = difflib.get_close_matches(source, by_name, n=1) or difflib.get_close_matches(
        Path(source).stem, by_name, n=1)
    return f"; did you mean {by_name[near[0]]}?" if near else ""


@contextlib.contextmanager
def forget_imports():
    """Forgets the configurations that are imported within the block, so that they are read again next time: a
    notebook lives longer than an edit. Installed packages and the project's own modules stay."""
    before = set(sys.modules)
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            path = os.path.abspath(getattr(sys.modules[name], "__file__", None) or sys.prefix)
            installed = path.startswith((sys.prefix, sys.base_prefix)) or "-packages" in path
            if not installed and name.partition(".")[0] not in OWN_MODULES:
                del sys.modules[name]


def is_assignment(name, value):
    """Whether a global variable of a config file is a setting, and not an import, a function or private."""
    if name in SETTINGS:
        return True
    return not (name.startswith("_") or inspect.ismodule(value) or callable(value))


def split_words(argv):
    """(config files and run directories, {setting: value} of the --name=value words). Raises UserError, for a
    setting that is given twice too."""
    words, sources, flags = iter(argv), [], {}
    for word in words:
        if not word.startswith("-"):
            name, equals, _ = word.partition("=")
            if equals and name in SETTINGS:
                raise UserError(f"{name} must be given as --{word}, got {word}")
            sources.append(word)
            continue
        name, equals, text = word.lstrip("-").partition("=")
        if name not in SETTINGS:  # rejected before what follows it is taken for a file
            check_setting(name, text)
        if not equals:  # --name value
            text = next(words, "--")
            if text.startswith("--"):
                raise UserError(f"{name} must be given a value: --{name}=VALUE")
        reject_second(name, flags)
        flags[name] = parse_value(name, text)
    return sources, flags


def reject_second(name, given):
    """Raises UserError where the option `name` is among those `given` before it on the command line."""
    if name in given:
        raise UserError(f"{name} must be given once; remove all but one --{name}")


def asks_for_help(argv):
    return "-h" in argv or "--help" in argv


def configure(argv, usage=None, names=None):
    """The Config that the command-line words `argv` describe. Raises UserError; --help prints and exits.

    usage, names: of the command, its help and the settings that it uses; a flag for another is rejected.
    None: train.py's, and all.
    """
    if isinstance(argv, str):
        raise UserError(f"configure() takes a list of words, such as [{argv!r}], got {argv!r}")
    if asks_for_help(argv):
        print(help_text(usage, names))
        sys.exit()
    sources, flags = split_words(argv)
    if names is not None and (unused := [name for name in flags if name not in names]):
        raise UserError(f"{unused[0]} has no effect on this command; remove --{unused[0]}")
    layers = [(f"{source}: ", read_settings(source)) for source in sources]
    reject_other_search(sources, [settings for _, settings in layers], flags)
    layers.append(("", flags))
    given = {name: value for _, values in layers for name, value in values.items()}
    if given.get("init_from") and not SETTINGS.keys() <= given.keys():  # a run that resumes has them all
        source = check_setting("init_from", given["init_from"])
        layers.insert(0, (f"init_from: {source}: ", settings_to_start_from(source)))
    return Config(**{name: check_setting(name, value, where)
                     for where, values in layers for name, value in values.items()})


def reject_other_search(sources, layers, flags):
    """Raises UserError where the best.py of a search is not used as it was found: a configuration before it
    sets another text or block, or one after it sets a tuned setting anew. A flag decides."""
    earlier, search, found = {}, None, {}
    for source, settings in zip(sources, layers, strict=True):
        is_search = is_from_search(source)
        for name, value in settings.items():
            if name in flags or name not in SETTINGS:
                continue
            tuned = SETTINGS[name].tuned
            fixed = not tuned and name in names_in("function", "data")
            if is_search and fixed and earlier.get(name, value) != value:
                raise UserError(f"{name} is {earlier[name]!r} before {source}, which was found with "
                                f"{value!r}; choose one by --{name}=VALUE")
            if not is_search and tuned and found.get(name, value) != value:
                raise UserError(f"{name} is {found[name]!r} in {search}, which a search found, and {value!r} "
                                f"in {source} after it; give {search} last, or choose by --{name}=VALUE")
        if is_search:
            search, found = source, settings
        earlier |= settings


TRAIN_USAGE = """usage: python train.py [CONFIG.py | RUN_DIR ...] [--name=value ...]

  python train.py config/proxy.py                               train; the run is kept in out/proxy
  python train.py config/proxy.py --dataset=texts/ --lr=2**-8   any setting, with arithmetic
  python train.py out/proxy                                     resume a run that was stopped
  python train.py out/proxy --steps=2000                        give a run more steps
  python train.py out/proxy --prompt="def main("                sample from it
  python train.py config/finetune.py --init_from=out/proxy --dataset=texts/
"""
HELP_NOTE = """
Every setting with its default and, in brackets, what is allowed. A config file is Python that assigns
settings; a run directory stands for the settings of its run. Later files override earlier ones, and
--name=value overrides all files.
"""
HELP_WIDTH = 118  # characters
HELP_INDENT = 34


def help_text(usage=None, names=None):
    """`usage`, then the settings `names`, each with its default, unit and choices, in their groups."""
    lines = [(usage or TRAIN_USAGE + HELP_NOTE).strip()]
    for group, title in GROUPS.items():
        listed = [name for name in names_in(group) if names is None or name in names]
        if listed:
            lines += [f"\n{title}", *map(help_line, listed)]
    return "\n".join(lines)


def help_line(name):
    """One setting: its default, what it is, what it takes; on several lines where one is too short."""
    declared = SETTINGS[name]
    option = f"  --{name}={declared.default}"
    first = option.ljust(HELP_INDENT) if len(option) < HELP_INDENT else f"{option}  "
    text = declared.help
    if declared.kind is not str:
        text += f" [{declared.description.removeprefix('a ')}{', or none' * declared.optional}]"
    return textwrap.fill(text, HELP_WIDTH, initial_indent=first,
                         subsequent_indent=" " * HELP_INDENT, break_on_hyphens=False)


stop_signals = []  # that came: a library may turn the KeyboardInterrupt into an error of its own


def stop(number, frame):
    """The handler of a signal that ends a command."""
    stop_signals.append(number)
    raise KeyboardInterrupt


def run_cli(main):
    """Run main(argv) as a program: it returns the exit code; a UserError is one line and exit code 2, and so
    is what the machine refuses to read or write. Ctrl-C, or a signal that stop() handles, is one line and
    130."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, by `>&-`
            setattr(sys, name, open(os.devnull, "w"))
    # `| tee log` shows each line when it is printed; what a terminal cannot show is written as \\xb1
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        signal.signal(signal.SIGINT, stop)  # train.py has it end at once until here
        code = main(sys.argv[1:])
        if stop_signals:
            raise KeyboardInterrupt  # again, where a library has caught it
        sys.exit(code)
    except BrokenPipeError:  # `| head` has closed the pipe: not an error of ours
        os._exit(128 + signal.SIGPIPE)  # at once, as Python's own shutdown would write the rest
    except (KeyboardInterrupt, Exception) as error:
        if stop_signals or isinstance(error, KeyboardInterrupt):
            print("\nstopped", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        if isinstance(error, UserError):
            end_with(str(error))
        if isinstance(error, OSError) and error.strerror is not None:
            end_with(describe_os_error(error))
        raise


def describe_os_error(error, path="a file"):
    """The line for an OSError that names no file, or `path`. It says that writing failed only where the errno
    does: without permission, it may have been reading."""
    is_writing = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    return f"{'cannot write ' * is_writing}{error.filename or path}: {error.strerror}"


SECONDS_FOR_RANK_0 = 3  # to print the line of an error; torchrun then ends the other ranks


def end_with(message):
    """End the program with an error line."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        time.sleep(SECONDS_FOR_RANK_0)
    print("error:", *message.split(), file=sys.stderr)
    sys.exit(2)


def check_start():
    """Ends the program with a line where it is a module of ours that is not a command, or where the working
    directory was deleted, which torch does not survive."""
    root, started = Path(__file__).parent, getattr(sys.modules["__main__"], "__file__", None)
    if started is None or not Path(started).absolute().is_relative_to(root):
        return
    try:
        os.getcwd()
    except FileNotFoundError:
        end_with("the working directory was deleted; change to another folder")
    path = Path(started).absolute().relative_to(root)
    if path.parts[0].removesuffix(".py") not in OWN_MODULES:
        return
    if not re.search(r"^if __name__|^@command$", Path(started).read_text("utf-8"), re.MULTILINE):
        end_with(f"{path} is not a command; `python train.py` says how to train and to sample, and "
                 "`python -m scaling` lists the commands of the lab")


check_start()
