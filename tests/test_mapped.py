"""Directions that are views of their file: nothing is copied or written, damage is refused; a CUDA device."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_sl2o import Basis, DenseBasis, IdentityBasis, LSTMRule, QuantizedBasis, RandomBasis, Rule, SubspaceOptimizer
from hf_sl2o.foundation.files import save_json, save_tensors, sealed, sha256_of
from hf_sl2o.foundation.pieces import map_tensors
from hf_sl2o.subspace import host, quantized, stored

from . import test_host
from . import test_storage as shared
from .conftest import random_dense
from .mutations import bytes_changed
from .test_gpu import backward
from .test_host import DTYPES, STORAGES, of_way
from .test_optim_learned import net, rule

walk, plain, mapped = test_host.walk, test_host.plain, test_host.mapped  # fixtures
linux = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads in /proc what memory is used")


def test_other_bases_say_that_they_do_not_stay(plain, tmp_path):
    layout = plain["fp32"].layout
    for basis in (plain["tucker"], RandomBasis(layout, 3), IdentityBasis(layout)):
        with pytest.raises(ValueError, match=f"a {basis.kind} basis stores .* bytes and needs all .* to\\(device\\)"):
            basis.on_host()
    plain["tucker"].save_pretrained(tmp_path / "tucker")
    with pytest.raises(ValueError, match="load it without mapped=True"):
        Basis.from_pretrained(tmp_path / "tucker", mapped=True)
    assert Basis.from_pretrained(tmp_path / "tucker").fingerprint == plain["tucker"].fingerprint
    LSTMRule().save_pretrained(tmp_path / "rule")
    with pytest.raises(TypeError, match="unknown arguments \\['mapped'\\]"):
        Rule.from_pretrained(tmp_path / "rule", mapped=True)
    with pytest.raises(TypeError, match="unknown arguments \\['maped'\\]"):
        Basis.from_pretrained(tmp_path / "tucker", maped=True)


# Files


def test_views_are_of_the_file_and_never_change_it(plain, tmp_path):
    plain["fp32"].save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole, tensors, views = path.read_bytes(), load_file(path), map_tensors(path)
    assert views.keys() == tensors.keys() and all(torch.equal(views[name], tensors[name]) for name in tensors)
    assert all(view.dtype == tensors[name].dtype for name, view in views.items())
    first = min(view.data_ptr() for view in views.values())
    assert max(view.data_ptr() for view in views.values()) - first < len(whole)  # one mapping, no copies
    basis = Basis.from_pretrained(tmp_path, mapped=True)
    basis.save_pretrained(tmp_path)  # over the file that it reads
    assert path.read_bytes() == whole and torch.equal(basis.as_matrix(), plain["fp32"].as_matrix())
    views["units"].fill_(7)
    assert path.read_bytes() == whole and bool((views["units"] == 7).all())


def test_tensors_that_a_view_cannot_hold(tmp_path):
    path = tmp_path / "other.safetensors"
    tensors = {"a": torch.arange(3), "b": torch.zeros(0, 4), "c": torch.tensor(2.5), "d": torch.ones(3).int().bool()}
    save_tensors(path, tensors)
    views = map_tensors(path)
    assert all(torch.equal(views[name], tensors[name]) and views[name].shape == tensors[name].shape for name in views)
    header = json.dumps({"b": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]},
                         "f": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}}).encode()  # fmt: skip
    header = header.ljust(-(-len(header) // 8) * 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x05" + np.float32([1.5, -2]).tobytes())
    views = map_tensors(path)
    assert views["b"].tolist() == [5] and views["f"].tolist() == [1.5, -2.0] and views["f"].data_ptr() % 4 == 0


@pytest.mark.parametrize("storage", ["fp32", "bf16", "int8", "int4"])
def test_damaged_files_are_refused_as_they_are_without_a_mapping(storage, plain, tmp_path):
    plain[storage].save_pretrained(tmp_path)
    path, draw, refused = tmp_path / "model.safetensors", random.Random(storage), 0
    whole = path.read_bytes()
    for cut in (len(whole) - 1, len(whole) // 2, 9, 0):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="sha256"):
            Basis.from_pretrained(tmp_path, mapped=True)
        with pytest.raises(ValueError, match="truncated"):
            map_tensors(path)
    settings = json.loads((tmp_path / "config.json").read_text())
    unsealed = {key: value for key, value in settings.items() if key not in ("sha256", "checksum")}
    for _ in range(60):
        path.write_bytes(bytes_changed(whole, draw))
        for config in (settings, unsealed, sealed({**unsealed, "sha256": sha256_of(path)})):
            save_json(tmp_path / "config.json", config)
            said = []
            for mapped in (False, True):
                try:
                    said.append(Basis.from_pretrained(tmp_path, mapped=mapped).as_matrix().tolist())
                except ValueError as error:
                    said.append(str(error))
            assert said[0] == said[1]
            refused += isinstance(said[0], str)
    assert 110 < refused < 180  # a changed number whose checksum is right is none of a damaged file


@pytest.mark.parametrize("storage, name", [("fp32", "basis.emb"), ("bf16", "basis.h.1.w"), ("int8", "scales.emb"),
                                           ("int8", "codes.emb"), ("int4", "codes.emb")])  # fmt: skip
def test_each_piece_of_a_tensor_is_checked(storage, name, plain, tmp_path, monkeypatch):
    for module in (stored, quantized):
        monkeypatch.setattr(module, "CHECKED_COLUMNS", 100)
    plain[storage].save_pretrained(tmp_path)
    tensors, settings = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    for column in (0, 99, 100, -1):
        changed = {key: tensor.clone() for key, tensor in tensors.items()}
        changed[name][-1, min(column, changed[name].shape[1] - 1)] = {"int8": -128, "uint8": 0}.get(
            str(changed[name].dtype).removeprefix("torch."), float("inf")
        )
        save_tensors(tmp_path / "model.safetensors", changed)
        rest = {key: value for key, value in settings.items() if key != "checksum"}
        digest = sha256_of(tmp_path / "model.safetensors")
        save_json(tmp_path / "config.json", sealed({**rest, "sha256": digest}))
        with pytest.raises(ValueError, match="holds NaN or Inf|out of range"):
            Basis.from_pretrained(tmp_path, mapped=True)


# Memory


def private_dirty(path):
    """kB of a file's mappings that this process has changed."""
    dirty, of_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            of_file = line.endswith(str(path))
        elif of_file and line.startswith("Private_Dirty"):
            dirty += int(line.split()[1])
    return dirty


@linux
@pytest.mark.parametrize("storage", ["fp32", "bf16", "int8"])
def test_training_writes_nothing_into_a_mapping(storage, tmp_path):
    model = shared.Regression()
    start = random_dense(model.named_parameters(), dim=6)
    basis = QuantizedBasis.from_dense(start) if storage == "int8" else start.to(dtype=DTYPES[storage])
    basis.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole, mapped = path.read_bytes(), Basis.from_pretrained(tmp_path, mapped=True)
    optimizer = SubspaceOptimizer(model, mapped, lambda c: torch.optim.Adam(c, lr=0.1), average=2.0)
    for _ in range(3):
        model.train()
        model().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert private_dirty(path) == 0 and path.read_bytes() == whole
    (mapped._codes[0] if storage == "int8" else mapped._matrices[0]).fill_(3)
    assert private_dirty(path) > 0 and path.read_bytes() == whole  # a write would be seen, and stays in the process


CHILD = """
import re, sys
from pathlib import Path
import torch
from hf_sl2o import Basis
def kb():
    return int(re.search("RssAnon:[^0-9]+([0-9]+)", Path("/proc/self/status").read_text()).group(1))
def used(folder, way):
    before = kb()
    basis = Basis.from_pretrained(folder, mapped=way == "mapped")
    if way == "copied":
        basis._matrices = [matrix.clone() for matrix in basis._matrices]
    products = basis.project([torch.ones(basis.layout.n)])
    print(products.double().sum().item(), kb() - before)
used(sys.argv[1], "mapped")
for way in ("mapped", "plain", "copied"):
    used(sys.argv[2], way)
"""


@linux
def test_a_mapped_basis_takes_memory_that_the_system_may_drop(tmp_path):
    for name, n in (("small", 100), ("basis", 375_000)):  # 40 directions: 60 MB
        layout = random_dense([("w", torch.nn.Parameter(torch.zeros(n)))], dim=1).layout
        DenseBasis(layout, [torch.randn(40, n)]).save_pretrained(tmp_path / name)
    # What is freed stays with the process, so that the memory at the end is the most that there was.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
    env |= {"MALLOC_TOP_PAD_": "0", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", CHILD, str(tmp_path / "small"), str(tmp_path / "basis")]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()[1:]]
    assert len({product for product, _ in lines}) == 1
    mapped, plain, copied = (int(kb) for _, kb in lines)
    # a load that is not mapped checks a view, too; what it does not promise is that it keeps one
    assert max(mapped, plain) < 15_000 and copied > 45_000, (mapped, plain, copied)


# On a CUDA device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnCUDA:
    pytestmark = pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")

    @pytest.mark.parametrize("storage", STORAGES)
    @pytest.mark.parametrize("way", ["host", "mapped"])
    def test_it_computes_what_it_does_on_the_cpu(self, way, storage, request, plain, monkeypatch):
        monkeypatch.setattr(host, "PIECE_BYTES", 1 << 13)
        monkeypatch.setattr(host, "CONVERTED_BYTES", 1 << 13)
        cpu, basis = plain[storage], of_way(way, request)[storage].to("cuda")
        held = basis._matrices if storage in DTYPES else [*basis._codes, *basis._scales]
        assert all(t.device.type == "cpu" and t.is_pinned() == (way == "host") for t in held if t.numel())
        assert basis.device.type == "cuda" and basis.fingerprint == cpu.fingerprint and not basis.has_loops
        g, c = shared.gradients(), torch.randn(2, cpu.dim)
        there = [one.cuda() for one in g]
        for _ in range(20):  # a copy that is read too early is not always wrong
            torch.testing.assert_close(basis.project(there).cpu(), cpu.project(g), rtol=1e-4, atol=2e-4)
            torch.testing.assert_close(basis.as_matrix().cpu(), cpu.as_matrix(), rtol=1e-5, atol=1e-6)
            moved = [one.clone() for one in there]
            basis.add_(moved, c[0].cuda())
            expected = [one.clone() for one in g]
            cpu.add_(expected, c[0])
            torch.testing.assert_close(shared.flat(moved).cpu(), shared.flat(expected), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(basis.coordinates(there).cpu(), cpu.coordinates(g), rtol=1e-4, atol=2e-4)
        columns = basis._columns(0, 1 << 22)
        next(columns)
        columns.close()
        back = basis.to("cpu")
        torch.testing.assert_close(back.project(g), cpu.project(g), rtol=1e-5, atol=2e-4)

    @pytest.mark.parametrize("storage", ["fp32", "bf16", "int8", "int4"])
    @pytest.mark.parametrize("way", ["host", "mapped"])
    def test_less_than_64_mb_are_there_at_a_time(self, way, storage, tmp_path):
        n = 4_000_000
        layout = random_dense([("w", torch.nn.Parameter(torch.zeros(n)))], dim=1).layout
        basis = DenseBasis(layout, [torch.randn(40, n) / n**0.5])
        basis = (
            basis.to(dtype=DTYPES[storage])
            if storage in DTYPES
            else QuantizedBasis.from_dense(basis, int(storage[3:]))
        )
        g, c = torch.randn(n, device="cuda"), torch.randn(40, device="cuda")
        expected = basis.to("cuda").project([g])
        if way == "mapped":
            basis.save_pretrained(tmp_path)
        basis = (Basis.from_pretrained(tmp_path, mapped=True) if way == "mapped" else basis.on_host()).to("cuda")
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = basis.project([g])
        basis.add_([g], c)
        assert torch.cuda.max_memory_allocated() - before < 64e6
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_a_step_from_pinned_memory_never_waits_for_the_device(self):
        ends = []
        for device in ("cpu", "cuda"):
            model = net().to(device)
            basis = random_dense(model.named_parameters(), dim=4).on_host()
            optimizer = SubspaceOptimizer(model.named_parameters(), basis, rule(), average=4.0)
            for step in range(3):
                backward(model, step)
                torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
                try:
                    optimizer.step()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            assert optimizer.basis.stays_on_host and optimizer.basis._matrices[0].device.type == "cpu"
            ends.append([p.detach().cpu() for p in model.parameters()])
        for a, b in zip(*ends, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
