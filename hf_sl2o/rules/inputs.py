"""What a rule is shown beyond m~ and g~, as pure functions: logarithms and signs, and numbers of whole tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch


@torch.compiler.disable  # a compiler looks through the cache, and would make the tensors anew in each graph
@functools.lru_cache(maxsize=32)
def _of_tensors(sizes: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Sizes of the tensors in a flat vector and where each ends, (k,) int64; kept, so that no step copies them."""
    counts = torch.tensor(sizes, device=device)
    return counts, counts.cumsum(0)


def tensor_index(coordinates: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Maps (K,) positions in a flat vector of tensors to the number of the tensor that each lies in, (K,) int64."""
    return torch.bucketize(coordinates, _of_tensors(tuple(sizes), coordinates.device)[1], right=True)


def log_and_sign(x: torch.Tensor, p: float) -> torch.Tensor:
    """Maps (N, k) to (N, 2k): log|x| / p and sign x where |x| >= e^-p, else -1 and e^p x (Andrychowicz 2016)."""
    # The clamps give both branches at once; the floor keeps log finite at x = 0.
    magnitude = (x.abs().clamp_min(1e-37).log() / p).clamp_min(-1.0)
    sign = (x * torch.exp(torch.tensor(p, dtype=x.dtype, device=x.device))).clamp(-1.0, 1.0)
    return torch.stack([magnitude, sign], dim=-1).flatten(-2)


def tensor_inputs(
    g: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    sizes: tuple[int, ...],
    *,
    beta2: float,
    agreement: bool,
) -> torch.Tensor:
    """Returns `(k, 2)` of the k tensors in the flat `g`: s, and the cosine of g and m (0 unless `agreement`).

    Args:
        g, exp_avg, exp_avg_sq (`torch.Tensor` of shape `(N,)`): The gradient; m and v of the step before.
        step (`torch.Tensor` of shape `()` or `(N,)`): The exponent of the bias correction.
        sizes (`tuple[int, ...]`): Of the tensors.
        beta2 (`float`): Decay of v.
        agreement (`bool`): Whether the cosine is wanted.
    """
    counts, ends = _of_tensors(sizes, g.device)
    if step.ndim:
        step = step[ends - 1]
    gradients, momenta = g.split(sizes), exp_avg.split(sizes)
    norms = torch.stack(torch._foreach_norm(gradients))  # (k,)
    old = torch.stack(torch._foreach_norm(exp_avg_sq.split(sizes), 1))  # (k,) sums: v is not negative
    scale = (torch.lerp(norms.square(), old, beta2) / counts / (1 - beta2**step)).sqrt()
    if not agreement:
        return torch.stack([scale, torch.zeros_like(scale)], dim=-1)
    dots = torch.stack([torch.dot(of_g, of_m) for of_g, of_m in zip(gradients, momenta, strict=True)])
    lengths = norms * torch.stack(torch._foreach_norm(momenta))
    return torch.stack([scale, dots / lengths.clamp_min(torch.finfo(g.dtype).tiny)], dim=-1)
