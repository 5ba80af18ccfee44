"""Which kernels of training/kernels.py may go in the place of a model's own functions: those that agree.

model.py stays the one to read and to change. A function that someone has changed there differs from its
kernel, which is then left out.
"""

import copy

import torch

FP32_ROUNDING = 1e-4  # as a share; what a kernel and a function may differ by


def replaceable(model, config):
    """[(modules, name of a function of theirs, name of its kernel in training/kernels.py, what makes
    inputs to compare the two on)]: the functions of `model` that may have a kernel."""
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device).requires_grad_()

    def with_function(name):
        return [module for module in model.modules() if hasattr(module, name)]

    def loss_inputs():
        targets_BT = torch.tensor([[0, 699, 5, 350, 1]] * 3, device=device)
        return draw(3, 5, 48), draw(700, 48), targets_BT

    def attention_inputs():
        norms = [copy.copy(getattr(attentions[0], name)) for name in ("q_norm", "k_norm")]
        for norm in norms:  # all ones would not tell gains apart; and those of the model may be sharded
            norm._parameters = {name: torch.nn.Parameter((1 + 0.3 * draw(*p.shape)).detach())
                                for name, p in norm._parameters.items()}
        rotary = model.rotary_cos, model.rotary_sin
        return draw(2, config.context, 9, D), 3, *norms, rotary

    D, attentions = config.head_dim, with_function("queries_keys_values")
    found = [(with_function("readout_loss"), "readout_loss", "readout_loss", loss_inputs)]
    if config.mlp == "swiglu":
        found.append((with_function("activate"), "activate", "swiglu", lambda: (draw(3, 5, 2 * 344),)))
    grouped = config.kv_heads is not None and config.kv_heads < config.width // D
    if config.qk_norm and config.position == "rotary" and D >= 16 and D.bit_count() == 1 and not grouped:
        found.append((attentions, "queries_keys_values", "queries_keys_values", attention_inputs))
    return [its for its in found if its[0]]


def outputs_and_gradients(function, inputs):
    """Tensors that `function` gives, and what a loss of them gives its inputs and their parameters."""
    leaves = [x for x in inputs if torch.is_tensor(x) and x.is_floating_point()]
    leaves += [p for x in inputs if isinstance(x, torch.nn.Module) for p in x.parameters()]
    with torch.enable_grad():
        outputs = function(*inputs)
        outputs = [outputs] if torch.is_tensor(outputs) else [*outputs]
        weights = torch.linspace(-1, 1, 1 + max(x.numel() for x in outputs), device=outputs[0].device)
        loss = sum((x.float() * weights[1:1 + x.numel()].view(x.shape)).sum() for x in outputs)
        return outputs + [*torch.autograd.grad(loss, leaves)]


def difference(function, other, inputs):
    """The largest relative distance of outputs and gradients; inf where their shapes differ."""
    pairs = [outputs_and_gradients(f, inputs) for f in (function, other)]
    if [x.shape for x in pairs[0]] != [x.shape for x in pairs[1]]:
        return float("inf")
    shares = [(a.float() - b.float()).norm() / b.float().norm() for a, b in zip(*pairs, strict=True)]
    return max(shares).item()


def in_training(kernel, plain):
    """A function that calls `kernel` where gradients are on, else `plain`."""
    def call(*inputs):
        return kernel(*inputs) if torch.is_grad_enabled() else plain(*inputs)

    return call


def kernels_that_agree(model, config, say):
    """[(module, name, function)]: of training/kernels.py's functions those that compute what the functions of
    `model` in whose place they may go compute, in fp32: edits to model.py always win."""
    try:
        from training import kernels
    except ImportError:  # no Triton: torch.compile will say what is missing
        return []
    found = []
    for modules, name, kernel_name, make_inputs in replaceable(model, config):
        kernel, plain = getattr(kernels, kernel_name), getattr(modules[0], name)
        try:
            if any(getattr(module, name) != plain for module in modules):
                reason = "is not the same function in all blocks"
            else:
                share = difference(kernel, plain, make_inputs())
                reason = None if share < FP32_ROUNDING else f"differs by {share:.1%} from its kernel"
        except Exception as error:  # whatever changed code or an unsupported GPU raises
            reason = f"has no kernel ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        if reason is None:
            fast = in_training(kernel, plain)
            found += [(module, name, fast) for module in modules]
        else:
            say(f"{kernel_name}: the model's {reason}; running as the model has it")
    return found
