"""Writes the tables of README.md, RESULTS.md and docs/programs.md from the JSON results; `--check`: do they differ?"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from study_tables import STUDIES

from hf_sl2o.experiments.levels import at_edge, paid_for_rules
from hf_sl2o.experiments.table import table
from hf_sl2o.foundation.files import load_json

# Benchmarks whose results are rows alone.
TIMED = (
    "optimizer_step",
    "basis",
    "memory",
    "communication",
    "rule_kernel",
    "rule_step",
    "import_time",
    "average_cost",
)
BLOCKS = {
    "e2e": ROOT / "recipes" / "results" / "gpt2_e2e.json",
    **{name.replace("_", "-"): ROOT / "benchmarks" / "results" / f"{name}.json" for name in TIMED},
    "rule-default": ROOT / "recipes" / "results" / "rule_default.json",
    "rule-default-lora": ROOT / "recipes" / "results" / "rule_default_lora.json",
    "pretrained": ROOT / "recipes" / "results" / "pretrained.json",
    "pretrained-300": ROOT / "recipes" / "results" / "pretrained_300.json",
    "pretrained-long": ROOT / "recipes" / "results" / "pretrained_1000.json",
    "pretrained-rates": ROOT / "recipes" / "results" / "pretrained_rates.json",
    "pretrained-choosing": ROOT / "recipes" / "results" / "pretrained_choosing.json",
    "rule-default-pretrained": ROOT / "recipes" / "results" / "rule_default_pretrained.json",
    "meta-cost": ROOT / "benchmarks" / "results" / "meta_training.json",
    "meta-processes": ROOT / "benchmarks" / "results" / "meta_processes.json",
    "resnet8": ROOT / "recipes" / "results" / "resnet8_cifar.json",
    "resnet20-cores": ROOT / "recipes" / "results" / "resnet20_cores_cifar.json",
    "resnet20": ROOT / "recipes" / "results" / "resnet20_cifar.json",
    "vit-lora": ROOT / "recipes" / "results" / "vit_small_lora_cifar.json",
    "deit-tiny-500": ROOT / "recipes" / "results" / "deit_tiny_500_lora_cifar.json",
    "deit-tiny-quick": ROOT / "recipes" / "results" / "deit_tiny_quick_lora_cifar.json",
    "deit-tiny-2000": ROOT / "recipes" / "results" / "deit_tiny_2000_lora_cifar.json",
    "deit-tiny": ROOT / "recipes" / "results" / "deit_tiny_lora_cifar.json",
    "gpu": ROOT / "benchmarks" / "results" / "gpu.json",
    "peft-tuners": ROOT / "benchmarks" / "results" / "peft_tuners.json",
    **{name.replace("_", "-"): ROOT / "recipes" / "results" / f"study_{name}.json" for name in STUDIES},
}


def made_at(result: dict) -> str:  # type: ignore[type-arg]
    """Commit and device of a result."""
    made = result["environment"]
    changes = " with uncommitted changes" if made["dirty"] else ""
    device = "on a CPU" if made["device"].startswith("cpu") else f"on an {made['device']}"
    return f"Made at commit {made['commit'][:7]}{changes} {device}"


def rows_of(result: dict) -> str:  # type: ignore[type-arg]
    lines = ["| | median | quartiles | ratio |", "|---|---|---|---|"]
    for row in result["rows"]:
        low, high = row.get("quartiles", (row["value"],) * 2)
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(f"| {row['name']} | {row['value']:.3g} {row['unit']} | {low:.3g} to {high:.3g} | {ratio} |")
    return "\n".join(lines)


def gpu(result: dict) -> str:  # type: ignore[type-arg]
    """The step's cost, and the main job's arms with their losses on the way."""
    runs, cost = result["main_job"]["runs"], result["main_job"]["amortised"]
    points = (10, 20, 50, 100)
    lines = ["| arm | learning rate | " + " | ".join(f"loss after {step}" for step in points) + " | peak (GB) |"]
    lines.append("|---" * (3 + len(points)) + "|")
    for arm, run in runs.items():
        losses = [next(loss for at, loss in run["eval"] if at == step) for step in points]
        peak = run["peak_bytes"] / 1e9
        lines.append(
            f"| {arm} | {run['learning_rate']:g} | {' | '.join(f'{loss:.3f}' for loss in losses)} | {peak:.1f} |"
        )
    last = runs["adamw"]["eval"][-1]
    return (
        rows_of(result)
        + "\n\n"
        + "\n".join(lines)
        + f"\n\nn = {result['main_job']['n']:,}, d = {result['main_job']['recipe']['dim']}, one seed. adamw, of all "
        + f"weights, ends at {last[1]:.3f} after {last[0]} steps ({runs['adamw']['seconds']:.0f} s), which are the "
        + f"trajectory; PCA took {cost['seconds']['extract']:.0f} s. {made_at(result)}."
    )


def e2e(result: dict) -> str:  # type: ignore[type-arg]
    cost, seeds = result["amortised"], len(next(iter(result["runs"].values()))["seeds"])
    targets = [f"`{name}`: {entry['target']:.3f}" for name, entry in result["steps_to"].items()]
    final = {arm: run["final_eval_loss"] for arm, run in result["runs"].items()}
    fastest = [
        f"to `{name}` "
        + ", ".join(f"{arm} {run[2]} ({run[1]:g})" for arm, run in entry["fastest_of_grid"].items() if run is not None)
        for name, entry in result["steps_to"].items()
    ]
    last = {arm: run["eval"][-1][0] for arm, run in result["runs"].items()}
    alone = [arm for arm, run in result["runs"].items() if len(run["finalists"]) < min(2, len(run["grid"]))]
    except_of = f" (of {', '.join(alone)} only the best)" if alone else ""
    return (
        table(result)
        + f"\n\nn = {result['n']:,}, d = {result['recipe']['dim']}, {seeds} seeds; {last['adamw']} steps of adamw, "
        + f"of all weights, {last['sl2o']} of the others. Learning rates: a grid with one seed, then the lower mean "
        + f"of its two best over all seeds{except_of}, by the final validation loss. "
        + f"Targets: {'; '.join(targets)}. Steps of the first seed at the rate of each grid "
        + f"that is fastest instead: {'; '.join(fastest)}. Paid once: "
        + f"{cost['trajectory']} steps of trajectory (chosen among runs of {cost['other_recorded_runs']} more), "
        + f"{cost['meta_training']} of meta-training, {cost['seconds']['extract']:.1f} s of PCA. "
        + '"never": at least one seed does not get there. '
        + f"sl2o ends {100 * (final['sl2o'] / final['adamw'] - 1):+.1f} % from the mean of full-space AdamW (seeds: "
        + f"{', '.join(f'{curve[-1][1]:.3f}' for curve in result['runs']['adamw']['eval_per_seed'])}). "
        + f"{made_at(result)}."
    )


def cell(value: float | None) -> str:
    return "never" if value is None else f"{value:.0f}"


def rule(result: dict) -> str:  # type: ignore[type-arg]
    """Per unseen task: what each optimizer ends at, and steps to the level of each baseline."""
    ours = list(next(iter(result["summary"].values()))["mean_ratios"])
    names = {"sl2o": "sl2o", "sl2o_last": "sl2o not averaged"}
    lines = ["| task | optimizer | learning rate | final loss | its steps there |"]
    lines[0] += "".join(f" steps of {names[arm]} there |" for arm in ours)
    lines.append("|---" * (5 + len(ours)) + "|")
    for name, task in result["tasks"].items():
        for arm, run in task["runs"].items():
            steps = task["levels"][arm]["steps_of_mean"] if arm in task["levels"] else None
            there = [""] * (1 + len(ours)) if steps is None else [cell(steps[of]) for of in (arm, *ours)]
            rate = f"{run['learning_rate']:g}" + (", not tuned" if len(run["grid"]) == 1 else "")
            lines.append(f"| {name} | {arm} | {rate} | {run['final_eval_loss']:.3f} | {' | '.join(there)} |")
    edge = [
        f"{arm} ({task})"
        for task, entry in result["tasks"].items()
        for arm, run in entry["runs"].items()
        if len(rates := [lr for lr, _ in run["grid"]]) > 1 and run["learning_rate"] in (min(rates), max(rates))
    ]
    ratios = [
        f"{level}: {', '.join('not on every task' if value is None else f'{value:.2f}' for value in means.values())}"
        for level, means in ((level, entry["mean_ratios"]) for level, entry in result["summary"].items())
    ]
    lines += [
        "",
        f"{result['recipe']['steps']} steps with linear decay, {result['recipe']['seeds']} seeds; a level is reached "
        f"when the mean over seeds is within {100 * (result['recipe']['tolerance'] - 1):.0f} % of it. "
        f"Steps of {', and of '.join(names[arm] for arm in ours)} over the optimizer's own, mean over "
        f"tasks: {'; '.join(ratios)}. "
        + (f"At the edge of what was run, a better rate may lie outside: {', '.join(edge)}. " if edge else "")
        + f"{made_at(result)}.",
    ]
    return "\n".join(lines)


def pretrained(result: dict) -> str:  # type: ignore[type-arg]
    """Each arm over all cells, then the ratios of each cell."""
    cells, overall = result["cells"], result["summary"]["all"]
    arms = sorted(overall, key=lambda arm: overall[arm]["geometric_mean"] or float("inf"))
    lengths = [group for group in result["summary"] if group != "all"]
    number = lambda value: "diverged" if value is None else f"{value:.3g}"  # noqa: E731
    heads = ["arm", "over all", *lengths, "worst", "mean share of the steps", "place among the untuned"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for arm in arms:
        entry = overall[arm]
        shares = [cell["share_of_steps"][arm] for cell in cells.values()]
        there = [share for share in shares if share is not None]
        share = f"{sum(there) / len(there):.2f}" if there else ""
        share += f" (in {len(there)} of {len(shares)})" if len(there) < len(shares) else ""
        means = [number(result["summary"][group][arm]["geometric_mean"]) for group in lengths]
        rank = f"{entry['rank']:.1f}" if "rank" in entry else "tuned"
        where = f"{number(entry['worst'][1])}: {entry['worst'][0]}"
        lines.append(f"| {' | '.join([arm, number(entry['geometric_mean']), *means, where, share, rank])} |")
    lines += ["", "| task, steps | loss of adamw (rate) | " + " | ".join(a for a in arms if a != "adamw") + " |"]
    lines.append("|---" * (len(arms) + 1) + "|")
    for name, cell in cells.items():
        tuned = cell["runs"]["adamw"]
        ratios = [number(cell["ratio"][arm]) for arm in arms if arm != "adamw"]
        lines.append(
            f"| {name} | {tuned['final_eval_loss']:.4g} ({tuned['learning_rate']:g}) | {' | '.join(ratios)} |"
        )
    recipe = result["recipe"]
    lines += ["", f"{recipe['seeds']} seeds. {made_at(result)}."]
    return "\n".join(lines)


def rates(result: dict) -> str:  # type: ignore[type-arg]
    """Final losses of the rule at rates that are wrong, over that at 1."""
    given = [f"{rate:g}" for rate in result["recipe"]["learning_rates"]]
    lines = [
        "| task, steps | loss at 1 | " + " | ".join(f"at {rate}" for rate in given) + " | largest over smallest |"
    ]
    lines.append("|---" * (len(given) + 3) + "|")
    for name, cell in result["cells"].items():
        losses = {rate: cell["runs"][f"sl2o_x{rate}"]["final_eval_loss"] for rate in given}
        shares = [f"{losses[rate] / losses['1']:.3f}" for rate in given]
        spread = result["spread_over_rates"]["cells"][name]
        lines.append(f"| {name} | {losses['1']:.4g} | {' | '.join(shares)} | {spread:.3f} |")
    mean = result["spread_over_rates"]["geometric_mean"]
    return "\n".join([*lines, "", f"{result['recipe']['seeds']} seeds; geometric mean {mean:.3f}. {made_at(result)}."])


def choosing(result: dict) -> str:  # type: ignore[type-arg]
    """Final losses of the shipped rule, and of the other designs over them, on the networks for choosing."""
    others = {"with distance": "pretrained_choosing_distance", "longer runs": "pretrained_choosing_long"}
    results = {name: load_json(ROOT / "recipes" / "results" / f"{file}.json") for name, file in others.items()}
    lines = ["| task, steps | shipped | " + " | ".join(f"{name}, over it" for name in results) + " |"]
    lines.append("|---" * (len(results) + 2) + "|")
    means = dict.fromkeys(results, 1.0)
    for cell, entry in result["cells"].items():
        ours = entry["runs"]["sl2o"]["final_eval_loss"]
        ratios = {
            name: other["cells"][cell]["runs"]["sl2o"]["final_eval_loss"] / ours for name, other in results.items()
        }
        means = {name: means[name] * ratio for name, ratio in ratios.items()}
        lines.append(f"| {cell} | {ours:.4g} | {' | '.join(f'{ratio:.3f}' for ratio in ratios.values())} |")
    mean = [f"{value ** (1 / len(result['cells'])):.3f}" for value in means.values()]
    lines.append(f"| geometric mean | | {' | '.join(mean)} |")
    return "\n".join([*lines, "", f"Averaged, {result['recipe']['seeds']} seeds. {made_at(result)}."])


def meta_cost(result: dict) -> str:  # type: ignore[type-arg]
    lines = ["| | ratio |", "|---|---|"]
    lines += [f"| {row['name']} | {row['ratio']:.2f} |" for row in result["rows"] if row.get("ratio") is not None]
    return "\n".join(lines)


def meta_processes(result: dict) -> str:  # type: ignore[type-arg]
    lines = ["| | inner steps a second | ratio |", "|---|---|---|"]
    for row in result["rows"]:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(
            f"| {row['name']} | {row['value']:.1f} ({min(row['all']):.1f} to {max(row['all']):.1f}) | {ratio} |"
        )
    return "\n".join(lines)


def vision(result: dict) -> str:  # type: ignore[type-arg]
    """Every arm, and in the same unit what was paid before."""
    cost, recipe, runs = result["amortised"], result["recipe"], result["runs"]
    levels = [f"`{name}`: {entry['target']:.3f}" for name, entry in result["steps_to"].items()]
    levels += [f"`{name}`: {100 * entry['target']:.2f} %" for name, entry in result["steps_to_accuracy"].items()]
    per_seed = "; ".join(
        f"{arm} " + ", ".join(f"{100 * value:.2f}" for value in run["test_accuracy_per_seed"])
        for arm, run in runs.items()
    )
    seeds = len(next(iter(runs.values()))["seeds"])
    peak_of = next(iter(result["steps_to_accuracy"])).removesuffix("_best")
    peaks = [max(curve, key=lambda point: point[1])[0] for curve in runs[peak_of]["accuracy_per_seed"]]
    edge = [arm for arm, run in runs.items() if at_edge(run)]
    extraction = f", {cost['seconds']['extract']:.1f} s of PCA" if "extract" in cost["seconds"] else ""
    others = f"(chosen among runs of {cost['other_recorded_runs']} more)"
    trajectory = f"trajectory {cost['trajectory']} {others}, " if extraction else ""
    shared = "" if result["environment"]["device"].startswith("cpu") else ", which several runs shared"
    return (
        table(result)
        + f"\n\nn = {result['n']:,}, {'one seed' if seeds == 1 else f'{seeds} seeds'}, batches of "
        + f"{result['training']['per_device_train_batch_size']}, {result['training']['max_steps']} steps"
        + (f" in the subspace, {recipe['trajectory_steps']} in the full space" if extraction else "")
        + f". Levels on {result['data']['validation']['rows']} validation rows: {'; '.join(levels)}. "
        + f"{peak_of}'s {'seed has its' if seeds == 1 else 'seeds have their'} best after "
        + f"{', '.join(map(str, peaks))} steps. "
        + ('"never": at least one seed does not get there. ' if seeds > 1 else "")
        + (
            f"The chosen rate is at the edge of its grid, and a better one may lie outside: {', '.join(edge)}. "
            if edge
            else ""
        )
        + f"Test accuracy by seed, {result['data']['test']['rows']} rows, %: {per_seed}."
        + (
            f" Paid once, in training steps: {trajectory}meta-training {cost['meta_training']}{extraction}."
            if cost["total"]
            else ""
        )
        + paid_for_rules(cost)
        + f" {made_at(result)}{shared}."
    )


def peft_tuners(result: dict) -> str:  # type: ignore[type-arg]
    """A row for each tuner: whether it trains, what it needs, and its losses."""
    lines = ["| tuner | | numbers | loss at the start | sl2o | AdamW | its rate |", "|---|---|---|---|---|---|---|"]
    rows, rates = result["tuners"], result["rates"]
    verdicts = []
    for name, row in rows.items():
        trains = row["trains"]
        verdict = "trains" if trains["sl2o"] else "moves little" + ("" if trains["adamw"] else ", also with AdamW")
        verdict = verdict if row["error"] is None else "does not run here"
        verdicts.append(verdict.partition(",")[0])
        more = f"; needs {row['needs']}" if row["needs"] else f": {row['error']}" if row["error"] else ""
        cells = [name, verdict + more]
        cells.append(str(row.get("trainable", "")))
        cells += ["" if row.get(key) is None else f"{row[key]:.3g}" for key in ("start", "sl2o", "adamw")]
        lines.append(f"| {' | '.join(cells)} | {row.get('adamw_rate', '')} |")
    edge = sum(row.get("adamw_rate") in (min(rates), max(rates)) for row in rows.values())
    counts = ", ".join(f"{verdict} {verdicts.count(verdict)}" for verdict in dict.fromkeys(verdicts))
    return "\n".join(lines) + (
        f"\n\nOf {len(rows)}: {counts}. Trains: the loss falls by more than {100 * result['least']:g} %. PEFT "
        f"{result['environment']['versions']['peft']}, {result['steps']} steps, one seed; AdamW at the best of "
        f"{', '.join(f'{rate:g}' for rate in rates)}, for {edge} at the edge of these, where a better one may lie "
        f"outside. "
        + (f"Not tried: {', '.join(result['not_tried'])}. " if result["not_tried"] else "")
        + f"{made_at(result)}."
    )


MAKE = {
    "resnet8": vision,
    "resnet20-cores": vision,
    "resnet20": vision,
    "vit-lora": vision,
    "deit-tiny-500": vision,
    "deit-tiny-quick": vision,
    "deit-tiny-2000": vision,
    "deit-tiny": vision,
    "gpu": gpu,
    "peft-tuners": peft_tuners,
    "e2e": e2e,
    **{name.replace("_", "-"): rows_of for name in TIMED},
    "rule-default": rule,
    "rule-default-lora": rule,
    "pretrained": pretrained,
    "pretrained-300": pretrained,
    "pretrained-long": pretrained,
    "pretrained-rates": rates,
    "pretrained-choosing": choosing,
    "rule-default-pretrained": rule,
    "meta-cost": meta_cost,
    "meta-processes": meta_processes,
    **{
        name.replace("_", "-"): lambda result, make=make: f"{make(result)}\n\n{made_at(result)}."
        for name, make in STUDIES.items()
    },
}


def render(text: str) -> str:
    for name, path in BLOCKS.items():
        if not path.is_file() or f"<!-- {name} -->" not in text:
            continue
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}{MAKE[name](load_json(path))}\n{end}{tail}"
    return text


def main(check: bool) -> str | None:
    """Renders the files; with `check` says which one differs instead."""
    for name in ("README.md", "RESULTS.md", "docs/programs.md"):
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        if check and render(old) != old:
            return f"{name} differs from the results: python benchmarks/readme_table.py"
        path.write_text(render(old), encoding="utf-8")
    return None


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
