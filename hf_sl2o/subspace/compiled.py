"""Products with stored directions by compiled loops: all parameters in one call, U read once.

On a CPU the loops are those of `columns.cpp`: torch multiplies fp32 matrices and vectors in one thread, and has
nothing fast for bf16, int8 or int4 ones. On CUDA they are the Triton kernels of `triton_columns`: one launch each way
instead of one a parameter. Each function says whether it did the work; where it did not (no compiler, another device
or dtype), the caller's own torch code does.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..foundation.native import load_native

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("columns.cpp")
STORAGES = ("fp32", "bf16", "int8", "int4")  # in the order that the loops count them
#: Columns of `column_sums`: no matrix has rows of a multiple of them.
SUMS = 61
_CHUNK = 4096  # columns that the loops on a CPU have at a time
# Bytes of directions from which a second thread is worth its start, some 20 microseconds.
_THREADED = 1 << 20


class Stored(NamedTuple):
    """Directions as they are in memory.

    Args:
        storage (`str`): One of `STORAGES`.
        codes (`Sequence[torch.Tensor]`): For each parameter fp32, bf16 or int8 of shape `(d_p, numel)`, or uint8 of
            shape `(d_p, ceil(numel / 2))`.
        scales (`Sequence[torch.Tensor]`, *optional*): Of int8 and int4: fp32 of shape `(d_p, ceil(numel / 128))`.
        wides (`Sequence[torch.Tensor | None]`, *optional*): For each parameter that has thin factors beside the
            directions, fp32 of shape `(r, q)` as [`in_order`] makes them.
    """

    storage: str
    codes: Sequence[torch.Tensor]
    scales: Sequence[torch.Tensor] | None = None
    wides: Sequence[torch.Tensor | None] | None = None

    @property
    def pointers(self) -> list[int]:
        return [tensor.data_ptr() for tensor in (*self.codes, *(self.scales or ()))]


Tensors = Sequence[torch.Tensor | None]


def may_work(basis: Any) -> bool:
    """Whether there may be loops; `torch.compile` makes its own, and a captured graph has fixed addresses."""
    if torch.compiler.is_compiling() or basis.stored() is None:
        return False
    if basis.device.type == "cuda":
        return not torch.cuda.is_current_stream_capturing() and _triton() is not None
    return bool(basis.device.type == "cpu")


def project(basis: Any, gradients: Tensors, begin: int = 0) -> torch.Tensor | None:
    """Returns the sum of U_p^T g without units, fp32 of shape `(d,)`; None: not done.

    Sums of 4,096 columns (8,192 on CUDA) are formed in fp32, those of them in fp64.

    Args:
        gradients: Of all parameters, or of number `begin` alone; None counts as zero.
    """
    loops = _loops(basis, gradients)
    if loops is None:
        return None
    halves = all(g is None or g.dtype == torch.bfloat16 for g in gradients)
    dtype = torch.bfloat16 if halves else torch.float32
    flat = [None if g is None else g.detach().to(dtype).contiguous() for g in gradients]
    return loops.project(basis, flat, begin, halves)


def add(basis: Any, weights: Tensors, coefficients: torch.Tensor) -> bool:
    """Adds U_p c to each of the weights in place, for c of shape `(d,)` without units; returns whether it did."""
    loops = _loops(basis, weights) if _fp32(weights) else None
    if loops is not None:
        loops.add(weights, coefficients.detach().float().contiguous())
    return loops is not None


def publish(
    basis: Any, weights: Tensors, before: Tensors, ways: Tensors, rows: torch.Tensor, moved: torch.Tensor
) -> bool:
    """In one pass: weights += U_p (rows[0] - rows[1]), ways = U_p rows[1]; returns whether it did.

    Args:
        weights, ways: fp32, one a parameter; None: it stays as it is.
        before: What the weights become where not `moved`; None for a parameter: they move.
        rows (`torch.Tensor` of shape `(2, d)`): Without units.
        moved (0-d bool `torch.Tensor`): Whether the weights move.
    """
    loops = _loops(basis, weights) if all(map(_fp32, (weights, before, ways))) else None
    if loops is not None:
        loops.publish(weights, before, ways, rows.detach().float().contiguous(), moved)
    return loops is not None


def column_sums(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Sums of the columns of each tensor in rows of `SUMS`, fp64 of shape `(k, SUMS)` of k tensors; None: not done.

    Sixteen numbers are summed in fp32, those of them in fp64 and in order: the same for any number of threads.

    Args:
        tensors: fp32 on a CPU, flat.
    """
    library = OnCPU.library() if tensors and fp32_on_cpu(tensors) and not torch.compiler.is_compiling() else None
    if library is None:
        return None
    out = torch.zeros(len(tensors), SUMS, dtype=torch.float64)
    numels = (ctypes.c_int64 * len(tensors))(*(t.numel() for t in tensors))
    threads = torch.get_num_threads() if sum(numels) * 4 >= _THREADED else 1
    library.sl2o_sums(ctypes.c_int64(len(tensors)), numels, _addresses(tensors), ctypes.c_int(threads), _address(out))
    return out


def _fp32(tensors: Tensors) -> bool:
    return all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in tensors)


def fp32_on_cpu(tensors: Tensors) -> bool:
    """Whether the loops on a CPU can write to them."""
    return _fp32(tensors) and all(t is None or t.device.type == "cpu" for t in tensors)


def _loops(basis: Any, tensors: Tensors) -> OnCPU | _OnCUDA | None:
    """Loops for a basis and tensors where it is; made once, and anew where a tensor was moved in place."""
    stored, device = basis.stored(), basis.device
    if stored is None or any(t is not None and t.device != device for t in tensors):
        return None
    if not all(t.is_contiguous() for t in (*stored.codes, *(stored.scales or ()))):
        return None
    pointers = stored.pointers
    known = _made.get(basis)
    if known is None or known.pointers != pointers:
        kind: Any = {"cpu": OnCPU, "cuda": _OnCUDA}.get(device.type)
        if kind is None or kind.library() is None:
            return None
        known = _made[basis] = kind(basis, stored, pointers)
    return known if known.works else None


class OnCPU:
    """A table for columns.cpp: where the directions of each parameter are."""

    works = True

    @staticmethod
    def library() -> Any:
        library: Any = load_native(_SOURCE)
        if library is not None:
            library.sl2o_table.restype = ctypes.c_void_p
        return library

    def __init__(self, basis: Any, stored: Stored, pointers: list[int]) -> None:
        self.pointers, self.calls = pointers, self.library()
        count = len(stored.codes)
        integers, addresses = ctypes.c_int64 * count, ctypes.c_void_p * count
        rows = integers(*(last - first for first, last in basis.spans))
        firsts = integers(*(first for first, _ in basis.spans))
        codes, scales = addresses(*pointers[:count]), addresses(*(pointers[count:] or [0] * count))
        self.wides = [None] * count if stored.wides is None else list(stored.wides)
        sizes = [(0, 1) if wide is None else wide.shape for wide in self.wides]
        factors = _addresses(self.wides), *(integers(*of) for of in zip(*sizes, strict=True))
        numels = integers(*basis.layout.numels)
        self.table = ctypes.c_void_p(
            self.calls.sl2o_table(ctypes.c_int64(count), numels, rows, firsts, codes, scales, *factors)
        )
        weakref.finalize(self, self.calls.sl2o_forget, self.table)
        self.storage = ctypes.c_int(STORAGES.index(stored.storage))
        self.bytes = sum(tensor.nbytes for tensor in stored.codes)

    @property
    def threads(self) -> ctypes.c_int:
        return ctypes.c_int(torch.get_num_threads() if self.bytes >= _THREADED else 1)

    def project(
        self, basis: Any, gradients: Tensors, begin: int, halves: bool, thin: Tensors | None = None
    ) -> torch.Tensor:
        """`thin`: for each factored parameter where G WIDE^T goes, (m, slices, r) fp32."""
        out = torch.zeros(basis.dim, dtype=torch.float64)
        numbers = ctypes.c_int64(begin), ctypes.c_int64(begin + len(gradients))
        self.calls.sl2o_project(
            self.table, self.storage, *numbers, _addresses(gradients), int(halves), self.threads, _address(out),
            _addresses([None] * len(gradients) if thin is None else thin),
        )  # fmt: skip
        return out.float()

    def add(self, weights: Tensors, coefficients: torch.Tensor, tall: Tensors | None = None) -> None:
        """`tall`: (m, r) of each factored parameter, whose product with WIDE is added, too."""
        tall = _addresses([None] * len(weights) if tall is None else tall)
        self.calls.sl2o_add(self.table, self.storage, _addresses(weights), _address(coefficients), tall, self.threads)

    def publish(
        self, weights: Tensors, before: Tensors, ways: Tensors, rows: torch.Tensor, moved: torch.Tensor,
        tall: Tensors | None = None,
    ) -> None:  # fmt: skip
        """`tall`: (2, m, r) of each factored parameter."""
        tensors = map(_addresses, (weights, before, ways))
        tall = _addresses([None] * len(weights) if tall is None else tall)
        dim, moves = ctypes.c_int64(rows.shape[1]), ctypes.c_int(bool(moved))
        self.calls.sl2o_publish(self.table, self.storage, *tensors, _address(rows), dim, tall, moves, self.threads)


def in_order(wide: torch.Tensor, storage: str) -> torch.Tensor:
    """A matrix (r, q), q a multiple of 32, with columns in the order in which the loops have those of a storage."""
    if storage in ("bf16", "int4"):  # of each 32 the even ones come first
        wide = wide.unflatten(1, (-1, 16, 2)).transpose(2, 3).flatten(1)
    return wide.contiguous()


def beside_factors(owner: Any, basis: Any, wides: Callable[[], Tensors]) -> OnCPU | None:
    """Loops over stored directions and thin factors beside them, on a CPU; None where there are none.

    They are made once, and anew where a tensor of the directions was moved in place.

    Args:
        owner: The basis that has both; what is made is kept beside it, not in it, so that it can be pickled.
        basis: With directions on a CPU that a loop can read.
        wides: Returns for each parameter (r, q) fp32, q a multiple of 128; or None.
    """
    stored = basis.stored()
    if stored is None or basis.device.type != "cpu" or OnCPU.library() is None:
        return None
    if not all(t.is_contiguous() for t in (*stored.codes, *(stored.scales or ()))):
        return None
    known, pointers = _made.get(owner), stored.pointers
    if not isinstance(known, OnCPU) or known.pointers != pointers:
        ordered = [None if wide is None else in_order(wide, stored.storage) for wide in wides()]
        known = _made[owner] = OnCPU(basis, stored._replace(wides=ordered), pointers)
    return known


def project_beside(loops: OnCPU, basis: Any, gradients: Tensors) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Returns the products with the stored directions, (d,), and G WIDE^T, (m, r), of each factored parameter."""
    halves = all(g is None or g.dtype == torch.bfloat16 for g in gradients)
    dtype = torch.bfloat16 if halves else torch.float32
    flat = [None if g is None else g.detach().to(dtype).contiguous() for g in gradients]
    thin: list[torch.Tensor | None] = []
    for g, wide in zip(flat, loops.wides, strict=True):
        if g is None or wide is None:
            thin.append(None)
        else:
            r, q = wide.shape
            thin.append(torch.empty(g.numel() // q, -(-q // _CHUNK), r))
    raw = loops.project(basis, flat, 0, halves, thin)
    return raw, [None if of is None else of.sum(1) for of in thin]


def _address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _addresses(tensors: Tensors) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


@functools.cache
def _triton() -> Any:
    """The kernels; None without Triton, which comes with torch for CUDA on Linux."""
    try:
        from . import triton_columns
    except ImportError:
        return None
    return triton_columns


class _OnCUDA:
    """The Triton kernels with a table on the device."""

    library = staticmethod(_triton)

    def __init__(self, basis: Any, stored: Stored, pointers: list[int]) -> None:
        self.pointers, self.kernels = pointers, _triton()
        self.table = self.kernels.Table(basis, stored, STORAGES.index(stored.storage))
        try:
            self.works, reason = self._agrees(basis), "they compute something else than torch"
        except Exception as error:  # a compiler, a driver: torch does the work all the same
            self.works, reason = False, f"{type(error).__name__}: {error}"
        if not self.works:
            logger.warning(
                "the Triton kernels of a basis are not used on %s (%s): torch does it", basis.device, reason
            )

    def _agrees(self, basis: Any) -> bool:
        """Whether products with some parameters are those of torch, but for rounding."""
        numels = basis.layout.numels
        order = sorted(range(len(numels)), key=lambda index: numels[index])
        c = torch.linspace(-1, 1, basis.dim, device=basis.device)
        for index in {0, len(numels) - 1, order[0], order[-1]}:
            first, last = basis.spans[index]
            g = torch.sin(torch.arange(numels[index], device=basis.device) * 1.7)
            weights: list[torch.Tensor | None] = [None] * len(numels)
            weights[index] = torch.zeros_like(g)
            self.add(weights, basis.to_products(c).float().contiguous())
            lifted = torch.cat([rows[0] for _, _, rows in basis.lift_rows(index, c[None])])
            pairs: list[tuple[Any, Any]] = [
                (self.project(basis, [g], index, False)[first:last], basis._products(index, g))
            ]
            pairs.append((weights[index], lifted))
            if not all(bool(((a - b).abs() <= 1e-3 * b.abs().max()).all()) for a, b in pairs):
                return False
        return True

    def project(self, basis: Any, gradients: Tensors, begin: int, halves: bool) -> torch.Tensor:
        return self.kernels.project(basis, self.table, gradients, begin, halves)  # type: ignore[no-any-return]

    def add(self, weights: Tensors, coefficients: torch.Tensor) -> None:
        self.kernels.add(self.table, weights, coefficients)

    def publish(
        self, weights: Tensors, before: Tensors, ways: Tensors, rows: torch.Tensor, moved: torch.Tensor
    ) -> None:
        self.kernels.publish(self.table, weights, before, ways, rows, moved)


_made: weakref.WeakKeyDictionary[Any, OnCPU | _OnCUDA] = weakref.WeakKeyDictionary()
