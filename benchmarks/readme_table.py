"""Writes the README's tables from the JSON results; `--check` fails if they differ from what is committed."""

from __future__ import annotations

import sys
from pathlib import Path

from hf_sl2o.comparison import table
from hf_sl2o.files import load_json

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = {
    "e2e": ROOT / "recipes" / "results" / "gpt2_e2e.json",
    "step-cost": ROOT / "benchmarks" / "results" / "step_cost.json",
}


def step_cost(result: dict) -> str:  # type: ignore[type-arg]
    lines = ["| | median | quartiles | ratio |", "|---|---|---|---|"]
    for row in result["rows"]:
        low, high = row["quartiles"]
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(f"| {row['name']} | {row['value']:.3g} {row['unit']} | {low:.3g} to {high:.3g} | {ratio} |")
    return "\n".join(lines)


def e2e(result: dict) -> str:  # type: ignore[type-arg]
    cost, seeds = result["amortised"], len(next(iter(result["runs"].values()))["seeds"])
    targets = [f"`{name}`: {entry['target']:.3f}" for name, entry in result["steps_to"].items()]
    final = {arm: run["final_eval_loss"] for arm, run in result["runs"].items()}
    fastest = []
    for name, entry in result["steps_to"].items():
        units, lr, steps = entry["fastest_of_grid"]["subspace_adamw"]
        fastest.append(f"{steps} steps (learning rate {lr:g}) to `{name}`")
    return (
        table(result)
        + f"\n\nn = {result['n']:,}, d = {result['recipe']['dim']}, {seeds} seeds. Learning rates: a grid with one "
        + "seed, then the lower mean of its two best over all seeds, by the final validation loss. "
        + f"Targets: {'; '.join(targets)}. With the learning rate of its grid that is "
        + f"fastest to the target instead, AdamW in whitened units needs {' and '.join(fastest)}. Paid once: "
        + f"{cost['trajectory']} steps of trajectory, {cost['meta_training']} of meta-training, "
        + f'{cost["seconds"]["extract"]:.1f} s of PCA. "never": at least one seed does not get there. sl2o ends '
        + f"{100 * (final['sl2o'] / final['adamw'] - 1):+.1f} % from the mean loss of full-space AdamW (its seeds: "
        + f"{', '.join(f'{curve[-1][1]:.3f}' for curve in result['runs']['adamw']['eval_per_seed'])}). "
        + f"Made at commit {result['environment']['commit'][:7]}."
    )


def render(text: str) -> str:
    for name, path in BLOCKS.items():
        if not path.is_file():
            continue
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        make = e2e if name == "e2e" else step_cost
        text = f"{head}{begin}{make(load_json(path))}\n{end}{tail}"
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        sys.exit(0 if render(old) == old else "README.md differs from the results: python benchmarks/readme_table.py")
    readme.write_text(render(old), encoding="utf-8")
