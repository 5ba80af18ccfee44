"""In and out: models of Hugging Face become ours and ours theirs, and compute the same; or are refused."""

import contextlib
import io
import json
import math
import os
import resource
import shutil
import signal
import socket
import sys
import unicodedata
from types import SimpleNamespace

import pytest
import torch
from conftest import BLOCKS, GPT2_BLOCK, column, run, tiny, tokens
from tokenizers import Tokenizer

import train
from configure import SETTINGS, Config, UserError, configure
from data.tokenizer import SAMPLE, build_tokenizer, keep_tokenizer, load_tokenizer
from interop.export import export
from interop.export import main as export_main
from interop.families import FAMILIES, NO_EFFECT, family_of, fields_of
from interop.huggingface import LR, read_huggingface
from interop.weights import WEIGHTS, write_model
from model import GPT, Attention
from parametrization import ROLES, forward_multipliers, hyperparameters
from training.checkpoint import read_checkpoint, write_checkpoint
from training.pretrained import hash_weights, load

safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors, an optional package")
pytest.importorskip("transformers", reason="needs transformers, an optional package")
TEXT = ["the model learns; a teacher reads, that river moves over one gradient and into the next. " * 40]
MULTIPLIERS = {"embedding_mult": 1.7, "logit_mult": 0.6, "attention_mult": 1.3, "depth_alpha": 0.7}
SHAPES = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 280}
LLAMA_SHAPES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 280,
                "max_position_embeddings": 32, "intermediate_size": 40}


@pytest.fixture(scope="module")
def transformers():
    library = pytest.importorskip("transformers", reason="needs transformers, an optional package")
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


def lively(**settings):
    """A model in which every part matters: large random weights, gains and biases too."""
    model = GPT(tiny(**{"embedding_std": 0.7, "hidden_std": 1.4, "readout_std": 2.0, **settings})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def write(model, folder):
    """The model as a Hugging Face folder, without tokenizer. Raises UserError."""
    os.makedirs(folder)
    write_model(model, folder, eot=0)


# What none of the classes computes: a learned position beside anything that is not GPT-2's, LayerNorm beside
# anything else, smear, and value embeddings
NOT_HELD = {"learned": "position", "gpt2 rms": "norm", "gpt2 qk_norm": "qk_norm", "gpt2 swiglu": "mlp",
            "layer": "norm", "gpt2 rotary": "position", "smear": "smear",
            "value_embeddings": "value_embeddings"}
HELD = {name: block for name, block in BLOCKS.items() if name not in NOT_HELD}
EXPORTED = [
    *[(block, MULTIPLIERS) for block in HELD.values()],
    *[(block, MULTIPLIERS | {"tied": True, "parametrization": "sp"}) for block in HELD.values()],
    (BLOCKS["no qk_norm"], {"bias": True}), (GPT2_BLOCK, MULTIPLIERS | {"bias": True, "tied": True}),
    ({}, {"embedding_std": 0.003}),  # where what is added to the variance matters
    (BLOCKS["gelu"] | {"qk_norm": False}, MULTIPLIERS),
    ({}, MULTIPLIERS | {"kv_heads": 1}), (BLOCKS["no qk_norm"], MULTIPLIERS | {"kv_heads": 2, "head_dim": 8}),
    (BLOCKS["no qk_norm"], {"kv_heads": 1, "bias": True}), (BLOCKS["relu2"], {"kv_heads": 1}),
    (GPT2_BLOCK, {"kv_heads": 2}), ({}, {"width": 64, "head_dim": 8}), ({}, {"depth": 5}),
    (GPT2_BLOCK, {"mlp": "gelu_tanh"}),
    ({}, {"rotary_base": 500.0, "mlp_ratio": 1.25, "norm_eps": 1e-3})]


def test_an_exported_model_computes_the_same_in_transformers_and_comes_back(transformers, tmp_path):
    for i, (block, settings) in enumerate(EXPORTED):
        model, folder = lively(**block | settings), str(tmp_path / str(i))
        write(model, folder)
        theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(loading.values()), loading
        x_BT, _ = tokens(model.config)
        with torch.no_grad():
            difference = (model(x_BT) - theirs.eval()(x_BT).logits).abs().max()
        assert difference < 1e-4, (block, settings)
        if i < len(HELD):
            greedy = theirs.generate(x_BT[:1, :4], max_new_tokens=12, do_sample=False, eos_token_id=None,
                                     attention_mask=torch.ones(1, 4), pad_token_id=0)
            assert greedy[0, 4:].tolist() == [*model.generate(x_BT[0, :4].tolist(), 12, temperature=0)]
        settings, weights = read_huggingface(folder)
        back = GPT(Config(**settings))
        back.load_state_dict(weights)
        with torch.no_grad():
            assert (model(x_BT) - back.eval()(x_BT)).abs().max() < 1e-4


@pytest.mark.parametrize(("block", "setting"), [
    *[(BLOCKS[name], setting) for name, setting in NOT_HELD.items()], ({"bias": True}, "bias"),
    (GPT2_BLOCK | {"kv_heads": 1}, "kv_heads"),
    ({"window": 5}, "window")])
def test_what_no_class_computes_is_refused_by_the_setting_that_stands_in_the_way(tmp_path, block, setting):
    with pytest.raises(UserError, match=f"^{setting} must be .* for an export"):
        write(GPT(tiny(**block)), str(tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == []


def test_a_parameter_or_a_number_of_rows_that_no_class_has_is_refused_by_its_name(tmp_path):
    model = GPT(tiny())
    model.second_readout = torch.nn.Linear(32, 64)
    with pytest.raises(UserError, match="^second_readout.weight: Qwen3ForCausalLM .* no such parameter"):
        write(model, str(tmp_path / "head"))
    model = GPT(tiny())
    model.blocks[1].attention.qkv.weight = torch.nn.Parameter(torch.zeros(64, 32))
    with pytest.raises(UserError, match="^blocks.1.attention.qkv.weight: has 64 rows"):
        write(model, str(tmp_path / "rows"))
    write(GPT(tiny()), str(tmp_path / "in"))  # rows of queries and keys that fit only together
    q, k = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    change_tensors(lambda tensors: tensors.update(
        {q: torch.zeros(24, 32), k: torch.zeros(40, 32)}))(tmp_path / "in")
    with pytest.raises(UserError, match="^init_from: .*mismatched keys: .*self_attn.k_proj.weight"):
        read_huggingface(str(tmp_path / "in"))


def test_a_function_setting_that_no_one_taught_the_export_is_refused(monkeypatch):
    monkeypatch.setitem(SETTINGS, "softcap", SETTINGS["window"])
    monkeypatch.setattr(Config, "softcap", None, raising=False)
    assert family_of(Config()).model_type == "qwen3"
    monkeypatch.setattr(Config, "softcap", 30.0)
    with pytest.raises(UserError, match="^softcap must be None for an export, got 30"):
        family_of(Config())


@pytest.mark.parametrize("change", ["softcap", "untrained softcap", "grouped keys"])
def test_an_edit_of_the_model_that_no_class_computes_is_neither_exported_nor_read(proxy, tmp_path, change,
                                                                                  monkeypatch):
    if change == "grouped keys":  # as if each pair of heads had one key and one value
        def grouped(*arguments):
            q_BHTD, k_BHTD, v_BHTD = original(*arguments)
            return q_BHTD, k_BHTD[:, ::2].repeat_interleave(2, dim=1), v_BHTD
        original = Attention.queries_keys_values
        monkeypatch.setattr(Attention, "queries_keys_values", staticmethod(grouped))
    else:
        def capped(self, x_BTC, targets_BT=None):
            return 30 * torch.tanh(original(self, x_BTC) / 30)
        original = GPT.read_out
        monkeypatch.setattr(GPT, "read_out", capped)
    source = proxy / "run"
    if change == "untrained softcap":  # whose logits are all 0
        checkpoint = read_checkpoint(str(source / "best.pt"))
        checkpoint["model"]["readout.weight"].zero_()
        source = tmp_path / "untrained"
        shutil.copytree(proxy / "run", source)
        write_checkpoint(str(source / "best.pt"), checkpoint)
    with pytest.raises(UserError, match=".* computes other logits than model.py"):
        export(str(source), str(tmp_path / "out"))
    assert not [name for name in os.listdir(tmp_path) if name.startswith("out")]
    with pytest.raises(UserError, match=".* computes other logits than model.py"):
        read_huggingface(str(proxy / "hf"))


@pytest.mark.parametrize("size", [0, 8000])  # bytes: the tokenizer is larger, then the weights
def test_an_export_on_a_full_disk_is_one_line_and_leaves_nothing(proxy, tmp_path, size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(UserError, match="^to: cannot write .*out") as caught:
            export(str(proxy / "run"), str(tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == []


def save_theirs(transformers, kind, folder, **changes):
    """A random model of transformers, saved as they save it, with a tokenizer of 280 tokens."""
    configs = {"gpt2": ("GPT2Config", SHAPES),
               "llama": ("LlamaConfig", LLAMA_SHAPES | {"rms_norm_eps": 1e-5}),
               "qwen3": ("Qwen3Config", LLAMA_SHAPES | {"head_dim": 16, "num_key_value_heads": 2})}
    name, shapes = configs[kind]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**shapes | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    keep_tokenizer(build_tokenizer("bpe:280", lambda: TEXT), folder, 32)
    return model


def start(source, corpus, *more):
    """The Config of a run that starts from `source`, on the corpus."""
    names = "dataset val_fraction data_dir eval_tokens sample_tokens device".split()
    words = [f"--{name}={corpus[name]}" for name in names]
    return configure([*words, f"--init_from={source}", "--batch=4", *more])


@pytest.mark.parametrize(("kind", "changes"), [
    ("gpt2", {}), ("gpt2", {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 48}),
    ("llama", {"attention_bias": True, "mlp_bias": True}), ("llama", {"tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    ("qwen3", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})], ids=str)
def test_their_weights_come_back_from_a_run_of_ours_bit_for_bit(
        transformers, corpus, tmp_path, kind, changes):
    theirs = save_theirs(transformers, kind, str(tmp_path / "in"), **changes)
    config = start(tmp_path / "in", corpus, "--steps=0", f"--out={tmp_path}/run")
    model = train.train(config, quiet=True).model.eval()
    x_BT, _ = tokens(model.config)
    with torch.no_grad():
        assert (model(x_BT) - theirs(x_BT).logits).abs().max() < 1e-4
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    before = safetensors.load_file(tmp_path / "in" / WEIGHTS)
    after = safetensors.load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    again = transformers.AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    assert {name: again[name] for name in changes} == changes


def test_a_model_from_elsewhere_is_trained_with_plain_adamw(corpus, tmp_path):
    write(lively(**GPT2_BLOCK, vocab_size=280), str(tmp_path / "in"))
    keep_tokenizer(build_tokenizer("bpe:280", lambda: TEXT), str(tmp_path / "in"), 16)
    config = start(tmp_path / "in", corpus)
    for role in ROLES:
        assert hyperparameters(config, role)["lr"] == config.lr == LR
        assert hyperparameters(config, role)["eps"] == config.eps
    assert forward_multipliers(config) == {"branch": 1, "logits": 1, "attention": config.head_dim ** -0.5}
    config = start(tmp_path / "in", corpus, "--steps=20", "--lr=1e-3", "--eval_every=20")
    result = train.train(config, quiet=True)
    assert column(result, "val_loss")[-1] < column(result, "val_loss")[0]


# {a field of config.json: values that make it another function, or none}
GPT2_FIELDS = {"n_head": [3, 0, -2, True, 10**20, 2.0], "activation_function": ["relu", "silu", None, 7],
               "scale_attn_by_inverse_layer_idx": [True], "scale_attn_weights": [False],
               "add_cross_attention": [True], "is_encoder_decoder": [True], "model_type": ["bert", None, []],
               "n_embd": ["wide", None, 10**20, 2**31], "n_layer": [10**12, 0, 1.5], "n_positions": [10**20],
               "vocab_size": [10**20, -1], "n_inner": [10**20, "wide"], "layer_norm_epsilon": [-1, math.nan],
               "num_hidden_layers": [10**12], "auto_map": [{"AutoModel": "code.Model"}]}
LLAMA_FIELDS = {"head_dim": [32, 10**20], "num_key_value_heads": [3], "hidden_act": ["gelu", "relu2"],
                "rope_scaling": [{"rope_type": "llama3", "factor": 8.0}, {"type": "linear", "factor": 2.0}],
                "rope_parameters": [{"rope_type": "yarn", "factor": 2.0}, [], {"rope_theta": -1.0}, 3],
                "rope_theta": [77.0], "partial_rotary_factor": [0.5], "mlp_bias": [True],
                "use_sliding_window": [True], "layer_types": [["full_attention", "sliding_attention"]],
                "sliding_window": [4], "pretraining_tp": [2], "rms_norm_eps": [0, None],
                "tie_word_embeddings": ["yes"]}
NAMED = {"layer_norm_epsilon": "norm_eps", "rms_norm_eps": "norm_eps", "rope_scaling": "rope_parameters",
         "num_key_value_heads": "kv_heads",
         "rope_parameters": "rope_parameters|rotary_base", "n_layer": "n_layer|depth"}


@pytest.mark.parametrize(("block", "field", "value"), [
    *[("gpt2", field, value) for field, values in GPT2_FIELDS.items() for value in values],
    *[("no qk_norm", field, value) for field, values in LLAMA_FIELDS.items() for value in values]], ids=str)
def test_a_field_that_makes_another_function_is_refused_in_one_line(tmp_path, block, field, value):
    folder = str(tmp_path / "in")
    write(GPT(tiny(**BLOCKS[block])), folder)
    change_fields({field: value})(tmp_path / "in")
    named = NAMED.get(field, field)  # as the error calls it
    with pytest.raises(UserError, match=f"^init_from: config.json of .*({named})") as caught:
        configure([f"--init_from={folder}"])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def change_fields(changes):
    def change(folder):
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | changes))
    return change


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_every_field_of_a_class_is_written_or_known_to_have_no_effect(transformers, family):
    config = Config(**{name: values[0] for name, values in family.block.items()}, norm_eps=1e-5, dropout=0.25)
    fields = fields_of(config, family)
    declared = getattr(transformers, family.config_class)().to_dict()
    assert declared.keys() <= fields.keys() | NO_EFFECT
    assert {value for name, value in fields.items() if "drop" in name} == {0.25}
    assert {name for name in declared if "drop" in name} - NO_EFFECT <= fields.keys()


def change_tensors(change):
    def damage(folder):
        tensors = safetensors.load_file(folder / WEIGHTS)
        change(tensors)
        safetensors.save_file(tensors, folder / WEIGHTS)
    return damage


def cut(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:len(content) // 2])


def only_pickle(folder):
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "pytorch_model.bin")


WRONG = {
    "truncated": (cut, f"{WEIGHTS} is damaged"), "pickle": (only_pickle, "pickles, such as"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "holds no .safetensors"),
    "a tensor missing": (change_tensors(lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.weight")),
                         "missing keys: transformer.h.1.mlp.c_fc.weight"),
    "a tensor too many": (change_tensors(lambda tensors: tensors.update(adapter=torch.zeros(1))),
                          "unexpected keys: adapter"),
    "tied, with another readout": (change_fields({"tie_word_embeddings": True}), "holds lm_head.weight"),
    "bool": (change_tensors(lambda tensors: tensors.update(
        {"transformer.ln_f.weight": torch.ones(32, dtype=torch.bool)})), "ln_f.weight holds BOOL"),
    "NaN": (change_tensors(lambda tensors: tensors["transformer.ln_f.weight"].fill_(math.nan)), "not finite"),
    "another shape": (change_tensors(lambda tensors: tensors.update(
        {"transformer.ln_f.weight": torch.zeros(5)})), "mismatched keys: .*transformer.ln_f.weight"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "half a config": (lambda folder: (folder / "config.json").write_text('{"model_'), "cannot be read")}


@pytest.mark.parametrize(("damage", "line"), WRONG.values(), ids=WRONG)
def test_a_wrong_folder_is_one_line_and_nothing_runs(corpus, tmp_path, damage, line, monkeypatch):
    folder = tmp_path / "in"
    write(lively(**GPT2_BLOCK, vocab_size=280), str(folder))
    keep_tokenizer(build_tokenizer("bpe:280", lambda: TEXT), str(folder), 16)
    damage(folder)
    monkeypatch.setattr("train.open_dataset", None)  # it fails before it needs the data
    with pytest.raises(UserError, match=f"^init_from: .*({line})"):
        train.train(start(folder, corpus, f"--out={tmp_path}/out"), quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("block", ["default", "gpt2"])
def test_a_model_without_tokenizer_json_gets_none_that_it_was_not_trained_with(corpus, tmp_path, block):
    write(lively(**BLOCKS[block], vocab_size=257), str(tmp_path / "in"))
    for name in ("vocab.json", "merges.txt"):  # of another BPE than OpenAI's
        (tmp_path / "in" / name).write_text("{}")
    for words in ([], ["--tokenizer=bpe:257"]):
        with pytest.raises(UserError, match="^tokenizer must be the one that"):
            train.train(start(tmp_path / "in", corpus, *words), quiet=True)
    with pytest.raises(UserError, match="^tokenizer: .*holds no tokenizer.json"):
        load(str(tmp_path / "in"))
    train.train(start(tmp_path / "in", corpus, "--steps=0", "--tokenizer=bytes"), quiet=True)


def test_weights_in_several_files_and_without_their_first_names_are_read(tmp_path):
    model = lively(**GPT2_BLOCK)
    write(model, str(tmp_path / "in"))
    _, expected = read_huggingface(str(tmp_path / "in"))
    tensors = safetensors.load_file(tmp_path / "in" / WEIGHTS)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)  # the mask that old versions saved
    names, weight_map = sorted(tensors), {}
    for i in range(2):
        part = {name: tensors[name] for name in names[i::2]}
        safetensors.save_file(part, tmp_path / "in" / f"model-0000{i}-of-00002.safetensors")
        weight_map |= {name: f"model-0000{i}-of-00002.safetensors" for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "in" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (tmp_path / "in" / WEIGHTS).unlink()
    _, weights = read_huggingface(str(tmp_path / "in"))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_of_the_hub_the_settings_come_first_and_then_the_weights_of_the_same_commit(tmp_path, monkeypatch):
    asked, folder = [], str(tmp_path / "snapshot")
    write(lively(**GPT2_BLOCK), folder)

    def snapshot_download(repository, revision, allow_patterns, local_files_only):
        asked.append((repository, revision, allow_patterns, local_files_only))
        return folder

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, timeout: SimpleNamespace(sha="c0ffee"))
    assert configure(["--init_from=someone/model"]).width == 32
    assert asked == [("someone/model", "c0ffee", "*.json", False)], "no weights before the settings fit"
    read_huggingface("someone/model")
    assert asked[1:] == [("someone/model", "c0ffee", "model*.safetensors", False)], "no pickles"


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, and is silent
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        # A request of its own, for which it waits 3 seconds
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr("interop.huggingface.HUB_TIMEOUT", 0.2)
        with pytest.raises(UserError, match="^init_from: there is no folder no-one/nothing, .* downloaded"):
            configure(["--init_from=no-one/nothing"])
        server.setblocking(False)
        connections = 0
        with contextlib.suppress(BlockingIOError):
            while server.accept():
                connections += 1
    assert connections == 1, "a download would be tried for minutes"


def test_what_a_trial_starts_from_is_told_by_the_content_of_its_files(tmp_path):
    folder = str(tmp_path / "in")
    write(lively(), folder)
    first = hash_weights(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert hash_weights(folder) == hash_weights(str(tmp_path / "copy")) == first
    change_tensors(lambda tensors: tensors["model.norm.weight"].add_(1))(tmp_path / "in")
    assert hash_weights(folder) != first
    (tmp_path / "in" / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"^init_from: {folder} holds no .safetensors"):
        hash_weights(folder)


@pytest.fixture(scope="module")
def proxy(corpus, tmp_path_factory):
    """A trained run of ours with a BPE, and its export."""
    folder = tmp_path_factory.mktemp("proxy")
    run(corpus, out=str(folder / "run"), tokenizer="bpe:280", steps=30, lr=0.01, context=32, **MULTIPLIERS)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        export_main([str(folder / "run"), f"--to={folder}/hf"])
    assert "Qwen3ForCausalLM" in printed.getvalue()
    return folder


def test_an_exported_run_loads_by_auto_classes_with_its_tokenizer_and_card(transformers, proxy):
    model, tokenizer = load(str(proxy / "run"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(proxy / "hf").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(proxy / "hf")
    ids = tokenizer.encode(SAMPLE)
    assert their_tokenizer(SAMPLE)["input_ids"] == ids and their_tokenizer.decode(ids) == SAMPLE
    assert their_tokenizer.eos_token_id == theirs.config.eos_token_id == tokenizer.eot
    x_BT = torch.tensor([ids[:32]])
    with torch.no_grad():
        assert (model(x_BT) - theirs(x_BT).logits).abs().max() < 1e-4
    card = (proxy / "hf/README.md").read_text()
    checkpoint = torch.load(proxy / "run/best.pt", weights_only=True)
    assert f"{checkpoint['past'][1]:.4f} nats per token" in card and '"steps": 30' in card


def test_an_exported_run_is_finetuned_by_the_preset_on_other_text_and_resumes(proxy, corpus, tmp_path):
    text = tmp_path / "numbers.txt"
    text.write_text("\n\n".join(f"Numbers such as {i} and {i * i} are no words. " * 40 for i in range(60)))
    shared = ["config/finetune.py", f"--init_from={proxy}/hf", f"--dataset={text}", "--device=cpu",
              f"--data_dir={corpus['data_dir']}", "--val_fraction=0.2", "--batch=4", "--eval_tokens=512",
              "--lr=0.003", "--sample_tokens=5"]
    whole = train.train(configure([*shared, "--steps=12"]), quiet=True)
    before, *_, after = column(whole, "val_loss")
    assert after < before - 0.1
    out = str(tmp_path / "out")
    train.train(configure([*shared, "--steps=12", f"--out={out}", "--checkpoint_every=5"]), quiet=True)
    shutil.move(f"{out}/previous.pt", f"{out}/last.pt")  # as if it had been killed after step 10
    resumed = train.train(configure([out]), quiet=True)
    assert column(resumed) == column(whole)


def test_an_export_into_what_exists_or_of_no_run_writes_nothing(proxy, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    for words, line in (([f"{proxy}/run", f"--to={tmp_path}/full"], "^to must be a new or empty"),
                        ([f"{proxy}/hf", f"--to={tmp_path}/new"], "must be a run"),
                        ([f"{proxy}/nothing", f"--to={tmp_path}/new"], "must be a run"),
                        ([f"{proxy}/run"], "RUN_DIR --to=DIR"),
                        ([f"{proxy}/run", f"--to={tmp_path}/new", "--half"], "RUN_DIR --to=DIR")):
        with pytest.raises(UserError, match=line):
            export_main(words)
    assert os.listdir(tmp_path) == ["full"] and os.listdir(tmp_path / "full") == ["mine.txt"]


def test_without_the_optional_package_a_line_says_what_to_install(proxy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="pip install transformers"):
        export(str(proxy / "run"), str(tmp_path / "out"))
    with pytest.raises(UserError, match="pip install transformers"):
        load(str(proxy / "hf"))


TASK = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {0}/texts.jsonl}}, cache_dir: {0}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


def test_lm_eval_finds_our_bits_per_byte_in_an_exported_run(transformers, proxy, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval, an optional package")
    pytest.importorskip("accelerate", reason="needs accelerate, which lm-eval[hf] brings")
    from lm_eval.tasks import TaskManager
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    texts = [f"the model reads {word} and " for word in ("a river", "numbers", "nothing", "10²é")]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "local.yaml").write_text(TASK.format(tmp_path))
    found = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={proxy}/hf,dtype=float32", tasks=["local_text"], device="cpu",
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), bootstrap_iters=0)
    model, tokenizer = load(str(proxy / "run"))
    nats = 0.0
    for text in texts:
        ids_BT = torch.tensor([[tokenizer.eot, *tokenizer.encode(text)]])
        nats += model(ids_BT[:, :-1], ids_BT[:, 1:]).item() * (ids_BT.size(1) - 1)
    ours = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert found["results"]["local_text"]["bits_per_byte,none"] == pytest.approx(ours, rel=1e-5)


# Tokenizers


def bpe_json(folder):
    folder.mkdir()
    keep_tokenizer(build_tokenizer("bpe:280", lambda: TEXT), str(folder), 16)
    return json.loads((folder / "tokenizer.json").read_text())


def without_end_of_text(spec):
    spec["added_tokens"].clear()


def with_another_end_of_text(spec):
    spec["added_tokens"][0]["content"] = "</s>"
    spec["model"]["vocab"]["</s>"] = spec["model"]["vocab"].pop("<|endoftext|>")
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}  # GPT-2's


@pytest.mark.parametrize("change", [
    with_another_end_of_text, lambda spec: spec.update(normalizer={"type": "NFC"}),
    lambda spec: spec.update(truncation={"direction": "Right", "max_length": 5, "stride": 0,
                                         "strategy": "LongestFirst"}),
    lambda spec: spec["model"]["merges"].reverse(),
    lambda spec: spec["pre_tokenizer"]["pretokenizers"].insert(
        0, {"type": "Digits", "individual_digits": True})])
def test_a_tokenizer_of_another_program_gives_the_tokens_that_it_gives_there(tmp_path, change):
    spec = bpe_json(tmp_path / "in")
    change(spec)
    (tmp_path / "in/tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "in/tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = load_tokenizer(str(tmp_path / "in"))
    theirs = Tokenizer.from_file(str(tmp_path / "in/tokenizer.json"))
    theirs.no_truncation()
    assert tokenizer.encode(SAMPLE) == theirs.encode(SAMPLE).ids and tokenizer.eot == 279
    assert tokenizer.encode_batch([SAMPLE]) == [theirs.encode(SAMPLE).ids]
    assert unicodedata.normalize("NFC", tokenizer.decode(tokenizer.encode(SAMPLE))) == \
        unicodedata.normalize("NFC", SAMPLE)


@pytest.mark.parametrize(("change", "line"), [
    (lambda spec: spec.update(normalizer={"type": "Lowercase"}), "changes text"),
    (lambda spec: spec["model"]["vocab"].pop("!"), "no token for byte 33"),
    (lambda spec: spec["model"].update(dropout=0.5), "at random"),
    (lambda spec: spec["pre_tokenizer"]["pretokenizers"][-1].update(add_prefix_space=True), "changes text"),
    (without_end_of_text, "its end of text is")])
def test_a_tokenizer_that_changes_text_or_knows_no_end_of_it_is_rejected(tmp_path, change, line):
    spec = bpe_json(tmp_path / "in")
    change(spec)
    (tmp_path / "in/tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=f"^tokenizer: .*cannot be used exactly .*{line}"):
        load_tokenizer(str(tmp_path / "in"))
