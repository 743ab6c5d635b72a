"""A comparison as a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def table(comparison: Mapping[str, Any]) -> str:
    """Returns the comparison as a Markdown table, fastest to the first target (or lowest loss) first."""
    names, accuracies = list(comparison["steps_to"]), list(comparison.get("steps_to_accuracy", ()))
    tested = all("test_accuracy_per_seed" in run for run in comparison["runs"].values())
    heads = ["arm", "learning rate", "validation loss", *["test accuracy"] * tested]
    heads += [f"steps to {name}" for name in (*names, *accuracies)]
    rows = [[*heads, "seconds", "state (kB)"]]

    def order(item: tuple[str, Any]) -> tuple[float, float]:
        steps = comparison["steps_to"][names[0]]["steps"].get(item[0]) if names else None
        return (float("inf") if steps is None else steps, item[1]["final_eval_loss"])

    for arm, run in sorted(comparison["runs"].items(), key=order):
        steps = [comparison["steps_to"][name]["steps"].get(arm) for name in names]
        steps += [comparison["steps_to_accuracy"][name]["steps"].get(arm) for name in accuracies]
        tests = run["test_accuracy_per_seed"] if tested else []
        rows.append(
            [
                arm,
                f"{run['learning_rate']:g}",
                f"{run['final_eval_loss']:.3f}",
                *([f"{100 * sum(tests) / len(tests):.2f} %"] if tested else []),
                *("never" if value is None else f"{value:.0f}" for value in steps),
                f"{run['seconds']:.0f}",
                f"{run['state_bytes'] / 1e3:.1f}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
