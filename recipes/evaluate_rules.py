"""Judges the shipped rules on networks and data that they never saw, beside tuned optimizers in the same coordinates.

    python recipes/evaluate_rules.py --what default --data PATH --json recipes/results/rule_default.json
    python recipes/evaluate_rules.py --what default-lora --data PATH --json recipes/results/rule_default_lora.json

`default`: 40 coefficients in whitened units. The rule is not tuned; AdamW (whitened), momentum and SGD (the better of
whitened and orthonormal units) are, on validation; so are AdamW in a random subspace and in the full space.
`default-lora`: the scalars of LoRA factors. AdamW with its tuned rate and with its usual 2e-4, and momentum.
The rule is evaluated at its running average, as in a Trainer, and without; AdamW and momentum too. Every learning rate
decays linearly to zero. Killed and started again it goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_sl2o import Rule
from hf_sl2o.experiments.command_line.flags import load_named, parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.command_line.study import finish, study_parser
from hf_sl2o.experiments.figures import plot_tasks
from hf_sl2o.experiments.judging import OURS, TOLERANCE, judge, summary
from hf_sl2o.experiments.kept.files import read_object
from hf_sl2o.experiments.on_task import compare_on
from hf_sl2o.experiments.tasks.named import arms_of, check_tasks, full_space_loss, lora_task, subspace_task
from hf_sl2o.rules import SHIPPED_RULES

# Fixed before the rules were trained; none is in recipes/meta_train.py.
UNSEEN = {
    "default": ("cifar-resnet8", "cifar-vit", "docs-gru"),
    "default-lora": ("e2e-gpt2", "cifar-vit", "code-llama"),
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = study_parser(
        __doc__, data="embedded", steps=200, seeds=3, rank=8, output_dir=Path("outputs/evaluate_rules"),
        tasks_dir=Path("outputs/meta_train/tasks"),
    )  # fmt: skip
    parser.add_argument("--what", choices=sorted(UNSEEN), default="default")
    parser.add_argument("--rule", help="a folder or Hub id; default: the shipped rule of that name")
    parser.add_argument("--tasks", nargs="+", help="default: the unseen ones")
    options = parse_options(parser, argv)
    names = options.tasks or UNSEEN[options.what]
    check_tasks(names, options.data, plain=True, lora=options.what == "default-lora")
    where = options.rule or SHIPPED_RULES / options.what
    rule = load_named("rule", where, lambda: Rule.from_pretrained(where))
    provenance(options.rule or SHIPPED_RULES / options.what)  # what is wrong with it is said before
    results: dict[str, Any] = {}
    for name in names:
        if options.what == "default":
            task = subspace_task(name, options.data, options.tasks_dir)
        else:
            task = lora_task(name, options.data, options.tasks_dir, options.rank)
        arms, cache = arms_of(options.what, rule, options.steps, task.basis.layout), options.output_dir / options.what
        runs = compare_on(task, arms, options.steps, seeds=options.seeds, cache=cache)
        results[task.name] = {"d": task.basis.dim, "runs": runs, "levels": judge(runs)}
        if options.what == "default":
            results[task.name]["full_space_loss"] = full_space_loss(name, options.data, options.tasks_dir)
        print(f"{task.name} (d = {task.basis.dim:,})")
        for arm, run in runs.items():
            print(f"  {arm:30} lr {run['learning_rate']:<8g} final held-out loss {run['final_eval_loss']:.4f}")
        for level, entry in results[task.name]["levels"].items():
            steps = {arm: entry["steps_of_mean"][arm] for arm in (*OURS, level) if arm in runs}
            print(f"  to {level}'s {entry['loss']:.4f} (+1 %): " + ", ".join(f"{k} {v}" for k, v in steps.items()))
    result = {
        "recipe": {"what": options.what, "steps": options.steps, "seeds": options.seeds, "tolerance": TOLERANCE},
        "rule": {
            "fingerprint": rule.fingerprint,
            "provenance": provenance(options.rule or SHIPPED_RULES / options.what),
        },
        "tasks": results,
        "summary": summary(results),
    }
    for level, entry in result["summary"].items():
        print(f"mean over tasks, steps over those of {level} to {level}'s final loss: {entry['mean_ratios']}")
    draw = lambda _, path: plot_tasks({name: entry["runs"] for name, entry in results.items()}, path)  # noqa: E731
    return finish(result, options.json, draw)


def provenance(folder: str | Path) -> Any:
    path = Path(folder) / "provenance.json"
    if not path.is_file():
        return None
    known = read_object(path)
    return {key: known[key] for key in ("command", "tasks", "seconds") if key in known}


if __name__ == "__main__":
    run_script(main)
