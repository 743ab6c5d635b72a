"""Runs an unmodified training script with our optimizer names: `python -m hf_sl2o.run script.py --optim sl2o ...`."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from .registry import register


def main() -> None:
    """Registers the names, then runs the script as `python script.py` would."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        found = repr(sys.argv[1]) if len(sys.argv) > 1 else "nothing"
        sys.exit(f"expected a Python script and found {found}; usage: python -m hf_sl2o.run SCRIPT.py [ARGUMENTS ...]")
    register()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
