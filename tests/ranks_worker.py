"""What each process of test_ranks runs: comparisons and trainers of both ranks differ in one thing at a time."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent

#: One option at a time: its value on rank 1; rank 0 has the one of OPTIONS or the default.
OPTIONS = {
    "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1.0, "optim": "sl2o", "logging_steps": 2,
    "lr_scheduler_type": "constant", "save_strategy": "no", "max_grad_norm": 0.0,
}  # fmt: skip
DIFFERENT = {
    "learning_rate": 0.5,
    "max_steps": 6,
    "num_train_epochs": 7.0,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
    "seed": 7,
    "data_seed": 3,
    "adam_beta1": 0.5,
    "adam_epsilon": 1e-5,
    "label_smoothing_factor": 0.1,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "average_tokens_across_devices": False,
    "ddp_find_unused_parameters": True,
    "dataloader_drop_last": True,
    "auto_find_batch_size": True,
    "sl2o_average": 4.0,
    "sl2o_outside": "adamw",
    "optim_args": "average=3",
}
#: What is no argument, or takes others along: (options of both, objects or options of rank 1, what is named).
OTHERS = {
    "basis": ({}, {"basis": "seed"}, "basis"),
    "dim": ({}, {"basis": "dim"}, "basis.dim"),
    "units": ({}, {"basis": "units"}, "basis"),
    "no basis": ({}, {"basis": None}, "basis"),
    "rule": ({}, {"rule": "seed"}, "rule"),
    "rule config": ({}, {"rule": "config"}, "rule.config.output_scale"),
    "optim": ({}, {"optim": "subspace_adamw", "rule": None}, "optim"),
    "plain optim": ({}, {"optim": "adamw_torch", "rule": None, "basis": None}, "optim"),
    "momentum": ({"optim": "subspace_sgd", "rule": None}, {"sl2o_momentum": 0.9}, "sl2o_momentum"),
}


def launch(module, folder, world=2, timeout=120, **environment):
    """Runs `python -m module folder` in processes that nobody watches over; returns exit codes and stderr."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    env |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    env |= environment
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(folder)], env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


def outcome(action):
    """Type and text of what an action raised, and how long it took; it may raise nothing."""
    start = time.perf_counter()
    try:
        action()
        said = ["", ""]
    except Exception as error:
        said = [type(error).__name__, str(error)]
    return [*said, time.perf_counter() - start]


def comparisons(rank):
    """Of the function itself."""
    from hf_sl2o.foundation.ranks import check_same_on_all_ranks as check

    facts = {"seed": 1, "groups": [{"lr": 1.0}], "rule": {"hidden": 4, "weights": "ab"}, "none": None}
    yield "same", lambda: check(facts, "test")
    yield "again", lambda: check({"another": 2}, "test")  # not the facts of the first call
    for name, other in (
        ("seed", {**facts, "seed": 1 + rank}),
        ("nested", {**facts, "rule": {"hidden": 4 + rank, "weights": "abc"[rank:]}}),
        ("list", {**facts, "groups": [{"lr": 1.0 - rank / 2}]}),
        ("absent", {**facts, "more": 3} if rank else facts),
        ("type", {**facts, "none": 0 if rank else None}),
        ("long", {**facts, "seed": "x" * 500 + str(rank)}),
    ):
        yield name, lambda other=other: check(other, "test")
    yield "after differences", lambda: check(facts, "test")
    yield "alone", lambda: check(facts, "test", timeout=0.5) if rank == 0 else time.sleep(1.0)
    yield "after being alone", lambda: check(facts, "test")
    yield "late", lambda: (time.sleep(1.0 if rank else 0.0), check(facts, "test"))
    yield "elsewhere", lambda: check(facts, "test", timeout=0.5) if rank else time.sleep(1.0)
    yield "without a store", lambda: without_a_store(check, facts, rank)


def without_a_store(check, facts, rank):
    get = dist.distributed_c10d._get_default_store
    del dist.distributed_c10d._get_default_store
    try:
        check(facts, "test")
        check({**facts, "seed": rank}, "test")
    finally:
        dist.distributed_c10d._get_default_store = get


def train(folder, options, basis="std", rule="std"):
    from hf_sl2o import LSTMRule, RuleConfig, SL2OTrainer, SL2OTrainingArguments
    from tests.conftest import Tokens, random_dense, tiny_gpt2

    model, objects = tiny_gpt2(), {}
    if basis is not None:
        given = {"seed": {"seed": 2}, "dim": {"dim": 7}}.get(basis, {})
        made = random_dense(model.named_parameters(), **given)
        objects["basis"] = made.with_units("orthonormal") if basis == "units" else made
    if rule is not None:
        torch.manual_seed(6 if rule == "seed" else 5)
        objects["rule"] = LSTMRule(RuleConfig(output_scale=0.2 if rule == "config" else 0.3))
    args = SL2OTrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, ddp_backend="gloo", **{**OPTIONS, **options}
    )
    trainer = SL2OTrainer(model, args, train_dataset=Tokens(), eval_dataset=Tokens(rows=4), **objects)
    trainer.train()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def trainings(rank, folder):
    for name, value in DIFFERENT.items():
        yield name, lambda name=name, value=value: train(folder, {name: value} if rank else {})
    for name, (both, mine, _) in OTHERS.items():
        both, mine = dict(both), dict(mine if rank else {})
        objects = {key: (mine if key in mine else both).get(key, "std") for key in ("basis", "rule")}
        options = {key: value for key, value in {**both, **mine}.items() if key not in objects}
        yield name, lambda options=options, objects=objects: train(folder, options, **objects)
    yield "same", lambda: train(folder, {})
    local = {"run_name": str(rank), "log_level": "error" if rank else "warning"}
    yield "local", lambda: train(folder / str(rank), local)


def main(folder):
    from hf_sl2o import SL2OTrainingArguments

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    SL2OTrainingArguments(str(folder), use_cpu=True, ddp_backend="gloo")  # starts the process group
    said = {"comparisons": {}, "trainings": {}}
    for name, action in comparisons(rank):
        said["comparisons"][name] = outcome(action)
    for name, action in trainings(rank, folder / "out"):
        said["trainings"][name] = outcome(action)
    (folder / f"{rank}.json").write_text(json.dumps(said))
    time.sleep(0.5)  # gloo's threads are done with the last collective: a process that ends before may abort


if __name__ == "__main__":
    main(Path(sys.argv[1]))
