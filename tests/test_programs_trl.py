"""TRL's SFTTrainer in a script, and the command of docs/programs.md, beside a loop that is written by hand."""

import json
import os
import sys

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_sl2o import run

from .programs import by_hand

pytest.importorskip("trl", reason="trl is not installed (pip install trl)")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # trl's own and what it calls
STEPS, BATCH = 5, 4
SAME = 3e-6  # the largest difference of two weights: rounding, of padded rows too


OPTIONS = {
    "max_steps": STEPS, "per_device_train_batch_size": BATCH, "use_cpu": True, "bf16": False,
    "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no",
}  # fmt: skip
START = "Qwen/Qwen3-0.6B"  # as the page has it; what lies there is a small Llama


def texts():
    """Of several lengths."""
    return [" ".join(text.split()[: 3 + i % 5]) for i, text in enumerate(by_hand.sentences())]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    by_hand.save_causal(tmp_path / START)
    (tmp_path / "texts").mkdir()
    by_hand.write_json(tmp_path / "texts" / "train.json", [{"text": text} for text in texts()])
    yield tmp_path
    torch.set_num_threads(before)


def trained_by_hand(folder, **changed):
    """TRL puts the end's token behind a text, and counts the tokens of a batch that are no padding."""
    words, model = by_hand.tokenizer(), LlamaForCausalLM.from_pretrained(folder / START)
    ids = [torch.tensor(words(text + "</s>")["input_ids"]) for text in texts()]
    batches = [[ids[i] for i in order] for order in by_hand.orders(len(ids), BATCH, STEPS)]

    def loss(model, batch):
        padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)
        logits = model(input_ids=padded.clamp(min=0)).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), padded[:, 1:].reshape(-1))

    by_hand.train(model, loss, batches, **changed)
    return model


def check(folder):
    found, start = (LlamaForCausalLM.from_pretrained(folder / name) for name in ("out", START))
    assert by_hand.distance(found, trained_by_hand(folder)) < SAME
    assert by_hand.distance(found, start) > 1000 * SAME
    for broken in ({"average": 0}, {"lr": 0.9}):
        assert by_hand.distance(found, trained_by_hand(folder, **broken)) > 100 * SAME, broken


def test_a_script_with_its_options_in_a_file(folder, monkeypatch):
    options = {
        "output_dir": "out", "model_name_or_path": START, "dataset_name": "texts", "optim": "sl2o", **OPTIONS
    }  # fmt: skip
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in options.items()]
    (folder / "sft.yaml").write_text("".join(lines))
    by_hand.place(folder, "run_sft.py")
    monkeypatch.setattr(sys, "argv", ["run", "run_sft.py", "--config", "sft.yaml"])
    run.main()
    check(folder)


def test_the_command_line(folder):
    said = by_hand.start_program(folder, *by_hand.on_page("trl sft"), *by_hand.flags(**OPTIONS))
    assert "takes its own step size, 1" in said
    check(folder)
