"""From a training trajectory to a basis: snapshots on disk, then principal components, out of core.

T snapshots of n parameters, d components. The (T, n) matrix is never held: one pass over the files sums the (T, T)
Gram matrix in float64, a second one forms the directions block by block.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..files import load_json, open_tensors, save_json, save_tensors
from .basis import DenseBasis
from .layout import Layout, plain_name

logger = logging.getLogger(__name__)

_MANIFEST = "trajectory.json"
# Entries of a (T, columns) float64 block: 64 MB.
_BLOCK_ENTRIES = 1 << 23
# Eigenvalues of the Gram matrix below this share of the largest are rounding: with it every direction is orthonormal
# to 1e-5 (the error of an eigenvalue is about T * 2e-16 of the largest).
_RANK_TOLERANCE = 1e-10


class Trajectory:
    """Snapshots of a model's trainable parameters in a folder, one safetensors file each.

    Tied weights are written once. A write is atomic, and writing a step again replaces it, so that a resumed run
    completes the folder of the interrupted one.

    Args:
        folder (`str` or `Path`): Where the snapshots are; made when the first one is written.

    Example:

    ```python
    >>> import tempfile, torch
    >>> from hf_sl2o import Trajectory, fit_basis
    >>> model, trajectory = torch.nn.Linear(3, 2), Trajectory(tempfile.mkdtemp())
    >>> for step in range(5):
    ...     _ = torch.nn.init.normal_(model.weight)
    ...     _ = trajectory.write(step, model.named_parameters())
    >>> fit_basis(trajectory, dim=3, progress=False).dim
    3
    ```
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.layout: Layout | None = None
        self._steps: list[int] = []
        if (manifest := self.folder / _MANIFEST).is_file():
            data = load_json(manifest)
            try:
                self.layout = Layout.from_dict(data["layout"])
                self._steps = sorted(int(step) for step in data["steps"])
            except (KeyError, TypeError) as error:
                raise ValueError(f"{manifest} is no trajectory manifest (no {error}); record it again") from error

    @property
    def steps(self) -> list[int]:
        """The recorded steps, ascending."""
        return list(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def path(self, step: int) -> Path:
        """The file of one snapshot."""
        return self.folder / f"snapshot-{step:09d}.safetensors"

    def write(self, step: int, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> Path:
        """Writes the snapshot of `step`.

        Args:
            step (`int`): The global step.
            named_parameters: As `model.named_parameters()`; frozen ones are left out.

        Raises:
            `ValueError`: the parameters differ from those of the earlier snapshots, or hold NaN or Inf (named).
            `OSError`: the disk is full; what was recorded before is intact.
        """
        pairs = [(plain_name(name), parameter) for name, parameter in named_parameters if parameter.requires_grad]
        layout = Layout.from_named_parameters(pairs)
        if self.layout is not None and layout != self.layout:
            self.layout.select(pairs)  # names the first parameter that is missing or has another shape
            raise ValueError(
                f"{self.folder} holds snapshots of {len(self.layout.names)} parameters, the model now trains "
                f"{len(layout.names)}; record another set of parameters in another folder"
            )
        parameters, _ = layout.select(pairs)
        tensors = {name: parameter.detach() for name, parameter in zip(layout.names, parameters, strict=True)}
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"parameter {name!r} holds NaN or Inf at step {step}: the snapshot was not written, the "
                    f"{len(self)} earlier ones are intact; lower the learning rate"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self.path(step), tensors, step=str(step))
        self.layout = layout
        self._steps = sorted({*self._steps, int(step)})
        self._save_manifest()
        return self.path(step)

    def _save_manifest(self) -> None:
        assert self.layout is not None
        save_json(self.folder / _MANIFEST, {"layout": self.layout.to_dict(), "steps": self._steps})

    def forget_after(self, step: int) -> None:
        """Drops snapshots later than `step`: a resumed run records them again."""
        later = [known for known in self._steps if known > step]
        if later:
            logger.warning("%s: dropping %d snapshots after step %d", self.folder, len(later), step)
            self._steps = [known for known in self._steps if known <= step]
            self._save_manifest()
            for known in later:
                self.path(known).unlink(missing_ok=True)

    def clear(self) -> None:
        """Deletes all snapshots and the manifest."""
        for path in [*self.folder.glob("snapshot-*.safetensors"), self.folder / _MANIFEST]:
            path.unlink(missing_ok=True)
        self.layout, self._steps = None, []

    def delete(self) -> None:
        """Deletes the whole folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.layout, self._steps = None, []


class _Blocks:
    """Reads the snapshots as float64 blocks of shape (T, columns) on a device, parameter by parameter."""

    def __init__(self, trajectory: Trajectory, steps: list[int], device: torch.device | str, stack: ExitStack) -> None:
        assert trajectory.layout is not None
        self.device = device
        self.layout, self.steps = trajectory.layout, steps
        self.paths = [trajectory.path(step) for step in steps]
        self.files = [stack.enter_context(open_tensors(path)) for path in self.paths]
        for path, file in zip(self.paths, self.files, strict=True):
            missing = sorted(set(self.layout.names) - set(file.keys()))
            if missing:
                raise ValueError(f"{path} lacks the parameter {missing[0]!r}; record the trajectory again")
            for name, shape in zip(self.layout.names, self.layout.shapes, strict=True):
                found = tuple(file.get_slice(name).get_shape())
                if found != shape:
                    raise ValueError(f"{path} has {name!r} with shape {found}, expected {shape}; record it again")

    def of(self, index: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yields (first column, last column, block) of one parameter, as whole rows of its first dimension."""
        name, shape, numel = self.layout.names[index], self.layout.shapes[index], self.layout.numels[index]
        rows = shape[0] if shape else 1
        width = numel // max(rows, 1)  # scalars a row
        step = max(1, _BLOCK_ENTRIES // (len(self.files) * max(width, 1)))
        for first in range(0, rows, step):
            last = min(first + step, rows)
            columns = (last - first) * width
            block = torch.empty(len(self.files), columns, dtype=torch.float64, device=self.device)
            for row, file in enumerate(self.files):
                part = file.get_slice(name)[first:last] if shape else file.get_tensor(name)
                block[row] = part.reshape(-1).to(self.device).to(torch.float64)
            yield first * width, first * width + columns, block

    def refuse_non_finite(self, index: int, block: torch.Tensor) -> None:
        finite = torch.isfinite(block).all(dim=1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise ValueError(
                f"snapshot {self.paths[row]} holds NaN or Inf in {self.layout.names[index]!r}; delete that snapshot's "
                "step from the trajectory, or record it again with a lower learning rate"
            )


def _components(
    gram: torch.Tensor, dim: int, what: str, samples: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eigenpairs of a (T, T) Gram matrix: (T, d) vectors, (d,) eigenvalues, all eigenvalues descending."""
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    rank = int((values > _RANK_TOLERANCE * values[0]).sum()) if values[0] > 0 else 0
    if dim > rank:
        raise ValueError(
            f"dim is {dim}, but {what} ({samples} snapshots) has numerical rank {rank}; choose dim <= {rank}, or "
            "record more snapshots"
        )
    chosen = vectors[:, :dim]
    # Signs are arbitrary; as in scikit-learn's svd_flip the largest entry is made positive. Pointing every direction
    # along the training path instead would let a rule replay the path without looking at a gradient.
    largest = chosen.abs().argmax(dim=0)
    return chosen * chosen[largest, torch.arange(dim)].sign(), values[:dim], values


def fit_basis(
    trajectory: Trajectory | str | Path,
    dim: int,
    *,
    units: str = "std",
    center: bool = True,
    blocks: str = "global",
    dtype: torch.dtype = torch.float32,
    steps: list[int] | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> DenseBasis:
    """Fits the principal components of a trajectory, streaming over blocks of parameters.

    X (T, n) snapshots, centred; X X^T = W diag(lambda) W^T; directions U = X^T W_d diag(lambda_d)^-1/2.

    Args:
        trajectory ([`Trajectory`] or path): The snapshots.
        dim (`int`): d, the number of directions (of each layer with `blocks="layer"`). The paper uses 40 of 60
            snapshots.
        units (`str`, *optional*, defaults to `"std"`): `"std"`: c in standard deviations of the trajectory along each
            direction; `"orthonormal"`: the paper's coordinates. [`Basis.with_units`] changes it later.
        center (`bool`, *optional*, defaults to `True`): Subtract the mean snapshot (PCA, official code); `False` as in
            "Fine-tuning Happens in Tiny Subspaces" (ACL 2023).
        blocks (`str`, *optional*, defaults to `"global"`): `"global"`, or `"layer"` for d directions a layer.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Storage dtype of the directions.
        steps (`list[int]`, *optional*, defaults to all): Which snapshots to use.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where the products are computed; it must
            know float64. A block of the trajectory at a time is there. The basis is returned on the CPU.
        progress (`bool`, *optional*, defaults to `True`): Show a progress bar.

    Returns:
        [`DenseBasis`]; `provenance` holds the explained variance.

    Raises:
        `ValueError`: fewer than two snapshots, NaN or Inf in one, `dim` above the numerical rank, or a damaged file.
    """
    trajectory = trajectory if isinstance(trajectory, Trajectory) else Trajectory(trajectory)
    chosen = trajectory.steps if steps is None else sorted(steps)
    if trajectory.layout is None or len(chosen) < 2:
        raise ValueError(
            f"{trajectory.folder} holds {len(chosen)} snapshots, at least 2 are needed; train with "
            "TrajectoryCallback(folder, every_steps=...)"
        )
    if unknown := sorted(set(chosen) - set(trajectory.steps)):
        raise ValueError(f"{trajectory.folder} has no snapshot of step {unknown[0]}; it has {trajectory.steps}")
    if dim < 1:
        raise ValueError(f"dim is {dim}, expected at least 1")
    layout = trajectory.layout
    groups = layout.blocks(blocks)
    with ExitStack() as stack:
        reader = _Blocks(trajectory, chosen, device, stack)
        bar = stack.enter_context(
            tqdm(total=2 * layout.n, unit="param", unit_scale=True, desc="fit_basis", disable=not progress)
        )
        grams = []
        for group in groups:
            gram = torch.zeros(len(chosen), len(chosen), dtype=torch.float64)
            for index in group:
                for first, last, block in reader.of(index):
                    reader.refuse_non_finite(index, block)
                    if center:
                        block -= block.mean(dim=0)
                    gram += (block @ block.T).cpu()
                    bar.update(last - first)
            grams.append(gram)

        matrices: list[torch.Tensor | None] = [None] * len(layout.names)
        spans: list[tuple[int, int]] = [(0, 0)] * len(layout.names)
        deviations, explained = [], []
        for number, (group, gram) in enumerate(zip(groups, grams, strict=True)):
            what = "the trajectory" if blocks == "global" else f"the block of {layout.names[group[0]]!r}"
            vectors, values, all_values = _components(gram, dim, what, len(chosen))
            weights = vectors / values.sqrt()  # (T, d)
            for index in group:
                matrix = torch.empty(dim, layout.numels[index], dtype=dtype)
                for first, last, block in reader.of(index):
                    if center:
                        block -= block.mean(dim=0)
                    matrix[:, first:last] = (weights.T.to(device) @ block).to(dtype)
                    bar.update(last - first)
                matrices[index], spans[index] = matrix, (number * dim, (number + 1) * dim)
            deviations.append((values / (len(chosen) - int(center))).sqrt())
            explained.append((values / all_values.sum()).tolist())

    compute = torch.promote_types(torch.float32, dtype)
    std = torch.cat(deviations).to(compute)
    share = sum(sum(block) for block in explained) / len(explained)
    logger.info("fit_basis: %d directions hold %.4f %% of the variance of %s", dim, 100 * share, trajectory.folder)
    provenance: dict[str, Any] = {
        "snapshots": len(chosen),
        "first_step": chosen[0],
        "last_step": chosen[-1],
        "center": center,
        "blocks": blocks,
        "explained_variance": share,
        "explained_variance_ratio": explained[0] if blocks == "global" else [sum(block) for block in explained],
    }
    basis = DenseBasis(layout, [m for m in matrices if m is not None], std, std, spans, provenance)
    return basis.with_units(units)
