"""Seeded random directions: the control that every learned subspace has to beat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..foundation.checked import check_float, check_integer
from ..foundation.hub import take
from .basis import Basis
from .dense import DenseBasis
from .layout import Layout
from .stored import stored_layout, stored_spans

# Columns generated at a time; a part of what defines the directions.
_COLUMNS = 1 << 17
# |U U^T - 1| of directions as they were saved, times the condition of R R^T: what fp32 sums leave.
_ORTHONORMAL = 2e-5


class RandomBasis(Basis):
    """Seeded random orthonormal directions: nothing is stored but the seed and a (d, d) matrix.

    Rows of Gaussian numbers R are made again whenever they are needed, on the CPU, so that every device sees the same
    ones; U^T = L^-1 R with L the Cholesky factor of R R^T makes them orthonormal. That costs time at each step:
    `to_dense()` trades it for d * n numbers.

    Args:
        layout ([`Layout`]): Which parameters, in which order.
        dim (`int`): d.
        seed (`int`, *optional*, defaults to 0): Seed of the directions.

    Raises:
        `ValueError`: `dim` is below 1 or above n.

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o import Layout, RandomBasis
    >>> layout = Layout.from_named_parameters(torch.nn.Linear(30, 20).named_parameters())
    >>> RandomBasis(layout, dim=4, seed=0).project([torch.ones(20, 30), torch.ones(20)]).shape
    torch.Size([4])
    ```
    """

    kind = "random"

    def __init__(self, layout: Layout, dim: int, seed: int = 0, *, mix: torch.Tensor | None = None) -> None:
        check_integer("seed", seed, -(1 << 53))
        if isinstance(dim, bool) or not isinstance(dim, int) or not 1 <= dim <= layout.n:
            raise ValueError(f"dim is {dim}, expected 1 to n = {layout.n}")
        ones = torch.ones(dim, device=None if mix is None else mix.device)
        super().__init__(layout, [(0, dim)] * len(layout.names), ones, ones, {"seed": seed})
        self.seed = seed
        self._mix = self._orthonormaliser() if mix is None else mix  # (d, d), L^-1

    def _raw_columns(self, index: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        numel, width = self.layout.numels[index], _COLUMNS
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + index) & 0x7FFF_FFFF_FFFF_FFFF)
        for start in range(0, numel, width):
            stop = min(start + width, numel)
            yield start, stop, torch.randn(self.dim, stop - start, generator=generator)

    def _gram(self) -> torch.Tensor:
        """R R^T of shape `(d, d)`, fp64."""
        gram = torch.zeros(self.dim, self.dim, dtype=torch.float64)
        for index in range(len(self.layout.names)):
            for _, _, raw in self._raw_columns(index):
                gram += (raw @ raw.T).double()
        return gram

    def _orthonormaliser(self) -> torch.Tensor:
        return torch.linalg.inv(torch.linalg.cholesky(self._gram())).float()

    def _check_mix(self, where: str) -> None:
        """Raises `ValueError` unless the directions of this seed are orthonormal with this mix.

        Makes every direction once, half of what a step with the basis costs.
        """
        mix, remedy = self._mix.double(), "restore both files from one source, or make the basis anew from its seed"
        # |mix|^2 is about d / n: a layout of far more parameters is refused before directions are made for it.
        if self.layout.n > 4 * self.dim / float(mix.square().sum().clamp_min(1e-300)) + 4 * self.dim + 64:
            raise ValueError(f"the mix in {where} belongs to fewer parameters than {self.layout.n}; {remedy}")
        gram = self._gram()
        values = torch.linalg.eigvalsh(gram)
        error = float((mix @ gram @ mix.T - torch.eye(self.dim, dtype=torch.float64)).abs().max())
        if not error <= _ORTHONORMAL * float(values[-1] / values[0].clamp_min(1e-300)):
            raise ValueError(
                f"the mix in {where} does not make the directions of seed {self.seed} orthonormal (off by "
                f"{error:.2g}): seed or layout was changed, or this torch draws other numbers; {remedy}"
            )

    def _columns(self, index: int, width: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        for start, stop, raw in self._raw_columns(index):
            yield start, stop, self._mix @ raw.to(self.device)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def nbytes(self) -> int:
        return self._mix.nbytes

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint}-{self.seed}"

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> RandomBasis:
        if dtype not in (None, torch.float32):
            raise ValueError(f"a random basis computes in float32, got {dtype}; use `to_dense().to(dtype=...)`")
        return RandomBasis(self.layout, self.dim, self.seed, mix=self._mix.to(device or self.device))

    def with_units(self, units: str) -> RandomBasis:
        self._units_named(units)  # there is no trajectory, so both names mean length 1
        return self

    def to_dense(self) -> DenseBasis:
        """Returns the same directions stored as d * n numbers."""
        matrices = [self.matrix(index) for index in range(len(self.layout.names))]
        return DenseBasis(self.layout, matrices, provenance={"random_seed": self.seed})

    def to_files(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        return {**self._config(), "seed": self.seed}, {"mix": self._mix}

    @classmethod
    def _load(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor], where: str) -> RandomBasis:
        take(config, {"basis", "dim", "dtype", "layout", "spans", "provenance", "seed"}, where)
        layout, dim = stored_layout(config["layout"], f"config.json in {where}"), config["dim"]
        check_integer(f"dim in config.json in {where}", dim, 1)
        if set(tensors) != {"mix"} or tensors["mix"].shape != (dim, dim) or tensors["mix"].dtype != torch.float32:
            raise ValueError(
                f"model.safetensors in {where} must hold one fp32 ({dim}, {dim}) tensor 'mix'; restore it"
            )
        check_float(tensors["mix"], f"'mix' in {where}")
        if stored_spans(config["spans"], dim, where) != [(0, dim)] * len(layout.names):
            raise ValueError(f"config.json in {where} has spans other than (0, {dim}); restore it from its source")
        basis = cls(layout, dim, config["seed"], mix=tensors["mix"])
        if config["provenance"] != basis.provenance:
            raise ValueError(
                f'config.json in {where} has "provenance": {config["provenance"]!r} beside "seed": {basis.seed}; '
                "restore it from its source"
            )
        basis._check_mix(where)
        return basis
