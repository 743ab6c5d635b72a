"""Where a subspace comes from: its dimension, the run it is taken from, controls, units and storage.

    python recipes/studies/subspaces.py --data PATH --json recipes/results/study_subspaces.json

Each task is trained from one start in many bases. The reference: --dim directions of --snapshots snapshots of one
AdamW run. Beside it
- an eighth to four times as many directions, of four times as many snapshots of the same run;
- the same number of directions of SGD with momentum, of the first quarter of AdamW's run, of another start, of
  another data set;
- controls: a random walk with the steps of AdamW's run, and random directions;
- orthonormal instead of whitened units, and storage in 16, 8 and 4 bits and as Tucker factors.

Arms: the shipped rule as it is, and AdamW. AdamW's rate is tuned in the reference, in each further source, in the
controls and in orthonormal units; over dimensions and storages it is the reference's. In orthonormal units there is
no unit that a rule was made for: there it runs at rate 1, and in the reference also at a tuned one. Momentum is tuned
in both units.

Each basis also says which held-out loss the final weights of AdamW's run have, projected into it, and those of the run
that it was taken from: one far below the losses of the arms means that the basis was large enough, and the optimizer
did not find it. The random walk beside each explained variance has the steps of the basis' own trajectory. Killed and
started again it goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_sl2o import Basis, RandomBasis, Rule, Task, fit_basis
from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import run_script
from hf_sl2o.experiments.command_line.study import finish, study_parser
from hf_sl2o.experiments.figures import canvas
from hf_sl2o.experiments.kept.keys import stamp
from hf_sl2o.experiments.on_task import TaskArm, compare_on
from hf_sl2o.experiments.tasks.named import PROBLEMS, arms_of, check_tasks
from hf_sl2o.experiments.tasks.problem import Problem
from hf_sl2o.experiments.tasks.subspaces import (
    HAVE_OTHER_DATA,
    Source,
    every_fourth,
    explained_by,
    loss_after,
    recorded_sources,
    walk_shares,
    whole_task,
)
from hf_sl2o.rules import SHIPPED_RULES

TASKS = ("e2e-gpt2", "cifar-resnet8")
EIGHTHS = (1, 2, 4, 8, 16, 32)  # dimensions, of --dim / 8
STORED = ("bf16", "int8", "int4", "tucker")
RULE_RATES = (1.0, 3.0)  # where a coefficient has no natural unit
LINES = {"sl2o": ("o-", "black", "SL2O (shipped rule)"), "subspace_adamw": ("s--", "0.45", "AdamW in the subspace")}


@dataclass(frozen=True)
class Variant:
    """A basis, what it was taken from, the figure's groups it is in, and the arms that are run in it."""

    name: str
    groups: tuple[str, ...]
    basis: Basis
    source: Source | None
    units: str = "std"
    arms: dict[str, TaskArm] = field(default_factory=dict)


def from_rate(rate: float) -> tuple[float, ...]:
    """A grid that begins at the reference's tuned rate; the better of two is at an edge, so that it grows."""
    return rate, float(f"{rate * 10**0.5:.1g}")


def number(value: float) -> float | None:
    """Six digits; JSON has no infinity: what diverged is None."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


class Study:
    """The variants of one task, each run and described."""

    def __init__(self, name: str, problem: Problem, options: argparse.Namespace) -> None:
        self.options = options
        self.place = (
            options.output_dir / f"{name}-{stamp(options.data, options.dim, options.snapshots, problem.steps)}"
        )
        self.task = whole_task(name, problem)
        self.sources = recorded_sources(name, problem, options.data, self.place / "recorded", options.snapshots)
        adamw = self.sources["adamw"]
        self.reference = dataclasses.replace(adamw, steps=every_fourth(adamw.steps))
        rule = Rule.from_pretrained(SHIPPED_RULES / "default")
        self.arms = arms_of("default", rule, options.steps, self.task.basis.layout)
        self.lengths: dict[tuple[Path, str], torch.Tensor] = {}

    def fit(self, source: Source, dim: int, storage: str = "fp32") -> Basis:
        return fit_basis(source.trajectory, dim, steps=list(source.steps), storage=storage, progress=False)

    def arm(self, name: str, rates: tuple[float, ...] | None = None, units: str = "std") -> TaskArm:
        """An arm of the comparisons in the basis of the variant, at other rates or in other units."""
        arm = dataclasses.replace(self.arms[name], basis=None, units=units)
        return arm if rates is None else dataclasses.replace(arm, learning_rates=rates)

    def without_units(self) -> dict[str, TaskArm]:
        """Arms where a coefficient has length 1 in weight space: the rule at rate 1, and AdamW."""
        units = "orthonormal"
        return {"sl2o": self.arm("sl2o", units=units), "subspace_adamw": self.arm("random_adamw", units=units)}

    def variants(self, results: Mapping[str, Any]) -> Iterator[Variant]:
        """One at a time, the reference first: `results` then holds its tuned rate."""
        dim, sources = self.options.dim, self.sources
        both = {"sl2o": self.arm("sl2o"), "subspace_adamw": self.arm("subspace_adamw")}
        basis, groups = self.fit(self.reference, dim), ("source", "control", "units", "storage")
        momentum = {"subspace_momentum": self.arm("subspace_momentum")}
        yield Variant("reference", groups, basis, self.reference, arms=both | momentum)
        rate = results["reference"]["arms"]["subspace_adamw"]["learning_rate"]
        ours, near = {"sl2o": self.arm("sl2o")}, {"subspace_adamw": self.arm("subspace_adamw", from_rate(rate))}
        plain, units = self.without_units(), "orthonormal"
        tuned = {
            "sl2o_tuned": self.arm("sl2o", RULE_RATES, units),
            "subspace_momentum": self.arm("subspace_momentum_orthonormal", units=units),
        }
        yield Variant("orthonormal units", ("units",), basis, self.reference, units, plain | tuned)
        arms = ours | {"subspace_adamw": self.arm("subspace_adamw", (rate,))}
        for storage in STORED:
            stored = self.fit(self.reference, dim, storage)
            yield Variant(storage, ("storage",), stored, self.reference, arms=arms)
        for eighths in EIGHTHS:
            d = dim * eighths // 8
            yield Variant(f"d = {d}", ("dimension",), self.fit(sources["adamw"], d), sources["adamw"], arms=arms)
        for kind, source in sources.items():
            if kind != "adamw":
                group = "control" if kind == "random walk" else "source"
                yield Variant(kind, (group,), self.fit(source, dim), source, arms=ours | near)
        random = RandomBasis(self.task.basis.layout, dim, seed=1).to_dense()
        yield Variant("random directions", ("control",), random, None, units, plain)

    def walk(self, source: Source, dim: int) -> float:
        """Explained variance of a random walk with the steps of a source."""
        key = source.trajectory.folder, stamp(list(source.steps))
        if key not in self.lengths:
            self.lengths[key] = walk_shares(source.step_lengths().square().sum(dim=1).sqrt())
        return float(self.lengths[key][:dim].sum())

    def described(self, variant: Variant, exact: Basis) -> dict[str, Any]:
        """What a basis is, before anything is trained in it."""
        basis, source = variant.basis, variant.source
        at, moved = dataclasses.replace(self.task, basis=basis), self.reference.displacement()
        of_reference = explained_by(basis, self.reference)
        coordinates, expected = basis.coordinates(moved), exact.coordinates(moved)
        made = {
            "groups": variant.groups, "d": basis.dim, "snapshots": len(source.steps) if source else None,
            "source": source.text if source else "random orthonormal directions", "units": variant.units,
            "dtype": str(basis.dtype).removeprefix("torch."), "bytes": basis.nbytes,
            "explained_variance": basis.provenance.get("explained_variance"),
            "explained_variance_of_random_walk": self.walk(source, basis.dim) if source else None,
            "explained_variance_of_reference": of_reference,
            "projected_loss": number(loss_after(at, moved)),
            "projected_loss_of_own_run": number(loss_after(at, source.displacement())) if source else None,
        }  # fmt: skip
        if "storage" in variant.groups:
            made["projection_error"] = float((coordinates - expected).norm() / expected.norm())
        return made

    def run(self) -> dict[str, Any]:
        """All variants, and the arms in the full space."""
        results: dict[str, Any] = {}
        full = {"full_adamw": dataclasses.replace(self.arms["full_adamw"], basis=None)}
        of_full = self.compared("full space", self.task, full)["full_adamw"]
        shares: dict[str, list[float]] = {}
        exact: Basis | None = None
        for variant in self.variants(results):
            exact = variant.basis if exact is None else exact
            if variant.name in ("reference", "random walk"):
                ratios = variant.basis.provenance["explained_variance_ratio"]
                shares[variant.name] = [float(f"{share:.4g}") for share in ratios]
            entry = self.described(variant, exact)
            entry["arms"] = self.compared(
                variant.name, dataclasses.replace(self.task, basis=variant.basis), variant.arms
            )
            results[variant.name] = entry
            say(self.task.name, variant.name, entry)
        recorded = {
            kind: {
                "what": source.text, "learning_rate": source.learning_rate, "first_step": source.steps[0],
                "last_step": source.steps[-1], "snapshots": len(source.steps),
                "final_eval_loss_on_its_data": source.final_eval_loss,
            }
            for kind, source in self.sources.items()
        }  # fmt: skip
        return {
            "n": self.task.basis.layout.n, "recorded": recorded, "full_adamw": of_full, "shares": shares,
            "variants": results,
        }  # fmt: skip

    def compared(self, name: str, task: Task, arms: dict[str, TaskArm]) -> dict[str, Any]:
        options = self.options
        runs = compare_on(
            task, arms, options.steps, seeds=options.seeds, eval_every=max(1, options.steps // 4), finalists=1,
            cache=self.place / "runs" / name.replace(" = ", "-").replace(" ", "-"),
        )  # fmt: skip
        return {
            arm: {
                "learning_rate": run["learning_rate"], "rates": [rate for rate, _ in run["grid"]],
                "final_eval_loss": number(run["final_eval_loss"]),
                "final_per_seed": [number(curve[-1][1]) for curve in run["eval_per_seed"]],
                "curve": [[step, number(loss)] for step, loss in run["eval"]],
            }
            for arm, run in runs.items()
        }  # fmt: skip


def say(task: str, variant: str, entry: Mapping[str, Any]) -> None:
    explained = entry["explained_variance"]
    shown = "" if explained is None else f"explains {explained:.4f}, a random walk's {walk_of(entry):.4f}; "
    losses = [f"{arm} {run['final_eval_loss'] or math.inf:.4f} (lr {run['learning_rate']:g})"
              for arm, run in entry["arms"].items()]  # fmt: skip
    print(f"{task:14} {variant:18} {shown}best known {best_known(entry):.4f}; {', '.join(losses)}", flush=True)


def walk_of(entry: Mapping[str, Any]) -> float:
    return float(entry["explained_variance_of_random_walk"])


# Figure

KNOWN = "end of a recorded run, projected"


def best_known(variant: Mapping[str, Any]) -> float:
    """The lower loss of two points in a basis: the end of AdamW's run and that of its own, projected."""
    known = variant["projected_loss"], variant["projected_loss_of_own_run"]
    return min((loss for loss in known if loss is not None), default=math.nan)


def ends(run: Mapping[str, Any]) -> tuple[float, list[float]]:
    """The mean final loss and those of the seeds, NaN where a run diverged."""
    values = [math.nan if value is None else value for value in (run["final_eval_loss"], *run["final_per_seed"])]
    return values[0], values[1:]


def plot_dimensions(axis: Any, task: str, entry: Mapping[str, Any]) -> None:
    of_group = [variant for variant in entry["variants"].values() if "dimension" in variant["groups"]]
    dims = [variant["d"] for variant in of_group]
    for arm, (style, colour, label) in LINES.items():
        means = [ends(variant["arms"][arm]) for variant in of_group]
        axis.plot(dims, [mean for mean, _ in means], style, color=colour, label=label)
        for d, (_, seeds) in zip(dims, means, strict=True):
            axis.vlines(d, min(seeds), max(seeds), color=colour, linewidth=1)
    axis.plot(dims, [best_known(variant) for variant in of_group], "^:", color="0.6", label=KNOWN)
    axis.axhline(ends(entry["full_adamw"])[0], color="black", linewidth=1, linestyle="-.", label="AdamW, full space")
    axis.set(title=f"{task}: dimension", xlabel="directions d", ylabel="final held-out loss", yscale="log")
    axis.set_xscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:.3g}")
    axis.yaxis.set_minor_formatter("{x:.3g}")
    axis.set_xticks(dims, [str(d) for d in dims])
    axis.legend(fontsize=7)


def plot_bars(axis: Any, task: str, entry: Mapping[str, Any]) -> None:
    looks = {
        "sl2o": ("black", "", "SL2O (shipped rule)"), "sl2o_tuned": ("0.35", "...", "SL2O, rate tuned"),
        "subspace_adamw": ("0.6", "", "AdamW"), "subspace_momentum": ("white", "///", "momentum"),
    }  # fmt: skip
    shown = [(name, of) for name, of in entry["variants"].items() if "dimension" not in of["groups"]]
    for place, (_, variant) in enumerate(shown):
        width = 0.8 / len(variant["arms"])
        for index, (arm, run) in enumerate(variant["arms"].items()):
            (mean, seeds), (colour, hatch, label) = ends(run), looks[arm]
            at = place + (index - (len(variant["arms"]) - 1) / 2) * width
            axis.bar(at, mean, width, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6, label=label)
            axis.vlines(at, min(seeds), max(seeds), color="red", linewidth=1.2)
        axis.plot(place, best_known(variant), "D", color="white", markeredgecolor="black", zorder=5, label=KNOWN)
    full = ends(entry["full_adamw"])[0]
    axis.axhline(full, color="black", linewidth=1, linestyle="-.", label="AdamW, full space")
    axis.set(title=f"{task}: source, controls, units, storage", ylabel="final held-out loss")
    axis.set_xticks(range(len(shown)), [name for name, _ in shown], rotation=35, ha="right", fontsize=8)
    handles, labels = axis.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axis.legend(once.values(), once.keys(), fontsize=7, ncols=2)


def plot_shares(axis: Any, task: str, entry: Mapping[str, Any]) -> None:
    for (name, shares), style in zip(entry["shares"].items(), ("o-", "s--"), strict=True):
        label = "AdamW's run" if name == "reference" else "random walk, same steps"
        axis.plot(range(1, len(shares) + 1), shares, style, color="black" if name == "reference" else "0.5",
                  markersize=3, label=label)  # fmt: skip
    count = len(entry["shares"]["reference"])
    theory = [6 / (math.pi * k) ** 2 for k in range(1, count + 1)]
    axis.plot(range(1, count + 1), theory, ":", color="0.3", label=r"walk of equal steps, $6 / (\pi k)^2$")
    axis.set(title=f"{task}: explained variance", xlabel="component k", ylabel="share of the variance")
    axis.set(xscale="log", yscale="log")
    axis.legend(fontsize=7)


def plot(result: dict[str, Any], path: Path) -> None:
    tasks = result["tasks"]
    options = {"figsize": (18, 5 * len(tasks)), "width_ratios": (1, 1.6, 1)}
    with canvas(path, len(tasks), 3, **options) as (_, axes):
        for row, (task, entry) in zip(axes, tasks.items(), strict=True):
            for draw, axis in zip((plot_dimensions, plot_bars, plot_shares), row, strict=True):
                draw(axis, task, entry)


def checked(options: argparse.Namespace) -> dict[str, Problem]:
    """The problems, after a look at what cannot be done with these flags."""
    check_tasks(options.tasks, options.data, plain=True)
    for name in options.tasks:
        if name not in HAVE_OTHER_DATA:
            raise ValueError(f"--tasks has {name!r}, expected those with other data: {', '.join(HAVE_OTHER_DATA)}")
    if options.dim % 8 or not options.dim < options.snapshots:
        raise ValueError(
            f"--dim is {options.dim}, expected a multiple of 8 (the smallest basis has an eighth of it) below the "
            f"{options.snapshots} of --snapshots"
        )
    problems = {name: PROBLEMS[name](options.data) for name in options.tasks}
    for name, problem in problems.items():
        if 4 * options.snapshots > problem.steps:
            raise ValueError(
                f"--snapshots is {options.snapshots}, expected at most {problem.steps // 4}: four times as many are "
                f"taken in the {problem.steps} steps of the recorded run of {name}"
            )
    return problems


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = study_parser(__doc__, data="embedded", steps=200, seeds=2, output_dir=Path("outputs/study_subspaces"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--dim", type=int, default=40, help="directions of the reference")
    parser.add_argument("--snapshots", type=int, default=60, help="that the reference is fitted to")
    options = parse_options(parser, argv)
    problems = checked(options)
    tasks = {name: Study(name, problem, options).run() for name, problem in problems.items()}
    settings = {name: getattr(options, name) for name in ("steps", "seeds", "dim", "snapshots")}
    return finish({"study": "subspaces", **settings, "tasks": tasks}, options.json, plot)


if __name__ == "__main__":
    run_script(main)
