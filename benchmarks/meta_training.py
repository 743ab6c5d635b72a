"""What meta-training costs: time and peak memory of an inner step, beside the same step with a frozen rule, beside a
plain training step, and beside meta-training that keeps the graph through the lifted weights.

python benchmarks/meta_training.py --json benchmarks/results/meta_training.json

Four ways through a window of T inner steps, on random images, from the same weights and on the same batches:

- meta: `hf_sl2o.unroll`, its backward pass, and Adam on the rule
- frozen: the subspace step of a rule that is not trained
- plain: SGD with momentum on all weights
- keep_graph: theta - U delta with its graph, and `loss.backward(retain_graph=True)` at each step, as the official code
  does; without what makes that code slower than it must be (a slice a tensor instead of one split, anomaly detection).
  It gives the same meta-gradient as meta. A window's losses are kept with their graphs, and with them all activations;
  where the losses are detached instead, only the chain of lifts is left: `detached_losses` in the rows.

Times alternate between the ways; a step's time is its window's by T. A peak is the resident memory of a process of its
own, less what it held before the first window (libraries, network, data, basis); it includes what malloc cannot give
back because small tensors lie in it, and varies by a tenth from process to process. `live` beside it is the same peak
where malloc gives every tensor of 128 KiB or more back at once. Processes that are compared make the same number of
steps. On a GPU both are `torch.cuda.max_memory_allocated`.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import itertools
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


from hf_sl2o import Layout, LSTMRule, RandomBasis, Rule, Task, unroll  # noqa: E402
from hf_sl2o.experiments.command_line.flags import parse_options  # noqa: E402
from hf_sl2o.experiments.command_line.script import run_script  # noqa: E402
from hf_sl2o.experiments.environment import environment, peak_bytes, reset_peak  # noqa: E402
from hf_sl2o.experiments.tasks.networks import resnet8, resnet18  # noqa: E402
from hf_sl2o.experiments.timing import alternating, row  # noqa: E402
from hf_sl2o.foundation.files import save_json  # noqa: E402
from hf_sl2o.meta.task import InnerRun  # noqa: E402

NETWORKS = {"resnet8": (resnet8, 128), "resnet18": (resnet18, 32)}  # images in a batch
DIM = 40
LEARNING_RATE = 1e-3  # small: the directions are random, and the weights shall stay where training is ordinary
Window = Callable[[], Any]


@functools.lru_cache(maxsize=1)
def problem(network: str, batch: int) -> Task:
    """Returns training on four batches of random images `(B, 3, 32, 32)`, in 40 random directions, on the device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def build() -> nn.Module:
        torch.manual_seed(0)
        return NETWORKS[network][0]().to(device)

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, batch, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(10, (4, batch), generator=generator).to(device)

    def batches(seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return itertools.cycle(list(zip(images, labels, strict=True)))

    def loss(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(data[0]), data[1])

    basis = RandomBasis(Layout.from_named_parameters(build().named_parameters()), DIM).to_dense()
    return Task(network, build, batches, loss, basis.to(device))


def seeded_rule(task: Task) -> Rule:
    torch.manual_seed(0)
    return LSTMRule().to(task.basis.device)


# The ways: each returns a function that runs one window of `steps` inner steps.


def meta(task: Task, steps: int, rule: Rule) -> Window:
    run, adam = InnerRun(task, seed=0), torch.optim.Adam(rule.parameters(), lr=1e-2)
    c, state = torch.zeros(DIM, device=run.device), rule.init_state(DIM, device=run.device)

    def window() -> None:
        nonlocal c, state
        adam.zero_grad()
        surrogate, c, state, _ = unroll(rule, run, c, state, steps=steps, lr=LEARNING_RATE)
        surrogate.backward()
        adam.step()
        c, state = c.detach(), state.detach()

    return window


def frozen(task: Task, steps: int, rule: Rule) -> Window:
    run = InnerRun(task, seed=0)
    state = rule.init_state(DIM, device=run.device)

    def window() -> None:
        nonlocal state
        for _ in range(steps):
            _, g = run.gradient()  # (d,)
            with torch.no_grad():
                delta, state = rule(g, state)
            run.move(-LEARNING_RATE * delta)

    return window


def plain(task: Task, steps: int, rule: Rule) -> Window:
    model, batches = task.build_model(), iter(task.batches(0))
    sgd = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)

    def window() -> None:
        for _ in range(steps):
            loss = task.loss(model, next(batches))
            sgd.zero_grad()
            loss.backward()
            sgd.step()

    return window


def keep_graph(task: Task, steps: int, rule: Rule, detach_losses: bool = False) -> Window:
    model, batches, layout = task.build_model(), iter(task.batches(0)), task.basis.layout
    adam = torch.optim.Adam(rule.parameters(), lr=1e-2)
    matrix = task.basis.as_matrix()  # (d, n)
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])  # (n,)
    state = rule.init_state(DIM, device=theta.device)

    def window() -> None:
        nonlocal theta, state
        adam.zero_grad()
        theta, state, losses = theta.detach().requires_grad_(), state.detach(), []
        for _ in range(steps):
            parts = [part.view(shape) for part, shape in zip(theta.split(layout.numels), layout.shapes, strict=True)]
            images, labels = next(batches)
            weights = dict(zip(layout.names, parts, strict=True))
            loss = F.cross_entropy(functional_call(model, weights, (images,)), labels)
            caught: list[torch.Tensor] = []
            hook = theta.register_hook(caught.append)  # of this backward pass only, unlike retain_grad
            loss.backward(retain_graph=True)
            hook.remove()
            delta, state = rule(matrix @ caught[0], state)  # of a detached gradient
            theta = theta - LEARNING_RATE * (delta @ matrix)
            losses.append(loss.detach() if detach_losses else loss)
            del loss  # or its activations live on through the next forward pass
        adam.step()

    return window


WAYS: dict[str, Callable[[Task, int, Rule], Window]] = {
    "meta": meta,
    "frozen": frozen,
    "plain": plain,
    "keep_graph": keep_graph,
    "keep_graph_detached": functools.partial(keep_graph, detach_losses=True),
}


def times(network: str, batch: int, steps: int, rounds: int) -> dict[str, list[float]]:
    """Returns seconds a step of each way, one number a window."""
    task = problem(network, batch)
    windows = {name: way(task, steps, seeded_rule(task)) for name, way in WAYS.items()}
    measured = alternating(windows, rounds, warmup=1)
    return {name: [seconds / steps for seconds in values] for name, values in measured.items()}


def peak(way: str, steps: int, windows: int, network: str, batch: int) -> float | None:
    """Returns the MB that `windows` windows of `steps` steps need; None where that cannot be measured."""
    task = problem(network, batch)
    window = WAYS[way](task, steps, seeded_rule(task))
    images, labels = next(iter(task.batches(0)))
    two = dataclasses.replace(task, batches=lambda seed: itertools.repeat((images[:2], labels[:2])))
    WAYS[way](two, 2, seeded_rule(task))()  # what libraries load and allocate once
    if not torch.cuda.is_available() and sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # or the loop's first tensors fill what is free already
    reset_peak()
    before = peak_bytes()
    if before is None or (not torch.cuda.is_available() and before > 1.02 * resident_bytes()):
        return None
    for _ in range(windows):
        window()
    after = peak_bytes()
    return None if after is None else (after - before) / 1e6


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def in_new_process(method: str, function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        return pool.submit(function, *arguments).result()


Case = tuple[str, int, int]  # way, T, windows


def in_forks(cases: dict[str, Case], network: str, batch: int) -> dict[str, float | None]:
    """Runs `peak` on each case in a fork of this process, which has made the problem and no step."""
    if not torch.cuda.is_available():  # a process that has used its GPU cannot be forked
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # nor can one with a pool of threads
        problem(network, batch)
        torch.set_num_threads(threads)
    return {name: in_new_process("fork", peak, *case, network, batch) for name, case in cases.items()}


def peaks(cases: dict[str, Case], network: str, batch: int, repeats: int, live: bool) -> dict[str, list[float]]:
    """Returns the peak in MB of each case in `repeats` processes; nothing where it cannot be measured."""
    if live:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 17)  # glibc's default, which then no longer grows
    found = [in_new_process("spawn", in_forks, cases, network, batch) for _ in range(repeats)]
    os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
    if any(value is None for once in found for value in once.values()):
        return {}
    return {name: [once[name] for once in found] for name in cases}


def benchmark(
    network: str, batch: int, steps: int, rounds: int, repeats: int, lengths: tuple[int, int] = (5, 50)
) -> list[dict[str, Any]]:
    """Rows of seconds a step and of MB, each beside its baseline; `lengths` are the two T whose peaks are compared."""
    about = {"network": network, "batch": batch, "dim": DIM, "unroll_length": steps}

    def entry(name: str, values: list[float], unit: str, baseline: list[float], **further: Any) -> dict[str, Any]:
        values = values if len(values) > 1 else values * 2  # one repetition is its own quartiles
        return {**row(f"{network}/{name}", values, unit, statistics.median(baseline)), **about, **further}

    def beside(values: list[float], baseline: list[float]) -> dict[str, float]:
        value, base = statistics.median(values), statistics.median(baseline)
        return {"value": value, "baseline": base, "ratio": value / base}

    took = times(network, batch, steps, rounds)
    further = {"detached_losses": beside(took["keep_graph_detached"], took["plain"])}
    rows = [
        entry("step_vs_frozen", took["meta"], "s", took["frozen"]),
        entry("step_vs_plain", took["meta"], "s", took["plain"]),
        entry("keep_graph_step_vs_plain", took["keep_graph"], "s", took["plain"], **further),
    ]

    short, long = lengths
    cases: dict[str, Case] = {
        "meta": ("meta", steps, 2),
        "plain": ("plain", steps, 2),
        "keep_graph": ("keep_graph", steps, 2),
        "keep_graph_detached": ("keep_graph_detached", steps, 2),
        "short": ("meta", short, long // short),
        "long": ("meta", long, 1),
    }
    held = peaks(cases, network, batch, repeats, live=False)
    live = peaks(cases, network, batch, 1, live=True)
    if not held or not live:
        print("no peaks: this system does not reset the peak of resident memory (/proc/self/clear_refs)")
        return rows
    for name, way, baseline in (
        ("peak_T50_vs_T5", "long", "short"),
        ("peak_vs_plain", "meta", "plain"),
        ("keep_graph_peak_vs_plain", "keep_graph", "plain"),
    ):
        rows.append(entry(name, held[way], "MB", held[baseline], live=beside(live[way], live[baseline])))
    rows[3]["unroll_length"] = [long, short]
    further = {"live": beside(live["keep_graph_detached"], live["plain"])}
    rows[5]["detached_losses"] = {**beside(held["keep_graph_detached"], held["plain"]), **further}
    return rows


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--quick", action="store_true", help="under a minute: small batches of ResNet-8, few rounds")
    parser.add_argument("--network", choices=sorted(NETWORKS), nargs="+", help="default: all; with --quick resnet8")
    options = parse_options(parser, argv)
    rows = []
    for network in options.network or (["resnet8"] if options.quick else list(NETWORKS)):
        batch = NETWORKS[network][1]
        if options.quick:
            rows += benchmark(network, 16, steps=3, rounds=3, repeats=1)
        elif network == "resnet8":
            rows += benchmark(network, batch, steps=10, rounds=15, repeats=4)
        else:
            rows += benchmark(network, batch, steps=10, rounds=4, repeats=1)
    for entry in rows:
        low, high = entry["quartiles"]
        text = f"{entry['name']:34} {entry['value']:.4g} {entry['unit']} (quartiles {low:.4g} to {high:.4g})"
        notes = [f"{key} {entry[key]['ratio']:.3f} x" for key in ("live", "detached_losses") if key in entry]
        print(f"{text}  {entry['ratio']:.3f} x baseline", *notes, sep="  ")
    result = {"benchmark": "meta_training", "rows": rows, "environment": environment()}
    if options.json:
        save_json(options.json, result)
    return result


if __name__ == "__main__":
    run_script(main)
