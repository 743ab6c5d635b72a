"""Searches a learning rate: each trial makes its model anew."""

import json
import os
import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments


def main():
    start, train_file, *words = sys.argv[1:]
    (training_args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(words)
    os.makedirs(training_args.output_dir, exist_ok=True)
    data = load_dataset("json", data_files=train_file, cache_dir=training_args.output_dir + "/cache")["train"]
    tried, losses = [], []

    def space(trial):
        tried.append(trial.suggest_float("learning_rate", 0.2, 5.0, log=True))
        return {"learning_rate": tried[-1]}

    trainer = Trainer(
        model_init=lambda: AutoModelForCausalLM.from_pretrained(start),
        args=training_args,
        train_dataset=data,
        eval_dataset=data.select(range(16)),
    )

    def objective(metrics):
        losses.append(metrics["eval_loss"])
        return losses[-1]

    best = trainer.hyperparameter_search(
        hp_space=space, compute_objective=objective, n_trials=3, direction="minimize", backend="optuna"
    )
    found = {"tried": tried, "losses": losses, "best": best.hyperparameters, "loss": best.objective}
    with open(f"{training_args.output_dir}/search.json", "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
