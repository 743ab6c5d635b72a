"""Fits of bases that are rounded or share factors, from the snapshots, without ever forming dense directions.

T snapshots, X (T, n) centred; of each block of parameters the Gram matrix X X^T = V diag(lambda) V^T is known. All
sums of products with X are formed while a parameter's snapshots are read; what is left is algebra of (T, d) matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .layout import Layout
from .quantized import BLOCK, QuantizedBasis, dequantize, inverse_root, quantize
from .storage import Ranks, factor_ranks, matrix_shape
from .thin import Factors
from .tucker import TuckerBasis, leading_basis

# Columns of a sketch beyond the rank that is wanted.
_OVERSAMPLED = 8
# Variances below this share of the largest are rounding.
_TOLERANCE = 1e-10

#: Of a block of parameters: (T, d) eigenvectors, (d,) and all eigenvalues of the Gram matrix, descending.
Components = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Fitted(NamedTuple):
    """A basis' numbers beside its directions, of one block of parameters or of all."""

    mix: torch.Tensor  # (d, d), fp64
    deviations: torch.Tensor  # (d,), standard deviations of the trajectory
    explained: list[float]  # shares of the variance, one a direction
    error: float  # root mean square distance from the dense directions


class _Reader:
    """The blocks of one parameter, centred, on the device; columns of each are whole rows of its first dimension."""

    def __init__(self, reader: Any, center: bool, bar: Any) -> None:
        self.reader, self.center, self.bar = reader, center, bar

    def of(self, index: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        for first, last, block in self.reader.of(index):
            if self.center:
                block -= block.mean(dim=0)
            yield first, last, block
            self.bar.update(last - first)


class _Coder:
    """Rounds directions of one parameter while its columns come in, and sums the products of what was rounded.

    Args:
        weights (`torch.Tensor` of shape `(T, p)`): The directions are `weights.T @ block`.
        bits (`int`): 8 or 4.
    """

    def __init__(self, weights: torch.Tensor, bits: int) -> None:
        self.weights, self.bits = weights, bits
        self.codes: list[torch.Tensor] = []
        self.scales: list[torch.Tensor] = []
        samples, count = weights.shape
        self.inner = torch.zeros(samples, count, dtype=torch.float64)  # X U^T
        self.gram = torch.zeros(count, count, dtype=torch.float64)  # U U^T
        self._kept: torch.Tensor | None = None

    def take(self, block: torch.Tensor) -> None:
        """A further (T, columns) block."""
        block = block if self._kept is None else torch.cat([self._kept, block], dim=1)
        whole = block.shape[1] // BLOCK * BLOCK
        if whole:
            self._round(block[:, :whole])
        self._kept = block[:, whole:].clone() if whole < block.shape[1] else None

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of the parameter."""
        if self._kept is not None:
            self._round(self._kept)
            self._kept = None
        return torch.cat(self.codes, dim=1), torch.cat(self.scales, dim=1)

    def _round(self, block: torch.Tensor) -> None:
        codes, scales = quantize(self.weights.T @ block, self.bits)
        rounded = dequantize(codes, scales, self.bits, 0, block.shape[1]).double()
        self.inner += (block @ rounded.T).cpu()
        self.gram += (rounded @ rounded.T).cpu()
        self.codes.append(codes.cpu())
        self.scales.append(scales.cpu())


def _measured(inner: torch.Tensor, mix: torch.Tensor, components: Components, center: bool) -> Fitted:
    """What a block's directions hold of the trajectory, from the products of X with the stored ones, (T, d)."""
    vectors, values, all_values = components
    moved = inner @ mix.T  # X U^T
    held = moved.square().sum(0)
    overlap = (vectors / values.sqrt()).T @ moved  # dense directions with these: X^T V lambda^-1/2 and U
    outside = 1 - float(overlap.square().sum()) / len(values)
    deviations = (held / (len(inner) - int(center))).sqrt()
    return Fitted(mix, deviations, (held / all_values.sum()).tolist(), max(outside, 0.0) ** 0.5)


def joined(blocks: list[Fitted]) -> Fitted:
    """The blocks of a basis as one: a block-diagonal mix, and what each holds."""
    error = (sum(one.error**2 for one in blocks) / len(blocks)) ** 0.5
    shares = blocks[0].explained if len(blocks) == 1 else [sum(one.explained) for one in blocks]
    deviations = torch.cat([one.deviations for one in blocks])
    return Fitted(torch.block_diag(*(one.mix for one in blocks)), deviations, shares, error)


def fit_quantized(
    reader: Any, groups: list[list[int]], components: list[Components], bits: int, center: bool, bar: Any
) -> tuple[QuantizedBasis, Fitted]:
    """Fits directions of 8 or 4 bits; reads each parameter's snapshots once.

    Args:
        reader: Yields the snapshots of a parameter in blocks (`_Blocks` of `fit`).
        groups (`list[list[int]]`): Parameters of each block of directions.
        components (`list[Components]`): Of each group.
        bits (`int`): 8 or 4.
        center (`bool`): Whether the mean snapshot is subtracted.
        bar: A progress bar.

    Returns:
        The basis, in standard deviations, and what it holds.
    """
    layout: Layout = reader.layout
    codes: dict[int, torch.Tensor] = {}
    scales: dict[int, torch.Tensor] = {}
    spans: list[tuple[int, int]] = [(0, 0)] * len(layout.names)
    fitted = []
    for number, (group, known) in enumerate(zip(groups, components, strict=True)):
        vectors, values, _ = known
        weights, dim = (vectors / values.sqrt()).to(reader.device), len(values)
        inner, gram = torch.zeros_like(vectors), torch.zeros(dim, dim, dtype=torch.float64)
        for index in group:
            coder = _Coder(weights, bits)
            for _, _, block in _Reader(reader, center, bar).of(index):
                coder.take(block)
            codes[index], scales[index] = coder.finish()
            spans[index] = number * dim, (number + 1) * dim
            inner, gram = inner + coder.inner, gram + coder.gram
        fitted.append(_measured(inner, inverse_root(gram), known, center))
    whole, order = joined(fitted), range(len(layout.names))
    std = torch.cat([(values / (len(v) - int(center))).sqrt() for v, values, _ in components]).float()
    mix = whole.mix.float()
    made = QuantizedBasis(layout, [codes[i] for i in order], [scales[i] for i in order], mix, std, std, spans)
    return made, whole


def fit_tucker(
    reader: Any, groups: list[list[int]], components: list[Components], ranks: Ranks, center: bool, bar: Any
) -> tuple[TuckerBasis, Fitted]:
    """Fits directions that share factors; reads each parameter's snapshots twice, in a row.

    The first directions are the leading ones of the trajectory, rounded. The others are the principal ones
    of what is left of the trajectory, projected onto the factors of each matrix. Then all are turned, within their
    span, to the principal directions of the trajectory there.

    Args:
        reader, groups, components, center, bar: As in [`fit_quantized`].
        ranks ([`Ranks`]): The sizes.

    Returns:
        The basis, in standard deviations, and what it holds.

    Raises:
        `ValueError`: the factors hold fewer directions than are wanted.
    """
    layout: Layout = reader.layout
    factors: dict[int, Factors] = {}
    codes: dict[int, torch.Tensor] = {}
    scales: dict[int, torch.Tensor] = {}
    spans: list[tuple[int, int]] = [(0, 0)] * len(layout.names)
    fitted = []
    for number, (group, known) in enumerate(zip(groups, components, strict=True)):
        vectors, values, _ = known
        dim = len(values)
        whole = ranks.of_leading(dim)
        top = vectors[:, :whole]
        weights = (top / values[:whole].sqrt()).to(reader.device)
        inner, gram = torch.zeros(len(vectors), whole, dtype=torch.float64), torch.zeros(whole, whole).double()
        sides, snapshots = {}, {}
        for index in group:
            coder = _Coder(weights, ranks.bits)
            chosen = factor_ranks(layout.shapes[index], dim - whole, ranks)
            one = _Reader(reader, center, bar)
            sides[index], snapshots[index] = _factored(one, layout, index, top.to(reader.device), chosen, coder)
            if whole:
                codes[index], scales[index] = coder.finish()
            inner, gram = inner + coder.inner, gram + coder.gram
            spans[index] = number * dim, (number + 1) * dim
        rest, own = _rest(snapshots, top, dim - whole)
        for index in group:
            core = torch.einsum("tj,tab->jab", rest, snapshots[index].double()).float()
            factors[index] = Factors(core, *sides[index])
        inner = torch.cat([inner, own @ rest], dim=1)
        # products of the stored directions: rounded ones, rounded ones with factored ones, factored ones
        total = torch.zeros(dim, dim, dtype=torch.float64)
        total[:whole, :whole] = gram
        for index in group:
            flat = factors[index].core.flatten(1).double()
            total[whole:, whole:] += flat @ flat.T
            if whole:
                cross = _rounded_in_factors(codes[index], scales[index], ranks.bits, factors[index]) @ flat.T
                total[:whole, whole:] += cross
                total[whole:, :whole] += cross.T
        fitted.append(_measured(inner, _turned(total, inner), known, center))
    result, order = joined(fitted), range(len(layout.names))
    leading = None
    if codes:
        leading = leading_basis(layout, [codes[i] for i in order], [scales[i] for i in order], spans, whole)
    std = result.deviations.float()
    made = TuckerBasis(layout, [factors[i] for i in order], result.mix.float(), std, std, spans, None, leading)
    return made, result


def _factored(
    reader: _Reader,
    layout: Layout,
    index: int,
    top: torch.Tensor,
    chosen: tuple[int, int] | None,
    coder: _Coder,
) -> tuple[tuple[torch.Tensor | None, torch.Tensor | None], torch.Tensor]:
    """Left and right factor of a parameter, and its snapshots in them: `(T, r1, r2)`, fp32.

    The factors hold the most of the trajectory without its leading components `top` (T, p), which are kept otherwise.
    """
    (m, q), samples = matrix_shape(layout.shapes[index]), len(top)
    left_rank, right_rank = (m, q) if chosen is None else chosen
    right = _sketch(reader, index, q, top, right_rank + _OVERSAMPLED) if right_rank < q else None
    half = torch.empty(samples, m, q if right is None else right.shape[1])
    for first, last, block in reader.of(index):
        if coder.weights.shape[1]:
            coder.take(block)
        matrices = block.view(samples, -1, q).float()
        half[:, first // q : last // q] = matrices if right is None else matrices @ right
    if right is not None:  # the best r2 directions within the sketch
        rest = _without(half, top.cpu()).flatten(0, 1)
        within = torch.linalg.eigh((rest.T @ rest).double())[1].flip(1)[:, :right_rank].float()
        right, half = right.cpu() @ within, half @ within
    left = _left_factor(_without(half, top.cpu()), left_rank) if left_rank < m else None
    return (left, right), half if left is None else left.T @ half


def _without(snapshots: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """Snapshots (T, ...) without their components along orthonormal `top` (T, p)."""
    flat = snapshots.flatten(1)
    top = top.to(flat.dtype)
    return (flat - top @ (top.T @ flat)).view(snapshots.shape)


def _sketch(reader: _Reader, index: int, q: int, top: torch.Tensor, columns: int) -> torch.Tensor:
    """An orthonormal basis (q, columns) of what the rows of a matrix span most, by one power iteration."""
    columns = min(columns, q)
    start = torch.randn(q, columns, generator=torch.Generator().manual_seed(index)).to(top.device)
    total = torch.zeros(q, columns, dtype=torch.float64, device=top.device)
    for _, _, block in reader.of(index):
        rows = _without(block.float(), top).view(-1, q)
        total += rows.T @ (rows @ start)
    return torch.linalg.qr(total)[0].float()


def _left_factor(half: torch.Tensor, rank: int) -> torch.Tensor | None:
    """Orthonormal columns (m, r1) that hold the most of (T, m, r2) matrices; None: all of the rows are needed."""
    tall = half.permute(1, 0, 2).flatten(1)  # (m, T * r2)
    if len(tall) <= tall.shape[1]:
        return torch.linalg.eigh((tall @ tall.T).double())[1].flip(1)[:, :rank].float()
    values, vectors = torch.linalg.eigh((tall.T @ tall).double())
    known = int((values > _TOLERANCE * values[-1].clamp_min(1e-300)).sum())
    keep = max(1, min(rank, known))
    return torch.linalg.qr(tall.double() @ vectors.flip(1)[:, :keep])[0].float()


def _rest(snapshots: dict[int, torch.Tensor], top: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (T, count) of the principal directions of factored snapshots without `top`, and the Gram matrix."""
    own = torch.zeros(len(top), len(top), dtype=torch.float64)
    for part in snapshots.values():
        flat = part.flatten(1).double()
        own += flat @ flat.T
    values, vectors = torch.linalg.eigh(_without(_without(own, top).T, top))
    values, vectors = values.flip(0), vectors.flip(1)
    if not bool(values[count - 1] > _TOLERANCE * values[0]):
        held = int((values > _TOLERANCE * values[0]).sum()) if values[0] > 0 else 0
        raise ValueError(
            f"the factors hold {held} directions beside the leading ones, and {count} are wanted; choose a smaller "
            "dim, or another storage"
        )
    weights = vectors[:, :count] / values[:count].sqrt()
    return _without(weights, top), own


def _rounded_in_factors(codes: torch.Tensor, scales: torch.Tensor, bits: int, factors: Factors) -> torch.Tensor:
    """Rounded directions (p, m * q) in the factors of a parameter: (p, r1 * r2), fp64."""
    m, q = factors.matrix_shape()
    total: list[torch.Tensor] = []
    step = max(1, (1 << 20) // q)
    for first in range(0, m, step):
        last = min(first + step, m)
        rows = dequantize(codes, scales, bits, first * q, last * q).view(len(codes), last - first, q)
        total.append(factors.reduce(rows, first).double())
    small = torch.cat(total, dim=1) if factors.left is None else torch.stack(total).sum(0)
    return small.flatten(1)


def _turned(gram: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """The mix (d, d) that makes directions orthonormal, and the principal ones of the trajectory in their span.

    Args:
        gram (`torch.Tensor` of shape `(d, d)`): Products of the stored directions.
        inner (`torch.Tensor` of shape `(T, d)`): Of the trajectory with them.
    """
    root = inverse_root(gram)
    moved = inner @ root
    vectors = torch.linalg.eigh(moved.T @ moved)[1].flip(1)
    along = moved @ vectors  # signs as of dense directions
    signs = along[along.abs().argmax(dim=0), torch.arange(along.shape[1])].sign()
    return (vectors * signs).T @ root
