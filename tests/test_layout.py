"""Layouts: order, tied weights, wrapper prefixes, and refusals that name the first difference."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2LMHeadModel

from hf_sl2o import IdentityBasis, Layout, LSTMRule, RandomBasis, SubspaceOptimizer
from hf_sl2o.subspace import names
from hf_sl2o.subspace.layout import plain_name

from .conftest import tiny_gpt2


def named(**shapes):
    return [(name, nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]


def test_trainable_parameters_in_order_tied_ones_once():
    tied = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": tied, "b": nn.Linear(3, 3)})
    model["b"].weight = tied.weight
    model["b"].bias.requires_grad = False
    layout = Layout.from_named_parameters(model.named_parameters(remove_duplicate=False))
    assert layout.names == ("a.weight", "a.bias") and layout.n == 12 and layout.numels == (9, 3)


def test_wrapper_prefixes_do_not_matter():
    plain = Layout.from_named_parameters(named(weight=(2, 3)))
    wrapped = Layout.from_named_parameters([("module._orig_mod.weight", nn.Parameter(torch.zeros(2, 3)))])
    assert plain == wrapped and plain.fingerprint == wrapped.fingerprint
    assert plain.fingerprint != Layout.from_named_parameters(named(weight=(3, 2))).fingerprint


def test_first_difference_is_named():
    layout = Layout.from_named_parameters(named(a=(2,), b=(3, 4), c=(5,)))
    with pytest.raises(ValueError, match=r"'b'.*does not have.*'x'"):
        layout.select(named(a=(2,), x=(3, 4), c=(5,)))
    with pytest.raises(ValueError, match=r"'b' has shape \(4, 3\).*fitted for \(3, 4\)"):
        layout.select(named(a=(2,), b=(4, 3), c=(6,)))
    with pytest.raises(ValueError, match="covers 3 tensors"):
        layout.check_tensors([torch.zeros(2)])
    covered, outside = layout.select(named(c=(5,), head=(7,), b=(3, 4), a=(2,)))
    assert [tuple(p.shape) for p in covered] == [(2,), (3, 4), (5,)] and [name for name, _ in outside] == ["head"]


def test_blocks_by_layer():
    layout = Layout.from_named_parameters(
        named(**{"wte.weight": (2,), "h.0.w": (2,), "h.0.b": (1,), "h.1.w": (2,), "ln.w": (1,), "ln.b": (1,)})
    )
    assert layout.blocks("layer") == [[0], [1, 2], [3], [4, 5]]
    assert layout.blocks("global") == [[0, 1, 2, 3, 4, 5]]
    with pytest.raises(ValueError, match="expected"):
        layout.blocks("row")


def test_nothing_trainable_and_bad_construction():
    with pytest.raises(ValueError, match="at least one"):
        Layout.from_named_parameters([])
    with pytest.raises(ValueError, match="distinct"):
        Layout(("a", "a"), ((1,), (1,)))
    with pytest.raises(ValueError, match="one shape a name"):
        Layout(("a",), ())


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("module._orig_mod.h.weight", "h.weight"),
        ("_orig_mod.module.h.weight", "h.weight"),
        ("_orig_mod._orig_mod.module.h._orig_mod.weight", "h.weight"),
        ("h.0._orig_mod.attn._orig_mod.weight", "h.0.attn.weight"),
        ("h.module.weight", "h.module.weight"),  # a model's own
        ("my_orig_mod.weight", "my_orig_mod.weight"),
    ],
)
def test_plain_names(name, plain):
    assert plain_name(name) == plain


def test_a_compiled_submodule_is_the_same_parameter():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    layout = Layout.from_named_parameters(model.named_parameters())
    model[1] = torch.compile(model[1], backend="eager")
    assert Layout.from_named_parameters(model.named_parameters()) == layout
    assert len(layout.select(model.named_parameters())[0]) == 4


# PEFT's names

LORA = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}


def peft_model(adapter="default", **changes):
    config = LoraConfig(**{**LORA, "task_type": "CAUSAL_LM", **changes})
    return get_peft_model(tiny_gpt2(), config, adapter_name=adapter)


def with_adapter(adapter="default", **changes) -> GPT2LMHeadModel:
    model = tiny_gpt2()
    model.add_adapter(LoraConfig(**{**LORA, **changes}), adapter_name=adapter)
    return model


def layout_of(model):
    return Layout.from_named_parameters(model.named_parameters())


@pytest.fixture
def said(caplog):
    names._say_once.cache_clear()
    return lambda: [record.message for record in caplog.records if record.name == names.logger.name]


@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["wte"]}, {"use_dora": True}])
@pytest.mark.parametrize(("make", "other"), [(peft_model, with_adapter), (with_adapter, peft_model)])
def test_the_same_adapter_under_another_name_is_found_and_said_once(said, changes, make, other):
    layout, model = layout_of(make(**changes)), other("mine", **changes)
    for _ in range(2):
        parameters, outside = layout.select(model.named_parameters())
    assert outside == [] and len({id(p) for p in parameters}) == len(layout.names)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in parameters} == {id(p) for p in trainable}
    wanted = dict(zip(layout.names, parameters, strict=True))
    named = {id(p): name for name, p in model.named_parameters()}
    for name, p in wanted.items():  # the same module and factor, not only the same shape
        strip = named[id(p)].removeprefix("base_model.model.").replace(".mine", ".default")
        assert name.removeprefix("base_model.model.") == strip
    assert len(said()) == 1 and f"{len(layout.names)} parameters of the basis have another name" in said()[0]
    layout_of(model).select(model.named_parameters())  # its own names: nothing to say
    assert len(said()) == 1


def test_what_is_not_the_same_adapter_is_refused_with_the_reason(said):
    lora, full = layout_of(peft_model()), layout_of(tiny_gpt2())
    with pytest.raises(ValueError, match="'base_model.*lora_A.default.weight'.*the model has none; add the adapter"):
        lora.select(tiny_gpt2().named_parameters())
    with pytest.raises(ValueError, match="'transformer.wte.weight'.*instead"):
        full.select(peft_model().named_parameters())
    with pytest.raises(ValueError, match="this is a PEFT model, and the basis was made from one without adapters"):
        Layout(("transformer.h.0.attn.c_attn.weight",), ((16, 48),)).select(with_adapter().named_parameters())
    with pytest.raises(ValueError, match=r"lora_A.other.weight' instead\): it has shape \(3, 16\).*another rank"):
        lora.select(peft_model("other", r=3).named_parameters())
    with pytest.raises(ValueError, match="of another kind or on other modules"):
        lora.select(peft_model(target_modules=["c_fc"]).named_parameters())
    assert not said()
    layout_of(peft_model()).select(peft_model().named_parameters())


def test_adapters_that_are_frozen_or_too_many_are_refused(said):
    layout, model = layout_of(peft_model()), peft_model()
    model.add_adapter("two", LoraConfig(**LORA, task_type="CAUSAL_LM"))
    layout.select(model.named_parameters())
    model.set_adapter("two")
    with pytest.raises(
        ValueError, match=r"adapter 'default', which is frozen.*'two' is active.*set_adapter\('default'"
    ):
        layout.select(model.named_parameters())
    other = layout_of(peft_model("three"))
    other.select(model.named_parameters())  # one of the two is active
    for name, p in model.named_parameters():
        p.requires_grad = "lora_" in name
    with pytest.raises(ValueError, match="2 active adapters fit, such as .*; leave one of them active"):
        other.select(model.named_parameters())
    for p in model.parameters():
        p.requires_grad = False
    with pytest.raises(ValueError, match="that one is frozen"):
        other.select(model.named_parameters())


def test_a_full_models_basis_is_never_matched_to_another_part():
    layout = Layout.from_named_parameters(named(**{"encoder.0.weight": (3, 3)}))
    for other in ("decoder.0.weight", "encoder.1.weight", "base_model.model.decoder.0.weight", "encoder.0.bias"):
        with pytest.raises(ValueError, match=f"does not have .the model has '{other}' instead"):
            layout.select(named(**{other: (3, 3)}))
    assert len(layout.select(named(**{"encoder.0.weight": (3, 3), "encoder.1.weight": (3, 3)}))[1]) == 1


# What a basis cannot move


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.zeros(2, dtype=torch.complex64), "complex.*as two real parameters"),
        (torch.zeros(2, device="meta"), "meta device.*materialise the model first"),
        (torch.zeros(2, dtype=torch.int8), "integers.*quantised"),
    ],
)
def test_tensors_without_real_values_are_refused_by_name(tensor, text):
    layout = Layout(("a", "w"), ((2,), (2,)))
    good = torch.zeros(2, dtype=torch.bfloat16)
    layout.check_tensors([good, good])
    with pytest.raises(ValueError, match=f"parameter 'w' .*{text}"):
        layout.check_tensors([good, tensor])
    if not tensor.dtype == torch.int8:
        with pytest.raises(ValueError, match=f"parameter 'w' .*{text}"):
            Layout.from_named_parameters([("w", nn.Parameter(tensor))])
    frozen = [("w", nn.Parameter(tensor, requires_grad=False)), *named(a=(2,))]
    assert Layout.from_named_parameters(frozen).names == ("a",)


def test_a_parameter_without_elements_changes_nothing():
    full, plain = named(e=(0, 5), a=(2, 3), z=(0,), b=(3,)), named(a=(2, 3), b=(3,))
    layout = Layout.from_named_parameters(full)
    assert layout == Layout.from_named_parameters(plain) and layout.n == 9
    assert layout.select(full)[1] == []
    for basis in (RandomBasis(layout, 2), RandomBasis(layout, 2).to_dense(), IdentityBasis(layout)):
        optimizer = SubspaceOptimizer(full, basis, LSTMRule())
        sum((p**2).sum() + p.sum() for _, p in full).backward()
        optimizer.step()
    assert float(full[1][1].detach().abs().max()) > 0
    recorded = Layout(("e", "a"), ((0, 5), (2, 3)))  # an older file may name it
    assert [tuple(p.shape) for p in recorded.select(full)[0]] == [(0, 5), (2, 3)]
    with pytest.raises(ValueError, match="at least one"):
        Layout.from_named_parameters(named(e=(0, 5)))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (None, "a layout is None"),
        ([1], "a layout is .1."),
        ({"names": ["a"]}, "expected lists under"),
        ({"names": "ab", "shapes": [[1], [2]]}, "expected lists under"),
        ({"names": [1], "shapes": [[1]]}, "parameter name 1, expected text"),
        ({"names": ["a"], "shapes": [3]}, "the shape 3, expected a list of integers"),
        ({"names": ["a"], "shapes": ["12"]}, "the shape '12'"),
        ({"names": ["a"], "shapes": [[2.0]]}, r"the shape \[2.0\]"),
        ({"names": ["a"], "shapes": [[True]]}, r"the shape \[True\]"),
        ({"names": ["a"], "shapes": [[-1]]}, r"the shape \[-1\]"),
        ({"names": ["a"], "shapes": [[10**30]]}, "the shape"),
        ({"names": ["a", "b"], "shapes": [[1]]}, "one shape a name"),
        ({"names": [], "shapes": []}, "at least one"),
    ],
)
def test_a_layout_from_a_file_of_other_types_is_refused(data, text):
    with pytest.raises(ValueError, match=text):
        Layout.from_dict(data)
    layout = Layout(("a", "b"), ((), (2, 0)))
    assert Layout.from_dict(layout.to_dict()) == layout
