"""The command line of a study: the flags that studies share, and what is written at the end."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...foundation.files import save_json
from ..environment import environment

_FLAGS: dict[str, dict[str, Any]] = {
    "data": {"help": "embedded, or a folder with e2e_nlg and cifar10"},
    "steps": {"type": int, "help": "of each run"},
    "seeds": {"type": int},
    "meta_epochs": {"type": int, "help": "episodes of meta-training"},
    "rank": {"type": int, "help": "of the LoRA factors"},
    "output_dir": {"type": Path, "help": "keeps runs and rules"},
    "tasks_dir": {"type": Path, "help": "keeps bases and pretrained networks, which studies share"},
}


def study_parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Returns a parser with --json and the flags that are named, at these defaults.

    Args:
        description (`str`): The docstring of the study.
        **defaults: Of the flags, any of `data`, `steps`, `seeds`, `meta_epochs`, `rank`, `output_dir`, `tasks_dir`.

    Example:

    ```python
    >>> from hf_sl2o.experiments.command_line.study import study_parser
    >>> study_parser("A study.", steps=200, seeds=3).parse_args(["--seeds", "1"])
    Namespace(json=None, steps=200, seeds=1)

    ```
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the result goes, with a figure beside it")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", default=value, **_FLAGS[name])
    return parser


def finish(
    result: dict[str, Any], json: Path | None, draw: Callable[[dict[str, Any], Path], None] | None = None
) -> dict[str, Any]:
    """Adds where the result was made; with `json` writes it there, and by `draw(result, path)` a figure beside it."""
    result["environment"] = environment()
    if json is not None:
        save_json(json, result)
        if draw is not None:
            draw(result, json.with_suffix(".png"))
    return result
