"""Fine-tunes an image classifier on folders of images, one folder a class."""

from dataclasses import dataclass, field

import numpy
import torch
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "The model to start from."})


@dataclass
class DataTrainingArguments:
    train_dir: str = field(metadata={"help": "A folder with one folder of images for each class."})
    validation_dir: str | None = field(default=None, metadata={"help": "Likewise, for evaluation."})


def collate(examples):
    pixel_values = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": pixel_values, "labels": torch.tensor([example["label"] for example in examples])}


def accuracy(prediction):
    return {"accuracy": float(numpy.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    files = {"train": f"{data_args.train_dir}/**"}
    if data_args.validation_dir is not None:
        files["validation"] = f"{data_args.validation_dir}/**"
    data = load_dataset("imagefolder", data_files=files, cache_dir=training_args.output_dir + "/cache")
    names = data["train"].features["label"].names

    processor = AutoImageProcessor.from_pretrained(model_args.model_name_or_path)
    config = AutoConfig.from_pretrained(
        model_args.model_name_or_path,
        num_labels=len(names),
        label2id={name: i for i, name in enumerate(names)},
        id2label=dict(enumerate(names)),
    )
    model = AutoModelForImageClassification.from_pretrained(model_args.model_name_or_path, config=config)

    def transform(batch):
        images = [image.convert("RGB") for image in batch["image"]]
        batch["pixel_values"] = list(processor(images, return_tensors="pt")["pixel_values"])
        return batch

    data.set_transform(transform)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data.get("validation"),
        compute_metrics=accuracy,
        processing_class=processor,
        data_collator=collate,
    )
    if training_args.do_train:
        result = trainer.train()
        trainer.save_model()
        trainer.save_metrics("train", result.metrics)
    if training_args.do_eval:
        trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
