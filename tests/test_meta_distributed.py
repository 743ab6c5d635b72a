"""Two gloo processes meta-train as one does, to rounding; a process that dies stops the other, and both go on."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_sl2o.foundation.files import load_json

from .meta_ranks_worker import CASES
from .meta_worker import SCENARIOS, train
from .ranks_worker import launch as launch_two
from .test_meta_resume import comparable

ROOT = Path(__file__).parent.parent


def launch(folder, mode):
    """Two processes that nobody watches over; returns exit codes, what they wrote to stderr, and seconds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    env |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.meta_worker", str(folder), mode]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    start = time.perf_counter()
    processes = [
        subprocess.Popen(command, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipes) for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors, time.perf_counter() - start


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Every scenario in two processes; then one dies in the middle of the second meta-epoch."""
    folder = tmp_path_factory.mktemp("two")
    codes, errors, seconds = launch(folder, "train")
    assert len(list(folder.glob("*.json"))) == 2 * len(SCENARIOS), errors[0][-3000:]
    return folder, codes, errors, seconds


def numbers(log):
    """The floats of a log, in order."""
    if isinstance(log, dict):
        return [x for key in sorted(log) if key != "seconds" for x in numbers(log[key])]
    if isinstance(log, list):
        return [x for item in log for x in numbers(item)]
    return [float(log)] if isinstance(log, int | float) else []


# bf16 rounds what differs in the last bit of fp32 to another number now and then.
@pytest.mark.parametrize(("name", "tolerance"), [("tasks", 1e-5), ("episodes", 1e-4), ("coordinates", 5e-3)])
def test_two_processes_train_as_one(two, tmp_path, name, tolerance):
    folder = two[0]
    first, second = (load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    logs = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
    assert logs[0] == logs[1]
    one, log = train(tmp_path / "one", name)
    assert (one["course"][-1] - one["course"][0]).abs().max() > 1e-2
    torch.testing.assert_close(first["course"], one["course"], rtol=0, atol=tolerance)
    torch.testing.assert_close(first["best"], one["best"], rtol=0, atol=tolerance)
    assert [list(entry) for entry in logs[0]] == [list(entry) for entry in log]
    assert numbers(logs[0]) == pytest.approx(numbers(log), abs=tolerance)
    other, log = train(tmp_path / "other", name, seed=1)  # the break
    assert (first["course"] - other["course"]).abs().max() > max(1e-3, 2 * tolerance)
    assert numbers(logs[0]) != pytest.approx(numbers(log), abs=1e-3)


def test_where_no_rule_is_the_best_processes_still_end_with_the_same(two):
    first, second = (load_file(two[0] / f"hopeless-{rank}.safetensors") for rank in (0, 1))
    assert torch.equal(first["course"], second["course"]) and torch.equal(first["best"], first["course"][0])
    assert torch.equal(first["best"], second["best"])


def test_a_process_that_dies_stops_the_other_and_both_go_on(two, tmp_path):
    folder, codes, errors, seconds = two
    assert codes[1] == 7 and codes[0] not in (0, 7)
    assert "RuntimeError: process 0 waits for one that is gone" in errors[0], errors[0][-3000:]
    assert f"Start the same command again: it goes on from the checkpoint in {folder / 'killed'}" in errors[0]
    assert seconds < 100 and not list(folder.glob("killed-*"))
    progress = load_json(folder / "killed" / "checkpoint.json")["progress"]
    assert progress["meta_step"] == 4 and progress["in_episode"]

    shutil.copytree(folder / "killed", tmp_path / "alone")
    codes, errors, _ = launch(folder, "go on")
    assert codes == [0, 0], errors[0][-3000:]
    whole = load_file(folder / "tasks-0.safetensors")
    log = json.loads((folder / "tasks-0.json").read_text())
    for rank in (0, 1):
        rest = load_file(folder / f"killed-{rank}.safetensors")
        assert torch.equal(rest["best"], whole["best"])
        assert len(rest["course"]) < len(whole["course"])  # it did not start from the beginning
        assert torch.equal(rest["course"], whole["course"][-len(rest["course"]) :])
        assert comparable(json.loads((folder / f"killed-{rank}.json").read_text())) == comparable(log)

    alone, _ = train(tmp_path / "alone", "tasks")  # one process takes over
    assert len(alone["course"]) == len(rest["course"])
    torch.testing.assert_close(alone["course"], rest["course"], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def differing(tmp_path_factory):
    """What each of two processes said where one thing differs between them."""
    folder = tmp_path_factory.mktemp("differing")
    codes, errors = launch_two("tests.meta_ranks_worker", folder)
    assert codes == [0, 0], errors[0][-3000:] + errors[1][-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", [name for name, (_, named) in CASES.items() if named])
def test_processes_that_were_started_differently_say_so(differing, name):
    for said in differing:
        kind, text, seconds = said[name]
        assert kind == "ValueError" and text.startswith(CASES[name][1]) and seconds < 10, (name, kind, text)
        assert "on rank 0" in text and "on rank 1" in text


@pytest.mark.parametrize("name", [name for name, (_, named) in CASES.items() if not named])
def test_weights_and_what_is_local_may_differ(differing, name):
    first, second = (said[name] for said in differing)
    assert first[:1] == second[:1] == [""] and first[1] == second[1]  # the same rule in the end
