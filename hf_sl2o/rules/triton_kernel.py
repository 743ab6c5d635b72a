"""The step of a rule over many coordinates as one Triton kernel: for CUDA, and on a CPU for Triton's interpreter.

A program takes a block of the coordinates of one tensor: it reads and writes each number that is kept of a coordinate
once. The formulas are those of `rule`, `lstm` and `tensor_lstm`. Nothing is read back to the host. The size of a block
is no subject of tuning at run time, which would step twice: the update is in place.
"""

# Triton's own language: its functions have no types, and tuples grow as loops are unrolled.
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .config import CEASED, RuleConfig

if TYPE_CHECKING:
    from .kernel import Network, Numbers
    from .rule import RuleState

#: Units of the LSTM that the kernel has, in one layer.
UNITS = 8
_BLOCK, _WARPS = 256, 4  # two coordinates a thread: each weight that is loaded serves both, in 128 registers
_UNITS = tl.constexpr(UNITS)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _tanh(x):
    a = tl.abs(x)
    z = x * x
    p = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z  # Cephes' tanhf, exact near 0
    near = x + x * z * ((p + 1.33314422036e-1) * z - 3.33332819422e-1)
    far = 1 - 2 / (tl.exp(2 * a) + 1)
    return tl.where(a < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _lerp(g, old, beta):
    return tl.where(beta < 0.5, g + beta * (old - g), old + (beta - 1) * (old - g))


@triton.jit
def _stored(x, to):
    """Rounds to nearest, ties to even, where `to` points to bf16: the interpreter's own cast cuts."""
    if to.dtype.element_ty == tl.bfloat16:
        b = x.to(tl.uint32, bitcast=True)
        b = (b + 0x7FFF + ((b >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x != x, x, b.to(tl.float32, bitcast=True)).to(tl.bfloat16)
    return x


@triton.jit
def _apart(tile, n: tl.constexpr):
    """A tile (n, 8) as eight vectors (n,)."""
    even, odd = tl.split(tl.reshape(tile, (n, 4, 2)))  # units 0 2 4 6, and 1 3 5 7
    a, b = tl.split(tl.reshape(even, (n, 2, 2)))  # 0 4, and 2 6
    c, d = tl.split(tl.reshape(odd, (n, 2, 2)))  # 1 5, and 3 7
    u0, u4 = tl.split(a)
    u2, u6 = tl.split(b)
    u1, u5 = tl.split(c)
    u3, u7 = tl.split(d)
    return u0, u1, u2, u3, u4, u5, u6, u7


@triton.jit
def _together(u, n: tl.constexpr):
    """Eight vectors (n,) as a tile (n, 8)."""
    even = tl.reshape(tl.join(tl.join(u[0], u[4]), tl.join(u[2], u[6])), (n, 4))
    odd = tl.reshape(tl.join(tl.join(u[1], u[5]), tl.join(u[3], u[7])), (n, 4))
    return tl.reshape(tl.join(even, odd), (n, 8))


@triton.jit
def _columns(
    seen, g, m_hat, of, share, log_sign, log_sign_exp,
    NORMALIZED: tl.constexpr, TENSOR_SCALE: tl.constexpr, LOG_SIGN: tl.constexpr,
    PROGRESS: tl.constexpr, AGREEMENT: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """What the network sees: a tuple of vectors; COUNT is how many there are before `log_sign`."""
    x = (g,)
    if NORMALIZED:
        x = seen
        if TENSOR_SCALE:
            scale = tl.load(of + 1)
            x = x + (m_hat / scale, g / scale)
    if LOG_SIGN:
        y = ()
        for k in tl.static_range(COUNT):
            a = tl.abs(x[k])
            size = tl.log(tl.where(a < 1e-37, 1e-37, a)) / log_sign
            sign = x[k] * log_sign_exp
            sign = tl.where(sign < -1, -1.0, tl.where(sign > 1, 1.0, sign))
            y = y + (tl.where(size < -1, -1.0, size), sign)
        x = y
    if PROGRESS:
        x = x + (g * 0 + share,)
    if AGREEMENT:
        x = x + (g * 0 + tl.load(of + 2),)
    return x


@triton.jit
def _lstm(x, h, c, w, cell_factor, SEEN: tl.constexpr):
    """The cell of eight units; `w` points to the weights as [`LSTMRule.for_kernel`] lays them out."""
    hidden, cell = (), ()
    for j in tl.static_range(_UNITS):
        row = w + j * 4 * (1 + SEEN + _UNITS)
        i, f, a, o = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
        for k in tl.static_range(SEEN):
            at = row + 4 * (1 + k)
            i += x[k] * tl.load(at)
            f += x[k] * tl.load(at + 1)
            a += x[k] * tl.load(at + 2)
            o += x[k] * tl.load(at + 3)
        for k in tl.static_range(_UNITS):
            at = row + 4 * (1 + SEEN + k)
            i += h[k] * tl.load(at)
            f += h[k] * tl.load(at + 1)
            a += h[k] * tl.load(at + 2)
            o += h[k] * tl.load(at + 3)
        new = _sigmoid(f) * (c[j] * cell_factor) + _sigmoid(i) * _tanh(a)
        cell = cell + (new,)
        hidden = hidden + (_sigmoid(o) * _tanh(new),)
    return hidden, cell


@triton.jit
def _rule_step(
    g_of, m_of, v_of, hidden_of, cell_of, momenta_of, finite_of, weights, corrections, shares, factors, of_tensors,
    tensor_of_block, first_of_block, end_of_block,
    betas, eps, log_sign, log_sign_exp, output_scale, ceased, largest,
    PER_TENSOR: tl.constexpr, FURTHER: tl.constexpr, STRIDE: tl.constexpr, COUNT: tl.constexpr, SEEN: tl.constexpr,
    NORMALIZED: tl.constexpr, TENSOR_SCALE: tl.constexpr, LOG_SIGN: tl.constexpr, PROGRESS: tl.constexpr,
    AGREEMENT: tl.constexpr, MIX: tl.constexpr, SQUASH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    of = of_tensors + tl.load(tensor_of_block + block) * PER_TENSOR
    at = tl.load(first_of_block + block) + tl.arange(0, BLOCK)
    end = tl.load(end_of_block + block)
    inside = at < end
    kept = at < end * tl.load(finite_of)  # none where the step is not finite

    g = tl.load(g_of + at, mask=inside, other=0.0)
    v = _lerp(g * g, tl.load(v_of + at, mask=inside, other=0.0), tl.load(betas + 1))
    m = _lerp(g, tl.load(m_of + at, mask=inside, other=0.0).to(tl.float32), tl.load(betas))
    tl.store(v_of + at, v, mask=kept)
    tl.store(m_of + at, _stored(m, m_of), mask=kept)
    v_hat = v * tl.load(corrections + 1)
    inverse = 1 / (tl.sqrt_rn(v_hat) + eps)
    m_hat = m * tl.load(corrections)
    seen = (m_hat * inverse, g * inverse)
    a, b = tl.abs(seen[0]), tl.abs(seen[1])
    recent = tl.where((a >= b) | (a != a), a, b)
    for j in tl.static_range(FURTHER):
        old = tl.load(momenta_of + at * STRIDE + j, mask=inside, other=0.0)
        new = _lerp(g, old, tl.load(betas + 2 + j))
        tl.store(momenta_of + at * STRIDE + j, new, mask=kept)
        seen = seen + (new * tl.load(corrections + 2 + j) * inverse,)
    x = _columns(
        seen, g, m_hat, of, tl.load(shares), log_sign, log_sign_exp,
        NORMALIZED, TENSOR_SCALE, LOG_SIGN, PROGRESS, AGREEMENT, COUNT,
    )  # fmt: skip

    if MIX:
        output = x[0] * tl.load(of + 3)
        for k in tl.static_range(1, SEEN):
            output += x[k] * tl.load(of + 3 + k)
        output = tl.load(of + 2) * largest * _tanh(output / largest)
    else:
        tile = at[:, None] * _UNITS + tl.arange(0, _UNITS)[None, :]
        old_hidden = tl.load(hidden_of + tile, mask=inside[:, None], other=0.0).to(tl.float32)
        old_cell = tl.load(cell_of + tile, mask=inside[:, None], other=0.0).to(tl.float32)
        hidden, cell = _lstm(
            x, _apart(old_hidden, BLOCK), _apart(old_cell, BLOCK), weights, tl.load(factors), SEEN
        )  # fmt: skip
        tl.store(hidden_of + tile, _stored(_together(hidden, BLOCK), hidden_of), mask=kept[:, None])
        tl.store(cell_of + tile, _stored(_together(cell, BLOCK), cell_of), mask=kept[:, None])
        head = weights + 4 * _UNITS * (1 + SEEN + _UNITS)
        output = hidden[0] * tl.load(head)
        for j in tl.static_range(1, _UNITS):
            output += hidden[j] * tl.load(head + j)
        if SQUASH:
            output = _tanh(output)

    below = v_hat + tl.load(of)
    history = v_hat / tl.where(below < _TINY, _TINY, below)
    recent = recent / ceased
    history = history * tl.where(recent > 1, 1.0, recent)
    delta = output_scale * history * output
    tl.store(g_of + at, tl.where(kept, delta, 0.0), mask=inside)
    if STRIDE > FURTHER:  # the way from the start
        way = momenta_of + at * STRIDE + STRIDE - 1
        tl.store(way, tl.load(way, mask=inside, other=0.0) - delta, mask=kept)


@functools.lru_cache(maxsize=32)
def _blocks(
    sizes: tuple[int, ...], block: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each block its tensor, where it begins, and where its tensor ends: (B,) int64; kept between steps."""
    counts = torch.tensor(sizes)
    ends = counts.cumsum(0)
    blocks = (counts + block - 1) // block  # of each tensor
    tensor = torch.arange(len(sizes)).repeat_interleave(blocks)
    inside = torch.arange(len(tensor)) - (blocks.cumsum(0) - blocks)[tensor]
    first = (ends - counts)[tensor] + inside * block
    return tensor.to(device), first.to(device), ends[tensor].to(device)


@functools.lru_cache(maxsize=32)
def _kept(numbers: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Numbers on a device, kept between steps: a copy would wait for the device, and cannot be captured in a graph."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def launch(
    config: RuleConfig,
    network: Network,
    numbers: Numbers,
    g: torch.Tensor,
    state: RuleState,
    *,
    sizes: Sequence[int],
    finite: torch.Tensor | None,
    decays: Sequence[float],
    eps: float,
) -> None:
    """Turns `g` into delta and `state` into the next one, but for its step; asynchronous on CUDA.

    Args:
        config, network, numbers: Of a rule of one layer of 8 units, or of a mix.
        g (`torch.Tensor` of shape `(N,)`): fp32.
        state ([`RuleState`]): fp32; m, `hidden` and `cell` may be bf16.
        sizes (`Sequence[int]`): Of the k tensors.
        finite (0-d `torch.Tensor`, *optional*): Where false, delta is 0 and the state stays.
        decays (`Sequence[float]`): Of m, v and each further momentum.
        eps (`float`): Added to sqrt(v^).
    """
    log_sign = config.log_sign or 0.0
    tensor, first, end = _blocks(tuple(sizes), _BLOCK, g.device)
    gradients = (2 if config.inputs == "normalized" else 1) + len(config.momenta) + 2 * config.tensor_scale
    finite = _kept((1,), g.device, torch.int32) if finite is None else finite.to(torch.int32)
    _rule_step[(len(tensor),)](
        g, state.exp_avg, state.exp_avg_sq, state.hidden, state.cell, state.momenta, finite,
        network.weights, numbers.corrections, numbers.share, numbers.cell_factor, numbers.of_tensor,
        tensor, first, end,
        _kept(tuple(decays), g.device, torch.float32), eps, log_sign, math.exp(log_sign), config.output_scale, CEASED,
        network.largest,
        PER_TENSOR=numbers.of_tensor.shape[1], FURTHER=len(config.momenta), STRIDE=state.momenta.shape[1],
        COUNT=gradients, SEEN=config.input_size, NORMALIZED=config.inputs == "normalized",
        TENSOR_SCALE=config.tensor_scale, LOG_SIGN=config.log_sign is not None, PROGRESS=config.progress,
        AGREEMENT=config.agreement, MIX=network.layers == 0, SQUASH=config.squash, BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
