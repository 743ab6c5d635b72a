"""Benchmarks of memory and of bytes on the wire: their JSON, and that what they count is what there is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_sl2o import Layout, SubspaceOptimizer
from hf_sl2o.subspace import storage_bytes
from tests.conftest import random_dense, tiny_gpt2

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # as of a script there

import communication  # noqa: E402
import memory  # noqa: E402


def benchmark(tmp_path, name):
    """Rows of a quick run by their names."""
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", "--json", str(tmp_path / "x.json")]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert out.returncode == 0, out.stderr[-2000:]
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["benchmark"] == name and result["environment"]["versions"]["torch"]
    for row in result["rows"]:
        if row["baseline"] is not None:
            assert row["ratio"] == pytest.approx(row["value"] / row["baseline"]), row["name"]
    return {row["name"]: row for row in result["rows"]}


@pytest.mark.slow
def test_memory(tmp_path):
    rows = benchmark(tmp_path, "memory")
    n, adamw = rows["peak_adamw"]["trained"], rows["peak_adamw"]["value"]
    assert n == memory.build("quick")[0].num_parameters()
    assert 12 * n < adamw < 20 * n  # gradients and two moments, and what a batch takes
    peaks = {name.removeprefix("peak_vs_adamw_"): row for name, row in rows.items() if "peak_vs" in name}
    assert set(peaks) == set(memory.ARMS) - {"adamw"}
    for name, row in peaks.items():
        assert row["baseline"] == adamw and row["value"] > (row["basis_bytes"] or 0), name
    layout = Layout.from_named_parameters(memory.build("quick")[0].named_parameters())
    for name, storage in (("dense", "bf16"), ("int4", "int4"), ("tucker", "tucker")):
        assert rows[f"basis_bytes_{name}"]["value"] == storage_bytes(layout, 40, storage), name
        # nothing of the size of the model beside the basis, the largest gradient (twice: tied) and the batch
        assert rows[f"saved_beside_basis_{name}"]["ratio"] > 0.7, name
    assert peaks["lora"]["ratio"] < 0.5 < 1 < peaks["dense"]["ratio"]
    # a running average is one number a weight
    more = peaks["tucker_shipped_rule"]["value"] - peaks["tucker"]["value"]
    assert more == pytest.approx(4 * n, rel=0.2)
    live = rows["live_grad_vs_largest"]
    assert live["value"] <= live["baseline"] + live["carrier_bytes"]
    assert rows["live_grad_vs_largest_adamw"]["value"] == 4 * n


@pytest.mark.slow
def test_communication(tmp_path):
    rows = benchmark(tmp_path, "communication")
    payload = rows["payload_bytes"]
    assert payload["baseline"] == 160 and 160 <= payload["value"] <= 4 * (40 + 8)
    plain, n = rows["wire_bytes_ddp_adamw"], tiny_parameters()
    assert plain["n"] == n and 8 * n < plain["value"] < 1.2 * 8 * n
    if "of the machine" not in plain["counted"]:
        assert rows["wire_bytes_vs_ddp"]["value"] < 20_000  # a Trainer's own, most of it
        assert rows["wire_bytes_vs_ddp_lora"]["value"] > rows["wire_bytes_vs_ddp"]["value"]
        assert rows["wire_bytes_vs_ddp_sl2o_kept"]["ratio"] == pytest.approx(1, abs=0.1)
    for arm in communication.ARMS:
        row = rows[f"difference_from_one_process_{arm}"]
        assert row["value"] < 1e-4 < row["moved"]
    assert rows["difference_from_one_process_sl2o_streamed"]["value"] <= 1e-6


def tiny_parameters():
    return communication.build("ddp_adamw", "tiny", seed=0).num_parameters()


# What the parts say


def test_live_gradients_are_counted_at_their_birth():
    ids = torch.arange(12)[None]
    found = {}
    for stream in (False, True):
        model = tiny_gpt2()
        basis = random_dense(model.named_parameters())
        optimizer = SubspaceOptimizer(model, basis, lambda c: torch.optim.SGD(c), stream_gradients=stream)
        hooks = [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
        work = lambda model=model: model(input_ids=ids, labels=ids).loss.backward()  # noqa: E731
        found[stream] = memory.live_gradients(model, work)
        assert [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()] == hooks
        assert optimizer.projected_gradient().norm() > 0
    sizes = [4 * p.numel() for p in model.parameters()]
    assert found[False] == sum(sizes) and found[True] <= max(sizes) + 4 * optimizer.streamer.carrier.numel()
    assert found[True] >= max(sizes)  # one that was counted after it was freed would be smaller


def test_a_basis_of_repeated_columns_has_the_sizes_of_a_fitted_one(monkeypatch):
    block = torch.arange(6.0).view(2, 3)
    assert torch.equal(memory.tiled(block, 7), block.repeat(1, 3)[:, :7])
    monkeypatch.setattr(memory, "PERIOD", 256)
    layout = Layout.from_named_parameters(nn.Linear(90, 31).named_parameters())
    for storage in ("fp32", "bf16", "int4"):
        basis = memory.random_basis(layout, storage, 5, torch.device("cpu"))
        assert basis.nbytes == storage_bytes(layout, 5, storage) and basis.dim == 5
        assert float((basis.as_matrix().norm(dim=1) - 1).abs().max()) < 0.2


def test_a_dense_basis_takes_what_is_free():
    assert memory.dim_that_fits(100_000_000, 2, 24_000_000_000) == 40
    assert memory.dim_that_fits(100_000_000, 2, memory.SPARE + 7 * 200_000_000 + 5) == 7
    with pytest.raises(RuntimeError, match="one direction of 100,000,000 numbers needs 2,200,000,000"):
        memory.dim_that_fits(100_000_000, 2, memory.SPARE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory of the device is measured where there is one")
def test_peak_is_that_of_the_work(monkeypatch):
    kept = []
    grown = memory.peak_of(lambda: kept.append(torch.ones(20_000_000))) - memory.settled()
    assert abs(grown) < 8_000_000  # what was kept is in both
    passing = memory.peak_of(lambda: torch.ones(20_000_000).sum()) - memory.settled()
    assert 72_000_000 < passing < 100_000_000
    monkeypatch.setattr(memory, "reset_peak", lambda: None)
    with pytest.raises(RuntimeError, match="begun anew by /proc/self/clear_refs; use Linux"):
        memory.peak_of(lambda: None)


def test_an_arm_that_fails_is_named(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "out of memory\n")
    monkeypatch.setattr(memory.subprocess, "run", lambda words, **options: failed)
    with pytest.raises(RuntimeError, match="the arm tucker ended with 1: out of memory"):
        memory.in_own_process("tucker", "quick")


def test_counters_that_are_not_there(tmp_path):
    with pytest.raises(RuntimeError, match="which cannot be read .No such file.*run on Linux"):
        communication.loopback_bytes(tmp_path / "dev")
    (tmp_path / "dev").write_text("Inter-|   Receive\n  eth0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n")
    with pytest.raises(RuntimeError, match="has no device lo"):
        communication.loopback_bytes(tmp_path / "dev")
    (tmp_path / "dev").write_text("    lo: 11 2 3 4 5 6 7 8 99 10 11 12 13 14 15 16\n")
    assert communication.loopback_bytes(tmp_path / "dev") == 99


def test_without_a_namespace_the_command_is_as_it_was(monkeypatch):
    def refused(*args, **options):
        raise FileNotFoundError("unshare")

    monkeypatch.setattr(communication.subprocess, "run", refused)
    assert communication.own_namespace() == []


def test_ranks_that_differ_are_no_result():
    first = {"a": torch.ones(3), "b": torch.zeros(2)}
    second = {name: weights.clone() for name, weights in first.items()}
    communication.check_alike("x", first, second)
    second["b"][1] = 1e-30
    with pytest.raises(RuntimeError, match="x: b differs between the two processes by up to 1e-30"):
        communication.check_alike("x", first, second)
    second["b"][1] = float("nan")
    assert communication.distance(first, second) > 1e30


def test_an_arm_that_did_not_move_is_no_result():
    one = {"trained": 10, "moved": 0.5, "wire": 100.0, "payload": 160.0}
    found = {arm: dict(one) for arm in communication.ARMS}
    assert communication.rows_of(found, {})[0]["least_bytes"] == 80
    found["sl2o_kept"]["moved"] = 0.0
    with pytest.raises(RuntimeError, match="sl2o_kept left the weights as they were"):
        communication.rows_of(found, {})


def test_payload_is_that_of_our_own_all_reduces(monkeypatch):
    calls = []
    monkeypatch.setattr(communication.dist, "all_reduce", lambda tensor: calls.append(tensor.numel()))
    payload = communication.Payload()
    communication.dist.all_reduce(torch.zeros(7))  # somebody else's
    code = {"__name__": "hf_sl2o.optim._streaming", "dist": communication.dist, "torch": torch}
    exec("dist.all_reduce(torch.zeros(40))", code)
    assert calls == [7, 40] and payload.total == 160
