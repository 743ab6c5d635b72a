"""E2E for the recipes: (meaning representation, sentence) rows to batches with the loss on the sentence only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..command_line.flags import load_named
from .csv_rows import read_csv

SPLITS = ("train", "validation", "test")
Row = dict[str, str]


def load_rows(data: str, split: str, limit: int | None = None) -> list[Row]:
    """Returns the rows of a split, each with `mr` and `ref`.

    Args:
        data (`str`): `"embedded"` (a generator, no download), `"hub"` (the E2E dataset of the Hugging Face Hub), or a
            folder with train.csv, validation.csv and test.csv.
        split (`str`): `"train"`, `"validation"`, or `"test"`.
        limit (`int`, *optional*): The first so many rows.

    Raises:
        `FileNotFoundError`, `ValueError`: a file is missing, or has a row that cannot be taken as it is, see
            [`read_csv`]; an unknown split; a limit below 1.
    """
    if split not in SPLITS:
        raise ValueError(f"the split is {split!r}, expected one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"the limit is {limit} rows, expected at least 1, or None for all")
    if data == "embedded":
        from .e2e_embedded import generate

        return generate(split, limit or (8_000 if split == "train" else 800))
    if data == "hub":
        from datasets import load_dataset

        # The Hub's own conversion: the repository itself holds a script, which datasets no longer runs.
        name, revision = "tuetschek/e2e_nlg", "refs/convert/parquet"
        loaded = load_named("data", data, lambda: load_dataset(name, split=split, revision=revision))
        rows = [{"mr": row["meaning_representation"], "ref": row["human_reference"]} for row in loaded]
        for index, row in enumerate(rows):
            if not all(isinstance(cell, str) and cell.strip() for cell in row.values()):
                raise ValueError(f"{name} of the Hub has an empty cell in row {index} of {split}; give a folder")
        return rows[:limit]
    path = Path(data) / f"{split}.csv"
    if not path.is_file():
        raise FileNotFoundError(
            f"--data {data}: looked for {path} and found no such file; give embedded, hub, or a folder with "
            + ", ".join(f"{name}.csv" for name in SPLITS)
        )
    return read_csv(path, ("mr", "ref"))[:limit]


def fingerprint(rows: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def train_tokenizer(rows: Sequence[Row], vocab_size: int = 1000) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE on the training split."""
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    texts = (text for row in rows for text in (row["mr"], row["ref"]))
    bpe.train_from_iterator(
        texts, vocab_size=vocab_size, min_frequency=2, special_tokens=["<eos>"], show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<eos>")


def load_tokenizer(name: str, flag: str = "tokenizer") -> PreTrainedTokenizerBase:
    tokenizer = load_named(flag, name, lambda: AutoTokenizer.from_pretrained(name))
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--{flag} is {name!r}, whose tokenizer has no end token; give one that has")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class E2EDataset(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Token ids of `mr || ref <eos>` with the labels of `mr ||` masked, as in the protocol of the LoRA paper."""

    def __init__(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> None:
        prompts = tokenizer([row["mr"] + " ||" for row in rows], add_special_tokens=False)["input_ids"]
        answers = tokenizer([" " + row["ref"] for row in rows], add_special_tokens=False)["input_ids"]
        self.examples = []
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = [*prompt, *answer, tokenizer.eos_token_id][:max_length]
            labels = [*[-100] * len(prompt), *ids[len(prompt) :]][:max_length]
            if any(label != -100 for label in labels):
                self.examples.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})
        if not self.examples:
            raise ValueError(f"no example has a sentence within {max_length} tokens; raise max_length")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.examples[index]


def collate(examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pads on the right; the padding carries no loss and, under a causal mask, reaches no token that does."""
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([example["input_ids"] for example in examples], batch_first=True),
        "labels": pad([example["labels"] for example in examples], batch_first=True, padding_value=-100),
    }


def endless_batches(dataset: E2EDataset, batch_size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yields shuffled batches for ever."""
    generator = torch.Generator().manual_seed(seed & 0x7FFF_FFFF)
    while True:
        order: list[int] = torch.randperm(len(dataset), generator=generator).tolist()
        for start in range(0, max(len(order) - batch_size + 1, 1), batch_size):
            yield collate([dataset[index] for index in order[start : start + batch_size]])
