"""Trains a sequence-to-sequence model on pairs of a JSON file, and evaluates what it generates."""

from dataclasses import dataclass, field

import numpy
from datasets import load_dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "The model to start from."})


@dataclass
class DataTrainingArguments:
    train_file: str = field(metadata={"help": "A JSON file with the columns source and target."})
    validation_file: str = field(metadata={"help": "Likewise, for evaluation."})


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, Seq2SeqTrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    files = {"train": data_args.train_file, "validation": data_args.validation_file}
    raw = load_dataset("json", data_files=files, cache_dir=training_args.output_dir + "/cache")
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(model_args.model_name_or_path)

    def tokenize(examples):
        inputs = tokenizer(examples["source"])
        inputs["labels"] = tokenizer(text_target=examples["target"])["input_ids"]
        return inputs

    def exact(prediction):
        answers, labels = (
            tokenizer.batch_decode(numpy.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)
            for ids in (prediction.predictions, prediction.label_ids)
        )
        return {"exact": float(numpy.mean([a == b for a, b in zip(answers, labels, strict=True)]))}

    data = raw.map(tokenize, batched=True, remove_columns=raw["train"].column_names)
    trainer = Seq2SeqTrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=exact if training_args.predict_with_generate else None,
    )
    trainer.train()
    trainer.save_model()
    trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
