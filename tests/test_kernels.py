"""training/kernels.py beside the functions of model.py, which are what counts where they differ."""

import copy
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import run

import model
import training
from configure import Config
from model import GPT, Attention, HeadNorm
from training.compile import replaced
from training.kernel_check import difference, kernels_that_agree, outputs_and_gradients

CUDA = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs CUDA")


def draw(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator).to("cuda" if CUDA else "cpu", dtype).requires_grad_()


def queries_keys_values_inputs(D, T, dtype):
    gpt = GPT(Config(vocab_size=5, context=T, width=3 * D, head_dim=D, depth=1)).to(draw(1).device)
    norms = [HeadNorm(D, 1e-6, factor).to(gpt.rotary_cos.device) for factor in (1.5, 1.0)]
    for norm in norms:
        norm.weight.data = 1 + 0.3 * draw(D).detach()
    return draw(2, T, 9, D, dtype=dtype), 3, *norms, (gpt.rotary_cos, gpt.rotary_sin)


def inputs_of(name, size, dtype):
    if name == "queries_keys_values":
        return queries_keys_values_inputs(size, 37, dtype)
    if name == "swiglu":
        return (draw(3, 5, 2 * size, dtype=dtype),)
    targets_BT = torch.randint(size, (3, 5), generator=torch.Generator().manual_seed(2))
    return draw(3, 5, 32, dtype=dtype), draw(size, 32, dtype=dtype), targets_BT.to(draw(1).device)


def plain_readout_loss(*inputs):
    return GPT(Config(vocab_size=5, width=64, depth=1)).readout_loss(*inputs)


PLAIN = {"queries_keys_values": Attention.queries_keys_values, "swiglu": model.swiglu,
         "readout_loss": plain_readout_loss}


@needs_cuda
@pytest.mark.parametrize(("name", "size"), [
    *(("queries_keys_values", D) for D in (16, 64, 128)), *(("swiglu", F) for F in (8, 344, 2048, 5000)),
    *(("readout_loss", V) for V in (2, 257, 4096, 50304))])
def test_a_kernel_gives_the_numbers_of_the_model(name, size):
    from training import kernels
    kernel, plain = getattr(kernels, name), PLAIN[name]
    assert difference(kernel, plain, inputs_of(name, size, torch.float32)) < 1e-5
    inputs = inputs_of(name, size, torch.bfloat16)
    assert difference(kernel, plain, inputs) < 0.02
    first, second = (outputs_and_gradients(kernel, inputs) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True)), "the same bits each time"


@needs_cuda
def test_the_default_block_trains_through_the_kernels(corpus):
    settings = corpus | {"device": "cuda", "precision": "bf16", "steps": 20, "head_dim": 16}
    plain = run(settings, compile=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fast = run(settings, compile="blocks")
    assert {event.key for event in profile.key_averages()} >= {
        "norm_rotate_kernel", "norm_rotate_backward_kernel", "swiglu_kernel", "swiglu_backward_kernel",
        "cross_entropy_kernel"}
    assert fast.val_loss == pytest.approx(plain.val_loss, abs=0.02)


def stand_in(**functions):
    """training.kernels as it would be: model.py's functions, under other names."""
    kernels = types.ModuleType("training.kernels")
    for name, plain in PLAIN.items():
        setattr(kernels, name, functions.get(name, lambda *inputs, plain=plain: plain(*inputs)))
    return kernels


@pytest.fixture
def gpt():
    return GPT(Config(vocab_size=11, context=8, width=48, head_dim=16, depth=2))


def found(gpt, monkeypatch, kernels):
    monkeypatch.setitem(sys.modules, "training.kernels", kernels)
    if kernels is None:  # what `from training import kernels` then raises
        monkeypatch.delattr(training, "kernels", raising=False)
    else:
        monkeypatch.setattr(training, "kernels", kernels, raising=False)
    said = []
    return [(name, module) for module, name, _ in kernels_that_agree(gpt, gpt.config, said.append)], said


def test_kernels_that_agree_with_the_model_take_its_place_in_every_block(gpt, monkeypatch):
    agreeing, said = found(gpt, monkeypatch, stand_in())
    blocks = gpt.blocks
    assert agreeing == [("readout_loss", gpt), *(("activate", block.mlp) for block in blocks),
                        *(("queries_keys_values", block.attention) for block in blocks)]
    assert not said


def test_sharded_parameters_are_not_needed_to_compare(gpt, monkeypatch):
    from torch.distributed.fsdp import fully_shard  # takes a second
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for block in gpt.blocks:
            fully_shard(block)
        fully_shard(gpt)
        agreeing, said = found(gpt, monkeypatch, stand_in())
    finally:
        dist.destroy_process_group()
    assert len(agreeing) == 5 and not said


def changed_loss(gpt, x_BTC, weight_VC, targets_BT):
    logits = F.linear(x_BTC, weight_VC).flatten(0, 1).float()
    return F.cross_entropy(logits, targets_BT.flatten()) + 1e-4 * logits.logsumexp(-1).square().mean()


def softcapped_logits(gpt, x_BTC, weight_VC):
    return 15 * torch.tanh(F.linear(x_BTC, weight_VC) / 15)


def changed_rotation(x_BHTD, rotary, original=model.rotate):
    return original(x_BHTD, (rotary[1], rotary[0]))


def changed_norm(norm, x_BHTD):
    return F.rms_norm(x_BHTD, norm.normalized_shape, norm.factor * norm.weight.square(), norm.eps)


def changed_values(qkv_BTHD, *others, original=Attention.queries_keys_values):
    q, k, v = original(qkv_BTHD, *others)
    return q, k, 1.001 * v


def queries_keys_values_as_they_were(qkv_BTHD, kv_heads, q_norm, k_norm, rotary, rotate=model.rotate,
                                     norm=HeadNorm.forward):
    q, k, v = (x.transpose(1, 2) for x in qkv_BTHD.chunk(3, dim=2))
    return rotate(norm(q_norm, q), rotary), rotate(norm(k_norm, k), rotary), v


def readout_loss_as_it_was(x_BTC, weight_VC, targets_BT):
    return F.cross_entropy(F.linear(x_BTC, weight_VC).flatten(0, 1), targets_BT.flatten())


@pytest.mark.parametrize(("changed", "name", "its", "left_out"), [
    (GPT, "readout_loss", changed_loss, "readout_loss"),
    (GPT, "logits", softcapped_logits, "readout_loss"),
    (model, "rotate", changed_rotation, "queries_keys_values"),
    (HeadNorm, "forward", changed_norm, "queries_keys_values"),
    (Attention, "queries_keys_values", staticmethod(changed_values), "queries_keys_values")])
def test_who_changes_model_py_trains_what_it_says(gpt, monkeypatch, changed, name, its, left_out):
    kernels = stand_in(queries_keys_values=queries_keys_values_as_they_were,
                       readout_loss=readout_loss_as_it_was)
    monkeypatch.setattr(changed, name, its)
    agreeing, said = found(gpt, monkeypatch, kernels)
    assert len(dict(agreeing)) == 2 and left_out not in dict(agreeing), "the other two agree"
    assert len(said) == 1 and said[0].startswith(f"{left_out}: the model's differs by ")


@pytest.mark.parametrize("of_one_block", [True, False])
def test_functions_that_may_differ_between_blocks_stay(gpt, monkeypatch, of_one_block):
    def method(attention, *inputs, plain=Attention.queries_keys_values):
        return plain(*inputs)

    if of_one_block:
        gpt.blocks[1].attention.queries_keys_values = changed_values
    else:
        monkeypatch.setattr(Attention, "queries_keys_values", method)
    agreeing, said = found(gpt, monkeypatch, stand_in())
    assert "queries_keys_values" not in dict(agreeing)
    assert said == ["queries_keys_values: the model's is not the same function in all blocks; "
                    "running as the model has it"]


def test_a_kernel_that_fails_is_left_out_and_named(gpt, monkeypatch):
    def fails(*inputs):
        raise RuntimeError("no such instruction")

    agreeing, said = found(gpt, monkeypatch, stand_in(swiglu=fails))
    assert "activate" not in dict(agreeing) and len(dict(agreeing)) == 2
    assert said == ["swiglu: the model's has no kernel (RuntimeError: no such instruction); "
                    "running as the model has it"]


def test_without_triton_no_kernel_is_used(gpt, monkeypatch):
    assert found(gpt, monkeypatch, None) == ([], [])


def test_a_function_is_put_back_as_it_was():
    gpt = GPT(Config(vocab_size=11, context=8, width=16, head_dim=16, depth=1))
    mlp, before = gpt.blocks[0].mlp, copy.copy(gpt.blocks[0].mlp.__dict__)
    with replaced(mlp, "activate", abs), replaced(gpt, "readout_loss", math.exp):
        assert mlp.activate is abs and gpt.readout_loss is math.exp
    assert mlp.__dict__ == before
    assert "readout_loss" not in gpt.__dict__ and gpt.readout_loss.__func__ is GPT.readout_loss
