"""recipes/resnet_cifar.py at toy size: all stages and arms, restarts, the paper's rates, P-BFGS, bad flags."""

import json

import numpy as np
import pytest
import scipy.optimize
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from hf_sl2o import IdentityBasis, Layout, SL2OTrainer, Task, Trajectory
from hf_sl2o.experiments import images as cifar_pipeline
from hf_sl2o.experiments.kept import run as kept_run
from hf_sl2o.experiments.p_bfgs import bfgs_update, p_bfgs
from hf_sl2o.experiments.table import table
from hf_sl2o.experiments.tasks.networks import Classifier, resnet8
from recipes import resnet_cifar

SMALL = """--train_rows 128 --validation_rows 32 --eval_rows 32 --trajectory_steps 20 --snapshots 12 --dim 4
--meta_epochs 1 --inner_steps 10 --max_steps 4 --eval_steps 2 --logging_steps 2 --save_steps 2 --quick_grid
--per_device_train_batch_size 16 --use_cpu --seeds 2""".split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resnet")
    return folder, resnet_cifar.main([*SMALL, "--baselines", "paper", "--output_dir", str(folder)])


def test_all_arms_of_the_paper_with_their_printed_rates(finished):
    folder, result = finished
    runs = result["runs"]
    assert set(runs) == {*resnet_cifar.PAPER, "sl2o_default"}
    printed = {"sgd": 0.1, "momentum": 0.1, "adam": 1e-3, "rmsprop": 0.01, "subspace_sgd": 1, "subspace_momentum": 1}
    for name, lr in printed.items():
        assert runs[name]["learning_rate"] == lr
    for name, run in runs.items():
        assert [step for step, _ in run["eval"]][-1] == (20 if name in ("sgd", "momentum", "adam", "rmsprop") else 4)
        assert len(run["accuracy_per_seed"]) == len(run["test_accuracy_per_seed"]) == 2, name
        assert all(0 <= value <= 1 for value in run["test_accuracy_per_seed"])
        assert run["eval"][0][0] == 0
    first = [run["eval"][0][1] for run in runs.values()]
    assert max(first) - min(first) < 1e-5  # the same weights, the same BatchNorm statistics
    assert set(result["steps_to_accuracy"]) == {"momentum_best", "momentum_best_less_0.1_points"}
    assert result["amortised"]["trajectory"] == 20 and result["amortised"]["meta_training"] == 10 * (1 + 2)
    assert (folder / "comparison.png").stat().st_size > 10_000
    lines = table(result).splitlines()
    assert "test accuracy" in lines[0] and "steps to momentum_best" in lines[0] and len(lines) == 2 + len(runs)
    assert f"{50 * sum(runs['sl2o']['test_accuracy_per_seed']):.2f} %" in table(result)
    saved = load_file(folder / "sl2o" / "checkpoint-4" / "model.safetensors")
    network = Classifier(resnet8())
    network.load_state_dict(saved)
    assert saved["network.norm.num_batches_tracked"] == 8  # recalibrated on eight batches, nothing older


def test_given_rates_are_those_of_the_recorded_arm_alone(tmp_path):
    flags = "--seeds 1 --trajectory_learning_rates 0.2 0.02 0.002 --trajectory_steps 12 --arms momentum adam".split()
    runs = resnet_cifar.main([*SMALL, *flags, "--output_dir", str(tmp_path)])["runs"]
    rates = {name: [(units, lr) for units, lr, _ in run["grid"]] for name, run in runs.items()}
    adam = [("full", lr) for _, lr in resnet_cifar.TUNED["adam"].grid]
    assert rates == {"momentum": [("full", 0.2), ("full", 0.02), ("full", 0.002)], "adam": adam}


def test_a_tuned_run_records_momentum_and_takes_named_rules(finished, tmp_path):
    folder, paper = finished
    (recorded,) = (folder / "sgd" / "runs").glob("*/trajectory")
    assert max(Trajectory(recorded).steps) == 12  # the paper: 60 epochs of 100
    (rule,) = (folder / "rule").iterdir()
    flags = ["--rule", str(rule), "--rules", f"mine={rule}", "default", "--seeds", "1"]
    arms = ["momentum", "sl2o", "sl2o_mine", "sl2o_default"]
    result = resnet_cifar.main([*SMALL, *flags, "--output_dir", str(tmp_path), "--arms", *arms])
    runs = result["runs"]
    assert set(runs) == set(arms) and result["amortised"]["meta_training"] == 0 < paper["amortised"]["meta_training"]
    spent = result["amortised"]["rules"]
    assert spent["sl2o"] == spent["sl2o_mine"] == paper["amortised"]["meta_training"] < spent["sl2o_default"]
    assert set(paper["amortised"]["rules"]) == {"sl2o_default"}
    assert runs["sl2o_mine"]["eval"] == runs["sl2o"]["eval"] != runs["sl2o_default"]["eval"]
    (recorded,) = (tmp_path / "momentum" / "runs").glob("*/trajectory")
    assert max(Trajectory(recorded).steps) == 20
    words = [*SMALL, *flags, "--output_dir", str(tmp_path), "--arms", *arms, "--sl2o_average", "4"]
    averaged = resnet_cifar.main(words)["runs"]
    assert averaged["momentum"] == runs["momentum"]  # not run again
    for ours, theirs in zip(averaged["sl2o"]["train_loss"], runs["sl2o"]["train_loss"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)  # the run itself is the same
    assert averaged["sl2o"]["eval"][-1] != runs["sl2o"]["eval"][-1]


def test_a_second_start_runs_nothing_again(finished, monkeypatch):
    folder, result = finished
    monkeypatch.setattr(SL2OTrainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    monkeypatch.setattr(resnet_cifar, "p_bfgs", lambda *args, **kwargs: pytest.fail("trained again"))
    again = resnet_cifar.main([*SMALL, "--baselines", "paper", "--output_dir", str(folder)])
    assert again["runs"] == result["runs"]
    load = cifar_pipeline.load_cifar

    def relabelled(data, split, *of, **options):
        images, labels = load(data, split, *of, **options)
        return images, labels.flip(0) if split == "test" else labels  # every sum stays what it was

    monkeypatch.setattr(cifar_pipeline, "load_cifar", relabelled)
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        resnet_cifar.main([*SMALL, "--baselines", "paper", "--output_dir", str(folder)])


def test_a_run_that_was_killed_in_its_second_epoch_goes_on_with_the_same_crops(tmp_path, finished, monkeypatch):
    _, result = finished

    class Killed(BaseException):
        pass

    class Killer(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 13:  # of 8 an epoch; checkpoints are at even steps
                raise Killed

    words = [*SMALL, "--baselines", "paper", "--seeds", "1", "--arms", "sgd", "--output_dir", str(tmp_path)]
    original = kept_run.Bar
    monkeypatch.setattr(kept_run, "Bar", Killer)
    with pytest.raises(Killed):
        resnet_cifar.main(words)
    monkeypatch.setattr(kept_run, "Bar", original)
    run = resnet_cifar.main(words)["runs"]["sgd"]
    assert run["eval_per_seed"][0] == result["runs"]["sgd"]["eval_per_seed"][0]
    assert run["test_accuracy_per_seed"][0] == result["runs"]["sgd"]["test_accuracy_per_seed"][0]


def test_with_the_papers_schedules_too_a_run_is_evaluated_at_its_average(tmp_path):
    words = [*SMALL, "--baselines", "paper", "--seeds", "1", "--arms", "subspace_momentum", "--save_steps", "4"]
    words += ["--output_dir", str(tmp_path)]
    last, averaged = (
        resnet_cifar.main([*words, *more])["runs"]["subspace_momentum"] for more in ([], ["--sl2o_average", "4"])
    )
    assert (last["average"], averaged["average"]) == (0.0, 4.0)
    for one, other in zip(last["train_loss"], averaged["train_loss"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)  # the run itself is the same
    assert abs(last["eval"][-1][1] - averaged["eval"][-1][1]) > 1e-5


def test_the_basis_is_of_the_best_of_all_runs_that_were_recorded(tmp_path, monkeypatch):
    """Both finalists run with every seed before anything is extracted: no later run removes its trajectory."""
    seen = []
    extract = resnet_cifar.Recipe.extract

    def watched(self, path):
        seen.append((path, dict(self.recorded)))
        return extract(self, path)

    monkeypatch.setattr(resnet_cifar.Recipe, "extract", watched)
    result = resnet_cifar.main([*SMALL, "--arms", "momentum", "--output_dir", str(tmp_path)])
    ((path, recorded),) = seen
    assert len(recorded) == 4 and result["amortised"]["other_recorded_runs"] == 3 * 20  # two rates, two seeds
    assert min(recorded, key=lambda run: recorded[run][0]) == path.parent and path.is_dir()


def test_an_arm_that_diverged_does_not_hide_the_level_of_the_others():
    runs = {f"subspace_{name}": {"final_eval_loss": loss} for name, loss in (("sgd", float("nan")), ("adamw", 2.0))}
    assert cifar_pipeline.CifarComparison.targets(None, runs) == {"best_in_subspace": pytest.approx(2.02)}
    assert cifar_pipeline.CifarComparison.targets(None, {"subspace_sgd": runs["subspace_sgd"]}) == {}


def test_the_rate_falls_after_the_printed_shares(finished):
    folder, _ = finished
    state = json.loads((folder / "momentum" / "checkpoint-20" / "trainer_state.json").read_text())
    rates = {entry["step"]: entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry}
    assert rates[10] == pytest.approx(0.1) and rates[12] == pytest.approx(0.01) and rates[16] == pytest.approx(0.001)


def test_bfgs_update_satisfies_the_secant_equation_and_stays_positive():
    generator = torch.Generator().manual_seed(0)
    h = torch.eye(5, dtype=torch.float64)
    for _ in range(4):
        s, y = torch.randn(2, 5, generator=generator, dtype=torch.float64)
        updated = bfgs_update(h, s, y)
        if torch.dot(s, y) > 0:
            torch.testing.assert_close(updated @ y, s)
            assert torch.linalg.eigvalsh(updated).min() > 0
        else:
            assert updated is h
        h = updated


def test_p_bfgs_minimises_a_quadratic_as_scipy_does():
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(6, 6, generator=generator)
    matrix, target = root @ root.T + 0.1 * torch.eye(6), torch.randn(6, generator=generator)

    class Point(nn.Module):
        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.zeros(6))

    def loss(model, batch):
        x = model.x - target
        return 0.5 * x @ matrix @ x

    basis = IdentityBasis(Layout.from_named_parameters(Point().named_parameters()))
    task = Task("quadratic", Point, lambda seed: [0] * 60, loss, basis, [0])
    found = p_bfgs(task, 40, evaluate_at={0, 40})
    a, b = matrix.double().numpy(), target.double().numpy()
    expected = scipy.optimize.minimize(lambda x: 0.5 * (x - b) @ a @ (x - b), np.zeros(6), method="BFGS")
    np.testing.assert_allclose(found["model"].x.detach().numpy(), expected.x, atol=1e-3)
    assert found["eval"][1][1] < 1e-5 < found["eval"][0][1] and found["forward_passes"] >= 40
    assert found["train_loss"][:10] == sorted(found["train_loss"][:10], reverse=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "resnet9"], "--model is 'resnet9', expected one of resnet8"),
        (["--baselines", "best"], "--baselines is 'best', expected paper or tuned"),
        (["--subspace", "lora"], "LoRA has no convolutions"),
        (["--train_rows", "10"], "10 are left, fewer than a batch of 16"),
        (["--num_classes", "100"], "the embedded images have 10 classes"),
        (["--rules", "nothing-there"], "nothing-there"),
        (["--rules", "default", "default=elsewhere"], "two rules the arm 'sl2o_default'"),
        (["--dim", "13"], "--dim is 13, expected between 1 and the 12 snapshots"),
        (["--snapshots", "0"], "--snapshots is 0, expected a whole number of at least 2"),
        (["--validation_rows", "0"], "--validation_rows is 0, expected a whole number of at least 1"),
        (["--rules", "other=somewhere", "--arms", "sl2o_another"], r"'sl2o_another', expected any of .*'sl2o_other'"),
    ],
)
def test_bad_flags(tmp_path, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        resnet_cifar.main([*SMALL, "--output_dir", str(tmp_path), *flags])
