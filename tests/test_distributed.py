"""Two gloo processes train as one does, to rounding, and are bit-identical to each other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_sl2o import Trajectory

WORKER = str(Path(__file__).parent / "distributed_worker.py")


def launch(folder, processes, batch, mode="basis"):
    folder.mkdir()
    head = [sys.executable]
    if processes > 1:
        head += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    env["OMP_NUM_THREADS"] = "1"
    command = [*head, WORKER, str(folder), str(batch), mode]
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert out.returncode == 0, out.stderr[-3000:]
    return [load_file(path) for path in sorted(folder.glob("rank-*.safetensors"))]


def distance(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in a if name != "losses")


@pytest.mark.parametrize("mode", ["record", "warmup"])
def test_two_processes_train_as_one(tmp_path, mode):
    (one,) = launch(tmp_path / "one", 1, 8, mode)
    first, second = launch(tmp_path / "two", 2, 4, mode)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert distance(one, first) < 1e-4 and float(one["c"].abs().max()) > 0.1
    torch.testing.assert_close(one["losses"], first["losses"], rtol=0, atol=1e-4)
    (other,) = launch(tmp_path / "other", 1, 4, mode)  # the break: half the batch
    assert distance(one, other) > 1e-3
    if mode == "record":
        assert Trajectory(tmp_path / "two" / "trajectory").steps == [0, 3, 6]


@pytest.mark.parametrize("mode", ["stream", "stream-accumulated"])
def test_streamed_gradients_train_as_kept_ones_and_send_d_numbers(tmp_path, mode):
    batch = 8 if mode == "stream" else 4
    (one,) = launch(tmp_path / "one", 1, 8, "kept")
    first, second = launch(tmp_path / "two", 2, batch // 2, mode)
    assert all(torch.equal(first[name], second[name]) for name in first if name != "losses")
    assert first["left to DDP"].numel() == 1 and first["sent"].tolist() == [6] * 6  # d, once a step
    shared = {name: value for name, value in first.items() if name in one}
    assert distance(shared, one) < 1e-4 and float(one["c"].abs().max()) > 0.1
    (other,) = launch(tmp_path / "other", 1, 4, "kept")  # the break: half the batch
    assert distance(shared, other) > 1e-3
