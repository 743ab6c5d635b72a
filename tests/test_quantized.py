"""Codes and scales against rounding written out, and files that refuse damage."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hf_sl2o import Basis
from hf_sl2o.foundation.files import save_json, save_tensors, sealed, sha256_of
from hf_sl2o.subspace.quantized import BLOCK, QuantizedBasis, dequantize, inverse_root, quantize

from .conftest import random_dense

SHAPES = {"a": (30, 41), "b": (7,), "c": (6, 3, 2, 2), "d": ()}


def parameters():
    return [(name, torch.nn.Parameter(torch.randn(shape))) for name, shape in SHAPES.items()]


@pytest.fixture(params=[8, 4])
def basis(request):
    return QuantizedBasis.from_dense(random_dense(parameters(), dim=4), bits=request.param)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("columns", [1, 2, 127, 128, 129, 385])
def test_each_number_is_the_nearest_of_its_scale(bits, columns):
    rows = torch.randn(3, columns)
    rows[1] = 0
    codes, scales = quantize(rows, bits)
    assert scales.shape == (3, -(-columns // BLOCK)) and codes.shape == (3, columns if bits == 8 else -(-columns // 2))
    back = dequantize(codes, scales, bits, 0, columns)
    for row in range(3):
        for first in range(0, columns, BLOCK):
            part = rows[row, first : first + BLOCK]
            scale = float(part.abs().max()) / (127 if bits == 8 else 7)
            assert scales[row, first // BLOCK] == pytest.approx(scale)
            error = float((back[row, first : first + BLOCK] - part).abs().max())
            assert error <= scale / 2 * (1 + 1e-5)
    assert not back[1].any()
    for start, stop in ((0, columns), (columns // 2, columns), (1, columns - 1), (BLOCK, columns)):
        if start < stop:
            assert torch.equal(dequantize(codes, scales, bits, start, stop), back[:, start:stop])


def test_two_codes_a_byte_low_half_first():
    codes, scales = quantize(torch.tensor([[7.0, -7.0, 3.0]]), bits=4)
    assert scales.tolist() == [[1.0]] and codes.tolist() == [[(7 + 8) | (-7 + 8) << 4, (3 + 8) | 8 << 4]]


def test_the_matrix_is_the_inverse_root_and_changes_directions_least():
    rows = torch.randn(5, 40, dtype=torch.float64)
    root = inverse_root(rows @ rows.T)
    torch.testing.assert_close(root @ root @ (rows @ rows.T), torch.eye(5, dtype=torch.float64))
    nearest = root @ rows  # the polar factor is the nearest orthonormal one
    left, _, right = torch.linalg.svd(rows, full_matrices=False)
    torch.testing.assert_close(nearest, left @ right)
    with pytest.raises(ValueError, match="depend on each other"):
        inverse_root((rows @ rows.T)[:1, :1].expand(2, 2))


def test_rounding_says_how_far_directions_moved(basis):
    dense = random_dense(parameters(), dim=4)
    distance = float((basis.as_matrix() - dense.as_matrix()).norm()) / 2  # root of d
    assert basis.provenance["direction_error"] == pytest.approx(distance, rel=1e-3)
    assert (1e-3 < distance < 1e-2) if basis.bits == 8 else (0.05 < distance < 0.15)
    assert not torch.allclose(basis.mix, torch.eye(4), atol=1e-7)
    with pytest.raises(ValueError, match="bits is 2, expected 8 or 4"):
        QuantizedBasis.from_dense(dense, bits=2)


def test_a_basis_of_double_or_half_precision_is_rounded_too():
    dense = random_dense(parameters(), dim=4, dtype=torch.float64)
    of_double, of_half = (QuantizedBasis.from_dense(dense.to(dtype=t)) for t in (torch.float64, torch.bfloat16))
    for one in (of_double, of_half):
        assert one.units.dtype == torch.float32 and float((one.as_matrix() - dense.as_matrix()).norm()) < 0.03


def test_arrays_that_do_not_fit_are_refused(basis):
    layout, codes, scales, mix, units = basis.layout, basis._codes, basis._scales, basis.mix, basis.units
    for broken, message in (
        ((codes[:2], scales[:2], mix, units), "got 2 codes and 2 scales for 4"),
        (([codes[0][:, :-1], *codes[1:]], scales, mix, units), "the codes of 'a' have shape"),
        (([codes[0].float(), *codes[1:]], scales, mix, units), "the codes of 'a' have shape"),
        ((codes, [scales[0].double(), *scales[1:]], mix, units), "the scales of 'a' have shape"),
        ((codes, [*scales[:3], scales[3].expand(4, 2)], mix, units), "the scales of 'd' have shape"),
        ((codes, scales, mix[:3], units), "mix has shape"),
        ((codes, scales, mix.double(), units), "mix has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            QuantizedBasis(layout, *broken)
    with pytest.raises(ValueError, match="overlap"):
        QuantizedBasis(layout, codes, scales, mix, units, spans=[(0, 3), (1, 4), (0, 4), (0, 4)])
    with pytest.raises(ValueError, match="start has shape"):
        QuantizedBasis(layout, codes, scales, mix, units, start=torch.zeros(3))
    with pytest.raises(ValueError, match=f"{basis.bits} bits a number cannot be stored in torch.float32"):
        basis.to(dtype=torch.float32)
    assert basis.to(dtype=basis.dtype).fingerprint == basis.fingerprint


def saved(basis, folder, change):
    """Saves a basis and changes what is in its files; checksums are those of the change."""
    basis.save_pretrained(folder)
    settings, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    change(settings, tensors)
    save_tensors(folder / "model.safetensors", tensors)
    rest = {key: value for key, value in settings.items() if key != "checksum"}
    save_json(folder / "config.json", sealed({**rest, "sha256": sha256_of(folder / "model.safetensors")}))
    return folder


def low(tensors):
    tensors["codes.a"][1, 2] = -128 if tensors["codes.a"].dtype == torch.int8 else 0x80


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c, t: t.pop("codes.b"), "lacks tensor 'codes.b'"),
        (lambda c, t: t.pop("mix"), "lacks tensor 'mix'"),
        (lambda c, t: t.update(more=torch.ones(1)), "has an unknown tensor 'more'"),
        (lambda c, t: t.update({"codes.a": t["codes.a"][:, :-1].contiguous()}), "the codes of 'a' have shape"),
        (lambda c, t: t.update({"codes.a": t["codes.a"].short()}), "the codes of 'a' have shape"),
        (lambda c, t: t.update({"scales.a": t["scales.a"].bfloat16()}), "the scales of 'a' have shape"),
        (lambda c, t: t["scales.a"].neg_(), "'scales.a' in .* is negative"),
        (lambda c, t: t["scales.a"].fill_(float("nan")), "'scales.a' in .* NaN"),
        (lambda c, t: t["mix"].fill_(float("inf")), "'mix' in .* NaN or Inf"),
        (lambda c, t: t.update(units=t["units"][:3].clone()), "'units' in .* has shape"),
        (lambda c, t: t.update(units=t["units"].double()), "'units' in .* has shape"),
        (lambda c, t: t.update(units=-t["units"]), "finite and positive"),
        (lambda c, t: low(t), "the codes of 'a' in .* are out of range"),
        (lambda c, t: c.update(extra=1), "unknown key 'extra'"),
        (lambda c, t: c.pop("spans"), "lacks the key 'spans'"),
        (lambda c, t: c.update(spans=[[0, 4]]), "spans"),
        (lambda c, t: c.update(dim=5), "."),
        (lambda c, t: c.update(dtype="float32"), "its tensors are"),
    ],
)
def test_files_that_are_no_such_basis_are_refused(basis, tmp_path, change, message):
    assert Basis.from_pretrained(saved(basis, tmp_path, lambda c, t: None)).fingerprint == basis.fingerprint
    with pytest.raises(ValueError, match=message) as caught:
        Basis.from_pretrained(saved(basis, tmp_path, change))
    assert str(tmp_path) in str(caught.value)


def test_a_file_cut_short_is_refused(basis, tmp_path):
    basis.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="sha256"):
        Basis.from_pretrained(tmp_path)


def test_one_number_makes_another_fingerprint(basis):
    codes = [code.clone() for code in basis._codes]
    codes[0][0, 0] ^= 1
    other = QuantizedBasis(basis.layout, codes, basis._scales, basis.mix, basis.units, basis.natural_units)
    assert other.fingerprint != basis.fingerprint
    assert basis.to("cpu").fingerprint == basis.fingerprint
