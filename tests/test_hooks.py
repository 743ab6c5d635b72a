"""Importing hf_sl2o changes what `hooks` lists, and nothing that a run without our names could notice.

Run as a program, this file is the process that the tests compare: `python test_hooks.py plain|ours`, in a folder.
"""

import copy
import functools
import hashlib
import inspect
import json
import os
import pickle
import random
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy
import pytest
import torch
import transformers.trainer
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from transformers.training_args import OptimizerNames

if __name__ != "__main__":
    import hf_sl2o
    from hf_sl2o.training import hooks

    from .conftest import random_dense

METHODS = ["_prepare_for_training", "_run_epoch", "_clip_grad_norm"]
NAMES = ["sl2o", "subspace_adamw", "subspace_sgd"]
RUNS = ["steps", "epochs", "resumed", "finished and resumed", "an epoch raises", "not clipped"]
LIBRARIES = {"transformers", "accelerate", "torch", "peft", "huggingface_hub", "datasets", "evaluate", "safetensors"}


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 8, "loss_type": "ForCausalLM"}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


class Events(TrainerCallback):
    """Notes what it is called for; raises at a given event of a given step, or ends the run at an event."""

    def __init__(self, raises=None, ends=None):
        self.seen, self.raises, self.ends = [], raises, ends

    def called(self, event, state, control):
        self.seen.append(event)
        if self.raises == (event, state.global_step):
            raise KeyboardInterrupt(event)
        control.should_training_stop |= self.ends == event

    for _name in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
        vars()[_name] = lambda self, args, state, control, _name=_name, **_: self.called(_name, state, control)


class Overriding(Trainer):
    """What a user writes over the methods that we stand in front of: notes the call, and calls `super()`."""

    def called(self, name, *args, **kwargs):
        self.calls.append(name)
        return getattr(super(), name)(*args, **kwargs)

    for _name in METHODS:
        vars()[_name] = lambda self, *args, _name=_name, **kwargs: self.called(_name, *args, **kwargs)


def made(folder, optim="adamw_torch", kind=Trainer, given=None, callbacks=(), **options):
    """A Trainer, for which an epoch is four steps; `given` makes further arguments of it from the model."""
    settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.1}
    settings |= {"max_grad_norm": 0.5, "max_steps": 1 if "num_train_epochs" not in options else -1, **options}
    model, args = gpt2(), TrainingArguments(str(folder), optim=optim, **settings)
    ids = torch.randint(1, 30, (26, 8), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    words = {"train_dataset": rows, "eval_dataset": rows[:4], "callbacks": list(callbacks)}
    return kind(model, args, **words, **({} if given is None else given(model)))


def trained(*args, resume=None, **options):
    trainer = made(*args, **options)
    trainer.raised = said(lambda: trainer.train(resume_from_checkpoint=resume) and "")
    trainer.weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return trainer


def said(call):
    try:
        return str(call())
    except (Exception, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"


def without_seconds(value):
    """A run's logs without what its speed says."""
    return json.loads(re.sub(r'"\w+_(runtime|per_second)": [^,}]+', r'"\1": 0', json.dumps(value)))


def facts(trainer, events):
    files = {str(path): path.read_bytes() for path in Path(trainer.args.output_dir).rglob("*") if path.is_file()}
    states = {path: json.loads(files.pop(path)) for path in list(files) if path.endswith("trainer_state.json")}
    return {
        "raised": trainer.raised,
        "weights": trainer.weights.numpy().tobytes().hex(),
        "history": without_seconds(trainer.state.log_history),
        "callbacks": [type(one).__name__ for one in trainer.callback_handler.callbacks],
        "events": events.seen,
        "steps": trainer.state.global_step,
        "arguments": [pickle.dumps(trainer.args, protocol).hex() for protocol in range(6)],
        "random numbers": torch.rand(1).item(),
        "files": {path: hashlib.sha256(data).hexdigest() for path, data in files.items()},
        "states": without_seconds(states),
    }


def runs(optim, given=None):
    """Every kind of run, with clipping, dropout and two batches a step."""
    steps = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    epochs = {"num_train_epochs": 2, "eval_on_start": True, "eval_strategy": "epoch"}
    resumed, finished = ({**steps, "resume": f"{optim} steps/checkpoint-{step}"} for step in (3, 6))
    free = {**steps, "save_strategy": "no", "max_grad_norm": 0.0}
    for kind, options in zip(RUNS, (steps, epochs, resumed, finished, epochs, free), strict=True):
        events = Events(("on_substep_end", 5) if kind == "an epoch raises" else None)
        name, run = "adamw_torch" if given else optim, f"{optim} {kind}"
        yield run, facts(trained(run, name, given=given, callbacks=[events], **options), events)


def pickled(trainer):
    """What of a Trainer can be pickled, and why not."""
    return {name: said(lambda value=value: bool(pickle.dumps(value))) for name, value in vars(trainer).items()}


def other_facts(names):
    result = {
        "fresh pickles": {name: pickled(made("out", name)) for name in names},  # before anything is trained
        "bad optim_args": trained("out", optim_args="basis").raised,
        "bad name": said(lambda: made("out", "adam")),
        "our name": said(lambda: made("out", "sl2o").args.optim.value),
        "members": {m.name: [pickle.dumps(m, protocol).hex() for protocol in range(6)] for m in OptimizerNames},
        "copies": all(copy.copy(m) is copy.deepcopy(m) is m for m in OptimizerNames),
        "attributes": {m.name: sorted(vars(m)) for m in OptimizerNames},
    }
    for name in names:
        Overriding.calls = []
        trainer = trained("out", name, kind=Overriding, num_train_epochs=2)
        result |= {f"{name} calls": Overriding.calls, f"{name} pickles": pickled(trainer)}
        result[f"{name} copies"] = said(lambda trainer=trainer: copy.deepcopy(trainer) and "")
    return result


def program(which):
    if which == "ours":
        import hf_sl2o  # noqa: F401
    results = other_facts(["adamw_torch", "sl2o"] if which == "ours" else ["adamw_torch"])
    for optim in ["adamw_torch", "sgd", "sl2o"] if which == "ours" else ["adamw_torch", "sgd"]:
        results |= runs(optim)
    momentum = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    results |= runs("instance", lambda model: {"optimizers": (momentum(model.parameters()), None)})
    if which == "plain":
        assert "hf_sl2o" not in sys.modules
        before = snapshot()
        args = torch.load("sl2o.bin", weights_only=False)  # imports hf_sl2o
        results["unpickled"] = [args.optim is OptimizerNames("sl2o"), args.optim in _OPTIMIZER_HANDLERS]
        results["changed"] = changes(before, snapshot())
        Trainer._get_grad_norm = lambda *args, **kwargs: 0.0
        torch.optim.Optimizer.further = 1
        Trainer.training_step.__defaults__ = (1,)
        del transformers.trainer.TRAINER_STATE_NAME
        random.seed(1)
        results["broken"] = sorted(set(changes(before, snapshot())) - set(results["changed"]))
    Path("results.json").write_text(json.dumps(results))


def contents(value):
    """`value`, and what is inside of it that can be replaced without another object."""
    yield "", value
    if type(value) is dict:
        yield from ((f"[{key!s}]", one) for key, one in value.items())
    elif type(value) in (list, set, frozenset):
        yield from ((f"[{index}]", one) for index, one in enumerate(value))
    elif type(value) is types.FunctionType:
        yield from ((f"'s {name}", getattr(value, name)) for name in ("__code__", "__defaults__", "__kwdefaults__"))
        yield from ((f"'s {name}", one) for name, one in vars(value).items())


def snapshot():
    """What is in each module of other libraries and in its classes, by their paths; and the state of the process."""
    owners = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in LIBRARIES}
    for name, module in list(owners.items()):
        classes = [one for one in list(vars(module).values()) if issubclass(type(one), type)]
        owners |= {f"{name}.{one.__qualname__}": one for one in classes if one.__module__ == name}
    found = {
        path: {key + part: one for key, value in list(vars(owner).items()) for part, one in contents(value)}
        for path, owner in owners.items()
    }
    found[""] = {
        "random numbers": str([random.getstate(), [*numpy.random.get_state()[1]], torch.get_rng_state().tolist()]),
        "environment": str([os.environ, sys.path, sys.meta_path, sys.excepthook, warnings.filters]),
        "torch": str([torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()]),
    }
    return owners, found


def changes(before, after):
    """Paths of what is new, gone or another one; modules that are loaded later, and what they bring, are left out."""
    (owners, found), (_, found_now), changed = before, after, []
    for path, old in found.items():
        new, owner = found_now.get(path, {}), owners.get(path)
        loads = isinstance(owner, types.ModuleType) and hasattr(owner, "__getattr__")
        for key in old.keys() | new.keys():
            later = key not in old and (loads or sys.modules.get(f"{path}.{key}") is new[key])
            kept = key in old and key in new and (old[key] is new[key] or (not path and old[key] == new[key]))
            changed += [] if later or kept else [f"{path}.{key}".strip(".")]
    return sorted(changed)


if __name__ == "__main__":
    program(sys.argv[1])


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What the two processes found: one imports hf_sl2o, the other one only at its end, by unpickling."""
    results = []
    for which in ("plain", "ours"):
        folder = tmp_path_factory.mktemp(which)
        torch.save(TrainingArguments("out", optim="sl2o", use_cpu=True), folder / "sl2o.bin")
        words = {"cwd": folder, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True}
        process = subprocess.run([sys.executable, __file__, which], **words)
        assert process.returncode == 0, process.stderr[-3000:]
        results.append(json.loads((folder / "results.json").read_text()))
    return results


def test_what_is_changed_is_what_is_listed(both):
    changed, broken = ({re.sub("'s .*", "", path) for path in both[0][what]} for what in ("changed", "broken"))
    expected = {f"trainer.Trainer.{name}" for name in METHODS}
    for index, name in enumerate(NAMES, len(OptimizerNames) - 3):
        upper, enum, table = name.upper(), "training_args.OptimizerNames", "_OPTIMIZER_HANDLERS[OptimizerNames"
        expected |= {f"{enum}.{upper}", f"{enum}._member_map_[{upper}]", f"{enum}._member_names_[{index}]"}
        expected |= {f"{enum}._value2member_map_[{name}]"}
        expected |= {f"{module}.{table}.{upper}]" for module in ("trainer", "trainer_optimizer")}  # the same table
    assert changed == {f"transformers.{path}" for path in expected}
    listed = {name for line in hooks.__doc__.splitlines() if line[:1] == "`" for name in re.findall("`(.+?)`", line)}
    assert {re.sub(r"^\w+\.|\[.*|(?<=Names)\..*", "", path) for path in expected} == listed
    of_trainer = ("Trainer._get_grad_norm", "Trainer.training_step", "TRAINER_STATE_NAME")
    others = {"random numbers", "torch.optim.optimizer.Optimizer.further"}
    assert broken == {f"transformers.trainer.{name}" for name in of_trainer} | others


@pytest.mark.parametrize("optim, last", [("adamw_torch", 7), ("sgd", 7), ("instance", 7), ("sl2o", 6)])
def test_a_run_without_our_names_is_the_same(both, optim, last):
    """A finished run that is resumed makes a step more, but for ours."""
    whole, epochs, resumed, finished, raising, free = all_runs = [both[1][f"{optim} {run}"] for run in RUNS]
    for run, ours in zip(RUNS, all_runs, strict=True):
        other = both[1][f"{'sgd' if optim == 'sl2o' else 'sl2o'} {run}"]
        assert ours["weights"] != other["weights"] and ours["history"] != other["history"]
        assert optim == "sl2o" or ours == both[0][f"{optim} {run}"], run
    assert [run["steps"] for run in all_runs] == [6, 8, 6, last, 5, 6]
    assert {Path(path).name for path in whole["files"]} >= {"training_args.bin", "optimizer.pt", "rng_state.pth"}
    assert resumed["weights"] == whole["weights"] != free["weights"]
    assert (finished["weights"] == whole["weights"]) == (optim == "sl2o")
    assert raising["raised"] == "KeyboardInterrupt: on_substep_end" and raising["events"][-1] == "on_substep_end"
    assert epochs["events"].count("on_evaluate") == 3
    assert max(entry.get("grad_norm", 0) for entry in whole["history"]) > 0.5


def test_errors_names_pickles_and_subclasses_are_the_same(both):
    plain, ours = both
    assert plain["bad optim_args"] == ours["bad optim_args"] and plain["bad optim_args"].startswith("ValueError: not ")
    assert ours["bad name"] == plain["bad name"][:-1] + ", 'sl2o', 'subspace_adamw', 'subspace_sgd']"
    assert (
        ours["members"] == {**ours["members"], **plain["members"]} and len(plain["members"]) == len(OptimizerNames) - 3
    )
    assert plain["copies"] and ours["copies"] and plain["unpickled"] == [True, True]
    added = {"__reduce_ex__", *plain["attributes"]["SGD"]}
    assert ours["attributes"] == {**plain["attributes"], **{name.upper(): sorted(added) for name in NAMES}}
    assert {said for of in ours["fresh pickles"].values() for said in of.values()} == {"True"}
    for what in ("pickles", "copies", "calls"):
        assert plain[f"adamw_torch {what}"] == ours[f"adamw_torch {what}"] == ours[f"sl2o {what}"]
    assert ours["sl2o calls"] == [METHODS[0], *[METHODS[1], *METHODS[2:] * 4] * 2] and not ours["sl2o copies"]


def twice(monkeypatch, names, call):
    """Does something with our methods, then with some of transformers' own."""
    ours = call()
    for name in names:
        assert hooks._theirs[name].__module__ == "transformers.trainer"
        monkeypatch.setattr(Trainer, name, hooks._theirs[name])
    return ours, call()


@pytest.fixture(params=["basis", "no basis"])
def words(request, tmp_path):
    """`optim_args` with a basis, and none."""
    random_dense(gpt2().named_parameters(), units=torch.ones(6)).save_pretrained(tmp_path / "basis")
    return {"optim_args": f"basis={tmp_path / 'basis'}" if request.param == "basis" else None}


def test_without_the_names_they_are_refused_and_a_trainer_takes_the_factory(both, tmp_path, monkeypatch):
    assert both[0]["our name"].startswith("ValueError: sl2o is not a valid") and both[1]["our name"] == "sl2o"
    options = {"basis": random_dense(gpt2().named_parameters()), "optim": "subspace_sgd"}
    factory = {"optimizer_cls_and_kwargs": (hf_sl2o.SubspaceOptimizerFactory, options)}
    monkeypatch.delitem(_OPTIMIZER_HANDLERS, OptimizerNames("sl2o"))
    assert "unsupported optimizer" in trained(tmp_path, "sl2o").raised
    ours, theirs = twice(monkeypatch, METHODS, lambda: trained(tmp_path, given=lambda model: factory, max_grad_norm=0))
    assert theirs.optimizer.optimizer.coefficients.any() and torch.equal(ours.weights, theirs.weights)


@pytest.mark.parametrize("words", ["basis"], indirect=True)
def test_without_prepare_epochs_have_no_length_and_nothing_is_compared(words, tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(hooks, "check_same_on_all_ranks", lambda facts, what, patience: compared.append(what))
    ours, theirs = twice(monkeypatch, METHODS[:1], lambda: trained(tmp_path, "sl2o", num_train_epochs=1, **words))
    assert not ours.raised and ours.state.global_step == 4 and compared == ["training", "resumed training"]
    assert theirs.raised.startswith("ValueError: this rule sees the share of the run that is done, and total_steps is")
    assert theirs.state.global_step == 0


def test_without_prepare_an_optimizer_that_does_not_know_the_model_publishes_no_average(tmp_path, monkeypatch):
    rule = hf_sl2o.LSTMRule(hf_sl2o.RuleConfig(output_scale=0.3))
    optimizer = functools.partial(hf_sl2o.LearnedOptimizer, rule=rule, average=2.0)
    given = {"given": lambda model: {"optimizers": (optimizer(model.named_parameters()), None)}, "max_steps": 4}
    calls = [lambda: trained(tmp_path, **given), lambda: trained(tmp_path, "sl2o", max_steps=4)]
    (ours, by_name), (theirs, their_name) = twice(monkeypatch, METHODS[:1], lambda: [call() for call in calls])
    assert not torch.equal(ours.weights, theirs.weights) and torch.equal(by_name.weights, their_name.weights)
    theirs.optimizer.optimizer.use_average()  # it is kept
    torch.testing.assert_close(list(ours.model.parameters()), list(theirs.model.parameters()))


def test_without_run_epoch_a_finished_run_goes_on_and_ctrl_c_leaves_the_last_step(words, tmp_path, monkeypatch):
    options = {"max_steps": 6, "lr_scheduler_type": "constant", **words}
    first = trained(tmp_path, "sl2o", save_strategy="steps", save_steps=6, **options)

    def runs():
        resumed = trained(tmp_path, "sl2o", resume=str(tmp_path / "checkpoint-6"), **options)
        stopped = trained(tmp_path, "sl2o", callbacks=[Events(("on_pre_optimizer_step", 3))], **options)
        assert not resumed.raised and stopped.raised == "KeyboardInterrupt: on_pre_optimizer_step"
        same = torch.equal(resumed.weights, first.weights)
        return resumed.state.global_step, same, stopped.optimizer.optimizer.at_average

    assert twice(monkeypatch, METHODS[1:2], runs) == ((6, True, True), (7, False, False))


@pytest.mark.parametrize("words", ["basis"], indirect=True)
def test_without_clip_grad_norm_the_whole_gradient_is_clipped_too(words, tmp_path, monkeypatch):
    options = {"lr_scheduler_type": "constant", "learning_rate": 1.0, "max_grad_norm": 1e-3, **words}
    runs = twice(monkeypatch, METHODS[2:], lambda: trained(tmp_path, "subspace_sgd", **options))
    ours, theirs = (run.optimizer.optimizer.coefficients.norm().item() for run in runs)
    assert ours == pytest.approx(1e-3, rel=1e-2) and theirs < ours / 3


def test_less_does_not_do_it(tmp_path):
    """What the list says of callbacks, of an optimizer's own hooks, and of methods set on an object."""
    stopped = trained(tmp_path, max_steps=3, callbacks=[Events(ends="on_train_begin")], gradient_accumulation_steps=1)
    assert stopped.state.global_step == 1
    norms, trainer = [], made(tmp_path, max_grad_norm=1e-3)
    parts = (p.grad.flatten() for p in trainer.model.parameters())
    trainer.create_optimizer().register_step_pre_hook(lambda *_: norms.append(torch.cat(list(parts)).norm().item()))
    trainer.train()
    assert norms == pytest.approx([1e-3], rel=1e-2)
    Overriding.calls, trainer = [], made(tmp_path, kind=Overriding)
    trainer._run_epoch = types.MethodType(Trainer._run_epoch, trainer)
    trainer.train()
    assert Overriding.calls == [METHODS[0], METHODS[2]]


@pytest.mark.parametrize("again", [False, True])
def test_a_wrapper_that_another_library_put_in_later_is_called(tmp_path, monkeypatch, again):
    calls, inner, before = [], Trainer._run_epoch, snapshot()
    hf_sl2o.register()
    assert changes(before, snapshot()) == []
    monkeypatch.setattr(Trainer, "_run_epoch", lambda self, **words: (calls.append(1), inner(self, **words))[1])
    if again:
        hf_sl2o.register()
    run = trained(tmp_path, "sl2o")
    assert calls == [1] and not run.optimizer.optimizer.listens


def test_an_optimizer_that_is_its_own_wrapper_trains(tmp_path):
    left = iter(range(1, 1000))  # then it raises, where it would be asked for ever
    own = type("Own", (torch.optim.SGD,), {"optimizer": property(lambda self: next(left) and self)})
    run = trained(tmp_path, given=lambda model: {"optimizers": (own(model.parameters(), lr=0.1), None)})
    assert not run.raised and run.state.global_step == 1


@pytest.mark.parametrize("name", METHODS)
def test_a_method_looks_like_the_one_it_stands_in_front_of(name):
    ours, theirs = getattr(Trainer, name), hooks._theirs[name]
    assert inspect.signature(ours) == inspect.signature(theirs) and inspect.getdoc(ours) == inspect.getdoc(theirs)
