"""Which checkpoint of a Trainer is whole, and how far it is.

A Trainer writes a checkpoint file by file and deletes an old one file by file. A kill between two of them leaves a
folder whose trainer_state.json may be readable while the optimizer or the random numbers are gone: such a run would go
on, to other numbers. [`CheckpointCallback`] notes what was written. Without its note the content decides: nothing is
executed for that.
"""

from __future__ import annotations

import logging
import os
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import TrainingArguments

from ..foundation.files import load_json, save_json

logger = logging.getLogger(__name__)

STATE, ARGUMENTS, NOTE = "trainer_state.json", "training_args.bin", "checkpoint_files.json"
OPTIMIZER = "optimizer.pt"
# What Accelerate writes under FSDP, weights and optimizer: files (FULL_STATE_DICT), or folders with a file of each
# process (SHARDED_STATE_DICT).
_FSDP = (("pytorch_model_fsdp.bin", "optimizer.bin"), ("pytorch_model_fsdp_0", "optimizer_0"))
_FOLDERS = _FSDP[1]
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """Returns the newest `checkpoint-*` in which every file is there and whole, or None.

    One that was half-written or half-deleted is left out with a warning that says what it lacks.
    """
    numbered = {
        int(path.name.rpartition("-")[2]): path
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if re.fullmatch(r"[0-9]+", path.name.rpartition("-")[2]) and path.is_dir()
    }
    for _, path in sorted(numbered.items(), reverse=True):
        fault = first_fault(path)
        if fault is None:
            return str(path)
        logger.warning("%s is not complete and is left out: %s", path, fault)
    return None


def steps_done(checkpoint: str | Path) -> int:
    """Returns the global step of a checkpoint.

    Raises:
        `ValueError`: its trainer_state.json does not say.
    """
    path = Path(checkpoint) / STATE
    state = load_json(path)
    steps = state.get("global_step") if isinstance(state, dict) else None
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"{path} does not say how many steps were done; delete this checkpoint and take another one")
    return steps


class CheckpointCallback(TrainerCallback):
    """Notes in each checkpoint which files it has and how long they are, when a Trainer has written them.

    Example:

    ```python
    >>> from hf_sl2o.training.resume import CheckpointCallback
    >>> callback = CheckpointCallback()  # Trainer(..., callbacks=[callback])
    ```
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if not state.is_world_process_zero or not (folder / STATE).is_file():
            return  # also where a search puts its checkpoints into a folder for each trial
        files: dict[str, int | None] = dict(files_of(folder))
        if not args.save_only_model and args.world_size > 1:  # the other processes may still be writing theirs
            here = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
            files.update({f"rng_state_{rank}.pth": None for rank in range(here)})
        save_json(folder / NOTE, {"files": files})


def files_of(folder: str | Path) -> dict[str, int]:
    """Returns the size of every file below `folder`, by its path in it; without notes and unfinished writes."""
    paths = (path for path in Path(folder).rglob("*") if path.is_file())
    kept = (path for path in paths if path.suffix != ".partial" and path.name != NOTE)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in kept}


def first_lost(folder: str | Path, files: Mapping[str, int | None]) -> str | None:
    """Returns the first of `files` that is gone, or has another size than was noted (None: any size)."""
    for name, size in files.items():
        path = Path(folder) / name
        if not path.is_file():
            return f"{name} is gone"
        if size is not None and path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def first_fault(checkpoint: str | Path) -> str | None:
    """Says what a checkpoint lacks; None if it is complete."""
    folder = Path(checkpoint)
    try:
        steps_done(folder)
        if (folder / NOTE).is_file():
            note = load_json(folder / NOTE)
            files = note.get("files") if isinstance(note, dict) else None
            if not isinstance(files, dict) or not all(isinstance(size, int | None) for size in files.values()):
                return f"{NOTE} is damaged"
            if (lost := first_lost(folder, files)) is not None:
                return lost
        if not any((folder / name).is_dir() for name in _FOLDERS):  # a Trainer then writes no arguments
            _check_whole(folder / ARGUMENTS)
        for path in [*_weights(folder), *_training_states(folder)]:
            _check_whole(path)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def has_optimizer_state(checkpoint: str | Path) -> bool:
    """Whether a checkpoint has the optimizer's state, as a Trainer writes it with or without FSDP."""
    return any((Path(checkpoint) / name).exists() for name in (OPTIMIZER, *(optimizer for _, optimizer in _FSDP)))


def _of_fsdp(folder: Path) -> tuple[Path, Path] | None:
    """Weights and optimizer of a checkpoint of FSDP, if any of the two is there."""
    for names in _FSDP:
        weights, optimizer = folder / names[0], folder / names[1]
        if weights.exists() or optimizer.exists():
            return weights, optimizer
    return None


def _check_whole(path: Path) -> None:
    """Raises where a file is not there, or was cut off; or a folder of FSDP was not written to its end."""
    if path.name in _FOLDERS:
        if not (path / ".metadata").is_file() or not any(path.glob("*.distcp")):  # that is written last
            raise FileNotFoundError(f"{path.name} lacks .metadata or its *.distcp files")
        return
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is gone")
    if path.suffix == ".safetensors":
        try:
            with safe_open(str(path), framework="pt"):  # compares its length with what its header says
                return
        except SafetensorError as error:
            raise ValueError(f"{path.name} is cut off ({error})") from error
    if not zipfile.is_zipfile(path):  # its index is at the end
        raise ValueError(f"{path.name} is cut off")


def _weights(folder: Path) -> Iterator[Path]:
    """Yields the files of the weights: of the model, in one piece or several, or of each adapter; of FSDP its own."""
    if (of_fsdp := _of_fsdp(folder)) is not None:
        yield of_fsdp[0]
        return
    adapters = [path.parent for pattern in ("", "*/") for path in folder.glob(f"{pattern}adapter_config.json")]
    for adapter in adapters:
        yield _first_there(adapter, _ADAPTERS)
    if any((folder / name).is_file() for name in _ADAPTERS) and folder not in adapters:
        raise FileNotFoundError("adapter_config.json is gone")
    indices = [folder / f"{name}.index.json" for name in _WEIGHTS if (folder / f"{name}.index.json").is_file()]
    for index in indices:
        content = load_json(index)
        pieces = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(pieces, dict) or not pieces:
            raise ValueError(f"{index.name} names no files")
        for name in sorted(set(map(str, pieces.values()))):
            yield folder / name
    if not indices and not adapters:
        yield _first_there(folder, _WEIGHTS)


def _first_there(folder: Path, names: tuple[str, ...]) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"there are no weights ({names[0]})")
    return found


def _training_states(folder: Path) -> Iterator[Path]:
    """Yields the files of optimizer, schedule and random numbers; none where only the model was to be saved."""
    names = [path.name for path in folder.glob("rng_state*.pth")]
    of_fsdp = _of_fsdp(folder)
    states = [folder / OPTIMIZER if of_fsdp is None else of_fsdp[1], folder / "scheduler.pt"]
    # A run that saves the model alone has none of them. If only some are there, the others were deleted.
    if _pickled_flag(folder / ARGUMENTS, "save_only_model") and not names and not any(p.exists() for p in states):
        return
    yield from states
    if _pickled_flag(folder / ARGUMENTS, "fp16"):
        yield folder / "scaler.pt"
    ranks = [int(match[1]) for name in names if (match := re.fullmatch(r"rng_state_(\d+)\.pth", name))]
    yield from (folder / f"rng_state_{rank}.pth" for rank in range(max(ranks, default=-1) + 1))
    if not ranks:
        yield folder / "rng_state.pth"


def _pickled_flag(path: Path, name: str) -> bool:
    """Whether the arguments in training_args.bin have a flag set; reads the pickle's codes, and executes none."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = next(entry for entry in archive.namelist() if entry.endswith("data.pkl"))
            content = archive.read(member)
        named = False
        for code, value, _ in pickletools.genops(content):
            if named and code.name in ("NEWTRUE", "NEWFALSE"):
                return code.name == "NEWTRUE"
            named = value == name or (named and code.name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"))
    except (zipfile.BadZipFile, StopIteration, OSError, EOFError):
        pass
    return False
