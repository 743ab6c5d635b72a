"""One writer for a folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None  # type: ignore[assignment]


class FolderLock:
    """A lock on a folder that this process holds while the object lives; get one from [`lock_folder`]."""

    def __init__(self, descriptor: int | None) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Gives the folder free, or, in a forked child, leaves it to the parent."""
        if self.descriptor is not None:
            os.close(self.descriptor)
        self.descriptor = None

    def __reduce__(self) -> tuple[type[FolderLock], tuple[None]]:
        return FolderLock, (None,)  # a copy holds nothing


_HELD: weakref.WeakValueDictionary[tuple[int, int], FolderLock] = weakref.WeakValueDictionary()


def _leave_to_the_parent() -> None:
    for lock in list(_HELD.values()):
        lock.close()
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)


def lock_folder(folder: Path) -> FolderLock:
    """Returns the lock of this process on `folder`, which exists; all callers in a process share it.

    File systems without locks are not locked.

    Raises:
        `ValueError`: another process holds it.
    """
    known = os.stat(folder)
    key = (known.st_dev, known.st_ino)
    if (held := _HELD.get(key)) is not None and held.descriptor is not None:
        return held
    descriptor: int | None = None
    if fcntl is not None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise ValueError(
                f"{folder} is being written by another process, which still runs; end that one, or use another folder"
            ) from error
        except OSError:  # no locks on this file system
            os.close(descriptor)
            descriptor = None
    lock = _HELD[key] = FolderLock(descriptor)
    return lock
