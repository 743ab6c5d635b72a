"""A fine-tune as d coefficients: the same bits everywhere, and refused where anything else is not the same."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig, get_peft_model

from hf_sl2o import (
    DenseBasis,
    FineTune,
    IdentityBasis,
    LSTMRule,
    Rule,
    RuleConfig,
    SubspaceOptimizer,
    load_finetuned,
    save_finetuned,
)
from hf_sl2o.foundation.files import json_checksum, save_tensors, sha256_of
from hf_sl2o.training.starting import KeptStart, start_of

from .conftest import Tokens, random_dense, tiny_gpt2

BATCH = torch.stack([Tokens()[row]["input_ids"] for row in range(4)])


def trained(model, basis, steps=5, inner=None, **options):
    torch.manual_seed(2)
    rule = LSTMRule(RuleConfig(output_scale=0.3)) if inner is None else inner
    optimizer = SubspaceOptimizer(model, basis, rule, **options)
    for _ in range(steps):
        optimizer.use_last()
        model(input_ids=BATCH, labels=BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def bits(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def rewritten(folder, **changes):
    """Changes config.json as somebody would who also makes its checksum right."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    config.pop("checksum")
    path.write_text(json.dumps({**config, "checksum": json_checksum(config)}))


def with_origin(folder, **changes):
    rewritten(folder, origin={**json.loads((folder / "config.json").read_text())["origin"], **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was saved, with its basis beside it."""
    model = tiny_gpt2()
    optimizer = trained(model, random_dense(model.named_parameters()), average=4.0)
    left = bits(model)
    folder = tmp_path_factory.mktemp("run") / "shared"
    made = save_finetuned(folder, optimizer, tiny_gpt2())
    return {"model": model, "optimizer": optimizer, "left": left, "folder": folder, "made": made}


@pytest.fixture
def shared(run, tmp_path):
    return shutil.copytree(run["folder"], tmp_path / "shared")


# To the bit


def test_a_run_is_rebuilt_to_the_bit_and_training_left_it_a_few_digits_away(run):
    rebuilt = load_finetuned(tiny_gpt2(), run["folder"])
    assert equal(bits(rebuilt), bits(run["model"]))
    assert not equal(bits(rebuilt), run["left"])  # why saving sets the weights
    away = max(float((a - b).abs().max()) for a, b in zip(bits(rebuilt), run["left"], strict=True))
    moved = max(float((a - b).abs().max()) for a, b in zip(bits(rebuilt), bits(tiny_gpt2()), strict=True))
    assert away < 1e-6 < 1e-3 < moved
    assert torch.equal(run["optimizer"].coefficients, run["made"].coefficients)


def test_saving_twice_gives_the_same_files(run, tmp_path):
    save_finetuned(tmp_path / "again", run["optimizer"], tiny_gpt2())
    for name in ("config.json", "model.safetensors", "basis/model.safetensors", "rule/model.safetensors"):
        assert sha256_of(tmp_path / "again" / name) == sha256_of(run["folder"] / name), name
    assert Rule.from_pretrained(run["folder"] / "rule").fingerprint == run["made"].origin.rule


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_model_below_fp32(tmp_path, dtype):
    model = tiny_gpt2(dtype=dtype)
    optimizer = trained(model, random_dense(model.named_parameters()))
    save_finetuned(tmp_path, optimizer, tiny_gpt2(dtype=dtype))
    assert equal(bits(load_finetuned(tiny_gpt2(dtype=dtype), tmp_path)), bits(model))
    with pytest.raises(ValueError, match=f"{str(dtype)[6:]}.*float32.*load that base model in that dtype"):
        load_finetuned(tiny_gpt2(), tmp_path)


def test_two_files_of_under_2_kb_where_the_basis_is_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_gpt2()
    basis = random_dense(model.named_parameters(), dim=40, units=torch.linspace(0.1, 2, 40))
    basis.save_pretrained("user/basis")
    optimizer = trained(model, basis, inner=lambda c: torch.optim.SGD(c, lr=0.1))
    save_finetuned("shared", optimizer, tiny_gpt2(), basis="user/basis")
    assert {path.name for path in (tmp_path / "shared").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert sum((tmp_path / "shared" / name).stat().st_size for name in ("config.json", "model.safetensors")) < 2000
    assert equal(bits(load_finetuned(tiny_gpt2(), "shared")), bits(model))
    assert equal(bits(load_finetuned(tiny_gpt2(), "shared", basis=basis)), bits(model))
    random_dense(model.named_parameters(), dim=40, seed=9).save_pretrained("user/other")
    before = bits(model)
    with pytest.raises(ValueError, match="give the basis of that run"):
        save_finetuned("wrong", optimizer, tiny_gpt2(), basis="user/other")
    assert not (tmp_path / "wrong").exists() and equal(bits(model), before)


def test_units_are_those_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_gpt2()
    basis = random_dense(model.named_parameters())
    basis.save_pretrained("user/basis")
    save_finetuned("shared", trained(model, basis.with_units("orthonormal")), tiny_gpt2(), basis="user/basis")
    assert equal(bits(load_finetuned(tiny_gpt2(), "shared")), bits(model))


# Adapters


def adapted(seed=3, name="default"):
    model = tiny_gpt2()
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True), adapter_name=name)


def test_an_adapter_is_rebuilt_and_another_one_refused(tmp_path):
    model = adapted()
    save_finetuned(tmp_path, trained(model, random_dense(model.named_parameters())), adapted())
    assert equal(bits(load_finetuned(adapted(), tmp_path)), bits(model))
    assert equal(bits(load_finetuned(adapted(name="mine"), tmp_path)), bits(model))
    with pytest.raises(ValueError, match="an adapter's first factors, from the file"):
        load_finetuned(adapted(seed=4), tmp_path)
    with pytest.raises(ValueError, match="the basis is one of a PEFT adapter, and the model has none"):
        load_finetuned(tiny_gpt2(), tmp_path)
    other = adapted()
    other.base_model.model.transformer.ln_f.bias.data[0] += 1.0
    with pytest.raises(ValueError, match="what it leaves as it is .* differ"):
        load_finetuned(other, tmp_path)


# What is refused when a run is saved


def test_weights_that_coefficients_do_not_say_are_refused(tmp_path):
    model = tiny_gpt2()
    optimizer = trained(model, random_dense(model.named_parameters()))
    with pytest.raises(ValueError, match="is the model that was trained; load the base model anew"):
        save_finetuned(tmp_path, optimizer, model)
    with pytest.raises(ValueError, match="give the base model that it began with"):
        save_finetuned(tmp_path, optimizer, tiny_gpt2(seed=1))
    with pytest.raises(ValueError, match="torch.float32, the base model in torch.bfloat16"):
        save_finetuned(tmp_path, optimizer, tiny_gpt2(dtype=torch.bfloat16))
    model.transformer.h[0].mlp.c_fc.weight.data.add_(torch.randn(16, 64), alpha=0.01)
    with pytest.raises(ValueError, match="also changed outside the subspace"):
        save_finetuned(tmp_path, optimizer, tiny_gpt2())
    nameless = SubspaceOptimizer(model.named_parameters(), optimizer.basis, lambda c: torch.optim.SGD(c, lr=0.1))
    with pytest.raises(ValueError, match=r"give it the model: SubspaceOptimizer\(model"):
        save_finetuned(tmp_path, nameless, tiny_gpt2())
    with pytest.raises(ValueError, match="without a basis a fine-tune is its weights"):
        save_finetuned(tmp_path, torch.optim.SGD(model.parameters(), lr=0.1), tiny_gpt2())
    whole = IdentityBasis(optimizer.basis.layout)
    with pytest.raises(NotImplementedError, match="share the weights instead"):
        save_finetuned(tmp_path, SubspaceOptimizer(model, whole, LSTMRule()), tiny_gpt2())
    assert not list(tmp_path.iterdir())


def test_what_is_trained_beside_the_basis_is_named(tmp_path):
    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 2))

    for changed, options in (("2.weight", {"outside": torch.optim.AdamW}), ("1.num_batches_tracked", {})):
        model = network()
        basis = random_dense([(n, p) for n, p in model.named_parameters() if n.startswith("0.")])
        optimizer = SubspaceOptimizer(model, basis, lambda c: torch.optim.SGD(c, lr=0.1), **options)
        if options:
            model.eval()
        model(torch.randn(4, 6)).sum().backward()
        optimizer.step()
        with pytest.raises(
            ValueError, match=f"^{changed.replace('2.weight', '(1|2).(weight|bias)')} outside the basis"
        ):
            save_finetuned(tmp_path, optimizer, network())


# What is refused when one is loaded


def refused(folder, match, base=None, **options):
    model = tiny_gpt2() if base is None else base
    before = bits(model)
    with pytest.raises(ValueError, match=match):
        load_finetuned(model, folder, **options)
    assert equal(bits(model), before)  # nothing is changed


def test_another_base_model_or_basis_is_refused(run, shared):
    refused(
        shared, r"starts from a base model whose name is not known \(float32\), and the weights", tiny_gpt2(seed=1)
    )
    refused(shared, "has the weights of this fine-tune already", load_finetuned(tiny_gpt2(), shared))
    wider = torch.nn.Module()
    wider.transformer = tiny_gpt2().transformer
    wider.transformer.wte.weight = torch.nn.Parameter(torch.zeros(51, 16))
    refused(shared, r"has shape \(51, 16\), the basis was fitted for \(50, 16\)", wider)
    other = random_dense(tiny_gpt2().named_parameters(), seed=8, units=torch.ones(6))
    refused(shared, "give the basis of that run", basis=other)
    refused(shared, "stored in float32", basis=run["optimizer"].basis.to(dtype=torch.bfloat16))
    matrices = [matrix.clone() for matrix in run["optimizer"].basis._matrices]
    matrices[3][2, -1] += 1e-3
    units = run["optimizer"].basis.units
    changed = DenseBasis(run["optimizer"].basis.layout, matrices, units)
    changed.natural_units = run["optimizer"].basis.natural_units
    assert changed.fingerprint == run["made"].origin.basis  # which samples the directions
    refused(shared, "gives other weights here than where it was saved", basis=changed)
    shutil.rmtree(shared / "basis")
    with pytest.raises(FileNotFoundError, match="saved Basis in the folder .* which has no config.json"):
        load_finetuned(tiny_gpt2(), shared)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"finetuned": 2}, "has format 2, this hf_sl2o reads 1; upgrade it"),
        ({"finetuned": "1"}, "is '1', expected an integer"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "unknown key 'auto_map'"),
        ({"origin": "gpt2"}, "expected an object"),
    ],
)
def test_a_config_that_says_something_else_is_refused(shared, changes, match):
    rewritten(shared, **changes)
    refused(shared, match)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"weights": "0" * 64}, "gives other weights here"),
        ({"weights": "no"}, "'weights' is 'no', expected 64 hexadecimal digits"),
        ({"basis": 3}, "'basis' is 3, expected text"),
        ({"basis_id": "../../etc"}, "expected the id of a Hub repository"),
        ({"basis_id": "a/.."}, "expected the id of a Hub repository"),
        ({"basis_id": "/etc/basis"}, "expected the id of a Hub repository"),
        ({"more": None}, "unknown key 'more'"),
    ],
)
def test_an_origin_that_says_something_else_is_refused(shared, changes, match):
    with_origin(shared, **changes)
    refused(shared, match)


@pytest.mark.parametrize(
    "tensors, match",
    [
        ({"coefficients": torch.ones(5)}, "5 coefficients and its basis 6 directions"),
        ({"coefficients": torch.ones(6)}, "gives other weights here"),
        ({"coefficients": torch.ones(2, 3)}, r"shape \(2, 3\)"),
        ({"coefficients": torch.full((6,), float("nan"))}, "NaN or Inf"),
        ({"coefficients": torch.ones(6, dtype=torch.float16)}, "torch.float16"),
        ({"coefficients": torch.ones(6), "more": torch.ones(1)}, "expected 'coefficients' alone"),
        ({}, "expected 'coefficients' alone"),
    ],
)
def test_tensors_that_are_others_are_refused(shared, tensors, match):
    save_tensors(shared / "model.safetensors", tensors)
    rewritten(shared, sha256=sha256_of(shared / "model.safetensors"))
    refused(shared, match)


def test_damage_and_other_folders_are_said(shared, tmp_path):
    data = bytearray((shared / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (shared / "model.safetensors").write_bytes(data)
    refused(shared, "sha256")
    for folder, match in ((tmp_path, "which has no config.json"), (shared / "rule", "give what save_finetuned wrote")):
        with pytest.raises(FileNotFoundError, match=match):
            load_finetuned(tiny_gpt2(), folder)
    with pytest.raises(TypeError, match="expected a model; load it first"):
        load_finetuned("gpt2", shared)
    with pytest.raises(ValueError, match="set `basis` before it is saved"):
        FineTune(torch.ones(6), FineTune.from_pretrained(restored(shared, data)).origin).save_pretrained(
            tmp_path / "x"
        )


def test_names_that_the_hub_allows_are_names_of_a_basis(run):
    for name in ("user/basis", "user/_basis", "_user/a.b-c"):
        validate_repo_id(name)
        assert replace(run["made"].origin, basis_id=name).basis_id == name


def test_what_is_wrong_with_the_card_is_said_before_the_basis_is_written(run, tmp_path):
    with pytest.raises(TypeError, match="model_card_kwargs has 'licence'"):
        run["made"].save_pretrained(tmp_path / "x", model_card_kwargs={"licence": "mit"})
    assert not (tmp_path / "x").exists()


def restored(folder, data):
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    return folder


def test_a_kept_start_is_the_start(tmp_path):
    model = adapted()
    basis = random_dense([(n, p) for n, p in model.named_parameters() if p.requires_grad][:2])
    kept, now = KeptStart(model), start_of(model, basis.layout)
    assert kept.start(basis.layout).others == now.others and kept.start(basis.layout).rest == now.rest
    copies = [t.clone() for t in now.tensors]
    trained(model, basis, steps=2)
    assert equal(kept.start(basis.layout).tensors, copies) and not equal(now.tensors, copies)
