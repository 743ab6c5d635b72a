"""A basis whose directions share factors: of each weight matrix, U_k = A S_k B^T.

A (m, r1) and B (q, r2) have orthonormal columns, S (d', r1, r2) is small; vectors and small matrices are kept whole.
The directions of the largest variance, which no factor of small rank holds, may be kept apart, rounded. A (d, d)
matrix makes all of them orthonormal. To project costs two thin products, G B and A^T (G B), and to lift the reverse.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ..foundation.checked import check_float, check_integer
from ..foundation.hub import take
from . import compiled
from .basis import Basis, check_start
from .layout import Layout
from .quantized import QuantizedBasis, check_codes, check_spans, digest_of, stored_units
from .stored import check_names, stored_layout, stored_spans
from .thin import Factors, check_factors

# Columns handled at a time where a temporary of their size is needed.
_COLUMNS = 1 << 18


class TuckerBasis(Basis):
    """Directions that share factors; [`fit_basis`] with `storage="tucker"` makes one.

    Args:
        layout ([`Layout`]): Which parameters, in which order.
        factors (`Sequence[Factors]`): Of each parameter, for the directions of its span after the leading ones.
        mix (`torch.Tensor` of shape `(d, d)`): fp32; what makes the directions orthonormal.
        units (`torch.Tensor` of shape `(d,)`): Length of one unit of each coefficient.
        natural_units (`torch.Tensor` of shape `(d,)`, *optional*, defaults to `units`): The trajectory's standard
            deviations.
        spans (`Sequence[tuple[int, int]]`, *optional*, defaults to `(0, d)` for each parameter): Coefficients of each
            parameter.
        provenance (`dict`, *optional*): How it was made.
        leading ([`QuantizedBasis`], *optional*): The first directions of each span, with no mix and units of its own.
        start (`torch.Tensor` of shape `(2, k, 16)`, *optional*): See [`Basis`].

    Raises:
        `ValueError`: shapes or dtypes do not fit the layout, or spans overlap in part.

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o import Layout
    >>> from hf_sl2o.subspace.thin import Factors
    >>> from hf_sl2o.subspace.tucker import TuckerBasis
    >>> layout = Layout(("w",), ((3, 2),))
    >>> basis = TuckerBasis(layout, [Factors(torch.ones(1, 1, 2) / 2**0.5, left=torch.eye(3)[:, :1])], torch.eye(1),
    ...     torch.ones(1))
    >>> basis.as_matrix()
    tensor([[0.7071, 0.7071, 0.0000, 0.0000, 0.0000, 0.0000]])
    ```
    """

    kind = "tucker"

    def __init__(
        self,
        layout: Layout,
        factors: Sequence[Factors],
        mix: torch.Tensor,
        units: torch.Tensor,
        natural_units: torch.Tensor | None = None,
        spans: Sequence[tuple[int, int]] | None = None,
        provenance: dict[str, Any] | None = None,
        leading: QuantizedBasis | None = None,
        *,
        start: torch.Tensor | None = None,
    ) -> None:
        if len(factors) != len(layout.names):
            raise ValueError(f"got factors of {len(factors)} parameters for {len(layout.names)}; one each is needed")
        spans = [(0, units.numel())] * len(factors) if spans is None else spans
        super().__init__(layout, spans, units, units if natural_units is None else natural_units, provenance)
        check_spans(self.spans)
        distinct = sorted({*self.spans})
        self.leading, self._whole = leading, 0 if leading is None else leading.dim // len(distinct)
        for name, shape, (first, last), of in zip(layout.names, layout.shapes, self.spans, factors, strict=True):
            check_factors(name, shape, last - first - self._whole, of)
        if mix.shape != (self.dim, self.dim) or mix.dtype != torch.float32:
            raise ValueError(f"mix has shape {tuple(mix.shape)} and {mix.dtype}, expected {(self.dim,) * 2} and fp32")
        if leading is not None:
            numbers = {span: place * self._whole for place, span in enumerate(distinct)}
            expected = tuple((numbers[span], numbers[span] + self._whole) for span in self.spans)
            if leading.layout != layout or leading.spans != expected:
                raise ValueError(f"the leading directions have spans {leading.spans[:3]}, expected {expected[:3]}")
        self._factors, self.mix = list(factors), mix
        # Where the leading directions are among all.
        self._places = torch.tensor(
            [first + place for first, _ in distinct for place in range(self._whole)],
            dtype=torch.int64,
            device=self.device,
        )
        self.units, self.natural_units = self.units.float(), self.natural_units.float()
        self.start = check_start(start, layout)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def nbytes(self) -> int:
        of_leading = 0 if self.leading is None else self.leading.nbytes
        return of_leading + self.mix.nbytes + sum(t.nbytes for of in self._factors for t in of.tensors)

    @property
    def fingerprint(self) -> str:
        tensors = [t for of in self._factors for t in of.tensors]
        rounded = () if self.leading is None else (*self.leading._codes, *self.leading._scales)
        return f"{super().fingerprint}-{digest_of(self.mix, *tensors, *rounded)}"

    # Products

    @property
    def has_loops(self) -> bool:
        return not torch.compiler.is_compiling() and self.device.type == "cpu"

    def from_products(self, raw: torch.Tensor) -> torch.Tensor:
        return (self.mix @ raw) * self.units

    def to_products(self, rows: torch.Tensor) -> torch.Tensor:
        return (rows * self.units.to(rows.dtype)) @ self.mix.to(rows.dtype)

    def _own(self, index: int) -> slice:
        """Coefficients of the factors of a parameter."""
        return slice(self.spans[index][0] + self._whole, self.spans[index][1])

    def _of_both(self) -> compiled.OnCPU | None:
        """Loops over the leading directions and the factors in one pass, where there are any."""
        if self.leading is None or not self.has_loops:
            return None
        return compiled.beside_factors(self, self.leading, lambda: [of.wide for of in self._factors])

    @torch.no_grad()
    def project(self, tensors: Iterable[torch.Tensor | None]) -> torch.Tensor:
        tensors, raw, halves = list(tensors), torch.zeros(self.dim, device=self.device), None
        loops = self._of_both()
        if loops is not None:
            raw[self._places], halves = compiled.project_beside(loops, self.leading, tensors)
        elif self.leading is not None:
            raw[self._places] = self.leading.project(tensors)
        for index, (tensor, factors) in enumerate(zip(tensors, self._factors, strict=True)):
            half = None if halves is None else halves[index]
            if half is not None:
                small = half if factors.left is None else factors.left.T @ half
                raw[self._own(index)] += factors.core.flatten(1) @ small.reshape(-1)
            elif tensor is not None:
                raw[self._own(index)] += factors.project(tensor.reshape(-1))
        return self.from_products(raw)

    def _products(self, index: int, tensor: torch.Tensor) -> torch.Tensor:
        own = self._factors[index].project(tensor.reshape(-1))
        return own if self.leading is None else torch.cat([self.leading.project_part(index, tensor), own])

    @torch.no_grad()
    def add_(self, tensors: Iterable[torch.Tensor], coefficients: torch.Tensor) -> None:
        tensors, done = list(tensors), [False] * len(self._factors)
        loops = self._of_both() if compiled.fp32_on_cpu(tensors) else None
        if loops is not None:
            raw = self.to_products(coefficients.float())
            tall = [self._tall(index, raw[None]) for index in range(len(tensors))]
            loops.add(tensors, raw[self._places].contiguous(), tall)
            done = [of is not None for of in tall]
        for index, (tensor, factors) in enumerate(zip(tensors, self._factors, strict=True)):
            if done[index]:
                continue
            flat = tensor.detach().reshape(-1)  # a copy where the memory is not contiguous, written back below
            wide = torch.promote_types(flat.dtype, torch.float32)
            if flat.dtype == wide and (self.leading is None or wide == torch.float32):
                own = self.to_products(coefficients.to(wide))[self._own(index)]
                factors.add_thin_(flat, factors.thin(own))
            else:
                for start, stop, lifted in self.lift_rows(index, coefficients[None], wide):
                    flat[start:stop] = flat[start:stop].to(wide) + lifted[0]
            if flat.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(flat.view(tensor.shape))
        if self.leading is not None and loops is None:
            narrow = [t if t.dtype == torch.float32 else None for t in tensors]
            self._add_leading(narrow, self.to_products(coefficients.float())[self._places])

    def _tall(self, index: int, rows: torch.Tensor) -> torch.Tensor | None:
        """Of a parameter whose factors the loops take: (rows, m, r) for products `rows`."""
        factors = self._factors[index]
        if factors.wide is None:
            return None
        return torch.stack([factors.tall(row[self._own(index)]) for row in rows])

    def _add_leading(self, tensors: Sequence[torch.Tensor | None], c: torch.Tensor) -> None:
        """Adds the leading directions times c to those tensors that are given."""
        assert self.leading is not None
        if all(t is not None for t in tensors):
            self.leading.add_([t for t in tensors if t is not None], c)
            return
        for index, tensor in enumerate(tensors):
            if tensor is not None:
                flat = tensor.detach().reshape(-1)
                for start, stop, lifted in self.leading.lift_rows(index, c[None]):
                    flat[start:stop] += lifted[0]
                if flat.data_ptr() != tensor.data_ptr():
                    tensor.detach().copy_(flat.view(tensor.shape))

    @torch.no_grad()
    def publish_(
        self,
        weights: Sequence[torch.Tensor | None],
        before: Sequence[torch.Tensor | None],
        ways: Sequence[torch.Tensor | None],
        rows: torch.Tensor,
        moved: torch.Tensor,
    ) -> bool:
        loops = self._of_both() if all(map(compiled.fp32_on_cpu, (weights, before, ways))) else None
        if loops is None:
            return False
        raw, move = self.to_products(rows.float()), bool(moved)
        tall = [None if weight is None else self._tall(index, raw) for index, weight in enumerate(weights)]
        loops.publish(weights, before, ways, raw[:, self._places].contiguous(), moved, tall)
        for index, factors in enumerate(self._factors):
            weight, way, own = weights[index], ways[index], self._own(index)
            if weight is not None and way is not None and tall[index] is None:
                if move or before[index] is None:
                    factors.add_thin_(weight.view(-1), factors.thin(raw[0, own] - raw[1, own]))
                factors.add_thin_(way.view(-1), factors.thin(raw[1, own]))
        return True

    @torch.no_grad()
    def lift_rows(
        self, index: int, rows: torch.Tensor, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        dtype = torch.float32 if dtype is None else dtype
        raw, (first, _) = self.to_products(rows.to(dtype)), self.spans[index]
        thin = [self._factors[index].thin(c) for c in raw[:, self._own(index)]]
        for start, stop in self._parts(index):
            lifted = torch.zeros(len(rows), stop - start, dtype=dtype, device=self.device)
            if self.leading is not None:
                lifted += raw[:, first : first + self._whole] @ self.leading.rounded(index, start, stop).to(dtype)
            for row, pair in zip(lifted, thin, strict=True):
                Factors.add_thin_(row, pair, start)
            yield start, stop, lifted

    def _parts(self, index: int) -> Iterator[tuple[int, int]]:
        """Columns of whole rows of a parameter."""
        m, q = self._factors[index].matrix_shape()
        step = max(1, _COLUMNS // max(q, 1))
        for first in range(0, m, step):
            yield first * q, min(first + step, m) * q

    def _columns(self, index: int, width: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        _, q = self._factors[index].matrix_shape()
        for start, stop in self._parts(index):
            own = self._factors[index].whole(start // q, stop // q)
            if self.leading is not None:
                own = torch.cat([self.leading.rounded(index, start, stop), own])
            yield start, stop, own

    def matrix(self, index: int) -> torch.Tensor:
        first, last = self.spans[index]
        return self.mix[first:last, first:last] @ super().matrix(index)

    # Other forms

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TuckerBasis:
        if dtype not in (None, torch.float32):
            raise ValueError(f"a Tucker basis is stored in float32, got {dtype}; fit a dense one for another dtype")
        factors = [Factors(*(None if t is None else t.to(device) for t in of)) for of in self._factors]  # type: ignore[arg-type]
        leading = None if self.leading is None else self.leading.to(device)
        units, natural = self.units.to(device), self.natural_units.to(device)
        return TuckerBasis(
            self.layout, factors, self.mix.to(device), units, natural, self.spans, self.provenance, leading,
            start=self.start,
        )  # fmt: skip

    def with_units(self, units: str) -> TuckerBasis:
        return TuckerBasis(
            self.layout, self._factors, self.mix, self._units_named(units), self.natural_units, self.spans,
            self.provenance, self.leading, start=self.start,
        )  # fmt: skip

    def to_files(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        tensors = {"mix": self.mix, "units": self.units.clone(), "natural_units": self.natural_units}
        for index, (name, of) in enumerate(zip(self.layout.names, self._factors, strict=True)):
            tensors |= {f"{part}.{name}": t for part, t in zip(Factors._fields, of, strict=True) if t is not None}
            if self.leading is not None:
                tensors |= {f"codes.{name}": self.leading._codes[index], f"scales.{name}": self.leading._scales[index]}
        tensors |= {} if self.start is None else {"start": self.start}
        return {**self._config(), "leading": 0 if self.leading is None else self._whole}, tensors

    @classmethod
    def _load(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor], where: str) -> TuckerBasis:
        take(config, {"basis", "dim", "dtype", "layout", "spans", "provenance", "leading"}, where)
        layout = stored_layout(config["layout"], f"config.json in {where}")
        check_integer(f"dim in config.json in {where}", config["dim"], 1)
        check_integer(f"leading in config.json in {where}", config["leading"], 0, config["dim"] - 1)
        spans = stored_spans(config["spans"], config["dim"], where)
        parts = ("core", "codes", "scales") if config["leading"] else ("core",)
        expected = {f"{part}.{name}" for name in layout.names for part in parts} | {"mix", "units", "natural_units"}
        sides = {f"{side}.{name}" for name in layout.names for side in ("left", "right")}
        check_names(tensors, expected, {"start"} | sides, where)
        units, natural = stored_units(tensors, config["dim"], where)
        for name, tensor in tensors.items():
            if name.partition(".")[0] not in ("codes", "scales"):
                check_float(tensor, f"{name!r} in {where}")
        factors = [
            Factors(tensors[f"core.{name}"], tensors.get(f"left.{name}"), tensors.get(f"right.{name}"))
            for name in layout.names
        ]
        leading = None
        if config["leading"]:
            codes, scales = ([tensors[f"{part}.{name}"] for name in layout.names] for part in ("codes", "scales"))
            check_codes(layout, codes, scales, where)
            leading = leading_basis(layout, codes, scales, spans, config["leading"])
        return cls(
            layout, factors, tensors["mix"], units, natural, spans, config["provenance"], leading,
            start=tensors.get("start"),
        )  # fmt: skip


def leading_basis(
    layout: Layout,
    codes: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    spans: Sequence[tuple[int, int]],
    whole: int,
) -> QuantizedBasis:
    """The first `whole` directions of each span, as a basis that only stores them."""
    places = {span: number * whole for number, span in enumerate(sorted({*spans}))}
    dim = whole * len(places)
    own = [(places[span], places[span] + whole) for span in spans]
    return QuantizedBasis(layout, codes, scales, torch.eye(dim), torch.ones(dim), spans=own)
