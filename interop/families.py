"""The model families of transformers that hold our block: what they call its settings and its parameters.

A family is data. fields_of() writes the config.json of a Config; settings_of() reads one, and accepts it only
if fields_of() gives all of it back, so that no field that changes the function is overlooked.
"""

import warnings
from typing import NamedTuple

from configure import SETTINGS, Config, UserError, names_in
from model import mlp_width


def import_transformers():
    """The library, without its warnings and progress bars. Raises UserError where it is not installed."""
    try:
        import safetensors.torch  # noqa: F401, which it reads weights with
        import transformers
    except ImportError:
        raise UserError("transformers: Hugging Face models need the package `transformers`; "
                        "pip install transformers") from None
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    return transformers


class Family(NamedTuple):
    """A class of transformers, and which of our blocks it computes."""
    model_type: str
    model_class: str
    config_class: str
    block: dict  # {our setting: the values that the class can compute}
    names: dict  # {what a size is called here: its field in config.json}
    constants: dict  # {field: the one value under which the class computes our block}
    dropouts: tuple  # the fields that are dropout probabilities
    modules: dict  # {our module: theirs; several where ours holds their rows, one after the other}
    transposed: bool = False  # their matrices in blocks are (inputs, outputs)


# {their activation: our mlp}; of several, the first is written
ACTIVATIONS = {"silu": "swiglu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
               "relu2": "relu2"}
UNGATED = ["gelu", "gelu_tanh", "relu2"]

GPT2 = Family(
    "gpt2", "GPT2LMHeadModel", "GPT2Config",
    block={"position": ["learned"], "norm": ["layer"], "qk_norm": [False], "bias": [True, False],
           "mlp": UNGATED, "kv_heads": [None]},
    names={"width": "n_embd", "depth": "n_layer", "heads": "n_head", "context": "n_positions",
           "vocab_size": "vocab_size", "hidden": "n_inner", "mlp": "activation_function",
           "norm_eps": "layer_norm_epsilon", "tied": "tie_word_embeddings"},
    constants={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
               "add_cross_attention": False, "is_encoder_decoder": False},
    dropouts=("embd_pdrop", "resid_pdrop", "attn_pdrop"),
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

LLAMA = Family(
    "llama", "LlamaForCausalLM", "LlamaConfig",
    block={"position": ["rotary"], "norm": ["rms"], "qk_norm": [False], "bias": [True, False],
           "mlp": ["swiglu"]},
    names={"width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads",
           "context": "max_position_embeddings", "vocab_size": "vocab_size", "hidden": "intermediate_size",
           "mlp": "hidden_act", "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings",
           "head_dim": "head_dim", "kv_heads": "num_key_value_heads", "bias": "attention_bias"},
    constants={"use_sliding_window": False, "sliding_window": None, "pretraining_tp": 1,
               "is_encoder_decoder": False},
    dropouts=("attention_dropout",),
    modules={
        "token_embedding": "model.embed_tokens",
        "blocks.{i}.attention_norm": "model.layers.{i}.input_layernorm",
        "blocks.{i}.attention.qkv": ["model.layers.{i}.self_attn.q_proj",
                                     "model.layers.{i}.self_attn.k_proj",
                                     "model.layers.{i}.self_attn.v_proj"],
        "blocks.{i}.attention.q_norm": "model.layers.{i}.self_attn.q_norm",
        "blocks.{i}.attention.k_norm": "model.layers.{i}.self_attn.k_norm",
        "blocks.{i}.attention.out": "model.layers.{i}.self_attn.o_proj",
        "blocks.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
        "blocks.{i}.mlp.gate_up": ["model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"],
        "blocks.{i}.mlp.up": "model.layers.{i}.mlp.up_proj",
        "blocks.{i}.mlp.down": "model.layers.{i}.mlp.down_proj",
        "final_norm": "model.norm", "readout": "lm_head"})

QWEN3 = LLAMA._replace(model_type="qwen3", model_class="Qwen3ForCausalLM", config_class="Qwen3Config",
                       block=LLAMA.block | {"qk_norm": [True], "bias": [False]})
ARCEE = LLAMA._replace(model_type="arcee", model_class="ArceeForCausalLM", config_class="ArceeConfig",
                       block=LLAMA.block | {"mlp": UNGATED})
APERTUS = QWEN3._replace(
    model_type="apertus", model_class="ApertusForCausalLM", config_class="ApertusConfig",
    block=QWEN3.block | {"mlp": UNGATED},
    modules=LLAMA.modules | {"blocks.{i}.attention_norm": "model.layers.{i}.attention_layernorm",
                             "blocks.{i}.mlp_norm": "model.layers.{i}.feedforward_layernorm"})
FAMILIES = (GPT2, QWEN3, LLAMA, ARCEE, APERTUS)

# Fields that the class declares and that do not change its logits, nor what finetuning computes
NO_EFFECT = frozenset("""model_type architectures dtype torch_dtype transformers_version _name_or_path
    use_cache initializer_range bos_token_id eos_token_id pad_token_id output_hidden_states output_attentions
    return_dict id2label label2id num_labels problem_type chunk_size_feed_forward summary_type
    summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout reorder_and_upcast_attn
    max_window_layers""".split())
# The function settings that fields_of() writes, or that weights.fold() puts into the weights
KNOWN_SETTINGS = frozenset("""width depth context head_dim kv_heads window position norm qk_norm mlp mlp_ratio
    rotary_base norm_eps tied bias vocab_size base_width base_depth base_head_dim parametrization
    depth_alpha embedding_mult logit_mult attention_mult""".split())
# What a config.json may hold at most: more would take the memory of the machine before anything is checked
LARGEST = {"n_layer": 10_000, "num_hidden_layers": 10_000, "n_positions": 2**24,
           "max_position_embeddings": 2**24}
LARGEST_NUMBER = 2**31 - 1


def family_of(config):
    """The Family that computes the block of `config`. Raises UserError that names what stands in the way."""
    for name in names_in("function"):
        default = SETTINGS[name].default
        if name not in KNOWN_SETTINGS and getattr(config, name) != default:
            raise UserError(f"{name} must be {default} for an export, got {getattr(config, name)}: no class "
                            "of transformers in interop/families.py computes it")
    if config.window is not None:
        raise UserError(f"window must be none for an export, got {config.window}: no class of transformers "
                        "has a window in every other block")

    def misfits(family):
        return [name for name, values in family.block.items() if getattr(config, name) not in values]

    family = min(FAMILIES, key=lambda family: len(misfits(family)))
    for name in misfits(family):
        values = " or ".join(str(value).lower() for value in family.block[name])
        raise UserError(f"{name} must be {values} for an export, got {getattr(config, name)}: of the classes "
                        f"of transformers, {family.model_class} is nearest to this block")
    return family


def fields_of(config, family):
    """config.json of `config`, whose multipliers are 1, as `family`: every field that its class declares."""
    heads = config.width // config.head_dim
    activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    values = {"width": config.width, "depth": config.depth, "heads": heads, "context": config.context,
              "vocab_size": config.vocab_size, "hidden": mlp_width(config), "mlp": activations[config.mlp],
              "norm_eps": config.norm_eps, "tied": config.tied, "head_dim": config.head_dim,
              "kv_heads": config.kv_heads or heads, "bias": config.bias}
    fields = {theirs: values[ours] for ours, theirs in family.names.items()}
    fields |= family.constants | dict.fromkeys(family.dropouts, config.dropout)
    fields |= {"model_type": family.model_type, "architectures": [family.model_class], "use_cache": True,
               "torch_dtype": "float32", "initializer_range": config.embedding_std}
    if family is not GPT2:
        rope = {"rope_type": "default", "rope_theta": config.rotary_base}
        fields |= {"mlp_bias": config.bias, "layer_types": ["full_attention"] * config.depth,
                   "rope_parameters": rope, "rope_theta": config.rotary_base}  # transformers 5, and 4
    return fields


def their_config(family, fields):
    """transformers' object of those fields of a config.json that have an effect. Raises many exceptions."""
    config_class = getattr(import_transformers(), family.config_class)
    return config_class.from_dict({name: fields[name] for name in fields if name not in NO_EFFECT})


def settings_of(raw):
    """(Family, {our setting: value}) of the fields of a config.json. Raises UserError that names the field
    for which we have no setting.

    The model's own shape becomes the base shape, so that every rule is the identity: learning rates are those
    of plain AdamW, and every multiplier is 1.
    """
    families = {family.model_type: family for family in FAMILIES}
    family = families.get(str(raw.get("model_type")))
    if family is None:
        raise UserError(f"model_type must be one of {', '.join(families)}, got {raw.get('model_type')!r}")
    if "auto_map" in raw:
        raise UserError("auto_map must be absent: the model needs code of its own, which is never run here")
    for name, value in raw.items():
        largest = LARGEST.get(name, LARGEST_NUMBER)
        if isinstance(value, int | float) and value > largest and name not in NO_EFFECT:
            raise UserError(f"{name} must be at most {largest}, got {str(value)[:40]}")
    try:
        fields = their_config(family, raw).to_dict()
        defaults = their_config(family, {}).to_dict()
    except Exception as error:  # of many types: transformers checks the fields too
        raise UserError(f"transformers rejects it: {' '.join(str(error).split())[:200]}") from None
    fields |= {name: raw[name] for name in ("rope_theta",) if name in raw}  # which may contradict the others
    settings = read_settings(family, fields)
    expected = fields_of(Config(**settings), family)
    for name, value in fields.items():  # one that is not expected has no effect on the class by its default
        wanted = expected.get(name, defaults.get(name, value))
        has_effect = name not in NO_EFFECT and name not in family.dropouts and value is not None
        if has_effect and value != wanted and name != family.names["mlp"]:
            raise UserError(f"{name} must be {str(wanted)[:80]}, got {str(value)[:80]}: model.py has no "
                            "setting for another")
    return family, settings


def read_settings(family, fields):
    """{our setting: value} of the fields of a config.json that have one. Raises UserError."""
    values = {ours: fields[theirs] for ours, theirs in family.names.items()}
    width, heads, activation = values["width"], values["heads"], values["mlp"]
    if heads < 1 or width < 1 or width % heads:
        raise UserError(f"{family.names['heads']} must divide {family.names['width']} ({width}), got {heads}")
    allowed = [theirs for theirs, ours in ACTIVATIONS.items() if ours in family.block["mlp"]]
    if activation not in allowed:
        raise UserError(f"{family.names['mlp']} must be {' or '.join(allowed)}, got {activation!r}")
    settings = {name: SETTINGS[name].default for name in names_in("function")}
    settings |= {name: value for name, value in values.items() if name in settings}
    settings |= {"head_dim": width // heads, "mlp": ACTIVATIONS[activation], "bias": values.get("bias", True),
                 "mlp_ratio": (values["hidden"] or 4 * width) / width, "base_width": width,
                 "base_depth": values["depth"], "base_head_dim": width // heads}
    if values.get("kv_heads") == heads:
        settings["kv_heads"] = None
    if rope := fields.get("rope_parameters"):
        if rope.get("partial_rotary_factor") == 1.0:
            del rope["partial_rotary_factor"]
        settings["rotary_base"] = float(rope.get("rope_theta", 0))
    for name in ("position", "norm", "qk_norm"):
        [settings[name]] = family.block[name]
    return settings


def parameter_names(family, name):
    """(the parameters that hold our parameter `name`, from its first row on; whether they hold it
    transposed). Raises UserError where the class has none."""
    module, _, kind = name.rpartition(".")
    parts = module.split(".")
    block = parts[1] if parts[0] == "blocks" else ""
    if block:
        parts[1] = "{i}"
    theirs = family.modules.get(".".join(parts))
    if theirs is None or kind not in ("weight", "bias"):
        raise UserError(f"{name}: {family.model_class} of transformers has no such parameter")
    if isinstance(theirs, str):
        theirs = [theirs]
    is_matrix = kind == "weight" and parts[-1] in ("qkv", "out", "up", "down", "gate_up")
    return [f"{module.replace('{i}', block)}.{kind}" for module in theirs], family.transposed and is_matrix
