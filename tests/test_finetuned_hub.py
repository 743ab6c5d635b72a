"""Fine-tunes on the Hub: what a Trainer pushes, with the real client, against a Hub on the loopback device."""

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

from hf_sl2o import Basis, Rule, SL2OTrainer, SL2OTrainingArguments, load_finetuned, save_finetuned

from .conftest import Tokens, random_dense, tiny_gpt2
from .hub_client import counted, use
from .loopback_hub import loopback_hub
from .test_finetuned import adapted, bits, equal

OURS = {"sl2o/config.json", "sl2o/model.safetensors", "sl2o/basis/model.safetensors", "sl2o/rule/model.safetensors"}
QUIET = {"per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True, "use_cpu": True}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it remembers the endpoint
    with loopback_hub() as server:
        use(server, tmp_path / "cache", monkeypatch)
        yield server


def fresh(hub, tmp_path, monkeypatch):
    """Another machine: nothing is in its cache, and no folder is called as a repository."""
    use(hub, tmp_path / "other-cache", monkeypatch)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


def pushed(name, strategy, basis=None, **options):
    """A run that is pushed while it trains."""
    model = tiny_gpt2()
    args = SL2OTrainingArguments(
        f"run-{name}", max_steps=4, save_steps=2, push_to_hub=True, hub_model_id=f"user/{name}", hub_strategy=strategy,
        hub_always_push=True, **QUIET, **options,
    )  # fmt: skip
    trainer = SL2OTrainer(model, args, basis=basis, train_dataset=Tokens())
    trainer.train()
    return trainer


@pytest.mark.hub
@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_every_strategy_carries_rule_basis_and_coefficients(hub, tmp_path, monkeypatch, strategy):
    trainer = pushed("tuned", strategy, basis=random_dense(tiny_gpt2().named_parameters()))
    commits = [set(files) for _, files in hub.repos["user/tuned"]]
    if strategy == "end":
        assert commits == [set()]  # nothing before it is asked for
        trainer.push_to_hub()
    files = dict(hub.repos["user/tuned"][-1][1])
    assert files.keys() >= OURS | {"coefficients.safetensors", "model.safetensors"}
    checkpoints = {file.partition("/")[0] for file in files if file.endswith("/coefficients.safetensors")}
    expected = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-2", "checkpoint-4"}}
    assert checkpoints == expected.get(strategy, set())
    configs = [files.get("sl2o/config.json") for _, files in hub.repos["user/tuned"]]
    assert len({*configs} - {None}) == (1 if strategy == "end" else 2)  # one a save
    fresh(hub, tmp_path, monkeypatch)
    with counted(hub) as requests:
        rebuilt = load_finetuned(tiny_gpt2(), "user/tuned")
    assert not any(word in line for line in requests for word in ("rule", "training_args", "coefficients"))
    ordinary = GPT2LMHeadModel.from_pretrained("user/tuned")
    away = max(float((a - b).abs().max()) for a, b in zip(bits(rebuilt), bits(ordinary), strict=True))
    assert equal(bits(rebuilt), bits(ordinary)) if strategy == "end" else 0 < away < 1e-6
    assert equal(bits(load_finetuned(tiny_gpt2(), "user/tuned", local_files_only=True)), bits(rebuilt))
    trainer.push_to_hub()  # when training is over, all are the same bits
    assert equal(bits(rebuilt), bits(trainer.model))
    assert Rule.from_pretrained("user/tuned", subfolder="sl2o/rule").fingerprint


@pytest.mark.hub
def test_a_basis_on_the_hub_is_named_by_its_commit(hub, tmp_path, monkeypatch):
    basis = random_dense(tiny_gpt2().named_parameters(), dim=40, units=torch.linspace(0.1, 2, 40))
    basis.push_to_hub("user/basis")
    commit = hub.repos["user/basis"][-1][0]
    one = pushed("one", "every_save", sl2o_basis="user/basis", sl2o_units="orthonormal")
    one.push_to_hub()
    args = TrainingArguments("plain", optim="sl2o", optim_args="basis=user/basis", max_steps=3, **QUIET)
    plain = Trainer(tiny_gpt2(), args, train_dataset=Tokens())
    plain.train()
    made = save_finetuned("shared", plain, tiny_gpt2(), basis="user/basis")
    made.push_to_hub("user/two")
    assert made.origin.basis_revision == commit
    random_dense(tiny_gpt2().named_parameters(), dim=40, seed=9).push_to_hub("user/basis")  # a later one
    assert Basis.from_pretrained("user/basis").fingerprint != basis.fingerprint
    one.push_to_hub()  # still of the one that it was trained in
    for name in ("one", "two"):
        files = hub.repos[f"user/{name}"][-1][1]
        own = [files["sl2o/" * (name == "one") + file] for file in ("config.json", "model.safetensors")]
        assert sum(map(len, own)) < 2000 and not any("basis" in file for file in files)
        assert any(file.endswith("rule/config.json") for file in files)
    card = hub.repos["user/two"][-1][1]["README.md"].decode()
    ModelCard(card).validate()
    assert f"`user/basis`, commit {commit}" in card and 'load_finetuned(base_model, "user/two")' in card
    fresh(hub, tmp_path, monkeypatch)
    for name, trainer in (("one", one), ("two", plain)):
        assert equal(bits(load_finetuned(tiny_gpt2(), f"user/{name}")), bits(trainer.model))
    for place, options, match in (
        ("user/basis", {}, "looked for a fine-tune at 'user/basis'"),
        ("user/absent", {}, "there is no such repository"),
        ("user/two", {"revision": "f" * 40}, "no revision 'ffff"),
        ("user/two", {"token": False, "cache_dir": tmp_path / "none", "local_files_only": True}, "local_files_only"),
    ):
        with pytest.raises(FileNotFoundError, match=match):
            load_finetuned(tiny_gpt2(), place, **options)


@pytest.mark.hub
def test_a_fine_tune_of_an_earlier_push_is_not_taken_for_the_weights_of_a_later_one(hub, tmp_path, monkeypatch):
    basis = random_dense(tiny_gpt2().named_parameters())
    pushed("tuned", "end", basis=basis).push_to_hub()
    (another := tmp_path / "another").mkdir()
    monkeypatch.chdir(another)  # where the first run left nothing
    later = pushed("tuned", "end", basis=basis)
    later.model.transformer.wte.weight.data.add_(torch.randn(50, 16), alpha=0.01)
    later.push_to_hub()
    assert equal(bits(GPT2LMHeadModel.from_pretrained("user/tuned")), bits(later.model))
    for place in ("user/tuned", another / "run-tuned"):
        with pytest.raises(FileNotFoundError, match="holds weights alone.*load the weights with from_pretrained"):
            load_finetuned(tiny_gpt2(), place)
    pushed("tuned", "every_save", basis=basis)
    assert load_finetuned(tiny_gpt2(), "user/tuned")
    pushed("tuned", "end", optim="adamw_torch", learning_rate=1e-3).push_to_hub()  # in the same folder
    with pytest.raises(FileNotFoundError, match="holds weights alone"):
        load_finetuned(tiny_gpt2(), "user/tuned")


@pytest.mark.hub
def test_a_warm_up_is_not_pushed_and_goes_on_where_it_was(hub):
    options = {"sl2o_warmup_steps": 6, "sl2o_snapshots": 4, "sl2o_dim": 2}
    trainer = pushed("warmed", "every_save", **options)
    trainer.push_to_hub()
    files = hub.repos["user/warmed"][-1][1]
    assert "sl2o/basis/model.safetensors" in files and not [file for file in files if "warmup" in file]
    folder = Path("run-warmed")
    assert (folder / "_warmup" / "trajectory").is_dir() and not (folder / "warmup").exists()
    (folder / "_warmup").rename(folder / "warmup")  # of a run that was not pushed, or an earlier version
    shutil.rmtree(folder / "checkpoint-2")
    shutil.rmtree(folder / "checkpoint-4")
    again = SL2OTrainer(tiny_gpt2(), trainer.args, train_dataset=Tokens())
    again.train(resume_from_checkpoint=True)
    assert equal(bits(again.model), bits(trainer.model)) and not (folder / "_warmup").exists()


@pytest.mark.hub
def test_without_a_network_an_adapter_s_fine_tune_is_taken_from_the_cache_with_a_word(hub, caplog):
    """Its repository has no config.json, which only the Hub can know."""
    start = adapted()
    args = SL2OTrainingArguments("run", max_steps=2, push_to_hub=True, hub_model_id="user/adapter", **QUIET)
    trainer = SL2OTrainer(start, args, basis=random_dense(start.named_parameters()), train_dataset=Tokens())
    trainer.train()
    trainer.push_to_hub()
    assert "config.json" not in hub.repos["user/adapter"][-1][1]
    assert equal(bits(load_finetuned(adapted(), "user/adapter")), bits(trainer.model))
    hub.stop()
    caplog.clear()
    assert equal(bits(load_finetuned(adapted(), "user/adapter")), bits(trainer.model))
    assert caplog.text.count("user/adapter (revision main) is taken from the cache") == 1


def trainer_of(folder, model, push=True, **options):
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "report_to": "none"}
    settings |= {"disable_tqdm": True, "use_cpu": True, **options}
    args = SL2OTrainingArguments(str(folder), **settings)
    trainer = SL2OTrainer(model, args, basis=random_dense(model.named_parameters()), train_dataset=Tokens())
    trainer.args.push_to_hub = push  # there is no Hub: what a push would take is looked at
    trainer._push_from_checkpoint = lambda folder: None
    return trainer


def test_a_resumed_run_is_shared_as_the_same_bits(tmp_path):
    made = []
    for name, resume in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-2"))):
        trainer = trainer_of(tmp_path / name, tiny_gpt2())
        trainer.train(resume_from_checkpoint=resume)
        trainer._share(final=True)
        made.append([(tmp_path / name / file).read_bytes() for file in sorted(OURS)])
        rebuilt = load_finetuned(tiny_gpt2(), tmp_path / name)
        assert all(map(torch.equal, rebuilt.parameters(), trainer.model.parameters()))
    assert made[0] == made[1]


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"push": False}, "the weights that the run began with were not kept; set push_to_hub=True"),
        ({"changed": True}, "also changed outside the subspace"),
    ],
)
def test_a_run_that_coefficients_do_not_say_pushes_its_weights_with_a_warning(tmp_path, caplog, options, reason):
    trainer = trainer_of(tmp_path, tiny_gpt2(), push=options.get("push", True), save_strategy="no")
    trainer.train()
    if "changed" in options:
        trainer._share(final=False)
        assert (tmp_path / "sl2o" / "config.json").is_file()
        trainer.model.transformer.wte.weight.data.add_(torch.randn(50, 16), alpha=0.01)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer._share(final=True)
    assert reason in caplog.text and all(map(torch.equal, before, trainer.model.parameters()))
    assert not (tmp_path / "sl2o" / "model.safetensors").exists()
    assert (tmp_path / "sl2o" / "basis" / "config.json").is_file()
    assert (tmp_path / "sl2o" / "rule" / "config.json").is_file()
    with pytest.raises(FileNotFoundError, match="which holds weights alone"):
        load_finetuned(tiny_gpt2(), tmp_path)


def test_a_run_that_is_not_pushed_keeps_no_copy_of_its_start(tmp_path):
    trainer = trainer_of(tmp_path, tiny_gpt2(), push=False, save_strategy="no")
    trainer.train()
    trainer.save_model()
    assert trainer._start is None and not (tmp_path / "sl2o").exists()
