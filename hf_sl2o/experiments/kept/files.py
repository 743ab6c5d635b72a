"""What stays on disk between two starts: results with a checksum, one writer at a time, nothing half-made.

A result that is damaged, and one whose further files are gone, is made anew with a line that says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ...foundation.files import CHECKSUM, check_seal, load_json, load_tensors, save_json, save_tensors, sealed
from ...foundation.partials import remove_partials
from ...training.resume import files_of, first_lost

try:
    import fcntl
except ImportError:  # not on Windows: there nothing can be told
    fcntl = None  # type: ignore[assignment]


def say(text: str) -> None:
    """Prints on the first process, also before the processes know each other."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


# Results


def keep(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a result with its checksum."""
    save_json(path, sealed(json.loads(json.dumps(data))))  # as it will be read: tuples are lists


def kept(path: Path) -> dict[str, Any]:
    """Returns what [`keep`] wrote, or nothing if it is not there, or damaged: then it says so."""
    if not path.is_file():
        return {}
    try:
        data = load_json(path, dict)
        if CHECKSUM not in data:
            raise ValueError("it has no checksum")
        check_seal(path, data)
    except (OSError, ValueError) as error:
        say(f"{path} is not what was written ({error}): it is made anew")
        return {}
    return {key: value for key, value in data.items() if key != CHECKSUM}


def read_object(path: Path, *needed: str, remedy: str = "restore it from where it came from") -> dict[str, Any]:
    """Returns the object of a JSON file; raises `ValueError` if it is none, or lacks a key."""
    data: dict[str, Any] = load_json(path, dict)
    if missing := [key for key in needed if key not in data]:
        raise ValueError(f"{path} has the keys {sorted(data)[:8]}, and lacks {missing[0]!r}; {remedy}")
    return data


def made_files(folder: Path | None) -> dict[str, int]:
    """Sizes of the files directly in `folder` without which what was made is not there: numbers and settings."""
    if folder is None:
        return {}
    return {name: size for name, size in files_of(folder).items() if name.endswith((".json", ".safetensors"))
            and "/" not in name and not name.startswith(".")}  # fmt: skip


def whole(known: Mapping[str, Any], path: Path, key: str, made: Path | None) -> bool:
    """Whether a result has this key and all files it came with."""
    if known.get("key") != key:
        return False
    lost = None if made is None else first_lost(made, known.get("files", {}))
    if lost is not None:
        say(f"{path.name}: done before, but in {made} {lost}: it is made anew")
    return lost is None


def made_once(path: Path, key: str, work: Callable[[], Mapping[str, Any]], made: Path) -> dict[str, Any]:
    """Returns the result in `path`; another process that makes it at the same time is waited for.

    Each process may call it: the first one works. `made` is the folder that `work` writes; it begins empty.
    """
    if not whole(known := kept(path), path, key, made):
        with only_writer(path, wait=True):
            if not whole(known := kept(path), path, key, made):
                shutil.rmtree(made, ignore_errors=True)
                keep(path, {"key": key, **work(), "files": made_files(made)})
                known = kept(path)
    return known


def tensors_once(path: Path, make: Callable[[], Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Returns the tensors in `path`, made if they are not there or damaged; others that make them are waited for."""

    def read() -> dict[str, torch.Tensor] | None:
        try:
            return load_tensors(path) if path.is_file() else None
        except ValueError as error:
            say(f"{error}: it is made anew")
            return None

    tensors = read()
    if tensors is None:
        with only_writer(path, wait=True):
            tensors = read()
            if tensors is None:
                save_tensors(path, make())
                tensors = load_tensors(path)
    return tensors


def sweep(folder: Path) -> None:
    """Removes below `folder` what a kill left unfinished: temporary files and folders of processes that are gone."""
    for path, folders, _ in os.walk(folder):
        remove_partials(Path(path))
        for name in [name for name in folders if name.endswith(".partial")]:
            shutil.rmtree(Path(path) / name, ignore_errors=True)
            folders.remove(name)


def copy_checkpoints(source: Path, target: Path) -> None:
    """Makes `target` show the checkpoints of a run; after a kill each of them is whole or not there."""
    names = {path.name for path in source.glob("checkpoint-*")}
    for old in target.glob("checkpoint-*"):
        if old.name not in names:
            shutil.rmtree(old)
    for name in sorted(names):
        partial = target / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source / name, partial)
        shutil.rmtree(target / name, ignore_errors=True)
        os.replace(partial, target / name)


# One writer


class Busy(RuntimeError):
    """Another living process writes the same files."""


@contextlib.contextmanager
def only_writer(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds a lock beside `path` (a file or folder) while this process writes it; it ends with the process.

    Raises:
        [`Busy`]: another process of this or, where the file system tells, another machine holds it; with `wait` it is
            waited for instead.
    """
    lock, said = path.with_name(f".{path.name}.lock"), False
    lock.parent.mkdir(parents=True, exist_ok=True)
    while (held := _try_lock(lock)) is None:
        pid, host = _holder(lock)
        text = f"{path} is being written by the process {pid} on {host}"
        if not wait:
            raise Busy(f"{text}; wait for it, end it, or take another --output_dir")
        if not said:
            print(f"{text}: waiting for it", flush=True)
            said = True
        time.sleep(0.5)
    try:
        yield
    finally:
        if held >= 0:
            lock.unlink(missing_ok=True)
            os.close(held)


@contextlib.contextmanager
def only_run(path: Path) -> Iterator[None]:
    """As [`only_writer`], on the first process for all: every process raises where it is refused."""
    state = PartialState()
    with contextlib.ExitStack() as stack:
        refused: list[str | None] = [None]
        if state.is_main_process:
            try:
                stack.enter_context(only_writer(path))
            except Busy as error:
                refused = [str(error)]
        if state.num_processes > 1:
            broadcast_object_list(refused)
        if refused[0] is not None:
            raise Busy(refused[0])
        yield


def _try_lock(lock: Path) -> int | None:
    """Returns an open file that holds the lock, -1 where nothing can be told, None if a living process holds it."""
    if fcntl is None:
        return -1
    file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        pid, host = _holder(lock)
        # A killed process' children may outlive it for a moment, and hold what it held.
        return -1 if host == platform.node() and not _lives(pid) else None
    except OSError:  # a file system without locks
        os.close(file)
        return -1
    try:
        current = os.stat(lock).st_ino
    except FileNotFoundError:
        current = -1
    if os.fstat(file).st_ino != current:  # whoever had it removed it meanwhile
        os.close(file)
        return _try_lock(lock)
    os.ftruncate(file, 0)
    os.write(file, f"{os.getpid()} {platform.node()}".encode())
    return file


def _holder(lock: Path) -> tuple[int, str]:
    try:
        pid, _, host = lock.read_text(encoding="utf-8").partition(" ")
        return int(pid), host
    except (OSError, ValueError):  # it is written a moment after it is held
        return 0, "an unknown machine"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # asks only whether it is there
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
