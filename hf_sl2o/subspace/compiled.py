"""Products with stored directions on a CPU by the loops of `columns.cpp`: all parameters in one call, U read once.

Torch multiplies fp32 matrices and vectors in one thread, and has nothing fast for bf16, int8 or int4 ones. Each
function here returns whether it did the work; where it did not (no compiler, another device or dtype), the caller's
own torch code does.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..foundation.native import load_native

_SOURCE = Path(__file__).with_name("columns.cpp")
STORAGES = ("fp32", "bf16", "int8", "int4")  # in the order that columns.cpp counts them
# Bytes of directions from which a second thread is worth its start, some 20 microseconds.
_THREADED = 1 << 20


class Stored(NamedTuple):
    """Directions as they are in memory.

    Args:
        storage (`str`): One of `STORAGES`.
        codes (`Sequence[torch.Tensor]`): For each parameter fp32, bf16 or int8 of shape `(d_p, numel)`, or uint8 of
            shape `(d_p, ceil(numel / 2))`.
        scales (`Sequence[torch.Tensor]`, *optional*): Of int8 and int4: fp32 of shape `(d_p, ceil(numel / 128))`.
    """

    storage: str
    codes: Sequence[torch.Tensor]
    scales: Sequence[torch.Tensor] | None = None


class _Table:
    """What columns.cpp knows of a basis: where the directions of each parameter are."""

    def __init__(self, library: Any, basis: Any, stored: Stored) -> None:
        self.stored, self.pointers = stored, _pointers_of(stored)
        count = len(stored.codes)
        whole = (ctypes.c_int64 * count, ctypes.c_void_p * count)
        rows = whole[0](*(last - first for first, last in basis.spans))
        firsts = whole[0](*(first for first, _ in basis.spans))
        codes, scales = self.pointers[:count], self.pointers[count:] or [0] * count
        self.address = ctypes.c_void_p(
            library.sl2o_table(
                ctypes.c_int64(count),
                whole[0](*basis.layout.numels),
                rows,
                firsts,
                whole[1](*codes),
                whole[1](*scales),
            )  # fmt: skip
        )
        weakref.finalize(self, library.sl2o_forget, self.address)
        self.storage = ctypes.c_int(STORAGES.index(stored.storage))
        self.bytes = sum(tensor.nbytes for tensor in stored.codes)

    @property
    def threads(self) -> ctypes.c_int:
        return ctypes.c_int(torch.get_num_threads() if self.bytes >= _THREADED else 1)


_tables: weakref.WeakKeyDictionary[Any, _Table] = weakref.WeakKeyDictionary()


def _pointers_of(stored: Stored) -> list[int]:
    return [tensor.data_ptr() for tensor in (*stored.codes, *(stored.scales or ()))]


def _ready(basis: Any) -> tuple[Any, _Table] | None:
    stored, library = basis.stored(), load_native(_SOURCE)
    if (
        stored is None
        or library is None
        or not all(t.is_contiguous() for t in (*stored.codes, *(stored.scales or ())))
    ):
        return None
    library.sl2o_table.restype = ctypes.c_void_p
    table = _tables.get(basis)
    if table is None or table.pointers != _pointers_of(stored):  # a tensor that was moved in place has another address
        table = _tables[basis] = _Table(library, basis, stored)
    return library, table


def _pointers(tensors: Sequence[torch.Tensor | None]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def _fp32(tensors: Sequence[torch.Tensor | None]) -> bool:
    return all(
        t is None or (t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous()) for t in tensors
    )


def project(basis: Any, gradients: Sequence[torch.Tensor | None], begin: int = 0) -> torch.Tensor | None:
    """Returns the sum of U_p^T g over the parameters from number `begin` on, without units, (d,); None: not done.

    Sums of 4,096 columns are formed in fp32, those of them in fp64.
    """
    if any(g is not None and g.device.type != "cpu" for g in gradients) or (ready := _ready(basis)) is None:
        return None
    library, table = ready
    flat: list[torch.Tensor | None] = [
        None
        if g is None
        else g.detach().contiguous()
        if g.dtype == torch.bfloat16
        else g.detach().float().contiguous()
        for g in gradients
    ]
    halves = (ctypes.c_int32 * len(flat))(*(int(g is not None and g.dtype == torch.bfloat16) for g in flat))
    out = torch.zeros(basis.dim, dtype=torch.float64)
    address = ctypes.c_void_p(out.data_ptr())
    numbers = ctypes.c_int64(begin), ctypes.c_int64(begin + len(flat))
    library.sl2o_project(table.address, table.storage, *numbers, _pointers(flat), halves, table.threads, address)
    return out.float()


def add(basis: Any, weights: Sequence[torch.Tensor | None], coefficients: torch.Tensor) -> bool:
    """Adds U_p c to each of the weights in place, for c of shape `(d,)` without units; returns whether it did."""
    if not _fp32(weights) or (ready := _ready(basis)) is None:
        return False
    library, table = ready
    c = coefficients.detach().to(torch.float32).contiguous()
    library.sl2o_add(
        table.address, table.storage, _pointers(weights), ctypes.c_void_p(c.data_ptr()), table.threads
    )  # fmt: skip
    return True


def publish(
    basis: Any,
    weights: Sequence[torch.Tensor | None],
    before: Sequence[torch.Tensor | None],
    ways: Sequence[torch.Tensor | None],
    rows: torch.Tensor,
    moved: bool,
) -> bool:
    """In one pass: weights += U_p (rows[0] - rows[1]), ways = U_p rows[1]; returns whether it did.

    Args:
        weights, ways: fp32, one a parameter; None: it stays as it is.
        before: What the weights become where not `moved`; None for a parameter: they move.
        rows (`torch.Tensor` of shape `(2, d)`): Without units.
        moved (`bool`): Whether the weights move.
    """
    if not (_fp32(weights) and _fp32(before) and _fp32(ways)) or (ready := _ready(basis)) is None:
        return False
    library, table = ready
    c = rows.detach().to(torch.float32).contiguous()
    library.sl2o_publish(
        table.address, table.storage, _pointers(weights), _pointers(before), _pointers(ways),
        ctypes.c_void_p(c.data_ptr()), ctypes.c_int64(basis.dim), ctypes.c_int(moved), table.threads,
    )  # fmt: skip
    return True
