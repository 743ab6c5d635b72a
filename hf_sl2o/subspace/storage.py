"""How many bytes a basis takes in each storage, and which is the best that fits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..foundation.checked import check_integer
from .layout import Layout
from .quantized import BLOCK, LARGEST

logger = logging.getLogger(__name__)

#: From the most exact to the least; a random basis is none that was fitted, and is never taken for one.
STORAGES = ("fp32", "bf16", "int8", "int4", "tucker")
_BYTES = {"fp64": 8.0, "fp32": 4.0, "bf16": 2.0, "fp16": 2.0}
# A matrix with a side below this is kept whole.
_SMALLEST_SIDE = 32


@dataclass(frozen=True)
class Ranks:
    """Sizes of a Tucker basis.

    Args:
        leading (`int`, *optional*, defaults to 8): Directions of the largest variance that are kept whole, at most
            half of all: factors of small rank do not hold them.
        right (`int`, *optional*, defaults to 8): Rank of the factor of a matrix' columns. A step multiplies all
            gradients by it, and all weights: `4 * n * right` operations.
        left (`int`, *optional*, defaults to 64): Rank of the factor of its rows, which costs next to nothing.
        bits (`int`, *optional*, defaults to 4): Of a number of the leading directions, 8 or 4.

    Raises:
        `ValueError`: one is negative, a rank is 0, or bits are others.
    """

    leading: int = 8
    right: int = 8
    left: int = 64
    bits: int = 4

    def __post_init__(self) -> None:
        check_integer("leading", self.leading, 0)
        check_integer("right", self.right, 1)
        check_integer("left", self.left, 1)
        if self.bits not in LARGEST:
            raise ValueError(f"bits is {self.bits!r}, expected 8 or 4")

    def of_leading(self, dim: int) -> int:
        """Directions kept whole of `dim` in a block."""
        return min(self.leading, dim // 2)


#: What a byte budget may come down to, the largest first.
_LADDER = (
    Ranks(),
    Ranks(6),
    Ranks(4),
    Ranks(3),
    Ranks(2),
    Ranks(1),
    Ranks(1, 4, 32),
    Ranks(0, 8, 32),
    Ranks(0, 4, 16),
)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A parameter as a matrix: rows of its first dimension; one row for a vector or a scalar."""
    rows = shape[0] if len(shape) > 1 else 1
    return rows, torch.Size(shape).numel() // max(rows, 1)


def factor_ranks(shape: tuple[int, ...], rows: int, ranks: Ranks) -> tuple[int, int] | None:
    """Ranks of a parameter's left and right factors, a side's own where it has none; None: it is kept whole.

    Args:
        shape (`tuple[int, ...]`): The parameter's.
        rows (`int`): Directions that its factors share.
        ranks ([`Ranks`]): The most.
    """
    m, q = matrix_shape(shape)
    left, right = min(ranks.left, m), min(ranks.right, q)
    factors = rows * left * right + (left * m if left < m else 0) + (right * q if right < q else 0)
    return (left, right) if min(m, q) >= _SMALLEST_SIDE and factors < rows * m * q else None


def _tucker_numbers(shape: tuple[int, ...], rows: int, ranks: Ranks) -> int:
    m, q = matrix_shape(shape)
    if (chosen := factor_ranks(shape, rows, ranks)) is None:
        return rows * m * q
    left, right = chosen
    return rows * left * right + (left * m if left < m else 0) + (right * q if right < q else 0)


def storage_bytes(
    layout: Layout,
    dim: int,
    storage: str,
    *,
    spans: Sequence[tuple[int, int]] | None = None,
    ranks: Ranks | None = None,
) -> int:
    """Returns the bytes of a basis, as its `nbytes` says; nothing is made.

    Args:
        layout ([`Layout`]): Which parameters.
        dim (`int`): d, all coefficients.
        storage (`str`): `"fp32"`, `"bf16"`, `"int8"`, `"int4"`, `"tucker"` (the most: a trajectory of low rank takes
            less) or `"random"`.
        spans (`Sequence[tuple[int, int]]`, *optional*, defaults to `(0, d)` for each parameter): As of the basis.
        ranks ([`Ranks`], *optional*): Of Tucker.

    Raises:
        `ValueError`: an unknown storage, or `dim` below 1.

    Example:

    ```python
    >>> from hf_sl2o import Layout
    >>> from hf_sl2o.subspace.storage import storage_bytes
    >>> layout = Layout(("w", "b"), ((768, 768), (768,)))
    >>> [storage_bytes(layout, 40, storage) for storage in ("fp32", "bf16", "int8", "int4")]
    [94494720, 47247360, 24368320, 12556480]
    >>> storage_bytes(layout, 40, "tucker")
    2901696
    ```
    """
    check_integer("dim", dim, 1)
    if storage not in (*_BYTES, *STORAGES, "random"):
        raise ValueError(f"storage is {storage!r}, expected one of {(*STORAGES, 'random')}")
    rows = [last - first for first, last in ([(0, dim)] * len(layout.names) if spans is None else spans)]
    mix = 4 * dim * dim
    if storage == "random":
        return mix
    pairs = list(zip(layout.shapes, layout.numels, rows, strict=True))
    if storage in _BYTES:
        return sum(int(_BYTES[storage] * numel) * d for _, numel, d in pairs)
    if storage != "tucker":
        return mix + sum(_rounded_bytes(numel, d, int(storage.removeprefix("int"))) for _, numel, d in pairs)
    ranks = ranks or Ranks()
    total, leading = mix, 0
    for shape, numel, d in pairs:
        whole = ranks.of_leading(d)
        leading = max(leading, whole)
        total += 4 * _tucker_numbers(shape, d - whole, ranks) + _rounded_bytes(numel, whole, ranks.bits)
    blocks = 1 if spans is None else len({*spans})
    return total + 4 * (leading * blocks) ** 2


def _rounded_bytes(numel: int, rows: int, bits: int) -> int:
    return rows * ((numel if bits == 8 else -(-numel // 2)) + 4 * -(-numel // BLOCK))


def choose_storage(
    layout: Layout, dim: int, budget_bytes: int | None, *, spans: Sequence[tuple[int, int]] | None = None
) -> tuple[str, str]:
    """Returns the most exact storage that fits in a budget of the device's bytes, and why it was taken, in words.

    Raises:
        `ValueError`: no budget, or one that nothing fits; says the least bytes that are needed.
    """
    if budget_bytes is None:
        raise ValueError('storage="auto" needs budget_bytes, the most bytes that the basis may take')
    check_integer("budget_bytes", budget_bytes, 1)
    refused: list[str] = []
    for storage in STORAGES:
        if storage == "tucker":
            needed = storage_bytes(layout, dim, storage, spans=spans, ranks=_LADDER[-1])
        else:
            needed = storage_bytes(layout, dim, storage, spans=spans)
        if needed <= budget_bytes:
            words = f"{storage} takes {needed:,} bytes" if storage != "tucker" else "tucker fits"
            return storage, f"{words} of {budget_bytes:,}" + ("; " + ", ".join(refused) if refused else "")
        refused.append(f"{storage} would take {needed:,}")
    least = min(storage_bytes(layout, dim, storage, spans=spans, ranks=_LADDER[-1]) for storage in STORAGES)
    raise ValueError(
        f"budget_bytes is {budget_bytes:,}, and {dim} directions of {layout.n:,} parameters take at least {least:,} "
        "bytes; give that many, choose a smaller dim, ask for a RandomBasis, which stores none, or give no budget and "
        "leave the directions on the host (basis.on_host(), or Basis.from_pretrained(..., mapped=True))"
    )


def ranks_within(
    layout: Layout, dim: int, budget_bytes: int | None, *, spans: Sequence[tuple[int, int]] | None = None
) -> Ranks:
    """Returns the largest sizes of a Tucker basis that fit in a budget; without one the defaults.

    Raises:
        `ValueError`: none fits.
    """
    if budget_bytes is None:
        return Ranks()
    sizes = [storage_bytes(layout, dim, "tucker", spans=spans, ranks=ranks) for ranks in _LADDER]
    for ranks, size in zip(_LADDER, sizes, strict=True):
        if size <= budget_bytes:
            return ranks
    raise ValueError(
        f"budget_bytes is {budget_bytes:,}, and Tucker takes at least {min(sizes):,} bytes; give that many, choose a "
        "smaller dim, or take another storage without a budget and leave it on the host (basis.on_host())"
    )
