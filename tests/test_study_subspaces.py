"""Where a subspace comes from: the study at toy size, and what it is made of."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_sl2o import Trajectory, fit_basis
from hf_sl2o.experiments import on_task
from hf_sl2o.experiments.tasks import problems, subspaces
from hf_sl2o.experiments.tasks.named import full_space_loss, subspace_task
from recipes.studies import subspaces as study

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

WORDS = ["--tasks", "digits-mlp", "--steps", "12", "--seeds", "2", "--dim", "8", "--snapshots", "16"]


def shorten(monkeypatch):
    make = problems.PROBLEMS["digits-mlp"]
    monkeypatch.setitem(problems.PROBLEMS, "digits-mlp", lambda data: dataclasses.replace(make(data), steps=120))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    shorten(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def result(folder):
    with pytest.MonkeyPatch.context() as monkeypatch:
        shorten(monkeypatch)
        return study.main([*WORDS, "--output_dir", str(folder / "out"), "--json", str(folder / "s.json")])


def matrix(where, steps):
    """Snapshots as rows, by another way than the study's."""
    files = [load_file(where / "trajectory" / f"snapshot-{step:09d}.safetensors") for step in steps]
    return np.stack([np.concatenate([of[name].double().numpy().ravel() for name in sorted(of)]) for of in files])


def recorded(folder, kind):
    (place,) = (folder / "out").iterdir()
    return place / "recorded" / kind


def explained(snapshots, d):
    values = np.linalg.svd(snapshots - snapshots.mean(axis=0), compute_uv=False) ** 2
    return values[:d].sum() / values.sum()


def held_out(problem, weights):
    """Loss with these weights, a flat vector in the order of the sorted names."""
    model = problem.build_model()
    named = dict(model.named_parameters())
    parts = np.split(weights, np.cumsum([named[name].numel() for name in sorted(named)])[:-1])
    with torch.no_grad():
        for name, part in zip(sorted(named), parts, strict=True):
            named[name].copy_(torch.from_numpy(part).view_as(named[name]))
        return float(np.mean([float(problem.loss(model, batch)) for batch in problem.eval_batches("all")]))


def test_what_the_study_says_of_each_basis(result, folder):
    entry = result["tasks"]["digits-mlp"]
    variants = entry["variants"]
    of_group = lambda group: [name for name, of in variants.items() if group in of["groups"]]  # noqa: E731
    assert [variants[name]["d"] for name in of_group("dimension")] == [1, 2, 4, 8, 16, 32]
    assert {variants[name]["snapshots"] for name in of_group("dimension")} == {64}
    sources = ["reference", "sgd", "first quarter", "another start", "another data set"]
    assert of_group("source") == sources and {variants[name]["snapshots"] for name in sources} == {16}
    assert of_group("control") == ["reference", "random walk", "random directions"]
    assert of_group("units") == ["reference", "orthonormal units"]
    assert of_group("storage") == ["reference", "bf16", "int8", "int4", "tucker"]
    shares = [variants[name]["bytes"] / (4 * 8 * entry["n"]) for name in of_group("storage")]
    assert shares[:2] == [1, 0.5] and 0.25 < shares[2] < 0.28 and 0.125 < shares[3] < 0.15 and shares[4] < 0.5
    many = json.loads((recorded(folder, "adamw") / "trajectory" / "trajectory.json").read_text())["steps"]
    assert many == subspaces.evenly(120, 64) and len(many) == 64
    for name, kind, steps in (
        ("d = 16", "adamw", many), ("reference", "adamw", subspaces.every_fourth(many)),
        ("first quarter", "adamw", many[:16]), ("sgd", "sgd", subspaces.evenly(120, 16)),
    ):  # fmt: skip
        snapshots = matrix(recorded(folder, kind), steps)
        assert variants[name]["explained_variance"] == pytest.approx(explained(snapshots, variants[name]["d"]), 1e-6)
        lengths = np.linalg.norm(np.diff(snapshots, axis=0), axis=1)
        path = np.concatenate([np.zeros((1, len(lengths))), np.tril(np.ones((len(lengths),) * 2)) * lengths])
        walk = explained(path, variants[name]["d"])  # each step along an axis of its own
        assert variants[name]["explained_variance_of_random_walk"] == pytest.approx(walk, 1e-6)
    ends = many[-1], many[15]
    assert entry["recorded"]["first quarter"]["last_step"] == ends[1] < ends[0] / 3
    walk = variants["random walk"]
    assert walk["explained_variance"] == pytest.approx(walk["explained_variance_of_random_walk"], abs=0.01)
    assert walk["explained_variance_of_reference"] < 0.1 < variants["sgd"]["explained_variance_of_reference"]


def test_projected_losses(result, folder):
    variants, problem = result["tasks"]["digits-mlp"]["variants"], problems.PROBLEMS["digits-mlp"]("embedded")
    many = subspaces.evenly(120, 64)
    all_of = matrix(recorded(folder, "adamw"), many)
    for name, steps in (("d = 2", many), ("reference", subspaces.every_fourth(many)), ("first quarter", many[:16])):
        snapshots = matrix(recorded(folder, "adamw"), steps)
        directions = np.linalg.svd(snapshots - snapshots.mean(axis=0), full_matrices=False)[2][: variants[name]["d"]]
        start, moved = all_of[0], all_of[-1] - all_of[0]
        projected = held_out(problem, start + directions.T @ (directions @ moved))
        assert variants[name]["projected_loss"] == pytest.approx(projected, rel=1e-3)
        if name != "reference":  # the whole movement is another point
            assert variants[name]["projected_loss"] != pytest.approx(held_out(problem, all_of[-1]), rel=1e-2)
    of_run = result["tasks"]["digits-mlp"]["recorded"]["adamw"]["final_eval_loss_on_its_data"]
    assert of_run == pytest.approx(held_out(problem, all_of[-1]), rel=1e-4)
    assert variants["random directions"]["projected_loss"] > 5 * variants["reference"]["projected_loss"]
    errors = [variants[name]["projection_error"] for name in ("reference", "bf16", "int8", "int4")]
    assert errors[0] == 0 < errors[1] < errors[3] < 0.3 and 0 < errors[2] < errors[3]


def test_arms(result, folder):
    entry = result["tasks"]["digits-mlp"]
    variants = entry["variants"]
    assert set(variants["reference"]["arms"]) == {"sl2o", "subspace_adamw", "subspace_momentum"}
    assert variants["reference"]["arms"]["sl2o"]["rates"] == [1.0]
    rate = variants["reference"]["arms"]["subspace_adamw"]["learning_rate"]
    assert {variants[f"d = {d}"]["arms"]["subspace_adamw"]["learning_rate"] for d in (1, 32)} == {rate}
    for name in ("sgd", "first quarter", "another start", "another data set", "random walk", "random directions"):
        arm = variants[name]["arms"]["subspace_adamw"]
        assert len(arm["rates"]) == 8 or min(arm["rates"]) < arm["learning_rate"] < max(arm["rates"]), name
    arms = variants["orthonormal units"]["arms"]
    assert arms["sl2o"]["rates"] == [1.0] and len(arms["sl2o_tuned"]["rates"]) >= 3
    assert arms["sl2o_tuned"]["final_per_seed"][0] <= arms["sl2o"]["final_per_seed"][0]
    own = variants["reference"]["arms"]["sl2o"]
    assert own["final_eval_loss"] == pytest.approx(np.mean(own["final_per_seed"]), rel=1e-5)
    assert variants["int8"]["arms"]["sl2o"]["final_eval_loss"] == pytest.approx(own["final_eval_loss"], rel=0.02)
    assert variants["random walk"]["arms"]["sl2o"]["final_eval_loss"] > 1.5 * own["final_eval_loss"]
    assert (folder / "s.png").stat().st_size > 20_000
    assert json.loads((folder / "s.json").read_text())["tasks"]["digits-mlp"]["full_adamw"]["final_eval_loss"] > 0


def test_what_is_done_is_not_done_again(result, folder, monkeypatch):
    for module in (on_task, subspaces):
        monkeypatch.setattr(module, "train_on", lambda *args, **kwargs: pytest.fail("it trains"))
    again = study.main([*WORDS, "--output_dir", str(folder / "out")])
    assert again["tasks"] == result["tasks"]
    with pytest.raises(pytest.fail.Exception, match="it trains"):  # other snapshots are another study
        study.main([*WORDS[:-1], "20", "--output_dir", str(folder / "out")])


def test_shares_of_a_random_walk():
    count = 60
    shares = subspaces.walk_shares(torch.full((count - 1,), 0.3))
    closed = [1.5 / (count**2 - 1) / math.sin(math.pi * k / (2 * count)) ** 2 for k in range(1, count)]
    np.testing.assert_allclose(shares, closed, rtol=1e-9)
    assert float(shares[:40].sum()) == pytest.approx(0.99, abs=2e-3)
    long = subspaces.walk_shares(torch.ones(1999))
    np.testing.assert_allclose(long[:20], [6 / (math.pi * k) ** 2 for k in range(1, 21)], rtol=1e-3)
    assert not np.allclose(subspaces.walk_shares(torch.linspace(1, 0.01, count - 1)), closed, rtol=0.1)


def test_a_random_walk_has_the_steps_of_the_run_and_the_variance_of_theory(tmp_path):
    trajectory = Trajectory(tmp_path / "run")
    at = {"a": torch.zeros(100, 50), "b": torch.ones(40)}
    for step in range(60):  # a straight line: one component holds all
        at = {name: tensor + (0.1 if name == "a" else 0.01) for name, tensor in at.items()}
        trajectory.write(step, [(name, torch.nn.Parameter(tensor)) for name, tensor in at.items()])
    reference = subspaces.Source("a line", trajectory, range(60))
    walk = subspaces.Source("a walk", subspaces.random_walk(tmp_path / "walk", reference), range(60))
    np.testing.assert_allclose(walk.step_lengths(), reference.step_lengths(), rtol=1e-4)
    starts = [next(source.snapshots()) for source in (walk, reference)]
    assert all(torch.equal(*pair) for pair in zip(*starts, strict=True))
    of_walk, of_line = (fit_basis(of.trajectory, 1, progress=False).provenance for of in (walk, reference))
    assert of_line["explained_variance"] > 0.999 > 0.7 > of_walk["explained_variance"]
    basis = fit_basis(walk.trajectory, 40, progress=False)
    ratios = basis.provenance["explained_variance_ratio"]
    np.testing.assert_allclose(ratios[:10], [6 / (math.pi * k) ** 2 for k in range(1, 11)], rtol=0.15)
    assert sum(ratios) == pytest.approx(0.99, abs=2e-3)
    assert subspaces.explained_by(basis, walk) == pytest.approx(sum(ratios), rel=1e-4)
    assert subspaces.explained_by(basis, reference) < 0.1
    other = subspaces.Source("another", subspaces.random_walk(tmp_path / "other", reference, seed=1), range(60))
    assert not torch.equal(other.displacement()[0], walk.displacement()[0])


def test_a_recorded_run_is_that_of_the_shipped_bases(tmp_path):
    shipped = subspace_task("digits-mlp", "embedded", tmp_path, dim=8)
    problem = problems.PROBLEMS["digits-mlp"]("embedded")
    task = subspaces.whole_task("digits-mlp", problem)
    adamw = lambda c: torch.optim.AdamW(c, lr=problem.learning_rate, weight_decay=0.0)  # noqa: E731
    losses, units = {}, {}
    for seed in (subspaces.SEED, 1):
        made = subspaces.record_run(tmp_path / str(seed), task, adamw, 120, range(0, 121, 2), seed=seed)
        losses[seed] = made["final_eval_loss"]
        units[seed] = fit_basis(tmp_path / str(seed) / "trajectory", 8, progress=False).units
    expected = full_space_loss("digits-mlp", "embedded", tmp_path, dim=8)
    assert losses[subspaces.SEED] == pytest.approx(expected, rel=1e-3) and losses[1] != pytest.approx(
        expected, rel=1e-3
    )
    torch.testing.assert_close(units[subspaces.SEED], shipped.basis.units, rtol=1e-2, atol=0)
    assert not torch.allclose(units[1], shipped.basis.units, rtol=1e-2)


def test_another_start_is_another_draw():
    problem = problems.PROBLEMS["digits-mlp"]("embedded")
    first, second = problem.build_model(), subspaces.other_start(problem)()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a.flatten().sort().values, b.flatten().sort().values) and not torch.equal(a, b)
    x = torch.randn(5, 64)
    assert not torch.allclose(first(x), second(x), atol=1e-2)
    with pytest.raises(ValueError, match="is no random one"):
        subspaces.other_start(problems.PROBLEMS["quadratic"]("embedded"))()


def test_another_data_set():
    digits = problems.PROBLEMS["digits-mlp"]("embedded")
    words, other = subspaces.other_data("digits-mlp", "embedded", digits)
    (x, y), (x_other, y_other) = (next(iter(problem.batches("all", 0))) for problem in (digits, other))
    pairs = set(zip(y.tolist(), y_other.tolist(), strict=True))
    assert "another order" in words and torch.equal(x, x_other) and not torch.equal(y, y_other)
    assert len(pairs) == len(set(y.tolist())) == len(set(y_other.tolist()))  # a class has one new name
    resnet = problems.PROBLEMS["cifar-resnet8"]("embedded")
    assert "generated figures" in subspaces.other_data("cifar-resnet8", "a folder", resnet)[0]
    assert "another order" in subspaces.other_data("cifar-resnet8", "embedded", resnet)[0]
    e2e = problems.PROBLEMS["e2e-gpt2"]("embedded")
    words, text = subspaces.other_data("e2e-gpt2", "embedded", e2e)
    batch, (held_out,) = next(iter(text.batches("all", 0))), text.eval_batches("all")
    assert "help topics" in words and batch["input_ids"].shape == (32, subspaces.WINDOW)
    model = e2e.build_model()
    assert int(batch["input_ids"].max()) < model.config.vocab_size
    assert 0 < float(text.loss(model, held_out).detach()) < 2 * math.log(model.config.vocab_size)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "nonsense"], "--tasks: there is no task 'nonsense'"),
        (["--tasks", "docs-gru"], "--tasks has 'docs-gru', expected those with other data: "),
        (["--tasks", "digits-mlp", "--dim", "12"], "--dim is 12, expected a multiple of 8"),
        (["--tasks", "digits-mlp", "--dim", "16", "--snapshots", "16"], "--dim is 16, .* below the 16 of --snapshots"),
        (["--tasks", "digits-mlp", "--snapshots", "60"], "--snapshots is 60, expected at most 30"),
    ],
)
def test_bad_input_is_said_before_anything_is_computed(words, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trajectory, "write", lambda *args, **kwargs: pytest.fail("it records"))
    with pytest.raises(ValueError, match=message):
        study.main(words)
