"""The benchmarks run, write the documented JSON, and say when there is no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import benchmarks.basis as basis
import benchmarks.gpu_vision as gpu_vision
import benchmarks.import_time as import_time
import benchmarks.optimizer_step as optimizer_step
import benchmarks.rule_step as rule_step
import recipes.resnet_cifar as resnet_cifar
from hf_sl2o.experiments.data.e2e_embedded import write_csv
from hf_sl2o.foundation.files import load_json, save_json

ROOT = Path(__file__).parent.parent


def benchmark(*words):
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)


def test_optimizer_step(tmp_path):
    words = ["--quick", "--beside", str(ROOT), "--json", str(tmp_path / "x.json")]
    out = benchmark("benchmarks/optimizer_step.py", *words)
    assert out.returncode == 0, out.stderr[-2000:]
    rows = {row["name"]: row for row in json.loads((tmp_path / "x.json").read_text())["rows"]}
    for name in ("", "_streamed", "_tucker", "_pca_lora"):
        step = rows[f"sl2o_step_vs_adamw_fused{name}"]
        assert step["ratio"] == pytest.approx(step["value"] / rows["adamw_fused_step"]["value"])
    tucker = rows["tucker_step_vs_adamw_fused"]
    assert tucker["ratio"] == pytest.approx(tucker["value"] / tucker["baseline"]) and tucker["baseline"] > 0
    assert 0.2 < rows["step_vs_before"]["ratio"] < 5  # the same code twice
    assert "schedulefree_step" in rows
    with pytest.raises(ValueError, match="expected a checkout"):
        optimizer_step.main(["--beside", str(tmp_path)])


def test_basis(tmp_path):
    rows = {row["name"]: row for row in basis.products(200_000, rounds=2, device="cpu")}
    fp32, best = rows["project_and_lift_fp32"], max(rows[f"{name}_bandwidth"]["value"] for name in ("copy", "sum"))
    share = 2 * 4 * 40 * 200_000 / 1e9 / fp32["value"] / best
    assert rows["bandwidth_fraction_fp32"]["value"] == pytest.approx(share, rel=0.5)  # medians of two
    assert rows["int8_vs_fp32_time"]["baseline"] == fp32["value"]
    found = {row["name"]: row for row in basis.fits(100_000, rounds=2)}
    assert found["fit_vs_sklearn_time"]["baseline"] == found["fit_sklearn"]["value"] > 0
    with pytest.raises(FileNotFoundError, match="expected one with a trajectory"):
        basis.main(["--fit", "ours", "--folder", str(tmp_path)])


def test_average_cost(tmp_path):
    out = benchmark("benchmarks/average_cost.py", "--quick", "--json", str(tmp_path / "x.json"))
    assert out.returncode == 0, out.stderr[-2000:]
    rows = {row["name"]: row for row in json.loads((tmp_path / "x.json").read_text())["rows"]}
    for kind in ("lora", "basis"):
        plain, averaged = rows[f"{kind}_step"], rows[f"{kind}_step_averaged"]
        assert averaged["ratio"] == pytest.approx(averaged["value"] / plain["value"])
        assert rows[f"{kind}_ratio_of_pairs"]["value"] > 0 and averaged["n"] > 1000


def test_import_time(tmp_path):
    words = ["--rounds", "2", "--json", str(tmp_path / "x.json")]
    out = benchmark("benchmarks/import_time.py", *words)
    assert out.returncode == 0, out.stderr[-2000:]
    result = json.loads((tmp_path / "x.json").read_text())
    values = {row["name"]: row["value"] for row in result["rows"]}
    assert set(values) == {"import_trainer", "import_hf_sl2o"}
    assert 0 < values["import_hf_sl2o"] < values["import_trainer"]
    assert result["adds"]["import_hf_sl2o"]["modules"] > 30
    with pytest.raises(ValueError, match="expected a checkout"):
        import_time.main(["--beside", str(tmp_path)])


def test_rule_step(tmp_path):
    words = ["--rounds", "2", "--steps", "1", "--threads", "1", "--coordinates", "61440", "--beside", str(ROOT)]
    out = benchmark("benchmarks/rule_step.py", *words, "--json", str(tmp_path / "x.json"))
    assert out.returncode == 0, out.stderr[-2000:]
    rows = {row["name"]: row for row in json.loads((tmp_path / "x.json").read_text())["rows"]}
    assert rows["rule_step"]["ratio"] == rows["rule_step"]["value"] / rows["rule_step_beside"]["value"]
    assert 17 < rows["state"]["value"] <= 20 and rows["state"]["ratio"] == 1.0  # with the average
    assert 0 < rows["adamw_fused_step"]["value"] < rows["rule_step"]["value"]
    with pytest.raises(ValueError, match="expected a checkout"):
        rule_step.main(["--beside", str(tmp_path)])
    with pytest.raises(ValueError, match="expected at least 6144"):
        rule_step.main(["--coordinates", "100"])


def test_vision_overhead(tmp_path):
    out = benchmark("benchmarks/vision_overhead.py", "--quick", "--json", str(tmp_path / "x.json"))
    assert out.returncode == 0, out.stderr[-2000:]
    rows = {row["name"]: row for row in json.loads((tmp_path / "x.json").read_text())["rows"]}
    assert set(rows) == {f"resnet8/{name}" for name in ("bare_step", "recipe_step", "batch", "share_outside")}
    assert 0 < rows["resnet8/batch"]["ratio"] and rows["resnet8/share_outside"]["value"] < 1


@pytest.mark.slow
def test_gpu_benchmark_at_toy_size(tmp_path):
    write_csv(tmp_path, train=200, validation=40)
    words = ["benchmarks/gpu.py", "--data", str(tmp_path), "--json", str(tmp_path / "x.json"), "--smoke"]
    out = benchmark(*words)
    assert out.returncode == 0, out.stderr[-2000:]
    result = json.loads((tmp_path / "x.json").read_text())
    names = {row["name"] for row in result["rows"]}
    assert names >= {"adamw_fused_step", "sl2o_step_vs_adamw_fused_tucker"}
    assert names >= {"bandwidth_fraction_bf16", "rule_vs_eager_lstmcell"}
    assert set(result["main_job"]["runs"]) >= {"sl2o", "subspace_adamw", "adamw"}
    assert result["environment"]["device"]


@pytest.mark.parametrize("job", ["resnet18", "resnet20", "resnet8", "deit-tiny"])
def test_the_jobs_of_a_gpu_are_command_lines_of_the_recipes(job):
    shipped = "default-lora" if job == "deit-tiny" else "default"
    options = ["--data", "x", "--use_cpu", "--set", job, "max_steps=7", f"rules={shipped} gpt2=rules/one"]
    parsed, arms, args = gpu_vision.parse(job, gpu_vision.options_of(options))
    assert args.max_steps == 7 and parsed.rules == [shipped, "gpt2=rules/one"] and parsed.model == job
    assert arms[-1] == "sl2o_gpt2" and set(arms) <= {*parsed.known_arms, *parsed.given_rules()}
    known = resnet_cifar.TUNED if getattr(parsed, "baselines", "") == "tuned" else parsed.known_arms
    for arm, rate, seed in gpu_vision.JOBS[job].full:
        rates = parsed.trajectory_learning_rates or [lr for _, lr in known[arm].grid]
        assert rate in rates and seed < parsed.seeds


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    out = benchmark("benchmarks/gpu.py", "--data", "x")
    assert out.returncode == 1 and "there is no GPU here" in out.stderr


def test_runs_that_were_made_elsewhere_are_gathered(tmp_path):
    def fabricate(arm, run, accuracies):
        points = [[step, 1 - value] for step, value in accuracies]
        result = {"eval": points, "train_loss": points, "accuracy": accuracies, "seconds": 1.0, "state_bytes": 8}
        save_json(
            tmp_path / "deit-tiny" / arm / "runs" / run / "run.json",
            {**result, "peak_bytes": None, "average": 9.0 * (arm == "sl2o_default-lora"), "test_accuracy": 0.5},
        )

    words = ["--data", "embedded", "--output_dir", str(tmp_path), "--jobs", "deit-tiny", "--use_cpu", "--gather"]
    words += ["--set", "deit-tiny", "model=small", "seeds=1", "trajectory_learning_rates=0.001", "tf32=true"]
    words += ["train_rows=200", "validation_rows=100"]
    meta = {"steps": 30, "seconds": 1.0, "validation": []}
    save_json(tmp_path / "deit-tiny" / "stages" / "meta.json", meta)
    there = {"device": "another", "commit": "abc"}
    save_json(tmp_path / "deit-tiny" / "environment.json", there)
    fabricate("adamw", "full-0.001-seed-0", [[0, 0.1], [10, 0.4], [20, 0.6]])
    fabricate("sl2o", "orthonormal-1-seed-0", [[0, 0.1], [10, 0.2], [20, 0.3]])
    with pytest.raises(ValueError, match="orthonormal-1-seed-0 holds no finished run"):
        gpu_vision.main(words)
    fabricate("sl2o_default-lora", "orthonormal-1-seed-0", [[0, 0.1], [10, 0.6], [20, 0.7]])
    gpu_vision.main(words)
    table = load_json(tmp_path / "deit-tiny" / "comparison.json")
    assert table["environment"] == there and "versions" in table["gathered"]
    assert table["steps_to_accuracy"]["adamw_best"]["steps"] == {"adamw": 20, "sl2o": None, "sl2o_default-lora": 10}
    assert {arm: run["average"] for arm, run in table["runs"].items()} == {
        "adamw": 0.0,
        "sl2o": 0.0,
        "sl2o_default-lora": 9.0,
    }
    assert table["training"]["tf32"] is True and table["amortised"]["meta_training"] == 30
