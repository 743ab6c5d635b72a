"""What a rule gains from seeing more than the paper's two inputs, and from its run's schedule.

    python recipes/study_inputs.py --rule default --data PATH --json recipes/results/study_inputs_default.json

Each variant changes one thing of the plan by which `recipes/meta_train.py` makes a shipped rule; the score is the
rule's mean of (held-out loss / held-out loss before training) at N/8, N/4, N/2 and N, on the tasks it was trained on.
Tasks on which rules are judged (evaluate_rules.py) play no part. Killed and started again it goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import meta_train

from hf_sl2o.comparison import environment
from hf_sl2o.files import save_json

VARIANTS: dict[str, list[str]] = {
    "plan: scale of the tensor, progress": [],
    "no scale of the tensor": ["--tensor_scale", "False"],
    "no progress": ["--progress", "False"],
    "neither": ["--tensor_scale", "False", "--progress", "False"],
    "plan, momenta 0.5 and 0.99": ["--momenta", "0.5", "0.99"],
    "plan, sum of losses": ["--meta_loss", "sum"],
    "plan, no random scaling": ["--random_scaling", "0"],
}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 0.5 * len(rows) + 1.5), layout="constrained")
    for y, row in enumerate(rows):
        axis.plot(row["scores"], [y] * len(row["scores"]), "o", color="C0")
        axis.plot(sum(row["scores"]) / len(row["scores"]), y, "|", color="black", markersize=18)
    axis.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axis.set(xlabel="score: held-out loss over that before training, lower is better (a dot a seed)")
    axis.invert_yaxis()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rule", choices=sorted(meta_train.PLANS), default="default")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output_dir", default="outputs/meta_train")
    options, rest = parser.parse_known_args(argv)
    rows = []
    for variant in options.variants:
        if variant == "plan, no random scaling" and not meta_train.PLANS[options.rule].settings.get("random_scaling"):
            continue
        results = []
        for seed in range(options.seeds):
            name = f"inputs-{options.rule}-{variant.replace(' ', '-').replace(',', '')}-{seed}"
            words = ["--rule", options.rule, "--name", name, "--output_dir", options.output_dir, "--seed", str(seed)]
            results.append(meta_train.main([*words, *VARIANTS[variant], *rest]))
        rows.append(
            {
                "variant": variant,
                "scores": [result["best_score"] for result in results],
                "validation": [
                    min(result["validation"], key=lambda e: e["score"])["validation"] for result in results
                ],
            }
        )
        print(f"{variant:36} " + " ".join(f"{score:.4f}" for score in rows[-1]["scores"]), flush=True)
    settings = {"rule": options.rule, "seeds": options.seeds, "command_line": meta_train.portable(rest)}
    result = {"study": "inputs", **settings, "rows": rows, "environment": environment(Path(__file__).parent)}
    if options.json:
        save_json(options.json, result)
        plot(rows, options.json.with_suffix(".png"))
    return result


if __name__ == "__main__":
    main()
