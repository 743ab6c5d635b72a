"""Levels by hand: steps to losses and to accuracies, the fastest rate of a grid, what was paid before."""

import copy

import pytest
import torch

from hf_sl2o.experiments.environment import portable
from hf_sl2o.experiments.kept.keys import digest
from hf_sl2o.experiments.levels import (
    amortised,
    fastest,
    meta_training_steps,
    paid_for_rules,
    to_accuracies,
    to_losses,
)
from hf_sl2o.foundation.files import save_json

RUNS = {
    "one": {
        "eval_per_seed": [[[0, 2.0], [10, 1.0], [20, 0.5]], [[0, 2.0], [10, 1.5], [20, 0.9]]],
        "accuracy_per_seed": [[[0, 0.1], [10, 0.6], [20, 0.7]], [[0, 0.1], [10, 0.2], [20, 0.6]]],
        "grid": [["std", 0.1, [[0, 2.0], [10, 1.0]]], ["std", 1.0, [[0, 2.0], [5, 0.8], [10, 1.2]]]],
    },
    "two": {
        "eval_per_seed": [[[0, 2.0], [10, 0.9]], [[0, 2.0], [10, 1.1]]],
        "accuracy_per_seed": [[[0, 0.1], [10, 0.6]], [[0, 0.1], [10, 0.59]]],
        "grid": [["std", 0.1, [[0, 2.0], [10, 1.6]]]],
    },
}


def test_steps_to_a_loss_are_means_and_none_where_a_seed_never_gets_there():
    found = to_losses(RUNS, {"level": 1.0})["level"]
    assert found["target"] == 1.0 and found["steps"] == {"one": 15.0, "two": None}
    assert found["fastest_of_grid"] == {"one": ["std", 1.0, 5], "two": None}
    assert fastest(RUNS["one"]["grid"], 1.7) == ["std", 1.0, 5]


def test_steps_to_an_accuracy_count_upwards():
    found = to_accuracies(RUNS, {"best": 0.6, "less": 0.59})
    assert found["best"]["steps"] == {"one": 15.0, "two": None}
    assert found["less"]["steps"] == {"one": 15.0, "two": 10.0}


@pytest.mark.parametrize(
    ("stages", "total"),
    [
        ({}, 0),
        ({"sample": {"seconds": 3.0}, "meta": {"seconds": 2.0, "steps": 500}}, 1500),
        ({"meta": {"seconds": 2.0, "steps": 500}}, 500),
    ],
)
def test_what_was_paid_is_in_training_steps(stages, total):
    cost = amortised(stages, 1000, 4)
    assert cost["total"] == total == cost["trajectory"] + cost["meta_training"]
    assert cost["other_recorded_runs"] == 3000 and set(cost["seconds"]) == set(stages)
    assert amortised(stages, 1000, 0)["other_recorded_runs"] == 0


def test_what_a_rule_cost_is_counted_from_how_it_was_made(tmp_path):
    assert meta_training_steps(tmp_path) is None  # nothing is known
    first = {
        "tasks": ["a", "b"],
        "settings": {"inner_steps": 20, "unroll_length": 10, "meta_epochs": 3, "curriculum": [10, 30, 20]},
        "validation": [{}] * 4,
    }
    save_json(tmp_path / "provenance.json", first)
    alone = 2 * (10 + 30 + 20) + 2 * 4 * 20
    assert meta_training_steps(tmp_path) == alone
    second = {
        "tasks": ["a"],
        "settings": {"inner_steps": 50, "unroll_length": 50, "meta_epochs": 2, "episodes_per_task": 3},
        "validation": [{}] * 2,
    }
    save_json(tmp_path / "provenance.json", {"stages": [first, second]})
    assert meta_training_steps(tmp_path) == alone + 3 * 2 * 50 + 2 * 50
    cost = amortised({}, 1000, 0, {"sl2o_mine": tmp_path, "sl2o_theirs": tmp_path / "nowhere"})
    assert cost["total"] == 0  # paid once for every task
    assert paid_for_rules(cost).endswith(f"sl2o_mine {alone + 400}, sl2o_theirs unknown.")
    assert paid_for_rules(amortised({}, 1000, 0)) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_are_kept_for_the_bytes_of_the_weights(dtype):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.PReLU()).to(dtype)  # the last has one number
    found = digest(*network.parameters())
    assert digest(*copy.deepcopy(network).parameters()) == found
    weight = network[0].weight.data
    weight[0] = weight[0].flip(0)  # every sum stays what it was
    assert digest(*network.parameters()) != found
    weight[0] = weight[0].flip(0)
    assert digest(*network.parameters()) == found
    network[0].weight.data = weight.t().contiguous().t()  # other strides
    assert not network[0].weight.is_contiguous() and digest(*network.parameters()) == found


def test_paths_lose_their_folders_and_nothing_else_changes():
    given = {"rules": ["default", "mine=/a/b/rule"], "data": "/a/data", "lr": 0.1, "note": "x=y/z", "none": None}
    found = {"rules": ["default", "mine=rule"], "data": "data", "lr": 0.1, "note": "x=y/z", "none": None}
    assert portable(given) == found
