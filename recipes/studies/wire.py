"""Time to a target loss over a thin wire: data parallel training of two processes at 10 and at 100 Mbit/s.

    python recipes/studies/wire.py --data PATH --json recipes/results/study_wire.json

A run of the same kind is there already: AdamW on all weights of a pretrained base, recorded, with its basis. The next
one, on other batches, has two processes, each with its half of every batch of 32. In the subspace they exchange d
numbers a step (`sl2o`, `subspace_adamw`); DistributedDataParallel exchanges the gradient of all weights (`ddp_adamw`),
in half precision (`ddp_adamw_fp16`) or at rank 2 (`ddp_adamw_powersgd`), or that of LoRA factors (`ddp_lora`). torch's
bf16 hook refuses gloo. The target is the loss of tuned AdamW at its end and 1 %; an arm stops one look after it. Each
process has a network namespace (Linux, root); `--link none` runs without a limit on loopback. The wire limits the rate
and adds no delay. Rates are tuned without it. Killed and started again it goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn

from hf_sl2o import IdentityBasis, Layout, Rule, Task
from hf_sl2o.experiments.command_line.flags import parse_options
from hf_sl2o.experiments.command_line.script import leave_processes, run_script
from hf_sl2o.experiments.command_line.study import finish, study_parser
from hf_sl2o.experiments.figures import canvas
from hf_sl2o.experiments.kept.files import keep, kept
from hf_sl2o.experiments.kept.keys import digest
from hf_sl2o.experiments.on_task import TaskArm, compare_on
from hf_sl2o.experiments.tasks.named import check_tasks, in_recorded, lora_task, pretrained_base
from hf_sl2o.experiments.tasks.problems import PROBLEMS
from hf_sl2o.experiments.tasks.recorded import SNAPSHOTS
from hf_sl2o.experiments.tuning import final_loss, search
from hf_sl2o.experiments.wire import (
    InSubspace,
    Parallel,
    Wire,
    adamw,
    halved,
    joined,
    measured_rate,
    run_both,
    timed,
)
from hf_sl2o.foundation.files import load_json, save_json
from hf_sl2o.foundation.ranks import basis_facts, check_same_on_all_ranks, rule_facts
from hf_sl2o.meta.task import InnerRun
from hf_sl2o.rules import SHIPPED_RULES

RIVALS = ("ddp_adamw", "ddp_adamw_fp16", "ddp_adamw_powersgd", "ddp_lora")
SLACKS = (0.01, 0.02, 0.05)  # above the loss of tuned AdamW at its end; the first one is the target
FIRST_SEED = 100  # of the timed runs' batches; tuning counts from 0, the recorded run has its own
DRAWN = {
    "sl2o": ("-", "o", "SL2O"), "subspace_adamw": ("--", "s", "AdamW†"), "ddp_adamw": (":", "^", "DDP, AdamW"),
    "ddp_adamw_fp16": ("-.", "v", "DDP, AdamW, fp16 sent"),
    "ddp_adamw_powersgd": ((0, (5, 1, 1, 1, 1, 1)), "D", "DDP, AdamW, PowerSGD"),
    "ddp_lora": ((0, (1, 3)), "x", "DDP, LoRA + AdamW"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setting:
    """What both processes and the study read from disk once it is made."""

    task: str
    data: str
    tasks_dir: str
    trajectory_steps: int = 0
    full_rate: float = 0.0  # of the recorded run: AdamW's, tuned

    @functools.cached_property
    def full(self) -> Task:
        """All weights of the pretrained base, on what was held back from it."""
        problem, where, weights = pretrained_base(self.task, self.data, Path(self.tasks_dir))

        def build() -> nn.Module:
            model = problem.build_model()
            model.load_state_dict(weights, strict=False)  # a tied weight is in the file once
            return model

        basis = IdentityBasis(Layout.from_named_parameters(build().named_parameters()))
        held_out = problem.eval_batches("held-back")
        return Task(where.stem, build, lambda seed: problem.batches("held-back", seed), problem.loss, basis, held_out)

    @functools.cached_property
    def lora(self) -> Task:
        made = lora_task(self.task, self.data, Path(self.tasks_dir))
        return dataclasses.replace(made, name=f"{self.full.name}-lora8")  # its base tells the data

    @functools.cached_property
    def subspace(self) -> Task:
        return in_recorded(self.full, self.full_rate, Path(self.tasks_dir), steps=self.trajectory_steps)

    def of(self, arm: str) -> Task:
        return self.lora if arm == "ddp_lora" else self.full if arm.startswith("ddp") else self.subspace


# At one end of the wire


def backward_seconds(task: Task) -> float:
    """Median seconds of a forward and a backward pass on half a batch, both processes at once, without the wire."""
    run = InnerRun(task, 0)
    batch, times = run.next_batch(), []
    for _ in range(7):
        start = time.perf_counter()
        run.loss(batch).backward()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])  # the first ones are slower


def run_job(setting: Setting, job: Mapping[str, Any], mbit: float | None, parent: int) -> dict[str, Any]:
    """One arm on this process' half of every batch; both ends must begin and end at the same numbers."""
    task = halved(setting.of(job["arm"]), dist.get_rank())
    compute = backward_seconds(task)
    rule = Rule.from_pretrained(SHIPPED_RULES / "default")
    end = Parallel(task, job) if job["arm"].startswith("ddp") else InSubspace(task, job, rule)
    begins = digest(*[p for _, p in sorted(end.run.model.named_parameters())])
    facts = {"job": dict(job), "weights": begins, "basis": basis_facts(task.basis), "rule": rule_facts(rule)}
    check_same_on_all_ranks(facts, "starting")
    rate = measured_rate(mbit)
    result = timed(end, job, parent)
    check_same_on_all_ranks({"trained numbers": digest(*end.trained)}, "final")
    if isinstance(end, InSubspace):
        result["coefficients"] = end.c.tolist()
    return {**result, **rate, "backward_seconds": compute, "payload_bytes_a_step": end.payload}


def work(spec: Mapping[str, Any]) -> None:
    """What each of the two processes does: the jobs one after another; process 0 keeps their results."""
    parent = os.getppid()
    torch.set_num_threads(1)
    PartialState(cpu=True, backend="gloo")
    setting = Setting(**spec["setting"])
    for job, path in spec["jobs"]:
        result = run_job(setting, job, spec["mbit"], parent)
        if dist.get_rank() == 0:
            keep(Path(path), {"key": key_of(setting, job), **result})
            print(
                f"{Wire(spec['mbit']).name:12} {job['arm']:20} lr {job['rate']:<8g} {result['curve'][-1][0]} steps, "
                f"{result['seconds_a_step']:.3f} s each; held-out loss {result['curve'][-1][2]:.4f}",
                flush=True,
            )
    leave_processes()


# The study


def key_of(setting: Setting, job: Mapping[str, Any]) -> list[Any]:
    return [setting.full.name, setting.trajectory_steps, setting.full_rate, dict(job)]


def run_jobs(setting: Setting, jobs: Sequence[dict[str, Any]], mbit: float | None, folder: Path) -> list[Any]:
    """Results of the jobs over a wire; those that are not kept in `folder` are run by one pair of processes."""
    where = folder / Wire(mbit).name.replace("/", "p").replace(" ", "-")
    paths = [where / f"{job['arm']}-{job['rate']:g}-{job['steps']}-seed-{job['seed']}.json" for job in jobs]
    keys = [key_of(setting, job) for job in jobs]
    missing = [(job, str(path)) for job, path, key in zip(jobs, paths, keys, strict=True)
               if kept(path).get("key") != key]  # fmt: skip
    if missing:
        spec = where / f"spec-{os.getpid()}.json"
        save_json(spec, {"setting": dataclasses.asdict(setting), "mbit": mbit, "jobs": missing})
        try:
            with joined(mbit) as wire:
                run_both(wire, [sys.executable, str(Path(__file__).resolve()), "--worker", str(spec)], where)
        finally:
            spec.unlink(missing_ok=True)
    return [kept(path) for path in paths]


def tune(setting: Setting, options: argparse.Namespace) -> tuple[Setting, dict[str, float], dict[str, Any]]:
    """Rates by the held-out loss of one process with whole batches; PowerSGD's, which needs two, without a limit.

    Returns:
        The setting with the recorded run's rate, the rate of each arm, and the tuning of all weights.
    """
    steps, seeds, cache = options.trajectory_steps, options.seeds, options.output_dir / "tuning"

    def best(task: Task, name: str, rates: tuple[float, ...], steps: int) -> dict[str, Any]:
        run = compare_on(
            task, {name: TaskArm(adamw, rates)}, steps, seeds=seeds, eval_every=max(1, steps // 10), cache=cache
        )[name]
        print(f"tuned {name:15} lr {run['learning_rate']:<8g} held-out loss {run['final_eval_loss']:.4f}", flush=True)
        return run

    full = best(setting.full, "ddp_adamw", (3e-4, 1e-3, 3e-3), steps)
    setting = dataclasses.replace(setting, full_rate=full["learning_rate"], trajectory_steps=steps)
    rates = {"sl2o": 1.0, "ddp_adamw": setting.full_rate, "ddp_adamw_fp16": setting.full_rate}
    rates["ddp_lora"] = best(setting.lora, "ddp_lora", (1e-3, 3e-3, 1e-2), steps)["learning_rate"]
    small = best(setting.subspace, "subspace_adamw", (0.03, 0.1, 0.3), options.steps)
    rates["subspace_adamw"] = small["learning_rate"]

    def on_pair(rate: float) -> dict[str, Any]:
        return {"arm": "ddp_adamw_powersgd", "rate": rate, "steps": steps, "seed": 0, "target": None}

    def run(choice: tuple[str, float], seed: int = 0) -> dict[str, Any]:
        (result,) = run_jobs(setting, [on_pair(choice[1])], None, options.output_dir / "tuning")
        return {"eval": [[step, math.nan if loss is None else loss] for step, _, loss in result["curve"]]}

    grid = [float(f"{setting.full_rate * 10**power:.1g}") for power in (-0.5, 0.0, 0.5)]
    run_jobs(setting, [on_pair(rate) for rate in grid], None, options.output_dir / "tuning")  # in one start
    tuned = search(run, [("std", rate) for rate in grid], grow=True)
    rates["ddp_adamw_powersgd"] = min(tuned, key=lambda choice: final_loss(tuned[choice]))[1]
    return setting, rates, full


def reached(curve: Sequence[Sequence[float]], target: float) -> Sequence[float] | None:
    """The first look (step, seconds, loss) at the target or below it."""
    return next((look for look in curve if look[2] is not None and look[2] <= target), None)


def mean(values: Sequence[float | None]) -> float | None:
    """None if one of them is."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if len(numbers) == len(values) else None


def summary(rate: float, steps: int, runs: Sequence[Mapping[str, Any]], full: float) -> dict[str, Any]:
    """What an arm did over one wire, means over seeds; None to a loss if one seed did not get there.

    `full` is the loss of tuned AdamW at its end; `above` says how far from it an arm was when.
    """
    looks = {slack: [reached(run["curve"], (1 + slack) * full) for run in runs] for slack in SLACKS}
    above = {
        f"{slack:.0%}": {
            name: mean([None if look is None else look[place] for look in of])
            for place, name in enumerate(("steps", "seconds"))
        }
        for slack, of in looks.items()
    }
    counted = ("seconds_a_step", "sent_bytes_a_step", "payload_bytes_a_step", "measured_mbit", "payload_mbit",
               "backward_seconds")  # fmt: skip
    return {
        "learning_rate": rate, "steps": steps,
        **{f"{name}_to_target": value for name, value in above[f"{SLACKS[0]:.0%}"].items()},
        "above": above, "reached_per_seed": [look and list(look) for look in looks[SLACKS[0]]],
        "last_loss": mean([run["curve"][-1][2] for run in runs]),
        "last_step": mean([run["curve"][-1][0] for run in runs]),
        "share_of_compute": mean([run["backward_seconds"] / run["seconds_a_step"] for run in runs]),
        **{name: mean([run[name] for run in runs]) for name in counted},
        "curve_per_seed": [
            [[step, round(spent, 4), None if loss is None else round(loss, 5)] for step, spent, loss in run["curve"]]
            for run in runs
        ],
    }  # fmt: skip


def with_speedups(arms: dict[str, Any], basis_bytes: int) -> dict[str, Any]:
    """Adds to the arms in the subspace how many times faster they are than each rival, with and without the basis.

    Sending the basis once takes its bytes at the measured rate of the wire; both ends may as well have it.
    """
    rate = statistics.mean(arm["payload_mbit"] for arm in arms.values())
    sending = basis_bytes * 8e-6 / rate
    for arm in (name for name in arms if name not in RIVALS):
        ours = arms[arm]["seconds_to_target"]
        arms[arm]["seconds_to_target_with_basis"] = None if ours is None else ours + sending
        for rival in RIVALS:
            theirs = arms[rival]["seconds_to_target"]
            for suffix, more in (("", 0.0), ("_with_basis", sending)):
                known = None not in (ours, theirs)
                arms[arm][f"speedup_over_{rival}{suffix}"] = theirs / (ours + more) if known else None
    return {"payload_mbit": rate, "sending_the_basis_seconds": sending, "arms": arms}


def table(name: str, link: Mapping[str, Any]) -> str:
    nominal = "no limit" if link["nominal_mbit"] is None else f"nominal {link['nominal_mbit']:g} Mbit/s"
    counted = "" if link["measured_mbit"] is None else f", {link['measured_mbit']:.2f} with headers"
    lines = [f"{name} ({nominal}; measured {link['payload_mbit']:.2f} Mbit/s{counted}); "
             f"sending the basis takes {link['sending_the_basis_seconds']:.1f} s"]  # fmt: skip
    for arm, run in link["arms"].items():
        sent = run["sent_bytes_a_step"]
        there = (f"there after {run['steps_to_target']:.0f} steps, {run['seconds_to_target']:.1f} s"
                 if run["seconds_to_target"] is not None else "not there")  # fmt: skip
        lines.append(
            f"  {arm:20} {there:32} {'' if sent is None else f'{sent:.0f} bytes sent of '}"
            f"{run['payload_bytes_a_step']:.0f} a step, {run['seconds_a_step']:.3f} s a step, "
            f"compute {run['share_of_compute']:.0%}"
        )
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    links = result["links"]
    with canvas(path, 1, len(links), figsize=(6.5 * len(links), 5), sharey=True) as (_, axes):
        for axis, (name, link) in zip(axes[0], links.items(), strict=True):
            for index, (arm, run) in enumerate(link["arms"].items()):
                style, marker, label = DRAWN[arm]
                for seed, curve in enumerate(run["curve_per_seed"]):
                    drawn = [(spent, loss) for _, spent, loss in curve if spent > 0 and loss is not None]
                    axis.plot(*zip(*drawn, strict=True), color=f"C{index}", linestyle=style, linewidth=1.4,
                              label="_" if seed else label)  # fmt: skip
                for look in filter(None, run["reached_per_seed"]):
                    axis.plot(look[1], look[2], color=f"C{index}", marker=marker, linestyle="none")
            axis.axhline(
                result["target"], color="0.4", linewidth=0.8, linestyle="--", label="target (marked where reached)"
            )
            axis.axvline(link["sending_the_basis_seconds"], color="0.4", linestyle=":", linewidth=0.8,
                         label="the basis could be sent in")  # fmt: skip
            axis.set(
                xscale="log", yscale="log", title=name, xlabel="seconds of training", ylabel="held-out loss (nats)"
            )
            axis.yaxis.set_major_formatter("{x:.2g}")
            axis.yaxis.set_minor_formatter("{x:.2g}")
            axis.tick_params(axis="y", which="minor", labelsize=6)
            axis.grid(alpha=0.3, which="both")
        axes[0][0].legend(fontsize=8)


def rates_of(links: Sequence[str]) -> list[float | None]:
    found: list[float | None] = []
    for link in links:
        try:
            rate = None if link == "none" else float(link)
        except ValueError:
            rate = math.nan
        if rate in found or not (rate is None or 0 < rate < math.inf):
            raise ValueError(f"--link has {link!r}, expected none, or Mbit/s above 0, each once")
        found.append(rate)
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = study_parser(
        __doc__, data="embedded", steps=100, seeds=1, output_dir=Path("outputs/study_wire"),
        tasks_dir=Path("outputs/meta_train/tasks"),
    )  # fmt: skip
    parser.add_argument("--trajectory_steps", type=int, default=300, help="of the recorded run, and of the DDP arms")
    parser.add_argument("--task", default="e2e-gpt2")
    parser.add_argument("--link", nargs="+", default=["10", "100"], help="Mbit/s, or none for no limit")
    parser.add_argument("--worker", type=Path, help="the study's own: what one of its two processes has to do")
    options = parse_options(parser, argv)
    if options.worker is not None:
        work(load_json(options.worker))
        return {}
    links = rates_of(options.link)
    check_tasks([options.task], options.data, plain=True, lora=True, flag="task")
    if options.task not in PROBLEMS:
        raise ValueError(f"--task is {options.task!r}, expected one that has a base of its own and whole batches")
    if options.trajectory_steps < SNAPSHOTS:
        raise ValueError(f"--trajectory_steps is {options.trajectory_steps}, expected at least {SNAPSHOTS}, of which "
                         "each is a snapshot")  # fmt: skip
    for limit in {rate for rate in links if rate is not None}:
        with joined(limit):  # says before anything is computed that there is no right to it
            pass
    setting, rates, full = tune(Setting(options.task, options.data, str(options.tasks_dir)), options)
    target, basis = (1 + SLACKS[0]) * full["final_eval_loss"], setting.subspace.basis
    done: dict[str, Any] = {}
    for mbit in links:
        jobs = {
            arm: [
                {"arm": arm, "rate": rates[arm], "seed": FIRST_SEED + seed, "target": target,
                 "steps": options.trajectory_steps if arm in RIVALS else options.steps}
                for seed in range(options.seeds)
            ]
            for arm in DRAWN
        }  # fmt: skip
        runs = iter(run_jobs(setting, [job for of in jobs.values() for job in of], mbit, options.output_dir / "runs"))
        arms = {
            arm: summary(rates[arm], of[0]["steps"], [next(runs) for _ in of], full["final_eval_loss"])
            for arm, of in jobs.items()
        }
        counted = [arm["measured_mbit"] for arm in arms.values() if arm["measured_mbit"] is not None]
        link = {"nominal_mbit": mbit, "measured_mbit": statistics.mean(counted) if counted else None,
                **with_speedups(arms, basis.nbytes)}  # fmt: skip
        if counted and max(counted) > 1.1 * (mbit or math.inf):
            raise RuntimeError(f"the limit of {mbit:g} Mbit/s did not hold: {max(counted):.1f} Mbit/s were measured")
        done[Wire(mbit).name] = link
        print(table(Wire(mbit).name, link), flush=True)
    settings = {name: getattr(options, name) for name in ("task", "steps", "trajectory_steps", "seeds")}
    result = {
        "study": "wire", **settings, "processes": 2, "threads_of_each": 1, "n": basis.layout.n, "d": basis.dim,
        "basis_bytes": basis.nbytes, "target": target, "full_adamw": full["final_eval_loss"], "links": done,
    }  # fmt: skip
    return finish(result, options.json, plot)


if __name__ == "__main__":
    run_script(main)
