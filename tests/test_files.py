"""Writes that a kill at any moment cannot damage."""

import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from hf_sl2o.files import load_json, load_tensors, save_json, save_tensors, write_atomically

WRITER = """
import sys, torch
from pathlib import Path
from hf_sl2o.files import json_writer, save_tensors
print("ready", flush=True)
value = 0
while True:
    value += 1
    save_tensors(Path(sys.argv[1]) / "x.safetensors", {"x": torch.full((300_000,), float(value))}, value=str(value))
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    save_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(300_000)})
    seen = set()
    for attempt in range(4):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.05 + random.Random(attempt).random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        x = load_tensors(tmp_path / "x.safetensors")["x"]
        assert x.shape == (300_000,) and bool((x == x[0]).all())
        seen.add(float(x[0]))
    assert max(seen) > 0  # it did write


def test_several_files_change_together_or_not_at_all(tmp_path):
    save_json(tmp_path / "a", 1)

    def broken(path):
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="could not write .*b.*free some space"):
        write_atomically({tmp_path / "a": lambda p: open(p, "w").write("2"), tmp_path / "b": broken})
    assert load_json(tmp_path / "a") == 1 and sorted(p.name for p in tmp_path.iterdir()) == ["a"]
