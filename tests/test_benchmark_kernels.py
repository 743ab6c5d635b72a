"""The benchmarks of kernels run, and write the documented JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks.rule_kernel as rule_kernel
from hf_sl2o.rules import kernel

ROOT = Path(__file__).parent.parent


def benchmark(*words):
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)


def test_rule_kernel(tmp_path):
    if kernel._library() is None:
        pytest.skip("there is no C++ compiler here, or HF_SL2O_NATIVE is 0: there is no kernel to time")
    words = ["--quick", "--coordinates", "100000", "--threads", "1", "--json", str(tmp_path / "x.json")]
    out = benchmark("benchmarks/rule_kernel.py", *words)
    assert out.returncode == 0, out.stderr[-2000:]
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["benchmark"] == "rule_kernel" and result["environment"]["threads"] == 1
    rows = {row["name"]: row for row in result["rows"]}
    assert set(rows) == {
        "eager_lstmcell", "eager_rule", "rule_vs_eager_lstmcell", "rule_vs_eager_rule", "adamw_fused_step",
        "eager_rule_peak_beside_state", "rule_peak_beside_state", "rule_step_eager", "rule_step",
        "rule_step_vs_adamw_fused", "rule_step_eager_peak_beside_state", "rule_step_peak_beside_state",
    }  # fmt: skip
    ours = rows["rule_vs_eager_lstmcell"]
    assert ours["baseline"] == rows["eager_lstmcell"]["value"] > 0
    assert ours["ratio"] == pytest.approx(ours["value"] / ours["baseline"])
    assert (
        ours["value"] < rows["eager_rule"]["value"] and rows["rule_step"]["value"] < rows["rule_step_eager"]["value"]
    )


def test_a_kernel_that_is_not_there_is_not_timed(monkeypatch):
    monkeypatch.setattr(kernel, "load_native", lambda source: None)
    with pytest.raises(RuntimeError, match="there is no kernel here"):
        rule_kernel.rule_rows(kernel.LEAST, 2)


def test_the_kernel_is_back_after_a_step_without_it():
    seen = []
    rule_kernel.without_kernel(lambda: seen.append(kernel.LEAST))()
    assert seen[0] > 1 << 50 > kernel.LEAST
    with pytest.raises(ValueError, match="--coordinates is 10, expected at"):
        rule_kernel.main(["--coordinates", "10"])
