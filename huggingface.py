"""Hugging Face's model families that hold our block, as data: what they call its settings and its parameters.

Their config.json becomes our settings, and ours theirs. Imports only the standard library; what reads and
writes weights is in training/.
"""

import functools
import json
import os
from typing import NamedTuple


class Family(NamedTuple):
    """A class of `transformers`, and which of our blocks it is."""
    model_type: str
    architecture: str
    block: dict  # {our setting: the values that the class holds}
    fields: dict  # {what a size is called here: its name in config.json}
    defaults: dict  # {field: what it is where config.json does not say}
    required: dict  # {field: the one value of those that change the function for which we have no setting}
    modules: dict  # {our module: theirs; several where ours has their rows in one}. {i}: the block
    transposed: bool = False  # their matrices in blocks are (inputs, outputs)


# {their activation: our mlp, without gates}
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu2": "relu2"}

GPT2 = Family(
    "gpt2", "GPT2LMHeadModel",
    block={"position": ["learned"], "norm": ["layer"], "qk_norm": [False], "bias": [True, False],
           "mlp": ["gelu", "gelu_tanh", "relu2"]},
    fields={"width": "n_embd", "depth": "n_layer", "heads": "n_head", "context": "n_positions",
            "hidden": "n_inner", "activation": "activation_function", "norm_eps": "layer_norm_epsilon"},
    defaults={"n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
              "tie_word_embeddings": True},
    required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
              "add_cross_attention": False},
    modules={
        "token_embedding": "transformer.wte", "position_embedding": "transformer.wpe",
        "blocks.{i}.attention_norm": "transformer.h.{i}.ln_1",
        "blocks.{i}.attention.qkv": "transformer.h.{i}.attn.c_attn",
        "blocks.{i}.attention.out": "transformer.h.{i}.attn.c_proj",
        "blocks.{i}.mlp_norm": "transformer.h.{i}.ln_2",
        "blocks.{i}.mlp.up": "transformer.h.{i}.mlp.c_fc",
        "blocks.{i}.mlp.down": "transformer.h.{i}.mlp.c_proj",
        "final_norm": "transformer.ln_f", "readout": "lm_head"},
    transposed=True)

# What Llama and the families that follow it have in common
LLAMA_FIELDS = {"width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads",
                "context": "max_position_embeddings", "hidden": "intermediate_size",
                "activation": "hidden_act", "norm_eps": "rms_norm_eps"}
LLAMA_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
                  "attention_bias": False, "mlp_bias": False}
LLAMA_BLOCK = {"position": ["rotary"], "norm": ["rms"], "qk_norm": [False], "bias": [True, False],
               "mlp": ["swiglu"]}
LLAMA_REQUIRED = {"partial_rotary_factor": 1.0, "use_sliding_window": False, "pretraining_tp": 1}
WITHOUT_GATES = ["gelu", "gelu_tanh", "relu2"]
LLAMA_MODULES = {
    "token_embedding": "model.embed_tokens",
    "blocks.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "blocks.{i}.attention.qkv": ["model.layers.{i}.self_attn.q_proj", "model.layers.{i}.self_attn.k_proj",
                                 "model.layers.{i}.self_attn.v_proj"],
    "blocks.{i}.attention.q_norm": "model.layers.{i}.self_attn.q_norm",
    "blocks.{i}.attention.k_norm": "model.layers.{i}.self_attn.k_norm",
    "blocks.{i}.attention.out": "model.layers.{i}.self_attn.o_proj",
    "blocks.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "blocks.{i}.mlp.gate_up": ["model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"],
    "blocks.{i}.mlp.up": "model.layers.{i}.mlp.up_proj",
    "blocks.{i}.mlp.down": "model.layers.{i}.mlp.down_proj",
    "final_norm": "model.norm", "readout": "lm_head"}

LLAMA = Family("llama", "LlamaForCausalLM", LLAMA_BLOCK, LLAMA_FIELDS, LLAMA_DEFAULTS, LLAMA_REQUIRED,
               LLAMA_MODULES)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", LLAMA_BLOCK | {"qk_norm": [True], "bias": [False]}, LLAMA_FIELDS,
               LLAMA_DEFAULTS, LLAMA_REQUIRED | {"attention_bias": False}, LLAMA_MODULES)
ARCEE = Family("arcee", "ArceeForCausalLM", LLAMA_BLOCK | {"mlp": WITHOUT_GATES}, LLAMA_FIELDS,
               LLAMA_DEFAULTS | {"hidden_act": "relu2", "rms_norm_eps": 1e-5}, LLAMA_REQUIRED, LLAMA_MODULES)
APERTUS = Family("apertus", "ApertusForCausalLM",
                 LLAMA_BLOCK | {"mlp": WITHOUT_GATES, "qk_norm": [True], "bias": [False]}, LLAMA_FIELDS,
                 LLAMA_DEFAULTS | {"hidden_act": "xielu", "rms_norm_eps": 1e-5},
                 LLAMA_REQUIRED | {"attention_bias": False},
                 LLAMA_MODULES | {"blocks.{i}.attention_norm": "model.layers.{i}.attention_layernorm",
                                  "blocks.{i}.mlp_norm": "model.layers.{i}.feedforward_layernorm"})
FAMILIES = (GPT2, QWEN3, LLAMA, ARCEE, APERTUS)

# The lr of who starts from such a model and gives none: usual for GPT-2's size, low for a model of a few MB
LR = 5e-5
HUB_TIMEOUT = 10  # seconds
# Names without an owner that the hub knew first
SHORT_NAMES = {"gpt2": "openai-community/gpt2", "gpt2-medium": "openai-community/gpt2-medium",
               "gpt2-large": "openai-community/gpt2-large", "gpt2-xl": "openai-community/gpt2-xl",
               "distilgpt2": "distilbert/distilgpt2"}


def find_file(source, name):
    """The path of the file `name` of a model: in the folder `source`, or fetched from the hub; None where it
    has no such file. Raises ValueError where there is no such model."""
    if os.path.isdir(source):
        path = os.path.join(source, name)
        return path if os.path.exists(path) else None
    owner = os.path.dirname(source)
    if source not in SHORT_NAMES and (source.count("/") != 1 or not owner or os.path.isdir(owner)):
        raise ValueError(f"got {source}, takes a run directory, a checkpoint in one, the folder of a Hugging "
                         f"Face model, owner/name of the hub, or one of {', '.join(SHORT_NAMES)}")
    return fetch_file(SHORT_NAMES.get(source, source), name)


def fetch_file(repository, name):
    """The path of a file of the hub, fetched unless it was before; None where there is none. Raises
    ValueError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
    try:
        revision = hub_revision(repository)
        return hf_hub_download(repository, name, revision=revision, local_files_only=revision is None)
    except LocalEntryNotFoundError:
        raise ValueError(f"got {repository}, which is no folder here, and the Hugging Face hub cannot be "
                         "reached; takes a local folder, or check the network") from None
    except EntryNotFoundError:
        return None
    except RepositoryNotFoundError:
        raise ValueError(f"got {repository}, which is neither a folder nor a public model of the Hugging "
                         "Face hub; check the name, or log in with `hf auth login`") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{repository}: the Hugging Face hub says: {reason}") from None


@functools.cache
def hub_revision(repository):
    """The commit that a model of the hub is at; None where the hub cannot be reached: then what was fetched
    before is used. Asked first, and once, as a download would be tried for minutes."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    try:
        return HfApi().model_info(repository, timeout=HUB_TIMEOUT).sha
    except HfHubHTTPError:
        raise
    except Exception:  # of the network, of many types
        return None


def read_config(source):
    """(Family, the fields of config.json) of a model. Raises ValueError."""
    path = find_file(source, "config.json")
    if path is None:
        raise ValueError(f"{source} holds no config.json; takes a run directory or a Hugging Face model")
    try:
        with open(path, encoding="utf-8") as file:
            fields = dict(json.load(file))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:120]}") from None
    model_type = fields.get("model_type")
    for family in FAMILIES:
        if family.model_type == model_type:
            return family, family.defaults | fields
    raise ValueError(f"model_type: got {model_type!r} in {path}, takes one of "
                     f"{', '.join(family.model_type for family in FAMILIES)}")


def settings_of(source):
    """{our setting: value} of a model of Hugging Face: all that make it the same function. Raises ValueError
    that names the field of config.json for which we have no setting.

    Its own shape is the base shape, so that every rule is the identity: learning rates are those of plain
    AdamW, and no multiplier is anything but 1.
    """
    family, fields = read_config(source)
    names = family.fields
    try:
        width, heads = fields[names["width"]], fields[names["heads"]]
        reject_what_we_cannot_hold(family, fields, width, heads)
        head_dim, hidden = width // heads, fields[names["hidden"]] or 4 * width
        settings = {"width": width, "depth": fields[names["depth"]], "head_dim": head_dim,
                    "context": fields[names["context"]], "vocab_size": fields["vocab_size"],
                    "mlp": mlp_of(family, fields), "mlp_ratio": hidden / width,
                    "norm_eps": fields[names["norm_eps"]], "tied": fields["tie_word_embeddings"],
                    "bias": family is GPT2 or fields["attention_bias"]}
    except KeyError as error:
        raise ValueError(f"config.json of {source} lacks {error.args[0]}") from None
    except (TypeError, ZeroDivisionError):
        raise ValueError(f"config.json of {source} holds no sizes") from None
    if "rotary" in family.block["position"]:
        settings["rotary_base"] = rotary_base_of(fields)
    for name in ("position", "norm", "qk_norm"):
        [settings[name]] = family.block[name]
    return settings | {"base_width": width, "base_depth": settings["depth"], "base_head_dim": head_dim,
                       "parametrization": "mup", "depth_alpha": 1.0, "embedding_mult": 1.0, "logit_mult": 1.0,
                       "attention_mult": 1.0}


def reject_what_we_cannot_hold(family, fields, width, heads):
    """Raises ValueError for the first field that makes another function of the block than ours."""
    required = family.required | {"num_key_value_heads": heads, "head_dim": width // heads,
                                  "mlp_bias": fields.get("attention_bias")}
    if "num_hidden_layers" in fields:
        required["layer_types"] = ["full_attention"] * fields["num_hidden_layers"]
    for field, only in required.items():
        got = fields.get(field, only)
        if got is not None and got != only:
            raise ValueError(f"{field}: got {got}, takes {only}: model.py has no setting for another")
    if width % heads:
        raise ValueError(f"{family.fields['heads']}: got {heads}, takes a divisor of {width}")


def mlp_of(family, fields):
    """Our name of the MLP. Raises ValueError."""
    field = family.fields["activation"]
    known = {"silu": "swiglu"} if family.block["mlp"] == ["swiglu"] else ACTIVATIONS
    if fields[field] not in known:
        raise ValueError(f"{field}: got {fields[field]}, takes {' or '.join(known)}")
    return known[fields[field]]


def rotary_base_of(fields):
    """The base of rotary positions, as config.json says it for transformers 4 or 5. Raises ValueError."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type: got {kind}, takes default: model.py has no setting for another")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor: got {rope['partial_rotary_factor']}, takes 1.0")
    return float(rope.get("rope_theta", fields.get("rope_theta", 1e4)))


def tokenizer_of(source):
    """What the setting `tokenizer` is for a model: a folder that holds its tokenizer.json, or gpt2; None if
    it has neither. Raises ValueError."""
    if source in SHORT_NAMES:
        return "gpt2"  # tiktoken's, the same
    path = find_file(source, "tokenizer.json")
    if path is not None:
        return os.path.dirname(path)
    return "gpt2" if read_config(source)[0] is GPT2 else None


def family_of(config):
    """The Family that holds the block of `config`, a Config. Raises ValueError that names the setting that
    stands in the way of the nearest one."""
    if config.window is not None:
        raise ValueError(f"window: got {config.window}, which no class of transformers has in every other "
                         "block; takes a run with window=none")

    def misfits(family):
        return [name for name, values in family.block.items() if getattr(config, name) not in values]

    family = min(FAMILIES, key=lambda family: len(misfits(family)))
    for name in misfits(family):
        others = ", ".join(f"{other}={getattr(config, other)}" for other in family.block if other != name)
        values = " or ".join(str(value).lower() for value in family.block[name])
        raise ValueError(f"{name}: got {getattr(config, name)}, which none of {len(FAMILIES)} classes of "
                         f"transformers has with {others}; the nearest, {family.architecture}, takes "
                         f"{name}={values}")
    return family


def config_fields(config, family, hidden, eot):
    """The fields of config.json for a model of `config`, a Config whose multipliers are 1, as `family`.
    hidden: units of its MLP. eot: the id of the end of text."""
    sizes = {"width": config.width, "depth": config.depth, "heads": config.width // config.head_dim,
             "context": config.context, "hidden": hidden, "norm_eps": config.norm_eps}
    fields = {name: sizes[size] for size, name in family.fields.items() if size in sizes}
    theirs = {"swiglu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new", "relu2": "relu2"}
    fields |= {"architectures": [family.architecture], "model_type": family.model_type,
               family.fields["activation"]: theirs[config.mlp], "vocab_size": config.vocab_size,
               "tie_word_embeddings": config.tied, "bos_token_id": eot, "eos_token_id": eot,
               "torch_dtype": "float32"}
    if family is not GPT2:
        rope = {"rope_type": "default", "rope_theta": config.rotary_base}
        fields |= {"num_key_value_heads": sizes["heads"], "head_dim": config.head_dim,
                   "attention_bias": config.bias, "mlp_bias": config.bias, "rope_parameters": rope,
                   "rope_theta": config.rotary_base}  # the first for transformers 5, the second for 4
    return fields


def parameter_names(family, name):
    """(names of the parameters that hold our parameter `name`, from the first row on; whether they hold it
    transposed)."""
    module, _, kind = name.rpartition(".")
    parts = module.split(".")
    block = parts[1] if parts[0] == "blocks" else ""
    if block:
        parts[1] = "{i}"
    theirs = family.modules[".".join(parts)]
    if isinstance(theirs, str):
        theirs = [theirs]
    is_matrix = kind == "weight" and parts[-1] in ("qkv", "out", "up", "down", "gate_up")
    return [f"{module.replace('{i}', block)}.{kind}" for module in theirs], family.transposed and is_matrix
