"""theta_0 + lift(c) to the bit, on any machine: what a fine-tune that is shared as d numbers means.

Training adds a small movement at each step, and its loops sum in the order that is fastest on a machine. Both show in
the last digits. Here each product and each sum is an operation of its own in fp64, from the first direction to the
last. IEEE 754 fixes the result of each, whatever the number of threads, the width of vectors or the size of blocks.
The sum is rounded once to fp32, and from there to bf16 or fp16 for weights of these.

d coefficients, n parameters covered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from .basis import Basis
from .dense import DenseBasis
from .quantized import QuantizedBasis
from .random import RandomBasis
from .tucker import TuckerBasis

# Columns handled at a time: no part of the result.
_COLUMNS = 1 << 14


@torch.no_grad()
def moved_exactly(basis: Basis, start: Sequence[torch.Tensor], coefficients: torch.Tensor) -> list[torch.Tensor]:
    """Returns theta_0 + lift(c) per parameter, the same bits everywhere; `start` stays as it is.

    The directions of a [`RandomBasis`] are drawn anew, and are those of this version of torch on this kind of CPU.

    Args:
        basis ([`Basis`]): Dense, quantized, Tucker or random.
        start (`Sequence[torch.Tensor]`): theta_0, one tensor a parameter, fp64, fp32, bf16 or fp16.
        coefficients (`torch.Tensor` of shape `(d,)`): c, fp32 or fp64.

    Returns:
        `list[torch.Tensor]`: Of the shapes, dtypes and devices of `start`.

    Raises:
        `NotImplementedError`: a basis of another kind: sharded, or the identity.

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o import DenseBasis, Layout
    >>> from hf_sl2o.subspace.exact import moved_exactly
    >>> basis = DenseBasis(Layout(("w",), ((3,),)), [torch.eye(3)[:2]])
    >>> moved_exactly(basis, [torch.ones(3)], torch.tensor([0.5, 2.0]))
    [tensor([1.5000, 3.0000, 1.0000])]
    ```
    """
    if not isinstance(basis, DenseBasis | QuantizedBasis | TuckerBasis | RandomBasis):
        raise NotImplementedError(
            f"a {type(basis).__name__} of {basis.dim} coefficients has no fixed order of sums; expected a dense, "
            "quantized, Tucker or random basis that is not sharded: share the weights instead"
        )
    factors = _factors(basis, coefficients)
    moved = []
    for index, (theta, (first, last)) in enumerate(zip(start, basis.spans, strict=True)):
        flat = theta.detach().reshape(-1)
        made = torch.empty_like(flat)
        for begin, end, lifted in _lifted(basis, index, factors[first:last]):
            total = flat[begin:end].to(lifted) + lifted
            # torch goes from fp64 to bf16 by way of fp32 as well; said here, as it is a part of the result
            made[begin:end] = total if flat.dtype == torch.float64 else total.float().to(flat.dtype)
        moved.append(made.view(theta.shape))
    return moved


def _factors(basis: Basis, coefficients: torch.Tensor) -> list[float]:
    """What the stored directions are multiplied by, d numbers."""
    scaled = coefficients.detach().double().cpu() * basis.units.double().cpu()
    if isinstance(basis, DenseBasis):
        return scaled.tolist()  # type: ignore[no-any-return]
    mix = basis._mix if isinstance(basis, RandomBasis) else basis.mix  # type: ignore[attr-defined]
    return _in_order(scaled.tolist(), mix.cpu()).tolist()  # type: ignore[no-any-return]


def _in_order(factors: Sequence[float], rows: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of factors times rows, fp64: one product and one sum after the other, never fused."""
    total: torch.Tensor | None = None
    for factor, row in zip(factors, rows, strict=True):
        product = row.double() * factor
        total = torch.zeros_like(product) if total is None else total
        total += product
    assert total is not None
    return total


def _lifted(basis: Basis, index: int, factors: Sequence[float]) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yields `(start, stop, lift(c)[start:stop])` of a parameter, fp64."""
    if isinstance(basis, TuckerBasis):
        yield from _of_factors(basis, index, factors)
        return
    drawn = isinstance(basis, RandomBasis)
    for start, stop, columns in basis._raw_columns(index) if drawn else basis._columns(index, _COLUMNS):  # type: ignore[attr-defined]
        yield start, stop, _in_order(factors, columns)


def _of_factors(basis: TuckerBasis, index: int, factors: Sequence[float]) -> Iterator[tuple[int, int, torch.Tensor]]:
    """As `_lifted`: the sum of the cores between a left and a right factor, and the leading directions."""
    of, whole = basis._factors[index], basis._whole
    m, q = of.matrix_shape()
    middle = _in_order(factors[whole:], of.core)  # (r1, r2)
    for first in range(0, m, step := max(1, _COLUMNS // max(q, 1))):
        rows = slice(first, min(first + step, m))
        half = middle[rows] if of.left is None else _product(of.left[rows], middle)
        lifted = (half if of.right is None else _product(half, of.right.T)).reshape(-1)
        start, stop = rows.start * q, rows.stop * q
        if basis.leading is not None:
            lifted = lifted + _in_order(factors[:whole], basis.leading.rounded(index, start, stop))
        yield start, stop, lifted


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A B of (m, r) and (r, q), fp64, summed from the first of r to the last."""
    total = torch.zeros(len(left), right.shape[1], dtype=torch.float64, device=left.device)
    for column, row in zip(left.double().T, right.double(), strict=True):
        total += column[:, None] * row
    return total
