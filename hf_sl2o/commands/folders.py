"""A folder that a command writes: it is there when it is whole, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def check_new(flag: str, folder: Path) -> None:
    """Raises `ValueError` unless `folder` is not there yet, or empty, and can be made."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        what = "a folder that is not empty" if folder.is_dir() else "a file"
        raise ValueError(f"{flag} is {folder}, {what}, and nothing is overwritten; give another name, or delete it")
    if folder.is_dir() and (folder.samefile(".") or os.path.ismount(folder.resolve())):
        what = "the folder that you are in" if folder.samefile(".") else "a mount point"
        raise ValueError(f"{flag} is {folder}, {what}, which no other can replace; give the name of a new one in it")
    check_parent(f"{flag} is {folder}, and", folder, "folder")


def check_parent(head: str, path: Path, what: str) -> None:
    """Raises `ValueError` that begins with `head` unless a file or folder can be made at `path`."""
    parent = next(place for place in path.resolve().parents if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{head} nothing can be written into {parent}; give another {what}")


def check_kept(flag: str, folder: Path, first: Sequence[str], what: str) -> None:
    """Raises `ValueError` where a command that goes on in `folder` would write between files that are not its own.

    Args:
        flag (`str`): What the user calls the folder, for messages.
        folder (`Path`): In which the manifest that tells the command's own folders is missing.
        first (`Sequence[str]`): What the command makes before its manifest.
        what (`str`): What could go on, for the message.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{flag} is {folder}, a file; give a folder")
    check_parent(f"{flag} is {folder}, and", folder / "new", "folder")
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in held if name not in first and not name.startswith(".")]
    if others:
        raise ValueError(
            f"{flag} is {folder}, which holds {others[0]!r} and no {what} that could go on; give a new folder"
        )


@contextmanager
def made_whole(flag: str, folder: Path) -> Iterator[Path]:
    """Gives a folder to write into that becomes `folder` at the end of the block, and is removed after an error.

    Args:
        flag (`str`): What the user calls the folder, for messages.
        folder (`Path`): Must not be there, or be empty.

    Raises:
        `ValueError`: it holds something, or cannot be made.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from hf_sl2o.commands.folders import made_whole
    >>> with made_whole("OUTPUT", Path("new")) as inside:
    ...     _ = (inside / "text").write_text("whole")
    ...     Path("new").exists()
    False
    >>> Path("new/text").read_text()
    'whole'
    ```
    """
    check_new(flag, folder)
    folder = folder.resolve()  # a link to an empty folder stays
    folder.parent.mkdir(parents=True, exist_ok=True)
    # a name may have 255 bytes
    inside = Path(tempfile.mkdtemp(prefix=f".{folder.name[:40]}.", suffix=".partial", dir=folder.parent))
    try:
        yield inside
        inside.chmod(0o777 & ~_umask())  # mkdtemp's is for its user alone
        if folder.is_dir():
            folder.rmdir()
        os.replace(inside, folder)
    finally:
        shutil.rmtree(inside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
