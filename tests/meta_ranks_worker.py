"""What each process of test_meta_distributed runs where they differ in one thing at a time."""

import json
import os
import sys
import time
from pathlib import Path

import torch

from hf_sl2o import PES, FirstOrder, LSTMRule, MetaTrainer, MetaTrainingArguments, RuleConfig
from tests.conftest import random_dense
from tests.meta_cases import dropout_network
from tests.test_meta import make_task

#: What the second process has instead, and what is named; "" where they may differ.
CASES = {
    "inner_steps": ({"inner_steps": 20}, "inner_steps"),
    "unroll_length": ({"unroll_length": 3}, "unroll_length"),
    "meta_epochs": ({"meta_epochs": 3}, "meta_epochs"),
    "meta_learning_rate": ({"meta_learning_rate": 0.1}, "meta_learning_rate"),
    "learning_rate": ({"learning_rate": 0.5}, "learning_rate"),
    "seed": ({"seed": 1}, "seed"),
    "eval_every": ({"eval_every": 2}, "eval_every"),
    "save_steps": ({"save_steps": 1}, "save_steps"),
    "curriculum": ({"curriculum": [10, 15]}, "curriculum"),
    "random_scaling": ({"random_scaling": 0.5}, "random_scaling"),
    "episodes_per_task": ({"episodes_per_task": 2}, "episodes_per_task"),
    "mixed_precision": ({"mixed_precision": "bf16"}, "mixed_precision"),
    "hidden_size": ({"hidden_size": 6}, "rule.config.hidden_size"),
    "basis": ({"basis": 5}, "basis of tasks 'b'."),
    "task names": ({"names": ("a", "x")}, "tasks"),
    "fewer tasks": ({"names": ("a", "b", "c")}, "tasks"),
    "eval tasks": ({"eval_names": ("a",)}, "eval_tasks"),
    "estimator": ({"estimator": PES(sigma=0.05)}, "estimator"),
    "estimator's": ({"estimator": FirstOrder(coordinates=2)}, "estimator"),
    "meta_optimizer": ({"meta_optimizer": lambda p: torch.optim.SGD(p, lr=1e-2)}, "meta_optimizer.optimizer"),
    "its lr": ({"meta_optimizer": lambda p: torch.optim.Adam(p, lr=0.5)}, "meta_optimizer.lr"),
    "nothing": ({}, ""),
    "weights": ({"rule_seed": 5}, ""),
    "local": ({"max_seconds": 1000.0}, ""),
}


def train(
    folder, *, hidden_size=4, basis=1, names=("a", "b"), eval_names=None, estimator=None, meta_optimizer=None,
    rule_seed=0, **options,
):  # fmt: skip
    def tasks(of):
        made = random_dense(dropout_network().named_parameters(), dim=5, seed=basis, units=torch.ones(5))
        return [make_task(name="a"), *(make_task(name=n, build_model=dropout_network, basis=made) for n in of[1:])]

    settings = {"unroll_length": 5, "inner_steps": 15, "meta_epochs": 1, "eval_every": 1, **options}
    args = MetaTrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, process_timeout=20, **settings)
    torch.manual_seed(rule_seed)
    rule = LSTMRule(RuleConfig(output_scale=0.3, hidden_size=hidden_size))
    eval_tasks = None if eval_names is None else tasks(eval_names)
    MetaTrainer(rule, args, tasks(names), eval_tasks, estimator=estimator, meta_optimizer=meta_optimizer).train()
    return float(torch.cat([p.detach().reshape(-1) for p in rule.parameters()]).double().sum())


def main(folder):
    torch.set_num_threads(1)
    rank, said = int(os.environ["RANK"]), {}
    for name, (other, _) in CASES.items():
        start = time.perf_counter()
        try:
            outcome = ["", train(folder / name, **(other if rank else {}))]
        except Exception as error:
            outcome = [type(error).__name__, str(error)]
        said[name] = [*outcome, time.perf_counter() - start]
    (folder / f"{rank}.json").write_text(json.dumps(said))
    time.sleep(0.5)  # gloo's threads are done with the last collective: a process that ends before may abort


if __name__ == "__main__":
    main(Path(sys.argv[1]))
