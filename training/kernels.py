"""Kernels in Triton for three parts of model.py that torch.compile leaves slow on a GPU.

Each public function here gives the numbers of the function of the same name in model.py, which stays the one
to read and to change: training/kernel_check.py compares the two before one of these takes its place, and only
where gradients are on, so that all evaluation goes one way. Tensors are named as in model.py, N queries, keys
and values. Nothing else depends on this file.

What is gained: q and k are normalized and rotated in one pass, whose gradient is written where that of
qkv belongs, without joining three tensors; SwiGLU's gradient likewise; and the loss leaves its gradient where
the logits were, in the kernel that reads them.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def in_qkv(row, n, H, HALF, channel):
    """Where the channels of rows (token, head) of q, k or v are in qkv."""
    return ((row // H * 3 + n) * H + row % H)[:, None] * (2 * HALF) + channel


@triton.jit
def norm_rotate_kernel(qkv, gains, cos, sin, qk, rows, T, eps,
                       H: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK rows of (token, q or k, head): a and b are the two halves of their channels, which rotate."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = (row < rows)[:, None]
    head, n, token = row % H, row // H % 2, row // (2 * H)
    channel = tl.arange(0, HALF)[None, :]
    source = in_qkv(token * H + head, n, H, HALF, channel)
    a = tl.load(qkv + source, mask=exists, other=0.0).to(tl.float32)
    b = tl.load(qkv + source + HALF, mask=exists, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / (2 * HALF) + eps)[:, None]
    gain = gains + n[:, None] * (2 * HALF) + channel
    a = a * scale * tl.load(gain)
    b = b * scale * tl.load(gain + HALF)
    angle = (token % T)[:, None] * HALF + channel
    c, s = tl.load(cos + angle), tl.load(sin + angle)
    target = ((n * (rows // (2 * H)) + token) * H + head)[:, None] * (2 * HALF) + channel
    tl.store(qk + target, (a * c - b * s).to(qk.dtype.element_ty), mask=exists)
    tl.store(qk + target + HALF, (b * c + a * s).to(qk.dtype.element_ty), mask=exists)


@triton.jit
def copy_values(v_grad, qkv_grad, p, programs, rows,
                H: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.arange(0, HALF)[None, :]
    for start in range(p * BLOCK, rows, programs * BLOCK):
        row = start + tl.arange(0, BLOCK).to(tl.int64)
        exists = (row < rows)[:, None]
        source, target = row[:, None] * (2 * HALF) + channel, in_qkv(row, 2, H, HALF, channel)
        tl.store(qkv_grad + target, tl.load(v_grad + source, mask=exists), mask=exists)
        tl.store(qkv_grad + target + HALF, tl.load(v_grad + source + HALF, mask=exists), mask=exists)


@triton.jit
def norm_rotate_backward_kernel(qkv, gains, cos, sin, q_grad, k_grad, v_grad, qkv_grad, gain_grads, tokens, T,
                                eps, H: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Program (p, n): each P-th block of rows (token, head) of q, k or v, and a part of a gain's gradient."""
    p, programs, n = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    channel = tl.arange(0, HALF)[None, :]
    rows = tokens * H
    if n == 2:
        copy_values(v_grad, qkv_grad, p, programs, rows, H, HALF, BLOCK)
    else:
        grad = q_grad if n == 0 else k_grad
        gain_a = tl.load(gains + n * (2 * HALF) + channel)
        gain_b = tl.load(gains + n * (2 * HALF) + HALF + channel)
        sum_a = tl.zeros((BLOCK, HALF), tl.float32)
        sum_b = tl.zeros((BLOCK, HALF), tl.float32)
        for start in range(p * BLOCK, rows, programs * BLOCK):
            row = start + tl.arange(0, BLOCK).to(tl.int64)
            exists = (row < rows)[:, None]
            source, target = row[:, None] * (2 * HALF) + channel, in_qkv(row, n, H, HALF, channel)
            a = tl.load(qkv + target, mask=exists, other=0.0).to(tl.float32)
            b = tl.load(qkv + target + HALF, mask=exists, other=0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / (2 * HALF) + eps)[:, None]
            a, b = a * scale, b * scale
            a_grad = tl.load(grad + source, mask=exists, other=0.0).to(tl.float32)
            b_grad = tl.load(grad + source + HALF, mask=exists, other=0.0).to(tl.float32)
            angle = (row // H % T)[:, None] * HALF + channel
            c, s = tl.load(cos + angle), tl.load(sin + angle)
            a_grad, b_grad = a_grad * c + b_grad * s, b_grad * c - a_grad * s  # rotated back
            sum_a += a_grad * a
            sum_b += b_grad * b
            a_grad, b_grad = a_grad * gain_a, b_grad * gain_b
            along = (tl.sum(a_grad * a + b_grad * b, axis=1) / (2 * HALF))[:, None]
            a_grad, b_grad = scale * (a_grad - a * along), scale * (b_grad - b * along)
            tl.store(qkv_grad + target, a_grad.to(qkv_grad.dtype.element_ty), mask=exists)
            tl.store(qkv_grad + target + HALF, b_grad.to(qkv_grad.dtype.element_ty), mask=exists)
        part = gain_grads + (p * 2 + n) * (2 * HALF) + tl.arange(0, HALF)
        tl.store(part, tl.sum(sum_a, axis=0))
        tl.store(part + HALF, tl.sum(sum_b, axis=0))


@torch.library.custom_op("minigpt::norm_rotate", mutates_args=())
def norm_rotate(qkv_BTNHD: torch.Tensor, gains_2D: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                eps: float) -> torch.Tensor:
    B, T, _, H, D = qkv_BTNHD.shape
    qk, rows, block = qkv_BTNHD.new_empty(2, B, T, H, D), B * T * 2 * H, 16
    norm_rotate_kernel[triton.cdiv(rows, block),](qkv_BTNHD, gains_2D, cos, sin, qk, rows, T, eps, H, D // 2,
                                                  block, num_warps=2)
    return qk


@norm_rotate.register_fake
def _(qkv_BTNHD, gains_2D, cos, sin, eps):
    B, T, _, H, D = qkv_BTNHD.shape
    return qkv_BTNHD.new_empty(2, B, T, H, D)


@torch.library.custom_op("minigpt::norm_rotate_backward", mutates_args=())
def norm_rotate_backward(qkv_BTNHD: torch.Tensor, gains_2D: torch.Tensor, cos: torch.Tensor,
                         sin: torch.Tensor, q_grad: torch.Tensor, k_grad: torch.Tensor,
                         v_grad: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    B, T, _, H, D = qkv_BTNHD.shape
    block = 32
    programs = min(1056, triton.cdiv(B * T * H, block))  # 8 for each processor of a large GPU
    qkv_grad, gain_grads = torch.empty_like(qkv_BTNHD), gains_2D.new_empty(programs, 2, D)
    norm_rotate_backward_kernel[programs, 3](qkv_BTNHD, gains_2D, cos, sin, q_grad, k_grad, v_grad, qkv_grad,
                                             gain_grads, B * T, T, eps, H, D // 2, block, num_warps=2)
    return qkv_grad, gain_grads.sum(0)


@norm_rotate_backward.register_fake
def _(qkv_BTNHD, gains_2D, cos, sin, q_grad, k_grad, v_grad, eps):
    return torch.empty_like(qkv_BTNHD), torch.empty_like(gains_2D)


class NormRotate(torch.autograd.Function):
    """q, k, v, each (B, T, H, D), of qkv_BTNHD and the gains of q and of k."""

    @staticmethod
    def forward(ctx, qkv_BTNHD, gains_2D, cos, sin, eps):
        ctx.save_for_backward(qkv_BTNHD, gains_2D, cos, sin)
        ctx.eps = eps
        q, k = norm_rotate(qkv_BTNHD, gains_2D, cos, sin, eps)
        return q, k, qkv_BTNHD[:, :, 2]

    @staticmethod
    def backward(ctx, *grads):
        grads = (grad.contiguous() for grad in grads)
        qkv_grad, gains_grad = norm_rotate_backward(*ctx.saved_tensors, *grads, ctx.eps)
        return qkv_grad, gains_grad, None, None, None


def queries_keys_values(qkv_BTHD, kv_heads, q_norm, k_norm, rotary):
    """Attention.queries_keys_values, for norms and rotary positions that are there, as many heads of keys and
    values as of queries, and D a power of 2."""
    qkv_BTNHD = qkv_BTHD.unflatten(2, (3, kv_heads))
    gains_2D = torch.stack([norm.factor * norm.weight for norm in (q_norm, k_norm)])
    qkv = NormRotate.apply(qkv_BTNHD.contiguous(), gains_2D, *rotary, q_norm.eps)
    return tuple(x.transpose(1, 2) for x in qkv)


@triton.jit
def swiglu_kernel(gate_up, units, F, BLOCK: tl.constexpr):
    row, unit = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = unit < F
    gate = tl.load(gate_up + row * 2 * F + unit, mask=exists).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + unit, mask=exists).to(tl.float32)
    tl.store(units + row * F + unit, (gate * tl.sigmoid(gate) * up).to(units.dtype.element_ty), mask=exists)


@triton.jit
def swiglu_backward_kernel(gate_up, grad, gate_up_grad, F, BLOCK: tl.constexpr):
    row, unit = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = unit < F
    gate = tl.load(gate_up + row * 2 * F + unit, mask=exists).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + unit, mask=exists).to(tl.float32)
    g = tl.load(grad + row * F + unit, mask=exists).to(tl.float32)
    s = tl.sigmoid(gate)
    target = gate_up_grad + row * 2 * F + unit
    tl.store(target, (g * up * s * (1 + gate * (1 - s))).to(gate_up_grad.dtype.element_ty), mask=exists)
    tl.store(target + F, (g * gate * s).to(gate_up_grad.dtype.element_ty), mask=exists)


def launch_swiglu(kernel, gate_up, *others):
    """A kernel for all rows of (..., 2 F)."""
    F = gate_up.size(-1) // 2
    block = min(2048, triton.next_power_of_2(F))
    grid = gate_up.numel() // (2 * F), triton.cdiv(F, block)
    kernel[grid](gate_up, *others, F, block, num_warps=max(1, block // 256))


@torch.library.custom_op("minigpt::swiglu", mutates_args=())
def swiglu_units(gate_up: torch.Tensor) -> torch.Tensor:
    units = gate_up.new_empty(*gate_up.shape[:-1], gate_up.size(-1) // 2)
    launch_swiglu(swiglu_kernel, gate_up, units)
    return units


@swiglu_units.register_fake
def _(gate_up):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.size(-1) // 2)


@torch.library.custom_op("minigpt::swiglu_backward", mutates_args=())
def swiglu_backward(gate_up: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    gate_up_grad = torch.empty_like(gate_up)
    launch_swiglu(swiglu_backward_kernel, gate_up, grad, gate_up_grad)
    return gate_up_grad


@swiglu_backward.register_fake
def _(gate_up, grad):
    return torch.empty_like(gate_up)


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return swiglu_units(gate_up)

    @staticmethod
    def backward(ctx, grad):
        [gate_up] = ctx.saved_tensors
        return swiglu_backward(gate_up, grad.contiguous())


def swiglu(gate_up):
    """model.swiglu."""
    return SwiGLU.apply(gate_up.contiguous())


@triton.jit
def cross_entropy_kernel(logits, targets, losses, V, scale, BLOCK: tl.constexpr):
    """The loss of a row of logits, which `scale` times its gradient then replaces."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    target = tl.load(targets + row)
    column = tl.arange(0, BLOCK)
    largest, total = -float("inf"), 0.0  # of the logits so far, and sum(exp(logit - largest))
    for start in range(0, V, BLOCK):
        x = tl.load(logits + start + column, mask=start + column < V, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), axis=0)
        largest = larger
    log_sum = largest + tl.log(total)
    tl.store(losses + row, log_sum - tl.load(logits + target).to(tl.float32))
    tl.debug_barrier()  # every thread has read the target's logit before one overwrites it
    for start in range(0, V, BLOCK):
        exists = start + column < V
        x = tl.load(logits + start + column, mask=exists, other=-float("inf")).to(tl.float32)
        grad = tl.exp(x - log_sum) - tl.where(start + column == target, 1.0, 0.0)
        tl.store(logits + start + column, (scale * grad).to(logits.dtype.element_ty), mask=exists)


@torch.library.custom_op("minigpt::cross_entropy", mutates_args=("logits_NV",))
def cross_entropy(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """The loss of each row; the logits become the gradient of the losses' mean."""
    N, V = logits_NV.shape
    losses_N = torch.empty(N, dtype=torch.float32, device=logits_NV.device)
    block = min(4096, triton.next_power_of_2(V))
    cross_entropy_kernel[N,](logits_NV, targets_N, losses_N, V, 1 / N, block, num_warps=max(1, block // 512))
    return losses_N


@cross_entropy.register_fake
def _(logits_NV, targets_N):
    return torch.empty(logits_NV.size(0), dtype=torch.float32, device=logits_NV.device)


class ReadoutLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NC, weight_VC, targets_N):
        logits_NV = x_NC @ weight_VC.t()
        losses_N = cross_entropy(logits_NV, targets_N)
        ctx.save_for_backward(x_NC, weight_VC, logits_NV)
        return losses_N.mean()

    @staticmethod
    def backward(ctx, grad):
        x_NC, weight_VC, logits_grad_NV = ctx.saved_tensors
        return grad * (logits_grad_NV @ weight_VC), grad * (logits_grad_NV.t() @ x_NC), None


def readout_loss(x_BTC, weight_VC, targets_BT):
    """GPT.readout_loss."""
    device_type = x_BTC.device.type
    dtype = weight_VC.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, enabled=False):
        return ReadoutLoss.apply(x_BTC.flatten(0, 1).to(dtype), weight_VC.to(dtype), targets_BT.flatten())
