"""What the programs compute, written as plain torch loops; and the models and data that both begin with."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import hf_sl2o

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = Path(__file__).parent
SPECIAL = ["<pad>", "</s>", "<unk>"]
WORDS = [f"w{i}" for i in range(29)]
SEED = 42  # of TrainingArguments


def tokenizer():
    """Words of a text, and the token that ends it."""
    known = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    inner = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def place(folder, script):
    """A script where its user has it."""
    shutil.copy(SCRIPTS / script, folder / script)


def save_causal(folder):
    """A model and its tokenizer. No dropout, so that a loop need not draw as the Trainer does."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_seq2seq(folder):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_vision(folder):
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": False, "do_normalize": True, "do_rescale": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255, "size": {"height": 8, "width": 8},
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def sentences(rows=24):
    return [" ".join(f"w{(3 * i + k * (1 + i % 3)) % 29}" for k in range(7)) for i in range(rows)]


def write_csv(path, rows=24):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in sentences(rows))])


def write_json(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_images(folder, each=12):
    """Two classes; PNG keeps each number."""
    random = numpy.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = random.integers(100 * label, 100 * label + 150, (8, 8, 3), dtype=numpy.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02}.png")


def images_of(folder):
    """The files in the order of their names, as a model takes them; labels are the folders' places."""
    pixels, labels = [], []
    for label, name in enumerate(sorted(path.name for path in folder.iterdir())):
        for path in sorted((folder / name).iterdir()):
            raw = torch.tensor(numpy.array(Image.open(path)), dtype=torch.float32)
            pixels.append((raw / 255 - 0.5).div(0.5).permute(2, 0, 1))
            labels.append(label)
    return torch.stack(pixels), torch.tensor(labels)


def orders(rows, size, steps, seed=SEED):
    """The rows of each batch: an epoch is one permutation, seeded by its number."""
    found, epoch = [], 0
    while len(found) < steps:
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed + epoch))
        found += list(order.split(size))
        epoch += 1
    return found[:steps]


def next_tokens(model, ids):
    """Mean loss of each token but the first."""
    logits = model(input_ids=ids).logits[:, :-1].float()
    return cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def train(model, loss_of, batches, *, lr=1.0, clip=1.0, **options):
    """The loop: a rate that falls linearly to zero, gradients clipped to length `clip`; as in TrainingArguments."""
    model.train()
    steps, with_basis = len(batches), options.get("basis") is not None
    known = {"total_steps": steps, **({"max_grad_norm": clip} if with_basis else {}), **options}
    optimizer = hf_sl2o.build_optimizer(model, "sl2o", lr=lr, **known)
    losses = []
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr * (steps - step) / steps
        loss = loss_of(model, batch)
        loss.backward()
        if not with_basis:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses


def commands():
    """Of each command of docs/programs.md the words after `python -m hf_sl2o.run`."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "programs.md").read_text(), flags=re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    assert all(words[:3] == ["python", "-m", "hf_sl2o.run"] for words in lines)
    return [words[3:] for words in lines]


def on_page(program):
    """The words of the command that runs a program."""
    return next(words for words in commands() if f"{' '.join(words)} ".startswith(f"{program} "))


def flags(**options):
    """The words of options, which stand behind others and win."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def start_program(folder, *words):
    """`python -m hf_sl2o.run ...` in a process of its own; returns what it printed."""
    env = {
        "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT),
        "HF_HOME": str(folder / "home"), "HOME": str(folder),
    }  # fmt: skip
    command = [sys.executable, "-m", "hf_sl2o.run", *map(str, words)]
    out = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-4000:]
    return out.stdout + out.stderr


def weights(model):
    """All trainable numbers of a model, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def distance(one, other):
    """Largest difference of the numbers of two models."""
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys() and len(one) > 3
    return max((one[name] - other[name]).abs().max().item() for name in one)
