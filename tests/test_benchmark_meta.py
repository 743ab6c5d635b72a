"""benchmarks/meta_training.py runs and writes the documented JSON; its two ways to meta-train agree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
ROWS = {
    "step_vs_frozen",
    "step_vs_plain",
    "peak_T50_vs_T5",
    "peak_vs_plain",
    "keep_graph_step_vs_plain",
    "keep_graph_peak_vs_plain",
}


@pytest.mark.slow
def test_meta_training_quick(tmp_path):
    command = [sys.executable, "benchmarks/meta_training.py", "--quick", "--json", str(tmp_path / "x.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert out.returncode == 0, out.stderr[-2000:]
    result = json.loads((tmp_path / "x.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert set(rows) == {f"resnet8/{name}" for name in ROWS}
    for name, row in rows.items():
        assert row["value"] > 0 and row["baseline"] > 0, name
        assert row["ratio"] == pytest.approx(row["value"] / row["baseline"]), name
        assert row["unit"] == ("MB" if "peak" in name else "s") and len(row["quartiles"]) == 2
    kept, ours = rows["resnet8/keep_graph_peak_vs_plain"], rows["resnet8/peak_vs_plain"]
    assert kept["live"]["ratio"] > 2 > 1.2 > ours["live"]["ratio"] and kept["value"] > 1.5 * ours["value"]
    assert rows["resnet8/peak_T50_vs_T5"]["live"]["ratio"] < 1.3
    assert kept["detached_losses"]["live"]["value"] > 0 and rows["resnet8/keep_graph_step_vs_plain"]["detached_losses"]
    assert result["benchmark"] == "meta_training" and result["environment"]["threads"] >= 1


def test_both_ways_give_the_same_meta_gradient():
    from benchmarks import meta_training

    task = meta_training.problem("resnet8", batch=4)

    def gradient(way, steps=3):
        rule = meta_training.seeded_rule(task)
        meta_training.WAYS[way](task, steps, rule)()
        return torch.cat([p.grad.reshape(-1) for p in rule.parameters()])

    ours = gradient("meta")
    assert ours.norm() > 0
    for way in ("keep_graph", "keep_graph_detached"):
        assert (gradient(way) - ours).norm() < 1e-3 * ours.norm()  # fp32, other orders of summation
    assert (gradient("keep_graph", steps=4) - ours).norm() > 0.1 * ours.norm()
