"""A new task and a budget of N steps: which way of spending it gives the lowest held-out loss at step N?

    python recipes/studies/one_run.py --data PATH --json recipes/results/study_one_run.json

Ours: a constant rate while recording, a basis of that very run, and the last 10 or 20 % of the steps in its subspace,
from the last point or from the mean of the last snapshots; also with a basis of a decay phase, after a decay, with
directions of each layer, and in random directions as a control. Rivals: cosine, linear decay, decay at the end (WSD),
schedule-free AdamW, and averages of the constant run: EMA, LAWA, the last quarter, and trained ones (TWA, Li et al.
2022). Each arm makes N gradients. What is tuned is chosen by held-out loss with one seed, a rate in the subspace
and the peak rate in turn; grids grow at their edges. A finish goes on with the batches that the run would have had.
Seeds differ in their batches. The lowest of many arms is a little flattered, as it is chosen and shown on the same
held-out data; so is that of the rivals. Each run is kept; killed and started again the study goes on. Recorded weights
are deleted at the end.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_sl2o import Basis, RandomBasis, Rule, Task, Trajectory, fit_basis, train_on
from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.command_line.study import finish, study_parser
from hf_sl2o.experiments.figures import canvas
from hf_sl2o.experiments.kept.files import keep, kept, made_once, whole
from hf_sl2o.experiments.kept.keys import stamp
from hf_sl2o.experiments.one_run import (
    described,
    ema_weight,
    going_on,
    loss_at,
    mean_of,
    moments_of,
    train_full,
    verdict,
)
from hf_sl2o.experiments.rivals import adamw, check_rivals, packaged
from hf_sl2o.experiments.tasks.named import check_tasks, full_task, learned
from hf_sl2o.experiments.tuning import Choice, Run, best_of, over_seeds, search
from hf_sl2o.foundation.files import load_tensors, save_tensors
from hf_sl2o.rules import SHIPPED_RULES

TASKS = ("e2e-gpt2", "cifar-resnet8")
RATES = (1e-3, 3e-3, 1e-2)  # peak rates of AdamW in the full space
SNAPSHOTS, DIM, DIM_OF_LAYER = 60, 40, 4
DECAYS, LAST = (0.9, 0.98, 0.995), (5, 10, 20)  # of EMA; snapshots of LAWA, and of the mean from which a finish starts
OF_TWA = 20  # its snapshots
PARTS = (10, 5)  # the finish has a tenth or a fifth of the steps
IN_SUBSPACE = {  # rates, by units and optimizer; the middle one is where the search begins
    ("std", "momentum"): (0.1, 0.3, 1.0), ("std", "adamw"): (0.03, 0.1, 0.3), ("std", "default"): (1.0,),
    ("orthonormal", "momentum"): (0.01, 0.03, 0.1), ("orthonormal", "adamw"): (0.01, 0.03, 0.1),
}  # fmt: skip
BASES = {
    "pca": "PCA", "layer": "PCA of each layer", "decay": "PCA of the decay", "both": "PCA after a decay",
    "random": "random directions", "twa": "TWA",
}  # fmt: skip
ARMS_OF_BASES = {  # where a finish starts, and its optimizers
    "twa": (("mean",), ("momentum", "adamw")),
    "pca": (("last", "mean"), ("momentum", "adamw", "default")),
    "layer": (("last",), ("adamw", "default")),
    "decay": (("last",), ("adamw", "default")),
    "both": (("last",), ("adamw", "default")),
    "random": (("last",), ("adamw",)),
}


def momentum(rate: float) -> Any:
    return lambda c: torch.optim.SGD(c, lr=rate, momentum=0.9)


@dataclass(frozen=True)
class Plan:
    """Steps in the full space: all from the start after a warm-up, or a linear decay of the constant run."""

    schedule: str
    steps: int
    after: int = 0
    every: int = 0  # steps between snapshots; 0: none is kept


@dataclass(frozen=True)
class Finish:
    """The last steps of a run, in a subspace."""

    basis: str
    start: str
    inner: str
    steps: int


class Budget:
    """All runs of `steps` on one task; each is made once and kept."""

    def __init__(self, task: Task, options: argparse.Namespace) -> None:
        self.task, self.steps, self.seeds = task, options.steps, options.seeds
        self.folder = options.output_dir / f"{task.name}-{options.steps}"
        self.key = stamp(task.name, options.data, options.steps)
        self.rule = Rule.from_pretrained(SHIPPED_RULES / "default")
        self.every = options.steps // SNAPSHOTS
        self.warm_up = options.steps // 20
        self.constant = Plan("constant", self.steps, every=self.every)
        self.subspace = functools.lru_cache(maxsize=6)(self._subspace)
        self.averaged_best = functools.lru_cache(self._averaged_best)

    # In the full space

    def full(self, plan: Plan, rate: float, seed: int, *, weights: bool = False) -> Run:
        """Returns the numbers of a run; with `weights` its files are there too."""
        name = f"{plan.schedule}-{plan.after}-{plan.steps}-{rate:g}-seed-{seed}"
        path, where = self.folder / "full" / f"{name}.json", self.folder / "weights" / name
        if whole(known := kept(path), path, self.key, where if weights else None):
            return known
        return made_once(path, self.key, functools.partial(self._train, plan, rate, seed, where), where)

    def weights(self, plan: Plan, rate: float, seed: int) -> Trajectory:
        """Returns the snapshots of a run.

        Raises:
            `FloatingPointError`: it diverged.
        """
        if self.full(plan, rate, seed, weights=True)["diverged"]:
            raise FloatingPointError(f"the run at rate {rate:g} diverged")
        return Trajectory(self.folder / "weights" / f"{plan.schedule}-{plan.after}-{plan.steps}-{rate:g}-seed-{seed}")

    def _train(self, plan: Plan, rate: float, seed: int, where: Path) -> dict[str, Any]:
        trajectory, averaged = Trajectory(where), plan == self.constant
        means: dict[float, list[torch.Tensor]] = {}

        def each(step: int, run: Any, optimizer: torch.optim.Optimizer) -> None:
            if plan.every and (step - plan.after) % plan.every == 0:
                if not all(bool(torch.isfinite(p).all()) for p in run.parameters):
                    raise FloatingPointError(f"rate {rate:g}: the weights are not finite at step {step}")
                trajectory.write(step, run.model.named_parameters())
            if averaged and 10 * step in (6 * self.steps, 8 * self.steps, 9 * self.steps):  # where a decay may begin
                save_tensors(where / f"moments-{step}.safetensors", moments_of(run, optimizer))
            for decay in DECAYS if averaged else ():
                mean = means.setdefault(decay, [torch.zeros_like(p) for p in run.parameters])
                for average, p in zip(mean, run.parameters, strict=True):
                    average.lerp_(p.detach(), ema_weight(step, decay))

        points = {*range(0, self.steps + 1, max(self.steps // 6, 1)), plan.after + plan.steps}
        task, moments = self.task, None
        try:
            if plan.after:
                before = self.weights(self.constant, rate, seed)
                task = going_on(task, load_tensors(before.path(plan.after)), plan.after)
                moments = load_tensors(before.folder / f"moments-{plan.after}.safetensors")
            elif plan.every:
                trajectory.write(0, task.build_model().named_parameters())
            made = train_full(
                task, rate, plan.steps, seed=seed, after=plan.after, moments=moments, evaluate_at=points, each=each,
                schedule=plan.schedule, warm_up=0 if plan.after else self.warm_up,
            )  # fmt: skip
        except FloatingPointError as error:
            print(error, flush=True)
            return {"eval": [[plan.after + plan.steps, math.nan]], "seconds": 0.0, "averages": {}, "diverged": True}
        averages = {}
        if averaged:
            names = self.task.basis.layout.names
            found = {f"decay {decay:g}": dict(zip(names, mean, strict=True)) for decay, mean in means.items()}
            found |= {
                f"last {last}": mean_of(trajectory, trajectory.steps[-last:]) for last in (*LAST, SNAPSHOTS // 4)
            }
            averages = {name: loss_at(self.task, of) for name, of in found.items()}
        return {**made, "averages": averages, "diverged": False}

    def averaged(self, choice: Choice, seed: int = 0) -> Run:
        """The constant run at one of its averages."""
        run = self.full(self.constant, choice[1], seed)
        return {**run, "eval": [[self.steps, run["averages"].get(choice[0], math.nan)]]}

    def schedule_free(self, choice: Choice, seed: int = 0) -> Run:
        make = packaged("schedule_free", "AdamWScheduleFree", warmup_steps=self.warm_up)(choice[1])
        points = {*range(0, self.steps, self.steps // 6), self.steps}
        work = lambda: train_on(self.task, make, self.steps, seed=seed, evaluate_at=points)  # noqa: E731
        return self.kept_run(f"schedule_free-{choice[1]:g}-seed-{seed}", work)

    def kept_run(self, name: str, work: Callable[[], Mapping[str, Any]], *settings: Any) -> Run:
        path, key = self.folder / "runs" / f"{name}.json", stamp(self.key, *settings)
        if (known := kept(path)).get("key") != key:
            made = work()
            keep(path, {"key": key, **{name: made[name] for name in made if name != "train_loss"}})
            known = kept(path)
        return known

    # In the subspace of the run

    def recorded(self, how: Finish) -> Plan:
        """The run whose snapshots give the basis of a finish, and its start."""
        if how.basis == "both":
            return Plan("linear", self.steps - how.steps, every=self.every)
        if how.basis == "decay":
            # a short phase: closer snapshots, as many as there are directions
            return Plan("linear", how.steps, self.steps - 2 * how.steps, max(how.steps // DIM, 1))
        return self.constant

    def _subspace(self, how: str, source: Plan, first: int, rate: float, seed: int) -> tuple[Basis, int]:
        """Returns a basis of the snapshots up to step `first`, and how many they are."""
        if how == "random":
            return RandomBasis(self.task.basis.layout, DIM, seed=1).to_dense(), 0
        trajectory = self.weights(source, rate, seed)
        steps = [step for step in trajectory.steps if step <= first]
        if how == "twa":  # the span of the snapshots themselves
            dim, steps = OF_TWA, steps[-OF_TWA:]
            settings: dict[str, Any] = {"units": "orthonormal", "center": False}
        else:
            dim = DIM_OF_LAYER if how == "layer" else min(DIM, len(steps) - 1)
            settings = {"blocks": "layer" if how == "layer" else "global"}
        return fit_basis(trajectory, dim, steps=steps, progress=False, **settings), len(steps)

    def in_subspace(self, how: Finish, rate: float, lr: float, seed: int) -> Run:
        """The last steps of a run, in a subspace; a result that is there is not made again."""
        first, source = self.steps - how.steps, self.recorded(how)
        make, average = {
            "momentum": (momentum(lr), 0.0),
            "adamw": (adamw(lr), 0.0),
            "default": (learned(self.rule, how.steps)(lr), self.rule.config.average),
        }[how.inner]

        def work() -> dict[str, Any]:
            try:
                trajectory = self.weights(source, rate, seed)
                basis, snapshots = self.subspace(how.basis, source, first, rate, seed)
            except FloatingPointError:
                return {"eval": [[self.steps, math.nan]], "seconds": 0.0, "bytes": 0, "d": 0, "last": 0}
            last = 1 if how.start == "last" else self.averaged_best(source, first, rate, seed)
            start = mean_of(trajectory, [step for step in trajectory.steps if step <= first][-last:])
            made = train_on(
                going_on(self.task, start, first, basis), make, how.steps, seed=seed, schedule="linear",
                average=average, evaluate_at={0, how.steps},
            )  # fmt: skip
            full = self.full(source, rate, seed)
            evals = [point for point in full["eval"] if point[0] < first]
            evals += [[first + step, loss] for step, loss in made["eval"]]
            before = full["seconds"] * min(first / source.steps, 1)
            if source.after:
                constant = self.full(self.constant, rate, seed)
                before = constant["seconds"] * source.after / self.steps + full["seconds"]
                evals = [point for point in constant["eval"] if point[0] <= source.after] + evals
            n = self.task.basis.layout.n
            return {"eval": evals, "seconds": before + made["seconds"], "bytes": 4 * n * snapshots + basis.nbytes,
                    "d": basis.dim, "last": last}  # fmt: skip

        name = f"{how.basis}-{how.start}-{how.inner}-{how.steps}-{rate:g}-{lr:g}-seed-{seed}"
        return self.kept_run(name, work, self.rule.fingerprint if how.inner == "default" else "")

    def _averaged_best(self, source: Plan, first: int, rate: float, seed: int) -> int:
        """Of how many of the last snapshots, of those that LAWA has, the mean is best at step `first`."""
        trajectory = self.weights(source, rate, seed)
        steps = [step for step in trajectory.steps if step <= first]
        return min(LAST, key=lambda last: loss_at(self.task, mean_of(trajectory, steps[-last:])))

    # Arms

    def rivals(self) -> dict[str, dict[str, Any]]:
        """Cosine, linear decay, WSD, constant, its averages, and schedule-free AdamW."""
        n, plain = 4 * self.task.basis.layout.n, [("", rate) for rate in RATES]
        runs: dict[str, tuple[Any, list[Choice], Callable[[Choice], int]]] = {
            name: (self.of_plan(plan), plain, lambda choice: 0)
            for name, plan in (
                ("constant", self.constant),
                ("cosine", Plan("cosine", self.steps)),
                ("linear decay", Plan("linear", self.steps)),
                *((f"WSD, {100 // part} %", Plan("linear", self.steps // part, self.steps - self.steps // part))
                  for part in PARTS),
            )
        }  # fmt: skip
        runs["schedule-free AdamW"] = (self.schedule_free, plain, lambda choice: 0)
        for name, labels, count in (
            ("EMA", [f"decay {decay:g}" for decay in DECAYS], lambda choice: 1),
            ("LAWA", [f"last {last}" for last in LAST], lambda choice: int(choice[0].split()[1])),
            ("mean of the last quarter", [f"last {SNAPSHOTS // 4}"], lambda choice: 1),
        ):
            runs[name] = (self.averaged, [(label, rate) for label in labels for rate in RATES], count)
        arms = {}
        for name, (run, grid, count) in runs.items():
            found = search(run, grid, grow=True)
            best, of_seeds = best_of(found), over_seeds(run, found, self.seeds, 1)[1]
            tuned = {"average": best[0]} if best[0] else {}
            arms[name] = described("rival", best[1], tuned, of_seeds, [found], full=self.steps, extra=n * count(best))
            say(self.task.name, name, arms[name])
        return arms

    def of_plan(self, plan: Plan) -> Callable[..., Run]:
        def run(choice: Choice, seed: int = 0) -> Run:
            made = self.full(plan, choice[1], seed)
            if not plan.after:
                return made
            before = self.full(self.constant, choice[1], seed)
            evals = [point for point in before["eval"] if point[0] <= plan.after] + made["eval"]
            return {**made, "eval": evals, "seconds": before["seconds"] * plan.after / self.steps + made["seconds"]}

        return run

    def of_both_rates(self, how: Finish) -> tuple[float, float, list[dict[Choice, Run]], list[Run]]:
        """Chooses the peak rate, the rate in the subspace at it, and again, until both stay; at most three times."""
        units = "orthonormal" if how.basis in ("twa", "random") else "std"
        grid = IN_SUBSPACE[units, how.inner]
        lr, peak = grid[len(grid) // 2], RATES[0]
        for _ in range(3):
            at_lr = lambda choice, seed=0: self.in_subspace(how, choice[1], lr, seed)  # noqa: B023, E731
            peaks = search(at_lr, [("", rate) for rate in sorted({*RATES, peak})], grow=True)
            peak = best_of(peaks)[1]
            at_peak = lambda choice, seed=0: self.in_subspace(how, peak, choice[1], seed)  # noqa: B023, E731
            found = search(at_peak, [(f"peak {peak:g}", rate) for rate in sorted({*grid, lr})], grow=True)
            before, lr = lr, best_of(found)[1]
            if lr == before:
                break
        return peak, lr, [peaks, found], over_seeds(at_peak, found, self.seeds, 1)[1]

    def finishes(self) -> dict[str, dict[str, Any]]:
        """All arms that end in a subspace."""
        arms = {}
        for basis, part in itertools.product(ARMS_OF_BASES, PARTS):
            for start, inner in itertools.product(*ARMS_OF_BASES[basis]):
                how = Finish(basis, start, inner, self.steps // part)
                peak, lr, grids, runs = self.of_both_rates(how)
                tuned = {"rate_in_subspace": lr, "snapshots_of_start": runs[0]["last"], "d": runs[0]["d"]}
                kind = {"twa": "rival", "random": "control"}.get(basis, "ours")
                name = f"{BASES[basis]}, {'from the mean, ' if (basis, start) == ('pca', 'mean') else ''}"
                name += f"{ {'adamw': 'AdamW'}.get(inner, inner) }, {100 // part} %"
                arms[name] = described(
                    kind, peak, tuned, runs, grids, full=self.steps - how.steps, subspace=how.steps,
                    extra=runs[0]["bytes"],
                )  # fmt: skip
                say(self.task.name, name, arms[name])
        return arms


def say(task: str, name: str, arm: dict[str, Any]) -> None:
    loss = "diverged" if arm["final_eval_loss"] is None else f"{arm['final_eval_loss']:.4f}"
    print(f"{task:20} {arm['kind']:8} {name:45} peak {arm['peak_rate']:<7g} held-out loss {loss}", flush=True)


def plot(result: dict[str, Any], path: Path) -> None:
    tasks = result["tasks"]
    most = max(len(task["arms"]) for task in tasks.values())
    with canvas(path, 1, len(tasks), figsize=(8 * len(tasks), 0.21 * most + 1.8)) as (_, axes):
        for axis, (name, task) in zip(axes[0], tasks.items(), strict=True):
            arms = {arm: of for arm, of in task["arms"].items() if of["final_eval_loss"] is not None}
            order = sorted(arms, key=lambda arm: arms[arm]["final_eval_loss"])
            looks = {"ours": ("o", "black"), "rival": ("s", "0.55"), "control": ("^", "0.8")}
            for kind, (marker, grey) in looks.items():
                rows = [(row, arms[arm]) for row, arm in enumerate(order) if arms[arm]["kind"] == kind]
                seeds = [(loss, row) for row, arm in rows for loss in arm["final_per_seed"]]
                label = {"ours": "SL2O's pipeline", "rival": "rivals", "control": "control"}[kind]
                axis.hlines(
                    [row for row, _ in rows], [min(arm["final_per_seed"]) for _, arm in rows],
                    [max(arm["final_per_seed"]) for _, arm in rows], color=grey, linewidth=1,
                )  # fmt: skip
                axis.scatter(
                    *zip(*seeds, strict=True), marker=marker, color=grey, edgecolor="black", s=22, label=label
                )
            axis.set_yticks(range(len(order)), order, fontsize=7)
            axis.invert_yaxis()
            unit = "an image" if any(word in name for word in ("cifar", "digits", "figures")) else "a token"
            axis.set(title=f"{name}, {result['steps']} steps, a dot a seed", xlabel=f"held-out loss (nats {unit})")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = study_parser(__doc__, data="embedded", steps=600, seeds=2, output_dir=Path("outputs/study_one_run"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    options: argparse.Namespace = parse_options(parser, argv)
    check_tasks(options.tasks, options.data, plain=True)
    check_rivals(["schedule_free"])
    if options.steps % SNAPSHOTS:
        raise ValueError(f"--steps is {options.steps}, expected a multiple of the {SNAPSHOTS} snapshots of a run")
    tasks = {}
    for name in options.tasks:
        budget = Budget(full_task(name, options.data), options)
        arms = {**budget.rivals(), **budget.finishes()}
        tasks[name] = {"n": budget.task.basis.layout.n, **verdict(arms), "arms": arms}
        print(f"{name}: {tasks[name]['verdict']}", flush=True)
        shutil.rmtree(budget.folder / "weights", ignore_errors=True)
    result = {"study": "one_run", "steps": options.steps, "seeds": options.seeds, "tasks": tasks}
    return finish(result, options.json, plot)


if __name__ == "__main__":
    run_script(main)
