"""SL2OTrainer and Trainer: saving, resuming to the bit, accumulation, precision, schedules, PEFT, warm-up."""

import dataclasses
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    EarlyStoppingCallback,
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_sl2o import (
    Basis,
    Layout,
    LearnedOptimizer,
    LSTMRule,
    RuleConfig,
    SL2OTrainer,
    SL2OTrainingArguments,
    SubspaceOptimizer,
    Trajectory,
)
from hf_sl2o.training.trainer import last_complete_checkpoint

from .conftest import Tokens, random_dense, tiny_gpt2


def fixed_rule():
    torch.manual_seed(2)
    return LSTMRule(RuleConfig(output_scale=0.3))


def run(tmp_path, model=None, optim="sl2o", resume=None, callbacks=(), seed=0, dataset=None, basis="dense", **options):
    model = tiny_gpt2() if model is None else model
    settings = {"report_to": "none", "max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1}
    settings |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": seed}
    args = SL2OTrainingArguments(str(tmp_path), optim=optim, **{**settings, **options})
    objects = {}
    if basis == "dense":
        objects["basis"] = random_dense(model.named_parameters())
    if optim == "sl2o":
        objects["rule"] = fixed_rule()
    trainer = SL2OTrainer(
        model,
        args,
        train_dataset=dataset or Tokens(),
        eval_dataset=Tokens(8, seed=1),
        callbacks=list(callbacks),
        **objects,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def distance(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("optim", ["sl2o", "subspace_adamw", "subspace_sgd"])
def test_resume_equals_the_uninterrupted_run_to_the_bit(tmp_path, optim):
    options = {"optim": optim, "lr_scheduler_type": "linear", "learning_rate": 0.5, "max_grad_norm": 0.05}
    whole = run(tmp_path / "whole", save_strategy="steps", save_steps=3, **options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "part" / "checkpoint-3")
    resumed = run(tmp_path / "part", resume=True, **options)
    assert equal(weights(whole), weights(resumed)) and resumed.state.global_step == 6
    assert torch.equal(whole.subspace_optimizer.coefficients, resumed.subspace_optimizer.coefficients)
    losses = [[entry["loss"] for entry in r.state.log_history if "loss" in entry] for r in (whole, resumed)]
    assert losses[0] == losses[1]
    # the break: the same checkpoint without the optimizer's state
    (tmp_path / "part" / "checkpoint-3" / "optimizer.pt").unlink()
    (tmp_path / "part" / "checkpoint-3" / "scheduler.pt").unlink()
    half = str(tmp_path / "part" / "checkpoint-3")
    assert not equal(weights(whole), weights(run(tmp_path / "other", resume=half, **options)))
    with pytest.raises(ValueError, match="holds no complete checkpoint"):  # nor is it taken for a whole one
        run(tmp_path / "part", resume=True, **options)


def test_checkpoint_files(tmp_path):
    trainer = run(tmp_path, save_strategy="steps", save_steps=6)
    folder = tmp_path / "checkpoint-6"
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    assert (folder / "optimizer.pt").stat().st_size < 50_000 and state["state"][0]["coefficients"].shape == (6,)
    saved = load_file(folder / "coefficients.safetensors")["coefficients"]
    assert torch.equal(saved, trainer.subspace_optimizer.coefficients) and saved.any()
    plain = GPT2LMHeadModel.from_pretrained(folder)  # nothing of ours is needed
    assert equal(weights(trainer), list(plain.parameters()))
    start, basis = tiny_gpt2(), trainer.basis
    for p, d, q in zip(start.parameters(), basis.lift(saved), plain.parameters(), strict=True):
        torch.testing.assert_close(p + d, q, rtol=1e-4, atol=1e-5)


def test_plain_trainer_equals_ours(tmp_path):
    ours = run(tmp_path / "a", max_grad_norm=0.05)
    model = tiny_gpt2()
    random_dense(model.named_parameters()).save_pretrained(tmp_path / "basis")
    fixed_rule().save_pretrained(tmp_path / "rule")
    args = TrainingArguments(
        str(tmp_path / "b"),
        optim="sl2o",
        optim_args=f"basis={tmp_path}/basis,rule={tmp_path}/rule",
        learning_rate=1.0,
        max_grad_norm=0.05,
        max_steps=6,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        seed=0,
        use_cpu=True,
    )
    plain = Trainer(model, args, train_dataset=Tokens())
    plain.train()
    assert distance(weights(ours), weights(plain)) < 1e-6
    assert distance(weights(ours), weights(run(tmp_path / "c", max_grad_norm=1e-4))) > 1e-4


def test_seq2seq_trainer(tmp_path):
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    random_dense(model.named_parameters()).save_pretrained(tmp_path / "basis")
    args = Seq2SeqTrainingArguments(
        str(tmp_path),
        optim="subspace_sgd",
        optim_args=f"basis={tmp_path}/basis",
        max_steps=2,
        report_to="none",
        use_cpu=True,
    )
    trainer = Seq2SeqTrainer(model, args, train_dataset=Tokens())
    trainer.train()
    assert trainer.optimizer.optimizer.coefficients.any()


def test_two_accumulated_batches_are_one_large_batch(tmp_path):
    large = run(tmp_path / "a", per_device_train_batch_size=8)
    small = run(tmp_path / "b", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert distance(weights(large), weights(small)) < 1e-5
    wrong = run(tmp_path / "c", per_device_train_batch_size=4)
    assert distance(weights(large), weights(wrong)) > 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, reentrant):
    plain = run(tmp_path / "a")
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    saving = run(tmp_path / "b", **{name: True, f"{name}_kwargs": {"use_reentrant": reentrant}})
    assert distance(weights(plain), weights(saving)) < 1e-6


def test_bf16_autocast_and_bf16_weights(tmp_path):
    plain, mixed = run(tmp_path / "a"), run(tmp_path / "b", bf16=True)
    assert mixed.model.dtype == torch.float32 and 0 < distance(weights(plain), weights(mixed)) < 0.5
    pure = run(tmp_path / "c", model=tiny_gpt2(dtype=torch.bfloat16))
    optimizer, start = pure.subspace_optimizer, tiny_gpt2(dtype=torch.bfloat16)
    for a, d, p in zip(start.parameters(), optimizer.basis.lift(optimizer.coefficients), weights(pure), strict=True):
        exact = a.float() + d
        # What is rounded off is kept in bf16: but for ties, the weights are theta_0 + lift(c) rounded once.
        assert (exact.bfloat16() == p).float().mean() > 0.99
        torch.testing.assert_close(exact, p.float(), rtol=2**-8, atol=1e-6)


class Rates(TrainerCallback):
    def __init__(self):
        self.inner = []

    def on_step_end(self, args, state, control, **kwargs):
        self.inner.append(kwargs["optimizer"].optimizer.inner.param_groups[0]["lr"])


def test_learning_rate_schedules_reach_the_inner_optimizer(tmp_path):
    rates = Rates()
    run(tmp_path, callbacks=[rates], learning_rate=0.6)  # linear, as in any Trainer
    assert rates.inner == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    constant = Rates()
    run(tmp_path, callbacks=[constant], lr_scheduler_type="constant")
    assert constant.inner == [1.0] * 6


def test_max_grad_norm_clips_the_projected_gradient_and_its_norm_is_logged(tmp_path):
    free, clipped = (
        run(tmp_path / "a"),
        run(tmp_path / "b", optim="subspace_sgd", max_grad_norm=1e-3, lr_scheduler_type="constant"),
    )
    deltas = [e["sl2o_delta_norm"] for e in clipped.state.log_history if "loss" in e]
    norms = [e["grad_norm"] for e in clipped.state.log_history if "loss" in e]
    assert deltas == pytest.approx([1e-3] * 6, rel=1e-2) and min(norms) > 1e-2
    assert free.args.max_grad_norm == 0.0


def test_load_best_model_at_end_brings_back_its_coefficients(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = run(
        tmp_path, optim="subspace_sgd", learning_rate=30.0, load_best_model_at_end=True, **options
    )  # too large a step: the last model is not the best one
    best = trainer.state.best_model_checkpoint
    assert best is not None and not best.endswith("-6")
    saved = load_file(f"{best}/coefficients.safetensors")["coefficients"]
    assert torch.equal(trainer.subspace_optimizer.coefficients, saved)
    assert equal(weights(trainer), list(GPT2LMHeadModel.from_pretrained(best).parameters()))


def lora_model():
    model = tiny_gpt2()
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    torch.manual_seed(5)
    return get_peft_model(model, config)


def test_without_a_basis_the_rule_moves_every_lora_factor(tmp_path):
    trainer = run(tmp_path, model=lora_model(), basis=None, save_strategy="steps", save_steps=6)
    optimizer = trainer.optimizer.optimizer
    trainable = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert isinstance(optimizer, LearnedOptimizer) and len(trainable) == len(optimizer.param_groups[0]["params"]) == 4
    start = dict(lora_model().named_parameters())
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, start[name]) == (name not in trainable), name
    assert (tmp_path / "checkpoint-6" / "adapter_model.safetensors").is_file()


def test_a_basis_over_lora_factors(tmp_path):
    trainer = run(tmp_path, model=lora_model(), optim="subspace_adamw")
    assert all("lora_" in name for name in trainer.basis.layout.names)
    assert trainer.subspace_optimizer.coefficients.any()


def test_the_shipped_rules_are_used_when_none_is_given(tmp_path):
    model = tiny_gpt2()
    args = {"max_steps": 2, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    trainer = SL2OTrainer(
        model,
        SL2OTrainingArguments(str(tmp_path), **args),
        train_dataset=Tokens(),
        basis=random_dense(model.named_parameters()),
    )
    trainer.train()
    lora = Trainer(lora_model(), TrainingArguments(str(tmp_path), optim="sl2o", **args), train_dataset=Tokens())
    lora.train()
    rules = [trainer.subspace_optimizer.inner.rule, lora.optimizer.optimizer.rule]
    assert rules[0].fingerprint != rules[1].fingerprint


def test_last_complete_checkpoint(tmp_path):
    run(tmp_path, save_strategy="steps", save_steps=3)
    for step, state in ((8, '{"global'), (10, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / "model.safetensors").unlink()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        run(tmp_path / "empty", resume=True)


def test_objects_given_twice_or_in_vain(tmp_path):
    model, options = tiny_gpt2(), {"use_cpu": True, "report_to": "none"}
    basis = random_dense(model.named_parameters())
    with pytest.raises(ValueError, match="both as an object and as args.sl2o_basis"):
        SL2OTrainer(model, SL2OTrainingArguments(str(tmp_path), sl2o_basis="x", **options), basis=basis)
    with pytest.raises(ValueError, match="basis was given with optim"):
        SL2OTrainer(model, SL2OTrainingArguments(str(tmp_path), optim="adamw_torch", **options), basis=basis)
    warm = SL2OTrainingArguments(str(tmp_path), sl2o_warmup_steps=60, sl2o_snapshots=10, sl2o_dim=4, **options)
    with pytest.raises(ValueError, match="one was given"):
        SL2OTrainer(model, warm, basis=basis)
    with pytest.raises(ValueError, match="needs a model"):
        SL2OTrainer(None, warm, model_init=tiny_gpt2)


class Stop(TrainerCallback):
    """Raises as a kill would, at the n-th step of the run in whose folder `where` appears."""

    def __init__(self, where, step):
        self.where, self.step = where, step

    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith(self.where) and state.global_step == self.step:
            raise KeyboardInterrupt


def warm(tmp_path, **options):
    return run(
        tmp_path,
        basis=None,
        sl2o_warmup_steps=20,
        sl2o_snapshots=11,
        sl2o_dim=5,
        save_strategy="steps",
        save_steps=2,
        **options,
    )


@pytest.mark.parametrize(
    "where, step",
    [("warmup", 9), ("run", 1), ("run", 3)],
    ids=["while warming up", "before the first checkpoint", "in the subspace"],
)
def test_one_run_warms_up_fits_and_goes_on_and_survives_kills(tmp_path, where, step):
    whole = warm(tmp_path / "whole" / "run")
    folder = tmp_path / "whole" / "run"
    assert Trajectory(folder / "warmup" / "trajectory").steps == list(range(0, 21, 2))
    basis = Basis.from_pretrained(folder / "basis")
    assert basis.dim == 5 and basis.fingerprint == whole.subspace_optimizer.basis.fingerprint
    assert whole.state.global_step == 6 and whole.args.learning_rate == 1.0 and str(whole.args.optim.value) == "sl2o"
    first = [entry["loss"] for entry in whole.state.log_history if "loss" in entry][0]
    assert first < 3.9  # it goes on from the warmed-up weights, not from a fresh model (log 50 = 3.91)
    with pytest.raises(KeyboardInterrupt):
        warm(tmp_path / "kill" / "run", callbacks=[Stop(where, step)])
    resumed = warm(tmp_path / "kill" / "run", resume=True)
    assert equal(weights(whole), weights(resumed))
    assert not equal(weights(whole), weights(warm(tmp_path / "other" / "run", seed=1)))


def test_a_warm_up_takes_a_callback_that_stops_early_and_says_first_what_is_wrong(tmp_path):
    stopper = EarlyStoppingCallback(3)
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    done = warm(tmp_path / "a", callbacks=[stopper], **options)
    assert done.state.global_step == 6 and stopper in done.callback_handler.callbacks
    for bad, error in (({"weight_decay": 0.1}, ValueError), ({"optim_args": "momentum=0.9"}, ValueError)):
        with pytest.raises(error):
            warm(tmp_path / "b", **bad)
        assert not (tmp_path / "b" / "warmup").exists()


def test_parameters_outside_the_basis_by_flag(tmp_path):
    model = tiny_gpt2()
    layout = Layout.from_named_parameters(model.named_parameters())
    partial = random_dense([(n, p) for n, p in model.named_parameters() if "ln_f" not in n])
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = {}
    for outside in ("freeze", "adamw"):
        twin = tiny_gpt2()
        args = SL2OTrainingArguments(
            str(tmp_path), optim="subspace_sgd", sl2o_outside=outside, max_steps=2, report_to="none", use_cpu=True
        )
        trainer = SL2OTrainer(twin, args, train_dataset=Tokens(), basis=partial)
        trainer.train()
        moved[outside] = [n for n, p in twin.named_parameters() if "ln_f" in n and not torch.equal(p, start[n])]
        assert isinstance(trainer.subspace_optimizer, SubspaceOptimizer)
    assert moved["freeze"] == [] and len(moved["adamw"]) == 2 and layout.n > partial.layout.n
