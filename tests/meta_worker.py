"""What each process of test_meta_distributed runs: short meta-trainings whose course is written per rank."""

import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_sl2o import PES, FirstOrder, LSTMRule, MetaTrainer, MetaTrainingArguments, RuleConfig
from tests.test_meta import make_task
from tests.test_meta_resume import two_tasks

SCENARIOS = {
    "tasks": (two_tasks, FirstOrder(), {"save_steps": 1}),
    "episodes": (lambda: [make_task()], PES(sigma=0.05), {"episodes_per_task": 2, "random_scaling": 0.5}),
    "hopeless": (
        lambda: two_tasks(eval_batches=[(torch.ones(2, 4), torch.full((2, 2), torch.nan))]),
        FirstOrder(),
        {},
    ),
    "coordinates": (two_tasks, FirstOrder(coordinates=2), {"max_grad_norm": 0.1, "mixed_precision": "bf16"}),
}


def train(folder, name, seed=0, rule_seed=11):
    """Returns the rule's weights at each entry of the log, and its best weights in the end; and the log."""
    tasks, estimator, options = SCENARIOS[name]
    torch.manual_seed(rule_seed)
    rule = LSTMRule(RuleConfig(output_scale=0.3, hidden_size=4))
    course = []

    def watch(trainer, entry):
        course.append(torch.cat([p.detach().reshape(-1) for p in trainer.rule.parameters()]))

    args = MetaTrainingArguments(
        str(folder),
        unroll_length=5,
        inner_steps=15,
        meta_epochs=2,
        eval_every=1,
        divergence_factor=20.0,
        seed=seed,
        disable_tqdm=True,
        use_cpu=True,
        process_timeout=float(os.environ.get("PROCESS_TIMEOUT", "60")),
        **options,
    )
    trainer = MetaTrainer(rule, args, tasks(), estimator=estimator, callbacks=[watch])
    trainer.train()
    best = torch.cat([p.detach().reshape(-1) for p in trainer.rule.parameters()])
    return {"course": torch.stack(course), "best": best}, trainer.log_history


def die_at_meta_step(number):
    """The second process ends there, without a word."""
    original, left = MetaTrainer._meta_step, {"n": number}

    def dying(self, **options):
        left["n"] -= 1
        if left["n"] < 0 and os.environ["RANK"] == "1":
            os._exit(7)
        return original(self, **options)

    MetaTrainer._meta_step = dying


def main(folder, mode):
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    if mode == "train":
        for name in SCENARIOS:
            tensors, log = train(folder / name, name, rule_seed=11 + rank)  # all begin with the first one's weights
            save_file(tensors, folder / f"{name}-{rank}.safetensors")
            (folder / f"{name}-{rank}.json").write_text(json.dumps(log))
        die_at_meta_step(4)
    tensors, log = train(folder / "killed", "tasks", rule_seed=11 + rank)
    save_file(tensors, folder / f"killed-{rank}.safetensors")
    (folder / f"killed-{rank}.json").write_text(json.dumps(log))
    time.sleep(0.5)  # gloo's threads are done with the last collective: a process that ends before may abort


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
