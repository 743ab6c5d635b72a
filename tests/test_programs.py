"""Programs that know nothing of hf_sl2o end, with `--optim sl2o`, at the weights of a loop that is written by hand.

The commands are those of docs/programs.md, with options behind them that make a run small.
"""

import json
import os
import re
import sys

import pytest
import torch
from transformers import LlamaForCausalLM, T5ForConditionalGeneration, ViTForImageClassification

from hf_sl2o import run

from .conftest import random_dense
from .programs import by_hand

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # those of the libraries that are run in here
STEPS, BATCH = 5, 4
SMALL = {
    "max_steps": STEPS, "per_device_train_batch_size": BATCH, "logging_steps": 1, "use_cpu": True, "report_to": "none",
    "disable_tqdm": True, "save_strategy": "no",
}  # fmt: skip
SAME = 1e-6  # the largest difference of two weights: rounding
VIT = "google/vit-base-patch16-224-in21k"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Runs `python -m hf_sl2o.run` in this process: what it does to a process is taken back."""

    def main(words):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", dict(os.environ))
            patch.setattr(sys, "path", list(sys.path))
            patch.setattr(sys, "argv", ["run", *words])
            patch.chdir(tmp_path)
            run.main()

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield main
    torch.set_num_threads(before)


def blocks(texts, size=16):
    """Texts after each other, cut into examples of one length."""
    ids = torch.tensor([i for text in texts for i in by_hand.tokenizer()(text)["input_ids"]])
    return ids[: len(ids) // size * size].view(-1, size)


@pytest.fixture
def causal(tmp_path):
    by_hand.place(tmp_path, "run_clm.py")
    by_hand.save_causal(tmp_path / "gpt2")
    by_hand.write_csv(tmp_path / "train.csv")
    return tmp_path


def causal_by_hand(folder, seed=by_hand.SEED, **options):
    data, model = blocks(by_hand.sentences()), LlamaForCausalLM.from_pretrained(folder / "gpt2")
    batches = [data[rows] for rows in by_hand.orders(len(data), BATCH, STEPS, seed)]
    losses = by_hand.train(model, by_hand.next_tokens, batches, **options)
    return losses, model


def losses_of(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_a_causal_language_model(causal):
    more = {"validation_file": "train.csv", "do_eval": True, "block_size": 16}
    said = by_hand.start_program(causal, *by_hand.on_page("run_clm.py"), *by_hand.flags(**SMALL, **more))
    assert "takes its own step size, 1" in said
    losses, model = causal_by_hand(causal)
    assert losses_of(causal / "out") == pytest.approx(losses, abs=2e-4)  # a log has four digits
    found, before = (LlamaForCausalLM.from_pretrained(causal / name) for name in ("out", "gpt2"))
    assert by_hand.distance(found, model) < SAME
    assert by_hand.distance(found, before) > 1000 * SAME
    for broken in ({"average": 0}, {"seed": 1}, {"lr": 0.9}):
        assert by_hand.distance(found, causal_by_hand(causal, **broken)[1]) > 100 * SAME, broken
    with torch.no_grad():
        loss = by_hand.next_tokens(model.eval(), blocks(by_hand.sentences())).item()
    assert json.loads((causal / "out" / "eval_results.json").read_text())["eval_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_arguments_from_a_file(kind, causal, start):
    page = (by_hand.ROOT / "docs" / "programs.md").read_text()
    (written,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    small = {**SMALL, "block_size": 16}
    del small["save_strategy"]  # is on the page
    text = written + "".join(f"{key}: {json.dumps(value)}\n" for key, value in small.items())
    if kind == "json":
        values = {key: value.strip('"') for key, value in (line.split(": ") for line in written.splitlines())}
        text = json.dumps({**values, **small, "do_train": values["do_train"] == "true"})
    (causal / f"args.{kind}").write_text(text)
    start([words.replace("yaml", kind) for words in by_hand.on_page("run_clm.py args.yaml")])
    found = LlamaForCausalLM.from_pretrained(causal / "out")
    assert by_hand.distance(found, causal_by_hand(causal)[1]) < SAME
    assert by_hand.distance(found, causal_by_hand(causal, lr=0.9)[1]) > 100 * SAME


def images_by_hand(folder, **options):
    pixels, labels = by_hand.images_of(folder / "images")
    model = ViTForImageClassification.from_pretrained(folder / VIT)
    batches = by_hand.orders(len(labels), BATCH, STEPS)

    def loss(model, rows):
        return torch.nn.functional.cross_entropy(model(pixel_values=pixels[rows]).logits, labels[rows])

    by_hand.train(model, loss, batches, **options)
    return model


@pytest.mark.parametrize("with_basis", [False, True])
def test_image_classification(with_basis, tmp_path, start):
    by_hand.place(tmp_path, "run_image_classification.py")
    by_hand.save_vision(tmp_path / VIT)
    by_hand.write_images(tmp_path / "images")
    before, basis, more = ViTForImageClassification.from_pretrained(tmp_path / VIT), None, {}
    if with_basis:
        basis, more = random_dense(before.named_parameters()), {"optim_args": "basis=made"}
        basis.save_pretrained(tmp_path / "made")
    more |= {"validation_dir": "images", "do_eval": True}
    words = [*by_hand.on_page("run_image_classification.py"), *by_hand.flags(**SMALL, **more)]
    start(words) if with_basis else by_hand.start_program(tmp_path, *words)
    found = ViTForImageClassification.from_pretrained(tmp_path / "out")
    mine = images_by_hand(tmp_path, basis=basis)
    assert by_hand.distance(found, mine) < SAME
    assert by_hand.distance(found, before) > 1000 * SAME
    for broken in ({"average": 0}, {"lr": 0.9}, *([{"total_steps": 50}] if with_basis else [])):
        assert by_hand.distance(found, images_by_hand(tmp_path, basis=basis, **broken)) > 100 * SAME, broken
    pixels, labels = by_hand.images_of(tmp_path / "images")
    with torch.no_grad():
        right = (mine.eval()(pixel_values=pixels).logits.argmax(-1) == labels).float().mean().item()
    result = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert result["eval_accuracy"] == pytest.approx(right)


def seq2seq_by_hand(folder, pairs, **options):
    words = by_hand.tokenizer()
    model = T5ForConditionalGeneration.from_pretrained(folder / "google-t5" / "t5-small")
    sources, targets = (
        torch.tensor([words(pair[key])["input_ids"] for pair in pairs]) for key in ("source", "target")
    )

    def loss(model, rows):
        labels = targets[rows]
        before = torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), labels[:, :-1]], dim=1)
        logits = model(input_ids=sources[rows], decoder_input_ids=before).logits
        return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))

    by_hand.train(model, loss, by_hand.orders(len(pairs), BATCH, STEPS), **options)
    return model


def greedy(model, ids, length):
    """The likeliest token after each other, with no `generate`."""
    said = torch.zeros(len(ids), 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(length):
            logits = model.eval()(input_ids=ids, decoder_input_ids=said).logits
            said = torch.cat([said, logits[:, -1:].argmax(-1)], dim=1)
    return said[:, 1:]


def test_a_sequence_to_sequence_model_that_generates_where_it_is_evaluated(tmp_path, start):
    by_hand.place(tmp_path, "run_seq2seq.py")
    by_hand.save_seq2seq(tmp_path / "google-t5" / "t5-small")
    pairs = [{"source": text, "target": " ".join(text.split()[:3])} for text in by_hand.sentences()]
    mine, words, asked = seq2seq_by_hand(tmp_path, pairs), by_hand.tokenizer(), pairs[:8]
    # of the answers that the evaluation looks for, five are what the trained model says, and three are too long
    ids = torch.tensor([words(pair["source"])["input_ids"] for pair in asked])
    said = words.batch_decode(greedy(mine, ids, 3), skip_special_tokens=True)
    known = [{**pair, "target": said[i] if i < 5 else "w0 w1 w2 w3 w4"} for i, pair in enumerate(asked)]
    by_hand.write_json(tmp_path / "train.json", pairs)
    by_hand.write_json(tmp_path / "eval.json", known)
    start([*by_hand.on_page("run_seq2seq.py"), *by_hand.flags(**SMALL, generation_max_length=4)])
    found = T5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert by_hand.distance(found, mine) < SAME
    assert by_hand.distance(found, seq2seq_by_hand(tmp_path, pairs, lr=0.9)) > 100 * SAME
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_exact"] == 5 / 8


def test_a_search_that_makes_its_model_anew(tmp_path, start):
    pytest.importorskip("optuna", reason="optuna is not installed (pip install optuna)")
    by_hand.save_causal(tmp_path / "start")
    data = blocks(by_hand.sentences(40))
    by_hand.write_json(tmp_path / "train.json", [{"input_ids": row, "labels": row} for row in data.tolist()])
    options = {**SMALL, "output_dir": "out", "optim": "sl2o"}
    by_hand.place(tmp_path, "run_search.py")
    start(["run_search.py", "start", "train.json", *by_hand.flags(**options)])
    found = json.loads((tmp_path / "out" / "search.json").read_text())
    assert len(found["losses"]) == len(set(found["tried"])) == 3

    def loss_at(lr):
        model = LlamaForCausalLM.from_pretrained(tmp_path / "start")
        batches = [data[order] for order in by_hand.orders(len(data), BATCH, STEPS)]
        by_hand.train(model, by_hand.next_tokens, batches, lr=lr)
        with torch.no_grad():
            return by_hand.next_tokens(model.eval(), data[:16]).item()

    mine = [loss_at(lr) for lr in found["tried"]]
    assert found["losses"] == pytest.approx(mine, rel=1e-6)
    assert found["loss"] == min(found["losses"])
    assert found["best"]["learning_rate"] == found["tried"][found["losses"].index(min(found["losses"]))]
    assert max(mine) - min(mine) > 1e-4  # the rates count


def test_every_command_of_the_page_is_run_here_or_beside():
    programs = ["run_clm.py", "run_image_classification.py", "run_seq2seq.py", "run_clm.py args.yaml", "trl sft"]
    found = [by_hand.on_page(program) for program in programs]
    assert found == by_hand.commands() and len(set(map(tuple, found))) == 5
    with pytest.raises(StopIteration):
        by_hand.on_page("run_clm.py args.toml")
