"""The examples of README.md with every learning rate that it says was tried.

    python benchmarks/readme_example.py --json benchmarks/results/readme_example.json

The blocks run as they stand there, with another optimizer or rate in place of the one written.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.environment import environment
from hf_sl2o.foundation.files import save_json

ROOT = Path(__file__).resolve().parent.parent
LORA = (None, 2e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # None: the Trainer's own
FULL, SUBSPACE = (1e-3, 3e-3, 1e-2), (0.03, 0.1, 0.3, 1.0, 3.0)


@contextlib.contextmanager
def inside(folder: str) -> Iterator[None]:
    """Works in a folder, and goes back."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def quiet(call: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return call()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parse_options(parser, argv)
    target = None if options.json is None else options.json.resolve()
    first, second, _ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    with tempfile.TemporaryDirectory() as folder, inside(folder):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")

        def lora(words: str) -> float:
            space: dict[str, Any] = {}
            quiet(lambda: exec(first.replace('optim="sl2o"', words), space))
            return float(quiet(space["trainer"].evaluate)["eval_loss"])

        runs: dict[str, Any] = {"lora": {"sl2o": lora('optim="sl2o"')}}
        for rate in LORA:
            given = "" if rate is None else f", learning_rate={rate}"
            runs["lora"][f"adamw_torch {'default' if rate is None else rate}"] = lora(f'optim="adamw_torch"{given}')
        space: dict[str, Any] = {}
        quiet(lambda: exec(first.split("args = ")[0] + "from transformers import Trainer\n" + second, space))
        train, basis = space["train"], {"optim_args": "basis=basis"}
        runs["subspace, 50 steps"] = {"sl2o": quiet(lambda: train("sl2o", 50, **basis))}
        for steps in (50, 600):
            for rate in FULL:
                name = f"adamw_torch {rate}, {steps} steps"
                runs["subspace, 50 steps"][name] = quiet(lambda: train("adamw_torch", steps, learning_rate=rate))  # noqa: B023
        for rate in SUBSPACE:
            name = f"subspace_adamw {rate}"
            runs["subspace, 50 steps"][name] = quiet(lambda: train("subspace_adamw", 50, learning_rate=rate, **basis))  # noqa: B023
    for what, losses in runs.items():
        for name, loss in losses.items():
            print(f"{what:20} {name:34} {loss:.3f}")
    result = {"validation_loss": runs, "environment": environment()}
    if target is not None:
        save_json(target, result)
    return result


if __name__ == "__main__":
    run_script(main)
