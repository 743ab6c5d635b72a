"""Writes that a kill at any moment cannot damage, checksums that see every bit, JSON of any shape."""

import json
import os
import platform
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_sl2o import Trajectory
from hf_sl2o.foundation.files import (
    check_finite,
    check_seal,
    load_json,
    load_metadata,
    load_tensors,
    save_json,
    save_tensors,
    sealed,
    write_atomically,
)
from hf_sl2o.foundation.locks import lock_folder
from hf_sl2o.foundation.partials import temporary_name

WRITER = """
import sys, torch
from pathlib import Path
from hf_sl2o.foundation.files import json_writer, save_tensors
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

    def refused(path):
        raise PermissionError("Permission denied")

    with pytest.raises(OSError, match="could not write .*unchanged; choose a folder that may be written to"):
        write_atomically({tmp_path / "a": refused})


# Checksums


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_may_be_read_by_whom_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_tensors(tmp_path / "t.safetensors", {"t": torch.zeros(2)})
        save_json(tmp_path / "t.json", {})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_every_bit_of_a_file_counts(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(3), "empty": torch.zeros(0), "one": torch.tensor(1.0)}
    save_tensors(path, tensors, step="4")
    loaded = load_tensors(path)
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert load_metadata(path)["step"] == "4"
    whole = path.read_bytes()
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1 << (at % 8)
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="x.safetensors"):
            load_tensors(path)
    for other in (whole + b"\0", whole[:-1], b"", whole[:9], whole + whole):
        path.write_bytes(other)
        with pytest.raises(ValueError, match="x.safetensors .*truncated, damaged or not a safetensors file"):
            load_tensors(path)


def test_equal_contents_make_equal_files(tmp_path):
    further = {"one": "1", "two": "zwei ü", "three": 'a "quoted" \n line'}
    tensors = {"a": torch.randn(3, 5), "b": torch.zeros(2, dtype=torch.bfloat16)}
    contents = set()
    for number in range(12):
        save_tensors(tmp_path / f"{number}.safetensors", tensors, **further)
        contents.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(contents) == 1
    assert load_metadata(tmp_path / "0.safetensors").items() >= further.items()
    assert torch.equal(load_tensors(tmp_path / "0.safetensors")["a"], tensors["a"])
    plain = set()
    for _ in range(12):  # the library alone
        save_file(tensors, tmp_path / "plain.safetensors", metadata=further)
        plain.add((tmp_path / "plain.safetensors").read_bytes())
    assert len(plain) > 1
    assert torch.equal(load_file(tmp_path / "3.safetensors")["a"], tensors["a"])


def test_files_of_earlier_versions_have_no_checksum_and_load(tmp_path):
    path = tmp_path / "x.safetensors"
    for metadata in (None, {"format": "pt"}, {"format": "pt", "step": "3"}, {"format": "pt", "episode": "[1]"}):
        save_file({"a": torch.ones(2)}, path, metadata=metadata)
        assert load_tensors(path)["a"].tolist() == [1, 1]
    save_file({"a": torch.ones(2)}, path, metadata={"chacksum": "0" * 64})
    with pytest.raises(ValueError, match="the key 'chacksum' and no checksum"):
        load_tensors(path)


def test_views_are_saved_as_what_they_say(tmp_path):
    x = torch.randn(4, 6, dtype=torch.complex64)
    tensors = {
        "all": x,
        "again": x,
        "row": x[1],
        "turned": x.T,
        "conj": x.conj(),
        "neg": x.conj().imag,
        "one": x[0, 0],
    }
    save_tensors(tmp_path / "x.safetensors", tensors)
    loaded = load_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_large_file_is_checked_without_being_held(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.zeros(5_000_000)})  # several chunks
    with open(path, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\1")
    with pytest.raises(ValueError, match="its checksum is"):
        load_tensors(path)


def test_a_sealed_object_is_checked_whatever_the_order_of_its_keys(tmp_path):
    data = sealed({"b": [1, 2.5, None], "a": {"x": True}})
    save_json(tmp_path / "x.json", dict(reversed(data.items())))
    check_seal("x.json", load_json(tmp_path / "x.json"))
    check_seal("x.json", {"b": 1})  # of an earlier version
    with pytest.raises(ValueError, match="x.json says its checksum is .*damaged or changed after it was saved"):
        check_seal("x.json", {**data, "b": [1, 2.5, 0]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
        ("[" * 200_000, "too deep"),
        ("[" * 100 + "]" * 100, "more than 64 levels deep"),
        ("9" * 10_000, "is not valid JSON"),
        ("[1]", "holds a JSON list, expected an object"),
        ("null", "holds a JSON NoneType, expected an object"),
        (b"\xff\xfe{}", "is not valid JSON"),
    ],
)
def test_json_of_another_shape_is_named(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"x.json .*{message}"):
        load_json(path, dict)
    path.write_text('{"a": [NaN, {"b": 1e999}]}')
    with pytest.raises(ValueError, match=r"x.json has (inf|nan) at 'a\.(0|1\.b)', expected a finite number"):
        check_finite(path, load_json(path, dict))
    path.write_text('{"a": [1.5, {"b": null}]}')
    check_finite(path, load_json(path, dict))


# What a kill leaves, and two writers


def test_temporary_files_of_killed_processes_are_removed_those_of_living_ones_stay(tmp_path):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    mine = f"{os.getpid()}.partial"
    for name in (
        f".a.{done.pid}.partial",
        temporary_name("b").replace(mine, f"{done.pid}.partial"),
        temporary_name("c"),
    ):
        (tmp_path / name).write_text("left by a kill")
    living = [f".a.{os.getppid()}.partial", temporary_name("b").replace(mine, f"{os.getppid()}.partial")]
    living += [".of-another-host.01234567-1.partial", "notes.partial"]
    for name in living:
        (tmp_path / name).write_text("being written")
    save_json(tmp_path / "x.json", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*living, "x.json"])
    os.utime(tmp_path / living[2], (0, 0))  # nobody writes one file for a day
    Trajectory(tmp_path).clear()
    assert not (tmp_path / living[2]).exists() and (tmp_path / living[0]).exists()


HOLDER = """
import sys, torch
from hf_sl2o import Trajectory
trajectory = Trajectory(sys.argv[1])
trajectory.write(int(sys.argv[2]), [("w", torch.nn.Parameter(torch.ones(3)))])
print("written", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(platform.system() == "Windows", reason="folders are not locked there")
def test_two_processes_do_not_record_in_one_folder(tmp_path):
    weights = [("w", torch.nn.Parameter(torch.zeros(3)))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    first = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path), "0"], **pipes)
    try:
        assert first.stdout.readline() == b"written\n"
        second = Trajectory(tmp_path)
        for act in (lambda: second.write(1, weights), second.clear, lambda: second.forget_after(0), second.delete):
            with pytest.raises(ValueError, match="is being written by another process, which still runs"):
                act()
        assert Trajectory(tmp_path).steps == [0]  # it may be read
    finally:
        first.kill()  # a dead writer holds nothing
        first.wait()
        first.stdin.close()
        first.stdout.close()
    second.write(1, weights)
    assert Trajectory(tmp_path).steps == [0, 1]


def test_two_objects_of_one_process_lose_nothing(tmp_path):
    one, other = Trajectory(tmp_path), Trajectory(tmp_path)
    for step in range(6):
        (one if step % 2 else other).write(step, [("w", torch.nn.Parameter(torch.full((3,), float(step))))])
    assert Trajectory(tmp_path).steps == list(range(6)) and one.steps == list(range(6))
    one.forget_after(2)
    other.write(3, [("w", torch.nn.Parameter(torch.zeros(3)))])
    assert Trajectory(tmp_path).steps == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="snapshots of 1 parameters"):
        other.write(4, [("w", torch.nn.Parameter(torch.zeros(3))), ("v", torch.nn.Parameter(torch.zeros(3)))])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked there")
def test_a_lock_is_free_again_and_a_child_does_not_keep_it(tmp_path):
    code = f"""
import os, sys, time
from pathlib import Path
from hf_sl2o.foundation.locks import lock_folder
lock = lock_folder(Path({str(tmp_path)!r}))
if os.fork() == 0:
    sys.stdout.close()
    time.sleep(5)
    os._exit(0)
"""
    # the child, which a worker of a data loader could be, outlives its parent
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)
    lock = lock_folder(tmp_path)
    assert lock_folder(tmp_path) is lock
    assert json.dumps(lock.descriptor) != "null"
