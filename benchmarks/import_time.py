"""How long `import hf_sl2o` takes beyond the import of transformers' Trainer, and what it loads that was not there.

    python benchmarks/import_time.py --json benchmarks/results/import_time.json
    python benchmarks/import_time.py --beside A_CHECKOUT_OF_ANOTHER_COMMIT --json benchmarks/results/import_time.json

Each round starts a process a checkout, in turn, and reads `python -X importtime`: the seconds of
`from transformers import Trainer, TrainingArguments`, and those of `import hf_sl2o` after it.
"""

from __future__ import annotations

import argparse
import compileall
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.environment import environment
from hf_sl2o.experiments.timing import row
from hf_sl2o.foundation.files import save_json

ROOT = Path(__file__).resolve().parent.parent
CODE = """
import sys
from transformers import Trainer, TrainingArguments
before = set(sys.modules)
import hf_sl2o
print(*sorted(set(sys.modules) - before))
"""


def measured(checkout: Path) -> tuple[float, float, list[str]]:
    """Seconds of the Trainer's import and of ours after it, and the modules that ours adds."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONWARNINGS": "ignore"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # as for a user, only the first import compiles
    command = [sys.executable, "-X", "importtime", "-c", CODE]
    out = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=True)
    ours, trainer = 0.0, 0.0
    for line in out.stderr.splitlines():
        parts = line.removeprefix("import time:").split("|")
        if len(parts) != 3 or not parts[1].strip().isdigit():
            continue
        name, cumulative = parts[2], int(parts[1]) / 1e6
        if name == " hf_sl2o":  # one space: it was not imported by another module
            ours = cumulative
        elif name.startswith(" ") and not name.startswith("  ") and not ours:
            trainer += cumulative
    return trainer, ours, out.stdout.split()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--beside", type=Path, help="another checkout, measured in turn with this one")
    parser.add_argument("--json", type=Path)
    options = parse_options(parser, argv)
    checkouts = {"import_hf_sl2o": ROOT}
    if options.beside is not None:
        if not (options.beside / "hf_sl2o").is_dir():
            raise ValueError(f"--beside is {options.beside}, expected a checkout: a folder that holds hf_sl2o")
        checkouts["import_hf_sl2o_beside"] = options.beside
    times: dict[str, list[float]] = {"import_trainer": [], **{name: [] for name in checkouts}}
    added: dict[str, list[str]] = {}
    for checkout in checkouts.values():  # as for a user, whose first import has compiled it
        compileall.compile_dir(checkout / "hf_sl2o", quiet=2)
    for _ in range(options.rounds):
        for name, checkout in checkouts.items():
            trainer, ours, added[name] = measured(checkout)
            times[name].append(ours)
            times["import_trainer"].append(trainer)
    rows = [row(name, values) for name, values in times.items()]
    modules = {name: {"modules": len(of), "not_ours": [m for m in of if not m.startswith("hf_sl2o")]}
               for name, of in added.items()}  # fmt: skip
    result = {"rounds": options.rounds, "rows": rows, "adds": modules, "environment": environment()}
    for entry in rows:
        print(
            f"{entry['name']:24} {entry['value']:.4f} s ({entry['quartiles'][0]:.4f} to {entry['quartiles'][1]:.4f})"
        )
    if options.json:
        save_json(options.json, result)
    return result


if __name__ == "__main__":
    run_script(main)
