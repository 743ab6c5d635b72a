"""The study of one run within a budget: its schedules and averages, its finishes beside a plain loop, what it says."""

import argparse
import copy
import json
import math

import numpy as np
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from hf_sl2o.experiments.one_run import ema_weight, mean_of, rate_factor, verdict
from hf_sl2o.experiments.tasks.named import full_task
from hf_sl2o.foundation.files import load_tensors
from recipes.studies import one_run
from recipes.studies.one_run import Budget, Finish, Plan

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("schedulefree", reason="one of the rivals")

N, RATE = 60, 3e-3


@pytest.fixture(scope="module")
def budget(tmp_path_factory):
    options = argparse.Namespace(steps=N, seeds=1, data="embedded", output_dir=tmp_path_factory.mktemp("runs"))
    return Budget(full_task("digits-mlp", "embedded"), options)


@pytest.fixture(scope="module")
def plain(budget):
    """A plain loop of AdamW: weights after each step of a constant rate, as one vector, and the optimizer's states."""
    task = budget.task
    model, weights, states = task.build_model(), [], []
    optimizer, batches = torch.optim.AdamW(model.parameters(), weight_decay=0.0), iter(task.batches(0))
    for step in range(N + 1):
        weights.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone())
        states.append(copy.deepcopy(optimizer.state_dict()))
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / (N // 20))
        optimizer.zero_grad()
        task.loss(model, next(batches)).backward()
        optimizer.step()
    return weights, states


def held_out(task, vector):
    model = task.build_model()
    torch.nn.utils.vector_to_parameters(vector, model.parameters())
    with torch.no_grad():
        return float(np.mean([task.loss(model, batch) for batch in task.eval_batches]))


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)],
)
def test_schedules_are_those_of_transformers(schedule, theirs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = theirs(optimizer, 10, 50), []
    for _ in range(50):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    ours = [rate_factor(schedule, step, 50, warm_up=10) for step in range(50)]
    np.testing.assert_allclose(ours[10:], rates[10:])
    np.testing.assert_allclose(ours[:9], rates[1:10])  # theirs makes a first step of length 0
    assert rate_factor("constant", 49, 50, warm_up=10) == 1.0
    with pytest.raises(ValueError, match="the schedule is 'step', expected constant, linear or cosine"):
        rate_factor("step", 0, 50)


def test_the_moving_average_forgets_as_it_says():
    values, average, biased = np.random.default_rng(0).normal(5.0, 1.0, 30), 0.0, 0.0
    for step, value in enumerate(values, 1):
        average += ema_weight(step, 0.9) * (value - average)
        biased += 0.1 * (value - biased)
    weights = 0.9 ** np.arange(29, -1, -1)
    assert average == pytest.approx((weights * values).sum() / weights.sum())
    assert biased != pytest.approx(average, rel=1e-2)


def test_the_constant_run_and_its_averages(budget, plain):
    weights, _ = plain
    run = budget.full(budget.constant, RATE, 0)
    assert run["eval"][-1] == [N, pytest.approx(held_out(budget.task, weights[N]), rel=1e-4)]
    assert [step for step, _ in run["eval"]] == list(range(10, N + 1, 10))
    means = {last: torch.stack(weights[-last:]).mean(dim=0) for last in (5, 10, 15, 20)}  # a snapshot at each step
    for last, mean in means.items():
        assert run["averages"][f"last {last}"] == pytest.approx(held_out(budget.task, mean), rel=1e-4)
    decayed = 0.98 ** torch.arange(N - 1, -1, -1)
    mean = (decayed[:, None] * torch.stack(weights[1:])).sum(dim=0) / decayed.sum()
    assert run["averages"]["decay 0.98"] == pytest.approx(held_out(budget.task, mean), rel=1e-4)
    assert run["averages"]["decay 0.98"] != pytest.approx(run["averages"]["decay 0.9"], rel=1e-4)
    trajectory = budget.weights(budget.constant, RATE, 0)
    vector = torch.cat([t.reshape(-1) for t in mean_of(trajectory, [N - 1, N]).values()])
    torch.testing.assert_close(vector.sort().values, ((weights[-1] + weights[-2]) / 2).sort().values)


def test_a_decay_goes_on_as_if_nothing_was_between(budget, plain):
    weights, states = plain
    steps = N // 5
    run = budget.full(Plan("linear", steps, N - steps), RATE, 0)

    def by_hand(state, skip):
        model = budget.task.build_model()
        torch.nn.utils.vector_to_parameters(weights[N - steps].clone(), model.parameters())
        optimizer, batches = torch.optim.AdamW(model.parameters(), weight_decay=0.0), iter(budget.task.batches(0))
        optimizer.load_state_dict(copy.deepcopy(state))
        for _ in range(skip):
            next(batches)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = RATE * (steps - step) / steps
            optimizer.zero_grad()
            budget.task.loss(model, next(batches)).backward()
            optimizer.step()
        return held_out(budget.task, torch.nn.utils.parameters_to_vector(model.parameters()))

    last = run["eval"][-1][1]
    assert last == pytest.approx(by_hand(states[N - steps], N - steps), rel=1e-4)
    assert last != pytest.approx(by_hand(states[0], N - steps), rel=1e-3)  # without its moments
    assert last != pytest.approx(by_hand(states[N - steps], 0), rel=1e-3)  # on batches that it has seen


def test_a_finish_in_the_subspace(budget, plain):
    weights, _ = plain
    steps = N // 5
    first = N - steps
    snapshots = torch.stack(weights[: first + 1]).double()
    centred = snapshots - snapshots.mean(dim=0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    units = values[:40] / math.sqrt(len(snapshots) - 1)
    lift = (directions[:40].T * units).float()  # (n, d)

    def by_hand(start):
        model, batches = budget.task.build_model(), iter(budget.task.batches(0))
        for _ in range(first):
            next(batches)
        c, velocity = torch.zeros(40), torch.zeros(40)
        for step in range(steps):
            torch.nn.utils.vector_to_parameters(start + lift @ c, model.parameters())
            model.zero_grad()
            budget.task.loss(model, next(batches)).backward()
            velocity = 0.9 * velocity + lift.T @ torch.cat([p.grad.reshape(-1) for p in model.parameters()])
            c = c - 0.1 * (steps - step) / steps * velocity
        return held_out(budget.task, start + lift @ c)

    run = budget.in_subspace(Finish("pca", "last", "momentum", steps), RATE, 0.1, 0)
    assert run["eval"][-2] == [first, pytest.approx(held_out(budget.task, weights[first]), rel=1e-4)]
    assert run["eval"][-1] == [N, pytest.approx(by_hand(weights[first]), rel=1e-3)]
    assert run["eval"][-1][1] < run["eval"][-2][1] and run["last"] == 1 and run["d"] == 40
    assert run["bytes"] == 4 * len(weights[0]) * (first + 1 + 40)
    means = {last: torch.stack(weights[first + 1 - last : first + 1]).mean(dim=0) for last in one_run.LAST}
    best = min(means, key=lambda last: held_out(budget.task, means[last]))
    mean = budget.in_subspace(Finish("pca", "mean", "momentum", steps), RATE, 0.1, 0)
    assert mean["last"] == best and mean["eval"][-1][1] == pytest.approx(by_hand(means[best]), rel=1e-3)
    assert mean["eval"] != run["eval"]


@pytest.mark.parametrize(
    ("basis", "d", "steps"),
    [
        ("layer", 4 * 3, range(N + 1)),
        ("decay", N // 5 - 1, range(N - 2 * N // 5 + 1, N - N // 5 + 1)),
        ("both", 40, range(N - N // 5 + 1)),
        ("random", 40, range(N + 1)),
        ("twa", 20, range(N + 1)),
    ],
)
def test_the_other_bases(budget, plain, basis, d, steps):
    how, first = Finish(basis, "mean" if basis == "twa" else "last", "adamw", N // 5), N - N // 5
    run = budget.in_subspace(how, RATE, 0.01, 0)
    source = budget.recorded(how)
    trajectory = budget.weights(source, RATE, 0)
    assert run["d"] == d and trajectory.steps == list(steps)
    (begin, start), (end, last) = run["eval"][-2:]
    assert (begin, end) == (first, N) and start != last
    curve = [step for step, _ in run["eval"]]
    assert curve == sorted({*curve}) and curve[0] == 10
    at_first = budget.in_subspace(Finish("pca", "last", "momentum", N // 5), RATE, 0.1, 0)["eval"][-2][1]
    assert (start == at_first) == (basis in ("layer", "random"))
    if basis == "twa":  # its directions are orthonormal and span the last snapshots themselves
        directions = budget.subspace("twa", source, first, RATE, 0)[0].as_matrix()
        torch.testing.assert_close(directions @ directions.T, torch.eye(20), atol=1e-4, rtol=0)
        for step, inside in ((first, True), (first - 19, True), (first - 30, False)):
            vector = torch.cat([t.reshape(-1) for t in snapshot_of(budget, trajectory, step)])
            outside = vector - directions.T @ (directions @ vector)
            assert (float(outside.norm() / vector.norm()) < 1e-4) == inside


def snapshot_of(budget, trajectory, step):
    snapshot = load_tensors(trajectory.path(step))
    return [snapshot[name] for name in budget.task.basis.layout.names]


def test_a_run_that_diverges_is_said_and_goes_on(budget):
    for _ in range(2):
        run = budget.full(budget.constant, 1e38, 0)
        assert run["diverged"] and math.isnan(run["eval"][-1][1])
        finish = budget.in_subspace(Finish("pca", "last", "adamw", N // 5), 1e38, 0.1, 0)
        assert math.isnan(finish["eval"][-1][1])
    assert math.isnan(budget.averaged(("last 5", 1e38))["eval"][-1][1])


def arm(kind, *finals):
    return {"kind": kind, "final_per_seed": list(finals), "final_eval_loss": sum(finals) / len(finals)}


def test_the_verdict():
    rivals = {"a": arm("rival", 1.0, 1.1), "b": arm("rival", 1.2, 1.2)}
    said = verdict({**rivals, "c": arm("ours", 0.8, 0.9), "d": arm("ours", 0.9, 0.9), "e": arm("control", 0.1, 0.1)})
    assert said["best_rival"] == "a" and said["best_ours"] == "c" and said["ratio"] == pytest.approx(0.85 / 1.05)
    assert said["spread"] == pytest.approx(0.1) and said["verdict"].endswith("0.1000: a variant wins")
    assert "best of 2 variants: 'c' with 0.8500; best of 2 rivals: 'a' with 1.0500" in said["verdict"]
    assert verdict({**rivals, "c": arm("ours", 0.99, 0.99)})["verdict"].endswith("0.1000: no variant wins")
    assert verdict({**rivals, "c": arm("ours", 2.0, 2.0)})["verdict"].endswith("no variant wins, the rival does")
    one = verdict({"a": arm("rival", 1.0), "c": arm("ours", 0.5)})
    assert one["spread"] is None and one["verdict"].endswith("one seed, so the spread is not known: no verdict")
    diverged = {"kind": "ours", "final_per_seed": [None], "final_eval_loss": None}
    with pytest.raises(ValueError, match="all 1 arms of kind 'ours' diverged; give lower rates"):
        verdict({**rivals, "c": diverged})


def test_the_study(tmp_path, monkeypatch):
    monkeypatch.setattr(one_run, "PARTS", (5,))
    few = {"twa": (("mean",), ("momentum",)), "pca": (("last", "mean"), ("adamw", "default")),
           "random": (("last",), ("adamw",))}  # fmt: skip
    monkeypatch.setattr(one_run, "ARMS_OF_BASES", few)
    words = ["--tasks", "digits-mlp", "--steps", str(N), "--output_dir", str(tmp_path / "out")]
    words += ["--json", str(tmp_path / "r.json")]
    result = one_run.main(words)
    task = result["tasks"]["digits-mlp"]
    kinds = [arm["kind"] for arm in task["arms"].values()]
    assert [kinds.count(kind) for kind in ("rival", "ours", "control")] == [9, 4, 1]
    for name, arm in task["arms"].items():
        assert arm["full_steps"] + arm["subspace_steps"] == arm["curve"][-1][0] == N
        assert len(arm["final_per_seed"]) == 2 and arm["final_eval_loss"] == pytest.approx(
            np.mean(arm["final_per_seed"])
        )
        final = {(rate, loss) for _, rate, loss in arm["grids"][-1]}
        assert arm["final_per_seed"][0] == min(loss for _, loss in final), name  # the best of its grid, on seed 0
        if not arm["subspace_steps"]:
            assert (arm["peak_rate"], arm["final_per_seed"][0]) in final
            rates = {rate for _, rate, _ in arm["grids"][0]}
            assert min(rates) < arm["peak_rate"] < max(rates)
    ours = {name: arm["final_eval_loss"] for name, arm in task["arms"].items() if arm["kind"] == "ours"}
    rivals = {name: arm["final_eval_loss"] for name, arm in task["arms"].items() if arm["kind"] == "rival"}
    assert ours[task["best_ours"]] == min(ours.values()) and rivals[task["best_rival"]] == min(rivals.values())
    assert task["ratio"] == pytest.approx(min(ours.values()) / min(rivals.values()))
    assert (tmp_path / "r.png").stat().st_size > 5000 and not list((tmp_path / "out").rglob("snapshot-*"))
    assert json.loads((tmp_path / "r.json").read_text())["environment"]["commit"]
    for name in ("train_full", "train_on", "loss_at"):
        monkeypatch.setattr(one_run, name, lambda *args, **kwargs: pytest.fail("it was done before"))
    assert one_run.main(words)["tasks"] == result["tasks"]


def test_what_cannot_be_right_is_said_before_anything_is_trained(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(one_run, "train_full", lambda *args, **kwargs: pytest.fail("it trains"))
    with pytest.raises(ValueError, match="--steps is 50, expected a multiple of the 60 snapshots of a run"):
        one_run.main(["--tasks", "digits-mlp", "--steps", "50"])
    with pytest.raises(ValueError, match="--tasks: there is no task 'nonsense'"):
        one_run.main(["--tasks", "nonsense"])
