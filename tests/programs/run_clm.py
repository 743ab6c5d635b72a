"""Trains a causal language model on the column "text" of CSV or JSON files."""

import sys
from dataclasses import dataclass, field
from itertools import chain

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "The model to start from."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "The tokenizer, if it is not the model's."})


@dataclass
class DataTrainingArguments:
    train_file: str = field(metadata={"help": "A CSV or JSON file with a column text."})
    validation_file: str | None = field(default=None, metadata={"help": "Likewise, for evaluation."})
    block_size: int = field(default=64, metadata={"help": "Tokens of an example."})


def parse():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(sys.argv[1])
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(sys.argv[1])
    return parser.parse_args_into_dataclasses()


def main():
    model_args, data_args, training_args = parse()
    set_seed(training_args.seed)

    files = {"train": data_args.train_file}
    if data_args.validation_file is not None:
        files["validation"] = data_args.validation_file
    kind = data_args.train_file.rsplit(".", 1)[-1]
    raw = load_dataset(kind, data_files=files, cache_dir=training_args.output_dir + "/cache")

    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or model_args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)

    def tokenize(examples):
        return tokenizer(examples["text"])

    def group(examples):
        joined = {key: list(chain(*values)) for key, values in examples.items()}
        length = len(joined["input_ids"]) // data_args.block_size * data_args.block_size
        blocks = {
            key: [values[at : at + data_args.block_size] for at in range(0, length, data_args.block_size)]
            for key, values in joined.items()
        }
        blocks["labels"] = [list(block) for block in blocks["input_ids"]]
        return blocks

    data = raw.map(tokenize, batched=True, remove_columns=raw["train"].column_names).map(group, batched=True)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data["train"] if training_args.do_train else None,
        eval_dataset=data.get("validation"),
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=get_last_checkpoint(training_args.output_dir))
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
