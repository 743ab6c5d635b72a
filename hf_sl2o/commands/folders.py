"""A folder that a command writes: it is there when it is whole, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_new(flag: str, folder: Path) -> None:
    """Raises `ValueError` unless `folder` is not there yet, or empty, and can be made."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        what = "a folder that is not empty" if folder.is_dir() else "a file"
        raise ValueError(f"{flag} is {folder}, {what}, and nothing is overwritten; give another name, or delete it")
    parent = next(place for place in folder.absolute().parents if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{flag} is {folder}, and nothing can be written into {parent}; give another folder")


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
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    inside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.absolute().parent))
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
