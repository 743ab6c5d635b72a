"""Runs that are killed in the middle of a write, a rename or a deletion end as the undisturbed one, to the bit."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its programs")

ROOT = Path(__file__).resolve().parents[1]
DELETIONS = ("os.remove", "os.rmdir")


@pytest.fixture(scope="module")
def server():
    """Returns `ask(program, folder, kill_at)`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.kill_worker"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    lines = []

    def answer():
        for line in process.stderr:
            lines.append(line)
            try:
                return json.loads(line)
            except ValueError:
                continue  # a library's own words
        raise RuntimeError("the server is gone: " + "".join(lines[-20:]))

    def ask(program, folder, kill_at=0):
        folder.mkdir(parents=True, exist_ok=True)
        process.stdin.write(json.dumps({"program": program, "folder": str(folder), "kill_at": kill_at}) + "\n")
        process.stdin.flush()
        return answer()

    assert answer() == "ready"
    yield ask
    process.stdin.close()
    process.wait(timeout=30)
    process.stderr.close()


def left_over(program, folder):
    """What a kill left and no later start removed: temporary files, and checkpoints of meta-training but the newest.

    Of a Trainer's run the half-deleted checkpoint stays until the next save.
    """
    partial = [str(path.relative_to(folder)) for path in folder.rglob("*.partial")]
    checkpoints = sorted(path.name for path in folder.glob("checkpoint-*")) if program == "meta" else []
    return partial + checkpoints[:-1]


def kill_points(events):
    """Numbers of events: every one in the last save and the deletions that follow, and a draw from the others."""
    names = sorted({path.split("/")[0] for _, path in events if path.startswith("checkpoint-")})
    inside = [n for n, (_, path) in enumerate(events, 1) if path.startswith(names[-1])]
    late = set(inside) | {n for n, (event, _) in enumerate(events, 1) if event in DELETIONS and n > inside[0]}
    others = [n for n in range(1, len(events) + 1) if n not in late]
    return sorted(late | set(random.Random(0).sample(others, 16)))


@pytest.mark.parametrize("program", ["train", "meta"])
def test_killed_anywhere_and_started_again(server, tmp_path, program):
    whole = server(program, tmp_path / "whole")
    assert whole["status"] == 0 and "error" not in whole, whole.get("error")
    again = server(program, tmp_path / "whole")  # a finished run started again changes nothing
    assert again.get("result") == whole["result"], again.get("error", again.get("result"))
    points = kill_points(whole["events"])
    assert len(points) >= 20, whole["events"]
    wrong = []
    for number in points:
        folder = tmp_path / f"kill-{number}"
        killed = server(program, folder, number)
        assert killed["status"] == -signal.SIGKILL, killed
        if number % 5 == 0:  # and once more, in what goes on
            server(program, folder, 10 + number % 17)
        rest = server(program, folder)
        if rest.get("result") != whole["result"]:
            wrong.append((number, whole["events"][number - 1], rest.get("error", rest.get("result"))))
        elif left_over(program, folder):
            wrong.append((number, whole["events"][number - 1], left_over(program, folder)))
    assert not wrong, f"{len(wrong)} of {len(points)}: " + "\n".join(map(str, wrong[:3]))
