"""How a script begins and ends: what its user can mend is one line, and processes are waited for."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState

#: The package, and the scripts of a checkout.
PACKAGE = Path(__file__).resolve().parents[2]
OURS = (PACKAGE, PACKAGE.parent / "recipes", PACKAGE.parent / "benchmarks")


def run_script(main: Callable[[], Any]) -> None:
    """Runs a script: what its user can mend is one line on stderr and exit code 2, all else has its traceback."""
    gc.freeze()  # each run of a Trainer collects garbage, and would look through all that is imported
    try:
        main()
    except (ValueError, OSError, RuntimeError, NotImplementedError, TypeError, ImportError) as error:
        if not is_ours(error):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)


def is_ours(error: BaseException) -> bool:
    """Whether an error was raised in this repository, on purpose, and not in a library or by the interpreter."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    path = Path(frame.filename).resolve()
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or ".").resolve()
    own = [folder for folder in script.parents if folder.name in ("recipes", "benchmarks")]  # beside another package
    ours = any(folder in path.parents for folder in (*OURS, *own))
    return ours and (frame.line or "").lstrip().startswith("raise")


def leave_processes() -> None:
    """Waits until gloo's threads are done with the last collective; call it as the last thing in a process.

    They take the GIL to free its tensors. A process that ends in that moment aborts ("terminate called without an
    active exception"), and one that destroys its group in that moment waits for ever.
    """
    if PartialState().num_processes > 1:
        time.sleep(0.5)
