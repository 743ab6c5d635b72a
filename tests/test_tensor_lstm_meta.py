"""Meta-training of a rule that finds its own scale: replay, finite differences, divergence, scales of an episode."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from hf_sl2o import (
    PES,
    FirstOrder,
    IdentityBasis,
    Layout,
    LearnedOptimizer,
    MetaTrainingArguments,
    SecondOrder,
    Task,
    unroll,
)
from hf_sl2o.meta.episodes import Episode
from hf_sl2o.meta.task import InnerRun

from .tensor_lstm_cases import ByHand, a_rule

STEPS = 5


class Exact(IdentityBasis):
    compute_dtype = torch.float64


def build():
    """Matrices, one of which begins at zero, and vectors."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    nn.init.zeros_(net[0].weight)
    return net


def matrices():
    """None of them zero."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()


def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 4, generator=generator, dtype=torch.float64) for _ in range(20)]


def task(spoiled=None, at=2, of=build):
    """`spoiled`: what the loss is multiplied by from step `at` of a run on."""

    def loss(model, x):
        model.seen = getattr(model, "seen", 0) + 1
        value = (model(x) - torch.sin(x[:, :3])).square().mean()
        return value if spoiled is None or model.seen <= at else value * spoiled

    basis = Exact(Layout.from_named_parameters(of().named_parameters()))
    return Task("net", of, batches, loss, basis, batches(99)[:1])


def run_of(of):
    run = InnerRun(of, 0)
    run.basis = of.basis
    return run


def flat(gradients):
    return torch.cat([g.reshape(-1) for g in gradients])


def replayed(rule, coordinates=None, log=False, rates=(0.7, 0.7, 0.5, 0.3, 0.1)):
    """The meta-gradient of one window, and the gradients and losses of its inner steps."""
    run, seen = run_of(task()), []
    take = run.gradient

    def gradient():
        loss, g = take()
        seen.append((float(loss), g.clone()))
        return loss, g

    run.gradient = gradient
    c = torch.zeros(run.basis.dim, dtype=torch.float64)
    state = rule.init_state(run.basis.dim, dtype=torch.float64, weights=run.weights(), rate=rates[0])
    surrogate, *_ = unroll(rule, run, c, state, steps=STEPS, lr=rates, coordinates=coordinates, log=log)
    grads = torch.autograd.grad(surrogate, list(rule.parameters()), allow_unused=True, materialize_grads=True)
    return flat(grads), seen


@pytest.mark.parametrize("log", [False, True])
def test_replay_equals_differences_of_a_loop_in_numpy_over_the_same_gradients(log):
    """What the rule sees is fixed in it, so that the loop by hand depends on the rule's weights as the replay does."""
    rule, rates = a_rule().double(), (0.7, 0.7, 0.5, 0.3, 0.1)
    found, seen = replayed(rule, log=log)
    start = list(build().parameters())
    sizes = [p.numel() for p in start]
    level, levels = 0.0, []
    for step, (loss, _) in enumerate(seen):
        level += max(1 / (step + 1), 0.1) * (loss - level)
        levels.append(level if log else 1.0)

    def surrogate():
        reference, total = ByHand(rule, start, rates[0]), 0.0
        for step, (_, g) in enumerate(seen):
            parts = [part.view(p.shape).numpy() for part, p in zip(g.split(sizes), start, strict=True)]
            for part, x in zip(parts, reference.of, strict=True):
                total += (part * x["theta"]).sum() / levels[step]
            reference.step(parts, rates[step])
        return total

    vector = torch.nn.utils.parameters_to_vector(rule.parameters()).detach()
    chosen = torch.randperm(len(vector), generator=torch.Generator().manual_seed(0))[:25]
    chosen = torch.cat([chosen, torch.arange(len(vector) - 60, len(vector), 3)])  # of the last parts, too
    numeric = []
    for i in chosen:
        ends = []
        for sign in (1, -1):
            moved = vector.clone()
            moved[i] += sign * 1e-4
            torch.nn.utils.vector_to_parameters(moved, rule.parameters())
            ends.append(surrogate())
        numeric.append((ends[0] - ends[1]) / 2e-4)
    torch.nn.utils.vector_to_parameters(vector, rule.parameters())
    largest = float(found.abs().max())
    np.testing.assert_allclose(found[chosen].numpy(), numeric, rtol=1e-4, atol=1e-5 * largest)
    other, _ = replayed(rule, log=not log)
    assert (other[chosen] - found[chosen]).abs().max() > 1e-2 * largest  # the break


def test_all_coordinates_as_a_sample_are_the_whole_and_halves_add_up_to_it():
    rule = a_rule().double()
    whole, seen = replayed(rule)
    n = len(seen[0][1])
    torch.testing.assert_close(replayed(rule, torch.arange(n))[0], whole, rtol=1e-9, atol=1e-12)
    parts = [torch.arange(0, n, 2), torch.arange(1, n, 2)]
    halves = [replayed(rule, part)[0] for part in parts]
    both = sum(len(part) / n * half for part, half in zip(parts, halves, strict=True))
    torch.testing.assert_close(both, whole, rtol=1e-9, atol=1e-12)
    assert (halves[0] - whole).abs().max() > 1e-2 * whole.abs().max()  # the break


def window(estimator, rule, tasks=None, log=False):
    runs = [run_of(of) for of in (tasks or [task()] * estimator.runs)]
    generator = torch.Generator().manual_seed(0)
    return estimator.window(
        rule, runs, estimator.begin(rule, runs), [0.5] * STEPS, total_steps=STEPS, generator=generator, log=log
    )


def test_second_order_equals_finite_differences_and_all_estimators_see_the_same_losses():
    rule = a_rule().double()
    exact = window(SecondOrder(), rule)
    torch.testing.assert_close(window(FirstOrder(), rule).losses, exact.losses, rtol=1e-9, atol=0)
    torch.testing.assert_close(window(PES(sigma=1e-9), rule).losses, exact.losses, rtol=1e-6, atol=0)
    for (name, weight), gradient in zip(rule.named_parameters(), exact.gradients, strict=True):
        index, ends = tuple(0 for _ in weight.shape), []
        for sign in (1, -1):
            with torch.no_grad():
                weight[index] += sign * 1e-5
            ends.append(float(window(SecondOrder(), rule).losses.sum()))
            with torch.no_grad():
                weight[index] -= sign * 1e-5
        numeric = (ends[0] - ends[1]) / 2e-5
        assert abs(numeric) > 1e-8, name
        np.testing.assert_allclose(gradient[index].item(), numeric, rtol=1e-3, err_msg=name)


# Divergence


@pytest.mark.parametrize("spoiled", [math.nan, math.inf, 1e12])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_pair_of_which_one_diverges_gives_a_bounded_estimate_against_it(spoiled, at):
    sigma, rule = 0.05, a_rule().double()
    for sign, tasks in ((1, (task(spoiled, at), task())), (-1, (task(), task(spoiled, at)))):
        found = window(PES(sigma=sigma), rule, tasks, log=True)
        noise = flat(found.carry[f"xi.{name}"] for name, _ in rule.named_parameters())  # of +, in the first window
        estimate = flat(found.gradients)
        assert bool(estimate.isfinite().all())
        difference = float(estimate @ noise / (noise @ noise)) * 2 * sigma**2
        assert (STEPS - at) * 0.9 < sign * difference <= STEPS * (1 + 1e-9)  # each step that is bad counts as 1
        torch.testing.assert_close(estimate, difference / (2 * sigma**2) * noise)
        plain = flat(window(PES(sigma=sigma), rule, tasks).gradients)
        assert not bool((plain.abs() <= estimate.abs().max()).all())  # the break: without logarithms
    both = flat(window(PES(sigma=sigma), rule, (task(spoiled, at), task(spoiled, at)), log=True).gradients)
    assert bool(both.isfinite().all()) and float(both.abs().max()) < float(estimate.abs().max())


@pytest.mark.parametrize("spoiled", [math.nan, 1e12])
def test_an_episode_ends_with_what_its_last_window_says_against_divergence(spoiled):
    args = MetaTrainingArguments("unused", unroll_length=5, inner_steps=10, eval_every=1, meta_loss="log")
    summed = MetaTrainingArguments("unused", unroll_length=5, inner_steps=10, eval_every=1)
    of = {"seed": 0, "steps": 10, "random_scaling": 0.0, "device": torch.device("cpu"), "autocast": None}
    for estimator, settings, of_use in ((PES(), args, True), (PES(), summed, False), (FirstOrder(), args, False)):
        rule = a_rule()
        with torch.no_grad():
            rule.change.weight.zero_()
        episode = Episode(0, task(spoiled, at=2), estimator, **of)
        episode.begin(rule)
        gradient = episode.advance(rule, settings)
        assert episode.diverged and (gradient is not None) == of_use
        assert gradient is None or bool(gradient.isfinite().all())
        assert episode.advance(rule, settings) is None


# Episodes


def ended(random_scaling, of):
    episode = Episode(
        0, task(of=of), FirstOrder(), seed=3, steps=STEPS, random_scaling=random_scaling,
        device=torch.device("cpu"), autocast=None,
    )  # fmt: skip
    rule = a_rule(0.1)
    episode.begin(rule)
    args = MetaTrainingArguments(
        "unused", unroll_length=STEPS, inner_steps=STEPS, eval_every=1, lr_scheduler_type="linear", learning_rate=7.0
    )
    episode.advance(rule, args)
    return torch.cat([p.detach().flatten() for p in episode.runs[0].parameters]), episode.runs[0].gain


def stepped(lr, of):
    run = InnerRun(task(of=of), 3)
    optimizer = LearnedOptimizer(run.parameters, a_rule(0.1), lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / STEPS)
    for _ in range(STEPS):
        run.gradient()
        optimizer.step()
        scheduler.step()
    return torch.cat([p.detach().flatten() for p in run.parameters])


def test_an_episode_takes_the_steps_of_the_optimizer_in_any_scales():
    """Rescaled tensors go the same way; where the rule begins to look is drawn, and the run's rate does not count."""
    end, gain = ended(0.0, build)
    assert gain == 1.0
    torch.testing.assert_close(end, stepped(1.0, build), rtol=1e-4, atol=1e-5)
    end, gain = ended(1.0, matrices)
    assert 1 / math.e <= gain <= math.e and gain != 1.0
    torch.testing.assert_close(end, stepped(gain, matrices), rtol=1e-3, atol=1e-4)
    assert (end - stepped(1.0, matrices)).abs().max() > 1e-3  # the break
