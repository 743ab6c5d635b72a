"""A basis of a subspace of the weights: two operations, `project` (n to d) and `lift` (d to n).

n parameters covered, d coefficients. U, of shape (n, d), has orthonormal columns; it is kept per parameter as U^T, of
shape (d_p, numel), where d_p is smaller than d if the basis has one block a layer. `units` (d,) say how long one unit
of a coefficient is: theta = theta_0 + U (units * c), and the projected gradient is units * (U^T grad).
"""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from ..hub import HubFiles, take
from .layout import Layout

# Columns handled at a time where they are converted or generated: the fp32 copy stays in the cache.
_CONVERTED_COLUMNS = {"cpu": 1 << 14, "cuda": 1 << 17}
# Columns at a time otherwise: what a bf16 weight costs as an fp32 temporary.
_COLUMNS = 1 << 22

B = TypeVar("B", bound="Basis")


class Basis(HubFiles):
    """A subspace of a model's weights behind two methods, `project` and `lift`.

    Use [`DenseBasis`] for stored directions (from [`fit_basis`]) and [`RandomBasis`] for seeded ones. Objects are
    immutable: `to` and `with_units` return new ones that share storage.

    Args:
        layout ([`Layout`]): Which parameters, in which order.
        spans (`Sequence[tuple[int, int]]`): For each parameter the range of coefficients that move it; `(0, d)`
            everywhere for a global basis.
        units (`torch.Tensor` of shape `(d,)`): Length of one unit of each coefficient, in weight units.
        natural_units (`torch.Tensor` of shape `(d,)`): What `with_units("std")` restores.
        provenance (`dict`, *optional*): JSON values that say how the basis was made; saved with it.
    """

    kind: str
    _kinds: dict[str, type[Basis]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        Basis._kinds[cls.kind] = cls

    def __init__(
        self,
        layout: Layout,
        spans: Sequence[tuple[int, int]],
        units: torch.Tensor,
        natural_units: torch.Tensor,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        self.layout = layout
        self.spans = tuple((int(start), int(stop)) for start, stop in spans)
        self.units = units
        self.natural_units = natural_units
        self.provenance = dict(provenance or {})
        if units.ndim != 1 or natural_units.shape != units.shape:
            raise ValueError(f"units must have shape (d,), got {tuple(units.shape)} and {tuple(natural_units.shape)}")
        if not bool(torch.isfinite(units).all() and (units > 0).all()):
            raise ValueError("units must be finite and positive; a direction without variance has no unit of its own")
        if len(self.spans) != len(layout.names) or any(not 0 <= a < b <= self.dim for a, b in self.spans):
            raise ValueError("spans must give each parameter a range of coefficients within (0, d)")

    @property
    def dim(self) -> int:
        """d, the number of coefficients."""
        return self.units.numel()

    @property
    def tensor_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the tensors that the coefficients are: one of (d,); of an identity basis the parameters' own."""
        return [(self.dim,)]

    @property
    def tensor_sizes(self) -> list[int]:
        """Their sizes."""
        return [math.prod(shape) for shape in self.tensor_shapes]

    @property
    def device(self) -> torch.device:
        return self.units.device

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Storage dtype of the directions; arithmetic is fp32 (fp64 for a float64 basis)."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the stored directions."""

    @property
    def fingerprint(self) -> str:
        """Identifies layout, size and coordinates (by the trajectory's units); optimizer states carry it."""
        numbers = torch.stack([self.units, self.natural_units]).double().cpu()
        digest = hashlib.sha256(numbers.numpy().tobytes()).hexdigest()[:16]
        return f"{self.kind}-{self.dim}-{self.layout.fingerprint}-{digest}"

    @abstractmethod
    def _columns(self, index: int, width: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yields `(start, stop, U_p^T[:, start:stop])` of parameter `index` in the arithmetic dtype."""

    @abstractmethod
    def to(self: B, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> B:
        """Returns the basis on another device or in another storage dtype."""

    @abstractmethod
    def with_units(self: B, units: str) -> B:
        """Returns the same subspace in other coordinates.

        Args:
            units (`str`): `"std"`: c is measured in standard deviations of the trajectory along each direction;
                `"orthonormal"`: one unit is length 1 in weight space, the paper's coordinates.
        """

    def _units_named(self, units: str) -> torch.Tensor:
        if units == "std":
            return self.natural_units
        if units == "orthonormal":
            return torch.ones_like(self.natural_units)
        raise ValueError(f'units is {units!r}, expected "std" or "orthonormal"')

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.promote_types(torch.float32, self.dtype)

    @torch.no_grad()
    def project(self, tensors: Iterable[torch.Tensor | None]) -> torch.Tensor:
        """Returns units * (U^T g) for gradients g given per parameter; None counts as zero.

        Args:
            tensors (`Iterable[torch.Tensor | None]`): One a parameter, in the order of the layout, any float dtype.

        Returns:
            `torch.Tensor` of shape `(d,)`, fp32 (fp64 for a float64 basis), on the basis' device.
        """
        raw = torch.zeros(self.dim, dtype=self.compute_dtype, device=self.device)
        for index, (tensor, (first, last)) in enumerate(zip(tensors, self.spans, strict=True)):
            if tensor is not None:
                flat = tensor.reshape(-1)
                for start, stop, columns in self._columns(index, _COLUMNS):
                    raw[first:last].addmv_(columns, flat[start:stop].to(columns.dtype))
        return raw * self.units

    @torch.no_grad()
    def add_(self, tensors: Iterable[torch.Tensor], coefficients: torch.Tensor) -> None:
        """Adds `lift(coefficients)` to `tensors` in place, without a temporary of their size for fp32 weights."""
        self._write(tensors, None, coefficients)

    @torch.no_grad()
    def assign_(
        self, tensors: Iterable[torch.Tensor], anchors: Iterable[torch.Tensor], coefficients: torch.Tensor
    ) -> None:
        """Sets `tensors` to `anchors + lift(coefficients)`, rounded once: for weights below fp32."""
        self._write(tensors, anchors, coefficients)

    def _write(
        self, tensors: Iterable[torch.Tensor], anchors: Iterable[torch.Tensor] | None, coefficients: torch.Tensor
    ) -> None:
        c = coefficients.to(self.compute_dtype) * self.units  # (d,)
        tensors = list(tensors)
        bases = tensors if anchors is None else list(anchors)
        for index, (tensor, base, (first, last)) in enumerate(zip(tensors, bases, self.spans, strict=True)):
            # reshape copies where the memory is not contiguous (channels_last); that copy is written back below
            flat, flat_base = tensor.detach().reshape(-1), base.detach().reshape(-1)
            for start, stop, columns in self._columns(index, _COLUMNS):
                part = flat[start:stop]
                if anchors is None and part.dtype == columns.dtype:
                    part.addmv_(columns.T, c[first:last])
                else:
                    part.copy_(torch.addmv(flat_base[start:stop].to(columns.dtype), columns.T, c[first:last]))
            if flat.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(flat.view(tensor.shape))

    def lift(self, coefficients: torch.Tensor) -> list[torch.Tensor]:
        """Returns U (units * c) per parameter, shapes as in the layout; makes n numbers, `add_` does not."""
        tensors = [torch.zeros(shape, dtype=self.compute_dtype, device=self.device) for shape in self.layout.shapes]
        self.add_(tensors, coefficients)
        return tensors

    def matrix(self, index: int) -> torch.Tensor:
        """Returns U_p^T of shape `(d_p, numel)` of parameter `index`: orthonormal directions, without units."""
        parts = [columns for _, _, columns in self._columns(index, _COLUMNS)]
        return torch.cat(parts, dim=1)

    def as_matrix(self) -> torch.Tensor:
        """Returns U^T, without units, as one matrix of shape `(d, n)`: for small cases and tests."""
        full = torch.zeros(self.dim, self.layout.n, dtype=self.compute_dtype, device=self.device)
        offset = 0
        for index, ((first, last), numel) in enumerate(zip(self.spans, self.layout.numels, strict=True)):
            full[first:last, offset : offset + numel] = self.matrix(index)
            offset += numel
        return full

    def __deepcopy__(self: B, memo: dict[int, Any]) -> B:
        return self  # immutable, and possibly many gigabytes

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(dim={self.dim}, n={self.layout.n}, dtype={self.dtype}, MB={self.nbytes / 1e6:.1f})"
        )

    # Files

    def _config(self) -> dict[str, Any]:
        return {
            "basis": self.kind,
            "dim": self.dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "layout": self.layout.to_dict(),
            "spans": [list(span) for span in self.spans],
            "provenance": self.provenance,
        }

    @classmethod
    def from_files(cls: type[B], config: dict[str, Any], tensors: dict[str, torch.Tensor], where: str) -> B:
        kind, kinds = config.get("basis"), Basis._kinds
        if kind not in kinds:
            raise ValueError(
                f'config.json in {where} has "basis": {kind!r}, expected one of {sorted(kinds)}; is it a basis?'
            )
        if not issubclass(kinds[kind], cls):
            raise ValueError(f"{where} holds a {kind} basis, not a {cls.__name__}; load it with Basis.from_pretrained")
        try:
            return kinds[kind]._load(config, tensors, where)  # type: ignore[return-value]
        except (KeyError, TypeError) as error:
            raise ValueError(f"config.json in {where} is malformed ({error!r}); restore it from its source") from error

    @classmethod
    @abstractmethod
    def _load(cls: type[B], config: dict[str, Any], tensors: dict[str, torch.Tensor], where: str) -> B: ...

    def card(self) -> dict[str, str]:
        made = "\n".join(f"- {key}: {value}" for key, value in self.provenance.items())
        return {
            "title": f"A {self.dim}-dimensional subspace",
            "summary": f"{self.dim} directions ({self.kind}, {self.dtype}) in the space of {self.layout.n:,} "
            f"parameters (first {self.layout.names[0]}). It fits the model it was made for and no other.",
            "usage": 'from hf_sl2o import Basis\n\nbasis = Basis.from_pretrained("user/name")',
            "details": f"\nHow it was made:\n\n{made}\n" if made else "",
        }


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

    Raises:
        `ValueError`: shapes do not match the layout.

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

    def __init__(
        self,
        layout: Layout,
        matrices: Sequence[torch.Tensor],
        units: torch.Tensor | None = None,
        natural_units: torch.Tensor | None = None,
        spans: Sequence[tuple[int, int]] | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        if len(matrices) != len(layout.names):
            raise ValueError(f"got {len(matrices)} matrices for {len(layout.names)} parameters; one each is needed")
        if units is None:
            dim = matrices[0].shape[0] if spans is None else max(stop for _, stop in spans)
            compute = torch.promote_types(torch.float32, matrices[0].dtype)
            units = torch.ones(dim, dtype=compute, device=matrices[0].device)
        spans = [(0, units.numel())] * len(matrices) if spans is None else spans
        super().__init__(layout, spans, units, units if natural_units is None else natural_units, provenance)
        self._matrices = list(matrices)
        for name, numel, (first, last), matrix in zip(layout.names, layout.numels, self.spans, matrices, strict=True):
            if tuple(matrix.shape) != (last - first, numel):
                raise ValueError(
                    f"the directions of {name!r} have shape {tuple(matrix.shape)}, expected {(last - first, numel)}"
                )

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

    def _columns(self, index: int, width: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        matrix, compute = self._matrices[index], self.compute_dtype
        if matrix.dtype != compute:
            width = _CONVERTED_COLUMNS.get(matrix.device.type, width)
        for start in range(0, matrix.shape[1], width):
            stop = min(start + width, matrix.shape[1])
            yield start, stop, matrix[:, start:stop].to(compute)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> DenseBasis:
        compute = self.compute_dtype if dtype is None else torch.promote_types(torch.float32, dtype)
        return DenseBasis(
            self.layout,
            [matrix.to(device=device, dtype=dtype) for matrix in self._matrices],
            self.units.to(device=device, dtype=compute),
            self.natural_units.to(device=device, dtype=compute),
            self.spans,
            self.provenance,
        )

    def with_units(self, units: str) -> DenseBasis:
        wanted = self._units_named(units)
        return DenseBasis(self.layout, self._matrices, wanted, self.natural_units, self.spans, self.provenance)

    def to_files(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        tensors = {f"basis.{name}": matrix for name, matrix in zip(self.layout.names, self._matrices, strict=True)}
        return self._config(), {**tensors, "units": self.units.clone(), "natural_units": self.natural_units}

    @classmethod
    def _load(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor], where: str) -> DenseBasis:
        take(config, {"basis", "dim", "dtype", "layout", "spans", "provenance"}, where)
        layout = Layout.from_dict(config["layout"])
        expected = {f"basis.{name}" for name in layout.names} | {"units", "natural_units"}
        if set(tensors) != expected:
            different = sorted(set(tensors) ^ expected)[0]
            state = "lacks" if different in expected else "has an unknown"
            raise ValueError(f"model.safetensors in {where} {state} tensor {different!r}; restore it from its source")
        matrices = [tensors[f"basis.{name}"] for name in layout.names]
        for name, tensor in tensors.items():
            if not all(bool(torch.linalg.vector_norm(row.float()).isfinite()) for row in torch.atleast_2d(tensor)):
                raise ValueError(f"{name!r} in {where} holds NaN or Inf; restore it from its source")
        if tensors["units"].numel() != config["dim"]:
            raise ValueError(f"{where}: config.json says dim {config['dim']}, the file has {tensors['units'].numel()}")
        return cls(layout, matrices, tensors["units"], tensors["natural_units"], config["spans"], config["provenance"])
