"""C++ that is compiled at its first use: kept, shared, switched off, and not missed."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_sl2o import Layout, RandomBasis
from hf_sl2o.foundation import native

ADD = 'extern "C" int add(int a, int b) {{ return a + b + {}; }}\n'


@pytest.fixture
def load(tmp_path, monkeypatch):
    """`load_native` that has loaded nothing yet, with a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(native.SWITCH, raising=False)
    native._folder.cache_clear()
    yield native.load_native.__wrapped__
    native._folder.cache_clear()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "add.cpp"
    path.write_text(ADD.format(0))
    return path


def needs_compiler(load, source):
    library = load(source)
    if library is None:
        pytest.skip("there is no C++ compiler here")
    return library


def test_compiled_once_and_anew_after_a_change(load, source, tmp_path):
    assert needs_compiler(load, source).add(ctypes.c_int(2), ctypes.c_int(3)) == 5
    [kept] = (tmp_path / "cache" / "hf_sl2o" / "native").iterdir()
    made = kept.stat().st_mtime_ns
    load(source)
    assert kept.stat().st_mtime_ns == made
    source.write_text(ADD.format(1))
    assert load(source).add(ctypes.c_int(2), ctypes.c_int(3)) == 6


def test_switch(load, source, monkeypatch):
    monkeypatch.setenv(native.SWITCH, "0")
    assert load(source) is None


def test_no_compiler_is_no_error(load, source, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert load(source) is None


def test_source_that_does_not_compile_is_said(load, source, caplog):
    needs_compiler(load, source)
    source.write_text("this is no C++\n")
    assert load(source) is None
    assert "add.cpp could not be compiled" in caplog.text and "error" in caplog.text
    assert not list(source.parent.rglob("*.partial"))


def test_cache_folder_that_cannot_be_made(load, source, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    native._folder.cache_clear()
    assert needs_compiler(load, source).add(ctypes.c_int(2), ctypes.c_int(3)) == 5


def test_several_processes_compile_at_once(load, source, tmp_path):
    needs_compiler(load, source)
    code = (
        f"from pathlib import Path; from hf_sl2o.foundation.native import load_native; "
        f"print(load_native(Path({str(source)!r})).add(2, 3))"
    )
    source.write_text(ADD.format(7))  # not compiled yet
    root = str(Path(native.__file__).parents[2])
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(3)
    ]
    assert [process.communicate()[0].split()[-1] for process in processes] == ["12"] * 3


def test_without_it_torch_does_the_work(monkeypatch):
    model = torch.nn.Linear(30, 20)
    basis = RandomBasis(Layout.from_named_parameters(model.named_parameters()), 4).to_dense()
    g = [torch.ones_like(p) for p in model.parameters()]
    native_result = basis.project(g)
    monkeypatch.setattr("hf_sl2o.subspace.compiled.load_native", lambda source: None)
    torch.testing.assert_close(basis.project(g), native_result)
