"""Runs an unmodified program with our optimizer names, which the processes that it starts know too.

```bash
python -m hf_sl2o.run script.py --optim sl2o ...                    # a script
python -m hf_sl2o.run -m package.module --optim sl2o ...            # a module
python -m hf_sl2o.run trl sft --optim sl2o ...                      # a command, here TRL's
python -m hf_sl2o.run accelerate launch script.py --optim sl2o ...  # a launcher; torchrun likewise
```

A launcher starts other processes, in which nobody imports hf_sl2o. They inherit `PYTHONPATH`; in front of it goes a
folder of this package whose `sitecustomize` registers the names as soon as transformers' Trainer is imported. Nothing
is installed or written. Processes that do not read `PYTHONPATH` (`python -I`, `python -E`, another machine that a
launcher reaches by ssh) need `import hf_sl2o` in the script.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from .training.registration import register

_STARTUP = str(Path(__file__).resolve().parent / "training" / "startup")
_USAGE = "usage: python -m hf_sl2o.run (SCRIPT.py | -m MODULE | COMMAND) [ARGUMENTS ...]"


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns `environment` with our folder in front of `PYTHONPATH`.

    Example:

    ```python
    >>> from hf_sl2o.run import child_environment
    >>> child_environment({"PYTHONPATH": "/mine"})["PYTHONPATH"].endswith("startup:/mine")
    True
    ```
    """
    folders = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    others = [folder for folder in folders if folder != _STARTUP]
    return {**environment, "PYTHONPATH": os.pathsep.join([_STARTUP, *others])}


def find_command(name: str) -> str | None:
    """Returns the path of a command: of this Python's environment, also where that is not activated, or any other."""
    beside = os.path.dirname(os.path.abspath(sys.executable))
    return shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]))


def main() -> None:
    """Registers the names here and for the processes to come, then runs what the arguments say."""
    words = sys.argv[1:]
    if not words:
        sys.exit(f"expected something to run and found nothing; {_USAGE}")
    if words[0] in ("-h", "--help"):
        print(_USAGE)
        return
    os.environ.update(child_environment(os.environ))
    if words[0] == "-m":
        _run_module(words[1:])
    elif words[0].endswith(".py"):
        _run_script(words)
    else:
        _run_command(words)


def _run_script(words: list[str]) -> None:
    """As `python script.py` would."""
    if not Path(words[0]).is_file():
        sys.exit(f"expected a Python script and found {words[0]!r}, which is no file; {_USAGE}")
    register()
    sys.argv = words
    sys.path[0] = str(Path(words[0]).resolve().parent)
    runpy.run_path(words[0], run_name="__main__")


def _run_module(words: list[str]) -> None:
    """As `python -m package.module` would."""
    if not words:
        sys.exit(f"expected a module after -m and found nothing; {_USAGE}")
    try:
        spec = importlib.util.find_spec(words[0])
        if spec is not None and spec.submodule_search_locations is not None:  # a package runs its __main__
            spec = importlib.util.find_spec(f"{words[0]}.__main__")
        known = spec is not None
    except (ImportError, ValueError):
        known = False
    if not known:
        sys.exit(f"there is no module {words[0]!r} to run in {sys.executable}'s environment; {_USAGE}")
    register()
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def _run_command(words: list[str]) -> None:
    """As a shell would; this process becomes the command, so that signals and the exit code are its own."""
    command = find_command(words[0])
    if command is None and Path(words[0]).is_file():
        return _run_script(words)  # a script by another name
    if command is None:
        sys.exit(
            f"{words[0]!r} is no Python script, and no such command is beside {sys.executable} or on PATH; {_USAGE}"
        )
    if os.name == "nt":  # has no exec that keeps the console and the exit code
        sys.exit(subprocess.call([command, *words[1:]]))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command, [command, *words[1:]])


if __name__ == "__main__":
    main()
