"""A basis of stored directions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..foundation.checked import FLOATS, check_integer
from ..foundation.hub import take
from .basis import Basis, check_start
from .compiled import Stored
from .host import apart, in_host_memory, pieces, widths
from .layout import Layout
from .stored import check_directions, check_names, stored_layout, stored_spans

# Columns handled at a time where they are converted or generated: the fp32 copy stays in the cache.
_CONVERTED_COLUMNS = {"cpu": 1 << 14, "cuda": 1 << 17}


class DenseBasis(Basis):
    """Stored directions, one matrix a parameter.

    Args:
        layout ([`Layout`]): Which parameters, in which order.
        matrices (`Sequence[torch.Tensor]`): U_p^T of shape `(d_p, numel)` for each parameter; fp32, bf16, or fp64.
        units (`torch.Tensor` of shape `(d,)`, *optional*, defaults to ones): Length of one unit of each coefficient.
        natural_units (`torch.Tensor` of shape `(d,)`, *optional*, defaults to `units`): The trajectory's standard
            deviations.
        spans (`Sequence[tuple[int, int]]`, *optional*, defaults to `(0, d)` for each parameter): Coefficients of each
            parameter.
        provenance (`dict`, *optional*): How it was made.
        start (`torch.Tensor` of shape `(2, k, 16)`, *optional*): See [`Basis`].

    Raises:
        `ValueError`: shapes do not match the layout, or directions are not all of one float dtype.

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o import DenseBasis, Layout
    >>> layout = Layout.from_named_parameters(torch.nn.Linear(3, 2).named_parameters())
    >>> basis = DenseBasis(layout, [torch.eye(8)[:2, :6], torch.eye(8)[:2, 6:]])
    >>> basis.project([torch.ones(2, 3), torch.ones(2)])
    tensor([1., 1.])
    ```
    """

    kind = "dense"
    may_stay_on_host = True

    def __init__(
        self,
        layout: Layout,
        matrices: Sequence[torch.Tensor],
        units: torch.Tensor | None = None,
        natural_units: torch.Tensor | None = None,
        spans: Sequence[tuple[int, int]] | None = None,
        provenance: dict[str, Any] | None = None,
        *,
        start: torch.Tensor | None = None,
    ) -> None:
        if len(matrices) != len(layout.names):
            raise ValueError(f"got {len(matrices)} matrices for {len(layout.names)} parameters; one each is needed")
        for name, matrix in zip(layout.names, matrices, strict=True):
            if matrix.dtype not in FLOATS or matrix.dtype != matrices[0].dtype or matrix.ndim != 2:
                raise ValueError(
                    f"the directions of {name!r} have shape {tuple(matrix.shape)} and dtype {matrix.dtype}, those of "
                    f"{layout.names[0]!r} {matrices[0].dtype}; expected matrices of one dtype among {FLOATS}"
                )
        compute = torch.promote_types(torch.float32, matrices[0].dtype)
        if units is None:
            dim = matrices[0].shape[0] if spans is None else max(stop for _, stop in spans)
            units = torch.ones(dim, dtype=compute, device=matrices[0].device)
        spans = [(0, units.numel())] * len(matrices) if spans is None else spans
        natural_units = units if natural_units is None else natural_units
        super().__init__(layout, spans, units, natural_units, provenance)
        self.units, self.natural_units = units.to(compute), natural_units.to(compute)
        self._matrices = list(matrices)
        for name, numel, (first, last), matrix in zip(layout.names, layout.numels, self.spans, matrices, strict=True):
            if tuple(matrix.shape) != (last - first, numel):
                raise ValueError(
                    f"the directions of {name!r} have shape {tuple(matrix.shape)}, expected {(last - first, numel)}"
                )
        self.start = check_start(start, layout)

    @property
    def dtype(self) -> torch.dtype:
        return self._matrices[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrix in self._matrices)

    @property
    def fingerprint(self) -> str:
        known = super().fingerprint
        if bool((self.natural_units != self.natural_units[0]).any()):
            return known
        # No trajectory's units tell it from another one: its first directions do, as bf16 holds them, so that storage
        # in another dtype is the same basis.
        parts = [matrix[:, :16].bfloat16().cpu().contiguous().view(torch.int16) for matrix in self._matrices]
        digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:16]
        return f"{known}-{digest}"

    def stored(self) -> Stored | None:
        names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
        if self.dtype not in names or apart(self._matrices[0], self.device):
            return None
        return Stored(names[self.dtype], self._matrices)

    def _columns(self, index: int, width: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        matrix, compute = self._matrices[index], self.compute_dtype
        if apart(matrix, self.device):
            yield from self._copied_columns(matrix, width)
            return
        if matrix.dtype != compute:
            width = _CONVERTED_COLUMNS.get(matrix.device.type, width)
        for start in range(0, matrix.shape[1], width):
            stop = min(start + width, matrix.shape[1])
            yield start, stop, matrix[:, start:stop].to(compute)

    def _copied_columns(self, matrix: torch.Tensor, width: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        """As `_columns`, of a matrix on the host."""
        (rows, numel), compute = matrix.shape, self.compute_dtype
        piece, converted = widths(rows, matrix.itemsize, compute.itemsize)
        for first, last, parts in pieces(numel, min(width, piece), lambda a, b: (matrix[:, a:b],), self.device):
            step = last - first if matrix.dtype == compute else converted
            for start in range(first, last, step):
                stop = min(start + step, last)
                yield start, stop, parts[0][:, start - first : stop - first].to(compute)
            del parts  # before the next piece is begun

    def _like(self, matrices: Sequence[torch.Tensor], units: torch.Tensor, natural: torch.Tensor) -> DenseBasis:
        made = DenseBasis(self.layout, matrices, units, natural, self.spans, self.provenance, start=self.start)
        made.stays_on_host = self.stays_on_host
        return made

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> DenseBasis:
        compute = self.compute_dtype if dtype is None else torch.promote_types(torch.float32, dtype)
        there = None if self.stays_on_host else device
        matrices = [matrix.to(device=there, dtype=dtype) for matrix in self._matrices]
        if self.stays_on_host and matrices[0].dtype != self.dtype:
            matrices = in_host_memory(matrices)
        units, natural = (u.to(device=device, dtype=compute) for u in (self.units, self.natural_units))
        return self._like(matrices, units, natural)

    def _in_host_memory(self) -> DenseBasis:
        return self._like(in_host_memory(self._matrices), self.units, self.natural_units)

    def with_units(self, units: str) -> DenseBasis:
        return self._like(self._matrices, self._units_named(units), self.natural_units)

    def to_files(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        tensors = {f"basis.{name}": matrix for name, matrix in zip(self.layout.names, self._matrices, strict=True)}
        tensors |= {"units": self.units.clone(), "natural_units": self.natural_units}
        return self._config(), tensors if self.start is None else {**tensors, "start": self.start}

    @classmethod
    def _load(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor], where: str) -> DenseBasis:
        take(config, {"basis", "dim", "dtype", "layout", "spans", "provenance"}, where)
        layout = stored_layout(config["layout"], f"config.json in {where}")
        check_integer(f"dim in config.json in {where}", config["dim"], 1)
        spans = stored_spans(config["spans"], config["dim"], where)
        expected = {f"basis.{name}" for name in layout.names} | {"units", "natural_units"}
        check_names(tensors, expected, {"start"}, where)
        for name, tensor in tensors.items():
            check_directions(tensor, f"{name!r} in {where}")
        if tensors["units"].numel() != config["dim"]:
            raise ValueError(f"{where}: config.json says dim {config['dim']}, the file has {tensors['units'].numel()}")
        matrices = [tensors[f"basis.{name}"] for name in layout.names]
        units, natural, start = tensors["units"], tensors["natural_units"], tensors.get("start")
        return cls(layout, matrices, units, natural, spans, config["provenance"], start=start)
