"""Where a subspace comes from: trajectories of several kinds from one start, and what a random walk explains.

`recorded_sources` records them and keeps them in a folder: AdamW, SGD with momentum, another start, another data set,
and a random walk with the steps of AdamW's run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...foundation.files import load_tensors
from ...meta import Task, train_on
from ...meta.task import InnerRun
from ...subspace import Basis, IdentityBasis, Layout, Trajectory
from ..data.e2e import load_rows, train_tokenizer
from ..kept.files import made_once
from ..kept.keys import stamp
from ..on_task import TaskArm, compare_on
from .problem import Problem
from .problems import PROBLEMS
from .recorded import SEED
from .texts import python_docs

#: Problems for which another data set is at hand.
HAVE_OTHER_DATA = tuple(name for name in PROBLEMS if name == "e2e-gpt2" or name.startswith(("cifar-", "digits-")))
SGD_RATES = (0.03, 0.1, 0.3)
WINDOW = 64  # tokens, of a text that is no list of examples
MOST_GRADIENT = 1.0  # norm at which gradients are clipped, as in recorded.py

Make = Callable[[list[torch.Tensor]], torch.optim.Optimizer]
MakeAtRate = Callable[[float], Make]


@dataclass(frozen=True)
class Source:
    """A trajectory, which of its snapshots are used, and what it is."""

    text: str
    trajectory: Trajectory
    steps: Sequence[int]
    learning_rate: float | None = None
    final_eval_loss: float | None = None  # on the data of its own run

    def snapshots(self) -> Iterator[list[torch.Tensor]]:
        """The weights of each step, a list of tensors in the order of the layout."""
        layout = self.trajectory.layout
        assert layout is not None
        for step in self.steps:
            tensors = load_tensors(self.trajectory.path(step))
            yield [tensors[name] for name in layout.names]

    def displacement(self) -> list[torch.Tensor]:
        """The last weights less the first."""
        ends = dataclasses.replace(self, steps=[self.steps[0], self.steps[-1]])
        first, last = ends.snapshots()
        return [after - before for before, after in zip(first, last, strict=True)]

    def step_lengths(self) -> torch.Tensor:
        """Norm of each tensor's change from snapshot to snapshot, (T - 1, k), float64."""
        rows, before = [], None
        for weights in self.snapshots():
            if before is not None:
                rows.append([float((b - a).double().norm()) for a, b in zip(before, weights, strict=True)])
            before = weights
        return torch.tensor(rows, dtype=torch.float64)


# Mathematics


def evenly(last: int, count: int) -> list[int]:
    """`count` whole numbers from 0 to `last`, as even as rounding leaves them."""
    return [round(index * last / (count - 1)) for index in range(count)]


def walk_shares(lengths: torch.Tensor) -> torch.Tensor:
    """Shares of variance of the principal components of a random walk in very many dimensions, descending.

    There all steps are orthogonal, so that x_i x_j^T is the sum of the squared lengths of the steps that both have
    made. With equal lengths and many snapshots share k is 6 / (pi k)^2 (Antognini & Sohl-Dickstein 2018).

    Args:
        lengths (`torch.Tensor` of shape `(T - 1,)`): Of the steps.
    """
    squares = lengths.double().square()
    made = torch.cat([squares.new_zeros(1), squares.cumsum(0)])  # (T,)
    gram = torch.minimum(made[:, None], made)
    gram = gram - gram.mean(dim=0)
    gram = gram - gram.mean(dim=1, keepdim=True)
    values = torch.linalg.eigvalsh(gram).flip(0)[:-1].clamp_min(0)  # the last is that of the mean, 0
    return values / values.sum()


def explained_by(basis: Basis, source: Source) -> float:
    """The share of the variance of a trajectory that lies in a basis of orthonormal directions."""
    orthonormal = basis.with_units("orthonormal")
    inside, whole, start, mean, count = [], 0.0, None, None, 0
    for weights in source.snapshots():
        start = weights if start is None else start  # differences: the start itself is far longer
        moved = [now - first for now, first in zip(weights, start, strict=True)]
        inside.append(orthonormal.project(moved).double())
        flat = torch.cat([part.reshape(-1) for part in moved]).double()
        whole, count = whole + float(flat.square().sum()), count + 1
        mean = flat if mean is None else mean + flat
    assert mean is not None
    coordinates = torch.stack(inside)  # (T, d)
    variance = float((coordinates - coordinates.mean(dim=0)).square().sum())
    return variance / (whole - float(mean.square().sum()) / count)


def loss_after(task: Task, displacement: Sequence[torch.Tensor]) -> float:
    """Held-out loss at the start plus the part of a displacement that lies in the task's basis."""
    run = InnerRun(task, 0)
    run.move(run.basis.coordinates(displacement))
    return float(run.evaluate())


# Runs


def whole_task(name: str, problem: Problem) -> Task:
    """A problem with all weights as its coordinates."""
    layout = Layout.from_named_parameters(problem.build_model().named_parameters())
    return Task(
        name, problem.build_model, lambda seed: problem.batches("all", seed), problem.loss, IdentityBasis(layout),
        problem.eval_batches("all"),
    )  # fmt: skip


def clipped(make: Make) -> Make:
    """The same optimizer, with the gradient clipped as in the runs of recorded.py."""

    def made(c: list[torch.Tensor]) -> torch.optim.Optimizer:
        def clip(*_: Any) -> None:
            nn.utils.clip_grad_norm_(c, MOST_GRADIENT)

        optimizer = make(c)
        optimizer.register_step_pre_hook(clip)
        return optimizer

    return made


def record_run(
    where: Path, task: Task, make: Make, steps: int, at: Sequence[int], *, seed: int = SEED, key: str = ""
) -> dict[str, Any]:
    """Trains all weights with linear decay, once, and keeps its snapshots after the steps `at` in `where`.

    `key` tells it from a run of another optimizer.

    Returns:
        `final_eval_loss`; the snapshots are in `where / "trajectory"`.
    """
    wanted = {*at}

    def work() -> dict[str, Any]:
        trajectory = Trajectory(where / "trajectory")

        def watched(c: list[torch.Tensor]) -> torch.optim.Optimizer:
            done = 0

            def keep(*_: Any) -> None:
                nonlocal done
                done += 1
                if done in wanted:
                    trajectory.write(done, zip(task.basis.layout.names, c, strict=True))

            trajectory.write(0, zip(task.basis.layout.names, c, strict=True))
            optimizer = clipped(make)(c)
            optimizer.register_step_post_hook(keep)
            return optimizer

        print(f"{where.name}: {steps} steps, {len(wanted)} snapshots", flush=True)
        result = train_on(task, watched, steps, seed=seed, schedule="linear", evaluate_at=(steps,))
        return {"final_eval_loss": result["eval"][-1][1]}

    return made_once(
        where / "done.json", stamp(task.name, steps, seed, sorted(wanted), key), work, where / "trajectory"
    )


def random_walk(where: Path, reference: Source, seed: int = 0) -> Trajectory:
    """A walk from the reference's first snapshot: its steps have the same length a tensor, in Gaussian directions."""

    def work() -> dict[str, Any]:
        trajectory, generator = Trajectory(where / "trajectory"), torch.Generator().manual_seed(seed)
        layout = reference.trajectory.layout
        assert layout is not None
        weights = [nn.Parameter(tensor) for tensor in next(reference.snapshots())]
        trajectory.write(reference.steps[0], zip(layout.names, weights, strict=True))
        for step, lengths in zip(reference.steps[1:], reference.step_lengths(), strict=True):
            for weight, length in zip(weights, lengths, strict=True):
                direction = torch.randn(weight.shape, generator=generator)
                weight.data += float(length) * direction / direction.norm()
            trajectory.write(step, zip(layout.names, weights, strict=True))
        return {}

    made_once(where / "done.json", f"{seed}-{list(reference.steps)}", work, where / "trajectory")
    return Trajectory(where / "trajectory")


def other_start(problem: Problem) -> Callable[[], nn.Module]:
    """The network with the entries of each tensor of its start in another order.

    The entries of a tensor are drawn alike, so that this is another draw of the start, whatever the network.

    Raises:
        `ValueError`: nothing of the start is random.
    """

    def build() -> nn.Module:
        model = problem.build_model()
        generator, changed = torch.Generator().manual_seed(SEED), False
        for p in model.parameters():
            entries = p.data.reshape(-1)
            shuffled = entries[torch.randperm(entries.numel(), generator=generator)]
            changed = changed or not torch.equal(shuffled, entries)
            p.data = shuffled.view_as(p)
        if not changed:
            raise ValueError("the start of this network is no random one, expected weights that differ; take another")
        return model

    return build


def other_data(name: str, data: str, problem: Problem) -> tuple[str, Problem]:
    """What the same network is trained on instead, in words and as a problem."""
    if name == "e2e-gpt2":
        source = data if data == "embedded" else str(Path(data) / "e2e_nlg")
        tokenizer = train_tokenizer(load_rows(source, "train"))
        text = "".join(python_docs(capitals=False).values())
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        return "Python's help topics in the tokens of E2E", on_text(problem, ids)
    if name.startswith("cifar-") and data != "embedded":
        return "generated figures of ten classes instead of CIFAR-10", PROBLEMS[name]("embedded")
    order = torch.randperm(10, generator=torch.Generator().manual_seed(SEED))

    def relabelled(batch: Any) -> Any:
        return batch[0], order[batch[1]]

    return "the same images, their classes in another order", dataclasses.replace(
        problem,
        batches=lambda part, seed: (relabelled(batch) for batch in problem.batches(part, seed)),
        eval_batches=lambda part: [relabelled(batch) for batch in problem.eval_batches(part)],
    )


def on_text(problem: Problem, ids: torch.Tensor, count: int = 32) -> Problem:
    """A language model on windows of a text of token ids, (length,); the last twentieth is held out."""
    cut = len(ids) - len(ids) // 20

    def windows(starts: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = ids[starts[:, None] + torch.arange(WINDOW)]  # (batch, WINDOW)
        return {"input_ids": rows, "labels": rows}

    def batches(part: str, seed: int) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed & 0x7FFF_FFFF)
        while True:
            yield windows(torch.randint(cut - WINDOW, (count,), generator=generator))

    held_out = [windows(torch.linspace(cut, len(ids) - WINDOW, 4 * count).long())]
    return dataclasses.replace(problem, batches=batches, eval_batches=lambda part: held_out)


def recorded_sources(name: str, problem: Problem, data: str, place: Path, snapshots: int) -> dict[str, Source]:
    """Records what a subspace may come from, each once, and keeps it in `place`.

    "adamw" has four times as many snapshots as the others. Its first quarter and the random walk come of it.
    """
    task, steps, rate = whole_task(name, problem), problem.steps, problem.learning_rate
    few = evenly(steps, snapshots)

    def adamw(c: list[torch.Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(c, lr=rate, weight_decay=0.0)

    def source(kind: str, text: str, of: Task, make: Make, lr: float, at: list[int], seed: int = SEED) -> Source:
        where = place / kind.replace(" ", "-")
        made = record_run(where, of, make, steps, at, seed=seed, key=f"{kind} {lr:g}")
        return Source(text, Trajectory(where / "trajectory"), at, lr, made["final_eval_loss"])

    many = evenly(steps, 4 * snapshots)
    sources = {"adamw": source("adamw", "AdamW, the reference", task, adamw, rate, many)}
    reference = sources["adamw"]
    sgd: MakeAtRate = lambda lr: lambda c: torch.optim.SGD(c, lr=lr, momentum=0.9)  # noqa: E731
    arm = TaskArm(lambda lr: clipped(sgd(lr)), SGD_RATES)
    # a quarter of the steps tells the rates apart, and decays to 0 as the whole run does
    tuned = compare_on(task, {"sgd": arm}, max(1, steps // 4), seeds=1, eval_every=steps, cache=place / "tuning")
    lr = tuned["sgd"]["learning_rate"]
    sources["sgd"] = source(
        "sgd", f"SGD with momentum 0.9; rate tuned over {max(1, steps // 4)} steps", task, sgd(lr), lr, few
    )
    sources["first quarter"] = dataclasses.replace(
        reference, text="the first quarter of AdamW's run", steps=many[:snapshots], final_eval_loss=None
    )
    started = dataclasses.replace(task, build_model=other_start(problem))
    text = "AdamW from another start (the entries of each tensor in another order), with other batches"
    sources["another start"] = source("another start", text, started, adamw, rate, few, SEED + 1)
    words, other = other_data(name, data, problem)
    sources["another data set"] = source(
        "another data set", f"AdamW on {words}", whole_task(name, other), adamw, rate, few
    )
    fewer = dataclasses.replace(reference, steps=every_fourth(many))
    sources["random walk"] = Source(
        "a random walk with the steps of AdamW's run, tensor by tensor", random_walk(place / "random-walk", fewer),
        fewer.steps,
    )  # fmt: skip
    return sources


def every_fourth(steps: Sequence[int]) -> list[int]:
    """A quarter of the steps, the first and the last among them."""
    return [steps[index] for index in evenly(len(steps) - 1, len(steps) // 4)]
