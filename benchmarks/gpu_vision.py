"""The vision recipes at the size of a GPU: their own stages, with runs that do not wait for each other side by side.

    python benchmarks/gpu_vision.py --data FOLDER --output_dir OUT --processes 8
    python benchmarks/gpu_vision.py --data FOLDER --jobs resnet20 --set resnet20 trajectory_steps=39100
    python benchmarks/gpu_vision.py --data FOLDER --jobs resnet20 --output_dir OUT --gather    # OUT came from a GPU

FOLDER holds train.parquet and test.parquet of CIFAR-10. A small network leaves most of a GPU idle, so several runs
share it; what one run takes alone is in none of these results. Each job ends in OUT/<job>/comparison.json, which is
what the recipe writes, and goes on where it was killed.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hf_sl2o.experiments.command_line.flags import parse_options  # noqa: E402
from hf_sl2o.experiments.command_line.script import run_script  # noqa: E402

RESNET = (
    "--quick_grid --validation_rows 2000 --eval_steps 10 --logging_steps 10 --max_steps 300 --meta_epochs 12 "
    "--inner_steps 150 --save_strategy no --logging_nan_inf_filter false"
)
RESNET_ARMS = ("momentum", "sl2o", "sl2o_default", "subspace_adamw", "subspace_momentum", "subspace_sgd", "random")


@dataclass(frozen=True)
class Job:
    """A recipe's command line, and which runs of the full space can go side by side: (arm, rate, seed)."""

    recipe: str
    flags: str
    arms: tuple[str, ...]
    full: tuple[tuple[str, float, int], ...] = ()
    first: bool = False  # theta_0 has to be trained before anything else


JOBS = {
    "resnet18": Job(
        "recipes.resnet_cifar",
        f"--model resnet18 --baselines paper --seeds 1 --trajectory_steps 39100 {RESNET}",
        ("sl2o", "momentum", "sl2o_default", "subspace_adamw", "subspace_momentum", "subspace_sgd"),
        (("sgd", 0.1, 0), ("momentum", 0.1, 0)),
    ),
    "resnet20": Job(
        "recipes.resnet_cifar",
        f"--model resnet20 --trajectory_steps 3910 {RESNET}",
        ("sl2o", *(arm for arm in RESNET_ARMS if arm != "sl2o")),
        tuple(("momentum", lr, seed) for lr in (0.1, 0.03) for seed in range(3)),
    ),
    "resnet8": Job(
        "recipes.resnet_cifar",
        f"--model resnet8 --trajectory_steps 10000 {RESNET}",
        ("sl2o", *(arm for arm in RESNET_ARMS if arm != "sl2o")),
        tuple(("momentum", lr, seed) for lr in (0.1, 0.03) for seed in range(3)),
    ),
    "deit-tiny": Job(
        "recipes.vit_cifar",
        # 20 epochs of what was held back, as the paper's
        "--model deit-tiny --subspace lora --base_steps 3000 --max_steps 4200 --trajectory_steps 4200 --quick_grid "
        "--validation_rows 1500 --eval_rows 3000 --eval_steps 60 --logging_steps 60 --meta_epochs 8 --inner_steps 300 "
        "--save_strategy no --logging_nan_inf_filter false --trajectory_learning_rates 0.0001 0.0003 0.001 0.003",
        ("sl2o", "sl2o_default-lora", "adamw"),
        # every rate with the first seed, and what are likely to be the two best with the others
        tuple(("adamw", lr, seed) for lr in (3e-4, 1e-3) for seed in range(3))
        + (("adamw", 1e-4, 0), ("adamw", 3e-3, 0)),
        first=True,
    ),
}


def command_line(job: str, options: argparse.Namespace) -> list[str]:
    changes = [setting.split("=", 1) for name, *settings in options.set for setting in settings if name == job]
    flags = [part for name, value in changes for part in (f"--{name}", *value.split())]
    given = ["--data", str(options.data), "--output_dir", str(options.output_dir / job)]
    return [*JOBS[job].flags.split(), *given, *flags, *(["--use_cpu"] if options.use_cpu else [])]


def arms_of(job: str, options: argparse.Namespace) -> tuple[str, ...]:
    """The job's arms, and one for each rule that `--set JOB rules=...` names."""
    from hf_sl2o.experiments.arms import rule_arms

    flags = command_line(job, options)
    rules = flags[flags.index("--rules") + 1 :] if "--rules" in flags else []
    until = next((i for i, part in enumerate(rules) if part.startswith("--")), len(rules))
    return tuple(dict.fromkeys((*JOBS[job].arms, *rule_arms(rules[:until]))))


def parse(job: str, options: argparse.Namespace) -> tuple[Any, tuple[str, ...], Any]:
    """The recipe's and the Trainer's arguments of a job, and its arms."""
    from hf_sl2o.experiments.command_line.recipe import parse_recipe

    module: Any = importlib.import_module(JOBS[job].recipe)
    recipe, args = parse_recipe(module.RecipeArguments, command_line(job, options), module.DEFAULTS)
    return recipe, arms_of(job, options), args


def child(options: argparse.Namespace) -> None:
    """One process: `prepare`, `rule`, `full ARM RATE SEED`, `seed ARM SEED` of a rule, or `arms ARM...`."""
    job, what, *rest = options.child
    module: Any = importlib.import_module(JOBS[job].recipe)
    if what == "arms":
        module.main([*command_line(job, options), "--arms", *rest])
        return
    from hf_sl2o.experiments.tuning import choices

    parsed, _, args = parse(job, options)
    recipe = module.Recipe(parsed, args)
    if what == "full":
        arm, rate, seed = rest
        recipe.one(arm, recipe.arms[arm], ("full", float(rate)), int(seed))
    elif what == "rule":
        recipe.make_rule(recipe.make_basis({}), {})
    elif what == "seed":
        arm, seed = rest
        basis = recipe.load_basis()
        rule = recipe.make_rule(basis, {}) if arm == "sl2o" else None
        (choice,) = choices(recipe.arms[arm].grid, one_unit=parsed.subspace in ("lora", "random"))
        recipe.one(arm, recipe.arms[arm], choice, int(seed), basis, rule)


def gather(job: str, options: argparse.Namespace) -> None:
    """Writes the table of runs that were all made elsewhere: nothing is trained, a missing run is an error.

    Weights and bases are too large to be brought along and are not needed: what the runs kept is.
    """
    from hf_sl2o import Layout, LSTMRule, RandomBasis
    from hf_sl2o.experiments.environment import environment
    from hf_sl2o.experiments.kept.files import read_object
    from hf_sl2o.foundation.files import save_json

    class Gathered(importlib.import_module(JOBS[job].recipe).Recipe):  # type: ignore[misc]
        def train_base(self, *of: Any) -> None:
            pass

        def train_once(self, folder: Path, *of: Any, **objects: Any) -> Any:
            known = read_object(folder / "run.json") if (folder / "run.json").is_file() else {}
            if "eval" not in known:
                raise ValueError(f"{folder} holds no finished run; finish it where it began and bring it here")
            return known

        def keep_best_trajectory(self, folder: Path, run: dict[str, Any]) -> None:
            self.recorded[folder] = run["eval"][-1][1], run["seconds"]

        def publish(self, name: str, best: tuple[str, float]) -> None:
            pass

    # tf32 is refused where there is no GPU
    tf32 = any(setting.lower() == "tf32=true" for group in options.set if group[0] == job for setting in group)
    here = copy.copy(options)
    here.set = [[setting for setting in group if not setting.startswith("tf32=")] for group in options.set]
    parsed, arms, args = parse(job, here)
    parsed.arms = list(arms)
    recipe = Gathered(parsed, args)
    stages = {path.stem: read_object(path, "seconds") for path in (recipe.folder / "stages").glob("*.json")}
    if parsed.subspace.startswith("pca"):
        stages["sample"] = {"seconds": recipe.sample()[1]}
        layout = Layout.from_named_parameters(recipe.start.named_parameters())
        basis = RandomBasis(layout, parsed.dim).to_dense()  # stands for the one that stayed there
    else:
        basis = recipe.load_basis()
    runs = recipe.train(basis, LSTMRule(recipe.rule_config()))
    comparison = recipe.write(runs, stages)
    comparison |= {"environment": read_object(recipe.folder / "environment.json"), "gathered": environment(ROOT)}
    comparison["training"]["tf32"] = tf32
    save_json(recipe.folder / "comparison.json", comparison)


def run(job: str, recipe: Any, arms: tuple[str, ...], options: argparse.Namespace, slots: threading.Semaphore) -> None:
    from hf_sl2o.experiments.environment import environment
    from hf_sl2o.foundation.files import save_json

    plan, start = JOBS[job], time.perf_counter()
    save_json(options.output_dir / job / "environment.json", environment(ROOT))  # for --gather on another machine

    def process(*what: Any) -> None:
        name = "-".join(map(str, (job, *what)))[:80]
        log = options.output_dir / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        flags = [arg for group in options.set for arg in ("--set", *group)]
        flags += ["--use_cpu"] if options.use_cpu else []
        command = [sys.executable, __file__, "--data", str(options.data), "--output_dir", str(options.output_dir)]
        with slots, log.open("w") as out:
            began = time.perf_counter()
            given = [*command, *flags, "--child", job, *map(str, what)]
            code = subprocess.run(given, stdout=out, stderr=subprocess.STDOUT).returncode
        seconds = time.perf_counter() - began
        print(f"[{time.perf_counter() - start:4.0f} s] {name}: {seconds:.0f} s, exit {code}", flush=True)
        if code:
            raise RuntimeError(f"{name} ended with {code}; the end of {log}:\n{log.read_text()[-3000:]}")

    def together(*works: tuple[Any, ...]) -> None:
        with ThreadPoolExecutor(max(1, len(works))) as threads:
            for future in [threads.submit(process, *work) for work in works]:
                future.result()

    def runs_of(arms: tuple[str, ...]) -> list[tuple[Any, ...]]:
        """A process for each seed of a rule, and for each other arm, whose rate has to be found first."""
        rules = [("seed", arm, seed) for arm in arms if arm.startswith("sl2o") for seed in range(recipe.seeds)]
        return [*rules, *(("arms", arm) for arm in arms if not arm.startswith("sl2o"))]

    full = [("full", *choice) for choice in plan.full]
    if plan.first:
        process("prepare")
    if recipe.subspace == "lora":  # nothing is recorded: only the rule of this task has to wait, for its meta-training
        own = tuple(arm for arm in arms if arm == "sl2o")
        others = [work for work in runs_of(arms) if work[1] not in (*own, *(choice[0] for choice in plan.full))]
        with ThreadPoolExecutor(1) as beside:
            rest = beside.submit(together, *full, *others)
            process("rule")
            together(*runs_of(own))
            rest.result()
    else:
        together(*full)  # their snapshots are what the rest needs
        process("rule")
        together(*runs_of(arms))
    process("arms", *arms)
    print((options.output_dir / "logs" / ("-".join((job, "arms", *arms))[:80] + ".log")).read_text(), flush=True)


def options_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gpu_vision"))
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--set", nargs="+", action="append", default=[], metavar="JOB NAME=VALUE")
    parser.add_argument("--processes", type=int, default=8, help="at most so many at a time")
    parser.add_argument("--use_cpu", action="store_true")
    parser.add_argument("--gather", action="store_true", help="only the tables, of runs that were made elsewhere")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parse_options(parser, argv)
    for job, *settings in options.set:
        if job not in JOBS or not settings:
            raise ValueError(f"--set is {[job, *settings]}, expected a job of {', '.join(JOBS)}, and NAME=VALUE")
        if wrong := [setting for setting in settings if not setting.partition("=")[1]]:
            raise ValueError(f"--set {job} has {wrong[0]!r}, expected NAME=VALUE, such as max_steps=300")
    return options  # type: ignore[no-any-return]


def main(argv: list[str] | None = None) -> None:
    options = options_of(argv)
    if options.child:
        child(options)
        return
    if options.gather:
        for job in options.jobs:
            gather(job, options)
        return
    from hf_sl2o.experiments.arguments import check_together
    from hf_sl2o.experiments.data.cifar import parquet_file

    if str(options.data) not in ("embedded", "hub"):
        for split in ("train", "test"):
            parquet_file(str(options.data), split, ("img", "label"))
    parsed = {}
    for job in options.jobs:
        recipe, arms, args = parse(job, options)
        check_together(recipe, args)
        parsed[job] = recipe, arms
    slots = threading.Semaphore(options.processes)
    failed = []
    with ThreadPoolExecutor(len(options.jobs)) as threads:
        jobs = {job: threads.submit(run, job, *parsed[job], options, slots) for job in options.jobs}
        for job, future in jobs.items():
            if error := future.exception():
                failed.append(job)
                print(f"{job}: {error}", file=sys.stderr, flush=True)
    if failed:
        sys.exit(f"not finished: {', '.join(failed)}; the same command goes on")


if __name__ == "__main__":
    run_script(main)
