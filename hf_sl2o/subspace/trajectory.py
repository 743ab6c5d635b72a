"""Snapshots of a training run on disk."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from ..foundation.checked import check_integer, shown
from ..foundation.files import CHECKSUM, check_seal, load_json, save_json, save_tensors, sealed
from ..foundation.locks import FolderLock, lock_folder
from ..foundation.partials import remove_partials
from .layout import Layout, plain_name
from .stored import stored_layout

logger = logging.getLogger(__name__)

_MANIFEST = "trajectory.json"
_SNAPSHOTS = "snapshot-*.safetensors"


class Trajectory:
    """Snapshots of a model's trainable parameters in a folder, one safetensors file each.

    Tied weights are written once. A write is atomic, and writing a step again replaces it, so that a resumed run
    completes the folder of the interrupted one. One process at a time writes a folder: another one is refused as long
    as the first one lives and holds an object that wrote there; several objects of one process add to one list.

    Args:
        folder (`str` or `Path`): Where the snapshots are; made when the first one is written.

    Raises:
        `ValueError`: the folder has a manifest that lists no steps; says what is wrong with it.

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
        self._lock: FolderLock | None = None
        self.layout: Layout | None = None
        self._steps: list[int] = []
        self._read()

    @property
    def manifest(self) -> Path:
        """The file that lists the steps and the parameters."""
        return self.folder / _MANIFEST

    def _read(self) -> None:
        self.layout, self._steps = None, []
        if not self.manifest.is_file():
            return
        data = load_json(self.manifest, dict)
        steps = data.get("steps")
        if not isinstance(steps, list) or not all(type(step) is int and step >= 0 for step in steps):
            raise ValueError(
                f'{self.manifest} has "steps": {shown(steps)}, expected a list of integers of at least 0; restore it, '
                "or record the trajectory again"
            )
        if len(set(steps)) < len(steps):
            raise ValueError(f"{self.manifest} lists a step twice; restore it, or record the trajectory again")
        self.layout = stored_layout(data.get("layout"), str(self.manifest))
        check_seal(self.manifest, data, f'restore it, or remove its "{CHECKSUM}" if you changed it yourself')
        self._steps = sorted(steps)

    def _begin_writing(self) -> None:
        """Takes the folder for this process, and reads what its other objects have written since."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.folder)
        self._read()

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
            `ValueError`: the parameters differ from those of the earlier snapshots, hold NaN or Inf, or are complex
                (named); another process writes the folder.
            `OSError`: the disk is full; what was recorded before is intact.
        """
        check_integer("step", step)
        self._begin_writing()
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
        save_tensors(self.path(step), tensors, step=str(step))
        self.layout = layout
        self._steps = sorted({*self._steps, step})
        self._save_manifest()
        return self.path(step)

    def _save_manifest(self) -> None:
        assert self.layout is not None
        save_json(self.manifest, sealed({"layout": self.layout.to_dict(), "steps": self._steps}))

    def forget_after(self, step: int) -> None:
        """Drops snapshots later than `step`: a resumed run records them again."""
        if not self.folder.is_dir():
            return
        self._begin_writing()
        later = [known for known in self._steps if known > step]
        if later:
            logger.warning("%s: dropping %d snapshots after step %d", self.folder, len(later), step)
            self._steps = [known for known in self._steps if known <= step]
            self._save_manifest()
        for path in self.folder.glob(_SNAPSHOTS):  # also of a start that was killed between snapshot and manifest
            if (number := path.stem.rpartition("-")[2]).isdecimal() and int(number) > step:
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Deletes all snapshots and the manifest, and what killed processes left; raises as `write` does."""
        if self.folder.is_dir():
            self._lock = lock_folder(self.folder)
            for path in [self.manifest, *self.folder.glob(_SNAPSHOTS)]:  # in this order: a kill leaves no false list
                path.unlink(missing_ok=True)
            remove_partials(self.folder)
        self.layout, self._steps = None, []

    def delete(self) -> None:
        """Deletes the whole folder; raises as `write` does."""
        if self.folder.is_dir():
            self._lock = lock_folder(self.folder)
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock, self.layout, self._steps = None, None, []
