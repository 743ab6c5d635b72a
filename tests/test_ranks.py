"""Processes that were started differently say so at once, on every rank, by the name of the first difference."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hf_sl2o import (
    IdentityBasis,
    Layout,
    LearnedOptimizer,
    LSTMRule,
    RandomBasis,
    RuleConfig,
    SL2OTrainingArguments,
    SubspaceOptimizer,
)
from hf_sl2o.foundation.ranks import (
    as_json,
    basis_facts,
    check_same_on_all_ranks,
    first_difference,
    optimizer_facts,
    rule_facts,
)
from hf_sl2o.training.facts import LOCAL_FIELDS, training_facts

from .conftest import random_dense, tiny_gpt2
from .ranks_worker import DIFFERENT, OTHERS, launch


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each rank said to every case, from one pair of processes."""
    folder = tmp_path_factory.mktemp("two")
    codes, errors = launch("tests.ranks_worker", folder)
    assert codes == [0, 0], errors[0][-3000:] + errors[1][-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


# The comparison itself


@pytest.mark.parametrize("name", ["same", "again", "after differences", "after being alone", "late"])
def test_equal_facts_pass_also_after_others(two, name):
    assert [rank["comparisons"][name][0] for rank in two] == ["", ""], two


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("seed", "seed is 1 on rank 0 and 2 on rank 1"),
        ("nested", "rule.hidden is 4 on rank 0 and 5 on rank 1"),
        ("list", 'groups is [{"lr": 1.0}] on rank 0 and [{"lr": 0.5}] on rank 1'),
        ("absent", "more is not given on rank 0 and 3 on rank 1"),
        ("type", "none is null on rank 0 and 0 on rank 1"),
        ("long", "seed is "),
        ("without a store", "seed is 0 on rank 0 and 1 on rank 1"),
    ],
)
def test_a_difference_is_named_on_every_rank(two, name, text):
    for rank in two:
        kind, said, seconds = rank["comparisons"][name]
        assert kind == "ValueError" and said.startswith(text) and len(said) < 400 and seconds < 10
        assert said.endswith("the processes of a run need the same test settings: start all of them alike")


def test_a_rank_that_does_not_come_is_noticed(two):
    for name, waiting in (("alone", 0), ("elsewhere", 1)):
        kind, said, seconds = two[waiting]["comparisons"][name]
        assert kind == "RuntimeError" and seconds < 5
        assert said.startswith(f"rank {1 - waiting} did not get here within 0.5 s")
        assert "did it start with another optim" in said
        assert two[1 - waiting]["comparisons"][name][0] == ""


def test_one_process_compares_nothing():
    check_same_on_all_ranks({"not JSON": object()}, "test")


def test_first_difference_of_many_ranks():
    assert first_difference([{"a": 1, "b": {"c": 2}}] * 4) is None
    facts = [{"a": 1, "b": {"c": rank % 2}} for rank in range(5)]
    assert first_difference(facts) == "b.c is 0 on ranks 0, 2 and 4 and 1 on ranks 1 and 3"
    assert first_difference([{"a": {}}, {"a": {"b": 1}}]) == "a is {} on rank 0 and not given on rank 1"
    long = [{"a": "x" * 300 + str(rank)} for rank in range(2)]
    assert first_difference(long) is not None and first_difference(long[:1] * 2) is None


# What is compared


def test_training_facts_are_json_and_leave_out_what_is_local(tmp_path):
    given = {"use_cpu": True, "lr_scheduler_kwargs": {"x": 1}, "hub_token": "secret", "output_dir": str(tmp_path)}
    for kind in (TrainingArguments, Seq2SeqTrainingArguments, SL2OTrainingArguments):
        facts = training_facts(kind(**given))
        text = json.dumps(facts)
        assert "secret" not in text and str(tmp_path) not in text and json.loads(text) == facts
        assert next(iter(facts)) == "optim" and not set(facts) & set(LOCAL_FIELDS)
        assert set(facts) | set(LOCAL_FIELDS) >= {
            name for name in kind.__dataclass_fields__ if not name.startswith("_")
        }
        assert facts == training_facts(kind(**{**given, "output_dir": str(tmp_path / "x"), "hub_token": "other"}))
        assert facts != training_facts(kind(**given, warmup_steps=5))
    assert set(LOCAL_FIELDS) <= set(TrainingArguments.__dataclass_fields__)  # none has a slip in its name
    assert facts["lr_scheduler_type"] == "linear" and facts["sl2o_outside"] == "freeze"
    assert facts["accelerator_config"]["even_batches"] is True


def test_as_json_is_the_same_in_every_process():
    class Thing:
        pass

    value = {torch.float16: {3, 1, 2}, "a": [Path("x"), float("nan"), Thing(), Thing, torch.ones(2), torch.ones(99)]}
    name = f"{Thing.__module__}.{Thing.__qualname__}"
    tensor = {"shape": [99], "dtype": "torch.float32"}
    assert as_json(value) == {"torch.float16": [1, 2, 3], "a": ["x", "nan", name, name, [1.0, 1.0], tensor]}
    assert as_json(torch.device("cpu")) == "cpu" and as_json(LSTMRule().config)["hidden_size"] > 0


def optimizers(model, changed):
    """One optimizer by keyword, with one thing changed."""
    named = list(model.named_parameters())
    rule = {"config": RuleConfig(output_scale=0.2 if changed == "rule" else 0.1)}
    torch.manual_seed(1 if changed == "weights" else 0)
    learned = LSTMRule(**rule)
    given = {"seed": {"seed": 2}, "dim": {"dim": 5}}.get(changed, {})
    basis = random_dense(named, **given)
    basis = basis.with_units("orthonormal") if changed == "units" else basis
    average, norm = 4.0 if changed == "average" else 0.0, 0.5 if changed == "norm" else 0.0
    lr = 0.5 if changed == "lr" else 1.0

    def inner(c):
        if changed == "inner":
            return torch.optim.SGD(c, lr=lr)
        return LearnedOptimizer(c, learned, lr=lr, betas=(0.8, 0.9) if changed == "betas" else None)

    outside = torch.optim.AdamW if changed == "outside" else None
    if changed == "outside":
        named = [*named, ("head", torch.nn.Parameter(torch.zeros(3)))]
    return SubspaceOptimizer(named, basis, inner, average=average, max_grad_norm=norm, outside=outside)


def test_optimizer_facts_see_each_thing_that_makes_a_step():
    model = tiny_gpt2()
    same = optimizer_facts(optimizers(model, None))
    assert json.loads(json.dumps(same)) == same == optimizer_facts(optimizers(tiny_gpt2(seed=3), None))
    seen = {}
    for changed in (
        "rule", "weights", "seed", "dim", "units", "average", "norm", "lr", "inner", "betas", "outside"
    ):  # fmt: skip
        seen[changed] = first_difference([same, optimizer_facts(optimizers(model, changed))])
    named = {key: text.split(" is ")[0] for key, text in seen.items()}
    assert all(named.pop(key).startswith("basis.") for key in ("seed", "units"))
    assert named == {
        "rule": "rule.config.output_scale", "weights": "rule.fingerprint", "dim": "basis.dim", "lr": "lr",
        "average": "average", "norm": "max_grad_norm", "inner": "inner", "betas": "betas", "outside": "parameters",
    }  # fmt: skip


def test_optimizer_facts_of_torchs_own_and_of_other_parameters():
    make, linear = torch.optim.AdamW, torch.nn.Linear(3, 2)
    same = optimizer_facts(make(linear.parameters()))
    assert same == optimizer_facts(make(torch.nn.Linear(3, 2).parameters()))
    for other, name in (
        (make(linear.parameters(), weight_decay=0.5), "weight_decay"),
        (make(torch.nn.Linear(2, 3).parameters()), "names_and_shapes"),
        (make([{"params": linear.weight}, {"params": linear.bias, "lr": 0.1}]), "group 1's lr"),
        (torch.optim.SGD(linear.parameters()), "optimizer"),
    ):
        assert first_difference([same, optimizer_facts(other)]).startswith(f"{name} is ")


def test_facts_of_bases_and_rules():
    layout = Layout.from_named_parameters(tiny_gpt2().named_parameters())
    random = [basis_facts(RandomBasis(layout, 3, seed=seed)) for seed in (0, 0, 1)]
    assert random[0] == random[1] != random[2]
    assert basis_facts(IdentityBasis(layout))["dim"] == layout.n  # no matrix of n x n is made
    torch.manual_seed(0)
    rules = [LSTMRule(), LSTMRule()]
    assert rule_facts(rules[0]) != rule_facts(rules[1])
    assert rule_facts(rules[0], weights=False) == rule_facts(rules[1], weights=False)


# Whole trainings


@pytest.mark.parametrize("name", [*DIFFERENT, *OTHERS])
def test_trainers_that_differ_end_within_the_first_step(two, name):
    named = name if name in DIFFERENT else OTHERS[name][2]
    for rank in two:
        kind, said, seconds = rank["trainings"][name]
        assert kind == "ValueError" and said.startswith(named) and seconds < 30, (name, kind, said)
        assert "on rank 0" in said and "on rank 1" in said


@pytest.mark.parametrize("name", ["same", "local"])
def test_trainers_that_are_alike_train(two, name):
    assert [rank["trainings"][name][:2] for rank in two] == [["", ""]] * 2
