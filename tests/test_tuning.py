"""Tuning by hand: grids, how they grow, how seeds overrule one lucky run."""

import math

import pytest

from hf_sl2o.experiments.tuning import best_of, choices, final_loss, over_seeds, search, summary

GRID = (("std", 0.1), ("std", 0.3), ("std", 0.03), ("orthonormal", 1.0), ("orthonormal", 0.3), ("orthonormal", 0.1))


def ends_at(loss, **more):
    run = {"eval": [[0, 9.0], [10, loss]], "accuracy": [[10, 0.5]], "train_loss": [[10, loss]], "seconds": 2.0}
    return {**run, "peak_bytes": None, "state_bytes": 8, **more}


def test_quick_grids_keep_two_rates_in_each_units_and_lora_has_one_units():
    assert choices(GRID) == GRID
    assert choices(GRID, quick=True) == (GRID[0], GRID[1], GRID[3], GRID[4])
    rates = [lr for _, lr in choices(GRID, one_unit=True)]
    assert rates == [0.1, 0.3, 0.03, 1.0] and choices((), quick=True, one_unit=True) == ()


@pytest.mark.parametrize(("best", "runs"), [(0.1, 3), (0.3, 4), (0.9, 5), (9.0, 7), (1e9, 8)])
def test_a_grid_grows_until_its_best_rate_lies_inside(best, runs):
    """From 0.03, 0.1, 0.3 by half decades to one digit: 0.9, 3, 9, 30, to eight rates at most."""
    asked = []

    def run(choice):
        asked.append(choice[1])
        return ends_at(abs(math.log10(choice[1] / best)))

    tuned = search(run, [("std", lr) for lr in (0.1, 0.03, 0.3)], grow=True)
    assert len(tuned) == len(asked) == runs and asked == [lr for _, lr in tuned]
    if runs < 8:
        assert best_of(tuned) == ("std", best)
        rates = sorted(asked)
        assert rates[0] < best < rates[-1]
    fixed = search(run, [("std", lr) for lr in (0.1, 0.03, 0.3)], grow=False)
    assert len(fixed) == 3


def test_a_run_that_diverged_is_never_the_best():
    tuned = {("std", 1.0): ends_at(float("nan")), ("std", 0.1): ends_at(2.0)}
    assert best_of(tuned) == ("std", 0.1) and final_loss(tuned["std", 1.0]) == math.inf
    means, _ = over_seeds(lambda choice, seed: tuned[choice], tuned, seeds=2, finalists=2)
    assert summary(tuned, means, [tuned["std", 0.1]])["finalists"] == [["std", 0.1, 2.0], ["std", 1.0, None]]


def test_one_lucky_seed_is_overruled_by_the_mean_of_all():
    tuned = {("std", 1.0): ends_at(1.0), ("std", 0.1): ends_at(1.1), ("std", 0.01): ends_at(1.2)}
    others = {("std", 1.0): 2.0, ("std", 0.1): 1.2}  # the third is no finalist and must not be asked for
    means, seeds = over_seeds(lambda choice, seed: ends_at(others[choice] + seed), tuned, seeds=3, finalists=2)
    assert means == {("std", 0.1): pytest.approx((1.1 + 2.2 + 3.2) / 3), ("std", 1.0): pytest.approx((1 + 3 + 4) / 3)}
    found = summary(tuned, means, seeds)
    assert (found["units"], found["learning_rate"]) == ("std", 0.1)
    assert found["final_eval_loss"] == pytest.approx((1.1 + 2.2 + 3.2) / 3) and len(found["grid"]) == 3
    assert found["eval"] == [[0, 9.0], [10, pytest.approx((1.1 + 2.2 + 3.2) / 3)]]
    assert found["peak_bytes"] is None and "test_accuracy_per_seed" not in found
    one, _ = over_seeds(lambda choice, seed: ends_at(5.0), tuned, seeds=3, finalists=1)
    assert list(one) == [("std", 1.0)]
