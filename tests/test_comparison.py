"""A comparison as a stranger meets it: own models, data and losses, its numbers, second starts, wrong input."""

import copy
import dataclasses
import functools
import importlib.util
import json
import math
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils.data import IterableDataset, default_collate
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, TrainerCallback

from hf_sl2o.experiments import ARMS, Arm, Comparison, ComparisonArguments, comparison, grid, training_arguments
from hf_sl2o.experiments.kept import run as kept_run
from hf_sl2o.rules import SHIPPED_RULES, Rule

from .conftest import Tokens, tiny_gpt2

PLOT = comparison.plot
X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
ROWS = list(zip(X, X.sum(dim=1, keepdim=True), strict=False))
FULL, SGD = Arm("adamw_torch", grid(full=(0.03,)), basis="none"), Arm("subspace_sgd", grid(orthonormal=(0.3,)))
TWO, RANDOM = {"adamw": FULL, "sgd": SGD}, {"subspace": "random"}


class Net(nn.Sequential):
    def __init__(self, activation=nn.Tanh, norm=nn.BatchNorm1d, dropout=0.0, moved=None, trained=True):
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 4), norm(4), activation(), nn.Dropout(dropout), nn.Linear(4, 1))
        self[0].requires_grad_(trained)
        if moved:
            next(getattr(self, moved)()).data += 0.01

    def forward(self, x, **kwargs):  # a Trainer takes it for one that divides by the items of a batch
        return super().forward(x)


class Other(nn.Linear):
    def forward(self, x, labels=None):
        return {"loss": (super().forward(x) - labels).square().mean()}


def squares(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


class Times:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, model, batch):
        return self.weight * squares(model, batch)


def made(folder, model=None, train=ROWS[:32], evals=ROWS[32:], args=None, settings=None, **objects):
    """A comparison of two arms that takes half a second."""
    steps = {"max_steps": 6, "eval_steps": 2, "logging_steps": 2, "use_cpu": True}
    small = {"dim": 3, "trajectory_steps": 8, "snapshots": 4, "seeds": 1, "rule": "default", "quick_grid": True}
    small |= {"meta_epochs": 2, "inner_steps": 4, "unroll_length": 2}
    model, args = model or Net(), training_arguments(str(folder), **{**steps, **(args or {})})
    settings, objects = ComparisonArguments(**{**small, **(settings or {})}), {"arms": TWO, "loss": squares, **objects}
    return Comparison(model, args, settings, train_dataset=train, eval_dataset=evals, **objects)


def compared(folder, **options):
    return made(folder, **options).run()


def ends(result):
    return {name: run["final_eval_loss"] for name, run in result["runs"].items()}


def curves(result):
    return {name: (run["eval_per_seed"], run["train_loss_per_seed"]) for name, run in result["runs"].items()}


def cases(named):
    """Parameters of a test, by their names."""
    return [pytest.param(*values, id=name) for name, values in named.items()]


@pytest.fixture(autouse=True)
def trained(monkeypatch):
    """Folders of the runs that were trained; without figures, which take longer than the runs."""
    runs, train = [], kept_run.ArmTrainer.train

    def counted(self, **kwargs):
        runs.append(self.args.output_dir)
        return train(self, **kwargs)

    monkeypatch.setattr(kept_run.ArmTrainer, "train", counted)
    monkeypatch.setattr(comparison, "plot", lambda *args: None)
    return runs


def test_every_arm_on_a_plain_module(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "plot", PLOT)
    result = compared(tmp_path, arms=None, settings={"rule": None, "seeds": 2})
    losses = ends(result)
    assert losses.keys() == ARMS.keys() and all(map(math.isfinite, losses.values()))
    printed = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert sorted(printed) == sorted(["arm", *ARMS])
    text = (tmp_path / "comparison.json").read_text()
    assert json.loads(text) == result and str(tmp_path) not in text
    # steps to a loss, by hand
    lowest = min(loss for name, loss in losses.items() if name.startswith("subspace_"))
    for name, loss in {"best_in_subspace": lowest, "adamw_final": losses["adamw"]}.items():
        found = result["steps_to"][name]
        assert found["target"] == pytest.approx(1.01 * loss)
        for arm, run in result["runs"].items():
            steps = [[step for step, loss in curve if loss <= found["target"]][:1] for curve in run["eval_per_seed"]]
            assert found["steps"][arm] == (sum(map(sum, steps)) / 2 if all(steps) else None)
    with Image.open(tmp_path / "comparison.png") as image:
        assert image.width > 500 and len(image.convert("RGB").getcolors(1 << 24)) > 20


def sentences(seed, rows):
    ids = Tokens(rows, seed=seed).ids
    columns = {"input_ids": ids.tolist(), "labels": ids.tolist(), "text": ["words"] * rows, "kind": [1] * rows}
    return ids, Dataset.from_dict(columns), [{"input_ids": row, "labels": row} for row in ids]


def test_a_transformers_model_with_dict_rows_or_a_dataset_that_has_a_further_column(tmp_path):
    (_, data, rows), (ids, held, held_rows) = sentences(0, 16), sentences(1, 8)
    result = compared(tmp_path / "rows", train=rows, evals=held_rows, loss=None, model=tiny_gpt2())
    same = compared(tmp_path / "set", train=data, evals=held, loss=None, model=tiny_gpt2())
    assert curves(result) == curves(same) and "text" in data.column_names
    with torch.no_grad():
        start = tiny_gpt2().eval()(input_ids=ids, labels=ids).loss.item()
    assert result["runs"]["adamw"]["eval"][0] == [0, pytest.approx(start, rel=1e-5)]


@pytest.mark.parametrize("rule", ["default-lora", None])
def test_lora(tmp_path, rule):
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_gpt2(), config)
    data = {"train": sentences(0, 16)[1], "evals": sentences(1, 8)[1], "model": model, "loss": None, "arms": None}
    settings = {"subspace": "lora", "rule": rule, "arms": ["sl2o", "adamw", "subspace_adamw"]}
    result = compared(tmp_path, settings=settings, **data)
    assert {k for k, v in ends(result).items() if math.isfinite(v)} == {"adamw", "sl2o"}  # "subspace_adamw" is adamw
    assert result["n"] == sum(p.numel() for name, p in model.named_parameters() if "lora" in name)
    assert result["amortised"]["trajectory"] == 0 and bool(result["amortised"]["meta_training"]) == (rule is None)
    used = [*tmp_path.glob("rule/*"), SHIPPED_RULES / "default-lora"][0]  # the one trained here, else the one given
    assert result["runs"]["sl2o"]["rule"] == Rule.from_pretrained(used).fingerprint
    assert (tmp_path / "adamw" / "checkpoint-8" / "adapter_model.safetensors").is_file()


def test_a_processing_class_pads_and_compute_metrics_gives_accuracies(tmp_path):
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1}, "[PAD]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    small = BertConfig(vocab_size=2, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    data = Dataset.from_list([{**tokenizer("a " * (i % 3 + 1)), "label": i % 2, "kind": "words"} for i in range(16)])
    result = compared(
        tmp_path, model=BertForSequenceClassification(small), train=data, evals=data, loss=None, settings=RANDOM,
        arms={"adamw": FULL}, processing_class=tokenizer,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )  # fmt: skip
    (found,) = result["runs"]["adamw"]["accuracy_per_seed"]
    assert [step for step, _ in found] == [0, 2, 4, 6, 8]
    assert all(0 <= value <= 1 and value * 16 == round(value * 16) for _, value in found)
    assert (tmp_path / "adamw" / "checkpoint-8" / "tokenizer.json").is_file()


class Callback(TrainerCallback):
    """Notes the run of each step; raises after so many."""

    def __init__(self, most=math.inf):
        self.folders, self.most = [], most

    def on_step_end(self, args, state, control, **kwargs):
        self.folders.append(args.output_dir)
        if len(self.folders) >= self.most:
            raise KeyboardInterrupt


def test_the_collator_and_callbacks_given_are_those_of_every_run(tmp_path, trained):
    counts, options = Callback(), {"arms": {**TWO, "sl2o": ARMS["sl2o"]}, "settings": {"rule": None}}
    double = {"data_collator": lambda rows: default_collate([(2 * x, y) for x, y in rows]), "callbacks": [counts]}
    result = compared(tmp_path / "collator", **double, **options)
    assert [*dict.fromkeys(counts.folders)] == trained and len(trained) == 3
    by_loss = compared(tmp_path / "loss", loss=lambda m, b: squares(m, (2 * b[0], b[1])), **options)
    assert ends(result) == ends(by_loss) and result["meta_validation"] == by_loss["meta_validation"]


def test_accumulation_is_a_batch_of_twice_the_size(tmp_path):
    halves = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}
    ways, found = [(halves, 1.0), ({"per_device_train_batch_size": 32}, 1.0), (halves, 2.0)], []
    data = {"train": OWN["train"][:32], "model": Net(norm=nn.Identity), "evals": OWN["evals"]}
    for i, (args, weight) in enumerate(ways):
        loss = functools.partial(lambda m, b, weight: weight * squares(m, (b["x"], b["labels"])), weight=weight)
        found.append(compared(tmp_path / str(i), args=args, loss=loss, **data))
    for name in TWO:
        half, whole, wrong = (torch.tensor(result["runs"][name]["train_loss"]) for result in found)
        torch.testing.assert_close(half, whole, rtol=1e-3, atol=0.0)
        assert not torch.allclose(wrong, whole, rtol=0.1)


@pytest.mark.parametrize("name", ["adamw", "subspace_momentum"])
def test_an_arm_is_the_optimizer_that_it_is_named_after(tmp_path, name):
    """Over the whole data in each step, so that its order plays no part; the identity is the basis."""
    rates, units = (0.003, 0.01), "full" if name == "adamw" else "orthonormal"
    arms = {name: dataclasses.replace(ARMS[name], grid=grid(**{units: rates}))}
    settings = {"subspace": "lora", "trajectory_steps": 6, "quick_grid": False}
    whole = {"per_device_train_batch_size": 32}
    result = compared(tmp_path, model=Net(norm=nn.Identity), arms=arms, settings=settings, args=whole)["runs"][name]
    train, held, ran = default_collate(ROWS[:32]), default_collate(ROWS[32:]), {}
    for _, lr, curve in result["grid"]:
        net = Net(norm=nn.Identity)
        kind, options = (torch.optim.AdamW, "weight_decay") if name == "adamw" else (torch.optim.SGD, "momentum")
        optimizer = kind(net.parameters(), lr=lr, **{options: 0.0 if name == "adamw" else 0.9})
        for step in range(6):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / 6)
            optimizer.zero_grad()
            squares(net, train).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0 if name == "adamw" else math.inf)
            optimizer.step()
        ran[lr] = squares(net, held).item()
        assert curve[-1] == [6, pytest.approx(ran[lr], rel=1e-4)]
    assert (min(ran), len(ran) > 2, rates[1] < max(ran)) == (rates[0], True, True)  # the grid grew at its best edge
    assert result["learning_rate"] == min(ran, key=ran.get)
    assert result["final_eval_loss"] == pytest.approx(min(ran.values()), rel=1e-4)


def test_an_arm_with_an_optimizer_of_ones_own(tmp_path):
    mine = dataclasses.replace(FULL, optim="sgd", make=lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0))
    found = ends(compared(tmp_path, arms={**TWO, "mine": mine}))
    assert found["mine"] == found["adamw"]


def test_nothing_is_trained_again_or_changed(tmp_path, trained):
    one = made(tmp_path, arms={**TWO, "sl2o": ARMS["sl2o"]}, settings={"rule": None})
    before = [copy.deepcopy(value) for value in (one.args.to_dict(), one.recipe, one.start.state_dict(), ROWS)]
    result = one.run()
    assert (one.args.to_dict(), one.recipe) == tuple(before[:2])
    torch.testing.assert_close([one.start.state_dict(), ROWS], before[2:], rtol=0, atol=0)
    assert one.start.training and all(p.requires_grad and p.grad is None for p in one.start.parameters())
    model, state = Net(), torch.get_rng_state()
    again = made(tmp_path, model, arms={**TWO, "sl2o": ARMS["sl2o"]}, settings={"rule": None})
    assert torch.equal(torch.get_rng_state(), state)
    again = again.run()
    assert len(trained) == 3 and again["runs"] == result["runs"] and again["steps_to"] == result["steps_to"]


def test_rows_that_differ_at_each_reading_need_an_identity(tmp_path, trained):
    noisy = type("Noisy", (list,), {"__getitem__": lambda self, index: (torch.randn(6), ROWS[index][1])})
    options = {"train": noisy(ROWS[:32]), "arms": {"adamw": FULL}, "settings": RANDOM}
    with pytest.raises(ValueError, match="row 0 differs each time it is read"):
        compared(tmp_path, **options)
    for _ in range(2):
        compared(tmp_path, identity=["noisy"], **options)
    assert len(trained) == 1


def test_a_kill_changes_no_number(tmp_path):
    options = {"model": Net(dropout=0.2), "args": {"save_steps": 2}, "arms": {**TWO, "sl2o": ARMS["sl2o"]}}
    expected = compared(tmp_path / "whole", **options)
    for steps in (3, 4, 9):  # then each time in a later run
        with pytest.raises(KeyboardInterrupt):
            compared(tmp_path / "killed", callbacks=[Callback(steps)], **options)
    result = compared(tmp_path / "killed", **options)
    assert curves(result) == curves(expected) and result["explained_variance"] == expected["explained_variance"]


def test_a_loss_whose_source_is_edited_is_another_and_an_identity_replaces_it(tmp_path, trained):
    for number, body in enumerate(("m(b[0]).sub(b[1]).square().mean()", "m(b[0]).sub(b[1]).abs().mean()"), 1):
        (tmp_path / "mine.py").write_text(f"def loss(m, b):\n    return {body}\n")
        spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        compared(tmp_path / "out", loss=module.loss, arms={"adamw": FULL}, settings=RANDOM)
        assert len(trained) == number
    for number, identity, rows in ((3, ["a"], ROWS), (3, ["a"], ROWS[1:]), (4, ["b"], ROWS[1:])):
        compared(tmp_path / "out", train=rows, identity=identity, arms={"adamw": FULL}, settings=RANDOM)
        assert len(trained) == number


HALF = {"per_device_train_batch_size": 12}
CHANGES = {  # how many of two runs are made anew
    "train": (2, {"train": [*ROWS[:31], ROWS[33]]}),
    "evals": (2, {"evals": ROWS[33:]}),
    "loss": (2, {"loss": Times(1.0)}),
    "weights": (2, {"model": Net(moved="parameters")}),
    "seed": (2, {"args": {**HALF, "seed": 1}}),
    "max_steps": (1, {"args": {**HALF, "max_steps": 4}}),  # the full space has trajectory_steps
}
STALE = {
    "momentum": (1, {"arms": {**TWO, "sgd": dataclasses.replace(SGD, momentum=0.9)}}),
    "full optim": (1, {"arms": {**TWO, "adamw": dataclasses.replace(FULL, optim="sgd")}}),
    "make": (1, {"arms": {**TWO, "adamw": dataclasses.replace(FULL, make=torch.optim.Adagrad)}}),
    "architecture": (2, {"model": Net(nn.ReLU)}),
    "buffers": (2, {"model": Net(moved="buffers")}),
    "frozen": (2, {"model": Net(trained=False)}),
    "collator": (2, {"data_collator": lambda rows: default_collate(rows[:2])}),
    "drop last": (2, {"args": {**HALF, "dataloader_drop_last": True}}),
}
LOSSES = {
    "partial": [[functools.partial(Times.__call__, Times(weight)) for weight in (1.0, 2.0)]],
    "closure": [[lambda m, b, weight=weight: weight * squares(m, b) for weight in (1.0, 2.0)]],
    "object": [[Times(1.0), Times(2.0)]],
}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    compared(folder := tmp_path_factory.mktemp("first"), settings=RANDOM, args=HALF)
    return folder


@pytest.mark.parametrize(("runs", "changes"), cases({**CHANGES, **STALE}))
def test_what_is_changed_is_trained_anew(tmp_path, first, trained, runs, changes):
    shutil.copytree(first, tmp_path / "out")
    compared(tmp_path / "out", **{"settings": RANDOM, "args": HALF, **changes})
    assert len(trained) == runs


@pytest.mark.parametrize("losses", cases(LOSSES))
def test_a_loss_with_other_values_in_it_is_another(tmp_path, trained, losses):
    for loss in losses:
        compared(tmp_path, loss=loss, arms={"adamw": FULL}, settings=RANDOM)
    assert len(trained) == 2


Endless = type("Endless", (IterableDataset,), {"__iter__": lambda self: iter(ROWS)})
TEXT = Dataset.from_dict({"text": ["words"] * 8})
WRONG = {
    "eval_strategy": ({"args": {"eval_strategy": "no"}}, "eval_strategy is 'no', expected 'steps'"),
    "snapshots": ({"settings": {"dim": 5}}, "dim is 5, expected between 1 and the 4 snapshots"),
    "n": ({"settings": {"dim": 50, "snapshots": 50, "trajectory_steps": 50}}, "dim is 50, expected at most the 41"),
    "arm": ({"settings": {"arms": ["nope"]}}, "arms has 'nope', expected any of .*'adamw'"),
    "empty": ({"train": []}, "train data has no rows"),
    "endless": ({"train": Endless()}, "train data has no rows that can be counted; give a list or a Dataset"),
    "metrics": ({"compute_metrics": ends}, "compute_metrics needs the model's outputs"),
    "rule": ({"settings": {"rule": "no/such/rule"}}, "rule is 'no/such/rule', which could not be loaded"),
    "NaN": ({"loss": Times(math.nan)}, "the validation loss at the start is nan"),
    "unequal": ({"train": [(row[0][: 5 + i % 2], row[1]) for i, row in enumerate(ROWS)]}, "equal size"),
}
FAULTS = {
    "recorded arm": ({"arms": {"sgd": SGD}}, "adamw"),
    "arm of others": ({"settings": {"arms": ["sl2o"]}}, "sl2o"),
    "nothing to run": ({"arms": None, "settings": {**RANDOM, "arms": ["random"]}}, "arms"),
    "optim": ({"arms": {**TWO, "mine": Arm("nope", grid(std=(1.0,)))}}, "nope"),
    "basis": ({"arms": {**TWO, "mine": Arm("subspace_sgd", grid(std=(1.0,)), basis="nope")}}, "nope"),
    "units": ({"arms": {**TWO, "mine": Arm("subspace_sgd", grid(nope=(1.0,)))}}, "nope"),
    "grid": ({"arms": {**TWO, "mine": Arm("subspace_sgd", ())}}, "mine"),
    "eval_steps": ({"args": {"eval_steps": 0.5}}, "eval_steps"),
    "validation sets": ({"evals": {"one": ROWS[:8], "two": ROWS[8:]}}, "validation data"),
    "columns": ({"model": tiny_gpt2(), "loss": None, "train": TEXT, "evals": TEXT}, "column"),
    "vector": ({"loss": lambda m, b: (m(b[0]) - b[1]).square()}, "loss"),
    "NaN, all rates": ({"loss": Times(math.nan), "arms": ARMS}, "at the start is nan"),
    "NaN, nothing recorded": ({"loss": Times(math.nan), "settings": RANDOM}, "at the start is nan"),
    "number": ({"loss": lambda m, b: 1.0}, "loss"),
}


@pytest.mark.parametrize(("options", "message"), cases({**WRONG, **FAULTS}))
def test_wrong_input_is_told_before_the_second_run(tmp_path, trained, options, message):
    with pytest.raises((ValueError, RuntimeError, OSError), match=message):
        compared(tmp_path, **options)
    assert len(trained) <= 1


OWN = {"train": (own := [{"x": x, "labels": y} for x, y in ROWS]), "evals": own, "loss": None}
OWN |= {"settings": {"rule": None}, "arms": {"adamw": FULL, "sl2o": ARMS["sl2o"]}}
RIGHT = {
    "arm of one's own chosen": [{"settings": {"arms": ["mine"]}, "arms": {**TWO, "mine": SGD}}],
    "callbacks": [{"callbacks": None}],
    "loss in a dict": [{"model": Other(6, 1), **OWN}],
    "figure of negative losses": [{"loss": Times(-1.0)}],
}


@pytest.mark.parametrize("options", cases(RIGHT))
def test_what_is_right_goes_through(tmp_path, monkeypatch, options):
    monkeypatch.setattr(comparison, "plot", PLOT)
    compared(tmp_path, **options)
    assert (tmp_path / "comparison.png").is_file()


@pytest.mark.parametrize("steps", cases({"2": [2], "4": [4]}))
def test_a_seed_that_diverges_beside_one_that_does_not(tmp_path, trained, steps):
    def sick(model, batch):
        return squares(model, batch) * (math.nan if len(trained) >= 4 and model.training else 1.0)

    result = compared(tmp_path, loss=sick, settings={"seeds": 2}, args={"eval_steps": steps, "max_steps": 6})
    (well, ill) = result["runs"]["sgd"]["eval_per_seed"]
    assert len(well) == len(ill) and math.isfinite(well[-1][1]) and math.isnan(ill[-1][1])


def test_the_training_loss_of_a_run_that_diverges_is_not_zero(tmp_path):
    loss = lambda m, b: squares(m, b) * (math.nan if m.training else 1.0)  # noqa: E731
    result = compared(tmp_path, loss=loss, settings=RANDOM)
    assert all(loss != 0 for run in result["runs"].values() for _, loss in run["train_loss"])
