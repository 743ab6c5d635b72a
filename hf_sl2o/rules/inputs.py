"""What a rule sees, as pure functions: the columns of its network's input, and the numbers of whole tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from .config import RuleConfig
from .kernel import fused_sums


@torch.compiler.disable  # a compiler looks through the cache, and would make the tensors anew in each graph
@functools.lru_cache(maxsize=32)
def _of_tensors(sizes: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Sizes of the tensors in a flat vector and where each ends, (k,) int64; kept, so that no step copies them."""
    counts = torch.tensor(sizes, device=device)
    return counts, counts.cumsum(0)


def tensor_index(coordinates: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Maps (K,) positions in a flat vector of tensors to the number of the tensor that each lies in, (K,) int64."""
    return torch.bucketize(coordinates, _of_tensors(tuple(sizes), coordinates.device)[1], right=True)


def network_inputs(
    config: RuleConfig,
    seen: list[torch.Tensor],
    g: torch.Tensor,
    m_hat: torch.Tensor,
    of_tensor: torch.Tensor,
    eps: float,
    done: torch.Tensor | None,
) -> torch.Tensor:
    """Returns what the network sees, `(N, input_size)`; [`RuleConfig.input_size`] counts the columns.

    Args:
        config ([`RuleConfig`]): Says which columns there are.
        seen (`list[torch.Tensor]`): m~, g~, and further momenta likewise normalised, each `(N,)`.
        g, m_hat (`torch.Tensor` of shape `(N,)`): The gradient and the bias-corrected momentum themselves.
        of_tensor (`torch.Tensor` of shape `(N, 2)` or `(1, 2)`): From [`tensor_inputs`].
        eps (`float`): Added to the scale of a tensor.
        done (`torch.Tensor` of shape `()` or `(N,)`, *optional*): The share of the run that is done.
    """
    if config.inputs == "normalized":
        columns = list(seen)
        if config.tensor_scale:
            scale = of_tensor[:, 0] + eps  # (N,) or (1,)
            columns += [m_hat / scale, g / scale]
        inputs = torch.stack(columns, dim=-1)  # (N, 2 + k), or (N, 4 + k)
    else:
        inputs = g.unsqueeze(-1)  # (N, 1)
    if config.log_sign is not None:
        inputs = log_and_sign(inputs, config.log_sign)
    if config.progress:
        assert done is not None
        share = done.clamp_max(1.0).unsqueeze(-1).expand(len(inputs), 1)
        inputs = torch.cat([inputs, 2 * share - 1], dim=-1)
    if config.agreement:
        inputs = torch.cat([inputs, of_tensor[:, 1:].expand(len(inputs), 1)], dim=-1)
    return inputs


def log_and_sign(x: torch.Tensor, p: float) -> torch.Tensor:
    """Maps (N, k) to (N, 2k): log|x| / p and sign x where |x| >= e^-p, else -1 and e^p x (Andrychowicz 2016)."""
    # The clamps give both branches at once; the floor keeps log finite at x = 0.
    magnitude = (x.abs().clamp_min(1e-37).log() / p).clamp_min(-1.0)
    sign = (x * torch.exp(torch.tensor(p, dtype=x.dtype, device=x.device))).clamp(-1.0, 1.0)
    return torch.stack([magnitude, sign], dim=-1).flatten(-2)


def tensor_sums(
    g: torch.Tensor, vectors: Sequence[torch.Tensor], exp_avg_sq: torch.Tensor, sizes: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Norms of g over k tensors, sums of v, and for each vector its products with g and its norms: (k,) each."""
    fused = fused_sums(g, vectors, exp_avg_sq, sizes)
    if fused is not None:
        norms, old, *others = fused
        pairs = zip(others[::2], others[1::2], strict=True)
        return norms.sqrt().to(g.dtype), old.to(g.dtype), [(a.to(g.dtype), b.sqrt().to(g.dtype)) for a, b in pairs]
    gradients = g.split(sizes)
    norms = torch.stack(torch._foreach_norm(gradients))
    old = torch.stack(torch._foreach_norm(exp_avg_sq.split(sizes), 1))  # v is not negative
    found = []
    for vector in vectors:
        parts = vector.to(g.dtype).split(sizes)
        dots = torch.stack([torch.dot(a, b) for a, b in zip(gradients, parts, strict=True)])
        found.append((dots, torch.stack(torch._foreach_norm(parts))))
    return norms, old, found


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
    norms, old, of_m = tensor_sums(g, [exp_avg] if agreement else [], exp_avg_sq, sizes)
    scale = (torch.lerp(norms.square(), old, beta2) / counts / (1 - beta2**step)).sqrt()
    if not agreement:
        return torch.stack([scale, torch.zeros_like(scale)], dim=-1)
    [(dots, lengths)] = of_m
    return torch.stack([scale, dots / (norms * lengths).clamp_min(torch.finfo(g.dtype).tiny)], dim=-1)


def tensor_facts(
    g: torch.Tensor,
    averages: Sequence[tuple[torch.Tensor, float]],
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    sizes: tuple[int, ...],
    *,
    beta2: float,
    moved: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns `(k, 3 + 2 j)`, or with `moved` two more, of the k tensors in the flat `g`.

    The columns: s, the square root of the mean of v^ with this step in it; the step; log of (rms of g / s); and for
    each of the j momenta its cosine with g, and its rms over s: 1 while gradients agree, small in noise; last the
    cosine of g with the way from the start to here, and the logarithm of the root mean square of that way. A tensor
    whose gradient is zero has s, and zeros.

    Args:
        g, exp_avg_sq (`torch.Tensor` of shape `(N,)`): The gradient; v of the step before.
        averages (`Sequence[tuple[torch.Tensor, float]]`): Momenta of the step before, each `(N,)` and its decay.
        step (`torch.Tensor` of shape `()` or `(N,)`): Of this step, from 1.
        sizes (`tuple[int, ...]`): Of the tensors.
        beta2 (`float`): Decay of v.
        moved (`torch.Tensor` of shape `(N,)`, *optional*): Where the coordinates are, seen from their start.
    """
    counts, ends = _of_tensors(sizes, g.device)
    step = step[ends - 1] if step.ndim else step.expand(len(sizes))  # (k,)
    tiny = torch.finfo(g.dtype).tiny
    vectors = [average for average, _ in averages] + ([] if moved is None else [moved])
    norms, old, of_vectors = tensor_sums(g, vectors, exp_avg_sq, sizes)  # (k,) each
    s = (torch.lerp(norms.square(), old, beta2) / counts / (1 - beta2**step)).sqrt()
    rms = norms / counts.sqrt()
    columns = [s, step, (rms.clamp_min(tiny) / s.clamp_min(tiny)).log().clamp(-3, 3)]

    # Of each vector the cosine with g, and the root mean square
    beside = [(dots / (norms * of).clamp_min(tiny), of / counts.sqrt()) for dots, of in of_vectors]
    for (cosine, of_average), (_, beta) in zip(beside, averages, strict=False):
        columns += [cosine, of_average / (1 - beta ** (step - 1)).clamp_min(1 - beta) / s.clamp_min(tiny)]
    if moved is not None:
        cosine, way = beside[-1]
        columns += [cosine, way.clamp_min(tiny).log()]
    measured = ((norms > 0) & (s > 0))[:, None]  # s may be too small for fp32
    facts = torch.where(measured, torch.stack(columns[1:], dim=-1), s.new_zeros(()))
    return torch.cat([s[:, None], facts], dim=-1)
